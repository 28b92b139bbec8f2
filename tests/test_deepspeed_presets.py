"""settings/deepspeed_presets.py: what LLaMA-Factory's DeepSpeed files mean here."""
import json

import pytest

from tests.common import SHARED, load_argv, needs_shared, refusal

PRESETS = SHARED / "configs/llama_factory_examples/deepspeed"
FULL = ["finetuning_type=full"]
WHOLE = "data parallelism here, with the same sums; "
MEANING = [     # file, settings of a run, the keys that the file sets, words of the note
    ("ds_z0_config.json", FULL, {}, "(ZeRO stage 0) is data parallelism here, with the same sums"),
    ("ds_z2_config.json", FULL, {"zero_stage": 2}, "stage 2) is zero_stage: 2 here"),
    ("ds_z2_config.json", ["finetuning_type=freeze"], {"zero_stage": 2}, "is zero_stage: 2 here"),
    ("ds_z2_config.json", [], {}, f"{WHOLE}adapters are small, and each rank holds all their "
                                  "optimizer state (zero_stage: 2 would shard it)"),
    ("ds_z2_config.json", ["zero_stage=1"], {"zero_stage": 1}, "is zero_stage: 1 here"),
    ("ds_z2_config.json", ["additional_target=embed_tokens"], {"zero_stage": 2}, "zero_stage: 2"),
    ("ds_z2_config.json", [*FULL, "use_muon=true"], {}, f"{WHOLE}this optimizer needs whole"),
    ("ds_z2_offload_config.json", [], {}, "each rank holds all their optimizer state, on its"),
    ("ds_z3_config.json", [], {"fsdp": ["full_shard"]}, "(ZeRO stage 3) is fsdp: full_shard here"),
    ("ds_z3_offload_config.json", [], {"fsdp": ["full_shard", "offload"]},
     "is fsdp: full_shard offload here"),
    ("ds_z3_fp8_config.json", [], {"fsdp": ["full_shard", "offload"]},
     "is fsdp: full_shard offload here"),
]
TRAIN = ["model_name_or_path=m", "dataset=d", "output_dir=o"]


@needs_shared
@pytest.mark.parametrize("preset, settings, set_keys, words", MEANING)
def test_presets(preset, settings, set_keys, words):
    """The file itself, and its name where a yaml is copied without it."""
    for name in (PRESETS / preset, f"examples/deepspeed/{preset}"):
        config = load_argv(*TRAIN, *settings, f"deepspeed={name}", script="train")
        meant = {key: getattr(config, key) for key in ("fsdp", "zero_stage")}
        assert meant == {"fsdp": [], "zero_stage": 0} | set_keys
        assert any(words in note for note in config.notes), config.notes


def test_stage_1_of_a_file(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    config = load_argv(*TRAIN, *FULL, f"deepspeed={tmp_path}/ds.json", script="train")
    assert config.zero_stage == 1 and "is zero_stage: 1 here" in config.notes[0]


def test_own_words_of_fsdp_stay():
    config = load_argv(*TRAIN, "deepspeed=ds_z3_config.json", "fsdp=shard_grad_op", script="train")
    assert config.fsdp == ["shard_grad_op"]


@needs_shared
def test_tensor_parallelism_is_refused():
    message = refusal(*TRAIN, f"deepspeed={PRESETS}/ds_z2_autotp_config.json", script="train")
    assert "tensor_parallel is not read here and would change the run" in message


@pytest.mark.parametrize("settings, words", [
    ({"optimizer": {"type": "Lamb"}}, "optimizer is not read here"),
    ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, and max_grad_norm of this run is 1.0"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is True, and bf16 of this run is False"),
    ({"zero_optimization": {"stage": 4}}, "stage 4 of zero_optimization is none of 0, 1, 2, 3"),
    ({"zero_optimization": 3}, "is no DeepSpeed configuration"),
    ([1], "is no DeepSpeed configuration"),
])
def test_settings_of_another_run_are_refused(settings, words, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    assert words in refusal(*TRAIN, f"deepspeed={tmp_path}/ds.json", script="train")


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\ufeff"])
def test_files_that_are_not_json(content, tmp_path):
    (tmp_path / "ds.json").write_text(content, encoding="utf-8")
    assert "ds.json is not JSON" in refusal(*TRAIN, f"deepspeed={tmp_path}/ds.json", script="train")


def test_a_file_that_does_not_exist_is_named_but_not_by_chat():
    assert "deepspeed: mine.json: no such file. Leave it out" in refusal(
        *TRAIN, "deepspeed=mine.json", script="train")
    assert load_argv("model_name_or_path=m", "deepspeed=mine.json", script="chat").fsdp == []
