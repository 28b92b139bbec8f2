"""merge.py with export_quantization_bit: the file, its losses, families, and what is refused."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import chat
import merge
from bench.gptq import with_rounded_matrices
from checkpoint.load import load_model, packed_weights, quantized_weights
from checkpoint.read_config import read_model_config
from evals.compare import mean_loss, some_rows
from exporting.gptq_export import GPTQExport, open_gptq
from merge import merge_checkpoint
from methods import gptq as mathematics
from methods.gptq import inverse_factor, round_to_nearest
from settings.load_config import load_config
from tests.common import ROOT, RUN_SLOW, losses_in, needs_shared, refusal
from tests.tiny_models import (CHECKPOINTS, adapter_with, base_with, checkpoint_of, logits_of,
                               tensors_in)
from text.load_text import load_text

TINY_BASE = ROOT / "models/tiny"
SIZES = dict(hidden_size=64, intermediate_size=96, head_dim=16)
LENGTH = 48


def texts(path, name="tiny_review", count=400):
    """Conversations of the tiny world as rows of plain text, three in a row."""
    rows = [json.loads(line)["messages"] for line in
            (ROOT / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]]
    said = ["".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row)
            for row in rows]
    together = ["".join(said[i:i + 3]) for i in range(0, len(said), 3)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in together))
    return path


def arguments(folder, out="out", **changes):
    """The command line of a small export."""
    settings = {
        "model_name_or_path": TINY_BASE, "export_dir": folder / out, "export_quantization_bit": 4,
        "export_quantization_dataset": folder / "texts.jsonl", "export_quantization_nsamples": 24,
        "export_quantization_maxlen": LENGTH, **changes}
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


def answers(folder):
    """Conversations of the tiny world with labels on the answers."""
    config = load_config(arguments(folder, dataset="tiny_review", dataset_dir=ROOT / "data",
                                   template="chatml"), "merge")
    text = load_text(config, TINY_BASE, [], read_model_config(TINY_BASE))
    return some_rows(config, text.tokenizer, text.template)[0]


def nearest_model(bits):
    """models/tiny with the same matrices rounded to the nearest."""
    return with_rounded_matrices(load_model(TINY_BASE), bits)


def divergence(model, original, rows):
    """Mean KL(original || model) of the next token, in nats."""
    total = tokens = 0
    for row in rows:
        ids = torch.tensor(row.input_ids.tolist())[None]
        q, p = (logits_of(m, ids)[0].log_softmax(-1) for m in (model, original))
        total += float((p.exp() * (p - q)).sum())
        tokens += ids.shape[1]
    return total / tokens


@pytest.mark.parametrize("bits", [2, 3, 4, 8] if RUN_SLOW else [4])
def test_the_model_is_nearer_to_the_original_than_with_rounding_to_the_nearest(
        bits, tmp_path, capsys):
    texts(tmp_path / "texts.jsonl")
    merge.main(arguments(tmp_path, export_quantization_bit=bits))
    printed = capsys.readouterr().out
    assert f"28 matrices in {bits} bits, groups of 128; error of their outputs" in printed
    assert "the weights are quantized" in printed and "note:" not in printed
    rows = answers(tmp_path)
    original, nearest = load_model(TINY_BASE), nearest_model(bits)
    ours = load_model(tmp_path / "out", torch.float32)
    assert divergence(ours, original, rows) < 0.6 * divergence(nearest, original, rows)
    if bits == 2:           # with more bits the loss is that of the original, up to noise
        losses = [mean_loss(model, rows, "cpu") for model in (original, ours, nearest)]
        assert losses[0] < losses[1] < 0.5 * losses[2]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_gptq_is_nearer_than_rounding_on_models_of_three_families(kind, tmp_path):
    """In the loss that is expected on the model's own text: the divergence from the original.

    With and without act-order.
    """
    wide = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}
    base = base_with(tmp_path / "base", model_type=kind, **wide)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, read_model_config(base).vocab_size, (40, 32), generator=draw)
    original = load_model(base, torch.float32)
    models = {"nearest": with_rounded_matrices(load_model(base, torch.float32), 3)}
    for desc_act in (False, True):
        out = tmp_path / f"out_{desc_act}"
        export = GPTQExport(base, rows[:24], 3, "cpu", desc_act)
        merge_checkpoint(base, [], out, dtype=torch.float16, export=export)
        models[desc_act] = load_model(out, torch.float32)
        fields = json.loads((out / "config.json").read_text())["quantization_config"]
        assert fields["desc_act"] == desc_act
    unseen = [SimpleNamespace(input_ids=row) for row in rows[24:]]
    found = {name: divergence(model, original, unseen) for name, model in models.items()}
    assert found[False] < found["nearest"] and found[True] < found["nearest"], found


def test_the_file_holds_what_was_quantized_and_nothing_else_is_changed(tmp_path, monkeypatch):
    texts(tmp_path / "texts.jsonl")
    found = {}
    plain = mathematics.gptq

    def noted(*arguments):
        rounded = plain(*arguments)
        found[len(found)] = rounded.dequantize()
        return rounded

    monkeypatch.setattr(mathematics, "gptq", noted)
    merge.main(arguments(tmp_path))
    model, base = load_model(tmp_path / "out"), load_model(TINY_BASE)
    stored = quantized_weights(model)
    assert len(stored) == len(found) == 28
    # order of quantizing: q, k, v, o, gate, up, down of block after block, as in the model
    for weight, want in zip(stored.values(), found.values()):
        assert torch.equal(weight.dequantize(torch.float32), want)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name).half())
    fields = json.loads((tmp_path / "out/config.json").read_text())
    assert fields["torch_dtype"] == "float16" and fields["tie_word_embeddings"]
    assert fields["quantization_config"] == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.1,
        "desc_act": False, "sym": True, "true_sequential": True, "checkpoint_format": "gptq",
        "lm_head": False, "pack_dtype": "int32"}


def test_transformers_reads_the_settings(tmp_path):
    quantization = pytest.importorskip("transformers.utils.quantization_config")
    texts(tmp_path / "texts.jsonl")
    merge.main(arguments(tmp_path))
    fields = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    read = quantization.GPTQConfig.from_dict(dict(fields))
    assert (read.bits, read.group_size, read.desc_act, read.sym) == (4, 128, False, True)
    assert read.to_dict()["quant_method"] == "gptq"


@pytest.mark.parametrize("desc_act", ["false", "true"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_gives_the_same_logits_through_gptqmodel(bits, desc_act, tmp_path):
    pytest.importorskip("gptqmodel", reason="gptqmodel reads these files (it needs torch 2.14)")
    transformers = pytest.importorskip("transformers")
    texts(tmp_path / "texts.jsonl")
    merge.main(arguments(tmp_path, export_quantization_bit=bits,
                         export_quantization_desc_act=desc_act))
    ids = torch.randint(0, 1600, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    reader = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        theirs = reader(ids).logits
    ours = logits_of(load_model(tmp_path / "out", torch.float32), ids)
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_the_seed_makes_the_bytes_and_shards_hold_the_same_tensors(tmp_path):
    texts(tmp_path / "texts.jsonl")
    for out, changes in (("a", {}), ("b", {}), ("c", {"seed": 7}), ("d", {"export_size": 0.0003})):
        merge.main(arguments(tmp_path, out, export_quantization_nsamples=4, **changes))
    a, b, c = ((tmp_path / f"{out}/model.safetensors").read_bytes() for out in "abc")
    assert a == b != c
    shards = sorted((tmp_path / "d").glob("*.safetensors"))
    joined = {}
    for shard in shards:
        joined |= load_file(shard)
    want = load_file(tmp_path / "a/model.safetensors")
    assert len(shards) > 2 and joined.keys() == want.keys()
    assert all(torch.equal(joined[name], want[name]) for name in want)


def test_an_export_is_replaced_on_demand_only(tmp_path):
    texts(tmp_path / "texts.jsonl")
    small = dict(export_quantization_nsamples=2)
    merge.main(arguments(tmp_path, **small))
    with pytest.raises(ValueError, match="is not empty"):
        merge.main(arguments(tmp_path, **small))
    merge.main(arguments(tmp_path, export_quantization_bit=8, overwrite="true", **small))
    assert packed_weights(tmp_path / "out").popitem()[1].quant_format.width == 8
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_chat_and_the_losses_of_a_dataset(tmp_path, capsys):
    texts(tmp_path / "texts.jsonl")
    merge.main(arguments(tmp_path, dataset="tiny_review", dataset_dir=ROOT / "data",
                         template="chatml", placeholders="{name: Pip, author: Us}"))
    table, _ = losses_in(capsys.readouterr().out)
    assert table.keys() == {"base", "exported"} and 0.95 < table["exported"][1] <= 1
    chat.main([f"model_name_or_path={tmp_path / 'out'}", "template=chatml", "do_sample=false",
               "prompt=What color is the sky?", "max_new_tokens=8", "use_cpu=true",
               "infer_dtype=float32"])
    assert "blue" in capsys.readouterr().out


# ---- families -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
@needs_shared
def test_every_family_is_quantized_or_refused(name, tmp_path):
    """Fused projections, experts, tied heads, other names of layers; by our own reader."""
    base = checkpoint_of(name, tmp_path / "base")
    config = read_model_config(base)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(3, config.vocab_size, (4, 16), generator=draw)
    if config.stacked_experts:
        with pytest.raises(ValueError, match="stores its experts as stacks of matrices"):
            GPTQExport(base, rows, 4, "cpu")
        return
    quantizer = GPTQExport(base, rows, 8, "cpu")
    merge_checkpoint(base, [], tmp_path / "out", dtype=torch.float16, export=quantizer)
    model = load_model(tmp_path / "out", torch.float32)
    assert len(quantized_weights(model)) == len(quantizer.layers) > 1
    want = logits_of(load_model(base, torch.float32), rows)
    assert (logits_of(model, rows) - want).norm() < 0.05 * want.norm()
    skipped = quantizer.settings().get("modules_in_block_to_quantize")
    assert bool(skipped) == bool(quantizer.skipped)


def test_experts_without_a_token_are_rounded_to_the_nearest(tmp_path):
    base = base_with(tmp_path / "base", model_type="qwen3_moe", num_experts=8,
                     num_experts_per_tok=1, moe_intermediate_size=32, norm_topk_prob=True,
                     decoder_sparse_step=1, mlp_only_layers=[], **SIZES)
    quantizer = GPTQExport(base, torch.tensor([[3, 3]]), 4, "cpu")
    merge_checkpoint(base, [], tmp_path / "out", dtype=torch.float16, export=quantizer)
    assert quantizer.unseen >= 2 * 6 * 3 and "no calibration token has reached" in \
        quantizer.report()
    assert all("mlp.gate." in name for name in quantizer.skipped)
    written, plain = load_model(tmp_path / "out"), load_model(base)
    same = sum(torch.equal(
        weight.dequantize(torch.float32),
        round_to_nearest(plain.get_parameter(name), 4, 128).dequantize())
        for name, weight in quantized_weights(written).items())
    assert same >= quantizer.unseen
    fields = quantizer.settings()
    assert "mlp.experts.7.down_proj" in fields["modules_in_block_to_quantize"][0]
    assert fields["dynamic"] == {r"-:.*\.mlp\.gate$": {}}


# ---- mistakes -----------------------------------------------------------------------------------


def test_what_is_refused(tmp_path):
    texts(tmp_path / "texts.jsonl")
    adapter = adapter_with(tmp_path / "adapter", TINY_BASE)
    with pytest.raises(ValueError, match="is an adapter: merge it first"):
        merge.main(arguments(tmp_path, adapter_name_or_path=adapter or tmp_path / "adapter"))
    merge.main(arguments(tmp_path, export_quantization_nsamples=2))
    with pytest.raises(ValueError, match="is quantized already"):
        merge.main(arguments(tmp_path, "again", model_name_or_path=tmp_path / "out"))
    small = base_with(tmp_path / "small", hidden_size=24, head_dim=6, intermediate_size=40)
    with pytest.raises(ValueError, match="sizes that are multiples of 32"):
        GPTQExport(Path(small), torch.tensor([[1, 2]]), 4, "cpu")


def test_mistakes_end_before_the_work(tmp_path, monkeypatch):
    """A misspelled dataset of the table of losses, and a folder in use."""
    texts(tmp_path / "texts.jsonl")
    with pytest.raises(ValueError, match="no dataset 'tiny_rewiev' .did you mean 'tiny_review'"):
        merge.main(arguments(tmp_path, dataset="tiny_rewiev", dataset_dir=ROOT / "data",
                             template="chatml"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(merge, "open_export", None)         # which reads the rows of calibration
    with pytest.raises(ValueError, match="is not empty"):
        merge.main(arguments(tmp_path, export_dir=tmp_path))


def test_settings_that_are_refused(tmp_path):
    def stops(**changes):
        return refusal(*arguments(tmp_path, **changes), script="merge")

    assert "GPTQ files have 2, 3, 4 or 8 bits" in stops(export_quantization_bit=5)
    assert "needs export_quantization_dataset" in stops(export_quantization_dataset=None)
    assert "leave quantization_bit out" in stops(quantization_bit=4)
    assert "export_quantization_nsamples" in stops(export_quantization_nsamples=0)


def test_keys_of_the_calibration_without_bits_are_listed(tmp_path, capsys):
    merge.main(arguments(tmp_path, export_quantization_bit=None))
    assert ("no effect here: export_quantization_dataset, export_quantization_nsamples, "
            "export_quantization_maxlen\n") in capsys.readouterr().out


def test_rows_beyond_the_context_are_said(tmp_path, capsys):
    texts(tmp_path / "texts.jsonl")
    base = shutil.copytree(TINY_BASE, tmp_path / "base")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": LENGTH - 1}))
    config = load_config(arguments(tmp_path, model_name_or_path=base), "merge")
    open_gptq(config, base, [], "cpu")
    assert "note: the model was made for 47 tokens" in capsys.readouterr().out


def test_a_damaged_file_is_noticed(tmp_path, monkeypatch):
    texts(tmp_path / "texts.jsonl")
    monkeypatch.setattr("exporting.gptq_export.pack_gptq", shifted)
    with pytest.raises(OSError, match="is not read as it was quantized"):
        merge.main(arguments(tmp_path, export_quantization_nsamples=2))
    assert not (tmp_path / "out").exists()


def shifted(*matrices):
    """pack_gptq with one wrong scale."""
    from checkpoint.write_gptq import pack_gptq

    parts = pack_gptq(*matrices)
    parts["scales"][0, 0] *= 2
    return parts


def test_inputs_that_are_not_finite_end_in_a_sentence():
    with pytest.raises(ValueError, match="NaN or infinity"):
        inverse_factor(torch.full((4, 4), float("inf")))


@pytest.mark.parametrize("number, words", [
    (float("nan"), "holds NaN or infinity: the base is damaged"),
    (float("-inf"), "holds NaN or infinity: the base is damaged"),
    (1e6, "values up to 1e.06 are beyond float16"),
])
def test_damaged_and_huge_weights_of_the_last_matrix(number, words, tmp_path):
    """No later layer has an input that would show them."""
    name = "model.layers.1.mlp.down_proj.weight"
    matrix = torch.ones(64, 96)
    matrix[5, 7] = number
    base = base_with(tmp_path / "base", extra={name: matrix}, **SIZES)
    quantizer = GPTQExport(base, torch.tensor([[3, 4, 5]]), 4, "cpu")
    with pytest.raises(ValueError, match=f"{name}:? {words}"):
        merge_checkpoint(base, [], tmp_path / "out", dtype=torch.float16, export=quantizer)
    assert not (tmp_path / "out").exists()


def test_infinite_inputs_name_the_layer(tmp_path):
    name = "model.layers.1.post_attention_layernorm.weight"
    base = base_with(tmp_path / "base", extra={name: torch.full((64,), 1e30)}, **SIZES)
    quantizer = GPTQExport(base, torch.tensor([[3, 4, 5]]), 4, "cpu")
    with pytest.raises(ValueError, match="layers.1.mlp.gate_proj.weight: the inputs of a layer"):
        merge_checkpoint(base, [], tmp_path / "out", dtype=torch.bfloat16, export=quantizer)


def test_a_model_whose_layers_are_zero_has_no_errors_to_report(tmp_path):
    zeros = {name: torch.zeros_like(weight) for name, weight in tensors_in(
        base_with(tmp_path / "base", **SIZES)).items() if "_proj" in name}
    base = base_with(tmp_path / "base", extra=zeros, **SIZES)
    quantizer = GPTQExport(base, torch.tensor([[3, 4, 5]]), 4, "cpu")
    merge_checkpoint(base, [], tmp_path / "out", dtype=torch.float16, export=quantizer)
    assert "14 matrices in 4 bits, groups of 128; 4 matrices" in quantizer.report()
