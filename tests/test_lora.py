"""lora.py and the adapter half of checkpoint/load.py, against PEFT: what it recorded, what it computes, what it reads."""
import json
import math
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint.adapters import (adapter_tensors, load_adapter, load_with_adapters, peft_names,
                                 save_adapter, save_converted, save_pissa_start)
from checkpoint.load import PREFIX, load_model
from config import Config
from families import model_config
from methods.lora_variants import variant_of
from lora import (LoRAConfig, LoRALinear, LoRAStacked, attach_lora, expert_matrices, find_targets,
                  lora_layers, merge_adapters, merged_weight, set_adapters, trainable, unfreeze)
from losses import cross_entropy_sum
from merge import merge_checkpoint
from model import CausalLM, StackedLinear
from optim import parameter_groups
from tests import twins
from tests.common import GOLDEN, needs_shared
from tests.test_model import tiny, write

RECORDED = [f"{base}_{kind}" for base in ("llama3", "qwen2", "qwen3")
            for kind in ("r8", "r4_rslora", "r8_qv", "r8_dora")]
pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore::Warning:transformers")
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(5))


def golden(name):
    """Base model, adapter folder, and what PEFT computed with them."""
    folder = GOLDEN / "lora" / name
    model = load_model(GOLDEN / "models" / name.split("_")[0], torch.float32)
    return model, folder, load_file(folder / "expected.safetensors")


def logits_of(model, ids):
    with torch.no_grad():
        return model.logits(model(ids))


def in_peft(base_folder, adapter_folder):
    """The same base and adapter, loaded by transformers and PEFT."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter_folder).eval()
    assert not [w for w in said if "missing adapter keys" in str(w.message)]
    return model


def shake(model, seed=0, size=0.3):
    """Give every trained parameter a value of its own, so that an adapter that is not used shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


# ---- adapters that PEFT wrote ----


@needs_shared
@pytest.mark.parametrize("name", RECORDED)
def test_golden_adapter(name):
    model, folder, want = golden(name)
    real = want["attention_mask"].bool()

    def far(logits, key):
        return (logits - want[key])[real].abs().max()

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), want["labels"][:, 1:].flatten(), ignore_index=-100)

    load_adapter(model, folder)
    model.eval()
    logits = logits_of(model, want["input_ids"])
    assert far(logits, "logits") < 1e-4 and abs(loss(logits) - want["loss"]) < 1e-5
    set_adapters(model, False)
    off = logits_of(model, want["input_ids"])
    assert far(off, "logits_base") < 1e-4 and far(off, "logits") > 0.1
    set_adapters(model, True)
    merge_adapters(model)
    assert not lora_layers(model) and not trainable(model)
    merged = logits_of(model, want["input_ids"])
    assert far(merged, "logits_merged") < 1e-4 and abs(loss(merged) - want["loss_merged"]) < 1e-5
    weights = {key: value for key, value in want.items() if key.startswith("merged.")}
    assert weights
    for key, value in weights.items():
        assert (model.get_parameter(key.removeprefix("merged.")) - value).abs().max() < 1e-5, key


@needs_shared
@pytest.mark.parametrize("name", RECORDED)
def test_saved_golden_adapter_is_the_same_file_and_peft_reads_it(name, tmp_path):
    model, folder, want = golden(name)
    config = load_adapter(model, folder)
    save_adapter(model, tmp_path, config, "somewhere/base")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    written, recorded = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, folder))
    assert sorted(written.pop("target_modules")) == sorted(recorded["target_modules"])
    assert {**written, "base_model_name_or_path": None} == {key: recorded[key] for key in written} | {
        "base_model_name_or_path": None}
    with torch.no_grad():
        logits = in_peft(GOLDEN / "models" / name.split("_")[0], tmp_path)(want["input_ids"]).logits
    real = want["attention_mask"].bool()
    assert (logits - logits_of(model.eval(), want["input_ids"]))[real].abs().max() < 1e-4


# ---- fresh adapters ----


def test_fresh_adapter_changes_nothing_and_trains_only_itself():
    model = tiny().requires_grad_(True)
    before = logits_of(model, IDS)
    attach_lora(model, LoRAConfig(r=4), seed=1)
    assert torch.equal(logits_of(model, IDS), before)
    model.logits(model(IDS)).square().mean().backward()
    learn = trainable(model)
    assert len(learn) == 2 * 2 * 7 and all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in learn)
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in learn), name
    for name, p in learn.items():                                       # B is zero, so only B feels the loss at first
        assert bool(p.grad.any()) == ("lora_B" in name), name


def test_fresh_adapter_is_distributed_as_pefts():
    peft = pytest.importorskip("peft")
    ours = attach_lora(nn.Sequential(nn.Linear(400, 30)), LoRAConfig(r=64), seed=3)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(400, 30)), peft.LoraConfig(r=64, target_modules=["0"]))
    weights = [lora_layers(ours)["0"].lora_A.weight, theirs.get_submodule("base_model.model.0.lora_A.default").weight]
    for A in weights:                                                   # uniform in ±1/sqrt(400)
        A = A.detach()
        assert A.shape == (64, 400) and 0.0499 < A.abs().max() <= 0.05
        assert abs(A.mean()) < 1e-3 and abs(A.std() - 0.05 / math.sqrt(3)) < 5e-4
    assert not lora_layers(ours)["0"].lora_B.weight.any()


