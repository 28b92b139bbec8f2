"""methods/quant.py against bitsandbytes' numbers and checkpoints; damaged files; memory.

The recorded files: golden/quant.
"""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint.adapters import load_adapter, load_with_adapters
from checkpoint.load import count_parameters, load_model
from checkpoint.packed import format_of_state
from checkpoint.read_config import model_config
from methods.quant import compile_dequantize
from fast.compile import compile_tokens
from fast.fused_block import fuse_blocks, fused_linears
from lora import (LoRAConfig, LoRALinear, attach_lora, dequantized_weight, lora_layers,
                  merge_adapters)
from methods import quant
from runtime.offload import EmbeddingOutside
from checkpoint.load import quantizable_weights, quantized_weights
from methods.quant import (VALUES, QuantFormat, QuantizedWeight, QuantLinear, map_of_scales,
                           quantize, unpack_any, values_of)
from tests.common import GOLDEN, ROOT, needs_shared, usual
from tests.tiny_models import adapter_with, base_with, write_quantized

QUANT = GOLDEN / "quant"
FOLDERS = [path.parent.name
           for path in sorted(QUANT.glob("*/config.json")) if path.parent.parent == QUANT]
ADAPTERS = [path.name for path in sorted(QUANT.glob("lora_*"))]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BITS = {F32: torch.int32, F16: torch.int16, BF16: torch.int16}


# ---- the numbers ---------------------------------------------------------------------------------


