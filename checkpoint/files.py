"""Checkpoints: finding them, memory-mapped strict loading, adapters in PEFT's format, streamed writing, resuming.

Only safetensors and JSON are written, and read, but for the models that exist as pytorch_model.bin alone. Everything
written appears under its final name complete or not at all: it is made beside it as NAME.partial, flushed, and renamed.

Read before: model.py, lora.py. Read after: train.py, merge.py.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""
import difflib
import json
import math
import os
import pickle
import re
import shutil
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from families import model_config, read_config_json
from lora import LoRAConfig, LoRALinear, LoRAStacked, attach_lora, find_targets, lora_layers, merge_adapters
from model import CausalLM
from quant import (Form, Quantised, can_be_quantised, empty_quantised, form_of_state, quantise, quantised_from,
                   set_quantised)
from tokenizer import read_json
from updates import OF_OTHER_SHAPES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
               "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CODES = {dtype: code for code, dtype in FILE_DTYPES.items()}
# a pickle can run anything; torch's restricted loader makes tensors only, and before 2.6 it could be escaped
PICKLES_ARE_SAFE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)          # CVE-2025-32434
STATE_FILES = ("optimizer.safetensors", "rng.safetensors", "trainer_state.json")     # what resuming needs


# ---- finding ----------------------------------------------------------------------------------------------------


def find_checkpoint(name_or_path: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """A local folder as it is, or a hub id downloaded (or taken from the cache) by huggingface_hub.

    HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE act as huggingface_hub defines them. Raises FileNotFoundError with what to
    do: a folder that does not exist, an id the hub does not know, a gated repository, no network.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{name_or_path} is a file; name the folder that holds the checkpoint")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) or name_or_path.startswith("."):
        raise FileNotFoundError(f"{name_or_path} does not exist" + _near(path))
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import (EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError,
                                       LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
    # code is passed on by merge.py and never run
    files, pickles = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.tiktoken", "*.py"], ["pytorch_model*.bin"]
    doubles = ["consolidated*", "original/*"]      # the same weights once more, in the maker's own layout
    try:
        folder = Path(snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=files,
                                        ignore_patterns=doubles))
        if PICKLES_ARE_SAFE and not any(folder.glob("*.safetensors")):
            snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=pickles)
        return folder
    except HFValidationError:
        raise FileNotFoundError(f"{name_or_path} does not exist{_near(path)}, and no repository of the hub can have "
                                "that name") from None
    except GatedRepoError:
        raise FileNotFoundError(f"{name_or_path} is gated: accept its licence at https://huggingface.co/{name_or_path},"
                                " then log in with `hf auth login` (or set HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{name_or_path} has no revision {revision!r} (model_revision)") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{name_or_path} is neither a local folder{_near(path)} nor a repository of the hub "
                                "that you may read (a private one needs `hf auth login`)") from None
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"{name_or_path} is no local folder{_near(path)}, is not in the cache, and the hub "
                                f"could not be reached ({reason}). Give a folder, or fetch it where there is a "
                                f"network: hf download {name_or_path}") from None


def _near(path: Path) -> str:
    """`` (did you mean …?)`` from the names beside the one that is missing."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


# ---- reading ----------------------------------------------------------------------------------------------------


@contextmanager
def open_tensors(path, device="cpu"):
    """The tensors of a file, each read when it is asked for: keys(), get_tensor(name), get_slice(name)[rows].

    Raises ValueError that says which file is broken and what to do.
    """
    if Path(path).suffix == ".bin":
        yield PickledTensors(path, device)
        return
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); fetch it again, or use another copy") from None


class PickledTensors:
    """A file of torch.save that is a dict of tensors, mapped into memory; the methods are those of safe_open."""

    def __init__(self, path, device):
        if not PICKLES_ARE_SAFE:
            raise ValueError(f"{path} is a pickle, which is safe to read with torch 2.6 or newer only (CVE-2025-32434; "
                             f"here is torch {torch.__version__}). Convert the checkpoint where torch is newer: "
                             f"python merge.py model_name_or_path={Path(path).parent} export_dir=NEW_FOLDER")
        self.path, self.device = path, device
        try:
            self.tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds other things than tensors, which are not read "
                             f"({str(error).strip().splitlines()[0]})") from None
        except (RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is damaged, incomplete, or older than torch 1.6 "
                             f"({str(error).strip().splitlines()[0]}); fetch it again, or use another copy") from None
        if not isinstance(self.tensors, dict) or not all(map(torch.is_tensor, self.tensors.values())):
            raise ValueError(f"{path} is not a dict of tensors, as the weights of a model are")

    def keys(self):
        return self.tensors.keys()

    def get_slice(self, name):
        if name not in self.tensors:
            raise ValueError(f"{self.path} holds no {name}, which the index says it does; fetch both again")
        return self.tensors[name].detach()

    def get_tensor(self, name):
        return self.get_slice(name).contiguous().to(self.device)


def read_rows(tensors, name, rows: slice):
    """Some rows of a tensor in an open file; the others are not read."""
    part = tensors.get_slice(name)
    return part[:1][:0] if rows.start is not None and rows.start == rows.stop else part[rows]


def stored_as(file, key) -> tuple[tuple, torch.dtype]:
    """Shape and dtype of a tensor in a file; the tensor itself is not read."""
    with open_tensors(file) as tensors:
        part = tensors.get_slice(key)
        if torch.is_tensor(part):
            shape, code = tuple(part.shape), CODES.get(part.dtype, str(part.dtype))
        else:
            shape, code = tuple(part.get_shape()), part.get_dtype()
    if code not in FILE_DTYPES:
        raise ValueError(f"{file}: {key} is stored as {code}; known are {', '.join(FILE_DTYPES)}")
    return shape, FILE_DTYPES[code]


def tensor_files(folder) -> dict[str, Path]:
    """{tensor name: file} of a checkpoint folder: one file of weights, or shards with an index; in the order of either.

    Safetensors come before pickles. Raises FileNotFoundError or ValueError for what is missing or damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = Path(folder) / name, Path(folder) / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if single.is_file():
            with open_tensors(single) as file:                  # in the order of the bytes; keys() alone is by name
                return {tensor: single for tensor in getattr(file, "offset_keys", file.keys)()}
    hint = "" if PICKLES_ARE_SAFE else (". If its repository has pytorch_model.bin alone: that is read with "
                                        f"torch 2.6 or newer, here is torch {torch.__version__}")
    raise FileNotFoundError(f"{folder} has no weights: no model.safetensors or pytorch_model.bin, nor the .index.json "
                            f"of either{hint}")


