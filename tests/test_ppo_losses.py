"""methods/ppo_losses.py: TRL 0.9.6, which LLaMA-Factory's ppo uses, on the same vectors; by hand.

tests/recorded/ppo.json holds what compute_rewards, compute_advantages and loss of its PPOTrainer,
its AdaptiveKLController and its RunningMoments returned.
"""
import json
import math

import pytest
import torch

from methods.policy_losses import clipped_losses, clipped_share
from methods.ppo_losses import (gae, merged_moments, next_kl_coef, token_rewards, value_losses,
                                whitened)
from tests.common import ROOT

RECORDED = json.loads((ROOT / "tests/recorded/ppo.json").read_text())
CASES = RECORDED["cases"]


def end_to_end(rows):
    return torch.tensor([value for row in rows for value in row])


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_rewards_and_advantages_are_those_of_trl(case):
    counts = case["lengths"]
    old, ref = end_to_end(case["old_logps"]), end_to_end(case["ref_logps"])
    rewards = token_rewards(torch.tensor(case["scores"]), old, ref, counts, case["kl_coef"])
    assert_close(rewards, end_to_end(case["token_rewards"]))
    if case["whiten_rewards"]:
        rewards = whitened(rewards, shift_mean=False)
    values = end_to_end(case["old_values"])
    advantages = gae(rewards, values, counts, case["gamma"], case["lam"])
    assert_close(advantages + values, end_to_end(case["returns"]))
    assert_close(whitened(advantages), end_to_end(case["advantages"]))
    kl = sum(part.sum() for part in (old - ref).split(counts)) / len(counts)
    assert kl.item() == pytest.approx(case["kl"], abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_trl(case):
    logps = end_to_end(case["logps"]).requires_grad_()
    values = end_to_end(case["values"]).requires_grad_()
    advantages = end_to_end(case["advantages"])
    ratios = (logps - end_to_end(case["old_logps"])).exp()
    policy = clipped_losses(ratios, advantages, 0.2, 0.2)
    value, clipped = value_losses(values, end_to_end(case["old_values"]),
                                  end_to_end(case["returns"]), 0.2)
    assert policy.mean().item() == pytest.approx(case["policy_loss"], abs=1e-6)
    assert value.mean().item() == pytest.approx(case["value_loss"], abs=1e-6)
    loss = (policy + 0.1 * value).mean()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
    loss.backward()
    assert_close(logps.grad, end_to_end(case["grad_logps"]))
    assert_close(values.grad, end_to_end(case["grad_values"]))
    assert clipped.float().mean().item() == pytest.approx(case["value_clip_share"])
    share = clipped_share(ratios, advantages, 0.2, 0.2).mean().item()
    assert share == pytest.approx(case["clip_share"])


def test_the_coefficient_of_the_kl_is_that_of_trl():
    kl_coef = RECORDED["kl_coefs"]["start"]
    for kl, answers, wanted in RECORDED["kl_coefs"]["steps"]:
        kl_coef = next_kl_coef(kl_coef, kl, RECORDED["kl_coefs"]["target"], answers)
        assert kl_coef == pytest.approx(wanted, rel=1e-8)


def test_moments_are_those_of_trl():
    mean, variance, count = 0.0, 1.0, 0.0
    for step in RECORDED["moments"]:
        mean, variance, count = merged_moments(mean, variance, count, torch.tensor(step["scores"]))
        spread = math.sqrt(variance * count / (count - 1))
        assert (mean, spread) == pytest.approx((step["mean"], step["std"]), rel=1e-6)


def test_gae_by_hand():
    """gamma 0.5, lam 0.5: two answers of two tokens and of one, which do not touch each other."""
    rewards, values = torch.tensor([1.0, 2.0, 8.0]), torch.tensor([1.0, 4.0, 3.0])
    # delta: 1 + 0.5 * 4 - 1 = 2, 2 - 4 = -2, 8 - 3 = 5; A: 2 + 0.25 * -2, -2, 5
    assert gae(rewards, values, [2, 1], 0.5, 0.5).tolist() == [1.5, -2.0, 5.0]
    # lam 1: what came minus what was expected
    assert gae(rewards, values, [2, 1], 1.0, 1.0).tolist() == [2.0, -2.0, 5.0]


def test_an_answer_does_not_depend_on_its_neighbours():
    """Nor on the padding that longer ones would bring."""
    draw = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(9, generator=draw), torch.randn(9, generator=draw)
    alone = torch.cat([gae(r, v, [len(r)]) for r, v in zip(rewards.split([2, 6, 1]),
                                                           values.split([2, 6, 1]))])
    torch.testing.assert_close(gae(rewards, values, [2, 6, 1]), alone)


def test_values_are_clipped_by_hand():
    losses, clipped = value_losses(torch.tensor([1.0, 1.0, 0.1]), torch.zeros(3),
                                   torch.tensor([1.0, 0.0, 1.0]), 0.2)
    # V 1 clipped to 0.2: errors 0 and 0.64; 1 and 0.04; 0.1 is not clipped: 0.81 both
    torch.testing.assert_close(losses, torch.tensor([0.32, 0.5, 0.405]))
    assert clipped.tolist() == [True, False, False]


def test_whitening_one_value_or_equal_ones_is_finite():
    assert whitened(torch.tensor([3.0])).tolist() == [0.0]
    assert whitened(torch.tensor([3.0, 3.0])).tolist() == [0.0, 0.0]


def test_the_score_comes_with_the_last_token_of_its_answer():
    rewards = token_rewards(torch.tensor([10.0, 20.0]), torch.tensor([-1.0, -2.0, -3.0]),
                            torch.tensor([-2.0, -2.0, -1.0]), [2, 1], 0.5)
    assert rewards.tolist() == [-0.5, 10.0, 21.0]
