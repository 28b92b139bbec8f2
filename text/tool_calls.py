"""Tools in a conversation: how they are described to the model, and how its calls are written.

A tool format is two functions: `describe_…` makes the text about the tools that is added to the
system text, and `write_…` the text of some calls. Here are the formats that write the arguments of
a call as JSON; text/tool_markup.py has those that write a tag around each argument.

Requires: templates.py.
Next: text/tool_markup.py, text/tool_formats.py (the table).
Sources: the vendors' chat templates, as published in their tokenizer_config.json; token ids
recorded from LLaMA-Factory.
"""
import datetime
import json
import re
from collections.abc import Callable

from templates import Template, check_lead, split_thought

Call = tuple[str, str]      # name of the function, its arguments as JSON text
CALL_MARKS = (("<tool_call>", "</tool_call>"), ("<|tool_call_start|>", "<|tool_call_end|>"))


# ---- read: what a row says about tools and calls ------------------------------------------------


def describe_tools(describe: Callable[[list[dict]], str], tools) -> str:
    """Read a tools column and describe it; "" where it is empty."""
    listed = read_tools(tools)
    return describe(listed) if listed else ""


def read_tools(tools) -> list[dict]:
    """Read a tools column, a JSON list of functions, and wrap each of them as OpenAI does."""
    return [wrap_tool(tool) for tool in list_tools(tools)]


def list_tools(tools) -> list:
    """Read a tools column as a list, without looking at its items."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools: not JSON ({error}): {shorten(tools)}") from error
    tools = [tools] if isinstance(tools, dict) and tools else tools or []
    return tools if isinstance(tools, list) else [tools]


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
    <tool_call>...</tool_call> or LFM2's <|tool_call_start|>...<|tool_call_end|>. thought: what
    opens and closes a thought.
    """
    before, thought_text, rest = split_thought(text, thought)
    lead = before + thought_text
    if thought_text:
        lead += rest[:len(rest) - len(rest.lstrip())]
        rest = rest.lstrip()
    calls = []
    bodies = []
    if marks := next((marks for marks in CALL_MARKS if marks[0] in rest), None):
        opens, closes = map(re.escape, marks)
        before, *parts = re.split(f"{opens}(.*?){closes}", rest, flags=re.DOTALL)
        bodies, after = parts[0::2], parts[1::2]
        if "".join(after).strip():
            raise ValueError(f"function call: text after {marks[1]}: {shorten(text)}")
        lead += before if bodies else ""
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


def describe_ling(tools: list[dict]) -> str:
    return describe_qwen(tools).removeprefix("\n\n") + "\ndetailed thinking off"


def describe_minimax1(tools: list[dict]) -> str:
    text = "".join(to_json(tool["function"]) + "\n" for tool in tools)
    return (
        f"You are provided with these tools:\n<tools>\n{text}</tools>\n\n"
        "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and "
        "provide tool-name and json-object of arguments, following the format below:\n"
        '<tool_calls>\n{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n'
        "</tool_calls>")


def write_minimax1(calls: list[Call]) -> str:
    lines = "\n".join(map(write_json_call, calls))
    return f"<tool_calls>\n{lines}\n</tool_calls>"


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


def to_json(value, indent: int | None = None) -> str:
    """JSON text with characters of all languages unescaped."""
    return json.dumps(value, indent=indent, ensure_ascii=False)


def shorten(text: str, width: int = 120) -> str:
    """A text for an error message: one line, of at most `width` characters."""
    return repr(text if len(text) <= width else text[:width] + "…")
