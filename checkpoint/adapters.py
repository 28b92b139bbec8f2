"""LoRA adapters in PEFT's format: reading, writing, naming.

Requires: lora.py, checkpoint/files.py.
Next: merge.py.
"""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from checkpoint.files import new_folder, open_tensors, save_tensors, write_json
from checkpoint.load import NEUTRAL, OF_ADAPTERS, PLAIN_STARTS, PREFIX, _mismatch, load_model
from lora import (
    LoRAConfig,
    LoRALinear,
    LoRAStacked,
    attach_lora,
    find_targets,
    is_quantized,
    lora_layers,
    merge_adapters,
)
from methods.lora_variants import DoRALinear, remove_adapter, variant_of
from methods.quant import QuantFormat
from model import CausalLM
from text.tokenizer import read_json


def read_adapter_config(folder) -> tuple[LoRAConfig, dict]:
    """The LoRAConfig of an adapter folder, and all its raw fields.

    Raises for what is not an adapter we can honour.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: adapter_name_or_path must be a folder with adapter_config.json "
            "and adapter_model.safetensors"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not the fields of an adapter")
    if raw.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{path}: peft_type {raw['peft_type']} is not supported, only LORA")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias {raw['bias']!r} is not supported, only 'none'")
    begun = raw.get("init_lora_weights", True)
    if begun not in PLAIN_STARTS and not re.fullmatch(r"pissa(_niter_\d+)?", str(begun)):
        raise ValueError(
            f"{path}: init_lora_weights {begun!r} changed the base weights before "
            "training, so the adapter does not fit the base as published. Convert it to a plain "
            "LoRA with "
            "peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = LoRAConfig.__dataclass_fields__
    odd = {
        key: value
        for key, value in raw.items()
        if key not in known
        and key not in NEUTRAL
        and value is not False
        and value not in (None, "", [], {})
        and key not in ("fan_in_fan_out", "target_parameters")
    }
    if odd:
        raise ValueError(
            f"{path}: {', '.join(f'{k}: {v}' for k, v in odd.items())} is not honoured here, and "
            "would "
            "change what the adapter computes"
        )
    config = LoRAConfig(**{key: raw[key] for key in known if raw.get(key) is not None})
    if raw.get("target_parameters") and raw.get("target_modules") is None:
        config.target_modules = []
    if not config.pissa:
        config.init_lora_weights = True
    return config, raw


def pissa_start(folder, config: LoRAConfig) -> Path | None:
    """The adapter that a PiSSA adapter began as, which its base weights lack: `pissa_init` in its
    folder or beside it.

    None where it can be found anew, as the exact principal parts of the base. Raises
    FileNotFoundError where it cannot."""
    for start in (Path(folder) / "pissa_init", Path(folder).resolve().parent / "pissa_init"):
        if (start / "adapter_model.safetensors").is_file():
            return start
    if config.init_lora_weights == "pissa":
        return None
    raise FileNotFoundError(
        f"{folder} was begun with {config.init_lora_weights}, parts of the base that were found "
        "with random numbers, and nobody can find the same again: put its folder pissa_init into "
        "it, or take the adapter in pissa_converted (pissa_convert: true writes it)"
    )


def load_adapter(model: CausalLM, folder, dropout: float | None = None, device=None) -> LoRAConfig:
    """Attach the adapter of a folder to the model, trainable.

    Strict: every tensor is used, none is missing. dropout: instead of the adapter's own (in eval
    mode it is off anyway). device: of what is trained, if not that of the weights.
    """
    config, raw = read_adapter_config(folder)
    if dropout is not None:
        config.lora_dropout = dropout
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        has_pickle = path.with_suffix(".bin").is_file()
        hint = "; adapter_model.bin is a pickle and is not read" if has_pickle else ""
        raise FileNotFoundError(f"{path} is missing{hint}")
    start = pissa_start(folder, config) if config.pissa else None
    with open_tensors(path) as tensors:
        if start:
            load_adapter(model, start, config.lora_dropout, device)
            for layer in lora_layers(model).values():
                remove_adapter(layer)
        else:
            attach_as_in(folder, model, config, raw, tensors.keys(), device)
        copy_adapter(model, tensors, path, config, raw)
    return config


def attach_as_in(folder, model: CausalLM, config: LoRAConfig, raw: dict, keys, device):
    """Attach fresh adapters where those of a folder are. Raises ValueError for another model."""
    try:
        attach_lora(model, config, stored_name=model.config.stored_name,
                    targets=_targets_of(model, config, raw, keys), device=device,
                    **variant_of(config))
    except ValueError as error:
        base = raw.get("base_model_name_or_path")
        raise ValueError(f"{folder} was made for another model ({base}): {error}") from None


@torch.no_grad()
def copy_adapter(model: CausalLM, tensors, path: Path, config: LoRAConfig, raw: dict):
    """Copy the tensors of an adapter file into the model's adapters, which must be the same."""
    expected = adapter_tensors(model)
    names = set(tensors.keys()) - copies_of_base(model, tensors)
    missing = sorted(expected.keys() - names)
    unused = sorted(names - expected.keys())
    if missing or unused:
        message = _mismatch(path, missing, unused)
        raise ValueError(message.replace("that config.json describes",
                                         "this model and adapter_config.json ask for"))
    swapped = swapped_stacks(model, tensors, raw)
    if swapped:
        print(f"note      {path}: A and B of its stacked experts have each other's place (PEFT "
              "0.20 and newer); they are put back")
    for name, parameter in expected.items():
        if name in swapped:
            tensor = swapped_back(tensors, name, swapped[name])
        else:
            tensor = tensors.get_tensor(name)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model and "
                f"adapter_config.json make it {list(parameter.shape)}. Its base is "
                f"{raw.get('base_model_name_or_path')!r}, r is {config.r}: is this another model, "
                "or another rank?")
        parameter.copy_(tensor)


