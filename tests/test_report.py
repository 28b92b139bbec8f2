"""runtime/report.py: loss curves of one or several runs, logs read back, tables of results."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from runtime import report
from runtime.report import (
    eval_metrics,
    format_table,
    model_card,
    names_of_runs,
    plot_losses,
    plot_runs,
    read_history,
    smooth,
)
from settings.load_config import load_config
from tests.common import GOLDEN, ROOT, needs_shared


def history(losses, evals=(), **more):
    """log_history with these losses at steps 1, 2, ... and an evaluation at every second step."""
    rows = [
        {"step": step, "loss": loss, **{key: value * step for key, value in more.items()}}
        for step, loss in enumerate(losses, 1)
    ]
    return (
        rows
        + [{"step": 2 * (i + 1), "eval_loss": value} for i, value in enumerate(evals)]
        + [{"step": len(losses)}]
    )


@pytest.fixture
def drawn(monkeypatch):
    """The panels of every figure that is drawn: lists of matplotlib axes."""
    pytest.importorskip("matplotlib")
    honest, found = report.drawing, []

    def watched(count, hint):
        figure, panels = honest(count, hint)
        found.append(panels)
        return figure, panels

    monkeypatch.setattr(report, "drawing", watched)
    return found


def test_smoothing():
    """The moving average of LLaMA-Factory's plots: weight 1.8 * (sigmoid(0.05 n) - 0.5)."""
    values = [4.0, 2.0, 3.0, 1.0]
    w = 1.8 * (1 / (1 + math.exp(-0.2)) - 0.5)
    want = [4.0]
    for value in values[1:]:
        want.append(w * want[-1] + (1 - w) * value)
    assert smooth(values) == pytest.approx(want) and smooth([]) == []
    holes = smooth([math.nan, 4.0, math.inf, 2.0])
    assert math.isnan(holes[0]) and math.isnan(holes[2]) and holes[1] == 4 and 2 < holes[3] < 4


def test_plots_of_one_run(tmp_path, drawn):
    """LLaMA-Factory's file names; raw and smoothed curves; accuracies of a preference run."""
    rows = history(
        [3.0, 2.0, 1.0, 0.5], [2.5, 0.7], **{"rewards/accuracies": 0.2, "grad_norm": 1.0}
    )
    names = ["training_loss.png", "training_eval_loss.png", "training_rewards_accuracies.png"]
    assert [path.name for path in plot_losses(tmp_path, rows)] == names
    for name, (axes,), values in zip(
        names, drawn, ([3.0, 2.0, 1.0, 0.5], [2.5, 0.7], [0.2, 0.4, 0.6, 0.8])
    ):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        raw, smoothed = axes.get_lines()
        assert list(raw.get_ydata()) == pytest.approx(values)
        assert list(smoothed.get_ydata()) == pytest.approx(smooth(values))
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "original",
            "smoothed",
        ]
    assert drawn[0][0].get_title() == f"training loss of {tmp_path}"
    assert drawn[0][0].get_xlabel() == "step"
    assert plot_losses(tmp_path, [{"step": 1, "lr": 1}]) == []


def test_several_runs_in_one_plot(tmp_path, drawn):
    runs = {
        "one": history([3.0, 2.0]),
        "two": history([2.5, 2.0, 1.0], [1.2]),
        "three": history([1.0]),
    }
    assert plot_runs(runs, tmp_path / "all.png") == tmp_path / "all.png"
    assert (tmp_path / "all.png").stat().st_size > 5000
    losses, evals = drawn[0]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["one", "two", "three"]
    assert [text.get_text() for text in evals.get_legend().get_texts()] == ["two"]
    assert len({line.get_color() for line in losses.get_lines()}) == 3
    assert evals.get_lines()[0].get_color() == losses.get_lines()[2].get_color(), (
        "a run keeps its color"
    )
    with pytest.raises(ValueError, match="nothing is logged yet in one"):
        plot_runs({"one": []}, tmp_path / "none.png")


def test_without_matplotlib_there_is_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert plot_losses(tmp_path, history([1.0])) == []
    assert plot_runs({"a": history([1.0])}, tmp_path / "a.png") is None
    assert "pip install matplotlib, then python -m runtime.report" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@needs_shared
