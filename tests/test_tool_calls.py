"""text/tool_calls.py: tools and calls in every spelling, and what is refused."""
import json

import pytest

from templates import render_turns
from tests.chats import CALL, TOOL, TextTokenizer, call, conversation, talk, text_of
from tests.common import GOLDEN, needs_shared, read_jsonl
from text.chat_formats import TEMPLATES


@needs_shared
def test_tool_calls_that_llama_factory_refuses_are_refused():
    cases = [
        case
        for case in read_jsonl(GOLDEN / "data" / "errors.jsonl")
        if case["case"] in ("thought_before_call", "parallel_calls", "call_not_json")
    ]
    assert len(cases) == 3
    for case in cases:
        messages, system, tools = conversation(case["rows"][0], case["dataset_info"])
        with pytest.raises(ValueError, match="function call"):
            render_turns(TEMPLATES[case["template"]], TextTokenizer(), messages, system, tools)


def test_calls_are_read_in_every_spelling():
    expected = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    for text in (CALL, f"[{CALL}]", f"  {CALL}\n", f"<tool_call>\n{CALL}\n</tool_call>"):
        assert text_of("qwen", call(text))[0][1] == expected + "<|im_end|>\n"
    for text in (
        f"[{CALL}, {CALL}]",
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
    ):
        assert text_of("qwen", call(text))[0][1] == f"{expected}\n{expected}<|im_end|>\n"
    for lead in ("<think>\nx\n</think>\n\n", "<think>x</think>"):
        assert text_of("qwen", call(lead + CALL))[0][1] == lead + expected + "<|im_end|>\n"
    assert (
        text_of("qwen", call(f"hm <tool_call>{CALL}</tool_call>"))[0][1]
        == "hm " + expected + "<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("weather(Oslo)", "not JSON.*weather.Oslo"),
        ("", "not JSON"),
        ("Let me look. " + CALL, "not JSON"),
        ("[]", "empty"),
        ('"weather"', "expected"),
        ('{"name": "weather"}', "arguments"),
        ("[1]", "expected"),
        (f"<tool_call>{CALL}</tool_call> and so on", "text after"),
    ],
)
def test_calls_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        text_of("qwen", call(text))


def test_tools_are_read_plain_wrapped_single_and_as_a_list():
    plain = json.loads(TOOL)
    texts = {
        text_of("llama3", talk("a", "b"), tools=tools)[0][0]
        for tools in (TOOL, plain, plain[0], [{"type": "function", "function": plain[0]}])
    }
    assert len(texts) == 1 and '"name": "weather"' in texts.pop()
    for bad in ("nope", "[1]", '[{"description": "no name"}]', "3"):
        with pytest.raises(ValueError, match="tools: "):
            text_of("llama3", talk("a", "b"), tools=bad)
    with pytest.raises(ValueError, match="unknown tool_format 'quen'.*did you mean 'qwen'"):
        text_of("llama3", talk("a", "b"), tool_format="quen")


def test_the_default_tool_format_takes_incomplete_tools():
    for tool in (
        {"name": "w"},
        {"name": "w", "parameters": {}},
        {"name": "w", "parameters": {"properties": {"c": {}}}},
        {"name": "w", "parameters": {"properties": {"c": {"enum": [1, 2], "items": {}}}}},
    ):
        assert (
            "> Tool Name: w\nTool Description: \n"
            in text_of("default", talk("a", "b"), tools=[tool])[0][0]
        )
    for parameters in ([1], {"properties": {"c": 1}}, {"properties": {"c": {"items": [1]}}}):
        with pytest.raises(ValueError, match="'w' are not a JSON schema"):
            text_of("default", talk("a", "b"), tools=[{"name": "w", "parameters": parameters}])


def test_text_before_a_call_is_refused_by_formats_without_a_place_for_it():
    with pytest.raises(ValueError, match="no text can stand before"):
        text_of("mistral", call("<think>\nx\n</think>\n\n" + CALL))
    assert text_of("mistral", call(CALL))[0][1].startswith("[TOOL_CALLS] [{")


@pytest.mark.parametrize("template", ["mistral_small", "ministral3"])
def test_text_before_a_call_of_newer_mistral_models(template):
    """As mistral-common encodes it from version 7 on: the text, then what opens the calls.

    LLaMA-Factory writes the text behind [TOOL_CALLS]; versions before 7 refuse it.
    """
    written = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]</s>'
    assert text_of(template, call(CALL))[0][1] == written
    assert text_of(template, call(f"hm <tool_call>{CALL}</tool_call>"))[0][1] == "hm " + written
    turns = [{"role": "user", "content": "a"},
             {"role": "function", "content": CALL, "lead": "Let me look."}]
    assert text_of(template, turns)[0][1] == "Let me look." + written
    for older in ("mistral", "ministral"):
        with pytest.raises(ValueError, match="Leave the text out of the row"):
            text_of(older, turns)
