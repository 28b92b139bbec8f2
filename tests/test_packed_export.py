"""merge.py with export_format fp8, w4a16 and bnb-nf4, and merging back into such a base.

The files are read by our own loader, and, where the packages are installed, by transformers.
"""
import json
import warnings

import pytest
import torch

import merge
from checkpoint.load import load_model, packed_weights, quantized_weights
from tests.common import message_of
from tests.tiny_models import adapter_with, base_with, same_bytes, tensors_in

KINDS = ("fp8", "w4a16", "bnb-nf4")
PACKAGES = {"fp8": "compressed_tensors", "w4a16": "compressed_tensors", "bnb-nf4": "bitsandbytes"}
SIZES = dict(hidden_size=128, intermediate_size=256, torch_dtype="bfloat16", initializer_range=0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: folder} of exports of one base, and the base and an adapter for it."""
    folder = tmp_path_factory.mktemp("exports")
    base = base_with(folder / "base", torch.bfloat16, **SIZES)
    found = {"base": base, "adapter": adapter_with(folder / "adapter", base)}
    for kind in KINDS:
        found[kind] = export(base, folder / kind, kind)
    return found


def export(base, out, kind=None, *more):
    """The folder of an exported checkpoint."""
    arguments = [f"export_format={kind}"] if kind else []
    merge.main([f"model_name_or_path={base}", f"export_dir={out}", *arguments, *more])
    return out


def matrices(folder):
    """{name: matrix float32} of the quantized layers of a checkpoint."""
    return {name: weight.dequantize(torch.float32)
            for name, weight in quantized_weights(load_model(folder)).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_rounded_to_the_nearest(kind, made):
    base = load_model(made["base"])
    found = matrices(made[kind])
    assert len(found) == 14
    for name, matrix in found.items():
        exact = base.get_parameter(name).float()
        error = (matrix - exact).abs()
        if kind == "fp8":
            row = exact.abs().amax(1, keepdim=True)
            assert (error <= exact.abs() / 14 + row / 448 / 500).all()      # 3 bits of fraction
        elif kind == "w4a16":
            groups = exact.view(len(exact), -1, 128)
            step = groups.abs().amax(2, keepdim=True) / 7.5
            assert (error.view(groups.shape) <= step * 0.54).all()
        else:
            assert (error.norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_matrix_is_not_rounded(kind, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    for number in (float("nan"), float("inf")):
        matrix = torch.ones(128, 256, dtype=torch.bfloat16)
        matrix[3, 5] = number
        base = base_with(tmp_path / "base", torch.bfloat16, extra={name: matrix}, **SIZES)
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinity: the base is damaged"):
            export(base, tmp_path / "out", kind)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_matrices(kind, made):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip(PACKAGES[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                made[kind], dtype=torch.bfloat16)
        except ImportError as error:                    # of a package it needs besides
            pytest.skip(str(error).splitlines()[0])
        model(torch.tensor([[3, 4, 5]]))                # compressed-tensors unpacks them now
    for name, matrix in matrices(made[kind]).items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        if kind == "bnb-nf4":
            import bitsandbytes.functional

            weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(weight.float().view(matrix.shape), matrix.bfloat16().float()), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_back_into_the_format_of_its_base(kind, made, tmp_path):
    """Changed matrices are those of the dequantized merge, rounded; others are copied."""
    adapter = f"adapter_name_or_path={made['adapter']}"
    out = export(made[kind], tmp_path / "out", kind, adapter)
    merged = export(made[kind], tmp_path / "merged", None, adapter, "infer_dtype=float32")
    again = export(merged, tmp_path / "again", kind)
    want, found, before = matrices(again), matrices(out), tensors_in(made[kind])
    changed = [name for name in found if "q_proj" in name or "down_proj" in name]
    for name in changed:
        near = 0.02 * want[name].abs().max()            # scales in bfloat16, there in float32
        assert (found[name] - want[name]).abs().mean() < near
    for name, tensor in tensors_in(out).items():
        if not any(name.startswith(layer.removesuffix("weight")) for layer in changed):
            assert same_bytes(tensor, before[name]), name
    fields = [json.loads((folder / "config.json").read_text())["quantization_config"]
              for folder in (out, made[kind])]
    assert fields[0] == fields[1] and tensors_in(out).keys() == before.keys()


def test_an_adapter_is_trained_and_chats_on_an_fp8_base(made):
    """The frozen matrices are called as those of every other format."""
    from lora import LoRAConfig, attach_lora

    model = load_model(made["fp8"], torch.bfloat16)
    dense = load_model(made["base"], torch.float32)
    for name, matrix in matrices(made["fp8"]).items():
        dense.get_parameter(name).data = matrix
    ids = torch.tensor([[3, 4, 5, 6]])
    exact = dense.logits(dense(ids))
    assert (model.logits(model(ids)).float() - exact).abs().max() < 0.1 * exact.abs().max()
    attach_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    model.logits(model(ids)).float().sum().backward()
    assert model.model.layers[0].self_attn.q_proj.lora_B.weight.grad.abs().sum() > 0


def test_layers_that_do_not_fit_stay_and_are_named(tmp_path, capsys):
    base = base_with(tmp_path / "base", torch.bfloat16, **{**SIZES, "intermediate_size": 96})
    out = export(base, tmp_path / "out", "w4a16")
    assert "12 matrices" in capsys.readouterr().out.replace("14 mat", "")
    fields = json.loads((out / "config.json").read_text())["quantization_config"]
    assert fields["ignore"] == ["lm_head", r"re:model\.layers\.\d+\.mlp\.down_proj$"]
    assert len(packed_weights(out)) == 12
    small = base_with(tmp_path / "small")
    assert "take bnb-nf4 or fp8" in message_of(export, small, tmp_path / "none", "w4a16")
    assert not (tmp_path / "none").exists()


def test_another_format_than_the_bases_is_refused(made, tmp_path):
    message = message_of(export, made["fp8"], tmp_path / "out", "w4a16")
    assert "stored in another format (14 matrices in fp8 compressed-tensors" in message
    assert "take export_format: fp8" in message and not (tmp_path / "out").exists()
    message = message_of(merge.main, [
        f"model_name_or_path={made['base']}", f"export_dir={tmp_path / 'out'}",
        "export_format=fp8", "export_quantization_bit=4", "export_quantization_dataset=x"])
    assert "leave one of them out" in message


def test_experts_are_rounded_and_routers_named(tmp_path):
    experts = dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, head_dim=32,
                   moe_intermediate_size=128, decoder_sparse_step=1)
    base = base_with(tmp_path / "base", torch.bfloat16, **SIZES, **experts)
    out = export(base, tmp_path / "out", "fp8")
    fields = json.loads((out / "config.json").read_text())["quantization_config"]
    assert fields["ignore"] == ["lm_head", r"re:model\.layers\.\d+\.mlp\.gate$"]
    assert len(packed_weights(out)) == 2 * (4 + 4 * 3)


def test_a_damaged_scale_is_named(made, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "damaged"
    out.mkdir()
    for file in made["fp8"].iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file({**tensors, name: tensors[name][:5]}, out / "model.safetensors")
    assert "model.layers.0.mlp.up_proj has codes [256, 128]" in message_of(load_model, out)
    save_file({**tensors, "x.weight_scale": tensors[name].clone()}, out / "model.safetensors")
    assert "belongs to x.weight, which is in no file" in message_of(load_model, out)
