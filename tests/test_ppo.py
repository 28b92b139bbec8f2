"""Stage ppo: what is sampled is what is trained, resumed = never stopped, two ranks = one.

Formulas: tests/test_ppo_losses.py; reward models as rewards: tests/test_reward_sources.py.
"""
import importlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.common import ROOT, read_jsonl, refusal, slow
from tests.ranks import forked, outcomes
from tests.rollout_runs import NO_FRUIT, arguments, history, logged_by, sampled, steps

SMALL = dict(
    stage="ppo",
    model_name_or_path=ROOT / "models/tiny",
    dataset=ROOT / "data/tiny_sums.jsonl",
    template="chatml",
    cutoff_len=64,
    max_samples=40,
    max_new_tokens=14,
    temperature=1.2,                # answers that differ
    top_p=0.95,
    top_k=0,
    per_device_train_batch_size=2,
    ppo_epochs=2,
    ppo_buffer_size=2,
    max_steps=2,
    learning_rate=3e-3,
    lora_rank=4,
    logging_steps=0.01,             # below 1: a share of the optimizer steps, not of the rollouts
    save_strategy="no",
    use_cpu=True,
    disable_tqdm=True,
    flash_attn="disabled",
    disable_gradient_checkpointing=True,
)


def settings(output, **more):
    return arguments(output, SMALL | more)


def run(output, **more):
    return logged_by(output, SMALL | more)


@pytest.fixture(scope="module")
def reward_adapter(tmp_path_factory):
    """A reward model as stage rm writes it, trained for a few steps."""
    folder = tmp_path_factory.mktemp("rm") / "out"
    train.main([
        "stage=rm", f"model_name_or_path={ROOT / 'models/tiny'}", f"output_dir={folder}",
        f"dataset_dir={ROOT / 'data'}", "dataset=tiny_pairs", "template=chatml", "cutoff_len=256",
        "max_samples=16", "per_device_train_batch_size=4", "max_steps=4", "learning_rate=1e-2",
        "lora_rank=2", "lora_target=q_proj,down_proj", "save_strategy=no", "use_cpu=true",
        "disable_tqdm=true"])
    return folder


# ---- a rollout and its steps ---------------------------------------------------------------------


