"""Draws the decoder of a checkpoint: blocks, shapes, parameters, bytes.

    python -m checkpoint.show DIR

Requires: model.py.
Next: families.py.
"""

import re
import sys
from dataclasses import fields

import torch

from families import ModelConfig, Switches, model_config, read_config_json
from model import CausalLM


def draw(config: ModelConfig) -> str:
    """The decoder as a short text, under the checkpoint's own names.

    Built on the meta device: no weights are read.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    # with and without experts: the layers of each kind
    kinds = {}
    for layer, sparse in enumerate(config.sparse):
        kinds.setdefault(sparse, []).append(layer)
    lines = [
        f"{config.model_type}: {config.num_hidden_layers} blocks, hidden_size {config.hidden_size}",
        "",
        f"  {'tensor':68} {'shape':>22} {'parameters':>15}",
    ]
    lines += table(config, [("model.embed_tokens", model.model.embed_tokens)])
    for sparse, layers in kinds.items():
        lines.append(
            f"  {len(layers)} block{'s' if len(layers) > 1 else ''} ({ranges(layers)}) such as"
        )
        parts = model.model.layers[layers[0]].named_modules(prefix=f"model.layers.{layers[0]}")
        lines += table(
            config,
            [
                (name, module)
                for name, module in parts
                if any(True for _ in module.parameters(recurse=False)) and not later_expert(name)
            ],
        )
    lines += table(config, [("model.norm", model.model.norm), ("lm_head", model.lm_head)])
    count = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (config.num_experts - config.num_experts_per_tok) // max(config.num_experts, 1)
    lines += [
        "",
        f"  {count:,} parameters"
        + (f", {count - idle:,} of them used by a token" if idle else "")
        + f": {bytes_in_words(2 * count)} in 16 bit, {bytes_in_words(4 * count)} in float32",
    ]
    lines += [f"  {name:11}{text}" for name, text in features(config).items()]
    return "\n".join([*lines, *(f"  note       {note}" for note in config.notes)])


def table(config, modules) -> list[str]:
    """A line for each (name, module): its name in the files, its shape, its parameters."""
    lines = []
    for name, module in modules:
        weight = getattr(module, "weight", None)
        if weight is None:
            lines.append(f"  {config.stored_name(name):68} {'no weights':>22}")
            continue
        shape = " x ".join(map(str, weight.shape)) + (
            " + bias" if getattr(module, "bias", None) is not None else ""
        )
        count = f"{sum(p.numel() for p in module.parameters()):>15,}"
        if ".experts.0." in name:
            count += f" x {config.num_experts} experts"
        if name == "lm_head" and config.tie_word_embeddings:
            count = "the embedding's"
        lines.append(f"  {config.stored_name(name):68} {shape:>22} {count}")
    return lines


def features(config) -> dict[str, str]:
    """What the decoder does, in words: heads, positions, what each token sees, and the switches
    against Llama's.
    """
    rope = {"theta": f"{config.rope_theta:g}"} | {
        key: str(value)[:30]
        for key, value in config.rope.items()
        if key != "rope_type" and config.rope["rope_type"] != "default"
    }
    positions = (
        "ALiBi, no rotation"
        if config.alibi
        else f"rope {config.rope['rope_type']}, "
        + ", ".join(f"{key} {value}" for key, value in rope.items())
    )
    if not all(config.use_rope):
        fixed = [i for i, rotated in enumerate(config.use_rope) if not rotated]
        positions += f"; blocks {ranges(fixed)} without rotation"
    sees = []
    for what, per_layer in (("a window of", config.windows), ("chunks of", config.chunks)):
        if found := [layer for layer, tokens in enumerate(per_layer) if tokens]:
            sees.append(f"{what} {per_layer[found[0]]} tokens in blocks {ranges(found)}")
    on = [
        spec.name if value is True else f"{spec.name} {short(value)}"
        for spec in fields(Switches)
        if (value := getattr(config, spec.name)) != spec.default
    ]
    off = [spec.name for spec in fields(Switches) if getattr(config, spec.name) == spec.default]
    return {
        "attention": f"{config.num_attention_heads} heads on {config.num_key_value_heads} "
                     "key/value heads, "
        f"head_dim {config.head_dim}",
        "positions": positions,
        "sees": "; ".join(sees) or "all earlier tokens",
        "on": ", ".join(on) or "nothing: this is plain Llama",
        "off": ", ".join(off) + " (as in Llama)",
    }


def later_expert(name):
    """Is this a part of an expert other than the first?"""
    return re.search(r"\.experts\.[1-9]", name) is not None


def short(value):
    """A number with four digits, whatever else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else value


def bytes_in_words(count):
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024


def ranges(numbers):
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m checkpoint.show DIR   (a checkpoint folder with a config.json)")
    try:
        print(draw(model_config(read_config_json(sys.argv[1]), f"{sys.argv[1]}/config.json")))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
