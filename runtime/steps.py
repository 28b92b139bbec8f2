"""Decide which rows make which optimizer step, on which rank.

    plan = StepPlan(config, train_set, stage, ranks, device)
    for step in plan.steps(after=0):
        step.batches                  # this rank's micro-batches, on the device
        step.num_items                # labels of the whole step, over all ranks: the divisor

The order of rows is LLaMA-Factory's (accelerate's seedable sampler). A step is a sum over counted
labels, so it does not depend on how its micro-batches are merged into passes.

Requires: data.py, parallel.py.
Next: train.py.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import torch
from torch.profiler import record_function

from data import IGNORE, Batch
from parallel import Ranks
from settings.config import in_steps

ENOUGH_BATCHES = 1_000_000      # micro-batches whose sizes are looked at one by one


@dataclass
class Step:
    """What one rank trains on in an optimizer step."""
    number: int                 # counted from 1
    epoch: float                # passes over the data when the step is done
    rows: list[int]             # numbers of its examples
    batches: list[Batch]        # on the device
    device: torch.device
    num_items: float            # labels, on all ranks together
    tokens: float               # on all ranks together
    flops: float                # on all ranks together, see runtime/throughput.py


class StepPlan:
    """The optimizer steps of a run.

    max_tokens_per_pass and count_flops are set when the memory and the model are known:
    max_tokens_per_pass: neighboring micro-batches with at most so many tokens together run as one
    pass (0: each one alone). count_flops(batch): model FLOPs of a batch.

    Raises ValueError if the rows make no batch.
    """

    def __init__(self, config, train_set, stage, ranks: Ranks, device: torch.device):
        self.config = config
        self.train_set = train_set
        self.ranks = ranks
        self.device = device
        self.collate = partial(stage.collate, alike=bool(config.token_budget))
        self.steps_per_epoch = self.count_steps_per_epoch()
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{len(train_set)} rows make no batch of {config.per_device_train_batch_size} "
                "(dataloader_drop_last: true leaves out the incomplete one)")
        # optimizer steps of what max_steps, save_steps and the like count: in stage ppo a rollout
        self.unit = config.steps_per_rollout if config.stage == "ppo" else 1
        by_epochs = math.ceil(config.num_train_epochs * self.steps_per_epoch / self.unit)
        self.total_steps = (config.max_steps if config.max_steps > 0 else by_epochs) * self.unit
        self.steps_put_back = 0     # by ignore_data_skip: the rows are those of so many steps ago
        self.max_tokens_per_pass = 0
        self.count_flops: Callable[[Batch], float] = lambda batch: 0.0
        self.prepared: Iterator[Step] = iter(())
        self.next_step: Step | None = None

    # ---- counts

    def count_steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, equal on all ranks: rank 0 has the most micro-batches."""
        most = len(shard_batches(self.config, self.train_set, 0, Ranks(0, self.ranks.world)))
        steps = math.ceil(most / self.config.batches_per_rollout)
        return steps * self.config.steps_per_rollout

    def in_steps(self, value: float) -> int:
        """A key's count (or below 1 a share) as a number of optimizer steps."""
        return in_steps(value, self.total_steps) * (self.unit if value >= 1 else 1)

    @property
    def rows_per_step(self) -> int:
        """Rows of a step over all ranks; with token_budget, the most tokens of a step.

        In stage ppo those of a rollout, which its steps share.
        """
        size = self.config.token_budget or self.config.per_device_train_batch_size
        return size * self.config.batches_per_rollout * self.ranks.world

    def all_micro_batches(self) -> Iterator[list[int]]:
        """The micro-batches of the whole run on all ranks, as lists of row numbers.

        Of a very long run those of its first epochs, and then the longest rows together, which is
        as large as a micro-batch can be.
        """
        seen = 0
        for epoch in range(math.ceil(self.total_steps / self.steps_per_epoch)):
            batches = shard_batches(self.config, self.train_set, epoch, Ranks())
            yield from batches
            seen += len(batches)
            if self.config.token_budget or self.config.disable_shuffling:
                return                              # each epoch has the same ones
            if seen >= ENOUGH_BATCHES:
                longest = self.train_set.sizes.argsort()[::-1]
                yield longest[:self.config.per_device_train_batch_size].tolist()
                return

    def repeated_rows(self) -> int:
        """Rows of an epoch that are trained on twice, over all ranks (even_batches)."""
        rows = 0
        for rank in range(self.ranks.world):
            ours = shard_batches(self.config, self.train_set, 0, Ranks(rank, self.ranks.world))
            rows += sum(map(len, ours))
        return max(0, rows - len(self.train_set))

    def pass_sizes(self, max_tokens: int) -> tuple[float, float]:
        """(micro-batches in a pass, tokens in a pass): the means of the first steps."""
        size = self.config.gradient_accumulation_steps
        batches = shard_batches(self.config, self.train_set, 0, self.ranks)[:1000]
        passes = 0
        for start in range(0, len(batches), size):
            step = batches[start:start + size]
            passes += len(merge_micro_batches(step, self.tokens_of, max_tokens))
        if not passes:                                  # a rank without a batch
            return 0.0, 0.0
        tokens = sum(map(self.tokens_of, chain.from_iterable(batches)))
        return len(batches) / passes, tokens / passes

    def tokens_of(self, row: int) -> int:
        return int(self.train_set.sizes[row])

    def ends_epoch(self, number: int) -> bool:
        """Whether an epoch, or the run, ends with this step."""
        at_end = (number - self.steps_put_back) % self.steps_per_epoch == 0
        return at_end or number == self.total_steps

    # ---- steps

    def peek(self, after: int) -> Step | None:
        """Prepare the step that follows step `after`, and return it without consuming it."""
        if self.config.ignore_data_skip:
            self.steps_put_back = after % self.steps_per_epoch
        self.prepared = self.make_steps(range(after + 1, self.total_steps + 1))
        self.next_step = next(self.prepared, None)
        return self.next_step

    def steps(self, after: int) -> Iterator[Step]:
        """The steps that follow step `after`."""
        if self.next_step is None or self.next_step.number != after + 1:
            self.peek(after)
        while self.next_step is not None:
            step = self.next_step
            self.next_step = None
            yield step
            if self.next_step is None:
                self.prefetch()

    @record_function("data")
    def prefetch(self):
        """Collate the next step and send it, while the device still computes the current one."""
        self.next_step = next(self.prepared, None)

    def make_steps(self, numbers: range) -> Iterator[Step]:
        size = self.config.batches_per_rollout
        repeats = self.config.steps_per_rollout
        epoch_of_batches = None
        for number in numbers:
            epoch, nth = divmod(number - 1 - self.steps_put_back, self.steps_per_epoch)
            if epoch != epoch_of_batches:
                batches = shard_batches(self.config, self.train_set, epoch, self.ranks)
                epoch_of_batches = epoch
            first = nth // repeats * size       # a rollout's steps have the same rows
            done = min(1.0, (nth + 1) * size / max(len(batches) * repeats, 1))
            yield self.make_step(number, epoch + done, batches[first:first + size])

    def make_step(self, number: int, epoch: float, micro_batches: list[list[int]]) -> Step:
        batches = []
        merged = merge_micro_batches(micro_batches, self.tokens_of, self.max_tokens_per_pass)
        for group in merged:
            batches.append(self.collate([[self.train_set[i] for i in rows] for rows in group]))
        num_items, tokens, flops = self.ranks.total(
            sum(batch.num_items for batch in batches),
            sum(len(batch.targets) for batch in batches),
            sum(self.count_flops(batch) for batch in batches),
        )
        if communicates_in_each_pass(self.config) and self.ranks.world > 1:
            example = self.collate([[self.train_set[0]]])
            batches = filler_batches(len(batches), example, self.ranks) + batches
        return Step(
            number=number,
            epoch=epoch,
            rows=list(chain.from_iterable(micro_batches)),
            batches=[batch.to(self.device) for batch in batches],
            device=self.device,
            num_items=num_items,
            tokens=tokens,
            flops=flops,
        )


