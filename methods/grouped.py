"""Frozen weights in 2 to 8 bits with a scale for each group of columns, as by GPTQ and AWQ.

    W[i, j] = scale[i, g(j)] * (code[i, j] - zero[i, g(j)])

g(j) is j / group_size or, where GPTQ has quantized the columns in another order (act-order,
desc_act), given for each column. Codes and zeros are whole numbers without a sign. The product has
few bits: it is exact in float32 and rounded once to the dtype of the scales, as the libraries that
write such files do.

Whatever the layout of a file, codes are held here in one: row by row, two in a byte (the first in
the low half), or one where they have more than 4 bits. Codes of 2 and 3 bits take 4.

Requires: methods/quant.py.
Next: checkpoint/grouped_files.py (the layouts of files).
Papers: GPTQ arXiv:2210.17323, AWQ arXiv:2306.00978.
"""
from dataclasses import dataclass

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from methods.quant import FrozenWeight, pairs_of, piece_size


@dataclass(frozen=True)
class GroupedFormat:
    """How a matrix is stored."""
    kind: str                           # "4-bit gptq", for messages
    width: int                          # bits of a code in its file
    group_size: int                     # columns that share a scale
    scale_dtype: torch.dtype            # the matrix is rounded to it first,
    dtype: torch.dtype                  # then to this one, the checkpoint's
    with_columns: bool = False          # the group of each column is stored

    def tensors(self, shape) -> dict[str, tuple[tuple, torch.dtype]]:
        """{name: (shape, dtype)} of the tensors that store a matrix of this shape (out, in)."""
        size_out, size_in = shape
        groups = -(-size_in // self.group_size)
        found = {
            "codes": ((size_out, -(-size_in // self.codes_in_a_byte)), torch.uint8),
            "scales": ((size_out, groups), self.scale_dtype),
            "zeros": ((size_out, groups), torch.uint8),
        }
        if self.with_columns:
            found["columns"] = ((size_in,), torch.int32)
        return found

    @property
    def codes_in_a_byte(self) -> int:
        return 2 if self.width <= 4 else 1

    def of_joined(self, shape, count: int) -> "GroupedFormat | None":
        """The format of `count` matrices below each other; None: each has an order of columns."""
        return None if self.with_columns else self

    def bits(self) -> float:
        """Bits per weight of a large matrix in memory."""
        return 8 / self.codes_in_a_byte + 8 * (self.scale_dtype.itemsize + 1) / self.group_size

    def empty(self, shape) -> "GroupedWeight":
        """A matrix of this shape on the meta device, without storage."""
        tensors = {name: torch.empty(size, dtype=dtype, device="meta")
                   for name, (size, dtype) in self.tensors(shape).items()}
        return GroupedWeight(self, shape, **tensors)


class GroupedWeight(FrozenWeight):
    """A frozen matrix (out, in) with scales for groups of columns."""

    def __init__(self, quant_format: GroupedFormat, shape, **tensors):
        super().__init__(quant_format, shape, **tensors)
        if quant_format.codes_in_a_byte == 2:
            self.register_buffer("pairs", pairs_of_codes(self.codes.device), persistent=False)

    def dequantize(self, dtype: torch.dtype | None = None):
        """The matrix (out, in), computed at each call, in pieces of rows.

        It is rounded to the dtype of its scales, then to `dtype` (None: the checkpoint's).
        """
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        rounded = self.quant_format.scale_dtype
        step = max(1, piece_size(self.device, 1) // max(1, self.shape[1]))
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] = self.scaled(self.codes_of(rows), rows).to(rounded)
        return out

    def codes_of(self, rows: slice):
        """The codes of some rows, float32."""
        codes = self.codes[rows]
        if self.quant_format.codes_in_a_byte == 1:
            return codes.float()
        both = self.pairs.index_select(0, codes.reshape(-1).int())
        return both.view(torch.float32).view(len(codes), -1)[:, :self.shape[1]]

    def scaled(self, values, rows: slice):
        """(values - zero) * scale for the codes of some rows, in place. float32"""
        scales = self.scales[rows].float()                                      # (rows, groups)
        zeros = self.zeros[rows].float()
        if self.quant_format.with_columns:
            zeros = zeros.index_select(1, self.columns)
            return values.sub_(zeros).mul_(scales.index_select(1, self.columns))
        grouped = values.view(len(values), scales.shape[1], -1)                 # in equal groups
        grouped.sub_(zeros[..., None]).mul_(scales[..., None])
        return values

    def dequantize_bytes(self, device, itemsize: int) -> int:
        """Memory that `dequantize` takes: the matrix, and the piece that is unpacked at once."""
        step = max(1, piece_size(device, 1) // max(1, self.shape[1]))
        piece = min(step, self.shape[0]) * self.shape[1]
        with_columns = 8 if self.quant_format.with_columns else 0
        return itemsize * self.numel() + (6 + with_columns) * piece


def pairs_of_codes(device):
    """(256,) int64: for each byte the bits of its two codes as float32, the low half first."""
    values = torch.arange(16, dtype=torch.float32, device=device)
    high_first = pairs_of(values)                       # of the byte with halves h, l: h, then l
    byte = torch.arange(256, device=device)
    return high_first[(byte & 15) << 4 | byte >> 4]
