"""Build what a run trains: the model, its objective and its gradients; the table of stages.

STAGES says for each `stage` how rows become ids, how examples become a batch, and which objective
scores it: the one place where a stage is looked up. `build_model` is an ordered list of steps from
a checkpoint to a model that is ready to train; a file of methods/, fast/ or scale/ enters here.

Requires: model.py, lora.py, losses.py, checkpoint/load.py, runtime/setup.py.
Next: train.py.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from checkpoint.adapters import load_adapter
from checkpoint.files import find_checkpoint
from checkpoint.load import load_model, whole
from config import has_reference
from data import collate_rows, encode_conversations, encode_documents
from families import read_model_config
from fast.compile import compile_steps, compile_unpacking
from fast.fused_block import fuse_blocks
from lora import LoRALinear, attach_lora, lora_layers, merge_adapters, trainable, unfreeze
from losses import Objective, SFTObjective
from methods.fp8 import to_fp8
from methods.lora_variants import row_norms, variant_of
from methods.optimizers import FURTHER
from methods.preference import (JudgedObjective, PairObjective, collate_answers, encode_answers)
from methods.quant import EmbeddingOutside, embedding_may_stay_outside, requested_format
from methods.reward_model import RewardObjective, load_value_head
from model import CausalLM, init_weights
from optim import Optimizer, add_neftune, make_optimizer
from parallel import Gradients, Ranks
from runtime.precision import half_dtype
from runtime.setup import Base, Setup, needs_second_model
from scale.fsdp import ShardedGradients, empty_model, fill, print_shards, shard_model


# ---- stages -------------------------------------------------------------------------------------


def sft_objective(config, base, setup, ranks, resume) -> Objective:
    return SFTObjective(setup.balance, setup.matmul)


def pair_objective(config, base, setup, ranks, resume) -> Objective:
    reference = build_reference(config, base, setup, ranks)
    return PairObjective(config, reference, ranks, setup.matmul)


def judged_objective(config, base, setup, ranks, resume) -> Objective:
    reference = build_reference(config, base, setup, ranks)
    return JudgedObjective(config, reference, ranks, setup.matmul)


def reward_objective(config, base, setup, ranks, resume) -> Objective:
    return RewardObjective(load_value_head(config, base, setup.device, resume))


@dataclass(frozen=True)
class Stage:
    """How a stage learns from rows.

    encode: conversations -> ids and labels (data.encode_conversations).
    collate: groups of examples -> Batch (data.collate_rows).
    build_objective: (config, base, setup, ranks, resume) -> losses.Objective.
    """
    encode: Callable
    collate: Callable
    build_objective: Callable


STAGES = {
    "pt": Stage(encode_documents, collate_rows, sft_objective),
    "sft": Stage(encode_conversations, collate_rows, sft_objective),
    "rm": Stage(encode_answers, collate_answers, reward_objective),
    "dpo": Stage(encode_answers, collate_answers, pair_objective),
    "kto": Stage(encode_answers, collate_answers, judged_objective),
}


def build_objective(config, base: Base, setup: Setup, ranks: Ranks, resume=None) -> Objective:
    """The objective of the config's stage, with its reference model or value head."""
    return STAGES[config.stage].build_objective(config, base, setup, ranks, resume)


# ---- the model ----------------------------------------------------------------------------------


def build_model(config, base: Base, setup: Setup, ranks: Ranks, resume=None) -> CausalLM:
    """The model on its device, what is trained unfrozen, its fast paths set.

    Trained weights are float32. A frozen base has the dtype of bf16 / fp16, or keeps the
    checkpoint's. resume: the checkpoint whose weights to start from, or None.
    """
    start = {"lora": lora_model, "freeze": partly_frozen_model, "full": full_model}
    model = start[config.finetuning_type](config, base, setup, ranks, resume)
    if config.fsdp:
        print_shards(model, ranks)
    keep_embedding_outside(model, setup)
    if config.neftune_noise_alpha:
        add_neftune(model, config.neftune_noise_alpha)
    use_fast_paths(model, setup, setup.memory.workload.recompute)
    if setup.fp8:
        adapted = lora_layers(model).values()
        to_fp8([layer for layer in adapted if isinstance(layer, LoRALinear)], setup.fp8)
    return model.train()


def lora_model(config, base: Base, setup: Setup, ranks: Ranks, resume) -> CausalLM:
    """finetuning_type: lora. A frozen base, and adapters that are trained."""
    half = half_dtype(config)
    if setup.sharded:
        model = empty_model(base.folder, half)
    else:
        model = load_model(base.folder, half, setup.device, form=requested_format(config))
    for adapter in base.merged_adapters(config):
        if setup.sharded:
            raise ValueError(f"fsdp: {adapter} would have to be merged into weights that are "
                             "sharded; merge it first: python merge.py, then take the merged "
                             "model as model_name_or_path")
        load_adapter(model, adapter)
        merge_adapters(model)
    continued = resume or base.continued_adapter(config)
    if continued:
        load_adapter(model, continued, device=setup.device)
        note_unused_settings(config, setup.lora)
    else:
        attach_lora(model, setup.lora, config.seed, stored_name=model.config.stored_name,
                    device=setup.device, **variant_of(setup.lora))
    if setup.sharded:
        shard_model(model, config.fsdp, ranks, setup.device)
        fill(model, base.folder, trained=not continued)     # the adapter's file has the others
        if setup.lora.use_dora and not continued:
            for layer in lora_layers(model).values():
                lengths = row_norms(whole(layer.weight).float())
                layer.lora_magnitude_vector.data.copy_(lengths)
    if has_reference(config):                   # dropout would be a difference from it, too
        for layer in lora_layers(model).values():
            layer.dropout = nn.Identity()
    return model


