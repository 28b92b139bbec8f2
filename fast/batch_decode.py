"""Answer many prompts at once: each reading of the weights gives a token to every row.

    for number, tokens in answer_all(model, prompts, rows=8, stop_ids=stop_ids,
                                     limit=lambda length: 100):
        print(number, tokenizer.decode(tokens))         # in the order in which they end

New prompts lie end to end in one row of the model, as in training; attention keeps them apart, and
their keys and values go to a cache that has a row for each. Then every step reads one token of each
row, and attention sees the filled slots of that row. When an answer ends, the next prompt takes its
row. Answers do not depend on how many are decoded at once: greedy answers equal the ones of
generate(), and sampled ones use a generator for each prompt.

`RunningBatch` is one step of this, for callers whose prompts arrive while it runs, each with
sampling and an adapter of its own.

Requires: generate.py (one prompt), attention.py (Filled).
Next: eval.py, fast/many_adapters.py.
Source: rows that join and leave a running batch: Orca, Yu et al., OSDI 2022 (sec. 3.1).
"""
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch

from attention import Filled, PackedLayout, to_device
from generate import (Sampling, TokenCounts, check_prompt, count_tokens, generate, next_scores,
                      not_finite, sample)
from layers import mixer_state_bytes
from model import CausalLM, KVCache
from rope import LENGTH_DEPENDENT

AT_ONCE = 8192          # tokens of new prompts in one pass
GROWTH = 256            # tokens by which the cache grows


@dataclass(eq=False)        # a row is itself, whatever it holds
class Row:
    """An answer that is being decoded."""
    number: int
    prompt: list[int]
    room: int                                       # tokens that may still be added
    stop_ids: Collection[int] = ()
    sampling: Sampling = Sampling()
    generator: torch.Generator | None = None
    counts: TokenCounts | None = None               # for penalties, see shape_logits
    adapter: str | None = None                      # of fast/many_adapters.py
    constraint: object = None       # .allowed(answer) -> (V,) bool, as in serving/constrain.py
    answer: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)    # of the answer's tokens, see decode_rows
    top: int = 0                # how many likeliest tokens to keep in top_logps
    top_logps: list[list[tuple[int, float]]] = field(default_factory=list)  # of unchanged logits
    error: Exception | None = None                  # why it ended without an answer


class RowCache(KVCache):
    """Cache of keys, values and states of up to `size` rows of different lengths.

    Attention: a pair of buffers (size, K, room, Dh) per layer. Mixers with a state: (size, …).
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

    def state(self, layer: int):
        """The state of all rows when decoding a token each; None for new prompts."""
        if self.prompt_lengths:
            return None
        return tuple(buffer[:len(self.lengths)] for buffer in self.states[layer])

    def keep_state(self, layer: int, state: tuple):
        """Store the state of new prompts behind the rows, or of all rows."""
        start = len(self.lengths) if self.prompt_lengths else 0
        if layer not in self.states:
            self.states[layer] = tuple(x.new_zeros(self.size, *x.shape[1:]) for x in state)
        for buffer, new in zip(self.states[layer], state):
            buffer[start:start + len(new)] = new

    def advance(self, tokens: int):
        """Does nothing: read_prompts and read_tokens count the tokens of each row."""

    def drop(self, row: int):
        """Remove a row; the last row moves to its index."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if row == last:
            return
        for pair in filter(None, self.buffers):
            for buffer in pair:
                buffer[row, :, :length] = buffer[last, :, :length]
        for state in self.states.values():
            for buffer in state:
                buffer[row] = buffer[last]
        self.lengths[row] = length

    def forget_after(self, rows: int):
        """Keep the first `rows` rows, after a pass that failed."""
        self.lengths = self.lengths[:rows]
        self.prompt_lengths = []

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
    states = [mixer_state_bytes(config, layer, dtype) for layer in range(config.num_hidden_layers)]
    attention = sum(map(config.attends, range(config.num_hidden_layers)))
    heads = 2 * attention * config.num_key_value_heads
    return rows * (room * heads * config.head_dim * dtype.itemsize + sum(states))


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
    batch = RunningBatch(model, rows, with_logps)
    waiting = deque(prompts)
    while waiting or batch.rows:
        new = take(model, waiting, batch.free, stop_ids, sampling, limit, seed)
        for row in batch.step(new):
            if row.error:
                raise row.error
            yield row


