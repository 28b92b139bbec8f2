"""Conversations to token ids, labels, examples and batches.

    python -m runtime.preview --config configs/tiny_lora_sft.yaml       print the first examples

1. `label_turns` makes ids and labels of a conversation: the loss is on what the assistant says.
2. `truncated_lengths` decides what is kept of a turn that does not fit in cutoff_len.
3. `pack` chooses the rows that share an example (optional).
4. `encode_conversations` does all of this for the rows of a dataset.
5. `collate` lays examples end to end in one row, without padding, and shifts the labels.

Requires: templates.py, attention.py.
Next: model.py.

Masks, truncation and packing are LLaMA-Factory's, reproduced id for id; docs/differences.md lists
what differs on purpose. Packing without contamination: Krell et al., arXiv:2107.02027.
"""
import bisect
from array import array
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from attention import PackedLayout, to_device
from templates import Settings, encode_pieces, render_turns

IGNORE = -100                   # label of a token that carries no loss


@dataclass(eq=False)
class Example:
    """One training example of n tokens.

    A plain example is one sequence. A packed one holds several, between which attention is cut. An
    example is not padded, and labels are not shifted: labels[t] belongs to input_ids[t].
    """
    input_ids: np.ndarray                       # (n,) int32
    labels: np.ndarray                          # (n,) int32, IGNORE where there is no loss
    lengths: list[int]                          # tokens of each sequence, n in all
    position_ids: np.ndarray | None = None      # (n,) int32; None: 0 … n-1
    desired: bool | None = None                 # stage kto: is it a good answer?

    def sequence(self, number: int) -> "Example":
        """One sequence of the example, as an example of its own."""
        end = sum(self.lengths[:number + 1])
        tokens = slice(end - self.lengths[number], end)
        return Example(self.input_ids[tokens], self.labels[tokens], [self.lengths[number]])


# ---- labels: which tokens carry loss ----------------------------------------------------------


def label_turns(turns: list, cutoff: int, train_on_prompt: bool = False, mask_history: bool = False,
                closing_eos: int | None = None,
                marks: list[tuple[bool, bool]] | None = None) -> tuple[list[int], list[int]]:
    """Turns [(source_ids, target_ids), …] -> (input_ids, labels) of at most `cutoff` tokens.

    Targets (what the assistant says) are labels, sources are not.

    train_on_prompt: sources are labels, too.
    mask_history:    only the last target is, and the last turn has priority when room is short.
    closing_eos:     id of the eos token, for templates whose answers do not end in it: it becomes
                     the label of the next turn's first token, and it ends the row.
    marks:           for each turn whether its source and its target may be labels; None: all may.
    """
    parts = []
    used = 0 if closing_eos is None else 1
    last = len(turns) - 1
    numbers = range(last, -1, -1) if mask_history else range(last + 1)
    marks = marks or [(True, True)] * len(turns)
    for number in numbers:
        if used >= cutoff:
            break
        source, target = turns[number]
        keep_source, keep_target = truncated_lengths(len(source), len(target), cutoff - used)
        source = source[:keep_source]
        target = target[:keep_target]
        used += keep_source + keep_target

        learn_source, learn_target = marks[number]
        labels_source = train_on_prompt and learn_source
        source_labels = source if labels_source else [IGNORE] * keep_source
        if closing_eos is not None and number != numbers[0] and source:
            ends_learned = number == 0 or marks[number - 1][1]
            source_labels = [closing_eos if ends_learned else IGNORE] + source_labels[1:]
        labels_target = learn_target and not (mask_history and number < last)
        target_labels = target if labels_target else [IGNORE] * keep_target
        parts.append((source + target, source_labels + target_labels))
    kept_last = marks[last if mask_history else len(parts) - 1][1]
    if mask_history:
        parts.reverse()

    input_ids, labels = [], []
    for part_ids, part_labels in parts:
        input_ids += part_ids
        labels += part_labels
    if closing_eos is not None:
        input_ids.append(closing_eos)
        labels.append(closing_eos if kept_last else IGNORE)
    return input_ids, labels