def _targets_of(model, config, raw, keys) -> list[str]:
    """Full names of the layers that an adapter file with these keys is for.

    The routed experts are what the names in adapter_config.json leave open: `gate_proj` means those
    of all experts to transformers 4, where they are linear layers, and that of the shared expert
    alone to transformers 5, where they are stacks; stacks are what target_parameters names."""
    called, one_by_one = (
        model.config.stored_name,
        any(re.search(r"\.experts\.\d", key) for key in keys),
    )
    if (named := raw.get("target_parameters") or []) and not model.config.stacked_experts:
        raise ValueError(
            f"target_parameters {', '.join(named)} are stacks of experts, and this checkpoint has "
            "its "
            "experts one by one. Merge it with peft, or train one here: lora_target: all,experts"
        )
    stacks = find_targets(model, named, called)
    return stacks + [
        name
        for name in find_targets(model, config.target_modules, called)
        if ".experts." not in name
        or one_by_one
        and isinstance(model.get_submodule(name), nn.Linear)
    ]


def copies_of_base(model: CausalLM, tensors) -> set[str]:
    """Names of the frozen weights that PEFT stores beside the adapter of a head, where they are the
    base's own.
    """
    layers = {f"{name}.base_layer.weight": layer for layer, name in peft_names(model).items()}
    found = set()
    for name in layers.keys() & set(tensors.keys()):
        weight = model.get_submodule(layers[name]).weight
        if list(weight.shape) == tensors.get_slice(name).get_shape() and (
            weight.is_meta or torch.equal(tensors.get_tensor(name).to(weight), weight)
        ):
            found.add(name)
    return found


def swapped_stacks(model: CausalLM, tensors, raw: dict) -> dict[str, int]:
    """{name of an A or B: number of experts} for stacks whose A and B have each other's place in
    the file, or {}.

    PEFT writes them so from 0.20 on, where it takes the matrices of a stack as (out, in); their
    product is the same. The shapes tell; where all matrices are square, only the version does."""
    names, plain, swapped, found = peft_names(model), True, True, {}
    for layer, module in lora_layers(model).items():
        if isinstance(module, LoRAStacked):
            keys = [f"{names[layer]}.{part}.weight" for part in ("lora_A", "lora_B")]
            held = [tuple(tensors.get_slice(key).get_shape()) for key in keys]
            A, B = module.lora_A.weight, module.lora_B.weight
            plain, swapped = (
                plain and held == [A.shape, B.shape],
                swapped and held == [B.T.shape, A.T.shape],
            )
            found.update(dict.fromkeys(keys, len(module.weight)))
    newer = re.match(r"0\.[2-9]\d|[1-9]", raw.get("peft_version") or "")
    return found if swapped and (newer or not plain) else {}


