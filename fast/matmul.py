"""The library that multiplies matrices: torch's own or oneDNN, picked by a measurement.

    python -m fast.matmul          how fast and how exact each is on this machine, and which one is taken

Requires: nothing.
Next: fast/fused_block.py.
"""
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


def torch_product(x, W, bias=None):
    """As torch multiplies: cuBLAS, hipBLASLt, MKL, Accelerate."""
    return F.linear(x, W, bias)


def onednn(x, W, bias=None):
    """oneDNN, which torch has on CPUs but asks in 16 bits only. In float32 torch asks MKL, which leaves half of an AMD
    processor idle. x and W are dense; either may be a transposed view. For each new shape oneDNN makes and keeps code,
    a third of a megabyte."""
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


def onednn_product(x, W, bias=None):
    """The same for any number of rows, in blocks of BLOCK, the last one filled up to a multiple of STEP: with every length
    there is, memory would grow."""
    if not x.numel() or not W.numel():           # an expert without tokens: oneDNN refuses
        return F.linear(x, W, bias)
    outs = []
    for rows in x.split(BLOCK):
        lacking = -len(rows) % STEP
        out = onednn(F.pad(rows, (0, 0, 0, lacking)) if lacking else rows, W, bias)
        outs.append(out[:len(rows)])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


BLOCK, STEP = 128, 32   # rows
PRODUCTS = {"torch": torch_product, "onednn": onednn_product}
CLEARLY = 1.1           # how many times faster another product than torch's own must be to be taken


@dataclass
class Choice:
    """What pick_product found. `taken`: a name of PRODUCTS; rates: name -> GFLOP/s; lines: for the start page."""
    taken: str
    rates: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)


@torch.no_grad()
def pick_product(device, dtype) -> Choice:
    """The fastest product of this machine among those that are right, measured in a few milliseconds.

    Only float32 on CPUs leaves a choice. Right: no further from float64 than four times torch's own error.
    """
    device = torch.device(device)
    if device.type != "cpu" or dtype != torch.float32:
        return Choice("torch", {"torch": 0.0})
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(256, 512, generator=generator), torch.randn(1024, 512, generator=generator))
    exact, rates, said = x.double() @ W.double().T, {}, {}
    allowed = 4 * float((torch_product(x, W) - exact).abs().max())
    for name, product in PRODUCTS.items():
        try:
            error = max(float((product(x, W) - exact).abs().max()),
                        float((product(x, W.T.contiguous().T) - exact).abs().max()))
        except (RuntimeError, AttributeError, NotImplementedError) as refusal:
            said[name] = str(refusal).splitlines()[0][:80]
            continue
        if not error <= allowed:
            said[name] = f"wrong by {error:.2g}"
            continue
        rates[name] = 2 * x.numel() * len(W) / shortest(lambda: product(x, W)) / 1e9
        said[name] = f"{rates[name]:.0f} GFLOP/s"
    taken = max(rates, key=rates.get)
    taken = taken if rates[taken] > CLEARLY * rates["torch"] else "torch"
    others = ", ".join(f"{name} ({what})" for name, what in said.items() if name != taken)
    return Choice(taken, rates, [f"products: {taken} ({said[taken]}). not used: {others}"])


def shortest(call, times: int = 7) -> float:
    """Seconds of the shortest of some calls: others' work on this machine only ever adds to it."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16):
        choice = pick_product("cpu", dtype)
        print(f"cpu {str(dtype)[6:]}: " + (choice.lines or ["torch (there is no other)"])[0])
