"""From rows to numbered examples: convert, encode, pack, order, collate, show.

    python data.py --config configs/tiny_lora_sft.yaml                     the first examples as the model sees them
    python data.py --config configs/tiny_lora_sft.yaml --jsonl rows.jsonl  every processed row, one a line

Read before: rows.py (files and their layouts), templates.py (how a conversation becomes pieces of text).
Read after: train.py.
Sources: the rules of masks, truncation, packing, split and order are LLaMA-Factory's, reproduced id for id; what
differs on purpose is in docs/differences.md. Packing without contamination: Krell et al., arXiv:2107.02027.
"""
import bisect
import hashlib
import json
import math
import time
from array import array
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from config import load_config, run

if __name__ == "__main__":
    run(lambda argv: load_config(argv, "data"))                 # --help and mistakes do not wait for torch

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

from attention import Layout, moved
from checkpoint import find_checkpoint
from families import read_config_json
from report import print_example
from rows import JUDGED, PAIRS, PLACEHOLDER, Conversation, Row, Rows, convert, fill_placeholders, find_sources, rows_of, shown
from store import TOKENISED, Example, Examples, Part, SplitWriter, new_store, read_about, write_about
from templates import (Settings, choose_template, encode_pieces, fit_tokenizer, render_turns, with_overrides,
                       written_template)
from tokenizer import load_tokenizer
from tools import describe_tools
from workers import how_many, in_order

IGNORE = -100                   # the label of a token that carries no loss
SPLITS = ("train", "eval")
SHOWN = 5                       # bad rows
# what of the config decides which tokens the rows become
DATA_KEYS = ("stage", "tool_format", "default_system", "enable_thinking", "preserve_thinking", "train_on_prompt",
             "mask_history", "cutoff_len", "placeholders", "skip_bad_rows", "split_special_tokens", "max_samples",
             "val_size", "seed", "preprocessing_batch_size")
PROGRAM = ("data", "rows", "store", "templates", "formats", "tools", "tokenizer", "words", "vocabularies")


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


def load_examples(config, tokenizer, template, keep_unlearnable=False, folder: Path | None = None,
                  writes: bool = True) -> tuple[Examples, Examples, Report]:
    """(train, eval, report): from the files that `dataset` and `eval_dataset` (or `val_size`) name to arrays of ids.

    tokenizer must have been through fit_tokenizer(template, tokenizer). Examples without a token that carries loss are
    counted and left out unless keep_unlearnable. folder: where tokenised rows are kept; what lies there already is read
    if it was made of the same (see store_key). writes: False for a rank that only looks there.
    Raises ValueError or FileNotFoundError naming file, row and remedy.
    """
    if config.train_on_prompt and template.efficient_eos:
        raise ValueError(f"{config.source}: train_on_prompt cannot be used with template {template.name}, which labels "
                         "the first token of a turn with the end of the answer before it")
    with_overrides(template, settings_of(config))       # raises for a tool_format that does not exist
    notes, why = [], ""
    sources = [find_sources(names or [], config, notes) for names in (config.dataset, config.eval_dataset)]
    if folder:
        key = store_key(config, tokenizer, template, sources)
        about, why = read_about(folder, key)
        if about and not config.overwrite_cache:
            report = told(about)
            report.origin = f"read from {folder}"
            check_something_is_taught(config, report, about, keep_unlearnable)
            return *(examples_in(folder, split, config, about, keep_unlearnable) for split in SPLITS), report
    report, begun = Report(notes=notes), time.time()
    with new_store(folder if writes else None) as work:
        about, processes = make_store(work, sources, config, tokenizer, template, report)
        check_something_is_taught(config, report, about, keep_unlearnable)
        if folder and writes:
            write_about(work, {"key": key, **about, **asdict_of(report)})
        found = [examples_in(work, split, config, about, keep_unlearnable) for split in SPLITS]
    if folder and writes:
        report.origin = (f"made in {time.time() - begun:.1f} s by {processes} process{'es'[:2 * (processes > 1)]}, kept in "
                         f"{folder}{f' (what was there was made of other rows or settings; {why})' if why else ''}")
    return *found, report


