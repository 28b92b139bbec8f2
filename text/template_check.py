"""Chat formats at work: a conversation becomes token ids, and which of them the model learns to produce.

    python templates.py                                    lists the formats
    python templates.py llama3                             shows an example conversation, marking what carries loss
    python templates.py llama3 --tokenizer path/to/model   the same as that tokenizer cuts it, with ids counted
    python templates.py --check path/to/model              compares the format with the checkpoint's own chat template

The formats themselves are the rows of formats.py.

A conversation is a list of {"role": ..., "content": ...}: "user" or "observation" (what a tool returned), answered in
turn by "assistant" or "function" (the assistant calls a tool; the content is JSON).

Read before: formats.py, tokenizer.py. Read next: data.py, which reads rows, truncates what is rendered here, and makes
labels.
Sources: the vendors' chat templates in their published tokenizer_config.json; recorded ids of LLaMA-Factory.
"""
import argparse
import functools
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from formats import BOS, EOS, TEMPLATES, Template, Token, find_template, unknown, written_template
from sandbox import render_chats
from tokenizer import load_tokenizer, read_json, token_text
from tools import TOOL_FORMATS, describe_tools, render_call, shorten


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


def choose_template(said, tokenizer, model_type=None, force=False):
    """Check the template the config names, or find one where it names none. -> (Template, why); why: to be announced.

    said: the config's `template`, a name, a mapping (see formats.py) or None. model_type: as in config.json.
    force: take a template that does not fit all the same.
    Raises ValueError naming a template that fits when this one does not, or when none can be found.
    """
    if said:
        template = find_template(said)
        if template.tool_format not in TOOL_FORMATS:
            raise ValueError(f"template: {unknown('tool_format', template.tool_format, TOOL_FORMATS)}")
        wrong = misfit(template, tokenizer, model_type)
        if wrong and not force:
            best = [row.name for row, _ in fitting_templates(tokenizer, model_type)] or ["default"]
            raise ValueError(f"template {template.name!r} {wrong}. Try template: {best[0]} "
                             "(or force_template: true to use this one all the same)")
        return template, f"forced: it {wrong}" if wrong else "as the config says"
    who = f"{tokenizer.name}, model_type {model_type}"
    for template, sign in fitting_templates(tokenizer, model_type):
        return template, f"chosen for {who}: {sign}"
    raise ValueError(f"no template is set, and this checkpoint ({who}) does not show which one it was made for. "
                     f"Set template: to one of {', '.join(TEMPLATES)}")


def fitting_templates(tokenizer, model_type):
    """The rows that suit a checkpoint, best first. -> [(row, why)]

    What its own chat template says goes before what its tokens could speak, and of several rows that it could mean,
    those that write the same text go first.
    """
    fitting = [row for row in TEMPLATES.values() if not misfit(row, tokenizer, model_type)]
    own = tokenizer.chat_template
    if not own:
        known = [row for row in fitting if row.families or row.needs]
        known.sort(key=lambda row: -len(row.needs))  # tokens say more than the model_type; else the order of the table
        return [(row, "by the tokens it has") for row in known]
    told = [row for row in fitting if row.says and all(text in own for text in row.says)]
    same = []
    if len(told) != 1:
        rendered = render_theirs(tokenizer)
        same = [row for row in told or fitting if agrees(row, tokenizer, rendered)]
    told.sort(key=lambda row: (row not in same, -len(row.says)))  # more signs, better known
    return [(row, "its chat template has " + " and ".join(map(repr, row.says))) for row in told] or [
        (row, "its chat template writes the same text") for row in same]


def stored_template(folders, said, force):
    """The format to use with what was trained: the one asked for, else the one stored beside it. -> (said, force)

    folders: of adapters or models; train_config.json in them says what they were trained with.
    said: the config's `template`, a name, a mapping or None; what comes back is one of these too, None when nothing is
    asked for or stored.
    force: take a stored format without checking that it fits; training has done so.
    Raises ValueError when the one asked for is another than the one stored, and `force` is off.
    """
    stored = {folder: read_json(folder / "train_config.json").get("template") for folder in folders}
    found = [other for other in stored.values() if other]
    said = said or (found[0] if found else None)
    for folder, other in stored.items():
        if other and not force and not same_format(other, said):
            raise ValueError(f"template: {name_of(said)}, but {folder} was trained with {name_of(other)}"
                             f"{' of another wording' if name_of(said) == name_of(other) else ''}. Leave template out, "
                             "or set force_template: true")
    return said, force or any(same_format(other, said) for other in found)


