"""Linear layers that keep little for the backward pass, and the library that multiplies their matrices.

    python linear.py                    the matrix products of this machine: how fast, how exact, which one is taken

`linears` is called where a block applies linear layers to one input: q, k and v; gate and up; down; o. Its slow twin is
one line, `[layer(before(*xs)) for layer in layers]`, and `plain` is its name as a choice. The fast path computes the same
in one autograd function:

    before(*xs)     the cheap step in front, a norm or silu(gate) * up, is computed again in the backward pass: what is
                    kept are its inputs xs, and of each adapter the narrow product A x, nothing else
    frozen W        get no gradient, and none of the work for it
    adapters        all A that read the same input are one product; B's is added in place: y += scale * (A x) B'

So what of gate and up is kept is a matter of what `before` is: with the products of gate and up inside it (model.MLP),
they are computed again, too.

Read before: model.py, which calls it. Read after: lora.py (the layers with adapters), plan.py (what is kept, in bytes).
Papers: LoRA arXiv:2106.09685, recomputation arXiv:1604.06174 and, of cheap steps only, arXiv:2205.05198.
"""
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


# ---- products: x (N, in) times W (out, in) transposed -> (N, out) -------------------------------------------------


def torch_product(x, W, bias=None):
    """As torch multiplies: cuBLAS, hipBLASLt, MKL, Accelerate."""
    return F.linear(x, W, bias)


def onednn_product(x, W, bias=None):
    """oneDNN, which torch has on CPUs but asks in 16 bits only. In float32 torch asks MKL, which leaves half of an AMD
    processor idle. x and W are dense; either may be a transposed view."""
    if not x.numel() or not W.numel():           # an expert without tokens: oneDNN refuses
        return F.linear(x, W, bias)
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


PRODUCTS = {"torch": torch_product, "onednn": onednn_product}
CLEARLY = 1.1           # how many times faster another product than torch's own must be to be taken


@dataclass
class Choice:
    """What pick_product found. `taken`: a name of PRODUCTS; rates: name -> GFLOP/s; lines: for the start page."""
    taken: str
    rates: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)


@torch.no_grad()
def pick_product(device, dtype) -> Choice:
    """The fastest product of this machine among those that are right, measured in a few milliseconds.

    Only float32 on CPUs leaves a choice. Right: no further from float64 than four times torch's own error.
    """
    device = torch.device(device)
    if device.type != "cpu" or dtype != torch.float32:
        return Choice("torch", {"torch": 0.0})
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(256, 512, generator=generator), torch.randn(1024, 512, generator=generator))
    exact, rates, said = x.double() @ W.double().T, {}, {}
    allowed = 4 * float((torch_product(x, W) - exact).abs().max())
    for name, product in PRODUCTS.items():
        try:
            error = max(float((product(x, W) - exact).abs().max()),
                        float((product(x, W.T.contiguous().T) - exact).abs().max()))
        except (RuntimeError, AttributeError, NotImplementedError) as refusal:
            said[name] = str(refusal).splitlines()[0][:80]
            continue
        if not error <= allowed:
            said[name] = f"wrong by {error:.2g}"
            continue
        rates[name] = 2 * x.numel() * len(W) / shortest(lambda: product(x, W)) / 1e9
        said[name] = f"{rates[name]:.0f} GFLOP/s"
    taken = max(rates, key=rates.get)
    taken = taken if rates[taken] > CLEARLY * rates["torch"] else "torch"
    others = ", ".join(f"{name} ({what})" for name, what in said.items() if name != taken)
    return Choice(taken, rates, [f"products: {taken} ({said[taken]}). not used: {others}"])


