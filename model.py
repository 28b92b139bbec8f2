"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, and the KV cache. One file, one forward pass.

    python model.py DIR          prints the decoder of a checkpoint: blocks, shapes, parameters, bytes

Read before: families.py (what differs between families). Read after: attention.py (the product itself), lora.py.
Papers: Llama arXiv:2302.13971, RMSNorm arXiv:1910.07467, RoPE arXiv:2104.09864, GQA arXiv:2305.13245,
SwiGLU arXiv:2002.05202, YaRN arXiv:2309.00071.

Letters for shapes, the same in every file:

    B batch   T query length   S key length   D hidden_size   H query heads   K key/value heads
    Dh head_dim   F ffn width   V vocabulary   r LoRA rank   N = B*T tokens

Parameters carry the names they have in the checkpoint (`model.layers.0.self_attn.q_proj.weight`), so loading is a
copy by name and nothing is ever converted.
"""
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import Layout, attend
from families import ModelConfig, model_config, read_config_json


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean of squares in float32 whatever the input's dtype (arXiv:1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


# ---- rotary positions -------------------------------------------------------------------------------------------


def rope_frequencies(config: ModelConfig, length: int, device=None) -> tuple[torch.Tensor, float]:
    """Angular speed of each feature pair in radians per token, (Dh/2,) float32, and a factor for cos and sin.

    `length` is the longest sequence of this forward pass in tokens; only the dynamic kind depends on it.
    Kinds: default, linear (arXiv:2306.15595), dynamic (NTK by parts of the base), yarn (arXiv:2309.00071),
    llama3 (the Llama 3.1 model card).
    """
    rope, dim, base = config.rope, config.head_dim, config.rope_theta
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "dynamic":
        trained = config.max_position_embeddings
        base *= (factor * max(length, trained) / trained - (factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    speed = 1.0 / base ** exponents                                                          # (Dh/2,)
    if kind == "linear":
        speed = speed / factor
    elif kind == "llama3":
        # waves longer than the trained length are slowed by `factor`, short ones kept, those between blended
        turns = rope["original_max_position_embeddings"] * speed / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        speed = keep * speed + (1 - keep) * speed / factor
    elif kind == "yarn":
        return _yarn(rope, speed, dim, base)
    return speed, 1.0


def _yarn(rope, speed, dim, base):
    """NTK-by-parts (arXiv:2309.00071, sec. 3.2) and the attention temperature (sec. 3.4) as a factor on cos and sin."""
    factor, trained = rope["factor"], rope["original_max_position_embeddings"]

    def pair_with(turns):          # index of the feature pair that makes this many turns over the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=speed.device) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)                                                              # (Dh/2,) 1 = unscaled
    speed = keep * speed + (1 - keep) * speed / factor

    def temperature(weight=1.0):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return speed, temperature() if scale is None else scale


def rope_table(config: ModelConfig, position_ids, dtype):
    """cos and sin for each position: two (B, 1, T, Dh) tensors in `dtype`, computed in float32."""
    length = int(position_ids.max()) + 1 if config.rope["rope_type"] == "dynamic" else 0
    speed, scale = rope_frequencies(config, length, position_ids.device)
    angle = position_ids[:, None, :, None].float() * speed                                   # (B, 1, T, Dh/2)
    angle = torch.cat((angle, angle), dim=-1)                                                # (B, 1, T, Dh)
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rotate(x, cos, sin):
    """Turn feature pairs (i, i + Dh/2) of x (B, H, T, Dh) by their angles (arXiv:2104.09864, eq. 34, half-split)."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)       # autocast hands in 16-bit x, float32 cos


