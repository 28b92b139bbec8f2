"""Build what a run trains: the model, its objective and its gradients; the table of stages.

STAGES says for each `stage` how rows become ids, how examples become a batch, and which objective
scores it: the one place where a stage is looked up. A file of methods/ or scale/ that is imported
here can be deleted together with its import and its row of STAGES; the others are imported where a
setting asks for them, and those of fast/ enter in runtime/kernels.py.

Requires: model.py, lora.py, losses.py, checkpoint/load.py, runtime/setup.py.
Next: train.py.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from checkpoint.adapters import load_adapter, variant_of
from checkpoint.load import empty_model, fill_model, load_model
from checkpoint.read_config import read_config_json, read_model_config
from checkpoint.shards import full_tensor, materialize, own_part
from checkpoint.training_state import STATE_FOLDER, optimizer_names, read_trainer_state
from checkpoint.value_head import VALUE_HEAD, read_value_head
from data import collate_rows, encode_conversations, encode_documents
from lora import AdapterConfig, attach_lora, lora_layers, merge_adapters, trainable
from losses import Objective, SFTObjective
from methods import freeze
from methods import preference
from methods import prompts
from methods import reward_model
from methods import sft_losses
from model import CausalLM, init_weights
from optim import Optimizer, add_neftune, lr_schedule
from parallel import Gradients, Ranks
from runtime.kernels import new_optimizer, use_fp8, use_kernels, use_long_rows
from runtime.offload import EmbeddingOutside, embedding_may_stay_outside
from runtime.precision import half_dtype, requested_format
from runtime.rope_scaling import scale_rope
from runtime.second_model import second_model
from runtime.setup import Base, Setup
from scale import fsdp
from scale import shard_gradients
from scale import zero
from text.load_text import load_text

SPLITTING = ("fsdp, tensor_parallel_size, pipeline_parallel_size, "
             "expert_parallel_size")                    # keys, for messages


def arrange(ranks: Ranks, config, device: torch.device) -> Ranks:
    """The ranks of data parallelism: each is one process, or several that share a model.

    ranks: as torchrun started them. See scale/mesh.py.
    """
    sizes = (config.tensor_parallel_size, config.pipeline_parallel_size,
             config.context_parallel_size, config.expert_parallel_size)
    if max(sizes) == 1:
        return ranks
    from scale.mesh import lay_out                          # only where it is asked for

    return lay_out(ranks, config, device)


# ---- stages -------------------------------------------------------------------------------------


def sft_objective(config, base, setup, ranks, resume) -> Objective:
    matmul = setup.kernels.matmul
    if config.use_dft_loss:
        return sft_losses.DFTObjective(setup.balance, matmul)
    if config.use_eaft_loss:
        return sft_losses.EAFTObjective(config.eaft_alpha, setup.balance, matmul)
    if config.use_asft_loss:
        reference = build_reference(config, base, setup, ranks)
        return sft_losses.ASFTObjective(config, reference, ranks, setup.balance, matmul)
    if config.label_smoothing_factor:
        return sft_losses.SmoothedObjective(config, setup.balance, matmul)
    return SFTObjective(setup.balance, matmul, setup.frozen_head)


def pair_objective(config, base, setup, ranks, resume) -> Objective:
    reference = build_reference(config, base, setup, ranks)
    return preference.PairObjective(config, reference, ranks, setup.kernels.matmul)


def judged_objective(config, base, setup, ranks, resume) -> Objective:
    reference = build_reference(config, base, setup, ranks)
    return preference.JudgedObjective(config, reference, ranks, setup.kernels.matmul)


def reward_objective(config, base, setup, ranks, resume) -> Objective:
    return reward_model.RewardObjective(value_head(config, base, setup, resume))


def value_head(config, base, setup, resume):
    """The value head of the checkpoint, else of the last adapter or the base, else a new one."""
    dropout = read_config_json(base.folder).get("summary_dropout_prob", 0.1)    # 0.1: TRL's
    head = reward_model.ValueHead(base.model_config.hidden_size, dropout, config.seed,
                                  base.model_config.logit_scale)
    folder = resume or (base.adapters[-1] if base.adapters else base.folder)
    found = read_value_head(folder, head.weights())
    if resume and not found:
        raise FileNotFoundError(f"{resume} has no {VALUE_HEAD}, and cannot be resumed in stage: "
                                f"{config.stage}")
    return head.to(setup.device)


def group_objective(config, base, setup, ranks, resume) -> Objective:
    from methods.grpo import GRPOObjective              # only where it is asked for

    return GRPOObjective(*rollout_parts(config, base, setup, ranks, resume))


def ppo_objective(config, base, setup, ranks, resume) -> Objective:
    from methods.ppo import PPOObjective                # only where it is asked for

    return PPOObjective(*rollout_parts(config, base, setup, ranks, resume),
                        head=value_head(config, base, setup, resume))


def sampler(config, base, resume) -> tuple:
    """(text/load_text.py's Text, fast.batch_decode.decode_rows), to sample answers in training."""
    from fast.batch_decode import decode_rows, one_at_a_time    # only where they are asked for

    with torch.device("meta"):
        model = CausalLM(base.model_config)
    if why := one_at_a_time(model):
        raise ValueError(f"stage: {config.stage} samples many answers at once, and with this model "
                         f"it cannot: {why}")
    text = load_text(config, base.folder, [resume] if resume else base.adapters,
                     base.model_config, overrides=True)
    return text, decode_rows


def rollout_parts(config, base, setup, ranks, resume) -> tuple:
    """The arguments of methods.rollouts.RolloutObjective."""
    from methods.rewards import Rewards
    from runtime.reward_sources import build_reward_model       # only where they are asked for

    text, decode_rows = sampler(config, base, resume)
    judge = build_reward_model(config, base, setup, text.tokenizer)
    rewards = Rewards(config.reward or [], config.reward_weights, config.reward_timeout,
                      more=["reward_model"] if judge else [])
    reference = build_reference(config, base, setup, ranks)
    return (config, text, decode_rows, rewards, judge, ranks, setup.dtype, reference,
            setup.kernels.matmul)


def teacher_objective(config, base, setup, ranks, resume) -> Objective:
    from methods.distill import DistillObjective        # only where it is asked for

    text, decode_rows = sampler(config, base, resume) if config.samples_replies else (None, None)
    teacher = build_reference(config, base, setup, ranks)
    return DistillObjective(config, text, decode_rows, teacher, ranks, setup.dtype,
                            setup.kernels.matmul)


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
    "rm": Stage(preference.encode_answers, preference.collate_answers, reward_objective),
    "dpo": Stage(preference.encode_answers, preference.collate_answers, pair_objective),
    "kto": Stage(preference.encode_answers, preference.collate_answers, judged_objective),
    "ppo": Stage(prompts.encode_prompts, prompts.collate_prompts, ppo_objective),
    "grpo": Stage(prompts.encode_prompts, prompts.collate_prompts, group_objective),
    "distill": Stage(prompts.encode_answered, prompts.collate_answered, teacher_objective),
}


