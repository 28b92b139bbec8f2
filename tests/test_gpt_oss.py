"""GPT-OSS of any sizes against transformers and PEFT: sinks, clamped experts, their adapters."""
import json

import pytest
import torch
import torch.nn.functional as F

from attention import PackedLayout
from checkpoint.adapters import adapter_tensors, in_pefts_layout, load_adapter, save_adapter
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from fast.fused_block import fuse_blocks
from layers import MoE, one_by_one
from lora import LoRAConfig, attach_lora, lora_layers
from model import KVCache
from tests.test_families import reference
from tests.tiny_models import perturb

SIZES = dict(hidden_size=32, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, vocab_size=61, max_position_embeddings=64)
VARIANTS = {
    "odd number of experts": dict(num_local_experts=5, num_experts_per_tok=3, sliding_window=4),
    "without yarn": dict(num_local_experts=4, num_experts_per_tok=1, sliding_window=4,
                         rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "other limit, no biases": dict(num_local_experts=3, num_experts_per_tok=2, sliding_window=5,
                                   swiglu_limit=0.4, swiglu_alpha=1.3, attention_bias=False),
    "full layers": dict(num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=1,
                        layer_types=["full_attention"] * 3, swiglu_limit=1.0,
                        tie_word_embeddings=True),
}
IDS = torch.randint(0, 61, (2, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to)."""
    pytest.importorskip("transformers", minversion="5.0",
                        reason="before 5 the limit is always 7, and rope_parameters is not read")
    theirs = reference("gpt_oss", SIZES | VARIANTS[request.param], seed=2)
    folder = tmp_path_factory.mktemp("gpt_oss")
    theirs.save_pretrained(folder)
    return theirs, folder


@torch.no_grad()
def test_logits_of_transformers(pair):
    theirs, folder = pair
    model = load_model(folder)
    want = theirs(IDS).logits
    for model.kernel in ("plain", "sdpa-math", "sdpa-flash"):
        for matmul in (None, F.linear):
            fuse_blocks(model, matmul)
            assert (model.logits(model(IDS)) - want).abs().max() < 1e-4, (model.kernel, matmul)
        cache = KVCache(3)
        parts = [model.logits(model(part, cache=cache)) for part in IDS.split((5, 1, 3, 1, 4), 1)]
        assert (torch.cat(parts, 1) - want).abs().max() < 1e-4, model.kernel
        row = IDS.reshape(1, -1)
        positions = torch.arange(14).repeat(2)[None]
        packed = model.logits(model(row, positions, PackedLayout((14, 14))))
        assert (packed.view_as(want) - want).abs().max() < 1e-4, model.kernel


def test_experts_one_by_one(pair):
    """The loop over experts equals its twin, token by token."""
    model = load_model(pair[1])
    moe = next(module for module in model.modules() if isinstance(module, MoE))
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    chosen, weights = moe.route(moe.scores(rows))
    with torch.no_grad():
        twin = one_by_one(rows, chosen, weights, moe.expert, moe.config.num_experts, False)
        torch.testing.assert_close(moe.mix(rows, chosen, weights), twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets, use_rslora", (
    (["all", "experts"], False), (["experts"], True), (["gate_up_proj", "q_proj"], False),
    (["experts.down_proj"], False), (["all", "experts", "router"], True)))
@pytest.mark.parametrize("pair", ["odd number of experts"], indirect=True)
def test_a_training_step_of_peft(pair, targets, use_rslora, tmp_path):
    """Loss and the gradients of A and B equal those of PEFT, which reads the adapter we wrote."""
    peft = pytest.importorskip("peft", minversion="0.21")
    theirs, folder = pair
    model = load_model(folder)
    config = LoRAConfig(r=3, lora_alpha=7, target_modules=targets, use_rslora=use_rslora)
    attach_lora(model, config, stored_name=model.config.stored_name)
    save_adapter(perturb(model, size=0.1), tmp_path, config, str(folder))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    labels = IDS[:, 1:].flatten()

    want = F.cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), labels)
    want.backward()
    expected = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters()
                if p.grad is not None}
    theirs.unload()
    for again in (model, load_model(folder)):
        if again is not model:
            load_adapter(again, tmp_path)
            assert list(lora_layers(again)) == list(lora_layers(model))
        loss = F.cross_entropy(again.logits(again(IDS))[:, :-1].flatten(0, 1), labels)
        loss.backward()
        assert abs(loss - want) < 1e-5
        grads = in_pefts_layout(again, {name: p.grad
                                        for name, p in adapter_tensors(again).items()})
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert (grad - expected[name]).abs().max() < 1e-5, name


def test_what_config_json_leaves_out():
    """As transformers has it: yarn, a window of 128 in every second layer, biases, a limit of 7."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__.startswith("4."):
        pytest.skip("the fields of transformers 5")
    theirs = transformers.GptOssConfig()
    ours = model_config({"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 4,
                         "intermediate_size": 2880, "num_attention_heads": 64, "vocab_size": 100,
                         "num_key_value_heads": 8, "num_local_experts": 128,
                         "num_experts_per_tok": 4})
    assert (ours.head_dim, ours.rms_norm_eps, ours.rope_theta, ours.swiglu_limit) == (
        theirs.head_dim, theirs.rms_norm_eps, 150000.0, theirs.swiglu_limit)
    assert ours.windows == (128, None, 128, None) and ours.qkv_bias and ours.o_bias
    rope = json.loads(json.dumps(theirs.rope_parameters))
    rope.pop("rope_theta", None)
    assert ours.rope == rope


def test_another_activation_is_refused():
    fields = {"model_type": "gpt_oss", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match="hidden_act: \"gelu\" is not supported"):
        model_config(fields | {"hidden_act": "gelu"})
