"""families.py: every family that transformers has, in many settings, against transformers' classes.

Each row of CASES becomes a tiny checkpoint, written by transformers, with random weights, norms and
biases. The decoder must give its logits in every spelling of config.json.

Requires: families.py.
Next: test_twins.py, for the families that transformers lacks.
"""
import json
import random
import re
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch

from attention import PackedLayout
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from families import FAMILIES
from model import CausalLM, KVCache
from rope import rope_frequencies
from tests.common import GOLDEN, needs_shared, usual

CLOSE = 1e-4            # tolerance of float32 logits, here up to about 10
TOKENS = 40             # longer than the windows, chunks and some trained lengths below
SMALL = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=61, max_position_embeddings=64, rms_norm_eps=1e-5)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20)
SHARED_EXPERT = dict(EXPERTS, shared_expert_intermediate_size=28)
LLAMA4 = dict(num_key_value_heads=2, head_dim=12, intermediate_size_mlp=52, num_local_experts=4,
              attention_chunk_size=8, floor_scale=4, attn_scale=0.4, num_hidden_layers=4)
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_OPTIONS = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256,
                "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.8}
SLIDE, FULL, CHUNK = "sliding_attention", "full_attention", "chunked_attention"


def longrope(pairs, **more):
    """Factors of longrope for `count` pairs of features."""
    return {"type": "longrope", "short_factor": [1 + i / 10 for i in range(pairs)],
            "long_factor": [2 + i / 3 for i in range(pairs)], **more}


# name: (model_type, what differs from SMALL)
CASES = {
    "llama": ("llama", {}),
    "llama biases, one key head, wide heads": ("llama", dict(
        attention_bias=True, mlp_bias=True, num_key_value_heads=1, head_dim=20, hidden_act="gelu"
    )),
    "llama a head each, tied, linear": ("llama", dict(
        num_key_value_heads=4, tie_word_embeddings=True,
        rope_scaling={"type": "linear", "factor": 4.0},
    )),
    "llama one head, dynamic": ("llama", dict(
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=16,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    )),
    "llama 3": (
        "llama",
        dict(rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, num_attention_heads=6, hidden_size=48),
    ),
    "llama 3, no blend": (
        "llama", dict(rope_scaling=dict(LLAMA3_ROPE, high_freq_factor=1.0), rope_theta=100.0)
    ),
    "llama yarn": ("llama", dict(rope_scaling=YARN, rope_theta=5000.0)),
    "llama yarn with all options": ("llama", dict(rope_scaling=YARN_OPTIONS, head_dim=32)),
    "llama yarn by hand": ("llama", dict(
        head_dim=32,
        rope_scaling=dict(YARN, original_max_position_embeddings=256, attention_factor=0.7,
                          truncate=False),
    )),
    "llama yarn of a short length": ("llama", dict(
        rope_scaling=dict(YARN, original_max_position_embeddings=8, beta_slow=2, truncate=False)
    )),
    "llama longrope": (
        "llama", dict(rope_scaling=longrope(4, original_max_position_embeddings=16, factor=4.0))
    ),
    "mistral": ("mistral", dict(sliding_window=5)),
    "mistral no window": ("mistral", dict(sliding_window=None, head_dim=20, num_key_value_heads=4)),
    "mistral sees itself only": (
        "mistral", dict(sliding_window=1, tie_word_embeddings=True, hidden_act="relu")
    ),
    "mistral window beyond the text": ("mistral",
                                       dict(sliding_window=100, rope_scaling=YARN, head_dim=8)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8)),
    "mixtral one expert each, window, tied": ("mixtral", dict(
        num_local_experts=5, num_experts_per_tok=1, head_dim=12, sliding_window=6,
        tie_word_embeddings=True,
    )),
    "qwen2 window off": ("qwen2",
                         dict(use_sliding_window=False, sliding_window=5, max_window_layers=0)),
    "qwen2 window in late layers, tied": ("qwen2", dict(
        use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True
    )),
    "qwen2 window by layer_types": ("qwen2", dict(
        use_sliding_window=True, sliding_window=4, layer_types=[SLIDE, FULL, SLIDE],
        num_key_value_heads=1,
    )),
    "qwen2 yarn": ("qwen2", dict(rope_scaling=YARN, rope_theta=1000000.0, num_key_value_heads=4)),
    "qwen3": ("qwen3", dict(head_dim=12, rms_norm_eps=1e-3)),
    "qwen3 biases, tied, window": ("qwen3", dict(
        head_dim=20, attention_bias=True, tie_word_embeddings=True, use_sliding_window=True,
        sliding_window=3, max_window_layers=2,
    )),
    "qwen3 dynamic, layer_types": ("qwen3", dict(
        head_dim=8, rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=16,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=7,
        layer_types=[FULL, FULL, SLIDE],
    )),
    "qwen2_moe": ("qwen2_moe", dict(SHARED_EXPERT, norm_topk_prob=False)),
    "qwen2_moe normed, every second layer": ("qwen2_moe", dict(
        SHARED_EXPERT, norm_topk_prob=True, decoder_sparse_step=2, num_experts_per_tok=4,
        qkv_bias=False,
    )),
    "qwen2_moe all experts, first layer dense": ("qwen2_moe", dict(
        SHARED_EXPERT, num_experts_per_tok=5, mlp_only_layers=[0], tie_word_embeddings=True,
        hidden_act="gelu",
    )),
    "qwen2_moe no layer has experts": ("qwen2_moe", dict(SHARED_EXPERT, mlp_only_layers=[0, 1, 2])),
    "qwen2_moe window": (
        "qwen2_moe",
        dict(SHARED_EXPERT, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    ),
    "qwen3_moe": ("qwen3_moe", dict(EXPERTS, norm_topk_prob=True, head_dim=12, mlp_only_layers=[])),
    "qwen3_moe one expert each": ("qwen3_moe", dict(
        EXPERTS, norm_topk_prob=False, num_experts_per_tok=1, head_dim=8, attention_bias=True,
        rope_scaling=YARN,
    )),
    "qwen3_moe one expert, normed": ("qwen3_moe", dict(
        EXPERTS, norm_topk_prob=True, num_experts=1, num_experts_per_tok=1, head_dim=8,
        tie_word_embeddings=True,
    )),
    "qwen3_moe window, dense layers": ("qwen3_moe", dict(
        EXPERTS, norm_topk_prob=True, head_dim=12, decoder_sparse_step=2, mlp_only_layers=[0],
        num_hidden_layers=4, use_sliding_window=True, sliding_window=6, num_key_value_heads=4,
    )),
    "gemma": ("gemma", dict(head_dim=12, num_key_value_heads=1)),
    "gemma other act, untied, biases": ("gemma", dict(
        head_dim=16, hidden_act="silu", tie_word_embeddings=False, attention_bias=True,
        rope_scaling=YARN,
    )),
    "gemma2": ("gemma2", dict(
        head_dim=12, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        query_pre_attn_scalar=20,
    )),
    "gemma2 no caps, untied, biases": ("gemma2", dict(
        head_dim=16, sliding_window=7, attn_logit_softcapping=None, final_logit_softcapping=None,
        attention_bias=True, query_pre_attn_scalar=16, tie_word_embeddings=False,
        num_key_value_heads=1,
    )),
    "gemma2 other act, layer_types": ("gemma2", dict(
        head_dim=8, hidden_activation="silu", sliding_window=4, layer_types=[FULL, SLIDE, SLIDE],
        final_logit_softcapping=None, query_pre_attn_scalar=224, num_key_value_heads=4,
    )),
    "gemma2 one cap, llama3 rope": ("gemma2", dict(
        head_dim=8, sliding_window=100, attn_logit_softcapping=None, query_pre_attn_scalar=8,
        rope_scaling=LLAMA3_ROPE,
    )),
    "glm": ("glm", dict(head_dim=16)),
    "glm no biases, quarter turns, tied": ("glm", dict(
        head_dim=16, attention_bias=False, partial_rotary_factor=0.25, tie_word_embeddings=True,
        num_key_value_heads=1,
    )),
    "glm all turns, yarn": (
        "glm",
        dict(head_dim=12, partial_rotary_factor=1.0, rope_scaling=YARN, num_key_value_heads=4),
    ),
    "glm4": ("glm4", dict(head_dim=16, attention_bias=False, partial_rotary_factor=0.5)),
    "glm4 biases, three quarters turn": ("glm4", dict(
        head_dim=16, attention_bias=True, partial_rotary_factor=0.75, rms_norm_eps=1e-3,
        hidden_act="gelu_pytorch_tanh",
    )),
    "glm4 linear, tied": ("glm4", dict(
        head_dim=8, rope_scaling={"type": "linear", "factor": 2.0}, tie_word_embeddings=True,
        num_key_value_heads=1,
    )),
    "olmo": ("olmo", dict(clip_qkv=None)),
    "olmo clipped, biases": ("olmo",
                             dict(clip_qkv=0.5, attention_bias=True, num_key_value_heads=1)),
    "olmo tied, dynamic": ("olmo", dict(
        tie_word_embeddings=True, rope_scaling={"type": "dynamic", "factor": 2.0},
        max_position_embeddings=16,
    )),
    "olmo2": ("olmo2", dict(rms_norm_eps=1e-6)),
    "olmo2 biases, one key head": (
        "olmo2", dict(attention_bias=True, num_key_value_heads=1, hidden_act="gelu")
    ),
    "olmo2 tied, linear": ("olmo2", dict(
        tie_word_embeddings=True, num_key_value_heads=4,
        rope_scaling={"type": "linear", "factor": 2.0},
    )),
    "phi3": ("phi3", dict(sliding_window=9)),
    "phi3 longrope beyond its length": (
        "phi3",
        dict(rope_scaling=longrope(4), original_max_position_embeddings=16, sliding_window=None),
    ),
    "phi3 longrope within its length, three quarters turn, tied": ("phi3", dict(
        hidden_size=64, partial_rotary_factor=0.75, rope_scaling=longrope(6),
        original_max_position_embeddings=48, tie_word_embeddings=True, num_key_value_heads=1,
    )),
    "llama4_text": ("llama4_text", dict(LLAMA4, no_rope_layers=[1, 0, 1, 0])),
    "llama4_text by intervals": ("llama4_text", dict(
        LLAMA4, no_rope_layers=[], no_rope_layer_interval=3, interleave_moe_layer_step=2,
        num_experts_per_tok=2,
    )),
    "llama4_text no norm, no temperature": ("llama4_text", dict(
        LLAMA4, use_qk_norm=False, attn_temperature_tuning=False, rope_scaling=LLAMA3_ROPE,
        moe_layers=[1, 2],
    )),
    "llama4_text wide chunks, tied, no experts": ("llama4_text", dict(
        LLAMA4, attention_chunk_size=100, tie_word_embeddings=True, moe_layers=[],
        rope_theta=10000.0,
    )),
    "llama4_text layer_types": ("llama4_text", dict(
        LLAMA4, layer_types=[CHUNK, CHUNK, FULL, FULL], num_experts_per_tok=3,
        num_key_value_heads=4,
    )),
    "llama4 with a part that reads images": ("llama4", dict(
        text_config=dict(SMALL, **LLAMA4, num_experts_per_tok=2),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=2, image_size=28, patch_size=14,
                           projector_input_dim=32, projector_output_dim=32, vision_output_dim=32),
    )),
}
CASES |= {
    "gemma3_text": ("gemma3_text", dict(
        head_dim=12, sliding_window=5, query_pre_attn_scalar=20, num_hidden_layers=4,
        layer_types=[SLIDE, FULL, SLIDE, FULL], attn_logit_softcapping=None,
        rope_parameters={FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
                         SLIDE: {"rope_type": "default", "rope_theta": 100.0}},
    )),
    "olmo3": ("olmo3", dict(sliding_window=6, attention_bias=True, num_key_value_heads=4,
                            rope_scaling=YARN)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0, 1])),
    "smollm3 window where no rope": ("smollm3", dict(
        no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=5,
        tie_word_embeddings=False,
    )),
    "seed_oss": ("seed_oss", dict(head_dim=12)),
    "seed_oss other biases, tied": ("seed_oss", dict(
        attention_bias=False, attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True,
    )),
    "exaone4": ("exaone4", dict(sliding_window=5, sliding_window_pattern=3, head_dim=12)),
    "exaone4 no window": ("exaone4", dict(
        sliding_window=None, tie_word_embeddings=True, layer_types=[FULL] * 3,
    )),
    "ernie4_5": ("ernie4_5", dict(head_dim=12, use_bias=True, num_key_value_heads=1)),
    "granite": ("granite", dict(
        embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.3,
        logits_scaling=0.5, attention_bias=True, mlp_bias=True, rope_scaling=YARN,
    )),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", dict(
        head_dim=12, attention_bias=True,
        rope_scaling={"type": "dynamic", "alpha": 50.0, "factor": 1.0},
    )),
    "cohere2": ("cohere2", dict(
        sliding_window=5, layer_types=[SLIDE, FULL, SLIDE], logit_scale=2.0, layer_norm_eps=1e-3,
        attention_bias=True,
    )),
    "ministral3": ("ministral3", dict(rope_parameters=dict(
        YARN_OPTIONS, original_max_position_embeddings=16, rope_theta=5e3,
        llama_4_scaling_beta=0.3,
    ))),
}
LATENT = dict(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
              n_shared_experts=1, first_k_dense_replace=1, num_key_value_heads=4, kv_lora_rank=12,
              q_lora_rank=14, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10)
