"""Layers that some blocks have instead of Llama's: other mixers, mixtures of experts.

The mixer of a block (model.py) lets tokens read earlier ones: attention, or a layer of this file.
All mixers are called as mixer(x, ctx) and have the same three parts:

    readers()           the linear layers that read the block's input
    mix(outputs, ctx)   from their outputs to the input of the last linear layer, o_proj
    o_proj              the last linear layer

so that fast/fused_block.py computes the linear layers of all of them in one way. The second half of
a block, an MLP or a mixture of experts, is called as mlp(x, ctx).

Requires: families.py, rope.py, attention.py.
Next: model.py.
Papers: latent attention arXiv:2405.04434 (sec. 2.1), gated delta rule arXiv:2412.06464, its chunks
arXiv:2406.06484, Mamba-2 arXiv:2405.21060, short convolution arXiv:2511.23404, mixture of experts
arXiv:2101.03961, the choice of experts from groups arXiv:2405.04434 (sec. 2.2.2), and with a bias
arXiv:2412.19437 (sec. 2.1.2).
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from attention import PackedLayout, attend, group_by_length, to_device
from families import ModelConfig
from rope import rotate

ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),      # arXiv:2109.08668, sec. 3
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Mixer(nn.Module):
    """Base of layers that mix tokens. A subclass has readers, mix and o_proj, see above."""

    def forward(self, x, ctx):
        """(B, T, D) -> (B, T, D)."""
        return self.o_proj(self.mix([layer(x) for layer in self.readers()], ctx))


# ---- latent attention ---------------------------------------------------------------------------


class LatentAttention(Mixer):
    """Multi-head latent attention (arXiv:2405.04434, sec. 2.1).

    Keys and values are made from a short vector per token, queries too if q_lora_rank is set. Of
    the Dh features of a head the last R are rotated; the R rotated features of a key are the same
    in all heads. A value has v_head_dim features, here padded to Dh, which every kernel takes.
    """

    attend = staticmethod(attend)       # scale/context_parallel.py sets another on a finished model

    def __init__(self, config: ModelConfig, layer: int, norm: Callable):
        super().__init__()
        D, H, Dh, R = (config.hidden_size, config.num_attention_heads, config.head_dim,
                       config.rotary_dim)
        self.config = config
        self.layer = layer
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=config.qkv_bias)
            self.q_a_layernorm = norm(config.q_lora_rank, 1e-6)     # 1e-6 in every model
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * Dh, bias=False)
        else:
            self.q_proj = nn.Linear(D, H * Dh, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, config.kv_lora_rank + R, bias=config.qkv_bias)
        self.kv_a_layernorm = norm(config.kv_lora_rank, 1e-6)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, H * (Dh - R + config.v_head_dim),
                                   bias=False)
        self.o_proj = nn.Linear(H * config.v_head_dim, D, bias=config.o_bias)

    def readers(self) -> list[nn.Module]:
        first = self.q_a_proj if self.config.q_lora_rank else self.q_proj
        return [first, self.kv_a_proj_with_mqa]

    def mix(self, outputs, ctx):
        """The outputs of `readers`, (B, T, …) -> the heads' outputs, (B, T, H*v_head_dim)."""
        config = self.config
        q, latent = outputs
        if config.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = self.rotate_end(q.unflatten(-1, (-1, config.head_dim)).transpose(1, 2), ctx)
        if ctx.temperature is not None:
            q = (q * ctx.temperature).to(q.dtype)
        k, v = self.keys_and_values(latent, ctx)                    # (B, H, T, Dh)
        if ctx.cache is not None:
            k, v = ctx.cache.update(self.layer, k, v)               # (B, H, S, Dh)
        out = self.attend(
            q, k, v,
            kernel=ctx.kernel,
            layout=ctx.layout,
            scale=config.attn_scale,
            filled=ctx.cache.filled if ctx.cache else None,
        )                                                           # (B, H, T, Dh)
        return out[..., :config.v_head_dim].transpose(1, 2).flatten(2)

    def keys_and_values(self, latent, ctx):
        """The output of kv_a_proj_with_mqa, (B, T, kv_lora_rank + R) -> k, v (B, H, T, Dh)."""
        config = self.config
        R = config.rotary_dim
        latent, shared = latent.split((config.kv_lora_rank, R), dim=-1)
        both = self.kv_b_proj(self.kv_a_layernorm(latent))          # of all heads
        both = both.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
        k, v = both.split((config.head_dim - R, config.v_head_dim), dim=-1)
        shared = rotate(shared[:, None], *ctx.rope, config.rotary_pairs)        # (B, 1, T, R)
        k = torch.cat((k, shared.expand(*k.shape[:-1], R).to(k.dtype)), dim=-1)
        return k, F.pad(v, (0, config.head_dim - config.v_head_dim))

    def rotate_end(self, q, ctx):
        """q (B, H, T, Dh) with its last R features rotated."""
        R = self.config.rotary_dim
        rotated = rotate(q[..., -R:], *ctx.rope, self.config.rotary_pairs)
        return torch.cat((q[..., :-R], rotated), dim=-1)


