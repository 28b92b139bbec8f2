"""A CPU that poses as a GPU, and a record of what a real one would wait for, copy or refuse.

    with rehearse() as record:
        model = load_model(folder, device="cuda")       # GpuTensors, which compute on the CPU
        with record.strict(may_wait=[("parallel.py", "sync")]):
            ...                                         # any other wait raises Fault: file:line

A GpuTensor wraps a tensor of the CPU and says that its device is cuda:0. Its values are real, so a
rehearsed run can be compared with a run on the CPU. Faults name a file and a line of this program:

    mixed    tensors of the CPU beside tensors of the GPU; scalars (0 dimensions) are allowed
    copy     a copy to or from the GPU that blocks; from pinned memory, non_blocking, it is planned
    wait     the host needs a value: .item(), .tolist(), .cpu(), bool(), nonzero, x[mask], …
    capture  what a CUDA graph that is being captured refuses, see tests/fake_cuda.py

torch.cuda is replaced by tests/fake_cuda.py meanwhile.

Requires: fake_cuda.py, common.py.
Next: test_rehearsal.py.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.common import ROOT

GPU = torch.device("cuda", 0)
HELPERS = {str(Path(__file__)), str(Path(__file__).with_name("fake_cuda.py"))}
# operations that return a number, or whose result has a size that depends on values
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select",
         "_unique2", "unique_dim", "unique_consecutive", "bincount", "multinomial",
         "_linalg_svd", "_linalg_eigh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# memory made by hand, which in a captured graph lies in the graph's own pool
FRESH = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones",
         "new_full"}
# functions of a tensor that read its values on the host
READS = {"tolist", "numpy", "__array__", "__repr__", "__format__", "data_ptr", "untyped_storage"}
SILENT_READS = {"data_ptr", "untyped_storage"}         # addresses: no value is read


class Fault(AssertionError):
    """What a GPU would refuse, or wait for where the program must not."""


@dataclass(frozen=True)
class Event:
    """Something that a GPU would wait for, or copy. where: file:line of this program."""
    kind: str
    what: str
    where: str
    place: tuple[str, str]          # (file, function)


@dataclass
class Record:
    """What happened in a rehearsal."""
    events: list[Event] = field(default_factory=list)
    cuda_calls: list = field(default_factory=list)      # (name, arguments), of torch.cuda
    may_wait: set | None = None     # places that may wait or copy; None: everywhere
    graph: object = None            # the graph that is being captured, see tests/fake_cuda.py

    @property
    def waits(self) -> list[Event]:
        return [event for event in self.events if event.kind in ("wait", "copy")]

    @property
    def planned(self) -> list[Event]:
        """Copies from pinned memory, or to it, that do not block."""
        return [event for event in self.events if event.kind == "planned"]

    @contextmanager
    def strict(self, may_wait=()):
        """Raise Fault for waits and blocking copies, except in `may_wait`: {(file, function)}.

        None: everywhere, again.
        """
        before = self.may_wait
        self.may_wait = may_wait if may_wait is None else set(may_wait)
        try:
            yield self
        finally:
            self.may_wait = before

    def note(self, kind: str, what: str):
        """Record an event; raises Fault where it must not happen."""
        where, place = caller()
        if self.graph is not None and kind != "planned":
            raise Fault(f"{where}: {what} in a captured graph")
        if kind != "planned" and self.may_wait is not None and place not in self.may_wait:
            raise Fault(f"{where}: {what} waits for the device")
        self.events.append(Event(kind, what, where, place))

    def refuse(self, what: str):
        raise Fault(f"{caller()[0]}: {what}")


def caller() -> tuple[str, tuple[str, str]]:
    """("file:line", (file, function)) of the innermost frame of this program, else of a test."""
    frame = sys._getframe(1)
    in_tests = None
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and path not in HELPERS and "site-packages" not in path:
            name = path[len(str(ROOT)) + 1:]
            found = f"{name}:{frame.f_lineno}", (name, frame.f_code.co_name)
            if not name.startswith("tests/"):
                return found
            in_tests = in_tests or found
        frame = frame.f_back
    return in_tests or ("outside", ("outside", ""))


# ---- the tensor ---------------------------------------------------------------------------------


class GpuTensor(torch.Tensor):
    """A tensor that says it is on cuda:0; `inner` is on the CPU and computes."""

    @staticmethod
    def __new__(cls, inner, requires_grad: bool = False):
        outer = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=inner.device,
            requires_grad=requires_grad)
        outer.inner = inner
        return outer

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run_op(Rehearsal.current, func, args, kwargs or {})

    # a module that is moved gets new parameters, as with all tensors that hold others
    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inners, meta, outer_size, outer_stride):
        return GpuTensor(inners["inner"])


def is_gpu(x) -> bool:
    return type(x) is GpuTensor


def is_host(x) -> bool:
    """Whether this is a tensor in main memory; meta tensors are nowhere."""
    return isinstance(x, torch.Tensor) and not is_gpu(x) and x.device.type == "cpu"


def host(x):
    """The values of a tensor on the CPU. For tests: it is no event."""
    return x.inner.detach() if is_gpu(x) else x.detach()


class Transfer(torch.autograd.Function):
    """A copy between the devices, whose gradient goes back."""

    @staticmethod
    def forward(ctx, x):
        ctx.from_gpu = is_gpu(x)
        return x.inner.clone() if is_gpu(x) else GpuTensor(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        if ctx.from_gpu:
            return grad if is_gpu(grad) else GpuTensor(grad)
        return host(grad)


# ---- operations ---------------------------------------------------------------------------------


def tensors_in(values) -> list:
    """The tensors among some values, and in lists of them."""
    found = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
    return found


def mapped(x, change):
    """x, or a list or dict, with change(tensor) for each tensor."""
    if isinstance(x, torch.Tensor):
        return change(x)
    if isinstance(x, (list, tuple)):
        return type(x)([mapped(item, change) for item in x])
    if isinstance(x, dict):
        return {key: mapped(item, change) for key, item in x.items()}
    return x


def run_op(rehearsal, func, args, kwargs):
    """Run an operation on the inner tensors."""
    inputs = tensors_in((*args, *kwargs.values()))
    on_gpu = any(map(is_gpu, inputs))
    name = func.overloadpacket.__name__
    if on_gpu:
        check_op(rehearsal.record, name, args, kwargs, inputs)
    elif not inputs and not rehearsal.on_gpu:
        return func(*args, **kwargs)
    outers = {id(x.inner): x for x in inputs if is_gpu(x)}
    inner_args = mapped(args, inner_of)
    inner_kwargs = mapped(kwargs, inner_of)
    out = func(*inner_args, **inner_kwargs)
    if on_gpu and torch.Tag.inplace_view in func.tags:
        with no_dispatch():                     # the shape of the wrapper, too
            func(*args, **kwargs)
    graph = rehearsal.record.graph
    if graph is not None and on_gpu:
        graph.add(func, inner_args, inner_kwargs, out)
    makes_gpu = on_gpu or rehearsal.on_gpu and not any(map(is_host, inputs))
    if not makes_gpu or name == "copy_" and not is_gpu(args[0]):
        return out
    return mapped(out, lambda x: wrapped(x, outers))


def inner_of(x):
    return x.inner if is_gpu(x) else x


def wrapped(x, outers: dict):
    """The GpuTensor of a result; an operation in place returns the one it was given."""
    if is_gpu(x) or x.device.type == "meta":
        return x
    return outers[id(x)] if id(x) in outers else GpuTensor(x)


def check_op(record: Record, name: str, args, kwargs, inputs):
    """Record or refuse what this operation would wait for on a GPU."""
    if name in FRESH and record.graph is not None:
        record.refuse(f"{name}: memory is allocated in a captured graph")
    if name == "copy_":
        return check_copy(record, args[0], args[1], kwargs.get("non_blocking", args[2:] == (True,)))
    if name in INDEXING:
        return check_index(record, name, args)
    sized = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in WAITS or sized and len(args) < 2 or sized and is_gpu(args[1]):
        record.note("wait", name)
    for x in inputs:
        if is_host(x) and (x.dim() or record.graph is not None):
            record.refuse(f"{name}: a tensor {list(x.shape)} of the CPU beside tensors of the GPU")


def check_copy(record: Record, target, source, non_blocking: bool):
    """copy_ between the devices."""
    if is_gpu(target) and is_gpu(source):
        return
    host_side = source if is_gpu(target) else target
    to = "to" if is_gpu(target) else "from"
    is_planned = non_blocking and in_pinned_memory(host_side)
    record.note("planned" if is_planned else "copy", f"a copy {to} the GPU")


def in_pinned_memory(x) -> bool:
    """Whether a tensor of the CPU is page-locked, or a view of one that is."""
    return any(getattr(each, "in_pinned_memory", False) for each in (x, x._base))


def check_index(record: Record, name: str, args):
    """Indexing: a mask of the GPU has as many rows as it has ones, and indices may be anywhere."""
    indices = [x for x in args[1] if x is not None]
    masks = [x for x in indices if is_gpu(x) and x.dtype in (torch.bool, torch.uint8)]
    is_fill = name != "index" and len(indices) == 1 and args[2].numel() == 1
    if masks and not is_fill:
        record.note("wait", "indexing by a mask")
    if not is_gpu(args[0]):
        record.refuse(f"{name}: indices of the GPU for a tensor of the CPU")
    if any(is_host(x) for x in indices):
        record.note("copy", "indexing by a tensor of the CPU")
    if len(args) > 2 and is_host(args[2]) and args[2].dim():
        record.refuse(f"{name}: values of the CPU for a tensor of the GPU")


# ---- functions ----------------------------------------------------------------------------------


def wants_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def target_of(args, kwargs) -> tuple:
    """(device, dtype, non_blocking, copy) that Tensor.to was given; None for what it keeps."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    flags = []
    for x in args:
        if isinstance(x, torch.Tensor):
            device, dtype = x.device, x.dtype
        elif isinstance(x, torch.dtype):
            dtype = x
        elif isinstance(x, bool):
            flags.append(x)
        elif x is not None:
            device = torch.device("cuda", x) if isinstance(x, int) else x
    non_blocking = kwargs.get("non_blocking", bool(flags[:1] == [True]))
    return device, dtype, non_blocking, kwargs.get("copy", bool(flags[1:2] == [True]))


