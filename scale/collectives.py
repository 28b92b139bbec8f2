"""What the processes of an axis of the mesh send each other, and the gradients of that.

Between `enter` and `leave` every process computes with its part of the weights:

    x -> enter -> own part -> leave -> the sum of all parts
         forward: x                    forward: all-reduce
         backward: all-reduce          backward: the gradient as it is

`exchange` sends rows to the processes that compute with them; its gradient is sent back.

Requires: scale/mesh.py.
Next: scale/tensor_parallel.py, scale/expert_parallel.py.
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


class Exchange(torch.autograd.Function):
    """Rows to other processes and from them; gradients of the rows take the way back."""

    @staticmethod
    def forward(ctx, rows, sent, received, axis):
        ctx.sent = sent
        ctx.received = received
        ctx.axis = axis
        return all_to_all(rows, sent, received, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return all_to_all(grad, ctx.received, ctx.sent, ctx.axis), None, None, None


def all_to_all(rows: torch.Tensor, sent: list[int], received: list[int],
               axis: Axis) -> torch.Tensor:
    """The rows of all processes for this one, (sum of received, D), in the processes' order.

    rows: (sum of sent, D), the first sent[0] of them for process 0 of the axis.
    """
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=axis.group)
    return found


def exchange(rows, sent: list[int], received: list[int], axis: Axis):
    """all_to_all, through which gradients flow."""
    return Exchange.apply(rows, sent, received, axis)


def enter(x, axis: Axis):
    """x as it is; its gradient is the sum over the axis."""
    return Enter.apply(x, axis)


def leave(x, axis: Axis):
    """The sum of x over the axis; the gradient as it is."""
    return Leave.apply(x, axis)
