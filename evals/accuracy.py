"""compute_accuracy: the share of labels that the model finds the most likely token.

    with final_hidden(model) as kept:
        objective.loss_sum(model, batch)
    row_accuracy(kept[-1], model, batch)        # (2,): the sum over the rows, and their number

Requires: losses.py, data.py.
Next: evals/loss.py.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from data import IGNORE
from losses import chunks, head_logits, supervised


@contextmanager
def final_hidden(model) -> Iterator[list]:
    """The list of the final hidden states, (N, D), of each call of the model within the block."""
    kept = []
    hook = model.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    try:
        yield kept
    finally:
        hook.remove()


@torch.no_grad()
def row_accuracy(hidden, model, batch, matmul=F.linear) -> torch.Tensor:
    """(2,) float32: the sum over the rows of each one's accuracy, and the number of rows.

    The accuracy of a row is the share of its labels that are the most likely token, as in
    LLaMA-Factory; a row without a label is not counted. hidden: (N, D), of the rows of the batch.
    """
    rows, y = supervised(batch.targets, hidden.device)                                  # (n,)
    weight = model.head_weight().to(hidden.dtype)
    right = torch.empty(len(rows), device=hidden.device)
    for chunk in chunks(len(rows), len(weight)):
        logits, _ = head_logits(hidden[rows[chunk]], weight, model.config.final_softcap, matmul)
        right[chunk] = (logits.argmax(-1) == y[chunk]).float()
    counts = [int((row != IGNORE).sum()) for row in batch.targets.split(batch.lengths)]
    accuracies = [row.mean() for row in right.split(counts) if len(row)]
    return torch.tensor([float(sum(accuracies)), len(accuracies)])
