"""Checkpoints by GPTQ, AWQ and compressed-tensors: weights with a scale for groups of columns.

config.json's quantization_config says by which method; everything else that can be told from the
tensors of a layer is: its bits, its groups, and whether it is quantized at all. So layers that were
left in 16 bits, a quantized head and GPTQModel's rules for single layers (dynamic) need no list.

    GPTQ (AutoGPTQ, GPTQModel)      qweight (in * bits / 32, out) int32, down the columns;
                                    qzeros (groups, out * bits / 32) int32; scales (groups, out);
                                    g_idx (in,): the group of each column. The format "gptq" stores
                                    zeros minus one, "gptq_v2" as they are
    AWQ, version gemm (AutoAWQ)     qweight (in, out / 8) int32, along the rows, the eight codes
                                    of a word in the order AWQ_ORDER; qzeros (groups, out / 8);
                                    scales (groups, out)
    compressed-tensors, format      weight_packed (out, in * bits / 32) int32; weight_scale (out,
    pack-quantized (llm-compressor) groups); weight_zero_point (out * bits / 32, groups), where
                                    zeros are not the middle; weight_g_idx; weight_shape

The first code of a word is in its lowest bits. Three-bit codes of GPTQ cross from word to word.

Requires: checkpoint/files.py, methods/grouped.py (what the numbers mean).
Next: checkpoint/load.py.
Layouts: AutoGPTQ 0.8, GPTQModel 7, AutoAWQ 0.2.9, compressed-tensors 0.20.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint.files import DTYPES, open_tensors, read_json_object, tensor_info
from checkpoint.read_config import read_config_json
from methods.grouped import GroupedFormat, GroupedWeight

# {method: {name in the files, after the layer's: what it is}}
LAYOUTS = {
    "gptq": {"qweight": "codes", "qzeros": "zeros", "scales": "scales", "g_idx": "columns"},
    "awq": {"qweight": "codes", "qzeros": "zeros", "scales": "scales"},
    "compressed-tensors": {
        "weight_packed": "codes", "weight_zero_point": "zeros", "weight_scale": "scales",
        "weight_g_idx": "columns", "weight_shape": "shape"},
}
# files beside config.json, where older tools state the method's settings
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORD = 32                               # bits


@dataclass(frozen=True)
class GroupedSettings:
    """What the tensors of a layer do not tell."""
    method: str
    where: str                          # the file that states it
    bits: int | None = None             # None: differs by layer
    group_size: int | None = None
    zeros_minus_one: bool = False       # GPTQ's first format
    needs_columns: bool = False         # act-order: a layer without g_idx would be read wrongly
    needs_zeros: bool = True            # False: a layer without them has the middle of the range


@dataclass
class GroupedParts:
    """Where the files hold a quantized weight, and in which format."""
    quant_format: GroupedFormat
    shape: tuple
    parts: dict[str, tuple[Path, str]]  # {what it is in LAYOUTS: (file, key)}
    settings: GroupedSettings

    def read(self, device) -> GroupedWeight:
        """Read the weight onto the device, in the one layout of methods/grouped.py."""
        tensors = {}
        for part, (file, key) in self.parts.items():
            if part in ("codes", "zeros", "scales", "columns"):
                with open_tensors(file, device) as opened:
                    tensors[part] = opened.get_tensor(key)
        unpack = UNPACK[self.settings.method]
        codes, zeros, scales = unpack(tensors, self.shape, self.quant_format.width, self.settings)
        found = {"codes": codes, "zeros": zeros.contiguous(), "scales": scales.contiguous()}
        if self.quant_format.with_columns:
            found["columns"] = self.columns(tensors.get("columns"), codes.device)
        return GroupedWeight(self.quant_format, self.shape, **found)

    def columns(self, stored, device):
        """The group of each column, (in,) int32."""
        if stored is not None:
            return stored.int()
        return torch.arange(self.shape[1], dtype=torch.int32,
                            device=device) // self.quant_format.group_size


# ---- settings -----------------------------------------------------------------------------------


def grouped_settings(folder) -> GroupedSettings | None:
    """The settings of a folder; None if it is not quantized by one of these methods.

    Raises ValueError that names file and field for a variant that is not read.
    """
    path = Path(folder) / "config.json"
    raw = read_config_json(folder)
    stored = raw.get("quantization_config")
    if stored:
        for name in SETTINGS_FILES:
            check_same(path, stored, Path(folder) / name)
    else:
        path, stored = older_settings(folder)
    if not isinstance(stored, dict):
        return None
    method = stored.get("quant_method") or stored.get("method")
    if method not in tuple(LAYOUTS):
        return None
    where = f"{path}: quantization_config" if path.name == "config.json" else str(path)
    read = {"gptq": gptq_settings, "awq": awq_settings, "compressed-tensors": packed_settings}
    return read[method](stored, where)


def older_settings(folder) -> tuple[Path, dict | None]:
    """(file, its settings) where config.json has none; None if no other file has them."""
    for name, method in SETTINGS_FILES.items():
        path = Path(folder) / name
        if path.is_file():
            return path, {"quant_method": method, **read_json_object(path, "fetch it again")}
    return Path(folder) / "config.json", None


def check_same(path: Path, stored: dict, other_path: Path):
    """Raises ValueError where two files state another format of zeros or other bits."""
    if not other_path.is_file():
        return
    other = read_json_object(other_path, "fetch it again")
    for names in (("checkpoint_format", "format", "version"), ("bits", "w_bit")):
        mine, theirs = first_of(stored, names), first_of(other, names)
        if None not in (mine, theirs) and str(mine).lower() != str(theirs).lower():
            raise ValueError(
                f"{path}: quantization_config says {names[0]} {mine!r}, {other_path.name} beside "
                f"it says {theirs!r}. Remove the file that belongs to another model")


def first_of(stored: dict, names: tuple):
    """The value of the first of these names that is stated, or None."""
    return next((stored[name] for name in names if stored.get(name) is not None), None)


def stop_at(where: str, field: str, value, known: str):
    """Raises ValueError for a value that is not read."""
    raise ValueError(f"{where}.{field} is {value!r}; this reads {known}. Use the 16-bit "
                     "checkpoint of the same model, with quantization_bit: 4 if memory is short")


def check_numbers(stored: dict, where: str, known_bits: tuple) -> tuple[int, int]:
    """(bits, group_size), group_size -1 for one group."""
    bits = first_of(stored, ("bits", "w_bit"))
    if bits not in known_bits or isinstance(bits, bool):
        stop_at(where, "bits", bits, f"{', '.join(map(str, known_bits))} bits")
    size = first_of(stored, ("group_size", "q_group_size"))
    size = 128 if size is None else size
    if type(size) is not int or not (size == -1 or 1 <= size < 2**31):
        stop_at(where, "group_size", size, "a number of columns, or -1 for all")
    return bits, size


def gptq_settings(stored: dict, where: str) -> GroupedSettings:
    """The settings of a checkpoint by GPTQ."""
    bits, size = check_numbers(stored, where, (2, 3, 4, 8))
    layout = first_of(stored, ("checkpoint_format", "format")) or "gptq"
    if stored.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        stop_at(where, "checkpoint_format", layout, "gptq and gptq_v2")
    words = str(stored.get("pack_dtype") or "int32").removeprefix("torch.")
    if words != "int32":
        stop_at(where, "pack_dtype", words, "int32")
    for field in ("rotation", "adapter"):
        if stored.get(field):
            stop_at(where, field, stored[field], "weights as they are, without it")
    return GroupedSettings(
        method="gptq", where=where, bits=None if stored.get("dynamic") else bits, group_size=size,
        zeros_minus_one=layout == "gptq", needs_columns=bool(stored.get("desc_act")))


def awq_settings(stored: dict, where: str) -> GroupedSettings:
    """The settings of a checkpoint by AWQ."""
    bits, size = check_numbers(stored, where, (4,))
    layout = str(first_of(stored, ("version", "format")) or "gemm").lower()
    if stored.get("backend") == "llm-awq":
        layout = "llm-awq"
    if layout != "gemm":
        stop_at(where, "version", layout, "gemm")
    return GroupedSettings(method="awq", where=where, bits=bits, group_size=size)


def packed_settings(stored: dict, where: str) -> GroupedSettings:
    """The settings of a checkpoint by compressed-tensors."""
    groups = stored.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        stop_at(where, "config_groups", groups, "an object of groups of layers")
    for scheme in (stored, *groups.values()):
        layout = scheme.get("format") or "pack-quantized"
        if layout != "pack-quantized":
            stop_at(where, "format", layout, "pack-quantized")
    for field in ("kv_cache_scheme", "transform_config"):
        if stored.get(field):
            stop_at(where, field, stored[field], "weights alone (W4A16, W8A16)")
    sparsity = stored.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        stop_at(where, "sparsity_config", sparsity, "weights that are not sparse")
    symmetric = [check_scheme(scheme, f"{where}.config_groups.{name}")
                 for name, scheme in groups.items()]
    widths = {scheme["weights"]["num_bits"] for scheme in groups.values()}
    return GroupedSettings(method="compressed-tensors", where=where,
                           bits=widths.pop() if len(widths) == 1 else None,
                           needs_zeros=not any(symmetric))


def check_scheme(scheme: dict, where: str) -> bool:
    """Whether a group of layers is symmetric. Raises ValueError for what is not read."""
    for field in ("input_activations", "output_activations"):
        if scheme.get(field):
            stop_at(where, field, scheme[field], "weights alone (W4A16, W8A16)")
    weights = scheme.get("weights")
    if not isinstance(weights, dict):
        stop_at(where, "weights", weights, "an object")
    known = {"num_bits": (4, 8), "type": ("int",), "strategy": ("group", "channel")}
    for field, values in known.items():
        if weights.get(field) not in values:
            stop_at(f"{where}.weights", field, weights.get(field), ", ".join(map(str, values)))
    return weights.get("symmetric") is not False


# ---- finding ------------------------------------------------------------------------------------


def find_grouped(folder, places: dict[str, tuple[Path, str]],
                 settings: GroupedSettings) -> dict[str, GroupedParts]:
    """{name of a weight: GroupedParts} of a folder with these tensors, {name: (file, key)}.

    Raises ValueError with file and key for parts that are missing or do not fit.
    """
    names = LAYOUTS[settings.method]
    pattern = re.compile(rf"(.+)\.({'|'.join(names)})")
    layers = {}                             # {name of a layer: {part: (file, key)}}
    for full_name, place in places.items():
        if match := pattern.fullmatch(full_name):
            layers.setdefault(match[1], {})[names[match[2]]] = place
    layers = {layer: parts for layer, parts in layers.items() if "codes" in parts}
    first_name = next(iter(names))
    if not layers:
        raise ValueError(f"{settings.where} says {settings.method}, but {folder} holds no tensor "
                         f"named .{first_name}. Remove quantization_config if the weights are not "
                         "quantized")
    info = part_info(layers)
    raw = read_config_json(folder)
    dtype = DTYPES.get(raw.get("dtype") or raw.get("torch_dtype"), torch.float16)
    found = {}
    for layer, parts in layers.items():
        check_parts(layer, parts, places, settings)
        found[f"{layer}.weight"] = describe_grouped(parts, info, settings, dtype)
    return found


def check_parts(layer: str, parts: dict, places: dict, settings: GroupedSettings):
    """Raises ValueError for a layer that lacks a part, or that is there twice."""
    file, key = parts["codes"]
    if other := places.get(f"{layer}.weight"):
        raise ValueError(f"{file}: {key} and {other[1]} (in {other[0].name}) are both the matrix "
                         "of one layer. Were two models written into one folder? Fetch it again")
    needed = ["scales"]
    if settings.needs_zeros:
        needed.append("zeros")
    if settings.needs_columns:
        needed.append("columns")
    if settings.method == "compressed-tensors":
        needed.append("shape")
    for name, part in LAYOUTS[settings.method].items():
        if part in needed and part not in parts:
            raise ValueError(f"{file}: {key} belongs to a weight with the part {layer}.{name}, "
                             "which is in no file; fetch the files again")


def part_info(layers: dict) -> dict:
    """{(file, key): (shape, dtype, numbers)} of all parts; each file is opened once.

    numbers: the contents of columns and shapes, which are short; None for the rest.
    """
    by_file = {}
    for parts in layers.values():
        for part, (file, key) in parts.items():
            by_file.setdefault(file, []).append((key, part))
    found = {}
    for file, keys in by_file.items():
        with open_tensors(file) as tensors:
            for key, part in keys:
                shape, dtype = tensor_info(tensors, file, key)
                short = part in ("columns", "shape") and len(shape) == 1
                found[file, key] = (shape, dtype, tensors.get_tensor(key) if short else None)
    return found


def describe_grouped(parts: dict, info: dict, settings: GroupedSettings,
                     dtype: torch.dtype) -> GroupedParts:
    """The GroupedParts of one weight; dtype: the checkpoint's.

    Raises ValueError for tensors whose shapes do not fit each other.
    """
    file, key = parts["codes"]
    shapes = {part: info[place][0] for part, place in parts.items()}
    numbers = {part: info[place][2] for part, place in parts.items()}
    scale_dtype = info[parts["scales"]][1]
    shape, width = matrix_shape(shapes, numbers, settings)
    if settings.bits not in (None, width):
        raise ValueError(f"{settings.where} says {settings.bits} bits; {file}: {key} holds "
                         f"{width}. Is config.json that of another model?")
    by_rows = settings.method == "compressed-tensors"
    groups = shapes["scales"][-1 if by_rows else 0] if len(shapes["scales"]) == 2 else 0
    size = group_size(shape[1], groups, settings)
    stored = numbers.get("columns")
    if stored is None and not size:
        raise ValueError(f"{file}: {key} has {groups} groups for {shape[1]} columns, and no g_idx "
                         "that says which column belongs to which; fetch the files again")
    if stored is not None and (len(stored) != shape[1] or not stored.numel()
                               or int(stored.min()) < 0 or int(stored.max()) >= groups):
        raise ValueError(f"{parts['columns'][0]}: {parts['columns'][1]} is not the group, below "
                         f"{groups}, of each of {shape[1]} columns; fetch the file again")
    size = size or -(-shape[1] // groups)
    with_columns = in_other_order(stored, shape[1], size)
    kind = f"{width}-bit {settings.method}"
    quant_format = GroupedFormat(kind=kind, width=width, group_size=size, scale_dtype=scale_dtype,
                                 dtype=dtype, with_columns=with_columns)
    found = GroupedParts(quant_format=quant_format, shape=shape, parts=parts, settings=settings)
    check_part_shapes(found, info)
    return found


def matrix_shape(shapes: dict, numbers: dict, settings: GroupedSettings) -> tuple[tuple, int]:
    """((out, in), bits of a code) of a weight."""
    rows, columns = (shapes["codes"] + (0, 0))[:2]
    if settings.method == "awq":
        return (columns * WORD // 4, rows), 4
    if settings.method == "gptq":
        size_in = (shapes.get("columns") or (rows * WORD // (settings.bits or 4),))[0]
        return (columns, size_in), rows * WORD // max(size_in, 1)
    stated = numbers.get("shape")
    size_out, size_in = map(int, stated) if stated is not None and len(stated) == 2 else (0, 0)
    fitting = [bits for bits in (4, 8) if -(-size_in * bits // WORD) == columns]
    return (size_out, size_in), fitting[0] if fitting else 0


def group_size(size_in: int, groups: int, settings: GroupedSettings) -> int:
    """Columns that share a scale: as stated or, where layers differ, as many as make equal groups.

    0 if neither fits.
    """
    stated = settings.group_size or 0
    stated = size_in if stated == -1 else stated
    if stated and -(-size_in // stated) == groups:
        return min(stated, size_in)
    return size_in // groups if groups and size_in % groups == 0 else 0


def in_other_order(stored, size_in: int, size: int) -> bool:
    """Whether columns need their group stated: another order, or groups that are not equal."""
    if size_in % size or size_in % 2:
        return True
    return stored is not None and not torch.equal(stored.int(), torch.arange(size_in).int() // size)


def check_part_shapes(found: GroupedParts, info: dict):
    """Raises ValueError for a part that does not fit the matrix, or is not of its dtype."""
    size_out, size_in = found.shape
    width = found.quant_format.width
    groups = -(-size_in // found.quant_format.group_size)
    expected = {
        "gptq": {"codes": (-(-size_in * width // WORD), size_out), "scales": (groups, size_out),
                 "zeros": (groups, -(-size_out * width // WORD))},
        "awq": {"codes": (size_in, size_out * width // WORD), "scales": (groups, size_out),
                "zeros": (groups, size_out * width // WORD)},
        "compressed-tensors": {"codes": (size_out, -(-size_in * width // WORD)),
                               "scales": (size_out, groups),
                               "zeros": (-(-size_out * width // WORD), groups)},
    }[found.settings.method]
    for part, shape in expected.items():
        if part not in found.parts:
            continue
        file, key = found.parts[part]
        stored_shape, dtype, _ = info[file, key]
        fits = dtype.is_floating_point if part == "scales" else dtype == torch.int32
        if stored_shape != shape or not fits or width not in (2, 3, 4, 8):
            raise ValueError(
                f"{file}: {key} has shape {list(stored_shape)} of {dtype}; a matrix of "
                f"{list(found.shape)} with groups of {found.quant_format.group_size} columns by "
                f"{found.settings.method} has {list(shape)}. Fetch the files again")


# ---- layouts ------------------------------------------------------------------------------------


def unpack_words(words, width: int, count: int):
    """(rows, count) uint8 of words (rows, W) int32: the first code in the lowest bits of a row."""
    octets = words.contiguous().view(torch.uint8)                       # (rows, 4 W)
    if width == 3:
        together = octets.view(len(words), -1, 3).int()                 # 8 codes in 3 bytes
        octets = together[..., 0] | together[..., 1] << 8 | together[..., 2] << 16
    shifts = torch.arange(0, 24 if width == 3 else 8, width, device=words.device)
    codes = (octets[..., None] >> shifts.to(octets.dtype)) & 2**width - 1
    return codes.to(torch.uint8).view(len(words), -1)[:, :count]


def rows_in_bytes(words, width: int, count: int):
    """The rows (rows, W) int32 of a file as methods/grouped.py holds codes."""
    if width in (4, 8):                                                 # which is how they are
        octets = words.contiguous().view(torch.uint8)
        return octets[:, :-(-count * width // 8)].contiguous()
    return pack_pairs(unpack_words(words, width, count))


def pack_pairs(codes):
    """Codes (rows, n) of at most 4 bits, two in a byte, the first in the low half."""
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_gptq(tensors: dict, shape, width: int, settings: GroupedSettings) -> tuple:
    """(codes in bytes, zeros (out, groups), scales (out, groups)) of a weight by GPTQ."""
    size_out, size_in = shape
    words = tensors["zeros"]
    if settings.zeros_minus_one and width != 3:
        # one is added to all zeros of a word at once, as GPTQModel does: it undoes a subtraction
        # that borrowed from zero to zero
        words = words + sum(1 << i for i in range(0, 31, width))
    zeros = unpack_words(words, width, size_out)                        # (groups, out)
    if settings.zeros_minus_one and width == 3:
        zeros = zeros + 1 & 7
    codes = rows_in_bytes(tensors["codes"].T, width, size_in)
    return codes, zeros.T, tensors["scales"].T


def unpack_awq(tensors: dict, shape, width: int, settings: GroupedSettings) -> tuple:
    """(codes in bytes, zeros (out, groups), scales (out, groups)) of a weight by AWQ."""
    found = []
    for part in ("codes", "zeros"):
        stored = unpack_words(tensors[part], width, shape[0])           # (in or groups, out)
        ordered = torch.empty_like(stored).view(len(stored), -1, len(AWQ_ORDER))
        ordered[..., list(AWQ_ORDER)] = stored.reshape(ordered.shape)
        found.append(ordered.view(stored.shape).T)
    codes, zeros = found
    return pack_pairs(codes), zeros, tensors["scales"].T


def unpack_packed(tensors: dict, shape, width: int, settings: GroupedSettings) -> tuple:
    """(codes in bytes, zeros, scales (out, groups)) of a weight by compressed-tensors.

    Codes with a sign are stored plus the middle of their range, zeros too.
    """
    codes = rows_in_bytes(tensors["codes"], width, shape[1])
    scales = tensors["scales"]
    if "zeros" in tensors:
        zeros = unpack_words(tensors["zeros"].T, width, shape[0]).T
    else:
        zeros = torch.full(scales.shape, 2 ** (width - 1), dtype=torch.uint8, device=codes.device)
    return codes, zeros, scales


UNPACK = {"gptq": unpack_gptq, "awq": unpack_awq, "compressed-tensors": unpack_packed}
