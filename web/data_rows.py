"""The tokenized rows of a dataset, in a file that the web board reads page by page.

    python -m web.data_rows my.yaml jsonl=rows.jsonl        write the first rows, and print counts

A line is {"parts": [{"loss": bool, "ids": […], "text": "…"}, …], "tokens": n, "trained": n,
"title": "chosen"}; a part is a run of tokens that all have a loss or all have none. A preference
pair is two lines. The first line is a summary: {"rows", "written", "lengths", "cutoff_len"}.

Requires: runtime/preview.py, runtime/show_data.py.
Next: board.py.
"""
from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from errors import run_script
from settings.load_config import load_config

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "data"))   # report errors before torch is imported

MOST_ROWS_WRITTEN = 5000
MOST_LENGTHS = 20_000
LONGEST_SEARCH = 200            # characters


# ---- writing ------------------------------------------------------------------------------------


def main(argv: list[str]):
    """Write the rows of a config into its `jsonl` file."""
    from runtime.preview import training_rows
    from runtime.show_data import print_counts

    config = load_config(argv, "data")
    tokenizer, text, examples, report = training_rows(config, keep_unlearnable=True)
    print(f"template: {text.template.name} ({text.origin})")
    print_counts(report)
    shown = range(min(len(examples), MOST_ROWS_WRITTEN))
    measured = range(min(len(examples), MOST_LENGTHS))
    head = {"rows": len(examples), "cutoff_len": config.cutoff_len, "written": len(shown),
            "lengths": [sum(map(int, examples[i].lengths)) for i in measured]}
    with open(config.jsonl, "w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for i in shown:
            for title, sequence in sequences_of(examples[i], config.stage):
                file.write(json.dumps({"row": i + 1, "title": title,
                                       **loss_parts(sequence, tokenizer)}) + "\n")


def sequences_of(example, stage: str) -> list[tuple]:
    """[(title, sequence), …] of an example; a preference pair has two."""
    from settings.config import SAMPLED
    from text.conversations import JUDGED, PAIRS

    if stage in PAIRS:
        return [("chosen", example.sequence(0)), ("rejected", example.sequence(1))]
    if stage in JUDGED:
        return [("good" if example.desired else "bad", example.sequence(0))]
    if stage in SAMPLED:
        return [("prompt", example.sequence(0))]
    return [("", example)]


def loss_parts(sequence, tokenizer) -> dict:
    """Ids and text of a sequence, in parts with and without loss."""
    from data import IGNORE

    pairs = list(zip(sequence.input_ids.tolist(), sequence.labels.tolist()))
    parts = []
    for has_loss, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        ids = [token for token, _ in group]
        parts.append({"loss": has_loss, "ids": ids, "text": tokenizer.decode(ids)})
    trained = sum(len(part["ids"]) for part in parts if part["loss"])
    return {"parts": parts, "tokens": len(pairs), "trained": trained}


# ---- reading ------------------------------------------------------------------------------------


def read_page(path: Path, start: int = 0, count: int = 20, find: str = "") -> dict:
    """{"head": the summary, "rows": one page, "matches": number of rows that contain `find`}.

    head is None if the file is missing or incomplete.
    """
    find = find[:LONGEST_SEARCH].lower()
    rows = []
    matches = 0
    try:
        with open(path, encoding="utf-8") as file:
            head = json.loads(file.readline())
            for line in file:
                if not line.endswith("\n"):
                    break
                row = json.loads(line)
                if find and find not in "".join(part["text"] for part in row["parts"]).lower():
                    continue
                if start <= matches < start + count:
                    rows.append(row)
                matches += 1
    except (OSError, ValueError):
        return {"head": None, "rows": [], "matches": 0}
    return {"head": head, "rows": rows, "matches": matches}


if __name__ == "__main__":
    run_script(main)
