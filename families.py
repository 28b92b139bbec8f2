"""Which decoder a checkpoint's config.json describes: one neutral ModelConfig, one row of differences per family.

Everything the checkpoint states is taken from its `config.json`, under the same names. What a family does without
saying so there is a row of FAMILIES: the switches are named for what they do, and the decoder (model.py) looks only
at switches, never at a family's name.

    python model.py DIR          shows the result for a checkpoint

Read before: nothing. Read after: model.py, which builds what is described here.
Sources: Llama arXiv:2302.13971, Mistral arXiv:2310.06825, Qwen2 arXiv:2407.10671, Qwen3 arXiv:2505.09388.
"""
import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """How a family differs from the plain Llama block. A value that is a str names the config.json field to read."""
    qkv_bias: bool | str = False          # q, k and v projections add a bias
    o_bias: bool | str = False            # so does the output projection
    mlp_bias: bool | str = False          # and gate, up and down
    qk_norm: bool = False                 # RMSNorm over each head's q and k, before the rotation
    window: str = "never"                 # "always": sliding_window acts on every layer;
                                          # "asked": only with use_sliding_window, from layer max_window_layers on


FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(window="always"),
    "qwen2": Family(qkv_bias=True, window="asked"),
    "qwen3": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True, window="asked"),
}

ROPE_FIELDS = {      # rope_type: (fields it needs, fields it may have)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "yarn": (("factor",), ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
                           "mscale", "mscale_all_dim", "truncate")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}

# Fields that leave the mathematics of training and inference alone. Anything that is neither read below nor named
# here, and is not switched off, stops the load: a field that is shrugged off is how wrong logits begin.
HARMLESS = frozenset("""
    architectures auto_map bos_token_id eos_token_id pad_token_id decoder_start_token_id dtype torch_dtype
    transformers_version use_cache initializer_range pretraining_tp id2label label2id problem_type
    output_attentions output_hidden_states return_dict is_encoder_decoder is_decoder torchscript
    tokenizer_class name_or_path unsloth_version unsloth_fixed model_name use_mrope chunk_size_feed_forward
    max_length min_length temperature top_p top_k repetition_penalty do_sample num_beams
""".split())


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape, in the words of config.json. Sizes are counts of features, heads, layers or tokens."""
    model_type: str
    hidden_size: int                      # D
    intermediate_size: int                # F
    num_hidden_layers: int
    num_attention_heads: int              # H
    num_key_value_heads: int              # K
    head_dim: int                         # Dh
    vocab_size: int                       # V
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float
    rope: dict = field(default_factory=lambda: {"rope_type": "default"})
    initializer_range: float = 0.02       # standard deviation of fresh weights (train_from_scratch)
    windows: tuple = ()                   # per layer: how many keys a query sees, itself included; None = all
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def read_config_json(folder) -> dict:
    """The raw config.json of a checkpoint folder. Raises FileNotFoundError or ValueError that name the file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        found = sorted(p.name for p in Path(folder).iterdir())[:8] if Path(folder).is_dir() else []
        if "adapter_config.json" in found:
            raise FileNotFoundError(f"{folder} is an adapter (it has adapter_config.json and no config.json): name it as "
                                    "adapter_name_or_path, and its base model as model_name_or_path")
        raise FileNotFoundError(f"{path} is missing: model_name_or_path must be a checkpoint folder in the Hugging Face "
                                f"layout (config.json, *.safetensors, tokenizer.json). Found there: {found or 'nothing'}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not the fields of a model")
    return raw