class RunningBatch:
    """Rows that are decoded together. They join and leave between two steps.

    adapters: of fast/many_adapters.py, None where the rows have none of their own. with_logps: see
    decode_rows.
    """

    def __init__(self, model: CausalLM, size: int, with_logps: bool = False, adapters=None):
        self.model = model
        self.size = size
        self.with_logps = with_logps
        self.adapters = adapters
        device = model.lm_head.weight.device
        self.cache = RowCache(model.config.num_hidden_layers, size, device)
        self.rows = []                                      # in the order of the cache's rows

    @property
    def free(self) -> int:
        """How many rows may join."""
        return self.size - len(self.rows)

    @torch.no_grad()
    def step(self, new: list[Row]) -> list[Row]:
        """Read the prompts of new rows and the last token of the others; add a token to each row.

        Returns the rows that have ended. A row with an `error` has ended without a token: its
        prompt could not be read, or its scores are not finite. The other rows do not notice.
        """
        scores = []
        if self.rows:
            self.for_rows(self.rows, [1] * len(self.rows))
            tokens = [row.answer[-1] for row in self.rows]
            scores.append(self.cache.read_tokens(self.model, tokens))
        ended = []
        if new:
            self.for_rows(new, [len(row.prompt) for row in new])
            try:
                scores.append(self.cache.read_prompts(self.model, [row.prompt for row in new]))
                self.rows = self.rows + new
            except RuntimeError as error:                   # of a device without memory
                self.cache.forget_after(len(self.rows))
                for row in new:
                    row.error = error
                ended += new
        return ended + (self.add_tokens(torch.cat(scores)) if self.rows else [])

    def for_rows(self, rows: list[Row], counts: list[int]):
        """Tell the adapters which tokens of the next pass are whose."""
        if self.adapters is not None:
            self.adapters.assign([row.adapter for row in rows], counts)

    def add_tokens(self, scores) -> list[Row]:
        """Choose each row's next token by its scores, (B, V); returns the rows that have ended."""
        chosen = choose(scores, self.rows)                                          # (B,)
        parts = [chosen.float(), scores.isfinite().all(-1)]     # exact: ids are below 2^24
        if self.with_logps:
            parts.append(logps_of(scores, chosen, self.rows))
        keep_likeliest(scores, chosen, self.rows)
        found = torch.stack(parts, 1).tolist()      # the only wait for the device in a step
        ended = []
        for index in reversed(range(len(self.rows))):
            row = self.rows[index]
            token, finite, *logp = found[index]
            if not finite and not row.answer:
                row.error = not_finite(self.model)
            else:
                row.answer.append(int(token))
                row.logps += logp
                row.room -= 1
            if row.error or row.room <= 0 or row.answer[-1] in row.stop_ids:
                ended.append(row)
                self.drop(index)
        return ended

    def drop(self, index: int):
        """Remove a row; the last one takes its place."""
        self.cache.drop(index)
        self.rows[index] = self.rows[-1]
        self.rows.pop()


class OneRow(RunningBatch):
    """The slow twin of RunningBatch: one row at a time, by generate(), without log-probabilities.

    Models that need it use it, too (see one_at_a_time).
    """

    def __init__(self, model: CausalLM, size: int = 1, adapters=None):
        super().__init__(model, 1, adapters=adapters)
        self.tokens = None              # of the row, as they are made

    def step(self, new: list[Row]) -> list[Row]:
        """As RunningBatch.step."""
        for row in new:
            cache = KVCache(self.model.config.num_hidden_layers)
            self.rows = [row]
            self.tokens = generate(self.model, row.prompt, cache, (), row.sampling,
                                   max_new_tokens=row.room, generator=row.generator)
        row = self.rows[0]
        self.for_rows(self.rows, [1 if row.answer else len(row.prompt)])
        try:
            row.answer.append(next(self.tokens))
        except (ValueError, RuntimeError) as error:
            row.error = error
        row.room -= 1
        if row.error or row.room <= 0 or row.answer[-1] in row.stop_ids:
            self.drop(0)
            return [row]
        return []

    def drop(self, index: int):
        """Remove the row."""
        self.rows = []


