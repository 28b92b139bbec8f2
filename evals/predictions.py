"""Answers to held-out prompts, each written when it is complete, so a killed run can continue.

The prompts are the rows of the dataset, cut to cutoff_len as in training. Each finished answer is
one line of generated_predictions.NAME.partial; a run with the same key reads them instead of
generating.

Requires: generate.py, fast/batch_decode.py.
Next: evals/bleu_rouge.py.

Rows, names and files are those of LLaMA-Factory's do_predict.
"""
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import EncodedRows, settings_of, truncated_lengths
from fast.batch_decode import answer_all, answer_each, one_at_a_time
from fast.decode import pick_step
from generate import Sampling
from settings.config import Config
from templates import encode_prompt
from text.data_files import find_sources, open_rows
from text.token_cache import conversation_of, refuse, split_rows

Prompt = tuple[list[int], list[int]]        # ids of the prompt, ids of the expected answer


@dataclass
class Side:
    """One of the compared models and its results."""
    name: str
    base: Path
    adapters: list[Path]
    reference: tuple | None = None      # preference stages: (base, adapters); None: adapters off
    results: dict = field(default_factory=dict)             # {eval_… or predict_…: value}
    losses: list[float] = field(default_factory=list)       # of each example, per token; or nan
    answers: list[list[int]] = field(default_factory=list)  # ids of each row
    scores: list[dict] = field(default_factory=list)        # of each row, {name: 0 … 100}


# ---- prompts ----------------------------------------------------------------------------------


def read_prompt_rows(config: Config):
    """The rows to answer: those held out for evaluation, not encoded."""
    sampler = np.random.RandomState(config.seed)
    sources = find_sources(config.eval_dataset or config.dataset, config, [])
    rows = open_rows(sources, config, sampler, [])
    if config.val_size and not config.eval_dataset:
        return split_rows(rows, config.val_size, config.seed)[1]
    return rows


def prompts_of(rows, config: Config, tokenizer, template) -> list[Prompt]:
    """Ids of prompt and expected answer of each row, together at most cutoff_len as in training."""
    part = EncodedRows()
    prompts = []
    for row in rows:
        conversation = conversation_of(row, config, part)
        if conversation is None or conversation.desired is False:   # skip answers judged bad
            continue
        try:
            prompt, answer = encode_prompt(template, tokenizer, *conversation[:3],
                                           settings=settings_of(config))
        except ValueError as error:                     # an unreadable tool call or description
            part.reject(row, error)
            continue
        if template.efficient_eos:
            answer = answer + [tokenizer.eos_id]
        keep_prompt, keep_answer = truncated_lengths(len(prompt), len(answer), config.cutoff_len)
        prompts.append((prompt[:keep_prompt], answer[:keep_answer]))
    if part.bad and not config.skip_bad_rows:
        refuse(part.bad)
    return prompts


# ---- answers ----------------------------------------------------------------------------------


def predict(path: Path, config: Config, model, prompts: list[Prompt], stop_ids: set[int],
            sampling: Sampling, key: dict, generate_rows: Callable | None = None
            ) -> tuple[list[list[int]], float]:
    """Generate the answers: (ids of all answers, seconds spent, earlier runs included).

    path: of the file of finished answers; those of a killed run with the same key are kept. Of
    several processes (RANK, WORLD_SIZE) each answers its share of the rows into a file of its own,
    and gets the answers of all. generate_rows: instead of generate_answers.
    """
    rank, world = process_share()
    answers, seconds_before = read_progress(rank_path(path, rank), key)
    for other in path.parent.glob(f"{path.name}*"):     # of an earlier run, maybe of more processes
        answers = finished_in(other, key) | answers
    if answers:
        print(f"  {len(answers):,} of {len(prompts):,} answers are kept from an earlier run; "
              "continuing")
    waiting = [(number, ids) for number, (ids, _) in enumerate(prompts)
               if number not in answers and number % world == rank]

    start_time = time.monotonic()
    new_answers = (generate_rows or generate_answers)(config, model, waiting, stop_ids, sampling)
    made = 0
    bar = tqdm(total=len(waiting), desc="answers", unit="row",
               disable=bool(config.disable_tqdm) or None)
    with open(rank_path(path, rank), "a", encoding="utf-8") as file, bar:
        for number, tokens in new_answers:
            answers[number] = tokens
            made += len(tokens)
            spent = time.monotonic() - start_time
            line = {"row": number, "tokens": tokens, "seconds": seconds_before + spent}
            file.write(json.dumps(line) + "\n")
            file.flush()
            bar.set_postfix_str(f"{made / spent:,.0f} tokens/s", refresh=False)
            bar.update()
    spent = time.monotonic() - start_time
    if waiting:
        print(f"  {made:,} tokens in {spent:.1f} s: {made / spent:,.0f} tokens/s")
    wait_for_others(path, key, answers, len(prompts))
    return [answers[number] for number in range(len(prompts))], max(seconds_before + spent, 1e-9)


