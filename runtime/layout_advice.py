"""Which layout to take on several cards: what each rank holds and sends, and which one fits first.

    python train.py my.yaml dry_run=true cards=8 card_memory=24 link_speed=300,25 card_speed=150

One process plans for `cards` cards; nothing is loaded. LAYOUTS is the table, from what sends least
to what holds least; the first that fits is advised. A new layout joins by a row. MISSING names what
would help where none fits.

Bytes are exact: what a rank gives to each collective in an optimizer step, without the counts of
tokens and losses. A ring sends 2 (N - 1) / N of them in an all-reduce and (N - 1) / N in the
others. Seconds are these bytes over the speed of the slowest link; computing overlaps with some of
them.

Requires: runtime/memory.py, runtime/contradictions.py, runtime/steps.py.
Next: runtime/setup.py, which prints it; scale/zero.py, scale/fsdp.py; docs/many_gpus.md.
Papers: ZeRO arXiv:1910.02054 (sec. 7, the volume of each stage), FSDP arXiv:2304.11277, rings
arXiv:1802.05799.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from config import Config, has_reference
from errors import bytes_in_words
from lora import trainable
from model import CausalLM
from parallel import BUCKET_BYTES, Ranks, split_by_bytes
from runtime.contradictions import CONTRADICTIONS
from runtime.load_config import COMMAND_LINE
from runtime.memory import (USABLE, Plan, checkpointing_in_words, gathered_bytes,
                            memory_plan)
from runtime.memory_advice import advice
from runtime.steps import StepPlan, accumulation_for, merge_micro_batches, shard_batches
from runtime.throughput import matmul_parameters, training_flops

GIB = 2**30
SENT_BY_RING = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}      # times (N - 1) / N
ROWS_LOOKED_AT = 1000           # for the arithmetic of a step


# ---- bytes of a step ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """What decides how much is sent."""
    model: CausalLM             # without storage
    adapters: bool              # frozen base beside adapters
    world: int
    passes: int                 # forward and backward passes of a step, on the rank with the most


def data_parallel_bytes(t: Traffic) -> dict[str, int]:
    """{collective: bytes} of a step: parallel.py sums the gradients once."""
    return {"all_reduce": sum(p.nbytes for p in trainable(t.model).values())}


def zero_1_bytes(t: Traffic) -> dict[str, int]:
    flat = flat_bytes(t.model, t.world)
    return {"reduce_scatter": flat, "all_gather": flat}


def zero_2_bytes(t: Traffic) -> dict[str, int]:
    flat = flat_bytes(t.model, t.world)
    return {"reduce_scatter": flat * t.passes, "all_gather": flat}


def fsdp_bytes(t: Traffic) -> dict[str, int]:
    """A pass gathers blocks twice and the rest once, and reduces gradients of trained shards."""
    in_blocks = {p for block in t.model.model.layers for p in block.parameters()}
    shards = [p for p in t.model.parameters() if not (t.adapters and p.requires_grad)]
    blocks = sharded_bytes((p for p in shards if p in in_blocks), t.world)
    rest = sharded_bytes((p for p in shards if p not in in_blocks), t.world)
    sent = {"all_gather": (2 * blocks + rest) * t.passes}
    if t.adapters:                              # which each rank has whole
        return sent | data_parallel_bytes(t)
    return sent | {"reduce_scatter": (blocks + rest) * t.passes}


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


def ring_bytes(sent: dict[str, int], world: int) -> int:
    """Bytes that leave a rank in a step, where the collectives are rings."""
    return sum(SENT_BY_RING[name] * (world - 1) * n // world for name, n in sent.items())


# ---- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A row of the table: settings that ask for it, its traffic, and when to take it."""
    settings: dict
    sent: Callable[[Traffic], dict[str, int]]
    why: str
    name: str = ""              # of settings that are the defaults

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
    Layout({"fsdp": ["full_shard"]}, fsdp_bytes, why=(
        "whole weights do not fit one card beside the rest, and two blocks of them do")),
    Layout({"offload_optimizer": "cpu"}, data_parallel_bytes, why=(
        "it fits with the optimizer state in main memory, which each step sends there and back")),
    Layout({"zero_stage": 2, "offload_optimizer": "cpu"}, zero_2_bytes, why=(
        "it fits with the optimizer state in main memory, which each step sends there and back")),
    Layout({"fsdp": ["full_shard"], "offload_optimizer": "cpu"}, fsdp_bytes, why=(
        "two blocks fit one card with the optimizer state in main memory")),
)
SENT_ONCE = (data_parallel_bytes, zero_1_bytes)     # in a step, whatever its passes
SLOW_LINK = "a larger gradient_accumulation_steps sends less often"
SLOW_LINK_IN_EACH_PASS = ("larger micro-batches send less often; pipeline parallelism, which sends "
                          "activations alone, is not in this release")
