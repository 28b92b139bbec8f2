"""checkpoint/names.py: names that transformers accepts, too, for every family."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.adapters import PREFIX, load_adapter
from checkpoint.files import write_json
from checkpoint.load import load_model, save_model
from checkpoint.names import find_tensors
from checkpoint.read_config import model_config, read_model_config
from families import FAMILIES
from merge import merge_checkpoint
from methods.quant import QuantFormat
from model import CausalLM, init_weights
from tests.common import GOLDEN, needs_shared
from tests.test_families import READABLE
from tests.tiny_models import (IDS, adapter_with, base_with, logits_of, same_bytes, tensors_in,
                               write_quantized)

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")
TIED = ["qwen2_tied", "llama3_tied", "gemma2"]


def rewritten(source, folder, rename):
    """A copy of a checkpoint in one file, whose tensors have other names; None leaves one out."""
    folder.mkdir(exist_ok=True)
    named = {rename(name): tensor for name, tensor in tensors_in(source).items()}
    named.pop(None, None)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def by_transformers(folder, ids=IDS):
    """transformers' logits of a checkpoint."""
    transformers = pytest.importorskip("transformers", minversion="5.0")   # 4 reads fewer names
    auto = transformers.AutoModelForCausalLM
    return logits_of_theirs(auto.from_pretrained(folder, dtype=torch.float32), ids)


