"""Generation: a prompt in, tokens out one by one. Sampling as a pure function; a cached loop and its uncached twin.

    cache = KVCache(model.config.num_hidden_layers)
    for token in generate(model, prompt_ids, cache, stop_ids, Sampling(do_sample=True, top_p=0.9), max_new_tokens=100):
        print(stream.push(token), end="", flush=True)

The first pass reads the whole prompt (prefill) and fills the cache with its keys and values; every later one reads a
single token (decode), so it costs about one reading of the weights. `generate_uncached` reads everything again each
time: slow, obvious, and equal; a test holds the two together.

Read before: model.py (KVCache). Read after: chat.py, which calls it.
Sources: repetition penalty arXiv:1909.05858 (sec. 4.1), top-k arXiv:1805.04833, top-p arXiv:1904.09751; their order is
that of transformers' generate. Drawing by exponential noise: Efraimidis & Spirakis 2006.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults leave the model's scores as they are, and take the likeliest token."""
    do_sample: bool = False               # false, or temperature 0: the likeliest token
    temperature: float = 1.0
    top_k: int = 0                        # 0: all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, fine, words in (("temperature", self.temperature >= 0, "0 or more"),
                                  ("top_k", self.top_k >= 0, "0 or more"),
                                  ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
                                  ("repetition_penalty", self.repetition_penalty > 0, "above 0")):
            if not fine:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range; it must be {words}")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0


# ---- choosing one token -----------------------------------------------------------------------------------------


def shape_logits(logits, sampling: Sampling, seen=None):
    """The scores to draw from: penalty, then temperature, then top-k, then top-p; what is cut off becomes -inf.

    logits: (V,) float32. seen: (V,) bool, true for tokens of prompt and answer so far; None where there is no penalty.
    """
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty       # towards less likely, on either side of zero
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.greedy:
        return logits
    return keep_likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)


def keep_likely(logits, top_k: int, top_p: float):
    """Keep the top_k highest of (V,) logits, of these the smallest set whose probability reaches top_p; the rest -inf.

    Both cuts are a threshold, so tokens tied with the last one kept are kept too. Only top_k scores are sorted, and
    nothing waits for the device.
    """
    if not top_k and top_p >= 1:
        return logits
    top = logits.topk(min(top_k, len(logits)) if top_k else len(logits)).values              # (k,) from high to low
    lowest = top[-1:]
    if top_p < 1:
        rest = top.softmax(-1).flip(0).cumsum(0).flip(0)       # (k,) probability of a token and all less likely ones
        kept = (rest > 1 - top_p).sum(dim=0, keepdim=True).clamp(min=1)
        lowest = top.gather(0, kept - 1)
    return logits.masked_fill(logits < lowest, -torch.inf)


