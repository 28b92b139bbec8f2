"""Chat formats at work: a conversation becomes token ids, and which of them the model learns to produce.

    python -m text.template_check                                    lists the formats
    python -m text.template_check llama3                             shows an example conversation, marking what carries loss
    python -m text.template_check llama3 --tokenizer path/to/model   the same as that tokenizer cuts it, with ids counted
    python -m text.template_check --check path/to/model              compares the format with the checkpoint's own chat template

The formats themselves are the rows of text/chat_formats.py.

A conversation is a list of {"role": ..., "content": ...}: "user" or "observation" (what a tool returned), answered in
turn by "assistant" or "function" (the assistant calls a tool; the content is JSON).

Read before: text/chat_formats.py, text/tokenizer.py. Read next: data.py, which reads rows, truncates what is rendered here, and makes
labels.
Sources: the vendors' chat templates in their published tokenizer_config.json; recorded ids of LLaMA-Factory.
"""
import re
from dataclasses import dataclass, replace

from errors import did_you_mean
from text.tool_calls import TOOL_FORMATS, describe_tools, render_call


# ------------------------------------------------------------------------------------------------- a conversation


@dataclass(frozen=True)
class Settings:
    """The keys of the config that change how a conversation is rendered, under their names there."""

    enable_thinking: bool | None = True  # formats with `reasoning` only: see settle_thought
    preserve_thinking: bool = False
    mask_history: bool = False
    tool_format: str | None = None  # in place of the template's
    default_system: str | None = None  # in place of the template's


def encode_turns(template, tokenizer, messages, system=None, tools=None, settings=Settings()):
    """A whole conversation as ids.

    messages: user|observation and assistant|function alternating, an even number of them.
    system:   the system text or None. tools: JSON text (or its list) describing tools, or None.
    -> one (source_ids, target_ids) for each pair of messages; the target is what the model learns to write.
    Raises ValueError for a tool call or a tool description that cannot be read.
    """
    turns = render_turns(template, tokenizer, messages, system, tools, settings)
    ids = encode_pieces(tokenizer, [pieces for turn in turns for pieces in turn])
    return list(zip(ids[0::2], ids[1::2]))


def encode_prompt(template, tokenizer, messages, system=None, tools=None, settings=Settings()):
    """A conversation of which only the last message is an answer to be given ("" in chat), the rest is prompt.

    -> (prompt_ids, answer_ids). The same pieces as encode_turns, but thoughts of earlier answers are left out.
    """
    turns = render_turns(template, tokenizer, messages, system, tools, settings, only_last=True)
    prompt = [piece for source, target in turns for piece in source + target]
    answer = turns[-1][1]
    prompt_ids, answer_ids = encode_pieces(tokenizer, [prompt[:len(prompt) - len(answer)], answer])
    return prompt_ids, answer_ids


def encode_pieces(tokenizer, piece_lists):
    """Tokenise many lists of pieces in one batch, on all cores. -> one list of ids per list of pieces.

    For a whole dataset, gather the pieces of thousands of turns (render_turns) and call this once: texts that come
    again and again (the system text, the borders of turns) are then tokenised once.
    """
    texts = list({piece: None for pieces in piece_lists for piece in pieces if isinstance(piece, str)})
    ids = dict(zip(texts, tokenizer.encode_batch(texts)))
    found = []
    for pieces in piece_lists:
        found.append([])
        for piece in pieces:
            found[-1] += ids[piece] if isinstance(piece, str) else (piece,)
    return found


