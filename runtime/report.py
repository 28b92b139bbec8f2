"""What a run prints and writes: the start page, log lines, JSON files, loss curves, model card.

    python -m runtime.report saves/run                redraw training_loss.png etc. (matplotlib)
    python -m runtime.report saves/one saves/two ...  several runs in saves/compared_runs.png

The files and their fields are LLaMA-Factory's: trainer_log.jsonl, trainer_state.json,
train_results.json, eval_results.json, all_results.json, training_loss.png.

Requires: runtime/trackers.py (dashboards).
Next: train.py, which calls it.
"""
import json
import math
import os
import platform
import textwrap
import time
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path

from tqdm import tqdm

from errors import run_script
from runtime.trackers import Tracker, close_all, log_row
from settings.config import ADAPTERS, Config

# the metrics that are plotted; in file names _ stands for /
PLOTTED = ("loss", "eval_loss", "rewards/accuracies", "rewards/chosen", "eval_accuracy")
# metrics of a stage that are printed on its log lines, and their short names there
SHORT_NAMES = {
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "reward": "reward",
}
COLUMNS = "{step:>7} {epoch:>7} {loss:>9} {lr:>10} {grad:>9} {speed:>9}"
BLUE = "#1f77b4"

# settings that the model card lists
CARD_KEYS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "cutoff_len",
    "seed",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "oft_rank",
    "oft_block_size",
    "oft_target",
)


# ---- the start page -----------------------------------------------------------------------------


@lru_cache(maxsize=None)
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "safetensors", "tokenizers", "flash_attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def print_pairs(title: str, pairs: dict):
    """Print a title and aligned `name  value` lines."""
    print(format_pairs(title, pairs))


def format_paragraph(title: str, pairs: dict) -> str:
    """A title and `name: value` texts in lines of at most 100 columns."""
    texts = "; ".join(f"{name}: {value}" for name, value in pairs.items())
    lines = textwrap.fill(texts, 100, initial_indent="  ", subsequent_indent="  ",
                          break_long_words=False, break_on_hyphens=False)
    return f"\n{title}\n{lines}"


