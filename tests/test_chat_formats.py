"""text/chat_formats.py: the rows, formats written in a yaml, and formats stored with an adapter."""
import json
import re
from dataclasses import replace

import pytest

from settings.config import as_dict
from settings.load_config import load_config
from templates import BOS, EOS, Template, Token
from tests.chats import CALL, TOOL, call, talk, text_of, write_byte_level
from tests.common import ROOT
from text.chat_formats import TEMPLATES
from text.fit_tokenizer import fit_tokenizer
from text.template_check import check_template, choose_template
from text.tokenizer import load_tokenizer
from text.tool_formats import TOOL_FORMATS
from text.written_formats import find_template, stored_template, written_template


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_well_formed(name):
    row = TEMPLATES[name]
    for slots in (row.user, row.assistant, row.system, row.observation, row.function):
        texts = [slot for slot in slots or ("{{content}}",) if isinstance(slot, str)]
        assert sum(text.count("{{content}}") for text in texts) == 1
        assert all(isinstance(slot, (str, Token)) for slot in slots or ())
    assert row.tool_format is TOOL_FORMATS[row.tool_format.name]
    assert not row.system_in_user or len(row.system) == 1  # it becomes part of one text
    assert not row.stop_is_eos or row.stop


def test_formats_without_recordings_equal_the_published_ones():
    assert text_of("vicuna", talk("a", "b", "c", "d"), system="s") == [
        ("sUSER: a ASSISTANT:", "b</s>"),
        ("USER: c ASSISTANT:", "d</s>"),
    ]
    assert text_of("chatml", talk("a", "b"), system="s") == [
        (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
            "<|im_start|>assistant\n",
            "b<|im_end|>\n",
        )
    ]


PAGE = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
MYCHAT = {"name": "mychat", "user": "<u>{{content}}</u><b>", "prefix": [{"token": "bos"}]}


def from_page(tmp_path, number):
    """The template in a yaml of docs/templates.md, read as a config is."""
    path = tmp_path / "page.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[number], encoding="utf-8")
    return load_config([str(path)], "config").template


def test_the_examples_of_the_page_work(tmp_path):
    mapping = from_page(tmp_path, 0)
    assert len((tmp_path / "page.yaml").read_text().splitlines()) <= 10
    [(source, target)] = text_of(find_template(mapping), talk("A", "B"), "S")
    assert f"```\n{source}{target}\n```" in PAGE and f"`{target}` carries loss" in PAGE
    row_of_page = re.search(r"```python\n\"mychat\": (.*?),\n```", PAGE, re.DOTALL).group(1)
    row = eval(row_of_page, {"Template": Template, "BOS": BOS, "EOS": EOS})
    row = replace(row, name="mychat", own_jinja=True, tool_format=TOOL_FORMATS["default"])
    assert row == find_template(mapping)
    assert text_of(row, call(CALL)) == text_of(find_template(mapping), call(CALL))
    changed = find_template(from_page(tmp_path, 1))
    assert text_of(changed, talk("A", "B")) == text_of(
        "qwen", talk("A", "B"), default_system="You are Pip."
    )
    fields = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", PAGE, re.MULTILINE)
    assert {name for pair in fields for name in pair if name} == set(
        Template.__dataclass_fields__
    ) - {"name"}


