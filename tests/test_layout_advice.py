"""runtime/layout_advice.py: bytes that collectives were given, and the first layout that fits.

fork_ranks.py starts three ranks on the CPU (gloo), which count the bytes of their collectives in a
step.
"""
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import train
from checkpoint.read_config import read_model_config
from lora import LoRAConfig
from runtime import layout_advice
from runtime.layout_advice import (LAYOUTS, PartOfStep, layouts_for, own_workload, ring_bytes,
                                   stage_workloads, traffic_of)
from runtime.memory import Workload, model_without_storage
from settings.config import Config
from tests.common import ROOT, refusal
from tests.ranks import COMMON, DENSE, forked, outcomes, small_world, tiny_model

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)      # see tests/test_fsdp.py
WORLD = 3
STEPS = 2
PASSES = 2
WORKER = '''
import json, os, sys
sys.path.insert(0, ROOT)
from tests.common import leave_with_parent
leave_with_parent()
import torch, train
import torch.distributed as dist
from errors import run_script
from runtime import run as runtime_run
joined, found, counting, rank = [], {}, [False], os.environ["RANK"]

def start(device, timeout):
    joined.extend([] if joined else [start_ranks(device, timeout)])
    return joined[0]

def counted(kind, name, argument, keyword):
    call = getattr(dist, name, None)
    def wrapped(*args, **kwargs):
        tensor = args[argument] if len(args) > argument else kwargs[keyword]
        counts = (torch.float64, torch.int64)                   # losses, and numbers of tokens
        if counting[0] and tensor.dtype not in counts:
            sent[kind] = sent.get(kind, 0) + tensor.nbytes
        return call(*args, **kwargs)
    if call:                                    # torch 2.13 has other names
        setattr(dist, name, wrapped)

def switched(name, on):
    call = getattr(train.Run, name)
    def wrapped(*args):
        counting[0] = on
        if on:
            targets = [batch.targets for batch in args[1].batches]
            parts.append([len(targets), sum(map(len, targets)), sum(int((t >= 0).sum())
                                                                    for t in targets)])
        return call(*args)
    setattr(train.Run, name, wrapped)

start_ranks, train.start_ranks = train.start_ranks, start
end_ranks, runtime_run.end_ranks = runtime_run.end_ranks, lambda: None
switched("begin_step", True)
switched("log_step", False)
counted("all_reduce", "all_reduce", 0, "tensor")
counted("all_to_all", "all_to_all_single", 1, "input")
counted("send", "isend", 0, "tensor")
for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
    counted("reduce_scatter", name, 1, "input")
for name in ("all_gather_into_tensor", "all_gather_single"):
    counted("all_gather", name, 0, "output_tensor")

def main(argv):
    global sent, parts
    for name, arguments in json.load(open(argv[0])):
        sent, parts = found[name] = {}, []
        train.main(arguments)
    json.dump(found, open(argv[0] + ".found" + rank, "w"))
    end_ranks()

run_script(main)
'''
TYPES = ("full", "lora")
# heads and token ids that three processes can share
THIRDS = DENSE | dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, vocab_size=1602)
MEASURED = [replace(layout, settings=layout.settings | {layout.size_key: WORLD})
            if layout.size_key else layout
            for layout in LAYOUTS if "offload_optimizer" not in layout.settings]
