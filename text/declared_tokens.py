"""Tokens that tokenizer_config.json declares, beside those of tokenizer.json.

    changed = add_declared(core, config, added, folder)

A checkpoint names tokens in up to four files. transformers adds what tokenizer.json lacks, in this
order: added_tokens_decoder (or the older added_tokens.json), then bos, eos, unk, sep, pad, cls and
mask, then tokens of a model (image_token …), then the list extra_special_tokens. A text that holds
such a token becomes its id; otherwise it would be split into words.

Requires: text/plain_text.py.
Next: text/tokenizer.py.
Source: the behavior of transformers 5 (PreTrainedTokenizerFast), compared id for id in the tests.
"""
from pathlib import Path

from tokenizers import AddedToken, Tokenizer as Core

from text.plain_text import excerpt

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                "mask_token")
FLAGS_OF_TOKEN = ("lstrip", "rstrip", "normalized", "single_word", "special")
CONFIG_FILE = "tokenizer_config.json"


# ---- check ------------------------------------------------------------------------------------


def check_tokenizer_config(config: dict, path: Path):
    """Raise ValueError for a value of tokenizer_config.json that has a wrong type."""
    check_type(config, "tokenizer_class", str, path, "a text")
    check_type(config, "added_tokens_decoder", dict, path, "an object, id -> token")
    template = config.get("chat_template")
    named = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str) for entry in template)
    if template is not None and not isinstance(template, str) and not named:
        raise ValueError(f"{path}: chat_template: {excerpt(template)} is neither a text nor a "
                         'list of {"name": …, "template": …}')
    check_roles(config, path)


def check_roles(config: dict, path: Path):
    """Raise ValueError for a special token that is none; also of special_tokens_map.json."""
    for key in NAMED_TOKENS:
        if config.get(key) is not None and config[key] is not False:
            read_token(config[key], f"{path}: {key}")
    check_type(config, "additional_special_tokens", list, path, "a list of tokens")
    check_type(config, "extra_special_tokens", (list, dict), path, "a list or object of tokens")


def check_type(config: dict, key: str, kind, path: Path, words: str):
    """Raise ValueError unless the value is null or of this type."""
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{path}: {key}: {excerpt(value)} is not {words}; correct the file, or "
                         "fetch it again")


def read_token(value, where: str) -> AddedToken:
    """A token of a file: a text, or an object with its content and flags."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise ValueError(f"{where}: {excerpt(value)} is not a token: a text, or an object with its "
                         "content")
    flags = {key: bool(fields[key]) for key in FLAGS_OF_TOKEN if key in fields}
    return AddedToken(fields["content"], **flags)


def merge_older(config: dict, older: dict, roles: tuple[str, ...]) -> dict:
    """tokenizer_config.json with the tokens of special_tokens_map.json.

    Without an added_tokens_decoder they count more, as in transformers; with one they only fill
    gaps.
    """
    merged = dict(config)
    is_older_layout = "added_tokens_decoder" not in config
    for key, value in older.items():
        if value and (is_older_layout or key in roles and not config.get(key)):
            merged[key] = value
    return merged


# ---- add --------------------------------------------------------------------------------------


def add_declared(core: Core, config: dict, added: dict, folder: Path) -> bool:
    """Add the declared tokens that tokenizer.json lacks; -> whether there was any.

    config: see merge_older. added: added_tokens.json. Raises ValueError where a token would
    get another id than the one declared for it.
    """
    known = core.get_added_tokens_decoder().values()
    written = {repr(token) for token in known}
    contents = {token.content for token in known}
    special = named_tokens(config, folder)
    special_contents = {token.content for token in special}

    new = []
    numbers = []
    for number, token in numbered_tokens(config, added, special, folder):
        if repr(token) not in written:
            if token.content in special_contents:
                token.special = True
            if token.content not in contents:
                numbers.append((number, token))
            new.append(token)
            contents.add(token.content)
    for token in special:
        if token.content not in contents:
            token.special = True
            new.append(token)
            contents.add(token.content)
    core.add_tokens(new)
    for number, token in numbers:
        check_number(core, number, token, folder)
    return bool(new)


def numbered_tokens(config: dict, added: dict, special: list,
                    folder: Path) -> list[tuple[int, AddedToken]]:
    """[(id, token), …] of added_tokens_decoder, or else of added_tokens.json, by id."""
    if "added_tokens_decoder" in config:
        where = f"{folder / CONFIG_FILE}: added_tokens_decoder"
        declared = {}
        for number, fields in (config["added_tokens_decoder"] or {}).items():
            declared[token_number(number, where)] = read_token(fields, f"{where}: {number}")
    else:
        contents = {token.content for token in special}
        where = f"{folder / 'added_tokens.json'}"
        declared = {}
        for content, number in added.items():
            is_special = content in contents
            declared[token_number(number, where)] = AddedToken(
                content, special=is_special, normalized=not is_special)
    return sorted(declared.items(), key=lambda item: item[0])


def token_number(number, where: str) -> int:
    """An id in a file, where it may be a text."""
    text = str(number)
    if isinstance(number, bool) or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError(f"{where}: {excerpt(text)} is not the id of a token")
    return int(text)


def named_tokens(config: dict, folder: Path) -> list[AddedToken]:
    """The special tokens that have a name, then those of a list."""
    path = folder / CONFIG_FILE
    names = [key for key in NAMED_TOKENS if config.get(key)]
    names += [key for key, value in config.items()
              if key.endswith("_token") and key not in NAMED_TOKENS and isinstance(value, str)]
    found = [(config[key], key) for key in names]
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        found += [(value, f"extra_special_tokens: {key}") for key, value in extra.items()]
        extra = None
    listed = extra or config.get("additional_special_tokens") or []
    found += [(value, "additional special tokens") for value in listed]

    tokens = []
    for value, key in found:
        token = read_token(value, f"{path}: {key}")
        if isinstance(value, str):
            token = AddedToken(value, special=True)
        if token.content:
            tokens.append(token)
    return tokens


def check_number(core: Core, number: int, token: AddedToken, folder: Path):
    """Raise ValueError for an added token that has another id than the one declared for it."""
    found = core.token_to_id(token.content)
    if found != number:
        raise ValueError(
            f"{folder / CONFIG_FILE} (or added_tokens.json) declares the token "
            f"{excerpt(token.content)!r} with the id {number}, but {folder / 'tokenizer.json'} "
            f"lacks it, and it would be {found}. Take both files from one version of the "
            "checkpoint")