def same_format(one, other):
    """Do two values of `template` mean the same? A row written out as a mapping is the row."""
    return one == other or isinstance(one, dict) and isinstance(other, dict) and \
        find_template(one) == find_template(other)


def name_of(said):
    """The name of a format as a config gives it, for messages."""
    return said.get("name", "custom") if isinstance(said, dict) else said


def misfit(template, tokenizer, model_type):
    """Why this template does not suit this tokenizer and model, or "" if it does."""
    as_ids = [slot.name for slots in (template.prefix, template.user) for slot in slots if isinstance(slot, Token)]
    lacking = [token for token in template.needs
               if not tokenizer.knows(token) and not (token in as_ids and tokenizer.id_of(token) is not None)]
    if lacking:
        return f"uses {lacking[-1]!r}, which this tokenizer lacks ({tokenizer.name})"
    if model_type and template.families and model_type not in template.families:
        return f"is the format of {', '.join(template.families)} models, and this one is {model_type}"
    return ""


# ------------------------------------------------------------------- a format and the checkpoint's own chat template

SYSTEM = "Answer in one sentence."
MARK = "\ue000"  # stands for a system text; nobody types it
ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
ONE_TURN = [*ASKED, {"role": "assistant", "content": "2 + 3 = 5."}]
TWO_TURNS = [*ONE_TURN, {"role": "user", "content": "为什么？ 😀"}, {"role": "assistant", "content": "因为。\n\nSo."}]
SPACED = [{**message, "content": f"  {message['content']} \n"} for message in TWO_TURNS]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "its name"}}, "required": ["city"]}}}]
CALLED = [*ASKED, {"role": "function", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
          {"role": "observation", "content": '{"celsius": -3}'}, {"role": "assistant", "content": "-3 °C."}]
CHATS = {  # what a comparison is called: the messages, the system text, the tools
    "one turn": (ONE_TURN, None, None),
    "two turns": (TWO_TURNS, None, None),
    "system text": (TWO_TURNS, SYSTEM, None),
    "prompt": (ASKED, None, None),  # up to where the answer begins
    "later prompt": (TWO_TURNS[:3], None, None),
    "white space": (SPACED, None, None),
    "list of tools": (ONE_TURN, SYSTEM, TOOLS),
    "tool call": (CALLED, None, None),
}


def check_template(template, tokenizer, tools=False):
    """Compare a format with the chat template that the checkpoint carries, on the conversations of CHATS.

    tokenizer: as it was loaded, before fit_tokenizer, which may change its eos and its chat template.
    tools: the conversations with tools too; vendors describe tools in words of their own.
    -> lines to show, none where all is equal or the checkpoint carries no chat template. Takes about 0.1 s. Lines that
    begin with "known: " name differences that are well understood; the others show where the texts part.
    """
    return compare_chats(template, tokenizer, render_theirs(tokenizer, tools)) if tokenizer.chat_template else []


def agrees(template, tokenizer, rendered):
    """Does the format write what the checkpoint's chat template writes, but for known differences?"""
    return all(line.startswith("known: ") for line in compare_chats(template, tokenizer, rendered))


def render_theirs(tokenizer, tools=False):
    """{name: (text or None, error)} of the conversations of CHATS, by the checkpoint's own chat template."""
    chats = {name: chat for name, chat in CHATS.items() if tools or "tool" not in name}
    tokens = {role: token_text(token) for role, token in tokenizer.config.items() if role.endswith("_token")}
    tokens = {role: text for role, text in tokens.items() if isinstance(text, str)}
    texts = render_chats(tokenizer.chat_template, tokens, [vendor_chat(*chat) for chat in chats.values()])
    return dict(zip(chats, texts))


def compare_chats(template, tokenizer, rendered):
    """The lines of check_template."""
    found = {}  # what there is to say: which conversations show it, and how it looks in the first of them
    for name, (theirs, error) in rendered.items():
        try:
            remark, detail = compare_chat(template, tokenizer, CHATS[name], theirs, error)
        except ValueError as wrong:  # a token that this tokenizer lacks
            remark, detail = f"cannot be compared: {wrong}", ""
        if remark:
            found.setdefault(remark, ([], detail))[0].append(name)
    lines = [f"{remark} (in: {', '.join(names)}){detail}" for remark, (names, detail) in found.items()]
    return sorted(lines, key=lambda line: line.startswith("known: "))


def vendor_chat(messages, system, tools):
    """A conversation of CHATS as chat templates expect it."""
    chat = [{"role": "system", "content": system}] if system else []
    for message in messages:
        if message["role"] == "function":
            call = {"id": "call00001", "type": "function", "function": json.loads(message["content"])}
            chat.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif message["role"] == "observation":
            chat.append({"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": message["content"]})
        else:
            chat.append(message)
    return {"messages": chat, "tools": tools, "add_generation_prompt": len(messages) % 2 == 1}


def our_text(template, tokenizer, messages, system, tools):
    """The same conversation in our format. -> (text, ids)"""
    is_prompt = len(messages) % 2 == 1
    messages = messages + [{"role": "assistant", "content": ""}] * is_prompt
    turns = render_turns(template, tokenizer, messages, system, tools, only_last=True)
    pieces = [piece for turn in turns for part in turn for piece in part]
    pieces = pieces[:len(pieces) - len(turns[-1][1])] if is_prompt else pieces
    text = "".join(tokenizer.core.id_to_token(piece) if isinstance(piece, int) else piece for piece in pieces)
    return text, encode_pieces(tokenizer, [pieces])[0]


def compare_chat(template, tokenizer, chat, theirs, error):
    """One conversation. theirs: its text by the checkpoint's chat template, None: see error. -> (remark, detail)"""
    messages, system, tools = chat
    ours, ids = our_text(template, tokenizer, *chat)
    if theirs is None:
        kind = "known: its" if system or messages is CALLED else "its"  # many know no system text, or no tools
        return f"{kind} chat template refuses this: {error}", ""
    if theirs == ours:
        return different_ids(tokenizer, ids, theirs)
    for what, given, sign in (("system text", system, SYSTEM), ("tools", tools, "Weather of a city"),
                              ("tool call", messages is CALLED, "Oslo")):
        if given and sign not in theirs:
            return f"known: its chat template leaves the {what} out", ""
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    silent, default = replace(template, default_system=""), shorten(template.default_system, 60)
    for row, one in ((template, []), (silent, [f"has no default system text, ours is {default}"])):
        for said, two in ((messages, []), (stripped, ["strips white space around texts"])):
            differences = known_differences(row, tokenizer, (said, system, tools), theirs)
            if differences is not None:
                return "known: its chat template " + " and ".join(one + two + differences), ""
    at = first_difference(ours, theirs)
    ours, theirs = (repr(text[max(at - 40, 0):at + 40]) for text in (ours, theirs))
    return ("its chat template writes another text",
            f", from character {at} on\n    ours    {ours}\n    theirs  {theirs}")


def known_differences(template, tokenizer, chat, theirs):
    """-> what differs, in words, if all of it is well understood; else None."""
    messages, system, tools = chat
    opens, closes = (re.escape(word.strip()) for word in template.thought)
    ends = "|".join(re.escape(token) for token in (tokenizer.eos_token, *template.stop) if token)
    known = {
        "tells the date": r"(?:Cutting Knowledge|Today) Date: .*\n+",
        "disagrees on empty thoughts": rf"{opens}\s*{closes}(?:\n\n)?",
        **({"opens a thought at the end of a prompt": rf"{opens}\s*$"} if len(messages) % 2 else
           {"ends the last answer otherwise": rf"(?:\s|{ends or ' '})+$"}),
    }

    def bare(text):
        return functools.reduce(lambda left, pattern: re.sub(pattern, "", left), known.values(), text)

    ours, _ = our_text(template, tokenizer, *chat)
    remarks = [remark for remark, pattern in known.items() if re.findall(pattern, ours) != re.findall(pattern, theirs)]
    must_end = ends and not (len(messages) % 2 or template.efficient_eos)
    if must_end and re.search(rf"(?:{ends})\s*$", theirs) and not re.search(rf"(?:{ends})\s*$", ours):
        return None  # the model would never learn to end
    if bare(ours) == bare(theirs):
        return remarks
    marked, _ = our_text(template, tokenizer, messages, MARK, None)
    frame = "(.*)".join(map(re.escape, bare(marked).split(MARK)))
    found = None if tools else re.fullmatch(frame, bare(theirs), re.DOTALL)
    if not found or found[1].isspace() or any(isinstance(part, int) for part in tokenizer.marked(found[1])):
        return None  # more than another system text
    own, other = system or template.default_system, found[1]
    return [*remarks, "has an empty system turn" if other == own else
            f"says {shorten(other, 60)} for the system text {shorten(own, 60)}"]


def different_ids(tokenizer, ours, text):
    """(remark, detail) on ids that slots give one by one, and the same text in one go; empty if they are the same."""
    theirs = tokenizer.encode(text)
    if ours == theirs or tokenizer.split_special_tokens:
        return "", ""
    at = first_difference(ours, theirs)
    ours, theirs = ([tokenizer.core.id_to_token(i) for i in ids[max(at - 1, 0):at + 2]] for ids in (ours, theirs))
    return ("known: the same text in other tokens, since slots are tokenised one by one",
            f": ours {ours}, in one go {theirs}")


def first_difference(one, other):
    """Where two texts or lists part."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


# ------------------------------------------------------------------------------------------------- as a script

EXAMPLE = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5."},
    {"role": "user", "content": "And the weather in Oslo?"},
    {"role": "function", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    {"role": "observation", "content": '{"celsius": -3}'},
    {"role": "assistant", "content": "It is -3 °C."},
]


class NoTokenizer:
    """Stands in for a tokenizer where only the text of a format is wanted: a token is its own name."""

    bos_id, eos_id, unk_id, split_special_tokens = "<bos>", "<eos>", None, False

    def id_of(self, token):
        return token


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("template", nargs="?", help="a row of the table")
    parser.add_argument("--tokenizer", help="folder of a checkpoint, to see ids too")
    parser.add_argument("--check", metavar="DIR", help="compare with the chat template of this checkpoint")
    options = parser.parse_args(arguments)
    if options.check:
        return print_check(Path(options.check), options.template)
    if options.template is None:
        for name, row in TEMPLATES.items():
            print(f"{name:15s} {', '.join(row.families) or 'any model':35s} {''.join(map(str, row.user))!r}")
        return
    template, tokenizer = find_template(options.template), NoTokenizer()
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
        print(f"ends an answer: {fit_tokenizer(template, tokenizer)}")
    for source, target in render_turns(template, tokenizer, EXAMPLE, "You are a helpful assistant."):
        for mark, pieces in (("    ", source), ("LOSS", target)):
            count = f"{len(encode_pieces(tokenizer, [pieces])[0]):4d} tokens " if options.tokenizer else ""
            shown = [tokenizer.decode([p]) if isinstance(p, int) else p for p in pieces]
            print(mark, count, *map(repr, shown))


def print_check(folder, name=None):
    """Compare a format, by default the one that would be chosen, with the chat template in this folder."""
    tokenizer = load_tokenizer(folder)
    model_type = read_json(folder / "config.json").get("model_type")
    said, force = stored_template([folder], name, force=True)
    template, why = choose_template(said, tokenizer, model_type, force)
    print(f"template  {template.name} ({why})")
    if not tokenizer.chat_template:
        return print(f"{folder} carries no chat template to compare with")
    lines = check_template(template, tokenizer, tools=True)
    print(*lines or ["equal in text and ids: " + ", ".join(CHATS)], sep="\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