def truncated_lengths(source: int, target: int, room: int) -> tuple[int, int]:
    """Tokens to keep of the front of a turn's source and of its target, `room` in all.

    A short target is kept whole, else a short source is, else both shrink in proportion.
    """
    if target * 2 < room:
        kept = target
    elif source * 2 < room:
        kept = min(target, room - source)
    else:
        kept = min(target, int(room * (target / (source + target))))    # in this order: rounding
    return min(source, max(room - kept, 0)), kept


# ---- pack: several rows -> one example --------------------------------------------------------


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Numbers of the rows that go together into examples of at most `capacity` tokens.

    Greedy: the longest row that still fits, until none does. Of rows of equal length the last is
    taken first, as in LLaMA-Factory; rows without a label are packed as well.
    """
    waiting = sorted((length, row) for row, length in enumerate(lengths))
    examples = []
    while waiting:
        free = capacity
        rows = []
        while fits := bisect.bisect(waiting, (free, len(lengths))):
            length, row = waiting.pop(fits - 1)
            free -= length
            rows.append(row)
        examples.append(rows)
    return examples


def packing_of(config) -> tuple[str, int]:
    """How rows are packed, and the largest number of tokens in an example.

    "no":     every row is an example.
    "apart":  the rows of an example do not see each other.
    "joined": they do; only an explicit `neat_packing: false` asks for it.
    "blocks": running text (stage pt) is one stream, cut into blocks.

    If packing is requested, LLaMA-Factory makes examples one token shorter than cutoff_len and pads
    them; ours have the same length, without the padding.
    """
    if config.compares_replies or config.samples_replies:    # two answers, or prompt and row
        return "apart", config.cutoff_len
    if config.stage == "pt":
        shorter = bool(config.given.get("packing"))     # not if it is only the stage's default
        return "no" if config.packing is False else "blocks", config.cutoff_len - shorter
    if not config.packing and not config.neat_packing:
        return "no", config.cutoff_len
    joined = config.given.get("neat_packing") is False
    return "joined" if joined else "apart", config.cutoff_len - 1


# ---- encode: rows -> examples -----------------------------------------------------------------


@dataclass
class DatasetCounts:
    """What became of the rows of one dataset."""
    rows: int = 0
    bad: int = 0                    # left out by skip_bad_rows
    truncated: int = 0
    unlearnable: int = 0            # without a token that carries loss
    first_unlearnable: str = ""     # the first of these, for the start page
    supervised: int = 0             # tokens that carry loss
    lengths: array = field(default_factory=lambda: array("i"))      # tokens of each encoded row

    def add(self, other: "DatasetCounts"):
        """Add the counts of further rows."""
        self.rows += other.rows
        self.bad += other.bad
        self.truncated += other.truncated
        self.unlearnable += other.unlearnable
        self.first_unlearnable = self.first_unlearnable or other.first_unlearnable
        self.supervised += other.supervised
        self.lengths.extend(other.lengths)


class EncodedRows:
    """Examples made of some rows, in flat arrays that are cheap to send to another process.

    A row is a RawRow of text/conversations.py; only its texts `dataset`, `where` and `excerpt` are
    used here.
    """

    def __init__(self):
        self.tokens = array("i")        # for each example its ids, then its labels
        self.sizes = array("i")         # tokens of each example
        self.learnable = array("b")     # whether each example has a label
        self.rows = []                  # for each packed example, the tokens of its rows
        self.desired = array("b")       # stage kto: is it a good answer?
        self.counts = {}                # dataset -> DatasetCounts
        self.bad = []                   # for each bad row a text: where, why, and the row
        self.unfilled = []              # (dataset, {names}, where) of answers with {{name}} in them
        self.marked_questions = {}      # dataset -> where a question is first marked as learned
        self.empty_questions = []       # (dataset, where) of rows with a question without text
        self.dropped_tail = 0           # tokens of running text that fill no block
        self.has_targets = False        # is there a label after the first token of a sequence?

    def add(self, input_ids: list[int], labels: list[int], learnable: bool,
            rows: list[int] | None = None, desired: bool | None = None):
        """Add an example. rows: tokens of each row that is packed into it."""
        self.tokens.fromlist(input_ids)
        self.tokens.fromlist(labels)
        self.sizes.append(len(input_ids))
        self.learnable.append(learnable)
        if rows is not None:
            self.rows.append(rows)
        if desired is not None:
            self.desired.append(desired)

    def counts_of(self, row) -> DatasetCounts:
        """The counts of the row's dataset."""
        return self.counts.setdefault(row.dataset, DatasetCounts())

    def reject(self, row, reason: ValueError):
        """Count a bad row, and keep the reason."""
        self.bad.append(f"{row.where}: {reason}\n    {row.excerpt}")
        self.counts_of(row).bad += 1

    def count(self, row, input_ids: list[int], labels: list[int], full_length: int) -> int:
        """Count an encoded row, of full_length tokens before truncation -> supervised tokens."""
        counts = self.counts_of(row)
        supervised = len(labels) - labels.count(IGNORE)
        counts.lengths.append(len(input_ids))
        counts.supervised += supervised
        counts.truncated += len(input_ids) < full_length
        if not supervised:
            counts.unlearnable += 1
            if not counts.first_unlearnable:
                counts.first_unlearnable = f"{row.where} ({full_length} tokens): {row.excerpt}"
        return supervised


