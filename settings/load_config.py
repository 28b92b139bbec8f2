"""Read a YAML or JSON file and the command line into a Config, and report mistakes in them.

    python -m settings.load_config my.yaml lora_rank=4       print what differs from the defaults

Requires: settings/config.py (the table of keys), settings/contradictions.py, errors.py.
Next: train.py.
"""
from __future__ import annotations

import json
import math
import operator
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from errors import did_you_mean, run_script
from settings.config import (ADAPTERS, KEYS, UNUSED, VISION_KEYS, Config,
                            as_dict, print_keys, resizes_vocab)
from settings.contradictions import CONTRADICTIONS
from settings.deepspeed_presets import apply_deepspeed
from settings.fp8_keys import apply_fp8
from settings.hyper_parallel import apply_hyper_parallel

COMMAND_LINE = "command line"
OTHER_WORDS = {      # how other programs call a key, for the hint
    "alpha": "lora_alpha",
    "base_model": "model_name_or_path",
    "batch_size_per_gpu": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "gpus": "CUDA_VISIBLE_DEVICES, or torchrun --nproc-per-node",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_len": "cutoff_len",
    "max_seq_len": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "micro_batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "r": "lora_rank",
    "rank": "lora_rank",
    "resume": "resume_from_checkpoint",
    "sequence_len": "cutoff_len",
    "target_modules": "lora_target",
}
RECORDED = ("versions", "kernels")      # what train_config.json holds beside the settings
ALIASES = {         # earlier spellings, and Megatron's
    "evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu",
    "tensor_model_parallel_size": "tensor_parallel_size",
    "pipeline_model_parallel_size": "pipeline_parallel_size",
    "expert_model_parallel_size": "expert_parallel_size",
}

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
NULL = ("", "~", "null", "none")

LONGEST_FILE = 10**6    # characters
MOST_VALUES = 10**5     # in the value of a key
DEEPEST = 50            # lists and mappings within each other
LARGEST = 10**15    # of a count without a bound of its own

NEEDED = {          # the keys that a script cannot do without
    "train": ("model_name_or_path", "dataset", "output_dir"),
    "data": ("model_name_or_path", "dataset"),
    "chat": ("model_name_or_path",),
    "eval": ("model_name_or_path",),
    "merge": ("model_name_or_path", "export_dir"),
    "serve": ("model_name_or_path",),
}
COMMANDS = {        # how a script is started
    "train": "train.py",
    "data": "-m runtime.preview",
    "chat": "chat.py",
    "eval": "eval.py",
    "merge": "merge.py",
    "serve": "serve.py",
}
PEER_COMMANDS = {"train": "train.py", "chat": "chat.py", "eval": "eval.py", "export": "merge.py",
                 "api": "serve.py"}
BADAM_KEYS = {       # keys that one badam_mode reads
    "layer": ("badam_start_block", "badam_switch_mode", "badam_switch_interval"),
    "ratio": ("badam_update_ratio", "badam_mask_mode"),
}
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")     # lr_scheduler_type
CHAT_KEYS = (       # the settings of a training that chat.py reads, too
    "model_name_or_path", "adapter_name_or_path", "model_revision", "cache_dir", "output_dir",
    "finetuning_type", "quantization_bit", "quantization_type", "double_quantization",
    "infer_dtype", "bf16", "fp16", "flash_attn", "use_cpu", "template", "force_template",
    "split_special_tokens", "default_system", "enable_thinking", "preserve_thinking",
    "tool_format", "mask_history")
