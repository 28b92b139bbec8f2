"""LoRA SFT in the shapes of Llama-3-8B, Qwen2.5-7B and 0.5B on one GPU, and with transformers.

    python bench/gpu.py --quick                 the main cases, in less than 10 minutes on an H200
    python bench/gpu.py                         all cases, three rounds
    python bench/gpu.py --only 8b-16k,8b-peer   some of CASES
    python bench/gpu.py --device cpu --tiny     tries the benchmark with a tiny model, in a minute

Nothing is downloaded: random weights are drawn on the device and kept in memory (/dev/shm, or
--work). The rows are real text: alpaca_en_demo and identity of ../shared/data with the model's own
tokenizer, or without them data/ and the tokenizer of models/tiny. A case is a run of train.py with
a yaml in a process of its own; a peer's is a run of peer_hf.py with the same yaml, checkpoint,
adapter and rows. At the end bench/decode.py is run, too.

Tokens are counted without padding; the steps after --warm-up are steady. The share of the matrix
rate is model FLOPs (runtime/throughput.py: 4 for each frozen weight and token, attention within the
mask, nothing for recomputation) over the rate of large bfloat16 matmuls on this device, measured
after the runs.

Requires: cpu.py, random_model.py.
Next: peer_hf.py, runtime/throughput.py, fast/decode.py.
Sources: the goals and published figures that README compares with; the shapes' config.json.
"""
import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import yaml

from bench.common import (BENCH, ROOT, SHARED, curves, from_root, in_turn, long_rows, medians,
                          run_child, save, table, training_figures, versions_of, write_rows)
from config import KEYS

