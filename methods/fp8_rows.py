"""Frozen weights in 8-bit floating point with a scale for each row, as compressed-tensors stores.

    W[i, j] = scale[i] * code[i, j]         code: float8_e4m3, 4 bits of exponent, 3 of fraction

A matrix with one scale is one whose rows all have it. Other programs that serve such a checkpoint
round the activations to 8 bits, too; here they stay as they are.

Requires: methods/quant.py.
Next: checkpoint/fp8_files.py.
Format: FP8 formats arXiv:2209.05433.
"""
from dataclasses import dataclass

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from methods.quant import FrozenWeight, rows_per_piece


@dataclass(frozen=True)
class Fp8RowsFormat:
    """How a matrix is stored."""
    scale_dtype: torch.dtype            # the matrix is rounded to it first,
    dtype: torch.dtype                  # then to this one, the checkpoint's
    kind: str = "fp8 compressed-tensors"

    def tensors(self, shape) -> dict[str, tuple[tuple, torch.dtype]]:
        """{name: (shape, dtype)} of the tensors that store a matrix of this shape (out, in)."""
        return {"codes": (tuple(shape), torch.float8_e4m3fn),
                "scales": ((shape[0], 1), self.scale_dtype)}

    def bits(self) -> float:
        """Bits per weight, without the scales of the rows."""
        return 8.0

    def empty(self, shape) -> "Fp8RowsWeight":
        """A matrix of this shape on the meta device, without storage."""
        tensors = {name: torch.empty(size, dtype=dtype, device="meta")
                   for name, (size, dtype) in self.tensors(shape).items()}
        return Fp8RowsWeight(self, shape, **tensors)


class Fp8RowsWeight(FrozenWeight):
    """A frozen matrix (out, in) in float8_e4m3 with a scale for each row."""

    def dequantize(self, dtype: torch.dtype | None = None):
        """The matrix (out, in), computed at each call, in pieces of rows.

        It is rounded to the dtype of its scales, then to `dtype` (None: the checkpoint's).
        """
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        step = rows_per_piece(out)
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            exact = self.codes[rows].float() * self.scales[rows].float()
            out[rows] = exact.to(self.quant_format.scale_dtype)
        return out

    def dequantize_bytes(self, device, itemsize: int) -> int:
        """Memory that `dequantize` takes: the matrix, and the rows that are computed at once."""
        rows = min(rows_per_piece(self), self.shape[0])
        return itemsize * self.numel() + 8 * rows * self.shape[1]
