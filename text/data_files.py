"""Rows of data files: dataset_info.json, files of every kind, and which column is what.

    sources = find_sources(["identity"], config, notes)     # entries of dataset_info.json, or files
    rows = open_rows(sources, config, sampler, notes)       # a row is parsed when it is asked for

Requires: text/conversations.py, text/packed_files.py, text/hub_files.py, text/mix_datasets.py.
Next: text/token_cache.py.

The format of dataset_info.json is LLaMA-Factory's (github.com/hiyouga/LLaMA-Factory, see its folder
`data`); docs/differences.md lists what differs on purpose.
"""
import codecs
import csv
import io
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from errors import did_you_mean
from text.conversations import (COLUMNS, JUDGED, NO_ANSWER, OPENAI_TAGS, PAIRS, REQUIRED_TAGS,
                                ROLES, SAMPLED, TAGS, RawRow, Source, check_stage)
from text.hub_files import (fetch_rows, hub_files, is_on, modelscope_repository,
                            open_repository)
from text.json_text import parse, parse_first, why_not_row, why_not_rows, wrapped_hint
from text.mix_datasets import mixed_order
from text.packed_files import COMPRESSED, TABLES, file_type, open_packed, unpacked_suffix
from text.plain_text import excerpt
from text.turns import keys_read

UNSUPPORTED = {"images": "images", "videos": "videos", "audios": "audio"}   # role -> what it holds
ENTRY_KEYS = {
    "file_name": str, "hf_hub_url": str, "ms_hub_url": str, "om_hub_url": str, "script_url": str,
    "cloud_file_name": str, "formatting": str, "ranking": bool, "subset": str, "split": str,
    "folder": str, "num_samples": int, "columns": dict, "tags": dict,
}
OTHER_PLACES = ("om_hub_url", "script_url", "cloud_file_name")    # not read here

