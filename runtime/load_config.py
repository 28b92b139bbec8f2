"""Reads a yaml or JSON file and the command line into a Config, and says what is wrong with them.

Requires: config.py (the table of keys), errors.py.
Next: train.py.
"""
from __future__ import annotations

import json
import math
import operator
import os
import re
from dataclasses import MISSING
from pathlib import Path

from config import (ALIASES, COMMANDS, COMMAND_LINE, CONTRADICTIONS, Config, FALSE, KEYS, KEYS_OF, NULL,
                    PREFERENCE_KEYS, SCRIPTS, TRUE, UNUSED, as_dict, print_help, print_keys)
from errors import did_you_mean, run_script


def load_config(argv: list[str], script: str) -> Config:
    """The settings of a run from its command line: a config file, and key=value, --key value, --key=value or --switch.

    script: train, data, chat, eval or merge; it decides which keys are needed and which refusals and contradictions count.
    Raises ValueError and FileNotFoundError that name file, line, key and value. `--help` prints the usage and exits.
    """
    path, overrides = read_argv(argv, script)
    written = {}        # {key: (text, list or dict, as written; where)}
    for name, value, where in (read_file(path) if path else []) + overrides:
        name, dot, inner = ALIASES.get(name, name).partition(".")
        if name not in KEYS and name not in UNUSED or dot and not (name in KEYS and "dict" in KEYS[name].type):
            raise ValueError(f"{where}: unknown key '{name}{dot}{inner}'{did_you_mean(name, [*KEYS, *UNUSED, *ALIASES])}. "
                             "All keys: python config.py --keys")
        if dot:
            value = {**_mapping(written[name][0] if name in written else "", f"{where}: {name}"), inner: value}
        elif name in written and where != COMMAND_LINE:
            raise ValueError(f"{where}: {name} was already set at {written[name][1]}")
        written[name] = (value, where)

    config = Config(source=str(path or COMMAND_LINE))
    for name, (value, where) in written.items():
        if name in UNUSED:
            if _acts_elsewhere(name, value, where, script):
                config.no_effect.append(name)
        elif (value := read_value(KEYS[name], value, where, script)) is not MISSING:
            config.given[name] = value
            setattr(config, name, value)
    _derive(config)
    _check(config, script)
    return config


def _derive(config: Config):
    """Defaults that depend on other keys, as LLaMA-Factory derives them (packing: see docs/differences.md)."""
    if config.lora_alpha is None:
        config.lora_alpha = 2 * config.lora_rank
    if config.max_grad_norm is None:
        config.max_grad_norm = 0.0
    if config.stage == "sft" and config.packing and "neat_packing" not in config.given:
        config.neat_packing = True
    if config.packing is None:
        config.packing = config.neat_packing or config.stage == "pt"
    if config.eval_strategy != "no":
        config.do_eval = True
    if config.eval_strategy == "steps" and config.eval_steps is None:
        config.eval_steps = config.logging_steps
    if (config.resume_from_checkpoint or "").lower() in TRUE + FALSE:
        config.resume_from_checkpoint = "true" if config.resume_from_checkpoint.lower() in TRUE else None


def _check(config: Config, script: str):
    for name in SCRIPTS[script][0] if script in SCRIPTS else ():
        if not getattr(config, name):
            meaning = KEYS[name].metadata["help"]
            command = COMMANDS.get(script, f"{script}.py")
            raise ValueError(f"{config.source}: python {command} needs '{name}' ({meaning}), in the file or behind it as "
                             f"{name}=… Usage: python {command} --help")
    for scope, wrong, sentence in CONTRADICTIONS:
        if _concerns(scope, script) and wrong(config):
            raise ValueError(f"{config.source}: {sentence}")


def _concerns(scope, script):
    """Whether a row of REFUSED or CONTRADICTIONS counts: chat, eval and merge take the yaml of any training."""
    return scope in ("any", script) or scope == "train" and script not in ("chat", "eval", "merge") \
        or scope == "chat" and script == "eval"             # both generate