def encode_conversations(conversations: list, config, tokenizer, template, encoded: EncodedRows,
                         check_only: bool = False):
    """Stage sft: add the examples of some rows to `encoded`, packed if the config says so.

    conversations: [(row, conversation), …]. check_only: only look for rows that are bad.
    """
    settings = settings_of(config)
    rendered = []
    for row, conversation in conversations:
        try:
            turns = render_turns(template, tokenizer, conversation.messages, conversation.system,
                                 conversation.tools, settings)
            rendered.append((row, turns, loss_marks(conversation.messages)))
        except ValueError as error:         # a tool call or tool description that cannot be read
            encoded.reject(row, error)
    if check_only or encoded.bad and not config.skip_bad_rows:
        return

    # one call of the tokenizer for all pieces of text
    pieces = [pieces for _, turns, _ in rendered for turn in turns for pieces in turn]
    ids = iter(encode_pieces(tokenizer, pieces))
    packing, cutoff = packing_of(config)
    closing_eos = tokenizer.eos_id if template.efficient_eos else None
    to_pack = []
    for row, turns, marks in rendered:
        turns = [(next(ids), next(ids)) for _ in turns]
        input_ids, labels = label_turns(turns, cutoff, config.train_on_prompt, config.mask_history,
                                        closing_eos, marks)
        full_length = sum(len(source) + len(target) for source, target in turns)
        if closing_eos is not None:
            full_length += 1
        supervised = encoded.count(row, input_ids, labels, full_length)
        starts_with_label = bool(labels) and labels[0] != IGNORE        # nothing predicts it
        encoded.has_targets |= supervised > starts_with_label
        if packing == "no":
            encoded.add(input_ids, labels, supervised > 0)
        else:
            to_pack.append((input_ids, labels))
    add_packed(to_pack, cutoff, encoded)


def add_packed(rows: list[tuple[list, list]], cutoff: int, encoded: EncodedRows):
    """Pack rows, (input_ids, labels) each, into examples of at most `cutoff` tokens."""
    lengths = [len(input_ids) for input_ids, _ in rows]
    for members in pack(lengths, cutoff):
        input_ids, labels = [], []
        for row in members:
            input_ids += rows[row][0]
            labels += rows[row][1]
        learnable = labels.count(IGNORE) < len(labels)
        encoded.add(input_ids, labels, learnable, [lengths[row] for row in members])


def encode_documents(documents: list, config, tokenizer, template, encoded: EncodedRows,
                     check_only: bool = False):
    """Stage pt: every document ends in an end-of-text token, and all tokens are labels.

    Packed, the documents form one stream that is cut into blocks; the tail that fills no block is
    left out. LLaMA-Factory masks every token equal to the padding token, so that with pad = eos no
    model learns to end; here it does. documents: [(row, conversation), …].
    """
    if check_only or encoded.bad and not config.skip_bad_rows:
        return
    end = "<|end_of_text|>" if template.name == "llama3" else tokenizer.eos_token
    texts = [conversation.messages[0]["content"] + end for _, conversation in documents]
    ids = tokenizer.encode_batch(texts)
    packing, cutoff = packing_of(config)
    for (row, _), document in zip(documents, ids):
        kept = document[:cutoff] if packing == "no" else document
        encoded.count(row, kept, kept, len(document))

    if packing == "no":
        blocks = [document[:cutoff] for document in ids]
    else:
        stream = [token for document in ids for token in document]
        encoded.dropped_tail += len(stream) % cutoff
        starts = range(0, len(stream) - cutoff + 1, cutoff)
        blocks = [stream[start:start + cutoff] for start in starts]
    for block in blocks:
        encoded.has_targets |= len(block) > 1
        encoded.add(block, block, bool(block))


