"""Load a decoder from a checkpoint folder, memory-mapped and strict; write it back.

Only safetensors and JSON are written. They are read, too, except for models that exist as
pytorch_model.bin alone. A tensor that is missing, unused, or of another shape is an error that
names it.

Requires: model.py, checkpoint/files.py, methods/quant.py.
Next: checkpoint/adapters.py, merge.py.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the
tensors' bytes).
"""
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoint.files import (
    DTYPES,
    open_tensors,
    stored_as,
    tensor_files,
    write_json,
    write_tensors,
)
from errors import nearest_name
from families import model_config, read_config_json
from methods.optimizers import OF_OTHER_SHAPES
from methods.quant import (
    QuantFormat,
    QuantizedWeight,
    quantizable_weights,
    empty_quantized,
    format_of_state,
    quantize,
    quantized_from,
    set_quantized,
)
from model import CausalLM

# what resuming needs
STATE_FILES = ("optimizer.safetensors", "rng.safetensors", "trainer_state.json")


# ---- reading -------------------------------------------------------------------------------------
# ---------------


def load_model(
    folder,
    dtype: torch.dtype | None = None,
    device="cpu",
    skip_weights: bool = False,
    form: QuantFormat | None = None,
) -> CausalLM:
    """Build the decoder of a checkpoint folder and fill it, tensor by tensor, straight onto
    `device`.

    dtype: torch dtype of the weights; None keeps the checkpoint's. On the CPU, unconverted weights
    stay memory-mapped.
    skip_weights: leave the model on the meta device (counting, planning). form: quantise the linear
    layers, each as soon as it is read; what is stored quantised stays so. Raises ValueError that
    names tensors which are missing, unused or of another shape than config.json says;
    FileNotFoundError for missing files."""
    folder = Path(folder)
    config = model_config(read_config_json(folder), str(folder / "config.json"))
    with torch.device("meta"):
        model = CausalLM(config)
    if skip_weights:
        return empty_quantized(model, base_forms(model, folder, form))
    packed = packed_weights(folder)
    wanted = () if packed or not form else set(quantizable_weights(model))
    for name, (file, stored) in with_bar(weight_files(model, folder)):
        if stored in packed:
            check_shape(packed[stored].shape, model.get_parameter(name).shape, file, stored)
            set_quantized(model, name, read_packed(packed[stored], device))
            continue
        # opened anew: what was read before may leave the memory
        with open_tensors(file, device) as tensors:
            tensor = tensors.get_tensor(stored)
        check_plain(tensor.dtype, file, stored)
        check_shape(tensor.shape, model.get_parameter(name).shape, file, stored)
        tensor = tensor.to(dtype) if dtype else tensor
        if name in wanted:
            set_quantized(model, name, quantize(tensor, form))
        else:
            assign(model, name, tensor)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def weight_files(model: CausalLM, folder) -> dict[str, tuple[Path, str]]:
    """{name of a parameter: its file, its name there} in the files' order.

    Raises as load_model does.
    """
    files, config = tensor_files(folder), model.config
    beside = {key for packed in packed_weights(folder).values() for _, key in packed.parts.values()}
    # a tied head: once
    expected = {config.stored_name(name): name for name, _ in model.named_parameters()}
    unused = [
        name
        for name in files
        if name not in expected and name not in beside and not known_extra(name, config, files)
    ]
    missing = [name for name in expected if name not in files]
    if unused or missing:
        raise ValueError(_mismatch(folder, missing, unused, config.stored_name("lm_head.weight")))
    return {expected[name]: (file, name) for name, file in files.items() if name in expected}


def with_bar(files: dict):
    """The items, with a bar that shows itself only where someone watches and the load takes longer
    than a second.
    """
    return tqdm(
        files.items(), desc="loading weights", unit="tensor", leave=False, disable=None, delay=1
    )


def check_shape(found, wanted, file, stored):
    """Raises ValueError for a tensor that has another shape in its file than in the model."""
    if tuple(found) != tuple(wanted):
        raise ValueError(
            f"{file}: {stored} has shape {list(found)}, config.json makes it {list(wanted)}"
        )


# ---- weights that are stored in 4 or 8 bits, as bitsandbytes does it ----------------------------

# parts of a weight as files name them: what QuantFormat.tensors calls them. The state, and the
# format of int8, are read here
PARTS = {
    "weight": "codes",
    "weight.absmax": "absmax",
    "weight.quant_map": "quant_map",
    "weight.nested_absmax": "nested_absmax",
    "weight.nested_quant_map": "nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4": "state",
    "weight.quant_state.bitsandbytes__fp4": "state",
    "SCB": "absmax",
    "weight_format": "format",
}


