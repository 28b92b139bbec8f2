"""GLM-4.7-Flash and Mistral Small 4, latent attention both, against transformers' own classes.

No recorded folder has them: here are random weights of small sizes, saved by transformers.
"""
import pytest
import torch
import torch.nn.functional as F

from checkpoint.load import load_model
from checkpoint.read_config import model_config
from fast.fused_block import fuse_blocks
from model import KVCache
from tests.test_families import reference

SIZES = dict(hidden_size=32, intermediate_size=44, moe_intermediate_size=12, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=4, n_routed_experts=6, n_shared_experts=1,
             num_experts_per_tok=2, kv_lora_rank=12, q_lora_rank=10, qk_nope_head_dim=8,
             qk_rope_head_dim=4, v_head_dim=6, vocab_size=61, max_position_embeddings=256)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 8, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3, "partial_rotary_factor": 1 / 3}
VARIANTS = {
    "glm4_moe_lite": ("glm4_moe_lite", dict(rope_parameters={"rope_theta": 1e6,
                                                             "rope_type": "default"})),
    "types of layers": ("glm4_moe_lite", dict(
        mlp_layer_types=["sparse", "dense", "sparse"], n_group=2, topk_group=1,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"})),
    "mistral4": ("mistral4", dict(rope_parameters=YARN)),
    "first layer dense": ("mistral4", dict(rope_parameters=YARN, first_k_dense_replace=1,
                                           n_group=2, topk_group=1)),
}


def random_model(kind, fields):
    """transformers' model; AutoModelForCausalLM does not know Mistral 4's."""
    if kind != "mistral4":
        return reference(kind, fields, seed=3)
    modeling = pytest.importorskip("transformers.models.mistral4.modeling_mistral4")
    config = modeling.Mistral4Config(**fields, attn_implementation="eager")
    config._experts_implementation = "eager"
    config.pad_token_id = None
    model = modeling.Mistral4ForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.empty_like(p).normal_(generator=draw)
            p.copy_(p + 0.3 * noise if p.dim() == 1 else noise / p.shape[-1] ** 0.5)
    return model


IDS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_of_transformers(name, tmp_path):
    kind, fields = VARIANTS[name]
    transformers = pytest.importorskip("transformers")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    theirs = random_model(kind, SIZES | fields)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    want = theirs(IDS).logits
    for model.kernel in ("plain", "sdpa-math"):
        for matmul in (None, F.linear):
            fuse_blocks(model, matmul)
            assert (model.logits(model(IDS)) - want).abs().max() < 1e-4, (model.kernel, matmul)
    cache = KVCache(3)
    parts = [model.logits(model(part, cache=cache)) for part in IDS.split((9, 1, 6, 1, 3), 1)]
    assert (torch.cat(parts, 1) - want).abs().max() < 1e-4


def test_types_of_layers_that_do_not_fit():
    fields = SIZES | {"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "mixed", "x"]}
    with pytest.raises(ValueError, match="holds sparse or dense for each of the 3 layers"):
        model_config(fields)
