"""Weights that a checkpoint stores in 4 or 8 bits, as bitsandbytes writes them.

Beside `NAME.weight`, which holds the codes, stand the scales and the state of the format, under
the names of PARTS. checkpoint/load.py comes here for folders that hold such names.

Requires: checkpoint/files.py, methods/quant.py (what the numbers mean).
Next: checkpoint/load.py.
Layout: bitsandbytes 0.50.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.files import DTYPES, open_tensors, stored_as
from checkpoint.read_config import read_config_json
from methods.quant import VALUES, QuantFormat, QuantizedWeight

# {name in the files, after the layer's: name in QuantFormat.tensors}; "state" and "format" are read
# here and are no tensors of a QuantizedWeight
PARTS = {
    "weight": "codes",
    "weight.absmax": "absmax",
    "weight.quant_map": "quant_map",
    "weight.nested_absmax": "nested_absmax",
    "weight.nested_quant_map": "nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4": "state",
    "weight.quant_state.bitsandbytes__fp4": "state",
    "SCB": "absmax",
    "weight_format": "format",
}
FILE_NAMES = {part: name for name, part in reversed(PARTS.items())}


@dataclass
class Packed:
    """Where the files hold a quantized weight, and in which format."""
    quant_format: QuantFormat
    shape: tuple
    parts: dict[str, tuple[Path, str]]      # {name in QuantFormat.tensors: (file, key)}
    offset: float = 0.0                     # of the scales, where these are quantized too

    def read(self, device) -> QuantizedWeight:
        """Read the weight onto the device."""
        file, key = self.parts["codes"]
        tensors = {}
        for name in self.quant_format.tensors(self.shape):
            if name in self.parts:
                tensors[name] = read_part(self.parts[name], device)
        return quantized_from(self.quant_format, self.shape, tensors, self.offset,
                              where=f"{file}: {key}")


def find_packed(folder, places: dict[str, tuple[Path, str]]) -> dict[str, Packed]:
    """{name of a weight: Packed} of a folder with these tensors, {name: (file, key)}.

    Raises ValueError with file and key for parts that are missing or unknown.
    """
    layers = {}                             # {name of a layer: {part: (file, key)}}
    for full_name, (file, key) in places.items():
        match = re.fullmatch(r"(.+)\.(weight\..+|SCB|weight_format)", full_name)
        if not match or f"{match[1]}.weight" not in places:
            continue
        layer, name = match.groups()
        if name not in PARTS:
            known = ", ".join(other for other in PARTS if other != "weight")
            raise ValueError(f"{file}: {key} is an unknown part of a quantized weight; the known "
                             f"ones are {known}")
        codes = places[f"{layer}.weight"]
        layers.setdefault(layer, {"codes": codes})[PARTS[name]] = (file, key)

    by_file = {}                            # each file is opened once
    for layer, parts in layers.items():
        check_state(folder, places, layer, parts)
        file, _ = parts.get("state", parts["codes"])
        by_file.setdefault(file, []).append(layer)

    found = {}
    for file, names in by_file.items():
        with open_tensors(file) as tensors:
            for layer in names:
                found[f"{layer}.weight"] = describe(folder, layers[layer], tensors)
    return found


def check_state(folder, places: dict, layer: str, parts: dict):
    """Raises ValueError for a layer whose format is nowhere stated."""
    if f"{layer}.SCB" in places or "state" in parts:
        return
    file, key = next(place for part, place in parts.items() if part != "codes")
    missing = f"{layer}.weight.quant_state.bitsandbytes__nf4 (or __fp4)"
    if "format" in parts:
        missing = f"{layer}.SCB"
    raise ValueError(f"{file}: {key} exists, but {missing} is in no file of {folder}; fetch the "
                     "files again")


def describe(folder, parts: dict, tensors) -> Packed:
    """The Packed of one weight. tensors: the open file of its state, or, for int8, of its codes."""
    file, key = parts.get("state", parts["codes"])
    offset = 0.0
    if "state" in parts:
        quant_format, shape, offset = format_of_state(tensors.get_tensor(key), f"{file}: {key}")
    else:
        check_row_layout(parts)
        raw = read_config_json(folder)
        dtype = DTYPES.get(raw.get("dtype") or raw.get("torch_dtype"), torch.float16)
        quant_format = QuantFormat("int8", nested=0, dtype=dtype)
        shape, _ = stored_as(file, key)
    for part in quant_format.tensors(shape):
        if part not in parts and part != "nested_offset":
            missing = f"{key.partition('.weight')[0]}.{FILE_NAMES[part]}"
            raise ValueError(f"{file}: {key} belongs to a weight with the part {missing}, which is "
                             f"in no file of {folder}; fetch the files again")
    return Packed(quant_format=quant_format, shape=shape, parts=parts, offset=offset)


def check_row_layout(parts: dict):
    """Raises ValueError for 8-bit rows in the order of one kind of GPU."""
    if "format" in parts and int(read_part(parts["format"])):
        file, key = parts["format"]
        raise ValueError(f"{file}: {key} says that the rows are laid out for one kind of GPU; only "
                         "the plain order (0) is read")


def read_part(place: tuple[Path, str], device="cpu"):
    """The tensor at (file, key)."""
    file, key = place
    with open_tensors(file, device) as tensors:
        return tensors.get_tensor(key)


def format_of_state(packed, where: str) -> tuple[QuantFormat, tuple, float]:
    """(format, shape, nested offset) of a 4-bit weight from its quant_state, JSON as bytes.

    Raises ValueError for a state that is damaged or not supported.
    """
    try:
        state = json.loads(bytes(packed.tolist()))
        quant_format = QuantFormat(
            kind=state["quant_type"],
            blocksize=int(state["blocksize"]),
            nested=int(state.get("nested_blocksize", 0)),
            dtype=DTYPES[state["dtype"]],
        )
        shape = tuple(map(int, state["shape"]))
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError) as error:
        raise ValueError(
            f"{where}: this is not the state of a 4-bit weight as bitsandbytes writes it "
            f"({type(error).__name__}: {error}); fetch the file again") from None
    kind, blocksize = quant_format.kind, quant_format.blocksize
    known = isinstance(kind, str) and kind in VALUES
    if not known or blocksize < 2 or blocksize % 2 or quant_format.nested < 0 or len(shape) != 2:
        raise ValueError(
            f"{where}: quant_type {kind!r}, blocksize {blocksize}, shape {list(shape)} are not "
            f"supported; known are {', '.join(VALUES)}, even block sizes and matrices")
    return quant_format, shape, offset


def quantized_from(quant_format: QuantFormat, shape, parts: dict, offset: float,
                   where: str) -> QuantizedWeight:
    """A QuantizedWeight from the tensors of a file, {name in QuantFormat.tensors: tensor}.

    Raises ValueError for tensors of another size or dtype.
    """
    if quant_format.kind != "int8":
        parts["codes"] = parts["codes"].view(torch.uint8)   # whatever bnb_4bit_quant_storage says
        if quant_format.nested:
            parts["nested_offset"] = torch.tensor(offset, device=parts["codes"].device)
    tensors = {}
    for name, (size, dtype) in quant_format.tensors(shape).items():
        tensor = parts[name]
        if tensor.numel() != math.prod(size) or tensor.dtype != dtype:
            raise ValueError(
                f"{where}: {name} has {tensor.numel():,} numbers of {tensor.dtype}; {list(shape)} "
                f"in {quant_format.kind} with blocks of {quant_format.blocksize} has "
                f"{math.prod(size):,} of {dtype}")
        tensors[name] = tensor.reshape(size)
    return QuantizedWeight(quant_format, shape, **tensors)