def format_pairs(title: str, pairs: dict) -> str:
    """A title and aligned `name  value` lines."""
    width = max((len(str(name)) for name in pairs), default=0)
    return "\n".join([f"\n{title}", *(f"  {name:<{width}}  {value}"
                                      for name, value in pairs.items())])


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the first one flush left, the others flush right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for first, *others in lines:
        cells = [f"{first:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        text.append("  " + "  ".join(cells))
    return "\n".join(text)


# ---- the log of a run ---------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class RunLog:
    """The log of one run: progress bar, columns, trainer_log.jsonl, log_history, dashboards.

    first_step: the step that a resumed run starts from; lines after it are removed from
    trainer_log.jsonl. history: log_history up to there. disabled: no progress bar. writes: whether
    this rank writes files. trackers: the dashboards of runtime/trackers.py.
    """

    def __init__(self, folder: Path | str, total_steps: int, first_step: int = 0,
                 history: list | None = None, disabled: bool = False,
                 writes: bool = True, trackers: Sequence[Tracker] = ()):
        self.path = Path(folder) / "trainer_log.jsonl"
        self.writes = writes
        self.trackers = list(trackers)
        self.total_steps = total_steps
        self.first_step = first_step
        self.history = list(history or [])
        self.start_time = time.monotonic()
        if writes:
            self._rewrite(self._lines_before(first_step) if first_step else [])
        # None: tqdm draws no bar where the output is a file or a pipe
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True,
                        disable=disabled or None)
        tqdm.write(COLUMNS.format(step="step", epoch="epoch", loss="loss", lr="lr",
                                  grad="grad norm", speed="tokens/s"))

    def _lines_before(self, first_step: int) -> list[dict]:
        """The lines of a resumed run up to first_step, as dicts.

        The closing line holds no loss and is left out: it will be written again. So is an
        incomplete last line, left by a run that was killed or met a full disk.
        """
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        complete = [line for line in text.splitlines()
                    if line.startswith("{") and line.endswith("}")]
        kept = []
        for line in map(json.loads, complete):
            is_result = "loss" in line or "eval_loss" in line
            if is_result and line.get("current_steps", 0) <= first_step:
                kept.append(line)
        return kept

    def _rewrite(self, lines: list[dict]):
        """Replace the log in one move: a run killed here still has its old log."""
        partial = self.path.with_name(self.path.name + ".partial")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path)

    def advance(self, loss: float, lr: float, tokens_per_second: float):
        """Move the progress bar by one optimizer step."""
        text = f"loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def write(self, step: int, epoch: float, **values):
        """Append a line to trainer_log.jsonl."""
        elapsed = time.monotonic() - self.start_time
        steps_done = max(1, step - self.first_step)
        remaining = elapsed / steps_done * (self.total_steps - step)
        percentage = round(100 * step / self.total_steps, 2) if self.total_steps else 100.0
        line = {
            "current_steps": step,
            "total_steps": self.total_steps,
            **values,
            "epoch": epoch,
            "percentage": percentage,
            "elapsed_time": clock(elapsed),
            "remaining_time": clock(remaining),
        }
        if self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def train(self, step: int, epoch: float, loss: float, lr: float, grad_norm: float,
              tokens_per_second: float, tokens_seen: int, metrics: dict | None = None,
              peak_memory: int = 0):
        """Log a training step, on screen and in the files.

        metrics: further ones of the stage. peak_memory: most bytes used so far.
        """
        metrics = metrics or {}
        self.remember({
            "epoch": epoch,
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "loss": loss,
            **metrics,
            "num_input_tokens_seen": tokens_seen,
            "step": step,
        })
        columns = COLUMNS.format(
            step=step,
            epoch=f"{epoch:.2f}",
            loss=f"{loss:.4f}",
            lr=f"{lr:.3e}",
            grad=f"{grad_norm:.3f}",
            speed=f"{tokens_per_second:,.0f}",
        )
        shown = [f"  {word} {metrics[name]:.4f}" for name, word in SHORT_NAMES.items()
                 if name in metrics]
        tqdm.write(columns + "".join(shown))
        accuracy = {}
        for name in ("accuracy", "rewards/accuracies"):
            if name in metrics:
                accuracy["accuracy"] = metrics[name]
        self.write(step, epoch, loss=loss, **accuracy, lr=lr, grad_norm=grad_norm,
                   throughput=round(tokens_per_second, 2), total_tokens=tokens_seen,
                   peak_memory_gib=round(peak_memory / 2**30, 3))

    def eval(self, step: int, epoch: float, metrics: dict):
        """Log an evaluation; `metrics` holds eval_loss and others named eval_*."""
        self.remember({"epoch": epoch, **metrics, "step": step})
        figures = ("loss", "token_loss", "perplexity", *SHORT_NAMES)
        shown = [f"{name} {value:.4f}" for name, value in metrics.items()
                 if name.endswith(tuple(f"_{figure}" for figure in figures))]
        tqdm.write(f"{step:>7} {epoch:>7.2f}  " + ", ".join(shown))
        self.write(step, epoch, **{name: metrics[name] for name in eval_losses_in(metrics)})

    def remember(self, row: dict):
        """Add a row to log_history and send it to the dashboards."""
        self.history.append(row)
        log_row(self.trackers, row)

    def close(self):
        """Close the progress bar and the dashboards."""
        self.bar.close()
        close_all(self.trackers)


# ---- the contents of JSON files -----------------------------------------------------------------


def eval_metrics(sum_of_means: float, batches: int, total: float, tokens: int, rows: int,
                 seconds: float) -> dict:
    """The metrics of an evaluation, named as in LLaMA-Factory.

    eval_loss is the mean over batches of each batch's mean token loss; eval_token_loss is the mean
    over all tokens, and eval_perplexity its exponential.

    sum_of_means: the sum of the batches' mean losses. total: the sum of all token losses. Raises
    ValueError if no batch carries loss.
    """
    if not batches:
        raise ValueError("the evaluation rows carry no loss at all: nothing to evaluate "
                         "(cutoff_len too small?)")
    seconds = max(seconds, 1e-9)
    return {
        "eval_loss": sum_of_means / batches,
        "eval_token_loss": total / tokens,
        "eval_perplexity": math.exp(min(total / tokens, 700)),
        "eval_runtime": round(seconds, 4),
        "eval_samples_per_second": round(rows / seconds, 3),
        "eval_steps_per_second": round(batches / seconds, 3),
    }


def trainer_state(config: Config, log: RunLog, step: int, epoch: float, **more) -> dict:
    """The content of trainer_state.json, named as in LLaMA-Factory. more: what resuming needs."""
    return {
        "epoch": epoch,
        "global_step": step,
        "max_steps": log.total_steps,
        "logging_steps": config.logging_steps,
        "save_steps": config.save_steps,
        "eval_steps": config.eval_steps,
        "num_train_epochs": config.num_train_epochs,
        "train_batch_size": config.per_device_train_batch_size,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": log.history,
        **more,
    }


