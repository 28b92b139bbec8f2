"""config.json -> ModelConfig: its fields are read, checked, and none is ignored in silence.

    read_model_config(folder)      the ModelConfig of a checkpoint
    model_config(fields)           of the fields of a config.json

A field that would change the mathematics and is not understood is an error; fields that do nothing
here are listed in HARMLESS. What a family does without a field stands in its row of families.py.

Requires: families.py, checkpoint/names.py.
Next: checkpoint/load.py.
"""
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from checkpoint.files import read_json_object
from checkpoint.names import find_tensors
from errors import nearest_name, shown
from families import FAMILIES, Family, ModelConfig, Switches, temperature_by_beta, time_step_limit

# layers.py has the functions
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "relu2")

ROPE_FIELDS = {      # rope_type: (required fields, optional fields)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "ntk_alpha": (("alpha",), ("factor", "original_max_position_embeddings", "beta_fast",
                               "beta_slow", "mscale", "mscale_all_dim")),
    "yarn": (("factor",), ("original_max_position_embeddings", "attention_factor", "beta_fast",
                           "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"),
               ("original_max_position_embeddings",)),
    "longrope": (("short_factor", "long_factor"),
                 ("factor", "original_max_position_embeddings", "attention_factor")),
    "ntk_steps": (("original_max_position_embeddings",), ()),
}
ROPE_ALIASES = {"su": "longrope"}         # early files of Phi-3
OF_IMAGES = ("mrope_section", "mrope_interleaved")     # a text token has one position on all axes

# Types and bounds of fields; of numbers (smallest, largest), whole ones where both are whole. The
# largest values are far above those of published models, and small enough that reading them is
# quick.
SIZE = (1, 2**31)
POSITIVE = (1e-30, 1e30)
BOUNDS = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "multi_query_group_num"), (1, 2000)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "moe_intermediate_size",
                     "vocab_size"), (1, 2**24)),
    **dict.fromkeys(("max_position_embeddings", "seq_length",
                     "original_max_position_embeddings"), SIZE),
    "model_max_length": (1, 10**31),        # transformers writes 10**30 for "no limit"
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok",
                     "n_routed_experts"), (0, 2**14)),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "num_dense_layers",
                     "num_nextn_predict_layers"), (0, 2000)),
    **dict.fromkeys(("n_group", "topk_group"), (1, 2**14)),
    "rotary_dim": (2, 2**24),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
                    (1, 2**16)),
    "q_lora_rank": (0, 2**16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
                     "linear_value_head_dim"), (1, 2**16)),
    **dict.fromkeys(("conv_kernel", "block_multiple_of", "mamba_expand"), (1, 2**16)),
    "block_ffn_dim_multiplier": (1e-3, 1e3),
    **dict.fromkeys(("decoder_sparse_step", "interleave_moe_layer_step",
                     "no_rope_layer_interval", "full_attention_interval"), SIZE),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "max_window_layers"), (0, 2**31)),
    "shared_expert_intermediate_size": (0, 2**24),
    "pad_token_id": (-2**31, 2**31),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "router_aux_loss_coef"), (0.0, 1e6)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (1e-3, 1.0)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), (1.5, 1e30)),
    **dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier",
                     "logits_scaling", "logit_scale", "routed_scaling_factor"), POSITIVE),
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha"), POSITIVE),
    **dict.fromkeys(("rope_ratio", "query_pre_attn_scalar", "attn_logit_softcapping", "floor_scale",
                     "final_logit_softcapping", "clip_qkv"), POSITIVE),
    "attn_scale": (0.0, 1e30),
}
FLAGS = frozenset("""
    tie_word_embeddings norm_topk_prob attention_bias mlp_bias bias add_bias_linear add_qkv_bias
    qkv_bias no_bias use_sliding_window use_qk_norm attn_temperature_tuning use_logn_attn
    use_dynamic_ntk output_router_logits attention_out_bias use_bias use_cla use_parallel_block
    use_gated_activation use_routing_bias rope_interleave attn_output_gate conv_bias
    mamba_conv_bias mamba_proj_bias tie_embedding use_expert_bias
    block_auto_adjust_ff_dim block_use_swiglu use_pos_enc use_conv_bias residual_in_fp32
""".split())
OBJECTS = frozenset(("rope_scaling", "rope_parameters", "quantization_config"))
TEXTS = frozenset(("hidden_act", "hidden_activation", "mlp_hidden_act", "mamba_hidden_act", "dtype",
                   "torch_dtype"))
