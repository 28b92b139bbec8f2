"""bench/: arithmetic by hand, measurements of a known child process, and each script end to end."""
import ast
import json
import re
import subprocess
import sys

import pytest
import torch

from runtime import throughput as speed
from bench import common, cpu, random_model, scaling
from bench.common import (Child, curves, in_turn, medians, ratios, run_child, slug, table,
                          training_figures)
from checkpoint.load import load_model
from checkpoint.read_config import model_config
from lora import LoRAConfig, attach_lora
from model import CausalLM
from tests.common import ROOT, needs_shared, slow

MIB = 2**20
TEXT = ["--data", str(ROOT / "data"), "--tokenizer", str(ROOT / "models/tiny"),
        "dataset=identity,tiny_review", "template=chatml"]


def python(code):
    return [sys.executable, "-c", code]


# ---- measuring a child process -------------------------------------------------------------------


def test_lines_of_a_child_have_their_times(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("a line of an earlier run\n")
    child = run_child(python("import time\nprint('one'); time.sleep(0.4); print('two', end='')\n"
                             f"open({str(log)!r}, 'w').write('written\\n'); time.sleep(0.2)"),
                      watch=log)
    (first, one), (second, two) = child.lines
    assert (one, two) == ("one", "two") and child.code == 0
    assert 0.35 < second - first < 5 and child.seconds >= 0.6
    assert [line for _, line in child.watched] == ["written"] and child.watched[0][0] > first


def test_peak_memory_of_the_largest_process_and_of_all():
    """Measured by a small program, as the scripts are: memory of this process would count for its
    children."""
    inner = f"x = bytearray({200 * MIB}); import time; time.sleep(1)"
    family = (f"import subprocess, sys; x = bytearray({300 * MIB}); "
              f"subprocess.run([sys.executable, '-c', {inner!r}])")
    code = ("import json, sys; from bench.common import run_child\n"
            "programs = json.loads(sys.argv[1])\n"
            "print([run_child([sys.executable, '-c', p]).peak_bytes for p in programs])")
    asked = json.dumps(["pass", f"x = bytearray({300 * MIB})", family])
    found = subprocess.run([*python(code), asked], cwd=ROOT, capture_output=True, text=True,
                           check=True)
    idle, alone, both = json.loads(found.stdout)
    assert 290 * MIB < alone - idle < 310 * MIB
    if sys.platform == "linux":
        assert 480 * MIB < both - idle < 530 * MIB


def test_a_child_that_fails_or_lasts_too_long():
    with pytest.raises(RuntimeError, match="ended with 3:\nwhat went wrong"):
        run_child(python("import sys; print('what went wrong'); sys.exit(3)"))
    assert run_child(python("raise SystemExit(3)"), must_work=False).code == 3
    late = run_child(python("import time; time.sleep(60)"), must_work=False, limit=0.5)
    assert late.code == -9 and late.seconds < 30


def test_figures_of_a_training_run():
    """Steps at 10, 12, 14 and 20 s with 100, 200, 300 and 600 tokens: after two of them 900 tokens
    in 8 s."""
    lines = [
        (at, json.dumps({"loss": loss, "total_tokens": total}))
        for at, loss, total in ((10, 3.0, 100), (12, 2.0, 300), (14, 1.0, 600), (20, 0.5, 1200))
    ] + [(21, '{"epoch": 1.0}')]
    found = training_figures(Child(22.0, 5, 30.0, 0, watched=lines), warm_up=2)
    assert found["tokens_per_second"] == 900 / 8
    assert found["median_step_tokens_per_second"] == (150 + 100) / 2
    assert found["first_step_seconds"] == 10 and found["tokens"] == [100, 200, 300, 600]
    assert found["losses"] == [3.0, 2.0, 1.0, 0.5] and found["peak_bytes"] == 5
    with pytest.raises(ValueError, match="4 steps were logged, and the first 3 are not counted"):
        training_figures(Child(22.0, 5, 30.0, 0, watched=lines), warm_up=3)


def test_curves_must_be_of_the_same_rows():
    ours = {"tokens": [5, 7], "losses": [2.0, 1.5]}
    assert "largest difference of the losses: 0.2500" in curves(
        ours, {"tokens": [5, 7], "losses": [2.0, 1.25]}
    )
    with pytest.raises(ValueError, match="step 2: ours counts 7 tokens, the peer 8"):
        curves(ours, {"tokens": [5, 8], "losses": [2.0, 1.5]})


def test_rounds_medians_and_ratios():
    called = []
    runs = in_turn({"ours": lambda: called.append("a") or {"seconds": len(called), "losses": [1]},
                    "peer": lambda: called.append("b") or {"seconds": 10 * len(called)}}, 3)
    assert called == ["a", "b"] * 3
    summary = {name: medians(found) for name, found in runs.items()}
    assert summary == {"ours": {"seconds": 3}, "peer": {"seconds": 40}}
    assert ratios(summary) == {"seconds": 40 / 3}


def test_goals_are_met_or_not():
    theirs = {"tokens_per_second": 100, "median_step_tokens_per_second": 100,
              "first_step_seconds": 20, "peak_bytes": 4 * 2**30, "seconds": 90}
    ours = {"tokens_per_second": 301, "median_step_tokens_per_second": 299,
            "first_step_seconds": 5.1, "peak_bytes": 2 * 2**30, "seconds": 30}
    lines = cpu.compare({"ours": ours, "peer": theirs}).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["yes", "no", "no", "yes", ""]
    assert "3.01" in lines[0] and "2.00" in lines[3] and "4.00" in lines[3]


def test_results_have_the_common_fields(tmp_path):
    path = common.save("cpu", {"ours": [{"seconds": 1.0}], "peer": [{"seconds": 3.0}]}, versions={},
                       dtype="float32", seed=1, settings={}, gpu="A Card", folder=tmp_path, extra=5)
    result = json.loads(path.read_text())
    assert path.name == "cpu-a-card.json"
    assert result["ratios"] == {"seconds": 3.0}
    assert result["extra"] == 5
    assert {"script", "command", "commit", "date", "machine", "versions", "dtype", "seed",
            "settings", "runs", "summary", "ratios"} <= set(result)
    assert slug({"cpu": "Some CPU (R) @ 2.0GHz", "cores": 2}) == "some-cpu-r-2-0ghz-2-cores"


def test_without_git_the_commit_is_unknown(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]+\+?|unknown", common.commit())
    monkeypatch.setenv("PATH", "")
    assert common.commit() == "unknown"


def test_tables_are_aligned():
    lines = table(["what", "figure"], [["8b-8k", "1,234"], ["share", "≥ 5%"]]).splitlines()
    assert lines == ["| what  | figure |", "|-------|-------:|", "| 8b-8k |  1,234 |",
                     "| share |   ≥ 5% |"]


def test_the_environment_of_the_peer(tmp_path):
    with pytest.raises(FileNotFoundError, match="--peer-python"):
        common.peer_python("nothing", given=tmp_path / "python")
    (tmp_path / "installed.txt").write_text("something==1")
    assert common.peer_python("something==1", folder=tmp_path) == str(tmp_path / "bin/python")
    found = common.versions_of(sys.executable, "torch", "a-package-that-is-not")
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert "a-package-that-is-not" not in found


# ---- shapes and FLOPs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, published",
    [("llama-3-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512), ("qwen2.5-0.5b", 494_032_768),
     ("qwen3-30b-a3b", 30_532_122_624)],
)
def test_shapes_have_the_published_number_of_parameters(shape, published):
    """All layers are alike: models of one layer and of two are counted."""
    layers = random_model.raw_config(shape)["num_hidden_layers"]
    one, two = (parameters_of(random_model.raw_config(shape, num_hidden_layers=n)) for n in (1, 2))
    assert one + (layers - 1) * (two - one) == published


def parameters_of(raw: dict) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CausalLM(model_config(raw)).parameters())


