"""Which layers of an adapter other programs would apply: merge.py with --check_adapter DIR.

    python merge.py model_name_or_path=BASE --check_adapter DIR

Compares names, sizes and fields of adapter_config.json; no weight is read. The programs' rules:

    PEFT        ignores a layer that is not a module of the transformers model, with a warning
    vLLM        refuses an adapter with an unknown last name; ignores a layer with another prefix
                without a message, and answers with the base
    SGLang      matches the block number and the last name; scales every layer by lora_alpha / r
    llama.cpp   loads the file that export_format: gguf-lora writes

Requires: checkpoint/adapter_names.py, checkpoint/files.py.
Next: merge.py.
Sources: the code of vLLM 0.33 and SGLang 0.5.23; PEFT 0.21 is compared in the tests.
"""
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

from checkpoint.adapter_config import read_adapter_config
from checkpoint.adapter_names import PREFIX, module_name, with_other_prefix
from checkpoint.files import open_tensors, read_json_object, stored_as, tensor_files
from checkpoint.peft_targets import REFUSED_BY_PEFT
from checkpoint.read_config import read_config_json, read_model_config
from checkpoint.served_adapter import JOINED
from families import ModelConfig
from settings.config import Config

PAIR = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])")
PLAIN_PAIR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
# model_type: {prefix in transformers 5: prefix in vLLM}, applied in this order
VLLM_PREFIXES = {
    "gemma3": {"model.language_model.": "language_model.model.",
               "lm_head": "language_model.lm_head"},
    "mistral3": {"model.language_model.": "language_model.model.",
                 "lm_head": "language_model.lm_head", "model.": "language_model.model."},
    "qwen3_5": {"model.language_model.": "language_model.model.",
                "lm_head": "language_model.lm_head"},
}
VLLM_PREFIXES["qwen3_5_moe"] = VLLM_PREFIXES["qwen3_5"]
VLLM_PREFIXES["nemotron_h"] = {"model.": "backbone."}       # which it takes for model., too
# model types for which vLLM reads PEFT's adapters of stacked experts; for others it expects one
# adapter per expert
VLLM_STACKS = ("gpt_oss", "qwen3_5_moe")
VLLM_RANK = 16                      # its default --max-lora-rank
VLLM_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
SGLANG_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "q_b_proj", "kv_b_proj",
                 "q_a_proj", "kv_a_proj_with_mqa", "embed_tokens", "lm_head", "w1", "w2", "w3")


@dataclass
class Adapter:
    """The names and fields that are compared."""
    fields: dict
    layers: set[str]                    # names without base_model.model. and .lora_A.weight
    others: list[str]                   # tensors other than LoRA's A and B
    modules: set[str]                   # of the base, named as in its files
    model_type: str                     # of config.json
    config: ModelConfig
    misfit: str                         # an A or B that does not fit the base's matrix, or ""


@dataclass
class Reading:
    """What a program would do with an adapter."""
    refused: str = ""                   # why it does not load the adapter
    ignored: dict[str, str] = field(default_factory=dict)   # {layer: why}
    notes: list[str] = field(default_factory=list)


def check_adapter(config: Config, base: Path, folder: Path):
    """Print what PEFT, vLLM, SGLang and llama.cpp apply of the adapter in a folder.

    Raises FileNotFoundError or ValueError for a folder without an adapter.
    """
    adapter = read_names(base, folder)
    print(f"checked   {folder}: {len(adapter.layers)} adapted layers, for the names in {base}")
    for program, judge in PROGRAMS.items():
        result = Reading(refused=adapter.misfit) if adapter.misfit else judge(adapter)
        print(f"{program:10}{in_sentences(result, len(adapter.layers))}")
    print(f"{'llama.cpp':10}{in_sentences(by_llama_cpp(config, base, folder), 0)}")


def read_names(base: Path, folder: Path) -> Adapter:
    """The names and fields of an adapter and of its base. Raises FileNotFoundError, ValueError."""
    settings = folder / "adapter_config.json"
    path = folder / "adapter_model.safetensors"
    for file in (settings, path):
        if not file.is_file():
            raise FileNotFoundError(f"check_adapter: {file} is missing; name the folder of an "
                                    "adapter")
    fields = read_json_object(settings, "fetch it again")
    layers, others = set(), []
    with open_tensors(path) as tensors:
        for key in tensors.keys():
            pair = PAIR.fullmatch(key)
            if pair and key.startswith(PREFIX):
                layers.add(pair[1].removeprefix(PREFIX))
            else:
                others.append(key)
    modules = {name.rpartition(".")[0] for name in tensor_files(base)}
    return Adapter(fields=fields, layers=layers, others=others, modules=modules,
                   model_type=read_config_json(base).get("model_type", ""),
                   config=read_model_config(base), misfit=first_misfit(base, path))


