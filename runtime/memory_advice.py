"""Compare a memory plan with the free memory, and find the smallest changes of settings that fit.

    for line in advice(plan, available_bytes(device), config):
        print(line)

Each change is tried by planning again, never by a guess. CHANGES lists the kinds of changes from
those that keep the result to those that change what is trained.

Requires: runtime/memory.py (what a training run needs).
Next: train.py, which asks before loading and when memory runs out.

Sources: the Linux kernel's documentation of /proc/meminfo and of control groups, versions 1 and 2.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from errors import bytes_in_words, first_line
from lora import LoRAConfig
from runtime.memory import TILES, USABLE, Plan, all_in, memory_plan, most_offloaded
from runtime.precision import requested_format
from settings.config import Config

WORTH_IT = 0.98         # in a combination, each change must shrink the plan to less than this share

# files of a control group: limit, usage, and the line of memory.stat with reclaimable cache
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file "),                                 # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),         # version 1
)


# ---- free memory --------------------------------------------------------------------------------


def available_bytes(device: torch.device | str, sharers: int = 1, root: str = "/") -> int | None:
    """Free bytes of a GPU or, on a CPU, of this machine or container; None if unknown.

    sharers: processes that share the main memory equally. root: where /proc and /sys lie.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    root = Path(root)
    found = []
    for line in lines_of(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for folder in cgroup_folders(root):
        for names in CGROUP_FILES:
            free = cgroup_free(folder, *names)
            if free is not None:
                found.append(free)
    return min(found) // sharers if found else None


def cgroup_folders(root: Path) -> Iterator[Path]:
    """Folders of this process's memory control groups and their parents (containers, Slurm)."""
    for line in lines_of(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):       # version 2 names none, version 1 one per line
            continue
        folder = root / "sys/fs/cgroup" / ("memory" if controllers else "") / group.strip("/")
        yield folder
        yield from folder.parents


def cgroup_free(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes left below a control group's limit, reclaimable cache included; None without limit."""
    limit_lines = lines_of(folder / limit)
    usage_lines = lines_of(folder / usage)
    if not limit_lines or not usage_lines or not limit_lines[0].isdigit():      # "max": no limit
        return None
    free = int(limit_lines[0]) - int(usage_lines[0])
    for line in lines_of(folder / "memory.stat"):
        if line.startswith(cache):
            free += int(line.split()[1])
    return max(0, free)


def lines_of(path: Path) -> list[str]:
    """The lines of a file; none if it cannot be read, as outside Linux."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


# ---- the smallest changes that fit --------------------------------------------------------------


@dataclass
class SettingsChange:
    """A change of settings, and the plan that results from it."""
    text: str                                           # as printed
    settings: dict                                      # {key of the config: value}
    workload: dict = field(default_factory=dict)        # {field of Workload: value}
    plan: Plan | None = None                            # after the change
    config: Config | None = None                        # after the change


def advice(plan: Plan, free_bytes: int | None, config: Config) -> list[str]:
    """Settings that make the plan fit: each line is enough alone, the mildest first.

    If none is enough alone, one line combines several. Empty if the plan fits already, or if the
    free memory is unknown.
    """
    if free_bytes is None or plan.fits(free_bytes):
        return []
    limit = USABLE * free_bytes
    changes = [smallest_change(kind, plan, config, limit) for kind in CHANGES]
    enough = [change for change in changes if change and change.plan.total <= limit]
    if enough:
        return [f"{change.text} ({bytes_in_words(change.plan.total)})" for change in enough]
    return [combined(plan, config, limit)]


def combined(plan: Plan, config: Config, limit: float) -> str:
    """One line: the changes that make the plan fit together, or the least memory it needs."""
    texts = []
    for kind in CHANGES:
        if plan.total <= limit:
            break
        change = smallest_change(kind, plan, config, limit)
        if change and change.plan.total < WORTH_IT * plan.total:
            plan = change.plan
            config = change.config
            texts.append(change.text)
    least = f"{', '.join(texts) or 'the present settings'} ({bytes_in_words(plan.total)})"
    if plan.total <= limit:
        return f"combined: {least}"
    return ("a smaller model or a larger device; no settings are enough, the smallest plan is with "
            f"{least}")


def smallest_change(kind: Callable, plan: Plan, config: Config,
                    limit: float) -> SettingsChange | None:
    """The mildest change of a kind that is enough, else the strongest one, else None.

    kind: a function of CHANGES. limit: bytes.
    """
    change = None
    for change in kind(plan, config):
        workload = replace(plan.workload, **change.workload)
        if {"lora", "dtype", "quant_formats"} & set(change.workload):
            workload = replace(workload, model=None)            # it is another model
        change.config = replace(config, **change.settings)
        change.plan = memory_plan(change.config, workload)
        if change.plan.total <= limit:
            break
    return change


# ---- kinds of changes: each function returns its changes, the mildest first ---------------------


def checkpoint_all_blocks(plan: Plan, config: Config) -> list[SettingsChange]:
    """Activation checkpointing in all blocks."""
    all_blocks = ["block"] * plan.workload.model_config.num_hidden_layers
    if plan.workload.recompute == all_blocks:
        return []
    key = "disable_gradient_checkpointing"
    return [SettingsChange(f"{key}: false", {key: False}, {"recompute": all_blocks})]


def move_inputs(plan: Plan, config: Config) -> list[SettingsChange]:
    """Activation checkpointing with the blocks' inputs in main memory."""
    workload = plan.workload
    on_gpu = torch.device(workload.device).type == "cuda"
    if workload.offloaded or workload.sharded or not on_gpu:
        return []
    count = most_offloaded(workload)
    settings = {"offload_activations": True, "disable_gradient_checkpointing": False}
    moved = {"recompute": ["block"] * len(workload.recompute), "offloaded": count}
    return [SettingsChange("offload_activations: true", settings, moved)] if count else []


def tile_the_mlps(plan: Plan, config: Config) -> list[SettingsChange]:
    """MLPs in tiles, where all blocks recompute them anyway."""
    workload = plan.workload
    all_recompute = set(workload.recompute) == {"block"}
    if workload.mlp_tile or workload.sharded or not all_recompute or all(
            workload.model_config.sparse):
        return []
    return [SettingsChange(f"mlp_tile: {tile}", {"mlp_tile": tile}, {"mlp_tile": tile})
            for tile in TILES]


def use_sdpa(plan: Plan, config: Config) -> list[SettingsChange]:
    """A kernel that does not hold all attention scores."""
    if config.flash_attn != "disabled" or plan.workload.model_config.attn_softcap:
        return []
    return [SettingsChange("flash_attn: auto", {"flash_attn": "auto"}, {"kernel": "sdpa-flash"})]


def split_joined(plan: Plan, config: Config) -> list[SettingsChange]:
    """Micro-batches one by one, where several of them run as one pass."""
    rows = plan.workload.rows
    size = config.per_device_train_batch_size
    if config.token_budget or not config.join_micro_batches or len(rows) <= size:
        return []
    settings = {"join_micro_batches": False}
    return [SettingsChange("join_micro_batches: false", settings, {"rows": rows[:size]})]


def smaller_budget(plan: Plan, config: Config) -> list[SettingsChange]:
    """Micro-batches with fewer tokens: token_budget halved, halved again, ..."""
    rows = plan.workload.rows
    changes = []
    for halvings in range(1, 8):
        budget = (config.token_budget or 0) >> halvings
        if budget:
            count = max(1, len(rows) * budget // config.token_budget)
            settings = {"token_budget": budget}
            text = f"token_budget: {budget}"
            changes.append(SettingsChange(text, settings, {"rows": rows[:count]}))
    return changes


def smaller_batch(plan: Plan, config: Config) -> list[SettingsChange]:
    """Micro-batches with fewer rows, and more of them in a step."""
    if config.token_budget or split_joined(plan, config):
        return smaller_budget(plan, config)
    rows = sorted(plan.workload.rows, key=sum, reverse=True)
    size = config.per_device_train_batch_size
    total = size * config.gradient_accumulation_steps
    changes = []
    for smaller in range(size - 1, 0, -1):
        if total % smaller:
            continue
        accumulation = total // smaller
        settings = {
            "per_device_train_batch_size": smaller,
            "gradient_accumulation_steps": accumulation,
        }
        text = (f"per_device_train_batch_size: {smaller} with "
                f"gradient_accumulation_steps: {accumulation}")
        changes.append(SettingsChange(text, settings, {"rows": rows[:smaller]}))
    return changes


def use_bfloat16(plan: Plan, config: Config) -> list[SettingsChange]:
    """Matrix products and frozen weights in 16 bits."""
    if plan.workload.dtype != torch.float32:
        return []
    return [SettingsChange("bf16: true", {"bf16": True}, {"dtype": torch.bfloat16})]


def shorter_rows(plan: Plan, config: Config) -> list[SettingsChange]:
    """A smaller cutoff_len: 7/8, 6/8, ... of the longest row, rounded down to multiples of 64."""
    rows = plan.workload.rows
    longest = min(max(map(sum, rows)), config.cutoff_len)
    lengths = {longest * eighths // 8 // 64 * 64 for eighths in range(1, 8)} - {0}
    changes = []
    for length in sorted(lengths, reverse=True):
        truncated = [truncate_row(row, length) for row in rows]
        settings = {"cutoff_len": length}
        changes.append(SettingsChange(f"cutoff_len: {length}", settings, {"rows": truncated}))
    return changes


def truncate_row(row: list[int], tokens: int) -> list[int]:
    """The lengths of a row's sequences after it is truncated to this many tokens."""
    lengths = []
    for length in row:
        left = tokens - sum(row[:len(lengths)])
        if left <= 0:
            break
        lengths.append(min(length, left))
    return lengths


def use_lora(plan: Plan, config: Config) -> list[SettingsChange]:
    """LoRA instead of full fine-tuning."""
    if plan.workload.lora:
        return []
    lora = LoRAConfig(config.lora_rank, target_modules=config.lora_target)
    settings = {"finetuning_type": "lora"}
    return [SettingsChange("finetuning_type: lora", settings, {"lora": lora})]


def use_4_bits(plan: Plan, config: Config) -> list[SettingsChange]:
    """LoRA on a base in 4 bits."""
    workload = plan.workload
    if not workload.lora or workload.quant_formats or workload.fp8 or workload.sharded:
        return []
    settings = {"quantization_bit": 4}
    quant_format = requested_format(replace(config, **settings))
    formats = all_in(quant_format, workload.model_config)
    return [SettingsChange("quantization_bit: 4", settings, {"quant_formats": formats})]


CHANGES = (
    checkpoint_all_blocks,
    move_inputs,
    tile_the_mlps,
    use_sdpa,
    split_joined,
    smaller_batch,
    use_bfloat16,
    shorter_rows,
    use_lora,
    use_4_bits,
)


# ---- out of memory ------------------------------------------------------------------------------


def explain_oom(error: BaseException, plan: Plan, free_bytes: int | None, config: Config) -> str:
    """A message with the error, the plan, and the smallest changes that would probably fit.

    Since the plan did not fit after all, the advice is for less memory than it needs.
    """
    assumed = int(min(plan.total, free_bytes or plan.total) * USABLE)
    free = f"; {bytes_in_words(free_bytes)} were free" if free_bytes else ""
    return "\n  ".join([
        f"out of memory: {first_line(error)}",
        f"planned: {bytes_in_words(plan.total)}{free}. Settings that would probably fit, and the "
        "memory of a rank with them:",
        *advice(plan, assumed, config),
    ])