def test_flops_of_llama_3_8b_by_hand():
    """Blocks of 218,103,808 weights, a head of 525,336,576, 41,943,040 in adapters; 2,049 / 2
    query-key pairs a token."""
    with torch.device("meta"):
        model = CausalLM(model_config(random_model.raw_config("llama-3-8b")))
    attach_lora(model, LoRAConfig(16, 32, target_modules="all"))
    counted = (speed.training_flops(model.config, *speed.matmul_parameters(model), [2048, 2048])
               / 4096)
    byhand = 4 * (32 * 218_103_808 + 525_336_576) + 6 * 41_943_040 + 3 * 4 * 4096 * 32 * 2049 / 2
    assert counted == pytest.approx(byhand, rel=1e-9) and counted == pytest.approx(31.9e9, rel=1e-3)


def test_flops_of_the_scaling_model_equal_runtime_throughput():
    with torch.device("meta"):
        model = CausalLM(model_config(random_model.raw_config("small", num_hidden_layers=2)))
    attach_lora(model, LoRAConfig(16, 32, target_modules="all"))
    counted = speed.training_flops(model.config, *speed.matmul_parameters(model), [300])
    assert scaling.flops(300, 2, 16) == pytest.approx(counted, rel=1e-9)


def test_growth_between_lines():
    assert scaling.growth([1.0, 2.0, 5.0]) == ["", "2.00", "2.50"]
    assert scaling.growth([0, 2]) == ["", ""]


