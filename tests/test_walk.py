"""train.py, chat.py and merge.py on every family: two steps, an answer, the merged folder."""
import json
import shutil
import sys
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

import chat
import merge
import train
from checkpoint.adapters import load_with_adapters
from checkpoint.files import tensor_files, write_tensors
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from families import FAMILIES
from fast.decode import pick_decode_matmul
from model import CausalLM, init_weights
from tests.common import GOLDEN, SHARED, needs_shared, some
from tests.test_families_2026 import FOLDERS, NAMES
from tests.test_latent_2026 import SIZES as LATENT_SIZES
from tests.test_latent_2026 import VARIANTS as LATENT

TOKENIZER = GOLDEN / "curves/tiny_llama3"
PUBLISHED = {folder.name: json.loads((folder / "config.json").read_text())
             for folder in sorted((GOLDEN / "models").glob("*"))}
PUBLISHED |= {name: json.loads((FOLDERS / name / "config.json").read_text()) for name in NAMES}
LLAMA = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=320, max_position_embeddings=256)
PUBLISHED |= {
    "mixtral": {"model_type": "mixtral", **LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"model_type": "gemma", **LLAMA, "head_dim": 16},
    "internlm2": {"model_type": "internlm2", **LLAMA, "bias": False},
    "qwen": {"model_type": "qwen", **LLAMA, "kv_channels": 16, "seq_length": 64,
             "layer_norm_epsilon": 1e-6},
}
PUBLISHED["qwen"].pop("num_key_value_heads", None)
PUBLISHED["internlm3"] = {"model_type": "internlm3", **LLAMA, "qkv_bias": True, "bias": True}
if "qwen3_5" in PUBLISHED:
    PUBLISHED["qwen3_5_moe"] = {**PUBLISHED["qwen3_5"], "model_type": "qwen3_5_moe",
                                "text_config": PUBLISHED["qwen3_5_moe_text"]}
for kind in ("glm4_moe_lite", "mistral4"):
    name, fields = LATENT[kind]
    PUBLISHED[kind] = {"model_type": name, **LATENT_SIZES, **fields}
PUBLISHED["lfm2_moe"] = {"model_type": "lfm2_moe", **LLAMA, "num_experts": 4,
                         "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                         "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}
if "deepseek_v3" in PUBLISHED:
    PUBLISHED["kimi_k2"] = {**PUBLISHED["deepseek_v3"], "model_type": "kimi_k2"}
if "qwen3_5_moe" in PUBLISHED:      # fewer layers: a matrix for each expert is slow to load
    fields = json.loads(json.dumps(PUBLISHED["qwen3_5_moe"]))
    fields["text_config"] |= {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
                              "layer_types": ["linear_attention", "full_attention"]}
    PUBLISHED["qwen3_5_moe of 2 layers"] = fields
FURTHER = {"13B": "baichuan2_13b", "experts one by one": "qwen3_5_moe of 2 layers"}
ONE_EACH = {fields["model_type"]: name for name, fields in PUBLISHED.items()
            if name not in FURTHER.values()} | FURTHER if SHARED.is_dir() else {}
# one of each kind of attention tries all kernels, the others compute plain attention: no window and
# a window, softcaps, chunks, sinks, ALiBi, latent and linear attention
TRY_KERNELS = {"qwen2", "mistral", "gemma2", "llama4_text", "gpt_oss", "13B", "deepseek_v3",
               "qwen3_next"}
# the choice depends on the machine, not on the model
picked_once = lru_cache(pick_decode_matmul)


