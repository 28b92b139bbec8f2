"""Frozen weights in 8 bits, multiplied in 8 bits: half the memory, and up to twice the rate of 16-bit products.

    python -m methods.fp8                       does it work on this device, and how far is it from the exact product

    W   is rounded once to e4m3 (4 bits exponent, 3 bits fraction), divided by one number so that the largest fills
        the range: W = unit * W8
    x   is rounded anew for every product, in the same way; gradients too
    A, B of the adapters, and their products, stay in 16 bits: they learn what rounding the base has spoilt

`multiply` is what torch._scaled_mm does on Hopper, Ada and MI300; `multiply_plain`, its slow twin, takes the same numbers
and multiplies in float32. Nothing here waits for the device.

Read before: fast/fused_block.py's docstring; it calls the products. Read after: lora.py.
Source: FP8 formats arXiv:2209.05433 (sec. 3: one scale for a tensor).
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

FORMATS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)          # NVIDIA's and OCP's; AMD's MI300
TOO_FAR = 0.06          # relative error of a product: two operands with 3 bits of fraction, errors of random signs


def quantise(x, form):
    """(x8, unit) with x = unit * x8 as closely as `form` allows; unit: () float32, on x's device."""
    largest = torch.finfo(form).max
    unit = (torch.linalg.vector_norm(x, torch.inf) / largest).to(x.dtype).clamp(min=1e-30)
    return (x / unit).clamp(-largest, largest).to(form), unit.float()


def dequantise(W8, unit, dtype):
    """W as a dense matrix."""
    return (W8.float() * unit).to(dtype)


def multiply(x8, x_unit, W8, unit, dtype):
    """x (N, in) times W (out, in) transposed -> (N, out), in 16 bits. W8 may be a transposed view of a matrix."""
    if W8.T.is_contiguous():                    # the second operand must lie column by column
        W8 = W8.contiguous()
    return torch._scaled_mm(x8, W8.T, scale_a=x_unit, scale_b=unit, out_dtype=dtype, use_fast_accum=True)


def multiply_plain(x8, x_unit, W8, unit, dtype):
    """The slow twin of multiply."""
    return ((x8.float() @ W8.float().T) * (x_unit * unit)).to(dtype)


@dataclass(frozen=True)
class Fp8:
    """How layers with 8-bit weights compute: their format, how x is rounded to it, and the product."""
    form: torch.dtype
    multiply: Callable
    quantise: Callable = quantise


@torch.no_grad()
def pick_fp8(device, dtype) -> tuple[Fp8, str]:
    """(how, a line for the start page): the first 8-bit format whose product is right here.

    On CPUs the slow twin, so that a recipe can be tried. Raises ValueError where a GPU has no such product.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return (Fp8(FORMATS[0], multiply_plain),
                "8-bit base: numbers are rounded to fp8 and multiplied in float32 (slow: this is a CPU)")
    said = {}
    for form in FORMATS:
        try:
            error = product_error(Fp8(form, multiply), device, dtype)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as refusal:
            said[form] = str(refusal).splitlines()[0][:100]
            continue
        if error < TOO_FAR:
            return Fp8(form, multiply), f"8-bit base: {str(form)[6:]}, torch._scaled_mm (off by {error:.2%} in a trial)"
        said[form] = f"off by {error:.2g}"
    raise ValueError("base_precision: fp8 does not work on this device: " + "; ".join(
        f"{str(form)[6:]}: {why}" for form, why in said.items()) + ". Leave base_precision out")


def product_error(fp8: Fp8, device, dtype) -> float:
    """Relative error against float32, of the worse of both directions; NaN where one of them is."""
    generator = torch.Generator().manual_seed(0)
    x, W, dy = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((64, 256), (128, 256), (64, 128)))
    W8, unit = fp8.quantise(W, fp8.form)
    errors = [float((fp8.multiply(*fp8.quantise(a, fp8.form), b, unit, dtype).float() - exact).norm() / exact.norm())
              for a, b, exact in ((x, W8, x.float() @ W.float().T), (dy, W8.T, dy.float() @ W.float()))]
    return max(errors, key=lambda error: error if error == error else float("inf"))


class Fp8Linear(nn.Linear):
    """A frozen linear layer in 8 bits: W = unit * weight. forward is the slow twin of fast/fused_block.py."""

    @torch.no_grad()
    def __init__(self, layer: nn.Linear, fp8: Fp8):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, unit = quantise(layer.weight, fp8.form)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("unit", unit, persistent=False)
        self.fp8 = fp8

    def forward(self, x):
        return F.linear(x, self.dequantized_weight(x.dtype), self.bias)

    def matmul(self, x):
        """W x, without the bias."""
        return F.linear(x, self.dequantized_weight(x.dtype))

    def dequantized_weight(self, dtype: torch.dtype | None = None):
        """The matrix (out, in), made anew. dtype None: bfloat16."""
        return dequantise(self.weight, self.unit, dtype or torch.bfloat16)


def to_fp8(layers, fp8: Fp8):
    """Round the frozen weights beside these adapters (lora.LoRALinear), in place."""
    for layer in layers:
        layer.base_layer = Fp8Linear(layer.base_layer, fp8)


def with_compiled_rounding(fp8: Fp8) -> Fp8:
    """The same with the passes over x that rounding takes made one by torch's compiler."""
    return replace(fp8, quantise=torch.compile(quantise, dynamic=True))


if __name__ == "__main__":
    for kind in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)):
        try:
            how, line = pick_fp8(kind, torch.bfloat16)
            print(f"{kind}: {line}; off by {product_error(how, kind, torch.bfloat16):.2%}")
        except ValueError as error:
            print(f"{kind}: {error}")