def test_a_format_is_stored_and_read_again(tmp_path):
    mapping = from_page(tmp_path, 0)
    template = find_template(mapping)
    (tmp_path / "train_config.json").write_text(
        json.dumps({"template": written_template(template)})
    )
    stored, force = stored_template([tmp_path], None, False)
    assert find_template(stored) == template and force
    # the same, written another way
    assert stored_template([tmp_path], mapping, False) == (mapping, True)
    with pytest.raises(ValueError, match="template: qwen, but .* was trained with mychat"):
        stored_template([tmp_path], "qwen", False)
    with pytest.raises(ValueError,
                       match="template: mychat, but .* trained with another version of mychat"):
        stored_template([tmp_path], {**mapping, "default_system": "You are Max."}, False)
    config = load_config([str(tmp_path / "page.yaml")], "config")
    (tmp_path / "train_config.json").write_text(json.dumps(as_dict(config)))
    assert find_template(stored_template([tmp_path], None, False)[0]) == template
    (tmp_path / "train_config.json").write_text('{"template": "llama3"}')
    with pytest.raises(ValueError, match="template: mychat, but .* was trained with llama3"):
        stored_template([tmp_path], mapping, False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_row_can_be_written_as_a_mapping(name):
    assert written_template(TEMPLATES[name]) == name
    other = replace(TEMPLATES[name], name="other")
    assert find_template(json.loads(json.dumps(written_template(other)))) == other


def test_based_on_changes_only_the_given_fields():
    changed = find_template(
        {"name": "q", "based_on": "qwen3", "reasoning": "false", "stop": "<|im_end|>"}
    )
    assert text_of(changed, call(CALL), "s", TOOL) == text_of(
        "qwen3_nothink", call(CALL), "s", TOOL
    )
    assert (
        changed.families == () and changed.needs == TEMPLATES["qwen3"].needs and changed.own_jinja
    )
    plain = find_template(
        {
            "based_on": "llama3",
            "user": "Q: {{content}} A:",
            "system": "{{content}}",
            "assistant": ["{{content}}", {"token": "eos"}],
            "observation": "O: {{content}} A:",
        }
    )
    assert plain.needs == () and plain.name == "custom"


@pytest.mark.parametrize(
    "template, message",
    [
        ({"usr": "{{content}}"}, "unknown key 'usr'.*did you mean 'user'"),
        ({"name": "a"}, "'user' is missing"),
        ({"user": "no mark"}, "user: {{content}} must occur once, found 0 times"),
        ({"user": "{{content}}{{content}}"}, "found 2 times"),
        ({"user": "{{query}}"}, "unknown mark {{query}}.*{{content}}"),
        ({"user": "{{ content }}"}, "unknown mark {{ content }}"),
        ({"user": r"a\n{{content}}"}, "double quotes"),
        ({"user": ["{{content}}", {"tokn": "eos"}]}, "is not a slot.*token: eos"),
        ({"user": [["{{content}}"]]}, "is not a slot"),
        ({**MYCHAT, "prefix": "{{content}}"}, "nothing is put into the prefix"),
        ({**MYCHAT, "stop_is_eos": "maybe"}, "not true or false"),
        ({**MYCHAT, "stop_is_eos": "true"}, "needs stop"),
        (
            {**MYCHAT, "system_in_user": "true", "system": ["{{content}}", {"token": "eos"}]},
            "a system of one text",
        ),
        ({**MYCHAT, "thought": ["<t>"]}, "two texts"),
        ({**MYCHAT, "stop": [{"token": "eos"}]}, "not a list of texts"),
        ({**MYCHAT, "default_system": ["a"]}, "not a text"),
        ({**MYCHAT, "name": "qwen"}, "based_on: qwen under another name"),
        ({"based_on": "lama3"}, "unknown template 'lama3'.*did you mean 'llama3'"),
        ({**MYCHAT, "tool_format": "quen"}, "unknown tool_format 'quen'.*did you mean 'qwen'"),
        (
            {**MYCHAT, "needs": ["<|no|>"]},
            "template 'mychat' uses '<.no.>', which this tokenizer lacks",
        ),
    ],
)
def test_a_format_that_cannot_be_used_is_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        choose_template(template, load_tokenizer(write_byte_level(tmp_path / "a")), "llama")


def test_a_custom_format_writes_the_chat_template(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.chat_template = "{{ 'something else' }}"
    template, why = choose_template(MYCHAT, tokenizer, "llama")
    assert why == "as the config says"
    fit_tokenizer(template, tokenizer)
    assert "<u>" in tokenizer.chat_template and check_template(template, tokenizer) == []


def test_equally_near_names_come_in_their_order():
    with pytest.raises(ValueError, match=r"did you mean 'llama2', 'llama3', 'llama4', "):
        find_template("llama")
