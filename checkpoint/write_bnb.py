"""Write matrices as bitsandbytes stores nf4 with nested scales; checkpoint/packed.py reads them.

    weight (bytes, 1) uint8                     two codes in a byte, the first in the high half
    weight.absmax, .quant_map                   scales in 8 bits; the 16 values of nf4
    weight.nested_absmax, .nested_quant_map     their scales, and the 256 values of a scale
    weight.quant_state.bitsandbytes__nf4        shape, dtype, sizes and offset, JSON as bytes

Requires: methods/quant.py, checkpoint/packed.py.
Next: exporting/packed_export.py.
Layout: bitsandbytes 0.50, read by transformers.
"""
import json

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.packed import FILE_NAMES
from methods.quant import QuantFormat

NF4 = QuantFormat("nf4")
STATE = "weight.quant_state.bitsandbytes__nf4"
NUMBERS_OF_OFFSET = 24      # characters in the state: it has the same length for every matrix
IN_FILE = ("codes", "absmax", "quant_map", "nested_absmax", "nested_quant_map")


def bnb_parts(shape: tuple, dtype: torch.dtype) -> dict[str, tuple[tuple, torch.dtype]]:
    """{part: (shape, dtype)} of the tensors that hold a matrix (out, in) of this dtype."""
    stored = NF4.tensors(shape)
    found = {FILE_NAMES[part]: stored[part] for part in IN_FILE}
    found["weight"] = ((*found["weight"][0], 1), torch.uint8)
    found[STATE] = ((len(state_bytes(shape, dtype, 0.0)),), torch.uint8)
    return found


def pack_bnb(matrix: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a file for a matrix (out, in), float32; dtype: what readers compute in."""
    weight = NF4.quantize(matrix.to(dtype))
    found = {FILE_NAMES[part]: getattr(weight, part) for part in IN_FILE}
    found["weight"] = found["weight"][:, None]
    found[STATE] = state_bytes(tuple(matrix.shape), dtype, float(weight.nested_offset))
    return found


def state_bytes(shape: tuple, dtype: torch.dtype, offset: float,
                quant_format: QuantFormat = NF4) -> torch.Tensor:
    """The state of a matrix as uint8; blanks at the end make up for a short offset."""
    state = {
        "quant_type": quant_format.kind,
        "blocksize": quant_format.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if quant_format.nested:
        state |= {"nested_blocksize": quant_format.nested, "nested_dtype": "float32",
                  "nested_offset": offset}
    blanks = " " * (NUMBERS_OF_OFFSET - len(repr(offset)))
    return torch.tensor(list((json.dumps(state) + blanks).encode()), dtype=torch.uint8)


def bnb_fields(dtype: torch.dtype, skipped: list[str]) -> dict:
    """quantization_config of config.json. dtype: to compute in; skipped: modules in 16 bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": NF4.kind,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
