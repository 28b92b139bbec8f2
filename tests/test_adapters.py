"""checkpoint/adapters.py against PEFT: what it recorded, what it reads, what it writes."""
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from checkpoint.adapters import (folded_under, load_adapter, load_with_adapters, peft_names,
                                 save_adapter, warn_of_folded)
from checkpoint.files import write_json
from checkpoint.adapters import PREFIX
from checkpoint.load import load_model
from lora import (LoRAConfig, attach_lora, expert_matrices, find_targets, lora_layers,
                  merge_adapters, set_adapters, trainable)
from tests.common import GOLDEN, needs_shared
from tests.tiny_models import (CHECKPOINTS, IDS, checkpoint_of, load_in_peft, logits_of, perturb,
                               tiny)

RECORDED = [f"{base}_{kind}" for base in ("llama3", "qwen2", "qwen3")
            for kind in ("r8", "r4_rslora", "r8_qv", "r8_dora")]
pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore::Warning:transformers")


def recorded_adapter(name):
    """Base model, adapter folder, and what PEFT computed with them."""
    folder = GOLDEN / "lora" / name
    model = load_model(GOLDEN / "models" / name.split("_")[0], torch.float32)
    return model, folder, load_file(folder / "expected.safetensors")


# ---- adapters that PEFT wrote ----


@needs_shared
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_adapter_equals_peft(name):
    model, folder, want = recorded_adapter(name)
    real = want["attention_mask"].bool()

    def far(logits, key):
        return (logits - want[key])[real].abs().max()

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), want["labels"][:, 1:].flatten(),
                               ignore_index=-100)

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
def test_a_recorded_adapter_saved_again_is_the_same_file(name, tmp_path):
    model, folder, want = recorded_adapter(name)
    config = load_adapter(model, folder)
    save_adapter(model, tmp_path, config, "somewhere/base")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype
               for key in theirs)
    written, recorded = (json.loads((path / "adapter_config.json").read_text())
                         for path in (tmp_path, folder))
    assert sorted(written.pop("target_modules")) == sorted(recorded["target_modules"])
    expected = {key: recorded[key] for key in written}
    no_base = {"base_model_name_or_path": None}
    assert written | no_base == expected | no_base
    with torch.no_grad():
        logits = load_in_peft(GOLDEN / "models" / name.split("_")[0],
                              tmp_path)(want["input_ids"]).logits
    real = want["attention_mask"].bool()
    assert (logits - logits_of(model.eval(), want["input_ids"]))[real].abs().max() < 1e-4


# ---- modules_to_save (additional_target) ----


def test_copy_of_another_base_in_an_adapter_is_refused(tmp_path):
    model = attach_lora(tiny(), LoRAConfig(target_modules=["lm_head"]))
    save_adapter(model, tmp_path, LoRAConfig(target_modules=["lm_head"]), "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for copy, fine in ((model.lm_head.weight.detach().clone(), True),
                       (model.lm_head.weight + 1, False)):
        save_file({**tensors, PREFIX + "lm_head.base_layer.weight": copy},
                  tmp_path / "adapter_model.safetensors")
        if fine:
            load_adapter(tiny(), tmp_path)
        else:
            with pytest.raises(
                ValueError, match="not used: 1, such as base_model.model.lm_head.base_layer.weight"
            ):
                load_adapter(tiny(), tmp_path)


# ---- several adapters ----


@needs_shared
def test_several_adapters_add_up():
    names = ["llama3_r8", "llama3_r4_rslora", "llama3_r8_qv"]
    base = GOLDEN / "models" / "llama3"
    model = load_with_adapters(base, [GOLDEN / "lora" / name for name in names])
    assert not trainable(model)
    for layer in lora_layers(model).values():                           # the last is not merged
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


# ---- mistakes ----


def adapter_folder(tmp_path, drop=(), add=(), **changes):
    """An adapter of the tiny model, with the damage that the arguments name."""
    config = LoRAConfig(r=4, target_modules=["q_proj", "up_proj"])
    model = attach_lora(tiny(), config)
    tmp_path.mkdir(exist_ok=True)
    save_adapter(model, tmp_path, config, "acme/tiny")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, **changes}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in drop} | dict(add),
              tmp_path / "adapter_model.safetensors")
    return tmp_path


