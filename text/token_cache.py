"""Tokenized rows on disk: examples by number, none held in memory, for a quick second start.

A cache is a folder:

    train.tokens, eval.tokens   int32: of each example its ids, then its labels
    train.npz, eval.npz         of each example its size in tokens, and whether it has a label;
                                of packed ones also parts (number of rows) and rows (tokens of each
                                row); of judged answers (stage kto) also desired
    store.json                  the key, and what the start page says about the rows

The key holds all that the tokens depend on: the bytes of the data files, settings, chat format,
tokenizer, the files of this program. A cache with another key is made again. It appears under its
name only when it is complete.

Requires: data.py, text/data_files.py, text/tokenizer.py.
Next: runtime/setup.py (load_data), train.py.
"""
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tokenizers
from tqdm import tqdm

from data import DatasetCounts, EncodedRows, Example, packing_of
from text.chat_formats import with_overrides, written_template
from text.conversations import (
    Conversation,
    PLACEHOLDER,
    RawRow,
    convert,
    fill_placeholders,
    excerpt,
)
from text.data_files import Rows, find_sources, open_rows, read_at
from text.parallel_map import num_processes, parallel_map

ABOUT = "store.json"
TOKENISED = "tokenised"  # the folder of a run's store in its output_dir
SPLITS = ("train", "eval")
MAX_SHOWN = 5  # bad rows to print


@dataclass
class DataReport:
    """What the start page says about the data."""

    datasets: dict = field(default_factory=dict)  # (split, dataset) -> DatasetCounts
    examples: dict = field(default_factory=dict)  # split -> number of examples
    dropped_tail: int = 0  # tokens of stage pt that fill no block
    notes: list[str] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)  # the first MAX_SHOWN
    origin: str = ""  # where the tokenized rows come from

    def add(self, encoded: EncodedRows, split: str):
        """Add the counts of some rows."""
        for dataset, counts in encoded.counts.items():
            self.datasets.setdefault((split, dataset), DatasetCounts()).add(counts)
        self.dropped_tail += encoded.dropped_tail
        self.bad_rows += encoded.bad[: MAX_SHOWN - len(self.bad_rows)]


class Examples(Sequence):
    """The examples of one split by number, each read from its file when it is asked for.

    sizes: (n,) tokens of each. longest: tokens of the longest stretch. largest_id: of any token.
    sign: a checksum of all ids and labels, in order. apart: attention is cut between the rows of a
    packed example."""

    def __init__(
        self, folder: Path, split: str, about: dict, apart: bool, keep_unlearnable: bool = False
    ):
        self.file, self.apart = open(folder / f"{split}.tokens", "rb"), apart
        with np.load(folder / f"{split}.npz", allow_pickle=False) as index:
            index = dict(index)
        chosen = slice(None) if keep_unlearnable else np.flatnonzero(index["learnable"])
        self.sizes, self.starts = index["sizes"][chosen], starts_of(index["sizes"], 2)[chosen]
        self.rows = index.get("rows")
        if self.rows is not None:
            self.parts, self.first_row = index["parts"][chosen], starts_of(index["parts"])[chosen]
        self.desired = index["desired"][chosen] if "desired" in index else None
        self.largest_id, self.sign = about["largest_id"], f"{len(self)} rows, {about['crc']:08x}"

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        size, start = int(self.sizes[number]), int(self.starts[number])
        tokens = np.frombuffer(read_at(self.file, 4 * start, 8 * size), np.int32)
        if self.rows is None:
            return Example(tokens[:size], tokens[size:], [size])
        lengths = self.lengths_of(number)
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        desired = None if self.desired is None else bool(self.desired[number])
        return Example(
            tokens[:size], tokens[size:], lengths if self.apart else [size], positions, desired
        )

    def lengths_of(self, number: int) -> list:
        """Tokens of each row that a packed example is made of."""
        first = self.first_row[number]
        return self.rows[first : first + self.parts[number]].tolist()

    @property
    def longest(self) -> int:
        stretches = self.sizes if self.rows is None or not self.apart else self.rows
        return int(stretches.max(initial=0))


