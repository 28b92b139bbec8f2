"""The decoder: norms, rotary positions, grouped-query attention, SwiGLU, mixture of experts, KV cache.

    python -m checkpoint.show DIR          prints the decoder of a checkpoint: blocks, shapes, parameters, bytes

It is a Llama with switches (families.py): each `if config.…` below is a difference some family makes, and none of
them asks for a family's name. Read it once with all switches off, and it is Llama.

Read before: families.py (what differs between families). Read after: attention.py (the product itself), lora.py.
Papers: Llama arXiv:2302.13971, RMSNorm arXiv:1910.07467, RoPE arXiv:2104.09864, GQA arXiv:2305.13245,
SwiGLU arXiv:2002.05202, YaRN arXiv:2309.00071, LongRoPE arXiv:2402.13753, ALiBi arXiv:2108.12409,
mixture of experts arXiv:2101.03961.

Letters for shapes, the same in every file:

    B batch   T query length   S key length   D hidden_size   H query heads   K key/value heads
    Dh head_dim   R rotated features of a head   F ffn width   V vocabulary   E experts   k experts per token
    r LoRA rank   N = B*T tokens

Parameters carry the names they have in a Llama checkpoint (`model.layers.0.self_attn.q_proj.weight`); what a family
calls otherwise is a renaming (ModelConfig.stored_name), and nothing is ever converted.
"""
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import Layout, attend
from families import ModelConfig
from fast.fused_block import linears, same
from rope import alibi_slopes, attn_temperature, length_for_rope, rope_table, rotate

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu,
               "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


# ---- norms ------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean of squares in float32 whatever the input's dtype (arXiv:1910.07467, eq. 4).

    offset: the file stores weight - offset. wide: the weight, too, multiplies in float32, before the rounding to the
    input's dtype; it matters in 16 bits only.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, wide: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset, self.wide = eps, offset, wide

    def forward(self, x):
        return self.compute(x, self.weight, self.eps, self.offset, self.wide)

    @staticmethod
    def compute(x, weight, eps, offset, wide):
        h = unit_rms(x.float(), eps)
        if wide:
            return ((offset + weight.float()) * h).to(x.dtype)
        return weight * h.to(x.dtype)


def unit_rms(x, eps):
    """x / rms(x) over the last dimension; x float32."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)         # x * rsqrt(mean(x * x) + eps), on a GPU in one kernel


class LayerNorm(nn.Module):
    """(x - mean) / std, without weights (arXiv:2402.00838, sec. 2.1); eps is 1e-5 there, and not in config.json."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size = size

    def forward(self, x):
        return F.layer_norm(x.float(), (self.size,), eps=1e-5).to(x.dtype)


NORMS = {"rms": RMSNorm, "rms wide": partial(RMSNorm, wide=True), "rms+1": partial(RMSNorm, offset=1.0, wide=True),
         "layer": LayerNorm}


# ---- the block --------------------------------------------------------------------------------------------------


@dataclass
class ForwardContext:
    """Where the tokens of a forward pass stand; the same for all layers."""
    rope: tuple | None                    # cos and sin, (B, 1, T, R)
    slopes: torch.Tensor | None           # ALiBi, (H,)
    growth: torch.Tensor | None           # of queries, (B, 1, T, 1)
    layout: Layout | None
    cache: "KVCache | None"
    kernel: str
    product: str = "plain"                # a name from fast/fused_block.py
    again: bool = False                   # gate and up of the MLP are computed again in the backward pass
    routers: list | None = None           # receives the router's logits (N, E) of a block with experts