def make_store(work: Path, sources: list, config, tokenizer, template, report: Report):
    """Fill a folder with the tokenised rows of both splits. -> (what examples_in needs to know, processes at work)."""
    sampler = np.random.RandomState(config.seed)        # one for all datasets, as LLaMA-Factory's global generator
    rows = {"train": rows_of(sources[0], config, sampler, report.notes), "eval": []}
    if sources[1]:
        rows["eval"] = rows_of(sources[1], config, sampler, report.notes)
    elif config.val_size:
        rows["train"], rows["eval"] = split_rows(rows["train"], config.val_size, config.seed)
    about, most = {}, 1
    for split in SPLITS:
        writer = SplitWriter(work, split)
        teaches, processes = encode_rows(rows[split], config, tokenizer, template, report, split, writer)
        about[split] = {**writer.close(), "teaches": teaches, "rows": len(rows[split])}
        report.examples[split] = sum(writer.learnable)
        most = max(most, processes)
    return about, most


def examples_in(folder: Path, split: str, config, about: dict, keep_unlearnable: bool) -> Examples:
    return Examples(folder, split, about[split], packing_of(config)[0] == "apart", keep_unlearnable)


def store_key(config, tokenizer, template, sources: list) -> dict:
    """{what: a text} of all that decides which tokens the rows become; equal keys, equal tokens."""
    program = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in PROGRAM]
    key = {name: getattr(config, name) for name in DATA_KEYS}
    key |= {"packing": packing_of(config), "template": written_template(template), "tokenizer": tokenizer.sign(),
            "program": hashlib.sha256(b"".join(program)).hexdigest(), "tokenizers": tokenizers.__version__,
            "tools": describe_tools(with_overrides(template, settings_of(config)).tool_format, "[]")}     # may name the day
    if not any("tools" in source.columns or not source.formatting for found in sources for source in found):
        del key["tools"]
    for split, found in zip(SPLITS, sources):
        for source in found:
            key[f"{split} dataset {source.name}"] = repr(replace(source, files=()))
            key |= {f"{split} file {path}": checksum(path) for path in source.files}
    return {name: json.dumps(value, default=str) for name, value in key.items()}


def kept_in(config, script: str = "train") -> Path | None:
    """The folder of tokenised rows: tokenized_path, else, in training, one in output_dir; None: they are not kept."""
    if config.tokenized_path:
        return Path(config.tokenized_path)
    return Path(config.output_dir, TOKENISED) if script == "train" and not config.dry_run else None


