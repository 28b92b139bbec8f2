"""A conversation in OpenAI's shape -> the ids of its prompt, up to where the answer begins.

    ids = prompt_of_messages([{"role": "user", "content": "Hello"}], None, text, settings)

Requires: text/conversations.py (read_turns), templates.py.
Next: serving/service.py, evals/answer_file.py.
"""
import json

from templates import Settings, encode_prompt
from text.conversations import OPENAI_TAGS, read_turns
from text.data_files import Source
from text.load_text import Text

TURNS = Source("messages", (), formatting="messages", tags=OPENAI_TAGS)


def prompt_of_messages(messages: list[dict], tools: list | None, text: Text,
                       settings: Settings) -> list[int]:
    """Ids of the prompt. Raises ValueError for messages out of order, or that cannot be read."""
    turns = [{**turn, "role": "system"}
             if isinstance(turn, dict) and turn.get("role") == "developer" else turn
             for turn in messages]
    found, system = read_turns(turns, TURNS)
    if len(found) % 2 == 0:
        raise ValueError("the last message must be a user's or a tool's: it is answered")
    answer = {"role": "assistant", "content": ""}
    described = json.dumps(tools, ensure_ascii=False) if tools else None
    prompt, _ = encode_prompt(text.template, text.tokenizer, [*found, answer], system, described,
                              settings)
    return prompt
