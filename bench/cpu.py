"""LoRA SFT of a small model with this program and LLaMA-Factory, on a CPU: speed, memory, loss.

    python bench/cpu.py                             10 minutes; the first run installs the peer
    python bench/cpu.py --peer-python PATH          a python that has LLaMA-Factory 0.9.5
    python bench/cpu.py --bf16 --times 1            in bfloat16 (both programs), one round
    python bench/cpu.py --busy                      also beside a process that keeps one core busy
    python bench/cpu.py disable_gradient_checkpointing=true      another setting, for both

Both programs run in turn with the same yaml, the same random checkpoint (llama, hidden 512, ffn
1408, 8 layers, 8 heads on 4 key/value heads, vocabulary 128,256) and the same initial LoRA adapter
(rank 8, all linear layers). Each counts the tokens that it trains on, without padding; the
benchmark stops if the counts differ. A step ends when its line is in trainer_log.jsonl, which both
programs write; the steps after --warm-up are steady. Memory is that of the largest process or of
all together, whichever is more.

Requires: common.py (how a child is measured), random_model.py.
Next: docs/speed.md, scaling.py.
Peer: LLaMA-Factory, arXiv:2403.13372.
"""
import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import yaml

from bench.common import (BENCH, ROOT, SHARED, curves, from_root, in_turn, medians, peer_python,
                          run_child, save, table, training_figures, versions_of)

PEER = "llamafactory==0.9.5"
WORK = BENCH / ".work" / "cpu"
STUB = "__version__ = '0'\n"
GOALS = (   # figure, its name in the table, how it is printed, the goal for the ratio and its words
    ("tokens_per_second", "real tokens/s, steady", "{:,.0f}", 3, "≥ 3 ×"),
    ("median_step_tokens_per_second", "the same, of the median step", "{:,.0f}", 3, "≥ 3 ×"),
    ("first_step_seconds", "command to first optimizer step, s", "{:.2f}", 1 / 4, "≤ 1/4"),
    ("peak_bytes", "peak resident memory, GiB", "{:.2f}", 1 / 2, "≤ 1/2"),
    ("seconds", "wall time of the run, s", "{:.1f}", None, ""),
)


# ---- the runs ------------------------------------------------------------------------------------


def settings(asked, model: Path, data: Path) -> dict:
    """The yaml that both programs get, but for output_dir."""
    fixed = {
        "model_name_or_path": from_root(model),
        "adapter_name_or_path": from_root(f"{model}-adapter"), "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "template": "llama3", "dataset": "identity,alpaca_en_demo",
        "dataset_dir": from_root(data), "cutoff_len": 512, "overwrite_cache": True,
        "overwrite_output_dir": True, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
        "max_steps": asked.steps, "seed": 42, "use_cpu": True,
        "include_num_input_tokens_seen": "non_padding",
    }
    if asked.bf16:
        fixed["bf16"] = True
    for pair in asked.settings:
        key, _, value = pair.partition("=")
        fixed[key] = yaml.safe_load(value)
    return fixed


def make_model(asked) -> Path:
    """The random checkpoint and adapter that both start from; made once for each kind."""
    kind = "tiny" if asked.tiny else "cpu"
    folder = WORK / f"{kind}-{'bf16' if asked.bf16 else 'float32'}"
    if not Path(f"{folder}-adapter", "adapter_model.safetensors").is_file():
        run_child([sys.executable, BENCH / "random_model.py", folder, "--shape", kind,
                   "--tokenizer", asked.tokenizer, "--dtype",
                   "bfloat16" if asked.bf16 else "float32", "--adapter", 8])
    return folder


def runner(name: str, command: list, config: dict, asked, env: dict):
    """A function that trains once in a folder of its own and returns the figures of that run."""
    def train():
        folder = WORK / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        written = folder / "config.yaml"
        written.write_text(yaml.safe_dump(config | {"output_dir": from_root(folder / "out")}))
        offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                   "HF_HOME": str(folder / "cache")}
        child = run_child([*command, from_root(written)], offline | env, ROOT,
                          watch=folder / "out" / "trainer_log.jsonl")
        (folder / "printed.txt").write_text(child.text)
        return training_figures(child, asked.warm_up)

    return train


def beside_a_busy_process(train):
    """The function `train`, called while another process computes without end."""
    def busy():
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbor:
            try:
                return train()
            finally:
                neighbor.kill()

    return busy


