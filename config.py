"""Settings: LLaMA-Factory's keys, from a YAML or JSON file and the command line, as one dataclass.

    python config.py --keys             every key: type, default, meaning
    python -m runtime.load_config my.yaml      what this file sets, without running anything

A key stands in exactly one of three tables: `Config` (we act on it), `NO_EFFECT` (LLaMA-Factory has it, the result here
is the same without it; the scripts list it by name at start), `REFUSED` (leaving it out would change the result: an
error that says what to do instead). Any other key is a spelling mistake.

Read before: nothing. Read after: data.py (the rows), train.py (the run).
Sources: key names and defaults are those of LLaMA-Factory 0.9.5 (github.com/hiyouga/LLaMA-Factory, src/llamafactory/
hparams) and of transformers 5.6 TrainingArguments.
"""
from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields

from errors import run_script

COMMAND_LINE = "command line"
Steps = float       # optimizer steps: a count, or below 1 a share of all steps of the run (see in_steps)
Words = list        # of words that blanks or commas part
Format = object     # a chat format: its name, or a mapping of texts, which text/chat_formats.py reads


def key(default, help, group=None, choices=(), later=(), low=None, above=None, high=None, below=None):
    """One row of the table. `later`: values LLaMA-Factory knows and this release does not; the rest are bounds."""
    about = dict(help=help, group=group, choices=choices, later=later, low=low, above=above, high=high, below=below)
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass
class Config:
    """One field per key we act on; `load_config` makes it. The last three fields are not keys."""

    model_name_or_path: str | None = key(None, "folder with config.json and weights, or an id on the hub", "model")
    adapter_name_or_path: list[str] | None = key(None, "adapter folders; training folds in all but the last")
    model_revision: str = key("main", "branch, tag or commit of a hub id")
    cache_dir: str | None = key(None, "folder for downloads (none: the hub's own cache, see HF_HOME)")
    train_from_scratch: bool = key(False, "start from random weights; only config.json and tokenizer are read")
    base_precision: str | None = key(None, "fp8: frozen weights beside adapters in 8 bits, half the memory and faster "
                                     "products on Hopper, Ada and MI300", choices=("fp8",))
    quantization_bit: int | None = key(None, "4 or 8: the linear layers of the base are quantised when they are read; "
                                       "adapters learn beside them (QLoRA)")
    quantization_type: str = key("nf4", "the 4-bit format", choices=("nf4", "fp4"))
    double_quantization: bool = key(True, "4 bits: the scales take 8 bits, too (4.13 bits a weight in place of 4.5)")
    quantization_method: str = key("bnb", "whose format: bitsandbytes' (the package is not needed)", choices=("bnb",),
                                   later=("gptq", "awq", "aqlm", "quanto", "eetq", "hqq", "mxfp4", "fp8"))
    torch_compile: bool | None = key(None, "make one kernel each of norms, rotation and gate * up with torch's compiler "
                                     "(none: on GPUs where it works)")
    flash_attn: str = key("auto", "attention kernel (auto: the fastest correct one; disabled: the plain twin)",
                          choices=("auto", "disabled", "sdpa", "fa2"), later=("fa3",))
    disable_gradient_checkpointing: bool = key(False, "keep all activations: faster, more memory")
    infer_dtype: str = key("auto", "dtype of the base in chat and of the merged weights (auto: the checkpoint's)",
                           choices=("auto", "float16", "bfloat16", "float32"))

    stage: str = key("sft", "sft: learn replies; pt: running text; dpo: which of two replies is better; kto: which replies "
                     "are good; rm: to score replies", "method", choices=("sft", "pt", "rm", "dpo", "kto"), later=("ppo",))
    finetuning_type: str = key("lora", "lora: small matrices beside frozen weights; full: all weights; freeze: those "
                               "of some layers", choices=("lora", "full", "freeze"), later=("oft",))
    lora_rank: int = key(8, "width r of the matrices A (r, in) and B (out, r)", low=1)
    lora_alpha: int | None = key(None, "the update is scaled by lora_alpha / lora_rank (none: twice the rank)", low=1)
    lora_dropout: float = key(0.0, "dropout on the input of A", low=0, high=1)
    lora_target: list[str] = key(["all"], "modules that get an adapter, under the checkpoint's names: last parts as "
                                  "q_proj,v_proj, blocks as experts, a regular expression for whole names, or all: all "
                                  "linear but head, routers, experts")
    additional_target: list[str] | None = key(None, "further modules trained whole and saved with the adapter")
    use_rslora: bool = key(False, "scale by lora_alpha / sqrt(lora_rank)")
    use_dora: bool = key(False, "DoRA: the lengths of a matrix's rows are learnt apart from their directions")
    loraplus_lr_ratio: float | None = key(None, "LoRA+: B learns this many times faster than A", above=0)
    pissa_init: bool = key(False, "PiSSA: adapters begin as the weights' principal parts, which these lose")
    pissa_iter: int = key(16, "PiSSA: passes of the randomised SVD that finds them (-1: the exact one, slow)", low=-1)
    pissa_convert: bool = key(False, "PiSSA: write a plain adapter of twice the rank as well, into pissa_converted")
    create_new_adapter: bool = key(False, "merge every given adapter and train a fresh one")
    freeze_trainable_layers: int = key(2, "freeze: so many of the last layers learn (below 0: of the first)")
    freeze_trainable_modules: list[str] = key(["all"], "freeze: what learns in them, as mlp,self_attn")
    freeze_extra_modules: list[str] | None = key(None, "freeze: what learns outside of the layers: every weight in "
                                                 "whose name one of these occurs, as lm_head")
    pure_bf16: bool = key(False, "full, freeze: weights that learn, gradients and optimizer in bfloat16 as well")
    pref_loss: str = key("sigmoid", "dpo: the loss of a pair; orpo and simpo need no reference model",
                         choices=("sigmoid", "hinge", "ipo", "orpo", "simpo"), later=("kto_pair",))
    paper_losses: bool = key(False, "pref_loss hinge and ipo by the equations of their papers (false: as LLaMA-Factory "
                             "0.9.5 computes them, which is sigmoid's, in ipo of mean log-probabilities)")
    pref_beta: float = key(0.1, "dpo, kto: how much a change of log-probability is worth (orpo: weight of the odds ratio)",
                           above=0)
    pref_ftx: float = key(0.0, "dpo, kto: weight of the sft loss of good replies beside it", low=0)
    dpo_label_smoothing: float = key(0.0, "dpo: share of pairs that are thought to be the wrong way round", low=0, high=0.5)
    simpo_gamma: float = key(0.5, "simpo: margin that rewards should differ by", low=0)
    kto_chosen_weight: float = key(1.0, "kto: weight of good replies", low=0)
    kto_rejected_weight: float = key(1.0, "kto: weight of bad replies", low=0)
    ref_model: str | None = key(None, "dpo, kto: folder or hub id of the reference (none: the base, adapters off)")
    ref_model_adapters: list[str] | None = key(None, "adapter folders that are folded into ref_model")

    dataset: list[str] | None = key(None, "names in dataset_info.json, or paths of data files", "dataset")
    eval_dataset: list[str] | None = key(None, "the same, for evaluation")
    dataset_dir: str = key("data", "folder of dataset_info.json and its files")
    template: Format | None = key(None, "chat format: a name, or one of your own, see docs/templates.md (none: chosen "
                                  "from the checkpoint)")
    force_template: bool = key(False, "use a template that does not fit this tokenizer or adapter")
    split_special_tokens: bool = key(False, "special tokens typed in the data are ordinary text")
    cutoff_len: int = key(2048, "longest row in tokens; the rest is cut off", low=1)
    max_samples: int | None = key(None, "read at most so many rows of each dataset", low=1)
    val_size: float = key(0.0, "rows held out for evaluation: a share below 1, or a count", low=0)
    packing: bool | None = key(None, "fill rows up to cutoff_len with several samples (none: only in stage pt)")
    neat_packing: bool = key(False, "keep packed samples apart (packing: true turns it on; false, if said: not)")
    train_on_prompt: bool = key(False, "the prompt carries loss too")
    mask_history: bool = key(False, "only the last reply of a conversation carries loss")
    default_system: str | None = key(None, "system text of rows without one (none: the template's)")
    enable_thinking: bool | None = key(True, "reasoning templates: replies without a thought learn an empty one")
    preserve_thinking: bool = key(False, "reasoning templates: keep the thoughts of earlier replies")
    tool_format: str | None = key(None, "how tool calls are written (none: the template's)")
    placeholders: dict[str, str] = key({}, "what {{name}}-like marks in the data become, as placeholders.name=Pip")
    skip_bad_rows: bool = key(False, "leave out rows that cannot be used, and count them, instead of stopping")
    tokenized_path: str | None = key(None, "folder that keeps the tokenised rows (none: `tokenised` in output_dir)")
    overwrite_cache: bool = key(False, "tokenise again although the tokenised rows are there")
    preprocessing_num_workers: int | None = key(None, "processes that tokenise (none: as many as there are cores)", low=1)
    preprocessing_batch_size: int = key(1000, "rows that packing may combine with each other", low=1)
    disable_shuffling: bool = key(False, "keep the rows in their order")
    dataloader_drop_last: bool = key(False, "leave out an incomplete last batch")

    output_dir: str | None = key(None, "folder for adapter, logs and checkpoints", "output")
    overwrite_output_dir: bool = key(False, "train into a folder that holds an earlier run")
    resume_from_checkpoint: str | None = key(None, "a checkpoint folder, or true / auto: the newest in output_dir")
    logging_steps: Steps = key(500, "steps between log lines", above=0)
    logging_first_step: bool = key(False, "log step 1 too")
    plot_loss: bool = key(False, "draw training_loss.png (needs matplotlib)")
    report_to: list[str] = key([], "dashboards that get the curves: tensorboard, wandb, swanlab, mlflow, all, none")
    run_name: str | None = key(None, "what they call the run")
    logging_dir: str | None = key(None, "folder of tensorboard's files (none: `runs` in output_dir)")
    project: str = key("huggingface", "wandb's project, mlflow's experiment (not said: their own settings count)")
    use_swanlab: bool = key(False, "the same as report_to: swanlab")
    swanlab_project: str = key("llamafactory", "swanlab's project")
    swanlab_workspace: str | None = key(None, "swanlab's workspace")
    swanlab_run_name: str | None = key(None, "what swanlab calls the run (none: run_name)")
    swanlab_mode: str = key("cloud", "where swanlab keeps it", choices=("cloud", "local"))
    swanlab_logdir: str | None = key(None, "folder of swanlab's files")
    disable_tqdm: bool | None = key(None, "no progress bar")
    save_strategy: str = key("steps", "when to write checkpoints", choices=("no", "steps", "epoch"), later=("best",))
    save_steps: Steps = key(500, "steps between checkpoints", above=0)
    save_total_limit: int | None = key(None, "keep only so many checkpoints", low=1)
    save_only_model: bool = key(False, "checkpoints without optimizer state (cannot be resumed)")

    per_device_train_batch_size: int = key(8, "rows of one micro-batch", "train", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches of one optimizer step", low=1)
    join_micro_batches: bool = key(True, "compute small micro-batches of a step together, where memory allows: the same "
                                   "sum, a busier GPU")
    token_budget: int | None = key(None, "micro-batches of rows of similar length with at most so many tokens, in place of "
                                   "per_device_train_batch_size", low=1)
    num_train_epochs: float = key(3.0, "passes over the data", above=0)
    max_steps: int = key(-1, "stop after so many optimizer steps, whatever num_train_epochs says (-1: off)", low=-1)
    learning_rate: float = key(5e-5, "highest learning rate", above=0)
    lr_scheduler_type: str = key(
        "linear", "course of the learning rate after the warm-up",
        choices=("linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
                 "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"),
        later=("reduce_lr_on_plateau", "cosine_warmup_with_min_lr", "greedy"))
    lr_scheduler_kwargs: dict = key({}, "its further settings, as lr_scheduler_kwargs.min_lr=1e-6")
    warmup_ratio: Steps | None = key(None, "share of all steps in which the learning rate rises from 0", low=0)
    warmup_steps: Steps = key(0, "the same as a count", low=0)
    optim: str = key("adamw_torch_fused", "optimizer: AdamW; names with 8bit: what it remembers is in bytes",
                     choices=("adamw_torch_fused", "adamw_torch", "adamw_hf", "adamw_8bit", "adamw_bnb_8bit",
                              "paged_adamw_8bit"))
    use_muon: bool = key(False, "Muon for matrices, AdamW for embedding, head and the rest")
    use_galore: bool = key(False, "GaLore: AdamW on a few directions of each matrix's gradient; with full or freeze")
    galore_target: list[str] = key(["all"], "GaLore: matrices in whose name one of these occurs, as mlp,self_attn "
                                   "(all: all but embedding and head)")
    galore_rank: int = key(16, "GaLore: how many directions", low=1)
    galore_update_interval: int = key(200, "GaLore: steps after which they are found anew", low=1)
    galore_scale: float = key(2.0, "GaLore: factor of its updates", above=0)
    weight_decay: float = key(0.0, "decoupled decay of weights (not of biases and norms)", low=0)
    adam_beta1: float = key(0.9, "AdamW: memory of the mean gradient", low=0, below=1)
    adam_beta2: float = key(0.999, "AdamW: memory of its square", low=0, below=1)
    adam_epsilon: float = key(1e-8, "AdamW: floor of the divisor", low=0)
    max_grad_norm: float | None = key(1.0, "clip the gradient to this norm (0 or none: never)", low=0)
    moe_aux_loss_coef: float | None = key(None, "weight of the loss that keeps a mixture's experts equally busy", low=0)
    neftune_noise_alpha: float | None = key(None, "NEFTune: noise on the embeddings in training", low=0)
    even_batches: bool = key(True, "several ranks: rows from the epoch's beginning fill up what the last ones lack")
    ddp_timeout: int = key(180_000_000, "several ranks: seconds that one waits for the others", above=0)
    fsdp: Words = key([], "several ranks: full_shard cuts the weights into a part for each; full_shard offload keeps "
                          "the parts in the CPU's memory")
    time_limit: float | None = key(None, "minutes after which the run saves and stops (exit code 75)", above=0)
    profile: bool = key(False, "show where the time of a few steps goes, and write a trace of them")
    dry_run: bool = key(False, "show data, steps and the memory needed, then end; weights are not read")
    force_resume: bool = key(False, "resume although data, template or seed have changed")
    bf16: bool = key(False, "compute in bfloat16")
    fp16: bool = key(False, "compute in float16, with loss scaling")
    use_cpu: bool = key(False, "run on the CPU even where there is a GPU")
    seed: int = key(42, "seed of shuffling, split, initial weights and dropout", low=0, high=2**32 - 1)
    data_seed: int | None = key(None, "another seed for the order of the rows", low=0, high=2**32 - 1)

    do_eval: bool = key(False, "evaluate at the end (any eval_strategy but no turns it on)", "eval")
    eval_strategy: str = key("no", "when to evaluate", choices=("no", "steps", "epoch"))
    eval_steps: Steps | None = key(None, "steps between evaluations (none: logging_steps)", above=0)
    per_device_eval_batch_size: int = key(8, "rows of one evaluation batch, answers made at a time", low=1)
    load_best_model_at_end: bool = key(False, "end with the checkpoint of the lowest evaluation loss")
    metric_for_best_model: str | None = key(None, "what is lowest (both mean eval_loss)", choices=("loss", "eval_loss"))
    early_stopping_steps: int | None = key(None, "stop after so many evaluations without improvement", low=1)

    do_train: bool | None = key(None, "false: train.py stops (none: it trains all the same, unless do_predict is on)")
    do_predict: bool = key(False, "eval.py: answer the evaluation rows, and score the answers; train.py, with do_train: "
                           "true, has it done after the training")
    predict_with_generate: bool = key(False, "the same in eval.py")
    task: str | None = key(None, "eval.py: multiple choice, as mmlu_test, ceval_validation, or a csv file or folder of them")
    task_dir: str = key("evaluation", "folder of the tasks that go by a name")
    lang: str = key("en", "language the questions are put in", choices=("en", "zh"))
    n_shot: int = key(5, "questions of the dev split that are shown with their answers", low=0)
    save_dir: str | None = key(None, "new folder for the results of a task (none: output_dir)")
    compare: bool = key(True, "eval.py: measure the base, and the merged model in export_dir, beside the tuned one")

    do_sample: bool = key(True, "draw from the distribution; false: always the likeliest token", "generate")
    temperature: float = key(0.95, "below 1 sharper, above 1 flatter (0: the likeliest token)", low=0)
    top_p: float = key(0.7, "draw from the likeliest tokens that together have this probability", low=0, high=1)
    top_k: int = key(50, "draw from so many likeliest tokens (0: all)", low=0)
    repetition_penalty: float = key(1.0, "above 1: tokens seen before become less likely", above=0)
    max_new_tokens: int = key(1024, "longest reply in tokens (0: max_length counts)", low=0)
    max_length: int = key(1024, "longest prompt and reply together, if max_new_tokens is 0", low=1)
    skip_special_tokens: bool = key(True, "do not print special tokens of the reply")
    prompt: str | None = key(None, "chat.py: answer this and end")
    fast_chat: bool = key(True, "chat.py: adapter folded into the weights, weights laid out anew (false: as in training)")
    raw: bool = key(False, "chat.py: show the rendered prompt as ids and text")
    jsonl: str | None = key(None, "data.py: write every processed row to this file", "show")

    export_dir: str | None = key(None, "folder for the merged model", "export")
    merge_base: str = key("dequantised", "what an adapter that was trained on a 4- or 8-bit base is folded into: that "
                          "base, in 16 bits again, or the original", choices=("dequantised", "original"))
    export_size: float = key(5, "largest weight file in GB (10^9 bytes)", above=0)
    export_device: str = key("cpu", "where the sums are computed", choices=("cpu", "auto", "cuda"))
    overwrite: bool = key(False, "replace an export_dir that exists")

    given: dict = field(default_factory=dict, repr=False)           # {key: value} the user set explicitly
    source: str = field(default=COMMAND_LINE, repr=False)           # config file, for messages
    no_effect: list[str] = field(default_factory=list, repr=False)  # given keys that change nothing, see ignored_keys


NO_EFFECT = {       # why the result is the same without it: the keys
    "no code of others is executed; tokenizers are always the fast kind": "trust_remote_code use_fast_tokenizer",
    "weights are memory-mapped straight to the device": "low_cpu_mem_usage offload_folder",
    "rows are read from one file of tokens, when their step comes": """data_shared_file_system dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor remove_unused_columns label_names length_column_name sortish_sampler""",
    "how fast or in how much memory, not what": """batch_size use_unsloth_gc enable_liger_kernel use_liger_kernel
        liger_kernel_config use_reentrant_gc gradient_checkpointing gradient_checkpointing_kwargs use_v1_kernels
        use_kv_cache use_cache torch_compile_backend torch_compile_mode torch_empty_cache_steps
        auto_find_batch_size tf32 jit_mode_eval torchdynamo fp16_backend half_precision_backend fp16_opt_level""",
    "norms, softmax and loss are computed in float32 anyway": "upcast_layernorm upcast_lmhead_output",
    "gradients are summed by hand; the loss is a mean over all tokens": """average_tokens_across_devices ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank master_addr
        master_port ray_num_workers ray_init_kwargs log_on_each_node save_on_each_node use_mps_device""",
    "parameters, tokens seen and speed are always shown, NaN is never hidden": """print_param_status debug
        include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second log_level
        log_level_replica logging_nan_inf_filter skip_memory_metrics prediction_loss_only
        eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
        restore_callback_states_from_checkpoint enable_jit_checkpoint enable_torch_profiler profiler_output_dir
        profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes
        profiler_profile_memory profiler_with_stack profile_modules""",
    "weights are written as safetensors": "export_legacy_format",
    "the models read text": """image_max_pixels image_min_pixels image_do_pan_and_scan
        crop_to_patches image_resolution video_resolution video_max_pixels video_min_pixels video_fps video_maxlen
        use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower freeze_multi_modal_projector
        freeze_language_model""",
    "adapters stand beside linear layers alone; additional_target trains an embedding whole": "loraplus_lr_embedding",
    "every block is a unit, and the words of fsdp say the rest": "fsdp_config",
    "details of something that is off or refused": """init_special_tokens buffer_size interleave_probs eval_num_beams
        quantization_device_map length_penalty
        module_dropout oft_rank oft_block_size
        oft_target ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards
        reward_model reward_model_adapters reward_model_type
        reward_model_quantization_bit apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj
        apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block
        badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose
        swanlab_lark_webhook_url swanlab_lark_secret trackio_space_id trackio_bucket_id trackio_static_space_id hyper_parallel_args
        asft_alpha eaft_alpha fp8_backend fp8_enable_fsdp_float8_all_gather optim_target_modules
        generation_max_length generation_num_beams generation_config hub_token hub_private_repo hub_model_id
        hub_strategy hub_always_push hub_revision ms_hub_token om_hub_token export_quantization_dataset
        export_quantization_nsamples export_quantization_maxlen kt_weight_path kt_expert_checkpoint_path
        kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size vllm_maxlen vllm_gpu_util
        vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size
        sglang_config sglang_lora_backend""",
}

REFUSED = (         # in which script, which keys (=x: the value that is fine; otherwise false, 0, null), what to do
    ("train", "deepspeed", "leave it out: torchrun --nproc-per-node N train.py runs on N cards (docs/many_gpus.md), "
     "and fsdp: full_shard cuts what does not fit one"),
    ("train", "parallelism_config use_hyper_parallel use_mca use_ray",
     "leave it out: torchrun --nproc-per-node N train.py runs on N cards, fsdp: full_shard is for what does not fit"),
    ("train", "use_unsloth use_kt", "leave it out; flash_attn: auto picks the fastest correct kernel of this machine"),
    ("train", "use_llama_pro mixture_of_depths shift_attn",
     "not in this release yet; LoRA (also use_rslora, use_dora, loraplus_lr_ratio) and finetuning_type: full are"),
    ("train", "use_apollo use_badam use_adam_mini",
     "not in this release; optim: adamw_8bit, use_galore and, much more, LoRA save the optimizer's memory"),
    ("train", "galore_layerwise galore_proj_type=std",
     "GaLore projects the shorter side (std), when the backward pass is over; leave it out"),
    ("train", "fp8", "not in this release; bf16: true computes in bfloat16 and trains float32 weights"),
    ("train", "bf16_full_eval fp16_full_eval", "evaluation computes as training does; set bf16 or fp16"),
    ("train", "use_dft_loss use_asft_loss use_eaft_loss label_smoothing_factor",
     "not in this release; plain cross-entropy is"),
    ("train", "pref_bco_weight ld_alpha ref_model_quantization_bit",
     "not in this release; pref_loss, pref_beta and pref_ftx are, and ref_model in the base's precision"),
    ("any", "resize_vocab add_tokens add_special_tokens new_special_tokens_config",
     "changing how text becomes tokens is not in this release yet"),
    ("any", "rope_scaling", "not in this release; a rope_scaling in the checkpoint's config.json is followed"),
    ("train", "streaming", "data are tokenised at start, and then stay on disk; leave it out"),
    ("train", "mix_strategy=concat", "not in this release; datasets are concatenated in the order given"),
    ("train", "eval_on_each_dataset", "not in this release yet; evaluate on one dataset a run"),
    ("train", "ignore_pad_token_for_loss=true", "padding never carries loss here"),
    ("train", "group_by_length train_sampling_strategy=random",
     "rows come shuffled, or with disable_shuffling: true in their order; either way no padding is computed"),
    ("train", "compute_accuracy", "not in this release; eval.py tells loss, perplexity and the scores of answers"),
    ("train", "eval_on_start eval_delay", "not in this release; eval_strategy and eval_steps say when to evaluate"),
    ("train", "logging_strategy=steps", "set logging_steps"),
    ("train", "swanlab_api_key", "a secret does not belong in a config: run `swanlab login` or set SWANLAB_API_KEY"),
    ("train", "greater_is_better", "the best model is that of the lowest loss"),
    ("train", "optim_args", "write adam_beta1, adam_beta2, adam_epsilon"),
    ("train", "ignore_data_skip", "a resumed run goes on with the row after the last one; leave it out"),
    ("train", "full_determinism", "not in this release; seed fixes all but the order of sums inside GPU kernels"),
    ("train", "accelerator_config", "not read here; per_device_train_batch_size and gradient_accumulation_steps are"),
    ("train", "save_safetensors=true", "weights are written as safetensors only"),
    ("train", "push_to_hub", "upload the finished folder yourself: hf upload NAME FOLDER"),
    ("merge", "export_hub_model_id", "upload the finished folder yourself: hf upload NAME FOLDER"),
    ("merge", "export_quantization_bit", "merge.py writes 16- or 32-bit weights; another tool can quantise them"),
    ("any", "adapter_folder", "write the whole path in adapter_name_or_path"),
    ("any", "hf_hub_token", "a secret does not belong in a config: run `hf auth login` or set HF_TOKEN"),
    ("chat", "infer_backend=huggingface", "chat.py and eval.py generate by themselves; leave it out"),
    ("chat", "num_beams=1", "beam search is not in this release; leave it out"),
)


def _same(a, b):
    return bool(a and b) and os.path.realpath(a) == os.path.realpath(b)


def _multiple(a, b):        # a share of all steps and a count cannot be compared before the rows are counted
    return (a < 1) == (b < 1) and abs(a / b - round(a / b)) < 1e-9


def _shards_oddly(words):
    return words and (set(words) - {"full_shard", "shard_grad_op", "offload", "auto_wrap"}
                      or ("full_shard" in words) == ("shard_grad_op" in words))


COMPARED = ("rm", "dpo", "kto")        # stages that learn from answers compared or judged


def has_reference(c) -> bool:
    """Does this run compare its model with another that does not learn?"""
    return c.stage == "kto" or c.stage == "dpo" and c.pref_loss not in ("orpo", "simpo")


CONTRADICTIONS = (  # in which script, when, the sentence
    ("train", lambda c: c.bf16 and c.fp16, "bf16 and fp16 are both true; keep one (bf16, where the device has it)"),
    ("train", lambda c: c.do_train is False or not c.do_train and (c.do_predict or c.predict_with_generate),
     "without do_train: true this is for measuring a model: run python eval.py with the same file. Add do_train: true to "
     "train, and with do_predict: true to have the rows answered afterwards"),
    ("eval", lambda c: c.val_size and c.eval_dataset,
     "val_size and eval_dataset both choose what to evaluate on; keep one"),
    ("train", lambda c: c.train_on_prompt and c.mask_history,
     "train_on_prompt puts loss on a whole row, mask_history on its last reply only; keep one"),
    ("train", lambda c: c.stage == "pt" and (c.train_on_prompt or c.mask_history or c.neat_packing),
     "train_on_prompt, mask_history and neat_packing mean nothing for running text (stage: pt); leave them out"),
    ("train", lambda c: c.stage in COMPARED and (c.train_on_prompt or c.mask_history or c.packing),
     "train_on_prompt, mask_history and packing are for stages sft and pt; here only the last answers count; leave them out"),
    ("train", lambda c: c.dpo_label_smoothing and c.stage == "dpo" and c.pref_loss != "sigmoid",
     "dpo_label_smoothing is for pref_loss: sigmoid; leave it out"),
    ("train", lambda c: c.ref_model and c.stage in COMPARED and not has_reference(c),
     "ref_model: rm, and dpo with pref_loss orpo or simpo, compare with no other model; leave it out"),
    ("train", lambda c: c.ref_model_adapters and not c.ref_model, "ref_model_adapters needs ref_model, their base"),
    ("train", lambda c: c.stage == "rm" and c.finetuning_type == "full" and c.fsdp,
     "fsdp cuts no value head; in stage: rm take finetuning_type: lora with it, or leave it out"),
    ("train", lambda c: c.moe_aux_loss_coef and c.stage in COMPARED,
     "moe_aux_loss_coef is for stages sft and pt; leave it out"),
    ("train", lambda c: c.neat_packing and c.given.get("packing") is False,
     "neat_packing: true packs, packing: false does not; keep one"),
    ("train", lambda c: c.val_size and c.eval_dataset,
     "val_size and eval_dataset both choose what to evaluate on; keep one"),
    ("train", lambda c: c.val_size >= 1 and (c.val_size == 1 or c.val_size % 1),
     "val_size must be a share below 1 or a count of rows above 1"),
    ("train", lambda c: c.do_eval and not c.eval_dataset and not c.val_size,
     "evaluation is on (eval_strategy or do_eval) without rows for it; set val_size: 0.1 or eval_dataset"),
    ("train", lambda c: c.base_precision and (c.finetuning_type != "lora" or not c.bf16 or c.fsdp),
     "base_precision: fp8 is for the frozen weights of finetuning_type: lora, with bf16: true and without fsdp"),
    ("any", lambda c: c.quantization_bit not in (None, 4, 8),
     "quantization_bit is 4 or 8, the formats of bitsandbytes; leave it out for a 16-bit base"),
    ("train", lambda c: c.quantization_bit and c.finetuning_type != "lora",
     "quantization_bit freezes the base, and only adapters learn beside it: it needs finetuning_type: lora"),
    ("train", lambda c: c.quantization_bit and (c.fsdp or c.base_precision),
     "quantization_bit goes with neither fsdp (4-bit weights are whole on every rank) nor base_precision; keep one"),
    ("train", lambda c: c.token_budget and c.dataloader_drop_last,
     "token_budget makes no incomplete batch that dataloader_drop_last could leave out; keep one"),
    ("train", lambda c: c.warmup_ratio and c.warmup_steps, "warmup_ratio and warmup_steps are both set; keep one"),
    ("train", lambda c: c.load_best_model_at_end and (c.eval_strategy == "no" or c.eval_strategy != c.save_strategy),
     "load_best_model_at_end needs eval_strategy and save_strategy to be the same, steps or epoch"),
    ("train", lambda c: c.load_best_model_at_end and c.eval_strategy == "steps"
     and not _multiple(c.save_steps, c.eval_steps),
     "load_best_model_at_end needs save_steps to be a multiple of eval_steps, so that each checkpoint has a loss"),
    ("train", lambda c: c.early_stopping_steps and c.eval_strategy == "no", "early_stopping_steps needs eval_strategy"),
    ("train", lambda c: _shards_oddly(c.fsdp),
     "fsdp is full_shard, or shard_grad_op (which keeps gathered weights until the backward pass), and may add offload "
     "and auto_wrap; copies of the shards (hybrid_shard) are not in this release"),
    ("train", lambda c: c.fsdp and c.train_from_scratch,
     "fsdp reads its parts from a checkpoint, and train_from_scratch has none; leave one of them out"),
    ("train", lambda c: c.train_from_scratch and c.finetuning_type != "full",
     "train_from_scratch needs finetuning_type: full; beside random weights an adapter learns little"),
    ("train", lambda c: c.finetuning_type != "lora" and (c.loraplus_lr_ratio or c.use_rslora or c.use_dora
                                                         or c.pissa_init or c.create_new_adapter),
     "loraplus_lr_ratio, use_rslora, use_dora, pissa_init and create_new_adapter need finetuning_type: lora"),
    ("train", lambda c: c.fsdp and c.finetuning_type == "freeze",
     "fsdp is for finetuning_type: lora and full; with freeze leave it out"),
    ("train", lambda c: c.pissa_init and c.fsdp,
     "pissa_init takes parts out of whole weights, and fsdp cuts them; leave one of them out"),
    ("train", lambda c: c.pissa_init and c.quantization_bit,
     "pissa_init takes parts out of 16-bit weights; leave quantization_bit out"),
    ("train", lambda c: c.pissa_convert and not c.pissa_init,
     "pissa_convert writes what pissa_init began as a plain adapter; set pissa_init: true, or leave it out"),
    ("train", lambda c: c.pissa_init and c.adapter_name_or_path and not c.create_new_adapter,
     "pissa_init begins an adapter, and adapter_name_or_path names one to go on with; create_new_adapter: true folds "
     "that in first"),
    ("train", lambda c: c.use_muon + c.use_galore + ("8bit" in c.optim) + (c.loraplus_lr_ratio is not None) * (
        c.use_muon + c.use_galore) > 1, "use_muon, use_galore, an optim with 8 bits, and loraplus_lr_ratio: keep one"),
    ("train", lambda c: c.use_galore and c.finetuning_type == "lora",
     "use_galore is for finetuning_type: full or freeze; adapters are small already"),
    ("train", lambda c: c.fsdp and c.finetuning_type == "full" and (c.use_muon or c.use_galore or "8bit" in c.optim),
     "use_muon, use_galore and optim: adamw_8bit want whole matrices, and fsdp cuts them; take optim: adamw_torch"),
    ("train", lambda c: c.pure_bf16 and (not c.bf16 or c.finetuning_type == "lora" or c.fsdp),
     "pure_bf16 needs bf16: true and finetuning_type: full or freeze, without fsdp"),
    ("train", lambda c: c.finetuning_type == "freeze" and c.freeze_trainable_layers == 0 and not c.freeze_extra_modules,
     "freeze_trainable_layers: 0 without freeze_extra_modules leaves nothing to learn"),
    ("any", lambda c: c.finetuning_type in ("full", "freeze") and c.adapter_name_or_path,
     "adapter_name_or_path needs finetuning_type: lora (or a merged model as model_name_or_path)"),
    ("train", lambda c: _same(c.output_dir, c.model_name_or_path), "output_dir is the base model; name another"),
    ("merge", lambda c: _same(c.export_dir, c.model_name_or_path), "export_dir is the base model; name another"),
    ("merge", lambda c: c.finetuning_type in ("full", "freeze") and c.output_dir,
     "finetuning_type: full and freeze need no merging: output_dir is a whole model already"),
)

COMMANDS = {"data": "-m runtime.preview"}       # where it is not the name of a file at the root
SCRIPTS = {         # script: the keys it cannot do without, its usage
    "train": (("model_name_or_path", "dataset", "output_dir"), """Fine-tune a model.

    python train.py --config configs/tiny_lora_sft.yaml
    python train.py my.yaml learning_rate=2e-4 --max_steps 20       settings after the file replace its own
    python train.py my.yaml resume_from_checkpoint=true             go on after the newest checkpoint
"""),
    "data": (("model_name_or_path", "dataset"), """Show the examples as ids, as text, and the text that carries loss.

    python -m runtime.preview --config configs/tiny_lora_sft.yaml
    python -m runtime.preview my.yaml --jsonl rows.jsonl                       every processed row, one a line
"""),
    "chat": (("model_name_or_path",), """Talk to a model and its adapter; the yaml of its training will do.

    python chat.py --config configs/tiny_lora_sft.yaml              `clear` forgets the conversation, `exit` ends it
    python chat.py my.yaml --prompt "Who are you?"                  one answer
    python chat.py my.yaml --raw                                    show the rendered prompt as ids and text
    python chat.py model_name_or_path=FOLDER temperature=0.2        no file at all
"""),
    "eval": (("model_name_or_path",), """Loss, perplexity, answers and their scores, of a tuned model beside its base.

    python eval.py --config configs/tiny_lora_eval.yaml
    python eval.py my.yaml do_eval=true                             the loss alone
    python eval.py my.yaml eval_dataset=questions.json do_sample=false max_new_tokens=256
    python eval.py my.yaml task=mmlu_test                           multiple choice
"""),
    "merge": (("model_name_or_path", "export_dir"), """Fold an adapter into its base and write a whole checkpoint.

    python merge.py --config configs/tiny_merge.yaml
    python merge.py my.yaml export_dir=models/merged overwrite=true
"""),
}

KEYS = {f.name: f for f in fields(Config) if "help" in f.metadata}
OWN_KEYS = ("compare", "join_micro_batches", "paper_losses", "base_precision", "token_budget", "profile", "dry_run",
            "fast_chat", "time_limit", "force_resume", "even_batches", "force_template", "placeholders",
            "skip_bad_rows", "overwrite", "prompt", "raw", "jsonl", "merge_base")
KEYS_OF = {         # finetuning_type: keys without meaning elsewhere
    "lora": ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "pissa_iter"),
    "freeze": ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
}
PREFERENCE_KEYS = {"dpo": ("pref_loss", "paper_losses", "pref_beta", "pref_ftx", "dpo_label_smoothing", "simpo_gamma",
                           "ref_model", "ref_model_adapters"),
                   "kto": ("pref_beta", "pref_ftx", "kto_chosen_weight", "kto_rejected_weight", "ref_model",
                           "ref_model_adapters")}
