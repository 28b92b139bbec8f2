"""methods/sft_losses.py: the losses against their formulas, written out on all logits.

Whole runs recorded from LLaMA-Factory are in tests/test_train.py (dft, eaft, asft).
"""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import losses
from data import IGNORE
from methods.sft_losses import (ASFTObjective, DFTObjective, EAFTObjective, SmoothedObjective,
                                kl_sum)
from tests.ranks import COMMON, forked, outcomes, small_world
from tests.test_parallel import curves, weights_of

N, D, V = 9, 8, 40


class Decoder:
    """Hidden states and a head, as an objective reads them."""

    def __init__(self, seed, softcap=None):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(N, D, generator=generator).requires_grad_()
        self.weight = torch.randn(V, D, generator=generator).requires_grad_()
        self.config = SimpleNamespace(final_softcap=softcap)
        self.training = True

    def __call__(self, input_ids, position_ids, layout, routers=None):
        return self.hidden[None]

    def head_weight(self):
        return self.weight

    def logits(self, rows):
        return losses.capped(self.hidden[rows] @ self.weight.T, self.config.final_softcap)

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def batch_of(targets):
    return SimpleNamespace(input_ids=None, position_ids=None, layout=None, filler=False,
                           targets=torch.tensor(targets))


TARGETS = [3, IGNORE, 0, 39, IGNORE, 7, 7, 12, IGNORE]
ROWS = [i for i, y in enumerate(TARGETS) if y != IGNORE]
Y = torch.tensor([TARGETS[i] for i in ROWS])


@pytest.fixture(params=[None, 5.0], ids=["", "softcap"])
def decoder(request):
    return Decoder(0, request.param)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of logits for these few rows."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * V * 2)


def assert_same(decoder, loss, expected):
    assert torch.allclose(loss, expected, rtol=1e-5)
    for ours, theirs in zip(decoder.gradients(loss), decoder.gradients(expected)):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_dft_is_probability_times_cross_entropy(decoder):
    loss, _, metrics = DFTObjective().loss_sum(decoder, batch_of(TARGETS))
    nll = F.cross_entropy(decoder.logits(ROWS), Y, reduction="none")
    assert_same(decoder, loss, (nll * torch.exp(-nll).detach()).sum())
    total, count = metrics["cross_entropy"].tolist()
    assert count == len(ROWS) and total == pytest.approx(float(nll.detach().sum()), rel=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_eaft_is_entropy_of_the_top_20_times_cross_entropy(decoder, alpha):
    loss, _, _ = EAFTObjective(alpha).loss_sum(decoder, batch_of(TARGETS))
    logits = decoder.logits(ROWS)
    nll = F.cross_entropy(logits, Y, reduction="none")
    p = logits.detach().topk(20).values.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    assert_same(decoder, loss, (nll * (entropy / 3) ** alpha).sum())


def test_kl_in_chunks_is_kl_of_all_logits(decoder):
    other = Decoder(1, decoder.config.final_softcap)
    found = kl_sum(decoder.hidden, decoder.weight, other.hidden.detach(), other.weight.detach(),
                   torch.tensor(TARGETS), decoder.config.final_softcap)
    log_q, log_p = other.logits(ROWS).detach().log_softmax(-1), decoder.logits(ROWS).log_softmax(-1)
    assert_same(decoder, found, (log_q.exp() * (log_q - log_p)).sum())


@pytest.mark.parametrize("paper", [True, False])
def test_asft_adds_the_divergence(decoder, paper):
    reference = Decoder(1, decoder.config.final_softcap)
    config = SimpleNamespace(asft_alpha=0.3, paper_losses=paper)
    batch = batch_of(TARGETS)
    loss, undivided, _ = ASFTObjective(config, reference).loss_sum(decoder, batch)
    dft, _, _ = DFTObjective().loss_sum(decoder, batch)
    kl = kl_sum(decoder.hidden, decoder.weight, reference.hidden.detach(),
                reference.weight.detach(), batch.targets, decoder.config.final_softcap)
    expected = dft + 0.3 * kl
    if paper:
        assert undivided == 0.0
        assert_same(decoder, loss, expected)
    else:                                           # the mean of this micro-batch
        assert loss == 0.0
        assert_same(decoder, undivided, expected / len(ROWS))


@pytest.mark.parametrize("paper", [True, False])
def test_a_smoothed_loss_is_that_of_torch(decoder, paper):
    config = SimpleNamespace(label_smoothing_factor=0.2, paper_losses=paper)
    sums = SmoothedObjective(config).loss_sum(decoder, batch_of(TARGETS))
    expected = F.cross_entropy(decoder.logits(ROWS), Y, label_smoothing=0.2, reduction="sum")
    assert sums[paper] == 0.0
    assert_same(decoder, sums[not paper], expected if paper else expected / len(ROWS))
    total, count = sums[2]["cross_entropy"].tolist()
    nll = F.cross_entropy(decoder.logits(ROWS), Y, reduction="sum")
    assert count == len(ROWS) and total == pytest.approx(nll.item(), rel=1e-5)


def test_two_ranks_smooth_as_one_rank_with_twice_the_micro_batches(tmp_path):
    """LLaMA-Factory 0.9.5 with transformers 5.6 does: its loss is multiplied by the number of
    processes before gradients are averaged (losses of 28.59 both ways, and equal norms)."""
    small_world(tmp_path)
    settings = COMMON | dict(model_name_or_path=tmp_path / "dense", dataset=tmp_path / "rows.jsonl",
                             label_smoothing_factor=0.1, per_device_train_batch_size=1, max_steps=2)
    words = [f"{key}={value}" for key, value in settings.items()]
    launchers = [
        ["train.py", *words, "gradient_accumulation_steps=4", f"output_dir={tmp_path / 'one'}"],
        forked(2, "train.py", *words, "gradient_accumulation_steps=2",
                 f"output_dir={tmp_path / 'two'}")]
    for code, screen, _ in outcomes(*launchers):
        assert code == 0, screen
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert len(one) == len(two) == 3 and one[0][1] > 20         # the sum of four means
    for mine, theirs in zip(one, two):
        assert mine == pytest.approx(theirs, rel=1e-5)
    trained = weights_of(tmp_path / "two")
    for name, weight in weights_of(tmp_path / "one").items():
        assert torch.allclose(weight, trained[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("objective", [
    DFTObjective(), EAFTObjective(1.0),
    ASFTObjective(SimpleNamespace(asft_alpha=0.1, paper_losses=False), Decoder(1))],
    ids=["dft", "eaft", "asft"])
def test_a_batch_without_labels_is_zero(objective):
    decoder = Decoder(0)
    loss, undivided, _ = objective.loss_sum(decoder, batch_of([IGNORE] * N))
    assert float(loss) + float(undivided) == 0.0
