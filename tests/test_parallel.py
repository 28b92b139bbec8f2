"""parallel.py: several ranks equal one process, gradients are summed in one order, and a rank that fails ends them all.

The runs start with torchrun on the CPU (gloo), a process a rank. WORKER is what each of them runs: train.main on several
settings, one after the other, so that torch is imported and the ranks joined only once. Ranks other than 0 are given an
output_dir of their own, which must never come to be.
"""
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

import parallel
import train
from checkpoint import write_tensors
from data import evened, micro_batches
from families import model_config
from model import CausalLM, init_weights
from parallel import Gradients, Ranks
from tests.common import ROOT, read_jsonl

TINY = ROOT / "models/tiny"
WORKER = '''
import functools, json, os, sys, threading, time
sys.path.insert(0, ROOT)

def leave_with_parent(parent):
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(9)

threading.Thread(target=leave_with_parent, args=[os.getppid()], daemon=True).start()
import parallel, train
from config import run
rank, joined, shares, wait = int(os.environ.get("RANK", "0")), [], {}, parallel.Bucket.receive

def start(device, timeout):
    joined.extend([] if joined else [start_ranks(device, timeout)])
    return joined[0]

def receive(bucket):
    wait(bucket)
    for ranks in bucket.flat[-len(bucket.params):].tolist():
        counts[str(int(ranks))] = counts.get(str(int(ranks)), 0) + 1

start_ranks, end_ranks = train.start_ranks, train.end_ranks
train.start_ranks, train.end_ranks, parallel.Bucket.receive = start, lambda: None, receive
PATCH

def main(argv):
    global counts
    for name, bucket_bytes, settings in json.load(open(argv[0])):
        counts = shares[name] = {}
        train.Gradients = functools.partial(parallel.Gradients, bucket_bytes=bucket_bytes)
        train.main([f"{item}-of-rank-{rank}" if rank and item.startswith("output_dir=") else item for item in settings])
        if rank == 0:
            json.dump(shares, open(argv[0] + ".shares", "w"))       # on how many ranks a weight had a gradient, how often
    end_ranks()

run(main)
'''


