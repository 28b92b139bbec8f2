"""methods/oft.py: OFT against PEFT, in memory and on disk; QOFT against OFT."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import chat
import eval as eval_script
import merge
import train
from checkpoint.adapters import load_adapter, load_with_adapters, save_adapter, variant_of
from checkpoint.load import load_model
from lora import LoRAConfig, attach_lora, lora_layers, merge_adapters, set_adapters, trainable
from methods.oft import OFTConfig, OFTLinear, cayley, cayley_neumann, rotations, skew_symmetric
from methods.quant import QuantFormat
from tests.common import ROOT
from tests.tiny_models import IDS, load_in_peft, logits_of, perturb, tiny, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore::Warning:transformers")
SERIES = "0.18"             # the PEFT whose Cayley series is the one of today


def attach(model, config):
    """Attach an adapter as training does."""
    stored_name = getattr(getattr(model, "config", None), "stored_name", lambda name: name)
    return attach_lora(model, config, stored_name=stored_name, **variant_of(config))


def save_random(base, folder, config, size=0.1):
    """The logits of a random adapter of `base`, which is written into the folder."""
    model = perturb(attach(load_model(base), config), size=size).eval()
    folder.mkdir()
    save_adapter(model, folder, config, str(base))
    return logits_of(model, IDS)


# ---- the formulas -------------------------------------------------------------------------------


def test_both_formulas_turn_and_do_not_stretch():
    """The exact one always; the series is off by Q^4 and is the other's transpose."""
    torch.manual_seed(0)
    Q = skew_symmetric(0.05 * torch.randn(3, 28).double(), 8)
    exact = cayley(Q)
    series = cayley_neumann(Q)
    identity = torch.eye(8).double()
    assert (exact @ exact.mT - identity).abs().max() < 1e-12
    assert 1e-6 < (series @ series.mT - identity).abs().max() < Q.norm(dim=(1, 2)).max() ** 4
    assert (series - exact.mT).abs().max() < Q.norm(dim=(1, 2)).max() ** 4


@pytest.mark.parametrize("settings", [
    {}, {"oft_block_size": 4}, {"oft_block_size": 7}, {"oft_block_size": 600},
    {"r": 4, "oft_block_size": 0}, {"r": 7, "oft_block_size": 0}, {"block_share": True},
    {"use_cayley_neumann": False}, {"module_dropout": 0.5},
], ids=str)
def test_oft_and_its_gradients_equal_pefts(settings):
    """Output, the gradients of x and of what is stored of Q, and the merged matrix.

    In training: module_dropout does nothing in PEFT's linear layers.
    """
    peft = pytest.importorskip("peft", minversion=SERIES)
    torch.manual_seed(0)
    base = nn.Linear(40, 30)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(40, 30)), peft.OFTConfig(target_modules=["0"], **settings)).train()
    twin = theirs.get_submodule("base_model.model.0")
    twin.base_layer.load_state_dict(base.state_dict())
    ours = attach(nn.Sequential(base), OFTConfig(**settings)).train()
    weight = ours[0].oft_R.weight
    peft_weight = twin.oft_R.default.weight
    assert weight.shape == peft_weight.shape and not weight.any()

    perturb(ours, size=0.2)
    peft_weight.data.copy_(weight)
    xs = [torch.randn(3, 5, 40).requires_grad_() for _ in range(2)]
    xs[1].data.copy_(xs[0])
    outs = [ours(xs[0]), theirs(xs[1])]
    for out in outs:
        out.square().sum().backward()
    assert torch.allclose(*outs, atol=1e-5)
    for a, b in ((weight, peft_weight), xs):
        assert a.grad.any() and torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    twin.merge()
    assert torch.allclose(ours[0].merged(), twin.base_layer.weight, atol=1e-5)
    ours[0].enabled = False
    assert torch.equal(ours(xs[0]), F.linear(xs[0], base.weight, base.bias))


