"""A decoder as llama.cpp computes it: the graph that fits, its tensors and its metadata.

llama.cpp computes each architecture by a graph of its own, which its file names. The row of GRAPHS
is chosen by the decoder's switches (families.py): a graph fits if it computes just that. Many
families are Llama with other names, with q, k, v or gate and up in one matrix, or with other pairs
of features that are rotated; checkpoint/gguf_tensors.py cuts their matrices and reorders their rows
to Llama's, so that a graph fits that every version of llama.cpp has.

Requires: families.py, rope.py.
Next: checkpoint/gguf_tensors.py.
Source: the graphs of llama.cpp in llama-cpp-python 0.3.36.
"""
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from families import ModelConfig, Switches
from rope import rope_frequencies

ANY = ()                    # a graph computes all values of a switch
BIASES = {"qkv_bias": ANY, "o_bias": ANY, "mlp_bias": ANY}
# families differ in these, and the file is written so that the graph need not know
WRITTEN_OUT = {"fused_qkv": ANY, "fused_gate_up": ANY, "normalized_head": ANY, "rotary_pairs": ANY,
               "tie_word_embeddings": ANY, "attn_scale": ANY}
NO_EXPERTS = {"norm_topk_prob": ANY, "router": ANY, "shared_expert_gate": ANY}     # not looked at
RMS = ("rms", "rms wide", "rms+1")      # the offset 1 is added to the stored weights
TANH = ("gelu_pytorch_tanh",)
# dynamic and ntk_steps scale the rotation beyond the trained length only: see length_computed
ROPE_TYPES = ("default", "linear", "yarn", "dynamic", "ntk_steps")
UNREAD_ROPE = ("attention_factor", "truncate")
YARN_WEIGHTS = ("mscale", "mscale_all_dim")     # read for latent attention, where they are equal
LAYERS_OF_LITE = (26, 27)           # the deepseek2 graph takes such a model for one with q_proj
GATES = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True)
class Graph:
    """One graph. allows: the values of switches beside Llama's that it computes."""
    arch: str
    families: tuple = ()                # their own graph: looked at first
    allows: dict = field(default_factory=dict)
    rotary_pairs: str = "halves"
    rope_types: tuple = ROPE_TYPES
    experts: bool = False
    windows: int = 0                    # a window in all layers but every n-th; 0: no windows
    rope_in_windows: bool = False       # layers without a window are not rotated
    states_scales: bool = False         # of embeddings, scores, residuals and logits: its metadata
    square: bool = False                # heads together are as wide as the model
    tied: bool | None = None            # None: with or without a head of its own
    dense_first: bool = False           # layers without experts come before those with experts
    mixer: str = "attention"
    post_norm: bool = False             # the norm before the MLP is post_attention_norm
    fused_gate_up: bool = False         # gate and up are one tensor, ffn_up


LLAMA = {**BIASES, "norm": RMS}
# experts as in DeepSeek V3, beside a shared one; groups are judged by their two best experts
DEEPSEEK = {"router": ANY, "router_float32": ANY, "selection_bias": ANY, "norm_topk_prob": ANY,
            "routed_scale": ANY, "expert_groups": ANY, "top_groups": ANY, "group_score": ANY}
