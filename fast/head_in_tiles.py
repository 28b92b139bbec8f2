"""The head's loss on a CPU, in tiles of the vocabulary: attention over it.

    score_j     x · W_j, of token j of the vocabulary; p = softmax of the scores
    loss        log of the sum over j of exp(score_j), minus the score of the target
    dloss / dx  the sum over j of p_j W_j, minus W_target

The sum of the gradient is what attention computes, with x as the query and the rows W_j of the head
both as keys and as values. So it can be done as flash attention does it: one tile of scores at a
time, with a running maximum, and sums that are rescaled when the maximum grows. A tile stays in the
processor's cache from the product that makes it to the product that uses it up, and the head is
read once for 1,024 positions. The plain twin, losses_in_chunks of losses.py, holds the scores of
whole rows.

The sums leave out the target, which is added at the end: a token that the model predicts well has a
gradient near 0, which must not become the difference of two large numbers, in 16 bits above all.

For stages pt and sft. The log-probabilities of preference stages are computed in chunks, which
round as transformers does: small differences of large sums are compared there.

Requires: losses.py (logits_of).
Next: runtime/kernels.py.
Papers: running maximum arXiv:1805.02867, flash attention arXiv:2205.14135, the head in tiles
arXiv:2411.09009.
"""
# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch
import torch.nn.functional as F

from losses import logits_of

TILE_NUMBERS = 2**19        # of a tile of scores: 2 MiB, which the caches of two cores hold
MOST_ROWS = 1024            # positions at once
LEAST_WIDTH = 512           # token ids of a tile: narrower products are slow
MOST_WIDTH = 2**14          # of a tile: float16 holds the sum of as many rows of a head
LOWEST = torch.finfo(torch.float32).min


def losses_in_tiles(h, W, y, softcap=None, matmul=F.linear, needs_grad: bool = True):
    """-log p(y) of each row of h, (n,) float32, and its gradient for h, (n, D), or None.

    h: (n, D); W: (V, D), of the head; y: (n,), the targets; the rest as in losses.py.
    """
    losses = torch.empty(len(h), dtype=torch.float32, device=h.device)
    dh = torch.empty_like(h) if needs_grad else None
    for start in range(0, len(h), MOST_ROWS):
        rows = slice(start, start + MOST_ROWS)
        losses[rows], gradient = rows_in_tiles(h[rows], W, y[rows], softcap, matmul, needs_grad)
        if needs_grad:
            dh[rows] = gradient
    return losses, dh


def rows_in_tiles(h, W, y, softcap, matmul, needs_grad):
    """The same for at most MOST_ROWS rows; the gradient in float32."""
    top = torch.full((len(h), 1), LOWEST, device=h.device)          # the largest score so far
    others = torch.zeros_like(top)          # the sum of exp(score - top) of all but the target
    mixed = h.new_zeros(h.shape, dtype=torch.float32)               # the same sum, times W_j
    at_y = torch.empty_like(top)                                    # the target's score
    width = tile_width(len(h))
    for start in range(0, len(W), width):
        tile = W[start:start + width]
        scores, tanh = logits_of(matmul(h, tile), softcap)          # (n, width)
        here = ((y >= start) & (y < start + width)).nonzero().squeeze(1)
        target = (here, y[here] - start)
        at_y[here, 0] = scores[target]
        before, top = top, torch.maximum(top, scores.amax(1, keepdim=True))
        e = scores.sub_(top).exp_()
        e[target] = 0
        shrink = (before - top).exp_()
        others = e.sum(1, keepdim=True).addcmul_(others, shrink)
        if needs_grad:
            if tanh is not None:
                e *= 1 - tanh.square()
            product = matmul(e.to(h.dtype), tile.T).float()         # (n, D)
            mixed = product.addcmul_(mixed, shrink)
    losses = F.softplus(others.log() + top - at_y)[:, 0]            # log(1 + others / exp(at_y))
    if not needs_grad:
        return losses, None
    bend = 1 if softcap is None else 1 - (at_y / softcap).square()
    total = others + (at_y - top).exp()
    mixed.addcmul_(W[y].float(), others * bend, value=-1)   # of the target p - 1, -others / total
    return losses, mixed.div_(total)


def tile_bytes(rows: int, head_shape: tuple, compute: int, softcap: float | None) -> int:
    """Bytes that losses_in_tiles holds at once, its input and its result with them.

    head_shape: (V, D); compute: bytes of a number of h.
    """
    vocab_size, hidden_size = head_shape
    all_rows, rows = rows, min(rows, MOST_ROWS)
    numbers = rows * min(vocab_size, tile_width(rows))
    copies = 4 if softcap else 1                    # in float32: the scores, their tanh, …
    copied = compute if compute < 4 else 0          # the scores, in the dtype of the products
    sums = 2 * 4 * rows * hidden_size
    return numbers * (4 * copies + copied) + sums + 2 * all_rows * hidden_size * compute


def tile_width(rows: int) -> int:
    """Token ids of a tile of that many rows."""
    width = TILE_NUMBERS // max(rows, 1) // LEAST_WIDTH * LEAST_WIDTH
    return min(max(LEAST_WIDTH, width), MOST_WIDTH)
