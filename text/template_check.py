"""Chooses the chat format of a model, and compares ours with the one its vendor wrote.

    python -m text.template_check llama3        a chat format, rendered

Requires: templates.py, text/chat_formats.py.
Next: data.py.
"""
import argparse
import functools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from templates import Token, encode_pieces, render_turns
from text.chat_formats import TEMPLATES, find_template, stored_template
from text.fit_tokenizer import fit_tokenizer
from text.jinja_sandbox import render_chats
from text.tokenizer import load_tokenizer, read_json, token_text
from text.tool_calls import shorten


def choose_template(said, tokenizer, model_type=None, force=False):
    """Check the template the config names, or find one where it names none. -> (Template, why); why: to be announced.

    said: the config's `template`, a name, a mapping (see text/chat_formats.py) or None. model_type: as in config.json.
    force: take a template that does not fit all the same.
    Raises ValueError naming a template that fits when this one does not, or when none can be found.
    """
    if said:
        template = find_template(said)
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