A0 = PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("damage, words", [
    (dict(r=8),
     r"lora_A.weight has shape \[4, 32\], the model and .* make it \[8, 32\].*'acme/tiny', r is 8"),
    (dict(drop=[A0]), f"missing: 1, such as {A0}"),
    (dict(add=[("x", torch.ones(1))]), "not used: 1, such as x"),
    (dict(target_modules=["q_proj"]), "not used: 4"),
    (dict(target_modules=["q_proj", "up_proj", "c_attn"]),
     "for another model .acme/tiny.*'c_attn' matches no linear"),
    (dict(modules_to_save=["lm_head"]), "missing: 1, such as base_model.model.lm_head.weight"),
    (dict(peft_type="LOHA"), 'peft_type "LOHA" is not supported, only LORA and OFT'),
    (dict(bias="all"), "bias 'all' is not supported"),
    (dict(lora_bias=True), "lora_bias: True is not supported"),
    (dict(layers_to_transform=0), "not used: 4, such as base_model.model.model.layers.1"),
    (dict(layers_to_transform=0, target_modules=".*q_proj"),
     "layers_to_transform needs a list as target_modules"),
    (dict(layers_pattern="layers"), "layers_pattern needs layers_to_transform"),
    (dict(layers_to_transform=[0], layers_pattern=["l.*"]),
     "only names such as layers or h are supported"),
    (dict(exclude_modules=["q_proj"]), "not used: 4, such as .*q_proj"),
    (dict(layer_replication=[[0, 2]]), r"layer_replication: \[\[0, 2\]\] is not supported"),
    (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    (dict(kasa_config={"a": 1}), "kasa_config"),
    (dict(trainable_token_indices=[3]), r"trainable_token_indices: \[3\] is not supported"),
    (dict(ensure_weight_tying=True), "ensure_weight_tying: True is not supported"),
    (dict(init_lora_weights="olora"), "init_lora_weights 'olora' changed the base weights"),
    (dict(init_lora_weights="corda"), "init_lora_weights 'corda' changed the base weights"),
    (dict(init_lora_weights="lora_ga"), "init_lora_weights 'lora_ga' changed the base weights"),
    (dict(init_lora_weights="loftq"),
     "'loftq' changed the base .*Merge it with the base that peft has quantized"),
    (dict(init_lora_weights="svd"),
     'init_lora_weights "svd" is unknown; known are true, false, gaussian'),
    (dict(init_lora_weights=1), "init_lora_weights 1 is unknown"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_adapters_that_do_not_fit_are_refused(damage, words, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        load_adapter(tiny(), adapter_folder(tmp_path, **damage))


@needs_shared
def test_an_adapter_of_another_model_is_refused():
    model, _, _ = recorded_adapter("llama3_r8")
    with pytest.raises(ValueError, match=r"has shape .* is this another model, or another rank\?"):
        load_adapter(model, GOLDEN / "lora" / "qwen3_r8")


def test_missing_and_damaged_adapter_files(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="adapter_config.json is missing: adapter_name_or_path must be"):
        load_adapter(tiny(), tmp_path)
    weights = adapter_folder(tmp_path) / "adapter_model.safetensors"
    load_adapter(tiny(), tmp_path)                                      # undamaged, it loads
    whole = weights.read_bytes()
    for part in (whole[:-40], whole[:30], b""):
        weights.write_bytes(part)
        with pytest.raises(
            ValueError,
            match="adapter_model.safetensors is damaged or incomplete .*; fetch it again",
        ):
            load_adapter(tiny(), tmp_path)
    shutil.move(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError,
                       match="adapter_model.safetensors is missing; adapter_model.bin is a pickle"):
        load_adapter(tiny(), tmp_path)
    for text, words in (('{"r": 8', "adapter_config.json is not valid JSON"),
                        ("[1]", "holds a list")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_adapter(tiny(), tmp_path)


# ---- vendors' names ----
FUSED = {  # targets besides q_proj etc.; `experts` and `mlp` are blocks
    "baichuan2_7b": ["W_pack"], "baichuan2_13b": ["W_pack"], "baichuan1_7b": ["W_pack"],
    "chatglm3": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "glm": ["gate_up_proj"],
    "glm4_original": ["query_key_value", "self_attention.dense"], "glm4": ["gate_up_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "qwen": ["c_attn", "attn.c_proj", "mlp.c_proj", "w1", "w2"],
    "internlm2": ["wqkv", "wo", "w1", "w2", "w3"],
    "qwen2_moe": ["experts", "shared_expert", "gate"],
    "qwen3_moe": ["experts", "gate", "experts.1"],
    "llama4": ["feed_forward.down_proj", "router", "shared_expert"],
    "llama4_nested": ["feed_forward", "q_proj"]}


def shapes_in(base):
    """{tensor name: shape} of a checkpoint, read by the safetensors package."""
    found = {}
    for file in base.glob("model*.safetensors"):
        found |= {name: tuple(t.shape) for name, t in load_file(file).items()}
    return found


def logits_and_merge_error(model):
    """Logits with the adapter beside the weights, and the relative error of the merged model's."""
    before = logits_of(model, IDS)
    merge_adapters(model)
    return before, (logits_of(model, IDS) - before).abs().max() / before.abs().max()


@needs_shared
@pytest.mark.parametrize("name, targets",
                         [(name, "all") for name in CHECKPOINTS]
                         + [(name, [target])
                            for name, targets in FUSED.items() for target in targets])
def test_adapters_keep_the_vendors_names(name, targets, tmp_path):
    """Saved adapters name layers as the checkpoint's files do; loaded again and merged, they give
    the same logits."""
    base = checkpoint_of(name, tmp_path / "base")
    config = LoRAConfig(r=3, lora_alpha=6, target_modules=targets)
    model = load_model(base, torch.float32)
    plain = logits_of(model, IDS)
    perturb(attach_lora(model, config, stored_name=model.config.stored_name), size=0.05).eval()
    save_adapter(model, tmp_path, config, str(base))
    shapes, tensors = shapes_in(base), load_file(tmp_path / "adapter_model.safetensors")
    layers = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    assert layers
    for layer in layers - {name for name in layers
                           if name.endswith((".experts", ".experts.base_layer"))}:
        size_out, size_in = shapes[f"{layer}.weight"]
        parts = [tensors[f"{PREFIX}{layer}.lora_{part}.weight"].shape for part in "AB"]
        assert parts == [(3, size_in), (size_out, 3)], layer
        assert targets == "all" or f".{targets[0]}." in f".{layer}."
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    if targets != "all" and not {"experts", "mlp", "feed_forward", "shared_expert",
                                 "experts.1"} & set(targets):
        router = name == "qwen2_moe" and targets == ["gate"]        # PEFT finds it by its weight
        if router:
            assert written["target_parameters"] == [f"{layer}.weight" for layer in sorted(layers)]
        want = [] if router else sorted(layers) if name == "llama4_nested" else targets
        assert written["target_modules"] == want
    again = load_model(base, torch.float32)
    load_adapter(again, tmp_path)
    logits, off = logits_and_merge_error(again.eval())
    assert torch.equal(logits, logits_of(model, IDS)) and off < 1e-5
    assert (logits - plain).abs().max() > 1e-2
    set_adapters(model, False)
    assert torch.equal(logits_of(model, IDS), plain)


IN_PEFT = ["gemma2", "glm", "glm4", "olmo", "olmo2", "phi3", "qwen2_moe", "qwen3_moe", "llama4"]


@needs_shared
@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_loads_our_adapters_and_we_load_pefts(name, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    # PEFT's own: where experts are stacked, gate_proj of dense layers is lost
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "qwen3_moe" else "all"
    base, config = GOLDEN / "models" / name, LoRAConfig(r=3, lora_alpha=6, target_modules=targets)
    ours = load_model(base)
    perturb(attach_lora(ours, config, stored_name=ours.config.stored_name), size=0.1).eval()
    save_adapter(ours, tmp_path, config, str(base))
    with torch.no_grad():
        assert (load_in_peft(base, tmp_path)(IDS).logits - logits_of(ours, IDS)).abs().max() < 1e-4

    targets = [layer.removeprefix(PREFIX) for layer in peft_names(ours).values()]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    )
    perturb(theirs, seed=1, size=0.1).eval().save_pretrained(tmp_path / "theirs")
    again = load_model(base)
    load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(again.eval(), IDS)).abs().max() < 1e-4


# ---- stacked experts ----


def by_pefts_formula(model, tensors, scale=2.0):
    """Logits of a Llama 4 whose stacks have PEFT 0.20's sum added: W[e, i, o] + scale * B[i, r, e]
    A[e, r, o]."""
    for layer, block in enumerate(model.model.layers):
        if not model.config.sparse[layer]:
            continue
        for part, place in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
            key = f"{PREFIX}model.layers.{layer}.feed_forward.{place}"
            weight = getattr(block.mlp.experts, part).weight
            A, B = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
            A, B = A.reshape(len(weight), -1, A.shape[-1]), B.reshape(B.shape[0], -1, len(weight))
            with torch.no_grad():
                weight += scale * torch.einsum("ire,ero->eio", B, A)
    return logits_of(model, IDS)


@needs_shared
def test_stacked_experts_are_written_as_peft_020_writes_them(tmp_path):
    base = GOLDEN / "models" / "llama4"
    config = LoRAConfig(r=3, lora_alpha=6, target_modules=["experts"])
    config.lora_dropout = 0.1
    model = load_model(base)
    perturb(attach_lora(model, config, stored_name=model.config.stored_name), size=0.1).eval()
    save_adapter(model, tmp_path, config, str(base))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    # PEFT refuses dropout with stacks
    assert fields["target_modules"] == [] and fields["lora_dropout"] == 0
    assert fields["target_parameters"] == [f"model.layers.{layer}.feed_forward.experts.{part}"
                                           for layer in (1, 3)
                                           for part in ("gate_up_proj", "down_proj")]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (by_pefts_formula(load_model(base, torch.float32), tensors)
            - logits_of(model, IDS)).abs().max() < 1e-4


@needs_shared
@pytest.mark.parametrize("parameters",
                         [["gate_up_proj"], ["down_proj"], ["down_proj", "gate_up_proj"]],
                         ids="+".join)
def test_stacked_experts_adapted_by_peft(parameters, tmp_path):
    """In the layout that the installed version writes; its target_modules never mean a stack,
    whatever their names."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = GOLDEN / "models" / "llama4"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"],
        target_parameters=[f"experts.{name}" for name in parameters]))
    perturb(theirs, size=0.1).eval().save_pretrained(tmp_path)
    model = load_model(base)
    config = load_adapter(model, tmp_path)
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(model.eval(), IDS)).abs().max() < 1e-4
    save_adapter(model, tmp_path, config, str(base))
    again = load_model(base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(model, IDS))


def square_experts():
    """A Llama 4 whose stack of `down` matrices is square, so that shapes do not tell A from B."""
    fields = dict(model_type="llama4_text", hidden_size=32, intermediate_size=32,
                  intermediate_size_mlp=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=8, vocab_size=50, max_position_embeddings=64,
                  num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=2)
    return tiny(**fields)


@pytest.mark.parametrize("version", [None, "0.18.1", "0.20.0.dev0", "1.0"])
def test_square_stacks_are_read_in_the_layout_of_their_peft_version(version, tmp_path):
    model, config = square_experts(), LoRAConfig(r=2, target_modules=["experts.down_proj"])
    perturb(attach_lora(model, config, stored_name=model.config.stored_name))
    save_adapter(model, tmp_path, config, "base")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "peft_version": version}))
    again = square_experts()
    load_adapter(again, tmp_path)
    (name, before), (_, after) = (next(iter(lora_layers(each).items())) for each in (model, again))
    sums = []
    for layer in (before, after):  # the adapter's part of each expert's matrix, (E, in, out)
        pairs = [expert_matrices(layer.lora_A.weight, layer.lora_B.weight, 2, expert)
                 for expert in (0, 1)]
        sums.append(torch.stack([(B @ A).T for A, B in pairs]))
    newer = version in ("0.20.0.dev0", "1.0")           # there, A multiplies the outputs
    assert torch.allclose(sums[1], sums[0] if newer else sums[0].transpose(1, 2), atol=1e-6)
    assert not torch.allclose(sums[0], sums[0].transpose(1, 2), atol=1e-2)


# ---- separate experts ----


@needs_shared
@pytest.mark.parametrize("routed", [True, False])
def test_adapters_of_experts_made_with_transformers_4_and_5(routed, tmp_path):
    """In version 4 `gate_proj` includes the routed experts, which are linear layers there; in
    version 5 it does not."""
    base = GOLDEN / "models" / "qwen2_moe"
    config = LoRAConfig(
        r=2, target_modules=["q_proj", "gate_proj", "gate"] if routed else ["q_proj", "gate_proj"]
    )
    model = load_model(base)
    named = find_targets(model, config.target_modules)
    wanted = [name for name in named if routed or ".experts." not in name]
    attach_lora(model, config, targets=wanted)
    save_adapter(perturb(model, size=0.1).eval(), tmp_path, config, "base")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**fields, "target_modules": config.target_modules})
    )
    again = load_model(base)
    load_adapter(again, tmp_path)
    assert list(lora_layers(again)) == wanted and len(named) > len(wanted) - routed
    assert any(name.endswith("mlp.gate") for name in wanted) == routed
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(model, IDS))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = [key for key in tensors if ".experts.0." in key or not routed and "shared" in key][:2]
    save_file({key: t for key, t in tensors.items() if key not in lost},
              tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing: 2"):
        load_adapter(load_model(base), tmp_path)


@needs_shared
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "llama4"])
def test_adapters_that_peft_made_from_module_names(name, tmp_path):
    """The installed version decides which layers `gate_proj` and `down_proj` mean; routers are
    linear layers in version 4 only."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    linear_routers = transformers.__version__.startswith("4.") and name != "llama4"
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj", *(["gate"] if linear_routers else [])]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / "models" / name, attn_implementation="eager"
    )
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    )
    perturb(theirs, size=0.1).eval().save_pretrained(tmp_path)
    ours = load_model(GOLDEN / "models" / name)
    # as of PEFT 0.19: stacks of experts
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    with_experts = linear_routers or bool(fields.get("target_parameters"))
    load_adapter(ours, tmp_path)
    assert any(".experts." in layer for layer in lora_layers(ours)) == with_experts
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(ours.eval(), IDS)).abs().max() < 1e-4


@needs_shared
def test_target_parameters_without_their_tensors(tmp_path):
    adapter_folder(tmp_path, target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match="mlp.experts.gate_up_proj is not a matrix of this model, "
                                         "and the file has no adapter of experts"):
        load_adapter(load_model(GOLDEN / "models" / "qwen3_moe"), tmp_path)


# ---- vendors' names in other settings ----


@needs_shared
@pytest.mark.parametrize("name, target, whole, ranks", [
    ("chatglm3", "query_key_value", ["word_embeddings", "output_layer"],
     {"1.self_attention.query_key_value": 5}),
    ("qwen", "c_attn", ["wte", "lm_head"], {"c_attn": 4}),
    ("internlm2", "wqkv", ["tok_embeddings", "output"], {}),
    ("baichuan2_7b", "W_pack", ["lm_head"], {"W_pack": 7}),
    ("gemma2", "q_proj", ["pre_feedforward_layernorm"], {}),
    ("llama4", "experts", ["router", "shared_expert"], {"experts.gate_up_proj": 2}),
])
def test_modules_to_save_and_rank_patterns_by_vendors_names(name, target, whole, ranks, tmp_path):
    base = checkpoint_of(name, tmp_path / "base")
    config = LoRAConfig(r=3, target_modules=[target], modules_to_save=whole, rank_pattern=ranks)
    model = load_model(base)
    attach_lora(model, config, stored_name=model.config.stored_name)
    save_adapter(perturb(model, size=0.05).eval(), tmp_path, config, "base")
    shapes, tensors = shapes_in(base), load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if ".lora_" not in key:
            assert shapes[key.removeprefix(PREFIX)] == tensor.shape
            assert any(part in key for part in whole)
    assert all(any(part in key and ".lora_" not in key for key in tensors) for part in whole)
    found = {layer.scale * config.lora_alpha ** -1 for layer in lora_layers(model).values()}
    assert found == {1 / r for r in (*ranks.values(), *([] if target in ranks else [3]))}
    again = load_model(base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(model, IDS))


# ---- the files ----


def test_both_adapter_files_have_the_same_permissions(tmp_path):
    save_adapter(attach_lora(tiny(), LoRAConfig(r=2)), tmp_path, LoRAConfig(r=2), "base")
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1


def test_adapters_that_were_merged_before_training_another(tmp_path):
    for name, settings in (("a", {}), ("b", {"adapter_name_or_path": ["a"]}),
                           ("c", {"adapter_name_or_path": ["a", "b"]}),
                           ("d", {
                               "adapter_name_or_path": [str(tmp_path / "a")],
                               "create_new_adapter": True,
                           })):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "train_config.json", settings)
    assert [folded_under(tmp_path / name) for name in "abc"] == [[], [], ["a"]]
    assert (
        warn_of_folded([tmp_path / "a", tmp_path / "d"]) == warn_of_folded([tmp_path / "b"]) == ""
    )
    assert f"adapter_name_or_path={tmp_path}/a,{tmp_path}/d" in warn_of_folded([tmp_path / "d"])
