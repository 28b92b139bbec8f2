"""The loss of a model on held-out examples: one loop for train.py, eval.py and merge.py.

    metrics = evaluate(model, eval_set, objective, config, precision, ranks)
    metrics, losses = evaluate_examples(config, model, examples, device)    example by example

`sum_losses` is the loop. It is given a function that scores a batch: `score_batch` for any
objective, `score_examples` for token losses, summed for each example.

Requires: losses.py, data.py.
Next: eval.py.
"""
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import IGNORE, collate
from evals.accuracy import final_hidden, row_accuracy
from losses import Objective, balance_loss, cross_entropy_sum, metric_means
from parallel import Ranks
from runtime.build import STAGES
from runtime.precision import Precision
from runtime.report import eval_metrics


@dataclass
class BatchLoss:
    """Loss of one batch. sums: of the batch, or of each of its examples (counts: their tokens)."""
    sums: list[float] = field(default_factory=list)
    items: float = 0                    # supervised tokens, or the count of preference stages
    routing: float = 0.0                # balance loss of the experts, added undivided
    metrics: dict = field(default_factory=dict)         # {name: tensor (2,), a sum and its count}
    counts: list[int] = field(default_factory=list)


@dataclass
class EvalSums:
    """Sums over the batches of one rank."""
    batch_means: list[float] = field(default_factory=list)
    total: float = 0.0                  # sum of all losses
    items: float = 0
    empty: int = 0                      # batches without a supervised token
    metrics: dict = field(default_factory=dict)
    example_losses: list[float] = field(default_factory=list)   # means; nan without a token

    def add(self, batch: BatchLoss):
        for value, count in zip(batch.sums, batch.counts):
            self.example_losses.append(value / count if count else math.nan)
        if batch.items == 0:
            self.empty += 1
            return
        self.batch_means.append(sum(batch.sums) / batch.items + batch.routing)
        self.total += math.fsum(batch.sums)
        self.items += batch.items
        for name, pair in batch.metrics.items():
            self.metrics[name] = self.metrics[name] + pair if name in self.metrics else pair


# ---- the loop ---------------------------------------------------------------------------------


@torch.no_grad()
def sum_losses(model, examples, score: Callable, size: int, ranks: Ranks = Ranks(),
               disable_tqdm: bool | None = None) -> EvalSums:
    """Score all examples in batches of `size`, which the ranks share.

    score(model, examples) -> BatchLoss.
    """
    was_training = model.training
    model.eval()
    sums = EvalSums()
    batches = math.ceil(len(examples) / size)
    passes = batches
    if runs_together(model):
        passes = math.ceil(batches / ranks.world) * ranks.world
    for number in tqdm(range(ranks.rank, passes, ranks.world), desc="evaluating", leave=False,
                       disable=disable_tqdm):
        first = size * min(number, batches - 1)
        loss = score(model, examples[first:first + size])
        if number < batches:
            sums.add(loss)
    model.train(was_training)
    if hasattr(model, "reshard"):       # free the weights that the last forward pass has gathered
        model.reshard()
    return sums


def runs_together(model) -> bool:
    """Whether a pass needs all ranks, who then run equally many: scale/ has split the weights."""
    return getattr(model, "runs_together", False)


def score_batch(model, examples: list, *, objective: Objective, stage: str,
                precision: Precision, compute_accuracy: bool = False) -> BatchLoss:
    """Loss of a batch by the objective of a stage, as in training."""
    batch = STAGES[stage].collate([examples]).to(precision.device)
    items = batch.num_items if batch.batch_sizes else int((batch.targets != IGNORE).sum())
    if items == 0 and not runs_together(model):
        return BatchLoss()
    watched = final_hidden(model) if compute_accuracy else nullcontext()
    with precision.autocast(), watched as hidden:
        batch, = objective.with_reference(model, [batch])
        items = batch.num_items if batch.batch_sizes else items     # answers with a reward
        loss, routing, metrics = objective.loss_sum(model, batch)
        if compute_accuracy:
            metrics["accuracy"] = row_accuracy(hidden[-1], model, batch, objective.matmul)
    return BatchLoss(sums=[float(loss)], items=items, routing=float(routing), metrics=metrics)


