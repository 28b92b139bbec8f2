"""The learning rate, the optimizer's parameter groups, and AdamW.

The learning rate of optimizer step `step` (from 0) is learning_rate * lr_schedule(config,
total_steps)(step); train.py sets it before each step with set_lr. Schedules and groups are those of
LLaMA-Factory, by its keys; those that follow the evaluations are in methods/eval_schedules.py.
Other optimizers (8-bit AdamW, Muon, GaLore) are passed in, see methods/optimizers.py.

Requires: lora.py.
Next: train.py, methods/optimizers.py.
Papers: AdamW arXiv:1711.05101, LoRA+ arXiv:2402.12354, cosine schedule arXiv:1608.03983,
warmup-stable-decay arXiv:2404.06395, NEFTune arXiv:2310.05914.
"""
import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import record_function

from errors import did_you_mean


# ---- the learning rate: factor after warmup, from (step, total steps, warmup steps, kwargs) -----


def linear(step, total, warmup, kwargs):
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step, total, warmup, kwargs):
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * 2 * kwargs.get("num_cycles", 0.5) * progress)))


def cosine_with_restarts(step, total, warmup, kwargs):
    progress = (step - warmup) / max(1, total - warmup)
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (kwargs.get("num_cycles", 1) * progress % 1)))


def cosine_with_min_lr(step, total, warmup, kwargs):
    floor = kwargs["min_lr_rate"]
    return max(0.0, cosine(step, total, warmup, kwargs) * (1 - floor) + floor)


def cosine_warmup_with_min_lr(step, total, warmup, kwargs):
    # reaches the floor at the last step
    return cosine_with_min_lr(step + 1, total, warmup, kwargs)


def polynomial(step, total, warmup, kwargs):
    end = kwargs.get("lr_end", 1e-7) / kwargs["learning_rate"]
    if step > total:
        return end
    return (1 - end) * (1 - (step - warmup) / (total - warmup)) ** kwargs.get("power", 1.0) + end


def inverse_sqrt(step, total, warmup, kwargs):
    scale = kwargs.get("timescale") or warmup or 10_000
    return 1 / math.sqrt((step + scale - warmup) / scale)


def constant(step, total, warmup, kwargs):
    return 1.0


