"""GPTQ of a 2.5 GB model with this program and with GPTQModel: peak memory, time, and the parts.

    python bench/gptq_memory.py --peer-python PATH      a python that has gptqmodel, torch 2.14
    python bench/gptq_memory.py --no-peer               this program alone
    python bench/gptq_memory.py --tiny --no-peer        a model of two layers, to try the benchmark

Both quantize a random model in bfloat16 (a Llama of hidden size 2048, 16 layers) to 4 bits in
groups of 128, calibrated on the same 128 rows of 512 tokens, on the CPU. --layers 4 takes a
quarter of the time; of this program's memory it is the same, since it holds one block at a time.

Requires: common.py (how a child is measured), merge.py (the shape).
Next: ../exporting/gptq_export.py.
Peer: GPTQModel.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import BENCH, ROOT, SHARED, in_turn, run_child, save, table, versions_of
from bench.merge import SIZES

WORK = BENCH / ".work" / "gptq_memory"
ENV = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
       "GPTQMODEL_CPU_WORKERS": "2"}        # version 7.7 does not start on two cores without it


def make(asked):
    """Write the model; in a process of its own, since this one must stay small."""
    from bench.random_model import make_checkpoint, raw_config

    shape, changes = SIZES["tiny" if asked.tiny else "large"]
    if asked.layers:
        changes = {**changes, "num_hidden_layers": asked.layers}
    make_checkpoint(WORK / "base", raw_config(shape, "bfloat16", **changes), asked.tokenizer,
                    asked.seed)


def write_texts(asked, path: Path):
    """Rows of text that have more tokens than a row of calibration takes."""
    rows = json.loads((SHARED / "data/alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}\n\n" for row in rows]
    each = max(1, asked.length // 25)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(2 * asked.samples):
            start = number * each % len(texts)
            row = "".join((texts + texts)[start:start + each])
            file.write(json.dumps({"text": row}) + "\n")


def quantizer(name: str, command: list, asked):
    """A function that quantizes once and returns wall time, CPU time and peak memory."""
    def quantize():
        out = WORK / name
        shutil.rmtree(out, ignore_errors=True)
        child = run_child([*command, out], ENV, ROOT, limit=4 * 3600)
        (WORK / f"{name}.log").write_text(child.text, encoding="utf-8")
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        return {"seconds": child.seconds, "cpu_seconds": child.cpu_seconds,
                "peak_bytes": child.peak_bytes, "written_bytes": written}
    return quantize


def ours(asked) -> list:
    """The command of this program, without the output folder."""
    return [sys.executable, "-c",
            "import sys, merge; merge.main([*sys.argv[1:-1], f'export_dir={sys.argv[-1]}'])",
            f"model_name_or_path={WORK / 'base'}", "export_quantization_bit=4",
            f"export_quantization_dataset={WORK / 'texts.jsonl'}",
            f"export_quantization_nsamples={asked.samples}",
            f"export_quantization_maxlen={asked.length}"]


def peer(asked, out: str):
    """What the peer's process runs: the same with GPTQModel."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(WORK / "base/tokenizer.json"))
    lines = (WORK / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer.encode(json.loads(line)["text"]).ids[:asked.length] for line in lines]
    rows = [row for row in ids if len(row) == asked.length][:asked.samples]
    model = GPTQModel.load(str(WORK / "base"), QuantizeConfig(bits=4, group_size=128,
                                                              desc_act=False), device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows],
                   batch_size=1)
    model.save(out)


def memory_parts(asked) -> list:
    """Rows (part, GiB) of what this program must hold, from the shapes."""
    config = json.loads((WORK / "base/config.json").read_text(encoding="utf-8"))
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    block = 2 * hidden * (hidden + kv) + 3 * hidden * ffn
    parts = {
        "one block, float32": 4 * block,
        "the largest H of its inputs, float32": 4 * ffn**2,
        "the factor of its inverse": 4 * ffn**2,
        "calibration rows at one depth, float32": 4 * asked.samples * asked.length * hidden,
    }
    return [[name, f"{size / 2**30:.2f}"] for name, size in parts.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, help="of the model (default 16)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--times", type=int, default=1, help="rounds (default 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers/llama3",
                        help="a folder with its files")
    parser.add_argument("--peer-python", help="a python that has gptqmodel")
    parser.add_argument("--no-peer", action="store_true", help="measure this program alone")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, 4 rows of 64")
    parser.add_argument("--results", type=Path, help="instead of bench/results")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--as-peer", metavar="FOLDER", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.tiny:
        asked.samples, asked.length = 4, 64
    if asked.make:
        return make(asked)
    if asked.as_peer:
        return peer(asked, asked.as_peer)
    if not asked.no_peer and not asked.peer_python:
        parser.error("--peer-python PATH: a python that has gptqmodel; or --no-peer")
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(WORK / "base", ignore_errors=True)
    run_child([sys.executable, __file__, "--make", *sys.argv[1:]])
    write_texts(asked, WORK / "texts.jsonl")
    programs = {"ours": quantizer("ours", ours(asked), asked)}
    versions = {"ours": versions_of(sys.executable, "torch")}
    if not asked.no_peer:
        command = [asked.peer_python, __file__, *sys.argv[1:], "--as-peer"]
        programs["peer"] = quantizer("peer", command, asked)
        versions["peer"] = versions_of(asked.peer_python, "torch", "transformers", "gptqmodel")
    runs = in_turn(programs, asked.times)
    print("\n" + table(["", "peak memory, GiB", "wall time, s", "CPU time, s"],
                       [[name, f"{min(run['peak_bytes'] for run in found) / 2**30:.2f}",
                         *(f"{min(run[key] for run in found):,.0f}"
                           for key in ("seconds", "cpu_seconds"))]
                        for name, found in runs.items()]))
    print("\n" + table(["of this program's memory", "GiB"], memory_parts(asked)))
    save("gptq_memory" + ("-tiny" if asked.tiny else ""), runs, versions=versions,
         dtype="bfloat16", seed=asked.seed, folder=asked.results,
         settings={"layers": asked.layers, "samples": asked.samples, "length": asked.length})


if __name__ == "__main__":
    main()
