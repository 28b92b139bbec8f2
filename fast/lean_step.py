"""One token through the decoder in few kernels.

    with compiled_steps(model) as add_norm:
        hidden = hidden_of_token(model, ids, position_ids, cache, add_norm)

Beside the matrix products, which read the weights, a token's step is hundreds of kernels that do
next to nothing. Here each residual sum is part of the norm after it, and norms, the rotation and
act(gate) * up are one compiled kernel each. The slow twin is CausalLM.forward.

Requires: model.py, fast/compile.py.
Next: fast/decode.py, which captures the step.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from fast.compile import STEPS, compile_steps, compile_tokens, norm_rows
from model import CausalLM, KVCache, RMSNorm


def hidden_of_token(model: CausalLM, ids, position_ids, cache: KVCache,
                    add_norm: Callable | None = None):
    """CausalLM.forward of one token of each row, ids and position_ids (B, 1) -> (B, 1, D).

    add_norm: of compiled_steps; None: the steps as they are written.
    """
    x = model.embed(ids)
    ctx = model.context(position_ids, x, None, cache, None)
    h = None                                                    # not yet added to x
    for block in model.model.layers:
        for norm, half, norm_after in (
                (block.input_layernorm, block.mixer, block.after_attention_norm),
                (block.post_attention_layernorm, block.mlp, block.after_mlp_norm)):
            if half is not None:
                x, normed = sum_and_norm(norm, x, h, add_norm)
                h = block.scaled(norm_after(half(normed, ctx)))
    hidden = model.for_head(sum_and_norm(model.model.norm, x, h, add_norm)[1])
    cache.advance(1)
    return hidden


def sum_and_norm(norm: nn.Module, x, h, add_norm: Callable | None):
    """x + h, and its norm. h: None before the first block."""
    if h is None:
        return x, norm(x)
    if add_norm is None or not isinstance(norm, RMSNorm):
        x = x + h
        return x, norm(x)
    rows = (t.reshape(-1, t.shape[-1]) for t in (x, h))         # (B, D)
    total, normed = add_norm(*rows, norm.weight, norm.eps, norm.offset, norm.wide)
    return total.view(x.shape), normed.view(x.shape)


def add_norm_rows(x, h, weight, eps: float, offset: float, wide: bool):
    """x + h, and norm_rows of it."""
    x = x + h
    return x, norm_rows(x, weight, eps, offset, wide)


@contextmanager
def compiled_steps(model: CausalLM) -> Iterator[Callable]:
    """Within the block, a model's elementwise steps are compiled; yields add_norm_rows compiled."""
    before = [(module, name, vars(module).get(name)) for module in model.modules()
              for kind, name in STEPS.items() if isinstance(module, kind)]
    compile_steps(model)
    try:
        yield compile_tokens(add_norm_rows, tensors=2)
    finally:
        for module, name, own in before:
            vars(module).pop(name, None)
            if own is not None:
                setattr(module, name, own)
