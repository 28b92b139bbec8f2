"""chat.py --input prompts.jsonl --output answers.jsonl: answer every row of a file.

A row is {"prompt": text} or {"messages": [...]} in OpenAI's shape, maybe with "system" (beside a
prompt), "tools" and "label". The output has the lines of generated_predictions.jsonl, in the order
of the rows. Finished answers are kept in OUTPUT.partial: a run that was killed continues, and
`torchrun --nproc-per-node 4 chat.py …` shares the rows.

Requires: text/openai_messages.py, evals/predictions.py.
Next: chat.py.
"""
from pathlib import Path

from data import settings_of
from evals.predictions import (Prompt, Side, predict, process_share, remove_progress, run_key,
                               write_predictions)
from generate import Sampling, check_prompt
from settings.config import Config
from text.json_text import parse
from text.load_text import Text
from text.openai_messages import prompt_of_messages

FIELDS = ("prompt", "messages", "system", "tools", "label")


def answer_file(config: Config, side: Side, model, text: Text, stop_ids: set[int],
                sampling: Sampling):
    """Answer config.input into config.output. side: the model's name and folders, for the key.

    Raises ValueError that names the line of a row that cannot be answered, before any is.
    """
    output = Path(config.output)
    if output.resolve() == Path(config.input).resolve():
        raise ValueError(f"output: {output} is the input; name another file")
    prompts = read_prompts(config, text)
    for number, (ids, _) in enumerate(prompts, 1):
        try:
            check_prompt(model, ids, None)
        except ValueError as error:
            raise ValueError(f"{config.input} row {number}: {error}") from None
    progress = output.with_name(f"{output.name}.partial")
    key = run_key(side, config, prompts, stop_ids, sampling, model.lm_head.weight.dtype)
    side.answers, _ = predict(progress, config, model, prompts, stop_ids, sampling, key)
    if process_share()[0]:
        return
    finished = output.with_name(f"{output.name}.new")
    write_predictions(finished, side, prompts, text.tokenizer, config.skip_special_tokens)
    finished.replace(output)
    remove_progress(progress)
    print(f"  written to {output}: {len(prompts):,} rows")


def read_prompts(config: Config, text: Text) -> list[Prompt]:
    """(ids of the prompt, ids of the label) of each row of config.input."""
    prompts = []
    with open(config.input, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                prompts.append(prompt_of_row(parse(line), config, text))
            except ValueError as error:
                raise ValueError(f"{config.input} line {number}: {error}") from None
    if not prompts:
        raise ValueError(f"{config.input} has no rows")
    return prompts


def prompt_of_row(row, config: Config, text: Text) -> Prompt:
    """One row. Raises ValueError for what is none."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError('a row is {"prompt": text} or {"messages": [{"role": "user", …}]}')
    if unknown := [name for name in row if name not in FIELDS]:
        raise ValueError(f"the field {unknown[0]!r} is not read; a row has {', '.join(FIELDS)}")
    messages = row.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": row["prompt"]}]
        if row.get("system"):
            messages = [{"role": "system", "content": row["system"]}, *messages]
    elif "system" in row or not isinstance(messages, list) or not messages:
        raise ValueError("messages is a list that is not empty; its first may be the system's")
    ids = prompt_of_messages(messages, row.get("tools"), text, settings_of(config))
    label = row.get("label") or ""
    if not isinstance(label, str):
        raise ValueError("label is not a text")
    return ids, text.tokenizer.encode(label)