def model_config(raw: dict, where: str = "config.json") -> ModelConfig:
    """Turn the fields of a config.json into a ModelConfig.

    Raises ValueError for an unknown model_type, a missing field, or a field that would change the mathematics and is
    not honoured here; `where` names the file in the message.
    """
    raw = {key: value for key, value in raw.items() if not key.startswith("_")}
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, 1)
        raise ValueError(f"{where}: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}."
                         + (f" If it has the same network as {near[0]!r}, write that as its model_type." if near else ""))
    _check_types(raw, where)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"{where}: the weights are stored quantised ({method}); quantised checkpoints are not in this "
                         "release. Use the 16-bit checkpoint of the same model.")
    family, taken = FAMILIES[kind], {"model_type", "quantization_config"}

    def take(name, default=None, needed=False):
        taken.add(name)
        if raw.get(name) is None:
            if needed:
                raise ValueError(f"{where}: the field {name!r} is missing; a {kind} checkpoint states it")
            return default
        return raw[name]

    def switch(value):
        return bool(take(value, False)) if isinstance(value, str) else value

    layers, heads, width = (take(n, needed=True) for n in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    positions = take("max_position_embeddings", 2048)
    theta, rope = _rope(take("rope_theta", None), take("rope_scaling"), take("rope_parameters"), positions, where)
    config = ModelConfig(
        model_type=kind, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=take("intermediate_size", needed=True), vocab_size=take("vocab_size", needed=True),
        num_key_value_heads=take("num_key_value_heads", heads), head_dim=take("head_dim", width // heads),
        max_position_embeddings=positions, rms_norm_eps=take("rms_norm_eps", 1e-6),
        tie_word_embeddings=take("tie_word_embeddings", False), rope_theta=theta, rope=rope,
        initializer_range=take("initializer_range", 0.02), qkv_bias=switch(family.qkv_bias), o_bias=switch(family.o_bias),
        mlp_bias=switch(family.mlp_bias), qk_norm=family.qk_norm,
        windows=_windows(family.window, layers, take("sliding_window"), take("use_sliding_window", False),
                         take("max_window_layers", layers), take("layer_types"), where))
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
                         f"{config.num_key_value_heads}")
    if take("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported; {kind} models use silu")
    unread = {k: v for k, v in raw.items() if k not in taken and k not in HARMLESS and v and v != 1.0}
    if unread:
        raise ValueError(f"{where}: {_listed(unread)} may change what the network computes and is not honoured here. If it "
                         "is only a remark, take it out of config.json.")
    return config


def _check_types(raw, where):
    """Raises ValueError for a field that is not of its type in ModelConfig; null stands for an absent one."""
    kinds = {int: (lambda v: type(v) is int and v > 0, "a whole number above 0"),
             float: (lambda v: type(v) in (int, float) and v >= 0, "a number, 0 or above"),
             bool: (lambda v: type(v) is bool, "true or false"), dict: (lambda v: type(v) is dict, "an object")}
    expected = {spec.name: spec.type for spec in fields(ModelConfig) if spec.type in kinds}
    expected |= dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), dict)
    for name, kind in expected.items():
        fits, words = kinds[kind]
        if raw.get(name) is not None and not fits(raw[name]):
            raise ValueError(f"{where}: {name}: {json.dumps(raw[name])[:60]} is not {words}")


def _listed(fields):
    return ", ".join(f"{key!r}: {json.dumps(value)[:60]}" for key, value in fields.items())


def _rope(theta, scaling, parameters, positions, where):
    """rope_theta and one dict of rotation settings, from the older keys (rope_theta, rope_scaling) or the newer one."""
    rope = dict(parameters or scaling or {})
    theta = rope.pop("rope_theta", None) or theta or 10000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind not in ROPE_FIELDS:
        raise ValueError(f"{where}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_FIELDS)}")
    needed, optional = ROPE_FIELDS[kind]
    missing = [name for name in needed if rope.get(name) is None]
    # older Qwen files spell the yarn length only; a key nobody reads would be a silent difference
    extra = {k: v for k, v in rope.items() if k not in needed + optional and v is not None and kind != "default"}
    if rope.get("partial_rotary_factor") == 1.0:
        extra.pop("partial_rotary_factor", None)
    if missing or extra:
        raise ValueError(f"{where}: rope type {kind!r} " + (f"lacks {', '.join(missing)}" if missing else
                         f"has fields that are not honoured here: {_listed(extra)}"))
    rope.setdefault("original_max_position_embeddings", positions)
    return float(theta), {"rope_type": kind, **rope}


def _windows(rule, layers, width, asked, first, layer_types, where):
    """Per layer the sliding window in tokens, or None. Explicit layer_types win over the family's rule."""
    if rule == "never" or width is None or (rule == "asked" and not asked):
        return (None,) * layers
    if layer_types is not None:
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown or len(layer_types) != layers:
            raise ValueError(f"{where}: layer_types must name full_attention or sliding_attention for each of the {layers} "
                             f"layers; found {len(layer_types)} entries{', among them ' + unknown.pop() if unknown else ''}")
        return tuple(width if kind == "sliding_attention" else None for kind in layer_types)
    return tuple(width if rule == "always" or layer >= first else None for layer in range(layers))