def sample(logits, sampling: Sampling, seen=None, generator: torch.Generator | None = None):
    """The next token, a () int64 tensor on the device of logits (V,) float32. For `seen` see shape_logits.

    Drawing is argmax(p / noise) with exponential noise, which picks token i with probability p[i]. torch.multinomial
    does the same, but first waits for the device to check p.
    """
    scores = shape_logits(logits, sampling, seen)
    if sampling.greedy:
        return scores.argmax(-1)
    p = scores.softmax(-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


# ---- the two loops ----------------------------------------------------------------------------------------------


def next_scores(model, ids, cache):
    """The model reads ids (1, T) behind what the cache holds -> scores of the token after them, (V,) float32."""
    return model.logits(model(ids, cache=cache)[0, -1]).float()


@torch.no_grad()
def generate(model, input_ids: list[int], cache, stop_ids=(), sampling: Sampling = Sampling(), *,
             max_new_tokens: int | None = None, generator: torch.Generator | None = None,
             step=next_scores) -> Iterator[int]:
    """Continue `input_ids`; yields token ids. Ends after a stop id (yielded too), max_new_tokens, or a full context.

    cache: a KVCache that is empty, or holds the first cache.length tokens of input_ids (an unchanged beginning is not
    computed twice). generator: on the model's device; the same seed gives the same answer. step: what stands for
    next_scores, see decode.py.
    Raises ValueError for ids outside the vocabulary, a prompt that fills the context, and scores that are not finite.
    """
    limit = check_prompt(model, input_ids, max_new_tokens)
    cache.crop(len(input_ids) - 1)                                 # the last one has to run: it gives the next token
    rope = model.config.rope
    if rope["rope_type"] == "ntk_steps" and len(input_ids) > rope["original_max_position_embeddings"]:
        cache.crop(0)                                              # such a prompt turns its keys by a base of its own
    device = model.lm_head.weight.device
    seen = tokens_seen(model, input_ids) if sampling.repetition_penalty != 1 else None
    ids = torch.tensor([input_ids[cache.length:]], device=device)                            # (1, T)
    for count in range(limit):
        logits = step(model, ids, cache)                                                     # (V,)
        if count == 0:
            check_finite(logits, model)
        chosen = sample(logits, sampling, seen, generator)
        if seen is not None:
            seen.index_fill_(0, chosen[None], True)
        ids = chosen[None, None]                                   # stays on the device for the next pass
        token = int(chosen)                                        # the only wait of a step
        yield token
        if token in stop_ids:
            return


@torch.no_grad()
def generate_uncached(model, input_ids: list[int], stop_ids=(), sampling: Sampling = Sampling(), *,
                      max_new_tokens: int | None = None, generator: torch.Generator | None = None) -> Iterator[int]:
    """The slow twin of `generate`: each step runs the whole sequence. Same arguments but the cache, same tokens."""
    ids = list(input_ids)
    for _ in range(check_prompt(model, input_ids, max_new_tokens)):
        hidden = model(torch.tensor([ids], device=model.lm_head.weight.device))              # (1, T, D)
        logits = model.logits(hidden[0, -1]).float()                                         # (V,)
        check_finite(logits, model)
        ids.append(int(sample(logits, sampling, tokens_seen(model, ids), generator)))
        yield ids[-1]
        if ids[-1] in stop_ids:
            return


def tokens_seen(model, ids):
    """(V,) bool on the model's device: which tokens occur in ids."""
    seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.lm_head.weight.device)
    return seen.index_fill_(0, torch.tensor(ids, device=seen.device), True)


# ---- limits -----------------------------------------------------------------------------------------------------


def context_length(config) -> int:
    """The longest sequence of a ModelConfig in tokens: max_position_embeddings, or its stretch by rope scaling."""
    stretched = config.rope.get("factor", 1) * config.rope.get("original_max_position_embeddings", 0)
    return max(config.max_position_embeddings, int(stretched))


def check_prompt(model, input_ids, max_new_tokens) -> int:
    """How many tokens may follow. Raises ValueError for a prompt that is empty, too long or has ids the model lacks."""
    assert not model.training, "dropout is on: call model.eval() first"
    size, context = model.config.vocab_size, context_length(model.config)
    if not input_ids:
        raise ValueError("the prompt holds no token: there is nothing to continue")
    if strange := [token for token in input_ids if not 0 <= token < size]:
        raise ValueError(f"the prompt holds token id {strange[0]}, and the model knows ids 0 to {size - 1}: a special "
                         "token of the chat format that this checkpoint never had")
    if len(input_ids) >= context:
        raise ValueError(f"the prompt has {len(input_ids):,} tokens, and the model reads at most {context:,} "
                         "(max_position_embeddings), its answer included")
    room = context - len(input_ids)
    return room if max_new_tokens is None else min(room, max_new_tokens)


def check_finite(logits, model):
    """float16 ends at 65,504; past it the scores are NaN, and the answer would be a row of `!` (token 0)."""
    if not logits.isfinite().all():
        dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
        raise ValueError(f"the model's scores are not finite in {dtype} (float16 ends at 65,504): set infer_dtype: "
                         "bfloat16 or float32; if that does not help, the weights are damaged")


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences share from the start: what a cache of one may keep for the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
