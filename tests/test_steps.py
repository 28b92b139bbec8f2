"""runtime/steps.py: micro-batches within a token budget, sharded to ranks, merged into passes."""
import json
import shutil
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from parallel import Ranks
from runtime import setup, steps
from runtime.steps import budget_batches, epoch_order
from settings.config import Config
from tests.common import needs_shared, run_recorded


class Sized(list):
    """Imitates token_cache.Examples where only the number of tokens of each example matters."""

    sizes = property(lambda self: np.array([1 + i % 40 for i in self]))


def plan_of(config, examples, world):
    stage = SimpleNamespace(collate=list)
    return steps.StepPlan(config, examples, stage, Ranks(0, world), torch.device("cpu"))


def rows_of_steps(config, after):
    """{step: (epoch, rows)} of the steps after `after`, of 24 rows in 6 steps an epoch."""
    plan = plan_of(config, Sized(range(24)), 1)
    plan.make_step = lambda number, epoch, batches: SimpleNamespace(
        number=number, epoch=epoch, rows=list(chain(*batches)))
    found = {step.number: (step.epoch, step.rows) for step in plan.steps(after)}
    ends = [number for number in found if plan.ends_epoch(number)]
    return found, ends


def test_ignore_data_skip_resumes_with_the_first_rows_of_the_epoch():
    """As transformers: the epoch is that of the checkpoint, its rows begin anew, and the number of
    steps stays."""
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=18)
    whole, _ = rows_of_steps(Config(**settings), 0)
    resumed, ends = rows_of_steps(Config(**settings, ignore_data_skip=True), 8)
    assert list(resumed) == list(range(9, 19))
    for step, (epoch, rows) in resumed.items():
        assert (epoch, rows) == whole[step - 2]         # step 8 is the second of epoch 1
    assert ends == [14, 18]
    assert rows_of_steps(Config(**settings), 8) == (
        {step: whole[step] for step in range(9, 19)}, [12, 18])
    assert rows_of_steps(Config(**settings, ignore_data_skip=True), 12)[0] == {
        step: whole[step] for step in range(13, 19)}


@pytest.mark.parametrize("settings, most", [
    (dict(max_steps=10**15), 11_000), (dict(max_steps=10**15, token_budget=100), 1000),
    (dict(num_train_epochs=10**9), 11_000), (dict(max_steps=30), 300),
])
def test_long_runs_are_planned_from_their_first_epochs(settings, most, monkeypatch):
    """And from the largest micro-batch that there can be."""
    monkeypatch.setattr(steps, "ENOUGH_BATCHES", 10_000)
    plan = plan_of(Config(**settings, per_device_train_batch_size=3), Sized(range(100)), 1)
    batches = list(plan.all_micro_batches())
    sizes = [sum(map(plan.tokens_of, batch)) for batch in batches]
    assert len(batches) < most
    if most == 11_000:
        assert max(sizes) == sum(sorted(plan.train_set.sizes)[-3:]) == sizes[-1]


# ---- micro-batches within a token budget --------------------------------------------------------


