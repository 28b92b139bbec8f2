"""Positions: rotary tables of all kinds, ALiBi slopes, and the growth of queries with the position.

Requires: families.py.
Next: model.py.
"""
import math

import torch

from families import ModelConfig


def rope_frequencies(config: ModelConfig, length: int, device=None) -> tuple[torch.Tensor, float]:
    """Angular speed of each feature pair in radians per token, (R/2,) float32, and a factor for cos and sin.

    `length` is the longest sequence of this forward pass in tokens; the kinds of LENGTH_DEPENDENT look at it.
    Kinds: default, linear (arXiv:2306.15595), dynamic (NTK by parts of the base), yarn (arXiv:2309.00071),
    llama3 (the Llama 3.1 model card), longrope (arXiv:2402.13753), ntk_steps (arXiv:2309.16609, sec. 2.4).
    """
    rope, dim, base = config.rope, int(config.head_dim * config.rotary_part), config.rope_theta
    kind, factor = rope["rope_type"], rope.get("factor")
    trained = config.max_position_embeddings if kind == "dynamic" else rope.get("original_max_position_embeddings")
    if kind == "dynamic":
        base *= (factor * max(length, trained) / trained - (factor - 1)) ** (dim / (dim - 2))
    elif kind == "ntk_steps" and length > trained:
        base *= (2 ** math.ceil(math.log2(length / trained) + 1) - 1) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    speed = 1.0 / base ** exponents                                                          # (R/2,)
    if kind == "linear":
        speed = speed / factor
    elif kind == "llama3":
        # waves longer than the trained length are slowed by `factor`, short ones kept, those between blended
        turns = trained * speed / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        speed = keep * speed + (1 - keep) * speed / factor
    elif kind == "yarn":
        return _yarn(rope, speed, dim, base)
    elif kind == "longrope":
        return _longrope(rope, speed, length, config.max_position_embeddings)
    return speed, 1.0


LENGTH_DEPENDENT = ("dynamic", "ntk_steps", "longrope")


def _longrope(rope, speed, length, positions):
    """A divisor for each pair, one set for lengths that were trained and one beyond (arXiv:2402.13753, sec. 3)."""
    trained = rope["original_max_position_embeddings"]
    divisors = torch.tensor(rope["long_factor" if length > trained else "short_factor"], device=speed.device)
    assert divisors.shape == speed.shape, (divisors.shape, speed.shape)
    stretch, scale = rope.get("factor") or positions / trained, rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    return speed / divisors, scale


def _yarn(rope, speed, dim, base):
    """NTK-by-parts (arXiv:2309.00071, sec. 3.2) and the attention temperature (sec. 3.4) as a factor on cos and sin."""
    factor, trained = rope["factor"], rope["original_max_position_embeddings"]

    def pair_with(turns):          # index of the feature pair that makes this many turns over the trained length
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=speed.device) - low) / (high - low or 0.001)
    keep = 1 - ramp.clamp(0, 1)                                                              # (Dh/2,) 1 = unscaled
    speed = keep * speed + (1 - keep) * speed / factor

    def temperature(weight=1.0):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return speed, temperature() if scale is None else scale


def length_for_rope(config: ModelConfig, position_ids, cache, training: bool) -> int:
    """The length in tokens that rope_frequencies goes by; 0 where it does not matter: reading it waits for the GPU."""
    kind = config.rope["rope_type"]
    if kind not in LENGTH_DEPENDENT or (kind == "ntk_steps" and training):
        return 0
    if kind == "ntk_steps" and cache is not None and cache.length:
        return cache.first_length       # the keys in the cache are turned already: what follows a prompt keeps its base
    return int(position_ids.max()) + 1


def rope_table(config: ModelConfig, position_ids, dtype, length: int = 0):
    """For `rotate`: two (B, 1, T, R) tensors in `dtype`, computed in float32: for each feature the cosine of its pair's
    angle, and what the other of the pair is multiplied with: minus the sine for the first of the two, then the sine."""
    speed, scale = rope_frequencies(config, length, position_ids.device)
    angle = position_ids[:, None, :, None].float() * speed                                   # (B, 1, T, R/2)
    cos, sin = (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)
    if config.rotary_pairs == "neighbours":
        return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin, pairs: str = "halves"):
    """Turn feature pairs of x (B, H, T, Dh) by their angles (arXiv:2104.09864, eq. 34).

    cos, sin: (B, 1, T, R), see rope_table; the first R features turn, in pairs (i, i + R/2) or neighbours (2i, 2i + 1).
    """
    R = cos.shape[-1]
    part = x if R == x.shape[-1] else x[..., :R]
    if pairs == "neighbours":
        other = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        other = part.roll(R // 2, -1)
    part = (part * cos + other * sin).to(x.dtype)                         # autocast hands in 16-bit x, float32 cos
    return part if R == x.shape[-1] else torch.cat((part, x[..., R:]), dim=-1)


def alibi_slopes(num_heads: int) -> list[float]:
    """How steeply each head's scores sink with the distance (arXiv:2108.12409, sec. 3, and its code for other counts
    of heads than powers of two: the slopes of the next lower power, then every second one of twice as many heads)."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]


def query_growth(config: ModelConfig, position_ids, training: bool):
    """What queries are multiplied with at each position, (B, 1, T, 1) float32, or None for nothing."""
    if not config.query_growth or (training and config.query_growth[0] == "log"):
        return None
    kind, *numbers = config.query_growth
    position = position_ids[:, None, :, None].float() + 1
    if kind == "log":                                             # the entropy of longer contexts, arXiv:2309.16609
        return (position.log() / math.log(numbers[0])).clamp(min=1)
    scale, floor = numbers                                        # arXiv:2501.19399
    return torch.log1p((position / floor).floor()) * scale + 1
