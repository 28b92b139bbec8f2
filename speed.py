"""How fast a run is: real tokens a second, and the share of what the device can do.

    python speed.py             how many TFLOP/s this machine's matrix products reach, in float32 and bfloat16

Model FLOPs are the arithmetic that training needs, not what a program happens to do: recomputing in the backward pass
earns nothing, padding is never counted, and attention is counted for the pairs of tokens that really see each other.

    for each token and weight of a matrix     2 forward, 2 for the gradient of its input, and 2 for its own if it learns
    for each pair that attention looks at     4 x query heads x head_dim in a layer forward, twice that backward

The embedding is a look-up and counts nothing; the head counts for every token, as in published figures, although here it is
applied to tokens with a label only; of a mixture the experts that a token visits count.

Read before: train.py (the loop). Read after: report.py (what is written of it).
Sources: 6 N for each token arXiv:2001.08361 (sec. 2.1), model FLOPs utilisation arXiv:2204.02311 (appendix B).
"""
import sys
import time
from dataclasses import dataclass

import torch

WARM_STEPS = 3                  # of a run: kernels are chosen, caches filled, parts compiled
LEAST_SECONDS = 1.0             # of steady state, below which its figures say nothing
MATRIX = {"cuda": 8192, "mps": 4096, "cpu": 1024}       # rows and columns of the products that are timed


# ---- arithmetic -------------------------------------------------------------------------------------------------


def matmul_parameters(model) -> tuple[float, float]:
    """(frozen, trained) weights that a token is multiplied with: those of matrices, the embedding apart, the head
    included even where it is the embedding; of a mixture, as many experts as a token visits."""
    shape, counts = model.config, [0.0, 0.0]
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.dim() > 1 and not name.startswith("model.embed_tokens."):
            visited = shape.num_experts_per_tok / shape.num_experts if ".experts." in name else 1
            counts[p.requires_grad] += p.numel() * visited
    return counts[0], counts[1]


def attention_pairs(length: int, window: int = 0, chunk: int = 0) -> int:
    """How many (token, token it sees) there are in a causal sequence: itself and all before it, at most `window` of
    them, and none of an earlier chunk."""
    if chunk and length > chunk:
        return length // chunk * attention_pairs(chunk, window) + attention_pairs(length % chunk, window)
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def training_flops(shape, frozen: float, trained: float, lengths) -> float:
    """Model FLOPs of a forward and backward pass over sequences of these lengths, in tokens.

    shape: a ModelConfig. frozen, trained: see matmul_parameters. Llama-3-8B with LoRA of rank 16 on all linear layers
    comes to 31.9e9 a token for sequences of 2048.
    """
    kinds = list(zip(shape.windows, shape.chunks))                       # of the layers, most of which are alike
    pairs = sum(kinds.count((window, chunk)) * sum(attention_pairs(n, window or 0, chunk or 0) for n in lengths)
                for window, chunk in set(kinds))
    return (4 * frozen + 6 * trained) * sum(lengths) + 12 * shape.num_attention_heads * shape.head_dim * pairs


def matrix_rate(device, dtype, seconds: float = 0.15) -> float:
    """FLOPs a second of large matrix products on this device, measured for about so long."""
    size = MATRIX[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out, best = a @ b, float("inf")                                      # the first one chooses a kernel
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def synchronize(device):
    """Wait until the device has done what it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def peak_memory(device) -> int:
    """The most bytes this process has held so far: of the GPU, or where there is none of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:                                                  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- the pace of a run ------------------------------------------------------------------------------------------


@dataclass
class Pace:
    """Tokens and seconds of the steps alone, without evaluation and saving: since the last logged line (`window`), and
    in steady state, after the first WARM_STEPS (`steady`)."""
    steps: int = 0
    window: tuple = (0.0, 0.0)              # tokens, seconds
    steady: tuple = (0.0, 0.0, 0.0)         # tokens, seconds, FLOPs
    start: float = 0.0

    def begin(self):
        """A step begins."""
        self.start = time.perf_counter()

    def end(self, tokens: float, flops: float):
        """It has ended; tokens and flops of all ranks."""
        seconds, self.steps = time.perf_counter() - self.start, self.steps + 1
        self.window = self.window[0] + tokens, self.window[1] + seconds
        if self.steps > WARM_STEPS:
            self.steady = self.steady[0] + tokens, self.steady[1] + seconds, self.steady[2] + flops

    @property
    def tokens_per_second(self) -> float:
        """Of the window."""
        return self.window[0] / max(self.window[1], 1e-9)

    def new_window(self):
        """A line has been logged."""
        self.window = 0.0, 0.0


def speed_results(pace: Pace, device, dtype, world: int = 1) -> dict:
    """What a run was like: peak memory and, if it was long enough, the speed of its steady state. The device's
    matrix rate is measured here, at the end: then it is as warm as it was in training, and nobody waits to begin."""
    found = {"peak_memory_gib": round(peak_memory(device) / 2**30, 3)}
    tokens, seconds, flops = pace.steady
    if seconds >= LEAST_SECONDS:
        rate = matrix_rate(device, dtype)
        found |= {"tokens_per_second": round(tokens / seconds, 1),
                  "model_tflops_per_second": round(flops / seconds / world / 1e12, 4),
                  "matrix_tflops_per_second": round(rate / 1e12, 4),
                  "model_flops_utilization": round(flops / seconds / world / rate, 4)}
    return found


if __name__ == "__main__":
    from attention import pick_device
    here = pick_device()
    for kind in (torch.float32, torch.bfloat16):
        print(f"{here}, {str(kind)[6:]}: {matrix_rate(here, kind) / 1e12:.3g} TFLOP/s")
