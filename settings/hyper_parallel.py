"""LLaMA-Factory's keys use_hyper_parallel and hyper_parallel_args: what they mean here.

In LLaMA-Factory the package hyper_parallel replaces accelerate: it shards the weights over all
processes and reads further sizes from hyper_parallel_args, a JSON file or a mapping:

    {"cp_size": 2, "param_dtype": "bf16"}

Here that is fsdp: full_shard, context_parallel_size: 2 and bf16: true. The package is not needed.

Requires: settings/config.py.
Next: settings/load_config.py; docs/many_gpus.md.
Source: the fields of hyper_parallel's HyperParallelArguments, which ignores names that it does not
know.
"""
import json
from pathlib import Path

from errors import did_you_mean
from settings.config import Config

SIZES = {           # {their name: our key}
    "tp_size": "tensor_parallel_size",
    "cp_size": "context_parallel_size",
    "ep_size": "expert_parallel_size",
}
REPLICAS = ("fsdp_size", "efsdp_size")      # shards over fewer processes than all
# they choose how the same numbers are computed
SAME_RESULT = ("token_dispatcher", "device_type", "activation_mode", "activation_swap_inputs",
               "reduce_dtype")
DTYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": None,
          "float32": None}                  # {param_dtype: the key that computes in it}
KNOWN = (*SIZES, *REPLICAS, *SAME_RESULT, "param_dtype", "reshard_after_forward")


def apply_hyper_parallel(config: Config):
    """Set fsdp and the sizes of the mesh as the two keys ask for them, and note what they mean.

    Raises ValueError and FileNotFoundError for arguments that cannot be read, and ValueError for
    those that would change the result.
    """
    if not config.use_hyper_parallel:
        if config.hyper_parallel_args:
            config.notes.append("hyper_parallel_args is not used without use_hyper_parallel: true, "
                                "as in LLaMA-Factory")
        return
    given = hyper_parallel_settings(config)
    where = f"{config.source}: hyper_parallel_args"
    meaning = []
    for name, ours in SIZES.items():
        size = whole_number(where, name, given.get(name))
        if size > 1 and config.given.get(ours, size) != size:
            raise ValueError(f"{where}: {name} is {size}, and {ours} is {config.given[ours]}; keep "
                             "one of them")
        if size > 1:
            setattr(config, ours, size)
            meaning.append(f"{ours}: {size}")
    check_arguments(config, given, where)
    if not config.fsdp and config.tensor_parallel_size == config.expert_parallel_size == 1:
        keeps = str(given.get("reshard_after_forward")).lower() == "false"
        config.fsdp = ["shard_grad_op" if keeps else "full_shard"]
        meaning.append(f"fsdp: {config.fsdp[0]}")
    config.notes.append(f"use_hyper_parallel is {' and '.join(meaning) or 'fsdp'} here")
    if unread := [name for name in SAME_RESULT if given.get(name) is not None]:
        config.notes.append(f"hyper_parallel_args: {', '.join(unread)}: no effect on the result")


def check_arguments(config: Config, given: dict, where: str):
    """Raises ValueError for names that nobody reads, replicas, and a dtype of another run."""
    for name in given:
        if name not in KNOWN:
            raise ValueError(f"{where}: unknown name '{name}'{did_you_mean(name, KNOWN)}. It knows "
                             f"{', '.join(KNOWN)}")
    for name in REPLICAS:
        if str(given.get(name)).lower() not in ("none", "null", ""):
            raise ValueError(f"{where}: {name}: weights are sharded over all processes here, not "
                             "over some of them; leave it out")
    dtype = given.get("param_dtype")
    if str(dtype).lower() in ("none", "null", ""):
        return
    if dtype not in DTYPES:
        raise ValueError(f"{where}: param_dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    needed, computed = DTYPES[dtype], "bf16" if config.bf16 else "fp16" if config.fp16 else None
    if needed != computed:
        asked = f"{needed}: true" if needed else "bf16: false and fp16: false"
        raise ValueError(f"{where}: param_dtype is {dtype}, and this run computes in "
                         f"{computed or 'float32'}: set {asked}, or leave param_dtype out")


def hyper_parallel_settings(config: Config) -> dict:
    """The mapping, or that of the JSON file; {} where the key is not set."""
    given = config.hyper_parallel_args
    if isinstance(given, dict) or not given:
        return given or {}
    where = f"{config.source}: hyper_parallel_args: {given}"
    if not Path(given).is_file():
        raise FileNotFoundError(f"{where}: no such file. It is a JSON file such as "
                                '{"cp_size": 2}, or such a mapping itself')
    try:
        settings = json.loads(Path(given).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{where} is no JSON object, such as {{\"cp_size\": 2}}")
    return settings


def whole_number(where: str, name: str, value) -> int:
    """A size, 1 where it is not given. Raises ValueError unless it is a whole number from 1 on."""
    text = "1" if value is None else str(value)
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{where}: {name}: {value!r} is not a whole number from 1 on")
    return int(text)
