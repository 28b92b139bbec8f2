"""A GGUF file of a model with its adapters merged: merge.py with export_format: gguf.

Requires: checkpoint/gguf_tensors.py, checkpoint/gguf_tokenizer.py, exporting/export.py.
Next: merge.py.
"""
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.gguf_graphs import find_graph, graph_metadata, llama3_divisors
from checkpoint.gguf_tensors import graph_tensors
from checkpoint.gguf_tokenizer import tokenizer_metadata
from checkpoint.load import dense_skeleton
from checkpoint.value_head import VALUE_HEAD
from checkpoint.write_gguf import NUMBER_TYPES, check_gguf, padded, tensor_bytes, write_gguf
from exporting.export import Export
from settings.config import Config
from text.load_text import eos_ids_of
from text.tokenizer import load_tokenizer
from text.vocabularies import find_vocabulary

KEPT = ("*.gguf", "LICENSE*", "NOTICE*", "USE_POLICY*")
DIVISORS = "rope_freqs.weight"


class GGUFExport(Export):
    """tensors: {name in the file: (shape, number type)}."""

    verb = "writing"

    def __init__(self, config: Config, base: Path):
        self.model = dense_skeleton(base)
        find_graph(self.model.config)                       # before anything is read
        self.base = base
        self.name = Path(config.export_dir).resolve().name
        self.number_type = config.gguf_type
        self.pretokenizer = config.gguf_pretokenizer
        self.held = ("", None)                              # a matrix of several tensors

    def set_plan(self, plan, untied, dtype):
        """Choose graph and tensors; sums of the merge are rounded once, as the file stores them."""
        for tensor in plan.values():
            if self.number_type is None:                    # as the base: bf16, else f16
                self.number_type = "bf16" if tensor.dtype == torch.bfloat16 else "f16"
            tensor.dtype = torch.float32
        if untied:
            self.model.config = replace(self.model.config, tie_word_embeddings=False)
        self.graph = find_graph(self.model.config)
        super().set_plan(plan, untied, dtype)

    def tensors_of(self, shapes: dict) -> dict:
        """All tensors of the file; also sets self.made, how each is made."""
        config = self.model.config
        parameters = {}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            tied = name == "lm_head.weight" and config.tie_word_embeddings
            if not tied:
                parameters[name] = shapes[config.stored_name(name)][0]
        self.made = graph_tensors(self.graph, config, parameters, self.number_type)
        self.divisors = llama3_divisors(config)
        tensors = {name: (made.shape, made.number_type) for name, made in self.made.items()}
        if self.divisors is not None:
            tensors[DIVISORS] = (tuple(self.divisors.shape), "f32")
        return tensors

    def sources(self) -> Iterator[str]:
        last = ""
        for made in self.made.values():
            for source in made.sources:
                if made.rows is None or source != last:     # else the matrix is held
                    yield self.model.config.stored_name(source)
                last = source

    def nbytes(self) -> int:
        return sum(padded(tensor_bytes(*info)) for info in self.tensors.values())

    def rows_of(self, name: str, read: Callable) -> Iterator[torch.Tensor]:
        if name == DIVISORS:
            yield self.divisors
            return
        made = self.made[name]
        for source in made.sources:
            blocks = read(self.model.config.stored_name(source)) if made.rows is None else [
                self.whole(source, read)[made.rows]]
            for rows in blocks:
                yield made.from_rows(rows)

    def whole(self, source: str, read: Callable) -> torch.Tensor:
        """A matrix that several tensors are made of; it is read once."""
        if self.held[0] != source:
            blocks = read(self.model.config.stored_name(source))
            self.held = (source, torch.cat([block.cpu() for block in blocks]))
        return self.held[1]

    def write(self, folder: Path, read: Callable, shard_bytes: int, progress: Callable):
        """One file: llama.cpp maps it into memory, however large it is."""
        if (folder / VALUE_HEAD).is_file():
            raise ValueError("export_format: gguf: this is a reward model, whose value head "
                             "llama.cpp does not have; leave export_format out")
        self.path = folder / f"{self.name}-{self.number_type.upper()}.gguf"
        self.metadata = {
            "general.architecture": self.graph.arch,
            "general.name": self.name,
            **self.further_metadata(folder)}
        self.header = write_gguf(self.path, self.metadata, self.tensors,
                                 lambda name: self.rows_of(name, read), progress)

    def further_metadata(self, folder: Path) -> dict:
        """What is specific to a model."""
        return {
            "general.file_type": NUMBER_TYPES[self.number_type].file_code,
            "general.quantization_version": 2,
            **graph_metadata(self.graph, self.model.config),
            **self.text_metadata(folder)}

    def text_metadata(self, folder: Path) -> dict:
        """The tokenizer section, of the tokenizer in the new folder."""
        if not (folder / "tokenizer.json").is_file() and not find_vocabulary(folder):
            print("note      no tokenizer beside the weights: the file has none, either")
            return {"tokenizer.ggml.model": "none"}
        tokenizer = load_tokenizer(folder)
        tokenizer.source = self.base                        # its name in messages
        stop_ids = eos_ids_of(folder) if (folder / "generation_config.json").is_file() else set()
        return tokenizer_metadata(tokenizer, self.model.config.vocab_size, stop_ids,
                                  self.pretokenizer)

    def finish(self, folder: Path, fields: dict):
        """Leave the file and licenses alone in the folder. Raises OSError for a damaged file."""
        check_gguf(self.path, self.header, self.tensors)
        for file in folder.iterdir():
            if not any(fnmatch(file.name, pattern) for pattern in KEPT):
                file.unlink()

    def report(self) -> str:
        """What the file is, and how to make it smaller."""
        text = f"gguf      {self.path.name}: graph {self.graph.arch}"
        odd = [name for name, (_, kind) in self.tensors.items()
               if kind not in (self.number_type, "f32", "q8_0")]
        if odd:
            text += (f"; {len(odd)} matrices whose rows are no multiples of 32 numbers are "
                     f"f16, such as {odd[0]}")
        length = self.metadata[f"{self.graph.arch}.context_length"]
        if length < self.model.config.max_position_embeddings:
            text += (f"\n          its context ends at {length:,} tokens: beyond, the graph lacks "
                     "the model's sliding window or its scaling of positions")
        if self.number_type in ("f32", "f16", "bf16"):
            smaller = re.sub(r"-[A-Z0-9]+\.gguf$", "-Q4_K_M.gguf", self.path.name)
            command = shlex.join(["llama-quantize", self.path.name, smaller, "Q4_K_M"])
            text += f"\n          K-quants, by llama.cpp's own program: {command}"
        return text
