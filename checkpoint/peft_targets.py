"""What an adapter tells PEFT: the fields of adapter_config.json that say which layers it adapts.

PEFT adapts the modules of transformers' model, which are not always those of the files. Routed
experts that the files hold one by one are stacks of matrices there, so PEFT 0.21 reads target names
and ranks its own way; peft_fields writes them so that it computes what was trained, and
why_peft_differs says where it cannot. Older versions of transformers, whose experts are modules,
read the same fields.

Requires: lora.py.
Next: checkpoint/adapters.py.
Measured: peft 0.21.2 with transformers 5.24 (tests/test_peft_targets.py).
"""
import math
import re

from torch import nn

from lora import AdaptedLinear, AdapterConfig, LoRAConfig, LoRAStacked, lora_layers
from families import ModelConfig
from model import CausalLM

# families whose experts are separate in the files and stacks in transformers 5: {model_type: names
# of the experts' gate and up, and of their down}
SEPARATE_EXPERTS = {
    **dict.fromkeys(("mixtral", "minimax_m2", "lfm2_moe"), ({"w1", "w3"}, "w2")),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "glm4_moe",
                     "glm4_moe_lite", "deepseek_v2", "deepseek_v3", "qwen3_5_moe_text"),
                    ({"gate_proj", "up_proj"}, "down_proj")),
}
# of them those whose target_modules PEFT 0.21 takes for the stacks by itself, wherever they stand
TAKES_NAMES_FOR_STACKS = ("mixtral", "minimax_m2", "qwen3_moe", "qwen3_next", "glm4_moe",
                          "glm4_moe_lite", "deepseek_v2", "deepseek_v3")
ROUTERS = {"qwen2_moe": "mlp.gate", "qwen3_5_moe_text": "mlp.gate",     # no linear layers in PEFT
           "qwen3_5_moe": "mlp.gate", "gpt_oss": "mlp.router"}
# families whose stacks PEFT 0.21 takes as (in, out), as they are stored; it takes stacks of other
# families as (out, in), and swaps A and B
TAKEN_AS_STORED = ("gpt_oss",)
# families whose adapters of separate experts PEFT 0.21 does not turn into those of stacks
NOT_STACKED_BY_PEFT = ("qwen3_5_moe", "nemotron_h")
# names of layers that PEFT 0.21 refuses to adapt, since kernels for CUDA would read their weight
# past the adapter; 0.18 adapts them
REFUSED_BY_PEFT = {"nemotron_h": "out_proj"}
STACKED_GATE_UP = r".*\.experts\.gate_up_proj"
STACKS_SINCE = "0.21.0"     # the version whose layout of stacks is written


def peft_fields(model: CausalLM, config: AdapterConfig) -> dict:
    """The fields of adapter_config.json that differ between adapters."""
    if config.finetuning_type == "oft":
        from methods.oft import peft_fields_of_oft          # only where it is asked for

        return {"target_modules": peft_modules(model, config.target_modules),
                **peft_fields_of_oft(config)}
    fields = {
        "init_lora_weights": config.init_lora_weights,
        "use_dora": config.use_dora,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
    }
    return fields | layer_fields(model, config)


def layer_fields(model: CausalLM, config: LoRAConfig) -> dict:
    """target_modules and all other fields of adapter_config.json that depend on the layers."""
    stored_name = model.config.stored_name
    layers = {stored_name(name): layer for name, layer in lora_layers(model).items()}
    modules = peft_modules(model, config.target_modules)
    parameters = [stored_name(f"{name}.weight") for name, layer in lora_layers(model).items()
                  if isinstance(layer, LoRAStacked)]
    fields = {
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "lora_dropout": config.lora_dropout,
    }
    if parameters:
        fields["peft_version"] = STACKS_SINCE
    names = {stored_name(name) for name, layer in lora_layers(model).items()
             if isinstance(layer, AdaptedLinear)}
    if by_weight := weights_to_name(model, names):
        if isinstance(modules, str) or names_any(modules, by_weight):
            modules = sorted(names - by_weight)
        parameters += sorted(f"{name}.weight" for name in by_weight)
    if model.config.model_type in SEPARATE_EXPERTS:
        parameters += stacks_to_name(model, names)
        if any(is_expert(name) for name in names):
            fields |= fused_patterns(config, fields)
    if parameters:
        fields["target_parameters"] = parameters
    if parameters or any(is_expert(name) for name in layers):
        fields["lora_dropout"] = 0.0            # PEFT opens no adapter of stacks that has dropout
    return {"target_modules": modules, **fields}