def starts_of(counts: np.ndarray, times: int = 1) -> np.ndarray:
    """Where each of these stretches begins when they lie end to end."""
    return times * np.concatenate([[0], np.cumsum(counts[:-1], dtype=np.int64)])[: len(counts)]


class SplitWriter:
    """Writes the examples of one split, part after part; `close` says what Examples must know of
    them.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split, self.file = folder, split, open(folder / f"{split}.tokens", "wb")
        self.sizes, self.learnable, self.parts, self.rows = (
            array("i"),
            array("b"),
            array("i"),
            array("i"),
        )
        self.desired = array("b")
        self.crc = self.largest_id = 0

    def add(self, part: EncodedRows):
        tokens, start = memoryview(part.tokens), 0
        self.file.write(tokens)
        self.largest_id = max(
            self.largest_id, int(np.max(np.array(part.tokens, np.int32), initial=0))
        )
        for size, learnable in zip(part.sizes, part.learnable):
            if learnable:
                self.crc = zlib.crc32(tokens[start : start + 2 * size], self.crc)
            start += 2 * size
        self.crc = zlib.crc32(part.desired, self.crc)
        self.desired.extend(part.desired)
        self.sizes.extend(part.sizes)
        self.learnable.extend(part.learnable)
        for rows in part.rows:
            self.parts.append(len(rows))
            self.rows.extend(rows)

    def close(self) -> dict:
        self.file.flush()
        os.fsync(self.file.fileno())
        index = {
            "sizes": np.array(self.sizes, np.int32),
            "learnable": np.array(self.learnable, np.int8),
        }
        if self.rows:
            index |= {
                "parts": np.array(self.parts, np.int32),
                "rows": np.array(self.rows, np.int32),
            }
        if self.desired:
            index["desired"] = np.array(self.desired, np.int8)
        with open(self.folder / f"{self.split}.npz", "wb") as file:
            np.savez(file, **index)
            file.flush()
            os.fsync(file.fileno())
        self.file.close()
        return {"crc": self.crc, "largest_id": self.largest_id}


@contextmanager
def new_store(path: Path | None):
    """A folder to fill, which takes its name when the block ends well.

    None: a temporary one, gone after the block.
    """
    if path is None:
        with tempfile.TemporaryDirectory(
            prefix="pocket-factory-", ignore_cleanup_errors=True
        ) as work:
            yield Path(work)
        return
    if path.is_dir() and any(path.iterdir()) and not (path / ABOUT).is_file():
        raise ValueError(
            f"{path} is no folder of tokenised rows, and not empty: name another tokenized_path"
        )
    existed, work = (
        path.parent.exists(),
        path.with_name(f"{path.name}.{socket.gethostname()}.partial"),
    )
    # of a run that was killed; hosts that share a disk: one each
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        shutil.rmtree(path, ignore_errors=True)
        try:
            os.replace(work, path)
        # another host was faster: its store is as good
        except OSError:
            if not (path / ABOUT).is_file():
                raise
            shutil.rmtree(work, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if not existed:
            shutil.rmtree(path.parent, ignore_errors=True)
        raise


def write_about(folder: Path, about: dict):
    """The last file of a store: its key, and what the start page tells."""
    with open(folder / ABOUT, "w", encoding="utf-8") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())


def read_about(folder: Path, key: dict) -> tuple[dict | None, str]:
    """(what store.json says, "") of a store with this key; else None and why it is none, "" where
    there is nothing.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = about["key"]
    except FileNotFoundError:
        return None, ""
    except (ValueError, KeyError, OSError):
        return None, f"{ABOUT} cannot be read"
    changed = [name for name in {**found, **key} if found.get(name) != key.get(name)]
    return (
        (None, f"changed: {', '.join(changed[:5])}{', …' * (len(changed) > 5)}")
        if changed
        else (about, "")
    )


