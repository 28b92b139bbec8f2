"""Decide how a run computes, before any weight is loaded, and print the start page.

    base = find_base(config, ranks)                     # folders and sizes
    train_set, eval_set = load_data(...)                # token ids
    setup = choose_setup(config, base, plan, device, ranks, run.resumed)
    print(setup.report())                               # one page: what was decided and why

Dtype, attention kernel, matmul, compiling, fp8, activation checkpointing and the number of tokens
in a pass: each is chosen here, once, and is a field of the frozen Setup.

Requires: runtime/kernels.py, runtime/memory.py, runtime/steps.py, runtime/precision.py.
Next: runtime/build.py, which builds what was decided; train.py.
"""
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from checkpoint.adapter_config import READ_FOR_TARGETS
from checkpoint.adapters import adapter_fields, stored_targets
from checkpoint.load import (count_parameters, formats_in_words, load_model, packed_weights,
                             quantized_weights, stays_quantized)
from checkpoint.read_config import read_model_config
from families import ModelConfig
from generate import context_length
from layers import StackedLinear
from lora import AdapterConfig, LoRAConfig, trainable
from model import CausalLM
from optim import warmup_steps
from parallel import Ranks
from rope import LENGTH_DEPENDENT
from runtime.adapted_share import adapted_in_words, note_on_experts
from runtime.device import out_of_memory
from runtime.kernels import Kernels, choose_kernels, keep_kernels
from runtime.layout_advice import layout_lines, least_time_line
from runtime.memory import (Plan, Workload, checkpointing_in_words, largest_rows, lightest,
                            memory_plan, model_without_storage, plan_lines)
from runtime.memory_advice import advice, available_bytes, explain_oom
from runtime.named_folders import named_folder, named_folders
from runtime.odd_sizes import check_start_block, notes_on_sizes
from runtime.precision import compute_dtype, requested_format
from runtime.report import format_pairs
from runtime.resize_vocab import (RESIZED_BASE, notes_on_rows, resized_base,
                                  tables_trained_in_full)
from runtime.rope_scaling import other_scaling, scale_rope
from runtime.second_model import check_second_model, second_model, second_model_bytes
from runtime.show_data import print_counts, print_example
from runtime.stages import in_flight, model_of_stage, share_layers
from runtime.steps import StepPlan
from runtime.throughput import matrix_rate
from settings.config import ADAPTERS, AS_SIGMOID
from text.token_cache import kept_in, load_examples

# tokens in one pass: more make a device little faster
ENOUGH_TOKENS = {"cuda": 16_384, "mps": 2_048, "cpu": 256}


# ---- the base -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """The model a run starts from: its folder, the adapters named in the config, its sizes."""
    folder: Path
    adapters: list[Path]
    model_config: ModelConfig
    quant_formats: dict             # weights in 4 or 8 bits, {name: format}
    name: str                       # for the adapter's file

    def continued_adapter(self, config) -> Path | None:
        """The adapter that is trained further, if any."""
        return self.adapters[-1] if self.adapters and not config.create_new_adapter else None

    def merged_adapters(self, config) -> list[Path]:
        """The adapters that are merged into the weights before training."""
        return self.adapters[:-1] if self.continued_adapter(config) else self.adapters


def find_base(config, ranks: Ranks) -> Base:
    """The base of a run, downloaded if need be; no weight is read."""
    with ranks.one_per_host_first():
        folder = named_folder(config, "model_name_or_path")
        adapters = named_folders(config, "adapter_name_or_path")
    folder = resized_base(config, folder, adapters, ranks)
    config.notes.extend(scale_rope(config.rope_scaling, config.cutoff_len, folder))
    config.notes.extend(other_scaling(config.rope_scaling, adapters))
    model_config = read_model_config(folder)
    check_start_block(config, model_config)
    name = str(folder) if folder.name == RESIZED_BASE else config.model_name_or_path
    base = Base(folder, adapters, model_config, quant_formats(config, folder, adapters), name)
    if config.finetuning_type in ADAPTERS:
        config.notes.extend(notes_on_rows(config, base.continued_adapter(config)))
    return base


