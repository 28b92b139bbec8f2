"""Layers that some blocks have instead of Llama's: latent attention, mixtures of experts.

A block (model.py) calls its attention layer, of whatever kind, as self_attn(x, ctx), and its MLP or
mixture of experts as mlp(x, ctx). Attention layers of any kind have the same three parts:

    readers()           the linear layers that read the block's input
    mix(outputs, ctx)   from their outputs to the input of the last linear layer, o_proj
    o_proj              the last linear layer

so that fast/fused_block.py computes the linear layers of all of them in one way.

Requires: families.py, rope.py, attention.py.
Next: model.py.
Papers: mixture of experts arXiv:2101.03961, latent attention arXiv:2405.04434 (sec. 2.1), the
choice of experts from groups arXiv:2405.04434 (sec. 2.2.2), and with a bias arXiv:2412.19437
(sec. 2.1.2).
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from attention import attend
from families import ModelConfig
from rope import rotate

ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


# ---- latent attention ---------------------------------------------------------------------------


class LatentAttention(nn.Module):
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

    def forward(self, x, ctx):
        """(B, T, D) -> (B, T, D)."""
        return self.o_proj(self.mix([layer(x) for layer in self.readers()], ctx))

    def mix(self, outputs, ctx):
        """The outputs of `readers`, (B, T, …) -> the heads' outputs, (B, T, H*v_head_dim)."""
        config = self.config
        q, latent = outputs
        if config.q_lora_rank:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = self.rotate_end(q.unflatten(-1, (-1, config.head_dim)).transpose(1, 2), ctx)
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


# ---- mixture of experts -------------------------------------------------------------------------


class StackedLinear(nn.Module):
    """E linear maps in one tensor (E, in, out), as some checkpoints store them."""

    def __init__(self, experts: int, size_in: int, size_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size_in, size_out))
        self.bias = nn.Parameter(torch.empty(experts, size_out)) if bias else None

    def forward(self, x, expert: int):
        y = x @ self.weight[expert]
        if self.bias is None:
            return y
        return y + self.bias[expert].to(y.dtype)        # under autocast the product is 16 bits


class StackedExperts(nn.Module):
    """All experts of a layer in two tensors; gate and up are fused."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.config = config
        self.gate_up_proj = StackedLinear(E, D, 2 * width, config.expert_bias)
        self.down_proj = StackedLinear(E, width, D, config.expert_bias)
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
