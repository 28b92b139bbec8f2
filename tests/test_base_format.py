"""merge.py with export_format: base: an adapter merged into a base in 4 or 8 bits, as that."""
import json

import pytest
import torch
from safetensors import safe_open

import merge
from checkpoint.load import load_model, packed_weights, quantized_weights
from checkpoint.read_config import read_config_json
from checkpoint.requantize import requantize
from methods.quant import QuantFormat
from tests.common import message_of
from tests.test_write_gptq import RECORDED
from tests.tiny_models import (adapter_with, base_with, logits_of, same_bytes, tensors_in,
                               write_grouped, write_quantized)

SIZES = dict(hidden_size=64, intermediate_size=96, head_dim=16, initializer_range=0.2)
GROUPED = {
    "gptq": ("gptq", 4, 32, {}), "gptq_v2": ("gptq", 4, 32, {"checkpoint_format": "gptq_v2"}),
    "gptq in act-order": ("gptq", 4, 32, {"act": True}), "gptq 3 bits": ("gptq", 3, 32, {}),
    "gptq 8 bits": ("gptq", 8, -1, {}), "awq": ("awq", 4, 32, {}),
}
BNB = {"nf4": QuantFormat("nf4"), "fp4, plain scales": QuantFormat("fp4", 32, 0),
       "int8": QuantFormat("int8", nested=0)}


def quantized_base(kind, folder):
    """A random base in this format."""
    base = base_with(folder / "dense", torch.float16, torch_dtype="float16", **SIZES)
    if kind in BNB:
        return write_quantized(base, folder / "base", BNB[kind])
    method, bits, size, settings = GROUPED[kind]
    settings = dict(settings)
    write_grouped(base, folder / "base", method, bits, size, settings.pop("act", False), **settings)
    return folder / "base"


def matrices(folder):
    return {name: weight.dequantize(torch.float32)
            for name, weight in quantized_weights(load_model(folder)).items()}


@pytest.mark.parametrize("kind", [*GROUPED, *BNB])
def test_an_adapter_is_merged_into_the_bases_own_format(kind, tmp_path):
    base = quantized_base(kind, tmp_path)
    adapter = adapter_with(tmp_path / "adapter", base_with(tmp_path / "names", **SIZES), alpha=0.2)
    arguments = [f"model_name_or_path={base}", f"adapter_name_or_path={adapter}"]
    merge.main([*arguments, f"export_dir={tmp_path / 'out'}", "export_format=base"])
    merge.main([*arguments, f"export_dir={tmp_path / 'plain'}", "infer_dtype=float32"])
    exact = load_model(tmp_path / "plain")
    before, after = tensors_in(base), tensors_in(tmp_path / "out")
    changed = [name.removesuffix("weight") for name in packed_weights(base)
               if "q_proj" in name or "down_proj" in name]
    assert before.keys() == after.keys() and len(changed) == 4
    for name, tensor in after.items():
        if not name.startswith(tuple(changed)):
            assert same_bytes(tensor, before[name]), name
        elif "quant_state" not in name:
            assert (tensor.shape, tensor.dtype) == (before[name].shape, before[name].dtype), name
    stored = packed_weights(base)
    for name, matrix in matrices(tmp_path / "out").items():
        if name.startswith(tuple(changed)):
            want = exact.get_parameter(name)
            coarse = {3: 0.25, 4: 0.13, 8: 0.02}[getattr(stored[name].quant_format, "width",
                                                         8 if kind == "int8" else 4)]
            error = (matrix - want).norm() / want.norm()
            assert 0 < error < coarse, (name, float(error))
    fields = [read_config_json(folder)["quantization_config"]
              for folder in (base, tmp_path / "out")]
    assert fields[0] == fields[1]


@pytest.mark.parametrize("kind", [*GROUPED, *BNB])
def test_a_matrix_that_did_not_change_keeps_its_values(kind, tmp_path):
    """Its own values lie on the stored grid, which is then the nearest."""
    base = quantized_base(kind, tmp_path)
    for name, stored in list(packed_weights(base).items())[:3]:
        matrix = stored.read("cpu").dequantize(torch.float32)
        parts = requantize(stored, matrix)
        for part, tensor in parts.items():
            file, key = stored.parts[part]
            with safe_open(str(file), framework="pt") as tensors:
                old = tensors.get_tensor(key)
            if kind not in BNB:
                assert torch.equal(tensor.to(old.dtype), old), (name, part)


def test_files_of_the_libraries_are_written_again(tmp_path):
    """Of AutoGPTQ, GPTQModel, AutoAWQ and llm-compressor, bit for bit, from their own values."""
    from checkpoint.grouped_files import find_grouped, grouped_settings

    with safe_open(str(RECORDED), framework="pt") as tensors:
        settings = json.loads(tensors.metadata()["settings"])
        keys = list(tensors.keys())
        compared = set()
        for name, fields in settings.items():
            (tmp_path / "config.json").write_text(json.dumps(
                {"dtype": "float16", "quantization_config": fields}))
            places = {key.replace(f"{name}.", "layer."): (RECORDED, key) for key in keys
                      if key.startswith(f"{name}.") and not key.endswith((".want", ".bias"))}
            stored = find_grouped(tmp_path, places, grouped_settings(tmp_path))["layer.weight"]
            weight = stored.read("cpu")
            if int(weight.zeros.min()) < (1 if stored.settings.zeros_minus_one else 0):
                continue                                # a zero that a sum of the format overflows
            for part, tensor in requantize(stored, weight.dequantize(torch.float32)).items():
                old = tensors.get_tensor(stored.parts[part][1])
                same = (tensor.to(old.dtype) == old).float().mean()
                assert same > 0.999 if part != "codes" else same > 0.99, (name, part)
            compared.add(stored.settings.method)
    assert compared == {"gptq", "awq", "compressed-tensors"}


def test_the_merged_base_answers_as_base_and_adapter(tmp_path):
    base = quantized_base("gptq 8 bits", tmp_path)
    adapter = adapter_with(tmp_path / "adapter", base_with(tmp_path / "names", **SIZES), alpha=0.2)
    arguments = [f"model_name_or_path={base}", f"adapter_name_or_path={adapter}"]
    merge.main([*arguments, f"export_dir={tmp_path / 'out'}", "export_format=base"])
    merge.main([*arguments, f"export_dir={tmp_path / 'plain'}", "infer_dtype=float32"])
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    found, want = (logits_of(load_model(tmp_path / name, torch.float32), ids)
                   for name in ("out", "plain"))
    assert (found - want).norm() < 0.02 * want.norm()


def test_a_base_that_is_not_quantized_is_refused(tmp_path):
    base = base_with(tmp_path / "base")
    assert "is not quantized; leave export_format out" in message_of(merge.main, [
        f"model_name_or_path={base}", f"export_dir={tmp_path / 'out'}", "export_format=base"])
