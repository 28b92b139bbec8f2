"""Write GGUF files, which llama.cpp and its descendants read, with one block of a tensor in memory.

    "GGUF", version 3, counts; metadata: name, type of the value, value
    tensors: name, sizes (the innermost first), type of the numbers, offset
    the tensors' bytes, each from a multiple of 32 bytes on

Numbers are stored as they are (f32, f16, bf16) or in blocks of 32 of a row that share a scale d, a
float16 number:

    q8_0   d = largest / 127, codes round(x / d), 8 bits each
    q4_0   d = the number of largest size, with its sign, / -8; codes of 0 to 15 stand for -8 to 7;
           byte i of a block holds code i in its low half and code i + 16 in its high half

Requires: checkpoint/files.py, checkpoint/run_ahead.py.
Next: checkpoint/gguf_graphs.py (which tensors and metadata), checkpoint/gguf_tokenizer.py.
Layout and rounding: the GGUF specification and reference quantization of ggml (gguf 0.19).
"""
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.files import check_disk, written_behind
from checkpoint.run_ahead import run_ahead

ALIGNMENT = 32
BLOCK_NUMBERS = 32
WRITTEN_BY = ("pocket_factory.written_by", "merge.py of Pocket Factory")


class NumberType(NamedTuple):
    """How numbers are stored."""
    code: int           # ggml's
    numbers: int        # in a block
    nbytes: int         # of a block
    file_code: int      # general.file_type of a file whose matrices are mostly of it


NUMBER_TYPES = {
    "f32": NumberType(code=0, numbers=1, nbytes=4, file_code=0),
    "f16": NumberType(code=1, numbers=1, nbytes=2, file_code=1),
    "bf16": NumberType(code=30, numbers=1, nbytes=2, file_code=32),
    "q8_0": NumberType(code=8, numbers=BLOCK_NUMBERS, nbytes=34, file_code=7),
    "q4_0": NumberType(code=2, numbers=BLOCK_NUMBERS, nbytes=18, file_code=2),
}
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def tensor_bytes(shape: tuple, number_type: str) -> int:
    """Bytes of a tensor in a file."""
    kind = NUMBER_TYPES[number_type]
    return torch.Size(shape).numel() // kind.numbers * kind.nbytes


# ---- numbers ------------------------------------------------------------------------------------


def encode_numbers(rows: torch.Tensor, number_type: str) -> torch.Tensor:
    """Rows of a tensor (..., n) as a file's bytes, uint8; n is a multiple of the type's block.

    Raises ValueError for numbers beyond float16, which is the dtype of scales, too.
    """
    rows = rows.float().cpu()
    if number_type in PLAIN:
        stored = rows.to(PLAIN[number_type])
        check_range(stored, rows, number_type)
        return stored.contiguous().reshape(-1).view(torch.uint8)
    blocks = rows.reshape(-1, BLOCK_NUMBERS)
    scales, codes = ENCODE[number_type](blocks)                 # (blocks, 1), (blocks, bytes)
    halves = scales.half()
    check_range(halves, rows, number_type)
    encoded = torch.empty(len(blocks), NUMBER_TYPES[number_type].nbytes, dtype=torch.uint8)
    encoded[:, :2] = halves.view(torch.uint8)
    encoded[:, 2:] = codes.view(torch.uint8)
    return encoded.reshape(-1)


def check_range(stored: torch.Tensor, rows: torch.Tensor, number_type: str):
    """Raises ValueError for numbers that the type cannot hold."""
    # the sum is much sooner there; an infinite sum of finite numbers is looked at again
    if not stored.sum(dtype=torch.float32).isfinite() and not stored.isfinite().all():
        if not rows.isfinite().all():
            raise ValueError("it holds NaN or infinity: base or adapter are damaged. Fetch "
                             "or train them again")
        raise ValueError(f"values up to {float(rows.abs().max()):.3g} are beyond what "
                         f"{number_type} holds (float16 ends at 65,504); set gguf_type: bf16")


