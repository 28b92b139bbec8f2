"""Adapters in PEFT's format: reading, writing, naming.

Requires: checkpoint/adapter_config.py, checkpoint/adapter_names.py, checkpoint/peft_targets.py,
checkpoint/load.py.
Next: merge.py.
"""
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from checkpoint.adapter_config import read_adapter_config, without_excluded
from checkpoint.adapter_names import PREFIX, fields_with_names, module_name, name_in_files
from checkpoint.expert_layouts import UnstackedTensors
from checkpoint.files import new_folder, open_tensors, save_tensors, write_json
from checkpoint.load import load_model, mismatch_message
from checkpoint.peft_targets import peft_exchanges_stacks, peft_fields
from checkpoint.shards import full_shape, full_tensor, own_part
from families import ModelConfig
from lora import (AdaptedLinear, AdapterConfig, LoRAConfig, LoRAStacked, attach_lora, find_targets,
                  is_quantized, lora_layers, match_patterns, merge_adapters, trainable)
from model import CausalLM
from text.tokenizer import read_json

OF_ADAPTERS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".oft_R.weight")


# ---- reading ------------------------------------------------------------------------------------


def pissa_start(folder, config: LoRAConfig) -> Path | None:
    """The folder with the initial A and B of a PiSSA adapter, which its base weights lack.

    `pissa_init` in the adapter's folder or beside it. None where A and B can be computed again, as
    the exact principal components of the base. Raises FileNotFoundError where they cannot.
    """
    for start in (Path(folder) / "pissa_init", Path(folder).resolve().parent / "pissa_init"):
        if (start / "adapter_model.safetensors").is_file():
            return start
    if config.init_lora_weights == "pissa":
        return None
    raise FileNotFoundError(
        f"{folder} was initialized with {config.init_lora_weights}, from random numbers that are "
        "not reproducible: put its folder pissa_init into it, or take the adapter in "
        "pissa_converted (pissa_convert: true writes it)")


def load_adapter(model: CausalLM, folder, dropout: float | None = None,
                 device=None) -> AdapterConfig:
    """Attach the adapter of a folder to the model, trainable.

    Strict: every tensor is used, none is missing. dropout: instead of the adapter's own. device: of
    the trained weights, if not that of the frozen ones.
    """
    config, raw = adapter_fields(folder, model.config)
    if dropout is not None:
        config.lora_dropout = dropout
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        has_pickle = path.with_suffix(".bin").is_file()
        hint = "; adapter_model.bin is a pickle and is not read" if has_pickle else ""
        raise FileNotFoundError(f"{path} is missing{hint}")
    start = pissa_start(folder, config) if config.pissa else None
    with open_tensors(path) as file:
        tensors = UnstackedTensors(file, model)
        if tensors.is_stacked_here:
            config, raw = tensors.with_stacks(config, raw)
        if isinstance(config, LoRAConfig):
            config = tensors.with_ranks(config)
            check_rank(path, config, tensors)
        if start:
            load_adapter(model, start, config.lora_dropout, device)
            remove_adapters(model)
        else:
            attach_like(folder, model, config, raw, tensors.keys(), device)
        copy_adapter(model, tensors, path, config, raw)
    return config


def check_rank(path: Path, config: LoRAConfig, tensors):
    """Raises ValueError for a rank that no matrix of the file has, before memory is taken for it.

    Small ones are compared matrix by matrix, by copy_adapter.
    """
    rows = [tensors.get_slice(key).get_shape()[0] for key in tensors.keys()
            if key.endswith(".lora_A.weight")]
    r = max([config.r, *config.rank_pattern.values()])
    if r > max(1024, *rows, 0):
        raise ValueError(f"{path} holds no adapter of rank {r}, which adapter_config.json states; "
                         f"its largest lora_A has {max(rows, default=0)} rows. Fetch both again")


def reload_adapter(model: CausalLM, folder):
    """Copy an adapter of the same layers into the model's."""
    config, raw = adapter_fields(folder, model.config)
    path = Path(folder) / "adapter_model.safetensors"
    with open_tensors(path) as tensors:
        copy_adapter(model, UnstackedTensors(tensors, model), path, config, raw)


