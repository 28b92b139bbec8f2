"""text/read_calls.py: what the formats write is read back; anything else stays text."""
import json
import re
import time

import pytest

from serving.answers import Choice
from templates import encode_turns, split_thought
from tests.chats import write_byte_level
from text.chat_formats import TEMPLATES
from text.fit_tokenizer import fit_tokenizer
from text.read_calls import (READERS, ThoughtSplitter, find_calls, split_answer,
                             text_arguments)
from text.tokenizer import load_tokenizer
from text.tool_formats import TOOL_FORMATS

CALLS = [("weather", '{"city": "Oslo", "days": [1, 2]}'), ("time", '{"zone": "a\\n\\"b\\" é"}')]
TOOLS = text_arguments([
    {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}, "days": {}}}},
    {"name": "time", "parameters": {"properties": {"zone": {"type": "string"}}}}])
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
    found, calls = find_calls(text, name, TOOLS)
    assert found == "" and calls == CALLS[:count]


HARD = {                # arguments that a reader may take for something else
    "texts": {"a": "123", "b": "true", "c": "[1]", "d": " x\n\n y ", "e": "été 'x' {z}, b=1",
              "f": ""},
    "values": {"a": 1, "b": True, "c": None, "d": [1.5, {"x": "y, z: w"}],
               "e": {"k": [], "l": {}}},
    "none": {},
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", READERS)
def test_arguments_of_all_kinds_are_read_back(name, case):
    kind = {"type": "string"} if case == "texts" else {}
    tools = [{"name": "f", "parameters": {"properties": {key: kind for key in HARD[case]}}}]
    text = TOOL_FORMATS[name].call(as_json([("f", json.dumps(HARD[case]))]), TEMPLATE)
    found, [(function, arguments)] = find_calls(text, name, text_arguments(tools))
    assert (found, function) == ("", "f") and json.loads(arguments) == HARD[case]


VENDORS = {             # as the vendors' own chat templates write the calls of CALLS
    "qwen3_5": "Hm.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
               "<parameter=days>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
    "glm4_moe": "Hm.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
                "<arg_key>days</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call>",
    "minimax2": 'Hm.\n<minimax:tool_call>\n<invoke name="weather">\n'
                '<parameter name="city">Oslo</parameter>\n<parameter name="days">[1, 2]</parameter>'
                "\n</invoke>\n</minimax:tool_call>",
    "seed_oss": "Hm.\n<seed:tool_call>\n<function=weather>\n<parameter=city>Oslo</parameter>\n"
                "<parameter=days>[1, 2]</parameter>\n</function>\n</seed:tool_call>",
    "lfm2": "Hm.<|tool_call_start|>[weather(city='Oslo', days=[1, 2])]<|tool_call_end|>",
    "gemma4": 'Hm.<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:[1,2]}<tool_call|>',
}


@pytest.mark.parametrize("name", VENDORS)
def test_what_the_vendors_write_is_read(name):
    assert find_calls(VENDORS[name], name, TOOLS) == ("Hm.", CALLS[:1])
    broken = VENDORS[name].replace("weather", "weather<", 1)
    assert find_calls(broken, name, TOOLS) == (broken, [])
    assert find_calls(VENDORS[name] + " And so on", name, TOOLS)[1] == []


@pytest.mark.parametrize("name", READERS)
def test_long_answers_are_read_in_no_time(name):
    start = time.process_time()
    for opens in ("", "<tool_call>f", "<tool_call>\n<function=f>", '<invoke name="f">', "Action: f",
                  "<seed:tool_call><function=f", "<|tool_call_start|>[f(a=", "<|tool_call>call:f{"):
        for filler in (" ", "\n", "<", "{", '"', "a b ", "-"):
            find_calls(opens + filler * 20_000, name, TOOLS)
    assert time.process_time() - start < 2


def test_text_before_a_call_is_kept():
    text = TOOL_FORMATS["qwen"].call(as_json(CALLS[:1]), TEMPLATE)
    assert find_calls(f"Let me look.\n{text}", "qwen", TOOLS) == ("Let me look.", CALLS[:1])
    assert find_calls('One moment.[TOOL_CALLS][{"name": "time", "arguments": {}}]', "mistral",
                      TOOLS) == ("One moment.", [("time", "{}")])


@pytest.mark.parametrize("text", [
    "Hello", "", "{", '{"name": "weather"}', '<tool_call>\n{"name": "weather"}\n</tool_call>',
    '[{"name": 3, "arguments": {}, "parameters": {}}]', "Action: weather\nAction Input: none",
    "weather\nOslo", "[" * 5000, '{"name": "other", "arguments": {}, "parameters": {}}',
])
@pytest.mark.parametrize("name", READERS)
def test_anything_else_is_text(name, text):
    assert find_calls(text, name, TOOLS) == (text, [])


MARKS = ("<think>\n", "\n</think>\n\n")


@pytest.mark.parametrize("text, thought, rest", [
    ("Yes.", "", "Yes."),
    ("<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("\n<think>Hm.</think>Yes.", "Hm.", "Yes."),
    ("<think>\n\n</think>\n\nYes.", "", "Yes."),
    ("<think>\nhalf a thou", "half a thou", ""),
    ("I write <think> in the text", "", "I write <think> in the text"),
    ("<thin", "", "<thin"),
    ("</think>\nYes.", "", "Yes."),
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
    if "</think>" in text[1:]:              # as the rows of a dataset are split
        _, by_template, after = split_thought(text, MARKS)
        assert by_template.strip().removeprefix("<think>").removesuffix("</think>").strip(
            "\n") == thought and after.strip("\n") == rest


@pytest.mark.parametrize("text, thought, rest", [
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
     "Hm.", "Yes."),
    ("<|channel|>final<|message|>Yes.", "", "Yes."),
    ("<|channel|>other", "", "<|channel|>other"),
])
def test_the_channels_of_gpt_oss(text, thought, rest):
    marks = TEMPLATES["gpt_oss"].thought
    assert split_answer(text, marks) == (thought, rest)
    splitter = ThoughtSplitter(marks)
    pieces = [found for letter in text for found in splitter.push(letter)] + splitter.flush()
    assert "".join(piece for kind, piece in pieces if kind == "text") == rest


MARKED = ("gpt_oss", "gemma4", "lfm2", "seed_oss", "mimo_v2", "qwen3")


@pytest.mark.parametrize("name", MARKED)
def test_marks_that_are_special_tokens_reach_the_readers(tmp_path, name):
    """An answer, as its target is encoded for training, comes back from its ids."""
    template = TEMPLATES[name]
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    written = TOOL_FORMATS[template.tool_format.name].call(as_json(CALLS[:1]), template)
    marks = "".join(map(str, [*template.thought, written, *(template.function or ())]))
    tokenizer.add_tokens([*re.findall(r"<[^<>\s=]+>", marks), *template.stop])
    fit_tokenizer(template, tokenizer)
    call = {"role": "function", "content": as_json(CALLS[:1])}
    if template.reasoning:
        call |= {"thought": "Hm.", "lead": ""}
    [(_, answer)] = encode_turns(template, tokenizer, [{"role": "user", "content": "?"}, call])
    choice = Choice(tokenizer, [], template, TOOLS)
    for token in answer:
        choice.push(token)
    choice.end("stop")
    assert choice.whole("thought") == ("Hm." if template.reasoning else "")
    assert choice.calls == CALLS[:1] and choice.whole("text") == ""
