"""What the tests share: where the recorded fixtures lie, and small helpers.

Read next: any test_*.py; each proves the module of the same name.
"""
import json
import os
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("POCKET_SHARED", ROOT.parent / "shared"))
GOLDEN = SHARED / "golden"


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the recorded fixtures are not here ({SHARED})")


def read_jsonl(path):
    """All rows of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def leave_with_parent():
    """For a rank that a test has started: end when its launcher is gone, in whatever way that came about."""
    def watch(parent):
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(9)

    threading.Thread(target=watch, args=[os.getppid()], daemon=True).start()
