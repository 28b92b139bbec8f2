"""Gradients and optimizer state of weights that are sharded over the ranks.

    gradients = ShardedGradients(model, weights, ranks)

It has the interface of parallel.Gradients. fully_shard (scale/fsdp.py) reduces a gradient when a
block's backward pass ends; what is left is this rank's rows for the optimizer, the norm over all
rows, and full tensors for a checkpoint.

Requires: parallel.py, scale/fsdp.py.
Next: checkpoint/training_state.py.
Papers: FSDP arXiv:2304.11277.
"""
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import record_function

from checkpoint.load import fill_model
from checkpoint.shards import full_tensor, local_tensor, read_own
from checkpoint.training_state import gather_state
from model import MoE
from parallel import Ranks, clip_shards


class ShardedGradients:
    """The interface of parallel.Gradients where the trained weights are sharded.

    `parameters`, {name: this rank's rows as a plain parameter}, is what the optimizer works on;
    fully_shard has reduced the gradients when the backward pass ends.
    """

    sharded = True

    def __init__(self, model, weights: dict, ranks: Ranks):
        self.weights = weights
        self.ranks = ranks
        self.mixtures = {name: module for name, module in model.named_modules()
                         if isinstance(module, MoE) and not module.config.stacked_experts}
        self.parameters = {name: nn.Parameter(local_tensor(p)) for name, p in weights.items()}
        self.device = next(iter(weights.values())).device

    def zero(self):
        """Forget the gradients of the previous step."""
        for p in (*self.weights.values(), *self.parameters.values()):
            p.grad = None
        self.forget_experts()

    def forget_experts(self):
        for mixture in self.mixtures.values():
            mixture.visited.clear()

    @record_function("backward")
    def backward(self, loss: torch.Tensor, batch=None, last: bool = False):
        """Add the gradients of a batch.

        Each batch is reduced on its own: to wait for the last one would take the memory of the
        full gradient.
        """
        loss.backward()
        if batch is not None and batch.filler:          # the experts it used do not count
            self.forget_experts()

    @record_function("communication")
    def all_reduce(self):
        """Give each shard its gradient: fully_shard averages over ranks, and we need the sum."""
        for name, p in self.weights.items():
            self.parameters[name].data = local_tensor(p)    # the first forward pass may move it
            self.parameters[name].grad = local_tensor(p.grad).mul_(self.ranks.world)
        for name, mixture in self.mixtures.items():     # an expert no rank used has no gradient
            visited = [i in mixture.visited for i in range(len(mixture.experts))]
            users = self.ranks.total(*visited)
            for expert, _ in mixture.experts.named_parameters():
                if users[int(expert.partition(".")[0])] == 0:
                    self.parameters[f"{name}.experts.{expert}"].grad = None

    @record_function("optimizer")
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to max_norm (0: never); returns their norm, on the device."""
        return clip_shards(self.parameters.values(), max_norm, self.ranks)

    def full_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """All rows of a tensor of the optimizer state; every rank must ask for it."""
        p = self.weights[name]
        sharded = type(p).from_local(tensor, p.device_mesh, p.placements, run_check=False,
                                     shape=p.shape, stride=p.stride())
        return sharded.full_tensor()

    def state_fields(self, name: str, fields: dict) -> dict:
        """The optimizer state of a weight, {field: tensor}: every rank has rows of all fields."""
        return fields

    def state_parts(self) -> dict:
        """{name: (shape, how to read this rank's rows)}, see load_training_state."""
        return {name: (p.shape, partial(read_own, p=p)) for name, p in self.weights.items()}

    def reload(self, model, folder: Path):
        """Put the weights of a checkpoint of this run back; every rank reads its rows."""
        fill_model(model, folder)

    def join_save(self, model, optimizer, names: list[str]):
        """What the other ranks do while rank 0 saves: ask for the same tensors, in its order.

        optimizer: None where weights alone are saved.
        """
        for p in model.parameters():
            full_tensor(p)
        for _ in gather_state(optimizer, names, self.full_tensor) if optimizer else ():
            pass
