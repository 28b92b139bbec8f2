"""Tokenized rows on disk: examples by number, read when they are asked for, for a quick restart.

A cache is a folder:

    train.tokens, eval.tokens   int32: the ids of each example, then its labels (with
                                eval_on_each_dataset eval_0.tokens, eval_1.tokens, …)
    train.npz, eval.npz         for each example its size in tokens and whether it has a label; for
                                packed ones also parts (number of rows) and rows (tokens of each
                                row); for judged answers (stage kto) also desired
    store.json                  the key, and the report for the start page

The key holds everything that the tokens depend on: the bytes of the data files, settings, chat
format, tokenizer, and the source files of this program. A cache with another key is replaced. A
folder appears under its final name only when it is complete.

Requires: data.py, text/data_files.py, text/tokenizer.py.
Next: runtime/setup.py (load_data), train.py.
"""
import glob
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import time
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tokenizers
from tqdm import tqdm

from data import DatasetCounts, EncodedRows, Example, packing_of
from text.conversations import (ANSWERS, PLACEHOLDER, Conversation, RawRow, convert,
                                fill_placeholders)
from text.data_files import Rows, find_sources, open_rows, read_at
from text.parallel_map import num_processes, parallel_map
from text.plain_text import check_utf8, excerpt
from text.written_formats import with_overrides, written_template

ABOUT = "store.json"            # written last: a folder without it is not a complete cache
WORK_MARK = ".pocket_factory_rows"       # in a folder that is being filled
TOKENIZED = "tokenised"         # the folder of a run's cache in its output_dir; earlier releases
                                # wrote this name, so its spelling stays
SPLITS = ("train", "eval")
MAX_SHOWN = 5                   # bad rows that are printed

# the settings that decide which tokens the rows become
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
    "mix_strategy",
    "interleave_probs",
    "val_size",
    "eval_on_each_dataset",
    "seed",
    "preprocessing_batch_size",
)
# the source files that do, beside that of the stage's encoder
PROGRAM = (
    "data.py",
    "templates.py",
    "text/data_files.py",
    "text/packed_files.py",
    "text/hub_files.py",
    "text/mix_datasets.py",
    "text/conversations.py",
    "text/turns.py",
    "text/plain_text.py",
    "text/json_text.py",
    "text/token_cache.py",
    "text/chat_formats.py",
    "text/written_formats.py",
    "text/fit_tokenizer.py",
    "text/tool_calls.py",
    "text/tool_markup.py",
    "text/tool_formats.py",
    "text/tokenizer.py",
    "text/declared_tokens.py",
    "text/fast_bpe.py",
    "text/vocabularies.py",
)


@dataclass
class DataReport:
    """What the start page says about the data. The field names are stored in store.json."""
    datasets: dict = field(default_factory=dict)        # (split, dataset) -> DatasetCounts
    examples: dict = field(default_factory=dict)        # split -> number of examples
    dropped_tail: int = 0                               # tokens of stage pt that fill no block
    notes: list[str] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)   # the first MAX_SHOWN
    origin: str = ""                                    # where the tokenized rows come from

    def add(self, encoded: EncodedRows, split: str):
        """Add the counts of some rows."""
        for dataset, counts in encoded.counts.items():
            self.datasets.setdefault((split, dataset), DatasetCounts()).add(counts)
        self.dropped_tail += encoded.dropped_tail
        self.bad_rows += encoded.bad[:MAX_SHOWN - len(self.bad_rows)]


# ---- reading and writing the examples of a split -------------------------------------------------


