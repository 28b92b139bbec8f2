"""How fast a run is: tokens per second, and the share of what the device can do.

    python -m runtime.throughput        TFLOP/s of this machine's matrix products, two dtypes

Model FLOPs are the arithmetic that training needs, not what an implementation executes:
recomputation in the backward pass does not count, padding does not count, and attention counts the
pairs of tokens that attend to each other.

    per token and matrix weight    2 forward, 2 for the gradient of the input, and 2 for the
                                   gradient of the weight if it is trained
    per pair of tokens and layer   4 x query heads x head_dim forward, twice that backward

The embedding is a look-up and does not count. The head counts for every token, as in published
figures, although it is applied here only to tokens with a label. In a mixture of experts, only the
experts that a token is routed to count.

Requires: model.py, checkpoint/load.py.
Next: runtime/report.py (writes the results), train.py (the loop).

Papers: 6 N per token arXiv:2001.08361 (sec. 2.1), model FLOPs utilization arXiv:2204.02311
(appendix B).
"""
import bisect
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.load import count_parameters, quantized_weights
from checkpoint.shards import full_size
from families import ModelConfig

WARM_STEPS = 3                  # first steps of a run: kernels are chosen, caches filled
LEAST_SECONDS = 1.0             # of steady state; a shorter run reports no throughput
MATRIX = {"cuda": 8192, "mps": 4096, "cpu": 1024}       # rows and columns of the timed matrices


# ---- arithmetic ---------------------------------------------------------------------------------


def matmul_parameters(model: nn.Module, part: str = "") -> tuple[float, float]:
    """(frozen, trained) numbers of weights that a token is multiplied with.

    These are the matrices without the embedding, with the head even if it is tied, and of a mixture
    only the experts that a token is routed to. part: the beginning of the names of those to count.
    """
    model_config = model.config
    frozen = 0.0
    trained = 0.0
    parameters = model.named_parameters(remove_duplicate=False)
    for name, p in (*parameters, *quantized_weights(model).items()):
        if p.dim() < 2 or name.startswith("model.embed_tokens.") or not name.startswith(part):
            continue
        used = 1
        if ".experts." in name:
            used = model_config.num_experts_per_tok / model_config.num_experts
        if p.requires_grad:
            trained += full_size(p) * used
        else:
            frozen += full_size(p) * used
    return frozen, trained


def attention_pairs(length: int, window: int = 0, chunk: int = 0) -> int:
    """Number of (query, key) pairs of a causal sequence.

    A token attends to itself and the tokens before it: at most `window` of them in all, and none of
    an earlier chunk. 0: no window, no chunks.
    """
    if chunk and length > chunk:
        full_chunks = length // chunk * attention_pairs(chunk, window)
        return full_chunks + attention_pairs(length % chunk, window)
    keys = min(length, window or length)
    return keys * (keys + 1) // 2 + (length - keys) * keys


def training_flops(model_config: ModelConfig, frozen: float, trained: float,
                   lengths: Sequence[int]) -> float:
    """Model FLOPs of a forward and backward pass over sequences of these lengths, in tokens.

    frozen, trained: see matmul_parameters. Llama-3-8B with LoRA of rank 16 on all linear layers
    needs 31.9e9 per token for sequences of 2048.
    """
    matrices = (4 * frozen + 6 * trained) * sum(lengths)
    return matrices + 3 * attention_flops(model_config, lengths)


def forward_flops(model_config: ModelConfig, weights: float, lengths: Sequence[int]) -> float:
    """Model FLOPs of a forward pass alone. weights: their number, see matmul_parameters."""
    return 2 * weights * sum(lengths) + attention_flops(model_config, lengths)


def attention_flops(model_config: ModelConfig, lengths: Sequence[int]) -> float:
    """FLOPs of attention in a forward pass, for the pairs of tokens that attend to each other."""
    kinds = Counter((model_config.windows[layer], model_config.chunks[layer])    # most are alike
                    for layer in range(len(model_config.mixers)) if model_config.attends(layer))
    pairs = 0
    for (window, chunk), layers in kinds.items():
        pairs += layers * sum(attention_pairs(n, window or 0, chunk or 0) for n in lengths)
    return 4 * model_config.num_attention_heads * model_config.head_dim * pairs


