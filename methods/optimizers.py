"""What an optimizer does with a gradient: AdamW, AdamW that remembers in 8 bits, Muon, GaLore.

Each is a pair of functions. fresh(p, group) makes the state of a parameter, a dict of tensors, which checkpoints keep
by these names; update(params, states, group) changes parameters and states, given p.grad. group: lr, weight_decay,
betas, eps, and what is said below.

    adamw       two means of the parameter's size
    adamw_8bit  the same in one byte a number, and a float32 unit for each BLOCK of them
    muon        one mean; matrices are changed by its nearest orthogonal matrix. For matrices alone
    galore      AdamW on gradients projected to `rank` dimensions. group: rank, gap, scale. For matrices alone

Read before: nothing. Read after: optim.py, which chooses.
Papers: AdamW arXiv:1711.05101, 8-bit states arXiv:2110.02861, Muon arXiv:2502.16982 (its scale is that of eq. 4) and
github.com/KellerJordan/Muon (the iteration's coefficients), GaLore arXiv:2403.03507.
"""
import math

import torch
import torch.nn.functional as F


# ---- AdamW ------------------------------------------------------------------------------------------------------


def two_means(p, group):
    return {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def adamw_fused(params, states, group):
    """One kernel for all parameters of a group."""
    means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(params, [p.grad for p in params], means, squares, [], steps, lr=group["lr"],
                        beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
                        eps=group["eps"], amsgrad=False, maximize=False)


def adamw_plain(params, states, group):
    """The slow twin of adamw_fused: arXiv:1711.05101, algorithm 2, in the paper's order."""
    for p, state in zip(params, states):
        state["step"] += 1
        direction = adam_direction(p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])


def adam_direction(g, m, v, t, group):
    """Puts g into the means m and v; returns what is subtracted, times the learning rate, in step t.

    eps_first: eps is added before v is corrected for its beginning (arXiv:1412.6980, end of sec. 2), as the packages of
    Muon and GaLore do.
    """
    beta1, beta2 = group["betas"]
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction = (1 - beta2 ** t).sqrt()
    floor = group["eps"] / correction if group.get("eps_first") else group["eps"]
    return m / (1 - beta1 ** t) / (v.sqrt() / correction + floor)


# ---- AdamW with states in 8 bits ----------------------------------------------------------------------------------

BLOCK = 256             # numbers that share a unit, as in bitsandbytes
SMALLEST = 4096         # parameters with fewer numbers keep float32 states, as in bitsandbytes


