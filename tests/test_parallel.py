"""parallel.py: ranks equal one process, gradients have a fixed order, a failure ends all ranks.

torchrun, or fork_ranks.py, starts the ranks on the CPU (gloo). Each runs WORKER: train.main on
several settings, one after the other, so that torch is imported and the group joined only once.
Ranks other than 0 get an output_dir of their own, which must not be created.
"""
import json
import random
import re
import threading
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import parallel
import train
from parallel import Gradients, Ranks
from runtime.steps import micro_batches, pad_to_world
from tests.common import ROOT, read_jsonl, usual
from tests.ranks import COMMON, forked, free_port, outcomes, small_world, torchrun

WORKER = '''
import functools, json, os, sys, time
sys.path.insert(0, ROOT)
from tests.common import leave_with_parent
leave_with_parent()
import losses, parallel, train
from errors import run_script
from runtime import build, run as runtime_run
rank, joined, shares, wait = int(os.environ.get("RANK", "0")), [], {}, parallel.Bucket.receive

def start(device, timeout):
    joined.extend([] if joined else [start_ranks(device, timeout)])
    return joined[0]

def receive(bucket, ranks_with):
    wait(bucket, ranks_with)
    for ranks in ranks_with:
        counts[str(int(ranks))] = counts.get(str(int(ranks)), 0) + 1

def loss_sum(*args):
    global calls
    calls += 1
    if rank == 1 and calls == 5 and failure:
        open(f"{argv[0]}.failed", "w").close()
        exec(failure)
    return compute(*args)

start_ranks, end_ranks = train.start_ranks, parallel.end_ranks
train.start_ranks, runtime_run.end_ranks = start, lambda: None
compute = losses.SFTObjective.loss_sum
losses.SFTObjective.loss_sum = loss_sum
parallel.Bucket.receive = receive
PATCH

def main(arguments):
    global argv, counts, calls, failure
    argv = arguments
    for bucket_bytes, settings in json.load(open(argv[0])):
        counts = shares[settings["output_dir"]] = {}
        calls, failure = 0, settings.pop("failure", "")
        build.Gradients = functools.partial(parallel.Gradients, bucket_bytes=bucket_bytes)
        settings["output_dir"] += f"-of-rank-{rank}" if rank else ""
        train.main([f"{key}={value}" for key, value in settings.items()])
        if rank == 0:
            # {number of ranks on which a weight had a gradient: how often} of each run
            json.dump(shares, open(argv[0] + ".shares", "w"))
    end_ranks()

run_script(main)
'''


# ---- starting and ending processes ---------------------------------------------------------------


def two_hosts(*rest) -> list:
    """Two launchers that find each other at an address, one rank each, as on two hosts."""
    return [["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend",
             "c10d", "--rdzv-endpoint", f"localhost:{port}", *rest]
            for port in [free_port()] * 2]


def worker(folder, name, runs, patch="") -> list:
    """The script and its list of runs [(bucket bytes, settings), …], as arguments for python or
    torchrun."""
    script, todo = folder / f"worker_{name}.py", folder / f"runs_{name}.json"
    script.write_text(WORKER.replace("ROOT", repr(str(ROOT))).replace("PATCH", patch),
                      encoding="utf-8")
    todo.write_text(json.dumps(runs))
    return [script, todo]


# ---- 1, 2, 3, 4 ranks equal one process ----------------------------------------------------------
# ranks: rows of a micro-batch, micro-batches of a step
SHAPES = {1: (4, 3), 2: (2, 3), 3: (2, 2), 4: (1, 3)}
LARGE = 2**25  # bytes of a bucket that holds all gradients
WHOLE = 12  # rows: a step is one micro-batch over all ranks