def checksum(path: Path) -> str:
    """Of all its bytes: a second of reading for a GB, and no doubt about a date or a size that stayed the same."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def asdict_of(report: Report) -> dict:
    """A report as JSON knows it."""
    datasets = [[split, name, {**vars(counts), "lengths": counts.lengths.tolist()}]
                for (split, name), counts in report.datasets.items()]
    return {"report": {**vars(report), "datasets": datasets}}


def told(about: dict) -> Report:
    """The report that a store was written with."""
    report = Report(**about["report"])
    report.datasets = {(split, name): Counts(**{**counts, "lengths": array("i", counts["lengths"])})
                       for split, name, counts in report.datasets}
    return report


def check_something_is_taught(config, report: Report, about: dict, keep_unlearnable: bool):
    """Raises ValueError for rows of which no token carries loss, unless they are only to be looked at."""
    for split in SPLITS:
        if about[split]["rows"] and not about[split]["teaches"] and not keep_unlearnable:
            raise ValueError(nothing_to_learn(config, report, split, about[split]["rows"]))


def nothing_to_learn(config, report: Report, split: str, rows: int) -> str:
    """The sentence for data without a single token that carries loss."""
    why = "no token carries loss; is cutoff_len too small?"
    if report.dropped_tail:
        why = f"{report.dropped_tail} tokens do not fill one block"
    return f"{config.source}: nothing to learn in the {rows} rows of the {split} data with cutoff_len: " \
           f"{config.cutoff_len}: {why}"


# ---- split and check: rows -> conversations ---------------------------------------------------------------------


def split_rows(rows: Rows, val_size: float, seed: int) -> tuple[Rows, Rows]:
    """(train, eval): a fraction for eval, or a count if val_size > 1. The training rows come out permuted as well."""
    count = int(val_size) if val_size > 1 else int(np.ceil(val_size * len(rows)))
    if not 0 < count < len(rows):
        raise ValueError(f"val_size: {val_size} takes {count} of {len(rows)} rows, so that none is left to train on")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.take(order[count:]), rows.take(order[:count])


def conversation_of(row: Row, config, part: Encoded) -> Conversation | None:
    """A row converted and filled; None for a bad one, which part then knows."""
    try:
        conversation = fill_placeholders(convert(row, config.stage), config.placeholders)
    except ValueError as error:
        return part.reject(row, error)
    names = {name for message in conversation.messages if message["role"] == "assistant" and "{{" in message["content"]
             for name in PLACEHOLDER.findall(message["content"])}
    if names:
        part.unfilled.append((row.source.name, names, f"{row.where}: {shown(row.data)}"))
    return conversation


def note_unfilled(unfilled: list) -> list[str]:
    """The notes about answers that teach a {{name}} as it stands, one for each dataset."""
    notes = []
    for dataset in dict.fromkeys(dataset for dataset, _, _ in unfilled):
        found = [(names, where) for name, names, where in unfilled if name == dataset]
        names = sorted(set().union(*(names for names, _ in found)))
        marks = ", ".join("{{%s}}" % name for name in names)
        notes.append(f"dataset '{dataset}' teaches {marks} as it stands ({len(found)} of its answers, first {found[0][1]}). "
                     f"To fill it, set in the config: placeholders: {{{', '.join(f'{name}: …' for name in names)}}}")
    return notes


def refuse(bad: list[str]):
    """Raises ValueError for rows that cannot be used."""
    more = f"\n  … and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    raise ValueError(f"{len(bad)} bad row{'s'[:len(bad) > 1]}\n  " + "\n  ".join(bad[:SHOWN]) + more
                     + "\nMend them, or leave them out with skip_bad_rows: true")


# ---- encode: conversations -> ids and labels --------------------------------------------------------------------


def encode_rows(rows: Rows, config, tokenizer, template, report: Report, split: str, writer: SplitWriter):
    """Rows -> examples in the order of the rows, packed if the config says so, also those without any label.

    -> (is there a label that a token before it predicts, how many processes were at work).
    """
    size = config.preprocessing_batch_size          # the rows that packing may combine, and one call of the tokenizer
    starts, unfilled, teaches = range(0, len(rows), size), [], False
    processes = how_many(len(starts), config.preprocessing_num_workers)

    def encode(start):
        return encode_batch(rows[start:start + size], config, tokenizer, template)

    with tqdm(total=len(rows), desc=f"tokenising {split} rows", unit="row", leave=False,
              disable=bool(config.disable_tqdm) or not rows or None) as bar:       # None: only where someone watches
        for start, part in zip(starts, in_order(encode, starts, processes)):
            if part.bad and not config.skip_bad_rows:
                later = (encode_batch(rows[i:i + size], config, tokenizer, template, check_only=True)
                         for i in starts if i > start)
                refuse(part.bad + [line for other in later for line in other.bad])
            report.add(part, split)
            writer.add(part)
            unfilled += part.unfilled
            teaches = teaches or part.teaches
            bar.update(min(size, len(rows) - start))
    report.notes += note_unfilled(unfilled)
    return teaches, processes


def encode_batch(rows: list[Row], config, tokenizer, template, check_only: bool = False) -> Encoded:
    """Some rows, which packing may combine, to examples. check_only: just find the bad ones."""
    part, conversations = Encoded(), []
    for row in rows:
        part.of(row).rows += 1
        if conversation := conversation_of(row, config, part):
            conversations.append((row, conversation))
    ENCODERS[config.stage](conversations, config, tokenizer, template, part, check_only)
    return part


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


def encode_answers(batch, config, tokenizer, template, part: Encoded, check_only: bool = False):
    """Stages rm, dpo, kto: of each row an example of two stretches, the prompt with one answer and with another: the chosen
    and the rejected one; or (kto) its own and, to estimate a KL divergence (arXiv:2402.01306, sec. 4.1), that of the row
    before, the first row taking the last one's. Thoughts of earlier answers are left out. batch: [(row, conversation), …].
    """
    settings, rendered, own = settings_of(config), [], []

    def render(conversation, answer):
        messages, system, tools, *_ = conversation
        turns = render_turns(template, tokenizer, [*messages[:-1], answer], system, tools, settings, only_last=True)
        return [piece for turn in turns[:-1] for pieces in turn for piece in pieces] + turns[-1][0], turns[-1][1]

    for row, conversation in batch:
        try:
            answers = [conversation.messages[-1]] + ([conversation.rejected] if config.stage in PAIRS else [])
            rendered.append([render(conversation, answer) for answer in answers])
            own.append((row, conversation))
        except ValueError as error:                 # a tool call or a tool description that cannot be read
            part.reject(row, error)
    if check_only or part.bad and not config.skip_bad_rows:
        return
    if config.stage in JUDGED:
        for number, (row, conversation) in enumerate(own):
            rendered[number].append(render(conversation, own[number - 1][1].messages[-1]))
    ids = iter(encode_pieces(tokenizer, [pieces for both in rendered for one in both for pieces in one]))
    closing_eos = [tokenizer.eos_id] if template.efficient_eos else []
    for row, conversation in own:
        add_answers(part, row, conversation.desired, [(next(ids), next(ids) + closing_eos) for _ in range(2)], config)


def add_answers(part: Encoded, row: Row, desired: bool | None, both: list, config):
    """One row's example. both: two (prompt_ids, answer_ids). A pair has the prompt of the chosen answer, and is cut by the
    longer of the two answers, as in LLaMA-Factory; in kto each is cut by its own."""
    pairs, kept = config.stage in PAIRS, []
    for prompt, answer in both:
        prompt, longest = (both[0][0], max(len(other) for _, other in both)) if pairs else (prompt, len(answer))
        of_prompt, of_answer = cut_pair(len(prompt), longest, config.cutoff_len)
        prompt, answer = prompt[:of_prompt], answer[:of_answer]
        kept.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    counted = slice(None if pairs else 1)           # the other answer of kto teaches nothing
    full = sum(len(prompt) + len(answer) for prompt, answer in both[counted])
    supervised = count_row(part.of(row), row, *laid(kept[counted]), full)
    part.teaches |= any(len(labels) > 1 and labels[-1] != IGNORE for _, labels in kept[counted])
    part.add(*laid(kept), supervised > 0, [len(ids) for ids, _ in kept], desired)


def laid(stretches: list) -> tuple[list, list]:
    """(ids, labels) of several stretches, end to end."""
    return sum((ids for ids, _ in stretches), []), sum((labels for _, labels in stretches), [])


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


ENCODERS = {"sft": encode_conversations, "pt": encode_documents, "rm": encode_answers, "dpo": encode_answers,
            "kto": encode_answers}


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


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of n examples in an epoch (counted from 0): the permutation of accelerate's seedable sampler."""
    if not shuffle:
        return list(range(n))
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def micro_batches(order: list[int], size: int, drop_last: bool = False) -> list[list[int]]:
    """Consecutive `size` examples each; the last may be shorter, unless drop_last."""
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    return batches[:-1] if drop_last and batches and len(batches[-1]) < size else batches


