"""Answer many prompts at once: one reading of the weights gives a token to each of several rows.

    for number, tokens in answer_all(model, prompts, rows=8, stop_ids=stop_ids,
                                     limit=lambda length: 100):
        print(number, tokenizer.decode(tokens))         # in the order in which they end

New prompts lie end to end in one row of the model, as in training; attention keeps them apart, and
their keys and values go to a cache that has a row for each. Then every step reads one token of each
row, and attention sees what that row has filled. Where an answer ends, the next prompt takes its
row. Answers do not depend on how many are made at once: greedy ones are those of generate(),
sampled ones have a generator for each prompt.

Requires: generate.py (one prompt), attention.py (Filled).
Next: eval.py.
Source: rows that come and go in a running batch: Orca, Yu et al., OSDI 2022 (sec. 3.1).
"""
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from attention import Filled, PackedLayout
from generate import (
    Sampling,
    check_finite,
    check_prompt,
    generate,
    next_scores,
    sample,
    tokens_seen,
)
from model import CausalLM, KVCache
from rope import LENGTH_DEPENDENT

AT_ONCE = 8192  # tokens of new prompts in one pass
GROWTH = 256  # tokens by which the cache grows


@dataclass
class Row:
    """An answer in the making. room: tokens it may still have."""

    number: int
    prompt: list
    room: int
    generator: torch.Generator | None = None
    # for a repetition penalty, see generate.shape_logits
    seen: torch.Tensor | None = None
    said: list = field(default_factory=list)


