"""The longest row that Llama-3-8B with a 4-bit base trains on, in 8, 24 and 80 GB of one card.

    python bench/gpu_long.py long-24gb
    python bench/gpu_long.py long-80gb                      minutes: attention is quadratic
    python bench/gpu_long.py long-8gb --device cpu --tiny   the same code, without a limit

torch may allocate that much and no more (set_per_process_memory_fraction), less what a CUDA context
takes. Everything that saves memory is on: blocks are checkpointed, their inputs wait in the host's
memory, MLPs are computed in tiles, the embedding stays in the host's memory, the loss comes in
chunks. A row fits if a whole step has run: forward, loss, backward, AdamW. First comes the row of
the goal; then longer ones while time is left, or shorter ones until one fits.

Requires: gpu_speed.py.
Next: gpu.py; fast/offload_inputs.py, fast/tiled_mlp.py.
Source: Unsloth's published lengths for QLoRA of rank 32 on an 8B model.
"""
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench.common import report_figures, run_part
from bench.gpu_speed import Case, Run, start, steps_of
from fast.offload_inputs import offload_inputs
from fast.tiled_mlp import tile_mlps
from runtime.device import out_of_memory
from runtime.kernels import use_kernels
from runtime.offload import EmbeddingOutside
from runtime.throughput import peak_memory, synchronize

CONTEXT_BYTES = 600 * 2**20     # of a CUDA context: not torch's, and on a small card not free
TILE = 4096                     # tokens of an MLP at a time
LONGER, SHORTER = 1.15, 0.8     # the next row to try
SHORTEST = 256
CASE = Case("llama-3-8b", (), base="nf4")


def save_memory(run: Run, tile: int):
    """Set all that saves memory on the blocks; it may be set again after a step that failed."""
    blocks = run.model.model.layers
    use_kernels(run.model, run.kernels, ["block"] * len(blocks))
    tile_mlps(run.model, tile)
    offload_inputs(run.model, len(blocks))


def trains(run: Run, tokens: int, tile: int) -> bool:
    """Whether a step with one row of so many tokens fits."""
    following = steps_of(run, [tokens])
    try:
        run.step(next(following), iter([None]))
        synchronize(run.device)
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    run.gradients.zero()
    save_memory(run, tile)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def longest_row(fits: Callable[[int], bool], goal: int, seconds: float) -> tuple[int, int | None]:
    """(the longest row that fits, the shortest that does not or None), in tokens.

    From `goal` on; longer rows while the next one is likely to end within `seconds`.
    """
    begun = time.perf_counter()
    length, too_long = goal, None
    while not fits(length):
        if length <= SHORTEST:
            return 0, length
        too_long = length
        length = max(SHORTEST, int(length * SHORTER))
    if too_long:
        return length, too_long
    took = time.perf_counter() - begun
    while time.perf_counter() - begun + took * LONGER ** 2 < seconds:
        report_figures("partial", longest_row=length)
        last = time.perf_counter()
        longer = int(length * LONGER)
        if not fits(longer):
            return length, longer
        length, took = longer, time.perf_counter() - last
    return length, None


def measure(asked, gigabytes: int, goal: int) -> dict:
    """A part: the longest row within so many gigabytes (10**9 bytes)."""
    run = start(CASE, asked, recompute="block")
    if run.device.type == "cuda":
        run.model.model.embed_tokens = EmbeddingOutside(run.model.model.embed_tokens)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        share = (gigabytes * 10**9 - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        torch.cuda.reset_peak_memory_stats()
    tile, first = (16, 64) if asked.tiny else (TILE, goal)
    save_memory(run, tile)
    begun = time.perf_counter()
    found, too_long = longest_row(partial(trains, run, tile=tile), first, 5 * asked.seconds)
    seconds = time.perf_counter() - begun
    edge = f"{too_long:,} do not fit" if too_long else "longer ones were not tried for want of time"
    return {"says": f"a row of {found:,} tokens trains in {gigabytes} GB; {edge}",
            "longest_row": found, "too_long": too_long, "gigabytes": gigabytes,
            "peak_gib": peak_memory(run.device) / 2**30, "seconds_of_steps": seconds,
            "kernel": run.kernels.attention}


PARTS = {
    "long-8gb": partial(measure, gigabytes=8, goal=3_000),
    "long-24gb": partial(measure, gigabytes=24, goal=80_000),
    "long-80gb": partial(measure, gigabytes=80, goal=350_000),
}

if __name__ == "__main__":
    run_part(PARTS)