@needs_shared
def test_recorded_vectors_bit_for_bit():
    """Codes, single-quantized scales and results exactly; nested scales to 1e-4 of the nested
    scale."""
    with safe_open(str(QUANT / "nf4_vectors.safetensors"), framework="pt") as file:
        assert torch.equal(map_of_scales(), file.get_tensor("nested_quant_map"))
        names = [key.removesuffix(".input") for key in file.keys() if key.endswith(".input")]
        compared = 0
        for name in names:
            x = file.get_tensor(f"{name}.input")
            for kind in VALUES:
                assert torch.equal(values_of(kind), file.get_tensor(f"quant_map.{kind}"))
                for block in (64, 128):
                    def want(what):
                        return file.get_tensor(f"{name}.{kind}.b{block}.{what}")
                    single, double = (quantize(x, QuantFormat(kind, block, nested))
                                      for nested in (0, 256))
                    where, bits = (name, kind, block), BITS[x.dtype]
                    assert torch.equal(single.codes, want("codes").view(-1)), where
                    assert torch.equal(single.absmax, want("single.absmax")), where
                    assert torch.equal(double.codes, single.codes), where
                    assert torch.equal(single.dequantize().view(bits),
                                       want("single.dequant").view(bits)), where
                    read = QuantizedWeight(double.quant_format, x.shape, codes=single.codes,
                                           quant_map=single.quant_map, absmax=want("double.absmax"),
                                           nested_absmax=want("double.nested_absmax"),
                                           nested_offset=want("double.offset").view(()),
                                           nested_quant_map=file.get_tensor("nested_quant_map"))
                    assert torch.equal(read.dequantize().view(bits),
                                       want("double.dequant").view(bits)), where
                    scale = want("double.nested_absmax").repeat_interleave(256)[:len(read.absmax)]
                    assert ((double.scales() - read.scales()).abs() <= 1e-4 * scale).all(), where
                    compared += 1
    assert compared >= 80


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_are_rounded_to_the_nearest_code_times_absmax(kind, dtype):
    """Against a search over all 16 codes; shapes with incomplete blocks, odd sizes, and several
    pieces."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 7), (5, 64), (33, 17), (600, 256)):
        x = torch.randn(shape, generator=generator).to(dtype)
        packed = quantize(x, QuantFormat(kind, 64, 0))
        flat = F.pad(x.float().view(-1), (0, -x.numel() % 64)).view(-1, 64)
        largest = flat.abs().amax(1, keepdim=True)
        far = (flat[..., None] / largest[..., None] - values_of(kind)).abs()
        best = (values_of(kind)[far.argmin(-1)] * largest).view(-1)[:x.numel()].view(shape)
        got = packed.dequantize(F32)
        assert got.shape == x.shape
        assert packed.codes.dtype == torch.uint8
        assert len(packed.codes) == -(-x.numel() // 2)
        error = ((got - x.float()).abs() - (best - x.float()).abs()).max()
        assert error <= 0.01 * float(x.abs().max()) and (dtype != F32 or error < 1e-6)


@pytest.mark.parametrize("piece", [128, 2**17])
@pytest.mark.parametrize(
    "form",
    [QuantFormat("nf4"), QuantFormat("fp4", 128, 0, BF16), QuantFormat("nf4", 64, 256, F16)],
    ids=str,
)
def test_quantizing_in_pieces_equals_quantizing_at_once(form, piece, monkeypatch):
    monkeypatch.setattr(quant, "PIECE", piece)
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    packed = quantize(x, form)
    for dtype in (F32, BF16, F16):
        twin = unpack_any(packed.codes, packed.scales(), packed.pairs, x.numel(), form.blocksize,
                          packed.dtype, dtype)
        assert torch.equal(packed.dequantize(dtype), twin.view(x.shape))
        assert packed.dequantize(dtype).dtype == dtype
    assert torch.equal(packed.codes, quantize(x.view(1, -1), form).codes)


def test_rows_in_8_bits():
    x = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    x[7] = 0
    packed = quantize(x, QuantFormat("int8", nested=0))
    assert packed.codes.dtype == torch.int8 and int(packed.codes.abs().max()) == 127
    assert torch.equal(packed.dequantize()[7], x[7])
    step = x.abs().amax(1, keepdim=True) / 127
    # half a step, and float16's
    assert ((packed.dequantize() - x).abs() <= 0.51 * step + 2**-11 * x.abs()).all()


def test_bits_per_weight_match_the_bytes():
    x = torch.randn(1024, 1024)
    for form, bits in ((QuantFormat("nf4"), 4.127), (QuantFormat("nf4", nested=0), 4.5),
                       (QuantFormat("int8", nested=0), 8.0)):
        tables = ("pairs", "nested_quant_map")
        held = sum(t.nbytes for name, t in quantize(x, form).named_buffers() if name not in tables)
        assert form.bits() == pytest.approx(bits, abs=5e-4)
        assert 8 * held / x.numel() == pytest.approx(bits, rel=0.005)


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [QuantFormat("nf4"), QuantFormat("int8", nested=0)], ids=str)
def test_a_layer_equals_its_dequantized_layer(form):
    torch.manual_seed(0)
    packed, bias = quantize(torch.randn(48, 32), form), torch.randn(48, requires_grad=True)
    dense = nn.Linear(32, 48)
    dense.weight = nn.Parameter(packed.dequantize(), False)
    dense.bias = nn.Parameter(bias.detach().clone())
    plain, frozen = QuantLinear(packed, bias), QuantLinear(packed)
    for base in (plain, dense):
        base.x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        (base(base.x) ** 2).sum().backward()
    assert torch.allclose(plain.x.grad, dense.x.grad, atol=1e-4)
    assert torch.allclose(bias.grad, dense.bias.grad, atol=1e-4)
    assert [p for p in frozen.parameters()] == []
    assert torch.equal(frozen.effective_weight(), packed.dequantize())


@pytest.mark.parametrize("form", [QuantFormat("nf4"), QuantFormat("int8", nested=0)], ids=str)
def test_gradients_of_adapters_on_both_paths(form):
    """The fused path, the plain one, and an adapter over the dequantized matrix have the same
    gradients."""
    torch.manual_seed(0)
    packed, results = quantize(torch.randn(48, 32), form), []
    dense = nn.Linear(32, 48, bias=False)
    dense.weight = nn.Parameter(packed.dequantize(), False)
    A, B, x = torch.randn(4, 32), torch.randn(48, 4), torch.randn(20, 32)
    for base, matmul in ((QuantLinear(packed), F.linear), (QuantLinear(packed), None),
                         (dense, None)):
        layer, mine = LoRALinear(base, 4, 0.5, 0.0), x.clone().requires_grad_()
        layer.lora_A.weight.data, layer.lora_B.weight.data = A.clone(), B.clone()
        out, frozen = fused_linears([layer, base], mine, matmul=matmul)
        ((out ** 2).sum() + (frozen ** 3).sum()).backward()
        results.append([out, frozen, mine.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad,
                        layer.effective_weight()])
        assert torch.equal(dequantized_weight(layer.base_layer, BF16), packed.dequantize(BF16))
    for got in results[:2]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-2) for a, b in zip(got, results[2]))


def test_scales_keep_their_dtype_and_adapters_their_seed(tmp_path):
    """model.to(16 bits) does not convert scales; adapters start the same over a 16-bit and a 4-bit
    base."""
    base, starts = base_with(tmp_path / "base"), []
    for form in (None, QuantFormat("nf4")):
        model = attach_lora(load_model(base, quant_format=form), LoRAConfig(r=2), seed=3)
        starts.append({name: layer.lora_A.weight.clone()
                       for name, layer in lora_layers(model).items()})
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    weight = quantized_weights(model)["model.layers.0.mlp.up_proj.base_layer.weight"]
    before = weight.dequantize()
    model.to(BF16)
    assert torch.equal(weight.dequantize(), before) and model.lm_head.weight.dtype == BF16
    with pytest.raises(ValueError, match="in nf4 cannot be trained in full"):
        attach_lora(load_model(base, quant_format=QuantFormat("nf4")),
                    LoRAConfig(modules_to_save=["q_proj"]))


def test_the_compiled_kernel_gives_the_same_bits(monkeypatch):
    model = nn.ModuleList(
        QuantLinear(quantize(torch.randn(64, 64 * n), QuantFormat("nf4", dtype=BF16)))
        for n in (1, 2)
    )
    want = [layer.weight.dequantize(F16) for layer in model]
    front_part = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: front_part(f, dynamic=dynamic))
    done = "4-bit weights: dequantized by one compiled kernel"
    assert compile_dequantize(model, compile_tokens) == done
    assert all(layer.weight.compiled for layer in model)
    assert all(torch.equal(layer.weight.dequantize(F16), dense)
               for layer, dense in zip(model, want))
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: lambda *args: 1.1 * f(*args))
    assert "gives other numbers" in compile_dequantize(model, compile_tokens)
    assert model[0].weight.compiled is None
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: 1 / 0)
    reason = "does not work here (division by zero)"
    assert reason in compile_dequantize(model, compile_tokens)
    assert compile_dequantize(nn.Linear(2, 2), compile_tokens) == ""


def test_an_embedding_in_main_memory_gives_the_same_rows():
    embedding = nn.Embedding(11, 5)
    ids = torch.tensor([[1, 10, 1]])
    outside = EmbeddingOutside(embedding).to(BF16)
    assert torch.equal(outside(ids), embedding(ids)) and not outside.weight.requires_grad
    sent = ids.clone()
    sent.on_cpu = torch.tensor([[3, 4, 5]])  # with ids on the CPU, nothing is read from the device
    assert torch.equal(outside(sent), embedding(sent.on_cpu))


# ---- recorded checkpoints ------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("name", FOLDERS)
def test_recorded_checkpoints(name):
    """Dequantized weights exactly, logits and losses within the README's tolerance, by both paths
    of fast/fused_block.py."""
    want, model = load_file(QUANT / name / "expected.safetensors"), load_model(QUANT / name)
    weights, real = quantized_weights(model), want["attention_mask"].bool()
    dense = {key.removeprefix("dequant."): value
             for key, value in want.items() if key.startswith("dequant.")}
    assert weights.keys() == dense.keys() and dense
    assert all(torch.equal(weights[key].dequantize(value.dtype), value)
               for key, value in dense.items())
    in_8_bits = "int8" in name  # `logits` are of activations that are rounded, too
    for how in (None, F.linear):
        fuse_blocks(model, how)
        with torch.no_grad():
            logits = model.logits(model(want["input_ids"])).float()
        bound = {F32: 1e-4, F16: 0.05, BF16: 0.2}[model.model.embed_tokens.weight.dtype]
        assert ((logits - want["logits_dequant" if in_8_bits else "logits"])[real].abs().max()
                < bound)
    model = load_model(QUANT / name, F32)
    with torch.no_grad():
        logits = model.logits(model(want["input_ids"]))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), want["labels"][:, 1:].flatten())
    assert (logits - want["logits_dequant"])[real].abs().max() < 1e-4
    assert abs(loss - want["loss_dequant"]) < 1e-5


@needs_shared
@pytest.mark.parametrize("source, name", [
    ("quant/sources/wide", "wide_nf4"), ("quant/sources/odd", "odd_nf4"),
    ("quant/sources/half", "half_nf4_dq"), ("models/llama3", "llama3_int8"),
    ("models/qwen2", "qwen2_fp4"), ("models/qwen2_tied", "qwen2_tied_nf4")
])
def test_quantizing_on_load_gives_the_recorded_checkpoint(source, name):
    want = quantized_weights(load_model(QUANT / name))
    form = next(iter(want.values())).quant_format
    model = load_model(GOLDEN / source,
                       quant_format=QuantFormat(form.kind, form.blocksize, form.nested))
    got = quantized_weights(model)
    assert got.keys() == want.keys() and "lm_head.weight" not in got
    for key, weight in got.items():
        assert torch.equal(weight.codes, want[key].codes)
        assert (weight.scales() - want[key].scales()).abs().max() <= 1e-4 * weight.scales().max()


@needs_shared
@pytest.mark.parametrize("name", ADAPTERS)
def test_recorded_adapters_on_4_bit_bases(name):
    folder = QUANT / name
    want, base = load_file(folder / "expected.safetensors"), folder / json.loads(
        (folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    real = want["attention_mask"].bool()
    for fold in (False, True):
        model = load_with_adapters(base, [folder], fold_last=fold)
        assert quantized_weights(model), "folding must leave quantised matrices as they are"
        bound = {F32: 1e-4, BF16: 0.2}[model.lm_head.weight.dtype]
        for how in (None, F.linear):
            fuse_blocks(model, how)
            with torch.no_grad():
                assert (
                    model.logits(model(want["input_ids"])).float() - want["logits"]
                )[real].abs().max() < bound
    merge_adapters(model)
    with torch.no_grad():
        assert ((model.logits(model(want["input_ids"])).float() - want["logits"])[real].abs().max()
                < bound)
    assert not lora_layers(model) and type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@needs_shared
@pytest.mark.parametrize("name, kind, storage", [
    ("gemma2", "nf4", "uint8"), ("phi3", "fp4", "float16"), ("qwen2_moe", "nf4", "bfloat16"),
    ("llama4", "fp4", "float32"), ("olmo", "int8", "")])
def test_checkpoints_of_other_families_by_bitsandbytes(name, kind, storage, tmp_path):
    """Logits of transformers with bitsandbytes' codes, dequantized by hand; the README of
    golden/quant says why."""
    transformers, bnb = pytest.importorskip("transformers"), pytest.importorskip("bitsandbytes")
    source, auto = GOLDEN / "models" / name, transformers.AutoModelForCausalLM
    how = (transformers.BitsAndBytesConfig(load_in_8bit=True)
           if kind == "int8"
           else transformers.BitsAndBytesConfig(
               load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=kind == "nf4",
               bnb_4bit_quant_storage=getattr(torch, storage),
           ))
    theirs = auto.from_pretrained(source, quantization_config=how, dtype=F32,
                                  device_map={"": "cpu"})
    theirs.save_pretrained(tmp_path)
    dense, found = auto.from_pretrained(source, dtype=F32, attn_implementation="eager").eval(), 0
    for path, module in theirs.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            weight, found = dense.get_submodule(path).weight, found + 1
            weight.data = dequantized_by_hand(module.weight, bnb).view(weight.shape)
    ids, ours = torch.arange(3, 23)[None], load_model(tmp_path, F32)
    with torch.no_grad():
        assert (ours.logits(ours(ids)) - dense(ids).logits).abs().max() < 1e-4
    assert found == len(quantized_weights(ours)) > 0


def dequantized_by_hand(weight, bnb):
    """A weight of bitsandbytes' layers as a dense tensor, by the formulas of its README, without
    its kernels."""
    if weight.dtype == torch.int8:
        return weight.data.float() * weight.SCB[:, None] / 127
    state, codes = weight.quant_state, weight.data.view(torch.uint8).view(-1)
    scales = (state.absmax
              if not state.nested
              else state.offset
              + state.state2.code[state.absmax.long()]
              * (state.state2.absmax.repeat_interleave(state.state2.blocksize)[:len(state.absmax)]))
    values = state.code[torch.stack((codes >> 4, codes & 15), 1).view(-1).long()]
    return (values * scales.repeat_interleave(state.blocksize)[:len(values)])[:state.shape.numel()]


def test_two_adapters_over_a_quantized_base(tmp_path):
    """For inference the first is merged into dequantized matrices, and the last stays separate."""
    base = base_with(tmp_path / "base")
    packed = write_quantized(base, tmp_path / "packed", QuantFormat("nf4"))
    first = adapter_with(tmp_path / "first", base, targets=("q_proj",))
    last = adapter_with(tmp_path / "last", base, targets=("q_proj", "up_proj"), seed=2)
    model, ids = load_with_adapters(packed, [first, last], fold_last=True), torch.arange(11)[None]
    dense = load_model(base)
    for name, weight in quantized_weights(load_model(packed)).items():
        dense.get_parameter(name).data = weight.dequantize()
    for adapter in (first, last):
        load_adapter(dense, adapter)
        merge_adapters(dense)
    assert torch.allclose(model.logits(model(ids)), dense.logits(dense(ids)), atol=1e-4)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert {name.split(".")[-1] for name in lora_layers(model)} == {"up_proj"}


# ---- loading -------------------------------------------------------------------------------------


FAMILIES = {"tied": dict(tie_word_embeddings=True),
            "experts": dict(model_type="qwen3_moe", num_experts=4, head_dim=8,
                            num_experts_per_tok=2, moe_intermediate_size=24),
            "fused": dict(model_type="phi3", pad_token_id=0)}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_are_quantized_in_each_family(name, tmp_path):
    base = base_with(tmp_path / "base", **FAMILIES[name])
    model, plain = load_model(base, quant_format=QuantFormat("nf4")), load_model(base)
    skeleton = load_model(base, skip_weights=True, quant_format=QuantFormat("nf4"))
    linears = {f"{n}.weight" for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    got = set(quantized_weights(model))
    assert got == linears - {"lm_head.weight"} - {
        n for n in linears if n.endswith("mlp.gate.weight")
    }
    assert got == set(quantized_weights(skeleton)) == set(quantizable_weights(plain))
    assert count_parameters(model) == count_parameters(skeleton) == sum(
        p.numel() for p in plain.parameters()
    )
    assert sum(w.nbytes for w in quantized_weights(model).values()) == \
        sum(w.nbytes for w in quantized_weights(skeleton).values())
    ids = torch.arange(12)[None]
    dense = load_model(base)
    for key, weight in quantized_weights(model).items():
        dense.get_parameter(key).data = weight.dequantize()
    assert torch.allclose(model.logits(model(ids)), dense.logits(dense(ids)), atol=1e-5)


@pytest.mark.parametrize(
    "form", [QuantFormat("nf4"), QuantFormat("fp4", 128, 0), QuantFormat("int8", nested=0)], ids=str
)
def test_stored_and_quantized_on_load_are_equal(form, tmp_path):
    base = base_with(tmp_path / "base", dtype=BF16)
    made = load_model(base, quant_format=form)
    read = load_model(write_quantized(base, tmp_path / "packed", form))
    ids = torch.arange(20)[None]
    assert torch.equal(made.logits(made(ids)), read.logits(read(ids)))
    again = load_model(tmp_path / "packed", quant_format=QuantFormat("nf4"))
    assert again.model.layers[0].mlp.up_proj.weight.quant_format.kind == form.kind


WRONG = {  # damage to the tensors of layer 0's up_proj: words of the message
    "no state": (lambda t, p: t.pop(f"{p}.weight.quant_state.bitsandbytes__nf4"),
                 "up_proj.weight.(absmax|quant_map|nested.*) exists, but "
                 ".*quant_state.bitsandbytes__nf4.* no file"),
    "no scales": (lambda t, p: t.pop(f"{p}.weight.absmax"),
                  "belongs to a weight with the part .*up_proj.weight.absmax, which is in no file"),
    "odd key": (lambda t, p: t.update({f"{p}.weight.zero_points": torch.zeros(3)}),
                "up_proj.weight.zero_points is an unknown part"),
    "short": (lambda t, p: t.update({f"{p}.weight.absmax": torch.zeros(3).byte()}),
              "absmax has 3 numbers of torch.uint8"),
    "cut codes": (lambda t, p: t.update({f"{p}.weight": torch.zeros(9, 1).byte()}),
                  "codes has 9 numbers"),
    "broken state": (
        lambda t, p: t.update({f"{p}.weight.quant_state.bitsandbytes__nf4": torch.zeros(5).byte()}),
        "not the state of a 4-bit weight",
    ),
    "no weight": (lambda t, p: t.pop(f"{p}.weight"), "missing: 1, such as .*up_proj.weight"),
    "alone": (lambda t, p: [t.pop(name) for name in list(t) if name.startswith(f"{p}.weight.")],
              "up_proj.weight is stored as uint8, without the scales"),
}


@pytest.mark.parametrize("case", WRONG)
def test_incomplete_files_are_named(case, tmp_path):
    folder = write_quantized(base_with(tmp_path / "base"), tmp_path / "packed", QuantFormat("nf4"))
    tensors = load_file(folder / "model.safetensors")
    WRONG[case][0](tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(ValueError, match=WRONG[case][1]) as caught:
        load_model(folder)
    assert "packed" in str(caught.value)


def test_other_quantization_methods_are_refused():
    fields = json.loads((ROOT / "models/tiny/config.json").read_text())
    for method in ("aqlm", "hqq", "quanto", ["gptq"]):
        with pytest.raises(ValueError, match="stored quantized .*(aqlm|hqq|quanto|gptq)"):
            model_config({**fields, "quantization_config": {"quant_method": method}})
    assert model_config(
        {**fields, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    ).notes
    assert (model_config({**fields, "quantization_config": {"load_in_4bit": True}}).notes
            == model_config(fields).notes)


PEAK = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from checkpoint.load import load_model
from methods.quant import QuantFormat
def peak():
    lines = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024
kind = sys.argv[4]
load_model(sys.argv[2], quant_format=QuantFormat("nf4"))        # memory that loading itself needs
before = peak()
load_model(sys.argv[3], quant_format=QuantFormat(kind, nested=0 if kind == "int8" else 256))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(),
                    reason="the peak is read from Linux's own count")
@pytest.mark.parametrize("kind, bits", usual([("nf4", 4.2), ("int8", 8.1)], "nf4"))
def test_the_16_bit_model_is_never_in_memory(kind, bits, tmp_path):
    """Peak of the process: the quantized weights and a few matrices of the 12 blocks, which take 75
    MB in 16 bits."""
    sizes = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, vocab_size=64)
    for name, layers in (("small", 1), ("large", 12)):
        base_with(tmp_path / name, dtype=BF16, **{**sizes, "num_hidden_layers": layers})
    folders = [str(tmp_path / "small"), str(tmp_path / "large")]
    command = [sys.executable, "-c", PEAK, str(ROOT), *folders, kind]
    # glibc raises this threshold over time; then matrices share its heap with freed memory, and
    # gaps in the heap count, 17 MB at times. With a fixed threshold each matrix has its own pages
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    peak = min(
        int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
        for _ in range(3)
    )
    whole = (tmp_path / "large/model.safetensors").stat().st_size
    assert whole > 70e6 and peak < bits / 16 * whole + 12e6


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [32, 32]}


@pytest.mark.parametrize("state", [
    {**STATE, "quant_type": [1]}, {**STATE, "blocksize": float("inf")}, {**STATE, "dtype": [1]},
    {**STATE, "shape": "x"}, {**STATE, "nested_blocksize": -5}, "[" * 50_000, [1], 3, None,
])
def test_states_that_bitsandbytes_does_not_write_are_named(state):
    text = state if isinstance(state, str) else json.dumps(state)
    packed = torch.tensor(list(text.encode())).byte()
    with pytest.raises(ValueError, match="file: key: .*(not the state of a 4-bit|not supported)"):
        format_of_state(packed, "file: key")
