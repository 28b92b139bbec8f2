"""From rows to numbered examples: convert, encode, pack, order, collate, show.

    python data.py --config configs/tiny_lora_sft.yaml                     the first examples as the model sees them
    python data.py --config configs/tiny_lora_sft.yaml --jsonl rows.jsonl  every processed row, one a line

Read before: rows.py (files and their layouts), templates.py (how a conversation becomes pieces of text).
Read after: train.py.
Sources: the rules of masks, truncation, packing, split and order are LLaMA-Factory's, reproduced id for id; what
differs on purpose is in docs/differences.md. Packing without contamination: Krell et al., arXiv:2107.02027.
"""
import bisect
import json
import math
from dataclasses import dataclass, field
from itertools import islice

from config import load_config, run

if __name__ == "__main__":
    run(lambda argv: load_config(argv, "data"))                 # --help and mistakes do not wait for torch

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import find_checkpoint
from families import read_config_json
from report import print_example
from rows import PLACEHOLDER, Conversation, Row, convert, fill_placeholders, load_rows, shown
from templates import Settings, choose_template, encode_pieces, fit_tokenizer, render_turns, with_overrides
from tokenizer import load_tokenizer

IGNORE = -100                   # the label of a token that carries no loss


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


@dataclass
class Counts:
    """What became of the rows of one dataset. lengths: tokens of each row used, after truncation."""
    rows: int = 0
    bad: int = 0                    # left out by skip_bad_rows
    truncated: int = 0
    unlearnable: int = 0            # without a token that carries loss
    first_unlearnable: str = ""     # one of them, to be shown
    supervised: int = 0             # tokens that carry loss
    lengths: list = field(default_factory=list)


@dataclass
class Report:
    """What the start page tells about the data. examples: split -> how many there are to train or evaluate on."""
    datasets: dict = field(default_factory=dict)        # (split, dataset) -> Counts
    examples: dict = field(default_factory=dict)
    dropped_tail: int = 0                               # tokens of stage pt that filled no block
    notes: list = field(default_factory=list)
    bad_rows: list = field(default_factory=list)

    def of(self, split: str, row: Row) -> Counts:
        return self.datasets.setdefault((split, row.source.name), Counts())


def load_examples(config, tokenizer, template, keep_unlearnable=False) -> tuple[list[Example], list[Example], Report]:
    """(train, eval, report): from the files that `dataset` and `eval_dataset` (or `val_size`) name to arrays of ids.

    tokenizer must have been through fit_tokenizer(template, tokenizer). Examples without a token that carries loss are
    counted and left out unless keep_unlearnable. Raises ValueError or FileNotFoundError naming file, row and remedy.
    """
    if config.train_on_prompt and template.efficient_eos:
        raise ValueError(f"{config.source}: train_on_prompt cannot be used with template {template.name}, which labels "
                         "the first token of a turn with the end of the answer before it")
    with_overrides(template, settings_of(config))       # raises for a tool_format that does not exist
    report = Report()
    sampler = np.random.RandomState(config.seed)        # one for all datasets, as LLaMA-Factory's global generator
    train_rows, eval_rows = load_rows(config.dataset, config, sampler, report.notes), []
    if config.eval_dataset:
        eval_rows = load_rows(config.eval_dataset, config, sampler, report.notes)
    elif config.val_size:
        train_rows, eval_rows = split_rows(train_rows, config.val_size, config.seed)
    found = []
    for split, rows in (("train", train_rows), ("eval", eval_rows)):
        examples = encode_rows(rows, config, tokenizer, template, report, split)
        learnable = [example for example in examples if (example.labels != IGNORE).any()]
        report.examples[split] = len(learnable)
        if keep_unlearnable:
            learnable = examples
        elif rows and not any((example.labels[1:] != IGNORE).any() for example in learnable):     # nothing predicts the first
            raise ValueError(nothing_to_learn(config, report, split, len(rows)))
        found.append(learnable)
    return found[0], found[1], report


def nothing_to_learn(config, report: Report, split: str, rows: int) -> str:
    """The sentence for data without a single token that carries loss."""
    why = "no token carries loss; is cutoff_len too small?"
    if report.dropped_tail:
        why = f"{report.dropped_tail} tokens do not fill one block"
    return f"{config.source}: nothing to learn in the {rows} rows of the {split} data with cutoff_len: " \
           f"{config.cutoff_len}: {why}"