def flops_of_batch(model_config: ModelConfig, frozen: float, trained: float, reference: float,
                   batch) -> float:
    """Model FLOPs of a training batch, and of the reference model's forward passes if it has one.

    frozen, trained, reference: numbers of weights, see matmul_parameters.
    batch.kl_batch: mismatched pairs for KTO's KL term, a forward pass of both models.
    """
    flops = training_flops(model_config, frozen, trained, batch.lengths)
    if reference:
        flops += forward_flops(model_config, reference, batch.lengths)
    if batch.kl_batch is not None:
        lengths = batch.kl_batch.lengths
        flops += (forward_flops(model_config, frozen + trained, lengths)
                  + forward_flops(model_config, reference, lengths))
    return flops


def total_flos(model: nn.Module, tokens: int) -> float:
    """6 x parameters (without the embedding) x tokens, as LLaMA-Factory's results count it."""
    return 6.0 * (count_parameters(model) - full_size(model.model.embed_tokens.weight)) * tokens


# ---- measurements -------------------------------------------------------------------------------


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype, matmul: Callable = F.linear,
                seconds: float = 0.15) -> float:
    """FLOP/s of large matrix products on this device.

    matmul: a function of fast/matmul.py. seconds: how long to measure; the best time counts.
    """
    size = MATRIX[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    matmul(a, b)                                            # the first call chooses a kernel
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        matmul(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def synchronize(device: torch.device):
    """Wait until the device has finished its work; a no-op on a CPU."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has used so far: of the GPU or, on a CPU, of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:                                     # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- the throughput of a run --------------------------------------------------------------------


@dataclass
class Pace:
    """Tokens and seconds of the steps alone, without evaluation and saving.

    window: since the last logged line. steady: since the first WARM_STEPS.
    """
    steps: int = 0
    window_tokens: float = 0.0
    window_seconds: float = 0.0
    steady_tokens: float = 0.0
    steady_seconds: float = 0.0
    steady_flops: float = 0.0
    step_start: float = 0.0

    def begin(self):
        """Call at the start of a step."""
        self.step_start = time.perf_counter()

    def end(self, tokens: float, flops: float):
        """Call at the end of a step. tokens, flops: of all ranks."""
        seconds = time.perf_counter() - self.step_start
        self.steps += 1
        self.window_tokens += tokens
        self.window_seconds += seconds
        if self.steps > WARM_STEPS:
            self.steady_tokens += tokens
            self.steady_seconds += seconds
            self.steady_flops += flops

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second since the last logged line."""
        return self.window_tokens / max(self.window_seconds, 1e-9)

    def new_window(self):
        """Call after a line has been logged."""
        self.window_tokens = 0.0
        self.window_seconds = 0.0


def speed_results(pace: Pace, device: torch.device, dtype: torch.dtype, world: int = 1,
                  matmul: Callable = F.linear) -> dict[str, float]:
    """speed_results.json: peak memory and, for a long enough run, its steady throughput.

    The device's matrix rate is measured here, at the end: the device is then as warm as it was in
    training, and the run did not have to wait for it.
    """
    found = {"peak_memory_gib": round(peak_memory(device) / 2**30, 3)}
    seconds = pace.steady_seconds
    if seconds < LEAST_SECONDS:
        return found
    found["tokens_per_second"] = round(pace.steady_tokens / seconds, 1)
    if math.isnan(pace.steady_flops):
        return found
    rate = matrix_rate(device, dtype, matmul)
    return found | {
        "model_tflops_per_second": round(pace.steady_flops / seconds / world / 1e12, 4),
        "matrix_tflops_per_second": round(rate / 1e12, 4),
        "model_flops_utilization": round(pace.steady_flops / seconds / world / rate, 4),
    }


# ---- the profile of a step ----------------------------------------------------------------------

PROFILED = 3                    # steps, after the first WARM_STEPS or as late as the run allows
part = torch.profiler.record_function       # a named part of a step; 1 microsecond if not profiled
PARTS = (
    "data",
    "reference",
    "forward",
    "loss",
    "backward",
    "communication",
    "optimizer",
    "waiting",
)
REST = "rest of the loop"
GPU_IDLE = "GPU idle"
# kind of operation -> strings that the name of an operation contains
KINDS = {
    "attention": ("attention", "scaleddotproduct", "flash"),
    "matmul": (
        "::mm",
        "addmm",
        "::bmm",
        "baddbmm",
        "scaled_mm",
        "grouped_mm",
        "linear_pointwise",
    ),
}
OTHER = "norms, activations, copies"


class StepProfile:
    """The key `profile`: a few steps under torch.profiler, as a table and a trace in `folder`.

    The trace opens in chrome://tracing or ui.perfetto.dev. folder None: do nothing.
    """

    def __init__(self, folder: Path | None, device: torch.device):
        self.folder = folder
        self.device = device
        self.steps = 0
        self.profiler = None

    def step(self, number: int, last: int):
        """Call at the start of step `number` of this run, which ends with step `last`."""
        first = max(1, min(WARM_STEPS + 1, last - PROFILED + 1))
        if self.folder and number == first:
            self.begin()
        elif self.profiler and number == first + PROFILED:
            self.finish()
        if self.profiler:
            self.steps += 1

    def begin(self):
        """Start the profiler."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()
        self.start_time = time.perf_counter()

    def finish(self):
        """Write and print the profile, once; a no-op if none was taken."""
        if not self.profiler:
            return
        synchronize(self.device)
        seconds = time.perf_counter() - self.start_time
        profiler = self.profiler
        self.profiler = None
        profiler.stop()
        profiler.export_chrome_trace(str(self.folder / "profile_trace.json.gz"))
        lines = profile_table(profiler.events(), seconds, self.steps, self.device)
        text = "\n".join(lines)
        (self.folder / "profile.txt").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n  written to {self.folder}: profile.txt, profile_trace.json.gz",
              flush=True)
        self.folder = None


def profile_table(events, seconds: float, steps: int, device: torch.device) -> list[str]:
    """Lines with the milliseconds of a step, by part of the step and kind of operation.

    events: of torch.profiler, over `steps` steps and `seconds` seconds. On a GPU these are times of
    its kernels, elsewhere of the CPU.
    """
    total = 1000 * seconds / steps
    spent = time_by_part(events, steps, device)
    if device.type == "cuda":
        spent[GPU_IDLE, ""] = max(0.0, total - sum(spent.values()))
    lines = [f"time of a step: {total:.1f} ms, mean of {steps} steps"]
    for name in (*PARTS, REST, GPU_IDLE):
        rows = {kind: ms for (part_name, kind), ms in spent.items()
                if part_name == name and ms >= 0.0005 * total}
        if rows:
            ms = sum(rows.values())
            lines.append(f"  {name:<30}{ms:>10.1f} ms {ms / total:>7.1%}")
        if len(rows) > 1:
            lines += [f"    {kind:<28}{ms:>10.1f} ms {ms / total:>7.1%}"
                      for kind, ms in sorted(rows.items())]
    return lines


def time_by_part(events, steps: int, device: torch.device) -> dict[tuple[str, str], float]:
    """{(part, kind of operation): milliseconds of a step}.

    The backward pass of a GPU runs in a thread of its own, so an operation belongs to the part
    during which it starts, not to the part that calls it.
    """
    marks = sorted((event.time_range.start, event.time_range.end, event.name) for event in events
                   if event.name in PARTS and on_host(event))
    spent = {}
    for event in events:
        if not on_host(event):
            continue
        start = event.time_range.start
        position = bisect.bisect(marks, (start, float("inf")))
        name = REST
        for _, end, candidate in reversed(marks[max(0, position - 2):position]):
            if start < end:                 # two candidates: "loss" lies inside "forward"
                name = candidate
                break
        key = name, kind_of(event)
        spent[key] = spent.get(key, 0.0) + self_time(event, device) / 1000 / steps
    return spent


def on_host(event) -> bool:
    """Whether this ran on the host; GPU kernels count with the operation that launched them."""
    return event.device_type == torch.autograd.DeviceType.CPU


def self_time(event, device: torch.device) -> float:
    """Microseconds of an operation without the operations it consists of."""
    if device.type != "cuda":
        return event.self_cpu_time_total
    microseconds = getattr(event, "self_device_time_total", None)
    return microseconds or getattr(event, "self_cuda_time_total", 0.0)          # before torch 2.5


def kind_of(event) -> str:
    """The kind of an operation: by its own name or the name of one that it is a part of."""
    for kind, words in KINDS.items():
        operation = event
        while operation is not None:
            name = operation.name.lower()
            if any(word in name for word in words):
                return kind
            operation = operation.cpu_parent
    return OTHER


if __name__ == "__main__":
    from runtime.device import pick_device

    this_device = pick_device()
    for dtype in (torch.float32, torch.bfloat16):
        rate = matrix_rate(this_device, dtype)
        print(f"{this_device}, {str(dtype)[6:]}: {rate / 1e12:.3g} TFLOP/s")
