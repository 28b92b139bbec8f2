"""checkpoint/expert_layouts.py: adapters of single experts on checkpoints that stack them.

Expected are the logits of the base with scale * B A of each expert added to its matrices by hand.
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from checkpoint.adapters import load_adapter, reload_adapter, save_adapter
from checkpoint.load import load_model
from checkpoint.served_adapter import save_served
from lora import LoRAConfig, LoRAStacked, attach_lora, lora_layers
from tests.common import GOLDEN, needs_shared
from tests.tiny_models import IDS, logits_of, perturb

pytestmark = needs_shared
BASES = {"gpt_oss": GOLDEN / "models2026/gpt_oss", "llama4": GOLDEN / "models/llama4"}


def write_adapter(folder, base, parts, experts, shared=False):
    """Random adapters of single experts, r 2 and scale 3; returns the base with them added."""
    model = load_model(base)
    stored_name = model.config.stored_name
    tensors = {}
    draw = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if not name.endswith(".mlp.experts"):
            continue
        for expert in experts:
            A = 0.2 * torch.randn(2, model.config.hidden_size, generator=draw)
            for part in parts:
                stack = module.down_proj if part == "down_proj" else module.gate_up_proj
                if part == "down_proj" or not shared:
                    A = 0.2 * torch.randn(2, stack.in_features, generator=draw)
                matrix = stack.weight[expert]                           # a view, (out, in)
                matrix = matrix if stack.out_first else matrix.T
                if part != "down_proj":
                    first = ("gate_proj", "up_proj").index(part)
                    matrix = (matrix[first::2] if model.config.interleaved_gate_up
                              else matrix.chunk(2)[first])
                B = 0.2 * torch.randn(len(matrix), 2, generator=draw)
                with torch.no_grad():
                    matrix += 3 * B @ A
                key = f"base_model.model.{stored_name(f'{name}.{expert}.{part}')}"
                tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    folder.mkdir()
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()},
              folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(parts),
        "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}))
    return model


ALL = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("name, parts, experts, shared, rank", [
    ("gpt_oss", ALL, range(4), False, 4), ("llama4", ALL, range(4), False, 4),
    ("gpt_oss", ALL[:2], range(4), True, 2), ("llama4", ALL[1:], (0, 2), False, 2)])
def test_adapters_of_single_experts_on_stacks(name, parts, experts, shared, rank, tmp_path):
    base = BASES[name]
    want = logits_of(write_adapter(tmp_path / "one", base, parts, experts, shared), IDS)
    model = load_model(base)
    config = load_adapter(model, tmp_path / "one")
    got = logits_of(model.eval(), IDS)
    assert (got - want).abs().max() < 1e-4
    assert (logits_of(load_model(base), IDS) - want).abs().max() > 0.05
    assert {config.rank_and_alpha(model.config.stored_name(f"{layer}.weight"))
            for layer in lora_layers(model) if layer.endswith("gate_up_proj")} == {(rank, 3 * rank)}

    save_adapter(model, tmp_path / "one", config, str(base))        # as stacks, which PEFT reads
    again = load_model(base)
    load_adapter(again, tmp_path / "one")
    assert torch.equal(logits_of(again.eval(), IDS), got)


def test_they_are_merged_and_reloaded(tmp_path):
    base = BASES["gpt_oss"]
    want = logits_of(write_adapter(tmp_path / "one", base, ALL, range(4)), IDS)
    merge.main([f"model_name_or_path={base}", f"adapter_name_or_path={tmp_path / 'one'}",
                f"export_dir={tmp_path / 'merged'}"])
    assert (logits_of(load_model(tmp_path / "merged"), IDS) - want).abs().max() < 1e-4
    model = load_model(base)
    load_adapter(model, tmp_path / "one")
    reload_adapter(perturb(model, size=0.1), tmp_path / "one")
    assert (logits_of(model.eval(), IDS) - want).abs().max() < 1e-4


def test_an_adapter_for_servers_is_read_back(tmp_path):
    base = BASES["llama4"]
    model = load_model(base)
    config = LoRAConfig(r=3, lora_alpha=6, target_modules=["all", "experts"])
    attach_lora(model, config, stored_name=model.config.stored_name)
    perturb(model, size=0.1).eval()
    save_served(model, tmp_path, config, str(base))
    again = load_model(base)
    load_adapter(again, tmp_path)
    stacks = [layer for layer in lora_layers(again).values() if isinstance(layer, LoRAStacked)]
    assert {len(layer.lora_A.weight) // len(layer.weight) for layer in stacks} == {3}
    assert (logits_of(again.eval(), IDS) - logits_of(model, IDS)).abs().max() < 1e-5


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    write_adapter(tmp_path / "one", BASES["gpt_oss"], ALL, (3,))
    path = tmp_path / "one" / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"alpha_pattern": {"gate_proj": 1}}))
    with pytest.raises(ValueError, match="have different scales"):
        load_adapter(load_model(BASES["gpt_oss"]), tmp_path / "one")
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"experts.3.down_proj has A .* takes A"):
        load_adapter(load_model(BASES["llama4"]), tmp_path / "one")
    file = tmp_path / "one" / "adapter_model.safetensors"
    save_file({key: tensor[:, :7].contiguous() if "down_proj.lora_A" in key else tensor
               for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"has A \[2, 7\] and B .*down_proj has 4 experts"):
        load_adapter(load_model(BASES["gpt_oss"]), tmp_path / "one")
