"""Settings that contradict each other, each with a sentence about what to do.

Each function below yields pairs (whether the settings contradict each other, the sentence).

Requires: settings/config.py.
Next: settings/load_config.py, which raises the first sentence that applies.
"""
from __future__ import annotations

import os
from collections.abc import Iterator

from settings.config import ADAPTERS, Config, needs_whole_matrices

FSDP_WORDS = {"full_shard", "shard_grad_op", "offload", "auto_wrap"}


# ---- any script ---------------------------------------------------------------------------------


def in_model(c: Config) -> Iterator[tuple]:
    yield c.quantization_bit not in (None, 4, 8), (
        "quantization_bit is 4 or 8, the formats of bitsandbytes; leave it out for a 16-bit base")

    yield c.finetuning_type in ("full", "freeze") and c.adapter_name_or_path, (
        "adapter_name_or_path needs finetuning_type: lora or oft (or a merged model as "
        "model_name_or_path)")


# ---- training -----------------------------------------------------------------------------------


def in_purpose(c: Config) -> Iterator[tuple]:
    yield c.output and not c.input, (
        "output is chat.py's file of answers to the rows of input; the folder of a run is "
        "output_dir")

    yield c.bf16 and c.fp16, (
        "bf16 and fp16 are both true; keep one (bf16, if the device has it)")

    only_measures = not c.do_train and (c.do_predict or c.predict_with_generate)
    settings = f"--config {c.source}" if os.path.isfile(c.source) else "with these settings"
    yield c.do_train is False or only_measures, (
        f"without do_train: true this config evaluates a model: python eval.py {settings}. Add "
        "do_train: true to train, and do_predict: true to generate replies afterwards")

    yield _is_same_folder(c.output_dir, c.model_name_or_path), (
        "output_dir is the base model; name another")


def in_stage(c: Config) -> Iterator[tuple]:
    yield c.train_on_prompt and c.mask_history, (
        "train_on_prompt puts loss on the whole row, mask_history on its last reply only; keep one")

    yield c.stage == "pt" and (c.train_on_prompt or c.mask_history or c.neat_packing), (
        "train_on_prompt, mask_history and neat_packing have no meaning for plain text (stage: "
        "pt); leave them out")

    last_only = c.compares_replies or c.stage in ("ppo", "grpo")
    yield last_only and (c.train_on_prompt or c.mask_history or c.packing), (
        "train_on_prompt, mask_history and packing are for stages sft and pt; here only the last "
        "replies count; leave them out")

    yield c.samples_replies and c.train_on_prompt, (
        f"train_on_prompt: stage: {c.stage} learns from the replies; leave it out")

    yield c.ask and (c.stage in ("pt", "rm") or c.fsdp), (
        "ask puts questions to a chat model whose weights are in one place; leave it out in stages "
        "pt and rm and with fsdp")

    losses = [name for name in ("use_dft_loss", "use_eaft_loss", "use_asft_loss",
                                "label_smoothing_factor") if getattr(c, name)]
    yield len(losses) > 1, f"{' and '.join(losses)} are both set; keep one"

    yield c.dpo_label_smoothing and c.stage == "dpo" and c.pref_loss != "sigmoid", (
        "dpo_label_smoothing is for pref_loss: sigmoid; leave it out")

    yield c.ref_model and c.compares_replies and not c.has_reference, (
        "ref_model: stage rm, and dpo with pref_loss orpo or simpo, use no reference model; leave "
        "it out")

    yield c.ref_model_adapters and not c.ref_model, (
        "ref_model_adapters needs ref_model, their base")

    yield c.offload_activations and c.disable_gradient_checkpointing, (
        "offload_activations moves the inputs of checkpointed blocks, and "
        "disable_gradient_checkpointing: true leaves none; keep one")

    yield c.fsdp and (c.offload_activations or c.mlp_tile), (
        "offload_activations and mlp_tile are for one card or whole copies of the model; leave "
        "them out with fsdp")

    yield c.stage == "rm" and c.finetuning_type == "full" and c.fsdp, (
        "fsdp does not shard a value head; in stage: rm use finetuning_type: lora with it, or "
        "leave it out")

    yield c.moe_aux_loss_coef and c.stage not in ("sft", "pt"), (
        "moe_aux_loss_coef is for stages sft and pt; leave it out")

    yield from in_rewards(c)
    yield from in_sampling(c)
    yield from in_distillation(c)


