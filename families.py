"""Families of models: ModelConfig, which describes a decoder, and one row per family.

What a checkpoint states is taken from its config.json, under the same names, by
checkpoint/read_config.py. What a family does without stating it there is a row of FAMILIES: the
switches are named for what they do, and the decoder (model.py) looks only at switches, never at a
family's name.

    python -m checkpoint.show DIR          shows the result for a checkpoint

Requires: errors.py.
Next: model.py, which builds what is described here; docs/add_a_family.md, to add a row.
Sources, beside the rows: the technical reports; the fields and tensor names of the published
checkpoints.
"""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from errors import shown


# ---- differences from Llama ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The differences the decoder supports. The defaults are plain Llama (arXiv:2302.13971)."""

    # projections
    fused_qkv: str = ""             # "blocks": one matrix, all q rows, all k, all v;
                                    # "groups": per key/value head its q heads, its k, its v
    fused_gate_up: bool = False     # gate and up are one matrix, gate first
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False          # gate, up and down
    ungated_mlp: bool = False       # MLPs and experts: act(up(x)) instead of act(gate(x)) * up(x)
    clip_qkv: float | None = None   # q, k and v are clamped to [-clip, clip]
    output_gate: bool = False       # q_proj has a gate beside q in each head; the head's output is
                                    # multiplied by its sigmoid
    conv_bias: bool = False         # a short convolution
    mixer_bias: bool = False        # the linear layers of a mixer with a short convolution
    fused_delta: bool = False       # a delta rule's q, k, v and z are one matrix, b and a another,
                                    # key head by key head

    # norms
    norm: str = "rms"               # a row of model.NORMS
    norm_place: str = "before"      # "before" attention and MLP, "after" them, or "both"
    qk_norm: str = ""               # "head": RMSNorm over each head of q and k;
                                    # "head rotated": the same, after the rotation;
                                    # "width": RMSNorm over all heads at once;
                                    # "unit": unit RMS per head, no weight, after the rotation

    # positions
    rotary_pairs: str = "halves"            # rotated pairs: features i and i + R/2,
                                            # or "neighbors" 2i and 2i + 1
    partial_rotary_factor: float = 1.0      # share of each head's features that are rotated
    window_rope_theta: float | None = None  # base of the rotation in layers with a window, where
                                            # no scaling applies; None: rotated as all layers are
    rotary_dim: int = 0                     # the number of those features; 0: by that share
    alibi: bool = False                     # no rotation, but a linear bias by distance
                                            # (arXiv:2108.12409)
    attn_temperature: tuple = ()            # queries are scaled by position:
                                            # ("log1p", scale, floor tokens), layers without rope;
                                            # ("log1p all", scale, floor tokens), all layers;
                                            # ("log", trained tokens), outside of training only

    # attention scores, MLP
    attn_softcap: float | None = None       # scores become cap * tanh(scores / cap)
    attn_scale: float | None = None         # scores are q.k times this; None: head_dim ** -0.5
    attn_sinks: bool = False                # a trained score per head in the denominator of every
                                            # softmax (arXiv:2508.10925)
    hidden_act: str = "silu"                # a row of layers.ACTIVATIONS
    conv_act: str = ""                      # of a state space's convolution; "": hidden_act

    # block, embedding and head
    parallel_mlp: bool = False              # attention and MLP read one norm, and both are added
    residual_scale: float = 1.0             # what attention and MLP add is multiplied by this
    embed_scale: float = 1.0                # embeddings are multiplied by this
    logit_scale: float = 1.0                # logits are multiplied by this
    normalized_head: bool = False           # rows of the head have length 1
    final_softcap: float | None = None      # logits become cap * tanh(logits / cap)
    tie_word_embeddings: bool = False       # the head is the embedding matrix

    # mixture of experts
    router: str = "softmax"                 # expert scores: "softmax" over all, or "sigmoid" each
    router_float32: bool = False            # the router's matrix product is in float32
    selection_bias: bool = False            # a constant per expert, added for the choice only
    expert_groups: int = 1                  # a token's experts come from the best of this many
                                            # groups of experts (arXiv:2405.04434, sec. 2.2.2)
    top_groups: int = 1                     # the number of groups they come from
    group_score: str = "best"               # a group is judged by its "best" expert, or by the
                                            # sum of its "two best"
    norm_topk_prob: bool = False            # scores of the chosen experts are scaled to sum to 1
    routed_scale: float = 1.0               # the chosen experts' weights are multiplied by this
    scale_input: bool = False               # scores multiply the expert's input, not its output
    shared_expert_gate: bool = False        # the shared expert's output is gated by a sigmoid
    router_bias: bool = False               # the router has a bias
    stacked_experts: str = ""               # all experts' matrices in one tensor, gate and up
                                            # fused: "in, out" (E, in, out), or "out, in"
    interleaved_gate_up: bool = False       # of stacked experts: gate and up alternate, gate first
    expert_bias: bool = False               # of stacked experts: gate, up and down
    swiglu_limit: float | None = None       # of stacked experts: gate and up are clamped to it, and
                                            # gate * sigmoid(swiglu_alpha * gate) * (up + 1)
    swiglu_alpha: float = 1.702             # (arXiv:2508.10925, sec. 2.2)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Switches):
    """The sizes and switches of a decoder, under the names of config.json.

    Sizes are counts of features, heads, layers or tokens.
    """

    model_type: str
    hidden_size: int                        # D
    intermediate_size: int                  # F
    num_hidden_layers: int
    num_attention_heads: int                # H
    num_key_value_heads: int                # K
    head_dim: int                           # Dh
    vocab_size: int                         # V
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope: dict = field(default_factory=lambda: {"rope_type": "default"})
    kv_lora_rank: int = 0                   # latent attention: numbers that keys and values are
                                            # made of; 0: projected keys and values
    q_lora_rank: int = 0                    # the same of queries; 0: projected queries
    v_head_dim: int = 0                     # features of a value
    conv_kernel: int = 0                    # kernel size of a short convolution, in tokens
    linear_num_key_heads: int = 0           # nk, heads of q and k of a mixer with a state
    linear_num_value_heads: int = 0         # nv, heads of v, each with a state of dk x dv numbers
    linear_key_head_dim: int = 0            # dk
    linear_value_head_dim: int = 0          # dv
    time_step_limit: tuple = (0.0, math.inf)        # bounds of a state space's time steps
    initializer_range: float = 0.02         # std of new weights (train_from_scratch)
    pad_token_id: int | None = None         # padding_idx of the embedding, as in transformers

    # one entry per layer
    mixers: tuple                           # rows of model.MIXERS; "none": an MLP alone
    windows: tuple                          # keys that a query sees, itself included; None = all
    chunks: tuple                           # chunked attention, tokens per chunk; None = all
    use_rope: tuple                         # rotate q and k?
    sparse: tuple                           # mixture of experts instead of one MLP? None: no MLP

    # experts
    num_experts: int = 0                    # E
    num_experts_per_tok: int = 0            # k
    moe_intermediate_size: int = 0          # width of one expert
    shared_expert_intermediate_size: int = 0        # width of the shared expert; 0 = none
    router_aux_loss_coef: float = 0.0       # weight of the balance loss in training

    # the checkpoint's files
    names: dict = field(default_factory=dict)
    prefix: str = ""
    in_transformers: dict = field(default_factory=dict)
    skips: tuple = ()
    notes: tuple = ()                       # printed for the user

    @property
    def rotated_features(self) -> int:
        """R, the features of each head that are rotated."""
        return self.rotary_dim or int(self.head_dim * self.partial_rotary_factor)

    @property
    def linear_value_width(self) -> int:
        """Numbers of a token's values, in all heads of a mixer with a state."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    def attends(self, layer: int) -> bool:
        """Whether a layer is attention of some kind, with keys and values of earlier tokens."""
        return self.mixers[layer] in ("attention", "latent attention")

    @property
    def has_states(self) -> bool:
        """Whether a layer reads earlier tokens through a state of fixed size."""
        return not set(self.mixers) <= {"attention", "latent attention", "none"}

    def stored_name(self, name: str) -> str:
        """The name of a parameter or module in the checkpoint's files."""
        if self.names:
            longest_first = sorted(self.names, key=len, reverse=True)
            pattern = r"(?<![^.])(" + "|".join(map(re.escape, longest_first)) + r")(?![^.])"
            name = re.sub(pattern, lambda found: self.names[found[0]], name)
        return self.prefix + name


