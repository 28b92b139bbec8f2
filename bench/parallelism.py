"""Draw what each process holds and sends in a step, for each kind of parallelism, from real runs.

    python bench/parallelism.py                 two CPU processes for each of LAYOUTS; two minutes
    python bench/parallelism.py --only dp,tp

Each run is three steps of train.py on models/tiny with the same rows in a step, so their losses are
the same; experts need another model, a random one. Written are docs/pictures/<layout>.png, and the
table of docs/parallelism.md is printed: bytes held and sent are exact, and the milliseconds of the
pictures are those of one step on this machine.

Requires: parallelism_worker.py, which records a process; matplotlib.
Next: docs/parallelism.md; runtime/layout_advice.py, which plans the same bytes for other models.
Sources: arXiv:1910.02054 (sec. 3) for what is held.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import BENCH, ROOT, run_child, save, table, versions_of

WORK = BENCH / ".work" / "parallelism"
PICTURES = ROOT / "docs" / "pictures"
WORLD = 2
MICRO_BATCHES = 4               # of a step, over all ranks
MIB = 2**20
BASE = dict(use_cpu=True, ask="", plot_loss=False, join_micro_batches=False, even_batches=False,
            per_device_train_batch_size=2, overwrite_output_dir=True)
# {name: (title, settings)}
LAYOUTS = {
    "dp": ("Data parallelism: each process has the whole model and half of the rows", {}),
    "fsdp": ("Sharded weights: each process stores half of every weight and fetches the other "
             "half for each block", {"fsdp": "full_shard"}),
    "tp": ("Tensor parallelism: each process has half of every matrix, and all rows",
           {"tensor_parallel_size": 2}),
    "pp": ("Pipeline parallelism: each process has half of the layers, and all rows",
           {"pipeline_parallel_size": 2}),
    "cp": ("Context parallelism: each process has the whole model and half of every row",
           {"context_parallel_size": 2}),
    "ep": ("Expert parallelism: each process has half of the experts, all else, and half of the "
           "rows", {"expert_parallel_size": 2, "model_name_or_path": WORK / "mixture",
                    "lora_target": "all,experts"}),
}
SHARED_ROWS = ("tensor", "pipeline", "context")     # whose processes train on the same rows
HELD = {"frozen weights": "#9aa5b1", "trained weights": "#2b6cb0", "gradients": "#dd6b20",
        "optimizer state": "#805ad5", "peak of a step": "#e2e8f0"}
COMPUTING = {"forward": "#68b2e3", "backward": "#f0a45d", "optimizer": "#805ad5"}
SENDING = {"all_reduce": "#c53030", "all_gather": "#2f855a", "reduce_scatter": "#b7791f",
           "all_to_all": "#6b46c1", "send": "#c53030", "recv": "#2f855a"}


# ---- the runs -----------------------------------------------------------------------------------


def run_layout(name: str, settings: dict) -> list[dict]:
    """The records of the processes of a run; see parallelism_worker.py."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shared = any(key.startswith(SHARED_ROWS) for key in settings)
    accumulation = MICRO_BATCHES if shared else MICRO_BATCHES // WORLD
    settings = BASE | settings | dict(output_dir=folder / "run",
                                      gradient_accumulation_steps=accumulation)
    run_child([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               WORLD, BENCH / "parallelism_worker.py", folder,
               "--config", ROOT / "configs/tiny_lora_sft.yaml",
               *(f"{key}={value}" for key, value in settings.items())],
              env={"OMP_NUM_THREADS": "1"}, cwd=ROOT)
    return [json.loads((folder / f"process-{n}.json").read_text()) for n in range(WORLD)]


def make_mixture(folder: Path):
    """A random model with 8 experts in each of 4 layers, and the tokenizer of models/tiny."""
    if not (folder / "config.json").is_file():
        run_child([sys.executable, BENCH / "random_model.py", folder, "--shape", "small-moe",
                   "--tokenizer", ROOT / "models/tiny"])


def sending(span: dict) -> str:
    """The collective of a span as a key of SENDING, or ""."""
    return next((name for name in SENDING if span["kind"].removeprefix("i").startswith(name)), "")