def joined(batches: list[list[int]], tokens, limit: int) -> list[list[list[int]]]:
    """The micro-batches of an optimizer step as passes, each of as many neighbours as have at most `limit` tokens together.

    tokens(row): of that example. The step's loss is one sum, so it does not matter in how many passes it is computed.
    """
    passes, room = [], 0
    for batch in batches:
        size = sum(map(tokens, batch))
        if passes and size <= room:
            passes[-1].append(batch)
        else:
            passes.append([batch])
            room = limit
        room -= size
    return passes


def budget_batches(order: list[int], tokens, budget: int, alike: bool = True, window: int = 2048) -> list[list[int]]:
    """Micro-batches of as many rows as have at most `budget` tokens together (a longer row comes alone).

    tokens(row): of that example. alike: within each `window` of the order, rows of similar length come together.
    """
    if alike:
        order = [row for start in range(0, len(order), window) for row in sorted(order[start:start + window], key=tokens)]
    return [sum(batches, []) for batches in joined([[row] for row in order], tokens, budget)]


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


def collate_answers(groups: list[list[Example]], alike: bool = False) -> Batch:
    """The rows of some micro-batches: of pairs first all chosen answers, then all rejected ones; judged answers in one
    Batch, and in its `other` those to estimate the KL divergence with.

    A row counts one over the rows of its micro-batch, and n_items is the number of these: the mean over micro-batches of
    their means, as in LLaMA-Factory. alike: every row counts 1, and n_items is the number of rows.
    """
    examples = [example for group in groups for example in group]
    first, second = ([stretch(example, which) for example in examples] for which in (0, 1))
    sizes = tuple(map(len, groups))
    shares = torch.tensor([1.0 if alike else 1 / size for size in sizes for _ in range(size)])
    more = dict(groups=sizes, shares=shares, n_items=len(examples) if alike else len(groups))
    if examples[0].desired is None:
        return replace(collate(first + second), **more)
    return replace(collate(first), desired=torch.tensor([example.desired for example in examples]), other=collate(second),
                   **more)