class Examples(Sequence):
    """The examples of one split by number, each read from its file when it is asked for.

    about: what SplitWriter.close returned. apart: attention is cut between the rows of a packed
    example. keep_unlearnable: include the examples without a label.

    Attributes: sizes, (n,) tokens of each example; largest_id, of any token; sign, the number of
    examples and a checksum of all ids and labels, in order.
    """

    def __init__(self, folder: Path, split: str, about: dict, apart: bool,
                 keep_unlearnable: bool = False):
        self.file = open(folder / f"{split}.tokens", "rb")
        self.apart = apart
        with np.load(folder / f"{split}.npz", allow_pickle=False) as file:
            index = dict(file)
        chosen = slice(None) if keep_unlearnable else np.flatnonzero(index["learnable"])

        self.sizes = index["sizes"][chosen]
        self.starts = starts_of(index["sizes"], 2)[chosen]      # an id and a label for each token
        self.rows = index.get("rows")
        if self.rows is not None:
            self.parts = index["parts"][chosen]
            self.first_row = starts_of(index["parts"])[chosen]
        self.desired = index["desired"][chosen] if "desired" in index else None
        self.largest_id = about["largest_id"]
        self.sign = f"{len(self)} rows, {about['crc']:08x}"

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        size = int(self.sizes[number])
        start = int(self.starts[number])
        tokens = np.frombuffer(read_at(self.file, 4 * start, 8 * size), np.int32)
        input_ids = tokens[:size]
        labels = tokens[size:]
        if self.rows is None:
            return Example(input_ids, labels, [size])

        row_lengths = self.lengths_of(number)
        return Example(
            input_ids=input_ids,
            labels=labels,
            lengths=row_lengths if self.apart else [size],
            position_ids=np.concatenate([np.arange(n, dtype=np.int32) for n in row_lengths]),
            desired=None if self.desired is None else bool(self.desired[number]),
        )

    def lengths_of(self, number: int) -> list[int]:
        """The lengths of the rows in a packed example."""
        first = self.first_row[number]
        return self.rows[first:first + self.parts[number]].tolist()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        sequences = self.sizes if self.rows is None or not self.apart else self.rows
        return int(sequences.max(initial=0))


def starts_of(counts: np.ndarray, width: int = 1) -> np.ndarray:
    """The start of each of `counts` when they lie end to end, each item `width` numbers wide."""
    ends = np.cumsum(counts[:-1], dtype=np.int64)
    return width * np.concatenate([[0], ends])[:len(counts)]


class SplitWriter:
    """Writes the examples of one split, part by part."""

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        self.split = split
        self.file = open(folder / f"{split}.tokens", "wb")
        self.sizes = array("i")
        self.learnable = array("b")
        self.parts = array("i")
        self.rows = array("i")
        self.desired = array("b")
        self.crc = 0
        self.largest_id = 0

    def add(self, part: EncodedRows):
        """Append examples. The checksum leaves out those without a label."""
        tokens = memoryview(part.tokens)
        self.file.write(tokens)
        largest = np.max(np.array(part.tokens, np.int32), initial=0)
        self.largest_id = max(self.largest_id, int(largest))

        start = 0
        for size, learnable in zip(part.sizes, part.learnable):
            if learnable:
                self.crc = zlib.crc32(tokens[start:start + 2 * size], self.crc)
            start += 2 * size
        self.crc = zlib.crc32(part.desired, self.crc)

        self.sizes.extend(part.sizes)
        self.learnable.extend(part.learnable)
        self.desired.extend(part.desired)
        for rows in part.rows:
            self.parts.append(len(rows))
            self.rows.extend(rows)

    def close(self) -> dict:
        """Write the index; return {"crc", "largest_id"} for Examples."""
        sync_file(self.file)
        index = {
            "sizes": np.array(self.sizes, np.int32),
            "learnable": np.array(self.learnable, np.int8),
        }
        if self.rows:
            index["parts"] = np.array(self.parts, np.int32)
            index["rows"] = np.array(self.rows, np.int32)
        if self.desired:
            index["desired"] = np.array(self.desired, np.int8)
        with open(self.folder / f"{self.split}.npz", "wb") as file:
            np.savez(file, **index)
            sync_file(file)
        self.file.close()
        return {"crc": self.crc, "largest_id": self.largest_id}


def sync_file(file):
    """Write a file through to the disk."""
    file.flush()
    os.fsync(file.fileno())


# ---- cache folders -------------------------------------------------------------------------------


