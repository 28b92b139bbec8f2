"""A parameter that is split over the ranks (scale/fsdp.py): this rank's rows, and all of them.

For a parameter that every rank holds in full these are the same.

Requires: nothing.
Next: checkpoint/load.py, scale/fsdp.py.
"""
import torch


def is_sharded(p) -> bool:
    """Whether this rank holds only a part of the parameter."""
    return hasattr(p, "to_local")


def local_tensor(p) -> torch.Tensor:
    """This rank's rows of a parameter, or of its gradient: the same memory."""
    return p.detach().to_local() if is_sharded(p) else p.detach()


def local_rows(p) -> slice:
    """Which rows of the full parameter local_tensor(p) holds."""
    if not is_sharded(p):
        return slice(None)
    per_rank = -(-p.shape[0] // p.device_mesh.size())
    start = min(per_rank * p.device_mesh.get_local_rank(), p.shape[0])
    return slice(start, start + len(local_tensor(p)))


def full_tensor(p) -> torch.Tensor:
    """All rows of a parameter; of a sharded one all ranks must ask for it."""
    return p.detach().full_tensor() if is_sharded(p) else p.data
