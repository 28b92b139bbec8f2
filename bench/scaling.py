"""Time and memory of training against length, rows, rank, layers and processes.

    python bench/scaling.py                     all five, on a CPU; a quarter of an hour
    python bench/scaling.py --only length,rows  some of length, rows, lora_rank, layers, processes
    python bench/scaling.py --length-to 65536 --rows-to 1000000       beyond the defaults
    python bench/scaling.py --quick             three sizes of each

Each line is a run of train.py in a process of its own, with a small random model (llama, hidden
256, 4 layers) and the tokenizer of models/tiny. Memory is given in total, and above that of a dry
run, which loads python, torch and the plan alone. Where the work doubles from line to line, the
columns with × show the growth of time and memory: 2 is linear, 1 is flat. Attention grows with the
square of the length; "by arithmetic" is the growth of the FLOPs.

Requires: common.py (how a child is measured).
Next: docs/speed.md.
Sources: FLOPs as runtime/throughput.py counts them.
"""
import argparse
import itertools
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import yaml

from bench.common import (BENCH, ROOT, from_root, long_rows, medians, run_child, save, source_rows,
                          table, training_figures, versions_of, write_rows)

WORK = BENCH / ".work" / "scaling"
SHAPE = {"hidden": 256, "ffn": 704, "heads": 8, "head_dim": 32, "kv_heads": 4, "layers": 4,
         "vocabulary": 2048}
# what grows: sizes, each twice the one before; the expected growth of time and memory
AXES = {
    "length": ([512, 1024, 2048, 4096, 8192, 16384, 32768, 65536],
               "tokens of one row; linear, and attention's square"),
    "rows": ([1000, 2000, 4000, 8000, 16000, 32000, 64000, 125000, 250000, 500000, 1000000],
             "rows of the dataset; time to the first step linear, memory flat"),
    "lora_rank": ([8, 16, 32, 64, 128],
                  "rank; nearly flat in time, linear in the adapter's memory"),
    "layers": ([1, 2, 4, 8, 16], "decoder layers; linear"),
    "processes": (
        [1, 2, 4],
        "ranks (gloo, a core each), each with the same rows; flat as far as there are cores",
    ),
}


# ---- the runs ------------------------------------------------------------------------------------


def sizes(axis: str, asked) -> list[int]:
    """The sizes of an axis that are run."""
    limit = {"length": asked.length_to, "rows": asked.rows_to}.get(axis, 10**9)
    found = [size for size in AXES[axis][0] if size <= limit]
    return found[:3] if asked.quick else found


def rows_for(axis: str, size: int) -> Path:
    """A folder with the dataset `rows` of a run; written once."""
    folder = WORK / f"rows-{axis}-{size}" if axis in ("length", "rows") else WORK / "rows-512"
    if not (folder / "dataset_info.json").is_file():
        alpaca = ({**row, "instruction": f"{number}. {row['instruction']}"} for number, row in
                  zip(range(size), itertools.cycle(source_rows())))
        write_rows(folder, "rows",
                   alpaca if axis == "rows" else long_rows(16, size if axis == "length" else 512))
    return folder


def model_for(layers: int, rank: int) -> Path:
    """A random checkpoint with an adapter; made once."""
    folder = WORK / f"model-{layers}-{rank}"
    if not Path(f"{folder}-adapter", "adapter_model.safetensors").is_file():
        run_child([sys.executable, BENCH / "random_model.py", folder, "--shape", "small",
                   "--tokenizer", ROOT / "models" / "tiny", "--layers", layers, "--adapter", rank])
    return folder


def settings(axis: str, size: int, asked) -> dict:
    """The yaml of a run, but for output_dir."""
    model = model_for(size if axis == "layers" else SHAPE["layers"],
                      size if axis == "lora_rank" else 8)
    return {"model_name_or_path": from_root(model),
            "adapter_name_or_path": from_root(f"{model}-adapter"), "stage": "sft",
            "finetuning_type": "lora", "dataset": "rows", "template": "chatml",
            "dataset_dir": from_root(rows_for(axis, size)),
            "cutoff_len": size if axis == "length" else 512, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2 if axis != "length" else 1,
            "max_steps": 3 if axis == "rows" else asked.steps, "logging_steps": 1,
            "save_strategy": "no", "seed": 42, "use_cpu": True, "overwrite_output_dir": True,
            "overwrite_cache": True}


