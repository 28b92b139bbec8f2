"""fast/fused_block.py against the model and finite differences, and what autograd saves."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attention import PackedLayout
from checkpoint.load import load_model
from fast import fused_block
from fast.fused_block import IDENTITY, RECOMPUTE, can_fuse, fuse_blocks, fused_linears
from fast.matmul import MATMULS, through_float32
from lora import LoRAConfig, attach_lora, set_adapters
from losses import cross_entropy_sum
from methods.quant import QuantFormat, QuantLinear, quantize
from model import RMSNorm
from tests.common import GOLDEN, needs_shared, run_recorded, some
from tests.tiny_models import RECORDED_MODELS, adapted_linear


def plain_linear(size_in, size_out, trained, bias=True, dtype=torch.float64):
    return nn.Linear(size_in, size_out, bias=bias, dtype=dtype).requires_grad_(trained)


def in_4_bits(size_in, size_out, dtype=torch.float64):
    bias = nn.Parameter(torch.randn(size_out, dtype=dtype), requires_grad=False)
    return QuantLinear(quantize(torch.randn(size_out, size_in), QuantFormat("nf4")), bias)


# ---- one call -----------------------------------------------------------------------------------

CASES = {
    "q, k, v with adapters of several ranks": lambda: [
        adapted_linear(6, 8, 3), adapted_linear(6, 4, 2), adapted_linear(6, 4, 2, bias=False)],
    "one of three adapted": lambda: [
        plain_linear(6, 8, False), adapted_linear(6, 4, 2), plain_linear(6, 4, False, bias=False)],
    "all trained in full": lambda: [
        plain_linear(6, 8, True), plain_linear(6, 4, True, bias=False)],
    "frozen": lambda: [plain_linear(6, 8, False)],
    "in 4 bits, one of them adapted": lambda: [
        in_4_bits(6, 8), adapted_linear(6, 4, 2, base=in_4_bits(6, 4))],
}


@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "a trained norm"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_finite_differences(case, norm):
    torch.manual_seed(0)
    layers = CASES[case]()
    before = in_float64(RMSNorm(6, 1e-6).double()) if norm else IDENTITY
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = [p for module in (*layers, before) for p in module.parameters() if p.requires_grad]

    def run(x, *weights):
        return tuple(fused_linears(layers, x, before=before))

    assert torch.autograd.gradcheck(run, (x, *weights))


def in_float64(norm):
    """RMSNorm computes in float32, too coarse for finite differences."""
    def forward(x):
        return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    norm.forward = forward
    return norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_through_float32_are_nearer_to_float32(dtype):
    """Outputs and all gradients, than torch's own products in 16 bits, or as near.

    The gradient of x is a sum over the layers, of which each is rounded.
    """
    def run(matmul, computed):
        torch.manual_seed(0)
        layers = [adapted_linear(64, 96, 8, bias=False), adapted_linear(64, 48, 4, bias=False)]
        for p in (p for layer in layers for p in layer.parameters()):
            p.data = p.data.to(dtype).to(torch.float32 if p.requires_grad else computed)
        x = torch.randn(40, 64).to(dtype).to(computed).requires_grad_()
        weights = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        ys = fused_linears(layers, x, matmul=matmul)
        loss = sum((y.float() * torch.linspace(-1, 1, y.shape[1])).sum() for y in ys)
        return [*ys, *torch.autograd.grad(loss, [x, *weights])]

    wanted = run(F.linear, torch.float32)
    ours, torchs = run(through_float32, dtype), run(F.linear, dtype)
    for i, (got, other, want) in enumerate(zip(ours, torchs, wanted)):
        assert got.dtype == other.dtype
        assert (got - want).norm() <= (1.5 if i == 2 else 1.1) * (other - want).norm(), i


def gate_times_up(gate, up):
    return F.silu(gate) * up


def test_two_layers_with_a_function_between():
    torch.manual_seed(0)
    layers = [adapted_linear(6, 4, 2)]
    gate = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    up = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weights = [p for p in layers[0].parameters() if p.requires_grad]

    def run(gate, up, *weights):
        return fused_linears(layers, gate, up, before=gate_times_up)[0]

    assert torch.autograd.gradcheck(run, (gate, up, *weights))


def test_layers_that_cannot_be_fused_are_called():
    layer = adapted_linear(6, 4, 2)
    assert can_fuse(layer) and can_fuse(plain_linear(6, 4, False))
    handle = layer.register_forward_hook(lambda *_: None)
    assert not can_fuse(layer)
    handle.remove()
    layer.dropout = nn.Dropout(0.5)
    assert not can_fuse(layer)
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    out, = fused_linears([layer], torch.randn(3, 6, dtype=torch.float64))
    assert len(seen) == 1 and seen[0] is out


def test_adapters_switched_off():
    model = nn.ModuleDict({"a": adapted_linear(6, 4, 2)})
    set_adapters(model, False)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out, = fused_linears([model["a"]], x)
    base = model["a"].base_layer
    assert torch.allclose(out, F.linear(x, base.weight, base.bias))


# ---- what is kept -------------------------------------------------------------------------------


def saved_elements(function):
    """(elements of each tensor that autograd saves, without weights; the output)."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return sorted(kept.values()), out


