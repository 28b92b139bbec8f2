"""text/fast_bpe.py: the same ids as the package `tokenizers` for every text."""
import json
import random
import string

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.common import SHARED, needs_shared
from text import fast_bpe
from text.fast_bpe import build_word_cache
from text.tokenizer import Tokenizer, load_tokenizer

SNIPPETS = [
    "it's", "IT'S", "we'LL", "I'd've", "123456", "3.14", "a_b", "x+=1;", "\n\n", "\r\n", " \t ",
    "   ", " ", "\x0b", "\x1c", "\x85", "\x00", "café", "naïve", "“so”", "–", "…", "It’s", "½",
    "ſ", "'ſ", "\u00a0", "中文", "e\u0301", "<|eot_id|>", "<|im_end|>", "<tool_call>", "</think>",
    "<|", "|>", "<|im_end", "http://a.b/c?d=e", "#", "日本", "\u2028", "Ⅷ", "²",
]


def random_texts(count, seed=0):
    """Words, symbols and special tokens, concatenated at random."""
    rng = random.Random(seed)
    words = ["The", " quick", " brown", "fox", " jumps"]
    pieces = SNIPPETS + list(string.printable) + words * 8
    return ["".join(rng.choice(pieces) for _ in range(rng.randrange(25))) for _ in range(count)]


@needs_shared
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3"])
@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_ids_equal_the_package(name, split_special_tokens):
    tokenizer = load_tokenizer(SHARED / "tokenizers" / name, split_special_tokens)
    texts = random_texts(4000)
    cache = build_word_cache(tokenizer.core)
    encoded = [cache.encode(text) for text in texts]
    assert encoded.count(None) < 0.9 * len(texts)
    expected = tokenizer.encode_batch_plain(texts)
    wrong = [text for text, ids, right in zip(texts, encoded, expected)
             if ids not in (None, right)]
    assert wrong == []
    assert tokenizer.encode_batch(texts) == expected
    assert tokenizer.word_cache


@needs_shared
@pytest.mark.parametrize("dataset, least", [("alpaca_en_demo", 0.97), ("alpaca_zh_demo", 0.0)])
def test_ids_of_real_rows(dataset, least):
    """Nearly all English rows go through the cache; Chinese ones are left to the package."""
    tokenizer = load_tokenizer(SHARED / "tokenizers" / "llama3")
    rows = json.loads((SHARED / "data" / f"{dataset}.json").read_text(encoding="utf-8"))
    texts = [row["output"] for row in rows]
    assert tokenizer.encode_batch(texts) == tokenizer.encode_batch_plain(texts)
    encoded = [tokenizer.word_cache.encode(text) for text in texts]
    assert sum(ids is not None for ids in encoded) >= least * len(texts)


@needs_shared
def test_a_tokenizer_that_does_not_split_words_has_no_cache():
    assert build_word_cache(load_tokenizer(SHARED / "tokenizers" / "llama2").core) is None


def byte_level(normalizer=None, **options):
    """A small byte-level BPE, trained here."""
    core = Core(models.BPE())
    core.normalizer = normalizer
    core.decoder = decoders.ByteLevel()
    options = {"add_prefix_space": False, "use_regex": True, **options}
    core.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    sentence = "the quick brown fox jumps over the lazy dog's 123 bones"
    core.train_from_iterator([sentence] * 5, trainer)
    return core


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.Sequence([])],
                         ids=["none", "NFC", "no steps"])
def test_the_pattern_of_gpt2(normalizer):
    core = byte_level(normalizer)
    cache = build_word_cache(core)
    for text in random_texts(2000, seed=1):
        assert cache.encode(text) in (None, core.encode(text).ids)
    assert cache.encode("the lazy dog's")
    assert cache.encode("中") is None


@pytest.mark.parametrize("core", [
    byte_level(normalizers.Lowercase()),
    byte_level(add_prefix_space=True),
    byte_level(use_regex=False),
], ids=["normalizer", "prefix space", "no words"])
def test_texts_that_are_left_to_the_package(core):
    assert build_word_cache(core) is None


@pytest.mark.parametrize("pattern", [r"\p{Lu}+|\s+|[^\s]", r"\w+|\s+", r"(?<n>a)|.", ""])
def test_patterns_that_cannot_be_used(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    byte_level_step = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    rules = {"type": "Sequence", "pretokenizers": [split, byte_level_step]}
    assert fast_bpe.word_pattern(rules) is None


def test_a_cache_that_disagrees_with_the_package_is_dropped(monkeypatch, capsys):
    """Some texts are encoded both ways before the cache is used."""
    tokenizer = Tokenizer(byte_level(), {})
    monkeypatch.setattr(fast_bpe, "GPT2_PATTERN", r".|\n")
    texts = ["the quick brown fox", "dog"]
    assert tokenizer.encode_batch(texts) == tokenizer.encode_batch_plain(texts)
    assert tokenizer.word_cache is None
    assert "disagrees with tokenizer.json" in capsys.readouterr().out


def test_a_new_token_is_known_at_once():
    tokenizer = Tokenizer(byte_level(), {})
    before = tokenizer.encode_batch(["the <|end|>"])
    tokenizer.add_tokens(["<|end|>"])
    after = tokenizer.encode_batch(["the <|end|>"])
    assert before != after
    assert after == tokenizer.encode_batch_plain(["the <|end|>"])
    assert tokenizer.word_cache


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(fast_bpe, "MAX_WORDS", 3)
    cache = build_word_cache(byte_level())
    for text in ("the quick", "brown fox", "jumps over", "the quick"):
        assert cache.encode(text) == cache.core.encode(text).ids
        assert len(cache) <= 3