# How a data file given by its path is recognized: for each role its usual names, likeliest first.
LIKELY_COLUMNS = {
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text", "content", "document"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "kto_tag": ("kto_tag", "label"),
    "prompt": ("instruction", "prompt", "question", "input", "query"),
    "query": ("input", "context"),
    "response": ("output", "response", "completion", "answer"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
}
LIKELY_TAGS = {
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt", "model", "bot"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}

SPACE = r"[ \t\n\r]*"           # JSON's white space
OPENING = re.compile(rf"{SPACE}\[{SPACE}")
COMMA = re.compile(rf"{SPACE},{SPACE}")
CLOSING = re.compile(rf"{SPACE}\]{SPACE}\Z")
EMPTY_LIST = re.compile(rf"{SPACE}\[{SPACE}\]{SPACE}\Z")
NAMED_SETS = Path(__file__).with_name("named_sets.json")
BLOCK = 2**20                   # bytes read at once
LARGEST_OBJECT = 2**24          # bytes in which an object over several lines is looked for
MOST_DRAWN = 10**8              # rows that num_samples may draw beyond those of a dataset


# ---- files and rows ---------------------------------------------------------------------------


class DataFile:
    """One data file; only the positions of its rows are kept in memory.

    keys: names of all columns, in order of first appearance. turn_keys: of each column that holds
    turns, the keys of these, as far as one has a value. most_rows: where to stop reading; is_read:
    whether the end was reached. Raises ValueError for a file that cannot be read. A row that cannot
    be parsed counts as a row; `convert` refuses it.
    """

    def __init__(self, path: Path, most_rows: int | None = None):
        if unpacked_suffix(path) not in READERS:
            raise ValueError(f"{path}: type '{file_type(path)}' cannot be read, only "
                             f"{', '.join((*READERS, *TABLES))}, and the text files also with "
                             f"{' or '.join(COMPRESSED)} after it")
        scan, self.parse = READERS[unpacked_suffix(path)]
        self.path = path
        self.file = open_packed(path)
        self.header = None          # of a CSV file
        start = self.skip_byte_order_mark()

        keys = {}
        self.turn_keys = {}
        self.turn_shapes = set()    # combinations of keys that are noted, to be quick
        places = array("q")
        self.is_read = True
        for number, data, first_byte, end_byte in scan(self, start):
            if most_rows and len(places) == 3 * most_rows:
                self.is_read = False
                break
            places.extend((number, first_byte, end_byte))
            if isinstance(data, dict):
                keys.update(dict.fromkeys(map(str, data)))
                self.add_turn_keys(data)
        self.keys = list(keys)
        self.places = np.frombuffer(places, np.int64).reshape(-1, 3)

    def __len__(self):
        return len(self.places)

    def add_turn_keys(self, data: dict):
        """Note the keys of a row's turns."""
        for column, value in data.items():
            turns = value if isinstance(value, list) else [value]
            for turn in turns:
                if not isinstance(turn, dict) or (column, *turn) in self.turn_shapes:
                    continue
                found = [key for key, item in turn.items() if item is not None]
                self.turn_keys.setdefault(column, {}).update(dict.fromkeys(found))
                if len(found) == len(turn):
                    self.turn_shapes.add((column, *turn))

    def skip_byte_order_mark(self) -> int:
        """The first byte of the text; raises ValueError for UTF-16."""
        head = self.file.read(3)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{self.path} is UTF-16; make it UTF-8: "
                             f"iconv -f UTF-16 -t UTF-8 {self.path} > NEW_FILE")
        return 3 if head == b"\xef\xbb\xbf" else 0

    def row(self, place: int, source: Source) -> RawRow:
        """The row at a place, counted from 0."""
        number, start, end = self.places[place].tolist()
        raw = read_at(self.file, start, end - start)
        is_utf8 = True
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            is_utf8 = False
            text = decode_utf8(raw)
        return RawRow(self.path, number, self.parse(self, text), source, is_utf8)

    def lines(self, start: int, newline: str) -> Iterator[tuple[str, int, int]]:
        """(text, first byte, end byte) of every line from byte `start` on; newline: as in open."""
        self.file.seek(start)
        text = io.TextIOWrapper(self.file, encoding="utf-8", errors="surrogateescape",
                                newline=newline)
        try:
            for line in text:
                end = start + num_bytes(line)
                yield line, start, end
                start = end
        finally:
            text.detach()           # otherwise the file would be closed with it


class Rows(Sequence):
    """Raw rows by number.

    files: [(DataFile, Source), …]. Row i is in files[file_of[i]], at place place_of[i].
    """

    def __init__(self, files: list, file_of: np.ndarray, place_of: np.ndarray):
        self.files = files
        self.file_of = file_of
        self.place_of = place_of

    def __len__(self):
        return len(self.file_of)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        file, source = self.files[self.file_of[number]]
        return file.row(self.place_of[number], source)

    def take(self, numbers) -> "Rows":
        """These rows, in this order."""
        return Rows(self.files, self.file_of[numbers], self.place_of[numbers])


def open_rows(sources: list[Source], config, sampler: np.random.RandomState,
              notes: list[str]) -> Rows:
    """The rows of some datasets, in the order of mix_strategy: usually one after the other.

    sampler: draws the num_samples rows of an entry that has them. Adds to `notes` what the user
    should know. Raises ValueError or FileNotFoundError.
    """
    files, file_of, place_of = [], [], []
    for source in sources:
        rows = rows_of_source(source, config, sampler, notes)
        file_of.append(rows.file_of + len(files))
        place_of.append(rows.place_of)
        files += rows.files
    order = mixed_order(list(map(len, file_of)), config.mix_strategy, config.interleave_probs,
                        config.seed)
    return Rows(files, np.concatenate(file_of), np.concatenate(place_of)).take(order)


def rows_of_source(source: Source, config, sampler: np.random.RandomState,
                   notes: list[str]) -> Rows:
    """The rows of a dataset: num_samples of them, drawn, and at most max_samples."""
    needed = config.max_samples if source.num_samples is None else None
    files = open_files(source, needed)
    rows = all_rows(files, source)
    if not rows:
        names = ", ".join(map(str, source.files))
        raise ValueError(f"dataset '{source.name}' is empty: no rows in {names}")
    source = check_columns(source, rows, config.stage, notes)

    picked = np.arange(len(rows))
    if source.num_samples is not None:
        picked = sampler.permutation(len(rows))[:source.num_samples]
        missing = source.num_samples - len(rows)
        if missing > MOST_DRAWN:
            raise ValueError(f"dataset '{source.name}': num_samples: {source.num_samples} of "
                             f"{len(rows)} rows; at most {MOST_DRAWN:,} can be drawn again")
        if missing > 0:
            picked = np.append(picked, sampler.choice(len(rows), missing))
    return all_rows(files, source).take(picked[:config.max_samples])


def open_files(source: Source, needed: int | None) -> list[DataFile]:
    """The files of a dataset, read until there are `needed` rows; None: all of them."""
    files = []
    missing = needed
    for path in source.files:
        files.append(DataFile(path, missing))
        if needed:
            missing -= len(files[-1])
            if not missing:
                break
    return files


def all_rows(files: list[DataFile], source: Source) -> Rows:
    """The rows of these files, one file after the other."""
    counts = [len(file) for file in files]
    return Rows(
        files=[(file, source) for file in files],
        file_of=np.repeat(np.arange(len(files)), counts),
        place_of=np.concatenate([np.arange(count) for count in counts]),
    )


def decode_utf8(raw: bytes) -> str:
    """The text; bytes that are not UTF-8 become lone surrogates, which `convert` refuses."""
    return raw.decode("utf-8", errors="surrogateescape")


def num_bytes(text: str) -> int:
    """The size of a text in its file."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def read_at(file, start: int, size: int) -> bytes:
    """Bytes from anywhere in a file that processes may share (but not on Windows)."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, start)
    file.seek(start)
    return file.read(size)


# ---- dataset_info.json ------------------------------------------------------------------------


def find_sources(names: list[str], config, notes: list[str]) -> list[Source]:
    """Where the rows of the named datasets are; reads nothing but dataset_info.json."""
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names):
        notes.append("a dataset that is named twice is read once, as in LLaMA-Factory")
    return [find_source(name, config, notes) for name in unique]


