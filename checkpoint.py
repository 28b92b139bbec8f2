"""Checkpoints: finding them, memory-mapped strict loading, adapters in PEFT's format, streamed writing, resumable state.

Only safetensors and JSON are read and written. Everything written appears under its final name complete or not at
all: it is made beside it as NAME.partial, flushed, and renamed.

Read before: model.py, lora.py. Read after: train.py, merge.py.
Format: https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""
import difflib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from families import model_config, read_config_json
from lora import LoRAConfig, LoRALinear, LoRAStacked, attach_lora, lora_layers, merge_adapters
from model import CausalLM
from tokenizer import read_json

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
               "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CODES = {dtype: code for code, dtype in FILE_DTYPES.items()}
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
    files = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.tiktoken"]
    doubles = ["consolidated*", "original/*"]      # the same weights once more, in the maker's own layout
    try:
        return Path(snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=files,
                                      ignore_patterns=doubles))
    except HFValidationError:
        raise FileNotFoundError(f"{name_or_path} does not exist{_near(path)}, and no repository of the hub can have "
                                "that name") from None
    except GatedRepoError:
        raise FileNotFoundError(f"{name_or_path} is gated: accept its licence at https://huggingface.co/{name_or_path}, "
                                "then log in with `hf auth login` (or set HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{name_or_path} has no revision {revision!r} (model_revision)") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{name_or_path} is neither a local folder{_near(path)} nor a repository of the hub that "
                                "you may read (a private one needs `hf auth login`)") from None
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"{name_or_path} is no local folder{_near(path)}, is not in the cache, and the hub could "
                                f"not be reached ({reason}). Give a folder, or fetch it where there is a network: "
                                f"hf download {name_or_path}") from None


def _near(path: Path) -> str:
    """`` (did you mean …?)`` from the names beside the one that is missing."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


# ---- reading ----------------------------------------------------------------------------------------------------


@contextmanager
def open_tensors(path, device="cpu"):
    """safe_open with errors that say which file is broken and what to do."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); fetch it again, or use another copy") from None


def tensor_files(folder) -> dict[str, Path]:
    """{tensor name: file} of a checkpoint folder: one model.safetensors, or shards with an index."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is damaged or incomplete; fetch it again") from None
        if missing:
            raise FileNotFoundError(f"{index} names {len(missing)} file(s) that are not there: {', '.join(missing[:4])}. "
                                    "The download is incomplete; fetch them again")
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        with open_tensors(single) as file:
            return {name: single for name in file.keys()}
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    hint = (f" It has {', '.join(pickles[:3])}: pickled weights are not read; convert them with transformers' "
            "save_pretrained(safe_serialization=True)") if pickles else ""
    raise FileNotFoundError(f"{folder} has no model.safetensors and no model.safetensors.index.json.{hint}")


def load_model(folder, dtype: torch.dtype | None = None, device="cpu", skip_weights: bool = False) -> CausalLM:
    """Build the decoder of a checkpoint folder and fill it, tensor by tensor, straight onto `device`.

    dtype: torch dtype of the weights; None keeps the checkpoint's. On the CPU, unconverted weights stay memory-mapped.
    skip_weights: leave the model on the meta device (counting, planning). Raises ValueError that names tensors which
    are missing, unused or of another shape than config.json says; FileNotFoundError for missing files.
    """
    folder = Path(folder)
    config = model_config(read_config_json(folder), str(folder / "config.json"))
    with torch.device("meta"):
        model = CausalLM(config)
    if skip_weights:
        return model
    files = tensor_files(folder)
    expected = {config.stored_name(name): (name, p) for name, p in model.named_parameters()}   # a tied head: once
    unused = [name for name in files if name not in expected and not known_extra(name, config, files)]
    missing = [name for name in expected if name not in files]
    if unused or missing:
        raise ValueError(_mismatch(folder, missing, unused))
    # the bar shows itself only where someone watches and the load takes longer than a second
    for name, file in tqdm(files.items(), desc="loading weights", unit="tensor", leave=False, disable=None, delay=1):
        if name not in expected:
            continue
        ours, parameter = expected[name]
        with open_tensors(file, device) as tensors:         # opened anew: what was read before may leave the memory
            tensor = tensors.get_tensor(name)
        if tensor.shape != parameter.shape:
            raise ValueError(f"{file}: {name} has shape {list(tensor.shape)}, config.json makes it "
                             f"{list(parameter.shape)}")
        _assign(model, ours, tensor.to(dtype) if dtype else tensor)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


