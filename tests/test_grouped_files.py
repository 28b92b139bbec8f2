"""checkpoint/grouped_files.py against tensors that the quantizing libraries wrote and read.

recorded/packed_weights.safetensors holds matrices that were packed and dequantized on a CPU by the
libraries' own code: AutoGPTQ (qlinear_cuda, 2024-11), GPTQModel (2026-08, with its conversion
between the formats gptq and gptq_v2), AutoAWQ (WQLinear_GEMM, 0.2.9), compressed-tensors (0.20.1,
and 2025-10 for columns in another order).
"""
import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import chat
import eval as evaluation
import merge
from checkpoint.grouped_files import find_grouped, grouped_settings
from checkpoint.load import (count_parameters, load_model, packed_weights, quantized_weights,
                             save_model)
from checkpoint.read_config import model_config
from exporting.merge_plan import plan_tensors
from model import CausalLM, init_weights
from tests.common import CURVES, ROOT, needs_shared, run_recorded
from tests.tiny_models import base_with, write_grouped

RECORDED = ROOT / "tests/recorded/packed_weights.safetensors"
with safe_open(str(RECORDED), framework="pt") as _file:
    SETTINGS = json.loads(_file.metadata()["settings"])
SIZES = dict(hidden_size=64, intermediate_size=96, head_dim=16)


