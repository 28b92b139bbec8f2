"""Which layout to take on several cards: what each rank holds and sends, and which one fits first.

    python train.py my.yaml dry_run=true cards=8 card_memory=24 link_speed=300,25 card_speed=150

One process plans for `cards` cards; nothing is loaded. LAYOUTS is the table, from what sends least
to what holds least; the first that fits is advised. A new layout joins by a row: its settings, what
it sends, when to take it, and where a key has a size (tensor_parallel_size) what one of so many
processes computes with. MISSING names what would help where none fits.

Bytes are exact: what a rank gives to each collective in an optimizer step, without the counts of
tokens (also of experts) and losses; the stages of a pipeline differ, and its row is that of the one
which holds the most. Of N processes, a ring sends 2 (N - 1) / N of them in an all-reduce and
(N - 1) / N in the others; of an all-to-all so much stays where experts are chosen equally often.
Seconds are these bytes over the speed of the slowest link; computing overlaps with some of them.

Requires: runtime/memory.py, settings/contradictions.py, runtime/steps.py.
Next: runtime/setup.py, which prints it; scale/zero.py, scale/fsdp.py, scale/tensor_parallel.py,
scale/context_parallel.py, scale/expert_parallel.py, runtime/stages.py; docs/many_gpus.md.
Papers: ZeRO arXiv:1910.02054 (sec. 7, the volume of each stage), FSDP arXiv:2304.11277, rings
arXiv:1802.05799.
"""
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from checkpoint.shards import cut_of
from data import IGNORE
from errors import bytes_in_words
from families import ModelConfig
from lora import trainable
from model import CausalLM, MoE
from parallel import BUCKET_BYTES, Ranks, split_by_bytes
from runtime.memory import (USABLE, Plan, Workload, checkpointing_in_words, gathered_bytes,
                            memory_plan, model_without_storage)
from runtime.memory_advice import advice
from runtime.report import clock
from runtime.stages import in_flight, model_of_stage, share_layers
from runtime.steps import StepPlan, accumulation_for, merge_micro_batches, shard_batches
from runtime.throughput import matmul_parameters, training_flops
from settings.config import Config
from settings.contradictions import CONTRADICTIONS
from settings.load_config import COMMAND_LINE

GIB = 2**30
# times (N - 1) / N; a message to a neighbor is sent as it is
SENT_BY_RING = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "all_to_all": 1}
ROWS_LOOKED_AT = 1000           # for the arithmetic of a step


# ---- bytes of a step ----------------------------------------------------------------------------


@dataclass(frozen=True)
class PartOfStep:
    """What a rank computes in an optimizer step; of the rank with the most passes."""
    passes: int = 1             # forward and backward
    tokens: int = 0
    labels: int = 0


@dataclass(frozen=True)
class Traffic:
    """What decides how much is sent."""
    model: CausalLM             # of one process, without storage
    adapters: bool              # frozen base beside adapters
    world: int                  # processes with gradients of their own tokens
    step: PartOfStep
    size: int = 1               # processes of the axis that the layout has
    number_bytes: int = 4       # of a number between two blocks
    compute_bytes: int = 4      # of a number in a matrix product
    recompute: list = field(default_factory=list)   # a level of fused_block.RECOMPUTE a block


# {(collective, processes that take part): bytes that a rank gives to it in a step}
Sent = dict[tuple[str, int], int]


def data_parallel_bytes(t: Traffic) -> Sent:
    """parallel.py sums the gradients once."""
    return {("all_reduce", t.world): bytes_of(trainable(t.model).values())}


def zero_1_bytes(t: Traffic) -> Sent:
    flat = flat_bytes(t.model, t.world)
    return {("reduce_scatter", t.world): flat, ("all_gather", t.world): flat}


def zero_2_bytes(t: Traffic) -> Sent:
    flat = flat_bytes(t.model, t.world)
    return {("reduce_scatter", t.world): flat * t.step.passes, ("all_gather", t.world): flat}