GEMMA = {"norm": RMS, "embed_scale": ANY, "hidden_act": TANH}
GRAPHS = (
    Graph("qwen2", families=("qwen2",), allows={"qkv_bias": (True,)}, square=True),
    Graph("llama", allows=LLAMA, rotary_pairs="neighbors", rope_types=(*ROPE_TYPES, "llama3")),
    Graph("llama", allows={**LLAMA, "norm_topk_prob": (True,)}, experts=True,
          rotary_pairs="neighbors", rope_types=(*ROPE_TYPES, "llama3")),
    Graph("qwen2moe", allows={"qkv_bias": (True,), "shared_expert_gate": (True,)}, experts=True,
          square=True, tied=False),
    Graph("qwen3", allows={"qk_norm": ("head",)}),
    Graph("qwen3moe", allows={"qk_norm": ("head",), "norm_topk_prob": (True,)}, experts=True,
          tied=False),
    Graph("gemma", allows=GEMMA, tied=True),
    Graph("gemma2", windows=2, tied=True,
          allows={**GEMMA, "norm_place": ("both",), "attn_softcap": ANY, "final_softcap": ANY}),
    Graph("gemma3", windows=6, tied=True,
          allows={**GEMMA, "norm_place": ("both",), "qk_norm": ("head",),
                  "window_rope_theta": ANY}),
    Graph("cohere2", windows=4, rope_in_windows=True, tied=True, rotary_pairs="neighbors",
          allows={"norm": ("layer weight",), "parallel_mlp": (True,), "qkv_bias": ANY,
                  "logit_scale": ANY}),
    Graph("granite", states_scales=True, rotary_pairs="neighbors",
          allows={**LLAMA, "embed_scale": ANY, "residual_scale": ANY, "logit_scale": ANY}),
    Graph("chatglm", rotary_pairs="neighbors", fused_gate_up=True,
          allows={"qkv_bias": ANY, "partial_rotary_factor": ANY}),
    Graph("glm4", rotary_pairs="neighbors", fused_gate_up=True,
          allows={"norm_place": ("both",), "qkv_bias": ANY, "partial_rotary_factor": ANY}),
    Graph("glm4moe", experts=True, dense_first=True, post_norm=True,
          allows={**DEEPSEEK, "qkv_bias": ANY, "qk_norm": ("", "head"),
                  "partial_rotary_factor": ANY}),
    Graph("deepseek2", experts=True, dense_first=True, rotary_pairs="neighbors",
          mixer="latent attention", rope_types=("default", "yarn"),
          allows={**DEEPSEEK, "rotary_dim": ANY}),
    Graph("olmo2", square=True, tied=False,
          allows={"norm": RMS, "norm_place": ("after",), "qk_norm": ("width",)}),
    Graph("olmo", rotary_pairs="neighbors", square=True,
          allows={"norm": ("layer",), "clip_qkv": ANY}),
)


# ---- the graph that fits ------------------------------------------------------------------------


def find_graph(config: ModelConfig) -> Graph:
    """The graph that computes this decoder. Raises ValueError that says what none computes."""
    ordered = sorted(GRAPHS, key=lambda graph: config.model_type not in graph.families)
    misfits = []
    for graph in ordered:
        if graph.families and config.model_type not in graph.families:
            continue
        found = list(differences(graph, config))
        if not found:
            return graph
        other_kind = graph.experts != any(config.sparse)
        misfits.append((other_kind, len(found), graph.arch, found))
    _, _, nearest, found = min(misfits)
    raise ValueError(
        f"export_format: no graph of llama.cpp computes this {config.model_type} model: the "
        f"nearest, {nearest}, lacks {', '.join(found)}. Leave export_format out")


