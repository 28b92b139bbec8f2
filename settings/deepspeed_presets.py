"""What a DeepSpeed configuration means here: zero_stage, or fsdp.

ZeRO shards over the ranks what each of them would hold again: optimizer state (stage 1), gradients
(2), weights (3). The sums of a step are the same. Stages 1 and 2 are zero_stage here, stage 3 is
fsdp: full_shard. DeepSpeed itself is not needed.

Requires: settings/config.py.
Next: settings/load_config.py; docs/many_gpus.md.
Paper: ZeRO, arXiv:1910.02054.
"""
from __future__ import annotations

import json
import re
from pathlib import Path

from settings.config import ADAPTERS, Config, needs_whole_matrices, resizes_vocab

# LLaMA-Factory's presets, where a yaml names one that lies in LLaMA-Factory's own checkout
PRESET = re.compile(r"ds_z([0-3])(_offload|_fp8)?_config\.json")     # fp8: with offload, too
# settings that transformers fills in from the run where they are "auto": (section, key, ours)
FILLED_IN = (
    ("", "train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
    ("", "gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("", "gradient_clipping", "max_grad_norm"),
    ("bf16", "enabled", "bf16"),
    ("fp16", "enabled", "fp16"),
)
# sections that would change what is computed
NOT_HERE = ("optimizer", "scheduler", "tensor_parallel", "sparse_attention", "curriculum_learning",
            "data_efficiency", "compression_training", "progressive_layer_drop")


def apply_deepspeed(config: Config):
    """Set zero_stage or fsdp as config.deepspeed asks for it, and note what it means.

    Raises ValueError for a file that cannot be read and for settings that would change the result.
    """
    if not config.deepspeed:
        return
    name = config.deepspeed
    settings = read_settings(name, config.source)
    check_settings(config, settings)
    zero = settings.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{config.source}: deepspeed: {name}: stage {stage!r} of "
                         "zero_optimization is none of 0, 1, 2, 3")
    state_to, weights_to = (offload_device(config, zero, key)
                            for key in ("offload_optimizer", "offload_param"))
    if stage < 3:
        config.notes.append(f"deepspeed: {name} (ZeRO stage {stage}) is "
                            + apply_low_stage(config, stage, state_to))
        return
    words = ["full_shard", "offload"] if state_to or weights_to else ["full_shard"]
    if not config.fsdp:
        config.fsdp = words
    meaning = f"fsdp: {' '.join(config.fsdp)}"
    if state_to == "nvme":
        config.offload_optimizer = "nvme"
        meaning += " and offload_optimizer: nvme (in output_dir)"
    if weights_to == "nvme":
        meaning += ", with the weights in main memory"
    config.notes.append(f"deepspeed: {name} (ZeRO stage 3) is {meaning} here; with one process "
                        "fsdp changes nothing")


def offload_device(config: Config, zero: dict, key: str) -> str | None:
    """cpu, nvme or None: where a section of zero_optimization has its tensors."""
    section = zero.get(key) or {}
    device = section.get("device", "none") if isinstance(section, dict) else section
    if device not in ("none", None, "cpu", "nvme"):
        raise ValueError(f"{config.source}: deepspeed: {config.deepspeed}: device {device!r} of "
                         f"{key} is none of none, cpu, nvme")
    return None if device == "none" else device


def apply_low_stage(config: Config, stage: int, state_to: str | None) -> str:
    """Set zero_stage and offload_optimizer for stages 0 to 2; returns what they are here."""
    plain = "data parallelism here, with the same sums"
    where = ", on its device" if state_to else ""
    if stage == 0:
        return plain
    if needs_whole_matrices(config):
        return f"{plain}; this optimizer needs whole matrices, and each rank holds all its " \
               f"state{where}"
    adapters_only = config.finetuning_type in ADAPTERS and not (
        config.additional_target or resizes_vocab(config))
    if adapters_only and "zero_stage" not in config.given:
        return f"{plain}; adapters are small, and each rank holds all their optimizer " \
               f"state{where} (zero_stage: {stage} would shard it)"
    if "zero_stage" not in config.given:
        config.zero_stage = stage
    meaning = f"zero_stage: {config.zero_stage}"
    if state_to and "offload_optimizer" not in config.given:
        config.offload_optimizer = state_to
        meaning += f" and offload_optimizer: {state_to}"
        meaning += " (in output_dir)" if state_to == "nvme" else ""
    return f"{meaning} here; with one process zero_stage changes nothing"


def read_settings(name: str, source: str) -> dict:
    """The content of a DeepSpeed file; of a preset of LLaMA-Factory, by its name, what matters."""
    path = Path(name)
    preset = PRESET.fullmatch(path.name)
    if not path.is_file():
        if not preset:
            raise FileNotFoundError(
                f"{source}: deepspeed: {name}: no such file. Leave it out, or write fsdp: "
                "full_shard to split a model over several GPUs (docs/many_gpus.md)")
        offload = {"device": "cpu"} if preset[2] else None
        return {"zero_optimization": {"stage": int(preset[1]), "offload_optimizer": offload}}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: deepspeed: {name} is not JSON: {error}") from None
    sections = ("zero_optimization", "bf16", "fp16")
    if not isinstance(settings, dict) or not all(
            isinstance(settings.get(section, {}), dict) for section in sections):
        raise ValueError(f"{source}: deepspeed: {name} is no DeepSpeed configuration")
    return settings


def check_settings(config: Config, settings: dict):
    """Raises ValueError for settings that are not this run's."""
    where = f"{config.source}: deepspeed: {config.deepspeed}"
    for section in NOT_HERE:
        if settings.get(section):
            raise ValueError(f"{where}: {section} is not read here and would change the run; "
                             "leave that section out")
    for section, key, ours in FILLED_IN:
        value = (settings.get(section, {}) if section else settings).get(key, "auto")
        if value == "auto" or value == (getattr(config, ours) or 0):
            continue
        name = f"{section}.{key}" if section else key
        raise ValueError(f"{where}: {name} is {value}, and {ours} of this run is "
                         f"{getattr(config, ours)}: write \"auto\", or make them equal")