def adapter_fields(folder, model_config: ModelConfig) -> tuple[AdapterConfig, dict]:
    """read_adapter_config, with layer names as in the checkpoint's files."""
    def rename(name):
        return name_in_files(name, model_config)

    config, raw = read_adapter_config(folder)
    changed = fields_with_names({key: getattr(config, key) for key in config.__dataclass_fields__},
                                rename)
    return replace(config, **changed), fields_with_names(raw, rename)


def variant_of(config: AdapterConfig) -> dict:
    """The arguments `layer` and `init` of attach_lora; {} for plain LoRA."""
    if config.finetuning_type == "oft":
        from methods.oft import OFTLinear                   # only where it is asked for

        return {"layer": OFTLinear}
    if not config.variant:
        return {}
    from methods.lora_variants import variant_arguments     # only where it is asked for

    return variant_arguments(config)


def remove_adapters(model: CausalLM):
    """Subtract every adapter from its weight, as PiSSA does before training."""
    from methods.lora_variants import remove_adapter

    for layer in lora_layers(model).values():
        remove_adapter(layer)


def attach_like(folder, model: CausalLM, config: AdapterConfig, raw: dict, keys, device):
    """Attach new adapters to the layers that the adapter of a folder is for.

    keys: names of its tensors. Raises ValueError for another model.
    """
    check_patterns(Path(folder) / "adapter_config.json", model, config, raw)
    stored_name = model.config.stored_name
    try:
        targets = targets_of(model, config, raw, keys)
        attach_lora(model, config, stored_name=stored_name, targets=targets, device=device,
                    **variant_of(config))
    except ValueError as error:
        base = raw.get("base_model_name_or_path")
        raise ValueError(f"{folder} was made for another model ({base}): {error}") from None
    if any(raw.get(key) not in (None, []) for key in ("exclude_modules", "layers_to_transform")):
        config.target_modules = [stored_name(name) for name in targets]     # what is left of them


def check_patterns(path: Path, model: CausalLM, config: AdapterConfig, raw: dict):
    """Raises ValueError for a regular expression that is none, or takes too long."""
    names = [model.config.stored_name(name) for name, module in model.named_modules()
             if isinstance(module, nn.Linear)]
    for key in ("rank_pattern", "alpha_pattern"):
        match_patterns(list(getattr(config, key, {})), names, f"{path}: {key}")
    for key in ("target_modules", "exclude_modules"):
        if isinstance(raw.get(key), str):
            match_patterns([raw[key]], names, f"{path}: {key}")


@torch.no_grad()
def copy_adapter(model: CausalLM, tensors, path: Path, config: AdapterConfig, raw: dict):
    """Copy the tensors of an adapter file into the model's adapters, which must be the same."""
    expected = adapter_tensors(model)
    names = set(tensors.keys()) - copies_of_base(model, tensors)
    missing = sorted(expected.keys() - names)
    unused = sorted(names - expected.keys())
    if missing or unused:
        message = mismatch_message(path, missing, unused)
        raise ValueError(message.replace("that config.json describes",
                                         "this model and adapter_config.json ask for"))
    swapped = swapped_stacks(model, tensors, raw)
    for name, parameter in expected.items():
        if name in swapped:
            tensor = swapped_back(tensors.get_tensor, name, swapped[name])
        else:
            tensor = tensors.get_tensor(name)
        if tensor.shape != full_shape(parameter):
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model and "
                f"adapter_config.json make it {list(full_shape(parameter))}. Its base is "
                f"{raw.get('base_model_name_or_path')!r}, {config.size}: is this another model, "
                "or another rank?")
        parameter.copy_(own_part(tensor, parameter))


