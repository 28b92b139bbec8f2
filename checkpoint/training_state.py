"""The part of a checkpoint that is not weights: optimizer state, random generators, checksums.

Requires: checkpoint/files.py.
Next: runtime/resume.py.
"""
import re
import zlib
from pathlib import Path

import torch

from checkpoint.files import open_tensors, read_json_object, save_tensors, write_json
from errors import shown
from text.tokenizer import read_json

# the files that resuming needs
STATE_FILES = ("optimizer.safetensors", "rng.safetensors", "trainer_state.json")
STATE_FOLDER = "optimizer_state"        # in output_dir during a run: see scale/offload_state.py
# fields of an optimizer's state that do not have the parameter's rows
NO_ROWS = ("step", "exp_avg_unit", "exp_avg_sq_unit", "low_avg", "low_avg_sq", "basis",
           "block_avg_sq", "projection", "norm", "seed", "masked_avg", "masked_avg_sq",
           "masked_master", "unused")



def is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_real(value) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def is_pair(value) -> bool:
    return type(value) is list and len(value) == 2 and all(map(is_real, value))


# the fields of trainer_state.json's "resume": (test, what it must be)
RESUME_TYPES = {
    **dict.fromkeys(("rows_per_step", "at_once", "step", "tokens_seen", "skipped", "waited"),
                    (is_count, "a whole number, 0 or above")),
    **dict.fromkeys(("rows", "kernel", "product"), (lambda value: type(value) is str, "text")),
    **dict.fromkeys(("epoch", "loss_total", "lowest"), (is_real, "a number")),
    **dict.fromkeys(("window", "best"), (is_pair, "a pair of numbers")),
    "eval_losses": (lambda value: type(value) is list and all(map(is_real, value)),
                    "a list of numbers"),
    "answers": (lambda value: type(value) is list and all(type(text) is str for text in value),
                "a list of texts"),
    "compiled": (lambda value: type(value) is bool, "true or false"),
    "seen": (lambda value: type(value) is dict and all(map(is_pair, value.values())),
             "an object with pairs of numbers"),
    "loss_scale": (lambda value: type(value) is list and all(map(is_real, value)),
                   "a list of numbers"),
}


def rng_state() -> dict[str, torch.Tensor]:
    """The states of this process's random generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def state_of(optimizer, names: list[str]):
    """Yield (parameter name, {field: tensor}) of the optimizer's state.

    names: of the trained parameters, in the order of the optimizer's groups.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in zip(names, params, strict=True):
        # an expert that no token has been routed to has no state yet
        fields = optimizer.state.get(p) or {"unused": torch.zeros(0)}
        yield name, {key: torch.as_tensor(value) for key, value in fields.items()}


def optimizer_names(optimizer, weights: dict) -> list[str]:
    """Names of the trained parameters in the optimizer's order."""
    names = {id(p): name for name, p in weights.items()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def as_it_is(name: str, value):
    """What a process keeps for a parameter, where it keeps all of it."""
    return value


def gather_state(optimizer, names: list[str], full_tensor=as_it_is, state_fields=as_it_is):
    """Yield ("parameter|field", whole tensor) of the optimizer's state; all ranks do so together.

    names: see state_of. full_tensor(name, tensor): gathers a tensor of which a rank holds a shard.
    state_fields(name, {field: tensor}): the state of a parameter that another process holds.
    """
    for name, fields in state_of(optimizer, names):
        for key, tensor in state_fields(name, fields).items():
            yield f"{name}|{key}", tensor if key in NO_ROWS else full_tensor(name, tensor)


def save_training_state(folder, optimizer, names: list[str], state: dict,
                        rng: dict[str, torch.Tensor],
                        full_tensor=as_it_is, state_fields=as_it_is):
    """Write optimizer.safetensors, rng.safetensors and trainer_state.json into a checkpoint folder.

    names: see state_of. state: the JSON part (step, log, …). rng: the generators of all ranks, as
    cpu.0, cpu.1, …. full_tensor, state_fields: see gather_state.
    """
    folder = Path(folder)
    tensors = {key: full.cpu()
               for key, full in gather_state(optimizer, names, full_tensor, state_fields)}
    save_tensors(folder / "optimizer.safetensors", tensors)
    save_tensors(folder / "rng.safetensors", rng)
    write_json(folder / "trainer_state.json", state)


def load_training_state(folder, optimizer, names: list[str], rank: int = 0,
                        parts: dict = {}, put=None) -> dict:
    """Restore what save_training_state wrote; return the JSON part.

    A rank that did not exist when the state was written keeps its generators. parts: {name: (shape
    of the full tensor, read(tensors, key): this process's part of it in an open file)} of split
    parameters. put(p, field, tensor): keeps a tensor; None: beside the parameter. Raises ValueError
    if the parameters differ, FileNotFoundError if a file is missing.
    """
    folder = Path(folder)
    for file in STATE_FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file} is missing: the run cannot be resumed from here (was it saved "
                "with save_only_model: true?). Start from its adapter: adapter_name_or_path")
    read_optimizer(folder, optimizer, names, parts, put)
    set_rng_state(folder, rank)
    return read_trainer_state(folder)