def figures_of(process: dict) -> dict:
    """What the table says of a process."""
    spans = [span for span in process["spans"] if span["label"] != "counts"]
    sent = [span for span in spans if sending(span)]
    return {"loss": round(process["loss"], 4),
            **{f"{what} MiB": round(n / MIB, 2) for what, n in process["held"].items()},
            "peak of a step MiB": round(process["peak"] / MIB, 2),
            "collectives": len(sent),
            "handed in MiB": round(sum(span["bytes"] for span in sent) / MIB, 2)}


# ---- the pictures -------------------------------------------------------------------------------


def draw(file: Path, title: str, processes: list[dict]):
    """Write a picture: above what is held, below what is computed and sent when."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{file.name} is not drawn: pip install matplotlib")
        return
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=[1, 1.7])
    figure.suptitle(title, fontsize=12)
    draw_held(above, processes)
    draw_step(below, processes)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file)


def draw_held(axes, processes: list[dict]):
    """Stacked bars of MiB, a bar for each process."""
    for number, process in enumerate(processes):
        left = 0
        for what, color in HELD.items():
            size = (process["peak"] if what == "peak of a step" else process["held"][what]) / MIB
            axes.barh(number, size, left=left, color=color, edgecolor="white", height=0.6,
                      label=what if number == 0 else None)
            left += size
    axes.set(xlabel="MiB", yticks=range(len(processes)), ylim=(len(processes) - 0.5, -0.5),
             yticklabels=[f"process {number}" for number in range(len(processes))])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False,
                title="held", title_fontsize=8, alignment="left")


def draw_step(axes, processes: list[dict]):
    """Two lanes for each process: what it computes, and what it sends or waits for."""
    start = min(span["start"] for process in processes for span in process["spans"])
    total = 1000 * max(span["end"] - start for process in processes for span in process["spans"])
    labels = {}
    for number, process in enumerate(processes):
        for span in process["spans"]:
            kind = sending(span)
            part = span["label"].rpartition(" ")[2]
            color = SENDING[kind] if kind else COMPUTING[span["kind"]]
            counts = span["label"] == "counts"
            left, width = 1000 * (span["start"] - start), 1000 * (span["end"] - span["start"])
            lane = 2 * number + (0.75 if kind else 0)
            bar = axes.barh(lane, max(width, total / 400), left=left, align="edge",
                            height=0.5 if kind else 0.7, color="#a0aec0" if counts else color,
                            edgecolor="white", linewidth=0.3)
            labels.setdefault("counts of tokens, losses" if counts else kind or span["kind"], bar)
            if not kind and span["label"] != "optimizer" and width > total / 200:
                axes.text(left + width / 2, lane + 0.35, {"head": "h"}.get(part, part),
                          ha="center", va="center", fontsize=6, clip_on=True)
    axes.set(xlabel="milliseconds of a step; numbers: decoder blocks, h: head and loss",
             yticks=[2 * number + 0.65 for number in range(len(processes))],
             yticklabels=[f"process {number}" for number in range(len(processes))])
    axes.invert_yaxis()
    axes.legend(labels.values(), labels.keys(), loc="upper left", bbox_to_anchor=(1, 1),
                fontsize=8, frameon=False, title="computed, and below it sent", title_fontsize=8,
                alignment="left")


# ---- main ---------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of {','.join(LAYOUTS)}")
    parser.add_argument("--pictures", default=PICTURES, help="their folder (docs/pictures)")
    parser.add_argument("--results", help="folder of the JSON file (default bench/results)")
    asked = parser.parse_args()
    names = asked.only.split(",") if asked.only else list(LAYOUTS)
    make_mixture(WORK / "mixture")
    runs = {}
    for name in names:
        title, settings = LAYOUTS[name]
        processes = run_layout(name, settings)
        draw(Path(asked.pictures, f"{name}.png"), title, processes)
        runs[name] = [figures_of(process) for process in processes]
    rows = [[name, number, *figures.values()]
            for name, found in runs.items() for number, figures in enumerate(found)]
    header = [name.removesuffix(" MiB") for name in runs[names[0]][0]]
    print("sizes in MiB\n\n" + table(["layout", "process", *header], rows))
    save("parallelism", runs, versions=versions_of(sys.executable, "torch"), dtype="float32",
         seed=42, settings=BASE | {"world": WORLD}, folder=asked.results)


if __name__ == "__main__":
    main()
