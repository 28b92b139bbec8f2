"""Stage grpo: the model that is sampled is the one that is trained, and its rewards rise.

Formulas: tests/test_policy_losses.py; reward functions: tests/test_rewards.py.
"""
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import train
from fast import batch_decode
from generate import Sampling
from lora import set_adapters
from tests.common import ROOT, read_jsonl, slow, usual
from tests.ranks import forked, outcomes
from tests.rollout_runs import NO_FRUIT, arguments, history, logged_by, sampled, steps

SMALL = dict(
    stage="grpo",
    model_name_or_path=ROOT / "models/tiny",
    dataset=ROOT / "data/tiny_sums.jsonl",
    reward=f"{ROOT / 'data/rewards.py'}:arithmetic",
    template="chatml",
    cutoff_len=64,
    max_samples=40,
    max_new_tokens=14,
    num_generations=4,
    temperature=1.5,                # answers that differ
    per_device_train_batch_size=2,
    max_steps=6,
    learning_rate=3e-3,
    lora_rank=4,
    logging_steps=1,
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


# ---- the sampler is the trainer ------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    {}, {"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
    {"finetuning_type": "full", "learning_rate": 1e-4, "lora_rank": None},
], ids=str)
def test_the_sampled_log_probabilities_are_the_trainers(more, tmp_path):
    logged = steps(run(tmp_path / "out", **more))
    assert len(logged) == 6
    assert all(row["sampler_gap"] < 1e-4 for row in logged)
    assert any(row["grad_norm"] > 0 for row in logged)
    samples = read_jsonl(tmp_path / "out/samples.jsonl")
    assert len(samples) == 6 * 2 * 4
    assert {sample["rollout"] for sample in samples} == set(range(1, 7))
    for row, number in zip(logged, range(1, 7)):
        ours = [sample["reward"] for sample in samples if sample["rollout"] == number]
        assert row["reward"] == pytest.approx(sum(ours) / len(ours))


def base_alone(model, *args, **kwargs):
    """decode_rows without the adapters, as a rollout engine that never got them."""
    set_adapters(model, False)
    rows = list(decode_rows(model, *args, **kwargs))
    set_adapters(model, True)
    return rows


decode_rows = batch_decode.decode_rows


def test_answers_of_another_model_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_decode, "decode_rows", base_alone)
    with pytest.raises(ValueError, match="not those of the trained model"):
        run(tmp_path / "out", max_steps=20)


def test_the_divergence_is_from_the_model_without_adapters(tmp_path):
    logged = steps(run(tmp_path / "out", kl_beta=0.1))
    assert logged[0]["ref_kl"] == 0                 # B is zero: the adapters change nothing yet
    assert 1e-6 < logged[-1]["ref_kl"] < 1     # a mean over tokens, not their sum
    free = steps(run(tmp_path / "free"))
    assert free[0]["reward"] == logged[0]["reward"] and free[-1]["ref_kl"] == 0


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo"])
def test_every_loss_takes_several_steps_on_the_same_answers(kind, tmp_path):
    """In the first step of a rollout all ratios are 1; later ones move away from it."""
    logged = steps(run(tmp_path / "out", policy_loss=kind, num_iterations=3, epsilon=0.01,
                       learning_rate=1e-2))
    assert {sample["rollout"] for sample in read_jsonl(tmp_path / "out/samples.jsonl")} == {1, 2}
    for first in (0, 3):
        assert len({row["reward"] for row in logged[first:first + 3]}) == 1
        assert logged[first]["clip_share"] == 0
    assert any(row["clip_share"] > 0 for row in logged)
    assert [row["epoch"] for row in logged] == pytest.approx([n / 60 for n in range(1, 7)])


def test_the_tokens_of_a_step_are_those_of_prompts_and_answers(tmp_path):
    logged = steps(run(tmp_path / "out", max_steps=1))
    tokenizer = Tokenizer.from_file(str(ROOT / "models/tiny/tokenizer.json"))
    prompts = [f"<|im_start|>user\n{sample['prompt']}<|im_end|>\n<|im_start|>assistant\n"
               for sample in read_jsonl(tmp_path / "out/samples.jsonl")]
    assert len(prompts) == 2 * 4
    asked = sum(len(tokenizer.encode(prompt, add_special_tokens=False).ids) for prompt in prompts)
    tokens = asked + logged[0]["length"] * len(prompts)
    assert logged[0]["num_input_tokens_seen"] == pytest.approx(tokens)


