"""Rows of data files as conversations: dataset_info.json, JSON / CSV / text files, the alpaca and chat layouts.

Read before: nothing. Read after: data.py, which makes ids and labels of what is read here.
Source: the dataset_info.json format is LLaMA-Factory's (github.com/hiyouga/LLaMA-Factory, see its folder `data`); what
differs on purpose is listed in docs/differences.md.
"""
import codecs
import csv
import io
import json
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from errors import did_you_mean
from text.conversations import (COLUMNS, JUDGED, OPENAI_TAGS, PAIRS, REQUIRED_TAGS, ROLES, RawRow,
                                Source, TAGS, check_stage, excerpt)

FOREIGN = {"images": "pictures", "videos": "films", "audios": "sound"}      # roles of models we do not have
ENTRY_KEYS = {"file_name": str, "hf_hub_url": str, "ms_hub_url": str, "om_hub_url": str, "script_url": str,
              "cloud_file_name": str, "formatting": str, "ranking": bool, "subset": str, "split": str, "folder": str,
              "num_samples": int, "columns": dict, "tags": dict}
ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")       # where rows cannot be fetched from

# How a data file given by its path is recognised: for each role the names people use, likeliest first.
LIKELY_COLUMNS = {"messages": ("messages", "conversations", "conversation"), "text": ("text", "content", "document"),
                  "chosen": ("chosen",), "rejected": ("rejected",), "kto_tag": ("kto_tag", "label"),
                  "prompt": ("instruction", "prompt", "question", "input", "query"), "query": ("input", "context"),
                  "response": ("output", "response", "completion", "answer"), "history": ("history",),
                  "system": ("system", "system_prompt"), "tools": ("tools",)}
LIKELY_TAGS = {"role_tag": ("role", "from"), "content_tag": ("content", "value"), "user_tag": ("user", "human"),
               "assistant_tag": ("assistant", "gpt", "model", "bot"), "observation_tag": ("tool", "observation"),
               "function_tag": ("function_call", "function"), "system_tag": ("system",)}

SPLIT_WORDS = {"train": {"train", "training"}, "validation": {"validation", "valid", "dev", "val"},
               "test": {"test", "testing", "eval", "evaluation"}}
TO_JSONL = {".parquet": "python -c \"import pandas; pandas.read_parquet('{0}').to_json('{1}.jsonl', orient='records', "
                        "lines=True, force_ascii=False)\"",
            ".arrow": "python -c \"import datasets; datasets.Dataset.from_file('{0}').to_json('{1}.jsonl', "
                      "force_ascii=False)\""}
OPENING, COMMA, CLOSING, NOTHING = (re.compile(f"[ \\t\\n\\r]*{sign}[ \\t\\n\\r]*{end}")     # of a list in JSON
                                    for sign, end in ((r"\[", ""), (",", ""), (r"\]", r"\Z"), (r"\[[ \t\n\r]*\]", r"\Z")))
BLOCK = 2**20                   # bytes read at once


# ---- read: files -> rows ----------------------------------------------------------------------------------------


class DataFile:
    """One data file. A row is parsed when it is asked for; what stays in memory is where each row lies.

    keys: the names of all columns, in the order in which they first appear. Raises ValueError for a file that cannot be
    read; a single row that cannot is a row all the same: convert says what is wrong with it.
    """

    def __init__(self, path: Path):
        suffix = path.suffix.lower()
        if suffix not in READERS:
            hint = TO_JSONL.get(suffix, "").format(path, path.with_suffix(""))
            raise ValueError(f"{path}: type '{path.suffix}' cannot be read, only {', '.join(READERS)}"
                             + (f". Convert it: {hint}" if hint else ""))
        scan, self.parse = READERS[suffix]
        self.path, self.file, self.header = path, open(path, "rb"), None
        head = self.file.read(3)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path} is UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8 {path} > NEW_FILE")
        keys, places = {}, array("q")
        for number, data, start, end in scan(self, 3 * (head == b"\xef\xbb\xbf")):
            places.extend((number, start, end))
            if isinstance(data, dict):
                keys.update(dict.fromkeys(map(str, data)))
        self.keys, self.places = list(keys), np.frombuffer(places, np.int64).reshape(-1, 3)

    def __len__(self):
        return len(self.places)

    def row(self, place: int, source: "Source") -> "RawRow":
        """The row at a place, counted from 0."""
        number, start, end = self.places[place].tolist()
        return RawRow(self.path, number, self.parse(self, decode(read_at(self.file, start, end - start))), source)

    def lines(self, start: int, newline: str):
        """(text, start, end) of every line, cut where `newline` says (as in open); start and end count bytes."""
        self.file.seek(start)
        text = io.TextIOWrapper(self.file, encoding="utf-8", errors="surrogateescape", newline=newline)
        try:
            for line in text:
                end = start + size_of(line)
                yield line, start, end
                start = end
        finally:
            text.detach()                           # else the file is closed with it