def targets_of(model: CausalLM, config: AdapterConfig, raw: dict, keys) -> list[str]:
    """Full names of the layers that an adapter file with these keys is for.

    The names in adapter_config.json leave the routed experts open: `gate_proj` means those of all
    experts to transformers 4, where they are linear layers, and that of the shared expert alone to
    transformers 5, where they are stacks. Stacks are what target_parameters names.
    """
    stored_name = model.config.stored_name
    keys = set(keys)
    experts_one_by_one = any(re.search(r"\.experts\.\d", key) for key in keys)
    targets = []
    for name in raw.get("target_parameters") or []:
        targets += layers_of_parameter(model, name, experts_one_by_one)
    for name in find_targets(model, config.target_modules, stored_name):
        is_linear = isinstance(model.get_submodule(name), nn.Linear)
        if ".experts." not in name or (experts_one_by_one and is_linear):
            targets.append(name)
    if raw.get("target_parameters") and experts_one_by_one:
        targets += [name for name, _ in model.named_modules() if ".experts." in name
                    and f"{PREFIX}{stored_name(name)}.lora_A.weight" in keys]
    by_stored_name = {stored_name(name): name for name in targets}      # each once
    kept = without_excluded(list(by_stored_name), raw, "adapter_config.json")
    return [by_stored_name[name] for name in kept]


def layers_of_parameter(model: CausalLM, parameter: str, experts_one_by_one: bool) -> list[str]:
    """Full names of the layers that an entry of target_parameters adapts: stacks, or weights."""
    stored_name = model.config.stored_name
    if parameter.endswith(".weight") or model.config.stacked_experts:
        return find_targets(model, [parameter.removesuffix(".weight")], stored_name)
    if not experts_one_by_one:
        raise ValueError(f"target_parameters {parameter} is not a matrix of this model, and the "
                         "file has no adapter of experts")
    return []                               # the file names the experts, too


def stored_targets(model: CausalLM, folder) -> list[str]:
    """Names of the layers that an adapter folder is for, as the checkpoint's files call them."""
    config, raw = adapter_fields(folder, model.config)
    with open_tensors(Path(folder) / "adapter_model.safetensors") as file:
        tensors = UnstackedTensors(file, model)
        if tensors.is_stacked_here:
            config, raw = tensors.with_stacks(config, raw)
        targets = targets_of(model, config, raw, tensors.keys())
    return [model.config.stored_name(name) for name in targets]


def copies_of_base(model: CausalLM, tensors) -> set[str]:
    """Names of the frozen weights, equal to the base's, that PEFT stores with a head's adapter."""
    found = set()
    keys = set(tensors.keys())
    for layer, peft_name in peft_names(model).items():
        name = f"{peft_name}.base_layer.weight"
        if name not in keys:
            continue
        weight = model.get_submodule(layer).weight
        same_shape = list(weight.shape) == tensors.get_slice(name).get_shape()
        if same_shape and (weight.is_meta
                           or torch.equal(tensors.get_tensor(name).to(weight), weight)):
            found.add(name)
    return found


def swapped_stacks(model: CausalLM, tensors, raw: dict) -> dict[str, int]:
    """{name of an A or B: number of experts} of stacks whose file has A and B exchanged, or {}.

    PEFT writes them so from 0.20 on, where it takes the matrices of a stack as (out, in), except
    for families it knows better; their product is the same. The shapes tell; where all matrices are
    square, only family and version do.
    """
    if tensors.is_stacked_here:
        return {}
    names = peft_names(model)
    found = {}
    all_plain = True
    all_swapped = True
    for layer, module in lora_layers(model).items():
        if not isinstance(module, LoRAStacked):
            continue
        keys = [f"{names[layer]}.{part}.weight" for part in ("lora_A", "lora_B")]
        shapes = [tuple(tensors.get_slice(key).get_shape()) for key in keys]
        A, B = full_shape(module.lora_A.weight), full_shape(module.lora_B.weight)
        all_plain = all_plain and shapes == [A, B]
        all_swapped = all_swapped and shapes == [B[::-1], A[::-1]]
        found.update(dict.fromkeys(keys, full_shape(module.weight)[0]))
    is_newer = re.match(r"0\.[2-9]\d|[1-9]", raw.get("peft_version") or "")
    exchanged = is_newer and peft_exchanges_stacks(model.config)
    return found if all_swapped and (exchanged or not all_plain) else {}


