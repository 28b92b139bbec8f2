"""The tokenizer of a checkpoint: text to ids, ids to text, and the checkpoint's special tokens.

    python -m text.tokenizer path/to/checkpoint "Hello there"       shows the tokens of a text

A checkpoint folder has tokenizer.json (vocabulary and rules, used unchanged through the package
`tokenizers`) or an older kind of vocabulary file, tokenizer_config.json (the tokens that begin a
text, end an answer and pad), sometimes special_tokens_map.json (the same, older), and
chat_template.jinja.

Requires: text/declared_tokens.py (tokens of tokenizer_config.json), text/fast_bpe.py (makes
encoding fast), text/vocabularies.py (older vocabulary files).
Next: templates.py, which encodes conversations.

Sources: byte-level BPE, Radford et al. 2019 (GPT-2), section 2.2; SentencePiece, arXiv:1808.06226.
"""
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

# first: a missing package ends in a sentence
from errors import run_script

from tokenizers import AddedToken, Tokenizer as Core

from text.declared_tokens import (CONFIG_FILE, add_declared, check_roles, check_tokenizer_config,
                                  merge_older)
from text.fast_bpe import build_word_cache
from text.plain_text import check_utf8
from text.vocabularies import (bytes_to_unicode, find_vocabulary, load_vocabulary,
                               repair_tokenizer_json, token_fields, token_text)

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
NOT_BUILT = object()
CHECKED_TEXTS = 50  # encoded both ways before the word cache is trusted
REPLACEMENT = "\ufffd"  # what decoders write for bytes that do not (yet) form a character