def stretch(example: Example, number: int) -> Example:
    """One of the stretches that an example is made of."""
    end = sum(example.lengths[:number + 1])
    part = slice(end - example.lengths[number], end)
    return Example(example.input_ids[part], example.labels[part], [example.lengths[number]])


def collate_rows(groups: list[list[Example]], alike: bool = False) -> Batch:
    """The rows of some micro-batches of stages sft and pt: it does not matter which is whose."""
    return collate([example for group in groups for example in group])


def on_device(batch, device):
    """The batch with its tensors on the device, and the layout of its sequences; unchanged if it has been there. The
    targets stay: the loss asks which of them count, and on a GPU the answer would have to be waited for."""
    if batch.layout is not None:
        return batch
    more = {name: moved(getattr(batch, name), device) for name in ("shares", "desired") if getattr(batch, name) is not None}
    ids = moved(batch.input_ids, device)
    if ids is not batch.input_ids:
        ids.on_cpu = batch.input_ids                # for an embedding that is not on the device, see quant.py
    return replace(batch, input_ids=ids, position_ids=moved(batch.position_ids, device),
                   layout=Layout(batch.lengths, device), other=batch.other and on_device(batch.other, device), **more)


COLLATE = {"sft": collate_rows, "pt": collate_rows, "rm": collate_answers, "dpo": collate_answers, "kto": collate_answers}


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


def main(argv):
    """Show the first examples, and with --jsonl FILE write all training rows, also those that training skips."""
    config = load_config(argv, "data")
    base = find_checkpoint(config.model_name_or_path, config.model_revision, config.cache_dir)
    tokenizer = load_tokenizer(base, config.split_special_tokens)
    model_type = read_config_json(base).get("model_type")
    template, why = choose_template(config.template, tokenizer, model_type, config.force_template)
    fit_tokenizer(template, tokenizer)
    train, _, report = load_examples(config, tokenizer, template, bool(config.jsonl), kept_in(config, "data"))
    if config.jsonl:
        packed = bool(config.packing) and config.stage == "sft"
        write_jsonl(config.jsonl, train, config.stage, config.cutoff_len if packed else 0, tokenizer.pad_id)
        print(f"{len(train):,} training rows written to {config.jsonl}")
    print(f"template: {template.name} ({why})")
    print_counts(report)
    for number, example in enumerate(train[:3], 1):
        print_row(tokenizer, example, config.stage, f"example {number}")
    if not report.examples["train"]:
        raise ValueError(nothing_to_learn(config, report, "train", len(train)))


if __name__ == "__main__":
    run(main)
