"""From rows to numbered examples: convert, encode, pack, order, collate, show.

    python -m runtime.preview --config configs/tiny_lora_sft.yaml                     the first examples as the model sees them
    python -m runtime.preview --config configs/tiny_lora_sft.yaml --jsonl rows.jsonl  every processed row, one a line

Read before: text/data_files.py (files and their layouts), templates.py (how a conversation becomes pieces of text).
Read after: train.py.
Sources: the rules of masks, truncation, packing, split and order are LLaMA-Factory's, reproduced id for id; what
differs on purpose is in docs/differences.md. Packing without contamination: Krell et al., arXiv:2107.02027.
"""
import bisect
import json
from array import array
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from attention import Layout, to_device
from runtime.report import print_example
from templates import Settings, encode_pieces, render_turns
from text.conversations import JUDGED, PAIRS, Row, shown


@dataclass(eq=False)
class Example:
    """One training example of n tokens; arrays are (n,) int32.

    lengths cuts it into the stretches that attention keeps apart, [n] for a plain row. position_ids None: 0 … n-1.
    No padding: training lays examples end to end in one row (see collate).
    """
    input_ids: np.ndarray
    labels: np.ndarray
    lengths: list
    position_ids: np.ndarray | None = None
    desired: bool | None = None         # of a judged answer: is it a good one?


class Part:
    """Some examples on their way into a store, as a process sends them."""

    def __init__(self):
        self.tokens, self.sizes, self.learnable, self.rows = array("i"), array("i"), array("b"), []
        self.desired = array("b")

    def add(self, ids: list, labels: list, learnable: bool, rows: list | None = None, desired: bool | None = None):
        """One example. rows: tokens of each row it is packed of. desired: see Example."""
        self.tokens.fromlist(ids)
        self.tokens.fromlist(labels)
        self.sizes.append(len(ids))
        self.learnable.append(learnable)
        if rows is not None:
            self.rows.append(rows)
        if desired is not None:
            self.desired.append(desired)


IGNORE = -100                   # the label of a token that carries no loss
SPLITS = ("train", "eval")
SHOWN = 5                       # bad rows


