"""methods/fp8.py: rounding against the format's spacing, matmuls against float32 and torch, and a
training against bfloat16."""
import weakref

import pytest
import torch
import torch.nn.functional as F

from fast.fused_block import fused_linears
from methods import fp8
from methods.fp8 import (FORMATS, Fp8, dequantize_fp8, fp8_error, hold_transposed, pick_fp8,
                         quantize_fp8, scaled_matmul, scaled_matmul_plain, to_fp8)
from tests.common import needs_shared, run_recorded
from tests.tiny_models import adapted_linear

PLAIN = Fp8(FORMATS[0], scaled_matmul_plain)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_to_the_nearest_fp8_number(form, dtype):
    x = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).to(dtype) * 3e-3
    x8, scale = quantize_fp8(x, form)
    assert x8.dtype == form and float(x8.float().abs().max()) == torch.finfo(form).max
    error = (dequantize_fp8(x8, scale, torch.float32) - x.float()).abs()
    least = float(scale) * 2 ** -9  # half the smallest number above zero
    assert (error <= x.float().abs() / 15 + least).all()  # half of 1/8 of a binade, plus bfloat16
    zeros, scale = quantize_fp8(torch.zeros(3, 3, dtype=dtype), form)
    assert (dequantize_fp8(zeros, scale, dtype) == 0).all()


def test_forward_and_backward_matmuls():
    assert fp8_error(PLAIN, "cpu", torch.bfloat16) < fp8.TOO_FAR
    wrong = Fp8(FORMATS[0], lambda *args: 1.1 * scaled_matmul_plain(*args))
    assert fp8_error(wrong, "cpu", torch.bfloat16) > fp8.TOO_FAR
    missing = Fp8(FORMATS[0], lambda *args: float("nan") * scaled_matmul_plain(*args))
    assert not fp8_error(missing, "cpu", torch.bfloat16) < fp8.TOO_FAR


def test_torch_multiplies_the_same_numbers():
    generator = torch.Generator().manual_seed(1)
    x, W = (torch.randn(shape, generator=generator).bfloat16() for shape in ((32, 64), (48, 64)))
    operands = *quantize_fp8(x, FORMATS[0]), *quantize_fp8(W, FORMATS[0])
    try:
        native = scaled_matmul(*operands, torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch._scaled_mm on this CPU: {str(error).splitlines()[0]}")
    assert torch.allclose(native.float(), scaled_matmul_plain(*operands, torch.bfloat16).float(),
                          rtol=0.01, atol=0.02)


def test_a_device_without_fp8_matmuls_is_refused(monkeypatch):
    monkeypatch.setattr(fp8, "fp8_error", lambda how, device,
                        dtype: 1 / 0 if how.fp8_dtype == FORMATS[0] else 0.5)
    with pytest.raises(ZeroDivisionError):  # only errors of torch count as a refusal
        pick_fp8("cuda", torch.bfloat16)

    def refused(how, device, dtype):
        if how.fp8_dtype == FORMATS[0]:
            raise RuntimeError("_scaled_mm needs compute capability 8.9\nmore")
        return 0.5

    monkeypatch.setattr(fp8, "fp8_error", refused)
    with pytest.raises(
        ValueError,
        match="float8_e4m3fn: _scaled_mm needs compute capability 8.9; .*off by 0.5.*Leave",
    ):
        pick_fp8("cuda", torch.bfloat16)
    monkeypatch.setattr(fp8, "fp8_error", lambda how, device, dtype: 0.03)
    assert pick_fp8("cuda", torch.bfloat16)[0] == Fp8(FORMATS[0], scaled_matmul)


def test_gradients_go_through_a_rounded_base():
    """The fused and the plain path agree on an 8-bit layer, and both are close to the layer before
    rounding."""
    torch.manual_seed(0)
    layers = [adapted_linear(32, 48, 4, dtype=torch.float32),
              adapted_linear(32, 16, 4, bias=False, dtype=torch.float32)]
    x, results = torch.randn(20, 32, requires_grad=True), []
    for how in ("exact", "torch", "plain"):
        if how == "torch":
            wide = [weakref.ref(layer.weight) for layer in layers]
            to_fp8(layers, PLAIN)
            assert not any(ref() is not None
                           for ref in wide), "the weights before rounding are still held"
        x.grad = None
        for layer in layers:
            layer.zero_grad()
        outs = fused_linears(layers, x, matmul=None if how == "plain" else F.linear)
        sum((out ** 2).sum() for out in outs).backward()
        results.append([*outs, x.grad.clone(),
                        *(p.grad.clone()
                          for layer in layers for p in (layer.lora_A.weight, layer.lora_B.weight))])
    exact, fast, slow = results
    for a, b, c in zip(exact, fast, slow):
        assert (b - a).norm() < 0.06 * a.norm() and (c - a).norm() < 0.06 * a.norm()
        assert (b - a).norm() > 1e-4 * a.norm()


@needs_shared
def test_training_with_an_fp8_base_is_within_one_percent_of_bfloat16(tmp_path, monkeypatch, capsys):
    curves = []
    for name, more in (("bf16", []), ("fp8", ["base_precision=fp8"])):
        state = run_recorded("sft_llama3", tmp_path / name, monkeypatch, "bf16=true", *more)
        curves.append([row["loss"] for row in state["log_history"] if "loss" in row])
    assert "8-bit base" in capsys.readouterr().out
    assert curves[0] != curves[1] and len(curves[0]) > 3
    assert all(abs(a - b) < 0.01 * a for a, b in zip(*curves))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_gradients_of_zero_and_close_to_it_are_rounded_to_numbers(dtype):
    """In float16 the floor of the scale was 0, and a gradient of zeros became NaN."""
    for size in (0.0, 1e-6, 1e-4, 1.0):
        x = (size * torch.randn(8, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
        x8, scale = quantize_fp8(x, torch.float8_e4m3fn)
        back = dequantize_fp8(x8, scale, torch.float32)
        assert back.isfinite().all() and scale > 0
        assert (back - x.float()).norm() <= 0.04 * x.float().norm()


def test_the_matmul_of_torch_2_4_returns_the_largest_number_too(monkeypatch):
    """aten::_scaled_mm returns (Tensor, Tensor) there, and one tensor since torch 2.5."""
    product = torch.ones(2, 3)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: (product, product.max()))
    assert fp8.scaled_matmul(torch.ones(2, 4), None, torch.ones(3, 4), None, None) is product


def test_a_weight_held_transposed_is_not_copied_in_backward():
    """And the gradients are the same bits. Without room nothing is held."""
    copied = []

    def watched(x8, x_scale, W8, scale, dtype):
        copied.append(W8.T.is_contiguous())         # then scaled_matmul makes a copy
        return scaled_matmul_plain(x8, x_scale, W8, scale, dtype)

    layer = adapted_linear(32, 48, 4, dtype=torch.float32)
    to_fp8([layer], Fp8(FORMATS[0], watched))
    size = 32 * 48
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grads = []
    for room in (0, size - 1, size):
        line = hold_transposed(layer, room)
        assert bool(line) == (room == size)
        copied.clear()
        out, = fused_linears([layer], x, matmul=F.linear)
        grads += torch.autograd.grad(out.square().sum(), x)
        assert copied == [False, room < size]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    assert "transposed" not in str(layer.state_dict().keys())