# buffers that older tools stored beside the weights; all of them are computed here
BUFFERS = re.compile(r".*(rotary_emb|rotary_pos_emb|attn)\.(inv_freq|cos_cached|sin_cached|masked_bias|bias|original_inv_freq)")


def known_extra(name, config, files) -> bool:
    """Does a tensor that the decoder lacks carry nothing of its own? Buffers, parts that read images, a tied head."""
    if name.startswith(config.skips) if config.skips else False:
        return True
    if BUFFERS.fullmatch(name):
        return True
    head, embedding = config.stored_name("lm_head.weight"), config.stored_name("model.embed_tokens.weight")
    if name == head and config.tie_word_embeddings:
        with open_tensors(files[name]) as a, open_tensors(files[embedding]) as b:
            if torch.equal(a.get_tensor(name), b.get_tensor(embedding)):
                return True
            raise ValueError(f"{files[name]}: {head} differs from {embedding}, but config.json says they are one "
                             "(tie_word_embeddings: true). Set it to false to use both")
    return False


def _assign(model: nn.Module, name: str, tensor):
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


def _mismatch(folder, missing, unused):
    lines = [f"{folder}: the tensors are not those that config.json describes."]
    for what, names in (("missing", missing), ("not used", unused)):
        if names:
            lines.append(f"  {what}: {len(names)}, such as {', '.join(names[:4])}")
    if len(missing) == 1 and not unused:
        lines.append("  If it is the head, and the head is the embedding's matrix, config.json must say "
                     "tie_word_embeddings: true")
    elif missing and unused:
        close = difflib.get_close_matches(missing[0], unused, 1)
        if close:
            lines.append(f"  {missing[0]} may be what the file calls {close[0]}")
    return "\n".join(lines)


# ---- adapters ---------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."      # what PEFT writes before every name
# fields of adapter_config.json that change nothing here
NEUTRAL = frozenset("""
    auto_mapping base_model_name_or_path inference_mode init_lora_weights loftq_config megatron_config megatron_core
    peft_type peft_version revision task_type runtime_config qalora_group_size bias
""".split())
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")     # init_lora_weights that leave W as it was