def test_a_rollout_serves_all_its_steps(reward_adapter, tmp_path):
    """max_steps counts rollouts, each of ppo_epochs x ppo_buffer_size optimizer steps."""
    logged = steps(run(tmp_path / "out", reward_model=reward_adapter))
    assert len(logged) == 2 * 2 * 2
    samples = read_jsonl(tmp_path / "out/samples.jsonl")
    assert [sample["rollout"] for sample in samples] == [1] * 4 + [2] * 4
    assert len({sample["where"] for sample in samples[:4]}) == 4
    for number, rows in ((1, logged[:4]), (2, logged[4:])):
        scores = [sample["reward"] for sample in samples if sample["rollout"] == number]
        for epoch in (rows[:2], rows[2:]):      # each epoch: every answer once
            mean = sum(row["reward"] for row in epoch) / 2
            assert mean == pytest.approx(sum(scores) / 4, abs=1e-5)
        assert all(row["sampler_gap"] < 1e-4 for row in rows)
    assert logged[0]["ref_kl"] == 0             # B is zero: the adapters change nothing yet
    assert logged[-1]["ref_kl"] != 0
    assert logged[0]["kl_coef"] == pytest.approx(0.2)   # then as ppo_target wants
    assert logged[-1]["kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 4 / 10_000))
    lrs = [row["learning_rate"] for row in logged]
    assert lrs[:4] == [3e-3] * 4 and lrs[4:] == [1.5e-3] * 4    # one for a rollout
    kls = sum(sample["kl"] for sample in samples[4:]) / 4
    assert logged[-1]["ref_kl"] == pytest.approx(kls, abs=1e-5)


def test_the_value_head_is_trained_and_saved(reward_adapter, tmp_path):
    run(tmp_path / "out", reward_model=reward_adapter)
    ours = load_file(tmp_path / "out/value_head.safetensors")
    theirs = load_file(reward_adapter / "value_head.safetensors")
    assert ours.keys() == theirs.keys()
    weight = ours["v_head.summary.weight"]
    assert not torch.equal(weight, theirs["v_head.summary.weight"])
    # a new head is within 1 / sqrt(hidden_size); Adam has moved each weight by less than 0.03
    assert weight.abs().max() < 1 / math.sqrt(weight.shape[1]) + 0.03


def test_a_shorter_last_rollout_is_trained_on_too(reward_adapter, tmp_path):
    """9 rows, 4 a rollout: the third has one row, which all its steps share."""
    logged = steps(run(tmp_path / "out", reward_model=reward_adapter, max_samples=9, max_steps=3))
    assert len(logged) == 12 and all(row["grad_norm"] > 0 for row in logged)
    samples = read_jsonl(tmp_path / "out/samples.jsonl")
    assert len({sample["where"] for sample in samples}) == 9


@pytest.mark.parametrize("more", [
    {"ppo_score_norm": True, "ppo_whiten_rewards": True},
    {"quantization_bit": 4, "lora_dropout": 0.1},
    {"use_dora": True, "finetuning_type": "lora"},
    {"finetuning_type": "full", "learning_rate": 1e-4, "lora_rank": None},
], ids=str)
def test_options_run(more, reward_adapter, tmp_path):
    if more.get("finetuning_type") == "full":
        more = {**more, "reward": f"{ROOT / 'data/rewards.py'}:arithmetic"}
    else:
        more = {**more, "reward_model": reward_adapter}
    logged = steps(run(tmp_path / "out", **more))
    assert all(math.isfinite(row["loss"]) and row["sampler_gap"] < 1e-4 for row in logged)


def test_what_is_sampled_does_not_depend_on_where_the_dataset_lies(reward_adapter, tmp_path):
    shutil.copy(SMALL["dataset"], tmp_path / "sums.jsonl")
    for name, dataset in (("here", SMALL["dataset"]), ("there", tmp_path / "sums.jsonl")):
        run(tmp_path / name, reward_model=reward_adapter, max_steps=1, dataset=dataset)
    here, there = ([sample["answer"] for sample in read_jsonl(tmp_path / name / "samples.jsonl")]
                   for name in ("here", "there"))
    assert here == there


def test_eval_measures_the_rows_own_answers(tmp_path, capsys):
    """Rewards are measured in training; a yaml of stage ppo is read all the same."""
    evaluation = importlib.import_module("eval")
    found = {}
    for stage in ("ppo", "sft"):
        evaluation.main(settings(tmp_path / stage, stage=stage, max_samples=8, compare="false",
                                 do_eval="true", eval_dataset=SMALL["dataset"],
                                 adapter_name_or_path=None, reward_model="gone"))
        found[stage] = json.loads((tmp_path / stage / "eval_results.json").read_text())["eval_loss"]
    assert found["ppo"] == found["sft"]
    assert "as in stage: sft" in capsys.readouterr().out


# ---- resumed = never stopped, two ranks = one ----------------------------------------------------


@pytest.mark.parametrize("start", [3, 4, 6])
def test_resumed_within_a_rollout_equals_never_stopped(start, reward_adapter, tmp_path):
    """Bit for bit; of four steps a rollout one, none and two are left."""
    more = dict(save_strategy="steps", save_steps=0.01, reward_model=reward_adapter,
                ppo_score_norm=True)
    whole = run(tmp_path / "whole", **more)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    for name in ("samples.jsonl", "train_config.json", "trainer_log.jsonl"):
        shutil.copy(tmp_path / "whole" / name, resumed)
    shutil.copytree(tmp_path / f"whole/checkpoint-{start}", resumed / f"checkpoint-{start}")
    again = run(resumed, resume_from_checkpoint=resumed / f"checkpoint-{start}", **more)
    assert steps(again) == steps(whole)
    both = (tmp_path / "whole", resumed)
    ours, theirs = ((here / "samples.jsonl").read_text() for here in both)
    assert ours == theirs
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        ours, theirs = (load_file(here / name) for here in both)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_two_ranks_equal_one(reward_adapter, tmp_path):
    more = dict(reward_model=reward_adapter, ppo_score_norm=True, ppo_whiten_rewards=True)
    one = run(tmp_path / "one", gradient_accumulation_steps=2, **more)
    saved = dict(save_strategy="steps", save_steps=3 / 8)       # within the first rollout
    script = [ROOT / "train.py", *settings(tmp_path / "two", **more, **saved)]
    (code, text, _), = outcomes(forked(2, *script))
    assert code == 0, text
    resumed = tmp_path / "resumed"              # by one rank, which finds the answers of both
    shutil.copytree(tmp_path / "two/checkpoint-3", resumed / "checkpoint-3")
    again = steps(run(resumed, gradient_accumulation_steps=2, **more, **saved,
                      resume_from_checkpoint=resumed / "checkpoint-3"))
    for ours, theirs in zip(steps(one)[3:], again[3:], strict=True):
        assert theirs["reward"] == pytest.approx(ours["reward"], abs=1e-5)
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)
    for ours, theirs in zip(steps(one), steps(history(tmp_path / "two")), strict=True):
        assert theirs["reward"] == pytest.approx(ours["reward"], abs=1e-5)
        assert theirs["length"] == ours["length"]
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)
        assert theirs["ref_kl"] == pytest.approx(ours["ref_kl"], abs=1e-3)
    assert sampled(tmp_path / "two", ranks=2) == sampled(tmp_path / "one")


