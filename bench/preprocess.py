"""Tokenizing a dataset with this program and with LLaMA-Factory: rows per second, memory, tokens.

    python bench/preprocess.py                           52,000 rows; installs the peer once
    python bench/preprocess.py --peer-python PATH        a python that has LLaMA-Factory
    python bench/preprocess.py --rows 1000000 --no-peer  this program alone

The rows are those of alpaca_en_demo (without ../shared: of data/identity.json), repeated with a
number in every text, so that no two are equal. Both programs read the same file with the same
settings and their default number of processes; `peer 16` is LLaMA-Factory with
preprocessing_num_workers: 16, as in its example files. The time is that from the loaded tokenizer
to the tokenized rows, without the start of Python; `again` is a second start, which finds the
tokenized rows of the first.

Requires: common.py (how a child is measured).
Next: ../text/token_cache.py, ../text/fast_bpe.py, ../text/parallel_map.py.
Peer: LLaMA-Factory, arXiv:2403.13372.
"""
import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import (BENCH, ROOT, SHARED, in_turn, medians, peer_python, run_child, save,
                          table, versions_of)

PEER = "llamafactory==0.9.5"
WORK = BENCH / ".work" / "preprocess"
REPORT = """
def tell(seconds, examples):
    crc = tokens = labeled = 0
    for ids, labels in examples:
        crc = zlib.crc32(numpy.array([*ids, *labels], numpy.int32).tobytes(), crc)
        tokens += len(ids)
        labeled += sum(label != -100 for label in labels)
    figures = {"load_seconds": seconds, "tokens": tokens, "learnt": labeled, "sign": crc}
    print("MEASURED", json.dumps(figures))
"""
OURS = """
import json, sys, time, zlib
import numpy
from runtime.build import STAGES
from settings.load_config import load_config
from text.fit_tokenizer import fit_tokenizer
from text.template_check import choose_template
from text.token_cache import kept_in, load_examples
from text.tokenizer import load_tokenizer
config = load_config([sys.argv[1], "tokenized_path=" + sys.argv[2]], "data")
tokenizer = load_tokenizer(config.model_name_or_path)
template, _ = choose_template(config.template, tokenizer)
fit_tokenizer(template, tokenizer)
encode, folder = STAGES[config.stage].encode, kept_in(config)
start = time.perf_counter()
train, _, report = load_examples(config, tokenizer, template, encode, folder=folder)
seconds = time.perf_counter() - start
print(report.origin)
pairs = [(e.input_ids.tolist(), e.labels.tolist()) for e in train] if sys.argv[3:] else []
""" + REPORT + "tell(seconds, pairs)"
THEIRS = """
import json, sys, time, zlib
import numpy, yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
settings = yaml.safe_load(open(sys.argv[1])) | {"output_dir": sys.argv[2], "do_train": True}
settings |= {"overwrite_cache": True, "overwrite_output_dir": True}
settings |= {"use_cpu": True, "report_to": "none"}
model, data, training, _, _ = get_train_args(settings)
loaded = load_tokenizer(model)
template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
start = time.perf_counter()
rows = get_dataset(template, model, data, training, stage="sft", **loaded)["train_dataset"]
seconds = time.perf_counter() - start
""" + REPORT + "tell(seconds, zip(rows['input_ids'], rows['labels']) if sys.argv[3:] else [])"