# ---- the block --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query self-attention: H query heads share K key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.layer, self.window = Dh, layer, config.windows[layer]
        self.q_proj = nn.Linear(D, H * Dh, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * Dh, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * Dh, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * Dh, D, bias=config.o_bias)
        self.q_norm = RMSNorm(Dh, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(Dh, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, layout, cache, kernel):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)        # (B, H, T, Dh)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)        # (B, K, T, Dh)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)                     # (B, K, T, Dh)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                                            # (B, K, S, Dh)
        out = attend(q, k, v, kernel=kernel, layout=layout, window=self.window)              # (B, H, T, Dh)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, ffn, bias=bias)
        self.up_proj = nn.Linear(D, ffn, bias=bias)
        self.down_proj = nn.Linear(ffn, D, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, layout, cache, kernel):
        x = x + self.self_attn(self.input_layernorm(x), rope, layout, cache, kernel)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # not nn.Embedding(V, D): drawing its weights on the meta device imports the compiler, 0.7 s at every start
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """Decoder and head. Attributes `kernel` (a name from attention.py) and `recompute` may be set at any time."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.kernel = "plain"
        self.recompute = False          # gradient checkpointing: keep block inputs only, run each block twice
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, position_ids=None, layout: Layout | None = None, cache: "KVCache | None" = None):
        """Hidden states after the final norm, (B, T, D).

        input_ids, position_ids: (B, T) int64; positions continue the cache, or count from 0, when not given.
        layout: where sequences begin and end in a row that holds several (B is 1 then); attention keeps them apart.
        """
        if position_ids is None:
            start = cache.length if cache is not None else 0
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]    # (1, T)
        x = self.model.embed_tokens(input_ids)                                               # (B, T, D)
        rope = rope_table(self.config, position_ids, x.dtype)
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, layout, cache, self.kernel, use_reentrant=False)
            else:
                x = block(x, rope, layout, cache, self.kernel)
        return self.model.norm(x)

    def logits(self, hidden):
        """Scores over the vocabulary, (…, D) -> (…, V), in the weights' dtype."""
        return self.lm_head(hidden)


class KVCache:
    """Keys and values of the tokens seen so far, one pair of growing buffers per layer."""

    def __init__(self, num_layers: int):
        self.buffers = [None] * num_layers
        self.length = 0                 # tokens stored, the same for all layers between two forward passes

    def update(self, layer: int, k, v):
        """Append k, v (B, K, T, Dh) of one layer; return all of that layer, (B, K, S, Dh)."""
        end = self.length + k.shape[2]
        held = self.buffers[layer]
        if held is None or held[0].shape[2] < end:
            B, K, _, Dh = k.shape
            grown = [k.new_empty(B, K, max(64, 2 * end), Dh) for _ in range(2)]
            if held is not None:
                for new, old in zip(grown, held):
                    new[:, :, :self.length] = old[:, :, :self.length]
            self.buffers[layer] = held = grown
        held[0][:, :, self.length:end] = k
        held[1][:, :, self.length:end] = v
        if layer == len(self.buffers) - 1:
            self.length = end
        return held[0][:, :, :end], held[1][:, :, :end]

    def crop(self, length: int):
        """Forget all but the first `length` tokens (chat.py keeps the part of the conversation that is unchanged)."""
        self.length = min(self.length, length)


def init_weights(model: CausalLM, generator: torch.Generator):
    """Fresh weights for train_from_scratch: normal(0, initializer_range) for matrices, zero biases, unit norms.

    Drawn in the order of the parameters from `generator`, so the same seed gives the same model anywhere.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, model.config.initializer_range, generator=generator)


# ---- python model.py DIR ----------------------------------------------------------------------------------------


def draw(config: ModelConfig) -> str:
    """The decoder as a short text. Built on the meta device: no memory, no weights read."""
    with torch.device("meta"):
        model = CausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    lines = [f"{config.model_type}: {config.num_hidden_layers} blocks, {count:,} parameters, "
             f"{2 * count / 2**30:.2f} GiB in 16 bit, {4 * count / 2**30:.2f} GiB in float32"]
    rows = [("model.embed_tokens", model.model.embed_tokens)]
    rows += [(f"model.layers.*.{name}", module) for name, module in model.model.layers[0].named_modules()
             if any(True for _ in module.parameters(recurse=False))]
    rows += [("model.norm", model.model.norm), ("lm_head", model.lm_head)]
    for name, module in rows:
        shape = " x ".join(map(str, module.weight.shape)) + (" + bias" if getattr(module, "bias", None) is not None else "")
        tied = "  (the embedding's matrix)" if name == "lm_head" and config.tie_word_embeddings else ""
        lines.append(f"  {name:46s} {shape}{tied}")
    rope = ", ".join(f"{key} {value}" for key, value in config.rope.items() if key != "rope_type")
    lines.append(f"  heads {config.num_attention_heads}, key/value heads {config.num_key_value_heads}, head_dim "
                 f"{config.head_dim}; rope {config.rope['rope_type']}, theta {config.rope_theta:g}"
                 + (f" ({rope})" if config.rope["rope_type"] != "default" else ""))
    windows = [w for w in config.windows if w]
    lines.append(f"  sliding window: {f'{windows[0]} tokens on {len(windows)} blocks' if windows else 'none'}")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python model.py DIR   (a checkpoint folder with a config.json)")
    try:
        print(draw(model_config(read_config_json(sys.argv[1]), f"{sys.argv[1]}/config.json")))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