def find_source(name: str, config, notes: list[str]) -> Source:
    """The entry `name` of dataset_info.json, or else the data file (or folder) at that path."""
    if config.dataset_dir == "ONLINE":      # LLaMA-Factory's word: names are those of repositories
        hub = "ms_hub_url" if is_on("USE_MODELSCOPE_HUB") else "hf_hub_url"
        return source_of_entry(name, {hub: name}, Path("dataset_dir: ONLINE"), config, notes)
    info_path = Path(config.dataset_dir) / "dataset_info.json"
    info = read_dataset_info(info_path, name)
    if name in info:
        entry = {key: value for key, value in info[name].items() if value is not None}
        return source_of_entry(name, entry, info_path, config, notes)
    for path in (Path(name), Path(config.dataset_dir) / name):
        if path.exists():
            return Source(name, files_at(path))
    if entry := named_sets().get(name):
        notes.append(f"dataset '{name}' is the one of docs/datasets.md; an entry of that name in "
                     f"{info_path} would come first")
        return source_of_entry(name, entry, NAMED_SETS, config, notes)
    if not info_path.is_file():
        raise FileNotFoundError(f"dataset '{name}': neither {info_path} nor a file of that name "
                                "exists (dataset_dir is the folder of dataset_info.json)"
                                f"{did_you_mean(name, named_sets())}")
    known = ", ".join(list(info)[:12])
    more = f" and {len(info) - 12} more" if len(info) > 12 else ""
    raise ValueError(f"{info_path}: no dataset '{name}'{did_you_mean(name, info)}; a data file can "
                     f"also be given by its path. It names {known}{more}")


def named_sets() -> dict[str, dict]:
    """The data sets of docs/datasets.md: name -> entry, as in dataset_info.json."""
    return json.loads(NAMED_SETS.read_text(encoding="utf-8"))


