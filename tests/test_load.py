"""checkpoint/load.py: strict loading, its memory, and models that are saved and loaded again."""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.files import tensor_files
from checkpoint.load import BUFFERS, load_model, save_model
from checkpoint.read_config import model_config
from model import CausalLM
from tests.common import GOLDEN, ROOT, needs_shared
from tests.tiny_models import TINY, same_bytes, tiny, write_tiny


# ---- loading -------------------------------------------------------------------------------------


def test_missing_and_unused_tensors_are_errors(tmp_path):
    model = tiny()
    assert torch.equal(load_model(write_tiny(tmp_path, model)).lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError,
                       match="missing: 1, such as lm_head.weight(.|\n)*tie_word_embeddings"):
        load_model(write_tiny(tmp_path, model, drop=["lm_head.weight"]))
    with pytest.raises(ValueError, match="not used: 1, such as model.extra.weight"):
        load_model(write_tiny(tmp_path, model, add=[("model.extra.weight", torch.ones(1))]))
    with pytest.raises(
        ValueError, match=r"down_proj.weight has shape \[32, 48\], config.json makes it \[32, 40\]"
    ):
        load_model(write_tiny(tmp_path, model, intermediate_size=40))
    load_model(write_tiny(tmp_path, model,
                          add=[("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))]))


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_model(tmp_path)
    folder = write_tiny(tmp_path, tiny())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError,
                       match="model.safetensors is damaged or incomplete.*fetch it again"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pytorch_model.bin is"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}'
    )
    with pytest.raises(FileNotFoundError, match="names 1 file.*model-1.safetensors"):
        load_model(folder)


def test_tied_head_stored_twice(tmp_path):
    model = tiny(tie_word_embeddings=True)
    same = {"lm_head.weight": model.model.embed_tokens.weight.clone()}
    loaded = load_model(write_tiny(tmp_path, model, add=same.items(), tie_word_embeddings=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_model(write_tiny(tmp_path, model, add=[("lm_head.weight", torch.zeros(50, 32))],
                              tie_word_embeddings=True))


def test_memory_of_loading_stays_below_the_checkpoint_plus_300_mb(tmp_path):
    """A checkpoint of 0.5 GB; the child reports its own peak."""
    big = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
               head_dim=128, vocab_size=4000)
    with torch.device("meta"):
        model = CausalLM(model_config({**TINY, **big}))
    save_file({n: torch.zeros(p.shape, dtype=torch.float32) for n, p in model.named_parameters()},
              str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **big}))
    code = (
        "import resource, sys; from checkpoint.load import load_model; import torch\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); m = load_model(sys.argv[1], torch.float32)\n"
        "sum(p.sum() for p in m.parameters())\n"
        "print(peak() - before)"
    )
    used = float(subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                                text=True, check=True, cwd=ROOT).stdout)
    size = os.path.getsize(tmp_path / "model.safetensors") / 2**20
    assert size > 400 and used < size + 300


# ---- whole models ----


@needs_shared
@pytest.mark.parametrize(
    "name", ["llama3_sharded", "qwen2_bf16", "qwen2_tied", "qwen3", "llama4", "llama4_nested"]
)
def test_load_then_save_gives_the_same_tensors(name, tmp_path):
    source = GOLDEN / "models" / name
    before = {tensor: load_file(file)[tensor] for tensor, file in tensor_files(source).items()}
    save_model(load_model(source), tmp_path, source)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(same_bytes(after[key], before[key]) for key in before)
    fields = [json.loads((path / "config.json").read_text()) for path in (source, tmp_path)]
    for each in fields:
        each["torch_dtype"] = each.pop("dtype", each.get("torch_dtype"))
    assert fields[0] == fields[1]


@needs_shared
def test_saved_model_in_another_dtype_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = GOLDEN / "models" / "qwen2_tied"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "source" / "generation_config.json").write_text(
        '{"temperature": 0.5, "do_sample": true}'
    )
    (tmp_path / "out").mkdir()
    save_model(load_model(source), tmp_path / "out", tmp_path / "source", torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert theirs.generation_config.temperature == 0.5
    ids, ours = torch.arange(20)[None], load_model(tmp_path / "out")
    with torch.no_grad():
        assert (theirs(ids).logits - ours.logits(ours(ids))).abs().max() < 0.3


def test_weights_keep_their_different_dtypes(tmp_path):
    """Part of a bfloat16 model trained in float32."""
    model = tiny().to(torch.bfloat16)
    model.lm_head.float()
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out", write_tiny(tmp_path / "base", tiny()))
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, t in read.items() if t.dtype == torch.float32} == {"lm_head.weight"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


# ---- buffers of older tools ----


def test_names_of_buffers_in_the_files():
    """The names in files of Llama, Baichuan, XVERSE, ChatGLM and Qwen 1, and weights with similar
    names."""
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq",
                 "model.layers.31.self_attn.rotary_emb.cos_cached",
                 "model.layers.0.self_attn.rotary_emb.sin_cached",
                 "transformer.rotary_pos_emb.inv_freq", "transformer.rotary_emb.inv_freq",
                 "transformer.h.0.attn.rotary_emb.inv_freq", "transformer.h.0.attn.masked_bias",
                 "model.rotary_emb.original_inv_freq"):
        assert BUFFERS.fullmatch(name), name
    for name in ("transformer.h.0.attn.bias", "model.layers.0.self_attn.bias",
                 "transformer.h.0.attn.c_attn.bias", "model.layers.0.self_attn.masked_bias",
                 "model.layers.0.self_attn.rotary_emb.weight", "inv_freq",
                 "model.layers.0.self_attn.rotary_emb.inv_freq.weight",
                 "model.my_rotary_emb.inv_freq"):
        assert not BUFFERS.fullmatch(name), name


def test_a_tensor_that_is_no_buffer_is_an_error(tmp_path):
    folder = write_tiny(tmp_path, tiny())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
              folder / "model.safetensors")
    load_model(folder)
    save_file({**tensors, "model.layers.0.self_attn.bias": torch.ones(4)},
              folder / "model.safetensors")
    with pytest.raises(ValueError, match="not used: 1, such as model.layers.0.self_attn.bias"):
        load_model(folder)