SET_BY_LAYOUTS = {"zero_stage": 0, "fsdp": [], "offload_optimizer": None}


def block_is_too_large(plan: Plan, card_bytes: int) -> bool:
    model = plan.workload.model
    total = sum(p.nbytes for p in model.parameters())
    return gathered_bytes(model, total) > USABLE * card_bytes


def rows_are_too_long(plan: Plan, card_bytes: int) -> bool:
    return plan.activations + plan.working > card_bytes / 2


MISSING = (         # where no layout fits: whether this is why, and what would help
    (block_is_too_large, "two blocks, embedding and head do not fit one card: "
                         "tensor_parallel_size, which this table does not plan, cuts every matrix "
                         "(docs/many_gpus.md)"),
    (rows_are_too_long, "most of it is activations: to cut a row over the cards is context "
                        "parallelism, which this release has not"),
)


# ---- candidates ---------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A layout for this run: its memory plan and what a rank sends, or why it is refused."""
    layout: Layout
    plan: Plan | None = None
    sent: int = 0               # bytes of a rank in a step, by rings
    refusal: str = ""


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
    for layout in LAYOUTS:
        changed = replace(config, **(SET_BY_LAYOUTS | layout.settings))
        if world == 1 and layout.settings.keys() & {"zero_stage", "fsdp"}:
            continue
        if refusal := first_contradiction(changed):
            found.append(Candidate(layout, refusal=refusal))
            continue
        workload = replace(
            memory.workload, device=device, world=world, sharded=bool(changed.fsdp),
            kernel=kernel, recompute=None, offloaded=0, mlp_tile=0, host_bytes=None)
        tokens, planned = pass_size(changed, memory_plan(changed, workload),
                                    int(config.card_memory * GIB), device)
        traffic = Traffic(model=workload.model, adapters=workload.lora is not None, world=world,
                          passes=passes_of_a_step(changed, plan, world, tokens))
        found.append(Candidate(layout, planned, ring_bytes(layout.sent(traffic), world)))
    return found


def first_contradiction(config: Config) -> str:
    """Why train.py would refuse these settings, or ""."""
    for check in CONTRADICTIONS["train"]:
        for applies, sentence in check(config):
            if applies:
                return sentence
    return ""


def passes_of_a_step(config: Config, plan: StepPlan, world: int, max_tokens: int) -> int:
    """Passes of the first step, on the rank with the most."""
    most = 1
    for rank in range(world):
        batches = shard_batches(config, plan.train_set, 0, Ranks(rank, world))
        step = batches[:config.gradient_accumulation_steps]
        most = max(most, len(merge_micro_batches(step, plan.tokens_of, max_tokens)))
    return most


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
    if has_reference(config):
        lines.append("  passes of the reference model are not counted in what is sent")
    return [*lines, *advised(found, config, memory, plan, card_bytes)]


def row_in_words(one: Candidate, config: Config, card_bytes: int) -> str:
    """A line of the table."""
    seconds = "".join(f"{f'{one.sent / speed / 1e9:.3g} s':>12}" for speed in config.link_speed)
    verdict = "fits" if one.plan.fits(card_bytes) else "does not fit"
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
    cards, ranks = config.cards, plan.ranks.world
    if cards != ranks and not config.rows_per_step:
        notes.append(f"  a step has {plan.rows_per_step // ranks * cards} "
                     f"{'tokens' if config.token_budget else 'rows'} then and not "
                     f"{plan.rows_per_step}, unless gradient_accumulation_steps changes")
    if config.card_speed and config.link_speed:
        seconds = best.sent / min(config.link_speed) / 1e9
        if seconds > compute_seconds(config, memory, plan):
            remedy = SLOW_LINK if best.layout.sent in SENT_ONCE else SLOW_LINK_IN_EACH_PASS
            notes.append(f"  at {min(config.link_speed):g} GB/s a step sends for longer than it "
                         f"computes: {remedy}")
    return notes
