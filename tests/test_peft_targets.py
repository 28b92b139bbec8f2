"""checkpoint/peft_targets.py: PEFT computes what was trained, of every target; else a sentence."""
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from checkpoint.adapters import load_adapter, save_adapter
from checkpoint.load import load_model
from checkpoint.peft_targets import notes_on_peft, why_peft_differs
from lora import LoRAConfig, attach_lora, lora_layers, trainable
from methods.lora_variants import variant_arguments
from tests.common import GOLDEN, needs_shared, some
from tests.test_families import reference, SMALL
from tests.tiny_models import IDS, logits_of, perturb

pytestmark = [needs_shared, pytest.mark.filterwarnings("ignore::Warning")]
MLP = ["gate_proj", "up_proj", "down_proj"]


def needs_peft_21():
    """transformers 5 and a PEFT that stacks the adapters of experts."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    if transformers.__version__.startswith("4.") or peft.__version__ < "0.21":
        pytest.skip("written for peft 0.21 with transformers 5")
    return transformers, peft


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A random Mixtral, saved by transformers."""
    fields = dict(SMALL, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    folder = tmp_path_factory.mktemp("mixtral")
    reference("mixtral", fields, seed=0).save_pretrained(folder)
    return folder


def saved_adapter(base, folder, targets, **options):
    """(our model with a random adapter, its LoRAConfig), the adapter saved in the folder."""
    folder.mkdir(exist_ok=True)
    model = load_model(base)
    config = LoRAConfig(r=3, lora_alpha=6, target_modules=targets, **options)
    attach_lora(model, config, stored_name=model.config.stored_name, **variant_of(config))
    save_adapter(perturb(model, size=0.1).eval(), folder, config, str(base))
    return model, config


def variant_of(config):
    return variant_arguments(config) if config.use_dora else {}


def by_peft(base, folder):
    """PEFT's logits; no key may be missing."""
    transformers, peft = needs_peft_21()
    raw = json.loads((base / "config.json").read_text())
    nested = "text_config" in raw
    auto = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(base, attn_implementation="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    assert not [w for w in caught if "missing adapter keys" in str(w.message)]
    part = theirs.base_model.model
    with torch.no_grad():
        return (part.language_model if nested else part)(IDS).logits


CASES = [
    ("qwen3_moe", MLP), ("qwen3_moe", ["experts"]), ("qwen3_moe", "all"),
    ("qwen3_moe", ["all", "experts"]), ("qwen3_moe", ["all", "experts", "gate"]),
    ("qwen3_moe", ["mlp.gate_proj"]), ("qwen3_moe", ["down_proj"]), ("qwen3_moe", ["gate"]),
    ("qwen3_moe", r".*\.(self_attn|mlp)\.\w+_proj"),
    ("qwen2_moe", ["experts"]), ("qwen2_moe", "all"), ("qwen2_moe", ["all", "experts"]),
    ("qwen2_moe", ["all", "experts", "gate"]), ("qwen2_moe", MLP), ("qwen2_moe", ["gate"]),
    ("qwen2_moe", ["shared_expert"]), ("qwen2_moe", ["down_proj"]),
    ("mixtral", "all"), ("mixtral", ["all", "experts"]), ("mixtral", ["experts", "gate"]),
    ("mixtral", ["w2", "q_proj"]),
    ("llama4", "all"), ("llama4", ["experts"]), ("llama4", ["all", "experts"]),
    ("llama4", ["gate_up_proj"]), ("llama4", ["experts.down_proj"]),
    ("llama4_nested", "all"), ("llama4_nested", ["experts"]),
    ("llama4_nested", ["all", "experts"]), ("llama4_nested", ["shared_expert"]),
]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name, targets", some(CASES))
def test_peft_computes_what_was_trained(name, targets, use_rslora, mixtral, tmp_path):
    base = mixtral if name == "mixtral" else GOLDEN / "models" / name
    check_with_peft(base, tmp_path, targets, use_rslora)


@pytest.mark.parametrize("name, targets, use_rslora", [
    ("glm4_moe", "all", False), ("glm4_moe", ["all", "experts", "gate"], True),
    ("deepseek_v2", ["down_proj"], False), ("deepseek_v3", "all", False),
    ("minimax_m2", ["all", "experts"], True),
    ("qwen3_5_moe_text", ["all", "experts", "gate"], True),
    ("nemotron_h", ["in_proj", "q_proj", "o_proj", "shared_experts"], True),
    ("nemotron_h", r".*\.mixer\.(in|up|down|k)_proj", False)])
def test_peft_computes_what_was_trained_of_the_families_of_2026(name, targets, use_rslora,
                                                                tmp_path):
    check_with_peft(GOLDEN / "models2026" / name, tmp_path, targets, use_rslora)


def check_with_peft(base, tmp_path, targets, use_rslora):
    """An adapter of these targets, written by us, gives our logits in PEFT."""
    model, config = saved_adapter(base, tmp_path, targets, use_rslora=use_rslora)
    assert not why_peft_differs(model, config)
    ours = logits_of(model, IDS)
    assert (by_peft(base, tmp_path) - ours).abs().max() < 1e-4
    assert (logits_of(load_model(base), IDS) - ours).abs().max() > 0.1

    again = load_model(base)                # and we read our own files back
    load_adapter(again, tmp_path)
    assert list(lora_layers(again)) == list(lora_layers(model))
    assert torch.equal(logits_of(again.eval(), IDS), ours)


def test_an_adapter_that_is_saved_again_is_the_same(tmp_path):
    base = GOLDEN / "models" / "qwen2_moe"
    saved_adapter(base, tmp_path / "a", ["all", "experts", "gate"])
    model = load_model(base)
    config = load_adapter(model, tmp_path / "a")
    (tmp_path / "b").mkdir()
    save_adapter(model, tmp_path / "b", config, str(base))
    read = [json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ab"]
    assert read[0] == read[1]
    one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name, targets, options, words", [
    ("qwen3_moe", ["experts.0"], {}, "some experts of a layer have adapters and others have none"),
    ("qwen2_moe", ["experts.1", "experts.2"], {}, "some experts of a layer"),
    ("qwen3_moe", [r".*experts\.\d+\.gate_proj"], {},
     "down_proj alone, or on gate_proj and up_proj"),
    ("mixtral", ["w1"], {}, "looks for adapters of experts on w2 alone, or on w1 and w3, too"),
    ("mixtral", ["w1", "w3"], {}, "looks for adapters of experts on w2 alone"),
    ("qwen3_moe", ["experts"], {"use_dora": True}, "it has no DoRA for experts"),
    ("qwen2_moe", ["gate"], {"use_dora": True}, "it has no DoRA for experts"),
    ("qwen2_moe", ["experts"], {"rank_pattern": {"0.gate_proj": 5}}, "different ranks"),
    ("llama4", ["router"], {}, "peft cannot adapt the router of Llama 4"),
    ("nemotron_h", "all", {}, "it adapts no out_proj of nemotron_h"),
    ("nemotron_h", ["experts"], {}, "here each expert has an adapter of its own"),
])
def test_what_peft_loads_differently_is_said(name, targets, options, words, mixtral, tmp_path):
    base = mixtral if name == "mixtral" else GOLDEN / "models" / name
    base = base if base.is_dir() else GOLDEN / "models2026" / name
    model, config = saved_adapter(base, tmp_path, targets, **options)
    assert words in why_peft_differs(model, config)
    [note] = notes_on_peft(model, config, converted=False)
    assert words in note and note.endswith(".")
    try:                                    # and it is true
        theirs = by_peft(base, tmp_path)
    except Exception:
        return
    assert (theirs - logits_of(model, IDS)).abs().max() > 1e-2


def four_steps(logits, parameters) -> list[float]:
    """The losses of four AdamW steps on the tokens IDS."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(logits()[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("parts", [["down_proj"], MLP])
def test_training_differs_from_peft_where_gate_and_up_are_one_stack(parts):
    """From the same A: with down_proj alone the losses are PEFT's. With all three PEFT 0.21 gives
    gate and up of an expert one A of twice the rank, which both read (docs/differences.md)."""
    transformers, peft = needs_peft_21()
    base = GOLDEN / "models" / "qwen3_moe"
    model = load_model(base)
    attach_lora(model, LoRAConfig(r=4, target_modules=[rf".*experts\.\d+\.({'|'.join(parts)})"]))
    starts = {name: layer.lora_A.weight.detach().clone()
              for name, layer in lora_layers(model).items()}
    ours = four_steps(lambda: model.logits(model(IDS)), [*trainable(model).values()])

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=16, target_modules=parts))
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    for name, A in trained.items():
        if "lora_A" in name:
            layer = name.partition(".layers.")[2].partition(".")[0]
            own = MLP[:2] if "base_layer" in name else MLP[2:]
            rows = [starts[f"model.layers.{layer}.mlp.experts.{expert}.{part}"]
                    for expert in range(model.config.num_experts) for part in own]
            assert A.shape == torch.cat(rows).shape                 # of gate and up: 2 r for each
            A.data.copy_(torch.cat(rows))
    others = four_steps(lambda: theirs(IDS).logits, [*trained.values()])
    apart = [abs(one - other) for one, other in zip(ours, others)]
    assert apart[0] < 1e-5
    if parts == MLP:
        assert max(apart) > 0.05
    else:
        assert max(apart) < 1e-4 and abs(ours[3] - ours[0]) > 0.1


def test_dense_families_need_no_note(tmp_path):
    model, config = saved_adapter(GOLDEN / "models" / "qwen3", tmp_path, "all")
    assert why_peft_differs(model, config) == "" and not notes_on_peft(model, config, False)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_parameters" not in raw and "peft_version" not in raw


@pytest.mark.parametrize("converted, words", [(True, "take the one in `pissa_converted`"),
                                              (False, "`pissa_convert: true` writes an adapter")])
def test_the_note_on_pissa(converted, words, tmp_path):
    model = load_model(GOLDEN / "models" / "qwen3")
    config = LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    attach_lora(model, config, **variant_arguments(config))
    [note] = notes_on_peft(model, config, converted)
    assert words in note