# ---- resumed = never stopped, two ranks = one ----------------------------------------------------


@pytest.mark.parametrize("start", [2, 3, 4])
def test_resumed_within_a_rollout_equals_never_stopped(start, tmp_path):
    """Bit for bit, with three steps a rollout: after two, one, and none of them are left."""
    more = dict(num_iterations=3, save_strategy="steps", save_steps=1, kl_beta=0.05)
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
    ours, theirs = (load_file(here / "adapter_model.safetensors") for here in both)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", usual(["dapo", "grpo"], "grpo"))
def test_two_ranks_equal_one(kind, tmp_path):
    more = dict(policy_loss=kind, num_iterations=2, max_steps=4)
    one = run(tmp_path / "one", gradient_accumulation_steps=2, **more)
    script = [ROOT / "train.py", *settings(tmp_path / "two", **more)]
    (code, text, _), = outcomes(forked(2, *script))
    assert code == 0, text
    for ours, theirs in zip(steps(one), steps(history(tmp_path / "two")), strict=True):
        assert theirs["reward"] == ours["reward"] and theirs["length"] == ours["length"]
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
    assert sampled(tmp_path / "two", ranks=2) == sampled(tmp_path / "one")


# ---- rewards that fail ---------------------------------------------------------------------------


def test_a_reward_that_fails_now_and_then_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "scores.py").write_text(NO_FRUIT)
    logged = steps(run(tmp_path / "out", reward=f"{tmp_path / 'scores.py'}:score", max_steps=8))
    assert 0 < sum(row["unscored"] for row in logged) / 8 < 1
    said = capsys.readouterr().err
    assert "it raised AssertionError: no fruit in line 2" in said and "tiny_sums.jsonl row" in said
    unscored = [sample for sample in read_jsonl(tmp_path / "out/samples.jsonl")
                if sample["reward"] is None]
    assert unscored and all(sample["advantage"] == 0 for sample in unscored)


def test_an_evaluation_counts_only_answers_with_a_reward(tmp_path):
    (tmp_path / "scores.py").write_text(
        "def score(prompt, answer, row):\n"
        "    return None if 'apples' in prompt else 2.0\n")
    logged = run(tmp_path / "out", reward=f"{tmp_path / 'scores.py'}:score", max_steps=1,
                 val_size=20, eval_on_start=True, eval_strategy="steps", eval_steps=1,
                 per_device_eval_batch_size=4)
    found = [row for row in logged if "eval_loss" in row]
    assert found and 0 < found[0]["eval_unscored"] < 1
    assert all(row["eval_loss"] == -2.0 and row["eval_reward"] == 2.0 for row in found)


def test_a_reward_that_never_works_ends_the_run(tmp_path):
    (tmp_path / "scores.py").write_text("def score(prompt, answer, row):\n    return None\n")
    with pytest.raises(ValueError, match="3 rollouts in a row without a reward: .*returned None"):
        run(tmp_path / "out", reward=f"{tmp_path / 'scores.py'}:score")


# ---- it learns -----------------------------------------------------------------------------------


def test_several_rewards_with_weights(tmp_path):
    functions = ",".join(f"{ROOT / 'data/rewards.py'}:{name}"
                         for name in ("arithmetic", "short_answer"))
    logged = steps(run(tmp_path / "out", reward=functions, reward_weights="1,0.5", max_steps=2))
    for row in logged:
        parts = row["reward/arithmetic"] + 0.5 * row["reward/short_answer"]
        assert row["reward"] == pytest.approx(parts)


@slow
def test_the_recipe_learns_new_words_for_sums(tmp_path, monkeypatch):
    """The first 20 steps of configs/tiny_grpo.yaml; greedy answers to 100 questions held out."""
    monkeypatch.chdir(ROOT)
    train.main(["configs/tiny_grpo.yaml", "use_cpu=true", "disable_tqdm=true", "max_steps=20",
                f"output_dir={tmp_path / 'out'}"])
    evaluated = [row["eval_reward"] for row in history(tmp_path / "out") if "eval_reward" in row]
    assert evaluated[-1] > evaluated[0] + 0.15


def test_the_defaults_sample_from_the_whole_distribution():
    from methods.rollouts import rollout_sampling
    from tests.common import load_argv
    assert rollout_sampling(load_argv()) == Sampling(do_sample=True)
    given = load_argv("temperature=0.7", "top_p=0.7", "top_k=50")
    assert rollout_sampling(given) == Sampling(do_sample=True, temperature=0.7, top_p=0.7, top_k=50)
