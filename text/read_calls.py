"""Read an answer: the thought, the text, and the tool calls that a model has written.

    thought, text = split_answer("<think>\\nHm.\\n</think>\\n\\nYes.", template.thought)
    text, calls = find_calls(text, template.tool_format.name, text_arguments(tools))

The inverse of text/tool_calls.py: a row of READERS for each row of TOOL_FORMATS.

Requires: templates.py, text/tool_calls.py, text/read_markup.py.
Next: serving/answers.py.
Sources: as text/tool_calls.py.
"""
import json
import re
from functools import partial

from templates import Template
from text.json_text import parse, parse_first
from text.read_markup import (GLM4_MOE, MINIMAX2, QWEN3_5, SEED_OSS, Tools, read_gemma4, read_lfm2,
                              read_tags)
from text.tool_calls import Call, read_tools, to_json


class ThoughtSplitter:
    """Splits a growing answer into its thought and its text.

    push returns [("thought" | "text", piece), …]; the pieces of each kind, joined, are the thought
    without its marks and the text after it. A thought is at the beginning of an answer; marks
    elsewhere are text. Without a closing mark the whole answer is thought. An empty thought may be
    the closing mark alone, as in GLM-4.7, or the end of this mark: GPT-OSS's final channel.
    """

    def __init__(self, marks: tuple[str, str]):
        self.opens, self.closes = (mark.strip() for mark in marks)
        tag = re.match("<.*?>", self.opens)
        end = self.closes.rfind(tag[0]) if tag else -1
        self.empty = (self.closes, self.closes[end:]) if end > 0 else (self.closes,)
        self.state = "start" if self.opens else "text"
        self.held = ""              # not yet returned

    def push(self, piece: str) -> list[tuple[str, str]]:
        """Add text; returns what is now certain."""
        self.held += piece
        found = []
        if self.state == "start":
            begin = self.held.lstrip()
            if begin.startswith(self.opens):
                self.held = begin[len(self.opens):]
                self.state = "opened"
            elif mark := next(filter(begin.startswith, self.empty), ""):
                self.held = begin[len(mark):]
                self.state = "closed"
            elif not any(mark.startswith(begin) for mark in (self.opens, *self.empty)):
                self.state = "text"
        if self.state == "opened" and (rest := self.held.lstrip("\n")):
            self.held = rest
            self.state = "thought"
        if self.state == "thought":
            thought, mark, rest = self.held.partition(self.closes)
            if not mark:            # white space before the mark belongs to the mark
                sure = self.held[:len(self.held) - begun(self.held, self.closes)].rstrip("\n")
                self.held = self.held[len(sure):]
                return [("thought", sure)] if sure else []
            found.append(("thought", thought.rstrip("\n")))
            self.held = rest
            self.state = "closed"
        if self.state == "closed" and (rest := self.held.lstrip("\n")):
            self.held = rest
            self.state = "text"
        if self.state == "text":
            found.append(("text", self.held))
            self.held = ""
        return [(kind, text) for kind, text in found if text]

    def flush(self) -> list[tuple[str, str]]:
        """What is left at the end of the answer."""
        rest = self.held if self.state in ("start", "thought") else ""
        self.held = ""
        return [("thought" if self.state == "thought" else "text", rest)] if rest else []


