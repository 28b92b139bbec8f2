"""Fast blocks: linear layers that keep little for the backward pass; recomputation.

    fuse_blocks(model, "torch", ["none", "mlp", "block"])       sets it on finished blocks, in place

The slow twin is model.py itself; tests hold the two equal. A fused block computes its linear layers
with `fused_linears`, several of the same input in one autograd function:

    before(*xs)     the cheap step in front, a norm or act(gate) * up, is recomputed in the backward
                    pass: kept are its inputs xs, the A x of each adapter, and nothing else
    frozen W        gets no gradient, and no work is done for it; in 4 or 8 bits (methods/quant.py)
                    it is dequantized for each matmul, forward and backward, and not kept
    adapters        all A of the same input are one matmul; B is added in place: y += s * (A x) B'

So recomputing the matmuls of gate and up is a matter of `before` alone: they are put into it.

Requires: model.py, lora.py.
Next: runtime/memory.py (what is kept, in bytes).
Papers: LoRA arXiv:2106.09685; recomputation arXiv:1604.06174, and of cheap steps arXiv:2205.05198.
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lora import AdaptedLinear, LoRALinear
from model import MLP, Block, CausalLM, ForwardContext, MoE

# what a block recomputes in the backward pass, from fast to small: cheap steps only; the matmuls of
# gate and up as well; everything, from its input alone (activation checkpointing)
RECOMPUTE = ("none", "mlp", "block")
IDENTITY = nn.Identity()


# ---- blocks -------------------------------------------------------------------------------------


def fuse_blocks(model: CausalLM, matmul: Callable | None = F.linear,
                recompute: Sequence[str] | None = None):
    """Set the fast path on every block of a model, in place; it may be set again at any time.

    matmul: a function of fast/matmul.py; None: model.py's own forward. recompute: a level of
    RECOMPUTE for each block, by default "none".
    """
    levels = recompute or ["none"] * len(model.model.layers)
    for block, level in zip(model.model.layers, levels, strict=True):
        unfuse(block)
        if matmul:
            fuse(block, matmul, level)
        if level == "block":
            block.forward = partial(checkpointed_forward, block.forward)


def unfuse(block: Block):
    """Restore the forward of model.py."""
    for module in block.modules():
        if isinstance(module, (Block, MLP)):
            for name in ("forward", "attention_branch", "add_mlp"):
                module.__dict__.pop(name, None)


def fuse(block: Block, matmul: Callable, level: str):
    """Replace both halves of a block, and the forward of the MLPs of its experts."""
    recompute = level == "mlp"
    block.attention_branch = partial(fused_attention, block, matmul)
    block.add_mlp = partial(fused_mlp, block, matmul, recompute)
    if isinstance(block.mlp, MoE):
        for module in block.mlp.modules():
            if isinstance(module, MLP):
                module.forward = partial(mlp_forward, module, matmul, recompute, IDENTITY)


def fused_attention(block: Block, matmul: Callable, x, ctx: ForwardContext):
    """Block.attention_branch; norms in front of linear layers are inside their functions."""
    h = attention_forward(block.mixer, matmul, block.input_layernorm, x, ctx)
    return block.scaled(block.after_attention_norm(h))


def fused_mlp(block: Block, matmul: Callable, recompute: bool, x, ctx: ForwardContext):
    """Block.add_mlp."""
    norm = block.mlp_norm
    if isinstance(block.mlp, MoE):
        h = block.mlp(norm(x), ctx)
    else:
        h = mlp_forward(block.mlp, matmul, recompute, norm, x)
    return x + block.scaled(block.after_mlp_norm(h))


def attention_forward(attn: nn.Module, matmul: Callable, norm: nn.Module, x, ctx: ForwardContext):
    """The forward of an attention layer of any kind (layers.py), of norm(x)."""
    outputs = fused_linears(attn.readers(), x, before=norm, matmul=matmul)
    return fused_linears([attn.o_proj], attn.mix(outputs, ctx), matmul=matmul)[0]


def mlp_forward(mlp: MLP, matmul: Callable, recompute: bool, norm: nn.Module, x, ctx=None):
    """MLP.forward of norm(x). Kept are x, gate and up; with `recompute` x alone."""
    first = mlp.readers()

    def gate_and_up(x):
        return fused_linears(first, x, before=norm, matmul=matmul)

    if recompute:
        return fused_linears([mlp.down_proj], x, before=lambda x: mlp.activate(*gate_and_up(x)),
                             owners=(norm, *first), matmul=matmul)[0]
    return fused_linears([mlp.down_proj], *gate_and_up(x), before=mlp.activate, matmul=matmul)[0]


def checkpointed_forward(forward: Callable, x, ctx: ForwardContext):
    """A block's forward that keeps its input alone and runs again in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(x, ctx)

    def run(x):
        # router logits are outputs: the second run must not append to the list of the first
        routers = None if ctx.routers is None else []
        return forward(x, replace(ctx, routers=routers)), *(routers or ())

    x, *routers = checkpoint(run, x, use_reentrant=False)
    if ctx.routers is not None:
        ctx.routers += routers
    return x