def score_examples(model, examples: list, *, balance: float, device,
                   matmul: Callable = F.linear) -> BatchLoss:
    """Token losses of stages sft and pt, with the sum of each example.

    balance: coefficient of the experts' balance loss.
    """
    batch = collate(examples).to(device)
    routers = [] if balance else None
    hidden = model(batch.input_ids, batch.position_ids, batch.layout, routers=routers)[0]   # (N, D)
    sizes = [len(example.input_ids) for example in examples]
    sums, counts = [], []
    for rows, targets in zip(hidden.split(sizes), batch.targets.split(sizes)):
        loss = cross_entropy_sum(rows, model.head_weight(), targets, model.config.final_softcap,
                                 matmul)
        sums.append(float(loss))
        counts.append(int((targets != IGNORE).sum()))
    routing = 0.0
    if routers and sum(counts):
        routing = float(balance * balance_loss(routers, model.config.num_experts_per_tok))
    return BatchLoss(sums=sums, items=sum(counts), routing=routing, counts=counts)


# ---- in training, example by example, or the mean alone ---------------------------------------


def evaluate(model, examples, objective: Objective, config, precision: Precision,
             ranks: Ranks = Ranks()) -> dict:
    """Metrics of an evaluation in training, over all ranks.

    examples: of one dataset, or {name: examples} with eval_on_each_dataset, whose metrics are
    eval_NAME_loss and so on. eval_loss is LLaMA-Factory's: the mean over batches of each batch's
    mean. Stages sft and pt add the mean over all tokens and its perplexity, the other stages the
    metrics of their objective.
    """
    if isinstance(examples, dict):
        metrics = {}
        for name, rows in examples.items():
            for key, value in evaluate(model, rows, objective, config, precision, ranks).items():
                metrics[f"eval_{name}_{key.removeprefix('eval_')}"] = value
        return metrics
    start_time = time.monotonic()
    score = partial(score_batch, objective=objective, stage=config.stage, precision=precision,
                    compute_accuracy=config.compute_accuracy)
    sums = sum_losses(model, examples, score, config.per_device_eval_batch_size, ranks,
                      bool(config.disable_tqdm) or None)
    metrics = reduce_metrics(sums, len(examples), start_time, ranks)
    names = objective.metric_names
    if names:                                           # the loss is per answer, not per token
        del metrics["eval_token_loss"], metrics["eval_perplexity"]
    if config.compute_accuracy:
        names = (*names, "accuracy")
    totals = {}
    for name in names:
        pair = sums.metrics.get(name, torch.zeros(2))   # a rank without a batch has none
        totals[name] = ranks.total_scores(*pair.tolist())
    for name, value in metric_means(totals).items():
        metrics[f"eval_{name}"] = value
    return metrics


def evaluate_examples(config, model, examples, device,
                      matmul: Callable = F.linear) -> tuple[dict, list[float]]:
    """(the same metrics for stages sft and pt, mean loss of each example; nan without a token)."""
    start_time = time.monotonic()
    balance = config.moe_aux_loss_coef or model.config.router_aux_loss_coef
    score = partial(score_examples, balance=balance, device=device, matmul=matmul)
    sums = sum_losses(model, examples, score, config.per_device_eval_batch_size,
                      disable_tqdm=bool(config.disable_tqdm) or None)
    metrics = reduce_metrics(sums, len(examples), start_time, Ranks())
    return metrics, sums.example_losses


def reduce_metrics(sums: EvalSums, examples: int, start_time: float, ranks: Ranks) -> dict:
    """Metrics of the sums of all ranks; reports batches that were left out."""
    mean, batches, total, items, empty = ranks.total_scores(
        math.fsum(sums.batch_means), len(sums.batch_means), sums.total, sums.items, sums.empty)
    if empty:
        tqdm.write(f"evaluation: {empty:.0f} batches without a supervised token were left out")
    return eval_metrics(mean, batches, total, items, examples, time.monotonic() - start_time)
