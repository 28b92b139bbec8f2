"""Answer many prompts at once: each reading of the weights gives a token to every row.

    for number, tokens in answer_all(model, prompts, rows=8, stop_ids=stop_ids,
                                     limit=lambda length: 100):
        print(number, tokenizer.decode(tokens))         # in the order in which they end

New prompts lie end to end in one row of the model, as in training; attention keeps them apart, and
their keys and values go to a cache that has a row for each. Then every step reads one token of each
row, and attention sees the filled slots of that row. When an answer ends, the next prompt takes its
row. Answers do not depend on how many are decoded at once: greedy answers equal the ones of
generate(), and sampled ones use a generator for each prompt.

Requires: generate.py (one prompt), attention.py (Filled).
Next: eval.py.
Source: rows that join and leave a running batch: Orca, Yu et al., OSDI 2022 (sec. 3.1).
"""
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from attention import Filled, PackedLayout, to_device
from generate import (Sampling, check_finite, check_prompt, generate, next_scores, sample,
                      tokens_seen)
from model import CausalLM, KVCache
from rope import LENGTH_DEPENDENT

AT_ONCE = 8192          # tokens of new prompts in one pass
GROWTH = 256            # tokens by which the cache grows


@dataclass
class Row:
    """An answer that is being decoded."""
    number: int
    prompt: list[int]
    room: int                                       # tokens that may still be added
    generator: torch.Generator | None = None
    seen: torch.Tensor | None = None                # for a repetition penalty, see shape_logits
    answer: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)    # of the answer's tokens, see decode_rows


