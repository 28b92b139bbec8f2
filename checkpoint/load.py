"""Load a decoder from a checkpoint folder, memory-mapped and strict; write it back.

Only safetensors and JSON are written. They are read, too, except for models that exist as
pytorch_model.bin alone. A tensor that is missing, unused, or of another shape is an error that
names it.

Requires: model.py, checkpoint/names.py, checkpoint/shards.py.
Next: checkpoint/packed.py (weights in 4 or 8 bits), checkpoint/adapters.py, merge.py.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the
tensors' bytes).
"""
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoint.block_files import METHODS, BlockParts, find_blocks
from checkpoint.files import open_tensors, stored_as, tensor_files, write_json, write_tensors
from checkpoint.names import equal_tensors, find_tensors
from checkpoint.read_config import read_config_json, read_model_config
from checkpoint.shards import (full_shape, full_size, full_tensor, local_tensor, own_part,
                               read_own)
from errors import nearest_name
from model import CausalLM, is_constant


# ---- reading ------------------------------------------------------------------------------------


def load_model(folder, dtype: torch.dtype | None = None, device="cpu", skip_weights: bool = False,
               quant_format=None) -> CausalLM:
    """Build the decoder of a checkpoint folder and fill it, tensor by tensor, on `device`.

    dtype: of the weights; None keeps the checkpoint's. On the CPU, unconverted weights stay
    memory-mapped. skip_weights: leave the model on the meta device, for counting and planning.
    quant_format: a methods.quant.QuantFormat; each linear layer is quantized as soon as it is read.
    What the files store quantized stays so, except in MXFP4 and in FP8 blocks, which are
    dequantized. Raises ValueError that names tensors which are missing,
    unused or of another shape than config.json says; FileNotFoundError for missing files.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    with torch.device("meta"):
        model = CausalLM(config)
    packed = packed_weights(folder)
    formats = weight_formats(model, packed, quant_format)
    if skip_weights:
        return empty_quantized(model, formats)

    for name, (file, stored) in with_bar(weight_files(model, folder, packed)):
        shape = model.get_parameter(name).shape
        part = packed.get(config.stored_name(name))
        if part and stays_quantized(part):
            check_shape(part.shape, shape, file, stored)
            set_quantized(model, name, part.read(device))
            continue
        if part:
            tensor = part.read(device, dtype)
        else:
            with open_tensors(file, device) as tensors:     # reopened: read pages leave the memory
                tensor = tensors.get_tensor(stored)
        check_plain(tensor.dtype, file, stored)
        check_shape(tensor.shape, shape, file, stored)
        tensor = tensor.to(dtype) if dtype and not is_constant(name) else tensor
        if name in formats:
            set_quantized(model, name, formats[name].quantize(tensor))
        else:
            assign(model, name, tensor)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def dense_skeleton(folder) -> CausalLM:
    """The decoder of a checkpoint on the meta device, unquantized however its files store it."""
    with torch.device("meta"):
        return CausalLM(read_model_config(folder)).eval()


def empty_model(folder: Path, dtype: torch.dtype | None = None) -> CausalLM:
    """The decoder of a checkpoint on the meta device, with the dtypes load_model would give it."""
    model = load_model(folder, skip_weights=True)
    packed = packed_weights(folder)
    for name, (file, stored) in weight_files(model, folder, packed).items():
        shape, stored_dtype = stored_as(file, stored)
        if part := packed.get(model.config.stored_name(name)):
            shape, stored_dtype = part.shape, part.quant_format.dtype
        check_shape(shape, model.get_parameter(name).shape, file, stored)
        assign(model, name, torch.empty(shape, dtype=dtype or stored_dtype, device="meta"))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@torch.no_grad()
def fill_model(model: CausalLM, folder: Path, trained: bool = True):
    """Read this process's part of every weight of a checkpoint. trained: also of trained ones."""
    packed = packed_weights(folder)
    files = weight_files(load_model(folder, skip_weights=True), folder, packed)
    files.setdefault("lm_head.weight", files["model.embed_tokens.weight"])  # a head tied no more
    for name, p in model.named_parameters():
        name = name.replace(".base_layer.", ".")                # of a layer beside an adapter
        if name in files and not p.is_meta and (trained or not p.requires_grad):
            file, stored = files[name]
            if part := packed.get(model.config.stored_name(name)):
                local_tensor(p).copy_(own_part(part.read("cpu"), p))
                continue
            with open_tensors(file) as tensors:
                local_tensor(p).copy_(read_own(tensors, stored, p))


def weight_files(model: CausalLM, folder, packed: dict = {}) -> dict[str, tuple[Path, str]]:
    """{name of a parameter: (its file, its name there)} in the files' order.

    packed: packed_weights of the folder. Raises as load_model does.
    """
    config = model.config
    expected = {config.stored_name(name): name          # a tied head appears once
                for name, _ in model.named_parameters()}
    places = places_of_weights(folder, config, expected, packed)
    scales = set()
    for weight in packed.values():
        scales.update(weight.parts.values())
    missing = [name for name in expected if name not in places]
    unused = [name for name, place in places.items() if name not in expected
              and place not in scales and not is_known_extra(name, config, places)]
    if missing or unused:
        head = config.stored_name("lm_head.weight")
        raise ValueError(mismatch_message(folder, missing, unused, head))
    return {expected[name]: place for name, place in places.items() if name in expected}


