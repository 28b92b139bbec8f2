"""The config of the page: a form made from the table of keys, and the yaml beside it.

    form_rows()                                         all keys, with default and help
    written_values(text, "my.yaml")                     {key: its value as written}
    set_value(text, "my.yaml", "lora_rank", "16")       the same yaml with one value changed
    check_text(text, "my.yaml", "train", folders)       errors and notes of the script

The yaml is the source: the form shows its values, and a change in the form replaces the characters
of one value. Comments and order stay.

Requires: settings/config.py, settings/load_config.py, web/folders.py.
Next: board.py.
"""
from __future__ import annotations

import json
import re
import tempfile
from dataclasses import MISSING
from pathlib import Path

import yaml

from errors import did_you_mean, error_message
from serving.schema import BadRequest
from settings.config import KEYS, UNUSED
from settings.load_config import (ALIASES, check_length, ignored_keys, load_config, non_default,
                                 read_file)
from web.folders import Folders
from web.jobs import safe_name

SCRIPTS = ("train", "chat", "eval", "merge")    # scripts whose rules can check a config


# ---- the form -----------------------------------------------------------------------------------


def form_rows() -> list[dict]:
    """A row for each key of the table in settings/config.py, in its order."""
    group = ""
    rows = []
    for name, spec in KEYS.items():
        row = spec.metadata
        group = row["group"] or group
        default = spec.default if spec.default is not MISSING else spec.default_factory()
        rows.append({
            "name": name, "group": group, "type": spec.type, "default": in_yaml(default),
            "help": row["help"], "choices": list(row["choices"]), "only": list(row["only"]),
            "own": row["own"],
        })
    return rows


def in_yaml(value) -> str:
    """A value as one line of yaml; "" for None."""
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()


# ---- the text -----------------------------------------------------------------------------------


def written_values(text: str, name: str) -> dict[str, str]:
    """{key: value as one line of yaml} of a config."""
    return {key: in_yaml(value) for key, value, _ in entries_of(text, name)}


def entries_of(text: str, name: str) -> list[tuple]:
    """[(key, value, "file line n"), …] of a config. Raises ValueError for an invalid config."""
    with tempfile.TemporaryDirectory() as folder:
        return read_file(written(text, name, folder))


def written(text: str, name: str, folder: str) -> Path:
    """Write the text to a file in the folder, and return its path."""
    path = Path(folder) / safe_name(name)
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        raise BadRequest("the config contains half of a surrogate pair, which UTF-8 cannot "
                         "encode") from None
    return path


def set_value(text: str, name: str, key: str, value: str) -> str:
    """The config with another value of a key; "" removes the key.

    Raises ValueError for an unknown key and for an invalid config.
    """
    if key not in KEYS and key not in UNUSED and key not in ALIASES:
        raise BadRequest(f"there is no key {key[:60]!r}{did_you_mean(key[:60], KEYS)}. All keys: "
                         "python -m settings.config --keys", "set")
    if not text.strip():
        return f"{key}: {scalar(key, value)}\n" if value else text
    check_length(name, text)
    entries_of(text, name)                      # raises a readable error, yaml.compose does not
    root = yaml.compose(text, Loader=yaml.BaseLoader)
    pairs = {pair[0].value: pair for pair in root.value}
    changed = replaced(text, root, pairs.get(key), key, value.strip())
    try:
        entries_of(changed, name)
    except ValueError as error:
        why = without_folder(error)
        raise BadRequest(f"{key}: this value cannot be set in the form ({why}); edit the yaml",
                         "set") from None
    return changed


