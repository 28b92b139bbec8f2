"""The table of tool formats: how each vendor describes tools and writes calls.

To add a format, write its two functions in text/tool_calls.py or text/tool_markup.py, a row here,
and a row of READERS in text/read_calls.py, which reads in an answer what `write_…` writes.

Requires: text/tool_calls.py, text/tool_markup.py.
Next: text/chat_formats.py.
"""
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from errors import unknown_name
from templates import Template, ToolFormat
from text.tool_calls import (Call, describe_default, describe_glm4, describe_ling, describe_llama3,
                             describe_minimax1, describe_mistral, describe_phi4_mini,
                             describe_qwen, describe_tools, render_call, to_json, write_default,
                             write_glm4, write_llama3, write_minimax1, write_mistral,
                             write_mistral_small, write_qwen)
from text.tool_markup import (describe_gemma4, describe_glm4_moe, describe_lfm2,
                              describe_minimax2, describe_qwen3_5, describe_seed_oss,
                              write_gemma4, write_glm4_moe, write_lfm2, write_minimax2,
                              write_qwen3_5, write_seed_oss)


def tool_format(name: str, describe: Callable[[list[dict]], str],
                write_calls: Callable[[list[Call]], str], after_lead: str = "\n") -> ToolFormat:
    """A row of the table. after_lead: text between the text of an answer and its calls."""
    return ToolFormat(name, partial(describe_tools, describe), partial(render_call, write_calls),
                      after_lead)


TOOL_FORMATS = {row.name: row for row in (
    tool_format("default", describe_default, write_default),
    tool_format("llama3", describe_llama3, write_llama3),
    tool_format("mistral", describe_mistral, write_mistral),
    tool_format("mistral_small", describe_mistral, write_mistral_small, after_lead=""),
    tool_format("qwen", describe_qwen, write_qwen),
    tool_format("qwen3_5", describe_qwen3_5, write_qwen3_5, after_lead="\n\n"),
    tool_format("ling", describe_ling, write_qwen),
    tool_format("glm4", describe_glm4, write_glm4),
    tool_format("glm4_moe", describe_glm4_moe, write_glm4_moe, after_lead=""),
    tool_format("minimax1", describe_minimax1, write_minimax1),
    tool_format("minimax2", describe_minimax2, write_minimax2),
    tool_format("lfm2", describe_lfm2, write_lfm2, after_lead=""),
    tool_format("gemma4", describe_gemma4, write_gemma4, after_lead=""),
    # these two write the items of the tools column unchanged
    ToolFormat("seed_oss", describe_seed_oss, partial(render_call, write_seed_oss), after_lead=""),
    ToolFormat("phi4_mini", describe_phi4_mini, partial(render_call, write_default)),
)}


def find_tool_format(name: str, where: str = "") -> ToolFormat:
    """The row of TOOL_FORMATS with this name. where: beginning of the ValueError's message."""
    if name not in TOOL_FORMATS:
        raise ValueError(f"{where}{unknown_name('tool_format', name, TOOL_FORMATS)}")
    return TOOL_FORMATS[name]


def with_tool_functions(template: Template) -> Template:
    """The template with the functions of its tool format, which templates.py only names."""
    return replace(template, tool_format=find_tool_format(template.tool_format.name))


ARGUMENT = "\ue000"     # placeholder for the arguments of a call, from Unicode's private use area


def call_frames(template: Template, names: list[str]) -> list[tuple[bytes, bytes]]:
    """[(text before the arguments of a call, text after them)] for each tool, as bytes.

    Raises ValueError if the template does not write arguments as JSON.
    """
    slots = template.function or template.assistant
    opens = "".join(slot for slot in slots if isinstance(slot, str)).partition("{{content}}")[0]
    frames = []
    for name in names:
        call = to_json({"name": name, "arguments": {ARGUMENT: 0}})
        try:
            before, mark, after = template.tool_format.call(call, template).partition(
                to_json({ARGUMENT: 0}))
        except ValueError:
            mark = ""
        if not mark:
            raise ValueError("the calls of this model's template are not JSON (tool_format "
                             f"{template.tool_format.name})")
        frames.append(((opens + before).lstrip().encode() + b"{", after.encode()))
    return frames