# ---- the table -----------------------------------------------------------------------------------


def said(name: str, default=None) -> Callable:
    """For a row: the value of this field in config.json, or the default."""
    return lambda take: take(name, default)


def unless_null(name: str, default) -> Callable:
    """Like `said`, for a field that null switches off."""
    return lambda take: take(name, default, null=True)


@dataclass(frozen=True, kw_only=True)
class Family(Switches):
    """A row of FAMILIES: switches, and how to read the files.

    `take(field, default)` reads a field of config.json. A switch may be a function of `take`; the
    fields below `fixed` that are one per layer are functions of `take` and the layer.
    """

    called: dict = field(default_factory=dict)    # {field of ModelConfig: its name in config.json}
    absent: dict = field(default_factory=dict)    # {field: default where config.json omits it}
    fixed: dict = field(default_factory=dict)     # {field: the only value that is supported}
    without_effect: tuple = ()                    # fields that change nothing in this family
    num_hidden_layers: Callable = lambda take: take("num_hidden_layers", needed=True)
    layer_types: Callable = said("layer_types")
    linear_value_head_dim: Callable = said("linear_value_head_dim", 0)
    mixer_of: dict = field(default_factory=dict)  # {layer type: a mixer other than attention}
    windows: Callable = lambda take, layer: None
    chunks: Callable = lambda take, layer: None
    use_rope: Callable = lambda take, layer: True
    sparse: Callable = lambda take, layer: False
    rope_theta: Callable = said("rope_theta", 10000.0)
    rope_scaling: Callable = said("rope_scaling")
    default_rope: dict = field(default_factory=dict)      # rotation where config.json states none
    rope_alpha: bool = False                      # "dynamic" with alpha: a fixed, larger base
    tie_word_embeddings: Callable = said("tie_word_embeddings", False)
    hidden_act: Callable = said("hidden_act", "silu")
    latent: bool = False                          # multi-head latent attention
    intermediate_size: Callable = lambda take: take("intermediate_size", needed=True)
    names: dict = field(default_factory=dict)     # {part of a parameter's name: that in the files}
    prefix: str = ""                              # prefix of every name in the files
    in_transformers: dict = field(default_factory=dict)     # {prefix in the files: prefix in
                                                  # transformers 5 and in adapters}
    text_field: str = ""                          # field of config.json with the decoder's fields
    text_types: tuple = ()                        # rows that these may be read by, else this one
    tied_by_text: bool = False                    # tie_word_embeddings of text_config decides, not
                                                  # the one at the top level
    skips: tuple = ()                             # prefixes of tensors outside the decoder; or
                                                  # a function of take


def window_everywhere(take, layer):
    return take("sliding_window", null=True)


def window_if_switched_on(take, layer):
    """Qwen's window applies only with use_sliding_window, from layer max_window_layers on."""
    if take("use_sliding_window") and layer >= take("max_window_layers", 28):
        return take("sliding_window", null=True)
    return None


def window_on_even(take, layer):
    """With use_sliding_window: every second layer below max_window_layers."""
    even = layer % 2 == 0 and layer < take("max_window_layers", 28)
    return take("sliding_window", null=True) if take("use_sliding_window") and even else None


def window_of_qwen3_moe(take, layer):
    return take("sliding_window", null=True) if take("use_sliding_window") else None


def window_every_second(take, layer):
    return take("sliding_window", null=True) if layer % 2 == 0 else None


