"""Is it right on this card, and how fast? One command, no network, less than 10 minutes.

    python bench/gpu.py --all                       first the proofs, then every measured row
    python bench/gpu.py --cards                     the second command, for two cards or more
    python bench/gpu.py --only train-8b,decode-1    some parts; the other results stay
    python bench/gpu.py --list                      the parts, in their order
    python bench/gpu.py --all --device cpu --tiny   the rehearsal: tiny shapes, no card needed

It needs the packages of requirements.txt. Each part runs in a process of its own, with a time
limit. One that fails, hangs or does not fit into memory is a row of the result that says so, and
the next part follows. After every part the results are written, bench/results/gpu-<card>.json and
.md, so a run that is killed leaves what it has found. Parts come in the order of their worth; those
for which the --budget leaves no time are named, and can be run by --only: a later run replaces the
parts that it has run.

Requires: common.py, docs/gpu.md (what each row means, what to send).
Next: gpu_proofs.py, gpu_speed.py, gpu_peer.py, gpu_long.py, gpu_cards.py.
Sources of goals and published figures: docs/gpu.md.
"""
import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.common import (BENCH, RESULT, ROOT, commit, kill_family, machine, run_child,
                          short_paths, slug, table)
from errors import PACKAGES, did_you_mean, run_script

BUDGET = 570            # seconds: a lent machine may allow 600 for a command
AT_ONCE = 3             # proofs: they measure no time, and most of theirs is python's start
STATUSES = ("done", "failed", "skipped", "not run")


@dataclass(frozen=True)
class Part:
    """A row of the result.

    usual: seconds on one H200, estimated; less time left: it is not begun. limit: seconds after
    which it is killed. goal: of its tokens per second, or of its longest row. shape_of: the part
    whose attention kernel it takes, where that was picked in the same run; choosing takes some 10
    seconds.
    """
    file: str
    what: str
    usual: int = 30
    limit: int = 120
    goal: int = 0
    published: str = ""
    shape_of: str = ""


PROOFS = {
    "steps": Part("gpu_proofs.py", "a training step = the plain decoder on the CPU", 60, 180),
    "attention": Part("gpu_proofs.py", "attention kernels = plain attention in float64", 45, 180),
    "decode": Part("gpu_proofs.py", "captured decoding = uncaptured; many at once = one", 30),
    "recipe": Part("gpu_proofs.py", "the small recipe's words", 40, 150),
    "qlora": Part("gpu_proofs.py", "4 and 8 bits = the CPU's, bit for bit"),
    "fp8": Part("gpu_proofs.py", "8-bit base: the curve of bfloat16", 45, 150),
    "resume": Part("gpu_proofs.py", "stopped and resumed = never stopped", 45, 150),
    "waits": Part("gpu_proofs.py", "a step waits for the device once", 30),
    "peer": Part("gpu_proofs.py", "the curve of transformers + peft", 45, 150),
}
SPEED = {
    "train-8b": Part("gpu_speed.py", "Llama-3-8B, 2 x 4096 a pass, LoRA r 16, bf16", 40, 150, 17000,
                     "12,473 (NeMo AutoModel, H100)"),
    "decode-1": Part("gpu_speed.py", "decode 8B bf16, batch 1", 30, 120, 230,
                     "roofline 320 (H200's memory)"),
    "train-8b-fp8": Part("gpu_speed.py", "Llama-3-8B, fp8 frozen base", 35, 150, 24000,
                         "about 22,800 (Megatron-Bridge, 735 TFLOP/s)", "train-8b"),
    "train-7b": Part("gpu_speed.py", "Qwen2.5-7B, 2 x 4096 a pass", 35, 150, 18500,
                     "14,110 (NeMo AutoModel, H100)"),
    "peer-8b": Part("gpu_peer.py", "transformers + peft beside train-8b", 45, 150),
    "train-8b-4bit": Part("gpu_speed.py", "Llama-3-8B, 4-bit base, 8k tokens a step", 35, 150,
                          shape_of="train-8b"),
    "train-8b-short": Part("gpu_speed.py", "Llama-3-8B, short rows without padding", 35, 150,
                           shape_of="train-8b"),
    "peer-8b-short": Part("gpu_peer.py", "transformers + peft, the same rows padded", 45, 150),
    "decode-64": Part("gpu_speed.py", "decode 8B bf16, batch 64", 30, 120, 6000),
    "train-moe": Part("gpu_speed.py", "Qwen3-30B-A3B, 12 of 48 layers, adapters on experts", 60,
                      150),
    "peer-moe": Part("gpu_peer.py", "transformers' loop over experts + peft", 60, 150),
    "train-0.5b": Part("gpu_speed.py", "Qwen2.5-0.5B, 4 x 4096 a pass", 25, 120),
    "peer-moe-fast": Part("gpu_peer.py", "transformers' own choice for experts + peft", 60, 150),
}
LONG = {
    "long-8gb": Part("gpu_long.py", "8B QLoRA, the longest row in 8 GB", 40, 150, 3_000,
                     "2,972 (Unsloth)", "train-8b"),
    "long-24gb": Part("gpu_long.py", "8B QLoRA, the longest row in 24 GB", 100, 240, 80_000,
                      "78k (Unsloth)", "train-8b"),
    "long-80gb": Part("gpu_long.py", "8B QLoRA, the longest row in 80 GB", 430, 1200, 350_000,
                      "343k (Unsloth)", "train-8b"),
}
CARDS = {
    "ranks": Part("gpu_cards.py", "N cards = one card", 60, 200),
    "nccl": Part("gpu_cards.py", "all-reduce: sums and bandwidth", 30),
    "fsdp": Part("gpu_cards.py", "sharded over N cards = one card", 60, 200),
    "scaling": Part("gpu_cards.py", "Llama-3-8B on N cards, each with its own rows", 90, 240,
                    shape_of="train-8b"),
}
FIRST = {"card": Part("gpu_speed.py", "the card and its rate", 15, 90)}
PARTS = FIRST | PROOFS | SPEED | LONG | CARDS
# tokens per second of the first over those of the second; the goal, or 0
RATIOS = (("train-8b", "peer-8b", 2.0), ("train-8b-short", "peer-8b-short", 4.0),
          ("train-8b-4bit", "train-8b", 0.85), ("train-moe", "peer-moe", 3.0),
          ("train-moe", "peer-moe-fast", 0))