def encode_q8_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales (blocks, 1) float32, codes (blocks, 32) int8); halves are rounded away from 0."""
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scales = torch.maximum(low.abs(), high.abs()) / 127
    scaled = blocks * inverse_or_zero(scales)
    scaled += torch.copysign(torch.tensor(0.5), scaled)         # int8 then drops the fraction
    return scales, scaled.to(torch.int8)


def encode_q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales (blocks, 1) float32, pairs of codes (blocks, 16) uint8)."""
    scales = largest_numbers(blocks) / -8
    # float64: the reference's own product and sum are one fused operation
    shifted = blocks.double().mul_(inverse_or_zero(scales).double()).add_(8.5)
    codes = shifted.clamp_(0, 15).to(torch.uint8)               # which drops the fraction
    low, high = codes.split(BLOCK_NUMBERS // 2, 1)
    return scales, low | high << 4


def largest_numbers(blocks: torch.Tensor) -> torch.Tensor:
    """The number of largest size of each block, with its sign, (blocks, 1); of two, the first."""
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    both = (high == -low).flatten().nonzero().flatten()     # in few blocks: argmax takes long
    rows = blocks[both]
    largest[both] = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return largest


def inverse_or_zero(scales: torch.Tensor) -> torch.Tensor:
    """1 / scales, 0 for a block of zeros."""
    return torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)


ENCODE = {"q8_0": encode_q8_0, "q4_0": encode_q4_0}


# ---- the file -----------------------------------------------------------------------------------


def write_gguf(path: Path, metadata: dict, tensors: dict[str, tuple[tuple, str]],
               rows_of: Callable[[str], Iterable[torch.Tensor]],
               progress: Callable[[int], object] = lambda count: None) -> bytes:
    """Write a file, and return its header.

    metadata: {name: bool, int, float, text, or a list of one of the last three}.
    tensors: {name: (shape, number type)} in the order of writing. rows_of(name): the rows of a
    tensor in one or several blocks. progress: called with the bytes of each block. Raises OSError
    if the disk has too little room.
    """
    header = header_bytes(metadata, tensors)
    total = sum(padded(tensor_bytes(*info)) for info in tensors.values())
    check_disk(path.parent, len(header) + total)
    with written_behind(path) as out:
        out.write(header)
        for encoded in run_ahead(encoders(tensors, rows_of)):
            out.write(encoded.numpy())
            progress(encoded.numel())
        assert out.tell() == len(header) + total, (path, out.tell())
    return header


def encoders(tensors: dict, rows_of: Callable) -> Iterator[Callable]:
    """A function for each block of rows, which returns its bytes, and one for each tensor's end."""
    for name, (shape, number_type) in tensors.items():
        for rows in rows_of(name):
            yield partial(encode_block, name, rows, number_type)
            del rows                                    # before the next block is made
        count = tensor_bytes(shape, number_type)
        yield partial(torch.zeros, padded(count) - count, dtype=torch.uint8)


def encode_block(name: str, rows: torch.Tensor, number_type: str) -> torch.Tensor:
    """encode_numbers, with the tensor's name in the error."""
    try:
        return encode_numbers(rows, number_type)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_gguf(path: Path, header: bytes, tensors: dict):
    """Read the header of a written file again, and its size. Raises OSError."""
    size = len(header) + sum(padded(tensor_bytes(*info)) for info in tensors.values())
    with open(path, "rb") as file:
        same = file.read(len(header)) == header
    if not same or path.stat().st_size != size:
        raise OSError(f"{path}: the written file differs from the plan. Is the disk damaged?")


def is_ours(path: Path) -> bool:
    """Whether merge.py has written this GGUF file: its first metadata say so."""
    with open(path, "rb") as file:
        return pack_string(WRITTEN_BY[0]) in file.read(200)


def header_bytes(metadata: dict, tensors: dict) -> bytes:
    """Everything before the tensors' bytes."""
    metadata = dict([WRITTEN_BY]) | metadata
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for name, value in metadata.items():
        parts += [pack_string(name), pack_value(value)]
    offset = 0
    for name, (shape, number_type) in tensors.items():
        sizes = tuple(reversed(shape))
        parts.append(pack_string(name) + struct.pack("<I", len(sizes)))
        parts.append(struct.pack(f"<{len(sizes)}Q", *sizes))
        parts.append(struct.pack("<IQ", NUMBER_TYPES[number_type].code, offset))
        offset += padded(tensor_bytes(shape, number_type))
    header = b"".join(parts)
    return header + bytes(padded(len(header)) - len(header))


def padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def pack_string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def pack_value(value) -> bytes:
    """The type of a value of the metadata, and the value; whole numbers of a list have a sign."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + pack_string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(pack_string, value))
    code, form = (5, "i") if isinstance(value[0], int) else (6, "f")
    return struct.pack(f"<IIQ{len(value)}{form}", 9, code, len(value), *value)
