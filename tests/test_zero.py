"""scale/zero.py: runs with sharded optimizer state and gradients equal data parallelism.

fork_ranks.py starts the ranks on the CPU (gloo). Each runs WORKER: train.main on several argument
lists, one after the other, and counts what optimizer and gradients hold.
"""
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import parallel
import train
from checkpoint.read_config import model_config
from lora import trainable
from model import CausalLM, init_weights
from parallel import Ranks
from runtime import memory
from scale import zero
from scale.zero import FlatBucket
from tests.common import ROOT, refusal
from tests.ranks import COMMON, DENSE, MIXTURE, forked, outcomes, small_world

WORKER = '''
import json, os, sys
sys.path.insert(0, ROOT)
from tests.common import leave_with_parent
leave_with_parent()
import train
from errors import run_script
from runtime import run as runtime_run
joined, found, rank = [], {}, os.environ["RANK"]

def start(device, timeout):
    joined.extend([] if joined else [start_ranks(device, timeout)])
    return joined[0]

def nbytes(tensors):
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())

def finish(run, argv):
    held = run.gradients.buckets
    flats = [b.flat for b in held if b.flat is not None]
    found[name] = {
        "state": sum(t.nbytes for fields in run.optimizer.state.values() for t in fields.values()),
        "gradients": nbytes(flats + [b.part for b in held if getattr(b, "stage", 0) == 2]),
        "plan": [run.setup.memory.optimizer, run.setup.memory.gradients],
        "trained": sum(p.nbytes for p in run.weights.values()),
    }
    end(run, argv)

start_ranks, train.start_ranks = train.start_ranks, start
end_ranks, runtime_run.end_ranks = runtime_run.end_ranks, lambda: None
end, train.Run.finish = train.Run.finish, finish

def main(argv):
    global name
    for name, arguments in json.load(open(argv[0])):
        train.main(arguments)
    json.dump(found, open(argv[0] + ".found" + rank, "w"))
    end_ranks()

run_script(main)
'''
FULL = dict(finetuning_type="full", learning_rate=5e-4)
SAVES = dict(save_strategy="steps", save_steps=2, max_steps=4)
CASES = {       # 27 rows, 12 a step; the ranks have different numbers of micro-batches
    "full": dict(**FULL, **SAVES, weight_decay=0.1),
    "not clipped": dict(**FULL, max_grad_norm=0, max_steps=3),
    "experts": dict(**FULL, model_name_or_path="mixture", cutoff_len=24, max_steps=3),
    "lora": dict(loraplus_lr_ratio=4, use_dora=True, lora_target="q_proj,up_proj",
                 additional_target="embed_tokens", max_steps=3),
    "reward": dict(**FULL, stage="rm", dataset="pairs.jsonl", max_steps=2),
    "best": dict(**FULL, eval_dataset="eval.jsonl", eval_strategy="steps", save_strategy="steps",
                 eval_steps=2, save_steps=2, load_best_model_at_end=True, max_steps=4),
}
RUNS = {        # ranks: {case: its values of zero_stage beside 0}
    2: {"full": (1, 2)},
    3: {"full": (1, 2), "not clipped": (1,), "experts": (2,), "lora": (1, 2), "reward": (2,),
        "best": (1,)},
}
RESUMED = {2: (0, 2), 3: (1, 2)}        # ranks: their zero_stage, from step 2 of two in stage 1
WORLDS = tuple(RUNS)


