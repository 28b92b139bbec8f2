"""methods/policy_losses.py: TRL's losses and gradients on the same vectors, and numbers by hand.

tests/recorded/policy_losses.json holds what GRPOTrainer._compute_loss of TRL 1.16 returned for
answers of equal and of different lengths, and with truncated answers masked.
"""
import json
import math

import pytest
import torch

from methods.policy_losses import (clipped_losses, clipped_share, group_advantages, kl_estimates,
                                   policy_losses, token_weights)
from tests.common import ROOT

RECORDED = json.loads((ROOT / "tests/recorded/policy_losses.json").read_text())
RUNS = [(case, run) for case in RECORDED["cases"] for run in case["runs"]]
KINDS = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo")


def flat(rows):
    return torch.tensor([value for row in rows for value in row])


def loss_of(case, run, micro_batches=1, select=slice(None)):
    """Our loss of the answers `select` as one micro-batch of a step with all of them."""
    counts = torch.tensor(case["lengths"])
    trained = torch.ones(len(counts))
    trained[case["masked"]] = 0
    totals = {
        "answers": len(counts),
        "tokens": float((counts * trained).sum()),
        "micro_batches": micro_batches,
        "max_new_tokens": RECORDED["max_new_tokens"],
    }
    kind = run["policy_loss"]
    logps = flat(case["logps"][select]).requires_grad_()
    advantages = torch.tensor(case["advantages"])[select].repeat_interleave(counts[select])
    losses, _ = policy_losses(kind, logps, flat(case["old_logps"][select]), advantages,
                              case["lengths"][select], run["epsilon"], run["epsilon_high"])
    losses = losses + run["kl_beta"] * kl_estimates(logps, flat(case["ref_logps"][select]))
    weights = token_weights(kind, counts[select], trained[select], **totals)
    loss = (losses * weights).sum()
    loss.backward()
    return loss.item(), logps.grad


@pytest.mark.parametrize("case, run", RUNS)
def test_losses_and_gradients_are_those_of_trl(case, run):
    loss, grad = loss_of(case, run)
    assert loss == pytest.approx(run["loss"], abs=1e-6)
    torch.testing.assert_close(grad, flat(run["grad"]), atol=1e-6, rtol=0)


def test_all_kinds_and_cases_are_recorded():
    assert {run["policy_loss"] for _, run in RUNS} == set(KINDS)
    assert any(case["masked"] for case, _ in RUNS)
    assert any(len(set(case["lengths"])) > 1 for case, _ in RUNS)
    assert {run["kl_beta"] for _, run in RUNS} == {0.0, 0.04}


@pytest.mark.parametrize("case, run", [(case, run) for case, run in RUNS
                                       if run["policy_loss"] != "bnpo"])
def test_a_step_does_not_depend_on_its_micro_batches(case, run):
    """bnpo apart, which is a mean over the tokens of each micro-batch."""
    parts = [loss_of(case, run, 2, half) for half in (slice(0, 2), slice(2, 6))]
    assert sum(loss for loss, _ in parts) == pytest.approx(run["loss"], abs=1e-6)


@pytest.mark.parametrize("case", RECORDED["cases"])
@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_those_of_trl(case, scale):
    rewards = torch.tensor(case["rewards"]).view(-1, RECORDED["group"])
    wanted = case["advantages" if scale else "advantages none"]
    torch.testing.assert_close(group_advantages(rewards, scale).flatten(), torch.tensor(wanted),
                               atol=1e-6, rtol=0)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    spread = math.sqrt(4 * 0.25 / 3) + 1e-4
    wanted = [[0.5 / spread, -0.5 / spread, -0.5 / spread, 0.5 / spread], [0.0] * 4]
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(wanted))


def test_an_unknown_reward_counts_in_no_mean():
    rewards = torch.tensor([[1.0, math.nan, 0.0], [math.nan, 5.0, math.nan], [math.nan] * 3])
    wanted = [[0.5, 0.0, -0.5], [0.0] * 3, [0.0] * 3]
    torch.testing.assert_close(group_advantages(rewards, scale=False), torch.tensor(wanted))
    assert group_advantages(rewards).isfinite().all()


def test_clipping_by_hand():
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    wanted = torch.tensor([-1.25, -0.5, 1.5, 0.8, -2.0])
    torch.testing.assert_close(clipped_losses(ratios, advantages, 0.2, 0.25), wanted)
    assert clipped_share(ratios, advantages, 0.2, 0.25).tolist() == [1, 0, 0, 1, 0]


def test_kl_is_zero_where_both_agree_and_positive_elsewhere():
    logps = torch.tensor([-1.0, -1.0, -1.0])
    kl = kl_estimates(logps, torch.tensor([-1.0, -2.0, 0.0]))
    torch.testing.assert_close(kl, torch.tensor([0.0, math.exp(-1), math.e - 2]))