def differences(graph: Graph, config: ModelConfig) -> Iterable[str]:
    """What the graph does not compute of a decoder, in words."""
    allowed = {**WRITTEN_OUT, **({} if graph.experts else NO_EXPERTS), **graph.allows}
    for switch in fields(Switches):
        value = getattr(config, switch.name)
        values = allowed.get(switch.name, (switch.default,))
        if switch.name == "attn_temperature" and value[:1] == ("log",):
            continue                                    # 1 up to length_computed
        if values is not ANY and value not in values:
            yield f"{switch.name}: {value}"
    if others := sorted(set(config.mixers) - {graph.mixer, "none"}):
        yield f"layers of {' and '.join(others)}"
    if graph.mixer == "latent attention":
        yield from differences_of_latents(graph, config)
    elif unread := config.rope.keys() & {*UNREAD_ROPE, *YARN_WEIGHTS}:
        yield f"rope setting {min(unread)}"
    by_width = config.embed_scale == config.hidden_size ** 0.5
    if "embed_scale" in graph.allows and not (by_width or graph.states_scales):
        yield f"embed_scale: {config.embed_scale}"
    if "attn_softcap" in graph.allows and None in (config.attn_softcap, config.final_softcap):
        yield "scores and logits without a soft cap"
    if config.rope["rope_type"] not in graph.rope_types:
        yield f"rope type {config.rope['rope_type']}"
    rotated = [bool(window) for window in windows_of(graph, config)] if graph.rope_in_windows else \
        [True] * config.num_hidden_layers
    if any(config.chunks) or rotated != [*config.use_rope]:
        yield "layers without rotation or with chunks"
    has_window = config.windows[0] is not None
    if graph.windows and not (has_window and config.windows == windows_of(graph, config)):
        yield f"windows in other layers than all but every {graph.windows}th"
    yield from differences_of_experts(graph, config)
    if graph.square and config.num_attention_heads * config.head_dim != config.hidden_size:
        yield "heads that are together not as wide as the model"
    if graph.tied and not config.tie_word_embeddings:
        yield "a head of its own"


def differences_of_experts(graph: Graph, config: ModelConfig) -> Iterable[str]:
    """What the graph does not compute of a mixture of experts."""
    sparse, shared = config.sparse, config.shared_expert_intermediate_size
    if not graph.experts:
        if any(sparse):
            yield "experts"
        return
    if not any(sparse) or not (all(sparse) or graph.dense_first):
        yield "layers without experts"
    elif list(sparse) != sorted(sparse):
        yield "layers without experts after such with experts"
    if graph.dense_first:
        if not shared or shared % config.moe_intermediate_size:
            yield "a mixture without shared experts"
        if config.expert_groups > 1 and config.group_score != "two best":
            yield f"group_score: {config.group_score}"
    elif shared and graph.arch != "qwen2moe":
        yield "a shared expert"


def differences_of_latents(graph: Graph, config: ModelConfig) -> Iterable[str]:
    """What the graph does not compute of latent attention."""
    rope = config.rope
    if config.rotary_pairs != graph.rotary_pairs:
        yield f"rotary_pairs: {config.rotary_pairs}"
    if unread := rope.keys() & {*UNREAD_ROPE}:
        yield f"rope setting {min(unread)}"
    weights = [rope.get(name) for name in YARN_WEIGHTS]
    if rope["rope_type"] == "yarn" and (not weights[0] or weights[0] != weights[1]):
        yield f"yarn with mscale {weights[0]} and mscale_all_dim {weights[1]}"
    if config.q_lora_rank and config.num_hidden_layers in LAYERS_OF_LITE:
        yield f"q_lora_rank in a model of {config.num_hidden_layers} layers"


def query_factor(graph: Graph, config: ModelConfig) -> float:
    """What queries are multiplied by, so that the graph's own scale of scores is the decoder's."""
    if config.attn_scale is None or graph.states_scales or graph.mixer == "latent attention":
        return 1.0
    width = config.head_dim
    if (graph.arch, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62)):      # of 27B
        width = config.hidden_size // config.num_attention_heads
    return config.attn_scale * width ** 0.5


def windows_of(graph: Graph, config: ModelConfig) -> tuple:
    """The windows of a decoder that has that of its layer 0 where the graph has one."""
    return tuple(config.windows[0] if (layer + 1) % graph.windows else None
                 for layer in range(config.num_hidden_layers))


# ---- metadata -----------------------------------------------------------------------------------


