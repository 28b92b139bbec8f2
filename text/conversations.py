"""Rows of the alpaca and chat layouts, converted to conversations.

    conversation = convert(row, stage)      # messages, system, tools

A `Source` says how the rows of a dataset are laid out: which column holds which role, and for chat
layouts which words stand for the speakers. text/data_files.py makes it from dataset_info.json.

Requires: text/turns.py (one turn of a chat layout).
Next: text/data_files.py.

The layouts are LLaMA-Factory's; docs/differences.md lists what differs on purpose.
"""
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from text.json_text import why_not_row
from text.packed_files import unpacked_suffix
from text.plain_text import excerpt, why_not_utf8
from text.turns import ANSWERS, column_text, message_of_turn

# The defaults of an entry of dataset_info.json that names no columns (or tags). An entry that names
# one of them has no defaults. formatting "messages" is ours: OpenAI's layout without the surprises
# of LLaMA-Factory's "openai".
COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "conversations"},
    "messages": {"messages": "messages"},
}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
REQUIRED_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
ROLES = ("prompt", "query", "response", "history", "messages", "system", "tools", "chosen",
         "rejected", "kto_tag")         # what a column can be
PAIRS = ("rm", "dpo")                   # stages that compare two answers
JUDGED = ("kto",)                       # stages that know good answers from bad ones
SAMPLED = ("ppo", "grpo")               # stages whose answers are the model's: a row needs none
NO_ANSWER = ("a row needs an answer here; stages ppo and grpo train on prompts alone, and "
             "`python chat.py CONFIG --input FILE` answers them")
MESSAGE_TEXTS = ("content", "thought", "lead")      # the keys of a message that hold its texts
PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


@dataclass(frozen=True)
class Source:
    """One dataset: its files and the layout of its rows."""
    name: str
    files: tuple[Path, ...]
    formatting: str = ""                            # a key of COLUMNS; "": not yet recognized
    columns: dict = field(default_factory=dict)     # role -> name of the column
    tags: dict = field(default_factory=dict)        # role_tag, user_tag, … -> the word in the rows
    num_samples: int | None = None
    ranking: bool = False                           # a row has two answers, chosen and rejected


class RawRow(NamedTuple):
    """A row as read from its file, not yet checked."""
    file: Path
    number: int                     # in its file, from 1
    data: object                    # a dict, or the text of a line that could not be parsed
    source: Source | None = None
    is_utf8: bool = True            # False: its file has bytes that are not UTF-8 in this row

    @property
    def dataset(self) -> str:
        """The name of its dataset."""
        return self.source.name

    @property
    def where(self) -> str:
        """Dataset, file and number, for a message."""
        dataset = f"dataset '{self.source.name}', " if self.source.name != str(self.file) else ""
        return f"{dataset}{self.file} row {self.number}"

    @property
    def excerpt(self) -> str:
        """The row itself, shortened for a message."""
        return excerpt(self.data)


class Conversation(NamedTuple):
    """What templates.py renders.

    A message is {"role": user | assistant | observation | function, "content": str}, and maybe the
    further keys of text/turns.py; questions (user, observation) and answers (assistant, function)
    alternate.
    """
    messages: list[dict]
    system: str = ""
    tools: str = ""                 # JSON
    rejected: dict | None = None    # of a pair: the answer that is worse than the last message
    desired: bool | None = None     # is the last answer a good one? None: it was not judged


# ---- a row of any layout ----------------------------------------------------------------------


def convert(row: RawRow, stage: str = "sft") -> Conversation:
    """A row as a conversation; for stage pt its text as a single user message.

    Raises ValueError: what is wrong with the row.
    """
    if not isinstance(row.data, dict):
        is_csv = unpacked_suffix(row.file) == ".csv"
        if is_csv or not isinstance(row.data, str):
            raise ValueError("wrong number of fields" if is_csv else "not a JSON object")
        raise ValueError(why_not_row(row.data))
    if row.source.ranking and not {"prompt", "messages"} & row.source.columns.keys():
        conversation = convert_whole_pair(row.data, row.source)
    elif row.source.formatting == "alpaca":
        conversation = convert_alpaca(row.data, row.source, stage)
    else:
        conversation = convert_messages(row.data, row.source, stage)
    check_characters(conversation, row)
    if stage == "pt":
        return Conversation(conversation.messages[:1])
    check_answers(conversation, row.source, stage)
    return conversation


