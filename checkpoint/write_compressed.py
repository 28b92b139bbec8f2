"""Write matrices as compressed-tensors holds them; checkpoint/grouped_files.py reads them.

    fp8     weight (out, in) float8_e4m3; weight_scale (out, 1): one for each row. Programs that
            serve it also round the activations, a scale for each token (float-quantized)
    w4a16   weight_packed (out, in / 8) int32, codes along the rows, the first in the lowest bits;
            weight_scale (out, groups) for 128 columns each; weight_shape (2,) int64
            (pack-quantized); activations stay in 16 bits

Numbers are rounded to the nearest; scales have the dtype of the checkpoint.

Requires: checkpoint/write_gptq.py (words of codes).
Next: exporting/packed_export.py.
Layout: compressed-tensors 0.20, as llm-compressor writes FP8_DYNAMIC and W4A16.
"""
# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.write_gptq import WORD_BITS, pack_words

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max
BITS = 4
GROUP_SIZE = 128
FORMATS = {"fp8": "float-quantized", "w4a16": "pack-quantized"}


def compressed_parts(kind: str, shape: tuple, dtype: torch.dtype) -> dict:
    """{part: (shape, dtype)} of the tensors that hold a matrix (out, in). dtype: of the scales."""
    size_out, size_in = shape
    if kind == "fp8":
        return {"weight": (shape, FP8), "weight_scale": ((size_out, 1), dtype)}
    return {
        "weight_packed": ((size_out, size_in * BITS // WORD_BITS), torch.int32),
        "weight_scale": ((size_out, size_in // GROUP_SIZE), dtype),
        "weight_shape": ((2,), torch.int64),
    }


def compress(kind: str, rows: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Codes and scales of rows of a matrix (out, in), float32."""
    if kind == "fp8":
        scales = usable(rows.abs().amax(1, keepdim=True) / LARGEST_FP8, dtype)
        scaled = (rows / scales.float()).clamp_(-LARGEST_FP8, LARGEST_FP8)
        return {"weight": scaled.to(FP8), "weight_scale": scales}
    groups = rows.view(len(rows), -1, GROUP_SIZE)                   # (out, groups, 128)
    half_range = (2**BITS - 1) / 2
    scales = usable(groups.abs().amax(2) / half_range, dtype)
    codes = (groups / scales.float()[..., None]).round_().add_(2**(BITS - 1))
    codes = codes.clamp_(0, 2**BITS - 1).to(torch.uint8).view(rows.shape)
    return {"weight_packed": pack_words(codes, BITS), "weight_scale": scales}


def usable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in the dtype of a file, none of them 0."""
    rounded = scales.to(dtype)
    smallest = torch.finfo(dtype).smallest_normal
    return torch.where(rounded < smallest, torch.ones_like(rounded), rounded)


def compressed_fields(kind: str, ignored: list[str]) -> dict:
    """quantization_config of config.json. ignored: names of layers, or re: and a pattern."""
    scheme = {"num_bits": BITS, "type": "int", "strategy": "group", "group_size": GROUP_SIZE}
    activations = None
    if kind == "fp8":
        scheme = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True,
                       "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": scheme | {"symmetric": True, "dynamic": False},
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