# folder of the tokenizer, template
TEXT = {"llama": ("llama3", "llama3"), "qwen2": ("qwen2.5", "qwen")}
ROW = 2048                      # tokens of a packed row
ROOM = 40 * 10**9               # bytes for the three checkpoints
CHECKPOINTED = {"disable_gradient_checkpointing": False}
PACKED = {"packing": True, "cutoff_len": ROW, "gradient_accumulation_steps": 1}
PADDED = ({"cutoff_len": ROW, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
          | CHECKPOINTED)


def packed(tokens: int) -> dict:
    """Settings of a micro-batch of `tokens` tokens, in rows of ROW."""
    return PACKED | {"per_device_train_batch_size": max(1, tokens // ROW)}


def without_recomputing(tokens: int) -> dict:
    return packed(tokens) | {"disable_gradient_checkpointing": True}


# name: (who, shape, settings, goal in real tokens/s or None, in --quick); who: ours, or arguments
# of peer_hf.py
CASES = {
    "8b-16k": ("ours", "llama-3-8b", packed(16384), 17000, True),
    "8b-peer": (["--kernels", "none"], "llama-3-8b", without_recomputing(8192), None, True),
    "8b-peer-padded": (["--kernels", "none"], "llama-3-8b", PADDED, None, True),
    "0.5b-32k": ("ours", "qwen2.5-0.5b", packed(32768), 140000, True),
    "8b-2k-least-memory": ("ours", "llama-3-8b", packed(2048) | CHECKPOINTED, None, True),
    "8b-fp8-16k": ("ours", "llama-3-8b", packed(16384) | {"base_precision": "fp8"}, 24000, True),
    "8b-4bit-16k": ("ours", "llama-3-8b", packed(16384) | {"quantization_bit": 4}, None, True),
    "8b-4bit-2k-least-memory": ("ours", "llama-3-8b",
                                packed(2048) | CHECKPOINTED | {"quantization_bit": 4}, None, True),
    "8b-4bit-8k": ("ours", "llama-3-8b", packed(8192) | {"quantization_bit": 4}, None, False),
    "7b-16k": ("ours", "qwen2.5-7b", packed(16384), 18000, False),
    "8b-8k": ("ours", "llama-3-8b", packed(8192), None, False),
    "8b-32k": ("ours", "llama-3-8b", packed(32768), 17000, False),
    "8b-peer-16k-checkpointed": (["--kernels", "none"], "llama-3-8b", packed(16384) | CHECKPOINTED,
                                 None, False),
    "8b-ours-padded-yaml": ("ours", "llama-3-8b", PADDED, None, False),
    "8b-liger": (["--kernels", "liger"], "llama-3-8b", without_recomputing(8192), None, False),
    "8b-unsloth": (["--kernels", "unsloth"], "llama-3-8b", packed(8192) | CHECKPOINTED, None,
                   False),
    "8b-64k-row": ("ours", "llama-3-8b",
                   {"cutoff_len": 65536, "per_device_train_batch_size": 1,
                    "gradient_accumulation_steps": 1, "dataset": "long"}, None, False),
    "0.5b-peer": (["--kernels", "none"], "qwen2.5-0.5b", without_recomputing(8192), None, False),
}
# the same rows in the same steps
SIDE_BY_SIDE = (("8b-8k", "8b-peer"), ("8b-16k", "8b-peer-16k-checkpointed"))
AGAINST = (("8b-16k", "8b-peer", 2), ("8b-16k", "8b-peer-padded", 4),
           ("0.5b-32k", "0.5b-peer", None), ("8b-4bit-16k", "8b-16k", 0.85),
           ("8b-4bit-8k", "8b-8k", 0.85))


# ---- the runs ------------------------------------------------------------------------------------


def text_of(kind: str) -> dict:
    """Settings of rows, template and tokenizer, from the shared folder or this repository."""
    folder, template = TEXT[kind]
    if ((SHARED / "data" / "alpaca_en_demo.json").is_file()
        and (SHARED / "tokenizers" / folder).is_dir()):
        return {"tokenizer": SHARED / "tokenizers" / folder, "template": template,
                "dataset_dir": SHARED / "data", "dataset": "identity,alpaca_en_demo"}
    return {"tokenizer": ROOT / "models" / "tiny", "template": "chatml",
            "dataset_dir": ROOT / "data", "dataset": "identity,tiny_review"}


def make_model(shape: str, tokenizer, asked) -> Path:
    """The random bfloat16 checkpoint of a shape with an adapter of rank 16; made once."""
    folder = asked.work / shape
    if not Path(f"{folder}-adapter", "adapter_model.safetensors").is_file():
        run_child([sys.executable, BENCH / "random_model.py", folder, "--shape", shape,
                   "--tokenizer", tokenizer, "--dtype", "bfloat16", "--adapter", 16, "--device",
                   asked.device])
    return folder


def settings(name: str, asked) -> dict:
    """The yaml of a case without output_dir; makes its checkpoint and rows."""
    _, shape, changes, _, _ = CASES[name]
    text = text_of("llama" if shape.startswith("llama") else "qwen2")
    if asked.tiny:
        shape, changes = "tiny", changes | {"cutoff_len": changes["cutoff_len"] // 16}
    model = make_model(shape, text.pop("tokenizer"), asked)
    if changes.get("dataset") == "long":
        write_rows(asked.work / "long", "long", long_rows(4, changes["cutoff_len"]))
        text["dataset_dir"] = asked.work / "long"
    fixed = {"model_name_or_path": model, "adapter_name_or_path": f"{model}-adapter",
             "stage": "sft", "do_train": True, "finetuning_type": "lora", "bf16": True,
             "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-4,
             "lr_scheduler_type": "constant", "max_steps": asked.steps, "seed": 42,
             "overwrite_output_dir": True, "use_cpu": asked.device == "cpu"} | text | changes
    is_path = {key: isinstance(value, Path) or key == "adapter_name_or_path"
               for key, value in fixed.items()}
    return {key: from_root(value) if is_path[key] else value for key, value in fixed.items()}


def runner(name: str, asked):
    """A function that runs a case once and returns its figures, or {"failed": the last line}."""
    who = CASES[name][0]
    command = [ROOT / "train.py", "--config"] if who == "ours" else [BENCH / "peer_hf.py", *who]

    def train():
        folder = asked.work / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        written, out = folder / "config.yaml", folder / "out"
        written.write_text(yaml.safe_dump(settings(name, asked) | {"output_dir": from_root(out)}))
        child = run_child([sys.executable, *command, from_root(written)], cwd=ROOT, must_work=False,
                          limit=asked.limit, env={"HF_HUB_OFFLINE": "1"},
                          watch=out / "trainer_log.jsonl")
        if child.code:
            return {"failed": (child.text.splitlines() or [f"ended with {child.code}"])[-1][:300]}
        results = {}
        for file in out.glob("*_results.json"):
            results |= json.loads(file.read_text())
        return training_figures(child, asked.warm_up) | {
            key: results[key] for key in ("peak_memory_gib", "attention") if key in results}

    return train


def absent(name: str) -> str:
    """Why a case cannot be run here, or nothing."""
    who, _, changes, _, _ = CASES[name]
    if unknown := sorted(set(changes) - set(KEYS)):
        return f"train.py has no {', '.join(unknown)}"
    needed = ["transformers", "peft"] if who != "ours" else []
    if who != "ours" and who[1] != "none":
        needed += {"liger": ["liger_kernel"], "unsloth": ["unsloth"]}[who[1]]
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


# ---- results -------------------------------------------------------------------------------------


def facts(names: list, asked) -> dict:
    """The device's name and matrix rate, and FLOPs per token of each case.

    A child finds them, so that this program neither imports torch nor uses GPU memory.
    """
    code = ("import json, sys; from bench.gpu import find_facts; "
            "print(json.dumps(find_facts(*sys.argv[1:])))")
    files = [from_root(asked.work / "runs" / name / "config.yaml") for name in names]
    found = json.loads(
        run_child([sys.executable, "-c", code, asked.device, *files], cwd=ROOT).lines[-1][1]
    )
    return found | {"flops": dict(zip(names, found["flops"]))}


def find_facts(device: str, *config_files: str) -> dict:
    """The figures of `facts`, in a process that imports torch."""
    import torch

    from runtime.throughput import matrix_rate
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return {"gpu": name,
            "matrix_rate": matrix_rate(torch.device(device), torch.bfloat16,
                                       seconds=3 if name else 0.3),
            "flops": [flops_per_token(file) for file in config_files]}


def flops_per_token(config_file: str) -> float:
    """Model FLOPs per token by runtime/throughput.py, the mean over the rows of a yaml."""
    import torch

    from bench.peer_hf import rows_of
    from checkpoint.adapter_config import read_adapter_config
    from runtime.load_config import load_config
    from families import model_config, read_config_json
    from lora import attach_lora
    from model import CausalLM
    from runtime.throughput import matmul_parameters, training_flops
    config = load_config(["--config", config_file], "train")
    with torch.device("meta"):
        model = CausalLM(model_config(read_config_json(config.model_name_or_path)))
    attach_lora(model, read_adapter_config(config.adapter_name_or_path[0])[0])
    lengths = [n for example in rows_of(config) for n in example.lengths]
    return training_flops(model.config, *matmul_parameters(model), lengths) / sum(lengths)


def results_table(summary: dict, runs: dict, left_out: dict) -> str:
    """The table: a line for each case, including those that failed or were left out."""
    rows = []
    for name in [*runs, *left_out]:
        goal = CASES[name][3]
        mark = f"≥ {goal:,}" if goal else ""
        if name not in summary:
            rows.append([name, "-", "-", "-", "-", mark,
                         left_out.get(name) or runs[name][0]["failed"]])
            continue
        found = summary[name]
        rows.append([name, f"{found['tokens_per_second']:,.0f}",
                     f"{found['share_of_matrix_rate']:.1%}", f"{found['peak_memory_gib']:.2f}",
                     f"{found['first_step_seconds']:.1f}", mark,
                     runs[name][0].get("attention", "")])
    return table(["case", "real tokens/s", "of the matrix rate", "peak GiB", "first step, s",
                  "goal", "note"], rows)


def compared(summary: dict) -> str:
    """Ratios of the pairs of AGAINST where both ran."""
    rows = [[ours, peer,
             f"{summary[ours]['tokens_per_second'] / summary[peer]['tokens_per_second']:.2f}",
             f"≥ {goal}" if goal else ""]
            for ours, peer, goal in AGAINST if ours in summary and peer in summary]
    if not rows:
        return "nothing to compare with was measured"
    return table(["case", "against", "ratio of tokens/s", "goal"], rows)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the main cases, one round")
    parser.add_argument("--only", help="names of cases, with commas between")
    parser.add_argument("--times", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--steps", type=int, default=16,
                        help="optimizer steps of a run (default 16)")
    parser.add_argument("--warm-up", type=int, default=6,
                        help="steps that are not counted as steady (default 6)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and rows of 128 tokens")
    parser.add_argument("--limit", type=float, default=900,
                        help="seconds that one run may take (default 900)")
    parser.add_argument("--no-peer", action="store_true", help="measure this program alone")
    parser.add_argument("--work", type=Path,
                        help="where checkpoints are written (default: in memory)")
    parser.add_argument("--results", type=Path, help="instead of bench/results")
    asked = parser.parse_args(argv)
    memory = Path("/dev/shm")
    roomy = not asked.tiny and memory.is_dir() and shutil.disk_usage(memory).free > ROOM
    usual = memory / "pocket-factory-bench" if roomy else BENCH / ".work" / "gpu"
    asked.work = asked.work or usual
    return asked


def chosen(asked) -> list[str]:
    """The names of the cases to run. Raises SystemExit for a name that is none."""
    usual = [name for name, case in CASES.items() if case[4] or not asked.quick]
    names = asked.only.split(",") if asked.only else usual
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(
            f"--only {', '.join(unknown)}: there is no such case. The cases: {', '.join(CASES)}"
        )
    return [name for name in names if CASES[name][0] == "ours" or not asked.no_peer]


def main():
    asked = parse_arguments()
    names = chosen(asked)
    left_out = {name: why for name in names if (why := absent(name))}
    try:
        runs = in_turn({name: runner(name, asked) for name in names if name not in left_out},
                       1 if asked.quick else asked.times)
        worked = {name: good for name, found in runs.items()
                  if (good := [run for run in found if "failed" not in run])}
        known = facts(list(worked), asked)
    finally:
        shutil.rmtree(asked.work, ignore_errors=True)       # it may be in memory
    for name, good in worked.items():
        for run in good:
            run["share_of_matrix_rate"] = (
                run["tokens_per_second"] * known["flops"][name] / known["matrix_rate"]
            )
    summary = {name: medians(good) for name, good in worked.items()}
    print(f"\nmatrix rate {known['matrix_rate'] / 1e12:.4g} TFLOP/s (bfloat16)")
    print("", results_table(summary, runs, left_out), compared(summary), sep="\n\n")
    for ours, peer in SIDE_BY_SIDE:
        if ours in summary and peer in summary:
            print("", f"{ours} and {peer}:", curves(worked[ours][0], worked[peer][0]), sep="\n")
    packages = ("torch", "transformers", "peft", "flash_attn", "liger_kernel", "unsloth", "triton")
    save("gpu", runs, versions={"both": versions_of(sys.executable, *packages)}, dtype="bfloat16",
         seed=42, gpu=known["gpu"], left_out=left_out, matrix_rate=known["matrix_rate"],
         flops_per_token=known["flops"],
         settings={"steps": asked.steps, "warm_up": asked.warm_up,
                   "cases": {name: CASES[name][2] for name in names}}, folder=asked.results)
    if not asked.only and not asked.tiny:
        command = [BENCH / "decode.py", "--device", asked.device, "--shape", "llama-3-8b"]
        if asked.no_peer:
            command.append("--no-peer")
        if asked.results:
            command += ["--results", asked.results]
        child = run_child([sys.executable, *command], cwd=ROOT, must_work=False)
        print("", "decoding:", child.text, sep="\n")


if __name__ == "__main__":
    main()
