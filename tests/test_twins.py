"""The slow twins against recorded logits and transformers, and the decoder against the twins.

Requires: twins.py.
Next: test_model.py, for families that transformers has.
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.load import load_model
from checkpoint.read_config import model_config
from model import KVCache
from tests import twins
from tests.common import GOLDEN, needs_shared
from tests.twins import (BAICHUAN1_7B, BAICHUAN1_13B, BAICHUAN2_7B, BAICHUAN2_13B, CHATGLM3,
                         GLM4_ORIGINAL, INTERNLM2, QWEN1, QWEN1_72B, TWINS, XVERSE)

CLOSE = 1e-4        # float32 against float64 of these sizes differs by some 1e-5

# name: (config.json, changes, tokens)
CASES = {
    "xverse": (XVERSE, {}, 24),
    "xverse tied, 8 heads": (XVERSE, {"tie_word_embeddings": True, "num_attention_heads": 8}, 24),
    "xverse grouped, biases, base": (
        XVERSE, {"num_key_value_heads": 2, "bias": True, "rope_theta": 500000}, 24
    ),
    "internlm2": (INTERNLM2, {}, 20),
    "internlm2 longer": (INTERNLM2, {}, 40),
    "internlm2 dynamic, factor 1": (
        INTERNLM2, {"rope_scaling": {"type": "dynamic", "factor": 1.0}}, 40
    ),
    "internlm2 linear": (INTERNLM2, {"rope_scaling": {"type": "linear", "factor": 4.0}}, 30),
    "internlm2 no scaling": (INTERNLM2, {"rope_scaling": None, "rope_theta": 10000}, 40),
    "internlm2 biases": (INTERNLM2, {"bias": True}, 12),
    "internlm2 tied, 8 over 2": (INTERNLM2, {"tie_word_embeddings": True, "num_attention_heads": 8},
                                 12),
    "internlm2 4 over 4": (INTERNLM2, {"num_key_value_heads": 4}, 12),
    "internlm2 4 over 1": (INTERNLM2, {"num_key_value_heads": 1, "num_hidden_layers": 3}, 12),
    "baichuan2 7b": (BAICHUAN2_7B, {}, 24),
    "baichuan2 7b, 8 heads": (BAICHUAN2_7B, {"num_attention_heads": 8, "rms_norm_eps": 1e-5}, 24),
    "baichuan2 13b": (BAICHUAN2_13B, {}, 40),
    "baichuan2 13b, 8 heads": (BAICHUAN2_13B, {"num_attention_heads": 8}, 24),
    "baichuan2 13b, 3 heads": (BAICHUAN2_13B, {"num_attention_heads": 3}, 24),
    "baichuan2 13b, 12 heads": (BAICHUAN2_13B, {"num_attention_heads": 12}, 24),
    "baichuan1 7b": (BAICHUAN1_7B, {}, 12),
    "baichuan1 13b": (BAICHUAN1_13B, {}, 12),
    "chatglm3": (CHATGLM3, {}, 24),
    "chatglm3-32k": (CHATGLM3, {"rope_ratio": 50, "seq_length": 32768}, 40),
    "chatglm3 wide heads": (
        CHATGLM3, {"kv_channels": 32, "num_attention_heads": 6, "multi_query_group_num": 3}, 24
    ),
    "chatglm3 one group": (CHATGLM3, {"multi_query_group_num": 1}, 24),
    "chatglm3 no biases": (CHATGLM3, {"add_qkv_bias": False}, 12),
    "chatglm3 all biases": (CHATGLM3, {"add_bias_linear": True}, 12),
    "glm4 original": (GLM4_ORIGINAL, {}, 40),
    "glm4 original 1m": (
        GLM4_ORIGINAL, {"rope_ratio": 10000, "multi_query_group_num": 4, "num_attention_heads": 8},
        40,
    ),
    "qwen1": (QWEN1, {}, 12),
    "qwen1 longer": (QWEN1, {}, 13),
    "qwen1 double": (QWEN1, {}, 24),
    "qwen1 triple": (QWEN1, {}, 40),
    "qwen1 longer, no ntk": (QWEN1, {"use_dynamic_ntk": False}, 40),
    "qwen1 longer, no log-n": (QWEN1, {"use_logn_attn": False}, 40),
    "qwen1 longer, neither": (QWEN1, {"use_logn_attn": False, "use_dynamic_ntk": False}, 40),
    "qwen1 tied": (QWEN1, {"tie_word_embeddings": True}, 12),
    "qwen1 all biases, 8 heads": (QWEN1,
                                  {"no_bias": False, "num_attention_heads": 8, "kv_channels": 8},
                                  20),
    "qwen1 longer, half of each head turns": (QWEN1, {"rotary_pct": 0.5}, 30),
    "qwen1 72b": (QWEN1_72B, {}, 24),
}


def case(name, seed=0):
    """(config, weights, ids, the twin's logits function) of a row of CASES."""
    config, changes, length = CASES[name]
    config = {**config, **changes}
    shapes, logits = TWINS[config["model_type"]]
    weights = twins.random_weights(shapes(config), seed)
    words = config.get("padded_vocab_size") or config["vocab_size"]
    return config, weights, torch.randint(0, words, (length,),
                                          generator=torch.Generator().manual_seed(seed)), logits


def load(folder, config, weights):
    save_file(weights, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    return load_model(folder, torch.float32)


# ---- the decoder against the twins ---------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_decoder_equals_twin(name, seed, tmp_path):
    config, weights, ids, twin = case(name, seed)
    model = load(tmp_path, config, weights)
    assert (model.logits(model(ids[None]))[0] - twin(config, weights, ids)).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["qwen1", "qwen1 triple"])
def test_training_uses_neither_ntk_nor_log_n(name, tmp_path):
    config, weights, ids, twin = case(name)
    model = load(tmp_path, config, weights).train()
    assert (
        (model.logits(model(ids[None]))[0] - twin(config, weights, ids, training=True)).abs().max()
        < CLOSE
    )


@pytest.mark.parametrize(
    "name", ["internlm2 longer", "baichuan2 7b", "baichuan2 13b", "chatglm3", "qwen1 triple"]
)
def test_cached_decoding_equals_twin(name, tmp_path):
    """A prompt in one pass, then token by token.

    Where the base depends on the length, all stay in its first step.
    """
    config, weights, ids, twin = case(name)
    config = {**config,
              **{key: 32 for key in ("seq_length", "max_position_embeddings") if key in config}}
    model, cache = load(tmp_path, config, weights), KVCache(2)
    ids = ids[:30]
    parts = [model(part[None], cache=cache) for part in ids.split([9] + [1] * (len(ids) - 9))]
    assert (model.logits(torch.cat(parts, 1))[0] - twin(config, weights, ids)).abs().max() < CLOSE


@pytest.mark.parametrize("prompt", [8, 20])
def test_qwen1_keeps_the_base_of_the_prompt(prompt, tmp_path):
    """Cached keys were rotated with the base of the prompt; the vendor's code uses it for what
    follows, too."""
    config, weights, ids, twin = case("qwen1 triple")
    model, cache = load(tmp_path, config, weights), KVCache(2)
    parts = [model(part[None], cache=cache)
             for part in ids.split([prompt] + [1] * (len(ids) - prompt))]
    assert (
        model.logits(torch.cat(parts, 1))[0] - twin(config, weights, ids, prompt=prompt)
    ).abs().max() < CLOSE


@pytest.mark.parametrize("config, change", [
    (CHATGLM3, {"rmsnorm": False}), (CHATGLM3, {"post_layer_norm": False}),
    (CHATGLM3, {"pre_seq_len": 8}),
    (CHATGLM3, {"multi_query_attention": False}),
    (CHATGLM3, {"apply_residual_connection_post_layernorm": True}),
    (QWEN1, {"scale_attn_weights": False}),
    (INTERNLM2, {"rope_scaling": {"type": "spiral", "factor": 2.0}}),
], ids=lambda part: ", ".join(part) if len(part) == 1 else part["model_type"])
def test_variants_of_no_published_checkpoint_are_refused(config, change):
    model_config(config)
    with pytest.raises(ValueError, match=next(iter(change)) + "|spiral"):
        model_config({**config, **change})


# ---- the twins against recorded logits and transformers ------------------------------------------


@needs_shared
@pytest.mark.parametrize("name", ["chatglm3", "baichuan2_7b", "baichuan2_13b", "xverse"])
def test_twin_equals_the_recorded_logits(name):
    folder = GOLDEN / "models" / name
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    want, (shapes, twin) = load_file(folder / "expected.safetensors"), TWINS[config["model_type"]]
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == shapes(config)
    for ids, mask, logits in zip(want["input_ids"], want["attention_mask"], want["logits"]):
        real = int(mask.sum())  # padded on the right
        assert (twin(config, weights, ids[:real]) - logits[:real]).abs().max() < CLOSE


def llama_body(weights, names, split):
    """The weights under Llama's names. names: {part of the vendor's name: part of Llama's}; split:
    separates a fused qkv."""
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed |= split(name, tensor) if ".qkv." in name else {name: tensor}
    return {name: tensor for name, tensor in renamed.items() if "inv_freq" not in name}


def three_parts(name, tensor):
    return {name.replace("qkv", f"{part}_proj"): rows for part, rows in zip("qkv", tensor.chunk(3))}


def peer_logits(transformers, kind, weights, ids, **fields):
    """Logits of a transformers class with these weights, without missing or unexpected ones."""
    config = transformers.AutoConfig.for_model(kind, **fields)
    config._attn_implementation = "eager"
    peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    result = peer.load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys
               if name != "lm_head.weight" or not config.tie_word_embeddings]
    assert not missing and not result.unexpected_keys, result
    with torch.no_grad():
        return peer(ids[None]).logits[0]