USAGE = {
    "train": """Fine-tune a model.

    python train.py --config configs/tiny_lora_sft.yaml
    python train.py my.yaml learning_rate=2e-4 --max_steps 20   override settings of the file
    python train.py my.yaml resume_from_checkpoint=true         resume from the newest checkpoint
""",
    "data": """Show examples as ids, as text, and the text that carries loss.

    python -m runtime.preview --config configs/tiny_lora_sft.yaml
    python -m runtime.preview my.yaml --jsonl rows.jsonl        write all processed rows
""",
    "chat": """Talk to a model and its adapter; the yaml of its training will do.

    python chat.py --config configs/tiny_lora_sft.yaml          `clear` starts anew, `exit` ends
    python chat.py my.yaml --prompt "Who are you?"              one reply
    python chat.py my.yaml --raw                                the rendered prompt, ids and text
    python chat.py my.yaml --input prompts.jsonl --output answers.jsonl     one row after the other
    python chat.py model_name_or_path=FOLDER temperature=0.2    without a file
""",
    "eval": """Evaluate a tuned model beside its base: loss, perplexity, replies and their scores.

    python eval.py --config configs/tiny_lora_eval.yaml
    python eval.py my.yaml do_eval=true                         the loss only
    python eval.py my.yaml eval_dataset=questions.json do_sample=false max_new_tokens=256
    python eval.py my.yaml task=mmlu_test                       multiple choice
""",
    "merge": """Merge an adapter into its base and write a complete checkpoint.

    python merge.py --config configs/tiny_merge.yaml
    python merge.py my.yaml export_dir=models/merged overwrite=true
    python merge.py my.yaml export_dir=models/mine export_format=gguf gguf_type=q8_0
    python merge.py my.yaml --check models/mine                 losses beside the base's
""",
    "serve": """Serve a model and its adapters over HTTP, as OpenAI's API.

    python serve.py --config configs/tiny_lora_sft.yaml         http://127.0.0.1:8000/v1
    python serve.py my.yaml adapter_name_or_path=saves/a,saves/b    `model` chooses one of them
    API_KEY=secret python serve.py my.yaml host=0.0.0.0 port=8080
""",
    "config": """Show the settings that differ from the defaults.

    python -m settings.load_config my.yaml lora_rank=4
""",
}


def load_config(argv: list[str], script: str) -> Config:
    """The settings of a run, from a config file and key=value, --key value, --key=value, --switch.

    script: train, data, chat, eval, merge, serve, or config, which only shows them. It decides
    which keys are needed, and which refusals and contradictions apply. `--help` prints the usage
    and exits.
    Raises ValueError and FileNotFoundError that name file, line, key and value.
    """
    path, overrides = read_argv(argv, script)
    written = collect((read_file(path) if path else []) + overrides)

    config = Config(source=str(path or COMMAND_LINE))
    for name, (value, where) in written.items():
        if name in UNUSED:
            if _has_effect_elsewhere(name, value, where, script):
                config.no_effect.append(name)
            continue
        value = read_value(KEYS[name], value, where, script)
        if value is not MISSING:
            config.given[name] = value
            setattr(config, name, value)

    _derive(config)
    if vision := [name for name in config.no_effect if name in VISION_KEYS]:
        config.notes.append(f"{', '.join(vision)}: images, video and sound are not supported; the "
                            "models here read text only")
    if _applies("train", script):
        apply_deepspeed(config)
        apply_hyper_parallel(config)
        apply_fp8(config)
        config.notes.extend(_notes_on_idle_keys(config))
    if script == "eval":
        config.bf16 |= config.bf16_full_eval
        config.fp16 |= config.fp16_full_eval
    _check(config, script)
    return config


def collect(entries: list[tuple[str, Any, str]]) -> dict[str, tuple[Any, str]]:
    """{key: (value as written: text, list or dict; where)} of (key, value, where) entries.

    Raises ValueError for an unknown key and for one that a file sets twice. The command line
    overrides a file, and key.name=value sets one item of a mapping.
    """
    written = {}
    for name, value, where in entries:
        name, dot, item = ALIASES.get(name, name).partition(".")
        is_mapping = name in KEYS and "dict" in KEYS[name].type
        if name not in KEYS and name not in UNUSED or dot and not is_mapping:
            hint = did_you_mean(name, [*KEYS, *UNUSED, *ALIASES])
            if name in OTHER_WORDS:
                hint = f" (here that is {OTHER_WORDS[name]})"
            elif name in RECORDED:
                hint = (" (a train_config.json records a run: give the config that started it, or "
                        f"a copy without {' and '.join(RECORDED)})")
            raise ValueError(f"{where}: unknown key '{name}{dot}{item}'{hint}. "
                             "All keys: python -m settings.config --keys")
        if dot:
            before = written[name][0] if name in written else ""
            value = {**_mapping(before, f"{where}: {name}"), item: value}
        elif name in written and where != COMMAND_LINE:
            raise ValueError(f"{where}: {name} was already set at {written[name][1]}")
        written[name] = (value, where)
    return written


