"""Answers to held-out prompts, written as they come.

Requires: generate.py.
Next: evals/bleu_rouge.py.
"""
import json
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fast.batch_decode import answer_all, answer_each, one_at_a_time
from fast.decode import pick_step


@dataclass
class Side:
    """One of the models that are compared, and what was found of it."""
    name: str
    base: Path
    adapters: list
    reference: tuple | None = None                      # of preference stages: (base, adapters); None: adapters off
    results: dict = field(default_factory=dict)         # under LLaMA-Factory's names: eval_…, predict_…
    losses: list = field(default_factory=list)          # of each example: mean over its tokens, nan where it has none
    answers: list = field(default_factory=list)         # of each row: ids
    scores: list = field(default_factory=list)          # of each row: {name: 0 … 100}


def run_key(side: Side, config, prompts, stop_ids, sampling, dtype) -> dict:
    """All that the answers depend on; answers made under another key are not gone on with."""
    files = [path for folder in (side.base, *side.adapters) for path in sorted(Path(folder).iterdir())
             if path.suffix in (".safetensors", ".bin")]
    ids = np.array([i for pair in prompts for i in (*pair[0], -1, *pair[1], -2)], np.int64)
    return {"weights": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            "prompts": f"{len(prompts)} rows, {zlib.crc32(ids.tobytes()):08x}", "stop_ids": sorted(stop_ids),
            "sampling": asdict(sampling), "max_new_tokens": config.max_new_tokens, "max_length": config.max_length,
            "seed": config.seed, "dtype": str(dtype), "fast_chat": config.fast_chat}


def progress_name(side: str) -> str:
    return f"generated_predictions.{side}.partial"


def predict(side: Side, config, model, prompts, stop_ids, sampling, key) -> tuple[list, float]:
    """(ids of all answers, the seconds they took, earlier runs included); what a killed run has is gone on with."""
    path = Path(config.output_dir) / progress_name(side.name)
    found, spent = read_progress(path, key)
    if found:
        print(f"  {len(found):,} of {len(prompts):,} answers are there from an earlier run; going on")
    waiting = [(number, prompt) for number, (prompt, _) in enumerate(prompts) if number not in found]
    how = {"stop_ids": stop_ids, "sampling": sampling, "seed": config.seed,
           "limit": lambda length: config.max_new_tokens or max(0, config.max_length - length)}
    why, start = one_at_a_time(model), time.time()
    if why or config.per_device_eval_batch_size == 1:
        cache, step, line = pick_step(model) if config.fast_chat else (None, None, "")
        print(f"  answers   one at a time{f' ({why})' * bool(why)}; {line}")
        made = answer_each(model, waiting, cache=cache, **how, **({"step": step} if step else {}))
    else:
        print(f"  answers   {config.per_device_eval_batch_size} at a time (per_device_eval_batch_size)")
        made = answer_all(model, waiting, config.per_device_eval_batch_size, **how)
    bar = tqdm(total=len(prompts), initial=len(found), desc="answers", unit="row",
               disable=bool(config.disable_tqdm) or None)
    with open(path, "a", encoding="utf-8") as file, bar:
        for number, tokens in made:
            found[number], seconds = tokens, spent + time.time() - start
            file.write(json.dumps({"row": number, "tokens": tokens, "seconds": seconds}) + "\n")
            file.flush()
            bar.update()
    return [found[number] for number in range(len(prompts))], max(spent + time.time() - start, 1e-9)


def read_progress(path: Path, key: dict) -> tuple[dict, float]:
    """({row: ids}, seconds spent) of the whole lines that a run with the same key left; else the file begins anew."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("}\n")]        # the last may be half-written
    if whole and whole[0] != {"key": key}:
        changed = [name for name in key if whole[0].get("key", {}).get(name) != key[name]]
        print(f"  answers of an earlier run are not used: {', '.join(changed)} changed")
        whole = []
    whole = whole or [{"key": key}]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole), encoding="utf-8")
    seconds = max([line["seconds"] for line in whole[1:]], default=0.0)
    return {line["row"]: line["tokens"] for line in whole[1:]}, seconds
