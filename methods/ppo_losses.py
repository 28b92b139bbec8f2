"""The formulas of PPO for language models: pure functions of vectors.

    rewards of tokens       the score at the end of an answer, minus the divergence on the way
    advantages, returns     how much better it went than the value head expected (GAE)
    losses                  a clipped ratio for the policy (clipped_losses), a clipped value here
    coefficient of the KL   rises while the model is farther from its start than wanted

Answers lie end to end: N tokens in all, `counts` of each of the S answers; nothing is padded.

Requires: methods/policy_losses.py.
Next: methods/ppo.py.
Papers: GAE arXiv:1506.02438, PPO arXiv:1707.06347; rewards and the KL coefficient arXiv:1909.08593
(sec. 2.2), also used in arXiv:2009.01325; clipped values arXiv:2005.12729.
"""
import torch
from torch.nn.utils.rnn import pad_sequence

SMALLEST_VARIANCE = 1e-8    # added to a variance before its root is taken; TRL's
MOST_ERROR = 0.2            # of the KL, relative to its target, that one change accounts for
HORIZON = 10_000            # answers in which the coefficient can change by MOST_ERROR; TRL's


def token_rewards(scores, logps, ref_logps, counts: list[int], kl_coef: float):
    """-kl_coef log(pi / pi_ref) of each token, and the score at the last one of an answer, (N,).

    scores: (S,). arXiv:1909.08593, eq. 2, whose sum over an answer this is.
    """
    rewards = -kl_coef * (logps - ref_logps)
    last = torch.tensor(counts).cumsum(0) - 1
    rewards[last] += scores
    return rewards


def whitened(values, shift_mean: bool = True):
    """Values divided by their standard deviation, and with mean 0 if shift_mean, (N,)."""
    mean = values.mean()
    variance = values.var() if len(values) > 1 else torch.zeros(())     # of one value it is NaN
    scaled = (values - mean) * (variance + SMALLEST_VARIANCE).rsqrt()
    return scaled if shift_mean else scaled + mean


def gae(rewards, values, counts: list[int], gamma: float = 1.0, lam: float = 0.95):
    """Generalized advantage estimates of the tokens, (N,) (arXiv:1506.02438, eq. 16).

    A_t = delta_t + gamma lam A_(t+1), with delta_t = r_t + gamma V_(t+1) - V_t; behind the last
    token of an answer both are 0.
    """
    r, v = (pad_sequence(list(x.split(counts)), batch_first=True)
            for x in (rewards, values))                                         # (S, T)
    behind = torch.zeros(len(counts))
    v = torch.cat([v, behind[:, None]], dim=1)
    advantages = torch.zeros_like(r)
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * v[:, t + 1] - v[:, t]
        behind = delta + gamma * lam * behind
        advantages[:, t] = behind
    return torch.cat([row[:count] for row, count in zip(advantages, counts)])


def value_losses(values, old_values, returns, clip: float):
    """(Half the larger squared error, of V or of V clipped to V_old +- clip; where it is clipped).

    Each (N,) (arXiv:2005.12729, "value function clipping", without the half).
    """
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    plain_errors = (values - returns).square()
    clipped_errors = (clipped - returns).square()
    return 0.5 * torch.maximum(plain_errors, clipped_errors), clipped_errors > plain_errors


def next_kl_coef(kl_coef: float, kl: float, target: float, answers: int) -> float:
    """The coefficient after `answers` answers with this KL: the mean of their sums over tokens.

    beta (1 + K e), e = clip(KL / target - 1, -0.2, 0.2) (arXiv:1909.08593, sec. 2.2), with K =
    answers / HORIZON.
    """
    error = min(max(kl / target - 1, -MOST_ERROR), MOST_ERROR)
    return kl_coef * (1 + error * answers / HORIZON)


def merged_moments(mean: float, variance: float, count: float, values) -> tuple:
    """(mean, variance, count) of all values so far and of `values`, (n,).

    The variance is that of the values seen (divided by their count). Chan, Golub and LeVeque 1983.
    """
    values = values.double()
    more = len(values)
    total = count + more
    delta = float(values.mean()) - mean
    spread = variance * count + float(values.var(unbiased=False)) * more
    spread += delta**2 * count * more / total
    return mean + delta * more / total, spread / total, total
