"""The loss of a model on held-out rows.

Requires: losses.py, data.py.
Next: eval.py.
"""
import math
import time

import torch
from tqdm import tqdm

from attention import Layout
from checkpoint.adapters import load_with_adapters
from config import has_reference
from data import collate, on_device
from evals.predictions import Side
from fast.attention_picker import pick_kernel
from fast.matmul import PRODUCTS, torch_product
from losses import Objective, balance_loss, cross_entropy_sum, logged
from methods.preference import VALUE_HEAD, ValueHead, objective_of
from methods.quant import form_asked
from model import attention_needs
from parallel import Ranks
from runtime.build import COLLATE, batch_loss
from runtime.report import eval_metrics
from runtime.steps import micro_batches


@torch.no_grad()
def evaluate(config, model, examples, device, autocast, objective: Objective, ranks: Ranks) -> dict:
    """eval_loss as LLaMA-Factory counts it (mean over batches of each batch's mean, all batches alike), what the objective
    has to show, and in stages sft and pt the loss over all tokens alike under its own name, and its perplexity. The ranks
    share the batches; each counts once."""
    model.eval()
    start, size = time.time(), config.per_device_eval_batch_size
    means, total, count, empty, seen = [], 0.0, 0, 0, objective.nothing_seen(device)
    batches, sharded = math.ceil(len(examples) / size), hasattr(model, "reshard")
    # weights that are cut are gathered by all ranks: one that has a batch less than others keeps them company
    rounded = math.ceil(batches / ranks.world) * ranks.world if sharded else batches
    for number in tqdm(range(ranks.rank, rounded, ranks.world), desc="evaluating", leave=False,
                       disable=bool(config.disable_tqdm) or None):
        first = size * min(number, batches - 1)
        batch = on_device(COLLATE[config.stage]([examples[first:first + size]]), device)
        items = batch.n_items if batch.groups else int((batch.targets != -100).sum())
        if items == 0 and not sharded:
            empty += 1
            continue
        with autocast:
            told, = objective.ask(model, [batch], Ranks())
            loss, routing, shown = batch_loss(model, batch, device, objective, told)
        if items == 0 or number >= batches:
            empty += number < batches
            continue
        means.append(float(loss) / items + float(routing))
        total, count = total + float(loss), count + items
        seen = {name: pair + shown[name] for name, pair in seen.items()}
    model.train()
    if sharded:                                     # what the last forward pass has gathered
        model.reshard()
    mean, batches, total, count, empty = ranks.total(math.fsum(means), len(means), total, count, empty)
    if empty:
        tqdm.write(f"evaluation: {empty:.0f} batches without a supervised token were left out")
    metrics = eval_metrics(mean, batches, total, count, len(examples), time.time() - start)
    if objective.shows:                             # the loss is of answers, not of tokens
        del metrics["eval_token_loss"], metrics["eval_perplexity"]
    shown = {name: ranks.total(*pair.tolist()) for name, pair in seen.items()}
    return metrics | {f"eval_{name}": value for name, value in logged(shown).items()}


@torch.no_grad()
def measure_loss(config, model, examples, device) -> tuple[dict, list]:
    """(eval_loss and its companions as training counts them, the mean loss of each example's tokens)."""
    start, means_of_batches, total, count, losses, empty = time.time(), [], 0.0, 0, [], 0
    balance = config.moe_aux_loss_coef or model.config.router_aux_loss_coef
    product = PRODUCTS.get(model.product, torch_product)
    for numbers in tqdm(micro_batches(list(range(len(examples))), config.per_device_eval_batch_size), desc="loss",
                        leave=False, disable=bool(config.disable_tqdm) or None):
        rows = [examples[number] for number in numbers]
        batch, routers = on_device(collate(rows), device), [] if balance else None
        hidden = model(batch.input_ids, batch.position_ids, batch.layout, routers=routers)[0]            # (N, D)
        sizes = [len(row.input_ids) for row in rows]
        sums = [float(cross_entropy_sum(h, model.head_weight(), targets, model.config.final_softcap, product))
                for h, targets in zip(hidden.split(sizes), batch.targets.split(sizes))]
        learnt = [int((targets != -100).sum()) for targets in batch.targets.split(sizes)]
        losses += [value / n if n else math.nan for value, n in zip(sums, learnt)]
        if not sum(learnt):
            empty += 1
            continue
        routing = float(balance * balance_loss(routers, model.config.num_experts_per_tok)) if routers else 0.0
        means_of_batches.append(sum(sums) / sum(learnt) + routing)
        total, count = total + math.fsum(sums), count + sum(learnt)
    if empty:
        print(f"  evaluation: {empty} batches without a supervised token were left out")
    return eval_metrics(math.fsum(means_of_batches), len(means_of_batches), total, count, len(examples),
                        time.time() - start), losses


@torch.no_grad()
def measure_objective(config, side: Side, model, examples, device) -> dict:
    """Stages dpo, kto and rm: eval_loss, rewards and accuracies as training counts them."""
    reference, head, start = None, None, time.time()
    if side.reference and has_reference(config):
        form = None if config.ref_model else form_asked(config)
        reference = load_with_adapters(*side.reference, model.model.embed_tokens.weight.dtype, device, form=form)
    if config.stage == "rm":
        head, folder = ValueHead(model.config.hidden_size, 0.0, config.seed), (side.adapters or [side.base])[-1]
        if not head.read(folder):
            raise ValueError(f"{folder} holds no {VALUE_HEAD}: it is no reward model")
        head.to(device)
    objective, means_of_batches = objective_of(config, reference, head), []
    seen = objective.nothing_seen(device)
    for numbers in tqdm(micro_batches(list(range(len(examples))), config.per_device_eval_batch_size), desc="loss",
                        leave=False, disable=bool(config.disable_tqdm) or None):
        batch = on_device(COLLATE[config.stage]([[examples[number] for number in numbers]]), device)
        told, = objective.ask(model, [batch], Ranks())
        loss, _, shown = objective.score(model, batch, told)
        means_of_batches.append(float(loss) / batch.n_items)
        seen = {name: pair + shown[name] for name, pair in seen.items()}
    metrics = eval_metrics(math.fsum(means_of_batches), len(means_of_batches), 0.0, 1, len(examples),
                           time.time() - start)
    found = logged({name: pair.tolist() for name, pair in seen.items()})
    return {name: value for name, value in metrics.items() if name not in ("eval_token_loss", "eval_perplexity")} | {
        f"eval_{name}": value for name, value in found.items()}


@torch.no_grad()
def mean_loss(model, rows, device) -> float:
    """Mean loss per supervised token, in nats."""
    device = torch.device(device)
    dtype = model.model.embed_tokens.weight.dtype
    choice = pick_kernel("auto", device=device, dtype=dtype, training=False,
                         **attention_needs(model.config))
    model.kernel = choice.kernel
    total = 0.0
    tokens = 0
    for row in rows:
        batch = collate([row])
        hidden = model(batch.input_ids.to(device), batch.position_ids.to(device),
                       Layout(batch.lengths, device))                                   # (1, T, D)
        total += float(cross_entropy_sum(hidden[0], model.head_weight(), batch.targets,
                                         model.config.final_softcap))
        tokens += batch.n_items
    return total / max(tokens, 1)
