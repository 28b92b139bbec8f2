"""What a run tells: the start page, one line per logged step, the JSON files people know, the picture of the loss.

    python report.py saves/run                  draws training_loss.png and its like of a run again (needs matplotlib)
    python report.py saves/one saves/two …      several runs in one picture, compared_runs.png in the current folder

Read before: train.py, which calls it. Read after: trackers.py (dashboards). The files and their fields are those of
LLaMA-Factory: trainer_log.jsonl, trainer_state.json, train_results.json, eval_results.json, all_results.json,
training_loss.png.
"""
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path

from tqdm import tqdm

from trackers import close_all, tell

# what is drawn, where a run has it: file names as people know them, with _ for /
DRAWN = ("loss", "eval_loss", "rewards/accuracies", "rewards/chosen", "eval_accuracy")
SHOWN = {"accuracy": "accuracy", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
COLUMNS = "{step:>7} {epoch:>7} {loss:>9} {lr:>10} {grad:>9} {speed:>9}"


def versions() -> dict:
    """Versions of what the run stands on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "safetensors", "tokenizers", "flash_attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def print_pairs(title: str, pairs: dict):
    """A titled block of aligned `name  value` lines."""
    print(f"\n{title}")
    width = max((len(str(name)) for name in pairs), default=0)
    for name, value in pairs.items():
        print(f"  {name:<{width}}  {value}")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Lines of aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  " + "  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width)
                                       in enumerate(zip(row, widths))) for row in [head, *rows])


def print_example(tokenizer, input_ids, labels, title="first example"):
    """One sample three ways: ids, text, and the part of the text that carries loss. Cut in the middle when long."""
    def short(text, limit=1200):
        return text if len(text) <= limit else f"{text[:limit // 2]} … {len(text) - limit} more … {text[-limit // 2:]}"

    ids, learned = [int(t) for t in input_ids], [int(t) for t in labels if t != -100]
    print(f"\n{title}: {len(ids)} tokens, {len(learned)} carry loss")
    print(f"  ids   {short(str(ids))}")
    print(f"  text  {short(tokenizer.decode(ids))!r}")
    print(f"  loss  {short(tokenizer.decode(learned))!r}", flush=True)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class RunLog:
    """The log of one training run: bar, columns, trainer_log.jsonl, the history that trainer_state.json keeps, and
    dashboards (trackers.py)."""

    def __init__(self, folder, total_steps: int, first_step: int = 0, history: list | None = None, disabled: bool = False,
                 writes: bool = True, trackers: list = ()):
        self.path, self.writes = Path(folder) / "trainer_log.jsonl", writes        # one of several ranks writes
        self.trackers = list(trackers)
        self.total_steps, self.first_step, self.history = total_steps, first_step, list(history or [])
        self.start = time.time()
        kept = [line for line in self._lines() if line.get("current_steps", 0) <= first_step     # the closing line, which
                and ("loss" in line or "eval_loss" in line)] if first_step else []               # has neither, comes again
        if writes:
            partial = self.path.with_name(self.path.name + ".partial")         # killed here, the run still has its log
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(partial, self.path)
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True,
                        disable=disabled or None)          # None: no bar where nobody watches (a file, a pipe)
        tqdm.write(COLUMNS.format(step="step", epoch="epoch", loss="loss", lr="lr", grad="grad norm", speed="tokens/s"))

    def _lines(self):
        """The lines already written. A run that was killed, or met a full disk, may have left the last one half done."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def advance(self, loss: float, lr: float, tokens_per_second: float):
        """Move the bar by one optimizer step."""
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def write(self, step: int, epoch: float, **values):
        """One line of trainer_log.jsonl."""
        spent = time.time() - self.start
        done = max(1, step - self.first_step)
        line = {"current_steps": step, "total_steps": self.total_steps, **values, "epoch": epoch,
                "percentage": round(100 * step / self.total_steps, 2) if self.total_steps else 100.0,
                "elapsed_time": clock(spent), "remaining_time": clock(spent / done * (self.total_steps - step))}
        if self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def train(self, step, epoch, loss, lr, grad_norm, tokens_per_second, tokens_seen, more: dict = {}):
        """A logged training step, on the screen and in the files. more: what the stage has to tell besides."""
        self.remember({"epoch": epoch, "grad_norm": grad_norm, "learning_rate": lr, "loss": loss, **more,
                             "num_input_tokens_seen": tokens_seen, "step": step})
        told = [f"{word} {more[name]:.4f}" for name, word in SHOWN.items() if name in more]
        tqdm.write(COLUMNS.format(step=step, epoch=f"{epoch:.2f}", loss=f"{loss:.4f}", lr=f"{lr:.3e}",
                                  grad=f"{grad_norm:.3f}", speed=f"{tokens_per_second:,.0f}") + "".join(
            f"  {words}" for words in told))
        accuracy = {"accuracy": more[name] for name in ("accuracy", "rewards/accuracies") if name in more}
        self.write(step, epoch, loss=loss, **accuracy, lr=lr, throughput=round(tokens_per_second, 2),
                   total_tokens=tokens_seen)

    def eval(self, step, epoch, metrics: dict):
        """An evaluation; `metrics` holds eval_loss and its companions."""
        self.remember({"epoch": epoch, **metrics, "step": step})
        tqdm.write(f"{step:>7} {epoch:>7.2f}  " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()
                                                            if k in ("eval_loss", "eval_token_loss", "eval_perplexity")
                                                            or k.removeprefix("eval_") in SHOWN))
        self.write(step, epoch, eval_loss=metrics["eval_loss"])

    def remember(self, row: dict):
        """A row of log_history, which the dashboards get, too."""
        self.history.append(row)
        tell(self.trackers, row)

    def close(self):
        self.bar.close()
        close_all(self.trackers)