def _derive(config: Config):
    """Defaults that depend on other keys, as LLaMA-Factory's (packing: docs/differences.md)."""
    if config.lora_alpha is None:
        config.lora_alpha = 2 * config.lora_rank
    if config.max_grad_norm is None:
        config.max_grad_norm = 0.0
    layerwise = (config.galore_layerwise and config.use_galore
                 or config.apollo_layerwise and config.use_apollo)
    if layerwise and config.max_grad_norm:
        config.max_grad_norm = 0.0
        config.notes.append("layerwise: gradients are not clipped, as in LLaMA-Factory; "
                            "here the update comes after the backward pass, and the learning rate "
                            "follows its schedule")
    if config.pure_bf16:
        config.bf16 = True
        if config.finetuning_type in ADAPTERS:
            config.pure_bf16 = False
            config.notes.append("pure_bf16: computes in bfloat16; the adapters stay float32, as "
                                "LLaMA-Factory (PEFT) keeps them")
    if config.use_badam:
        _derive_badam(config)
    if config.finetuning_type == "oft":
        _derive_oft(config)
    config.notes.extend(_notes_on_new_tokens(config))
    if config.stage == "sft" and config.packing and "neat_packing" not in config.given:
        config.neat_packing = True
    if config.packing is None:
        config.packing = config.neat_packing or config.stage == "pt"
    if config.eval_strategy != "no" or config.eval_on_start:
        config.do_eval = True
    if config.eval_strategy == "steps" and config.eval_steps is None:
        config.eval_steps = config.logging_steps

    resume = (config.resume_from_checkpoint or "").lower()
    if resume in TRUE:
        config.resume_from_checkpoint = "true"
    elif resume in FALSE:
        config.resume_from_checkpoint = None


def _notes_on_idle_keys(config: Config) -> list[str]:
    """Sentences on keys of evaluation and logging that do nothing beside the other keys."""
    notes = []
    if config.compute_accuracy and not config.do_eval:
        notes.append("compute_accuracy: nothing is evaluated in this run; set eval_strategy, or "
                     "do_eval: true, and val_size or eval_dataset")
    if config.plot_loss and config.logging_strategy == "no":
        notes.append("plot_loss: with logging_strategy: no there is no loss to draw; set "
                     "logging_strategy: steps")

    if config.stage == "ppo" and config.lora_dropout:
        notes.append("lora_dropout: off in stage ppo, which samples from the very model that it "
                     "trains")

    kind = config.lr_scheduler_type
    if (config.warmup_steps or config.warmup_ratio) and kind in WITHOUT_WARMUP:
        notes.append(f"warmup_steps, warmup_ratio: lr_scheduler_type: {kind} has no warmup, as in "
                     "LLaMA-Factory")

    epochs = config.eval_strategy == "epoch"
    last = config.num_train_epochs if epochs else config.max_steps
    if config.eval_delay and config.eval_strategy == "no":
        notes.append("eval_delay: eval_strategy: no evaluates at no step; set eval_strategy")
    elif config.eval_delay > last > 0 and not (epochs and config.max_steps > 0):
        limit = "num_train_epochs" if epochs else "max_steps"
        notes.append(f"eval_delay: {config.eval_delay:g} is after the end ({limit}: {last:g}): "
                     "nothing is evaluated before it")
    return notes


def _notes_on_new_tokens(config: Config) -> list[str]:
    """Sentences on keys of new tokens that do not act beside the others."""
    notes = []
    described = config.new_special_tokens_config
    if described and config.add_special_tokens:
        notes.append("add_special_tokens is not used: new_special_tokens_config names the tokens, "
                     "as in LLaMA-Factory")
    if config.init_special_tokens != "noise_init" and not described:
        notes.append(f"init_special_tokens: {config.init_special_tokens} needs the texts of "
                     "new_special_tokens_config; new rows start as in noise_init")
    frozen = config.finetuning_type == "freeze" and not config.freeze_extra_modules
    if resizes_vocab(config) and frozen:
        notes.append("new tokens: with finetuning_type: freeze their rows are not trained; "
                     "freeze_extra_modules: embed_tokens,lm_head would train them")
    return notes


