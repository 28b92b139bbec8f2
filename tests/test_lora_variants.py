"""methods/lora_variants.py: DoRA and PiSSA against PEFT, in memory and on disk."""
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.adapters import (load_adapter, load_with_adapters, save_adapter, save_converted,
                                 save_pissa_start)
from checkpoint.load import load_model
from lora import LoRAConfig, attach_lora, lora_layers, merge_adapters, set_adapters, trainable
from merge import merge_checkpoint
from methods.lora_variants import variant_arguments
from tests.common import GOLDEN, needs_shared
from tests.tiny_models import IDS, load_in_peft, logits_of, perturb, tiny, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore::Warning:transformers")


# ---- DoRA ----


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_and_its_gradients_equal_pefts(dropout):
    """Output and gradients of x, A, B and m; in training PEFT's dropout also acts on the input of
    the frozen matrix."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(40, 30)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(40, 30)), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=dropout)).train()
    twin = theirs.get_submodule("base_model.model.0")
    twin.base_layer.load_state_dict(base.state_dict())
    config = LoRAConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=dropout)
    ours = attach_lora(nn.Sequential(base), config, **variant_arguments(config)).train()
    layer = ours[0]
    assert torch.allclose(layer.lora_magnitude_vector, base.weight.norm(dim=1))
    perturb(ours)
    pairs = [(layer.lora_A.weight, twin.lora_A.default.weight),
             (layer.lora_B.weight, twin.lora_B.default.weight),
             (layer.lora_magnitude_vector, twin.lora_magnitude_vector.default.weight)]
    xs = [torch.randn(3, 5, 40).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0])
    outs = []
    for a, b in pairs:
        b.data.copy_(a)
    for model, x in ((ours, xs[0]), (theirs, xs[1])):
        torch.manual_seed(1)
        outs.append(model(x))
        outs[-1].square().sum().backward()
    assert torch.allclose(*outs, atol=1e-5)
    for a, b in (*pairs, xs):
        assert a.grad.any() and torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    layer.enabled = False
    assert torch.equal(ours(xs[0]), F.linear(xs[0], base.weight, base.bias))


def test_fresh_dora_changes_nothing_even_for_rows_of_zeros():
    model = tiny()
    model.lm_head.weight.data[40:] = 0                                  # a padded vocabulary
    before = logits_of(model, IDS)
    config = LoRAConfig(target_modules=["all", "lm_head"], use_dora=True)
    attach_lora(model, config, seed=1, **variant_arguments(config))
    assert (logits_of(model, IDS) - before).abs().max() < 1e-5 and not before[..., 40:].any()
    model.logits(model(IDS)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())
    with torch.no_grad():
        model.lm_head.lora_B.weight.fill_(0.1)
    merge_adapters(perturb(model))
    assert model.lm_head.weight.isfinite().all()


def test_dora_magnitudes_stay_in_float32_over_a_bfloat16_base():
    """1.1055 lies between two numbers of bfloat16, 1.1016 and 1.1094."""
    config = LoRAConfig(use_dora=True)
    base = nn.Sequential(nn.Linear(64, 16, bias=False).bfloat16())
    layer = attach_lora(base, config, **variant_arguments(config))[0]
    x = torch.randn(4096, 64).bfloat16()
    before = layer(x).float()
    layer.lora_magnitude_vector.data *= 1.1055
    assert abs((layer(x).float() * before).sum() / before.square().sum() - 1.1055) < 5e-4


def test_dora_magnitudes_at_inference(tmp_path):
    base = write_tiny(tmp_path / "base", tiny())
    config = LoRAConfig(r=3, target_modules=["all", "lm_head"], use_dora=True)
    model = perturb(attach_lora(load_model(base), config, **variant_arguments(config))).eval()
    save_adapter(model, tmp_path, config, "base")
    for fold in (False, True):
        loaded = load_with_adapters(base, [tmp_path], fold_last=fold)
        assert (logits_of(loaded, IDS) - logits_of(model, IDS)).abs().max() < 1e-4
    assert load_with_adapters(base, [tmp_path]).lm_head.fixed_gain is not None


@needs_shared
def test_dora_of_stacked_experts_is_refused():
    model = load_model(GOLDEN / "models" / "llama4", skip_weights=True)
    with pytest.raises(ValueError, match="use_dora: .*experts.* is a stack of experts"):
        config = LoRAConfig(target_modules=["experts"], use_dora=True)
        attach_lora(model, config, stored_name=model.config.stored_name,
                    **variant_arguments(config))


# ---- PiSSA ----


def attach_pissa(model, rank=4, init="pissa", **more):
    config = LoRAConfig(r=rank, lora_alpha=12, init_lora_weights=init, **more)
    return attach_lora(model, config, seed=3, **variant_arguments(config)), config


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_300"])
def test_pissa_starts_as_pefts(init):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(40, 30)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(40, 30)), peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["0"]))
    twin = theirs.get_submodule("base_model.model.0")
    twin.base_layer.load_state_dict(base.state_dict())
    twin.pissa_init("default", init)
    x, wanted = torch.randn(7, 40), base.weight.detach().clone()
    before = base(x)
    layer = attach_pissa(nn.Sequential(base), init=init)[0][0]
    assert torch.allclose(layer(x), before, atol=1e-5)
    assert torch.allclose(layer.weight, twin.base_layer.weight,
                          atol=1e-3 if "niter" in init else 1e-5)
    for ours, peers in ((layer.lora_A.weight, twin.lora_A.default.weight),
                        (layer.lora_B.weight.T, twin.lora_B.default.weight.T)):
        assert torch.allclose(ours.norm(dim=1), peers.norm(dim=1), rtol=1e-3)          # up to signs
    gone = torch.linalg.matrix_norm(wanted - layer.weight, 2) / torch.linalg.matrix_norm(wanted, 2)
    assert abs(gone - 1) < 1e-3 and layer.base_layer is base
    perturb(nn.Sequential(layer))
    layer.enabled = False
    assert torch.allclose(layer(x), before, atol=1e-5)


@pytest.mark.parametrize("more",
                         [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}},
                          {"use_dora": True}, {"modules_to_save": ["norm"]}], ids=str)
def test_pissa_on_disk(more, tmp_path):
    """Loaded, merged, and converted to a plain adapter that PEFT opens on the original base: the
    same logits."""
    base = write_tiny(tmp_path / "base", tiny())
    model, config = attach_pissa(load_model(base), init="pissa_niter_1", **more)
    save_pissa_start(model, tmp_path / "a/pissa_init", config, str(base))
    perturb(model.eval(), size=0.1)
    wanted = logits_of(model, IDS)
    save_adapter(model, tmp_path / "a", config, str(base))
    save_converted(model, tmp_path / "plain", config, str(base))
    again, plain = load_model(base), load_model(base)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits_of(again, IDS), wanted)
    set_adapters(again, False)
    if "modules_to_save" not in more:
        assert (logits_of(again, IDS) - logits_of(load_model(base), IDS)).abs().max() < 1e-4
    read = load_adapter(plain, tmp_path / "plain")
    assert read.r == 8 and not read.pissa
    assert {layer.lora_A.out_features for layer in lora_layers(plain).values()} == {8}
    assert (logits_of(plain, IDS) - wanted).abs().max() < 1e-4
    merge_checkpoint(base, [tmp_path / "a"], tmp_path / "merged")
    assert (logits_of(load_model(tmp_path / "merged"), IDS) - wanted).abs().max() < 1e-4
    with torch.no_grad():
        assert (load_in_peft(base, tmp_path / "plain")(IDS).logits - wanted).abs().max() < 1e-4


def test_pissa_adapters_of_peft(tmp_path):
    """Exact components are computed again from the base, as PEFT does; random ones need the folder
    pissa_init."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = write_tiny(tmp_path / "base", tiny())
    for init in ("pissa", "pissa_niter_2"):
        theirs = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(base),
            peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=init,
                            task_type="CAUSAL_LM"),
        )
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / init / "pissa_init")
        theirs.peft_config["default"].init_lora_weights = init
        perturb(theirs, size=0.1).eval().save_pretrained(tmp_path / init)
        with torch.no_grad():
            wanted = theirs(IDS).logits
        ours = load_model(base)
        load_adapter(ours, tmp_path / init)
        assert (logits_of(ours, IDS) - wanted).abs().max() < 1e-4
        shutil.rmtree(tmp_path / init / "pissa_init")
        ours = load_model(base)
        if init == "pissa":
            load_adapter(ours, tmp_path / init)
            assert (logits_of(ours, IDS) - wanted).abs().max() < 1e-3
            with pytest.raises(
                ValueError, match="PiSSA adapter without its folder pissa_init, which merging reads"
            ):
                merge_checkpoint(base, [tmp_path / init], tmp_path / "merged")
        else:
            with pytest.raises(
                FileNotFoundError,
                match="initialized with pissa_niter_2, .*put its folder pissa_init into",
            ):
                load_adapter(ours, tmp_path / init)


def test_pissa_with_a_rank_that_is_too_large():
    with pytest.raises(
        ValueError,
        match="pissa_init: a matrix of 16 x 32 has no 17 singular components; lower lora_rank",
    ):
        attach_pissa(tiny(), rank=17)
