"""methods/prompts.py: rows as prompts, with the row itself beside them."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from data import EncodedRows, Example
from methods.prompts import collate_prompts, encode_prompts, pack_text, unpack_text
from templates import encode_prompt
from tests.common import ROOT, load_argv
from text.conversations import Conversation
from text.load_text import load_text


@pytest.mark.parametrize("text", ["", "a", "ab", "abc", "{\"ü\": \"猫 🙂\"}", "x" * 1000])
def test_a_text_survives_packing_as_negative_numbers(text):
    numbers = pack_text(text)
    assert all(-2**24 <= number < 0 for number in numbers)
    assert unpack_text(np.array(numbers, np.int32)).rstrip(" ") == text


def encoded(questions, **settings):
    config = load_argv("model_name_or_path=models/tiny", "stage=grpo",
                       f"reward={ROOT / 'data/rewards.py'}:arithmetic",
                       *(f"{key}={value}" for key, value in settings.items()))
    model_config = SimpleNamespace(model_type="qwen3", vocab_size=1600)
    text = load_text(config, ROOT / "models/tiny", [], model_config)
    rows = []
    for number, question in enumerate(questions, 1):
        row = SimpleNamespace(where=f"row {number}", data={"q": question, "猫": number},
                              dataset="d", excerpt=question)
        messages = [{"role": "user", "content": question},
                    {"role": "assistant", "content": "an answer"}]
        rows.append((row, Conversation(messages)))
    found = EncodedRows()
    encode_prompts(rows, config, text.tokenizer, text.template, found)
    return found, text


def test_a_prompt_is_that_of_chat_and_its_row_comes_with_it():
    found, text = encoded(["What is 3 + 4?", "Who?"], template="chatml")
    tokens, examples, start = list(found.tokens), [], 0
    for size, lengths in zip(found.sizes, found.rows):
        ids = np.array(tokens[start:start + size], np.int32)
        examples.append(Example(ids, np.full(size, -100, np.int32), lengths))
        start += 2 * size
    batch = collate_prompts([examples])
    assert batch.num_items == 2 and len(batch.prompts) == 2
    for number, (question, prompt) in enumerate(zip(["What is 3 + 4?", "Who?"], batch.prompts), 1):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        assert prompt.input_ids == encode_prompt(text.template, text.tokenizer, turns)[0]
        assert prompt.row == {"where": f"row {number}", "prompt": question,
                              "row": {"q": question, "猫": number}}
    assert batch.input_ids[0].tolist() == sum((prompt.input_ids for prompt in batch.prompts), [])
    assert json.loads(batch.prompts[0].text)["row"]["猫"] == 1


def test_a_prompt_is_never_truncated():
    found, _ = encoded(["What is 3 + 4? " * 9, "Who?"], template="chatml", cutoff_len=20)
    assert len(found.bad) == 1 and "a prompt is not truncated" in found.bad[0]
    assert len(found.sizes) == 1
