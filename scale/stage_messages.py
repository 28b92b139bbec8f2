"""What the stages of a pipeline send to each other: activations forward, their gradients back.

Send and Receive are autograd functions, so the graph of a micro-batch goes on in the next process:
backward of Send receives the gradient of x, and backward of Receive sends that of its x to the
stage before. Where no stage before trains anything, it is not sent.

These are plain messages of torch.distributed. torch.distributed.pipelining wants all micro-batches
to have one shape; here each is a packed row of another length, which every stage knows, because it
has the batch. What flows forward and what flows back have a process group each: in one group, two
neighbors that both send first would wait for each other (NCCL).

Requires: scale/mesh.py, lora.py.
Next: scale/pipeline_parallel.py.
"""
from collections import deque

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora import LoRAStacked, lora_layers
from parallel import LEFT
from scale.mesh import Axis


class PipelineStage:
    """This process's stage of a model: its layers, its neighbors, and what is sent to them."""

    def __init__(self, model, axis: Axis, stages: list[range], dtype: torch.dtype,
                 device: torch.device, neftune: bool):
        self.axis = axis
        self.layers = stages[axis.rank]
        self.is_first = axis.rank == 0
        self.is_last = axis.rank == axis.size - 1
        self.dtype = dtype
        self.device = device
        self.width = model.config.hidden_size
        self.experts = model.config.num_experts if any(model.config.sparse) else 0
        trained = [p.held.owners[0] for p in model.parameters() if p.requires_grad]
        self.sends_back = any(stage < axis.rank for stage in trained)
        self.waits_for_gradient = any(stage <= axis.rank for stage in trained)
        self.noise = neftune and not self.is_first
        self.masks = [masks_of(block) for block in model.model.layers]
        self.sums = None                # of the last forward pass's routers, (2, E)
        self.groups = {1: axis.group, -1: second_group(axis)}       # forward, back
        self.on_the_way = deque()       # (what is being sent, its tensor)

    def send(self, tensor: torch.Tensor, step: int):
        """Start to send to the next stage (step 1) or to the one before (-1)."""
        while len(self.on_the_way) > 4 * self.axis.size:        # no stage runs far ahead
            self.on_the_way.popleft()[0].wait()
        tensor = tensor.detach().contiguous()
        self.on_the_way.append((dist.isend(tensor, self.neighbor(step), self.groups[step]), tensor))

    def receive(self, shape: tuple, dtype: torch.dtype, step: int) -> torch.Tensor:
        """What the stage before (step 1) or the next one (-1) has sent."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(tensor, self.neighbor(-step), self.groups[step])
        return tensor

    def neighbor(self, step: int) -> int:
        """The number of a neighboring stage's process among all processes."""
        return dist.get_global_rank(self.axis.group, self.axis.rank + step)

    def finish(self):
        """Wait until all is sent."""
        while self.on_the_way:
            self.on_the_way.popleft()[0].wait()

    def input(self, shape: tuple, with_sums: bool) -> tuple:
        """(x (*shape, D), sums (2, E) of the routers before or None), from the stage before."""
        shapes = [((*shape, self.width), self.dtype)]
        if with_sums:
            shapes.append(((2, self.experts), torch.float32))
        if self.sends_back and torch.is_grad_enabled():
            anchor = torch.zeros((), device=self.device, requires_grad=True)
            x, *sums = Receive.apply(anchor, self, shapes)
        else:
            x, *sums = (self.receive(*shape, 1) for shape in shapes)
        return x, sums[0] if sums else None

    def output(self, x) -> torch.Tensor:
        """Send x, and the routers' sums; the scalar 0, this stage's loss, whose backward waits."""
        if x.dtype != self.dtype:
            raise ValueError("pipeline_parallel_size: the files of this model mix dtypes: "
                             f"{x.dtype} between its layers, {self.dtype} in their matrices. Set "
                             "bf16: true")
        tensors = [x] if self.sums is None else [x, self.sums]
        if self.waits_for_gradient and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()          # a trained expert without tokens: the next stage sends
        return Send.apply(self, *tensors)

    def draw_masks(self, layers: range, x):
        """Draw the random numbers of dropout in other stages' layers, to have those of one process.
        """
        for layer in layers:
            for width, p in self.masks[layer]:
                F.dropout(x.new_ones(*x.shape[:-1], width), p)


class Send(torch.autograd.Function):
    """Tensors sent to the next stage, for the scalar 0; backward receives their gradients."""

    @staticmethod
    def forward(ctx, stage: PipelineStage, *tensors):
        ctx.stage = stage
        ctx.shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        for tensor in tensors:
            stage.send(tensor, 1)
        return torch.zeros((), device=stage.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, *(ctx.stage.receive(*shape, -1) for shape in ctx.shapes)


class Receive(torch.autograd.Function):
    """Tensors from the stage before; backward sends their gradients to it."""

    @staticmethod
    def forward(ctx, anchor, stage: PipelineStage, shapes: list):
        ctx.stage = stage
        return tuple(stage.receive(*shape, 1) for shape in shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        for grad in grads:
            ctx.stage.send(grad, -1)
        return None, None, None


def masks_of(block: nn.Module) -> list[tuple[int, float]]:
    """(width, p) of each mask that a block draws in training, in order."""
    masks = []
    for name, layer in lora_layers(block).items():
        p = getattr(layer.dropout, "p", 0.0)
        if p and (isinstance(layer, LoRAStacked) or ".experts." in name):
            raise ValueError(
                "pipeline_parallel_size: lora_dropout beside experts draws as many numbers as an "
                "expert has tokens, which the other stages do not know. Set lora_dropout: 0, or "
                "leave the experts out of lora_target")
        if p:
            masks.append((getattr(layer.dropout, "width", layer.base_layer.in_features), p))
    return masks


def second_group(axis: Axis):
    """Another process group of the same processes, which all processes of the run make together."""
    ours = dist.get_process_group_ranks(axis.group)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    for members in sorted({tuple(ranks) for ranks in everyone}):
        group = dist.new_group(list(members))
        if members == tuple(ours):
            found = group
    LEFT.append(found)                                          # see parallel.end_ranks
    return found
