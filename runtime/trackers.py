"""Dashboards that receive the logged metrics: tensorboard, wandb, swanlab, mlflow (`report_to`).

    python train.py my.yaml report_to=tensorboard       then: tensorboard --logdir saves/my-run/runs
    python train.py my.yaml report_to=wandb,mlflow run_name=second-try

Each dashboard has one function that opens it and returns how to log and how to close. Only that
function imports the package; if the package is missing, the run stops before it begins. Curves are
named as in transformers (train/loss, eval/loss, train/learning_rate, ...), so runs of both share
their plots. trainer_log.jsonl is always written as well.

Next: runtime/report.py (RunLog), which calls this file.

Sources: the documentation of the four packages; curve names from transformers 5's integrations.
"""
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from errors import did_you_mean
from settings.config import Config

MLFLOW_VALUE_LENGTH = 250       # characters of a parameter that mlflow accepts
MLFLOW_BATCH = 100              # parameters in one request to mlflow


@dataclass
class Tracker:
    """One dashboard. log({curve: number}, step) adds points, close() sends what is buffered."""
    name: str
    log: Callable[[dict, int], None]
    close: Callable[[], None]


# ---- the dashboards -----------------------------------------------------------------------------


def open_tensorboard(config: Config, settings: dict, first_step: int) -> Tracker:
    """Write event files to logging_dir, or to `runs` in output_dir.

    A resumed run continues the same curves.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = config.logging_dir or str(Path(config.output_dir) / "runs")
    writer = SummaryWriter(folder, purge_step=first_step + 1)
    text = "\n".join(f"    {key}: {value}" for key, value in settings.items())
    writer.add_text("settings", text, first_step)

    def log(values: dict, step: int):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", log, writer.close)


def open_wandb(config: Config, settings: dict, first_step: int) -> Tracker:
    """Without `project` in the config, wandb itself reads WANDB_PROJECT."""
    import wandb

    run = wandb.init(
        project=config.given.get("project"),
        name=config.run_name,
        dir=config.output_dir,
        config=settings,
    )

    def log(values: dict, step: int):
        run.log(values, step=step)

    return Tracker("wandb", log, run.finish)


def open_swanlab(config: Config, settings: dict, first_step: int) -> Tracker:
    """The swanlab_* keys are LLaMA-Factory's; swanlab itself reads SWANLAB_API_KEY."""
    import swanlab

    swanlab.init(
        project=config.swanlab_project,
        workspace=config.swanlab_workspace,
        mode=config.swanlab_mode,
        experiment_name=config.swanlab_run_name or config.run_name,
        logdir=config.swanlab_logdir,
        config=settings,
    )

    def log(values: dict, step: int):
        swanlab.log(values, step=step)

    return Tracker("swanlab", log, swanlab.finish)


def open_mlflow(config: Config, settings: dict, first_step: int) -> Tracker:
    """`project` is the experiment; mlflow itself reads MLFLOW_TRACKING_URI."""
    import mlflow

    if "project" in config.given:
        mlflow.set_experiment(config.project)
    mlflow.start_run(run_name=config.run_name)

    params = [(name, value) for name, value in settings.items()
              if len(str(value)) <= MLFLOW_VALUE_LENGTH]
    for start in range(0, len(params), MLFLOW_BATCH):
        mlflow.log_params(dict(params[start:start + MLFLOW_BATCH]))

    def log(values: dict, step: int):
        mlflow.log_metrics(values, step=step)

    return Tracker("mlflow", log, mlflow.end_run)


OPENERS = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "swanlab": open_swanlab,
    "mlflow": open_mlflow,
}


# ---- which of them, and what they receive -------------------------------------------------------


def wanted_trackers(config: Config) -> list[str]:
    """The names in report_to, in the order of OPENERS.

    use_swanlab adds swanlab, and `all` stands for every installed dashboard. Raises ValueError for
    a name that is unknown or not installed.
    """
    requested = [name for name in config.report_to if name != "none"]
    if config.use_swanlab:
        requested.append("swanlab")

    unknown = [name for name in requested if name not in (*OPENERS, "all")]
    if unknown:
        hint = did_you_mean(unknown[0], OPENERS)
        raise ValueError(f"{config.source}: report_to: {unknown[0]} is none of "
                         f"{', '.join(OPENERS)}, all and none{hint}")

    installed = [name for name in OPENERS if importlib.util.find_spec(name)]
    missing = [name for name in requested if name not in (*installed, "all")]
    if missing:
        raise ValueError(f"{config.source}: report_to: {missing[0]} is not installed: "
                         f"pip install {missing[0]}, or leave it out; trainer_log.jsonl is "
                         "written in any case")

    if "all" in requested:
        return installed
    return [name for name in OPENERS if name in requested]


def open_trackers(config: Config, settings: dict, first_step: int) -> list[Tracker]:
    """Open every dashboard of wanted_trackers. settings: shown next to the curves."""
    return [OPENERS[name](config, settings, first_step) for name in wanted_trackers(config)]


def curves(row: dict) -> dict[str, float]:
    """{name of the curve: number} for a row of log_history, named as in transformers."""
    points = {}
    for name, value in row.items():
        if name == "step" or not isinstance(value, (int, float)):
            continue
        curve = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
        points[curve] = value
    return points


def log_row(trackers: list[Tracker], row: dict):
    """Send a row of log_history to every dashboard.

    A dashboard that fails is removed from the list, with a message: no run ends because of it.
    """
    for tracker in list(trackers):
        try:
            tracker.log(curves(row), row["step"])
        except Exception as error:          # network, account, version: anything can go wrong
            trackers.remove(tracker)
            text = str(error).strip()
            reason = text.splitlines()[0] if text else type(error).__name__
            tqdm.write(f"report_to: {tracker.name} failed at step {row['step']} and receives "
                       f"nothing from now on ({reason}). trainer_log.jsonl is still written")


def close_all(trackers: list[Tracker]):
    """Close every dashboard, so that it sends what it has buffered."""
    for tracker in trackers:
        try:
            tracker.close()
        except Exception as error:          # as in log_row
            tqdm.write(f"report_to: {tracker.name} could not be closed ({error})")