def arguments(here, world, name, output, **more) -> list:
    """Arguments of train.py for a case: the same rows in each step with any number of ranks."""
    settings = COMMON | CASES[name] | {"pin_kernels.matmul": "torch"}   # the same bits in all runs
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=6 // world)
    for key in ("model_name_or_path", "dataset", "eval_dataset"):
        if key in settings:
            settings[key] = f"{here}/{settings[key]}"
    settings |= dict(output_dir=f"{here}/{output}", **more)
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of all runs: `1-0 full` by one process, `3-2 full` by 3 ranks in stage 2, …"""
    here = tmp_path_factory.mktemp("zero")
    small_world(here)
    (here / "worker.py").write_text(WORKER.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    for name in CASES:
        train.main(arguments(here, 1, name, f"1-0 {name}"))
    for world in WORLDS:
        todo = [(f"{stage} {name}",
                 arguments(here, world, name, f"{world}-{stage} {name}", zero_stage=stage))
                for name, stages in RUNS[world].items() for stage in (0, *stages)]
        checkpoint = dict(resume_from_checkpoint=f"{here}/2-1 full/checkpoint-2")
        todo += [(f"{stage} resumed", arguments(here, world, "full", f"{world}-{stage} resumed",
                                                zero_stage=stage, **checkpoint))
                 for stage in RESUMED[world]]
        todo += [(f"{stage} {place}", arguments(here, world, "full", f"{world}-{stage} {place}",
                                                zero_stage=stage, offload_optimizer=place))
                 for stage, place in ((1, "nvme"), (2, "cpu")) if world == 3]
        (here / f"runs{world}").write_text(json.dumps(todo))
        (code, screen, _), = outcomes(forked(world, here / "worker.py", here / f"runs{world}"))
        assert code == 0, screen[-6000:]
        (here / f"screen{world}").write_text(screen)
    return here


def curves(folder) -> list[list]:
    """[step, loss, eval_loss, gradient norm] of the log of a run."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[row.get(key, 0.0) for key in ("step", "loss", "eval_loss", "grad_norm")]
            for row in rows]


def tensors_of(folder) -> dict:
    """All tensors that a run or a checkpoint has written, but the states of the generators."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != "rng.safetensors":
            found |= {f"{path.name} {name}": t for name, t in load_file(path).items()}
    return found


def difference(a, b) -> float:
    """The largest difference of two folders' tensors, whose names and shapes are the same."""
    one, other = tensors_of(a), tensors_of(b)
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {
        n: (t.shape, t.dtype) for n, t in other.items()} and one
    return max(float((one[n] - other[n]).abs().max()) for n in one if one[n].numel())


def found_by(here, world) -> list[dict]:
    return [json.loads((here / f"runs{world}.found{rank}").read_text()) for rank in range(world)]


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("world, name, stage", [
    (world, name, stage)
    for world in RUNS for name, stages in RUNS[world].items() for stage in stages])
def test_sharded_state_equals_data_parallelism_and_one_process(here, name, stage, world):
    folder = here / f"{world}-{stage} {name}"
    plain, alone = here / f"{world}-0 {name}", here / f"1-0 {name}"
    bounds = {plain: 1e-6, alone: 1e-5}
    if name == "reward":                # the value head's dropout draws differently on each rank
        del bounds[alone]
    for other, bound in bounds.items():
        assert difference(folder, other) <= bound
        for mine, theirs in zip(curves(folder), curves(other), strict=True):
            assert mine == pytest.approx(theirs, rel=10 * bound, abs=10 * bound)
    for checkpoint in plain.glob("checkpoint-*"):
        assert difference(folder / checkpoint.name, checkpoint) <= 1e-6
        assert difference(folder / checkpoint.name, alone / checkpoint.name) <= 1e-5
        names = [sorted(path.name for path in (other / checkpoint.name).iterdir())
                 for other in (folder, alone)]
        assert names[0] == names[1]


def test_without_clipping_stage_1_is_data_parallelism_bit_for_bit(here):
    """The norm, which clipping divides by, is summed in another order; nothing else is."""
    assert difference(here / "3-1 not clipped", here / "3-0 not clipped") == 0


@pytest.mark.parametrize("world, stage", [
    (world, stage) for world, stages in RESUMED.items() for stage in stages])
def test_a_checkpoint_of_two_ranks_continues_anywhere(here, stage, world):
    """Two ranks in stage 1 wrote it; more ranks, other stages and one process resume from it."""
    assert difference(here / f"{world}-{stage} resumed", here / "1-0 full") <= 1e-5


@pytest.mark.parametrize("stage, place", [(1, "nvme"), (2, "cpu")])
def test_sharded_state_elsewhere_is_the_same_bit_for_bit(here, stage, place):
    folder, other = here / f"3-{stage} {place}", here / f"3-{stage} full"
    assert difference(folder, other) == 0
    assert difference(folder / "checkpoint-2", other / "checkpoint-2") == 0
    assert not (folder / "optimizer_state").exists()


def test_one_process_resumes_a_sharded_run(here, capsys):
    train.main(arguments(here, 1, "full", "1-0 resumed", zero_stage=2,
                         resume_from_checkpoint=f"{here}/3-2 full/checkpoint-2"))
    assert difference(here / "1-0 resumed", here / "1-0 full") <= 1e-5
    assert "note: zero_stage changes nothing with one rank" in capsys.readouterr().out


