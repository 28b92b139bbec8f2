"""The optimizer, its parameter groups and the learning-rate schedules, as LLaMA-Factory users know them.

A schedule here is a plain function: schedule(config, total_steps) returns factor(step), and the learning rate of
optimizer step `step` (0-based) is learning_rate * factor(step).

Read before: lora.py, methods/optimizers.py. Read after: train.py.
Papers: LoRA+ arXiv:2402.12354, cosine schedule arXiv:1608.03983, warmup-stable-decay
arXiv:2404.06395, NEFTune arXiv:2310.05914.
"""
import math
from collections import defaultdict

import torch
from torch.profiler import record_function

from errors import did_you_mean
from methods.optimizers import SMALLEST, UPDATES


def _linear(s, total, warm, kw):
    return max(0.0, (total - s) / max(1, total - warm))


def _cosine(s, total, warm, kw):
    progress = (s - warm) / max(1, total - warm)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * 2 * kw.get("num_cycles", 0.5) * progress)))


def _cosine_with_restarts(s, total, warm, kw):
    progress = (s - warm) / max(1, total - warm)
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (kw.get("num_cycles", 1) * progress % 1)))


def _cosine_with_min_lr(s, total, warm, kw):
    floor = kw["min_lr_rate"]
    return max(0.0, _cosine(s, total, warm, kw) * (1 - floor) + floor)


def _polynomial(s, total, warm, kw):
    end = kw.get("lr_end", 1e-7) / kw["learning_rate"]
    if s > total:
        return end
    return (1 - end) * (1 - (s - warm) / (total - warm)) ** kw.get("power", 1.0) + end


def _inverse_sqrt(s, total, warm, kw):
    scale = kw.get("timescale") or warm or 10_000
    return 1 / math.sqrt((s + scale - warm) / scale)


def _constant(s, total, warm, kw):
    return 1.0


def _warmup_stable_decay(s, total, warm, kw):
    stable = kw.get("num_stable_steps", (total - warm) // 3 if "num_decay_steps" not in kw
                    else total - warm - kw["num_decay_steps"])
    decay, floor = kw.get("num_decay_steps", total - warm - stable), kw.get("min_lr_ratio", 0.0)
    if s < warm + stable:
        return 1.0
    if s >= warm + stable + decay:
        return floor
    progress = (s - warm - stable) / max(1, decay)
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * 2 * kw.get("num_cycles", 0.5) * progress)), "linear": 1 - progress,
            "1-sqrt": 1 - math.sqrt(progress)}[kw.get("decay_type", "cosine")]
    return max(0.0, fall * (1 - floor) + floor)


SCHEDULES = {     # lr_scheduler_type: factor after warm-up, from (step, total steps, warm-up steps, kwargs); its kwargs
    "linear": (_linear, ""),
    "cosine": (_cosine, "num_cycles"),
    "cosine_with_restarts": (_cosine_with_restarts, "num_cycles"),
    "cosine_with_min_lr": (_cosine_with_min_lr, "num_cycles min_lr min_lr_rate"),
    "polynomial": (_polynomial, "lr_end power"),
    "inverse_sqrt": (_inverse_sqrt, "timescale"),
    "constant": (_constant, ""),
    "constant_with_warmup": (_constant, ""),
    "warmup_stable_decay": (_warmup_stable_decay, "num_stable_steps num_decay_steps decay_type min_lr_ratio num_cycles"),
}


def warmup_steps(config, total_steps: int) -> int:
    """Optimizer steps of warm-up: warmup_steps if given (a fraction below 1 is a share of all), else the ratio."""
    given = config.warmup_steps or config.warmup_ratio or 0
    return int(given) if given >= 1 else math.ceil(total_steps * given)


def schedule(config, total_steps: int):
    """factor(step) for step 0 … total_steps - 1. Raises ValueError naming the key for arguments that make no sense."""
    kind, rate, kw = config.lr_scheduler_type, config.learning_rate, dict(config.lr_scheduler_kwargs or {})
    shape, known = SCHEDULES[kind]
    for name, value in kw.items():
        if name not in known.split():
            hint = did_you_mean(name, known.split())
            raise ValueError(f"lr_scheduler_kwargs: lr_scheduler_type {kind} has no {name!r}{hint}; "
                             f"it knows {known or 'none'}")
        if name != "decay_type" and type(value) not in (int, float):
            raise ValueError(f"lr_scheduler_kwargs: {name}: {value!r} is not a number")
    if kind == "cosine_with_min_lr":
        if ("min_lr" in kw) == ("min_lr_rate" in kw):
            raise ValueError("lr_scheduler_type: cosine_with_min_lr needs lr_scheduler_kwargs with either min_lr (a rate) "
                             "or min_lr_rate (a share of learning_rate)")
        kw.setdefault("min_lr_rate", kw.get("min_lr", 0) / rate)
    if kw.get("decay_type", "cosine") not in ("cosine", "linear", "1-sqrt"):
        raise ValueError(f"lr_scheduler_kwargs: decay_type {kw['decay_type']!r} is none of cosine, linear, 1-sqrt")
    kw["learning_rate"], low = rate, kw.get("min_lr_ratio", 0.0)          # warmup_stable_decay climbs from its floor
    warm = 0 if kind == "constant" else warmup_steps(config, total_steps)

    def factor(step):
        return low + (1 - low) * step / max(1, warm) if step < warm else shape(step, total_steps, warm, kw)

    return factor


