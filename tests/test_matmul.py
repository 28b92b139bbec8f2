"""fast/matmul.py: all functions agree; wrong, failing or hardly faster ones are not picked."""
import torch

from fast import matmul
from fast.matmul import MATMULS, pick_matmul


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


def _name_of(call, products):
    held = [cell.cell_contents for cell in call.__closure__]
    return next(name for name, product in products.items() if product in held)
