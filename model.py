"""The decoder: norms, rotary positions, grouped-query attention, SwiGLU, blocks, cache.

    python -m checkpoint.show DIR       the decoder of a checkpoint: blocks, shapes, parameters

It is a Llama with switches (families.py): each `if config.…` below is a difference that some family
makes, and none of them asks for a family's name. With all switches off it is Llama.

It computes the plain way, and knows nothing else: fast/fused_block.py sets on finished blocks what
saves memory and time, fast/compile.py replaces elementwise steps, and scale/ cuts a finished model.

Requires: families.py, rope.py, attention.py, layers.py (experts, and other mixers than attention).
Next: lora.py, losses.py.
Papers: Llama arXiv:2302.13971, RMSNorm arXiv:1910.07467, RoPE arXiv:2104.09864, GQA
arXiv:2305.13245, SwiGLU arXiv:2002.05202, ALiBi arXiv:2108.12409.

Letters for shapes, the same in every file:

    B batch   T query length   S key length   D hidden_size   H query heads   K key/value heads
    Dh head_dim   R rotated features of a head   I ffn width   V vocabulary   E experts
    k experts per token   r LoRA rank   N = B*T tokens

Parameters have the names of a Llama checkpoint (`model.layers.0.self_attn.q_proj.weight`). Where a
family uses other names, ModelConfig.stored_name translates; nothing is ever converted.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from attention import PackedLayout, attend
from families import ModelConfig
from layers import ACTIVATIONS, OTHER_MIXERS, Mixer, MoE
from rope import (alibi_slopes, attn_temperature, length_for_rope, rope_table, rotate,
                  window_rope_table)

@dataclass
class ForwardContext:
    """What is the same for all layers of a forward pass."""
    rope: tuple | None                      # cos and sin, (B, 1, T, R)
    window_rope: tuple | None               # of layers with a window, where they have their own
    slopes: torch.Tensor | None             # ALiBi, (H,)
    temperature: torch.Tensor | None        # factor of queries, (B, 1, T, 1)
    layout: PackedLayout | None                   # sequence boundaries in a packed row
    cache: "KVCache | None"
    kernel: str                             # of attention.attend
    routers: list | None = None             # collects the router logits (N, E) of each layer


# ---- norms --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares in float32 (arXiv:1910.07467, eq. 4).

    offset: the checkpoint stores weight - offset. wide: multiply by the weight in float32, before
    rounding to the input's dtype; it matters in 16 bits only.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, wide: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset
        self.wide = wide

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, self.offset, self.wide)


def rms_norm(x, weight, eps: float, offset: float, wide: bool):
    """RMSNorm as a function."""
    h = normalize_rms(x.float(), eps)
    if wide:
        return ((offset + weight.float()) * h).to(x.dtype)
    return weight * h.to(x.dtype)


def normalize_rms(x, eps: float):
    """x / rms(x) over the last dimension; x float32."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)         # x * rsqrt(mean(x * x) + eps)