def test_seed_decides_the_adapter_whatever_else_is_adapted():
    def A(seed, targets="all"):
        model = attach_lora(tiny(), LoRAConfig(target_modules=targets), seed)
        return model.model.layers[1].self_attn.v_proj.lora_A.weight

    torch.manual_seed(0)
    first = A(7)
    torch.manual_seed(1)
    assert torch.equal(first, A(7)) and torch.equal(first, A(7, ["v_proj"])) and not torch.equal(first, A(8))
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
    assert torch.allclose(layer.eval()(x), by_hand(x), atol=1e-6) and not torch.allclose(got, layer(x), atol=1e-2)


# ---- DoRA ----


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_and_its_gradients_equal_pefts(dropout):
    """Output and gradients of x, A, B and m; in training PEFT's dropout acts on what the frozen matrix sees, too."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(40, 30)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(40, 30)), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=dropout)).train()
    twin = theirs.get_submodule("base_model.model.0")
    twin.base_layer.load_state_dict(base.state_dict())
    config = LoRAConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=dropout)
    ours = attach_lora(nn.Sequential(base), config, **variant_of(config)).train()
    layer = ours[0]
    assert torch.allclose(layer.lora_magnitude_vector, base.weight.norm(dim=1))
    shake(ours)
    pairs = [(layer.lora_A.weight, twin.lora_A.default.weight), (layer.lora_B.weight, twin.lora_B.default.weight),
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


def test_fresh_dora_changes_nothing_also_where_rows_are_zeros():
    model = tiny()
    model.lm_head.weight.data[40:] = 0                                  # a vocabulary that was filled up
    before = logits_of(model, IDS)
    config = LoRAConfig(target_modules=["all", "lm_head"], use_dora=True)
    attach_lora(model, config, seed=1, **variant_of(config))
    assert (logits_of(model, IDS) - before).abs().max() < 1e-5 and not before[..., 40:].any()
    model.logits(model(IDS)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())
    with torch.no_grad():
        model.lm_head.lora_B.weight.fill_(0.1)
    merge_adapters(shake(model))
    assert model.lm_head.weight.isfinite().all()


def test_lengths_of_dora_keep_their_digits_beside_a_bfloat16_base():
    """1.1055 lies between two numbers of bfloat16, 1.1016 and 1.1094."""
    config = LoRAConfig(use_dora=True)
    base = nn.Sequential(nn.Linear(64, 16, bias=False).bfloat16())
    layer = attach_lora(base, config, **variant_of(config))[0]
    x = torch.randn(4096, 64).bfloat16()
    before = layer(x).float()
    layer.lora_magnitude_vector.data *= 1.1055
    assert abs((layer(x).float() * before).sum() / before.square().sum() - 1.1055) < 5e-4


def test_dora_beside_inference_keeps_its_lengths(tmp_path):
    base = write(tmp_path / "base", tiny())
    config = LoRAConfig(r=3, target_modules=["all", "lm_head"], use_dora=True)
    model = shake(attach_lora(load_model(base), config, **variant_of(config))).eval()
    save_adapter(model, tmp_path, config, "base")
    for fold in (False, True):
        loaded = load_with_adapters(base, [tmp_path], fold_last=fold)
        assert (logits_of(loaded, IDS) - logits_of(model, IDS)).abs().max() < 1e-4
    assert load_with_adapters(base, [tmp_path]).lm_head.fixed_gain is not None


@needs_shared
def test_dora_of_stacks_is_refused():
    model = load_model(GOLDEN / "models" / "llama4", skip_weights=True)
    with pytest.raises(ValueError, match="use_dora: .*experts.* is a stack of experts"):
        config = LoRAConfig(target_modules=["experts"], use_dora=True)
        attach_lora(model, config, stored_name=model.config.stored_name, **variant_of(config))


# ---- PiSSA ----


def pissa(model, rank=4, init="pissa", **more):
    config = LoRAConfig(r=rank, lora_alpha=12, init_lora_weights=init, **more)
    return attach_lora(model, config, seed=3, **variant_of(config)), config


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_300"])
def test_pissa_begins_as_pefts(init):
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
    layer = pissa(nn.Sequential(base), init=init)[0][0]
    assert torch.allclose(layer(x), before, atol=1e-5)
    assert torch.allclose(layer.weight, twin.base_layer.weight, atol=1e-3 if "niter" in init else 1e-5)
    for ours, peers in ((layer.lora_A.weight, twin.lora_A.default.weight),
                        (layer.lora_B.weight.T, twin.lora_B.default.weight.T)):
        assert torch.allclose(ours.norm(dim=1), peers.norm(dim=1), rtol=1e-3)          # up to signs
    gone = torch.linalg.matrix_norm(wanted - layer.weight, 2) / torch.linalg.matrix_norm(wanted, 2)
    assert abs(gone - 1) < 1e-3 and layer.base_layer is base
    shake(nn.Sequential(layer))
    layer.enabled = False
    assert torch.allclose(layer(x), before, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}, {"use_dora": True},
                                  {"modules_to_save": ["norm"]}], ids=str)
def test_pissa_on_disk(more, tmp_path):
    """Read again, merged, and converted to a plain adapter, which PEFT opens on the base as it was: all the same."""
    base = write(tmp_path / "base", tiny())
    model, config = pissa(load_model(base), init="pissa_niter_1", **more)
    save_pissa_start(model, tmp_path / "a/pissa_init", config, str(base))
    shake(model.eval(), size=0.1)
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
        assert (in_peft(base, tmp_path / "plain")(IDS).logits - wanted).abs().max() < 1e-4


def test_pissa_that_peft_made(tmp_path):
    """Exact parts are found again in the base, as PEFT does; random ones only with the folder pissa_init."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = write(tmp_path / "base", tiny())
    for init in ("pissa", "pissa_niter_2"):
        theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(
            r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=init, task_type="CAUSAL_LM"))
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / init / "pissa_init")
        theirs.peft_config["default"].init_lora_weights = init
        shake(theirs, size=0.1).eval().save_pretrained(tmp_path / init)
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
            with pytest.raises(ValueError, match="PiSSA adapter without its folder pissa_init, which merging reads"):
                merge_checkpoint(base, [tmp_path / init], tmp_path / "merged")
        else:
            with pytest.raises(FileNotFoundError, match="begun with pissa_niter_2, .*put its folder pissa_init into"):
                load_adapter(ours, tmp_path / init)