def first_misfit(base: Path, path: Path) -> str:
    """The first A or B of an adapter's file whose size is not that of the base's matrix, or ""."""
    weights = tensor_files(base)
    with open_tensors(path) as tensors:
        for key in tensors.keys():
            pair = PLAIN_PAIR.fullmatch(key)
            if not pair or f"{pair[1]}.weight" not in weights:
                continue
            name = f"{pair[1]}.weight"
            whole, dtype = stored_as(weights[name], name)
            if len(whole) != 2 or not dtype.is_floating_point:      # a stack, or codes
                continue
            side = 1 if pair[2] == "A" else 0
            found = tensors.get_slice(key).get_shape()
            if found[side] != whole[side]:
                return f"{key} is {list(found)}, and {name} of the base {list(whole)}"
    return ""


def in_sentences(result: Reading, count: int) -> str:
    """One printed line about one program. count: number of the adapter's layers."""
    if result.refused:
        return f"does not load it: {result.refused}"
    applied = count - len(result.ignored)
    words = [f"applies all {count} layers" if not result.ignored else
             f"applies {applied} of {count} layers"] if count else []
    reasons = {}
    for layer, why in sorted(result.ignored.items()):
        reasons.setdefault(why, []).append(layer)
    for why, layers in reasons.items():
        words.append(f"ignores {len(layers)}, such as {layers[0]}: {why}")
    return "; ".join([*words, *result.notes])


# ---- the programs -------------------------------------------------------------------------------


def by_peft(adapter: Adapter) -> Reading:
    """transformers 5 with PEFT."""
    refused = REFUSED_BY_PEFT.get(adapter.model_type)
    if any(layer.rpartition(".")[2] == refused for layer in adapter.layers):
        return Reading(refused=f"it adapts no {refused} of {adapter.model_type}")
    known = {module_name(name, adapter.config) for name in adapter.modules}
    known |= {re.sub(r"\.experts\..*", ".experts", name) for name in known}     # stacks there
    found = Reading()
    for layer in adapter.layers:
        if layer.removesuffix(".base_layer") not in known:
            found.ignored[layer] = nearest_of(layer, known)
    whole = adapter.fields.get("modules_to_save") or []
    strange = [key for key in adapter.others if not key.startswith(PREFIX) or not (
        key.endswith((".lora_magnitude_vector", ".base_layer.weight", ".oft_R.weight"))
        or any(f".{name}." in key for name in whole))]
    if strange:
        found.notes.append(f"ignores {len(strange)} other tensors, such as {strange[0]}")
    return found


def by_vllm(adapter: Adapter) -> Reading:
    """vLLM: refuses unknown last names, ignores layers with another prefix."""
    fields = adapter.fields
    if reason := vllm_refuses(fields, adapter.others):
        return Reading(refused=reason)
    prefixes = VLLM_PREFIXES.get(adapter.model_type, {})
    known = {with_other_prefixes(name, prefixes) for name in adapter.modules}
    in_stacks = adapter.model_type in VLLM_STACKS
    if in_stacks:
        known = {re.sub(r"\.experts\..*", ".experts", name) for name in known}
    elif adapter.config.stacked_experts:
        known = expert_names(known, adapter.config.num_experts)
    last_names = {last_of(name) for name in known}
    found = Reading()
    for layer in adapter.layers:
        name = with_other_prefixes(layer, prefixes)
        if in_stacks:
            name = name.removesuffix(".base_layer")
        if last_of(name) not in last_names:
            return Reading(refused=f"it has no layer {last_of(name)}"
                           + (" (adapter_prefix: served writes the experts one by one)"
                              if name.endswith((".experts", ".base_layer")) else ""))
        if name not in known:
            found.ignored[layer] = nearest_of(name, known)
    rank = max([fields.get("r") or 0, *(fields.get("rank_pattern") or {}).values()])
    if rank > VLLM_RANK:
        found.notes.append(f"start it with --max-lora-rank {rank}")
    return found


def vllm_refuses(fields: dict, others: list[str]) -> str:
    """Why vLLM refuses an adapter with these fields, or ""."""
    start = fields.get("init_lora_weights")
    whole = set(fields.get("modules_to_save") or []) - {"classifier", "score"}
    others = [key for key in others if not key.endswith(".base_layer.weight")]
    if (fields.get("peft_type") or "LORA") != "LORA":
        return f"peft_type {fields['peft_type']}"
    if fields.get("use_dora"):
        return "use_dora"
    if whole:
        return f"modules_to_save: {', '.join(sorted(whole))}"
    if isinstance(start, str) and start not in VLLM_STARTS:
        return f"init_lora_weights: {start}"
    if others:
        return f"a tensor {others[0]}"
    return ""


