"""text/fit_tokenizer.py: stop tokens, eos, and the chat template written for other programs."""
from dataclasses import replace

import pytest

from templates import Template, render_turns
from tests.chats import TextTokenizer, fitted, talk, write_byte_level
from tests.common import GOLDEN, needs_shared, read_jsonl
from text.chat_formats import TEMPLATES
from text.fit_tokenizer import fit_tokenizer
from text.tokenizer import load_tokenizer
from text.written_formats import with_overrides


@needs_shared
@pytest.mark.parametrize("file", ["special_tokens", "special_tokens2026"])
def test_special_tokens_equal_the_recorded_ones(file):
    for case in read_jsonl(GOLDEN / "data" / f"{file}.jsonl"):
        tokenizer = fitted(case["template"], case["tokenizer"])
        stops = fit_tokenizer(
            TEMPLATES[case["template"]], tokenizer
        )  # a second time changes nothing
        ours = (
            tokenizer.vocab_size,
            tokenizer.eos_token,
            tokenizer.eos_id,
            tokenizer.pad_token,
            tokenizer.pad_id,
            tokenizer.bos_id,
            stops,
        )
        assert ours == tuple(
            case[key]
            for key in (
                "len",
                "eos_token",
                "eos_token_id",
                "pad_token",
                "pad_token_id",
                "bos_token_id",
                "stop_token_ids",
            )
        ), case["template"]


def test_stop_tokens_beyond_the_embedding(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    rows = tokenizer.vocab_size
    template = Template(user=("{{content}}",), stop=("</s>", "<|more|>"), stop_is_eos=True)
    assert fit_tokenizer(template, tokenizer, embedding_rows=rows) == [tokenizer.eos_id]
    assert (
        tokenizer.vocab_size == rows
    )  # a text with <|more|> must not become an id that the model lacks
    assert fit_tokenizer(template, tokenizer, embedding_rows=rows + 1) == [tokenizer.eos_id, rows]
    with pytest.raises(ValueError, match="'<.end.>'.*no room"):
        fit_tokenizer(replace(template, stop=("<|end|>",)), tokenizer, embedding_rows=rows + 1)


def test_a_tokenizer_without_eos_is_an_error(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a", eos_token=None))
    with pytest.raises(ValueError, match="names no eos_token"):
        fit_tokenizer(TEMPLATES["default"], tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "system, default", [(None, None), ("Be 'x' \\n\n\"y\"", None), (None, "D"), ("s", "")]
)
def test_the_written_chat_template_renders_what_is_encoded(tmp_path, name, system, default):
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    row = with_overrides(TEMPLATES[name], default_system=default)
    fit_tokenizer(row, tokenizer)
    messages = talk("a 'q' \\n {{ x }} {% y %}", "b\n", "c", "d")
    messages += [{"role": "observation", "content": "e"}, {"role": "assistant", "content": "f"}]

    class Shown(TextTokenizer):
        bos_id, eos_id = tokenizer.bos_token, tokenizer.eos_token

    row = replace(row, reasoning=False)
    ours = "".join(
        piece
        for turn in render_turns(row, Shown(), messages, system)
        for pieces in turn
        for piece in pieces
    )
    theirs = [{"role": "system", "content": system}] * bool(system) + [
        {**message, "role": "tool" if message["role"] == "observation" else message["role"]}
        for message in messages
    ]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers does
    assert environment.from_string(tokenizer.chat_template).render(messages=theirs) == ours
