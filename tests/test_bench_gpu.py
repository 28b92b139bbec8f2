"""bench/gpu.py: each of its parts on tiny shapes on a CPU, and what becomes of parts that fail."""
import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import common, gpu, gpu_cards, gpu_long, gpu_peer, gpu_proofs, gpu_speed
from bench.common import NotHere, run_child
from tests.common import ROOT, RUN_SLOW, slow, usual
from tests.ranks import forked, outcomes

ASKED = SimpleNamespace(device="cpu", tiny=True, kernel=None, seconds=0.05, cards=0)
FILES = {"gpu_proofs.py": gpu_proofs, "gpu_speed.py": gpu_speed, "gpu_peer.py": gpu_peer,
         "gpu_long.py": gpu_long, "gpu_cards.py": gpu_cards}


# ---- every part ----------------------------------------------------------------------------------


def run_here(command, **rest):
    """As subprocess.run of a script, without another import of torch: in this process."""
    printed, argv = io.StringIO(), sys.argv
    try:
        sys.argv = [str(part) for part in command[1:]]
        with gpu_proofs.in_folder(ROOT), contextlib.redirect_stdout(printed):
            printed.reconfigure = lambda **_: None
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=0, stdout=printed.getvalue(), stderr="")


@pytest.mark.parametrize("name", [
    name for name in gpu.PROOFS if RUN_SLOW or name not in ("fp8", "recipe")])
def test_every_proof_holds_on_a_cpu(name, monkeypatch):
    if name in ("recipe", "peer"):
        monkeypatch.setattr(gpu_proofs, "subprocess", SimpleNamespace(run=run_here))
    if name == "peer":
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    if name == "waits":
        with pytest.raises(NotHere, match="CUDA only"):
            gpu_proofs.waits(ASKED)
        return
    found = gpu_proofs.PARTS[name](ASKED)
    assert found["says"]
    if name == "peer":              # of random boundaries the two would not agree
        ours, theirs = found["losses"]["ours"], found["losses"]["peer"]
        assert ours == pytest.approx(theirs, abs=2e-3) and ours[1] > 1 and ours[1] != ours[2]


@pytest.mark.parametrize("name", [
    name for name in gpu.SPEED if RUN_SLOW or name != "peer-8b-short"])
def test_every_speed_is_measured_on_a_cpu(name):
    if gpu.SPEED[name].file == "gpu_peer.py":
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    found = FILES[gpu.SPEED[name].file].PARTS[name](ASKED)
    assert found["tokens_per_second"] > 0
    if "tflops" in found:
        share = found["share_of_matrix_rate"]
        assert share == pytest.approx(found["tflops"] / found["matrix_tflops"]) and share > 0
        # torch 2.4 multiplies large 16-bit matrices on a CPU slower than the peer's small ones
        assert share < 1 or gpu.SPEED[name].file == "gpu_peer.py"
        assert found["first_loss"] == pytest.approx(7.6, abs=2)             # log 2048


def test_the_longest_row():
    """Steps with all that saves memory run; and the search, with an imitated card."""
    found = gpu_long.PARTS["long-8gb"](ASKED)
    assert found["longest_row"] >= 64 and found["too_long"] is None

    def search(room, goal, seconds=60.0):
        tried = []
        row, too_long = gpu_long.longest_row(lambda n: tried.append(n) or n <= room, goal, seconds)
        assert row == max([n for n in tried if n <= room], default=0)
        assert too_long is None or too_long > room
        return row

    assert 1150 <= search(1300, 1000) <= 1300
    assert 800 >= search(790, 1000) >= 600
    assert search(100, 1000) == 0
    assert search(10**9, 1000, seconds=0.0) == 1000


def test_a_row_that_does_not_fit_is_followed_by_a_shorter_one(monkeypatch):
    """Out of memory in a step, as torch says it, leaves nothing that the next step meets."""
    step, raised = gpu_long.Run.step, []

    def step_of_a_small_card(run, step_, following, over=False):
        if step_.tokens > 60:
            raised.append(step_.tokens)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(run, step_, following, over)

    monkeypatch.setattr(gpu_long.Run, "step", step_of_a_small_card)
    monkeypatch.setattr(gpu_long, "SHORTEST", 8)
    found = gpu_long.PARTS["long-8gb"](ASKED)
    assert raised == [64] and found["longest_row"] == 51 and found["too_long"] == 64


