"""linear.py: the fast path against its twin, finite differences and a count of what it keeps.

Read before: fast/fused_block.py.
"""
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fast import fused_block as linear
from fast import matmul
from attention import Layout
from checkpoint.load import load_model
from families import FAMILIES, model_config
from fast.fused_block import is_simple, linears
from fast.matmul import PRODUCTS, pick_product
from lora import LoRAConfig, LoRALinear, attach_lora, set_adapters
from losses import cross_entropy_sum
from fast.compile import compile_steps, pick_compile
from model import ACTIVATIONS, CausalLM, RECOMPUTE, RMSNorm, init_weights
from methods.quant import Form, QuantLinear, quantise
from tests.common import GOLDEN, needs_shared
from tests.test_memory import FAMILIES as FAMILY_FIELDS, SMALL

FAMILY_FOLDERS = [folder.name for folder in sorted((GOLDEN / "models").glob("*"))
                  if json.loads((folder / "config.json").read_text())["model_type"] in FAMILIES]


def adapted(size_in, size_out, r, bias=True, dtype=torch.float64, base=None):
    """A layer with an adapter that has something to say."""
    layer = LoRALinear(base or nn.Linear(size_in, size_out, bias=bias, dtype=dtype), r, 0.7, 0.0)
    if base is None:
        layer.base_layer.weight.requires_grad_(False)
    for part in (layer.lora_A, layer.lora_B):
        part.to(dtype).weight.data.normal_()
    return layer


def plain_linear(size_in, size_out, learns, bias=True, dtype=torch.float64):
    return nn.Linear(size_in, size_out, bias=bias, dtype=dtype).requires_grad_(learns)


def in_4_bits(size_in, size_out, dtype=torch.float64):
    bias = nn.Parameter(torch.randn(size_out, dtype=dtype), requires_grad=False)
    return QuantLinear(quantise(torch.randn(size_out, size_in), Form("nf4")), bias)


# ---- one call -------------------------------------------------------------------------------------------------------

CASES = {
    "q, k, v with adapters of several ranks": lambda: [adapted(6, 8, 3), adapted(6, 4, 2), adapted(6, 4, 2, bias=False)],
    "one of three adapted": lambda: [plain_linear(6, 8, False), adapted(6, 4, 2), plain_linear(6, 4, False, bias=False)],
    "all learn whole": lambda: [plain_linear(6, 8, True), plain_linear(6, 4, True, bias=False)],
    "frozen": lambda: [plain_linear(6, 8, False)],
    "in 4 bits, one of them adapted": lambda: [in_4_bits(6, 8), adapted(6, 4, 2, base=in_4_bits(6, 4))],
}


@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "a norm that learns"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(case, norm):
    torch.manual_seed(0)
    layers = CASES[case]()
    before = RMSNorm(6, 1e-6).double() if norm else linear.same
    before = before if not norm else _wide(before)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = [p for module in (*layers, *([before] if norm else [])) for p in module.parameters() if p.requires_grad]

    def run(x, *weights):
        return tuple(linears(layers, x, before=before, how="torch"))

    assert torch.autograd.gradcheck(run, (x, *weights))


def _wide(norm):
    """RMSNorm works in float32, too coarse for finite differences: the same in float64."""
    norm.forward = lambda x: norm.weight * linear_rms(x)
    return norm


def linear_rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_two_inputs_and_a_step_between_them():
    torch.manual_seed(0)
    layers = [adapted(6, 4, 2)]
    gate, up = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = [p for p in layers[0].parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda gate, up, *_: linears(layers, gate, up, before=lambda g, u: F.silu(g) * u, how="torch")[0],
        (gate, up, *weights))


def test_what_cannot_be_done_fast_is_left_to_the_layers():
    layer = adapted(6, 4, 2)
    assert is_simple(layer) and is_simple(plain_linear(6, 4, False))
    handle = layer.register_forward_hook(lambda *_: None)
    assert not is_simple(layer)
    handle.remove()
    layer.dropout = nn.Dropout(0.5)
    assert not is_simple(layer)
    heard = []
    layer.register_forward_hook(lambda module, args, out: heard.append(out))
    out, = linears([layer], torch.randn(3, 6, dtype=torch.float64), how="torch")
    assert len(heard) == 1 and heard[0] is out


def test_adapters_switched_off():
    model = nn.ModuleDict({"a": adapted(6, 4, 2)})
    set_adapters(model, False)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out, = linears([model["a"]], x, how="torch")
    assert torch.allclose(out, model["a"].base_layer(x))


# ---- what is kept ---------------------------------------------------------------------------------------------------


