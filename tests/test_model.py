"""model.py, families.py and the loading half of checkpoint.py against the references' own logits."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from attention import Layout
from checkpoint import load_model
from families import FAMILIES, model_config
from model import CausalLM, KVCache, draw, init_weights, rope_frequencies
from tests.common import GOLDEN, ROOT, needs_shared

OURS = [p.name for p in sorted((GOLDEN / "models").glob("*")) if json.loads((p / "config.json").read_text())["model_type"]
        in FAMILIES] if GOLDEN.is_dir() else []
TINY = dict(model_type="qwen3", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=50, max_position_embeddings=64)


def tiny(**changes):
    model = CausalLM(model_config({**TINY, **changes}))
    init_weights(model, torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@needs_shared
@pytest.mark.parametrize("kernel", ["plain", "sdpa-math"])
@pytest.mark.parametrize("name", OURS)
def test_logits_and_loss_equal_the_reference(name, kernel):
    folder = GOLDEN / "models" / name
    want = load_file(folder / "expected.safetensors")
    model = load_model(folder, torch.float32)
    if kernel != "plain" and model.config.attn_softcap:
        pytest.skip("SDPA has no softcap")
    model.kernel = kernel
    logits = model.logits(model(want["input_ids"]))
    real = want["attention_mask"].bool()                                  # right padding: causal rows never look at it
    assert (logits - want["logits"])[real].abs().max() < 1e-4
    labels = want["labels"][:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert abs(loss - want["loss"]) < 1e-5


@needs_shared
def test_bfloat16_checkpoint_in_bfloat16():
    folder = GOLDEN / "models" / "qwen2_bf16"
    want = load_file(folder / "expected.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight.dtype == torch.bfloat16                   # the checkpoint's own dtype
    logits = model.logits(model(want["input_ids"])).float()
    assert (logits - want["logits_bf16"])[want["attention_mask"].bool()].abs().max() < 0.3


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_options": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16,
                     "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.8},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_equals_transformers(kind):
    transformers = pytest.importorskip("transformers")
    fields = {**TINY, "model_type": "llama", "rope_theta": 5000.0, "rope_scaling": ROPES[kind]}
    ours = CausalLM(model_config(fields)).requires_grad_(False)
    init_weights(ours, torch.Generator().manual_seed(1))
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **{k: v for k, v in fields.items() if k != "model_type"}, rms_norm_eps=1e-6, attn_implementation="eager"))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    ids = torch.randint(0, 50, (1, 100), generator=torch.Generator().manual_seed(2))      # beyond the trained length
    with torch.no_grad():
        assert (ours.logits(ours(ids)) - theirs.eval()(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("fields", [
    dict(model_type="llama", attention_bias=True, mlp_bias=True), dict(model_type="mistral", sliding_window=5),
    dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    dict(model_type="qwen3", attention_bias=True, tie_word_embeddings=True),
    dict(model_type="qwen3", use_sliding_window=True, sliding_window=3,
         layer_types=["sliding_attention", "full_attention"]),
], ids=["biases", "window", "late window", "qwen3 bias tied", "layer types"])
def test_options_of_a_family_equal_transformers(fields):
    transformers = pytest.importorskip("transformers")
    fields = {**TINY, **fields}
    ours = CausalLM(model_config(fields)).requires_grad_(False)
    init_weights(ours, torch.Generator().manual_seed(1))
    for name, p in ours.named_parameters():
        if name.endswith("bias"):
            p.normal_(generator=torch.Generator().manual_seed(len(name)))
    config = transformers.AutoConfig.for_model(**fields, rms_norm_eps=1e-6)
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    ids = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (ours.logits(ours(ids)) - theirs.eval()(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("window", [None, 5])
def test_cached_equals_uncached(window):
    model = tiny(model_type="mistral", sliding_window=window)
    ids = torch.randint(0, 50, (1, 90), generator=torch.Generator().manual_seed(3))
    whole, cache = model(ids), KVCache(2)
    parts = [model(ids[:, a:b], cache=cache) for a, b in [(0, 7), (7, 8), (8, 70), (70, 71), (71, 90)]]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    cache.crop(40)
    assert torch.allclose(model(ids[:, 40:], cache=cache), whole[:, 40:], atol=1e-5)


def test_sequences_in_one_row_equal_sequences_alone():
    model = tiny()
    lengths = [1, 5, 2, 9]
    ids = torch.randint(0, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = model(ids, positions, Layout(lengths)).split(lengths, 1)
    for part, alone in zip(together, ids.split(lengths, 1)):
        assert torch.allclose(part, model(alone), atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    ids, gradients = torch.arange(12)[None], []
    for model.recompute in (False, True):
        model.zero_grad()
        model(ids).square().sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.equal(*gradients)


# ---- what a user may get wrong ----


@pytest.mark.parametrize("change, words", [
    ({"model_type": "qwen9"}, "qwen9.*supported are llama.*qwen"),
    ({"hidden_act": "gelu_9"}, "hidden_act 'gelu_9'"),
    ({"logit_scale": 0.5}, "logit_scale"),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, "longrope"),
    ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "twist": 1}}, "twist"),
    ({"vocab_size": None}, "vocab_size.*missing"),
    ({"num_key_value_heads": 3}, "multiple"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"model_type": ["llama"]}, r"\['llama'\]"),
    ({"hidden_size": "32"}, 'hidden_size: "32" is not a whole number'),
    ({"num_hidden_layers": 1.5}, "num_hidden_layers: 1.5 is not a whole number"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: 0 is not above 0"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps.*is not a number"),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings: "false" is not true or false'),
    ({"rope_scaling": "linear"}, 'rope_scaling: "linear" is not an object'),
    ({"quantization_config": "gptq"}, "quantization_config.*is not an object"),
])
def test_config_json_that_is_not_understood(change, words):
    with pytest.raises(ValueError, match=words):
        model_config({**TINY, **change})


def test_config_fields_that_are_off_or_remarks_pass():
    model_config({**TINY, "attention_dropout": 0.0, "sliding_window": 8, "use_sliding_window": False, "foo": None,
                  "_name_or_path": "x", "transformers_version": "4", "bos_token_id": 1})


def write(folder, model, drop=(), add=(), **changes):
    folder.mkdir(exist_ok=True)
    tensors = {n: p.clone() for n, p in model.named_parameters() if n not in drop}
    save_file({**tensors, **dict(add)}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}))
    return folder


def test_loading_is_strict_both_ways(tmp_path):
    model = tiny()
    assert torch.equal(load_model(write(tmp_path, model)).lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="missing: 1, such as lm_head.weight(.|\n)*tie_word_embeddings"):
        load_model(write(tmp_path, model, drop=["lm_head.weight"]))
    with pytest.raises(ValueError, match="not used: 1, such as model.extra.weight"):
        load_model(write(tmp_path, model, add=[("model.extra.weight", torch.ones(1))]))
    with pytest.raises(ValueError, match=r"down_proj.weight has shape \[32, 48\], config.json makes it \[32, 40\]"):
        load_model(write(tmp_path, model, intermediate_size=40))
    load_model(write(tmp_path, model, add=[("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))]))


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_model(tmp_path)
    folder = write(tmp_path, tiny())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete.*fetch it again"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="names 1 file.*model-1.safetensors"):
        load_model(folder)


def test_tied_head_stored_twice(tmp_path):
    model = tiny(tie_word_embeddings=True)
    same = {"lm_head.weight": model.model.embed_tokens.weight.clone()}
    loaded = load_model(write(tmp_path, model, add=same.items(), tie_word_embeddings=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_model(write(tmp_path, model, add=[("lm_head.weight", torch.zeros(50, 32))], tie_word_embeddings=True))


def test_memory_of_loading_stays_below_the_checkpoint_plus_300_mb(tmp_path):
    """A checkpoint of 0.5 GB in two dtypes of the model; the child reports its own peak."""
    big = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8, head_dim=128,
               vocab_size=4000)
    with torch.device("meta"):
        model = CausalLM(model_config({**TINY, **big}))
    save_file({n: torch.zeros(p.shape, dtype=torch.float32) for n, p in model.named_parameters()},
              str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **big}))
    code = ("import resource, sys; from checkpoint import load_model; import torch\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "before = peak(); m = load_model(sys.argv[1], torch.float32); sum(p.sum() for p in m.parameters())\n"
            "print(peak() - before)")
    used = float(subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
                                cwd=ROOT).stdout)
    size = os.path.getsize(tmp_path / "model.safetensors") / 2**20
    assert size > 400 and used < size + 300


@needs_shared
def test_counts_of_the_published_runs():
    """Parameter figures of Llama-3-8B, on the meta device."""
    log = json.loads((GOLDEN / "published" / "llama_factory_logs.json").read_text())
    with torch.device("meta"):
        model = CausalLM(model_config({**log["llama3_8b_config"], "model_type": "llama"}))
    assert sum(p.numel() for p in model.parameters()) == log["base"]["merged_params"]


def test_drawing():
    text = draw(model_config(TINY))
    assert "2 blocks" in text and "model.layers.0.self_attn.q_norm" in text and "head_dim 8" in text


def test_default_frequencies_follow_the_paper():
    speed, scale = rope_frequencies(model_config(TINY), 0)
    assert scale == 1.0 and torch.allclose(speed, torch.tensor([10000 ** (-2 * i / 8) for i in range(4)]))