def recorded(name, folder):
    """({key: tensor} of one recorded layer, the matrix that the library reads), as a folder."""
    tensors = {key.replace(f"{name}.", "layer."): t for key, t in load_file(RECORDED).items()
               if key.startswith(f"{name}.")}
    want = tensors.pop("layer.want")
    folder.mkdir()
    save_file(tensors, str(folder / "model.safetensors"))
    dtype = str(want.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(
        json.dumps({"dtype": dtype, "quantization_config": SETTINGS[name]}))
    return {key: (folder / "model.safetensors", key) for key in tensors}, want


@pytest.mark.parametrize("name", SETTINGS)
def test_matrices_as_the_libraries_read_them_bit_for_bit(name, tmp_path):
    places, want = recorded(name, tmp_path / name)
    found = find_grouped(tmp_path / name, places, grouped_settings(tmp_path / name))
    assert list(found) == ["layer.weight"]
    part = found["layer.weight"]
    assert part.shape == want.shape and part.quant_format.kind.split("-")[0] in "2348"
    assert torch.equal(part.read("cpu").dequantize(), want)
    sizes = {name: (tuple(t.shape), t.dtype) for name, t in part.read("cpu").state_dict().items()}
    assert sizes == part.quant_format.tensors(want.shape)


def test_the_libraries_and_variants_that_are_recorded():
    kinds = {(s["quant_method"], s.get("bits"), s.get("group_size"), s.get("desc_act"),
              s.get("checkpoint_format")) for s in SETTINGS.values()}
    assert len(SETTINGS) == 15 and len(kinds) > 10


# ---- whole checkpoints --------------------------------------------------------------------------


VARIANTS = {
    "gptq": dict(),
    "gptq in another order": dict(act=True),
    "gptq, one group": dict(group_size=-1, sym=False),
    "gptq, 8 bits": dict(bits=8),
    "gptq, 3 bits": dict(bits=3),
    "gptq_v2": dict(checkpoint_format="gptq_v2"),
    "awq": dict(method="awq", version="gemm", zero_point=True),
    "awq by other names": dict(method="awq", group_size=16, w_bit=4, modules_to_not_convert=None),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_the_dequantized_model(variant, tmp_path):
    base = base_with(tmp_path / "base", **SIZES)
    dense = write_grouped(base, tmp_path / "packed", **VARIANTS[variant])
    model, plain = load_model(tmp_path / "packed"), load_model(base)
    found = quantized_weights(model)
    assert found.keys() == dense.keys() and "lm_head.weight" not in found
    for name, weight in dense.items():
        assert torch.equal(found[name].dequantize(torch.float16), weight)
        plain.get_parameter(name).data = weight.float()
    ids = torch.arange(20)[None]
    assert torch.allclose(model.logits(model(ids)), plain.logits(plain(ids)), atol=1e-5)
    skeleton = load_model(tmp_path / "packed", skip_weights=True)
    assert count_parameters(skeleton) == count_parameters(plain)
    assert [w.nbytes for w in quantized_weights(skeleton).values()] == \
        [w.nbytes for w in found.values()]


def edited(folder, change=None, **settings):
    """Change the tensors of a written checkpoint in place, and its quantization_config."""
    tensors = load_file(folder / "model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, str(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def packed(tmp_path):
    write_grouped(base_with(tmp_path / "base", **SIZES), tmp_path / "packed")
    return tmp_path / "packed"


def test_layers_that_are_left_out_a_rule_for_some_and_biases_of_zeros(packed, tmp_path):
    """GPTQModel's dynamic: one layer in 8 bits, one in 16; AutoGPTQ's biases of layers without."""
    in_8 = load_model(packed)
    write_grouped(tmp_path / "base", tmp_path / "in_8", bits=8)
    layer, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"

    def change(tensors):
        of_8 = load_file(tmp_path / "in_8/model.safetensors")
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{layer}.{part}"] = of_8[f"{layer}.{part}"]
            del tensors[f"{other}.{part}"]
        tensors[f"{other}.weight"] = load_file(
            tmp_path / "base/model.safetensors")[f"{other}.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64).half()

    edited(packed, change, dynamic={rf"-:{other}": {}, rf"+:{layer}": {"bits": 8}})
    model = load_model(packed)
    found = quantized_weights(model)
    assert len(found) == len(quantized_weights(in_8)) - 1
    assert found[f"{layer}.weight"].quant_format.kind == "8-bit gptq"
    assert model.get_parameter(f"{other}.weight").dtype == torch.float32
    plan, _ = plan_tensors(packed, [], None)
    assert "model.layers.0.self_attn.q_proj.bias" not in plan
    edited(packed, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(ValueError, match=r"not used: 1, such as .*q_proj\.bias"):
        load_model(packed)


def test_a_quantized_head(tmp_path):
    write_grouped(base_with(tmp_path / "base", vocab_size=128, **SIZES), tmp_path / "packed")

    def change(tensors):
        layer = "model.layers.0.self_attn.q_proj"
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"lm_head.{part}"] = tensors[f"{layer}.{part}"].repeat(1, 2)
        tensors["lm_head.g_idx"] = tensors[f"{layer}.g_idx"].clone()
        del tensors["lm_head.weight"]

    model = load_model(edited(tmp_path / "packed", change, lm_head=True))
    head = quantized_weights(model)["lm_head.weight"].dequantize()
    with torch.no_grad():
        hidden = model(torch.arange(9)[None])
        assert torch.allclose(model.logits(hidden), hidden @ head.T, atol=1e-5)


def test_settings_beside_config_json(packed):
    config = json.loads((packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    (packed / "quantize_config.json").write_text(json.dumps({**settings, "checkpoint_format": "x"}))
    with pytest.raises(ValueError, match="quantize_config.json.checkpoint_format is 'x'; this "
                       "reads gptq and gptq_v2"):
        edited_config(packed, config)
    (packed / "quantize_config.json").write_text(json.dumps({**settings, "checkpoint_format":
                                                             "gptq_v2"}))
    edited_config(packed, config)
    with pytest.raises(ValueError, match="says checkpoint_format 'gptq', quantize_config.json "
                       "beside it says 'gptq_v2'"):
        edited_config(packed, config | {"quantization_config": {**settings, "format": "gptq"}})


def edited_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return packed_weights(folder)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
SCHEME = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group",
                                             "group_size": 32, "symmetric": True}}
W4A16 = {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": {"group_0": SCHEME}}
OTHERS = {      # settings: words of the message
    "marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "older marlin": ({**GPTQ, "is_marlin_format": True}, "checkpoint_format is 'marlin'"),
    "planar": ({**GPTQ, "format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
    "5 bits": ({**GPTQ, "bits": 5}, "bits is 5; this reads 2, 3, 4, 8 bits"),
    "no bits": ({"quant_method": "gptq"}, "bits is None"),
    "a list of bits": ({**GPTQ, "bits": [4]}, r"bits is \[4\]"),
    "no group": ({**GPTQ, "group_size": 0}, "group_size is 0"),
    "a group of text": ({**GPTQ, "group_size": "32"}, "group_size is '32'"),
    "packed in bytes": ({**GPTQ, "pack_dtype": "int8"}, "pack_dtype is 'int8'"),
    "rotated": ({**GPTQ, "rotation": "hadamard"}, "rotation is 'hadamard'"),
    "gemv": ({**GPTQ, "quant_method": "awq", "version": "GEMV"}, "version is 'gemv'; .* gemm"),
    "llm-awq": ({**GPTQ, "quant_method": "awq", "backend": "llm-awq"}, "version is 'llm-awq'"),
    "awq in 8 bits": ({**GPTQ, "quant_method": "awq", "bits": 8}, "bits is 8"),
    "other codes": ({**W4A16, "format": "int-quantized"}, "format is 'int-quantized'"),
    "fp8 in 4 bits": ({**W4A16, "format": "float-quantized"}, "num_bits is 4; this reads 8"),
    "no groups": ({**W4A16, "config_groups": None}, "config_groups is None"),
    "activations": ({**W4A16, "config_groups": {"group_0": {**SCHEME, "input_activations":
                                                            {"num_bits": 8}}}},
                    "group_0.input_activations is .*; this reads weights alone"),
    "float": ({**W4A16, "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}},
              "config_groups.a.weights.type is 'float'; this reads int"),
    "sparse": ({**W4A16, "sparsity_config": {"format": "sparse-24"}}, "sparsity_config is"),
    "rotations": ({**W4A16, "transform_config": {"config_groups": {}}}, "transform_config is"),
    "key cache": ({**W4A16, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_variants_that_are_not_read_are_named(case, packed):
    settings, words = OTHERS[case]
    config = json.loads((packed / "config.json").read_text())
    with pytest.raises(ValueError, match=words) as caught:
        edited_config(packed, config | {"quantization_config": settings})
    assert str(packed / "config.json") in str(caught.value)
    assert "quantization_bit: 4" in str(caught.value)


LAYER = "model.layers.0.mlp.up_proj"
WRONG = {       # damage to the tensors: words of the message
    "no zeros": (lambda t: t.pop(f"{LAYER}.qzeros"), f"the part {LAYER}.qzeros, which is in no"),
    "no scales": (lambda t: t.pop(f"{LAYER}.scales"), f"the part {LAYER}.scales"),
    "short codes": (lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:3]}),
                    "(holds 1|has shape)"),
    "flat codes": (lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].view(-1)}),
                   "up_proj"),
    "codes of a float": (lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].float()}),
                         r"qweight has shape .*torch\.float32"),
    "scales of integers": (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].int()}),
                           r"scales has shape .*torch\.int32"),
    "few zeros": (lambda t: t.update({f"{LAYER}.qzeros": t[f"{LAYER}.qzeros"][:1]}),
                  r"qzeros has shape \[1, 12\]"),
    "groups that are not there": (lambda t: t[f"{LAYER}.g_idx"].add_(1),
                                  "g_idx is not the group, below 2, of each of 64 columns"),
    "twice": (lambda t: t.update({f"{LAYER}.weight": torch.zeros(96, 64)}),
              "qweight and .*up_proj.weight .* are both the matrix"),
    "no codes": (lambda t: t.pop(f"{LAYER}.qweight"), "missing: 1, such as .*up_proj.weight"),
    "another size": (lambda t: t.update({f"{LAYER}.{part}": t[f"{LAYER}.{part}"].repeat(1, 2)
                                         for part in ("qweight", "qzeros", "scales")}),
                     r"has shape \[192, 64\], config.json makes it \[96, 64\]"),
    "none": (lambda t: [t.pop(name) for name in list(t) if name.endswith("qweight")],
             "says gptq, but .* holds no tensor named .qweight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_incomplete_files_are_named(case, packed):
    change, words = WRONG[case]
    edited(packed, change)
    with pytest.raises(ValueError, match=words) as caught:
        load_model(packed)
    assert "packed" in str(caught.value)


def test_other_bits_than_stated_and_an_order_that_is_not_stored(packed):
    with pytest.raises(ValueError, match="says 8 bits; .* holds 4"):
        load_model(edited(packed, bits=8))

    def no_order(tensors):
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    load_model(edited(packed, no_order, bits=4))            # in order, as desc_act: false says
    with pytest.raises(ValueError, match="g_idx, which is in no file"):
        load_model(edited(packed, desc_act=True))


VALUES = (None, True, 0, -1, 3, 8, 1e9, 2**40, "4", "", [4], {"a": 1}, float("inf"), "gptq_v2")
DAMAGES = (
    lambda x: x[:-1], lambda x: x.reshape(-1), lambda x: x.float(), lambda x: x.long(),
    lambda x: x.bool(), lambda x: x[:0], lambda x: -x, lambda x: x.reshape(-1)[0],
    lambda x: x[None], lambda x: torch.full_like(x, 30_000),
    lambda x: x.T if x.dim() == 2 else x, lambda x: None)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_damage_of_any_kind_is_an_error_that_says_so_or_none(method, tmp_path):
    """150 checkpoints with one odd field and one odd tensor: nothing but ValueError."""
    rng = random.Random(7)
    sizes = SIZES | {"num_hidden_layers": 1}
    write_grouped(base_with(tmp_path / "base", **sizes), tmp_path / "good", method)
    good = load_file(tmp_path / "good/model.safetensors")
    config = json.loads((tmp_path / "good/config.json").read_text())
    fields = [*config["quantization_config"], "checkpoint_format", "version", "dynamic", "method"]
    names, refused = [name for name in good if "_proj" in name], 0
    for _ in range(150):
        name, change = rng.choice(names), rng.choice(DAMAGES)
        tensors = {other: t.clone() for other, t in good.items()}
        tensors[name] = change(tensors[name])
        save_file({other: t.contiguous().clone() for other, t in tensors.items() if t is not None},
                  str(tmp_path / "good/model.safetensors"))
        odd = {rng.choice(fields): rng.choice(VALUES)} if rng.random() < 0.5 else {}
        (tmp_path / "good/config.json").write_text(json.dumps(
            config | {"quantization_config": config["quantization_config"] | odd}))
        try:
            load_model(tmp_path / "good")
        except ValueError as error:
            assert "good" in str(error)
            refused += 1
    assert 90 < refused < 150


def test_a_model_from_scratch_is_not_said_to_be_quantized(packed, tmp_path):
    model = CausalLM(model_config(json.loads((packed / "config.json").read_text())))
    init_weights(model, torch.Generator().manual_seed(0))
    save_model(model, tmp_path, packed)
    read = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters()))


