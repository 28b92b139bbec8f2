"""Chat templates: how a conversation becomes text, and which part of it carries loss.

    python -m text.template_check llama3        a conversation in the format of Llama 3

A language model reads one row of tokens. A chat template says what is written around the texts of a
conversation, so that the model can tell who speaks. With `llama3`, a question and its answer become

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>

    What is 2 + 3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    2 + 3 = 5.<|eot_id|>

The answer and the token that ends it are the target: they carry loss. Everything before them is the
source, which the model only reads. This file holds the five usual formats, turns a conversation
into (source, target) pairs, and encodes them. data.py makes labels from the pairs.

A conversation is a list of messages {"role": ..., "content": ...}. A "user" or an "observation"
(what a tool returned) is answered by an "assistant" or a "function" (a tool call, as JSON). An
answer may also have a "thought", and a call a "lead": what is said before it.

Requires: errors.py.
Next: data.py, text/chat_formats.py (the other formats, and how to write one in a config file).
Sources: the vendors' chat templates, as published in their tokenizer_config.json; the borders of
slots follow LLaMA-Factory 0.9.5, whose recorded token ids the tests reproduce.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from errors import unknown_name


# ---- a chat format ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A slot that is one id: the special token of this name."""
    name: str

    def __str__(self):
        return f"[{self.name}]"


BOS = Token("bos")      # whichever token the tokenizer names as its bos
EOS = Token("eos")

Slot = str | Token      # a text, where {{content}} stands for the message; or a single id
Pieces = list[str | int]        # a text to be encoded on its own, or an id


def no_tools(*_):
    """The functions of a ToolFormat until text/chat_formats.py sets them."""
    raise ValueError("this template cannot write tools: take it from text.chat_formats.TEMPLATES")


@dataclass(frozen=True)
class ToolFormat:
    """How a template describes tools and writes tool calls: a row of text/tool_formats.py."""
    name: str
    describe: Callable = field(default=no_tools, compare=False, repr=False)  # tools -> text
    call: Callable = field(default=no_tools, compare=False, repr=False)  # JSON, Template -> text
    after_lead: str = field(default="\n", compare=False, repr=False)     # before the call


@dataclass(frozen=True)
class Template:
    """One chat format. All fields but `user` are optional.

    A turn is a tuple of slots. Each text is encoded on its own, so that no token ever reaches from
    one slot into the next.
    """
    user: tuple[Slot, ...]                      # up to where the answer begins
    assistant: tuple[Slot, ...] = ("{{content}}", EOS)      # the answer and its end; carries loss
    system: tuple[Slot, ...] = ("{{content}}",)
    observation: tuple[Slot, ...] | None = None     # what a tool returned; None: as `user`
    function: tuple[Slot, ...] | None = None        # a tool call; None: as `assistant`
    prefix: tuple[Slot, ...] = ()               # once, at the beginning
    default_system: str = ""                    # for conversations without a system text
    tool_format: ToolFormat = ToolFormat("default")
    stop: tuple[str, ...] = ()                  # tokens that end an answer, besides eos
    stop_is_eos: bool = False                   # stop[0] becomes the tokenizer's eos
    system_in_user: bool = False                # the system text opens the first user message
    efficient_eos: bool = False                 # no eos is written: data.py puts it into the labels
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")      # around a thought
    empty_thought: str = ""                     # an empty thought; "": the two marks of `thought`
    reasoning: bool = False                     # every answer begins with a thought, maybe empty
    own_jinja: bool = False                     # replaces the chat template of the checkpoint

    # how text/template_check.py recognizes the models that use this format
    families: tuple[str, ...] = ()              # model_type in config.json; (): any
    needs: tuple[str, ...] = ()                 # special tokens the tokenizer must have
    says: tuple[str, ...] = ()                  # texts in the chat template of the checkpoint
    name: str = ""


# ---- the five usual formats ---------------------------------------------------------------------


