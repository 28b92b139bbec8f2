"""Checkpoints of compressed-tensors in 8-bit floating point (format float-quantized, FP8_DYNAMIC).

    NAME.weight (out, in) float8_e4m3, NAME.weight_scale (out, 1), or (1,) for the whole matrix;
    NAME.input_scale, where activations have a fixed scale, is not used

Requires: checkpoint/files.py, methods/fp8_rows.py.
Next: checkpoint/load.py.
Layout: compressed-tensors 0.20.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.files import DTYPES, open_tensors, stored_as
from checkpoint.read_config import read_config_json
from methods.fp8_rows import Fp8RowsFormat, Fp8RowsWeight


@dataclass
class Fp8Parts:
    """Where the files hold a quantized weight, and in which format."""
    quant_format: Fp8RowsFormat
    shape: tuple
    parts: dict[str, tuple[Path, str]]      # {codes, scales, inputs: (file, key)}

    def read(self, device) -> Fp8RowsWeight:
        """Read the weight onto the device."""
        tensors = {}
        for part in ("codes", "scales"):
            file, key = self.parts[part]
            with open_tensors(file, device) as opened:
                tensors[part] = opened.get_tensor(key)
        scales = tensors["scales"].reshape(-1, 1).expand(self.shape[0], 1).contiguous()
        return Fp8RowsWeight(self.quant_format, self.shape, codes=tensors["codes"], scales=scales)


def find_fp8(folder, places: dict[str, tuple[Path, str]]) -> dict[str, Fp8Parts]:
    """{name of a weight: Fp8Parts} of a folder with these tensors, {name: (file, key)}.

    Raises ValueError that names file and key for another scheme, or parts that do not fit.
    """
    raw = read_config_json(folder)
    check_groups(raw["quantization_config"], f"{folder}/config.json: quantization_config")
    dtype = DTYPES.get(raw.get("dtype") or raw.get("torch_dtype"), torch.float16)
    found = {}
    for name, scales in places.items():
        layer = name.removesuffix(".weight_scale")
        if layer == name:
            continue
        file, key = scales
        if f"{layer}.weight" not in places:
            raise ValueError(f"{file}: {key} belongs to {layer}.weight, which is in no file; "
                             "fetch the files again")
        parts = {"codes": places[f"{layer}.weight"], "scales": scales}
        if f"{layer}.input_scale" in places:
            parts["inputs"] = places[f"{layer}.input_scale"]
        shape, stored_dtype = stored_as(*parts["codes"])
        scale_shape, scale_dtype = stored_as(file, key)
        if stored_dtype != torch.float8_e4m3fn or len(shape) != 2 or (
                scale_shape not in ((shape[0], 1), (shape[0],), (1,), ())):
            raise ValueError(
                f"{parts['codes'][0]}: {layer} has codes {list(shape)} of {stored_dtype} and "
                f"scales {list(scale_shape)}; read are matrices of float8_e4m3fn with a scale for "
                "each row, or one")
        found[f"{layer}.weight"] = Fp8Parts(Fp8RowsFormat(scale_dtype, dtype), shape, parts)
    if not found:
        raise ValueError(f"{folder}/config.json says float-quantized, but no file holds a tensor "
                         "named .weight_scale. Remove quantization_config if the weights are not "
                         "quantized")
    return found


def check_groups(stored: dict, where: str):
    """Raises ValueError for a scheme other than rows or matrices with a scale."""
    for name, group in (stored.get("config_groups") or {}).items():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        known = {"num_bits": (8,), "type": ("float",), "strategy": ("channel", "tensor")}
        for field, values in known.items():
            if weights.get(field) not in values:
                raise ValueError(
                    f"{where}.config_groups.{name}.weights.{field} is {weights.get(field)!r}; this "
                    f"reads {', '.join(map(str, values))}. Use the 16-bit checkpoint of the same "
                    "model, with quantization_bit: 4 if memory is short")
