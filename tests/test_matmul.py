"""fast/matmul.py: all functions agree; wrong, failing or hardly faster ones are not picked."""
from dataclasses import replace

import pytest
import torch

import train
from fast import matmul
from fast.matmul import (HEAD_ROWS, MATMULS, SMALLEST, TRIED, MatmulChoice, Product, pick_matmul,
                         products_of, rate_of, rows_to_try)
from runtime.kernels import kernels_of_training
from tests.common import ROOT
from tests.tiny_models import tiny


def test_matmuls_agree_for_both_layouts():
    generator = torch.Generator().manual_seed(0)
    for N, size_in, size_out in ((1, 8, 8), (5, 33, 70), (64, 128, 257), (0, 8, 5), (5, 0, 8)):
        x = torch.randn(N, size_in, generator=generator)
        W = torch.randn(size_out, size_in, generator=generator)
        bias = torch.randn(size_out, generator=generator)
        for product in MATMULS.values():
            assert torch.allclose(product(x, W, bias), x @ W.T + bias, atol=1e-4)
            assert torch.allclose(product(x, W.T.contiguous().T), x @ W.T, atol=1e-4)


def test_a_wrong_or_failing_matmul_is_not_picked(monkeypatch):
    def refused(x, W, bias=None):
        raise RuntimeError("no such thing here\nmore")

    monkeypatch.setitem(MATMULS, "onednn", lambda x, W, bias=None: torch.zeros(len(x), len(W)))
    monkeypatch.setitem(MATMULS, "other", refused)
    choice = pick_matmul("cpu", torch.float32)
    assert choice.picked == "torch"
    assert choice.lines[0].startswith("matmul: torch, ")
    assert "onednn: wrong by" in choice.lines[0]
    assert "other: no such thing here" in choice.lines[0]


def test_the_fastest_is_picked_if_clearly_faster(monkeypatch):
    times = {"torch": 1.0, "onednn": 0.8}
    real = dict(MATMULS)
    monkeypatch.setattr(matmul, "shortest", lambda call: times[_name_of(call, real)])
    assert pick_matmul("cpu", torch.float32).picked == "onednn"
    times["onednn"] = 0.95
    assert pick_matmul("cpu", torch.float32).picked == "torch"
    assert pick_matmul("cpu", torch.bfloat16).picked == "torch"


def test_the_models_own_products_decide(monkeypatch):
    """Forward and backward, measured on some of their outputs."""
    blocks, head = products_of(replace(tiny().config, hidden_size=512, intermediate_size=1408))
    assert blocks == Product(256, 512, 1408) and head == Product(128, 512, 50)
    assert products_of(tiny().config) == (SMALLEST, None)   # too small for a measurement
    seconds = iter([1.0, 3.0])
    monkeypatch.setattr(matmul, "shortest", lambda call: next(seconds))
    outputs = TRIED // 100_000
    rate = rate_of(MATMULS["torch"], Product(100, 1000, 10**6))
    assert rate == pytest.approx(2 * 2 * 100 * 1000 * outputs / 4 / 1e9)


HEAD = Product(128, 512, 128_256)


@pytest.fixture
def rates(monkeypatch):
    """{(rows or "blocks", library): rate} that the trial finds; 1 where none is set."""
    found = {}
    names = {product: name for name, product in MATMULS.items()}
    monkeypatch.setattr(matmul, "rate_of", lambda product, tried: found.get(
        ("blocks" if tried == SMALLEST else tried.rows, names[product]), 1.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return found


def test_the_head_has_a_library_and_rows_of_its_own_where_they_are_clearly_faster(rates):
    def picked():
        choice = pick_matmul("cpu", torch.float32, SMALLEST, HEAD)
        assert choice.rows_tried == HEAD_ROWS and choice.threads == 0
        return choice.picked, choice.head, choice.head_rows, choice.lines

    assert picked()[:3] == ("torch", "torch", 128)
    rates[256, "torch"], rates[512, "torch"] = 1.2, 1.25
    *choice, lines = picked()
    assert choice == ["torch", "torch", 256]
    assert lines == ["matmul: torch, 1 GFLOP/s (onednn 1)",
                     "head_matmul: torch, 1 GFLOP/s (onednn 1)",
                     "head_rows: 256, of a chunk of the head (128: 1, 512: 1 GFLOP/s)"]
    rates[128, "onednn"] = 1.15                         # as fast, in less memory
    assert picked()[:3] == ("torch", "onednn", 128)
    rates["blocks", "onednn"] = 2.0
    assert picked()[0] == "onednn"


def test_rows_are_tried_where_their_logits_are_many():
    def tried(vocab_size):
        return tuple(rows_to_try(Product(128, 64, vocab_size)))

    assert tried(128_256) == HEAD_ROWS and tried(151_936) == HEAD_ROWS
    assert tried(50_000) == (256, 512)
    assert tried(32_000) == tried(1_600) == (0,)


def test_fewer_threads_are_taken_where_they_are_clearly_faster(rates, monkeypatch):
    """And never against OMP_NUM_THREADS."""
    speed = {4: 1.0, 3: 1.05, 2: 1.2}
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))
    monkeypatch.setattr(matmul, "rate_of", lambda product, blocks: speed[threads[0]])
    assert pick_matmul("cpu", torch.float32, SMALLEST, HEAD).threads == 0
    monkeypatch.delenv("OMP_NUM_THREADS")
    choice = pick_matmul("cpu", torch.float32, SMALLEST, HEAD)
    assert choice.threads == 2 and choice.threads_tried == (4, 3, 2) and threads == [4]
    assert choice.lines[-1].startswith("threads: 2, ")
    speed[2] = 1.0
    assert pick_matmul("cpu", torch.float32, SMALLEST, HEAD).threads == 4
    assert pick_matmul("cpu", torch.float32).threads == 0       # a model too small to measure


def test_a_run_with_fewer_threads_is_known_as_one_of_this_machine(monkeypatch, tmp_path):
    """eval.py takes the kernels of the training, with the threads that the machine starts with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(matmul, "pick_matmul", lambda *args: MatmulChoice(
        "torch", {"torch": 1.0}, threads=1, threads_tried=(2, 1)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train.main(["configs/tiny_lora_sft.yaml", f"output_dir={tmp_path}", "max_steps=1", "ask=[]",
                    "max_samples=2", "plot_loss=false", "use_cpu=true"])
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        assert kernels_of_training(tmp_path, torch.device("cpu"))["threads"] == 1
    finally:
        torch.set_num_threads(threads)


def _name_of(call, products):
    held = [cell.cell_contents for cell in call.__closure__]
    return next(name for name, product in products.items() if product in held)