@contextmanager
def new_cache(path: Path | None) -> Iterator[Path]:
    """A folder to fill; it is renamed to `path` when the block ends without an error.

    It holds a mark alone. None: a temporary folder, deleted after the block.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="pocket-factory-",
                                         ignore_cleanup_errors=True) as work:
            yield Path(work)
        return

    if path.is_dir() and any(path.iterdir()) and not (path / ABOUT).is_file():
        raise ValueError(f"{path} is not empty and holds no tokenized rows: name another "
                         "tokenized_path")
    parent_existed = path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_of(path)
    work = path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex[:8]}.partial")
    work.mkdir()
    try:
        with locked_mark(work, path):
            yield work
        (work / WORK_MARK).unlink()
        move_into_place(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if not parent_existed:
            shutil.rmtree(path.parent, ignore_errors=True)
        raise


@contextmanager
def locked_mark(work: Path, path: Path) -> Iterator[None]:
    """Mark a folder that is to become `path`, and lock the mark within the block.

    So other hosts that share the disk see that someone is at work in it, whatever their names; a
    mark without a lock is that of a process that was killed.
    """
    with open(work / "mark", "w", encoding="utf-8") as mark:
        lock_file(mark)
        mark.write(path.name)
        mark.flush()
        os.replace(work / "mark", work / WORK_MARK)     # which never appears without a lock
        yield


def remove_leftovers_of(path: Path):
    """Remove the folders that killed processes have left: marked for `path`, and not locked."""
    for work in path.parent.glob(f"{glob.escape(path.name[:40])}.*.partial"):
        try:
            with open(work / WORK_MARK, "r+", encoding="utf-8") as mark:
                is_left = mark.read() == path.name and lock_file(mark)
        except OSError:                         # no mark: it is someone's, or not ready yet
            continue
        if is_left:
            shutil.rmtree(work, ignore_errors=True)


def lock_file(file) -> bool:
    """Lock an open file until it is closed. False: another process has, or locks do not work."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):              # Windows; some network file systems
        return False
    return True


def move_into_place(work: Path, path: Path):
    """Rename a complete cache, replacing an older one."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        os.replace(work, path)
    except OSError:
        if not (path / ABOUT).is_file():
            raise
        shutil.rmtree(work, ignore_errors=True)     # another host was faster; its cache is as good


def write_about(folder: Path, about: dict):
    """Write store.json, which makes the cache complete."""
    with open(folder / ABOUT, "w", encoding="utf-8") as file:
        json.dump(about, file)
        sync_file(file)


def read_about(folder: Path, key: dict) -> tuple[dict | None, str]:
    """(the content of store.json, "") if its key is `key`, else (None, why not).

    The reason is "" where no cache exists.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = about["key"]
    except FileNotFoundError:
        return None, ""
    except (ValueError, KeyError, OSError):
        return None, f"{ABOUT} cannot be read"

    changed = [name for name in {**found, **key} if found.get(name) != key.get(name)]
    if not changed:
        return about, ""
    more = ", …" if len(changed) > 5 else ""
    return None, f"changed: {', '.join(changed[:5])}{more}"


def cache_key(config, tokenizer, template, encode: Callable, tool_format,
              sources: list) -> dict[str, str]:
    """Everything that decides which tokens the rows become: equal keys, equal tokens.

    encode: of the stage. sources: of the training rows and of the evaluation rows.
    """
    root = Path(__file__).parent.parent
    files = dict.fromkeys([*(root / name for name in PROGRAM), Path(inspect.getfile(encode))])
    program = [file.read_bytes() for file in files]
    key = {name: getattr(config, name) for name in DATA_KEYS}
    key["packing"] = packing_of(config)
    key["template"] = written_template(template)
    key["tokenizer"] = tokenizer.checksum()
    key["program"] = hashlib.sha256(b"".join(program)).hexdigest()
    key["tokenizers"] = tokenizers.__version__
    if any(may_have_tools(source) for found in sources for source in found):
        key["tools"] = tool_format.describe("[]")       # it may contain today's date
    for split, found in zip(SPLITS, sources):
        for source in found:
            key[f"{split} dataset {source.name}"] = repr(replace(source, files=()))
            for path in source.files:
                key[f"{split} file {path}"] = sha256_of(path)
    return {name: json.dumps(value, default=str) for name, value in key.items()}


def may_have_tools(source) -> bool:
    """Whether rows of a dataset may describe tools; of a file without an entry it is not known."""
    return "tools" in source.columns or not source.formatting


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content: about a second per GB, and safer than its date and size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def kept_in(config, script: str = "train") -> Path | None:
    """The folder of the cache: tokenized_path, else, in training, one in output_dir.

    None: tokenized rows are not kept.
    """
    if config.tokenized_path:
        return Path(config.tokenized_path)
    if script == "train" and not config.dry_run:
        return Path(config.output_dir, TOKENIZED)
    return None