def swapped_back(tensor_of: Callable, name: str, experts: int):
    """A (E*r, in) or B (out, r*E) of a stack, from a file that has the two exchanged.

    tensor_of(name): a tensor of the file. Called with plain ones, it exchanges them.
    """
    stem, part = name.removesuffix(".weight").rsplit(".", 1)
    if part == "lora_A":
        stored = tensor_of(f"{stem}.lora_B.weight")                             # (in, r*E)
        return stored.view(len(stored), -1, experts).permute(2, 1, 0).flatten(0, 1)
    stored = tensor_of(f"{stem}.lora_A.weight")                                 # (E*r, out)
    return stored.view(experts, -1, stored.shape[1]).permute(2, 1, 0).flatten(1)


# ---- names and tensors --------------------------------------------------------------------------


def peft_names(model: CausalLM) -> dict[str, str]:
    """{adapted layer: its name in PEFT's files}, except for prefixes (see adapter_names.py).

    The stacks of a block are parameters of one module to PEFT, which wraps that module once for
    each of them: experts.base_layer is the first of two, experts the second.
    """
    stored_name = model.config.stored_name
    found = {}
    wrapped = Counter()
    for name, layer in reversed(lora_layers(model).items()):
        if isinstance(layer, LoRAStacked):
            block = name.rpartition(".")[0]
            found[name] = PREFIX + stored_name(block) + ".base_layer" * wrapped[block]
            wrapped[block] += 1
        else:
            found[name] = PREFIX + stored_name(name)
    return found


def adapter_tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    """{PEFT's name: parameter} of the adapters, and of modules trained in full."""
    found = {}
    names = peft_names(model)
    for layer, module in lora_layers(model).items():
        assert not module.weight.requires_grad, layer
        for part, parameter in module.named_parameters():
            if part.startswith(("lora_", "oft_")):      # A, B, DoRA's magnitudes; OFT's rotation
                found[f"{names[layer]}.{part}"] = parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and not name.endswith(OF_ADAPTERS):
            found[PREFIX + model.config.stored_name(name)] = parameter
    return found


# ---- writing ------------------------------------------------------------------------------------


def save_adapter(model: CausalLM, folder, config: AdapterConfig, base: str,
                 tensors: dict | None = None):
    """Write adapter_config.json and adapter_model.safetensors.

    base: the base model as the user named it. tensors: others than the model's, under the same
    names.
    """
    folder = Path(folder)
    if tensors is None:
        tensors = {name: full_tensor(p) for name, p in adapter_tensors(model).items()}
    def rename(name):
        return module_name(name, model.config)

    written = {rename(name): tensor for name, tensor in in_pefts_layout(model, tensors).items()}
    save_tensors(folder / "adapter_model.safetensors", written)
    fields = {
        "peft_type": config.finetuning_type.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": config.modules_to_save or None,
    }
    fields = fields_with_names(fields | peft_fields(model, config), rename)
    write_json(folder / "adapter_config.json", fields)


def in_pefts_layout(model: CausalLM, tensors: dict) -> dict:
    """The tensors, with A and B of stacks swapped if PEFT from 0.20 on stores them so."""
    if not peft_exchanges_stacks(model.config):
        return tensors
    names = peft_names(model)
    written = dict(tensors)
    for layer, module in lora_layers(model).items():
        if isinstance(module, LoRAStacked):
            for part in ("lora_A", "lora_B"):
                key = f"{names[layer]}.{part}.weight"
                experts = full_shape(module.weight)[0]
                written[key] = swapped_back(tensors.__getitem__, key, experts)
    return written


def save_pissa_start(model: CausalLM, folder, config: LoRAConfig, base: str):
    """Write the initial A and B of PiSSA, which the base weights lack, for pissa_start."""
    tensors = adapter_tensors(model)
    layers = lora_layers(model)
    for layer, name in peft_names(model).items():
        A, B = layers[layer].removed
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = B
    with new_folder(folder) as work:
        save_adapter(model, work, replace(config, init_lora_weights=True), base, tensors)


