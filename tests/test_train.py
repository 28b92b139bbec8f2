"""train.py against whole runs recorded from LLaMA-Factory, and against itself: resumed = never stopped, cut = uncut."""
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.common import GOLDEN, SHARED, needs_shared, read_jsonl

CURVES = GOLDEN / "curves"
RECORDED = ["sft_llama3", "sft_qwen2_loraplus", "sft_packing", "sft_eval", "sft_shuffled", "pt"]


def run(case, output, monkeypatch, *overrides):
    """Run train.py on a recorded case's own config.yaml; returns trainer_state.json."""
    monkeypatch.chdir(CURVES / case)
    extra = ["neat_packing=false"] if case == "sft_packing" else []       # see docs/differences.md
    train.main(["config.yaml", f"output_dir={output}", "plot_loss=false", "disable_tqdm=true", *extra, *overrides])
    return json.loads((output / "trainer_state.json").read_text())


def same_tensors(a, b, bound):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    return all((a[name] - b[name]).abs().max() <= bound for name in a)


@needs_shared
@pytest.mark.parametrize("case", RECORDED)
def test_recorded_curve(case, tmp_path, monkeypatch):
    """Loss to 1e-4, learning rate to 1e-9, gradient norm to 1e-3 at every step; final adapter to 1e-4."""
    ours = run(case, tmp_path / "out", monkeypatch)
    want = json.loads((CURVES / case / "trainer_state.json").read_text())
    ours_steps = [row for row in ours["log_history"] if "loss" in row]
    want_steps = [row for row in want["log_history"] if "loss" in row]
    assert len(ours_steps) == len(want_steps) == want["max_steps"]
    for a, b in zip(ours_steps, want_steps):
        assert a["step"] == b["step"] and abs(a["epoch"] - b["epoch"]) < 1e-9
        assert abs(a["loss"] - b["loss"]) < 1e-4
        assert abs(a["learning_rate"] - b["learning_rate"]) < 1e-9
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3
    ours_eval = [row["eval_loss"] for row in ours["log_history"] if "eval_loss" in row]
    want_eval = [row["eval_loss"] for row in want["log_history"] if "eval_loss" in row]
    assert len(ours_eval) == len(want_eval) and all(abs(a - b) < 1e-4 for a, b in zip(ours_eval, want_eval))
    assert same_tensors(tmp_path / "out/adapter_model.safetensors", CURVES / case / "final/adapter_model.safetensors", 1e-4)
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    recorded = json.loads((CURVES / case / "all_results.json").read_text())
    assert recorded.keys() <= results.keys() and abs(results["train_loss"] - recorded["train_loss"]) < 1e-4


