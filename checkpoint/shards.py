"""A parameter that is split over processes: this process's part, and all of it.

scale/fsdp.py gives each rank some rows (torch's DTensor); scale/tensor_parallel.py cuts matrices
along rows or columns, scale/expert_parallel.py gives each process some experts, and both mark such
a parameter with a Cut; scale/pipeline_parallel.py leaves some parameters to other processes, and
marks each with a Held. For a parameter that every process holds in full, the part is the whole.

Requires: checkpoint/files.py.
Next: checkpoint/load.py, scale/fsdp.py, scale/tensor_parallel.py, scale/pipeline_parallel.py,
scale/expert_parallel.py.
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from checkpoint.files import read_rows


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut along dimension `dim` over the processes of an axis of the mesh.

    sections: sizes along dim that add up to the whole. Each is cut by itself: where q, k and v lie
    below each other in one matrix, every process has its rows of q, of k and of v. axis: of
    scale/mesh.py.
    """
    dim: int
    sections: tuple[int, ...]
    axis: object

    def ranges(self) -> list[tuple[int, int]]:
        """(start, end) along dim of this process's part of each section."""
        rank, parts = self.axis.rank, self.axis.size
        found = []
        start = 0
        for size in self.sections:
            found.append((start + rank * size // parts, start + (rank + 1) * size // parts))
            start += size
        return found

    def shape(self, part: torch.Tensor) -> tuple:
        """The shape of the whole tensor."""
        shape = list(part.shape)
        shape[self.dim] = sum(self.sections)
        return tuple(shape)

    def part(self, whole) -> torch.Tensor:
        """This process's part. whole: a tensor, or a slice of an open file, which then reads no
        more than the part.
        """
        slices = [(slice(None),) * self.dim + (slice(*ends),) for ends in self.ranges()]
        return torch.cat([whole[index] for index in slices], self.dim)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """The whole tensor, from the parts of all processes of the axis, which all must ask."""
        whole = part.new_zeros(self.shape(part))
        start = 0
        for begin, end in self.ranges():
            piece = part.narrow(self.dim, start, end - begin)
            whole.narrow(self.dim, begin, end - begin).copy_(piece)
            start += end - begin
        dist.all_reduce(whole, group=self.axis.group)       # every other part is zero here
        return whole


@dataclass(frozen=True)
class Held:
    """Which processes of an axis hold a tensor; on the others it has no storage (device meta).

    owners: their numbers in the axis, with equal values. device: of this process.
    """
    owners: tuple[int, ...]
    axis: object
    device: torch.device

    @property
    def here(self) -> bool:
        """Whether this process holds it."""
        return self.axis.rank in self.owners

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first owner's tensor, for which all processes of the axis must ask.

        tensor: the own one, or one of its shape and dtype without storage.
        """
        sends = self.axis.rank == self.owners[0]
        found = tensor.detach().contiguous() if sends else torch.empty_like(tensor,
                                                                            device=self.device)
        dist.broadcast(found, self.source, group=self.axis.group)
        return found

    @property
    def source(self) -> int:
        """The first owner's number among all processes."""
        return dist.get_global_rank(self.axis.group, self.owners[0])


def held_of(p) -> Held | None:
    """The Held of a parameter that not all processes hold; None for others."""
    return getattr(p, "held", None)


def cut_of(p) -> Cut | None:
    """The Cut of a parameter that is a part; None for others."""
    return getattr(p, "cut", None)


def cut_parameter(module: nn.Module, name: str, cut: Cut):
    """Replace a parameter of a module, which is whole, by this process's part of it."""
    whole = getattr(module, name)
    set_parameter(module, name, cut.part(whole.detach()), whole.requires_grad, cut)
    if isinstance(module, nn.Linear) and name == "weight":
        module.out_features, module.in_features = module.weight.shape


def set_parameter(module: nn.Module, name: str, tensor: torch.Tensor, requires_grad: bool,
                  cut: Cut | None):
    """Make the tensor a module's parameter, marked as cut."""
    p = nn.Parameter(tensor, requires_grad)
    if cut:
        p.cut = cut
    setattr(module, name, p)


def parameter_like(p: nn.Parameter, device) -> nn.Parameter:
    """An uninitialized parameter with p's shape, dtype and marks, on a device."""
    new = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
    for mark in ("cut", "held"):
        if hasattr(p, mark):
            setattr(new, mark, getattr(p, mark))
    return new


def replace_parameters(model: nn.Module, replace):
    """Replace each parameter p by replace(p); tied parameters stay tied."""
    new = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in new:
                new[p] = replace(p)
            setattr(module, name, new[p])


def materialize(model: nn.Module, device: torch.device):
    """Give storage, uninitialized, to the parameters on the meta device that this process holds."""
    def with_storage(p):
        held = held_of(p)
        return parameter_like(p, device) if p.is_meta and (not held or held.here) else p

    replace_parameters(model, with_storage)


def is_sharded(p) -> bool:
    """Whether this process holds only a part of the parameter, or nothing of it."""
    return hasattr(p, "to_local") or cut_of(p) is not None or held_of(p) is not None


def local_tensor(p) -> torch.Tensor:
    """This process's part of a parameter, or of its gradient: the same memory."""
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()


def local_rows(p) -> slice:
    """Which rows of the full parameter local_tensor(p) holds, where fsdp splits it."""
    if not hasattr(p, "to_local"):
        return slice(None)
    per_rank = -(-p.shape[0] // p.device_mesh.size())
    start = min(per_rank * p.device_mesh.get_local_rank(), p.shape[0])
    return slice(start, start + len(local_tensor(p)))


def read_own(tensors, name: str, p) -> torch.Tensor:
    """This process's part of a tensor in an open file, which has the full shape of p."""
    if cut := cut_of(p):
        return cut.part(tensors.get_slice(name))
    return read_rows(tensors, name, local_rows(p))


def own_part(tensor: torch.Tensor, p) -> torch.Tensor:
    """This process's part of a tensor that has the full shape of p, where a Cut says which."""
    cut = cut_of(p)
    return cut.part(tensor) if cut else tensor


def full_shape(p) -> tuple:
    """The shape of the whole parameter."""
    cut = cut_of(p)
    return cut.shape(p) if cut else tuple(p.shape)


def full_size(p) -> int:
    """Numbers in the whole parameter."""
    cut = cut_of(p)
    return math.prod(cut.shape(p)) if cut else p.numel()


def full_bytes(parameters: Iterable) -> int:
    """Bytes of whole parameters, as a checkpoint holds them."""
    return sum(full_size(p) * p.element_size() for p in parameters)


def full_tensor(p) -> torch.Tensor:
    """All of a parameter; of a split one all processes must ask for it."""
    held, cut = held_of(p), cut_of(p)
    if held or cut:
        part = held.fetch(p) if held else p.detach()
        return cut.whole(part) if cut else part
    return p.detach().full_tensor() if hasattr(p, "to_local") else p.data
