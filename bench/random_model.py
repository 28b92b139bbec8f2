"""Checkpoints with random weights in the shapes of the benchmarks, so that nothing is downloaded.

    python bench/random_model.py bench/.work/model --shape cpu --adapter 8

With --adapter, a LoRA adapter of that rank on all linear layers is written to DIR-adapter, so that
two programs start from the same numbers. Its B is zero.

Requires: common.py beside this file.
Next: cpu.py and gpu_speed.py.
Sources: the published config.json of the models that the shapes are named after.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench.common import SHARED
from checkpoint.adapters import save_adapter
from checkpoint.files import DTYPES, write_tensors
from checkpoint.read_config import model_config
from lora import LoRAConfig, attach_lora
from model import CausalLM, init_weights

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
         "rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
         "bos_token_id": 128000, "eos_token_id": 128009}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "bos_token_id": 151643,
        "eos_token_id": 151645}
QWEN3_MOE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
             "vocab_size": 151936, "head_dim": 128, "rope_theta": 1000000.0,
             "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "attention_bias": False,
             "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768,
             "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
             "router_aux_loss_coef": 0.001, "output_router_logits": False,
             "bos_token_id": 151643, "eos_token_id": 151645}
EVERY = {"hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0,
         "tie_word_embeddings": False}
# family, hidden_size, intermediate_size, layers, heads, key/value heads, changes of the family
SHAPES = {
    "tiny": (LLAMA, 64, 176, 2, 4, 2, {}),
    "small": (LLAMA, 256, 704, 4, 8, 4, {"vocab_size": 2048, "max_position_embeddings": 131072}),
    "cpu": (LLAMA, 512, 1408, 8, 8, 4, {}),
    "llama-3-8b": (LLAMA, 4096, 14336, 32, 32, 8, {}),
    "qwen2.5-7b": (QWEN, 3584, 18944, 28, 28, 4, {"vocab_size": 152064}),
    "qwen2.5-0.5b": (QWEN, 896, 4864, 24, 14, 2,
                     {"vocab_size": 151936, "tie_word_embeddings": True}),
    "qwen3-30b-a3b": (QWEN3_MOE, 2048, 6144, 48, 32, 4, {}),
    "tiny-moe": (QWEN3_MOE, 64, 128, 2, 4, 2, {"head_dim": 16, "moe_intermediate_size": 32,
                                               "num_experts": 8, "num_experts_per_tok": 2}),
    "small-moe": (QWEN3_MOE, 160, 448, 4, 6, 2, {      # as models/tiny, with experts
        "head_dim": 32, "moe_intermediate_size": 224, "num_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 1600, "bos_token_id": None, "eos_token_id": 2}),
}


def raw_config(shape: str, dtype: str = "float32", **changes) -> dict:
    """The config.json of a shape of SHAPES; changes: keys of it, such as num_hidden_layers=1."""
    family, hidden, ffn, layers, heads, kv_heads, own = SHAPES[shape]
    return {**EVERY, **family, "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "torch_dtype": dtype, **own, **changes}


def random_model(raw: dict, dtype=torch.float32, device="cpu", seed: int = 1) -> CausalLM:
    """A decoder with normal(0, initializer_range) weights, drawn on the device; norms and biases do
    nothing yet."""
    with torch.device("meta"):
        model = CausalLM(model_config(raw)).to(dtype)
    model = model.to_empty(device=device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight      # to_empty has made two of it
    init_weights(model, torch.Generator(device).manual_seed(seed))
    return model


def make_checkpoint(folder, raw: dict, tokenizer_folder, seed: int = 1, device="cpu") -> CausalLM:
    """Write a checkpoint: config.json, safetensors and the tokenizer's files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(raw, DTYPES[raw["torch_dtype"]], device, seed)
    weights = dict(model.named_parameters())
    write_tensors(folder, {name: (tuple(p.shape), p.dtype) for name, p in weights.items()},
                  lambda name: [weights[name].data])
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for file in Path(tokenizer_folder).iterdir():
        of_a_model = file.name in ("config.json", "generation_config.json")
        if not of_a_model and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    return model


def make_adapter(folder, model: CausalLM, rank: int, base, seed: int = 1):
    """Write an adapter on all linear layers, alpha twice the rank, in PEFT's format."""
    settings = LoRAConfig(rank, 2 * rank, target_modules="all")
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_adapter(attach_lora(model, settings, seed), folder, settings, str(base))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers/llama3",
                        help="a folder with its files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--adapter", type=int, metavar="RANK", help="also write DIR-adapter")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    changes = {"num_hidden_layers": asked.layers} if asked.layers else {}
    model = make_checkpoint(asked.folder, raw_config(asked.shape, asked.dtype, **changes),
                            asked.tokenizer, asked.seed, asked.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{asked.folder}: {count:,} parameters in {asked.dtype}")
    if asked.adapter:
        make_adapter(f"{asked.folder}-adapter", model, asked.adapter, asked.folder, asked.seed)


if __name__ == "__main__":
    main()