def communicates_in_each_pass(config) -> bool:
    """Whether all ranks must run equally many passes."""
    return bool(config.fsdp) or config.zero_stage == 2 or config.expert_parallel_size > 1


def accumulation_for(config, world: int) -> int:
    """gradient_accumulation_steps; with rows_per_step it follows from the number of ranks.

    Raises ValueError if rows_per_step cannot be shared equally.
    """
    if not config.rows_per_step:
        return config.gradient_accumulation_steps
    at_once = config.per_device_train_batch_size * world
    if config.rows_per_step % at_once:
        raise ValueError(
            f"rows_per_step: {config.rows_per_step} is no multiple of the {at_once} rows that "
            f"{world} rank(s) take at a time (per_device_train_batch_size: "
            f"{config.per_device_train_batch_size}); make it one, or change that size")
    return config.rows_per_step // at_once


# ---- order and micro-batches --------------------------------------------------------------------


def shard_batches(config, train_set, epoch: int, ranks: Ranks) -> list[list[int]]:
    """This rank's micro-batches of an epoch, as lists of row numbers.

    Batches go to the ranks in turn, in LLaMA-Factory's order. With token_budget, rows of similar
    length come together; then every row comes once, and a rank may have one batch less.
    """
    seed = config.seed if config.data_seed is None else config.data_seed
    shuffle = not config.disable_shuffling
    if config.token_budget:     # made once: every epoch has the same batches, in another order
        order = epoch_order(len(train_set), seed, 0, shuffle)
        sizes = train_set.sizes.tolist()
        batches = budget_batches(order, sizes.__getitem__, config.token_budget, alike=shuffle)
        batches = [batches[i] for i in epoch_order(len(batches), seed, epoch, shuffle)]
        return batches[ranks.rank::ranks.world]
    size = config.per_device_train_batch_size
    order = epoch_order(len(train_set), seed, epoch, shuffle)
    batches = micro_batches(order, size, config.dataloader_drop_last)
    if ranks.world > 1 and config.even_batches:
        batches = pad_to_world(batches, size, ranks.world, config.dataloader_drop_last)
    return batches[ranks.rank::ranks.world]


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Order of n examples in an epoch (from 0), as accelerate's seedable sampler draws it."""
    if not shuffle:
        return list(range(n))
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(n, generator=generator).tolist()