def build_objective(config, base: Base, setup: Setup, ranks: Ranks, resume=None) -> Objective:
    """The objective of the config's stage, with its reference model or value head."""
    objective = STAGES[config.stage].build_objective(config, base, setup, ranks, resume)
    if setup.cuts_vocabulary:
        from scale.cut_vocabulary import vocabulary_loss    # only where it is asked for

        objective.chunk_loss = partial(vocabulary_loss, ranks.axes["tensor"])
    elif setup.kernels.compile:
        objective.chunk_loss = setup.kernels.compile_loss()
    if "context" in ranks.axes:
        from scale.cut_losses import share_objective        # only where it is asked for

        share_objective(objective, ranks.axes["context"])
    if not setup.stages:
        return objective
    from scale.pipeline_parallel import StageObjective, balance_of_stages   # where it is asked for

    objective.balance_of = balance_of_stages
    return objective if ranks.scores else StageObjective(objective, config)


# ---- the model ----------------------------------------------------------------------------------


def build_model(config, base: Base, setup: Setup, ranks: Ranks, resume=None) -> CausalLM:
    """The model on its device, what is trained unfrozen, its fast paths set.

    Trained weights are float32. A frozen base has the dtype of bf16 / fp16, or keeps the
    checkpoint's. resume: the checkpoint whose weights to start from, or None.
    """
    start = {"lora": adapted_model, "oft": adapted_model, "freeze": partly_frozen_model,
             "full": full_model}
    model = start[config.finetuning_type](config, base, setup, ranks, resume)
    if config.fsdp:
        fsdp.print_shards(model, gradient_ranks(ranks))
    keep_embedding_outside(model, setup)
    if config.neftune_noise_alpha:
        add_neftune(model, config.neftune_noise_alpha)
    use_kernels(model, setup.kernels, levels_of_all_blocks(setup, ranks))
    compute_together(model, ranks)
    use_long_rows(model, setup.kernels, setup.memory.workload)
    on_gpu = setup.device.type == "cuda" and setup.free_bytes is not None
    use_fp8(model, setup.kernels, room=setup.memory.room(setup.free_bytes) if on_gpu else 0)
    share_rows(model, ranks, noise=bool(config.neftune_noise_alpha))
    return model.train()


