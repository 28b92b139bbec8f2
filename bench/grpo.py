"""Stage grpo here and in TRL, whose answers transformers' generate samples: samples per second.

    python bench/grpo.py            on a CPU: models/tiny, 8 prompts x 8 answers, LoRA, float32

Both learn the sums of data/tiny_sums.jsonl from the same reward function, data/rewards.py:
arithmetic, with the same batch, lengths, temperature 1, loss (dapo, no divergence) and learning
rate. TRL runs in --peer-python, or in an environment that is made once. A sample is an answer that
was sampled, scored and trained on; the figure is answers of a step over the median seconds of a
step, after the first WARM steps. Answers get as long as each model makes them: their mean length
and the mean reward are in the table, too.

Requires: common.py (how a child is measured).
Next: ../methods/grpo.py, docs/rewards.md.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.common import in_turn, medians, peer_python, run_child, save, table, versions_of

PEER = "trl==1.16.0 peft transformers datasets torch"
WARM = 3
LEARNING_RATE = 1.5e-3


# ---- the two programs, each in a process of its own ----------------------------------------------


def ours(asked, folder) -> tuple[list, list]:
    """(times at which steps ended, rows of the log) of train.py."""
    import train
    ends, train_step = [], train.train_step

    def timed(*args):
        found = train_step(*args)
        ends.append(time.perf_counter())
        return found

    train.train_step = timed
    settings = {
        "per_device_train_batch_size": asked.prompts,
        "num_generations": asked.answers,
        "max_new_tokens": asked.tokens,
        "learning_rate": LEARNING_RATE,
        "max_steps": asked.steps,
        "seed": asked.seed,
        "val_size": 0,
        "eval_strategy": "no",
        "eval_on_start": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": folder,
    }
    train.main(["configs/tiny_grpo.yaml", *(f"{key}={value}" for key, value in settings.items())])
    log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return ends, [{"reward": row["reward"], "length": row["length"]}
                  for row in log if "reward" in row]


def peer(asked, folder) -> tuple[list, list]:
    """The same for TRL's GRPOTrainer, with a LoRA by peft."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    sys.path.insert(0, "data")
    from rewards import arithmetic
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **more):
            ends.append(time.perf_counter())

    def reward(prompts, completions, messages, **more):
        return [arithmetic(prompt[-1]["content"], answer[-1]["content"], {"messages": row})
                for prompt, answer, row in zip(prompts, completions, messages)]

    lines = Path("data/tiny_sums.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained("models/tiny", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained("models/tiny"),
        train_dataset=Dataset.from_list([{"prompt": row[:-1], "messages": row} for row in rows]),
        reward_funcs=reward,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=folder, per_device_train_batch_size=asked.prompts * asked.answers,
            num_generations=asked.answers, max_completion_length=asked.tokens, temperature=1.0,
            top_p=1.0, top_k=0, beta=0.0, loss_type="dapo", learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine", warmup_steps=0.1, max_steps=asked.steps, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, disable_tqdm=True, seed=asked.seed),
    )
    trainer.train()
    return ends, [{"reward": row["reward"], "length": row["completions/mean_length"]}
                  for row in trainer.state.log_history if "reward" in row]


def as_child(asked):
    """Run one program in this process and print its figures as a line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        ends, log = {"ours": ours, "peer": peer}[asked.child](asked, folder)
    steps = [after - before for before, after in zip(ends[WARM - 1:], ends[WARM:])]
    seconds = statistics.median(steps)
    figures = {
        "samples_per_second": asked.prompts * asked.answers / seconds,
        "step_seconds": seconds,
        "length": statistics.mean(row["length"] for row in log),
        "reward": statistics.mean(row["reward"] for row in log),
    }
    print("RESULT", json.dumps(figures))


def runner(name, python, asked):
    """A function that runs one program once and returns its figures."""
    command = [python, Path(__file__).resolve(), "--child", name, *sys.argv[1:]]

    def run():
        child = run_child(command, cwd=ROOT)
        found = json.loads(next(line for _, line in child.lines if line.startswith("RESULT "))[7:])
        return found | {"seconds": child.seconds, "peak_bytes": child.peak_bytes}
    return run


# ---- the command ---------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step")
    parser.add_argument("--answers", type=int, default=8, help="answers to each")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer, at most")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--times", type=int, default=3, help="rounds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peer-python", help=f"a python that has {PEER}")
    parser.add_argument("--no-peer", action="store_true", help="measure this program alone")
    parser.add_argument("--results", type=Path, help="folder for the JSON (default bench/results)")
    parser.add_argument("--child", choices=("ours", "peer"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return as_child(asked)
    versions = {"ours": versions_of(sys.executable, "torch")}
    programs = {"ours": runner("ours", sys.executable, asked)}
    if not asked.no_peer:
        python = peer_python(PEER, asked.peer_python)
        programs["peer"] = runner("peer", python, asked)
        versions["peer"] = versions_of(python, "torch", "trl", "transformers", "peft")
    runs = in_turn(programs, asked.times)
    report(runs)
    save("grpo", runs, versions=versions, dtype="float32", seed=asked.seed,
         settings={key: str(value) if isinstance(value, Path) else value
                   for key, value in vars(asked).items()}, folder=asked.results)


def report(runs: dict):
    """Print the medians of both programs."""
    summary = {name: medians(found) for name, found in runs.items()}
    rows = []
    for key, goal in (("samples_per_second", "2 x the peer"), ("step_seconds", ""),
                      ("length", ""), ("reward", "")):
        mine, theirs = summary["ours"][key], summary.get("peer", {}).get(key)
        rows.append([key, f"{mine:.3g}", f"{theirs:.3g}" if theirs else "",
                     f"{mine / theirs:.2f}" if theirs else "", goal])
    print()
    print(table(["figure", "ours", "TRL", "ratio", "goal"], rows))


if __name__ == "__main__":
    main()
