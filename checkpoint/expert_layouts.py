"""Read adapters of experts whose layout is not the checkpoint's: stacks, or experts one by one.

transformers 5 stacks the experts of a layer, gate_up_proj (E, 2 I, D) and down_proj (E, D, I).
PEFT's target_parameters adapts these stacks, whatever the layout of the checkpoint:

    …mlp.experts.base_layer.lora_A (E*r, D), lora_B (2 I, r*E)      of gate_up_proj
    …mlp.experts.lora_A (E*r, I), lora_B (D, r*E)                   of down_proj

If only one of them is adapted, it has the second name. Here gate and up of an expert share A, and
each has half of B. Such an adapter is saved again with experts one by one.

The other way, adapters of single experts (experts.7.gate_proj, as vLLM reads them, or trained
where the checkpoint has its experts one by one) are read for stacks: A and B of gate and up become
blocks of one A and B, of the sum of their ranks unless both have the same A.

Requires: checkpoint/adapter_names.py, lora.py.
Next: checkpoint/adapters.py.
Tested with peft 0.21.2 and transformers 5.24 (tests/test_lora_2026.py).
"""
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from checkpoint.adapter_names import PREFIX, AdapterTensors
from lora import LoRAConfig, expert_matrices
from layers import StackedLinear
from model import CausalLM

SINGLE = re.compile(r".*\.layers\.(\d+)\..*\.experts\.(\d+)\.(gate|up|down)_proj\.lora_A\.weight")
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


@dataclass(frozen=True)
class SingleExperts:
    """The adapters of single experts that are read as one adapter of a stack."""
    stems: dict                         # {(expert, part): its name in the file}; parts: gate, …
    experts: int
    size_in: int
    rows: dict                          # {part: slice of B's rows}
    columns: dict                       # {part: slice of the ranks}
    size_out: int
    rank: int                           # of the stack, for each expert
    stack_name: str

    def read(self, tensors, part: str) -> torch.Tensor:
        """A (E*rank, in) or B (out, rank*E), see LoRAStacked; zeros where there is no adapter."""
        A = torch.zeros(self.experts, self.rank, self.size_in)
        B = torch.zeros(self.size_out, self.rank, self.experts)
        for (expert, name), stem in self.stems.items():
            A[expert, self.columns[name]] = tensors.get_tensor(f"{stem}.lora_A.weight").float()
            B[self.rows[name], self.columns[name], expert] = tensors.get_tensor(
                f"{stem}.lora_B.weight").float()
        return A.flatten(0, 1) if part == "lora_A" else B.flatten(1)


