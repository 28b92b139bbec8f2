"""MLPs computed over tiles of the sequence, for rows so long that gate and up do not fit.

    tile_mlps(model, 4096)      sets it on finished blocks, in place, after fuse_blocks

gate, up and their gradients are the largest tensors of a block, I numbers a token each. Every token
passes the MLP alone, so a tile of tokens at a time gives the same numbers: the forward pass keeps
the MLP's input, and the backward pass computes each tile again and takes its gradients before the
next one. A tile is computed by the block's own add_mlp: the plain one of model.py, or the one of
fast/fused_block.py. Without tiles it is the twin.

Experts are not tiled: their tokens are sorted first.

Requires: model.py.
Next: runtime/memory.py (what is kept, in bytes).
Papers: tiles of the sequence, arXiv:2506.13996 (sec. 3.1.1).
"""
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from model import Block, CausalLM, ForwardContext, MoE


def tile_mlps(model: CausalLM, tile: int):
    """Compute the MLPs of a model in tiles of so many tokens, in place."""
    for block in model.model.layers:
        if block.mlp is not None and not isinstance(block.mlp, MoE):
            block.add_mlp = partial(tiled_add_mlp, block, block.add_mlp, tile)


def tiled_add_mlp(block: Block, add_mlp: Callable, tile: int, x, ctx: ForwardContext):
    """Block.add_mlp of x (B, T, D); tokens that fit into one tile are computed as ever."""
    if x.shape[:-1].numel() <= tile:
        return add_mlp(x, ctx)
    if not torch.is_grad_enabled():
        return in_tiles(partial(add_mlp, ctx=ctx), x, tile)
    parts = (block.mlp_norm, block.mlp, block.after_mlp_norm)
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    surroundings = Surroundings(x.device, parts)
    return TiledMLP.apply(partial(add_mlp, ctx=ctx), tile, surroundings, x, *trained)


def in_tiles(function: Callable, x, tile: int):
    """function(x), tile by tile; (B, T, D) -> (B, T, D)."""
    out = None
    start = 0
    for rows in tiles_of(x, tile):
        y = function(rows)                                                  # (1, tile, D)
        if out is None:
            out = y.new_empty(1, x.shape[:-1].numel(), y.shape[-1])
        out[:, start:start + rows.shape[1]] = y
        start += rows.shape[1]
    return out.view(*x.shape[:-1], -1)


def tiles_of(x, tile: int):
    """(B, T, D) -> views (1, tile, D) of its tokens, the last one maybe shorter."""
    return x.reshape(1, -1, x.shape[-1]).split(tile, dim=1)


class TiledMLP(torch.autograd.Function):
    """`in_tiles`, whose backward pass computes each tile again."""

    @staticmethod
    def forward(ctx, function, tile, surroundings, x, *trained):
        """trained: the weights that function reads and trains."""
        ctx.function = function
        ctx.tile = tile
        ctx.surroundings = surroundings
        ctx.save_for_backward(x, *trained)
        return torch.empty_like(x) if is_recomputed() else in_tiles(function, x, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, *trained = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        tiles = zip(*(tiles_of(t, ctx.tile) for t in (x, dout, dx)), strict=True)
        sums = [None] * len(trained)
        with ctx.surroundings.restored():
            for x_tile, dout_tile, dx_tile in tiles:
                grad, *grads = tile_gradients(ctx.function, x_tile, dout_tile, trained)
                dx_tile.copy_(grad)
                sums = [added(total, grad) for total, grad in zip(sums, grads)]
        sums = [None if total is None else total.to(p.dtype) for total, p in zip(sums, trained)]
        return None, None, None, dx, *sums


def is_recomputed() -> bool:
    """Whether a backward pass runs: the block is computed again for what its backward pass reads.

    Nothing reads the output of the MLP, which stands last. torch.utils.checkpoint asks the same.
    """
    return torch._C._current_graph_task_id() != -1


def tile_gradients(function: Callable, x, dout, trained: list) -> tuple:
    """The gradients of a tile's x and of the weights; None for a weight that has no effect."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        out = function(x)
    return torch.autograd.grad(out, (x, *trained), dout, allow_unused=True)


def added(total, grad):
    """The sum of gradients of tiles; in float32, so that 16 bits round it once."""
    if grad is None:
        return total
    grad = grad.float() if grad.itemsize < 4 else grad
    return grad if total is None else total.add_(grad)


class Surroundings:
    """Autocast and random numbers as they are now, for a computation that is done again later."""

    def __init__(self, device: torch.device, modules: tuple[nn.Module, ...]):
        self.device = device
        self.autocast = {
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        layers = [module for part in modules for module in part.modules()]
        self.draws = any(isinstance(m, nn.Dropout) and m.training and m.p for m in layers)
        self.devices = [device] if self.draws and device.type == "cuda" else []
        if self.draws:
            self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    @contextmanager
    def restored(self):
        """Compute within the block as it was then."""
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, **self.autocast))
            if self.draws:
                stack.enter_context(torch.random.fork_rng(self.devices))
                torch.set_rng_state(self.states[0])
                for device, state in zip(self.devices, self.states[1:]):
                    torch.cuda.set_rng_state(state, device)
            yield