def read_adapter_config(folder) -> tuple[LoRAConfig, dict]:
    """The LoRAConfig of an adapter folder, and all its raw fields. Raises for what is not an adapter we can honour."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: adapter_name_or_path must be a folder with adapter_config.json and "
                                "adapter_model.safetensors")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not the fields of an adapter")
    if raw.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{path}: peft_type {raw['peft_type']} is not supported, only LORA")
    if raw.get("use_dora"):
        raise ValueError(f"{path}: this is a DoRA adapter; DoRA is not in this release")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias {raw['bias']!r} is not supported, only 'none'")
    if raw.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise ValueError(f"{path}: init_lora_weights {raw['init_lora_weights']!r} changed the base weights before "
                         "training, so the adapter does not fit the base as published. Convert it to a plain LoRA with "
                         "peft (save_pretrained with path_initial_model_for_weight_conversion)")
    known = LoRAConfig.__dataclass_fields__
    odd = {key: value for key, value in raw.items() if key not in known | {"target_parameters": 0} and key not in NEUTRAL
           and value is not False and value not in (None, "", [], {}) and key != "fan_in_fan_out"}
    if odd:
        raise ValueError(f"{path}: {', '.join(f'{k}: {v}' for k, v in odd.items())} is not honoured here, and would change "
                         "what the adapter computes")
    config = LoRAConfig(**{key: raw[key] for key in known if raw.get(key) is not None})
    if stacks := raw.get("target_parameters"):              # stacks of matrices, one per expert: layers like any other here
        if isinstance(config.target_modules, str):
            raise ValueError(f"{path}: target_modules as a pattern together with target_parameters is not supported")
        config.target_modules = [*config.target_modules, *stacks]
    return config, raw


def load_adapter(model: CausalLM, folder, dropout: float | None = None) -> LoRAConfig:
    """Attach the adapter of a folder to the model, trainable. Strict: every tensor is used, none is missing.

    dropout replaces the adapter's own (training gives it, inference leaves it: dropout is off in eval mode anyway).
    """
    config, raw = read_adapter_config(folder)
    if dropout is not None:
        config.lora_dropout = dropout
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        hint = "; adapter_model.bin is a pickle and is not read" if (Path(folder) / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{path} is missing{hint}")
    try:
        attach_lora(model, config, called=model.config.stored_name)
    except ValueError as error:
        raise ValueError(f"{folder} was made for another model ({raw.get('base_model_name_or_path')}): {error}") from None
    expected = adapter_tensors(model)
    with open_tensors(path) as tensors:
        names = {name for name in tensors.keys() if not _copy_of_base(model, name, tensors)}
        missing, unused = sorted(expected.keys() - names), sorted(names - expected.keys())
        if missing or unused:
            raise ValueError(_mismatch(path, missing, unused).replace("that config.json describes",
                                                                      "this model and adapter_config.json ask for"))
        for name, parameter in expected.items():
            tensor = tensors.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, the model and adapter_config.json make "
                                 f"it {list(parameter.shape)}. Its base is {raw.get('base_model_name_or_path')!r}, r is "
                                 f"{config.r}: is this another model, or another rank?")
            with torch.no_grad():
                parameter.copy_(tensor)
    return config


def _copy_of_base(model, name, tensors) -> bool:
    """PEFT stores the frozen weight of an adapted head beside the adapter: nothing new if it is the base's own."""
    layers = {adapter_name(model, layer) + ".base_layer.weight": module for layer, module in lora_layers(model).items()}
    layer = layers.get(name)
    if layer is None or list(layer.weight.shape) != tensors.get_slice(name).get_shape():
        return False
    return layer.weight.is_meta or torch.equal(tensors.get_tensor(name).to(layer.weight), layer.weight)


def adapter_name(model: CausalLM, layer: str) -> str:
    """What PEFT calls an adapted layer. The stacks of a layer's experts are parameters of one module to it, and it
    wraps that module once for each: experts.base_layer is the first of two, experts the second."""
    name, layers = model.config.stored_name(layer), lora_layers(model)
    if isinstance(layers[layer], LoRAStacked):
        block = layer.rpartition(".")[0]
        stacks = [other for other in layers if other.startswith(block + ".") and isinstance(layers[other], LoRAStacked)]
        name = model.config.stored_name(block) + ".base_layer" * (len(stacks) - 1 - stacks.index(layer))
    return PREFIX + name


def adapter_tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    """{name as PEFT writes it: parameter} of the adapters, and of modules trained whole."""
    found = {}
    for layer, module in lora_layers(model).items():
        assert not module.weight.requires_grad, layer
        for part in ("lora_A", "lora_B"):
            found[f"{adapter_name(model, layer)}.{part}.weight"] = getattr(module, part).weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and not name.endswith((".lora_A.weight", ".lora_B.weight")):
            found[PREFIX + model.config.stored_name(name)] = parameter
    return found


def save_adapter(model: CausalLM, folder, config: LoRAConfig, base: str):
    """Write adapter_config.json and adapter_model.safetensors; `base` is the base model as the user named it."""
    folder = Path(folder)
    _save_tensors(folder / "adapter_model.safetensors", adapter_tensors(model))
    targets, stacks = peft_targets(model, config.target_modules)
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_dora": False,
        "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora, "target_modules": targets, "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern, "modules_to_save": config.modules_to_save or None}
        | ({"target_parameters": stacks} if stacks else {}))


