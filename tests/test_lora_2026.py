"""Adapters of experts as PEFT writes them: of stacks, and of each expert by itself.

golden/lora2026 has what PEFT computes with each adapter, and the merged weights of the first layer.
"""
import pytest
import torch.nn.functional as F
from safetensors.torch import load_file

import merge
from checkpoint.adapters import load_adapter, load_with_adapters
from checkpoint.load import load_model
from tests.common import GOLDEN, needs_shared
from tests.tiny_models import logits_of, tensors_in

ADAPTERS = GOLDEN / "lora2026"
BASES = {"gpt_oss_experts": GOLDEN / "models2026/gpt_oss",
         "qwen3_moe_each_expert": GOLDEN / "models/qwen3_moe"}

pytestmark = needs_shared


@pytest.mark.parametrize("name", BASES)
def test_logits_and_merged_weights_of_peft(name, tmp_path):
    want = load_file(ADAPTERS / name / "expected.safetensors")
    real = want["attention_mask"].bool()
    model = load_model(BASES[name])
    assert (logits_of(model, want["input_ids"]) - want["logits_base"])[real].abs().max() < 1e-4
    load_adapter(model, ADAPTERS / name)
    logits = logits_of(model.eval(), want["input_ids"])
    assert (logits - want["logits"])[real].abs().max() < 1e-4
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), want["labels"][:, 1:].flatten())
    assert abs(loss - want["loss"]) < 1e-5

    merge.main([f"model_name_or_path={BASES[name]}", f"adapter_name_or_path={ADAPTERS / name}",
                f"export_dir={tmp_path / 'out'}"])
    merged = tensors_in(tmp_path / "out")
    for key, tensor in want.items():
        if key.startswith("merged."):
            assert (merged[key.removeprefix("merged.")] - tensor).abs().max() < 1e-5, key
    folded = load_with_adapters(BASES[name], [ADAPTERS / name], fold_last=True)
    for other in (load_model(tmp_path / "out"), folded):
        logits = logits_of(other, want["input_ids"])
        assert (logits - want["logits_merged"])[real].abs().max() < 1e-4