# ---- several linear layers of one input ---------------------------------------------------------


def fused_linears(layers: list, *xs, before: Callable = IDENTITY, owners: Sequence = (),
                  matmul: Callable | None = F.linear) -> Sequence[torch.Tensor]:
    """[layer(before(*xs)) for layer in layers]; tensors (…, in) -> (…, out).

    layers: nn.Linear, LoRALinear or quantized ones, of one input size. before: a cheap function of
    xs, computed twice. owners: the modules whose weights `before` reads. matmul: a function of
    fast/matmul.py; None, and wherever can_fuse is false: the layers are called.
    """
    autocast = torch.is_autocast_enabled(xs[0].device.type)
    if matmul is None or autocast or not all(map(can_fuse, layers)):
        h = before(*xs)
        return [layer(h) for layer in layers]
    tensors = [operands(layer) for layer in layers]
    if not torch.is_grad_enabled():
        return outputs(before(*xs), tensors, matmul)[0]
    if isinstance(before, nn.Module):
        owners = (before,)
    trained = [p for owner in owners for p in owner.parameters() if p.requires_grad]
    saved = [tensor for each in tensors for tensor in each[:SAVED]]
    others = [each[SAVED:] for each in tensors]
    return FusedLinears.apply(before, others, matmul, len(xs), *xs, *saved, *trained)


def can_fuse(layer: nn.Module) -> bool:
    """Whether `fused_linears` may compute a layer.

    Not with dropout, whose mask is drawn once, not with another adapter than LoRALinear's own, and
    not where a hook is registered.
    """
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, AdaptedLinear):
        return type(layer) is LoRALinear and isinstance(layer.dropout, nn.Identity)
    return type(layer) is nn.Linear or has_packed_weight(layer)


def has_packed_weight(layer: nn.Module) -> bool:
    """Whether the weight is no tensor, but a module that makes one (methods/quant.py)."""
    return isinstance(layer.weight, nn.Module)


class Operands(NamedTuple):
    """What a layer is computed from. The first SAVED are tensors that autograd saves."""
    W: torch.Tensor | None              # (out, in)
    bias: torch.Tensor | None           # (out,)
    A: torch.Tensor | None              # (r, in); None: no adapter, or a disabled one
    B: torch.Tensor | None              # (out, r)
    scale: float                        # of the adapter
    fp8_scale: torch.Tensor | None      # of a W in 8 bits, see methods/fp8.py
    fp8: object                         # methods.fp8.Fp8, or None
    fp8_transposed: torch.Tensor | None     # a copy (in, out) of a W in 8 bits, if one is held
    packed: object                      # a quantized weight instead of W (methods/quant.py)

    def dequantize(self, dtype: torch.dtype):
        """W; a packed weight is dequantized for this call, and the result is not kept."""
        return self.packed.dequantize(dtype) if self.packed is not None else self.W


SAVED = 4
ROWS_IN_FLOAT32 = 256       # of outputs that are cast at once, see add_product