def fsdp_bytes(t: Traffic) -> Sent:
    """A pass gathers blocks twice and the rest once, and reduces gradients of trained shards."""
    in_blocks = {p for block in t.model.model.layers for p in block.parameters()}
    shards = [p for p in t.model.parameters() if not (t.adapters and p.requires_grad)]
    blocks = sharded_bytes((p for p in shards if p in in_blocks), t.world)
    rest = sharded_bytes((p for p in shards if p not in in_blocks), t.world)
    sent = {("all_gather", t.world): (2 * blocks + rest) * t.step.passes}
    if t.adapters:                              # which each rank has whole
        return sent | data_parallel_bytes(t)
    return sent | {("reduce_scatter", t.world): (blocks + rest) * t.step.passes}


def tensor_parallel_bytes(t: Traffic) -> Sent:
    """All-reduces of activations, two a block forward and backward; gradients once.

    A block that is computed again in the backward pass sums its attention again. With embedding and
    head cut by token id, embeddings, their loss and its gradient are summed, too.
    """
    vocabulary = cut_of(t.model.lm_head.weight) is not None
    sums = 2 if vocabulary else 0
    for level, reached in zip(t.recompute, reached_by_gradients(t.model)):
        sums += 2 + reached.attention + reached.mlp + (reached.block and level == "block")
    activations = sums * t.step.tokens * t.model.config.hidden_size * t.number_bytes
    loss = 3 * 4 * t.step.labels if vocabulary else 0
    whole = bytes_of(p for name, p in trainable(t.model).items() if cut_of(p) is None
                     and (".self_attn." in name or ".mlp." in name))
    sent = data_parallel_bytes(t) if t.world > 1 else {}
    return sent | {("all_reduce", t.size): activations + loss + whole}


def expert_parallel_bytes(t: Traffic) -> Sent:
    """Tokens to their experts and back, forward and backward; gradients once."""
    ways = 0                                    # of all tokens in all layers
    for block, level, reached in zip(t.model.model.layers, t.recompute,
                                     reached_by_gradients(t.model)):
        if isinstance(block.mlp, MoE):
            experts = any(p.requires_grad for p in block.mlp.experts.parameters())
            ways += 2 + 2 * (reached.mlp or experts) + 2 * (reached.block and level == "block")
    config = t.model.config
    rows = t.step.tokens * config.num_experts_per_tok
    experts = [p for p in trainable(t.model).values() if cut_of(p)]
    others = [p for p in trainable(t.model).values() if not cut_of(p)]
    sent = {("all_reduce", t.world): bytes_of(others)}
    copies = ("all_reduce", t.world // t.size)
    return sent | {copies: sent.get(copies, 0) + bytes_of(experts),
                   ("all_to_all", t.size): ways * rows * config.hidden_size * t.number_bytes}


def pipeline_bytes(t: Traffic) -> Sent:
    """Activations to the next stage, their gradients to the one before; gradients once.

    t.model: of a stage, see runtime/stages.py. Gradients of a tied head and of the embedding are
    exchanged.
    """
    embedding, head = t.model.model.embed_tokens.weight, t.model.lm_head.weight
    forward, back = not len(head), not len(embedding) and embedding.requires_grad
    row = t.model.config.hidden_size * t.number_bytes
    messages = (forward + back) * t.step.tokens * row
    for table in (embedding, head):
        if t.model.config.tie_word_embeddings and len(table) and table.requires_grad:
            messages += table.nbytes
    sent = data_parallel_bytes(t) if t.world > 1 else {}
    return sent | {("send", t.size): messages}


def context_parallel_bytes(t: Traffic) -> Sent:
    """Tokens for heads in each block and back, and the loss of each pass; gradients once."""
    return with_exchange(t, data_parallel_bytes(t))


def sharded_context_bytes(t: Traffic) -> Sent:
    return with_exchange(t, fsdp_bytes(t))


def with_exchange(t: Traffic, sent: Sent) -> Sent:
    """And q, k, v and the outputs of all blocks, their gradients, and the loss of each pass.

    Of a process with a mean part of the rows: parts differ by a token. Key/value heads are repeated
    until the processes divide them.
    """
    ways = 0
    for block, level, reached in zip(t.model.model.layers, t.recompute,
                                     reached_by_gradients(t.model)):
        if block.mixer is None:
            continue
        trained = any(p.requires_grad for name, p in block.mixer.named_parameters()
                      if not name.startswith("o_proj"))
        ways += 1 + (reached.attention or trained) + (reached.block and level == "block")
    config = t.model.config
    kv_heads = math.lcm(config.num_key_value_heads, t.size)
    heads = 2 * (config.num_attention_heads + kv_heads) // t.size
    numbers = ways * t.step.tokens * heads * config.head_dim
    losses = ("all_reduce", t.size)
    return sent | {("all_to_all", t.size): numbers * t.compute_bytes,
                   losses: sent.get(losses, 0) + 4 * t.step.passes}


class Reached(NamedTuple):
    """Of a block, what the backward pass reaches."""
    attention: bool             # the input of its attention
    mlp: bool                   # the input of its MLP
    block: bool                 # anything at all


def reached_by_gradients(model: CausalLM) -> list[Reached]:
    """For each block; nothing trained lies below the first one that is reached."""
    def trained(*modules) -> bool:
        return any(p.requires_grad for module in modules if module is not None
                   for p in module.parameters())

    found = []
    reached = trained(model.model.embed_tokens)
    for block in model.model.layers:
        attention = reached or trained(block.input_layernorm)
        mlp = attention or trained(block.mixer, block.after_attention_norm,
                                   block.post_attention_layernorm)
        reached = mlp or trained(block)
        found.append(Reached(attention, mlp, reached))
    return found


def bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.nbytes for p in parameters)


