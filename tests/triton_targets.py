"""The kernels that torch's compiler generates for this program, compiled for absent cards.

    LD_PRELOAD=…/libpaper_cudart.so LD_LIBRARY_PATH=… python -m tests.triton_targets FOLDER

Inductor generates Triton code for the paper GPU; Triton's own compiler then makes machine code of
each kernel for every target. Prints {step: {kernel: {target: bytes, or what went wrong}}} as JSON.

Requires: fast/compile.py, fast/lean_step.py, methods/quant.py, methods/fp8.py.
"""
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fast.compile import compile_loss, compile_tokens, gated, norm_rows
from fast.lean_step import add_norm_rows
from methods.fp8 import quantize_fp8
from methods.quant import unpack_at_once
from rope import rotate

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# the 8-bit format of each card that multiplies in 8 bits
FP8 = {"fp8": (torch.float8_e4m3fn, ["sm_90"]), "fp8 of MI300": (torch.float8_e4m3fnuz, ["gfx942"])}
BLOCKS = {"XBLOCK": 256, "YBLOCK": 4, "R0_BLOCK": 512, "RBLOCK": 512}
BF16 = torch.bfloat16
N, D = 48, 4096


class NoKernel:
    """A kernel that does nothing, in the place of the one that would be compiled for the card."""

    def run(self, *args, **kwargs):
        pass


def tensor(*shape, dtype=BF16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=grad)


def with_backward(function, *args):
    """Call a compiled function, and its backward."""
    out = function(*args)
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.autograd.grad(out, leaves, torch.empty_like(out))


def steps() -> dict:
    """{name: a function that calls a compiled step}: as fast/compile.py compiles them."""
    rows, weight = tensor(N, D, grad=True), tensor(D)
    heads = tensor(1, N, 8, 128, grad=True).transpose(1, 2)
    cos, sin = tensor(1, 1, N, 128), tensor(1, 1, N, 128)
    gate, up = tensor(N, 3 * D, grad=True), tensor(N, 3 * D, grad=True)
    scores, y = tensor(N, 32_000), torch.zeros(N, dtype=torch.int64, device="cuda")
    codes = torch.empty(N, 32, dtype=torch.uint8, device="cuda")
    scales, pairs = tensor(N, dtype=torch.float32), tensor(256, 2, dtype=torch.float32)
    norm = compile_tokens(norm_rows)
    rotated = compile_tokens(rotate, tensors=3, dim=2)
    product = compile_tokens(gated, tensors=2)
    return {
        "norm": lambda: with_backward(norm, rows, weight, 1e-5, 0.0, False),
        "rotation": lambda: with_backward(rotated, heads, cos, sin, "halves"),
        "gate * up": lambda: with_backward(product, gate, up, F.silu),
        "loss": lambda: compile_loss()(scores, y, None, BF16),
        "sum and norm": lambda: compile_tokens(add_norm_rows, tensors=2)(
            rows.detach(), rows.detach(), weight, 1e-5, 0.0, False),
        **{name: partial(compile_tokens(quantize_fp8), rows.detach(), dtype)
           for name, (dtype, _) in FP8.items()},
        "4-bit": lambda: compile_tokens(unpack_at_once, tensors=2)(codes, scales, pairs, BF16),
    }


def sources_of(step) -> dict[str, str]:
    """{name: Triton code} that Inductor generates when the step runs."""
    found = {}

    def keep(self, name, source, *args, **kwargs):
        found[name] = source
        return NoKernel()

    with patch.object(AsyncCompile, "triton", keep), \
            config.patch(force_disable_caches=True, compile_threads=1):
        step()
    return found


def kernel_of(name: str, source: str, folder: Path):
    """(the function, its metadata): the decorator that would try it on a card is left out."""
    kept = []

    def heuristic(*args, triton_meta, **kwargs):
        def decorate(function):
            kept.extend([function, triton_meta])
            return function
        return decorate

    file = folder / f"{name}.py"
    file.write_text(source)
    kinds = [kind for kind in ("pointwise", "reduction", "persistent_reduction")
             if hasattr(triton_heuristics, kind)]
    with patch.multiple(triton_heuristics, **dict.fromkeys(kinds, heuristic)):
        spec = importlib.util.spec_from_file_location(name, file)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return kept


def compiled_for(target: GPUTarget, function, triton_meta: dict):
    """Bytes of machine code, or what went wrong."""
    signature = triton_meta["signature"]
    values = BLOCKS | triton_meta.get("constants", {})
    if "r0_numel" in signature:                     # a reduction, of one row
        values["XBLOCK"] = 1
    constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
    try:
        made = triton.compile(ASTSource(function, signature, constexprs=constants), target=target)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return len(made.asm["cubin" if target.backend == "cuda" else "hsaco"])


def main(folder: Path):
    found = {}
    for step, call in steps().items():
        found[step] = {}
        for name, source in sources_of(call).items():
            kernel = kernel_of(name, source, folder)
            targets = FP8[step][1] if step in FP8 else TARGETS
            found[step][name] = {target: compiled_for(TARGETS[target], *kernel)
                                 for target in targets}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