def _acts_elsewhere(name, value, where, script):
    """Whether LLaMA-Factory acts on this value of a key that we do not act on; raises if the result would differ."""
    if UNUSED[name] is None:
        return True
    scope, fine, sentence = UNUSED[name]
    text = ",".join(value) if isinstance(value, list) else str(value or "").strip().lower()
    if text in NULL + {"": FALSE, "true": TRUE}.get(fine, (fine,)) or not fine and not text.strip("0."):
        return False
    if _concerns(scope, script):
        raise ValueError(f"{where}: {name}: {value}: {sentence}")
    return True


def read_argv(argv: list[str], script: str):
    """(config file or None, [(key, text, where), …]). The file is --config FILE or the first bare argument."""
    path, pairs, rest = None, [], [str(arg) for arg in argv]
    if re.search("[\udc80-\udcff]", "".join(rest)):       # how Python shows bytes that it could not decode
        raise ValueError(f"{COMMAND_LINE}: not UTF-8 text; where the locale is not UTF-8, set PYTHONUTF8=1")
    while rest:
        arg = rest.pop(0)
        if arg in ("-h", "--help"):
            print_help(script)
            raise SystemExit(0)
        name, equals, text = arg.partition("=")
        if arg.startswith("--"):
            name = name[2:].replace("-", "_")
            if not equals:
                text = _take_value(name, rest)
        elif not (equals and re.fullmatch(r"[\w.-]+", name)):
            name, text = "config", arg
        if name != "config":
            pairs.append((name, text, COMMAND_LINE))
        elif path is None:
            path = Path(text)
        else:
            raise ValueError(f"{COMMAND_LINE}: '{text}' is neither key=value nor --key value, and the config file is "
                             f"already {path} (write a list as a,b; quote a text that has spaces)")
    return path, pairs


def _take_value(name, rest):
    """The text behind --name; a switch may stand alone."""
    follows = rest and not rest[0].startswith("--")
    if name in KEYS and KEYS[name].type.startswith("bool"):
        return rest.pop(0) if follows and rest[0].lower() in TRUE + FALSE + NULL else "true"
    if follows:
        return rest.pop(0)
    if name.partition(".")[0] not in (*KEYS, "config"):     # one of UNUSED, or one that load_config will not know
        return "true"
    raise ValueError(f"{COMMAND_LINE}: --{name} needs a value")


def read_file(path: Path) -> list:
    """[(key, value, "file line n"), …] of a YAML or JSON file; a value is a text, or lists and dicts of texts."""
    if not path.is_file():
        around = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        kind = "a folder, not a config file" if path.is_dir() else "no such config file"
        raise FileNotFoundError(f"{path}: {kind}{did_you_mean(path.name, around)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; a config is a YAML or JSON file") from None
    return _read_json(path, text) if path.suffix == ".json" else _read_yaml(path, text)


