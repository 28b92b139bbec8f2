"""Tokenised rows on disk: examples by number, none of them in memory, and a second start that tokenises nothing.

A store is a folder:

    train.tokens, eval.tokens   int32: of each example its ids, then its labels
    train.npz, eval.npz         sizes (tokens) and learnable (has it a label?) of each example; of packed ones also
                                parts (how many rows they are made of) and rows (tokens of each row); of judged answers
                                (stage kto) also desired
    store.json                  the key, and what the start page tells of the rows

The key names all that the tokens depend on: the bytes of the data files, settings, chat format, tokenizer, the files of
this program. A store with another key is not read but made anew. It appears under its name only when it is whole.

Read before: data.py (load_examples), which fills and reads it. Read after: train.py.
"""
import json
import os
import shutil
import socket
import tempfile
import zlib
from array import array
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rows import read_at

ABOUT = "store.json"
TOKENISED = "tokenised"         # the folder of a run's store in its output_dir


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


class Examples(Sequence):
    """The examples of one split by number, each read from its file when it is asked for.

    sizes: (n,) tokens of each. longest: tokens of the longest stretch. largest_id: of any token. sign: a checksum of
    all ids and labels, in order. apart: attention is cut between the rows of a packed example.
    """

    def __init__(self, folder: Path, split: str, about: dict, apart: bool, keep_unlearnable: bool = False):
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
        return Example(tokens[:size], tokens[size:], lengths if self.apart else [size], positions, desired)

    def lengths_of(self, number: int) -> list:
        """Tokens of each row that a packed example is made of."""
        first = self.first_row[number]
        return self.rows[first:first + self.parts[number]].tolist()

    @property
    def longest(self) -> int:
        stretches = self.sizes if self.rows is None or not self.apart else self.rows
        return int(stretches.max(initial=0))


def starts_of(counts: np.ndarray, times: int = 1) -> np.ndarray:
    """Where each of these stretches begins when they lie end to end."""
    return times * np.concatenate([[0], np.cumsum(counts[:-1], dtype=np.int64)])[:len(counts)]


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


class SplitWriter:
    """Writes the examples of one split, part after part; `close` says what Examples must know of them."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split, self.file = folder, split, open(folder / f"{split}.tokens", "wb")
        self.sizes, self.learnable, self.parts, self.rows = array("i"), array("b"), array("i"), array("i")
        self.desired = array("b")
        self.crc = self.largest_id = 0

    def add(self, part: Part):
        tokens, start = memoryview(part.tokens), 0
        self.file.write(tokens)
        self.largest_id = max(self.largest_id, int(np.max(np.array(part.tokens, np.int32), initial=0)))
        for size, learnable in zip(part.sizes, part.learnable):
            if learnable:
                self.crc = zlib.crc32(tokens[start:start + 2 * size], self.crc)
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
        index = {"sizes": np.array(self.sizes, np.int32), "learnable": np.array(self.learnable, np.int8)}
        if self.rows:
            index |= {"parts": np.array(self.parts, np.int32), "rows": np.array(self.rows, np.int32)}
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
    """A folder to fill, which takes its name when the block ends well. None: a temporary one, gone after the block."""
    if path is None:
        with tempfile.TemporaryDirectory(prefix="pocket-factory-", ignore_cleanup_errors=True) as work:
            yield Path(work)
        return
    if path.is_dir() and any(path.iterdir()) and not (path / ABOUT).is_file():
        raise ValueError(f"{path} is no folder of tokenised rows, and not empty: name another tokenized_path")
    existed, work = path.parent.exists(), path.with_name(f"{path.name}.{socket.gethostname()}.partial")
    shutil.rmtree(work, ignore_errors=True)                 # of a run that was killed; hosts that share a disk: one each
    work.mkdir(parents=True)
    try:
        yield work
        shutil.rmtree(path, ignore_errors=True)
        try:
            os.replace(work, path)
        except OSError:                                     # another host was faster: its store is as good
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
    """(what store.json says, "") of a store with this key; else None and why it is none, "" where there is nothing."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = about["key"]
    except FileNotFoundError:
        return None, ""
    except (ValueError, KeyError, OSError):
        return None, f"{ABOUT} cannot be read"
    changed = [name for name in {**found, **key} if found.get(name) != key.get(name)]
    return (None, f"changed: {', '.join(changed[:5])}{', …' * (len(changed) > 5)}") if changed else (about, "")