def make_rows(count: int) -> Path:
    """A folder with `count` rows as one JSON list; made once."""
    folder = WORK / f"rows-{count}"
    if (folder / "dataset_info.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files = (SHARED / "data" / "alpaca_en_demo.json", ROOT / "data" / "identity.json")
    source = json.loads(next(file for file in files if file.is_file()).read_text(encoding="utf-8"))
    draw = random.Random(0)

    def varied(text):
        words = text.split(" ")
        words.insert(draw.randrange(len(words) + 1), str(draw.randrange(10**6)))
        return " ".join(words)

    with open(folder / "rows.json", "w", encoding="utf-8") as file:
        for number in range(count):
            row = source[number % len(source)]
            row = {key: row[key] and varied(row[key]) for key in ("instruction", "input", "output")}
            file.write(("[\n", ",\n")[number > 0] + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return folder


def write_yaml(asked, rows: Path, name: str, **more) -> Path:
    """The yaml of both programs, with further settings in `more`."""
    settings = {"model_name_or_path": asked.tokenizer, "stage": "sft", "finetuning_type": "lora",
                "template": asked.template, "dataset": "rows", "dataset_dir": rows,
                "cutoff_len": asked.cutoff_len, **more}
    path = WORK / f"{name}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return path


def runner(python: str, code: str, config: Path, count: int, env: dict, again: bool = False,
           check: bool = False):
    """A function that tokenizes once and returns its figures. again: with the last run's cache."""
    def measure():
        out = WORK / f"out-{config.stem}"
        if not again:
            shutil.rmtree(out, ignore_errors=True)
        cache = {"HF_DATASETS_CACHE": str(WORK / "cache"), "HF_HUB_OFFLINE": "1",
                 "CUDA_VISIBLE_DEVICES": ""}
        child = run_child([python, "-c", code, config, out, *["check"] * check], cache | env, ROOT)
        shutil.rmtree(WORK / "cache", ignore_errors=True)
        found = json.loads(next(line for _, line in child.lines if line.startswith("MEASURED"))[9:])
        figures = {"load_seconds": found["load_seconds"],
                   "rows_per_second": count / found["load_seconds"], "seconds": child.seconds,
                   "cpu_seconds": child.cpu_seconds, "peak_bytes": child.peak_bytes}
        return found if check else figures
    return measure


def peer_environment(asked) -> tuple[str, dict]:
    """The peer's python, and the environment variables that it needs."""
    python = peer_python(PEER, asked.peer_python, asked.peer_folder)
    env = {"DISABLE_VERSION_CHECK": "1"}
    # transformers imports it, and nothing here uses it
    if run_child([python, "-c", "import torchaudio"], must_work=False).code:
        (WORK / "stub" / "torchaudio").mkdir(parents=True, exist_ok=True)
        (WORK / "stub" / "torchaudio" / "__init__.py").write_text("__version__ = '0'\n")
        env["PYTHONPATH"] = str(WORK / "stub")
    return python, env


def compare(summary: dict) -> str:
    """The table of figures, a line for each program."""
    rows = []
    for name, found in summary.items():
        ratio = (found["rows_per_second"] / summary["peer"]["rows_per_second"] if "peer" in summary
                 else 0)
        rows.append([name, f"{found['load_seconds']:.2f}", f"{found['rows_per_second']:,.0f}",
                     f"{ratio:.2f} ×" if ratio else "-", f"{found['cpu_seconds']:.1f}",
                     f"{found['seconds']:.1f}", f"{found['peak_bytes'] / 2**20:,.0f}"])
    return table(["program", "rows to tokens, s", "rows/s", "against peer", "CPU, s",
                  "whole command, s", "peak, MiB"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=52_000,
                        help="rows of the file (default 52000, as alpaca has)")
    parser.add_argument("--cutoff-len", type=int, default=512,
                        help="longest row in tokens (default 512)")
    parser.add_argument("--times", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers/llama3",
                        help="a folder with its files")
    parser.add_argument("--template", default="llama3",
                        help="the chat format of that tokenizer (default llama3)")
    parser.add_argument("--peer-python", help="a python that has LLaMA-Factory")
    parser.add_argument("--peer-folder", help="where its environment is made (default bench/.peer)")
    parser.add_argument("--no-peer", action="store_true", help="measure this program alone")
    parser.add_argument("--no-check", action="store_true", help="do not compare the tokens of both")
    parser.add_argument("--results", type=Path, help="instead of bench/results")
    asked = parser.parse_args()
    asked.tokenizer = asked.tokenizer.resolve()
    WORK.mkdir(parents=True, exist_ok=True)
    rows = make_rows(asked.rows)
    plain = write_yaml(asked, rows, "plain")
    many = write_yaml(asked, rows, "workers", preprocessing_num_workers=16)
    ours = (sys.executable, OURS, plain, asked.rows, {})
    programs = {"ours": runner(*ours), "ours again": runner(*ours, again=True)}
    versions = {"ours": versions_of(sys.executable, "torch", "tokenizers", "numpy")}
    checks = {"ours": runner(*ours, again=True, check=True)}
    if not asked.no_peer:
        python, env = peer_environment(asked)
        programs["peer"] = runner(python, THEIRS, plain, asked.rows, env)
        programs["peer 16"] = runner(python, THEIRS, many, asked.rows, env)
        checks["peer"] = runner(python, THEIRS, plain, asked.rows, env, check=True)
        versions["peer"] = versions_of(python, "torch", "transformers", "llamafactory",
                                       "tokenizers", "datasets")
    runs = in_turn(programs, asked.times)
    print("\n" + compare({name: medians(found) for name, found in runs.items()}))
    tokens = {}
    if not asked.no_check:
        tokens = {name: check() for name, check in checks.items()}
        for found in tokens.values():
            del found["load_seconds"]
        same = len({json.dumps(found) for found in tokens.values()}) == 1
        verdict = ": the same ids and labels" if same else ": NOT THE SAME"
        print(f"\ntokens: {tokens}" + ("" if asked.no_peer else verdict))
    save("preprocess", runs, versions=versions, dtype="int32", seed=0, folder=asked.results,
         tokens=tokens,
         settings={"rows": asked.rows, "cutoff_len": asked.cutoff_len,
                   "bytes": os.path.getsize(rows / "rows.json")})


if __name__ == "__main__":
    main()
