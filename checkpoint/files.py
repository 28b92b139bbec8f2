"""Checkpoint folders and their tensor files: finding, opening, writing whole or not at all.

Requires: nothing.
Next: checkpoint/load.py.
"""

import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import nearest_name

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILE_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in FILE_DTYPES.items()}
# a pickle can run anything; torch's restricted loader makes tensors only, and before 2.6 it could
# be escaped
# CVE-2025-32434
PICKLES_ARE_SAFE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


def find_checkpoint(name_or_path: str, revision: str | None = None,
                    cache_dir: str | None = None) -> Path:
    """A local folder as it is, or a hub id downloaded (or taken from the cache) by huggingface_hub.

    HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE act as huggingface_hub defines them. Raises
    FileNotFoundError that says what to do: for a folder that does not exist, an id the hub does not
    know, a gated repository, no network.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{name_or_path} is a file; name the folder that holds the "
                                "checkpoint")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) or name_or_path.startswith("."):
        raise FileNotFoundError(f"{name_or_path} does not exist" + _near(path))
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, HFValidationError
    try:
        return download(name_or_path, revision, cache_dir)
    except (HFValidationError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(why_not_downloaded(name_or_path, revision, error)) from None


def download(repository: str, revision: str | None, cache_dir: str | None) -> Path:
    """The hub's folder of a repository: weights, JSON, tokenizer and code, which is never run."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.tiktoken", "*.py"]
    doubles = ["consolidated*", "original/*"]       # the same weights in the maker's own layout
    options = {"revision": revision, "cache_dir": cache_dir}
    folder = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=doubles,
                                    **options))
    if PICKLES_ARE_SAFE and not any(folder.glob("*.safetensors")):
        snapshot_download(repository, allow_patterns=["pytorch_model*.bin"], **options)
    return folder


def why_not_downloaded(name: str, revision: str | None, error: Exception) -> str:
    """The message for an error of huggingface_hub: what is wrong, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (GatedRepoError, HFValidationError, RepositoryNotFoundError,
                                       RevisionNotFoundError)

    near = _near(Path(name).expanduser())
    if isinstance(error, HFValidationError):
        return f"{name} does not exist{near}, and no repository of the hub can have that name"
    if isinstance(error, GatedRepoError):
        return (f"{name} is gated: accept its license at https://huggingface.co/{name}, then log "
                "in with `hf auth login` (or set HF_TOKEN)")
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r} (model_revision)"
    if isinstance(error, RepositoryNotFoundError):
        return (f"{name} is neither a local folder{near} nor a repository of the hub that you may "
                "read (a private one needs `hf auth login`)")
    reason = str(error).strip().split("\n")[0]
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    return (f"{name} is no local folder{near}, is not in the cache, and the hub could not be "
            f"reached ({reason}). Give a folder, or fetch it where there is a network: hf "
            f"download {name}")


def _near(path: Path) -> str:
    """`` (did you mean …?)`` from the names beside the one that is missing."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest_name(path.name, names)
    return f" (did you mean {path.parent / near}?)" if near else ""


@contextmanager
def open_tensors(path, device="cpu"):
    """The tensors of a file, each read when it is asked for: keys(), get_tensor(name),
    get_slice(name)[rows].

    Raises ValueError that says which file is broken and what to do.
    """
    if Path(path).suffix == ".bin":
        yield PickledTensors(path, device)
        return
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or incomplete ({error}); fetch it again, or use another copy"
        ) from None


