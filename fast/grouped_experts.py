"""All experts of a layer in one product: torch's grouped matmul in place of a loop over experts.

    group_experts(model, ["none", "mlp", "block"])      sets it on finished MoE layers, in place

The loop of model.py needs to know how many tokens each expert has, and waits for the device in each
layer. Here the rows are sorted by expert, and the ends of each expert's rows stay on the device,
where torch._grouped_mm reads them. The matrices of all experts lie in one tensor: that of the
checkpoint, or a new one (E, out, in), of which each expert's weight becomes a view. Adapters of
single experts are stacked for each pass; gradients reach each expert's own. What is kept for the
backward pass is what fast/fused_block.py keeps of one expert.

Frozen matrices in 4 or 8 bits are dequantized for each product, forward and backward, all experts
of a layer at once, and not kept.

The slow twins are layers.grouped and layers.one_by_one.

Requires: model.py, lora.py, fast/fused_block.py.
Next: runtime/kernels.py, which picks it.
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from checkpoint.read_config import model_config
from errors import first_line
from fast.fused_block import IDENTITY, can_fuse, gradients, operands
from layers import StackedExperts
from lora import LoRAConfig, LoRALinear, LoRAStacked, attach_lora
from model import CausalLM, MoE, init_weights

ALIGNED = 8             # numbers of 16 bits: torch._grouped_mm wants strides of 16 bytes
ERROR = 0.05            # relative, of outputs and gradients in bfloat16


class Stack(NamedTuple):
    """One linear layer of all experts."""
    W: object                           # made by stack_weights
    A: torch.Tensor | None              # (E, r, in); None: no adapter, or a disabled one
    B: torch.Tensor | None              # (E, out, r)
    scale: float
    layers: list                        # of the experts, or one of all; A and B come from there
    bias: torch.Tensor | None = None    # (E, out), frozen

    def matrices(self, dtype: torch.dtype):
        """The frozen matrices (E, out, in)."""
        return matrices_of(self.W, self.layers, dtype)


# ---- set on a model -----------------------------------------------------------------------------


def group_experts(model: CausalLM, recompute: Sequence[str] | None = None,
                  fp8: bool = False) -> str:
    """Compute the experts of each MoE layer together where that is possible, in place.

    recompute: the level of each block, see fast/fused_block.py; gate and up are recomputed for mlp.
    fp8: the frozen weights will be held in 8 bits. Returns a line about layers whose experts still
    run one by one, with the reason, or "".
    """
    levels = recompute or ["none"] * len(model.model.layers)
    reasons = []
    for block, level in zip(model.model.layers, levels, strict=True):
        if not isinstance(block.mlp, MoE):
            continue
        reason = "their frozen weights are held in 8 bits" if fp8 else one_by_one_for(block.mlp)
        reasons.append(reason)
        if reason is None:
            stacks = [stack_weights(layers) for layers in layers_of(block.mlp)]
            block.mlp.mix = partial(mix_together, block.mlp, stacks, level == "mlp")
    refused = [reason for reason in reasons if reason]
    if not refused:
        return ""
    return (f"  note: experts one by one in {len(refused)} of {len(reasons)} layers, which is "
            f"slower: {'; '.join(dict.fromkeys(refused))}")


def layers_of(moe: MoE) -> list[list[nn.Module]]:
    """The linear layers of the experts, [of those that read x, …, down]: E each, or one stack."""
    if isinstance(moe.experts, StackedExperts):
        return [[moe.experts.gate_up_proj], [moe.experts.down_proj]]
    return [list(layers) for layers in zip(*(
        (*expert.readers(), expert.down_proj) for expert in moe.experts))]


def one_by_one_for(moe: MoE) -> str | None:
    """Why the experts of a layer are not grouped; None: they are.

    They must be frozen matrices of 16-byte rows, with adapters all alike or none.
    """
    sharded = any(hasattr(p, "to_local") for p in moe.experts.parameters())
    if sharded or moe.visited is not None:
        return "fsdp shards them"
    if not all(map(alike, layers_of(moe))):
        return ("they are trained, or with sizes that are no multiples of 8, dropout, biases of "
                "single experts, or adapters that are not all alike")
    if not all(map(can_be_read_at_once, layers_of(moe))):
        return "their bits cannot be read at once (other formats, or blocks across two experts)"
    return None


def alike(layers: list[nn.Module]) -> bool:
    """Whether the layers of all experts can be stacked, or are a stack that can be used."""
    if layers[0].weight.dim() == 3:
        return is_usable_stack(layers[0])
    if not can_fuse(layers[0]) or operands(layers[0]).fp8 is not None:
        return False
    kinds = {(type(layer), operands(layer).scale, layer.weight.requires_grad,
              operands(layer).bias is None, can_fuse(layer)) for layer in layers}
    ranks = {layer.lora_A.out_features for layer in layers if isinstance(layer, LoRALinear)}
    sizes = {*layers[0].weight.shape, *ranks}
    _, _, trained, no_bias, can = next(iter(kinds))
    one_kind = len(kinds) == 1 and len(ranks) <= 1
    return one_kind and can and no_bias and not trained and not any(n % ALIGNED for n in sizes)


def is_usable_stack(layer: nn.Module) -> bool:
    """Whether a stack of all experts is frozen, without dropout and hooks, of 16-byte rows."""
    base = getattr(layer, "base_layer", layer)
    sizes = [*base.weight.shape[1:]]
    if isinstance(layer, LoRAStacked):
        sizes.append(len(layer.lora_A.weight) // len(base.weight))
        if not isinstance(layer.dropout, nn.Identity):
            return False
    trained = any(p.requires_grad for p in base.parameters())
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return not (trained or hooks or any(n % ALIGNED for n in sizes))


def base_of(layer: nn.Module) -> nn.Module:
    return getattr(layer, "base_layer", layer)


def in_few_bits(layers: list[nn.Module]) -> bool:
    """Whether the frozen matrices are modules that make them (methods/quant.py)."""
    return isinstance(base_of(layers[0]).weight, nn.Module)


def can_be_read_at_once(layers: list[nn.Module]) -> bool:
    """Whether the matrices of all layers are tensors, or can be dequantized as one."""
    weights = [base_of(layer).weight for layer in layers]
    return not in_few_bits(layers) or weights[0].joins(weights)


@torch.no_grad()
def stack_weights(layers: list[nn.Module]) -> tuple[object, list[nn.Module]]:
    """(the matrices of all layers, the layers, now with views of them).

    The matrices: a tensor (E, out, in); quantized, one weight (E * out, in); None: of a checkpoint
    that stores them as one stack.
    """
    if in_few_bits(layers):
        weights = [base_of(layer).weight for layer in layers]
        return weights[0].joined(weights), layers
    if layers[0].weight.dim() == 3:
        return None, layers
    bases = [base_of(layer) for layer in layers]
    stack = torch.stack([base.weight.detach() for base in bases])
    for base, matrix in zip(bases, stack):
        base.weight.data = matrix
    return stack, layers


def matrices_of(stack, layers: list[nn.Module], dtype: torch.dtype):
    """The matrices (E, out, in) of layers with this result of stack_weights."""
    if isinstance(stack, nn.Module):
        return stack.dequantize(dtype).unflatten(0, (len(layers), -1))
    base = base_of(layers[0])
    if base.weight.dim() == 3:
        return base.weight if base.out_first else base.weight.transpose(1, 2)
    return stack


def made_bytes(model: CausalLM, device, itemsize: int) -> int:
    """Bytes of the largest stack that matrices_of makes, and what that takes; 0: it makes none.

    Of a model without storage. itemsize: bytes per number in a product.
    """
    sizes = [0]
    for block in model.model.layers:
        for layers in layers_of(block.mlp) if isinstance(block.mlp, MoE) else ():
            first = base_of(layers[0]).weight
            if in_few_bits(layers) and can_be_read_at_once(layers):
                whole = first.quant_format.of_joined(first.shape, len(layers))
                whole = whole.empty((len(layers) * first.shape[0], first.shape[1]))
                sizes.append(whole.dequantize_bytes(device, itemsize))
    return max(sizes)


def with_adapters(stack, layers: list[nn.Module], dtype: torch.dtype) -> Stack:
    """The stack with the adapters as they are now, (E, r, in) and (E, out, r), in this dtype."""
    if layers[0].weight.dim() == 3:
        return with_stacked_adapter(layers[0], dtype)
    if not isinstance(layers[0], LoRALinear):
        return Stack(stack, None, None, 1.0, layers)
    pairs = [layer.adapter() for layer in layers]
    if pairs[0][0] is None:
        return Stack(stack, None, None, 1.0, layers)
    A, B = (torch.stack(matrices).to(dtype) for matrices in zip(*pairs))
    return Stack(stack, A, B, layers[0].scale, layers)


def with_stacked_adapter(layer: nn.Module, dtype: torch.dtype) -> Stack:
    """with_adapters of one LoRAStacked, or of a stack without an adapter."""
    base = base_of(layer)
    if layer is base or not layer.enabled:
        return Stack(None, None, None, 1.0, [layer], base.bias)
    experts = len(base.weight)
    A = layer.lora_A.weight.view(experts, -1, layer.lora_A.in_features)
    B = layer.lora_B.weight.view(layer.lora_B.out_features, -1, experts).permute(2, 0, 1)
    A, B = (matrices.to(dtype).contiguous() for matrices in (A, B))
    return Stack(None, A, B, layer.scale, [layer], base.bias)


# ---- the experts' sum ---------------------------------------------------------------------------


def mix_together(moe: MoE, stacks: list, recompute: bool, x, chosen, weights):
    """MoE.mix: the weighted sum of the chosen experts, (N, D). x (N, D); chosen, weights (N, k)."""
    config = moe.config
    weight = base_of(stacks[0][1][0]).weight            # in few bits its dtype is another
    other_dtype = torch.is_tensor(weight) and x.dtype != weight.dtype
    if torch.is_autocast_enabled(x.device.type) or other_dtype:
        return MoE.mix(moe, x, chosen, weights)
    slots = chosen.flatten()                                        # (N*k,)
    order = slots.argsort(stable=True)                              # slots by expert
    experts = torch.arange(config.num_experts, device=x.device)
    ends = torch.searchsorted(slots[order], experts, right=True, out_int32=True)        # (E,)
    rows = x[order // chosen.shape[1]]
    factor = weights.flatten()[order][:, None]
    if config.scale_input:
        rows = rows * factor

    layers = [with_adapters(*stack, x.dtype) for stack in stacks]
    run = partial(run_experts, gate_of(moe), layers, ends)
    if recompute and torch.is_grad_enabled():
        out = checkpoint(run, rows, use_reentrant=False)
    else:
        out = run(rows)
    if not config.scale_input:
        out = out * factor
    return out[order.argsort()].view(*chosen.shape, -1).sum(1)      # in the order of slots again


def gate_of(moe: MoE) -> Callable:
    """From gate and up, apart or in one tensor (n, 2 I), to the input of down_proj (n, I)."""
    stacked = isinstance(moe.experts, StackedExperts)
    return moe.experts.gated if stacked else moe.experts[0].activate


def run_experts(gated: Callable, layers: list[Stack], ends, rows):
    """MLP.forward of rows (n, D) that are sorted by expert. gated: see gate_of."""
    *first, down = layers
    gate_and_up = grouped_linears(first, ends, rows)
    return grouped_linears([down], ends, *gate_and_up, before=gated)[0]


def grouped_matmul(x, W, ends):
    """x (n, in), sorted by expert, times W (E, out, in) transposed -> (n, out)."""
    return torch._grouped_mm(x, W.transpose(1, 2), offs=ends)


def expert_of_rows(count: int, ends):
    """The expert of each of the rows that are sorted by expert, (n,); the device is not waited for.
    """
    rows = torch.arange(count, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, rows, right=True)


def grouped_linears(layers: list[Stack], ends, *xs, before: Callable = IDENTITY):
    """Each layer of before(*xs), as fast.fused_block.fused_linears does for one expert."""
    adapters = [tensor for layer in layers for tensor in (layer.A, layer.B)]
    frozen = [layer._replace(A=None, B=None) for layer in layers]
    return GroupedLinears.apply(before, ends, frozen, len(xs), *xs, *adapters)


class GroupedLinears(torch.autograd.Function):
    """The layers of before(*xs), which is computed again in the backward pass.

    So are the stacks of adapters, which in many layers would take as much as the adapters.
    """

    @staticmethod
    def forward(ctx, before, ends, layers, num_inputs, *tensors):
        xs, A_and_B = tensors[:num_inputs], tensors[num_inputs:]
        h = before(*xs)                                                         # (n, in)
        ys = []
        low_rank = []
        for i, layer in enumerate(layers):
            A, B = A_and_B[2 * i:2 * i + 2]
            y = grouped_matmul(h, layer.matrices(h.dtype), ends)                # (n, out)
            if layer.bias is not None:
                y.add_(layer.bias[expert_of_rows(len(h), ends)])
            low_rank.append(None if A is None else grouped_matmul(h, A, ends))  # (n, r)
            if A is not None:
                y.add_(grouped_matmul(low_rank[-1], B, ends), alpha=layer.scale)
            ys.append(y)
        ctx.before = before
        ctx.layers = layers
        ctx.save_for_backward(ends, *low_rank, *xs)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        ends, *saved = ctx.saved_tensors
        low_rank, xs = saved[:len(ctx.layers)], saved[len(ctx.layers):]
        with torch.enable_grad():
            needs = ctx.needs_input_grad[4:]
            xs = [x.detach().requires_grad_(need) for x, need in zip(xs, needs)]
            h = ctx.before(*xs)
        rows = h.detach()
        dh = None
        grads = []
        for layer, dy, Ax in zip(ctx.layers, dys, low_rank):
            layer = with_adapters(layer.W, layer.layers, rows.dtype)
            dy = dy.contiguous()
            dA = dB = dAx = None
            if layer.A is not None:
                dAx = torch._grouped_mm(dy, layer.B, offs=ends).mul_(layer.scale)       # (n, r)
                dB = torch._grouped_mm(dy.T, Ax, offs=ends).mul_(layer.scale)   # (E, out, r)
                dA = torch._grouped_mm(dAx.T, rows, offs=ends)                  # (E, r, in)
            grads += [dA, dB]
            if h.requires_grad:
                more = torch._grouped_mm(dy, layer.matrices(dy.dtype), offs=ends)       # (n, in)
                dh = more if dh is None else dh.add_(more)
                if dAx is not None:
                    dh.add_(torch._grouped_mm(dAx, layer.A, offs=ends))
        d_xs = gradients(h, dh, xs) if h.requires_grad else [None] * len(xs)
        return None, None, None, None, *d_xs, *grads


# ---- the choice ---------------------------------------------------------------------------------


def pick_grouped(device, dtype: torch.dtype, hidden_act: str = "silu") -> tuple[bool, str]:
    """(whether to group_experts, a line for the start page); tried on a small layer.

    On GPUs in bfloat16, where this torch has the product.
    """
    if torch.device(device).type != "cuda" or dtype != torch.bfloat16:
        return False, "experts: one by one (their grouped product is for bfloat16 on a GPU)"
    try:
        error = max(grouped_error(device, dtype, hidden_act, kind) for kind in TRIALS)
    except Exception as refusal:        # of many kinds, and none must end a training
        return False, f"experts: one by one (grouped product fails: {first_line(refusal)})"
    if not error < ERROR:
        return False, f"experts: one by one (grouped product is wrong by {error:.2g})"
    return True, "experts: grouped in one product, where they are frozen and not in fp8"


TRIALS = {"one by one": {"model_type": "qwen3_moe"},
          "stacks": {"model_type": "gpt_oss", "hidden_act": "silu"}}


def grouped_error(device, dtype: torch.dtype, hidden_act: str = "silu",
                  kind: str = "one by one") -> float:
    """The largest relative error of the output and the gradients of a small model with experts.

    kind: of TRIALS, how the experts are stored.
    """
    config = model_config({
        "hidden_size": 64, "intermediate_size": 48, "num_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": hidden_act}
        | TRIALS[kind])
    results = []
    for together in (False, True):
        model = CausalLM(config)
        init_weights(model, torch.Generator().manual_seed(0))
        model.to(device, dtype)
        attach_lora(model, LoRAConfig(8, 16, target_modules=["all", "experts"]), 1, device=device)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(weight, 0.02)
        if together:
            group_experts(model)
            if "mix" not in vars(model.model.layers[0].mlp):
                raise RuntimeError("the experts of the trial cannot be grouped")
        out = model(torch.arange(40, device=device)[None])
        # not the sum of squares: behind a norm it is constant, and its gradients are rounding
        (out.float() * torch.linspace(-1, 1, out.shape[-1], device=device)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.detach(), *grads])
    errors = [(a - b).float().norm() / (a.float().norm() + 1e-6) for a, b in zip(*results)]
    return max(map(float, errors))