# ---- split and check: rows -> conversations ---------------------------------------------------------------------


def split_rows(rows: list[Row], val_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, eval): a fraction for eval, or a count if val_size > 1. The training rows come out permuted as well."""
    count = int(val_size) if val_size > 1 else int(np.ceil(val_size * len(rows)))
    if not 0 < count < len(rows):
        raise ValueError(f"val_size: {val_size} takes {count} of {len(rows)} rows, so that none is left to train on")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def convert_rows(rows: list[Row], config, report: Report, split: str) -> list[Conversation | None]:
    """All rows converted and filled; None stands for a bad row that skip_bad_rows leaves out."""
    found, bad, unfilled = [], [], {}
    for row in rows:
        report.of(split, row).rows += 1
        try:
            conversation = fill_placeholders(convert(row, config.stage), config.placeholders)
        except ValueError as error:
            bad.append((row, error))
            conversation = None
        answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"] if conversation else []
        if names := {name for answer in answers for name in PLACEHOLDER.findall(answer)}:
            unfilled.setdefault(row.source.name, []).append((row, names))
        found.append(conversation)
    reject(bad, config, report, split)
    for dataset, rows_and_names in unfilled.items():
        names = sorted(set().union(*(names for _, names in rows_and_names)))
        marks, first = ", ".join("{{%s}}" % name for name in names), rows_and_names[0][0]
        report.notes.append(f"dataset '{dataset}' teaches {marks} as it stands ({len(rows_and_names)} of its answers, "
                            f"first {first.where}: {shown(first.data)}). To fill it, set in the config: placeholders: "
                            f"{{{', '.join(f'{name}: …' for name in names)}}}")
    return found


def reject(bad: list[tuple[Row, ValueError]], config, report: Report, split: str):
    """Stops at bad rows, or counts and remembers them with skip_bad_rows: true."""
    lines = [f"{row.where}: {why}\n    {shown(row.data)}" for row, why in bad]
    if lines and not config.skip_bad_rows:
        more = f"\n  … and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise ValueError(f"{len(lines)} bad row{'s'[:len(lines) > 1]}\n  " + "\n  ".join(lines[:5]) + more
                         + "\nMend them, or leave them out with skip_bad_rows: true")
    report.bad_rows += lines
    for row, _ in bad:
        report.of(split, row).bad += 1


# ---- encode: conversations -> ids and labels --------------------------------------------------------------------


def encode_rows(rows: list[Row], config, tokenizer, template, report: Report, split: str) -> list[Example]:
    """Rows -> examples in the order of the rows, packed if the config says so, also those without any label."""
    examples, conversations = [], convert_rows(rows, config, report, split)
    encode = encode_documents if config.stage == "pt" else encode_conversations
    size = config.preprocessing_batch_size          # the rows that packing may combine, and one call of the tokenizer
    with tqdm(total=len(rows), desc=f"tokenising {split} rows", unit="row", leave=False,
              disable=bool(config.disable_tqdm) or not rows or None) as bar:       # None: only where someone watches
        for start in range(0, len(rows), size):
            batch = [(row, conversation) for row, conversation in
                     zip(rows[start:start + size], conversations[start:start + size]) if conversation]
            examples += encode(batch, config, tokenizer, template, report, split)
            bar.update(len(rows[start:start + size]))
    return examples


def settings_of(config) -> Settings:
    """What the config says about rendering a conversation."""
    return Settings(config.enable_thinking, config.preserve_thinking, config.mask_history, config.tool_format,
                    config.default_system)


def packing_of(config) -> tuple[str, int]:
    """(how rows are packed, most tokens in a row): "no", "apart", "joined" (samples see each other), "blocks" (pt).

    `packing: true` keeps samples apart; only an explicit `neat_packing: false` joins them. Where packing is asked for,
    LLaMA-Factory makes rows one token shorter than cutoff_len and pads them; we do so too, without the padding.
    """
    if config.stage == "pt":
        shorter = bool(config.given.get("packing"))     # not where it is only the default of the stage
        return "no" if config.packing is False else "blocks", config.cutoff_len - shorter
    if not config.packing and not config.neat_packing:
        return "no", config.cutoff_len
    return "joined" if config.given.get("neat_packing") is False else "apart", config.cutoff_len - 1


def encode_conversations(batch, config, tokenizer, template, report: Report, split: str) -> list[Example]:
    """Stage sft: turns to ids and labels, then packed. batch: [(row, conversation), …]."""
    settings, rendered, bad = settings_of(config), [], []
    for row, (messages, system, tools) in batch:
        try:
            rendered.append((row, render_turns(template, tokenizer, messages, system, tools, settings)))
        except ValueError as error:                 # a tool call or a tool description that cannot be read
            bad.append((row, error))
    reject(bad, config, report, split)
    ids = iter(encode_pieces(tokenizer, [pieces for _, turns in rendered for turn in turns for pieces in turn]))
    packing, cutoff = packing_of(config)
    closing_eos, encoded = tokenizer.eos_id if template.efficient_eos else None, []
    for row, turns in rendered:
        turns = [(next(ids), next(ids)) for _ in turns]
        input_ids, labels = label_turns(turns, cutoff, config.train_on_prompt, config.mask_history, closing_eos)
        full = sum(len(source) + len(target) for source, target in turns) + (closing_eos is not None)
        count_row(report.of(split, row), row, input_ids, labels, full)
        encoded.append((input_ids, labels))
    if packing == "no":
        return [example_of(input_ids, labels) for input_ids, labels in encoded]
    return pack(encoded, cutoff, apart=packing == "apart")


def encode_documents(batch, config, tokenizer, template, report: Report, split: str) -> list[Example]:
    """Stage pt: every document ends in an end-of-text token; all tokens are labels.

    Packed, the documents of the batch form one stream, cut in blocks; the tail that fills no block is left out.
    LLaMA-Factory masks every token equal to the padding token, so that with pad = eos no end is learnt; not so here.
    """
    end = "<|end_of_text|>" if template.name == "llama3" else tokenizer.eos_token
    documents = tokenizer.encode_batch([conversation.messages[0]["content"] + end for _, conversation in batch])
    packing, cutoff = packing_of(config)
    for (row, _), ids in zip(batch, documents):
        kept = ids[:cutoff] if packing == "no" else ids
        count_row(report.of(split, row), row, kept, kept, len(ids))
    if packing == "no":
        return [example_of(ids[:cutoff], ids[:cutoff]) for ids in documents]
    stream = [i for ids in documents for i in ids]
    whole = len(stream) // cutoff * cutoff
    report.dropped_tail += len(stream) - whole
    return [example_of(stream[i:i + cutoff], stream[i:i + cutoff]) for i in range(0, whole, cutoff)]


def count_row(counts: Counts, row: Row, input_ids: list, labels: list, full_length: int):
    """Adds one encoded row to its dataset's counts; the first row left with nothing to learn is remembered."""
    supervised = len(labels) - labels.count(IGNORE)
    counts.lengths.append(len(input_ids))
    counts.supervised += supervised
    counts.truncated += len(input_ids) < full_length
    if not supervised:
        counts.unlearnable += 1
        counts.first_unlearnable = counts.first_unlearnable or f"{row.where} ({full_length} tokens): {shown(row.data)}"


