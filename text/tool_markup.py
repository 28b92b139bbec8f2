"""Tool formats that write a tag, or a name, around each argument of a call.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>

A text is written unchanged, any other value as JSON. Qwen 3.5, GLM-4.5, MiniMax-M2, Seed-OSS, LFM2
and Gemma 4 use such formats. To give the same ids, tags that LLaMA-Factory leaves out are left out
here too: </tool_call> of GLM-4.5, > after the name of Seed-OSS, the tags around all calls of
MiniMax-M2.

Requires: text/tool_calls.py.
Next: text/tool_formats.py (the table), text/read_calls.py (the inverse).
Sources: as text/tool_calls.py.
"""
from functools import partial

from text.json_text import parse
from text.tool_calls import Call, list_tools, read_tools, shorten, to_json


def arguments_of(call: Call) -> dict:
    """The arguments of a call by name. Raises ValueError if they are not a JSON object."""
    name, text = call
    arguments = parse(text)
    if not isinstance(arguments, dict):
        raise ValueError(f"function call: the arguments of {name!r} must be an object, as "
                         f'{{"city": "Oslo"}}, in this tool format; found {shorten(text)}')
    return arguments


def text_of_value(value) -> str:
    """The value of an argument: a text unchanged, any other value as JSON."""
    return value if isinstance(value, str) else to_json(value)


def write_tags(calls: list[Call], start: str, argument: str, end: str) -> str:
    """Calls as text. start has a {} for the name, argument one for a key and one for its value."""
    texts = []
    for call in calls:
        texts.append(start.format(call[0]))
        for key, value in arguments_of(call).items():
            texts[-1] += argument.format(key, text_of_value(value))
        texts[-1] += end
    return "\n".join(texts)


def list_functions(tools: list[dict]) -> str:
    """The functions as JSON, each after a line break."""
    return "".join("\n" + to_json(tool["function"]) for tool in tools)


# ---- Qwen 3.5 -----------------------------------------------------------------------------------


def describe_qwen3_5(tools: list[dict]) -> str:
    return (
        "\n\n# Tools\n\nYou have access to the following functions:\n\n"
        f"<tools>{list_functions(tools)}\n</tools>\n\n"
        "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
        "<tool_call>\n<function=example_function_name>\n"
        "<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
        "<parameter=example_parameter_2>\nThis is the value for the second parameter\n"
        "that can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n"
        "<IMPORTANT>\nReminder:\n"
        "- Function calls MUST follow the specified format: an inner <function=...></function> "
        "block must be nested within <tool_call></tool_call> XML tags\n"
        "- Required parameters MUST be specified\n"
        "- You may provide optional reasoning for your function call in natural language BEFORE "
        "the function call, but NOT after\n"
        "- If there is no function call available, answer the question like normal with your "
        "current knowledge and do not tell the user about function calls\n</IMPORTANT>")


write_qwen3_5 = partial(
    write_tags, start="<tool_call>\n<function={}>",
    argument="\n<parameter={}>\n{}\n</parameter>", end="\n</function>\n</tool_call>")


# ---- GLM-4.5 to 4.7 -----------------------------------------------------------------------------


def describe_glm4_moe(tools: list[dict]) -> str:
    text = "".join("\n" + to_json(tool) for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>{text}\n</tools>\n\n"
        "For each function call, output the function name and arguments within the following XML "
        "format:\n<tool_call>{function-name}\n"
        "<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
        "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n"
        "</tool_call>\n")


# without </tool_call>, which GLM itself writes, to give LLaMA-Factory's ids
write_glm4_moe = partial(
    write_tags, start="\n<tool_call>{}",
    argument="\n<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>", end="")


# ---- MiniMax-M2 ---------------------------------------------------------------------------------


def describe_minimax2(tools: list[dict]) -> str:
    text = "".join(f"<tool>{to_json(tool['function'])}</tool>\n" for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\n"
        f"Here are the tools available in JSONSchema format:\n\n<tools>\n{text}</tools>\n\n"
        "When making tool calls, use XML format to invoke tools and pass parameters:\n\n"
        '<minimax:tool_call>\n<invoke name="tool-name-1">\n'
        '<parameter name="param-key-1">param-value-1</parameter>\n'
        '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n'
        "</minimax:tool_call>")


# without <minimax:tool_call> around the calls, to give LLaMA-Factory's ids
write_minimax2 = partial(
    write_tags, start='<invoke name="{}">', argument='\n<parameter name="{}">{}</parameter>',
    end="\n</invoke>")