def measure(axis: str, size: int, asked) -> dict:
    """The figures of a run; for rows also of a second start, which finds the token cache."""
    folder = WORK / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    written, out = folder / "config.yaml", folder / "out"
    config = settings(axis, size, asked) | {"output_dir": from_root(out)}
    world = size if axis == "processes" else 1
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", world] if world > 1 else []
    env = {"OMP_NUM_THREADS": "1"} if axis == "processes" else {}

    def train(**changes):
        written.write_text(yaml.safe_dump(config | changes))
        child = run_child([sys.executable, *launch, ROOT / "train.py", "--config", written], env,
                          ROOT, watch=out / "trainer_log.jsonl")
        if changes.get("dry_run"):
            return child
        return training_figures(child, 1 if axis == "rows" else 2)

    idle = train(dry_run=True).peak_bytes if axis != "rows" else 0
    found = {"size": size, **train(), "idle_bytes": idle}
    if axis == "rows":
        found["second_start_seconds"] = train(overwrite_cache=False)["first_step_seconds"]
    tokens_per_step = sum(found["tokens"]) / len(found["tokens"])
    return found | {"step_seconds": tokens_per_step / found["tokens_per_second"]}


# ---- results -------------------------------------------------------------------------------------


def flops(length: int, layers: int, rank: int) -> float:
    """FLOPs of a step on one row: 4 a token and frozen weight, 6 an adapter weight, attention."""
    D, F, A, K, V = (SHAPE[name] for name in ("hidden", "ffn", "heads", "kv_heads", "vocabulary"))
    A, K = A * SHAPE["head_dim"], K * SHAPE["head_dim"]
    matrices = ((D, A), (D, K), (D, K), (A, D), (D, F), (D, F), (F, D))
    frozen = layers * sum(a * b for a, b in matrices) + V * D
    trained = layers * rank * sum(a + b for a, b in matrices)
    return (4 * frozen + 6 * trained) * length + 12 * A * layers * length * (length + 1) / 2


def growth(values: list) -> list[str]:
    """How many times each value is the one before it."""
    return [""] + [f"{b / a:.2f}" if a > 0 else "" for a, b in zip(values, values[1:])]


def axis_table(axis: str, runs: list) -> str:
    """The table of one axis."""
    size, first, peak = ([run[key] for run in runs]
                         for key in ("size", "first_step_seconds", "peak_bytes"))
    mib = [f"{value / 2**20:,.0f}" for value in peak]
    if axis == "rows":
        again = [run["second_start_seconds"] for run in runs]
        columns = [[f"{n:,}" for n in size], [f"{s:.2f}" for s in first], growth(first),
                   [f"{s:.2f}" for s in again], growth(again), mib, growth(peak)]
        return table(["rows", "first step, s", "×", "of a second start, s", "×", "peak MiB", "×"],
                     list(zip(*columns)))
    step = [run["step_seconds"] for run in runs]
    own = [run["peak_bytes"] - run["idle_bytes"] for run in runs]
    usual = {"length": 512, "layers": SHAPE["layers"], "lora_rank": 8}
    work = [flops(*(usual | {axis: n} if axis in usual else usual).values()) for n in size]
    columns = [[f"{n:,}" for n in size], [f"{s:.3f}" for s in step], growth(step), growth(work),
               [f"{run['tokens_per_second']:,.0f}" for run in runs], mib,
               [f"{n / 2**20:,.0f}" for n in own], growth(own)]
    return table([axis, "step, s", "×", "by arithmetic ×", "tokens/s", "peak MiB",
                  "above a dry run", "×"],
                 list(zip(*columns)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help=f"of {', '.join(AXES)}, with commas between")
    parser.add_argument("--times", type=int, default=3,
                        help="rounds; the median counts (default 3)")
    parser.add_argument("--steps", type=int, default=5,
                        help="optimizer steps of a run, two of them to warm up")
    parser.add_argument("--length-to", type=int, default=8192,
                        help="longest row in tokens (default 8,192)")
    parser.add_argument("--rows-to", type=int, default=64000, help="most rows (default 64,000)")
    parser.add_argument("--quick", action="store_true", help="three sizes of each, one round")
    parser.add_argument("--results", type=Path, help="instead of bench/results")
    asked = parser.parse_args()
    axes = asked.only.split(",") if asked.only else list(AXES)
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise SystemExit(
            f"--only {', '.join(unknown)}: there is no such table. The tables: {', '.join(AXES)}"
        )
    runs = {}
    for axis in axes:
        found = {size: [] for size in sizes(axis, asked)}
        # all sizes in turn, as other work may interfere
        for _ in range(1 if asked.quick else asked.times):
            for size in found:
                found[size].append(measure(axis, size, asked))
                print(f"  {axis} {size:,}: {found[size][-1]['seconds']:.1f} s", flush=True)
        runs[axis] = [medians(same) | {"raw": same} for same in found.values()]
        print(f"\n{AXES[axis][1]}\n\n{axis_table(axis, runs[axis])}\n", flush=True)
    save("scaling",
         {axis: [run for size in found for run in size["raw"]] for axis, found in runs.items()},
         versions={"ours": versions_of(sys.executable, "torch")}, dtype="float32", seed=42,
         settings={"shape": SHAPE, "steps": asked.steps},
         tables={
             axis: [{key: value for key, value in size.items() if key != "raw"} for size in found]
             for axis, found in runs.items()
         }, folder=asked.results)
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
