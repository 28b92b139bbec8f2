"""lora.py: which layers get adapters, what they compute and train, against PEFT and by hand."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from checkpoint.adapters import adapter_tensors, load_adapter, save_adapter
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from lora import (LoRAConfig, LoRALinear, LoRAStacked, attach_lora, find_targets, lora_layers,
                  merged_weight, set_adapters, trainable)
from losses import cross_entropy_sum
from methods.lora_variants import variant_arguments
from layers import StackedLinear
from model import CausalLM
from tests.common import GOLDEN, needs_shared
from tests.tiny_models import IDS, checkpoint_of, load_in_peft, logits_of, perturb, tiny, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore::Warning:transformers")


# ---- fresh adapters ----


def test_fresh_adapter_changes_nothing_and_trains_only_itself():
    model = tiny().requires_grad_(True)
    before = logits_of(model, IDS)
    attach_lora(model, LoRAConfig(r=4), seed=1)
    assert torch.equal(logits_of(model, IDS), before)
    model.logits(model(IDS)).square().mean().backward()
    trained = trainable(model)
    assert len(trained) == 2 * 2 * 7
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in trained)
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in trained), name
    for name, p in trained.items():  # B is zero, so at first only B has a gradient
        assert bool(p.grad.any()) == ("lora_B" in name), name


def test_initial_values_are_distributed_as_in_peft():
    peft = pytest.importorskip("peft")
    ours = attach_lora(nn.Sequential(nn.Linear(400, 30)), LoRAConfig(r=64), seed=3)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(400, 30)),
                                 peft.LoraConfig(r=64, target_modules=["0"]))
    weights = [lora_layers(ours)["0"].lora_A.weight,
               theirs.get_submodule("base_model.model.0.lora_A.default").weight]
    for A in weights:                                                   # uniform in ±1/sqrt(400)
        A = A.detach()
        assert A.shape == (64, 400) and 0.0499 < A.abs().max() <= 0.05
        assert abs(A.mean()) < 1e-3 and abs(A.std() - 0.05 / math.sqrt(3)) < 5e-4
    assert not lora_layers(ours)["0"].lora_B.weight.any()


def test_initial_values_depend_on_the_seed_only():
    def A(seed, targets="all"):
        model = attach_lora(tiny(), LoRAConfig(target_modules=targets), seed)
        return model.model.layers[1].self_attn.v_proj.lora_A.weight

    torch.manual_seed(0)
    first = A(7)
    torch.manual_seed(1)
    assert torch.equal(first, A(7))
    assert torch.equal(first, A(7, ["v_proj"]))
    assert not torch.equal(first, A(8))
    model = attach_lora(tiny(), LoRAConfig(target_modules=["q_proj"]), 7)
    assert not torch.equal(*(layer.self_attn.q_proj.lora_A.weight for layer in model.model.layers))


def test_dropout_acts_on_the_input_of_A_in_training_only():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(40, 30), r=4, scale=2.0, dropout=0.5)
    x = torch.randn(3, 40)

    def by_hand(x_dropped):
        return (F.linear(x, layer.weight, layer.base_layer.bias)
                + 2.0 * F.linear(F.linear(x_dropped, layer.lora_A.weight), layer.lora_B.weight))

    torch.manual_seed(1)
    got = layer.train()(x)
    torch.manual_seed(1)
    assert torch.allclose(got, by_hand(F.dropout(x, 0.5)), atol=1e-6)
    assert torch.allclose(layer.eval()(x), by_hand(x), atol=1e-6)
    assert not torch.allclose(got, layer(x), atol=1e-2)


# ---- which modules ----


def test_targets_by_name_path_pattern_and_all():
    model = tiny()
    one, two = "model.layers.0.", "model.layers.1."
    assert find_targets(model, ["v_proj", "q_proj"]) == [
        f"{i}self_attn.{n}_proj" for i in (one, two) for n in "qv"
    ]
    assert find_targets(model, ["layers.1.mlp.up_proj"]) == [two + "mlp.up_proj"]
    assert find_targets(model, ["lm_head", one + "self_attn.o_proj"]) == [
        one + "self_attn.o_proj", "lm_head"
    ]
    assert find_targets(model, r".*\.0\..*(gate|up)_proj") == [
        one + "mlp.gate_proj", one + "mlp.up_proj"
    ]
    assert find_targets(model, [r".*\.1\.self_attn\.(q|k)_proj", "lm_head"]) == [
        two + "self_attn.q_proj", two + "self_attn.k_proj", "lm_head"]
    for every in ("all", "all-linear", ["all"]):
        found = find_targets(model, every)
        assert len(found) == 14 and "lm_head" not in found


@pytest.mark.parametrize("target, words", [
    (["q_prj"],
     r"lora_target: 'q_prj' matches no linear layer .* \(did you mean "
     r"'q_proj'\?\); it has down_proj,"),
    (["proj"], "'proj' matches no linear layer"),  # a part of a name is not a name
    (["embed_tokens"],
     "'embed_tokens' matches no linear layer .*: additional_target: embed_tokens$"),
    ("q_proj", "pattern 'q_proj' matches no linear layer; names look like 'model.layers.0"),
    ("*q_proj", "is no regular expression"), (["*q_proj"], "is no regular expression"),
    ([".*q_prj"], "pattern '.*q_prj' matches no linear layer"),
])
def test_unknown_targets_are_errors(target, words):
    with pytest.raises(ValueError, match=words):
        attach_lora(tiny(), LoRAConfig(target_modules=target))


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_patterns_equal_peft(rslora, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    settings = dict(
        r=4, lora_alpha=8, use_rslora=rslora,
        target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6, r"layers\.0\..*_proj": 3},
        alpha_pattern={"k_proj": 20, r"model.layers.1.self_attn.q_proj": 5, "up": 99},
    )
    ours = attach_lora(tiny(), LoRAConfig(**settings))
    base = transformers.AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path, tiny()))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        assert (layer.lora_A.out_features, layer.scale) == (
            twin.r["default"], twin.scaling["default"]
        ), name
    assert len({layer.lora_A.out_features for layer in lora_layers(ours).values()}) == 4
    save_adapter(perturb(ours), tmp_path, LoRAConfig(**settings), str(tmp_path))
    with torch.no_grad():
        logits = load_in_peft(tmp_path, tmp_path)(IDS).logits
    assert (logits - logits_of(ours, IDS)).abs().max() < 1e-4
    again = tiny()
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again, IDS), logits_of(ours, IDS))


# ---- modules_to_save (additional_target) ----


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "gate_proj", "lm_head"]],
                         ids=["q", "with head"])
@pytest.mark.parametrize(
    "whole", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"], ["mlp"]],
    ids="+".join,
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_modules_to_save_equal_peft(tied, whole, targets, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = write_tiny(tmp_path / "base", tiny(tie_word_embeddings=tied), tie_word_embeddings=tied)
    config = LoRAConfig(r=3, target_modules=targets, modules_to_save=whole)
    ours = perturb(attach_lora(load_model(base), config))
    (tmp_path / "ours").mkdir()
    save_adapter(ours, tmp_path / "ours", config, str(base))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(r=3, target_modules=targets, modules_to_save=whole, task_type="CAUSAL_LM"),
    )
    theirs.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    assert adapter_tensors(ours).keys() == {key for key in keys
                                            if not key.endswith("base_layer.weight")}
    load_adapter(load_model(base), tmp_path / "theirs")  # PEFT's copy of the frozen head is skipped
    # also on the meta device, as in merging
    load_adapter(load_model(base, skip_weights=True), tmp_path / "theirs")

    wanted = logits_of(ours, IDS)
    with torch.no_grad():
        assert (load_in_peft(base, tmp_path / "ours")(IDS).logits - wanted).abs().max() < 1e-4
    again = load_model(base)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits_of(again, IDS), wanted)
    if whole == ["lm_head"]:  # a tied head is untied; the embedding stays
        assert torch.equal(ours.model.embed_tokens.weight,
                           tiny(tie_word_embeddings=tied).model.embed_tokens.weight)


def test_unknown_modules_to_save_are_errors():
    with pytest.raises(
        ValueError, match=r"additional_target: 'lm_haed' is no module .* \(did you mean 'lm_head'"
    ):
        attach_lora(tiny(), LoRAConfig(modules_to_save=["lm_haed"]))


def test_adapted_head_in_the_loss_equals_its_logits():
    targets = IDS.roll(-1, 1).flatten()
    for config in (LoRAConfig(target_modules=["lm_head"]), LoRAConfig(modules_to_save=["lm_head"]),
                   LoRAConfig(target_modules=["lm_head"], use_dora=True)):
        model, gradients = perturb(attach_lora(tiny(), config, **variant_arguments(config))), []
        losses = (F.cross_entropy(model.logits(model(IDS)).flatten(0, 1), targets, reduction="sum"),
                  cross_entropy_sum(model(IDS).flatten(0, 1), model.head_weight(), targets))
        for loss in losses:
            model.zero_grad()
            loss.backward()
            gradients.append([p.grad.clone() for p in trainable(model).values()])
        assert torch.allclose(*losses, rtol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) and a.any() for a, b in zip(*gradients))


# ---- precision ----


def test_float32_adapter_over_a_bfloat16_base():
    exact = tiny().to(torch.bfloat16).float()  # the same numbers, in float32
    model = tiny().to(torch.bfloat16)
    config = LoRAConfig(r=4, modules_to_save=["lm_head", "embed_tokens"])
    for each in (exact, model):
        perturb(attach_lora(each, config, seed=2), size=0.1)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    hidden = model(IDS)
    assert hidden.dtype == torch.bfloat16 and model.logits(hidden).dtype == torch.bfloat16
    wanted = logits_of(exact, IDS)
    assert (model.logits(hidden).float() - wanted).norm() / wanted.norm() < 0.03
    set_adapters(exact, False)
    assert (logits_of(exact, IDS) - wanted).norm() / wanted.norm() > 0.5
    model.logits(hidden).float().square().mean().backward()
    for p in trainable(model).values():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any()


def test_merging_sums_in_float32_and_keeps_the_dtype():
    torch.manual_seed(0)
    W, A, B = torch.randn(30, 20), torch.randn(4, 20), torch.randn(30, 4)
    exact = W.bfloat16().double() + 0.7 * (B.double() @ A.double())
    merged = merged_weight(W.bfloat16(), A, B, 0.7)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())                        # rounded once, at the end


# ---- counts ----


@needs_shared
def test_counts_of_the_published_runs():
    log = json.loads((GOLDEN / "published" / "llama_factory_logs.json").read_text())
    with torch.device("meta"):
        model = CausalLM(model_config({**log["llama3_8b_config"], "model_type": "llama"}))
    attach_lora(model, LoRAConfig(r=8, target_modules="all"))
    assert sum(p.numel()
               for p in trainable(model).values()) == log["base"]["trainable_params"] == 20_971_520
    assert sum(p.numel() for p in model.parameters()) == log["base"]["all_params"] == 8_051_232_768


# ---- several adapters ----


def test_a_second_adapter_needs_the_first_to_be_merged():
    with pytest.raises(AssertionError, match="merge"):
        attach_lora(attach_lora(tiny(), LoRAConfig()), LoRAConfig())


# ---- vendors' names ----


@needs_shared
def test_all_means_the_same_as_in_llama_factory():
    """Counted in release 0.9.5 with transformers 5: neither routers nor routed experts, but shared
    ones."""
    counts = {"qwen2_moe": 16, "qwen3_moe": 15, "llama4": 28, "llama4_nested": 28, "phi3": 8,
              "glm": 12, "gemma2": 28}
    for name, count in counts.items():
        model = load_model(GOLDEN / "models" / name, skip_weights=True)
        found = find_targets(model, "all", model.config.stored_name)
        assert len(found) == count and not any(".experts." in layer for layer in found), name
        if model.config.stacked_experts:
            both = find_targets(model, ["all", "experts"], model.config.stored_name)
            assert len(both) == count + 2 * sum(model.config.sparse)
    model = load_model(GOLDEN / "models" / "qwen2_moe", skip_weights=True)
    assert {layer.split("mlp.")[1] for layer in find_targets(model, "all") if "mlp." in layer} == {
        "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj",
        "shared_expert_gate",
    }


# ---- stacked experts ----


def test_gradients_of_a_stacked_adapter():
    torch.manual_seed(0)
    base = StackedLinear(4, 6, 5).requires_grad_(False)  # (E, in, out)
    base.weight.normal_()
    layer = LoRAStacked(base, r=2, scale=1.5, dropout=0.0)
    A, B = (nn.Parameter(part.weight.detach().clone()) for part in (layer.lora_A, layer.lora_B))
    delta = torch.einsum("ore,eri->eio", B.view(5, 2, 4), A.view(4, 2, 6))
    x = torch.randn(4, 3, 6)
    ours, theirs = torch.stack([layer(x[e], e) for e in range(4)]), x @ (base.weight + 1.5 * delta)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for y in (ours, theirs):
        y.square().sum().backward()
    assert torch.allclose(layer.lora_A.weight.grad, A.grad, atol=1e-3) and A.grad.any()
    assert torch.allclose(layer.lora_B.weight.grad, B.grad, atol=1e-3) and layer.weight.grad is None


@needs_shared
def test_experts_in_modules_to_save_over_a_bfloat16_base():
    model = load_model(GOLDEN / "models" / "llama4", torch.bfloat16)
    wanted = logits_of(model, IDS)
    config = LoRAConfig(target_modules=["q_proj"], modules_to_save=["experts", "router"])
    attach_lora(model, config, stored_name=model.config.stored_name)
    # later layers differ by rounding
    assert (logits_of(model, IDS) - wanted).norm() < 0.02 * wanted.norm()
    model.logits(model(IDS)).float().square().mean().backward()
    whole = {name: p for name, p in trainable(model).items() if ".lora_" not in name}
    assert len(whole) == 3 * sum(model.config.sparse)
    assert {p.dtype for p in whole.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.any() for name, p in whole.items())


# ---- vendors' names in other settings ----


@needs_shared
@pytest.mark.parametrize("name, targets, words", [
    ("chatglm3", ["query_key_vale"],
     r"did you mean 'query_key_value'\?\); it has dense, dense_4h_to_h"),
    # our name is not the vendor's
    ("baichuan2_7b", ["qkv_proj"], "'qkv_proj' matches no linear layer .*W_pack"),
    ("internlm2", "mlp", "pattern 'mlp' .* names look like 'model.layers.0.attention.wqkv'"),
])
def test_errors_use_the_vendors_names(name, targets, words, tmp_path):
    model = load_model(checkpoint_of(name, tmp_path), skip_weights=True)
    with pytest.raises(ValueError, match=words):
        attach_lora(model, LoRAConfig(target_modules=targets), stored_name=model.config.stored_name)
