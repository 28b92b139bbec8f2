"""Matrix multiplication on the CPU: library and threads, picked by a trial.

    python -m fast.matmul       how fast and how exact each is on this machine, and which is picked

pick_matmul tries the functions of MATMULS on a product of the model; then fewer threads. Each needs
to be CLEARLY faster than what is tried before it, since it rounds otherwise.

Requires: nothing.
Next: fast/fused_block.py, fast/head_in_tiles.py.
"""
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch
import torch.nn.functional as F

ROW_BLOCK = 128         # rows of one call of oneDNN
ROW_STEP = 32           # the last block is padded to a multiple of this
CLEARLY = 1.1           # how many times faster than those before it a choice must be to be picked
# multiplications of one product of the trial, at most: 1 ms, or 100 ms in 16 bits without hardware
TRIED = {torch.float32: 2**27, torch.bfloat16: 2**24, torch.float16: 2**24}
LONG = 0.15             # seconds after which a call is not repeated
CAST = 2**22            # numbers of a weight that are float32 at once: 16 MiB


# ---- the libraries ------------------------------------------------------------------------------


def onednn(x, W, bias=None):
    """x (N, in) times W (out, in) transposed by oneDNN, which torch uses in 16 bits only.

    In float32 torch uses MKL, which leaves half of an AMD processor idle. x and W are dense; either
    may be a transposed view. For each new shape oneDNN compiles and keeps code, 1/3 of a megabyte.
    """
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