def report_to_json(report: DataReport) -> dict:
    """A report as it is stored in store.json."""
    datasets = []
    for (split, name), counts in report.datasets.items():
        datasets.append([split, name, {**vars(counts), "lengths": counts.lengths.tolist()}])
    return {"report": {**vars(report), "datasets": datasets}}


def report_from_json(about: dict) -> DataReport:
    """The report that is stored in store.json."""
    report = DataReport(**about["report"])
    datasets = {}
    for split, name, counts in report.datasets:
        lengths = array("i", counts["lengths"])
        datasets[split, name] = DatasetCounts(**{**counts, "lengths": lengths})
    report.datasets = datasets
    return report


# ---- from data files to examples -----------------------------------------------------------------


def load_examples(config, tokenizer, template, encode: Callable, keep_unlearnable: bool = False,
                  folder: Path | None = None,
                  writes: bool = True) -> tuple[Examples, Examples | dict, DataReport]:
    """The examples of `dataset` and of `eval_dataset` or `val_size`: (train, eval, report).

    With eval_on_each_dataset the second is {name: examples}, in the order of eval_dataset.

    tokenizer: after fit_tokenizer(template, tokenizer). encode: makes examples of conversations, as
    data.encode_conversations does for stage sft. keep_unlearnable: include the examples in which no
    token carries loss. folder: of the cache; it is read if its key is the same (see cache_key), and
    else written. writes: False for a rank that only reads it. Raises ValueError or
    FileNotFoundError that names file, row and remedy.
    """
    if config.train_on_prompt and template.efficient_eos:
        raise ValueError(
            f"{config.source}: train_on_prompt cannot be used with template {template.name}, "
            "which labels the first token of a turn with the end of the answer before it")
    for name, value in (config.placeholders or {}).items():
        check_utf8(str(value), f"{config.source}: placeholders: {name}")
    template_used = with_overrides(template, config.tool_format, config.default_system)
    notes = []
    sources = [find_sources(names or [], config, notes)
               for names in (config.dataset, config.eval_dataset)]
    key = {}
    why_replaced = ""
    if folder:
        key = cache_key(config, tokenizer, template, encode, template_used.tool_format, sources)
        about, why_replaced = read_about(folder, key)
        if about and not config.overwrite_cache:
            return read_cache(folder, config, about, keep_unlearnable)

    report = DataReport(notes=notes)
    start_time = time.monotonic()
    is_kept = bool(folder) and writes
    with new_cache(folder if writes else None) as work:
        about, processes = fill_cache(work, sources, config, tokenizer, template_used, encode,
                                      report)
        check_has_targets(config, report, about, keep_unlearnable)
        if is_kept:
            write_about(work, {"key": key, **about, **report_to_json(report)})
        train_set, eval_set = open_splits(work, config, about, keep_unlearnable)
    if is_kept:
        workers = "1 process" if processes == 1 else f"{processes} processes"
        replaced = f" (it replaced another cache; {why_replaced})" if why_replaced else ""
        report.origin = (f"made in {time.monotonic() - start_time:.1f} s by {workers}, kept in "
                         f"{folder}{replaced}")
    return train_set, eval_set, report


def read_cache(folder: Path, config, about: dict,
               keep_unlearnable: bool) -> tuple[Examples, Examples, DataReport]:
    """load_examples from a cache that has the right key."""
    report = report_from_json(about)
    report.origin = f"read from {folder}"
    check_has_targets(config, report, about, keep_unlearnable)
    train_set, eval_set = open_splits(folder, config, about, keep_unlearnable)
    return train_set, eval_set, report