def sizes(config, **more):
    """The fields of config.json that transformers' Llama has under the same name."""
    known = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
             "num_key_value_heads", "vocab_size", "rms_norm_eps", "tie_word_embeddings",
             "rope_theta", "rope_scaling", "max_position_embeddings")
    return {**{key: config[key] for key in known if config.get(key) is not None}, **more}


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("xverse", "internlm2", "baichuan2 7b"))]
)
def test_twin_equals_llama_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    config, weights, ids, twin = case(name)
    H = config["num_attention_heads"]
    K = config.get("num_key_value_heads", config["num_attention_heads"])

    def groups(name, tensor):
        parts = tensor.unflatten(0, (K, H // K + 2, -1))
        rows = {"q": parts[:, :-2].flatten(0, 2), "k": parts[:, -2].flatten(0, 1),
                "v": parts[:, -1].flatten(0, 1)}
        return {name.replace("qkv", f"{part}_proj"): rows[part] for part in "qkv"}

    names = {"tok_embeddings": "embed_tokens", "attention.wqkv": "self_attn.qkv",
             "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "W_pack": "qkv",
             "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
             "feed_forward.w2": "mlp.down_proj", "output.weight": "lm_head.weight"}
    body = llama_body(weights, names,
                      groups if config["model_type"] == "internlm2" else three_parts)
    if config["model_type"] == "baichuan":
        body["lm_head.weight"] = torch.nn.functional.normalize(body["lm_head.weight"])
    peer = peer_logits(transformers, "llama", body, ids,
                       **sizes(config, attention_bias=bool(config.get("bias"))))
    assert (twin(config, weights, ids) - peer).abs().max() < CLOSE


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("chatglm", "glm4"))
                                  and "all biases" not in name])