def places_of_weights(folder, config, expected: Iterable[str],
                 packed: dict) -> dict[str, tuple[Path, str]]:
    """find_tensors, with the codes of a quantized weight under the name of that weight."""
    names = {weight.parts["codes"]: name for name, weight in packed.items()}
    plain = [name for name in expected if name not in packed]
    return {names.get(place, name): place
            for name, place in find_tensors(folder, config, plain).items()}


def with_bar(files: dict):
    """The items, with a progress bar on a terminal, when loading takes more than a second."""
    return tqdm(files.items(), desc="loading weights", unit="tensor", leave=False, disable=None,
                delay=1)


def check_shape(found, expected, file, stored: str):
    """Raises ValueError for a tensor that has another shape in its file than in the model."""
    if tuple(found) != tuple(expected):
        raise ValueError(f"{file}: {stored} has shape {list(found)}, config.json makes it "
                         f"{list(expected)}")


def check_plain(dtype: torch.dtype, file, stored: str):
    """Raises ValueError for integers in place of a weight."""
    if not dtype.is_floating_point:
        raise ValueError(
            f"{file}: {stored} is stored as {str(dtype).removeprefix('torch.')}, without the "
            "scales that bitsandbytes writes beside such weights. Other ways of quantizing are "
            "not supported")


# what older tools stored beside the weights: tables of the rotation, and the value of masked scores
BUFFERS = re.compile(
    r".*\.(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|.*\.attn\.masked_bias")


def is_known_extra(name: str, config, places: dict) -> bool:
    """Whether a tensor that the decoder lacks may be left out.

    Buffers, parts that read images, and a tied head that equals the embedding. places: those of
    checkpoint.names.find_tensors.
    """
    if name.startswith(config.skips) or BUFFERS.fullmatch(name) or is_empty_bias(name, places):
        return True
    head = config.stored_name("lm_head.weight")
    if name != head or not config.tie_word_embeddings:
        return False
    embedding = config.stored_name("model.embed_tokens.weight")
    if equal_tensors(places[head], places[embedding]):
        return True
    raise ValueError(
        f"{places[name][0]}: {head} differs from {embedding}, but config.json says they are one "
        "(tie_word_embeddings: true). Set it to false to use both")


def is_empty_bias(name: str, places: dict) -> bool:
    """Whether this is a bias of zeros, which AutoGPTQ stored beside layers that have none."""
    layer = name.removesuffix(".bias")
    if layer == name or not any(f"{layer}.{part}" in places for part in ("qzeros", "scales")):
        return False
    file, key = places[name]
    with open_tensors(file) as tensors:
        return not tensors.get_tensor(key).any()


def assign(model: nn.Module, name: str, tensor, requires_grad: bool = False):
    """Make the tensor the model's parameter of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad))


def mismatch_message(source, missing: list, unused: list, head: str | None = None) -> str:
    """The message for tensors of a file that do not fit; head: the name of the head's matrix."""
    lines = [f"{source}: the tensors are not those that config.json describes."]
    for what, names in (("missing", missing), ("not used", unused)):
        if names:
            lines.append(f"  {what}: {len(names)}, such as {', '.join(names[:4])}")
    if missing == [head]:
        lines.append("  If the head is the embedding's matrix, config.json must say "
                     "tie_word_embeddings: true")
    elif missing and unused:
        nearest = nearest_name(missing[0], unused)
        if nearest:
            lines.append(f"  {missing[0]} may be what the file calls {nearest}")
    return "\n".join(lines)


# ---- weights in 4 or 8 bits ---------------------------------------------------------------------

# names beside a weight that is stored quantized
QUANTIZED_NAMES = re.compile(r".+\.(weight\..+|SCB|weight_format)")


def packed_weights(folder) -> dict:
    """{family's name of a weight: where it is stored quantized, and how}.

    By bitsandbytes a checkpoint.packed.Packed, by GPTQ, AWQ and compressed-tensors a
    checkpoint.grouped_files.GroupedParts or checkpoint.fp8_files.Fp8Parts; in MXFP4 and FP8 blocks
    a checkpoint.block_files.BlockParts. Raises ValueError with file and key for parts that are
    missing or unknown.
    """
    try:
        files = tensor_files(folder)
    except FileNotFoundError:                           # a config.json without weights
        return {}
    if grouped := grouped_weights(folder, files):
        return grouped
    if not any(map(QUANTIZED_NAMES.fullmatch, files)):
        return {}
    from checkpoint.packed import find_packed           # methods/quant.py may be absent

    return find_packed(folder, find_tensors(folder, read_model_config(folder)))