def test_pissa_of_more_parts_than_there_are():
    with pytest.raises(ValueError, match="pissa_init: a matrix of 16 x 32 has no 17 singular components; lower lora_rank"):
        pissa(tiny(), rank=17)


# ---- some layers alone (finetuning_type: freeze) ----

FREEZE = [      # layers, modules, extra modules: what learns, as LLaMA-Factory 0.9.5 chose it of a model of 2 layers
    (1, ["all"], [], lambda name: ".1." in name),
    (-1, ["mlp", "input_layernorm"], ["lm_head"], lambda n: ".0.mlp" in n or ".0.input" in n or "head" in n),
    (5, ["self_attn"], ["embed_tokens"], lambda name: "self_attn" in name or "embed" in name),
    (-1, ["self_attn"], ["norm"], lambda name: ".0.self_attn" in name or "norm" in name),       # of all layers
    (0, ["all"], ["norm"], lambda name: "norm" in name),
]


@pytest.mark.parametrize("layers, modules, extra, learns", FREEZE)
def test_layers_that_learn(layers, modules, extra, learns):
    model = unfreeze(tiny(), layers, modules, extra)
    assert set(trainable(model)) == {name for name, _ in model.named_parameters() if learns(name)} != set()


@pytest.mark.parametrize("modules, extra, words", [
    (["mpl"], [], r"freeze_trainable_modules: 'mpl' is no .*\(did you mean 'mlp'\?\); it has input_layernorm, mlp,"),
    (["all"], ["lm_haed"], r"freeze_extra_modules: 'lm_haed' .*'lm_head'\?\); it has embed_tokens, lm_head, norm$"),
])
def test_layers_that_are_not_there(modules, extra, words):
    with pytest.raises(ValueError, match=words):
        unfreeze(tiny(), 1, modules, extra)


# ---- which modules ----


def test_targets_by_name_path_pattern_and_all():
    model = tiny()
    one, two = "model.layers.0.", "model.layers.1."
    assert find_targets(model, ["v_proj", "q_proj"]) == [f"{i}self_attn.{n}_proj" for i in (one, two) for n in "qv"]
    assert find_targets(model, ["layers.1.mlp.up_proj"]) == [two + "mlp.up_proj"]
    assert find_targets(model, ["lm_head", one + "self_attn.o_proj"]) == [one + "self_attn.o_proj", "lm_head"]
    assert find_targets(model, r".*\.0\..*(gate|up)_proj") == [one + "mlp.gate_proj", one + "mlp.up_proj"]
    assert find_targets(model, [r".*\.1\.self_attn\.(q|k)_proj", "lm_head"]) == [
        two + "self_attn.q_proj", two + "self_attn.k_proj", "lm_head"]
    for every in ("all", "all-linear", ["all"]):
        found = find_targets(model, every)
        assert len(found) == 14 and "lm_head" not in found


@pytest.mark.parametrize("target, words", [
    (["q_prj"], r"lora_target: 'q_prj' matches no linear layer .* \(did you mean 'q_proj'\?\); it has down_proj,"),
    (["proj"], "'proj' matches no linear layer"),                       # a part of a name is not a name
    (["embed_tokens"], "'embed_tokens' matches no linear layer .*: additional_target: embed_tokens$"),
    ("q_proj", "pattern 'q_proj' matches no linear layer; names look like 'model.layers.0"),
    ("*q_proj", "is no regular expression"), (["*q_proj"], "is no regular expression"),
    ([".*q_prj"], "pattern '.*q_prj' matches no linear layer"),
])
def test_target_that_is_not_there(target, words):
    with pytest.raises(ValueError, match=words):
        attach_lora(tiny(), LoRAConfig(target_modules=target))


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_patterns_equal_peft(rslora, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    settings = dict(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
                    rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6, r"layers\.0\..*_proj": 3},
                    alpha_pattern={"k_proj": 20, r"model.layers.1.self_attn.q_proj": 5, "up": 99})
    ours = attach_lora(tiny(), LoRAConfig(**settings))
    base = transformers.AutoModelForCausalLM.from_pretrained(write(tmp_path, tiny()))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        assert (layer.lora_A.out_features, layer.scale) == (twin.r["default"], twin.scaling["default"]), name
    assert len({layer.lora_A.out_features for layer in lora_layers(ours).values()}) == 4
    save_adapter(shake(ours), tmp_path, LoRAConfig(**settings), str(tmp_path))
    with torch.no_grad():
        logits = in_peft(tmp_path, tmp_path)(IDS).logits
    assert (logits - logits_of(ours, IDS)).abs().max() < 1e-4
    again = tiny()
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again, IDS), logits_of(ours, IDS))