def _derive_badam(config: Config):
    """What the package that LLaMA-Factory uses does not read."""
    from methods.badam import BADAM_WEIGHT_DECAY
    package = "as in the package that LLaMA-Factory uses"
    by_ratio = config.badam_mode == "ratio"
    if by_ratio and config.max_grad_norm:
        config.max_grad_norm = 0.0
        config.notes.append(f"badam_mode: ratio: gradients are not clipped, {package} (it scales "
                            "copies of them)")
    if by_ratio and config.weight_decay:
        config.notes.append(f"badam_mode: ratio: weight_decay is not read, {package}")
    if not by_ratio and config.weight_decay != BADAM_WEIGHT_DECAY:
        config.notes.append(f"use_badam: weights decay by {BADAM_WEIGHT_DECAY} and not by "
                            f"weight_decay, {package}")
    idle = [name for name in BADAM_KEYS["layer" if by_ratio else "ratio"] if name in config.given]
    if idle:
        config.notes.append(f"{', '.join(idle)}: not read with badam_mode: {config.badam_mode}, "
                            f"{package}; mode ratio changes its masks every 100 steps")


def _derive_oft(config: Config):
    """What is rotated: LLaMA-Factory 0.9.5 reads lora_target, whatever oft_target says."""
    if "lora_target" in config.given:
        config.oft_target = config.lora_target
    elif config.oft_target != ["all"]:
        config.notes.append(
            f"oft_target: {','.join(config.oft_target)} is what is rotated; LLaMA-Factory 0.9.5 "
            "reads lora_target instead, and would rotate the inputs of all linear layers")
    if config.module_dropout:
        config.notes.append(
            f"module_dropout: {config.module_dropout} is written into the adapter and does "
            "nothing, as in LLaMA-Factory: PEFT applies it to no linear layer")


def _check(config: Config, script: str):
    for name in NEEDED.get(script, ()):
        if not getattr(config, name) and not (
                name == "export_dir" and (config.check or config.check_adapter)):
            meaning = KEYS[name].metadata["help"]
            command = COMMANDS[script]
            raise ValueError(
                f"{config.source}: python {command} needs '{name}' ({meaning}), in the file or as "
                f"{name}=… after it. Usage: python {command} --help")
    for scope, checks in CONTRADICTIONS.items():
        if not _applies(scope, script):
            continue
        for check in checks:
            for applies, sentence in check(config):
                if applies:
                    raise ValueError(f"{config.source}: {sentence}")


def _applies(scope: str, script: str) -> bool:
    """Whether a script checks a row of REFUSED or CONTRADICTIONS.

    chat, serve, eval and merge accept the yaml of any training. chat, serve and eval generate.
    """
    if scope == "train":
        return script not in ("chat", "serve", "eval", "merge")
    readers = {"chat": ("serve", "eval"), "answers": ("chat", "serve")}
    return scope in ("any", script) or script in readers.get(scope, ())


def _has_effect_elsewhere(name: str, value, where: str, script: str) -> bool:
    """Whether a value of a key of UNUSED has an effect in LLaMA-Factory.

    Raises ValueError if the result would differ.
    """
    refusal = UNUSED[name]
    if refusal is None:
        return True
    joined = ",".join(map(str, value)) if isinstance(value, list) else str(value or "")
    text = joined.strip().lower()
    if text in NULL:
        return False
    if refusal.accepted:
        is_accepted = text in (TRUE if refusal.accepted == "true" else (refusal.accepted,))
    else:
        is_accepted = text in FALSE or not text.strip("0.")     # 0.0 too
    if is_accepted:
        return False
    if _applies(refusal.scope, script):
        raise ValueError(f"{where}: {name}: {value}: {refusal.advice}")
    return True


# ---- the command line ---------------------------------------------------------------------------


