"""An adapter alone as a GGUF file: merge.py with export_format: gguf-lora.

llama.cpp adds alpha / r * B A to the matrices of a GGUF file of the base, whatever its numbers:
llama-cli -m base-Q4_K_M.gguf --lora mine-LORA-F32.gguf. The rows of B are cut and reordered like
those of the matrix they change.

Requires: exporting/gguf_export.py.
Next: exporting/export_formats.py.
Paper: LoRA arXiv:2106.09685.
"""
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.gguf_tensors import GraphTensor
from exporting.gguf_export import GGUFExport
from exporting.merge_plan import Change
from settings.config import Config

PARTS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}


class GGUFLoRAExport(GGUFExport):
    """tensors: {name of a matrix in the base's file, and .lora_a or .lora_b: (shape, type)}."""

    def __init__(self, config: Config, base: Path, adapters: list[Path]):
        if len(adapters) != 1:
            raise ValueError(
                f"export_format: gguf-lora writes one adapter, and {len(adapters)} are named; "
                "llama.cpp takes several files, so export each alone")
        super().__init__(config, base)
        self.adapter = adapters[0]
        self.number_type = config.gguf_type or "f32"
        if self.number_type not in ("f32", "f16", "bf16"):
            raise ValueError(f"gguf_type: {self.number_type}, but an adapter has f32, f16 or bf16")
        self.name += "-LORA"

    def tensors_of(self, shapes: dict) -> dict:
        """A and B of every matrix that the adapter changes; also sets self.pairs."""
        super().tensors_of(shapes)
        stored_name = self.model.config.stored_name
        changed = {name for name, tensor in self.plan.items() if tensor.changes}
        self.pairs = {}                 # {name in the file: (A, B), float32}
        self.alpha = None
        missing = set(changed)
        for name, made in self.made.items():
            sources = [stored_name(source) for source in made.sources]
            if found := changed.intersection(sources):
                if self.graph.mixer == "latent attention" and is_unread(name):
                    raise ValueError(
                        f"export_format: gguf-lora: llama.cpp's graph {self.graph.arch} does not "
                        f"add an adapter to {min(found)}; take export_format: gguf, which merges "
                        "it")
                self.pairs[name] = self.pair_of(made, sources)
            missing.difference_update(sources)
        if missing or self.untied:
            name = min(missing, default="the head")
            raise ValueError(f"export_format: gguf-lora: {name} of {self.adapter} has no "
                             "matrix of its own in the base's file; take export_format: gguf")
        tensors = {}
        for name, pair in self.pairs.items():
            for part, matrix in zip(PARTS, pair):
                tensors[f"{name}.{part}"] = (tuple(matrix.shape), self.number_type)
        return tensors

    def pair_of(self, made: GraphTensor, sources: list[str]) -> tuple:
        """A and B of a matrix of the base's file; of experts, one after the other."""
        pairs = []
        for source in sources:
            changes = self.plan[source].changes
            if len(changes) != 1 or made.normalized or not is_plain(changes[0]):
                raise ValueError(
                    f"export_format: gguf-lora: llama.cpp adds B A to a matrix and nothing else, "
                    f"and {self.adapter} changes {source} in another way (trained whole, DoRA, "
                    "PiSSA, OFT, or some experts alone); take export_format: gguf, which merges it")
            A, B = self.scaled_pair(changes[0])
            pairs.append((A, B if made.rows is None else B[made.rows]))
        if len(pairs) > 1:
            return tuple(torch.stack(matrices) for matrices in zip(*pairs))
        return pairs[0][0], pairs[0][1] * made.factor

    def scaled_pair(self, change: Change) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r), scaled so that one alpha holds for all of the file."""
        A, B = (change.read(part).float() for part in ("lora_A", "lora_B"))
        alpha = change.scale * len(A)
        self.alpha = self.alpha or alpha
        return A, B * (alpha / self.alpha)

    def sources(self) -> Iterator[str]:
        """The base is not read."""
        return iter(())

    def rows_of(self, name: str, read: Callable) -> Iterator[torch.Tensor]:
        matrix, part = name.rsplit(".", 1)
        yield self.pairs[matrix][list(PARTS).index(part)]

    def further_metadata(self, folder: Path) -> dict:
        """What is specific to an adapter."""
        return {"general.type": "adapter", "adapter.type": "lora",
                "adapter.lora.alpha": float(self.alpha)}

    def report(self) -> str:
        """How the file is used."""
        return (f"gguf      {self.path.name}: for a file of this base (graph {self.graph.arch}): "
                f"llama-cli -m BASE.gguf --lora {shlex.quote(self.path.name)}")


def is_unread(name: str) -> bool:
    """Whether a graph with latent attention multiplies by this matrix without its adapter."""
    return "attn_" in name and "attn_output" not in name or name == "output.weight"


def is_plain(change: Change) -> bool:
    """Whether a change is scale * B A of one matrix."""
    return change.kind == "lora" and not (change.has_magnitude or change.swapped)
