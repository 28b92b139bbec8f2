"""Tools in a conversation: how a chat format describes them to the model, and how the model's calls are written.

A tool format is a row of TOOL_FORMATS, a pair of functions: one gives the text about the tools that is added to the
system text, the other the text of a call. templates.py names the row each chat format uses (`tool_format`).

Read before: nothing. Read next: templates.py.
Sources: the vendors' chat templates in their published tokenizer_config.json; recorded ids of LLaMA-Factory.
"""
import datetime
import json
import re
from dataclasses import dataclass


def describe_tools(tool_format, tools):
    """The text about the tools in a row's tools column. tool_format: a row of TOOL_FORMATS."""
    listed, row = read_tools(tools), TOOL_FORMATS[tool_format]
    if row.as_written:
        return row.describe(tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False))
    return row.describe(listed) if listed else ""


def read_tools(tools):
    """The tools column: a JSON list of functions, plain or wrapped as OpenAI does. -> list of wrapped ones."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools: not JSON ({error}): {shorten(tools)}") from error
    tools = [tools] if isinstance(tools, dict) and tools else tools or []
    wrapped = []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'tools: expected {{"name": ..., "description": ..., "parameters": ...}}, '
                             f"found {shorten(json.dumps(tool, ensure_ascii=False))}")
        wrapped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return wrapped


def render_call(template, text):
    """A function message, JSON with maybe a thought before it, as the model of this chat format writes it."""
    lead, calls = read_call(text, template.thought)
    if lead and template.function and not template.function[0].startswith("{{content}}"):
        raise ValueError(f"function call: this format opens a call with {template.function[0]!r}, so no text can stand "
                         f"before the JSON: {shorten(text)}")
    return lead + TOOL_FORMATS[template.tool_format].call(calls)


def read_call(text, thought):
    """-> (text before the call, list of (name, arguments as JSON text)).

    The call is {"name": ..., "arguments": ...} or a list of these, or each stands inside <tool_call>...</tool_call>.
    """
    opens, closes = (re.escape(word.strip()) for word in thought)
    lead = re.match(f"({opens}.*?{closes}\\s*)?", text, re.DOTALL).group()
    rest = text[len(lead):]
    bodies = re.findall("<tool_call>(.*?)</tool_call>", rest, re.DOTALL)
    if bodies:
        before, *after = re.split("<tool_call>.*?</tool_call>", rest, flags=re.DOTALL)
        if "".join(after).strip():
            raise ValueError(f"function call: text after </tool_call>: {shorten(text)}")
        lead += before
    calls = []
    for body in bodies or [rest]:
        try:
            found = json.loads(body)
        except ValueError as error:
            raise ValueError(f"function call: not JSON ({error}): {shorten(text)}. Expected "
                             '{"name": ..., "arguments": {...}} or a list of these') from error
        calls += found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            raise ValueError(f'function call: expected {{"name": ..., "arguments": ...}}, '
                             f"found {shorten(json.dumps(call, ensure_ascii=False))}")
    if not calls:
        raise ValueError("function call: an empty list; a function message calls at least one tool")
    return lead, [(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]


# Below, a pair of functions for each row of TOOL_FORMATS: describe_… gives the text about the tools that is added to
# the system text, call_… the text of a call, from what read_tools and read_call have found.


def describe_default(tools):
    functions = [tool["function"] for tool in tools]
    text = "".join(f"> Tool Name: {function['name']}\nTool Description: {function.get('description') or ''}\n"
                   f"Tool Args:\n{describe_parameters(function)}\n" for function in functions)
    return (f"You have access to the following tools:\n{text}Use the following format if using a tool:\n```\n"
            f"Action: tool name (one of [{', '.join(function['name'] for function in functions)}])\n"
            "Action Input: the input to the tool, in a JSON format representing the kwargs "
            '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n')


def describe_parameters(function):
    """A line for each parameter of a function, from its JSON schema."""
    lines = ""
    try:
        schema = function.get("parameters") or {}
        for name, about in (schema.get("properties") or {}).items():
            required = ", required" if name in (schema.get("required") or ()) else ""
            choices, items = about.get("enum"), (about.get("items") or {}).get("type")
            lines += f"  - {name} ({about.get('type', '')}{required}): {about.get('description') or ''}"
            lines += f", should be one of [{', '.join(map(str, choices))}]" if choices else ""
            lines += f", where each item should be {items}\n" if items else "\n"
    except (AttributeError, TypeError) as error:
        raise ValueError(f"tools: the parameters of {function['name']!r} are not a JSON schema: "
                         f"{shorten(json.dumps(function, ensure_ascii=False))}") from error
    return lines


def call_default(calls):
    return "\n".join(f"Action: {name}\nAction Input: {arguments}" for name, arguments in calls)


def describe_llama3(tools):
    text = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    return (
        f"Cutting Knowledge Date: December 2023\nToday Date: {today()}\n\n"
        "You have access to the following functions. To call a function, please respond with JSON for a function call. "
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
        f"Do not use variables.\n\n{text}")


def today():
    """The llama3 format tells the model the day, so the same rows give other ids tomorrow (LLaMA-Factory's do too)."""
    return datetime.date.today().strftime("%d %b %Y")


def call_llama3(calls):
    texts = [call_json(call, "parameters") for call in calls]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def describe_mistral(tools):
    return f"[AVAILABLE_TOOLS] {json.dumps(tools, ensure_ascii=False)}[/AVAILABLE_TOOLS]"


def call_mistral(calls):
    return f"[{', '.join(map(call_json, calls))}]"


def call_json(call, key="arguments"):
    name, arguments = call
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


def describe_qwen(tools):
    text = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{text}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


def call_qwen(calls):
    return "\n".join(f"<tool_call>\n{call_json(call)}\n</tool_call>" for call in calls)


def describe_glm4(tools):
    functions = [tool["function"] for tool in tools]
    text = "".join(f"\n\n## {function['name']}\n\n{json.dumps(function, indent=4, ensure_ascii=False)}\n"
                   "在调用上述函数时，请使用 Json 格式表示调用的参数。" for function in functions)
    return (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的"
        f"问题和要求提供适当的答复和支持。\n\n# 可用工具{text}")


def call_glm4(calls):
    if len(calls) > 1:
        raise ValueError(f"function call: {len(calls)} calls at once; the glm4 format can write only one a turn")
    return "{}\n{}".format(*calls[0])


def describe_phi4_mini(text):
    return f"<|tool|>{text}<|/tool|>"


@dataclass(frozen=True)
class ToolFormat:
    """describe(tools) -> text added to the system text; call(calls) -> text of a tool call."""

    describe: object
    call: object
    as_written: bool = False  # describe gets the JSON text as it stands in the row


TOOL_FORMATS = {
    "default": ToolFormat(describe_default, call_default),
    "llama3": ToolFormat(describe_llama3, call_llama3),
    "mistral": ToolFormat(describe_mistral, call_mistral),
    "qwen": ToolFormat(describe_qwen, call_qwen),
    "glm4": ToolFormat(describe_glm4, call_glm4),
    "phi4_mini": ToolFormat(describe_phi4_mini, call_default, as_written=True),
}


def shorten(text, width=120):
    """A text for an error message: one line, not too long."""
    return repr(text if len(text) <= width else text[:width] + "…")