def note_unused_settings(config, lora):
    """Print the settings that an adapter which is trained further overrules."""
    used = {
        "lora_rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "lora_target": lora.target_modules,
        "additional_target": lora.modules_to_save,
    }
    for key, value in used.items():
        given = config.given.get(key)
        same_list = isinstance(given, list) and set(given) == set(value)
        if given not in (None, value, ["all"]) and not same_list:
            print(f"note: {key} {given} is not used; the adapter has {value} and keeps it")


def full_model(config, base: Base, setup: Setup, ranks: Ranks, resume) -> CausalLM:
    """finetuning_type: full. All weights are trained."""
    folder = resume or base.folder
    if setup.sharded:
        model = empty_model(folder, torch.float32).requires_grad_(True)
        shard_model(model, config.fsdp, ranks, setup.device)
        fill(model, folder)
    elif config.train_from_scratch and not resume:
        model = CausalLM(read_model_config(folder))
        init_weights(model, torch.Generator().manual_seed(config.seed))
        model.to(setup.device)
    else:
        dtype = torch.bfloat16 if config.pure_bf16 else torch.float32
        model = load_model(folder, dtype, setup.device)
    model.requires_grad_(True)
    if config.stage == "rm" and model.lm_head.weight is not model.model.embed_tokens.weight:
        model.lm_head.requires_grad_(False)     # nothing is scored over the vocabulary
    return model


def partly_frozen_model(config, base: Base, setup: Setup, ranks: Ranks, resume) -> CausalLM:
    """finetuning_type: freeze. Some layers are trained in float32, the rest is frozen."""
    model = load_model(resume or base.folder, None, setup.device)
    unfreeze(model, config.freeze_trainable_layers, config.freeze_trainable_modules,
             config.freeze_extra_modules or [], model.config.stored_name)
    frozen_dtype = half_dtype(config) or torch.float32
    for p in model.parameters():
        trained = p.requires_grad and not config.pure_bf16
        p.data = p.data.to(torch.float32 if trained else frozen_dtype)
    return model


def keep_embedding_outside(model: CausalLM, setup: Setup):
    """Keep the embedding beside 4-bit weights in main memory, where GPU memory is short."""
    if embedding_may_stay_outside(model, setup.device, setup.memory.workload.recompute):
        model.model.embed_tokens = EmbeddingOutside(model.model.embed_tokens)
        print("embedding: in main memory; its rows are sent when they are read")


def use_fast_paths(model: CausalLM, setup: Setup, recompute: list[str] | None = None):
    """Set the attention kernel, the fused blocks and the compiled steps that setup has chosen."""
    model.kernel = setup.kernel
    fuse_blocks(model, setup.matmul_name, recompute)
    if setup.compiled:
        compile_steps(model)
        if setup.device.type == "cuda":             # on a CPU it is slower than without
            line = compile_unpacking(model)
            if line:
                print(line)


def build_reference(config, base: Base, setup: Setup, ranks: Ranks) -> CausalLM | None:
    """The second, frozen model of stages dpo and kto; None where the trained one serves."""
    if not needs_second_model(config, setup.lora):
        return None
    folder, adapters = base.folder, base.merged_adapters(config) if setup.lora else []
    quant_format = requested_format(config)
    if config.ref_model:
        folder = find_checkpoint(config.ref_model, cache_dir=config.cache_dir)
        adapters = [find_checkpoint(name, cache_dir=config.cache_dir)
                    for name in config.ref_model_adapters or []]
        quant_format = None
    dtype = half_dtype(config)
    if not dtype and config.pure_bf16:
        dtype = torch.bfloat16
    elif not dtype and not setup.lora:
        dtype = torch.float32
    if setup.sharded and adapters:
        raise ValueError("fsdp: the reference model's adapters would have to be merged into "
                         "weights that are sharded; merge them first: python merge.py, then take "
                         "the merged model as ref_model")
    if setup.sharded:
        reference = empty_model(folder, dtype).requires_grad_(False)
        shard_model(reference, config.fsdp, ranks, setup.device)
        fill(reference, folder)
    else:
        reference = load_model(folder, dtype, setup.device, form=quant_format)
        for adapter in adapters:
            load_adapter(reference, adapter)
            merge_adapters(reference)
    use_fast_paths(reference, setup)
    return reference.requires_grad_(False)


def build_gradients(model, objective: Objective, setup: Setup, ranks: Ranks):
    """The gradients of all trained weights, of the model and of the objective's own."""
    weights = trainable(model) | objective.parameters()
    if setup.sharded and not setup.lora:
        return ShardedGradients(model, weights, ranks)
    # gathering sharded weights must not come between the sends: all ranks need one order
    return Gradients(weights, ranks, overlap=not setup.sharded)


def build_optimizer(config, gradients) -> Optimizer:
    """The optimizer of the trained weights: AdamW, or what the config asks for."""
    return make_optimizer(gradients.parameters, config, gradients.device, **FURTHER)