def operands(layer: nn.Module) -> Operands:
    """The operands of a linear layer, quantized or not, or of a LoRALinear beside one."""
    A, B, scale = None, None, 1.0
    base = layer
    if isinstance(layer, LoRALinear):
        A, B = layer.adapter()
        scale = layer.scale
        base = layer.base_layer
    packed = has_packed_weight(base)
    return Operands(
        W=None if packed else base.weight,
        bias=base.bias,
        A=A,
        B=B,
        scale=scale,
        fp8_scale=getattr(base, "scale", None),
        fp8=getattr(base, "fp8", None),
        fp8_transposed=getattr(base, "transposed", None),
        packed=base.weight if packed else None,
    )


def outputs(h, layers: list[Operands], matmul: Callable):
    """The layers' outputs, and the A h of all adapters side by side, (N, sum of r), or None.

    A and B are float32 for the optimizer and computed in the activations' dtype.
    """
    rows = h.reshape(-1, h.shape[-1])                                           # (N, in)
    rows_fp8 = to_fp8_rows(rows, layers)
    low_rank = None
    if any(layer.A is not None for layer in layers):
        low_rank = rows @ stacked_A(layers, h.dtype).T                          # (N, sum of r)
    ys = []
    start = 0
    for layer in layers:
        if layer.fp8:
            y = layer.fp8.matmul(*rows_fp8, layer.W, layer.fp8_scale, h.dtype)
            y = y if layer.bias is None else y.add_(layer.bias)                 # (N, out)
        else:
            y = matmul(rows, layer.dequantize(h.dtype), layer.bias)
        if layer.A is not None:
            end = start + len(layer.A)
            add_product(y, low_rank[:, start:end], layer.B.to(h.dtype).T, matmul, layer.scale)
            start = end
        ys.append(y.view(*h.shape[:-1], y.shape[-1]))
    return ys, low_rank


def to_fp8_rows(rows, layers: list[Operands]):
    """The rows in 8 bits and their scale, once for all layers in fp8; None if there are none."""
    fp8 = next((layer.fp8 for layer in layers if layer.fp8), None)
    return fp8.quantize(rows, fp8.fp8_dtype) if fp8 else None


def stacked_A(layers: list[Operands], dtype: torch.dtype):
    """All A below each other, (sum of r, in)."""
    return torch.cat([layer.A for layer in layers if layer.A is not None]).to(dtype)


# ---- the autograd function ----------------------------------------------------------------------


class FusedLinears(torch.autograd.Function):
    """`outputs` of before(*xs), which is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, before, others, matmul, num_inputs, *tensors):
        """tensors: the inputs xs, the saved operands of each layer, trained weights of `before`."""
        ctx.before = before
        ctx.others = others
        ctx.matmul = matmul
        ctx.num_inputs = num_inputs
        xs, layers, _ = unflatten(tensors, others, num_inputs)
        ys, low_rank = outputs(before(*xs), layers, matmul)
        ctx.save_for_backward(*tensors, low_rank)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        *tensors, low_rank = ctx.saved_tensors
        xs, layers, trained = unflatten(tensors, ctx.others, ctx.num_inputs)
        needs = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            xs = [x.detach().requires_grad_(need) for x, need in zip(xs, needs)]
            h = ctx.before(*xs)
        rows = h.detach().reshape(-1, h.shape[-1])                              # (N, in)
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]                      # (N, out)

        needs = needs[len(xs):]
        grads = weight_grads(layers, dys, rows, needs)
        dlow_rank = adapter_grads(layers, dys, rows, low_rank, grads, ctx.matmul)
        d_before = [None] * (len(xs) + len(trained))
        if h.requires_grad:
            dh = input_grad(layers, dys, ctx.matmul)
            if dlow_rank is not None:
                add_product(dh, dlow_rank, stacked_A(layers, h.dtype), ctx.matmul)
            d_before = gradients(h, dh.view_as(h), (*xs, *trained))
        return None, None, None, None, *d_before[:len(xs)], *grads, *d_before[len(xs):]


def unflatten(tensors, others: list, num_inputs: int):
    """(inputs, Operands of each layer, trained weights of `before`) of FusedLinears' tensors."""
    end = num_inputs + SAVED * len(others)
    saved = tensors[num_inputs:end]
    layers = [Operands(*saved[SAVED * i:SAVED * (i + 1)], *other) for i, other in enumerate(others)]
    return tensors[:num_inputs], layers, tensors[end:]


