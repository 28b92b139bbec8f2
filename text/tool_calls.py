"""Tools in a conversation: how they are described to the model, and how its calls are written.

Each row of TOOL_FORMATS is the format of one vendor. A Template holds one of them; its `describe`
makes the text that is added to the system text, and its `call` the text of a call.

Requires: templates.py.
Next: text/chat_formats.py.
Sources: the vendors' chat templates, as published in their tokenizer_config.json; token ids
recorded from LLaMA-Factory.
"""
import datetime
import json
import re
from collections.abc import Callable
from functools import partial

from templates import Template, ToolFormat, check_lead, split_thought

Call = tuple[str, str]      # name of the function, its arguments as JSON text


# ---- read: what a row says about tools and calls ------------------------------------------------


def describe_tools(describe: Callable[[list[dict]], str], tools) -> str:
    """Read a tools column and describe it; "" where it is empty."""
    listed = read_tools(tools)
    return describe(listed) if listed else ""


def read_tools(tools) -> list[dict]:
    """Read a tools column, a JSON list of functions, and wrap each of them as OpenAI does."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools: not JSON ({error}): {shorten(tools)}") from error
    tools = [tools] if isinstance(tools, dict) and tools else tools or []
    return [wrap_tool(tool) for tool in (tools if isinstance(tools, list) else [tools])]


def wrap_tool(tool) -> dict:
    """One tool as {"type": "function", "function": {...}}."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError('tools: expected {"name": ..., "description": ..., "parameters": ...}, '
                         f"found {shorten(to_json(tool))}")
    return tool if "function" in tool else {"type": "function", "function": tool}


def render_call(write_calls: Callable[[list[Call]], str], text: str, template: Template) -> str:
    """Rewrite a function message in the format of a model.

    text: JSON, maybe after a thought, as read_call takes it.
    """
    lead, calls = read_call(text, template.thought)
    check_lead(template, lead, text[len(lead):])
    return lead + write_calls(calls)


def read_call(text: str, thought: tuple[str, str]) -> tuple[str, list[Call]]:
    """Read a function message: (text before the calls, the calls).

    Calls are {"name": ..., "arguments": ...} or a list of these, or each is inside
    <tool_call>...</tool_call>. thought: what opens and closes a thought.
    """
    before, thought_text, rest = split_thought(text, thought)
    lead = before + thought_text
    if thought_text:
        lead += rest[:len(rest) - len(rest.lstrip())]
        rest = rest.lstrip()
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
    if not calls:
        raise ValueError("function call: an empty list; a function message calls at least one tool")
    return lead, [check_call(call) for call in calls]


def check_call(call) -> Call:
    """One call as (name, arguments)."""
    if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
        raise ValueError('function call: expected {"name": ..., "arguments": ...}, '
                         f"found {shorten(to_json(call))}")
    return call["name"], to_json(call["arguments"])


# ---- write: for each row, the text about the tools and the text of calls ------------------------