class LayerNorm(nn.Module):
    """(x - mean) / std without weights (arXiv:2402.00838, sec. 2.1); eps is always 1e-5 there."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size = size
        self.eps = 1e-5

    def forward(self, x):
        return F.layer_norm(x.float(), (self.size,), eps=self.eps).to(x.dtype)


class WeightedLayerNorm(LayerNorm):
    """(x - mean) / std * weight (arXiv:1607.06450), multiplied in float32."""

    wide = True

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.layer_norm(x.float(), (self.size,), self.weight.float(), eps=self.eps).to(x.dtype)


NORMS = {
    "rms": RMSNorm,
    "rms wide": partial(RMSNorm, wide=True),
    "rms+1": partial(RMSNorm, offset=1.0, wide=True),
    "layer": LayerNorm,
    "layer weight": WeightedLayerNorm,
}


# ---- attention ----------------------------------------------------------------------------------


class Attention(Mixer):
    """Grouped-query self-attention: H query heads share K key/value heads."""

    attend = staticmethod(attend)       # scale/context_parallel.py sets another on a finished model

    def __init__(self, config: ModelConfig, layer: int, norm: Callable):
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.config = config
        self.layer = layer
        self.use_rope = config.use_rope[layer] and not config.alibi
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(D, (H + 2 * K) * Dh, bias=config.qkv_bias)
        else:
            gated = 2 if config.output_gate else 1
            self.q_proj = nn.Linear(D, gated * H * Dh, bias=config.qkv_bias)
            self.k_proj = nn.Linear(D, K * Dh, bias=config.qkv_bias)
            self.v_proj = nn.Linear(D, K * Dh, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * Dh, D, bias=config.o_bias)
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attn_sinks else None
        if config.qk_norm in ("head", "head rotated", "width"):
            heads, kv_heads = (H, K) if config.qk_norm == "width" else (1, 1)
            self.q_norm = norm(heads * Dh, config.rms_norm_eps)
            self.k_norm = norm(kv_heads * Dh, config.rms_norm_eps)

    def readers(self) -> list[nn.Module]:
        """The linear layers that read x: of q, k and v, or one for all three."""
        if self.config.fused_qkv:
            return [self.qkv_proj]
        return [self.q_proj, self.k_proj, self.v_proj]

    def mix(self, outputs, ctx: ForwardContext):
        """The outputs of `readers`, (B, T, …) -> the heads' outputs, (B, T, H*Dh)."""
        q, k, v = self.split_qkv(*outputs) if self.config.fused_qkv else outputs
        if not self.config.output_gate:
            return self.attend_heads(q, k, v, ctx)
        q, gate = q.unflatten(-1, (-1, 2, self.config.head_dim)).unbind(-2)     # (B, T, H, Dh)
        return self.attend_heads(q, k, v, ctx) * gate.flatten(2).sigmoid()

    def split_qkv(self, qkv):
        """q (B, T, …), k and v (B, T, …) from the output of a fused projection."""
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        Dh = self.config.head_dim
        if self.config.fused_qkv == "groups":           # H/K queries, a key, a value; K times
            groups = qkv.unflatten(-1, (K, H // K + 2, Dh))         # (B, T, K, H/K + 2, Dh)
            return groups[..., :-2, :].flatten(-2), groups[..., -2, :], groups[..., -1, :]
        return qkv.split((qkv.shape[-1] - 2 * K * Dh, K * Dh, K * Dh), dim=-1)

    def attend_heads(self, q, k, v, ctx: ForwardContext):
        """Projected q, k, v (B, T, …) -> the heads' outputs, (B, T, H*Dh)."""
        config = self.config
        q, k, v = self.split_heads(q, k, v)
        if self.use_rope:
            q = self.rotate(q, ctx)
            k = self.rotate(k, ctx)
            if config.qk_norm == "unit":
                q = normalize_rms(q.float(), config.rms_norm_eps).to(q.dtype)
                k = normalize_rms(k.float(), config.rms_norm_eps).to(k.dtype)
        if config.qk_norm == "head rotated":
            q = self.q_norm(q)
            k = self.k_norm(k)
        unrotated_only = config.attn_temperature and config.attn_temperature[0] == "log1p"
        if ctx.temperature is not None and not (self.use_rope and unrotated_only):
            q = (q * ctx.temperature).to(q.dtype)
        if ctx.cache is not None:
            k, v = ctx.cache.update(self.layer, k, v)               # (B, K, S, Dh)
        out = self.attend(
            q, k, v,
            kernel=ctx.kernel,
            layout=ctx.layout,
            scale=config.attn_scale,
            slopes=ctx.slopes,
            window=config.windows[self.layer],
            chunk=config.chunks[self.layer],
            softcap=config.attn_softcap,
            sinks=self.sinks,
            filled=ctx.cache.filled if ctx.cache else None,
        )                                                           # (B, H, T, Dh)
        return out.transpose(1, 2).flatten(2)

    def split_heads(self, q, k, v):
        """Clipped and normalized: q (B, H, T, Dh), k and v (B, K, T, Dh)."""
        config = self.config
        if config.clip_qkv:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        if config.qk_norm == "width":
            q = self.q_norm(q)
            k = self.k_norm(k)
        Dh = config.head_dim            # they may be (B, T, H or K, Dh) already
        q, k, v = (t.unflatten(-1, (-1, Dh)).flatten(2, -2) for t in (q, k, v))
        if config.qk_norm == "head":
            q = self.q_norm(q)
            k = self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def rotate(self, x, ctx: ForwardContext):
        return rotate(x, *self.rope_of(ctx), self.config.rotary_pairs)

    def rope_of(self, ctx: ForwardContext):
        """cos and sin of this layer."""
        has_own = ctx.window_rope is not None and self.config.windows[self.layer]
        return ctx.window_rope if has_own else ctx.rope


# ---- MLP and block ------------------------------------------------------------------------------


class MLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6); ungated: down(act(up(x)))."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        D, bias = config.hidden_size, config.mlp_bias
        self.fused = config.fused_gate_up
        if self.fused:
            self.gate_up_proj = nn.Linear(D, 2 * width, bias=bias)
        elif not config.ungated_mlp:
            self.gate_proj = nn.Linear(D, width, bias=bias)
        if not self.fused:
            self.up_proj = nn.Linear(D, width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def readers(self) -> list[nn.Module]:
        """The linear layers that read x: of gate and up, one for both, or of up alone."""
        names = ("gate_up_proj", "gate_proj", "up_proj")
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def forward(self, x, ctx: ForwardContext | None = None):
        """(…, D) -> (…, D)."""
        return self.down_proj(self.activate(*[layer(x) for layer in self.readers()]))

    def activate(self, *outputs):
        """The outputs of `readers` -> the input of down_proj, (…, I)."""
        return self.gated(*outputs[0].chunk(2, dim=-1) if self.fused else outputs)

    def gated(self, gate, up=None):
        return self.act(gate) if up is None else self.act(gate) * up


# the halves of a block, by config.mixers and config.sparse; None: the block lacks it
MIXERS = {"attention": ("self_attn", Attention), "none": ("self_attn", None), **OTHER_MIXERS}
MLPS = {True: lambda config: MoE(config, MLP), None: lambda config: None,
        False: lambda config: MLP(config, config.intermediate_size)}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); norms before, after, or on both sides.

    The mixer is attention, or another layer that reads earlier tokens. Either half may be absent.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()

        def norm(place, half):
            if half is None or config.norm_place not in (place, "both"):
                return nn.Identity()
            return NORMS[config.norm](config.hidden_size, config.rms_norm_eps)

        self.config = config
        self.mixer_name, mixer = MIXERS[config.mixers[layer]]
        mlp = MLPS[config.sparse[layer]](config)
        self.input_layernorm = norm("before", mixer)
        self.add_module(self.mixer_name, mixer and mixer(config, layer, NORMS[config.norm]))
        self.after_attention_norm = norm("after", mixer)
        # Llama's name: it is before the MLP
        self.post_attention_layernorm = norm("before", None if config.parallel_mlp else mlp)
        self.mlp = mlp
        self.after_mlp_norm = norm("after", mlp)

    def forward(self, x, ctx: ForwardContext):
        """(B, T, D) -> (B, T, D)."""
        if self.mixer is None:
            return self.add_mlp(x, ctx)
        h = self.attention_branch(x, ctx)
        if self.mlp is None:
            return x + h
        if self.config.parallel_mlp:
            return self.add_mlp(x, ctx) + h
        return self.add_mlp(x + h, ctx)

    def attention_branch(self, x, ctx: ForwardContext):
        """The mixer's output, added to x."""
        return self.scaled(self.after_attention_norm(self.mixer(self.input_layernorm(x), ctx)))

    def add_mlp(self, x, ctx: ForwardContext):
        h = self.mlp(self.mlp_norm(x), ctx)
        return x + self.scaled(self.after_mlp_norm(h))

    @property
    def mixer(self) -> Mixer | None:
        """Attention, or what this block has instead."""
        return getattr(self, self.mixer_name)

    @property
    def mlp_norm(self):
        """The norm in front of the MLP."""
        return self.input_layernorm if self.config.parallel_mlp else self.post_attention_layernorm

    def scaled(self, branch):
        scale = self.config.residual_scale
        return branch if scale == 1 else branch * scale


# ---- decoder and head ---------------------------------------------------------------------------


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # not nn.Embedding(V, D): drawing its weights on the meta device imports the compiler, 0.7 s
        weight = torch.empty(config.vocab_size, config.hidden_size)
        pad = config.pad_token_id if config.pad_token_id in range(config.vocab_size) else None
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=pad)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)