def read_argv(argv: list[str], script: str) -> tuple[Path | None, list[tuple[str, str, str]]]:
    """(config file or None, [(key, text, where), …]).

    The file is --config FILE or the first argument that is no setting.
    """
    path = None
    pairs = []
    rest = [str(arg) for arg in argv]
    if re.search("[\udc80-\udcff]", "".join(rest)):     # how Python shows undecodable bytes
        raise ValueError(f"{COMMAND_LINE}: not UTF-8 text; if the locale is not UTF-8, set "
                         "PYTHONUTF8=1")
    while rest:
        arg = rest.pop(0)
        if arg in ("-h", "--help"):
            print_help(script)
            raise SystemExit(0)

        name, equals, text = arg.partition("=")
        if re.fullmatch(r"-[A-Za-z]\w+", name):
            given = text if equals else rest[0] if rest else "…"
            raise ValueError(f"{COMMAND_LINE}: {arg}: settings have two dashes or none: "
                             f"-{name} {given}, or {name[1:]}={given}")
        if arg.startswith("--"):
            name = name[2:].replace("-", "_")
            if not equals:
                text = _take_value(name, rest)
        elif not (equals and re.fullmatch(r"[\w.-]+", name)):
            name = "config"
            text = arg

        if name != "config":
            pairs.append((name, text, COMMAND_LINE))
        elif path is None:
            path = Path(text)
        elif str(path) in PEER_COMMANDS and not path.is_file():
            raise ValueError(
                f"{COMMAND_LINE}: '{path}' is a command of llamafactory-cli, and no file: python "
                f"{PEER_COMMANDS[str(path)]} {text}, or python cli.py {path} {text}")
        else:
            raise ValueError(
                f"{COMMAND_LINE}: '{text}' is neither key=value nor --key value, and the config "
                f"file is already {path} (write a list as a,b; quote a text that has spaces)")
    return path, pairs


def _take_value(name: str, rest: list[str]) -> str:
    """The text after --name, taken from `rest`; a switch may have none."""
    has_value = rest and not rest[0].startswith("--")
    if name in KEYS and KEYS[name].type.startswith("bool"):
        is_bool = has_value and rest[0].lower() in TRUE + FALSE + NULL
        return rest.pop(0) if is_bool else "true"
    if has_value:
        return rest.pop(0)
    if name.partition(".")[0] not in (*KEYS, "config"):     # in UNUSED, or unknown to load_config
        return "true"
    raise ValueError(f"{COMMAND_LINE}: --{name} needs a value")


def chat_command(argv: list[str]) -> str:
    """The command that talks to what `argv` has trained: without the settings chat.py ignores."""
    path, pairs = read_argv(argv, "train")
    words = ["python", "chat.py", *([str(path)] if path else [])]
    for name, text, _ in pairs:
        if name.partition(".")[0] in CHAT_KEYS:
            words.append(f"{name}={text}")
    return shlex.join(words)


def print_help(script: str):
    """Print the usage of a script."""
    print(USAGE[script])
    print("Settings are LLaMA-Factory's keys, in a YAML or JSON file or on the command line:\n"
          "key=value, --key value, a switch alone (--bf16), a list as a,b.\n"
          "All keys with default and meaning: python -m settings.config --keys")
    if script in NEEDED:
        print(f"Needed: {', '.join(NEEDED[script])}")


# ---- config files -------------------------------------------------------------------------------


def read_file(path: Path) -> list[tuple[str, Any, str]]:
    """[(key, value, "file line n"), …] of a YAML or JSON file.

    A value is a text, or a list or dict of texts.
    """
    if not path.is_file():
        beside = []
        if path.parent.is_dir():
            beside = [other.name for other in path.parent.iterdir() if other.is_file()]
        kind = "a folder, not a config file" if path.is_dir() else "no such config file"
        raise FileNotFoundError(f"{path}: {kind}{did_you_mean(path.name, beside)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; a config is a YAML or JSON file") from None
    return _read_json(path, text) if path.suffix == ".json" else _read_yaml(path, text)


def _read_yaml(path: Path | str, text: str) -> list[tuple[str, Any, str]]:
    import yaml     # here, so that --keys and --help need only the standard library

    check_length(path, text)
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for a config") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        hint = " (YAML is indented with spaces, not with tabs)" if "'\\t'" in problem else ""
        raise ValueError(f"{path}{line}: not valid YAML: {problem}{hint}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: a config is made of lines `key: value`")
    return list(_yaml_rows(path, root))