def _shards(index: Path) -> dict[str, Path]:
    """{tensor name: file} as an index has it."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / file for name, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is damaged or incomplete; fetch it again") from None
    if missing := sorted({file.name for file in files.values() if not file.is_file()}):
        raise FileNotFoundError(f"{index} names {len(missing)} file(s) that are not there: {', '.join(missing[:4])}. "
                                "The download is incomplete; fetch them again")
    return files


def load_model(folder, dtype: torch.dtype | None = None, device="cpu", skip_weights: bool = False,
               form: Form | None = None) -> CausalLM:
    """Build the decoder of a checkpoint folder and fill it, tensor by tensor, straight onto `device`.

    dtype: torch dtype of the weights; None keeps the checkpoint's. On the CPU, unconverted weights stay memory-mapped.
    skip_weights: leave the model on the meta device (counting, planning). form: quantise the linear layers, each as
    soon as it is read; what is stored quantised stays so. Raises ValueError that names tensors which are missing,
    unused or of another shape than config.json says; FileNotFoundError for missing files.
    """
    folder = Path(folder)
    config = model_config(read_config_json(folder), str(folder / "config.json"))
    with torch.device("meta"):
        model = CausalLM(config)
    if skip_weights:
        return empty_quantised(model, base_forms(model, folder, form))
    packed = packed_weights(folder)
    wanted = () if packed or not form else set(can_be_quantised(model))
    for name, (file, stored) in with_bar(weight_files(model, folder)):
        if stored in packed:
            check_shape(packed[stored].shape, model.get_parameter(name).shape, file, stored)
            set_quantised(model, name, read_packed(packed[stored], device))
            continue
        with open_tensors(file, device) as tensors:         # opened anew: what was read before may leave the memory
            tensor = tensors.get_tensor(stored)
        check_plain(tensor.dtype, file, stored)
        check_shape(tensor.shape, model.get_parameter(name).shape, file, stored)
        tensor = tensor.to(dtype) if dtype else tensor
        if name in wanted:
            set_quantised(model, name, quantise(tensor, form))
        else:
            assign(model, name, tensor)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def weight_files(model: CausalLM, folder) -> dict[str, tuple[Path, str]]:
    """{name of a parameter: its file, its name there} in the files' order. Raises as load_model does."""
    files, config = tensor_files(folder), model.config
    beside = {key for packed in packed_weights(folder).values() for _, key in packed.parts.values()}
    expected = {config.stored_name(name): name for name, _ in model.named_parameters()}         # a tied head: once
    unused = [name for name in files if name not in expected and name not in beside
              and not known_extra(name, config, files)]
    missing = [name for name in expected if name not in files]
    if unused or missing:
        raise ValueError(_mismatch(folder, missing, unused, config.stored_name("lm_head.weight")))
    return {expected[name]: (file, name) for name, file in files.items() if name in expected}


def with_bar(files: dict):
    """The items, with a bar that shows itself only where someone watches and the load takes longer than a second."""
    return tqdm(files.items(), desc="loading weights", unit="tensor", leave=False, disable=None, delay=1)


def check_shape(found, wanted, file, stored):
    """Raises ValueError for a tensor that has another shape in its file than in the model."""
    if tuple(found) != tuple(wanted):
        raise ValueError(f"{file}: {stored} has shape {list(found)}, config.json makes it {list(wanted)}")


# ---- weights that are stored in 4 or 8 bits, as bitsandbytes does it ------------------------------------------------