def test_sizes_that_do_not_divide_become_pefts():
    layer = pytest.importorskip("peft.tuners.oft.layer").OFTLayer
    for inputs in (6, 7, 40, 64, 96, 100, 4096, 11008):
        for wanted in (2, 3, 7, 8, 31, 32, 33, 64, 5000, 20000):
            theirs = wanted
            if inputs % wanted or wanted > inputs:
                theirs = layer.adjust_oft_parameters(None, inputs, wanted)
            blocks, size = OFTConfig(oft_block_size=wanted).blocks_of(inputs)
            assert (blocks, size) == (inputs // theirs, theirs)
            assert OFTConfig(r=wanted, oft_block_size=0).blocks_of(inputs) == (size, blocks)


def test_a_layer_that_no_block_divides_and_experts_are_refused():
    with pytest.raises(ValueError, match="0 has 7 inputs, .* set another oft_block_size"):
        attach(nn.Sequential(nn.Linear(7, 4)), OFTConfig(oft_block_size=2))
    layers = nn.ModuleDict({"mlp": nn.ModuleDict({"gate": nn.Linear(8, 4)})})
    with pytest.raises(ValueError, match="oft: mlp.gate is a router or an expert"):
        attach(layers, OFTConfig(oft_block_size=4, target_modules=["gate"]))


def test_a_bfloat16_base_is_rotated_by_a_float32_rotation():
    """A rotation by 1/1000 is lost if Q, or its powers, are rounded to bfloat16 on the way."""
    model = attach(nn.Sequential(nn.Linear(8, 8)).bfloat16(), OFTConfig(oft_block_size=8))
    model[0].oft_R.weight.data.fill_(1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        R = model[0].rotation()
        assert model(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    assert R.dtype == torch.float32
    assert (R - rotations(model[0].oft_R.weight.double().float(), 8)).abs().max() == 0
    assert (R @ R.mT - torch.eye(8)).abs().max() < 1e-6


# ---- adapters on disk ---------------------------------------------------------------------------


SETTINGS = [
    {"oft_block_size": 8},
    {"oft_block_size": 12, "target_modules": ["q_proj", "down_proj"]},
    {"r": 4, "oft_block_size": 0, "modules_to_save": ["norm"]},
    {"oft_block_size": 8, "block_share": True},
    {"oft_block_size": 8, "use_cayley_neumann": False},
    {"oft_block_size": 8, "target_modules": ["v_proj", "lm_head"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_adapter_loads_in_peft_and_here_with_the_same_logits(settings, tmp_path):
    base = write_tiny(tmp_path / "base", tiny())
    config = OFTConfig(**{"target_modules": "all", **settings})
    wanted = save_random(base, tmp_path / "a", config)
    assert (wanted - logits_of(load_model(base), IDS)).abs().max() > 0.01
    again = load_model(base)
    assert load_adapter(again, tmp_path / "a").blocks_of(64) == config.blocks_of(64)
    assert torch.equal(logits_of(again, IDS), wanted)
    pytest.importorskip("peft", minversion=SERIES)
    theirs = load_in_peft(base, tmp_path / "a")
    assert (theirs(IDS).logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_adapter_of_peft_loads_here_with_the_same_logits(settings, tmp_path):
    peft = pytest.importorskip("peft", minversion=SERIES)
    transformers = pytest.importorskip("transformers")
    base = write_tiny(tmp_path / "base", tiny())
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.OFTConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **settings})
    theirs = perturb(peft.get_peft_model(model, config), size=0.1).eval()
    theirs.save_pretrained(tmp_path / "a")
    ours = load_model(base)
    load_adapter(ours, tmp_path / "a")
    assert (logits_of(ours, IDS) - theirs(IDS).logits).abs().max() < 1e-4
    names = {name for name in trainable(ours) if ".oft_R." in name}
    assert len(names) == len(lora_layers(ours)) > 0


@pytest.mark.parametrize("change, words", [
    ({"coft": True}, "coft: true .* is not supported; merge the adapter with peft"),
    ({"num_cayley_neumann_terms": 4}, "num_cayley_neumann_terms 4 is not supported, only 5"),
    ({"oft_block_size": 0}, "r is 0 and oft_block_size is 0: one of the two is 0"),
    ({"r": 4}, "r is 4 and oft_block_size is 8: one of the two"),
    ({"r": -1}, "r: -1 is not 0 to"),
    ({"oft_block_size": "8"}, 'oft_block_size: "8" is not a whole number'),
    ({"module_dropout": 2}, "module_dropout: 2 is not 0 to 1"),
    ({"block_share": "yes"}, 'block_share: "yes" is not true or false'),
    ({"peft_version": "0.17.1"}, "peft 0.17.1 has written this OFT adapter"),
    ({"peft_version": None}, "peft before 0.18 has written this OFT adapter"),
    ({"bias": "oft_only"}, "bias 'oft_only' is not supported"),
    ({"use_dora": True}, "use_dora: True is not supported, and would change"),
    ({"peft_type": "BOFT"}, 'peft_type "BOFT" is not supported, only LORA and OFT'),
    ({"oft_block_size": 16}, r"oft_R.weight has shape \[.*r is 0 and oft_block_size 16: is this"),
], ids=lambda value: str(value)[:40])
def test_what_an_adapter_may_not_say(change, words, tmp_path):
    base = write_tiny(tmp_path / "base", tiny())
    save_random(base, tmp_path / "a", OFTConfig(oft_block_size=8))
    path = tmp_path / "a/adapter_config.json"
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    with pytest.raises(ValueError, match=words):
        load_adapter(load_model(base), tmp_path / "a")


def test_an_adapter_from_before_peft_0_14_is_named(tmp_path):
    base = write_tiny(tmp_path / "base", tiny())
    save_random(base, tmp_path / "a", OFTConfig(oft_block_size=8))
    path = tmp_path / "a/adapter_config.json"
    fields = json.loads(path.read_text())
    del fields["oft_block_size"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="without oft_block_size is from peft before 0.14"):
        load_adapter(load_model(base), tmp_path / "a")


# ---- merging, inference -------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
def test_merging_gives_the_base_after_the_rotation(share, tmp_path):
    """In memory, by merge.py and by PEFT's merge_and_unload."""
    base = write_tiny(tmp_path / "base", tiny())
    config = OFTConfig(oft_block_size=8, target_modules=["all", "lm_head"], block_share=share)
    wanted = save_random(base, tmp_path / "a", config)
    merge.merge_checkpoint(base, [tmp_path / "a"], tmp_path / "out")
    assert (logits_of(load_model(tmp_path / "out"), IDS) - wanted).abs().max() < 1e-4
    for fold_last in (True, False):
        model = load_with_adapters(base, [tmp_path / "a"], fold_last=fold_last)
        assert bool(lora_layers(model)) != fold_last
        assert (logits_of(model, IDS) - wanted).abs().max() < 1e-4
    pytest.importorskip("peft", minversion=SERIES)
    theirs = load_in_peft(base, tmp_path / "a").merge_and_unload()
    assert (theirs(IDS).logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("first", ["lora", "oft"])
def test_adapters_of_both_kinds_are_merged_in_their_order(first, tmp_path):
    """Each is trained on the base with the earlier ones merged; they do not commute."""
    base = write_tiny(tmp_path / "base", tiny())
    kinds = {"lora": LoRAConfig(r=2, target_modules="all"),
             "oft": OFTConfig(oft_block_size=8, target_modules="all")}
    folders = []
    for name in (first, *kinds.keys() - {first}):
        save_random(base, tmp_path / name, kinds[name])
        folders.append(tmp_path / name)
    model = load_model(base)
    load_adapter(model, folders[0])
    merge_adapters(model)
    load_adapter(model, folders[1])
    wanted = logits_of(model, IDS)
    merge.merge_checkpoint(base, folders, tmp_path / "out")
    assert (logits_of(load_model(tmp_path / "out"), IDS) - wanted).abs().max() < 1e-4
    merge.merge_checkpoint(base, folders[::-1], tmp_path / "other")
    assert (logits_of(load_model(tmp_path / "other"), IDS) - wanted).abs().max() > 1e-3


def test_the_base_is_the_reference_while_adapters_are_off():
    model = tiny()
    before = logits_of(model, IDS)
    perturb(attach(model, OFTConfig(oft_block_size=8, target_modules=["all", "lm_head"])), size=0.1)
    assert (logits_of(model, IDS) - before).abs().max() > 0.01
    set_adapters(model, False)
    assert torch.equal(logits_of(model, IDS), before)


# ---- QOFT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_format", [QuantFormat("nf4"), QuantFormat("fp4", nested=0),
                                          QuantFormat("int8", nested=0)], ids=lambda f: f.kind)
def test_qoft_is_oft_on_the_dequantized_base(quant_format, tmp_path):
    """Logits and gradients; the base is only called, in whatever format."""
    base = write_tiny(tmp_path / "base", tiny())
    config = OFTConfig(oft_block_size=8, target_modules="all")
    packed = load_model(base, quant_format=quant_format)
    plain = load_model(base, quant_format=quant_format)
    merge_adapters(attach(plain, LoRAConfig(r=1, target_modules="all")))    # dequantizes
    models = [perturb(attach(model, config), size=0.1) for model in (packed, plain)]
    layers = [list(lora_layers(model).values()) for model in models]
    assert all(type(layer) is OFTLinear for layer in layers[0])
    logits = [model.logits(model(IDS)) for model in models]
    assert torch.allclose(*logits, atol=1e-5)
    for each in logits:
        each.square().mean().backward()
    for ours, theirs in zip(*layers):
        a, b = ours.oft_R.weight.grad, theirs.oft_R.weight.grad
        assert a.any() and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# ---- the scripts --------------------------------------------------------------------------------


SETTINGS_OF_A_RUN = {
    "model_name_or_path": ROOT / "models/tiny", "dataset": ROOT / "data/tiny_review.jsonl",
    "max_samples": 16, "template": "chatml", "cutoff_len": 48, "use_cpu": True,
    "disable_tqdm": True, "finetuning_type": "oft", "oft_block_size": 8, "learning_rate": 2e-2,
    "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2,
}


def argv_of(output, **more):
    settings = SETTINGS_OF_A_RUN | {"output_dir": output} | more
    return [f"{key}={value}" for key, value in settings.items()]


def adapter_in(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_is_resumed_continued_evaluated_merged_and_chatted_with(tmp_path, capsys):
    train.main(argv_of(tmp_path / "a", oft_target="q_proj,down_proj", module_dropout=0.5))
    screen = capsys.readouterr().out
    assert "oft_target: q_proj,down_proj is what is rotated; LLaMA-Factory 0.9.5" in screen
    assert "module_dropout: 0.5 is written into the adapter and does nothing" in screen
    fields = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (fields["peft_type"], fields["module_dropout"]) == ("OFT", 0.5)
    trained = adapter_in(tmp_path / "a")
    numbers = sum(tensor.numel() for tensor in trained.values())
    assert f"parameters                {numbers:,} of " in screen

    shutil.rmtree(tmp_path / "a/checkpoint-4")
    train.main(argv_of(tmp_path / "a", oft_target="q_proj,down_proj", module_dropout=0.5,
                       resume_from_checkpoint="true"))
    assert "resumed from" in capsys.readouterr().out
    again = adapter_in(tmp_path / "a")
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())

    further = argv_of(tmp_path / "b", adapter_name_or_path=tmp_path / "a", max_steps=1,
                      oft_block_size=16)
    train.main(further)
    screen = capsys.readouterr().out
    assert "note: oft_block_size 16 is not used; the adapter has 8 and keeps it" in screen
    assert adapter_in(tmp_path / "b").keys() == trained.keys()
    argv = argv_of(tmp_path / "c", adapter_name_or_path=tmp_path / "a", finetuning_type="lora")
    with pytest.raises(ValueError, match="is an adapter of finetuning_type: oft, not lora. Set "):
        train.main(argv)

    merge.main(argv_of(tmp_path / "a", export_dir=tmp_path / "merged"))
    base = SETTINGS_OF_A_RUN["model_name_or_path"]
    adapted = load_with_adapters(base, [tmp_path / "a"], torch.float32)
    merged = load_model(tmp_path / "merged", torch.float32)
    ids = torch.arange(20)[None]
    assert (logits_of(merged, ids) - logits_of(adapted, ids)).abs().max() < 1e-2
    capsys.readouterr()
    chat.main(argv_of(tmp_path / "a", prompt="Hello", max_new_tokens=3, temperature=0))
    eval_script.main(argv_of(tmp_path / "a", eval_dataset=SETTINGS_OF_A_RUN["dataset"],
                             save_dir=tmp_path / "eval"))
    assert "adapter" in capsys.readouterr().out


@pytest.mark.parametrize("more", [
    {"quantization_bit": 4}, {"quantization_bit": 8}, {"bf16": True},
    {"stage": "dpo", "dataset": ROOT / "data/tiny_pairs.jsonl"},
    {"use_llama_pro": True, "freeze_trainable_layers": 1}, {"create_new_adapter": True},
], ids=lambda more: next(iter(more)))
def test_other_runs(more, tmp_path, capsys):
    train.main(argv_of(tmp_path / "a", max_steps=2, save_strategy="no"))
    before = adapter_in(tmp_path / "a")
    if "create_new_adapter" in more:
        more = more | {"adapter_name_or_path": tmp_path / "a"}
    train.main(argv_of(tmp_path / "b", max_steps=2, save_strategy="no", **more))
    after = adapter_in(tmp_path / "b")
    expanded = "use_llama_pro" in more
    assert len(after) < len(before) if expanded else after.keys() == before.keys()
    assert all(tensor.isfinite().all() and tensor.any() for tensor in after.values())
