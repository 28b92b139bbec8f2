"""Show what the model sees of the data: counts, and examples as ids, text and loss.

Requires: data.py, text/token_cache.py.
Next: runtime/preview.py, train.py.
"""
import json
import os

import numpy as np

from data import IGNORE, DatasetCounts, Example
from errors import printable
from settings.config import COMPARED, SAMPLED
from text.conversations import JUDGED, PAIRS
from text.token_cache import DataReport

# ---- counts -----------------------------------------------------------------------------------


def print_counts(report: DataReport):
    """Print the data part of the start page: a line per dataset, then bad rows and notes."""
    width = max(len(split) + len(dataset) for split, dataset in report.datasets) + 3
    print(f"\n{'data':<{width}}     rows      used        tokens  trained  truncated   length 50%"
          "      95%  longest")
    for (split, dataset), counts in report.datasets.items():
        name = printable(f"{split} {dataset}")
        print(f"  {name:<{width - 2}}{count_columns(counts)}")
        if counts.unlearnable:
            print("    skipped, nothing left to train on within cutoff_len: "
                  f"{counts.unlearnable}, first {printable(counts.first_unlearnable)}")
        if counts.bad:
            print(f"    left out as bad (skip_bad_rows): {counts.bad}")
    if report.dropped_tail:
        print(f"  left out, the last {report.dropped_tail:,} tokens, which fill no block of "
              "cutoff_len")
    examples = [f"{count:,} ({split})" for split, count in report.examples.items() if count]
    print(f"  examples: {', '.join(examples)}")
    for line in report.bad_rows:
        print(f"  left out: {printable(line)}")
    for note in report.notes:
        print(f"  note: {printable(note)}")
    if report.origin:
        print(f"  tokenized rows: {report.origin}")


def count_columns(counts: DatasetCounts) -> str:
    """The columns of one dataset. trained: the share of its tokens that carry loss."""
    tokens = sum(counts.lengths)
    trained = counts.supervised / max(tokens, 1)
    used = len(counts.lengths) - counts.unlearnable
    median, most, longest = np.percentile(counts.lengths or [0], (50, 95, 100)).astype(int)
    return (f"{counts.rows:>9,} {used:>9,} {tokens:>13,} {trained:>8.1%} {counts.truncated:>10,} "
            f"{median:>12,} {most:>8,} {longest:>8,}")


# ---- examples ---------------------------------------------------------------------------------


def print_example(tokenizer, example: Example, stage: str, title: str = "first example"):
    """Print an example as ids, text, and the text that carries loss; of a pair, both answers."""
    if stage in PAIRS:
        print_sequence(tokenizer, example.sequence(0), f"{title}, chosen")
        print_sequence(tokenizer, example.sequence(1), f"{title}, rejected")
    elif stage in JUDGED:
        quality = "good" if example.desired else "bad"
        print_sequence(tokenizer, example.sequence(0), f"{title}, a {quality} answer")
    elif stage in SAMPLED:
        print_sequence(tokenizer, example.sequence(0),
                       title if stage == "distill" else f"{title}, a prompt")
    else:
        print_sequence(tokenizer, example, title)


def print_sequence(tokenizer, example: Example, title: str):
    """Print ids, text, and the text that carries loss."""
    ids = example.input_ids.tolist()
    supervised = [label for label in example.labels.tolist() if label != IGNORE]
    print(f"\n{title}: {len(ids)} tokens, {len(supervised)} carry loss")
    print(f"  ids   {without_middle(str(ids))}")
    print(f"  text  {without_middle(tokenizer.decode(ids))!r}")
    print(f"  loss  {without_middle(tokenizer.decode(supervised))!r}", flush=True)


def without_middle(text: str, limit: int = 1200) -> str:
    """The text, without its middle if it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … {len(text) - limit} more … {text[-half:]}"


def check_rows_file(path: str):
    """Raises ValueError for a file that write_jsonl would overwrite and has not written."""
    if not os.path.exists(path) or os.path.isfile(path) and not os.path.getsize(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            keys = json.loads(file.readline()).keys()
        is_ours = all(key == "kto_tags" or key.endswith(("input_ids", "labels")) for key in keys)
    except (ValueError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"jsonl: {path} exists and holds no rows that --jsonl has written; it is "
                         "left as it is. Name another file")


def write_jsonl(path: str, examples: list[Example], stage: str = "sft", pad_to: int = 0,
                pad_id: int = 0):
    """Write a line {"input_ids": […], "labels": […]} per example.

    Stages with two answers have both, under LLaMA-Factory's names. pad_to: packed rows are padded
    as LLaMA-Factory stores them.
    """
    prefixes = ("",)
    if stage in COMPARED:
        prefixes = ("chosen_", "rejected_") if stage in PAIRS else ("", "kl_")
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            line = {}
            for number, prefix in enumerate(prefixes):
                one_of_two = stage in COMPARED + SAMPLED
                part = example.sequence(number) if one_of_two else example
                missing = max(pad_to - len(part.input_ids), 0)
                line[f"{prefix}input_ids"] = part.input_ids.tolist() + [pad_id] * missing
                line[f"{prefix}labels"] = part.labels.tolist() + [IGNORE] * missing
            if example.desired is not None:
                line["kto_tags"] = example.desired
            file.write(json.dumps(line) + "\n")