ALIASES = {"evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}        # spellings of earlier releases
UNUSED = {name: None for names in NO_EFFECT.values() for name in names.split()}
UNUSED |= {item.partition("=")[0]: (script, item.partition("=")[2], sentence)
           for script, names, sentence in REFUSED for item in names.split()}
TRUE, FALSE, NULL = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("", "~", "null", "none")


# ---- what the scripts ask of a Config


def as_dict(config: Config) -> dict:
    """{key: value} of all settings, JSON-able; load_config reads it back from a .json file."""
    return {name: getattr(config, name) for name in KEYS}


def in_steps(value: Steps, total_steps: int) -> int:
    """Optimizer steps that a Steps setting means in a run of total_steps: a count, or below 1 a share, rounded up."""
    return int(value) if value >= 1 else math.ceil(value * total_steps)


def print_help(script: str):
    """The usage of a script, short."""
    needs, usage = SCRIPTS.get(script, ((), __doc__))
    print(usage)
    print("Settings are LLaMA-Factory's keys, in a YAML or JSON file or on the command line: key=value, --key value,\n"
          "a switch alone (--bf16), a list as a,b. All keys with default and meaning: python config.py --keys")
    print(f"Needed: {', '.join(needs)}" if needs else "")


def print_keys():
    """Every key: name, default, type or choices, meaning; then those without effect here and those refused."""
    import textwrap

    def paragraph(text):
        print(textwrap.fill(text, 118, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False))

    for name, spec in KEYS.items():
        about, default = spec.metadata, getattr(Config(), name)
        if about["group"]:
            print(f"\n### {about['group']}")
        shown = ",".join(default) if isinstance(default, list) else str(default if default != {} else None)
        kind = "|".join(about["choices"]) or spec.type.removesuffix(" | None").lower()
        print(f"{name}: {shown.lower()}    ({kind})")
        paragraph(about["help"] + (" [not a key of LLaMA-Factory]" if name in OWN_KEYS else ""))
    print("\n### accepted, no effect here")
    for reason, names in NO_EFFECT.items():
        print(f"{reason}:")
        paragraph(", ".join(names.split()))
    print("\n### refused, because the result would be another")
    for _, names, sentence in REFUSED:
        print(", ".join(item.replace("=", " other than ") for item in names.split()) + ":")
        paragraph(sentence)


def main(argv):
    """python config.py --keys"""
    if argv != ["--keys"]:
        raise ValueError("usage: python config.py --keys   (python -m runtime.load_config FILE key=value shows a config)")
    print_keys()


if __name__ == "__main__":
    run_script(main)
