"""Results of functions in order, computed by threads a few positions ahead of the one that writes.

Reading, rounding and packing run in the threads while the main thread writes, so that an export
takes little longer than copying the files.

Requires: nothing.
Next: merge.py, checkpoint/write_gguf.py.
"""
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

MAX_THREADS = 4                 # more would idle: one writes while the others compute


def run_ahead(makers: Iterable[Callable]) -> Iterator:
    """Yield what the functions return, in order; threads call them a few positions in advance.

    Each thread computes on one core. torch's own threads would wait for each other and for the
    disk.
    """
    workers = min(os.cpu_count() or 1, MAX_THREADS)
    threads_before = torch.get_num_threads()
    waiting = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for make in makers:
                waiting.append(pool.submit(make))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads_before)