def base_of(name, folder, **switches):
    """A random checkpoint with a family's published fields, a vocabulary of 1,010 ids, and a
    tokenizer. switches: instead of the family's."""
    fields = json.loads(json.dumps(PUBLISHED[name]))
    fields.pop("quantization_config", None)                 # see test_block_files.py
    text = fields.get("text_config", fields)
    text["padded_vocab_size" if "padded_vocab_size" in text else "vocab_size"] = 1010
    text |= {"pad_token_id": None, "eos_token_id": 1005, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = CausalLM(replace(model_config(fields), **switches))
    init_weights(model, torch.Generator().manual_seed(0))
    for n, p in model.named_parameters():   # so that inputs are not small beside the eps of norms
        p.data *= 5 if n.endswith(("conv1d.weight", "conv.weight")) else 1
    weights = {model.config.stored_name(n): p.data for n, p in model.named_parameters()}
    beside = [f"{prefix}class_embedding" for prefix in model.config.skips]
    weights |= {name: torch.randn(8) for name in beside}
    folder.mkdir()
    write_tensors(folder, {n: (tuple(w.shape), w.dtype) for n, w in weights.items()},
                  lambda n: [weights[n]])
    (folder / "config.json").write_text(json.dumps(fields))
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@needs_shared
def test_every_family_has_a_walk():
    assert set(ONE_EACH) - set(FURTHER) == set(FAMILIES)


@needs_shared
@pytest.mark.parametrize("kind", some(ONE_EACH))
def test_train_chat_merge(kind, tmp_path, monkeypatch, capsys):
    switches = {"stacked_experts": ""} if kind == "experts one by one" else {}
    base = base_of(ONE_EACH[kind], tmp_path / "base", **switches)
    out = tmp_path / "out"
    merged = tmp_path / "merged"
    rows = [{"instruction": f"Say {word}", "output": f"{word} it is"}
            for word in ("sky", "tree", "green", "nine")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fast.decode.pick_decode_matmul", picked_once)
    empty = load_model(base, skip_weights=True)
    shape = empty.config
    targets = "all,experts" if any(shape.sparse) else "all"
    settings = [f"model_name_or_path={base}", f"output_dir={out}", "template=llama3",
                "force_template=true", "use_cpu=true", "pin_kernels.matmul=torch",
                f"flash_attn={'auto' if kind in TRY_KERNELS else 'disabled'}"]
    train.main([*settings, "stage=sft", "do_train=true", "finetuning_type=lora",
                f"lora_target={targets}", "dataset=rows.json", "max_steps=2", "learning_rate=0.02",
                "per_device_train_batch_size=2", "report_to=none", "disable_tqdm=true",
                "warmup_ratio=0", "moe_aux_loss_coef=0.01"])
    merge.main([*settings, f"export_dir={merged}"])
    capsys.readouterr()

    # files: names, shapes and dtypes of the base; untrained tensors bit for bit
    before, after = ({n: t for f in set(tensor_files(d).values()) for n, t in load_file(f).items()}
                     for d in (base, merged))
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    adapted = {shape.stored_name(f"model.layers.{number}.{block.mixer_name}.o_proj.weight")
               for number, block in enumerate(empty.model.layers) if block.mixer is not None}
    assert adapted <= changed and shape.stored_name("model.embed_tokens.weight") not in changed
    assert not any(n.startswith(shape.skips) or "norm" in n for n in changed)
    frozen = ("conv1d.weight", "conv.weight", "A_log", "dt_bias")
    assert not any(n.endswith(frozen) for n in changed)
    if any(shape.sparse):
        assert any("expert" in n or "block_sparse_moe" in n for n in changed)

    # network: merged = base + adapter, and neither is the base
    ids = torch.randint(5, 1000, (1, 20), generator=torch.Generator().manual_seed(1))
    wide = torch.float64                # linear attention makes 1e-7 of float32 to 1e-3
    with torch.no_grad():
        models = (load_with_adapters(base, [out], wide), load_model(merged, wide),
                  load_model(base, wide))
        both, whole, bare = (m.logits(m(ids)) for m in models)
    assert (both - whole).abs().max() < 1e-4 < 1e-2 < (both - bare).abs().max()

    # text: the same answer from base + adapter and from the merged folder
    asked = [*settings[2:], "do_sample=true", "temperature=2", "top_p=1", "top_k=0",
             "max_new_tokens=6", "skip_special_tokens=false", "--prompt", "Say sky"]
    answers = []
    for argv in ([*settings[:2], *asked], [f"model_name_or_path={merged}", *asked]):
        monkeypatch.setattr(sys, "stdin", None)
        chat.main(argv)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) > 1