def read_dataset_info(path: Path, name: str) -> dict:
    """The entries of dataset_info.json, {} without such a file; the named one must be an object."""
    if not path.is_file():
        return {}
    try:
        info = parse(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(info, dict) or not isinstance(info.get(name, {}), dict):
        raise ValueError(f"{path} must be an object, dataset name -> entry, and every entry an "
                         "object")
    return info


def source_of_entry(name: str, entry: dict, info_path: Path, config, notes: list[str]) -> Source:
    """An entry of dataset_info.json, checked, with its files.

    What cannot be honored is an error or a note.
    """
    where = f"{info_path}, dataset '{name}'"
    check_entry(entry, where)
    for key in entry:
        if key not in ENTRY_KEYS:
            notes.append(f"{where}: key '{key}' is not used{did_you_mean(key, ENTRY_KEYS)}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise ValueError(f"{where}: formatting '{formatting}' is none of {', '.join(COLUMNS)}")
    columns = entry.get("columns", COLUMNS[formatting])
    tags = entry.get("tags", OPENAI_TAGS if formatting == "messages" else TAGS)
    ranking = bool(entry.get("ranking"))
    check_layout(formatting, columns, tags, ranking, where, config.stage)
    if formatting == "alpaca" and "tags" in entry:
        notes.append(f"{where}: tags are not used: formatting alpaca has no turns")
        tags = TAGS
    if formatting == "openai":
        notes.append(f"{where}: formatting openai adds 'detailed thinking off' to the system text, "
                     "as LLaMA-Factory does; formatting: messages reads the same rows without it")
    return Source(
        name=name,
        files=files_of_entry(entry, info_path, where, config, notes),
        formatting=formatting,
        columns=columns,
        tags=tags,
        num_samples=entry.get("num_samples"),
        ranking=ranking,
    )


def check_entry(entry: dict, where: str):
    """Raise ValueError for a value whose type is not that of ENTRY_KEYS, or a count below 1."""
    words = {
        str: "a text",
        bool: "true or false",
        int: "a whole number above 0",
        dict: "an object of texts",
    }
    for key in ENTRY_KEYS.keys() & entry.keys():
        value = entry[key]
        expected = ENTRY_KEYS[key]
        good = type(value) is expected
        if good and expected is dict:
            good = all(isinstance(text, str) for text in value.values())
        if good and expected is int:
            good = value >= 1
        if not good:
            found = excerpt(json.dumps(value, ensure_ascii=False))
            raise ValueError(f"{where}: {key}: {found} is not {words[expected]}")


def check_layout(formatting: str, columns: dict, tags: dict, ranking: bool, where: str,
                 stage: str):
    """Raise ValueError for columns or tags that cannot be read, or do not suit the stage."""
    for role in columns:
        if role in UNSUPPORTED:
            raise ValueError(f"{where} holds {UNSUPPORTED[role]}, which this release cannot read")
    check_stage(ranking, "kto_tag" in columns, where, stage)
    for table, words, known in (("columns", columns, ROLES), ("tags", tags, TAGS)):
        for word in words:
            if word not in known:
                raise ValueError(
                    f"{where}: {table}: '{word}' is unknown{did_you_mean(word, known)}. Keys are "
                    f"{', '.join(known)}; values are names from your data")
    missing = [tag for tag in REQUIRED_TAGS if not tags.get(tag)]
    if missing and formatting != "alpaca":
        raise ValueError(f"{where}: tags: '{missing[0]}' is not named; an entry with tags has no "
                         "default ones")


def files_of_entry(entry: dict, info_path: Path, where: str, config,
                   notes: list[str]) -> tuple[Path, ...]:
    """The files that an entry names, on this machine or on the hub."""
    hub = hub_of_entry(entry, where)
    if hub:
        return files_on_hub(entry, hub, where, config, notes)
    if not entry.get("file_name"):
        other = [key for key in OTHER_PLACES if key in entry]
        if other:
            raise ValueError(f"{where}: {other[0]} is given, but only file_name, hf_hub_url and "
                             "ms_hub_url can be read: download the data and give its file_name")
        raise ValueError(f"{where}: neither file_name nor hf_hub_url is given")
    if entry.get("split", "train") != "train":
        raise ValueError(f"{where}: split '{entry['split']}', but a local file has no splits; "
                         "max_samples takes the first rows")
    return files_at(info_path.parent / entry["file_name"])


def hub_of_entry(entry: dict, where: str) -> str:
    """Which of hf_hub_url and ms_hub_url is read; "": neither is given.

    As in LLaMA-Factory, USE_MODELSCOPE_HUB and USE_OPENMIND_HUB choose if there are several.
    """
    if entry.get("ms_hub_url") and (is_on("USE_MODELSCOPE_HUB") or not entry.get("hf_hub_url")):
        return "ms_hub_url"
    if entry.get("om_hub_url") and is_on("USE_OPENMIND_HUB"):
        raise ValueError(f"{where}: USE_OPENMIND_HUB is set, but OpenMind is not read; unset it, "
                         "or download the data and give its file_name")
    return "hf_hub_url" if entry.get("hf_hub_url") else ""


def files_at(path: Path) -> tuple[Path, ...]:
    """The data file at a path, or all files of a folder by name, which must be of one type."""
    if not path.exists():
        neighbors = []
        if path.parent.is_dir():
            neighbors = [file.name for file in path.parent.iterdir()]
        raise FileNotFoundError(f"data file {path} does not exist"
                                f"{did_you_mean(path.name, neighbors)}")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder but a pipe or a device, which "
                         "cannot be read twice; write its content to a file first")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir()
                       if file.is_file() and not file.name.startswith("."))
    types = sorted({file_type(file) for file in files})
    if len(types) != 1:
        found = ", ".join(types) or "no files"
        raise ValueError(f"folder {path} must hold data files of one type; it has {found}")
    return tuple(files)


