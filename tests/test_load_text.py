"""text/load_text.py: the chosen template and the stop tokens."""
import json
import shutil

import pytest

from checkpoint.read_config import read_model_config
from settings.load_config import load_config
from tests.common import GOLDEN, needs_shared
from tests.tiny_models import base_with
from text.load_text import eos_ids_of, fit_text, load_text
from text.tokenizer import load_tokenizer

pytestmark = needs_shared
BASE = GOLDEN / "curves/tiny_llama3"
EOT = 1005                  # <|eot_id|>


def text_of(folder, *pairs, **options):
    config = load_config([f"model_name_or_path={BASE}", *pairs], "chat")
    return load_text(config, BASE, [folder], read_model_config(BASE), **options)


def test_the_template_of_the_config_or_of_the_training(tmp_path):
    named = text_of(tmp_path, "template=llama3")
    assert (named.template.name, named.origin) == ("llama3", "as the config says")
    (tmp_path / "train_config.json").write_text(json.dumps({"template": "llama3"}))
    stored = text_of(tmp_path)
    assert (stored.template.name, stored.origin) == ("llama3", f"stored in {tmp_path}")
    assert stored.stop_ids == named.stop_ids and EOT in stored.stop_ids
    assert stored.tokenizer.eos_id == EOT
    with pytest.raises(ValueError, match="was trained with llama3"):
        text_of(tmp_path, "template=qwen")


def test_differences_from_the_checkpoints_own_template_are_notes(tmp_path):
    """They are found before the tokenizer takes over the template's stop token."""
    base = shutil.copytree(BASE, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0]['content'] }}"
    (base / "tokenizer_config.json").chmod(0o644)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    assert fit_text(load_tokenizer(base), "llama3", check=True).notes
    assert not fit_text(load_tokenizer(base), "llama3").notes


@pytest.mark.parametrize("stored, ids", [(None, set()), (7, {7}), ([7, 8], {7, 8})])
def test_stop_tokens_of_the_checkpoint(tmp_path, stored, ids):
    assert eos_ids_of(tmp_path) == set()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
    assert eos_ids_of(tmp_path) == ids


@pytest.mark.parametrize("config, generation", [
    ({}, None), ({"eos_token_id": 7}, None), ({"eos_token_id": [7, 9]}, None),
    ({"eos_token_id": None}, None),
    ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}), ({"eos_token_id": 7}, {"do_sample": True}),
    ({"eos_token_id": 7}, {"eos_token_id": None})])
def test_stop_tokens_are_those_of_transformers(config, generation, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = base_with(tmp_path / "base", **config)
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id
    want = theirs if isinstance(theirs, list) else [theirs]
    assert eos_ids_of(base) == set(want) - {None}


@pytest.mark.parametrize("wrong", ["7", {"a": 1}, [7, "8"], True, 1.5, [[7]]])
def test_stop_tokens_of_other_types_are_named_with_their_file(wrong, tmp_path):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match=f"{name}: eos_token_id: .* is not a token id"):
            eos_ids_of(tmp_path)
