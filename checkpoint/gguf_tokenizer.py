"""The tokenizer section of a GGUF file: what llama.cpp needs to give the ids of tokenizer.json.

Two kinds of vocabulary are known there:

    gpt2    byte-level BPE. A text is split into words by a regular expression, which the file only
            names: llama.cpp has those of PRETOKENIZERS and a few more. Merges by rank
    llama   sentencepiece's BPE: spaces are the character U+2581, unknown characters fall back to
            bytes. Pieces merge by score, the highest first; here minus the rank of the merge

Some tokenizers compose decomposed Unicode first (normalizer NFC); llama.cpp does not.

Requires: text/tokenizer.py.
Next: exporting/gguf_export.py.
Source: llama-vocab.cpp of llama.cpp in llama-cpp-python 0.3.36.
"""
import hashlib
import json
import unicodedata
from collections import Counter

from text.tokenizer import Tokenizer
from text.vocabularies import word_regex

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)      # types of tokens
SPACE = "\u2581"
GPT2_WORDS = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
MARKS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_WORDS = f"{MARKS}*{SMALL}+|{MARKS}+{SMALL}*|\\p{{N}}{REST}"
CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK_WORDS = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
                  r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+")
CASED_LETTERS = "991dfc9dc67aa691"          # checksum of a list of the letters that have a case
PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
CHINESE_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# {(regular expressions of the split, whether whole words are looked up before merging): its name}
PRETOKENIZERS = {
    ((word_regex("{1,3}"),), True): "llama-bpe",
    ((word_regex("{1,3}"),), False): "dbrx",
    ((word_regex(""),), False): "qwen2",
    ((GPT2_WORDS,), False): "gpt-2",
    (("digits", GPT2_WORDS), False): "smollm",
    ((TEKKEN_WORDS,), True): "tekken",
    ((r"\p{N}{1,3}", CHINESE_JAPANESE, DEEPSEEK_WORDS), False): "deepseek-v3",
    ((r"[\r\n]", CASED_LETTERS, PUNCTUATION, r"\s+$", CHINESE_KOREAN, "digits"), False):
        "deepseek-llm",
}
IGNORES_MERGES = {name: ignores for (_, ignores), name in PRETOKENIZERS.items()}


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int, stop_ids: set[int],
                       pretokenizer: str | None = None) -> dict:
    """The section as metadata of the file. vocab_size: rows of the embedding.

    stop_ids: ids that end an answer. pretokenizer: the name to write in place of the one that is
    recognized. Raises ValueError for a tokenizer that llama.cpp does not have.
    """
    fields = json.loads(tokenizer.core.to_str())
    if fields["model"]["type"] != "BPE":
        raise refused(tokenizer, f"its model is {fields['model']['type']}, not BPE")
    pieces = {i: text for text, i in fields["model"]["vocab"].items()}
    if fields["model"].get("byte_fallback"):
        section, types = sentencepiece_section(tokenizer, fields, pieces, vocab_size)
    else:
        section, types = byte_level_section(tokenizer, fields, pretokenizer), {}
    for token in fields["added_tokens"]:
        pieces[token["id"]] = token["content"]
        if types.get(token["id"]) not in (UNKNOWN, BYTE):
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    for i in range(vocab_size):
        if i not in pieces:                             # rows without a token
            pieces[i], types[i] = f"[PAD{i}]", UNUSED
    if len(pieces) > vocab_size:
        raise refused(tokenizer, f"it has {len(pieces):,} tokens, and the embedding {vocab_size:,} "
                      "rows")
    texts = Counter(pieces.values())
    if len(texts) < len(pieces):
        text, count = texts.most_common(1)[0]
        raise refused(tokenizer, f"{count} ids have the text {text!r}")
    section["tokens"] = [pieces[i] for i in range(vocab_size)]
    section["token_type"] = [types.get(i, NORMAL) for i in range(vocab_size)]
    section |= special_tokens(tokenizer, stop_ids)
    names = {f"tokenizer.ggml.{name}": value for name, value in section.items()}
    if tokenizer.chat_template:
        names["tokenizer.chat_template"] = tokenizer.chat_template
    return names


def refused(tokenizer: Tokenizer, why: str) -> ValueError:
    """The error for a tokenizer that llama.cpp does not have."""
    return ValueError("export_format: gguf: llama.cpp has no tokenizer like "
                      f"{tokenizer.name}'s and would split texts into other ids: {why}")


# ---- byte-level BPE -----------------------------------------------------------------------------


