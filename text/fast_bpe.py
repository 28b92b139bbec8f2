"""Text to ids a word at a time: nearly every word of a text has come up before, and a dictionary knows its ids.

A byte-level BPE cuts a text into words with a regular expression, and then each word, whatever stands beside it, into
ids. The package `tokenizers` does both anew for every word; here the first is Python's `re`, and the second is asked of
the package once a word. What this file cannot be sure to do alike is left to the package: `words_of` gives None for
another kind of tokenizer, `encode` gives None for a text with characters beyond PLAIN.

Read before: text/tokenizer.py (encode_batch chooses between this and the package, its slow twin). Read after: templates.py.
Source: byte-level BPE, Radford et al. 2019 (GPT-2), section 2.2.
"""
import json
import re
from itertools import chain

LETTERS, DIGITS = "a-zA-ZÀ-ÖØ-öø-ÿ", "0-9"      # all of \p{L} and \p{N} that PLAIN has
PLAIN = "\x00-\x7fÀ-ÖØ-öø-ÿ‐-‧"                 # ASCII, letters of Western Europe, dashes and quotes, which
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"     # NFC leaves as they are
NFC = {"type": "NFC"}
MOST_WORDS = 500_000            # kept at once; real text has some ten thousand that come again


class Words(dict):
    """word -> its ids, asked of the tokenizer when the word first comes up.

    core: a tokenizers.Tokenizer. cut: a compiled pattern whose matches are the words. names: {added token: id}.
    """

    def __init__(self, core, cut, names: dict):
        super().__init__()
        self.core, self.cut = core, cut.findall
        self.names = {name: [number] for name, number in names.items()}
        longest_first = sorted(names, key=len, reverse=True)
        self.apart = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split if names else lambda text: [text]
        self.beyond = re.compile(f"[^{PLAIN}]").search

    def __missing__(self, word):
        if self.cut(word) != [word]:            # the package would not see one word in it, either
            raise LookupError(word)
        if len(self) >= MOST_WORDS:
            self.clear()
        self[word] = ids = self.core.encode(word, add_special_tokens=False).ids
        return ids

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text, without bos and eos, or None: the package is to be asked."""
        if not text.isascii() and self.beyond(text):
            return None
        ids = []
        try:
            for place, part in enumerate(self.apart(text)):         # text, added token, text, added token, …, text
                ids += self.names[part] if place % 2 else chain.from_iterable(map(self.__getitem__, self.cut(part)))
        except LookupError:
            return None
        return ids


def words_of(core) -> Words | None:
    """Words for a tokenizers.Tokenizer, or None where the ids of a word may depend on more than the word."""
    tokens = {number: token for number, token in core.get_added_tokens_decoder().items()
              if not (token.special and core.encode_special_tokens)}
    simple = (type(core.model).__name__ == "BPE" and not core.model.dropout and rules_of(core.normalizer) in ({}, NFC)
              and not any(token.lstrip or token.rstrip or token.single_word for token in tokens.values())
              and len({token.normalized for token in tokens.values()}) < 2)
    pattern = pattern_of(rules_of(core.pre_tokenizer)) if simple else None
    if pattern is None:
        return None
    return Words(core, pattern, {token.content: number for number, token in tokens.items()})


def rules_of(part) -> dict:
    """A normalizer or pre-tokenizer of the package as tokenizer.json describes it; {} for None."""
    return {} if part is None else json.loads(part.__getstate__())


def pattern_of(rules: dict) -> re.Pattern | None:
    """The regular expression of a pre-tokenizer for texts of PLAIN characters, or None where it has no such."""
    steps = rules["pretokenizers"] if rules.get("type") == "Sequence" else [rules]
    split, level = (steps[0], steps[1]) if len(steps) == 2 else ({}, steps[0])
    if len(steps) > 2 or level.get("type") != "ByteLevel" or level["add_prefix_space"] or level["use_regex"] == bool(split):
        return None
    if split and (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False):
        return None
    written = split["pattern"].get("Regex", "") if split else GPT2
    try:
        pattern = re.compile(in_python(written), re.ASCII)
    except re.error:
        return None
    plain = [chr(code) for code in range(0x2028) if re.match(f"[{PLAIN}]", chr(code))]
    return pattern if all(pattern.findall(sign) == [sign] for sign in plain) else None      # nothing may fall between words


def in_python(pattern: str) -> str:
    r"""A pattern of the package's (Oniguruma) for `re`: \p{L} and \p{N} spelt out. Other properties make re.compile fail."""
    inside, found = False, []
    for part in re.findall(r"\\p\{.\}|\\.|.", pattern, re.DOTALL):
        inside = part == "[" or inside and part != "]"
        signs = {r"\p{L}": LETTERS, r"\p{N}": DIGITS}.get(part)
        found.append(part if signs is None else signs if inside else f"[{signs}]")
    return "".join(found)