BIASED_CHOICE = dict(num_local_experts=6, num_experts_per_tok=2)
CASES |= {
    "glm4_moe": ("glm4_moe", dict(
        n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, n_group=4,
        topk_group=2, routed_scaling_factor=1.5, n_shared_experts=2, use_qk_norm=True,
        attention_bias=True, head_dim=16,
    )),
    "glm4_moe all sparse, not normed": ("glm4_moe", dict(
        n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=20,
        first_k_dense_replace=0, norm_topk_prob=False, head_dim=8,
    )),
    "minimax_m2": ("minimax_m2", dict(BIASED_CHOICE, head_dim=16, rotary_dim=8)),
    "deepseek_v3, half rotated by halves": ("deepseek_v3", dict(
        LATENT, n_group=2, topk_group=1, rope_interleave=False, attention_bias=True,
        q_lora_rank=None,
    )),
}
DELTA = dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
             linear_value_head_dim=10)
CASES |= {
    "qwen3_next": ("qwen3_next", dict(DELTA | SHARED_EXPERT, num_hidden_layers=4)),
    "qwen3_next other layers, dense": ("qwen3_next", dict(
        DELTA | SHARED_EXPERT, linear_num_value_heads=2, linear_conv_kernel_dim=3,
        layer_types=[FULL, "linear_attention", "linear_attention"], mlp_only_layers=[0, 1, 2],
        attention_bias=True, partial_rotary_factor=0.5,
    )),
    "qwen3_5_text": ("qwen3_5_text", dict(DELTA, num_hidden_layers=4, linear_key_head_dim=12)),
    "qwen3_5_text one key head, tied, yarn": ("qwen3_5_text", dict(
        DELTA, linear_num_key_heads=1, linear_num_value_heads=3, linear_conv_kernel_dim=2,
        layer_types=["linear_attention", FULL, "linear_attention"], tie_word_embeddings=True,
        rope_parameters={**YARN_OPTIONS, "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    )),
    "qwen3_5_text no attention": ("qwen3_5_text", dict(
        DELTA, linear_conv_kernel_dim=1, layer_types=["linear_attention"] * 3,
    )),
    "qwen3_5_text gelu after the convolution, too": ("qwen3_5_text", dict(
        DELTA, layer_types=["linear_attention", FULL, "linear_attention"], hidden_act="gelu",
    )),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", dict(
        DELTA | SHARED_EXPERT, layer_types=["linear_attention", FULL, "linear_attention"],
    )),
}
CASES |= {
    "lfm2": ("lfm2", dict(full_attn_idxs=[1], block_multiple_of=8, conv_L_cache=4)),
    "lfm2 biases, by layer_types, untied": ("lfm2", dict(
        layer_types=["conv", FULL, "conv"], conv_bias=True, block_auto_adjust_ff_dim=False,
        tie_word_embeddings=False, norm_eps=1e-3, num_key_value_heads=4,
    )),
    "lfm2 kernel of two, another factor": ("lfm2", dict(
        layer_types=["conv", "conv", "conv"], conv_L_cache=2, block_ffn_dim_multiplier=1.3,
        block_multiple_of=10,
    )),
    "lfm2_moe": ("lfm2_moe", dict(
        EXPERTS, layer_types=["conv", FULL, "conv"], num_dense_layers=1, rope_theta=5000.0,
    )),
    "lfm2_moe no constants, not normed, untied": ("lfm2_moe", dict(
        EXPERTS, layer_types=[FULL, "conv", FULL], num_dense_layers=0, use_expert_bias=False,
        norm_topk_prob=False, routed_scaling_factor=2.0, tie_word_embeddings=False,
        conv_bias=True, norm_eps=1e-3,
    )),
}
MAMBA = dict(mamba_n_heads=8, mamba_n_groups=2, mamba_d_state=6, mamba_d_head=8, mamba_expand=2,
             shared_intermediate_size=28, attention_multiplier=0.3)
CASES |= {
    "granitemoehybrid": ("granitemoehybrid", dict(
        MAMBA, num_local_experts=5, num_experts_per_tok=2, embedding_multiplier=3.0,
        residual_multiplier=0.4, logits_scaling=0.5, layer_types=["mamba", "attention", "mamba"],
    )),
    "granitemoehybrid dense, rotated, biases, one group": ("granitemoehybrid", dict(
        MAMBA, mamba_n_groups=1, num_local_experts=0, position_embedding_type="rope",
        mamba_d_conv=3, mamba_conv_bias=False, mamba_proj_bias=True, attention_bias=True,
        tie_word_embeddings=True, layer_types=["attention", "mamba", "mamba"],
        time_step_limit=[0.2, 0.9],
    )),
    "granitemoehybrid gelu after the convolution, too": ("granitemoehybrid", dict(
        MAMBA, num_local_experts=0, hidden_act="gelu", layer_types=["mamba", "attention", "mamba"],
    )),
}
NEMOTRON = dict(head_dim=16, mamba_num_heads=6, mamba_head_dim=8, n_groups=2, ssm_state_size=6,
                n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=20,
                moe_shared_expert_intermediate_size=28)
CASES |= {
    "nemotron_h": ("nemotron_h", dict(
        NEMOTRON, hybrid_override_pattern="-MM*E-M", routed_scaling_factor=1.7,
    )),
    "nemotron_h biases, one group, begins with experts": ("nemotron_h", dict(
        NEMOTRON, hybrid_override_pattern="E*M-", n_groups=1, n_routed_experts=6, n_group=3,
        topk_group=2, norm_topk_prob=False, use_conv_bias=False, conv_kernel=3, use_bias=True,
        layer_norm_epsilon=1e-3, mamba_hidden_act="gelu", mlp_hidden_act="silu",
    )),
    "nemotron_h without attention": ("nemotron_h", dict(
        NEMOTRON, hybrid_override_pattern="M-M-", mlp_bias=True, n_groups=6,
    )),
}
SINCE_5 = {     # what transformers 4.57 reads otherwise
    "llama longrope": "looks for the trained length of longrope elsewhere",
    "qwen2_moe window": "has the window in other layers",
}
# what 4.57 does otherwise; tests/test_families_2026.py has recorded values of these
ONLY_5 = {
    "granite": "reads yarn under other names", "olmo3": "reads yarn under other names",
    "lfm2": "saves no layer_types", "granitemoehybrid": "has other logits for these sizes",
}
DERIVED = ("layer_types", "no_rope_layers", "moe_layers")  # lists that later versions write
INTERVALS = ("no_rope_layer_interval",)                              # and 4.57 then forgets


def reference(kind, fields, seed):
    """transformers' model with random weights, norms and biases."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__.startswith("4."):
        if kind not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {kind}")
        if "rope_parameters" in fields:
            pytest.skip(f"transformers {transformers.__version__} does not read rope_parameters")
        if kind in ONLY_5:
            pytest.skip(f"transformers {transformers.__version__} {ONLY_5[kind]}")
    config = transformers.AutoConfig.for_model(kind, **json.loads(json.dumps(fields)))
    for part in (config, getattr(config, "text_config", config)):
        part._attn_implementation = part._experts_implementation = "eager"
        part.pad_token_id = None  # some have one outside this small vocabulary
    auto = (transformers.AutoModelForImageTextToText if "text_config" in fields
            else transformers.AutoModelForCausalLM)
    model = auto.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.empty_like(p).normal_(generator=generator)
            if p.dim() == 1 and "norm" in name:
                p += 0.3 * noise
            else:
                p.copy_(0.3 * noise if p.dim() == 1 else noise / p.shape[1] ** 0.5)
    return model


def older(config):
    """config.json in the spelling before transformers 5, without the lists that later versions
    derive."""
    config = {key: value for key, value in config.items() if key not in DERIVED}
    rope = dict(config.pop("rope_parameters", None) or {})
    if FULL in rope:                                    # settings for each kind of layer
        if config["model_type"] == "gemma3_text":
            config["rope_local_base_freq"] = rope[SLIDE]["rope_theta"]
        rope = dict(rope[FULL])
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    return {key: older(value) if key == "text_config" else value for key, value in config.items()}


def newer(config):
    """config.json with rope_parameters and dtype."""
    config = older(config)
    rope = {"rope_type": "default", **(config.pop("rope_scaling", None) or {})}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in config:
            rope[key] = config.pop(key)
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    text = {"text_config": newer(config["text_config"])} if "text_config" in config else {}
    return {**config, "rope_parameters": rope, "dtype": config.pop("torch_dtype", "float32"),
            **text}


def as_written(config):
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (folder of the checkpoint, ids, logits) of a row of
    CASES; each is made once."""
    done = {}

    def make(name):
        transformers = pytest.importorskip("transformers")
        if name in SINCE_5 and transformers.__version__.startswith("4."):
            pytest.skip(f"transformers {transformers.__version__} {SINCE_5[name]}")
        if name not in done:
            kind, changes = CASES[name]
            fields = changes if "text_config" in changes else {**SMALL, **changes}
            seed = list(CASES).index(name)          # whichever tests ran before
            model = reference(kind, fields, seed=seed)
            ids = torch.randint(0, SMALL["vocab_size"], (2, TOKENS),
                                generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                # transformers 5.24 cannot call a Llama 4 with a vision model without an image
                text = getattr(model, "language_model", model)
                logits = text(ids, use_cache=False).logits
            folder = tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(folder)
            done[name] = folder, json.loads((folder / "config.json").read_text()), ids, logits
        return done[name]

    return make


def load(made, name, spelling=as_written, dtype=torch.float32):
    """(our model, ids, transformers' logits) of a case, with config.json spelled so."""
    folder, config, ids, logits = made(name)
    spelled = spelling(config)
    if spelling is not as_written:
        asked = CASES[name][1].get("text_config", CASES[name][1])
        spelled.get("text_config", spelled).update(
            {key: asked[key] for key in (*DERIVED, *INTERVALS) if key in asked}
        )
    (folder / "config.json").write_text(json.dumps(spelled))
    return load_model(folder, dtype), ids, logits


def kernels(model):
    return ["plain"] if model.config.attn_softcap else ["plain", "sdpa-math"]  # SDPA has no softcap


# ---- the decoder against transformers ------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(made, name):
    for spelling in (as_written, older, newer):
        model, ids, want = load(made, name, spelling)
        for model.kernel in kernels(model):
            got = model.logits(model(ids))
            assert (got - want).abs().max() < CLOSE, (spelling.__name__, model.kernel)
    assert want.abs().max() > 1                          # the settings matter


# rope that depends on the longest sequence, so that a split prompt differs from one pass
STRETCHED = [name for name, (_, fields) in CASES.items()
             if "beyond" in name or "dynamic" in name or "longrope" in name]


@pytest.mark.parametrize("name", [name for name in CASES if name not in STRETCHED])
def test_a_split_prompt_through_the_cache(made, name):
    model, ids, want = load(made, name)
    for model.kernel in kernels(model):
        cache, cuts = KVCache(len(model.model.layers)), (0, 7, 8, 9, 25, 26, TOKENS)
        parts = [model(ids[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])]
        assert (model.logits(torch.cat(parts, 1)) - want).abs().max() < CLOSE, model.kernel


@pytest.mark.parametrize("name", STRETCHED)
def test_a_split_prompt_with_rope_by_length(made, name):
    """Cached keys keep their rotation: equal to transformers' cache, not to the uncached pass."""
    transformers = pytest.importorskip("transformers")
    model, ids, _ = load(made, name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        made(name)[0], attn_implementation="eager"
    ).eval()
    cache, past, got, want = KVCache(len(model.model.layers)), None, [], []
    cuts = (0, 12, 16, 17, 18, 30, TOKENS)                           # trained lengths are 16 and 48
    for a, b in zip(cuts, cuts[1:]):
        got.append(model.logits(model(ids[:, a:b], cache=cache)))
        with torch.no_grad():
            out = theirs(ids[:, a:b], past_key_values=past, use_cache=True)
        past = out.past_key_values
        want.append(out.logits)
    assert (torch.cat(got, 1) - torch.cat(want, 1)).abs().max() < CLOSE


@pytest.mark.parametrize("name", [name for name in CASES if name not in STRETCHED])
def test_sequences_in_one_row(made, name):
    model, ids, want = load(made, name)
    lengths = [3, TOKENS, 1, 17, 30]
    row = torch.cat([ids[i % 2, :n] for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for model.kernel in kernels(model):
        parts = model.logits(model(row, positions, PackedLayout(lengths)))[0].split(lengths)
        for i, (n, part) in enumerate(zip(lengths, parts)):
            assert (part - want[i % 2, :n]).abs().max() < CLOSE, (model.kernel, n)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma2", "olmo2", "llama4_text", "glm4", "phi3"])
def test_bfloat16(made, name):
    """In 16 bits the two may differ, as each rounds to 8 bits some thirty times; but neither may be
    further from the float32 logits than the other: a sum or a norm done in 16 bits instead of 32
    shows as a larger distance."""
    transformers = pytest.importorskip("transformers")
    model, ids, exact = load(made, name, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        made(name)[0], torch_dtype=torch.bfloat16, attn_implementation="eager").eval()
    theirs.config._experts_implementation = "eager"
    with torch.no_grad():
        far = [(logits.float() - exact).abs().median()
               for logits in (model.logits(model(ids)), theirs(ids).logits)]
    assert far[0] < 1.25 * far[1] and far[0] < 0.05


# ---- reading config.json -------------------------------------------------------------------------


CHATGLM = dict(model_type="chatglm", num_layers=28, hidden_size=4096, num_attention_heads=32,
               kv_channels=128, rmsnorm=True, multi_query_attention=True, multi_query_group_num=2,
               ffn_hidden_size=13696, padded_vocab_size=65024, layernorm_epsilon=1e-5,
               post_layer_norm=True, add_bias_linear=False, add_qkv_bias=True, seq_length=8192)
QWEN1 = dict(model_type="qwen", no_bias=True, kv_channels=128, layer_norm_epsilon=1e-6,
             rotary_emb_base=10000, rotary_pct=1.0, scale_attn_weights=True, seq_length=8192,
             use_dynamic_ntk=True, use_logn_attn=True)
SCOUT = dict(model_type="llama4_text", hidden_size=5120, intermediate_size=8192,
             intermediate_size_mlp=16384, head_dim=128, num_hidden_layers=48,
             num_attention_heads=40, num_key_value_heads=8, vocab_size=202048,
             num_experts_per_tok=1, num_local_experts=16, interleave_moe_layer_step=1,
             rope_theta=500000.0, attention_chunk_size=8192)
LLAMA4_EYES = 871932416         # parameters of the vision model of Llama 4
TIED = dict(tie_word_embeddings=True)


def sizes(kind, D, F, L, H, K, V, **more):
    return dict(model_type=kind, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
                num_attention_heads=H, num_key_value_heads=K, vocab_size=V, **more)


def experts(E, k, width, **more):
    return dict(num_experts=E, num_experts_per_tok=k, moe_intermediate_size=width,
                decoder_sparse_step=1, **more)


def baichuan(D, F, L, H, **more):
    return dict(model_type="baichuan", hidden_size=D, intermediate_size=F, num_hidden_layers=L,
                num_attention_heads=H, vocab_size=125696, model_max_length=4096, z_loss_weight=0,
                **more)


# the fields that every config.json states, or that differ from size to size
STATED = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "vocab_size", "num_key_value_heads", "max_position_embeddings",
          "num_experts", "num_local_experts", "num_experts_per_tok",
          "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp",
          "pad_token_id", "layers_block_type")


# a part that reads images; classes whose defaults are one model
OTHER_DEFAULTS = {"llama4", "ministral3", "glm4_moe", "minimax_m2", "deepseek_v3"}


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in CASES.values()} - OTHER_DEFAULTS))
def test_missing_fields_have_the_defaults_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    if transformers.__version__.startswith("4."):
        if kind not in transformers.CONFIG_MAPPING or kind == "olmo3":
            pytest.skip(f"{kind}: transformers {transformers.__version__} has other defaults")
    full = transformers.AutoConfig.for_model(kind).to_dict()
    short = {key: value for key, value in full.items() if key in STATED}
    assert replace(model_config(older(full)), notes=()) == model_config(short)


