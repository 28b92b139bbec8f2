"""The engine: a thread that decodes all requests together, one token of each at a step.

    engine = Engine(model, size=16, max_queued=128)
    engine.start()
    engine.submit([job])                    # raises Busy if too many wait
    while (event := job.events.get())[1] is not None:
        print(event)                        # (job, token); at the end (job, None)

A request joins at the next token and leaves when it ends, so nobody waits for the longest answer.
Each job has its own sampling, generator and adapter: its tokens do not depend on the others.

Requires: fast/batch_decode.py (RunningBatch), fast/many_adapters.py.
Next: serving/answers.py.
Source: Orca, Yu et al., OSDI 2022 (sec. 3.1).
"""
import threading
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue

from fast.batch_decode import AT_ONCE, OneRow, Row, RunningBatch, one_at_a_time
from model import CausalLM


class Busy(Exception):
    """Too many requests wait."""


class Closed(Exception):
    """The server is shutting down."""


@dataclass(eq=False)
class Job(Row):
    """A row that somebody waits for. Jobs of one request share `events`."""
    events: SimpleQueue = field(default_factory=SimpleQueue)
    cancelled: bool = False


class Engine:
    """Decodes jobs in a thread of its own.

    size: jobs decoded together. max_queued: jobs that may wait. adapters: of fast/many_adapters.py.
    """

    def __init__(self, model: CausalLM, size: int, max_queued: int, adapters=None):
        self.model = model
        self.max_queued = max_queued
        self.adapters = adapters
        self.size = size
        self.batch = self.new_batch()
        self.waiting = deque()
        self.changed = threading.Condition()    # guards waiting and closing
        self.closing = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.tokens = 0                         # made so far

    def new_batch(self) -> RunningBatch:
        """An empty batch, of one row where rows cannot share a pass."""
        kind = OneRow if one_at_a_time(self.model) else RunningBatch
        return kind(self.model, self.size, adapters=self.adapters)

    def start(self):
        """Start the thread."""
        self.thread.start()

    def submit(self, jobs: list[Job]):
        """Queue all jobs of a request, or none. Raises Busy or Closed."""
        with self.changed:
            if self.closing:
                raise Closed
            if len(self.waiting) + len(jobs) > self.max_queued + self.batch.free:
                raise Busy
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: list[Job]):
        """Let jobs that nobody waits for any more leave before the next token."""
        for job in jobs:
            job.cancelled = True

    def close(self, seconds: float):
        """Accept no more jobs; give those that run some time to end, then end them."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(seconds)
        with self.changed:
            jobs = [*self.waiting, *self.batch.rows]
        self.cancel(jobs)
        self.thread.join(seconds)

    # ---- the thread

    def run(self):
        """Step after step, until `close` and the last job has ended."""
        while True:
            with self.changed:
                while not (self.waiting or self.batch.rows or self.closing):
                    self.changed.wait()
                if self.closing and not (self.waiting or self.batch.rows):
                    return
            self.drop_cancelled()
            with self.changed:
                new = self.next_jobs()
            if new or self.batch.rows:
                self.step(new)

    def step(self, new: list[Job]):
        """One token for each job. An error that is no single job's ends all that run."""
        jobs = self.batch.rows + new
        try:
            ended = self.batch.step(new)
        except Exception as error:              # the thread must live: others wait
            for job in jobs:
                job.error = error
            self.batch = self.new_batch()
            ended = jobs
        self.tokens += len(jobs)
        for job in jobs:
            if not job.error:
                job.events.put((job, job.answer[-1]))
        for job in ended:
            job.events.put((job, None))

    def next_jobs(self) -> list[Job]:
        """The jobs that join: as many as have room, and at most AT_ONCE tokens unless it is one."""
        jobs = []
        tokens = 0
        while self.waiting and len(jobs) < self.batch.free:
            tokens += len(self.waiting[0].prompt)
            if jobs and tokens > AT_ONCE:
                break
            jobs.append(self.waiting.popleft())
        return jobs

    def drop_cancelled(self):
        """Remove the cancelled jobs, from the batch and from the queue."""
        for index in reversed(range(len(self.batch.rows))):
            job = self.batch.rows[index]
            if job.cancelled:
                self.batch.drop(index)
                job.events.put((job, None))
        with self.changed:
            for job in [job for job in self.waiting if job.cancelled]:
                self.waiting.remove(job)
                job.events.put((job, None))