def in_rewards(c: Config) -> Iterator[tuple]:
    if c.stage not in ("ppo", "grpo"):
        return
    from methods.rewards import missing_function        # only of stages that are scored

    yield not c.reward and not c.reward_model, (
        f"stage: {c.stage} needs reward_model, what stage: rm has trained, or reward, a function "
        "that scores a reply, as data/rewards.py:arithmetic")

    files = [name.rpartition(":")[0] for name in c.reward or []]
    missing = [file for file in files if not os.path.isfile(file)]
    yield missing, (
        f"reward: there is no file {(missing or [''])[0]!r}; it is FILE:FUNCTION, as "
        "data/rewards.py:arithmetic")

    absent = [] if missing else list(filter(None, map(missing_function, c.reward or [])))
    yield absent, f"reward: {(absent or [''])[0]}"

    count = len(c.reward or []) + bool(c.reward_model)
    unset = "" if c.reward_model else ", which is not set"
    yield c.reward_weights and len(c.reward_weights) != count, (
        f"reward_weights has {len(c.reward_weights or [])} numbers for {count} rewards: one for "
        f"each function in reward, and then one for reward_model{unset}")

    yield c.stage == "ppo" and c.num_iterations > 1, (
        "num_iterations is for stage: grpo; in stage: ppo it is ppo_epochs")

    yield c.stage == "ppo" and c.pissa_init, (
        "pissa_init changes the base, from which stage: ppo measures how far the model has gone "
        "(nor do they go together in LLaMA-Factory); leave it out")

    yield from in_reward_model(c)


def in_sampling(c: Config) -> Iterator[tuple]:
    if not c.samples_replies:
        yield c.num_iterations > 1, (
            "num_iterations is for stages that sample replies, grpo and distill; leave it out")
        return
    instead = " (or distill_lambda: 0, to sample nothing)" if c.stage == "distill" else ""

    yield c.stage != "ppo" and (c.lora_dropout or c.neftune_noise_alpha), (
        f"stage: {c.stage} samples from the very model that it trains; lora_dropout and "
        f"neftune_noise_alpha would make it another one; leave them out{instead}")

    yield c.neftune_noise_alpha, (
        "stage: ppo samples from the very model that it trains; neftune_noise_alpha would make it "
        "another one; leave it out")

    greedy = c.temperature == 0 or not c.do_sample
    yield greedy or c.repetition_penalty != 1, (
        f"stage: {c.stage} learns from sampled replies: do_sample: true, temperature above 0, and "
        f"no repetition_penalty{instead}")

    yield not c.max_new_tokens, (
        f"stage: {c.stage} needs max_new_tokens, the longest reply{instead}")

    yield c.fsdp or c.token_budget, (
        f"stage: {c.stage} is for one model on each rank and per_device_train_batch_size prompts "
        f"at a time: leave fsdp and token_budget out{instead}")


def in_reward_model(c: Config) -> Iterator[tuple]:
    kind = c.reward_model_type
    is_address = str(c.reward_model).startswith(("http://", "https://"))

    yield c.reward_model and kind == "lora" and c.finetuning_type not in ADAPTERS, (
        "reward_model_type: lora is an adapter beside the frozen base of finetuning_type: lora or "
        f"oft; with {c.finetuning_type} set reward_model_type: full and name a whole model")

    yield c.reward_model and kind == "lora" and c.pissa_init, (
        "pissa_init changes the base, and the adapter of reward_model was trained on the base as "
        "it was; leave it out, or set reward_model_type: full")

    yield kind == "api" and c.reward_model and not is_address, (
        f"reward_model_type: api needs an address as reward_model, as http://localhost:8000, not "
        f"{c.reward_model!r}")

    yield kind != "api" and is_address, (
        f"reward_model: {c.reward_model} is an address; set reward_model_type: api")

    yield c.reward_model_adapters and not (c.reward_model and kind == "full"), (
        "reward_model_adapters needs reward_model, their base, and reward_model_type: full")

    bits = c.reward_model_quantization_bit
    yield bits not in (None, 4, 8), (
        f"reward_model_quantization_bit is 4 or 8, not {bits}; leave it out for 16 bits")

    yield bits and kind != "full", (
        "reward_model_quantization_bit is for reward_model_type: full; with lora the reward model "
        "reads the base of this run, which quantization_bit quantizes")


