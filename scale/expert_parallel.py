"""Expert parallelism: each process of an axis holds some experts of each layer, and all else whole.

    torchrun --nproc-per-node 4 train.py --config my.yaml expert_parallel_size=2

The axis lies within data parallelism, as in DeepSpeed-MoE and Megatron: each of its processes has
rows of its own, so attention runs as with data parallelism, and tokens travel to their experts:

    rows of this process        its router chooses k experts for each
    all-to-all of counts        how many rows each process sends each expert
    all-to-all of rows          to the processes of their experts
    own experts                 MoE.mix, or fast/grouped_experts.py, with one expert for each row
    all-to-all back             each row's k results, weighted and added where the row came from

Gradients take the same way back (scale/expert_gradients.py sums them over the ranks). All ranks run
equally many passes (filler batches), also in an evaluation.

Experts of other processes are empty on this one, under their names: files on disk, optimizer state
and the order in which tensors are gathered are those of one process, which is the twin.

Requires: scale/mesh.py, scale/collectives.py, checkpoint/shards.py, model.py, lora.py.
Next: scale/expert_gradients.py.
Papers: GShard arXiv:2006.16668, DeepSpeed-MoE arXiv:2201.05596 (sec. 4).
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from checkpoint.shards import Cut, cut_parameter
from families import ModelConfig
from lora import LoRAStacked
from layers import MoE, StackedLinear
from scale.collectives import all_to_all, exchange
from scale.mesh import Axis


def own_config(config: ModelConfig, parts: int) -> ModelConfig:
    """The sizes that one of `parts` processes computes with. Raises ValueError for uneven parts."""
    if not any(config.sparse):
        raise ValueError(f"expert_parallel_size: {parts}: {config.model_type} has no experts here. "
                         "Leave it out: all processes are data parallel then, and fsdp: full_shard "
                         "shards every model")
    if config.num_experts % parts:
        fitting = [n for n in range(1, config.num_experts + 1) if config.num_experts % n == 0]
        raise ValueError(
            f"expert_parallel_size: {parts} does not divide num_experts: {config.num_experts} of "
            f"this model. Take {' or '.join(map(str, fitting))}; the other processes are data "
            "parallel")
    return replace(config, num_experts=config.num_experts // parts)


# ---- what this process holds --------------------------------------------------------------------


@dataclass(frozen=True)
class OneOwner(Cut):
    """A tensor that one process of the axis has whole, and the others none of."""
    owner: int = 0

    def ranges(self) -> list[tuple[int, int]]:
        return [(0, sum(self.sections) if self.axis.rank == self.owner else 0)]


class OwnExperts(nn.ModuleList):
    """A layer's experts: as a list those of this process, as a module all, of which most are empty.

    So parameters have the names of one process, and experts are counted from 0 on each process.
    """

    def __init__(self, experts: nn.ModuleList, axis: Axis):
        super().__init__()
        for name, expert in experts.named_children():
            self.add_module(name, expert)
        part = len(experts) // axis.size
        self.own = list(experts)[axis.rank * part:(axis.rank + 1) * part]

    def __iter__(self):
        return iter(self.own)

    def __len__(self):
        return len(self.own)

    def __getitem__(self, number):
        return self.own[number]


def cut_experts(model, axis: Axis):
    """Leave this process its experts, of a model whose adapters are attached, in place.

    Weights on the meta device stay there (see checkpoint.shards.materialize). Raises ValueError for
    uneven parts.
    """
    for moe in mixtures(model):
        moe.config = own_config(moe.config, axis.size)
        if moe.config.stacked_experts:
            for layer in (moe.experts.gate_up_proj, moe.experts.down_proj):
                cut_stack(layer, axis)
            continue
        for number, expert in enumerate(moe.experts):
            for module in expert.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    owner = number // moe.config.num_experts
                    cut_parameter(module, name, OneOwner(0, (len(p),), axis, owner))
        moe.experts = OwnExperts(moe.experts, axis)


def cut_stack(layer: StackedLinear | LoRAStacked, axis: Axis):
    """Cut a stack of linear maps by experts, and its adapter, laid out as LoRAStacked says."""
    experts = len(layer.weight)
    base = getattr(layer, "base_layer", layer)
    for name, _ in list(base.named_parameters(recurse=False)):      # weight, and bias if any
        cut_parameter(base, name, Cut(0, (experts,), axis))
    if isinstance(layer, LoRAStacked):
        rows = layer.lora_A.weight.shape[0]                                     # E*r
        cut_parameter(layer.lora_A, "weight", Cut(0, (rows,), axis))
        cut_parameter(layer.lora_B, "weight", Cut(1, (experts,) * (rows // experts), axis))


def mixtures(model) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


# ---- tokens to their experts and back -----------------------------------------------------------


def exchange_tokens(model, axis: Axis):
    """Send rows to the experts of a model of cut_experts, whose kernels are set, in place."""
    model.runs_together = True          # see evals/loss.py
    for moe in mixtures(model):
        moe.arrived = None
        moe.mix = partial(mix_over_axis, moe, moe.mix, axis)


def mix_over_axis(moe: MoE, mix: Callable, axis: Axis, x, chosen, weights):
    """MoE.mix with the experts of all processes. x (N, D); chosen, weights (N, k) -> (N, D).

    mix: of this process's experts. moe.arrived: rows of each process (outer list) for each expert.
    """
    here = moe.config.num_experts
    slots = chosen.flatten()                                        # (N*k,)
    order = slots.argsort(stable=True)                              # slots by expert, so by process
    rows = x[order // chosen.shape[1]]
    factor = weights.flatten()[order][:, None]
    if moe.config.scale_input:
        rows = rows * factor
    if torch.is_autocast_enabled(x.device.type):        # in the dtype that all experts answer in
        rows = rows.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and any(p.requires_grad for p in moe.experts.parameters()):
        rows = rows if rows.requires_grad else rows.requires_grad_()    # on all processes alike

    leaving = slots.bincount(minlength=here * axis.size).view(axis.size, here)
    arriving = all_to_all(leaving, [1] * axis.size, [1] * axis.size, axis)
    leaving, moe.arrived = torch.stack((leaving, arriving)).tolist()    # waits for the device
    sent = list(map(sum, leaving))
    received = list(map(sum, moe.arrived))
    rows = exchange(rows, sent, received, axis)                     # by process, then by expert
    if len(rows):
        experts = torch.arange(here, device=x.device).repeat(axis.size)
        experts = experts.repeat_interleave(arriving.flatten())[:, None]
        rows = mix(rows, experts, rows.new_ones(len(rows), 1))
    out = exchange(rows, received, sent, axis)
    if not moe.config.scale_input:
        out = out * factor
    return out[order.argsort()].view(*chosen.shape, -1).sum(1)      # in the order of slots again
