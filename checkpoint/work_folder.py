"""Folders to work in while a result is written: a name nobody else has, a mark, and a lock.

    with work_folder(path) as work:     # NAME.k3f9x2ab.partial, beside `path`
        ...                             # fill it, then rename a part of it to `path`

A process that is killed leaves its work folder behind. The next writer of `path` finds the mark in
it, sees that no process holds its lock, and removes it. A folder without a mark belongs to somebody
else, whatever its name, and is left alone.

Requires: nothing.
Next: checkpoint/files.py.
"""
import errno
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

MARK = ".pocket_factory_work"   # the file that says that a folder is ours
OLD = "old"                     # in a work folder: what the new result has replaced
WAIT = 5.0                      # seconds to wait for another process that starts at this moment


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A marked and locked folder beside `path`; it is removed at the end of the block.

    Raises ValueError if another process writes to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(path.parent):
        remove_leftovers(path.parent, path.name)
        note_unmarked(path)
        prefix = f"{path.name[:40]}."           # a name may have 255 bytes
        work = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=path.parent))
        handle = write_mark(work, path.name)
    try:
        yield work
    finally:
        put_back(work, path)
        remove_work_folder(work)
        os.close(handle)                        # ends the lock


def write_mark(work: Path, target: str) -> int:
    """Mark and lock a work folder. Returns the open file: closing it ends the lock."""
    handle = os.open(work / MARK, os.O_RDWR | os.O_CREAT, 0o666)
    try_lock(handle)
    owner = {"target": target, "process": os.getpid(), "host": socket.gethostname()}
    os.write(handle, (json.dumps(owner) + "\n").encode())
    return handle


def read_work_mark(folder: Path) -> dict | None:
    """What the mark in a folder says; None without a mark that write_mark has made."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return mark if Path(mark["target"]).name == mark["target"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def try_lock(handle: int) -> bool | None:
    """Lock an open file. False: another process has locked it; None: the system cannot tell."""
    try:
        import fcntl
    except ImportError:                         # Windows
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time look for others in a folder, so that of two one is the first."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):              # Windows
        yield
        return
    try:
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:                     # not every network file system can
                break
        yield
    finally:
        os.close(handle)


# ---- what killed processes leave behind ---------------------------------------------------------


def remove_leftovers(parent: Path, target: str | None = None):
    """Remove the work folders of processes that were killed: those of `target`, or all in a folder.

    If a process was killed while it replaced a result, the old one is put back. Raises ValueError
    if a process is still writing.
    """
    for work in sorted(parent.glob("*.partial")):
        mark = read_work_mark(work)
        if mark is None or target not in (None, mark["target"]):
            continue
        handle = os.open(work / MARK, os.O_RDWR)
        free = try_lock(handle)
        os.close(handle)
        if free is False:
            raise ValueError(
                f"{parent / mark['target']}: another process is writing it (process "
                f"{mark.get('process')} on {mark.get('host')}); wait until it ends, or name "
                "another folder")
        if free is None:
            print(f"  note: {work} is left as it is: locks do not work here, and another process "
                  "may be writing it")
            continue
        put_back(work, parent / mark["target"])
        remove_work_folder(work)


def put_back(work: Path, path: Path):
    """Rename the old result to its name again, if the new one has not come to take it."""
    if (work / OLD).exists() and not path.exists():
        os.replace(work / OLD, path)


def remove_work_folder(work: Path):
    """Remove a work folder, its mark last: a kill in between leaves nothing without a mark."""
    for item in list(work.iterdir()) if work.is_dir() else []:
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)
        elif item.name != MARK:
            item.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def note_unmarked(path: Path):
    """Say that folders which look like those of an earlier release are not touched."""
    for suffix in (".partial", ".old"):
        other = path.with_name(path.name + suffix)
        if other.is_dir():
            print(f"  note: {other} is left as it is: it has no mark of this program. If a killed "
                  "run of an earlier release has left it there, remove it")


# ---- what belongs to the user -------------------------------------------------------------------


def files_under(folder: Path) -> set[str]:
    """The files in a folder and its folders, by their paths in it; links are not followed."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            found.add(str(path.relative_to(folder)))
    return found


def keep_aside(path: Path, why: str) -> Path:
    """Rename a file or folder to NAME.kept, or NAME.2.kept, ..., and say so."""
    kept = unused_name(path, ".kept")
    os.replace(path, kept)
    print(f"  note: {path} is kept as {kept.name}: {why}")
    return kept


def unused_name(path: Path, ending: str) -> Path:
    """NAME + ending, or NAME.2 + ending, ..., whichever nothing has yet."""
    for number in count(1):
        infix = "" if number == 1 else f".{number}"
        renamed = path.with_name(path.name + infix + ending)
        if not (renamed.exists() or renamed.is_symlink()):
            return renamed