def swapped_back(tensors, name: str, experts: int):
    """A (E*r, in) or B (out, r*E) of a stack, from a file that has them in each other's place."""
    stem, part = name.removesuffix(".weight").rsplit(".", 1)
    if part == "lora_A":
        # (in, r*E)
        held = tensors.get_tensor(f"{stem}.lora_B.weight")
        return held.view(len(held), -1, experts).permute(2, 1, 0).flatten(0, 1)
    # (E*r, out)
    held = tensors.get_tensor(f"{stem}.lora_A.weight")
    return held.view(experts, -1, held.shape[1]).permute(2, 1, 0).flatten(1)


def peft_names(model: CausalLM) -> dict[str, str]:
    """{adapted layer: what PEFT calls it}, under the checkpoint's own names.

    The stacks of a block are parameters of one module to PEFT, which wraps that module once for
    each of them: experts.base_layer is the first of two, experts the second."""
    called, found, outside = model.config.stored_name, {}, Counter()
    for name, layer in reversed(lora_layers(model).items()):
        if isinstance(layer, LoRAStacked):
            block = name.rpartition(".")[0]
            found[name] = PREFIX + called(block) + ".base_layer" * outside[block]
            outside[block] += 1
        else:
            found[name] = PREFIX + called(name)
    return found


def adapter_tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    """{name as PEFT writes it: parameter} of the adapters, and of modules trained whole."""
    found, names = {}, peft_names(model)
    for layer, module in lora_layers(model).items():
        assert not module.weight.requires_grad, layer
        for part in ("lora_A", "lora_B"):
            found[f"{names[layer]}.{part}.weight"] = getattr(module, part).weight
        if isinstance(module, DoRALinear):
            found[f"{names[layer]}.lora_magnitude_vector"] = module.lora_magnitude_vector
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and not name.endswith(OF_ADAPTERS):
            found[PREFIX + model.config.stored_name(name)] = parameter
    return found


def save_pissa_start(model: CausalLM, folder, config: LoRAConfig, base: str):
    """Write the adapter that PiSSA began with, which the base weights lack: the folder that
    pissa_start looks for.
    """
    starts = {
        f"{name}.lora_{part}.weight": tensor
        for layer, name in peft_names(model).items()
        for part, tensor in zip("AB", lora_layers(model)[layer].removed)
    }
    with new_folder(folder) as work:
        save_adapter(
            model,
            work,
            replace(config, init_lora_weights=True),
            base,
            adapter_tensors(model) | starts,
        )


def save_converted(model: CausalLM, folder, config: LoRAConfig, base: str):
    """Write a PiSSA adapter as a plain one for the base as it was, of rank 2 r: s B A - s B0 A0 = s
    [B | -B0] [A; A0] (arXiv:2404.02948, appendix C).
    """
    tensors, layers = adapter_tensors(model), lora_layers(model)
    for layer, name in peft_names(model).items():
        A, B = layers[layer].removed
        tensors[f"{name}.lora_A.weight"] = torch.cat([tensors[f"{name}.lora_A.weight"], A])
        tensors[f"{name}.lora_B.weight"] = torch.cat([tensors[f"{name}.lora_B.weight"], -B], dim=1)
    # of alpha, that the scale is the same
    more = math.sqrt(2) if config.use_rslora else 2
    config = replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={part: 2 * r for part, r in config.rank_pattern.items()},
        alpha_pattern={part: more * alpha for part, alpha in config.alpha_pattern.items()},
    )
    with new_folder(folder) as work:
        save_adapter(model, work, config, base, tensors)


