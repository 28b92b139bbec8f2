"""Training objectives: sums over a known count, never averages of averages.

The whole optimizer step is counted first (N supervised tokens over all micro-batches); each micro-batch then adds
its loss *sum* / N. The gradient therefore does not depend on how the step was cut into micro-batches.

What compares answers (methods/preference.py) needs the log-probability of each sequence; answer_logps gives them.

Read before: model.py. Read after: methods/preference.py, train.py (the loop).
The gradient of the head is formed in the same pass as its loss, chunk by chunk (as in arXiv:2410.10989), so a
(tokens x vocabulary) tensor never exists. Softcapping of the logits: arXiv:2408.00118, sec. 2. Balance of experts:
arXiv:2101.03961.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from attention import to_device
from data import IGNORE
from fast.matmul import BLOCK, torch_product
from parallel import Ranks

CHUNK_BYTES = 64 * 2**20        # float32 logits held at once, or,
MOST_CHUNKS = 16                # where that would be more chunks than this, more: each chunk reads the whole head


def cross_entropy_plain(hidden, weight, targets, softcap=None):
    """The slow twin of cross_entropy_sum: all logits at once, autograd does the rest."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()                               # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets.to(hidden.device), ignore_index=IGNORE, reduction="sum")


def chunk_rows(supervised: int, vocabulary: int) -> int:
    """Positions whose logits are held at once."""
    rows = max(1, CHUNK_BYTES // (4 * vocabulary), -(-supervised // MOST_CHUNKS))
    return rows // BLOCK * BLOCK or rows                        # else a product would end in a small block


def chunks(supervised: int, vocabulary: int) -> list[slice]:
    """The positions in parts of chunk_rows each."""
    step = chunk_rows(supervised, vocabulary)
    return [slice(start, start + step) for start in range(0, supervised, step)]


def losses_and_exps(logits, y):
    """-log p(y) of each row of logits (c, V) float32, as (c, 1); and e with its row sums s, so that p = e / s.
    e takes the logits' place."""
    at_y = logits.gather(1, y[:, None])                                                      # (c, 1)
    top = logits.amax(-1, keepdim=True)
    e = logits.sub_(top).exp_()
    s = e.sum(-1, keepdim=True)
    return s.log() + top - at_y, e, s


def scores(h, W, softcap, product):
    """Logits of some positions, (c, V) float32, and tanh of them before the cap, None where there is none."""
    logits = product(h, W).float()                                                           # (c, V)
    if softcap is None:
        return logits, None
    bent = torch.tanh(logits / softcap)
    return softcap * bent, bent


def d_scores(e, s, bent, y):
    """The gradient of -log p(y) with respect to the logits before the cap, (c, V) float32, in the place of e."""
    p = e.div_(s)
    p.scatter_add_(1, y[:, None], p.new_full((len(p), 1), -1.0))
    if bent is not None:
        p *= 1 - bent.square()
    return p


def supervised(targets, device):
    """Where a target counts, (n,), and what it is, (n,), on the device. targets: on the CPU, see cross_entropy_sum."""
    rows = (targets != IGNORE).nonzero().squeeze(1)
    return to_device(rows, device), to_device(targets[rows], device)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, product):
        rows, y = supervised(targets, hidden.device)                                         # (n,)
        h, W = hidden[rows], weight.to(hidden.dtype)                                         # (n, D), (V, D)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in chunks(len(rows), len(W)):
            logits, bent = scores(h[part], W, softcap, product)                              # (c, V)
            losses, e, s = losses_and_exps(logits, y[part])
            total += losses.sum()
            if dh is None and dW is None:
                continue
            p = d_scores(e, s, bent, y[part]).to(h.dtype)
            if dh is not None:
                dh[part] = product(p, W.T)
            if dW is not None:
                dW += (p.T @ h[part]).float()
            del logits, bent, e, p                              # before there is room for the next chunk's
        ctx.save_for_backward(rows, dh, dW)
        ctx.shape = hidden.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, dh, dW = ctx.saved_tensors
        d_hidden = None
        if dh is not None:
            d_hidden = dh.new_zeros(ctx.shape)
            # in float32: grad is one over the step's tokens, and rounding it to 16 bits would rescale every gradient
            d_hidden[rows] = (dh.float() * grad).to(dh.dtype)
        return d_hidden, None if dW is None else dW * grad, None, None, None