def test_twin_equals_glm_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    config, weights, ids, twin = case(name)
    wide, few = (config["kv_channels"] * config[key]
                 for key in ("num_attention_heads", "multi_query_group_num"))

    def split(name, tensor):
        return {name.replace("qkv", f"{part}_proj"): rows
                for part, rows in zip("qkv", tensor.split([wide, few, few]))}

    names = {"transformer.embedding.word_embeddings": "model.embed_tokens",
             "transformer.output_layer": "lm_head",
             "transformer.encoder.final_layernorm": "model.norm", "transformer.encoder": "model",
             "self_attention.query_key_value": "self_attn.qkv",
             "self_attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.gate_up_proj",
             "mlp.dense_4h_to_h": "mlp.down_proj"}
    fields = sizes(config, intermediate_size=config["ffn_hidden_size"],
                   vocab_size=config["padded_vocab_size"], num_hidden_layers=config["num_layers"],
                   num_key_value_heads=config["multi_query_group_num"],
                   head_dim=config["kv_channels"], rms_norm_eps=config["layernorm_epsilon"],
                   partial_rotary_factor=0.5, rope_theta=10000.0 * config.get("rope_ratio", 1),
                   attention_bias=config["add_qkv_bias"], pad_token_id=0)
    peer = peer_logits(transformers, "glm", llama_body(weights, names, split), ids, **fields)
    assert (twin(config, weights, ids) - peer).abs().max() < CLOSE


