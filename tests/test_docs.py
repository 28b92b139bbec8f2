"""docs/: the code of pages with instructions is run as written."""
import contextlib
import io
import re

import pytest

from checkpoint.read_config import model_config
from families import FAMILIES, Family
from tests.common import ROOT


def test_add_a_family(tmp_path, monkeypatch):
    """docs/add_a_family.md from start to end; its last block compares the logits with
    transformers'."""
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```",
                        (ROOT / "docs/add_a_family.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setitem(FAMILIES, "olmoe", None)        # what the page adds is taken out at the end
    monkeypatch.chdir(tmp_path)
    del FAMILIES["olmoe"]
    assert len(blocks) == 2
    seen = {}
    for block in blocks:
        exec(block, seen)
    assert seen["difference"] < 1e-4 and FAMILIES["olmoe"].qk_norm == "width"


def test_the_family_row_of_the_page_is_needed(tmp_path, monkeypatch):
    """Without qk_norm the tensors do not fit, and the error names them."""
    monkeypatch.setitem(FAMILIES, "olmoe", Family(fixed={"clip_qkv": None}))
    fields = dict(model_type="olmoe", hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                  num_attention_heads=4, vocab_size=100)
    with pytest.raises(ValueError, match="clip_qkv: 8.0 is not supported, only null"):
        model_config({**fields, "clip_qkv": 8.0})
    with pytest.raises(ValueError, match="'num_experts': 6 may change what the network computes"):
        model_config({**fields, "num_experts": 6})


def numbers_apart(text):
    """(the text with every decimal number as #, the numbers): machines differ in the last digit."""
    return re.sub(r"\d+\.\d+", "#", text), [float(n) for n in re.findall(r"\d+\.\d+", text)]


def test_one_row_prints_what_the_page_shows(monkeypatch):
    """docs/one_row.md from start to end, each snippet against the output below it."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/one_row.md").read_text(encoding="utf-8")
    steps = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert len(steps) == text.count("```python") == 10
    names = {}
    for code, shown in steps:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        (words,
         values), (expected_words, expected) = map(numbers_apart, (printed.getvalue(), shown))
        assert words == expected_words
        assert values == pytest.approx(expected, rel=2e-3, abs=2e-4)