def flat_bytes(model: CausalLM, world: int) -> int:
    """Bytes of the buffers of scale/zero.py, each padded to `world` equal parts."""
    total = 0
    for group in split_by_bytes(list(trainable(model).values()), BUCKET_BYTES):
        numbers = sum(p.numel() for p in group)
        total += -(-numbers // world) * world * group[0].itemsize
    return total


def sharded_bytes(parameters: Iterable[torch.Tensor], world: int) -> int:
    """Bytes of parameters whose rows fully_shard has padded to a multiple of `world`."""
    return sum(-(-len(p) // world) * world * p[:1].numel() * p.itemsize for p in parameters)


def ring_bytes(sent: Sent) -> int:
    """Bytes that leave a rank in a step, where the collectives are rings."""
    return sum(n if name == "send" else SENT_BY_RING[name] * (size - 1) * n // size
               for (name, size), n in sent.items())


# ---- what one of several processes computes with ------------------------------------------------


def tensor_workload(config: Config, workload: Workload, size: int) -> Workload:
    """Raises ValueError for sizes that cannot be cut."""
    from scale.cut_vocabulary import why_whole          # only where it is planned
    from scale.mesh import Axis
    from scale.tensor_parallel import cut_model, part_config

    vocabulary = not why_whole(config, workload.model, size)
    sizes = part_config(workload.model_config, size, vocabulary)
    model = model_without_storage(config, replace(workload, model=None))
    cut_model(model, Axis(0, size, None), vocabulary)
    return replace(workload, model=model, model_config=sizes, world=workload.world // size,
                   other_bytes=workload.other_bytes // size)


def expert_workload(config: Config, workload: Workload, size: int) -> Workload:
    """Raises ValueError for a number of experts that cannot be dealt out."""
    from scale.expert_parallel import cut_experts       # only where it is planned
    from scale.mesh import Axis

    model = model_without_storage(config, replace(workload, model=None))
    cut_experts(model, Axis(0, size, None))
    return replace(workload, model=model)


def pipeline_workload(config: Config, workload: Workload, size: int) -> Workload:
    """That of the stage which holds the most. Raises ValueError for more stages than layers."""
    return max(stage_workloads(config, workload, size),
               key=lambda stage: memory_plan(config, stage).total)


def stage_workloads(config: Config, workload: Workload, size: int) -> list[Workload]:
    """What each stage of a pipeline computes with."""
    lengths = [length for row in workload.rows for length in row]
    stages = share_layers(workload.model, lengths, size)
    found = []
    for number in range(size):
        whole = model_without_storage(config, replace(workload, model=None))
        model = model_of_stage(whole, stages, number)
        found.append(replace(
            workload, model=model, model_config=model.config, world=workload.world // size,
            other_bytes=workload.other_bytes // size,
            in_flight=in_flight(size, number, config.gradient_accumulation_steps)))
    return found


def context_workload(config: Config, workload: Workload, size: int) -> Workload:
    """Raises ValueError for heads that cannot be dealt out, and for dropout in experts."""
    from scale.context_parallel import check_shares     # only where it is planned

    check_shares(workload.model, workload.model_config, size)
    return replace(workload, parts=size)


# ---- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A row of the table: settings that ask for it, its traffic, and when to take it.

    size_key: a key whose sizes are tried, all above 1 that divide the cards; own(config, workload,
    size) is then the workload of one process. for_mixtures: it is for models with experts.
    """
    settings: dict
    sent: Callable[[Traffic], Sent]
    why: str
    name: str = ""              # of settings that are the defaults
    size_key: str = ""
    own: Callable[[Config, Workload, int], Workload] | None = None
    for_mixtures: bool = False

    @property
    def size(self) -> int:
        return self.settings.get(self.size_key, 1)

    def in_words(self) -> str:
        return self.name or " ".join(
            f"{key}={','.join(value) if isinstance(value, list) else value}"
            for key, value in self.settings.items())


LAYOUTS = (
    Layout({}, data_parallel_bytes, name="data parallelism", why=(
        "all of it fits one card, and only gradients are sent, once a step")),
    Layout({"zero_stage": 1}, zero_1_bytes, why=(
        "it sends no more than data parallelism, which does not fit, and shards the optimizer "
        "state")),
    Layout({"zero_stage": 2}, zero_2_bytes, why=(
        "whole weights fit one card, but not whole gradients and optimizer state beside them")),
    Layout({}, expert_parallel_bytes, size_key="expert_parallel_size", own=expert_workload,
           for_mixtures=True, why=(
        "the experts of all layers do not fit one card, and tokens that travel to them are fewer "
        "bytes than the experts")),
    Layout({"fsdp": ["full_shard"]}, fsdp_bytes, why=(
        "whole weights do not fit one card beside the rest, and two blocks of them do")),
    Layout({}, context_parallel_bytes, size_key="context_parallel_size", own=context_workload, why=(
        "the activations of a row do not fit one card beside the weights, and those of its part "
        "do")),
    Layout({"fsdp": ["full_shard"]}, sharded_context_bytes, size_key="context_parallel_size",
           own=context_workload, why=(
        "neither whole weights nor the activations of a whole row fit one card")),
    Layout({"offload_optimizer": "cpu"}, data_parallel_bytes, why=(
        "it fits with the optimizer state in main memory, which each step sends there and back")),
    Layout({"zero_stage": 2, "offload_optimizer": "cpu"}, zero_2_bytes, why=(
        "it fits with the optimizer state in main memory, which each step sends there and back")),
    Layout({"fsdp": ["full_shard"], "offload_optimizer": "cpu"}, fsdp_bytes, why=(
        "two blocks fit one card with the optimizer state in main memory")),
    Layout({}, pipeline_bytes, size_key="pipeline_parallel_size", own=pipeline_workload, why=(
        "each card holds its own layers, and gathered ones do not fit; activations alone are sent, "
        "so it may cross hosts")),
    Layout({}, tensor_parallel_bytes, size_key="tensor_parallel_size", own=tensor_workload, why=(
        "two blocks beside the rest do not fit one card; every matrix is cut, which sends the most "
        "and belongs within a host")),
)
SENT_ONCE = (data_parallel_bytes, zero_1_bytes)     # in a step, whatever its passes
SLOW_LINK = "a larger gradient_accumulation_steps sends less often"
SLOW_LINK_IN_EACH_PASS = ("larger micro-batches send less often, and pipeline_parallel_size sends "
                          "activations alone")
SLOW_LINK_OF_STAGES = "what stages send grows with their tokens; only a faster link helps"
SET_BY_LAYOUTS = {"zero_stage": 0, "fsdp": [], "offload_optimizer": None,
                  "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
                  "context_parallel_size": 1, "expert_parallel_size": 1}


def layouts_for(cards: int, model_config: ModelConfig) -> list[Layout]:
    """The rows of the table for so many cards, each size of a size_key as a row."""
    found = []
    for layout in LAYOUTS:
        if layout.for_mixtures and not any(model_config.sparse):
            continue
        if not layout.size_key:
            found.append(layout)
            continue
        for size in range(2, cards + 1):
            if cards % size == 0:
                settings = layout.settings | {layout.size_key: size}
                found.append(replace(layout, settings=settings))
    return found


def block_is_too_large(plan: Plan, card_bytes: int) -> bool:
    model = plan.workload.model
    total = sum(p.nbytes for p in model.parameters())
    return gathered_bytes(model, total) > USABLE * card_bytes


def rows_are_too_long(plan: Plan, card_bytes: int) -> bool:
    return plan.activations + plan.working > card_bytes / 2


MISSING = (         # where no layout fits: whether this is why, and what would help
    (block_is_too_large, "two blocks, embedding and head do not fit one card: "
                         "tensor_parallel_size over more cards cuts every matrix further "
                         "(docs/many_gpus.md)"),
    (rows_are_too_long, "most of it is activations: a smaller cutoff_len shortens rows, and "
                        "context_parallel_size cuts them over more cards"),
)


# ---- candidates ---------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A layout for this run: its memory plan and what a rank sends, or why it is refused."""
    layout: Layout
    plan: Plan | None = None
    sent: int = 0               # bytes of a rank in a step, by rings
    bubble: float = 0.0         # share of a step in which a stage of a pipeline waits
    refusal: str = ""

    @property
    def ranks(self) -> int:
        """Ranks of data parallelism."""
        return data_ranks(self.plan.workload)


def candidates(config: Config, memory: Plan, plan: StepPlan,
               pass_size: Callable) -> list[Candidate]:
    """All layouts for this run, in the order of the table.

    memory: the plan of the largest micro-batch. pass_size(config, memory plan, free bytes, device):
    (most tokens of a pass, its memory plan), as the run on the cards would choose them.
    """
    world = config.cards
    device = torch.device("cuda")
    kernel = memory.workload.kernel
    if torch.device(memory.workload.device).type == "cpu" and config.flash_attn != "disabled" \
            and not memory.workload.model_config.attn_softcap:
        kernel = "sdpa-flash"                   # what a card has instead of the CPU's choice
    found = []
    for layout in layouts_for(world, memory.workload.model_config):
        changed = replace(config, **(SET_BY_LAYOUTS | layout.settings))
        if world == 1 and layout.settings.keys() & {"zero_stage", "fsdp"}:
            continue
        if refusal := first_contradiction(changed):
            found.append(Candidate(layout, refusal=refusal))
            continue
        workload = replace(
            memory.workload, device=device, world=world, sharded=bool(changed.fsdp),
            kernel=kernel, recompute=None, offloaded=0, mlp_tile=0, host_bytes=None,
            head_in_tiles=False)
        try:
            workload = own_workload(layout, changed, workload)
        except ValueError as refusal:
            found.append(Candidate(layout, refusal=str(refusal)))
            continue
        accumulation = accumulation_for(config, data_ranks(workload))
        changed = replace(changed, gradient_accumulation_steps=accumulation)
        tokens, planned = pass_size(changed, memory_plan(changed, workload),
                                    int(config.card_memory * GIB), device)
        step = part_of_step(changed, plan, data_ranks(workload), tokens)
        traffic = traffic_of(planned.workload, layout.size, step)
        waits = layout.size - 1 if layout.sent is pipeline_bytes else 0
        found.append(Candidate(layout, planned, ring_bytes(layout.sent(traffic)),
                               bubble=waits / (step.passes + waits)))
    return found


def data_ranks(workload: Workload) -> int:
    """Ranks of data parallelism: the processes that share rows are one."""
    return workload.world // workload.parts


def own_workload(layout: Layout, config: Config, workload: Workload) -> Workload:
    """What one process computes with. Raises ValueError for a model that cannot be cut so."""
    if not layout.own:
        return workload
    if workload.quant_formats and layout.size_key != "context_parallel_size":
        raise ValueError("weights in 4 or 8 bits are not cut over processes")
    return layout.own(config, workload, layout.size)


def traffic_of(workload: Workload, size: int, step: PartOfStep) -> Traffic:
    """What decides how much a process sends. workload: its own, with levels of recomputation."""
    embedding = workload.model.model.embed_tokens.weight
    stream = workload.dtype.itemsize if workload.lora else embedding.itemsize
    return Traffic(model=workload.model, adapters=workload.lora is not None, world=workload.world,
                   step=step, size=size, number_bytes=stream,
                   compute_bytes=workload.dtype.itemsize, recompute=workload.recompute)


def first_contradiction(config: Config) -> str:
    """Why train.py would refuse these settings, or ""."""
    for check in CONTRADICTIONS["train"]:
        for applies, sentence in check(config):
            if applies:
                return sentence
    return ""


def part_of_step(config: Config, plan: StepPlan, world: int, max_tokens: int) -> PartOfStep:
    """The first step of the rank with the most passes; of several such ranks, the most tokens."""
    most, busiest = (0, 0), []
    for rank in range(world):
        batches = shard_batches(config, plan.train_set, 0, Ranks(rank, world))
        step = batches[:config.gradient_accumulation_steps]
        passes = len(merge_micro_batches(step, plan.tokens_of, max_tokens))
        amount = passes, sum(plan.tokens_of(row) for batch in step for row in batch)
        if amount > most:
            most, busiest = amount, step
    passes, tokens = most
    labels = 0
    for rows in busiest:
        batch = plan.collate([[plan.train_set[row] for row in rows]])
        labels += int((batch.targets != IGNORE).sum())
    return PartOfStep(max(passes, 1), tokens, labels)


def compute_seconds(config: Config, memory: Plan, plan: StepPlan) -> float:
    """Seconds of a rank's arithmetic in a step, at card_speed."""
    examples = plan.train_set
    looked_at = range(min(len(examples), ROWS_LOOKED_AT))
    lengths = [length for i in looked_at for length in examples[i].lengths]
    frozen, trained = matmul_parameters(memory.workload.model)
    flops = training_flops(memory.workload.model_config, frozen, trained, lengths)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if config.token_budget:
        rows = len(examples) / plan.steps_per_epoch / plan.ranks.world
    return flops / len(looked_at) * rows / (config.card_speed * 1e12)


def least_time_line(config: Config, memory: Plan, plan: StepPlan, rate: float) -> str:
    """A printed lower bound on the training time. rate: FLOP/s of large matmuls on this device."""
    seconds = compute_seconds(replace(config, card_speed=rate / 1e12), memory, plan)
    return (f"\ntime: at least {clock(seconds * plan.total_steps)} for {plan.total_steps} steps, "
            f"{seconds:.3g} s of arithmetic a step at {rate / 1e12:.3g} TFLOP/s; small models and "
            "short rows take several times as long")


# ---- the start page -----------------------------------------------------------------------------


def layout_lines(config: Config, memory: Plan, plan: StepPlan, pass_size: Callable) -> list[str]:
    """The table and the advice, for the start page of a dry run with `cards`."""
    config = replace(config, gradient_accumulation_steps=accumulation_for(config, config.cards))
    found = candidates(config, memory, plan, pass_size)
    card_bytes = int(config.card_memory * GIB)
    head = f"layouts for {config.cards} card(s) with {config.card_memory:g} GiB, each with the " \
           "micro-batches of a rank here:"
    speeds = "".join(f"{f'{speed:g} GB/s':>12}" for speed in config.link_speed)
    lines = ["", head, f"  {'':38} {'a rank holds':>12} {'sends a step':>12}{speeds}"]
    lines += [row_in_words(one, config, card_bytes) for one in found if one.plan]
    for refusal in dict.fromkeys(one.refusal for one in found if one.refusal):
        names = [one.layout.in_words() for one in found if one.refusal == refusal]
        lines.append(f"  not with these settings: {'; '.join(names)} ({refusal})")
    if config.card_speed:
        seconds = compute_seconds(config, memory, plan)
        lines.append(f"  computing takes {seconds:.3g} s of a step at {config.card_speed:g} "
                     "TFLOP/s, recomputation not counted")
        for one in found:
            if one.bubble and one.plan.fits(card_bytes):
                own = seconds / one.layout.size / (1 - one.bubble)
                lines.append(f"  with {one.layout.in_words()} it takes {own:.3g} s, the bubble "
                             f"included: {one.bubble:.0%} of the step")
    if config.has_reference:
        lines.append("  passes of the reference model are not counted in what is sent")
    return [*lines, *advised(found, config, memory, plan, card_bytes)]


def row_in_words(one: Candidate, config: Config, card_bytes: int) -> str:
    """A line of the table."""
    seconds = "".join(f"{f'{one.sent / speed / 1e9:.3g} s':>12}" for speed in config.link_speed)
    verdict = "fits" if one.plan.fits(card_bytes) else "does not fit"
    if one.bubble:
        verdict += f", bubble {one.bubble:.0%}"
    return f"  {one.layout.in_words():38} {bytes_in_words(one.plan.total):>12} " \
           f"{bytes_in_words(one.sent):>12}{seconds}  {verdict}"


def advised(found: list[Candidate], config: Config, memory: Plan, plan: StepPlan,
            card_bytes: int) -> list[str]:
    """Which layout to take and why, or what would help."""
    planned = [one for one in found if one.plan]
    fitting = [one for one in planned if one.plan.fits(card_bytes)]
    if not fitting:
        smallest = min(planned, key=lambda one: one.plan.total)
        changed = replace(config, **(SET_BY_LAYOUTS | smallest.layout.settings))
        lines = ["no layout fits"]
        lines += [f"  {text}" for applies, text in MISSING if applies(smallest.plan, card_bytes)]
        return lines + [f"  {smallest.layout.in_words()}, and {line}"
                        for line in advice(smallest.plan, card_bytes, changed)]
    best = fitting[0]
    settings = "" if best.layout.name else f" {best.layout.in_words()}"
    source = "" if config.source == COMMAND_LINE else f" {config.source}"
    lines = [f"take {best.layout.in_words()}: {best.layout.why}",
             f"  torchrun --standalone --nproc-per-node {config.cards} train.py{source}{settings}",
             f"  activation checkpointing: {checkpointing_in_words(best.plan.workload)}"]
    return lines + notes_on_step(best, config, memory, plan)


def notes_on_step(best: Candidate, config: Config, memory: Plan, plan: StepPlan) -> list[str]:
    """Whether the rows of a step change, and whether a link is too slow."""
    notes = []
    planned, ranks = best.ranks, plan.ranks.world
    if planned != ranks and not config.rows_per_step:
        notes.append(f"  a step has {plan.rows_per_step // ranks * planned} "
                     f"{'tokens' if config.token_budget else 'rows'} then and not "
                     f"{plan.rows_per_step}, unless gradient_accumulation_steps changes")
    if config.card_speed and config.link_speed:
        seconds = best.sent / min(config.link_speed) / 1e9
        computing = compute_seconds(config, memory, plan) * best.ranks / config.cards
        if seconds > computing:
            remedy = SLOW_LINK if best.layout.sent in SENT_ONCE else SLOW_LINK_IN_EACH_PASS
            if best.layout.sent is pipeline_bytes:
                remedy = SLOW_LINK_OF_STAGES
            notes.append(f"  at {min(config.link_speed):g} GB/s a step sends for longer than it "
                         f"computes: {remedy}")
    return notes
