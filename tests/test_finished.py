"""runtime/finished.py: the weights, settings and dtype of a finished training, from its yaml."""
import json
import shutil

import pytest
import torch

from runtime import finished
from settings.load_config import load_config
from tests.common import GOLDEN, needs_shared
from text.written_formats import stored_template

pytestmark = needs_shared
CURVES = GOLDEN / "curves"
BASE = CURVES / "tiny_llama3"
TRAINED = CURVES / "sft_llama3/final"
OTHER = CURVES / "sft_llama3/adapter_init"


def settings(*pairs):
    return load_config([f"model_name_or_path={BASE}", *map(str, pairs)], "chat")


def test_weights_of_the_training_yaml(tmp_path):
    output = tmp_path / "out"
    assert finished.find_weights(settings()) == (BASE, [], ("", ""))
    base, adapters, remarks = finished.find_weights(settings(f"output_dir={output}"))
    assert (base, adapters) == (BASE, []) and "holds no finished training" in remarks[0]
    (output / "checkpoint-20").mkdir(parents=True)
    (output / "checkpoint-20/trainer_state.json").write_text("{}")
    remarks = finished.find_weights(settings(f"output_dir={output}"))[2]
    assert f"adapter_name_or_path={output}/checkpoint-20" in remarks[0]
    shutil.copytree(TRAINED, output, dirs_exist_ok=True)
    assert finished.find_weights(settings(f"output_dir={output}"))[:2] == (BASE, [output])
    base, adapters, remarks = finished.find_weights(
        settings(f"output_dir={output}", f"adapter_name_or_path={OTHER}")
    )
    assert adapters == [OTHER] and f"adapter_name_or_path={output}" in remarks[1]
    full = settings(f"output_dir={BASE}", "finetuning_type=full")
    assert finished.find_weights(full) == (
        BASE, [], ("finetuning_type: full; the output_dir of this config", ""))


@pytest.mark.parametrize(
    "given, stored, thinking",
    [
        ([], {}, True),
        ([], {"enable_thinking": False}, False),
        (["enable_thinking=true"], {"enable_thinking": False}, True),
    ],
)
def test_given_settings_override_those_of_the_training(tmp_path, given, stored, thinking):
    (tmp_path / "train_config.json").write_text(json.dumps({"template": "qwen3", **stored}))
    config = settings(*given)
    assert finished.with_trained_settings(config, tmp_path).enable_thinking == thinking
    # the template is forced, since training has checked that it fits
    assert stored_template([tmp_path], config.template, config.force_template) == ("qwen3", True)


def test_dtype(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    # None: the checkpoint's own
    assert finished.pick_dtype(settings(), {"torch_dtype": "bfloat16"}, cpu) is None
    assert finished.pick_dtype(settings("bf16=true"), {}, cpu) == torch.bfloat16
    assert finished.pick_dtype(settings("fp16=true"), {}, cpu) == torch.float16
    both = settings("bf16=true", "infer_dtype=float32")
    assert finished.pick_dtype(both, {}, cpu) == torch.float32
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for pairs, raw, words in (
        (["bf16=true"], {}, "config asks"),
        ([], {"dtype": "bfloat16"}, "checkpoint has"),
    ):
        with pytest.raises(
            ValueError, match=f"{words}.*bfloat16, which Tesla V100 lacks.*infer_dtype"
        ):
            finished.pick_dtype(settings(*pairs), raw, gpu)


@pytest.mark.parametrize("change, words", [
    ({"quantization_bit": "4"}, "quantization_bit: '4' is not int . None"),
    ({"bf16": 1}, "bf16: 1 is not bool"), ({"stage": ["sft"]}, "stage: .* is not str"),
    ({"stage": "sftt"}, "stage: 'sftt' is none of sft, pt"),
    ({"double_quantization": None}, "double_quantization: None is not bool"),
])
def test_settings_of_other_types_are_named_with_their_file(change, words, tmp_path):
    (tmp_path / "train_config.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=f"{tmp_path}/train_config.json: {words}"):
        finished.as_trained(settings(), [tmp_path])
    (tmp_path / "train_config.json").write_text(json.dumps({"tool_format": 5}))
    with pytest.raises(ValueError, match="train_config.json: tool_format: 5 is not str . None"):
        finished.with_trained_settings(settings(), tmp_path)


def test_a_train_config_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "train_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="train_config.json: not JSON"):
        finished.as_trained(settings(), [tmp_path])


@pytest.mark.parametrize("words", ("CUDA error: out of memory", "CUDA out of memory.",
                                   "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"))
def test_a_full_card_is_explained_whoever_says_it(monkeypatch, words):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    raised = torch.cuda.OutOfMemoryError if "CUDA out" in words else RuntimeError
    with pytest.raises(ValueError, match=r"the GPU is out of memory \(1.0 of 80.0 GiB free\)"):
        with finished.explained_out_of_memory(torch.device("cuda")):
            raise raised(words)
    with pytest.raises(RuntimeError, match="shapes differ"):
        with finished.explained_out_of_memory(torch.device("cuda")):
            raise RuntimeError("shapes differ")
