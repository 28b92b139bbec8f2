"""Read PEFT's adapters of stacked experts for checkpoints that store experts one by one.

transformers 5 stacks the experts of a layer, gate_up_proj (E, 2 I, D) and down_proj (E, D, I).
PEFT's target_parameters adapts these stacks, whatever the layout of the checkpoint:

    …mlp.experts.base_layer.lora_A (E*r, D), lora_B (2 I, r*E)      of gate_up_proj
    …mlp.experts.lora_A (E*r, I), lora_B (D, r*E)                   of down_proj

If only one of them is adapted, it has the second name. Here gate and up of an expert share A, and
each has half of B. Such an adapter is saved again with experts one by one.

Requires: checkpoint/adapter_names.py, lora.py.
Next: checkpoint/adapters.py.
Tested with peft 0.21.2 and transformers 5.24 (tests/test_lora_2026.py).
"""
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from checkpoint.adapter_names import PREFIX, AdapterTensors
from lora import LoRAConfig, expert_matrices
from model import CausalLM

STACK = re.compile(r".*\.layers\.(\d+)\..*\.experts(\.base_layer)?\.lora_A\.weight")


@dataclass(frozen=True)
class ExpertSlice:
    """The part of a stack's adapter that belongs to one matrix of one expert."""
    stem: str                           # of the stack in the file, without .lora_A.weight
    experts: int
    expert: int
    rows: slice                         # of B
    transposed: bool                    # peft before 0.19 took the stack as (in, out)
    stack_name: str                     # of the stack, for rank_pattern and alpha_pattern

    def read(self, tensors, part: str) -> torch.Tensor:
        """A (r, in) or B (out, r). tensors: the open file; part: lora_A or lora_B."""
        A, B = (tensors.get_tensor(f"{self.stem}.{name}.weight") for name in ("lora_A", "lora_B"))
        low, high = expert_matrices(A, B, self.experts, self.expert)
        if self.transposed:
            low, high = high.T, low.T
        return (low if part == "lora_A" else high[self.rows]).contiguous()


class UnstackedTensors(AdapterTensors):
    """An open adapter file whose stacks are read as experts one by one.

    slices: {adapted layer, as in the files of the checkpoint: its ExpertSlice}.
    """

    def __init__(self, tensors, model: CausalLM):
        super().__init__(tensors, model.config)
        self.slices = {}
        if model.config.stacked_experts or not any(model.config.sparse):
            return
        for key, place in list(self.places.items()):
            if found := STACK.fullmatch(key):
                del self.places[key]
                del self.places[key.replace(".lora_A.", ".lora_B.")]
                self.slices |= self.slices_of(place, int(found[1]), model)

    def slices_of(self, key: str, layer: int, model: CausalLM) -> dict[str, ExpertSlice]:
        """The slices of one stack. key: name of its lora_A. Raises ValueError if sizes differ, and
        for experts without gate, where sizes do not tell up from down."""
        config = model.config
        if config.ungated_mlp:
            raise ValueError(f"{key} is an adapter of a stack of experts, which is not read for "
                             f"{config.model_type}. Merge it with peft, or train here with "
                             "lora_target: all,experts")
        stem = key.removesuffix(".lora_A.weight")
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        size_in = self.tensors.get_slice(key).get_shape()[1]
        size_out = self.tensors.get_slice(f"{stem}.lora_B.weight").get_shape()[0]
        halves = {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}
        known = {                           # square matrices use the plain layout below
            (2 * width, D): ("gate_up_proj", halves, True),
            (D, width): ("down_proj", {"down_proj": slice(0, D)}, True),
        }
        known |= {
            (D, 2 * width): ("gate_up_proj", halves, False),
            (width, D): ("down_proj", {"down_proj": slice(0, D)}, False),
        }
        if (size_in, size_out) not in known:
            raise ValueError(f"{key} is for experts of {size_in} to {size_out} features; this "
                             f"model's have {D} to {2 * width} and {width} to {D}")
        stack, parts, transposed = known[size_in, size_out]
        block = f"model.layers.{layer}.mlp.experts"
        found = {}
        for expert in range(E):
            for part, rows in parts.items():
                name = config.stored_name(f"{block}.{expert}.{part}")
                found[PREFIX + name] = ExpertSlice(stem, E, expert, rows, transposed,
                                                   f"{config.stored_name(block)}.{stack}")
        return found

    def keys(self) -> Iterable[str]:
        parts = [f"{name}.{part}.weight" for name in self.slices for part in ("lora_A", "lora_B")]
        return [*self.places, *parts]

    def slice_of(self, layer: str) -> ExpertSlice | None:
        """The ExpertSlice of an adapted layer; None if the file has its own A and B."""
        return self.slices.get(layer)

    def get_tensor(self, name: str):
        layer, part = name.removesuffix(".weight").rsplit(".", 1)
        if layer in self.slices:
            return self.slices[layer].read(self.tensors, part)
        return super().get_tensor(name)

    def get_slice(self, name: str):
        layer = name.removesuffix(".weight").rpartition(".")[0]
        if layer in self.slices:
            return WholeSlice(self.get_tensor(name))
        return super().get_slice(name)

    def with_ranks(self, config: LoRAConfig) -> LoRAConfig:
        """The config with the rank and alpha of each stack for the matrices of its experts."""
        ranks = {}
        alphas = {}
        for name, part in self.slices.items():
            layer = name.removeprefix(PREFIX)
            of_stack = config.rank_and_alpha(part.stack_name)
            if config.rank_and_alpha(layer) != of_stack:
                ranks[layer], alphas[layer] = of_stack
        return replace(config, rank_pattern=ranks | config.rank_pattern,
                       alpha_pattern=alphas | config.alpha_pattern)


class WholeSlice:
    """A tensor with the interface of a safetensors slice."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, rows):
        return self.tensor[rows]
