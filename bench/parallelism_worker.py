"""Record what one process holds, computes and sends in a step of train.py.

    torchrun --nproc-per-node 2 bench/parallelism_worker.py FOLDER key=value …

It is not meant to be typed: `python bench/parallelism.py` starts it for each kind of parallelism.

Writes FOLDER/process-<number>.json: {"spans": [{"kind", "label", "start", "end", "bytes"}, …] of
step TIMED, "held": {what: bytes}, "peak": bytes that a step allocates beyond them, "loss": …}.
Kinds are forward, backward, optimizer and the names of torch.distributed's collectives; bytes are
those that the process hands in. Times are seconds of a clock that the processes share.

Requires: train.py, which does not know that it is watched.
Next: parallelism.py beside this file, docs/parallelism.md.
Sources: torch.profiler, whose memory events are every allocation.
"""
import functools
import gc
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import losses
import optim
import train
from errors import run_script

TIMED = 2           # the step whose spans are kept; the first one allocates buffers
WEIGHED = 3         # the step whose allocations are counted: the profiler takes time
COLLECTIVES = {     # {name: where the tensor stands that this process hands in}
    "all_reduce": (0, "tensor"), "broadcast": (0, "tensor"), "send": (0, "tensor"),
    "isend": (0, "tensor"), "all_gather_into_tensor": (1, "input_tensor"),
    "all_gather_single": (1, "input_tensor"), "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter_single": (1, "input"), "all_to_all_single": (1, "input"),
    "recv": (0, "tensor"), "irecv": (0, "tensor"),
}
RECEIVING = ("recv", "irecv")       # they hand in nothing


class Record:
    """The spans of the timed step, and sizes."""

    def __init__(self):
        self.recording = False
        self.spans = []
        self.sending = {}           # {id of the work: (work, its span)}
        self.has_head = False       # whether this process computes losses
        self.open = None            # the block whose backward pass is under way
        self.profile = None
        self.found = {}

    def span(self, kind: str, label: str, **more) -> dict:
        """A span that begins now and ends with it["end"] = time.time()."""
        span = {"kind": kind, "label": label, "start": time.time(), "end": None, **more}
        if self.recording:
            self.spans.append(span)
        return span

    def enter_backward(self, label: str):
        """The backward pass has come to the next part: the one before has ended."""
        self.leave_backward()
        self.open = self.span("backward", label)

    def leave_backward(self):
        if self.open:
            self.open["end"] = time.time()
        self.open = None


record = Record()


# ---- computing ----------------------------------------------------------------------------------


def watch_block(block, label: str):
    """Record a block's passes: backward begins when the gradient of its output is there."""
    begun = []
    block.register_forward_pre_hook(
        lambda *_: begun.append(record.span("forward", label)))

    def after(module, args, out):
        begun.pop()["end"] = time.time()
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: record.enter_backward(label))

    block.register_forward_hook(after)


def watch_call(owner, name: str, kind: str, label: str):
    """Record each call of a function."""
    call = getattr(owner, name)

    @functools.wraps(call)
    def watched(*args, **kwargs):
        record.has_head |= label == "head"
        span = record.span(kind, label)
        result = call(*args, **kwargs)
        span["end"] = time.time()
        return result

    setattr(owner, name, watched)


def watch_backward():
    """Record the end of each backward pass; what comes before the last block is the head's.

    A stage of a pipeline without the head waits there for a gradient.
    """
    backward = torch.autograd.backward

    def watched(*args, **kwargs):
        if record.has_head:
            record.enter_backward("head")
        backward(*args, **kwargs)
        record.leave_backward()

    torch.autograd.backward = watched


# ---- sending ------------------------------------------------------------------------------------


def watch_collective(name: str, place: int, keyword: str):
    """Record each call of a collective, until what it returns has been waited for."""
    call = getattr(dist, name, None)
    if call is None:                            # torch 2.13 has other names
        return

    def watched(*args, **kwargs):
        tensor = args[place] if len(args) > place else kwargs[keyword]
        sent = 0 if name in RECEIVING else tensor.nbytes
        # counts, losses and flags of a step are float64
        span = record.span(name, "counts" if tensor.dtype == torch.float64 else "", bytes=sent)
        work = call(*args, **kwargs)
        if isinstance(work, dist.Work) and name != "isend":     # whose end nobody waits for
            record.sending[id(work)] = work, span   # held, so that no other has its id
        else:
            span["end"] = time.time()
        return work

    setattr(dist, name, watched)


def watch_waits():
    """A collective that computing goes on beside has ended when it has been waited for."""
    wait = dist.Work.wait

    def watched(work, *args, **kwargs):
        result = wait(work, *args, **kwargs)
        _, span = record.sending.pop(id(work), (None, {}))
        span["end"] = time.time()
        return result

    dist.Work.wait = watched


# ---- holding ------------------------------------------------------------------------------------


def local_bytes(tensors) -> int:
    """Bytes of tensors on this process: of sharded ones, its shards. None counts as nothing."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None]
    return sum({t.data_ptr(): t.nbytes for t in local}.values())


def held(model, optimizer) -> dict[str, int]:
    """{what: bytes} that this process holds between two steps."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    state = [t for row in optimizer.state.values() for t in row.values() if torch.is_tensor(t)]
    return {"frozen weights": local_bytes(p for p in parameters if not p.requires_grad),
            "trained weights": local_bytes(trained),
            "gradients": local_bytes(p.grad for p in trained),
            "optimizer state": local_bytes(state)}


def peak_of(profiled) -> int:
    """The most bytes that were allocated at once, beyond those at the start."""
    now = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# ---- the run ------------------------------------------------------------------------------------


def watch_steps():
    """Record from the beginning of a step to its end, and write what was found after the last."""
    begin, log, start = train.Run.begin_step, train.Run.log_step, train.Run.start

    def watched_start(run, base, plan, setup, model, objective, gradients, optimizer, precision):
        start(run, base, plan, setup, model, objective, gradients, optimizer, precision)
        record.model, record.optimizer = model, optimizer
        for name, module in model.named_modules():
            if name.rpartition(".")[0] == "model.layers":
                watch_block(module, f"block {name.rpartition('.')[2]}")

    def watched_begin(run, step):
        begin(run, step)
        if step.number == WEIGHED:
            record.found["held"] = held(record.model, record.optimizer)
            gc.collect()
            record.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            record.profile.__enter__()
        record.recording = step.number == TIMED

    def watched_log(run, step, loss, *rest):
        record.recording = False
        if step.number == WEIGHED:
            record.profile.__exit__(None, None, None)
            record.found |= {"peak": peak_of(record.profile), "loss": loss,
                             "spans": record.spans}
        log(run, step, loss, *rest)

    train.Run.start, train.Run.begin_step, train.Run.log_step = (
        watched_start, watched_begin, watched_log)


def main(argv):
    folder, *settings = argv
    watch_steps()
    watch_backward()
    watch_call(losses, "cross_entropy_sum", "forward", "head")
    watch_call(optim.Optimizer, "step", "optimizer", "optimizer")
    for name, (place, keyword) in COLLECTIVES.items():
        watch_collective(name, place, keyword)
    watch_waits()
    train.main([*settings, f"max_steps={WEIGHED}"])
    file = Path(folder) / f"process-{os.environ['RANK']}.json"
    file.write_text(json.dumps(record.found), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