def micro_batches(order: list[int], size: int, drop_last: bool = False) -> list[list[int]]:
    """Batches of `size` consecutive examples; the last may be shorter, unless drop_last."""
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    if drop_last and batches and len(batches[-1]) < size:
        batches.pop()
    return batches


def merge_micro_batches(batches: list[list[int]], tokens: Callable[[int], int],
                        limit: int) -> list[list[list[int]]]:
    """Merge neighbors into passes of at most `limit` tokens.

    tokens(row): tokens of that example. The step's loss is one sum, so the number of passes that
    compute it does not matter.
    """
    passes = []
    room = 0
    for batch in batches:
        size = sum(map(tokens, batch))
        if passes and size <= room:
            passes[-1].append(batch)
        else:
            passes.append([batch])
            room = limit
        room -= size
    return passes


def budget_batches(order: list[int], tokens: Callable[[int], int], budget: int,
                   alike: bool = True, window: int = 2048) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens (a longer row comes alone).

    tokens(row): tokens of that example. alike: sort each `window` of the order by length.
    """
    if alike:
        windows = [order[start:start + window] for start in range(0, len(order), window)]
        order = [row for rows in windows for row in sorted(rows, key=tokens)]
    return [sum(batches, []) for batches in merge_micro_batches([[row] for row in order], tokens,
                                                               budget)]


def pad_to_world(batches: list[list[int]], size: int, world: int,
                 drop_last: bool = False) -> list[list[int]]:
    """Make the number of full micro-batches a multiple of `world`, as accelerate does.

    Missing rows are taken from the beginning of the epoch (with drop_last, batches are left out).
    """
    if drop_last:
        return batches[:len(batches) - len(batches) % world]
    start = [row for batch in batches[:world] for row in batch]
    start = start * math.ceil(world * size / max(len(start), 1))    # fewer rows than one round
    filler = iter(start)
    full = list(batches)
    if full and len(full[-1]) < size:
        full[-1] = full[-1] + list(islice(filler, size - len(full[-1])))
    while len(full) % world:
        full.append(list(islice(filler, size)))
    return full


def filler_batches(count: int, example, ranks: Ranks) -> list:
    """Filler batches without labels, so that all ranks run equally many passes.

    count: micro-batches of this rank. example: any batch.
    """
    most = max(int(other) for other in ranks.gather(torch.tensor([count])))
    weights = example.row_weights
    filler = replace(
        example,
        targets=torch.full_like(example.targets, IGNORE),
        num_items=0,
        row_weights=None if weights is None else torch.zeros_like(weights),
        filler=True,
    )
    return [filler] * (most - count)