def begun(text: str, mark: str) -> int:
    """Length of the longest end of `text` that a mark may begin with."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


def split_answer(text: str, marks: tuple[str, str]) -> tuple[str, str]:
    """(thought, text) of a whole answer."""
    splitter = ThoughtSplitter(marks)
    pieces = splitter.push(text) + splitter.flush()
    return tuple("".join(piece for kind, piece in pieces if kind == wanted)
                 for wanted in ("thought", "text"))


EXAMPLE_CALL = '{"name": "f", "arguments": {"x": "y"}}'


def marking_tokens(template: Template, tokenizer, tools: bool = True) -> frozenset[int]:
    """Ids of the special tokens that mark a thought or, with tools, a call.

    TextStream leaves other special tokens out of the text, and must keep these for the readers.
    """
    marked = [*template.thought]
    if tools:
        marked.append(template.tool_format.call(EXAMPLE_CALL, template))
    return frozenset(part for text in marked for part in tokenizer.split_at_special(text)
                     if isinstance(part, int))


# ---- tool calls ---------------------------------------------------------------------------------


def text_arguments(tools) -> Tools:
    """The tools that were offered: {name: its arguments that are declared as strings}.

    tools: as in a row or in a request, a JSON text or its content.
    """
    found = {}
    for tool in read_tools(tools):
        schema = tool["function"].get("parameters")
        properties = schema.get("properties") if isinstance(schema, dict) else None
        properties = properties if isinstance(properties, dict) else {}
        found[tool["function"]["name"]] = frozenset(
            name for name, about in properties.items()
            if isinstance(about, dict) and about.get("type") == "string")
    return found


def find_calls(text: str, format_name: str, tools: Tools) -> tuple[str, list[Call]]:
    """(the text before the calls, the calls) of an answer; (text, []) if it calls no tool.

    tools: that were offered, see text_arguments. Anything that is not a well-formed call of one of
    them is text, which the user can read.
    """
    try:
        before, calls = READERS[format_name](text, tools)
    except (ValueError, KeyError, TypeError):
        return text, []
    if not calls or any(name not in tools for name, _ in calls):
        return text, []
    return before.strip(), calls


def call_of(value: dict, key: str = "arguments") -> Call:
    """A call from its JSON; raises KeyError or TypeError for what is none."""
    if not isinstance(value["name"], str) or not isinstance(value[key], dict):
        raise TypeError
    return value["name"], to_json(value[key])


def calls_of(value, key: str = "arguments") -> list[Call]:
    """The calls of a JSON object, or of a list of them."""
    return [call_of(item, key) for item in (value if isinstance(value, list) else [value])]


def read_default(text: str, tools: Tools) -> tuple[str, list[Call]]:
    """Action: name, Action Input: JSON."""
    calls = []
    found = list(re.finditer(r"Action:[ \t]*(\S+)\s*Action Input:\s*", text))
    for match in found:
        value, _ = parse_first(text, match.end())
        calls.append(call_of({"name": match[1], "arguments": value}))
    return text[:found[0].start()] if found else text, calls


def read_llama3(text: str, tools: Tools) -> tuple[str, list[Call]]:
    return "", calls_of(parse(text.removeprefix("<|python_tag|>")), "parameters")


def read_mistral(text: str, tools: Tools) -> tuple[str, list[Call]]:
    before, mark, calls = text.rpartition("[TOOL_CALLS]")
    return before, calls_of(parse(calls))


def read_qwen(text: str, tools: Tools) -> tuple[str, list[Call]]:
    before, *bodies = re.split(r"<tool_call>", text)
    calls = []
    for body in bodies:
        calls += calls_of(parse(body.partition("</tool_call>")[0]))
    return before, calls


def read_glm4(text: str, tools: Tools) -> tuple[str, list[Call]]:
    name, _, arguments = text.strip().partition("\n")
    return "", [call_of({"name": name, "arguments": json.loads(arguments)})]


def read_minimax1(text: str, tools: Tools) -> tuple[str, list[Call]]:
    before, mark, rest = text.partition("<tool_calls>")
    if not mark:
        return text, []
    lines, _, after = rest.partition("</tool_calls>")
    if after.strip():
        raise ValueError("text after the calls")
    return before, [call_of(parse(line)) for line in lines.splitlines() if line.strip()]


READERS = {         # by the names of TOOL_FORMATS
    "default": read_default,
    "llama3": read_llama3,
    "mistral": read_mistral,
    "mistral_small": read_mistral,
    "qwen": read_qwen,
    "qwen3_5": partial(read_tags, QWEN3_5),
    "ling": read_qwen,
    "glm4": read_glm4,
    "glm4_moe": partial(read_tags, GLM4_MOE),
    "minimax1": read_minimax1,
    "minimax2": partial(read_tags, MINIMAX2),
    "lfm2": read_lfm2,
    "gemma4": read_gemma4,
    "seed_oss": partial(read_tags, SEED_OSS),
    "phi4_mini": read_default,
}