def check_answers(conversation: Conversation, source: Source, stage: str):
    """Raise ValueError for an answer with nothing to learn."""
    messages = conversation.messages
    trained = messages[:-1] if stage in SAMPLED else messages
    for number, message in enumerate(trained, 1):
        if message["role"] in ANSWERS and is_empty(message) and message.get("train") is not False:
            raise ValueError(f"answer {(number + 1) // 2} is empty, there is nothing to learn")
    rejected = conversation.rejected
    if rejected is not None and is_empty(rejected):
        column = source.columns["rejected"]
        raise ValueError(f"the answer in '{column}' is empty, there is nothing to learn")
    for message in (messages[-1], rejected or {}):
        if stage in (*PAIRS, *JUDGED) and message.get("train") is False:
            raise ValueError(f"an answer is marked as not to be learned, but stage: {stage} trains "
                             "on it; leave the row out, or the mark")


def with_answer(messages: list[dict], stage: str) -> list[dict]:
    """The messages; where the model itself answers, a last question gets an empty answer."""
    if stage in SAMPLED and len(messages) % 2:
        return [*messages, {"role": "assistant", "content": ""}]
    return messages


def is_empty(message: dict) -> bool:
    """Whether an answer has neither text nor thought."""
    return not (message["content"].strip() or message.get("thought"))


def texts_of(conversation: Conversation) -> list[str]:
    """All texts of a conversation."""
    messages = list(conversation.messages)
    if conversation.rejected is not None:
        messages.append(conversation.rejected)
    texts = [conversation.system, conversation.tools]
    for message in messages:
        texts += [message[key] for key in MESSAGE_TEXTS if key in message]
    return texts


def check_characters(conversation: Conversation, row: RawRow):
    """Raise ValueError for a text that cannot be written as UTF-8."""
    for text in texts_of(conversation):
        if reason := why_not_utf8(text, from_bytes=not row.is_utf8):
            raise ValueError(reason)


def check_stage(ranking: bool, judged: bool, where: str, stage: str):
    """Raise ValueError if the stage does not train on rows of this kind."""
    if ranking and stage not in PAIRS:
        raise ValueError(
            f"{where} has preference pairs (ranking: true), which stage: {stage} cannot train on; "
            f"stages {' and '.join(PAIRS)} can")
    if judged and not ranking and stage not in JUDGED:
        raise ValueError(
            f"{where} has good and bad answers (kto_tag), which stage: {stage} cannot train on; "
            "stage: kto can")
    if stage in PAIRS and not ranking:
        raise ValueError(
            f"{where} has no preference pairs, which stage: {stage} trains on. If its rows have "
            "two answers, write in its entry of dataset_info.json ranking: true, and columns "
            "chosen and rejected")
    if stage in JUDGED and not judged:
        raise ValueError(
            f"{where} does not say which answers are good, which stage: {stage} trains on. If its "
            "rows have a column of true and false, name it in the entry of dataset_info.json: "
            "columns: kto_tag")


# ---- alpaca: a column for each role -----------------------------------------------------------


def convert_alpaca(data: dict, source: Source, stage: str) -> Conversation:
    """A row with the columns prompt, query and response (or chosen and rejected).

    Further columns, if declared: history ([question, answer] pairs), system, tools, kto_tag.
    """
    columns = source.columns
    answer_roles = ("response",)
    if stage == "pt":
        answer_roles = ()
    elif source.ranking:
        answer_roles = ("chosen", "rejected")
    elif stage in SAMPLED and columns.get("response") not in data:
        answer_roles = ()
    values = [data.get(columns[role]) for role in ("prompt", *answer_roles)]
    if stage != "pt" and any(is_list_of_turns(value) for value in values):
        return convert_turn_lists(data, source, answer_roles, stage)
    messages = history_messages(data, columns.get("history"))
    for role in ("prompt", *answer_roles):
        if columns[role] not in data:
            advice = f": {NO_ANSWER}" if role == "response" else ""
            raise ValueError(f"the column '{columns[role]}' is missing{advice}")

    question = [column_text(data, columns.get(role)) for role in ("prompt", "query")]
    messages.append({"role": "user", "content": "\n".join(text for text in question if text)})
    answers = []
    for role in answer_roles:
        answers.append({"role": "assistant", "content": column_text(data, columns[role])})
    return Conversation(
        messages=with_answer(messages + answers[:1], stage),
        system=column_text(data, columns.get("system")),
        tools=column_tools(data, columns),
        rejected=answers[1] if source.ranking else None,
        desired=column_desired(data, columns),
    )