def check_length(path: Path | str, text: str):
    """Raises ValueError for a text that is too long for a config."""
    if len(text) > LONGEST_FILE:
        raise ValueError(f"{path}: {len(text):,} characters are too many for a config; is it a "
                         "data file?")


def _yaml_rows(path: Path | str, mapping) -> Iterator[tuple[str, Any, str]]:
    """(key, value, "file line n") of each row of a mapping node."""
    for key, node, where in _yaml_nodes(path, mapping):
        yield key, _yaml_value(path, node), where


def _yaml_nodes(path: Path | str, mapping) -> Iterator[tuple[str, Any, str]]:
    """(key, node of the value, "file line n") of each row of a mapping node."""
    lines = {}      # yaml itself would keep the last of two equal keys
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if key.id != "scalar":
            raise ValueError(f"{path} line {line}: a text with braces or brackets needs quotes")
        if key.value in lines:
            raise ValueError(f"{path} line {line}: {key.value} was already set on line "
                             f"{lines[key.value]}")
        lines[key.value] = line
        yield key.value, value, f"{path} line {line}"


def _yaml_value(path: Path | str, node):
    return _yaml_values(path, node, Budget(path), depth=1)


class Budget:
    """Counts the values of a config: aliases (*a) can multiply, or hold themselves."""

    def __init__(self, path: Path | str):
        self.path = path
        self.left = MOST_VALUES

    def take(self, depth: int):
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            what = "values" if self.left < 0 else "levels"
            limit = MOST_VALUES if self.left < 0 else DEEPEST
            raise ValueError(f"{self.path}: a value has more than {limit:,} {what} (does an alias "
                             "*name hold itself or many others?): no config needs that")


def _yaml_values(path: Path | str, node, budget: Budget, depth: int):
    """The value of a node: a text, or a list or dict of values."""
    budget.take(depth)
    if node.id == "mapping":
        return {key: _yaml_values(path, value, budget, depth + 1)
                for key, value, _ in _yaml_nodes(path, node)}
    if node.id == "sequence":
        return [_yaml_values(path, item, budget, depth + 1) for item in node.value]
    return node.value


def _read_json(path: Path, text: str) -> list[tuple[str, Any, str]]:
    def unique(pairs):
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{path}: {name} is set twice")
        return {name: value if isinstance(value, (str, list, dict)) else json.dumps(value)
                for name, value in pairs}

    check_length(path, text)
    try:
        root = json.loads(text, object_pairs_hook=unique, parse_int=str, parse_float=str,
                          parse_constant=str)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for a config") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(root, dict):
        raise ValueError(f"{path}: a config is an object of keys and values, this is a "
                         f"{type(root).__name__}")
    return [(name, value, str(path)) for name, value in root.items()]


# ---- values -------------------------------------------------------------------------------------


def read_value(spec: Field, value, where: str, script: str):
    """The value of a key, from a text, list or dict as it was written.

    null means None or, for a key that cannot be None, that the line is ignored (MISSING). Raises
    ValueError that names key and value and says what is expected.
    """
    kind, _, optional = spec.type.partition(" | ")
    row = spec.metadata
    read, expected = KINDS[kind]
    wrong = f"{where}: {spec.name}: {value!r} is"
    is_count = kind in ("int", "Steps")

    if isinstance(value, str):
        value = value.strip()
        if "no" in row["choices"] and value.lower() in FALSE + NULL:
            return "no"
        if value.lower() in NULL:
            return None if optional else MISSING
    try:
        value = read(value)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{wrong} not {expected}. Meaning: {row['help']}") from None

    if row["choices"]:
        return _choice(value, row, wrong, script)
    for bound, words, fits in BOUNDS:
        limit = LARGEST if bound == "high" and is_count and row[bound] is None else row[bound]
        if limit is not None and not fits(value, limit):
            raise ValueError(f"{wrong} out of range: it must be {words} {limit}. "
                             f"Meaning: {row['help']}")
    return value


def _choice(value: str, row: dict, wrong: str, script: str) -> str:
    if value.lower() in row["choices"]:
        return value.lower()
    choices = ", ".join(row["choices"])
    if value not in row["later"]:
        hint = did_you_mean(value, row["choices"]) or f". Meaning: {row['help']}"
        raise ValueError(f"{wrong} none of {choices}{hint}")
    if _applies("train", script):
        raise ValueError(f"{wrong} not in this release yet; choose from {choices}")
    return value


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _int(text: str) -> int:
    number = float(text)        # 1e3 and 500.0 are whole numbers too
    if not number.is_integer():
        raise ValueError
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def _steps(text: str) -> float:
    return _int(text) if _float(text) >= 1 else _float(text)