# parts of a weight as files name them: what Form.tensors calls them. The state, and the format of int8, are read here
PARTS = {"weight": "codes", "weight.absmax": "absmax", "weight.quant_map": "quant_map",
         "weight.nested_absmax": "nested_absmax", "weight.nested_quant_map": "nested_quant_map",
         "weight.quant_state.bitsandbytes__nf4": "state", "weight.quant_state.bitsandbytes__fp4": "state",
         "SCB": "absmax", "weight_format": "format"}


@dataclass
class Packed:
    """Where a quantised weight lies. parts: {name of PARTS' right side: (file, key)}; offset: see quant.py."""
    form: Form
    shape: tuple
    parts: dict[str, tuple[Path, str]]
    offset: float = 0.0


def packed_weights(folder) -> dict[str, Packed]:
    """{name of a weight in the files: Packed} of those that are stored quantised, as the keys beside them tell; {}
    where there are none, or no files. Raises ValueError with file and key for parts that are missing or unknown."""
    try:
        files = tensor_files(folder)
    except FileNotFoundError:
        return {}
    groups, found = {}, {}
    for key, file in files.items():
        part = re.fullmatch(r"(.+)\.(weight\..+|SCB|weight_format)", key)
        if part and f"{part[1]}.weight" in files:
            if part[2] not in PARTS:
                raise ValueError(f"{file}: {key} is no part of a quantised weight that is known here; known beside a "
                                 f"weight are {', '.join(name for name in PARTS if name != 'weight')}")
            groups.setdefault(part[1], {"codes": (files[f"{part[1]}.weight"], f"{part[1]}.weight")})
            groups[part[1]][PARTS[part[2]]] = (file, key)
    by_file = {}
    for module, parts in groups.items():
        if f"{module}.SCB" not in files and "state" not in parts:
            file, key = next(place for part, place in parts.items() if part != "codes")
            lacking = module + (".SCB" if "format" in parts else ".weight.quant_state.bitsandbytes__nf4 (or __fp4)")
            raise ValueError(f"{file}: {key} is there, and {lacking} is in no file of {folder}; fetch the files again")
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
        form, shape, offset = form_of_state(tensors.get_tensor(key), f"{file}: {key}")
    else:
        raw = read_config_json(folder)
        shape, _ = stored_as(file, key)
        form = Form("int8", nested=0, dtype=DTYPES.get(raw.get("dtype") or raw.get("torch_dtype"), torch.float16))
        if "format" in parts and int(read_part(parts["format"])):
            raise ValueError(f"{parts['format'][0]}: {parts['format'][1]} says that the rows are laid out for one kind "
                             "of GPU; only the plain order (0) is read")
    for part in form.tensors(shape):
        if part not in parts and part != "nested_offset":
            beside = key.partition(".weight")[0] + "." + next(name for name, ours in PARTS.items() if ours == part)
            raise ValueError(f"{file}: {key} tells of a part {beside}, which is in no file of {folder}; fetch them "
                             "again")
    return Packed(form, shape, parts, offset)


def read_part(place: tuple, device="cpu"):
    file, key = place
    with open_tensors(file, device) as tensors:
        return tensors.get_tensor(key)


def read_packed(packed: Packed, device) -> Quantised:
    """Read a quantised weight onto the device."""
    parts, (file, key) = {}, packed.parts["codes"]
    for name in packed.form.tensors(packed.shape):
        if name in packed.parts:
            parts[name] = read_part(packed.parts[name], device)
    return quantised_from(packed.form, packed.shape, parts, packed.offset, f"{file}: {key}")


def base_forms(model: CausalLM, folder, form: Form | None = None) -> dict[str, Form]:
    """{parameter of the model: Form} of all that is quantised: in the files or, where nothing is, by `form` on load."""
    packed, called = packed_weights(folder), model.config.stored_name
    if not packed:
        return dict.fromkeys(can_be_quantised(model), form) if form else {}
    return {name: packed[called(name)].form for name, _ in model.named_parameters() if called(name) in packed}


def check_plain(dtype, file, stored):
    """Raises ValueError for integers where a weight should be."""
    if not dtype.is_floating_point:
        raise ValueError(f"{file}: {stored} is stored as {str(dtype).removeprefix('torch.')}, without the scales that "
                         "bitsandbytes writes beside such weights. Other ways of quantising are not read here")


# what older tools stored beside the weights: tables of the rotation, and the number that masked scores were set to
BUFFERS = re.compile(r".*\.(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
                     r"|.*\.attn\.masked_bias")


def known_extra(name, config, files) -> bool:
    """Does a tensor that the decoder lacks carry nothing of its own? Buffers, parts that read images, a tied head."""
    if name.startswith(config.skips) or BUFFERS.fullmatch(name):
        return True
    head, embedding = config.stored_name("lm_head.weight"), config.stored_name("model.embed_tokens.weight")
    if name == head and config.tie_word_embeddings:
        with open_tensors(files[name]) as a, open_tensors(files[embedding]) as b:
            if torch.equal(a.get_tensor(name), b.get_tensor(embedding)):
                return True
            raise ValueError(f"{files[name]}: {head} differs from {embedding}, but config.json says they are one "
                             "(tie_word_embeddings: true). Set it to false to use both")
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
        lines.append("  If the head is the embedding's matrix, config.json must say tie_word_embeddings: true")
    elif missing and unused:
        close = difflib.get_close_matches(missing[0], unused, 1)
        if close:
            lines.append(f"  {missing[0]} may be what the file calls {close[0]}")
    return "\n".join(lines)