# ---- modules trained whole (additional_target) ----


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "gate_proj", "lm_head"]], ids=["q", "with head"])
@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"], ["mlp"]],
                         ids="+".join)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_modules_to_save_equal_peft(tied, whole, targets, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = write(tmp_path / "base", tiny(tie_word_embeddings=tied), tie_word_embeddings=tied)
    config = LoRAConfig(r=3, target_modules=targets, modules_to_save=whole)
    ours = shake(attach_lora(load_model(base), config))
    (tmp_path / "ours").mkdir()
    save_adapter(ours, tmp_path / "ours", config, str(base))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, target_modules=targets, modules_to_save=whole,
                                                         task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "theirs")
    keys = load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    assert adapter_tensors(ours).keys() == {key for key in keys if not key.endswith("base_layer.weight")}
    load_adapter(load_model(base), tmp_path / "theirs")                 # PEFT's copy of the frozen head is no obstacle
    load_adapter(load_model(base, skip_weights=True), tmp_path / "theirs")  # nor on the meta device, as in merging

    wanted = logits_of(ours, IDS)
    with torch.no_grad():
        assert (in_peft(base, tmp_path / "ours")(IDS).logits - wanted).abs().max() < 1e-4
    again = load_model(base)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits_of(again, IDS), wanted)
    if whole == ["lm_head"]:                                            # a tied head is untied; the embedding stays
        assert torch.equal(ours.model.embed_tokens.weight, tiny(tie_word_embeddings=tied).model.embed_tokens.weight)


def test_copy_of_another_base_in_an_adapter_is_refused(tmp_path):
    model = attach_lora(tiny(), LoRAConfig(target_modules=["lm_head"]))
    save_adapter(model, tmp_path, LoRAConfig(target_modules=["lm_head"]), "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for copy, fine in ((model.lm_head.weight.detach().clone(), True), (model.lm_head.weight + 1, False)):
        save_file({**tensors, PREFIX + "lm_head.base_layer.weight": copy}, tmp_path / "adapter_model.safetensors")
        if fine:
            load_adapter(tiny(), tmp_path)
        else:
            with pytest.raises(ValueError, match="not used: 1, such as base_model.model.lm_head.base_layer.weight"):
                load_adapter(tiny(), tmp_path)


def test_modules_to_save_that_is_not_there():
    with pytest.raises(ValueError, match=r"additional_target: 'lm_haed' is no module .* \(did you mean 'lm_head'"):
        attach_lora(tiny(), LoRAConfig(modules_to_save=["lm_haed"]))


def test_adapted_head_in_the_loss_equals_its_logits():
    targets = IDS.roll(-1, 1).flatten()
    for config in (LoRAConfig(target_modules=["lm_head"]), LoRAConfig(modules_to_save=["lm_head"]),
                   LoRAConfig(target_modules=["lm_head"], use_dora=True)):
        model, gradients = shake(attach_lora(tiny(), config, **variant_of(config))), []
        losses = (F.cross_entropy(model.logits(model(IDS)).flatten(0, 1), targets, reduction="sum"),
                  cross_entropy_sum(model(IDS).flatten(0, 1), model.head_weight(), targets))
        for loss in losses:
            model.zero_grad()
            loss.backward()
            gradients.append([p.grad.clone() for p in trainable(model).values()])
        assert torch.allclose(*losses, rtol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) and a.any() for a, b in zip(*gradients))


# ---- precision ----


def test_float32_adapter_beside_a_bfloat16_base():
    exact = tiny().to(torch.bfloat16).float()                           # the same numbers, in float32
    model = tiny().to(torch.bfloat16)
    config = LoRAConfig(r=4, modules_to_save=["lm_head", "embed_tokens"])
    for each in (exact, model):
        shake(attach_lora(each, config, seed=2), size=0.1)
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
    assert sum(p.numel() for p in trainable(model).values()) == log["base"]["trainable_params"] == 20_971_520
    assert sum(p.numel() for p in model.parameters()) == log["base"]["all_params"] == 8_051_232_768


# ---- several adapters ----


