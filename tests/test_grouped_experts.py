"""fast/grouped_experts.py: experts in one product equal the loop over experts, gradients too."""
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from checkpoint.load import quantizable_weights, set_quantized
from fast import grouped_experts
from fast.compile import compile_steps
from fast.fused_block import fuse_blocks
from fast.grouped_experts import group_experts, grouped_error, one_by_one_for, pick_grouped
from lora import LoRAConfig, attach_lora, lora_layers, set_adapters
from methods.quant import QuantFormat, compile_dequantize, quantize
from model import CausalLM, init_weights
from tests.rehearsal import rehearse
from tests.test_grouped import FORMS, weight_with
from tests.tiny_models import small_config

pytestmark = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"),
                                reason="this torch has no grouped product")
FAMILIES = ("mixtral", "qwen2_moe")


def with_experts(name="mixtral", targets=("all", "experts"), dtype=torch.float32, **changes):
    model = CausalLM(small_config(name, **changes))
    init_weights(model, torch.Generator().manual_seed(0))
    model.to(dtype)
    attach_lora(model, LoRAConfig(8, 16, target_modules=list(targets)), 1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def results(model, length=23):
    """The hidden states, and {name: gradient}; zeros where there is none."""
    model.zero_grad()
    out = model(torch.arange(length)[None])
    # not the sum of squares: behind a norm it is constant, and its gradients are rounding
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return out.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                          for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_within(found, want, rtol):
    for x, right in ((found[0], want[0]), *((found[1][name], want[1][name]) for name in want[1])):
        assert (x - right).float().norm() <= rtol * right.float().norm() + 1e-6


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("targets", (("all", "experts"), ("q_proj",),
                                     ("down_proj", "experts.0.up_proj")))
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_together_equal_the_loop(name, targets, fused):
    twin = with_experts(name, targets)
    model = with_experts(name, targets)
    if fused:
        fuse_blocks(model)
    group_experts(model)
    is_grouped = ["mix" in vars(block.mlp) for block in model.model.layers]
    assert all(is_grouped) == (len(targets) < 2 or "all" in targets)   # one expert differs
    assert_equal_within(results(model), results(twin), 1e-5)
    set_adapters(model, False)
    set_adapters(twin, False)
    with torch.no_grad():
        ids = torch.arange(9)[None]
        torch.testing.assert_close(model(ids), twin(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", (("experts",), ("q_proj",), ("experts.down_proj",)))
@pytest.mark.parametrize("order", ("in, out", "out, in"))
@pytest.mark.parametrize("name", ("gpt_oss", "llama4"))
def test_stacks_together_equal_the_loop(name, order, targets):
    """Biases and the clamp of GPT-OSS, the scaled inputs of Llama 4, both orders of a matrix."""
    pair = []
    for _ in range(2):
        config = replace(small_config(name, num_hidden_layers=1), stacked_experts=order)
        model = CausalLM(config if name == "llama4" else replace(config, swiglu_limit=0.05))
        draw = torch.Generator().manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.1, generator=draw)
        attach_lora(model, LoRAConfig(8, 16, target_modules=list(targets)), 1)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B.weight, std=0.1, generator=draw)
        pair.append(model)
    twin, model = pair
    assert group_experts(model) == "" and "mix" in vars(model.model.layers[0].mlp)
    assert_equal_within(results(model), results(twin), 1e-5)
    for each in pair:
        set_adapters(each, False)
    with torch.no_grad():
        ids = torch.arange(9)[None]
        torch.testing.assert_close(model(ids), twin(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ("none", "mlp", "block"))
def test_experts_without_tokens_and_recomputation(level):
    """3 tokens visit at most 6 of 16 experts; the others' adapters get zeros."""
    changes = {"num_local_experts": 16}
    twin, model = with_experts(**changes), with_experts(**changes)
    levels = [level] * len(model.model.layers)
    fuse_blocks(model, recompute=levels)
    group_experts(model, levels)
    assert_equal_within(results(model, 3), results(twin, 3), 1e-5)


def test_in_bfloat16_with_compiled_steps(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    twin, model = (with_experts(dtype=torch.bfloat16, num_hidden_layers=1) for _ in range(2))
    group_experts(model)
    compile_steps(model)
    assert_equal_within(results(model), results(twin), 0.03)


def test_weights_are_views_of_one_tensor_and_are_found_under_their_names():
    model = with_experts()
    before = deepcopy(model.state_dict())
    group_experts(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    experts = model.model.layers[0].mlp.experts
    places = {expert.gate_proj.base_layer.weight.untyped_storage().data_ptr()
              for expert in experts}
    assert len(places) == 1


def test_what_cannot_be_grouped_stays_as_it_is():
    full = with_experts(targets=["q_proj"]).requires_grad_(True)
    odd_rank = CausalLM(small_config("mixtral"))
    attach_lora(odd_rank, LoRAConfig(4, 16, target_modules=["all", "experts"]), 1)
    dropout = CausalLM(small_config("mixtral"))
    attach_lora(dropout, LoRAConfig(8, 16, lora_dropout=0.1, target_modules=["all", "experts"]), 1)
    sharded = with_experts()
    for block in sharded.model.layers:
        block.mlp.visited = set()
    trained = CausalLM(small_config("llama4"))
    stack_dropout = CausalLM(small_config("gpt_oss"))
    attach_lora(stack_dropout, LoRAConfig(8, 16, lora_dropout=0.1, target_modules=["experts"]), 1)
    odd_width = CausalLM(small_config("gpt_oss", intermediate_size=92)).requires_grad_(False)
    for model in (full, odd_rank, dropout, sharded, trained, stack_dropout, odd_width):
        moe = next(block.mlp for block in model.model.layers if hasattr(block.mlp, "experts"))
        assert one_by_one_for(moe)
        group_experts(model)
        assert "mix" not in vars(moe)


def few_bits(form, targets=("all", "experts"), width=384, seed=0):
    """A small Mixtral with its matrices in few bits, and adapters on top."""
    model = CausalLM(small_config("mixtral", intermediate_size=width, num_hidden_layers=2))
    init_weights(model, torch.Generator().manual_seed(seed))
    for number, name in enumerate(quantizable_weights(model)):
        weight = model.get_parameter(name).data
        if form == "gptq":
            packed, _ = weight_with(FORMS["groups"], *weight.shape, dtype=torch.float32)
            packed.scales.mul_((number % 7 + 1) / 7)
        else:
            packed = quantize(weight, form)
        set_quantized(model, name, packed)
    attach_lora(model, LoRAConfig(8, 16, target_modules=list(targets)), 1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return model


FEW_BITS = {"nf4": QuantFormat("nf4"), "fp4, plain scales": QuantFormat("fp4", nested=0),
            "int8": QuantFormat("int8", nested=0), "gptq": "gptq"}


@pytest.mark.parametrize("level", ("none", "mlp"))
@pytest.mark.parametrize("form", FEW_BITS)
def test_experts_in_few_bits_together_equal_the_loop(form, level):
    twin, model = few_bits(FEW_BITS[form]), few_bits(FEW_BITS[form])
    levels = [level] * 2
    fuse_blocks(model, recompute=levels)
    assert group_experts(model, levels) == ""
    assert all("mix" in vars(block.mlp) for block in model.model.layers)
    assert_equal_within(results(model), results(twin), 1e-5)


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("form", FEW_BITS)
def test_matrices_in_few_bits_are_dequantized_at_once_bit_for_bit(form, compiled):
    model = few_bits(FEW_BITS[form], ["q_proj"])
    experts = model.model.layers[0].mlp.experts
    weights = [expert.up_proj.weight for expert in experts]
    want = [weight.dequantize(torch.bfloat16) for weight in weights]
    nbytes = [weight.nbytes for weight in weights]
    group_experts(model)
    rows = []
    if compiled:
        def compiler(function, tensors):
            return lambda codes, *others: rows.append(len(codes)) or function(codes, *others)

        line = compile_dequantize(model, compiler)
        rows.clear()
        assert bool(line) == (form in ("nf4", "fp4, plain scales"))
    stack, layers = model.model.layers[0].mlp.mix.args[1][1]
    found = grouped_experts.matrices_of(stack, layers, torch.bfloat16)
    assert torch.equal(found, torch.stack(want))
    assert rows == ([found.numel() // 64] if compiled and "4" in form else [])
    assert [weight.nbytes for weight in weights] == nbytes
    assert all(torch.equal(w.dequantize(torch.bfloat16), x) for w, x in zip(weights, want))
    assert len({weight.codes.untyped_storage().data_ptr() for weight in weights}) == 1
    if hasattr(stack, "absmax"):
        assert len({weight.absmax.untyped_storage().data_ptr() for weight in weights}) == 1


def test_experts_one_by_one_are_said_with_the_reason():
    assert group_experts(with_experts()) == ""
    assert group_experts(CausalLM(small_config("llama"))) == ""
    sharded = with_experts()
    for block in sharded.model.layers:
        block.mlp.visited = set()
    columns = few_bits("gptq")
    for block in columns.model.layers:                      # each expert has an order of its own
        for expert in block.mlp.experts:
            weight = expert.up_proj.base_layer.weight
            weight.quant_format = replace(weight.quant_format, with_columns=True)
    for model, options, reason in ((sharded, {}, "fsdp shards them"),
                                   (few_bits(QuantFormat("nf4"), width=352), {}, "read at once"),
                                   (columns, {}, "read at once"),
                                   (with_experts(), {"fp8": True}, "8 bits")):
        line = group_experts(model, **options)
        layers = len(model.model.layers)
        assert f"one by one in {layers} of {layers} layers" in line and reason in line
        assert not any("mix" in vars(block.mlp) for block in model.model.layers)


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss"))
def test_the_device_is_not_waited_for(name):
    """In forward and backward; the loop waits once in each layer."""
    with rehearse() as record:
        model = with_experts(name, dtype=torch.bfloat16).to("cuda")
        ids = torch.arange(9).pin_memory().to("cuda", non_blocking=True)[None]
        for grouped in (False, True):
            if grouped:
                group_experts(model)
            before = len(record.waits)
            model(ids).float().sum().backward()
            waits = [event.place for event in record.waits[before:]]
            layers = len(model.model.layers)
            assert waits.count(("layers.py", "grouped")) == (0 if grouped else 2 * layers), waits
            assert not grouped or not waits, waits


class OnMeta(grouped_experts.Stack):
    """A stack whose matrices are W."""

    def matrices(self, dtype):
        return self.W


@pytest.mark.parametrize("name", ("mixtral", "gpt_oss"))
def test_nothing_in_it_needs_a_number_of_the_device(name):
    """Shapes alone, on the meta device: a wait would be an error."""
    model = with_experts(name, dtype=torch.bfloat16)
    group_experts(model)
    moe = model.model.layers[0].mlp
    stacks = moe.mix.args[1]
    meta = []
    for stack, layers in stacks:
        _, A, B, scale, _, bias = grouped_experts.with_adapters(stack, layers, torch.bfloat16)
        W = grouped_experts.matrices_of(stack, layers, torch.bfloat16).to("meta")
        bias = None if bias is None else bias.to("meta")
        meta.append(OnMeta(W, A.to("meta"), B.to("meta"), scale, layers, bias))
    rows = torch.empty(12, model.config.hidden_size, dtype=torch.bfloat16, device="meta")
    ends = torch.empty(moe.config.num_experts, dtype=torch.int32, device="meta")
    out = grouped_experts.run_experts(grouped_experts.gate_of(moe), meta, ends, rows)
    assert out.shape == rows.shape and out.is_meta


def test_it_is_tried_before_use(monkeypatch):
    assert pick_grouped("cpu", torch.bfloat16)[0] is False
    assert all(grouped_error("cpu", torch.bfloat16, kind=kind) < 0.02
               for kind in grouped_experts.TRIALS)
    monkeypatch.setattr(grouped_experts, "grouped_error", lambda *args: 1.0)
    works, line = pick_grouped("cuda", torch.bfloat16)
    assert not works and "is wrong by 1" in line
    monkeypatch.setattr(grouped_experts, "grouped_error", lambda *args: 1 / 0)
    assert "fails: division by zero" in pick_grouped("cuda", torch.bfloat16)[1]
    monkeypatch.setattr(grouped_experts, "grouped_error", lambda *args: 0.01)
    assert pick_grouped("cuda", torch.bfloat16)[0] is True
    assert pick_grouped("cuda", torch.float32)[0] is False
