"""Reward models: a value head that scores a text, trained on pairs of answers (stage rm).

The head is a linear map of the last token's hidden state to one number. It is saved beside the
adapter under TRL's names (checkpoint/value_head.py). Stages ppo and grpo learn from the scores of
such a model: an adapter on their own base (RewardAdapter), or a second model (SecondRewardModel).

Requires: losses.py, methods/preference.py (the batches).
Next: runtime/build.py (STAGES), runtime/reward_sources.py.
Papers: reward models arXiv:2203.02155 (eq. 1); Bradley and Terry 1952.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import IGNORE, Example, collate
from lora import lora_layers
from losses import Objective, weighted_sum

TOKENS_AT_ONCE = 8192       # of texts that are scored in one pass


class ValueHead(nn.Module):
    """Score a text by the hidden state (..., D) of its last token -> (...,).

    dropout: of the hidden state in training; TRL's is 0.1 where config.json has no
    summary_dropout_prob. logit_scale: a factor that the decoder's head expects in the hidden state
    and that a value head does not.
    """

    def __init__(self, hidden_size: int, dropout: float, seed: int, logit_scale: float = 1.0):
        super().__init__()
        self.logit_scale = logit_scale
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.dropout = dropout
        bound = 1 / math.sqrt(hidden_size)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data.uniform_(-bound, bound, generator=generator)

    def forward(self, hidden, training: bool = False):
        hidden = F.dropout(hidden, self.dropout, training).float() / self.logit_scale
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

    def last_states(self, model, batch):
        """The final hidden state of the last token of each answer, (2n, D)."""
        hidden = model(batch.input_ids, batch.position_ids, batch.layout)[0]            # (N, D)
        return hidden[batch.layout.cu_seqlens[1:].long() - 1]

    def loss_sum(self, model, batch):
        hidden = self.last_states(model, batch)
        # one call each: the gradients of the bias, which no comparison sees, then cancel exactly
        chosen, rejected = (self.head(answers, model.training)
                            for answers in hidden.split(len(batch.row_weights)))        # (n,)
        losses = -F.logsigmoid(chosen - rejected)
        counted = (batch.row_weights > 0).float()
        metrics = {"accuracy": weighted_sum((chosen > rejected).float(), counted)}
        return (losses * batch.row_weights).sum(), 0.0, metrics


# ---- scores for stages ppo and grpo -------------------------------------------------------------


class SecondRewardModel:
    """A reward model with weights of its own."""

    def __init__(self, model, head: ValueHead):
        self.model = model
        self.head = head

    def scores(self, model, sequences: list[list[int]]) -> tuple[list[float], str]:
        """(the score of each text, NaN where it is not finite; what went wrong, or "")."""
        found = last_token_scores(self.model, self.head, sequences)
        bad = sum(not math.isfinite(score) for score in found)
        problem = f"{bad} of {len(found)} scores are not finite" if bad else ""
        return [score if math.isfinite(score) else math.nan for score in found], problem


class RewardAdapter(SecondRewardModel):
    """A reward model that is an adapter on the base of the model that is trained.

    layers: {name: the adapted layer}, whose base_layer is set to the model's own when it scores.
    """

    def __init__(self, layers: dict[str, nn.Module], head: ValueHead):
        super().__init__(None, head)
        self.layers = layers

    def scores(self, model, sequences: list[list[int]]) -> tuple[list[float], str]:
        """As SecondRewardModel.scores, by the base of `model` with this adapter."""
        with other_adapters(model, self.layers):
            self.model = model
            return super().scores(model, sequences)


@contextmanager
def other_adapters(model, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Within the block these adapted layers take the places of the model's own.

    Layers that have an adapter in the model alone are there without it.
    """
    before = lora_layers(model)
    plain = {name: layer.base_layer for name, layer in before.items()}
    for name, layer in layers.items():
        plain.setdefault(name, model.get_submodule(name))
        layer.base_layer = plain[name]
    set_modules(model, plain | layers)
    try:
        yield
    finally:
        set_modules(model, plain | before)


def set_modules(model, modules: dict[str, nn.Module]):
    """Put modules into a model under their full names."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def last_token_scores(model, head: ValueHead, sequences: list[list[int]]) -> list[float]:
    """The head's score of each text, read at its last token."""
    was_training = model.training
    model.eval()
    scores = []
    for some in in_passes(sequences):
        examples = [Example(np.array(ids, np.int32), np.full(len(ids), IGNORE), [len(ids)])
                    for ids in some]
        batch = collate(examples).to(head.summary.weight.device)
        hidden = model(batch.input_ids, batch.position_ids, batch.layout)[0]            # (N, D)
        last = batch.layout.cu_seqlens[1:].long() - 1
        scores += head(hidden[last]).tolist()
    model.train(was_training)
    return scores


def in_passes(sequences: list[list[int]]) -> Iterator[list[list[int]]]:
    """The texts in order, in groups of at most TOKENS_AT_ONCE tokens (a longer one alone)."""
    group = []
    for ids in sequences:
        if group and sum(map(len, group)) + len(ids) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group
