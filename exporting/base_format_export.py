"""export_format: base merges an adapter into a base of 8 or 4 bits and keeps the base's format.

Matrices that no adapter changes are copied bit for bit. The others are merged in float32 and
rounded once, one matrix at a time.

Requires: exporting/packed_export.py, exporting/block_export.py, checkpoint/requantize.py.
Next: exporting/export_formats.py.
"""
from collections.abc import Callable, Iterable
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.files import open_tensors, stored_as
from checkpoint.fp8_files import Fp8Parts
from checkpoint.grouped_files import GroupedParts
from checkpoint.load import formats_in_words, packed_weights, stays_quantized
from checkpoint.packed import Packed
from checkpoint.read_config import read_config_json
from checkpoint.requantize import requantize, state_length
from exporting.block_export import BlockExport
from exporting.export import Export
from exporting.packed_export import PackedExport


def open_base_format(base: Path) -> Export:
    """The export into the base's own format. Raises ValueError if the base is not quantized, or in
    a format that cannot be written."""
    stored = packed_weights(base)
    words = formats_in_words(weight.quant_format for weight in stored.values())
    if not stored:
        raise ValueError(f"export_format: base writes the format of a base in 8 or 4 bits, and "
                         f"{base} is not quantized; leave export_format out")
    if not any(map(stays_quantized, stored.values())):
        return BlockExport(next(iter(stored.values())).quant_format.kind, base)
    if all(isinstance(weight, Fp8Parts) for weight in stored.values()):
        return PackedExport("fp8", base)
    if not all(isinstance(weight, (GroupedParts, Packed)) for weight in stored.values()):
        raise ValueError(f"export_format: base does not write {words}; leave export_format out to "
                         "write the merged model in 16 bits")
    return BaseFormatExport(base)


class BaseFormatExport(PackedExport):
    """Writes tensors with the names, shapes and dtypes of the base."""

    by_rows = False

    def __init__(self, base: Path):
        super().__init__("base", base)

    def check_base(self):
        """Nothing to check: the base is in this format."""

    def tensors_of(self, shapes: dict) -> dict:
        """The parts of each matrix, named as in the base; also sets self.parts_of.

        parts_of: {matrix that an adapter changes: {tensor name: its part, such as codes}}.
        """
        found = {}
        self.matrix_of, self.copied, self.parts_of = {}, {}, {}
        for name, info in shapes.items():
            if name not in self.layers:
                found[name] = info
                continue
            stored = self.stored[name]
            layer = stored.parts["codes"][1].rpartition(".")[0] + "."       # in the base's files
            for part, (file, key) in stored.parts.items():
                written = name.removesuffix("weight") + key.removeprefix(layer)
                found[written] = stored_as(file, key)
                if not self.plan[name].changes:
                    self.copied[written] = file, key
                    continue
                if part == "state":
                    found[written] = (state_length(stored),), torch.uint8
                self.matrix_of[written] = name
                self.parts_of.setdefault(name, {})[written] = part
        return found

    def rows_of(self, name: str, read: Callable) -> Iterable[torch.Tensor]:
        if name in self.matrix_of and name not in self.ready:
            self.make_parts(self.matrix_of[name], read)
        return super().rows_of(name, read)

    def make_parts(self, matrix_name: str, read: Callable):
        """Round a merged matrix. Parts that do not depend on its values are copied."""
        stored = self.stored[matrix_name]
        new = requantize(stored, torch.cat(list(read(matrix_name))).cpu())
        for written, part in self.parts_of[matrix_name].items():
            if part in new:
                shape, dtype = self.tensors[written]
                packed = new[part].contiguous().flatten().view(dtype).view(shape)
                self.ready[written] = [packed]
                continue
            file, key = stored.parts[part]
            with open_tensors(file) as tensors:
                self.ready[written] = [tensors.get_tensor(key)]

    def settings(self) -> dict:
        return read_config_json(self.base).get("quantization_config") or {}

    def report(self) -> str:
        rounded = len(set(self.matrix_of.values()))
        return (f"{'base':10}{rounded} matrices rounded again, in the base's format; "
                f"{len(self.layers) - rounded} that no adapter changes are copied, bit for bit")
