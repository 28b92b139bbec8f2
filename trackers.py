"""What a training logs, told to a dashboard as well: tensorboard, wandb, swanlab, mlflow (`report_to`).

    python train.py my.yaml report_to=tensorboard               then: tensorboard --logdir saves/my-run/runs
    python train.py my.yaml report_to=wandb,mlflow run_name=second-try

Each is a function that opens it and returns how to log and how to close. Its package is imported there and nowhere
else; where it is missing, the run stops before it begins. The curves have the names of transformers (train/loss,
eval/loss, train/learning_rate, …), so that runs of both lie in the same diagrams. trainer_log.jsonl is always written.

Read before: report.py (RunLog), which calls it. Read after: train.py.
Sources: the documentation of the four packages; the names, transformers 5's integrations.
"""
import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass
class Tracker:
    """One dashboard: log({curve: number}, step) and close()."""
    name: str
    log: Callable[[dict, int], None]
    close: Callable[[], None]


def open_tensorboard(config, settings: dict, first_step: int) -> Tracker:
    """Event files in logging_dir, or in `runs` in output_dir. A resumed run goes on in the same curve."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(config.logging_dir or str(Path(config.output_dir) / "runs"), purge_step=first_step + 1)
    writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()), first_step)

    def log(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", log, writer.close)


def open_wandb(config, settings: dict, first_step: int) -> Tracker:
    """Where `project` is not said, WANDB_PROJECT counts, which wandb reads itself."""
    import wandb
    run = wandb.init(project=config.given.get("project"), name=config.run_name, dir=config.output_dir, config=settings)
    return Tracker("wandb", lambda values, step: run.log(values, step=step), run.finish)


def open_swanlab(config, settings: dict, first_step: int) -> Tracker:
    """Its own keys are LLaMA-Factory's; the key of the account is SWANLAB_API_KEY, which swanlab reads itself."""
    import swanlab
    swanlab.init(project=config.swanlab_project, workspace=config.swanlab_workspace, mode=config.swanlab_mode,
                 experiment_name=config.swanlab_run_name or config.run_name, logdir=config.swanlab_logdir,
                 config=settings)
    return Tracker("swanlab", lambda values, step: swanlab.log(values, step=step), swanlab.finish)


def open_mlflow(config, settings: dict, first_step: int) -> Tracker:
    """MLFLOW_TRACKING_URI, which mlflow reads itself, says where to; `project` is its experiment."""
    import mlflow
    if "project" in config.given:
        mlflow.set_experiment(config.project)
    mlflow.start_run(run_name=config.run_name)
    params = [(name, value) for name, value in settings.items() if len(str(value)) <= 250]      # its own limits: this,
    for start in range(0, len(params), 100):                                                   # and so many in one go
        mlflow.log_params(dict(params[start:start + 100]))
    return Tracker("mlflow", lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run)


OPENERS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "swanlab": open_swanlab, "mlflow": open_mlflow}


def wanted_trackers(config) -> list[str]:
    """The names in report_to; use_swanlab adds its own, and all means those that are installed.

    Raises ValueError for one that is unknown, or not installed.
    """
    asked = [name for name in config.report_to if name != "none"] + ["swanlab"] * config.use_swanlab
    if unknown := [name for name in asked if name not in (*OPENERS, "all")]:
        close = difflib.get_close_matches(unknown[0], OPENERS, 1)
        raise ValueError(f"{config.source}: report_to: {unknown[0]} is none of {', '.join(OPENERS)}, all and none"
                         + (f" (did you mean '{close[0]}'?)" if close else ""))
    there = [name for name in OPENERS if importlib.util.find_spec(name)]
    if missing := [name for name in asked if name not in (*there, "all")]:
        raise ValueError(f"{config.source}: report_to: {missing[0]} is not installed: pip install {missing[0]}, or "
                         "leave it out; trainer_log.jsonl is written in any case")
    return [name for name in OPENERS if name in asked or "all" in asked and name in there]


def open_trackers(config, settings: dict, first_step: int) -> list[Tracker]:
    """All that wanted_trackers names. settings: shown beside the curves."""
    return [OPENERS[name](config, settings, first_step) for name in wanted_trackers(config)]


def curves(row: dict) -> dict[str, float]:
    """{name of the curve: number} of a row of log_history, under transformers' names."""
    return {f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value for name, value in row.items()
            if name != "step" and isinstance(value, (int, float))}


def tell(trackers: list[Tracker], row: dict):
    """A row of log_history to all of them. One that fails is left out from then on, and said: no run ends for it."""
    for tracker in list(trackers):
        try:
            tracker.log(curves(row), row["step"])
        except Exception as error:          # of a network, an account, another version: of any kind
            trackers.remove(tracker)
            tqdm.write(f"report_to: {tracker.name} failed at step {row['step']} and is left out from here "
                       f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}). "
                       "trainer_log.jsonl goes on")


def close_all(trackers: list[Tracker]):
    """Let each of them send what it holds."""
    for tracker in trackers:
        try:
            tracker.close()
        except Exception as error:          # see tell
            tqdm.write(f"report_to: {tracker.name} could not be closed ({error})")