# ---- loss curves --------------------------------------------------------------------------------


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average, as in LLaMA-Factory's plots.

    Its weight grows with the number of points from 0 towards 0.9. A value that is not finite
    leaves a gap (nan) in the curve.
    """
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    average = None
    out = []
    for value in values:
        if not math.isfinite(value):
            out.append(math.nan)
            continue
        average = value if average is None else weight * average + (1 - weight) * value
        out.append(average)
    return out


def drawing(count: int, hint: str) -> tuple:
    """A figure and its `count` panels, one below the other.

    Without matplotlib it prints what to install, then `hint`, and returns (None, []).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, so no picture is drawn: pip install matplotlib, "
              f"then {hint}")
        return None, []
    figure = Figure(figsize=(8, 1 + 4 * count), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def draw_curve(axes, history: list, key: str, color: str, label: str = ""):
    """Draw one curve: the values faintly, and smoothed. label: the run's name among several."""
    points = [(row["step"], row[key]) for row in history if key in row]
    steps, values = zip(*points)
    marker = "o" if len(steps) == 1 else None
    if label:
        axes.plot(steps, values, color=color, alpha=0.3)
        axes.plot(steps, smooth(values), color=color, label=label, marker=marker)
    else:
        axes.plot(steps, values, color=color, alpha=0.4, label="original")
        axes.plot(steps, smooth(values), color=color, label="smoothed", marker=marker)
    axes.set(xlabel="step", ylabel=key)


def eval_losses_in(row: dict) -> list[str]:
    """The keys of a row's evaluation losses: eval_loss, or eval_NAME_loss of each dataset."""
    return [name for name in row if name.startswith("eval_") and name.endswith("_loss")
            and not name.endswith("_token_loss")]


def plotted_keys(history: list) -> list[str]:
    """The keys that get a picture: PLOTTED, and the losses of each evaluation dataset."""
    keys = dict.fromkeys(PLOTTED)
    for row in history:
        keys |= dict.fromkeys(eval_losses_in(row))
    return list(keys)


def is_logged(history: list, key: str) -> bool:
    """Whether any row of a log_history has this key."""
    return any(key in row for row in history)


def plot_losses(folder: Path | str, history: list) -> list[Path]:
    """Write training_loss.png and, for every other key that was logged, training_KEY.png.

    Returns the files written. Without matplotlib it prints a hint and writes none.
    """
    written = []
    for key in [key for key in plotted_keys(history) if is_logged(history, key)]:
        figure, panels = drawing(1, f"python -m runtime.report {folder}")
        if figure is None:
            return []
        axes = panels[0]
        draw_curve(axes, history, key, BLUE)
        axes.set_title(f"training {key} of {folder}")
        axes.grid(alpha=0.25)
        axes.legend()
        path = Path(folder) / f"training_{key.replace('/', '_')}.png"
        figure.savefig(path)
        written.append(path)
    return written


def sketch(values: list[float], width: int = 64, height: int = 6) -> str:
    """A curve in letters, for where matplotlib is missing; "" for less than two finite values.

    Each column is the mean of a part of the values. The lowest and the highest column are named.
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    columns = []
    for i in range(count):
        part = finite[i * len(finite) // count:(i + 1) * len(finite) // count]
        columns += [sum(part) / len(part)] * (width // count)
    low, high = min(columns), max(columns)
    lines = []
    for row in reversed(range(height)):
        name = {height - 1: f"{high:.4f}", 0: f"{low:.4f}"}.get(row, "")
        least = low + (high - low) * row / height
        bars = "".join("█" if value >= least else " " for value in columns)
        lines.append(f"{name:>9} |{bars}".rstrip())
    return "\n".join(lines)


def plot_runs(runs: dict[str, list], path: Path | str) -> Path | None:
    """Draw several runs into one picture, with a panel for each key of PLOTTED that was logged.

    runs: {name: log_history}. Returns None without matplotlib. Raises ValueError if nothing has
    been logged.
    """
    keys = [key for key in PLOTTED if any(is_logged(history, key) for history in runs.values())]
    if not keys:
        raise ValueError(f"nothing is logged yet in {', '.join(runs)}")
    figure, panels = drawing(len(keys), "the same command again")
    if figure is None:
        return None
    for axes, key in zip(panels, keys):
        colors = cycle(f"C{i}" for i in range(10))          # a run has one color in all panels
        for (name, history), color in zip(runs.items(), colors):
            if is_logged(history, key):
                draw_curve(axes, history, key, color, name)
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path)
    return Path(path)


def read_history(folder: Path | str) -> list[dict]:
    """log_history of a finished run or, of an unfinished one, the lines of trainer_log.jsonl.

    Raises FileNotFoundError for a folder that has neither file, ValueError for one whose file
    cannot be read.
    """
    state = Path(folder) / "trainer_state.json"
    log = Path(folder) / "trainer_log.jsonl"
    try:
        if state.is_file():
            return json.loads(state.read_text(encoding="utf-8"))["log_history"]
        if log.is_file():
            text = log.read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
            return [line | {"step": line["current_steps"]} for line in lines]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: its log cannot be read ({error})") from None
    raise FileNotFoundError(f"{folder} holds neither trainer_state.json nor trainer_log.jsonl: "
                            "is it a run's output_dir?")


def names_of_runs(folders: list[str]) -> list[str]:
    """The last part of each path or, if two of these are equal, the paths as given."""
    short = [Path(folder).resolve().name for folder in folders]
    if len(set(short)) == len(short):
        return short
    return [str(folder) for folder in folders]


def summary(runs: dict[str, list]) -> str:
    """A table of runs: number of steps, last smoothed loss, lowest eval_loss."""
    rows = []
    for name, history in runs.items():
        losses = [row["loss"] for row in history if "loss" in row]
        eval_losses = [row["eval_loss"] for row in history if "eval_loss" in row]
        steps = max((row["step"] for row in history), default=0)
        last = f"{smooth(losses)[-1]:.4f}" if losses else ""
        lowest = f"{min(eval_losses):.4f}" if eval_losses else ""
        rows.append([name, str(steps), last, lowest])
    return format_table(["run", "steps", "loss, smoothed", "lowest eval_loss"], rows)


# ---- the model card -----------------------------------------------------------------------------


def model_card(config: Config, metrics: dict, template: str, notes: Sequence[str] = (),
               license_lines: Sequence[str] = ()) -> str:
    """README.md of an output folder: base model, data, settings and results.

    notes: sentences on what loads it. license_lines: of the base's model card.
    """
    from checkpoint.files import hub_name       # imports torch, which a report does without

    is_adapter = config.finetuning_type in ADAPTERS
    data = "`, `".join(config.dataset or [])
    kind = {"lora": "LoRA adapter", "oft": "OFT adapter"}.get(config.finetuning_type, "model")
    base = hub_name(config.model_name_or_path)
    in_words = f"`{base}`" if base else ("a model in a local folder, "
                                         f"`{Path(config.model_name_or_path).name}`")
    head = [
        "---",
        *([f"base_model: {base}"] if base else []),
        *license_lines,
        "tags:",
        "- pocket-factory",
        f"- {config.finetuning_type}",
    ]
    if is_adapter:
        head.append("library_name: peft")
    head += [
        "---",
        "",
        f"# {Path(config.output_dir).name}",
        "",
        f"A {kind} for {in_words}, trained on `{data}` "
        f"(stage {config.stage}, chat format `{template}`).",
        "",
    ]
    for note in notes:
        head += [note, ""]
    others = tuple(f"{name}_" for name in ADAPTERS if name != config.finetuning_type)
    settings = {key: getattr(config, key) for key in CARD_KEYS if not key.startswith(others)}
    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    return "\n".join([
        *head,
        *markdown_table("setting", settings),
        "",
        *markdown_table("result", metrics),
        "",
        f"Made with {made_with}.",
        "",
    ])


def markdown_table(title: str, pairs: dict) -> list[str]:
    """The lines of a Markdown table with the columns `title` and value."""
    rows = [f"| {name} | {value} |" for name, value in pairs.items()]
    return [f"| {title} | value |", "|---|---|", *rows]


# ---- the command --------------------------------------------------------------------------------


def main(folders: list[str]):
    """Draw one run's pictures into its folder, or several runs into one picture."""
    if not folders or folders[0].startswith("-"):
        raise ValueError("usage: python -m runtime.report RUN ...   (output folders of train.py)")
    runs = dict(zip(names_of_runs(folders), map(read_history, folders)))
    print(summary(runs))
    if len(folders) == 1:
        pictures = plot_losses(folders[0], *runs.values())
    else:
        pictures = [plot_runs(runs, Path(folders[0]).parent / "compared_runs.png")]
    for picture in pictures:
        if picture:
            print(picture)


if __name__ == "__main__":
    run_script(main)
