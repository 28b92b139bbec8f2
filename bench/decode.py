"""Greedy decoding with this program and with transformers' generate: tokens per second.

    python bench/decode.py          on a CPU: hidden 512, 8 layers, vocabulary 128,256, float32
    python bench/decode.py --dtype bfloat16 --shape qwen2.5-0.5b
    python bench/decode.py --device cuda --shape llama-3-8b --dtype bfloat16

The peer runs in --peer-python (default: this python) if transformers is installed there. On a CPU
both load the same random checkpoint, made on first use; on a GPU each creates random weights on the
device. Both read the same random prompt and decode greedily. The time of each token after the first
is measured, and the figure is that of their median, so a step that other work interrupts does not
count.

Requires: common.py (how a child is measured), random_model.py.
Next: ../fast/decode.py, ../generate.py.
Sources: single tokens are timed as in gpt-fast's README, which has figures of other GPUs.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import BENCH, SHARED, in_turn, medians, run_child, save, table, versions_of

WORK = BENCH / ".work" / "decode"


# ---- the two programs, each in a process of its own ----------------------------------------------


def prompt_of(asked, vocab_size: int) -> list[int]:
    """The same random ids for both, none of them special."""
    import random
    return random.Random(asked.seed).choices(range(3, min(vocab_size, 100_000)), k=asked.prompt)


def ours(asked):
    """(time of each token, token ids, lines of fast/decode.py on its choices)."""
    from fast.attention_picker import pick_kernel
    import torch

    from bench.random_model import random_model, raw_config
    from checkpoint.files import DTYPES
    from checkpoint.load import load_model
    from fast.decode import pick_step, prepare
    from generate import generate
    from model import attention_needs
    if asked.device == "cpu":
        model = load_model(asked.model)
    else:
        model = random_model(raw_config(asked.shape, asked.dtype), DTYPES[asked.dtype],
                             asked.device, asked.seed)
    lines = prepare(model.requires_grad_(False).eval())
    choice = pick_kernel("auto", device=torch.device(asked.device), dtype=DTYPES[asked.dtype],
                         training=False, **attention_needs(model.config))
    model.kernel = choice.kernel
    cache, step, line = pick_step(model)
    prompt, times, tokens = prompt_of(asked, model.config.vocab_size), [time.perf_counter()], []
    for token in generate(model, prompt, cache, max_new_tokens=asked.tokens, step=step):
        times.append(time.perf_counter())
        tokens.append(token)
    return times, tokens, [*lines, f"kernel    {choice.kernel}", line]


def peer(asked):
    """The same for transformers with its defaults: a growing cache, SDPA."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    dtype = getattr(torch, asked.dtype)
    if asked.device == "cpu":
        model = AutoModelForCausalLM.from_pretrained(asked.model, torch_dtype=dtype)
    else:
        from bench.random_model import raw_config
        raw = raw_config(asked.shape, asked.dtype)
        config = AutoConfig.for_model(**raw)
        torch.set_default_dtype(dtype)
        with torch.device(asked.device):
            model = AutoModelForCausalLM.from_config(config)
    times, tokens = [], []

    class Streamer:
        def put(self, ids):                             # first the prompt, then token by token
            times.append(time.perf_counter())
            tokens.extend(ids.flatten().tolist())

        def end(self):
            pass

    ids = torch.tensor([prompt_of(asked, model.config.vocab_size)], device=asked.device)
    model.eval().generation_config = GenerationConfig(
        max_new_tokens=asked.tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=Streamer())
    return times, tokens[ids.shape[1]:], [
        f"transformers {transformers.__version__}, {model.config._attn_implementation}"
    ]


def as_child(asked):
    """Run one program in this process and print its figures as a line of JSON."""
    times, tokens, lines = {"ours": ours, "peer": peer}[asked.child](asked)
    steps = [after - before for before, after in zip(times[1:], times[2:])]
    figures = {"tokens_per_second": 1 / statistics.median(steps),
               "mean_tokens_per_second": len(steps) / sum(steps),
               "prompt_seconds": times[1] - times[0], "tokens": tokens, "lines": lines}
    print("RESULT", json.dumps(figures))