def by_sglang(adapter: Adapter) -> Reading:
    """SGLang: matches block number and last name, and ignores the prefix."""
    fields = adapter.fields
    targets = fields.get("target_modules")
    if (fields.get("peft_type") or "LORA") != "LORA" or fields.get("use_dora"):
        return Reading(refused="only LoRA without DoRA")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        return Reading(refused="target_modules is a regular expression")
    if fields.get("rank_pattern"):
        return Reading(refused="rank_pattern: it needs one rank for all (adapter_prefix: served)")
    found = Reading()
    for layer in adapter.layers:
        if why := why_not_in_sglang(layer, adapter.layers, adapter.config.ungated_mlp):
            found.ignored[layer] = why
    if fields.get("use_rslora") or fields.get("alpha_pattern"):
        found.notes.append("but scales all layers by lora_alpha / r, not by use_rslora or "
                           "alpha_pattern (adapter_prefix: served)")
    if adapter.others:
        found.notes.append(f"ignores {len(adapter.others)} other tensors, such as "
                           f"{adapter.others[0]}")
    return found


def why_not_in_sglang(layer: str, layers: set[str], ungated: bool = False) -> str:
    """Why SGLang ignores a layer, or "". ungated: whether MLPs have no gate."""
    parent, _, leaf = layer.rpartition(".")
    if leaf in ("experts", "base_layer"):
        return "stacks of experts (adapter_prefix: served writes them one by one)"
    for group in JOINED:            # an adapter needs the first and the last layer of a group
        if leaf not in group or ungated and "gate_proj" in group:
            continue
        missing = [name for name in {group[0], group[-1]} if f"{parent}.{name}" not in layers]
        if missing and (leaf == group[0] == "gate_proj"):
            return ""                                   # a missing up_proj counts as zero
        return f"needs an adapter of {min(missing)} too (adapter_prefix: served)" if missing else ""
    outside = leaf in ("embed_tokens", "lm_head")
    if not outside and not re.search(r"\.layers\.\d+\.", f".{layer}"):
        return "its name has no block number"
    return "" if leaf in SGLANG_LAYERS else f"it does not adapt {leaf}"


def by_llama_cpp(config: Config, base: Path, folder: Path) -> Reading:
    """llama.cpp: the plan of export_format: gguf-lora, made without reading weights."""
    from exporting.gguf_lora import GGUFLoRAExport            # only where it is asked for
    from exporting.merge_plan import plan_tensors

    try:
        read_adapter_config(folder)
        settings = replace(config, export_dir="check", gguf_type=None)
        export = GGUFLoRAExport(settings, base, [folder])
        export.set_plan(*plan_tensors(base, [folder], None, None), None)
    except ValueError as error:
        return Reading(refused=f"{error}")
    return Reading(notes=[f"applies {len(export.pairs)} matrices, as python merge.py "
                          "export_format=gguf-lora writes them"])


PROGRAMS = {"PEFT": by_peft, "vLLM": by_vllm, "SGLang": by_sglang}


# ---- names --------------------------------------------------------------------------------------


def with_other_prefixes(name: str, prefixes: dict[str, str]) -> str:
    """The name after all prefixes have been replaced, in this order."""
    for old, new in prefixes.items():
        name = with_other_prefix(name, {old: new})
    return name


def expert_names(names: set[str], experts: int) -> set[str]:
    """The names with each stack of experts replaced by experts.0.gate_proj and so on."""
    found = {name for name in names if not name.endswith(".experts")}
    for name in names - found:
        found |= {f"{name}.{i}.{part}" for i in range(experts)
                  for part in ("gate_proj", "up_proj", "down_proj")}
    return found


def last_of(name: str) -> str:
    """The part of a name by which vLLM identifies a layer; for experts, from "experts" on."""
    return name[name.find(".experts") + 1:] if ".experts" in name else name.rpartition(".")[2]


def nearest_of(layer: str, known: set[str]) -> str:
    """A reason that names the same layer as the program expects it."""
    tail = re.search(r"layers\.\d+\..*|[^.]+$", layer)[0]
    for name in sorted(known):
        if name.endswith(f".{tail}") or name == tail:
            return f"it looks for {name.removesuffix(tail)}..." if name != tail else \
                f"it looks for {name}"
    return "it has no such layer"
