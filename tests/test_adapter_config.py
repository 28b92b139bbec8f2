"""checkpoint/adapter_config.py: what PEFT writes loads equal, or is refused by name; odd files."""
import json
import random
import time

import pytest
import torch

from checkpoint.adapter_config import read_adapter_config
from checkpoint.adapters import folded_under, load_adapter, save_adapter
from checkpoint.load import load_model
from lora import LoRAConfig, attach_lora, find_targets, lora_layers
from tests.common import GOLDEN, needs_shared
from tests.tiny_models import IDS, base_with, logits_of, perturb, tiny

pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def adapter_of_peft(base, folder, **options):
    """PEFT's logits with a random adapter that it made with these options; saved in the folder."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options})
    theirs = peft.get_peft_model(theirs, config)
    perturb(theirs, seed=1, size=0.1).eval().save_pretrained(folder)
    with torch.no_grad():
        return theirs(IDS).logits


def raw_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# ---- layers that are left out ----


@needs_shared
@pytest.mark.parametrize("options", [
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=1),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0]),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 1],
         layers_pattern="layers"),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
    dict(target_modules=["q_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "v_proj", "up_proj"], exclude_modules=["layers.0.mlp.up_proj"]),
    dict(target_modules=["q_proj", "v_proj", "up_proj"], exclude_modules=["v_proj"]),
    dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.[01]\.self_attn\.v_proj"),
    dict(target_modules=r".*\.(q|v|up)_proj", exclude_modules=["up_proj"],
         rank_pattern={"v_proj": 2}),
    dict(target_modules="all-linear", exclude_modules=["down_proj"], use_dora=True),
    dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], layers_to_transform=[1]),
])
def test_layers_that_peft_leaves_out(options, tmp_path):
    base = GOLDEN / "models" / "llama3"
    theirs = adapter_of_peft(base, tmp_path, **options)
    ours = load_model(base)
    config = load_adapter(ours, tmp_path)
    assert (logits_of(ours.eval(), IDS) - theirs).abs().max() < 1e-4
    saved = tmp_path / "again"
    saved.mkdir()
    save_adapter(ours, saved, config, str(base))            # in fields that every version reads
    again = load_model(base)
    load_adapter(again, saved)
    assert list(lora_layers(again)) == list(lora_layers(ours))


@needs_shared
def test_layers_to_transform_of_experts_counts_blocks(tmp_path):
    base = GOLDEN / "models" / "qwen2_moe"
    theirs = adapter_of_peft(base, tmp_path, target_modules=["q_proj"], layers_to_transform=[1])
    ours = load_model(base)
    load_adapter(ours, tmp_path)
    assert list(lora_layers(ours)) == ["model.layers.1.self_attn.q_proj"]
    assert (logits_of(ours.eval(), IDS) - theirs).abs().max() < 1e-4


# ---- initial values ----


@needs_shared
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_initial_values_that_leave_the_base_as_it_was(init, tmp_path):
    peft = pytest.importorskip("peft")
    if init == "mica" and peft.__version__ < "0.20":
        pytest.skip("newer than this peft")
    base = GOLDEN / "models" / "qwen2"
    options = dict(target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    if init == "eva":
        options["eva_config"] = peft.EvaConfig(rho=1.5, tau=0.98)
    theirs = adapter_of_peft(base, tmp_path, **options)
    assert raw_of(tmp_path)["init_lora_weights"] == init
    ours = load_model(base)
    load_adapter(ours, tmp_path)
    assert (logits_of(ours.eval(), IDS) - theirs).abs().max() < 1e-4


@needs_shared
@pytest.mark.parametrize("init, options", [("olora", {}), ("loftq", {"loftq_bits": 4})])
def test_initial_values_that_change_the_base_are_refused_by_name(init, options, tmp_path):
    peft = pytest.importorskip("peft")
    more = {"loftq_config": peft.LoftQConfig(**options)} if options else {}
    try:
        adapter_of_peft(GOLDEN / "models" / "qwen2", tmp_path, target_modules=["q_proj"],
                        init_lora_weights=init, **more)
    except ImportError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError,
                       match=f"adapter_config.json: init_lora_weights '{init}' changed"):
        load_adapter(load_model(GOLDEN / "models" / "qwen2"), tmp_path)


# ---- types and bounds ----


def written(folder, **changes):
    """An adapter of the tiny model, its adapter_config.json with these changes."""
    config = LoRAConfig(r=4, target_modules=["q_proj", "up_proj"])
    folder.mkdir(exist_ok=True)
    save_adapter(attach_lora(tiny(), config), folder, config, "acme/tiny")
    (folder / "adapter_config.json").write_text(json.dumps({**raw_of(folder), **changes}))
    return folder


@pytest.mark.parametrize("change, words", [
    (dict(r=0), "r: 0 is not above 0"), (dict(r=-8), "r: -8 is not above 0"),
    (dict(r="8"), 'r: "8" is not a whole number'), (dict(r=True), "r: true is not a whole number"),
    (dict(r=4.0), "r: 4.0 is not a whole number"), (dict(r=10**18), "r: 10+ is not between"),
    (dict(lora_alpha="x"), 'lora_alpha: "x" is not a number'),
    (dict(lora_alpha=-1), "lora_alpha: -1 is not 0 to"),
    (dict(lora_alpha=float("nan")), "lora_alpha: NaN"),
    (dict(lora_dropout=2), "lora_dropout: 2 is not 0 to"),
    (dict(rank_pattern=[]), r"rank_pattern: \[\] is not an object"),
    (dict(rank_pattern={"q_proj": 0}), "rank_pattern: .* holds 0, which is not above 0"),
    (dict(rank_pattern={"q_proj": "4"}), 'rank_pattern: .* holds "4", which is not a whole'),
    (dict(alpha_pattern={"q_proj": None}), "alpha_pattern: .* holds null, which is not a number"),
    (dict(rank_pattern={"(": 2}), "rank_pattern: '.' is no regular expression"),
    (dict(target_modules=5), "target_modules: 5 is not text or a list of texts"),
    (dict(target_modules=[5]), r"target_modules: \[5\] is not text or a list of texts"),
    (dict(target_modules={}), "target_modules: {} is not text"),
    (dict(modules_to_save="lm_head"), 'modules_to_save: "lm_head" is not a list of texts'),
    (dict(peft_version=5), "peft_version: 5 is not text"),
    (dict(base_model_name_or_path=5), "base_model_name_or_path: 5 is not text"),
    (dict(use_dora="yes"), 'use_dora: "yes" is not true or false'),
    (dict(use_rslora=1), "use_rslora: 1 is not true or false"),
    (dict(bias=None, peft_type=["LORA"]), r'peft_type: \["LORA"\] is not text'),
    (dict(init_lora_weights=["pissa"]), 'init_lora_weights .* is unknown'),
    (dict(init_lora_weights={}), "init_lora_weights {} is unknown"),
    (dict(init_lora_weights="pissa_niter_" + "9" * 20), "is unknown"),
    (dict(layers_to_transform="1"), 'layers_to_transform: "1" is not a whole number or a list'),
    (dict(exclude_modules=5), "exclude_modules: 5 is not text or a list"),
    (dict(target_parameters="x"), 'target_parameters: "x" is not a list of texts'),
    (dict(r=2000), "holds no adapter of rank 2000, .* its largest lora_A has 4 rows"),
])
def test_types_and_bounds_of_adapter_config_json(change, words, tmp_path):
    folder = written(tmp_path, **change)
    start = time.process_time()
    with pytest.raises(ValueError, match=f"{tmp_path}.*{words}"):
        load_adapter(tiny(), folder)
    assert time.process_time() - start < 2


def test_null_means_absent(tmp_path):
    folder = written(tmp_path, lora_alpha=None, rank_pattern=None, use_dora=None, bias=None,
                     peft_type=None, init_lora_weights=None, exclude_modules=None)
    assert load_adapter(tiny(), folder).lora_alpha == LoRAConfig().lora_alpha


@pytest.mark.parametrize("text",
                         ["[" * 100_000, '{"r":' * 100_000, "[1]", '{"r": ' + "9" * 5000 + "}", "",
                          "\0"])
def test_adapter_config_json_that_breaks_readers(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json (is|holds) .*; fetch it again"):
        read_adapter_config(tmp_path)


ODD_VALUES = [None, True, False, 0, -1, 3, 10**18, 10**400, 0.5, -4.0, float("nan"), "", "x", "8",
              "\0",
              [], {}, [1], ["x"], ["("], "(", "*", [[]], {"a": 1}, {"(": 4}, {"q_proj": "x"},
    "é" * 300]


def test_any_adapter_config_json_loads_or_ends_in_a_sentence(tmp_path):
    """Mutations with a fixed seed."""
    folder = written(tmp_path)
    raw = {**raw_of(folder), "exclude_modules": None, "layers_to_transform": None,
           "layers_pattern": None,
           "target_parameters": None, "peft_version": "0.21.0"}
    draw = random.Random(0)
    loaded = 0
    for _ in range(300):
        mutant = dict(raw)
        for name in draw.sample(list(raw), draw.randint(1, 3)):
            mutant[name] = draw.choice(ODD_VALUES)
        (folder / "adapter_config.json").write_text(json.dumps(mutant))
        start = time.process_time()
        try:
            load_adapter(tiny(), folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error), (mutant, error)
        else:
            loaded += 1
        assert time.process_time() - start < 2, mutant
    assert loaded


# ---- patterns that backtrack ----

SLOW = r"(([a-z._0-9]+)+)+!"


def test_a_backtracking_pattern_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("lora.MATCH_SECONDS", 0.5)
    start = time.perf_counter()
    with pytest.raises(ValueError,
                       match="lora_target: .* takes more than 0.5 seconds for .* names"):
        find_targets(tiny(), SLOW)
    with pytest.raises(ValueError, match="lora_target: .* takes more than"):
        find_targets(tiny(), [SLOW])
    for change in (dict(target_modules=SLOW), dict(exclude_modules=SLOW),
                   dict(rank_pattern={SLOW: 2}),
                   dict(alpha_pattern={"q_proj": 3, SLOW: 2.0})):
        with pytest.raises(ValueError,
                           match=f"{tmp_path}/adapter_config.json: .*takes more than 0.5 sec"):
            load_adapter(tiny(), written(tmp_path, **change))
    assert time.perf_counter() - start < 30


def test_patterns_match_as_they_did():
    model = tiny()
    for pattern in (r".*\.(q|v)_proj", r"model\.layers\.[0-9]+\.mlp\..*", r".*0.*q_proj",
                    r"(?i).*\.Q_PROJ"):
        found = find_targets(model, pattern)
        assert found and all("proj" in name for name in found)
    with pytest.raises(ValueError, match=r"lora_target: '\(a' is no regular expression"):
        find_targets(model, "(a")


# ---- train_config.json beside an adapter ----


@pytest.mark.parametrize("names", ["a", 5, {"a": 1}, [1], [None]])
def test_train_config_json_of_another_type_is_named(names, tmp_path):
    (tmp_path / "train_config.json").write_text(json.dumps({"adapter_name_or_path": names}))
    with pytest.raises(ValueError,
                       match="train_config.json: adapter_name_or_path is .* not a list of folders"):
        folded_under(tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(hidden_size=48, head_dim=8),
     r"q_proj.lora_A.weight has shape \[4, 32\], .* \[4, 48\].*another model"),
    (dict(num_hidden_layers=1), "not used: 4, such as .*layers.1"),
])
def test_a_base_of_another_size_is_named(change, words, tmp_path):
    base = base_with(tmp_path / "base", **change)
    folder = written(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"(?s){words}"):
        load_adapter(load_model(base), folder)