# ---- what each rank holds ------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_holds_its_part_as_planned(here, world):
    """Of the moments, and in stage 2 of the gradients; 4 bytes count the steps of a parameter."""
    for found in found_by(here, world):
        trained, steps = found["0 full"]["trained"], 4 * 25
        for stage in (1, 2):
            held = found[f"{stage} full"]
            planned_state, planned_gradients = held["plan"]
            assert held["state"] == pytest.approx(2 * trained / world + steps, abs=8 * world)
            assert held["state"] == pytest.approx(planned_state, abs=steps)
            gradients = trained if stage == 1 else trained / world
            assert held["gradients"] == pytest.approx(gradients, abs=4 * world)
            buffer = trained if stage == 2 else 0       # there is one, and it comes and goes
            assert planned_gradients == pytest.approx(gradients + buffer, abs=4 * world)


def test_the_start_page_says_what_is_sharded(here):
    screen = (here / "screen3").read_text()
    for words in ("3, each with 1/3 of the optimizer state (zero_stage: 1)",
                  "3, each with 1/3 of optimizer state and gradients (zero_stage: 2)"):
        assert words in screen


@pytest.mark.parametrize("world", (1, 2, 3, 6, 7))
def test_pieces_of_all_ranks_are_the_parameters(world):
    """Also where a part begins within a row, and where ranks have nothing."""
    sizes = [(5, 3), (2,), (2, 2, 3), (1,)]
    whole = [torch.randn(size) for size in sizes]
    pieces = [[] for _ in sizes]
    for rank in range(world):
        bucket = FlatBucket([nn.Parameter(w.clone()) for w in whole], Ranks(rank, world), stage=2)
        assert len(bucket.part) == -(-30 // world)
        for index, (piece, weight) in enumerate(zip(bucket.pieces, whole)):
            assert piece.dim() == weight.dim()
            start, stop = bucket.span(index, rank)
            assert torch.equal(piece.flatten(), weight.flatten()[start:stop])
            pieces[index].append(piece.detach().flatten().clone())
        bucket.weights.zero_()                          # the parameters are views
        assert not any(p.any() for p in (*bucket.params, *bucket.pieces))
    assert all(torch.equal(torch.cat(parts), w.flatten()) for parts, w in zip(pieces, whole))


@pytest.mark.parametrize("fields", (DENSE, MIXTURE), ids=("dense", "experts one by one"))
def test_buffers_of_stage_2_are_planned(fields, monkeypatch):
    """Bytes that are alive at once in a backward pass: two buffers, but after an expert without
    tokens all (the head's is filled and sent before)."""
    for module in (parallel, memory):
        split = module.split_by_bytes
        monkeypatch.setattr(module, "split_by_bytes", lambda weights, _, s=split: s(weights, 20000))
    sent = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(zero, "reduce_scatter", lambda *args, **more: sent)
    model = CausalLM(model_config(fields))
    init_weights(model, torch.Generator().manual_seed(0))
    gradients = zero.ZeroGradients(trainable(model), Ranks(0, 2), stage=2)
    alive = []
    buffer = FlatBucket.buffer

    def watched(bucket):
        found = buffer(bucket)
        alive.append(sum(b.flat.nbytes for b in gradients.buckets if b.flat is not None))
        return found

    monkeypatch.setattr(FlatBucket, "buffer", watched)
    gradients.zero()
    gradients.backward(model(torch.arange(3)[None]).square().sum())
    planned = memory.buffers_in_flight(model)
    assert 0.7 * planned <= max(alive) <= planned + 4 * len(gradients.buckets)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings, words", [
    ("zero_stage=3", "is fsdp: full_shard here; zero_stage is 0, 1 or 2"),
    ("zero_stage=4", "zero_stage"),
    ("zero_stage=1 fsdp=full_shard", "zero_stage and fsdp are both set"),
    ("zero_stage=1 use_muon=true", "use optim: adamw_torch, or leave zero_stage out"),
    ("zero_stage=2 optim=adamw_8bit", "use optim: adamw_torch, or leave zero_stage out"),
    ("zero_stage=2 finetuning_type=full use_galore=true", "use optim: adamw_torch, or leave"),
    ("zero_stage=2 stage=grpo reward=data/rewards.py:arithmetic", "use zero_stage: 1"),
])
def test_what_zero_stage_does_not_go_with(settings, words):
    assert words in refusal("model_name_or_path=m", "dataset=d", "output_dir=o",
                            *settings.split(), script="train")
