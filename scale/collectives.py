"""Sums over the processes of an axis of the mesh, and what their gradients are.

Between `enter` and `leave` every process computes with its part of the weights:

    x -> enter -> own part -> leave -> the sum of all parts
         forward: x                    forward: all-reduce
         backward: all-reduce          backward: the gradient as it is

Requires: scale/mesh.py.
Next: scale/tensor_parallel.py.
Papers: Megatron-LM arXiv:1909.08053 (sec. 3, the operators f and g).
"""
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from scale.mesh import Axis


def sum_over(axis: Axis, tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """A new tensor: the sum (or maximum) over the processes of the axis."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=op, group=axis.group)
    return total


class Enter(torch.autograd.Function):
    """x as it is; its gradient is the sum over the axis (f of arXiv:1909.08053)."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return sum_over(ctx.axis, grad), None


class Leave(torch.autograd.Function):
    """The sum of x over the axis; the gradient as it is (g of arXiv:1909.08053)."""

    @staticmethod
    def forward(ctx, x, axis):
        return sum_over(axis, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None


def enter(x, axis: Axis):
    """x as it is; its gradient is the sum over the axis."""
    return Enter.apply(x, axis)


def leave(x, axis: Axis):
    """The sum of x over the axis; the gradient as it is."""
    return Leave.apply(x, axis)