class Tokenizer:
    """One checkpoint's tokenizer.

    core:          the tokenizers.Tokenizer that does the work
    config:        tokenizer_config.json as a dict; tokens set here are written back by save
    chat_template: the checkpoint's own chat template (Jinja text), or None
    source:        the folder it was loaded from, or None
    split_special_tokens: special tokens typed in a text are ordinary text; see split_at_special
    """

    def __init__(self, core: Core, config: dict, chat_template: str | None = None,
                 source: Path | None = None, split_special_tokens: bool = False):
        self.core = core
        self.config = config
        self.chat_template = chat_template
        self.source = source
        self.split_special_tokens = split_special_tokens
        core.encode_special_tokens = split_special_tokens
        self.changed = False  # differs from the folder's tokenizer.json: save must write it anew
        self.word_cache = NOT_BUILT  # from the first batch on a WordCache, or None without one

    bos_token = property(lambda self: token_text(self.config.get("bos_token")))
    eos_token = property(lambda self: token_text(self.config.get("eos_token")))
    pad_token = property(lambda self: token_text(self.config.get("pad_token")))
    unk_token = property(lambda self: token_text(self.config.get("unk_token")))
    bos_id = property(lambda self: self.id_of(self.bos_token))
    eos_id = property(lambda self: self.id_of(self.eos_token))
    pad_id = property(lambda self: self.id_of(self.pad_token))
    unk_id = property(lambda self: self.id_of(self.unk_token))
    add_bos_token = property(lambda self: bool(self.config.get("add_bos_token")))
    vocab_size = property(lambda self: self.core.get_vocab_size(with_added_tokens=True))

    @property
    def name(self) -> str:
        """A short name for messages: Qwen2, Llama; the folder's name where the class has none."""
        kind = re.sub(r"Tokenizer(Fast|sBackend)?$", "", self.config.get("tokenizer_class") or "")
        if kind in ("", "PreTrained"):
            return Path(self.source or "unnamed").name
        return kind

    def id_of(self, token: str | None) -> int | None:
        """The id of the token with this exact text, or None if the vocabulary has no such token."""
        return None if token is None else self.core.token_to_id(token)

    def is_added(self, token: str) -> bool:
        """Whether this text always becomes this one token.

        The vocabulary may also have pieces that a text is not split into: Qwen's `</s>`.
        """
        added = self.core.get_added_tokens_decoder().values()
        return any(token == other.content for other in added)

    def checksum(self) -> str:
        """A SHA-256 of everything that decides which ids a text becomes."""
        folder = Path(self.source or "unnamed")
        path = folder / "tokenizer.json"
        if not path.is_file():
            path = find_vocabulary(folder)
        vocabulary = path.read_bytes() if path else self.core.to_str().encode()
        added = {i: token_fields(token)
                 for i, token in self.core.get_added_tokens_decoder().items()}
        settings = json.dumps([self.config, added, self.split_special_tokens])
        return hashlib.sha256(vocabulary + settings.encode()).hexdigest()

    # ---- text to ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Never adds bos or eos. Raises ValueError for half a character."""
        check_encodable([text])
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of many texts: through the word cache as far as possible (text/fast_bpe.py).

        Raises ValueError for a text that cannot be written as UTF-8.
        """
        texts = list(texts)
        check_encodable(texts)
        if self.word_cache is NOT_BUILT:
            self.word_cache = self._checked_word_cache(texts[:CHECKED_TEXTS])
        if self.word_cache is None:
            return self.encode_batch_plain(texts)

        encoded = [self.word_cache.encode(text) for text in texts]
        left = [index for index, ids in enumerate(encoded) if ids is None]
        for index, ids in zip(left, self.encode_batch_plain([texts[index] for index in left])):
            encoded[index] = ids
        return encoded

    def encode_batch_plain(self, texts: list[str]) -> list[list[int]]:
        """The slow twin of encode_batch: the package `tokenizers` alone, on all cores."""
        # the fast variant computes no character offsets
        encode = getattr(self.core, "encode_batch_fast", self.core.encode_batch)
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]

    def _checked_word_cache(self, texts: list[str]):
        """A WordCache that gives the same ids as the package for these texts, or None."""
        cache = build_word_cache(self.core)
        if cache is None:
            return None
        for text, expected in zip(texts, self.encode_batch_plain(texts)):
            if cache.encode(text) not in (None, expected):
                print(f"note: {self.name}: the word cache (text/fast_bpe.py) disagrees with "
                      "tokenizer.json and stays off; tokenizing is slower")
                return None
        return cache

    def split_at_special(self, text: str) -> list[str | int]:
        """Split a chat format's own text at its special tokens, which become ids.

        With split_special_tokens, `<|im_end|>` typed by a user must become ordinary text while the
        format's `<|im_end|>` stays one id, so the format is split before the user's text is
        inserted.
        """
        added = self.core.get_added_tokens_decoder().items()
        special = {token.content: i for i, token in added if token.special}
        if not special:
            return [text]
        longest_first = sorted(special, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        return [special.get(part, part) for part in parts if part]

    # ---- ids to text

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids. An incomplete character becomes U+FFFD; see TextStream for streaming."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    # ---- changing and saving

    def add_tokens(self, tokens: Iterable[str], special: bool = True):
        """Make each text a token; new ones get ids at the end of the vocabulary.

        special: left out of decoded text on request, and found before a text is normalized.
        """
        new = [token for token in tokens if not self.is_added(token)]
        self.core.add_tokens(
            [AddedToken(token, special=special, normalized=not special) for token in new])
        self.changed = self.changed or bool(new)
        self.word_cache = NOT_BUILT
        if "added_tokens_decoder" in self.config:
            added = self.core.get_added_tokens_decoder()
            for i in map(self.id_of, new):
                self.config["added_tokens_decoder"][str(i)] = token_fields(added[i])

    def set_token(self, role: str, token: str):
        """Set the token of a role (one of ROLES), e.g. set_token("eos_token", "<|im_end|>")."""
        assert role in ROLES and self.id_of(token) is not None, (role, token)
        self.config[role] = token

    def save(self, folder: Path):
        """Write tokenizer.json, tokenizer_config.json and any chat_template.jinja to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        target = folder / "tokenizer.json"
        if self.changed or self.source is None:
            self.core.save(str(target))
        elif target.resolve() != (Path(self.source) / "tokenizer.json").resolve():
            shutil.copyfile(Path(self.source) / "tokenizer.json", target)

        if isinstance(self.config.get("chat_template"), str):
            self.config["chat_template"] = self.chat_template  # the two copies must agree
        config = json.dumps(self.config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
        if self.chat_template:
            path = folder / "chat_template.jinja"
            path.write_text(self.chat_template, encoding="utf-8")


def check_encodable(texts: Iterable[str]):
    """Raise ValueError for a text that cannot be written as UTF-8, by whatever way it came."""
    for text in texts:
        check_utf8(text, "a text cannot be tokenized", from_bytes=True)


def load_tokenizer(folder: Path, split_special_tokens: bool = False) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder: tokenizer.json, else an older vocabulary file.

    Raises FileNotFoundError when there is neither, ValueError when a file is damaged.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    vocabulary = find_vocabulary(folder)
    if not path.is_file() and not vocabulary:
        raise FileNotFoundError(explain_missing_tokenizer(folder))
    core, changed = read_tokenizer_json(path) if path.is_file() else (None, True)

    path = folder / CONFIG_FILE
    config = read_json(path)
    older = read_json(folder / "special_tokens_map.json")
    added = read_json(folder / "added_tokens.json")
    check_tokenizer_config(config, path)
    check_roles(older, folder / "special_tokens_map.json")
    special = [*(config.get("additional_special_tokens") or []),
               *(older.get("additional_special_tokens") or [])]
    config = merge_older(config, older, ROLES)
    if core is None:
        core, config = load_vocabulary(vocabulary, config, added, special)
    else:
        changed |= add_declared(core, config, added, folder)
    core.no_truncation()  # both may be stored in tokenizer.json, left over from an earlier use
    core.no_padding()
    chat_template = read_chat_template(folder, config)
    tokenizer = Tokenizer(core, config, chat_template, folder, split_special_tokens)
    tokenizer.changed = changed
    return tokenizer


def read_tokenizer_json(path: Path) -> tuple[Core, bool]:
    """The tokenizers.Tokenizer of a file, and whether the file had to be repaired for it."""
    try:
        return Core.from_file(str(path)), False
    except Exception as error:  # a bare Exception, for bad JSON as for a missing field
        repaired = repair_tokenizer_json(path.read_text(encoding="utf-8", errors="replace"))
        if repaired is None:
            raise ValueError(f"{path}: not a tokenizer ({error}). "
                             "The file may be truncated: fetch it again") from error
    try:
        core = Core.from_str(repaired)
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer ({error}). "
                         "The file may be damaged: fetch it again") from error
    print(f"note: {path}: add_prefix_space: false is read as prepend_scheme: never, which newer "
          "versions of the package `tokenizers` require; the file itself is not changed")
    return core, True