def replaced(text: str, root, pair: tuple | None, key: str, value: str) -> str:
    """The text with one pair of the mapping `root` changed, added, or (value "") removed."""
    is_flow = bool(root.flow_style)             # {…}, as in JSON
    new = scalar(key, value, quoted=is_flow)
    if pair is None:
        if not value:
            return text
        if not is_flow:
            return f"{text.rstrip()}\n{key}: {new}\n"
        end = root.end_mark.index - 1
        before = text[:end].rstrip()
        comma = "," if root.value and not before.endswith(",") else ""
        return f'{before}{comma}\n  "{key}": {new}\n{text[end:]}'
    start, end = pair[1].start_mark.index, value_end(text, pair[1])
    if value:
        if pair[1].start_mark.line > pair[0].end_mark.line:         # a block below its key
            start = text.index(":", pair[0].end_mark.index) + 1
        gap = " " if text[start - 1] == ":" else ""
        return text[:start] + gap + new + text[end:]
    start = pair[0].start_mark.index
    if is_flow:
        rest = text[end:].lstrip()
        if rest.startswith(","):
            return text[:start] + rest[1:].lstrip()
        return text[:start].rstrip().rstrip(",") + text[end:]
    line_end = text.find("\n", end)
    return text[:start] + ("" if line_end < 0 else text[line_end + 1:])


def value_end(text: str, node) -> int:
    """Index of the end of a value in the text; a block ends before the comments that follow it."""
    end = node.end_mark.index
    if node.id == "scalar" or node.flow_style:
        return end
    lines = text[node.start_mark.index:end].splitlines(keepends=True)
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return node.start_mark.index + len("".join(lines).rstrip())


def scalar(key: str, value: str, quoted: bool = False) -> str:
    """A value as yaml: plain if yaml reads back the same text, else in quotes.

    quoted: always put texts in quotes, as JSON requires.
    """
    may_nest = key not in KEYS or not KEYS[key].type.startswith(("str", "bool", "int", "float"))
    if re.search(r"[\n\r]", value):
        return json.dumps(value, ensure_ascii=False)
    try:
        node = yaml.compose(f"key: {value}", Loader=yaml.BaseLoader).value[0][1]
        if node.id == "scalar" and node.value == value and " #" not in value:
            is_number = re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?|true|false|null", value)
            return value if is_number or not quoted else json.dumps(value, ensure_ascii=False)
        if node.id != "scalar" and may_nest:
            if not quoted:
                return value
            return json.dumps(yaml.safe_load(value), ensure_ascii=False)
    except (yaml.YAMLError, AttributeError, TypeError):
        pass
    return json.dumps(value, ensure_ascii=False)


# ---- errors and notes of the scripts ------------------------------------------------------------


def script_for(values: dict) -> str:
    """The script that a config is probably for."""
    if values.get("export_dir") and not values.get("dataset"):
        return "merge"
    if values.get("dataset"):
        only_predicts = values.get("do_predict") == "true" and values.get("do_train") != "true"
        return "eval" if only_predicts and "learning_rate" not in values else "train"
    return "eval" if values.get("eval_dataset") or values.get("task") else "chat"


def check_text(text: str, name: str, script: str, folders: Folders) -> dict:
    """{"error": the script's error or "", "notes", "values", "changed", "script", "output"}.

    script: one of SCRIPTS, or "" for the one that the config is probably for.
    """
    found = {"values": {}, "error": "", "notes": [], "script": script or "train"}
    try:
        entries = entries_of(text, name) if text.strip() else []
        found["values"] = {key: in_yaml(value) for key, value, _ in entries}
        found["script"] = script if script in SCRIPTS else script_for(found["values"])
        folders.check_settings(entries)
        config = loaded(text, name, found["script"])
        found["notes"] = list(config.notes)
        if ignored := ignored_keys(config):
            found["notes"].append(f"accepted, no effect here: {', '.join(ignored)}")
        found["changed"] = {key: in_yaml(value) for key, value in non_default(config).items()}
        found["output"] = config.output_dir
    except (ValueError, OSError) as error:
        found["error"] = without_folder(error)
    return found


def loaded(text: str, name: str, script: str, settings: dict | None = None):
    """The Config of a text, with further settings as on a command line.

    Raises ValueError and FileNotFoundError, as load_config does.
    """
    more = [f"{key}={value}" for key, value in (settings or {}).items()]
    with tempfile.TemporaryDirectory() as folder:
        try:
            return load_config([str(written(text, name, folder)), *more], script)
        except (ValueError, OSError) as error:
            raise ValueError(error_message(error).replace(f"{folder}/", "")) from None


def without_folder(error: Exception) -> str:
    """The error message without the temporary folder of the config file."""
    temporary = re.escape(tempfile.gettempdir())
    return re.sub(rf"{temporary}/tmp\w+/", "", error_message(error))