# ---- mixers with a state of fixed size ----------------------------------------------------------


class StateMixer(Mixer):
    """A mixer that reads earlier tokens through a state of fixed size, reset for each sequence.

    A subclass has scan(tensors, state, lengths) -> (output, state after the last token). tensors:
    (B, T, …) each; state: a tuple of tensors (B, …), or None before the first token. lengths:
    None, or the tokens of each sequence, (B,) int64, where rows are padded on the right.
    """

    def scan_sequences(self, tensors, ctx):
        """The outputs of scan, (B, T, …), for each sequence of a packed row apart."""
        if ctx.layout is not None:
            return self.scan_packed(tensors, ctx.layout, ctx.cache)
        state = None if ctx.cache is None else ctx.cache.state(self.layer)
        out, state = self.scan(tensors, state, None)
        if ctx.cache is not None:
            ctx.cache.keep_state(self.layer, state)
        return out

    def scan_packed(self, tensors, layout: PackedLayout, cache):
        """scan_sequences of a row that holds several sequences, in the layout's padded batches."""
        members = group_by_length(layout.lengths)
        slots = [n * padded for n, padded in layout.groups]
        rows = [x[0].index_select(0, layout.gather).split(slots) for x in tensors]
        outs, states = [], []
        for number, ((n, padded), group) in enumerate(zip(layout.groups, members)):
            batch = [parts[number].unflatten(0, (n, padded)) for parts in rows]
            lengths = None
            if cache is not None:           # pads must not reach the state
                lengths = [layout.lengths[sequence] for sequence in group]
                lengths = to_device(torch.tensor(lengths), batch[0].device)
            out, state = self.scan(batch, None, lengths)
            outs.append(out.flatten(0, 1))
            states.append(state)
        if cache is not None:
            order = torch.tensor([sequence for group in members for sequence in group]).argsort()
            order = to_device(order, layout.gather.device)
            cache.keep_state(self.layer, tuple(torch.cat(parts)[order] for parts in zip(*states)))
        return torch.cat(outs).index_select(0, layout.scatter)[None]


class CausalConv(nn.Conv1d):
    """Each channel convolved with a kernel of its own, over a token and the K - 1 before it."""

    def __init__(self, channels: int, kernel: int, bias: bool):
        super().__init__(channels, channels, kernel, groups=channels, bias=bias)

    def forward(self, x, before, lengths):
        """x (B, T, C) -> the same shape, and the last K - 1 inputs of each sequence, (B, K - 1, C).

        before: the K - 1 inputs before x, or None for zeros. lengths: see StateMixer.
        """
        K = self.kernel_size[0]
        x = F.pad(x, (0, 0, K - 1, 0)) if before is None else torch.cat((before, x), dim=1)
        y = F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=self.groups).transpose(1, 2)
        if lengths is None:
            return y, x[:, x.shape[1] - K + 1:]
        last = lengths[:, None] + torch.arange(K - 1, device=x.device)          # (B, K - 1)
        return y, x.gather(1, last[..., None].expand(-1, -1, x.shape[2]))