# what of the config decides which tokens the rows become
DATA_KEYS = (
    "stage",
    "tool_format",
    "default_system",
    "enable_thinking",
    "preserve_thinking",
    "train_on_prompt",
    "mask_history",
    "cutoff_len",
    "placeholders",
    "skip_bad_rows",
    "split_special_tokens",
    "max_samples",
    "val_size",
    "seed",
    "preprocessing_batch_size",
)
PROGRAM = (
    "data.py",
    "templates.py",
    "text/data_files.py",
    "text/conversations.py",
    "text/token_cache.py",
    "text/chat_formats.py",
    "text/fit_tokenizer.py",
    "text/tool_calls.py",
    "text/tokenizer.py",
    "text/fast_bpe.py",
    "text/vocabularies.py",
    "methods/preference.py",     # encodes stages rm, dpo and kto
)


def load_examples(
    config,
    tokenizer,
    template,
    encode: Callable,
    keep_unlearnable: bool = False,
    folder: Path | None = None,
    writes: bool = True,
) -> tuple[Examples, Examples, DataReport]:
    """(train, eval, report): from the files that `dataset` and `eval_dataset` (or `val_size`) name
    to arrays of ids.

    tokenizer must have been through fit_tokenizer(template, tokenizer). encode: how the stage makes
    examples of conversations, as data.encode_conversations does. Examples without a token that
    carries loss are counted and left out unless keep_unlearnable. folder: where tokenised rows are
    kept; what lies there already is read if it was made of the same (see store_key). writes: False
    for a rank that only looks there. Raises ValueError or FileNotFoundError naming file, row and
    remedy."""
    if config.train_on_prompt and template.efficient_eos:
        raise ValueError(
            f"{config.source}: train_on_prompt cannot be used with template {template.name}, "
            "which labels "
            "the first token of a turn with the end of the answer before it"
        )
    rendered_as = with_overrides(template, config.tool_format, config.default_system)
    notes, why = [], ""
    sources = [
        find_sources(names or [], config, notes) for names in (config.dataset, config.eval_dataset)
    ]
    if folder:
        key = store_key(config, tokenizer, template, rendered_as.tool_format, sources)
        about, why = read_about(folder, key)
        if about and not config.overwrite_cache:
            report = report_of(about)
            report.origin = f"read from {folder}"
            check_something_is_taught(config, report, about, keep_unlearnable)
            return *(
                examples_in(folder, split, config, about, keep_unlearnable) for split in SPLITS
            ), report
    report, begun = DataReport(notes=notes), time.time()
    with new_store(folder if writes else None) as work:
        about, processes = make_store(work, sources, config, tokenizer, rendered_as, encode, report)
        check_something_is_taught(config, report, about, keep_unlearnable)
        if folder and writes:
            write_about(work, {"key": key, **about, **asdict_of(report)})
        found = [examples_in(work, split, config, about, keep_unlearnable) for split in SPLITS]
    if folder and writes:
        report.origin = (
            f"made in {time.time() - begun:.1f} s by {processes} "
            f"process{'es'[: 2 * (processes > 1)]}, kept in "
            f"{folder}{f' (what was there was of other rows or settings; {why})' if why else ''}"
        )
    return *found, report


def make_store(
    work: Path, sources: list, config, tokenizer, template, encode: Callable, report: DataReport
):
    """Fill a folder with the tokenised rows of both splits.

    -> (what examples_in needs to know, processes at work).
    """
    # one for all datasets, as LLaMA-Factory's global generator
    sampler = np.random.RandomState(config.seed)
    rows = {"train": open_rows(sources[0], config, sampler, report.notes), "eval": []}
    if sources[1]:
        rows["eval"] = open_rows(sources[1], config, sampler, report.notes)
    elif config.val_size:
        rows["train"], rows["eval"] = split_rows(rows["train"], config.val_size, config.seed)
    about, most = {}, 1
    for split in SPLITS:
        writer = SplitWriter(work, split)
        teaches, processes = encode_rows(
            rows[split], config, tokenizer, template, encode, report, split, writer
        )
        about[split] = {**writer.close(), "teaches": teaches, "rows": len(rows[split])}
        report.examples[split] = sum(writer.learnable)
        most = max(most, processes)
    return about, most


