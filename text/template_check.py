"""Choose the chat template of a model, and compare it with the one its vendor wrote.

    python -m text.template_check                       lists the formats
    python -m text.template_check llama3                renders a conversation, marking the loss
    python -m text.template_check llama3 --tokenizer DIR        the same, with tokens counted
    python -m text.template_check --check DIR           compares with the checkpoint's own template

Most chat checkpoints carry a chat template in jinja. Eight conversations are rendered with it and
with ours, and compared as text and as ids. Differences that are understood begin with "known: ".

Requires: templates.py, text/chat_formats.py, text/fit_tokenizer.py, text/jinja_sandbox.py.
Next: text/load_text.py.
"""
import argparse
import functools
import json
import os.path
import re
from dataclasses import replace
from pathlib import Path

from errors import run_script
from templates import Pieces, Template, Token, encode_pieces, render_turns
from text.chat_formats import TEMPLATES
from text.fit_tokenizer import fit_tokenizer
from text.jinja_sandbox import render_chats
from text.tokenizer import Tokenizer, load_tokenizer, read_json
from text.tool_calls import shorten
from text.vocabularies import token_text
from text.written_formats import LIST_OF_ALL, find_template, stored_template

Rendered = dict[str, tuple[str | None, str]]    # name of a conversation -> (text or None, error)


# ---- choose -------------------------------------------------------------------------------------


def choose_template(value: str | dict | None, tokenizer: Tokenizer, model_type: str | None = None,
                    force: bool = False) -> tuple[Template, str]:
    """Check the template a config names, or find one: (template, the reason for it).

    value: the config's `template`, a name, a mapping or None. model_type: as in config.json. force:
    take a template that does not fit. Raises ValueError, which names a template that fits, when
    this one does not or when none can be found.
    """
    if value:
        template = find_template(value)
        misfit = misfit_reason(template, tokenizer, model_type)
        if misfit and not force:
            fitting = [row.name for row, _ in fitting_templates(tokenizer, model_type)]
            raise ValueError(f"template {template.name!r} {misfit}. Try template: "
                             f"{(fitting or ['default'])[0]} "
                             "(or force_template: true to use this one anyway)")
        return template, f"forced: it {misfit}" if misfit else "as the config says"

    model = f"{tokenizer.name}, model_type {model_type}"
    for template, sign in fitting_templates(tokenizer, model_type):
        return template, f"chosen for {model}: {sign}"
    usual = [name for name, row in TEMPLATES.items() if model_type in row.families]
    hint = f" (of {model_type} models: {', '.join(usual)})" if usual else ""
    raise ValueError(f"no template is set, and this checkpoint ({model}) does not show which one "
                     f"it was made for. Set template: to the name of one{hint}; {LIST_OF_ALL}")


def fitting_templates(tokenizer: Tokenizer, model_type: str | None) -> list[tuple[Template, str]]:
    """The rows that suit a checkpoint, best first, each with the reason.

    The checkpoint's own chat template decides before its tokens do. Of several rows it may mean,
    rows that write the same text come first.
    """
    fitting = [row for row in TEMPLATES.values() if not misfit_reason(row, tokenizer, model_type)]
    own = tokenizer.chat_template
    if not own:
        known = [row for row in fitting if row.families or row.needs]
        known.sort(key=lambda row: -len(row.needs))     # tokens say more than the model_type
        return [(row, "by the tokens it has") for row in known]

    with_signs = [row for row in fitting if row.says and all(text in own for text in row.says)]
    same_text = []
    if len(with_signs) != 1:
        rendered = render_theirs(tokenizer)
        same_text = [row for row in with_signs or fitting if agrees(row, tokenizer, rendered)]
    if not with_signs:
        return [(row, "its chat template writes the same text") for row in same_text]
    with_signs.sort(key=lambda row: (row not in same_text, -len(row.says)))
    return [(row, "its chat template has " + " and ".join(map(repr, row.says)))
            for row in with_signs]


def misfit_reason(template: Template, tokenizer: Tokenizer, model_type: str | None) -> str:
    """Why a template does not suit a tokenizer and a model; "" if it does."""
    slots = [*template.prefix, *template.user]
    as_ids = [slot.name for slot in slots if isinstance(slot, Token)]
    for token in reversed(template.needs):
        is_id = token in as_ids and tokenizer.id_of(token) is not None
        if not is_id and not tokenizer.is_added(token):
            return f"uses {token!r}, which this tokenizer lacks ({tokenizer.name})"
    if model_type and template.families and model_type not in template.families:
        families = ", ".join(template.families)
        return f"is the format of {families} models, and this one is {model_type}"
    return ""


# ---- compare with the checkpoint's own chat template --------------------------------------------


