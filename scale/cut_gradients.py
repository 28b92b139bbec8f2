"""Gradients of weights of which each process has a part (scale/tensor_parallel.py).

A cut weight has its own gradient on each process. What is whole between enter and leave, such as A
before columns, has a gradient from each part: they are summed over the axis, once a step. All
other gradients are the same on all processes. The norm for clipping counts each weight once.

Requires: parallel.py (whose Gradients is the twin), scale/collectives.py.
Next: scale/stage_gradients.py, runtime/build.py.
"""
import math
from functools import partial

import torch
from torch.profiler import record_function

from checkpoint.adapters import adapter_tensors, reload_adapter
from checkpoint.load import fill_model
from checkpoint.shards import cut_of, full_shape, full_tensor, read_own
from checkpoint.training_state import gather_state
from lora import lora_layers
from parallel import Bucket, Gradients, Ranks
from scale.collectives import sum_over


class PartGradients(Gradients):
    """Gradients of weights of which some are parts; summed over ranks, then over the axis."""

    sharded = True                      # saving takes all processes
    axis_name = "tensor"

    def __init__(self, parameters: dict, ranks: Ranks):
        self.axis = ranks.axes.get(self.axis_name)
        super().__init__(parameters, ranks, overlap=False)     # one order of all collectives
        self.partial = [p for name, p in parameters.items() if self.axis and cut_of(p) is None
                        and (".self_attn." in name or ".mlp." in name)]

    def make_bucket(self, params: list) -> Bucket:
        return Bucket(params, self.ranks.group)

    @record_function("communication")
    def all_reduce(self):
        """Sum over the ranks, and over the axis where each process has a part of the gradient."""
        super().all_reduce()
        grads = [p.grad for p in self.partial if p.grad is not None]
        if grads:
            flat = sum_over(self.axis, torch.cat([grad.flatten() for grad in grads]))
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(total.view_as(grad))

    @record_function("optimizer")
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to max_norm (0: never); the norm counts each weight once."""
        norm = self.square(self.weights).sqrt()
        factor = ((max_norm or math.inf) / (norm + 1e-6)).clamp(max=1)
        for p in self.weights:
            if p.grad is not None:
                p.grad.mul_(factor.to(p.grad.dtype))
        return norm.float()

    def square(self, weights: list) -> torch.Tensor:
        """The sum of the squares of their gradients, float64, each number once."""
        grads = [p.grad for p in weights if cut_of(p) is not None and p.grad is not None]
        others = [p.grad for p in weights if cut_of(p) is None and p.grad is not None]
        square = sum_of_squares(grads, self.device)
        if self.axis:
            square = sum_over(self.axis, square)
        return square + sum_of_squares(others, self.device)

    def full_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """All of a tensor of the optimizer state; every process of the axis must ask for it."""
        cut = cut_of(self.parameters[name])
        return cut.whole(tensor) if cut else tensor

    def state_parts(self) -> dict:
        """{name: (shape of the whole, how to read this process's part)}."""
        return {name: (full_shape(p), partial(read_own, p=p))
                for name, p in self.parameters.items()}

    def reload(self, model, folder):
        """Put the weights of a checkpoint of this run back; every process reads its part."""
        if lora_layers(model):
            reload_adapter(model, folder)
        else:
            fill_model(model, folder)

    def join_save(self, model, optimizer, names: list[str]):
        """What the others do while process 0 saves: ask for the same tensors, in its order."""
        saved = adapter_tensors(model).values() if lora_layers(model) else model.parameters()
        for p in saved:
            full_tensor(p)
        if optimizer:
            for _ in gather_state(optimizer, names, self.full_tensor, self.state_fields):
                pass


def sum_of_squares(grads: list, device) -> torch.Tensor:
    """The sum of all squares, float64, on the device."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.stack(norms).double().square().sum() if norms else torch.zeros(
        (), dtype=torch.float64, device=device)