def kept_by(function):
    """Numbers of elements of the tensors that autograd keeps, without the weights."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return sorted(kept.values()), out


def test_only_inputs_and_narrow_products_are_kept():
    N, D, width, r = 40, 16, 48, 2
    first = [adapted(D, width, r, False, torch.float32) for _ in range(2)]
    down, norm = adapted(width, D, r, False, torch.float32), RMSNorm(D, 1e-6).requires_grad_(False)
    x = torch.randn(N, D, requires_grad=True)
    kept, (gate, up) = kept_by(lambda: linears(first, x, before=norm, how="torch"))
    assert kept == sorted([N * D, N * 2 * r])
    kept, _ = kept_by(lambda: linears([down], gate, up, before=lambda g, u: F.silu(g) * u, how="torch"))
    assert kept == sorted([N * width, N * width, N * r])
    plain, _ = kept_by(lambda: linears([down], gate, up, before=lambda g, u: F.silu(g) * u, how="plain"))
    assert sum(plain) > 1.9 * sum(kept)


# ---- in every family ------------------------------------------------------------------------------------------------


def gradients(model, how, level, lengths, product="torch"):
    """Loss and gradients of one micro-batch."""
    model.product, model.recompute = how, [level] * model.config.num_hidden_layers
    model.zero_grad()
    ids = torch.randint(3, model.config.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    hidden = model(ids, positions, Layout(lengths))
    loss = cross_entropy_sum(hidden[0], model.head_weight(), ids[0].roll(-1))
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_shared
@pytest.mark.parametrize("learns", ["lora", "full"])
@pytest.mark.parametrize("name", FAMILY_FOLDERS)
def test_fast_equals_plain_in_every_family(name, learns):
    model = load_model(GOLDEN / "models" / name, torch.float32)
    if learns == "lora":
        attach_lora(model, LoRAConfig(r=4, lora_alpha=8, target_modules="all"), seed=0, stored_name=model.config.stored_name)
        for layer in model.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B.weight.data.normal_(0, 0.05)
    else:
        model.requires_grad_(True)
    loss, want = gradients(model, "plain", "none", [7, 12])
    assert sum(float(g.abs().sum()) for g in want.values()) > 0
    for how in PRODUCTS:
        for level in RECOMPUTE:
            again, found = gradients(model, how, level, [7, 12])
            assert abs(again - loss) < 1e-5 * abs(loss)
            assert found.keys() == want.keys()
            for key, grad in want.items():
                assert (found[key] - grad).abs().max() <= 2e-5 * max(1.0, float(grad.abs().max())), (how, level, key)


# ---- the choice of a product ----------------------------------------------------------------------------------------


def test_products_agree_for_both_layouts():
    generator = torch.Generator().manual_seed(0)
    for N, size_in, size_out in ((1, 8, 8), (5, 33, 70), (64, 128, 257), (0, 8, 5), (5, 0, 8)):
        x, W = torch.randn(N, size_in, generator=generator), torch.randn(size_out, size_in, generator=generator)
        bias = torch.randn(size_out, generator=generator)
        for product in PRODUCTS.values():
            assert torch.allclose(product(x, W, bias), x @ W.T + bias, atol=1e-4)
            assert torch.allclose(product(x, W.T.contiguous().T), x @ W.T, atol=1e-4)


def test_a_product_that_is_wrong_or_refused_is_never_taken(monkeypatch):
    def refused(x, W, bias=None):
        raise RuntimeError("no such thing here\nmore")

    monkeypatch.setitem(PRODUCTS, "onednn", lambda x, W, bias=None: torch.zeros(len(x), len(W)))
    monkeypatch.setitem(PRODUCTS, "other", refused)
    choice = pick_product("cpu", torch.float32)
    assert choice.taken == "torch" and "onednn (wrong by" in choice.lines[0] and "no such thing here" in choice.lines[0]


def test_the_fastest_is_taken_if_it_is_clearly_faster(monkeypatch):
    times = {"torch": 1.0, "onednn": 0.8}
    real = dict(PRODUCTS)
    monkeypatch.setattr(matmul, "shortest", lambda call: times[call.__closure__ and _name_of(call, real)])
    assert pick_product("cpu", torch.float32).taken == "onednn"
    times["onednn"] = 0.95
    assert pick_product("cpu", torch.float32).taken == "torch"
    assert pick_product("cpu", torch.bfloat16).taken == "torch"


def _name_of(call, products):
    held = [cell.cell_contents for cell in call.__closure__]
    return next(name for name, product in products.items() if product in held)


# ---- the compiled steps ---------------------------------------------------------------------------------------------


def test_compiled_steps_are_tried_before_they_are_taken(monkeypatch):
    """Without a real compiler, which takes half a minute on a CPU: its front part alone, a wrong one, a broken one."""
    assert pick_compile(None, "cpu", torch.float32)[0] is False and pick_compile(False, "cuda", torch.float32)[0] is False
    compiler, seen = torch.compile, []

    def front_part(function, dynamic):
        seen.append(function.__qualname__)
        return compiler(function, dynamic=dynamic, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", front_part)
    for act in ACTIVATIONS:
        seen.clear()
        assert pick_compile(True, "cpu", torch.float32, act)[0] is True
    assert sorted(seen) == ["MLP.compute", "RMSNorm.compute", "rotate"]
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *args: 1.01 * function(*args))
    found, line = pick_compile(True, "cpu", torch.float32)
    assert found is False and "are off by" in line
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: 1 / 0)
    found, line = pick_compile(True, "cpu", torch.float32)
    assert found is False and "does not work here (division by zero)" in line


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "glm4", "olmo"])
def test_compiled_steps_reach_every_family(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *args: seen.append(function) or function(*args))
    fields, seen = dict(SMALL, **FAMILY_FIELDS[name]), []
    model = CausalLM(model_config(fields))
    init_weights(model, torch.Generator().manual_seed(0))
    want = model(torch.arange(9)[None])
    compile_steps(model)
    assert torch.equal(model(torch.arange(9)[None]), want) and len(set(seen)) >= 2