def _bool(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ValueError
    return text.lower() in TRUE


def _str(text: str) -> str:
    if not isinstance(text, str):
        raise ValueError
    return os.path.expanduser(text)


def _names(value: str | list) -> list[str]:
    if isinstance(value, dict):
        raise ValueError
    items = value.strip("[]").split(",") if isinstance(value, str) else value
    return [_str(item.strip().strip("'\"")) for item in items if item.strip()]


def _numbers(value: str | list) -> list[float]:
    items = value if isinstance(value, list) else _names(value)
    return [_float(str(item)) for item in items]


def _words(value: str | list) -> list[str]:
    return [word for name in _names(value) for word in name.split()]


def _mapping(value: str | dict, where: str = "") -> dict:
    if isinstance(value, str) and value.lower() in NULL:
        return {}
    if isinstance(value, str):      # {"min_lr": 1e-6}, as on a command line
        return {name: item for name, item, _ in _read_yaml(where, value)}
    return dict(value)


def _settings(value: str | dict) -> dict:
    return {name: _number_or_text(item) for name, item in _mapping(value).items()}


def _texts(value: str | dict) -> dict[str, str]:
    return {name: _str(item) for name, item in _mapping(value).items()}


def _number_or_text(text: str):
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _name_or_mapping(value: str | dict) -> str | dict:
    if isinstance(value, str) and value.startswith("{"):    # as on a command line
        value = _mapping(value)
    return value if isinstance(value, dict) else _str(value)


KINDS = {       # declared type: how its text is read, what it is called
    "bool": (_bool, "true or false"),
    "int": (_int, "a whole number"),
    "float": (_float, "a number"),
    "Steps": (_steps, "a count of steps or a share below 1"),
    "Format": (_name_or_mapping, "the name of a chat format or a mapping that describes one"),
    "JsonFile": (_name_or_mapping, "a JSON file or a mapping"),
    "str": (_str, "a text"),
    "list[str]": (_names, "a list of names, as a,b"),
    "list[float]": (_numbers, "a list of numbers, as 0.7,0.3"),
    "Words": (_words, "words, as full_shard offload"),
    "dict": (_settings, "a mapping, as key.name=value"),
    "dict[str, str]": (_texts, "a mapping, as key.name=text"),
}
BOUNDS = (      # column of the table, in words, comparison
    ("low", "at least", operator.ge),
    ("above", "above", operator.gt),
    ("high", "at most", operator.le),
    ("below", "below", operator.lt),
)


# ---- what a config sets -------------------------------------------------------------------------


def ignored_keys(config: Config) -> list[str]:
    """Keys that were set and have no effect in this run; the start page lists them."""
    return config.no_effect + [name for name in KEYS
                               if name in config.given and not _has_effect(name, config)]


def _has_effect(name: str, config: Config) -> bool:
    """Whether finetuning_type and stage are among those that read the key.

    A key that is read only by another script is not reported: one yaml serves all scripts.
    """
    only = KEYS[name].metadata["only"]
    for key in ("finetuning_type", "stage"):
        readers = [choice for choice in KEYS[key].metadata["choices"] if choice in only]
        if readers and getattr(config, key) not in readers:
            return False
    return True


def non_default(config: Config) -> dict:
    """{key: value} of the settings that differ from the defaults, in the order of the table."""
    defaults = Config()
    _derive(defaults)
    return {name: value for name, value in as_dict(config).items()
            if value != getattr(defaults, name)}


def main(argv: list[str]):
    """python -m settings.load_config FILE key=value …, or --keys, as settings.config"""
    if argv == ["--keys"]:
        return print_keys()
    config = load_config(argv or ["--help"], "config")
    for name, value in non_default(config).items():
        print(f"{name}: {value}")
    if ignored := ignored_keys(config):
        print("accepted, no effect here: " + ", ".join(ignored))


if __name__ == "__main__":
    run_script(main)