NUMBER_LISTS = {"mlp_only_layers": (0, 2000), "moe_layers": (0, 2000), "no_rope_layers": (0, 1),
                "full_attn_idxs": (0, 2000)}
TEXT_LISTS = frozenset(("layer_types", "mlp_layer_types", "layers_block_type"))
TOKENS = frozenset(("bos_token_id", "eos_token_id"))
ROPE_BOUNDS = {     # of rope_scaling and rope_parameters
    "rope_theta": BOUNDS["rope_theta"],
    "partial_rotary_factor": BOUNDS["partial_rotary_factor"],
    "original_max_position_embeddings": (2, 2**31),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                     "alpha"), (1e-3, 1e6)),
    "llama_4_scaling_beta": (0.0, 1e6),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), (0.0, 1e6)),
}
ROPE_LISTS = {"short_factor": (1e-6, 1e9), "long_factor": (1e-6, 1e9)}

# Fields that do not affect training or inference. A field that is neither read nor listed here, and
# is not switched off, is an error: an ignored field can silently give wrong logits.
HARMLESS = frozenset("""
    architectures auto_map bos_token_id eos_token_id decoder_start_token_id dtype torch_dtype
    transformers_version use_cache initializer_range pretraining_tp id2label label2id
    problem_type output_attentions output_hidden_states return_dict is_encoder_decoder
    is_decoder torchscript tokenizer_class name_or_path unsloth_version unsloth_fixed model_name
    use_mrope chunk_size_feed_forward max_length min_length temperature top_p top_k
    repetition_penalty do_sample num_beams gradient_checkpointing cache_implementation
    model_max_length max_tokenizer_truncation attn_implementation tokenizer_type params_dtype
    apply_query_key_layer_scaling attention_softmax_in_fp32 softmax_in_fp32 bias_dropout_fusion
    use_flash_attn fp32_residual_connection original_rope onnx_safe bf16 fp16 fp32
    use_cache_kernel use_cache_quantization output_router_logits router_aux_loss_coef
    for_llm_compressor sliding_window_size is_llama_config transformers.js_config
    aux_loss_alpha seq_aux ep_size attn_type_list use_mtp num_mtp_modules mtp_transformer_layers
    use_embedding_sharing eod_token_id org_vocab_size cla_share_factor
    experts_per_token initial_context_length
    mtp_num_hidden_layers mtp_use_dedicated_embeddings mamba_ssm_dtype
    block_dim block_norm_eps block_mlp_init_scale block_out_init_scale block_use_xavier_init
    conv_dim conv_dim_out conv_use_xavier_init num_heads mamba_chunk_size init_method
    attention_head_dim dense_list pool_type im_start_id im_end_id im_newline_id mask_init_id pad_id
    sep_token_id text_start_id text_end_id mlp_intermediate_size shared_moe_mode
    use_parallel_embedding max_sequence_length use_bfloat16 tokenizer_model_max_length
    tokenizer_padding_side block_ffn_te_autocast block_ffn_use_quantized_params
    block_sequence_parallel_norm_across_tp ffn_te_autocast ffn_use_quantized_params
    sequence_parallel_norm_across_tp
""".split())
ALWAYS = {"is_causal": True}        # {field of any family: the only value that is supported}
DROPOUTS = frozenset("""
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_dropout_prob emb_dropout_prob
    router_jitter_noise residual_dropout
""".split())
# {method of quantization_config: its fields}: those that checkpoint/ acts on, and those that say
# how the checkpoint was made or which kernels another program should use
QUANTIZATIONS = {
    "bitsandbytes": frozenset("""
        quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_compute_dtype
        bnb_4bit_quant_storage bnb_4bit_quant_type bnb_4bit_use_double_quant
        llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules
        llm_int8_threshold
    """.split()),
    "gptq": frozenset("""
        quant_method method bits group_size desc_act sym checkpoint_format format is_marlin_format
        pack_dtype rotation adapter dynamic lm_head act_group_aware backend batch_size
        block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent dataset
        disable_exllama exllama_config max_input_length meta model_file_base_name
        model_name_or_path model_seqlen module_name_preceding_first_block
        modules_in_block_to_quantize mse pad_token_id quantizer static_groups tokenizer
        true_sequential use_cuda_fp16 use_exllama pack_impl offload_to_disk offload_to_disk_path
        fallback failsafe moe gptaq foem hessian gc_mode device mock_quantization
    """.split()),
    "awq": frozenset("""
        quant_method method bits w_bit group_size q_group_size version format zero_point backend
        modules_to_not_convert do_fuse exllama_config fuse_max_seq_len modules_to_fuse
    """.split()),
    "compressed-tensors": frozenset("""
        quant_method config_groups format ignore kv_cache_scheme sparsity_config transform_config
        quantization_status global_compression_ratio version
    """.split()),
    "mxfp4": frozenset("quant_method modules_to_not_convert dequantize".split()),
    "fp8": frozenset("""
        quant_method fmt weight_block_size activation_scheme modules_to_not_convert scale_fmt
        dequantize
    """.split()),
}


