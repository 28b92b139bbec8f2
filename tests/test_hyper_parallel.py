"""settings/hyper_parallel.py: what use_hyper_parallel and hyper_parallel_args mean here."""
import json

import pytest

from tests.common import load_argv, refusal

TRAIN = ["model_name_or_path=m", "dataset=d", "output_dir=o", "finetuning_type=full"]
MEANING = [     # the mapping, keys that it sets, the note
    ({}, {"fsdp": ["full_shard"]}, "use_hyper_parallel is fsdp: full_shard here"),
    ({"cp_size": 2}, {"fsdp": ["full_shard"], "context_parallel_size": 2},
     "use_hyper_parallel is context_parallel_size: 2 and fsdp: full_shard here"),
    ({"tp_size": 2}, {"fsdp": [], "tensor_parallel_size": 2},
     "use_hyper_parallel is tensor_parallel_size: 2 here"),
    ({"ep_size": 2}, {"fsdp": [], "expert_parallel_size": 2},
     "use_hyper_parallel is expert_parallel_size: 2 here"),
    ({"reshard_after_forward": False, "activation_mode": "recompute", "ep_size": 1},
     {"fsdp": ["shard_grad_op"]}, "hyper_parallel_args: activation_mode: no effect on the result"),
]


@pytest.mark.parametrize("given, keys, note", MEANING)
@pytest.mark.parametrize("way", ["file", "mapping"])
def test_meaning(given, keys, note, way, tmp_path):
    """Of the file that LLaMA-Factory takes, and of the mapping in the yaml."""
    text = json.dumps(given)
    yaml = tmp_path / "a.yaml"
    if way == "file":
        (tmp_path / "args.json").write_text(text)
        text = tmp_path / "args.json"
    yaml.write_text(f"use_hyper_parallel: true\nhyper_parallel_args: {text}\n")
    config = load_argv(yaml, *TRAIN, script="train")
    assert {key: getattr(config, key) for key in keys} == keys
    assert note in config.notes


def test_arguments_alone_do_nothing():
    config = load_argv(*TRAIN, 'hyper_parallel_args={"cp_size": 2}', script="train")
    assert config.context_parallel_size == 1 and config.fsdp == []
    assert any("not used without use_hyper_parallel" in note for note in config.notes)


@pytest.mark.parametrize("given, more, words", [
    ('{"cp_sise": 2}', "", "unknown name 'cp_sise' (did you mean 'cp_size'?)"),
    ('{"cp_size": 0}', "", "cp_size: '0' is not a whole number from 1 on"),
    ('{"cp_size": 2}', "context_parallel_size=4", "cp_size is 2, and context_parallel_size is 4"),
    ('{"fsdp_size": 2}', "", "weights are sharded over all processes here"),
    ('{"param_dtype": "bf16"}', "", "computes in float32: set bf16: true, or leave param_dtype"),
    ('{"param_dtype": "fp32"}', "bf16=true", "in bf16: set bf16: false and fp16: false, or leave"),
    ('{"param_dtype": "int8"}', "", "param_dtype: 'int8' is none of bf16, bfloat16"),
    ("missing.json", "", "missing.json: no such file. It is a JSON file such as"),
])
def test_what_stops(given, more, words):
    assert words in refusal(*TRAIN, "use_hyper_parallel=true", f"hyper_parallel_args={given}",
                            *more.split(), script="train")
