"""Chat formats as a config writes them: the name of a row, or a mapping; and as they are stored.

    template: qwen                              find_template("qwen")
    template:                                   find_template({"name": "mychat", ...})
      name: mychat
      user: "<user>{{content}}</user><bot>"

docs/templates.md explains the mapping. What was trained keeps its format in train_config.json.

Requires: text/chat_formats.py.
Next: text/template_check.py, text/load_text.py.
"""
import json
import re
from dataclasses import fields, replace

from errors import nearest_names, unknown_name
from templates import EOS, Template, Token, ToolFormat
from text.chat_formats import TEMPLATES
from text.plain_text import check_utf8
from text.tokenizer import read_json
from text.tool_formats import find_tool_format, with_tool_functions


# ---- read and write: the `template` of a config -------------------------------------------------


KEYS = [field.name for field in fields(Template)]
SLOTS = ("user", "assistant", "system", "observation", "function", "prefix")
FLAGS = [field.name for field in fields(Template) if field.type is bool]
# the other keys are lists of texts
TEXTS = ("default_system", "empty_thought", "tool_format", "name")
LIST_OF_ALL = "`python -m text.template_check` lists them all"


def find_template(value: str | dict) -> Template:
    """Find the format that a config names or describes.

    value: the name of a row, or a mapping (see docs/templates.md). Raises ValueError that says what
    is wrong, with the nearest valid spelling.
    """
    if isinstance(value, dict):
        return read_format(value)
    if not isinstance(value, str):
        raise ValueError(f"template: {value!r} is not the name of a format, as qwen; {LIST_OF_ALL}")
    if value not in TEMPLATES:
        near = nearest_names(value, TEMPLATES)
        hint = f" (did you mean {', '.join(map(repr, near))}?)" if near else ""
        raise ValueError(f"unknown template {value!r}{hint}; {LIST_OF_ALL}")
    return TEMPLATES[value]


def written_template(template: Template) -> str | dict:
    """Write a format as a config does, for find_template: the name of a row, or a mapping."""
    if TEMPLATES.get(template.name) == template:
        return template.name
    written = {}
    for field in fields(Template):
        value = getattr(template, field.name)
        # own_jinja has another default in a mapping
        if value != field.default or field.name == "own_jinja":
            written[field.name] = written_field(field.name, value)
    return written


def written_field(key: str, value):
    """Write one field of a Template as a config does; the inverse of read_field."""
    if key in FLAGS:
        return str(value).lower()
    if key == "tool_format":
        return value.name
    if key in SLOTS and value is not None:
        return [{"token": slot.name} if isinstance(slot, Token) else slot for slot in value]
    return list(value) if isinstance(value, tuple) else value


def read_format(mapping: dict) -> Template:
    """Read the mapping under `template:` in a config.

    Its keys are the fields of Template, and `based_on`, a format that gives the fields left out.
    """
    for key in mapping:
        if key not in (*KEYS, "based_on"):
            raise ValueError(f"template: {unknown_name('key', key, [*KEYS, 'based_on'])}")
    name = mapping.get("name") or "custom"
    if name in TEMPLATES:
        raise ValueError(f"template: name: {name!r} is a row of the table. Write template: {name} "
                         f"to use it unchanged, or based_on: {name} under another name to change "
                         "it")
    values = {"own_jinja": True}
    values |= {key: read_field(key, value) for key, value in mapping.items() if key != "based_on"}
    if "based_on" in mapping:
        base = find_template(mapping["based_on"])
        template = replace(base, **{"families": (), "says": (), **values})
    elif "user" in values:
        template = Template(**values)
    else:
        raise ValueError("template: 'user' is missing: the text around a user's message, up to "
                         "where the answer begins, as "
                         'user: "<user>{{content}}</user><bot>"')
    if "needs" not in mapping:      # the tokens that the base needs and that still occur
        occurs = str([getattr(template, key) for key in SLOTS])
        needs = tuple(token for token in template.needs if token in occurs)
        template = replace(template, needs=needs)
    check_format(template)
    return with_tool_functions(replace(template, name=name))


def read_field(key: str, value):
    """Read one value of the mapping as a field of Template."""
    where = f"template: {key}: {value!r}"
    check_utf8(json.dumps(value, ensure_ascii=False, default=str), f"template: {key}")
    if key in SLOTS:
        if key in ("observation", "function") and value in (None, "null", ""):
            return None
        slots = value if isinstance(value, list) else [value]
        return tuple(read_slot(where, slot) for slot in slots)
    if key in FLAGS:
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"{where} is not true or false")
        return str(value).lower() == "true"
    if key in TEXTS:
        if not isinstance(value, str):
            raise ValueError(f"{where} is not a text")
        return find_tool_format(value, "template: ") if key == "tool_format" else value
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f'{where} is not a list of texts, as ["<|end|>"]')
    return tuple(texts)


