"""The order in which the rows of several datasets are mixed (mix_strategy).

    order = mixed_order([3, 4], "interleave_under", None, seed=42)      # 0 3 1 4 2 5

Requires: nothing.
Next: text/data_files.py.

Strategies and draws are those of `interleave_datasets` in the package `datasets`, which
LLaMA-Factory calls with its `seed`.
"""
import numpy as np

DRAWN_AT_ONCE = 1000            # part of the format: another number would draw other rows


def mixed_order(lengths: list[int], strategy: str, probabilities: list[float] | None,
                seed: int) -> np.ndarray:
    """Numbers of rows, counted through datasets of these lengths, in the mixed order.

    concat: one dataset after the other. interleave_under: until one dataset is used up.
    interleave_over: until all are, the shorter ones again from their first row. probabilities: of
    each dataset to give the next row; None: they take turns.
    """
    if strategy == "concat" or len(lengths) == 1:
        return np.arange(sum(lengths))
    starts = np.cumsum([0, *lengths[:-1]])
    over = strategy == "interleave_over"
    if probabilities is None:
        rounds = np.arange(max(lengths) if over else min(lengths))
        return (rounds[:, None] % np.array(lengths) + starts).reshape(-1)
    return drawn_order(lengths, starts, over, np.array(probabilities), seed)


def drawn_order(lengths: list[int], starts: np.ndarray, over: bool, probabilities: np.ndarray,
                seed: int) -> np.ndarray:
    """mixed_order with a draw for each row."""
    generator = np.random.default_rng(seed)
    unfinished = set(range(len(lengths)))
    used = [0] * len(lengths)
    order = []
    while True:
        for dataset in generator.choice(len(lengths), DRAWN_AT_ONCE, p=probabilities).tolist():
            order.append(starts[dataset] + used[dataset])
            used[dataset] = (used[dataset] + 1) % lengths[dataset]
            if used[dataset] == 0:
                unfinished.discard(dataset)
            if not unfinished or not over and len(unfinished) < len(lengths):
                return np.array(order)