CHATML = Template(      # OpenAI, 2023; many fine-tunes of other models
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    assistant=("{{content}}<|im_end|>\n",),
    observation=("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    stop=("<|im_end|>", "<|im_start|>"),
    stop_is_eos=True,
    own_jinja=True,
    needs=("<|im_start|>", "<|im_end|>"),
    says=("<|im_start|>",),
)

LLAMA3 = Template(      # Llama 3, 3.1, 3.2, 3.3
    prefix=(BOS,),
    system=("<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",),
    user=("<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n",),
    assistant=("{{content}}<|eot_id|>",),
    observation=("<|start_header_id|>ipython<|end_header_id|>\n\n{{content}}<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n",),
    tool_format=ToolFormat("llama3"),
    stop=("<|eot_id|>", "<|eom_id|>"),
    stop_is_eos=True,
    families=("llama",),
    needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    says=("<|start_header_id|>",),
)

QWEN = Template(        # Qwen 1.5, 2, 2.5: ChatML with a default system text and tools
    system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
    user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    assistant=("{{content}}<|im_end|>\n",),
    observation=("<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n"
                 "<|im_start|>assistant\n",),
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    tool_format=ToolFormat("qwen"),
    stop=("<|im_end|>",),
    stop_is_eos=True,
    families=("qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    needs=("<|im_start|>", "<|im_end|>"),
    says=("<|im_start|>",),
)

MISTRAL = Template(     # Mistral 7B v0.1 to v0.3, Mixtral
    prefix=(BOS,),
    system=("{{content}}\n\n",),
    system_in_user=True,
    user=("[INST] {{content}}[/INST]",),
    assistant=(" {{content}}", EOS),
    function=("[TOOL_CALLS] {{content}}", EOS),
    observation=('[TOOL_RESULTS] {"content": {{content}}}[/TOOL_RESULTS]',),
    tool_format=ToolFormat("mistral"),
    families=("mistral", "mixtral"),
    needs=("<s>", "</s>"),
    says=("[INST] ",),
)

GEMMA = Template(       # Gemma 1
    prefix=(BOS,),
    system=("{{content}}\n\n",),
    system_in_user=True,
    user=("<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
    assistant=("{{content}}<end_of_turn>\n",),
    observation=("<start_of_turn>tool\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
    stop=("<end_of_turn>",),
    stop_is_eos=True,
    families=("gemma", "gemma2"),
    needs=("<start_of_turn>", "<end_of_turn>"),
    says=("<start_of_turn>",),
)


# ---- render: a conversation -> pieces -----------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The keys of the config that decide which answers and thoughts are rendered, and where."""
    enable_thinking: bool | None = True         # reasoning templates only: see settle_thought
    preserve_thinking: bool = False
    mask_history: bool = False


def render_turns(template: Template, tokenizer, messages: list[dict], system: str | None = None,
                 tools=None, settings: Settings = Settings(),
                 only_last: bool = False) -> list[tuple[Pieces, Pieces]]:
    """Render a conversation as one (source, target) for each pair of messages.

    messages: user or observation, assistant or function, in turn; an even number. tools: a JSON
    text, or its content. only_last: only the last answer is a target. Raises ValueError for a role,
    a tool call or a tool description that cannot be read.
    """
    assert messages and len(messages) % 2 == 0, f"{len(messages)} messages are not pairs"
    opening, system_text = render_opening(template, tokenizer, system, tools)
    if system_text and messages[0]["role"] != "user":
        raise ValueError("this format puts the system text into the first user message, but the "
                         f"conversation begins with {messages[0]['role']!r}. Leave the system text "
                         "out, or begin with a user message")
    turns = []
    for i in range(0, len(messages), 2):
        question, answer = messages[i:i + 2]
        source = render_source(template, tokenizer, question, i // 2, system_text)
        if i == 0:
            source = opening + source
            system_text = ""

        is_last = i + 2 == len(messages)
        text, empty_thought = settle_thought(template, answer, is_last, only_last, settings)
        target = render_target(template, tokenizer, answer, text)
        if empty_thought and settings.enable_thinking:
            target = [empty_thought] + target
        elif empty_thought:
            source = source + [empty_thought]
        turns.append((source, target))
    return turns


def render_opening(template: Template, tokenizer, system: str | None,
                   tools) -> tuple[Pieces, str]:
    """Render what precedes the first turn: (pieces, text to begin the first user message with)."""
    opening = fill_slots(template.prefix, tokenizer)
    system = system or template.default_system
    if tools:
        system += template.tool_format.describe(tools)
    elif not system:
        return opening, ""
    if template.system_in_user:
        return opening, template.system[0].replace("{{content}}", system, 1)
    return opening + fill_slots(template.system, tokenizer, system), ""


def render_source(template: Template, tokenizer, message: dict, number: int,
                  system_text: str) -> Pieces:
    """Render the message of a user or a tool, up to where the answer begins."""
    slots = turn_slots(template, message["role"])
    text = system_text + message["content"]
    # {{idx}} is the number of the turn, even if a user typed it, as in LLaMA-Factory
    with_number = message["role"] == "user" and not template.system_in_user
    return fill_slots(slots, tokenizer, text, str(number) if with_number else None)


def render_target(template: Template, tokenizer, answer: dict, text: str) -> Pieces:
    """Render an answer or a tool call, with what ends it. text: see settle_thought."""
    if answer["role"] == "function":
        if "lead" in answer:
            check_lead(template, text, answer["content"])
            text += template.tool_format.call(answer["content"], template)
        else:
            text = template.tool_format.call(text, template)
    return fill_slots(turn_slots(template, answer["role"]), tokenizer, text)


def check_lead(template: Template, lead: str, call: str):
    """Raise ValueError for a text before a tool call, where the format has no room for it."""
    opens = str(template.function[0]) if template.function else "{{content}}"
    # in reasoning formats a thought precedes the call, also behind what opens the call
    if lead and not opens.startswith("{{content}}") and not template.reasoning:
        raise ValueError(f"function call: this format opens a call with {opens!r}, "
                         f"so no text can stand before it: {lead[:60]!r}, before {call[:60]!r}. "
                         "Leave the text out of the row, or make it an answer and the call a turn "
                         "after the next question")


def turn_slots(template: Template, role: str) -> tuple[Slot, ...]:
    """The slots for a message of this role."""
    slots = {
        "user": template.user,
        "observation": template.observation or template.user,
        "assistant": template.assistant,
        "function": template.function or template.assistant,
    }
    if role not in slots:
        raise ValueError(unknown_name("role", role, slots))
    return slots[role]


def fill_slots(slots: tuple[Slot, ...], tokenizer, content: str = "",
               number: str | None = None) -> Pieces:
    """Put a text into slots."""
    pieces = []
    for slot in slots:
        if isinstance(slot, Token):
            pieces.append(slot_id(tokenizer, slot))
            continue
        # special tokens of the template stay ids even if special tokens in the text are split
        parts = tokenizer.split_at_special(slot) if tokenizer.split_special_tokens else [slot]
        for part in parts:
            if isinstance(part, str):
                part = part.replace("{{content}}", content, 1)
                part = part if number is None else part.replace("{{idx}}", number, 1)
            pieces.append(part)
    return [piece for piece in pieces if piece is not None and piece != ""]


def slot_id(tokenizer, token: Token) -> int | None:
    """The id of a slot; None for the bos of a tokenizer without one (Qwen's)."""
    if token == BOS:
        return tokenizer.bos_id
    if token == EOS:
        return tokenizer.eos_id
    found = tokenizer.id_of(token.name)
    found = tokenizer.unk_id if found is None else found
    if found is None:
        raise ValueError(f"the template uses the token {token.name!r}, which this tokenizer lacks "
                         f"({tokenizer.name})")
    return found


def settle_thought(template: Template, answer: dict, is_last: bool, only_last: bool,
                   settings: Settings) -> tuple[str, str]:
    """Apply the thinking rules to an answer: (its text with its thought, empty thought or "").

    Of a tool call with a "lead", the text is what stands before the call.

    enable_thinking true:  an answer without a thought gets an empty one, as part of the target.
                    null:  the same, as part of the source.
                    false: thoughts are removed from all answers first, then as null.
    Thoughts of earlier answers are removed where only the last answer is a target (only_last,
    mask_history), as the vendors do in chat, unless preserve_thinking is set. These rules are those
    of reasoning templates; others write what the row has.
    """
    before, thought, after = find_thought(template, answer)
    drop_history = (only_last or settings.mask_history) and not settings.preserve_thinking
    drop_all = settings.enable_thinking is False and (is_last or not only_last)
    text = before + thought + after
    if template.reasoning and (drop_all or drop_history and not is_last):
        text = (before + after).lstrip("\n")
    if "lead" in answer and after:
        text += template.tool_format.after_lead

    # an answer that mentions the marks gets no empty thought, as in LLaMA-Factory
    written = text + answer["content"] if "lead" in answer else text
    has_none = not any(mark.strip() in written for mark in template.thought)
    needs_one = template.reasoning and (is_last or not (only_last or drop_history))
    empty_thought = template.empty_thought or "".join(template.thought)
    return text, empty_thought if has_none and needs_one else ""


def find_thought(template: Template, answer: dict) -> tuple[str, str, str]:
    """Split an answer as split_thought does; its thought may also have a key of its own."""
    text = answer.get("lead", answer["content"])
    before, thought, after = split_thought(text, template.thought)
    if not answer.get("thought"):
        return before, thought, after
    if thought:
        raise ValueError("an answer has two thoughts, one in a key of its own and one at the "
                         f"beginning of its text: {text[:60]!r}. Leave one of them out")
    opens, closes = template.thought
    return "", opens + answer["thought"].strip("\n") + closes, text.lstrip("\n")


def split_thought(text: str, marks: tuple[str, str]) -> tuple[str, str, str]:
    """Split an answer into (white space, its thought with both marks or "", the rest).

    marks: what opens and closes a thought. A thought is at the beginning of an answer; anywhere
    else the marks are words. It ends at the first closing mark with the template's own white space
    around it (`\\n</think>\\n\\n`), so that a thought may mention the tags, or at the first one.
    """
    opens, closes = (re.escape(mark) for mark in marks)
    as_written = re.match(rf"(\s*)({opens}.*?{closes})", text, re.DOTALL)
    if not as_written:
        opens, closes = (re.escape(mark.strip()) for mark in marks)
        as_written = re.match(rf"(\s*)({opens}.*?{closes}\n*)", text, re.DOTALL)
    if not as_written:
        return "", "", text
    return as_written[1], as_written[2], text[as_written.end():]


# ---- encode: pieces -> ids ----------------------------------------------------------------------


def encode_turns(template: Template, tokenizer, messages: list[dict], system: str | None = None,
                 tools=None, settings: Settings = Settings()) -> list[tuple[list, list]]:
    """Encode a whole conversation: one (source_ids, target_ids) for each pair of messages.

    Arguments and errors are those of render_turns.
    """
    turns = render_turns(template, tokenizer, messages, system, tools, settings)
    ids = encode_pieces(tokenizer, [pieces for turn in turns for pieces in turn])
    return list(zip(ids[0::2], ids[1::2]))


def encode_prompt(template: Template, tokenizer, messages: list[dict], system: str | None = None,
                  tools=None, settings: Settings = Settings()) -> tuple[list, list]:
    """Encode a conversation whose last message is to be answered: (prompt_ids, answer_ids).

    In chat the last message is an assistant's with the content "". Thoughts of earlier answers are
    left out.
    """
    turns = render_turns(template, tokenizer, messages, system, tools, settings, only_last=True)
    *history, (source, answer) = turns
    prompt = [piece for turn in history for pieces in turn for piece in pieces] + source
    prompt_ids, answer_ids = encode_pieces(tokenizer, [prompt, answer])
    return prompt_ids, answer_ids


def encode_pieces(tokenizer, piece_lists: list[Pieces]) -> list[list[int]]:
    """Encode many lists of pieces in one batch, on all cores.

    For a whole dataset, gather the pieces of thousands of turns and call this once: texts that
    repeat, such as the system text and the borders of turns, are then encoded only once.
    """
    texts = dict.fromkeys(
        piece for pieces in piece_lists for piece in pieces if isinstance(piece, str))
    ids = dict(zip(texts, tokenizer.encode_batch(list(texts))))
    encoded = []
    for pieces in piece_lists:
        encoded.append([])
        for piece in pieces:
            encoded[-1] += ids[piece] if isinstance(piece, str) else (piece,)
    return encoded
