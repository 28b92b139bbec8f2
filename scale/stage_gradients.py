"""Gradients of a stage of a pipeline, and the schedule of its backward passes: 1F1B.

The loop of train.py asks for a forward pass, then for a backward pass, batch by batch. Stage s of p
holds p - 1 - s backward passes back, so that with four micro-batches on three stages

    stage 0     F0 F1 F2 B0 F3 B1       B2    B3
    stage 1        F0 F1 B0 F2 B1 F3 B2    B3
    stage 2           F0 B0 F1 B1 F2 B2 F3 B3

and p - s micro-batches are in flight, however many a step has. Each stage waits p - 1 times for the
pass of another one: (p - 1) / (m + p - 1) of a step of m micro-batches is the bubble.

Requires: scale/cut_gradients.py, scale/stage_messages.py (which order the stages).
Next: runtime/build.py.
Papers: 1F1B arXiv:2006.09503 (sec. 2.2), and with flushes arXiv:2104.04473 (sec. 2.2).
"""
from collections import deque

import torch
import torch.distributed as dist
from torch.profiler import record_function

from checkpoint.shards import full_shape, held_of
from parallel import Ranks
from scale.collectives import sum_over
from scale.cut_gradients import PartGradients
from scale.stage_messages import PipelineStage


class StageGradients(PartGradients):
    """Gradients of the weights that this stage holds; `parameters` are those of all stages."""

    def __init__(self, parameters: dict, ranks: Ranks, stage: PipelineStage):
        super().__init__({name: p for name, p in parameters.items() if not p.is_meta}, ranks)
        self.parameters = parameters
        self.device = stage.device
        self.stage = stage
        self.held_back = deque()                        # (loss, batch) of passes in flight

    def backward(self, loss: torch.Tensor, batch=None, last: bool = False):
        """Run the backward passes that are due once the forward pass of this batch is done."""
        self.held_back.append((loss, batch))
        allowed = 0 if last else self.stage.axis.size - 1 - self.stage.axis.rank
        while len(self.held_back) > allowed:
            loss, batch = self.held_back.popleft()
            if loss.requires_grad:                      # else nothing is trained up to this stage
                super().backward(loss, batch)

    @record_function("communication")
    def all_reduce(self):
        """Sum over the ranks; of a head tied to the embedding also over the two stages."""
        self.stage.finish()
        super().all_reduce()
        axis = self.stage.axis
        for p in self.weights:
            others = [stage for stage in held_of(p).owners if stage != axis.rank]
            if others and p.grad is not None:
                p.grad += self.exchanged(p.grad, dist.get_global_rank(axis.group, others[0]))

    def exchanged(self, grad: torch.Tensor, process: int) -> torch.Tensor:
        """The other stage's gradient for ours."""
        theirs = torch.empty_like(grad)
        forward, back = self.stage.groups[1], self.stage.groups[-1]
        ours, other = (forward, back) if self.stage.is_first else (back, forward)
        sent = dist.isend(grad.contiguous(), process, ours)
        dist.recv(theirs, process, other)
        sent.wait()
        return theirs

    def square(self, weights: list) -> torch.Tensor:
        """The sum of the squares of the gradients of all stages, each weight once."""
        axis = self.stage.axis
        own = super().square([p for p in weights if held_of(p).owners[0] == axis.rank])
        return sum_over(axis, own)

    def state_fields(self, name: str, fields: dict) -> dict:
        """The optimizer state of a weight, from the stage that holds it; all must ask for it."""
        held = held_of(self.parameters[name])
        group = held.axis.group
        box = [{key: (tensor.shape, tensor.dtype) for key, tensor in fields.items()}]
        dist.broadcast_object_list(box, held.source, group=group)
        found = {}
        for key, (shape, dtype) in box[0].items():
            own = fields[key] if held.here else torch.empty(shape, dtype=dtype, device="meta")
            found[key] = held.fetch(own.to(self.device) if held.here else own)
        return found

    def state_parts(self) -> dict:
        """As of PartGradients; the state of other stages' weights is not read."""
        parts = super().state_parts()
        for name, p in self.parameters.items():
            if p.is_meta:
                parts[name] = full_shape(p), lambda tensors, key, p=p: torch.empty_like(p)
        return parts