@dataclass
class Packed:
    """Where a quantised weight lies.

    parts: {name of PARTS' right side: (file, key)}; offset: see methods/quant.py.
    """

    form: QuantFormat
    shape: tuple
    parts: dict[str, tuple[Path, str]]
    offset: float = 0.0


def packed_weights(folder) -> dict[str, Packed]:
    """{name of a weight in the files: Packed} of those that are stored quantised, as the keys
    beside them tell; {} where there are none, or no files. Raises ValueError with file and key for
    parts that are missing or unknown.
    """
    try:
        files = tensor_files(folder)
    except FileNotFoundError:
        return {}
    groups, found = {}, {}
    for key, file in files.items():
        part = re.fullmatch(r"(.+)\.(weight\..+|SCB|weight_format)", key)
        if part and f"{part[1]}.weight" in files:
            if part[2] not in PARTS:
                raise ValueError(
                    f"{file}: {key} is no part of a quantised weight that is known here; known "
                    "beside a "
                    f"weight are {', '.join(name for name in PARTS if name != 'weight')}"
                )
            groups.setdefault(part[1], {"codes": (files[f"{part[1]}.weight"], f"{part[1]}.weight")})
            groups[part[1]][PARTS[part[2]]] = (file, key)
    by_file = {}
    for module, parts in groups.items():
        if f"{module}.SCB" not in files and "state" not in parts:
            file, key = next(place for part, place in parts.items() if part != "codes")
            lacking = module + (
                ".SCB" if "format" in parts else ".weight.quant_state.bitsandbytes__nf4 (or __fp4)"
            )
            raise ValueError(
                f"{file}: {key} is there, and {lacking} is in no file of {folder}; fetch the "
                "files again"
            )
        by_file.setdefault(parts.get("state", parts["codes"])[0], []).append(module)
    for file, modules in by_file.items():
        with open_tensors(file) as tensors:
            for module in modules:
                found[f"{module}.weight"] = read_form(folder, groups[module], tensors)
    return found


def read_form(folder, parts: dict, tensors) -> Packed:
    """The Packed of one weight. tensors: the open file of its state, or, for int8, of its codes."""
    offset, (file, key) = 0.0, parts.get("state", parts["codes"])
    if "state" in parts:
        form, shape, offset = format_of_state(tensors.get_tensor(key), f"{file}: {key}")
    else:
        raw = read_config_json(folder)
        shape, _ = stored_as(file, key)
        form = QuantFormat(
            "int8",
            nested=0,
            dtype=DTYPES.get(raw.get("dtype") or raw.get("torch_dtype"), torch.float16),
        )
        if "format" in parts and int(read_part(parts["format"])):
            raise ValueError(
                f"{parts['format'][0]}: {parts['format'][1]} says that the rows are laid out for "
                "one kind "
                "of GPU; only the plain order (0) is read"
            )
    for part in form.tensors(shape):
        if part not in parts and part != "nested_offset":
            beside = (
                key.partition(".weight")[0]
                + "."
                + next(name for name, ours in PARTS.items() if ours == part)
            )
            raise ValueError(
                f"{file}: {key} tells of a part {beside}, which is in no file of {folder}; fetch "
                "them "
                "again"
            )
    return Packed(form, shape, parts, offset)


def read_part(place: tuple, device="cpu"):
    file, key = place
    with open_tensors(file, device) as tensors:
        return tensors.get_tensor(key)


def read_packed(packed: Packed, device) -> QuantizedWeight:
    """Read a quantised weight onto the device."""
    parts, (file, key) = {}, packed.parts["codes"]
    for name in packed.form.tensors(packed.shape):
        if name in packed.parts:
            parts[name] = read_part(packed.parts[name], device)
    return quantized_from(packed.form, packed.shape, parts, packed.offset, f"{file}: {key}")


def base_forms(model: CausalLM, folder, form: QuantFormat | None = None) -> dict[str, QuantFormat]:
    """{parameter of the model: QuantFormat} of all that is quantised: in the files or, where
    nothing is, by `form` on load.
    """
    packed, called = packed_weights(folder), model.config.stored_name
    if not packed:
        return dict.fromkeys(quantizable_weights(model), form) if form else {}
    return {
        name: packed[called(name)].form
        for name, _ in model.named_parameters()
        if called(name) in packed
    }