def peft_exchanges_stacks(model_config: ModelConfig) -> bool:
    """Whether PEFT, from 0.20 on, swaps A and B of this model's stacks of experts."""
    as_stored = model_config.model_type in TAKEN_AS_STORED
    return model_config.stacked_experts == "in, out" and not as_stored


def is_expert(name: str) -> bool:
    """Whether this is a matrix of one routed expert."""
    return re.search(r"\.experts\.\d", name) is not None


def names_any(modules: list, names: set[str]) -> bool:
    """Whether an entry of target_modules matches one of the names."""
    return any(f".{name}".endswith(f".{entry}") for entry in modules for name in names)


def weights_to_name(model: CausalLM, names: set[str]) -> set[str]:
    """The adapted layers that PEFT 0.21 finds under the name of their weight alone.

    Where target_modules `gate_proj` means the experts', the dense MLP of another layer is lost; and
    the routers of Qwen 2 and GPT-OSS are no linear layers.
    """
    if model.config.model_type not in TAKES_NAMES_FOR_STACKS:
        return {name for name in names if name.endswith(ROUTERS.get(model.config.model_type, ()))}
    renamed = SEPARATE_EXPERTS[model.config.model_type]
    last_parts = renamed[0] | {renamed[1]}
    return {name for name in names if name.rpartition(".")[2] in last_parts and not is_expert(name)}


def stacks_to_name(model: CausalLM, names: set[str]) -> list[str]:
    """The stacks of transformers 5 that hold the adapted experts, where PEFT is to be told."""
    if model.config.model_type in TAKES_NAMES_FOR_STACKS:
        return []
    gate_up, down = SEPARATE_EXPERTS[model.config.model_type]
    found = set()
    for name in filter(is_expert, names):
        block = re.sub(r"\.experts\..*", ".experts", name)
        found.add(f"{block}.{'down_proj' if name.endswith(down) else 'gate_up_proj'}")
    return sorted(found)


def fused_patterns(config: LoRAConfig, fields: dict) -> dict:
    """rank_pattern and alpha_pattern for gate and up as one matrix: twice the rank, same scale."""
    growth = math.sqrt(2) if config.use_rslora else 2
    ranks = {STACKED_GATE_UP: 2 * config.r}                 # first: PEFT takes the first match
    alphas = {STACKED_GATE_UP: growth * config.lora_alpha}
    return {"rank_pattern": ranks | {name: r for name, r in fields["rank_pattern"].items()
                                     if name != STACKED_GATE_UP},
            "alpha_pattern": alphas | {name: a for name, a in fields["alpha_pattern"].items()
                                       if name != STACKED_GATE_UP}}


def peft_modules(model: CausalLM, requested) -> list | str:
    """target_modules for the adapted linear layers.

    The user's own where PEFT reads them alike (it knows no blocks, and `all` as all-linear only),
    else last name parts, else full names.
    """
    stored_name = model.config.stored_name
    layers = lora_layers(model)
    adapted = {stored_name(name) for name, layer in layers.items()
               if isinstance(layer, AdaptedLinear)}
    if isinstance(requested, list) and adapted == set(requested):               # full names
        return requested
    is_pattern = isinstance(requested, str) and requested not in ("all", "all-linear")
    if is_pattern and len(adapted) == len(layers):
        return requested

    linears = [stored_name(name) for name, module in model.named_modules()
               if isinstance(module, (nn.Linear, AdaptedLinear))]
    candidates = []
    if not model.config.skips:              # else a short name may be that of a vision layer
        candidates = [requested if isinstance(requested, list) else [],
                      sorted({name.rsplit(".", 1)[-1] for name in adapted})]
    for targets in candidates:
        matches = [{name for name in linears if f".{name}".endswith(f".{target}")}
                   for target in targets]
        if all(matches) and adapted == set().union(*matches):
            return targets
    return sorted(adapted)