def launch_here(world: int, command: list) -> str:
    """As gpu_cards.launch; one rank in this process, several forked from one that has torch."""
    if world == 1:
        return run_here(command).stdout
    (code, printed, _), = outcomes(forked(world, *command[1:]))
    assert code == 0, printed
    return printed


@pytest.mark.parametrize("name", usual(["fsdp", "nccl", "scaling"], "nccl"))
def test_parts_for_several_cards_with_two_processes(name, monkeypatch):
    """`ranks` is the same function as fsdp without its setting; tests/test_parallel.py has more.

    nccl starts its processes as the benchmark does."""
    if name != "nccl":
        monkeypatch.setattr(gpu_cards, "launch", launch_here)
    if name == "fsdp" and torch.__version__ < "2.13":
        pytest.skip("sharding on a CPU needs torch 2.13")
    found = gpu_cards.PARTS[name](ASKED)
    assert found["says"].startswith("2 ")
    if name == "scaling":
        assert found["ratio"] == found["tokens_per_second"] / found["one_card_tokens_per_second"]


def test_a_wrong_result_is_found(monkeypatch):
    """A proof that cannot fail proves nothing: a kernel that is off by a percent, a step that is
    replayed stale, weights that are quantized otherwise."""
    from attention import attend
    monkeypatch.setattr("model.Attention.attend", lambda _, *qkv, kernel, **rest: attend(
        *qkv, kernel=kernel, **rest) * (1 if kernel == "plain" else 1.01))
    with pytest.raises(AssertionError, match="float32.*off by .*, allowed 0.001"):
        gpu_proofs.steps(ASKED)
    monkeypatch.undo()
    monkeypatch.setattr(gpu_proofs, "record_again", lambda call: ((lambda: None), call()))
    with pytest.raises(AssertionError, match="not captured: .* is off by|scores of captured steps"):
        gpu_proofs.decode(ASKED)
    quantize, calls = gpu_proofs.quantize, []

    def other_codes(matrix, form):
        calls.append(form)
        return quantize(matrix if len(calls) % 2 else 1.3 * matrix.flip(0), form)

    monkeypatch.setattr(gpu_proofs, "quantize", other_codes)
    with pytest.raises(AssertionError, match="nf4: other codes than on the CPU"):
        gpu_proofs.qlora(ASKED)


# ---- the table of parts --------------------------------------------------------------------------


def test_every_part_exists_and_ratios_are_of_the_same_rows():
    for name, part in gpu.PARTS.items():
        assert name in FILES[part.file].PARTS, name
        assert part.shape_of == "" or part.shape_of in gpu.SPEED
        assert 0 < part.usual <= part.limit
    for ours, other, _ in gpu.RATIOS:
        if other.startswith("peer"):
            assert gpu_peer.PARTS[other].keywords["case"] is gpu_speed.CASES[ours]
    assert gpu_speed.CASES["train-8b"].rows == gpu_speed.CASES["train-8b-4bit"].rows
    alone = sum(part.usual for part in (gpu.FIRST | gpu.SPEED).values())
    together = sum(part.usual for part in gpu.PROOFS.values()) / gpu.AT_ONCE
    assert together + alone - gpu.SPEED["peer-moe-fast"].usual < 1.15 * gpu.BUDGET


def test_goals_are_those_of_docs():
    """docs/gpu.md has every part, its goal and the published figure."""
    text = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    for name, part in gpu.PARTS.items():
        assert f"`{name}`" in text, name
        assert not part.goal or f"{part.goal:,}" in text, name
    for ours, other, goal in gpu.RATIOS:
        assert not goal or f"{goal:g} ×" in text or f"{goal:.0%}" in text.replace(" %", "%")
    assert "docs/gpu.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_command_line():
    assert gpu.chosen(gpu.parse_arguments(["--all"])) == [*gpu.PROOFS, *gpu.SPEED, *gpu.LONG]
    assert gpu.chosen(gpu.parse_arguments(["--cards"])) == list(gpu.CARDS)
    assert gpu.chosen(gpu.parse_arguments(["--only", "decode-1,steps"])) == ["steps", "decode-1"]
    with pytest.raises(ValueError, match="no such part .did you mean 'train-8b'"):
        gpu.chosen(gpu.parse_arguments(["--only", "train8b"]))
    for argv in ([], ["--all", "--device", "cpu"]):
        with pytest.raises(SystemExit):
            gpu.parse_arguments(argv)