# ---- reading -------------------------------------------------------------------------------------

CHANGES: dict[Path, dict] = {}      # fields that a setting of this process puts over config.json's


def change_config_json(folder, fields: dict | None) -> dict:
    """Let read_config_json give these fields for a folder ({}: the file's); None changes nothing.

    Returns the changes in force. The file stays as it is.
    """
    path = Path(folder).resolve()
    if fields is not None:
        CHANGES[path] = fields
    return CHANGES.get(path, {})


def read_config_json(folder) -> dict:
    """The raw config.json of a checkpoint folder, with the changes of change_config_json.

    Raises FileNotFoundError or ValueError that name the file.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(explain_missing_config(Path(folder), path))
    return read_json_object(path, "fetch the file again") | change_config_json(folder, None)


def explain_missing_config(folder: Path, path: Path) -> str:
    found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
    if "adapter_config.json" in found:
        return (f"{folder} is an adapter (it has adapter_config.json and no config.json): name it "
                "as adapter_name_or_path, and its base model as model_name_or_path")
    return (f"{path} is missing: model_name_or_path must be a checkpoint folder in the Hugging "
            "Face layout (config.json, *.safetensors, tokenizer.json). Found there: "
            f"{found or 'nothing'}")


def model_config(raw: dict, where: str = "config.json") -> ModelConfig:
    """Turn the fields of a config.json into a ModelConfig.

    Raises ValueError for an unknown model_type, a missing field, or a field that would change the
    mathematics and is not supported; `where` names the file in the message.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        if any(f"{sense}_config" in raw for sense in ("vision", "audio", "thinker")):
            raise ValueError(f"{where}: model_type {kind!r} also reads images or sound, which are "
                             "not supported: name a text model. Supported are "
                             f"{', '.join(FAMILIES)}")
        raise ValueError(f"{where}: model_type {kind!r} is not supported; supported are "
                         f"{', '.join(FAMILIES)}." + how_to_try(raw))
    return read_fields(raw, kind, FAMILIES[kind], where)


def read_model_config(folder) -> ModelConfig:
    """The ModelConfig of a checkpoint folder. Raises FileNotFoundError or ValueError."""
    raw = read_config_json(folder)
    return fit_to_files(model_config(raw, f"{folder}/config.json"), raw, folder)


def fit_to_files(config: ModelConfig, raw: dict, folder) -> ModelConfig:
    """The config, changed where the names of the folder's tensors decide: experts and head.

    Published files of Qwen 3.5 MoE hold the experts of a layer in two stacks; transformers 5 writes
    them one by one. Where the top level says tie_word_embeddings: true and text_config says false,
    transformers ties a head only if the files have no other. A folder without weights changes
    nothing.
    """
    text = raw.get(FAMILIES[raw["model_type"]].text_field) or {}
    contradicts = config.tie_word_embeddings and text.get("tie_word_embeddings") is False
    stacked = config.stacked_experts == "out, in" and any(config.sparse)
    if not contradicts and not stacked:
        return config
    try:
        names = find_tensors(folder, config)
    except FileNotFoundError:
        return config
    if contradicts and config.stored_name("lm_head.weight") in names:
        note = ("tie_word_embeddings is true in config.json and false in its text_config: the "
                "files have a head of its own, which is used")
        config = replace(config, tie_word_embeddings=False, notes=(*config.notes, note))
    if stacked:
        layer = config.sparse.index(True)
        first = config.stored_name(f"model.layers.{layer}.mlp.experts.0") + "."
        if any(name.startswith(first) for name in names):
            config = replace(config, stacked_experts="")
    return config