def weight_grads(layers: list[Operands], dys: list, rows, needs) -> list:
    """The gradients of W and bias where they are needed; None for the rest of the SAVED."""
    grads = [None] * (SAVED * len(layers))
    for i, (layer, dy) in enumerate(zip(layers, dys)):
        if needs[SAVED * i]:
            grads[SAVED * i] = dy.T @ rows                                      # (out, in)
        if layer.bias is not None and needs[SAVED * i + 1]:
            grads[SAVED * i + 1] = dy.sum(0)
    return grads


def adapter_grads(layers: list[Operands], dys: list, rows, low_rank, grads: list, matmul: Callable):
    """Fill in the gradients of A and B; returns that of low_rank, (N, sum of r), or None."""
    adapted = [i for i, layer in enumerate(layers) if layer.A is not None]
    if not adapted:
        return None
    ranks = [len(layers[i].A) for i in adapted]
    dlow_rank = []
    for i, Ax in zip(adapted, low_rank.split(ranks, dim=1)):                    # (N, r)
        layer, dy = layers[i], dys[i]
        # in float32 `matmul` may be oneDNN, which pays only for large products
        product = F.linear if dy.dtype == torch.float32 else matmul
        dlow_rank.append(product(dy, layer.B.to(dy.dtype).T).mul_(layer.scale))
        grads[SAVED * i + 3] = (dy.T @ Ax).mul_(layer.scale).to(layer.B.dtype)  # (out, r)
    dlow_rank = torch.cat(dlow_rank, dim=1)
    dA = (dlow_rank.T @ rows).to(layers[adapted[0]].A.dtype).split(ranks)       # (r, in)
    for i, grad in zip(adapted, dA):
        grads[SAVED * i + 2] = grad
    return dlow_rank


def add_product(total, x, W, matmul: Callable, scale: float = 1.0):
    """total += scale * x W, in place. W is small."""
    if matmul is F.linear or x.dtype == torch.float32:
        return total.addmm_(x, W, alpha=scale)
    # 16 bits on a CPU that has no products in them (fast/matmul.py): rounded once, a few rows each
    W = W.float()
    for y, rows in zip(total.split(ROWS_IN_FLOAT32), x.split(ROWS_IN_FLOAT32)):
        y.copy_(torch.addmm(y.float(), rows.float(), W, alpha=scale))
    return total


def input_grad(layers: list[Operands], dys: list, matmul: Callable):
    """The sum of dy W over the layers, (N, in); in place, without a tensor for each term."""
    total = None
    for layer, dy in zip(layers, dys):
        if layer.fp8:
            turned = layer.W.T if layer.fp8_transposed is None else layer.fp8_transposed
            more = layer.fp8.matmul(*to_fp8_rows(dy, [layer]), turned, layer.fp8_scale, dy.dtype)
        elif total is not None and matmul is F.linear:
            total.addmm_(dy, layer.dequantize(dy.dtype))
            continue
        else:
            more = matmul(dy, layer.dequantize(dy.dtype).T)
        total = more if total is None else total.add_(more)
    return total


def gradients(h, dh, tensors) -> list:
    """The gradients of tensors, where h has the gradient dh; None where none is required."""
    with torch.enable_grad():
        end = _End.apply(h, dh)
    found = iter(torch.autograd.grad(end, [t for t in tensors if t.requires_grad]))
    return [next(found) if t.requires_grad else None for t in tensors]


class _End(torch.autograd.Function):
    """A scalar in which h has the gradient dh.

    Passing dh to torch.autograd.grad means the same, but there torch imports sympy to compare two
    shapes: 0.4 s of every start.
    """

    @staticmethod
    def forward(ctx, h, dh):
        ctx.save_for_backward(dh)
        return h.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None
