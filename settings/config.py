"""Settings: the table of keys, with the names and defaults of LLaMA-Factory.

    python -m settings.config --keys             every key: default, type, meaning
    python -m settings.load_config my.yaml       what this file sets, without running anything

A key is in exactly one of three tables:

- `Config`: it has an effect here;
- `NO_EFFECT`: LLaMA-Factory has it, and the result here is the same without it. The scripts list
  such keys by name at the start;
- `REFUSED`: leaving it out would change the result. It is an error that says what to do instead.

Any other key is a spelling mistake. settings/load_config.py reads files and command lines.

Requires: errors.py.
Next: data.py, train.py.

Sources: key names and defaults of LLaMA-Factory 0.9.5 (github.com/hiyouga/LLaMA-Factory,
src/llamafactory/hparams) and of transformers 5.6 TrainingArguments.
"""
from __future__ import annotations

import math
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from errors import run_script

# ---- types of values, beside Python's own

Steps = float       # optimizer steps: a count, or below 1 a share of all steps; see in_steps
Words = list        # words separated by blanks or commas
Format = object     # a chat format: its name, or a mapping that text/chat_formats.py reads
JsonFile = object   # a JSON file, or the mapping itself

# ---- on_resume: what happens if a run is resumed with another value of a key

FIXED = "fixed"         # an error: the trained parameters would be different ones
DATA = "data"           # an error without force_resume: changes rows, order, tokens or base model
FREE = "free"           # it applies from the first resumed step on; listed at the start
IGNORED = "ignored"     # not compared: folders, what is printed, keys of other scripts


def key(
    default: object,
    on_resume: str,
    help: str,
    *,
    group: str | None = None,
    own: bool = False,
    only: str = "",
    choices: Collection[str] = (),
    later: Collection[str] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
):
    """One row of the table: a dataclass field whose metadata are the arguments but the default.

    group: title of the rows from here on. own: not a key of LLaMA-Factory. only: the finetuning
    types, stages or scripts that read the key. choices: the valid values. later: values that
    LLaMA-Factory has and this release has not. low, high: bounds, inclusive; above, below:
    exclusive ones.
    """
    row = dict(
        on_resume=on_resume, help=help, group=group, own=own, only=tuple(only.split()),
        choices=choices, later=later, low=low, above=above, high=high, below=below,
    )
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=row)
    return field(default=default, metadata=row)