class FieldReader:
    """Reads fields of a config.json by the family's names, and records in `taken` which were read.

    This is the `take` of the table's functions.
    """

    def __init__(self, raw: dict, kind: str, family: Family, where: str):
        self.raw = raw
        self.kind = kind
        self.family = family
        self.where = where
        # sliding_window ... : a window that is not switched on; hidden_act: the older spelling of
        # an activation that the family reads elsewhere
        self.taken = {"model_type", "sliding_window", "use_sliding_window", "max_window_layers",
                      "hidden_act"}

    def __call__(self, name: str, default=None, needed: bool = False, null: bool = False):
        """The field of this name, or of the family's name for it.

        needed: raise ValueError where it is missing. null: null is a value, not an absent field.
        """
        names = [self.family.called.get(name, name), name]
        self.taken.update(names)
        for n in names:
            if self.raw.get(n) is not None or (null and n in self.raw):
                return self.raw[n]
        if needed and name not in self.family.absent:
            raise ValueError(f"{self.where}: the field {names[0]!r} is missing; a {self.kind} "
                             "checkpoint states it")
        return self.family.absent.get(name, default)


def read_fields(raw: dict, kind: str, family: Family, where: str) -> ModelConfig:
    """model_config for a given row of FAMILIES."""
    notes = []
    if raw.get("quantization_config"):
        check_types(raw, family.called, where)
        notes += check_quantization(raw["quantization_config"], where)
        # the files themselves say which tensors are quantized
        raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    if family.text_field:
        if not isinstance(raw.get(family.text_field), dict):
            raise ValueError(f"{where}: {family.text_field} is missing; a {kind} checkpoint has "
                             "the decoder's fields there")
        family, raw = text_part(family, raw, where)
        notes.append(f"only the language part of this {kind} checkpoint is used, not the part that "
                     "reads images")
    raw = {key: value for key, value in raw.items() if not key.startswith("_")}
    check_types(raw, family.called, where)

    take = FieldReader(raw, kind, family, where)
    for name, value in (ALWAYS | family.fixed).items():
        if take(name, value) != value:
            raise ValueError(f"{where}: {name}: {shown(take(name))} is not supported, only "
                             f"{json.dumps(value)}")
    config = build_config(family, take, tuple(notes + note_dropout(raw)))

    known = take.taken | HARMLESS | DROPOUTS | set(family.without_effect)
    unread = {k: v for k, v in raw.items() if k not in known and v and (v is True or v != 1.0)}
    if unread:
        raise ValueError(f"{where}: {fields_in_words(unread)} may change what the network computes "
                         "and is not supported. If it has no effect, take it out of config.json.")
    check_sizes(config, where)
    return config


def text_part(family: Family, raw: dict, where: str) -> tuple[Family, dict]:
    """The row and the fields of the decoder in a model that also reads images."""
    fields = dict(raw[family.text_field])
    stated = raw.get("tie_word_embeddings")
    if stated is not None and not (family.tied_by_text and "tie_word_embeddings" in fields):
        fields["tie_word_embeddings"] = stated
    if not family.text_types:
        return family, fields
    kind = fields.get("model_type", family.text_types[0])
    if kind not in family.text_types:
        raise ValueError(f"{where}: {family.text_field}: model_type {shown(kind)} is not "
                         f"supported; supported are {', '.join(family.text_types)}")
    own = FAMILIES[kind]
    return replace(own, prefix=family.prefix, names=own.names | family.names,
                   in_transformers=family.in_transformers, skips=family.skips), fields