def save_adapter(
    model: CausalLM, folder, config: LoRAConfig, base: str, tensors: dict | None = None
):
    """Write adapter_config.json and adapter_model.safetensors; `base` is the base model as the user
    named it. tensors: others than the model's, under the same names.
    """
    folder = Path(folder)
    save_tensors(
        folder / "adapter_model.safetensors", adapter_tensors(model) if tensors is None else tensors
    )
    targets, stacks = peft_targets(model, config.target_modules)
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": config.init_lora_weights,
            "use_dora": config.use_dora,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            # PEFT opens no adapter of stacks that has dropout
            "lora_dropout": 0.0 if stacks else config.lora_dropout,
            "use_rslora": config.use_rslora,
            "target_modules": targets,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
            "modules_to_save": config.modules_to_save or None,
        }
        | ({"target_parameters": stacks} if stacks else {}),
    )


def peft_targets(model: CausalLM, wish) -> tuple[list | str, list]:
    """target_modules and target_parameters that make PEFT adapt the same layers: the user's own,
    where PEFT reads them alike (it knows no blocks, no `all`), else last name parts, else full
    names.
    """
    called, layers = model.config.stored_name, lora_layers(model)
    stacks = [
        called(name + ".weight") for name, layer in layers.items() if isinstance(layer, LoRAStacked)
    ]
    adapted = {called(name) for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    if (
        isinstance(wish, list)
        and adapted == set(wish)
        or (isinstance(wish, str) and wish not in ("all", "all-linear") and not stacks)
    ):
        # full names; a regular expression
        return wish, stacks
    names = [
        called(name)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, LoRALinear))
    ]
    last = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    # a short name may also be that of a layer which reads images
    for targets in () if model.config.skips else (wish if isinstance(wish, list) else [], last):
        meant = [
            {name for name in names if f".{name}".endswith(f".{target}")} for target in targets
        ]
        if all(meant) and adapted == set().union(*meant):
            return targets, stacks
    return sorted(adapted), stacks


def folded_under(adapter) -> list[str]:
    """The adapters that training folded into the base before this one, as its train_config.json
    names them.
    """
    said = read_json(Path(adapter) / "train_config.json")
    names = said.get("adapter_name_or_path") or []
    return names if said.get("create_new_adapter") else names[:-1]


def warn_of_folded(adapters: list) -> str:
    """A warning when an adapter stands without those it was trained on top of (see folded_under);
    or "".
    """
    for place, adapter in enumerate(adapters):
        before = [Path(other).resolve() for other in adapters[:place]]
        if missing := [
            name for name in folded_under(adapter) if Path(name).resolve() not in before
        ]:
            return (
                f"{adapter} was trained with {' and '.join(missing)} folded into the base. Unless "
                "this base has it "
                f"already: adapter_name_or_path={','.join([*missing, str(adapter)])}"
            )
    return ""


def load_with_adapters(
    folder,
    adapters: list,
    dtype=None,
    device="cpu",
    fold_last: bool = False,
    form: QuantFormat | None = None,
) -> CausalLM:
    """Base model with adapters, for inference: all but the last are folded in, the last stays
    beside the weights.

    A and B take the base's dtype: in float32, which the optimizer needs, each decoding step would
    convert them anew; nor would it find the lengths of DoRA's rows anew.
    fold_last: the last one is folded in too, which makes the very weights that merge.py writes, and
    saves two products for each layer and token; but for matrices in 4 or 8 bits, which would take
    16 bits then. form: see load_model."""
    model = load_model(folder, dtype, device, form=form)
    for index, adapter in enumerate(adapters):
        load_adapter(model, adapter)
        if index < len(adapters) - 1 or fold_last:
            merge_adapters(model, quantized=index < len(adapters) - 1)
    computed = model.model.embed_tokens.weight.dtype
    for layer in lora_layers(model).values():
        if isinstance(layer, DoRALinear):
            layer.fix_gain()
        layer.to(computed if is_quantized(layer.base_layer) else layer.weight.dtype)
    return model.requires_grad_(False).eval()