def single_experts(tensors, stems: dict, stack: StackedLinear, interleaved: bool,
                   name: str) -> SingleExperts:
    """The adapters `stems` of single experts, {(expert, part): name in the file}, as of a stack.

    name: of the stack in the checkpoint. Raises ValueError for shapes that do not fit, or ranks
    that differ between the experts.
    """
    experts, size_out = len(stack.weight), stack.out_features
    half = size_out // 2
    rows = {"down": slice(0, size_out), "gate": slice(0, half), "up": slice(half, size_out)}
    if interleaved:
        rows |= {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    ranks = {}
    for (expert, part), stem in stems.items():
        A, B = (tensors.get_slice(f"{stem}.{side}.weight").get_shape()
                for side in ("lora_A", "lora_B"))
        r = ranks.setdefault(part, A[0])
        wanted = [r, stack.in_features], [size_out if part == "down" else half, r]
        if expert >= experts or (list(A), list(B)) != wanted:
            raise ValueError(f"{stem} has A {list(A)} and B {list(B)}; {name} has {experts} experts"
                             f" and takes A {wanted[0]} and B {wanted[1]} of each")
    both = [expert for expert, part in stems if part == "gate" and (expert, "up") in stems]
    one_A = all(torch.equal(*(tensors.get_tensor(f"{stems[expert, part]}.lora_A.weight")
                              for part in ("gate", "up"))) for expert in both)
    first = 0 if one_A else ranks["gate"]
    columns = {part: slice(first, first + r) if part == "up" else slice(0, r)
               for part, r in ranks.items()}
    rank = max(part.stop for part in columns.values())
    return SingleExperts(stems, experts, stack.in_features, rows, columns, size_out, rank, name)


class UnstackedTensors(AdapterTensors):
    """An open adapter file, its experts laid out as in the model.

    slices: {adapted layer, as in the files of the checkpoint: its ExpertSlice or SingleExperts}.
    """

    def __init__(self, tensors, model: CausalLM):
        super().__init__(tensors, model.config)
        self.slices = {}
        self.is_stacked_here = False        # single experts are read for stacks
        if not any(model.config.sparse):
            return
        if model.config.stacked_experts:
            self.stack_single_experts(model)
            return
        for key, place in list(self.places.items()):
            if found := STACK.fullmatch(key):
                del self.places[key]
                del self.places[key.replace(".lora_A.", ".lora_B.")]
                self.slices |= self.slices_of(place, int(found[1]), model)

    def stack_single_experts(self, model: CausalLM):
        """Replace the names of single experts' adapters by names of stacks, as peft_names has them.
        """
        blocks = {}                         # {layer: {stack: {(expert, part): name in the file}}}
        for key, place in list(self.places.items()):
            found = SINGLE.fullmatch(key)
            if found and model.config.sparse[int(found[1]):int(found[1]) + 1] == (True,):
                layer, expert, part = int(found[1]), int(found[2]), found[3]
                stack = "down_proj" if part == "down" else "gate_up_proj"
                stems = blocks.setdefault(layer, {}).setdefault(stack, {})
                stems[expert, part] = place.removesuffix(".lora_A.weight")
                del self.places[key]
                self.places.pop(key.replace(".lora_A.", ".lora_B."), None)
        self.is_stacked_here = bool(blocks)
        for layer, stacks in blocks.items():
            block = f"model.layers.{layer}.mlp.experts"
            for stack, stems in stacks.items():
                wrapped = ".base_layer" if stack == "gate_up_proj" and len(stacks) == 2 else ""
                layer = model.get_submodule(f"{block}.{stack}")
                self.slices[PREFIX + model.config.stored_name(block) + wrapped] = single_experts(
                    self.tensors, stems, getattr(layer, "base_layer", layer),
                    model.config.interleaved_gate_up,
                    model.config.stored_name(f"{block}.{stack}.weight"))

    def with_stacks(self, config: LoRAConfig, raw: dict) -> tuple[LoRAConfig, dict]:
        """config and adapter_config.json of single experts, written for the stacks.

        Raises ValueError for adapters of one stack with different scales.
        """
        ranks, alphas = {}, {}
        for part in self.slices.values():
            scales = set()
            for stem in part.stems.values():
                r, alpha = config.rank_and_alpha(stem.removeprefix(PREFIX))
                scales.add(alpha / (math.sqrt(r) if config.use_rslora else r))
            if len(scales) > 1:
                raise ValueError(f"the adapters of the experts of {part.stack_name} have different "
                                 "scales (alpha_pattern), which one of a stack cannot have")
            size = math.sqrt(part.rank) if config.use_rslora else part.rank
            ranks[part.stack_name], alphas[part.stack_name] = part.rank, scales.pop() * size
        end = ".lora_A.weight"
        plain = [key.removeprefix(PREFIX).removesuffix(end) for key in self.places
                 if key.endswith(end)]
        changed = replace(config, target_modules=plain, rank_pattern=ranks | config.rank_pattern,
                          alpha_pattern=alphas | config.alpha_pattern)
        return changed, raw | {"target_modules": plain, "exclude_modules": None,
                               "target_parameters": list(ranks)}

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

    def slice_of(self, layer: str) -> ExpertSlice | SingleExperts | None:
        """The slice of an adapted layer; None if the file has its own A and B."""
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
        if self.is_stacked_here:
            return config
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
