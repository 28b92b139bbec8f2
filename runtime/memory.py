"""Predict the memory that one rank needs for training, before any weight is loaded.

    plan = memory_plan(config, Workload(model_config, lora, rows, dtype, kernel, device))
    print("\\n".join(plan_lines(plan, available_bytes(device))))

Weights, gradients and optimizer state are counted exactly, on a model without storage (the meta
device). Activations follow the formulas of runtime/activations.py. Of the plans that fit,
`lightest` takes the one that costs the least time, in this order: blocks that recompute nothing,
their MLP, everything (arXiv:1604.06174); their inputs in main memory (fast/offload_inputs.py); MLPs
in tiles (fast/tiled_mlp.py). The loss is always computed in chunks.

Requires: lora.py, optim.py, runtime/activations.py.
Next: runtime/memory_advice.py (does it fit, and which settings would), train.py.

Papers: recomputation arXiv:1604.06174, mixed precision arXiv:1710.03740, sharding arXiv:1910.02054.
"""
import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from checkpoint.adapters import variant_of
from checkpoint.load import empty_quantized, quantizable_weights, quantized_weights
from checkpoint.peft_targets import is_expert
from errors import bytes_in_words
from families import ModelConfig
from lora import AdaptedLinear, AdapterConfig, attach_lora, trainable
from model import CausalLM
from parallel import BUCKET_BYTES, split_by_bytes
from runtime.activations import MicroBatch, activation_bytes
from runtime.kernels import new_optimizer
from runtime.long_rows import long_row_bytes
from runtime.offload import embedding_may_stay_outside
from settings.config import Config

USABLE = 0.9            # share of the memory that a plan may fill; the rest is for scratch space
PAGE_LOCKED = 0.7       # share of the free main memory that a plan may lock
TILES = (4096, 1024)    # tokens of a tile: a quantized matrix is dequantized for each


@dataclass(frozen=True)
class Workload:
    """A training step whose memory is to be planned."""
    model_config: ModelConfig
    lora: AdapterConfig | None      # None: full fine-tuning or freeze
    rows: list[list[int]]           # of the largest micro-batch: the lengths of a row's sequences
    dtype: torch.dtype              # of matrix products and, with LoRA, of frozen weights
    kernel: str                     # a name from attention.py
    device: torch.device | str
    world: int = 1                  # processes over which weights are sharded, or the state
    parts: int = 1                  # processes that share a row (scale/context_parallel.py)
    sharded: bool = False           # weights are split over the ranks
    fast: bool = False              # fast/fused_block.py is used
    recompute: list[str] | None = None      # a level of fused_block.RECOMPUTE for each block
    fp8: bool = False               # frozen weights are held in 8 bits (methods/fp8.py)
    grouped: bool = False           # fast/grouped_experts.py is used
    quant_formats: dict | None = None       # of weights in 4 or 8 bits, by name
    other_bytes: int = 0            # of other models, which are not trained
    rollout_bytes: int = 0          # of the cache while answers are sampled, before the step
    model: CausalLM | None = None   # the model to be trained, without storage
    offloaded: int = 0              # first blocks whose inputs are in main memory
    mlp_tile: int = 0               # tokens of a tile of the MLPs; 0: not tiled
    host_bytes: int | None = None   # free main memory beside a GPU; None: not known
    in_flight: int = 1              # micro-batches whose activations are kept (runtime/stages.py)
    head_in_tiles: bool = False     # fast/head_in_tiles.py is used


@dataclass
class Plan:
    """Bytes that one rank needs."""
    weights: int                    # frozen
    trained: int
    gradients: int
    optimizer: int                  # its state
    activations: int                # of the micro-batches in flight, kept for the backward pass
    working: int                    # the larger of the loss and the block in the backward pass
    workload: Workload = field(repr=False)
    offloaded: int = 0              # block inputs in main memory, page-locked beside a GPU
    state_outside: int = 0          # optimizer state in main memory or on the disk
    state_on_disk: bool = False
    rollout: int = 0                # keys and values while answers are sampled

    @property
    def total(self) -> int:
        """Bytes of everything on the device."""
        lasting = self.weights + self.trained + self.gradients + self.optimizer
        on_cpu = torch.device(self.workload.device).type == "cpu"
        outside = self.in_host_memory if on_cpu else 0
        sampling = self.rollout - self.activations - self.working   # before these are there
        return lasting + self.activations + self.working + outside + max(sampling, 0)

    @property
    def in_host_memory(self) -> int:
        """Bytes in main memory beside a GPU, page-locked."""
        return self.offloaded + (0 if self.state_on_disk else self.state_outside)

    def fits(self, free_bytes: int) -> bool:
        """Whether this many bytes are enough, with some to spare."""
        host_bytes = self.workload.host_bytes
        enough_beside = host_bytes is None or self.in_host_memory <= PAGE_LOCKED * host_bytes
        return enough_beside and self.room(free_bytes) >= 0

    def room(self, free_bytes: int) -> int:
        """Bytes that a plan may still fill beside this one."""
        return int(USABLE * free_bytes) - self.total


