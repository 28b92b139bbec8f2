"""Generation: a prompt in, tokens out one by one. Sampling, a cached loop and its uncached twin.

    cache = KVCache(model.config.num_hidden_layers)
    sampling = Sampling(do_sample=True, top_p=0.9)
    for token in generate(model, prompt_ids, cache, stop_ids, sampling, max_new_tokens=100):
        print(stream.push(token), end="", flush=True)

The first pass reads the whole prompt (prefill) and fills the cache with its keys and values. Every
later pass reads a single token (decode), which costs about one reading of the weights.
`generate_uncached` runs the whole sequence each time: slow, obvious, and equal; a test compares
them.

Requires: model.py (KVCache).
Next: chat.py.

Repetition penalty arXiv:1909.05858 (sec. 4.1), top-k arXiv:1805.04833, top-p arXiv:1904.09751,
min-p arXiv:2407.01082, in the order of transformers' generate; frequency and presence penalties as
in OpenAI's API reference. Drawing by exponential noise: Efraimidis & Spirakis 2006.
"""
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import log

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults take the likeliest token of unchanged logits."""
    do_sample: bool = False               # false, or temperature 0: the likeliest token
    temperature: float = 1.0
    top_k: int = 0                        # 0: all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0       # of tokens in prompt and answer, by a factor
    min_p: float = 0.0                    # least probability, as a share of the likeliest token's
    frequency_penalty: float = 0.0        # of tokens in the answer, for each time they occur
    presence_penalty: float = 0.0         # of tokens in the answer, once

    def __post_init__(self):
        ranges = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
        )
        for name, valid, words in ranges:
            if not valid:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is out of range; it must be {words}")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits."""
        return bool(self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty)


@dataclass
class TokenCounts:
    """Which tokens a penalty is for; tensors (V,) on the model's device."""
    seen: torch.Tensor          # bool: in prompt or answer
    answered: torch.Tensor      # float32: how often in the answer

    def add(self, token: torch.Tensor):
        """Count a token () int64 of the answer, without waiting for the device."""
        self.seen.index_fill_(0, token[None], True)
        self.answered.index_add_(0, token[None], self.answered.new_ones(1))


# ---- choosing one token -----------------------------------------------------------------------


def shape_logits(logits: torch.Tensor, sampling: Sampling,
                 counts: TokenCounts | None = None) -> torch.Tensor:
    """Logits to draw from: penalties, temperature, top-k, top-p, min-p; excluded tokens are -inf.

    logits: (V,) float32. counts: of the tokens so far; may be None without a penalty.
    """
    if counts is not None:
        penalty = sampling.repetition_penalty       # towards less likely, on either side of zero
        penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(counts.seen, penalized, logits)
        logits = logits - sampling.frequency_penalty * counts.answered
        logits = logits - sampling.presence_penalty * (counts.answered > 0)
    if sampling.greedy:
        return logits
    logits = keep_likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    if sampling.min_p:
        logits = logits.masked_fill(logits < logits.max() + log(sampling.min_p), -torch.inf)
    return logits