class GatedDeltaNet(StateMixer):
    """The gated delta rule (arXiv:2412.06464), as in Qwen3-Next and Qwen 3.5.

    q, k and v pass through a short convolution. Each value head has a state (dk, dv), which maps
    keys to values. For each token the state decays by exp(g), and then its value for the key k
    moves towards v by the fraction beta. Several value heads share a key head.
    """

    def __init__(self, config: ModelConfig, layer: int, norm: Callable):
        super().__init__()
        D = config.hidden_size
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        heads, values = config.linear_num_value_heads, config.linear_value_width
        self.config = config
        self.layer = layer
        if config.fused_delta:
            self.in_proj_qkvz = nn.Linear(D, 2 * keys + 2 * values, bias=False)
            self.in_proj_ba = nn.Linear(D, 2 * heads, bias=False)
        else:
            self.in_proj_qkv = nn.Linear(D, 2 * keys + values, bias=False)
            self.in_proj_z = nn.Linear(D, values, bias=False)
            self.in_proj_b = nn.Linear(D, heads, bias=False)
            self.in_proj_a = nn.Linear(D, heads, bias=False)
        self.conv1d = CausalConv(2 * keys + values, config.conv_kernel, bias=False)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.ones(heads))
        # the checkpoint stores this weight itself, also where it stores weight - 1 of other norms
        self.norm = norm(config.linear_value_head_dim, config.rms_norm_eps, offset=0.0, wide=False)
        self.o_proj = nn.Linear(values, D, bias=False)

    def readers(self) -> list[nn.Module]:
        if self.config.fused_delta:
            return [self.in_proj_qkvz, self.in_proj_ba]
        return [self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a]

    def mix(self, outputs, ctx):
        """The outputs of `readers`, (B, T, …) -> the gated values, (B, T, nv*dv)."""
        qkv, z, b, a = self.split_key_heads(*outputs) if self.config.fused_delta else outputs
        out = self.norm(self.scan_sequences((qkv, b, a), ctx))                  # (B, T, nv, dv)
        gate = F.silu(z.unflatten(-1, out.shape[-2:]).float())
        return (out * gate).to(z.dtype).flatten(2)      # the norm's weight may be float32

    def split_key_heads(self, qkvz, ba):
        """q, k and v side by side, z, b and a, from two outputs that have them key head by head."""
        config = self.config
        nk, dk = config.linear_num_key_heads, config.linear_key_head_dim
        values = config.linear_value_width // nk                    # numbers of a key head's values
        q, k, v, z = qkvz.unflatten(-1, (nk, -1)).split((dk, dk, values, values), dim=-1)
        b, a = ba.unflatten(-1, (nk, -1)).chunk(2, dim=-1)
        return torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1), *(
            x.flatten(2) for x in (z, b, a))

    def scan(self, tensors, state, lengths):
        """(q, k, v side by side; b; a), (B, T, …) -> the values read, (B, T, nv, dv); state."""
        config = self.config
        dk, nv = config.linear_key_head_dim, config.linear_num_value_heads
        keys = config.linear_num_key_heads * dk
        qkv, b, a = tensors
        before, S = (None, None) if state is None else state
        qkv, last = self.conv1d(qkv, before, lengths)
        qkv = ACTIVATIONS[config.hidden_act](qkv)
        q, k, v = qkv.split((keys, keys, config.linear_value_width), dim=-1)
        sizes = (dk, dk, config.linear_value_head_dim)
        q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2).float()
                   for x, size in zip((q, k, v), sizes))                # (B, nk or nv, T, dk or dv)
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        q, k = (x.repeat_interleave(nv // x.shape[1], dim=1) for x in (q, k))   # (B, nv, T, dk)
        beta = b.float().sigmoid().transpose(1, 2)                              # (B, nv, T)
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        g = g.transpose(1, 2)
        if lengths is not None:             # pads change no state
            real = torch.arange(g.shape[-1], device=g.device) < lengths[:, None, None]
            beta, g = beta * real, g * real
        out, S = scan_state(q * dk ** -0.5, k, v, g, beta, S)
        return out.transpose(1, 2).to(qkv.dtype), (last, S)


CHUNK = 64              # tokens of a chunk of chunked_scan


def scan_state(q, k, v, g, beta, S):
    """Read a state S (B, H, dk, dv) that every token changes: (outputs (B, H, T, dv), last S).

    q, k (B, H, T, dk), v (B, H, T, dv), g and beta (B, H, T), float32. For each token

        S = exp(g) S + k (x) beta (v - exp(g) S'k),     output S'q

    (arXiv:2412.06464, eq. 10). beta None: S = exp(g) S + k (x) v (arXiv:2405.21060, eq. 1). S None:
    zeros.
    """
    if S is None:
        S = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    with torch.autocast(q.device.type, enabled=False):          # it would compute in 16 bits
        scan = recurrent_scan if q.shape[2] == 1 else chunked_scan
        return scan(q, k, v, g, beta, S)


def recurrent_scan(q, k, v, g, beta, S):
    """scan_state token by token: the definition, and the slow twin of chunked_scan."""
    outs = []
    for t, (q_t, k_t, v_t, g_t) in enumerate(zip(*(x.unbind(2) for x in (q, k, v, g)))):
        S = S * g_t.exp()[..., None, None]
        change = v_t                                                            # (B, H, dv)
        if beta is not None:
            change = beta[:, :, t, None] * (v_t - (S * k_t[..., None]).sum(-2))
        S = S + k_t[..., None] * change[..., None, :]
        outs.append((S * q_t[..., None]).sum(-2))
    return torch.stack(outs, dim=2), S


def chunked_scan(q, k, v, g, beta, S, chunk: int = CHUNK):
    """scan_state in chunks of tokens, as matrix products (arXiv:2412.06464, sec. 3.3).

    Without beta the values are what is added to the state. With it, the changes u of the tokens of
    a chunk solve a triangular system: token i's own is beta (v - what the state has for k), and the
    state has the changes of the tokens before it. The solution is linear in the chunk's first
    state, and its two parts are found for all chunks at once.
    """
    T = v.shape[2]
    chunk = min(chunk, T)
    q, k, v = (F.pad(x, (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    g = F.pad(g, (0, -T % chunk)).unflatten(2, (-1, chunk))                     # (B, H, n, C)
    total = g.cumsum(-1)                    # logarithm of the decay since the start, (B, H, n, C)
    # decay of token j's change until token i, (B, H, n, C, C); zeros above the diagonal before exp,
    # too: the gradient of inf is NaN
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    since_start = total.exp()[..., None]
    until_end = (total[..., -1:] - total).exp()[..., None]

    u, w = v, None
    if beta is not None:
        beta = F.pad(beta, (0, -T % chunk)).unflatten(2, (-1, chunk))[..., None]
        u, w = changes_in_chunks(k, v, beta, decay, since_start)
    scores = (q @ k.mT) * decay
    parts = (x.unbind(2) for x in (u, scores, q * since_start, (k * until_end).mT,
                                   since_start[..., -1:, :]))
    outs = []
    for number, (u_n, scores_n, q_n, k_n, decay_n) in enumerate(zip(*parts)):
        if w is not None:
            u_n = u_n - w[:, :, number] @ S
        outs.append(q_n @ S + scores_n @ u_n)
        S = decay_n * S + k_n @ u_n
    return torch.cat(outs, dim=2)[:, :, :T], S


def changes_in_chunks(k, v, beta, decay, since_start):
    """The changes u of the tokens of each chunk from a state of zeros, and w: u - w S from S."""
    system = beta * (k @ k.mT) * decay
    known = torch.cat((beta * v, beta * k * since_start), dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    return solved.split((v.shape[-1], k.shape[-1]), dim=-1)


class StateSpace(StateMixer):
    """Mamba-2 (arXiv:2405.21060): a decaying state to which each token adds.

    In the terms of scan_state, keys are B, queries C, and values x, each times its time step dt. A
    key head, here called a group, serves several value heads.
    """

    def __init__(self, config: ModelConfig, layer: int, norm: Callable):
        super().__init__()
        D = config.hidden_size
        heads, values = config.linear_num_value_heads, config.linear_value_width
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        self.config = config
        self.layer = layer
        self.in_proj = nn.Linear(D, 2 * values + 2 * keys + heads, bias=config.mixer_bias)
        self.conv1d = CausalConv(values + 2 * keys, config.conv_kernel, config.conv_bias)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = norm(values, config.rms_norm_eps)
        self.o_proj = nn.Linear(values, D, bias=config.mixer_bias)

    def readers(self) -> list[nn.Module]:
        return [self.in_proj]

    def mix(self, outputs, ctx):
        """The output of in_proj, [z | x, B, C | dt] -> the gated values, normalized by groups."""
        heads, values = self.config.linear_num_value_heads, self.config.linear_value_width
        z, xbc, dt = outputs[0].split((values, self.conv1d.in_channels, heads), dim=-1)
        y = self.scan_sequences((xbc, dt), ctx) * F.silu(z.float())             # (B, T, nv*dv)
        y = y.unflatten(-1, (self.config.linear_num_key_heads, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps).flatten(2)
        return (self.norm.weight * y.to(z.dtype)).to(z.dtype)

    def scan(self, tensors, state, lengths):
        """(x, B, C side by side; dt), (B, T, …) -> y (B, T, nv*dv) float32; state."""
        config = self.config
        nv, groups = config.linear_num_value_heads, config.linear_num_key_heads
        keys = groups * config.linear_key_head_dim
        xbc, dt = tensors
        before, S = (None, None) if state is None else state
        xbc, last = self.conv1d(xbc, before, lengths)
        xbc = ACTIVATIONS[config.conv_act or config.hidden_act](xbc).float()
        x, k, q = xbc.split((config.linear_value_width, keys, keys), dim=-1)
        x = x.unflatten(-1, (nv, -1)).transpose(1, 2)                           # (B, nv, T, dv)
        q, k = (t.unflatten(-1, (groups, -1)).transpose(1, 2) for t in (q, k))
        q, k = (t.repeat_interleave(nv // groups, dim=1) for t in (q, k))       # (B, nv, T, dk)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*config.time_step_limit)
        dt = dt.transpose(1, 2)                                                 # (B, nv, T)
        if lengths is not None:             # pads change no state
            dt = dt * (torch.arange(dt.shape[-1], device=dt.device) < lengths[:, None, None])
        g = -self.A_log.float().exp()[:, None] * dt
        out, S = scan_state(q, k, x * dt[..., None], g, None, S)
        out = out + self.D.float()[:, None, None] * x
        return out.transpose(1, 2).flatten(2), (last, S)


class ShortConvolution(StateMixer):
    """y = C * conv(B * x) of three vectors of each token, as in LFM2; its state is B * x."""

    def __init__(self, config: ModelConfig, layer: int, norm: Callable):
        super().__init__()
        D = config.hidden_size
        self.layer = layer
        self.in_proj = nn.Linear(D, 3 * D, bias=config.mixer_bias)
        self.conv = CausalConv(D, config.conv_kernel, config.conv_bias)
        self.o_proj = nn.Linear(D, D, bias=config.mixer_bias)

    def readers(self) -> list[nn.Module]:
        return [self.in_proj]

    def mix(self, outputs, ctx):
        """The output of in_proj, (B, T, 3 D) -> (B, T, D)."""
        b, c, x = outputs[0].chunk(3, dim=-1)
        return c * self.scan_sequences((b * x,), ctx)

    def scan(self, tensors, state, lengths):
        """B * x, (B, T, D) -> the same, convolved; its last K - 1 tokens."""
        y, last = self.conv(*tensors, state and state[0], lengths)
        return y, (last,)


def mixer_state_bytes(config: ModelConfig, layer: int, dtype: torch.dtype) -> int:
    """Bytes of the state of one sequence; 0 for attention."""
    before = config.conv_kernel - 1                             # inputs of the convolution
    if config.mixers[layer] == "short convolution":
        return before * config.hidden_size * dtype.itemsize
    if config.mixers[layer] in ("delta rule", "state space"):
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        inputs = before * (2 * keys + config.linear_value_width)
        return inputs * dtype.itemsize + 4 * config.linear_key_head_dim * config.linear_value_width
    return 0


# {entry of config.mixers: (its name in a block, as checkpoints have it; its class)}
OTHER_MIXERS = {
    "latent attention": ("self_attn", LatentAttention),
    "delta rule": ("linear_attn", GatedDeltaNet),
    "state space": ("mamba", StateSpace),
    "short convolution": ("conv", ShortConvolution),
}


# ---- mixture of experts -------------------------------------------------------------------------


class StackedLinear(nn.Module):
    """E linear layers in one tensor, as some checkpoints store experts.

    order: layout of each matrix, "in, out" or "out, in".
    """

    def __init__(self, experts: int, size_in: int, size_out: int, bias: bool = False,
                 order: str = "in, out"):
        super().__init__()
        self.in_features = size_in
        self.out_features = size_out
        self.out_first = order == "out, in"
        sizes = (size_out, size_in) if self.out_first else (size_in, size_out)
        self.weight = nn.Parameter(torch.empty(experts, *sizes))
        self.bias = nn.Parameter(torch.empty(experts, size_out)) if bias else None

    def forward(self, x, expert: int):
        weight = self.weight[expert]
        y = x @ (weight.T if self.out_first else weight)
        if self.bias is None:
            return y
        return y + self.bias[expert].to(y.dtype)        # under autocast the product is 16 bits


class StackedExperts(nn.Module):
    """All experts of a layer in two tensors; gate and up are fused."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.config = config
        options = {"order": config.stacked_experts, "bias": config.expert_bias}
        self.gate_up_proj = StackedLinear(E, D, 2 * width, **options)
        self.down_proj = StackedLinear(E, width, D, **options)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x, expert: int):
        return self.down_proj(self.gated(self.gate_up_proj(x, expert)), expert)

    def gated(self, gate_up):
        """The output of gate_up_proj, (n, 2 I) -> the input of down_proj, (n, I)."""
        if self.config.interleaved_gate_up:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        else:
            gate, up = gate_up.chunk(2, dim=-1)
        limit = self.config.swiglu_limit
        if limit is None:
            return self.act(gate) * up
        return clamped_swiglu(gate, up, limit, self.config.swiglu_alpha)


def clamped_swiglu(gate, up, limit: float, alpha: float):
    """SwiGLU of clamped inputs, with 1 added to up (arXiv:2508.10925, sec. 2.2)."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


class MoE(nn.Module):
    """Each token passes the k experts that its router scores highest, and a shared expert if any.

    `grouped` computes the experts' sum expert by expert; `one_by_one`, its readable twin, token by
    token. visited: None, or a set that collects the experts that had tokens; experts without tokens
    then run on no rows, so that all have gradients. mlp(config, width): makes an expert.
    """

    visited: set | None = None

    def __init__(self, config: ModelConfig, mlp: Callable):
        super().__init__()
        self.config = config
        width = config.moe_intermediate_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts,               # the router
                              bias=config.router_bias)
        if config.selection_bias:               # float32 in any model, and never trained
            constant = torch.zeros(config.num_experts, dtype=torch.float32)
            self.selection_bias = nn.Parameter(constant, requires_grad=False)
        if config.stacked_experts:
            self.experts = StackedExperts(config)
        else:
            self.experts = nn.ModuleList(mlp(config, width) for _ in range(config.num_experts))
        if config.shared_expert_intermediate_size:
            self.shared_expert = mlp(config, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x, ctx):
        """(B, T, D) -> (B, T, D). Appends the router's logits (N, E) to ctx.routers."""
        config = self.config
        rows = x.flatten(0, 1)                                      # (N, D)
        scores = self.scores(rows)                                  # (N, E)
        if ctx.routers is not None:
            ctx.routers.append(scores)
        chosen, weights = self.route(scores)
        y = self.mix(rows, chosen, weights.to(rows.dtype))          # (N, D)
        if config.shared_expert_intermediate_size:
            shared = self.shared_expert(rows)
            if config.shared_expert_gate:
                shared = self.shared_expert_gate(rows).sigmoid() * shared
            y = y + shared
        return y.view_as(x)

    def mix(self, rows, chosen, weights):
        """The weighted sum of each row's chosen experts, (N, D)."""
        config = self.config
        return grouped(rows, chosen, weights, self.expert, config.num_experts, config.scale_input,
                       self.visited)

    def scores(self, rows):
        """The router's logits, (N, E)."""
        plain = type(self.gate) is nn.Linear            # neither adapted nor quantized
        if not self.config.router_float32 or not plain:
            return self.gate(rows)
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.float(), self.gate.weight.float())

    def route(self, scores):
        """Router logits (N, E) -> the chosen experts and their weights, both (N, k)."""
        config = self.config
        if config.router == "softmax":
            choice = probabilities = scores.softmax(-1, dtype=torch.float32)
        else:
            choice, probabilities = scores, scores.float().sigmoid()
        if config.selection_bias:
            choice = probabilities + self.selection_bias
        if config.expert_groups > 1:
            choice = self.of_best_groups(choice)
        chosen = choice.topk(config.num_experts_per_tok).indices
        weights = probabilities.gather(-1, chosen)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, (weights * config.routed_scale).to(scores.dtype)

    def of_best_groups(self, choice):
        """The scores (N, E), -inf outside of the top_groups best groups of experts."""
        config = self.config
        groups = choice.unflatten(-1, (config.expert_groups, -1))               # (N, groups, …)
        judges = 2 if config.group_score == "two best" else 1
        best = groups.topk(judges).values.sum(-1).topk(config.top_groups).indices
        hidden = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return groups.masked_fill(hidden[..., None], float("-inf")).flatten(-2)

    def expert(self, x, number: int):
        """One expert on x (n, D) -> (n, D)."""
        if self.config.stacked_experts:
            return self.experts(x, number)
        return self.experts[number](x)


def grouped(x, chosen, weights, expert, num_experts: int, scale_input: bool,
            visited: set | None = None):
    """Weighted sum of the chosen experts, (N, D); each expert runs once, on all of its tokens.

    x (N, D); chosen, weights (N, k); expert(rows, number) -> rows. scale_input: the weight
    multiplies the expert's input, not its output. visited: see MoE.
    """
    k = chosen.shape[1]
    slots = chosen.flatten()                                        # (N*k,)
    order = slots.argsort(stable=True)                              # slots by expert
    counts = slots.bincount(minlength=num_experts).tolist()         # waits for the device
    rows = x[order // k]
    factor = weights.flatten()[order][:, None]
    if scale_input:
        rows = rows * factor
    if visited is not None:
        visited.update(number for number, count in enumerate(counts) if count)

    outs = []
    for number, group in enumerate(rows.split(counts)):
        if len(group) or visited is not None:
            outs.append(expert(group, number))
    out = torch.cat(outs) if outs else rows                         # no tokens, no experts
    if not scale_input:
        out = out * factor
    out = out[order.argsort()]                                      # in the order of slots again
    return out.view(*chosen.shape, x.shape[1]).sum(1)


def one_by_one(x, chosen, weights, expert, num_experts: int, scale_input: bool):
    """The slow twin of `grouped`: token by token, expert by expert."""
    sums = []
    for token, row in enumerate(x):
        outs = []
        for number, weight in zip(chosen[token].tolist(), weights[token]):
            y = expert((row * weight if scale_input else row)[None], number)[0]
            outs.append(y if scale_input else y * weight)
        sums.append(torch.stack(outs).sum(0))
    return torch.stack(sums)
