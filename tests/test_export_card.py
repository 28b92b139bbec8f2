"""runtime/export_card.py: the model card of an exported folder."""
import yaml

import merge
from runtime.export_card import license_of
from tests.tiny_models import adapter_with, base_with

CARD = """---
license: gemma
license_link: https://ai.google.dev/gemma/terms
tags: []
---
# Gemma
"""


def test_the_licence_is_the_bases(tmp_path):
    assert license_of(tmp_path) == []
    (tmp_path / "LICENSE.txt").write_text("Do good.")
    assert license_of(tmp_path) == ["license: other", "license_link: LICENSE.txt"]
    (tmp_path / "README.md").write_text(CARD)
    assert license_of(tmp_path) == ["license: gemma",
                                    "license_link: https://ai.google.dev/gemma/terms"]


def test_printed_commands_hold_for_names_with_blanks(tmp_path, capsys):
    base, out = base_with(tmp_path / "base"), tmp_path / "my model"
    merge.main([f"model_name_or_path={base}", f"export_dir={out}", "export_format=gguf"])
    printed = capsys.readouterr().out
    assert f"hf upload 'my model' '{out}'  " in printed
    assert "llama-quantize 'my model-F16.gguf' 'my model-Q4_K_M.gguf' Q4_K_M\n" in printed


def test_the_card_of_an_export(tmp_path, capsys):
    base = base_with(tmp_path / "base")
    (base / "README.md").write_text(CARD)
    adapter = adapter_with(tmp_path / "adapter", base)
    (adapter / "train_config.json").write_text('{"dataset": ["letters", "poems"], "lora_rank": 4}')
    arguments = [f"model_name_or_path={base}", f"adapter_name_or_path={adapter}",
                 f"export_dir={tmp_path / 'mine'}", "export_format=fp8"]
    merge.main(arguments)
    assert f"hf upload mine {tmp_path / 'mine'}" in capsys.readouterr().out
    card = (tmp_path / "mine" / "README.md").read_text()
    fields = yaml.safe_load(card.split("---")[1])
    assert fields["license"] == "gemma" and fields["library_name"] == "transformers"
    assert "base_model" not in fields and str(tmp_path) not in card     # a path of this machine
    for words in ("training on `letters`, `poems`:", "| lora_rank | 4 |", "summed in float32",
                  "8 bits by compressed-tensors"):
        assert words in card
    merge.main([*arguments, "overwrite=true"])                          # the card is replaced, too
