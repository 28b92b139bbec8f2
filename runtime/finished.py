"""Load what a training run produced: its base model, adapters, chat format and dtype.

chat.py and eval.py read the yaml file of a training run unchanged; the functions here decide what
each of its keys means once training is over.

Requires: checkpoint/files.py, checkpoint/adapters.py, text/tokenizer.py.
Next: chat.py, eval.py.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch

from checkpoint.adapters import folded_under, warn_of_folded
from checkpoint.files import DTYPES, find_checkpoint
from checkpoint.training_state import checkpoints_in
from runtime.device import out_of_memory
from runtime.named_folders import named_folder, named_folders
from runtime.precision import requested_format
from runtime.resize_vocab import resized_beside, trained_on
from runtime.rope_scaling import scale_rope
from settings.config import ADAPTERS, Config
from text.tokenizer import read_json

# keys of the config that change how a conversation is rendered
RENDERING_KEYS = ("enable_thinking", "preserve_thinking", "mask_history", "tool_format",
                  "default_system")
# keys of the config that decide how the base was loaded in training
QUANTIZATION_KEYS = (
    "quantization_bit", "quantization_type", "double_quantization", "bf16", "fp16", "stage")

# keys of the config that decide how answers are generated
SAMPLING_KEYS = (
    "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
ROPE_KEYS = ("rope_scaling", "cutoff_len")


def find_weights(config: Config) -> tuple[Path, list[Path], tuple[str, str]]:
    """Find the base folder and the adapter folders; the two strings are remarks about each, or "".

    From then on the base is read with the rope_scaling of the training.
    """
    base, adapters, (on_base, on_adapters) = find_folders(config)
    notes = scale_rope_as_trained(config, base, adapters)
    return base, adapters, ("; ".join([on_base, *notes] if on_base else notes), on_adapters)


def scale_rope_as_trained(config: Config, base: Path, adapters: list[Path]) -> list[str]:
    """Read the base with the rope_scaling of the last adapter's training; returns notes.

    A full model has it in its config.json. Where no training is known, the config's own key counts.
    """
    stored = stored_settings(adapters[-1] if adapters else base, ROPE_KEYS)
    if "rope_scaling" not in stored:
        return scale_rope(config.rope_scaling, config.given.get("cutoff_len"), base)
    if not adapters:
        return scale_rope(None, None, base)
    notes = scale_rope(stored["rope_scaling"], stored.get("cutoff_len"), base)
    if config.given.get("rope_scaling", stored["rope_scaling"]) != stored["rope_scaling"]:
        notes.append(f"rope_scaling: {config.rope_scaling} is not used: the adapter was trained "
                     f"with {stored['rope_scaling'] or 'none'}")
    return notes


def find_folders(config: Config) -> tuple[Path, list[Path], tuple[str, str]]:
    """The folders of find_weights, and what is to be said of each.

    Folders named in the config come first, then the finished training in its output_dir.
    """
    full = config.finetuning_type not in ADAPTERS
    output = Path(config.output_dir or "")
    result_file = "config.json" if full else "adapter_config.json"
    finished = bool(config.output_dir) and (output / result_file).is_file()
    if full and finished:
        note = f"finetuning_type: {config.finetuning_type}; the output_dir of this config"
        return output, [], (note, "")

    base = named_folder(config, "model_name_or_path")
    named = named_folders(config, "adapter_name_or_path")
    if finished:
        adapters, note = choose_adapters(named, output)
        return resized_beside(adapters) or base, adapters, ("", note)
    if named or not config.output_dir:
        return resized_beside(named) or base, named, ("", "")

    note = f"the base: {output} holds no finished training{checkpoint_hint(output, full)}"
    return base, [], (note, "")


def choose_adapters(named: list[Path], output: Path) -> tuple[list[Path], str]:
    """The adapters to load, and a remark, where output_dir holds a finished adapter."""
    trained = [*folded_under(output), str(output)]
    if not named:
        return [find_checkpoint(name) for name in trained], "the output_dir of this config"
    if output.resolve() in [folder.resolve() for folder in named]:
        return named, ""
    other = ",".join(trained)
    note = f"as named; output_dir holds another adapter: adapter_name_or_path={other}"
    return named, note


def checkpoint_hint(output: Path, full: bool) -> str:
    """The setting that loads the newest checkpoint of an unfinished run, or ""."""
    checkpoints = checkpoints_in(output, resumable=False)
    if not checkpoints:
        return ""
    key = "model_name_or_path" if full else "adapter_name_or_path"
    return f"; its newest checkpoint: {key}={checkpoints[-1]}"


def other_bases(config: Config, adapters: list[Path]) -> list[str]:
    """Warnings about adapters trained on a base of another name.

    The tensor shapes may fit, but the answers would be nonsense.
    """
    warnings = []
    for folder in adapters:
        original = trained_on(folder)
        if original and Path(original).name != Path(config.model_name_or_path).name:
            warnings.append(f"{folder} says it was trained on {original}, not on "
                            f"{config.model_name_or_path}")
    if folded := warn_of_folded(adapters):
        warnings.append(folded)
    return warnings


def with_trained_settings(config: Config, folder: Path) -> Config:
    """The config, with the settings for rendering conversations from train_config.json in `folder`.

    A key in this config wins over the training's, which wins over the default.
    """
    values = {**stored_settings(folder, RENDERING_KEYS), **config.given}
    return replace(config, **{key: values[key] for key in RENDERING_KEYS if key in values})


def stored_settings(folder: Path, keys: tuple[str, ...]) -> dict:
    """The values of keys in a folder's train_config.json; {} without the file.

    Raises ValueError for a value that train.py does not write.
    """
    path = folder / "train_config.json"
    stored = read_json(path)
    found = {}
    for spec in fields(Config):
        if spec.name not in keys or spec.name not in stored:
            continue
        value = stored[spec.name]
        choices = spec.metadata["choices"]
        if type(value).__name__.replace("NoneType", "None") not in spec.type.split(" | "):
            raise ValueError(f"{path}: {spec.name}: {value!r:.60} is not {spec.type}. Correct it, "
                             "or take the folder of an intact run")
        if choices and value is not None and value not in choices:
            raise ValueError(f"{path}: {spec.name}: {value!r:.60} is none of {', '.join(choices)}")
        found[spec.name] = value
    return found


def as_trained(config: Config, adapters: list[Path]
               ) -> tuple[object | None, torch.dtype | None, str]:
    """How training loaded the base: (QuantFormat or None, dtype or None, stage).

    From the config, or from train_config.json beside the last adapter.
    """
    stored = stored_settings(adapters[-1], QUANTIZATION_KEYS) if adapters else {}
    known = replace(config, **{key: value for key, value in stored.items()
                               if key not in config.given})
    half_dtype = None
    if known.bf16:
        half_dtype = torch.bfloat16
    elif known.fp16:
        half_dtype = torch.float16
    quant_format = requested_format(known)
    if quant_format:
        quant_format = replace(quant_format, dtype=half_dtype)
    return quant_format, half_dtype, known.stage


def pick_dtype(config: Config, raw: dict, device: torch.device) -> torch.dtype | None:
    """The dtype of inference: infer_dtype, else bf16 / fp16, else None (the checkpoint's own).

    raw: the content of config.json. Raises ValueError for bfloat16 on a GPU without it.
    """
    requested = requested_dtype(config)
    dtype = requested or raw.get("dtype") or raw.get("torch_dtype")
    if dtype == "bfloat16" and device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            source = "the config asks for" if requested else "the checkpoint has"
            raise ValueError(
                f"{source} bfloat16, which {torch.cuda.get_device_name(device)} lacks: "
                "set infer_dtype: float16 (or float32)")
    return DTYPES.get(requested)


def requested_dtype(config: Config) -> str | None:
    """The name of the dtype that the config asks for, or None."""
    if config.infer_dtype != "auto":
        return config.infer_dtype
    if config.bf16:
        return "bfloat16"
    return "float16" if config.fp16 else None


def sampling_values(config: Config, generation: dict, base: Path) -> tuple[dict, str]:
    """({key: value}, description with the source of each value).

    Sources in order of precedence: the config, generation_config.json, LLaMA-Factory's defaults.
    """
    sources = {
        "config": config.given,
        "generation_config.json": generation,
        "default": vars(config),
    }
    values, words = {}, {}
    for name in SAMPLING_KEYS:
        source = next(key for key, table in sources.items() if table.get(name) is not None)
        values[name] = sources[source][name]
        if not isinstance(values[name], (int, float)):
            raise ValueError(
                f"{base}/generation_config.json: {name}: {values[name]!r} is not a number; correct "
                f"the file, or set {name} in the config")
        words.setdefault(source, []).append(f"{name} {values[name]}".lower())
    described = [f"{', '.join(pairs)} ({source})" for source, pairs in words.items()]
    return values, "; ".join(described)


@contextmanager
def explained_out_of_memory(device: torch.device) -> Iterator[None]:
    """Turn torch's error for a full GPU into a sentence that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if device.type != "cuda" or not out_of_memory(error):
            raise
        free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(device))
        raise ValueError(
            f"the GPU is out of memory ({free:.1f} of {total:.1f} GiB free): stop other programs "
            "that use it, take a shorter conversation or a smaller dtype (infer_dtype), or set "
            "use_cpu: true") from None
