"""Losses of a row whose tokens are cut over the processes of an axis (scale/context_parallel.py).

A batch is whole on each process, and the model computes the hidden states of own tokens. What an
objective sums over tokens is summed over the axis, once a pass, so that all processes have the loss
of the whole row, and each the gradient for its own tokens:

    sft, pt     the loss and its metrics        Objective.loss_sum
    dpo, kto    log-probabilities of answers    PreferenceObjective.logps
    rm          states that the head reads      RewardObjective.last_states
    experts     their tokens and probabilities  SFTObjective.balance_of

Requires: scale/context_parallel.py, losses.py.
Next: runtime/build.py.
"""
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch

from losses import balance_of_sums, routing_sums
from scale.collectives import leave, sum_over
from scale.context_parallel import part_bounds
from scale.mesh import Axis


def share_objective(objective, axis: Axis):
    """Have an objective score own tokens, and sum over the axis what it sums over tokens."""
    objective.balance_of = partial(shared_balance, axis)
    for name, shared in (("logps", shared_logps), ("last_states", shared_states),
                         ("loss_sum", shared_loss)):
        if hasattr(objective, name):
            setattr(objective, name, partial(shared, getattr(objective, name), axis))
            break
    for p in objective.parameters().values():       # a head that all processes compute alike
        p.register_hook(lambda grad: grad / axis.size)


def own_targets(batch, axis: Axis):
    """The batch with the targets of own tokens; lengths: how many tokens of each sequence."""
    start, end = part_bounds(len(batch.targets), axis.rank, axis.size)
    ends = list(accumulate(batch.lengths, initial=0))
    lengths = [max(0, min(last, end) - max(first, start)) for first, last in zip(ends, ends[1:])]
    return replace(batch, targets=batch.targets[start:end], lengths=lengths)


def shared_loss(loss_sum, axis: Axis, model, batch):
    """Objective.loss_sum of losses that are sums over tokens."""
    loss, routing_loss, metrics = loss_sum(model, own_targets(batch, axis))
    metrics = {name: sum_over(axis, pair) for name, pair in metrics.items()}
    return leave(loss, axis), routing_loss, metrics


def shared_balance(axis: Axis, model, routers: list):
    """SFTObjective.balance_of; each process has the gradients for its own tokens."""
    if not routers:
        return 0.0
    top_k = model.config.num_experts_per_tok
    sums = [leave(part, axis) for part in routing_sums(routers, top_k)]
    return balance_of_sums(*sums, top_k)


def shared_logps(logps, axis: Axis, model, batch):
    """PreferenceObjective.logps: sequences may lie in several parts."""
    sums, counts = logps(model, own_targets(batch, axis))
    return leave(sums, axis), sum_over(axis, counts)


def shared_states(last_states, axis: Axis, model, batch):
    """RewardObjective.last_states: each process has those of some answers, and zeros for others."""
    hidden = model(batch.input_ids, batch.position_ids, batch.layout)[0]            # (n, D)
    start, _ = part_bounds(batch.layout.total, axis.rank, axis.size)
    last = batch.layout.cu_seqlens[1:].long() - 1 - start
    last = torch.where((last >= 0) & (last < len(hidden)), last, len(hidden))
    return leave(torch.cat((hidden, hidden.new_zeros(1, hidden.shape[1])))[last], axis)