# bytes of a bucket; rows of a micro-batch (a step then has 12 rows over all ranks); settings
ONCE = dict(num_train_epochs=1)
CASES = {
    # 27 rows: steps of 12, 12 and 3
    "uneven": (LARGE, None, dict(save_strategy="steps", save_steps=2)),
    "packed": (LARGE, 1, dict(packing=True, cutoff_len=128)),
    "nothing to learn": (LARGE, 1, dict(ONCE, stage="pt", packing=False, dataset="texts.txt")),
    "experts": (6000, 1, dict(ONCE, model_name_or_path="mixture", cutoff_len=24,
                              lora_target="all,experts")),
    "full": (8000, 2, dict(ONCE, finetuning_type="full", learning_rate=5e-4)),
    "evaluation": (LARGE, 1, dict(
        eval_dataset="eval.jsonl", eval_strategy="steps", save_strategy="steps", eval_steps=4,
        save_steps=4, per_device_eval_batch_size=3, load_best_model_at_end=True,
    )),
    # the learning rate follows the evaluations
    "greedy": (LARGE, 1, {
        "eval_dataset": "eval.jsonl", "eval_strategy": "steps", "eval_steps": 1,
        "lr_scheduler_type": "greedy", "lr_scheduler_kwargs.patience": 0,
        "lr_scheduler_kwargs.factor": 0.5, "lr_scheduler_kwargs.threshold": 0.1,
    }),
    "drop last": (LARGE, 2, dict(dataloader_drop_last=True)),
    "budget": (LARGE, 1, dict(ONCE, token_budget=100)),
    "dora": (LARGE, 1,
             dict(use_dora=True, lora_target="q_proj,up_proj", max_samples=12)),
    "freeze": (8000, 2, dict(
        finetuning_type="freeze", freeze_trainable_layers=1, learning_rate=5e-4, max_samples=12
    )),
    "pairs": (
        LARGE, 1,
        dict(ONCE, stage="dpo", dataset="pairs.jsonl", eval_dataset="pairs.jsonl",
             eval_strategy="epoch"),
    ),
    "judged": (LARGE, WHOLE, dict(stage="kto", dataset="judged.jsonl")),  # 24: steps of 12
    "few rows": (1, 1, dict(max_samples=3)),  # a bucket for each parameter
}
CASES = usual(CASES, "uneven", "packed", "nothing to learn", "experts", "full", "evaluation",
              "pairs", "judged", "few rows")
WORLDS = {      # ranks: the cases they run
    1: ("uneven",),
    2: ("uneven", "packed", "evaluation", "greedy", "pairs"),
    3: ("nothing to learn", "experts", "full", "drop last", "budget", "freeze", "few rows"),
    4: ("experts", "dora", "judged", "few rows"),
}
WORLDS = {world: [name for name in names if name in CASES] for world, names in WORLDS.items()}
FAILURES = {        # ranks: what rank 1 does in the middle of a last run; the output after it
    3: ("os.kill(os.getpid(), 9)", r"traceback : Signal 9 \(SIGKILL\) received"),
    4: ("raise OSError('the disk of rank 1 is gone')", "error: .*the disk of rank 1 is gone"),
}
FIVE = {0: ("eight.jsonl", 4), 2: ("five.jsonl", 2)}        # ranks: rows, rows of a micro-batch


def settings_of(here, world, name, output, **more) -> tuple[int, dict]:
    """(bytes of a bucket, settings) of a case for `world` ranks: the same rows in every step with
    any number of ranks. 0 ranks: this process."""
    bucket, size, own = CASES[name]
    ranks = max(world, 1)
    size, accumulate = (
        (12 // ranks, 1) if size == WHOLE else (size, 12 // ranks) if size else SHAPES[ranks]
    )
    settings = COMMON | dict(per_device_train_batch_size=size,
                             gradient_accumulation_steps=accumulate) | own | more
    for key in ("model_name_or_path", "dataset", "eval_dataset"):
        if key in settings:
            settings[key] = f"{here}/{settings[key]}"
    return bucket, settings | {"output_dir": f"{here}/{output}"}


def resumed(here) -> dict:
    """Settings that resume the run of two ranks from step 2 of 6, in the middle of an epoch."""
    return {"resume_from_checkpoint": f"{here}/2 uneven/checkpoint-2"}


def train_here(bucket, settings):
    """A run in this process."""
    train.main([f"{key}={value}" for key, value in settings.items()])


def runs_of(here, world) -> list:
    """The runs of `world` ranks."""
    todo = [settings_of(here, world, name, f"{world} {name}") for name in WORLDS.get(world, CASES)]
    if world in FIVE:
        dataset, size = FIVE[world]
        todo.append(settings_of(here, world, "uneven", f"{world} five", dataset=dataset,
                                even_batches=True, save_strategy="no", disable_shuffling=True,
                                num_train_epochs=1, per_device_train_batch_size=size,
                                gradient_accumulation_steps=1))
    if world == 3:
        todo.append(settings_of(here, 3, "uneven", "3 resumed", save_strategy="no",
                                **resumed(here)))
    if world in FAILURES:
        todo.append(settings_of(here, world, "uneven", f"{world} failing", save_strategy="no",
                                failure=FAILURES[world][0]))
    return todo


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, {ranks: (number of ranks on which weights had a gradient, exit code, output, end
    time)}): a launcher for each number of ranks runs all its cases, and this process runs `0 …`.
    Two ranks are two hosts; three, which resume from a checkpoint of two, are torchrun's."""
    here, found = tmp_path_factory.mktemp("ranks"), {}
    small_world(here)
    for settings in runs_of(here, 0):
        train_here(*settings)
    for world in WORLDS:
        script = worker(here, world, runs_of(here, world))
        launchers = {2: two_hosts(*script), 3: [torchrun(3, *script)]}
        ends = outcomes(*launchers.get(world, [forked(world, *script)]))
        codes, screens, ended = zip(*ends)
        shares = Path(f"{script[1]}.shares")
        assert shares.is_file() and (
            world in FAILURES or not any(codes)
        ), "".join(screens)[-4000:]
        found[world] = json.loads(shares.read_text()), max(codes), "".join(screens), max(ended)
    return here, found


