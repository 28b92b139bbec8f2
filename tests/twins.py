"""Slow twins: families that transformers has no class for, from their vendors' descriptions.

The decoder (model.py) is one network with switches. Here is the opposite: one straight function per
family, in float64, one sequence at a time, with loops over heads and positions. None of the
decoder's code is used, so an error of one does not hide in the other. xverse_logits is plain Llama;
read it first and compare the others with it.

    *_logits(config, weights, ids) -> (T, V)    with config and weights of the vendor's files
    *_shapes(config) -> {tensor name: shape}    of such a checkpoint; random_weights fills it

Requires: model.py.
Next: test_twins.py, which compares the twins with recorded logits and the decoder with the twins.
Sources: the modeling files that the vendors publish with the weights of Baichuan-7B,
Baichuan2-13B, chatglm3-6b, glm-4v-9b, internlm2-7b, Qwen-7B and Qwen-72B, and vllm's version of
XVERSE-7B's; RoPE arXiv:2104.09864, ALiBi arXiv:2108.12409, Qwen arXiv:2309.16609, Baichuan 2
arXiv:2309.10305.
"""
import math

import torch


# ---- functions of several families ---------------------------------------------------------------


def rmsnorm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def silu(x):
    return x / (1 + (-x).exp())


def linear(x, w, name):
    """x times the matrix `name`, plus its bias where the checkpoint has one."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def inverse_frequencies(dim, base):
    """Angles in radians per token of the dim/2 feature pairs: base^(-2i/dim)."""
    return torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)


def rotate_pairs(x, first, second, inv_freq):
    """Rotary positions: rotate the feature pairs (first[i], second[i]) of x (T, heads, Dh) by
    position * inv_freq[i]."""
    rotated = x.clone()
    for position in range(len(x)):
        cos, sin = (position * inv_freq).cos(), (position * inv_freq).sin()
        a, b = x[position, :, first], x[position, :, second]
        rotated[position, :, first] = a * cos - b * sin
        rotated[position, :, second] = b * cos + a * sin
    return rotated


def rotate_halves(x, inv_freq):
    """As Llama does: of n pairs, feature i is paired with feature i + n; the rest is unchanged."""
    n = len(inv_freq)
    return rotate_pairs(x, list(range(n)), list(range(n, 2 * n)), inv_freq)


def rotate_neighbors(x, inv_freq):
    """As the RoPE paper does: features 0 and 1 are a pair, 2 and 3, …; the rest is unchanged."""
    n = len(inv_freq)
    return rotate_pairs(x, list(range(0, 2 * n, 2)), list(range(1, 2 * n, 2)), inv_freq)


def attend(q, k, v, slopes=None):
    """Causal attention of q (T, H, Dh) over k, v (T, K, Dh) -> (T, H*Dh); each key/value head
    serves H/K query heads. slopes: one per query head; the score of a key grows by slope * its
    position (ALiBi)."""
    T, H, Dh = q.shape
    out = torch.zeros_like(q)
    for head in range(H):
        shared = head // (H // k.shape[1])
        for t in range(T):
            scores = k[:t + 1, shared] @ q[t, head] / math.sqrt(Dh)
            if slopes is not None:
                scores = scores + slopes[head] * torch.arange(t + 1)
            weights = (scores - scores.max()).exp()
            out[t, head] = weights / weights.sum() @ v[:t + 1, shared]
    return out.flatten(1)


def double(weights):
    return {name: tensor.double() for name, tensor in weights.items()}


def random_weights(shapes, seed):
    """Weights under which every part matters: norms about 1, biases about 0.5, logits of a few
    units."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            weights[name] = 0.5 * noise
        elif len(shape) == 1:
            weights[name] = 1 + 0.2 * noise
        else:
            embedding = "embed" in name or "wte" in name
            weights[name] = noise if embedding else 1.5 * noise / math.sqrt(shape[1])
    return weights


def with_biases(shapes, *endings):
    """The shapes, and a bias for each matrix whose name without .weight has
    one of these endings."""
    biases = {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()
              if name.removesuffix(".weight").endswith(endings)}
    return {**shapes, **biases}


# ---- XVERSE: plain Llama -------------------------------------------------------------------------

XVERSE = {"architectures": ["XverseForCausalLM"],
          "auto_map": {"AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM"},
          "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1, "hidden_act": "silu",
          "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 112,
          "max_position_embeddings": 128, "max_tokenizer_truncation": 128, "model_type": "xverse",
          "num_attention_heads": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-06,
          "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.30.2",
          "use_cache": True, "vocab_size": 320}


