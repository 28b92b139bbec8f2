"""The plan of a merge: the tensors of the new checkpoint, and the adapters that change each.

It is made from names, shapes and dtypes alone; no weight is read.

Requires: lora.py, checkpoint/adapters.py.
Next: merge.py.
"""
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from checkpoint.adapter_config import read_adapter_config
from checkpoint.adapter_names import PREFIX
from checkpoint.adapters import (OF_ADAPTERS, adapter_tensors, copies_of_base, load_adapter,
                                 peft_names, pissa_start, swapped_stacks)
from checkpoint.expert_layouts import UnstackedTensors
from checkpoint.files import open_tensors, stored_as
from checkpoint.load import (places_of_weights, is_empty_bias, load_model, packed_weights,
                             quantized_weights, stays_quantized)
from families import ModelConfig
from lora import lora_layers
from model import is_constant


@dataclass
class Change:
    """Change of one tensor by one adapter.

    kind lora: + scale * B A; oft: inputs rotated; new: another tensor in its place.
    """
    file: Path
    key: str                    # name in the file; of adapters: without .lora_A.weight and the like
    kind: str = "lora"
    scale: float = 1.0
    has_copy: bool = False      # the file holds the base's tensor, too, as of an adapted head
    has_magnitude: bool = False     # the file holds DoRA's lora_magnitude_vector
    swapped: bool = False       # A and B of a stack have traded places in the file
    out_first: bool = False     # the matrices of a stack are (out, in), not (in, out)
    expert: object = None       # the checkpoint.expert_layouts.ExpertSlice of an expert in a stack
    rotation: object = None     # oft: the layer's OFTRotation, without its numbers

    def read(self, part: str, device="cpu", rows=...) -> torch.Tensor:
        """A (r, in) or rows of B (out, r), of a stack all of them. part: lora_A or lora_B."""
        with open_tensors(self.file) as tensors:    # opened each time, see read_tensor of merge.py
            if self.expert:
                return self.expert.read(tensors, part)[rows].to(device)
            return tensors.get_slice(f"{self.key}.{part}.weight")[rows].to(device)


@dataclass
class Planned:
    """One tensor of the new checkpoint: its source in the base, its changes, and its dtype."""
    file: Path
    key: str
    shape: tuple
    dtype: torch.dtype
    changes: list[Change] = field(default_factory=list)
    packed: object = None               # as in checkpoint.load.packed_weights
    quant_format: object = None         # the QuantFormat that training quantized it to on load


def plan_tensors(base: Path, adapters: list[Path], dtype: torch.dtype | None,
                 quant_format=None) -> tuple[dict[str, Planned], bool]:
    """({name: Planned} in the base's order, whether tied head and embedding become two matrices).

    Names are those of the files. A dtype applies to weights; other tensors of the files (buffers of
    older tools, the vision part of a model) are copied unchanged. quant_format: the QuantFormat
    that training quantized the base to on load, or None.
    """
    # on the meta device: shapes, no numbers
    skeleton = load_model(base, skip_weights=True, quant_format=quant_format)
    stored_name = skeleton.config.stored_name
    packed = packed_weights(base)
    quantized = quantized_weights(skeleton)
    parameters = [*skeleton.named_parameters(remove_duplicate=False), *quantized.items()]
    weights = {stored_name(name): tuple(p.shape) for name, p in parameters}
    plan = plan_base(base, skeleton.config, weights, packed, dtype)
    for name, _ in skeleton.named_parameters():
        if is_constant(name) and (planned := plan.get(stored_name(name))):
            planned.dtype = stored_as(planned.file, planned.key)[1]
    if not any(map(stays_quantized, packed.values())):
        for name in quantized:
            plan[stored_name(name)].quant_format = quant_format

    tied = skeleton.config.tie_word_embeddings
    head = stored_name("lm_head.weight")
    embedding = stored_name("model.embed_tokens.weight")
    missing = [name for name in weights if name not in plan and not (tied and name == head)]
    if missing:
        raise ValueError(
            f"{base}: {len(missing)} tensors that config.json describes are not in the files, such "
            f"as {', '.join(missing[:4])}. Is the download complete?")

    untied = False
    for adapter in adapters:
        for name, change in [*pissa_changes(adapter, base), *changes_of(adapter, base).items()]:
            if tied and name in (head, embedding):
                untied = True
                plan.setdefault(head, replace(plan[embedding], changes=[]))
            plan[name].changes.append(change)
    return plan, untied