def cross_entropy_sum(hidden, weight, targets, softcap=None, product=torch_product):
    """Sum of the token losses in nats, a float32 scalar.

    hidden: (N, D) final hidden states; weight: (V, D) of the head; targets: (N,) the next token's id, or IGNORE; on the
    CPU, so that nobody waits for a GPU to know which positions count. softcap c: the logits become c * tanh(logits / c),
    in float32. product: see fast/fused_block.py. The head is applied to supervised positions only.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()            # evaluation needs no gradient of a trainable head
    return _CrossEntropySum.apply(hidden, weight, targets, softcap, product)


# ---- log-probabilities of sequences ----------------------------------------------------------------------------


def answer_logps_plain(hidden, weight, targets, lengths, softcap=None):
    """The slow twin of answer_logps: all logits at once, autograd does the rest."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()                               # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counts = (targets != IGNORE).to(hidden.device)
    found = logits.log_softmax(-1).gather(1, targets.to(hidden.device).clamp(min=0)[:, None])[:, 0] * counts
    return torch.stack([part.sum() for part in found.split(lengths)]), torch.stack(
        [part.sum() for part in counts.split(lengths)]).float()


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rows, y, softcap, product):
        h, W = hidden[rows], weight.to(hidden.dtype)                                         # (n, D), (V, D)
        losses = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
        # a head that learns sums over tokens, so how much each counts must be known: then all waits for backward
        at_once = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        dh = torch.empty_like(h) if at_once else None
        for part in chunks(len(rows), len(W)):
            logits, bent = scores(h[part], W, softcap, product)
            found, e, s = losses_and_exps(logits, y[part])
            losses[part] = found[:, 0]
            if at_once:
                dh[part] = product(d_scores(e, s, bent, y[part]).to(h.dtype), W.T)
            del logits, bent, e                                 # before there is room for the next chunk's
        ctx.save_for_backward(rows, dh, *(() if at_once else (h, weight, y)))
        ctx.shape, ctx.softcap, ctx.product = hidden.shape, softcap, product
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):                                                                 # (n,) float32
        rows, dh, *more = ctx.saved_tensors
        dW = None
        if dh is None:
            dh, dW = d_token_losses(grad, *more, ctx.softcap, ctx.product)
        else:
            dh = (dh.float() * grad[:, None]).to(dh.dtype)
        d_hidden = dh.new_zeros(ctx.shape)
        d_hidden[rows] = dh
        return d_hidden, dW, None, None, None, None


def d_token_losses(grad, h, weight, y, softcap, product):
    """Gradients of (grad * token losses).sum() with respect to h (n, D) and the head's weight (V, D); scores come anew."""
    dh, dW, W = torch.empty_like(h), torch.zeros_like(weight, dtype=torch.float32), weight.to(h.dtype)
    for part in chunks(len(h), len(W)):
        logits, bent = scores(h[part], W, softcap, product)
        _, e, s = losses_and_exps(logits, y[part])
        p = d_scores(e, s, bent, y[part])
        dh[part] = (product(p.to(h.dtype), W.T).float() * grad[part, None]).to(h.dtype)
        dW += ((p * grad[part, None]).to(h.dtype).T @ h[part]).float()
        del logits, bent, e, p
    return dh, dW.to(weight.dtype)


def answer_logps(hidden, weight, targets, lengths, softcap=None, product=torch_product):
    """Of each sequence the log-probability of its targets, in nats, and how many they are: two (S,) float32 tensors.

    lengths: tokens of the S sequences that lie end to end in the row; the rest as in cross_entropy_sum.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()
    rows, y = supervised(targets, hidden.device)
    losses = _TokenLosses.apply(hidden, weight, rows, y, softcap, product)                   # (n,)
    counts = [int((part != IGNORE).sum()) for part in targets.split(lengths)]
    # sums of slices: index_add would add in another order each time on a GPU
    logps = torch.stack([-part.sum() for part in losses.split(counts)])
    return logps, to_device(torch.tensor(counts, dtype=torch.float32), hidden.device)


def balance_loss(routers, num_experts_per_tok: int):
    """E times the sum over experts of (share of tokens sent to it) x (mean probability of it): k when all serve alike.

    routers: the router logits (N, E) of each layer with experts; the shares are counted over all of them together
    (arXiv:2101.03961, eq. 4 to 6; the form that LLaMA-Factory's models use for moe_aux_loss_coef).
    """
    scores = torch.cat(routers)                                                              # (layers * N, E)
    probability = scores.softmax(-1)
    chosen = probability.topk(num_experts_per_tok).indices.flatten()
    share = chosen.bincount(minlength=scores.shape[1]).float() / len(scores)                 # (E,) sums to k
    return scores.shape[1] * (share * probability.float().mean(0)).sum()


def ask_nothing(model, batches: list, ranks: Ranks) -> list:
    """For an objective that needs to know nothing beforehand."""
    return [None] * len(batches)


@dataclass(frozen=True)
class Objective:
    """How a stage learns from a batch.

    score(model, batch, told) -> (loss, routing, seen): the sum of the rows' losses, to be divided by the step's n_items;
    what is added undivided; and {name: tensor (2,), a sum and how many it is the sum of}, to be logged.
    ask(model, batches, ranks) -> for each batch what is `told` of it, found without gradients before the first score.
    shows: the names in `seen`.
    """
    score: object
    ask: object = ask_nothing
    shows: tuple = ()

    def nothing_seen(self, device) -> dict:
        return {name: torch.zeros(2, device=device) for name in self.shows}


def together(values, weights):
    """A sum and how many it is the sum of, (2,)."""
    return torch.stack(((values * weights).sum(), weights.sum()))


def logged(seen: dict) -> dict:
    """{name: value} for the log, from {name: (sum, count)}: means; but kl is a sum over micro-batches, and for judged answers
    the margin is the difference of two means, as in LLaMA-Factory. What was not seen at all is left out."""
    found = {name: total if name == "kl" else total / count for name, (total, count) in seen.items() if count}
    if "rewards/margins" not in found and {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
