"""Losses of distillation: how far the student's distribution of the next token is from the
teacher's, at each position that carries loss.

With p the student's probabilities, t the teacher's and m = beta t + (1 - beta) p their mixture:

    beta 0      KL(t || p), forward: the student covers all that the teacher does
    beta 1      KL(p || t), reverse: the student does nothing that the teacher does not
    between     beta KL(t || m) + (1 - beta) KL(p || m), the generalized Jensen-Shannon divergence

A temperature divides the logits of both. The heads are applied chunk by chunk and the gradient is
formed in the same pass, as in losses.py: (tokens x vocabulary) never exists, of neither model.

Requires: losses.py (the chunks, the plain twins).
Next: methods/distill.py.
Papers: GKD arXiv:2306.13649 (eq. 1 and algorithm 1), distillation at a temperature
arXiv:1503.02531 (sec. 2; its factor T^2 is left out, as in GKD).
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from losses import capped, chunks, logits_of, supervised


class Distance(NamedTuple):
    """Which divergence is taken, and at which temperature."""
    beta: float = 0.5
    temperature: float = 1.0


class Head(NamedTuple):
    """What makes logits of a model's hidden states (N, D)."""
    hidden: torch.Tensor
    weight: torch.Tensor            # (V, D)
    softcap: float | None = None    # see losses.capped


# ---- formulas: log-probabilities (n, V) of student and teacher -> divergences (n,) ---------------


def divergences(student_logps, teacher_logps, beta: float):
    """The generalized JSD of each position in nats (arXiv:2306.13649, eq. 1); see the top."""
    return divergences_and_grad(student_logps, teacher_logps, beta, needs_grad=False)[0]


def divergences_and_grad(student_logps, teacher_logps, beta: float, needs_grad: bool = True):
    """-> (divergences (n,), their gradient for the student's logits, (n, V), or None).

    Both are exactly 0 where the distributions are equal.
    """
    p, t = student_logps.exp(), teacher_logps.exp()
    log_ratio = teacher_logps - student_logps                                   # log t / p
    if beta == 0:
        losses = (t * log_ratio).sum(-1)
        return losses, p.sub_(t) if needs_grad else None
    if beta == 1:
        losses = -(p * log_ratio).sum(-1)
        return losses, p.mul_(-losses[:, None] - log_ratio) if needs_grad else None
    mixed = log_mixture(log_ratio, beta)                                        # log m / p
    reverse = -(p * mixed).sum(-1)                                              # KL(p || m)
    forward = (t * (log_ratio - mixed)).sum(-1)                                 # KL(t || m)
    losses = beta * forward + (1 - beta) * reverse
    if not needs_grad:
        return losses, None
    # dm / dp = 1 - beta, so that of the derivative for p only (1 - beta) log p / m is left
    return losses, p.mul_(mixed.add_(reverse[:, None])).mul_(beta - 1)


def log_mixture(log_ratio, beta: float):
    """log(m / p) = log(1 - beta + beta t / p) from log(t / p); it overflows nowhere."""
    shrinking = torch.expm1(-log_ratio.abs())                                   # -1 ... 0
    share = (log_ratio > 0).to(log_ratio.dtype).mul_(1 - 2 * beta).add_(beta)
    return torch.log1p(share * shrinking) + log_ratio.clamp(min=0)


# ---- over the supervised positions of a batch ----------------------------------------------------