def move(record: Record, x, device, non_blocking: bool):
    """A copy of a tensor on the other device; x itself if it is there."""
    if device is None or wants_gpu(device) == is_gpu(x) or torch.device(device).type == "meta":
        return x
    is_planned = non_blocking and not is_gpu(x) and in_pinned_memory(x)
    record.note("planned" if is_planned else "copy",
                "a copy from the GPU" if is_gpu(x) else "a copy to the GPU")
    if x.requires_grad and torch.is_grad_enabled():
        return Transfer.apply(x)
    return x.inner.clone() if is_gpu(x) else GpuTensor(x.detach().clone())


class Operations(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, rehearsal):
        super().__init__()
        self.rehearsal = rehearsal

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run_op(self.rehearsal, func, args, kwargs or {})


class Rehearsal(TorchFunctionMode):
    """Sees every function of torch that this program calls: devices that are asked for, values
    that are read.

    on_gpu: whether the function that runs now is given tensors of the GPU; what torch itself makes
    within it, without saying a device, is on the GPU, too.
    """

    current = None

    def __init__(self, record: Record):
        super().__init__()
        self.record = record
        self.on_gpu = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and func != torch.Tensor.data.__get__:
            return func(*args, **kwargs)
        if func is torch.autograd.grad:
            return self.grad_of(*args, **kwargs)
        special = getattr(self, f"do_{name.strip('_')}", None)
        first = args[0] if args else None
        if special and isinstance(first, torch.Tensor):
            return special(func, first, args[1:], kwargs)
        if is_gpu(first) and name in READS:
            if name not in SILENT_READS:
                self.record.note("wait", f".{name}()")
            return func(first.inner, *args[1:], **kwargs)
        if kwargs.pop("pin_memory", False):
            out = func(*args, **kwargs)
            out.in_pinned_memory = True
            return out
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta":
            return self.make(func, name, args, kwargs)
        self.check_generator(name, kwargs, is_gpu(first))
        return self.call(func, args, kwargs)

    def check_generator(self, name: str, kwargs, on_gpu: bool):
        generator = kwargs.get("generator")
        if generator is not None and on_gpu != getattr(generator, "on_gpu", False):
            self.record.refuse(f"{name}: the generator is not on the device of the tensor")

    def call(self, func, args, kwargs):
        before = self.on_gpu
        self.on_gpu = any(map(is_gpu, tensors_in((*args, *kwargs.values()))))
        try:
            return func(*args, **kwargs)
        finally:
            self.on_gpu = before

    def make(self, func, name: str, args, kwargs):
        """A new tensor on the device that the call names."""
        to_gpu = wants_gpu(kwargs["device"])
        self.check_generator(name, kwargs, to_gpu)
        if to_gpu and name in ("tensor", "as_tensor", "asarray"):
            if not (args and is_gpu(args[0])):
                self.record.note("copy", f"torch.{name} copies to the GPU")
        elif to_gpu and self.record.graph is not None and name != "arange":
            self.record.refuse(f"{name}: memory is allocated in a captured graph")
        out = self.call(func, args, kwargs | {"device": "cpu"})
        if to_gpu == is_gpu(out):
            return out
        out = GpuTensor(out.detach()) if to_gpu else out.inner
        return out.requires_grad_() if kwargs.get("requires_grad") else out

    # ---- functions with a rule of their own

    def do_to(self, func, x, args, kwargs):
        device, dtype, non_blocking, copy = target_of(args, kwargs)
        if device is not None and torch.device(device).type == "meta":
            return func(x, *args, **kwargs)
        moved = move(self.record, x, device, non_blocking)
        if dtype is None and copy and moved is x:
            return self.call(torch.clone, (x,), {})
        if dtype is None or dtype == moved.dtype and not copy:
            return moved
        return self.call(func, (moved, dtype), {"copy": copy and moved is x})

    def do_cpu(self, func, x, args, kwargs):
        return move(self.record, x, "cpu", False)

    def do_cuda(self, func, x, args, kwargs):
        return move(self.record, x, GPU, bool(kwargs.get("non_blocking")))

    def do_pin_memory(self, func, x, args, kwargs):
        if is_gpu(x):
            self.record.refuse("pin_memory of a tensor of the GPU")
        if self.record.graph is not None:
            self.record.refuse("pin_memory in a captured graph")
        pinned = x.detach().clone()
        pinned.in_pinned_memory = True
        return pinned

    def do_is_pinned(self, func, x, args, kwargs):
        return in_pinned_memory(x)

    def do_get_device(self, func, x, args, kwargs):
        return 0 if is_gpu(x) else -1

    def do_get(self, func, x, args, kwargs):
        """x.data"""
        return GpuTensor(x.inner) if is_gpu(x) else func(x, *args, **kwargs)

    def do_set(self, func, x, args, kwargs):
        """x.data = …"""
        if func == torch.Tensor.data.__set__ and is_gpu(x):
            x.inner = args[0].inner
        return func(x, *args, **kwargs)

    def do_backward(self, func, x, args, kwargs):
        self.run_backward(x, kwargs.get("gradient"), (), accumulate_grad=True,
                          keep=bool(kwargs.get("retain_graph")))

    def grad_of(self, outputs: tuple, inputs: tuple, grad_outputs=None, allow_unused=False, **_):
        """torch.autograd.grad"""
        out, = outputs
        gradient = grad_outputs[0] if isinstance(grad_outputs, tuple) else grad_outputs
        return self.run_backward(out, gradient, inputs, accumulate_grad=False,
                                 allow_unreachable=bool(allow_unused))

    def run_backward(self, x, gradient, inputs: tuple, accumulate_grad: bool, keep: bool = False,
                     allow_unreachable: bool = True):
        before = self.on_gpu
        self.on_gpu = is_gpu(x)
        try:
            if gradient is None:
                gradient = torch.ones_like(x)
            with self:              # functions of ours that run within are seen, too
                return _engine_run_backward(
                    (x,), (gradient,), keep, False, inputs, allow_unreachable=allow_unreachable,
                    accumulate_grad=accumulate_grad)
        finally:
            self.on_gpu = before