class Attention(nn.Module):
    """Grouped-query self-attention: H query heads share K key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.layer, self.use_rope = config, layer, config.use_rope[layer] and not config.alibi
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(D, (H + 2 * K) * Dh, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(D, H * Dh, bias=config.qkv_bias)
            self.k_proj = nn.Linear(D, K * Dh, bias=config.qkv_bias)
            self.v_proj = nn.Linear(D, K * Dh, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * Dh, D, bias=config.o_bias)
        if config.qk_norm in ("head", "width"):
            heads = (1, 1) if config.qk_norm == "head" else (H, K)                 # normed together
            self.q_norm, self.k_norm = (NORMS[config.norm](n * Dh, config.rms_norm_eps) for n in heads)

    turn = staticmethod(rotate)

    def project(self, x, norm, product):
        """q (B, T, H, Dh), k and v (B, T, K, Dh) of norm(x)."""
        config = self.config
        H, K, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.fused_qkv == "groups":
            qkv, = linears([self.qkv_proj], x, before=norm, how=product)
            grouped = qkv.unflatten(-1, (K, H // K + 2, Dh))                       # (B, T, K, H/K + 2, Dh)
            q, k, v = grouped[..., :-2, :].flatten(-2), grouped[..., -2, :], grouped[..., -1, :]
        elif config.fused_qkv:
            qkv, = linears([self.qkv_proj], x, before=norm, how=product)
            q, k, v = qkv.split((H * Dh, K * Dh, K * Dh), dim=-1)
        else:
            q, k, v = linears([self.q_proj, self.k_proj, self.v_proj], x, before=norm, how=product)
        if config.clip_qkv:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        if config.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.reshape(*x.shape[:2], -1, Dh) for t in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x, norm, place: ForwardContext):
        """Attention of norm(x), (B, T, D) -> (B, T, D)."""
        config = self.config
        q, k, v = (t.transpose(1, 2) for t in self.project(x, norm, place.product))      # (B, H or K, T, Dh)
        if self.use_rope:
            q, k = (self.turn(t, *place.rope, config.rotary_pairs) for t in (q, k))
            if config.qk_norm == "unit":
                q, k = (unit_rms(t.float(), config.rms_norm_eps).to(t.dtype) for t in (q, k))
        if place.growth is not None and not (self.use_rope and config.attn_temperature[0] == "log1p"):
            q = (q * place.growth).to(q.dtype)
        if place.cache is not None:
            k, v = place.cache.update(self.layer, k, v)                                      # (B, K, S, Dh)
        out = attend(q, k, v, kernel=place.kernel, layout=place.layout, scale=config.attn_scale, slopes=place.slopes,
                     window=config.windows[self.layer], chunk=config.chunks[self.layer], softcap=config.attn_softcap,
                     filled=place.cache.filled if place.cache else None)                     # (B, H, T, Dh)
        return linears([self.o_proj], out.transpose(1, 2).flatten(2), how=place.product)[0]


class MLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        D, bias = config.hidden_size, config.mlp_bias
        if config.fused_gate_up:
            self.gate_up_proj = nn.Linear(D, 2 * width, bias=bias)
        else:
            self.gate_proj = nn.Linear(D, width, bias=bias)
            self.up_proj = nn.Linear(D, width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)
        self.act, self.fused = ACTIVATIONS[config.hidden_act], config.fused_gate_up

    def forward(self, x, norm=same, product: str = "plain", again: bool = False):
        """MLP of norm(x), (…, D) -> (…, D). Kept for the backward pass are x, gate and up, or, with `again`, x alone."""
        first = [self.gate_up_proj] if self.fused else [self.gate_proj, self.up_proj]

        def widen(x):
            return linears(first, x, before=norm, how=product)

        if again:
            return linears([self.down_proj], x, before=lambda x: self.gated(*widen(x)), owners=(norm, *first),
                           how=product)[0]
        return linears([self.down_proj], *widen(x), before=self.gated, how=product)[0]

    def gated(self, gate, up=None):
        """act(gate) * up, (…, F); up None: the two lie side by side in `gate`."""
        return self.compute(*(gate.chunk(2, dim=-1) if up is None else (gate, up)), self.act)

    @staticmethod
    def compute(gate, up, act):
        return act(gate) * up


class Block(nn.Module):
    """Residual block: x + attention(norm(x)), then x + mlp(norm(x)); norms stand before, after, or on both sides."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()

        def norm(place):
            here = config.norm_place in (place, "both")
            return NORMS[config.norm](config.hidden_size, config.rms_norm_eps) if here else nn.Identity()

        self.input_layernorm = norm("before")
        self.self_attn = Attention(config, layer)
        self.after_attention_norm = norm("after")
        self.post_attention_layernorm = norm("before")           # Llama's name: it stands before the MLP
        self.mlp = MoE(config) if config.sparse[layer] else MLP(config, config.intermediate_size)
        self.after_mlp_norm = norm("after")

    def forward(self, x, place: ForwardContext):
        x = x + self.after_attention_norm(self.self_attn(x, self.input_layernorm, place))
        if isinstance(self.mlp, MoE):
            h = self.mlp(self.post_attention_layernorm(x), place)
        else:
            h = self.mlp(x, self.post_attention_layernorm, place.product, place.again)
        return x + self.after_mlp_norm(h)


# ---- mixture of experts -----------------------------------------------------------------------------------------


class StackedLinear(nn.Module):
    """E linear maps in one tensor (E, in, out), as some checkpoints store them; called with the number of one."""

    def __init__(self, experts: int, size_in: int, size_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size_in, size_out))

    def forward(self, x, expert: int):
        return x @ self.weight[expert]


