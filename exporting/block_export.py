"""Merging into a base in MXFP4 or FP8 blocks, written in the base's own format.

merge.py does this by default for such a base. Matrices that no adapter changes are copied bit for
bit; the others are merged in float32 and rounded once. infer_dtype: bfloat16 writes 16 bits.

Requires: exporting/packed_export.py, checkpoint/block_files.py.
Next: exporting/export_formats.py.
"""
from pathlib import Path

import torch

from checkpoint.block_files import SUFFIXES, BlockParts
from exporting.packed_export import PackedExport


class BlockExport(PackedExport):
    """Rounds the changed matrices of a base in MXFP4 or in FP8 blocks, and copies the others."""

    verb = "merging"
    by_rows = False

    def __init__(self, kind: str, base: Path):
        super().__init__(kind, base)
        self.error = 0.0                # sum of squared rounding errors
        self.size = 0.0                 # sum of squares of the merged matrices

    def check_base(self):
        """Nothing to check: the base is in this format."""

    def stored_weights(self, packed: dict) -> dict[str, BlockParts]:
        return packed

    @property
    def codes(self) -> str:
        return SUFFIXES[self.kind][0]

    def parts(self, name: str) -> dict:
        return self.stored[name].file_parts()

    def pack_matrix(self, name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        part = self.stored[name]
        packed = part.pack(matrix)
        rounded = part.unpack(*packed.values(), torch.float32)
        self.error += float((rounded - matrix).square().sum())
        self.size += float(matrix.square().sum())
        return packed

    def report(self) -> str:
        rounded = len(set(self.matrix_of.values()))
        text = f"{self.kind:10}{len(self.layers) - rounded} weights that no adapter changes are " \
               "copied, bit for bit"
        if rounded:
            text += (f"; {rounded} merged ones are rounded, relative error "
                     f"{(self.error / self.size)**0.5:.2%} (infer_dtype: bfloat16 writes 16 "
                     "bits instead)")
        return text
