"""Conversations, a tokenizer that shows what was rendered, and a small byte-level tokenizer.

Requires: templates.py, text/chat_formats.py.
"""
import functools
import json
from dataclasses import replace

from tokenizers import Tokenizer as Core, decoders, models, pre_tokenizers, trainers

from templates import Settings, render_turns
from tests.common import SHARED
from text.chat_formats import TEMPLATES
from text.conversations import TAGS
from text.fit_tokenizer import fit_tokenizer
from text.template_check import check_template
from text.tokenizer import load_tokenizer
from text.written_formats import with_overrides

CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TOOL = (
    '[{"name": "weather", "description": "d", '
    '"parameters": {"type": "object", "properties": {"city": {}}}}]'
)


def talk(*texts):
    """Messages of user, assistant, user, assistant, …"""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def call(text, answer="done"):
    """A user asks, the assistant calls a tool, gets its result and answers."""
    return [
        *talk("q"),
        {"role": "function", "content": text},
        {"role": "observation", "content": "r"},
        {"role": "assistant", "content": answer},
    ]


class TextTokenizer:
    """A tokenizer whose ids are texts, so that a test sees what was rendered."""

    bos_id, eos_id, unk_id, split_special_tokens = "<s>", "</s>", None, False

    def id_of(self, token):
        return token


def text_of(
    template,
    messages,
    system=None,
    tools=None,
    only_last=False,
    tool_format=None,
    default_system=None,
    **settings,
):
    """[(source text, target text), …] of each turn."""
    template = TEMPLATES[template] if isinstance(template, str) else template
    template = with_overrides(template, tool_format, default_system)
    turns = render_turns(template, TextTokenizer(), messages, system, tools, Settings(**settings),
                         only_last)
    return [("".join(source), "".join(target)) for source, target in turns]


@functools.lru_cache(None)
def fitted(template, tokenizer):
    """A recorded tokenizer with the special tokens of this template."""
    tokenizer = load_tokenizer(SHARED / "tokenizers" / tokenizer)
    fit_tokenizer(TEMPLATES[template], tokenizer)
    return tokenizer


def conversation(row, info):
    """A raw row -> (messages, system, tools)."""
    columns = info.get("columns") or {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
    }
    system, tools = row.get(columns.get("system")), row.get(columns.get("tools"))
    if "messages" not in columns:
        texts = [text for pair in row.get(columns.get("history")) or [] for text in pair]
        asked = "\n".join(filter(None, (row[columns["prompt"]], row.get(columns["query"]))))
        return talk(*texts, asked, row[columns["response"]]), system, tools
    tags = info.get("tags") or TAGS
    roles = {tag: key.removesuffix("_tag") for key, tag in tags.items()}
    messages = []
    for turn in row[columns["messages"]]:
        role, content = roles[turn[tags["role_tag"]]], turn[tags["content_tag"]]
        if turn.get("tool_calls"):
            role, content = "function", json.dumps([c["function"] for c in turn["tool_calls"]])
        if role == "system":
            system = content
        elif role == "observation" and messages[-1]["role"] == "observation":
            messages[-1]["content"] += "\n</tool_response>\n<tool_response>\n" + content
        else:
            messages.append({"role": role, "content": content})
    if info.get("formatting") == "openai":      # what LLaMA-Factory's converter adds
        system = "\n".join(filter(None, (system, not tools and "detailed thinking off")))
        system += "\n" * bool(system and tools)
    return messages, system, tools


def write_byte_level(folder, **config):
    """A small byte-level tokenizer, for tests without the recorded ones; returns its folder."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    core.train_from_iterator(["hello there hello world"] * 3, trainer)
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    eos_token = {"content": "</s>", "lstrip": False}
    config = {"bos_token": "<s>", "eos_token": eos_token, "pad_token": None, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>"
    "\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def checked(tmp_path, jinja, name="yi", **more):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = jinja
    return check_template(replace(TEMPLATES[name], **more), tokenizer)
