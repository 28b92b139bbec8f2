"""Checkpoint folders and their tensor files: find, open and write them.

Files and folders appear under their final names only when they are complete.

Requires: checkpoint/work_folder.py.
Next: checkpoint/names.py.
"""
import json
import os
import pickle
import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint.work_folder import OLD, files_under, keep_aside, work_folder
from errors import bytes_in_words, first_line, nearest_name
from text.hub_files import is_on

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
# names of the files of a checkpoint in several parts
SHARDS = {
    "model.safetensors": "model-[0-9]*-of-[0-9]*.safetensors",
    "pytorch_model.bin": "pytorch_model-[0-9]*-of-[0-9]*.bin",
}
# what is downloaded, and the same weights in the vendor's own layout
WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.tiktoken", "*.py", "README.md",
          "LICENSE*"]
DUPLICATES = ["consolidated*", "original/*"]
SECONDS_BEHIND = 0.25           # between two times that a growing file is written through
CODES = {dtype: code for code, dtype in FILE_DTYPES.items()}
# A pickle can run any code. torch's restricted loader makes nothing but tensors, but could be
# circumvented before torch 2.6 (CVE-2025-32434).
PICKLES_ARE_SAFE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


def find_checkpoint(name_or_path: str, revision: str | None = None,
                    cache_dir: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or a repository of the hub, downloaded or cached.

    HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE act as huggingface_hub defines them; with
    USE_MODELSCOPE_HUB=1 the repository is one of ModelScope. Raises FileNotFoundError that says
    what to do: for a folder that does not exist, a repository that the hub does not know, a gated
    one, no network.
    """
    if "\0" in name_or_path:
        raise ValueError(f"{name_or_path!r} holds a null character, which no file name has; name "
                         "the folder of a checkpoint")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{name_or_path} is a file; name the folder that holds the "
                                "checkpoint")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) or name_or_path.startswith("."):
        raise FileNotFoundError(f"{name_or_path} does not exist" + _near(path))
    if is_on("USE_MODELSCOPE_HUB"):
        return download_from_modelscope(name_or_path, revision, cache_dir)
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, HFValidationError
    try:
        return download(name_or_path, revision, cache_dir)
    except (HFValidationError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(why_not_downloaded(name_or_path, revision, error)) from None


def hub_name(name_or_path: str) -> str | None:
    """The name on the hub of a checkpoint: its own, or of the cached folder; None for others."""
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        return name_or_path if re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path) else None
    parts = path.resolve().parts                    # …/models--OWNER--NAME/snapshots/REVISION
    cached = re.fullmatch(r"models--(.+?)--(.+)", parts[-3]) if len(parts) > 3 else None
    return f"{cached[1]}/{cached[2]}" if cached and parts[-2] == "snapshots" else None


def download(repository: str, revision: str | None, cache_dir: str | None) -> Path:
    """Download weights, JSON, tokenizer, licence and code of a repository; the code is never run.
    """
    from huggingface_hub import snapshot_download

    options = {"revision": revision, "cache_dir": cache_dir}
    folder = Path(snapshot_download(repository, allow_patterns=WANTED, ignore_patterns=DUPLICATES,
                                    **options))
    if PICKLES_ARE_SAFE and not any(folder.glob("*.safetensors")):
        snapshot_download(repository, allow_patterns=["pytorch_model*.bin"], **options)
    return folder


def download_from_modelscope(repository: str, revision: str | None,
                             cache_dir: str | None) -> Path:
    """The same from ModelScope, with its own package, whose main branch is called master."""
    try:
        from modelscope import snapshot_download
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{repository} is no local folder, and USE_MODELSCOPE_HUB=1 asks for it on ModelScope, "
            "which needs its package: pip install modelscope (or unset the variable)") from None
    options = {"revision": None if revision == "main" else revision, "cache_dir": cache_dir}
    try:
        folder = Path(snapshot_download(repository, allow_patterns=WANTED,
                                        ignore_patterns=DUPLICATES, **options))
        if PICKLES_ARE_SAFE and not any(folder.glob("*.safetensors")):
            snapshot_download(repository, allow_patterns=["pytorch_model*.bin"], **options)
    except Exception as error:                      # its errors have no common class
        raise FileNotFoundError(
            f"{repository} could not be fetched from ModelScope ({first_line(error)}). Is the name "
            "right, is there a network? Without USE_MODELSCOPE_HUB=1 it is looked for on the "
            "Hugging Face hub") from None
    return folder


def why_not_downloaded(name: str, revision: str | None, error: Exception) -> str:
    """The message for an error of huggingface_hub: what is wrong and what to do."""
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
    return (f"{name} is no local folder{near} and is not in the cache, and the hub could not be "
            f"reached ({reason}). Give a folder, or download it where there is a network: hf "
            f"download {name}")


def _near(path: Path) -> str:
    """" (did you mean …?)" with the most similar name in the same folder, or ""."""
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest_name(path.name, names)
    return f" (did you mean {path.parent / near}?)" if near else ""


@contextmanager
def open_tensors(path, device="cpu"):
    """Open a tensor file: keys(), get_tensor(name), get_slice(name)[rows]; tensors are read lazily.

    Raises ValueError that says which file is broken and what to do.
    """
    if Path(path).suffix == ".bin":
        yield PickledTensors(path, device)
        return
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); fetch it again, or use "
                         "another copy") from None


class PickledTensors:
    """A file of torch.save that is a dict of tensors, memory-mapped; the methods of safe_open."""

    def __init__(self, path, device):
        if not PICKLES_ARE_SAFE:
            raise ValueError(
                f"{path} is a pickle, which is safe to read with torch 2.6 or newer only "
                f"(CVE-2025-32434; this is torch {torch.__version__}). Convert the checkpoint with "
                f"a newer torch: python merge.py model_name_or_path={Path(path).parent} "
                "export_dir=NEW_FOLDER")
        self.path = path
        self.device = device
        try:
            self.tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} holds objects other than tensors, which are not read "
                             f"({reason})") from None
        except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
                AssertionError) as error:
            reason = first_line(error)
            raise ValueError(f"{path} is damaged, incomplete, or older than torch 1.6 ({reason}); "
                             "fetch it again, or use another copy") from None
        is_dict = isinstance(self.tensors, dict)
        if not is_dict or not all(map(torch.is_tensor, self.tensors.values())):
            raise ValueError(f"{path} is not a dict of tensors, as the weights of a model are")
        for name, tensor in self.tensors.items():
            if not isinstance(name, str):
                raise ValueError(f"{path}: a tensor is called {name!r}, which is no text; the "
                                 "weights of a model have names such as model.norm.weight")
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                kind = "without data" if tensor.is_meta else str(tensor.layout)
                raise ValueError(f"{path}: {name} is stored {kind}; only plain, dense tensors are "
                                 "read. Save it again with tensor.to_dense()")

    def keys(self):
        return self.tensors.keys()

    def get_slice(self, name):
        if name not in self.tensors:
            raise ValueError(f"{self.path} holds no {name}, which the index says it does; fetch "
                             "both again")
        return self.tensors[name].detach()

    def get_tensor(self, name):
        return self.get_slice(name).contiguous().to(self.device)


def read_rows(tensors, name, rows: slice):
    """Some rows of a tensor in an open file; the others are not read."""
    part = tensors.get_slice(name)
    if rows.start is not None and rows.start == rows.stop:      # safetensors has no empty slices
        return part[:1][:0]
    return part[rows]


def stored_as(file, key) -> tuple[tuple, torch.dtype]:
    """Shape and dtype of a tensor in a file; the tensor itself is not read."""
    with open_tensors(file) as tensors:
        return tensor_info(tensors, file, key)


def tensor_info(tensors, file, key) -> tuple[tuple, torch.dtype]:
    """The same for an open file."""
    part = tensors.get_slice(key)
    if torch.is_tensor(part):
        shape = tuple(part.shape)
        code = CODES.get(part.dtype, str(part.dtype))
    else:
        shape = tuple(part.get_shape())
        code = part.get_dtype()
    if code not in FILE_DTYPES:
        raise ValueError(f"{file}: {key} is stored as {code}; known are {', '.join(FILE_DTYPES)}")
    return shape, FILE_DTYPES[code]


def tensor_files(folder) -> dict[str, Path]:
    """{tensor name: file} of a checkpoint folder, in the order of the file or of the index.

    As in transformers, safetensors come before pickles and a single file before an index, which
    may be left over from an older model in the same folder. Raises FileNotFoundError or ValueError
    for what is missing or damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        single = Path(folder) / name
        index = Path(folder) / f"{name}.index.json"
        if single.is_file():
            return dict.fromkeys(names_in_order(single), single)
        if index.is_file():
            return _indexed_shards(index)
        if shards := sorted(Path(folder).glob(SHARDS[name])):
            return _listed_shards(index, shards)
    hint = ""
    if not PICKLES_ARE_SAFE:
        hint = (". A repository with only pytorch_model.bin needs torch 2.6 or newer; this is "
                f"torch {torch.__version__}")
    raise FileNotFoundError(f"{folder} has no weights: no model.safetensors or pytorch_model.bin, "
                            f"nor the .index.json of either{hint}")


def names_in_order(path: Path) -> list[str]:
    """Names of a file's tensors in the order of their bytes, where the package tells it."""
    with open_tensors(path) as file:
        return list(getattr(file, "offset_keys", file.keys)())


def read_json_object(path: Path, advice: str) -> dict:
    """The fields of a JSON file. Raises ValueError that names the file and ends with the advice."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read; {advice}") from None
    except ValueError as error:         # bad JSON, bad UTF-8, a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON ({first_line(error)}); {advice}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object with fields; "
                         f"{advice}")
    return content


def _indexed_shards(index: Path) -> dict[str, Path]:
    """{tensor name: file} of an index. A file outside its folder is refused."""
    weight_map = read_json_object(index, "fetch it again").get("weight_map")
    texts = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not texts or not weight_map:
        raise ValueError(f"{index} is damaged or incomplete; fetch it again")
    for name, file in weight_map.items():
        if not is_file_name(file):
            raise ValueError(f"{index}: {name} is in {file!r}, which is no file in that folder; "
                             "fetch the index again, from a source you trust")
    files = {name: index.parent / file for name, file in weight_map.items()}
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        link = index.parent / missing[0]
        if link.is_symlink():
            raise FileNotFoundError(
                f"{link} is a link to {os.readlink(link)}, which is not there. Put that back, or "
                "link it anew (ln -sf WHERE_IT_IS_NOW LINK); in the hub's cache, fetch it again")
        raise FileNotFoundError(
            f"{index} names {len(missing)} file(s) that are not there: {', '.join(missing[:4])}. "
            "The download is incomplete; fetch them again")
    return files


def is_file_name(text: str) -> bool:
    """Whether this names a file of the folder at hand or of one inside it, on any system."""
    parts = re.split(r"[/\\]", text)
    return "" not in parts and ".." not in parts and not re.search(r"[:\x00-\x1f]", text)


def _listed_shards(index: Path, shards: list[Path]) -> dict[str, Path]:
    """{tensor name: file} of shards without an index, which must be all of one set."""
    counts = {file.stem.rpartition("-of-")[2] for file in shards}
    count = int(max(counts))
    if len(counts) > 1 or count != len(shards):
        raise FileNotFoundError(
            f"{index} is missing, and the shards beside it are not one whole set "
            f"({shards[0].name}, …: {len(shards)} files). Fetch the index and the other files")
    files = {}
    for file in shards:
        for name in names_in_order(file):
            if name in files:
                raise ValueError(f"{files[name]} and {file} both hold {name}, and {index} is "
                                 "missing, which says the one to read; fetch it")
            files[name] = file
    return files


# ---- writing ------------------------------------------------------------------------------------


def write_json(path, value):
    """Write a JSON file, complete or not at all."""
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
        partial.unlink(missing_ok=True)     # a full disk leaves nothing half-written


def save_tensors(path, tensors: dict):
    """Write a small safetensors file, all tensors in memory at once.

    Raises OSError if it cannot be written, for example to a full disk.
    """
    path.touch()
    mode = path.stat().st_mode              # by the umask; save_file makes files only for the owner
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, str(path), metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        message = f"{path} could not be written ({error}). Is there room on the disk?"
        raise OSError(message) from None


@contextmanager
def new_folder(path, replaceable: Collection[str] = ()):
    """A folder to fill; it is renamed to `path` when the block ends without an error.

        with new_folder(path) as work:
            write_json(work / "config.json", config)

    An existing folder is replaced if it holds nothing but files that the new one has, too, or
    whose names are in `replaceable`; else it is kept under another name. Raises ValueError for a
    path that is no folder: a file, or a device such as /dev/null.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and a folder is to be written there. Remove it, or "
                         "name another folder")
    with work_folder(path) as work:
        new = work / "new"
        new.mkdir()
        yield new
        sync_files(new)
        if path.exists():
            others = sorted(files_under(path) - files_under(new) - set(replaceable))
            if others:
                keep_aside(path, f"it holds {others[0]}, which was not written here")
            else:
                os.replace(path, work / OLD)    # at any moment one of the two is complete
        os.replace(new, path)
        sync_folder(path.parent)


