"""Notice a rank that is lost without a word: a host without power, a network that is cut.

    heartbeat = Heartbeat(ranks)        # two threads, from now on
    heartbeat.stop()

A process that dies closes its connections, and the others fail at once. A host that vanishes closes
nothing: the others would wait for ddp_timeout. So each rank counts its BEATS in torchrun's store,
from a thread that no training step holds up, and the first rank of each host looks at all counts. A
count that stands still for LOST seconds ends the process, with the rank and its host. A second
thread does so where the store itself does not answer.

A rank that only waits, on its device or for a disk, goes on beating: for these is ddp_timeout.

Requires: parallel.py.
Next: runtime/run.py, which starts and stops it.
"""
import atexit
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from parallel import Ranks

BEATS = 3                   # seconds between two beats of a rank
LOST = 40                   # seconds without a beat after which a rank is lost


class Heartbeat:
    """The beats of this process, and a watch over all others: see the top of this file."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.done = threading.Event()
        self.counts = {}            # rank: (its beats, when the last of them was seen)
        self.answered = time.monotonic()
        self.store = connect()
        self.store.set(f"host {ranks.process}", socket.gethostname())
        self.threads = [threading.Thread(target=target, daemon=True)
                        for target in (self.beat, self.watch_store)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self):
        """End the threads; the process group has been left, or the process ends."""
        self.done.set()
        for thread in self.threads:
            thread.join(timeout=1)

    def beat(self):
        """Count, and look at the others, until the end."""
        while not self.done.wait(BEATS):
            try:
                self.store.add(f"beats {self.ranks.process}", 1)
                if self.ranks.local_rank == 0:
                    self.look()
                self.answered = time.monotonic()
            except RuntimeError:                # the store is gone: watch_store says so
                continue

    def look(self):
        """End the process if a rank's count has stood still for LOST seconds."""
        for rank in range(self.ranks.processes):
            count, seen = self.store.add(f"beats {rank}", 0), time.monotonic()
            before = self.counts.get(rank, (0, seen))
            self.counts[rank] = before if before[0] == count else (count, seen)
            if seen - self.counts[rank][1] > LOST:
                known = self.store.check([f"host {rank}"])
                host = self.store.get(f"host {rank}").decode() if known else "an unknown host"
                self.leave(f"rank {rank} of {self.ranks.processes}, on {host},")

    def watch_store(self):
        """End the process if the store has not answered for LOST seconds."""
        while not self.done.wait(BEATS):
            if time.monotonic() - self.answered > LOST:
                self.leave(f"the first host, {os.environ['MASTER_ADDR']},")

    def leave(self, who: str):
        """End this process with the cause."""
        if self.done.is_set():
            return
        us = f"rank {self.ranks.process}, on {socket.gethostname()},"
        print(f"error: {us} has not heard from {who} for {LOST} s: that host is down or "
              "suspended, or the network between the two is cut. Checkpoints are kept: start the "
              "run again with resume_from_checkpoint: auto, or let torchrun --max-restarts do so",
              file=sys.stderr, flush=True)
        os._exit(1)


def connect() -> dist.Store:
    """An own connection to the store of torchrun, with the names of this attempt."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False, timeout=timedelta(seconds=LOST))
    return dist.PrefixStore(f"beats {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