def convert_turn_lists(data: dict, source: Source, answer_roles: tuple,
                       stage: str) -> Conversation:
    """A row whose columns hold lists of turns, such as TRL's conversational prompt and completion.

    The prompt is context, as in TRL: its answers carry no loss. An answer's column may also hold
    the whole conversation, which then begins with the prompt.
    """
    columns = source.columns
    for role in ("query", "history"):
        if data.get(columns.get(role)):
            raise ValueError(f"'{columns[role]}' cannot stand beside a list of turns; make it a "
                             "turn")
    values = [data.get(columns[role]) for role in ("prompt", *answer_roles)]
    turns = [turn for value in values if isinstance(value, list) for turn in value]
    has_openai_names = any(isinstance(turn, dict) and "role" in turn for turn in turns)
    source = replace(source, formatting="messages", tags=OPENAI_TAGS if has_openai_names else TAGS)

    prompt = turns_in(data, columns["prompt"], "user_tag", source)
    read = []
    for role in answer_roles:
        turns = turns_in(data, columns[role], "assistant_tag", source)
        check_is_object(turns[0], 1, source)
        if role_of(turns[0], source) in ("system", "user"):
            check_begins_with(turns, prompt, columns[role], columns["prompt"], source)
        else:
            turns = prompt + turns
        read.append(read_turns(turns, source))

    messages, system = read[0] if read else read_turns(prompt, source)
    messages = with_answer(messages, stage)
    if len(messages) % 2:
        raise ValueError(f"the last turn is not an answer: {NO_ANSWER}")
    rejected = None
    if source.ranking:
        *before, rejected = read[1][0]
        if before != messages[:-1]:
            raise ValueError(f"the turns before the answers in '{columns['chosen']}' and "
                             f"'{columns['rejected']}' differ")
    for message in messages[:len(read_turns(prompt, source)[0])]:
        if message["role"] in ANSWERS:
            message["train"] = False
    if system is None:
        system = column_text(data, columns.get("system"))
    return Conversation(messages, system, column_tools(data, columns), rejected,
                        column_desired(data, columns))


def convert_whole_pair(data: dict, source: Source) -> Conversation:
    """A pair of two whole conversations: what both begin with is the prompt, as in TRL."""
    columns = source.columns
    read = [read_turns(turns_in(data, columns[role], "assistant_tag", source), source)
            for role in ("chosen", "rejected")]
    for role, (messages, _) in zip(("chosen", "rejected"), read):
        if not messages or len(messages) % 2:
            raise ValueError(f"'{columns[role]}' must end with an answer: without a column of the "
                             "prompt it holds the whole conversation")
    (messages, system), (others, other_system) = read
    if messages[:-1] != others[:-1] or system != other_system:
        raise ValueError(f"'{columns['chosen']}' and '{columns['rejected']}' differ before their "
                         "last answers; a pair has one prompt, and one answer to it in each")
    if system is None:
        system = column_text(data, columns.get("system"))
    tools = column_tools(data, columns)
    if source.formatting == "openai":
        system = openai_system(system, tools)
    return Conversation(messages, system, tools, others[-1], column_desired(data, columns))


def is_list_of_turns(value) -> bool:
    """Whether a column holds turns instead of a text."""
    return isinstance(value, list) and any(isinstance(turn, dict) for turn in value)


