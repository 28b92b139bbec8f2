"""checkpoint/block_files.py, exporting/block_export.py: MXFP4 and FP8 blocks, read and merged into.

The numbers are held against loops and against transformers' own unpacking.
"""
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
import train
from checkpoint.float_blocks import (E2M1, dequantize_fp8_blocks, dequantize_mxfp4, nearest_e2m1,
                                     quantize_fp8_blocks, quantize_mxfp4)
from checkpoint.load import (empty_model, fill_model, load_model, packed_weights,
                             quantized_weights)
from checkpoint.read_config import model_config
from lora import LoRAConfig, attach_lora
from checkpoint.adapters import load_with_adapters, save_adapter
from methods.quant import QuantFormat
from model import CausalLM, init_weights
from tests.common import GOLDEN, ROOT, needs_shared
from tests.tiny_models import IDS, logits_of, perturb, same_bytes, tensors_in

QWEN = dict(model_type="qwen3", hidden_size=160, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=40, vocab_size=50,
            max_position_embeddings=64, torch_dtype="bfloat16")
GPT = dict(model_type="gpt_oss", hidden_size=64, intermediate_size=32, num_hidden_layers=2,
           num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=50,
           num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
           torch_dtype="bfloat16")
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
              "activation_scheme": "dynamic"}


def in_blocks(folder, fields, settings):
    """A random checkpoint whose projections, or experts, are stored in blocks."""
    model = CausalLM(model_config(fields)).to(torch.bfloat16)
    init_weights(model, torch.Generator().manual_seed(0))
    tensors = {}
    for name, p in model.named_parameters():
        weight, stored = 5 * p.data.float(), model.config.stored_name(name)
        if settings["quant_method"] == "mxfp4" and weight.dim() == 3:
            codes, scales = zip(*map(quantize_mxfp4, weight))
            tensors |= {f"{stored}_blocks": torch.stack(codes),
                        f"{stored}_scales": torch.stack(scales)}
        elif settings["quant_method"] == "fp8" and name.endswith("proj.weight"):
            block = settings["weight_block_size"] or weight.shape
            codes, scales = quantize_fp8_blocks(weight, block, torch.float32,
                                                settings.get("scale_fmt") == "ue8m0")
            scales = scales if settings["weight_block_size"] else scales.reshape(())
            tensors |= {stored: codes, f"{stored}_scale_inv": scales}
        else:
            tensors[stored] = p.data.clone()
    folder.mkdir()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": settings}))
    return folder


