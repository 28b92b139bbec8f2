"""text/declared_tokens.py: tokens that only tokenizer_config.json names, against transformers."""
import json

import pytest

from tests.chats import write_byte_level
from text.tokenizer import load_tokenizer

TEXT = "a <new> b <tool> c<x><b> <pad> </zz> <bb><uu> <img>  <new>hello </s> end"


def token(content, special=True, **flags):
    """A token as added_tokens_decoder writes it."""
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, "special": special, **flags}


def write(folder, **config):
    """A tokenizer that transformers reads, too."""
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    return write_byte_level(folder, **{**plain, **config})


def size_of(tmp_path):
    """Tokens of its vocabulary."""
    return load_tokenizer(write(tmp_path / "size")).vocab_size


CASES = {
    "decoder": lambda n: {"added_tokens_decoder": {n: token("<new>")}},
    "two, out of order": lambda n: {"added_tokens_decoder": {
        n + 1: token("<b>", False), n: token("<new>")}},
    "flags": lambda n: {"added_tokens_decoder": {n: token("<new>", lstrip=True, rstrip=True)}},
    "another flag": lambda n: {"added_tokens_decoder": {1: token("</s>", rstrip=True)}},
    "additional": lambda n: {"additional_special_tokens": ["<tool>", "<x>"]},
    "extra list": lambda n: {"extra_special_tokens": ["<tool>"]},
    "extra object": lambda n: {"extra_special_tokens": {"image_token": "<img>"}},
    "pad": lambda n: {"pad_token": "<pad>"},
    "eos": lambda n: {"eos_token": "</zz>"},
    "bos and unk": lambda n: {"bos_token": "<bb>", "unk_token": "<uu>"},
    "of the model": lambda n: {"image_token": "<img>"},
    "all": lambda n: {"pad_token": "<pad>", "additional_special_tokens": ["<tool>"],
                      "extra_special_tokens": {"image_token": "<img>"},
                      "added_tokens_decoder": {n: token("<new>", False)}},
}


def compare(folder):
    """The tokenizer of a folder, compared with transformers'."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, "no token at all"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        ids = ours.encode(text)
        assert ours.decode(ids, True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)
    assert (ours.pad_id, ours.eos_id, ours.bos_id) == (
        theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id)
    return ours


NEW_IN_5 = ("extra list", "of the model", "all")        # transformers 4 adds fewer tokens


@pytest.mark.parametrize("name", CASES)
def test_declared_tokens_get_the_ids_of_transformers(tmp_path, name):
    if name in NEW_IN_5:
        pytest.importorskip("transformers", minversion="5.0")
    folder = write(tmp_path / "a", **CASES[name](size_of(tmp_path)))
    ours = compare(folder)
    ours.save(tmp_path / "saved")           # what is saved holds them in both files
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode(TEXT) == ours.encode(TEXT) and again.vocab_size == ours.vocab_size


def test_the_older_files_count_as_in_transformers(tmp_path):
    n = size_of(tmp_path)
    folder = write(tmp_path / "a", pad_token="</s>")
    older = {"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": n}))
    assert compare(folder).pad_token == "<pad>"


def test_an_id_that_contradicts_tokenizer_json_names_both_files(tmp_path):
    for number in (5, size_of(tmp_path) + 7):
        folder = write(tmp_path / "a", added_tokens_decoder={number: token("<new>")})
        with pytest.raises(ValueError, match=f"tokenizer_config.json .*'<new>' with the id {number}"
                                             ".*tokenizer.json lacks it"):
            load_tokenizer(folder)


@pytest.mark.parametrize("config, sentence", [
    ({"chat_template": [1]}, "chat_template: .1. is neither a text nor a list"),
    ({"chat_template": [{"name": "default"}]}, "chat_template: .* is neither a text nor a list"),
    ({"chat_template": 5}, "chat_template: 5 is neither"),
    ({"added_tokens_decoder": []}, "added_tokens_decoder: .. is not an object"),
    ({"added_tokens_decoder": {"x": token("a")}}, "added_tokens_decoder: x is not the id"),
    ({"added_tokens_decoder": {"-1": token("a")}}, "added_tokens_decoder: -1 is not the id"),
    ({"added_tokens_decoder": {"7": "a", "8": 5}}, "added_tokens_decoder: 8: 5 is not a token"),
    ({"added_tokens_decoder": {"7": {"content": 1}}}, "added_tokens_decoder: 7: .* is not a token"),
    ({"tokenizer_class": {"a": 1}}, "tokenizer_class: .* is not a text"),
    ({"pad_token": ["a"]}, "pad_token: .* is not a token"),
    ({"eos_token": {"x": 1}}, "eos_token: .* is not a token"),
    ({"eos_token": 7}, "eos_token: 7 is not a token"),
    ({"additional_special_tokens": "<a>"}, "additional_special_tokens: <a> is not a list"),
    ({"extra_special_tokens": [1]}, "additional special tokens: 1 is not a token"),
])
def test_values_of_a_wrong_type_are_named(tmp_path, config, sentence):
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {sentence}"):
        load_tokenizer(write(tmp_path / "a", **config))
