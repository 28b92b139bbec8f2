"""What the benchmarks share: the peer's environment, measured child processes, tables, results.

    peer = peer_python("llamafactory==0.9.5")                      a virtual environment, made once
    runs = in_turn({"ours": run_ours, "peer": run_peer}, times=3)  ours, peer, ours, peer, …
    save("cpu", runs, …)                                           bench/results/cpu-<machine>.json

Every result (JSON) has the fields script, command, commit, date, machine, versions, dtype, seed,
settings, runs ({name: a dict of raw figures for each run}), summary (medians) and ratios (the
peer's median over ours).

Nothing here imports torch: the peak memory of a child begins at that of the program that started
it, so this program must stay small (see Child).

Requires: docs/speed.md, how to run each benchmark.
Next: cpu.py beside this file.
Sources: getrusage(2), proc_pid_smaps(5). Medians, because a busy machine makes some runs slower and
none faster.
"""
import argparse
import json
import os
import platform
import re
import selectors
import signal
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SHARED = Path(os.environ.get("POCKET_SHARED", ROOT.parent / "shared"))
LOOK_SECONDS = 0.005    # between two reads of a child's output: the resolution of all times
SAMPLE_SECONDS = 0.2    # between two samples of the memory of a child with children
STUCK_SECONDS = 20      # after a kill: a process that waits for a driver may never end
ASK_VERSIONS = """import importlib.metadata, json, sys
found = {"python": ".".join(map(str, sys.version_info[:3]))}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))"""


# ---- the peer's environment ----------------------------------------------------------------------


def peer_python(packages, given=None, folder=None, python=sys.executable) -> str:
    """Path of a python that has `packages` (pip requirements in one string).

    given: a python that has them already. Otherwise a virtual environment is made in `folder`
    (default bench/.peer, which git ignores) with `python` and pip, once for each list of packages.
    Raises FileNotFoundError or RuntimeError.
    """
    if given:
        if not Path(given).is_file():
            raise FileNotFoundError(f"--peer-python {given}: there is no such file")
        return str(given)
    folder = Path(folder or BENCH / ".peer")
    made, mark = folder / "bin" / "python", folder / "installed.txt"
    if mark.is_file() and mark.read_text() == packages:
        return str(made)
    print(f"installing {packages} into {folder} (once; some minutes)", flush=True)
    for command in ([python, "-m", "venv", str(folder)],
                    [str(made), "-m", "pip", "install", "-q", *packages.split()]):
        if subprocess.run(command).returncode:
            raise RuntimeError(f"{' '.join(command)} failed; see above. A python that has the peer "
                               "can be named with --peer-python")
    mark.write_text(packages)
    return str(made)


def versions_of(python, *packages) -> dict:
    """Versions of python and of these packages, where installed, in the environment of `python`."""
    asked = subprocess.run([str(python), "-c", ASK_VERSIONS, *packages], capture_output=True,
                           text=True, check=True)
    return json.loads(asked.stdout)


# ---- a child, its time and its memory ------------------------------------------------------------


@dataclass
class Child:
    """Time, memory and output of a finished program.

    seconds: wall time. cpu_seconds: of all cores together.
    peak_bytes: the largest resident memory of its largest process (wait4) or of all processes
        together (their proportional shares, PSS, sampled), whichever is more.
    lines: (seconds since the start, text) of each printed line, both streams.
    watched: the same for a file that it wrote.
    """
    seconds: float
    peak_bytes: int
    cpu_seconds: float
    code: int
    lines: list = field(default_factory=list)
    watched: list = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


