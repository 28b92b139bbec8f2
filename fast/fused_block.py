"""Linear layers that keep little for the backward pass, and the library that multiplies their matrices.

    python -m fast.matmul                    the matrix products of this machine: how fast, how exact, which one is taken

`linears` is called where a block applies linear layers to one input: q, k and v; gate and up; down; o. Its slow twin is
one line, `[layer(before(*xs)) for layer in layers]`, and `plain` is its name as a choice. The fast path computes the same
in one autograd function:

    before(*xs)     the cheap step in front, a norm or silu(gate) * up, is computed again in the backward pass: what is
                    kept are its inputs xs, and of each adapter the narrow product A x, nothing else
    frozen W        get no gradient, and none of the work for it; those in 4 or 8 bits (methods/quant.py) are made dense for the
                    product, forward and backward, and not kept
    adapters        all A that read the same input are one product; B's is added in place: y += scale * (A x) B'

So what of gate and up is kept is a matter of what `before` is: with the products of gate and up inside it (model.MLP),
they are computed again, too.

Read before: model.py, which calls it. Read after: lora.py (the layers with adapters), runtime/memory.py (what is kept, in bytes).
Papers: LoRA arXiv:2106.09685, recomputation arXiv:1604.06174 and, of cheap steps only, arXiv:2205.05198.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fast.matmul import PRODUCTS, torch_product
from lora import LoRALinear
from methods.quant import QuantLinear


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
    flat = [tensor for part in parts for tensor in part[:4]]
    return _Linears.apply(before, [part[4:] for part in parts], PRODUCTS[how], len(xs), *xs, *flat, *learnt)


def is_simple(layer) -> bool:
    """May the function below stand for the layer? Not with dropout, whose mask is drawn once, not with DoRA, and not
    where someone listens to it."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if type(layer) is LoRALinear:
        return isinstance(layer.dropout, nn.Identity)
    return type(layer) in (nn.Linear, QuantLinear)


class Part(NamedTuple):
    """What a layer is made of. A, B: None where there is no adapter, or it is switched off. unit, fp8: None, or those
    of weights in 8 bits (see methods/fp8.py). packed: a quant.Quantised in the place of W, or None."""
    W: torch.Tensor | None              # (out, in)
    bias: torch.Tensor | None           # (out,)
    A: torch.Tensor | None              # (r, in)
    B: torch.Tensor | None              # (out, r)
    scale: float
    unit: torch.Tensor | None
    fp8: object
    packed: object

    def dense(self, dtype):
        """W; the numbers of a packed one are brought back for this call, and nobody keeps them."""
        return self.packed.dense(dtype) if self.packed is not None else self.W


def weights_of(layer) -> Part:
    A, B = layer.adapter() if isinstance(layer, LoRALinear) else (None, None)
    base = layer.base_layer if isinstance(layer, LoRALinear) else layer
    W, packed = (None, base.weight) if isinstance(base, QuantLinear) else (base.weight, None)
    return Part(W, base.bias, A, B, getattr(layer, "scale", 1.0), getattr(base, "unit", None),
                getattr(base, "fp8", None), packed)


def products(h, parts, product):
    """The layers' outputs, and the narrow products A h of those with adapters, side by side (N, sum of r) or None.

    A and B stay float32 for the optimizer and take the activations' dtype for the product.
    """
    rows = h.reshape(-1, h.shape[-1])                                                        # (N, in)
    low = rows @ stacked(parts, h.dtype).T if any(part.A is not None for part in parts) else None
    ys, start = [], 0
    rounded = rounded_for(rows, parts)
    for part in parts:
        W, bias, A, B, scale = part[:5]
        if part.fp8:
            y = part.fp8.multiply(*rounded, W, part.unit, h.dtype)                           # (N, out)
            y = y if bias is None else y.add_(bias)
        else:
            y = product(rows, part.dense(h.dtype), bias)
        if A is not None:
            y.addmm_(low[:, start:start + len(A)], B.to(h.dtype).T, alpha=scale)
            start += len(A)
        ys.append(y.view(*h.shape[:-1], y.shape[-1]))
    return ys, low