def files_on_hub(entry: dict, hub: str, where: str, config,
                 notes: list[str]) -> tuple[Path, ...]:
    """The files of an entry's split on a hub, as many as max_samples needs.

    They are downloaded, or found in the cache.
    """
    needed = None if entry.get("num_samples") else config.max_samples
    found = []
    try:
        opened = modelscope_repository if hub == "ms_hub_url" else open_repository
        repository = opened(entry[hub], config.cache_dir)
        repository, names = hub_files(repository, entry, found)
        paths = fetch_rows(repository, names, needed, count_rows)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    notes += [f"dataset {note}" for note in found]
    if len(paths) < len(names):
        notes.append(f"dataset '{repository.name}': {len(paths)} of {len(names)} files hold the "
                     f"{needed} rows of max_samples; the others were not fetched")
    return tuple(paths)


def count_rows(path: Path, most: int) -> int:
    """The number of rows in a file; at most `most` are read."""
    return len(DataFile(path, most))


# ---- kinds of files ---------------------------------------------------------------------------
# A scan yields (number from 1, data, first byte, end byte) of every row; a parser reads one again.


def scan_json(file: DataFile, start: int) -> Iterator[tuple]:
    """A list of objects, or one object a line, whatever the file is called."""
    first = next((line for line, _, _ in file.lines(start, "\n") if line.strip()), "")
    if first.lstrip()[:1] == "[":
        yield from scan_list(file, start)
        return
    if first.lstrip()[:1] == "{" and parse_json(file, first) == first:
        check_one_row_a_line(file)
    # lines end only in \n: U+2028 may be inside a text
    for number, (line, first_byte, end_byte) in enumerate(file.lines(start, "\n"), 1):
        if line.strip():
            data = parse_json(file, line.removesuffix("\n"))
            yield number, data, first_byte, end_byte - line.endswith("\n")


def check_one_row_a_line(file: DataFile):
    """Raise ValueError for a file whose first object is spread over several lines."""
    text = decode_utf8(read_at(file.file, 0, LARGEST_OBJECT)).removeprefix("\ufeff")
    if reason := why_not_rows(text):
        raise ValueError(f"{file.path}: {reason}")