def test_a_missing_package_is_said_in_one_sentence(monkeypatch):
    found = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec",
                        lambda name: None if name in ("tokenizers", "yaml") else found(name))
    with pytest.raises(ValueError, match="^tokenizers, PyYAML not installed for .*requirements"):
        gpu.check_packages()


# ---- parts that fail -----------------------------------------------------------------------------

PROGRAMS = {
    "card": "report_figures('done', 'no card', name='A Card')",
    "good": "report_figures('done', 'well', tokens_per_second=5.0)",
    "raises": "raise MemoryError('CUDA out of memory')",
    "hangs": "report_figures('partial', 'begun', tokens_per_second=3.0); time.sleep(60)",
    "dies": "os.abort()",
}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Small programs in the place of parts: {name: its code}, which a test may change."""
    for table in ("PARTS", "PROOFS", "SPEED", "LONG"):
        monkeypatch.setattr(gpu, table, {})

    def write(name, code):
        path = tmp_path / f"{name}.py"
        path.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
                        f"from bench.common import report_figures\n{code}\n")
        gpu.PARTS[name] = gpu.Part(os.path.relpath(path, common.BENCH), name, 1, 30)
        if name != "card":
            gpu.SPEED[name] = gpu.PARTS[name]

    for name, code in PROGRAMS.items():
        write(name, code)
    gpu.PARTS["hangs"] = gpu.Part(gpu.PARTS["hangs"].file, "hangs", 1, 2)
    return write


def run_parts_of_test(folder, *names, budget=60):
    """(what the results say of each part, the page)."""
    asked = gpu.parse_arguments(["--only", ",".join(names), "--results", str(folder),
                                 "--budget", str(budget)])
    failed = gpu.measure(asked)
    result = json.loads((folder / "gpu-a-card.json").read_text())
    assert failed == sum(result["parts"][name]["status"] == "failed" for name in names)
    return result["parts"], (folder / "gpu-a-card.md").read_text()


def test_failing_parts_are_rows_and_the_next_part_follows(programs, tmp_path):
    parts, page = run_parts_of_test(tmp_path, "raises", "hangs", "dies", "good")
    assert parts["good"]["status"] == "done" and parts["good"]["tokens_per_second"] == 5
    assert "MemoryError: CUDA out of memory" in parts["raises"]["says"]
    assert any("Traceback" in line for line in parts["raises"]["last_lines"])
    assert parts["hangs"]["says"] == "killed after 2 s"
    assert parts["hangs"]["tokens_per_second"] == 3 and parts["hangs"]["seconds"] < 20
    assert parts["dies"]["says"].startswith("ended with -6")
    assert "failed: killed after 2 s" in page and "A Card" in page
    good = next(line for line in page.splitlines() if line.startswith("| good "))
    assert good.split("|")[3].strip() == "5"


def test_a_later_run_replaces_its_parts_and_no_other(programs, tmp_path):
    first, _ = run_parts_of_test(tmp_path, "raises", "good")
    programs("raises", "report_figures('done', 'mended', tokens_per_second=7.0)")
    second, page = run_parts_of_test(tmp_path, "raises")
    assert second["good"] == first["good"]
    assert second["raises"]["says"] == "mended" and "last_lines" not in second["raises"]
    assert "| raises" in page and "| good" in page


def test_parts_without_time_are_named_and_replace_nothing(programs, tmp_path):
    first, _ = run_parts_of_test(tmp_path, "good")
    gpu.PARTS["good"] = gpu.Part(gpu.PARTS["good"].file, "good", 900, 900)
    gpu.PARTS["dies"] = gpu.Part(gpu.PARTS["dies"].file, "dies", 900, 900)
    second, page = run_parts_of_test(tmp_path, "good", "dies")
    assert second["good"] == first["good"]
    assert second["dies"]["status"] == "not run" and second["dies"]["says"] == "no time left"


def test_results_are_written_after_each_part(programs, tmp_path):
    """A run that is killed leaves what it has found."""
    programs("hangs", f"import json; f = json.load(open({str(tmp_path / 'gpu-a-card.json')!r})); "
                      "report_figures('done', 'read: ' + f['parts']['good']['says'])")
    parts, _ = run_parts_of_test(tmp_path, "good", "hangs")
    assert list(gpu.PARTS) == ["card", "good", "raises", "hangs", "dies"]
    assert parts["hangs"]["says"] == "read: well"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_no_child_behind(tmp_path, number):
    """Ctrl-C, or `timeout`, during a part: the parts that wait are not begun."""
    (tmp_path / "slow.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'begun')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "time.sleep(60)\n")
    slow = os.path.relpath(tmp_path / "slow.py", common.BENCH)
    code = ("import sys; from bench import gpu; from errors import run_script\n"
            f"slow = gpu.Part({slow!r}, '')\n"
            "gpu.PARTS.update(dict.fromkeys(['steps', 'decode', 'recipe'], slow))\n"
            "gpu.run_one, run = lambda name, *rest: ({'status': 'done', 'says': '', 'name': 'A',\n"
            "    'seconds': 0, 'command': '', 'date': '', 'commit': ''} if name == 'card' else\n"
            "    run(name, *rest)), gpu.run_one\n"
            "run_script(gpu.main)\n")
    command = [sys.executable, "-c", code, "--only", "steps,decode,recipe", "--at-once", "2",
               "--results", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        children = wait_for_lines(tmp_path / "begun", 2)
        process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert len((tmp_path / "begun").read_text().split()) == 2
    time.sleep(0.2)
    for child in children:
        assert not os.path.exists(f"/proc/{child}"), child


def wait_for_lines(path, count):
    """The lines of a file once it has so many."""
    end = time.time() + 30
    while time.time() < end:
        lines = path.read_text().split() if path.is_file() else []
        if len(lines) == count:
            return lines
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def test_a_machine_without_a_card_is_told_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match="finds no CUDA or ROCm card"):
        gpu.measure(gpu.parse_arguments(["--all", "--results", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


def test_a_child_that_does_not_die_is_left_behind(monkeypatch):
    """A process that waits for a driver cannot be killed; its benchmark goes on."""
    monkeypatch.setattr(common, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(common, "kill_family", lambda pid: None)
    child = run_child([sys.executable, "-c", "import time; time.sleep(3)"], limit=0.3,
                      must_work=False)
    assert child.code == -9 and child.seconds < 2


# ---- from end to end -----------------------------------------------------------------------------


@slow
def test_the_command_needs_only_the_packages_of_requirements(tmp_path):
    """The real command with real parts, where any other package raises when it is imported."""
    block = ("import sys\nclass Block:\n"
             "    def find_spec(self, name, path=None, target=None):\n"
             "        if name in ('transformers', 'peft', 'datasets', 'accelerate', 'pandas',\n"
             "                    'matplotlib', 'pyarrow', 'scipy', 'bitsandbytes', 'jieba',\n"
             "                    'nltk', 'sentencepiece', 'tiktoken', 'pytest', 'bench.cpu'):\n"
             "            raise ModuleNotFoundError(f'blocked: {name}')\n"
             "sys.meta_path.insert(0, Block())\n")
    (tmp_path / "sitecustomize.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--only", "waits,decode-1", "--device", "cpu",
         "--tiny", "--results", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "POCKET_SHARED": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    path, = tmp_path.glob("gpu-tiny-*.json")
    parts = json.loads(path.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "card": "done", "waits": "skipped", "decode-1": "done"}
    page = path.with_suffix(".md").read_text()
    assert "CUDA only" in page and "a rehearsal without a card" in page
    assert "python bench/gpu_speed.py decode-1 --device cpu --tiny" in page
    assert page in done.stdout