# ---- adapters ---------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."      # what PEFT writes before every name
OF_ADAPTERS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
# fields of adapter_config.json that change nothing here
NEUTRAL = frozenset("""
    auto_mapping base_model_name_or_path inference_mode loftq_config megatron_config megatron_core
    peft_type peft_version revision task_type runtime_config qalora_group_size bias
""".split())
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")     # init_lora_weights that leave W as it was


def read_adapter_config(folder) -> tuple[LoRAConfig, dict]:
    """The LoRAConfig of an adapter folder, and all its raw fields. Raises for what is not an adapter we can honour."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: adapter_name_or_path must be a folder with adapter_config.json "
                                "and adapter_model.safetensors")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not the fields of an adapter")
    if raw.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{path}: peft_type {raw['peft_type']} is not supported, only LORA")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias {raw['bias']!r} is not supported, only 'none'")
    begun = raw.get("init_lora_weights", True)
    if begun not in PLAIN_STARTS and not re.fullmatch(r"pissa(_niter_\d+)?", str(begun)):
        raise ValueError(f"{path}: init_lora_weights {begun!r} changed the base weights before "
                         "training, so the adapter does not fit the base as published. Convert it to a plain LoRA with "
                         "peft (save_pretrained with path_initial_model_for_weight_conversion)")
    known = LoRAConfig.__dataclass_fields__
    odd = {key: value for key, value in raw.items() if key not in known and key not in NEUTRAL
           and value is not False and value not in (None, "", [], {})
           and key not in ("fan_in_fan_out", "target_parameters")}
    if odd:
        raise ValueError(f"{path}: {', '.join(f'{k}: {v}' for k, v in odd.items())} is not honoured here, and would "
                         "change what the adapter computes")
    config = LoRAConfig(**{key: raw[key] for key in known if raw.get(key) is not None})
    if raw.get("target_parameters") and raw.get("target_modules") is None:
        config.target_modules = []
    if not config.pissa:
        config.init_lora_weights = True
    return config, raw


def pissa_start(folder, config: LoRAConfig) -> Path | None:
    """The adapter that a PiSSA adapter began as, which its base weights lack: `pissa_init` in its folder or beside it.

    None where it can be found anew, as the exact principal parts of the base. Raises FileNotFoundError where it cannot.
    """
    for start in (Path(folder) / "pissa_init", Path(folder).resolve().parent / "pissa_init"):
        if (start / "adapter_model.safetensors").is_file():
            return start
    if config.init_lora_weights == "pissa":
        return None
    raise FileNotFoundError(f"{folder} was begun with {config.init_lora_weights}, parts of the base that were found "
                            "with random numbers, and nobody can find the same again: put its folder pissa_init into "
                            "it, or take the adapter in pissa_converted (pissa_convert: true writes it)")


def load_adapter(model: CausalLM, folder, dropout: float | None = None, device=None) -> LoRAConfig:
    """Attach the adapter of a folder to the model, trainable. Strict: every tensor is used, none is missing.

    dropout replaces the adapter's own (training gives it, inference leaves it: dropout is off in eval mode anyway).
    device: of what is trained, where it is not that of the weights.
    """
    config, raw = read_adapter_config(folder)
    if dropout is not None:
        config.lora_dropout = dropout
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        hint = "; adapter_model.bin is a pickle and is not read" if path.with_suffix(".bin").is_file() else ""
        raise FileNotFoundError(f"{path} is missing{hint}")
    start = pissa_start(folder, config) if config.pissa else None
    if start:
        load_adapter(model, start, config.lora_dropout, device)
        for layer in lora_layers(model).values():
            layer.take_out()
    with open_tensors(path) as tensors:
        try:
            if not start:
                attach_lora(model, config, called=model.config.stored_name,
                            targets=_targets_of(model, config, raw, tensors.keys()), device=device)
        except ValueError as error:
            raise ValueError(f"{folder} was made for another model ({raw.get('base_model_name_or_path')}): "
                             f"{error}") from None
        expected, copies = adapter_tensors(model), copies_of_base(model, tensors)
        names = set(tensors.keys()) - copies
        missing, unused = sorted(expected.keys() - names), sorted(names - expected.keys())
        if missing or unused:
            raise ValueError(_mismatch(path, missing, unused).replace("that config.json describes",
                                                                      "this model and adapter_config.json ask for"))
        if swapped := swapped_stacks(model, tensors, raw):
            print(f"note      {path}: A and B of its stacked experts have each other's place (PEFT 0.20 and newer); "
                  "they are put back")
        for name, parameter in expected.items():
            tensor = swapped_back(tensors, name, swapped[name]) if name in swapped else tensors.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, the model and adapter_config.json "
                                 f"make it {list(parameter.shape)}. Its base is "
                                 f"{raw.get('base_model_name_or_path')!r}, r is {config.r}: is this another model, or "
                                 "another rank?")
            with torch.no_grad():
                parameter.copy_(tensor)
    return config


def _targets_of(model, config, raw, keys) -> list[str]:
    """Full names of the layers that an adapter file with these keys is for.

    The routed experts are what the names in adapter_config.json leave open: `gate_proj` means those of all experts to
    transformers 4, where they are linear layers, and that of the shared expert alone to transformers 5, where they are
    stacks; stacks are what target_parameters names.
    """
    called, one_by_one = model.config.stored_name, any(re.search(r"\.experts\.\d", key) for key in keys)
    if (named := raw.get("target_parameters") or []) and not model.config.stacked_experts:
        raise ValueError(f"target_parameters {', '.join(named)} are stacks of experts, and this checkpoint has its "
                         "experts one by one. Merge it with peft, or train one here: lora_target: all,experts")
    stacks = find_targets(model, named, called)
    return stacks + [name for name in find_targets(model, config.target_modules, called) if ".experts." not in name
                     or one_by_one and isinstance(model.get_submodule(name), nn.Linear)]


def copies_of_base(model: CausalLM, tensors) -> set[str]:
    """Names of the frozen weights that PEFT stores beside the adapter of a head, where they are the base's own."""
    layers = {f"{name}.base_layer.weight": layer for layer, name in peft_names(model).items()}
    found = set()
    for name in layers.keys() & set(tensors.keys()):
        weight = model.get_submodule(layers[name]).weight
        if list(weight.shape) == tensors.get_slice(name).get_shape() and (
                weight.is_meta or torch.equal(tensors.get_tensor(name).to(weight), weight)):
            found.add(name)
    return found


