"""fast/matmul.py: all functions agree; wrong, failing or hardly faster ones are not picked."""
from dataclasses import replace

import pytest
import torch

from fast import matmul
from fast.matmul import (HEAD_ROWS, MATMULS, SMALLEST, TRIED, Product, pick_matmul, products_of,
                         rates_of, seconds_of)
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
    assert products_of(tiny().config) == (SMALLEST, None)   # too small for a measurement
    seconds = iter([1.0, 3.0])
    monkeypatch.setattr(matmul, "shortest", lambda call: next(seconds))
    wide = Product(100, 1000, 10**6)                    # measured on some of its outputs
    outputs = TRIED // 100_000
    assert seconds_of(MATMULS["torch"], wide) == pytest.approx(4 * 10**6 / outputs)
    seconds = iter([1.0, 1.0, 9.0, 9.0])                # ten of one and one of the other
    many = Product(64, 64, 64, times=10)
    rates = rates_of(MATMULS["torch"], many, Product(512, 64, 64))
    assert rates == {0: pytest.approx((10 + 8) * 4 * 64**3 / (20 + 18) / 1e9)}


HEAD = Product(256, 512, 128_256)


@pytest.fixture
def rates(monkeypatch):
    """{(library, rows of a head chunk): rate} that the trial finds; 1 where none is set."""
    found = {}
    names = {product: name for name, product in MATMULS.items()}

    def measured(product, blocks, head):
        return {rows: found.get((names[product], rows), 1.0) for rows in HEAD_ROWS}

    monkeypatch.setattr(matmul, "rates_of", measured)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return found


def test_more_rows_of_the_head_are_taken_where_they_are_clearly_faster(rates):
    choice = pick_matmul("cpu", torch.float32, SMALLEST, HEAD)
    assert (choice.picked, choice.head_rows) == ("torch", 128)
    assert choice.rows_tried == HEAD_ROWS and choice.threads == 0
    rates["torch", 256], rates["torch", 512] = 1.2, 1.25
    choice = pick_matmul("cpu", torch.float32, SMALLEST, HEAD)
    assert (choice.picked, choice.head_rows) == ("torch", 256)
    assert choice.lines == ["matmul: torch, 1 GFLOP/s (onednn 1)",
                            "head_rows: 256, of a chunk of the head (128: 1, 512: 1 GFLOP/s)"]
    rates["onednn", 128] = 1.4                          # together with the library
    choice = pick_matmul("cpu", torch.float32, SMALLEST, HEAD)
    assert (choice.picked, choice.head_rows) == ("onednn", 128)


def test_rows_are_tried_where_their_logits_are_many():
    def tried(vocab_size):
        return tuple(rates_of(MATMULS["torch"], SMALLEST, Product(256, 64, vocab_size)))

    assert tried(128_256) == HEAD_ROWS and tried(151_936) == HEAD_ROWS
    assert tried(50_000) == (256, 512)
    assert tried(32_000) == tried(1_600) == (0,)


def test_fewer_threads_are_taken_where_they_are_clearly_faster(rates, monkeypatch):
    """And never against OMP_NUM_THREADS."""
    speed = {4: 1.0, 3: 1.05, 2: 1.2}
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))
    monkeypatch.setattr(matmul, "seconds_of", lambda product, blocks: 1 / speed[threads[0]])
    assert pick_matmul("cpu", torch.float32, SMALLEST, HEAD).threads == 0
    monkeypatch.delenv("OMP_NUM_THREADS")
    choice = pick_matmul("cpu", torch.float32, SMALLEST, HEAD)
    assert choice.threads == 2 and choice.threads_tried == (4, 3, 2) and threads == [4]
    assert choice.lines[-1].startswith("threads: 2, ")
    speed[2] = 1.0
    assert pick_matmul("cpu", torch.float32, SMALLEST, HEAD).threads == 4
    assert pick_matmul("cpu", torch.float32).threads == 0       # a model too small to measure


def _name_of(call, products):
    held = [cell.cell_contents for cell in call.__closure__]
    return next(name for name, product in products.items() if product in held)
