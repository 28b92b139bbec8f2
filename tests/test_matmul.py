"""fast/matmul.py: all functions agree; wrong, failing or hardly faster ones are not picked."""
from dataclasses import replace

import pytest
import torch

import train
from fast import matmul
from fast.matmul import (MATMULS, NAMES, SMALLEST, TRIED, MatmulChoice, Product, product_of,
                         rate_of, through_float32)
from runtime.kernels import kernels_of_training
from tests.common import ROOT
from tests.tiny_models import tiny


pick_matmul = matmul.pick_matmul.__wrapped__            # each call tries anew


def test_matmuls_agree_for_both_layouts():
    generator = torch.Generator().manual_seed(0)
    for N, size_in, size_out in ((1, 8, 8), (5, 33, 70), (64, 128, 257), (0, 8, 5), (5, 0, 8)):
        x = torch.randn(N, size_in, generator=generator)
        W = torch.randn(size_out, size_in, generator=generator)
        bias = torch.randn(size_out, generator=generator)
        for product in MATMULS.values():
            assert torch.allclose(product(x, W, bias), x @ W.T + bias, atol=1e-4)
            assert torch.allclose(product(x, W.T.contiguous().T), x @ W.T, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_through_float32_are_rounded_once(dtype, monkeypatch):
    """Also where the weight is cast in pieces."""
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(rows, 96, generator=generator).to(dtype) for rows in (20, 70))
    bias = torch.randn(70, generator=generator).to(dtype)
    exact = x.double() @ W.double().T + bias.double()
    for numbers in (2**22, 96 * 7):
        monkeypatch.setattr(matmul, "CAST", numbers)
        for layout in (W, W.T.contiguous().T):
            got = through_float32(x, layout, bias)
            assert got.dtype == dtype
            # half a step of the dtype, and the error of float32
            allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4
            assert ((got.double() - exact).abs() <= allowed).all()


def test_a_wrong_or_failing_matmul_is_not_picked(monkeypatch):
    def refused(x, W, bias=None):
        raise RuntimeError("no such thing here\nmore")

    monkeypatch.setitem(MATMULS, "onednn", lambda x, W, bias=None: torch.zeros(len(x), len(W)))
    monkeypatch.setitem(MATMULS, "other", refused)
    monkeypatch.setitem(NAMES, torch.float32, ("torch", "onednn", "other"))
    choice = pick_matmul("cpu", torch.float32)
    assert choice.picked == "torch"
    assert choice.lines[0].startswith("matmul: torch, ")
    assert "onednn: wrong by" in choice.lines[0]
    assert "other: no such thing here" in choice.lines[0]


def test_the_fastest_is_picked_if_clearly_faster(monkeypatch):
    times = {"torch": 1.0, "onednn": 0.8, "float32": 0.95}
    real = dict(MATMULS)
    monkeypatch.setattr(matmul, "shortest", lambda call: times[_name_of(call, real)])
    assert pick_matmul("cpu", torch.float32).picked == "onednn"
    times["onednn"] = 0.95
    assert pick_matmul("cpu", torch.float32).picked == "torch"
    for dtype in (torch.bfloat16, torch.float16):
        times["float32"] = 0.95
        assert pick_matmul("cpu", dtype).picked == "torch"
        times["float32"] = 0.8
        choice = pick_matmul("cpu", dtype)
        assert choice.picked == "float32" and list(choice.rates) == ["torch", "float32"]


def test_the_models_own_products_decide(monkeypatch):
    """Forward and backward, measured on some of their outputs."""
    large = replace(tiny().config, hidden_size=512, intermediate_size=1408)
    assert product_of(large) == Product(256, 512, 1408)
    assert product_of(tiny().config) == SMALLEST            # too small for a measurement
    seconds = iter([1.0, 3.0])
    monkeypatch.setattr(matmul, "shortest", lambda call: next(seconds))
    outputs = TRIED[torch.float32] // 100_000
    rate = rate_of(MATMULS["torch"], Product(100, 1000, 10**6))
    assert rate == pytest.approx(2 * 2 * 100 * 1000 * outputs / 4 / 1e9)


LARGE = Product(256, 512, 1408)


def test_fewer_threads_are_taken_where_they_are_clearly_faster(monkeypatch):
    """And never against OMP_NUM_THREADS."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    speed = {4: 1.0, 3: 1.05, 2: 1.2}
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))
    monkeypatch.setattr(matmul, "rate_of", lambda *args: speed[threads[0]])
    assert pick_matmul("cpu", torch.float32, LARGE).threads == 0
    monkeypatch.delenv("OMP_NUM_THREADS")
    choice = pick_matmul("cpu", torch.float32, LARGE)
    assert choice.threads == 2 and choice.threads_tried == (4, 3, 2) and threads == [4]
    assert choice.lines[-1].startswith("threads: 2, ")
    speed[2] = 1.0
    assert pick_matmul("cpu", torch.float32, LARGE).threads == 4
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
