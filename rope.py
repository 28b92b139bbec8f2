"""Positions: rotary tables of all kinds, ALiBi slopes, and the temperature of long contexts.

Requires: families.py.
Next: model.py.
Papers: RoPE arXiv:2104.09864, position interpolation arXiv:2306.15595, YaRN arXiv:2309.00071,
LongRoPE arXiv:2402.13753, ALiBi arXiv:2108.12409, Qwen arXiv:2309.16609 (sec. 2.4), scalable
softmax arXiv:2501.19399.
"""
import math
from dataclasses import replace

import torch

from families import ModelConfig

LENGTH_DEPENDENT = ("dynamic", "ntk_steps", "longrope")      # kinds that look at the length


# ---- frequencies --------------------------------------------------------------------------------


def rope_frequencies(config: ModelConfig, length: int, device=None) -> tuple[torch.Tensor, float]:
    """inv_freq, radians per token of each feature pair, (R/2,) float32; a factor for cos and sin.

    length: the longest sequence of this forward pass in tokens, for the kinds of LENGTH_DEPENDENT.
    Kinds: default, linear (arXiv:2306.15595), dynamic (NTK, by changing the base), ntk_alpha (the
    same for every length), yarn (arXiv:2309.00071), llama3 (the Llama 3.1 model card), longrope
    (arXiv:2402.13753), ntk_steps (arXiv:2309.16609, sec. 2.4).
    """
    rope = config.rope
    kind = rope["rope_type"]
    factor = rope.get("factor")
    dim = config.rotated_features
    base = config.rope_theta
    trained = rope.get("original_max_position_embeddings")      # tokens
    if kind == "dynamic":
        trained = config.max_position_embeddings
        stretch = factor * max(length, trained) / trained - (factor - 1)
        base *= stretch ** (dim / (dim - 2))
    elif kind == "ntk_alpha":
        base *= rope["alpha"] ** (dim / (dim - 2))
    elif kind == "ntk_steps" and length > trained:
        stretch = 2 ** math.ceil(math.log2(length / trained) + 1) - 1
        base *= stretch ** (dim / (dim - 2))

    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    inv_freq = 1.0 / base ** exponents                                           # (R/2,)
    if kind == "linear":
        inv_freq = inv_freq / factor
    elif kind == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    elif kind == "yarn":
        return _yarn(rope, inv_freq, dim, base)
    elif kind == "longrope":
        return _longrope(rope, inv_freq, length, config.max_position_embeddings)
    return inv_freq, 1.0


def _llama3(rope: dict, inv_freq):
    """Waves longer than the trained length are stretched, short ones kept, others blended."""
    trained = rope["original_max_position_embeddings"]
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    turns = trained * inv_freq / (2 * math.pi)              # over the trained length
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / rope["factor"]


def _longrope(rope: dict, inv_freq, length: int, positions: int):
    """A divisor for each pair: one set within the trained length, one beyond (sec. 3)."""
    trained = rope["original_max_position_embeddings"]
    name = "long_factor" if length > trained else "short_factor"
    divisors = torch.tensor(rope[name], device=inv_freq.device)
    assert divisors.shape == inv_freq.shape, (divisors.shape, inv_freq.shape)

    stretch = rope.get("factor") or positions / trained
    scale = rope.get("attention_factor")
    if scale is None and stretch > 1:
        scale = math.sqrt(1 + math.log(stretch) / math.log(trained))
    return inv_freq / divisors, 1.0 if scale is None else scale


def _yarn(rope: dict, inv_freq, dim: int, base: float):
    """NTK by parts (sec. 3.2); the attention temperature (sec. 3.4) as a factor of cos and sin."""
    factor = rope["factor"]
    trained = rope["original_max_position_embeddings"]

    def pair_with(turns):           # the pair that makes this many turns over the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair_with(rope.get("beta_fast") or 32)
    high = pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=inv_freq.device)
    keep = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)               # (R/2,)
    inv_freq = keep * inv_freq + (1 - keep) * inv_freq / factor

    def temperature(weight=1.0):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return inv_freq, temperature() if scale is None else scale


def length_for_rope(config: ModelConfig, position_ids, cache, training: bool) -> int:
    """The length in tokens for rope_frequencies; 0 where it does not matter.

    Reading it from position_ids waits for the GPU.
    """
    kind = config.rope["rope_type"]
    if kind not in LENGTH_DEPENDENT or (kind == "ntk_steps" and training):
        return 0
    if kind == "ntk_steps" and cache is not None and cache.length:
        return cache.first_length       # cached keys keep the prompt's base; so do later tokens
    return int(position_ids.max()) + 1


# ---- rotation -----------------------------------------------------------------------------------


def rope_table(config: ModelConfig, position_ids, dtype: torch.dtype, length: int = 0):
    """cos and sin for `rotate`, two (B, 1, T, R) tensors in `dtype`, computed in float32.

    sin has a minus for the first feature of each pair.
    """
    inv_freq, scale = rope_frequencies(config, length, position_ids.device)
    angle = position_ids[:, None, :, None].float() * inv_freq                    # (B, 1, T, R/2)
    cos = (angle.cos() * scale).to(dtype)
    sin = (angle.sin() * scale).to(dtype)
    if config.rotary_pairs == "neighbors":
        return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def window_rope_table(config: ModelConfig, position_ids, dtype: torch.dtype):
    """rope_table of the layers with a window, or None where they are rotated as all layers are."""
    if config.window_rope_theta is None or not any(config.windows):
        return None
    plain = replace(config, rope={"rope_type": "default"}, rope_theta=config.window_rope_theta)
    return rope_table(plain, position_ids, dtype)


def rotate(x, cos, sin, pairs: str = "halves"):
    """Rotate feature pairs of x (B, H, T, Dh) by their angles (arXiv:2104.09864, eq. 34).

    cos, sin: (B, 1, T, R) from rope_table. The first R features are rotated, in pairs (i, i + R/2)
    or, with "neighbors", (2i, 2i + 1).
    """
    R = cos.shape[-1]
    rotated = x if R == x.shape[-1] else x[..., :R]
    if pairs == "neighbors":
        partner = rotated.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = rotated.roll(R // 2, -1)
    rotated = (rotated * cos + partner * sin).to(x.dtype)      # under autocast cos is float32
    return rotated if R == x.shape[-1] else torch.cat((rotated, x[..., R:]), dim=-1)


# ---- ALiBi and the temperature of long contexts -------------------------------------------------


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head's penalty on distance (arXiv:2108.12409, sec. 3).

    If the number of heads is no power of two, as in the paper's code: the slopes of the next lower
    power, then every second slope of twice that many heads.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]


def attn_temperature(config: ModelConfig, position_ids, training: bool):
    """The factor of queries at each position, (B, 1, T, 1) float32, or None for 1."""
    if not config.attn_temperature or (training and config.attn_temperature[0] == "log"):
        return None
    kind, *numbers = config.attn_temperature
    position = position_ids[:, None, :, None].float()
    if kind != "log1p all":                                     # it counts from 0
        position = position + 1
    if kind == "log":                                           # arXiv:2309.16609, sec. 2.4
        return (position.log() / math.log(numbers[0])).clamp(min=1)
    scale, floor = numbers                                      # arXiv:2501.19399
    return torch.log1p((position / floor).floor()) * scale + 1
