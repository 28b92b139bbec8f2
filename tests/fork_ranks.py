"""Ranks forked from a process that has imported everything: a launcher in a third of the time.

    python -m tests.fork_ranks WORLD SCRIPT ARGUMENT ...

It does what torchrun does on one host: it sets the variables that torch.distributed reads, runs the
script once per rank, and ends the other ranks when one fails. torchrun itself is tried by
tests/test_parallel.py and tests/test_hosts.py.

Requires: ranks.py.
"""
import os
import runpy
import signal
import sys
import time
import traceback

import torch._dynamo  # noqa: F401            what the scripts and torch import, once for all ranks

import train  # noqa: F401
from tests.common import leave_with_parent
from tests.ranks import free_port

PATIENCE = 10       # seconds between asking the other ranks to end and killing them


def main(world: int, script: str, arguments: list[str]) -> int:
    """The exit code: 0, or 1 if a rank failed."""
    port = free_port()
    running = {os.fork() or run_rank(rank, world, port, script, arguments)
               for rank in range(world)}
    failed = None
    while running:
        for process in list(running):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                running.remove(process)
                if status and failed is None:
                    failed = time.time()
                    send(running, signal.SIGTERM)
        if failed and time.time() > failed + PATIENCE:
            send(running, signal.SIGKILL)
        time.sleep(0.01)
    return 1 if failed else 0


def send(processes, number: int):
    for process in processes:
        os.kill(process, number)


def run_rank(rank: int, world: int, port: int, script: str, arguments: list[str]):
    """Run the script as this rank, in the forked process."""
    leave_with_parent()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [script, *arguments]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