# parameter counts of the hub, and fields of config.json
PUBLISHED = {
    "Llama-2-7b": (6738415616, sizes("llama", 4096, 11008, 32, 32, 32, 32000)),
    "Llama-2-13b": (13015864320, sizes("llama", 5120, 13824, 40, 40, 40, 32000)),
    "Llama-2-70b": (68976648192, sizes("llama", 8192, 28672, 80, 64, 8, 32000)),
    "Meta-Llama-3-8B": (8030261248, sizes("llama", 4096, 14336, 32, 32, 8, 128256)),
    "Meta-Llama-3-70B": (70553706496, sizes("llama", 8192, 28672, 80, 64, 8, 128256)),
    "Llama-3.2-1B": (1235814400,
                     sizes("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED)),
    "Llama-3.2-3B": (3212749824,
                     sizes("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **TIED)),
    "Yi-6B": (6061035520, sizes("llama", 4096, 11008, 32, 32, 4, 64000)),
    "Yi-34B": (34388917248, sizes("llama", 7168, 20480, 60, 56, 8, 64000)),
    "Mistral-7B-v0.1": (7241732096,
                        sizes("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096)),
    "Mistral-7B-v0.3": (7248023552,
                        sizes("mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None)),
    "Mixtral-8x7B-v0.1": (46702792704, sizes(
        "mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=None,
    )),
    "Mistral-Nemo-Base-2407": (12247782400,
                               sizes("mistral", 5120, 14336, 40, 32, 8, 131072, head_dim=128)),
    "Qwen-1_8B": (1836828672, {**sizes("qwen", 2048, 11008, 24, 16, 16, 151936), **QWEN1}),
    "Qwen-7B": (7721324544, {**sizes("qwen", 4096, 22016, 32, 32, 32, 151936), **QWEN1}),
    "Qwen-72B": (72287920128, {**sizes("qwen", 8192, 49152, 80, 64, 64, 152064), **QWEN1}),
    "Qwen1.5-0.5B": (463987712, sizes("qwen2", 1024, 2816, 24, 16, 16, 151936, **TIED)),
    "Qwen1.5-32B": (32512218112, sizes("qwen2", 5120, 27392, 64, 40, 8, 152064)),
    "Qwen1.5-110B": (111209914368, sizes("qwen2", 8192, 49152, 80, 64, 8, 152064)),
    "Qwen2-0.5B": (494032768, sizes("qwen2", 896, 4864, 24, 14, 2, 151936, **TIED)),
    "Qwen2.5-3B": (3085938688, sizes("qwen2", 2048, 11008, 36, 16, 2, 151936, **TIED)),
    "Qwen2.5-7B": (7615616512, sizes("qwen2", 3584, 18944, 28, 28, 4, 152064)),
    "QwQ-32B": (32763876352, sizes(
        "qwen2", 5120, 27648, 64, 40, 8, 152064, use_sliding_window=False, sliding_window=32768,
        max_window_layers=64,
    )),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        1777088000, sizes("qwen2", 1536, 8960, 28, 12, 2, 151936, use_mrope=False)
    ),
    "Qwen1.5-MoE-A2.7B": (14315784192, sizes(
        "qwen2_moe", 2048, 5632, 24, 16, 16, 151936, **experts(60, 4, 1408),
        shared_expert_intermediate_size=5632,
    )),
    "Qwen3-0.6B": (596049920, sizes("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, **TIED)),
    "Qwen3-8B": (8190735360, sizes("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    "Qwen3-32B": (32762123264, sizes("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128)),
    "Qwen3-30B-A3B": (30532122624, sizes(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, head_dim=128, mlp_only_layers=[],
        **experts(128, 8, 768, norm_topk_prob=True),
    )),
    "gemma-2b": (2506172416,
                 sizes("gemma", 2048, 16384, 18, 8, 1, 256000, head_dim=256, hidden_act="gelu")),
    "gemma-7b": (8537680896,
                 sizes("gemma", 3072, 24576, 28, 16, 16, 256000, head_dim=256, hidden_act="gelu")),
    "gemma-2-2b": (2614341888, sizes("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256)),
    "gemma-2-9b": (9241705984, sizes(
        "gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, sliding_window=4096,
        sliding_window_size=4096, hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh", cache_implementation="hybrid",
    )),
    "gemma-2-27b": (27227128320, sizes("gemma2", 4608, 36864, 46, 32, 16, 256000, head_dim=128)),
    "glm-4-9b-chat-hf": (
        9399951360, sizes("glm", 4096, 13696, 40, 32, 2, 151552, head_dim=128, attention_bias=True)
    ),
    "GLM-4-9B-0414": (
        9400279040, sizes("glm4", 4096, 13696, 40, 32, 2, 151552, head_dim=128, attention_bias=True)
    ),
    "GLM-Z1-32B-0414": (
        32566081536,
        sizes("glm4", 6144, 23040, 61, 48, 2, 151552, head_dim=128, attention_bias=False),
    ),
    "chatglm3-6b": (6243584000,
                    dict(CHATGLM, pre_seq_len=None, prefix_projection=False, quantization_bit=0)),
    "chatglm3-6b-32k": (6243584000,
                        dict(CHATGLM, rope_ratio=50, seq_length=32768, vocab_size=65024)),
    "glm-4-9b-chat": (9399951360, dict(
        CHATGLM, num_layers=40, num_hidden_layers=40, padded_vocab_size=151552, rope_ratio=500,
        seq_length=131072, layernorm_epsilon=1.5625e-7,
    )),
    "Baichuan2-7B-Chat": (7505973248, baichuan(4096, 11008, 32, 32, max_position_embeddings=4096)),
    "Baichuan2-13B-Chat": (13896668160, baichuan(5120, 13696, 40, 40)),
    "OLMo-1B-hf": (1176764416, sizes("olmo", 2048, 8192, 16, 16, 16, 50304, clip_qkv=None, **TIED)),
    "OLMo-7B-hf": (6888095744, sizes("olmo", 4096, 11008, 32, 32, 32, 50304, clip_qkv=None)),
    "OLMo-2-0425-1B": (1484916736, sizes("olmo2", 2048, 8192, 16, 16, 16, 100352)),
    "OLMo-2-1124-7B": (7298617344, sizes("olmo2", 4096, 11008, 32, 32, 32, 100352)),
    "OLMo-2-0325-32B": (32234279936, sizes("olmo2", 5120, 27648, 64, 40, 8, 100352)),
    "Phi-3-mini-4k-instruct": (3821079552,
                               sizes("phi3", 3072, 8192, 32, 32, 32, 32064, sliding_window=2047)),
    "Phi-3.5-mini-instruct": (3821079552, sizes(
        "phi3", 3072, 8192, 32, 32, 32, 32064, max_position_embeddings=131072,
        original_max_position_embeddings=4096, rope_scaling=longrope(48),
    )),
    "phi-4": (14659507200, sizes("phi3", 5120, 17920, 40, 40, 10, 100352)),
    "Phi-4-mini-instruct": (3836021760, sizes(
        "phi3", 3072, 8192, 32, 24, 8, 200064, partial_rotary_factor=0.75,
        rope_scaling=longrope(48), full_attn_mod=1, max_position_embeddings=131072,
        original_max_position_embeddings=4096, interpolate_factor=1, lm_head_bias=False,
        attention_bias=False, mlp_bias=False, **TIED,
    )),
    "internlm2_5-1_8b": (1889110016, sizes("internlm2", 2048, 8192, 24, 16, 8, 92544, bias=False)),
    "internlm2_5-7b": (7737708544, sizes(
        "internlm2", 4096, 14336, 32, 32, 8, 92544, bias=False,
        rope_scaling={"type": "dynamic", "factor": 2.0},
    )),
    "internlm2-20b": (19861149696, sizes("internlm2", 6144, 16384, 48, 48, 8, 92544, bias=False)),
    "Llama-4-Scout-17B-16E": (108641793536 - LLAMA4_EYES, dict(
        model_type="llama4",
        text_config=dict(SCOUT, for_llm_compressor=False,
                         rope_scaling=dict(LLAMA3_ROPE, factor=16.0, high_freq_factor=1.0)),
    )),
    "Llama-4-Maverick-17B-128E": (401583781376 - LLAMA4_EYES, dict(
        model_type="llama4",
        text_config=dict(SCOUT, num_local_experts=128, interleave_moe_layer_step=2,
                         use_qk_norm=False, rope_scaling=None),
    )),
}


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in CausalLM(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_checkpoints(name):
    want, fields = PUBLISHED[name]
    config = model_config(fields)
    assert count(config) == want


@needs_shared
def test_parameter_counts_of_the_published_run():
    log = json.loads((GOLDEN / "published" / "llama_factory_logs.json").read_text())
    assert (count(model_config({**log["llama3_8b_config"], "model_type": "llama"}))
            == log["base"]["merged_params"])


# a small config.json of each family
READABLE = {kind: {"model_type": kind, **SMALL, **fields} for kind, fields in {
    "llama": {}, "xverse": {}, "mistral": dict(sliding_window=5), "qwen2": {}, "qwen3": {},
    "gemma": {}, "glm": {}, "mixtral": dict(num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": SHARED_EXPERT, "qwen3_moe": EXPERTS,
    "qwen": dict(QWEN1, kv_channels=8, num_key_value_heads=4), "gemma2": dict(sliding_window=5),
    "glm4": {},
    "chatglm": dict(CHATGLM, num_layers=3, hidden_size=SMALL["hidden_size"], kv_channels=8,
                    num_attention_heads=SMALL["num_attention_heads"],
                    ffn_hidden_size=SMALL["intermediate_size"],
                    padded_vocab_size=SMALL["vocab_size"]),
    "baichuan": dict(num_key_value_heads=4), "olmo": {}, "olmo2": {}, "phi3": {}, "internlm2": {},
    "llama4_text": dict(LLAMA4, num_experts_per_tok=1),
    "gemma3_text": dict(sliding_window=5), "olmo3": {}, "internlm3": {}, "smollm3": {},
    "seed_oss": {}, "ernie4_5": {}, "exaone4": {}, "granite": {}, "hunyuan_v1_dense": {},
    "cohere2": {}, "ministral3": {}, "minimax_m2": dict(BIASED_CHOICE, head_dim=16, rotary_dim=8),
    "glm4_moe": dict(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
                     n_shared_experts=1, head_dim=16),
    **dict.fromkeys(("deepseek_v2", "glm4_moe_lite", "mistral4"), LATENT),
    **dict.fromkeys(("deepseek_v3", "kimi_k2"), dict(LATENT, n_group=1, topk_group=1)),
    "qwen3_5_text": DELTA,
    "lfm2": dict(full_attn_idxs=[1]), "lfm2_moe": dict(EXPERTS, full_attn_idxs=[1]),
    "granitemoehybrid": MAMBA,
    "gpt_oss": BIASED_CHOICE,
    "nemotron_h": dict(NEMOTRON, hybrid_override_pattern="M-*"),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), DELTA | SHARED_EXPERT),
}.items()}
for kind, part in {"gemma3": "gemma3_text", "mistral3": "ministral3",
                   "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}.items():
    READABLE[kind] = {"model_type": kind, "text_config": READABLE[part]}
READABLE["llama4"] = {"model_type": "llama4", "text_config": READABLE["llama4_text"]}


def test_every_family_has_a_case():
    assert READABLE.keys() == FAMILIES.keys()


def changed(kind, change):
    """The small config.json of a family with a change, wherever the family keeps its fields."""
    raw = READABLE[kind]
    return {**raw, "text_config": {**raw["text_config"], **change}} if "text_config" in raw else {
        **raw, **change
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_unknown_fields_of_each_family(kind):
    model_config(changed(kind, {}))
    for change in ({"use_bidirectional_attention": True}, {"block_multiplier": 0.22},
                   {"num_moe_heads": 4}, {"memory_tokens": [1]}, {"alternation": "odd"}):
        with pytest.raises(ValueError,
                           match=f"{next(iter(change))}.*may change what the network computes"):
            model_config(changed(kind, change))
    # switched off
    for change in ({"use_bidirectional_attention": False}, {"block_multiplier": 1.0},
                   {"num_moe_heads": 0}, {"memory_tokens": []}, {"alternation": None}):
        assert model_config(changed(kind, change)) == model_config(changed(kind, {}))


@pytest.mark.parametrize("kind", FAMILIES)
def test_notes_of_each_family(kind):
    remarks = {"architectures": ["X"], "torch_dtype": "float16", "transformers_version": "4.44.0",
               "use_cache": False, "_name_or_path": "somewhere", "bos_token_id": 1,
               "eos_token_id": [2, 3], "pad_token_id": None, "attention_dropout": 0.0,
               "auto_map": {"AutoConfig": "x.Y"}, "rope_scaling": None}
    assert model_config(changed(kind, remarks)) == model_config(changed(kind, {}))


@pytest.mark.parametrize("fields, words", [
    ({"attn_logit_softcapping": None}, {"attn_softcap": None}),
    ({}, {"attn_softcap": 50.0, "final_softcap": 30.0}),
    ({"final_logit_softcapping": None}, {"final_softcap": None, "attn_softcap": 50.0}),
    ({"sliding_window": None}, {"windows": (None, None, None)}),
    ({"head_dim": None}, {"head_dim": 8}),
    ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
])
def test_null_in_config_json(fields, words):
    config = model_config(changed("gemma2", fields))
    assert {name: getattr(config, name) for name in words} == words


DEEPSEEK_V3 = {"routed_scale": 2.5, "expert_groups": 8, "top_groups": 4,
               "sparse": (False, False, False)}


@pytest.mark.parametrize("kind, absent, words", [
    ("deepseek_v3", ("first_k_dense_replace", "n_group", "topk_group"), DEEPSEEK_V3),
    ("kimi_k2", ("first_k_dense_replace", "n_group", "topk_group"), DEEPSEEK_V3),
    ("glm4_moe_lite", (), {"routed_scale": 1.8}),
    ("lfm2_moe", (), {"sparse": (False, False, True), "selection_bias": True}),
    ("ministral3", (), {"head_dim": 128}),
    ("granitemoehybrid", ("intermediate_size",), {"moe_intermediate_size": 8192}),
    ("mistral", ("sliding_window",), {"windows": (4096, 4096, 4096)}),
    ("gemma2", ("sliding_window",), {"windows": (4096, None, 4096)}),
    ("deepseek_v2", ("first_k_dense_replace", "q_lora_rank", "n_shared_experts"),
     {"q_lora_rank": 1536, "sparse": (True, True, True), "shared_expert_intermediate_size": 40}),
    ("deepseek_v3", ("q_lora_rank",), {"q_lora_rank": 1536}),
    ("glm4_moe_lite", ("q_lora_rank",), {"q_lora_rank": 768}),
    ("mistral4", ("q_lora_rank", "n_shared_experts"),
     {"q_lora_rank": 1024, "shared_expert_intermediate_size": 20}),
    ("qwen3_next", ("shared_expert_intermediate_size",), {"shared_expert_intermediate_size": 512}),
])
def test_fields_left_out_are_what_transformers_takes(kind, absent, words):
    raw = {key: value for key, value in READABLE[kind].items() if key not in absent}
    config = model_config(raw)
    assert {name: getattr(config, name) for name in words} == words


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2",
                                  "llama4_text"])
@pytest.mark.parametrize("by_types", [False, True])
def test_layers_have_the_windows_and_chunks_of_transformers_by_default(kind, by_types):
    transformers = pytest.importorskip("transformers")
    switch = {} if kind in ("mistral", "gemma2", "llama4_text") else {"use_sliding_window": True}
    full = transformers.AutoConfig.for_model(kind, **switch).to_dict()
    left_out = {"sliding_window", "attention_chunk_size"} | (set() if by_types else {"layer_types"})
    short = {key: value for key, value in full.items() if key not in left_out}
    ours = model_config(short)
    stated = model_config(full)
    assert (ours.windows, ours.chunks) == (stated.windows, stated.chunks)
    assert any(ours.windows) or any(ours.chunks)
    without = model_config(full | {name: None for name in left_out})
    assert not any(without.windows) and not any(without.chunks)


@pytest.mark.parametrize("kind", ["ministral3", "mistral4"])
def test_a_mistral_without_a_rotation_has_the_yarn_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    full = transformers.AutoConfig.for_model(kind).to_dict()
    full["rope_parameters"].pop("max_position_embeddings")          # nothing reads it
    full["rope_parameters"].pop("partial_rotary_factor", None)      # qk_rope_head_dim says it, too
    short = {key: value for key, value in full.items() if key != "rope_parameters"}
    config = model_config(short)
    assert config == model_config(full) and config.attn_temperature[1] == 0.1
    stated = model_config(short | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert stated.rope["rope_type"] == "linear" and not stated.attn_temperature


WITHOUT_EFFECT = {       # fields of published files that transformers does not read
    "hunyuan_v1_dense": dict(
        add_classification_head=False, attention_head_dim=8, cla_share_factor=2, class_num=0,
        dense_list=[4096, 0], im_end_id=5, im_newline_id=11, im_start_id=4, mask_init_id=12,
        org_vocab_size=61, pad_id=1, pool_type="last", sep_token_id=2, text_end_id=7,
        text_start_id=6, use_cla=False, use_rotary_pos_emb=True, norm_type="rms", mlp_bias=False),
    "minimax_m2": dict(
        attn_type_list=[1, 1, 1], mlp_intermediate_size=8192, shared_moe_mode="sigmoid",
        shared_intermediate_size=0, num_mtp_modules=3, mtp_transformer_layers=1, use_mtp=True,
        qk_norm_type="per_layer", use_qk_norm=True, use_routing_bias=True, scoring_func="sigmoid",
        router_aux_loss_coef=0.001, router_jitter_noise=0.0),
    "cohere2": dict(                                # Command R7B
        use_parallel_embedding=True, use_embedding_sharing=True, use_parallel_block=True,
        use_gated_activation=True, use_qk_norm=False, rotary_pct=1.0, layer_switch=4,
        position_embedding_type="rope_gptj", order_of_interleaved_layers="local_attn_first"),
    "qwen3_moe": dict(                              # Qwen3-Coder-480B
        use_qk_norm=True, qkv_bias=False, shared_expert_intermediate_size=0),
    "qwen3_5": dict(output_gate_type="swish"),      # Qwen3.6-27B
    "llama": dict(max_sequence_length=2048, use_bfloat16=True),     # Megrez-3B
    "llama4": dict(nope_layer_interval=4),          # Maverick, FP8
    "glm4_moe": dict(num_local_experts=6),          # as transformers 5 spells n_routed_experts
    "lfm2": dict(block_use_xavier_init=True, conv_use_xavier_init=True, ffn_te_autocast=True,
                 sequence_parallel_norm_across_tp=True, conv_dim=32, num_heads=4),
}


@pytest.mark.parametrize("kind", WITHOUT_EFFECT)
def test_published_fields_that_change_nothing(kind):
    assert model_config(changed(kind, WITHOUT_EFFECT[kind])) == model_config(changed(kind, {}))


def test_a_hunyuan_without_rotation_is_refused():
    with pytest.raises(ValueError, match="use_rotary_pos_emb: false is not supported"):
        model_config(changed("hunyuan_v1_dense", {"use_rotary_pos_emb": False}))


def test_a_window_of_smollm3_that_is_not_switched_on():
    kinds = [SLIDE, FULL, SLIDE]
    config = model_config(changed("smollm3", {"sliding_window": 5, "layer_types": kinds}))
    assert config.windows == (None, None, None)


def test_one_set_of_rope_parameters_is_of_all_layers_of_olmo3():
    config = model_config(changed("olmo3", {"rope_parameters": {**YARN_OPTIONS,
                                                                "rope_theta": 1234.0}}))
    assert config.rope_theta == config.window_rope_theta == 1234.0
    assert config.rope["rope_type"] == "yarn"


def test_gemma3_has_no_cap_of_attention_scores():
    with pytest.raises(ValueError, match="attn_logit_softcapping.*may change"):
        model_config(changed("gemma3_text", {"attn_logit_softcapping": 50.0}))


def test_both_spellings_of_fields_that_have_two():
    def read(kind, **change):
        return model_config(changed(kind, change))

    moe = changed("qwen3_moe", {})
    renamed = {("num_local_experts" if key == "num_experts" else key): value
               for key, value in moe.items()}
    assert model_config(renamed) == model_config(moe) and model_config(moe).num_experts == 5
    inside = read(
        "glm",
        rope_parameters={"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25},
    )
    assert inside == read("glm", rope_theta=5e4, partial_rotary_factor=0.25)
    assert inside.partial_rotary_factor == 0.25
    for kind in ("llama", "qwen2", "gemma2", "llama4_text"):
        new = read(kind, rope_parameters={**LLAMA3_ROPE, "rope_theta": 1234.0}, dtype="bfloat16")
        assert new == read(kind, rope_theta=1234.0, rope_scaling=LLAMA3_ROPE,
                           torch_dtype="bfloat16")
        assert new.rope_theta == 1234.0 and new.rope["factor"] == 8.0
    assert read("phi3", rope_scaling={**longrope(4), "type": "su"}) == read(
        "phi3", rope_scaling=longrope(4)
    )


@pytest.mark.parametrize("change, words", [
    ({"hidden_act": "gelu_9"}, "hidden_act 'gelu_9'"),
    ({"logit_scale": 0.5}, "logit_scale"),
    ({"rope_scaling": {"type": "longrope", "factor": 2}}, "longrope"),
    ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
    ({"rope_scaling": {"type": "linear", "factor": 2, "twist": 1}}, "twist"),
    ({"rope_scaling": {"type": "spiral", "factor": 2}},
     "'spiral' is not supported; supported are .*yarn"),
    ({"vocab_size": None}, "vocab_size.*missing"),
    ({"num_key_value_heads": 3}, "multiple"),
    ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
    ({"model_type": ["llama"]}, r"\['llama'\]"),
    ({"hidden_size": "32"}, 'hidden_size: "32" is not a whole number'),
    ({"num_hidden_layers": 1.5}, "num_hidden_layers: 1.5 is not a whole number"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: 0 is not above 0"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps.*is not a number"),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings: "false" is not true or false'),
    ({"rope_scaling": "linear"}, 'rope_scaling: "linear" is not an object'),
    ({"quantization_config": "gptq"}, "quantization_config.*is not an object"),
    ({"layer_types": [FULL, FULL]}, "layer_types has 2 entries for 3 layers"),
    ({"layer_types": [FULL, "linear_attention", FULL]},
     "'linear_attention'; known are full_attention"),
    # Mixtral's under another name
    ({"num_local_experts": 8, "num_experts_per_tok": 2}, "num_local_experts"),
])
def test_config_json_that_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        model_config({**READABLE["qwen3"], **change})


@pytest.mark.parametrize("kind, change, words", [
    ("qwen3_moe", {"num_experts_per_tok": 6}, "num_experts_per_tok is 6, and num_experts 5"),
    ("qwen3_moe", {"num_experts_per_tok": None}, "num_experts_per_tok"),
    ("llama4_text", {"num_local_experts": None}, "num_local_experts|num_experts"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts|num_experts"),
    ("chatglm", {"rmsnorm": False}, "rmsnorm: false is not supported, only true"),
    ("chatglm", {"multi_query_attention": False}, "multi_query_attention"),
    ("qwen", {"seq_length": None}, "'seq_length' is missing"),
    ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm: false is not supported, only true"),
    ("qwen2", {"is_causal": False}, "is_causal: false is not supported"),      # gte-Qwen2
    ("glm4_moe", {"num_local_experts": 7}, "num_local_experts 7 is another .* n_routed_experts 6"),
    ("qwen3", {"quantization_config": {"quant_algo": "FP8", "producer": {"name": "modelopt"}}},
     r"quantized \(modelopt\)"),
])
def test_config_json_of_some_families(kind, change, words):
    with pytest.raises(ValueError, match=words):
        model_config(changed(kind, change))


def test_layers_of_nemotron_h_are_a_mixer_or_an_mlp():
    letters = READABLE["nemotron_h"]["hybrid_override_pattern"]
    config = model_config(READABLE["nemotron_h"])
    assert letters == "M-*" and config.mixers == ("state space", "none", "attention")
    assert config.sparse == (None, False, None)
    older = {"hybrid_override_pattern": None, "num_hidden_layers": None,
             "layers_block_type": ["mamba", "mlp", "attention"]}
    assert model_config({**READABLE["nemotron_h"], **older}) == config


@pytest.mark.parametrize("change, words", [
    ({"hybrid_override_pattern": "M-x"}, '"M-x" is not made of M .Mamba-2., . .attention.'),
    ({"hybrid_override_pattern": "M-"}, "has 2 letters for num_hidden_layers: 3"),
    ({"hybrid_override_pattern": None}, "hybrid_override_pattern is missing"),
    ({"layers_block_type": ["mamba", "mlp", "moe"]}, "layers_block_type contradict each other"),
    ({"mamba_hidden_act": "gelu_9"}, "'gelu_9' is not supported"),
    ({"moe_latent_size": 16}, "moe_latent_size"),
])
def test_config_json_of_nemotron_h(change, words):
    with pytest.raises(ValueError, match=words):
        model_config({**READABLE["nemotron_h"], **change})


@pytest.mark.parametrize("kind, new_name", [
    ("qwen2", "qwen2_5_plus"), ("gemma2", "gemma2_old"), ("chatglm", "chatglm4"), ("llama", "yi"),
    ("qwen3_moe", "qwen4_moe"), ("baichuan", "baichuan3")])
def test_a_family_that_differs_in_name_only(kind, new_name):
    with pytest.raises(ValueError) as caught:
        model_config({**READABLE[kind], "model_type": new_name})
    text = str(caught.value)
    assert f"model_type '{new_name}' is not supported; supported are {', '.join(FAMILIES)}" in text
    named = re.search(r'write "model_type": "(\w+)"', text)
    assert named, text                             # and the suggested row can be read
    model_config({**READABLE[kind], "model_type": named[1]})
    if kind in ("gemma2", "chatglm", "qwen3_moe", "baichuan", "qwen2"):
        assert named[1] == kind


def test_a_family_that_differs_in_more_than_its_name():
    mamba = dict(model_type="mamba2", hidden_size=64, state_size=16, num_hidden_layers=2,
                 vocab_size=100, conv_kernel=4)
    with pytest.raises(
        ValueError, match="'mamba2' is not supported; supported are llama, .*docs/add_a_family.md"
    ):
        model_config(mamba)
    with pytest.raises(ValueError) as caught:
        model_config({**READABLE["llama"], "model_type": "granito", "block_multiplier": 0.22})
    assert '"model_type":' not in str(caught.value)                 # no misleading advice


# ---- two settings of the rotation in one config.json ----

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MORE_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
OLD_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
TWO_ROPES = {       # taken as transformers takes them
    "theta on top": dict(rope_parameters=MORE_ROPE, rope_scaling=OLD_YARN, rope_theta=1000000.0),
    "theta in scaling": dict(rope_parameters=MORE_ROPE,
                             rope_scaling={**OLD_YARN, **{"rope_theta": 1000000.0}}),
    "theta is the default": dict(rope_parameters=PLAIN_ROPE, rope_scaling=OLD_YARN,
                                 rope_theta=10000.0),
    "scaling says default": dict(rope_parameters={**OLD_YARN, "rope_theta": 500.0},
                                 rope_scaling={"rope_type": "default"}, rope_theta=500.0),
    "empty scaling": dict(rope_parameters={**OLD_YARN, "rope_theta": 500.0}, rope_scaling={},
                          rope_theta=9.0),
    "null scaling": dict(rope_parameters={**OLD_YARN, "rope_theta": 500.0}, rope_scaling=None),
    "empty parameters": dict(rope_parameters={}, rope_scaling=OLD_YARN, rope_theta=500.0),
    "trained length on top": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0},
                                  rope_theta=500.0,
                                  original_max_position_embeddings=16),
    "two trained lengths": dict(rope_scaling={**LLAMA3_ROPE}, rope_theta=500.0,
                                original_max_position_embeddings=40),
    "two types": dict(rope_scaling={**OLD_YARN, "type": "linear"}, rope_theta=500.0),
    "a factor without a type": dict(rope_scaling={"factor": 4.0}, rope_theta=500.0),
}
ROPE_FAMILIES = ["qwen3", "llama", "mistral", "qwen2 yarn", "gemma2", "glm", "mixtral", "olmo2",
                 "llama4_text"]


def spelled_anew(made, name, folder, fields):
    """A checkpoint of CASES with these settings of the rotation in the place of its own."""
    source, config, ids, _ = made(name)
    kept = {key: value for key, value in config.items()
            if key not in ("rope_parameters", "rope_theta", "rope_scaling")}
    kept["pad_token_id"] = None         # some have one outside this small vocabulary
    (folder / "config.json").write_text(json.dumps({**kept, **fields}))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return folder, ids


@pytest.mark.parametrize("setting", TWO_ROPES)
@pytest.mark.parametrize("name", ROPE_FAMILIES)
def test_two_settings_of_the_rotation_are_read_as_transformers_does(name, setting, made, tmp_path):
    transformers = pytest.importorskip("transformers")
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 reads rope_scaling only")
    folder, ids = spelled_anew(made, name, tmp_path, TWO_ROPES[setting])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ours = load_model(folder)
    with torch.no_grad():
        assert (ours.logits(ours(ids)) - theirs(ids).logits).abs().max() < CLOSE
    both = TWO_ROPES[setting].get("rope_scaling") and TWO_ROPES[setting].get("rope_parameters")
    said = [note for note in ours.config.notes if "rope_scaling is used, as in" in note]
    assert bool(said) == bool(both)


@pytest.mark.parametrize("fields, words", [
    (dict(rope_parameters=MORE_ROPE, rope_scaling=OLD_YARN),
     "rope_parameters and rope_scaling contradict each other.*"
     "rope_theta is 10000.0, and rope_parameters says 1000000.0"),
    (dict(rope_parameters=MORE_ROPE, rope_scaling=OLD_YARN, rope_theta=500.0),
     "contradict each other.*is 500.0"),
    (dict(rope_parameters={**PLAIN_ROPE, "partial_rotary_factor": 0.5}, rope_scaling=OLD_YARN),
     "contradict each other.*partial_rotary_factor is not set, and rope_parameters says 0.5"),
    (dict(rope_parameters={"full_attention": MORE_ROPE}),
     "rope_parameters: full_attention: .* each kind of layer"),
    (dict(rope_parameters={**MORE_ROPE, "partial_rotary_factor": 0.5}),
     "not supported: 'partial_rotary_factor': 0.5"),
])
def test_two_settings_of_the_rotation_that_would_be_a_trap(fields, words):
    with pytest.raises(ValueError, match=words):
        model_config({**READABLE["llama"], **fields})


def test_phi3s_trained_length_outside_of_rope_scaling_has_a_default(made, tmp_path):
    """As in transformers 5: 4096, whatever rope_scaling says."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    scaling = longrope(4, original_max_position_embeddings=16, factor=4.0)
    folder, ids = spelled_anew(made, "phi3", tmp_path, dict(rope_scaling=scaling, rope_theta=500.0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ours = load_model(folder)
    with torch.no_grad():
        assert (ours.logits(ours(ids)) - theirs(ids).logits).abs().max() < CLOSE


# ---- fields of other types, and out of bounds ----


@pytest.mark.parametrize("change, words", [
    ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 is not between 1 and 2,000"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"hidden_size": 10**18}, "hidden_size: 1000000000000000000 is not between 1 and"),
    ({"vocab_size": -5}, "vocab_size: -5 is not above 0"),
    ({"head_dim": 10**9}, "head_dim"),
    ({"head_dim": 7}, "rotates 7 features; it must be an even number"),
    ({"num_attention_heads": True}, "num_attention_heads: true is not a whole number"),
    ({"hidden_size": [32]}, "is not a whole number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: NaN"),
    ({"initializer_range": float("inf")}, "initializer_range: Infinity"),
    ({"rope_theta": 0}, "rope_theta: 0 is not between"),
    ({"rope_theta": -1e4}, "rope_theta"),
    ({"rope_theta": "10000"}, 'rope_theta: "10000" is not a number'),
    ({"sliding_window": "5"}, "sliding_window.*whole number"),
    ({"use_sliding_window": "no"}, "use_sliding_window.*is not true or false"),
    ({"attention_bias": 1}, "attention_bias: 1 is not true or false"),
    ({"layer_types": [[], {}, 1]}, "layer_types: .* is not a list of texts"),
    ({"layer_types": 3}, "layer_types: 3 is not a list of texts"),
    ({"hidden_act": ["silu"]}, "hidden_act: .* is not text"),
    ({"torch_dtype": ["float16"]}, "torch_dtype: .* is not text"),
    ({"eos_token_id": "2"}, "eos_token_id: \"2\" is not a token id"),
    ({"eos_token_id": [2, None]}, "eos_token_id"),
    ({"rope_scaling": {"type": "linear", "factor": "x"}},
     'rope_scaling: factor: "x" is not a number'),
    ({"rope_scaling": {"type": "yarn", "factor": -4.0}},
     "rope_scaling: factor: -4.0 is not between"),
    ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "rope_scaling: factor: 0 is not between"),
    ({"rope_scaling": {"rope_type": ["yarn"], "factor": 4}},
     "rope_scaling: rope_type: .* is not text"),
    ({"rope_parameters": {"type": {}}}, "rope_parameters: type: .* is not text"),
    ({"rope_scaling": {**OLD_YARN, "original_max_position_embeddings": 0}},
     "original_max_position_embeddings: 0"),
    ({"rope_scaling": longrope(3, original_max_position_embeddings=16)},
     "short_factor has 3 numbers, and 8 rotated"),
    ({"rope_scaling": {**longrope(4), "long_factor": "4"}},
     'long_factor: "4" is not a list of numbers'),
    ({"rope_scaling": {**longrope(4), "long_factor": [1, 2, 0, 3]}},
     "long_factor: .* holds 0, which is not between"),
])
def test_types_and_bounds_of_config_json(change, words):
    with pytest.raises(ValueError, match=f"config.json: .*{words}|{words}"):
        model_config({**READABLE["qwen3"], "head_dim": 8, **change})


@pytest.mark.parametrize("kind, change, words", [
    ("qwen3_moe", {"num_experts": 10**9}, "num_experts"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: 0 is not above 0"),
    ("qwen3_moe", {"mlp_only_layers": {"a": 1}}, "mlp_only_layers: .* is not a list of numbers"),
    ("qwen3_moe", {"mlp_only_layers": ["0"]},
     'mlp_only_layers: .* holds "0", which is not a whole number'),
    ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size: 0 is not above 0"),
    ("llama4_text", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
    ("llama4_text", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step"),
    ("llama4_text", {"floor_scale": 0}, "floor_scale"),
    ("chatglm", {"layernorm_epsilon": "x"}, "layernorm_epsilon.*is not a number"),
    ("chatglm", {"multi_query_group_num": 0}, "multi_query_group_num: 0 is not above 0"),
    ("chatglm", {"rope_ratio": -1}, "rope_ratio"), ("chatglm", {"num_layers": 10**8}, "num_layers"),
    ("qwen", {"kv_channels": 1.5}, "kv_channels: 1.5 is not a whole number"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
    ("olmo", {"clip_qkv": 0}, "clip_qkv"),
    ("glm", {"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
])
def test_types_and_bounds_of_some_families(kind, change, words):
    with pytest.raises(ValueError, match=words):
        model_config(changed(kind, change))


ODD_VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 10**18, 10**400, 0.5, -4.0, 1e300,
              float("nan"), float("inf"), "", "x",
              "8", "\0", [], {}, [1], ["x"], [[]], {"a": 1}, {"rope_type": "yarn"}, [None] * 50,
    "é" * 300]


def mutations(raw, draw):
    """Endless copies of a config.json with one to three fields changed, removed or added."""
    while True:
        copy = json.loads(json.dumps(raw))
        for _ in range(draw.randint(1, 3)):
            part = copy
            inner = [value for value in copy.values() if isinstance(value, dict) and value]
            if inner and draw.random() < 0.5:
                part = draw.choice(inner)
            name = draw.choice(list(part))
            if draw.random() < 0.1:
                del part[name]
            elif draw.random() < 0.1:
                part[draw.choice(["rope_scaling", "layer_types", "head_dim",
                                  "mlp_only_layers"])] = draw.choice(ODD_VALUES)
            else:
                part[name] = draw.choice(ODD_VALUES)
            if not copy:
                break
        yield copy


@pytest.mark.parametrize("kind", usual(FAMILIES, "llama", "gemma3", "qwen3_moe", "deepseek_v3",
                                       "qwen3_next", "nemotron_h", "gpt_oss", "baichuan"))
def test_any_config_json_is_a_model_config_or_a_sentence_within_a_second(kind):
    """Mutations of a family's config.json, and of all recorded ones, with a fixed seed."""
    draw = random.Random(FAMILIES[kind].norm + kind)
    sources = [changed(kind, {"rope_scaling": dict(OLD_YARN)}), READABLE[kind]]
    for folder in sorted((GOLDEN / "models").glob("*/config.json")):
        raw = json.loads(folder.read_text())
        sources += [raw] if raw["model_type"] == kind else []
    accepted = 0
    for raw in sources:
        for mutant in islice(mutations(raw, draw), 200):
            start = time.process_time()
            try:
                config = model_config(mutant, "here/config.json")
            except ValueError as error:
                assert str(error).startswith("here/config.json"), (mutant, error)
            else:
                accepted += 1
                if config.num_hidden_layers < 50:
                    count(config)
                    if not config.alibi:
                        table = rope_frequencies(config, 50)[0]
                        assert table.isfinite().all(), mutant
            assert time.process_time() - start < 1, mutant
    assert accepted


@pytest.mark.parametrize("part", ["vision_config", "audio_config", "thinker_config"])
def test_a_model_that_reads_images_or_sound_says_so(part):
    with pytest.raises(ValueError, match="'some_vl' also reads images or sound, which"):
        model_config({"model_type": "some_vl", part: {}, "text_config": {}})
