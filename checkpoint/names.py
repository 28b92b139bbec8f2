"""The names under which a checkpoint's files hold the tensors of its decoder.

transformers accepts more names than it writes, and so do we: a base model that was saved without
its head lacks the prefix `model.`, a wrapped one has a prefix too many, and a tied model may keep
its one matrix under the name of the head alone. Everything else in the program speaks of the
family's names (families.py).

Requires: checkpoint/files.py.
Next: checkpoint/load.py.
"""
from collections.abc import Iterable
from pathlib import Path

import torch

from checkpoint.files import names_in_order, open_tensors, tensor_files
from families import ModelConfig


def find_tensors(folder, config: ModelConfig,
                 needed: Iterable[str] = ()) -> dict[str, tuple[Path, str]]:
    """{the family's name of a tensor: (file, its name there)} of a folder, in the files' order.

    needed: names that are looked for in the files, too, where the index leaves them out. Raises
    ValueError for two tensors of one name.
    """
    files = tensor_files(folder)
    found = named_for_family(files, config)
    head = config.stored_name("lm_head.weight")
    embedding = config.stored_name("model.embed_tokens.weight")
    missing = set(needed) - found.keys()
    if config.tie_word_embeddings:
        missing.discard(head)
    if missing:
        found = named_for_family(files | unlisted(files), config)
    if config.tie_word_embeddings and head in found and embedding not in found:
        return {embedding if name == head else name: place for name, place in found.items()}
    return found


def unlisted(files: dict[str, Path]) -> dict[str, Path]:
    """{name: file} of what these files hold beside the names in `files`."""
    return {name: file for file in dict.fromkeys(files.values())
            for name in names_in_order(file) if name not in files}


def named_for_family(files: dict[str, Path], config: ModelConfig) -> dict[str, tuple[Path, str]]:
    """{the family's name: (file, name there)} of {name there: file}."""
    prefix, inside, outside = first_parts(config)
    found = {}
    for key, file in files.items():
        name = family_name(key, prefix, inside, outside)
        if name in found:
            other, other_key = found[name]
            raise ValueError(f"{file}: {key} and {other_key} (in {other.name}) are both {name}. "
                             "Were two models written into one folder? Fetch it again")
        found[name] = (file, key)
    return found


def first_parts(config: ModelConfig) -> tuple[str, set[str], set[str]]:
    """(the base model's prefix, first name parts inside of it, first name parts of all tensors).

    ("model.", {"embed_tokens", "layers", "norm"}, {"model", "lm_head"}) for Llama.
    """
    stored = [config.stored_name(f"{name}.weight")
              for name in ("model.embed_tokens", "model.layers", "model.norm", "lm_head")]
    outside = {name.partition(".")[0] for name in (*stored, *config.skips)}
    prefix = stored[0].removeprefix(config.prefix).partition(".")[0] + "."
    if config.prefix:                       # what lacks `language_model.` is another model
        return prefix, set(), outside
    inside = {name.removeprefix(prefix).partition(".")[0] for name in stored
              if name.startswith(prefix)}
    return prefix, inside, outside


def family_name(key: str, prefix: str, inside: set[str], outside: set[str]) -> str:
    """The name of a tensor with the prefix added or taken off, as transformers does."""
    if key.partition(".")[0] in inside - outside:
        return prefix + key
    # language_model: a text part that was saved as part of a model that reads images
    for wrapper in (prefix, "language_model."):
        rest = key.removeprefix(wrapper)
        if rest != key and rest.partition(".")[0] in outside:
            return rest
    return key


def equal_tensors(a: tuple[Path, str], b: tuple[Path, str]) -> bool:
    """Whether two tensors of files, each (file, name), are equal."""
    with open_tensors(a[0]) as first, open_tensors(b[0]) as second:
        return torch.equal(first.get_tensor(a[1]), second.get_tensor(b[1]))