def scan_list(file: DataFile, start: int) -> Iterator[tuple]:
    """The elements of a JSON list, with one block of the file in memory at a time."""
    utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    separator = OPENING             # of the list before its first element, then commas
    number = 0
    text = ""                       # read, and not yet parsed
    size = BLOCK
    file.file.seek(start)
    while True:
        raw = file.file.read(size)
        text += utf8.decode(raw, not raw)
        position = 0
        size = 2 * size             # for an element larger than a block
        while match := separator.match(text, position):
            try:
                data, end = parse_first(text, match.end())
            except json.JSONDecodeError:
                break
            except ValueError as error:
                raise ValueError(f"{file.path} row {number + 1}: {error}") from None
            if end == len(text):    # a number may continue in the next block
                break
            first_byte = start + num_bytes(text[position:match.end()])
            start = first_byte + num_bytes(text[match.end():end])
            number += 1
            yield number, data, first_byte, start
            separator = COMMA
            position = end
            size = BLOCK
        text = text[position:]
        if not raw:
            break
    closing = CLOSING if number else EMPTY_LIST
    if not closing.match(text):
        check_json(file)


def check_json(file: DataFile):
    """Raise ValueError with the place of the first error in a JSON file."""
    file.file.seek(0)
    text = decode_utf8(file.file.read()).removeprefix("\ufeff")
    try:
        parse(text)
    except json.JSONDecodeError as error:
        near = excerpt(" ".join(text[max(error.pos - 40, 0):error.pos + 40].split()))
        before = text[:error.pos].rstrip()
        hint = ""
        if before.endswith(",") and text[error.pos:error.pos + 1] == "]":
            hint = ". Remove the comma before ]"
        raise ValueError(f"{file.path}: not valid JSON at line {error.lineno}, column "
                         f"{error.colno} ({error.msg}), near {near}{hint}") from None


def parse_json(file: DataFile, text: str):
    """The row; a line that is not JSON stays a text.

    A byte order mark before a row is left from a file that was appended to another one.
    """
    try:
        return parse(text.removeprefix("\ufeff"))
    except ValueError:
        return text


def scan_csv(file: DataFile, start: int) -> Iterator[tuple]:
    """Comma separated, the first line names the columns; every value is a text, also 3 and None."""
    csv.field_size_limit(2**31 - 1)             # the default refuses fields over 131,072 characters
    read_to = [start]                           # end of what the reader has read, in bytes

    def lines():
        for line, _, read_to[0] in file.lines(start, ""):
            yield line

    reader = csv.reader(lines())
    number = 0
    try:
        file.header = next(reader, [])
        first_byte = read_to[0]
        for fields in reader:
            if fields:                          # an empty line is no row
                number += 1
                yield number, csv_row(file.header, fields), first_byte, read_to[0]
            first_byte = read_to[0]
    except csv.Error as error:
        raise ValueError(f"{file.path}: not a CSV file ({error})") from None


def parse_csv(file: DataFile, text: str):
    """The row with this text."""
    return csv_row(file.header, next(csv.reader(io.StringIO(text, newline=""))))


def csv_row(header: list[str], fields: list[str]):
    """A dict, or the text of a row with a field too many or too few."""
    return dict(zip(header, fields)) if len(header) == len(fields) else ",".join(fields)


def scan_text(file: DataFile, start: int) -> Iterator[tuple]:
    """One document a line, in the column `text`; an empty line is an empty document."""
    for number, (line, first_byte, end_byte) in enumerate(file.lines(start, ""), 1):
        yield number, parse_text(file, line), first_byte, end_byte


def parse_text(file: DataFile, text: str) -> dict:
    """A line without its end, as a row."""
    return {"text": text.removesuffix("\n").removesuffix("\r")}


READERS = {
    ".json": (scan_json, parse_json),
    ".jsonl": (scan_json, parse_json),
    ".csv": (scan_csv, parse_csv),
    ".txt": (scan_text, parse_text),
}


# ---- which column is what ---------------------------------------------------------------------


