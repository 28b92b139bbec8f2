"""Sizes of a config that do not fit the model's or the run's, each with a sentence.

A block of a rotation that divides no layer, a rank that is larger than a matrix, a layer that does
not exist, an evaluation after the last step: the run would compute something else than the config
says, or nothing where it waits for an evaluation.

Requires: lora.py, runtime/kernels.py, runtime/steps.py.
Next: runtime/setup.py.
"""
import torch

from families import ModelConfig
from lora import AdapterConfig, lora_layers, trainable
from model import CausalLM
from runtime.kernels import new_optimizer
from runtime.steps import StepPlan


def check_start_block(config, model_config: ModelConfig):
    """Raises ValueError for a badam_start_block that the model does not have."""
    by_layer = config.use_badam and config.badam_mode == "layer"
    block, blocks = config.badam_start_block, model_config.num_hidden_layers
    if by_layer and block is not None and block >= blocks:
        raise ValueError(f"{config.source}: badam_start_block: {block} is none of the blocks 0 to "
                         f"{blocks - 1} of {config.model_name_or_path}")


def notes_on_sizes(config, model: CausalLM, adapters: AdapterConfig | None,
                   plan: StepPlan) -> list[str]:
    """Sentences for the start page. model: without storage, with its adapters."""
    notes = notes_on_evaluations(config, plan)
    if config.finetuning_type == "oft":
        notes += notes_on_blocks(model, adapters)
    if config.use_galore or config.use_apollo:
        notes += notes_on_rank(config, model)
    return notes


def notes_on_blocks(model: CausalLM, adapters: AdapterConfig) -> list[str]:
    """Where PEFT, and this program, take other blocks than the config names."""
    changed = {}
    for name, layer in lora_layers(model).items():
        blocks, size = adapters.blocks_of(layer.base_layer.in_features)
        wanted, found = (adapters.r, blocks) if adapters.r else (adapters.oft_block_size, size)
        if wanted != found:
            kinds = changed.setdefault((layer.base_layer.in_features, wanted, found), [])
            kinds.append(name.rpartition(".")[2])
    key = "oft_rank" if adapters.r else "oft_block_size"
    return [f"{key}: {wanted} does not divide the {inputs:,} inputs of "
            f"{', '.join(dict.fromkeys(kinds))}; {found} does, and is taken there, as by PEFT"
            for (inputs, wanted, found), kinds in changed.items()]


def notes_on_rank(config, model: CausalLM) -> list[str]:
    """How many matrices have a side that is shorter than the rank of GaLore or APOLLO."""
    rule = "galore" if config.use_galore else "apollo"
    rank = getattr(config, f"{rule}_rank")
    optimizer = new_optimizer(trainable(model), config, model.config, torch.device("cpu"))
    sides = [min(p.shape) for group in optimizer.param_groups if group["update"] == rule
             for p in group["params"]]
    small = [side for side in sides if side < rank]
    if not small:
        return []
    return [f"{rule}_rank: {rank} is larger than the shorter side, {min(small):,} or more, of "
            f"{len(small)} of {len(sides)} matrices: their gradients are not made smaller, and the "
            "optimizer state needs more memory than AdamW's"]


def notes_on_evaluations(config, plan: StepPlan) -> list[str]:
    """What waits for an evaluation, in a run that ends before the first one."""
    waiting = [words for waits, words in (
        (config.save_strategy == "best", "save_strategy: best saves no checkpoint"),
        (config.load_best_model_at_end, "load_best_model_at_end finds none"),
        (config.early_stopping_steps, "early_stopping_steps never stops it"),
        (config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
         f"lr_scheduler_type: {config.lr_scheduler_type} never changes the learning rate"),
    ) if waits]
    last = plan.total_steps
    if config.eval_strategy == "steps":
        every = plan.in_steps(config.eval_steps)
        evaluated = last // every * every
        if evaluated and evaluated >= config.eval_delay * plan.unit:
            return []
        why = f"eval_steps: {config.eval_steps:g}, eval_delay: {config.eval_delay:g}"
    elif config.eval_strategy == "epoch" and last / plan.steps_per_epoch < config.eval_delay:
        why = f"eval_delay: {config.eval_delay:g}"
    else:
        return []
    return [f"the run ends at step {last:,}, before its first evaluation ({why})"
            + (f": {', '.join(waiting)}" if waiting else "")]