def levels(signed: bool) -> torch.Tensor:
    """The 256 numbers in [-1, 1] or [0, 1] that a byte stands for: "dynamic" quantisation (arXiv:2110.02861, sec. 2).

    Seven decades down from 1; in each of them twice as many steps as in the one below it.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += middles + [-x for x in middles if signed]
    return torch.tensor(sorted(found), dtype=torch.float32)


def to_8bit(x, table):
    """x, of any shape, as (bytes of that shape, the unit of each BLOCK of it, float32); table: levels().

    The nearest level, but in a table without signs 0 for zeros alone: a mean of squares that vanished, beside a mean
    that did not, would make a step without bound (bitsandbytes lets it).
    """
    rows = F.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    unit = rows.abs().amax(1)
    scaled = rows / unit.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    if table[0] == 0:
        codes = torch.maximum(codes, (rows > 0).to(torch.uint8))
    return codes.flatten()[:x.numel()].view(x.shape), unit


def from_8bit(codes, unit, table):
    """The float32 numbers that to_8bit wrote down."""
    rows = F.pad(codes.flatten(), (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    return (table[rows.int()] * unit[:, None]).flatten()[:codes.numel()].view(codes.shape)


def two_means_8bit(p, group):
    state = {"step": torch.zeros((), device=p.device)}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(p, dtype=torch.uint8)
        state[f"{name}_unit"] = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
    return state


def adamw_8bit(params, states, group):
    """AdamW in float32; its means are rounded to bytes until the next step (arXiv:2110.02861, sec. 2)."""
    tables = {"exp_avg": levels(True).to(params[0].device), "exp_avg_sq": levels(False).to(params[0].device)}
    for p, state in zip(params, states):
        state["step"] += 1
        means = [from_8bit(state[name], state[f"{name}_unit"], table) for name, table in tables.items()]
        direction = adam_direction(p.grad.float(), *means, state["step"], group)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        for (name, table), mean in zip(tables.items(), means):
            state[name], state[f"{name}_unit"] = to_8bit(mean, table)


# ---- Muon -------------------------------------------------------------------------------------------------------

MOMENTUM, ROUNDS = 0.95, 5


def one_mean(p, group):
    return {"momentum": torch.zeros_like(p)}


def muon(params, states, group):
    """The mean gradient (Nesterov's) made orthogonal; 0.2 sqrt(larger side) gives it the size of an AdamW step."""
    for p, state in zip(params, states):
        mean = state["momentum"].mul_(MOMENTUM).add_(p.grad)
        direction = orthogonal(p.grad.add(mean, alpha=MOMENTUM))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(direction, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(G):
    """G (m, n) with all its singular values brought near 1 (0.7 to 1.2), by the Newton-Schulz iteration in bfloat16."""
    X = G.bfloat16()
    X = X.T if len(G) > G.shape[1] else X
    X = X / (X.norm() + 1e-7)                               # no singular value above 1
    for _ in range(ROUNDS):
        S = X @ X.T
        X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
    return (X.T if len(G) > G.shape[1] else X).to(G.dtype)


# ---- GaLore -----------------------------------------------------------------------------------------------------


def projected_means(p, group):
    (m, n), r = p.shape, min(group["rank"], *p.shape)
    low = p.new_zeros((m, r) if m >= n else (r, n))
    return {"step": torch.zeros((), device=p.device), "low_avg": low, "low_avg_sq": low.clone(),
            "basis": p.new_zeros((n, r) if m >= n else (m, r))}


def galore(params, states, group):
    """AdamW where the gradient's `rank` largest singular directions are coordinates; every `gap` steps they are found
    anew (arXiv:2403.03507, algorithm 2)."""
    for p, state in zip(params, states):
        tall = p.shape[0] >= p.shape[1]                     # the shorter side is what is projected
        if int(state["step"]) % group["gap"] == 0:
            U, _, Vh = torch.linalg.svd(p.grad.float(), full_matrices=False)
            state["basis"] = (Vh.T if tall else U)[:, :group["rank"]].to(p.dtype).contiguous()
        state["step"] += 1
        basis = state["basis"]
        low = p.grad @ basis if tall else basis.T @ p.grad
        low = adam_direction(low, state["low_avg"], state["low_avg_sq"], state["step"], group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(low @ basis.T if tall else basis @ low, alpha=group["lr"] * group["scale"])


# ---- bytes of what fresh(p, group) makes, for a p that need have no storage -----------------------------------------


def bytes_of_two(p, group):
    return 4 + 2 * p.nbytes


def bytes_of_two_8bit(p, group):
    return 4 + 2 * (p.numel() + 4 * -(-p.numel() // BLOCK))


def bytes_of_one(p, group):
    return p.nbytes


def bytes_of_projected(p, group):
    short, long = sorted(p.shape)
    return 4 + min(group["rank"], short) * (2 * long + short) * p.itemsize


UPDATES = {             # name: (fresh, update, bytes)
    "adamw": (two_means, adamw_fused, bytes_of_two), "adamw_plain": (two_means, adamw_plain, bytes_of_two),
    "adamw_8bit": (two_means_8bit, adamw_8bit, bytes_of_two_8bit), "muon": (one_mean, muon, bytes_of_one),
    "galore": (projected_means, galore, bytes_of_projected),
}
# names in a state that are not of the parameter's shape
OF_OTHER_SHAPES = ("step", "exp_avg_unit", "exp_avg_sq_unit", "low_avg", "low_avg_sq", "basis")