@needs_shared
def test_adapters_one_after_another_add_up():
    names = ["llama3_r8", "llama3_r4_rslora", "llama3_r8_qv"]
    base = GOLDEN / "models" / "llama3"
    model = load_with_adapters(base, [GOLDEN / "lora" / name for name in names])
    assert not trainable(model)
    for layer in lora_layers(model).values():                           # the last stays beside the weights
        assert layer.lora_A.out_features == 8
    assert len(lora_layers(model)) == 2 * len(load_model(base).model.layers)
    merge_adapters(model)
    files = [load_file(GOLDEN / "lora" / name / "adapter_model.safetensors") for name in names]
    rslora = json.loads((GOLDEN / "lora" / names[1] / "adapter_config.json").read_text())
    scales, changed = [16 / 8, rslora["lora_alpha"] / math.sqrt(4), 16 / 8], 0
    for name, weight in load_model(base, torch.float32).named_parameters():
        total, key = weight.double(), PREFIX + name.removesuffix("weight")
        for tensors, scale in zip(files, scales):
            if key + "lora_A.weight" in tensors:
                A, B = tensors[key + "lora_A.weight"], tensors[key + "lora_B.weight"]
                total = total + scale * B.double() @ A.double()
                changed += 1
        assert (model.get_parameter(name) - total).abs().max() < 1e-5, name
    assert changed == sum(len(tensors) // 2 for tensors in files)


def test_a_second_adapter_needs_the_first_to_be_merged():
    with pytest.raises(AssertionError, match="merge"):
        attach_lora(attach_lora(tiny(), LoRAConfig()), LoRAConfig())


# ---- what a user may get wrong ----


def adapter_folder(tmp_path, drop=(), add=(), **changes):
    """A good adapter of the tiny model, damaged as asked."""
    config = LoRAConfig(r=4, target_modules=["q_proj", "up_proj"])
    model = attach_lora(tiny(), config)
    tmp_path.mkdir(exist_ok=True)
    save_adapter(model, tmp_path, config, "acme/tiny")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, **changes}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in drop} | dict(add), tmp_path / "adapter_model.safetensors")
    return tmp_path


