"""runtime/trackers.py: what trackers receive, by stubs and by tensorboard's own reader."""

import importlib.machinery
import json
import sys
import types

import pytest

import train
from runtime.trackers import OPENERS, Tracker, close_all, curves, log_row, wanted_trackers
from settings.load_config import load_config
from tests.common import GOLDEN, needs_shared

STUBS = ("wandb", "swanlab", "mlflow")


@pytest.fixture
def stubs(monkeypatch):
    """Modules that record (function, args, kwargs) of every call."""
    calls = {name: [] for name in STUBS}

    def noting(name, function):
        def call(*args, **kwargs):
            calls[name].append((function, args, kwargs))
            return modules[name]

        return call

    modules = {}
    for name in STUBS:
        modules[name] = types.ModuleType(name)
        modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        for (
            function
        ) in "init log finish set_experiment start_run log_params log_metrics end_run".split():
            setattr(modules[name], function, noting(name, function))
        monkeypatch.setitem(sys.modules, name, modules[name])
    return calls


def settings(*pairs):
    return load_config(["model_name_or_path=m", "dataset=d", "output_dir=o", *pairs], "train")


def trained(tmp_path, monkeypatch, *pairs):
    """A recorded run with evaluations; its log_history."""
    monkeypatch.chdir(GOLDEN / "curves/sft_eval")
    train.main(
        [
            "config.yaml",
            f"output_dir={tmp_path}/out",
            "plot_loss=false",
            "disable_tqdm=true",
            "max_steps=4",
            *pairs,
        ]
    )
    return json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]


@needs_shared
def test_every_logged_number_reaches_every_dashboard(tmp_path, monkeypatch, stubs):
    history = trained(
        tmp_path,
        monkeypatch,
        "report_to=wandb,mlflow",
        "use_swanlab=true",
        "run_name=second",
        "swanlab_project=mine",
        "project=ours",
    )
    rows = [row for row in history if "loss" in row or "eval_loss" in row]
    want = [(curves(row), row["step"]) for row in rows]
    assert len(want) == 5
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/epoch"} <= want[0][
        0
    ].keys()
    assert "eval/loss" in want[3][0] and want[3][1] == 3
    for name, function in (("wandb", "log"), ("swanlab", "log"), ("mlflow", "log_metrics")):
        assert [
            (args[0], kwargs["step"]) for called, args, kwargs in stubs[name] if called == function
        ] == want
    first = {name: stubs[name][0][2] for name in STUBS}
    assert (first["wandb"]["project"], first["wandb"]["name"]) == ("ours", "second")
    assert (first["swanlab"]["project"], first["swanlab"]["experiment_name"]) == ("mine", "second")
    assert first["wandb"]["config"]["learning_rate"] == 0.002
    assert stubs["mlflow"][0][:2] == ("set_experiment", ("ours",))
    assert stubs["mlflow"][1][2] == {"run_name": "second"}
    params = [args[0] for called, args, _ in stubs["mlflow"] if called == "log_params"]
    assert len(params) > 1
    assert all(len(part) <= 100 for part in params)
    assert "lora_rank" in {**params[0], **params[1]}
    assert [stubs[name][-1][0] for name in STUBS] == ["finish", "finish", "end_run"]


@needs_shared
def test_tensorboard_reads_the_curves_of_a_resumed_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["report_to=tensorboard", "save_strategy=steps", "save_steps=2"]
    trained(tmp_path, monkeypatch, *more)
    history = trained(
        tmp_path, monkeypatch, *more, f"resume_from_checkpoint={tmp_path}/out/checkpoint-2"
    )
    found = EventAccumulator(str(tmp_path / "out/runs"))
    found.Reload()
    for name, key in (
        ("train/loss", "loss"),
        ("eval/loss", "eval_loss"),
        ("train/learning_rate", "learning_rate"),
    ):
        want = [(row["step"], row[key]) for row in history if key in row]
        got = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in got] == [step for step, _ in want]
        assert all(abs(a - b) < 1e-6 for (_, a), (_, b) in zip(got, want))


def test_names_of_report_to(monkeypatch, stubs):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: sys.modules.get(name) if name in STUBS else None
    )
    assert wanted_trackers(settings()) == wanted_trackers(settings("report_to=none")) == []
    assert wanted_trackers(settings("report_to=[none]")) == []
    assert wanted_trackers(settings("report_to=swanlab,wandb")) == ["wandb", "swanlab"]
    assert wanted_trackers(settings("report_to=all")) == ["wandb", "swanlab"]
    assert wanted_trackers(settings("use_swanlab=true", "report_to=swanlab")) == ["swanlab"]
    with pytest.raises(ValueError, match="mlflow is not installed: pip install mlflow"):
        wanted_trackers(settings("report_to=mlflow"))
    with pytest.raises(ValueError, match="tensorbord is none of .* \\(did you mean 'tensorboard'"):
        wanted_trackers(settings("report_to=tensorbord"))
    with pytest.raises(ValueError, match="swanlab login"):
        settings("swanlab_api_key=x")


@needs_shared
def test_a_missing_package_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed"):
        trained(tmp_path, monkeypatch, "report_to=wandb")
    assert not (tmp_path / "out").exists()


def test_a_dashboard_that_fails_is_dropped_with_a_message(capsys):
    received = []

    def broken(values, step):
        raise ConnectionError("no network\nat all")

    trackers = [
        Tracker("bad", broken, lambda: None),
        Tracker("good", lambda values, step: received.append(values), broken),
    ]
    for step in (1, 2):
        log_row(trackers, {"loss": 0.5, "eval_loss": float("nan"), "step": step})
    assert [tracker.name for tracker in trackers] == ["good"] and len(received) == 2
    # a NaN stays one
    assert received[0]["train/loss"] == 0.5
    assert received[0]["eval/loss"] != received[0]["eval/loss"]
    close_all(trackers)
    assert (
        capsys.readouterr().out.count(
            "bad failed at step 1 and receives nothing from now on (no network)"
        )
        == 1
    )


def test_each_tracker_has_its_function():
    assert list(OPENERS) == ["tensorboard", "wandb", "swanlab", "mlflow"]