@pytest.mark.parametrize("budget", (1, 100, 700, 10**6))
def test_every_row_is_used_once_within_the_budget(budget):
    lengths = torch.randint(1, 300, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    order = epoch_order(5000, 1, 0, True)
    batches = budget_batches(order, lengths.__getitem__, budget)
    assert sorted(chain(*batches)) == list(range(5000))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
    assert batches == budget_batches(order, lengths.__getitem__, budget)
    if budget == 700:  # similar sizes: far less spread than among random rows
        spread = [
            max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches
        ]
        assert sum(spread) / len(spread) < 5 and len(batches) < 1.2 * sum(lengths) / budget
    assert list(chain(*budget_batches(order, lengths.__getitem__, budget, alike=False))) == order


@pytest.mark.parametrize("world", (1, 2, 3))
def test_all_ranks_together_have_every_row_once_an_epoch(world):
    config = Config(token_budget=64, gradient_accumulation_steps=2)
    examples = Sized(range(200))
    epochs = [
        [steps.shard_batches(config, examples, epoch, Ranks(rank, world)) for rank in range(world)]
        for epoch in (0, 1)
    ]
    for dealt in epochs:
        assert sorted(chain(*chain(*dealt))) == list(range(200))
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        assert plan_of(config, examples, world).steps_per_epoch == -(-len(dealt[0]) // 2)
    assert epochs[0] != epochs[1] and sorted(chain(*epochs[0])) == sorted(chain(*epochs[1]))


@needs_shared
def test_a_resumed_run_with_a_token_budget_equals_an_uninterrupted_run(
    tmp_path, monkeypatch, capsys
):
    more = [
        "token_budget=150",
        "gradient_accumulation_steps=2",
        "save_strategy=steps",
        "save_steps=2",
        "max_steps=6",
        "per_device_train_batch_size=3",
    ]
    whole = run_recorded("sft_llama3", tmp_path / "a", monkeypatch, *more)
    assert "(as many as have 150 tokens x 2 x 1 ranks)" in capsys.readouterr().out
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"b/checkpoint-{step}")
    again = run_recorded("sft_llama3", tmp_path / "b", monkeypatch, *more,
                         "resume_from_checkpoint=true")
    assert [row["loss"] for row in whole["log_history"] if "loss" in row] == [
        row["loss"] for row in again["log_history"] if "loss" in row
    ]
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(
        ValueError, match="300 tokens a step, and this run takes 450: .*or token_budget so that"
    ):
        run_recorded(
            "sft_llama3",
            tmp_path / "b",
            monkeypatch,
            *more,
            "resume_from_checkpoint=true",
            "gradient_accumulation_steps=3",
        )


# ---- micro-batches that run as one pass ----------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    "more", [[], ["neftune_noise_alpha=5"], ["bf16=true"]], ids=("plain", "noise", "bf16")
)
def test_merged_micro_batches_give_the_same_training(more, tmp_path, monkeypatch, capsys):
    """Losses and gradient norms against separate micro-batches; NEFTune's noise is per pass."""
    monkeypatch.setattr(setup, "ENOUGH_TOKENS", {"cpu": 10_000})
    a = run_recorded(
        "sft_llama3",
        tmp_path / "a",
        monkeypatch,
        "per_device_train_batch_size=1",
        "gradient_accumulation_steps=8",
        *more,
    )
    assert "6.8 micro-batches run as one pass" in capsys.readouterr().out
    b = run_recorded(
        "sft_llama3",
        tmp_path / "b",
        monkeypatch,
        "per_device_train_batch_size=1",
        "gradient_accumulation_steps=8",
        "join_micro_batches=false",
        *more,
    )
    assert "run as one pass" not in capsys.readouterr().out
    bound = 1e-5 if not more else 0.05
    for x, y in zip(a["log_history"], b["log_history"], strict=True):
        if "loss" in x:
            assert abs(x["loss"] - y["loss"]) < bound
            assert abs(x["grad_norm"] - y["grad_norm"]) < 10 * bound


@needs_shared
def test_a_resumed_run_keeps_its_number_of_passes(tmp_path, monkeypatch):
    """Bit for bit, on a machine that would now merge more; NEFTune draws noise for every pass."""
    more = [
        "per_device_train_batch_size=1",
        "gradient_accumulation_steps=8",
        "neftune_noise_alpha=5",
        "save_strategy=steps",
        "save_steps=2",
        "max_steps=4",
        "logging_steps=1",
        "lr_scheduler_type=constant",
        "warmup_ratio=0",
        "pin_kernels.matmul=torch",         # a and b are two starts
    ]
    monkeypatch.setattr(setup, "ENOUGH_TOKENS", {"cpu": 300})
    whole = run_recorded("sft_llama3", tmp_path / "a", monkeypatch, *more)
    run_recorded("sft_llama3", tmp_path / "b", monkeypatch, *more, "max_steps=2")
    monkeypatch.setattr(setup, "ENOUGH_TOKENS", {"cpu": 10_000})
    again = run_recorded("sft_llama3", tmp_path / "b", monkeypatch, *more,
                         "resume_from_checkpoint=true")
    run_recorded("sft_llama3", tmp_path / "c", monkeypatch, *more)
    losses = [
        [row["loss"] for row in state["log_history"] if "loss" in row] for state in (whole, again)
    ]
    joined = [
        json.loads((tmp_path / name / "checkpoint-4/trainer_state.json").read_text())["resume"][
            "at_once"
        ]
        for name in "abc"
    ]
    assert len(losses[0]) == len(losses[1]) == 4 and losses[0] == losses[1]
    assert joined[0] == joined[1] != joined[2]