def test_a_recorded_run_is_read_finished_or_not(tmp_path):
    """LLaMA-Factory's files: trainer_state.json or, unfinished, trainer_log.jsonl truncated in a
    line."""
    finished = read_history(GOLDEN / "curves/sft_eval")
    text = (GOLDEN / "curves/sft_eval/trainer_log.jsonl").read_text()
    (tmp_path / "trainer_log.jsonl").write_text(text + '{"current_steps": 7, "lo')
    running = read_history(tmp_path)
    for key in ("loss", "eval_loss"):
        want, got = (
            [(row["step"], round(row[key], 4)) for row in rows if key in row]
            for rows in (finished, running)
        )
        assert want and got[: len(want)] == want
    with pytest.raises(FileNotFoundError, match="is it a run's output_dir"):
        read_history(tmp_path / "nothing")
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_history(tmp_path)


@needs_shared
def test_the_command(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [tmp_path / "saves" / name for name in ("sft_eval", "sft_llama3")]
    for run in runs:
        run.mkdir(parents=True)
        for name in ("trainer_log.jsonl", "trainer_state.json"):
            shutil.copy(GOLDEN / "curves" / run.name / name, run)
    done = subprocess.run(
        [sys.executable, "-m", "runtime.report", *runs],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and (tmp_path / "saves/compared_runs.png").is_file(), done.stderr
    state = json.loads((GOLDEN / "curves/sft_eval/trainer_state.json").read_text())
    evals = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    assert f"{min(evals):.4f}" in done.stdout.splitlines()[1] and "sft_eval" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "runtime.report"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: usage")


def test_names_of_runs():
    assert names_of_runs(["saves/a", "saves/b/"]) == ["a", "b"]
    assert names_of_runs(["x/run", "y/run"]) == ["x/run", "y/run"]


def test_eval_metrics():
    """By hand: batches of 2 and 1 tokens with losses 1, 2 and 6."""
    found = eval_metrics(1.5 + 6, 2, 9.0, 3, rows=4, seconds=2.0)
    assert found["eval_loss"] == 3.75 and found["eval_token_loss"] == 3
    assert found["eval_perplexity"] == pytest.approx(math.exp(3))
    assert (found["eval_samples_per_second"], found["eval_steps_per_second"]) == (2, 1)
    with pytest.raises(ValueError, match="carry no loss"):
        eval_metrics(0.0, 0, 0.0, 0, 4, 1.0)


def test_format_table():
    assert format_table(["", "loss"], [["base", "2.5"], ["adapter", "10"]]).splitlines() == [
        "           loss",
        "  base      2.5",
        "  adapter    10",
    ]


def test_the_readme_says_what_loads_the_adapter():
    config = load_config(["model_name_or_path=base", "output_dir=out", "dataset=rows"], "train")
    card = model_card(config, {"train_loss": 1.0}, "qwen", ["Take the one in `pissa_converted`."])
    assert "\n\nTake the one in `pissa_converted`.\n\n| setting" in card
    assert "pissa" not in model_card(config, {"train_loss": 1.0}, "qwen")


def test_the_readme_names_a_base_of_the_hub_and_no_folder_of_this_machine(tmp_path):
    def card_of(base):
        config = load_config([f"model_name_or_path={base}", f"output_dir={tmp_path / 'out'}",
                              "dataset=rows"], "train")
        return model_card(config, {"train_loss": 1.0}, "qwen")

    cached = tmp_path / "hub/models--Qwen--Qwen3-8B/snapshots/1a2b"
    local = tmp_path / "my--model/snapshots/weights"
    for folder in (cached, local):
        folder.mkdir(parents=True)
    for base in ("Qwen/Qwen3-8B", cached):
        assert "---\nbase_model: Qwen/Qwen3-8B\n" in card_of(base)
        assert "adapter for `Qwen/Qwen3-8B`, trained" in card_of(base)
    card = card_of(local)
    assert "base_model" not in card and str(tmp_path) not in card
    assert "for a model in a local folder, `weights`, trained" in card


def test_a_sketch_of_the_loss_where_matplotlib_is_missing():
    lines = report.sketch([4.0, 2.0, math.nan, 1.0, 1.0], width=8, height=3).splitlines()
    assert lines == ["   4.0000 |██", "          |████", "   1.0000 |████████"]
    many = report.sketch([5 - i / 1000 for i in range(4000)]).splitlines()
    assert len(many) == 6 and max(map(len, many)) == 11 + 64
    assert [len(line) for line in many] == sorted(len(line) for line in many)
    assert report.sketch([1.0]) == report.sketch([]) == report.sketch([math.nan, 2.0]) == ""
    assert "1.0000" in report.sketch([1.0, 1.0])