def levels_of_all_blocks(setup: Setup, ranks: Ranks) -> list[str]:
    """The level of activation checkpointing of every block; "none" for those of other stages."""
    levels = setup.memory.workload.recompute
    if not setup.stages:
        return levels
    own = setup.stages[ranks.axes["pipeline"].rank]
    others = ["none"] * (setup.stages[-1].stop - own.stop)
    return ["none"] * own.start + levels + others


def share_rows(model: CausalLM, ranks: Ranks, noise: bool = False):
    """Have the processes of context_parallel_size compute a part of each row. See cut_rows."""
    if "context" in ranks.axes:
        from scale.context_parallel import cut_rows         # only where it is asked for

        cut_rows(model, ranks.axes["context"], noise)


def adapted_model(config, base: Base, setup: Setup, ranks: Ranks, resume) -> CausalLM:
    """finetuning_type: lora or oft. A frozen base, and adapters that are trained."""
    half = half_dtype(config)
    split = is_split(setup, ranks)          # each process reads its part
    if split:
        model = empty_model(base.folder, half)
    else:
        model = load_model(base.folder, half, setup.device,
                           quant_format=requested_format(config))
    for adapter in base.merged_adapters(config):
        if split:
            raise ValueError(f"adapter_name_or_path: {adapter} would have to be merged into "
                             f"weights that are split over processes ({SPLITTING}); merge it "
                             "first: python merge.py, then take the merged model as "
                             "model_name_or_path")
        load_adapter(model, adapter)
        merge_adapters(model)
    continued = resume or base.continued_adapter(config)
    if continued:
        load_adapter(model, continued, device=setup.device)
        note_unused_settings(config, setup.lora)
    else:
        attach_lora(model, setup.lora, config.seed, stored_name=model.config.stored_name,
                    device=setup.device, **variant_of(setup.lora))
    if config.has_reference:                   # dropout would be a difference from it, too
        for layer in lora_layers(model).values():
            if hasattr(layer, "dropout"):
                layer.dropout = nn.Identity()
    if split:
        split_model(model, config, setup, ranks)
        fill_model(model, base.folder, trained=not continued)    # the adapter's file has the others
        if setup.lora.use_dora and not continued:
            for layer in lora_layers(model).values():
                rows = own_part(full_tensor(layer.weight), layer.lora_magnitude_vector)
                layer.set_magnitude(rows)
    return model