def logits_of_theirs(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def small_tied(kind, folder):
    """A random tied checkpoint of a family, under its own names. Returns (folder, config)."""
    raw = json.loads(json.dumps(READABLE[kind]))
    raw.get("text_config", raw)["tie_word_embeddings"] = True
    config = model_config(raw)
    model = CausalLM(config)
    init_weights(model, torch.Generator().manual_seed(0))
    folder.mkdir()
    named = {config.stored_name(name): p.detach() for name, p in model.named_parameters()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", raw)
    return folder, config


# ---- one matrix under the head's name ----


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_tied_matrix_under_the_heads_name_alone(kind, tmp_path):
    plain, config = small_tied(kind, tmp_path / "plain")
    embedding = config.stored_name("model.embed_tokens.weight")
    head = config.stored_name("lm_head.weight")
    odd = rewritten(plain, tmp_path / "odd", lambda name: head if name == embedding else name)
    assert embedding not in load_file(odd / "model.safetensors")
    ours = load_model(odd)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(logits_of(ours, IDS), logits_of(load_model(plain), IDS))

    merge_checkpoint(odd, [], tmp_path / "merged")
    merged, before = tensors_in(tmp_path / "merged"), tensors_in(plain)
    assert merged.keys() == before.keys()
    assert all(same_bytes(merged[name], before[name]) for name in before)


@needs_shared
@pytest.mark.parametrize("name", TIED)
def test_a_tied_matrix_under_the_heads_name_in_transformers(name, tmp_path):
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    odd = rewritten(GOLDEN / "models" / name, tmp_path,
                    lambda old: head if old == embedding else None if old == head else old)
    ours = logits_of(load_model(odd, torch.float32), IDS)
    assert (ours - by_transformers(odd)).abs().max() < 1e-4


def test_a_tied_head_whose_embedding_is_in_no_listed_file(tmp_path):
    base = base_with(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    matrix = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": matrix}, base / "model-00001-of-00002.safetensors",
              metadata={"format": "pt"})
    save_file({"model.embed_tokens.weight": matrix}, base / "model-00002-of-00002.safetensors",
              metadata={"format": "pt"})
    listed = dict.fromkeys([*tensors, "lm_head.weight"], "model-00001-of-00002.safetensors")
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": listed})
    ours = load_model(base)
    assert torch.equal(ours.model.embed_tokens.weight, matrix)
    assert (logits_of(ours, IDS) - by_transformers(base)).abs().max() < 1e-4


def test_a_tensor_that_the_index_leaves_out_is_read_from_its_file(tmp_path):
    base = base_with(tmp_path / "base", shard_bytes=20_000)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    write_json(base / "model.safetensors.index.json", index)
    assert (logits_of(load_model(base), IDS) - by_transformers(base)).abs().max() < 1e-4
    merge_checkpoint(base, [], tmp_path / "merged")
    assert "model.norm.weight" in tensors_in(tmp_path / "merged")


# ---- with and without prefixes ----

PREFIXES = {
    "without": lambda name: name.removeprefix("model."),
    "twice": lambda name: f"model.{name}",
}


@needs_shared
@pytest.mark.parametrize("how", PREFIXES)
@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma2", "phi3", "olmo2"])
def test_prefixes_that_transformers_adds_or_takes_off(name, how, tmp_path):
    source = GOLDEN / "models" / name
    odd = rewritten(source, tmp_path, PREFIXES[how])
    ours = logits_of(load_model(odd, torch.float32), IDS)
    assert torch.equal(ours, logits_of(load_model(source, torch.float32), IDS))
    assert (ours - by_transformers(odd)).abs().max() < 1e-4


@needs_shared
def test_llama_4s_text_part_with_the_prefix_of_the_whole(tmp_path):
    source = GOLDEN / "models" / "llama4"
    odd = rewritten(source, tmp_path, lambda name: f"language_model.{name}")
    assert torch.equal(logits_of(load_model(odd), IDS), logits_of(load_model(source), IDS))
    nested = GOLDEN / "models" / "llama4_nested"
    odd = rewritten(nested, tmp_path / "nested", lambda name: f"model.{name}")
    ours = load_model(odd)
    assert torch.equal(logits_of(ours, IDS), logits_of(load_model(nested), IDS))
    (tmp_path / "saved").mkdir()
    save_model(ours, tmp_path / "saved", odd)       # the part that reads images under its own name
    assert tensors_in(tmp_path / "saved").keys() == tensors_in(nested).keys()


@pytest.mark.parametrize("kind", [kind for kind, row in FAMILIES.items() if not row.text_field])
def test_a_base_model_of_any_family_that_was_saved_without_its_head(kind, tmp_path):
    plain, config = small_tied(kind, tmp_path / "plain")
    prefix = config.stored_name("model.embed_tokens").partition(".")[0] + "."
    odd = rewritten(plain, tmp_path / "odd", lambda name: name.removeprefix(prefix))
    assert not any(name.startswith(prefix) for name in load_file(odd / "model.safetensors"))
    assert torch.equal(logits_of(load_model(odd), IDS), logits_of(load_model(plain), IDS))
    assert find_tensors(odd, config).keys() == tensors_in(plain).keys()


def test_transformers_saves_base_models_without_the_prefix(tmp_path):
    """The file of AutoModel.save_pretrained of a tied model is a whole model."""
    transformers = pytest.importorskip("transformers")
    base = base_with(tmp_path / "base", tie_word_embeddings=True)
    headless = transformers.AutoModel.from_pretrained(base)
    headless.save_pretrained(tmp_path / "headless")
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "headless" / "model.safetensors")
    ours = logits_of(load_model(tmp_path / "headless"), IDS)
    assert (ours - by_transformers(base)).abs().max() < 1e-4


@pytest.mark.parametrize("how", PREFIXES)
def test_adapters_of_a_base_with_odd_names_keep_the_names_that_peft_sees(how, tmp_path):
    base = base_with(tmp_path / "base")
    odd = rewritten(base, tmp_path / "odd", PREFIXES[how])
    adapter = adapter_with(tmp_path / "adapter", base)
    assert PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        adapter / "adapter_model.safetensors")
    ours, plain = load_model(odd), load_model(base)
    for model in (ours, plain):
        load_adapter(model, adapter)
    assert torch.equal(logits_of(ours, IDS), logits_of(plain, IDS))
    for source, target in ((base, "from_plain"), (odd, "from_odd")):
        merge_checkpoint(source, [adapter], tmp_path / target)
    want, got = tensors_in(tmp_path / "from_plain"), tensors_in(tmp_path / "from_odd")
    assert want.keys() == got.keys() and all(same_bytes(want[name], got[name]) for name in want)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_without_the_prefix(kind, tmp_path):
    base = base_with(tmp_path / "base", torch.bfloat16)
    packed = write_quantized(base, tmp_path / "packed", QuantFormat(kind, dtype=torch.bfloat16))
    odd = rewritten(packed, tmp_path / "odd", PREFIXES["without"])
    assert torch.equal(logits_of(load_model(odd), IDS), logits_of(load_model(packed), IDS))
    merge_checkpoint(odd, [], tmp_path / "merged")
    assert tensors_in(tmp_path / "merged").keys() == tensors_in(base).keys()


def test_two_tensors_of_one_name_are_refused(tmp_path):
    base = base_with(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight.* are both model.norm.weight"):
        find_tensors(base, read_model_config(base))