BASES = {
    "mxfp4": (GPT, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    "fp8": (QWEN, FP8_CONFIG),
    "fp8 powers of two": (QWEN, {**FP8_CONFIG, "scale_fmt": "ue8m0"}),
    "fp8 one scale": (QWEN, {**FP8_CONFIG, "weight_block_size": None,
                             "activation_scheme": "static"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    return {name: in_blocks(folder / name, *BASES[name]) for name in BASES}


def adapter_for(base, folder, targets):
    """A random adapter of ours."""
    model = load_model(base, torch.float32)
    config = LoRAConfig(r=4, lora_alpha=8, target_modules=targets)
    attach_lora(model, config, stored_name=model.config.stored_name)
    folder.mkdir()
    save_adapter(perturb(model, size=0.1), folder, config, str(base))
    return folder


def merged_into(base, folder, out, targets, *more):
    """The merged folder of a random adapter, which lies in `folder`."""
    merge.main([f"model_name_or_path={base}", f"export_dir={out}",
                f"adapter_name_or_path={adapter_for(base, folder, targets)}", *more])
    return out


# ---- the numbers --------------------------------------------------------------------------------


def test_mxfp4_by_loops():
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (5, 3, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(120, 132, (5, 3), generator=draw, dtype=torch.uint8)
    found = dequantize_mxfp4(codes, scales, torch.float32)
    for row, group, byte in ((0, 0, 0), (4, 2, 15), (2, 1, 7), (3, 0, 9)):
        for half, code in enumerate((int(codes[row, group, byte]) & 15,
                                     int(codes[row, group, byte]) >> 4)):
            value = math.copysign(E2M1[code & 7], -1 if code > 7 else 1)
            want = value * 2.0 ** (int(scales[row, group]) - 127)
            assert found[32 * group + 2 * byte + half, row] == want
    again = dequantize_mxfp4(*quantize_mxfp4(found), torch.float32)
    assert torch.equal(again, found)                        # what was rounded stays as it is
    assert torch.equal(dequantize_mxfp4(codes, scales, torch.bfloat16).float(), found)


def test_e2m1_is_rounded_to_the_nearest_and_ties_to_even():
    x = torch.arange(-80, 81) / 10
    for number, code in zip(x.tolist(), nearest_e2m1(x).tolist()):
        value = E2M1[code & 7]
        assert abs(value - abs(number)) <= min(abs(other - abs(number)) for other in E2M1) + 1e-6
        assert code <= 7 or number < 0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nearest_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]


def test_mxfp4_takes_the_scale_with_the_smaller_error():
    """7.9 and zeros: half of 8 is nearer than 6. 6.1 and 0.5: clipping to 6 keeps 0.5."""
    rows = torch.zeros(32, 2)
    rows[0] = torch.tensor([7.9, 6.1])
    rows[1, 1] = 0.5
    found = dequantize_mxfp4(*quantize_mxfp4(rows), torch.float32)
    assert found[:2].T.tolist() == [[8.0, 0.0], [6.0, 0.5]]


@pytest.mark.parametrize("shape", ((300, 140), (128, 256), (5, 7)))
@pytest.mark.parametrize("powers_of_two", (False, True))
def test_fp8_blocks_by_loops(shape, powers_of_two):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize_fp8_blocks(W, (128, 128), torch.float32, powers_of_two)
    found = dequantize_fp8_blocks(codes, scales, (128, 128), torch.float32)
    for i in range(0, shape[0], 37):
        for j in range(0, shape[1], 29):
            assert found[i, j] == codes[i, j].float() * scales[i // 128, j // 128]
    block = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:shape[0], :shape[1]]
    assert ((found - W).abs() <= W.abs() / 16 + block / 1000).all()     # 3 bits of fraction
    if powers_of_two:
        assert torch.equal(torch.log2(scales), torch.log2(scales).round())
    else:
        again = dequantize_fp8_blocks(*quantize_fp8_blocks(found, (128, 128), torch.float32),
                                      (128, 128), torch.float32)
        assert torch.equal(again, found)


def test_a_block_of_zeros():
    codes, scales = quantize_fp8_blocks(torch.zeros(4, 4), (2, 2), torch.bfloat16)
    assert torch.equal(dequantize_fp8_blocks(codes, scales, (2, 2), torch.float32),
                       torch.zeros(4, 4))
    assert not dequantize_mxfp4(*quantize_mxfp4(torch.zeros(64, 3)), torch.float32).any()


# ---- reading ------------------------------------------------------------------------------------


def unpacked_by_transformers(folder):
    """{name: weight} of all matrices in blocks, by transformers' own functions."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    tensors = tensors_in(folder)
    found = {}
    for name in tensors:
        if name.endswith("_blocks"):
            stack = name.removesuffix("_blocks")
            found[stack] = mxfp4.convert_moe_packed_tensors(
                tensors[name], tensors[f"{stack}_scales"], dtype=torch.float32)
        elif name.endswith("_scale_inv"):
            if not hasattr(fp8, "_dequantize_fp8_weight"):
                pytest.skip("this transformers has no function that dequantizes FP8 blocks")
            weight = name.removesuffix("_scale_inv")
            settings = json.loads((folder / "config.json").read_text())["quantization_config"]
            found[weight] = fp8._dequantize_fp8_weight(
                tensors[weight], tensors[name], settings["weight_block_size"], torch.float32)
    return found


@pytest.mark.parametrize("name", BASES)
def test_weights_are_those_of_transformers(name, bases):
    model = load_model(bases[name], torch.float32)
    assert not quantized_weights(model)
    ours = {model.config.stored_name(n): p for n, p in model.named_parameters()}
    want = unpacked_by_transformers(bases[name])
    assert len(want) == (4 if name == "mxfp4" else 14)
    for weight in want:
        assert torch.equal(ours[weight], want[weight]), weight
    assert {p.dtype for p in load_model(bases[name]).parameters()} == {torch.bfloat16}


def test_four_bits_on_top(bases):
    model = load_model(bases["fp8"], quant_format=QuantFormat("nf4"))
    dense = load_model(bases["fp8"])
    weights = quantized_weights(model)
    assert len(weights) == 14
    for name, weight in weights.items():
        want = QuantFormat("nf4").quantize(dense.get_parameter(name))
        assert torch.equal(weight.codes, want.codes), name


def test_training_and_merging_with_four_bits_on_top(bases, tmp_path):
    """The merge starts from the rounded matrices that were trained beside."""
    base = tmp_path / "base"
    shutil.copytree(bases["fp8"], base)
    with_vocabulary(base)
    out = tmp_path / "out"
    settings = [f"model_name_or_path={base}", f"output_dir={out}", "template=chatml"]
    train.main([*settings, f"dataset={ROOT / 'data/tiny_review.jsonl'}", "max_samples=4",
                "use_cpu=true", "max_steps=1", "lora_rank=2", "report_to=none", "cutoff_len=40",
                "lora_target=q_proj", "disable_tqdm=true", "flash_attn=disabled",
                "quantization_bit=4"])
    merge.main([*settings, f"export_dir={tmp_path / 'merged'}"])
    found = load_model(tmp_path / "merged", torch.float32)
    dense = load_model(base)
    for name, p in found.named_parameters():
        if name.endswith("o_proj.weight"):                  # without an adapter
            rounded = QuantFormat("nf4").quantize(dense.get_parameter(name)).dequantize()
            assert (p - rounded).norm() < 0.05 * p.norm() < (p - dense.get_parameter(name)).norm()


def with_vocabulary(folder):
    """Give a checkpoint the 1600 tokens of models/tiny, and its tokenizer."""
    fields = json.loads((folder / "config.json").read_text()) | {"vocab_size": 1600}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = tensors_in(folder)
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[table] = tensors[table].repeat(32, 1).clone()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    for file in (ROOT / "models/tiny").glob("*token*"):
        shutil.copy(file, folder)


@needs_shared
@pytest.mark.parametrize("changed, words", [
    ({"down_proj_scales": None}, "down_proj_blocks needs model.layers.0.mlp.experts.down_proj_sca"),
    ({"down_proj_scales": (3, 64, 2)}, "MXFP4 is uint8, .experts, out, in / 32, 16. and"),
    ({"down_proj_blocks": (3, 64, 2, 16), "down_proj_scales": (3, 64, 2)},
     r"has shape \[3, 64, 64\], config.json makes it \[3, 96, 64\]"),
])
def test_parts_that_do_not_fit(changed, words, tmp_path):
    shutil.copytree(GOLDEN / "models2026/gpt_oss_mxfp4", tmp_path, dirs_exist_ok=True,
                    copy_function=shutil.copyfile)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for part, shape in changed.items():
        name = f"model.layers.0.mlp.experts.{part}"
        tensors.pop(name)
        if shape:
            tensors[name] = torch.zeros(shape, dtype=torch.uint8)
    file.unlink()
    save_file(tensors, str(file))
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path)


def test_other_blocks_than_config_json_says(bases, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(bases["fp8"], folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"]["weight_block_size"] = [64, 64]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"weight_block_size: \[64, 64\] in config.json requires"):
        load_model(folder)


# ---- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, targets", [
    ("mxfp4", ["q_proj"]), ("mxfp4", ["q_proj", "experts.down_proj"]),
    ("fp8", ["q_proj", "up_proj"]),
    ("fp8 powers of two", ["q_proj", "down_proj"]), ("fp8 one scale", ["o_proj"])])
def test_an_adapter_is_merged_into_the_format_of_its_base(name, targets, bases, tmp_path, capsys):
    base = bases[name]
    out = merged_into(base, tmp_path / "adapter", tmp_path / "out", targets)
    printed = capsys.readouterr().out
    before, after = tensors_in(base), tensors_in(out)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()}
    touched = tuple(part.rpartition(".")[2] for part in targets)
    for n in before:
        changes = any(f".{part}" in n for part in touched)
        assert changes or same_bytes(before[n], after[n]), n
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert configs[0] == configs[1]
    assert packed_weights(out).keys() == packed_weights(base).keys()

    # our reading and transformers' are the same; and near to base + adapter
    found = load_model(out, torch.float32)
    ours = {found.config.stored_name(n): p for n, p in found.named_parameters()}
    for weight, theirs in unpacked_by_transformers(out).items():
        assert torch.equal(ours[weight], theirs), weight
    exact = load_with_adapters(base, [tmp_path / "adapter"], torch.float32, fold_last=True)
    for n, p in found.named_parameters():
        # 1 bit of fraction; 3 bits; 7 bits, where the base has 16
        bound = 0.2 if name == "mxfp4" and p.dim() == 3 else 0.05 if "fp8" in name else 0.005
        assert (p - exact.get_parameter(n)).norm() <= bound * exact.get_parameter(n).norm(), n
    assert (" merged ones are rounded, rel" in printed) == (name != "mxfp4" or len(targets) == 2)
    assert "copied, bit for bit" in printed


def test_sixteen_bits_on_request(bases, tmp_path):
    out = merged_into(bases["mxfp4"], tmp_path / "adapter", tmp_path / "out", ["experts"],
                      "infer_dtype=bfloat16")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert {t.dtype for t in tensors_in(out).values()} == {torch.bfloat16}
    want = load_with_adapters(bases["mxfp4"], [tmp_path / "adapter"], torch.float32)
    error = (logits_of(load_model(out, torch.float32), IDS) - logits_of(want, IDS)).abs().max()
    assert error < 0.05 * logits_of(want, IDS).abs().max()


@pytest.mark.parametrize("name", ("mxfp4", "fp8"))
def test_a_model_that_is_filled_part_by_part(name, bases):
    """As scale/ does, which reads each process's part of a weight."""
    model = empty_model(bases[name], torch.bfloat16).to_empty(device="cpu")
    fill_model(model, bases[name])
    for n, p in load_model(bases[name]).named_parameters():
        assert torch.equal(model.get_parameter(n), p), n


def test_training_equals_that_of_the_copy_in_16_bits(bases, tmp_path):
    """Also when it was stopped after the first step."""
    blocks, plain = tmp_path / "blocks", tmp_path / "plain"
    shutil.copytree(bases["mxfp4"], blocks)
    merge.main([f"model_name_or_path={blocks}", f"export_dir={plain}", "infer_dtype=bfloat16"])
    for folder in (blocks, plain):
        with_vocabulary(folder)
    adapters = []
    for base, steps in ((blocks, 1), (blocks, 2), (plain, 2)):
        out = tmp_path / ("out" if base == blocks else "of plain")
        resume = ["resume_from_checkpoint=true"] if base == blocks and steps == 2 else []
        train.main([*resume, f"model_name_or_path={base}", f"output_dir={out}", "template=chatml",
                    f"dataset={ROOT / 'data/tiny_review.jsonl'}", "max_samples=4", "use_cpu=true",
                    f"max_steps={steps}", "save_steps=1", "lora_rank=2", "report_to=none",
                    "lora_target=q_proj,down_proj", "cutoff_len=40", "disable_tqdm=true",
                    "lr_scheduler_type=constant", "flash_attn=disabled",
                    "pin_kernels={matmul: torch}"])
        adapters.append(load_file(out / "adapter_model.safetensors"))
    assert all(same_bytes(adapters[1][n], adapters[2][n]) for n in adapters[2])
    assert any(not torch.equal(adapters[0][n], adapters[1][n]) for n in adapters[1])


def test_transformers_loads_the_merged_folder(bases, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    out = merged_into(bases["mxfp4"], tmp_path / "adapter", tmp_path / "out", ["all", "experts"])
    config = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=config, attn_implementation="eager")
    with torch.no_grad():
        want = theirs(IDS).logits
    assert (logits_of(load_model(out, torch.float32), IDS) - want).abs().max() < 1e-4