def check_columns(source: Source, rows: Rows, stage: str, notes: list[str]) -> Source:
    """The source, its layout recognized if none was declared.

    Raises ValueError if a column that is needed does not exist.
    """
    keys = list(dict.fromkeys(key for file, _ in rows.files for key in file.keys))
    if not source.formatting:
        source = recognize_layout(source, rows, keys, stage)
        found = ", ".join(f"{role} = {column}" for role, column in source.columns.items())
        notes.append(f"dataset '{source.name}' was recognized as {source.formatting}: {found}")

    source = without_prompt(source, rows, keys)
    needed = needed_roles(source, stage)
    if source.ranking and needed[0] not in source.columns and are_turns(source, rows):
        needed = needed[1:]
        notes.append(f"dataset '{source.name}': no column holds the prompt: it is what chosen and "
                     "rejected begin with, as in TRL")
    for role in needed:
        if role not in source.columns:
            hint = ""
            if role == "response":
                hint = " (the answer to learn); plain text is for stage: pt"
            raise ValueError(f"dataset '{source.name}': columns in dataset_info.json must name "
                             f"'{role}'{hint}")
    is_read = all(file.is_read for file, _ in rows.files)
    for role, column in source.columns.items():
        # many files of the default layout simply have no `input`; a later row may have others
        by_default = ("query", "response") if stage in SAMPLED else ("query",)
        optional = role in by_default and source.columns == COLUMNS["alpaca"]
        optional |= not is_read and role not in needed
        if keys and column not in keys and not optional:
            hint = wrapped_hint(rows[0].data) if len(rows) == 1 else ""
            raise ValueError(f"dataset '{source.name}': no row has the column '{column}' ({role})"
                             f"{did_you_mean(column, keys)}. The rows have {', '.join(keys)}; "
                             f"name the right one under columns in dataset_info.json{hint}")

    roles = ("prompt", "query", "messages") if stage == "pt" else ROLES
    read = [source.columns.get(role) for role in roles]
    unread = [key for key in keys if key not in read]
    if unread:
        notes.append(f"dataset '{source.name}': columns not used: {names_in_words(unread)}")
    if unread := unread_turn_keys(source, rows):
        notes.append(f"dataset '{source.name}': keys of turns that are not used: "
                     f"{', '.join(unread)}")
    return source


def unread_turn_keys(source: Source, rows: Rows) -> list[str]:
    """The keys of turns that nothing reads, of the columns that may hold turns."""
    unread = {}
    for role in ("prompt", "response", "messages", "chosen", "rejected"):
        column = source.columns.get(role)
        for file, _ in rows.files:
            keys = file.turn_keys.get(column, {})
            tags = source.tags or (OPENAI_TAGS if "role" in keys else TAGS)
            read = keys_read(tags, calls=source.formatting != "sharegpt")
            unread.update((key, True) for key in keys if key not in read)
    return list(unread)


def question_role(source: Source) -> str:
    return "prompt" if source.formatting == "alpaca" else "messages"


def without_prompt(source: Source, rows: Rows, keys: list[str]) -> Source:
    """The source; of pairs that are whole conversations without the column of a prompt.

    A column of the layout that no row has is then left out.
    """
    question = question_role(source)
    if not source.ranking or source.columns.get(question) in keys or not are_turns(source, rows):
        return source
    columns = {role: column for role, column in source.columns.items()
               if role not in ("prompt", "messages", "query", "response")}
    if source.formatting == "alpaca":
        tags = recognize_tags(rows, columns["chosen"], None)
        return replace(source, formatting="messages", columns=columns, tags=tags)
    return replace(source, columns=columns)


def are_turns(source: Source, rows: Rows) -> bool:
    """Whether the columns of both answers hold lists of turns."""
    turns = {column for file, _ in rows.files for column in file.turn_keys}
    return {source.columns.get(role) for role in ("chosen", "rejected")} <= turns


def needed_roles(source: Source, stage: str) -> tuple[str, ...]:
    """The roles for which a source must name a column."""
    question = question_role(source)
    if source.ranking:
        return question, "chosen", "rejected"
    if source.formatting == "alpaca" and stage != "pt" and stage not in SAMPLED:
        return question, "response"
    return (question,)


