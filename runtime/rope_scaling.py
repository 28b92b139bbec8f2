"""rope_scaling of a config: positions beyond those that the base was trained on.

    rope_scaling: yarn                  # linear, dynamic, yarn, llama3
    cutoff_len: 16384                   # of a base for 4,096 positions: factor 4

It acts as if config.json said so: here its fields are computed from key and file, and
families.read_config_json gives them from then on, to training, chat, evaluation and merging. A
full model and a merged one have them in their own config.json; chat.py, eval.py and merge.py find
those of an adapter by its train_config.json.

Requires: families.py, checkpoint/read_config.py.
Next: runtime/setup.py, runtime/finished.py.
The meaning of the key, of factor and positions, is LLaMA-Factory's; that of the fields is
transformers'.
"""
import math
from pathlib import Path

from checkpoint.read_config import change_config_json, read_config_json, read_model_config
from families import FAMILIES, Family
from text.tokenizer import read_json

FACTOR_WITHOUT_LENGTH = 2.0         # where no cutoff_len says how long the texts are


def scale_rope(kind: str | None, cutoff_len: int | None, folder: Path) -> list[str]:
    """Let config.json of `folder` be read with this rope_scaling; returns notes that say so.

    kind: None reads the file as it is. Raises ValueError where the model cannot be read so.
    """
    change_config_json(folder, {})
    if kind is None:
        return []
    fields = read_config_json(folder)
    family = FAMILIES.get(fields.get("model_type"))
    config = read_model_config(folder)
    if config.alibi or family.rope_scaling is not Family.rope_scaling:
        return [f"rope_scaling: {kind} is not applied: {fields['model_type']} has no such setting"]

    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    stored = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    trained = stored.get("original_max_position_embeddings") or config.max_position_embeddings
    if cutoff_len is not None and cutoff_len <= trained:
        return [f"rope_scaling: {kind} is not applied: cutoff_len: {cutoff_len:,} is within the "
                f"{trained:,} positions of the model"]
    factor = float(math.ceil(cutoff_len / trained)) if cutoff_len else FACTOR_WITHOUT_LENGTH
    kept = {name: stored[name] for name in ("rope_theta", "partial_rotary_factor")
            if stored.get(name) is not None}
    positions = int(trained * factor)
    change_config_json(folder, {
        "rope_scaling": None,
        key: rope_fields(kind, factor, trained) | kept,
        "max_position_embeddings": positions,
    })
    read_model_config(folder)                           # its errors name the file
    note = f"rope_scaling: {kind}, factor {factor:g}: {trained:,} -> {positions:,} positions"
    own = stored.get("rope_type") or stored.get("type") or "default"
    if own != "default":
        note += f". It takes the place of config.json's own ({own}), as in LLaMA-Factory"
    if kind == "dynamic":
        note += ". It depends on the length of a text, which fine-tuning may not suit"
    return [note]


def rope_fields(kind: str, factor: float, trained: int) -> dict:
    """The object that config.json would hold. trained: positions of the base."""
    fields = {"rope_type": kind, "factor": factor}
    if kind != "linear":
        fields["original_max_position_embeddings"] = trained
    if kind == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return fields


def other_scaling(kind: str | None, adapters: list[Path]) -> list[str]:
    """Notes on adapters that were trained with another rope_scaling than this run's."""
    notes = []
    for folder in adapters:
        theirs = read_json(folder / "train_config.json").get("rope_scaling", kind)
        if theirs != kind:
            notes.append(f"rope_scaling: {kind or 'none'} here, and {folder} was trained with "
                         f"{theirs or 'none'}")
    return notes


def scaled_fields(folder: Path) -> dict:
    """The fields that config.json of `folder` needs to be read elsewhere as here; {}: none."""
    read = read_config_json(folder)
    change = change_config_json(folder, None)
    return {name: read[name] for name in change if read.get(name) is not None}
