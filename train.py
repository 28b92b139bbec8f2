"""Fine-tune a language model: LoRA beside frozen weights, or all weights. One run, top to bottom.

    python train.py --config configs/tiny_lora_sft.yaml
    python train.py --config my.yaml learning_rate=2e-4 max_steps=20
    torchrun --nproc-per-node 8 train.py --config my.yaml

config -> data -> plan -> model -> optimizer -> loop -> save. One loop serves all stages: a stage
says how rows become batches and how a batch is scored (STAGES in runtime/build.py). What stands
around the loop, from resuming to reporting, is in runtime/run.py.

Requires: README.md, for the order of the files.
Next: data.py (what a batch is), model.py, lora.py, losses.py, optim.py.
Papers: LoRA arXiv:2106.09685, AdamW arXiv:1711.05101.
"""
import os
from functools import partial

from errors import run_script
from settings.load_config import load_config

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "train"))     # before the slow import of torch
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"                        # one rank draws bars

from runtime.device import pick_device
import torch

from evals.loss import evaluate
from losses import MetricSums
from optim import set_lr
from parallel import start_ranks
from runtime.build import (STAGES, arrange, build_gradients, build_model, build_objective,
                           build_optimizer, build_schedule)
from runtime.precision import Precision, check_first_batch
from runtime.run import Run
from runtime.setup import choose_setup, find_base, load_data
from runtime.steps import StepPlan
from text.load_text import load_text


def main(argv):
    config = load_config(argv, "train")
    device = pick_device(config.use_cpu)
    ranks = arrange(start_ranks(device, config.ddp_timeout), config, device)
    run = Run(config, device, ranks)                # output_dir, and where to resume
    torch.manual_seed(config.seed + ranks.rank)     # of dropout; all else has its own

    # ---- data: conversations -> token ids, labels on what the assistant says
    base = find_base(config, ranks)
    text = load_text(config, base.folder, run.stored_at(base), base.model_config, check=True)
    run.print_start(base, text)
    stage = STAGES[config.stage]                    # how rows are encoded, batched and scored
    train_set, eval_set = load_data(config, base, text, stage, ranks)

    # ---- plan: steps, dtype, kernels and memory, before any weight is loaded
    plan = StepPlan(config, train_set, stage, ranks, device)
    lr_factor = build_schedule(config, plan, run.eval_losses)
    setup = choose_setup(config, base, plan, device, ranks, run)
    print(setup.report(), flush=True)
    if config.dry_run:
        return run.end_dry_run()

    with setup.explain_out_of_memory():
        # ---- model: a frozen base and trained adapters; objective and optimizer
        model = build_model(config, base, setup, ranks, run.resume)
        objective = build_objective(config, base, setup, ranks, run.resume)
        gradients = build_gradients(model, objective, setup, ranks)
        optimizer = build_optimizer(config, base, gradients, run.resume)
        precision = Precision(setup.dtype, device, model, adapters_only=setup.lora is not None)
        run.start(base, plan, setup, model, objective, gradients, optimizer, precision)
        check_first_batch(model, objective, plan.peek(run.state.step), precision)

        score = partial(evaluate, model, eval_set, objective, config, precision, ranks)
        run.eval_on_start(score)

        # ---- the loop
        for step in plan.steps(after=run.state.step):
            if run.early_stop_due():
                break
            lr = set_lr(optimizer, lr_factor(step.number - 1))
            run.begin_step(step)
            loss, grad_norm, metrics = train_step(model, objective, step, gradients, precision,
                                                  config.max_grad_norm)
            plan.prefetch()                         # the next rows, while the device computes
            loss, grad_norm, metrics, stop = ranks.sync(loss, grad_norm, metrics,
                                                        run.stop_requested())
            if run.accept(step, loss, grad_norm, precision):
                optimizer.step()
            run.log_step(step, loss, grad_norm, lr, metrics)
            if run.eval_due(step, eval_set):
                run.log_eval(step, score())
            if run.save_due(step) or stop:
                run.save_checkpoint(step, resumable=bool(stop))
            if stop:
                run.leave(step)

        # ---- the end: the best or the last weights, results
        run.end_loop()
        run.final_eval = score() if eval_set and config.do_eval else None
        run.finish(argv)


def train_step(model, objective, step, gradients, precision, max_grad_norm):
    """Forward and backward of this rank's batches -> (loss, gradient norm, metrics), on the device.

    The loss is a sum over the labels of the whole step, divided by their number over all batches
    and ranks: it does not depend on how the step is split.
    """
    gradients.zero()
    total = torch.zeros((), device=step.device)
    metrics = MetricSums(objective.metric_names, step.device)
    with precision.autocast():
        batches = objective.with_reference(model, step.batches)
    for i, batch in enumerate(batches):
        with precision.autocast():
            loss, batch_metrics = objective(model, batch, step.num_items)
        gradients.backward(precision.scale(loss), batch, last=i == len(batches) - 1)
        total += loss.detach()
        metrics += batch_metrics
        del loss                                    # with its graph, before the next one grows
    gradients.all_reduce()
    precision.unscale(gradients.parameters.values())
    return total, gradients.clip(max_grad_norm), metrics.sums


if __name__ == "__main__":
    run_script(main)
