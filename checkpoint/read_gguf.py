"""Read back a GGUF file that merge.py has written, as the decoder of its base: to compare losses.

Requires: checkpoint/write_gguf.py, checkpoint/gguf_tensors.py, checkpoint/load.py.
Next: evals/compare.py.
Layout: see checkpoint/write_gguf.py.
"""
import struct
from dataclasses import replace
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.gguf_graphs import find_graph
from checkpoint.gguf_tensors import graph_tensors
from checkpoint.load import assign, dense_skeleton
from checkpoint.write_gguf import BLOCK_NUMBERS, NUMBER_TYPES, PLAIN, padded, tensor_bytes

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}   # of values, bytes
TEXT, ARRAY = 8, 9
TYPE_NAMES = {kind.code: name for name, kind in NUMBER_TYPES.items()}


@torch.no_grad()
def load_gguf(path: Path, base: Path, device="cpu"):
    """The base's decoder with the numbers of a file, float32. Raises ValueError for another model.

    base: the checkpoint folder that says what the decoder is.
    """
    model = dense_skeleton(base)
    stored, start = read_tensor_list(path)
    if model.config.tie_word_embeddings and "output.weight" in stored:      # an adapter changed it
        model.config = replace(model.config, tie_word_embeddings=False)
        assign(model, "lm_head.weight", torch.empty_like(model.lm_head.weight))
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    made = graph_tensors(find_graph(model.config), model.config, parameters, "f32")
    missing = made.keys() - stored.keys()
    if missing:
        raise ValueError(f"{path} has no tensor {min(missing)}; is it a model of {base}?")
    for name, tensor in made.items():
        if stored[name][0] != tensor.shape:
            raise ValueError(f"{path}: {name} has shape {list(stored[name][0])}, and "
                             f"{list(tensor.shape)} by the config.json of {base}; is it another "
                             "model?")
    for name, shape in parameters.items():
        assign(model, name, torch.empty(shape, device=device))
    for name, tensor in made.items():
        numbers = tensor.to_rows(numbers_in_file(path, start, *stored[name]).to(device))
        for i, source in enumerate(tensor.sources):
            weight = model.get_parameter(source)
            part = numbers[i] if len(tensor.sources) > 1 else numbers
            if tensor.rows is None:
                weight.copy_(part.view(weight.shape))
            else:
                weight[tensor.rows.to(device)] = part
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def read_tensor_list(path: Path) -> tuple[dict, int]:
    """({name: (shape, number type, offset)}, where the tensors' bytes begin).

    Raises ValueError for a damaged file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        def take(count):
            if count > size - file.tell():      # a count that is damaged may be huge
                raise ValueError(damaged(path))
            return file.read(count)

        def number(form):
            return struct.unpack("<" + form, take(struct.calcsize("<" + form)))[0]

        def text():
            return take(number("Q")).decode("utf-8", errors="replace")

        def skip(kind):
            if kind == TEXT:
                text()
            elif kind == ARRAY:
                inner, count = number("I"), number("Q")
                for _ in range(count):
                    skip(inner)
            elif kind in SIZES:
                take(SIZES[kind])
            else:
                raise ValueError(damaged(path))

        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file")
        number("I")                             # the version
        tensors, metadata = number("Q"), number("Q")
        for _ in range(metadata):
            text()
            skip(number("I"))
        found = {}
        for _ in range(tensors):
            name = text()
            shape = tuple(number("Q") for _ in range(number("I")))[::-1]
            code, offset = number("I"), number("Q")
            if code not in TYPE_NAMES:
                raise ValueError(f"{path}: {name} has numbers of ggml's type {code}; read are "
                                 f"{', '.join(NUMBER_TYPES)}")
            found[name] = shape, TYPE_NAMES[code], offset
        return found, padded(file.tell())


def damaged(path: Path) -> str:
    """The message for a file that cannot be read."""
    return f"{path} is damaged or incomplete: export it again, or use another copy"


def numbers_in_file(path: Path, start: int, shape: tuple, number_type: str,
                 offset: int) -> torch.Tensor:
    """A tensor of the file, float32. Raises ValueError for a file that ends before it."""
    with open(path, "rb") as file:
        file.seek(start + offset)
        numbers = file.read(tensor_bytes(shape, number_type))
    if len(numbers) < tensor_bytes(shape, number_type):
        raise ValueError(damaged(path))
    stored = torch.frombuffer(bytearray(numbers), dtype=torch.uint8)
    if number_type in PLAIN:
        return stored.view(PLAIN[number_type]).float().view(shape)
    blocks = stored.view(-1, NUMBER_TYPES[number_type].nbytes)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()             # (blocks, 1)
    codes = blocks[:, 2:]
    if number_type == "q4_0":
        codes = torch.cat([codes & 15, codes >> 4], 1).float() - 8
    else:
        codes = codes.contiguous().view(torch.int8).float()
    assert codes.shape[1] == BLOCK_NUMBERS
    return (codes * scales).view(shape)