class StackedExperts(nn.Module):
    """All experts of a layer in two tensors; gate and up are fused."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = StackedLinear(E, D, 2 * width)
        self.down_proj = StackedLinear(E, width, D)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x, expert: int):
        gate, up = self.gate_up_proj(x, expert).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up, expert)


class MoE(nn.Module):
    """Each token passes the k of E experts that its router scores highest, and the shared expert if there is one.

    `grouped` computes the experts' sum by experts, `one_by_one`, its readable twin, by tokens. visited: None, or a set:
    then experts without a token run too, on no rows, so that all have gradients, and it collects the others' numbers.
    """

    visited: set | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)            # the router
        if config.stacked_experts:
            self.experts = StackedExperts(config)
        else:
            self.experts = nn.ModuleList(MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def route(self, scores):
        """Router logits (N, E) -> the chosen experts and their weights, both (N, k)."""
        config = self.config
        if config.router == "softmax":
            weights, chosen = scores.softmax(-1, dtype=torch.float32).topk(config.num_experts_per_tok)
        else:
            weights, chosen = scores.topk(config.num_experts_per_tok)
            weights = weights.float().sigmoid()
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights.to(scores.dtype)

    def expert(self, x, number: int, **how):
        """One expert on x (n, D) -> (n, D). how: see MLP."""
        return self.experts(x, number) if self.config.stacked_experts else self.experts[number](x, **how)

    def forward(self, x, place: ForwardContext):
        """x (B, T, D) -> (B, T, D). The router's logits (N, E) are appended to place.routers, for the balance loss."""
        rows = x.flatten(0, 1)                                                               # (N, D)
        scores = self.gate(rows)                                                             # (N, E)
        if place.routers is not None:
            place.routers.append(scores)
        how = {"product": place.product, "again": place.again}
        y = grouped(rows, *self.route(scores), partial(self.expert, **how), self.config.num_experts,
                    self.config.scale_input, self.visited)
        if self.config.shared_expert_intermediate_size:
            shared = self.shared_expert(rows, **how)
            y = y + (self.shared_expert_gate(rows).sigmoid() * shared if self.config.shared_expert_gate else shared)
        return y.view_as(x)


def grouped(x, chosen, weights, expert, num_experts: int, scale_input: bool, visited: set | None = None):
    """Sum over the chosen experts, (N, D): tokens are sorted by expert, and each expert runs once on all of its own.

    x (N, D); chosen, weights (N, k); expert(rows, number) -> rows; scale_input: the weight multiplies what goes in.
    """
    k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)                                            # (N*k,) slots by expert
    counts = chosen.flatten().bincount(minlength=num_experts).tolist()                       # waits for the device
    rows, factor = x[order // k], weights.flatten()[order][:, None]
    rows = rows * factor if scale_input else rows
    if visited is not None:
        visited.update(number for number, count in enumerate(counts) if count)
    out = torch.cat([expert(part, number) for number, part in enumerate(rows.split(counts))
                     if len(part) or visited is not None])
    out = out if scale_input else out * factor
    return out[order.argsort()].view(*chosen.shape, -1).sum(1)                               # back in the slots' order


def one_by_one(x, chosen, weights, expert, num_experts: int, scale_input: bool):
    """The slow twin of `grouped`: token by token, expert by expert."""
    sums = []
    for token, row in enumerate(x):
        parts = []
        for number, weight in zip(chosen[token].tolist(), weights[token]):
            y = expert((row * weight if scale_input else row)[None], number)[0]
            parts.append(y if scale_input else y * weight)
        sums.append(torch.stack(parts).sum(0))
    return torch.stack(sums)


# ---- the whole --------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # not nn.Embedding(V, D): drawing its weights on the meta device imports the compiler, 0.7 s at every start
        weight = torch.empty(config.vocab_size, config.hidden_size)
        pad = config.pad_token_id if config.pad_token_id in range(config.vocab_size) else None
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=pad)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)