def rounded_for(rows, parts):
    """The rows in 8 bits, once for all layers that want them so, and their unit; None where none does."""
    fp8 = next((part.fp8 for part in parts if part.fp8), None)
    return fp8.quantise(rows, fp8.form) if fp8 else None


def stacked(parts, dtype):
    """All A under each other, (sum of r, in)."""
    return torch.cat([part.A for part in parts if part.A is not None]).to(dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before, others, product, count, *tensors):
        xs, flat = tensors[:count], tensors[count:count + 4 * len(others)]
        parts = [Part(*flat[4 * i:4 * i + 4], *other) for i, other in enumerate(others)]
        ys, low = products(before(*xs), parts, product)
        ctx.save_for_backward(*tensors, low)
        ctx.before, ctx.others, ctx.product, ctx.count = before, others, product, count
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        *tensors, low = ctx.saved_tensors
        n, end = ctx.count, ctx.count + 4 * len(ctx.others)
        xs, flat, learnt = tensors[:n], tensors[n:end], tensors[end:]
        parts = [Part(*flat[4 * i:4 * i + 4], *other) for i, other in enumerate(ctx.others)]
        needs = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(need) for x, need in zip(xs, needs)]
            h = ctx.before(*inputs)
        rows = h.detach().reshape(-1, h.shape[-1])                                           # (N, in)
        wanted = h.requires_grad
        dh, narrow, grads, start = None, [], [None] * len(flat), 0
        for i, (part, dy) in enumerate(zip(parts, dys)):
            dy = dy.reshape(-1, dy.shape[-1])                                                # (N, out)
            if part.A is not None:
                mine = low[:, start:start + len(part.A)]
                start += len(part.A)
                narrow.append((dy @ part.B.to(dy.dtype)).mul_(part.scale))                   # (N, r) d loss / d (A h)
                grads[4 * i + 3] = (dy.T @ mine).mul_(part.scale).to(part.B.dtype)           # (out, r)
            if wanted:
                dh = add(dh, dy, part, ctx.product)
            if needs[n + 4 * i]:
                grads[4 * i] = dy.T @ rows                                                   # (out, in)
            if part.bias is not None and needs[n + 4 * i + 1]:
                grads[4 * i + 1] = dy.sum(0)
        if narrow:
            dlow, all_A = torch.cat(narrow, dim=1), stacked(parts, h.dtype)
            adapted = [i for i, part in enumerate(parts) if part.A is not None]
            dA = (dlow.T @ rows).to(parts[adapted[0]].A.dtype).split([len(parts[i].A) for i in adapted])     # (r, in)
            for i, grad in zip(adapted, dA):
                grads[4 * i + 2] = grad
            if wanted:
                dh.addmm_(dlow, all_A)
        found = iter(gradients(h, dh.view_as(h), (*inputs, *learnt)) if wanted else ())
        d_xs, d_learnt = ([next(found) if t.requires_grad else None for t in group] for group in (inputs, learnt))
        return None, None, None, None, *d_xs, *grads, *d_learnt


def gradients(h, dh, tensors):
    """The gradients of those tensors that want one, where h has the gradient dh."""
    with torch.enable_grad():
        end = _End.apply(h, dh)
    return torch.autograd.grad(end, [t for t in tensors if t.requires_grad])


class _End(torch.autograd.Function):
    """A scalar in which h has the gradient dh. To give dh to torch.autograd.grad means the same, but there torch imports
    sympy, to compare two shapes: 0.4 s of every start."""

    @staticmethod
    def forward(ctx, h, dh):
        ctx.save_for_backward(dh)
        return h.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None


def add(total, dy, part: Part, product):
    """total + dy W, (N, in); total None counts as nothing. In place: the sum costs no tensor of its own."""
    if not part.fp8 and total is not None and product is torch_product:
        return total.addmm_(dy, part.dense(dy.dtype))
    more = part.fp8.multiply(*rounded_for(dy, [part]), part.W.T, part.unit, dy.dtype) if part.fp8 else \
        product(dy, part.dense(dy.dtype).T)
    return more if total is None else total.add_(more)
