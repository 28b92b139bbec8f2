"""A double of torch.cuda for a machine without a GPU, with the refusals of a real capture.

Streams and events do nothing, memory queries answer as a card of 80 GB. A CUDAGraph keeps the
operations that run while it is captured, and replay runs them again on the same memory, so the
tests see what a real graph would compute: Python does not run, and addresses stay. While it is
captured it refuses
    values that the host needs (.item(), .cpu(), a mask as index), synchronize
    tensors of the CPU, scalars included: their values would be frozen
    fresh memory made by hand (empty, zeros, full, new_…): it would lie in the graph's own pool

Requires: nothing.
Next: rehearsal.py.
"""
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._dynamo.device_interface  # noqa: F401     it checks the classes of the real torch.cuda
from torch.utils._pytree import tree_flatten, tree_map_only

GB = 10**9


class Stream:
    """A queue of the device; everything runs at once here."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        FakeCuda.current.record.note("wait", "stream.synchronize")

    def query(self):
        return True


class Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        FakeCuda.current.record.note("wait", "event.synchronize")

    def elapsed_time(self, other):
        return 1.0


class CUDAGraph:
    """Operations on the memory that they ran on when they were captured."""

    def __init__(self):
        self.operations = []

    def add(self, func, args, kwargs, out):
        """Keep an operation, with its results, which stay where they are."""
        if torch.Tag.inplace_view not in func.tags:
            self.operations.append((func, *as_they_are((args, kwargs, out))))

    def replay(self):
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            inputs = {address(x) for x in tensors((args, kwargs))}
            for old, new in zip(tensors(out), tensors(again)):
                if address(new) not in inputs:
                    old.copy_(new)


def as_they_are(tree):
    """The tree with aliases of its tensors: a later change of a shape does not reach them."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


def address(x) -> int:
    return x.untyped_storage().data_ptr()


def tensors(tree) -> list:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


class Generator(torch.Generator):
    """A generator that knows for which device it was made."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on_gpu = torch.device(device).type == "cuda"
        return made


class FakeCuda:
    """The functions of torch.cuda; record.cuda_calls: (name, arguments) of those called."""

    current = None

    def __init__(self, record, free_bytes: int):
        self.record = record
        self.free_bytes = free_bytes

    def install(self, stack: ExitStack):
        """Replace torch.cuda, and what else asks for a real device, until the stack is left."""
        stack.enter_context(patch.object(FakeCuda, "current", self))
        for name, value in self.answers().items():
            stack.enter_context(patch.object(torch.cuda, name, self.counted(name, value)))
        for name in ("Stream", "Event", "CUDAGraph"):
            stack.enter_context(patch.object(torch.cuda, name, globals()[name]))
        stack.enter_context(patch.object(torch.cuda, "graph", self.capture))
        stack.enter_context(patch.object(torch.cuda, "_initialized", True))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        for module in (torch, torch.amp, torch.amp.autocast_mode):
            stack.enter_context(patch.object(module, "autocast", on_cpu(torch.amp.autocast)))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(patch.object(torch, name, on_cpu(getattr(torch, name))))

    def counted(self, name: str, value):
        def call(*args, **kwargs):
            self.record.cuda_calls.append((name, args))
            return value(*args, **kwargs)
        return call

    def answers(self) -> dict:
        """{name in torch.cuda: function}"""
        card = SimpleNamespace(name="paper GPU", major=9, minor=0, total_memory=80 * GB,
                               multi_processor_count=132, gcnArchName="")
        stream = Stream()
        nothing = dict.fromkeys(
            ("set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed",
             "manual_seed_all", "init", "_lazy_init"), lambda *args, **kwargs: None)
        constant = {
            "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
            "get_device_name": card.name, "get_device_capability": (9, 0),
            "get_device_properties": card, "mem_get_info": (self.free_bytes, 80 * GB),
            "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
            "is_bf16_supported": True, "current_stream": stream, "default_stream": stream,
            "device": nullcontext(), "stream": nullcontext(),
        }
        answers = {name: (lambda *args, value=value, **kwargs: value)
                   for name, value in constant.items()}
        return nothing | answers | {
            "synchronize": lambda *args: self.record.note("wait", "torch.cuda.synchronize"),
            "get_rng_state": lambda *args: torch.get_rng_state(),
            "set_rng_state": lambda state, *args: torch.set_rng_state(state),
            "is_current_stream_capturing": lambda: self.record.graph is not None,
        }

    @contextmanager
    def capture(self, graph: CUDAGraph, *args, **kwargs):
        """torch.cuda.graph"""
        self.record.graph = graph
        try:
            yield
        finally:
            self.record.graph = None


def on_cpu(function):
    """The function, which is asked for the CPU where it is asked for cuda."""
    def call(device_type="cuda", *args, **kwargs):
        return function("cpu" if device_type == "cuda" else device_type, *args, **kwargs)
    return call