def quant_formats(config, folder: Path, adapters: list[Path]) -> dict:
    """{name of a weight: its format} of weights in 4 or 8 bits, in the files or by the config.

    Raises ValueError for what such a base cannot do; prints what is not quantized although one
    might expect it.
    """
    skeleton = load_model(folder, skip_weights=True, quant_format=requested_format(config))
    formats = {name: weight.quant_format for name, weight in quantized_weights(skeleton).items()}
    if not formats:
        return {}
    split = config.fsdp or max(config.tensor_parallel_size, config.pipeline_parallel_size,
                               config.expert_parallel_size) > 1
    if config.finetuning_type not in ADAPTERS or split or config.base_precision:
        raise ValueError(
            f"{folder} holds weights in 4 or 8 bits ({formats_in_words(formats.values())}): only "
            "adapters can be trained beside them (finetuning_type: lora or oft), without fsdp, "
            "tensor_parallel_size, pipeline_parallel_size, expert_parallel_size and base_precision")
    if adapters and (len(adapters) > 1 or config.create_new_adapter):
        raise ValueError(
            "adapter_name_or_path: beside a base in 4 or 8 bits one adapter can be trained "
            "further; merging others would round them to so few bits. Merge them first: python "
            "merge.py writes a 16-bit model, to be trained with quantization_bit: 4")
    if config.quantization_bit and any(map(stays_quantized, packed_weights(folder).values())):
        print(f"  note: quantization_bit: {config.quantization_bit} changes nothing, the files are "
              "quantized already")
    stacks = sum(module.weight.numel() for module in skeleton.modules()
                 if isinstance(module, StackedLinear))
    if stacks:
        print(f"  note: stacked experts are not quantized: {stacks:,} parameters stay in 16 or 32 "
              "bits")
    return formats


def lora_config(config, base: Base, resume) -> AdapterConfig | None:
    """What is adapted in this run; None for full fine-tuning and freeze."""
    if config.finetuning_type not in ADAPTERS:
        return None
    continued = resume or base.continued_adapter(config)
    if continued:
        known, raw = adapter_fields(continued, base.model_config)
        if known.finetuning_type != config.finetuning_type:
            raise ValueError(
                f"adapter_name_or_path: {continued} is an adapter of finetuning_type: "
                f"{known.finetuning_type}, not {config.finetuning_type}. Set that to train it "
                "further, or create_new_adapter: true to merge it and train a new one")
        if any(raw.get(key) not in (None, []) for key in READ_FOR_TARGETS):
            skeleton = load_model(base.folder, skip_weights=True)
            known.target_modules = stored_targets(skeleton, continued)
        return known
    init = True
    if config.pissa_init:
        init = f"pissa_niter_{config.pissa_iter}" if config.pissa_iter >= 0 else "pissa"
    modules_to_save = tables_trained_in_full(config, base.model_config)
    targets = config.oft_target if config.finetuning_type == "oft" else config.lora_target
    if config.use_llama_pro:
        from methods.freeze import expanded_targets     # only where it is asked for

        skeleton = load_model(base.folder, skip_weights=True)
        targets = expanded_targets(skeleton, targets, config.freeze_trainable_layers)
    if config.finetuning_type == "oft":
        from methods.oft import oft_config              # only where it is asked for

        return oft_config(config, targets, modules_to_save)
    return LoRAConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=targets,
        modules_to_save=modules_to_save,
        init_lora_weights=init,
    )


# ---- data ---------------------------------------------------------------------------------------


def load_data(config, base: Base, text, stage, ranks: Ranks) -> tuple:
    """(training examples, evaluation examples) as token ids; prints what became of the rows.

    With eval_on_each_dataset the second is {name: examples}. text: of text/load_text.py. The first
    rank of a host tokenizes, the others read what it wrote.
    """
    if config.streaming:
        print("  note: streaming: rows are tokenized to disk before the first step; max_samples "
              "reads fewer of them, and of a hub set only the files that hold these")
    with ranks.one_per_host_first():
        train_set, eval_set, counts = load_examples(
            config, text.tokenizer, text.template, stage.encode, folder=kept_in(config),
            writes=ranks.local_rank == 0)
    print_counts(counts)
    eval_sets = list(eval_set.values()) if isinstance(eval_set, dict) else [eval_set]
    if eval_set and not config.do_eval:
        print(f"  note: the {sum(map(len, eval_sets))} rows for evaluation are not used; "
              "eval_strategy: epoch would use them")
    check_examples([train_set, *eval_sets], base.model_config, text.tokenizer)
    check_second_model([train_set, *eval_sets], config, text.tokenizer)
    if config.stage == "dpo" and config.pref_loss in AS_SIGMOID and not config.paper_losses:
        print(f"  note: pref_loss: {config.pref_loss} is computed as LLaMA-Factory 0.9.5 does, "
              "with the loss of sigmoid; paper_losses: true takes that of its paper")
    print_example(text.tokenizer, train_set[0], config.stage)
    return train_set, eval_set