def byte_level_section(tokenizer: Tokenizer, fields: dict, pretokenizer: str | None) -> dict:
    """Name of the split, and merges."""
    for step in steps_of(fields["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            raise refused(tokenizer, f"its normalizer is {step['type']}")
    model = fields["model"]
    ignores = bool(model.get("ignore_merges"))
    words = word_splits(fields["pre_tokenizer"])
    name = pretokenizer or PRETOKENIZERS.get((words, ignores))
    if not name:
        near = [known for known, other in IGNORES_MERGES.items() if other == ignores]
        raise refused(tokenizer, "it splits texts into words by rules of its own. Where others "
                      f"will do, name the nearest (gguf_pretokenizer: {', '.join(near)})")
    if IGNORES_MERGES[name] != ignores:
        raise refused(tokenizer, f"{name} looks up whole words before it merges: "
                      f"{IGNORES_MERGES[name]}; tokenizer.json has ignore_merges: {ignores}")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": name, "merges": merges}


def word_splits(rules: dict | None) -> tuple | None:
    """The regular expressions of a pre-tokenizer, "digits" for single digits; None for others."""
    steps = steps_of(rules, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel":
        return None
    if steps[-1].get("add_prefix_space"):
        return None
    found = []
    for step in steps[:-1]:
        if step["type"] == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(known_spelling(step["pattern"].get("Regex")))
        else:
            return None
    if steps[-1].get("use_regex", True):
        found.append(GPT2_WORDS)
    return tuple(found)


def steps_of(rules: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or a pre-tokenizer, which may be none, one, or a sequence."""
    return rules.get(key, [rules]) if rules else []


def known_spelling(regex: str | None) -> str | None:
    """Ends of lines, which some files hold as characters, as escapes; the long list as checksum."""
    if not regex:
        return regex
    composed = unicodedata.normalize("NFC", regex)          # as some copies of the list are
    if hashlib.sha256(composed.encode()).hexdigest().startswith(CASED_LETTERS):
        return CASED_LETTERS
    return regex.replace("\r", r"\r").replace("\n", r"\n")


# ---- sentencepiece ------------------------------------------------------------------------------


def sentencepiece_section(tokenizer: Tokenizer, fields: dict, pieces: dict,
                          vocab_size: int) -> tuple[dict, dict]:
    """(scores and whether a text begins with a space, {id: type} of the vocabulary)."""
    model = fields["model"]
    ranks = {}                                          # of the merge that makes a piece
    last = ""
    for rank, merge in enumerate(model["merges"]):
        piece = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if piece != last and piece in ranks:
            raise refused(tokenizer, f"its merges make {piece!r} at several ranks")
        ranks.setdefault(piece, rank)
        last = piece
    types = {}
    for i, text in pieces.items():
        if len(text) == 6 and text.startswith("<0x"):
            types[i] = BYTE
        elif text == model.get("unk_token"):
            types[i] = UNKNOWN
    lowest = len(ranks)
    scores = [-float(ranks.get(pieces.get(i), lowest)) for i in range(vocab_size)]
    return {"model": "llama", "pre": "default", "scores": scores,
            "add_space_prefix": begins_with_space(tokenizer, fields)}, types


def begins_with_space(tokenizer: Tokenizer, fields: dict) -> bool:
    """Whether a space is put before a text, also after a special token. Raises ValueError."""
    space = False
    for step in (*steps_of(fields["normalizer"], "normalizers"),
                 *steps_of(fields["pre_tokenizer"], "pretokenizers")):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            space = True
        elif step["type"] == "Metaspace":
            space = step.get("prepend_scheme", "always") == "always"
            if step.get("prepend_scheme") == "first":
                print(f"note      {tokenizer.name} puts a space before the first words of a text "
                      "alone; llama.cpp puts none, as chat formats need it")
        elif step["type"] not in ("Replace", "Split"):
            raise refused(tokenizer, f"it has a step {step['type']}")
    return space


# ---- special tokens -----------------------------------------------------------------------------


def special_tokens(tokenizer: Tokenizer, stop_ids: set[int]) -> dict:
    """Ids with a meaning, and what is put around a text."""
    around = tokenizer.core.encode("a").ids
    inner = tokenizer.core.encode("a", add_special_tokens=False).ids
    section = {}
    for name, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id),
                    ("unknown", tokenizer.unk_id), ("padding", tokenizer.pad_id)):
        if i is not None:
            section[f"{name}_token_id"] = i
    others = sorted(stop_ids - {tokenizer.eos_id})
    if others:
        section["eot_token_id"] = others[0]             # a second end of an answer
    section["add_bos_token"] = around[:1] == [tokenizer.bos_id] != inner[:1]
    section["add_eos_token"] = around[-1:] == [tokenizer.eos_id] != inner[-1:]
    return section