def graph_metadata(graph: Graph, config: ModelConfig) -> dict:
    """The sizes of a decoder, as its graph reads them."""
    experts_width = config.moe_intermediate_size
    narrow = graph.arch == "llama" and graph.experts
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": length_computed(graph, config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": experts_width if narrow else config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.rotated_features,
        "rope.freq_base": config.rope_theta,
    }
    if graph.experts:
        values |= {"expert_count": config.num_experts,
                   "expert_used_count": config.num_experts_per_tok,
                   "expert_feed_forward_length": experts_width}
    if graph.dense_first:
        values |= deepseek_metadata(config)
    elif config.shared_expert_intermediate_size and graph.experts:
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if graph.windows:
        values["attention.sliding_window"] = config.windows[0]
    if config.window_rope_theta:
        values["rope.freq_base_swa"] = config.window_rope_theta
    if config.attn_softcap:
        values |= {"attn_logit_softcapping": float(config.attn_softcap),
                   "final_logit_softcapping": float(config.final_softcap)}
    if config.norm == "layer":
        values["attention.layer_norm_epsilon"] = 1e-5
    elif config.norm == "layer weight":
        values["attention.layer_norm_epsilon"] = float(config.rms_norm_eps)
    values |= scale_metadata(graph, config)
    if config.clip_qkv:
        values["attention.clamp_kqv"] = float(config.clip_qkv)
    values |= rope_metadata(config.rope)
    return {f"{graph.arch}.{name}": value for name, value in values.items()}


def deepseek_metadata(config: ModelConfig) -> dict:
    """The experts of DeepSeek V3, and latent attention."""
    values = {
        "leading_dense_block_count": config.sparse.index(True),
        "expert_shared_count":
            config.shared_expert_intermediate_size // config.moe_intermediate_size,
        "expert_gating_func": GATES[config.router],
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": float(config.routed_scale),
    }
    if config.expert_groups > 1:
        values |= {"expert_group_count": config.expert_groups,
                   "expert_group_used_count": config.top_groups}
    if config.kv_lora_rank:             # computed as one key/value head of latents
        values |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": config.q_lora_rank,
            "attention.kv_lora_rank": config.kv_lora_rank,
            "attention.key_length": config.kv_lora_rank + config.rotary_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.head_dim,
            "attention.value_length_mla": config.v_head_dim,
        }
    return values


def scale_metadata(graph: Graph, config: ModelConfig) -> dict:
    """The constant factors that a graph reads; Granite's divides the logits."""
    if graph.states_scales:
        return {"logit_scale": 1 / config.logit_scale,
                "residual_scale": float(config.residual_scale),
                "embedding_scale": float(config.embed_scale),
                "attention.scale": float(config.attn_scale or config.head_dim ** -0.5)}
    if "logit_scale" in graph.allows:
        return {"logit_scale": float(config.logit_scale)}
    return {}


def length_computed(graph: Graph, config: ModelConfig) -> int:
    """Tokens up to which the graph computes the decoder: beyond, it has no window, no scaling."""
    lengths = [config.max_position_embeddings]
    if not graph.windows:
        lengths += [size for size in config.windows if size]
    if config.rope["rope_type"] in ("dynamic", "ntk_steps"):
        lengths.append(config.rope["original_max_position_embeddings"])
    if config.attn_temperature:
        lengths.append(config.attn_temperature[1])
    return min(lengths)


def rope_metadata(rope: dict) -> dict:
    """The settings of a scaled rotation."""
    if rope["rope_type"] not in ("linear", "yarn"):
        return {}
    values = {"rope.scaling.type": rope["rope_type"],
              "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for name in ("beta_fast", "beta_slow"):
            if name in rope:
                values[f"rope.scaling.yarn_{name}"] = float(rope[name])
        if weight := rope.get("mscale_all_dim"):        # the graph multiplies it by 10
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * weight
    return values


def llama3_divisors(config: ModelConfig) -> torch.Tensor | None:
    """What the frequencies of a Llama 3.1 rotation are divided by, (R/2,); None for others."""
    if config.rope["rope_type"] != "llama3":
        return None
    plain = replace(config, rope={"rope_type": "default"})
    length = config.max_position_embeddings
    return rope_frequencies(plain, length)[0] / rope_frequencies(config, length)[0]