def test_random_checkpoints_are_the_same_for_the_same_seed(tmp_path):
    raw = random_model.raw_config("tiny", vocab_size=1600)
    first, second = (random_model.random_model(raw, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert float(first["lm_head.weight"].std()) == pytest.approx(0.02, rel=0.02)
    random_model.make_checkpoint(tmp_path / "model", raw, ROOT / "models/tiny")
    # not that of models/tiny
    assert json.loads((tmp_path / "model/config.json").read_text()) == raw
    assert (tmp_path / "model/tokenizer.json").is_file()


def test_a_random_checkpoint_with_a_tied_head_is_read(tmp_path):
    raw = random_model.raw_config("tiny", vocab_size=1600, tie_word_embeddings=True)
    made = random_model.make_checkpoint(tmp_path, raw, ROOT / "models/tiny")
    read = load_model(tmp_path, torch.float32)
    assert read.lm_head.weight.equal(made.model.embed_tokens.weight)


def test_rows_that_are_long_enough():
    [row] = common.long_rows(1, 1000)
    assert len(row["output"]) == 8000 and row["instruction"]


# ---- from end to end -----------------------------------------------------------------------------


@slow
def test_cpu_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(sys, "argv",
                        ["cpu.py", "--tiny", "--no-peer", "--busy", "--times", "1", "--steps", "4",
                         "--warm-up", "1", "--results", str(tmp_path), *TEXT])
    cpu.main()
    [path] = tmp_path.glob("cpu-*.json")
    runs = json.loads(path.read_text())["runs"]
    [run], [busy] = runs["ours"], runs["ours, busy"]
    assert busy["losses"] == run["losses"] and "busy / quiet" in capsys.readouterr().out
    # log 128,256
    assert len(run["losses"]) == 4 and run["losses"][0] == pytest.approx(11.76, abs=0.2)
    assert run["tokens_per_second"] > 0 and run["peak_bytes"] > 100 * MIB


@slow
def test_scaling_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "WORK", tmp_path)
    monkeypatch.setattr(common, "SHARED", tmp_path)
    monkeypatch.setattr(sys, "argv",
                        ["scaling.py", "--quick", "--only", "lora_rank", "--steps", "4"])
    found = scaling.measure("lora_rank", 8, type("Asked", (), {"steps": 4}))
    assert found["size"] == 8
    assert found["tokens"] == [1024] * 4
    assert found["peak_bytes"] >= found["idle_bytes"] > 0
    assert found["step_seconds"] == pytest.approx(1024 / found["tokens_per_second"])
    assert "| lora_rank |" in scaling.axis_table("lora_rank", [found, found | {"size": 16}])


@slow
def test_rollouts_from_end_to_end(tmp_path):
    command = [sys.executable, ROOT / "bench/grpo.py", "--no-peer", "--times", "1", "--steps", "5",
               "--prompts", "2", "--answers", "2", "--tokens", "6", "--results", tmp_path]
    found = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    result, = (json.loads(path.read_text()) for path in tmp_path.glob("grpo-*.json"))
    run, = result["runs"]["ours"]
    assert run["samples_per_second"] == pytest.approx(4 / run["step_seconds"])
    assert 1 <= run["length"] <= 6 and 0 <= run["reward"] <= 1


@slow
@needs_shared
def test_memory_of_gptq_from_end_to_end(tmp_path):
    command = [sys.executable, ROOT / "bench/gptq_memory.py", "--tiny", "--no-peer", "--results",
               tmp_path]
    found = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    result, = (json.loads(path.read_text()) for path in tmp_path.glob("gptq_memory-*.json"))
    run, = result["runs"]["ours"]
    plain = 2 * 128256 * 64 * 2                     # embedding and head, which keep 16 bits
    assert run["peak_bytes"] > 100 * MIB and plain < run["written_bytes"] < 1.05 * plain
    assert "| one block, float32" in found.stdout


@slow
def test_what_processes_hold_and_send(tmp_path):
    """Of data parallelism: the gradients, once; a block's spans follow each other."""
    command = [sys.executable, ROOT / "bench/parallelism.py", "--only", "dp", "--results", tmp_path,
               "--pictures", tmp_path / "pictures"]
    found = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    result, = (json.loads(path.read_text()) for path in tmp_path.glob("parallelism-*.json"))
    first, second = result["runs"]["dp"]
    assert first["loss"] == second["loss"] and first["collectives"] == 1
    assert first["handed in MiB"] == first["gradients MiB"] == first["trained weights MiB"]
    assert first["optimizer state MiB"] == pytest.approx(2 * first["gradients MiB"], abs=0.02)
    spans = json.loads((ROOT / "bench/.work/parallelism/dp/process-0.json").read_text())["spans"]
    blocks = [span["label"] for span in spans if span["kind"] in ("forward", "backward")]
    assert blocks[:5] == ["block 0", "block 1", "block 2", "block 3", "head"]
    assert blocks[5:10] == ["head", "block 3", "block 2", "block 1", "block 0"]


# ---- the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.name)
def test_every_file_names_its_command_and_what_to_read(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10)))
    assert re.search(r"^Next: ", text, re.MULTILINE)
    if path.name not in ("common.py", "parallelism_worker.py"):     # not typed
        assert f"python bench/{path.name}" in text
    named = re.findall(r"[\w./]+\.(?:py|md)\b", text)
    missing = [name for name in named
               if not any((folder / name).is_file() for folder in (ROOT, ROOT / "bench"))]
    assert not missing, missing


def test_the_page_on_speed_names_every_benchmark():
    text = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "bench").glob("*.py")} - {
        "common.py", "random_model.py", "peer_hf.py", "parallelism_worker.py"
    }
    assert scripts <= set(re.findall(r"bench/(\w+\.py)", text))