def render_turns(template, tokenizer, messages, system=None, tools=None, settings=Settings(), only_last=False):
    """A conversation as pieces, before tokenisation: a piece is a str, to be tokenised on its own, or an int, an id.

    -> one (source_pieces, target_pieces) for each pair of messages. only_last: just the last answer counts.
    """
    assert len(messages) % 2 == 0 and messages, f"{len(messages)} messages: turns and answers must alternate"
    template = with_overrides(template, settings)
    opening, system_text = render_opening(template, tokenizer, system, tools)
    if system_text and messages[0]["role"] != "user":
        raise ValueError("this format puts the system text into the first user's text, but the conversation begins "
                         f"with {messages[0]['role']!r}. Leave the system text out, or begin with a user")
    turns = []
    for i in range(0, len(messages), 2):
        said, answer = messages[i:i + 2]
        text = (system_text if i == 0 else "") + said["content"]
        # {{idx}} in a user slot is the turn's number, and so it is where a user has typed it: as LLaMA-Factory has it.
        number = str(i // 2) if said["role"] == "user" and not template.system_in_user else None
        source = (opening if i == 0 else []) + fill(turn_slots(template, said["role"]), tokenizer, text, number)

        text, thought = settle_thought(template, answer["content"], i + 2 == len(messages), only_last, settings)
        if answer["role"] == "function":
            text = render_call(template, text)
        target = fill(turn_slots(template, answer["role"]), tokenizer, text)
        if thought and settings.enable_thinking:
            target = [thought] + target
        elif thought:
            source = source + [thought]
        turns.append((source, target))
    return turns


def with_overrides(template, settings):
    """The template with the config's tool_format and default_system in place of its own."""
    if settings.tool_format and settings.tool_format not in TOOL_FORMATS:
        raise ValueError(unknown("tool_format", settings.tool_format, TOOL_FORMATS))
    if settings.tool_format:  # a foreign call ends in the tokenizer's eos, as LLaMA-Factory has it
        function = ("{{content}}",) if template.efficient_eos else ("{{content}}", EOS)
        template = replace(template, tool_format=settings.tool_format, function=function)
    if settings.default_system is not None:
        template = replace(template, default_system=settings.default_system)
    return template


def render_opening(template, tokenizer, system, tools):
    """What stands before the first turn. -> (pieces, text that the first user's text begins with)."""
    opening = fill(template.prefix, tokenizer, "")
    system = system or template.default_system
    if not system and not tools:
        return opening, ""
    if tools:
        system += describe_tools(template.tool_format, tools)
    if template.system_in_user:
        return opening, template.system[0].replace("{{content}}", system, 1)
    return opening + fill(template.system, tokenizer, system), ""


def turn_slots(template, role):
    """The slots for a message of this role."""
    slots = {
        "user": template.user,
        "observation": template.observation or template.user,
        "assistant": template.assistant,
        "function": template.function or template.assistant,
    }
    if role not in slots:
        raise ValueError(unknown("role", role, slots))
    return slots[role]


def fill(slots, tokenizer, content, number=None):
    """Slots with a text put in. -> list of pieces, each a str or an id."""
    pieces = []
    for slot in slots:
        if slot in (BOS, EOS):  # a tokenizer without bos (Qwen's) simply has none
            pieces.append(tokenizer.bos_id if slot == BOS else tokenizer.eos_id)
        elif isinstance(slot, Token):
            pieces.append(require_id(tokenizer, slot.name))
        else:
            for part in tokenizer.marked(slot) if tokenizer.split_special_tokens else [slot]:
                if isinstance(part, str):
                    part = part.replace("{{content}}", content, 1)
                    part = part if number is None else part.replace("{{idx}}", number, 1)
                pieces.append(part)
    return [piece for piece in pieces if piece is not None and piece != ""]


def require_id(tokenizer, token):
    """The id of a token that a format names, or of the unknown token where the tokenizer has one."""
    found = tokenizer.id_of(token)
    found = tokenizer.unk_id if found is None else found
    if found is None:
        raise ValueError(f"the template uses the token {token!r}, which this tokenizer lacks ({tokenizer.name})")
    return found


# ------------------------------------------------------------------------------------------------------- thoughts


def settle_thought(template, text, is_last, only_last, settings):
    """Apply the thinking rules of a reasoning format to one answer. -> (its text, an empty thought to add or "").

    enable_thinking true:  an answer without a thought gets an empty one, and learns to write it.
                    null:  the same, but the empty thought belongs to the prompt.
                    false: thoughts are taken out of all answers first.
    Thoughts of earlier answers are taken out, as the vendors do in chat, where only the last answer counts
    (only_last, mask_history) and preserve_thinking is off.
    """
    if not template.reasoning:
        return text, ""
    opens, closes = (word.strip() for word in template.thought)
    drop_history = (only_last or settings.mask_history) and not settings.preserve_thinking
    unwanted = settings.enable_thinking is False and (is_last or not only_last)
    if unwanted or drop_history and not is_last:
        thought = re.escape(opens) + ".*?" + re.escape(closes) + "\n*"
        text = re.sub(thought, "", text, flags=re.DOTALL).lstrip("\n")
    lacks_one = opens not in text and closes not in text
    wants_one = is_last or not (only_last or drop_history)
    return text, "".join(template.thought) if lacks_one and wants_one else ""


# ------------------------------------------------------------------- a format and the tokenizer it is used with


def fit_tokenizer(template, tokenizer, settings=Settings(), embedding_rows=None):
    """Make the tokenizer end answers as the template does: eos, pad, chat template. -> ids that end an answer, sorted.

    A stop token the vocabulary lacks is added at its end. embedding_rows: how many ids the model knows, if that is
    to be respected; a stop token beyond it is left out (the model can never write it), an eos beyond it is an error.
    """
    template = with_overrides(template, settings)
    for place, token in enumerate(template.stop):
        fits = embedding_rows is None or tokenizer.id_of(token) is not None or tokenizer.vocab_size < embedding_rows
        if fits:
            tokenizer.add_tokens([token])
        elif place == 0 and template.stop_is_eos:
            raise ValueError(f"this template ends answers with {token!r}, which this tokenizer ({tokenizer.name}) "
                             f"lacks, and the model has no room for it ({embedding_rows} ids). Choose another template")
    if template.stop_is_eos:
        tokenizer.set_token("eos_token", template.stop[0])
    if tokenizer.eos_id is None:
        raise ValueError(f"this tokenizer names no eos_token ({tokenizer.name}), so an answer could never end: "
                         'add "eos_token" to its tokenizer_config.json')
    if tokenizer.pad_id is None:
        tokenizer.set_token("pad_token", tokenizer.eos_token)
    if template.own_jinja or not tokenizer.chat_template:
        tokenizer.chat_template = write_jinja(template, tokenizer)
    stops = {tokenizer.id_of(token) for token in template.stop} - {None}
    return sorted(stops | {tokenizer.eos_id})


def write_jinja(template, tokenizer):
    """The format as a jinja chat template, for the programs that read one from the checkpoint. Text only, no tools."""
    names = {BOS: tokenizer.bos_token or "", EOS: tokenizer.eos_token or ""}

    def quote(text):
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    def expression(slots, variable):
        text = "".join(names.get(slot, slot.name) if isinstance(slot, Token) else slot for slot in slots)
        return f" + {variable} + ".join(map(quote, text.split("{{content}}")))

    system = expression(template.system, "system")
    roles = {"user": template.user, "tool": template.observation or template.user, "assistant": template.assistant}
    turns = "".join("{% if message['role'] == '" + role + "' %}{{ " + expression(slots, "content") + " }}{% endif %}"
                    for role, slots in roles.items())
    return (
        "{% set system = " + quote(template.default_system) + " %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] or system %}{% set messages = messages[1:] %}{% endif %}"
        "{{ " + expression(template.prefix, "''") + " }}"
        + ("" if template.system_in_user else "{% if system %}{{ " + system + " }}{% endif %}")
        + "{% for message in messages %}{% set content = message['content'] %}"
        + ("{% if loop.first and system %}{% set content = " + system + " + content %}{% endif %}"
           if template.system_in_user else "")
        + turns + "{% endfor %}")


@dataclass(frozen=True)
class Token:
    """A slot that is one id: the token of this name."""

    name: str

    def __str__(self):
        return f"[{self.name}]"


BOS, EOS = Token("bos"), Token("eos")  # whichever tokens the tokenizer names for these roles


@dataclass(frozen=True)
class Template:
    """One chat format. All but `user` may be left out."""

    user: tuple
    assistant: tuple = ("{{content}}", EOS)
    system: tuple = ("{{content}}",)
    observation: tuple | None = None  # what a tool returned; None: as `user`
    function: tuple | None = None  # a tool call; None: as `assistant`
    prefix: tuple = ()
    default_system: str = ""  # where a conversation brings no system text
    tool_format: str = "default"  # a row of TOOL_FORMATS (text/tool_calls.py): how tools are described and called
    stop: tuple = ()  # tokens that end an answer, besides the tokenizer's eos
    stop_is_eos: bool = False  # stop[0] becomes the tokenizer's eos
    system_in_user: bool = False  # no system turn: the system text opens the first user's text
    efficient_eos: bool = False  # answers carry no eos: it is learned at the next turn's first token (data.py does it)
    thought: tuple = ("<think>\n", "\n</think>\n\n")  # what opens and closes a thought
    reasoning: bool = False  # every answer begins with a thought, if only an empty one
    own_jinja: bool = False  # replace the checkpoint's chat template: it describes another format
    # What choose_template goes by:
    families: tuple = ()  # model_type in config.json of the models that speak it; () = any model can learn it
    needs: tuple = ()  # special tokens it cannot do without
    says: tuple = ()  # texts that give it away in a checkpoint's own chat template
    name: str = ""  # its key in TEMPLATES


def unknown(what, found, known):
    """The message for a name that is not in a table: the nearest one, and all of them."""
    hint = did_you_mean(str(found), known)
    return f"unknown {what} {found!r}{hint}. Known: {', '.join(known)}"