class Rows(Sequence):
    """Raw rows by number. files: [(DataFile, Source), …]; of[i], at[i]: in which file row i is, and at which place."""

    def __init__(self, files: list, of: np.ndarray, at: np.ndarray):
        self.files, self.of, self.at = files, of, at

    def __len__(self):
        return len(self.of)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        file, source = self.files[self.of[number]]
        return file.row(self.at[number], source)

    def take(self, numbers) -> "Rows":
        """These rows, in this order."""
        return Rows(self.files, self.of[numbers], self.at[numbers])


def decode(raw: bytes) -> str:
    """Bytes that are not UTF-8 survive as lone surrogates: convert names the row they are in."""
    return raw.decode("utf-8", errors="surrogateescape")


def read_at(file, start: int, size: int) -> bytes:
    """Bytes from anywhere in a file. Processes that share an open file do not disturb each other, except on Windows."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, start)
    file.seek(start)
    return file.read(size)


def load_rows(names: list[str], config, sampler: np.random.RandomState, notes: list) -> Rows:
    """The raw rows of the datasets named, one dataset after the other.

    sampler draws for num_samples; notes receives what the user should know. Raises ValueError or FileNotFoundError.
    """
    return rows_of(find_sources(names, config, notes), config, sampler, notes)


def find_sources(names: list[str], config, notes: list) -> list[Source]:
    """Where the rows of the datasets named lie; nothing is read but dataset_info.json."""
    once = list(dict.fromkeys(names))
    if len(once) < len(names):
        notes.append("a dataset that is named twice is read once, as in LLaMA-Factory")
    return [find_source(name, config, notes) for name in once]


def rows_of(sources: list[Source], config, sampler: np.random.RandomState, notes: list) -> Rows:
    """The rows of these datasets: sampled where num_samples says so, at most max_samples of each."""
    files, of, at = [], [], []
    for source in sources:
        rows = all_rows([DataFile(path) for path in source.files], source)
        if not rows:
            raise ValueError(f"dataset '{source.name}' is empty: no rows in {', '.join(map(str, source.files))}")
        source = check_columns(source, rows, config.stage, notes)
        picked = np.arange(len(rows))
        if source.num_samples is not None:
            picked = sampler.permutation(len(rows))[:source.num_samples]
            if source.num_samples > len(rows):
                picked = np.append(picked, sampler.choice(len(rows), source.num_samples - len(rows)))
        picked = picked[:config.max_samples]
        of.append(rows.of[picked] + len(files))
        at.append(rows.at[picked])
        files += [(file, source) for file, _ in rows.files]
    return Rows(files, np.concatenate(of), np.concatenate(at))


def all_rows(files: list[DataFile], source: Source) -> Rows:
    """The rows of these files, one file after the other."""
    counts = [len(file) for file in files]
    return Rows([(file, source) for file in files], np.repeat(np.arange(len(files)), counts),
                np.concatenate([np.arange(count) for count in counts]))


def find_source(name: str, config, notes: list) -> Source:
    """The entry of dataset_info.json called `name`, or else the data file (or folder of files) at that path."""
    info_path, info = Path(config.dataset_dir) / "dataset_info.json", {}
    if info_path.is_file():
        try:
            info = json.loads(info_path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{info_path}: not valid JSON ({error})") from None
        if not isinstance(info, dict) or not isinstance(info.get(name, {}), dict):
            raise ValueError(f"{info_path} must be an object, dataset name -> entry, and every entry an object")
    if name in info:
        entry = {key: value for key, value in info[name].items() if value is not None}
        return source_of_entry(name, entry, info_path, config, notes)
    for path in (Path(name), Path(config.dataset_dir) / name):
        if path.exists():
            return Source(name, files_at(path))
    if not info_path.is_file():
        raise FileNotFoundError(f"dataset '{name}': neither {info_path} nor a file of that name exists (dataset_dir is "
                                "the folder of dataset_info.json)")
    more = f" and {len(info) - 12} more" if len(info) > 12 else ""
    raise ValueError(f"{info_path}: no dataset '{name}'{did_you_mean(name, info)}; a data file can also be given by its "
                     f"path. It names {', '.join(list(info)[:12])}{more}")


def source_of_entry(name: str, entry: dict, info_path: Path, config, notes: list) -> Source:
    """One entry of dataset_info.json, checked, its files found. What cannot be honoured is an error or a note."""
    where = f"{info_path}, dataset '{name}'"
    check_entry(entry, where)
    notes += [f"{where}: key '{key}' is not used{did_you_mean(key, ENTRY_KEYS)}" for key in entry if key not in ENTRY_KEYS]
    formatting = entry.get("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise ValueError(f"{where}: formatting '{formatting}' is none of {', '.join(COLUMNS)}")
    columns = entry.get("columns", COLUMNS[formatting])
    tags = entry.get("tags", OPENAI_TAGS if formatting == "messages" else TAGS)
    if foreign := [FOREIGN[role] for role in columns if role in FOREIGN]:
        raise ValueError(f"{where} holds {foreign[0]}, which this release cannot read")
    check_stage(bool(entry.get("ranking")), "kto_tag" in columns, where, config.stage)
    for table, words, known in (("columns", columns, ROLES), ("tags", tags, TAGS)):
        for word in words:
            if word not in known:
                raise ValueError(f"{where}: {table}: '{word}' is unknown{did_you_mean(word, known)}. On the left stands one "
                                 f"of {', '.join(known)}, on the right a name of your data")
    missing = [tag for tag in REQUIRED_TAGS if not tags.get(tag)]
    if missing and formatting != "alpaca":
        raise ValueError(f"{where}: tags: '{missing[0]}' is not named; once tags are given, the defaults are off")
    if formatting == "openai":
        notes.append(f"{where}: formatting openai adds 'detailed thinking off' to the system text, as LLaMA-Factory "
                     "does; formatting: messages reads the same rows without it")
    if entry.get("hf_hub_url"):
        files = hub_files(entry, where, config)
    elif not entry.get("file_name"):
        given = [key for key in ELSEWHERE if key in entry]
        raise ValueError(f"{where}: {given[0]} is given, but only file_name and hf_hub_url can be read: download the data "
                         "and give its file_name" if given else f"{where}: neither file_name nor hf_hub_url is given")
    elif entry.get("split", "train") != "train":
        raise ValueError(f"{where}: split '{entry['split']}', but a local file has no splits; max_samples takes the "
                         "first rows")
    else:
        files = files_at(info_path.parent / entry["file_name"])
    return Source(name, files, formatting, columns, tags, entry.get("num_samples"), bool(entry.get("ranking")))


def check_entry(entry: dict, where: str):
    """Raises ValueError for a value of another type than ENTRY_KEYS says, or a number of samples that is none."""
    words = {str: "a text", bool: "true or false", int: "a whole number above 0", dict: "an object of texts"}
    for key in ENTRY_KEYS.keys() & entry.keys():
        value, kind = entry[key], ENTRY_KEYS[key]
        texts = all(isinstance(text, str) for text in value.values()) if type(value) is dict else True
        if type(value) is not kind or not texts or kind is int and value < 1:
            raise ValueError(f"{where}: {key}: {excerpt(json.dumps(value, ensure_ascii=False))} is not {words[kind]}")


def files_at(path: Path) -> tuple:
    """The data files at a path: the file itself, or all files of a folder by name; these must be of one type."""
    if not path.exists():
        around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"data file {path} does not exist{did_you_mean(path.name, around)}")
    inside = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != ".") if path.is_dir() else []
    files = tuple(inside) if path.is_dir() else (path,)
    types = sorted({p.suffix for p in files})
    if len(types) != 1:
        raise ValueError(f"folder {path} must hold data files of one type; it has {', '.join(types) or 'no files'}")
    return files


def hub_files(entry: dict, where: str, config) -> tuple:
    """The files of a dataset on the hub: fetched (or found in the cache), then picked by folder, subset and split."""
    from huggingface_hub import snapshot_download
    repo, split, inside = entry["hf_hub_url"], entry.get("split", "train"), entry.get("folder", "")
    patterns = [f"{inside}/*{suffix}" if inside else f"*{suffix}" for suffix in READERS]
    try:
        root = Path(snapshot_download(repo, repo_type="dataset", cache_dir=config.cache_dir, allow_patterns=patterns))
    except (OSError, ValueError) as error:      # what the hub raises, offline or gated or misspelt, is one of the two
        why = excerpt(str(error).strip().split("\n")[0])
        raise ValueError(f"{where}: '{repo}' could not be fetched ({why}). Is the name right, is there a network? "
                         "A gated dataset needs `hf auth login`") from None

    def belongs(name):
        named = [s for s, words in SPLIT_WORDS.items() if words & set(re.split("[^a-z]+", name.lower()))]
        of_split = split in named or split == "train" and not named if split in SPLIT_WORDS else split in name
        return of_split and (entry.get("subset") or "") in name and not name.startswith("dataset_info")

    files = [path for path in sorted((root / inside).rglob("*")) if path.suffix in READERS]
    files = tuple(path for path in files if belongs(str(path.relative_to(root))))
    types = sorted({path.suffix for path in files})
    if len(types) != 1:
        found = f"files of types {', '.join(types)}" if types else f"no {', '.join(READERS)} file"
        raise ValueError(f"{where}: '{repo}' has {found} for split '{split}'. Download it and give its file_name; "
                         f"parquet can be converted: {TO_JSONL['.parquet'].format('FILE', 'FILE')}")
    return files


# ---- one kind of file each: a scan that finds the rows, (number, data, start, end in bytes), and what parses one


def scan_json(file: DataFile, start: int):
    """A list of objects, or one object a line, whatever the file is called."""
    first = next((line for line, _, _ in file.lines(start, "\n") if line.strip()), "")
    if first.lstrip()[:1] == "[":
        yield from scan_list(file, start)
        return
    if first.lstrip()[:1] == "{" and parse_json(file, first) == first:      # an object that goes on in the next lines?
        try:
            json.loads(decode(file.path.read_bytes()).lstrip("\ufeff"))
        except ValueError:
            pass
        else:
            raise ValueError(f"{file.path} holds one object; make it a list of rows, [{{…}}, {{…}}], or one row a line")
    for number, (line, start, end) in enumerate(file.lines(start, "\n"), 1):    # only there: U+2028 may be inside a text
        if line.strip():
            yield number, parse_json(file, line.removesuffix("\n")), start, end - line.endswith("\n")


def scan_list(file: DataFile, start: int):
    """The elements of a JSON list, a block of the file in memory at a time."""
    decoder, feed = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")("surrogateescape")
    before, number, text, size = OPENING, 0, "", BLOCK
    file.file.seek(start)
    while True:
        raw = file.file.read(size)
        text, at, size = text + feed.decode(raw, not raw), 0, 2 * size      # a row larger than a block: twice as much
        while found := before.match(text, at):
            try:
                data, end = decoder.raw_decode(text, found.end())
            except ValueError:
                break
            if end == len(text):                             # a number may go on in the next block
                break
            begin = start + size_of(text[at:found.end()])
            start = begin + size_of(text[found.end():end])
            number += 1
            yield number, data, begin, start
            before, at, size = COMMA, end, BLOCK
        text = text[at:]
        if not raw:
            break
    if not (CLOSING if number else NOTHING).match(text):
        whole = decode(file.path.read_bytes()).removeprefix("\ufeff")
        try:
            json.loads(whole)
        except ValueError as error:
            near = excerpt(whole[max(error.pos - 40, 0):error.pos + 40])
            raise ValueError(f"{file.path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}), "
                             f"near {near}") from None


def size_of(text: str) -> int:
    """In bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def parse_json(file: DataFile, text: str):
    """A line that is not JSON stays a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def scan_csv(file: DataFile, start: int):
    """Comma separated, the first line names the columns; every value is a text, also 3 and None."""
    csv.field_size_limit(2**31 - 1)                          # the default refuses fields over 131,072 characters
    read = [start]                                           # bytes that the reader has taken

    def lines():
        for line, _, read[0] in file.lines(start, ""):
            yield line
    reader, number = csv.reader(lines()), 0
    try:
        file.header = next(reader, [])
        start = read[0]
        for fields in reader:
            if fields:                                       # an empty line is no row
                number += 1
                yield number, named(file.header, fields), start, read[0]
            start = read[0]
    except csv.Error as error:
        raise ValueError(f"{file.path}: not a CSV file ({error})") from None


def parse_csv(file: DataFile, text: str):
    return named(file.header, next(csv.reader(io.StringIO(text, newline=""))))


def named(header: list, fields: list):
    """A row of a CSV file, or its text where it has a field too many or too few."""
    return dict(zip(header, fields)) if len(header) == len(fields) else ",".join(fields)


def scan_text(file: DataFile, start: int):
    """One document a line, in the column `text`; an empty line is an empty document."""
    for number, (line, start, end) in enumerate(file.lines(start, ""), 1):
        yield number, parse_text(file, line), start, end


def parse_text(file: DataFile, text: str):
    return {"text": text.removesuffix("\n").removesuffix("\r")}


READERS = {".json": (scan_json, parse_json), ".jsonl": (scan_json, parse_json), ".csv": (scan_csv, parse_csv),
           ".txt": (scan_text, parse_text)}


def check_columns(source: Source, rows: Rows, stage: str, notes: list) -> Source:
    """Recognises a layout nobody declared, and makes sure that the columns to be read exist at all."""
    keys = list(dict.fromkeys(key for file, _ in rows.files for key in file.keys))
    if not source.formatting:
        source = recognise(source, rows, keys, stage)
        told = ", ".join(f"{role} = {column}" for role, column in source.columns.items())
        notes.append(f"dataset '{source.name}' was recognised as {source.formatting}: {told}")
    needed = ("prompt",) if source.formatting == "alpaca" else ("messages",)
    if source.ranking:
        needed += ("chosen", "rejected")
    elif source.formatting == "alpaca" and stage != "pt":
        needed += ("response",)
    for role in needed:
        if role not in source.columns:
            hint = " (the answer to learn); plain text is for stage: pt" if role == "response" else ""
            raise ValueError(f"dataset '{source.name}': columns in dataset_info.json must name '{role}'{hint}")
    for role, column in source.columns.items():
        optional = role == "query" and source.columns == COLUMNS["alpaca"]     # many files simply have no `input`
        if keys and column not in keys and not optional:
            raise ValueError(f"dataset '{source.name}': no row has the column '{column}' ({role})"
                             f"{did_you_mean(column, keys)}. The rows have {', '.join(keys)}; columns in dataset_info.json "
                             "tells which is which")
    roles = ("prompt", "query", "messages") if stage == "pt" else ROLES
    unread = [key for key in keys if key not in [source.columns.get(role) for role in roles]]
    if unread:
        notes.append(f"dataset '{source.name}': columns not used: {', '.join(unread)}")
    return source


def recognise(source: Source, rows: Rows, keys: list[str], stage: str) -> Source:
    """The layout of a data file given by its path, from the names of its columns and of the roles inside."""
    if not keys:
        raise ValueError(f"{source.files[0]}: no row of it is an object with columns; row {rows[0].number} is "
                         f"{excerpt(rows[0].data)}")
    found = {role: next((name for name in names if name in keys), None) for role, names in LIKELY_COLUMNS.items()}
    extras = {role: found[role] for role in ("system", "tools") if found[role]}
    ranking, where = bool(found["chosen"] and found["rejected"]), str(source.files[0])
    if stage in PAIRS + JUDGED:
        check_stage(ranking, bool(found["kto_tag"]), where, stage)
        source = replace(source, ranking=ranking and stage in PAIRS)
        extras |= {role: found[role] for role in (("chosen", "rejected") if source.ranking else ("kto_tag",))}
    if found["messages"]:
        turns = [turn for row in rows if isinstance(row.data, dict)
                 for turn in [*(row.data.get(found["messages"]) or []), row.data.get(found["chosen"])]
                 if isinstance(turn, dict)]
        role_tag = next((tag for tag in LIKELY_TAGS["role_tag"] if any(tag in turn for turn in turns)), "role")
        words = {key for turn in turns for key in turn} | {str(turn.get(role_tag)) for turn in turns}
        tags = {tag: next((name for name in names if name in words), names[0]) for tag, names in LIKELY_TAGS.items()}
        return replace(source, formatting="messages", columns={"messages": found["messages"], **extras}, tags=tags)
    if stage == "pt" and found["text"]:
        return replace(source, formatting="alpaca", columns={"prompt": found["text"]})
    if stage == "pt" or not found["prompt"] or not (found["response"] or source.ranking):
        hint = " (stage: pt reads one column of text; questions and answers are for stage: sft)" if stage == "pt" else \
            " (plain text is for stage: pt)" if found["text"] else ""
        raise ValueError(f"{source.files[0]}: which columns to read cannot be told from their names, {', '.join(keys)}"
                         f"{hint}. Describe them in dataset_info.json")
    if found["query"] == found["prompt"]:
        found["query"] = None
    roles = {role: found[role] for role in ("prompt", "query", "response", "history")
             if found[role] and not (source.ranking and role == "response")}
    return replace(source, formatting="alpaca", columns={**roles, **extras})
