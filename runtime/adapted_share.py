"""Which matrices have adapters, and their share of the model's parameters.

    adapts                    q_proj, k_proj, v_proj, o_proj of all blocks: 2.1% of the base
      note: 94.3% of the base's parameters are in experts, which lora_target leaves out: …

In a mixture of experts lora_target: all adapts attention and dense MLPs, as in LLaMA-Factory. That
may be a small part of the model.

Requires: lora.py, checkpoint/shards.py.
Next: runtime/setup.py.
"""
from lora import lora_layers
from checkpoint.load import count_parameters
from checkpoint.shards import full_size
from model import CausalLM


def adapted_in_words(model: CausalLM) -> str:
    """The kinds of adapted matrices, in how many blocks, and their share of the base's parameters.

    model: with adapters attached, may be on the meta device. Returns "" without adapters.
    """
    layers = lora_layers(model)
    if not layers:
        return ""
    blocks_of = {}                                      # {kind of matrix: block numbers}
    for name in layers:
        stored = model.config.stored_name(name)
        kind = stored.rpartition(".")[2]
        if ".mlp.experts." in name:
            kind += " (experts)"
        block = name.split(".")[2] if name.startswith("model.layers.") else ""
        blocks_of.setdefault(kind, set()).add(block)
    groups = {}                                         # {set of blocks: kinds in all of them}
    for kind, blocks in blocks_of.items():
        groups.setdefault(frozenset(blocks), []).append(kind)
    count = model.config.num_hidden_layers
    parts = []
    for blocks, kinds in groups.items():
        where = f" of {len(blocks)} of {count} blocks" if len(blocks) < count else " of all blocks"
        parts.append(", ".join(kinds) + (where if "" not in blocks else ""))
    return f"{'; '.join(parts)}: {in_percent(adapted_size(model), base_size(model))} of the base"


def note_on_experts(model: CausalLM) -> list[str]:
    """[a note with the experts' share of the parameters] if no expert has an adapter; else []."""
    layers = lora_layers(model)
    if not layers or not any(model.config.sparse):
        return []
    if any(".mlp.experts." in name for name in layers):
        return []
    experts = sum(full_size(weight) for name, weight in weights_of(model).items()
                  if ".mlp.experts." in name)
    return [f"{in_percent(experts, base_size(model))} of the base's parameters are in experts, "
            "which lora_target leaves out: lora_target: all,experts adapts them, too"]


def weights_of(model: CausalLM) -> dict:
    """{name: weight} of the base, without the weights of adapters."""
    found = {}
    for name, module in model.named_modules():
        is_adapter = ".lora_" in f".{name}" or name.endswith(".base_layer")
        weight = getattr(module, "weight", None)
        if weight is not None and not is_adapter:
            found[name] = weight
    return found


def adapted_size(model: CausalLM) -> int:
    """Parameters of the matrices that have adapters."""
    return sum(full_size(layer.weight) for layer in lora_layers(model).values())


def base_size(model: CausalLM) -> int:
    """Parameters of the model without its adapters."""
    added = sum(full_size(p) for name, p in model.named_parameters() if ".lora_" in name
                or name.endswith((".oft_R.weight")))
    return count_parameters(model) - added


def in_percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g}%"
