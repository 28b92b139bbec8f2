"""runtime/rope_scaling.py: the key acts as the fields that it stands for would in config.json."""
import json
import shutil

import pytest
import torch

import merge
import train
from attention import PackedLayout
from checkpoint.adapters import load_with_adapters
from checkpoint.load import load_model
from checkpoint.read_config import CHANGES, read_config_json
from runtime.finished import find_weights
from runtime.rope_scaling import scale_rope, scaled_fields
from tests.common import load_argv, read_jsonl, refusal
from tests.ranks import COMMON, DENSE, tiny_model

KINDS = ["linear", "dynamic", "yarn", "llama3"]
OWN = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
       "original_max_position_embeddings": 32}


@pytest.fixture(autouse=True)
def no_changes():
    yield
    CHANGES.clear()


def of_peer(kind, trained, factor):
    """What LLaMA-Factory 0.9.5 (configure_rope) sets, with a whole number of positions."""
    fields = {"rope_type": kind, "factor": factor}
    if kind in ("dynamic", "yarn", "llama3"):
        fields["original_max_position_embeddings"] = trained
    if kind == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_scaling": fields, "max_position_embeddings": int(trained * factor)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cutoff_len, own, trained, factor", [
    (None, None, 64, 2.0), (None, OWN, 32, 2.0), (64, None, 64, None), (64, OWN, 32, 2.0),
    (65, None, 64, 2.0), (65, OWN, 32, 3.0), (200, None, 64, 4.0), (200, OWN, 32, 7.0),
])
def test_fields_are_llama_factorys(kind, cutoff_len, own, trained, factor, tmp_path):
    """The table is what its configure_rope answered."""
    stored = DENSE | {"max_position_embeddings": 64, "rope_scaling": own}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    note, = scale_rope(kind, cutoff_len, tmp_path)
    if factor is None:
        assert "not applied: cutoff_len: 64 is within the 64 positions" in note
        assert read_config_json(tmp_path) == stored
        return
    assert f"{kind}, factor {factor:g}: {trained} -> {int(trained * factor)} positions" in note
    assert ("takes the place of config.json's own (llama3)" in note) == bool(own)
    assert read_config_json(tmp_path) == stored | of_peer(kind, trained, factor)
    assert scale_rope(kind, cutoff_len, tmp_path) == [note]     # again: the file, not the change
    assert scale_rope(None, cutoff_len, tmp_path) == [] and read_config_json(tmp_path) == stored


def written(folder, fields, tmp_path):
    """A copy of a checkpoint whose config.json has these fields."""
    copy = tmp_path / "written"
    shutil.copytree(folder, copy)
    stored = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(stored | fields))
    return copy