def swapped_stacks(model: CausalLM, tensors, raw: dict) -> dict[str, int]:
    """{name of an A or B: number of experts} for stacks whose A and B have each other's place in the file, or {}.

    PEFT writes them so from 0.20 on, where it takes the matrices of a stack as (out, in); their product is the same.
    The shapes tell; where all matrices are square, only the version does.
    """
    names, plain, swapped, found = peft_names(model), True, True, {}
    for layer, module in lora_layers(model).items():
        if isinstance(module, LoRAStacked):
            keys = [f"{names[layer]}.{part}.weight" for part in ("lora_A", "lora_B")]
            held = [tuple(tensors.get_slice(key).get_shape()) for key in keys]
            A, B = module.lora_A.weight, module.lora_B.weight
            plain, swapped = plain and held == [A.shape, B.shape], swapped and held == [B.T.shape, A.T.shape]
            found.update(dict.fromkeys(keys, len(module.weight)))
    newer = re.match(r"0\.[2-9]\d|[1-9]", raw.get("peft_version") or "")
    return found if swapped and (newer or not plain) else {}


def swapped_back(tensors, name: str, experts: int):
    """A (E*r, in) or B (out, r*E) of a stack, from a file that has them in each other's place."""
    stem, part = name.removesuffix(".weight").rsplit(".", 1)
    if part == "lora_A":
        held = tensors.get_tensor(f"{stem}.lora_B.weight")                                      # (in, r*E)
        return held.view(len(held), -1, experts).permute(2, 1, 0).flatten(0, 1)
    held = tensors.get_tensor(f"{stem}.lora_A.weight")                                          # (E*r, out)
    return held.view(experts, -1, held.shape[1]).permute(2, 1, 0).flatten(1)


def peft_names(model: CausalLM) -> dict[str, str]:
    """{adapted layer: what PEFT calls it}, under the checkpoint's own names.

    The stacks of a block are parameters of one module to PEFT, which wraps that module once for each of them:
    experts.base_layer is the first of two, experts the second.
    """
    called, found, outside = model.config.stored_name, {}, Counter()
    for name, layer in reversed(lora_layers(model).items()):
        if isinstance(layer, LoRAStacked):
            block = name.rpartition(".")[0]
            found[name] = PREFIX + called(block) + ".base_layer" * outside[block]
            outside[block] += 1
        else:
            found[name] = PREFIX + called(name)
    return found


def adapter_tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    """{name as PEFT writes it: parameter} of the adapters, and of modules trained whole."""
    found, names = {}, peft_names(model)
    for layer, module in lora_layers(model).items():
        assert not module.weight.requires_grad, layer
        for part in ("lora_A", "lora_B"):
            found[f"{names[layer]}.{part}.weight"] = getattr(module, part).weight
        if getattr(module, "lora_magnitude_vector", None) is not None:
            found[f"{names[layer]}.lora_magnitude_vector"] = module.lora_magnitude_vector
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and not name.endswith(OF_ADAPTERS):
            found[PREFIX + model.config.stored_name(name)] = parameter
    return found


