"""One turn of a conversation: its text, its thought, its tool calls, and whether it is learned.

    message = message_of_turn(turn, "assistant", content_tag="content")

A message is {"role", "content"}, and of an answer maybe "thought" (its reasoning), "lead" (what it
says before a tool call) and "train" (False: context only, without loss).

Requires: text/plain_text.py.
Next: text/conversations.py.

Names of keys: OpenAI's fine-tuning API (weight), axolotl (train, training), ms-swift (loss), verl
(trainable, loss_mask), slime (step_loss_mask), torchtune (masked); reasoning_content is DeepSeek's
and Qwen's, reasoning OpenRouter's and vLLM's, thinking Ollama's.
"""
import json

from text.plain_text import excerpt

ANSWERS = ("assistant", "function")     # roles of the messages that a model learns to write
THOUGHTS = ("reasoning_content", "reasoning", "thinking")       # the same thing, of several vendors
LEARNED = ("weight", "train", "training", "trainable", "loss", "loss_mask", "step_loss_mask")
MASKED = ("mask", "masked")             # true: no loss
TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA = {"image": "images", "img": "images", "audio": "audio", "video": "videos", "file": "files"}


def keys_read(tags: dict, calls: bool) -> set[str]:
    """The keys of a turn that are read. calls: also tool_calls."""
    keys = {tags["role_tag"], tags["content_tag"], *THOUGHTS, *LEARNED, *MASKED}
    return keys | {"tool_calls"} if calls else keys


def message_of_turn(turn: dict, role: str, content_tag: str, calls: bool = True,
                 keep_arguments: bool = False) -> dict:
    """A turn as a message. calls: an answer's tool_calls become a function message."""
    text, parts_thought = read_content(turn, content_tag)
    message = {"role": role, "content": text}
    if thought := read_thought(turn, parts_thought):
        if role not in ANSWERS:
            raise ValueError(f"a thought in a turn that is no answer: {excerpt(thought)}")
        message["thought"] = thought
    tool_calls = turn.get("tool_calls") if calls else None
    if role in ANSWERS and tool_calls:
        message["role"] = "function"
        message["content"] = tool_calls_text(tool_calls, keep_arguments)
        message["lead"] = text
    trained = read_marks(turn)
    if trained is not None:
        message["train"] = trained
    return message


# ---- text -------------------------------------------------------------------------------------


def column_text(data: dict, column: str | None) -> str:
    """The text of a column; "" if it is not declared, absent or null."""
    value = data.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"'{column}' must be text, not {excerpt(value)}")
    return value


def read_content(turn: dict, content_tag: str) -> tuple[str, str]:
    """(text, thought) of a turn whose content is a text or a list of parts, which are joined."""
    parts = turn.get(content_tag)
    if not isinstance(parts, list):
        return column_text(turn, content_tag), ""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind == "thinking":
            thoughts.append(text_of_part(part, "thinking"))
        elif kind in TEXT_PARTS or kind is None and isinstance(part, dict) and "text" in part:
            texts.append(text_of_part(part, "text"))
        else:
            raise ValueError(refused_part(part, kind, content_tag))
    return "".join(texts), "".join(thoughts)


def text_of_part(part: dict, key: str) -> str:
    """The text of a part; Mistral writes a thought as a list of parts itself."""
    if isinstance(part.get(key), list):
        return read_content(part, key)[0]
    return column_text(part, key)


def refused_part(part, kind, content_tag: str) -> str:
    """The message for a part of a content that holds no text."""
    if not isinstance(kind, str):
        return (f"'{content_tag}' holds {excerpt(part)}, expected "
                '{"type": "text", "text": …}')
    for word, media in MEDIA.items():
        if word in kind:
            return (f"'{content_tag}' holds a part of type '{kind}': {media} are not supported, "
                    "only text is")
    return f"'{content_tag}' holds a part of type '{kind}'; only parts of type 'text' can be read"


def read_thought(turn: dict, parts_thought: str = "") -> str:
    """The thought of a turn, from the keys THOUGHTS and from its content; "" without one."""
    found = {key: column_text(turn, key) for key in THOUGHTS}
    found["content"] = parts_thought
    found = {key: text for key, text in found.items() if text.strip()}
    if len(set(found.values())) > 1:
        raise ValueError(f"{' and '.join(found)} hold different thoughts; leave one of them")
    return next(iter(found.values()), "")


# ---- tool calls -------------------------------------------------------------------------------


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
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"tool_calls cannot be read ({reason})") from None
    return json.dumps(functions, ensure_ascii=False)


# ---- marks: is a turn learned? ----------------------------------------------------------------


def read_marks(turn: dict) -> bool | None:
    """Whether the turn is to be learned, as its keys LEARNED and MASKED say; None: no mark."""
    found = {}
    for key in LEARNED:
        if turn.get(key) is not None:
            found[key] = mark_value(key, turn[key])
    for key in MASKED:
        if turn.get(key) is not None:
            if not isinstance(turn[key], bool):     # 1 is "masked" to some tools, "learned" to some
                raise ValueError(f"'{key}': {excerpt(turn[key])} can mean both; write true (no "
                                 "loss on this turn) or false")
            found[key] = not turn[key]
    if len(set(found.values())) > 1:
        raise ValueError(f"the marks {' and '.join(found)} contradict each other")
    return next(iter(found.values()), None)


def mark_value(key: str, value) -> bool:
    """A mark as a bool: true and 1 are learned, false and 0 are not."""
    if value in (0, 1):     # also False, True, 0.0 and 1.0
        return bool(value)
    raise ValueError(f"'{key}': {excerpt(value)} cannot be honored: a turn is learned (1, true) or "
                     "not (0, false), and there is no weight between")
