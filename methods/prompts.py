"""Prompts that the model itself answers: rows become prompts, and batches of them.

Stages ppo and grpo: a row's example has two sequences, the ids of the prompt, and the row itself as
JSON text, which a reward function is given. The text is kept in negative numbers, three bytes in
each, so that it lies beside the ids in the token cache and is never taken for tokens. The row's own
answer is not part of the prompt; a reward may compare with it.

Stage distill: the row as in stage sft, and where the model answers itself, the ids of its prompt.

Requires: data.py (Batch), templates.py.
Next: methods/rollouts.py, runtime/build.py (STAGES).
"""
import hashlib
import json
from dataclasses import dataclass, field

import numpy as np

from data import (IGNORE, Batch, EncodedRows, Example, collate, encode_conversations, label_turns,
                  loss_marks, settings_of)
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

    @property
    def words(self) -> str:
        """What decides how it is answered: the row, wherever its dataset lies."""
        return json.dumps(self.row["row"])


def check_room(model, prompt: Prompt, name: str):
    """Raise ValueError for a prompt, called `name`, that leaves no room for an answer."""
    context = context_length(model.config)
    if len(prompt.input_ids) >= context:
        raise ValueError(
            f"{name} has {len(prompt.input_ids):,} tokens, and the model reads at most "
            f"{context:,}, the answer included. Set cutoff_len: {context - 1} and skip_bad_rows: "
            "true to leave such rows out")


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
        rendered.append((row, conversation, prompt_pieces(turns)))
    if check_only:
        return
    ids = encode_pieces(tokenizer, [pieces for _, _, pieces in rendered])
    for (row, conversation, _), prompt in zip(rendered, ids):
        if not fits(prompt, row, config, encoded):
            continue
        question = conversation.messages[-2]["content"]
        text = json.dumps({"where": row.where, "prompt": question, "row": row.data},
                          ensure_ascii=False, default=str)
        add_prompt(encoded, row, prompt, pack_text(text))


def prompt_pieces(turns: list) -> list:
    """The pieces of text before the last answer. turns: of templates.render_turns."""
    *earlier, (source, _) = turns
    return [piece for turn in earlier for pieces in turn for piece in pieces] + source


def fits(prompt: list[int], row, config, encoded: EncodedRows) -> bool:
    """Whether a prompt has at most cutoff_len tokens; a row with a longer one is a bad row."""
    if len(prompt) <= config.cutoff_len:
        return True
    encoded.reject(row, ValueError(
        f"its prompt has {len(prompt)} tokens, cutoff_len: {config.cutoff_len}; a prompt is not "
        "truncated: raise cutoff_len"))
    return False


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


# ---- stage distill: the row, and its prompt ------------------------------------------------------


class RowPrompt(Prompt):
    """The prompt of a row. text: a checksum of both."""

    @property
    def words(self) -> str:
        """What decides how it is answered."""
        return self.text


@dataclass
class RowBatch(Batch):
    """A micro-batch of rows. prompts: where the model answers itself, those of the rows."""
    prompts: list[RowPrompt] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)   # the rows


def encode_answered(batch: list, config, tokenizer, template, encoded: EncodedRows,
                    check_only: bool = False):
    """Stage distill: add an example for each row, as in stage sft; with distill_lambda, its prompt.

    batch: [(row, conversation), ...]. A prompt that does not fit makes a bad row.
    """
    if not config.samples_replies:
        return encode_conversations(batch, config, tokenizer, template, encoded, check_only)
    settings = settings_of(config)
    rendered = []
    for row, conversation in batch:
        said = (conversation.messages, conversation.system, conversation.tools, settings)
        try:
            rendered.append((row, conversation, render_turns(template, tokenizer, *said),
                             render_turns(template, tokenizer, *said, only_last=True)))
        except ValueError as error:     # a tool call or tool description that cannot be read
            encoded.reject(row, error)
    if check_only or encoded.bad and not config.skip_bad_rows:
        return
    pieces = [part for _, _, turns, asked in rendered
              for part in (*(half for turn in turns for half in turn), prompt_pieces(asked))]
    ids = iter(encode_pieces(tokenizer, pieces))
    closing_eos = tokenizer.eos_id if template.efficient_eos else None
    for row, conversation, turns, _ in rendered:
        turns = [(next(ids), next(ids)) for _ in turns]
        prompt = next(ids)
        if fits(prompt, row, config, encoded):
            labeled = label_turns(turns, config.cutoff_len, mask_history=config.mask_history,
                                  closing_eos=closing_eos,
                                  marks=loss_marks(conversation.messages))
            full_length = sum(map(len, sum(turns, ()))) + (closing_eos is not None)
            add_answered(encoded, row, *labeled, prompt, full_length)


def add_answered(encoded: EncodedRows, row, input_ids: list[int], labels: list[int],
                 prompt: list[int], full_length: int):
    """Add one row's example: the row, and behind it its prompt without labels."""
    supervised = encoded.count(row, input_ids, labels, full_length)
    encoded.has_targets |= any(label != IGNORE for label in labels[1:])
    encoded.add(input_ids + prompt, labels + [IGNORE] * len(prompt), supervised > 0,
                [len(input_ids), len(prompt)])


def collate_answered(groups: list[list[Example]], alike: bool = False) -> RowBatch:
    """The rows of some micro-batches, end to end, and their prompts where they have them."""
    examples = [example for group in groups for example in group]
    rows = [example.sequence(0) for example in examples]
    prompts = [prompt_behind(example) for example in examples if len(example.lengths) > 1]
    return RowBatch(**vars(collate(rows)), prompts=prompts, examples=rows)


def prompt_behind(example: Example) -> RowPrompt:
    """The prompt behind a row."""
    ids = np.ascontiguousarray(example.input_ids, np.int32)
    return RowPrompt(example.sequence(1).input_ids.tolist(),
                     hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest())
