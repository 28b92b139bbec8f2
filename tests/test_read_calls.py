"""text/read_calls.py: what the formats write is read back; anything else stays text."""
import json

import pytest

from templates import split_thought
from text.chat_formats import TEMPLATES
from text.read_calls import READERS, ThoughtSplitter, find_calls, split_answer
from text.tool_calls import TOOL_FORMATS

CALLS = [("weather", '{"city": "Oslo", "days": [1, 2]}'), ("time", '{"zone": "a\\n\\"b\\" é"}')]
NAMES = {"weather", "time"}
TEMPLATE = TEMPLATES["qwen"]


def as_json(calls):
    return json.dumps([{"name": name, "arguments": json.loads(arguments)}
                       for name, arguments in calls])


def test_there_is_a_reader_for_each_format():
    assert set(READERS) == set(TOOL_FORMATS)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", READERS)
def test_what_a_format_writes_is_read_back(name, count):
    if name == "glm4" and count == 2:
        pytest.skip("this format writes one call a turn")
    text = TOOL_FORMATS[name].call(as_json(CALLS[:count]), TEMPLATE)
    found, calls = find_calls(text, name, NAMES)
    assert found == "" and calls == CALLS[:count]


def test_text_before_a_call_is_kept():
    text = TOOL_FORMATS["qwen"].call(as_json(CALLS[:1]), TEMPLATE)
    assert find_calls(f"Let me look.\n{text}", "qwen", NAMES) == ("Let me look.", CALLS[:1])
    assert find_calls('One moment.[TOOL_CALLS][{"name": "time", "arguments": {}}]', "mistral",
                      NAMES) == ("One moment.", [("time", "{}")])


@pytest.mark.parametrize("text", [
    "Hello", "", "{", '{"name": "weather"}', '<tool_call>\n{"name": "weather"}\n</tool_call>',
    '[{"name": 3, "arguments": {}, "parameters": {}}]', "Action: weather\nAction Input: none",
    "weather\nOslo", "[" * 5000, '{"name": "other", "arguments": {}, "parameters": {}}',
])
@pytest.mark.parametrize("name", READERS)
def test_anything_else_is_text(name, text):
    assert find_calls(text, name, NAMES) == (text, [])


MARKS = ("<think>\n", "\n</think>\n\n")


@pytest.mark.parametrize("text, thought, rest", [
    ("Yes.", "", "Yes."),
    ("<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("\n<think>Hm.</think>Yes.", "Hm.", "Yes."),
    ("<think>\n\n</think>\n\nYes.", "", "Yes."),
    ("<think>\nhalf a thou", "half a thou", ""),
    ("I write <think> in the text", "", "I write <think> in the text"),
    ("<thin", "", "<thin"),
    ("<think>\na\n\nb </thi b\n</think>\n\n<think>c", "a\n\nb </thi b", "<think>c"),
])
def test_thoughts_are_split_alike_in_pieces_of_any_size(text, thought, rest):
    assert split_answer(text, MARKS) == (thought, rest)
    for size in (1, 2, 3, 7):
        splitter = ThoughtSplitter(MARKS)
        pieces = []
        for start in range(0, len(text), size):
            pieces += splitter.push(text[start:start + size])
        pieces += splitter.flush()
        for kind, wanted in (("thought", thought), ("text", rest)):
            assert "".join(piece for found, piece in pieces if found == kind) == wanted
    if "</think>" in text:                  # as the rows of a dataset are split
        _, by_template, after = split_thought(text, MARKS)
        assert by_template.strip().removeprefix("<think>").removesuffix("</think>").strip(
            "\n") == thought and after.strip("\n") == rest