def distill_sums_plain(student: Head, teacher: Head, targets, distance: Distance):
    """The plain twin of distill_sums: all logits at once, by torch's own KL and gradients."""
    rows, y = supervised(targets, student.hidden.device)
    V = min(len(student.weight), len(teacher.weight))
    logits = []
    for head in (student, teacher):
        scores = F.linear(head.hidden[rows], head.weight[:V].to(head.hidden.dtype))
        logits.append(capped(scores.float(), head.softcap))                     # (n, V)
    log_p, log_t = ((one / distance.temperature).log_softmax(-1) for one in logits)
    log_m = torch.log((1 - distance.beta) * log_p.exp() + distance.beta * log_t.exp())
    kl = {(a, b): F.kl_div(q, p, reduction="sum", log_target=True)
          for a, p in (("p", log_p), ("t", log_t))
          for b, q in (("p", log_p), ("t", log_t), ("m", log_m))}
    total = {0: kl["t", "p"], 1: kl["p", "t"]}.get(
        distance.beta, distance.beta * kl["t", "m"] + (1 - distance.beta) * kl["p", "m"])
    entropies = [F.cross_entropy(one.detach(), y, reduction="sum") for one in logits]
    return total, torch.stack(entropies)


@record_function("loss")
def distill_sums(student: Head, teacher: Head, targets, distance: Distance, matmul=F.linear):
    """-> (sum of the divergences in nats, float32; (2,) cross-entropies of student and teacher).

    The cross-entropies are sums over the targets at temperature 1, without a gradient. targets:
    (N,), the next token's id or IGNORE. Of heads of different sizes the rows that both have are
    compared.
    """
    weight = student.weight if torch.is_grad_enabled() else student.weight.detach()
    return _DistillSums.apply(student.hidden, weight, student.softcap, teacher, targets, distance,
                              matmul)


class _DistillSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, softcap, teacher, targets, distance, matmul):
        rows, y = supervised(targets, hidden.device)                                    # (n,)
        V = min(len(weight), len(teacher.weight))
        h, W = hidden[rows], weight[:V].to(hidden.dtype)                                # (n, D)
        teacher_h = teacher.hidden[rows]
        teacher_W = teacher.weight[:V].to(teacher_h.dtype)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        needs_grad = dh is not None or dW is not None
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        for chunk in chunks(len(rows), V):
            teacher_logits, _ = logits_of(matmul(teacher_h[chunk], teacher_W), teacher.softcap)
            found, d_scores = chunk_sums(matmul(h[chunk], W), softcap, teacher_logits, y[chunk],
                                         distance, needs_grad)
            sums += found
            if needs_grad:
                d_scores = d_scores.to(h.dtype)                                         # (c, V)
            if dh is not None:
                dh[chunk] = matmul(d_scores, W.T)
            if dW is not None:
                dW[:V] += (d_scores.T @ h[chunk]).float()
            del teacher_logits, d_scores                # make room for the next chunk's
        ctx.save_for_backward(rows, dh, dW)
        ctx.shape = hidden.shape
        entropies = sums[1:].clone()
        ctx.mark_non_differentiable(entropies)
        return sums[0].clone(), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        rows, dh, dW = ctx.saved_tensors
        d_hidden = None
        if dh is not None:
            d_hidden = dh.new_zeros(ctx.shape)
            d_hidden[rows] = (dh.float() * grad).to(dh.dtype)   # in float32, as in losses.py
        d_weight = None if dW is None else dW * grad
        return d_hidden, d_weight, None, None, None, None, None


def chunk_sums(scores, softcap, teacher_logits, y, distance: Distance, needs_grad: bool):
    """-> ((3,): sums of divergences and both cross-entropies, gradient for scores (c, V) or None).

    scores: (c, V), of the student's head, before the softcap.
    """
    logits, tanh = logits_of(scores, softcap)
    entropies = [(one.logsumexp(-1) - one.gather(1, y[:, None])[:, 0]).sum()
                 for one in (logits, teacher_logits)]
    losses, grad = divergences_and_grad(
        (logits / distance.temperature).log_softmax(-1),
        (teacher_logits / distance.temperature).log_softmax(-1), distance.beta, needs_grad)
    if needs_grad:
        grad = grad.div_(distance.temperature)
        if tanh is not None:
            grad *= 1 - tanh.square()
    return torch.stack((losses.sum(), *entropies)), grad
