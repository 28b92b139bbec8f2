"""Jobs of the web board: each is a process in its own session, with a folder of files.

    job = Jobs(Path("saves/.board")).start("train", [python, "train.py", "{config}"], text, name)
    job.state()                                 # waiting, running, finished, stopped, failed, …
    job.stop()                                  # SIGTERM: train.py saves a checkpoint and ends

A folder 0001, 0002, … contains the config, log.txt, job.json and state.json. A supervisor process,
`python -m web.jobs FOLDER LOCK`, waits until earlier jobs have ended, starts the script and records
its exit code. It holds a lock on the folder: a job whose lock is free has ended, even after a
crash. Jobs and the queue therefore continue without browser and board, and several boards see the
same jobs.

Requires: nothing.
Next: web/run_files.py, board.py.
"""
from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 75                # exit code of train.py after SIGTERM: saved, can be resumed
PASSING = ("plan", "rows")  # kinds of jobs of which only the newest folders are kept
KEPT = 4                    # folders of each of these kinds
LONGEST_LOG = 200_000       # bytes that are read at a time
SECONDS_BETWEEN_LOOKS = 0.3


@dataclass(frozen=True)
class BoardJob:
    """A folder of one job."""
    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def read(self, name: str) -> dict:
        """The content of job.json or state.json; {} where it is missing or half written."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def is_alive(self) -> bool:
        """Whether the supervisor process holds the lock."""
        try:
            with open(self.folder / "lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def state(self) -> str:
        """One word: waiting, running, stopping, finished, stopped, cancelled, failed or killed."""
        alive = self.is_alive()         # read first: state.json is final before the lock is freed
        written = self.read("state.json")
        if written.get("state") != "ended":
            if alive:
                return "stopping" if written.get("stopping") else written.get("state", "waiting")
            return "killed" if written.get("state") == "running" else "cancelled"
        code = written.get("code")
        if written.get("stopping") and code == -signal.SIGTERM:
            return "cancelled"
        return {None: "cancelled", 0: "finished", STOPPED: "stopped"}.get(code, "failed")

    def config(self) -> Path | None:
        """The config that the job was started with."""
        name = self.read("job.json").get("config")
        return self.folder / name if name else None

    def describe(self) -> dict:
        """The fields of a job that the page shows."""
        job, written = self.read("job.json"), self.read("state.json")
        shown = ("kind", "name", "output", "created", "changed_settings")
        return {"number": self.number, "state": self.state(), "code": written.get("code"),
                "started": written.get("started"), "ended": written.get("ended"),
                **{name: job.get(name) for name in shown}}

    def log(self, after: int = 0) -> tuple[str, int]:
        """(text of the log from byte `after` on, size of the log); at most LONGEST_LOG bytes."""
        try:
            with open(self.folder / "log.txt", "rb") as file:
                size = file.seek(0, os.SEEK_END)
                start = max(min(after, size), size - LONGEST_LOG)
                file.seek(start)
                return file.read().decode("utf-8", "replace"), size
        except OSError:
            return "", 0

    def stop(self, kill: bool = False):
        """Send SIGTERM to the job, or with `kill` SIGKILL to all its processes."""
        written = self.read("state.json")
        if not self.is_alive() or not written.get("process"):
            return
        if kill:
            os.killpg(written["process"], signal.SIGKILL)
        else:
            os.kill(written["process"], signal.SIGTERM)


class Jobs:
    """All jobs below a folder."""

    def __init__(self, home: Path):
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)

    def list(self) -> list[BoardJob]:
        """The jobs, the oldest first."""
        return [BoardJob(folder) for folder in sorted(self.home.glob("[0-9]" * 4))
                if (folder / "job.json").is_file()]

    def get(self, number: int) -> BoardJob | None:
        """The job of a number, or None."""
        return next((job for job in self.list() if job.number == number), None)

    def start(self, kind: str, command: list[str], text: str, name: str, *, cwd: Path,
              wait: bool = False, environment: dict | None = None, **more) -> BoardJob:
        """Start a process, or queue it with `wait`. {config} and {folder} in the command are
        replaced by the file with `text`, named `name`, and by the job's folder."""
        self.remove_passing(kind)
        folder = self.new_folder()
        config = folder / safe_name(name)
        config.write_text(text, encoding="utf-8")
        command = [part.replace("{config}", str(config)).replace("{folder}", str(folder))
                   for part in command]
        write_whole(folder / "job.json", {
            "kind": kind, "name": config.stem, "config": config.name, "command": command,
            "cwd": str(cwd), "wait": wait, "environment": environment or {},
            "created": time.time(), **more})
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)        # inherited: never free until the job has ended
            subprocess.Popen(
                [sys.executable, "-m", "web.jobs", str(folder), str(lock)], cwd=ROOT,
                pass_fds=[lock], start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=open(folder / "log.txt", "ab"))
        finally:
            os.close(lock)
        return BoardJob(folder)

    def new_folder(self) -> Path:
        """A new folder with the next free number, also while another board creates one."""
        names = [int(path.name) for path in self.home.glob("[0-9]" * 4)]
        number = max(names, default=0) + 1
        while True:
            try:
                folder = self.home / f"{number:04}"
                folder.mkdir(mode=0o700)
                return folder
            except FileExistsError:
                number += 1

    def remove_passing(self, kind: str):
        """Delete all but the newest folders of plans and rows."""
        if kind in PASSING:
            same = [job for job in self.list() if job.read("job.json").get("kind") == kind]
            for job in same[:-KEPT]:
                if not job.is_alive():
                    shutil.rmtree(job.folder, ignore_errors=True)


def safe_name(name: str) -> str:
    """A file name for a config: the last part of `name`, with only letters, digits, _, . and -."""
    suffix = ".json" if name.endswith(".json") else ".yaml"
    stem = re.sub(r"[^\w.-]+", "-", Path(name).stem).strip("-.")[:60]
    return (stem or "config") + suffix


def write_whole(path: Path, content: dict):
    """Write a JSON file atomically: other processes may read it at any time."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(content), encoding="utf-8")
    os.replace(beside, path)


# ---- the supervisor process ---------------------------------------------------------------------


def main(argv: list[str]):
    """python -m web.jobs FOLDER LOCK: wait, run the script, record its exit code.

    LOCK: the inherited file descriptor, which stays open until this process ends.
    """
    job = BoardJob(Path(argv[0]))
    settings = job.read("job.json")
    state = {"state": "waiting", "process": os.getpid(), "stopping": False}
    child = None

    def save(**changes):
        state.update(changes)
        write_whole(job.folder / "state.json", state)

    def stop(*_):
        state["stopping"] = True
        if child and child.poll() is None:
            child.send_signal(signal.SIGTERM)
            save()

    signal.signal(signal.SIGTERM, stop)
    save()
    earlier = [other for other in Jobs(job.folder.parent).list() if other.number < job.number
               and other.read("job.json").get("wait")]
    while settings["wait"] and any(other.is_alive() for other in earlier):
        if state["stopping"]:
            return save(state="ended", code=None)
        time.sleep(SECONDS_BETWEEN_LOOKS)

    with open(job.folder / "log.txt", "ab") as log:
        child = subprocess.Popen(
            settings["command"], cwd=settings["cwd"], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **settings["environment"]})
    if state["stopping"]:                           # SIGTERM arrived while the script was starting
        child.send_signal(signal.SIGTERM)
    save(state="running", child=child.pid, started=time.time())
    code = child.wait()
    save(state="ended", code=code, ended=time.time())


if __name__ == "__main__":
    main(sys.argv[1:])