class PickledTensors:
    """A file of torch.save that is a dict of tensors, mapped into memory; the methods are those of
    safe_open.
    """

    def __init__(self, path, device):
        if not PICKLES_ARE_SAFE:
            raise ValueError(
                f"{path} is a pickle, which is safe to read with torch 2.6 or newer only "
                "(CVE-2025-32434; "
                f"here is torch {torch.__version__}). Convert the checkpoint where torch is newer: "
                f"python merge.py model_name_or_path={Path(path).parent} export_dir=NEW_FOLDER"
            )
        self.path, self.device = path, device
        try:
            self.tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds other things than tensors, which are not read "
                f"({str(error).strip().splitlines()[0]})"
            ) from None
        except (RuntimeError, EOFError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged, incomplete, or older than torch 1.6 "
                f"({str(error).strip().splitlines()[0]}); fetch it again, or use another copy"
            ) from None
        if not isinstance(self.tensors, dict) or not all(
            map(torch.is_tensor, self.tensors.values())
        ):
            raise ValueError(f"{path} is not a dict of tensors, as the weights of a model are")

    def keys(self):
        return self.tensors.keys()

    def get_slice(self, name):
        if name not in self.tensors:
            raise ValueError(
                f"{self.path} holds no {name}, which the index says it does; fetch both again"
            )
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
    """{tensor name: file} of a checkpoint folder: one file of weights, or shards with an index; in
    the order of either.

    Safetensors come before pickles. Raises FileNotFoundError or ValueError for what is missing or
    damaged."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = Path(folder) / name, Path(folder) / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if single.is_file():
            # in the order of the bytes; keys() alone is by name
            with open_tensors(single) as file:
                return {tensor: single for tensor in getattr(file, "offset_keys", file.keys)()}
    hint = (
        ""
        if PICKLES_ARE_SAFE
        else (
            ". If its repository has pytorch_model.bin alone: that is read with "
            f"torch 2.6 or newer, here is torch {torch.__version__}"
        )
    )
    raise FileNotFoundError(
        f"{folder} has no weights: no model.safetensors or pytorch_model.bin, nor the .index.json "
        f"of either{hint}"
    )


def _shards(index: Path) -> dict[str, Path]:
    """{tensor name: file} as an index has it."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / file for name, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is damaged or incomplete; fetch it again") from None
    if missing := sorted({file.name for file in files.values() if not file.is_file()}):
        raise FileNotFoundError(
            f"{index} names {len(missing)} file(s) that are not there: {', '.join(missing[:4])}. "
            "The download is incomplete; fetch them again"
        )
    return files


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
        partial.unlink(missing_ok=True)  # a full disk leaves nothing half-written


def save_tensors(path, tensors: dict):
    """A small safetensors file in one go.

    Raises OSError if it cannot be written, such as on a full disk.
    """
    path.touch()
    # as the umask says; save_file makes files that only their owner can read
    mode = path.stat().st_mode
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            str(path),
            metadata={"format": "pt"},
        )
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(
            f"{path} could not be written ({error}). Is there room on the disk?"
        ) from None


@contextmanager
def new_folder(path):
    """A folder that appears under its name only when the block ends well: `with new_folder(p) as
    work: fill work`.
    """
    path = Path(path)
    work, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    if old.exists() and not path.exists():  # a run was killed between the two renames below
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
        os.replace(path, old)  # one of the two is whole at any moment
    os.replace(work, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(path):
    """Let a renaming outlive a power failure, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # nor does every network file system
        pass
    finally:
        os.close(handle)


@contextmanager
def into_folder(path):
    """new_folder for a folder in use: the files move into it when the block ends well, each over an
    older one.
    """
    path = Path(path)
    with new_folder(path / "final") as work:
        yield work
    for file in (path / "final").iterdir():
        os.replace(file, path / file.name)
    (path / "final").rmdir()


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Deal tensor names, in order, into files of at most `limit` bytes (a larger tensor gets a file
    of its own).
    """
    shards, room = [], 0
    for name, size in sizes.items():
        size += len(name) + 150  # its entry in the file's header
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_tensors(
    folder, shapes: dict, rows_of, limit: int = 5 * 10**9, progress=lambda bytes_written: None
):
    """Write model.safetensors, or shards with an index, no more in memory than one block of one
    tensor.

    shapes: {name: (shape, torch dtype)} in the order to write; rows_of(name): the tensor's rows
    when its turn comes, as one or several blocks in order. The safetensors package can only write a
    file whose tensors are all in memory;
    the format is simple enough to stream: header length (8 bytes, little-endian), JSON header,
    bytes."""
    folder = Path(folder)
    sizes = {
        name: dtype.itemsize * int(torch.Size(shape).numel())
        for name, (shape, dtype) in shapes.items()
    }
    free = shutil.disk_usage(folder).free
    if sum(sizes.values()) > free:
        raise OSError(
            f"{folder}: {sum(sizes.values()) / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free. "
            "Make room, or "
            "choose another folder"
        )
    shards, where = plan_shards(sizes, limit), {}
    for index, names in enumerate(shards):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            shape, dtype = shapes[name]
            header[name] = {
                "dtype": CODES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + sizes[name]],
            }
            offset += sizes[name]
            where[name] = file
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)  # tensors start on 8-byte boundaries
        with open(folder / file, "wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                start = out.tell()
                for block in rows_of(name):
                    assert block.dtype == shapes[name][1], name
                    out.write(
                        block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                    )
                    progress(block.nbytes)
                    # before the next is made, so that one is held at a time
                    del block
                assert out.tell() - start == sizes[name], name
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where},
        )