def in_distillation(c: Config) -> Iterator[tuple]:
    distills = c.stage == "distill"

    yield distills and not c.teacher_model and not c.teacher_adapters, (
        "stage: distill needs teacher_model, the folder or hub id of the model to learn from, or "
        "teacher_adapters, adapters that make a teacher of the base")

    yield distills and c.teacher_quantization_bit not in (None, 4, 8), (
        "teacher_quantization_bit is 4 or 8, the formats of bitsandbytes; leave it out for a "
        "16-bit teacher")

    yield distills and c.fsdp and c.teacher_quantization_bit, (
        "teacher_quantization_bit: weights in 4 bits are not sharded; leave it or fsdp out")

    yield distills and (c.packing or c.neat_packing), (
        "packing is for stages sft and pt; stage: distill computes no padding either way; leave "
        "it out")


def in_data(c: Config) -> Iterator[tuple]:
    yield c.neat_packing and c.given.get("packing") is False, (
        "neat_packing: true packs, packing: false does not; keep one")

    yield from in_evaluation_rows(c)
    yield from in_mixture(c)

    yield c.val_size >= 1 and (c.val_size == 1 or c.val_size % 1), (
        "val_size must be a share below 1 or a count of rows above 1")

    yield c.do_eval and not c.eval_dataset and not c.val_size, (
        "evaluation is on (eval_strategy or do_eval) without rows for it; set val_size: 0.1 or "
        "eval_dataset")

    yield c.token_budget and c.dataloader_drop_last, (
        "with token_budget there is no incomplete batch for dataloader_drop_last to drop; keep one")


def in_mixture(c: Config) -> Iterator[tuple]:
    probs = c.interleave_probs
    yield probs and c.mix_strategy == "concat", (
        "interleave_probs needs mix_strategy: interleave_under or interleave_over")

    for name in ("dataset", "eval_dataset"):
        count = len(dict.fromkeys(getattr(c, name) or []))
        each_apart = name == "eval_dataset" and c.eval_on_each_dataset
        yield probs and count and len(probs) != count and not each_apart, (
            f"interleave_probs has {len(probs or [])} numbers for {count} datasets in {name}")

    yield probs and not (min(probs) >= 0 and abs(sum(probs) - 1) < 1e-8), (
        f"interleave_probs must be at least 0 and add up to 1, not {sum(probs or []):g}")

    zero = bool(probs) and min(probs) == 0
    yield zero and c.mix_strategy == "interleave_over", (
        "interleave_probs: with interleave_over a probability of 0 would never use up its dataset")


def in_evaluation_rows(c: Config) -> Iterator[tuple]:
    yield c.val_size and c.eval_dataset, (
        "val_size and eval_dataset both choose what to evaluate on; keep one")


def in_base(c: Config) -> Iterator[tuple]:
    lora = c.finetuning_type == "lora"
    adapters = c.finetuning_type in ADAPTERS

    yield c.fp8 and c.quantization_bit, (
        "fp8: true holds the base in 8 bits, quantization_bit in 4 or 8 of another kind (nor do "
        "they go together in LLaMA-Factory); keep one")

    yield c.base_precision and (not lora or not c.bf16 or c.fsdp), (
        "base_precision: fp8 is for the frozen weights of finetuning_type: lora, with bf16: true "
        "and without fsdp")

    yield c.quantization_bit and not adapters, (
        "quantization_bit freezes the base and trains only adapters: it needs finetuning_type: "
        "lora or oft")

    yield c.quantization_bit and (c.fsdp or c.base_precision), (
        "quantization_bit goes with neither fsdp (4-bit weights are not sharded) nor "
        "base_precision; keep one")

    yield c.fsdp and c.train_from_scratch, (
        "fsdp reads its shards from a checkpoint, and train_from_scratch has none; leave one of "
        "them out")

    yield c.train_from_scratch and c.finetuning_type != "full", (
        "train_from_scratch needs finetuning_type: full; an adapter on random weights learns "
        "little")