def check_examples(splits: list, model_config: ModelConfig, tokenizer):
    """Raises ValueError for a token id the model lacks; notes rows longer than its context."""
    largest = max(examples.largest_id for examples in splits)
    if largest >= model_config.vocab_size:
        raise ValueError(
            f"the data hold token id {largest} ({tokenizer.decode([largest])!r}), and the model "
            f"knows ids 0 to {model_config.vocab_size - 1}: is the tokenizer in {tokenizer.source} "
            "that of another model?")
    longest = max(examples.longest for examples in splits)
    context = context_length(model_config)
    if longest > context:
        print(f"  note: rows have up to {longest:,} tokens, and the model was made for "
              f"{context:,} (max_position_embeddings)")


# ---- the setup ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How a run computes. Lines are for the start page, each with its reason."""
    config: object
    device: torch.device
    lora: AdapterConfig | None
    dtype: torch.dtype              # of matrix products
    kernels: Kernels                # what computes attention, matrix products, …
    balance: float                  # coefficient of the experts' balance loss
    sharded: bool                   # weights are split over the ranks (scale/fsdp.py)
    memory: Plan
    free_bytes: int | None          # of the device, the least of all ranks
    max_tokens_per_pass: int        # of merged micro-batches; 0: each alone
    numbers: dict                   # parameters, steps, ...
    mesh: list                      # lines of the start page: which process holds what
    cuts_vocabulary: bool           # embedding and head are cut, too (scale/cut_vocabulary.py)
    stages: list                    # of a pipeline, the layers of each (runtime/stages.py)
    notes: list                     # on sizes that do not fit, see runtime/odd_sizes.py
    layouts: list                   # advice on several cards, see runtime/layout_advice.py

    @property
    def frozen_head(self) -> Callable | None:
        """What computes the cross-entropy of a frozen head in place of losses.losses_in_chunks."""
        return self.kernels.frozen_head if self.memory.workload.head_in_tiles else None

    def report(self) -> str:
        """The plan as a page of text."""
        page = [format_pairs("plan", self.numbers)]
        page += self.mesh
        page += [f"  note: {note}" for note in self.notes]
        page += [*self.kernels.lines, ""]
        page += plan_lines(self.memory, self.free_bytes)
        for line in advice(self.memory, self.free_bytes, self.config):
            page.append(f"  would fit: {line}")
        page += self.layouts
        return "\n".join(page)

    @contextmanager
    def explain_out_of_memory(self) -> Iterator[None]:
        """Turn an out-of-memory error within the block into one that says what would fit."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            message = explain_oom(error, self.memory, self.free_bytes, self.config)
            raise ValueError(message) from None


def choose_setup(config, base: Base, plan: StepPlan, device: torch.device, ranks: Ranks,
                 run) -> Setup:
    """Decide how this run computes. run: of runtime/run.py; a resumed run computes as it did."""
    model_config = base.model_config
    lora = lora_config(config, base, run.resume)
    dtype = compute_dtype(config, base, base.quant_formats)
    part = own_sizes(config, base, plan, lora, dtype)
    kernels = choose_kernels(config, part.model_config, device, dtype)
    free_bytes = free_on_all(device, ranks)
    same_kernels(kernels, ranks, run)

    balance = 0.0
    if config.stage in ("sft", "pt"):
        balance = config.moe_aux_loss_coef or model_config.router_aux_loss_coef
    if config.mlp_tile is None:                 # None again for a run that starts now
        config = replace(config, mlp_tile=run.recorded("mlp_tile", None))
    memory = plan_memory(config, base, part, plan, lora, dtype, kernels)
    layouts = []
    if config.cards:
        layouts = layout_lines(config, memory, plan, partial(choose_pass_size, balance=balance))
    elif config.dry_run and ranks.processes == 1 and not config.samples_replies:
        rate = matrix_rate(device, dtype, kernels.matmul)
        layouts = [least_time_line(config, memory, plan, rate)]
    max_tokens, memory = choose_pass_size(config, memory, free_bytes, device, balance)
    max_tokens = min(max_tokens, run.recorded("max_tokens_per_pass", max_tokens))
    plan.max_tokens_per_pass = max_tokens
    return Setup(
        config=config,
        device=device,
        lora=lora,
        dtype=dtype,
        kernels=kernels,
        balance=balance,
        sharded=is_run_sharded(config, ranks),
        memory=memory,
        free_bytes=free_bytes,
        max_tokens_per_pass=max_tokens,
        numbers=plan_numbers(config, plan, memory, dtype, part.whole),
        mesh=part.lines,
        cuts_vocabulary=part.cuts_vocabulary,
        stages=part.stages,
        notes=notes_on_sizes(config, memory.workload.model, lora, plan)
        + note_on_experts(part.whole or memory.workload.model),
        layouts=layouts,
    )


def same_kernels(kernels: Kernels, ranks: Ranks, run):
    """Take the kernels that are pinned, else those of the run's first start, on all ranks."""
    chosen = {"kernel": kernels.attention, "matmul": kernels.matmul_name,
              "threads": kernels.threads}
    chosen = ranks.from_main(lambda: chosen)
    keep_kernels(kernels, run.config,
                 {name: run.recorded(name, choice) for name, choice in chosen.items()})
    if not run.recorded("compiled", ranks.from_main(lambda: bool(kernels.compile))):
        kernels.compile = None


