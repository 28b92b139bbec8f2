"""What a training left, to be asked and measured: which base, which adapters, which chat format, which dtype.

chat.py and eval.py take the yaml of a training as it is; this says what it means after the training.

Read before: checkpoint.py. Read after: chat.py, eval.py.
"""
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import DTYPES, checkpoints_in, find_checkpoint, folded_under, read_adapter_config, warn_of_folded
from templates import Settings, stored_template
from tokenizer import read_json


def find_weights(config) -> tuple[Path, list[Path], tuple[str, str]]:
    """(base folder, adapter folders, remarks on the two): what is named, else what the training of this yaml left."""
    full, output = config.finetuning_type != "lora", Path(config.output_dir or "")
    trained = config.output_dir and (output / ("config.json" if full else "adapter_config.json")).is_file()
    if full and trained:
        return output, [], (f" (finetuning_type: {config.finetuning_type}; the output_dir of this config)", "")
    base = find_checkpoint(config.model_name_or_path, config.model_revision, config.cache_dir)
    named = [find_checkpoint(name, cache_dir=config.cache_dir) for name in config.adapter_name_or_path or []]
    result = [*folded_under(output), str(output)] if trained else []
    if trained and not named:
        return base, [find_checkpoint(name) for name in result], ("", " (the output_dir of this config)")
    if trained and output.resolve() not in [folder.resolve() for folder in named]:
        other = f" (as named; output_dir holds another one: adapter_name_or_path={','.join(result)})"
        return base, named, ("", other)
    if named or not config.output_dir:
        return base, named, ("", "")
    key, halfway = ("model_name_or_path" if full else "adapter_name_or_path"), checkpoints_in(output, resumable=False)
    hint = f"; its newest checkpoint: {key}={halfway[-1]}" if halfway else ""
    return base, [], (f" (the base: {output} holds no finished training{hint})", "")


def other_bases(config, adapters) -> list[str]:
    """Warnings about adapters trained on a model of another name: shapes may fit, and the answers be nonsense."""
    warnings = []
    for folder in adapters:
        trained_on = read_adapter_config(folder)[1].get("base_model_name_or_path")
        if trained_on and Path(trained_on).name != Path(config.model_name_or_path).name:
            warnings.append(f"{folder} says it was trained on {trained_on}, not on {config.model_name_or_path}")
    return warnings + [warning for warning in [warn_of_folded(adapters)] if warning]


def chat_format(config, folders) -> tuple[str | dict | None, Settings, str, bool]:
    """(template or None, rendering settings, where the name comes from, force) from the config and train_config.json."""
    name, force = stored_template(folders, config.template, config.force_template)
    stored = read_json(folders[-1] / "train_config.json")
    origin = f"stored in {folders[-1]}" if name and name != config.template else ""
    known = {**vars(config), **stored, **config.given}  # said now, else said in training, else the default
    return name, Settings(**{key: known[key] for key in asdict(Settings())}), origin, force


def pick_dtype(config, raw, device) -> torch.dtype | None:
    """infer_dtype, else bf16 / fp16, else None: the checkpoint's. Raises ValueError for what the GPU lacks."""
    asked = config.infer_dtype if config.infer_dtype != "auto" else \
        "bfloat16" if config.bf16 else "float16" if config.fp16 else None
    dtype = asked or raw.get("dtype") or raw.get("torch_dtype")
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{'the config asks for' if asked else 'the checkpoint has'} bfloat16, which "
                         f"{torch.cuda.get_device_name(device)} lacks: set infer_dtype: float16 (or float32)")
    return DTYPES.get(asked)


@contextmanager
def explained_out_of_memory(device):
    """Turn torch's error for a full GPU into a sentence."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(device))
        raise ValueError(f"the GPU's memory is full ({free:.1f} of {total:.1f} GiB free): close what else uses it, "
                         "take a shorter conversation or a smaller dtype (infer_dtype), or set use_cpu: true") from None