def in_checkpoints(c: Config) -> Iterator[tuple]:
    best = c.load_best_model_at_end

    same = c.eval_strategy == c.save_strategy or c.save_strategy == "best"
    yield best and (c.eval_strategy == "no" or not same), (
        "load_best_model_at_end needs eval_strategy and save_strategy to be the same, steps or "
        "epoch (or save_strategy: best)")

    yield best and c.save_strategy == "steps" and not _is_multiple(c.save_steps, c.eval_steps), (
        "load_best_model_at_end needs save_steps to be a multiple of eval_steps, so that each "
        "checkpoint has a loss")

    yield c.early_stopping_steps and c.eval_strategy == "no", (
        "early_stopping_steps needs eval_strategy")

    yield c.save_strategy == "best" and c.eval_strategy == "no", (
        "save_strategy: best needs eval_strategy")

    yield c.bf16_full_eval and not c.bf16 or c.fp16_full_eval and not c.fp16, (
        "bf16_full_eval and fp16_full_eval: an evaluation in training computes as the training "
        "does; set bf16: true (or fp16: true) as well, or leave them out")

    follows = c.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    yield follows and c.eval_strategy == "no", (
        f"lr_scheduler_type: {c.lr_scheduler_type} changes the learning rate after evaluations, by "
        "their eval_loss: it needs eval_strategy")

    one_loss = best or c.early_stopping_steps or follows or c.save_strategy == "best"
    yield c.eval_on_each_dataset and one_loss, (
        "eval_on_each_dataset has a loss for each dataset, and load_best_model_at_end, "
        "early_stopping_steps, save_strategy: best, reduce_lr_on_plateau and greedy need one; "
        "leave it out")

    yield c.eval_on_each_dataset and not c.eval_dataset, (
        "eval_on_each_dataset needs eval_dataset, the names to evaluate on")


def in_method(c: Config) -> Iterator[tuple]:
    lora_settings = c.loraplus_lr_ratio or c.use_rslora or c.use_dora or c.pissa_init
    yield c.finetuning_type != "lora" and lora_settings, (
        "loraplus_lr_ratio, use_rslora, use_dora and pissa_init are kinds of LoRA and need "
        "finetuning_type: lora")

    yield c.finetuning_type not in ADAPTERS and c.create_new_adapter, (
        "create_new_adapter needs finetuning_type: lora or oft")

    yield from in_oft(c)

    yield c.pissa_init and c.fsdp, (
        "pissa_init takes components out of full weights, and fsdp shards them; leave one of them "
        "out")

    yield c.pissa_init and c.quantization_bit, (
        "pissa_init takes components out of 16-bit weights; leave quantization_bit out")

    yield c.pissa_convert and not c.pissa_init, (
        "pissa_convert saves a PiSSA adapter as an ordinary one; set pissa_init: true, or leave it "
        "out")

    yield c.adapter_prefix == "served" and (
        c.use_dora or c.pissa_init or c.additional_target or c.finetuning_type == "oft"), (
        "adapter_prefix: served writes an adapter for vLLM and SGLang, which apply no DoRA, PiSSA, "
        "OFT or modules trained whole (use_dora, pissa_init, finetuning_type: oft, "
        "additional_target); merge the adapter instead, or leave adapter_prefix out")

    yield c.pissa_init and c.adapter_name_or_path and not c.create_new_adapter, (
        "pissa_init initializes a new adapter, and adapter_name_or_path names one to continue; "
        "create_new_adapter: true merges that one first")

    yield c.use_llama_pro and c.finetuning_type == "full", (
        "use_llama_pro trains inserted blocks alone: it needs finetuning_type: freeze, lora or "
        "oft")

    no_parameters = c.freeze_trainable_layers == 0 and not c.freeze_extra_modules
    yield c.finetuning_type == "freeze" and no_parameters, (
        "freeze_trainable_layers: 0 without freeze_extra_modules leaves nothing to train")


def in_oft(c: Config) -> Iterator[tuple]:
    oft = c.finetuning_type == "oft"

    yield oft and bool(c.oft_rank) == bool(c.oft_block_size), (
        f"oft_rank is {c.oft_rank} and oft_block_size is {c.oft_block_size}; one of the two "
        "follows from the other: set oft_rank: 0 for blocks of oft_block_size inputs (32 if it is "
        "not set), or oft_block_size: 0 for oft_rank blocks")

    yield oft and c.oft_block_size == 1, (
        "oft_block_size: 1 leaves nothing to rotate; it is 2 or more, usually 32")

    both = [c.given.get(name) for name in ("lora_target", "oft_target")]
    yield oft and None not in both and both[0] != both[1], (
        "lora_target and oft_target differ, and LLaMA-Factory 0.9.5 adapts what lora_target names; "
        "keep one")


