"""text/parallel_map.py: results in order, errors reported, no process left behind."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.common import ROOT
from text.parallel_map import num_processes, parallel_map


def test_results_come_in_order_from_other_processes():
    found = list(parallel_map(lambda i: (i * i, os.getpid()), list(range(20)), 3))
    assert [square for square, _ in found] == [i * i for i in range(20)]
    assert found[0][1] == os.getpid()
    assert len({process for _, process in found}) == 4
    assert list(parallel_map(abs, [-1, -2], 1)) == [1, 2]
    assert list(parallel_map(abs, [], 3)) == []


def test_num_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert [num_processes(items) for items in (0, 1, 7, 8, 1000)] == [1, 1, 1, 2, 16]
    assert [num_processes(items, 20) for items in (1, 3, 1000)] == [1, 2, 20]
    monkeypatch.setattr(sys, "platform", "win32")
    assert num_processes(1000, 4) == 1


def test_an_exception_is_raised_here():
    def fails(i):
        if i == 5:
            raise ValueError("row five")
        return i

    with pytest.raises(ValueError, match="row five"):
        list(parallel_map(fails, list(range(9)), 2))


def test_a_process_that_dies_is_reported():
    def dies(i):
        return os._exit(9) if i == 5 else i

    with pytest.raises(ValueError, match="exit code 9.*preprocessing_num_workers: 1"):
        list(parallel_map(dies, list(range(9)), 2))


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
from text.parallel_map import parallel_map

def make(i):
    open({folder!r} + f"/{{os.getpid()}}", "w").close()
    return bytes(10**6)

for index, result in enumerate(parallel_map(make, list(range(100)), 3)):
    if index == 6:
        os.kill(os.getpid(), 9)
"""


def test_workers_end_with_their_reader(tmp_path):
    """A killed reader leaves no process behind, although results wait in
    pipes that nobody empties."""
    code = KILLED.format(root=str(ROOT), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", code])
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert len(processes) == 4

    def alive():
        return [process for process in processes if Path(f"/proc/{process}").exists()]

    deadline = time.time() + 20
    while alive() and time.time() < deadline:
        time.sleep(0.1)
    assert not alive()