MODELS = {"tensor_parallel_size": "thirds", "context_parallel_size": "thirds",
          "expert_parallel_size": "mixture", "pipeline_parallel_size": "deep"}     # else dense


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder with runs.found0 to 2: {"full zero_stage=1": [{collective: bytes of STEPS steps},
    [(passes, tokens, labels) of a step, …]], …}"""
    here = tmp_path_factory.mktemp("layouts")
    small_world(here)
    tiny_model(here / "thirds", THIRDS)
    tiny_model(here / "deep", DENSE | dict(num_hidden_layers=3))
    (here / "worker.py").write_text(WORKER.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    todo = []
    for kind in TYPES:
        for layout in MEASURED:
            if "fsdp" in layout.settings and OLD:
                continue
            name = f"{kind} {layout.in_words()}"
            settings = COMMON | dict(
                model_name_or_path=f"{here}/{MODELS.get(layout.size_key, 'dense')}",
                dataset=f"{here}/rows.jsonl", output_dir=f"{here}/{name}", finetuning_type=kind,
                max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=PASSES,
                join_micro_batches=False)
            if layout.size_key and kind == "lora":      # blocks computed again, and their sums
                settings |= dict(disable_gradient_checkpointing=False, lora_target="all,experts")
            if layout.size_key != "expert_parallel_size":
                settings.pop("lora_target", None)
            words = [] if layout.name else layout.in_words().split()
            todo.append((name, [f"{key}={value}" for key, value in settings.items()] + words))
    (here / "runs").write_text(json.dumps(todo))
    (code, screen, _), = outcomes(forked(WORLD, here / "worker.py", here / "runs"))
    assert code == 0, screen[-6000:]
    assert OLD or "FutureWarning" not in screen, screen[-6000:]     # torch 2.4 warns of itself
    return here


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", MEASURED, ids=lambda layout: layout.in_words())
def test_bytes_are_those_that_the_collectives_were_given(here, kind, layout):
    """Exactly, on all ranks together; 1,600 rows and others are no multiple of three ranks."""
    if "fsdp" in layout.settings and OLD:
        pytest.skip("fully_shard without GPUs needs torch 2.13")
    model = MODELS.get(layout.size_key, "dense")
    targets = ["all", "experts"] if model == "mixture" else "all"
    lora = LoRAConfig(r=4, lora_alpha=8, target_modules=targets) if kind == "lora" else None
    config = Config(finetuning_type=kind)
    workload = Workload(read_model_config(here / model), lora, [[1]], torch.float32, "plain",
                        "cpu", world=WORLD, recompute=["block" if lora else "none"] * 2)
    workload = replace(workload, model=model_without_storage(config, workload))
    if layout.size_key == "pipeline_parallel_size":
        own = stage_workloads(config, workload, WORLD)
    else:
        own = [own_workload(layout, config, workload)] * WORLD
    measured, planned = Counter(), Counter()
    for rank in range(WORLD):
        found = json.loads((here / f"runs.found{rank}").read_text())
        sent, steps = found[f"{kind} {layout.in_words()}"]
        measured.update(sent)
        for step in steps:
            traffic = traffic_of(own[rank], layout.size, PartOfStep(*step))
            for (name, _), n in layout.sent(traffic).items():
                planned[name] += n
    assert measured == planned and measured.total() > 0


def test_bytes_of_a_ring():
    assert ring_bytes({("all_reduce", 4): 100}) == 150
    assert ring_bytes({("reduce_scatter", 4): 100, ("all_gather", 4): 100}) == 150
    assert ring_bytes({("all_reduce", 1): 100, ("all_to_all", 2): 10}) == 5
    assert ring_bytes({("send", 2): 100}) == 100


# ---- the advice ----------------------------------------------------------------------------------


def dry_run(here, capsys, *more) -> str:
    settings = COMMON | dict(
        model_name_or_path=f"{here}/dense", dataset=f"{here}/rows.jsonl", finetuning_type="full",
        output_dir=f"{here}/dry", dry_run=True, offload_activations=False, mlp_tile=0, cards=4,
        per_device_train_batch_size=1, join_micro_batches=False, link_speed="300,1",
        disable_gradient_checkpointing=False)
    train.main([*(f"{key}={value}" for key, value in settings.items()), *more])
    return capsys.readouterr().out


def kib_held(page: str) -> dict[str, float]:
    """{layout: KiB of a rank} of a printed table."""
    rows = re.findall(r"^  (\S.{36,40}?) +([\d.,]+) (KiB|MiB) ", page, re.MULTILINE)
    return {name.strip(): float(n) * (1024 if unit == "MiB" else 1) for name, n, unit in rows}


@pytest.fixture
def world(tmp_path):
    small_world(tmp_path)
    return tmp_path


def test_the_first_layout_that_fits_is_advised(world, capsys):
    """Card memory just above what a layout needs, from the largest to none."""
    page = dry_run(world, capsys, "card_memory=1")
    held = kib_held(page)
    assert "take data parallelism: all of it fits one card" in page
    assert "a step has 4 rows then and not 1" in page
    names = list(held)
    tried = layouts_for(4, read_model_config(world / "dense"))
    assert names == [layout.in_words() for layout in tried
                     if layout.size < 4 or layout.size_key == "context_parallel_size"]
    assert "not with these settings: tensor_parallel_size=4 (tensor_parallel_size: 4 does not " \
        "divide num_key_value_heads: 2" in page
    largest = max(held.values()) + 1
    for name in names:
        if held[name] < largest and name != "zero_stage=2":     # whose buffers are a whole here
            largest = held[name]
            gib = held[name] / 0.9 / 2**20 * 1.001
            page = dry_run(world, capsys, f"card_memory={gib}")
            assert f"take {name}: " in page, page
            words = "" if name == "data parallelism" else f" {name}"
            assert f"--nproc-per-node 4 train.py{words}\n" in page


def test_experts_are_dealt_out_where_they_are_too_many(world, capsys):
    """For a model with experts, before its weights are sharded; not for others."""
    mixture = (f"model_name_or_path={world}/mixture", "finetuning_type=lora")
    held = kib_held(dry_run(world, capsys, *mixture, "card_memory=1"))
    assert [name for name in held if "expert" in name] == [
        f"expert_parallel_size={size}" for size in (2, 4)]
    for size in (2, 4):
        gib = held[f"expert_parallel_size={size}"] / 0.9 / 2**20 * 1.001
        page = dry_run(world, capsys, *mixture, f"card_memory={gib}")
        assert f"take expert_parallel_size={size}: the experts of all layers do not fit" in page
    page = dry_run(world, capsys, *mixture, "card_memory=1", "cards=3")
    assert "expert_parallel_size=3 " in page and "tensor_parallel_size=3 (" in page


def test_the_step_of_the_busiest_rank_is_planned(here, capsys, monkeypatch):
    """Its passes, tokens and labels are those that the ranks had in their first step."""
    found = []
    part_of_step = layout_advice.part_of_step
    monkeypatch.setattr(layout_advice, "part_of_step",
                        lambda *args: found.append(part_of_step(*args)) or found[-1])
    dry_run(here, capsys, "cards=3", "card_memory=1", f"gradient_accumulation_steps={PASSES}")
    steps = [json.loads((here / f"runs.found{rank}").read_text())["full zero_stage=1"][1][0]
             for rank in range(WORLD)]
    assert found[0] == PartOfStep(*max(steps))


def test_what_would_help_where_nothing_fits(world, capsys):
    page = dry_run(world, capsys, "card_memory=0.0001")
    assert "no layout fits" in page
    assert "tensor_parallel_size over more cards cuts every matrix further" in page
    page = dry_run(world, capsys, "card_memory=0.001", "disable_gradient_checkpointing=true",
                   "per_device_train_batch_size=16")
    assert "context_parallel_size cuts them over more cards" in page


def test_a_pipeline_is_advised_with_its_bubble(world, capsys):
    """(p - 1) / (m + p - 1) for 2 stages and 3 micro-batches is in the row and in the time."""
    more = ("gradient_accumulation_steps=3", "card_speed=0.001", "finetuning_type=lora",
            "cards=2")
    page = dry_run(world, capsys, "card_memory=1", *more)
    assert re.search(r"\n  pipeline_parallel_size=2 .* fits, bubble 25%\n", page)
    seconds = float(re.search(r"computing takes ([\d.e-]+) s", page)[1])
    own = float(re.search(r"with pipeline_parallel_size=2 it takes ([\d.e-]+) s, the bubble "
                          r"included: 25% of the step", page)[1])
    assert own == pytest.approx(seconds / 2 * 4 / 3, rel=0.01)


def test_the_least_time_of_a_run_is_that_of_its_arithmetic(world, capsys, monkeypatch):
    """A dry run without `cards`: seconds of a step as card_speed gives them, times the steps."""
    page = dry_run(world, capsys, "card_memory=1", "cards=1", "card_speed=0.001")
    seconds = float(re.search(r"computing takes ([\d.e-]+) s", page)[1])
    monkeypatch.setattr("runtime.setup.matrix_rate", lambda *_: 1e9)
    page = dry_run(world, capsys, "cards=null", "link_speed=", "max_steps=5000")
    found = re.search(r"time: at least (\d+):(\d\d):(\d\d) for 5000 steps, ([\d.e-]+) s", page)
    assert float(found[4]) == pytest.approx(seconds, rel=0.01)
    whole = 3600 * int(found[1]) + 60 * int(found[2]) + int(found[3])
    assert whole == pytest.approx(5000 * seconds, rel=0.02, abs=1)


def test_a_slow_link_is_said(world, capsys):
    page = dry_run(world, capsys, "card_memory=1", "card_speed=1", "link_speed=0.001")
    assert "at 0.001 GB/s a step sends for longer than it computes" in page
    assert "computing takes" in page


def test_layouts_that_the_settings_exclude_are_named(world, capsys):
    page = dry_run(world, capsys, "card_memory=1", "use_muon=true")
    assert "not with these settings: zero_stage=1; zero_stage=2; zero_stage=2 offload" in page
    assert "zero_stage" not in dry_run(world, capsys, "card_memory=1", "cards=1")


@pytest.mark.parametrize("settings, words", [
    ("cards=4 card_memory=8", "are for the advice of dry_run: true"),
    ("cards=4 dry_run=true", "cards and card_memory (GiB of each) belong together"),
    ("link_speed=3 dry_run=true", "set cards and card_memory, too"),
    ("cards=4 card_memory=8 link_speed=0,3 dry_run=true", "link_speed is in GB/s, above 0"),
])
def test_settings_that_do_not_fit_together(settings, words):
    assert words in refusal("model_name_or_path=m", "dataset=d", "output_dir=o",
                            *settings.split(), script="train")
