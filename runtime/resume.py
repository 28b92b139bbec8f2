"""Where a run begins, resumes and stops: checkpoints, output folders, signals, time limit, disk.

Lost work cannot be recomputed for free, so every rule here errs on the side of keeping:

- a run never overwrites another one unless it is told to, and never one that is running;
- a damaged checkpoint is skipped in favor of the previous one, and kept under another name;
- a run that is asked to stop saves first.

docs/never_lose_a_run.md explains this to users.

Requires: checkpoint/training_state.py (how checkpoints are written and verified).
Next: train.py, which calls all of this.

Source: exit code 75, "try again later", is EX_TEMPFAIL of BSD's sysexits.h.
"""
import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from checkpoint.shards import full_bytes
from checkpoint.training_state import STATE_FILES, STATE_FOLDER, checkpoints_in, damage
from checkpoint.work_folder import (files_under, keep_aside, remove_leftovers, unused_name,
                                    work_folder)
from errors import bytes_in_words
from settings.config import DATA, FIXED, IGNORED, KEYS, Config
from text.token_cache import TOKENIZED
from text.tokenizer import read_json

STOPPED = 75                    # exit code of a run that was asked to stop and can be resumed
LOCK = ".lock"                  # file in output_dir, locked during a run; names its process
EVAL_LOCK = ".eval.lock"        # the same of eval.py
# files that a run without a finished checkpoint leaves behind; nothing is lost with them
DISPOSABLE = (LOCK, EVAL_LOCK, TOKENIZED, STATE_FOLDER, "pissa_init", "train_config.json",
              "trainer_log.jsonl")
# what a run writes into output_dir
RESULTS = (
    "adapter_*", "*_results.json", "chat_template.jinja", "config.json", "generation_config.json",
    "model*.safetensors*", "README.md", "special_tokens_map.json", "tokenizer*",
    "train_config.json", "trainer_log.jsonl", "trainer_state.json", "training_*.png",
    "value_head.safetensors", "pissa_init", "pissa_converted", "served", "runs",
    TOKENIZED, STATE_FOLDER)
# what a checkpoint of a release without checksums.json holds
CHECKPOINT_FILES = (*RESULTS, *STATE_FILES)


# ---- stopping -----------------------------------------------------------------------------------