def save_converted(model: CausalLM, folder, config: LoRAConfig, base: str):
    """Write a PiSSA adapter as a plain one of rank 2 r, for the base as it was.

    s B A - s B0 A0 = s [B | -B0] [A; A0] (arXiv:2404.02948, appendix C).
    """
    tensors = adapter_tensors(model)
    layers = lora_layers(model)
    for layer, name in peft_names(model).items():
        A, B = layers[layer].removed
        tensors[f"{name}.lora_A.weight"] = torch.cat([tensors[f"{name}.lora_A.weight"], A])
        tensors[f"{name}.lora_B.weight"] = torch.cat([tensors[f"{name}.lora_B.weight"], -B], dim=1)
    growth = math.sqrt(2) if config.use_rslora else 2       # of alpha, so that the scale stays
    config = replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={part: 2 * r for part, r in config.rank_pattern.items()},
        alpha_pattern={part: growth * alpha for part, alpha in config.alpha_pattern.items()},
    )
    with new_folder(folder) as work:
        save_adapter(model, work, config, base, tensors)


# ---- several adapters, and inference ------------------------------------------------------------


def folded_under(adapter) -> list[str]:
    """The adapters that were merged into the base before this one was trained.

    Their names are those in the adapter's train_config.json.
    """
    path = Path(adapter) / "train_config.json"
    settings = read_json(path)
    names = settings.get("adapter_name_or_path") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: adapter_name_or_path is {names!r:.60}, not a list of folders. "
                         "Correct it, or remove the file if no adapter was merged before")
    return names if settings.get("create_new_adapter") else names[:-1]


def warn_of_folded(adapters: list) -> str:
    """A warning for an adapter without those it was trained on (see folded_under), or ""."""
    for index, adapter in enumerate(adapters):
        before = [Path(other).resolve() for other in adapters[:index]]
        missing = [name for name in folded_under(adapter) if Path(name).resolve() not in before]
        if missing:
            return (f"{adapter} was trained with {' and '.join(missing)} merged into the base. "
                    "Unless this base has it already: "
                    f"adapter_name_or_path={','.join([*missing, str(adapter)])}")
    return ""


def layers_of_adapter(base, folder, device, quant_format=None) -> tuple[dict, list[str]]:
    """({full name: adapted layer}, names of the weights trained whole) of an adapter folder.

    The layers stand on a base without weights: their base_layer is to be set before use.
    """
    skeleton = load_model(base, skip_weights=True, quant_format=quant_format)
    load_adapter(skeleton, folder, dropout=0.0, device=device)
    layers = lora_layers(skeleton)
    whole = [name for name in trainable(skeleton) if name.startswith("model.embed_tokens")
             or not any(name.startswith(f"{layer}.") for layer in layers)]
    return layers, whole


def load_with_adapters(folder, adapters: list, dtype=None, device="cpu", fold_last: bool = False,
                       quant_format=None) -> CausalLM:
    """A base model with adapters, for inference.

    All adapters but the last are merged; the last stays beside the weights, in the base's dtype:
    A and B in float32 would be converted at every decoding step. fold_last: the last one is merged,
    too, except into matrices in 4 or 8 bits, which would take 16 bits then. This gives the weights
    that merge.py writes, and saves two matrix products a layer and token. quant_format: see
    load_model.
    """
    model = load_model(folder, dtype, device, quant_format=quant_format)
    for index, adapter in enumerate(adapters):
        is_last = index == len(adapters) - 1
        load_adapter(model, adapter)
        if fold_last or not is_last:
            merge_adapters(model, quantized=not is_last)
    model_dtype = model.model.embed_tokens.weight.dtype
    for layer in lora_layers(model).values():
        if isinstance(layer, AdaptedLinear):
            layer.fix()                                 # while the trained weights are float32
        layer.to(model_dtype if is_quantized(layer.base_layer) else layer.weight.dtype)
    return model.requires_grad_(False).eval()
