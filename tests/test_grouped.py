"""methods/grouped.py against the formula written out; layers, gradients, memory."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALinear
from fast.fused_block import fused_linears
from methods import quant
from methods.grouped import GroupedFormat, GroupedWeight
from methods.quant import QuantLinear

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMS = {
    "groups": dict(width=4, group_size=16),
    "all": dict(width=8, group_size=48),
    "order": dict(width=4, group_size=16, with_columns=True),
    "rest": dict(width=3, group_size=32, with_columns=True),
}


def weight_with(form, rows=40, columns=48, scale_dtype=F16, dtype=BF16):
    """(a random weight, the matrix by the formula, rounded once, in the dtype of the scales)."""
    draw = torch.Generator().manual_seed(0)
    quant_format = GroupedFormat(kind="4-bit gptq", scale_dtype=scale_dtype, dtype=dtype, **form)
    groups = -(-columns // quant_format.group_size)
    codes = torch.randint(0, 2**quant_format.width, (rows, columns), generator=draw)
    zeros = torch.randint(0, 2**quant_format.width, (rows, groups), generator=draw)
    scales = (torch.rand(rows, groups, generator=draw) / 50 + 0.01).to(scale_dtype)
    of_column = torch.arange(columns) // quant_format.group_size
    if quant_format.with_columns:
        of_column = of_column[torch.randperm(columns, generator=draw)]
    exact = scales.double()[:, of_column] * (codes - zeros[:, of_column])
    held = codes.to(torch.uint8)
    if quant_format.codes_in_a_byte == 2:
        held = held[:, 0::2] | held[:, 1::2] << 4
    weight = GroupedWeight(quant_format, (rows, columns), codes=held, scales=scales,
                           zeros=zeros.to(torch.uint8),
                           **({"columns": of_column.int()} if quant_format.with_columns else {}))
    return weight, exact.to(scale_dtype)


@pytest.mark.parametrize("piece", [64, 2**17])
@pytest.mark.parametrize("scale_dtype", [F16, BF16, F32])
@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_is_the_formula_rounded_once(form, scale_dtype, piece, monkeypatch):
    monkeypatch.setattr(quant, "PIECE", piece)
    weight, matrix = weight_with(FORMS[form], scale_dtype=scale_dtype)
    assert torch.equal(weight.dequantize(scale_dtype), matrix)
    assert torch.equal(weight.dequantize(F32), matrix.float())
    assert torch.equal(weight.dequantize(), matrix.to(BF16))        # the checkpoint's dtype


@pytest.mark.parametrize("form", FORMS)
def test_its_bytes_are_counted_before_it_exists(form):
    weight, _ = weight_with(FORMS[form])
    empty = weight.quant_format.empty(weight.shape)
    assert empty.is_meta and empty.nbytes == weight.nbytes and empty.numel() == 40 * 48
    large = GroupedFormat(kind="", scale_dtype=F16, dtype=F16, **FORMS["groups"])
    sizes = [dtype.itemsize * torch.Size(size).numel()
             for size, dtype in large.tensors((512, 1024)).values()]
    assert 8 * sum(sizes) / (512 * 1024) == large.bits() == 4 + 24 / 16


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_over_the_dequantized_matrix(form):
    """By the layer's own forward, by the fused path, and beside an adapter."""
    weight, matrix = weight_with(FORMS[form], dtype=F32)
    dense = nn.Linear(48, 40, bias=False)
    dense.weight = nn.Parameter(matrix.float(), requires_grad=False)
    draw = torch.Generator().manual_seed(1)
    x, A, B = (torch.randn(*size, generator=draw) for size in ((6, 48), (2, 48), (40, 2)))
    results = []
    for base, matmul in ((dense, None), (QuantLinear(weight), None),
                         (QuantLinear(weight), F.linear)):
        layer, rows = LoRALinear(base, 2, 0.5, 0.0), x.clone().requires_grad_()
        layer.lora_A.weight.data, layer.lora_B.weight.data = A.clone(), B.clone()
        out, frozen = fused_linears([layer, base], rows, matmul=matmul)
        ((out ** 2).sum() + (frozen ** 3).sum()).backward()
        results.append([out, frozen, rows.grad, layer.lora_A.weight.grad,
                        layer.lora_B.weight.grad, layer.effective_weight()])
    for found in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(found, results[0]))


def test_dtypes_of_the_model_do_not_concern_it():
    weight, matrix = weight_with(FORMS["groups"])
    layer = QuantLinear(weight).to(F32)
    assert layer.weight.scales.dtype == F16 and torch.equal(weight.dequantize(F16), matrix)
    assert layer.weight.dtype == BF16 and not layer.weight.requires_grad
