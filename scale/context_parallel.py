"""Context parallelism (Ulysses): the tokens of a row are cut over the processes of an axis.

    torchrun --nproc-per-node 2 train.py --config my.yaml context_parallel_size=2

    outside attention   a process computes a part of the row, consecutive tokens, with all weights
    in attention        all-to-all: own tokens, all heads -> all tokens, own heads; and back

Queries and keys are exchanged after their norms and their rotation, so attention.attend has the
whole packed row of N tokens with its boundaries, and the heads of one of P processes.

    parts       equal but for one token, without padding; a row with fewer tokens than processes
                leaves some without tokens, which compute their heads alone
    heads       P divides the query heads; key/value heads are repeated until P divides them, too
    labels      shifted before the row is cut: a part's last token predicts the next part's first
    loss        each process has the sum over its tokens, which are summed over the axis
    gradients   sums over tokens, for every weight: each process counts as a data-parallel rank
    dropout     its masks, and NEFTune's noise, are drawn for the whole row, as in one process

All is set on a finished model from outside. The twin is one process.

Requires: scale/mesh.py, scale/collectives.py, attention.py, model.py.
Next: scale/cut_losses.py.
Papers: DeepSpeed-Ulysses arXiv:2309.14509 (sec. 3).
"""
import math
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from attention import attend
from families import ModelConfig
from layers import LatentAttention, MoE
from model import Attention
from scale.collectives import exchange
from scale.mesh import Axis


def check_shares(model, config: ModelConfig, parts: int):
    """Raises ValueError for what `parts` processes cannot compute as one does.

    model: whole, with its adapters; it may be without storage. config: the sizes of this process,
    of which tensor_parallel_size may have cut the heads.
    """
    if config.has_states:
        raise ValueError(
            f"context_parallel_size: {parts}: {config.model_type} has layers whose state passes "
            "from token to token through the whole row, which is not cut. Take fsdp: full_shard, "
            "and for long rows offload_activations: true or mlp_tile")
    heads = config.num_attention_heads
    if heads % parts:
        fitting = [n for n in range(1, parts) if heads % n == 0]
        raise ValueError(
            f"context_parallel_size: {parts} does not divide the {heads} query heads that a "
            f"process has (num_attention_heads). Take {' or '.join(map(str, fitting))}, and the "
            "other processes for data parallelism or fsdp: full_shard")
    for module in model.modules():
        if isinstance(module, MoE) and any(map(has_dropout, module.experts.modules())):
            raise ValueError("context_parallel_size: lora_dropout in experts would draw other "
                             "masks than one process. Set lora_dropout: 0, or leave the experts "
                             "out of lora_target")


def has_dropout(module) -> bool:
    return not isinstance(getattr(module, "dropout", None), (nn.Identity, float, type(None)))


def part_bounds(tokens: int, part: int, parts: int) -> tuple[int, int]:
    """First and last (exclusive) token of a part of a row."""
    return part * tokens // parts, (part + 1) * tokens // parts


def part_sizes(tokens: int, parts: int) -> list[int]:
    """Tokens of each process, in order."""
    bounds = [part_bounds(tokens, part, parts) for part in range(parts)]
    return [end - start for start, end in bounds]


# ---- the model ----------------------------------------------------------------------------------


class OwnTokens:
    """Which tokens this process has of the row that the model computes.

    tokens: of the row; None where the model is called without a layout, to generate: then each
    process has all. It stays until the next call, since the backward pass computes blocks again.
    """

    def __init__(self, axis: Axis):
        self.axis = axis
        self.tokens = None

    def own(self, x, dim: int):
        """This process's tokens of a tensor of all."""
        start, end = part_bounds(self.tokens, self.axis.rank, self.axis.size)
        return x.narrow(dim, start, end - start)


class RowDropout(nn.Module):
    """Dropout of some tokens, by a mask drawn for the whole row: the random numbers of one process.

    dropout: of all features, or scale/tensor_parallel.py's of some.
    """

    def __init__(self, dropout: nn.Module, row: OwnTokens):
        super().__init__()
        self.dropout = dropout
        self.row = row

    def forward(self, x):                                           # (…, n, features)
        if not self.training:
            return x
        ones = x.new_ones(*x.shape[:-2], self.row.tokens, x.shape[-1])
        return x * self.row.own(self.dropout(ones), -2)


