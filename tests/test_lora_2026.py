"""Adapters of experts as PEFT writes them: of stacks, and of each expert by itself.

golden/lora2026 has what PEFT computes with each adapter, and the merged weights of the first layer.
"""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import merge
from checkpoint.adapters import load_adapter, load_with_adapters, save_adapter
from checkpoint.load import load_model
from checkpoint.peft_targets import why_peft_differs
from lora import lora_layers
from tests.common import GOLDEN, needs_shared
from tests.test_peft_targets import by_peft, mixtral, needs_peft_21  # noqa: F401
from tests.tiny_models import IDS, logits_of, tensors_in

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


STACKS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("name, parameters, fields", [
    ("qwen3_moe", STACKS, {}), ("qwen3_moe", STACKS[1:], {}), ("qwen2_moe", STACKS[:1], {}),
    ("mixtral", STACKS, {"rank_pattern": {r".*\.gate_up_proj": 2},
                         "alpha_pattern": {r".*\.gate_up_proj": 9}, "use_rslora": True}),
    ("glm4_moe", STACKS, {})])
def test_stacks_of_peft_on_experts_one_by_one(name, parameters, fields, mixtral,  # noqa: F811
                                              tmp_path):
    """target_parameters of PEFT 0.21, on checkpoints whose files have each expert by itself."""
    transformers, peft = needs_peft_21()
    base = mixtral if name == "mixtral" else next(
        folder for folder in GOLDEN.glob(f"models*/{name}"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters, **fields))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.copy_(0.2 * torch.randn(p.shape, generator=draw))
        want = theirs.eval()(IDS).logits
    theirs.save_pretrained(tmp_path / "theirs")

    model = load_model(base)
    config = load_adapter(model, tmp_path / "theirs")
    assert sum(".experts." in layer for layer in lora_layers(model)) > 0
    assert (logits_of(model.eval(), IDS) - want).abs().max() < 1e-4
    merge.main([f"model_name_or_path={base}", f"adapter_name_or_path={tmp_path / 'theirs'}",
                f"export_dir={tmp_path / 'merged'}"])
    assert (logits_of(load_model(tmp_path / "merged"), IDS) - want).abs().max() < 1e-4

    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours", config, str(base))
    again = load_model(base)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(model, IDS))
    if not why_peft_differs(model, config):
        assert (by_peft(base, tmp_path / "ours") - want).abs().max() < 1e-4
