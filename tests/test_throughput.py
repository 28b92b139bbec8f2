"""runtime/throughput.py: FLOPs by hand for Llama-3-8B, pairs against a mask, profiles."""
import gzip
import json
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from attention import PackedLayout
from checkpoint.read_config import model_config
from lora import LoRAConfig, attach_lora
from model import CausalLM
from runtime import kernels, throughput
from runtime.throughput import (Pace, attention_pairs, matmul_parameters, matrix_rate, peak_memory,
                                training_flops)
from tests.common import LLAMA3_8B, ROOT, needs_shared, run_recorded


def on_meta(fields, rank=0):
    with torch.device("meta"):
        model = CausalLM(model_config(fields))
        return attach_lora(model, LoRAConfig(rank)) if rank else model


@pytest.mark.parametrize(
    "length, want", [(1024, 31.1e9), (2048, 31.9e9), (4096, 33.5e9), (8192, 36.7e9)]
)
def test_llama_3_8b_with_lora_by_hand(length, want):
    """A block: q, o 4096 x 4096, k, v 4096 x 1024, MLP 3 x 4096 x 14336; head 4096 x 128256."""
    model = on_meta(LLAMA3_8B, rank=16)
    frozen, trained = matmul_parameters(model)
    assert frozen == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    assert (
        trained
        == 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
        == 41_943_040
    )
    assert training_flops(model.config, frozen, trained, [length] * 3) / (
        3 * length
    ) == pytest.approx(want, rel=0.01)


def test_full_fine_tuning_and_a_tied_head():
    fields = LLAMA3_8B | dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        vocab_size=500,
    )
    apart = matmul_parameters(on_meta(fields).requires_grad_(True))
    tied = matmul_parameters(on_meta(fields | {"tie_word_embeddings": True}).requires_grad_(True))
    assert apart == tied == (0, 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 500)


def test_only_the_experts_of_a_token_are_counted():
    fields = dict(
        model_type="qwen3_moe",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=500,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=False,
    )
    frozen, _ = matmul_parameters(on_meta(fields).requires_grad_(False))
    assert frozen == 2 * 64 * 64 + 2 * 64 * 32 + 64 * 8 + 2 * 3 * 64 * 32 + 64 * 500


@pytest.mark.parametrize(
    "length, window, chunk",
    [(1, 0, 0), (17, 0, 0), (17, 5, 0), (17, 40, 0), (17, 0, 6), (18, 0, 6), (17, 4, 6), (5, 0, 6)],
)
def test_query_key_pairs_equal_the_mask(length, window, chunk):
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (
        (k <= q)
        & ((q - k < window) if window else True)
        & ((q // chunk == k // chunk) if chunk else True)
    )
    assert attention_pairs(length, window, chunk) == int(seen.sum())


def test_packed_rows_count_pairs_within_sequences_and_windows():
    fields = LLAMA3_8B | dict(model_type="mistral", sliding_window=128)
    config = model_config(fields)
    assert training_flops(config, 0, 0, [512, 512]) == 2 * training_flops(
        config, 0, 0, [512]
    )
    assert training_flops(config, 0, 0, [512]) == 12 * 4096 * 32 * attention_pairs(512, 128)


def test_flops_equal_torchs_count():
    """Against torch's FLOP counter over a forward and backward pass without recomputation."""
    from torch.utils.flop_counter import FlopCounterMode

    fields = LLAMA3_8B | dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=4,
        vocab_size=500,
    )
    model = CausalLM(model_config(fields)).requires_grad_(True)
    ids = torch.randint(0, 500, (1, 24))
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids, None, PackedLayout([24]))
        (hidden @ model.lm_head.weight.T).float().logsumexp(-1).sum().backward()
    # torch counts all pairs of the plain kernel, we only those within the mask
    all_pairs = 12 * 2 * 64 * 24 * 24
    ours = training_flops(model.config, *matmul_parameters(model), [24])
    seen = 12 * 2 * 64 * attention_pairs(24)
    assert counter.get_total_flops() == pytest.approx(ours - seen + all_pairs, rel=0.01)