def curves(folder) -> list:
    """[(step, loss, eval_loss, gradient norm), …] of a run."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[row.get(key, 0.0) for key in ("step", "loss", "eval_loss", "train_loss", "grad_norm")]
            for row in history]


def weights_of(folder) -> dict:
    found = [folder / name for name in ("adapter_model.safetensors", "model.safetensors")]
    return load_file(next(path for path in found if path.is_file()))


def assert_same(a, b, bound=1e-5):
    """Two runs have the same losses, gradient norms and final weights."""
    for mine, theirs in zip(curves(a), curves(b), strict=True):
        assert mine == pytest.approx(theirs, abs=bound)
    mine, theirs = weights_of(a), weights_of(b)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) <= bound


@pytest.mark.parametrize("world, name",
                         [(world, name) for world, names in WORLDS.items() for name in names])
def test_ranks_equal_one_process(name, world, runs):
    """Also one rank that a launcher started."""
    assert_same(runs[0] / f"{world} {name}", runs[0] / f"0 {name}")


def test_resuming_with_another_number_of_ranks(runs):
    here = runs[0]
    train_here(*settings_of(here, 0, "uneven", "0 resumed", save_strategy="no", **resumed(here)))
    for folder in (here / "0 resumed", here / "3 resumed"):
        assert_same(folder, here / "0 uneven")
        assert [row["current_steps"] for row in read_jsonl(folder / "trainer_log.jsonl")] == [
            3, 4, 5, 6, 6
        ]


def test_another_global_batch_is_refused(runs):
    with pytest.raises(
        ValueError,
        match="checkpoint-2 was written with 12 rows a step, and this run takes 15: with 1",
    ):
        train_here(*settings_of(runs[0], 0, "uneven", "refused", per_device_train_batch_size=5,
                                **resumed(runs[0])))
    assert [path.name for path in (runs[0] / "refused").iterdir()] == ["tokenised"]


def test_the_cases_cover_what_their_names_say(runs):
    """Weights that some or no ranks used, a loss of every step, evaluations: else the tests above
    prove little."""
    here, found = runs
    for world in (3, 4):
        shares = {folder.partition(f"/{world} ")[2]: counts
                  for folder, counts in found[world][0].items()}
        assert {"0", "1", str(world)} <= shares["experts"].keys(), shares
        assert max(map(int, shares["few rows"])) == 3, shares
    rows = {"uneven": 6, "packed": 2, "nothing to learn": 3, "experts": 3, "full": 2,
            "evaluation": 7, "greedy": 12, "drop last": 4, "budget": 2, "dora": 2, "freeze": 2,
            "pairs": 4, "judged": 4, "few rows": 2}
    for name in CASES:
        assert len(curves(here / f"0 {name}")) - 1 == rows[name], name
    assert max(row[2] for row in curves(here / "0 evaluation")) > 1


def test_only_rank_0_writes_and_prints(runs):
    """The first rank of each host, here each of two ranks, also keeps a token cache."""
    here, found = runs
    assert {path.name[:2] for path in here.glob("*-of-rank-*")} <= {"2 "}
    assert {path.name for path in here.glob("*-of-rank-*/*")} <= {"tokenised"}
    for world, (_, _, screen, _) in found.items():
        begun, ended = len(runs_of(here, world)), len(runs_of(here, world)) - (world in FAILURES)
        assert screen.count("settings that differ from the defaults") == begun
        assert screen.count("\ntrain results") == ended


def test_by_default_all_ranks_have_full_batches(runs):
    """Two ranks, five rows, two rows a micro-batch: 0 1 | 2 3 and then 4 0 | 1 2, as one process
    with eight rows."""
    here, found = runs
    assert_same(here / "2 five", here / "0 five")
    assert "3 rows of an epoch are trained twice" in found[2][2]
    assert "trained twice" not in found[3][2]


# ---- rows of each rank ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows, size, world, drop_last, wanted", [
    (8, 2, 2, False, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),  # divides
    (5, 2, 2, False, [[[0, 1], [4, 0]], [[2, 3], [1, 2]]]),  # a short batch, and none for rank 1
    (7, 2, 2, False, [[[0, 1], [4, 5]], [[2, 3], [6, 0]]]),  # a short batch
    (6, 2, 2, False, [[[0, 1], [4, 5]], [[2, 3], [0, 1]]]),  # a batch too few
    (1, 2, 3, False, [[[0, 0]], [[0, 0]], [[0, 0]]]),  # fewer rows than one round needs
    (7, 2, 2, True, [[[0, 1]], [[2, 3]]]),  # rows 4 to 6 fill no round
    (3, 2, 2, True, [[], []]),
])
def test_sharding_of_batches_by_hand(rows, size, world, drop_last, wanted):
    batches = pad_to_world(micro_batches(list(range(rows)), size, drop_last), size, world,
                           drop_last)
    assert [batches[rank::world] for rank in range(world)] == wanted


def test_sharding_of_batches_equals_accelerate():
    """0 to 40 rows, 1 to 4 rows a micro-batch, 2 to 5 ranks."""
    loader = pytest.importorskip("accelerate.data_loader")
    for rows in range(41):
        order = random.Random(rows).sample(range(rows), rows)
        for size, world, drop_last in product(range(1, 5), range(2, 6), (False, True)):
            batches = micro_batches(order, size, drop_last)
            dealt = pad_to_world(batches, size, world, drop_last)
            sampler = torch.utils.data.BatchSampler(order, size, drop_last)
            for rank in range(world):
                wanted = list(loader.BatchSamplerShard(sampler, world, rank, even_batches=True))
                assert dealt[rank::world] == wanted, (rows, size, world, rank, drop_last)


# ---- gradients in buckets, two ranks as threads of this process ----------------------------------


class FakeGroup:
    """all_reduce between threads: the k-th call of one meets the k-th call of the other."""

    def __init__(self, world):
        self.here = threading.local()
        self.sent = [[] for _ in range(world)]
        self.ready = threading.Condition()

    def all_reduce(self, tensor, group=None, async_op=False):
        mine = self.sent[self.here.rank]
        with self.ready:
            mine.append(tensor.clone())
            self.ready.notify_all()
            nth = len(mine) - 1

        class Work:
            def wait(work):
                with self.ready:
                    assert self.ready.wait_for(
                        lambda: all(len(calls) > nth for calls in self.sent), timeout=10
                    )
                tensor.copy_(sum(calls[nth] for calls in self.sent))
        return Work() if async_op else Work().wait()


def four_weights() -> list:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (3, 1, 4, 2)]


def two_ranks(monkeypatch, losses, bucket_bytes, early=True):
    """(gradients of each rank, buffers each sent) after two steps. losses[rank]: a function of the
    weights for each micro-batch."""
    group, found, errors = FakeGroup(2), [None, None], []
    monkeypatch.setattr(parallel.dist, "all_reduce", group.all_reduce)

    def rank(number):
        group.here.rank = number
        weights = four_weights()
        gradients = Gradients(dict(enumerate(weights)), Ranks(number, 2, number), bucket_bytes,
                              overlap=early)
        try:
            for _ in range(2):                      # the second must not see the first
                gradients.zero()
                for place, loss in enumerate(losses[number], 1):
                    gradients.backward(loss(*weights), last=place == len(losses[number]))
                gradients.all_reduce()
        except BaseException as error:
            errors.append(error)
        found[number] = [None if p.grad is None else p.grad.clone() for p in weights]

    threads = [threading.Thread(target=rank, args=[number]) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors and not any(thread.is_alive() for thread in threads), errors
    return found, group.sent


def forwards(a, b, c, d):
    return ((a.sum().tanh() * b + c.sum()).tanh() * c).sum()        # d is not used


def backwards(a, b, c, d):
    return ((c.sum().tanh() * b.exp()).sum() * a).tanh().sum()


@pytest.mark.parametrize("bucket_bytes", (1, 20, LARGE))
@pytest.mark.parametrize("losses", [
    ([forwards], [backwards]),  # gradients arrive in another order
    ([forwards, backwards, forwards], [backwards]),  # three micro-batches and one
    ([], [forwards, forwards]),  # no micro-batches
    ([lambda a, b, c, d: a.sum()], [lambda a, b, c, d: b.sum()]),  # other weights on each rank
], ids=("order", "accumulated", "idle", "disjoint"))
def test_buffers_are_summed_in_one_order(losses, bucket_bytes, monkeypatch):
    """Each rank has the gradients of all losses, None where no rank has any; the k-th buffers
    match."""
    weights = four_weights()
    sum(loss(*weights) for part in losses for loss in part).sum().backward()
    found, sent = two_ranks(monkeypatch, losses, bucket_bytes)
    for mine in found:
        assert [g is None for g in mine] == [p.grad is None for p in weights]
        assert all(torch.allclose(g, p.grad, atol=1e-6)
                   for g, p in zip(mine, weights) if g is not None)
    sizes = [[len(buffer) for buffer in buffers] for buffers in sent]
    assert (sizes[0] == sizes[1]
            == ({1: [2, 4, 1, 3], 20: [2, 5, 3], LARGE: [10]}[bucket_bytes] + [4]) * 2)


def test_overlapped_communication_changes_nothing(monkeypatch):
    early = two_ranks(monkeypatch, ([forwards, backwards], [backwards]), 1)[0]
    late = two_ranks(monkeypatch, ([forwards, backwards], [backwards]), 1, early=False)[0]
    assert all(torch.equal(a, b)
               for x, y in zip(early, late) for a, b in zip(x, y) if a is not None)


def test_one_rank_sends_nothing(monkeypatch):
    monkeypatch.setattr(parallel.dist, "all_reduce", None)
    weight = torch.nn.Parameter(torch.ones(3))
    gradients = Gradients({"weight": weight}, Ranks())
    for _ in range(2):
        gradients.zero()
        gradients.backward((2 * weight).sum(), last=True)
        gradients.all_reduce()
    assert weight.grad.tolist() == [2, 2, 2]
    assert not gradients.buckets
    assert Ranks().total(3, 0.5) == [3, 0.5]


# ---- what goes wrong -----------------------------------------------------------------------------

def test_a_wrong_setting_is_reported_once(tmp_path):
    code, screen, _ = outcomes(torchrun(2, "train.py", "configs/tiny_lora_sft.yaml", "use_cpu=true",
                                        "lora_alfa=3", f"output_dir={tmp_path}/out"))[0]
    assert (
        code != 0 and screen.count("error: ") == screen.count("did you mean 'lora_alpha'") == 1
    ), screen[-4000:]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", FAILURES)
def test_a_rank_that_fails_ends_the_others(world, runs):
    """Within a minute, with an exit code; the cause is printed once, without tracebacks of ranks
    that lost it."""
    here, (_, code, screen, ended) = runs[0], runs[1][world]
    assert code != 0 and ended - (here / f"runs_{world}.json.failed").stat().st_mtime < 60
    assert len(re.findall(FAILURES[world][1], screen)) == 1, screen[-6000:]
    assert "]: Traceback" not in screen and "which is saved" not in screen, screen[-6000:]
    assert not (here / f"{world} failing/adapter_model.safetensors").exists()


def test_a_rank_that_never_starts(tmp_path):
    """The others name the usual causes after START_LIMIT seconds, 2 here."""
    small_world(tmp_path)
    absent = ("parallel.START_LIMIT = 2\nif rank == 1:\n    train.start_ranks = lambda "
              "*args: time.sleep(99)")
    start = time.time()
    script = worker(tmp_path, 2, [settings_of(tmp_path, 2, "uneven", "out")], absent)
    code, screen, ended = outcomes(forked(2, *script))[0]
    assert code != 0 and ended - start < 60 and not (tmp_path / "out").exists()
    assert "error: rank 0 of 2, on " in screen
    assert "has not heard from all others within 2 s" in screen
    assert screen.count(parallel.CAUSES) == 1, screen[-4000:]