def take(model: CausalLM, waiting: deque, free: int, stop_ids: Collection[int],
         sampling: Sampling, limit: Callable, seed: int) -> list[Row]:
    """Rows for the next prompts: at most `free`, and at most AT_ONCE tokens unless it is one."""
    rows = []
    tokens = 0
    while waiting and len(rows) < free:
        number, prompt = waiting[0]
        if rows and tokens + len(prompt) > AT_ONCE:
            break
        waiting.popleft()
        rows.append(new_row(model, number, prompt, stop_ids, sampling, limit, seed))
        tokens += len(prompt)
    return rows


def new_row(model: CausalLM, number: int, prompt: list[int], stop_ids: Collection[int],
            sampling: Sampling, limit: Callable, seed: int) -> Row:
    """A row with a generator of its own. Raises ValueError that names the row."""
    try:
        room = check_prompt(model, prompt, max(1, limit(len(prompt))))
    except ValueError as error:
        raise ValueError(f"row {number + 1}: {error}") from None
    row = Row(number=number, prompt=prompt, room=room, stop_ids=stop_ids, sampling=sampling)
    start_sampling(row, model, 2**20 * seed + number)
    return row


def start_sampling(row: Row, model: CausalLM, seed: int):
    """Give a row its generator and, for penalties, its counts."""
    if not row.sampling.greedy:
        row.generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    if row.sampling.penalizes:
        row.counts = count_tokens(model, row.prompt)


def choose(scores, rows: list[Row]):
    """The next token of each row, (B,) int64, from scores (B, V)."""
    if all(row.sampling.greedy and not (row.counts or row.constraint) for row in rows):
        return scores.argmax(-1)
    tokens = []
    for row_scores, row in zip(scores, rows):
        if row.constraint:
            row_scores = row_scores.masked_fill(~row.constraint.allowed(row.answer), -torch.inf)
        tokens.append(sample(row_scores, row.sampling, row.counts, row.generator))
    return torch.stack(tokens)


def logps_of(scores, chosen, rows: list[Row]):
    """The log-probabilities of the chosen tokens, (B,), at the temperature of each row."""
    heat = [1.0 if row.sampling.greedy else row.sampling.temperature for row in rows]
    if set(heat) != {1.0}:
        scores = scores / to_device(torch.tensor(heat), scores.device)[:, None]
    return scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0]


def keep_likeliest(scores, chosen, rows: list[Row]):
    """Append to top_logps, for rows that ask for it: the chosen token and the likeliest ones.

    Their log-probabilities are the model's own, before penalties, temperature and filters.
    """
    for index, row in enumerate(rows):
        if row.top:
            logps = scores[index].log_softmax(-1)                                   # (V,)
            best, ids = logps.topk(row.top)
            pairs = zip([int(chosen[index]), *ids.tolist()],
                        [float(logps[chosen[index]]), *best.tolist()])
            row.top_logps.append(list(pairs))


def answer_each(model: CausalLM, prompts, stop_ids=(), sampling: Sampling = Sampling(), *,
                limit: Callable[[int], int], seed: int = 0, cache: KVCache | None = None,
                step: Callable = next_scores) -> Iterator[tuple[int, list[int]]]:
    """The slow twin of answer_all: generate(), one prompt after the other.

    Models that need it use it, too (see one_at_a_time). cache, step: see decode.pick_step.
    """
    cache = cache or KVCache(model.config.num_hidden_layers)
    for number, prompt in prompts:
        row = new_row(model, number, prompt, stop_ids, sampling, limit, seed)
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