@needs_shared
def test_output_files_are_those_people_expect(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    run("sft_eval", out, monkeypatch, "plot_loss=true", "save_strategy=steps", "save_steps=4")
    expected = set((CURVES / "sft_eval/output_files.txt").read_text().split()) - {"training_args.bin"}
    assert expected <= {p.name for p in out.iterdir()}
    assert {"training_loss.png", "training_eval_loss.png", "train_config.json", "checkpoint-4"} <= {p.name for p in out.iterdir()}
    lines, recorded = read_jsonl(out / "trainer_log.jsonl"), read_jsonl(CURVES / "sft_eval/trainer_log.jsonl")
    assert len(lines) == len(recorded) and all(a.keys() <= b.keys() for a, b in zip(recorded, lines))
    assert [line["percentage"] for line in lines] == [line["percentage"] for line in recorded]
    assert json.loads((out / "train_config.json").read_text())["template"] == "llama3"


@needs_shared
@pytest.mark.parametrize("case", ["sft_shuffled", "sft_qwen2_loraplus"])
def test_resumed_equals_never_stopped(case, tmp_path, monkeypatch):
    """Bit for bit, with dropout and noise on, from the middle of an epoch."""
    noise = ["neftune_noise_alpha=5", "save_strategy=steps", "save_steps=2", "logging_steps=3"]
    whole = run(case, tmp_path / "a", monkeypatch, *noise)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for late in (tmp_path / "b").glob("checkpoint-*"):
        if int(late.name.split("-")[1]) > 2:
            shutil.rmtree(late)
    resumed = run(case, tmp_path / "b", monkeypatch, *noise, "resume_from_checkpoint=true")
    strip = [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in whole["log_history"]]
    again = [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in resumed["log_history"]]
    assert strip == again
    assert same_tensors(tmp_path / "a/adapter_model.safetensors", tmp_path / "b/adapter_model.safetensors", 0)
    assert [r["current_steps"] for r in read_jsonl(tmp_path / "b/trainer_log.jsonl")] == \
        [r["current_steps"] for r in read_jsonl(tmp_path / "a/trainer_log.jsonl")]


@needs_shared
def test_a_finished_run_resumed_has_nothing_to_do(tmp_path, monkeypatch):
    out, save = tmp_path / "out", ["save_strategy=steps", "save_steps=6"]
    run("sft_eval", out, monkeypatch, *save)
    before = load_file(out / "adapter_model.safetensors")
    results = json.loads((out / "all_results.json").read_text())
    run("sft_eval", out, monkeypatch, *save, "resume_from_checkpoint=true")
    assert all(torch.equal(w, before[n]) for n, w in load_file(out / "adapter_model.safetensors").items())
    again = json.loads((out / "all_results.json").read_text())
    assert all(again[key] == results[key] for key in ("epoch", "train_loss", "eval_loss"))


@needs_shared
def test_the_cut_into_micro_batches_does_not_matter(tmp_path, monkeypatch):
    a = run("sft_llama3", tmp_path / "a", monkeypatch)
    b = run("sft_llama3", tmp_path / "b", monkeypatch, "per_device_train_batch_size=8", "gradient_accumulation_steps=1")
    for x, y in zip(a["log_history"], b["log_history"]):
        if "loss" in x:
            assert abs(x["loss"] - y["loss"]) < 1e-5 and abs(x["grad_norm"] - y["grad_norm"]) < 1e-4


@needs_shared
def test_packed_equals_unpacked_when_the_same_rows_meet(tmp_path, monkeypatch):
    """One step over all rows: packing (kept apart) changes the cut, not the loss."""
    one = ["max_steps=1", "per_device_train_batch_size=64", "gradient_accumulation_steps=1", "cutoff_len=400"]
    a = run("sft_llama3", tmp_path / "a", monkeypatch, *one)
    b = run("sft_llama3", tmp_path / "b", monkeypatch, *one, "packing=true")
    assert abs(a["log_history"][0]["loss"] - b["log_history"][0]["loss"]) < 1e-5
    assert abs(a["log_history"][0]["grad_norm"] - b["log_history"][0]["grad_norm"]) < 1e-4


@needs_shared
def test_full_fine_tuning_learns_every_weight_and_writes_a_checkpoint(tmp_path, monkeypatch):
    out = tmp_path / "full"
    state = run("sft_llama3", out, monkeypatch, "finetuning_type=full", "adapter_name_or_path=null", "max_steps=3",
                "learning_rate=1e-3", "warmup_ratio=0")
    before, after = load_file(CURVES / "tiny_llama3/model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all((before[n] != after[n]).any() for n in before)
    assert state["log_history"][0]["loss"] > state["log_history"][2]["loss"]
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(out)


@needs_shared
def test_full_equals_a_plain_loop_of_torch(tmp_path, monkeypatch):
    """One step of full fine-tuning against transformers' model, torch's cross entropy and AdamW."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "full"
    run("sft_llama3", out, monkeypatch, "finetuning_type=full", "adapter_name_or_path=null", "max_steps=1",
        "learning_rate=1e-3", "warmup_ratio=0", "lr_scheduler_type=constant", "adam_epsilon=1e-3")
    base = shutil.copytree(CURVES / "tiny_llama3", tmp_path / "base")
    (base / "config.json").chmod(0o644)
    fields = json.loads((base / "config.json").read_text())               # transformers 4 reads the older key only
    (base / "config.json").write_text(json.dumps({**fields, "rope_theta": fields["rope_parameters"]["rope_theta"]}))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-3)      # eps: no sign-like steps where g is 0
    rows = read_jsonl(CURVES / "sft_llama3/processed.jsonl")[:8]
    count = sum(label != -100 for row in rows for label in row["labels"])
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum") / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    ours = load_file(out / "model.safetensors")
    for name, p in model.named_parameters():
        assert (ours[name] - p).abs().max() < 1e-5, name


@needs_shared
def test_bfloat16_base_follows_the_float32_curve(tmp_path, monkeypatch):
    a = run("sft_llama3", tmp_path / "a", monkeypatch, "bf16=true")
    want = json.loads((CURVES / "sft_llama3/trainer_state.json").read_text())
    for x, y in zip(a["log_history"], want["log_history"]):
        if "loss" in x:
            assert abs(x["loss"] - y["loss"]) < 0.02 * y["loss"]
    weights = load_file(tmp_path / "a/adapter_model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())


@needs_shared
def test_full_in_bfloat16_keeps_float32_weights(tmp_path, monkeypatch):
    run("sft_llama3", tmp_path / "a", monkeypatch, "finetuning_type=full", "adapter_name_or_path=null", "bf16=true", "max_steps=2")
    assert all(w.dtype == torch.float32 for w in load_file(tmp_path / "a/model.safetensors").values())


# ---- what a user may get wrong ----


@needs_shared
def test_output_dir_that_is_not_empty(tmp_path, monkeypatch):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        run("sft_llama3", tmp_path, monkeypatch, "overwrite_output_dir=false")
    assert (tmp_path / "precious.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@needs_shared
@pytest.mark.parametrize("overrides, words", [
    (["resume_from_checkpoint=true"], "no complete checkpoint"),
    (["resume_from_checkpoint=nowhere"], "nowhere is no complete checkpoint"),
    (["adapter_name_or_path=../missing"], "missing"),
    (["model_name_or_path=../tiny_lama3"], "did you mean .*tiny_llama3"),
    (["fp16=true"], "fp16 needs a GPU"),
    (["dataset=trian"], "train"),
    (["adapter_name_or_path=../../lora/qwen3_r8"], r"lora_. ?.*has shape|made for another model"),
])
def test_clear_errors(overrides, words, tmp_path, monkeypatch):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run("sft_llama3", tmp_path / "out", monkeypatch, *overrides)
    assert not (tmp_path / "out").exists()


@needs_shared
def test_a_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    """A weight that turns nan after step 2: the run ends with an error, checkpoint-2 is whole, no 0 is logged."""
    out, real, calls = tmp_path / "out", train.batch_loss, []

    def poisoned(model, batch, device):
        calls.append(1)
        return real(model, batch, device) * (math.nan if len(calls) > 8 else 1.0)

    monkeypatch.setattr(train, "batch_loss", poisoned)
    with pytest.raises(ValueError, match="step 3: loss nan"):
        run("sft_llama3", out, monkeypatch, "save_strategy=steps", "save_steps=2")
    assert (out / "checkpoint-2/trainer_state.json").is_file() and not (out / "adapter_model.safetensors").exists()
    assert all(row["loss"] > 1 for row in read_jsonl(out / "trainer_log.jsonl"))


@needs_shared
def test_float16_overflow_is_named(tmp_path, monkeypatch):
    """A layer whose output leaves float16's range: module, value and remedy are in the message."""
    from checkpoint import load_model
    from data import Example, collate
    import numpy as np
    model = load_model(CURVES / "tiny_llama3", torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data *= 3e4
    ids = np.arange(8, dtype=np.int32)
    batch = collate([Example(ids, ids, [8])])
    from contextlib import nullcontext
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj overflows in torch.float16(.|\n)*bf16: true"):
        train.check_first_batch(model, batch, torch.device("cpu"), nullcontext())


@needs_shared
def test_best_checkpoint_is_loaded_and_kept(tmp_path, monkeypatch):
    out = tmp_path / "out"
    state = run("sft_eval", out, monkeypatch, "load_best_model_at_end=true", "save_strategy=steps", "eval_steps=1", "save_steps=1",
                "save_total_limit=2", "learning_rate=20", "warmup_ratio=0", "lr_scheduler_type=constant")
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert best < 6, losses
    kept = {p.name for p in out.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-6"}
    assert same_tensors(out / "adapter_model.safetensors", out / f"checkpoint-{best}/adapter_model.safetensors", 0)


@needs_shared
def test_the_published_yaml_is_understood():
    """LLaMA-Factory's own file reaches the point where it asks for the 8B weights."""
    from config import load_config
    config = load_config([str(SHARED / "configs/llama3_lora_sft.yaml")], "train")
    assert (config.learning_rate, config.lora_alpha, config.bf16) == (1e-4, 16, True)
