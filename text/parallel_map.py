"""Work on many items shared among processes of this host, its results in the order of the items.

The processes are forks: they see all that this one has in memory (rows, tokenizer, words) without a copy being made, and
send back only results. Where the system cannot fork safely (Windows, macOS), or for few items, this process does all.

Read before: data.py (encode_rows), which tokenises so. Read after: parallel.py, for processes that train.
Source: fork and pipes, as torch's DataLoader uses them.
"""
import gc
import multiprocessing
import os
import signal
import sys

FEWEST = 4                      # items that make a process of its own worth while
MOST = 16                       # processes, unless more are asked for: each takes some 100 MB


def how_many(items: int, asked: int | None = None) -> int:
    """How many processes are to share so many items: as asked, else one for each core that has enough to do."""
    if sys.platform != "linux":
        return 1
    if asked:
        return max(1, min(asked, items - 1))
    return max(1, min(len(os.sched_getaffinity(0)), MOST, items // FEWEST))


def in_order(make, items, workers: int):
    """make(item) for every item, as map gives it, computed by so many processes.

    The first item is done here: what it fills (a tokenizer's words), the others find filled. Process p of n takes every
    n-th of the rest and waits when its result is not yet wanted, so few results exist at once. An exception of make's is
    raised here; ValueError if a process ends without a word.
    """
    pipes, processes, collects = [], [], gc.isenabled()
    gc.disable()                # lists in lists have it look at all of them again and again: a fifth of the time
    try:
        first, rest = items[:1], items[1:]
        yield from map(make, first if workers > 1 else items)
        if workers < 2:
            return
        for number in range(min(workers, len(rest))):
            start(make, rest[number::workers], pipes, processes)
        for place in range(len(rest)):
            try:
                result = pipes[place % workers].recv()
            except EOFError:
                process = processes[place % workers]
                process.join()
                raise ValueError(f"a process that tokenises has ended (exit code {process.exitcode}). Was the memory "
                                 "used up? preprocessing_num_workers: 1 takes the least") from None
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        if collects:
            gc.enable()
        for process in processes:
            process.terminate()
        for process, pipe in zip(processes, pipes):
            process.join()
            pipe.close()


def start(make, items, pipes: list, processes: list):
    """One more process, and the pipe on which its results come."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    pipes.append(mine)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"          # read at the fork: its threads do not survive one
    process = context.Process(target=work, args=(make, items, theirs, list(pipes)), daemon=True)
    process.start()
    processes.append(process)
    theirs.close()
    if before is None:
        del os.environ["TOKENIZERS_PARALLELISM"]
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def work(make, items, out, inherited: list):
    """The process: make and send one result after the other, until there is nobody to read them."""
    for pipe in inherited:                                  # held open here they would never tell that the reader is gone
        pipe.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the process that reads
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for item in items:
        try:
            result = make(item)
        except Exception as error:
            result = error
        try:
            out.send(result)
        except BrokenPipeError:
            return
        if isinstance(result, Exception):
            return
