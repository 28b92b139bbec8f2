"""Datasets written by a test, and the rows and examples read back.

Requires: text/data_files.py, text/conversations.py.
"""
import functools
import json
from types import SimpleNamespace

import numpy as np

from settings.load_config import load_config
from tests.common import GOLDEN, read_jsonl
from text import conversations
from text.chat_formats import TEMPLATES
from text.data_files import find_sources, open_rows
from text.fit_tokenizer import fit_tokenizer
from text.tokenizer import load_tokenizer

ALPACA = {"instruction": "ask", "input": "", "output": "answer"}
CASE_KEYS = ("case", "stage", "template", "tokenizer", "tokenizer_backend", "predict", "settings",
             "dataset_info")      # a recorded line's case: lines that agree in them belong together


# ---- raw rows ----


def load_rows(folder, names="d", notes=None, seed=42, stage="sft", max_samples=None,
              mix_strategy="concat", interleave_probs=None):
    """The raw rows of datasets in `folder`; notes: a list that what the user
    should know goes to."""
    sampler = np.random.RandomState(seed)
    notes = [] if notes is None else notes
    config = SimpleNamespace(dataset_dir=str(folder), stage=stage, max_samples=max_samples,
                             cache_dir=None, mix_strategy=mix_strategy, seed=seed,
                             interleave_probs=interleave_probs)
    return open_rows(find_sources(names.split(","), config, notes), config, sampler, notes)


def write_info(folder, **entries):
    """dataset_info.json with these entries."""
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")


def convert_row(folder, row, entry=None, stage="sft"):
    """The conversation of a single row under an entry of dataset_info.json."""
    (folder / "d.json").write_text(json.dumps([row]), encoding="utf-8")
    write_info(folder, d={"file_name": "d.json", **(entry or {})})
    return conversations.convert(load_rows(folder, stage=stage)[0], stage)


def roles_and_texts(conversation):
    """[(role, content), …] of a conversation."""
    return [(message["role"], message["content"]) for message in conversation.messages]


# ---- examples ----


def ask(question, answer):
    """A row of a question and its answer."""
    return {"instruction": question, "input": "", "output": answer}


def make_config(folder, settings=(), **more):
    """A Config for the dataset `rows` in `folder`, read from a file as a user's yaml is."""
    given = {"dataset": "rows", "dataset_dir": str(folder), "model_name_or_path": "unread",
             **dict(settings), **more}
    path = folder / "config.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    return load_config([str(path)], "data")


def write_dataset(folder, rows, entry):
    """A data file of the kind that the entry names, and dataset_info.json beside it."""
    name = entry.get("file_name", "rows.json")
    text = "".join(row["text"] + "\n" for row in rows) if name.endswith(".txt") else json.dumps(
        rows
    )
    (folder / name).write_text(text, encoding="utf-8")
    info = {"rows": {"file_name": name, **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def ids_and_labels(examples):
    """[(input_ids, labels), …] of examples."""
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in examples]


# ---- recorded rows ----


@functools.cache
def tokenizer_for(template, folder):
    """The tokenizer in `folder` with the special tokens of this template."""
    tokenizer = load_tokenizer(folder)
    fit_tokenizer(template, tokenizer)
    return tokenizer


def cases_of(file):
    """The recorded lines of a golden file by case: [(first line, raw rows, lines), …]."""
    groups = {}
    for line in read_jsonl(GOLDEN / "data" / f"{file}.jsonl"):
        groups.setdefault(json.dumps([line.get(key) for key in CASE_KEYS]), []).append(line)
    return [(lines[0], lines[0].get("rows") or [line["row"] for line in lines], lines)
            for lines in groups.values()]


def known(line):
    """Whether this release has the line's template, and reads the tokenizer
    as it was read there."""
    return line["template"] in TEMPLATES and line.get("tokenizer_backend", "file") == "file"