def runner(name, python, asked):
    """A function that runs one program once and returns its figures."""
    command = [python, __file__, "--child", name, *sys.argv[1:]]
    if asked.model:
        command += ["--model", str(asked.model)]

    def run():
        child = run_child(command)
        found = json.loads(next(line for _, line in child.lines if line.startswith("RESULT "))[7:])
        return found | {"seconds": child.seconds, "peak_bytes": child.peak_bytes}
    return run


# ---- the command ---------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="cpu", help="a row of SHAPES in random_model.py")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--times", type=int, default=3, help="rounds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path,
                        help="a checkpoint to use in place of a random one (CPU)")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers/llama3",
                        help="for the random checkpoint")
    parser.add_argument("--peer-python", default=sys.executable,
                        help="a python that has transformers")
    parser.add_argument("--no-peer", action="store_true", help="measure this program alone")
    parser.add_argument("--quick", action="store_true", help="one round of 16 tokens")
    parser.add_argument("--tiny", action="store_true",
                        help="the same with a model of two small layers, for tests")
    parser.add_argument("--results", type=Path, help="folder for the JSON (default bench/results)")
    parser.add_argument("--child", choices=("ours", "peer"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.tiny:
        asked.shape = "tiny"
    if asked.quick or asked.tiny:
        asked.times, asked.tokens, asked.prompt = 1, 16, 16
    if asked.child:
        return as_child(asked)
    if asked.device == "cpu" and not asked.model:
        asked.model = checkpoint_for(asked)
    versions = {"ours": versions_of(sys.executable, "torch", "safetensors")}
    programs = {"ours": runner("ours", sys.executable, asked)}
    theirs = {} if asked.no_peer else versions_of(asked.peer_python, "torch", "transformers")
    if "transformers" in theirs:
        programs["peer"], versions["peer"] = runner("peer", asked.peer_python, asked), theirs
    else:
        print("without the peer: "
              + ("--no-peer" if asked.no_peer else f"{asked.peer_python} has no transformers"))
    runs = in_turn(programs, asked.times)
    report(runs, asked)
    suffix = "" if (asked.device, asked.shape) == ("cpu", "cpu") else f"-{asked.shape}"
    save(f"decode{suffix}-{asked.dtype}", runs, versions=versions, dtype=asked.dtype,
         seed=asked.seed, gpu=gpu_of(asked),
         settings={key: str(value) if isinstance(value, Path) else value
                   for key, value in vars(asked).items()}, folder=asked.results)


def checkpoint_for(asked) -> Path:
    """The random checkpoint of a shape and dtype; made on first use, in a process of its own."""
    folder = WORK / f"{asked.shape}-{asked.dtype}"
    if not (folder / "config.json").is_file():
        run_child([sys.executable, BENCH / "random_model.py", folder, "--shape", asked.shape,
                   "--dtype", asked.dtype, "--tokenizer", asked.tokenizer, "--seed",
                   str(asked.seed)])
    return folder


def gpu_of(asked) -> str:
    if asked.device == "cpu":
        return ""
    import torch
    return torch.cuda.get_device_name()


def report(runs, asked):
    """Print the table, the choices of each program and the number of equal tokens."""
    goal = {"cpu": "2 x the peer", "cuda": "230 for llama-3-8b on an H200"}[asked.device]
    summary, rows = {name: medians(found) for name, found in runs.items()}, []
    for key, words in (("tokens_per_second", goal), ("mean_tokens_per_second", ""),
                       ("prompt_seconds", "")):
        mine, theirs = summary["ours"][key], summary.get("peer", {}).get(key)
        ratio = f"{mine / theirs:.2f}" if theirs else ""
        rows.append([key, f"{mine:.3g}", f"{theirs:.3g}" if theirs else "", ratio, words])
    print()
    print(table(["figure", "ours", "transformers", "ratio", "goal"], rows))
    for name, found in runs.items():
        print(f"\n{name}:", *found[-1]["lines"], sep="\n  ")
    if "peer" in runs and asked.device == "cpu":
        pairs = list(zip(runs["ours"][0]["tokens"], runs["peer"][0]["tokens"]))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        print(f"\nthe first {same} of {len(pairs)} tokens are the same")


if __name__ == "__main__":
    main()