def run_child(command, env=None, cwd=None, limit=3600, must_work=True, watch=None,
              running: set | None = None) -> Child:
    """Run a command to its end and measure it; output is read as it comes, with the lines' times.

    env: added to this program's environment.
    limit: seconds after which it is killed with all its children.
    watch: a file that it will write line by line.
    running: holds its number while it runs; for kill_family, where this is called in a thread.
    Raises RuntimeError with the last lines if it fails, unless must_work is False.
    """
    if watch:
        Path(watch).unlink(missing_ok=True)  # else the lines of an earlier run would be read
    command, start = [str(part) for part in command], time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, cwd=cwd,
                             env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
                             start_new_session=True)
    running = set() if running is None else running
    running.add(child.pid)
    try:
        return follow(child, command, start, limit, must_work, watch)
    except KeyboardInterrupt:       # it does not reach the child, which has its own session
        kill_family(child.pid)
        raise
    finally:
        running.discard(child.pid)


def follow(child, command: list, start: float, limit: float, must_work: bool, watch) -> Child:
    """Read a child's output to its end, and measure it; see run_child."""
    printed, written, together, sampled = Lines(start), Lines(start), 0, 0.0
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        data = b""
        while data is not None:
            data = (os.read(child.stdout.fileno(), 1 << 16) or None if ready.select(LOOK_SECONDS)
                    else b"")
            printed.add(data or b"")
            if watch and os.path.isfile(watch):
                with open(watch, "rb") as file:
                    file.seek(written.bytes)
                    written.add(file.read())
            if time.perf_counter() - sampled > SAMPLE_SECONDS:
                together, sampled = max(together, memory_of_family(child.pid)), time.perf_counter()
            late = time.perf_counter() - start - limit
            if late > 0:
                kill_family(child.pid)
            if late > STUCK_SECONDS:
                break
    ended, status, used = os.wait4(child.pid, os.WNOHANG if late > STUCK_SECONDS else 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status) if ended else -signal.SIGKILL
    child.stdout.close()
    printed.add(b"\n")
    found = Child(seconds, max(used.ru_maxrss * 1024, together), used.ru_utime + used.ru_stime,
                  child.returncode, printed.lines, written.lines)
    if must_work and found.code:
        raise RuntimeError(f"{' '.join(command)} ended with {found.code}:\n"
                           + "\n".join(found.text.splitlines()[-25:]))
    return found


def kill_family(pid: int):
    """Kill a child that run_child started, and the processes that it has started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:      # ended meanwhile
        pass


class Lines:
    """Lines of a stream of bytes, ended by \\n or \\r, with their seconds since `start`."""

    def __init__(self, start: float):
        self.start, self.lines, self.rest, self.bytes = start, [], b"", 0

    def add(self, data: bytes):
        *whole, self.rest = re.split(rb"[\r\n]", self.rest + data)
        now, self.bytes = time.perf_counter() - self.start, self.bytes + len(data)
        self.lines += [(now, line.decode(errors="replace")) for line in whole if line.strip()]


def memory_of_family(pid: int) -> int:
    """Bytes of a process and its children together, shared pages counted once.

    0 for a process without children, which wait4 measures exactly.
    """
    family, todo = [], [pid]
    while todo:
        family.append(todo.pop())
        try:
            tasks = list(Path(f"/proc/{family[-1]}/task").iterdir())
            todo += [int(one) for task in tasks for one in (task / "children").read_text().split()]
        except OSError:     # it has ended, or this is not Linux
            pass
    return sum(map(share_of, family)) if len(family) > 1 else 0


def share_of(pid: int) -> int:
    """A process's proportional share of resident memory in bytes; 0 when it is gone."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


# ---- a training run ------------------------------------------------------------------------------


def from_root(path) -> str:
    """A path relative to the repository's root, where both programs run."""
    return os.path.relpath(path, ROOT)