def is_run_sharded(config, ranks: Ranks) -> bool:
    """Whether weights are split over the ranks."""
    return bool(config.fsdp) and ranks.processes > 1


@dataclass(frozen=True)
class OwnSizes:
    """What this process computes with, of a model that several processes share."""
    model_config: ModelConfig               # its sizes
    whole: CausalLM | None = None           # the model of all of them, without storage
    model: CausalLM | None = None           # what this one holds of it, where it has fewer layers
    stages: list = field(default_factory=list)      # of a pipeline, the layers of each
    in_flight: int = 1                      # micro-batches whose activations it keeps
    cuts_vocabulary: bool = False
    lines: list = field(default_factory=list)       # of the start page


def own_sizes(config, base: Base, plan: StepPlan, lora: AdapterConfig | None,
             dtype: torch.dtype) -> OwnSizes:
    """The sizes of this process, which without further axes of the mesh are the model's.

    Raises ValueError for sizes that the axes of the mesh do not divide, and for more stages than
    layers.
    """
    axes = plan.ranks.axes
    if not axes:
        return OwnSizes(base.model_config)
    from scale.mesh import mesh_lines                   # only where it is asked for

    sizes, reason, stages = base.model_config, "", []
    if "tensor" in axes:
        from scale.tensor_parallel import part_config   # only where it is asked for

        part_config(sizes, axes["tensor"].size, False)
    whole = empty_like_run(config, sizes, lora, dtype, plan, base.quant_formats)
    if "expert" in axes:
        from scale.expert_parallel import own_config    # only where it is asked for

        sizes = own_config(sizes, axes["expert"].size)
    if "tensor" in axes:
        from scale.cut_vocabulary import why_whole      # only where it is asked for

        reason = why_whole(config, whole, axes["tensor"].size)
        sizes = part_config(sizes, axes["tensor"].size, not reason)
    if "context" in axes:
        from scale.context_parallel import check_shares     # only where it is asked for

        check_shares(whole, sizes, axes["context"].size)
    if "pipeline" in axes:
        lengths = [n for row in rows_in_training(config, base, plan) for n in row]
        stages = share_layers(whole, lengths, axes["pipeline"].size)
    cut = "tensor" in axes and not reason
    lines = mesh_lines(plan.ranks, base.model_config, cut, stages)
    if reason:
        lines.append(f"  embedding and head are whole on every process: {reason}")
    if not stages:
        return OwnSizes(sizes, whole, cuts_vocabulary=cut, lines=lines)
    stage = axes["pipeline"].rank
    model = model_of_stage(empty_like_run(config, sizes, lora, dtype, plan), stages, stage)
    kept = in_flight(len(stages), stage, config.gradient_accumulation_steps)
    return OwnSizes(model.config, whole, model, stages, kept, cut, lines)


def empty_like_run(config, sizes: ModelConfig, lora: AdapterConfig | None, dtype: torch.dtype,
                   plan: StepPlan, quant_formats: dict | None = None) -> CausalLM:
    """The model to be trained with these sizes, without storage."""
    return model_without_storage(config, Workload(
        model_config=sizes, lora=lora, rows=[], dtype=dtype, kernel="plain", device=plan.device,
        quant_formats=quant_formats))