def describe_default(tools: list[dict]) -> str:
    functions = [tool["function"] for tool in tools]
    text = ""
    for function in functions:
        text += f"> Tool Name: {function['name']}\n"
        text += f"Tool Description: {function.get('description') or ''}\n"
        text += f"Tool Args:\n{describe_parameters(function)}\n"
    names = ", ".join(function["name"] for function in functions)
    return (
        f"You have access to the following tools:\n{text}"
        "Use the following format if using a tool:\n```\n"
        f"Action: tool name (one of [{names}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n')


def describe_parameters(function: dict) -> str:
    """A line for each parameter of a function, from its JSON schema."""
    try:
        schema = function.get("parameters") or {}
        required = schema.get("required") or ()
        properties = schema.get("properties") or {}
        return "".join(describe_parameter(name, about, name in required)
                       for name, about in properties.items())
    except (AttributeError, TypeError) as error:
        raise ValueError(f"tools: the parameters of {function['name']!r} are not a JSON schema: "
                         f"{shorten(to_json(function))}") from error


def describe_parameter(name: str, about: dict, required: bool) -> str:
    kind = f"{about.get('type', '')}{', required' if required else ''}"
    line = f"  - {name} ({kind}): {about.get('description') or ''}"
    if choices := about.get("enum"):
        line += f", should be one of [{', '.join(map(str, choices))}]"
    if items := (about.get("items") or {}).get("type"):
        line += f", where each item should be {items}"
    return line + "\n"


def write_default(calls: list[Call]) -> str:
    return "\n".join(f"Action: {name}\nAction Input: {arguments}" for name, arguments in calls)


def describe_llama3(tools: list[dict]) -> str:
    text = "".join(to_json(tool, indent=4) + "\n\n" for tool in tools)
    return (
        f"Cutting Knowledge Date: December 2023\nToday Date: {today()}\n\n"
        "You have access to the following functions. To call a function, please respond with JSON "
        "for a function call. Respond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}. '
        f"Do not use variables.\n\n{text}")


def today() -> str:
    """The date in the llama3 format: the ids of a row change every day, as LLaMA-Factory's do."""
    return datetime.date.today().strftime("%d %b %Y")


def write_llama3(calls: list[Call]) -> str:
    texts = [write_json_call(call, "parameters") for call in calls]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def describe_mistral(tools: list[dict]) -> str:
    return f"[AVAILABLE_TOOLS] {to_json(tools)}[/AVAILABLE_TOOLS]"


def write_mistral(calls: list[Call]) -> str:
    return f"[{', '.join(map(write_json_call, calls))}]"


def write_mistral_small(calls: list[Call]) -> str:
    """With what opens the calls: a text stands before it, from version 7 of the tokenizer on."""
    return f"[TOOL_CALLS]{write_mistral(calls)}"


def write_json_call(call: Call, key: str = "arguments") -> str:
    name, arguments = call
    return f'{{"name": {to_json(name)}, "{key}": {arguments}}}'


def describe_qwen(tools: list[dict]) -> str:
    text = "".join("\n" + to_json(tool) for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>{text}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


def write_qwen(calls: list[Call]) -> str:
    return "\n".join(f"<tool_call>\n{write_json_call(call)}\n</tool_call>" for call in calls)


def describe_glm4(tools: list[dict]) -> str:
    text = ""
    for tool in tools:
        function = tool["function"]
        text += f"\n\n## {function['name']}\n\n{to_json(function, indent=4)}\n"
        text += "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    return (
        "你是一个名为 ChatGLM 的人工智能助手。"
        "你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        f"你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具{text}")


def write_glm4(calls: list[Call]) -> str:
    if len(calls) > 1:
        raise ValueError(f"function call: {len(calls)} calls at once; the glm4 format can write "
                         "only one a turn")
    name, arguments = calls[0]
    return f"{name}\n{arguments}"


def describe_phi4_mini(tools) -> str:
    """Takes the tools column itself: its JSON text is used unchanged."""
    read_tools(tools)
    text = tools if isinstance(tools, str) else to_json(tools)
    return f"<|tool|>{text}<|/tool|>"


# ---- the table ----------------------------------------------------------------------------------


def tool_format(name: str, describe: Callable[[list[dict]], str],
                write_calls: Callable[[list[Call]], str], after_lead: str = "\n") -> ToolFormat:
    """A row of the table, from two of the functions above."""
    return ToolFormat(name, partial(describe_tools, describe), partial(render_call, write_calls),
                      after_lead)


TOOL_FORMATS = {row.name: row for row in (
    tool_format("default", describe_default, write_default),
    tool_format("llama3", describe_llama3, write_llama3),
    tool_format("mistral", describe_mistral, write_mistral),
    tool_format("mistral_small", describe_mistral, write_mistral_small, after_lead=""),
    tool_format("qwen", describe_qwen, write_qwen),
    tool_format("glm4", describe_glm4, write_glm4),
    ToolFormat("phi4_mini", describe_phi4_mini, partial(render_call, write_default)),
)}


def to_json(value, indent: int | None = None) -> str:
    """JSON text with characters of all languages unescaped."""
    return json.dumps(value, indent=indent, ensure_ascii=False)


def shorten(text: str, width: int = 120) -> str:
    """A text for an error message: one line, of at most `width` characters."""
    return repr(text if len(text) <= width else text[:width] + "…")