def write_rows(folder, name: str, rows):
    """Write rows (dicts) as the only dataset of a folder, with its dataset_info.json."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (Path(folder) / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.jsonl"}})
    )


def source_rows() -> list:
    """Rows in alpaca layout: of alpaca_en_demo, or where that is missing of data/identity.json."""
    files = (SHARED / "data" / "alpaca_en_demo.json", ROOT / "data" / "identity.json")
    return json.loads(next(file for file in files if file.is_file()).read_text(encoding="utf-8"))


def long_rows(count: int, tokens: int):
    """Yield `count` rows of at least `tokens` tokens: the answers of the source, concatenated."""
    text = " ".join(row["output"] for row in source_rows())
    whole = (text + " ") * (8 * tokens // len(text) + 1)  # a token is rarely longer than 8 letters
    yield from ({"instruction": f"Row {number}", "output": whole[:8 * tokens]}
                for number in range(count))


def training_figures(child, warm_up: int) -> dict:
    """The figures of one run, from the lines of trainer_log.jsonl and their times.

    warm_up: steps that are not counted, at least one (the start of the first is unknown).
    tokens_per_second: of all other steps together. The speed of their median step shows whether
    other work interfered. tokens: of each step, without padding.
    """
    steps = [(at, line) for at, text in child.watched if "loss" in (line := json.loads(text))]
    assert warm_up >= 1
    if len(steps) <= warm_up + 1:
        raise ValueError(f"{len(steps)} steps were logged, and the first {warm_up} are not "
                         "counted: raise --steps")
    times, seen = [at for at, _ in steps], [line["total_tokens"] for _, line in steps]
    tokens = [now - before for before, now in zip([0, *seen], seen)]
    took = [max(now - before, LOOK_SECONDS) for before, now in zip(times, times[1:])]
    speeds = [count / seconds for count, seconds in zip(tokens[1:], took)][warm_up - 1:]
    return {"tokens_per_second": sum(tokens[warm_up:]) / sum(took[warm_up - 1:]),
            "median_step_tokens_per_second": statistics.median(speeds),
            "first_step_seconds": times[0], "peak_bytes": child.peak_bytes,
            "seconds": child.seconds, "cpu_seconds": child.cpu_seconds,
            "losses": [line["loss"] for _, line in steps], "tokens": tokens, "step_times": times}


def curves(ours: dict, peer: dict) -> str:
    """Both loss curves side by side, and the largest difference.

    Raises ValueError if their numbers of tokens differ.
    """
    if ours["tokens"] != peer["tokens"]:
        at = next(i for i, (a, b) in enumerate(zip(ours["tokens"], peer["tokens"])) if a != b)
        raise ValueError(f"step {at + 1}: ours counts {ours['tokens'][at]} tokens, the peer "
                         f"{peer['tokens'][at]}: they do not train on the same rows")
    pairs = list(zip(ours["losses"], peer["losses"]))
    rows = [[step, count, f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}"]
            for step, (count, (a, b)) in enumerate(zip(ours["tokens"], pairs), 1)]
    return table(["step", "tokens", "loss, ours", "loss, peer", "difference"], rows) \
        + f"\nlargest difference of the losses: {max(abs(a - b) for a, b in pairs):.4f}"


# ---- several times in turn -----------------------------------------------------------------------


def in_turn(programs: dict, times: int) -> dict:
    """Call each of {name: function()} once a round; {name: [figures of each round]}."""
    runs = {name: [] for name in programs}
    for number in range(1, times + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            runs[name].append(program())
            seconds = time.perf_counter() - start
            print(f"  round {number} of {times}: {name} done in {seconds:.1f} s", flush=True)
    return runs


def medians(runs: list) -> dict:
    """The median of each figure that is one number in every run."""
    keys = [key for key, value in runs[0].items() if isinstance(value, (int, float))]
    return {key: statistics.median(run[key] for run in runs) for key in keys
            if all(isinstance(run.get(key), (int, float)) for run in runs)}


def ratios(summary: dict, ours="ours", peer="peer") -> dict:
    """For each figure that both have: the peer's median over ours."""
    return {key: summary[peer][key] / summary[ours][key] for key in summary[ours]
            if summary[ours][key] and key in summary.get(peer, {})}


# ---- parts, each in a process of its own ---------------------------------------------------------

RESULT = "RESULT "      # begins a line with the figures of a part, as JSON