# ---- running parts -------------------------------------------------------------------------------


def command_of(name: str, asked, kernel: str = "") -> list[str]:
    """The command of one part, from the repository's root."""
    command = [f"bench/{PARTS[name].file}", name]
    if asked.device != "cuda":
        command += ["--device", asked.device]
    command += ["--tiny", "--seconds", "0.2"] if asked.tiny else []
    command += ["--kernel", kernel] if kernel else []
    return command


def run_one(name: str, asked, seconds: float, kernel: str = "", running=None) -> dict:
    """The record of a part, whatever becomes of it; `seconds`: the most it may take."""
    command = command_of(name, asked, kernel)
    child = run_child([sys.executable, *command], cwd=ROOT, limit=seconds, must_work=False,
                      running=running,
                      env={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    record = {}
    for line in child.text.splitlines():
        if line.startswith(RESULT):
            record |= json.loads(line.removeprefix(RESULT))
    if record.get("status") not in STATUSES:
        last = [line for line in child.text.splitlines() if not line.startswith(RESULT)][-1:]
        ending = f"ended with {child.code}: {''.join(last)[:200]}"
        if child.seconds >= seconds:
            ending = f"killed after {seconds:.0f} s"
        record |= {"status": "failed", "says": ending}
    if record["status"] == "failed":
        record["last_lines"] = child.text.splitlines()[-30:]
    return record | {"seconds": round(child.seconds, 1), "commit": commit(),
                     "date": time.strftime("%Y-%m-%d %H:%M %z"),
                     "command": " ".join(["python", *command])}


class Results:
    """The records of all parts, in a file that is written after each of them."""

    def __init__(self, asked, card: dict):
        where = slug(machine(card.get("name", "")))
        name = f"gpu{'-tiny' if asked.tiny else ''}-{where}"
        self.path = Path(asked.results) / f"{name}.json"
        self.records = {}
        self.of_this_run = []
        if self.path.is_file():
            self.records = json.loads(self.path.read_text(encoding="utf-8"))["parts"]
        self.add("card", card)

    def add(self, name: str, record: dict):
        """Keep a record and write both files. One that was not run replaces none."""
        self.of_this_run.append(name)
        if record["status"] == "not run" and name in self.records:
            return
        self.records[name] = record
        order = [name for name in PARTS if name in self.records]
        order += [name for name in self.records if name not in PARTS]
        self.records = {name: self.records[name] for name in order}
        card = self.records["card"]
        found = {"script": "bench/gpu.py", "date": time.strftime("%Y-%m-%d %H:%M %z"),
                 "commit": commit(), "machine": machine(card.get("name", "")),
                 "versions": card.get("versions", {}), "dtype": "bfloat16",
                 "ratios": ratios(self.records), "parts": self.records}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        replace_file(self.path, short_paths(text))
        replace_file(self.markdown, short_paths(page(self.records)))

    @property
    def markdown(self) -> Path:
        return self.path.with_suffix(".md")

    def kernel_for(self, part: Part) -> str:
        """The attention kernel that this run has picked for the shape of a part, or ""."""
        if part.shape_of not in self.of_this_run:
            return ""
        return self.records[part.shape_of].get("kernel", "")


def replace_file(path: Path, text: str):
    """Write a file that is never seen half written."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def run_parts(names: list, asked, results: Results, deadline: float, at_once: int):
    """Run parts in their order, `at_once` at a time, and keep each record before the next part."""
    one_writes, running = Lock(), set()

    def run_in_time(name: str):
        part = PARTS[name]
        left = deadline - time.perf_counter()
        if left < (0 if asked.tiny else part.usual):
            record = {"status": "not run", "says": "no time left", "command": "", "seconds": 0,
                      "date": time.strftime("%Y-%m-%d %H:%M %z"), "commit": commit()}
        else:
            record = run_one(name, asked, min(part.limit, left), results.kernel_for(part), running)
        with one_writes:
            results.add(name, record)
            print(f"{name:<15} {record['status']:<8} {record['seconds']:>6.1f} s  {record['says']}",
                  flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for future in [pool.submit(run_in_time, name) for name in names]:
                future.result()
        except BaseException:               # Ctrl-C, or a fault of this file: nothing runs on
            pool.shutdown(wait=False, cancel_futures=True)
            for child in tuple(running):
                kill_family(child)
            raise


# ---- the page ------------------------------------------------------------------------------------


def ratios(records: dict) -> dict:
    """{"ours / other": ratio of tokens per second} of the pairs of which both were measured."""
    speeds = {name: record["tokens_per_second"] for name, record in records.items()
              if record["status"] == "done" and "tokens_per_second" in record}
    return {f"{ours} / {other}": speeds[ours] / speeds[other] for ours, other, _ in RATIOS
            if ours in speeds and other in speeds}


def page(records: dict) -> str:
    """The results as Markdown."""
    card = records["card"]
    versions = ", ".join(f"{name} {version}" for name, version in card.get("versions", {}).items())
    title = card.get("name") or "a rehearsal without a card, whose speeds mean nothing"
    lines = [f"# bench/gpu.py: {title}", "",
             card["says"] + ".", "", f"{versions}; {time.strftime('%Y-%m-%d %H:%M %z')}. bfloat16 "
             "where a row does not say otherwise; docs/gpu.md says what each row means.", "",
             "## Is it right?", "", proofs_table(records), "", "## How fast is it?", "",
             speed_table(records), "", ratios_table(records), "", "## How long may a row be?", "",
             long_table(records), "", "## Commands", "",
             commands_table(records), ""]
    return "\n".join(lines)


def proofs_table(records: dict) -> str:
    names = [*PROOFS, *(name for name in ("ranks", "fsdp", "nccl") if name in records)]
    words = {"done": "yes", "failed": "NO"}
    rows = []
    for name in names:
        record = records.get(name, {"status": "not run", "says": ""})
        rows.append([name, PARTS[name].what, words.get(record["status"], record["status"]),
                     in_a_cell(record["says"])])
    return table(["proof", "what must hold", "holds", "found"], rows)


def in_a_cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def speed_table(records: dict) -> str:
    """A row for each measured part, and for those that cannot be measured yet."""
    rows = []
    rehearsal = not records["card"].get("name")
    for name in [*SPEED, *(name for name in ("scaling",) if name in records)]:
        part = PARTS[name]
        record = records.get(name, {"status": "not run", "says": ""})
        goal = f"≥ {part.goal:,}" if part.goal else ""
        if record["status"] != "done" or "tokens_per_second" not in record:
            rows.append([name, part.what, "-", "-", "-", "-", goal, "", part.published,
                         in_a_cell(f"{record['status']}: {record['says']}".removesuffix(": "))])
            continue
        speed = record["tokens_per_second"]
        met = verdict(speed, 0 if rehearsal else part.goal)
        rows.append([name, part.what, f"{speed:,.0f}", figure(record, "tflops", ".1f"),
                     figure(record, "share_of_matrix_rate", ".1%"),
                     figure(record, "peak_gib", ".1f"), goal, met, part.published,
                     in_a_cell(record["says"])])
    return table(["row", "what", "tokens/s", "TFLOP/s", "of the card's rate", "peak GiB", "goal",
                  "met", "published", "note"], rows)


def verdict(found: float | None, goal: float) -> str:
    """Whether a goal is met, in a word; "" where there is none, or nothing was found."""
    if not goal or found is None:
        return ""
    return "yes" if found >= goal else "no"


def figure(record: dict, key: str, form: str) -> str:
    return format(record[key], form) if key in record else "-"


def long_table(records: dict) -> str:
    """The longest rows that train in a part of the card's memory."""
    rows = []
    for name, part in LONG.items():
        record = records.get(name, {"status": "not run", "says": ""})
        found = record.get("longest_row")           # known of a part that was killed, too
        goal = part.goal if records["card"].get("name") else 0
        note = record["says"] if record["status"] == "done" else \
            f"{record['status']}: {record['says']}".removesuffix(": ")
        rows.append([name, part.what, f"{found:,}" if found is not None else "-",
                     figure(record, "peak_gib", ".1f"), f"≥ {part.goal:,}", verdict(found, goal),
                     part.published, in_a_cell(note)])
    return table(["row", "what", "tokens", "peak GiB", "goal", "met", "published", "note"], rows)


def ratios_table(records: dict) -> str:
    found, rows = ratios(records), []
    for ours, other, goal in RATIOS:
        ratio = found.get(f"{ours} / {other}")
        rows.append([ours, other, f"{ratio:.2f}" if ratio else "-", f"≥ {goal:g}" if goal else "",
                     verdict(ratio, goal if records["card"].get("name") else 0)])
    return table(["tokens/s of", "over", "ratio", "goal", "met"], rows)


def commands_table(records: dict) -> str:
    rows = [[name, f"`{record['command']}`" if record["command"] else "", record["seconds"],
             record["date"], record["commit"]] for name, record in records.items()]
    return table(["part", "command", "s", "date", "commit"], rows)


# ---- the command ---------------------------------------------------------------------------------


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all proofs, then all rows, on one card")
    parser.add_argument("--cards", action="store_true", help="the parts for two cards or more")
    parser.add_argument("--only", help="names of parts, with commas between")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for --device cpu")
    parser.add_argument("--budget", type=float, default=BUDGET,
                        help=f"seconds for all parts together (default {BUDGET})")
    parser.add_argument("--at-once", type=int, default=0,
                        help=f"proofs that run at the same time (default {AT_ONCE}, CPU 1)")
    parser.add_argument("--results", default=BENCH / "results",
                        help="folder of the JSON and Markdown files (default bench/results)")
    asked = parser.parse_args(argv)
    if not (asked.all or asked.cards or asked.only or asked.list):
        parser.error("say what to run: --all, --cards (two cards or more), --only PARTS, or --list")
    if asked.device == "cpu" and not (asked.tiny or asked.only):
        parser.error("--device cpu is for the rehearsal: add --tiny")
    asked.at_once = asked.at_once or (AT_ONCE if asked.device == "cuda" else 1)
    return asked


def chosen(asked) -> list[str]:
    """The names of the parts to run, in their order. Raises ValueError for an unknown one."""
    names = set(PROOFS | SPEED | LONG) if asked.all else set()
    names |= set(CARDS) if asked.cards else set()
    for name in asked.only.split(",") if asked.only else []:
        if name not in PARTS:
            raise ValueError(f"--only {name}: there is no such part{did_you_mean(name, PARTS)}. "
                             f"The parts: {', '.join(PARTS)}")
        names.add(name)
    return [name for name in PARTS if name in names and name not in FIRST]


def check_packages():
    """Raises ValueError with one sentence for packages that are not installed."""
    missing = [package for module, package in PACKAGES.items()
               if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed for {sys.executable}; all that "
                         "bench/gpu.py needs is in requirements.txt: python -m pip install -r "
                         "requirements.txt")


def measure(asked) -> int:
    """Run what is asked for; the number of parts that failed."""
    names = chosen(asked)
    check_packages()
    deadline = time.perf_counter() + asked.budget
    card = run_one("card", asked, min(FIRST["card"].limit, asked.budget))
    if card["status"] == "failed" and "name" not in card:
        raise ValueError(f"the card cannot be asked: {card['says']}")
    results = Results(asked, card)
    print(card["says"], flush=True)
    proofs = [name for name in names if name in PROOFS]
    run_parts(proofs, asked, results, deadline, asked.at_once)
    run_parts([name for name in names if name not in PROOFS], asked, results, deadline, 1)
    print("", page(results.records), f"written to {results.path} and {results.markdown.name}",
          sep="\n")
    return sum(results.records[name]["status"] == "failed" for name in results.of_this_run)


def main(argv: list[str]):
    asked = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # of `timeout`, as Ctrl-C
    if asked.list:
        print(table(["part", "what", "about s", "file"],
                    [[name, part.what, part.usual, part.file] for name, part in PARTS.items()]))
    elif measure(asked):
        sys.exit(1)                 # some part failed; the page says which


if __name__ == "__main__":
    run_script(main)
