"""runtime/layout_advice.py: bytes that collectives were given, and the first layout that fits.

torchrun starts three ranks on the CPU (gloo), which count the bytes of their collectives in a step.
"""
import json
import re

import pytest
import torch

import train
from config import Config
from families import read_model_config
from lora import LoRAConfig
from runtime.layout_advice import LAYOUTS, Traffic, ring_bytes
from runtime.memory import Workload, model_without_storage
from tests.common import ROOT, refusal
from tests.ranks import COMMON, outcomes, small_world, torchrun

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
        if counting[0] and tensor.dtype != torch.float64:       # counts and losses are float64
            sent[kind] = sent.get(kind, 0) + tensor.nbytes
        return call(*args, **kwargs)
    if call:                                    # torch 2.13 has other names
        setattr(dist, name, wrapped)

def switched(name, on):
    call = getattr(train.Run, name)
    def wrapped(*args):
        counting[0] = on
        return call(*args)
    setattr(train.Run, name, wrapped)

start_ranks, train.start_ranks = train.start_ranks, start
end_ranks, runtime_run.end_ranks = runtime_run.end_ranks, lambda: None
switched("begin_step", True)
switched("log_step", False)
counted("all_reduce", "all_reduce", 0, "tensor")
for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
    counted("reduce_scatter", name, 1, "input")
for name in ("all_gather_into_tensor", "all_gather_single"):
    counted("all_gather", name, 0, "output_tensor")

def main(argv):
    global sent
    for name, arguments in json.load(open(argv[0])):
        sent = found[name] = {}
        train.main(arguments)
    if rank == "1":
        json.dump(found, open(argv[0] + ".found", "w"))
    end_ranks()

run_script(main)
'''
TYPES = ("full", "lora")
MEASURED = [layout for layout in LAYOUTS if "offload_optimizer" not in layout.settings]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder with runs.found: {"full zero_stage=1": {collective: bytes of STEPS steps}, …}"""
    here = tmp_path_factory.mktemp("layouts")
    small_world(here)
    (here / "worker.py").write_text(WORKER.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    todo = []
    for kind in TYPES:
        for layout in MEASURED:
            if "fsdp" in layout.settings and OLD:
                continue
            name = f"{kind} {layout.in_words()}"
            settings = COMMON | dict(
                model_name_or_path=f"{here}/dense", dataset=f"{here}/rows.jsonl",
                output_dir=f"{here}/{name}", finetuning_type=kind, max_steps=STEPS,
                per_device_train_batch_size=1, gradient_accumulation_steps=PASSES,
                join_micro_batches=False)
            words = [] if layout.name else [layout.in_words()]
            todo.append((name, [f"{key}={value}" for key, value in settings.items()] + words))
    (here / "runs").write_text(json.dumps(todo))
    (code, screen, _), = outcomes(torchrun(WORLD, here / "worker.py", here / "runs"))
    assert code == 0 and "FutureWarning" not in screen, screen[-6000:]
    return here


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", MEASURED, ids=lambda layout: layout.in_words())
def test_bytes_are_those_that_the_collectives_were_given(here, kind, layout):
    """Exactly, for gradients and weights; 1,600 rows and others are no multiple of three ranks."""
    if "fsdp" in layout.settings and OLD:
        pytest.skip("fully_shard without GPUs needs torch 2.13")
    lora = LoRAConfig(r=4, lora_alpha=8) if kind == "lora" else None
    workload = Workload(read_model_config(here / "dense"), lora, [[1]], torch.float32, "plain",
                        "cpu")
    model = model_without_storage(Config(finetuning_type=kind), workload)
    planned = layout.sent(Traffic(model, lora is not None, WORLD, PASSES))
    measured = json.loads((here / "runs.found").read_text())[f"{kind} {layout.in_words()}"]
    assert {name: n // STEPS for name, n in measured.items()} == planned


def test_bytes_of_a_ring():
    assert ring_bytes({"all_reduce": 100}, 4) == 150
    assert ring_bytes({"reduce_scatter": 100, "all_gather": 100}, 4) == 150
    assert ring_bytes({"all_reduce": 100}, 1) == 0


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
    names = [layout.in_words() for layout in LAYOUTS]
    assert list(held) == names
    largest = max(held.values()) + 1
    for name in names:
        if held[name] < largest and name != "zero_stage=2":     # whose buffers are a whole here
            largest = held[name]
            gib = held[name] / 0.9 / 2**20 * 1.001
            page = dry_run(world, capsys, f"card_memory={gib}")
            assert f"take {name}: " in page, page
            words = "" if name == "data parallelism" else f" {name}"
            assert f"--nproc-per-node 4 train.py{words}\n" in page


def test_what_would_help_where_nothing_fits(world, capsys):
    page = dry_run(world, capsys, "card_memory=0.0001")
    assert "no layout fits" in page
    assert "tensor_parallel_size, which this table does not plan" in page
    page = dry_run(world, capsys, "card_memory=0.001", "disable_gradient_checkpointing=true",
                   "per_device_train_batch_size=16")
    assert "context parallelism, which this release has not" in page


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
