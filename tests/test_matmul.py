"""fast/matmul.py: all functions agree; wrong, failing or hardly faster ones are not picked."""
from dataclasses import replace

import pytest
import torch

from fast import matmul
from fast.matmul import MATMULS, SMALLEST, TRIED, Product, pick_matmul, products_of, rate_of
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
    """Forward and backward, of blocks and head, each as often as it is computed."""
    blocks, head = products_of(replace(tiny().config, hidden_size=512, intermediate_size=1408))
    assert (blocks.inputs, blocks.outputs, blocks.times) == (512, 1408, 6)
    assert (head.inputs, head.outputs) == (512, 50)
    assert products_of(tiny().config) == (SMALLEST,)    # too small for a measurement
    wide = Product(100, 1000, 10**6, times=1)           # measured on some of its outputs
    seconds = iter([1.0, 3.0])
    monkeypatch.setattr(matmul, "shortest", lambda call: next(seconds))
    outputs = TRIED // 100_000
    rate = rate_of(MATMULS["torch"], (wide,))
    assert rate == pytest.approx(2 * 2 * 100 * 1000 * outputs / 4 / 1e9)
    seconds = iter([1.0, 1.0, 9.0, 9.0])                # ten of one and one of the other
    many = Product(64, 64, 64, times=10)
    rate = rate_of(MATMULS["torch"], (many, Product(64, 64, 64)))
    assert rate == pytest.approx(22 * 2 * 64**3 / (20 + 18) / 1e9)


def _name_of(call, products):
    held = [cell.cell_contents for cell in call.__closure__]
    return next(name for name, product in products.items() if product in held)
