"""A checkpoint in 8 or 4 bits, rounded to the nearest: export_format fp8, w4a16 and bnb-nf4.

Matrices are merged, rounded and written one after the other. The sum of base and adapter is
float32, so that it is rounded once.

Requires: exporting/export.py, checkpoint/write_compressed.py, checkpoint/write_bnb.py.
Next: exporting/export_formats.py; exporting/block_export.py, for bases in MXFP4 and in FP8 blocks.
"""
import re
from collections.abc import Callable, Iterable
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.files import open_tensors, stored_as
from checkpoint.fp8_files import Fp8Parts
from checkpoint.load import (formats_in_words, load_model, packed_weights, quantizable_weights,
                             stays_quantized)
from checkpoint.read_config import read_config_json
from checkpoint.write_bnb import NF4, bnb_fields, bnb_parts, pack_bnb
from checkpoint.write_compressed import (FORMATS, GROUP_SIZE, compress, compressed_fields,
                                         compressed_parts)
from exporting.export import Export, check_stored


CODES = {"fp8": "weight", "w4a16": "weight_packed", "bnb-nf4": "weight"}    # of a layer's tensors


class PackedExport(Export):
    """Rounds the linear layers; of a base in the same format, those that it holds so.

    layers: {name in the plan of a matrix that is rounded: dtype it is stored for}. copied: {name of
    a tensor: (file, its name there)} of such matrices that no adapter changes.
    """

    verb = "quantizing"

    def __init__(self, kind: str, base: Path):
        self.kind = kind
        self.base = base
        self.model = load_model(base, skip_weights=True)
        self.stored = self.stored_weights(packed_weights(base))
        self.ready = {}                 # {name in the new files: blocks} of the matrix just read
        self.check_base()

    def check_base(self):
        """Raises ValueError for a base that the export cannot write."""
        check_same_format(self.kind, self.base, self.stored)

    def stored_weights(self, packed: dict) -> dict:
        """The packed_weights that keep their format in the export."""
        return {name: part for name, part in packed.items() if stays_quantized(part)}

    def set_plan(self, plan, untied, dtype):
        stored_name = self.model.config.stored_name
        wanted = self.stored or {stored_name(name) for name in quantizable_weights(self.model)}
        self.layers = {name: plan[name].dtype for name in plan if name in wanted and (
            self.stored or self.kind != "w4a16" or not plan[name].shape[1] % GROUP_SIZE)}
        self.skipped = sorted(set(wanted) - self.layers.keys())
        if not self.layers:
            raise ValueError(
                f"export_format: {self.kind}: no linear layer has inputs in groups of "
                f"{GROUP_SIZE}; take bnb-nf4 or fp8")
        for name in self.layers:
            plan[name].dtype = torch.float32
        super().set_plan(plan, untied, dtype)

    def tensors_of(self, shapes: dict) -> dict:
        """The parts of each matrix in its place; also sets self.matrix_of, {part: name}."""
        found = {}
        self.matrix_of = {}
        self.copied = {}
        for name, info in shapes.items():
            stem = name.removesuffix("weight")
            if name not in self.layers:
                found[name] = info
            elif name in self.stored and not self.is_changed(name):
                parts = self.stored[name].parts
                layer = parts["codes"][1].removesuffix(self.codes)          # in the base's files
                for file, key in parts.values():
                    part = stem + key.removeprefix(layer)
                    found[part] = stored_as(file, key)
                    self.copied[part] = file, key
            else:
                for part, part_info in self.parts(name).items():
                    found[stem + part] = part_info
                    self.matrix_of[stem + part] = name
        return found

    def is_changed(self, name: str) -> bool:
        """Whether an adapter changes a matrix, or training quantized it again."""
        return bool(self.plan[name].changes or self.plan[name].quant_format)

    @property
    def by_rows(self) -> bool:
        """Whether each row has scales of its own: blocks of rows are then rounded by threads."""
        return self.kind in FORMATS

    @property
    def codes(self) -> str:
        """Suffix of the codes' tensor after the layer's name."""
        return CODES[self.kind]

    def parts(self, name: str) -> dict:
        """{name after the layer's: (shape, dtype)} of the tensors that hold a matrix."""
        shape, dtype = self.plan[name].shape, self.layers[name]
        if self.kind == "bnb-nf4":
            return bnb_parts(shape, dtype)
        return compressed_parts(self.kind, shape, dtype)

    def pack(self, name: str, blocks: Iterable) -> dict[str, list[torch.Tensor]]:
        """The tensors of `parts` in blocks of rows. blocks: those of encode, of a whole matrix."""
        if not self.by_rows:
            rows = [block.reshape(-1, block.shape[-1]) for block in blocks]
            matrix = torch.cat(rows).view(self.plan[name].shape)
            return {part: [tensor] for part, tensor in self.pack_matrix(name, matrix).items()}
        blocks = list(blocks)
        parts = {part: [block[part] for block in blocks] for part in blocks[0]}
        if self.kind == "w4a16":
            parts["weight_shape"] = [torch.tensor(self.plan[name].shape)]
        return parts

    def pack_matrix(self, name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of `parts` for a matrix (out, in), float32."""
        return pack_bnb(matrix, self.layers[name])

    def encode(self, name: str, rows: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Round rows of a matrix, where each row has scales of its own."""
        if name not in self.layers:
            return rows
        check_stored(name, rows, rows)                  # NaN would be rounded to any code
        return compress(self.kind, rows, self.layers[name]) if self.by_rows else rows

    def sources(self) -> Iterable[str]:
        return dict.fromkeys(self.matrix_of.get(name, name) for name in self.tensors
                             if name not in self.copied)

    def rows_of(self, name: str, read: Callable) -> Iterable[torch.Tensor]:
        if name in self.copied:
            file, key = self.copied[name]
            with open_tensors(file) as tensors:
                return [tensors.get_tensor(key)]
        if name not in self.matrix_of:
            return read(name)
        if name not in self.ready:
            matrix_name = self.matrix_of[name]
            stem = matrix_name.removesuffix("weight")
            self.ready = {stem + part: blocks for part, blocks in
                          self.pack(matrix_name, read(matrix_name)).items()}
        return self.ready.pop(name)

    def settings(self) -> dict:
        if self.stored:
            return read_config_json(self.base)["quantization_config"]
        head = self.model.config.stored_name("lm_head")
        skipped = sorted({in_any_block(name.removesuffix(".weight")) for name in self.skipped})
        routers = {in_any_block(self.model.config.stored_name(name.removesuffix(".weight")))
                   for name, _ in self.model.named_parameters()
                   if name.endswith(".mlp.gate.weight")}
        if self.kind == "bnb-nf4":
            return bnb_fields(next(iter(self.layers.values())), [head])
        return compressed_fields(self.kind, [head, *skipped, *sorted(routers)])

    def finish(self, folder: Path, fields: dict):
        """Also read the matrices with our own reader. Raises OSError."""
        super().finish(folder, fields)
        found = packed_weights(folder)
        if found.keys() != self.layers.keys():
            raise OSError(f"{folder}: {len(found)} matrices are read as quantized, "
                          f"{len(self.layers)} were written. Is the disk damaged?")

    def report(self) -> str:
        rounded = len(set(self.matrix_of.values()))
        text = f"{self.kind:10}{rounded} matrices, rounded to the nearest"
        if self.copied:
            text += (f"; {len(self.layers) - rounded} that no adapter changes are copied, bit for "
                     "bit")
        if self.skipped:
            text += (f"; {len(self.skipped)} linear layers whose inputs are not in groups of "
                     f"{GROUP_SIZE} stay as they are, such as {self.skipped[0]}")
        return text


def check_same_format(kind: str, base: Path, stored: dict):
    """Raises ValueError for a base that is quantized in another format than the export."""
    if not stored:
        return
    words = formats_in_words(weight.quant_format for weight in stored.values())
    formats = {weight.quant_format for weight in stored.values()}
    same = {
        "fp8": all(isinstance(weight, Fp8Parts) for weight in stored.values()),
        "w4a16": all(form.kind == "4-bit compressed-tensors" and form.group_size == GROUP_SIZE
                     and not form.with_columns for form in formats),
        "bnb-nf4": all(form.kind == NF4.kind and form.blocksize == NF4.blocksize
                       and form.nested == NF4.nested for form in formats),
    }
    if not same[kind]:
        fitting = [*(name for name, fits in same.items() if fits), "base"]
        raise ValueError(f"export_format: {kind}, but {base} is stored in another format ({words}):"
                         f" take export_format: {fitting[0]}, which merges into that one, or name "
                         "the 16-bit checkpoint it was made from")


def in_any_block(name: str) -> str:
    """A pattern for this layer of every block; a name outside of blocks is itself."""
    if not re.search(r"\.\d+\.", name):
        return name
    return "re:" + re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) + "$"
