"""Small models with random weights, their checkpoints and adapters, for tests of several modules.

Next: twins.py, the decoders that random checkpoints are compared with.
"""
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint.files import tensor_files, write_tensors
from checkpoint.read_config import model_config
from families import FAMILIES
from lora import LoRALinear, trainable
from methods.quant import quantize
from methods.optimizers import further_arguments
from model import CausalLM, init_weights
from tests import twins
from tests.common import GOLDEN

# ---- models ----

TINY = dict(model_type="qwen3", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=50,
            max_position_embeddings=64)
STACKED = dict(TINY, model_type="llama4_text", num_local_experts=6, num_experts_per_tok=3,
               intermediate_size_mlp=40)
TINY_QWEN2 = dict(model_type="qwen2", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
                  max_position_embeddings=64, initializer_range=0.2)
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(5))


def tiny(**changes):
    """A model of TINY's config.json with these changes; no parameter is trainable."""
    model = CausalLM(model_config({**TINY, **changes}))
    init_weights(model, torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


def further(config):
    """The further arguments of make_optimizer for the model of TINY."""
    return further_arguments(config, model_config(TINY))


def tiny_qwen2(dtype=torch.float32, **changes):
    """A model of TINY_QWEN2's config.json with these changes, and with random biases."""
    model = CausalLM(model_config({**TINY_QWEN2, **changes}))
    init_weights(model, torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False).eval().to(dtype)


def logits_of(model, ids):
    """Logits (B, T, vocabulary) without a graph."""
    with torch.no_grad():
        return model.logits(model(ids))


def same_bytes(a, b):
    """Whether two tensors have the same dtype, shape and bytes; NaNs included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


# ---- models of every family, as large as a memory plan needs ----

SMALL_LLAMA = dict(
    model_type="llama",
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=512,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=96)
SMALL_FAMILIES = {
    "llama": {},
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "gemma2": dict(model_type="gemma2", head_dim=16, sliding_window=64, query_pre_attn_scalar=16),
    "glm4": dict(model_type="glm4", head_dim=16),
    "olmo": dict(model_type="olmo", clip_qkv=8.0, num_key_value_heads=8),
    "olmo2": dict(model_type="olmo2", num_key_value_heads=8),
    "mistral": dict(model_type="mistral", sliding_window=100),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(model_type="qwen2_moe", shared_expert_intermediate_size=160, **EXPERTS),
    "llama4": dict(
        model_type="llama4_text",
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size_mlp=352,
        intermediate_size=128,
        num_local_experts=4,
        attention_chunk_size=128,
        num_experts_per_tok=1,
    ),
    "gpt_oss": dict(
        model_type="gpt_oss",
        head_dim=16,
        intermediate_size=96,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=64,
    ),
}


def small_config(name, **changes):
    """The ModelConfig of a small model of this family."""
    return model_config({**SMALL_LLAMA, **SMALL_FAMILIES[name], **changes})


# ---- checkpoints ----

RECORDED_MODELS = [
    folder.name for folder in sorted((GOLDEN / "models").glob("*"))
    if json.loads((folder / "config.json").read_text())["model_type"] in FAMILIES
]
RANDOM_CHECKPOINTS = {
    "qwen": twins.QWEN1,
    "internlm2": twins.INTERNLM2,
    "glm4_original": twins.GLM4_ORIGINAL,
    "baichuan1_7b": twins.BAICHUAN1_7B,
    "xverse_biases": {**twins.XVERSE, "bias": True},
}
CHECKPOINTS = [*(p.name for p in sorted((GOLDEN / "models").glob("*"))), *RANDOM_CHECKPOINTS]
TINY_LLAMA = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)


def write_tiny(folder, model, drop=(), add=(), **changes):
    """The checkpoint of a model that `tiny` made; returns its folder.

    drop, add: names of tensors left out, pairs (name, tensor) written besides.
    changes: of TINY's config.json.
    """
    folder.mkdir(exist_ok=True)
    tensors = {n: p.clone() for n, p in model.named_parameters() if n not in drop}
    save_file({**tensors, **dict(add)}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}))
    return folder


def checkpoint_of(name, folder):
    """The recorded checkpoint of this name, or a random one written into `folder`."""
    if name not in RANDOM_CHECKPOINTS:
        return GOLDEN / "models" / name
    fields = RANDOM_CHECKPOINTS[name]
    shapes, _ = twins.TWINS[fields["model_type"]]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(twins.random_weights(shapes(fields), 0), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def tensors_in(folder):
    """All tensors of a checkpoint folder, each from the file that its index, if any, names."""
    files = tensor_files(folder)
    held = {file: load_file(file) for file in set(files.values())}
    return {name: held[file][name] for name, file in files.items()}


def base_with(folder, dtype=torch.float32, shard_bytes=10**9, extra=(), **changes):
    """A random checkpoint of TINY_LLAMA with these changes; extra: further tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**TINY_LLAMA, **changes}
    model = CausalLM(model_config(fields)).requires_grad_(False)
    init_weights(model, torch.Generator().manual_seed(0))
    weights = {**{name: p.to(dtype) for name, p in model.named_parameters()}, **dict(extra)}
    shapes = {name: (tuple(w.shape), w.dtype) for name, w in weights.items()}
    write_tensors(folder, shapes, lambda name: [weights[name]], shard_bytes)
    fields = {**TINY_LLAMA, "torch_dtype": "float32", **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def write_quantized(folder, out, form):
    """A copy of a checkpoint with every *_proj in the given form, in bitsandbytes' layout."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"),
                    copy_function=shutil.copyfile)
    found = {}
    for name, weight in tensors_in(folder).items():
        if not name.endswith("_proj.weight"):
            found[name] = weight
            continue
        packed, module = quantize(weight, form), name.removesuffix(".weight")
        if form.kind == "int8":
            found |= {name: packed.codes, f"{module}.SCB": packed.absmax}
            found[f"{module}.weight_format"] = torch.tensor(0).byte()
            continue
        found |= {name: packed.codes[:, None], f"{name}.absmax": packed.absmax,
                  f"{name}.quant_map": packed.quant_map}
        state = {"quant_type": form.kind, "blocksize": form.blocksize,
                 "dtype": str(weight.dtype)[6:], "shape": list(weight.shape)}
        if form.nested:
            found[f"{name}.nested_absmax"] = packed.nested_absmax
            found[f"{name}.nested_quant_map"] = packed.nested_quant_map
            state |= {"nested_blocksize": form.nested, "nested_dtype": "float32"}
            state["nested_offset"] = float(packed.nested_offset)
        state_bytes = torch.tensor(list(json.dumps(state).encode())).byte()
        found[f"{name}.quant_state.bitsandbytes__{form.kind}"] = state_bytes
    save_file(found, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    load_in = "load_in_8bit" if form.kind == "int8" else "load_in_4bit"
    config["quantization_config"] = {"quant_method": "bitsandbytes", load_in: True}
    (out / "config.json").write_text(json.dumps(config))
    return out


def write_grouped(folder, out, method="gptq", bits=4, group_size=32, act=False, **settings):
    """A copy of a checkpoint with every *_proj quantized as GPTQ or AWQ stores it.

    Packed by the formats' published definitions, with Python's integers and none of our code.
    act: columns belong to groups in another order. Returns {name: the weight that is stored}.
    """
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"),
                    copy_function=shutil.copyfile)
    draw, stored, dense = torch.Generator().manual_seed(5), {}, {}
    for name, weight in tensors_in(folder).items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        size_in, layer = weight.shape[1], name.removesuffix(".weight")
        size = size_in if group_size == -1 else group_size
        g_idx = torch.arange(size_in) // size
        if act:
            g_idx = g_idx[torch.randperm(size_in, generator=draw)]
        codes, zeros, scales = in_groups(weight.float(), g_idx, bits)
        dense[name] = (scales.float()[:, g_idx] * (codes - zeros[:, g_idx])).half()
        if method == "awq":
            order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
            rows = [m.T.reshape(m.shape[1], -1, 8)[..., order].flatten(1) for m in (codes, zeros)]
            stored[f"{layer}.qweight"], stored[f"{layer}.qzeros"] = (words(r, 4) for r in rows)
        else:
            minus = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
            stored[f"{layer}.qweight"] = words(codes, bits).T.contiguous()
            stored[f"{layer}.qzeros"] = words(zeros.T - minus, bits)
            stored[f"{layer}.g_idx"] = g_idx.int()
        stored[f"{layer}.scales"] = scales.T.contiguous()
    save_file(stored, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": bits, "desc_act": act,
                                     "group_size": group_size, **settings}
    if method == "awq":
        del config["quantization_config"]["desc_act"]
    (out / "config.json").write_text(json.dumps(config))
    return dense


def in_groups(weight, g_idx, bits):
    """(codes, zeros, scales) of a matrix: each group from its least to its largest number."""
    scales, zeros = [], []
    for group in range(int(g_idx.max()) + 1):
        part = weight[:, g_idx == group]
        low, high = part.amin(1).clamp(max=-1e-3), part.amax(1).clamp(min=1e-3)
        scales.append(((high - low) / (2**bits - 1)).half())
        zeros.append((-low / scales[-1].float()).round().clamp(1, 2**bits - 1))
    scales, zeros = torch.stack(scales, 1), torch.stack(zeros, 1)
    codes = (weight / scales.float()[:, g_idx]).round() + zeros[:, g_idx]
    return codes.clamp(0, 2**bits - 1), zeros, scales


def words(codes, bits):
    """Each row's codes as one number, the first in its lowest bits, cut into 32-bit words."""
    rows = []
    for row in codes.int().tolist():
        whole = sum(code << bits * i for i, code in enumerate(row))
        rows.append([whole >> 32 * i & 2**32 - 1 for i in range(-(-len(row) * bits // 32))])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


# ---- adapters ----


def perturb(model, seed=0, size=0.3):
    """Add noise to every trained parameter, so that an adapter that is not used shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def adapted_linear(size_in, size_out, r, bias=True, dtype=torch.float64, base=None):
    """A LoRALinear whose adapter changes its output."""
    if base is None:
        base = nn.Linear(size_in, size_out, bias=bias, dtype=dtype)
        base.weight.requires_grad_(False)
    layer = LoRALinear(base, r, 0.7, 0.0)
    for matrix in (layer.lora_A, layer.lora_B):
        matrix.to(dtype).weight.data.normal_()
    return layer


def adapter_with(folder, base, r=4, alpha=8, targets=("q_proj", "down_proj"), seed=1, drop=(),
                 add=(), **fields):
    """A small random adapter in PEFT's format, made without the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in sorted(tensors_in(base).items()):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in targets:
            size_out, size_in = weight.shape
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(r, size_in, generator=draw)
            tensors[f"{key}.lora_B.weight"] = torch.randn(size_out, r, generator=draw)
    tensors = {name: t for name, t in tensors.items() if name not in drop} | dict(add)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    fields = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "base_model_name_or_path": str(base),
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def load_in_peft(base_folder, adapter_folder):
    """The same base and adapter, loaded by transformers and PEFT; no key may be missing."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder,
                                                             attn_implementation="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter_folder).eval()
    assert not [w for w in caught if "missing adapter keys" in str(w.message)]
    return model