def examples_in(folder: Path, split: str, config, about: dict, keep_unlearnable: bool) -> Examples:
    return Examples(folder, split, about[split], packing_of(config)[0] == "apart", keep_unlearnable)


def store_key(config, tokenizer, template, tool_format, sources: list) -> dict:
    """{what: a text} of all that decides which tokens the rows become; equal keys, equal tokens."""
    program = [(Path(__file__).parent.parent / name).read_bytes() for name in PROGRAM]
    key = {name: getattr(config, name) for name in DATA_KEYS}
    key |= {
        "packing": packing_of(config),
        "template": written_template(template),
        "tokenizer": tokenizer.checksum(),
        "program": hashlib.sha256(b"".join(program)).hexdigest(),
        "tokenizers": tokenizers.__version__,
        "tools": tool_format.describe("[]"),
    }  # may name the day
    if not any(
        "tools" in source.columns or not source.formatting for found in sources for source in found
    ):
        del key["tools"]
    for split, found in zip(SPLITS, sources):
        for source in found:
            key[f"{split} dataset {source.name}"] = repr(replace(source, files=()))
            key |= {f"{split} file {path}": sha256_of(path) for path in source.files}
    return {name: json.dumps(value, default=str) for name, value in key.items()}


def kept_in(config, script: str = "train") -> Path | None:
    """The folder of tokenised rows: tokenized_path, else, in training, one in output_dir; None:
    they are not kept.
    """
    if config.tokenized_path:
        return Path(config.tokenized_path)
    return Path(config.output_dir, TOKENISED) if script == "train" and not config.dry_run else None


def sha256_of(path: Path) -> str:
    """Of all its bytes: a second of reading for a GB, and no doubt about a date or a size that
    stayed the same.
    """
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def asdict_of(report: DataReport) -> dict:
    """A report as JSON knows it."""
    datasets = [
        [split, name, {**vars(counts), "lengths": counts.lengths.tolist()}]
        for (split, name), counts in report.datasets.items()
    ]
    return {"report": {**vars(report), "datasets": datasets}}


def report_of(about: dict) -> DataReport:
    """The report that a store was written with."""
    report = DataReport(**about["report"])
    report.datasets = {
        (split, name): DatasetCounts(**{**counts, "lengths": array("i", counts["lengths"])})
        for split, name, counts in report.datasets
    }
    return report


def check_something_is_taught(config, report: DataReport, about: dict, keep_unlearnable: bool):
    """Raises ValueError for rows of which no token carries loss, unless they are only to be looked
    at.
    """
    for split in SPLITS:
        if about[split]["rows"] and not about[split]["teaches"] and not keep_unlearnable:
            raise ValueError(nothing_to_learn(config, report, split, about[split]["rows"]))


def nothing_to_learn(config, report: DataReport, split: str, rows: int) -> str:
    """The sentence for data without a single token that carries loss."""
    why = "no token carries loss; is cutoff_len too small?"
    if report.dropped_tail:
        why = f"{report.dropped_tail} tokens do not fill one block"
    return (
        f"{config.source}: nothing to learn in the {rows} rows of the {split} data with "
        "cutoff_len: "
        f"{config.cutoff_len}: {why}"
    )