class NormalizedHead(nn.Module):
    """A head whose rows are normalized when they are used (arXiv:2309.10305, sec. 2.5)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def effective_weight(self):
        return F.normalize(self.weight)

    def forward(self, x):
        return F.linear(x, self.effective_weight())


class CausalLM(nn.Module):
    """Decoder and head. `kernel`, a name from attention.py, may be set at any time."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.kernel = "plain"
        self.model = Decoder(config)
        if config.normalized_head:
            self.lm_head = NormalizedHead(config)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def requires_grad_(self, requires_grad: bool = True):
        """As of any module, but constants stay constants."""
        super().requires_grad_(requires_grad)
        for name, p in self.named_parameters():
            if is_constant(name):
                p.requires_grad = False
        return self

    def forward(self, input_ids, position_ids=None, layout: PackedLayout | None = None,
                cache: "KVCache | None" = None, routers: list | None = None):
        """Hidden states after the final norm, as the head reads them, (B, T, D).

        input_ids, position_ids: (B, T) int64; without positions, they continue the cache or start
        at 0. layout: sequence boundaries in a row that holds several (B is 1 then). routers: a list
        that collects the router logits (N, E) of each layer with experts.
        """
        if position_ids is None:
            start = cache.length if cache is not None else 0
            end = start + input_ids.shape[1]
            position_ids = torch.arange(start, end, device=input_ids.device)[None]  # (1, T)
        x = self.embed(input_ids)                                                   # (B, T, D)
        ctx = self.context(position_ids, x, layout, cache, routers)
        for block in self.model.layers:
            x = block(x, ctx)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.for_head(self.model.norm(x))

    def for_head(self, x):
        """Normalized hidden states, times the factor of the logits."""
        scale = self.config.logit_scale
        return x if scale == 1 else x * scale

    def embed(self, input_ids):
        """(B, T) -> (B, T, D)."""
        embedding = self.model.embed_tokens
        x = embedding(input_ids)
        if self.config.embed_scale != 1:    # rounded to the weights' dtype, as in training
            scale = torch.tensor(self.config.embed_scale, dtype=embedding.weight.dtype)
            x = x * scale.item()
        return x

    def context(self, position_ids, x, layout, cache, routers) -> ForwardContext:
        """What all layers share: positions in their various forms, cache and kernel."""
        config = self.config
        length = length_for_rope(config, position_ids, cache, self.training)
        if cache is not None and not cache.length:
            cache.first_length = length
        rope, window_rope, slopes = None, None, None
        if config.alibi:
            slopes = torch.tensor(alibi_slopes(config.num_attention_heads), device=x.device)
        else:
            rope = rope_table(config, position_ids, x.dtype, length)
            window_rope = window_rope_table(config, position_ids, x.dtype)
        return ForwardContext(
            rope=rope,
            window_rope=window_rope,
            slopes=slopes,
            temperature=attn_temperature(config, position_ids, self.training),
            layout=layout,
            cache=cache,
            kernel=self.kernel,
            routers=routers,
        )

    def logits(self, hidden):
        """Scores over the vocabulary, (…, D) -> (…, V), in the weights' dtype."""
        return softcap(self.lm_head(hidden), self.config.final_softcap)

    def head_weight(self):
        """The matrix (V, D) of the head; gradients flow to what it is computed from."""
        head = self.lm_head
        return head.effective_weight() if hasattr(head, "effective_weight") else head.weight


