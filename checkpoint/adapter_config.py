"""adapter_config.json: its fields, checked once when it is read, and the layers it leaves out.

Requires: lora.py (LoRAConfig, patterns), checkpoint/read_config.py (JSON).
Next: checkpoint/adapters.py.
Fields: PEFT 0.21's LoraConfig and OFTConfig.
"""
import re
from collections.abc import Callable
from pathlib import Path

from checkpoint.files import read_json_object
from checkpoint.read_config import not_within
from errors import shown
from lora import AdapterConfig, LoRAConfig, match_patterns

# ---- the table ----------------------------------------------------------------------------------


def is_text(value) -> bool:
    return type(value) is str


def is_flag(value) -> bool:
    return type(value) is bool


def is_list_of(kind: type) -> Callable:
    """A test for a list whose entries all have this type."""
    return lambda value: type(value) is list and all(type(entry) is kind for entry in value)


def is_text_or_list(value) -> bool:
    return is_text(value) or is_list_of(str)(value)


def is_number_or_list(value) -> bool:
    return type(value) is int or is_list_of(int)(value)


TYPES = {       # field: (test, what it must be)
    **dict.fromkeys(("peft_type", "task_type", "bias", "peft_version", "revision",
                     "base_model_name_or_path"), (is_text, "text")),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "lora_bias",
                     "use_qalora", "ensure_weight_tying", "coft", "block_share",
                     "use_cayley_neumann", "init_weights"), (is_flag, "true or false")),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"),
                    (is_text_or_list, "text or a list of texts")),
    **dict.fromkeys(("modules_to_save", "target_parameters"),
                    (is_list_of(str), "a list of texts")),
    "layers_to_transform": (is_number_or_list, "a whole number or a list of them"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"),
                    (lambda value: type(value) is dict, "an object")),
}
BOUNDS_OF_LORA = {"r": (1, 2**20), "lora_alpha": (0.0, 1e9), "lora_dropout": (0.0, 1.0)}
BOUNDS_OF_OFT = {"r": (0, 2**20), "oft_block_size": (0, 2**20), "module_dropout": (0.0, 1.0),
                 "num_cayley_neumann_terms": (1, 2**20), "eps": (0.0, 1e9)}
PATTERN_BOUNDS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}