def eval_metrics(sum_of_means: float, batches: int, total: float, tokens: int, rows: int, seconds: float) -> dict:
    """An evaluation under LLaMA-Factory's names. eval_loss is the mean over batches, all alike, of each batch's mean
    over tokens; eval_token_loss is that over all tokens alike, and eval_perplexity its exponential.

    sum_of_means: of the batches' means; total: of the losses of all tokens. Raises ValueError where nothing was learnt.
    """
    if not batches:
        raise ValueError("the evaluation rows carry no loss at all: nothing to evaluate (cutoff_len too small?)")
    seconds = max(seconds, 1e-9)
    return {"eval_loss": sum_of_means / batches, "eval_token_loss": total / tokens,
            "eval_perplexity": math.exp(min(total / tokens, 700)), "eval_runtime": round(seconds, 4),
            "eval_samples_per_second": round(rows / seconds, 3), "eval_steps_per_second": round(batches / seconds, 3)}


def trainer_state(config, log: RunLog, step: int, epoch: float, **more) -> dict:
    """The content of trainer_state.json under the names of LLaMA-Factory's, plus what resuming needs (`more`)."""
    return {"epoch": epoch, "global_step": step, "max_steps": log.total_steps, "logging_steps": config.logging_steps,
            "save_steps": config.save_steps, "eval_steps": config.eval_steps,
            "num_train_epochs": config.num_train_epochs, "train_batch_size": config.per_device_train_batch_size,
            "is_local_process_zero": True, "is_world_process_zero": True, "log_history": log.history, **more}


# ---- the picture ------------------------------------------------------------------------------------------------


def smooth(values: list) -> list:
    """Exponential moving average, the weight growing with the number of points from 0 towards 0.9. Where a value is not
    finite the curve has a gap."""
    weight, out, last = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5), [], None
    for value in values:
        if math.isfinite(value):
            last = value if last is None else weight * last + (1 - weight) * value
        out.append(last if math.isfinite(value) else math.nan)
    return out


