"""Rows of the alpaca and chat layouts as conversations.

Requires: text/tool_calls.py.
Next: text/data_files.py.
"""
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# What holds when an entry of dataset_info.json names no columns (tags). As soon as it names one, only those count.
# formatting "messages" is ours: OpenAI's layout without the surprises of LLaMA-Factory's "openai".
COLUMNS = {"alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
           "sharegpt": {"messages": "conversations"}, "openai": {"messages": "conversations"},
           "messages": {"messages": "messages"}}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
               "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
ROLES = ("prompt", "query", "response", "history", "messages", "system", "tools", "chosen", "rejected", "kto_tag")
PAIRS, JUDGED = ("rm", "dpo"), ("kto",)     # the stages that compare two answers, and that know good answers from bad
REQUIRED_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


@dataclass(frozen=True)
class Source:
    """One dataset: its files, and how a row is laid out. formatting "": to be recognised from the rows."""
    name: str
    files: tuple
    formatting: str = ""
    columns: dict = field(default_factory=dict)      # role -> name of the column
    tags: dict = field(default_factory=dict)         # role_tag, user_tag, … -> the word used in the rows
    num_samples: int | None = None
    ranking: bool = False                            # a row has two answers, the better first


class Row(NamedTuple):
    """A row as read. data: a dict, or the text of a line that could not be read. number: from 1, in its file."""
    file: Path
    number: int
    data: object
    source: Source = None

    @property
    def dataset(self) -> str:
        return self.source.name

    @property
    def excerpt(self) -> str:
        """The row, shortened for a message."""
        return shown(self.data)

    @property
    def where(self) -> str:
        name = "" if self.source.name == str(self.file) else f"dataset '{self.source.name}', "
        return f"{name}{self.file} row {self.number}"


class Conversation(NamedTuple):
    """What templates.py renders. A message: {"role": user | assistant | observation | function, "content": str}."""
    messages: list
    system: str = ""
    tools: str = ""                 # JSON
    rejected: dict | None = None    # of a pair: the message that is worse than the last one
    desired: bool | None = None     # is the last answer a good one? None: nobody has judged it


def check_stage(ranking: bool, judged: bool, where: str, stage: str):
    """Raises ValueError where rows of this kind are not what the stage learns from."""
    if ranking and stage not in PAIRS:
        raise ValueError(f"{where} has preference pairs (ranking: true), which stage: {stage} cannot learn from; stages "
                         f"{' and '.join(PAIRS)} can")
    if judged and not ranking and stage not in JUDGED:
        raise ValueError(f"{where} has good and bad answers (kto_tag), which stage: {stage} cannot learn from; stage: kto can")
    if stage in PAIRS and not ranking:
        raise ValueError(f"{where} has no preference pairs, which stage: {stage} learns from. If its rows have two answers, "
                         "write in its entry of dataset_info.json ranking: true, and columns chosen and rejected")
    if stage in JUDGED and not judged:
        raise ValueError(f"{where} does not say which answers are good, which stage: {stage} learns from. If its rows have a "
                         "column of true and false, name it in the entry of dataset_info.json: columns: kto_tag")


def convert(row: Row, stage: str = "sft") -> Conversation:
    """One row as a conversation; in stage pt its text as a single user message. Raises ValueError: what is bad."""
    if not isinstance(row.data, dict):
        raise ValueError("wrong number of fields" if row.file.suffix == ".csv" else "not a JSON object")
    convert_row = convert_alpaca if row.source.formatting == "alpaca" else convert_messages
    found = convert_row(row.data, row.source, stage)
    messages = found.messages + [found.rejected] * (found.rejected is not None)
    for text in (found.system, found.tools, *(message["content"] for message in messages)):
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            raise ValueError("it holds bytes that are not UTF-8 (iconv converts a file)") from None
    if stage == "pt":
        return Conversation(found.messages[:1])
    for number, message in enumerate(found.messages, 1):
        if message["role"] in ("assistant", "function") and not message["content"].strip():
            raise ValueError(f"answer {(number + 1) // 2} is empty, there is nothing to learn")
    if found.rejected is not None and not found.rejected["content"].strip():
        raise ValueError(f"the answer in '{row.source.columns['rejected']}' is empty, there is nothing to learn")
    return found