def onednn_matmul(x, W, bias=None):
    """The same for any number of rows, in blocks, so that there are few shapes."""
    if not x.numel() or not W.numel():          # an expert without tokens: oneDNN refuses
        return F.linear(x, W, bias)
    outs = []
    for rows in x.split(ROW_BLOCK):
        missing = -len(rows) % ROW_STEP
        padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows
        outs.append(onednn(padded, W, bias)[:len(rows)])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def through_float32(x, W, bias=None):
    """x (N, in) times W (out, in) transposed, both in 16 bits: in float32, rounded once at the end.

    Without instructions for 16-bit products (before AVX-512 BF16 or AMX) torch takes 4 times as
    long for x Wᵀ, and 200 times for dy W, where W is a transposed view. W is cast piece by piece.
    """
    wide = x.float()
    piece = max(1, CAST // max(W.shape))
    if W.is_contiguous():
        biases = [None] * len(W) if bias is None else bias.float().split(piece)
        return torch.cat([F.linear(wide, rows.float(), b).to(x.dtype)
                          for rows, b in zip(W.split(piece), biases)], 1)
    out = wide.new_zeros(len(x), len(W))
    for columns, rows in zip(wide.split(piece, 1), W.T.split(piece)):           # of the inputs
        out.addmm_(columns, rows.float())
    return (out if bias is None else out.add_(bias)).to(x.dtype)


MATMULS = {"torch": F.linear, "onednn": onednn_matmul,      # F.linear: MKL, cuBLAS, Accelerate, …
           "float32": through_float32}
NAMES = {torch.float32: ("torch", "onednn"), torch.bfloat16: ("torch", "float32"),
         torch.float16: ("torch", "float32")}               # the choice in each dtype


# ---- the choice ---------------------------------------------------------------------------------


@dataclass
class MatmulChoice:
    """What pick_matmul found."""
    picked: str                                     # a name of MATMULS
    rates: dict = field(default_factory=dict)       # name -> GFLOP/s
    threads: int = 0                                # 0: as many as torch starts
    threads_tried: tuple = ()
    lines: list = field(default_factory=list)       # for the start page


@dataclass(frozen=True)
class Product:
    """A matrix product of a model: rows (tokens) at once, inputs, outputs."""
    rows: int
    inputs: int
    outputs: int


SMALLEST = Product(256, 512, 1024)      # the time of smaller ones is that of the call


def product_of(config) -> Product:
    """That of gate or up in a block; SMALLEST for a smaller model, where chance would choose.

    config: a ModelConfig.
    """
    hidden, width = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    if hidden < SMALLEST.inputs or width < SMALLEST.outputs:
        return SMALLEST
    return Product(256, hidden, width)


@lru_cache(maxsize=None)
@torch.no_grad()
def pick_matmul(device, dtype: torch.dtype, product: Product = SMALLEST) -> MatmulChoice:
    """The fastest correct library and number of threads for a product, forward and backward.

    Tried once per process and product, so that two runs of a process compute alike.
    There is a choice only on CPUs; of threads only for products larger than SMALLEST, and if
    OMP_NUM_THREADS is not set.
    Correct: no further from float64 than four times torch's own error.
    """
    device = torch.device(device)
    if device.type != "cpu" or dtype not in NAMES:
        return MatmulChoice("torch")
    refused = why_refused(dtype)
    matmuls = {name: MATMULS[name] for name in NAMES[dtype] if name not in refused}
    rates = {name: rate_of(matmul, product, dtype) for name, matmul in matmuls.items()}
    picked = first_clearly_fastest(rates)
    choice = MatmulChoice(picked, rates, lines=[matmul_line(picked, rates, refused)])
    may_set_threads = "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > 1
    if product != SMALLEST and may_set_threads:
        speeds = thread_rates(matmuls[picked], product, dtype)
        choice.threads, choice.threads_tried = first_clearly_fastest(speeds), tuple(speeds)
        choice.lines.append(threads_line(choice.threads, speeds))
    return choice


def why_refused(dtype: torch.dtype) -> dict[str, str]:
    """{name of MATMULS: why it cannot be used here}."""
    generator = torch.Generator().manual_seed(0)
    # a whole block and a padded one
    x = torch.randn(ROW_BLOCK + 22, 512, generator=generator).to(dtype)
    W = torch.randn(192, 512, generator=generator).to(dtype)
    allowed = 4 * float((F.linear(x, W) - x.double() @ W.double().T).abs().max())
    refused = {}
    for name in NAMES[dtype]:
        try:
            error = matmul_error(MATMULS[name], x, W)
        except (RuntimeError, AttributeError, NotImplementedError) as refusal:
            refused[name] = str(refusal).splitlines()[0][:80]
            continue
        if not error <= allowed:
            refused[name] = f"wrong by {error:.2g}"
    return refused


def first_clearly_fastest(rates: dict):
    """A key of rates; each must be CLEARLY faster than the best before it."""
    best = next(iter(rates))
    for key, rate in rates.items():
        if rate > CLEARLY * rates[best]:
            best = key
    return best


def rate_of(matmul: Callable, product: Product, dtype=torch.float32) -> float:
    """GFLOP/s of a product, forward and backward, measured on some of its rows and outputs."""
    rows = min(product.rows, max(1, TRIED[dtype] // (64 * product.inputs)))
    outputs = max(64, min(product.outputs, TRIED[dtype] // (rows * product.inputs)))
    W = torch.ones(outputs, product.inputs, dtype=dtype)
    x, dy = (torch.ones(rows, size, dtype=dtype) for size in (product.inputs, outputs))
    seconds = shortest(lambda: matmul(x, W)) + shortest(lambda: matmul(dy, W.T))
    return 4 * rows * W.numel() / seconds / 1e9


def thread_rates(matmul: Callable, product: Product, dtype) -> dict[int, float]:
    """{number of threads: GFLOP/s} of all cores, one less, and half of them.

    One may be busy, and half of them may be siblings that share the cores of the others.
    """
    cores = torch.get_num_threads()
    rates = {}
    for threads in dict.fromkeys((cores, max(1, cores - 1), max(1, cores // 2))):
        torch.set_num_threads(threads)
        rates[threads] = rate_of(matmul, product, dtype)
    torch.set_num_threads(cores)
    return rates


def matmul_line(picked: str, rates: dict[str, float], refused: dict[str, str]) -> str:
    """For the start page: "matmul: torch, 116 GFLOP/s (onednn 93)"."""
    others = [f"{name} {rate:.3g}" for name, rate in rates.items() if name != picked]
    others += [f"{name}: {reason}" for name, reason in refused.items()]
    return f"matmul: {picked}, {rates[picked]:.0f} GFLOP/s ({', '.join(others)})"


def threads_line(picked: int, rates: dict[int, float]) -> str:
    """For the start page: "threads: 2, 116 GFLOP/s (1: 60)"."""
    others = [f"{threads}: {rate:.0f}" for threads, rate in rates.items() if threads != picked]
    return f"threads: {picked}, {rates[picked]:.0f} GFLOP/s ({', '.join(others)})"


def matmul_error(matmul: Callable, x, W) -> float:
    """The largest error against float64, of both layouts of W."""
    exact = x.double() @ W.double().T
    errors = [(matmul(x, layout) - exact).abs().max() for layout in (W, W.T.contiguous().T)]
    return max(map(float, errors))


def shortest(call: Callable, times: int = 3) -> float:
    """Seconds of the shortest of several calls: other work on the machine only adds to it.

    It is not repeated once it has taken LONG.
    """
    seconds = []
    while len(seconds) < times and sum(seconds) < LONG:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        choice = pick_matmul("cpu", dtype, Product(256, 512, 1408))
        print(f"cpu {str(dtype).removeprefix('torch.')}: ", end="")
        print("\n  ".join(choice.lines or ["matmul: torch, the only one"]))