def loss_marks(messages: list[dict]) -> list[tuple[bool, bool]] | None:
    """For each question and its answer whether they may carry loss; None: all of them may.

    A message with "train": False is context only.
    """
    learn = [message.get("train") is not False for message in messages]
    return None if all(learn) else list(zip(learn[0::2], learn[1::2]))


def settings_of(config) -> Settings:
    """The keys of the config that change how a conversation is rendered."""
    return Settings(
        enable_thinking=config.enable_thinking,
        preserve_thinking=config.preserve_thinking,
        mask_history=config.mask_history,
    )


# ---- collate: examples -> a micro-batch -------------------------------------------------------


@dataclass
class Batch:
    """Sequences end to end in one row of N tokens.

    num_items, summed over the batches of a step, is the divisor of its loss: the labels before the
    shift, as in LLaMA-Factory (including the label of a first token, which nothing predicts; stage
    pt has such). For the fields of preference stages see methods/preference.py: collate_answers.
    """
    input_ids: torch.Tensor         # (1, N) int64
    position_ids: torch.Tensor      # (1, N) int64, from 0 in every sequence
    targets: torch.Tensor           # (N,) int64: the token after each; IGNORE ends every sequence
    lengths: list[int]              # tokens of each sequence, which attention keeps apart
    num_items: float
    layout: PackedLayout | None = None    # of the lengths, for attention; made by `to`

    batch_sizes: tuple = ()         # preferences: rows of each micro-batch that was merged here
    row_weights: torch.Tensor | None = None     # (rows,) float32: weight of each row's loss
    desired: torch.Tensor | None = None         # (rows,) bool, stage kto: is it a good answer?
    kl_batch: "Batch | None" = None     # stage kto: the prompts with answers of other rows
    filler: bool = False                # without labels, so that all ranks run equally many passes
    ref_logps: torch.Tensor | None = None       # log-probabilities by the reference model
    kl: torch.Tensor | None = None              # (rows,) stage kto, and (2,) for the log
    kl_metric: torch.Tensor | None = None

    def to(self, device) -> "Batch":
        """The batch on a device, with its attention layout; unchanged if it already has one.

        targets stay on the CPU: the loss selects positions by them, and on a GPU the host would
        have to wait for the result.
        """
        if self.layout is not None:
            return self
        input_ids = to_device(self.input_ids, device)
        if input_ids is not self.input_ids:
            input_ids.on_cpu = self.input_ids       # runtime/offload.py: embedding on the CPU
        return replace(
            self,
            input_ids=input_ids,
            position_ids=to_device(self.position_ids, device),
            layout=PackedLayout(self.lengths, device),
            row_weights=None if self.row_weights is None else to_device(self.row_weights, device),
            desired=None if self.desired is None else to_device(self.desired, device),
            kl_batch=None if self.kl_batch is None else self.kl_batch.to(device),
        )


def collate(examples: list[Example]) -> Batch:
    """Examples end to end: the same mathematics as a padded batch, and no padding is computed."""
    lengths = [length for example in examples for length in example.lengths]
    input_ids = np.concatenate([example.input_ids for example in examples])
    labels = np.concatenate([example.labels for example in examples]).astype(np.int64)
    positions = []
    for example in examples:
        if example.position_ids is None:
            positions.append(np.arange(len(example.input_ids)))
        else:
            positions.append(example.position_ids)

    targets = np.append(labels[1:], IGNORE)             # position t predicts token t + 1
    targets[np.cumsum(lengths) - 1] = IGNORE            # the last token of a sequence: nothing
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
        targets=torch.from_numpy(targets),
        lengths=lengths,
        num_items=int((labels != IGNORE).sum()),
    )


def collate_rows(groups: list[list[Example]], alike: bool = False) -> Batch:
    """Micro-batches of stages sft and pt in one: a sum over tokens needs no borders."""
    return collate([example for group in groups for example in group])
