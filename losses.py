"""Training objectives: sums over a known count, never averages of averages.

The whole optimizer step is counted first (N supervised tokens over all micro-batches); each micro-batch then adds
its loss *sum* / N. The gradient therefore does not depend on how the step was cut into micro-batches.

Read before: model.py. Read after: train.py (the loop).
The gradient of the head is formed in the same pass as its loss, chunk by chunk (as in arXiv:2410.10989), so a
(tokens x vocabulary) tensor never exists.
"""
import torch
import torch.nn.functional as F

IGNORE = -100                   # label of a position that carries no loss
CHUNK_BYTES = 64 * 2**20        # float32 logits held at once


def cross_entropy_plain(hidden, weight, targets):
    """The slow twin of cross_entropy_sum: all logits at once, autograd does the rest."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()                               # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        rows = (targets != IGNORE).nonzero().squeeze(1)                                      # (n,) supervised positions
        h, y = hidden[rows], targets[rows]                                                   # (n, D), (n,)
        W = weight.to(h.dtype)                                                               # (V, D)
        step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            logits = (h[part] @ W.T).float()                                                 # (c, V)
            total += F.cross_entropy(logits, y[part], reduction="sum")
            if dh is None and dW is None:
                continue
            p = logits.softmax(dim=-1)
            p[torch.arange(len(p), device=p.device), y[part]] -= 1                           # d loss / d logits
            p = p.to(h.dtype)
            if dh is not None:
                dh[part] = p @ W
            if dW is not None:
                dW += (p.T @ h[part]).float()
        ctx.save_for_backward(rows, dh, dW)
        ctx.shape = hidden.shape
        return total

    @staticmethod
    def backward(ctx, grad):
        rows, dh, dW = ctx.saved_tensors
        d_hidden = None
        if dh is not None:
            d_hidden = dh.new_zeros(ctx.shape)
            # in float32: grad is one over the step's tokens, and rounding it to 16 bits would rescale every gradient
            d_hidden[rows] = (dh.float() * grad).to(dh.dtype)
        return d_hidden, None if dW is None else dW * grad, None


def cross_entropy_sum(hidden, weight, targets):
    """Sum of the token losses in nats, a float32 scalar.

    hidden: (N, D) final hidden states; weight: (V, D) of the head; targets: (N,) the next token's id, or IGNORE.
    The head is applied to supervised positions only.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()            # evaluation needs no gradient of a trainable head
    return _CrossEntropySum.apply(hidden, weight, targets)