# ---- starting and ending processes ------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(*launchers):
    """The launchers (argument lists) as processes; none is left at the end, and their ranks follow within a second."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "POCKET_TRACEBACK": "0"}
    found = [subprocess.Popen([sys.executable, *map(str, launcher)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) for launcher in launchers]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def torchrun(world, *rest, port=None):
    return ["-m", "torch.distributed.run", "--nproc-per-node", world, "--master-port", port or free_port(), *rest]


def screen_of(launcher, seconds=90) -> tuple[int, str]:
    """(exit code, all that was printed)."""
    with started(launcher) as (process,):
        text, _ = process.communicate(timeout=seconds)
        return process.returncode, text


def worker(folder, runs, patch="") -> list:
    """The script and its list of runs [(name, bucket bytes, settings), …], as arguments for python or torchrun."""
    number = len(list(folder.glob("worker*.py")))
    script, todo = folder / f"worker{number}.py", folder / f"runs{number}.json"
    script.write_text(WORKER.replace("ROOT", repr(str(ROOT))).replace("PATCH", patch), encoding="utf-8")
    todo.write_text(json.dumps(runs))
    return [script, todo]


# ---- 1, 2, 3, 4 ranks equal one process -------------------------------------------------------------------------

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, vocab_size=1600, max_position_embeddings=512, rms_norm_eps=1e-6, eos_token_id=2, pad_token_id=0)
DENSE = {"model_type": "qwen3", **SMALL, "tie_word_embeddings": True}
MIXTURE = {"model_type": "qwen3_moe", **SMALL, "num_experts": 24, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
           "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.01,
           "tie_word_embeddings": False}
COMMON = ["template=chatml", "stage=sft", "cutoff_len=96", "use_cpu=true", "disable_tqdm=true", "even_batches=false",
          "logging_steps=1", "save_strategy=no", "num_train_epochs=2", "learning_rate=5e-3", "warmup_ratio=0.1",
          "lora_rank=4", "flash_attn=disabled", "lr_scheduler_type=cosine", "disable_gradient_checkpointing=true"]
ONE = 12                # micro-batches of a step, of all ranks together
LARGE = 2**25           # bytes of a bucket that holds all gradients
SHAPES = {1: (4, 3), 2: (2, 3), 3: (2, 2), 4: (1, 3)}       # ranks: rows of a micro-batch, micro-batches; 12 rows a step

CASES = {       # name: (bytes of a bucket, settings; rows=n for n rows a micro-batch)
    "27 rows": (LARGE, ["save_strategy=steps", "save_steps=2"]),
    "packed": (LARGE, ["rows=1", "packing=true", "cutoff_len=128"]),
    "micro-batches without a supervised token": (LARGE, ["rows=1", "stage=pt", "packing=false", "dataset={here}/texts.txt"]),
    "experts that a rank never uses": (6000, ["rows=1", "model_name_or_path={here}/mixture", "cutoff_len=24",
                                              "lora_target=all"]),
    "full fine-tuning in small buckets": (8000, ["rows=2", "finetuning_type=full", "learning_rate=5e-4"]),
    "evaluation": (LARGE, ["rows=1", "eval_dataset={here}/eval.jsonl", "eval_strategy=epoch", "save_strategy=epoch",
                           "per_device_eval_batch_size=3", "load_best_model_at_end=true", "learning_rate=5e-2"]),
    "the last batch left out": (LARGE, ["rows=2", "dataloader_drop_last=true"]),
    "fewer batches than ranks": (1, ["rows=1", "max_samples=3"]),
}
AGAIN = ["num_train_epochs=1", "disable_shuffling=true", "per_device_train_batch_size={}", "dataset={}", "even_batches=true"]


def tiny_model(folder, fields):
    """A random checkpoint with these fields of config.json, and the tokenizer of models/tiny."""
    model = CausalLM(model_config(fields))
    init_weights(model, torch.Generator().manual_seed(0))
    weights = {model.config.stored_name(name): p.data * 4 for name, p in model.named_parameters()}
    folder.mkdir()
    write_tensors(folder, {n: (tuple(w.shape), w.dtype) for n, w in weights.items()}, lambda n: [weights[n]])
    (folder / "config.json").write_text(json.dumps(fields))
    for file in TINY.glob("*token*"):
        shutil.copy(file, folder)


def settings_of(here, world, name):
    """(name, bucket bytes, settings) of a case for so many ranks: the same rows in every step."""
    bucket, own = CASES[name]
    rows = [item.removeprefix("rows=") for item in own if item.startswith("rows=")]
    size, accumulate = (rows[0], ONE // world) if rows else SHAPES[world]
    given = [f"model_name_or_path={here}/dense", f"dataset={here}/rows.jsonl", *COMMON,
             *(item.replace("{here}", str(here)) for item in own if not item.startswith("rows=")),
             f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulate}",
             f"output_dir={here}/{world}/{name}"]
    return name, bucket, list({item.partition("=")[0]: item for item in given}.values())


def more(run, name, *settings):
    """The same run under another name, with other settings."""
    _, bucket, given = run
    folder = next(item for item in given if item.startswith("output_dir=")).rpartition("/")[0]
    changed = {item.partition("=")[0]: item for item in [*given, *settings, f"{folder}/{name}"]}
    return name, bucket, list(changed.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All cases with one process (as 0) and 1 to 4 ranks, each set of ranks started once; {ranks: shares, screen}."""
    here, found = tmp_path_factory.mktemp("ranks"), {}
    rows = read_jsonl(ROOT / "data/tiny_review.jsonl")[:40]
    for file, part in (("rows", rows[:27]), ("eval", rows[27:]), ("five", rows[:5]), ("eight", rows[:5] + rows[:3])):
        (here / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    texts = [row["messages"][1]["content"].replace("\n", " ") for row in rows[:27]]
    texts[::4] = [""] * 7                           # an empty document: its end is a label that nothing predicts
    (here / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    tiny_model(here / "dense", DENSE)
    tiny_model(here / "mixture", MIXTURE)
    half = f"resume_from_checkpoint={here}/2/27 rows/checkpoint-2"
    for world in (0, 2, 1, 3, 4):
        todo = [settings_of(here, max(world, 1), name) for name in CASES]
        if world == 0:
            todo = [more(run, f"../0/{run[0]}") for run in todo]
            todo.append(more(todo[0], "twice", *(s.format(v) for s, v in zip(AGAIN, ("", "", 4, here / "eight.jsonl", "")))))
        if world == 1:
            todo = [todo[0], more(todo[0], "resumed", half)]
        if world == 2:
            todo.append(more(todo[0], "twice", *(s.format(v) for s, v in zip(AGAIN, ("", "", 2, here / "five.jsonl", "")))))
        if world == 3:
            todo.append(more(todo[0], "resumed", half))
        script = worker(here, todo)
        code, screen = screen_of([*script] if world == 0 else torchrun(world, *script))
        assert code == 0, screen[-4000:]
        found[world] = json.loads((here / f"{script[1].name}.shares").read_text()), screen
    return here, found
