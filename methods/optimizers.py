"""Further optimizers: AdamW with states in 8 bits, Adam-mini, Muon, GaLore.

    make_optimizer(parameters, config, device, **further_arguments(config, model_config))

    adamw_8bit  AdamW's two moments in one byte a number, and a float32 scale for each BLOCK of them
    adam_mini   one second moment for each row of a matrix, or each head of q and k. group:
                head_numel, the numbers of a head
    muon        one moment; a matrix is changed by the orthogonal matrix nearest to it
    galore      AdamW on gradients projected to `rank` dimensions. group: rank, gap, scale

Each is an UpdateRule of optim.py. Muon and GaLore are for matrices; AdamW takes the others.

Requires: optim.py.
Next: runtime/build.py, which hands them to make_optimizer.
Papers: 8-bit states arXiv:2110.02861; Adam-mini arXiv:2406.16793; Muon arXiv:2502.16982 (its scale
is that of eq. 4) and github.com/KellerJordan/Muon (the iteration's coefficients); GaLore
arXiv:2403.03507.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from optim import ADAMW, UpdateRule, adam_direction


# ---- AdamW with states in 8 bits ----------------------------------------------------------------

BLOCK = 256             # numbers that share a scale, as in bitsandbytes
SMALLEST = 4096         # parameters with fewer numbers keep float32 states, as in bitsandbytes


def levels(signed: bool) -> torch.Tensor:
    """The 256 numbers in [-1, 1] or [0, 1] of a byte: "dynamic" quantization (arXiv:2110.02861).

    Seven decades down from 1, each with twice as many steps as the one below it (sec. 2).
    """
    found = [0.0, 1.0]
    for decade in range(7):
        steps = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += middles
        if signed:
            found += [-x for x in middles]
    return torch.tensor(sorted(found), dtype=torch.float32)


def to_8bit(x, table):
    """x as (bytes of its shape, the scale of each BLOCK of it, float32). table: see levels.

    The nearest level; but in a table without signs, 0 is for zeros alone: a second moment that
    vanishes beside a first one that does not would make a step without bound (in bitsandbytes it
    can).
    """
    rows = F.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = rows.abs().amax(1)
    scaled = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    if table[0] == 0:
        codes = torch.maximum(codes, (rows > 0).to(torch.uint8))
    return codes.flatten()[:x.numel()].view(x.shape), scale


def from_8bit(codes, scale, table):
    """The float32 numbers of to_8bit's result."""
    rows = F.pad(codes.flatten(), (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    numbers = table[rows.int()] * scale[:, None]
    return numbers.flatten()[:codes.numel()].view(codes.shape)


def adamw_8bit_state(p, group):
    state = {"step": torch.zeros((), device=p.device)}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(p, dtype=torch.uint8)
        state[f"{name}_unit"] = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
    return state


def adamw_8bit_state_bytes(p, group):
    return 4 + 2 * (p.numel() + 4 * -(-p.numel() // BLOCK))


def adamw_8bit(params, states, group):
    """AdamW in float32; its moments are bytes between the steps (arXiv:2110.02861, sec. 2)."""
    device = params[0].device
    tables = {"exp_avg": levels(True).to(device), "exp_avg_sq": levels(False).to(device)}
    for p, state in zip(params, states):
        state["step"] += 1
        moments = [from_8bit(state[name], state[f"{name}_unit"], table)
                   for name, table in tables.items()]
        direction = adam_direction(p.grad.float(), *moments, state["step"], group)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        for (name, table), moment in zip(tables.items(), moments):
            state[name], state[f"{name}_unit"] = to_8bit(moment, table)


# ---- Adam-mini ----------------------------------------------------------------------------------


def in_blocks(tensor, block: str, group):
    """The tensor as (blocks, numbers of a block). block: "head", "row" or "tensor"."""
    if block == "head":
        return tensor.reshape(-1, group["head_numel"])
    return tensor.reshape(1, -1) if block == "tensor" else tensor.reshape(len(tensor), -1)


def adam_mini_state(p, group, block: str):
    return {
        "step": torch.zeros((), device=p.device),
        "exp_avg": torch.zeros_like(p),
        "block_avg_sq": p.new_zeros(len(in_blocks(p, block, group)), 1),
    }


def adam_mini_state_bytes(p, group, block: str):
    return 4 + p.nbytes + len(in_blocks(p, block, group)) * p.itemsize


def adam_mini(params, states, group, block: str):
    """AdamW with one second moment a block: the mean of its squares (arXiv:2406.16793, alg. 1)."""
    for p, state in zip(params, states):
        state["step"] += 1
        gradient = in_blocks(p.grad, block, group)
        moments = in_blocks(state["exp_avg"], block, group), state["block_avg_sq"]
        direction = block_direction(gradient, *moments, state["step"], group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(direction.view_as(p), alpha=group["lr"])


def block_direction(g, m, v, t, group):
    """optim.adam_direction of blocks: g and m (blocks, n), v (blocks, 1)."""
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).add_((g * g).mean(1, keepdim=True), alpha=1 - beta2)
    if t.device.type != "mps":              # which has no float64
        t = t.double()                      # 1 - beta ** t loses digits in float32
    correction = (1 - beta2 ** t).sqrt()
    return m / (1 - beta1 ** t) / (v.sqrt() / correction + group["eps"])


def adam_mini_rule(block: str) -> UpdateRule:
    """The UpdateRule for this kind of block."""
    return UpdateRule(partial(adam_mini_state, block=block), partial(adam_mini, block=block),
                      partial(adam_mini_state_bytes, block=block))


def adam_mini_block(name: str) -> str:
    """The rule of a parameter, by its name, as in the package adam-mini 1.1.1."""
    if "bias" in name:
        return "adamw"
    if any(part in name for part in ("q_proj", "k_proj", "query", "key")):
        return "adam_mini_head"
    if any(part in name for part in ("embed", "lm_head", "output", "v_proj", "o_proj", "mlp")):
        return "adam_mini_row"
    return "adam_mini_tensor"


# ---- Muon ---------------------------------------------------------------------------------------

MOMENTUM = 0.95
ROUNDS = 5              # of the Newton-Schulz iteration


def muon_state(p, group):
    return {"momentum": torch.zeros_like(p)}


def muon_state_bytes(p, group):
    return p.nbytes


def muon(params, states, group):
    """Nesterov's momentum made orthogonal; 0.2 sqrt(larger side) gives it the size of AdamW's."""
    for p, state in zip(params, states):
        momentum = state["momentum"].mul_(MOMENTUM).add_(p.grad)
        direction = orthogonal(p.grad.add(momentum, alpha=MOMENTUM))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(direction, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(G):
    """G (m, n) with its singular values near 1 (0.7 to 1.2), by Newton-Schulz in bfloat16."""
    is_tall = len(G) > G.shape[1]
    X = G.bfloat16()
    X = X.T if is_tall else X
    X = X / (X.norm() + 1e-7)                               # no singular value above 1
    for _ in range(ROUNDS):
        S = X @ X.T
        X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
    return (X.T if is_tall else X).to(G.dtype)


# ---- GaLore -------------------------------------------------------------------------------------


def galore_state(p, group):
    m, n = p.shape
    r = min(group["rank"], m, n)
    low = p.new_zeros((m, r) if m >= n else (r, n))
    return {
        "step": torch.zeros(()),                # on the CPU, where reading it does not wait
        "low_avg": low,
        "low_avg_sq": low.clone(),
        "basis": p.new_zeros((n, r) if m >= n else (m, r)),
    }


def galore_state_bytes(p, group):
    short, long = sorted(p.shape)
    return 4 + min(group["rank"], short) * (2 * long + short) * p.itemsize


def galore(params, states, group):
    """AdamW in the coordinates of the gradient's `rank` largest singular directions.

    They are computed again every `gap` steps (arXiv:2403.03507, algorithm 2).
    """
    for p, state in zip(params, states):
        is_tall = p.shape[0] >= p.shape[1]                  # the shorter side is projected
        state["step"] = state["step"].cpu()                 # a resumed run has it on the device
        if int(state["step"]) % group["gap"] == 0:
            U, _, Vh = torch.linalg.svd(p.grad.float(), full_matrices=False)
            directions = Vh.T if is_tall else U
            state["basis"] = directions[:, :group["rank"]].to(p.dtype).contiguous()
        state["step"] += 1
        basis = state["basis"]
        low = p.grad @ basis if is_tall else basis.T @ p.grad
        low = adam_direction(low, state["low_avg"], state["low_avg_sq"], state["step"], group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        direction = low @ basis.T if is_tall else basis @ low
        p.sub_(direction, alpha=group["lr"] * group["scale"])


# ---- the choice ---------------------------------------------------------------------------------

UPDATES = ADAMW | {
    "adamw_8bit": UpdateRule(adamw_8bit_state, adamw_8bit, adamw_8bit_state_bytes),
    "adam_mini_head": adam_mini_rule("head"),
    "adam_mini_row": adam_mini_rule("row"),
    "adam_mini_tensor": adam_mini_rule("tensor"),
    "muon": UpdateRule(muon_state, muon, muon_state_bytes),
    "galore": UpdateRule(galore_state, galore, galore_state_bytes),
}


def rule_of(name: str, p, config) -> str:
    """The name in UPDATES of the rule that changes a parameter.

    Embedding, head, and what is no matrix, are left to AdamW.
    """
    inner = p.dim() == 2 and "embed" not in name and "lm_head" not in name
    if config.use_adam_mini:
        return adam_mini_block(name)
    if config.use_muon:
        return "muon" if inner else "adamw"
    if config.use_galore:
        selected = inner
        if config.galore_target != ["all"]:
            selected = any(part in name for part in config.galore_target)
        return "galore" if selected and p.dim() == 2 and "embed" not in name else "adamw"
    if "8bit" in config.optim:
        return "adamw_8bit" if p.numel() >= SMALLEST and "embed" not in name else "adamw"
    return "adamw"


def further_arguments(config, model_config) -> dict:
    """The arguments rules, rule_of and settings of optim.make_optimizer."""
    hidden_size = model_config.hidden_size
    settings = {
        "rank": config.galore_rank,
        "gap": config.galore_update_interval,
        "scale": config.galore_scale,
        "eps_first": config.use_galore or config.use_muon,
        "head_numel": hidden_size * hidden_size // model_config.num_attention_heads,
    }
    return {"rules": UPDATES, "rule_of": rule_of, "settings": settings}