def convert_alpaca(data: dict, source: Source, stage: str) -> Conversation:
    """Columns prompt, query, response (or chosen and rejected) and, where declared, history ([question, answer] pairs),
    system, tools, kto_tag."""
    columns, messages = source.columns, []
    for pair in data.get(columns.get("history")) or []:
        if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
            raise ValueError(f"'{columns['history']}' must be a list of pairs [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answers = () if stage == "pt" else ("chosen", "rejected") if source.ranking else ("response",)
    for role in ("prompt", *answers):
        if columns[role] not in data:
            raise ValueError(f"the column '{columns[role]}' is missing")
    asked = [text_in(data, columns.get(role)) for role in ("prompt", "query")]
    messages.append({"role": "user", "content": "\n".join(text for text in asked if text)})
    answers = [{"role": "assistant", "content": text_in(data, columns[role])} for role in answers]
    return Conversation(messages + answers[:1], text_in(data, columns.get("system")), tools_in(data, columns),
                        answers[1] if source.ranking else None, desired_in(data, columns))


def convert_messages(data: dict, source: Source, stage: str) -> Conversation:
    """A list of turns, and of a pair its two answers, each a turn. "openai" and "messages" may have OpenAI's tool_calls,
    and several tool turns in a row."""
    columns, tags, strict = source.columns, source.tags, source.formatting == "sharegpt"
    turns = data.get(columns["messages"])
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'{columns['messages']}' must be a list of turns, and not an empty one")
    messages, system = [], None
    for number, turn in enumerate(turns, 1):
        role = role_of(turn, source)
        wanted = ("assistant", "function") if len(messages) % 2 else ("user", "observation")
        if role == "system" and number == 1:
            system = text_in(turn, tags["content_tag"])
        elif role in wanted:
            messages.append(message_of(turn, role, source))
        elif role == "observation" and not strict and messages[-1]["role"] == "observation":
            messages[-1]["content"] += "\n</tool_response>\n<tool_response>\n" + text_in(turn, tags["content_tag"])
        else:
            raise ValueError(f"turn {number} is of '{said_by(turn, source)}' where {speakers(wanted, source)} must stand")
    rejected = None
    if source.ranking:
        if len(messages) % 2 == 0:
            raise ValueError(f"'{columns['messages']}' ends with an answer, and the answers are in '{columns['chosen']}' and "
                             f"'{columns['rejected']}'" if messages else f"'{columns['messages']}' asks nothing")
        chosen, rejected = (answer_in(data, columns[role], source) for role in ("chosen", "rejected"))
        messages.append(chosen)
    elif not messages or len(messages) % 2:
        raise ValueError("the last turn is not an answer")
    tools = tools_in(data, columns)
    system = text_in(data, columns.get("system")) if system is None else system
    return Conversation(messages, openai_system(system, tools) if source.formatting == "openai" else system, tools,
                        rejected, desired_in(data, columns))


def answer_in(data: dict, column: str, source: Source) -> dict:
    """One of the two answers of a pair, as a message."""
    turn, wanted = data.get(column), ("assistant", "function")
    if not isinstance(turn, dict):
        raise ValueError(f"'{column}' must be one turn, an object like those of the conversation, not {shown(turn)}")
    role = role_of(turn, source)
    if role not in wanted:
        raise ValueError(f"'{column}' is of '{said_by(turn, source)}' where {speakers(wanted, source)} must stand")
    return message_of(turn, role, source)


def role_of(turn, source: Source) -> str | None:
    """Who speaks: system, user, assistant, function or observation; None for a word that no tag names."""
    words = {source.tags.get(f"{role}_tag"): role for role in ("system", "function", "observation", "assistant", "user")}
    return {**words, None: None}.get(said_by(turn, source))


def said_by(turn, source: Source) -> str:
    return str(turn.get(source.tags["role_tag"])) if isinstance(turn, dict) else shown(turn)


def speakers(roles, source: Source) -> str:
    """The words of the data for these roles."""
    found = [source.tags[f"{role}_tag"] for role in ("function", "observation", "assistant", "user")
             if role in roles and source.tags.get(f"{role}_tag")]
    return " or ".join(found)


def message_of(turn: dict, role: str, source: Source) -> dict:
    """A turn as a message. An assistant's tool_calls become a function message, but not in sharegpt's layout."""
    if role in ("assistant", "function") and source.formatting != "sharegpt" and turn.get("tool_calls"):
        text = tool_calls_in(turn["tool_calls"], arguments_as_text=source.formatting == "openai")
        return {"role": "function", "content": text}
    return {"role": role, "content": text_in(turn, source.tags["content_tag"])}


def desired_in(data: dict, columns: dict) -> bool | None:
    """Is the answer a good one? None where no column says so."""
    column = columns.get("kto_tag")
    if column is None:
        return None
    if not isinstance(data.get(column), bool):
        raise ValueError(f"'{column}' must be true (a good answer) or false, not {shown(data.get(column))}")
    return data[column]


def tool_calls_in(calls, arguments_as_text: bool) -> str:
    """OpenAI's tool_calls as the JSON list of {name, arguments} that a function message holds.

    `arguments` is JSON text there. Left a text it is encoded a second time later on, as in LLaMA-Factory's "openai".
    """
    try:
        functions = [dict(call["function"]) for call in calls]
        for function in functions if not arguments_as_text else []:
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tool_calls cannot be read ({type(error).__name__}: {error})") from None
    return json.dumps(functions, ensure_ascii=False)


def openai_system(system: str, tools: str) -> str:
    """The system text as LLaMA-Factory's "openai" makes it: a switch of one family's thinking, for all families."""
    if tools:
        return system + "\n" if system else ""
    if "detailed thinking on" in system or "detailed thinking off" in system:
        return system
    return f"{system}\ndetailed thinking off" if system else "detailed thinking off"


def text_in(data: dict, column: str | None) -> str:
    """The text of a column; '' where it is not declared, absent or null."""
    value = data.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"'{column}' must be text, not {shown(value)}")
    return value


def tools_in(data: dict, columns: dict) -> str:
    tools = data.get(columns.get("tools"))
    if isinstance(tools, (list, dict)):
        return json.dumps(tools, ensure_ascii=False)
    return text_in(data, columns.get("tools"))


def fill_placeholders(conversation: Conversation, values: dict) -> Conversation:
    """{{name}} -> values["name"] in the system text and every message; a name without a value stays as it stands."""
    if not values:
        return conversation

    def fill(text):
        return PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), text)
    filled = [{**message, "content": fill(message["content"])} for message in conversation.messages]
    rejected = conversation.rejected and {**conversation.rejected, "content": fill(conversation.rejected["content"])}
    return conversation._replace(messages=filled, system=fill(conversation.system), rejected=rejected)


def shown(value, limit: int = 200) -> str:
    """A row or a piece of one for a message: JSON, shortened, printable whatever bytes it holds."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"