def recognize_layout(source: Source, rows: Rows, keys: list[str], stage: str) -> Source:
    """The layout of a file given by its path, from the names of columns and speakers."""
    where = str(source.files[0])
    if not keys:
        found = rows[0].data
        reason = f": {why_not_row(found)}" if isinstance(found, str) else ""
        raise ValueError(f"{where}: no row is an object with columns; row {rows[0].number} is "
                         f"{excerpt(found)}{reason}")
    found = {}
    for role, names in LIKELY_COLUMNS.items():
        found[role] = next((name for name in names if name in keys), None)

    extra_roles = ["system", "tools"]
    if stage in PAIRS + JUDGED:
        ranking = bool(found["chosen"] and found["rejected"])
        check_stage(ranking, bool(found["kto_tag"]), where, stage)
        source = replace(source, ranking=ranking and stage in PAIRS)
        extra_roles += ["chosen", "rejected"] if source.ranking else ["kto_tag"]
    extras = {role: found[role] for role in extra_roles if found[role]}

    if found["messages"]:
        columns = {"messages": found["messages"], **extras}
        tags = recognize_tags(rows, found["messages"], found["chosen"])
        return replace(source, formatting="messages", columns=columns, tags=tags)
    if stage == "pt" and found["text"]:
        return replace(source, formatting="alpaca", columns={"prompt": found["text"]})
    if source.ranking and not found["prompt"]:
        pairs = replace(source, formatting="alpaca", columns=extras)
        if are_turns(pairs, rows):
            return without_prompt(pairs, rows, keys)
    has_answer = found["response"] or source.ranking or stage in SAMPLED
    if stage == "pt" or not found["prompt"] or not has_answer:
        hint = wrapped_hint(rows[0].data) if len(rows) == 1 else ""
        raise ValueError(f"{where}: the names of the columns do not show which ones to read: "
                         f"{names_in_words(keys)}{stage_hint(stage, found)}. Describe them in "
                         f"dataset_info.json{hint}")

    if found["query"] == found["prompt"]:
        found["query"] = None
    columns = {}
    for role in ("prompt", "query", "response", "history"):
        if found[role] and not (source.ranking and role == "response"):
            columns[role] = found[role]
    return replace(source, formatting="alpaca", columns={**columns, **extras})


def recognize_tags(rows: Rows, messages: str, chosen: str | None) -> dict:
    """The words for speakers that occur in the turns; the likeliest ones for the others."""
    turns = []
    for row in rows:
        if isinstance(row.data, dict):
            candidates = row.data.get(messages)
            candidates = candidates if isinstance(candidates, list) else []
            candidates = [*candidates, row.data.get(chosen)]
            turns += [turn for turn in candidates if isinstance(turn, dict)]
    role_tag = next((tag for tag in LIKELY_TAGS["role_tag"] if any(tag in turn for turn in turns)),
                    "role")
    words = {key for turn in turns for key in turn}
    words |= {str(turn.get(role_tag)) for turn in turns}
    tags = {}
    for tag, names in LIKELY_TAGS.items():
        tags[tag] = next((name for name in names if name in words), names[0])
    return tags


def names_in_words(keys: list[str]) -> str:
    """The names of columns for a message; beside a misspelled one its usual spelling."""
    usual = {name for names in LIKELY_COLUMNS.values() for name in names}
    words = []
    for key in keys:
        hint = "" if key in usual else did_you_mean(key, usual - set(keys))
        words.append(f"{key}{hint}")
    return ", ".join(words)


def stage_hint(stage: str, found: dict) -> str:
    """A hint for the error message that the stage may be wrong."""
    if stage == "pt":
        return " (stage: pt reads one column of text; questions and answers are for stage: sft)"
    if found["chosen"] and found["rejected"] and stage not in PAIRS:
        return f" (pairs of chosen and rejected are for stages {' and '.join(PAIRS)})"
    if found["prompt"] and not found["response"]:
        return f" ({NO_ANSWER})"
    return " (plain text is for stage: pt)" if found["text"] else ""