def test_fields_that_are_not_known_are_named():
    fields = json.loads((ROOT / "models/tiny/config.json").read_text())
    plain = model_config(fields).notes
    for settings in (GPTQ, W4A16, {"quant_method": "awq", "bits": 4, "zero_point": True}):
        assert model_config({**fields, "quantization_config": settings}).notes == plain
        added = {**settings, "twist": 3, "off": None}
        notes = model_config({**fields, "quantization_config": added}).notes
        assert "'twist' is not known here" in notes[len(plain)] and "off" not in notes[-1]


OFT = ["finetuning_type=oft", "oft_block_size=16", "adapter_name_or_path=null"]


# ---- runs ---------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("adapter", ["lora", "oft"])
@pytest.mark.parametrize("how", [dict(act=True), dict(method="awq", version="gemm")],
                         ids=["gptq", "awq"])
def test_training_merging_and_use_equal_those_of_the_dequantized_base(
        how, adapter, tmp_path, monkeypatch, capsys):
    """Every loss; the merged weights; what is said. The 16-bit losses are LLaMA-Factory's."""
    base, plain = CURVES / "tiny_llama3", tmp_path / "plain"
    dense = write_grouped(base, tmp_path / "packed", **how)
    shutil.copytree(base, plain, copy_function=shutil.copyfile)
    weights = load_file(base / "model.safetensors")
    save_file(weights | {name: w.float() for name, w in dense.items()},
              str(plain / "model.safetensors"))
    losses = []
    for name in ("plain", "packed"):
        state = run_recorded("sft_llama3", tmp_path / f"out_{name}", monkeypatch,
                             f"model_name_or_path={tmp_path / name}", "max_steps=4",
                             *(OFT if adapter == "oft" else []))
        losses.append([row["loss"] for row in state["log_history"] if "loss" in row])
    printed = capsys.readouterr().out
    assert f"14 matrices in 4-bit {how.get('method', 'gptq')}, 4.75 bits a weight" in printed
    assert len(losses[0]) == 4 and max(abs(x - y) for x, y in zip(*losses)) < 1e-5

    common = [f"model_name_or_path={tmp_path / 'packed'}",
              f"adapter_name_or_path={tmp_path / 'out_packed'}", "template=llama3"]
    merge.main([*common, f"export_dir={tmp_path / 'merged'}"])
    assert "dequantized, the weights that were trained with" in capsys.readouterr().out
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == weights.keys()
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    merge.main([f"model_name_or_path={plain}", *common[1:],
                f"export_dir={tmp_path / 'plain_merged'}"])
    want = load_file(tmp_path / "plain_merged/model.safetensors")
    assert all(torch.allclose(merged[name], w, atol=1e-6) for name, w in want.items())

    for name in ("plain", "packed"):
        evaluation.main([f"model_name_or_path={tmp_path / name}", *common[1:], "stage=sft",
                         "do_eval=true", "eval_dataset=train", "cutoff_len=512", "max_samples=8",
                         f"dataset_dir={CURVES}/sft_eval/data", "use_cpu=true",
                         f"output_dir={tmp_path / 'evaluated' / name}"])
    a, b = (json.loads((tmp_path / "evaluated" / name / "all_results.json").read_text())
            for name in ("plain", "packed"))
    assert abs(a["eval_loss"] - b["eval_loss"]) < 1e-5

    capsys.readouterr()
    chat.main([*common, "prompt=hi", "max_new_tokens=3", "use_cpu=true"])
    assert "the adapter is kept apart" in capsys.readouterr().err
    chat.main([*common, "prompt=hi", "max_new_tokens=3", "use_cpu=true", "fast_chat=true"])