def check_plain(dtype, file, stored):
    """Raises ValueError for integers where a weight should be."""
    if not dtype.is_floating_point:
        raise ValueError(
            f"{file}: {stored} is stored as {str(dtype).removeprefix('torch.')}, without the "
            "scales that "
            "bitsandbytes writes beside such weights. Other ways of quantising are not read here"
        )


# what older tools stored beside the weights: tables of the rotation, and the number that masked
# scores were set to
BUFFERS = re.compile(
    r".*\.(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|.*\.attn\.masked_bias"
)


def known_extra(name, config, files) -> bool:
    """Does a tensor that the decoder lacks carry nothing of its own? Buffers, parts that read
    images, a tied head.
    """
    if name.startswith(config.skips) or BUFFERS.fullmatch(name):
        return True
    head, embedding = (
        config.stored_name("lm_head.weight"),
        config.stored_name("model.embed_tokens.weight"),
    )
    if name == head and config.tie_word_embeddings:
        with open_tensors(files[name]) as a, open_tensors(files[embedding]) as b:
            if torch.equal(a.get_tensor(name), b.get_tensor(embedding)):
                return True
            raise ValueError(
                f"{files[name]}: {head} differs from {embedding}, but config.json says they are "
                "one "
                "(tie_word_embeddings: true). Set it to false to use both"
            )
    return False


def assign(model: nn.Module, name: str, tensor, requires_grad: bool = False):
    """Make the tensor the model's parameter of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad))


def _mismatch(folder, missing, unused, head=None):
    lines = [f"{folder}: the tensors are not those that config.json describes."]
    for what, names in (("missing", missing), ("not used", unused)):
        if names:
            lines.append(f"  {what}: {len(names)}, such as {', '.join(names[:4])}")
    if missing == [head]:
        lines.append(
            "  If the head is the embedding's matrix, config.json must say tie_word_embeddings: "
            "true"
        )
    elif missing and unused:
        if near := nearest_name(missing[0], unused):
            lines.append(f"  {missing[0]} may be what the file calls {near}")
    return "\n".join(lines)


# ---- adapters ------------------------------------------------------------------------------------
# ---------------

PREFIX = "base_model.model."  # what PEFT writes before every name
OF_ADAPTERS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# fields of adapter_config.json that change nothing here
NEUTRAL = frozenset(
    """
    auto_mapping base_model_name_or_path inference_mode loftq_config megatron_config megatron_core
    peft_type peft_version revision task_type runtime_config qalora_group_size bias
""".split()
)
# init_lora_weights that leave W as it was
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


# ---- writing -------------------------------------------------------------------------------------
# ---------------


def save_model(model: CausalLM, folder, source, dtype: torch.dtype | None = None):
    """Write all weights of a model (full fine-tuning) with the config.json of the folder it came
    from.

    dtype None writes each tensor as it is held; config.json then states that of the first. What the
    source's files hold beside the decoder, a part that reads images, is passed on as it is."""
    weights = {model.config.stored_name(name): p for name, p in model.named_parameters()}
    others = {}
    # none for a model made from scratch
    if model.config.skips and any(Path(source).glob("*.safetensors")):
        others = {
            n: file for n, file in tensor_files(source).items() if n.startswith(model.config.skips)
        }

    def read(name):
        with open_tensors(others[name]) as tensors:
            return tensors.get_tensor(name)

    shapes = {n: (tuple(p.shape), dtype or p.dtype) for n, p in weights.items()}
    write_tensors(
        folder,
        shapes | {n: stored_as(file, n) for n, file in others.items()},
        lambda n: [read(n) if n in others else whole(weights[n]).to(dtype or weights[n].dtype)],
    )
    dtype = dtype or next(iter(weights.values())).dtype
    raw = read_config_json(source)
    raw.pop("dtype", None)
    write_json(
        Path(folder) / "config.json", {**raw, "torch_dtype": str(dtype).removeprefix("torch.")}
    )
    generation = Path(source) / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, Path(folder) / generation.name)


def whole(parameter) -> torch.Tensor:
    """All of a parameter's values.

    One that is cut over the ranks (scale/fsdp.py) is put together: all must ask for it.
    """
    return parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter.data


# ---- resumable training state -------------------------------------------------------------------


NO_ROWS = (*OF_OTHER_SHAPES, "unused")  # parts of a parameter's state that are not of its shape
