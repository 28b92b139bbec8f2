"""Rows of plain text for the calibration of a quantized model, as LLaMA-Factory draws them.

    rows = calibration_rows(config, tokenizer)      # (export_quantization_nsamples, maxlen) int64

A row of export_quantization_dataset is drawn, again if it has no more than maxlen tokens, and of
its tokens a window of maxlen. Rows may be drawn several times. The seed decides, so that a second
export writes the same bytes.

Requires: text/data_files.py, text/tokenizer.py.
Next: exporting/gptq_export.py.
"""
import random
from dataclasses import replace
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from text.conversations import Source
from text.data_files import READERS, Rows, all_rows, files_at, files_on_hub, open_files
from text.json_text import why_not_row
from text.packed_files import unpacked_suffix
from text.plain_text import check_utf8, excerpt
from text.tokenizer import Tokenizer

TRIES = 100             # rows drawn for a sample, each too short, before this is an error
KEY = "export_quantization_dataset"


def calibration_rows(config, tokenizer: Tokenizer) -> torch.Tensor:
    """Token ids, (samples, maxlen) int64, with the tokens that the tokenizer adds to a text.

    Raises ValueError for rows without `text`, or too short ones.
    """
    rows = text_rows(config)
    draw = random.Random(config.seed)
    length = config.export_quantization_maxlen
    encoded = {}                                # row number -> ids
    samples = []
    for _ in range(config.export_quantization_nsamples):
        for _ in range(TRIES):
            number = draw.randrange(len(rows))
            if number not in encoded:
                encoded[number] = tokenizer.core.encode(text_of(rows, number)).ids
            ids = encoded[number]
            if len(ids) > length:
                break
        else:
            longest = max(map(len, encoded.values()))
            raise ValueError(
                f"{KEY}: {config.export_quantization_dataset} has too few rows of more than "
                f"export_quantization_maxlen: {length} tokens ({TRIES} drawn rows were shorter; "
                f"the longest seen has {longest}). Set export_quantization_maxlen below that, or "
                "name a file with longer texts")
        start = draw.randrange(len(ids) - length)
        samples.append(ids[start:start + length])
    return torch.tensor(samples)


def text_rows(config) -> Rows:
    """The rows of a file, of a folder of files, or of a repository on the hub."""
    name = config.export_quantization_dataset
    path = Path(name)
    needed = None
    if path.exists() or unpacked_suffix(path) in READERS:
        files = files_at(path)
    else:
        needed = TRIES * config.export_quantization_nsamples
        notes = []
        files = files_on_hub({"hf_hub_url": name}, "hf_hub_url", KEY,
                             replace(config, max_samples=needed), notes)
        for note in notes:
            print(f"note      {note}")
    source = Source(name, files)
    rows = all_rows(open_files(source, needed), source)
    if not rows:
        raise ValueError(f"{KEY}: {name} has no rows")
    return rows


def text_of(rows: Rows, number: int) -> str:
    """The text of a row. Raises ValueError for a row without."""
    row = rows[number]
    text = row.data.get("text") if isinstance(row.data, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{KEY}: {row.where}: no text under `text`; {found_in(row.data)}. "
                         "Calibration reads plain text, one object with `text` a row")
    check_utf8(text, f"{KEY}: {row.where}", from_bytes=not row.is_utf8)
    return text


def found_in(data) -> str:
    """What a row without a text holds, for the message."""
    if isinstance(data, str):
        return f"it is {why_not_row(data)}: {excerpt(data)}"
    if not isinstance(data, dict):
        return f"it is no object but {excerpt(data)}"
    if "text" in data:
        return f"`text` is {excerpt(data['text'])}"
    return f"its keys are {', '.join(map(str, data))}"
