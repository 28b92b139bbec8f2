"""Rows of the alpaca and chat layouts, converted to conversations.

    conversation = convert(row, stage)      # messages, system, tools

A `Source` says how the rows of a dataset are laid out: which column holds which role, and for chat
layouts which words stand for the speakers. text/data_files.py makes it from dataset_info.json.

Requires: nothing.
Next: text/data_files.py.

The layouts are LLaMA-Factory's; docs/differences.md lists what differs on purpose.
"""
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
ANSWERS = ("assistant", "function")     # roles of the messages that a model learns to write
PAIRS = ("rm", "dpo")                   # stages that compare two answers
JUDGED = ("kto",)                       # stages that know good answers from bad ones
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

    A message is {"role": user | assistant | observation | function, "content": str}; questions
    (user, observation) and answers (assistant, function) alternate.
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
        is_csv = row.file.suffix == ".csv"
        raise ValueError("wrong number of fields" if is_csv else "not a JSON object")
    if row.source.formatting == "alpaca":
        conversation = convert_alpaca(row.data, row.source, stage)
    else:
        conversation = convert_messages(row.data, row.source)
    check_utf8(conversation)
    if stage == "pt":
        return Conversation(conversation.messages[:1])

    for number, message in enumerate(conversation.messages, 1):
        if message["role"] in ANSWERS and not message["content"].strip():
            raise ValueError(f"answer {(number + 1) // 2} is empty, there is nothing to learn")
    rejected = conversation.rejected
    if rejected is not None and not rejected["content"].strip():
        column = row.source.columns["rejected"]
        raise ValueError(f"the answer in '{column}' is empty, there is nothing to learn")
    return conversation


def check_utf8(conversation: Conversation):
    """Raise ValueError for bytes of another encoding, which were read as lone surrogates."""
    messages = list(conversation.messages)
    if conversation.rejected is not None:
        messages.append(conversation.rejected)
    texts = [conversation.system, conversation.tools]
    texts += [message["content"] for message in messages]
    for text in texts:
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            message = "it holds bytes that are not UTF-8 (iconv converts a file)"
            raise ValueError(message) from None


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
    messages = history_messages(data, columns.get("history"))
    for role in ("prompt", *answer_roles):
        if columns[role] not in data:
            raise ValueError(f"the column '{columns[role]}' is missing")

    question = [column_text(data, columns.get(role)) for role in ("prompt", "query")]
    messages.append({"role": "user", "content": "\n".join(text for text in question if text)})
    answers = []
    for role in answer_roles:
        answers.append({"role": "assistant", "content": column_text(data, columns[role])})
    return Conversation(
        messages=messages + answers[:1],
        system=column_text(data, columns.get("system")),
        tools=column_tools(data, columns),
        rejected=answers[1] if source.ranking else None,
        desired=column_desired(data, columns),
    )


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


def convert_messages(data: dict, source: Source) -> Conversation:
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
    elif not messages or len(messages) % 2:
        raise ValueError("the last turn is not an answer")

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
    content_tag = source.tags["content_tag"]
    for number, turn in enumerate(turns, 1):
        role = role_of(turn, source)
        expected = ANSWERS if len(messages) % 2 else ("user", "observation")
        if role == "system" and number == 1:
            system = column_text(turn, content_tag)
        elif role in expected:
            messages.append(message_of(turn, role, source))
        elif (role == "observation" and source.formatting != "sharegpt"
              and messages[-1]["role"] == "observation"):
            result = column_text(turn, content_tag)
            messages[-1]["content"] += "\n</tool_response>\n<tool_response>\n" + result
        else:
            raise ValueError(f"turn {number} is by '{speaker_of(turn, source)}', expected "
                             f"{role_words(expected, source)}")
    return messages, system


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
    if not isinstance(turn, dict):
        raise ValueError(f"'{column}' must be one turn, an object like the turns of the "
                         f"conversation, not {excerpt(turn)}")
    role = role_of(turn, source)
    if role not in ANSWERS:
        raise ValueError(f"'{column}' is by '{speaker_of(turn, source)}', expected "
                         f"{role_words(ANSWERS, source)}")
    return message_of(turn, role, source)


def role_of(turn, source: Source) -> str | None:
    """system, user, assistant, function or observation; None for a speaker that no tag names."""
    roles = {}
    for role in ("system", "function", "observation", "assistant", "user"):
        roles[source.tags.get(f"{role}_tag")] = role
    roles[None] = None
    return roles.get(speaker_of(turn, source))


def speaker_of(turn, source: Source) -> str:
    """The word that the data use for the speaker of a turn."""
    if not isinstance(turn, dict):
        return excerpt(turn)
    return str(turn.get(source.tags["role_tag"]))


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
    calls = turn.get("tool_calls") if source.formatting != "sharegpt" else None
    if role in ANSWERS and calls:
        text = tool_calls_text(calls, keep_arguments=source.formatting == "openai")
        return {"role": "function", "content": text}
    return {"role": role, "content": column_text(turn, source.tags["content_tag"])}


def tool_calls_text(calls: list[dict], keep_arguments: bool) -> str:
    """OpenAI's tool_calls as the JSON list of {name, arguments} that a function message holds.

    In tool_calls, `arguments` is JSON text. keep_arguments: it stays text and is encoded a second
    time later, as in LLaMA-Factory's "openai".
    """
    try:
        functions = [dict(call["function"]) for call in calls]
        for function in [] if keep_arguments else functions:
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"tool_calls cannot be read ({reason})") from None
    return json.dumps(functions, ensure_ascii=False)


def openai_system(system: str, tools: str) -> str:
    """The system text of LLaMA-Factory's "openai": it adds one family's switch for all families."""
    if tools:
        return system + "\n" if system else ""
    if "detailed thinking on" in system or "detailed thinking off" in system:
        return system
    return f"{system}\ndetailed thinking off" if system else "detailed thinking off"


# ---- columns ----------------------------------------------------------------------------------


def column_text(data: dict, column: str | None) -> str:
    """The text of a column; "" if it is not declared, absent or null."""
    value = data.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"'{column}' must be text, not {excerpt(value)}")
    return value


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
        return {**message, "content": fill_text(message["content"])}

    return conversation._replace(
        messages=[fill_message(message) for message in conversation.messages],
        system=fill_text(conversation.system),
        rejected=conversation.rejected and fill_message(conversation.rejected),
    )


def excerpt(value, limit: int = 200) -> str:
    """A row, or a value in it, for a message: JSON, shortened, printable whatever bytes it has."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit} more characters)"