def in_optimizer(c: Config) -> Iterator[tuple]:
    eight_bits = "8bit" in c.optim
    further = c.use_muon + c.use_galore + c.use_adam_mini + c.use_apollo + c.use_badam

    yield c.warmup_ratio and c.warmup_steps, "warmup_ratio and warmup_steps are both set; keep one"

    yield further + eight_bits > 1 or further and c.loraplus_lr_ratio is not None, (
        "use_muon, use_galore, use_adam_mini, use_apollo, use_badam, an 8-bit optim, and "
        "loraplus_lr_ratio: keep one")

    yield c.use_adam_mini and c.finetuning_type in ADAPTERS, (
        "use_adam_mini is for finetuning_type: full or freeze; adapters are small already")

    yield (c.use_galore or c.use_apollo) and c.finetuning_type in ADAPTERS, (
        "use_galore and use_apollo are for finetuning_type: full or freeze; adapters are small "
        "already")

    yield c.use_badam and (c.finetuning_type != "full" or c.stage in ("rm", "ppo") or c.fp16), (
        "use_badam is for finetuning_type: full, without fp16 and stages rm and ppo")

    by_layer = c.use_badam and c.badam_mode == "layer"
    yield by_layer and c.badam_switch_mode == "fixed" and c.badam_start_block is None, (
        "badam_switch_mode: fixed needs badam_start_block, the layer to train")

    yield by_layer and c.badam_switch_interval == 0, (
        "badam_switch_interval: 0 is no number of steps; -1 trains one layer only")

    yield c.fsdp and c.finetuning_type == "full" and needs_whole_matrices(c), (
        "use_muon, use_galore, use_adam_mini, use_apollo, use_badam and optim: adamw_8bit need "
        "full matrices, and fsdp shards them; use optim: adamw_torch")

    yield c.pure_bf16 and c.fsdp, (
        "pure_bf16 with finetuning_type: full or freeze goes without fsdp (and without ZeRO-3)")

    layerwise = c.use_galore and c.galore_layerwise or c.use_apollo and c.apollo_layerwise
    yield layerwise and c.gradient_accumulation_steps > 1, (
        "galore_layerwise and apollo_layerwise update in the backward pass of each micro-batch: "
        "set gradient_accumulation_steps: 1, or leave them out")


def in_cards(c: Config) -> Iterator[tuple]:
    yield (c.cards or c.card_memory or c.card_speed or c.link_speed) and not c.dry_run, (
        "cards, card_memory, card_speed and link_speed are for the advice of dry_run: true; set "
        "it, or leave them out (torchrun --nproc-per-node N starts N ranks)")

    yield bool(c.cards) != bool(c.card_memory), (
        "cards and card_memory (GiB of each) belong together; set both for advice on a layout")

    yield (c.card_speed or c.link_speed) and not c.cards, (
        "card_speed and link_speed are for the advice on a layout; set cards and card_memory, too")

    yield bool(c.link_speed) and min(c.link_speed) <= 0, (
        f"link_speed is in GB/s, above 0, not {min(c.link_speed or [0]):g}")


def in_step(c: Config) -> Iterator[tuple]:
    yield c.rows_per_step and "gradient_accumulation_steps" in c.given, (
        "gradient_accumulation_steps follows from rows_per_step, per_device_train_batch_size and "
        "the number of ranks; keep one of the two")

    yield c.rows_per_step and c.token_budget, (
        "token_budget makes micro-batches by tokens, and rows_per_step counts rows; keep one")