# ---- the plan -----------------------------------------------------------------------------------


def memory_plan(config: Config, workload: Workload) -> Plan:
    """Plan the memory of a training step; nothing is loaded.

    What the workload leaves open is decided here: `model` is created on the meta device,
    `recompute` follows disable_gradient_checkpointing, offload_activations and mlp_tile. The plan's
    workload holds all.
    """
    workload = completed(config, workload)
    return plan_of_step(workload, lasting_bytes(config, workload))


def lasting_bytes(config: Config, workload: Workload) -> dict[str, int | bool]:
    """Fields of Plan: what is there at every moment of a completed workload's step.

    It does not depend on rows, recomputation, offloaded inputs and tiles.
    """
    model = workload.model
    frozen, trained = weight_bytes(model, workload.fp8)
    gradients, optimizer, largest_state = optimizer_bytes(model, config)
    others = workload.other_bytes
    if workload.sharded:
        frozen = frozen // workload.world + gathered_bytes(model, frozen + trained)
        others //= workload.world
        if not workload.lora:                       # adapters are whole on every rank
            trained //= workload.world
            gradients //= workload.world
            optimizer //= workload.world
    if workload.world > 1 and config.zero_stage:
        optimizer = -(-optimizer // workload.world)
        if config.zero_stage == 2:
            gradients = gradients // workload.world + buffers_in_flight(model)
    outside = 0
    if config.offload_optimizer:
        on_gpu = torch.device(workload.device).type == "cuda"
        outside, optimizer = optimizer, state_window(optimizer, largest_state) if on_gpu else 0
    return dict(weights=frozen + others, trained=trained, gradients=gradients, optimizer=optimizer,
                state_outside=outside, state_on_disk=config.offload_optimizer == "nvme")


def plan_of_step(workload: Workload, lasting: dict[str, int | bool]) -> Plan:
    """The plan of a completed workload. lasting: as of lasting_bytes."""
    model = workload.model
    weights = lasting["weights"]
    if embedding_may_stay_outside(model, workload.device, workload.recompute):
        weights -= model.model.embed_tokens.weight.nbytes
    batch = largest_batch(workload)
    offloaded = 0
    if workload.offloaded or batch.tile:
        kept, working, offloaded = long_row_bytes(model, batch, workload.recompute,
                                                  workload.offloaded)
    else:
        kept, working = activation_bytes(model, batch, workload.recompute)
    return Plan(
        **{**lasting, "weights": weights},
        activations=kept * workload.in_flight,
        working=working,
        workload=workload,
        offloaded=offloaded,
        rollout=workload.rollout_bytes,
    )


def state_window(state: int, largest: int) -> int:
    """Bytes of offloaded optimizer state on a GPU during a step."""
    from scale.offload_state import WINDOW              # only where it is asked for

    return min(state, max(WINDOW, largest))


def optimizer_bytes(model: CausalLM, config: Config) -> tuple[int, int, int]:
    """Bytes of gradients, of optimizer state, and of the state of the largest parameter."""
    parameters = trainable(model)
    optimizer = new_optimizer(parameters, config, model.config, torch.device("cpu"))
    gradients = sum(p.nbytes for p in trainable(model).values())
    for p in parameters.values():           # BAdam leaves gradients to one block alone
        p.requires_grad_(True)
    largest = max((optimizer.rules[group["update"]].state_bytes(p, group)
                   for group in optimizer.param_groups for p in group["params"]), default=0)
    return gradients, optimizer.state_bytes(), largest


def buffers_in_flight(model: CausalLM) -> int:
    """Bytes of the two largest buffers of gradients, which scale/zero.py has at a time.

    Of experts one by one up to all buffers: one without a token holds back its buffer, and those
    after it, until the backward pass ends.
    """
    weights = trainable(model)
    buffers = split_by_bytes(list(weights.values()), BUCKET_BYTES)
    sizes = sorted(sum(p.nbytes for p in group) for group in buffers)
    return sum(sizes if any(map(is_expert, weights)) else sizes[-2:])


def completed(config: Config, workload: Workload) -> Workload:
    """The workload with its model and with a level of recomputation for each block."""
    model = workload.model or model_without_storage(config, workload)
    if workload.recompute:
        return replace(workload, model=model)
    blocks = workload.model_config.num_hidden_layers
    return replace(
        workload,
        model=model,
        recompute=["none" if config.disable_gradient_checkpointing else "block"] * blocks,
        offloaded=blocks if config.offload_activations else 0,
        mlp_tile=config.mlp_tile or 0,
    )


def largest_batch(workload: Workload) -> MicroBatch:
    """The workload's largest micro-batch."""
    embedding = workload.model.model.embed_tokens.weight
    lengths = [length for row in workload.rows for length in row]
    return MicroBatch(
        lengths=lengths,
        compute=workload.dtype.itemsize,
        stream=workload.dtype.itemsize if workload.lora else embedding.itemsize,
        kernel=workload.kernel,
        device=torch.device(workload.device),
        fast=workload.fast and can_be_fast(workload.lora, workload.dtype),
        grouped=workload.grouped and not workload.fp8,
        tile=workload.mlp_tile if workload.mlp_tile < -(-sum(lengths) // workload.parts) else 0,
        parts=workload.parts,
        head_in_tiles=workload.head_in_tiles,
    )


def model_without_storage(config: Config, workload: Workload) -> CausalLM:
    """The model to be trained, on the meta device, with the dtypes that its weights will have."""
    model_config = workload.model_config
    with torch.device("meta"):
        model = CausalLM(model_config)
    if workload.lora:
        base = empty_quantized(model.to(workload.dtype), workload.quant_formats or {})
        attach_lora(base, workload.lora, stored_name=model_config.stored_name,
                    **variant_of(workload.lora))
        return model
    if config.finetuning_type == "freeze":
        from methods.freeze import unfreeze_as_configured       # only where it is asked for

        unfreeze_as_configured(model, config)
    for p in model.parameters():
        in_float32 = p.requires_grad and not config.pure_bf16
        p.data = p.data.to(torch.float32 if in_float32 else workload.dtype)
    return model


def weight_bytes(model: CausalLM, fp8: bool) -> tuple[int, int]:
    """(bytes of frozen weights, bytes of trained weights)."""
    trained = sum(p.nbytes for p in trainable(model).values())
    total = sum(p.nbytes for p in model.parameters())
    total += sum(weight.nbytes for weight in quantized_weights(model).values())
    if fp8:                                         # one byte per number
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                total -= module.weight.numel() * (module.weight.itemsize - 1)
    return total - trained, trained


def gathered_bytes(model: CausalLM, total: int) -> int:
    """Bytes of sharded weights held whole: all but the blocks, and two blocks. total: all weights.

    The two are the block at work and the next one, which is being gathered.
    """
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
    return total - sum(blocks) + 2 * max(blocks)


def all_in(quant_format, model_config: ModelConfig) -> dict:
    """A workload's quant_formats for a model that is quantized while it is loaded."""
    with torch.device("meta"):
        return dict.fromkeys(quantizable_weights(CausalLM(model_config)), quant_format)


def can_be_fast(lora: AdapterConfig | None, dtype: torch.dtype) -> bool:
    """Whether fast/fused_block.py applies: not under autocast, with dropout, DoRA or OFT."""
    if lora:
        return lora.variant in ("", "pissa_init") and not lora.lora_dropout
    return dtype == torch.float32


def lightest(plan: Plan, free_bytes: int | None, config: Config) -> Plan:
    """The plan that fits and costs the least time; where none fits, the smallest plan.

    Keys in the config that decide, such as disable_gradient_checkpointing, true or false, leave the
    other choices.
    """
    keeps_all = "disable_gradient_checkpointing" in config.given \
        and config.disable_gradient_checkpointing
    if free_bytes is None or keeps_all:
        return plan
    ladder = plan_ladder(plan, config)
    lasting = lasting_bytes(config, plan.workload)
    plans = {}

    def fits(rung: int) -> bool:
        plans[rung] = plan_of_step(replace(plan.workload, **ladder[rung]), lasting)
        return plans[rung].fits(free_bytes)

    last = len(ladder) - 1
    first = bisect.bisect_left(range(last), True, key=fits)
    if first == last:                               # taken whether or not it fits
        fits(last)
    return plans[first]


def plan_ladder(plan: Plan, config: Config) -> list[dict]:
    """Fields of the workload, from the fastest to the smallest: what lightest may choose."""
    workload = plan.workload
    if config.offload_activations or "disable_gradient_checkpointing" in config.given:
        ladder = [{"recompute": workload.recompute}]
    else:
        ladder = [{"recompute": levels} for levels in recompute_ladder(plan)]

    on_gpu = torch.device(workload.device).type == "cuda"
    if config.offload_activations is None and on_gpu and not workload.sharded:
        smallest = ladder[-1]
        ladder += [{**smallest, "offloaded": n} for n in range(1, most_offloaded(workload) + 1)]
    is_dense = False in workload.model_config.sparse
    if config.mlp_tile is None and is_dense and not workload.sharded:
        smallest = ladder[-1]
        ladder += [{**smallest, "mlp_tile": tile} for tile in TILES]
    return ladder


def most_offloaded(workload: Workload) -> int:
    """The blocks whose inputs have room in main memory."""
    blocks = workload.model_config.num_hidden_layers
    if workload.host_bytes is None:
        return blocks
    batch = largest_batch(workload)
    one = batch.tokens * workload.model_config.hidden_size * batch.stream
    return min(blocks, int(PAGE_LOCKED * workload.host_bytes) // one)


def recompute_ladder(plan: Plan) -> list[list[str]]:
    """Levels of all blocks, from no recomputation to full; each rung changes one more block."""
    model_config = plan.workload.model_config
    blocks = model_config.num_hidden_layers
    levels = ["none", "block"]
    if largest_batch(plan.workload).fast and not any(model_config.sparse):
        levels = ["none", "mlp", "block"]

    ladder = [["none"] * blocks]
    for less, more in zip(levels, levels[1:]):
        ladder += [[more] * n + [less] * (blocks - n) for n in range(1, blocks + 1)]
    return ladder


def largest_rows(examples, batches: Iterable[list[int]]) -> list[list[int]]:
    """The micro-batch with the most tokens: for each of its rows, the lengths of its sequences.

    batches: lists of row numbers. Of a KTO row only the first sequence is trained on.
    """
    sizes = examples.sizes.tolist()
    largest = max(batches, key=lambda batch: sum(sizes[i] for i in batch))
    rows = []
    for i in largest:
        example = examples[i]
        judged = example.desired is not None
        rows.append(list(example.lengths[:1] if judged else example.lengths))
    return rows


# ---- the start page -----------------------------------------------------------------------------


def plan_lines(plan: Plan, free_bytes: int | None) -> list[str]:
    """The plan as a table for the start page."""
    rows = plan.workload.rows
    tokens, parts = sum(map(sum, rows)), plan.workload.parts
    lines = [f"memory of a rank, largest micro-batch: {tokens:,} tokens (rows: {len(rows)})"]
    if parts > 1:
        lines[0] += f", of which a process has {-(-tokens // parts):,}"
    kept = "kept for the backward pass"
    if plan.workload.in_flight > 1:
        kept += f", of {plan.workload.in_flight} micro-batches in flight"
    for label, size, note in (
        ("frozen weights", plan.weights, ""),
        ("trained weights", plan.trained, ""),
        ("gradients", plan.gradients, ""),
        ("optimizer state", plan.optimizer, ""),
        ("activations", plan.activations, kept),
        ("working memory", plan.working, "the loss, or one block in the backward pass"),
        ("rollout cache", plan.rollout, "while answers are sampled, before these two"),
    ):
        if size:
            lines.append(f"  {label:15} {bytes_in_words(size):>11}  {note}".rstrip())
    if plan.offloaded:
        lines.append(offloaded_in_words(plan))
    if plan.state_outside:
        lines.append(state_in_words(plan))
    total = f"  {'total':15} {bytes_in_words(plan.total):>11}"
    if free_bytes is None:
        return [*lines, total]
    if plan.fits(free_bytes):
        verdict = "fits"
    else:
        verdict = "tight" if plan.total <= free_bytes else "does not fit"
    return [*lines, f"{total}; {bytes_in_words(free_bytes)} free: {verdict}"]


def offloaded_in_words(plan: Plan) -> str:
    """The line of the start page about block inputs in main memory."""
    note = "in main memory, which is the same here"
    if torch.device(plan.workload.device).type == "cuda":
        note = "in main memory, page-locked, not in the total"
        if plan.workload.host_bytes is not None:
            note += f" ({bytes_in_words(plan.workload.host_bytes)} free there)"
    return f"  {'block inputs':15} {bytes_in_words(plan.offloaded):>11}  {note}"


def state_in_words(plan: Plan) -> str:
    """The line of the start page about offloaded optimizer state."""
    note = "in a file in output_dir, not in the total"
    if not plan.state_on_disk:
        on_gpu = torch.device(plan.workload.device).type == "cuda"
        note = "in main memory, page-locked, not in the total" if on_gpu else \
               "in main memory, which is the same here"
    label = "optimizer state"
    return f"  {label:15} {bytes_in_words(plan.state_outside):>11}  {note}"


def checkpointing_in_words(workload: Workload) -> str:
    """Activation checkpointing of the blocks, for the start page."""
    recompute = workload.recompute
    names = {"mlp": "MLP in", "block": "everything in"}
    parts = [f"{what} {recompute.count(level)} of {len(recompute)} blocks"
             for level, what in names.items() if level in recompute]
    if workload.offloaded:
        parts.append(f"inputs of {workload.offloaded} in main memory")
    if workload.mlp_tile:
        parts.append(f"MLPs in tiles of {workload.mlp_tile:,} tokens")
    return ", ".join(parts) or "off"
