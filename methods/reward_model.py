"""Reward models (stage rm): a value head that scores a text, trained on pairs of answers.

The head is a linear map of the last token's hidden state to one number. It is saved beside the
adapter under TRL's names (checkpoint/value_head.py).

Requires: losses.py, methods/preference.py (the batches).
Next: runtime/build.py (STAGES).
Papers: reward models arXiv:2203.02155 (eq. 1); Bradley and Terry 1952.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from losses import Objective, weighted_sum


class ValueHead(nn.Module):
    """Score a text by the hidden state (..., D) of its last token -> (...,).

    dropout: of the hidden state in training; TRL's is 0.1 where config.json has no
    summary_dropout_prob.
    """

    def __init__(self, hidden_size: int, dropout: float, seed: int):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.dropout = dropout
        bound = 1 / math.sqrt(hidden_size)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data.uniform_(-bound, bound, generator=generator)

    def forward(self, hidden, training: bool = False):
        hidden = F.dropout(hidden, self.dropout, training).float()
        # a sum of products, not F.linear, which autocast would compute in 16 bits
        return (hidden * self.summary.weight[0]).sum(-1) + self.summary.bias

    def weights(self) -> dict[str, nn.Parameter]:
        """{TRL's name: parameter}."""
        return {f"v_head.{name}": p for name, p in self.named_parameters()}


class RewardObjective(Objective):
    """-log sigmoid(score of chosen - score of rejected)."""

    metric_names = ("accuracy",)

    def __init__(self, head: ValueHead):
        super().__init__()
        self.head = head

    def parameters(self) -> dict:
        return self.head.weights()

    def loss_sum(self, model, batch):
        hidden = model(batch.input_ids, batch.position_ids, batch.layout)[0]            # (N, D)
        last = batch.layout.cu_seqlens[1:].long() - 1               # last token of each answer
        # one call each: the gradients of the bias, which no comparison sees, then cancel exactly
        chosen, rejected = (self.head(hidden[rows], model.training)
                            for rows in last.split(len(batch.row_weights)))             # (n,)
        losses = -F.logsigmoid(chosen - rejected)
        counted = (batch.row_weights > 0).float()
        metrics = {"accuracy": weighted_sum((chosen > rejected).float(), counted)}
        return (losses * batch.row_weights).sum(), 0.0, metrics
