"""Frozen weights in 8 bits, multiplied in 8 bits: half the memory, up to twice the rate of 16 bits.

    python -m methods.fp8               does it work on this device, and how exact is it

    W   is rounded once to e4m3 (4 bits exponent, 3 bits fraction), with one scale so that the
        largest number fills the range: W = scale * W8
    x   is rounded for every matmul, in the same way; gradients too
    A, B of the adapters, and their matmuls, stay in 16 bits: they are trained on the rounded base

`scaled_matmul` is torch._scaled_mm on Hopper, Ada and MI300; `scaled_matmul_plain`, its plain twin,
takes the same numbers and multiplies in float32. Nothing here waits for the device.

Requires: lora.py.
Next: fast/fused_block.py, which calls the matmuls.
Source: FP8 formats arXiv:2209.05433 (sec. 3: one scale for a tensor).
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

# first: a missing package ends in a sentence
from errors import bytes_in_words

import torch
import torch.nn.functional as F
from torch import nn

FORMATS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)          # NVIDIA's and OCP's; AMD's MI300
# relative error of a matmul: two operands with 3 bits of fraction, errors of random signs
TOO_FAR = 0.06


def quantize_fp8(x, fp8_dtype: torch.dtype):
    """(x8, scale) with x close to scale * x8; scale: () float32, on x's device."""
    largest = torch.finfo(fp8_dtype).max
    if x.dtype == torch.float16:            # 1e-30, and the scale of a small gradient, are 0 there
        x = x.float()
    scale = (torch.linalg.vector_norm(x, torch.inf) / largest).to(x.dtype).clamp(min=1e-30)
    return (x / scale).clamp(-largest, largest).to(fp8_dtype), scale.float()


def dequantize_fp8(W8, scale, dtype: torch.dtype):
    """W as an ordinary matrix."""
    return (W8.float() * scale).to(dtype)


def scaled_matmul(x8, x_scale, W8, scale, dtype: torch.dtype):
    """x (N, in) times W (out, in) transposed -> (N, out), in 16 bits. W8 may be transposed."""
    if W8.T.is_contiguous():                    # the second operand must be column-major
        W8 = W8.contiguous()
    out = torch._scaled_mm(x8, W8.T, scale_a=x_scale, scale_b=scale, out_dtype=dtype,
                           use_fast_accum=True)
    return out[0] if isinstance(out, tuple) else out        # torch 2.4: with its largest number


def scaled_matmul_plain(x8, x_scale, W8, scale, dtype: torch.dtype):
    """The plain twin of scaled_matmul."""
    return ((x8.float() @ W8.float().T) * (x_scale * scale)).to(dtype)


@dataclass(frozen=True)
class Fp8:
    """How layers with 8-bit weights compute: their dtype, the matmul, and how x is rounded."""
    fp8_dtype: torch.dtype
    matmul: Callable
    quantize: Callable = quantize_fp8


# ---- the choice ---------------------------------------------------------------------------------


@torch.no_grad()
def pick_fp8(device, dtype: torch.dtype) -> tuple[Fp8, str]:
    """(fp8, a line for the start page): the first 8-bit dtype whose matmul is right here.

    On CPUs the plain twin, so that a recipe can be tried. Raises ValueError where a GPU has no such
    matmul.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return (Fp8(FORMATS[0], scaled_matmul_plain),
                "8-bit base: numbers are rounded to fp8 and multiplied in float32 (slow: this is "
                "a CPU)")
    refused = {}
    for fp8_dtype in FORMATS:
        name = str(fp8_dtype).removeprefix("torch.")
        fp8 = Fp8(fp8_dtype, scaled_matmul)
        try:
            error = fp8_error(fp8, device, dtype)
        except (RuntimeError, ValueError, TypeError, AttributeError,
                NotImplementedError) as refusal:
            refused[name] = str(refusal).splitlines()[0][:100]
            continue
        if error < TOO_FAR:
            return fp8, f"8-bit base: {name}, torch._scaled_mm (off by {error:.2%} in a trial)"
        refused[name] = f"off by {error:.2g}"
    reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
    raise ValueError(f"base_precision: fp8 does not work on this device: {reasons}. Leave "
                     "base_precision out")


def fp8_error(fp8: Fp8, device, dtype: torch.dtype) -> float:
    """Relative error against float32, of the worse of both directions; NaN if one of them is."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, W, dy = draw(64, 256), draw(128, 256), draw(64, 128)
    W8, scale = fp8.quantize(W, fp8.fp8_dtype)
    errors = []
    for a, b8, exact in ((x, W8, x.float() @ W.float().T), (dy, W8.T, dy.float() @ W.float())):
        found = fp8.matmul(*fp8.quantize(a, fp8.fp8_dtype), b8, scale, dtype)
        errors.append(float((found.float() - exact).norm() / exact.norm()))
    return max(errors, key=lambda error: error if error == error else float("inf"))


# ---- layers -------------------------------------------------------------------------------------


class Fp8Linear(nn.Linear):
    """A frozen linear layer in 8 bits: W = scale * weight. Its forward is the plain twin."""

    @torch.no_grad()
    def __init__(self, layer: nn.Linear, fp8: Fp8):
        nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        weight, scale = quantize_fp8(layer.weight, fp8.fp8_dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("transposed", None, persistent=False)      # see hold_transposed
        self.fp8 = fp8

    def forward(self, x):
        return F.linear(x, self.dequantized_weight(x.dtype), self.bias)

    def matmul(self, x):
        """W x, without the bias."""
        return F.linear(x, self.dequantized_weight(x.dtype))

    def dequantized_weight(self, dtype: torch.dtype | None = None):
        """The matrix (out, in), dequantized at each call. dtype None: bfloat16."""
        return dequantize_fp8(self.weight, self.scale, dtype or torch.bfloat16)


def to_fp8(layers: Iterable, fp8: Fp8):
    """Round the frozen weights beside these adapters (lora.LoRALinear), in place."""
    for layer in layers:
        layer.base_layer = Fp8Linear(layer.base_layer, fp8)


@torch.no_grad()
def hold_transposed(model: nn.Module, room: int) -> str:
    """Keep each 8-bit weight transposed beside it, where that takes at most `room` bytes.

    The product of the backward pass reads W along the other dimension, and would copy it each time.
    Returns a line to print, or "" if nothing is held.
    """
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    size = sum(layer.weight.nbytes for layer in layers)
    if not 0 < size <= room:
        return ""
    for layer in layers:
        layer.register_buffer("transposed", layer.weight.T.contiguous(), persistent=False)
    return f"8-bit base: held transposed as well, {bytes_in_words(size)} more: there is room"


def with_compiled_rounding(fp8: Fp8, compiler: Callable) -> Fp8:
    """The same, rounding in fewer passes over x; compiler: fast.compile.compile_tokens."""
    return replace(fp8, quantize=compiler(quantize_fp8))


if __name__ == "__main__":
    for kind in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)):
        try:
            picked, line = pick_fp8(kind, torch.bfloat16)
            print(f"{kind}: {line}; off by {fp8_error(picked, kind, torch.bfloat16):.2%}")
        except ValueError as error:
            print(f"{kind}: {error}")