def is_sliding(take, layer, period=4):
    """Whether a layer has a window: by layer_types, or all but every `period`-th.

    sliding_window_pattern is the period, or letters that repeat: L for a window.
    """
    if kinds := take("layer_types"):
        return kinds[layer] == "sliding_attention"
    pattern = take("sliding_window_pattern") or period
    if isinstance(pattern, str):
        return pattern[layer % len(pattern)] == "L"
    return (layer + 1) % pattern != 0


def window_but_every(period):
    """A window in all layers but every `period`-th, see is_sliding."""
    def window(take, layer):
        return take("sliding_window", null=True) if is_sliding(take, layer, period) else None
    return window


def rope_where_window(take, layer):
    """Layers with a window are rotated; the others are not, unless no layer has one."""
    return not take("sliding_window", null=True) or is_sliding(take, layer)


def window_without_rope(take, layer):
    """With use_sliding_window: the layers that are not rotated have a window."""
    slides = take("use_sliding_window") and not rope_unless_listed(take, layer)
    return take("sliding_window") if slides else None


def window_theta(name: str, default=None) -> Callable:
    """The base of layers with a window: of their own rope_parameters, or of a field, which may
    stand in rope_parameters of all layers."""
    def read(take):
        rope, field = take("rope_parameters") or {}, take(name, default)
        of_window = rope.get("sliding_attention") or {}
        return of_window.get("rope_theta") or rope.get(name) or field
    return read


def sparse_by_step(take, layer):
    """Experts in every decoder_sparse_step-th layer, but in none of mlp_only_layers."""
    dense = take("mlp_only_layers") or ()
    step = take("decoder_sparse_step", 1)
    has_experts = bool(take("num_experts") or take("num_local_experts"))
    return has_experts and layer not in dense and (layer + 1) % step == 0


def sparse_by_interval(take, layer):
    """Experts in the layers of moe_layers, else in every interleave_moe_layer_step-th."""
    moe_layers = take("moe_layers")
    step = take("interleave_moe_layer_step", 1)
    return (layer + 1) % step == 0 if moe_layers is None else layer in moe_layers


def sparse_after_dense(take, layer):
    """Experts from layer first_k_dense_replace on."""
    return layer >= take("first_k_dense_replace", 1)


def sparse_by_types(take, layer):
    """Experts where mlp_layer_types says sparse; without it, as sparse_after_dense."""
    types = take("mlp_layer_types")
    if not types:
        return sparse_after_dense(take, layer)
    if len(types) != take("num_hidden_layers") or set(types) - {"sparse", "dense"}:
        raise ValueError(f"{take.where}: mlp_layer_types holds sparse or dense for each of the "
                         f"{take('num_hidden_layers')} layers, found {shown(types)}")
    return types[layer] == "sparse"


def layers_that_predict_ahead(take):
    """Prefixes of the layers for multi-token prediction, which come after the decoder's own."""
    count = take("num_hidden_layers", needed=True)
    return tuple(f"model.layers.{count + n}." for n in range(take("num_nextn_predict_layers", 0)))


def rotary_dim_of_minimax(take):
    """rotary_dim; 0 where only newer tools' partial_rotary_factor says it."""
    newer = (take("rope_parameters") or {}).get("partial_rotary_factor")
    return take("rotary_dim") or (0 if newer else 64)


def groups_if_limited(take):
    methods = {"greedy": 1, "group_limited_greedy": take("n_group", 1)}
    method = take("topk_method", "greedy")
    if method not in methods:
        raise ValueError(f"{take.where}: topk_method {shown(method)} is not supported; supported "
                         f"are {', '.join(methods)}")
    return methods[method]


def scale_with_yarn(take):
    """head_dim ** -0.5, and the temperature of yarn as a factor of both q and k."""
    width = take("qk_nope_head_dim", needed=True) + take("qk_rope_head_dim", needed=True)
    rope = take("rope_scaling") or take("rope_parameters") or take.family.default_rope
    weight, factor = rope.get("mscale_all_dim"), rope.get("factor") or 1
    if not weight or factor <= 1:
        return width ** -0.5
    return width ** -0.5 * (0.1 * weight * math.log(factor) + 1) ** 2


def rope_unless_listed(take, layer):
    """False where no_rope_layers holds a 0, or for every no_rope_layer_interval-th layer."""
    flags = take("no_rope_layers")
    interval = take("no_rope_layer_interval", 4)
    return bool(flags[layer]) if flags else (layer + 1) % interval != 0


def chunk_where_rope(take, layer):
    size = take("attention_chunk_size", null=True)
    return size if rope_unless_listed(take, layer) else None


def temperature_by_floor(take):
    temperature = ("log1p", take("attn_scale", 0.1), take("floor_scale", 8192))
    return temperature if take("attn_temperature_tuning", True) else ()


def temperature_by_log(take):
    temperature = ("log", take("seq_length", needed=True))
    return temperature if take("use_logn_attn", True) else ()


def temperature_by_beta(take):
    rope = take("rope_parameters") or take("rope_scaling") or take.family.default_rope
    beta = rope.get("llama_4_scaling_beta")
    return ("log1p all", beta, rope["original_max_position_embeddings"]) if beta else ()


def ntk_by_steps(take):
    length = take("seq_length", needed=True)
    rope = {"rope_type": "ntk_steps", "original_max_position_embeddings": length}
    return rope if take("use_dynamic_ntk", True) else None


def gelu_by_tanh(take):
    """The first Gemma files say "gelu" and mean its tanh form; hidden_activation is ignored."""
    take("hidden_activation")
    if take("hidden_act", "gelu") == "gelu":
        return "gelu_pytorch_tanh"
    return take("hidden_act")


def unit_norm_by_default(take):
    return "unit" if take("use_qk_norm", True) else ""


def full_attention_by_interval(take):
    """layer_types, or the delta rule in all but every full_attention_interval-th layer."""
    interval = take("full_attention_interval", 4)
    layers = range(1, take("num_hidden_layers", needed=True) + 1)
    return take("layer_types") or [
        "linear_attention" if layer % interval else "full_attention" for layer in layers]