def plan_memory(config, base: Base, part: OwnSizes, plan: StepPlan, lora: AdapterConfig | None,
                dtype: torch.dtype, kernels: Kernels) -> Plan:
    """The memory of a step with the largest micro-batch of the run, each micro-batch alone.

    part: what this process computes with.
    """
    on_gpu = plan.device.type == "cuda"
    parts = plan.ranks.axes["context"].size if "context" in plan.ranks.axes else 1
    return memory_plan(config, Workload(
        model_config=part.model_config,
        model=part.model,
        in_flight=part.in_flight,
        lora=lora,
        rows=rows_in_training(config, base, plan),
        dtype=dtype,
        kernel=kernels.attention,
        device=plan.device,
        world=plan.ranks.world * parts,
        parts=parts,
        sharded=is_run_sharded(config, plan.ranks),
        fast=bool(kernels.fuse),
        head_in_tiles=bool(kernels.frozen_head)
        and not (kernels.compile or part.cuts_vocabulary),
        fp8=bool(kernels.fp8),
        grouped=bool(kernels.group_experts),
        quant_formats=base.quant_formats,
        other_bytes=second_model_bytes(second_model(config, base, lora), dtype)
        // (plan.ranks.partners // parts)
        + judge_bytes(config, dtype),
        rollout_bytes=rollout_bytes(config, base, plan, dtype),
        host_bytes=free_on_all(torch.device("cpu"), plan.ranks) if on_gpu else None,
    ))


def rows_in_training(config, base: Base, plan: StepPlan) -> list[list[int]]:
    """The largest micro-batch, see largest_rows; of prompts with answers as long as they may be."""
    rows = largest_rows(plan.train_set, plan.all_micro_batches())
    if not config.samples_replies:
        return rows
    from methods.rollouts import answers_per_prompt     # only where it is asked for

    context = context_length(base.model_config)

    def answered(prompt: int) -> int:
        return min(prompt + config.max_new_tokens, context)

    if config.stage == "distill":       # the row, or the model's own answer in its place
        return [[max(row, answered(prompt))] for row, prompt in rows]
    whole = [[answered(prompt)] for prompt, _ in rows]
    return [row for row in whole for _ in range(answers_per_prompt(config))]


def rollout_bytes(config, base: Base, plan: StepPlan, dtype: torch.dtype) -> int:
    """Keys and values of the answers that are decoded together, each as long as it may be."""
    if not config.samples_replies:
        return 0
    from fast.batch_decode import cache_bytes           # only where it is asked for
    from methods.rollouts import ROWS_AT_ONCE

    rows = rows_in_training(config, base, plan)
    answers = min(ROWS_AT_ONCE, len(rows) * config.batches_per_rollout)
    return cache_bytes(base.model_config, answers, max(map(sum, rows)), dtype)