def test_the_measured_matmul_rate_is_plausible():
    start = time.perf_counter()
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15 and time.perf_counter() - start < 2
    assert peak_memory(torch.device("cpu")) > 50e6


def test_pace_counts_steps_only(monkeypatch):
    clock = iter([0, 9, 100, 101, 200, 201, 300, 301, 400, 402, 500, 502])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    pace = Pace()
    for _ in range(6):  # the first three are not counted
        pace.begin()
        pace.end(10, 7.0)
    assert (pace.steady_tokens, pace.steady_seconds, pace.steady_flops) == (30, 5, 21.0)
    assert pace.tokens_per_second == 60 / 16
    pace.new_window()
    assert (pace.window_tokens, pace.window_seconds) == (0.0, 0.0)


@needs_shared
def test_a_run_logs_its_throughput(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "LEAST_SECONDS", 0.0)
    run_recorded("sft_llama3", tmp_path / "out", monkeypatch, "max_steps=6")
    found = json.loads((tmp_path / "out/speed_results.json").read_text())
    assert found["tokens_per_second"] > 0
    assert 0 < found["model_flops_utilization"] < 2
    assert found["peak_memory_gib"] > 0.05
    assert "speed results" in capsys.readouterr().out


# ---- what a step waits for, and where its time goes ----


@needs_shared
def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch):
    """On a GPU, reading one number waits for all work queued before it.

    The parts of a step run here under torch's dispatcher, which sees every operation. The loss may
    look up where labels are, once per pass.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    seen, parts = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op.name())
            return op(*args, **(kwargs or {}))

    open_parts = []

    def enter(part):
        parts.append(part.name)
        computed = part.name in ("forward", "backward", "communication", "optimizer")
        open_parts.append(Watch() if computed else nullcontext())
        open_parts[-1].__enter__()
        return part

    def leave(part, *error):
        open_parts.pop().__exit__(*error)

    monkeypatch.setattr(torch.profiler.record_function, "__enter__", enter)
    monkeypatch.setattr(torch.profiler.record_function, "__exit__", leave)
    # as on a GPU, where the head is not computed in tiles
    monkeypatch.setattr(kernels, "PICKS", [pick for pick in kernels.PICKS
                                           if pick is not kernels.pick_frozen_head])
    run_recorded(
        "sft_llama3",
        tmp_path / "out",
        monkeypatch,
        "max_steps=3",
        "neftune_noise_alpha=5",
        "join_micro_batches=false",
    )
    assert parts.count("waiting") == 3 and parts.count("forward") == 12 and len(seen) > 1000
    assert "aten::_local_scalar_dense" not in seen and "aten::equal" not in seen
    assert seen.count("aten::nonzero") <= 12


@needs_shared
def test_the_profile_lists_the_operations(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run_recorded("sft_llama3", out, monkeypatch, "max_steps=4", "profile=true",
                 "pin_kernels.attention=sdpa-flash")        # plain attention is matmuls and others
    table = (out / "profile.txt").read_text()
    assert table in capsys.readouterr().out
    shares = {
        line.split("  ")[1]: float(line.split()[-1][:-1])
        for line in table.splitlines()[1:]
        if line[2] != " "
    }
    assert {"forward", "backward", "loss"} <= shares.keys() and 85 < sum(shares.values()) < 102, (
        table
    )
    assert shares["backward"] > shares["optimizer"] and "matmul" in table and "attention" in table
    with gzip.open(out / "profile_trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"data", "forward", "backward", "optimizer", "aten::mm"} <= names


# ---- the start -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.4 imports it elsewhere, too")
def test_a_start_does_not_wait_for_sympy(tmp_path):
    """torch imports it, 0.4 s, for zeros_like on the meta device and to compare gradient shapes."""
    code = (
        "import sys, torch; before = 'sympy' in sys.modules; import train\n"
        "train.main(['configs/tiny_lora_sft.yaml', 'max_steps=2', 'plot_loss=false', "
        f"'output_dir={tmp_path}/out'])\n"
        "assert before or 'sympy' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
