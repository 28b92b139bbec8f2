"""runtime/adapted_share.py: what an adapter changes, in words and as a share."""
import pytest
import torch

from lora import LoRAConfig, attach_lora
from model import CausalLM
from runtime.adapted_share import adapted_in_words, base_size, note_on_experts
from tests.tiny_models import small_config

QKVO = "q_proj, k_proj, v_proj, o_proj"
MLP = "gate_proj, up_proj, down_proj"
LEFT_OUT = "of the base's parameters are in experts, which lora_target leaves out: lora_target: all"


@pytest.mark.parametrize("name, targets, matrices, warns", [
    ("llama", "all", f"{QKVO}, {MLP} of all blocks", False),
    ("gpt_oss", "all", f"{QKVO} of all blocks", True),
    ("gpt_oss", ["all", "experts"],
     f"{QKVO}, gate_up_proj (experts), down_proj (experts) of all blocks", False),
    ("mixtral", "all", f"{QKVO} of all blocks", True),
    ("mixtral", ["q_proj", "lm_head"], "q_proj of all blocks; lm_head", True),
    ("qwen2_moe", [r".*layers\.[23]\.self_attn\.[qk]_proj"], "q_proj, k_proj of 2 of 4 blocks",
     True),
])
def test_kinds_and_share(name, targets, matrices, warns):
    with torch.device("meta"):
        model = CausalLM(small_config(name))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert adapted_in_words(model) == "" and note_on_experts(model) == []
    attach_lora(model, LoRAConfig(target_modules=targets), stored_name=model.config.stored_name)
    assert base_size(model) == sum(sizes.values())
    adapted = {n.removesuffix(".lora_A.weight") for n, _ in model.named_parameters()
               if n.endswith(".lora_A.weight")}
    share = sum(sizes[f"{n}.weight"] for n in adapted) / sum(sizes.values())
    assert adapted_in_words(model) == f"{matrices}: {100 * share:.3g}% of the base"
    experts = sum(size for n, size in sizes.items() if ".experts." in n
                  and not n.endswith("bias")) / sum(sizes.values())
    notes = note_on_experts(model)
    assert (len(notes) == 1) == warns
    if warns:
        assert notes[0].startswith(f"{100 * experts:.3g}% {LEFT_OUT}")
