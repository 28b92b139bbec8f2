"""The tokenizer of a checkpoint: text to ids, ids to text, and the special tokens the checkpoint names.

    python -m text.tokenizer path/to/checkpoint "Hello there"        shows the tokens of a text

A checkpoint folder brings tokenizer.json (the vocabulary and the rules, used here exactly as they stand, through the
`tokenizers` package) or an older form of vocabulary (text/vocabularies.py makes the same of it), tokenizer_config.json
(which token begins a text, ends an answer, pads), sometimes special_tokens_map.json (the same, older) and
chat_template.jinja.

Read next: templates.py, which puts a conversation into the pieces that are encoded here; data.py, which does so for
a whole dataset; text/fast_bpe.py, which makes it fast; text/vocabularies.py, should the folder have no tokenizer.json.
Sources: byte-level BPE, Radford et al. 2019 (GPT-2), section 2.2; SentencePiece, arXiv:1808.06226.
"""
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer as Core

from text.fast_bpe import words_of
from text.vocabularies import fields_of, find_vocabulary, load_vocabulary, mend

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
UNTRIED = object()
CHECKED = 50  # texts that are encoded both ways before text/fast_bpe.py is believed
HALF_A_CHARACTER = "\ufffd"  # what decoders write for bytes that do not (yet) form a character


