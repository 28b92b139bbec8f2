"""Checkpoints in MXFP4 or FP8 blocks, dequantized tensor by tensor on load.

    mxfp4   NAME_blocks (experts, out, in / 32, 16) and NAME_scales (experts, out, in / 32), uint8,
            of a stack NAME (experts, in, out): GPT-OSS
    fp8     NAME.weight (out, in) float8_e4m3 and NAME.weight_scale_inv, one scale per block or per
            matrix: DeepSeek V3, Kimi K2, Qwen3 in FP8, MiniMax M2. NAME.activation_scale, a static
            scale of activations, is not used

In memory the weights have 16 bits; activations are not quantized. quantization_bit quantizes the
weights again, like a 16-bit checkpoint.

Requires: checkpoint/files.py, checkpoint/float_blocks.py.
Next: checkpoint/load.py; exporting/block_export.py, which merges into these formats.
Layouts: the published files of gpt-oss-20b, DeepSeek-V3 and Qwen3-8B-FP8, as transformers 5 reads
them.
"""
from dataclasses import dataclass
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.files import DTYPES, open_tensors, stored_as
from checkpoint.float_blocks import (FP8, GROUP, dequantize_fp8_blocks, dequantize_mxfp4,
                                     quantize_fp8_blocks, quantize_mxfp4)
from checkpoint.read_config import read_config_json

METHODS = ("mxfp4", "fp8")          # quant_method of config.json
BITS = {"mxfp4": 4 + 8 / GROUP, "fp8": 8.0}             # bits per weight; fp8 without its scales
SUFFIXES = {"mxfp4": ("_blocks", "_scales"), "fp8": ("weight", "weight_scale_inv")}


@dataclass(frozen=True)
class BlockFormat:
    """How the files store a weight."""
    kind: str                           # of METHODS
    dtype: torch.dtype                  # of the dequantized weight, from config.json
    scale_dtype: torch.dtype
    block: tuple[int, int] = (1, GROUP)     # rows and columns that share a scale
    powers_of_two: bool = False         # all scales are powers of two

    def bits(self) -> float:
        """Bits per number."""
        return BITS[self.kind]