def process_share() -> tuple[int, int]:
    """(number of this process, number of processes) that answer rows together."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rank_path(path: Path, rank: int) -> Path:
    """The file of finished answers of one process."""
    return path.with_name(f"{path.name}.{rank}") if rank else path


def wait_for_others(path: Path, key: dict, answers: dict[int, list[int]], count: int):
    """Add the answers of the other processes as they appear, until all `count` are there.

    If one of them dies, torchrun ends the others.
    """
    while len(answers) < count:
        time.sleep(0.2)
        for other in path.parent.glob(f"{path.name}*"):
            answers |= finished_in(other, key)


def finished_in(path: Path, key: dict) -> dict[int, list[int]]:
    """{row: ids} of a file of finished answers; {} if it has another key."""
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]
    if not lines or json.loads(lines[0]) != {"key": key}:
        return {}
    found = map(json.loads, lines[1:])
    return {line["row"]: line["tokens"] for line in found}


def remove_progress(path: Path):
    """Remove the files of finished answers of all processes."""
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink(missing_ok=True)


def generate_answers(config: Config, model, waiting: list[tuple[int, list[int]]],
                     stop_ids: set[int], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
    """(row number, ids of the answer), in batches if the model allows it."""
    options = {
        "stop_ids": stop_ids,
        "sampling": sampling,
        "seed": config.seed,
        "limit": lambda length: config.max_new_tokens or max(0, config.max_length - length),
    }
    size = config.per_device_eval_batch_size
    reason = one_at_a_time(model)
    if not reason and size > 1:
        print(f"  answers   {size} at a time (per_device_eval_batch_size)")
        return answer_all(model, waiting, size, **options)

    line = ""
    if config.fast_chat:
        cache, step, line = pick_step(model, compiled=config.torch_compile)
        options |= {"cache": cache, "step": step}
    because = f" ({reason})" if reason else ""
    print(f"  answers   one at a time{because}; {line}")
    return answer_each(model, waiting, **options)


# ---- progress ---------------------------------------------------------------------------------


def progress_name(side: str) -> str:
    """File name of the answers made so far."""
    return f"generated_predictions.{side}.partial"


def run_key(side: Side, config: Config, prompts: list[Prompt], stop_ids: set[int],
            sampling: Sampling, dtype) -> dict:
    """Everything the answers depend on; answers with another key are not reused."""
    files = []
    for folder in (side.base, *side.adapters):
        for path in sorted(Path(folder).iterdir()):
            if path.suffix in (".safetensors", ".bin"):
                files.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
    ids = []
    for prompt, answer in prompts:
        ids += [*prompt, -1, *answer, -2]
    checksum = zlib.crc32(np.array(ids, np.int64).tobytes())
    return {
        "weights": files,
        "prompts": f"{len(prompts)} rows, {checksum:08x}",
        "stop_ids": sorted(stop_ids),
        "sampling": asdict(sampling),
        "max_new_tokens": config.max_new_tokens,
        "max_length": config.max_length,
        "seed": config.seed,
        "dtype": str(dtype),
        "fast_chat": config.fast_chat,
    }


def read_progress(path: Path, key: dict) -> tuple[dict[int, list[int]], float]:
    """({row: ids}, seconds spent) of an earlier run with the same key, which is continued.

    The file is rewritten without an incomplete last line; with another key it starts empty.
    """
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("}\n"):
                lines.append(json.loads(line))
    if lines and lines[0] != {"key": key}:
        old_key = lines[0].get("key", {})
        changed = [name for name in key if old_key.get(name) != key[name]]
        print(f"  answers of an earlier run are not used: {', '.join(changed)} changed")
        lines = []
    lines = lines or [{"key": key}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    answers = {line["row"]: line["tokens"] for line in lines[1:]}
    seconds = max([line["seconds"] for line in lines[1:]], default=0.0)
    return answers, seconds


def write_predictions(path: Path, side: Side, prompts: list[Prompt], tokenizer,
                      skip_special_tokens: bool):
    """Write JSON lines {"prompt", "predict", "label"}."""
    with open(path, "w", encoding="utf-8") as file:
        for answer, (prompt, label) in zip(side.answers, prompts):
            row = {
                "prompt": tokenizer.decode(prompt),
                "predict": tokenizer.decode(answer, skip_special_tokens),
                "label": tokenizer.decode(label, skip_special_tokens),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