def drawing(count: int, hint: str):
    """(figure, its `count` panels under each other), or (None, []) and a sentence where there is no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed, so no picture is drawn: pip install matplotlib, then {hint}")
        return None, []
    figure = Figure(figsize=(8, 1 + 4 * count), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def draw(axes, history: list, key: str, color: str, label: str = ""):
    """One curve: the values faint, and smoothed. label: of a run among others."""
    steps, values = zip(*[(row["step"], row[key]) for row in history if key in row])
    axes.plot(steps, values, color=color, alpha=0.3 if label else 0.4, label=None if label else "original")
    axes.plot(steps, smooth(values), color=color, label=label or "smoothed", marker="o" if len(steps) == 1 else None)
    axes.set(xlabel="step", ylabel=key)


def plot_losses(folder, history: list, keys=DRAWN) -> list[Path]:
    """Write training_loss.png and, of what else of `keys` was logged, training_eval_loss.png and so on.

    Returns the pictures written; without matplotlib one sentence is printed and nothing is written.
    """
    written = []
    for key in [key for key in keys if any(key in row for row in history)]:
        figure, panels = drawing(1, f"python report.py {folder}")
        if figure is None:
            return []
        draw(panels[0], history, key, "#1f77b4")
        panels[0].set_title(f"training {key} of {folder}")
        panels[0].grid(alpha=0.25)
        panels[0].legend()
        written.append(Path(folder) / f"training_{key.replace('/', '_')}.png")
        figure.savefig(written[-1])
    return written


def plot_runs(runs: dict, path) -> Path | None:
    """Several runs in one picture: a panel for each of DRAWN that one of them has. runs: {name: log_history}.

    Raises ValueError where there is nothing to draw. None where there is no matplotlib.
    """
    keys = [key for key in DRAWN if any(key in row for history in runs.values() for row in history)]
    if not keys:
        raise ValueError(f"nothing is logged yet in {', '.join(runs)}")
    figure, panels = drawing(len(keys), "the same command again")
    for axes, key in zip(panels, keys):
        for (name, history), color in zip(runs.items(), cycle(f"C{i}" for i in range(10))):
            if any(key in row for row in history):
                draw(axes, history, key, color, name)
        axes.grid(alpha=0.25)
        axes.legend()
    if figure is None:
        return None
    figure.savefig(path)
    return Path(path)


def read_history(folder) -> list:
    """log_history of a run, or, of one that is not finished, what trainer_log.jsonl has.

    Raises FileNotFoundError for a folder that has neither, ValueError for one that cannot be read.
    """
    state, log = Path(folder) / "trainer_state.json", Path(folder) / "trainer_log.jsonl"
    try:
        if state.is_file():
            return json.loads(state.read_text(encoding="utf-8"))["log_history"]
        if log.is_file():
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            return [line | {"step": line["current_steps"]} for line in lines]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: its log cannot be read ({error})") from None
    raise FileNotFoundError(f"{folder} holds neither trainer_state.json nor trainer_log.jsonl: is it a run's "
                            "output_dir?")


def names_of_runs(folders: list[str]) -> list[str]:
    """Their last parts, or, where two have the same, all of their paths."""
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def summary(runs: dict) -> str:
    """A line for each run: its steps, where its smoothed loss ended, its lowest eval_loss."""
    rows = []
    for name, history in runs.items():
        losses, evals = ([row[key] for row in history if key in row] for key in ("loss", "eval_loss"))
        rows.append([name, str(max((row["step"] for row in history), default=0)),
                     f"{smooth(losses)[-1]:.4f}" if losses else "", f"{min(evals):.4f}" if evals else ""])
    return table(["run", "steps", "loss, smoothed", "lowest eval_loss"], rows)


def model_card(config, metrics: dict, template: str) -> str:
    """README.md of an output folder: what was trained on what, and with which settings."""
    kind = "LoRA adapter" if config.finetuning_type == "lora" else "model"
    head = ["---", f"base_model: {config.model_name_or_path}", "tags:", "- pocket-factory", f"- {config.finetuning_type}",
            *(["library_name: peft"] if config.finetuning_type == "lora" else []), "---", "",
            f"# {Path(config.output_dir).name}", "",
            f"A {kind} for `{config.model_name_or_path}`, trained on `{config.dataset}` (stage {config.stage}, chat format "
            f"`{template}`).", "", "| setting | value |", "|---|---|"]
    keys = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
            "lr_scheduler_type", "warmup_ratio", "warmup_steps", "cutoff_len", "seed", "lora_rank", "lora_alpha",
            "lora_dropout", "lora_target")
    rows = [f"| {key} | {getattr(config, key)} |" for key in keys
            if config.finetuning_type == "lora" or not key.startswith("lora_")]
    results = ["", "| result | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in metrics.items())]
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    return "\n".join([*head, *rows, *results, "", f"Made with {made}.", ""])


def main(folders):
    """Draw one run's pictures into its folder, or several runs into one."""
    if not folders or folders[0].startswith("-"):
        raise ValueError("usage: python report.py RUN …   (output folders of train.py)")
    runs = dict(zip(names_of_runs(folders), map(read_history, folders)))
    print(summary(runs))
    pictures = plot_losses(folders[0], *runs.values()) if len(folders) == 1 else [plot_runs(runs, "compared_runs.png")]
    for picture in filter(None, pictures):
        print(picture)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