def fill_cache(work: Path, sources: list, config, tokenizer, template, encode: Callable,
               report: DataReport) -> tuple[dict, int]:
    """Write the examples of all splits into a folder.

    -> (what open_splits needs of each split, the most processes that worked at once).
    """
    # one generator for all datasets, as LLaMA-Factory's global one
    sampler = np.random.RandomState(config.seed)
    rows = {"train": open_rows(sources[0], config, sampler, report.notes)}
    rows |= {split: [] for split in eval_splits(config)}
    if is_each_apart(config):
        for split, source in zip(eval_splits(config), sources[1]):
            rows[split] = open_rows([source], config, sampler, report.notes)
    elif sources[1]:
        rows["eval"] = open_rows(sources[1], config, sampler, report.notes)
    elif config.val_size:
        rows["train"], rows["eval"] = split_rows(rows["train"], config.val_size, config.seed)

    about = {}
    most_processes = 1
    for split in rows:
        writer = SplitWriter(work, split)
        shown = split.partition("_")[0]
        has_targets, processes = encode_rows(rows[split], config, tokenizer, template, encode,
                                             report, shown, writer)
        about[split] = {**writer.close(), "teaches": has_targets, "rows": len(rows[split])}
        report.examples[shown] = report.examples.get(shown, 0) + sum(writer.learnable)
        most_processes = max(most_processes, processes)
    return about, most_processes


def is_each_apart(config) -> bool:
    """Whether each dataset of eval_dataset is a split by itself."""
    return bool(config.eval_on_each_dataset and config.eval_dataset)


def eval_splits(config) -> list[str]:
    """The splits for evaluation: one, or with eval_on_each_dataset one for each dataset."""
    if is_each_apart(config):
        return [f"eval_{number}" for number in range(len(eval_names(config)))]
    return ["eval"]


def eval_names(config) -> list[str]:
    """The datasets of eval_dataset; one that is named twice is read once."""
    return list(dict.fromkeys(config.eval_dataset))


def open_splits(folder: Path, config, about: dict,
                keep_unlearnable: bool) -> tuple[Examples, Examples | dict]:
    """The examples of all splits in a folder, as load_examples returns them."""
    apart = packing_of(config)[0] == "apart"
    train, *evals = [Examples(folder, split, about[split], apart, keep_unlearnable)
                     for split in ("train", *eval_splits(config))]
    if is_each_apart(config):
        return train, dict(zip(eval_names(config), evals))
    return train, evals[0]


def check_has_targets(config, report: DataReport, about: dict, keep_unlearnable: bool):
    """Raise ValueError for a split in which no token carries loss, unless keep_unlearnable."""
    for split in ("train", *eval_splits(config)):
        if about[split]["rows"] and not about[split]["teaches"] and not keep_unlearnable:
            raise ValueError(nothing_to_learn(config, report, split, about[split]["rows"]))


def nothing_to_learn(config, report: DataReport, split: str, rows: int) -> str:
    """The message for data in which no token carries loss."""
    why = "no token carries loss; is cutoff_len too small?"
    if report.dropped_tail:
        why = f"{report.dropped_tail} tokens do not fill one block"
    return (f"{config.source}: nothing to learn in the {rows} rows of the {split} data with "
            f"cutoff_len: {config.cutoff_len}: {why}")