def free_on_all(device: torch.device, ranks: Ranks) -> int | None:
    """Free bytes of the process that has the least; None if unknown. All plan alike."""
    free = available_bytes(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    found = ranks.gather(torch.tensor([free or 0]), everyone=True)
    return min(map(int, found)) or None


def judge_bytes(config, dtype: torch.dtype) -> int:
    """Memory of the reward model of stages ppo and grpo."""
    if config.stage not in ("ppo", "grpo"):
        return 0
    from runtime.reward_sources import reward_model_bytes   # only where it is asked for

    return reward_model_bytes(config, dtype)


def choose_pass_size(config, memory: Plan, free_bytes: int | None, device: torch.device,
                     balance: float) -> tuple[int, Plan]:
    """(most tokens of merged micro-batches, the memory plan of such passes).

    A step is the same sum however it is split (losses.py), but few tokens do not keep a GPU busy.
    0: each micro-batch alone, also where something is computed over a whole micro-batch: the
    balance of experts, the mean of ASFT or of a smoothed loss, or frequencies that follow the
    longest row. memory: the plan of the largest micro-batch. Passes without recomputation come
    first, then those without inputs in main memory and tiles, then long ones.
    """
    rows = memory.workload.rows
    alone = sum(map(sum, rows))
    size = config.gradient_accumulation_steps
    candidates = [(0, lightest(memory, free_bytes, config))]
    rope_type = memory.workload.model_config.rope["rope_type"]
    own_mean = config.use_asft_loss or config.label_smoothing_factor
    needs_whole = balance or own_mean and not config.paper_losses
    mergeable = config.join_micro_batches and size > 1 and not needs_whole
    mergeable = mergeable and not config.samples_replies   # the answers are yet to come
    mergeable = mergeable and config.pipeline_parallel_size == 1    # which micro-batches keep busy
    if mergeable and rope_type not in LENGTH_DEPENDENT:
        limit = min(ENOUGH_TOKENS[device.type], alone * size)
        while limit > alone:
            copies = math.ceil(limit / alone)               # no pass has more rows than these
            merged = replace(memory.workload, rows=[row for row in rows for _ in range(copies)])
            merged = lightest(memory_plan(config, merged), free_bytes, config)
            if free_bytes is not None and merged.fits(free_bytes):
                candidates.append((limit, merged))
            limit //= 2

    def preference(candidate):
        limit, plan = candidate
        workload = plan.workload
        is_short = bool(workload.offloaded or workload.mlp_tile)
        return set(workload.recompute) == {"none"}, not is_short, limit

    return max(candidates, key=preference)


# ---- the start page -----------------------------------------------------------------------------


def plan_numbers(config, plan: StepPlan, memory: Plan, dtype: torch.dtype,
                 whole: CausalLM | None = None) -> dict[str, str]:
    """Parameters, steps and passes for the start page. whole: the model, if the plan has a part."""
    model = whole or memory.workload.model
    trained = sum(p.numel() for p in trainable(model).values())
    total = count_parameters(model)
    weights = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    matmul_dtype = str(dtype).removeprefix("torch.")
    numbers = {"parameters": f"{trained:,} of {total:,} trained ({100 * trained / total:.4f}%)"}
    if adapted := adapted_in_words(model):
        numbers["adapts"] = adapted
    formats = [weight.quant_format for weight in quantized_weights(model).values()]
    if formats:
        numbers["base"] = f"{formats_in_words(formats)}; all else {weights}"
    numbers["dtype"] = f"weights {weights}, trained ones float32, matmul {matmul_dtype}"
    warmup = warmup_steps(config, plan.total_steps // plan.unit) * plan.unit
    numbers["steps"] = f"{plan.total_steps}, {plan.steps_per_epoch} an epoch, {warmup} of warmup"
    if plan.unit > 1:
        numbers["rollouts"] = f"{plan.total_steps // plan.unit} of {plan.unit} steps each: max_" \
                              "steps, save_steps, logging_steps and the like count rollouts"
    numbers["a step"] = step_size(config, plan)
    micro_batches, tokens = plan.pass_sizes(plan.max_tokens_per_pass)
    if micro_batches > 1:
        numbers["passes"] = f"{micro_batches:.1f} micro-batches run as one pass of about " \
                            f"{tokens:,.0f} tokens, at most {plan.max_tokens_per_pass:,} " \
                            "(join_micro_batches: false: each alone)"
    if plan.ranks.world > 1:
        numbers["ranks"] = ranks_text(config, plan)
    numbers["activation checkpointing"] = checkpointing_in_words(memory.workload)
    return numbers


def step_size(config, plan: StepPlan) -> str:
    """Rows and tokens of an optimizer step."""
    rows = plan.rows_per_step
    size = f"{config.per_device_train_batch_size}"
    if config.token_budget:
        rows = round(len(plan.train_set) / plan.steps_per_epoch)
        size = f"as many as have {config.token_budget:,} tokens"
    tokens = int(plan.train_set.sizes.sum()) / len(plan.train_set) * rows
    batches = f"{config.gradient_accumulation_steps}"
    if config.stage == "ppo":
        batches += f" x {config.ppo_buffer_size} steps of a rollout"
    length = f"about {tokens:,.0f} tokens"
    if config.samples_replies:
        length = f"replies of at most {config.max_new_tokens:,} tokens"
    return f"{rows} rows ({size} x {batches} x {plan.ranks.world} ranks), {length}"


def ranks_text(config, plan: StepPlan) -> str:
    """What the ranks share, for the start page."""
    world = plan.ranks.world
    text = {
        0: f"{world}, gradients summed once a step",
        1: f"{world}, each with 1/{world} of the optimizer state (zero_stage: 1)",
        2: f"{world}, each with 1/{world} of optimizer state and gradients (zero_stage: 2), which "
           "are summed in each pass",
    }[config.zero_stage]
    repeated = plan.repeated_rows()
    if repeated:
        text += f"; {repeated} rows of an epoch are trained twice, so that all ranks have full " \
                "batches (even_batches: false would not)"
    return text
