"""words.py against the package `tokenizers`: the same ids for every text that it takes on."""
import random
import string

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from text import fast_bpe as words
from tests.common import SHARED, needs_shared
from text.tokenizer import Tokenizer, load_tokenizer

MADE = ["it's", "IT'S", "we'LL", "I'd've", "123456", "3.14", "a_b", "x+=1;", "\n\n", "\r\n", " \t ", "   ", " ", "\x0b", "\x1c", "\x85",
        "\x00", "café", "naïve", "“so”", "–", "…", "It’s", "½", "ſ", "'ſ", "\u00a0", "中文", "e\u0301", "<|eot_id|>", "<|im_end|>", "<tool_call>",
        "</think>", "<|", "|>", "<|im_end", "http://a.b/c?d=e", "#", "日本", "\u2028", "Ⅷ", "²"]


def texts(count, seed=0):
    """Words, signs and tokens typed out, put together at random."""
    draw = random.Random(seed)
    pieces = MADE + list(string.printable) + ["The", " quick", " brown", "fox", " jumps"] * 8
    return ["".join(draw.choice(pieces) for _ in range(draw.randrange(25))) for _ in range(count)]


@needs_shared
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3"])
@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_the_same_ids_as_the_package(name, split_special_tokens):
    tokenizer = load_tokenizer(SHARED / "tokenizers" / name, split_special_tokens)
    asked = texts(4000)
    found = words.words_of(tokenizer.core)
    answers = [found.encode(text) for text in asked]
    assert answers.count(None) < 0.9 * len(asked)
    wanted = tokenizer.encode_texts(asked)
    assert [text for text, ids, right in zip(asked, answers, wanted) if ids not in (None, right)] == []
    assert tokenizer.encode_batch(asked) == wanted and tokenizer.words


@needs_shared
def test_real_rows():
    """English rows are nearly all taken on; Chinese ones are left to the package."""
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "llama3")
    for name, least in (("alpaca_en_demo", 0.97), ("alpaca_zh_demo", 0.0)):
        import json
        asked = [row["output"] for row in json.loads((SHARED / "data" / f"{name}.json").read_text(encoding="utf-8"))]
        assert tokenizer.encode_batch(asked) == tokenizer.encode_texts(asked)
        assert sum(tokenizer.words.encode(text) is not None for text in asked) >= least * len(asked)


@needs_shared
def test_a_tokenizer_of_whole_texts_is_left_alone():
    assert words.words_of(load_tokenizer(SHARED / "tokenizers" / "llama2").core) is None


def byte_level(normalizer=None, **options):
    """A small byte-level BPE, learnt here."""
    core = Core(models.BPE())
    core.normalizer, core.decoder = normalizer, decoders.ByteLevel()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": True, **options})
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(["the quick brown fox jumps over the lazy dog's 123 bones"] * 5, trainer)
    return core


def test_the_pattern_of_gpt2():
    core = byte_level()
    found, asked = words.words_of(core), texts(2000, seed=1)
    assert all(found.encode(text) in (None, core.encode(text).ids) for text in asked)
    assert found.encode("the lazy dog's") and found.encode("中") is None


@pytest.mark.parametrize("core", [
    byte_level(normalizers.Lowercase()), byte_level(add_prefix_space=True), byte_level(use_regex=False)],
    ids=["normalizer", "prefix space", "no words"])
def test_what_is_left_to_the_package(core):
    assert words.words_of(core) is None


@pytest.mark.parametrize("pattern", [r"\p{Lu}+|\s+|[^\s]", r"\w+|\s+", r"(?<n>a)|.", ""])
def test_patterns_that_cannot_be_told_in_python_or_leave_gaps(pattern):
    rules = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}
    assert words.pattern_of(rules) is None


def test_a_pattern_that_is_not_what_it_seems_is_found_out(monkeypatch, capsys):
    """Before text/fast_bpe.py is believed some texts are encoded both ways."""
    tokenizer = Tokenizer(byte_level(), {})
    monkeypatch.setattr(words, "GPT2", r".|\n")
    asked = ["the quick brown fox", "dog"]
    assert tokenizer.encode_batch(asked) == tokenizer.encode_texts(asked) and tokenizer.words is None
    assert "tokenised whole" in capsys.readouterr().out


def test_a_new_token_is_known_at_once():
    tokenizer = Tokenizer(byte_level(), {})
    before = tokenizer.encode_batch(["the <|end|>"])
    tokenizer.add_tokens(["<|end|>"])
    after = tokenizer.encode_batch(["the <|end|>"])
    assert before != after == tokenizer.encode_texts(["the <|end|>"]) and tokenizer.words


def test_words_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    found = words.words_of(byte_level())
    for text in ("the quick", "brown fox", "jumps over", "the quick"):
        assert found.encode(text) == found.core.encode(text).ids and len(found) <= 3