@dataclass
class BlockParts:
    """The tensors in the files that store one weight, and their format."""
    quant_format: BlockFormat
    shape: tuple
    parts: dict[str, tuple[Path, str]]      # {codes, scales, inputs: (file, key)}

    def read(self, device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dequantized weight. dtype None: the checkpoint's."""
        tensors = []
        for part in ("codes", "scales"):
            file, key = self.parts[part]
            with open_tensors(file, device) as opened:
                tensors.append(opened.get_tensor(key))
        return self.unpack(*tensors, dtype or self.quant_format.dtype)

    def unpack(self, codes, scales, dtype: torch.dtype) -> torch.Tensor:
        """The weight from the tensors of a file."""
        if self.quant_format.kind == "fp8":
            scales = scales.reshape(1, 1) if scales.numel() == 1 else scales
            return dequantize_fp8_blocks(codes, scales, self.quant_format.block, dtype)
        weight = torch.empty(self.shape, dtype=dtype, device=codes.device)
        for expert in range(len(weight)):                   # float32 values of one expert at a time
            weight[expert] = dequantize_mxfp4(codes[expert], scales[expert], dtype)
        return weight

    def file_parts(self) -> dict[str, tuple[tuple, torch.dtype]]:
        """{name suffix: (shape, dtype)} of the tensors that store the weight."""
        found = {}
        for part, suffix in zip(("codes", "scales"), SUFFIXES[self.quant_format.kind]):
            found[suffix] = stored_as(*self.parts[part])
        return found

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of file_parts for another weight of this shape, float32."""
        form = self.quant_format
        if form.kind == "fp8":
            pair = quantize_fp8_blocks(weight, form.block, form.scale_dtype, form.powers_of_two)
        else:
            pair = [torch.stack(tensors) for tensors in zip(*map(quantize_mxfp4, weight))]
        shapes = self.file_parts()
        return {suffix: tensor.reshape(shapes[suffix][0])
                for suffix, tensor in zip(SUFFIXES[form.kind], pair)}


def find_blocks(folder, places: dict[str, tuple[Path, str]]) -> dict[str, BlockParts]:
    """{name of a weight: BlockParts} of a folder with these tensors, {name: (file, key)}.

    Raises ValueError with file and key if shapes or dtypes do not match.
    """
    raw = read_config_json(folder)
    fields = raw | (raw.get("text_config") or {})
    dtype = DTYPES.get(fields.get("dtype") or fields.get("torch_dtype"), torch.bfloat16)
    stored = raw["quantization_config"]
    describe = mxfp4_parts if stored.get("quant_method") == "mxfp4" else fp8_parts
    found = {}
    for name, place in places.items():
        found |= describe(name, place, places, stored, dtype)
    if not found:
        wanted = " and ".join(SUFFIXES[stored["quant_method"]])
        raise ValueError(f"{folder}/config.json says quant_method: {stored['quant_method']}, but "
                         f"no file holds tensors whose names end in {wanted}. Remove "
                         "quantization_config if the weights are not quantized")
    return found


def mxfp4_parts(name: str, place, places: dict, stored: dict,
                dtype: torch.dtype) -> dict[str, BlockParts]:
    """{name of a stack: BlockParts} if the tensor `name` has its codes, else {}."""
    stack = name.removesuffix("_blocks")
    if stack == name:
        return {}
    file, key = place
    if f"{stack}_scales" not in places:
        raise ValueError(f"{file}: {key} needs {stack}_scales, which is in no file; fetch the "
                         "files again")
    parts = {"codes": place, "scales": places[f"{stack}_scales"]}
    shape, code_dtype = stored_as(*place)
    scale_shape, scale_dtype = stored_as(*parts["scales"])
    fits = len(shape) == 4 and shape[3] == GROUP // 2 and scale_shape == shape[:3]
    if not fits or {code_dtype, scale_dtype} != {torch.uint8}:
        raise ValueError(
            f"{file}: {key} has shape {list(shape)} of {code_dtype}, its scales {list(scale_shape)}"
            f" of {scale_dtype}; MXFP4 is uint8, (experts, out, in / 32, 16) and (experts, out, "
            "in / 32)")
    experts, size_out, groups, _ = shape
    form = BlockFormat("mxfp4", dtype, torch.uint8)
    return {stack: BlockParts(form, (experts, groups * GROUP, size_out), parts)}


def fp8_parts(name: str, place, places: dict, stored: dict,
              dtype: torch.dtype) -> dict[str, BlockParts]:
    """{name of a weight: BlockParts} if the tensor `name` has its scales, else {}."""
    layer = name.removesuffix(".weight_scale_inv")
    if layer == name:
        return {}
    file, key = place
    if f"{layer}.weight" not in places:
        raise ValueError(f"{file}: {key} belongs to {layer}.weight, which is in no file; fetch the "
                         "files again")
    parts = {"codes": places[f"{layer}.weight"], "scales": place}
    if f"{layer}.activation_scale" in places:
        parts["inputs"] = places[f"{layer}.activation_scale"]
    shape, code_dtype = stored_as(*parts["codes"])
    scale_shape, scale_dtype = stored_as(*place)
    block = tuple(stored.get("weight_block_size") or ())
    if len(shape) == 2 and scale_shape in ((), (1,), (1, 1)):
        block = block or shape                              # one scale per matrix
    counts = tuple(-(-size // step) for size, step in zip(shape, block))
    if code_dtype != FP8 or len(shape) != 2 or len(block) != 2 or (
            scale_shape not in (counts, (), (1,)) or not scale_dtype.is_floating_point):
        raise ValueError(
            f"{parts['codes'][0]}: {layer} has codes {list(shape)} of {code_dtype} and scales "
            f"{list(scale_shape)} of {scale_dtype}; weight_block_size: {list(block)} in config.json"
            f" requires float8_e4m3fn codes and scales {list(counts)}")
    form = BlockFormat("fp8", dtype, scale_dtype, block,
                       powers_of_two=stored.get("scale_fmt") == "ue8m0")
    return {f"{layer}.weight": BlockParts(form, shape, parts)}