class RowCache(KVCache):
    """Keys and values of up to `size` rows, each of its own length:

    a pair of buffers (size, K, room, Dh) per layer.
    """

    def __init__(self, num_layers: int, size: int, device):
        super().__init__(num_layers)
        self.size, self.device = size, device
        self.lengths = []  # tokens of each row
        # tokens of the prompts that the pass under way reads end to end
        self.coming = []
        # where it writes, if it reads one token of each row: (B,) int64
        self.places = None

    def update(self, layer: int, k, v):
        """Store k, v of one layer; return what attention is to see.

        Prompts (1, K, N, Dh) see themselves; single tokens (B, K, 1, Dh) see slots up to the
        longest row's end, (B, K, S, Dh), and `filled` tells which count.
        """
        B, held = len(self.lengths), self.with_room(layer, k)
        if self.coming:
            for buffer, new in zip(held, (k, v)):
                for row, part in enumerate(new[0].split(self.coming, dim=1), B):
                    buffer[row, :, : part.shape[1]] = part
            return k, v
        rows, slots = torch.arange(B, device=k.device), self.filled.mask.shape[-1]
        for buffer, new in zip(held, (k, v)):
            buffer[rows, :, self.places] = new[:, :, 0]
        return tuple(buffer[:B, :, :slots] for buffer in held)

    def with_room(self, layer: int, like):
        """The buffers of a layer, made larger where the pass under way asks for it.

        Zeros: a slot that does not count is multiplied by 0, and must not be NaN.
        """
        held, needed = self.buffers[layer], max([n + 1 for n in self.lengths] + self.coming)
        if held is None or held[0].shape[2] < needed:
            room, (_, K, _, Dh) = -(-needed // GROWTH) * GROWTH, like.shape
            pair = [like.new_zeros(self.size, K, room, Dh) for _ in range(2)]
            for new, old in zip(pair, held or ()):
                new[:, :, : old.shape[2]] = old
            held = self.buffers[layer] = pair
        return held

    def drop(self, row: int):
        """Forget a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for held in self.buffers:
                for buffer in held:
                    buffer[row, :, : self.lengths[last]] = buffer[last, :, : self.lengths[last]]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def read_prompts(self, model: CausalLM, prompts: list[list[int]]):
        """New rows. -> scores of the token after each, (n, V) float32."""
        self.coming = [len(prompt) for prompt in prompts]
        ids, positions = (
            torch.tensor([[i for row in rows for i in row]], device=self.device)
            # (1, N)
            for rows in (prompts, [range(n) for n in self.coming])
        )
        ends = torch.tensor(self.coming, device=self.device).cumsum(0) - 1
        # (n, D)
        hidden = model(ids, positions, PackedLayout(self.coming, self.device), cache=self)[0, ends]
        self.lengths, self.coming = self.lengths + self.coming, []
        return model.logits(hidden).float()

    def read_tokens(self, model: CausalLM, tokens: list[int]):
        """One more token of each row. -> scores of the one after it, (B, V) float32."""
        self.places = torch.tensor(self.lengths, device=self.device)
        slots = torch.arange(max(self.lengths) + 1, device=self.device)
        # (B, 1, 1, S)
        self.filled = Filled((slots <= self.places[:, None])[:, None, None])
        # (B, 1)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        # (B, D)
        hidden = model(ids, self.places[:, None], cache=self)[:, 0]
        self.lengths, self.filled = [n + 1 for n in self.lengths], None
        return model.logits(hidden).float()


@torch.no_grad()
def answer_all(
    model: CausalLM,
    prompts,
    rows: int,
    stop_ids=(),
    sampling: Sampling = Sampling(),
    *,
    limit: Callable[[int], int],
    seed: int = 0,
) -> Iterator[tuple[int, list[int]]]:
    """Answers to many prompts, `rows` of them at a time. Yields (number of a prompt, its tokens) as
    they end.

    prompts: (number, ids) pairs; a stop id that ends an answer is its last token. limit(tokens of
    the prompt): the most tokens of its answer. What is drawn depends on seed and number alone.
    Raises ValueError that names the prompt, see generate.check_prompt, and for scores that are not
    finite."""
    device = model.lm_head.weight.device
    cache, waiting, busy = (
        RowCache(model.config.num_hidden_layers, rows, device),
        deque(prompts),
        [],
    )
    while waiting or busy:
        scores = [cache.read_tokens(model, [row.said[-1] for row in busy])] if busy else []
        if new := take(model, waiting, rows - len(busy), sampling, limit, seed):
            scores.append(cache.read_prompts(model, [row.prompt for row in new]))
            check_finite(scores[-1], model)
            busy += new
        # the only wait of a step
        tokens = choose(torch.cat(scores), busy, sampling).tolist() if busy else []
        for place in reversed(range(len(busy))):
            row = busy[place]
            row.said.append(tokens[place])
            row.room -= 1
            if row.room <= 0 or tokens[place] in stop_ids:
                yield row.number, row.said
                cache.drop(place)
                busy[place] = busy[-1]
                busy.pop()


def take(model, waiting: deque, free: int, sampling, limit, seed) -> list[Row]:
    """Rows for the next prompts: as many as are free, or as make a pass of AT_ONCE tokens."""
    rows, tokens = [], 0
    while waiting and len(rows) < free and (not rows or tokens + len(waiting[0][1]) <= AT_ONCE):
        number, prompt = waiting.popleft()
        rows.append(new_row(model, number, prompt, sampling, limit, seed))
        tokens += len(prompt)
    return rows


def new_row(model, number: int, prompt: list, sampling, limit, seed) -> Row:
    """A row with a generator of its own. Raises ValueError that names it."""
    try:
        room = check_prompt(model, prompt, max(1, limit(len(prompt))))
    except ValueError as error:
        raise ValueError(f"row {number + 1}: {error}") from None
    device = model.lm_head.weight.device
    generator = (
        None if sampling.greedy else torch.Generator(device).manual_seed(2**20 * seed + number)
    )
    seen = tokens_seen(model, prompt) if sampling.repetition_penalty != 1 else None
    return Row(number, prompt, room, generator, seen)


def choose(scores, rows: list[Row], sampling: Sampling):
    """The next token of each row, (B,) int64, from scores (B, V)."""
    if sampling.greedy and sampling.repetition_penalty == 1:
        return scores.argmax(-1)
    chosen = torch.stack(
        [sample(mine, sampling, row.seen, row.generator) for mine, row in zip(scores, rows)]
    )
    for row, token in zip(rows, chosen):
        if row.seen is not None:
            row.seen.index_fill_(0, token[None], True)
    return chosen


def answer_each(
    model: CausalLM,
    prompts,
    stop_ids=(),
    sampling: Sampling = Sampling(),
    *,
    limit,
    seed: int = 0,
    cache: KVCache | None = None,
    step=next_scores,
) -> Iterator[tuple[int, list[int]]]:
    """answer_all by generate(), one prompt after the other: its slow twin, and the way of models
    that need it.

    cache, step: see decode.pick_step.
    """
    cache = cache or KVCache(model.config.num_hidden_layers)
    for number, prompt in prompts:
        row = new_row(model, number, prompt, sampling, limit, seed)
        cache.crop(0)
        yield (
            number,
            list(
                generate(
                    model,
                    prompt,
                    cache,
                    stop_ids,
                    sampling,
                    max_new_tokens=row.room,
                    generator=row.generator,
                    step=step,
                )
            ),
        )


def one_at_a_time(model: CausalLM) -> str:
    """Why rows of several lengths cannot share a pass of this model, or ""."""
    kind = model.config.rope["rope_type"]
    return (
        f"its rotation ({kind}) goes by the length of the sequence"
        if kind in LENGTH_DEPENDENT
        else ""
    )