def explain_missing_tokenizer(folder: Path) -> str:
    """The error message for a checkpoint folder without a readable vocabulary."""
    if not folder.is_dir():
        return f"{folder}: no such folder"
    if (folder / "vocab.json").is_file():
        return (f"{folder}: has a vocabulary in the older vocab.json + merges.txt form but no "
                "tokenizer.json. To convert it once, where transformers is installed: "
                "python -c \"from transformers import AutoTokenizer as T; "
                f"T.from_pretrained('{folder}').save_pretrained('{folder}')\"")
    return (f"{folder}: no tokenizer.json (nor tokenizer.model, nor *.tiktoken). Is this the "
            "folder of a checkpoint, fetched completely?")


def read_json(path: Path) -> dict:
    """A JSON object from a file; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8; too deep
        raise ValueError(f"{path}: not JSON ({error}). "
                         "The file may be truncated: fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def read_chat_template(folder: Path, config: dict) -> str | None:
    """The checkpoint's chat template: from its own file, or from tokenizer_config.json.

    There it may be a list of named templates, of which this is the default one.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template or None


def bytes_of_tokens(tokenizer: Tokenizer) -> dict[int, bytes]:
    """{id: bytes that it adds to a text}, without ids that never occur in a text.

    Raises ValueError for a tokenizer that is neither byte-level nor one of sentencepiece.
    """
    core = tokenizer.core
    kind = type(core.decoder).__name__
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    added = core.get_added_tokens_decoder()
    found = {}
    for token, i in core.get_vocab().items():
        if i in added:
            found[i] = added[i].content.encode()
        elif kind == "ByteLevel":
            if letters.keys() >= set(token):
                found[i] = bytes(letters[letter] for letter in token)
        elif kind in ("Sequence", "Metaspace"):
            is_byte = len(token) == 6 and token.startswith("<0x")
            found[i] = bytes([int(token[3:5], 16)]) if is_byte else (
                token.replace("\u2581", " ").encode())
        else:
            raise ValueError(f"the bytes of its tokens are not known: the tokenizer's decoder is "
                             f"{kind}, not ByteLevel or one of sentencepiece")
    return found


class TextStream:
    """Turns ids that arrive one by one into text to print at once, never half a character.

    The returned texts, joined, are the decoding of all ids. Decoding each id alone would not do: a
    Chinese character or an emoji is often two to four tokens, and sentencepiece decoders drop the
    leading space of their input. keep: ids of special tokens that are not skipped.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True,
                 keep: frozenset[int] = frozenset()):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.keep = keep
        added = tokenizer.core.get_added_tokens_decoder() if keep else {}
        self.skipped = {i for i, token in added.items() if token.special} - keep
        self.ids = []  # since the last position where decoding can start afresh
        self.emitted = ""  # the part of their text that was already returned
        self.held_back = 0  # number of last ids that may be part of an incomplete character

    def push(self, token: int) -> str:
        """Add an id. Returns the text that is now complete, often "" or a word."""
        self.ids.append(token)
        text = self.decode(self.ids)
        if text.endswith(REPLACEMENT) and self.held_back < 3:  # a character has at most 4 bytes
            self.held_back += 1
            return ""
        self.held_back = 0
        return self._emit(text)

    def flush(self) -> str:
        """Return the text that is still held back, after the last id."""
        return self._emit(self.decode(self.ids))

    def _emit(self, text: str) -> str:
        new = text[len(self.emitted):]
        self.emitted = text
        # Start afresh now and then, or long answers take quadratic time. Only at a visible,
        # complete token: the ids after it are then decoded as in the middle of a text.
        anchor = self.decode(self.ids[-1:])
        if len(self.ids) > 16 and anchor.strip() and REPLACEMENT not in anchor:
            self.ids = self.ids[-1:]
            self.emitted = anchor
        return new

    def decode(self, ids: list[int]) -> str:
        """The text of ids, with and without the same special tokens as the stream."""
        if self.skip_special_tokens and self.keep:
            return self.tokenizer.decode(i for i in ids if i not in self.skipped)
        return self.tokenizer.decode(ids, self.skip_special_tokens)


def main(argv: list[str]):
    if len(argv) != 2:
        sys.exit(__doc__)
    folder, text = argv
    tokenizer = load_tokenizer(folder)
    print(f"{tokenizer.name}: {tokenizer.vocab_size} tokens, bos {tokenizer.bos_token!r}, "
          f"eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}")
    for token in tokenizer.encode(text):
        print(f"{token:8d}  {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    run_script(main)
