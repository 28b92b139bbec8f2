"""Is there room for a training: the memory there is, and the smallest changes of settings that would fit into it.

    for line in advice(plan, available_bytes(device), config): print(line)

A change is tried by planning again, never by guessing: the kinds of changes stand in the order of CHANGES, from those
that leave the result as it is to those that change what is trained.

Read before: plan.py (what a training needs). Read after: train.py, which asks before loading and when memory runs out.
Sources: the Linux kernel's documentation of /proc/meminfo and of control groups, versions 1 and 2.
"""
from dataclasses import replace
from pathlib import Path

import torch

from lora import LoRAConfig
from model import bytes_in_words
from plan import SPARE, Plan, all_in, memory_plan
from quant import Form

WORTH_IT = 0.98         # what a change among several must bring the plan down to

CGROUP_FILES = (("memory.max", "memory.current", "inactive_file "),     # of version 2, of version 1
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "))


# ---- what there is, and what would fit --------------------------------------------------------------------------


def available_bytes(device, sharers: int = 1, root: str = "/") -> int | None:
    """Free bytes of a card or, for each of `sharers` processes, of this machine or container; None if unknown."""
    device, root, found = torch.device(device), Path(root), []
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in lines_of(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for line in lines_of(root / "proc/self/cgroup"):            # the limits of containers and of Slurm
        _, kind, group = line.split(":", 2)
        group = root / "sys/fs/cgroup" / ("memory" if kind else "") / group.strip("/")
        for folder in (group, *group.parents) if kind in ("", "memory") else ():
            for limit, used, cached in CGROUP_FILES:
                limit, used = lines_of(folder / limit), lines_of(folder / used)
                if limit and used and limit[0].isdigit():       # else "max": no limit here
                    free = int(limit[0]) - int(used[0])
                    found.append(max(0, free + sum(int(line.split()[1]) for line in lines_of(folder / "memory.stat")
                                                   if line.startswith(cached))))
    return min(found) // sharers if found else None


def lines_of(path) -> list[str]:
    """A file's lines; none where there is no such file, as outside of Linux."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def advice(plan: Plan, available: int | None, config) -> list[str]:
    """Settings that would make the plan fit, each enough alone, those first which change the result least; or, if none
    is enough, several together. Empty where it fits, or where nobody knows what there is."""
    if available is None or plan.total <= SPARE * available:
        return []
    limit, together = SPARE * available, []
    alone = [after(change, plan, config, limit) for change in CHANGES]
    fitting = [f"{text} ({bytes_in_words(other.total)})" for text, other, _ in filter(None, alone)
               if other.total <= limit]
    if fitting:
        return fitting
    for change in CHANGES:
        found = after(change, plan, config, limit) if plan.total > limit else None
        if found and found[1].total < WORTH_IT * plan.total:
            text, plan, config = found
            together.append(text)
    least = f"{', '.join(together) or 'the present settings'} ({bytes_in_words(plan.total)})"
    return [f"together {least}" if plan.total <= limit else
            f"a smaller model or a larger device; no settings are enough, the least takes {least}"]


def after(change, plan: Plan, config, limit: float):
    """(text, plan, config) after the mildest change of a kind that is enough, else after the strongest, or None."""
    found = None
    for text, settings, asked in change(plan, config):
        other = plan.asked | asked | ({"model": None} if {"lora", "dtype", "forms"} & set(asked) else {})
        settings = replace(config, **settings)
        found = text, memory_plan(settings, **other), settings
        if found[1].total <= limit:
            break
    return found


# each: [(what to write, {key of the config: value}, {argument of memory_plan: value}), …], the mildest first


def recompute(plan, config):
    name, all_blocks = "disable_gradient_checkpointing", ["block"] * plan.asked["shape"].num_hidden_layers
    lighter = plan.asked["recompute"] != all_blocks
    return [(f"{name}: false", {name: False}, {"recompute": all_blocks})] if lighter else []


def other_kernel(plan, config):
    slow = config.flash_attn == "disabled" and not plan.asked["shape"].attn_softcap
    return [("flash_attn: auto", {"flash_attn": "auto"}, {"kernel": "sdpa-flash"})] if slow else []


def apart(plan, config):
    rows, size = plan.asked["rows"], config.per_device_train_batch_size
    together = config.join_micro_batches and not config.token_budget and len(rows) > size
    return [("join_micro_batches: false", {"join_micro_batches": False}, {"rows": rows[:size]})] if together else []


def smaller_budget(plan, config):
    rows, budgets = plan.asked["rows"], [(config.token_budget or 0) >> halved for halved in range(1, 8)]
    return [(f"token_budget: {n}", {"token_budget": n}, {"rows": rows[:max(1, len(rows) * n // config.token_budget)]})
            for n in budgets if n]


def smaller_batch(plan, config):
    if config.token_budget or apart(plan, config):
        return smaller_budget(plan, config)
    size, rows = config.per_device_train_batch_size, sorted(plan.asked["rows"], key=sum, reverse=True)
    total = size * config.gradient_accumulation_steps
    return [(f"per_device_train_batch_size: {n} with gradient_accumulation_steps: {total // n}",
             {"per_device_train_batch_size": n, "gradient_accumulation_steps": total // n}, {"rows": rows[:n]})
            for n in range(size - 1, 0, -1) if total % n == 0]


def half_precision(plan, config):
    full = plan.asked["dtype"] == torch.float32
    return [("bf16: true", {"bf16": True}, {"dtype": torch.bfloat16})] if full else []


def shorter_rows(plan, config):
    rows = plan.asked["rows"]
    longest = min(max(map(sum, rows)), config.cutoff_len)
    lengths = sorted({longest * eighths // 8 // 64 * 64 for eighths in range(1, 8)} - {0}, reverse=True)
    return [(f"cutoff_len: {n}", {"cutoff_len": n}, {"rows": [cut(row, n) for row in rows]}) for n in lengths]


def cut(row: list, tokens: int) -> list:
    """The lengths of what is left of a row's sequences in so many tokens."""
    return [min(n, tokens - sum(row[:i])) for i, n in enumerate(row) if sum(row[:i]) < tokens]


def adapters(plan, config):
    lora = LoRAConfig(config.lora_rank, target_modules=config.lora_target)
    return [("finetuning_type: lora", {"finetuning_type": "lora"}, {"lora": lora})] if not plan.asked["lora"] else []


def quantised(plan, config):
    asked, settings = plan.asked, {"quantization_bit": 4}
    if not asked["lora"] or asked["forms"] or asked["fp8"] or asked["sharded"]:
        return []
    return [("quantization_bit: 4", settings, {"forms": all_in(Form("nf4"), asked["shape"])})]


CHANGES = (recompute, other_kernel, apart, smaller_batch, half_precision, shorter_rows, adapters, quantised)


# ---- when memory runs out all the same --------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Is this what torch or the machine says when memory runs out?"""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def explain_oom(error: BaseException, plan: Plan, available: int | None, config) -> str:
    """What happened, and the smallest changes that would fit: what was needed is known to be more than there was."""
    room = int(min(plan.total, available or plan.total) * SPARE)
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    free = f" of {bytes_in_words(available)} that were free" if available else ""
    return "\n  ".join([f"out of memory: {said}", f"the plan was {bytes_in_words(plan.total)}{free}. What would "
                        "probably fit, with what a rank then needs:", *advice(plan, room, config)])