def save_pissa_start(model: CausalLM, folder, config: LoRAConfig, base: str):
    """Write the adapter that PiSSA began with, which the base weights lack: the folder that pissa_start looks for."""
    starts = {f"{name}.lora_{part}.weight": tensor for layer, name in peft_names(model).items()
              for part, tensor in zip("AB", lora_layers(model)[layer].start)}
    with new_folder(folder) as work:
        save_adapter(model, work, replace(config, init_lora_weights=True), base, adapter_tensors(model) | starts)


def save_converted(model: CausalLM, folder, config: LoRAConfig, base: str):
    """Write a PiSSA adapter as a plain one for the base as it was, of rank 2 r: s B A - s B0 A0 = s [B | -B0] [A; A0]
    (arXiv:2404.02948, appendix C)."""
    tensors, layers = adapter_tensors(model), lora_layers(model)
    for layer, name in peft_names(model).items():
        A, B = layers[layer].start
        tensors[f"{name}.lora_A.weight"] = torch.cat([tensors[f"{name}.lora_A.weight"], A])
        tensors[f"{name}.lora_B.weight"] = torch.cat([tensors[f"{name}.lora_B.weight"], -B], dim=1)
    more = math.sqrt(2) if config.use_rslora else 2                     # of alpha, that the scale is the same
    config = replace(config, init_lora_weights=True, r=2 * config.r, lora_alpha=more * config.lora_alpha,
                     rank_pattern={part: 2 * r for part, r in config.rank_pattern.items()},
                     alpha_pattern={part: more * alpha for part, alpha in config.alpha_pattern.items()})
    with new_folder(folder) as work:
        save_adapter(model, work, config, base, tensors)


def save_adapter(model: CausalLM, folder, config: LoRAConfig, base: str, tensors: dict | None = None):
    """Write adapter_config.json and adapter_model.safetensors; `base` is the base model as the user named it. tensors:
    others than the model's, under the same names."""
    folder = Path(folder)
    save_tensors(folder / "adapter_model.safetensors", adapter_tensors(model) if tensors is None else tensors)
    targets, stacks = peft_targets(model, config.target_modules)
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": config.init_lora_weights,
        "use_dora": config.use_dora,
        "r": config.r, "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0 if stacks else config.lora_dropout,     # PEFT opens no adapter of stacks that has dropout
        "use_rslora": config.use_rslora, "target_modules": targets, "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern, "modules_to_save": config.modules_to_save or None}
        | ({"target_parameters": stacks} if stacks else {}))