SYSTEM = "Answer in one sentence."
MARK = "\ue000"         # stands for a system text; nobody types it
PROMPT = [{"role": "user", "content": "What is 2 + 3?"}]
ONE_TURN = [*PROMPT, {"role": "assistant", "content": "2 + 3 = 5."}]
TWO_TURNS = [
    *ONE_TURN,
    {"role": "user", "content": "为什么？ 😀"},
    {"role": "assistant", "content": "因为。\n\nSo."},
]
SPACED = [{**message, "content": f"  {message['content']} \n"} for message in TWO_TURNS]
TOOLS = [{"type": "function", "function": {
    "name": "weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "its name"}},
        "required": ["city"],
    },
}}]
TOOL_CALL = [
    *PROMPT,
    {"role": "function", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    {"role": "observation", "content": '{"celsius": -3}'},
    {"role": "assistant", "content": "-3 °C."},
]
CHATS = {       # name of the comparison: messages, system text, tools
    "one turn": (ONE_TURN, None, None),
    "two turns": (TWO_TURNS, None, None),
    "system text": (TWO_TURNS, SYSTEM, None),
    "prompt": (PROMPT, None, None),     # up to where the answer begins
    "later prompt": (TWO_TURNS[:3], None, None),
    "white space": (SPACED, None, None),
    "list of tools": (ONE_TURN, SYSTEM, TOOLS),
    "tool call": (TOOL_CALL, None, None),
}


def check_template(template: Template, tokenizer: Tokenizer, tools: bool = False) -> list[str]:
    """Compare a format with the chat template of the checkpoint, on the conversations of CHATS.

    tokenizer: not yet changed by fit_tokenizer. tools: also the conversations with tools, which
    every vendor words differently. Returns lines to print; none if all is equal or the checkpoint
    has no chat template. Lines that begin with "known: " name differences that are understood, the
    others show the first difference. Takes about 0.1 s.
    """
    if not tokenizer.chat_template:
        return []
    return compare_chats(template, tokenizer, render_theirs(tokenizer, tools))


def agrees(template: Template, tokenizer: Tokenizer, rendered: Rendered) -> bool:
    """Whether a format differs from the checkpoint's chat template in known ways at most."""
    lines = compare_chats(template, tokenizer, rendered)
    return all(line.startswith("known: ") for line in lines)


def render_theirs(tokenizer: Tokenizer, tools: bool = False) -> Rendered:
    """Render the conversations of CHATS with the checkpoint's own chat template."""
    chats = {name: chat for name, chat in CHATS.items() if tools or "tool" not in name}
    tokens = {}
    for role, token in tokenizer.config.items():
        text = token_text(token) if role.endswith("_token") else None
        if isinstance(text, str):
            tokens[role] = text
    variables = [vendor_chat(*chat) for chat in chats.values()]
    return dict(zip(chats, render_chats(tokenizer.chat_template, tokens, variables)))


def vendor_chat(messages: list[dict], system: str | None, tools: list[dict] | None) -> dict:
    """A conversation of CHATS as the variables that chat templates expect."""
    chat = [{"role": "system", "content": system}] if system else []
    for message in messages:
        if message["role"] == "function":
            function = json.loads(message["content"])
            call = {"id": "call00001", "type": "function", "function": function}
            chat.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif message["role"] == "observation":
            chat.append({"role": "tool", "tool_call_id": "call00001", "name": "weather",
                         "content": message["content"]})
        else:
            chat.append(message)
    return {"messages": chat, "tools": tools, "add_generation_prompt": is_prompt(messages)}


def is_prompt(messages: list[dict]) -> bool:
    """Whether a conversation ends with a message that is to be answered."""
    return len(messages) % 2 == 1


def our_pieces(template: Template, tokenizer: Tokenizer, messages: list[dict],
               system: str | None, tools: list[dict] | None) -> Pieces:
    """Render a conversation in our format; a prompt up to where the answer begins."""
    if is_prompt(messages):
        messages = [*messages, {"role": "assistant", "content": ""}]
        *history, (source, _) = render_turns(template, tokenizer, messages, system, tools,
                                             only_last=True)
        turns = [*history, (source, [])]
    else:
        turns = render_turns(template, tokenizer, messages, system, tools, only_last=True)
    return [piece for turn in turns for pieces in turn for piece in pieces]


def text_of_pieces(tokenizer: Tokenizer, pieces: Pieces) -> str:
    return "".join(tokenizer.core.id_to_token(piece) if isinstance(piece, int) else piece
                   for piece in pieces)


def compare_chats(template: Template, tokenizer: Tokenizer, rendered: Rendered) -> list[str]:
    """The lines of check_template."""
    found = {}      # remark -> (names of the conversations, detail of the first of them)
    for name, (theirs, error) in rendered.items():
        try:
            remark, detail = compare_chat(template, tokenizer, CHATS[name], theirs, error)
        except ValueError as wrong:     # a token that this tokenizer lacks
            remark, detail = f"cannot be compared: {wrong}", ""
        if remark:
            found.setdefault(remark, ([], detail))[0].append(name)
    lines = [f"{remark} (in: {', '.join(names)}){detail}"
             for remark, (names, detail) in found.items()]
    return sorted(lines, key=lambda line: line.startswith("known: "))


def compare_chat(template: Template, tokenizer: Tokenizer, chat: tuple, theirs: str | None,
                 error: str) -> tuple[str, str]:
    """Compare one conversation: (remark, detail), both "" if all is equal.

    theirs: the text of the checkpoint's chat template; None for an error.
    """
    messages, system, tools = chat
    pieces = our_pieces(template, tokenizer, *chat)
    ours = text_of_pieces(tokenizer, pieces)
    if theirs is None:
        # many chat templates take no system text, or no tools
        known = "known: " if system or messages is TOOL_CALL else ""
        return f"{known}its chat template refuses this: {error}", ""
    if theirs == ours:
        return compare_ids(tokenizer, encode_pieces(tokenizer, [pieces])[0], theirs)
    if left_out := missing_part(chat, theirs):
        return f"known: its chat template leaves the {left_out} out", ""
    remarks = known_remarks(template, tokenizer, chat, theirs)
    if remarks is not None:
        return "known: its chat template " + " and ".join(remarks), ""

    at = len(os.path.commonprefix([ours, theirs]))
    start = max(at - 40, 0)
    return ("its chat template writes another text",
            f", from character {at} on\n    ours    {ours[start:at + 40]!r}\n"
            f"    theirs  {theirs[start:at + 40]!r}")


def missing_part(chat: tuple, theirs: str) -> str:
    """The part of a conversation that is not in a text; "" if all of it is."""
    messages, system, tools = chat
    if system and SYSTEM not in theirs:
        return "system text"
    if tools and "Weather of a city" not in theirs:
        return "tools"
    if messages is TOOL_CALL and "Oslo" not in theirs:
        return "tool call"
    return ""


def known_remarks(template: Template, tokenizer: Tokenizer, chat: tuple,
                  theirs: str) -> list[str] | None:
    """What differs, in words, if all of it is understood; else None.

    The plain comparison comes first; then without our default system text, with stripped texts,
    and with both.
    """
    messages, system, tools = chat
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    silent = replace(template, default_system="")
    default = shorten(template.default_system, 60)
    no_default = f"has no default system text, ours is {default}"
    strips = "strips white space around texts"
    attempts = [
        (template, messages, []),
        (template, stripped, [strips]),
        (silent, messages, [no_default]),
        (silent, stripped, [no_default, strips]),
    ]
    for row, texts, remarks in attempts:
        differences = known_differences(row, tokenizer, (texts, system, tools), theirs)
        if differences is not None:
            return remarks + differences
    return None


def known_differences(template: Template, tokenizer: Tokenizer, chat: tuple,
                      theirs: str) -> list[str] | None:
    """known_remarks for one of its attempts."""
    messages, system, tools = chat
    ours = text_of_pieces(tokenizer, our_pieces(template, tokenizer, *chat))
    ends = "|".join(re.escape(token) for token in (tokenizer.eos_token, *template.stop) if token)
    patterns = known_patterns(template, ends, is_prompt(messages))
    remarks = [remark for remark, pattern in patterns.items()
               if re.findall(pattern, ours) != re.findall(pattern, theirs)]
    if ends and not is_prompt(messages) and not template.efficient_eos:
        at_end = rf"(?:{ends})\s*$"
        if re.search(at_end, theirs) and not re.search(at_end, ours):
            return None     # the model would never learn to end

    def bare(text):
        return functools.reduce(lambda left, pattern: re.sub(pattern, "", left),
                                patterns.values(), text)

    if bare(ours) == bare(theirs):
        return remarks
    if tools:
        return None

    # if only the system text differs, theirs is where our text has a mark instead
    marked = text_of_pieces(tokenizer, our_pieces(template, tokenizer, messages, MARK, None))
    frame = "(.*)".join(re.escape(part) for part in bare(marked).split(MARK))
    found = re.fullmatch(frame, bare(theirs), re.DOTALL)
    if not found or found[1].isspace():
        return None
    if any(isinstance(part, int) for part in tokenizer.split_at_special(found[1])):
        return None         # with a special token in it, more than the system text differs
    own = system or template.default_system
    if found[1] == own:
        return [*remarks, "has an empty system turn"]
    return [*remarks, f"says {shorten(found[1], 60)} for the system text {shorten(own, 60)}"]


def known_patterns(template: Template, ends: str, prompt: bool) -> dict[str, str]:
    """{description: regular expression} of what may differ. ends: matches the end of an answer."""
    opens, closes = (re.escape(mark.strip()) for mark in template.thought)
    empty = rf"{opens}\s*{closes}"
    if template.empty_thought:
        empty += "|" + re.escape(template.empty_thought)
    patterns = {
        "tells the date": r"(?:Cutting Knowledge|Today) Date: .*\n+",
        "disagrees on empty thoughts": rf"(?:{empty})(?:\n\n)?",
    }
    if prompt:
        patterns["opens a thought at the end of a prompt"] = rf"{opens}\s*$"
    else:
        patterns["ends the last answer otherwise"] = rf"(?:\s|{ends or ' '})+$"
    return patterns


def compare_ids(tokenizer: Tokenizer, ours: list[int], text: str) -> tuple[str, str]:
    """Compare our ids with those of the text encoded in one piece: (remark, detail)."""
    theirs = tokenizer.encode(text)
    if ours == theirs or tokenizer.split_special_tokens:
        return "", ""
    at = len(os.path.commonprefix([ours, theirs]))
    window = slice(max(at - 1, 0), at + 2)
    our_tokens = [tokenizer.core.id_to_token(i) for i in ours[window]]
    their_tokens = [tokenizer.core.id_to_token(i) for i in theirs[window]]
    return ("known: the same text in other tokens, since slots are tokenized one by one",
            f": ours {our_tokens}, in one piece {their_tokens}")


# ---- the script ---------------------------------------------------------------------------------


EXAMPLE = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5."},
    {"role": "user", "content": "And the weather in Oslo?"},
    {"role": "function", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    {"role": "observation", "content": '{"celsius": -3}'},
    {"role": "assistant", "content": "It is -3 °C."},
]


class NoTokenizer:
    """A tokenizer for the text of a format alone: a token is its own name."""
    bos_id = "<bos>"
    eos_id = "<eos>"
    unk_id = None
    split_special_tokens = False

    def id_of(self, token: str) -> str:
        return token


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="python -m text.template_check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("template", nargs="?", help="a row of the table")
    parser.add_argument("--tokenizer", metavar="DIR", help="of a checkpoint, to count tokens")
    parser.add_argument("--check", metavar="DIR",
                        help="compare with the chat template of this checkpoint")
    options = parser.parse_args(argv)
    if options.check:
        print_check(Path(options.check), options.template)
    elif options.template:
        print_example_chat(find_template(options.template), options.tokenizer)
    else:
        print_table()


def print_table():
    """A line for each format: name, families, slots of a user message."""
    for name, row in TEMPLATES.items():
        families = ", ".join(row.families) or "any model"
        print(f"{name:15s} {families:35s} {''.join(map(str, row.user))!r}")


def print_example_chat(template: Template, folder: str | None):
    """Render EXAMPLE, marking what carries loss; with the tokenizer in `folder`, count tokens."""
    tokenizer = NoTokenizer()
    if folder:
        tokenizer = load_tokenizer(folder)
        print(f"ends an answer: {fit_tokenizer(template, tokenizer)}")
    turns = render_turns(template, tokenizer, EXAMPLE, "You are a helpful assistant.")
    for source, target in turns:
        print_pieces("    ", source, tokenizer, bool(folder))
        print_pieces("LOSS", target, tokenizer, bool(folder))


def print_pieces(mark: str, pieces: Pieces, tokenizer, count: bool):
    """One line: LOSS or nothing, the number of tokens, the pieces."""
    length = f"{len(encode_pieces(tokenizer, [pieces])[0]):4d} tokens " if count else ""
    texts = [tokenizer.decode([piece]) if isinstance(piece, int) else piece for piece in pieces]
    print(mark, length, *map(repr, texts))


def print_check(folder: Path, name: str | None = None):
    """Compare a format, by default the one that would be chosen, with that of a checkpoint."""
    tokenizer = load_tokenizer(folder)
    model_type = read_json(folder / "config.json").get("model_type")
    value, force = stored_template([folder], name, force=True)
    template, reason = choose_template(value, tokenizer, model_type, force)
    print(f"template  {template.name} ({reason})")
    if not tokenizer.chat_template:
        print(f"{folder} carries no chat template to compare with")
        return
    lines = check_template(template, tokenizer, tools=True)
    print(*lines or ["equal in text and ids: " + ", ".join(CHATS)], sep="\n")


if __name__ == "__main__":
    run_script(main)