def logits_of(model, ids):
    positions = torch.arange(len(ids))[None]
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), positions, PackedLayout((len(ids),)))
        return model.lm_head(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_with_the_fields_in_the_file(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_model(tmp_path / "base", DENSE | {"max_position_embeddings": 48})
    copy = written(tmp_path / "base", of_peer(kind, 48, 3.0), tmp_path)
    scale_rope(kind, 100, tmp_path / "base")
    ours = load_model(tmp_path / "base", torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    for length in (40, 100, 160):
        ids = torch.randint(0, 1600, (length,), generator=torch.Generator().manual_seed(1)).tolist()
        with torch.no_grad():
            wanted = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(logits_of(ours, ids), wanted, atol=2e-4, rtol=1e-4)
    plain = load_model(written(tmp_path / "base", {}, tmp_path / "plain"), torch.float32)
    assert (logits_of(plain, ids) - wanted).abs().max() > 1e-2


def test_newer_files_keep_their_base_of_the_rotation(tmp_path):
    stored = DENSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    scale_rope("yarn", 1024, tmp_path)
    assert read_config_json(tmp_path)["rope_parameters"] == {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512,
        "rope_theta": 5e5}


def test_a_model_without_rotation_is_told(tmp_path):
    fields = {name: value for name, value in DENSE.items()
              if name not in ("max_position_embeddings", "num_key_value_heads", "head_dim")}
    fields |= {"model_type": "baichuan", "model_max_length": 512}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    note, = scale_rope("yarn", 10**6, tmp_path)
    assert note == "rope_scaling: yarn is not applied: baichuan has no such setting"


@pytest.fixture
def world(tmp_path):
    tiny_model(tmp_path / "dense", DENSE | {"max_position_embeddings": 48})
    rows = [{"messages": [{"role": "user", "content": f"What is {n} plus {n}? " * 4},
                          {"role": "assistant", "content": f"It is {2 * n}. " * 6}]}
            for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def settings(world, **more):
    values = COMMON | dict(model_name_or_path="dense", dataset="rows.jsonl", output_dir="out",
                           cutoff_len=100, rope_scaling="yarn", max_steps=2) | more
    values["pin_kernels.matmul"] = "torch"      # two runs are compared bit for bit
    folders = ("model_name_or_path", "dataset", "output_dir", "export_dir")
    return [f"{key}={world / str(value) if key in folders else value}"
            for key, value in values.items()]


def test_training_chat_and_merging_have_it(world, capsys):
    train.main(settings(world))
    assert "rope_scaling: yarn, factor 3: 48 -> 144 positions" in capsys.readouterr().out
    fields = of_peer("yarn", 48, 3.0)
    assert "max_position_embeddings" in (world / "out/README.md").read_text()
    history = read_jsonl(world / "out/trainer_log.jsonl")

    copy = written(world / "dense", fields, world)              # trained with the file instead
    train.main(settings(world, model_name_or_path=copy.name, output_dir="other", rope_scaling=None))
    other = read_jsonl(world / "other/trainer_log.jsonl")
    assert [row.get("loss") for row in history] == [row.get("loss") for row in other]
    CHANGES.clear()

    yaml = load_argv(*settings(world, rope_scaling=None), script="chat")
    base, adapters, remarks = find_weights(yaml)                # from train_config.json
    assert "yarn, factor 3" in remarks[0] and "max_position_embeddings" in scaled_fields(base)
    tuned = load_with_adapters(base, adapters, torch.float32, "cpu")
    CHANGES.clear()

    merge.main(settings(world, export_dir="merged"))
    CHANGES.clear()
    stored = json.loads((world / "merged/config.json").read_text())
    assert {name: stored[name] for name in fields} == fields
    merged = load_model(world / "merged", torch.float32)
    ids = list(range(5, 90))
    torch.testing.assert_close(logits_of(merged, ids), logits_of(tuned, ids), atol=1e-4, rtol=1e-4)


def test_a_full_model_has_it_in_its_config_json(world):
    for kind in ("yarn", "linear"):
        out = f"out_{kind}"
        train.main(settings(world, finetuning_type="full", rope_scaling=kind, output_dir=out))
        CHANGES.clear()
        stored = json.loads((world / out / "config.json").read_text())
        fields = of_peer(kind, 48, 3.0)
        assert {name: stored[name] for name in fields} == fields
        yaml = load_argv(*settings(world, finetuning_type="full", rope_scaling=kind,
                                   output_dir=out), script="chat")
        base, _, _ = find_weights(yaml)                         # and not twice
        assert read_config_json(base) == stored


def test_another_scaling_than_that_of_the_adapter_is_said(world, capsys):
    train.main(settings(world))
    more = {"adapter_name_or_path": world / "out", "output_dir": "next", "rope_scaling": None}
    train.main(settings(world, **more))
    assert f"rope_scaling: none here, and {world / 'out'} was trained with yarn" in \
        capsys.readouterr().out
    yaml = load_argv(*settings(world, rope_scaling="linear"), script="chat")
    assert "linear is not used: the adapter was trained with yarn" in find_weights(yaml)[2][0]


def test_unknown_kinds_are_refused():
    assert "'longrope'" in refusal("rope_scaling=longrope")