def warmup_stable_decay(step, total, warmup, kwargs):
    if "num_decay_steps" in kwargs:
        stable = kwargs.get("num_stable_steps", total - warmup - kwargs["num_decay_steps"])
    else:
        stable = kwargs.get("num_stable_steps", (total - warmup) // 3)
    decay = kwargs.get("num_decay_steps", total - warmup - stable)
    floor = kwargs.get("min_lr_ratio", 0.0)
    if step < warmup + stable:
        return 1.0
    if step >= warmup + stable + decay:
        return floor
    progress = (step - warmup - stable) / max(1, decay)
    decays = {
        "cosine": 0.5 * (1 + math.cos(math.pi * 2 * kwargs.get("num_cycles", 0.5) * progress)),
        "linear": 1 - progress,
        "1-sqrt": 1 - math.sqrt(progress),
    }
    decay_factor = decays[kwargs.get("decay_type", "cosine")]
    return max(0.0, decay_factor * (1 - floor) + floor)


SCHEDULES = {       # lr_scheduler_type: (function, the lr_scheduler_kwargs it knows)
    "linear": (linear, ""),
    "cosine": (cosine, "num_cycles"),
    "cosine_with_restarts": (cosine_with_restarts, "num_cycles"),
    "cosine_with_min_lr": (cosine_with_min_lr, "num_cycles min_lr min_lr_rate"),
    "cosine_warmup_with_min_lr": (
        cosine_warmup_with_min_lr, "num_cycles min_lr min_lr_rate warmup_lr_rate"),
    "polynomial": (polynomial, "lr_end power"),
    "inverse_sqrt": (inverse_sqrt, "timescale"),
    "constant": (constant, ""),
    "constant_with_warmup": (constant, ""),
    "warmup_stable_decay": (
        warmup_stable_decay,
        "num_stable_steps num_decay_steps decay_type min_lr_ratio num_cycles",
    ),
}


WORDS = {           # lr_scheduler_kwargs that are no numbers
    "decay_type": ("cosine", "linear", "1-sqrt"),
    "mode": ("min", "max"),
    "threshold_mode": ("rel", "abs"),
    "smooth": (True, False),
    "verbose": (True, False),
}
WITH_MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")


def first_warmup(step: int, warmup: int, start: float | None) -> float:
    """Warmup of cosine_warmup_with_min_lr: from `start`, or 1 / warm, at the first step to 1."""
    if start is None:
        return (step + 1) / max(1, warmup)
    return start + (1 - start) * step / max(1, warmup - 1)


def warmup_steps(config, total_steps: int) -> int:
    """Optimizer steps of warmup: warmup_steps (below 1: a share of all), else warmup_ratio."""
    given = config.warmup_steps or config.warmup_ratio or 0
    return int(given) if given >= 1 else math.ceil(total_steps * given)


def lr_schedule(config, total_steps: int) -> Callable[[int], float]:
    """factor(step) for step 0 ... total_steps - 1: a linear warmup, then the schedule.

    Raises ValueError that names the key for an invalid argument.
    """
    kind = config.lr_scheduler_type
    kwargs = dict(config.lr_scheduler_kwargs or {})
    schedule, known = SCHEDULES[kind]
    check_schedule_kwargs(kind, kwargs, known.split())
    if kind in WITH_MIN_LR:
        kwargs.setdefault("min_lr_rate", kwargs.get("min_lr", 0) / config.learning_rate)
    kwargs["learning_rate"] = config.learning_rate
    low = kwargs.get("min_lr_ratio", 0.0)               # warmup_stable_decay starts from its floor
    warmup = 0 if kind == "constant" else warmup_steps(config, total_steps)

    def factor(step: int) -> float:
        if step < warmup and kind == "cosine_warmup_with_min_lr":
            return first_warmup(step, warmup, kwargs.get("warmup_lr_rate"))
        if step < warmup:
            return low + (1 - low) * step / max(1, warmup)
        return schedule(step, total_steps, warmup, kwargs)

    return factor


def check_schedule_kwargs(kind: str, kwargs: dict, known: list[str]):
    """Raises ValueError for lr_scheduler_kwargs that the schedule does not know."""
    for name, value in kwargs.items():
        if name not in known:
            raise ValueError(f"lr_scheduler_kwargs: lr_scheduler_type {kind} has no {name!r}"
                             f"{did_you_mean(name, known)}; it knows {' '.join(known) or 'none'}")
        if name in WORDS and value not in WORDS[name]:
            words = ", ".join(str(word) for word in WORDS[name])
            raise ValueError(f"lr_scheduler_kwargs: {name} {value!r} is none of {words}")
        if name not in WORDS and type(value) not in (int, float):
            raise ValueError(f"lr_scheduler_kwargs: {name}: {value!r} is not a number")
    if kind in WITH_MIN_LR and ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
        raise ValueError(f"lr_scheduler_type: {kind} needs lr_scheduler_kwargs with either min_lr "
                         "(a rate) or min_lr_rate (a share of learning_rate)")


def set_lr(optimizer, factor: float | dict[float, float]) -> float:
    """Give every group base_lr * factor; returns the first group's rate, which the logs show.

    factor: one for all, or {base_lr: factor}.
    """
    for group in optimizer.param_groups:
        base_lr = group["base_lr"]
        group["lr"] = base_lr * (factor[base_lr] if isinstance(factor, dict) else factor)
    return optimizer.param_groups[0]["lr"]


# ---- AdamW --------------------------------------------------------------------------------------


class UpdateRule(NamedTuple):
    """How a kind of optimizer changes parameters.

    init_state: (p, group) -> {field: tensor}, which checkpoints keep by these names.
    update: (params, states, group), in place; p.grad is given. group: lr, weight_decay, betas, eps.
    state_bytes: (p, group) -> bytes of init_state's tensors, also for p on the meta device.
    """
    init_state: Callable
    update: Callable
    state_bytes: Callable


def adamw_state(p, group):
    return {
        "step": torch.zeros((), device=p.device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


def adamw_state_bytes(p, group):
    return 4 + 2 * p.nbytes


def adamw_fused(params, states, group):
    """AdamW in one kernel for all parameters of a group."""
    exp_avgs = [state["exp_avg"] for state in states]
    exp_avg_sqs = [state["exp_avg_sq"] for state in states]
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(params, [p.grad for p in params], exp_avgs, exp_avg_sqs, [], steps,
                        lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                        maximize=False)


def adamw_plain(params, states, group):
    """The plain twin of adamw_fused: arXiv:1711.05101, algorithm 2, in the paper's order."""
    for p, state in zip(params, states):
        state["step"] += 1
        direction = adam_direction(p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"],
                                   group)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])


def adam_direction(g, m, v, t, group):
    """Update the moments m and v by g, in place; returns m_hat / (sqrt(v_hat) + eps) of step t.

    eps_first: eps is added before v is corrected for its bias (arXiv:1412.6980, end of sec. 2), as
    the packages of Muon and GaLore do.
    """
    beta1, beta2 = group["betas"]
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction = (1 - beta2 ** t).sqrt()
    eps = group["eps"] / correction if group.get("eps_first") else group["eps"]
    return m / (1 - beta1 ** t) / (v.sqrt() / correction + eps)


ADAMW = {
    "adamw": UpdateRule(adamw_state, adamw_fused, adamw_state_bytes),
    "adamw_plain": UpdateRule(adamw_state, adamw_plain, adamw_state_bytes),
}


# ---- the optimizer ------------------------------------------------------------------------------


def always_adamw(name: str, p: nn.Parameter, config) -> str:
    return "adamw"


def parameter_groups(parameters: dict, config, rule_of: Callable = always_adamw) -> list[dict]:
    """The optimizer's groups from {name: parameter}.

    Each holds `base_lr` and `update`, the name of an UpdateRule. Biases and norms have no weight
    decay, DoRA's magnitudes have. LoRA+ (loraplus_lr_ratio): matrices B have a learning rate
    `ratio` times that of A (arXiv:2402.12354, sec. 4). The first group's rate is the one logged.
    """
    lr = config.learning_rate
    ratio = config.loraplus_lr_ratio

    def key(name, p):
        is_vector = p.dim() == 1 and not name.endswith("lora_magnitude_vector")
        no_decay = is_vector or "norm" in name.lower() or name.endswith("bias")
        # so LLaMA-Factory: RMSNorm weights decay
        if ratio is not None or config.use_galore or config.use_apollo:
            no_decay = "bias" in name
        if config.use_muon:                         # with Muon everything decays
            no_decay = False
        uses_loraplus_rate = ratio is not None and ("lora_B" in name or p.dim() == 1)
        return lr * ratio if uses_loraplus_rate else lr, not no_decay, rule_of(name, p, config)

    groups = {}
    for name, p in parameters.items():
        groups.setdefault(key(name, p), []).append(p)
    found = []
    for group_lr, decays, rule in sorted(groups, key=lambda k: (k[0] != lr, not k[1], k[2])):
        found.append({
            "params": groups[group_lr, decays, rule],
            "lr": group_lr,
            "base_lr": group_lr,
            "weight_decay": config.weight_decay if decays else 0.0,
            "update": rule,
        })
    return found


class Optimizer:
    """The part of torch.optim.Optimizer that we need.

    torch's own class imports its compiler when it is created, which takes as long as the first
    steps of a small run. param_groups: see parameter_groups. state: {parameter: {field: tensor}},
    without parameters that have never had a gradient. rules: {name: UpdateRule}.
    """

    def __init__(self, groups: list[dict], rules: dict[str, UpdateRule] = ADAMW):
        self.param_groups = groups
        self.rules = rules
        self.state = defaultdict(dict)

    @record_function("optimizer")
    @torch.no_grad()
    def step(self):
        """Change the parameters that have a gradient."""
        for group in self.param_groups:
            rule = self.rules[group["update"]]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = rule.init_state(p, group)
            if params:
                rule.update(params, [self.state[p] for p in params], group)

    def put(self, p: nn.Parameter, field: str, value: torch.Tensor):
        """Set a tensor of a parameter's state, as it was saved."""
        self.state[p][field] = value.to(p.device)

    def close(self):
        """Remove what the optimizer keeps on the disk: nothing here, see scale/offload_state.py."""

    def state_bytes(self) -> int:
        """Bytes of the state of all parameters, which may be on the meta device."""
        return sum(self.rules[group["update"]].state_bytes(p, group)
                   for group in self.param_groups for p in group["params"])


def make_optimizer(parameters: dict, config, device: torch.device,
                   rules: dict[str, UpdateRule] = ADAMW,
                   rule_of: Callable = always_adamw, settings: dict = {}) -> Optimizer:
    """The optimizer of {name: trained parameter}; AdamW is fused where torch has the kernel.

    rules, rule_of, and settings, which every group gets: see methods/optimizers.py. Raises
    ValueError for a galore_target or apollo_target that selects none of the parameters.
    """
    shared = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        **settings,
    }
    groups = [group | shared for group in parameter_groups(parameters, config, rule_of)]
    for used, rule, target in ((config.use_galore, "galore", config.galore_target),
                               (config.use_apollo, "apollo", config.apollo_target)):
        if used and not any(group["update"] == rule for group in groups):
            raise ValueError(
                f"{rule}_target: {', '.join(target)} is in the name of no trained matrix; such "
                f"names are {', '.join(list(parameters)[:4])}")
    for group in groups:
        not_fused = device.type not in ("cpu", "cuda") or group.get("eps_first")
        if group["update"] == "adamw" and not_fused:
            group["update"] = "adamw_plain"
    return Optimizer(groups, rules)


# ---- noise on embeddings ------------------------------------------------------------------------


def add_neftune(model, alpha: float):
    """Add noise to the embeddings in training (NEFTune, arXiv:2310.05914).

    It is uniform in +-alpha / sqrt(L * D) for a sequence of L tokens. The lengths of the sequences
    are those of the layout that the model is called with.
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
