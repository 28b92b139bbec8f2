"""settings/fp8_keys.py and what kernels.py makes of it: LLaMA-Factory's fp8 training keys.

Its recorded runs with fp8: true are in llama_factory_runs.json (fp8, fp8_lora).
"""
import pytest
import torch

from checkpoint.read_config import model_config
from methods import fp8
from methods.fp8 import FORMATS, Fp8, scaled_matmul_plain
from runtime.kernels import Kernels, pick_fp8_base
from tests.common import load_argv, refusal
from tests.tiny_models import TINY_LLAMA

TRAIN = ["model_name_or_path=m", "dataset=d", "output_dir=o", "fp8=true", "fp8_backend=te"]
BF16 = torch.bfloat16


def picked(device, *more, training=True):
    """The Kernels of this command line on a device."""
    kernels = Kernels(training=training)
    pick_fp8_base(kernels, load_argv(*TRAIN, *more, script="train"), model_config(TINY_LLAMA),
                  device, BF16)
    return kernels


@pytest.mark.parametrize("more, words", [
    (["bf16=true"], "is base_precision: fp8 here"),
    (["pure_bf16=true"], "is base_precision: fp8 here"),
    ([], "products in 8 bits come with bf16: true; this run computes in float32"),
    (["fp16=true"], "come with bf16: true; this run computes in float16"),
    (["bf16=true", "finetuning_type=full"], "trained are not multiplied in 8 bits; this run comp"),
    (["bf16=true", "fsdp=full_shard"], "sharded weights are not multiplied in 8 bits; this run"),
    (["bf16=true", "deepspeed=ds_z3_config.json"], "sharded weights are not multiplied in 8"),
])
def test_what_the_key_means_is_noted(more, words):
    config = load_argv(*TRAIN, *more, script="train")
    assert words in config.notes[-1]
    assert config.base_precision == ("fp8" if words.startswith("is ") else None)
    off = load_argv(*TRAIN, *more, "fp8=false", script="train")
    assert off.base_precision is None and not any("fp8: true" in note for note in off.notes)


def test_it_does_not_go_with_quantization():
    assert "keep one" in refusal(*TRAIN, "bf16=true", "quantization_bit=4", script="train")


def test_a_device_that_multiplies_in_8_bits_does(monkeypatch):
    how = Fp8(FORMATS[0], scaled_matmul_plain)
    monkeypatch.setattr(fp8, "pick_fp8", lambda device, dtype: (how, "8-bit base: tried"))
    kernels = picked("cuda", "bf16=true")
    assert kernels.fp8 == how and kernels.lines[-1] == "8-bit base: tried"
    assert picked("cuda", "bf16=true", "finetuning_type=full").fp8 is None
    assert picked("cuda", "bf16=true", training=False).fp8 is None


def test_one_that_cannot_computes_in_16_bits_and_says_so(monkeypatch):
    def refused(device, dtype):
        raise ValueError("base_precision: fp8 does not work on this device: too old")

    monkeypatch.setattr(fp8, "pick_fp8", refused)
    kernels = picked("cuda", "bf16=true")
    assert kernels.fp8 is None
    assert kernels.lines[-1].startswith("8-bit base: off, computed in 16 bits. base_precision: fp8 "
                                        "does not work on this device")
    kernels = picked("cpu", "bf16=true")
    assert kernels.fp8 is None and "off, a CPU has no products in 8 bits" in kernels.lines[-1]
    kernels = Kernels()
    asked = [*TRAIN[:3], "base_precision=fp8", "bf16=true"]     # without fp8: true, it is an error
    with pytest.raises(ValueError, match="too old"):
        pick_fp8_base(kernels, load_argv(*asked, script="train"), model_config(TINY_LLAMA), "cuda",
                      BF16)
