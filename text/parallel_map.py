"""A map over many items, computed by several processes of this host, with results in order.

The processes are forks: they share all that this one has in memory (rows, tokenizer, cached words)
without a copy, and send back only results. Where the system cannot fork safely (Windows, macOS), or
for few items, this process computes everything.

Requires: nothing.
Next: text/token_cache.py, which tokenizes a dataset this way.

Source: fork and pipes, as torch's DataLoader uses them.
"""
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

MIN_ITEMS = 4  # fewer items per process are not worth a fork
MAX_PROCESSES = 16  # unless more are requested: each takes some 100 MB


def num_processes(items: int, requested: int | None = None) -> int:
    """The number of processes for `items` items: the requested one, else as many as are useful."""
    if sys.platform != "linux":
        return 1
    if requested:
        return max(1, min(requested, items - 1))
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, MAX_PROCESSES, items // MIN_ITEMS))


def parallel_map(function: Callable, items: Sequence, processes: int) -> Iterator:
    """Yield function(item) for every item, in order.

    The first item is computed here: what it caches (a tokenizer's words) the forks inherit. An
    exception of `function` is raised here. Raises ValueError if a process dies.
    """
    collecting = gc.isenabled()
    gc.disable()  # it would traverse the lists of results over and over, a fifth of the time
    try:
        if processes < 2:
            yield from map(function, items)
        else:
            yield from map(function, items[:1])
            yield from map_in_forks(function, items[1:], processes)
    finally:
        if collecting:
            gc.enable()


def map_in_forks(function: Callable, items: Sequence, processes: int) -> Iterator:
    """Yield function(item) for every item, in order, each computed by a fork.

    Process p of n takes every n-th item from p on, and waits while its result is not yet wanted, so
    that few results exist at once.
    """
    workers = []
    pipes = []
    try:
        for rank in range(min(processes, len(items))):
            start_worker(function, items[rank::processes], workers, pipes)
        for index in range(len(items)):
            rank = index % processes
            yield receive(workers[rank], pipes[rank])
    finally:
        for worker in workers:
            worker.terminate()
        for worker, pipe in zip(workers, pipes):
            worker.join()
            pipe.close()


def start_worker(function: Callable, items: Sequence, workers: list, pipes: list):
    """Fork a process for these items; append it and its pipe of results to the lists."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    pipes.append(reader)
    arguments = (function, items, writer, list(pipes))
    worker = context.Process(target=run_worker, args=arguments, daemon=True)
    with tokenizers_without_threads():
        worker.start()
    workers.append(worker)
    writer.close()


@contextmanager
def tokenizers_without_threads():
    """Forks in this context use no threads in `tokenizers`: its thread pool breaks in a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def receive(worker, pipe):
    """The next result of a process; an exception is raised here."""
    try:
        result = pipe.recv()
    except EOFError:
        worker.join()
        raise ValueError(f"a worker process died (exit code {worker.exitcode}). Was it out of "
                         "memory? preprocessing_num_workers: 1 needs the least") from None
    if isinstance(result, Exception):
        raise result
    return result


def run_worker(function: Callable, items: Sequence, writer, inherited: list):
    """The forked process: compute and send results until done, or until nobody reads them."""
    for pipe in inherited:  # an open read end here would hide that the reader is gone
        pipe.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for item in items:
        try:
            result = function(item)
        except Exception as error:
            result = error
        try:
            writer.send(result)
        except BrokenPipeError:
            return
        if isinstance(result, Exception):
            return
