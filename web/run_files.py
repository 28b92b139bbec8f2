"""The runs and results that the web board shows, read from files of train.py and eval.py.

    list_runs(folders, jobs)            all runs, with their state and last metrics
    logged_steps(folder, after=0)       the logged steps, from line `after` of trainer_log.jsonl on
    read_results(folder)                metrics of each model, and the rows that changed most

Runs started from a terminal are shown like runs started by the board.

Requires: web/folders.py, web/jobs.py.
Next: board.py.

File names and metric names are LLaMA-Factory's.
"""
from __future__ import annotations

import difflib
import fcntl
import json
import math
import os
import re
import signal
import struct
import sys
from functools import lru_cache
from pathlib import Path

from web.folders import Folders, read_object
from web.jobs import BoardJob, Jobs

LOG = "trainer_log.jsonl"
LOCK = ".lock"                  # of runtime/resume.py: held while a run works in the folder
PLACES = ("saves", "output")    # folders with runs, below the first of the board's folders
MOST_ROWS = 4000                # points of a chart; of longer logs every n-th row is shown
MOST_CHANGED = 20
LONGEST_TEXT = 20_000           # characters whose similarity is measured


# ---- lines and JSON -----------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict]:
    """The complete lines of a JSON-lines file; [] where it is missing."""
    try:
        state = path.stat()
        return parsed_lines(path, state.st_mtime_ns, state.st_size)
    except OSError:
        return []