# ---- Seed-OSS -----------------------------------------------------------------------------------


def describe_seed_oss(tools) -> str:
    """Writes the items of the tools column unchanged."""
    if not read_tools(tools):
        return ""
    return (
        "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to "
        "assist with the user query.Tool List:\nYou are authorized to use the following tools "
        "(described in JSON Schema format). Before performing any task, you must decide how to "
        "call them based on the descriptions and parameters of these tools.\n"
        f"{to_json(list_tools(tools))}\n"
        "工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n"
        "<parameter=example_parameter_1>value_1</parameter>\n"
        "<parameter=example_parameter_2>This is the value for the second parameter\n"
        "that can span\nmultiple lines</parameter>\n</function>\n</seed:tool_call>\n")


# without > after the name, which Seed-OSS itself writes, to give LLaMA-Factory's ids
write_seed_oss = partial(
    write_tags, start="\n<seed:tool_call>\n<function={}",
    argument="\n<parameter={}>{}</parameter>", end="\n</function>\n</seed:tool_call>")


# ---- LFM2: calls in Python ----------------------------------------------------------------------


def describe_lfm2(tools: list[dict]) -> str:
    listed = to_json([tool["function"] for tool in tools])
    return f"List of tools: <|tool_list_start|>{listed}<|tool_list_end|>"


def write_lfm2(calls: list[Call]) -> str:
    """Texts are written between quotes; a quote in a text is not escaped."""
    texts = []
    for call in calls:
        arguments = []
        for key, value in arguments_of(call).items():
            text = f'"{value}"' if isinstance(value, str) else to_json(value)
            arguments.append(f"{key}={text}")
        texts.append(f"{call[0]}({', '.join(arguments)})")
    return f"<|tool_call_start|>[{', '.join(texts)}]<|tool_call_end|>"


# ---- Gemma 4: a notation of its own, with <|"|> for a quote -------------------------------------


QUOTE = '<|"|>'


def describe_gemma4(tools: list[dict]) -> str:
    return "\n".join(declare_function(tool["function"]) for tool in tools)


def declare_function(function: dict) -> str:
    """declaration:name{description:…,parameters:{…},response:{…}}"""
    text = f"description:{quoted(function.get('description', ''))}"
    try:
        if schema := function.get("parameters"):
            text += f",parameters:{{{declare_schema(schema)}}}"
        if response := function.get("response"):
            if str(response.get("type")).upper() != "OBJECT":
                response = {**response, "type": None}       # only objects name their type
            text += f",response:{{{describe_field(response)}}}"
    except (AttributeError, TypeError) as error:
        raise ValueError(f"tools: the parameters of {function['name']!r} are not a JSON schema: "
                         f"{shorten(to_json(function))}") from error
    return f"declaration:{function['name']}{{{text}}}"


def declare_schema(schema: dict) -> str:
    """properties:{…},required:[…],type:… of a JSON schema."""
    parts = []
    if properties := schema.get("properties"):
        fields = [f"{name}:{{{describe_field(about)}}}" for name, about in properties.items()]
        parts.append(f"properties:{{{','.join(fields)}}}")
    if required := schema.get("required"):
        parts.append(f"required:[{','.join(map(quoted, required))}]")
    if kind := schema.get("type"):
        parts.append(f"type:{quoted(str(kind).upper())}")
    return ",".join(parts)


def describe_field(about: dict) -> str:
    """description:…,type:… of one parameter, as far as its schema has them."""
    parts = []
    if description := about.get("description"):
        parts.append(f"description:{quoted(description)}")
    if kind := about.get("type"):
        parts.append(f"type:{quoted(str(kind).upper())}")
    return ",".join(parts)


def write_gemma4(calls: list[Call]) -> str:
    text = ""
    for name, arguments in calls:
        value = parse(arguments)
        inner = value if isinstance(value, str) else write_gemma4_value(value)
        if isinstance(value, dict):
            inner = inner[1:-1]         # the call has its own braces
        text += f"<|tool_call>call:{name}{{{inner}}}<tool_call|>"
    return text


def write_gemma4_value(value) -> str:
    """A JSON value; keys of objects are sorted and not quoted."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        pairs = [f"{key}:{write_gemma4_value(value[key])}" for key in sorted(value)]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(write_gemma4_value, value)) + "]"
    return to_json(value)


def quoted(text) -> str:
    """A text between Gemma's quotes."""
    return f"{QUOTE}{text}{QUOTE}"