A0 = PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("damage, words", [
    (dict(r=8), r"lora_A.weight has shape \[4, 32\], the model and .* make it \[8, 32\].*'acme/tiny', r is 8"),
    (dict(drop=[A0]), f"missing: 1, such as {A0}"),
    (dict(add=[("x", torch.ones(1))]), "not used: 1, such as x"),
    (dict(target_modules=["q_proj"]), "not used: 4"),
    (dict(target_modules=["q_proj", "up_proj", "c_attn"]), "for another model .acme/tiny.*'c_attn' matches no linear"),
    (dict(modules_to_save=["lm_head"]), "missing: 1, such as base_model.model.lm_head.weight"),
    (dict(peft_type="LOHA"), "peft_type LOHA is not supported"),
    (dict(bias="all"), "bias 'all' is not supported"),
    (dict(lora_bias=True), "lora_bias: True is not honoured"),
    (dict(layers_to_transform=0), "layers_to_transform: 0 is not honoured"),
    (dict(trainable_token_indices=[3]), r"trainable_token_indices: \[3\] is not honoured"),
    (dict(ensure_weight_tying=True), "ensure_weight_tying: True is not honoured"),
    (dict(init_lora_weights="olora"), "init_lora_weights 'olora' changed the base weights"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_adapter_that_does_not_fit(damage, words, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        load_adapter(tiny(), adapter_folder(tmp_path, **damage))


@needs_shared
def test_adapter_of_another_model():
    model, _, _ = golden("llama3_r8")
    with pytest.raises(ValueError, match=r"has shape .* is this another model, or another rank\?"):
        load_adapter(model, GOLDEN / "lora" / "qwen3_r8")


def test_adapter_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing: adapter_name_or_path must be"):
        load_adapter(tiny(), tmp_path)
    weights = adapter_folder(tmp_path) / "adapter_model.safetensors"
    load_adapter(tiny(), tmp_path)                                      # whole, it loads
    whole = weights.read_bytes()
    for part in (whole[:-40], whole[:30], b""):
        weights.write_bytes(part)
        with pytest.raises(ValueError, match="adapter_model.safetensors is damaged or incomplete .*; fetch it again"):
            load_adapter(tiny(), tmp_path)
    shutil.move(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing; adapter_model.bin is a pickle"):
        load_adapter(tiny(), tmp_path)
    for text, words in (('{"r": 8', "adapter_config.json is not valid JSON"), ("[1]", "holds a list")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_adapter(tiny(), tmp_path)


# ---- families with names of their own ----

RANDOM = {"qwen": twins.QWEN1, "internlm2": twins.INTERNLM2, "glm4_original": twins.GLM4_ORIGINAL,
          "baichuan1_7b": twins.BAICHUAN1_7B, "xverse_biases": {**twins.XVERSE, "bias": True}}
FAMILIES = [*(p.name for p in sorted((GOLDEN / "models").glob("*"))), *RANDOM]
FUSED = {       # what users name there, beside q_proj and its like; `experts` and `mlp` are blocks
    "baichuan2_7b": ["W_pack"], "baichuan2_13b": ["W_pack"], "baichuan1_7b": ["W_pack"],
    "chatglm3": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], "glm": ["gate_up_proj"],
    "glm4_original": ["query_key_value", "self_attention.dense"], "glm4": ["gate_up_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"], "qwen": ["c_attn", "attn.c_proj", "mlp.c_proj", "w1", "w2"],
    "internlm2": ["wqkv", "wo", "w1", "w2", "w3"], "qwen2_moe": ["experts", "shared_expert", "gate"],
    "qwen3_moe": ["experts", "gate", "experts.1"], "llama4": ["feed_forward.down_proj", "router", "shared_expert"],
    "llama4_nested": ["feed_forward", "q_proj"]}


def checkpoint_of(name, folder):
    """The recorded checkpoint of this name, or a random one written into `folder`."""
    if name not in RANDOM:
        return GOLDEN / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    shapes, _ = twins.TWINS[RANDOM[name]["model_type"]]
    save_file(twins.random_weights(shapes(RANDOM[name]), 0), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(RANDOM[name]))
    return folder


def shapes_in(base):
    """{tensor name: shape} of a checkpoint, as the safetensors package reads it."""
    found = {}
    for file in base.glob("model*.safetensors"):
        found |= {name: tuple(t.shape) for name, t in load_file(file).items()}
    return found


def logits_and_merged(model):
    """Logits with the adapter beside the weights and folded in, and the largest of the first."""
    before = logits_of(model, IDS)
    merge_adapters(model)
    return before, (logits_of(model, IDS) - before).abs().max() / before.abs().max()


@needs_shared
@pytest.mark.parametrize("name, targets", [(name, "all") for name in FAMILIES]
                         + [(name, [target]) for name, targets in FUSED.items() for target in targets])
def test_adapters_keep_the_vendors_names(name, targets, tmp_path):
    """On disk stands what the checkpoint's files call a layer; what is saved loads, and merges to the same logits."""
    base, config = checkpoint_of(name, tmp_path / "base"), LoRAConfig(r=3, lora_alpha=6, target_modules=targets)
    model = load_model(base, torch.float32)
    plain = logits_of(model, IDS)
    shake(attach_lora(model, config, stored_name=model.config.stored_name), size=0.05).eval()
    save_adapter(model, tmp_path, config, str(base))
    shapes, tensors = shapes_in(base), load_file(tmp_path / "adapter_model.safetensors")
    layers = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    assert layers
    for layer in layers - {name for name in layers if name.endswith((".experts", ".experts.base_layer"))}:
        size_out, size_in = shapes[f"{layer}.weight"]
        parts = [tensors[f"{PREFIX}{layer}.lora_{part}.weight"].shape for part in "AB"]
        assert parts == [(3, size_in), (size_out, 3)], layer
        assert targets == "all" or f".{targets[0]}." in f".{layer}."
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    if targets != "all" and not {"experts", "mlp", "feed_forward", "shared_expert", "experts.1"} & set(targets):
        assert written["target_modules"] == (sorted(layers) if name == "llama4_nested" else targets)
    again = load_model(base, torch.float32)
    load_adapter(again, tmp_path)
    logits, off = logits_and_merged(again.eval())
    assert torch.equal(logits, logits_of(model, IDS)) and off < 1e-5
    assert (logits - plain).abs().max() > 1e-2
    set_adapters(model, False)
    assert torch.equal(logits_of(model, IDS), plain)


@needs_shared
def test_all_is_what_it_is_in_llama_factory():
    """Counted there, release 0.9.5 with transformers 5: neither routers nor routed experts, but shared ones."""
    counts = {"qwen2_moe": 16, "qwen3_moe": 15, "llama4": 28, "llama4_nested": 28, "phi3": 8, "glm": 12, "gemma2": 28}
    for name, count in counts.items():
        model = load_model(GOLDEN / "models" / name, skip_weights=True)
        found = find_targets(model, "all", model.config.stored_name)
        assert len(found) == count and not any(".experts." in layer for layer in found), name
        if model.config.stacked_experts:
            both = find_targets(model, ["all", "experts"], model.config.stored_name)
            assert len(both) == count + 2 * sum(model.config.sparse)
    model = load_model(GOLDEN / "models" / "qwen2_moe", skip_weights=True)
    assert {layer.split("mlp.")[1] for layer in find_targets(model, "all") if "mlp." in layer} == {
        "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"}


IN_PEFT = ["gemma2", "glm", "glm4", "olmo", "olmo2", "phi3", "qwen2_moe", "qwen3_moe", "llama4"]


@needs_shared
@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_opens_ours_and_we_open_pefts(name, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    # PEFT 0.19 and newer take the gate_proj of Qwen 3's dense layers, where experts are stacks, for that of experts
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "qwen3_moe" else "all"
    base, config = GOLDEN / "models" / name, LoRAConfig(r=3, lora_alpha=6, target_modules=targets)
    ours = load_model(base)
    shake(attach_lora(ours, config, stored_name=ours.config.stored_name), size=0.1).eval()
    save_adapter(ours, tmp_path, config, str(base))
    with torch.no_grad():
        assert (in_peft(base, tmp_path)(IDS).logits - logits_of(ours, IDS)).abs().max() < 1e-4

    targets = [layer.removeprefix(PREFIX) for layer in peft_names(ours).values()]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"))
    shake(theirs, seed=1, size=0.1).eval().save_pretrained(tmp_path / "theirs")
    again = load_model(base)
    load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(again.eval(), IDS)).abs().max() < 1e-4


# ---- stacked experts ----


def by_pefts_formula(model, tensors, scale=2.0):
    """Logits of a Llama 4 whose stacks have PEFT 0.18's sum added: W[e, i, o] + scale * B[o, r, e] A[e, r, i]."""
    for layer, block in enumerate(model.model.layers):
        if not model.config.sparse[layer]:
            continue
        for part, place in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
            key = f"{PREFIX}model.layers.{layer}.feed_forward.{place}"
            weight = getattr(block.mlp.experts, part).weight
            A, B = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            A, B = A.reshape(len(weight), -1, A.shape[-1]), B.reshape(B.shape[0], -1, len(weight))
            with torch.no_grad():
                weight += scale * torch.einsum("ore,eri->eio", B, A)
    return logits_of(model, IDS)


@needs_shared
def test_stacked_experts_are_written_as_peft_018_writes_them(tmp_path):
    base, config = GOLDEN / "models" / "llama4", LoRAConfig(r=3, lora_alpha=6, target_modules=["experts"])
    config.lora_dropout = 0.1
    model = load_model(base)
    shake(attach_lora(model, config, stored_name=model.config.stored_name), size=0.1).eval()
    save_adapter(model, tmp_path, config, str(base))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == [] and fields["lora_dropout"] == 0     # PEFT refuses dropout beside stacks
    assert fields["target_parameters"] == [f"model.layers.{layer}.feed_forward.experts.{part}" for layer in (1, 3)
                                           for part in ("gate_up_proj", "down_proj")]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (by_pefts_formula(load_model(base, torch.float32), tensors) - logits_of(model, IDS)).abs().max() < 1e-4


def test_a_stacked_adapter_learns_as_its_sum_would():
    torch.manual_seed(0)
    base = StackedLinear(4, 6, 5).requires_grad_(False)                                      # (E, in, out)
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
def test_experts_trained_whole_beside_a_bfloat16_base():
    model = load_model(GOLDEN / "models" / "llama4", torch.bfloat16)
    wanted, config = logits_of(model, IDS), LoRAConfig(target_modules=["q_proj"], modules_to_save=["experts", "router"])
    attach_lora(model, config, stored_name=model.config.stored_name)
    assert (logits_of(model, IDS) - wanted).norm() < 0.02 * wanted.norm()           # what follows differs by rounding
    model.logits(model(IDS)).float().square().mean().backward()
    whole = {name: p for name, p in trainable(model).items() if ".lora_" not in name}
    assert len(whole) == 3 * sum(model.config.sparse) and {p.dtype for p in whole.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.any() for name, p in whole.items())


@needs_shared
@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["down_proj"], ["down_proj", "gate_up_proj"]], ids="+".join)
def test_stacked_experts_adapted_by_peft(parameters, tmp_path, capsys):
    """Whichever form the installed version writes; its target_modules never mean a stack, whatever their names."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = GOLDEN / "models" / "llama4"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"],
        target_parameters=[f"experts.{name}" for name in parameters]))
    shake(theirs, size=0.1).eval().save_pretrained(tmp_path)
    model = load_model(base)
    config = load_adapter(model, tmp_path)
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(model.eval(), IDS)).abs().max() < 1e-4
    newer = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 20)
    assert ("A and B of its stacked experts have each other's place" in capsys.readouterr().out) == newer
    save_adapter(model, tmp_path, config, str(base))
    again = load_model(base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(model, IDS)) and not capsys.readouterr().out


def square_experts():
    """A Llama 4 whose stack of `down` matrices is square, so that shapes do not tell A's place from B's."""
    fields = dict(model_type="llama4_text", hidden_size=32, intermediate_size=32, intermediate_size_mlp=48,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=50,
                  max_position_embeddings=64, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=2)
    return tiny(**fields)


@pytest.mark.parametrize("version", [None, "0.18.1", "0.20.0.dev0", "1.0"])
def test_square_stacks_are_read_as_their_version_wrote_them(version, tmp_path):
    model, config = square_experts(), LoRAConfig(r=2, target_modules=["experts.down_proj"])
    shake(attach_lora(model, config, stored_name=model.config.stored_name))
    save_adapter(model, tmp_path, config, "base")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "peft_version": version}))
    again = square_experts()
    load_adapter(again, tmp_path)
    (name, before), (_, after) = (next(iter(lora_layers(each).items())) for each in (model, again))
    sums = []
    for layer in (before, after):                       # what each adds to an expert's matrix, (E, in, out)
        pairs = [expert_matrices(layer.lora_A.weight, layer.lora_B.weight, 2, expert) for expert in (0, 1)]
        sums.append(torch.stack([(B @ A).T for A, B in pairs]))
    newer = version in ("0.20.0.dev0", "1.0")           # there, A is what multiplies the outputs
    assert torch.allclose(sums[1], sums[0].transpose(1, 2) if newer else sums[0], atol=1e-6)
    assert not torch.allclose(sums[0], sums[0].transpose(1, 2), atol=1e-2)


# ---- experts one by one ----


@needs_shared
@pytest.mark.parametrize("routed", [True, False])
def test_adapters_of_experts_made_with_transformers_4_and_5(routed, tmp_path):
    """`gate_proj` means the routed experts' to version 4, where they are linear layers, and not to version 5."""
    base = GOLDEN / "models" / "qwen2_moe"
    config = LoRAConfig(r=2, target_modules=["q_proj", "gate_proj", "gate"] if routed else ["q_proj", "gate_proj"])
    model = load_model(base)
    named = find_targets(model, config.target_modules)
    wanted = [name for name in named if routed or ".experts." not in name]
    attach_lora(model, config, targets=wanted)
    save_adapter(shake(model, size=0.1).eval(), tmp_path, config, "base")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": config.target_modules}))
    again = load_model(base)
    load_adapter(again, tmp_path)
    assert list(lora_layers(again)) == wanted and len(named) > len(wanted) - routed
    assert any(name.endswith("mlp.gate") for name in wanted) == routed
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(model, IDS))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = [key for key in tensors if ".experts.0." in key or not routed and "shared" in key][:2]
    save_file({key: t for key, t in tensors.items() if key not in lost}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing: 2"):
        load_adapter(load_model(base), tmp_path)


@needs_shared
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "llama4"])
def test_adapters_that_peft_made_from_bare_names(name, tmp_path):
    """Which layers `gate_proj` and `down_proj` mean is up to the installed version; routers are linear in 4 only."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    linear_routers = transformers.__version__.startswith("4.") and name != "llama4"
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj", *(["gate"] if linear_routers else [])]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / name, attn_implementation="eager")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"))
    shake(theirs, size=0.1).eval().save_pretrained(tmp_path)
    ours = load_model(GOLDEN / "models" / name)
    if json.loads((tmp_path / "adapter_config.json").read_text()).get("target_parameters"):    # as of PEFT 0.19
        with pytest.raises(ValueError, match="are stacks of experts, and this checkpoint has its experts one by one"):
            load_adapter(ours, tmp_path)
        return
    load_adapter(ours, tmp_path)
    assert any(".experts." in layer for layer in lora_layers(ours)) == linear_routers
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(ours.eval(), IDS)).abs().max() < 1e-4


@needs_shared
def test_stacks_of_transformers_5_do_not_fit_experts_one_by_one(tmp_path):
    adapter_folder(tmp_path, target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match="mlp.experts.gate_up_proj are stacks .* has its experts one by one"):
        load_adapter(load_model(GOLDEN / "models" / "qwen3_moe"), tmp_path)


# ---- vendors' names elsewhere ----


@needs_shared
@pytest.mark.parametrize("name, target, whole, ranks", [
    ("chatglm3", "query_key_value", ["word_embeddings", "output_layer"], {"1.self_attention.query_key_value": 5}),
    ("qwen", "c_attn", ["wte", "lm_head"], {"c_attn": 4}), ("internlm2", "wqkv", ["tok_embeddings", "output"], {}),
    ("baichuan2_7b", "W_pack", ["lm_head"], {"W_pack": 7}), ("gemma2", "q_proj", ["pre_feedforward_layernorm"], {}),
    ("llama4", "experts", ["router", "shared_expert"], {"experts.gate_up_proj": 2}),
])
def test_modules_trained_whole_and_ranks_by_vendors_names(name, target, whole, ranks, tmp_path):
    base = checkpoint_of(name, tmp_path / "base")
    config = LoRAConfig(r=3, target_modules=[target], modules_to_save=whole, rank_pattern=ranks)
    model = load_model(base)
    attach_lora(model, config, stored_name=model.config.stored_name)
    save_adapter(shake(model, size=0.05).eval(), tmp_path, config, "base")
    shapes, tensors = shapes_in(base), load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if ".lora_" not in key:
            assert shapes[key.removeprefix(PREFIX)] == tensor.shape and any(part in key for part in whole)
    assert all(any(part in key and ".lora_" not in key for key in tensors) for part in whole)
    found = {layer.scale * config.lora_alpha ** -1 for layer in lora_layers(model).values()}
    assert found == {1 / r for r in (*ranks.values(), *([] if target in ranks else [3]))}
    again = load_model(base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(model, IDS))


def test_loraplus_learns_faster_in_b_of_any_name():
    fields = {**twins.QWEN1, "num_hidden_layers": 1}
    model = CausalLM(model_config(fields))
    attach_lora(model, LoRAConfig(r=2, target_modules=["c_attn", "w2"]), stored_name=model.config.stored_name)
    config = Config(learning_rate=1e-3, loraplus_lr_ratio=16.0)
    groups = parameter_groups(trainable(model), config)
    rates = {id(p): group.get("lr", 1e-3) for group in groups for p in group["params"]}
    assert {name.split(".lora_")[1][0]: rates[id(p)] for name, p in trainable(model).items()} == {"A": 1e-3, "B": 16e-3}


@needs_shared
@pytest.mark.parametrize("name, targets, words", [
    ("chatglm3", ["query_key_vale"], r"did you mean 'query_key_value'\?\); it has dense, dense_4h_to_h"),
    ("baichuan2_7b", ["qkv_proj"], "'qkv_proj' matches no linear layer .*W_pack"),      # our own word is not theirs
    ("internlm2", "mlp", "pattern 'mlp' .* names look like 'model.layers.0.attention.wqkv'"),
])
def test_errors_speak_the_vendors_names(name, targets, words, tmp_path):
    model = load_model(checkpoint_of(name, tmp_path), skip_weights=True)
    with pytest.raises(ValueError, match=words):
        attach_lora(model, LoRAConfig(target_modules=targets), stored_name=model.config.stored_name)