def split_rows(rows: Rows, val_size: float, seed: int) -> tuple[Rows, Rows]:
    """(train, eval): a fraction for eval, or a count if val_size > 1.

    The training rows come out permuted as well.
    """
    count = int(val_size) if val_size > 1 else int(np.ceil(val_size * len(rows)))
    if not 0 < count < len(rows):
        raise ValueError(
            f"val_size: {val_size} takes {count} of {len(rows)} rows, so that none is left to "
            "train on"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.take(order[count:]), rows.take(order[:count])


def conversation_of(row: RawRow, config, part: EncodedRows) -> Conversation | None:
    """A row converted and filled; None for a bad one, which part then knows."""
    try:
        conversation = fill_placeholders(convert(row, config.stage), config.placeholders)
    except ValueError as error:
        return part.reject(row, error)
    names = {
        name
        for message in conversation.messages
        if message["role"] == "assistant" and "{{" in message["content"]
        for name in PLACEHOLDER.findall(message["content"])
    }
    if names:
        part.unfilled.append((row.source.name, names, f"{row.where}: {excerpt(row.data)}"))
    return conversation


def note_unfilled(unfilled: list) -> list[str]:
    """The notes about answers that teach a {{name}} as it stands, one for each dataset."""
    notes = []
    for dataset in dict.fromkeys(dataset for dataset, _, _ in unfilled):
        found = [(names, where) for name, names, where in unfilled if name == dataset]
        names = sorted(set().union(*(names for names, _ in found)))
        marks = ", ".join("{{%s}}" % name for name in names)
        notes.append(
            f"dataset '{dataset}' teaches {marks} as it stands ({len(found)} of its answers, "
            f"first {found[0][1]}). "
            "To fill it, set in the config: placeholders: "
            f"{{{', '.join(f'{name}: …' for name in names)}}}"
        )
    return notes


def refuse(bad: list[str]):
    """Raises ValueError for rows that cannot be used."""
    more = f"\n  … and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else ""
    raise ValueError(
        f"{len(bad)} bad row{'s'[: len(bad) > 1]}\n  "
        + "\n  ".join(bad[:MAX_SHOWN])
        + more
        + "\nMend them, or leave them out with skip_bad_rows: true"
    )


def encode_rows(
    rows: Rows,
    config,
    tokenizer,
    template,
    encode: Callable,
    report: DataReport,
    split: str,
    writer: SplitWriter,
):
    """Rows -> examples in the order of the rows, packed if the config says so, also those without
    any label.

    -> (is there a label that a token before it predicts, how many processes were at work).
    """
    # the rows that packing may combine, and one call of the tokenizer
    size = config.preprocessing_batch_size
    starts, unfilled, teaches = range(0, len(rows), size), [], False
    processes = num_processes(len(starts), config.preprocessing_num_workers)

    def encode_from(start, check_only=False):
        return encode_batch(
            rows[start : start + size], config, tokenizer, template, encode, check_only
        )

    with tqdm(
        total=len(rows),
        desc=f"tokenising {split} rows",
        unit="row",
        leave=False,
        # None: only where someone watches
        disable=bool(config.disable_tqdm) or not rows or None,
    ) as bar:
        for start, part in zip(starts, parallel_map(encode_from, starts, processes)):
            if part.bad and not config.skip_bad_rows:
                later = (encode_from(i, check_only=True) for i in starts if i > start)
                refuse(part.bad + [line for other in later for line in other.bad])
            report.add(part, split)
            writer.add(part)
            unfilled += part.unfilled
            teaches = teaches or part.has_targets
            bar.update(min(size, len(rows) - start))
    report.notes += note_unfilled(unfilled)
    return teaches, processes


def encode_batch(
    rows: list[RawRow], config, tokenizer, template, encode: Callable, check_only: bool = False
) -> EncodedRows:
    """Some rows, which packing may combine, to examples. check_only: just find the bad ones."""
    part, conversations = EncodedRows(), []
    for row in rows:
        part.counts_of(row).rows += 1
        if conversation := conversation_of(row, config, part):
            conversations.append((row, conversation))
    encode(conversations, config, tokenizer, template, part, check_only)
    return part
