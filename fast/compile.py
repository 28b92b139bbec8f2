"""Elementwise steps, compiled: norms, rotation, act(gate) * up, and the loss of a chunk of logits.

    compiled, line = pick_compile(None, device, dtype)
    if compiled:
        compile_steps(model)

Compiled, each step reads its input once. The functions as they are written remain the twins. Only
the token dimension is symbolic (compile_tokens): with a constant hidden size and head_dim the
kernels store 16 bytes at once and need no divisions to find their place.

Requires: model.py, rope.py, losses.py.
Next: fast/attention_picker.py.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from checkpoint.read_config import model_config
from errors import first_line
from losses import losses_and_grad
from model import MLP, Attention, CausalLM, RMSNorm, init_weights
from rope import rotate

VARIANTS = 64       # of a compiled function, by sizes and need of gradients; torch's limit is 8
# what compile_steps replaces, by the module it belongs to
STEPS = {RMSNorm: "forward", Attention: "rotate", MLP: "gated"}
# relative, of any gradient
COMPILED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def compile_tokens(function: Callable, tensors: int = 1, dim: int = 0) -> Callable:
    """torch.compile for any number of tokens: dimension `dim` of the first `tensors` arguments.

    All other sizes are constants; a call with others is compiled anew.
    """
    limits = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, VARIANTS)
    compiled = torch.compile(function, dynamic=False)

    def call(*args):
        for tensor in args[:tensors]:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compiled(*args)
    return call


def compile_steps(model: nn.Module):
    """Compute norms, the rotation of q and k, and act(gate) * up as one kernel each, in place."""
    compiled_norm = compile_tokens(norm_rows)
    compiled_rotate = compile_tokens(rotate, tensors=3, dim=2)
    compiled_gated = compile_tokens(gated, tensors=2)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(norm_forward, compiled_norm, module)
        elif isinstance(module, Attention):
            module.rotate = partial(rotate_heads, compiled_rotate, module)
        elif isinstance(module, MLP):
            module.gated = partial(gated_rows, compiled_gated, module.act)


def norm_rows(x, weight, eps: float, offset: float, wide: bool):
    """model.rms_norm of rows x (N, D), written out.

    torch 2.4 takes F.rms_norm for a function of one number of rows, and compiles every length anew.
    """
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if wide:
        return ((offset + weight.float()) * h).to(x.dtype)
    return weight * h.to(x.dtype)


def norm_forward(compiled: Callable, norm: RMSNorm, x):
    """RMSNorm.forward."""
    rows = x.reshape(-1, x.shape[-1])                                           # (N, D)
    return compiled(rows, norm.weight, norm.eps, norm.offset, norm.wide).view(x.shape)


def rotate_heads(compiled: Callable, attention: Attention, x, ctx):
    """Attention.rotate."""
    return compiled(x, *attention.rope_of(ctx), attention.config.rotary_pairs)


def gated_rows(compiled: Callable, act: Callable, gate, up=None):
    """MLP.gated."""
    up = None if up is None else up.reshape(-1, up.shape[-1])                   # (N, I)
    return compiled(gate.reshape(-1, gate.shape[-1]), up, act).view(gate.shape)


def gated(gate, up, act: Callable):
    """MLP.gated of rows (N, I)."""
    return act(gate) if up is None else act(gate) * up


# ---- the loss -----------------------------------------------------------------------------------


def compile_loss() -> Callable:
    """losses.losses_and_grad as one kernel that reads the scores and writes the gradient."""
    compiled = compile_tokens(loss_in_one, tensors=2)

    def chunk_loss(scores, y, softcap, dtype, needs_grad=True):
        if not needs_grad:
            return losses_and_grad(scores, y, softcap, dtype, needs_grad)
        return compiled(scores, y, softcap, dtype)
    return chunk_loss


def loss_in_one(scores, y, softcap: float | None, dtype: torch.dtype):
    """losses.losses_and_grad without steps in place, scatter and gather."""
    logits = scores.float()                                                     # (c, V)
    if softcap is not None:
        tanh = torch.tanh(logits / softcap)
        logits = softcap * tanh
    is_y = torch.arange(scores.shape[1], device=scores.device) == y[:, None]
    top = logits.amax(-1, keepdim=True)
    e = (logits - top).exp()
    s = e.sum(-1, keepdim=True)
    at_y = torch.where(is_y, logits, 0).sum(-1, keepdim=True)
    grad = e / s - is_y.float()
    if softcap is not None:
        grad = grad * (1 - tanh.square())
    return s.log() + top - at_y, grad.to(dtype)


# ---- the choice ---------------------------------------------------------------------------------


def pick_compile(wanted: bool | None, device, dtype, hidden_act: str = "silu",
                 fuse: Callable | None = None) -> tuple[bool, str]:
    """(whether to compile_steps, a line for the start page).

    wanted None: on GPUs, where torch has a compiler for them. The compiled steps are first tried on
    a small model, forward and backward, against those that are not compiled. fuse: what is done to
    models before (fast/fused_block.py), and is done to the small one.
    """
    device = torch.device(device)
    if wanted is False:
        return False, "torch.compile: off"
    if wanted is None and device.type != "cuda":
        return False, "torch.compile: off (not worth it on a CPU)"
    try:
        error = compile_error(device, dtype, hidden_act, fuse)
    except Exception as refusal:        # of many kinds, and none must end a training
        return False, f"torch.compile: off (fails here: {first_line(refusal)})"
    if not error < COMPILED_ERROR[dtype]:
        return False, f"torch.compile: off (compiled steps are wrong by {error:.2g})"
    return True, "torch.compile: on (norms, rotation, gate * up, loss)"


def compile_error(device, dtype, hidden_act: str, fuse: Callable | None = None) -> float:
    """The largest relative error of a compiled block's output and gradients."""
    config = model_config({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "hidden_act": hidden_act})
    results = []
    for compiled in (False, True):
        model = CausalLM(config)
        init_weights(model, torch.Generator().manual_seed(0))
        model.to(device, dtype)
        if fuse:
            fuse(model)
        if compiled:
            compile_steps(model)
        chunk_loss = compile_loss() if compiled else losses_and_grad
        ids = torch.arange(40, device=device)
        out = model(ids[None])
        # not the sum of squares: behind a norm it is constant, and its gradients are rounding
        (out.float() * torch.linspace(-1, 1, out.shape[-1], device=device)).sum().backward()
        with torch.no_grad():
            losses = chunk_loss(model.logits(out[0]), ids, config.final_softcap, dtype)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.detach(), *losses, *grads])
    errors = [(a - b).float().norm() / (a.float().norm() + 1e-12) for a, b in zip(*results)]
    return max(map(float, errors))
