"""How a script starts and how it fails: one sentence, and an exit code.

Requires: nothing.
Next: config.py.
"""
import errno
import os
import re
import signal
import sys
import time


def nearest(name: str, names) -> str:
    """" (did you mean 'x'?)" for the most similar of names, or "" if none is similar."""
    import difflib
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def run(main):
    """Call main(argv without the script's name); an error of the user's making is one line on stderr and exit code 1.

    Other exceptions are bugs and keep their traceback; POCKET_TRACEBACK=1 shows it for all.
    """
    sys.stdout.reconfigure(errors="replace")    # where the output is not UTF-8 a ? stands for what it cannot show
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                     # python config.py --keys | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("POCKET_TRACEBACK") == "1":
            raise
        tell(f"error: {explain(error)}")
        sys.exit(1)
    except RuntimeError as error:
        if not lost_a_rank(error) or os.environ.get("POCKET_TRACEBACK") == "1":
            raise
        said = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].splitlines()[0]
        tell(f"error: rank {os.environ['RANK']} has lost another rank ({said}). The cause is what that rank, or torchrun, "
             "says")
        sys.exit(1)


def tell(message: str):
    """One line on stderr. Of several ranks that fail alike the first one tells it: torchrun then ends the others."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    sys.stderr.write(message + "\n")


def lost_a_rank(error: RuntimeError) -> bool:
    """Does this come from another process of the run that is no longer there?"""
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Timed out waiting",
             "Application timeout", "Broken pipe")
    return os.environ.get("WORLD_SIZE", "1") != "1" and (
        type(error).__name__ in ("DistBackendError", "DistNetworkError") or any(sign in str(error) for sign in signs))


def explain(error: Exception) -> str:
    """The sentence for an error of the user's making."""
    if isinstance(error, UnicodeEncodeError):   # a name of a file, where the locale is not UTF-8
        return f"{error.object!r} cannot be written in the encoding {error.encoding}: set PYTHONUTF8=1"
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    file = error.filename2 or error.filename    # filename2: the target of a copy
    file = f"{file}: " if file else ""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return f"{file}no space left on the disk; free some, or set output_dir, export_dir or HF_HOME to another one"
    return f"{file}{error.strerror}"