def test_only_inputs_and_rank_r_activations_are_saved():
    N, D, width, r = 40, 16, 48, 2
    first = [adapted_linear(D, width, r, False, torch.float32) for _ in range(2)]
    down = adapted_linear(width, D, r, False, torch.float32)
    norm = RMSNorm(D, 1e-6).requires_grad_(False)
    x = torch.randn(N, D, requires_grad=True)

    kept, (gate, up) = saved_elements(lambda: fused_linears(first, x, before=norm))
    assert kept == sorted([N * D, N * 2 * r])
    kept, _ = saved_elements(lambda: fused_linears([down], gate, up, before=gate_times_up))
    assert kept == sorted([N * width, N * width, N * r])
    plain, _ = saved_elements(
        lambda: fused_linears([down], gate, up, before=gate_times_up, matmul=None)
    )
    assert sum(plain) > 1.9 * sum(kept)


# ---- the fused model is the model ---------------------------------------------------------------


def trainable_family(name, trained):
    """A recorded model with adapters that change its output, or trained in full."""
    model = load_model(GOLDEN / "models" / name, torch.float32)
    if trained == "full":
        return model.requires_grad_(True)
    config = LoRAConfig(r=4, lora_alpha=8, target_modules="all")
    attach_lora(model, config, seed=0, stored_name=model.config.stored_name)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.weight.data.normal_(0, 0.05)
    return model


def loss_and_gradients(model, lengths):
    """Hidden states, loss and gradients of one micro-batch."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    hidden = model(ids, positions, PackedLayout(lengths))
    loss = cross_entropy_sum(hidden[0], model.head_weight(), ids[0].roll(-1))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), float(loss.detach()), grads


@needs_shared
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("name", some(RECORDED_MODELS))
def test_the_fused_model_equals_the_model_in_every_family(name, trained):
    """Forward and gradients, with every matmul and every level of recomputation."""
    model = trainable_family(name, trained)
    hidden, loss, want = loss_and_gradients(model, [7, 12])
    assert sum(float(g.abs().sum()) for g in want.values()) > 0
    for matmul in MATMULS.values():
        for level in RECOMPUTE:
            fuse_blocks(model, matmul, [level] * model.config.num_hidden_layers)
            fused_hidden, fused_loss, found = loss_and_gradients(model, [7, 12])
            scale = max(1.0, float(hidden.abs().max()))
            assert (fused_hidden - hidden).abs().max() <= 2e-5 * scale, (matmul, level)
            assert abs(fused_loss - loss) < 1e-5 * abs(loss), (matmul, level)
            assert found.keys() == want.keys()
            for key, grad in want.items():
                scale = max(1.0, float(grad.abs().max()))
                assert (found[key] - grad).abs().max() <= 2e-5 * scale, (matmul, level, key)


@needs_shared
def test_fusing_is_undone_and_copies_are_independent():
    """matmul=None restores the model bit for bit; a copy of a fused model computes with its own
    weights."""
    model = trainable_family("llama3", "lora")
    hidden, loss, want = loss_and_gradients(model, [7, 12])
    fuse_blocks(model, F.linear, ["mlp"] * model.config.num_hidden_layers)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.mul_(2)
    assert loss_and_gradients(other, [7, 12])[1] != loss_and_gradients(model, [7, 12])[1]
    fuse_blocks(model, None)
    again, same_loss, found = loss_and_gradients(model, [7, 12])
    assert torch.equal(again, hidden) and same_loss == loss
    assert all(torch.equal(found[key], grad) for key, grad in want.items())


@needs_shared
def test_training_uses_the_fused_path_and_checkpointing(tmp_path, monkeypatch):
    calls = {"fused": 0, "checkpointed": 0}
    apply = fused_block.FusedLinears.apply
    checkpoint = fused_block.checkpoint

    def counted_apply(*args):
        calls["fused"] += 1
        return apply(*args)

    def counted_checkpoint(*args, **options):
        calls["checkpointed"] += 1
        return checkpoint(*args, **options)

    monkeypatch.setattr(fused_block.FusedLinears, "apply", counted_apply)
    monkeypatch.setattr(fused_block, "checkpoint", counted_checkpoint)
    run_recorded("sft_llama3", tmp_path / "a", monkeypatch, "max_steps=1",
        "disable_gradient_checkpointing=true")
    assert calls["fused"] > 0 and calls["checkpointed"] == 0
    run_recorded("sft_llama3", tmp_path / "b", monkeypatch, "max_steps=1",
        "disable_gradient_checkpointing=false")
    assert calls["checkpointed"] > 0