def _read_yaml(path, text):
    import yaml     # here, so that --keys and --help need only the standard library

    def plain(node):
        if isinstance(node, yaml.MappingNode):
            return {name: value for name, value, _ in rows(node)}
        return [plain(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else node.value

    def rows(node):
        seen = {}       # yaml itself would keep the last of two equal keys
        for k, v in node.value:
            line = k.start_mark.line + 1
            if not isinstance(k, yaml.ScalarNode):
                raise ValueError(f"{path} line {line}: a text with braces or brackets needs quotes")
            if k.value in seen:
                raise ValueError(f"{path} line {line}: {k.value} was already set on line {seen[k.value]}")
            seen[k.value] = line
            yield k.value, plain(v), f"{path} line {line}"

    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error)
        hint = " (YAML is indented with spaces, not with tabs)" if "'\\t'" in problem else ""
        raise ValueError(f"{path}{line}: not valid YAML: {problem}{hint}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: a config is made of lines `key: value`")
    return list(rows(root))


def _read_json(path, text):
    def unique(pairs):
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path}: {twice[0]} is set twice")
        return {name: value if isinstance(value, (str, list, dict)) else json.dumps(value) for name, value in pairs}

    try:
        root = json.loads(text, object_pairs_hook=unique, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(root, dict):
        raise ValueError(f"{path}: a config is an object of keys and values, this is a {type(root).__name__}")
    return [(name, value, str(path)) for name, value in root.items()]


def read_value(spec, value, where: str, script: str):
    """The value of a key from what was written. null means None, or, where the key cannot be None, as if the line were
    not there (MISSING). Raises ValueError that names key and value and says what is expected."""
    kind, _, optional = spec.type.partition(" | ")
    about, wrong = spec.metadata, f"{where}: {spec.name}: {value!r} is"
    read, expected = KINDS[kind]
    if isinstance(value, str):
        value = value.strip()
        if "no" in about["choices"] and value.lower() in FALSE + NULL:
            return "no"
        if value.lower() in NULL:
            return None if optional else MISSING
    try:
        value = read(value)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{wrong} not {expected}. Meaning: {about['help']}") from None
    if about["choices"]:
        return _choice(value, about, wrong, script)
    for bound, words, fits in (("low", "at least", operator.ge), ("above", "above", operator.gt),
                               ("high", "at most", operator.le), ("below", "below", operator.lt)):
        if about[bound] is not None and not fits(value, about[bound]):
            raise ValueError(f"{wrong} out of range: it must be {words} {about[bound]}. Meaning: {about['help']}")
    return value


def _choice(value, about, wrong, script):
    if value.lower() in about["choices"]:
        return value.lower()
    if value not in about["later"]:
        raise ValueError(f"{wrong} none of {', '.join(about['choices'])}{did_you_mean(value, about['choices'])}")
    if _concerns("train", script):
        raise ValueError(f"{wrong} not in this release yet; choose from {', '.join(about['choices'])}")
    return value


def _float(text):
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _int(text):
    if not (number := float(text)).is_integer():        # 1e3 and 500.0 are whole numbers too
        raise ValueError
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def _bool(text):
    if text.lower() not in TRUE + FALSE:
        raise ValueError
    return text.lower() in TRUE


def _str(text):
    if not isinstance(text, str):
        raise ValueError
    return os.path.expanduser(text)


def _names(value):
    if isinstance(value, dict):
        raise ValueError
    items = value.strip("[]").split(",") if isinstance(value, str) else value
    return [_str(item.strip().strip("'\"")) for item in items if item.strip()]


def _mapping(value, where=""):
    if isinstance(value, str) and value.lower() in NULL:
        return {}
    if isinstance(value, str):      # {"min_lr": 1e-6}, as on a command line
        return {name: item for name, item, _ in _read_yaml(where, value)}
    return dict(value)


def _format(value):
    if isinstance(value, str) and value.startswith("{"):    # as on a command line
        value = _mapping(value)
    return value if isinstance(value, dict) else _str(value)


def _number_or_text(text):
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


KINDS = {           # declared type: how its text is read, what it is called
    "bool": (_bool, "true or false"), "int": (_int, "a whole number"), "float": (_float, "a number"),
    "Steps": (lambda text: _int(text) if _float(text) >= 1 else _float(text), "a count of steps or a share below 1"),
    "Format": (_format, "the name of a chat format or a mapping that describes one"),
    "str": (_str, "a text"), "list[str]": (_names, "a list of names, as a,b"),
    "Words": (lambda value: [word for name in _names(value) for word in name.split()], "words, as full_shard offload"),
    "dict": (lambda value: {k: _number_or_text(v) for k, v in _mapping(value).items()}, "a mapping, as key.name=value"),
    "dict[str, str]": (lambda value: {k: _str(v) for k, v in _mapping(value).items()}, "a mapping, as key.name=text"),
}


def ignored_keys(config: Config) -> list[str]:
    """Keys the user gave that change nothing in this run; the start page lists them by name."""
    preference = dict.fromkeys(name for names in PREFERENCE_KEYS.values() for name in names)
    return (config.no_effect + [name for kind, names in KEYS_OF.items() for name in names
                                if name in config.given and config.finetuning_type != kind]
            + [name for name in preference if name in config.given and name not in PREFERENCE_KEYS.get(config.stage, ())])


def non_default(config: Config) -> dict:
    """{key: value} of the settings that differ from the defaults, in the order of the table."""
    untouched = Config()
    _derive(untouched)
    return {name: value for name, value in as_dict(config).items() if value != getattr(untouched, name)}


def main(argv):
    """python config.py --keys | FILE key=value …"""
    if argv == ["--keys"]:
        return print_keys()
    config = load_config(argv or ["--help"], "config")
    for name, value in non_default(config).items():
        print(f"{name}: {value}")
    if ignored := ignored_keys(config):
        print("accepted, no effect here: " + ", ".join(ignored))


if __name__ == "__main__":
    run_script(main)