def cut_rows(model, axis: Axis, noise: bool = False):
    """Have a model, called with whole rows, compute this process's tokens: (1, N) -> (1, n, D).

    noise: whether NEFTune adds noise to the embeddings, which are then those of the whole row.
    """
    row = OwnTokens(axis)

    def before_model(module, args, kwargs):
        ids, *others = args
        layout = kwargs["layout"] if "layout" in kwargs else (*others, None, None)[1]
        row.tokens = layout.total if layout else None
        if layout is None or noise:
            return None
        own = row.own(ids, 1)
        if hasattr(ids, "on_cpu"):                                  # see runtime/offload.py
            own.on_cpu = row.own(ids.on_cpu, 1)
        return (own, *others), kwargs

    def after_noise(module, args, out):                             # (1, N, D) -> (1, n, D)
        return row.own(out, 1).contiguous() if out.shape[1] == row.tokens else out

    model.register_forward_pre_hook(before_model, with_kwargs=True)
    if noise:
        model.model.embed_tokens.register_forward_hook(after_noise)
    model.context = partial(own_context, row, model.context)
    for module in list(model.modules()):
        if isinstance(module, (Attention, LatentAttention)):
            module.attend = partial(attend_across, axis)
        elif has_dropout(module):
            module.dropout = RowDropout(module.dropout, row)


def own_context(row: OwnTokens, context, position_ids, x, layout, cache, routers):
    """CausalLM.context for own tokens; frequencies may depend on all positions of the row."""
    ctx = context(position_ids, x, layout, cache, routers)
    if layout is None:
        return ctx

    def own(tensor):                                                # dimension 2 is that of tokens
        return row.own(tensor, 2).clone()

    tables = {name: None if table is None else tuple(map(own, table))
              for name, table in (("rope", ctx.rope), ("window_rope", ctx.window_rope))}
    temperature = None if ctx.temperature is None else own(ctx.temperature)
    return replace(ctx, temperature=temperature, **tables)


# ---- attention ----------------------------------------------------------------------------------


def attend_across(axis: Axis, q, k, v, *, layout=None, slopes=None, sinks=None, **options):
    """attention.attend of own tokens: q (1, H, n, Dh) over k, v (1, K, n, Dh) of all processes."""
    if layout is None:
        return attend(q, k, v, layout=None, slopes=slopes, sinks=sinks, **options)
    sizes = part_sizes(layout.total, axis.size)
    of_heads = {name: None if numbers is None else numbers.chunk(axis.size)[axis.rank]
                for name, numbers in (("slopes", slopes), ("sinks", sinks))}
    out = attend(*own_heads(axis, sizes, q, k, v), layout=layout, **of_heads, **options)
    out = exchange(out[0].transpose(0, 1), sizes, [q.shape[2]] * axis.size, axis)
    out = out.unflatten(0, (axis.size, q.shape[2]))                 # (P, n, H/P, Dh)
    return out.transpose(0, 1).flatten(1, 2).transpose(0, 1)[None]  # (1, H, n, Dh)


def own_heads(axis: Axis, sizes: list[int], q, k, v):
    """Own tokens of all heads -> all tokens of own heads, in one all-to-all.

    sizes: tokens of each process.
    """
    heads = math.lcm(k.shape[1], axis.size)             # of k and v
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    q, k = q.to(v.dtype), k.to(v.dtype)                 # as attend has it
    # (n, P, heads of a process, Dh) of each, then side by side
    each = [x[0].transpose(0, 1).unflatten(1, (axis.size, -1)) for x in (q, k, v)]
    sent = torch.cat(each, dim=2).transpose(0, 1).flatten(0, 1)
    received = exchange(sent, [q.shape[2]] * axis.size, sizes, axis)
    return [x.transpose(0, 1)[None] for x in received.split([x.shape[2] for x in each], dim=1)]
