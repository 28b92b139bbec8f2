"""methods/eval_schedules.py: learning rates that follow the evaluations, beside torch's and
transformers' own classes."""
import pytest
import torch
from torch import nn

from methods.eval_schedules import eval_schedule
from settings.config import Config

RATE = 1e-3


def losses(count, seed=3, sign=1):
    """A noisy loss that falls, and rises again at its end."""
    noise = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    fall = [3 / (1 + step / 4) if step < count * 2 / 3 else step / count for step in range(count)]
    return [sign * (a + b / 3) for a, b in zip(fall, noise)]


def follow(kind, kwargs, theirs, series, ratio=None):
    """Compare the rates of all groups after each evaluation; returns those of the first."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": RATE}]
    if ratio:
        groups.append({"params": [nn.Parameter(torch.zeros(1))], "lr": RATE * ratio})
    optimizer = torch.optim.SGD(groups)
    judge = theirs(optimizer, **kwargs)
    seen, found = [], []
    factors = eval_schedule(Config(learning_rate=RATE, lr_scheduler_type=kind,
                                   lr_scheduler_kwargs=kwargs, loraplus_lr_ratio=ratio), seen)
    for step, loss in enumerate(series):
        ours = [base * factor for base, factor in factors(step).items()]
        assert ours == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-12)
        found.append(ours[0])
        seen.append(loss)
        judge.step(loss)
    return found


@pytest.mark.parametrize("ratio", [None, 16.0])
@pytest.mark.parametrize("kwargs", [
    {}, {"patience": 2}, {"patience": 0, "factor": 0.5, "threshold": 0.02, "cooldown": 2},
    {"patience": 1, "threshold": 0.1, "threshold_mode": "abs", "min_lr": 2e-4},
    {"patience": 1, "mode": "max", "factor": 0.3, "eps": 1e-4},
])
def test_plateaus_equal_those_of_torch(kwargs, ratio):
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau
    found = follow("reduce_lr_on_plateau", kwargs, theirs, losses(60), ratio)
    assert found[-1] < RATE
    follow("reduce_lr_on_plateau", kwargs, theirs, losses(60, sign=-1), ratio)


@pytest.mark.parametrize("ratio", [None, 16.0])
@pytest.mark.parametrize("kwargs", [
    {}, {"patience": 1, "min_lr": 1e-5}, {"patience": 0, "smooth": True, "window_size": 3},
    {"patience": 0, "factor": 0.5, "threshold": 0.02, "threshold_mode": "rel", "cooldown": 2,
     "warmup": 1, "min_lr": 1e-4, "max_lr": 3e-3},
    {"patience": 0, "factor": 0.6, "min_lr": 4e-4, "reset_start": 2, "cooldown": 1,
     "smooth": True, "window_size": 2},
    {"patience": 1, "mode": "max", "factor": 0.7, "eps": 1e-4, "min_lr": 35e-5, "reset_start": 1},
])
def test_greedy_rates_equal_those_of_transformers(kwargs, ratio):
    theirs = getattr(pytest.importorskip("transformers.optimization"), "GreedyLR", None)
    if theirs is None:
        pytest.skip("transformers has no GreedyLR before 5.4")
    for seed in range(5):
        found = follow("greedy", kwargs, theirs, losses(90, seed), ratio)
        follow("greedy", kwargs, theirs, losses(90, seed, sign=-1), ratio)
    assert not kwargs or max(found) > RATE or min(found) < RATE
    if "reset_start" in kwargs:                         # at the floor, then back at the start
        assert RATE in found[found.index(min(found)):]


@pytest.mark.parametrize("kind", ["greedy", "reduce_lr_on_plateau"])
def test_a_resumed_schedule_takes_all_losses_at_once(kind):
    config = Config(learning_rate=RATE, lr_scheduler_type=kind,
                    lr_scheduler_kwargs={"patience": 0, "factor": 0.6, "min_lr": 1e-4})
    series, seen = losses(40), []
    factors = eval_schedule(config, seen)
    for step, loss in enumerate(series):
        seen.append(loss)
        one_by_one = factors(step)
    assert eval_schedule(config, series)(40) == one_by_one != {RATE: 1.0}


def test_verbose_tells_of_changes_but_not_of_those_before_a_resume(capsys):
    config = Config(learning_rate=RATE, lr_scheduler_type="greedy",
                    lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "verbose": True})
    seen = [3.0, 2.0]
    factors = eval_schedule(config, seen)
    factors(0)
    assert "evaluation" not in capsys.readouterr().out
    seen.append(1.0)
    factors(1)
    assert "evaluation 3: the learning rate is now 8.0000e-03" in capsys.readouterr().out


def test_a_floor_above_the_learning_rate_is_said(capsys):
    config = Config(lr_scheduler_type="greedy")
    eval_schedule(config, [])
    assert "learning_rate: 5e-05 is not above min_lr: 0.001" in capsys.readouterr().out


@pytest.mark.parametrize("kind, kwargs, words", [
    ("reduce_lr_on_plateau", {"mode": "low"}, "mode 'low' is none of min, max"),
    ("reduce_lr_on_plateau", {"max_lr": 1}, "has no 'max_lr'"),
    ("greedy", {"smooth": "yes"}, "smooth 'yes' is none of True, False"),
    ("greedy", {"min_lr": [1e-4, 1e-4]}, "min_lr: .* is not a number"),
    ("greedy", {"factor": 1}, "factor: 1 must be above 0 and below 1"),
    ("greedy", {"window_size": 0}, "window_size is a number of evaluations"),
    ("greedy", {"max_lr": 1e-4}, "max_lr: 0.0001 is below min_lr: 0.001"),
])
def test_invalid_arguments(kind, kwargs, words):
    with pytest.raises(ValueError, match=words):
        eval_schedule(Config(lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs), [])
