"""Prompts that the model itself answers (stage grpo): rows become prompts, and batches of them.

A row's example has two sequences: the ids of the prompt, and the row itself as JSON text, which a
reward function is given. The text is kept in negative numbers, three bytes in each, so that it
lies beside the ids in the token cache and is never taken for tokens. The row's own answer is not
part of the prompt; a reward may compare with it.

Requires: data.py (Batch), templates.py.
Next: methods/rollouts.py, runtime/build.py (STAGES).
"""
import json
from dataclasses import dataclass, field

import numpy as np

from data import IGNORE, Batch, EncodedRows, Example, collate, settings_of
from generate import context_length
from templates import encode_pieces, render_turns


def pack_text(text: str) -> list[int]:
    """A text as negative numbers, three bytes of UTF-8 in each; blanks fill up the last one."""
    data = text.encode()
    data += b" " * (-len(data) % 3)
    a, b, c = np.frombuffer(data, np.uint8).astype(np.int32).reshape(-1, 3).T
    return (-1 - (a << 16 | b << 8 | c)).tolist()


def unpack_text(numbers) -> str:
    """The text that pack_text has packed, and maybe blanks."""
    numbers = -1 - np.asarray(numbers, np.int32)
    data = np.stack((numbers >> 16, numbers >> 8 & 255, numbers & 255), 1).astype(np.uint8)
    return data.tobytes().decode()


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered. text: JSON, see encode_prompts; it tells rows apart."""
    input_ids: list[int]
    text: str

    @property
    def row(self) -> dict:
        """{"where": for messages, "prompt": the last question, "row": the row of the dataset}."""
        return json.loads(self.text)


def check_room(model, prompt: Prompt):
    """Raise ValueError for a prompt that leaves no room for an answer."""
    context = context_length(model.config)
    if len(prompt.input_ids) >= context:
        raise ValueError(
            f"{prompt.row['where']}: its prompt has {len(prompt.input_ids):,} tokens, and the "
            f"model reads at most {context:,}, the answer included. Set cutoff_len: {context - 1} "
            "and skip_bad_rows: true to leave such rows out")


@dataclass
class PromptBatch(Batch):
    """A micro-batch of prompts; num_items is their number."""
    prompts: list[Prompt] = field(default_factory=list)


def encode_prompts(batch: list, config, tokenizer, template, encoded: EncodedRows,
                   check_only: bool = False):
    """Stage grpo: add a prompt for each row to `encoded`; one that does not fit is a bad row.

    batch: [(row, conversation), …].
    """
    settings = settings_of(config)
    rendered = []
    for row, conversation in batch:
        try:
            turns = render_turns(template, tokenizer, conversation.messages, conversation.system,
                                 conversation.tools, settings, only_last=True)
        except ValueError as error:     # a tool call or tool description that cannot be read
            encoded.reject(row, error)
            continue
        *earlier, (source, _) = turns
        history = [piece for turn in earlier for pieces in turn for piece in pieces]
        rendered.append((row, conversation, history + source))
    if check_only:
        return
    ids = encode_pieces(tokenizer, [pieces for _, _, pieces in rendered])
    for (row, conversation, _), prompt in zip(rendered, ids):
        if len(prompt) > config.cutoff_len:
            encoded.reject(row, ValueError(
                f"its prompt has {len(prompt)} tokens, cutoff_len: {config.cutoff_len}; a prompt "
                "is not truncated"))
            continue
        question = conversation.messages[-2]["content"]
        text = json.dumps({"where": row.where, "prompt": question, "row": row.data},
                          ensure_ascii=False, default=str)
        add_prompt(encoded, row, prompt, pack_text(text))


def add_prompt(encoded: EncodedRows, row, prompt: list[int], text: list[int]):
    """Add one row's example. No token carries loss yet: the answers are not there."""
    encoded.counts_of(row).lengths.append(len(prompt))
    encoded.has_targets = True
    numbers = prompt + text
    encoded.add(numbers, [IGNORE] * len(numbers), True, [len(prompt), len(text)])


def collate_prompts(groups: list[list[Example]], alike: bool = False) -> PromptBatch:
    """The prompts of some micro-batches, end to end."""
    examples = [example for group in groups for example in group]
    firsts = [example.sequence(0) for example in examples]
    prompts = [Prompt(first.input_ids.tolist(), unpack_text(example.sequence(1).input_ids))
               for first, example in zip(firsts, examples)]
    batch = collate(firsts)
    fields = {**vars(batch), "num_items": len(prompts), "batch_sizes": tuple(map(len, groups))}
    return PromptBatch(**fields, prompts=prompts)
