"""Where a run begins, goes on and stops: the checkpoint to resume from, output folders, signals, a time limit, room.

What may be lost is decided here, so every rule errs towards keeping: a run never writes over another without being
told to, nor while another is at work; a checkpoint that is not whole is passed over for the one before, and set aside;
a run that is asked to stop saves first. docs/never_lose_a_run.md tells it to those who run it.

Read before: checkpoint.py (how checkpoints are written, and checked). Read after: train.py, which calls all of this.
Sources: exit code 75, "try again later", is EX_TEMPFAIL of BSD's sysexits.h.
"""
import errno
import json
import os
import shutil
import signal
import socket
import sys
import time
from itertools import count
from pathlib import Path

from checkpoint import STATE_FILES, checkpoints_in, damage
from store import TOKENISED
from tokenizer import read_json

STOPPED = 75                    # exit code of a run that was asked to stop, has saved, and can be resumed
LOCK = ".lock"                  # in output_dir: locked while a run is at work; tells which one, and why it stopped


# ---- being asked to stop ----------------------------------------------------------------------------------------


class StopSigns:
    """SIGTERM, SIGINT and the time limit, noted instead of acted on, so that a step can be finished and saved.

    minutes: the time limit, counted from `since` (seconds since the epoch; none: now); None: no limit. A second SIGINT
    ends the process at once.
    """

    def __init__(self, minutes: float | None = None, since: float | None = None):
        self.signs, self.minutes = [], minutes
        self.until = (since or time.time()) + 60 * minutes if minutes else float("inf")
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        """The handler of both signals. It writes with os.write: print may be at work in what it interrupts."""
        if number == signal.SIGINT and "SIGINT" in self.signs:
            os._exit(128 + number)
        self.signs.append(signal.Signals(number).name)
        if os.environ.get("RANK", "0") == "0":
            more = "; once more leaves at once" if number == signal.SIGINT else ""
            try:
                os.write(2, f"\n{self.signs[-1]}: stopping after this step{more}\n".encode())
            except OSError:                         # nobody reads it any more: save all the same
                pass

    def asked(self) -> str:
        """Why the run should stop after this step, or ""."""
        return self.signs[0] if self.signs else f"time_limit ({self.minutes:g} minutes)" if time.time() > self.until else ""

    def restore(self):
        """Let the signals act as before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- one run in a folder ----------------------------------------------------------------------------------------


def lock(output: Path):
    """Keep output_dir to this process until it ends, in whatever way. Raises ValueError if another run has it.

    The system's lock on a file, not the file itself: it ends with the process, so that a kill leaves nothing stuck.
    """
    try:
        import fcntl
    except ImportError:                             # Windows has no such locks
        return
    handle = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o666)          # stays open: closing it would end the lock
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            word = last_word(output)
            raise ValueError(f"output_dir: another run is at work in {output} (process {word.get('process')} on "
                             f"{word.get('host')}); wait until it ends, stop it, or name another folder") from None
        print(f"  note: {output} cannot be locked ({error.strerror}); see to it that no other run writes there")
    leave_word(handle)


def leave_word(handle: int, **more):
    """Write into the lock file who is at work."""
    word = {"host": socket.gethostname(), "process": os.getpid(), "launcher": os.getppid(), **more}
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(word) + "\n").encode(), 0)


def note_stop(output, why: str):
    """Remember that this run has been asked to stop, for a torchrun --max-restarts that would start it again."""
    if (output / LOCK).exists():
        handle = os.open(output / LOCK, os.O_RDWR)
        leave_word(handle, stopped=why)
        os.close(handle)


def last_word(output: Path) -> dict:
    """What the lock file says of the last run in output_dir; {} where it says nothing."""
    try:
        return read_json(output / LOCK)
    except (ValueError, OSError):
        return {}


def restarted(output: Path) -> bool:
    """Has torchrun started this process in place of one that worked in output_dir? Exits if that one was to stop."""
    word = last_word(output)
    again = (os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
             and (word.get("host"), word.get("launcher")) == (socket.gethostname(), os.getppid()))
    if again and word.get("stopped"):
        print(f"stopped by {word['stopped']} before torchrun started it again: nothing to do", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED)
    return again


# ---- where to begin ---------------------------------------------------------------------------------------------


def find_resume(config) -> Path | None:
    """The checkpoint to go on from, or None. Raises rather than let a run write over what it does not go on from.

    A run that torchrun has started again goes on from its newest checkpoint, whatever resume_from_checkpoint says.
    """
    output = Path(config.output_dir)
    if output.is_file():
        raise ValueError(f"output_dir: {output} is a file")
    wish = "auto" if restarted(output) else config.resume_from_checkpoint
    if (output / LOCK).exists():
        lock(output)
    there = checkpoints_in(output)
    resume = newest_whole(output, wish) if wish in ("true", "auto") else chosen(Path(wish), there) if wish else None
    replaced = [path for path in not_of_this_run(output, resume) if not is_damaged(path)]
    for name in [config.model_name_or_path, *(config.adapter_name_or_path or [])]:
        source = Path(name).resolve()
        if any(old.resolve() in (source, *source.parents) for old in replaced if old.name.startswith("checkpoint-")):
            raise ValueError(f"{name} lies in output_dir, whose checkpoints a new run replaces; name another output_dir")
    if replaced and not config.overwrite_output_dir:
        raise ValueError(f"output_dir: {output} is not empty: it holds {replaced[0].name}, which is no part of this run"
                         + (f". resume_from_checkpoint: true goes on from {there[-1].name}" if there and not resume else "")
                         + ". Name another folder, or set overwrite_output_dir: true")
    return resume


def chosen(folder: Path, there: list[Path]) -> Path:
    """The checkpoint that resume_from_checkpoint names. Raises if it cannot be resumed."""
    if missing := [file for file in STATE_FILES if not (folder / file).is_file()]:
        near = checkpoints_in(folder) or there
        raise FileNotFoundError(f"resume_from_checkpoint: {folder} is no complete checkpoint (it has no {missing[0]})"
                                + (f"; {near[0].parent} holds {', '.join(p.name for p in near)}" if near else ""))
    if why := damage(folder):
        raise ValueError(f"resume_from_checkpoint: {folder} is damaged: {why}. resume_from_checkpoint: true takes the "
                         "newest whole one")
    return folder


def newest_whole(output: Path, wish: str) -> Path | None:
    """The last checkpoint that is as it was written; damaged ones are passed over, and named.

    None if there is none and `wish` is auto; if it is true, raises FileNotFoundError.
    """
    found, damaged = checkpoints_in(output, resumable=False), []
    for folder in reversed(found):
        if why := damage(folder):
            damaged.append(folder.name)
            print(f"{folder} is damaged and cannot be used: {why}", file=sys.stderr)
        elif all((folder / file).is_file() for file in STATE_FILES):
            if damaged:
                print(f"going on from the one before, {folder}; {damaged[-1]} is kept as {damaged[-1]}.damaged",
                      file=sys.stderr, flush=True)
            return folder
    if wish == "true":
        lack = " (those of save_only_model: true are not)" if len(found) > len(damaged) else \
            f" ({', '.join(damaged)} damaged)" if damaged else ""
        raise FileNotFoundError(f"resume_from_checkpoint: true, but {output} holds no complete checkpoint-N{lack}; "
                                "leave it out to start from the beginning, or write auto")
    if damaged:
        print(f"no whole checkpoint is left in {output}: starting from the beginning", file=sys.stderr, flush=True)
    return None


def is_damaged(path: Path) -> bool:
    """Is this a checkpoint that cannot be used? Nothing is lost when a run writes over it."""
    return path.name.startswith("checkpoint-") and path.is_dir() and bool(damage(path))


def not_of_this_run(output: Path, resume) -> list[Path]:
    """What a run that goes on from `resume` (None: a new one) would write over in output_dir: later checkpoints, or all.

    A run that was killed before its first checkpoint, or, without checkpoints, before its last file, has left nothing
    to lose.
    """
    there = checkpoints_in(output, resumable=False)
    same = [resume is not None and path.samefile(resume) for path in there]
    if any(same):
        return there[same.index(True) + 1:]
    if (output / "trainer_log.jsonl").is_file() and not (output / "all_results.json").is_file():
        return there
    found = sorted(output.iterdir()) if output.is_dir() else []
    return [path for path in found
            if path.name not in (LOCK, TOKENISED, "pissa_init", "train_config.json", "trainer_log.jsonl")
            and path.suffix not in (".partial", ".damaged")]


# ---- what may change --------------------------------------------------------------------------------------------

# what cannot change when a run goes on: the shape of what is trained
FIXED = ("finetuning_type", "stage", "train_from_scratch", "lora_rank", "lora_alpha", "lora_target", "additional_target",
         "use_rslora", "use_dora", "lora_dropout", "freeze_trainable_layers", "freeze_trainable_modules",
         "freeze_extra_modules", "pure_bf16", "pissa_init", "pissa_iter", "optim", "use_muon",
         "use_galore", "galore_target", "galore_rank")
# what makes the rest of the run another one: the rows, their order, how they become tokens, the base
DANGEROUS = ("model_name_or_path", "model_revision", "adapter_name_or_path", "create_new_adapter", "base_precision",
             "ref_model", "ref_model_adapters",
             "quantization_bit", "quantization_type", "double_quantization", "quantization_method",
             "dataset", "dataset_dir",
             "eval_dataset", "val_size", "max_samples", "template", "tool_format", "default_system", "enable_thinking",
             "preserve_thinking", "train_on_prompt", "mask_history", "cutoff_len", "packing", "neat_packing",
             "preprocessing_batch_size", "placeholders", "skip_bad_rows", "split_special_tokens", "disable_shuffling",
             "seed", "data_seed", "dataloader_drop_last", "even_batches", "token_budget")
# what applies from the first step on that is taken anew, and is listed
HARMLESS = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "num_train_epochs",
            "max_steps", "galore_update_interval", "galore_scale", "weight_decay", "adam_beta1", "adam_beta2",
            "adam_epsilon", "max_grad_norm",
            "pref_loss", "paper_losses", "pref_beta", "pref_ftx", "dpo_label_smoothing", "simpo_gamma", "kto_chosen_weight",
            "kto_rejected_weight", "loraplus_lr_ratio", "moe_aux_loss_coef", "neftune_noise_alpha",
            "per_device_train_batch_size", "gradient_accumulation_steps", "join_micro_batches", "bf16", "fp16", "use_cpu",
            "flash_attn", "disable_gradient_checkpointing", "ddp_timeout", "fsdp", "force_template", "logging_steps", "logging_first_step",
            "save_strategy", "save_steps", "save_total_limit", "save_only_model", "do_eval", "eval_strategy", "eval_steps",
            "per_device_eval_batch_size", "pissa_convert", "load_best_model_at_end", "metric_for_best_model",
            "early_stopping_steps")
# what says nothing about the training: where it is kept, how it is shown, and what other scripts read
NOT_COMPARED = ("versions", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "force_resume", "time_limit",
                "dry_run", "profile", "torch_compile", "cache_dir", "tokenized_path", "overwrite_cache", "preprocessing_num_workers",
                "disable_tqdm", "plot_loss", "infer_dtype", "do_sample", "temperature", "top_p", "top_k",
                "repetition_penalty", "max_new_tokens", "max_length", "skip_special_tokens", "prompt", "fast_chat", "raw",
                "report_to", "run_name", "logging_dir", "project", "use_swanlab", "swanlab_project", "swanlab_workspace",
                "swanlab_run_name", "swanlab_mode", "swanlab_logdir", "jsonl", "do_train", "do_predict", "predict_with_generate", "compare",
                "task", "task_dir", "lang", "n_shot", "save_dir",
                "export_dir", "export_size", "export_device", "overwrite", "merge_base")


def changed_settings(resume, settings, force: bool = False) -> dict:
    """{key: "then -> now"} of what the config says otherwise than it did when the checkpoint was written.

    Raises ValueError for FIXED ones, and for DANGEROUS ones unless `force`: the others only change how the run goes on.
    """
    then = read_json(resume / "train_config.json")
    changed = {key: f"{then[key]} -> {now}" for key, now in settings.items()
               if key in then and then[key] != now and key not in NOT_COMPARED}
    for key in FIXED:
        if key in changed:
            raise ValueError(f"{key}: {changed[key]} cannot change when a run is resumed ({resume}). Set it back, or start "
                             f"anew: adapter_name_or_path: {resume}, with another output_dir")
    dangerous = [f"{key}: {changed[key]}" for key in DANGEROUS if key in changed]
    if dangerous and not force:
        raise ValueError(f"{'; '.join(dangerous)}: with that, the run would go on with other rows than {resume} has left "
                         "to learn. Set it back, or set force_resume: true")
    return changed


def check_rows(resume, saved: dict, rows: str, force: bool = False):
    """Raises ValueError if the files of the data have changed since `saved` (rows: see Examples.sign in store.py), unless `force`."""
    if saved.get("rows", rows) != rows and not force:
        raise ValueError(f"the training rows are not those of {resume} ({saved['rows']} then, {rows} now), although the "
                         "settings are: has a file of the data changed? Put it back, or set force_resume: true")


# ---- output_dir -------------------------------------------------------------------------------------------------


def prepare_output(config, resume, weights):
    """Make output_dir, locked, without checkpoints of other runs: they must never be resumed; damaged ones are set aside.

    Raises OSError for a full disk.
    """
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    lock(output)
    for old in not_of_this_run(output, resume):
        if is_damaged(old):
            names = (old.with_name(f"{old.name}{f'.{n}' if n > 1 else ''}.damaged") for n in count(1))
            os.replace(old, next(path for path in names if not path.exists()))
        elif old.name.startswith("checkpoint-"):
            print(f"overwrite_output_dir: removed {old} of an earlier run")
            remove(old)
    for unfinished in output.glob("checkpoint-*.partial"):
        shutil.rmtree(unfinished)
    copies = 1 if config.save_strategy == "no" else 4       # a checkpoint has AdamW's two moments of each weight as well
    room_for(output, sum(p.nbytes for p in weights.values()) * copies, "this run")


def room_for(output: Path, needed: int, what: str):
    """Raises OSError if output_dir has no room for `needed` bytes."""
    needed, free = needed / 1e9, shutil.disk_usage(output).free / 1e9
    if needed > free:
        raise OSError(f"output_dir: {output} has room for {free:.2f} GB, and {what} takes {needed:.2f} GB at least. Make "
                      "room, or name another folder")


def usable_best(output: Path, best: list | None) -> list | None:
    """`best`, [step, eval_loss] of a checkpoint, if that is still in output_dir and whole; else None."""
    folder = output / f"checkpoint-{best[0]}" if best else output
    if best and (why := damage(folder) if folder.is_dir() else "it is not there"):
        print(f"{folder}, with the lowest eval_loss ({best[1]:.4f}), cannot be used: {why}", file=sys.stderr, flush=True)
        return None
    return best


def remove_old_checkpoints(config, output, best):
    """Keep save_total_limit checkpoints: the newest, and the best one if it will be loaded at the end."""
    there = checkpoints_in(output, resumable=False)
    keep = {f"checkpoint-{best[0]}"} if best and config.load_best_model_at_end else set()
    limit = max(1, (config.save_total_limit or len(there)) - len(keep & {p.name for p in there[:-1]}))
    surplus = [old for old in there[:-limit] if old.name not in keep]
    if surplus and damage(there[-1]):           # the disk did not keep what was written: then nothing is taken away
        print(f"{there[-1]} is damaged although it has just been written; older checkpoints are kept", file=sys.stderr)
        return
    for old in surplus:
        remove(old)


def remove(checkpoint: Path):
    """Delete a checkpoint under another name: a kill in between leaves none that looks like one."""
    gone = checkpoint.with_name(checkpoint.name + ".partial")
    if gone.exists():
        shutil.rmtree(gone)
    os.replace(checkpoint, gone)
    shutil.rmtree(gone)