def mamba_head_dim(take):
    """mamba_d_head; if "auto", mamba_expand * hidden_size divided by the number of heads."""
    width = take("mamba_expand", 2) * take("hidden_size", needed=True)
    heads = take("linear_num_value_heads")
    stated = take("mamba_d_head", "auto")
    size = width // heads if stated == "auto" else stated
    if type(size) is not int or size * heads != width:
        raise ValueError(f"{take.where}: mamba_n_heads {heads} of mamba_d_head {shown(stated)} are "
                         f"not mamba_expand * hidden_size = {width} numbers")
    return size


def time_step_limit(take):
    """Bounds of a state space's time steps; transformers 5 writes infinity as an object."""
    stored = take("time_step_limit") or (0.0, math.inf)
    if type(stored) not in (list, tuple):
        raise ValueError(f"{take.where}: time_step_limit: {shown(stored)} is not a pair of numbers")
    infinite = (None, {"__float__": "Infinity"})
    limits = tuple(math.inf if limit in infinite else limit for limit in stored)
    if len(limits) != 2 or any(type(x) not in (int, float) or not x >= 0 for x in limits):
        raise ValueError(f"{take.where}: time_step_limit: {shown(stored)} is not a pair of numbers")
    return limits


def state_spaces_by_default(take):
    return take("layer_types") or ["mamba"] * take("num_hidden_layers", needed=True)


LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def types_by_letters(take):
    """layers_block_type, or hybrid_override_pattern, a letter for each layer."""
    letters = take("hybrid_override_pattern")
    types = take("layer_types")
    if types is None and letters is None:
        raise ValueError(f"{take.where}: hybrid_override_pattern is missing: it has a letter for "
                         "each layer")
    if letters is None:
        return types
    if type(letters) is not str or not letters or set(letters) - set(LETTERS):
        raise ValueError(f"{take.where}: hybrid_override_pattern: {shown(letters)} is not made of "
                         "M (Mamba-2), * (attention), - (MLP) and E (experts)")
    layers = take("num_hidden_layers", len(letters))
    if layers != len(letters):
        raise ValueError(f"{take.where}: hybrid_override_pattern has {len(letters)} letters for "
                         f"num_hidden_layers: {layers}")
    stated = [LETTERS[letter] for letter in letters]
    older = {"mamba": "linear_attention", "attention": "full_attention"}
    if types and [older.get(kind, kind) for kind in types] != stated:
        raise ValueError(f"{take.where}: hybrid_override_pattern {letters} and layers_block_type "
                         "contradict each other. Keep one of the two")
    return stated


def sparse_by_letters(take, layer):
    """True: experts; False: an MLP; None: a mixer alone."""
    kinds = {"moe": True, "mlp": False}
    return kinds.get(types_by_letters(take)[layer])


def attention_where_listed(take):
    """layer_types, or attention in the layers of full_attn_idxs, else short convolutions."""
    listed = take("full_attn_idxs")
    layers = range(take("num_hidden_layers", needed=True))
    return take("layer_types") or [
        "full_attention" if listed is None or layer in listed else "conv" for layer in layers]