def shortest(call, times: int = 7) -> float:
    """Seconds of the shortest of some calls: others' work on this machine only ever adds to it."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# ---- several linear layers of one input -----------------------------------------------------------------------------


same = nn.Identity()


def linears(layers, *xs, before=same, owners=(), how="plain"):
    """[layer(before(*xs)) for layer in layers]; tensors (…, in) -> (…, out).

    layers: nn.Linear or lora.LoRALinear, all of one input size. before: a function of xs that costs little; it is
    computed twice. owners: the modules whose weights `before` reads. how: a name of PRODUCTS, or "plain".
    """
    if how == "plain" or not all(map(is_simple, layers)) or torch.is_autocast_enabled(xs[0].device.type):
        h = before(*xs)
        return [layer(h) for layer in layers]
    parts = [weights_of(layer) for layer in layers]
    if not torch.is_grad_enabled():
        return products(before(*xs), parts, PRODUCTS[how])[0]
    owners = (before,) if isinstance(before, nn.Module) else owners
    learnt = [p for owner in owners for p in owner.parameters() if p.requires_grad]
    flat = [tensor for W, bias, A, B, _ in parts for tensor in (W, bias, A, B)]
    return _Linears.apply(before, [scale for *_, scale in parts], PRODUCTS[how], len(xs), *xs, *flat, *learnt)


def is_simple(layer) -> bool:
    """May the function below stand for the layer? Not with dropout, whose mask is drawn once, and not where someone
    listens to it."""
    return (not layer._forward_hooks and not layer._forward_pre_hooks
            and (type(layer) is nn.Linear or isinstance(getattr(layer, "dropout", None), nn.Identity)))


def weights_of(layer) -> tuple:
    """(W, bias, A, B, scale); the latter three None where there is no adapter, or it is switched off."""
    if getattr(layer, "enabled", False):
        return layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight, layer.scale
    return layer.weight, layer.bias, None, None, None


def products(h, parts, product):
    """The layers' outputs, and the narrow products A h of those with adapters, side by side (N, sum of r) or None.

    A and B stay float32 for the optimizer and take the activations' dtype for the product.
    """
    rows = h.reshape(-1, h.shape[-1])                                                        # (N, in)
    low = rows @ stacked(parts, h.dtype).T if any(A is not None for _, _, A, _, _ in parts) else None
    ys, start = [], 0
    for W, bias, A, B, scale in parts:
        y = product(rows, W, bias)                                                           # (N, out)
        if A is not None:
            y.addmm_(low[:, start:start + len(A)], B.to(h.dtype).T, alpha=scale)
            start += len(A)
        ys.append(y.view(*h.shape[:-1], len(W)))
    return ys, low


def stacked(parts, dtype):
    """All A under each other, (sum of r, in)."""
    return torch.cat([A for _, _, A, _, _ in parts if A is not None]).to(dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before, scales, product, count, *tensors):
        xs, flat = tensors[:count], tensors[count:count + 4 * len(scales)]
        parts = [(*flat[4 * i:4 * i + 4], scale) for i, scale in enumerate(scales)]
        ys, low = products(before(*xs), parts, product)
        ctx.save_for_backward(*tensors, low)
        ctx.before, ctx.scales, ctx.product, ctx.count = before, scales, product, count
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        *tensors, low = ctx.saved_tensors
        n, end = ctx.count, ctx.count + 4 * len(ctx.scales)
        xs, flat, learnt = tensors[:n], tensors[n:end], tensors[end:]
        needs = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(need) for x, need in zip(xs, needs)]
            h = ctx.before(*inputs)
        rows = h.detach().reshape(-1, h.shape[-1])                                           # (N, in)
        wanted = h.requires_grad
        dh, narrow, grads, start = None, [], [None] * len(flat), 0
        for i, (scale, dy) in enumerate(zip(ctx.scales, dys)):
            W, bias, A, B = flat[4 * i:4 * i + 4]
            dy = dy.reshape(-1, dy.shape[-1])                                                # (N, out)
            if A is not None:
                part = low[:, start:start + len(A)]
                start += len(A)
                narrow.append((dy @ B.to(dy.dtype)).mul_(scale))                             # (N, r) d loss / d (A h)
                grads[4 * i + 3] = (dy.T @ part).mul_(scale).to(B.dtype)                     # (out, r)
            if wanted:
                dh = add(dh, dy, W, ctx.product)
            if needs[n + 4 * i]:
                grads[4 * i] = ctx.product(dy.T, rows.T)                                     # (out, in)
            if bias is not None and needs[n + 4 * i + 1]:
                grads[4 * i + 1] = dy.sum(0)
        if narrow:
            adapted = [i for i in range(len(ctx.scales)) if flat[4 * i + 2] is not None]
            dlow, all_A = torch.cat(narrow, dim=1), torch.cat([flat[4 * i + 2] for i in adapted])
            for i, dA in zip(adapted, (dlow.T @ rows).to(all_A.dtype).split([flat[4 * i + 2].shape[0] for i in adapted])):
                grads[4 * i + 2] = dA                                                        # (r, in)
            if wanted:
                dh.addmm_(dlow, all_A.to(dlow.dtype))
        found = iter(torch.autograd.grad(h, [t for t in (*inputs, *learnt) if t.requires_grad], dh.view_as(h))
                     if wanted else ())
        d_xs, d_learnt = ([next(found) if t.requires_grad else None for t in group] for group in (inputs, learnt))
        return None, None, None, None, *d_xs, *grads, *d_learnt


def add(total, dy, W, product):
    """total + dy W, (N, in); total None counts as nothing. In place: the sum costs no tensor of its own."""
    if total is None:
        return product(dy, W.T)
    return total.addmm_(dy, W) if product is torch_product else total.add_(product(dy, W.T))


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        choice = pick_product("cpu", dtype)
        print(f"cpu {str(dtype)[6:]}: " + (choice.lines or ["torch (there is no other)"])[0])