@pytest.mark.parametrize("name, base", [
    ("qwen1", 10000.0), ("qwen1 tied", 10000.0), ("qwen1 longer, neither", 10000.0),
    ("qwen1 72b", 1000000.0),
    ("qwen1 longer, no log-n", 10000.0 * 7 ** (16 / 14)),  # 40 tokens, trained on 12: alpha 2^3 - 1
])
def test_twin_equals_qwen2_of_transformers(name, base):
    """Qwen 1.5 and 2 are the same network under Llama's names, without the two changes beyond the
    trained length."""
    transformers = pytest.importorskip("transformers")
    config, weights, ids, twin = case(name)
    names = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
             "transformer.h": "model.layers", "attn.c_attn": "self_attn.qkv",
             "attn.c_proj": "self_attn.o_proj", "ln_1": "input_layernorm",
             "ln_2": "post_attention_layernorm", "mlp.w2": "mlp.gate_proj", "mlp.w1": "mlp.up_proj",
             "mlp.c_proj": "mlp.down_proj"}
    fields = sizes(config, intermediate_size=config["intermediate_size"] // 2, rope_theta=base,
                   num_key_value_heads=config["num_attention_heads"],
                   rms_norm_eps=config["layer_norm_epsilon"])
    peer = peer_logits(transformers, "qwen2", llama_body(weights, names, three_parts), ids,
                       **fields)
    assert (twin(config, weights, ids) - peer).abs().max() < CLOSE


@pytest.mark.parametrize("heads", [1, 3, 6, 8, 12, 40])
def test_slopes_equal_those_of_bloom(heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    # (heads, 1, 2)
    biases = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)
    assert torch.allclose(biases[:, 0, 1], torch.tensor(twins.alibi_slopes(heads)))


@pytest.mark.parametrize("length, alpha",
                         [(1, 1), (12, 1), (13, 3), (24, 3), (25, 7), (48, 7), (49, 15)])
def test_qwen1_alpha_by_length(length, alpha):
    assert twins.qwen1_base(QWEN1, length) == pytest.approx(10000 * alpha ** (16 / 14))


@pytest.mark.parametrize("name, change", [
    ("internlm2 longer", {"rope_scaling": None}),
    ("internlm2 dynamic, factor 1", {"rope_scaling": None}),
    ("baichuan2 7b", {"vocab_size": 64000}), ("baichuan2 13b", {"max_position_embeddings": 128}),
    ("chatglm3-32k", {"rope_ratio": 1}), ("glm4 original", {"rope_ratio": 1}),
    ("qwen1 72b", {"rotary_emb_base": 1e4}),
    ("qwen1 longer", {"use_logn_attn": False}), ("qwen1 longer", {"use_dynamic_ntk": False}),
], ids=lambda part: part if isinstance(part, str) else next(iter(part)))
def test_each_detail_changes_the_logits(name, change):
    """Else a decoder that ignores it would pass."""
    config, weights, ids, twin = case(name)
    assert ((twin(config, weights, ids) - twin({**config, **change}, weights, ids)).abs().max()
            > 100 * CLOSE)