class StopSignals:
    """Record SIGTERM, SIGINT and the time limit, so that the loop can finish its step and save.

    minutes: the time limit, or None. since: its start, a time.monotonic(); None: now.
    A second SIGINT ends the process at once.
    """

    def __init__(self, minutes: float | None = None, since: float | None = None):
        self.signals = []
        self.minutes = minutes
        self.deadline = (since or time.monotonic()) + 60 * minutes if minutes else float("inf")
        self.previous_handlers = {
            number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def note(self, number: int, frame):
        """Handle a signal. os.write and not print: the signal may have interrupted a print."""
        if number == signal.SIGINT and "SIGINT" in self.signals:
            os._exit(128 + number)
        name = signal.Signals(number).name
        self.signals.append(name)
        if os.environ.get("RANK", "0") != "0":
            return
        hint = "; press Ctrl-C again to exit at once" if number == signal.SIGINT else ""
        try:
            os.write(2, f"\n{name}: stopping after this step{hint}\n".encode())
        except OSError:                 # stderr is closed: save anyway
            pass

    def reason(self) -> str:
        """Why the run should stop after this step, or ""."""
        if self.signals:
            return self.signals[0]
        if time.monotonic() > self.deadline:
            return f"time_limit ({self.minutes:g} minutes)"
        return ""

    def restore(self):
        """Put the previous signal handlers back."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)


# ---- one run per folder -------------------------------------------------------------------------


def lock(output: Path, name: str = LOCK):
    """Lock output_dir until this process ends. Raises ValueError if another run has locked it.

    name: of the lock file; eval.py has another one than a training run. This is the system's lock
    on a file and not the file's existence: it ends with the process, even when that is killed.
    """
    try:
        import fcntl
    except ImportError:                 # Windows
        return
    handle = os.open(output / name, os.O_RDWR | os.O_CREAT, 0o666)      # closing it would unlock
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = read_owner(output, name)
            raise ValueError(
                f"output_dir: another run is using {output} (process {owner.get('process')} on "
                f"{owner.get('host')}); wait until it ends, stop it, or name another folder"
            ) from None
        print(f"  note: {output} cannot be locked ({error.strerror}); make sure that no other run "
              "writes there")
    write_owner(handle)


def write_owner(handle: int, **more):
    """Write into the lock file which process holds it."""
    owner = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "launcher": os.getppid(),
        **more,
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(owner) + "\n").encode(), 0)


def record_stop(output: Path, why: str):
    """Record that this run was asked to stop: torchrun --max-restarts would start it again."""
    if (output / LOCK).exists():
        handle = os.open(output / LOCK, os.O_RDWR)
        write_owner(handle, stopped=why, restarts=restarts_of_torchrun())
        os.close(handle)


def read_owner(output: Path, name: str = LOCK) -> dict:
    """What the lock file says about the last run in output_dir; {} if it cannot be read."""
    try:
        return read_json(output / name)
    except (ValueError, OSError):
        return {}


def restarts_of_torchrun() -> str:
    """How often torchrun has started the ranks again after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def restarted(output: Path) -> bool:
    """Whether torchrun started this process to replace one that worked in output_dir.

    Exits if that process had been asked to stop, but not by torchrun, which stops the ranks when a
    host joins, and does not count that as a restart.
    """
    owner = read_owner(output)
    is_restart = restarts_of_torchrun() != "0"
    same_launcher = owner.get("launcher") == os.getppid()
    same_host = owner.get("host") == socket.gethostname()
    if not (is_restart and same_launcher and same_host):
        return False
    if owner.get("stopped") and owner.get("restarts") != restarts_of_torchrun():
        print(f"stopped by {owner['stopped']} before torchrun started it again: nothing to do",
              file=sys.stderr, flush=True)
        raise SystemExit(STOPPED)
    return True


# ---- which checkpoint to resume from ------------------------------------------------------------


def find_resume(config: Config) -> Path | None:
    """The checkpoint to resume from, or None for a new run.

    A run that torchrun has restarted resumes from its newest checkpoint, whatever
    resume_from_checkpoint says. Raises ValueError rather than let a run overwrite files of another.
    """
    output = Path(config.output_dir)
    if output.is_file():
        raise ValueError(f"output_dir: {output} is a file")
    request = "auto" if restarted(output) else config.resume_from_checkpoint
    if (output / LOCK).exists():
        lock(output)

    checkpoints = checkpoints_in(output)
    resume = None
    if request in ("true", "auto"):
        resume = newest_intact(output, request)
    elif request:
        resume = named_checkpoint(Path(request), checkpoints)

    replaced = [path for path in files_of_other_runs(output, resume) if not is_damaged(path)]
    check_sources(config, replaced)
    if replaced and not config.overwrite_output_dir:
        advice = "Replace it: overwrite_output_dir: true; or name another folder"
        if checkpoints and not resume:
            advice = (f"Continue it from {checkpoints[-1].name}: resume_from_checkpoint: true. "
                      f"{advice}")
        raise ValueError(
            f"output_dir: {output} holds {replaced[0].name} of an earlier run. {advice}")
    check_written_by_runs(output, replaced)
    return resume


def check_written_by_runs(output: Path, replaced: list[Path]):
    """Raises ValueError where overwrite_output_dir would overwrite files that no run has written.

    A folder in which a run has worked holds its lock file or its log.
    """
    if "process" in read_owner(output) or (output / "trainer_log.jsonl").is_file():
        return
    for path in replaced:
        if any(fnmatch(path.name, pattern) for pattern in RESULTS):
            raise ValueError(
                f"output_dir: {output} holds {path.name}, and no run of this program has worked "
                "there: overwrite_output_dir: true replaces only an earlier run. Name another "
                "folder")


def check_sources(config: Config, replaced: list[Path]):
    """Raises ValueError if the run would replace something that it reads."""
    output = Path(config.output_dir).resolve()
    checkpoints = [path.resolve() for path in replaced if is_checkpoint(path)]
    for name in files_read(config):
        source = Path(name).resolve()
        if any(path in (source, *source.parents) for path in checkpoints):
            raise ValueError(f"{name} lies in output_dir, whose checkpoints a new run replaces; "
                             "name another output_dir")
        is_result = any(fnmatch(source.name, pattern) for pattern in RESULTS)
        if source.parent == output and source.is_file() and is_result:
            raise ValueError(f"{name} lies in output_dir and has a name under which a run writes "
                             "there; name another output_dir")
    for name in [*(config.adapter_name_or_path or []), config.ref_model or ""]:
        if name and Path(name).resolve() == output and replaced:
            raise ValueError(f"{name} is output_dir, whose weights a new run replaces; name "
                             "another output_dir")


def files_read(config: Config) -> list[str]:
    """Files and folders that the config names: models, adapters, data."""
    named = [config.model_name_or_path, config.ref_model, config.dataset_dir]
    named += [*(config.adapter_name_or_path or []), *(config.ref_model_adapters or [])]
    for name in [*(config.dataset or []), *(config.eval_dataset or [])]:
        named += [name, os.path.join(config.dataset_dir, name)]
    return [name for name in named if name]


def is_checkpoint(path: Path) -> bool:
    """Whether this has the name of a checkpoint folder."""
    return bool(re.fullmatch(r"checkpoint-\d+", path.name)) and path.is_dir()


def named_checkpoint(folder: Path, checkpoints: list[Path]) -> Path:
    """The checkpoint that resume_from_checkpoint names. Raises if a run cannot resume from it.

    checkpoints: of output_dir, named in the error.
    """
    missing = [file for file in STATE_FILES if not (folder / file).is_file()]
    if missing:
        others = checkpoints_in(folder) or checkpoints
        hint = ""
        if others:
            names = ", ".join(path.name for path in others)
            hint = f"; {others[0].parent} holds {names}"
        raise FileNotFoundError(f"resume_from_checkpoint: {folder} is no complete checkpoint (it "
                                f"has no {missing[0]}){hint}")
    if why := damage(folder):
        raise ValueError(f"resume_from_checkpoint: {folder} is damaged: {why}. "
                         "resume_from_checkpoint: true takes the newest intact one")
    return folder


def newest_intact(output: Path, request: str) -> Path | None:
    """The newest intact checkpoint; damaged ones are skipped, with a message.

    Without any, returns None if `request` is auto and raises FileNotFoundError if it is true.
    """
    checkpoints = checkpoints_in(output, resumable=False)
    damaged = []
    for folder in reversed(checkpoints):
        if why := damage(folder):
            damaged.append(folder.name)
            print(f"{folder} is damaged and cannot be used: {why}", file=sys.stderr)
        elif all((folder / file).is_file() for file in STATE_FILES):
            if damaged:
                print(f"resuming from the previous one, {folder}; {damaged[-1]} is kept as "
                      f"{damaged[-1]}.damaged", file=sys.stderr, flush=True)
            return folder

    if request == "true":
        note = ""
        if len(checkpoints) > len(damaged):
            note = " (checkpoints of save_only_model: true are not complete)"
        elif damaged:
            note = f" ({', '.join(damaged)} damaged)"
        raise FileNotFoundError(
            f"resume_from_checkpoint: true, but {output} holds no complete checkpoint-N{note}; "
            "leave it out to start from the beginning, or write auto"
        )
    if damaged:
        print(f"no intact checkpoint is left in {output}: starting from the beginning",
              file=sys.stderr, flush=True)
    return None


def is_damaged(path: Path) -> bool:
    """Whether this is a damaged checkpoint: nothing is lost when a run overwrites it."""
    return is_checkpoint(path) and bool(damage(path))


def files_of_other_runs(output: Path, resume: Path | None) -> list[Path]:
    """What a run would overwrite in output_dir: with `resume` later checkpoints, else everything.

    A run killed before its first checkpoint or, without checkpoints, before its last file has left
    nothing to lose.
    """
    checkpoints = checkpoints_in(output, resumable=False)
    if resume is not None:
        for number, path in enumerate(checkpoints, 1):
            if path.samefile(resume):
                return checkpoints[number:]
    finished = (output / "all_results.json").is_file()
    if (output / "trainer_log.jsonl").is_file() and not finished:
        return checkpoints
    found = sorted(output.iterdir()) if output.is_dir() else []
    return [path for path in found
            if path.name not in DISPOSABLE and path.suffix not in (".partial", ".damaged", ".kept")]


# ---- what may change between a run and its continuation -----------------------------------------


def changed_settings(resume: Path, settings: dict, force: bool = False) -> dict[str, str]:
    """{key: "then -> now"} for each setting that differs from the checkpoint's.

    The column on_resume of settings/config.py says which keys are compared. Raises ValueError for
    a key that is FIXED and, unless `force`, for one that is DATA.
    """
    then = read_json(resume / "train_config.json")
    changed = {}
    for key, now in settings.items():
        if key in then and then[key] != now and on_resume(key) != IGNORED:
            changed[key] = f"{then[key]} -> {now}"

    for key in changed:
        if on_resume(key) == FIXED:
            raise ValueError(
                f"{key}: {changed[key]} cannot change when a run is resumed ({resume}). Set it "
                f"back, or start a new run: adapter_name_or_path: {resume}, with another output_dir"
            )
    dangerous = [f"{key}: {changed[key]}" for key in changed if on_resume(key) == DATA]
    if dangerous and not force:
        raise ValueError(
            f"{'; '.join(dangerous)}: this changes the data or the base model halfway through a "
            f"run ({resume}). Set it back, or set force_resume: true"
        )
    return changed


def on_resume(key: str) -> str:
    """FIXED, DATA, FREE or IGNORED; IGNORED for a name that is no key, such as `versions`."""
    return KEYS[key].metadata["on_resume"] if key in KEYS else IGNORED


def check_rows(resume: Path, saved: dict, rows: str, force: bool = False):
    """Raises ValueError if the training rows differ from those of `saved`, unless `force`.

    rows: a checksum, see Examples.sign in text/token_cache.py.
    """
    if saved.get("rows", rows) != rows and not force:
        raise ValueError(
            f"the training rows differ from those of {resume} ({saved['rows']} then, {rows} now), "
            "although the settings are the same: has a data file changed? Restore it, or set "
            "force_resume: true"
        )


# ---- output_dir ---------------------------------------------------------------------------------


def prepare_output(config: Config, resume: Path | None, weights: dict):
    """Create and lock output_dir, and clear it of checkpoints that belong to another run.

    Damaged checkpoints are renamed and kept. Raises OSError if the disk is too full for `weights`,
    the trained parameters by name.
    """
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    lock(output)
    for old in files_of_other_runs(output, resume):
        if is_damaged(old):
            os.replace(old, unused_name(old, ".damaged"))
        elif is_checkpoint(old) and remove_checkpoint(old):
            print(f"overwrite_output_dir: removed {old} of an earlier run")
    remove_leftovers(output)
    if config.offload_optimizer != "nvme":
        remove_state_files(output)
    # a checkpoint also holds AdamW's two moments of each weight
    copies = 1 if config.save_strategy == "no" else 4
    check_disk_space(output, full_bytes(weights.values()) * copies, "this run")


def remove_state_files(output: Path):
    """Remove what a killed run with offload_optimizer: nvme has left: it serves no other run."""
    folder = output / STATE_FOLDER
    for file in folder.glob("rank-*.safetensors"):
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def check_disk_space(output: Path, needed: int, what: str):
    """Raises OSError if the disk of output_dir has fewer than `needed` bytes left."""
    free = shutil.disk_usage(output).free
    if needed > free:
        raise OSError(f"output_dir: {output} has room for {bytes_in_words(free)}, and {what} takes "
                      f"{bytes_in_words(needed)} at least. Make room, or name another folder")


def usable_best(output: Path, best: list | None) -> list | None:
    """`best`, [step, eval_loss] of a checkpoint, if that is in output_dir and intact; else None."""
    if not best:
        return best
    folder = output / f"checkpoint-{best[0]}"
    why = damage(folder) if folder.is_dir() else "it is not there"
    if why:
        print(f"{folder}, with the lowest eval_loss ({best[1]:.4f}), cannot be used: {why}",
              file=sys.stderr, flush=True)
        return None
    return best


def remove_old_checkpoints(config: Config, output: Path, best: list | None):
    """Keep the newest save_total_limit checkpoints, among them the best if it will be loaded."""
    checkpoints = [path for path in checkpoints_in(output, resumable=False)
                   if written_by_run(path)]
    keep = {f"checkpoint-{best[0]}"} if best and config.load_best_model_at_end else set()
    kept_besides = keep & {path.name for path in checkpoints[:-1]}
    limit = max(1, (config.save_total_limit or len(checkpoints)) - len(kept_besides))
    surplus = [path for path in checkpoints[:-limit] if path.name not in keep]
    if surplus and damage(checkpoints[-1]):     # the disk did not keep what was written
        print(f"{checkpoints[-1]} is damaged although it has just been written; older checkpoints "
              "are kept", file=sys.stderr)
        return
    for path in surplus:
        remove_checkpoint(path)


def remove_checkpoint(checkpoint: Path) -> bool:
    """Remove a checkpoint of a run; what a run has not written there is kept as checkpoint-N.kept.

    Returns whether nothing is kept. Renamed, then deleted: a kill in between leaves nothing that
    looks like a checkpoint.
    """
    ours = written_by_run(checkpoint)
    others = sorted(files_under(checkpoint) - ours)
    if not others:
        with work_folder(checkpoint) as work:
            os.replace(checkpoint, work / "removed")
        return True
    kept = keep_aside(checkpoint, f"it holds {others[0]}, which no run has written")
    for name in ours:
        (kept / name).unlink(missing_ok=True)
    return False


def written_by_run(checkpoint: Path) -> set[str]:
    """The names of the files in a checkpoint folder that a run has written."""
    try:
        listed = read_json(checkpoint / "checksums.json")
    except ValueError:
        return set()
    if listed:
        return {"checksums.json", *listed} & files_under(checkpoint)
    if not (checkpoint / "train_config.json").is_file():
        return set()
    return {path.name for path in checkpoint.iterdir()
            if path.is_file() and any(fnmatch(path.name, name) for name in CHECKPOINT_FILES)}