class NotHere(Exception):
    """Why a part cannot be run on this machine."""


def report_figures(status: str, says: str = "", **figures):
    """Print figures of a part; the last line about a figure counts, so they may come one by one."""
    line = RESULT + json.dumps({"status": status, "says": says, **figures})
    print("\n" + line, flush=True)          # a progress bar may have left its line open


def run_part(parts: dict):
    """The main of a file with parts, {name: function(asked) -> figures}: run the named one.

    Its figures have "says", what was found in words. A part that raises has failed, one that
    raises NotHere is skipped, and both say why.
    """
    parser = argparse.ArgumentParser(description="One part of bench/gpu.py, in this process.")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--kernel", help="of attention; by default the fastest that is right here")
    parser.add_argument("--seconds", type=float, default=8, help="to measure (default 8)")
    parser.add_argument("--cards", type=int, default=0, help="that gpu_cards.py uses (0: all)")
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        figures = parts[asked.part](asked)
    except NotHere as why:
        return report_figures("skipped", str(why))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        report_figures("failed", f"{type(error).__name__}: {lines[0][:300]}")
        raise SystemExit(1) from None
    report_figures("done", **figures)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(0)                 # gloo's threads abort a python that ends while they still run


# ---- where it ran, and what is kept --------------------------------------------------------------


def machine(gpu: str = "") -> dict:
    """The GPU's name if given, processor, usable cores, memory in GiB, system."""
    def first(path, pattern):
        text = Path(path).read_text() if Path(path).is_file() else ""
        found = re.search(pattern, text, re.M)
        return found[1].strip() if found else ""

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = (first("/proc/cpuinfo", r"^model name\s*:(.*)$") or platform.processor()
           or platform.machine())
    memory = int(first("/proc/meminfo", r"^MemTotal:\s+(\d+) kB") or 0) / 2**20
    return ({"gpu": gpu} if gpu else {}) | {"cpu": cpu, "cores": cores,
                                            "memory_gib": round(memory, 1),
                                            "system": f"{platform.system()} {platform.release()}"}


def slug(where: dict) -> str:
    """The machine's name in file names: of the GPU, else processor and cores."""
    name = where.get("gpu") or f"{where['cpu']} {where['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The measured commit, with + if files differ from it; "unknown" outside a git checkout."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short", "HEAD")
    except OSError:             # git is not installed
        return "unknown"
    if head.returncode:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


def save(script: str, runs: dict, *, versions: dict, dtype: str, seed, settings: dict,
         gpu: str = "", folder=None, **more) -> Path:
    """Write bench/results/<script>-<machine>.json with the common fields and `more`; its path."""
    where, summary = machine(gpu), {name: medians(found) for name, found in runs.items() if found}
    program = f"bench/{Path(sys.argv[0]).name}"
    result = {"script": program, "command": " ".join(["python", program, *sys.argv[1:]]),
              "commit": commit(), "date": time.strftime("%Y-%m-%d %H:%M %z"), "machine": where,
              "versions": versions, "dtype": dtype, "seed": seed, "settings": settings,
              "runs": runs, "summary": summary,
              "ratios": ratios(summary) if "ours" in summary else {}, **more}
    path = Path(folder or BENCH / "results") / f"{script}-{slug(where)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    path.write_text(short_paths(text) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")
    return path


def short_paths(text: str) -> str:
    """The text with absolute paths shortened to …/name, without folders of this machine."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+(?=[\w.+-])", "…/", text)


def table(header: list, rows: list) -> str:
    """An aligned Markdown table; columns of numbers are right-aligned."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(re.fullmatch(r"(-|[-+≥≤<]?\s?[\d.,/]+\s?[%×]?)?", row[i]) for row in cells[1:])
             for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) if r else cell.ljust(width)
                  for cell, width, r in zip(row, widths, right)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = "|" + "|".join("-" * (w + 1) + ":" if r else "-" * (w + 2)
                          for w, r in zip(widths, right)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
