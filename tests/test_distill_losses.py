"""methods/distill_losses.py: TRL's losses and gradients on the same vectors, and numbers by hand.

tests/recorded/distill_losses.json holds what GKDTrainer.generalized_jsd_loss of TRL 0.24 returned
for answers of equal and of different lengths, with padding and prompts masked.
"""
import json
import math

import pytest
import torch

import losses
from data import IGNORE
from methods.distill_losses import (Distance, Head, distill_sums, distill_sums_plain, divergences,
                                    divergences_and_grad)
from tests.common import ROOT

RECORDED = json.loads((ROOT / "tests/recorded/distill_losses.json").read_text())
RUNS = [(case, run) for case in RECORDED["cases"] for run in case["runs"]]
BETAS = (0, 0.1, 0.5, 0.9, 1)


def both_sums(function, case, run):
    """(mean divergence, gradient for the student's logits) by distill_sums or its twin."""
    V = len(case["student"][0][0])
    student = torch.tensor(case["student"]).view(-1, V).requires_grad_()
    teacher = torch.tensor(case["teacher"]).view(-1, V)
    targets = torch.tensor(case["labels"]).flatten()
    total, _ = function(Head(student, torch.eye(V)), Head(teacher, torch.eye(V)), targets,
                        Distance(run["beta"], run["temperature"]))
    mean = total / (targets != IGNORE).sum()
    mean.backward()
    return mean.item(), student.grad


@pytest.mark.parametrize("chunk_bytes", [losses.CHUNK_BYTES, 1])
@pytest.mark.parametrize("case, run", RUNS)
def test_losses_and_gradients_are_those_of_trl(case, run, chunk_bytes, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk_bytes)
    loss, grad = both_sums(distill_sums, case, run)
    assert loss == pytest.approx(run["loss"], rel=1e-6, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor(run["grad"]).view(grad.shape), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case, run", RUNS)
def test_the_divergence_of_every_position_is_that_of_trl(case, run):
    logps = [(torch.tensor(case[name]) / run["temperature"]).log_softmax(-1)
             for name in ("student", "teacher")]
    counted = torch.tensor(case["labels"]) != IGNORE
    torch.testing.assert_close(divergences(*logps, run["beta"])[counted],
                               torch.tensor(run["each"]), atol=1e-6, rtol=1e-6)


def test_all_kinds_and_cases_are_recorded():
    assert {run["beta"] for _, run in RUNS} == set(BETAS)
    assert {run["temperature"] for _, run in RUNS} == {1.0, 0.7, 2.0}
    masked = [case["labels"] for case in RECORDED["cases"]]
    assert any(row[-1] == IGNORE and row[1] != IGNORE for rows in masked for row in rows)
    assert any(set(row) == {IGNORE} for rows in masked for row in rows)


def test_divergences_by_hand():
    """Two tokens: the teacher (3/4, 1/4), the student (1/2, 1/2)."""
    t, p = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert divergences(p, t, 0).item() == pytest.approx(forward)
    assert divergences(p, t, 1).item() == pytest.approx(reverse)
    m = [0.625, 0.375]                                  # beta 1/2
    to_m = 0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1])
    from_p = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    assert divergences(p, t, 0.5).item() == pytest.approx(0.5 * to_m + 0.5 * from_p)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_are_exactly_zero_apart(beta):
    logps = (torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 5).log_softmax(-1)
    found, grad = divergences_and_grad(logps, logps.clone(), beta)
    assert not found.any() and not grad.any()


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_that_of_finite_differences(beta):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    teacher = torch.randn(3, 6, dtype=torch.float64, generator=generator).log_softmax(-1)
    grad = divergences_and_grad(logits.log_softmax(-1), teacher, beta)[1]
    for index in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[index] = 1e-6
        up, down = (divergences((logits + sign * step).log_softmax(-1), teacher, beta)
                    for sign in (1, -1))
        torch.testing.assert_close(grad[:, index], (up - down) / 2e-6, atol=1e-8, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_no_distribution_overflows(beta):
    """Models that are sure of different tokens: log-probabilities down to -2000."""
    student, teacher = (torch.tensor([row]).log_softmax(-1)
                        for row in ([1000.0, -1000.0, 0.0], [-1000.0, 1000.0, 0.0]))
    found, grad = divergences_and_grad(student, teacher, beta)
    assert found.isfinite().all() and grad.isfinite().all() and (found > 0).all()


def heads(V=50, teacher_V=50, softcap=None, dtype=torch.float32, N=23):
    generator = torch.Generator().manual_seed(2)

    def tensor(*shape):
        return (torch.randn(shape, generator=generator) / 2).to(dtype)

    student = Head(tensor(N, 8).requires_grad_(), tensor(V, 8).requires_grad_(), softcap)
    teacher = Head(3 * tensor(N, 12), tensor(teacher_V, 12), 5.0)
    targets = torch.randint(40, (N,), generator=generator)
    targets[::3] = IGNORE
    return student, teacher, targets


@pytest.mark.parametrize("softcap, temperature", [(None, 1.0), (4.0, 0.8)])
@pytest.mark.parametrize("beta", BETAS)
def test_the_sums_equal_those_of_the_plain_twin(beta, softcap, temperature, monkeypatch):
    """With heads of different widths, a trained head, and more than one chunk."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1)
    found = []
    for function in (distill_sums, distill_sums_plain):
        student, teacher, targets = heads(softcap=softcap)
        total, entropies = function(student, teacher, targets, Distance(beta, temperature))
        (total / 7).backward()
        found.append((total.detach(), entropies, student.hidden.grad, student.weight.grad))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("V, teacher_V", [(50, 44), (44, 50)])
def test_heads_of_different_sizes_are_compared_in_the_rows_that_both_have(V, teacher_V):
    student, teacher, targets = heads(V, teacher_V)
    total, entropies = distill_sums(student, teacher, targets, Distance())
    total.backward()
    shorter = [Head(head.hidden.detach().requires_grad_(), head.weight.detach()[:44], head.softcap)
               for head in (student, teacher)]
    wanted, wanted_entropies = distill_sums(*shorter, targets, Distance())
    wanted.backward()
    assert total == wanted and torch.equal(entropies, wanted_entropies)
    assert torch.equal(student.hidden.grad, shorter[0].hidden.grad)
    assert not student.weight.grad[44:].any()


def test_without_supervised_positions_there_is_nothing():
    student, teacher, targets = heads()
    total, entropies = distill_sums(student, teacher, torch.full_like(targets, IGNORE), Distance())
    total.backward()
    assert total == 0 and not entropies.any() and not student.hidden.grad.any()


def test_16_bits_are_near_32():
    whole = distill_sums(*heads(), Distance())[0]
    half = distill_sums(*heads(dtype=torch.bfloat16), Distance())[0]
    assert half.dtype == torch.float32 and half.item() == pytest.approx(whole.item(), rel=0.02)