def read_slot(where: str, slot) -> str | Token:
    """Read a slot: a text, or {token: "<name>"} for one id, bos and eos among them."""
    if isinstance(slot, dict) and list(slot) == ["token"] and isinstance(slot["token"], str):
        return Token(slot["token"])
    if not isinstance(slot, str):
        raise ValueError(f"{where}: {slot!r} is not a slot. A slot is a text in quotes, or "
                         '{token: eos}, {token: bos} or {token: "<name>"}')
    if "\\n" in slot:
        raise ValueError(f"{where}: holds a backslash and an n, not a new line; in YAML only a "
                         "text in double quotes turns them into one")
    return slot


def check_format(template: Template):
    """Raise ValueError for a format that cannot be rendered."""
    for key in SLOTS:
        check_marks(key, getattr(template, key))
    if template.stop_is_eos and not template.stop:
        raise ValueError("template: stop_is_eos: true needs stop: a list whose first token becomes "
                         "the eos")
    is_one_text = len(template.system) == 1 and isinstance(template.system[0], str)
    if template.system_in_user and not is_one_text:
        raise ValueError("template: system_in_user: true needs a system of one text, since it "
                         "opens the user's text")
    if len(template.thought) != 2:
        raise ValueError(f"template: thought: {template.thought} is not two texts, one that opens "
                         "a thought and one that closes it")


def check_marks(key: str, slots: tuple | None):
    """Raise ValueError unless {{content}} occurs once in these slots; in a prefix, never."""
    if slots is None:
        return
    text = "".join(slot for slot in slots if isinstance(slot, str))
    marks = re.findall(r"\{\{(.*?)\}\}", text)
    wanted = [] if key == "prefix" else ["content"]
    advice = "nothing is put into the prefix" if key == "prefix" else "Write {{content}}"
    for mark in marks:
        if mark not in (*wanted, "idx"):
            raise ValueError(f"template: {key}: unknown mark {{{{{mark}}}}}. {advice}")
    if [mark for mark in marks if mark != "idx"] != wanted:
        raise ValueError(f"template: {key}: {{{{content}}}} must occur once, found {len(marks)} "
                         "times")


# ---- keys of a config that change a format ------------------------------------------------------


def with_overrides(template: Template, tool_format: str | None = None,
                   default_system: str | None = None) -> Template:
    """The template with the config's tool_format and default_system instead of its own."""
    if tool_format:
        # a call in another tool format ends in the tokenizer's eos, as in LLaMA-Factory
        function = ("{{content}}",) if template.efficient_eos else ("{{content}}", EOS)
        template = replace(template, tool_format=ToolFormat(tool_format), function=function)
    if default_system is not None:
        check_utf8(default_system, "default_system")
        template = replace(template, default_system=default_system)
    return with_tool_functions(template)


# ---- the format that something was trained with -------------------------------------------------


def stored_template(folders: list, value: str | dict | None,
                    force: bool) -> tuple[str | dict | None, bool]:
    """Find the format of what was trained: the one in the config, else the stored one.

    folders: of adapters or models; their train_config.json holds the `template` of the training.
    value: the config's `template`, a name, a mapping or None. Returns (value, force): None where no
    format is set or stored; force is also true for a stored format, which the training has checked.
    Raises ValueError if the config sets another format than the stored one, and `force` is off.
    """
    stored = {}
    for folder in folders:
        stored[folder] = read_json(folder / "train_config.json").get("template")
    found = [other for other in stored.values() if other]
    value = value or (found[0] if found else None)
    for folder, other in stored.items():
        if other and not force and not is_same_format(other, value):
            trained_with = name_of(other)
            if trained_with == name_of(value):
                trained_with = f"another version of {trained_with}"
            raise ValueError(f"template: {name_of(value)}, but {folder} was trained with "
                             f"{trained_with}. Leave template out, or set force_template: true")
    return value, force or any(is_same_format(other, value) for other in found)


def is_same_format(one: str | dict, other: str | dict) -> bool:
    """Whether two values of `template` mean the same format."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one == other or find_template(one) == find_template(other)
    return one == other


def name_of(value: str | dict) -> str:
    """The name of a format as a config gives it, for messages."""
    return value.get("name", "custom") if isinstance(value, dict) else value
