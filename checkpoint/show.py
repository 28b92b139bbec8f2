"""Draw the decoder of a checkpoint: blocks, shapes, parameters, bytes.

    python -m checkpoint.show DIR

Requires: model.py.
Next: families.py.
"""
import re
import sys
from dataclasses import fields

# first: a missing package ends in a sentence
from errors import bytes_in_words, run_script

import torch

from checkpoint.read_config import read_model_config
from families import ModelConfig, Switches
from model import CausalLM


def draw(config: ModelConfig) -> str:
    """The decoder as a page of text, under the checkpoint's own names. No weights are read."""
    with torch.device("meta"):
        model = CausalLM(config)
    lines = [
        f"{config.model_type}: {config.num_hidden_layers} blocks, hidden_size {config.hidden_size}",
        "",
        f"  {'tensor':68} {'shape':>22} {'parameters':>15}",
        tensor_line(config, "model.embed_tokens", model.model.embed_tokens),
    ]
    for layers in similar_layers(config):
        noun = "blocks" if len(layers) > 1 else "block"
        lines.append(f"  {len(layers)} {noun} ({ranges(layers)}) such as")
        name = f"model.layers.{layers[0]}"
        for part, module in model.model.layers[layers[0]].named_modules(prefix=name):
            if list(module.parameters(recurse=False)) and not is_later_expert(part):
                lines.append(tensor_line(config, part, module))
    lines.append(tensor_line(config, "model.norm", model.model.norm))
    lines.append(tensor_line(config, "lm_head", model.lm_head))

    lines += ["", parameter_line(config, model)]
    lines += [f"  {name:11}{text}" for name, text in features(config).items()]
    lines += [f"  note       {note}" for note in config.notes]
    return "\n".join(lines)


def similar_layers(config: ModelConfig) -> list[list[int]]:
    """The numbers of the layers that are alike: of one mixer, with experts or without."""
    kinds = {}
    for layer, kind in enumerate(zip(config.mixers, config.sparse)):
        kinds.setdefault(kind, []).append(layer)
    return list(kinds.values())


def tensor_line(config: ModelConfig, name: str, module) -> str:
    """The line of a module: its name in the files, its shape, its parameters."""
    stored = config.stored_name(name)
    weight = getattr(module, "weight", None)
    if weight is None:
        return f"  {stored:68} {'no weights':>22}"
    shape = " x ".join(map(str, weight.shape))
    if getattr(module, "bias", None) is not None:
        shape += " + bias"
    count = f"{sum(p.numel() for p in module.parameters()):>15,}"
    if ".experts.0." in name:
        count += f" x {config.num_experts} experts"
    if name == "lm_head" and config.tie_word_embeddings:
        count = "the embedding's"
    return f"  {stored:68} {shape:>22} {count}"


def parameter_line(config: ModelConfig, model: CausalLM) -> str:
    """The number of parameters, and their size in 16 and 32 bits."""
    count = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (config.num_experts - config.num_experts_per_tok) // max(config.num_experts, 1)
    used = f", {count - idle:,} of them used by a token" if idle else ""
    return (f"  {count:,} parameters{used}: {bytes_in_words(2 * count)} in 16 bits, "
            f"{bytes_in_words(4 * count)} in float32")


def features(config: ModelConfig) -> dict[str, str]:
    """What the decoder does, in words: heads, positions, visible tokens, differences from Llama."""
    visible = []
    for what, per_layer in (("a window of", config.windows), ("chunks of", config.chunks)):
        layers = [layer for layer, tokens in enumerate(per_layer) if tokens]
        if layers:
            visible.append(f"{what} {per_layer[layers[0]]} tokens in blocks {ranges(layers)}")
    differs, same = [], []
    for spec in fields(Switches):
        value = getattr(config, spec.name)
        if value == spec.default:
            same.append(spec.name)
        else:
            differs.append(spec.name if value is True else f"{spec.name} {four_digits(value)}")
    return {
        "attention": f"{config.num_attention_heads} heads on {config.num_key_value_heads} "
                     f"key/value heads, head_dim {config.head_dim}",
        "positions": positions_in_words(config),
        "sees": "; ".join(visible) or "all earlier tokens",
        "differs": ", ".join(differs) or "nothing: this is plain Llama",
        "off": f"{', '.join(same)} (as in Llama)",
    }


def positions_in_words(config: ModelConfig) -> str:
    """How positions enter: ALiBi, or the rotation and its parameters."""
    if config.alibi:
        text = "ALiBi, no rotation"
    else:
        rope_type = config.rope["rope_type"]
        parameters = {"theta": f"{config.rope_theta:g}"}
        if rope_type != "default":
            more = {key: value for key, value in config.rope.items() if key != "rope_type"}
            parameters |= {key: str(value)[:30] for key, value in more.items()}
        listed = ", ".join(f"{key} {value}" for key, value in parameters.items())
        text = f"rope {rope_type}, {listed}"
    not_rotated = [layer for layer, rotated in enumerate(config.use_rope) if not rotated]
    if not_rotated:
        text += f"; blocks {ranges(not_rotated)} without rotation"
    return text


def is_later_expert(name: str) -> bool:
    """Whether this module belongs to an expert other than the first."""
    return re.search(r"\.experts\.[1-9]", name) is not None


def four_digits(value):
    """A float with four significant digits; any other value unchanged."""
    return f"{value:.4g}" if isinstance(value, float) else value


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)


def main(argv: list[str]):
    if len(argv) != 1:
        sys.exit("usage: python -m checkpoint.show DIR   (a checkpoint folder with a config.json)")
    folder = argv[0]
    print(draw(read_model_config(folder)))


if __name__ == "__main__":
    run_script(main)
