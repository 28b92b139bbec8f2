"""The dtype of a run, and loss scaling for float16.

Requires: model.py.
Next: train.py.
"""
import torch

from checkpoint.files import DTYPES, stored_as, tensor_files
from families import read_config_json


def check_dtype(config, device):
    """Refuse a 16-bit dtype that the device cannot compute in, before anything is loaded."""
    if config.fp16 and device.type == "cpu":
        print("note: float16 is slow on a CPU, and this run computes on one; bf16: true or neither is faster")
    if config.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"bf16: {torch.cuda.get_device_name(device)} has no bfloat16; set fp16: true instead")


def half_of(config) -> torch.dtype | None:
    """The 16-bit dtype that the config asks for, or None."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def compute_dtype(config, base, shape, forms) -> torch.dtype:
    """What products are computed in: bf16 / fp16 if asked, else the dtype of the weights; known before they are loaded,
    from their file or, where there is none yet, from config.json."""
    if half_of(config):
        return half_of(config)
    if config.finetuning_type != "lora":
        return torch.float32
    ours = "model.layers.0.self_attn.o_proj.weight"
    name = shape.stored_name(ours)
    try:
        stored = stored_as(tensor_files(base)[name], name)[1]
        return stored if stored.is_floating_point else forms[ours].dtype
    except (FileNotFoundError, KeyError):
        raw = read_config_json(base)
        raw |= raw.get("text_config", {})
        return DTYPES.get(raw.get("dtype") or raw.get("torch_dtype"), torch.float32)


class LossScale:
    """Loss scaling for float16, whose gradients underflow unscaled (arXiv:1710.03740, sec. 3.2).

    The loss is multiplied by `value`; before the optimizer acts the gradients are divided by it again. A step whose
    gradients overflowed is skipped and halves the value; 2,000 good steps in a row double it.
    """

    def __init__(self, value: float = 2.0 ** 16):
        self.value, self.good_steps = value, 0

    def unscale(self, parameters):
        """Divide the gradients by the scale, in place."""
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.value)

    def update(self, finite: bool) -> bool:
        """Learn whether the step's gradients were finite (their norm tells); returns it."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps % 2000 == 0:
            self.value *= 2
        return finite