def notes_on_peft(model: CausalLM, config: AdapterConfig, converted: bool) -> list[str]:
    """Sentences for the adapter's README: with what, and which folder, to load elsewhere.

    converted: whether pissa_converted is beside it.
    """
    notes = []
    if config.pissa and converted:
        notes.append("This adapter is for the base without its principal components (PiSSA). To "
                     "load it with peft or another program, take the one in `pissa_converted`, "
                     "which is for the base as published.")
    elif config.pissa:
        notes.append("This adapter is for the base without its principal components (PiSSA), "
                     "which are in `pissa_init`. Other programs cannot load it as it was trained; "
                     "`pissa_convert: true` writes an adapter that they can.")
    if differs := why_peft_differs(model, config):
        notes.append(f"{differs}.")
    elif any(isinstance(layer, LoRAStacked) for layer in lora_layers(model).values()):
        notes.append("Its stacked experts need peft 0.20 or newer.")
    return notes


def why_peft_differs(model: CausalLM, config: AdapterConfig) -> str:
    """One sentence on what PEFT 0.21 with transformers 5 does not load as trained, or ""."""
    stored_name = model.config.stored_name
    layers = {stored_name(name): layer for name, layer in lora_layers(model).items()}
    reason = ""
    refused = REFUSED_BY_PEFT.get(model.config.model_type)
    if any(name.rpartition(".")[2] == refused for name in layers):
        reason = f"it adapts no {refused} of {model.config.model_type}"
    elif any(name.endswith("feed_forward.router") for name in layers):
        reason = "peft cannot adapt the router of Llama 4"
    elif any(isinstance(layer, LoRAStacked) and ".experts." not in name
             for name, layer in layers.items()):
        reason = "it has other names for the stacks of experts than the checkpoint's files"
    elif model.config.model_type in NOT_STACKED_BY_PEFT and any(map(is_expert, layers)):
        reason = "it has stacks of experts, and here each expert has an adapter of its own"
    elif config.finetuning_type == "lora" and model.config.model_type in SEPARATE_EXPERTS:
        reason = why_stacks_differ(model, layers, config)
    if not reason:
        return ""
    return (f"peft 0.21 with transformers 5 does not load this adapter as trained: {reason}. "
            "Merge it here (python merge.py) to use it elsewhere")


def why_stacks_differ(model: CausalLM, layers: dict, config: LoRAConfig) -> str:
    """Why the adapters of separate experts are none of a stack, or ""."""
    experts = {name: layer for name, layer in layers.items() if is_expert(name)}
    through_weights = weights_to_name(model, set(layers))
    if config.use_dora and (experts or through_weights):
        return "it has no DoRA for experts"
    if len({(layer.lora_A.out_features, layer.scale) for layer in experts.values()}) > 1:
        return "the experts of a layer have different ranks"
    gate_up, down = SEPARATE_EXPERTS[model.config.model_type]
    blocks = {}
    for name in experts:
        block, _, rest = name.partition(".experts.")
        number, _, part = rest.partition(".")
        blocks.setdefault(block, {}).setdefault(part, set()).add(number)
    for parts in blocks.values():
        if any(len(numbers) < model.config.num_experts for numbers in parts.values()):
            return "some experts of a layer have adapters and others have none"
        if 0 < len(gate_up & parts.keys()) < 2 or (parts.keys() and down not in parts):
            both = " and ".join(sorted(gate_up))
            return f"it looks for adapters of experts on {down} alone, or on {both}, too"
    return ""