def parameter_groups(named: dict, config) -> list[dict]:
    """The optimizer's groups from {name: parameter}. Each holds `base_lr` and `update`, a name in UPDATES; decay spares
    biases and norms, not DoRA's lengths.

    LoRA+ (loraplus_lr_ratio): matrices B learn `ratio` times faster than A (arXiv:2402.12354, sec. 4). The first group
    is that whose rate the logs show.
    """
    rate, ratio = config.learning_rate, config.loraplus_lr_ratio

    def key(name, p):
        thin = p.dim() == 1 and not name.endswith("lora_magnitude_vector")
        spared = thin or "norm" in name.lower() or name.endswith("bias")
        if ratio is not None or config.use_galore:          # there LayerNorm alone counts to LLaMA-Factory, not RMSNorm
            spared = "bias" in name
        if config.use_muon:                                 # and there nothing is spared
            spared = False
        fast = ratio is not None and ("lora_B" in name or p.dim() == 1)
        return rate * ratio if fast else rate, not spared, update_of(name, p, config)

    groups = {}
    for name, p in named.items():
        groups.setdefault(key(name, p), []).append(p)
    order = sorted(groups, key=lambda k: (k[0] != rate, not k[1], k[2]))
    return [{"params": groups[k], "lr": k[0], "base_lr": k[0], "weight_decay": config.weight_decay if k[1] else 0.0,
             "update": k[2]} for k in order]


def update_of(name: str, p, config) -> str:
    """The name in UPDATES of what changes this parameter: embedding, head, and what is no matrix, are left to AdamW."""
    inner = p.dim() == 2 and "embed" not in name and "lm_head" not in name
    if config.use_muon:
        return "muon" if inner else "adamw"
    if config.use_galore:
        meant = inner if config.galore_target == ["all"] else any(part in name for part in config.galore_target)
        return "galore" if meant and p.dim() == 2 and "embed" not in name else "adamw"
    if "8bit" in config.optim:
        return "adamw_8bit" if p.numel() >= SMALLEST and "embed" not in name else "adamw"
    return "adamw"


class Optimizer:
    """What torch.optim offers, as far as we need it, without what that does when it is made: import torch's compiler,
    which takes as long as a small run's first steps.

    param_groups: as of parameter_groups, and what methods/optimizers.py asks of them. state: {parameter: {field: tensor}}; a
    parameter that has never had a gradient has none.
    """

    def __init__(self, groups: list):
        self.param_groups, self.state = groups, defaultdict(dict)

    @record_function("optimizer")
    @torch.no_grad()
    def step(self):
        """Change the parameters that have a gradient."""
        for group in self.param_groups:
            params, (fresh, update, _) = [p for p in group["params"] if p.grad is not None], UPDATES[group["update"]]
            for p in params:
                if not self.state[p]:
                    self.state[p] = fresh(p, group)
            if params:
                update(params, [self.state[p] for p in params], group)


def make_optimizer(named: dict, config, device) -> Optimizer:
    """The optimizer of the trainable parameters, in LLaMA-Factory's groups; AdamW is fused where torch has the kernel.

    Raises ValueError for a galore_target that means none of them.
    """
    more = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon, "rank": config.galore_rank,
            "gap": config.galore_update_interval, "scale": config.galore_scale,
            "eps_first": config.use_galore or config.use_muon}
    groups = [group | more for group in parameter_groups(named, config)]
    if config.use_galore and not any(group["update"] == "galore" for group in groups):
        raise ValueError(f"galore_target: {', '.join(config.galore_target)} is in the name of no matrix that learns; "
                         f"such names are {', '.join(list(named)[:4])}")
    for group in groups:
        if group["update"] == "adamw" and (device.type not in ("cpu", "cuda") or group["eps_first"]):
            group["update"] = "adamw_plain"
    return Optimizer(groups)


def state_bytes(named: dict, config) -> int:
    """Bytes that the optimizer will remember of these parameters, which may be on the meta device."""
    return sum(UPDATES[group["update"]][2](p, group)
               for group in make_optimizer(named, config, torch.device("cpu")).param_groups for p in group["params"])


def set_rates(optimizer, factor: float) -> float:
    """Give every group base_lr * factor; returns the rate of the first group, which the logs show."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def add_neftune(model, alpha: float):
    """Add noise to the embeddings in training (NEFTune, arXiv:2310.05914).

    It is uniform in +-alpha / sqrt(L * D) for a sequence of L tokens; the layout that the model is
    called with tells where the sequences of a row end.
    """
    layouts = []

    def note_layout(module, args, kwargs):
        layouts[:] = [kwargs["layout"] if "layout" in kwargs else args[2]]

    def add_noise(module, args, out):                                           # out (1, N, D)
        if not torch.is_grad_enabled():
            return out
        lengths = layouts[0].cu_seqlens.diff()
        lengths = lengths.repeat_interleave(lengths, output_size=out.shape[1])  # (N,); no waiting
        bound = alpha / torch.sqrt(lengths.float() * out.shape[-1])             # (N,)
        noise = torch.rand_like(out, dtype=torch.float32) * 2 - 1
        return out + noise.mul(bound[None, :, None]).to(out.dtype)

    model.register_forward_pre_hook(note_layout, with_kwargs=True)
    model.model.embed_tokens.register_forward_hook(add_noise)