@dataclass
class Counts:
    """What became of the rows of one dataset. lengths: tokens of each row used, after truncation."""
    rows: int = 0
    bad: int = 0                    # left out by skip_bad_rows
    truncated: int = 0
    unlearnable: int = 0            # without a token that carries loss
    first_unlearnable: str = ""     # one of them, to be shown
    supervised: int = 0             # tokens that carry loss
    lengths: array = field(default_factory=lambda: array("i"))

    def add(self, more: "Counts"):
        """Counts of further rows of the dataset."""
        for name in ("rows", "bad", "truncated", "unlearnable", "supervised"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.first_unlearnable = self.first_unlearnable or more.first_unlearnable
        self.lengths.extend(more.lengths)


@dataclass
class Report:
    """What the start page tells about the data. examples: split -> how many there are to train or evaluate on."""
    datasets: dict = field(default_factory=dict)        # (split, dataset) -> Counts
    examples: dict = field(default_factory=dict)
    dropped_tail: int = 0                               # tokens of stage pt that filled no block
    notes: list = field(default_factory=list)
    bad_rows: list = field(default_factory=list)        # the first ones
    origin: str = ""                                    # where the tokenised rows are, and how they came there

    def add(self, part: "Encoded", split: str):
        """What became of some rows."""
        for name, counts in part.counts.items():
            self.datasets.setdefault((split, name), Counts()).add(counts)
        self.dropped_tail += part.dropped_tail
        self.bad_rows += part.bad[:SHOWN - len(self.bad_rows)]


class Encoded(Part):
    """The examples made of some rows, and what is to be told of the rows."""

    def __init__(self):
        super().__init__()
        self.counts = {}            # dataset -> Counts
        self.bad = []               # for each bad row a text: where, why, and the row
        self.unfilled = []          # (dataset, {names}, where it stands) for answers that teach {{name}} as it stands
        self.dropped_tail = 0
        self.teaches = False        # is there a label that a token before it predicts?

    def of(self, row: Row) -> Counts:
        return self.counts.setdefault(row.source.name, Counts())

    def reject(self, row: Row, why: ValueError):
        self.bad.append(f"{row.where}: {why}\n    {shown(row.data)}")
        self.of(row).bad += 1


# ---- encode: conversations -> ids and labels --------------------------------------------------------------------


def settings_of(config) -> Settings:
    """What the config says about rendering a conversation."""
    return Settings(config.enable_thinking, config.preserve_thinking, config.mask_history, config.tool_format,
                    config.default_system)


def packing_of(config) -> tuple[str, int]:
    """(how rows are packed, most tokens in a row): "no", "apart", "joined" (samples see each other), "blocks" (pt).

    `packing: true` keeps samples apart; only an explicit `neat_packing: false` joins them. Where packing is asked for,
    LLaMA-Factory makes rows one token shorter than cutoff_len and pads them; we do so too, without the padding.
    """
    if config.stage in PAIRS + JUDGED:
        return "apart", config.cutoff_len               # the two answers of a row; rows are not combined
    if config.stage == "pt":
        shorter = bool(config.given.get("packing"))     # not where it is only the default of the stage
        return "no" if config.packing is False else "blocks", config.cutoff_len - shorter
    if not config.packing and not config.neat_packing:
        return "no", config.cutoff_len
    return "joined" if config.given.get("neat_packing") is False else "apart", config.cutoff_len - 1


def encode_conversations(batch, config, tokenizer, template, part: Encoded, check_only: bool = False):
    """Stage sft: turns to ids and labels, then packed. batch: [(row, conversation), …]."""
    settings, rendered = settings_of(config), []
    for row, (messages, system, tools, *_) in batch:
        try:
            rendered.append((row, render_turns(template, tokenizer, messages, system, tools, settings)))
        except ValueError as error:                 # a tool call or a tool description that cannot be read
            part.reject(row, error)
    if check_only or part.bad and not config.skip_bad_rows:
        return
    ids = iter(encode_pieces(tokenizer, [pieces for _, turns in rendered for turn in turns for pieces in turn]))
    packing, cutoff = packing_of(config)
    closing_eos, encoded = tokenizer.eos_id if template.efficient_eos else None, []
    for row, turns in rendered:
        turns = [(next(ids), next(ids)) for _ in turns]
        input_ids, labels = label_turns(turns, cutoff, config.train_on_prompt, config.mask_history, closing_eos)
        full = sum(len(source) + len(target) for source, target in turns) + (closing_eos is not None)
        supervised = count_row(part.of(row), row, input_ids, labels, full)
        part.teaches |= supervised > (bool(labels) and labels[0] != IGNORE)         # nothing predicts the first
        if packing == "no":
            part.add(input_ids, labels, supervised > 0)
        else:
            encoded.append((input_ids, labels))
    for rows in pack([len(input_ids) for input_ids, _ in encoded], cutoff):
        input_ids, labels = ([i for row in rows for i in encoded[row][which]] for which in (0, 1))
        part.add(input_ids, labels, labels.count(IGNORE) < len(labels), [len(encoded[row][0]) for row in rows])


def encode_documents(batch, config, tokenizer, template, part: Encoded, check_only: bool = False):
    """Stage pt: every document ends in an end-of-text token; all tokens are labels.

    Packed, the documents of the batch form one stream, cut in blocks; the tail that fills no block is left out.
    LLaMA-Factory masks every token equal to the padding token, so that with pad = eos no end is learnt; not so here.
    """
    if check_only or part.bad and not config.skip_bad_rows:
        return
    end = "<|end_of_text|>" if template.name == "llama3" else tokenizer.eos_token
    documents = tokenizer.encode_batch([conversation.messages[0]["content"] + end for _, conversation in batch])
    packing, cutoff = packing_of(config)
    for (row, _), ids in zip(batch, documents):
        kept = ids[:cutoff] if packing == "no" else ids
        count_row(part.of(row), row, kept, kept, len(ids))
    blocks = [ids[:cutoff] for ids in documents]
    if packing != "no":
        stream = [i for ids in documents for i in ids]
        part.dropped_tail += len(stream) % cutoff
        blocks = [stream[i:i + cutoff] for i in range(0, len(stream) - cutoff + 1, cutoff)]
    for ids in blocks:
        part.teaches |= len(ids) > 1
        part.add(ids, ids, bool(ids))


def count_row(counts: Counts, row: Row, input_ids: list, labels: list, full_length: int) -> int:
    """Adds one encoded row to its dataset's counts; the first row left with nothing to learn is remembered.

    -> how many of its tokens carry loss.
    """
    supervised = len(labels) - labels.count(IGNORE)
    counts.lengths.append(len(input_ids))
    counts.supervised += supervised
    counts.truncated += len(input_ids) < full_length
    if not supervised:
        counts.unlearnable += 1
        counts.first_unlearnable = counts.first_unlearnable or f"{row.where} ({full_length} tokens): {shown(row.data)}"
    return supervised


def cut_pair(source: int, target: int, room: int) -> tuple[int, int]:
    """How many tokens of a turn's source and target (their fronts) are kept when `room` tokens are free.

    A short target stays whole, else a short source does, else both shrink in proportion.
    """
    if target * 2 < room:
        kept = target
    elif source * 2 < room:
        kept = min(target, room - source)
    else:
        kept = min(target, int(room * (target / (source + target))))     # this order of operations decides the rounding
    return min(source, max(room - kept, 0)), kept


def label_turns(turns: list, cutoff: int, train_on_prompt: bool = False, mask_history: bool = False,
                closing_eos: int | None = None) -> tuple[list[int], list[int]]:
    """Turns [(source_ids, target_ids), …] -> (input_ids, labels) of at most `cutoff` tokens.

    Answers are labels; prompts too with train_on_prompt; only the last answer with mask_history. closing_eos: the eos
    id, for templates whose answers do not end in it: it labels the next turn's first token, and it ends the row.
    """
    parts, used = [], 0 if closing_eos is None else 1
    for place, (source, target) in enumerate(reversed(turns) if mask_history else turns):     # the last turn goes first
        if used >= cutoff:
            break
        keep_source, keep_target = cut_pair(len(source), len(target), cutoff - used)
        source, target = source[:keep_source], target[:keep_target]
        used += keep_source + keep_target
        source_labels = source if train_on_prompt else [IGNORE] * keep_source
        if closing_eos is not None and place > 0 and source:
            source_labels = [closing_eos] + source_labels[1:]
        parts.append((source + target, source_labels + ([IGNORE] * keep_target if mask_history and place else target)))
    if mask_history:
        parts.reverse()
    end = [] if closing_eos is None else [closing_eos]
    return sum((ids for ids, _ in parts), []) + end, sum((labels for _, labels in parts), []) + end


# ---- pack: several rows -> one example --------------------------------------------------------------------------


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Which rows, by number, go together into examples of at most `capacity` tokens.

    Greedily: the longest row that still fits, again and again. Rows of equal length are taken last first, as in
    LLaMA-Factory; rows without a label are packed as well.
    """
    waiting, examples = sorted((length, row) for row, length in enumerate(lengths)), []
    while waiting:
        free, taken = capacity, []
        while fits := bisect.bisect(waiting, (free, len(lengths))):
            length, row = waiting.pop(fits - 1)
            free -= length
            taken.append(row)
        examples.append(taken)
    return examples


# ---- order and collate: examples -> micro-batches ---------------------------------------------------------------


@dataclass
class Batch:
    """Examples end to end in one row of N tokens; lengths are the stretches attention keeps apart.

    targets[t] is what the model should predict at position t, the label of t+1; IGNORE at the end of every stretch.
    n_items is what the step's loss is divided by, once summed over the step: the labels before that shift, as in
    LLaMA-Factory, also where (stage pt) a first token is counted that nothing predicts; of answers that are compared or
    judged, see collate_answers. layout: of the lengths, for attention; made when the batch goes to the device.
    """
    input_ids: torch.Tensor         # (1, N) int64
    position_ids: torch.Tensor      # (1, N) int64
    targets: torch.Tensor           # (N,) int64
    lengths: list
    n_items: float
    layout: object = None
    groups: tuple = ()              # of answers: how many rows each micro-batch has that this pass is made of
    shares: torch.Tensor | None = None      # (rows,) float32: what the loss of each row counts
    desired: torch.Tensor | None = None     # (rows,) bool: of judged answers, is it a good one?
    other: object = None            # of judged answers: the Batch of prompts with answers of other rows

    def to(self, device) -> "Batch":
        """The batch on a device, with the layout of its sequences; itself if it has been there.

        targets stay on the CPU: the loss selects by them, and a GPU's answer would have to be waited for.
        """
        if self.layout is not None:
            return self
        input_ids = to_device(self.input_ids, device)
        if input_ids is not self.input_ids:
            input_ids.on_cpu = self.input_ids       # for an embedding that stays on the CPU, see methods/quant.py
        return replace(
            self,
            input_ids=input_ids,
            position_ids=to_device(self.position_ids, device),
            layout=Layout(self.lengths, device),
            shares=None if self.shares is None else to_device(self.shares, device),
            desired=None if self.desired is None else to_device(self.desired, device),
            other=None if self.other is None else self.other.to(device),
        )


def collate(examples: list[Example]) -> Batch:
    """Lays examples end to end. No padding: the same mathematics as a padded batch, without computing on nothing."""
    lengths = [n for example in examples for n in example.lengths]
    labels = np.concatenate([example.labels for example in examples]).astype(np.int64)
    targets = np.append(labels[1:], IGNORE)
    targets[np.cumsum(lengths) - 1] = IGNORE
    positions = [np.arange(len(e.input_ids)) if e.position_ids is None else e.position_ids for e in examples]
    return Batch(torch.from_numpy(np.concatenate([e.input_ids for e in examples]).astype(np.int64))[None],
                 torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
                 torch.from_numpy(targets), lengths, int((labels != IGNORE).sum()))


def stretch(example: Example, number: int) -> Example:
    """One of the stretches that an example is made of."""
    end = sum(example.lengths[:number + 1])
    part = slice(end - example.lengths[number], end)
    return Example(example.input_ids[part], example.labels[part], [example.lengths[number]])


def collate_rows(groups: list[list[Example]], alike: bool = False) -> Batch:
    """The rows of some micro-batches of stages sft and pt: it does not matter which is whose."""
    return collate([example for group in groups for example in group])


# ---- show -------------------------------------------------------------------------------------------------------


def print_counts(report: Report):
    """The data part of the start page: a line per dataset, then what deserves a look."""
    width = max(len(split) + len(dataset) for split, dataset in report.datasets) + 3
    print(f"\n{'data':<{width}}     rows      used        tokens  learnt  cut off   length 50%      95%  longest")
    for (split, dataset), c in report.datasets.items():
        tokens = sum(c.lengths)
        middle, most, longest = np.percentile(c.lengths or [0], (50, 95, 100)).astype(int)
        print(f"  {split + ' ' + dataset:<{width - 2}}{c.rows:>9,} {len(c.lengths) - c.unlearnable:>9,} {tokens:>13,} "
              f"{c.supervised / max(tokens, 1):>7.1%} {c.truncated:>8,} {middle:>12,} {most:>8,} {longest:>8,}")
        if c.unlearnable:
            print(f"    skipped, nothing left to learn within cutoff_len: {c.unlearnable}, first {c.first_unlearnable}")
        if c.bad:
            print(f"    left out as bad (skip_bad_rows): {c.bad}")
    if report.dropped_tail:
        print(f"  {report.dropped_tail:,} tokens at the end fill no block of cutoff_len and are left out")
    print("  examples: " + ", ".join(f"{count:,} ({split})" for split, count in report.examples.items() if count))
    for line in report.bad_rows[:5]:
        print(f"  left out: {line}")
    for note in report.notes:
        print(f"  note: {note}")
    if report.origin:
        print(f"  tokenised rows: {report.origin}")


def print_row(tokenizer, example: Example, stage: str, title: str):
    """An example as ids, text and the text that carries loss; of a pair, both answers."""
    titles = [title]
    if stage in PAIRS:
        titles = [f"{title}, chosen", f"{title}, rejected"]
    elif stage in JUDGED:
        titles = [f"{title}, a {'good' if example.desired else 'bad'} answer"]
    for number, words in enumerate(titles):
        one = stretch(example, number) if stage in PAIRS + JUDGED else example
        print_example(tokenizer, one.input_ids, one.labels, words)


def write_jsonl(path, examples: list[Example], stage: str = "sft", pad_to: int = 0, pad_id: int = 0):
    """One {"input_ids": […], "labels": […]} a line; of stages with two answers, both under LLaMA-Factory's names. pad_to:
    packed rows filled up as LLaMA-Factory stores them."""
    names = ("chosen_", "rejected_") if stage in PAIRS else ("", "kl_") if stage in JUDGED else ("",)
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            line = {}
            for number, name in enumerate(names):
                one = stretch(example, number) if len(names) > 1 else example
                missing = max(pad_to - len(one.input_ids), 0)
                line |= {f"{name}input_ids": one.input_ids.tolist() + [pad_id] * missing,
                         f"{name}labels": one.labels.tolist() + [IGNORE] * missing}
            file.write(json.dumps(line | ({} if example.desired is None else {"kto_tags": example.desired})) + "\n")