@dataclass
class Config:
    """The settings of a run, made by load_config. One field per key, and four more at the end."""

    model_name_or_path: str | None = key(None, DATA,
        "folder with config.json and weights, or a hub id", group="model")
    adapter_name_or_path: list[str] | None = key(None, DATA,
        "adapter folders; training merges all but the last into the base")
    model_revision: str = key("main", DATA, "branch, tag or commit of a hub id")
    cache_dir: str | None = key(None, IGNORED,
        "folder for downloads (none: the hub's own cache, see HF_HOME)")
    train_from_scratch: bool = key(False, FIXED,
        "start from random weights; only config.json and tokenizer are read")
    resize_vocab: bool = key(False, FIXED,
        "more rows in embedding and head for what the tokenizer has beyond them; with adapters "
        "both are trained in full, unless additional_target says otherwise")
    add_tokens: list[str] | None = key(None, FIXED,
        "new words for the tokenizer, which get rows in embedding and head")
    add_special_tokens: list[str] | None = key(None, FIXED,
        "the same for special tokens, which are left out of answers")
    new_special_tokens_config: str | None = key(None, FIXED,
        "a yaml file of new special tokens, each with a text that says what it means")
    init_special_tokens: str = key("noise_init", FIXED,
        "new rows start as the mean of the old ones with noise (noise_init), or as the mean of "
        "the words in new_special_tokens_config",
        choices=("noise_init", "desc_init", "desc_init_w_noise"))
    base_precision: str | None = key(None, DATA,
        "fp8: keep the frozen base in 8 bits; half the memory, and faster matmuls on Hopper, Ada "
        "and MI300", own=True, choices=("fp8",))
    fp8: bool = key(False, DATA,
        "with lora: base_precision: fp8, on devices that multiply in 8 bits; weights that are "
        "trained are multiplied in 16")
    quantization_bit: int | None = key(None, DATA,
        "4 or 8: quantize the linear layers of the base while loading, and train adapters on them "
        "(QLoRA)")
    quantization_type: str = key("nf4", DATA, "the 4-bit format", choices=("nf4", "fp4"))
    double_quantization: bool = key(True, DATA,
        "4 bits: quantize the scales too, to 8 bits (4.13 bits per weight instead of 4.5)")
    quantization_method: str = key("bnb", DATA,
        "quantization format: bitsandbytes' (the package is not needed)",
        choices=("bnb",), later=("gptq", "awq", "aqlm", "quanto", "eetq", "hqq", "mxfp4", "fp8"))
    torch_compile: bool | None = key(None, IGNORED,
        "fuse norms, rotation, gate * up and the loss with torch.compile (none: on GPUs where it "
        "works)")
    flash_attn: str = key("auto", FREE,
        "attention kernel (auto: the fastest correct one; disabled: the plain implementation)",
        choices=("auto", "disabled", "sdpa", "fa2"), later=("fa3",))
    rope_scaling: str | None = key(None, FIXED,
        "stretch the positions of the base by cutoff_len / max_position_embeddings, rounded up; "
        "chat, evaluation and merging follow the training (without one: by 2)",
        choices=("linear", "dynamic", "yarn", "llama3"))
    pin_kernels: dict[str, str] = key({}, FREE,
        "compute with these and not with the fastest at the run's first start: "
        "pin_kernels.attention=sdpa-math, pin_kernels.matmul=torch, pin_kernels.threads=2",
        own=True)
    disable_gradient_checkpointing: bool = key(False, FREE,
        "keep all activations: faster, more memory")
    offload_activations: bool | None = key(None, FREE,
        "keep the inputs of checkpointed blocks in main memory (none: beside a GPU, where its "
        "memory needs it)", own=True)
    mlp_tile: int | None = key(None, FREE,
        "compute MLPs in tiles of so many tokens (none: where memory needs it; 0: never)",
        own=True, low=0)
    infer_backend: str = key("huggingface", IGNORED,
        "what generates the answers of eval.py: the program itself (LLaMA-Factory's name for that "
        "is huggingface), or vLLM, where it is installed",
        choices=("huggingface", "vllm"))
    infer_dtype: str = key("auto", IGNORED,
        "dtype of the base in chat and of the merged weights (auto: the checkpoint's)",
        choices=("auto", "float16", "bfloat16", "float32"))

    stage: str = key("sft", FIXED,
        "sft: supervised fine-tuning; pt: pre-training on plain text; dpo: pairs of a better and a "
        "worse reply; kto: replies marked good or bad; rm: a reward model; ppo and grpo: the "
        "model's own replies, by their rewards; distill: the probabilities of a teacher",
        group="method", choices=("sft", "pt", "rm", "dpo", "kto", "ppo", "grpo", "distill"))
    finetuning_type: str = key("lora", FIXED,
        "lora: low-rank adapters on frozen weights; oft: rotations of the inputs of frozen "
        "weights; full: all weights; freeze: the weights of some layers",
        choices=("lora", "oft", "full", "freeze"))
    lora_rank: int = key(8, FIXED,
        "rank r of the matrices A (r, in) and B (out, r)", only="lora", low=1, high=10**6)
    lora_alpha: int | None = key(None, FIXED,
        "the update is scaled by lora_alpha / lora_rank (none: twice the rank)", only="lora", low=1)
    lora_dropout: float = key(0.0, FIXED, "dropout on the input of A", only="lora", low=0, high=1)
    lora_target: list[str] = key(["all"], FIXED,
        "modules that get an adapter, as the checkpoint names them: last name parts "
        "(q_proj,v_proj), blocks (experts), a regular expression for full names, or all: every "
        "linear layer but head, routers, experts", only="lora oft")
    oft_rank: int = key(0, FIXED,
        "number of blocks of each rotation, with oft_block_size: 0 (0: it follows from the size)",
        only="oft", low=0, high=10**6)
    oft_block_size: int = key(32, FIXED,
        "inputs that each block of a rotation turns among themselves; where it does not divide a "
        "layer's inputs, the nearest size that does", only="oft", low=0, high=10**6)
    oft_target: list[str] = key(["all"], FIXED,
        "modules whose inputs are rotated, as in lora_target", only="oft")
    module_dropout: float = key(0.0, FIXED,
        "written into the adapter; PEFT never applies it to linear layers, so it does nothing",
        only="oft", low=0, high=1)
    additional_target: list[str] | None = key(None, FIXED,
        "further modules to train in full and save with the adapter", only="lora oft")
    use_rslora: bool = key(False, FIXED, "scale by lora_alpha / sqrt(lora_rank)")
    use_dora: bool = key(False, FIXED,
        "DoRA: train the norm of each matrix row apart from its direction")
    loraplus_lr_ratio: float | None = key(None, FREE,
        "LoRA+: learning rate of B divided by that of A", above=0)
    pissa_init: bool = key(False, FIXED,
        "PiSSA: initialize adapters with the principal components of the weights, and subtract "
        "these from the weights")
    pissa_iter: int = key(16, FIXED,
        "PiSSA: iterations of the randomized SVD (-1: exact SVD, slow)", only="lora", low=-1)
    pissa_convert: bool = key(False, FREE,
        "PiSSA: also save an ordinary adapter of twice the rank, in pissa_converted")
    adapter_prefix: str = key("peft", IGNORED,
        "served: also save the adapter in the folder served, named and laid out as vLLM and SGLang "
        "apply it (peft: as PEFT does)", own=True, only="lora merge.py", choices=("peft", "served"))
    create_new_adapter: bool = key(False, DATA,
        "merge all given adapters into the base and train a new one")
    freeze_trainable_layers: int = key(2, FIXED,
        "number of last layers to train (negative: of first layers)", only="freeze lora oft")
    use_llama_pro: bool = key(False, FIXED,
        "train the freeze_trainable_layers blocks that block expansion has inserted, every n-th, "
        "with finetuning_type freeze, lora or oft", only="freeze lora oft")
    freeze_trainable_modules: list[str] = key(["all"], FIXED,
        "modules to train in these layers, as mlp,self_attn", only="freeze")
    freeze_extra_modules: list[str] | None = key(None, FIXED,
        "parameters to train outside of the layers: all whose name contains one of these, as "
        "lm_head", only="freeze")
    pure_bf16: bool = key(False, FIXED,
        "compute in bfloat16 (as bf16: true); with full and freeze trained weights, gradients and "
        "optimizer state are bfloat16, too, while adapters stay float32, as PEFT keeps them")
    label_smoothing_factor: float = key(0.0, FREE,
        "share of each token's loss that asks for all tokens alike", only="sft pt",
        low=0, below=1)
    use_dft_loss: bool = key(False, FREE,
        "DFT: each token's loss is weighted by its probability", only="sft")
    use_eaft_loss: bool = key(False, FREE,
        "EAFT: each token's loss is weighted by the entropy of the 20 most likely ones", only="sft")
    eaft_alpha: float = key(1.0, FREE, "EAFT: exponent of that weight", only="sft", low=0)
    use_asft_loss: bool = key(False, FREE,
        "ASFT: DFT, and a divergence from the model before training", only="sft")
    asft_alpha: float = key(0.1, FREE, "ASFT: weight of the divergence", only="sft", low=0)
    pref_loss: str = key("sigmoid", FREE,
        "loss of a pair; orpo and simpo need no reference model",
        only="dpo", choices=("sigmoid", "hinge", "ipo", "orpo", "simpo"), later=("kto_pair",))
    paper_losses: bool = key(False, FREE,
        "pref_loss hinge and ipo, use_asft_loss and label_smoothing_factor by the equations of "
        "their papers (false: as LLaMA-Factory 0.9.5 computes them: the sigmoid loss; for ipo, of "
        "mean log-probabilities; ASFT and smoothed losses as a sum of micro-batch means)",
        own=True, only="dpo sft pt")
    pref_beta: float = key(0.1, FREE,
        "scale of the log-probability ratios (orpo: weight of the odds ratio)",
        only="dpo kto", above=0)
    pref_ftx: float = key(0.0, FREE,
        "weight of an additional sft loss on chosen replies", only="dpo kto", low=0)
    dpo_label_smoothing: float = key(0.0, FREE,
        "assumed share of pairs in the wrong order", only="dpo", low=0, high=0.5)
    simpo_gamma: float = key(0.5, FREE,
        "simpo: target margin between the rewards", only="dpo", low=0)
    kto_chosen_weight: float = key(1.0, FREE, "weight of desirable replies", only="kto", low=0)
    kto_rejected_weight: float = key(1.0, FREE, "weight of undesirable replies", only="kto", low=0)
    ref_model: str | None = key(None, DATA,
        "folder or hub id of the reference model (none: the base with its adapters off)",
        only="dpo kto ppo grpo")
    ref_model_adapters: list[str] | None = key(None, DATA,
        "adapter folders to merge into ref_model", only="dpo kto ppo grpo")
    reward_model: str | None = key(None, FREE,
        "what stage: rm has trained: its adapter (reward_model_type: lora), a whole model (full), "
        "or the address of a server (api)", only="ppo grpo")
    reward_model_type: str = key("lora", FREE,
        "lora: an adapter beside the base of this run; full: a second model; api: a server that "
        "answers {\"model\", \"messages\": [texts]} with {\"scores\": [numbers]}",
        only="ppo grpo", choices=("lora", "full", "api"))
    reward_model_adapters: list[str] | None = key(None, FREE,
        "full: adapters on reward_model; the value head is that of the last one", only="ppo grpo")
    reward_model_quantization_bit: int | None = key(None, FREE,
        "full: 4 or 8 bits for its linear layers", only="ppo grpo")
    reward: list[str] | None = key(None, FREE,
        "functions that score a reply, as rewards.py:score, called with prompt, answer and the row",
        own=True, only="ppo grpo")
    reward_weights: list[float] | None = key(None, FREE,
        "weights of these and then of reward_model, as 1,0.2 (none: 1 each)", own=True,
        only="ppo grpo")
    reward_timeout: float = key(10.0, FREE,
        "seconds that a reward function may take, or a server for its scores", own=True,
        only="ppo grpo", above=0)
    ppo_buffer_size: int = key(1, DATA,
        "optimizer steps whose prompts are answered together", only="ppo", low=1)
    ppo_epochs: int = key(4, DATA,
        "passes over these replies, before new ones are sampled", only="ppo", low=1)
    ppo_score_norm: bool = key(False, FREE,
        "subtract the mean of all scores so far, and divide by their spread", only="ppo")
    ppo_whiten_rewards: bool = key(False, FREE,
        "divide the rewards of tokens by their spread", only="ppo")
    ppo_target: float = key(6.0, FREE,
        "divergence of a reply from the model without its adapters at which kl_beta stays as it "
        "is; above it rises, below it falls", only="ppo", above=0)
    num_generations: int = key(8, FREE,
        "replies sampled for each prompt; its group", own=True, only="grpo", low=2)
    num_iterations: int = key(1, DATA,
        "optimizer steps on the same replies, before new ones are sampled", own=True,
        only="grpo distill", low=1)
    policy_loss: str = key("dapo", FREE,
        "what a token of a reply counts, and how far a step may go; see methods/policy_losses.py",
        own=True, only="grpo", choices=("dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"))
    epsilon: float = key(0.2, FREE,
        "a ratio of probabilities below 1 - epsilon is clipped (ppo: above 1 + epsilon, too)",
        own=True, only="ppo grpo", low=0)
    epsilon_high: float | None = key(None, FREE,
        "a ratio above 1 + epsilon_high is clipped (none: epsilon)", own=True, only="grpo", low=0)
    scale_rewards: bool = key(True, FREE,
        "divide a group's advantages by the spread of its rewards (false: as Dr. GRPO)",
        own=True, only="grpo")
    mask_truncated: bool = key(False, FREE,
        "no loss on replies that max_new_tokens has cut off", own=True, only="grpo")
    kl_beta: float = key(0.0, FREE,
        "weight of the divergence from the model without its adapters (ppo: 0.2 at the start, if "
        "it is not set, and then as ppo_target wants it; 0: none)", own=True, only="ppo grpo",
        low=0)
    teacher_model: str | None = key(None, DATA,
        "folder or hub id of the model to learn from, with the tokenizer of the trained one (none: "
        "the base, with teacher_adapters)", own=True, only="distill")
    teacher_adapters: list[str] | None = key(None, DATA,
        "adapter folders of the teacher", own=True, only="distill")
    teacher_quantization_bit: int | None = key(None, DATA,
        "4 or 8: quantize the teacher while loading (none: quantization_bit if the teacher is the "
        "base, else not)", own=True, only="distill")
    distill_beta: float = key(0.5, FREE,
        "0: the divergence KL(teacher || student); 1: KL(student || teacher); between: the "
        "generalized Jensen-Shannon divergence", own=True, only="distill", low=0, high=1)
    distill_temperature: float = key(1.0, FREE,
        "divides the logits of teacher and student in the divergence", own=True, only="distill",
        above=0)
    distill_lambda: float = key(0.5, DATA,
        "share of rows whose reply the trained model samples anew (0: learn on the rows as they "
        "are; 1: on its own replies alone)", own=True, only="distill", low=0, high=1)

    dataset: list[str] | None = key(None, DATA,
        "names in dataset_info.json, or paths of data files", group="dataset")
    eval_dataset: list[str] | None = key(None, DATA, "the same, for evaluation")
    dataset_dir: str = key("data", DATA, "folder of dataset_info.json and its files")
    template: Format | None = key(None, DATA,
        "chat format: a name, or your own, see docs/templates.md (none: chosen from the "
        "checkpoint)")
    force_template: bool = key(False, FREE,
        "use a template that does not fit this tokenizer or adapter", own=True)
    split_special_tokens: bool = key(False, DATA,
        "treat special tokens in the data as ordinary text")
    cutoff_len: int = key(2048, DATA,
        "maximum length of a row in tokens; longer ones are truncated", low=1)
    max_samples: int | None = key(None, DATA,
        "maximum number of rows to read from each dataset", low=1)
    streaming: bool = key(False, IGNORED,
        "accepted: rows are never all in memory here, but tokenized to disk before the first step")
    mix_strategy: str = key("concat", DATA,
        "several datasets: one after the other, or row by row until one is used up (under) or all "
        "are (over)", choices=("concat", "interleave_under", "interleave_over"),
        later=("interleave_once",))
    interleave_probs: list[float] | None = key(None, DATA,
        "probability of each dataset to give the next row, as 0.7,0.3 (none: they take turns)")
    val_size: float = key(0.0, DATA,
        "rows held out for evaluation: a share below 1, or a count", low=0)
    packing: bool | None = key(None, DATA,
        "fill rows up to cutoff_len with several samples (none: only in stage pt)")
    neat_packing: bool = key(False, DATA,
        "no attention between packed samples (packing: true turns it on, unless this is set to "
        "false)")
    train_on_prompt: bool = key(False, DATA, "compute loss on the prompt too")
    mask_history: bool = key(False, DATA, "compute loss only on the last reply of a conversation")
    default_system: str | None = key(None, DATA,
        "system text for rows without one (none: the template's)")
    enable_thinking: bool | None = key(True, DATA,
        "reasoning templates: train replies without a thought with an empty one")
    preserve_thinking: bool = key(False, DATA,
        "reasoning templates: keep the thoughts of earlier replies")
    tool_format: str | None = key(None, DATA, "format of tool calls (none: the template's)")
    placeholders: dict[str, str] = key({}, DATA,
        "replacements for {{name}}-like marks in the data, as placeholders.name=Pip", own=True)
    skip_bad_rows: bool = key(False, DATA,
        "skip and count unusable rows instead of stopping", own=True)
    tokenized_path: str | None = key(None, IGNORED,
        "folder of the tokenized rows (none: `tokenised` in output_dir)")
    overwrite_cache: bool = key(False, IGNORED, "tokenize again even if tokenized rows exist")
    preprocessing_num_workers: int | None = key(None, IGNORED,
        "number of processes that tokenize (none: one per core)", low=1)
    preprocessing_batch_size: int = key(1000, DATA,
        "number of rows that packing may combine", low=1)
    disable_shuffling: bool = key(False, DATA, "keep the rows in their order")
    dataloader_drop_last: bool = key(False, DATA, "drop an incomplete last batch")

    output_dir: str | None = key(None, IGNORED,
        "folder for adapter, logs and checkpoints", group="output")
    overwrite_output_dir: bool = key(False, IGNORED,
        "train into a folder that holds an earlier run")
    resume_from_checkpoint: str | None = key(None, IGNORED,
        "a checkpoint folder, or true / auto: the newest in output_dir")
    logging_steps: Steps = key(500, FREE, "steps between log lines", above=0)
    logging_strategy: str = key("steps", FREE,
        "when to write a log line", choices=("no", "steps", "epoch"))
    logging_first_step: bool = key(False, FREE, "log step 1 too")
    plot_loss: bool = key(False, IGNORED, "draw training_loss.png (needs matplotlib)")
    ask: list[str] = key([], FREE,
        "questions that the model answers before the first step and after the last", own=True)
    report_to: list[str] = key([], IGNORED,
        "dashboards to report to: tensorboard, wandb, swanlab, mlflow, all, none")
    run_name: str | None = key(None, IGNORED, "name of the run in dashboards")
    logging_dir: str | None = key(None, IGNORED,
        "folder for tensorboard (none: `runs` in output_dir)")
    project: str = key("huggingface", IGNORED,
        "project in wandb, experiment in mlflow (if not set: their own settings)")
    use_swanlab: bool = key(False, IGNORED, "the same as report_to: swanlab")
    swanlab_project: str = key("llamafactory", IGNORED, "project in swanlab")
    swanlab_workspace: str | None = key(None, IGNORED, "workspace in swanlab")
    swanlab_run_name: str | None = key(None, IGNORED, "name of the run in swanlab (none: run_name)")
    swanlab_mode: str = key("cloud", IGNORED,
        "cloud: upload the run; local: keep it in swanlab_logdir", choices=("cloud", "local"))
    swanlab_logdir: str | None = key(None, IGNORED, "folder for swanlab")
    disable_tqdm: bool | None = key(None, IGNORED, "no progress bar")
    save_strategy: str = key("steps", FREE,
        "when to write checkpoints (best: after each evaluation with the lowest loss so far)",
        choices=("no", "steps", "epoch", "best"))
    save_steps: Steps = key(500, FREE, "steps between checkpoints", above=0)
    save_total_limit: int | None = key(None, FREE, "maximum number of checkpoints to keep", low=1)
    save_only_model: bool = key(False, FREE,
        "checkpoints without optimizer state (cannot be resumed)")

    per_device_train_batch_size: int = key(8, FREE, "rows per micro-batch", group="train", low=1)
    gradient_accumulation_steps: int = key(1, FREE, "micro-batches per optimizer step", low=1)
    rows_per_step: int | None = key(None, FREE,
        "rows of an optimizer step over all ranks; gradient_accumulation_steps follows from it, "
        "and a run can be resumed with another number of ranks", own=True, low=1)
    join_micro_batches: bool = key(True, FREE,
        "merge small micro-batches of a step where memory allows: the same sum, a busier GPU",
        own=True)
    token_budget: int | None = key(None, DATA,
        "form micro-batches from rows of similar length with at most this many tokens, instead of "
        "per_device_train_batch_size rows", own=True, low=1)
    num_train_epochs: float = key(3.0, FREE, "passes over the data", above=0, high=10**9)
    max_steps: int = key(-1, FREE,
        "number of optimizer steps; overrides num_train_epochs (-1: off)", low=-1)
    learning_rate: float = key(5e-5, FREE, "peak learning rate", above=0)
    lr_scheduler_type: str = key("linear", FREE,
        "learning-rate schedule after the warm-up",
        choices=(
            "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
            "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
            "cosine_warmup_with_min_lr", "reduce_lr_on_plateau", "greedy",
        ))
    lr_scheduler_kwargs: dict = key({}, FREE,
        "further settings of the schedule, as lr_scheduler_kwargs.min_lr=1e-6")
    warmup_ratio: Steps | None = key(None, FREE,
        "share of all steps in which the learning rate rises from 0", low=0)
    warmup_steps: Steps = key(0, FREE, "the same as a count", low=0)
    optim: str = key("adamw_torch_fused", FIXED,
        "optimizer: AdamW; names with 8bit keep its state in 8 bits",
        choices=(
            "adamw_torch_fused", "adamw_torch", "adamw_hf", "adamw_8bit", "adamw_bnb_8bit",
            "paged_adamw_8bit"
        ))
    use_adam_mini: bool = key(False, FIXED,
        "Adam-mini: AdamW with one second moment for each row, or each head of q and k")
    use_muon: bool = key(False, FIXED,
        "Muon for matrices, AdamW for embedding, head and all other parameters")
    use_galore: bool = key(False, FIXED,
        "GaLore: AdamW on low-rank projections of the gradients; with full or freeze")
    galore_target: list[str] = key(["all"], FIXED,
        "GaLore: matrices whose name contains one of these, as mlp,self_attn (all: all but "
        "embedding and head)")
    galore_rank: int = key(16, FIXED, "GaLore: rank of the projection", low=1)
    galore_layerwise: bool = key(False, FREE,
        "GaLore: as LLaMA-Factory updates layer by layer, which excludes clipping (max_grad_norm) "
        "and gradient_accumulation_steps")
    galore_update_interval: int = key(200, FREE,
        "GaLore: steps between updates of the projection", low=1)
    galore_scale: float = key(2.0, FREE, "GaLore: scale of the update", above=0)
    use_apollo: bool = key(False, FIXED,
        "APOLLO: gradients scaled as AdamW would, judged by a random projection of them; with full "
        "or freeze")
    apollo_target: list[str] = key(["all"], FIXED,
        "APOLLO: matrices whose name contains one of these (all: all but embedding and head)")
    apollo_rank: int = key(16, FIXED, "APOLLO: rank of the projection", low=1)
    apollo_update_interval: int = key(200, FREE,
        "APOLLO: steps between updates of the projection", low=1)
    apollo_scale: float = key(32.0, FREE, "APOLLO: scale of the update, squared", above=0)
    apollo_proj: str = key("random", FIXED,
        "APOLLO: the projection: random, or the gradient's singular directions",
        choices=("random", "svd"))
    apollo_scale_type: str = key("channel", FREE,
        "APOLLO: one factor for each row or column, or for a matrix", choices=("channel", "tensor"))
    apollo_scale_front: bool = key(False, FREE, "APOLLO: scale before the norm's growth is limited")
    apollo_layerwise: bool = key(False, FIXED,
        "APOLLO: as LLaMA-Factory updates layer by layer, see galore_layerwise")
    use_badam: bool = key(False, FIXED,
        "BAdam: AdamW on one layer at a time, with the memory of one; with full")
    badam_mode: str = key("layer", FIXED,
        "BAdam: what is trained at a time: a layer, or a share of the entries of each weight",
        choices=("layer", "ratio"))
    badam_start_block: int | None = key(None, FIXED,
        "BAdam: number of the first layer to train (none: the first, or the last)", low=0)
    badam_switch_mode: str = key("ascending", FIXED,
        "BAdam: the order of the layers", choices=("ascending", "descending", "random", "fixed"))
    badam_switch_interval: int = key(50, FIXED,
        "BAdam: steps between layers (-1: the first one only)", low=-1)
    badam_update_ratio: float = key(0.05, FIXED,
        "BAdam, mode ratio: the share of each weight that is trained", above=1e-6, high=1)
    badam_mask_mode: str = key("adjacent", FIXED,
        "BAdam, mode ratio: entries that lie side by side, or at random places",
        choices=("adjacent", "scatter"))
    badam_verbose: int = key(0, FREE,
        "BAdam: print what is trained when it changes (2: with the names)", low=0, high=2)
    weight_decay: float = key(0.0, FREE, "decoupled weight decay (not on biases and norms)", low=0)
    adam_beta1: float = key(0.9, FREE, "AdamW: decay rate of the first moment", low=0, below=1)
    adam_beta2: float = key(0.999, FREE, "AdamW: decay rate of the second moment", low=0, below=1)
    adam_epsilon: float = key(1e-8, FREE, "AdamW: epsilon in the denominator", low=0)
    max_grad_norm: float | None = key(1.0, FREE,
        "maximum gradient norm (0 or none: no clipping)", low=0)
    moe_aux_loss_coef: float | None = key(None, FREE,
        "weight of the load-balancing loss of mixtures of experts", low=0)
    neftune_noise_alpha: float | None = key(None, FREE,
        "NEFTune: noise on the embeddings in training", low=0)
    even_batches: bool = key(True, DATA,
        "several ranks: fill up the last batches with rows from the start of the epoch", own=True)
    ddp_timeout: int = key(180_000_000, FREE,
        "several ranks: seconds to wait for the other ranks", above=0, high=10**10)
    tensor_parallel_size: int = key(1, FREE,
        "cut every matrix of the model over so many processes, which train on the same rows (lora "
        "and full)", own=True, low=1, high=4096)
    pipeline_parallel_size: int = key(1, FREE,
        "share the layers of the model out to so many processes, which pass micro-batches on (lora "
        "and full)", own=True, low=1, high=4096)
    context_parallel_size: int = key(1, FREE,
        "cut every row over so many processes, which exchange tokens for heads in attention: for "
        "rows that are too long for one card", own=True, low=1, high=4096)
    expert_parallel_size: int = key(1, FREE,
        "deal the experts of each layer out to so many processes, which train on rows of their own "
        "(lora and full)", own=True, low=1, high=4096)
    fsdp: Words = key([], FREE,
        "several ranks: full_shard gives each rank a shard of the weights; full_shard offload "
        "keeps the shards in CPU memory")
    zero_stage: int = key(0, FREE,
        "several ranks: 1 shards the optimizer state over the ranks, 2 the gradients, too (ZeRO); "
        "weights stay whole", own=True, low=0, high=3)
    offload_optimizer: str | None = key(None, FREE,
        "keep the optimizer state in main memory (cpu), or in a file in output_dir (nvme)",
        own=True, choices=("cpu", "nvme"))
    deepspeed: str | None = key(None, FREE,
        "a DeepSpeed file: ZeRO stages 1 and 2 are zero_stage here, stage 3 is fsdp: full_shard; "
        "with offload, offload_optimizer or full_shard offload")
    use_hyper_parallel: bool = key(False, FREE,
        "LLaMA-Factory's other way to fsdp: full_shard, with the sizes of hyper_parallel_args")
    hyper_parallel_args: JsonFile | None = key(None, FREE,
        "a JSON file or a mapping: cp_size is context_parallel_size, tp_size tensor_parallel_size")
    time_limit: float | None = key(None, IGNORED,
        "minutes after which the run saves and stops (exit code 75)", own=True, above=0)
    profile: bool = key(False, IGNORED,
        "show where the time of a few steps goes, and write a trace of them", own=True)
    dry_run: bool = key(False, IGNORED,
        "show data, steps and the memory needed, then stop; weights are not read", own=True)
    cards: int | None = key(None, IGNORED,
        "dry_run: say which layout to take on so many cards (zero_stage, fsdp, …), and why",
        own=True, low=1, high=10**6)
    card_memory: float | None = key(None, IGNORED,
        "dry_run: GiB of each card", own=True, above=0)
    card_speed: float | None = key(None, IGNORED,
        "dry_run: TFLOP/s of a card's matrix products, for the seconds of a step "
        "(python -m runtime.throughput measures them)", own=True, above=0)
    link_speed: list[float] = key([], IGNORED,
        "dry_run: GB/s that a card sends over the slowest link; several for several columns",
        own=True)
    force_resume: bool = key(False, IGNORED,
        "resume although data, template or seed have changed", own=True)
    bf16: bool = key(False, FREE, "compute in bfloat16")
    fp16: bool = key(False, FREE, "compute in float16, with loss scaling")
    use_cpu: bool = key(False, FREE, "run on the CPU even if there is a GPU")
    seed: int = key(42, DATA,
        "seed of shuffling, split, initial weights and dropout", low=0, high=2**32 - 1)
    full_determinism: bool = key(False, FREE,
        "deterministic kernels only, chosen without timing: a second run gives the same bits")
    ignore_data_skip: bool = key(False, FREE,
        "resume with the first rows of the epoch instead of the row after the last one")
    data_seed: int | None = key(None, DATA,
        "separate seed for the order of the rows", low=0, high=2**32 - 1)

    do_eval: bool = key(False, FREE,
        "evaluate at the end (also on if eval_strategy is steps or epoch)", group="eval")
    eval_strategy: str = key("no", FREE, "when to evaluate", choices=("no", "steps", "epoch"))
    eval_steps: Steps | None = key(None, FREE,
        "steps between evaluations (none: logging_steps)", above=0)
    bf16_full_eval: bool = key(False, FREE,
        "evaluate in bfloat16: in train.py as training does with bf16: true, in eval.py alone")
    fp16_full_eval: bool = key(False, FREE, "the same in float16, with fp16: true")
    eval_delay: float = key(0, FREE,
        "steps (eval_strategy: epoch: epochs) before the first evaluation", low=0)
    compute_accuracy: bool = key(False, FREE,
        "evaluation also counts how often a label is the most likely token: eval_accuracy",
        only="sft")
    eval_on_start: bool = key(False, FREE, "evaluate before the first step, too")
    eval_on_each_dataset: bool = key(False, DATA,
        "evaluate on each dataset of eval_dataset by itself: eval_NAME_loss for each")
    per_device_eval_batch_size: int = key(8, FREE,
        "rows per evaluation batch; replies generated at a time", low=1)
    load_best_model_at_end: bool = key(False, FREE,
        "finish with the checkpoint of the lowest evaluation loss")
    metric_for_best_model: str | None = key(None, FREE,
        "metric that decides (both mean eval_loss)", choices=("loss", "eval_loss"))
    early_stopping_steps: int | None = key(None, FREE,
        "stop after this many evaluations without improvement", low=1)
    do_train: bool | None = key(None, IGNORED,
        "false: train.py stops (none: it trains, unless do_predict is on)")
    do_predict: bool = key(False, IGNORED,
        "eval.py: generate replies to the evaluation rows and score them; train.py with do_train: "
        "true does so after training")
    predict_with_generate: bool = key(False, IGNORED, "the same in eval.py")
    task: str | None = key(None, IGNORED,
        "multiple choice, as mmlu_test, ceval_validation, or a csv file or folder of them",
        only="eval.py")
    task_dir: str = key("evaluation", IGNORED, "folder of the named tasks", only="eval.py")
    lang: str = key("en", IGNORED,
        "language of the question prompts", only="eval.py", choices=("en", "zh"))
    n_shot: int = key(5, IGNORED,
        "number of questions of the dev split to show with their answers", only="eval.py", low=0)
    save_dir: str | None = key(None, IGNORED,
        "new folder for the results of a task (none: output_dir)", only="eval.py")
    compare: bool = key(True, IGNORED,
        "also evaluate the base and, in export_dir, the merged model", own=True, only="eval.py")

    do_sample: bool = key(True, IGNORED,
        "sample from the distribution; false: greedy decoding", group="generate")
    temperature: float = key(0.95, FREE,
        "below 1 sharper, above 1 flatter (0: greedy decoding; stages grpo and distill sample with "
        "1 if it is not set)", low=0)
    top_p: float = key(0.7, FREE,
        "sample from the most likely tokens that together have this probability (stages grpo and "
        "distill: 1 if it is not set)", low=0, high=1)
    top_k: int = key(50, FREE,
        "sample from this many most likely tokens (0: all; stages grpo and distill: all if it is "
        "not set)", low=0)
    repetition_penalty: float = key(1.0, IGNORED,
        "above 1: earlier tokens become less likely", above=0)
    max_new_tokens: int = key(1024, FREE,
        "maximum length of a reply in tokens (0: max_length applies)", low=0)
    max_length: int = key(1024, IGNORED,
        "maximum length of prompt and reply together, if max_new_tokens is 0", low=1)
    skip_special_tokens: bool = key(True, IGNORED, "do not print special tokens of the reply")
    prompt: str | None = key(None, IGNORED, "reply to this and exit", own=True, only="chat.py")
    fast_chat: bool = key(True, IGNORED,
        "merge the adapter and rearrange the weights for speed (false: as in training)",
        own=True, only="chat.py eval.py")
    raw: bool = key(False, IGNORED,
        "show the rendered prompt as ids and text", own=True, only="chat.py")

    input: str | None = key(None, IGNORED,
        "answer the rows of this file (prompt or messages), and exit", own=True, only="chat.py")
    output: str | None = key(None, IGNORED,
        "the file for these answers; those it holds already are kept", own=True, only="chat.py")

    host: str = key("127.0.0.1", IGNORED,
        "address that the server listens at; another one than this machine's own needs API_KEY",
        group="serve", own=True, only="serve.py")
    port: int = key(8000, IGNORED,
        "its port (0: any free one)", own=True, only="serve.py", low=0, high=65535)
    max_num_seqs: int = key(16, IGNORED,
        "answers that are decoded together", own=True, only="serve.py", low=1, high=4096)
    max_queued_requests: int = key(128, IGNORED,
        "answers that may wait for a place; further ones get status 429", own=True,
        only="serve.py", low=0)

    jsonl: str | None = key(None, IGNORED,
        "write all processed rows to this file", group="show", own=True, only="runtime.preview")

    export_dir: str | None = key(None, IGNORED, "folder for the merged model", group="export")
    merge_base: str = key("dequantised", IGNORED,
        "for an adapter trained on a 4- or 8-bit base: merge it into that base, dequantized to 16 "
        "bits, or into the original weights",
        own=True, only="merge.py", choices=("dequantised", "original"))
    export_size: float = key(5, IGNORED,
        "maximum size of a weight file in GB (10^9 bytes)", only="merge.py", above=0, high=10**9)
    export_device: str = key("cpu", IGNORED,
        "device that computes the merge", only="merge.py", choices=("cpu", "auto", "cuda"))
    overwrite: bool = key(False, IGNORED,
        "replace an existing export_dir", own=True, only="merge.py")
    check: str | None = key(None, IGNORED,
        "write nothing; compare the losses of this exported folder with the base's and adapter's",
        own=True, only="merge.py")
    check_adapter: str | None = key(None, IGNORED,
        "write nothing; say which layers of the adapter in this folder PEFT, vLLM, SGLang and "
        "llama.cpp apply", own=True, only="merge.py")
    export_format: str | None = key(None, IGNORED,
        "write the merged model in another format: gguf: a file for llama.cpp; gguf-lora: its "
        "adapter alone; peft: the adapter alone in PEFT's format, see adapter_prefix; fp8, w4a16: "
        "8 and 4 bits by compressed-tensors; bnb-nf4: 4 bits by bitsandbytes; base: that of a "
        "base in 8 or 4 bits (GPTQ, AWQ, ...). export_quantization_bit writes GPTQ", own=True,
        only="merge.py",
        choices=("gguf", "gguf-lora", "peft", "fp8", "w4a16", "bnb-nf4", "base"))
    gguf_type: str | None = key(None, IGNORED,
        "numbers of its matrices (none: f16, or bf16 as the base); smaller ones: llama-quantize",
        own=True, only="merge.py", choices=("f32", "f16", "bf16", "q8_0", "q4_0"))
    gguf_pretokenizer: str | None = key(None, IGNORED,
        "how llama.cpp splits texts into words (none: it is recognized)", own=True,
        only="merge.py",
        choices=("llama-bpe", "dbrx", "qwen2", "gpt-2", "smollm", "tekken", "deepseek-v3",
                 "deepseek-llm"))
    export_quantization_bit: int | None = key(None, IGNORED,
        "quantize the model to 2, 3, 4 or 8 bits by GPTQ, in groups of 128 columns (no adapter)",
        only="merge.py")
    export_quantization_dataset: str | None = key(None, IGNORED,
        "its calibration: a file or hub id of rows with `text`", only="merge.py")
    export_quantization_nsamples: int = key(128, IGNORED,
        "rows drawn for it, by the seed", only="merge.py", low=1)
    export_quantization_maxlen: int = key(1024, IGNORED,
        "tokens of a row; shorter texts are not drawn", only="merge.py", low=1)
    export_quantization_desc_act: bool = key(False, IGNORED,
        "act-order: round columns with large inputs first (nearer, slower in some servers)",
        own=True, only="merge.py")

    # the values that were set explicitly, by key
    given: dict = field(default_factory=dict, repr=False)
    # the config file, for messages
    source: str = field(default="command line", repr=False)
    # keys of NO_EFFECT and the like that were set; see ignored_keys in settings/load_config.py
    no_effect: list[str] = field(default_factory=list, repr=False)
    # what the start page says about settings that mean something else here
    notes: list[str] = field(default_factory=list, repr=False)

    # ---- questions about a stage, for the files below this folder

    @property
    def compares_replies(self) -> bool:
        """Whether the run trains on pairs, or on replies marked good or bad."""
        return self.stage in COMPARED

    @property
    def samples_replies(self) -> bool:
        """Whether the run trains on replies that its model samples."""
        return self.stage in SAMPLED and (self.stage != "distill" or self.distill_lambda > 0)

    @property
    def plain_cross_entropy(self) -> bool:
        """Whether the loss is the cross-entropy of the labels, all with the same weight.

        fast/head_in_tiles.py computes no other.
        """
        return self.stage in ("pt", "sft") and not (
            self.use_dft_loss or self.use_eaft_loss or self.use_asft_loss
            or self.label_smoothing_factor)

    @property
    def has_reference(self) -> bool:
        """Whether the run compares its model with a frozen reference model."""
        if self.stage == "sft":
            return self.use_asft_loss
        if self.stage == "grpo":
            return self.kl_beta > 0
        if self.stage == "dpo":
            return self.pref_loss not in ("orpo", "simpo")
        return self.stage in ("kto", "ppo")

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on the same sampled replies; 1 in other stages."""
        if self.stage == "ppo":
            return self.ppo_epochs * self.ppo_buffer_size
        return self.num_iterations

    @property
    def batches_per_rollout(self) -> int:
        """Micro-batches of a rank whose prompts are answered together; else those of a step."""
        buffers = self.ppo_buffer_size if self.stage == "ppo" else 1
        return self.gradient_accumulation_steps * buffers


KEYS = {spec.name: spec for spec in fields(Config) if "help" in spec.metadata}


# ---- keys of LLaMA-Factory without effect here --------------------------------------------------

TEXT_ONLY = "the models read text only"
NO_EFFECT = {       # why the result is the same without them: the keys
    "no remote code is executed; tokenizers are always the fast ones":
        "trust_remote_code use_fast_tokenizer",
    "weights are memory-mapped and copied straight to the device":
        "low_cpu_mem_usage offload_folder",
    "rows are read from one file of token ids when their step comes": """
        data_shared_file_system dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor remove_unused_columns label_names
        length_column_name sortish_sampler""",
    "changes speed or memory only": """
        batch_size use_unsloth use_unsloth_gc
        enable_liger_kernel use_liger_kernel liger_kernel_config
        use_reentrant_gc gradient_checkpointing gradient_checkpointing_kwargs use_v1_kernels
        use_kv_cache use_cache torch_compile_backend torch_compile_mode torch_empty_cache_steps
        auto_find_batch_size tf32 jit_mode_eval torchdynamo fp16_backend half_precision_backend
        fp16_opt_level""",
    "norms, softmax and loss are always computed in float32":
        "upcast_layernorm upcast_lmhead_output",
    "gradients are summed without DDP; the loss is a mean over the tokens of all ranks": """
        average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank master_addr master_port
        ray_num_workers ray_init_kwargs log_on_each_node save_on_each_node use_mps_device""",
    "parameters, tokens and speed are always shown; NaN is never hidden": """
        print_param_status debug include_num_input_tokens_seen include_tokens_per_second
        include_effective_tokens_per_second log_level log_level_replica logging_nan_inf_filter
        skip_memory_metrics prediction_loss_only eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps include_for_metrics batch_eval_metrics
        restore_callback_states_from_checkpoint enable_jit_checkpoint enable_torch_profiler
        profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
        profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack
        profile_modules""",
    "weights are written as safetensors": "export_legacy_format",
    TEXT_ONLY: """
        image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches image_resolution
        video_resolution video_max_pixels video_min_pixels video_fps video_maxlen
        use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower
        freeze_multi_modal_projector freeze_language_model""",
    "adapters are on linear layers only; additional_target trains an embedding in full":
        "loraplus_lr_embedding",
    "every block is sharded by itself; the words of fsdp choose the rest":
        "fsdp_config fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params",
    "settings of a feature that is off or refused": """
        buffer_size eval_num_beams quantization_device_map length_penalty swanlab_lark_webhook_url
        swanlab_lark_secret trackio_space_id trackio_bucket_id trackio_static_space_id
        fp8_backend fp8_enable_fsdp_float8_all_gather optim_target_modules
        generation_max_length generation_num_beams generation_config hub_token hub_private_repo
        hub_model_id hub_strategy hub_always_push hub_revision ms_hub_token om_hub_token
        kt_weight_path kt_config kt_backend kt_non_expert_weight_path kt_expert_weight_format
        kt_cpu_activation kt_num_threads kt_threadpool_count kt_tp_enabled kt_max_cache_depth
        kt_weight_lifecycle kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num
        kt_lora_expert_intermediate_size vllm_maxlen vllm_gpu_util vllm_enforce_eager
        vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size
        sglang_config sglang_lora_backend""",
}


VISION_KEYS = NO_EFFECT[TEXT_ONLY].split()


# ---- keys of LLaMA-Factory that would change the result -----------------------------------------


# rows: the script that refuses (any: all of them); the keys, where key=x accepts the value x and
# a key alone accepts false, 0 and null; what to do
REFUSED = (
    ("train", "parallelism_config use_mca use_ray",
     "leave it out: torchrun --nproc-per-node N train.py runs on N GPUs; fsdp: full_shard shards a "
     "model that does not fit on one, tensor_parallel_size: N (tp_size, "
     "tensor_model_parallel_size) cuts its matrices, pipeline_parallel_size: N shares out its "
     "layers, and context_parallel_size: N (cp_size) cuts its rows"),
    ("train", "use_kt",
     "KTransformers keeps experts in CPU memory, some in 8 bits; leave it out, or use fsdp: "
     "full_shard offload or quantization_bit: 4"),
    ("train", "mixture_of_depths shift_attn",
     "not in this release yet; LoRA (also use_rslora, use_dora, loraplus_lr_ratio) and "
     "finetuning_type: full are"),
    ("train", "galore_proj_type=std apollo_proj_type=std",
     "GaLore and APOLLO project the shorter side (std); leave it out"),
    ("train", "pref_bco_weight ld_alpha ref_model_quantization_bit",
     "not in this release; pref_loss, pref_beta and pref_ftx are, and ref_model in the precision "
     "of the base"),
    ("train", "ignore_pad_token_for_loss=true", "padding never carries loss here"),
    ("train", "group_by_length train_sampling_strategy=random",
     "rows are shuffled or, with disable_shuffling: true, in their order; no padding is computed "
     "either way"),
    ("train", "swanlab_api_key",
     "a secret does not belong in a config: run `swanlab login` or set SWANLAB_API_KEY"),
    ("train", "greater_is_better", "the best model is the one with the lowest loss"),
    ("train", "optim_args", "set adam_beta1, adam_beta2, adam_epsilon"),
    ("train", "accelerator_config",
     "not read here; per_device_train_batch_size and gradient_accumulation_steps are"),
    ("train", "save_safetensors=true", "weights are written as safetensors only"),
    ("train", "push_to_hub", "upload the finished folder yourself: hf upload NAME FOLDER"),
    ("merge", "export_hub_model_id",
     "upload the finished folder yourself: hf upload NAME FOLDER"),
    ("any", "adapter_folder", "write the whole path in adapter_name_or_path"),
    ("any", "hf_hub_token",
     "a secret does not belong in a config: run `hf auth login` or set HF_TOKEN"),
    ("chat", "num_beams=1", "beam search is not in this release; leave it out"),
)


class Refusal(NamedTuple):
    """One key of REFUSED."""

    scope: str          # the script that refuses: train, merge, chat, or any
    accepted: str       # the value that is accepted; "": false, 0 and null
    advice: str         # what to do


def refusals() -> dict[str, Refusal]:
    """REFUSED by key."""
    found = {}
    for scope, keys, advice in REFUSED:
        for item in keys.split():
            name, _, accepted = item.partition("=")
            found[name] = Refusal(scope, accepted, advice)
    return found


# every key without effect and every refused key; the value is None or the Refusal
UNUSED = {name: None for names in NO_EFFECT.values() for name in names.split()} | refusals()


# ---- questions about a Config -------------------------------------------------------------------

COMPARED = ("rm", "dpo", "kto")     # stages that train on pairs or on replies marked good or bad
SAMPLED = ("ppo", "grpo", "distill")    # stages that train on the model's own replies
AS_SIGMOID = ("hinge", "ipo")       # pref_loss that LLaMA-Factory 0.9.5 computes as sigmoid
ADAPTERS = ("lora", "oft")          # finetuning_type with a frozen base and adapters


def resizes_vocab(config) -> bool:
    """Whether a config asks for new tokens, or for rows for those that the tokenizer has."""
    return bool(config.resize_vocab or config.add_tokens or config.add_special_tokens
                or config.new_special_tokens_config)


def needs_whole_matrices(config: Config) -> bool:
    """Whether the optimizer updates matrices or blocks of numbers, unlike AdamW."""
    return (config.use_muon or config.use_galore or config.use_adam_mini or config.use_apollo
            or config.use_badam or "8bit" in config.optim)


def as_dict(config: Config) -> dict:
    """{key: value} of all settings, JSON-able; load_config reads it back from a .json file."""
    return {name: getattr(config, name) for name in KEYS}


def in_steps(value: Steps, total_steps: int) -> int:
    """`value` as a number of optimizer steps in a run of total_steps; shares are rounded up."""
    return int(value) if value >= 1 else math.ceil(value * total_steps)


# ---- python -m settings.config --keys ------------------------------------------------------------


def print_keys():
    """Print every key with default, type or choices, and meaning; then NO_EFFECT and REFUSED."""
    defaults = Config()
    for name, spec in KEYS.items():
        if spec.metadata["group"]:
            print(f"\n### {spec.metadata['group']}")
        print_key(spec, getattr(defaults, name))

    print("\n### accepted, no effect here")
    for reason, names in NO_EFFECT.items():
        print(f"{reason}:")
        print_paragraph(", ".join(names.split()))

    print("\n### refused, because the result would differ")
    for _, names, advice in REFUSED:
        print(", ".join(item.replace("=", " other than ") for item in names.split()) + ":")
        print_paragraph(advice)


def print_key(spec, default: object):
    """Print one row of the table."""
    row = spec.metadata
    if isinstance(default, list):
        value = ",".join(default)
    elif default == {}:
        value = "none"
    else:
        value = str(default).lower()
    kind = "|".join(row["choices"]) or spec.type.removesuffix(" | None").lower()
    only = f"    only {', '.join(row['only'])}" if row["only"] else ""
    print(f"{spec.name}: {value}    ({kind}){only}")
    print_paragraph(row["help"] + (" [not a key of LLaMA-Factory]" if row["own"] else ""))


def print_paragraph(text: str):
    """Print indented lines of at most 100 columns."""
    print(textwrap.fill(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8,
                        break_on_hyphens=False))


def main(argv: list[str]):
    """python -m settings.config --keys"""
    if argv != ["--keys"]:
        raise ValueError("usage: python -m settings.config --keys   "
                         "(python -m settings.load_config FILE key=value shows a config)")
    print_keys()


if __name__ == "__main__":
    run_script(main)