def adjusted_ff_dim(take):
    """Two thirds of intermediate_size, times a factor, rounded up to a multiple."""
    width = take("intermediate_size", needed=True)
    factor = take("block_ffn_dim_multiplier", 1.0, null=True)
    multiple = take("block_multiple_of", 256)
    if not take("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    return width if factor is None else -(-int(factor * width) // multiple) * multiple


def bias_by_no_bias(take):
    return not take("no_bias", True)


BIASED = dict(qkv_bias=said("attention_bias", False), o_bias=said("attention_bias", False))

SPARSE = dict(norm_topk_prob=said("norm_topk_prob", False), sparse=sparse_by_step)

GEMMA = dict(
    norm="rms+1", embed_scale=lambda take: take("hidden_size") ** 0.5,
    absent={"tie_word_embeddings": True, "head_dim": 256},
    **BIASED)

GLM = dict(
    rotary_pairs="neighbors",
    partial_rotary_factor=said("partial_rotary_factor", 0.5),
    fused_gate_up=True,
    qkv_bias=said("attention_bias", True),
    absent={"rms_norm_eps": 1.5625e-7, "head_dim": 128})

# experts chosen with a bias that balances them without a loss (arXiv:2412.19437, sec. 2.1.2)
BALANCED_BY_BIAS = dict(
    router="sigmoid", router_float32=True, selection_bias=True,
    expert_groups=said("n_group", 1), top_groups=said("topk_group", 1), group_score="two best",
    norm_topk_prob=said("norm_topk_prob", True),
    routed_scale=said("routed_scaling_factor", 1.0))

SHARED_EXPERTS = dict(                              # dense layers, then experts with shared ones
    sparse=sparse_after_dense,
    skips=layers_that_predict_ahead,
    called={"num_experts": "n_routed_experts"},
    names={"mlp.shared_expert": "mlp.shared_experts",
           "mlp.selection_bias": "mlp.gate.e_score_correction_bias"})

LATENT = dict(
    **BIASED, latent=True, attn_scale=scale_with_yarn,
    rotary_pairs=lambda take: "neighbors" if take("rope_interleave", True) else "halves")

DEEPSEEK3 = dict(
    **LATENT, **BALANCED_BY_BIAS, **SHARED_EXPERTS,
    fixed={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    absent={"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
            "first_k_dense_replace": 3, "n_shared_experts": 1, "q_lora_rank": 1536})

GATED_DELTA = dict(                                 # arXiv:2412.06464, beside gated attention
    **BIASED, norm="rms+1", qk_norm="head", output_gate=True,
    partial_rotary_factor=said("partial_rotary_factor", 0.25),
    layer_types=full_attention_by_interval, mixer_of={"linear_attention": "delta rule"},
    fixed={"attn_output_gate": True, "output_gate_type": "swish"},      # that of the delta rule
    called={"conv_kernel": "linear_conv_kernel_dim"},
    absent={"head_dim": 256, "conv_kernel": 4,
            "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "shared_expert_intermediate_size": 512},
    names={"linear_attn.o_proj": "linear_attn.out_proj"},
    skips=("mtp.",))                                # layers for multi-token prediction

QWEN3_5_MOE = GATED_DELTA | dict(
    norm_topk_prob=True, sparse=lambda take, layer: True, shared_expert_gate=True,
    called=GATED_DELTA["called"] | {"intermediate_size": "moe_intermediate_size"})

LLAMA4 = dict(                                      # the Llama 4 model card; only its text part
    **BIASED,
    rotary_pairs="neighbors", use_rope=rope_unless_listed,
    attn_temperature=temperature_by_floor,
    chunks=chunk_where_rope,
    qk_norm=unit_norm_by_default, fixed={"nope_layer_interval": 4},
    sparse=sparse_by_interval, router="sigmoid", scale_input=True, stacked_experts="in, out",
    called={"intermediate_size": "intermediate_size_mlp",
            "moe_intermediate_size": "intermediate_size",
            "shared_expert_intermediate_size": "intermediate_size"},
    absent={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "head_dim": 128,
            "attention_chunk_size": 8192},
    names={"mlp": "feed_forward",
           "mlp.gate": "feed_forward.router",
           "gate_up_proj.weight": "gate_up_proj",
           "experts.down_proj.weight": "experts.down_proj"})

NORM_AFTER = dict(                                  # attention and MLP, and before neither
    norm_place="after",
    names={"after_attention_norm": "post_attention_layernorm",
           "after_mlp_norm": "post_feedforward_layernorm"})

OLMO2 = dict(                                       # arXiv:2501.00656
    **BIASED, **NORM_AFTER, norm="rms wide", qk_norm="width")

GRANITE = dict(
    **BIASED, embed_scale=said("embedding_multiplier", 1.0),
    attn_scale=said("attention_multiplier", 1.0),
    residual_scale=said("residual_multiplier", 1.0),
    logit_scale=lambda take: 1 / take("logits_scaling", 1.0))

LFM2 = dict(                                        # arXiv:2511.23404
    qk_norm="head", conv_bias=said("conv_bias", False), mixer_bias=said("conv_bias", False),
    layer_types=attention_where_listed, mixer_of={"conv": "short convolution"},
    absent={"conv_kernel": 3, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True})
LFM2_CALLED = {"conv_kernel": "conv_L_cache", "rms_norm_eps": "norm_eps",
               "tie_word_embeddings": "tie_embedding"}
LFM2_NAMES = {"model.norm": "model.embedding_norm",
              "input_layernorm": "operator_norm", "post_attention_layernorm": "ffn_norm",
              "q_norm": "q_layernorm", "k_norm": "k_layernorm", "o_proj": "out_proj",
              "mlp": "feed_forward", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

GEMMA_NORMS = {"after_attention_norm": "post_attention_layernorm",
               "after_mlp_norm": "post_feedforward_layernorm",
               "post_attention_layernorm": "pre_feedforward_layernorm"}

MISTRAL_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
                "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}

IMAGES = dict(                                      # the decoder of a model that reads images
    text_field="text_config", prefix="language_model.",
    in_transformers={"language_model.model.": "model.language_model.",
                     "language_model.lm_head": "lm_head"},
    skips=("vision_tower.", "multi_modal_projector."))

FAMILIES = {
    "llama": Family(                                # arXiv:2302.13971; 1 to 3.3, Yi, R1 distills
        **BIASED, mlp_bias=said("mlp_bias", False)),
    "xverse": Family(qkv_bias=said("bias", False), o_bias=said("bias", False)),
    "mistral": Family(                              # arXiv:2310.06825
        windows=window_everywhere, absent={"sliding_window": 4096}),
    "mixtral": Family(                              # arXiv:2401.04088
        windows=window_everywhere, norm_topk_prob=True, sparse=lambda take, layer: True,
        absent={"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        names={"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "qwen2": Family(                                # arXiv:2407.10671; 1.5 and 2.5, QwQ
        qkv_bias=True, windows=window_if_switched_on, absent={"sliding_window": 4096}),
    "qwen3": Family(                                # arXiv:2505.09388
        **BIASED, qk_norm="head", windows=window_if_switched_on,
        absent={"head_dim": 128, "sliding_window": 4096}),
    "qwen2_moe": Family(
        qkv_bias=said("qkv_bias", True), windows=window_on_even, shared_expert_gate=True,
        **SPARSE, absent={"sliding_window": 4096}),
    "qwen3_moe": Family(
        **BIASED, qk_norm="head", **SPARSE, windows=window_of_qwen3_moe,
        fixed={"use_qk_norm": True},                # stated by Qwen3-Coder
        absent={"sliding_window": 4096}),
    "qwen": Family(                                 # Qwen 1, arXiv:2309.16609
        fused_qkv="blocks", qkv_bias=True, o_bias=bias_by_no_bias, mlp_bias=bias_by_no_bias,
        partial_rotary_factor=said("rotary_pct", 1.0),
        attn_temperature=temperature_by_log,
        rope_scaling=ntk_by_steps,
        # it counts gate and up together
        intermediate_size=lambda take: take("intermediate_size", needed=True) // 2,
        fixed={"scale_attn_weights": True},
        called={"head_dim": "kv_channels",
                "rms_norm_eps": "layer_norm_epsilon",
                "rope_theta": "rotary_emb_base",
                "vocab_size": "padded_vocab_size"},
        names={"model": "transformer", "embed_tokens": "wte", "layers": "h", "norm": "ln_f",
               "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
               "self_attn.qkv_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
               "gate_proj": "w2", "up_proj": "w1", "mlp.down_proj": "mlp.c_proj"}),
    "gemma": Family(**GEMMA, hidden_act=gelu_by_tanh),      # arXiv:2403.08295
    "gemma2": Family(                               # arXiv:2408.00118, sec. 2
        **GEMMA | {"absent": GEMMA["absent"] | {"sliding_window": 4096}}, norm_place="both",
        hidden_act=said("hidden_activation", "gelu_pytorch_tanh"),
        attn_scale=lambda take: take("query_pre_attn_scalar", 256) ** -0.5,
        attn_softcap=unless_null("attn_logit_softcapping", 50.0),
        final_softcap=unless_null("final_logit_softcapping", 30.0),
        windows=window_every_second,
        names=GEMMA_NORMS),
    "gemma3_text": Family(                          # arXiv:2503.19786; 270M and 1B
        norm="rms+1", norm_place="both", qk_norm="head", **BIASED,
        embed_scale=lambda take: take("hidden_size", needed=True) ** 0.5,
        hidden_act=said("hidden_activation", "gelu_pytorch_tanh"),
        attn_scale=lambda take: take("query_pre_attn_scalar", 256) ** -0.5,
        final_softcap=said("final_logit_softcapping"),
        windows=window_but_every(6), window_rope_theta=window_theta("rope_local_base_freq"),
        absent={"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                "vocab_size": 262208, "max_position_embeddings": 131072,
                "sliding_window": 4096, "tie_word_embeddings": True,
                "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        names=GEMMA_NORMS),
    "gemma3": Family(**IMAGES, text_types=("gemma3_text",)),        # 4B, 12B and 27B
    "glm": Family(**GLM),                           # GLM-4, arXiv:2406.12793
    "glm4": Family(                                 # GLM-4-0414, GLM-Z1
        **GLM, norm_place="both",
        names={"after_attention_norm": "post_self_attn_layernorm",
               "after_mlp_norm": "post_mlp_layernorm"}),
    "chatglm": Family(              # ChatGLM 2 and 3, the first files of GLM-4, arXiv:2406.12793
        rotary_pairs="neighbors", partial_rotary_factor=0.5,
        rope_theta=lambda take: 10000.0 * take("rope_ratio", 1),
        fused_qkv="blocks", fused_gate_up=True,
        o_bias=said("add_bias_linear", False),
        qkv_bias=lambda take: take("add_qkv_bias", False) | take("add_bias_linear", False),
        mlp_bias=said("add_bias_linear", False),
        fixed={"rmsnorm": True, "post_layer_norm": True, "multi_query_attention": True},
        called={"num_hidden_layers": "num_layers",
                "intermediate_size": "ffn_hidden_size",
                "head_dim": "kv_channels",
                "vocab_size": "padded_vocab_size",
                "max_position_embeddings": "seq_length",
                "rms_norm_eps": "layernorm_epsilon",
                "num_key_value_heads": "multi_query_group_num"},
        names={"model.embed_tokens": "transformer.embedding.word_embeddings",
               "lm_head": "transformer.output_layer",
               "model.layers": "transformer.encoder.layers",
               "model.norm": "transformer.encoder.final_layernorm",
               "self_attn": "self_attention", "qkv_proj": "query_key_value", "o_proj": "dense",
               "gate_up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"}),
    "baichuan": Family(                             # 1 and 2, arXiv:2309.10305
        fused_qkv="blocks", names={"qkv_proj": "W_pack"},
        # the 13B models have no max_position_embeddings
        alibi=lambda take: take("max_position_embeddings") is None,
        # Baichuan 1 has 64,000 tokens and a plain head
        normalized_head=lambda take: take("vocab_size") != 64000),
    "olmo": Family(**BIASED, norm="layer", clip_qkv=said("clip_qkv")),      # arXiv:2402.00838
    "olmo2": Family(**OLMO2, absent={"rms_norm_eps": 1e-5}),
    "olmo3": Family(                                # arXiv:2512.13961
        **OLMO2, windows=window_but_every(4), window_rope_theta=window_theta("rope_theta"),
        absent={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096}),
    "phi3": Family(                                 # arXiv:2404.14219; Phi-4, Phi-4-mini
        fused_qkv="blocks", fused_gate_up=True,
        partial_rotary_factor=said("partial_rotary_factor", 1.0),
        windows=window_everywhere,
        absent={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}),
    "internlm2": Family(                            # arXiv:2403.17297
        fused_qkv="groups", qkv_bias=said("bias", False), o_bias=said("bias", False),
        names={"embed_tokens": "tok_embeddings", "lm_head": "output",
               "self_attn": "attention", "qkv_proj": "wqkv", "o_proj": "wo",
               "mlp": "feed_forward", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
               "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}),
    "internlm3": Family(                            # its vendor's modeling_internlm3.py
        qkv_bias=said("qkv_bias", False), o_bias=said("bias", False), mlp_bias=said("bias", False)),
    "smollm3": Family(                              # SmolLM3-3B, every fourth layer without rope
        **BIASED, mlp_bias=said("mlp_bias", False),
        use_rope=rope_unless_listed, windows=window_without_rope,
        absent={"tie_word_embeddings": True, "rope_theta": 2e6, "use_sliding_window": False}),
    "seed_oss": Family(                             # Seed-OSS-36B
        qkv_bias=said("attention_bias", True), o_bias=said("attention_out_bias", False),
        mlp_bias=said("mlp_bias", False), absent={"head_dim": 128}),
    "ernie4_5": Family(                             # the ERNIE 4.5 technical report; dense models
        rotary_pairs="neighbors",
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), said("use_bias", False)),
        absent={"tie_word_embeddings": True, "rope_theta": 500000.0, "head_dim": 128,
                "rms_norm_eps": 1e-5}),
    "exaone4": Family(                              # arXiv:2507.11407
        **NORM_AFTER, norm="rms wide", qk_norm="head",
        windows=window_but_every(4), use_rope=rope_where_window,
        absent={"rms_norm_eps": 1e-5, "sliding_window": 4096}),
    "granite": Family(**GRANITE, mlp_bias=said("mlp_bias", False)),     # Granite 3
    "granitemoehybrid": Family(                     # Granite 4.0
        **GRANITE, layer_types=state_spaces_by_default, linear_value_head_dim=mamba_head_dim,
        mixer_of={"mamba": "state space", "linear_attention": "state space"},
        use_rope=lambda take, layer: take("position_embedding_type") == "rope",
        conv_bias=said("mamba_conv_bias", True), mixer_bias=said("mamba_proj_bias", False),
        intermediate_size=said("shared_intermediate_size", 1024), fused_gate_up=True,
        sparse=lambda take, layer: take("num_local_experts", 8) > 0,
        norm_topk_prob=True,                        # as a softmax over the chosen experts alone
        stacked_experts="out, in",
        fixed={"normalization_function": "rmsnorm"},
        called={"conv_kernel": "mamba_d_conv", "linear_num_key_heads": "mamba_n_groups",
                "linear_num_value_heads": "mamba_n_heads", "linear_key_head_dim": "mamba_d_state",
                "shared_expert_intermediate_size": "shared_intermediate_size"},
        absent={"conv_kernel": 4, "linear_num_key_heads": 1, "linear_num_value_heads": 128,
                "linear_key_head_dim": 256, "num_local_experts": 8, "num_experts_per_tok": 2,
                "intermediate_size": 8192, "shared_expert_intermediate_size": 1024},
        names={"mamba.o_proj": "mamba.out_proj",
               "mlp.gate": "block_sparse_moe.router.layer",
               "mlp.experts.gate_up_proj": "block_sparse_moe.input_linear",
               "mlp.experts.down_proj": "block_sparse_moe.output_linear",
               **{f"{mlp}.gate_up_proj": "shared_mlp.input_linear"
                  for mlp in ("mlp", "mlp.shared_expert")},
               **{f"{mlp}.down_proj": "shared_mlp.output_linear"
                  for mlp in ("mlp", "mlp.shared_expert")}}),
    "nemotron_h": Family(                           # Nemotron-H, arXiv:2504.03624; Nano 2 and 3
        **BIASED, norm="rms wide", ungated_mlp=True, mlp_bias=said("mlp_bias", False),
        hidden_act=said("mlp_hidden_act", "relu2"), conv_act=said("mamba_hidden_act", "silu"),
        num_hidden_layers=lambda take: take("num_hidden_layers") or len(types_by_letters(take)),
        layer_types=types_by_letters, sparse=sparse_by_letters,
        mixer_of={"linear_attention": "state space", "mamba": "state space",
                  "mlp": "none", "moe": "none"},
        use_rope=lambda take, layer: False,
        conv_bias=said("use_conv_bias", True), mixer_bias=said("use_bias", False),
        **BALANCED_BY_BIAS,
        fixed={"mamba_proj_bias": False, "residual_in_fp32": False, "sliding_window": None,
               "n_shared_experts": 1},
        without_effect=(
            "expand", "norm_eps", "chunk_size", "mamba_ssm_cache_dtype", "use_mamba_kernels",
            "num_logits_to_keep", "rescale_prenorm_residual", "time_step_min", "time_step_max",
            "time_step_floor", "time_step_rank", "partial_rotary_factor",
            "moe_shared_expert_overlap", "num_nextn_predict_layers", "mtp_layers_block_type",
            "mtp_hybrid_override_pattern"),
        called={"layer_types": "layers_block_type", "rms_norm_eps": "layer_norm_epsilon",
                "num_experts": "n_routed_experts", "linear_num_key_heads": "n_groups",
                "linear_num_value_heads": "mamba_num_heads",
                "linear_key_head_dim": "ssm_state_size",
                "linear_value_head_dim": "mamba_head_dim",
                "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size"},
        absent={"rms_norm_eps": 1e-5, "head_dim": 128, "intermediate_size": 21504,
                "conv_kernel": 4, "linear_num_key_heads": 8, "linear_num_value_heads": 128,
                "linear_key_head_dim": 128, "linear_value_head_dim": 64,
                "num_experts": 8, "num_experts_per_tok": 2,
                "moe_intermediate_size": 7688, "shared_expert_intermediate_size": 7688},
        names={"model": "backbone", "embed_tokens": "embeddings", "model.norm": "backbone.norm_f",
               "input_layernorm": "norm", "post_attention_layernorm": "norm",
               **dict.fromkeys(("self_attn", "mamba", "mlp"), "mixer"),
               "mamba.o_proj": "mixer.out_proj", "mlp.shared_expert": "mixer.shared_experts",
               "mlp.selection_bias": "mixer.gate.e_score_correction_bias"},
        in_transformers={"backbone.": "model."}, skips=("mtp.",)),
    "hunyuan_v1_dense": Family(                     # the Hunyuan models of 0.5B to 7B
        **BIASED, qk_norm=lambda take: "head rotated" if take("use_qk_norm", True) else "",
        rope_alpha=True, fixed={"use_cla": False, "norm_type": "rms", "mlp_bias": False,
                                "use_rotary_pos_emb": True},
        absent={"rms_norm_eps": 1e-5},
        names={"q_norm": "query_layernorm", "k_norm": "key_layernorm"}),
    "cohere2": Family(                              # Command R7B and A, arXiv:2504.00698
        **BIASED, norm="layer weight", parallel_mlp=True, rotary_pairs="neighbors",
        windows=window_but_every(4), use_rope=rope_where_window,
        logit_scale=said("logit_scale", 0.0625),
        fixed={"use_parallel_block": True, "use_gated_activation": True, "rotary_pct": 1.0,
               "position_embedding_type": "rope_gptj", "layer_switch": 4,
               "order_of_interleaved_layers": "local_attn_first"},
        called={"rms_norm_eps": "layer_norm_eps"},
        absent={"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "sliding_window": 4096}),
    "ministral3": Family(                           # Ministral 3, of 2512
        windows=window_everywhere, attn_temperature=temperature_by_beta,
        default_rope={**MISTRAL_YARN, "rope_theta": 1e6, "factor": 16.0,
                      "original_max_position_embeddings": 16384},
        absent={"rms_norm_eps": 1e-5, "head_dim": 128}),
    "mistral3": Family(                             # Mistral Small 3.1 and later, Ministral 3
        **IMAGES, text_types=("mistral", "ministral3", "mistral4")),
    "glm4_moe": Family(                             # GLM-4.5 to 4.7, arXiv:2508.06471
        qkv_bias=said("attention_bias", False),
        qk_norm=lambda take: "head" if take("use_qk_norm", False) else "",
        partial_rotary_factor=said("partial_rotary_factor", 0.5),
        **BALANCED_BY_BIAS, **SHARED_EXPERTS, absent={"rms_norm_eps": 1e-5}),
    "minimax_m2": Family(
        qk_norm="width", rotary_dim=rotary_dim_of_minimax,
        partial_rotary_factor=said("partial_rotary_factor", 1.0),
        router="sigmoid", selection_bias=True, norm_topk_prob=True,
        sparse=lambda take, layer: True,
        fixed={"use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True,
               "scoring_func": "sigmoid", "shared_intermediate_size": 0},
        absent={"head_dim": 128, "rope_theta": 5e6},
        names={"mlp": "block_sparse_moe", "mlp.selection_bias":
               "block_sparse_moe.e_score_correction_bias",
               "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "deepseek_v2": Family(                          # arXiv:2405.04434
        **LATENT, **SHARED_EXPERTS, router_float32=True, expert_groups=groups_if_limited,
        top_groups=said("topk_group", 1), routed_scale=said("routed_scaling_factor", 1.0),
        fixed={"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1},
        absent={"first_k_dense_replace": 0, "n_shared_experts": 2, "q_lora_rank": 1536}),
    "deepseek_v3": Family(**DEEPSEEK3),             # V3 to V3.1, R1, Moonlight; arXiv:2412.19437
    "kimi_k2": Family(**DEEPSEEK3),                 # arXiv:2507.20534
    "glm4_moe_lite": Family(                        # GLM-4.7-Flash
        **DEEPSEEK3 | {"sparse": sparse_by_types, "absent": {
            "rms_norm_eps": 1e-5, "routed_scaling_factor": 1.8, "n_shared_experts": 1,
            "q_lora_rank": 768}},
        partial_rotary_factor=said("partial_rotary_factor", 1.0)),
    "mistral4": Family(                             # Mistral Small 4, after transformers' class
        **LATENT, **SHARED_EXPERTS | {"names": {
            "mlp.shared_expert": "mlp.shared_experts",
            "gate_up_proj.weight": "gate_up_proj",
            "experts.down_proj.weight": "experts.down_proj"}},
        attn_temperature=temperature_by_beta,
        default_rope={**MISTRAL_YARN, "rope_theta": 1e4, "factor": 128.0,
                      "original_max_position_embeddings": 8192},
        partial_rotary_factor=said("partial_rotary_factor", 1.0),   # rotary_dim says it, too
        expert_groups=said("n_group", 1), top_groups=said("topk_group", 1),
        group_score="two best", norm_topk_prob=said("norm_topk_prob", True),
        routed_scale=said("routed_scaling_factor", 1.0), stacked_experts="out, in",
        absent={"first_k_dense_replace": 0, "q_lora_rank": 1024, "n_shared_experts": 1}),
    "gpt_oss": Family(                              # arXiv:2508.10925
        norm="rms wide", attn_sinks=True, windows=window_every_second,
        qkv_bias=said("attention_bias", True), o_bias=said("attention_bias", True),
        default_rope={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                      "truncate": False, "original_max_position_embeddings": 4096},
        sparse=lambda take, layer: True, router_bias=True,
        norm_topk_prob=True,                        # as a softmax over the chosen experts alone
        stacked_experts="in, out", interleaved_gate_up=True, expert_bias=True,
        swiglu_limit=said("swiglu_limit", 7.0), swiglu_alpha=said("swiglu_alpha", 1.702),
        fixed={"hidden_act": "silu"},
        absent={"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64,
                "sliding_window": 128},
        names={"mlp.gate": "mlp.router",
               "gate_up_proj.weight": "gate_up_proj",
               "gate_up_proj.bias": "gate_up_proj_bias",
               "experts.down_proj.weight": "experts.down_proj",
               "experts.down_proj.bias": "experts.down_proj_bias"}),
    "qwen3_next": Family(
        **GATED_DELTA, fused_delta=True, shared_expert_gate=True,
        norm_topk_prob=said("norm_topk_prob", True), sparse=sparse_by_step),
    "qwen3_5_text": Family(**GATED_DELTA),          # Qwen 3.5 and 3.6
    "qwen3_5": Family(
        text_field="text_config", text_types=("qwen3_5_text",),
        names={"model": "model.language_model"}, skips=("model.visual.", "mtp.")),
    "qwen3_5_moe_text": Family(**QWEN3_5_MOE),
    "qwen3_5_moe": Family(
        **QWEN3_5_MOE | dict(
            names={**GATED_DELTA["names"], "model": "model.language_model",
                   "gate_up_proj.weight": "gate_up_proj",
                   "experts.down_proj.weight": "experts.down_proj"},
            skips=("model.visual.", "mtp.")),
        stacked_experts="out, in", text_field="text_config"),
    "lfm2": Family(
        **LFM2, intermediate_size=adjusted_ff_dim,
        fixed={"block_use_swiglu": True, "use_pos_enc": True},
        called=LFM2_CALLED | {"intermediate_size": "block_ff_dim"},
        names=LFM2_NAMES),
    "lfm2_moe": Family(                             # LFM2-8B-A1B
        **LFM2, router="sigmoid", selection_bias=said("use_expert_bias", True),
        norm_topk_prob=said("norm_topk_prob", True),
        routed_scale=said("routed_scaling_factor", 1.0),
        sparse=lambda take, layer: layer >= take("num_dense_layers", 2),
        fixed={"use_pos_enc": True}, called=LFM2_CALLED,
        names=LFM2_NAMES | {"mlp.selection_bias": "feed_forward.expert_bias"}),
    "llama4_text": Family(**LLAMA4),
    "llama4": Family(
        **LLAMA4, prefix="language_model.", text_field="text_config", tied_by_text=True,
        skips=("vision_model.", "multi_modal_projector.")),
}
