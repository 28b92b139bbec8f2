"""LLaMA-Factory's key fp8: what it means for a run here, said at its start.

There, fp8: true asks accelerate for products in 8 bits. Version 0.9.5 with transformers 5.6 leaves
fp8_backend torchao and auto without effect (the losses are those of bf16, digit by digit), and
falls back to 16 bits on devices that cannot. Here frozen weights are multiplied in 8 bits, and
trained ones are not.

Requires: settings/config.py.
Next: methods/fp8.py.
"""
from settings.config import Config


def apply_fp8(config: Config):
    """Set base_precision as config.fp8 asks for it, and note what it means."""
    if not config.fp8:
        return
    computed = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    reason = why_not_in_8_bits(config)
    if reason:
        config.notes.append(f"fp8: true: {reason}; this run computes in {computed}")
        return
    config.base_precision = "fp8"
    config.notes.append("fp8: true is base_precision: fp8 here: frozen weights are held and "
                        "multiplied in 8 bits where the device can, else in bfloat16")


def why_not_in_8_bits(config: Config) -> str:
    """Why no product of this run is computed in 8 bits, or ""."""
    if config.finetuning_type != "lora":
        return "weights that are trained are not multiplied in 8 bits"
    if config.fsdp:
        return "sharded weights are not multiplied in 8 bits"
    if not config.bf16:
        return "products in 8 bits come with bf16: true"
    return ""