def turns_in(data: dict, column: str, speaker_tag: str, source: Source) -> list[dict]:
    """The turns in a column; a text is one turn of this speaker."""
    if column not in data:
        raise ValueError(f"the column '{column}' is missing")
    value = data[column]
    if isinstance(value, str):
        tags = source.tags
        return [{tags["role_tag"]: tags[speaker_tag], tags["content_tag"]: value}]
    if not is_list_of_turns(value):
        raise ValueError(f"'{column}' must be text or a list of turns, not {excerpt(value)}")
    return value


def check_begins_with(turns: list, prompt: list, column: str, prompt_column: str, source: Source):
    """Raise ValueError unless the turns, maybe after a system turn, begin with the prompt."""
    content_tag = source.tags["content_tag"]
    texts = [turn.get(content_tag) for turn in turns if isinstance(turn, dict)]
    wanted = [turn.get(content_tag) for turn in prompt if isinstance(turn, dict)]
    if wanted not in (texts[:len(wanted)], texts[1:1 + len(wanted)]):
        raise ValueError(f"'{column}' begins with a question, but not with the turns of "
                         f"'{prompt_column}'")


def history_messages(data: dict, column: str | None) -> list[dict]:
    """The turns before the question, from a column of [question, answer] pairs."""
    messages = []
    for pair in data.get(column) or []:
        if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
            raise ValueError(f"'{column}' must be a list of pairs [question, answer]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


# ---- sharegpt, openai, messages: a list of turns ----------------------------------------------


def convert_messages(data: dict, source: Source, stage: str) -> Conversation:
    """A row with a list of turns and, of a pair, its two answers, each a turn."""
    columns = source.columns
    turns = data.get(columns["messages"])
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'{columns['messages']}' must be a list of turns that is not empty")
    messages, system = read_turns(turns, source)

    rejected = None
    if source.ranking:
        check_ends_with_question(messages, columns)
        chosen = read_answer(data, columns["chosen"], source)
        rejected = read_answer(data, columns["rejected"], source)
        messages.append(chosen)
    else:
        messages = with_answer(messages, stage)
    if not messages or len(messages) % 2:
        raise ValueError(f"the last turn is not an answer: {NO_ANSWER}")

    tools = column_tools(data, columns)
    if system is None:
        system = column_text(data, columns.get("system"))
    if source.formatting == "openai":
        system = openai_system(system, tools)
    return Conversation(messages, system, tools, rejected, column_desired(data, columns))


def read_turns(turns: list, source: Source) -> tuple[list[dict], str | None]:
    """(messages, system text or None). Raises ValueError for a turn out of order.

    Consecutive tool turns become one message, except in sharegpt.
    """
    messages, system = [], None
    for number, turn in enumerate(turns, 1):
        check_is_object(turn, number, source)
        role = role_of(turn, source)
        expected = ANSWERS if len(messages) % 2 else ("user", "observation")
        is_system = role == "system" and number == 1
        is_more_results = (role == "observation" and source.formatting != "sharegpt"
                           and bool(messages) and messages[-1]["role"] == "observation")
        if not (is_system or role in expected or is_more_results):
            raise ValueError(f"turn {number} {speaker_in_words(turn, source)}, expected "
                             f"{role_words(expected, source)}")
        try:
            message = message_of(turn, role, source)
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None

        if is_system:
            system = message["content"]
        elif is_more_results:
            messages[-1]["content"] += ("\n</tool_response>\n<tool_response>\n"
                                        + message["content"])
        else:
            messages.append(message)
    return messages, system


def check_is_object(turn, number: int, source: Source):
    """Raise ValueError for a turn that is text, a number or a list."""
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is {excerpt(turn)}, not an object with "
                         f"'{source.tags['role_tag']}' and '{source.tags['content_tag']}'")


def check_ends_with_question(messages: list[dict], columns: dict):
    """Raise ValueError unless the answers of a pair can follow these messages."""
    if len(messages) % 2:
        return
    if not messages:
        raise ValueError(f"'{columns['messages']}' contains no question")
    raise ValueError(f"'{columns['messages']}' ends with an answer, but the answers are in "
                     f"'{columns['chosen']}' and '{columns['rejected']}'")