def keep_likely(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Keep the top_k highest of (V,) logits, of these the smallest set that reaches top_p.

    The other logits become -inf. Both filters are thresholds, so tokens tied with the last one kept
    are kept too. Only top_k logits are sorted, and nothing waits for the device.
    """
    if not top_k and top_p >= 1:
        return logits
    k = min(top_k, len(logits)) if top_k else len(logits)
    top = logits.topk(k).values                                # (k,) in descending order
    lowest = top[-1:]
    if top_p < 1:
        rest = top.softmax(-1).flip(0).cumsum(0).flip(0)       # (k,) probability of i and all below
        kept = (rest > 1 - top_p).sum(dim=0, keepdim=True).clamp(min=1)
        lowest = top.gather(0, kept - 1)
    return logits.masked_fill(logits < lowest, -torch.inf)


def sample(logits: torch.Tensor, sampling: Sampling, counts: TokenCounts | None = None,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """Next token, a () int64 tensor on the device of logits (V,) float32.

    counts: see shape_logits; the token is added to them.

    Drawing is argmax(p / noise) with exponential noise, which picks token i with probability p[i].
    torch.multinomial does the same, but first waits for the device to check p.
    """
    scores = shape_logits(logits, sampling, counts)
    if not sampling.greedy:
        scores = scores.softmax(-1)                                                 # p
        scores = scores / torch.empty_like(scores).exponential_(generator=generator)
    token = scores.argmax(-1)
    if counts is not None:
        counts.add(token)
    return token


# ---- the two loops ----------------------------------------------------------------------------


def next_scores(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """Run ids (1, T) after the tokens in the cache -> logits of the next token, (V,) float32."""
    return model.logits(model(ids, cache=cache)[0, -1]).float()


@torch.no_grad()
def generate(model, input_ids: list[int], cache, stop_ids: Collection[int] = (),
             sampling: Sampling = Sampling(), *, max_new_tokens: int | None = None,
             generator: torch.Generator | None = None, step=next_scores) -> Iterator[int]:
    """Continue `input_ids`; yields token ids.

    Ends after a stop id (which is yielded), max_new_tokens, or a full context.

    cache: a KVCache that is empty or holds the first cache.length tokens of input_ids, which are
    not computed again. generator: on the model's device; the same seed gives the same answer. step:
    a function instead of next_scores, see fast/decode.py. Raises ValueError for ids outside the
    vocabulary, a prompt that fills the context, and logits that are not finite.
    """
    limit = check_prompt(model, input_ids, max_new_tokens)
    cache.crop(len(input_ids) - 1)              # the last token must run: its logits are needed
    rope = model.config.rope
    if (rope["rope_type"] == "ntk_steps"
            and len(input_ids) > rope["original_max_position_embeddings"]):
        cache.crop(0)                           # the length of such a prompt changes its keys

    device = model.lm_head.weight.device
    counts = count_tokens(model, input_ids) if sampling.penalizes else None
    ids = torch.tensor([input_ids[cache.length:]], device=device)                       # (1, T)
    for count in range(limit):
        logits = step(model, ids, cache)                                                # (V,)
        if count == 0:
            check_finite(logits, model)
        chosen = sample(logits, sampling, counts, generator)
        ids = chosen[None, None]                # stays on the device for the next pass
        token = int(chosen)                     # the only wait of a step
        yield token
        if token in stop_ids:
            return


@torch.no_grad()
def generate_uncached(model, input_ids: list[int], stop_ids: Collection[int] = (),
                      sampling: Sampling = Sampling(), *, max_new_tokens: int | None = None,
                      generator: torch.Generator | None = None) -> Iterator[int]:
    """Slow twin of `generate`: each step runs the whole sequence. Same arguments, no cache."""
    ids = list(input_ids)
    device = model.lm_head.weight.device
    for _ in range(check_prompt(model, input_ids, max_new_tokens)):
        hidden = model(torch.tensor([ids], device=device))                              # (1, T, D)
        logits = model.logits(hidden[0, -1]).float()                                    # (V,)
        check_finite(logits, model)
        counts = count_tokens(model, ids, len(input_ids)) if sampling.penalizes else None
        ids.append(int(sample(logits, sampling, counts, generator)))
        yield ids[-1]
        if ids[-1] in stop_ids:
            return


def count_tokens(model, ids: list[int], prompt: int | None = None) -> TokenCounts:
    """The counts of ids, whose first `prompt` (None: all) are the prompt."""
    device = model.lm_head.weight.device
    size = model.config.vocab_size
    seen = torch.zeros(size, dtype=torch.bool, device=device)
    seen.index_fill_(0, torch.tensor(ids, device=device), True)
    answer = torch.tensor([] if prompt is None else ids[prompt:], dtype=torch.int64, device=device)
    return TokenCounts(seen, answer.bincount(minlength=size).float())


# ---- limits -----------------------------------------------------------------------------------


def context_length(config) -> int:
    """Longest sequence in tokens: max_position_embeddings, or more by rope scaling."""
    rope = config.rope
    extended = rope.get("factor", 1) * rope.get("original_max_position_embeddings", 0)
    return max(config.max_position_embeddings, int(extended))


def check_prompt(model, input_ids: list[int], max_new_tokens: int | None) -> int:
    """Number of tokens that may follow the prompt.

    Raises ValueError for a prompt that is empty, too long, or has ids outside the vocabulary.
    """
    assert not model.training, "dropout is on: call model.eval() first"
    size = model.config.vocab_size
    context = context_length(model.config)
    if not input_ids:
        raise ValueError("the prompt holds no token: there is nothing to continue")
    if outside := [token for token in input_ids if not 0 <= token < size]:
        raise ValueError(
            f"the prompt holds token id {outside[0]}, and the model knows ids 0 to {size - 1}: a "
            "special token of the chat format that this checkpoint never had")
    if len(input_ids) >= context:
        raise ValueError(
            f"the prompt has {len(input_ids):,} tokens, and the model reads at most {context:,} "
            "(max_position_embeddings), its answer included")
    remaining = context - len(input_ids)
    return remaining if max_new_tokens is None else min(remaining, max_new_tokens)


def check_finite(logits: torch.Tensor, model):
    """Raise ValueError for NaN or infinity."""
    if not logits.isfinite().all():
        raise not_finite(model)


def not_finite(model) -> ValueError:
    """The error for logits that are NaN or infinite.

    float16 ends at 65,504. Past it the logits are NaN, and the answer would be a row of `!` (token
    0).
    """
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    return ValueError(
        f"the model's scores are not finite in {dtype} (float16 ends at 65,504): set "
        "infer_dtype: bfloat16 or float32; if that does not help, the weights are damaged")


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the common beginning of two sequences: the tokens a cache can keep."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