def note_unused_settings(config, adapter: AdapterConfig):
    """Print the settings that an adapter which is trained further overrules."""
    for key, value in adapter.settings().items():
        given = config.given.get(key)
        same_list = isinstance(given, list) and set(given) == set(value)
        if given not in (None, value, ["all"]) and not same_list:
            print(f"note: {key} {given} is not used; the adapter has {value} and keeps it")


def full_model(config, base: Base, setup: Setup, ranks: Ranks, resume) -> CausalLM:
    """finetuning_type: full. All weights are trained."""
    folder = resume or base.folder
    dtype = torch.bfloat16 if config.pure_bf16 else torch.float32
    if is_split(setup, ranks):
        model = empty_model(folder, dtype).requires_grad_(True)
        split_model(model, config, setup, ranks)
        fill_model(model, folder)
    elif config.train_from_scratch and not resume:
        model = CausalLM(read_model_config(folder))
        init_weights(model, torch.Generator().manual_seed(config.seed))
        model.to(setup.device)
    else:
        model = load_model(folder, dtype, setup.device)
    model.requires_grad_(True)
    if config.stage == "rm" and model.lm_head.weight is not model.model.embed_tokens.weight:
        model.lm_head.requires_grad_(False)     # nothing is scored over the vocabulary
    return model


def is_split(setup: Setup, ranks: Ranks) -> bool:
    """Whether no process holds the whole model."""
    return setup.sharded or bool(ranks.axes.keys() - {"context"})


def split_model(model: CausalLM, config, setup: Setup, ranks: Ranks):
    """Give this process its part of a model on the meta device, uninitialized.

    By rows of every weight (fsdp), by experts, or by the columns and rows of tensor_parallel_size
    and the layers of pipeline_parallel_size.
    """
    if setup.sharded:
        fsdp.shard_model(model, config.fsdp, gradient_ranks(ranks), setup.device)
        return
    if "expert" in ranks.axes:
        from scale.expert_parallel import cut_experts       # only where it is asked for

        cut_experts(model, ranks.axes["expert"])
    if "tensor" in ranks.axes:
        from scale.tensor_parallel import cut_model         # only where it is asked for

        cut_model(model, ranks.axes["tensor"], setup.cuts_vocabulary)
    if setup.stages:
        from scale.pipeline_parallel import keep_stage      # only where it is asked for

        stream = setup.dtype if setup.lora else model.model.embed_tokens.weight.dtype
        keep_stage(model, ranks.axes["pipeline"], setup.stages, stream, setup.device,
                   neftune=bool(config.neftune_noise_alpha))
    materialize(model, setup.device)


def compute_together(model: CausalLM, ranks: Ranks):
    """Let the processes that share a model with its kernels compute it together."""
    if "expert" in ranks.axes:
        from scale.expert_parallel import exchange_tokens   # only where it is asked for

        exchange_tokens(model, ranks.axes["expert"])


def partly_frozen_model(config, base: Base, setup: Setup, ranks: Ranks, resume) -> CausalLM:
    """finetuning_type: freeze. Some layers are trained in float32, the rest is frozen."""
    model = load_model(resume or base.folder, None, setup.device)
    freeze.unfreeze_as_configured(model, config)
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