def grouped(group):
    """torch's grouping of gradients, which looks beneath GpuTensor.device."""
    def by_device(lists, with_indices=False):
        found = group(lists, with_indices)
        return {(members[0][0].device, dtype): (members, indices)
                for (_, dtype), (members, indices) in found.items()}
    return by_device


def in_threads(submit, record: Record):
    """ThreadPoolExecutor.submit, with modes of its own for the thread."""
    def submit_rehearsed(pool, function, *args, **kwargs):
        def run():
            rehearsal = Rehearsal(record)
            with Operations(rehearsal), rehearsal:
                return function(*args, **kwargs)
        return submit(pool, run)
    return submit_rehearsed


@contextmanager
def rehearse(free_bytes: int = 79 * 10**9):
    """Pose as a GPU with so much free memory within the block; yields the Record."""
    from tests.fake_cuda import FakeCuda

    rehearsal = Rehearsal(Record())
    cuda = FakeCuda(rehearsal.record, free_bytes)
    with ExitStack() as stack:
        stack.enter_context(patch.object(Rehearsal, "current", rehearsal))
        cuda.install(stack)
        name = "_group_tensors_by_device_and_dtype"
        stack.enter_context(patch.object(clip_grad, name, grouped(getattr(clip_grad, name))))
        submit = in_threads(ThreadPoolExecutor.submit, rehearsal.record)
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", submit))
        stack.enter_context(Operations(rehearsal))
        stack.enter_context(rehearsal)
        yield rehearsal.record