def in_zero(c: Config) -> Iterator[tuple]:
    yield c.zero_stage == 3, (
        "zero_stage: 3, which shards the weights, is fsdp: full_shard here; zero_stage is 0, 1 or "
        "2")

    yield c.zero_stage and c.fsdp, (
        "zero_stage and fsdp are both set, and fsdp shards optimizer state and gradients of "
        "sharded weights, too; keep one")

    yield c.offload_optimizer and c.use_badam, (
        "use_badam has little optimizer state, and makes it anew with each block: leave "
        "offload_optimizer out")

    yield c.zero_stage == 2 and c.samples_replies, (
        f"zero_stage: 2 sums gradients in each pass, and the ranks of stage: {c.stage} have "
        "different numbers of passes; use zero_stage: 1")

    yield c.zero_stage and needs_whole_matrices(c), (
        "use_muon, use_galore, use_adam_mini, use_apollo, use_badam and optim: adamw_8bit need "
        "whole matrices, and zero_stage cuts their state anywhere; use optim: adamw_torch, or "
        "leave zero_stage out, so that each rank holds the whole state")


def in_fsdp(c: Config) -> Iterator[tuple]:
    words = set(c.fsdp)
    both_or_neither = ("full_shard" in words) == ("shard_grad_op" in words)
    yield words and (words - FSDP_WORDS or both_or_neither), (
        "fsdp is full_shard, or shard_grad_op (which keeps gathered weights until the backward "
        "pass), and may add offload and auto_wrap; replicated shards (hybrid_shard) are not in "
        "this release")

    yield c.fsdp and c.finetuning_type in ("freeze", "oft"), (
        "fsdp is for finetuning_type: lora and full; with freeze and oft leave it out")


def in_tensor_parallel(c: Config) -> Iterator[tuple]:
    cut = c.tensor_parallel_size > 1
    yield cut and c.fsdp, (
        "tensor_parallel_size cuts matrices, fsdp (and deepspeed stage 3) shards them; keep one")

    yield cut and c.zero_stage, (
        "tensor_parallel_size cuts the optimizer state with the weights, zero_stage over "
        "data-parallel ranks; keep one")

    yield cut and c.finetuning_type in ("freeze", "oft"), (
        "tensor_parallel_size is for finetuning_type: lora and full")

    yield cut and (c.use_dora or c.pissa_init), (
        "tensor_parallel_size cuts the matrices that use_dora and pissa_init look at as a whole; "
        "plain LoRA, also with use_rslora or loraplus_lr_ratio, works")

    yield cut and (c.quantization_bit or c.base_precision or c.fp8), (
        "tensor_parallel_size takes a base in 16 or 32 bits (bf16: true), of which each process "
        "holds a part; leave quantization_bit, base_precision and fp8 out")

    yield cut and needs_whole_matrices(c), (
        "tensor_parallel_size: use_muon, use_galore, use_adam_mini, use_apollo, use_badam and "
        "8-bit optimizers need whole matrices; use optim: adamw_torch")

    yield cut and c.stage == "distill", (
        "tensor_parallel_size: stage: distill compares whole vocabularies; leave it out, or take "
        "fsdp: full_shard with distill_lambda: 0")

    yield cut and c.samples_replies, (
        f"stage: {c.stage} samples replies from a whole model on each rank; leave "
        "tensor_parallel_size out, or take stage: dpo with replies that another run has sampled")

    yield cut and c.ask, (
        "ask puts questions to a model in one place; leave it out with tensor_parallel_size, and "
        "ask the adapter in chat.py")

    yield cut and c.finetuning_type == "full" and c.train_from_scratch, (
        "train_from_scratch draws whole matrices; leave tensor_parallel_size out")


