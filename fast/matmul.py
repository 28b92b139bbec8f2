"""Matrix multiplication on the CPU: torch's own or oneDNN, picked by a measurement.

    python -m fast.matmul       how fast and how exact each is on this machine, and which is picked

Requires: nothing.
Next: fast/fused_block.py.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch
import torch.nn.functional as F

ROW_BLOCK = 128         # rows of one call of oneDNN
ROW_STEP = 32           # the last block is padded to a multiple of this
CLEARLY = 1.1           # how many times faster than torch's own a library must be to be picked
TRIED = 2**27           # multiplications of one product of the trial, at most: a millisecond


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


MATMULS = {"torch": F.linear, "onednn": onednn_matmul}      # F.linear: MKL, cuBLAS, Accelerate, …


# ---- the choice ---------------------------------------------------------------------------------


@dataclass
class MatmulChoice:
    """What pick_matmul found."""
    picked: str                                     # a name of MATMULS
    rates: dict = field(default_factory=dict)       # name -> GFLOP/s
    lines: list = field(default_factory=list)       # for the start page


@dataclass(frozen=True)
class Product:
    """A matrix product of a model: rows (tokens) at once, inputs, outputs, how often in a pass."""
    rows: int
    inputs: int
    outputs: int
    times: int = 1


SMALLEST = Product(256, 512, 1024)      # the time of smaller ones is that of the call


def products_of(config) -> tuple[Product, ...]:
    """Those that decide: gate, up and down of the blocks, and the head. config: a ModelConfig.

    In a model with smaller ones they decide nothing, and chance would choose.
    """
    hidden, width = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    if hidden < SMALLEST.inputs or width < SMALLEST.outputs:
        return (SMALLEST,)
    return (Product(256, hidden, width, 3 * config.num_hidden_layers),
            Product(128, hidden, config.vocab_size))


@torch.no_grad()
def pick_matmul(device, dtype: torch.dtype,
                products: tuple[Product, ...] = (SMALLEST,)) -> MatmulChoice:
    """The fastest correct library for a model's products, forward and backward, on this machine.

    There is a choice only in float32 on CPUs, measured in a tenth of a second. Correct: no further
    from float64 than four times torch's own error.
    """
    device = torch.device(device)
    if device.type != "cpu" or dtype != torch.float32:
        return MatmulChoice("torch", {"torch": 0.0})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=generator)
    W = torch.randn(1024, 512, generator=generator)
    allowed = 4 * float((F.linear(x, W) - x.double() @ W.double().T).abs().max())

    rates = {}
    refused = {}                                    # name -> reason
    for name, matmul in MATMULS.items():
        try:
            error = matmul_error(matmul, x, W)
        except (RuntimeError, AttributeError, NotImplementedError) as refusal:
            refused[name] = str(refusal).splitlines()[0][:80]
            continue
        if not error <= allowed:
            refused[name] = f"wrong by {error:.2g}"
            continue
        rates[name] = rate_of(matmul, products)

    picked = max(rates, key=rates.get)
    if rates[picked] <= CLEARLY * rates["torch"]:
        picked = "torch"
    return MatmulChoice(picked, rates, [matmul_line(picked, rates, refused)])


def rate_of(matmul: Callable, products: tuple[Product, ...]) -> float:
    """GFLOP/s over all products of a model; each is measured on some of its outputs."""
    operations = total_seconds = 0.0
    for product in products:
        outputs = max(64, min(product.outputs, TRIED // (product.rows * product.inputs)))
        W = torch.ones(outputs, product.inputs)
        for x, layout in ((torch.ones(product.rows, product.inputs), W),
                          (torch.ones(product.rows, outputs), W.T)):
            seconds = shortest(lambda: matmul(x, layout))
            share = product.times * product.outputs / outputs
            operations += 2 * x.numel() * len(layout) * share
            total_seconds += seconds * share
    return operations / total_seconds / 1e9


def matmul_line(picked: str, rates: dict[str, float], refused: dict[str, str]) -> str:
    """A line for the start page: "matmul: torch, 116 GFLOP/s (onednn 93)"."""
    others = [f"{name} {rate:.0f}" for name, rate in rates.items() if name != picked]
    others += [f"{name}: {reason}" for name, reason in refused.items()]
    return f"matmul: {picked}, {rates[picked]:.0f} GFLOP/s ({', '.join(others)})"


def matmul_error(matmul: Callable, x, W) -> float:
    """The largest error against float64, of both layouts of W."""
    exact = x.double() @ W.double().T
    errors = [(matmul(x, layout) - exact).abs().max() for layout in (W, W.T.contiguous().T)]
    return max(map(float, errors))


def shortest(call: Callable, times: int = 7) -> float:
    """Seconds of the shortest of several calls: other work on the machine only adds to it."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        choice = pick_matmul("cpu", dtype)
        line = choice.lines[0] if choice.lines else "matmul: torch, the only one"
        print(f"cpu {str(dtype).removeprefix('torch.')}: {line}")
