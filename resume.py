"""Where a run begins, goes on and stops: finding the checkpoint to resume from, output folders, signals, a time limit.

What may be lost is decided here, so every rule errs towards keeping: a run never writes over another without being
told to, a checkpoint that is not whole is passed over for the one before, and a run that is asked to stop saves first.

Read before: checkpoint.py (how checkpoints are written, and checked). Read after: train.py, which calls all of this.
Sources: exit code 75, "try again later", is EX_TEMPFAIL of BSD's sysexits.h.
"""
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from checkpoint import STATE_FILES, checkpoints_in, damage
from tokenizer import read_json

STOPPED = 75                    # exit code of a run that was asked to stop, has saved, and can be resumed


class StopSigns:
    """SIGTERM, SIGINT and the time limit, noted instead of acted on, so that a step can be finished and saved.

    minutes: the time limit, counted from here; None: none. A second SIGINT ends the process at once.
    """

    def __init__(self, minutes: float | None = None):
        self.signs, self.minutes = [], minutes
        self.until = time.time() + 60 * minutes if minutes else float("inf")
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        """The handler of both signals."""
        if number == signal.SIGINT and "SIGINT" in self.signs:
            os._exit(128 + number)
        self.signs.append(signal.Signals(number).name)
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{self.signs[-1]}: stopping after this step, which is saved"
                  + ("; once more leaves at once" if number == signal.SIGINT else ""), file=sys.stderr, flush=True)

    def asked(self) -> str:
        """Why the run should stop after this step, or ""."""
        return self.signs[0] if self.signs else f"time_limit ({self.minutes:g} minutes)" if time.time() > self.until else ""

    def restore(self):
        """Let the signals act as before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def find_resume(config) -> Path | None:
    """The checkpoint to go on from, or None. Raises rather than let a run write over what it does not go on from."""
    output, wish = Path(config.output_dir), config.resume_from_checkpoint
    there, resume = checkpoints_in(output), None
    if output.is_file():
        raise ValueError(f"output_dir: {output} is a file")
    if wish in ("true", "auto"):
        resume = newest_whole(there)
        if not resume and wish == "true":
            lack = " (those of save_only_model: true are not)" if checkpoints_in(output, resumable=False) else ""
            raise FileNotFoundError(f"resume_from_checkpoint: true, but {output} holds no complete checkpoint-N{lack}; "
                                    "leave it out to start from the beginning, or write auto")
    elif wish:
        resume = Path(wish)
        if missing := [file for file in STATE_FILES if not (resume / file).is_file()]:
            near = checkpoints_in(resume) or there
            raise FileNotFoundError(f"resume_from_checkpoint: {wish} is no complete checkpoint (it has no {missing[0]})"
                                    + (f"; {near[0].parent} holds {', '.join(p.name for p in near)}" if near else ""))
        if why := damage(resume):
            raise ValueError(f"resume_from_checkpoint: {wish} is damaged: {why}. resume_from_checkpoint: true takes the "
                             "newest whole one")
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


def newest_whole(checkpoints: list[Path]) -> Path | None:
    """The last checkpoint that is as it was written; damaged ones are passed over, and named."""
    for folder in reversed(checkpoints):
        if not (why := damage(folder)):
            return folder
        print(f"{folder} is damaged: {why}. Going on from the one before", file=sys.stderr)
    return None


def is_damaged(path: Path) -> bool:
    """Is this a checkpoint that cannot be used? Nothing is lost when a run writes over it."""
    return path.name.startswith("checkpoint-") and path.is_dir() and bool(damage(path))


def not_of_this_run(output, resume) -> list[Path]:
    """What a run that goes on from `resume` (None: a new one) would write over in output_dir: later checkpoints, or all.

    A run that was stopped before its first checkpoint has left nothing to lose.
    """
    there = checkpoints_in(output, resumable=False)
    same = [resume is not None and path.samefile(resume) for path in there]
    if any(same):
        return there[same.index(True) + 1:]
    found = sorted(output.iterdir()) if output.is_dir() else []
    return [path for path in found if path.name not in ("train_config.json", "trainer_log.jsonl")
            and path.suffix != ".partial"]


# what cannot change when a run goes on: the shape of what is trained
FIXED = ("finetuning_type", "stage", "lora_rank", "lora_alpha", "lora_target", "additional_target", "use_rslora",
         "lora_dropout")
# what makes the rest of the run another one: the rows, their order, how they become tokens, the base
DANGEROUS = ("model_name_or_path", "adapter_name_or_path", "dataset", "dataset_dir", "eval_dataset", "val_size",
             "max_samples", "template", "tool_format", "default_system", "enable_thinking", "preserve_thinking",
             "train_on_prompt", "mask_history", "cutoff_len", "packing", "neat_packing", "placeholders", "skip_bad_rows",
             "split_special_tokens", "disable_shuffling", "seed", "data_seed", "dataloader_drop_last", "even_batches")
NOT_COMPARED = ("versions", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "force_resume", "time_limit")


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


def prepare_output(config, resume, weights):
    """Make output_dir, without checkpoints of other runs: they must never be resumed. Raises OSError for a full disk."""
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for old in not_of_this_run(output, resume):
        if is_damaged(old):
            os.replace(old, old.with_name(f"{old.name}.damaged"))
        elif old.name.startswith("checkpoint-"):
            print(f"overwrite_output_dir: removed {old} of an earlier run")
            shutil.rmtree(old)
    for unfinished in output.glob("checkpoint-*.partial"):
        shutil.rmtree(unfinished)
    copies = 1 if config.save_strategy == "no" else 4       # a checkpoint has AdamW's two moments of each weight as well
    needed, free = sum(p.nbytes for p in weights.values()) * copies / 1e9, shutil.disk_usage(output).free / 1e9
    if needed > free:
        raise OSError(f"output_dir: {output} has room for {free:.2f} GB, and this run writes {needed:.2f} GB at least. Make "
                      "room, or name another folder")


def remove_old_checkpoints(config, output, best):
    """Keep save_total_limit checkpoints: the newest, and the best one if it will be loaded at the end."""
    there = checkpoints_in(output, resumable=False)
    keep = {f"checkpoint-{best[0]}"} if best and config.load_best_model_at_end else set()
    if damage(there[-1]):                       # the disk did not keep what was written: then nothing is taken away
        print(f"{there[-1]} is damaged although it has just been written; older checkpoints are kept", file=sys.stderr)
        return
    limit = max(1, (config.save_total_limit or len(there)) - len(keep & {p.name for p in there[:-1]}))
    for old in there[:-limit]:
        if old.name not in keep:
            shutil.rmtree(old)