@lru_cache(maxsize=64)
def parsed_lines(path: Path, changed: int, size: int) -> list[dict]:
    """read_lines, cached until the file changes: the page polls every second."""
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:              # half a line: it is being written
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def finite(value):
    """The value with None for NaN and infinity, which JSON in a browser does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- runs ---------------------------------------------------------------------------------------


def list_runs(folders: Folders, jobs: Jobs) -> list[dict]:
    """The runs, newest first, as describe_run returns them."""
    by_folder: dict[Path, BoardJob] = {}
    for job in jobs.list():
        settings = job.read("job.json")
        if settings.get("kind") == "train" and settings.get("output"):
            folder = Path(settings["output"])
            if folder not in by_folder or not by_folder[folder].is_alive():
                by_folder[folder] = job         # the newest, or the one that is running
    found = {folder: None for folder in logged_folders(folders)} | by_folder
    runs = [describe_run(folder, job, folders) for folder, job in found.items()]
    return sorted(runs, key=lambda run: -run["changed"])


def logged_folders(folders: Folders) -> list[Path]:
    """Output folders with a log."""
    return [log.parent.resolve() for log in files_named(LOG, folders)]


def files_named(name: str, folders: Folders) -> list[Path]:
    """The files of this name in output folders; links to files outside are left out."""
    places = [folders.roots[0] / place for place in PLACES] + folders.roots[1:]
    files = [file for place in places for pattern in (name, f"*/{name}", f"*/*/{name}")
             for file in place.glob(pattern)]
    return [file for file in files
            if any(file.resolve().is_relative_to(root) for root in folders.roots)]


def describe_run(folder: Path, job: BoardJob | None, folders: Folders) -> dict:
    """The fields of a run that the list shows: folder, state, job, last metrics, …"""
    rows = read_lines(folder / LOG)
    figures = {}
    for row in rows:
        figures |= row                              # the last value of each metric
    state = job.state() if job else ""
    changed = (folder / LOG).stat().st_mtime if rows else 0
    created = job.read("job.json")["created"] if job else 0
    if state not in ("running", "waiting", "stopping"):
        state = state_of_folder(folder, state, created)
    elif changed < created:                         # the log of an earlier run
        figures = {}
    return finite({
        "folder": folders.shown(folder), "state": state, "job": job.number if job else None,
        "figures": figures, "changed": max(changed, created),
        "name": folder.name, "can_resume": any(folder.glob("checkpoint-*/trainer_state.json")),
        "trained": any(folder.glob("*.safetensors")),
    })


def state_of_folder(folder: Path, otherwise: str, since: float) -> str:
    """The state of a run from its files.

    otherwise: the state of its newest job, "" without one. since: when that job was created.
    """
    if lock_holder(folder):
        return "running"
    results = folder / "all_results.json"               # the last file of a run
    if results.is_file() and results.stat().st_mtime >= since:
        return "finished"
    if otherwise:
        return otherwise
    return "stopped" if read_object(folder / LOCK).get("stopped") else "ended"


def lock_holder(folder: Path) -> int | None:
    """The process that holds the lock of an output_dir; None without one, or if not on Linux.

    Asks the kernel: a process number stored in a file may have been reused.
    """
    if sys.platform != "linux":
        return None
    try:
        with open(folder / LOCK, "rb+") as file:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, process = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return None
    return process if kind != fcntl.F_UNLCK and process > 0 else None


def stop_run(folder: Path):
    """Ask a run started outside the board to save a checkpoint and end."""
    if process := lock_holder(folder):
        os.kill(process, signal.SIGTERM)


def logged_steps(folder: Path, after: int = 0) -> dict:
    """{"rows": logged steps from line `after` on, "next": number of lines, "first": first line}.

    The page compares `first` to notice a new run in the same folder. If the log has no gradient
    norms, they are read from trainer_state.json.
    """
    rows = read_lines(folder / LOG)
    shown = rows[after:]
    if any("loss" in row and "grad_norm" not in row for row in shown):
        history = read_object(folder / "trainer_state.json").get("log_history", [])
        norms = {row.get("step"): row["grad_norm"] for row in history if "grad_norm" in row}
        shown = [{"grad_norm": norms.get(row.get("current_steps")), **row} for row in shown]
    thinned = shown[::math.ceil(len(shown) / MOST_ROWS) or 1]
    return finite({"rows": thinned, "next": len(rows), "first": json.dumps(rows[:1])})


# ---- results of eval.py -------------------------------------------------------------------------


def result_folders(folders: Folders) -> list[str]:
    """Folders in which eval.py has compared models."""
    found = files_named("comparison.json", folders)
    newest = sorted(found, key=lambda path: -path.stat().st_mtime)
    return [folders.shown(path.parent) for path in newest]


def read_results(folder: Path) -> dict:
    """{"sides": {model: metrics}, "changed": [rows], "differ": n, "rows": number of answers}.

    A row is {"number", "prompt", "label", "answers": {model: text}, "gain"}: the gain in similarity
    to the label (difflib's ratio, 0 to 1) from the base to the first model. The rows with the
    largest gain or loss come first.
    """
    sides = read_object(folder / "comparison.json")
    names = list(sides)
    first, *others = names or [""]
    answers = {first: read_lines(folder / "generated_predictions.jsonl")}
    for name in others:
        answers[name] = read_lines(folder / f"generated_predictions.{name}.jsonl")
    rows = []
    for number, row in enumerate(answers[first], 1):
        texts = {name: found[number - 1].get("predict", "") for name, found in answers.items()
                 if len(found) >= number}
        label = row.get("label") or ""
        gain = similarity(texts[first], label) - similarity(texts.get("base", ""), label)
        if texts.get("base") not in (None, texts[first]):
            rows.append({"number": number, "prompt": row.get("prompt", ""), "label": label,
                         "answers": texts, "gain": gain})
    rows.sort(key=lambda row: -abs(row["gain"]))
    return finite({"sides": sides, "changed": rows[:MOST_CHANGED], "differ": len(rows),
                   "rows": len(answers[first])})


def similarity(text: str, label: str) -> float:
    """How alike two texts are, 0 to 1."""
    return difflib.SequenceMatcher(None, text[:LONGEST_TEXT], label[:LONGEST_TEXT],
                                   autojunk=False).ratio()


# ---- progress -----------------------------------------------------------------------------------


def progress_of(log: str) -> float | None:
    """Progress, 0 to 1, of the last progress bar in a log; None without a progress bar."""
    found = re.findall(r"(\d{1,3})%\|", log)
    return int(found[-1]) / 100 if found else None


def screen_of(log: str) -> str:
    """A log as a terminal would show it: carriage returns overwrite the line, no color codes."""
    lines = []
    for line in log.split("\n"):
        lines.append(line.rstrip("\r").rsplit("\r", 1)[-1])
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "\n".join(lines))
