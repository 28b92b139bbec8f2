"""checkpoint/write_gptq.py against files that AutoGPTQ and GPTQModel packed, bit for bit."""
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint.grouped_files import find_grouped, grouped_settings, unpack_words
from checkpoint.write_gptq import gptq_parts, pack_gptq, pack_words, quantization_fields
from tests.common import ROOT
from tests.tiny_models import words

RECORDED = ROOT / "tests/recorded/packed_weights.safetensors"
with safe_open(str(RECORDED), framework="pt") as _file:
    SETTINGS = {name: settings for name, settings in
                json.loads(_file.metadata()["settings"]).items()
                if settings["quant_method"] == "gptq" and settings["checkpoint_format"] == "gptq"
                and not name.endswith("_zero")}     # zeros of 0, which symmetric grids lack


@pytest.mark.parametrize("name", SETTINGS)
def test_the_libraries_files_are_written_again(name):
    stored = {key.removeprefix(f"{name}."): tensor for key, tensor in load_file(RECORDED).items()
              if key.startswith(f"{name}.") and not key.endswith(".want")}
    size_in, size_out = len(stored["g_idx"]), stored["scales"].shape[1]
    bits = SETTINGS[name]["bits"]
    size = -(-size_in // len(stored["scales"]))
    columns = stored["g_idx"]
    codes = unpack_words(stored["qweight"].T, bits, size_in)
    zeros = unpack_words(stored["qzeros"], bits, size_out) + 1
    packed = pack_gptq(codes, zeros.T, stored["scales"].T, bits, columns)
    assert packed.keys() == stored.keys() - {"bias"}
    for part, tensor in packed.items():
        assert torch.equal(tensor, stored[part].to(tensor.dtype)), part
    planned = gptq_parts((size_out, size_in), bits, size)
    for part, tensor in packed.items():
        assert planned[part] == (tuple(tensor.shape), tensor.dtype), part


def test_there_are_such_files():
    assert {2, 3, 4, 8} == {settings["bits"] for settings in SETTINGS.values()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 96, 40])
def test_words_are_one_number_in_pieces(bits, count):
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (5, count), dtype=torch.uint8, generator=draw)
    packed = pack_words(codes, bits)
    assert torch.equal(packed, words(codes, bits))          # by Python's integers
    if count % 32 == 0:                                     # as in files
        assert torch.equal(unpack_words(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_our_reader_gets_the_values(bits, tmp_path):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (64, 160), dtype=torch.uint8, generator=draw)
    scales = (torch.rand(64, 2, generator=draw) / 50 + 0.01).half()
    zero = 2 ** (bits - 1)
    zeros = torch.full((64, 2), zero, dtype=torch.uint8)
    tensors = pack_gptq(codes, zeros, scales, bits, torch.arange(160) // 128)
    file = tmp_path / "model.safetensors"
    save_file({f"layer.{part}": tensor for part, tensor in tensors.items()}, str(file))
    fields = quantization_fields(bits, 128, 0.1, ["a"], ["mlp.gate"])
    assert fields["dynamic"] == {r"-:.*\.mlp\.gate$": {}}
    (tmp_path / "config.json").write_text(json.dumps(
        {"dtype": "float16", "quantization_config": fields}))
    places = {f"layer.{part}": (file, f"layer.{part}") for part in tensors}
    found = find_grouped(tmp_path, places, grouped_settings(tmp_path))["layer.weight"]
    want = scales.float().repeat_interleave(128, 1)[:, :160] * (codes.float() - zero)
    assert torch.equal(found.read("cpu").dequantize(), want.half())