class RowCache(KVCache):
    """Keys and values of up to `size` rows of different lengths.

    A pair of buffers (size, K, room, Dh) per layer.
    """

    def __init__(self, num_layers: int, size: int, device):
        super().__init__(num_layers)
        self.size = size
        self.device = device
        self.lengths = []           # tokens of each row
        self.prompt_lengths = []    # of the new prompts, while a pass reads them
        self.positions = None       # (B,) int64, where a pass over one token of each row writes

    def update(self, layer: int, k, v):
        """Store k, v of one layer; return what attention sees.

        New prompts, (1, K, N, Dh), see themselves. Single tokens, (B, K, 1, Dh), see the slots up
        to the end of the longest row, (B, K, S, Dh); `filled` says which of them count.
        """
        B = len(self.lengths)
        buffers = self.with_room(layer, k)
        if self.prompt_lengths:
            for buffer, new in zip(buffers, (k, v)):
                for row, part in enumerate(new[0].split(self.prompt_lengths, dim=1), B):
                    buffer[row, :, :part.shape[1]] = part
            return k, v

        rows = torch.arange(B, device=k.device)
        for buffer, new in zip(buffers, (k, v)):
            buffer[rows, :, self.positions] = new[:, :, 0]
        slots = self.filled.mask.shape[-1]
        return tuple(buffer[:B, :, :slots] for buffer in buffers)

    def with_room(self, layer: int, like):
        """The buffers of a layer, enlarged if this pass needs it.

        New slots are zero: attention multiplies the values of slots that do not count by 0, and
        they must not be NaN.
        """
        buffers = self.buffers[layer]
        needed = max([length + 1 for length in self.lengths] + self.prompt_lengths)
        if buffers is None or buffers[0].shape[2] < needed:
            room = -(-needed // GROWTH) * GROWTH
            _, K, _, Dh = like.shape
            pair = [like.new_zeros(self.size, K, room, Dh) for _ in range(2)]
            for new, old in zip(pair, buffers or ()):
                new[:, :, :old.shape[2]] = old
            buffers = self.buffers[layer] = pair
        return buffers

    def drop(self, row: int):
        """Remove a row; the last row moves to its index."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if row == last:
            return
        for pair in self.buffers:
            for buffer in pair:
                buffer[row, :, :length] = buffer[last, :, :length]
        self.lengths[row] = length

    def send(self, numbers: list) -> torch.Tensor:
        """Whole numbers on the device, without waiting for it."""
        return to_device(torch.tensor(numbers), self.device)

    def read_prompts(self, model: CausalLM, prompts: list[list[int]]):
        """Add rows. Returns the scores of the token after each prompt, (n, V) float32."""
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        tokens = [token for prompt in prompts for token in prompt]
        places = [place for length in self.prompt_lengths for place in range(length)]
        ids = self.send([tokens])                                                   # (1, N)
        positions = self.send([places])                                             # (1, N)
        ends = self.send(self.prompt_lengths).cumsum(0) - 1
        layout = PackedLayout(self.prompt_lengths, self.device)
        hidden = model(ids, positions, layout, cache=self)[0, ends]                 # (n, D)
        self.lengths = self.lengths + self.prompt_lengths
        self.prompt_lengths = []
        return model.logits(hidden).float()

    def read_tokens(self, model: CausalLM, tokens: list[int]):
        """Add a token to each row. Returns the scores of the one after it, (B, V) float32."""
        self.positions = self.send(self.lengths)
        slots = torch.arange(max(self.lengths) + 1, device=self.device)
        filled = slots <= self.positions[:, None]
        self.filled = Filled(filled[:, None, None])                                 # (B, 1, 1, S)
        ids = self.send(tokens)[:, None]                                            # (B, 1)
        hidden = model(ids, self.positions[:, None], cache=self)[:, 0]              # (B, D)
        self.lengths = [length + 1 for length in self.lengths]
        self.filled = None
        return model.logits(hidden).float()


def cache_bytes(config, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a RowCache for rows of up to so many tokens. config: a ModelConfig."""
    room = -(-tokens // GROWTH) * GROWTH
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return rows * room * heads * config.head_dim * dtype.itemsize


def answer_all(model: CausalLM, prompts, rows: int, stop_ids=(), sampling: Sampling = Sampling(), *,
               limit: Callable[[int], int], seed: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Answer many prompts, `rows` of them at a time; yield (number, tokens) as answers end.

    prompts: (number, ids) pairs. A stop id that ends an answer is its last token. limit: from the
    tokens of a prompt to the most tokens of its answer. What is sampled depends on the seed and the
    number alone. Raises ValueError that names the prompt (see generate.check_prompt), and for
    scores that are not finite.
    """
    for row in decode_rows(model, prompts, rows, stop_ids, sampling, limit=limit, seed=seed):
        yield row.number, row.answer


@torch.no_grad()
def decode_rows(model: CausalLM, prompts, rows: int, stop_ids=(), sampling: Sampling = Sampling(),
                *, limit: Callable[[int], int], seed: int = 0,
                with_logps: bool = False) -> Iterator[Row]:
    """answer_all, row by row as they end.

    with_logps: keep the log-probability of each token by the model, at the sampling's temperature
    (before top-k and top-p).
    """
    device = model.lm_head.weight.device
    cache = RowCache(model.config.num_hidden_layers, rows, device)
    waiting = deque(prompts)
    busy = []                                               # in the order of the cache's rows
    while waiting or busy:
        scores = []
        if busy:
            scores.append(cache.read_tokens(model, [row.answer[-1] for row in busy]))
        new = take(model, waiting, rows - len(busy), sampling, limit, seed)
        if new:
            scores.append(cache.read_prompts(model, [row.prompt for row in new]))
            check_finite(scores[-1], model)
            busy += new

        if not busy:
            break
        scores = torch.cat(scores)                                                  # (B, V)
        chosen = choose(scores, busy, sampling)                                     # (B,)
        parts = [chosen.float()]                    # exact: ids are below 2^24
        if with_logps:
            parts.append(logps_of(scores, chosen, sampling))
        found = torch.stack(parts, 1).tolist()      # the only wait for the device in a step
        for index in reversed(range(len(busy))):
            row = busy[index]
            token, *logp = found[index]
            row.answer.append(int(token))
            row.logps += logp
            row.room -= 1
            if row.room <= 0 or row.answer[-1] in stop_ids:
                yield row
                cache.drop(index)
                busy[index] = busy[-1]
                busy.pop()


def take(model: CausalLM, waiting: deque, free: int, sampling: Sampling, limit: Callable,
         seed: int) -> list[Row]:
    """Rows for the next prompts: at most `free`, and at most AT_ONCE tokens unless it is one."""
    rows = []
    tokens = 0
    while waiting and len(rows) < free:
        number, prompt = waiting[0]
        if rows and tokens + len(prompt) > AT_ONCE:
            break
        waiting.popleft()
        rows.append(new_row(model, number, prompt, sampling, limit, seed))
        tokens += len(prompt)
    return rows


def new_row(model: CausalLM, number: int, prompt: list[int], sampling: Sampling, limit: Callable,
            seed: int) -> Row:
    """A row with a generator of its own. Raises ValueError that names the row."""
    try:
        room = check_prompt(model, prompt, max(1, limit(len(prompt))))
    except ValueError as error:
        raise ValueError(f"row {number + 1}: {error}") from None
    generator = None
    if not sampling.greedy:
        device = model.lm_head.weight.device
        generator = torch.Generator(device).manual_seed(2**20 * seed + number)
    seen = tokens_seen(model, prompt) if sampling.repetition_penalty != 1 else None
    return Row(number=number, prompt=prompt, room=room, generator=generator, seen=seen)


def choose(scores, rows: list[Row], sampling: Sampling):
    """The next token of each row, (B,) int64, from scores (B, V)."""
    if sampling.greedy and sampling.repetition_penalty == 1:
        return scores.argmax(-1)
    tokens = [sample(row_scores, sampling, row.seen, row.generator)
              for row_scores, row in zip(scores, rows)]
    for row, token in zip(rows, tokens):
        if row.seen is not None:
            row.seen.index_fill_(0, token[None], True)
    return torch.stack(tokens)


def logps_of(scores, chosen, sampling: Sampling):
    """The log-probabilities of the chosen tokens, (B,), at the sampling's temperature."""
    if not sampling.greedy:
        scores = scores / sampling.temperature
    return scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0]


def answer_each(model: CausalLM, prompts, stop_ids=(), sampling: Sampling = Sampling(), *,
                limit: Callable[[int], int], seed: int = 0, cache: KVCache | None = None,
                step: Callable = next_scores) -> Iterator[tuple[int, list[int]]]:
    """The slow twin of answer_all: generate(), one prompt after the other.

    Models that need it use it, too (see one_at_a_time). cache, step: see decode.pick_step.
    """
    cache = cache or KVCache(model.config.num_hidden_layers)
    for number, prompt in prompts:
        row = new_row(model, number, prompt, sampling, limit, seed)
        cache.crop(0)
        tokens = generate(model, prompt, cache, stop_ids, sampling, max_new_tokens=row.room,
                          generator=row.generator, step=step)
        yield number, list(tokens)


def one_at_a_time(model: CausalLM) -> str:
    """Why rows of different lengths cannot share a pass of this model, or ""."""
    rope_type = model.config.rope["rope_type"]
    if rope_type in LENGTH_DEPENDENT:
        return f"its rotation ({rope_type}) depends on the length of the sequence"
    return ""