def xverse_shapes(config):
    D, ffn, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    few = D // config["num_attention_heads"] * config.get(
        "num_key_value_heads", config["num_attention_heads"]
    )
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for n in range(config["num_hidden_layers"]):
        block = {"input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (few, D),
                 "self_attn.v_proj": (few, D), "self_attn.o_proj": (D, D),
                 "post_attention_layernorm": (D,),
                 "mlp.gate_proj": (ffn, D), "mlp.up_proj": (ffn, D), "mlp.down_proj": (D, ffn)}
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return (with_biases(shapes, "q_proj", "k_proj", "v_proj", "o_proj") if config.get("bias")
            else shapes)


def xverse_logits(config, weights, ids):
    """RMSNorm before each half of a block, rotary positions on the whole head in halves, SwiGLU.

    No biases.
    """
    w, eps = double(weights), config["rms_norm_eps"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    inv_freq = inverse_frequencies(head_dim, config.get("rope_theta", 10000.0))
    x = w["model.embed_tokens.weight"][ids]  # (T, D)
    for n in range(config["num_hidden_layers"]):
        block = f"model.layers.{n}"
        h = rmsnorm(x, w[f"{block}.input_layernorm.weight"], eps)
        q, k, v = (linear(h, w, f"{block}.self_attn.{name}_proj").unflatten(1, (-1, head_dim))
                   for name in "qkv")
        x = x + linear(attend(rotate_halves(q, inv_freq), rotate_halves(k, inv_freq), v), w,
                       f"{block}.self_attn.o_proj")
        h = rmsnorm(x, w[f"{block}.post_attention_layernorm.weight"], eps)
        gate, up = linear(h, w, f"{block}.mlp.gate_proj"), linear(h, w, f"{block}.mlp.up_proj")
        x = x + linear(silu(gate) * up, w, f"{block}.mlp.down_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return linear(rmsnorm(x, w["model.norm.weight"], eps), w, head)


# ---- InternLM2: Llama with q, k and v shuffled into one matrix -----------------------------------

INTERNLM2 = {"architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager",
             "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config",
                          "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
                          "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
             "bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
             "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
             "intermediate_size": 112, "max_position_embeddings": 24, "model_type": "internlm2",
             "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
             "pretraining_tp": 1, "rms_norm_eps": 1e-05,
             "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000,
             "tie_word_embeddings": False, "torch_dtype": "bfloat16",
             "transformers_version": "4.41.0", "use_cache": True, "vocab_size": 320}


def internlm2_shapes(config):
    D, ffn, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.tok_embeddings.weight": (V, D), "model.norm.weight": (D,)}
    for n in range(config["num_hidden_layers"]):
        block = {"attention_norm": (D,), "attention.wqkv": ((H + 2 * K) * D // H, D),
                 "attention.wo": (D, D),
                 "ffn_norm": (D,), "feed_forward.w1": (ffn, D), "feed_forward.w3": (ffn, D),
                 "feed_forward.w2": (D, ffn)}
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (V, D)
    return with_biases(shapes, "wqkv", "wo") if config["bias"] else shapes


def internlm2_inverse_frequencies(config, length):
    """Linear: all angles divided by the factor.

    Dynamic: a larger base for sequences beyond the trained length.
    """
    dim, base = config["hidden_size"] // config["num_attention_heads"], config["rope_theta"]
    kind = (config["rope_scaling"] or {}).get("type")
    factor = (config["rope_scaling"] or {}).get("factor")
    trained = config["max_position_embeddings"]
    if kind == "dynamic" and length > trained:
        base = base * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    return inverse_frequencies(dim, base) / (factor if kind == "linear" else 1)


def internlm2_logits(config, weights, ids):
    """wqkv holds, for each key/value head in turn, the query heads it serves, then its key, then
    its value."""
    w, eps = double(weights), config["rms_norm_eps"]
    D, H, K = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    inv_freq = internlm2_inverse_frequencies(config, len(ids))
    x = w["model.tok_embeddings.weight"][ids]  # (T, D)
    for n in range(config["num_hidden_layers"]):
        block = f"model.layers.{n}"
        h = rmsnorm(x, w[f"{block}.attention_norm.weight"], eps)
        groups = linear(h, w, f"{block}.attention.wqkv").unflatten(1, (K, H // K + 2, D // H))
        # (T, heads, Dh)
        q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        x = x + linear(attend(rotate_halves(q, inv_freq), rotate_halves(k, inv_freq), v), w,
                       f"{block}.attention.wo")
        h = rmsnorm(x, w[f"{block}.ffn_norm.weight"], eps)
        gate = linear(h, w, f"{block}.feed_forward.w1")
        up = linear(h, w, f"{block}.feed_forward.w3")
        x = x + linear(silu(gate) * up, w, f"{block}.feed_forward.w2")
    head = "model.tok_embeddings" if config["tie_word_embeddings"] else "output"
    return linear(rmsnorm(x, w["model.norm.weight"], eps), w, head)


# ---- Baichuan 1 and 2: a normalized head, and ALiBi in the 13B -----------------------------------

BAICHUAN2_7B = {"architectures": ["BaichuanForCausalLM"],
                "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig",
                             "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
                "tokenizer_class": "BaichuanTokenizer", "bos_token_id": 1, "eos_token_id": 2,
                "pad_token_id": 0, "hidden_act": "silu", "hidden_size": 64,
                "initializer_range": 0.02, "intermediate_size": 112, "max_position_embeddings": 128,
                "model_max_length": 128, "model_type": "baichuan", "num_attention_heads": 4,
                "num_hidden_layers": 2, "rms_norm_eps": 1e-06, "_from_model_config": True,
                "tie_word_embeddings": False, "torch_dtype": "bfloat16",
                "transformers_version": "4.29.2", "use_cache": True, "vocab_size": 320}
# no max_position_embeddings, which distinguishes the two sizes in the published files
BAICHUAN2_13B = {
    **{key: value for key, value in BAICHUAN2_7B.items() if key != "max_position_embeddings"},
    "hidden_size": 96, "num_attention_heads": 6, "gradient_checkpointing": False,
    "z_loss_weight": 0,
}
# the first generation, known by its vocabulary of 64000, has a plain head in both sizes
BAICHUAN1_7B = {**BAICHUAN2_7B, "architectures": ["BaiChuanForCausalLM"], "vocab_size": 64000,
                "hidden_size": 32}
BAICHUAN1_13B = {**BAICHUAN2_13B, "vocab_size": 64000, "hidden_size": 48}


def baichuan_shapes(config):
    D, ffn, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for n in range(config["num_hidden_layers"]):
        block = {"input_layernorm": (D,), "self_attn.W_pack": (3 * D, D),
                 "self_attn.o_proj": (D, D),
                 "post_attention_layernorm": (D,), "mlp.gate_proj": (ffn, D),
                 "mlp.up_proj": (ffn, D),
                 "mlp.down_proj": (D, ffn)}
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in block.items()}
        # a redundant buffer
        if config["vocab_size"] == 64000 and "max_position_embeddings" in config:
            shapes[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = (
                D // config["num_attention_heads"] // 2,
            )
    return {**shapes, "lm_head.weight": (V, D)}


def alibi_slopes(heads):
    """2^(-8i/p) for i = 1…p, p the largest power of two in `heads`; for the rest every other slope
    of 2p heads."""
    p = 2 ** math.floor(math.log2(heads))
    return [2 ** (-8 * i / p) for i in range(1, p + 1)] + [
        2 ** (-8 * (2 * i + 1) / (2 * p)) for i in range(heads - p)
    ]


def baichuan_logits(config, weights, ids):
    """W_pack holds all queries, all keys, all values. Rows of Baichuan 2's head are normalized."""
    w, eps, H = double(weights), config["rms_norm_eps"], config["num_attention_heads"]
    rotary = "max_position_embeddings" in config
    inv_freq = inverse_frequencies(config["hidden_size"] // H, 10000.0)
    x = w["model.embed_tokens.weight"][ids]  # (T, D)
    for n in range(config["num_hidden_layers"]):
        block = f"model.layers.{n}"
        h = rmsnorm(x, w[f"{block}.input_layernorm.weight"], eps)
        # (T, H, Dh)
        q, k, v = linear(h, w, f"{block}.self_attn.W_pack").unflatten(1, (3, H, -1)).unbind(1)
        if rotary:
            mixed = attend(rotate_halves(q, inv_freq), rotate_halves(k, inv_freq), v)
        else:
            mixed = attend(q, k, v, alibi_slopes(H))
        x = x + linear(mixed, w, f"{block}.self_attn.o_proj")
        h = rmsnorm(x, w[f"{block}.post_attention_layernorm.weight"], eps)
        gate, up = linear(h, w, f"{block}.mlp.gate_proj"), linear(h, w, f"{block}.mlp.up_proj")
        x = x + linear(silu(gate) * up, w, f"{block}.mlp.down_proj")
    head = w["lm_head.weight"]
    if config["vocab_size"] != 64000:
        head = head / head.norm(dim=1, keepdim=True)
    return rmsnorm(x, w["model.norm.weight"], eps) @ head.T


# ---- ChatGLM2, ChatGLM3 and the original GLM-4: half of each head is rotated, in neighboring pairs

CHATGLM3 = {
    "architectures": ["ChatGLMModel"], "_name_or_path": "THUDM/chatglm3-6b",
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig",
                 "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "classifier_dropout": None,
    "eos_token_id": 2, "pad_token_id": 0, "ffn_hidden_size": 88, "fp32_residual_connection": False,
    "hidden_dropout": 0.0, "hidden_size": 64, "kv_channels": 16, "layernorm_epsilon": 1e-05,
    "model_type": "chatglm", "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 4, "num_layers": 2, "original_rope": True, "padded_vocab_size": 320,
    "post_layer_norm": True, "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0,
    "rmsnorm": True, "seq_length": 128, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.30.2", "use_cache": True,
}
GLM4_ORIGINAL = {  # layers and vocabulary have two names each
    **CHATGLM3, "architectures": ["ChatGLMModel"], "_name_or_path": "THUDM/glm-4-9b-chat",
    "rope_ratio": 500,
    "layernorm_epsilon": 1.5625e-07, "num_hidden_layers": 2, "vocab_size": 320, "seq_length": 4096,
    "eos_token_id": [17, 21, 23], "pad_token_id": 17, "torch_dtype": "bfloat16",
}


def chatglm_shapes(config):
    D, ffn, V = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    wide, few = (config["kv_channels"] * config[key]
                 for key in ("num_attention_heads", "multi_query_group_num"))
    shapes = {"transformer.embedding.word_embeddings.weight": (V, D),
              # a redundant buffer
              "transformer.rotary_pos_emb.inv_freq": (config["kv_channels"] // 4,),
              "transformer.encoder.final_layernorm.weight": (D,),
              "transformer.output_layer.weight": (V, D)}
    for n in range(config["num_layers"]):
        block = {"input_layernorm": (D,), "self_attention.query_key_value": (wide + 2 * few, D),
                 "self_attention.dense": (D, wide), "post_attention_layernorm": (D,),
                 "mlp.dense_h_to_4h": (2 * ffn, D), "mlp.dense_4h_to_h": (D, ffn)}
        shapes |= {f"transformer.encoder.layers.{n}.{name}.weight": shape
                   for name, shape in block.items()}
    if config["add_bias_linear"]:
        return with_biases(shapes, "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return with_biases(shapes, "query_key_value") if config["add_qkv_bias"] else shapes


def chatglm_logits(config, weights, ids):
    """query_key_value holds all queries, the keys of all groups, their values; dense_h_to_4h the
    gate, then up."""
    w, eps, head_dim = double(weights), config["layernorm_epsilon"], config["kv_channels"]
    H, G = config["num_attention_heads"], config["multi_query_group_num"]
    inv_freq = inverse_frequencies(head_dim // 2, 10000.0 * config.get("rope_ratio", 1))
    x = w["transformer.embedding.word_embeddings.weight"][ids]  # (T, D)
    for n in range(config["num_layers"]):
        block = f"transformer.encoder.layers.{n}"
        h = rmsnorm(x, w[f"{block}.input_layernorm.weight"], eps)
        heads = linear(h, w, f"{block}.self_attention.query_key_value").unflatten(1, (-1, head_dim))
        q, k, v = heads[:, :H], heads[:, H:H + G], heads[:, H + G:]  # (T, heads, Dh)
        mixed = attend(rotate_neighbors(q, inv_freq), rotate_neighbors(k, inv_freq), v)
        x = x + linear(mixed, w, f"{block}.self_attention.dense")
        h = rmsnorm(x, w[f"{block}.post_attention_layernorm.weight"], eps)
        gate, up = linear(h, w, f"{block}.mlp.dense_h_to_4h").chunk(2, dim=1)
        x = x + linear(silu(gate) * up, w, f"{block}.mlp.dense_4h_to_h")
    return linear(rmsnorm(x, w["transformer.encoder.final_layernorm.weight"], eps), w,
                  "transformer.output_layer")


# ---- Qwen 1: beyond the trained length, a larger base and longer queries -------------------------

QWEN1 = {  # as Qwen-7B
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig",
                 "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False,
    "hidden_size": 64,
    "intermediate_size": 224, "initializer_range": 0.02, "kv_channels": 16,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 128, "model_type": "qwen", "no_bias": True, "num_attention_heads": 4,
    "num_hidden_layers": 2, "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 12, "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0", "use_cache": True, "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True, "vocab_size": 320,
}
QWEN1_72B = {  # other sizes, the dropout of pretraining, and fields without effect
    **QWEN1, "attn_dropout_prob": 0.1, "bf16": True, "emb_dropout_prob": 0.1,
    "layer_norm_epsilon": 1e-05,
    "padded_vocab_size": 320, "params_dtype": "torch.bfloat16", "rope_theta": 1000000,
    "rotary_emb_base": 1000000,
    "softmax_in_fp32": False, "tokenizer_type": "QWenTokenizer", "torch_dtype": "bfloat16",
    "use_cache_kernel": False,
    "use_cache_quantization": False, "use_dynamic_ntk": False, "use_flash_attn": False,
    "use_logn_attn": False,
}


def qwen1_shapes(config):
    D, ffn, V = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    shapes = {"transformer.wte.weight": (V, D), "transformer.ln_f.weight": (D,)}
    for n in range(config["num_hidden_layers"]):
        block = {"ln_1": (D,), "attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "ln_2": (D,),
                 "mlp.w1": (ffn, D), "mlp.w2": (ffn, D), "mlp.c_proj": (D, ffn)}
        shapes |= {f"transformer.h.{n}.{name}.weight": shape for name, shape in block.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return with_biases(shapes, "c_attn", *(() if config["no_bias"] else ("c_proj", "w1", "w2")))


def qwen1_base(config, length):
    """The rotary base times alpha^(d/(d-2)): alpha is 1 up to seq_length, 3 up to its double, then
    7, 15, …"""
    dim = int(config["kv_channels"] * config["rotary_pct"])
    alpha = max(1, 2 ** math.ceil(math.log2(length / config["seq_length"]) + 1) - 1)
    return config["rotary_emb_base"] * alpha ** (dim / (dim - 2))


def qwen1_logits(config, weights, ids, training=False, prompt=None):
    """c_attn holds all queries, all keys, all values; the ffn is half of intermediate_size wide and
    w2 is its gate. Both changes beyond the trained length act outside training only. prompt: how
    many of the ids went through the network in one pass before the others followed one by one; the
    base remains that of the prompt."""
    w, eps, H = double(weights), config["layer_norm_epsilon"], config["num_attention_heads"]
    stretch = config["use_dynamic_ntk"] and not training
    base = qwen1_base(config, prompt or len(ids)) if stretch else config["rotary_emb_base"]
    inv_freq = inverse_frequencies(int(config["kv_channels"] * config["rotary_pct"]), base)
    longer = torch.ones(len(ids), 1, 1, dtype=torch.float64)
    if config["use_logn_attn"] and not training:
        for seen in range(config["seq_length"] + 1, len(ids) + 1):  # tokens up to this one
            longer[seen - 1] = math.log(seen) / math.log(config["seq_length"])
    x = w["transformer.wte.weight"][ids]  # (T, D)
    for n in range(config["num_hidden_layers"]):
        block = f"transformer.h.{n}"
        h = rmsnorm(x, w[f"{block}.ln_1.weight"], eps)
        # (T, H, Dh)
        q, k, v = linear(h, w, f"{block}.attn.c_attn").unflatten(1, (3, H, -1)).unbind(1)
        mixed = attend(rotate_halves(q, inv_freq) * longer, rotate_halves(k, inv_freq), v)
        x = x + linear(mixed, w, f"{block}.attn.c_proj")
        h = rmsnorm(x, w[f"{block}.ln_2.weight"], eps)
        up, gate = linear(h, w, f"{block}.mlp.w1"), linear(h, w, f"{block}.mlp.w2")
        x = x + linear(up * silu(gate), w, f"{block}.mlp.c_proj")
    head = "transformer.wte" if config["tie_word_embeddings"] else "lm_head"
    return linear(rmsnorm(x, w["transformer.ln_f.weight"], eps), w, head)


# model_type: (what a checkpoint holds, what the network computes)
TWINS = {
    "xverse": (xverse_shapes, xverse_logits), "internlm2": (internlm2_shapes, internlm2_logits),
    "baichuan": (baichuan_shapes, baichuan_logits), "chatglm": (chatglm_shapes, chatglm_logits),
    "qwen": (qwen1_shapes, qwen1_logits),
}