class Tokenizer:
    """One checkpoint's tokenizer.

    core:          the tokenizers.Tokenizer that does the work
    config:        tokenizer_config.json as a dict; tokens set here are written back by save
    chat_template: the checkpoint's own chat template (jinja text), or None
    split_special_tokens: special tokens written out in a text are ordinary text there (see `marked`)
    """

    def __init__(self, core, config, chat_template=None, source=None, split_special_tokens=False):
        self.core = core
        self.config = config
        self.chat_template = chat_template
        self.source = source  # the folder it came from, or None
        self.changed = False  # no longer what the folder's tokenizer.json says: to be written anew instead of copied
        self.split_special_tokens = core.encode_special_tokens = split_special_tokens
        self.words = UNTRIED  # a Words, None where there can be none, UNTRIED until the first batch

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
    def name(self):
        """A short name for messages: Qwen2, Llama; the folder's name where the class says nothing."""
        kind = re.sub(r"Tokenizer(Fast|sBackend)?$", "", self.config.get("tokenizer_class") or "")
        return kind if kind not in ("", "PreTrained") else Path(self.source or "unnamed").name

    def id_of(self, token):
        """The id of a token given by its exact name, or None when the vocabulary has no such token."""
        return None if token is None else self.core.token_to_id(token)

    def knows(self, token):
        """Is this text always one token? (Qwen's vocabulary has a piece `</s>` too, but cuts the text otherwise.)"""
        return token in (added.content for added in self.core.get_added_tokens_decoder().values())

    def sign(self):
        """A checksum of all that decides which ids a text becomes."""
        folder = Path(self.source or "unnamed")
        path = folder / "tokenizer.json"
        path = path if path.is_file() else find_vocabulary(folder)
        added = {i: fields_of(token) for i, token in self.core.get_added_tokens_decoder().items()}
        told = json.dumps([self.config, added, self.split_special_tokens])
        return hashlib.sha256((path.read_bytes() if path else self.core.to_str().encode()) + told.encode()).hexdigest()

    def encode(self, text):
        """text -> list of ids. Never adds bos or eos."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        """Many texts at once. -> one list of ids per text: word by word where that gives the same (see text/fast_bpe.py)."""
        texts = list(texts)
        if self.words is UNTRIED:
            self.words = words_of(self.core)
            if self.words is not None and not self.agrees(texts[:CHECKED]):
                self.words = None
        found = [self.words.encode(text) for text in texts] if self.words is not None else [None] * len(texts)
        left = [place for place, ids in enumerate(found) if ids is None]
        for place, ids in zip(left, self.encode_texts([texts[place] for place in left])):
            found[place] = ids
        return found

    def encode_texts(self, texts):
        """What encode_batch gives, all of it from the package `tokenizers`, on all cores: the slow twin."""
        encode = getattr(self.core, "encode_batch_fast", self.core.encode_batch)  # fast: without character offsets
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]

    def agrees(self, texts):
        """Do both ways give the same ids? If not, a note is printed: a file that text/fast_bpe.py takes for another."""
        same = all(ids in (None, wanted) for ids, wanted in zip(map(self.words.encode, texts), self.encode_texts(texts)))
        if not same:
            print(f"note: {self.name}: its words cannot be told apart as in tokenizer.json; texts are tokenised whole")
        return same

    def decode(self, ids, skip_special_tokens=False):
        """ids -> text. A character cut in half comes out as U+FFFD; TextStream waits for its other half."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def marked(self, text):
        """Cut a format's own text at its special tokens: list of str and int (the ids).

        With split_special_tokens, `<|im_end|>` typed by a user must become ordinary text while the `<|im_end|>` of
        the format stays one id, so the format's are looked up before the user's text is put in.
        """
        special = {token.content: i for i, token in self.core.get_added_tokens_decoder().items() if token.special}
        if not special:
            return [text]
        longest_first = sorted(special, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        return [special.get(part, part) for part in parts if part]

    def add_tokens(self, tokens):
        """Make each of these one special token, with an id at the end of the vocabulary unless it has one."""
        new = [token for token in tokens if not self.knows(token)]
        self.core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
        self.changed = self.changed or bool(new)
        self.words = UNTRIED
        if "added_tokens_decoder" in self.config:
            added = self.core.get_added_tokens_decoder()
            ids = [self.id_of(token) for token in new]
            self.config["added_tokens_decoder"].update({str(i): fields_of(added[i]) for i in ids})

    def set_token(self, role, token):
        """Say which token plays a role (one of ROLES), e.g. set_token("eos_token", "<|im_end|>")."""
        assert role in ROLES and self.id_of(token) is not None, (role, token)
        self.config[role] = token

    def save(self, folder):
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja (when there is one) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "tokenizer.json"
        if self.changed or self.source is None:
            self.core.save(str(target))
        elif target.resolve() != (Path(self.source) / "tokenizer.json").resolve():
            shutil.copyfile(Path(self.source) / "tokenizer.json", target)
        if isinstance(self.config.get("chat_template"), str):
            self.config["chat_template"] = self.chat_template  # the two places must not disagree
        config = json.dumps(self.config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
        if self.chat_template:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def token_text(token):
    """A token in tokenizer_config.json is its text, or a dict with the text under `content`, or null."""
    return (token.get("content") if isinstance(token, dict) else token) or None


def load_tokenizer(folder, split_special_tokens=False):
    """Read the tokenizer of a checkpoint folder: its tokenizer.json, else its sentencepiece or rank file.

    Raises FileNotFoundError when there is neither, ValueError when a file is damaged.
    """
    folder = Path(folder)
    path, other = folder / "tokenizer.json", find_vocabulary(folder)
    if not path.is_file() and not other:
        raise FileNotFoundError(missing_tokenizer(folder))
    core, changed = read_tokenizer_json(path) if path.is_file() else (None, True)
    config, older = (read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    config.update({role: older[role] for role in ROLES if older.get(role) and not config.get(role)})
    if core is None:
        special = [token for file in (config, older) for token in file.get("additional_special_tokens") or []]
        core, config = load_vocabulary(other, config, read_json(folder / "added_tokens.json"), special)
    core.no_truncation()  # both may be stored in the file, left over from whoever saved it
    core.no_padding()
    tokenizer = Tokenizer(core, config, read_chat_template(folder, config), folder, split_special_tokens)
    tokenizer.changed = changed
    return tokenizer


def read_tokenizer_json(path):
    """-> (tokenizers.Tokenizer, whether the file had to be mended for it)."""
    try:
        return Core.from_file(str(path)), False
    except Exception as error:  # the package raises bare Exception, for bad JSON as for a missing field
        mended = mend(path.read_text(encoding="utf-8", errors="replace"))
        if mended is None:
            raise ValueError(f"{path}: not a tokenizer ({error}). The file may be cut short: fetch it again") from error
    try:
        core = Core.from_str(mended)
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer ({error}). The file may be damaged: fetch it again") from error
    print(f"note: {path}: add_prefix_space: false is read as prepend_scheme: never, which newer versions of the "
          "package `tokenizers` insist on; the file itself stays as it is")
    return core, True


def missing_tokenizer(folder):
    """What to tell somebody whose checkpoint folder has no vocabulary that can be read."""
    if not folder.is_dir():
        return f"{folder}: no such folder"
    if (folder / "vocab.json").is_file():
        return (f"{folder}: has a vocabulary in the older vocab.json + merges.txt form but no tokenizer.json. "
                "To convert it once, where transformers is installed: python -c \"from transformers import "
                f"AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\"")
    return (f"{folder}: no tokenizer.json (nor tokenizer.model, nor *.tiktoken). Is this the folder of a checkpoint, "
            "fetched completely?")


def read_json(path):
    """A JSON object from a file; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{path}: not JSON ({error}). The file may be cut short: fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a JSON object")
    return found


def read_chat_template(folder, config):
    """The checkpoint's chat template: a file of its own, or in tokenizer_config.json, there maybe one of several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found or None


class TextStream:
    """Turns ids that arrive one by one into text that can be printed at once: never half a character.

    All texts returned, joined, are the decoding of all ids. Decoding each id alone would not do: a Chinese character
    or an emoji is often two to four tokens, and sentencepiece decoders drop the leading space of what they are given.
    """

    def __init__(self, tokenizer, skip_special_tokens=True):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.ids = []  # not all ids: those since the last safe place to begin decoding
        self.shown = ""  # the part of their text that was returned already
        self.waiting = 0  # tokens held back for the rest of a character

    def push(self, token):
        """One more id. -> the text that is now complete, often "" or a word."""
        self.ids.append(token)
        text = self._decode(self.ids)
        if text.endswith(HALF_A_CHARACTER) and self.waiting < 3:  # a character has at most 4 bytes
            self.waiting += 1
            return ""
        self.waiting = 0
        return self._show(text)

    def flush(self):
        """No more ids: whatever is still held back."""
        return self._show(self._decode(self.ids))

    def _show(self, text):
        new, self.shown = text[len(self.shown):], text
        anchor = self._decode(self.ids[-1:])
        # Start afresh now and then, or long answers take quadratic time; at a visible, complete token, because what
        # follows it is then decoded as in the middle of a text.
        if len(self.ids) > 16 and anchor.strip() and HALF_A_CHARACTER not in anchor:
            self.ids, self.shown = self.ids[-1:], anchor
        return new

    def _decode(self, ids):
        return self.tokenizer.decode(ids, self.skip_special_tokens)


def main(arguments):
    if len(arguments) != 2:
        sys.exit(__doc__)
    tokenizer = load_tokenizer(arguments[0])
    print(f"{tokenizer.name}: {tokenizer.vocab_size} tokens, bos {tokenizer.bos_token!r}, eos {tokenizer.eos_token!r}, "
          f"pad {tokenizer.pad_token!r}")
    for token in tokenizer.encode(arguments[1]):
        print(f"{token:8d}  {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
