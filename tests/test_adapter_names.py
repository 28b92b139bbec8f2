"""checkpoint/adapter_names.py: the names of layers inside a model that reads images."""
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.adapter_names import module_name, name_in_files
from checkpoint.adapters import load_adapter, save_adapter
from checkpoint.load import load_model
from lora import LoRAConfig, attach_lora, find_targets, lora_layers
from merge import merge_checkpoint
from runtime.setup import lora_config
from settings.config import Config
from tests.tiny_models import IDS, TINY, logits_of, perturb

VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=28, patch_size=14)
TEXT = {key: value for key, value in TINY.items() if key != "model_type"} | dict(
    sliding_window=8, tie_word_embeddings=True)
WRAPPED = {     # kind: the class, the types of its text and vision parts
    "gemma3": ("Gemma3", "gemma3_text", "siglip_vision_model"),
    "mistral3": ("Mistral3", "ministral3", "pixtral"),
}


def wrapped_base(kind, folder):
    """A model of transformers that reads images, saved into the folder."""
    transformers = pytest.importorskip("transformers")
    name, text, vision = WRAPPED[kind]
    if text not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {text}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "model_type": text}, tie_word_embeddings=True,
        vision_config={**VISION, "model_type": vision})
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.save_pretrained(folder)
    return folder


def trained_adapter(base, folder):
    """An adapter with random B on some layers of a base; returns the adapted model."""
    model = load_model(base, torch.float32)
    config = LoRAConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"],
                        rank_pattern={"layers.1.mlp.down_proj": 2})
    perturb(attach_lora(model, config, stored_name=model.config.stored_name), size=0.1)
    folder.mkdir()
    save_adapter(model, folder, config, str(base))
    return model.eval()


@pytest.mark.parametrize("kind", WRAPPED)
def test_peft_loads_an_adapter_of_the_text_part_of_a_model_that_reads_images(kind, tmp_path):
    base = wrapped_base(kind, tmp_path / "base")
    ours = trained_adapter(base, tmp_path / "adapter")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        base, attn_implementation="eager", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (theirs(input_ids=IDS).logits - logits_of(ours, IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("names", ["transformers", "files"])
def test_both_kinds_of_names_are_read_and_merged(names, tmp_path):
    base = wrapped_base("gemma3", tmp_path / "base")
    adapter = tmp_path / "adapter"
    ours = trained_adapter(base, adapter)
    path, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, fields = load_file(path), json.loads(settings.read_text())
    inside = ".model.language_model.layers.0.mlp.down_proj."
    assert f"base_model.model{inside}lora_A.weight" in tensors
    if names == "files":                                    # as earlier releases wrote them
        save_file({name_in_files(key, ours.config): value for key, value in tensors.items()}, path)
        targets = [name_in_files(target, ours.config) for target in fields["target_modules"]]
        settings.write_text(json.dumps({**fields, "target_modules": targets}))
        assert "language_model.model.layers.0.mlp.down_proj" in targets
    again = load_model(base, torch.float32)
    load_adapter(again, adapter)
    assert torch.equal(logits_of(again.eval(), IDS), logits_of(ours, IDS))
    merge_checkpoint(base, [adapter], tmp_path / "merged")
    merged = load_model(tmp_path / "merged", torch.float32).eval()
    assert (logits_of(merged, IDS) - logits_of(ours, IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_run_that_continues_an_adapter_adapts_the_same_layers(kind, tmp_path):
    base = wrapped_base(kind, tmp_path / "base")
    ours = trained_adapter(base, tmp_path / "adapter")
    described = SimpleNamespace(folder=base, model_config=ours.config)
    known = lora_config(Config(finetuning_type="lora"), described, tmp_path / "adapter")
    empty = load_model(base, skip_weights=True)
    targets = find_targets(empty, known.target_modules, empty.config.stored_name)
    assert targets == list(lora_layers(ours))


def test_names_are_exchanged_and_exchanged_back(tmp_path):
    config = load_model(wrapped_base("gemma3", tmp_path), skip_weights=True).config
    for ours, theirs in (("language_model.model.embed_tokens", "model.language_model.embed_tokens"),
                         ("language_model.lm_head", "lm_head"), (".*q_proj", ".*q_proj"),
                         ("base_model.model.language_model.lm_head.weight",
                          "base_model.model.lm_head.weight")):
        assert module_name(ours, config) == theirs and name_in_files(theirs, config) == ours
        assert name_in_files(ours, config) == ours