def build_config(family: Family, take: FieldReader, notes: tuple) -> ModelConfig:
    """The ModelConfig of the fields that `take` reads."""
    layers = family.num_hidden_layers(take)
    heads = take("num_attention_heads", needed=True)
    width = take("hidden_size", needed=True)
    positions = take("max_position_embeddings") or take("model_max_length", 2048)
    per_layer = read_layers(family, take, layers, take.where)

    switches = {}
    for spec in fields(Switches):
        value = getattr(family, spec.name)
        switches[spec.name] = value(take) if callable(value) else value
    theta, rope, rope_notes = read_rope(family, take, positions, take.where)
    if "partial_rotary_factor" in rope:                          # where newer tools write it
        switches["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    experts = read_experts(take) if family.sparse is not Family.sparse else {}

    sizes = dict(
        model_type=take.kind,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=family.intermediate_size(take),
        vocab_size=take("vocab_size", needed=True),
        num_key_value_heads=take("num_key_value_heads", heads),
        head_dim=0 if family.latent else
        take("head_dim", null=True) or head_dim_of(width, heads, take.where),
        max_position_embeddings=positions,
        rms_norm_eps=take("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope=rope,
        initializer_range=take("initializer_range", 0.02),
        pad_token_id=take("pad_token_id"),
        names=family.names,
        prefix=family.prefix,
        in_transformers=family.in_transformers,
        skips=family.skips(take) if callable(family.skips) else family.skips,
        notes=(*notes, *rope_notes),
        **switches,
        **per_layer,
        **experts)
    if family.latent:
        sizes |= read_latent(take)
    if family.mixer_of:
        sizes |= {name: take(name, 0) for name in STATE_SIZES}
        sizes["linear_value_head_dim"] = family.linear_value_head_dim(take)
        sizes["time_step_limit"] = time_step_limit(take)
    return ModelConfig(**sizes)


STATE_SIZES = ("conv_kernel", "linear_num_key_heads", "linear_num_value_heads",
               "linear_key_head_dim")


def read_latent(take: FieldReader) -> dict:
    """The sizes of latent attention; head_dim and kv heads are what attention computes with."""
    rotated = take("qk_rope_head_dim", needed=True)
    width = take("qk_nope_head_dim", needed=True) + rotated
    take("head_dim")                                    # newer tools write that of the rotation,
    take("qk_head_dim")                                 # and the sum of the two
    if take("v_head_dim", needed=True) > width:
        raise ValueError(f"{take.where}: v_head_dim {take('v_head_dim')} is larger than "
                         f"qk_nope_head_dim + qk_rope_head_dim {width}, which is not supported")
    return {
        "head_dim": width,
        "rotary_dim": rotated,
        "num_key_value_heads": take("num_attention_heads"),
        "kv_lora_rank": take("kv_lora_rank", needed=True),
        "q_lora_rank": take("q_lora_rank", null=True) or 0,
        "v_head_dim": take("v_head_dim")}


def head_dim_of(width: int, heads: int, where: str) -> int:
    """Features of a head where config.json does not state them. Raises ValueError for a rest."""
    if width % heads:
        raise ValueError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads "
                         f"{heads}, and head_dim is not set")
    return width // heads


def check_quantization(stored: dict, where: str) -> list[str]:
    """Notes on config.json's quantization_config. Raises ValueError for an unknown method."""
    older = stored.get("load_in_4bit") or stored.get("load_in_8bit")
    method = stored.get("quant_method") or stored.get("method")
    producer = stored.get("producer")
    made_by = producer.get("name") if isinstance(producer, dict) else None      # modelopt
    method = method or ("bitsandbytes" if older else made_by or "unknown")
    if method not in tuple(QUANTIZATIONS):
        raise ValueError(f"{where}: the weights are stored quantized ({method}); supported are "
                         f"{', '.join(QUANTIZATIONS)}. Use the 16-bit checkpoint of the same "
                         "model, with quantization_bit: 4 if memory is short")
    notes = []
    unknown = [field for field, value in stored.items()
               if field not in QUANTIZATIONS[method] and value not in (None, False, [], {})]
    if unknown:
        notes.append(f"quantization_config: {', '.join(map(repr, unknown))} is not known here and "
                     "not read; the tensors say how each layer is stored")
    if stored.get("load_in_8bit"):
        notes.append("its 8-bit weights are multiplied with unrounded activations; bitsandbytes "
                     "also rounds the activations to 8 bits")
    return notes


def read_layers(family: Family, take: Callable, layers: int, where: str) -> dict:
    """The per-layer fields: layer_types, where config.json has them, win over the family's rule."""
    flags = take("no_rope_layers")
    if flags and len(flags) != layers:
        raise ValueError(f"{where}: no_rope_layers has {len(flags)} entries for {layers} layers")
    types = family.layer_types(take)
    take("layer_types")
    window = take("sliding_window", null=True) if take("use_sliding_window", True) else None
    sizes = {                       # layer type: (window, chunk)
        "full_attention": (None, None),
        **({"attention": (None, None)} if family.mixer_of else {}),
        "chunked_attention": (None, take("attention_chunk_size", null=True)),
        "sliding_attention": (window, None),
        **dict.fromkeys(family.mixer_of, (None, None))}
    if unknown := [kind for kind in types or () if kind not in sizes]:
        raise ValueError(f"{where}: layer_types holds {unknown[0]!r}; known are {', '.join(sizes)}")
    if types and len(types) != layers:
        raise ValueError(f"{where}: layer_types has {len(types)} entries for {layers} layers")
    check_pattern(take("sliding_window_pattern"), where)

    rules = {}
    for name in ("windows", "chunks", "use_rope", "sparse"):
        rule = getattr(family, name)
        rules[name] = tuple(rule(take, layer) for layer in range(layers))
    if types:
        rules["windows"], rules["chunks"] = zip(*(sizes[kind] for kind in types))
    attention = "latent attention" if family.latent else "attention"
    rules["mixers"] = tuple(family.mixer_of.get(kind, attention) for kind in types or (
        None,) * layers)
    return rules


def check_pattern(pattern, where: str):
    """Raise ValueError for a sliding_window_pattern that is neither a period nor letters."""
    is_period = type(pattern) is int and 0 <= pattern < 2**31   # 0: of a model without windows
    is_letters = type(pattern) is str and re.fullmatch("[LG]{1,2000}", pattern)
    if pattern is not None and not is_period and not is_letters:
        raise ValueError(f"{where}: sliding_window_pattern: {shown(pattern)} is neither a number "
                         "of layers nor letters such as LLLG")


def read_rope(family: Family, take: Callable, positions: int,
              where: str) -> tuple[float, dict, list[str]]:
    """rope_theta, the dict of rotation settings, and notes.

    The settings come from rope_scaling or from the newer rope_parameters. rope_scaling wins, and
    rope_theta outside of it counts, as in transformers 5.
    """
    stored = {"rope_scaling": family.rope_scaling(take) or (
                  family.default_rope if not take("rope_parameters") else None),
              "rope_parameters": of_full_layers(family, take("rope_parameters"), where)}
    for key, settings in stored.items():
        check_rope_types(settings or {}, key, where)
    theta = family.rope_theta(take)
    if stored["rope_scaling"]:
        rope = dict(stored["rope_scaling"])
        notes = check_two_sources(stored, theta, where)
    else:
        rope = dict(stored["rope_parameters"] or {})
        notes = []
    theta = rope.pop("rope_theta", None) or theta
    kind, rope, more_notes = rope_kind(family, rope, where)

    trained = take("original_max_position_embeddings")
    if trained and kind in ("llama3", "yarn", "longrope"):      # it wins over that in the settings
        rope["original_max_position_embeddings"] = trained
    elif rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = positions
    return float(theta), {"rope_type": kind, **rope}, notes + more_notes


def of_full_layers(family: Family, rope: dict | None, where: str) -> dict | None:
    """rope_parameters; of those for each kind of layer, the ones of layers without a window.

    Raises ValueError for settings of layers with a window that are more than another base.
    """
    kinds = ("full_attention", "sliding_attention")
    if not rope or not rope.keys() <= set(kinds) or family.window_rope_theta is None:
        return rope
    full, sliding = (rope.get(kind) or {} for kind in kinds)
    if type(full) is not dict or type(sliding) is not dict:
        raise ValueError(f"{where}: rope_parameters: the settings of a kind of layer are no object")
    check_rope_types(sliding, "rope_parameters: sliding_attention", where)
    if sliding.keys() - {"rope_theta", "rope_type"} or sliding.get("rope_type", "default") != (
            "default"):
        raise ValueError(f"{where}: rope_parameters: sliding_attention: only another rope_theta is "
                         f"supported, not {fields_in_words(sliding)}")
    return full


def check_two_sources(stored: dict, theta: float, where: str) -> list[str]:
    """Notes on a config.json with both rope_scaling and rope_parameters.

    Raises ValueError where a value of rope_parameters would silently be another one.
    """
    scaling, parameters = stored["rope_scaling"], stored["rope_parameters"]
    if not parameters or parameters == scaling:
        return []
    used = {"rope_theta": theta, **{name: value for name, value in scaling.items() if value}}
    for name in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(name) not in (None, used.get(name)):
            raise ValueError(
                f"{where}: rope_parameters and rope_scaling contradict each other: transformers "
                f"takes rope_scaling, where {name} is {used.get(name, 'not set')}, and "
                f"rope_parameters says {parameters[name]}. Keep one of the two, with {name} in it")
    return ["config.json has rope_scaling and rope_parameters: rope_scaling is used, as in "
            "transformers"]


def rope_kind(family: Family, rope: dict, where: str) -> tuple[str, dict, list[str]]:
    """(rope_type, the settings it has, notes). Raises ValueError for what is not supported."""
    notes = []
    rope = {name: value for name, value in rope.items() if name not in OF_IMAGES}
    older = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or older or "default"
    if older and ROPE_ALIASES.get(older, older) != ROPE_ALIASES.get(kind, kind):
        notes.append(f"the rotation has type {older!r} and rope_type {kind!r}: rope_type is used, "
                     "as in transformers")
    kind = ROPE_ALIASES.get(kind, kind)
    if kind == "dynamic" and family.rope_alpha and rope.get("alpha"):
        kind = "ntk_alpha"
    if kind not in ROPE_FIELDS:
        raise ValueError(f"{where}: rope type {kind!r} is not supported; supported are "
                         f"{', '.join(ROPE_FIELDS)}")

    needed, optional = ROPE_FIELDS[kind]
    if rope.get("partial_rotary_factor") == 1.0 or callable(family.partial_rotary_factor):
        optional += ("partial_rotary_factor",)
    if family.attn_temperature is temperature_by_beta:
        optional += ("llama_4_scaling_beta", "max_position_embeddings")
    if missing := [name for name in needed if rope.get(name) is None]:
        raise ValueError(f"{where}: rope type {kind!r} lacks {', '.join(missing)}")
    extra = {name: value for name, value in rope.items()
             if name not in needed + optional and value is not None}
    if extra and (kind != "default" or "partial_rotary_factor" in extra):
        raise ValueError(f"{where}: rope type {kind!r} has fields that are not supported: "
                         f"{fields_in_words(extra)}")
    if extra:
        notes.append(f"rope type 'default' has no use for {fields_in_words(extra)}: not applied, "
                     "as in transformers")
    kept = {name: value for name, value in rope.items()
            if name not in extra and value is not None}
    return kind, kept, notes


def read_experts(take: Callable) -> dict:
    """The sizes of a mixture of experts."""
    balance = take("router_aux_loss_coef", 0.001) if take("output_router_logits") else 0.0
    width = take("moe_intermediate_size") or take("intermediate_size")
    count, local = take("num_experts"), take("num_local_experts", 0)
    if count and "num_local_experts" in take.raw and local not in (None, count):
        raise ValueError(f"{take.where}: num_local_experts {local} is another number of experts "
                         f"than {take.family.called.get('num_experts', 'num_experts')} {count}")
    return {
        "num_experts": count or local,
        "num_experts_per_tok": take("num_experts_per_tok", 0),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": take("shared_expert_intermediate_size")
        or take("n_shared_experts", 0) * (width or 0),
        "router_aux_loss_coef": balance}


def note_dropout(raw: dict) -> list[str]:
    """A note on the network's own dropout, which is not applied: LoRA has its own."""
    rates = {name: raw[name] for name in DROPOUTS if raw.get(name)}
    if not rates:
        return []
    return [f"config.json sets {fields_in_words(rates)} for training, which is not applied here"]


def check_types(raw: dict, called: dict, where: str):
    """Raise ValueError for a field of another type, or out of bounds; null means absent.

    called: the family's names of fields, {our name: its name}.
    """
    names = {called.get(name, name): name for name in BOUNDS} | {name: name for name in BOUNDS}
    for name, value in raw.items():
        words = ""
        if value is None:
            continue
        if name in names:
            words = not_within(value, BOUNDS[names[name]])
        elif name in FLAGS:
            words = "" if type(value) is bool else "is not true or false"
        elif name in OBJECTS:
            words = "" if type(value) is dict else "is not an object"
        elif name in TEXTS:
            words = "" if type(value) is str else "is not text"
        elif name in TOKENS:
            ids = value if type(value) is list else [value]
            words = "" if all(type(i) is int for i in ids) else "is not a token id, nor a list"
        elif name in NUMBER_LISTS:
            words = no_list_within(value, NUMBER_LISTS[name])
        elif name in TEXT_LISTS:
            texts = type(value) is list and all(type(text) is str for text in value)
            words = "" if texts else "is not a list of texts"
        if words:
            raise ValueError(f"{where}: {name}: {shown(value)} {words}")


def not_within(value, bounds: tuple) -> str:
    """Why a value is not a number within bounds, or ""; a bool is no number."""
    low, high = bounds
    if type(low) is int and type(value) is not int:
        return "is not a whole number"
    if type(value) not in (int, float):
        return "is not a number"
    if low <= value <= high:
        return ""
    if low == 1 and value < 1:
        return "is not above 0"
    return f"is not between {low:,} and {high:,}" if low else f"is not 0 to {high:,}"


def no_list_within(value, bounds: tuple) -> str:
    """Why a value is not a list of numbers within bounds, or ""."""
    if type(value) is not list:
        return "is not a list of numbers"
    wrong = next((number for number in value if not_within(number, bounds)), None)
    return "" if wrong is None else f"holds {shown(wrong)}, which {not_within(wrong, bounds)}"


def check_rope_types(rope: dict, key: str, where: str):
    """check_types for the settings of the rotation; key: the field that holds them."""
    for name, value in rope.items():
        words = ""
        if value is None:
            continue
        if name in ROPE_BOUNDS:
            words = not_within(value, ROPE_BOUNDS[name])
        elif name in ROPE_LISTS:
            words = no_list_within(value, ROPE_LISTS[name])
        elif name in ("type", "rope_type"):
            words = "" if type(value) is str else "is not text"
        elif name in ("truncate", "finetuned"):
            words = "" if type(value) is bool else "is not true or false"
        elif type(value) is dict:
            words = "is an object: other settings for each kind of layer are not supported"
        if words:
            raise ValueError(f"{where}: {key}: {name}: {shown(value)} {words}")


def check_sizes(config: ModelConfig, where: str):
    """Raise ValueError for sizes that no decoder can have."""
    for name in ("intermediate_size", "head_dim", "moe_intermediate_size"):
        if getattr(config, name) < 1 and (name != "moe_intermediate_size" or any(config.sparse)):
            raise ValueError(f"{where}: {name}: {getattr(config, name)} is not above 0")
    for act in (config.hidden_act, config.conv_act or config.hidden_act):
        if act not in ACTIVATIONS:
            raise ValueError(f"{where}: hidden_act {act!r} is not supported; supported are "
                             f"{', '.join(ACTIVATIONS)}")
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    if heads % groups:
        raise ValueError(f"{where}: num_attention_heads {heads} is not a multiple of "
                         f"num_key_value_heads {groups}")
    if any(config.sparse) and not 0 < config.num_experts_per_tok <= config.num_experts:
        raise ValueError(f"{where}: num_experts_per_tok is {config.num_experts_per_tok}, and "
                         f"num_experts {config.num_experts}: it must be between 1 and num_experts")
    check_expert_groups(config, where)
    if config.linear_num_key_heads and config.linear_num_value_heads % config.linear_num_key_heads:
        raise ValueError(f"{where}: {config.linear_num_value_heads} value heads of a mixer with a "
                         f"state are not a multiple of its {config.linear_num_key_heads} key heads")
    if not config.alibi:
        check_rotation(config, where)


def check_expert_groups(config: ModelConfig, where: str):
    """Raise ValueError for groups of experts from which a token's cannot be chosen."""
    groups, top = config.expert_groups, config.top_groups
    least = 2 if config.group_score == "two best" else 1
    if groups == 1 or not any(config.sparse):
        return
    size = config.num_experts // groups
    if config.num_experts % groups or size < least or not top <= groups:
        raise ValueError(f"{where}: {config.num_experts} experts in n_group {groups} groups, of "
                         f"which topk_group {top} are chosen: groups must be of equal size, {least}"
                         " or more, and no more may be chosen than there are")
    if config.num_experts_per_tok > top * size:
        raise ValueError(f"{where}: num_experts_per_tok {config.num_experts_per_tok} is more than "
                         f"the {top * size} experts of topk_group {top} groups")


def check_rotation(config: ModelConfig, where: str):
    """Raise ValueError for rotation settings that do not fit the heads."""
    width = config.rotated_features
    if width > config.head_dim:
        raise ValueError(f"{where}: {width} features of a head are rotated, and head_dim is "
                         f"{config.head_dim}")
    least = 4 if config.rope["rope_type"] in ("dynamic", "ntk_steps") else 2
    if width % 2 or width < least:
        raise ValueError(f"{where}: head_dim {config.head_dim} with partial_rotary_factor "
                         f"{config.partial_rotary_factor} rotates {width} features; it must be an "
                         f"even number, {least} or more")
    for name in ROPE_LISTS:
        factors = config.rope.get(name)
        if factors is not None and len(factors) != width // 2:
            raise ValueError(f"{where}: {name} has {len(factors)} numbers, and {width} rotated "
                             f"features are {width // 2} pairs")



def fields_in_words(values: dict) -> str:
    return ", ".join(f"{key[:60]!r}: {shown(value)}" for key, value in values.items())


def how_to_try(raw: dict) -> str:
    """Advice for an unknown model_type: the family whose rows fit the other fields, if any."""
    fits = []
    for kind, family in FAMILIES.items():
        try:
            read_fields(raw, kind, family, "")
        except (ValueError, TypeError, AttributeError, IndexError):
            continue
        fits.append(kind)
    if not fits:
        return " docs/add_a_family.md shows how to add one."
    kind = nearest_name(str(raw.get("model_type")), fits, similarity=0.4) or fits[0]
    return (f" Its other fields are also those of a {kind} model. If only the name is new, try it: "
            f"write \"model_type\": \"{kind}\" in a copy of config.json; loading then compares the "
            "name and shape of every tensor with that family's. If more is new: "
            "docs/add_a_family.md")