def is_constant(name: str) -> bool:
    """Whether a parameter is one that is never trained, and float32 in any model."""
    return name.endswith(".selection_bias")


def softcap(scores, cap: float | None):
    """cap * tanh(scores / cap): a smooth limit (arXiv:2408.00118, sec. 2)."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def attention_needs(config: ModelConfig) -> dict:
    """The arguments of attention_picker.pick_kernel that describe a decoder."""
    return {
        "head_dim": config.head_dim,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "window": next((window for window in config.windows if window), None),
        "chunk": next((chunk for chunk in config.chunks if chunk), None),
        "softcap": config.attn_softcap,
        "alibi": config.alibi,
        "sinks": config.attn_sinks,
        "scale": config.attn_scale,
    }


# ---- cache and fresh weights --------------------------------------------------------------------


class KVCache:
    """Keys, values and states of earlier tokens.

    Attention: keys and values, a pair of growing buffers (B, K, room, Dh) per layer. Mixers with a
    state of fixed size (layers.StateMixer): that state after the last token.
    """

    filled = None       # which slots count, where Python does not know the length (fast/decode.py)

    def __init__(self, num_layers: int):
        self.buffers = [None] * num_layers
        self.states = {}                # {layer: a tuple of tensors (B, …)}
        self.length = 0                 # tokens stored before this pass
        self.first_length = 0           # of the first forward pass, see length_for_rope

    def update(self, layer: int, k, v):
        """Append k, v (B, K, T, Dh) of one layer; return all of that layer, (B, K, S, Dh)."""
        end = self.length + k.shape[2]
        buffers = self.buffers[layer]
        if buffers is None or buffers[0].shape[2] < end:
            buffers = self.buffers[layer] = self.grown(buffers, k, max(64, 2 * end))
        buffers[0][:, :, self.length:end] = k
        buffers[1][:, :, self.length:end] = v
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def grown(self, buffers, like, room: int):
        """Larger copies of a layer's buffers; shape, dtype and device as of `like`."""
        B, K, _, Dh = like.shape
        pair = [like.new_zeros(B, K, room, Dh) for _ in range(2)]
        for new, old in zip(pair, buffers or ()):
            new[:, :, :self.length] = old[:, :, :self.length]
        return pair

    def state(self, layer: int):
        """The state of a layer after the last token; None before the first."""
        return self.states.get(layer)

    def keep_state(self, layer: int, state: tuple):
        """Store the state of a layer after this pass."""
        self.states[layer] = state

    def advance(self, tokens: int):
        """Count the tokens that every layer has stored in this pass."""
        self.length += tokens

    def crop(self, length: int):
        """Keep only the first `length` tokens; none if a layer has a state: it cannot go back."""
        if self.states and length < self.length:
            self.states = {}
            length = 0
        self.length = min(self.length, length)


@torch.no_grad()
def init_weights(model: CausalLM, generator: torch.Generator):
    """Fresh weights for train_from_scratch.

    normal(0, initializer_range) for matrices, zero biases, norms that change nothing; decays of a
    state as in transformers 5. Drawn in the order of the parameters, so the same seed gives the
    same model everywhere.
    """
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.uniform_(0.01, 16, generator=generator).log_()
        elif name.endswith("dt_bias"):
            weight.fill_(1.0)
        elif name.endswith("bias"):
            weight.zero_()
        elif weight.dim() == 1 and not name.endswith("sinks"):
            owner = model.get_submodule(name.rpartition(".")[0])
            weight.fill_(1.0 - getattr(owner, "offset", 0.0))
        else:
            weight.normal_(0.0, model.config.initializer_range, generator=generator)
