"""Merge an adapter with this program and with LLaMA-Factory's export: wall time and peak memory.

    python bench/merge.py                         2.5 GB in bfloat16; installs the peer once
    python bench/merge.py --size small --times 5  0.3 GB
    python bench/merge.py --peer-python PATH      a python that has LLaMA-Factory
    python bench/merge.py --no-peer               this program alone

A third runner copies the base's files and waits for the disk: both programs write as much, so no
merge can be faster. Base and adapter (all linear layers, rank 16, with a random B) are made on
first use. At the end the merged tensors of both are compared bit for bit.

Requires: common.py (how a child is measured), cpu.py (the peer).
Next: ../merge.py.
Peer: LLaMA-Factory, arXiv:2403.13372.
"""
import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import BENCH, ROOT, SHARED, in_turn, medians, run_child, save, table, versions_of
from bench.cpu import peer_command

WORK = BENCH / ".work" / "merge"
SIZES = {       # a row of SHAPES in random_model.py, and changes of it
    "tiny": ("tiny", {}),
    "small": ("cpu", {}),
    "large": ("llama-3-8b", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    }),
}


def make(asked):
    """Write base and adapter; run in a process of its own, since this one must stay small."""
    import torch

    from bench.random_model import make_checkpoint, raw_config
    from checkpoint.adapters import save_adapter
    from lora import LoRAConfig, attach_lora, lora_layers
    shape, changes = SIZES[asked.size]
    base, settings = WORK / asked.size, LoRAConfig(16, 32, target_modules="all")
    model = make_checkpoint(base, raw_config(shape, "bfloat16", **changes), asked.tokenizer,
                            asked.seed)
    attach_lora(model, settings, asked.seed)
    for layer in lora_layers(model).values():
        generator = torch.Generator().manual_seed(asked.seed)
        layer.lora_B.weight.data.normal_(0, 0.02, generator=generator)
    adapter = WORK / f"{asked.size}-adapter"
    adapter.mkdir(exist_ok=True)
    save_adapter(model, adapter, settings, str(base))


def merger(name, command, env, asked):
    """A function that merges once and returns wall time and peak memory."""
    def merge():
        out, written = WORK / f"{asked.size}-{name}", WORK / f"{name}.yaml"
        shutil.rmtree(out, ignore_errors=True)
        written.write_text(f"model_name_or_path: {WORK / asked.size}\n"
                           f"adapter_name_or_path: {WORK / asked.size}-adapter\n"
                           f"template: llama3\nfinetuning_type: lora\nexport_dir: {out}\n"
                           "export_size: 5\nexport_device: cpu\n")
        os.sync()       # so that this run does not wait for what others have written
        child = run_child([*command, written],
                          {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | env, ROOT)
        return {"seconds": child.seconds, "peak_bytes": child.peak_bytes,
                "cpu_seconds": child.cpu_seconds}
    return merge


def copier(asked):
    """A function that copies the base's files to the disk and returns the time."""
    def copy():
        out = WORK / f"{asked.size}-copy"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        shutil.copytree(WORK / asked.size, out)
        for file in out.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        seconds = time.perf_counter() - start
        shutil.rmtree(out)
        return {"seconds": seconds}
    return copy


def same_tensors(asked) -> str:
    """A sentence on how many tensors of the two merged checkpoints are equal bit for bit."""
    from checkpoint.files import open_tensors, tensor_files
    files = [tensor_files(WORK / f"{asked.size}-{name}") for name in ("ours", "peer")]
    same, largest = 0, 0.0
    for name in files[0].keys() & files[1].keys():
        with open_tensors(files[0][name]) as a, open_tensors(files[1][name]) as b:
            mine, theirs = a.get_tensor(name), b.get_tensor(name)
        same += bool(mine.equal(theirs))
        largest = max(largest, float((mine.float() - theirs.float()).abs().max()))
    return (f"{same} of {len(files[0])} tensors are the same bits as the peer's; the largest "
            f"difference is {largest:.3g}")


def report(runs):
    """The table of goals."""
    found, rows = {name: medians(each) for name, each in runs.items()}, []
    for key, unit, names, goal, words in (("seconds", 1, ("ours", "peer"), 1 / 3, "≤ 1/3"),
                                          ("peak_bytes", 2**30, ("ours", "peer"), 1 / 5, "≤ 1/5"),
                                          ("seconds", 1, ("ours", "copy"), 1.3, "≤ 1.3")):
        if names[1] in found:
            pair = [found[name][key] / unit for name in names]
            what = "wall time, s" if key == "seconds" else "peak memory, GiB"
            met = "yes" if pair[0] <= goal * pair[1] else "no"
            rows.append([f"{what}, against {names[1]}", *(f"{value:.2f}" for value in pair),
                         f"{pair[0] / pair[1]:.2f}", words, met])
    print("\n" + table(["what", "ours", "other", "ours / other", "goal", "met"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="large", choices=SIZES)
    parser.add_argument("--times", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers/llama3",
                        help="a folder with its files")
    parser.add_argument("--peer-python", help="a python that has LLaMA-Factory")
    parser.add_argument("--peer-folder", help="where its environment is made (default bench/.peer)")
    parser.add_argument("--no-peer", action="store_true", help="measure this program alone")
    parser.add_argument("--tiny", action="store_true",
                        help="a model of two layers, one round, to try the benchmark itself")
    parser.add_argument("--results", type=Path, help="instead of bench/results")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.tiny:
        asked.size, asked.times = "tiny", 1
    if asked.make:
        return make(asked)
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / f"{asked.size}-adapter" / "adapter_model.safetensors").is_file():
        run_child([sys.executable, __file__, "--make", *sys.argv[1:]])
    programs = {"ours": merger("ours", [sys.executable, "merge.py", "--config"], {}, asked),
                "copy": copier(asked)}
    versions = {"ours": versions_of(sys.executable, "torch", "safetensors")}
    if not asked.no_peer:
        python, train, env = peer_command(asked)
        programs["peer"] = merger("peer", [*train[:-1], "export"], env, asked)
        versions["peer"] = versions_of(python, "torch", "transformers", "peft", "llamafactory")
    runs = in_turn(programs, asked.times)
    report(runs)
    same = "" if asked.no_peer else same_tensors(asked)
    print("\n" + same)
    base_bytes = sum(f.stat().st_size for f in (WORK / asked.size).glob("*.safetensors"))
    save("merge" if asked.size == "large" else f"merge-{asked.size}", runs, versions=versions,
         dtype="bfloat16", seed=asked.seed,
         settings={"size": asked.size, "base_bytes": base_bytes}, folder=asked.results,
         compared=same)
    for name in ("ours", "peer"):
        shutil.rmtree(WORK / f"{asked.size}-{name}", ignore_errors=True)


if __name__ == "__main__":
    main()