def read_answer(data: dict, column: str, source: Source) -> dict:
    """One of the two answers of a pair, as a message."""
    turn = data.get(column)
    if isinstance(turn, list) and len(turn) == 1:
        turn = turn[0]
    if not isinstance(turn, dict):
        raise ValueError(f"'{column}' must be one turn, an object like the turns of the "
                         f"conversation, not {excerpt(turn)}")
    role = role_of(turn, source)
    if role not in ANSWERS:
        raise ValueError(f"'{column}' {speaker_in_words(turn, source)}, expected "
                         f"{role_words(ANSWERS, source)}")
    try:
        return message_of(turn, role, source)
    except ValueError as error:
        raise ValueError(f"'{column}': {error}") from None


def role_of(turn: dict, source: Source) -> str | None:
    """system, user, assistant, function or observation; None for a speaker that no tag names."""
    roles = {}
    for role in ("system", "function", "observation", "assistant", "user"):
        roles[source.tags.get(f"{role}_tag")] = role
    roles[None] = None
    roles.setdefault("developer", "system")         # OpenAI's newer word for it
    return roles.get(speaker_of(turn, source))


def speaker_of(turn: dict, source: Source) -> str:
    """The word that the data use for the speaker of a turn."""
    return str(turn.get(source.tags["role_tag"]))


def speaker_in_words(turn: dict, source: Source) -> str:
    """Who speaks in a turn, or that it does not say so by the key role_tag, for a message."""
    role_tag = source.tags["role_tag"]
    if role_tag in turn:
        return f"is by '{speaker_of(turn, source)}'"
    return (f"has no '{role_tag}' (keys: {excerpt(', '.join(map(str, turn)))}; role_tag and "
            "content_tag under tags in dataset_info.json name the keys of a turn)")


def role_words(roles: tuple[str, ...], source: Source) -> str:
    """The words that the data use for these roles, for a message."""
    words = []
    for role in ("function", "observation", "assistant", "user"):
        word = source.tags.get(f"{role}_tag")
        if role in roles and word:
            words.append(word)
    return " or ".join(words)


def message_of(turn: dict, role: str, source: Source) -> dict:
    """A turn as a message. tool_calls become a function message, except in sharegpt."""
    return message_of_turn(turn, role, source.tags["content_tag"],
                        calls=source.formatting != "sharegpt",
                        keep_arguments=source.formatting == "openai")


def openai_system(system: str, tools: str) -> str:
    """The system text of LLaMA-Factory's "openai": it adds one family's switch for all families."""
    if tools:
        return system + "\n" if system else ""
    if "detailed thinking on" in system or "detailed thinking off" in system:
        return system
    return f"{system}\ndetailed thinking off" if system else "detailed thinking off"


# ---- columns ----------------------------------------------------------------------------------


def column_tools(data: dict, columns: dict) -> str:
    """The descriptions of tools, as JSON."""
    tools = data.get(columns.get("tools"))
    if isinstance(tools, (list, dict)):
        return json.dumps(tools, ensure_ascii=False)
    return column_text(data, columns.get("tools"))


def column_desired(data: dict, columns: dict) -> bool | None:
    """Whether the answer is a good one; None without such a column."""
    column = columns.get("kto_tag")
    if column is None:
        return None
    value = data.get(column)
    if not isinstance(value, bool):
        raise ValueError(f"'{column}' must be true (a good answer) or false, not {excerpt(value)}")
    return value


# ---- placeholders and messages ----------------------------------------------------------------


def fill_placeholders(conversation: Conversation, values: dict) -> Conversation:
    """Replace {{name}} by values["name"] in all texts; a name without a value is left alone."""
    if not values:
        return conversation

    def fill_text(text: str) -> str:
        return PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), text)

    def fill_message(message: dict) -> dict:
        texts = {key: fill_text(message[key]) for key in MESSAGE_TEXTS if key in message}
        return {**message, **texts}

    return conversation._replace(
        messages=[fill_message(message) for message in conversation.messages],
        system=fill_text(conversation.system),
        rejected=conversation.rejected and fill_message(conversation.rejected),
    )
