"""train.py on several ranks of this machine: launchers, a small dataset and settings.

Requires: common.py.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import torch

from checkpoint.files import write_tensors
from checkpoint.read_config import model_config
from model import CausalLM, init_weights
from tests.common import ROOT, read_jsonl

TINY = ROOT / "models/tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(*launchers):
    """The launchers (argument lists) as processes; none is left at the end, and their ranks follow
    within a second."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "POCKET_TRACEBACK": "0"}
    found = [subprocess.Popen([sys.executable, *map(str, launcher)], cwd=ROOT, env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
             for launcher in launchers]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def torchrun(world, *rest):
    return ["-m", "torch.distributed.run", "--nproc-per-node", world, "--master-port", free_port(),
            *rest]


def forked(world, script, *rest):
    """As torchrun, in a third of its time: see fork_ranks.py."""
    return ["-m", "tests.fork_ranks", world, script, *rest]


def outcomes(*launchers, seconds=400) -> list[tuple[int, str, float]]:
    """(exit code, all that was printed, when it ended) of launchers that run at the same time."""
    found, start = [None] * len(launchers), time.time()

    def follow(place, process):
        text = process.communicate()[0]
        found[place] = process.returncode, text, time.time()

    with started(*launchers) as processes:
        threads = [threading.Thread(target=follow, args=pair) for pair in enumerate(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0, start + seconds - time.time()))
        assert None not in found, found
    return found

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, vocab_size=1600, max_position_embeddings=512,
             rms_norm_eps=1e-6, eos_token_id=2, pad_token_id=0, initializer_range=0.1)
DENSE = {"model_type": "qwen3", **SMALL, "tie_word_embeddings": True}
MIXTURE = {"model_type": "qwen3_moe", **SMALL, "num_experts": 24, "num_experts_per_tok": 1,
           "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1,
           "mlp_only_layers": [], "router_aux_loss_coef": 0.01, "tie_word_embeddings": False}
COMMON = dict(model_name_or_path="dense", dataset="rows.jsonl", template="chatml", cutoff_len=96,
              use_cpu=True, disable_tqdm=True, even_batches=False, logging_steps=1,
              save_strategy="no", num_train_epochs=2, lora_rank=4, learning_rate=5e-3,
              adam_epsilon=1e-4,        # or AdamW divides tiny gradients by their rounding errors
              lr_scheduler_type="cosine", disable_gradient_checkpointing=True,
              flash_attn="disabled")


def tiny_model(folder, fields):
    """A random checkpoint with these fields of config.json, and the tokenizer of models/tiny,
    without a chat template: each rank of each run would render it in a process of its own."""
    model = CausalLM(model_config(fields))
    init_weights(model, torch.Generator().manual_seed(0))
    weights = {model.config.stored_name(name): p.data for name, p in model.named_parameters()}
    folder.mkdir()
    write_tensors(folder, {n: (tuple(w.shape), w.dtype) for n, w in weights.items()},
                  lambda n: [weights[n]])
    (folder / "config.json").write_text(json.dumps(fields))
    shutil.copy(TINY / "tokenizer.json", folder)
    tokenizer = json.loads((TINY / "tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def small_world(here):
    """Two models, and rows for training, evaluation and stage pt."""
    tiny_model(here / "dense", DENSE)
    tiny_model(here / "mixture", MIXTURE)
    rows = read_jsonl(ROOT / "data/tiny_review.jsonl")[:40]
    for file, part in (("rows", rows[:27]), ("eval", rows[27:]), ("five", rows[:5]),
                       ("eight", rows[:5] + rows[:3])):
        (here / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part),
                                            encoding="utf-8")
    pairs = [{"messages": row["messages"][:-1], "chosen": row["messages"][-1],
              "rejected": other["messages"][-1]}
             for row, other in zip(rows[:27], rows[1:])]
    judged = [{"messages": row["messages"], "label": i % 3 > 0} for i, row in enumerate(rows[:24])]
    for file, part in (("pairs", pairs), ("judged", judged)):
        (here / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part),
                                            encoding="utf-8")
    texts = [row["messages"][1]["content"].replace("\n", " ") for row in rows[:27]]
    texts[::4] = [""] * 7  # an empty document: its eos is a label that nothing predicts
    (here / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