def example_of(input_ids: list, labels: list) -> Example:
    return Example(np.array(input_ids, np.int32), np.array(labels, np.int32), [len(input_ids)])


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
    return [i for ids, _ in parts for i in ids] + end, [i for _, labels in parts for i in labels] + end


# ---- pack: several rows -> one example --------------------------------------------------------------------------


def pack(rows: list[tuple[list, list]], capacity: int, apart: bool) -> list[Example]:
    """Fills examples of at most `capacity` tokens, greedily: the longest row that still fits, again and again.

    Positions restart with every row. apart: attention is cut there too; otherwise the rows of an example see one
    another. Rows of equal length are taken last first, as in LLaMA-Factory; rows without a label are packed as well.
    """
    waiting, examples = sorted((len(ids), place) for place, (ids, _) in enumerate(rows)), []
    while waiting:
        free, taken = capacity, []
        while fits := bisect.bisect(waiting, (free, len(rows))):
            length, place = waiting.pop(fits - 1)
            free -= length
            taken.append(place)
        input_ids, labels = ([i for place in taken for i in rows[place][part]] for part in (0, 1))
        example, lengths = example_of(input_ids, labels), [len(rows[place][0]) for place in taken]
        example.position_ids = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        example.lengths = lengths if apart else [sum(lengths)]
        examples.append(example)
    return examples


