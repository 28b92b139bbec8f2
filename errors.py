"""How a script starts and how it fails: one sentence on stderr and an exit code.

Every script ends with `run_script(main)`. A mistake of the user is a ValueError or an OSError whose
message says where it is, what was found and what to do; it is printed without a traceback.

Requires: nothing.
Next: data.py.
"""
from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# how torch.distributed words the loss of another process
LOST_RANK_ERRORS = ("DistBackendError", "DistNetworkError")
LOST_RANK_MESSAGES = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused",
    "Timed out waiting", "Application timeout", "Broken pipe",
)


# ---- spelling mistakes --------------------------------------------------------------------------


def nearest_names(name: str, names: Iterable[str], count: int = 4,
                  similarity: float = 0.6) -> list[str]:
    """The most similar of names, at most `count`, the nearest first; equally near ones as sorted.

    similarity: the least that counts, 0 to 1.
    """
    import difflib      # only after a mistake: a script should answer at once

    names = list(names)
    near = difflib.get_close_matches(name, names, n=max(1, len(names)), cutoff=similarity)
    ratios = {other: difflib.SequenceMatcher(None, other, name).ratio() for other in near}
    return sorted(ratios, key=lambda other: (-ratios[other], other))[:count]


def nearest_name(name: str, names: Iterable[str], similarity: float = 0.6) -> str | None:
    """The most similar of names, or None; of equally near ones the last as sorted, the newest."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(names), 1, similarity)), None)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """" (did you mean 'x'?)" for the most similar of names, or "" if none is similar."""
    nearest = nearest_name(name, names)
    return f" (did you mean {nearest!r}?)" if nearest else ""


def unknown_name(what: str, found: object, known: Iterable[str]) -> str:
    """The message for a name that is not in a table: the most similar name, and all names."""
    hint = did_you_mean(str(found), known)
    return f"unknown {what} {found!r}{hint}. Known: {', '.join(known)}"


def bytes_in_words(count: float) -> str:
    """2048 -> "2 KiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def shown(value) -> str:
    """A value of a JSON file in at most 60 characters."""
    try:
        return json.dumps(value)[:60]
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to be shown"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


# what moves a terminal's cursor, turns the direction of a text, or cannot be written as UTF-8
NOT_PRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    """A text of others for the terminal: control and direction characters as \\x1b or \\u202e."""
    def escape(match) -> str:
        code = ord(match[0])
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return NOT_PRINTABLE.sub(escape, text)


def say(*words):
    """Print to standard error: everything but the answers, so that these can be piped."""
    print(*words, file=sys.stderr, flush=True)


# ---- starting and failing -----------------------------------------------------------------------

# packages of requirements.txt, by the names that are imported: how each is installed
PACKAGES = {
    "torch": "torch", "safetensors": "safetensors", "tokenizers": "tokenizers",
    "huggingface_hub": "huggingface_hub", "numpy": "numpy", "tqdm": "tqdm", "yaml": "PyYAML",
}


def missing_package(error: BaseException) -> str | None:
    """The message for a package of requirements.txt that cannot be imported, or None."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in PACKAGES:
        return None
    return (f"the package {PACKAGES[error.name]} is not installed for {sys.executable}. Install "
            f"what is needed: {Path(sys.executable).name} -m pip install -r requirements.txt (or "
            f"only {PACKAGES[error.name]})")


def print_uncaught(kind, error, traceback):
    """sys.excepthook: one sentence for a missing package, which scripts import at their top."""
    message = missing_package(error)
    if message is None or os.environ.get("POCKET_TRACEBACK") == "1":
        sys.__excepthook__(kind, error, traceback)
    else:
        print_error(message)


sys.excepthook = print_uncaught


def run_script(main: Callable[[list[str]], object]):
    """Call main with the arguments of the command line, and exit with 1 after an error.

    ValueError and OSError are mistakes of the user: one line on stderr. So is the loss of another
    rank. Other exceptions are bugs and keep their traceback; POCKET_TRACEBACK=1 shows it for all.
    """
    # where the output is not UTF-8, print ? for the characters it cannot show
    sys.stdout.reconfigure(errors="replace")
    show_traceback = os.environ.get("POCKET_TRACEBACK") == "1"
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:     # python -m settings.config --keys | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if show_traceback:
            raise
        print_error(error_message(error))
        sys.exit(1)
    except RuntimeError as error:
        if show_traceback or not is_lost_rank(error):
            raise
        print_error(lost_rank_message(error))
        sys.exit(1)


def print_error(message: str):
    """Print one line on stderr. If several ranks fail alike, only the first one prints it.

    The others wait until torchrun ends them.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    shortened = re.sub(r"(\S{500})\S{500,}", r"\1…", message)      # no word fills a screen
    sys.stderr.write(f"error: {printable(shortened)}\n")


def error_message(error: Exception) -> str:
    """What to print for a mistake of the user."""
    if isinstance(error, UnicodeEncodeError):   # a file name, where the locale is not UTF-8
        return (f"{error.object!r} cannot be written in the encoding {error.encoding}: "
                "set PYTHONUTF8=1")
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)

    file = error.filename2 or error.filename    # filename2: the target of a copy
    where = f"{file}: " if file else ""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return (f"{where}no space left on the disk; free some, or set output_dir, export_dir or "
                "HF_HOME to another one")
    if error.errno == errno.EFBIG:
        return (f"{where}a file is larger than its disk or `ulimit -f` allows (FAT32: 4 GB); write "
                "to another disk")
    return f"{where}{error.strerror}"


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether this error means that another process of the run has died."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    return type(error).__name__ in LOST_RANK_ERRORS or any(
        message in str(error) for message in LOST_RANK_MESSAGES
    )


def lost_rank_message(error: RuntimeError) -> str:
    """What to print when another process of the run has died."""
    without_source = re.sub(r"^\[\S+\] ", "", str(error))
    reason = without_source.partition(". ")[0].splitlines()[0]
    return (f"rank {os.environ['RANK']} has lost another rank ({reason}). "
            "The cause is in the output of that rank, or of torchrun")
