"""Read the tool calls that a model writes as tags: the inverse of text/tool_markup.py.

An argument that the tool declares as a string is kept as text. Any other is parsed as JSON, and
kept as text if that fails. The vendors' tags and LLaMA-Factory's shorter ones are both accepted.

Requires: text/tool_calls.py.
Next: text/read_calls.py (the table of all readers).
Sources: as text/tool_calls.py; the rule about types is vLLM's.
"""
import ast
import json
import re
from typing import NamedTuple

from text.json_text import parse
from text.tool_calls import Call, to_json
from text.tool_markup import QUOTE

Tools = dict[str, frozenset[str]]       # name of each tool -> its string arguments


class Tags(NamedTuple):
    """A format with tags. call and argument are regular expressions."""
    call: str                       # groups: the name, the arguments
    argument: str                   # groups: the key, the value
    around: tuple[str, ...] = ()    # optional texts around all calls


QWEN3_5 = Tags(
    call=r"<tool_call>\s*<function=\s*([^\s<>]+)\s*>(.*?)</function>\s*</tool_call>",
    argument=r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>")
GLM4_MOE = Tags(
    call=r"<tool_call>\s*([^\s<]+)(.*?)(?:</tool_call>|(?=<tool_call>)|$)",
    argument=r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>")
MINIMAX2 = Tags(
    call=r'<invoke name="([^"]+)">(.*?)</invoke>',
    argument=r'<parameter name="([^"]+)">(.*?)</parameter>',
    around=("<minimax:tool_call>", "</minimax:tool_call>"))
SEED_OSS = Tags(
    call=r"<seed:tool_call>\s*<function=\s*([^\s<>]+)(?:>|(?=[\s<]))"
         r"(.*?)</function>\s*</seed:tool_call>",
    argument=r"<parameter=([^>]+)>(.*?)</parameter>")


def read_tags(tags: Tags, text: str, tools: Tools) -> tuple[str, list[Call]]:
    """(the text before the calls, the calls). Raises ValueError for text after a call."""
    found = list(re.finditer(tags.call, text, re.DOTALL))
    if not found:
        return text, []
    start = found[0].start()
    before = text[:start].rstrip()
    rest = re.sub(tags.call, "", text[start:], flags=re.DOTALL)
    for mark in tags.around:
        before = before.removesuffix(mark)
        rest = rest.replace(mark, "")
    if rest.strip():
        raise ValueError("text between calls, or after them")
    return before, [call_in_tags(tags, match[1], match[2], tools) for match in found]


def call_in_tags(tags: Tags, name: str, body: str, tools: Tools) -> Call:
    """One call, from its name and its arguments in tags."""
    if re.sub(tags.argument, "", body, flags=re.DOTALL).strip():
        raise ValueError("text between arguments")
    arguments = {}
    for key, value in re.findall(tags.argument, body, re.DOTALL):
        arguments[key] = value if key in tools.get(name, ()) else json_or_text(value)
    return name, to_json(arguments)


def json_or_text(text: str):
    """The value of a JSON text, or the text itself."""
    try:
        value = parse(text)
        json.dumps(value, allow_nan=False)      # NaN is no JSON
        return value
    except ValueError:
        return text


# ---- LFM2: calls in Python ----------------------------------------------------------------------

# a quoted text, up to the next argument or the end of the call
QUOTED = r'(?<=[(\s])(\w+)="(.*?)"(?=, \w+=|\)(?:, [\w.]+\(|\]$))'
WORDS = {"true": True, "false": False, "null": None}      # JSON's names, which models write too


def read_lfm2(text: str, tools: Tools) -> tuple[str, list[Call]]:
    """[get_weather(city="Oslo", days=2), …] between marks."""
    before, mark, rest = text.partition("<|tool_call_start|>")
    if not mark:
        return text, []
    body, _, after = rest.partition("<|tool_call_end|>")
    if after.strip():
        raise ValueError("text after the calls")
    try:
        tree = parse_python(body.strip())
    except ValueError:      # an unescaped quote or a line break in a text
        tree = parse_python(re.sub(QUOTED, lambda match: f"{match[1]}={match[2]!r}", body.strip(),
                                   flags=re.DOTALL))
    return before, [call_of_node(node) for node in getattr(tree, "elts", [tree])]


def parse_python(text: str) -> ast.AST:
    """A Python expression. Raises ValueError."""
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python: {error}") from None


def call_of_node(node: ast.AST) -> Call:
    """A Python call with keyword arguments that are literals. Raises ValueError for others."""
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
        raise ValueError("not a call with named arguments")
    return node.func.id, to_json({pair.arg: value_of_node(pair.value) for pair in node.keywords})


def value_of_node(node: ast.AST):
    """The value of a literal of Python or JSON. Raises ValueError."""
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.List):
        return [value_of_node(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {value_of_node(key): value_of_node(value)
                for key, value in zip(node.keys, node.values)}
    return ast.literal_eval(node)


# ---- Gemma 4 ------------------------------------------------------------------------------------


def read_gemma4(text: str, tools: Tools) -> tuple[str, list[Call]]:
    """<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|> for each call."""
    pattern = r"<\|tool_call>call:([^{\s]+)(\{.*?\})<tool_call\|>"
    found = list(re.finditer(pattern, text, re.DOTALL))
    if not found:
        return text, []
    start = found[0].start()
    after = re.sub(pattern, "", text[start:], flags=re.DOTALL)
    if after.removesuffix("<tool|>").strip():
        raise ValueError("text between calls, or after them")
    calls = [(match[1], to_json(parse(json_of_gemma4(match[2])))) for match in found]
    return text[:start].removesuffix("<|tool>"), calls


def json_of_gemma4(text: str) -> str:
    """Gemma's notation as JSON: its quotes are <|"|>, and keys have none."""
    parts = text.split(QUOTE)
    for index, part in enumerate(parts):
        is_text = index % 2 == 1
        parts[index] = to_json(part) if is_text else re.sub(
            r"(?<=[{,])\s*([^\s{}\[\],:]+)\s*:", lambda match: to_json(match[1]) + ":", part)
    return "".join(parts)
