"""Losses of a policy that learns from rewards: pure functions of log-probabilities.

A prompt has a group of G answers, and each answer a reward. What counts is how much better an
answer is than its group (its advantage): the tokens of better answers become more likely, those of
worse ones less. The ratio of a token's probability now to the one it was sampled with keeps
several steps on the same answers from going too far.

    grpo      each answer counts alike, however long          ratio of each token
    dr_grpo   each token 1 / max_new_tokens of an answer      ratio of each token
    bnpo      each token of a micro-batch alike               ratio of each token
    dapo      each token of the step alike                    ratio of each token
    gspo      each answer alike                               ratio of the whole answer
    cispo     each token of the step alike                    a capped weight, not a clipped ratio

Answers lie end to end: N tokens in all, `counts` of each of the S answers; nothing is padded.

Requires: losses.py (why sums over a known count).
Next: methods/grpo.py.
Papers: GRPO arXiv:2402.03300, Dr. GRPO arXiv:2503.20783, DAPO arXiv:2503.14476, GSPO
arXiv:2507.18071, CISPO arXiv:2506.13585; bnpo is the name of that mean in TRL. The estimate of KL:
Schulman 2020, joschu.net/blog/kl-approx.html.
"""
import torch

STD_FLOOR = 1e-4            # beside the spread of a group, which may be 0; TRL's
BY_ANSWER = ("grpo", "gspo")
BY_TOKEN = ("dapo", "cispo")


def group_advantages(rewards, scale: bool = True):
    """Rewards (P, G) minus the mean of each group, divided by its spread (arXiv:2402.03300, 4.1.2).

    scale: divide; without it the form of Dr. GRPO (arXiv:2503.20783, sec. 3.2). NaN is a reward
    that is not known: it counts in no mean, and its advantage is 0.
    """
    known = rewards.isfinite()
    count = known.sum(1, keepdim=True)
    values = torch.where(known, rewards, 0)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    advantages = torch.where(known, rewards - mean, 0)                                  # (P, G)
    if not scale:
        return advantages
    variance = advantages.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return advantages / (variance.sqrt() + STD_FLOOR)


def log_ratios(kind: str, logps, old_logps, counts: list[int]):
    """log(pi / pi_old) of each token, (N,); for gspo the mean over its answer.

    That mean is the length-normalized ratio of the sequence (arXiv:2507.18071, eq. 7).
    """
    ratios = logps - old_logps
    if kind != "gspo":
        return ratios
    return torch.cat([answer.mean().expand(len(answer)) for answer in ratios.split(counts)])


def clipped_losses(ratios, advantages, low: float, high: float):
    """-min(r A, clip(r, 1 - low, 1 + high) A), (N,) (arXiv:2503.14476, eq. 8)."""
    clipped = ratios.clamp(1 - low, 1 + high)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def cispo_losses(logps, ratios, advantages, high: float):
    """-min(r, 1 + high) A log pi, the first factor without gradient (arXiv:2506.13585, eq. 4, 5).

    No token is left without a gradient; the lower bound is not used there either.
    """
    return -ratios.detach().clamp(max=1 + high) * advantages * logps


def kl_estimates(logps, ref_logps):
    """pi_ref / pi - log(pi_ref / pi) - 1, at least 0: an estimate of KL(pi || pi_ref), (N,).

    arXiv:2402.03300, eq. 4; Schulman's k3.
    """
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1


def policy_losses(kind: str, logps, old_logps, advantages, counts: list[int], low: float,
                  high: float):
    """-> (the losses of the tokens, their ratios pi / pi_old), each (N,).

    advantages: (N,), the one of its answer for each token.
    """
    ratios = log_ratios(kind, logps, old_logps, counts).exp()
    if kind == "cispo":
        return cispo_losses(logps, ratios, advantages, high), ratios
    return clipped_losses(ratios, advantages, low, high), ratios


def clipped_share(ratios, advantages, low: float, high: float):
    """1.0 for each token whose ratio has left the range in the direction of its advantage, (N,)."""
    too_low = (ratios < 1 - low) & (advantages < 0)
    too_high = (ratios > 1 + high) & (advantages > 0)
    return (too_low | too_high).float()


def token_weights(kind: str, counts, trained, *, answers: float, tokens: float,
                  micro_batches: float, max_new_tokens: int):
    """The share of each token in the step's loss, (N,): the losses times these are summed.

    counts, trained: (S,) tokens of each answer of a micro-batch, and whether it is trained on
    (float). answers, tokens (that are trained on), micro_batches: of the whole step, on all ranks.
    """
    if kind in BY_ANSWER:
        shares = 1 / (counts * answers)                 # arXiv:2402.03300, eq. 3
    elif kind == "dr_grpo":
        shares = torch.full_like(trained, 1 / (answers * max_new_tokens))
    elif kind in BY_TOKEN:
        shares = torch.full_like(trained, 1 / max(tokens, 1))       # arXiv:2503.14476, eq. 8
    else:                                               # bnpo
        ours = (counts * trained).sum().clamp(min=1)
        shares = torch.ones_like(trained) / (ours * micro_batches)
    return (shares * trained).repeat_interleave(counts)