def peft_targets(model: CausalLM, wish) -> tuple[list | str, list]:
    """target_modules and target_parameters that make PEFT adapt the same layers: the user's own, where PEFT reads them
    alike (it knows no blocks, no `all`), else last name parts, else full names."""
    called, layers = model.config.stored_name, lora_layers(model)
    stacks = [called(name + ".weight") for name, layer in layers.items() if isinstance(layer, LoRAStacked)]
    adapted = {called(name) for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    if isinstance(wish, str) and wish not in ("all", "all-linear") and not stacks:
        return wish, []                                                         # a regular expression
    names = [called(name) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    last = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    for targets in (wish if isinstance(wish, list) else [], last):
        if adapted == {name for name in names if name.endswith(tuple("." + t for t in targets)) or name in targets}:
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


def load_with_adapters(folder, adapters: list, dtype=None, device="cpu") -> CausalLM:
    """Base model with adapters, for inference: all but the last are folded in, the last stays beside the weights.

    A and B take the base's dtype: in float32, which the optimizer needs, each decoding step would convert them anew.
    """
    model = load_model(folder, dtype, device)
    for index, adapter in enumerate(adapters):
        load_adapter(model, adapter)
        if index < len(adapters) - 1:
            merge_adapters(model)
    for layer in lora_layers(model).values():
        layer.to(layer.weight.dtype)
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


def _save_tensors(path, tensors: dict):
    """A small safetensors file in one go. Raises OSError if it cannot be written, such as on a full disk."""
    path.touch()
    mode = path.stat().st_mode                  # as the umask says; save_file makes files that only their owner can read
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(path),
                  metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}). Is there room on the disk?") from None


@contextmanager
def new_folder(path):
    """A folder that appears under its name only when the block ends well: `with new_folder(p) as work: write into work`."""
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
    if path.exists():
        os.replace(path, old)                   # one of the two is whole at any moment
    os.replace(work, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def into_folder(path):
    """new_folder for a folder that is in use: the files move into it when the block ends well, each over an older one."""
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
        raise OSError(f"{folder}: {sum(sizes.values()) / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free. Make room, or choose "
                      "another folder")
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

    dtype None writes each tensor as it is held; config.json then states that of the first.
    """
    weights = {model.config.stored_name(name): p for name, p in model.named_parameters()}
    write_tensors(folder, {n: (tuple(p.shape), dtype or p.dtype) for n, p in weights.items()},
                  lambda n: [weights[n].data.to(dtype or weights[n].dtype)])
    dtype = dtype or next(iter(weights.values())).dtype
    raw = read_config_json(source)
    raw.pop("dtype", None)
    write_json(Path(folder) / "config.json", {**raw, "torch_dtype": str(dtype).removeprefix("torch.")})
    generation = Path(source) / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, Path(folder) / generation.name)


# ---- resumable training state -----------------------------------------------------------------------------------


def save_training_state(folder, optimizer, names: list[str], state: dict):
    """optimizer.safetensors, rng.safetensors and trainer_state.json into a checkpoint folder.

    names: the trainable parameters in the optimizer's order of groups; state: the JSON part (step, log, …).
    """
    tensors = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in zip(names, params, strict=True):
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{name}|{key}"] = torch.as_tensor(value)
    folder = Path(folder)
    _save_tensors(folder / "optimizer.safetensors", tensors)
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    _save_tensors(folder / "rng.safetensors", rng)
    write_json(folder / "trainer_state.json", state)


def load_training_state(folder, optimizer, names: list[str]) -> dict:
    """Put back what save_training_state wrote; returns the JSON part. Raises ValueError if the parameters differ."""
    folder = Path(folder)
    for file in STATE_FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing: the run cannot be resumed from here (was it saved with "
                                    "save_only_model: true?). Start from its adapter instead: adapter_name_or_path")
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
            value = tensors.get_tensor(key)
            p = by_name[name]
            if field != "step" and value.shape != p.shape:
                raise ValueError(f"{folder} holds optimizer state of shape {list(value.shape)} for {name}, which is "
                                 f"{list(p.shape)} here: {changed}")
            optimizer.state[p][field] = value if field == "step" and p.device.type == "cpu" else value.to(p.device)
    with open_tensors(folder / "rng.safetensors") as tensors:
        torch.set_rng_state(tensors.get_tensor("cpu"))
        if torch.cuda.is_available() and "cuda" in tensors.keys():
            torch.cuda.set_rng_state(tensors.get_tensor("cuda"))
    path = folder / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the run cannot be resumed from here. An earlier "
                         "checkpoint may do (resume_from_checkpoint: FOLDER)") from None


def checkpoints_in(output_dir, resumable: bool = True) -> list[Path]:
    """checkpoint-N folders, oldest first; resumable: only those with the state of their training."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if not resumable or (p / "trainer_state.json").is_file()),
                  key=lambda p: int(p.name.split("-")[1]))