class NormalizedHead(nn.Module):
    """A head whose rows count with length 1 (arXiv:2309.10305, sec. 2.5); the file holds them as they are."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def effective_weight(self):
        return F.normalize(self.weight)

    def forward(self, x):
        return F.linear(x, self.effective_weight())


def attention_needs(config: ModelConfig) -> dict:
    """What attention.pick_kernel has to know of a decoder."""
    return {"head_dim": config.head_dim, "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads, "window": next((w for w in config.windows if w), None),
            "chunk": next((c for c in config.chunks if c), None), "softcap": config.attn_softcap, "alibi": config.alibi,
            "scale": config.attn_scale}


# what a block recomputes in the backward pass, from fast to small: only its cheap steps (see fast/fused_block.py);
# the matmuls of gate and up as well; everything, from its input alone (activation checkpointing)
RECOMPUTE = ("none", "mlp", "block")


class CausalLM(nn.Module):
    """Decoder and head. Three attributes say how it computes, and may be set at any time: `kernel`, a name from
    attention.py; `product`, one from fast/fused_block.py; `recompute`, for each block a name from RECOMPUTE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.kernel = "plain"
        self.product = "plain"
        self.recompute = ["none"] * config.num_hidden_layers
        self.model = Decoder(config)
        self.lm_head = NormalizedHead(config) if config.normalized_head else \
            nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, position_ids=None, layout: Layout | None = None, cache: "KVCache | None" = None,
                routers: list | None = None):
        """Hidden states after the final norm, (B, T, D).

        input_ids, position_ids: (B, T) int64; positions continue the cache, or count from 0, when not given.
        layout: where sequences begin and end in a row that holds several (B is 1 then); attention keeps them apart.
        routers: a list that receives the router logits (N, E) of each layer with experts.
        """
        config = self.config
        if position_ids is None:
            start = cache.length if cache is not None else 0
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]    # (1, T)
        x = self.model.embed_tokens(input_ids)                                               # (B, T, D)
        if config.embed_scale:          # rounded to the weights' dtype first, as such models were trained
            x = x * torch.tensor(config.hidden_size ** 0.5, dtype=self.model.embed_tokens.weight.dtype).item()
        length = length_for_rope(config, position_ids, cache, self.training)
        if cache is not None and not cache.length:
            cache.first_length = length
        place = ForwardContext(rope=None if config.alibi else rope_table(config, position_ids, x.dtype, length),
                      slopes=torch.tensor(alibi_slopes(config.num_attention_heads), device=x.device)
                      if config.alibi else None, growth=attn_temperature(config, position_ids, self.training),
                      layout=layout, cache=cache, kernel=self.kernel, product=self.product)
        for block, level in zip(self.model.layers, self.recompute):
            here = replace(place, again=level == "mlp")
            if level == "block" and torch.is_grad_enabled():
                x, *scores = checkpoint(run_block, block, x, here, routers is not None, use_reentrant=False)
            else:
                x, *scores = run_block(block, x, here, routers is not None)
            if routers is not None:
                routers += scores
        return self.model.norm(x)

    def logits(self, hidden):
        """Scores over the vocabulary, (…, D) -> (…, V), in the weights' dtype."""
        return softcap(self.lm_head(hidden), self.config.final_softcap)

    def head_weight(self):
        """The matrix (V, D) whose product with the hidden states is scored; gradients flow to what it is made of."""
        head = self.lm_head
        return head.effective_weight() if hasattr(head, "effective_weight") else head.weight


def run_block(block, x, place, with_scores: bool):
    """(x after the block, the router's logits if there are any and they are wanted): a function of its inputs alone,
    which is what recomputing it in the backward pass asks for."""
    scores = [] if with_scores else None
    return block(x, replace(place, routers=scores)), *(scores or ())


def softcap(scores, cap: float | None):
    """cap * tanh(scores / cap): keeps scores within the cap, smoothly (arXiv:2408.00118, sec. 2)."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


# ---- the cheap steps, compiled ----------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens seen so far, one pair of growing buffers (B, K, room, Dh) per layer."""

    filled = None                       # how much of the buffers counts, where the length is no fact for Python; fast/decode.py

    def __init__(self, num_layers: int):
        self.buffers = [None] * num_layers
        self.length = 0                 # tokens stored, the same for all layers between two forward passes
        self.first_length = 0           # of the first forward pass, see length_for_rope

    def update(self, layer: int, k, v):
        """Append k, v (B, K, T, Dh) of one layer; return all of that layer, (B, K, S, Dh)."""
        end = self.length + k.shape[2]
        held = self.buffers[layer]
        if held is None or held[0].shape[2] < end:
            held = self.buffers[layer] = self.grown(held, k, max(64, 2 * end))
        held[0][:, :, self.length:end] = k
        held[1][:, :, self.length:end] = v
        if layer == len(self.buffers) - 1:
            self.length = end
        return held[0][:, :, :end], held[1][:, :, :end]

    def grown(self, held, like, room: int):
        """A pair of larger buffers with what the old ones held; shape, dtype and device are those of `like`."""
        B, K, _, Dh = like.shape
        pair = [like.new_zeros(B, K, room, Dh) for _ in range(2)]
        for new, old in zip(pair, held or ()):
            new[:, :, :self.length] = old[:, :, :self.length]
        return pair

    def crop(self, length: int):
        """Forget all but the first `length` tokens (chat.py keeps the part of the conversation that is unchanged)."""
        self.length = min(self.length, length)


def init_weights(model: CausalLM, generator: torch.Generator):
    """Fresh weights for train_from_scratch: normal(0, initializer_range) for matrices, zero biases, norms that do
    nothing yet.

    Drawn in the order of the parameters from `generator`, so the same seed gives the same model anywhere.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(0.0 if model.config.norm == "rms+1" else 1.0)
            else:
                weight.normal_(0.0, model.config.initializer_range, generator=generator)