# fields that change nothing here
NEUTRAL = frozenset("""
    auto_mapping base_model_name_or_path inference_mode loftq_config megatron_config megatron_core
    peft_type peft_version revision task_type runtime_config qalora_group_size bias fan_in_fan_out
    eva_config corda_config lora_ga_config
""".split())
NEUTRAL_IN_OFT = ("eps", "init_weights", "num_cayley_neumann_terms")     # what check_oft leaves
READ_FOR_TARGETS = ("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
# init_lora_weights that leave W as it was: A and B of the file are all there is to load
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
CHANGES_BASE = ("olora", "corda", "lora_ga", "loftq")       # and those that do not


# ---- reading ------------------------------------------------------------------------------------


def read_adapter_config(folder) -> tuple[AdapterConfig, dict]:
    """(LoRAConfig or OFTConfig of an adapter folder, all its raw fields).

    Raises FileNotFoundError or ValueError for what is not a supported adapter.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: adapter_name_or_path must be a folder with adapter_config.json "
            "and adapter_model.safetensors")
    raw = read_json_object(path, "fetch it again, or save the adapter anew")
    kind = kind_of_adapter(path, raw)
    check_adapter_types(path, raw, BOUNDS_OF_LORA if kind is LoRAConfig else BOUNDS_OF_OFT)
    check_adapter_fields(path, raw, kind)

    known = kind.__dataclass_fields__
    config = kind(**{key: raw[key] for key in known if raw.get(key) is not None})
    if raw.get("target_parameters") and raw.get("target_modules") is None:
        config.target_modules = []
    if kind is LoRAConfig and not config.pissa:
        config.init_lora_weights = True
    return config, raw


def kind_of_adapter(path: Path, raw: dict) -> type[AdapterConfig]:
    """LoRAConfig or OFTConfig. Raises ValueError for another kind of adapter."""
    peft_type = raw.get("peft_type")
    if peft_type in (None, "LORA") or not is_text(peft_type):   # see check_adapter_types
        return LoRAConfig
    if peft_type != "OFT":
        raise ValueError(f"{path}: peft_type {shown(peft_type)} is not supported, only LORA and "
                         "OFT")
    from methods.oft import OFTConfig                       # only where it is asked for

    return OFTConfig


def check_adapter_types(path: Path, raw: dict, numbers: dict):
    """Raises ValueError for a field of another type, or out of bounds; null means absent."""
    for key, value in raw.items():
        words = ""
        if value is None:
            continue
        if key in TYPES:
            fits, kind = TYPES[key]
            words = "" if fits(value) else f"is not {kind}"
        elif key in numbers:
            words = not_within(value, numbers[key])
        if key in PATTERN_BOUNDS and not words:
            bounds = BOUNDS_OF_LORA[PATTERN_BOUNDS[key]]
            wrong = [entry for entry in value.values() if not_within(entry, bounds)]
            if wrong:
                words = f"holds {shown(wrong[0])}, which {not_within(wrong[0], bounds)}"
        if words:
            raise ValueError(f"{path}: {key}: {shown(value)} {words}. Correct it, or save the "
                             "adapter anew")


def check_adapter_fields(path: Path, raw: dict, kind: type[AdapterConfig]):
    """Raises ValueError for a field or a value that is not supported."""
    if raw.get("bias") not in (None, "none"):
        raise ValueError(f"{path}: bias {raw['bias']!r} is not supported, only 'none'")
    read = (*kind.__dataclass_fields__, *NEUTRAL, *READ_FOR_TARGETS)
    if kind is LoRAConfig:
        check_start(path, raw.get("init_lora_weights", True))
    else:
        check_oft(path, raw)
        read += NEUTRAL_IN_OFT
    unsupported = []
    for key, value in raw.items():
        if key not in read and value is not False and value not in (None, "", [], {}):
            unsupported.append(f"{key[:60]}: {shown_as_python(value)}")
    if unsupported:
        raise ValueError(f"{path}: {', '.join(unsupported)} is not supported, and would change "
                         "what the adapter computes")
    check_layer_fields(path, raw)


def check_oft(path: Path, raw: dict):
    """Raises ValueError for an OFT adapter that PEFT 0.21 reads otherwise, or not at all."""
    if raw.get("coft"):
        raise ValueError(f"{path}: coft: true (rotations held near the identity) is not supported; "
                         "merge the adapter with peft")
    if "oft_block_size" not in raw:
        raise ValueError(f"{path}: an OFT adapter without oft_block_size is from peft before 0.14, "
                         "whose rotations no newer version reads. Merge it with that one")
    r, block_size = raw.get("r") or 0, raw["oft_block_size"] or 0
    if bool(r) == bool(block_size):
        raise ValueError(f"{path}: r is {r} and oft_block_size is {block_size}: one of the two is "
                         "0 and follows from the other. Save the adapter anew")
    if raw.get("use_cayley_neumann") is False:
        return
    terms = raw.get("num_cayley_neumann_terms")
    if terms not in (None, 5):
        raise ValueError(f"{path}: num_cayley_neumann_terms {terms} is not supported, only 5; "
                         "merge the adapter with peft")
    version = re.match(r"(\d+)\.(\d+)", raw.get("peft_version") or "0.0")
    if version and (int(version[1]), int(version[2])) < (0, 18):
        raise ValueError(
            f"{path}: peft {raw.get('peft_version') or 'before 0.18'} has written this OFT "
            "adapter, and its series (use_cayley_neumann) was another one. Merge it with that "
            "version")


def shown_as_python(value) -> str:
    return f"{value}"[:60] if isinstance(value, (bool, int, float, list)) else shown(value)


def check_start(path: Path, init):
    """Raises ValueError for an initialization after which the base was another one."""
    if type(init) in (bool, type(None), str) and init in PLAIN_STARTS:
        return
    if isinstance(init, str) and re.fullmatch(r"pissa(_niter_\d{1,9})?", init):
        return
    if init in CHANGES_BASE:
        advice = ("Convert it to a plain LoRA with peft (save_pretrained with "
                  "path_initial_model_for_weight_conversion)")
        if init == "loftq":
            advice = "Merge it with the base that peft has quantized for it, and take the result"
        raise ValueError(
            f"{path}: init_lora_weights {init!r} changed the base weights before training, so the "
            f"adapter does not fit the base as published. {advice}")
    raise ValueError(f"{path}: init_lora_weights {shown(init)} is unknown; known are true, false, "
                     f"{', '.join(filter(is_text, PLAIN_STARTS))}, pissa, pissa_niter_N")


# ---- layers that are left out -------------------------------------------------------------------


def check_layer_fields(path: Path, raw: dict):
    """Raises ValueError for layers_to_transform and layers_pattern that PEFT refuses, too."""
    patterns = raw.get("layers_pattern")
    chosen = raw.get("layers_to_transform")
    if patterns and chosen is None:
        raise ValueError(f"{path}: layers_pattern needs layers_to_transform beside it")
    if chosen is not None and isinstance(raw.get("target_modules"), str):
        raise ValueError(f"{path}: layers_to_transform needs a list as target_modules, not a "
                         f"pattern ({shown(raw['target_modules'])})")
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        if not re.fullmatch(r"[\w.]+", pattern):
            raise ValueError(f"{path}: layers_pattern {shown(pattern)} is a pattern; only names "
                             "such as layers or h are supported")


def without_excluded(names: list[str], raw: dict, where: str) -> list[str]:
    """The names that exclude_modules and layers_to_transform leave, as in PEFT.

    names: of layers that target_modules matches, as the checkpoint's files call them.
    """
    excluded = raw.get("exclude_modules") or []
    if isinstance(excluded, str):
        matches = match_patterns([excluded], names, f"{where}: exclude_modules")[0]
        names = [name for name, match in zip(names, matches) if not match]
    else:
        names = [name for name in names
                 if not any(f".{name}".endswith(f".{part}") for part in excluded)]
    return [name for name in names if is_chosen_layer(name, raw)]


def is_chosen_layer(name: str, raw: dict) -> bool:
    """Whether layers_to_transform keeps a layer. A full name in target_modules always stays."""
    chosen = raw.get("layers_to_transform")
    if chosen is None or chosen == [] or name in (raw.get("target_modules") or []):
        return True
    patterns = raw.get("layers_pattern") or []
    number = re.match(r".*?\.[^.]*\.(\d+)\.", name)         # of the block, not of an expert in it
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        number = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if number:
            break
    if not number:
        return False
    return int(number[1]) in (chosen if isinstance(chosen, list) else [chosen])
