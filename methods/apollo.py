"""APOLLO: gradients scaled as AdamW would scale them, judged by a random projection of `rank` rows.

    make_optimizer(parameters, config, device, **apollo_arguments(config))

AdamW divides each number of a gradient by its own second moment. APOLLO divides each row or column
of a matrix (the longer side; apollo_scale_type: channel) by one number. That number comes from two
moments of the gradient's projection to `rank` dimensions, and only they are kept. AdamW takes the
parameters that are no matrices, embedding and head.

Requires: optim.py.
Next: runtime/kernels.py (optimizer_rules).
Papers: APOLLO arXiv:2412.05270 (algorithm 1), the limit of the norm's growth arXiv:2410.01623. The
seeds of the projections and the order of the steps are those of the package apollo-torch 1.0.3.
"""
import math

import torch

from optim import UpdateRule, adam_direction, adamw_state, adamw_state_bytes

GROWTH = 1.01               # the norm of an update grows at most by this factor from step to step
LARGEST_SEED = torch.iinfo(torch.int64).max


def apollo_arguments(config) -> dict:
    """The arguments rules, rule_of and settings of optim.make_optimizer."""
    order = {"apollo": [], "adamw_then_decay": []}

    def rule_of(name, p, config):
        rule = "apollo" if is_projected(name, p, config) else "adamw_then_decay"
        order[rule].append(p)
        return rule

    def init_state(p, group):
        """A matrix's seed is its number: the matrices come after all other parameters."""
        number = next(i for i, q in enumerate(order["apollo"]) if q is p)
        seed = 1 if config.apollo_layerwise else len(order["adamw_then_decay"]) + number + 1
        return apollo_state(p, group) | {"seed": torch.tensor(seed)}

    settings = {
        "rank": config.apollo_rank,
        "gap": config.apollo_update_interval,
        "scale": config.apollo_scale,
        "proj": config.apollo_proj,
        "scale_type": config.apollo_scale_type,
        "scale_front": config.apollo_scale_front,
        "eps_first": True,
    }
    rules = {
        "apollo": UpdateRule(init_state, apollo, apollo_state_bytes),
        "adamw_then_decay": UpdateRule(adamw_state, adamw_then_decay, adamw_state_bytes),
    }
    return {"rules": rules, "rule_of": rule_of, "settings": settings}


def is_projected(name: str, p, config) -> bool:
    """Whether apollo_target selects a parameter; all: every matrix but embedding and head."""
    if p.dim() != 2 or "embed" in name:
        return False
    if config.apollo_target == ["all"]:
        return "lm_head" not in name
    return any(part in name for part in config.apollo_target)


def rank_of(p, group) -> int:
    """Rows of the projection: singular directions are no more than the shorter side has."""
    return min(group["rank"], *p.shape) if group["proj"] == "svd" else group["rank"]


def apollo_state(p, group):
    m, n = p.shape
    r = rank_of(p, group)
    low = p.new_zeros((m, r) if m >= n else (r, n))
    return {
        "step": torch.zeros(()),                # on the CPU, where reading it does not wait
        "low_avg": low,
        "low_avg_sq": low.clone(),
        "projection": p.new_zeros((r, n) if m >= n else (m, r)),
        "norm": torch.zeros((), device=p.device),
    }


def apollo_state_bytes(p, group):
    return 16 + rank_of(p, group) * (2 * max(p.shape) + min(p.shape)) * p.itemsize


def apollo(params, states, group):
    """Algorithm 1 of arXiv:2412.05270; the projection is drawn again every `gap` steps."""
    beta1, beta2 = group["betas"]
    for p, state in zip(params, states):
        G = p.grad
        state["step"] = state["step"].cpu()                 # a resumed run has it on the device
        t = int(state["step"])
        is_tall = G.shape[0] >= G.shape[1]
        if t % group["gap"] == 0:
            state["projection"] = new_projection(G, state, group, is_tall)
        state["step"] += 1
        t += 1
        P, m, v = state["projection"], state["low_avg"], state["low_avg_sq"]
        low = G @ P.T if is_tall else P.T @ G               # (m, r) or (r, n)
        m.mul_(beta1).add_(low, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        direction = m / (v.sqrt() + group["eps"])

        update = G * scales(direction, low, group["scale_type"], is_tall)
        root = math.sqrt(group["scale"])
        if group["scale_front"]:
            update = update * root
        update, state["norm"] = limit_growth(update, state["norm"], first=t == 1)
        if not group["scale_front"]:
            update = update * root
        lr = group["lr"]
        p.sub_(update, alpha=lr * math.sqrt(1 - beta2 ** t) / (1 - beta1 ** t))
        p.mul_(1 - lr * group["weight_decay"])


def adamw_then_decay(params, states, group):
    """AdamW for all other parameters; as above, weights decay after the step."""
    for p, state in zip(params, states):
        state["step"] += 1
        direction = adam_direction(p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"],
                                   group)
        p.sub_(direction, alpha=group["lr"]).mul_(1 - group["lr"] * group["weight_decay"])


def new_projection(G, state, group, is_tall: bool):
    """P, (r, n) for a tall gradient (m, n), else (m, r); advances the state's seed.

    Random numbers of variance 1 / r, or with apollo_proj: svd the r largest singular directions.
    """
    r, (m, n) = group["rank"], G.shape
    if group["proj"] == "svd":
        U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
        return (Vh[:r] if is_tall else U[:, :r]).to(G.dtype)
    seed = int(state["seed"])
    generator = torch.Generator(device=G.device).manual_seed(seed)
    shape = (r, n) if is_tall else (m, r)
    P = torch.randn(shape, generator=generator, device=G.device) / math.sqrt(r)
    draws = torch.randint(0, LARGEST_SEED, (15,), generator=torch.Generator().manual_seed(seed))
    state["seed"] = draws[-1]
    return P.to(G.dtype)


def scales(direction, low, scale_type: str, is_tall: bool):
    """|direction| / |low|: of each row (m, 1) or column (1, n), or of the whole matrix."""
    if scale_type == "tensor":
        return direction.norm() / (low.norm() + 1e-8)
    dim = 1 if is_tall else 0
    return direction.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)


def limit_growth(update, last_norm, first: bool):
    """(the update, scaled down to GROWTH times the last norm; its norm)."""
    norm = update.norm()
    if first:
        return update, norm
    factor = (norm / (last_norm + 1e-8)).clamp(min=GROWTH) / GROWTH
    return update / factor, norm / factor