def in_pipeline(c: Config) -> Iterator[tuple]:
    staged = c.pipeline_parallel_size > 1
    yield staged and c.fsdp, (
        "pipeline_parallel_size shares out whole layers, fsdp (and deepspeed stage 3) shards every "
        "weight; keep one")

    yield staged and c.expert_parallel_size > 1, (
        "pipeline_parallel_size deals out layers and expert_parallel_size their experts; keep one, "
        "or take tensor_parallel_size beside pipeline_parallel_size")

    yield staged and (c.zero_stage or c.offload_optimizer), (
        "pipeline_parallel_size: each process holds the optimizer state of its own layers; leave "
        "zero_stage and offload_optimizer out, or take more stages")

    yield staged and c.finetuning_type in ("freeze", "oft"), (
        "pipeline_parallel_size is for finetuning_type: lora and full")

    yield staged and (c.use_dora or c.pissa_init), (
        "pipeline_parallel_size: use_dora and pissa_init look at weights before a stage reads its "
        "own; plain LoRA, also with use_rslora or loraplus_lr_ratio, works")

    yield staged and (c.quantization_bit or c.base_precision or c.fp8), (
        "pipeline_parallel_size takes a base in 16 or 32 bits (bf16: true), of which each process "
        "reads its layers; leave quantization_bit, base_precision and fp8 out")

    yield staged and needs_whole_matrices(c), (
        "pipeline_parallel_size: use_muon, use_galore, use_adam_mini, use_apollo, use_badam and "
        "8-bit optimizers look at all weights together; use optim: adamw_torch")

    yield staged and c.stage not in ("sft", "pt", "dpo"), (
        f"stage: {c.stage} needs more of the model than its last layers have, or several passes; "
        "pipeline_parallel_size is for stages sft, pt and dpo. Take tensor_parallel_size for kto "
        "and rm, fsdp: full_shard for distill")

    yield staged and c.use_asft_loss, (
        "use_asft_loss compares with the probabilities of a second model; leave it out with "
        "pipeline_parallel_size, or take fsdp: full_shard")

    yield staged and c.compute_accuracy, (
        "compute_accuracy looks at scores, which only the last stage of a pipeline has; leave it "
        "out with pipeline_parallel_size, and take eval.py with the adapter")

    yield staged and c.offload_activations, (
        "offload_activations keeps the inputs of one micro-batch, and a pipeline has several in "
        "flight; leave it out with pipeline_parallel_size")

    yield staged and c.ask, (
        "ask puts questions to a model in one place; leave it out with pipeline_parallel_size, and "
        "ask the adapter in chat.py")

    yield staged and c.finetuning_type == "full" and c.train_from_scratch, (
        "train_from_scratch draws all weights in one place; leave pipeline_parallel_size out")


def in_expert_parallel(c: Config) -> Iterator[tuple]:
    dealt = c.expert_parallel_size > 1
    yield dealt and (c.fsdp or c.zero_stage or c.tensor_parallel_size > 1), (
        "expert_parallel_size deals experts out, and goes with data parallelism alone; leave fsdp, "
        "zero_stage (and deepspeed) and tensor_parallel_size out, or expert_parallel_size")

    yield dealt and c.context_parallel_size > 1, (
        "expert_parallel_size gives each process rows of its own, and context_parallel_size cuts "
        "rows; keep one (with fsdp: full_shard beside it, if experts do not fit)")

    yield dealt and c.finetuning_type in ("freeze", "oft"), (
        "expert_parallel_size is for finetuning_type: lora and full")

    yield dealt and c.pissa_init, (
        "expert_parallel_size: pissa_init takes the matrices of all experts apart; LoRA without "
        "it, also with use_dora, use_rslora or loraplus_lr_ratio, works")

    yield dealt and (c.quantization_bit or c.base_precision or c.fp8), (
        "expert_parallel_size takes a base in 16 or 32 bits (bf16: true), of which each process "
        "reads its experts; leave quantization_bit, base_precision and fp8 out")

    yield dealt and c.teacher_quantization_bit, (
        "teacher_quantization_bit: weights in 4 bits are not dealt out; leave it or "
        "expert_parallel_size out")

    yield dealt and needs_whole_matrices(c), (
        "expert_parallel_size: use_muon, use_galore, use_adam_mini, use_apollo, use_badam and "
        "8-bit optimizers need the matrices of all experts; use optim: adamw_torch")

    yield dealt and c.samples_replies, (
        f"stage: {c.stage} samples replies from a whole model on each rank; leave "
        "expert_parallel_size out, or take stage: dpo with replies that another run has sampled")

    yield dealt and c.ask, (
        "ask puts questions to a model in one place; leave it out with expert_parallel_size, and "
        "ask the adapter in chat.py")

    yield dealt and c.finetuning_type == "full" and c.train_from_scratch, (
        "train_from_scratch draws the matrices of all experts; leave expert_parallel_size out")