def read_trainer_state(folder) -> dict:
    """The content of trainer_state.json. Raises ValueError for what no run has written."""
    path = Path(folder) / "trainer_state.json"
    advice = ("the run cannot be resumed from here. An earlier checkpoint may do "
              "(resume_from_checkpoint: FOLDER)")
    state = read_json_object(path, advice)
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{path}: log_history is not a list of objects; {advice}")
    saved = state.get("resume", {})
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: resume: {shown(saved)} is not an object; {advice}")
    for key, value in saved.items():
        fits, kind = RESUME_TYPES.get(key, (None, ""))
        nullable = value is None and key in ("lowest", "best", "loss_scale")
        if fits and not nullable and not fits(value):
            raise ValueError(f"{path}: resume: {key}: {shown(value)} is not {kind}; {advice}")
    return state


def read_optimizer(folder: Path, optimizer, names: list[str], parts: dict, put=None):
    """Read optimizer.safetensors into the optimizer's state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(zip(names, params, strict=True))
    changed = "the settings have changed since it was written"
    with open_tensors(folder / "optimizer.safetensors") as tensors:
        keys = list(tensors.keys())
        missing = sorted(by_name.keys() - {key.partition("|")[0] for key in keys})
        if missing:
            raise ValueError(f"{folder} holds no optimizer state for {missing[0]}, which this run "
                             f"trains: {changed}")
        for key in keys:
            name, _, field = key.partition("|")
            if name not in by_name:
                raise ValueError(f"{folder} holds optimizer state for {name}, which this run does "
                                 f"not train: {changed}")
            if field == "unused":
                continue
            p = by_name[name]
            shape, read = parts.get(name, (p.shape, read_whole))
            stored = tuple(tensors.get_slice(key).get_shape())
            if field not in NO_ROWS and stored != tuple(shape):
                raise ValueError(f"{folder} holds optimizer state of shape {list(stored)} for "
                                 f"{name}, which is {list(shape)} here: {changed}")
            if field in NO_ROWS:
                value = read_whole(tensors, key)
            else:
                value = read(tensors, key).view(p.shape)
            if put:
                put(p, field, value)
            else:
                optimizer.state[p][field] = value.to(p.device)


def read_whole(tensors, key: str) -> torch.Tensor:
    """A tensor of an open file."""
    return tensors.get_tensor(key)


def set_rng_state(folder: Path, rank: int):
    """Restore this rank's random generators. Files of the first release hold those of one rank."""
    states = {}
    with open_tensors(folder / "rng.safetensors") as tensors:
        for key in tensors.keys():
            states[key if "." in key else f"{key}.0"] = tensors.get_tensor(key)
    if f"cpu.{rank}" in states:
        torch.set_rng_state(states[f"cpu.{rank}"])
    if f"cuda.{rank}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])


# ---- checksums ----------------------------------------------------------------------------------


def write_checksums(folder):
    """Write checksums.json: length in bytes and CRC-32 of every file in a checkpoint folder."""
    folder = Path(folder)
    checksums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    write_json(folder / "checksums.json", checksums)


def checksum(path) -> list:
    """[length in bytes, CRC-32 as hexadecimal text] of a file, against accidental damage."""
    crc = 0
    length = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
            length += len(block)
    return [length, f"{crc:08x}"]


def damage(folder) -> str:
    """What is wrong with a checkpoint, after reading all of it, or "".

    Checkpoints of the first release have no checksums.json; they only need to hold weights.
    """
    folder = Path(folder)
    try:
        expected = read_json(folder / "checksums.json")
    except ValueError as error:
        return str(error)
    state = folder / "trainer_state.json"
    # releases that write rows_per_step into the state also write checksums
    if not expected and state.is_file() and b"rows_per_step" in state.read_bytes():
        return "checksums.json is missing or empty"
    if not expected and not any(folder.glob("*.safetensors")):
        return "it holds no weights"
    for name, written in expected.items():
        if Path(name).name != name or not (folder / name).is_file():
            return f"{name} is missing"
        now = checksum(folder / name)
        if now != written:
            return (f"{name} is not as it was written ([bytes, checksum] are {now}, and were "
                    f"{written})")
    return ""


# ---- folders ------------------------------------------------------------------------------------


def checkpoints_in(output_dir, resumable: bool = True) -> list[Path]:
    """The folders checkpoint-N, oldest first; resumable: only those with a training state."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        has_state = (path / "trainer_state.json").is_file()
        if re.fullmatch(r"checkpoint-\d+", path.name) and (has_state or not resumable):
            found.append(path)
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))