def peft_targets(model: CausalLM, wish) -> tuple[list | str, list]:
    """target_modules and target_parameters that make PEFT adapt the same layers: the user's own, where PEFT reads them
    alike (it knows no blocks, no `all`), else last name parts, else full names."""
    called, layers = model.config.stored_name, lora_layers(model)
    stacks = [called(name + ".weight") for name, layer in layers.items() if isinstance(layer, LoRAStacked)]
    adapted = {called(name) for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    if isinstance(wish, list) and adapted == set(wish) or (
            isinstance(wish, str) and wish not in ("all", "all-linear") and not stacks):
        return wish, stacks                                                     # full names; a regular expression
    names = [called(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    last = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    # a short name may also be that of a layer which reads images
    for targets in () if model.config.skips else (wish if isinstance(wish, list) else [], last):
        meant = [{name for name in names if f".{name}".endswith(f".{target}")} for target in targets]
        if all(meant) and adapted == set().union(*meant):
            return targets, stacks
    return sorted(adapted), stacks


def folded_under(adapter) -> list[str]:
    """The adapters that training folded into the base before this one, as its train_config.json names them."""
    said = read_json(Path(adapter) / "train_config.json")
    names = said.get("adapter_name_or_path") or []
    return names if said.get("create_new_adapter") else names[:-1]


def warn_of_folded(adapters: list) -> str:
    """A warning when an adapter stands without those it was trained on top of (see folded_under); or ""."""
    for place, adapter in enumerate(adapters):
        before = [Path(other).resolve() for other in adapters[:place]]
        if missing := [name for name in folded_under(adapter) if Path(name).resolve() not in before]:
            return (f"{adapter} was trained with {' and '.join(missing)} folded into the base. Unless this base has it "
                    f"already: adapter_name_or_path={','.join([*missing, str(adapter)])}")
    return ""


def load_with_adapters(folder, adapters: list, dtype=None, device="cpu", fold_last: bool = False,
                       form: Form | None = None) -> CausalLM:
    """Base model with adapters, for inference: all but the last are folded in, the last stays beside the weights.

    A and B take the base's dtype: in float32, which the optimizer needs, each decoding step would convert them anew;
    nor would it find the lengths of DoRA's rows anew.
    fold_last: the last one is folded in too, which makes the very weights that merge.py writes, and saves two products
    for each layer and token; but for matrices in 4 or 8 bits, which would take 16 bits then. form: see load_model.
    """
    model = load_model(folder, dtype, device, form=form)
    for index, adapter in enumerate(adapters):
        load_adapter(model, adapter)
        if index < len(adapters) - 1 or fold_last:
            merge_adapters(model, quantised=index < len(adapters) - 1)
    computed = model.model.embed_tokens.weight.dtype
    for layer in lora_layers(model).values():
        if getattr(layer, "lora_magnitude_vector", None) is not None:
            layer.fixed = layer.gain().detach()
        layer.to(computed if isinstance(layer.weight, Quantised) else layer.weight.dtype)
    return model.requires_grad_(False).eval()


# ---- writing ----------------------------------------------------------------------------------------------------


def write_json(path, value):
    """Write JSON under its final name in one step."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)         # a full disk leaves nothing half-written


def save_tensors(path, tensors: dict):
    """A small safetensors file in one go. Raises OSError if it cannot be written, such as on a full disk."""
    path.touch()
    mode = path.stat().st_mode              # as the umask says; save_file makes files that only their owner can read
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(path),
                  metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}). Is there room on the disk?") from None


@contextmanager
def new_folder(path):
    """A folder that appears under its name only when the block ends well: `with new_folder(p) as work: fill work`."""
    path = Path(path)
    work, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    if old.exists() and not path.exists():      # a run was killed between the two renames below
        os.replace(old, path)
    for leftover in (work, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    work.mkdir(parents=True)
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(work)
    if path.exists():
        os.replace(path, old)                   # one of the two is whole at any moment
    os.replace(work, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(path):
    """Let a renaming outlive a power failure, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:                             # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:                             # nor does every network file system
        pass
    finally:
        os.close(handle)


@contextmanager
def into_folder(path):
    """new_folder for a folder in use: the files move into it when the block ends well, each over an older one."""
    path = Path(path)
    with new_folder(path / "final") as work:
        yield work
    for file in (path / "final").iterdir():
        os.replace(file, path / file.name)
    (path / "final").rmdir()


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Deal tensor names, in order, into files of at most `limit` bytes (a larger tensor gets a file of its own)."""
    shards, room = [], 0
    for name, size in sizes.items():
        size += len(name) + 150                 # its entry in the file's header
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_tensors(folder, shapes: dict, rows_of, limit: int = 5 * 10**9, progress=lambda bytes_written: None):
    """Write model.safetensors, or shards with an index, no more in memory than one block of one tensor.

    shapes: {name: (shape, torch dtype)} in the order to write; rows_of(name): the tensor's rows when its turn comes,
    as one or several blocks in order. The safetensors package can only write a file whose tensors are all in memory;
    the format is simple enough to stream: header length (8 bytes, little-endian), JSON header, bytes.
    """
    folder = Path(folder)
    sizes = {name: dtype.itemsize * int(torch.Size(shape).numel()) for name, (shape, dtype) in shapes.items()}
    free = shutil.disk_usage(folder).free
    if sum(sizes.values()) > free:
        raise OSError(f"{folder}: {sum(sizes.values()) / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free. Make room, or "
                      "choose another folder")
    shards, where = plan_shards(sizes, limit), {}
    for index, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            shape, dtype = shapes[name]
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + sizes[name]]}
            offset += sizes[name]
            where[name] = file
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)                     # tensors start on 8-byte boundaries
        with open(folder / file, "wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                start = out.tell()
                for block in rows_of(name):
                    assert block.dtype == shapes[name][1], name
                    out.write(block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                    progress(block.nbytes)
                    del block                               # before the next is made, so that one is held at a time
                assert out.tell() - start == sizes[name], name
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def save_model(model: CausalLM, folder, source, dtype: torch.dtype | None = None):
    """Write all weights of a model (full fine-tuning) with the config.json of the folder it came from.

    dtype None writes each tensor as it is held; config.json then states that of the first. What the source's files
    hold beside the decoder, a part that reads images, is passed on as it is.
    """
    weights = {model.config.stored_name(name): p for name, p in model.named_parameters()}
    others = {}
    if model.config.skips and any(Path(source).glob("*.safetensors")):          # none for a model made from scratch
        others = {n: file for n, file in tensor_files(source).items() if n.startswith(model.config.skips)}

    def read(name):
        with open_tensors(others[name]) as tensors:
            return tensors.get_tensor(name)

    shapes = {n: (tuple(p.shape), dtype or p.dtype) for n, p in weights.items()}
    write_tensors(folder, shapes | {n: stored_as(file, n) for n, file in others.items()},
                  lambda n: [read(n) if n in others else whole(weights[n]).to(dtype or weights[n].dtype)])
    dtype = dtype or next(iter(weights.values())).dtype
    raw = read_config_json(source)
    raw.pop("dtype", None)
    write_json(Path(folder) / "config.json", {**raw, "torch_dtype": str(dtype).removeprefix("torch.")})
    generation = Path(source) / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, Path(folder) / generation.name)


def whole(parameter) -> torch.Tensor:
    """All of a parameter's values. One that is cut over the ranks (shard.py) is put together: all must ask for it."""
    return parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter.data


# ---- resumable training state -----------------------------------------------------------------------------------


def rng_state() -> dict[str, torch.Tensor]:
    """The state of this process's random generators, by device."""
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


NO_ROWS = (*OF_OTHER_SHAPES, "unused")      # parts of a parameter's state that are not of its shape


def state_of(optimizer, names: list[str]):
    """(name of a parameter, {field: tensor}) of the optimizer's state; names: see save_training_state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in zip(names, params, strict=True):
        fields = optimizer.state.get(p) or {"unused": torch.zeros(0)}         # an expert that no token has passed yet
        yield name, {key: torch.as_tensor(value) for key, value in fields.items()}


def save_training_state(folder, optimizer, names: list[str], state: dict, rng: dict[str, torch.Tensor],
                        whole=lambda name, tensor: tensor):
    """optimizer.safetensors, rng.safetensors and trainer_state.json into a checkpoint folder.

    names: the trainable parameters in the optimizer's order of groups; state: the JSON part (step, log, …); rng: the
    generators of all ranks, as cpu.0, cpu.1, …; whole(name, tensor): the whole of a tensor, where ranks hold parts.
    """
    folder = Path(folder)
    save_tensors(folder / "optimizer.safetensors", {
        f"{name}|{key}": (tensor if key in NO_ROWS else whole(name, tensor)).cpu()
        for name, fields in state_of(optimizer, names) for key, tensor in fields.items()})
    save_tensors(folder / "rng.safetensors", rng)
    write_json(folder / "trainer_state.json", state)


def load_training_state(folder, optimizer, names: list[str], rank: int = 0, cut: dict = {}) -> dict:
    """Put back what save_training_state wrote; returns the JSON part. Raises ValueError if the parameters differ.

    A rank that was not there when the state was written keeps the generators it has. cut: {name: (shape of the whole,
    this rank's rows)} of parameters that ranks hold parts of.
    """
    folder = Path(folder)
    for file in STATE_FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing: the run cannot be resumed from here (was it saved "
                                    "with save_only_model: true?). Start from its adapter: adapter_name_or_path")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    by_name, changed = dict(zip(names, params, strict=True)), "the settings have changed since it was written"
    with open_tensors(folder / "optimizer.safetensors") as tensors:
        keys = list(tensors.keys())
        if missing := sorted(by_name.keys() - {key.partition("|")[0] for key in keys}):
            raise ValueError(f"{folder} holds no optimizer state for {missing[0]}, which this run trains: {changed}")
        for key in keys:
            name, _, field = key.partition("|")
            if name not in by_name:
                raise ValueError(f"{folder} holds optimizer state for {name}, which this run does not train: {changed}")
            if field == "unused":
                continue
            p = by_name[name]
            shape, rows = cut.get(name, (p.shape, slice(None)))
            held = tuple(tensors.get_slice(key).get_shape())
            if field not in NO_ROWS and held != tuple(shape):
                raise ValueError(f"{folder} holds optimizer state of shape {list(held)} for {name}, which is "
                                 f"{list(shape)} here: {changed}")
            value = tensors.get_tensor(key) if field in NO_ROWS else read_rows(tensors, key, rows)
            optimizer.state[p][field] = value.to(p.device)
    with open_tensors(folder / "rng.safetensors") as tensors:
        states = {key if "." in key else f"{key}.0": tensors.get_tensor(key) for key in tensors.keys()}  # once: one rank
    if f"cpu.{rank}" in states:
        torch.set_rng_state(states[f"cpu.{rank}"])
    if f"cuda.{rank}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])
    path = folder / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the run cannot be resumed from here. An earlier "
                         "checkpoint may do (resume_from_checkpoint: FOLDER)") from None


def write_checksums(folder):
    """checksums.json: length in bytes and CRC-32 of every file in a checkpoint folder."""
    folder = Path(folder)
    write_json(folder / "checksums.json", {path.name: checksum(path) for path in sorted(folder.iterdir())})


def checksum(path) -> list:
    """[length in bytes, CRC-32 as hexadecimal text]: it finds what a disk or a copy has done by accident."""
    crc, length = 0, 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc, length = zlib.crc32(block, crc), length + len(block)
    return [length, f"{crc:08x}"]


def damage(folder) -> str:
    """What is wrong with a checkpoint, read back in full, or "". One without checksums.json is taken as it is."""
    folder = Path(folder)
    try:
        expected = read_json(folder / "checksums.json")
    except ValueError as error:
        return str(error)
    state = folder / "trainer_state.json"               # releases that write rows_per_step write checksums, too
    if not expected and state.is_file() and b"rows_per_step" in state.read_bytes():
        return "checksums.json is missing or empty"
    if not expected and not any(folder.glob("*.safetensors")):
        return "it holds no weights"
    for name, was in expected.items():
        if Path(name).name != name or not (folder / name).is_file():
            return f"{name} is missing"
        if (now := checksum(folder / name)) != was:
            return f"{name} is not as it was written (bytes and checksum {now}, then {was})"
    return ""


def checkpoints_in(output_dir, resumable: bool = True) -> list[Path]:
    """checkpoint-N folders, oldest first; resumable: only those with the state of their training."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if not resumable or (p / "trainer_state.json").is_file()),
                  key=lambda p: int(p.name.split("-")[1]))