def grouped_weights(folder, files: dict) -> dict:
    """packed_weights of a folder by another program than bitsandbytes; {} for others."""
    named = any(name.endswith((".qweight", ".weight_packed")) for name in files)
    stored = read_config_json(folder).get("quantization_config")
    if not named and not stored:
        return {}
    if isinstance(stored, dict) and stored.get("quant_method") in METHODS:
        return find_blocks(folder, find_tensors(folder, read_model_config(folder)))
    if isinstance(stored, dict) and stored.get("format") == "float-quantized":
        from checkpoint.fp8_files import find_fp8                           # methods/ may be absent

        return find_fp8(folder, find_tensors(folder, read_model_config(folder)))
    from checkpoint.grouped_files import find_grouped, grouped_settings    # methods/ may be absent

    if not (settings := grouped_settings(folder)):
        return {}
    return find_grouped(folder, find_tensors(folder, read_model_config(folder)), settings)


def weight_formats(model: CausalLM, packed: dict, requested=None) -> dict:
    """{name of a parameter: QuantFormat} of all that is quantized.

    By the files or, where they store nothing that stays quantized, by the requested format.
    """
    staying = {name: part for name, part in packed.items() if stays_quantized(part)}
    if not staying:
        return dict.fromkeys(quantizable_weights(model), requested) if requested else {}
    stored_name = model.config.stored_name
    return {name: staying[stored_name(name)].quant_format for name, _ in model.named_parameters()
            if stored_name(name) in staying}


def stays_quantized(part) -> bool:
    """Whether a weight of packed_weights is as small in memory; else it is dequantized on load."""
    return not isinstance(part, BlockParts)


def quantizable_weights(model: nn.Module) -> list[str]:
    """Names of the weights that are quantized on load.

    Those of all linear layers but the head and routers, which are small and decide much. Stacks of
    matrices, embeddings and norms stay as they are.
    """
    return [f"{name}.weight" for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
            and not name.endswith(".mlp.gate")]


def set_quantized(model: nn.Module, name: str, weight: nn.Module):
    """Replace the nn.Linear whose weight has that name by the layer of a quantized weight."""
    path = name.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, weight.as_linear(model.get_submodule(path).bias))


def empty_quantized(model: nn.Module, formats: dict) -> nn.Module:
    """Replace these weights of a model on the meta device by quantized ones, without storage."""
    for name, quant_format in formats.items():
        set_quantized(model, name, quant_format.empty(model.get_parameter(name).shape))
    return model


def quantized_weights(model: nn.Module) -> dict[str, nn.Module]:
    """{name as of a parameter: its quantized weight}, in the model's order."""
    return {name: module for name, module in model.named_modules()
            if hasattr(module, "dequantize")}


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model; for quantized matrices the numbers they stand for."""
    weights = (*model.parameters(), *quantized_weights(model).values())
    return sum(map(full_size, weights))


def formats_in_words(formats: Iterable) -> str:
    """What is quantized, for the start page. formats: a QuantFormat for each matrix."""
    counts = {}
    for quant_format in formats:
        words = f"{quant_format.kind}, {quant_format.bits():.4g} bits a weight"
        counts[words] = counts.get(words, 0) + 1
    return "; ".join(f"{count} matrices in {words}" for words, count in counts.items())


# ---- writing ------------------------------------------------------------------------------------


def save_model(model: CausalLM, folder, source, dtype: torch.dtype | None = None):
    """Write all weights of a model (full fine-tuning) with the config.json of its source folder.

    dtype: None writes each tensor as it is held; config.json then states that of the first. What
    the source's files hold beside the decoder, a part that reads images, is copied.
    """
    stored_name = model.config.stored_name
    weights = {stored_name(name): p for name, p in model.named_parameters()}
    constants = {stored_name(name) for name, _ in model.named_parameters() if is_constant(name)}
    others = {}
    if model.config.skips and any(Path(source).glob("*.safetensors")):  # none from scratch
        for name, place in find_tensors(source, model.config).items():
            if name.startswith(model.config.skips):
                others[name] = place

    def read(name: str) -> list[torch.Tensor]:
        if name in weights:
            weight = weights[name]
            return [full_tensor(weight).to(shapes[name][1])]
        file, key = others[name]
        with open_tensors(file) as tensors:
            return [tensors.get_tensor(key)]

    shapes = {name: (full_shape(p), dtype or p.dtype) for name, p in weights.items()}
    shapes |= {name: (shapes[name][0], weights[name].dtype) for name in constants}
    for name, place in others.items():
        shapes[name] = stored_as(*place)
    write_tensors(folder, shapes, read)

    first_dtype = dtype or next(iter(weights.values())).dtype
    fields = read_config_json(source)
    fields.pop("dtype", None)
    fields.pop("quantization_config", None)             # of a source that is trained from scratch
    fields["torch_dtype"] = str(first_dtype).removeprefix("torch.")
    write_json(Path(folder) / "config.json", fields)
    generation = Path(source) / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, Path(folder) / generation.name)