def split_rows(rows: Rows, val_size: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows at random: (train, eval). val_size: the fraction for eval, or a count if above 1.

    The training rows are permuted as well.
    """
    count = int(val_size) if val_size > 1 else int(np.ceil(val_size * len(rows)))
    if not 0 < count < len(rows):
        raise ValueError(f"val_size: {val_size} takes {count} of {len(rows)} rows, so that none is "
                         "left to train on")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.take(order[count:]), rows.take(order[:count])


def encode_rows(rows: Rows, config, tokenizer, template, encode: Callable, report: DataReport,
                split: str, writer: SplitWriter) -> tuple[bool, int]:
    """Write rows as examples, in order; packed if the config says so, also those without a label.

    -> (whether any label is predicted by a token before it, number of processes).
    """
    # rows that packing may combine, and that are tokenized by one call
    batch_size = config.preprocessing_batch_size
    starts = range(0, len(rows), batch_size)
    processes = num_processes(len(starts), config.preprocessing_num_workers)
    unfilled = []
    marked_questions = {}
    empty_questions = []
    has_targets = False

    def encode_from(start: int, check_only: bool = False) -> EncodedRows:
        batch = rows[start:start + batch_size]
        return encode_batch(batch, config, tokenizer, template, encode, check_only)

    # disable=None: a bar only on a terminal
    hidden = bool(config.disable_tqdm) or not rows or None
    with tqdm(total=len(rows), desc=f"tokenizing {split} rows", unit="row", leave=False,
              disable=hidden) as bar:
        for start, part in zip(starts, parallel_map(encode_from, starts, processes)):
            if part.bad and not config.skip_bad_rows:
                later = (encode_from(i, check_only=True) for i in starts if i > start)
                refuse(part.bad + [line for other in later for line in other.bad])
            report.add(part, split)
            writer.add(part)
            unfilled += part.unfilled
            marked_questions = {**part.marked_questions, **marked_questions}
            empty_questions += part.empty_questions
            has_targets = has_targets or part.has_targets
            bar.update(min(batch_size, len(rows) - start))
    report.notes += note_unfilled(unfilled) + note_marked_questions(marked_questions)
    report.notes += note_empty_questions(empty_questions)
    return has_targets, processes


def encode_batch(rows: list[RawRow], config, tokenizer, template, encode: Callable,
                 check_only: bool = False) -> EncodedRows:
    """The examples of some rows, which packing may combine. check_only: only find bad rows."""
    part = EncodedRows()
    conversations = []
    for row in rows:
        part.counts_of(row).rows += 1
        if conversation := conversation_of(row, config, part):
            conversations.append((row, conversation))
    encode(conversations, config, tokenizer, template, part, check_only)
    return part


def conversation_of(row: RawRow, config, part: EncodedRows) -> Conversation | None:
    """A row converted, its placeholders filled; None for a bad row, which is recorded in `part`."""
    try:
        conversation = fill_placeholders(convert(row, config.stage), config.placeholders)
    except ValueError as error:
        return part.reject(row, error)

    names = set()
    for message in conversation.messages:
        if message["role"] not in ANSWERS and message.get("train") and not config.train_on_prompt:
            part.marked_questions.setdefault(row.source.name, row.where)
        if (message["role"] == "user" and config.stage != "pt"
                and not message["content"].strip()):
            part.empty_questions.append((row.source.name, row.where))
        if message["role"] == "assistant" and "{{" in message["content"]:
            names.update(PLACEHOLDER.findall(message["content"]))
    if names:
        part.unfilled.append((row.source.name, names, f"{row.where}: {excerpt(row.data)}"))
    return conversation


def note_unfilled(unfilled: list) -> list[str]:
    """A note for each dataset with answers that contain an unfilled {{name}}.

    unfilled: (dataset, {names}, where) of each such answer.
    """
    notes = []
    for dataset in dict.fromkeys(dataset for dataset, _, _ in unfilled):
        found = [(names, where) for name, names, where in unfilled if name == dataset]
        names = sorted(set().union(*(names for names, _ in found)))
        noun = "placeholder" if len(names) == 1 else "placeholders"
        marks = ", ".join("{{%s}}" % name for name in names)
        values = ", ".join(f"{name}: …" for name in names)
        notes.append(
            f"dataset '{dataset}' has the {noun} {marks} unfilled in {len(found)} of its answers "
            f"(first: {found[0][1]}). To fill it, set in the config: placeholders: {{{values}}}")
    return notes


def note_marked_questions(marked: dict[str, str]) -> list[str]:
    """A note for each dataset with questions that are marked as to be learned, which none is.

    marked: dataset -> where the first of them is.
    """
    return [f"dataset '{dataset}' marks questions as to be learned (first: {where}); only answers "
            "are, unless train_on_prompt: true is set" for dataset, where in marked.items()]


def note_empty_questions(found: list[tuple[str, str]]) -> list[str]:
    """A note for each dataset with questions without text. found: (dataset, where) of each."""
    notes = []
    for dataset in dict.fromkeys(dataset for dataset, _ in found):
        places = [where for name, where in found if name == dataset]
        notes.append(f"dataset '{dataset}' has {len(places)} questions without text (first: "
                     f"{places[0]}); their answers are trained on. If that is not meant, take the "
                     "rows out, or name the right column in dataset_info.json")
    return notes


def refuse(bad: list[str]):
    """Raise ValueError for rows that cannot be used."""
    noun = "bad row" if len(bad) == 1 else "bad rows"
    more = f"\n  … and {len(bad) - MAX_SHOWN} more" if len(bad) > MAX_SHOWN else ""
    shown = "\n  ".join(bad[:MAX_SHOWN])
    raise ValueError(f"{len(bad)} {noun}\n  {shown}{more}\nCorrect them, or leave them out with "
                     "skip_bad_rows: true")
