"""adapter_prefix: served, export_format: peft, and --check_adapter."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from checkpoint.adapters import load_adapter, save_adapter, variant_of
from checkpoint.files import write_json
from checkpoint.load import load_model
from checkpoint.served_adapter import save_served
from lora import LoRAConfig, attach_lora, expert_matrices, lora_layers
from tests.test_adapter_names import trained_adapter, wrapped_base
from tests.tiny_models import (IDS, SMALL_FAMILIES, SMALL_LLAMA, STACKED, TINY, logits_of, perturb,
                               tiny)

PAIRS = ("lora_A.weight", "lora_B.weight")


def adapted(base, folder, **settings):
    """A base in a folder with a random adapter, which is saved."""
    model = load_model(base, torch.float32)
    config = LoRAConfig(**{"r": 3, "lora_alpha": 6, **settings})
    perturb(attach_lora(model, config, stored_name=model.config.stored_name, **variant_of(config)),
            size=0.1)
    folder.mkdir()
    save_adapter(model, folder, config, str(base))
    return model.eval(), config


def saved(folder, fields):
    """A random model of these fields of config.json, in the folder."""
    model = tiny(**fields)
    save_file({model.config.stored_name(name): p.detach().clone()
               for name, p in model.named_parameters()}, folder / "model.safetensors")
    write_json(folder / "config.json", fields)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("qwen"), TINY)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("stacked"), STACKED)


def test_a_served_adapter_has_one_rank_one_scale_and_whole_groups(qwen, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ours, _ = adapted(qwen, tmp_path / "adapter", use_rslora=True,
                      target_modules=["q_proj", "gate_proj", "down_proj"],
                      rank_pattern={"down_proj": 2}, alpha_pattern={"gate_proj": 9})
    merge.main([f"model_name_or_path={qwen}", f"adapter_name_or_path={tmp_path / 'adapter'}",
                f"export_dir={tmp_path / 'served'}", "export_format=peft",
                "adapter_prefix=served"])
    fields = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert fields["r"] == 3 and not {"use_rslora", "rank_pattern", "alpha_pattern"} & fields.keys()
    tensors = load_file(tmp_path / "served" / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {3}
    for leaf in ("k_proj", "v_proj", "up_proj"):            # SGLang joins them with q and gate
        assert all(not tensor.any() for key, tensor in tensors.items() if f".{leaf}.lora_B" in key)
        assert any(f".{leaf}.lora_A" in key for key in tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "served").eval()
    with torch.no_grad():
        assert (theirs(IDS).logits - logits_of(ours, IDS)).abs().max() < 1e-4
    again = load_model(qwen, torch.float32)
    load_adapter(again, tmp_path / "served")
    assert (logits_of(again.eval(), IDS) - logits_of(ours, IDS)).abs().max() < 1e-5


def test_stacks_of_experts_are_served_one_by_one(stacked, tmp_path):
    ours, config = adapted(stacked, tmp_path / "adapter", target_modules=["experts", "q_proj"])
    save_served(ours, tmp_path, config, "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = lora_layers(ours)
    front = "base_model.model.model.layers.0.feed_forward.experts"
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        layer = layers[f"model.layers.0.mlp.experts.{name}"]
        for expert in range(6):
            A, B = expert_matrices(layer.lora_A.weight, layer.lora_B.weight, 6, expert)
            found = torch.cat([torch.matmul(*(tensors[f"{front}.{expert}.{part}.{pair}"]
                                              for pair in reversed(PAIRS))) for part in parts])
            assert torch.allclose(found, B @ A, atol=1e-6)


@pytest.mark.parametrize("settings, word", [({"use_dora": True}, "DoRA"),
                                            ({"modules_to_save": ["lm_head"]}, "fully trained")])
def test_what_servers_do_not_apply_is_refused(qwen, tmp_path, settings, word):
    adapted(qwen, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    with pytest.raises(ValueError, match=word):
        merge.main([f"model_name_or_path={qwen}", f"adapter_name_or_path={tmp_path / 'adapter'}",
                    f"export_dir={tmp_path / 'out'}", "export_format=peft",
                    "adapter_prefix=served"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


# ---- --check_adapter ----


def check(base, adapter, capsys):
    """{program: what --check_adapter prints of it}."""
    capsys.readouterr()
    merge.main([f"model_name_or_path={base}", "--check_adapter", str(adapter)])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("checked"))
    return {line[:10].strip(): line[10:] for line in lines[start:]}


def renamed(adapter, change):
    """The adapter with other names of its tensors."""
    path = adapter / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path)


def test_our_adapters_are_applied_by_all(qwen, tmp_path, capsys):
    adapted(qwen, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    found = check(qwen, tmp_path / "adapter", capsys)
    for program in ("PEFT", "vLLM", "SGLang"):
        assert found[program] == "applies all 6 layers"
    assert found["llama.cpp"].startswith("applies 6 matrices")


def test_names_that_no_module_has_are_said_by_program(tmp_path, capsys):
    """The names of the text model alone, of which vLLM says nothing and PEFT warns."""
    base = wrapped_base("gemma3", tmp_path / "base")
    trained_adapter(base, tmp_path / "adapter")
    assert check(base, tmp_path / "adapter", capsys)["vLLM"] == "applies all 4 layers"
    renamed(tmp_path / "adapter", lambda key: key.replace("language_model.", ""))
    found = check(base, tmp_path / "adapter", capsys)
    assert "it looks for model.language_model...." in found["PEFT"]
    for program in ("PEFT", "vLLM"):
        assert found[program].startswith("applies 0 of 4 layers; ignores 4, such as model.layers.0")
    assert "it looks for language_model.model...." in found["vLLM"]
    assert "rank_pattern" in found["SGLang"]
    assert "does not load it" in found["llama.cpp"]


def test_an_adapter_of_a_model_of_another_size_is_applied_by_none(qwen, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapted(qwen, adapter, target_modules=["down_proj"])
    path = adapter / "adapter_model.safetensors"
    save_file({key: torch.cat([tensor, tensor], 1) if "lora_A" in key else tensor
               for key, tensor in load_file(path).items()}, path)
    found = check(qwen, adapter, capsys)
    for program in ("PEFT", "vLLM", "SGLang"):
        assert "does not load it: base_model.model.model.layers.0.mlp.down_proj" in found[program]
    assert "has shape" in found["llama.cpp"]
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(qwen), adapter)


def test_peft_ignores_what_is_said(qwen, tmp_path, capsys):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    adapted(qwen, tmp_path / "adapter", target_modules=["q_proj"])
    renamed(tmp_path / "adapter", lambda key: key.replace("layers.1", "layers.7"))
    found = check(qwen, tmp_path / "adapter", capsys)
    assert found["PEFT"].startswith("applies 1 of 2 layers; ignores 1, such as model.layers.7")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(qwen), tmp_path / "adapter")
    applied = [name for name, p in theirs.named_parameters() if "lora_B" in name and p.any()]
    assert len(applied) == 1 and "layers.0" in applied[0]


@pytest.mark.parametrize("settings, program, words", [
    ({"use_rslora": True}, "SGLang", "applies all 4 layers; but scales all layers by lora_alpha"),
    ({"rank_pattern": {"v_proj": 2}}, "SGLang", "does not load it: rank_pattern"),
    ({"use_dora": True}, "vLLM", "does not load it: use_dora"),
    ({"use_dora": True}, "llama.cpp", "DoRA"),
    ({"modules_to_save": ["lm_head"]}, "vLLM", "does not load it: modules_to_save: lm_head"),
    ({"target_modules": ["q_proj"]}, "SGLang", "needs an adapter of v_proj too"),
    ({"r": 20}, "vLLM", "applies all 4 layers; start it with --max-lora-rank 20")])
def test_fields_that_a_program_does_not_read(qwen, tmp_path, capsys, settings, program, words):
    adapted(qwen, tmp_path / "adapter", **{"target_modules": ["q_proj", "v_proj"], **settings})
    assert words in check(qwen, tmp_path / "adapter", capsys)[program]


def test_stacks_of_experts_are_for_peft_alone(stacked, tmp_path, capsys):
    ours, config = adapted(stacked, tmp_path / "adapter", target_modules=["experts"])
    found = check(stacked, tmp_path / "adapter", capsys)
    assert found["PEFT"] == "applies all 4 layers"
    assert found["vLLM"].startswith("does not load it: it has no layer experts")
    assert "ignores 4" in found["SGLang"]
    save_served(ours, tmp_path / "adapter", config, "base")
    found = check(stacked, tmp_path / "adapter", capsys)
    assert found["vLLM"] == found["SGLang"] == "applies all 36 layers"
    assert found["PEFT"].startswith("applies 0 of 36 layers")


def test_vllm_applies_the_stacks_of_gpt_oss(tmp_path, capsys):
    base = saved(tmp_path, {**SMALL_LLAMA, **SMALL_FAMILIES["gpt_oss"], "num_hidden_layers": 2})
    ours, config = adapted(base, tmp_path / "adapter", target_modules=["experts"])
    assert check(base, tmp_path / "adapter", capsys)["vLLM"] == "applies all 4 layers"
    (tmp_path / "served").mkdir()
    save_served(ours, tmp_path / "served", config, str(base))
    one, other = (load_file(tmp_path / folder / "adapter_model.safetensors")
                  for folder in ("adapter", "served"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_stacks_of_an_adapter_by_peft_fit_separate_experts_in_peft_alone(tmp_path, capsys):
    """Where the files have the experts one by one, transformers 5 and PEFT have stacks of them."""
    fields = dict(TINY, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2,
                  moe_intermediate_size=16, decoder_sparse_step=1, mlp_only_layers=[])
    base = saved(tmp_path, fields)
    adapted(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    renamed(tmp_path / "adapter", lambda key: key.replace("self_attn.q_proj", "mlp.experts")
            .replace("self_attn.v_proj", "mlp.experts.base_layer"))
    found = check(base, tmp_path / "adapter", capsys)
    assert found["PEFT"] == "applies all 4 layers"
    assert found["vLLM"].startswith("does not load it: it has no layer experts")
    assert "stacks of experts" in found["SGLang"]