def sync_files(folder: Path):
    """Write all files in a folder through to the disk, and the folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(folder)


def sync_folder(path):
    """Make renames in a folder survive a power failure, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:                         # Windows cannot open folders
        return
    try:
        os.fsync(handle)
    except OSError:                         # nor can every network file system sync one
        pass
    finally:
        os.close(handle)


@contextmanager
def into_folder(path):
    """new_folder for a folder in use: when the block ends without an error, its files move there.

    Each replaces an older one of the same name.
    """
    path = Path(path)
    with work_folder(path / "final") as work:
        new = work / "new"
        new.mkdir()
        yield new
        sync_files(new)
        for file in sorted(new.iterdir()):
            os.replace(file, path / file.name)
        sync_folder(path)


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Split tensor names, in order, into files of at most `limit` bytes.

    A tensor that is larger gets a file of its own.
    """
    shards = []
    room = 0
    for name, size in sizes.items():
        size += len(name) + 150             # its entry in the file's header
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_tensors(folder, shapes: dict, rows_of, limit: int = 5 * 10**9,
                  progress=lambda bytes_written: None, metadata: dict[str, str] = {}):
    """Write model.safetensors, or shards with an index, with one block of a tensor in memory.

    shapes: {name: (shape, torch dtype)} in the order of writing. rows_of(name): the rows of a
    tensor, in one or several blocks. limit: bytes of a shard. progress: called after each block.
    metadata: for the files' headers. Raises OSError if the disk has too little room.
    """
    folder = Path(folder)
    sizes = {name: dtype.itemsize * torch.Size(shape).numel()
             for name, (shape, dtype) in shapes.items()}
    total = sum(sizes.values())
    check_disk(folder, total)

    shards = plan_shards(sizes, limit)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, {name: shapes[name] for name in names}, rows_of, progress,
                    metadata)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def check_disk(folder: Path, total: int):
    """Raises OSError if the disk of a folder has less room than this many bytes."""
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(f"{folder}: {bytes_in_words(total)} to write, {bytes_in_words(free)} free. "
                      "Make room, or choose another folder")


@contextmanager
def written_behind(path: Path):
    """A new file, open for writing; its bytes go to the disk while the next ones are computed.

    Else the disk would idle until the end, and the program then wait. Raises OSError of the disk.
    """
    ended = Event()

    def write_through():
        while not ended.wait(SECONDS_BEHIND):
            os.fsync(out.fileno())

    with open(path, "wb") as out, ThreadPoolExecutor(1) as pool:
        behind = pool.submit(write_through)
        try:
            yield out
        finally:
            ended.set()
        behind.result()


def write_shard(path: Path, shapes: dict, rows_of, progress, metadata: dict[str, str]):
    """Write one safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes.

    The package safetensors can only write a file whose tensors are all in memory.
    """
    header = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)         # tensors start at a multiple of 8 bytes
    with written_behind(path) as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name in shapes:
            start = out.tell()
            for block in rows_of(name):
                assert block.dtype == shapes[name][1], name
                flat = block.detach().cpu().contiguous().reshape(-1)
                out.write(flat.view(torch.uint8).numpy())
                progress(block.nbytes)
                del block, flat             # before the next one is made
            begin, end = header[name]["data_offsets"]
            assert out.tell() - start == end - begin, name