def peer_command(asked) -> tuple[str, list, dict]:
    """(the peer's python, the command that trains with it, environment variables)."""
    python = peer_python(PEER, asked.peer_python, asked.peer_folder)
    # pip's newest torch and transformers are newer than its release knows
    env = {"DISABLE_VERSION_CHECK": "1"}
    if run_child([python, "-c", "import torchaudio"], must_work=False).code:
        # transformers imports it for audio models; it is missing, or built for another torch
        (WORK / "stub" / "torchaudio").mkdir(parents=True, exist_ok=True)
        (WORK / "stub" / "torchaudio" / "__init__.py").write_text(STUB)
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(WORK / "stub"), os.environ.get("PYTHONPATH")])
        )
        print("note: the peer's torchaudio cannot be imported; an empty module takes its place")
    return python, [python, "-m", "llamafactory.cli", "train"], env


# ---- results -------------------------------------------------------------------------------------


def compare(summary: dict) -> str:
    """The table of goals: ours, the peer's, ours over the peer's."""
    rows = []
    for key, what, form, goal, words in GOALS:
        pair = [summary[name][key] / (2**30 if key == "peak_bytes" else 1)
                for name in ("ours", "peer")]
        found = pair[0] / pair[1]
        met = ("" if goal is None else "yes" if (found >= goal if goal > 1 else found <= goal)
               else "no")
        rows.append([what, *map(form.format, pair), f"{found:.2f}", words, met])
    return table(["what", "ours", "LLaMA-Factory", "ours / theirs", "goal", "met"], rows)


def compare_busy(summary: dict) -> str:
    """Rates beside a busy process, as a share of those of the quiet machine."""
    rows = []
    for name in ("ours", "peer"):
        if name in summary:
            quiet, busy = (summary[key]["tokens_per_second"] for key in (name, f"{name}, busy"))
            met = "yes" if busy >= 0.45 * quiet else "no"
            goal = ["≥ 0.45", met] if name == "ours" else ["", ""]
            rows.append([name, f"{quiet:,.0f}", f"{busy:,.0f}", f"{busy / quiet:.2f}", *goal])
    return table(["real tokens/s", "quiet", "busy", "busy / quiet", "goal", "met"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="key=value",
                        help="changes of the yaml, for both programs")
    parser.add_argument("--times", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--steps", type=int, default=20,
                        help="optimizer steps of a run (default 20)")
    parser.add_argument("--warm-up", type=int, default=4,
                        help="steps that are not counted as steady (default 4)")
    parser.add_argument("--bf16", action="store_true",
                        help="16 bits, with a checkpoint that is stored so")
    parser.add_argument("--busy", action="store_true",
                        help="also beside a process that keeps one core busy")
    parser.add_argument("--tiny", action="store_true",
                        help="a model of 2 layers, to try the benchmark itself")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers/llama3",
                        help="a folder with its files")
    parser.add_argument("--data", type=Path, default=SHARED / "data",
                        help="a folder with dataset_info.json")
    parser.add_argument("--peer-python", help="a python that has LLaMA-Factory")
    parser.add_argument("--peer-folder", help="where its environment is made (default bench/.peer)")
    parser.add_argument("--no-peer", action="store_true", help="measure this program alone")
    parser.add_argument("--results", type=Path, help="instead of bench/results")
    asked = parser.parse_args()
    config = settings(asked, make_model(asked), asked.data)
    names = ("torch", "transformers", "peft", "llamafactory", "tokenizers")
    programs = {"ours": runner("ours", [sys.executable, "train.py", "--config"], config, asked, {})}
    versions = {"ours": versions_of(sys.executable, *names)}
    if not asked.no_peer:
        python, command, env = peer_command(asked)
        programs["peer"] = runner("peer", command, config, asked, env)
        versions["peer"] = versions_of(python, *names)
    if asked.busy:
        programs |= {f"{name}, busy": beside_a_busy_process(train)
                     for name, train in list(programs.items())}
    runs = in_turn(programs, asked.times)
    summary = {name: medians(found) for name, found in runs.items()}
    if not asked.no_peer:
        print("", curves(runs["ours"][0], runs["peer"][0]), sep="\n")
        print("", compare(summary), sep="\n")
    if asked.busy:
        print("", compare_busy(summary), sep="\n")
    save("cpu-bf16" if asked.bf16 else "cpu", runs, versions=versions,
         dtype="bfloat16" if asked.bf16 else "float32", seed=config["seed"], settings=config,
         folder=asked.results)


if __name__ == "__main__":
    main()