def build_reference(config, base: Base, setup: Setup, ranks: Ranks) -> CausalLM | None:
    """The second, frozen model: a teacher, or the reference where the trained one cannot serve."""
    second = second_model(config, base, setup.lora)
    if second is None:
        return None
    if second.key == "ref_model":
        scale_rope(config.rope_scaling, config.cutoff_len, second.folder)
    dtype = half_dtype(config)
    if not dtype and config.pure_bf16:
        dtype = torch.bfloat16
    elif not dtype and not setup.lora:
        dtype = torch.float32
    split = is_split(setup, ranks)
    if split and second.adapters:
        raise ValueError("the adapters of a second model would have to be merged into weights that "
                         f"are split over processes ({SPLITTING}); merge them first: "
                         "python merge.py, then take the merged model as "
                         f"{second.key or 'ref_model'}")
    if split:
        reference = empty_model(second.folder, dtype).requires_grad_(False)
        split_model(reference, config, setup, ranks)
        fill_model(reference, second.folder)
    else:
        reference = load_model(second.folder, dtype, setup.device,
                               quant_format=second.quant_format)
        for number, adapter in enumerate(second.adapters, 1):
            load_adapter(reference, adapter, dropout=0.0)
            # beside weights in 4 or 8 bits the last one stays what it is: merging would round it
            merge_adapters(reference, quantized=number < len(second.adapters))
    use_kernels(reference, setup.kernels)
    compute_together(reference, ranks)
    share_rows(reference, ranks)
    return reference.requires_grad_(False)


def build_gradients(model, objective: Objective, setup: Setup, ranks: Ranks):
    """The gradients of all trained weights, of the model and of the objective's own."""
    weights = trainable(model) | objective.parameters()
    if "expert" in ranks.axes:
        from scale.expert_gradients import ExpertGradients  # only where it is asked for

        return ExpertGradients(model, weights, ranks)
    if setup.stages:
        from scale.stage_gradients import StageGradients    # only where it is asked for

        return StageGradients(weights, ranks, model.stage)
    shared_rows = "context" in ranks.axes
    ranks = gradient_ranks(ranks)
    if "tensor" in ranks.axes:
        from scale.cut_gradients import PartGradients       # only where it is asked for

        return PartGradients(weights, ranks)
    if setup.sharded and not setup.lora:
        return shard_gradients.ShardedGradients(model, weights, ranks)
    if setup.config.zero_stage and ranks.world > 1:
        return zero.ZeroGradients(weights, ranks, setup.config.zero_stage)
    if setup.config.zero_stage:
        print("note: zero_stage changes nothing with one rank; torchrun starts several")
    # gathering sharded weights, or exchanging heads, must not come between the sends: all ranks
    # need one order
    return Gradients(weights, ranks, overlap=not (setup.sharded or shared_rows))


def gradient_ranks(ranks: Ranks) -> Ranks:
    """The ranks over which gradients are summed, and weights sharded: those with other tokens."""
    if "context" not in ranks.axes:
        return ranks
    from scale.mesh import ranks_of_parts                   # only where it is asked for

    return ranks_of_parts(ranks)


def build_optimizer(config, base: Base, gradients, resume=None) -> Optimizer:
    """The optimizer of the trained weights: AdamW, or what the config asks for.

    Its state is where zero_stage and offload_optimizer have it.
    """
    steps_done = 0
    if resume:
        saved = read_trainer_state(resume).get("resume", {})
        steps_done = saved.get("step", 0) - saved.get("skipped", 0)
    optimizer = new_optimizer(gradients.parameters, config, base.model_config, gradients.device,
                              steps_done)
    if config.zero_stage and gradients.ranks.world > 1:
        optimizer = zero.ZeroOptimizer(optimizer, gradients)
    if config.offload_optimizer:
        from scale.offload_state import offload_state       # only where it is asked for

        file = None
        if config.offload_optimizer == "nvme":
            name = f"rank-{gradients.ranks.process}.safetensors"
            file = Path(config.output_dir, STATE_FOLDER, name)
        names = optimizer_names(optimizer, gradients.parameters)
        offload_state(optimizer, names, gradients.device, file)
    return optimizer


def build_schedule(config, plan, eval_losses: list) -> Callable[[int], float | dict]:
    """The factor of the learning rate at each step, for optim.set_lr.

    In stage ppo it is the same for all steps of a rollout. eval_losses: of the evaluations so far,
    a list that grows.
    """
    if config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        from methods.eval_schedules import eval_schedule    # only where it is asked for

        return eval_schedule(config, eval_losses)
    factor = lr_schedule(config, plan.total_steps // plan.unit)
    return lambda step: factor(step // plan.unit)