def plan_base(base: Path, config: ModelConfig, weights: dict[str, tuple], packed: dict,
              dtype: torch.dtype | None) -> dict[str, Planned]:
    """{name: Planned} of the base's tensors. weights: {name: shape} according to config.json."""
    scales = set()                                      # tensors stored beside quantized weights
    for weight in packed.values():
        scales |= {place for part, place in weight.parts.items() if part != "codes"}

    plan = {}
    places = places_of_weights(base, config, weights, packed)
    for name, (file, key) in places.items():
        if (file, key) in scales or name not in weights and is_empty_bias(name, places):
            continue
        shape, stored_dtype = stored_as(file, key)
        if name in packed:
            shape = packed[name].shape
            stored_dtype = packed[name].quant_format.dtype
        if weights.get(name, shape) != shape:
            raise ValueError(f"{file}: {key} has shape {list(shape)}, config.json makes it "
                             f"{list(weights[name])}")
        new_dtype = dtype if dtype and name in weights else stored_dtype
        plan[name] = Planned(file=file, key=key, shape=shape, dtype=new_dtype,
                             packed=packed.get(name))
    return plan


def pissa_changes(adapter: Path, base: Path) -> list[tuple[str, Change]]:
    """[(tensor name, Change)]: subtract the initial adapter, as PiSSA did before training."""
    config = read_adapter_config(adapter)[0]
    if not config.pissa:
        return []
    start = pissa_start(adapter, config)
    if not start:
        raise ValueError(
            f"{adapter} is a PiSSA adapter without its folder pissa_init, which merging reads: "
            "take that in pissa_converted (pissa_convert: true writes it), or merge it with peft")
    changes = []
    for name, change in changes_of(start, base).items():
        if change.kind == "lora":
            changes.append((name, replace(change, scale=-change.scale, has_magnitude=False)))
    return changes


def changes_of(adapter: Path, base: Path) -> dict[str, Change]:
    """{tensor name: Change} of an adapter.

    Attaching it to a model without weights raises ValueError for everything that does not fit.
    """
    skeleton = load_model(base, skip_weights=True)
    config = load_adapter(skeleton, adapter)
    stored_name = skeleton.config.stored_name
    file = adapter / "adapter_model.safetensors"
    with open_tensors(file) as opened:
        tensors = UnstackedTensors(opened, skeleton)
        copies = copies_of_base(skeleton, tensors)
        swapped = swapped_stacks(skeleton, tensors, read_adapter_config(adapter)[1])

    changes = {}
    names = peft_names(skeleton)
    for name, layer in lora_layers(skeleton).items():
        key = names[name]
        changes[stored_name(f"{name}.weight")] = Change(
            file=file, key=tensors.layer_in_file(key), kind=config.finetuning_type,
            scale=getattr(layer, "scale", 1.0),
            rotation=getattr(layer, "oft_R", None),
            has_copy=f"{key}.base_layer.weight" in copies,
            has_magnitude=getattr(layer, "lora_magnitude_vector", None) is not None,
            swapped=f"{key}.lora_A.weight" in swapped,
            out_first=getattr(layer.base_layer, "out_first", False),
            expert=tensors.slice_of(key))
    for key in adapter_tensors(skeleton):
        if not key.endswith(OF_ADAPTERS):
            changes[key.removeprefix(PREFIX)] = Change(file=file, key=tensors.places[key],
                                                       kind="new")
    return changes
