"""Fast byte-level BPE: encode a text word by word, with a cache from words to ids.

A byte-level BPE splits a text into words with a regular expression, and then encodes each word,
independently of its neighbors. The package `tokenizers` does both steps anew for every word. Here
Python's `re` does the first, and the package is asked only once for each different word: nearly
every word of a text has come up before.

Where the result might differ, the package does the work: `build_word_cache` returns None for other
kinds of tokenizers, and `WordCache.encode` for a text with characters outside PLAIN.

Requires: nothing.
Next: text/tokenizer.py, whose encode_batch chooses between this and the package, its slow twin.

Source: byte-level BPE, Radford et al. 2019 (GPT-2), section 2.2.
"""
import json
import re
from itertools import chain

# all of \p{L} and \p{N} that is in PLAIN
LETTERS = "a-zA-ZÀ-ÖØ-öø-ÿ"
DIGITS = "0-9"

# ASCII, letters of Western Europe, dashes and quotes: NFC changes none of them
PLAIN = "\x00-\x7fÀ-ÖØ-öø-ÿ‐-‧"

GPT2_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")
NFC = {"type": "NFC"}
NO_STEPS = {"type": "Sequence", "normalizers": []}
MAX_WORDS = 500_000  # a full cache is emptied; real text has some ten thousand frequent words


class WordCache(dict):
    """A dict {word: ids} that asks the tokenizer for words it does not have yet.

    core:         the tokenizers.Tokenizer
    pattern:      a compiled regular expression whose matches are the words
    added_tokens: {token: id}, matched in the text before it is split into words
    """

    def __init__(self, core, pattern: re.Pattern, added_tokens: dict[str, int]):
        super().__init__()
        self.core = core
        self.split_words = pattern.findall
        self.added_ids = {token: [i] for token, i in added_tokens.items()}
        self.find_other = re.compile(f"[^{PLAIN}]").search
        if added_tokens:
            longest_first = sorted(added_tokens, key=len, reverse=True)
            alternatives = "|".join(map(re.escape, longest_first))
            self.split_added = re.compile(f"({alternatives})").split
        else:
            self.split_added = lambda text: [text]

    def __missing__(self, word: str) -> list[int]:
        if self.split_words(word) != [word]:  # on its own, the package would split this further
            raise LookupError(word)
        if len(self) >= MAX_WORDS:
            self.clear()
        ids = self.core.encode(word, add_special_tokens=False).ids
        self[word] = ids
        return ids

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text, without bos and eos, or None where the package has to encode it."""
        if not text.isascii() and self.find_other(text):
            return None
        ids = []
        try:
            # text, added token, text, added token, ..., text
            for index, part in enumerate(self.split_added(text)):
                if index % 2:
                    ids += self.added_ids[part]
                else:
                    ids += chain.from_iterable(map(self.__getitem__, self.split_words(part)))
        except LookupError:
            return None
        return ids


def build_word_cache(core) -> WordCache | None:
    """A WordCache for a tokenizers.Tokenizer, or None where a word's ids may depend on context."""
    added = {i: token for i, token in core.get_added_tokens_decoder().items()
             if not (token.special and core.encode_special_tokens)}
    if not is_plain_bpe(core) or not match_literally(added.values()):
        return None
    pattern = word_pattern(read_rules(core.pre_tokenizer))
    if pattern is None:
        return None
    return WordCache(core, pattern, {token.content: i for i, token in added.items()})


def is_plain_bpe(core) -> bool:
    """Whether a tokenizer is a BPE without randomness, and normalizes by NFC or not at all."""
    return (type(core.model).__name__ == "BPE"
            and not core.model.dropout
            and read_rules(core.normalizer) in ({}, NO_STEPS, NFC))


def match_literally(added_tokens) -> bool:
    """Whether added tokens take in no neighboring spaces, and all match at the same stage."""
    context = any(token.lstrip or token.rstrip or token.single_word for token in added_tokens)
    stages = {token.normalized for token in added_tokens}
    return not context and len(stages) < 2


def read_rules(component) -> dict:
    """A normalizer or pre-tokenizer as tokenizer.json describes it; {} for None."""
    return {} if component is None else json.loads(component.__getstate__())


def word_pattern(rules: dict) -> re.Pattern | None:
    """The regular expression by which a pre-tokenizer splits PLAIN text, or None without one."""
    written = read_split_regex(rules)
    if written is None:
        return None
    try:
        pattern = re.compile(to_python_regex(written), re.ASCII)
    except re.error:
        return None
    # every character must be in some word: nothing may be lost between them
    plain = re.findall(f"[{PLAIN}]", "".join(map(chr, range(0x2028))))
    return pattern if all(pattern.findall(char) == [char] for char in plain) else None


def read_split_regex(rules: dict) -> str | None:
    """The regular expression in the rules of a byte-level pre-tokenizer; None for other kinds.

    Two forms are known: a ByteLevel step alone, which uses GPT-2's expression, and a Split step
    with an expression of its own before a ByteLevel step that uses none.
    """
    steps = rules["pretokenizers"] if rules.get("type") == "Sequence" else [rules]
    if len(steps) > 2:
        return None
    *split, byte_level = steps
    if byte_level.get("type") != "ByteLevel" or byte_level["add_prefix_space"]:
        return None
    if byte_level["use_regex"] == bool(split):
        return None
    if not split:
        return GPT2_PATTERN
    [split] = split
    if (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False):
        return None
    return split["pattern"].get("Regex", "")


def to_python_regex(pattern: str) -> str:
    r"""Translate an expression of the package (Oniguruma) to `re`: \p{L} and \p{N} are spelled out.

    Other properties make re.compile fail.
    """
    classes = {r"\p{L}": LETTERS, r"\p{N}": DIGITS}
    in_brackets = False
    translated = []
    for part in re.findall(r"\\p\{.\}|\\.|.", pattern, re.DOTALL):
        if part == "[":
            in_brackets = True
        elif part == "]":
            in_brackets = False
        chars = classes.get(part)
        if chars is None:
            translated.append(part)
        else:
            translated.append(chars if in_brackets else f"[{chars}]")
    return "".join(translated)