# ---- order and collate: examples -> micro-batches ---------------------------------------------------------------


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of n examples in an epoch (counted from 0): the permutation of accelerate's seedable sampler."""
    if not shuffle:
        return list(range(n))
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def micro_batches(order: list[int], size: int, drop_last: bool = False) -> list[list[int]]:
    """Consecutive `size` examples each; the last may be shorter, unless drop_last."""
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    return batches[:-1] if drop_last and batches and len(batches[-1]) < size else batches


def evened(batches: list[list[int]], size: int, world: int, drop_last: bool = False) -> list[list[int]]:
    """The micro-batches with which `world` ranks, dealt to in turn, all have the same number of full ones.

    As accelerate does it: what lacks is filled up from the beginning of the epoch (or, with drop_last, left out).
    """
    if drop_last:
        return batches[:len(batches) - len(batches) % world]
    start = [row for batch in batches[:world] for row in batch]
    start = start * math.ceil(world * size / max(len(start), 1))            # fewer rows than one round asks for
    full, filler = list(batches), iter(start)
    if full and len(full[-1]) < size:
        full[-1] = full[-1] + list(islice(filler, size - len(full[-1])))
    while len(full) % world:
        full.append(list(islice(filler, size)))
    return full


@dataclass
class Batch:
    """Examples end to end in one row of N tokens; lengths are the stretches attention keeps apart.

    targets[t] is what the model should predict at position t, the label of t+1; IGNORE at the end of every stretch.
    n_items counts the labels before that shift: LLaMA-Factory divides by it, also where (stage pt) a first token is
    counted that nothing predicts.
    """
    input_ids: torch.Tensor         # (1, N) int64
    position_ids: torch.Tensor      # (1, N) int64
    targets: torch.Tensor           # (N,) int64
    lengths: list
    n_items: int


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


# ---- show -------------------------------------------------------------------------------------------------------


def print_counts(report: Report):
    """The data part of the start page: a line per dataset, then what deserves a look."""
    width = max(len(split) + len(dataset) for split, dataset in report.datasets) + 3
    print(f"\n{'data':<{width}}    rows     used      tokens  learnt  cut off   length 50%      95%  longest")
    for (split, dataset), c in report.datasets.items():
        tokens = sum(c.lengths)
        middle, most, longest = np.percentile(c.lengths or [0], (50, 95, 100)).astype(int)
        print(f"  {split + ' ' + dataset:<{width - 2}}{c.rows:>8,} {len(c.lengths) - c.unlearnable:>8,} {tokens:>11,} "
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


def write_jsonl(path, examples: list[Example], pad_to: int = 0, pad_id: int = 0):
    """One {"input_ids": […], "labels": […]} a line. pad_to: packed rows filled up as LLaMA-Factory stores them."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            missing = max(pad_to - len(example.input_ids), 0)
            file.write(json.dumps({"input_ids": example.input_ids.tolist() + [pad_id] * missing,
                                   "labels": example.labels.tolist() + [IGNORE] * missing}) + "\n")


def main(argv):
    """Show the first examples, and with --jsonl FILE write all training rows, also those that training skips."""
    config = load_config(argv, "data")
    base = find_checkpoint(config.model_name_or_path, config.model_revision, config.cache_dir)
    tokenizer = load_tokenizer(base, config.split_special_tokens)
    model_type = read_config_json(base).get("model_type")
    template, why = choose_template(config.template, tokenizer, model_type, config.force_template)
    fit_tokenizer(template, tokenizer)
    train, _, report = load_examples(config, tokenizer, template, keep_unlearnable=bool(config.jsonl))
    if config.jsonl:
        packed = packing_of(config)[0] in ("apart", "joined")
        write_jsonl(config.jsonl, train, config.cutoff_len if packed else 0, tokenizer.pad_id)
        print(f"{len(train):,} training rows written to {config.jsonl}")
    print(f"template: {template.name} ({why})")
    print_counts(report)
    for number, example in enumerate(train[:3], 1):
        print_example(tokenizer, example.input_ids, example.labels, f"example {number}")
    if not report.examples["train"]:
        raise ValueError(nothing_to_learn(config, report, "train", len(train)))


if __name__ == "__main__":
    run(main)