# ---- rewards that fail ---------------------------------------------------------------------------


def test_an_answer_without_a_score_is_not_trained_on(tmp_path, capsys):
    (tmp_path / "scores.py").write_text(NO_FRUIT)
    logged = steps(run(tmp_path / "out", reward=f"{tmp_path / 'scores.py'}:score", max_steps=4))
    assert 0 < sum(row["unscored"] for row in logged) / len(logged) < 1
    assert all(math.isfinite(row["loss"]) for row in logged)
    assert "it raised AssertionError: no fruit in line 2" in capsys.readouterr().err


def test_a_reward_that_never_works_ends_the_run(tmp_path):
    (tmp_path / "scores.py").write_text("def score(prompt, answer, row):\n    return None\n")
    with pytest.raises(ValueError, match="3 rollouts in a row without a reward: .*returned None"):
        run(tmp_path / "out", reward=f"{tmp_path / 'scores.py'}:score", max_steps=4)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("more, words", [
    ({}, "stage: ppo needs reward_model"),
    ({"reward_model": "rm", "finetuning_type": "full"}, "reward_model_type: full"),
    ({"reward_model": "rm", "reward_model_type": "api"}, "needs an address"),
    ({"reward_model": "http://here"}, "set reward_model_type: api"),
    ({"reward_model": "rm", "reward_model_adapters": "a"}, "needs reward_model, their base"),
    ({"reward_model": "rm", "reward_model_quantization_bit": 4}, "is for reward_model_type: full"),
    ({"reward_model": "rm", "reward_model_type": "full", "reward_model_quantization_bit": 5},
     "is 4 or 8, not 5"),
    ({"reward_model": "rm", "reward_weights": "1,2"}, "has 2 numbers for 1 rewards"),
    ({"reward_model": "rm", "pissa_init": "true"}, "pissa_init changes the base"),
    ({"reward_model": "rm", "num_iterations": 2}, "it is ppo_epochs"),
    ({"reward_model": "rm", "repetition_penalty": 1.2}, "no repetition_penalty"),
    ({"reward_model": "rm", "fsdp": "full_shard"}, "leave fsdp and token_budget out"),
], ids=str)
def test_settings_that_contradict_each_other(more, words):
    argv = {"stage": "ppo", "model_name_or_path": "m", "dataset": "d", "output_dir": "o", **more}
    assert words in refusal(*(f"{key}={value}" for key, value in argv.items()), script="train")


# ---- it learns -----------------------------------------------------------------------------------


@slow
def test_the_recipe_raises_the_score_of_its_reward_model(tmp_path, monkeypatch):
    """8 rollouts, with a third of the reward model's training."""
    monkeypatch.chdir(ROOT)
    argv = ["use_cpu=true", "disable_tqdm=true"]
    train.main(["configs/tiny_rm.yaml", *argv, "max_steps=150", "max_samples=600",
                "eval_strategy=no", f"output_dir={tmp_path / 'rm'}"])
    train.main(["configs/tiny_ppo.yaml", *argv, "max_steps=8", "eval_steps=8", "warmup_ratio=0",
                "lr_scheduler_type=constant",
                f"reward_model={tmp_path / 'rm'}", f"output_dir={tmp_path / 'out'}"])
    rows = history(tmp_path / "out")
    scores = [row["eval_reward/reward_model"] for row in rows if "eval_reward" in row]
    assert scores[-1] > scores[0] + 0.5
    assert 0 < [row["ref_kl"] for row in rows if "ref_kl" in row][-1] < 10
