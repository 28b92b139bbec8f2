"""The second, frozen model of a run: the reference of dpo, kto, ASFT and grpo, or a teacher.

    second = second_model(config, base, lora)           # folder, adapters, format; or None
    check_second_model(splits, config, tokenizer)       # does it know the same tokens?
    second_model_bytes(second, dtype)                   # for the memory plan

Requires: checkpoint/load.py, runtime/precision.py.
Next: runtime/setup.py, runtime/build.py.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.load import load_model, quantized_weights
from checkpoint.read_config import read_model_config
from lora import AdapterConfig
from model import CausalLM
from runtime.named_folders import named_folder, named_folders
from runtime.precision import quant_format_of_bits, requested_format
from text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SecondModel:
    """What is loaded beside the trained model."""
    folder: Path
    adapters: list[Path]
    quant_format: object | None     # QuantFormat to quantize by while loading
    key: str = ""                   # of the config that names its folder; "" for the base

    def skeleton(self) -> CausalLM:
        """The model without storage, its linear layers in their formats."""
        return load_model(self.folder, skip_weights=True, quant_format=self.quant_format)


def needs_second_model(config, lora: AdapterConfig | None) -> bool:
    """Whether a second model is loaded: a teacher, or a reference where the trained one cannot be.

    The trained one serves as reference with its adapters off, if these are all that is trained.
    """
    if config.stage == "distill":
        return True
    if not config.has_reference:
        return False
    return bool(config.ref_model or not lora or lora.modules_to_save)


def second_model(config, base, lora: AdapterConfig | None) -> SecondModel | None:
    """The second model of a run; None where it has none. base: of runtime/setup.py."""
    if not needs_second_model(config, lora):
        return None

    if config.stage == "distill":
        own = quant_format_of_bits(config, config.teacher_quantization_bit)
        adapters = named_folders(config, "teacher_adapters")
        if config.teacher_model:
            return SecondModel(named_folder(config, "teacher_model"), adapters, own,
                               "teacher_model")
        return SecondModel(base.folder, adapters, own or requested_format(config))
    if config.ref_model:
        return SecondModel(named_folder(config, "ref_model"),
                           named_folders(config, "ref_model_adapters"), None, "ref_model")
    adapters = base.merged_adapters(config) if lora else []
    return SecondModel(base.folder, adapters, requested_format(config))


def second_model_bytes(second: SecondModel | None, dtype: torch.dtype) -> int:
    """Memory of its weights, which are held in `dtype` where they are not quantized."""
    if second is None:
        return 0
    model = second.skeleton()
    plain = sum(p.numel() * dtype.itemsize for p in model.parameters())
    return plain + sum(weight.nbytes for weight in quantized_weights(model).values())


def check_second_model(splits: list, config, tokenizer):
    """Raises ValueError for a second model that does not know the tokens of the trained one."""
    if config.stage == "distill" and config.teacher_model:
        folder = named_folder(config, "teacher_model")
        check_teacher_tokens(folder, tokenizer)
        check_rows_of(folder, "teacher_model", config.teacher_model, splits, tokenizer,
                      "A teacher needs every token of the trained model: name one with these "
                      "tokens")
    elif config.ref_model:
        folder = named_folder(config, "ref_model")
        check_rows_of(folder, "ref_model", config.ref_model, splits, tokenizer,
                      "The reference needs every token of the trained model: leave ref_model out, "
                      "so that it is the model that training starts from, or name one with these "
                      "tokens")


def check_rows_of(folder: Path, key: str, name: str, splits: list, tokenizer, advice: str):
    """Raises ValueError for a token id of the data that a model lacks, as it may lack new ones."""
    rows = read_model_config(folder).vocab_size
    largest = max(examples.largest_id for examples in splits)
    if largest >= rows:
        raise ValueError(
            f"{key}: {name} knows ids 0 to {rows - 1}, and the data hold token id {largest} "
            f"({tokenizer.decode([largest])!r}). {advice}")


def check_teacher_tokens(folder: Path, tokenizer):
    """Raises ValueError for a teacher whose ids stand for other tokens than the student's."""
    try:
        theirs = load_tokenizer(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"teacher_model: its tokenizer cannot be compared with the student's ({error}). If "
            "both are the same, copy the tokenizer's files into that folder") from None
    ours, others = ({id: token for token, id in one.core.get_vocab().items()}
                    for one in (tokenizer, theirs))
    differs = [id for id, token in others.items() if ours.get(id, token) != token]
    if differs:
        first = min(differs)
        raise ValueError(
            f"teacher_model: {folder} has another tokenizer than the student ({tokenizer.source}): "
            f"{len(differs):,} ids stand for other tokens, such as {first}: {others[first]!r} "
            f"there and {ours[first]!r} here. Their probabilities cannot be compared; take a "
            "teacher with the student's tokenizer (usually one of its family)")