def in_context_parallel(c: Config) -> Iterator[tuple]:
    cut = c.context_parallel_size > 1
    yield cut and c.samples_replies, (
        f"stage: {c.stage} samples replies, one token after the other, on each rank; leave "
        "context_parallel_size out, or take stage: sft or dpo with replies that another run has "
        "sampled")

    yield cut and c.stage == "distill", (
        "context_parallel_size: stage: distill compares whole rows; leave it out")

    yield cut and c.pipeline_parallel_size > 1, (
        "pipeline_parallel_size passes whole rows from stage to stage, and context_parallel_size "
        "cuts rows; keep one (with tensor_parallel_size beside it, if the model does not fit)")

    own_mean = c.use_asft_loss or c.label_smoothing_factor
    yield cut and own_mean and not c.paper_losses, (
        "context_parallel_size: use_asft_loss and label_smoothing_factor divide by the labels of a "
        "micro-batch, of which each process has a part; set paper_losses: true, which divides by "
        "those of the step")

    yield cut and c.compute_accuracy, (
        "compute_accuracy counts whole rows, and context_parallel_size cuts them; leave it out, "
        "and measure the adapter with eval.py")


# ---- chat.py and serve.py ----------------------------------------------------------------------


def in_answers(c: Config) -> Iterator[tuple]:
    yield c.infer_backend != "huggingface", (
        f"infer_backend: {c.infer_backend} is for the answers of eval.py; chat.py and serve.py "
        "generate by themselves. Leave it out (docs/serving.md: vLLM's own server)")

    yield c.input and not c.output, (
        "input and output go together: --input prompts.jsonl --output answers.jsonl")

    yield c.input and c.prompt, "input and prompt: give the one or the other"


# ---- merging ------------------------------------------------------------------------------------


def in_merge(c: Config) -> Iterator[tuple]:
    yield _is_same_folder(c.export_dir, c.model_name_or_path), (
        "export_dir is the base model; name another")

    yield c.finetuning_type in ("full", "freeze") and c.output_dir, (
        "finetuning_type: full and freeze need no merging: output_dir is a full model already")

    bits = c.export_quantization_bit
    yield bits not in (None, 2, 3, 4, 8), (
        f"export_quantization_bit: {bits}; GPTQ files have 2, 3, 4 or 8 bits (4 is usual)")

    yield bits and not c.export_quantization_dataset, (
        "export_quantization_bit needs export_quantization_dataset, texts to calibrate on: a file "
        "of rows with `text`, such as LLaMA-Factory's data/c4_demo.jsonl")

    yield c.export_quantization_desc_act and not bits, (
        "export_quantization_desc_act is an order of GPTQ; set export_quantization_bit, too")

    yield bits and c.quantization_bit, (
        "export_quantization_bit writes a quantized model, quantization_bit reads one as if it "
        "were; leave quantization_bit out")

    yield bits and c.export_format, (
        f"export_quantization_bit writes a GPTQ checkpoint, export_format a {c.export_format} one; "
        "leave one of them out")

    yield c.export_format in ("gguf", "gguf-lora") and c.infer_dtype != "auto", (
        "infer_dtype is the dtype of safetensors; for a GGUF file set gguf_type: "
        f"{c.infer_dtype.replace('float', 'f')}")

    yield c.check and c.check_adapter, (
        "check compares an exported model, check_adapter an adapter; leave one of them out")

    for name in ("gguf_type", "gguf_pretokenizer"):
        yield getattr(c, name) and c.export_format not in ("gguf", "gguf-lora"), (
            f"{name} describes a GGUF file; set export_format: gguf, too, or leave {name} out")


def _is_same_folder(a: str | None, b: str | None) -> bool:
    return bool(a and b) and os.path.realpath(a) == os.path.realpath(b)


def _is_multiple(a: float, b: float) -> bool:
    """Whether a is a multiple of b; never if one is a share of all steps and the other a count."""
    both_of_a_kind = (a < 1) == (b < 1)
    return both_of_a_kind and abs(a / b - round(a / b)) < 1e-9


CONTRADICTIONS = {      # the scripts that check, as in REFUSED of settings/config.py
    "any": (in_model,),
    "train": (in_purpose, in_stage, in_data, in_base, in_checkpoints, in_method, in_optimizer,
              in_cards, in_step, in_zero, in_fsdp, in_tensor_parallel, in_pipeline,
              in_context_parallel, in_expert_parallel),
    "eval": (in_evaluation_rows,),
    "answers": (in_answers,),
    "merge": (in_merge,),
}
