"""Write adapters for vLLM and SGLang, which read another layout than PEFT.

    one rank, one scale     SGLang scales every matrix by lora_alpha / r and ignores rank_pattern,
                            alpha_pattern and use_rslora: other scales are multiplied into B, and
                            smaller ranks are padded with zeros
    experts one by one      vLLM and SGLang have experts.7.gate_proj, .up_proj and .down_proj where
                            Llama 4's files, and PEFT, have stacks of all experts. GPT-OSS is not
                            changed: vLLM applies PEFT's stacks, SGLang none of its experts
    complete groups         SGLang fuses q, k and v, and gate and up: matrices without an adapter
                            get one of zeros

Requires: checkpoint/adapters.py.
Next: runtime/adapter_export.py.
Sources: the code of vLLM 0.33 and SGLang 0.5.23.
"""
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.adapter_names import PREFIX, module_name
from checkpoint.adapters import save_adapter
from checkpoint.files import save_tensors, write_json
from checkpoint.peft_targets import peft_exchanges_stacks
from checkpoint.shards import full_shape, full_tensor
from lora import AdapterConfig, LoRAStacked, expert_matrices, lora_layers, trainable
from model import CausalLM

# layers that servers fuse
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def save_served(model: CausalLM, folder, config: AdapterConfig, base: str):
    """Write adapter_config.json and adapter_model.safetensors for vLLM and SGLang.

    base: the base model as the user named it. Raises ValueError for adapters that servers do not
    support: DoRA, OFT, PiSSA, fully trained modules.
    """
    check_servable(model, config)
    stacks = any(isinstance(layer, LoRAStacked) for layer in lora_layers(model).values())
    if stacks and not peft_exchanges_stacks(model.config):
        return save_adapter(model, folder, config, base)    # GPT-OSS: vLLM reads PEFT's stacks
    pairs = served_pairs(model)
    rank = max(len(A) for A, _, _ in pairs.values())
    scale = next(iter(pairs.values()))[2]
    tensors = {}
    for name, (A, B, own_scale) in pairs.items():
        missing = rank - len(A)
        A = torch.cat([A, A.new_zeros(missing, A.shape[1])])                        # (rank, in)
        B = torch.cat([B, B.new_zeros(len(B), missing)], 1)                         # (out, rank)
        key = PREFIX + module_name(model.config.stored_name(name), model.config)
        tensors[f"{key}.lora_A.weight"] = A
        tensors[f"{key}.lora_B.weight"] = B if own_scale == scale else B * (own_scale / scale)
    modules = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
               for key in tensors if key.endswith(".lora_A.weight")]
    save_tensors(Path(folder) / "adapter_model.safetensors", tensors)
    write_json(Path(folder) / "adapter_config.json", {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "inference_mode": True,
    })


def check_servable(model: CausalLM, config: AdapterConfig):
    """Raises ValueError for an adapter other than plain LoRA, W + scale * B A."""
    kind = ""
    if config.finetuning_type != "lora":
        kind = config.finetuning_type.upper()
    elif config.use_dora:
        kind = "DoRA"
    elif config.pissa:
        kind = "PiSSA (pissa_convert: true writes a plain adapter)"
    elif any(".lora_" not in name for name in trainable(model)):
        kind = "fully trained modules (additional_target)"
    if kind:
        raise ValueError(f"adapter_prefix: served: vLLM and SGLang do not apply {kind}; merge the "
                         "adapter instead (python merge.py)")


def served_pairs(model: CausalLM) -> dict[str, tuple]:
    """{matrix: (A (r, in), B (out, r), scale)}, one per expert, with complete groups."""
    pairs = {}
    for name, layer in lora_layers(model).items():
        A, B = (full_tensor(part.weight) for part in (layer.lora_A, layer.lora_B))
        if not isinstance(layer, LoRAStacked):
            pairs[name] = A, B, layer.scale
            continue
        block, _, matrix = name.rpartition(".")
        experts = full_shape(layer.weight)[0]
        for expert in range(experts):
            low, high = expert_matrices(A, B, experts, expert)
            parts = {matrix: high}
            if matrix == "gate_up_proj":                    # gate's rows, then up's
                parts = dict(zip(("gate_proj", "up_proj"), high.chunk(2)))
            for part, rows in parts.items():
                pairs[f"{block}.{expert}.{part}"] = low.clone(), rows.contiguous(), layer.scale
    for name, pair in list(pairs.items()):
        pairs |= absent_partners(model, name, pair, pairs)
    return pairs


def absent_partners(model: CausalLM, name: str, pair: tuple, pairs: dict) -> dict[str, tuple]:
    """Zero adapters of the matrices that SGLang fuses with this one and that have none."""
    parent, _, leaf = name.rpartition(".")
    found = {}
    for group in JOINED:
        for partner in group if leaf in group else ():
            other = f"{parent}.{partner}"
            if other not in pairs and hasattr(model.get_submodule(parent), partner):
                size_out = full_shape(model.get_submodule(other).weight)[0]
                A, _, scale = pair
                found[other] = torch.zeros_like(A), A.new_zeros(size_out, len(A)), scale
    return found
