"""Which rows make which optimizer step, on which rank.

Requires: data.py, parallel.py.
Next: train.py.
"""
import math
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from parallel import Ranks
from runtime.build import COLLATE
from scale.fsdp import idle_batches


def batches_of(config, train_set, epoch, ranks: Ranks) -> list[list[int]]:
    """This rank's micro-batches of an epoch, lists of row numbers, dealt to the ranks in turn: in LLaMA-Factory's order
    or, with token_budget, rows of similar length; then every row comes once, and ranks may have one batch less."""
    seed = config.seed if config.data_seed is None else config.data_seed
    shuffle = not config.disable_shuffling
    if config.token_budget:         # made once, so that all epochs have as many of them; their order is another each time
        batches = budget_batches(epoch_order(len(train_set), seed, 0, shuffle),
                                 train_set.sizes.tolist().__getitem__, config.token_budget, alike=shuffle)
        return [batches[i] for i in epoch_order(len(batches), seed, epoch, shuffle)][ranks.rank::ranks.world]
    order = epoch_order(len(train_set), seed, epoch, shuffle)
    batches = micro_batches(order, config.per_device_train_batch_size, config.dataloader_drop_last)
    if ranks.world > 1 and config.even_batches:
        batches = evened(batches, config.per_device_train_batch_size, ranks.world, config.dataloader_drop_last)
    return batches[ranks.rank::ranks.world]


def rows_twice(config, train_set, ranks: Ranks) -> int:
    """How many rows an epoch has more than there are, on all ranks together."""
    dealt = sum(len(batch) for rank in range(ranks.world)
                for batch in batches_of(config, train_set, 0, Ranks(rank, ranks.world)))
    return max(0, dealt - len(train_set))


def steps_per_epoch(config, train_set, ranks: Ranks) -> int:
    """Optimizer steps of an epoch, the same number on all ranks: rank 0 is dealt the most micro-batches."""
    most = len(batches_of(config, train_set, 0, Ranks(0, ranks.world)))
    return math.ceil(most / config.gradient_accumulation_steps)


def rows_per_step(config, ranks: Ranks) -> int:
    """The rows of an optimizer step, over all ranks; with token_budget, the most tokens of one."""
    size = config.token_budget or config.per_device_train_batch_size
    return size * config.gradient_accumulation_steps * ranks.world


@dataclass
class Step:
    """What this rank learns from in an optimizer step."""
    number: int                 # counted from 1
    epoch: float                # passes over the data when it is done
    rows: list                  # numbers of its examples
    passes: list                # Batches, on the device
    idle: int                   # the first of them have no labels: they keep other ranks company (scale/fsdp.py)
    n_items: float              # labels, on all ranks together: counted first, divided by once
    tokens: float               # on all ranks together
    flops: float                # the same, as runtime/throughput.py counts them


def steps_of(config, train_set, device, ranks: Ranks, numbers, per_epoch, at_once, sharded, flops_of):
    """Yields the Steps of these numbers. The loop asks for the next one while the device works at the one before."""
    size, of_epoch, length = config.gradient_accumulation_steps, None, lambda row: int(train_set.sizes[row])
    make = partial(COLLATE[config.stage], alike=bool(config.token_budget))
    for number in numbers:
        epoch, nth = divmod(number - 1, per_epoch)                         # both 0-based
        if epoch != of_epoch:
            batches, of_epoch = batches_of(config, train_set, epoch, ranks), epoch
        micro = batches[nth * size:(nth + 1) * size]
        passes = [make([[train_set[i] for i in rows] for rows in group]) for group in joined(micro, length, at_once)]
        n_items, tokens, flops = ranks.total(*(sum(values) for values in (
            [batch.n_items for batch in passes], [len(batch.targets) for batch in passes],
            [flops_of(batch) for batch in passes])))
        idle = idle_batches(len(passes), make([[train_set[0]]]), ranks) if sharded else []
        yield Step(number, epoch + min(1.0, (nth + 1) * size / max(len(batches), 1)), [i for rows in micro for i in rows],
                   [batch.to(device) for batch in idle + passes], len(idle), n_items, tokens, flops)


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of n examples in an epoch (counted from 0): the permutation of accelerate's seedable sampler."""
    if not shuffle:
        return list(range(n))
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def micro_batches(order: list[int], size: int, drop_last: bool = False) -> list[list[int]]:
    """Consecutive `size` examples each; the last may be shorter, unless drop_last."""
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    return batches[:-1] if drop_last and batches and len(batches[-1]) < size else batches


def joined(batches: list[list[int]], tokens, limit: int) -> list[list[list[int]]]:
    """The micro-batches of an optimizer step as passes, each of as many neighbours as have at most `limit` tokens together.

    tokens(row): of that example. The step's loss is one sum, so it does not matter in how many passes it is computed.
    """
    passes, room = [], 0
    for batch in batches:
        size = sum(map(tokens, batch))
        if passes and size <= room:
            passes[-1].append(batch)
        else:
            passes.append([batch])
            room = limit
        room -= size
    return passes


def budget_batches(order: list[int], tokens, budget: int, alike: bool = True, window: int = 2048) -> list[list[int]]:
    """Micro-batches of as many rows as have at most `budget` tokens together (a longer row comes alone).

    tokens(row): of that example. alike: within each `window` of the order, rows of similar length come together.
    """
    if alike:
        order = [row for start in range(0, len(order), window) for row in sorted(order[start:start + window], key=tokens)]
    return [sum(batches, []) for batches in joined([[row] for row in order], tokens, budget)]


def evened(batches: list[list[int]], size: int, world: int, drop_last: bool = False) -> list[list[int]]:
    """The micro-batches with which `world` ranks, dealt to in turn, all have the same number of full ones.

    As accelerate does it: what lacks is filled up from the beginning of the epoch (or, with drop_last, left out).
    """
    if drop_last:
        return batches[:len(batches) - len(batches) % world]
    start = [row for batch in batches[:world] for row in batch]
    start = start * math.ceil(world * size / max(len(start), 1))            # fewer rows than one round asks for
    full, filler = list(batches), iter(start)
    if full and len(full[-1]) < size:
        full[-1] = full[-1] + list(islice(filler, size - len(full[-1])))
    while len(full) % world:
        full.append(list(islice(filler, size)))
    return full
