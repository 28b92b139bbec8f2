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
import bisect
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from quant import quantised_weights

WARM_STEPS = 3                  # of a run: kernels are chosen, caches filled, parts compiled
LEAST_SECONDS = 1.0             # of steady state, below which its figures say nothing
MATRIX = {"cuda": 8192, "mps": 4096, "cpu": 1024}       # rows and columns of the products that are timed


# ---- arithmetic -------------------------------------------------------------------------------------------------


def matmul_parameters(model) -> tuple[float, float]:
    """(frozen, trained) weights that a token is multiplied with: those of matrices, the embedding apart, the head
    included even where it is the embedding; of a mixture, as many experts as a token visits."""
    shape, counts = model.config, [0.0, 0.0]
    for name, p in (*model.named_parameters(remove_duplicate=False), *quantised_weights(model).items()):
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
    return (4 * frozen + 6 * trained) * sum(lengths) + 3 * attention_flops(shape, lengths)


def forward_flops(shape, weights: float, lengths) -> float:
    """Model FLOPs of a forward pass alone, with so many weights of matrices, over sequences of these lengths."""
    return 2 * weights * sum(lengths) + attention_flops(shape, lengths)


def attention_flops(shape, lengths) -> float:
    """Of a forward pass, for the pairs of tokens that see each other."""
    kinds = list(zip(shape.windows, shape.chunks))                       # of the layers, most of which are alike
    pairs = sum(kinds.count((window, chunk)) * sum(attention_pairs(n, window or 0, chunk or 0) for n in lengths)
                for window, chunk in set(kinds))
    return 4 * shape.num_attention_heads * shape.head_dim * pairs


@torch.no_grad()
def matrix_rate(device, dtype, product=F.linear, seconds: float = 0.15) -> float:
    """FLOPs a second of large matrix products on this device, measured for about so long. product: see linear.py."""
    size = MATRIX[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product(a, b)                                                        # the first one chooses a kernel
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        product(a, b)
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


def speed_results(pace: Pace, device, dtype, world: int = 1, product=F.linear) -> dict:
    """What a run was like: peak memory and, if it was long enough, the speed of its steady state. The device's
    matrix rate is measured here, at the end: then it is as warm as it was in training, and nobody waits to begin."""
    found = {"peak_memory_gib": round(peak_memory(device) / 2**30, 3)}
    tokens, seconds, flops = pace.steady
    if seconds >= LEAST_SECONDS:
        rate = matrix_rate(device, dtype, product)
        found |= {"tokens_per_second": round(tokens / seconds, 1),
                  "model_tflops_per_second": round(flops / seconds / world / 1e12, 4),
                  "matrix_tflops_per_second": round(rate / 1e12, 4),
                  "model_flops_utilization": round(flops / seconds / world / rate, 4)}
    return found


# ---- where a step's time goes -----------------------------------------------------------------------------------

PROFILED = 3                    # steps, after the first WARM_STEPS or as late as the run allows
part = torch.profiler.record_function       # a named part of a step; without a profiler, it costs a microsecond
PARTS = ("data", "reference", "forward", "loss", "backward", "communication", "optimizer", "waiting")
KINDS = (("attention", ("attention", "scaleddotproduct", "flash")),      # by what the name of an operation contains
         ("matrices", ("::mm", "addmm", "::bmm", "baddbmm", "scaled_mm", "grouped_mm", "linear_pointwise")))
OTHER = "norms, activations, copies"


class StepProfile:
    """The key `profile`: a few steps under torch.profiler, as a table and a trace (for chrome://tracing, ui.perfetto.dev)
    in the folder. folder None: nothing happens."""

    def __init__(self, folder, device):
        self.folder, self.device, self.steps, self.profiler = folder, device, 0, None

    def step(self, number: int, last: int):
        """The number-th step of this run begins, of `last`."""
        first = max(1, min(WARM_STEPS + 1, last - PROFILED + 1))
        if self.folder and number == first:
            kinds = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(
                activities=[kinds.CPU, *([kinds.CUDA] if self.device.type == "cuda" else [])])
            self.profiler.start()
            self.start = time.perf_counter()
        elif self.profiler and number == first + PROFILED:
            self.finish()
        self.steps += self.profiler is not None

    def finish(self):
        """Write and print what was seen, if that has not been done."""
        if not self.profiler:
            return
        synchronize(self.device)
        seconds, profiler, self.profiler = time.perf_counter() - self.start, self.profiler, None
        profiler.stop()
        profiler.export_chrome_trace(str(self.folder / "profile_trace.json.gz"))
        text = "\n".join(profile_table(profiler.events(), seconds, self.steps, self.device))
        (self.folder / "profile.txt").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n  written to {self.folder}: profile.txt, profile_trace.json.gz", flush=True)
        self.folder = None


def profile_table(events, seconds: float, steps: int, device) -> list[str]:
    """Milliseconds of a step by part and kind of operation: on a GPU those of its kernels, else those of the CPU.

    events: of torch.profiler. The backward pass of a GPU runs in a thread of its own, so an operation belongs to the part
    in whose time it starts, not to that which calls it.
    """
    marks = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.name in PARTS and in_host(e))
    spent = {}
    for event in events:
        if in_host(event):
            before = bisect.bisect(marks, (event.time_range.start, float("inf")))
            inside = [name for start, end, name in reversed(marks[max(0, before - 2):before])      # loss lies in forward
                      if event.time_range.start < end]
            place = inside[0] if inside else "the rest of the loop", kind_of(event)
            spent[place] = spent.get(place, 0.0) + self_time(event, device) / 1000 / steps
    whole = 1000 * seconds / steps
    if device.type == "cuda":
        spent["the GPU waits", ""] = max(0.0, whole - sum(spent.values()))
    order = [*PARTS, "the rest of the loop", "the GPU waits"]
    lines = [f"where the time of a step goes: {whole:.1f} ms, mean of {steps}"]
    for name in order:
        rows = {kind: ms for (where, kind), ms in spent.items() if where == name and ms >= 0.0005 * whole}
        if rows:
            lines.append(f"  {name:<30}{sum(rows.values()):>10.1f} ms {sum(rows.values()) / whole:>7.1%}")
        if len(rows) > 1:
            lines += [f"    {kind:<28}{ms:>10.1f} ms {ms / whole:>7.1%}" for kind, ms in sorted(rows.items())]
    return lines


def in_host(event) -> bool:
    """Is this something the host did, and no kernel of a GPU (which is counted with what has started it)?"""
    return event.device_type == torch.autograd.DeviceType.CPU


def self_time(event, device) -> float:
    """Microseconds of an operation without those it is made of."""
    if device.type == "cuda":
        return getattr(event, "self_device_time_total", None) or getattr(event, "self_cuda_time_total", 0.0)
    return event.self_cpu_time_total


def kind_of(event) -> str:
    """attention, matrices, or the rest: by the name of the operation, or of one that it is a part of."""
    for kind, words in KINDS:
        seen = event
        while seen is not None and not any(word in seen.name.lower() for word in words):
            seen = seen.cpu_parent
        if seen is not None:
            return kind
    return OTHER


if __name__ == "__main__":
    from attention import pick_device
    here = pick_device()
    for kind in (torch.float32, torch.bfloat16):
        print(f"{here}, {str(kind)[6:]}: {matrix_rate(here, kind) / 1e12:.3g} TFLOP/s")
