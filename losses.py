"""Training objectives: sums over a known count, never averages of averages.

The whole optimizer step is counted first (N supervised tokens over all micro-batches); each micro-batch then adds
its loss *sum* / N. The gradient therefore does not depend on how the step was cut into micro-batches.

Read before: model.py. Read after: train.py (the loop).
The gradient of the head is formed in the same pass as its loss, chunk by chunk (as in arXiv:2410.10989), so a
(tokens x vocabulary) tensor never exists. Softcapping of the logits: arXiv:2408.00118, sec. 2. Balance of experts:
arXiv:2101.03961.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from linear import BLOCK, torch_product

IGNORE = -100                   # label of a position that carries no loss
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


def loss_and_exps(logits, y):
    """Sum of -log p(y) over the rows of logits (c, V) float32; and e with its row sums s, so that p = e / s.
    e takes the logits' place."""
    at_y = logits.gather(1, y[:, None])                                                      # (c, 1)
    top = logits.amax(-1, keepdim=True)
    e = logits.sub_(top).exp_()
    s = e.sum(-1, keepdim=True)
    return (s.log() + top - at_y).sum(), e, s


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, product):
        rows = (targets != IGNORE).nonzero().squeeze(1)                                      # (n,) supervised positions
        y = targets[rows]                                                                    # (n,)
        if hidden.is_cuda:              # from memory that may be swapped out, a copy waits for all that was asked before
            rows, y = rows.pin_memory(), y.pin_memory()
        rows, y = (t.to(hidden.device, non_blocking=True) for t in (rows, y))
        h, W = hidden[rows], weight.to(hidden.dtype)                                         # (n, D), (V, D)
        step = chunk_rows(len(rows), len(weight))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            logits = product(h[part], W).float()                                             # (c, V)
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                logits = softcap * bent
            loss, e, s = loss_and_exps(logits, y[part])
            total += loss
            if dh is None and dW is None:
                continue
            p = e.div_(s)
            p.scatter_add_(1, y[part, None], p.new_full((len(p), 1), -1.0))                  # d loss / d logits
            if softcap is not None:
                p *= 1 - bent.square()                                                       # d logits before the cap
            p = p.to(h.dtype)
            if dh is not None:
                dh[part] = product(p, W.T)
            if dW is not None:
                dW += (p.T @ h[part]).float()
            del logits, e, p                                    # before there is room for the next chunk's
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
    in float32. product: see linear.py. The head is applied to supervised positions only.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()            # evaluation needs no gradient of a trainable head
    return _CrossEntropySum.apply(hidden, weight, targets, softcap, product)


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
