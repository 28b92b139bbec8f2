"""Runs that are killed, stopped or damaged and then resumed equal uninterrupted runs.

    python -m tests.test_resume 20 7        kill runs of 1 and 2 ranks 20 times, with seed 7

Each rank is a process that the test can kill. They are forked from a `ForkServer`, a process that
has already imported torch, so that each takes a second. A run can kill itself at "moments": all
calls that change a file, the middle of writing one, and its steps. Resuming within one process is
tested in test_train.py.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from checkpoint import files, training_state
from errors import run_script
from fast import attention_picker
from fast import matmul as pick
from losses import SFTObjective
from parallel import Gradients
from runtime import report, resume, setup
from runtime import run as runtime_run
from runtime.kernels import Kernels, keep_kernels
from settings.config import DATA, FIXED, FREE, KEYS, Config
from settings.load_config import load_config
from tests.common import ROOT, RUN_SLOW, read_jsonl, slow

BASE = dict(
    model_name_or_path=ROOT / "models/tiny",
    dataset=ROOT / "data/tiny_review.jsonl",
    max_samples=30,
    template="chatml",
    cutoff_len=48,
    use_cpu=True,
    disable_tqdm=True,
    lora_rank=4,
    lora_dropout=0.2,
    neftune_noise_alpha=5,
    learning_rate=2e-2,
    max_steps=8,
    per_device_train_batch_size=2,
    logging_steps=1,
    save_steps=2,
    save_total_limit=2,
    val_size=4,
    eval_strategy="steps",
    eval_steps=2,
    load_best_model_at_end=True,
    flash_attn="disabled",
    disable_gradient_checkpointing=True,
    resume_from_checkpoint="auto",
    **{"pin_kernels.matmul": "torch"},      # else two runs may differ by a choice of the clock
)
# parts of the names of values that always differ
TIMES = ("time", "per_second", "throughput", "memory")


# ---- runs that can be killed ---------------------------------------------------------------------


class ForkServer:
    """Starts runs one after the other, each forked from a process that has imported everything."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.test_resume"],
            cwd=ROOT,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, output, world=1, patch=(), kill=None, **settings) -> tuple[list, str]:
        """Run train.py; returns (exit codes of the ranks, -9 for killed; output).

        patch: [name, argument, ...] of functions that each rank calls first. kill: (seconds, ranks)
        to be killed from outside.
        """
        given = {**BASE, "output_dir": output, **settings}
        order = dict(
            arguments=[f"{key}={value}" for key, value in given.items() if value is not None],
            world=world,
            patch=patch,
            kill=kill,
            screen=f"{output}.screen",
        )
        self.process.stdin.write(json.dumps(order) + "\n")
        codes = json.loads(self.process.stdout.readline())
        return codes, Path(f"{output}.screen").read_text(errors="replace")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve_forks():
    """The loop of the fork server: one order per line on stdin, the exit codes on stdout."""
    for line in sys.stdin:
        print(json.dumps(fork_ranks(**json.loads(line))), flush=True)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def fork_ranks(arguments, world, patch, kill, screen) -> list:
    port = free_port()
    Path(screen).unlink(missing_ok=True)
    ranks = [
        os.fork() or one_rank(rank, world, port, arguments, patch, screen) for rank in range(world)
    ]
    start, failed, asked, codes = time.time(), None, False, [None] * world

    def send(number, targets):
        for rank in targets:
            if codes[rank] is None:
                os.kill(ranks[rank], number)
        return True

    while None in codes:
        for rank in [rank for rank in range(world) if codes[rank] is None]:
            done, status = os.waitpid(ranks[rank], os.WNOHANG)
            codes[rank] = os.waitstatus_to_exitcode(status) if done else None
        if kill and time.time() - start > kill[0]:
            send(signal.SIGKILL, kill[1])
            kill = None
        if failed is None and any(
            codes
        ):  # torchrun also terminates the others, and finally kills them
            failed = time.time()
        elif failed and not asked and time.time() > failed + 0.3:
            asked = send(signal.SIGTERM, range(world))
        elif failed and time.time() > failed + 10 or time.time() > start + 90:
            send(signal.SIGKILL, range(world))  # also where a fork of this process hangs
        time.sleep(0.01)
    return codes


def one_rank(rank, world, port, arguments, patch, screen):
    """A forked process: the patches, then train.py."""
    code = 0
    try:
        handle = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if world > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
        for name, *values in patch:
            globals()[name](rank, *values)
        sys.argv = ["train.py", *arguments]
        run_script(train.main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    print(f"moments {MOMENTS[0]}", file=sys.stderr, flush=True)
    os._exit(code)


# ---- patches inside the process of a run ---------------------------------------------------------

MOMENTS = [0]  # how many have passed in this process


def kill_at_moment(rank, of_ranks, number):
    """Let the run kill itself at this moment; 0: only count the moments."""
    if rank not in of_ranks:
        return

    def watched(place, name, half=lambda *args: None):
        real = getattr(place, name)

        def call(*args, **more):
            MOMENTS[0] += 1
            if MOMENTS[0] == number:
                half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(place, name, call)

    def half_a_file(tensors, path, *rest):
        Path(path).write_bytes(b"\x40\0\0\0\0\0\0\0{")

    def half_a_text(path, text, *rest):
        with open(path, "w") as file:
            file.write(text[: len(text) // 2])

    def half_a_json(value, file, *rest):
        file.write('{"half')
        file.flush()

    def half_a_line(log, *rest):
        with open(log.path, "a") as file:
            file.write('{"current_steps": 3, "to')

    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        watched(os, name)
    watched(files, "save_file", half_a_file)
    watched(Path, "write_text", half_a_text)
    watched(json, "dump", half_a_json)
    watched(report.RunLog, "write", half_a_line)
    watched(setup, "load_examples")
    watched(runtime_run, "prepare_output")
    watched(runtime_run.Run, "load_best")
    for name in ("build_model", "set_lr", "evaluate"):
        watched(train, name)
    watched(runtime_run, "end_ranks")


def at_step(number, act):
    """Call act() at the beginning of the n-th step that this process takes."""
    real, calls = train.set_lr, []

    def set_lr(*args):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(*args)

    train.set_lr = set_lr


def fastest_here(rank, attention, matmul):
    """Let the timing of kernels favor these, as noise may."""
    real = pick.pick_matmul
    attention_picker.preferred_kernel = lambda timings, problem: attention
    pick.pick_matmul = lambda *args: replace(real(*args), picked=matmul)


def signals_at_step(rank, of_rank, number, *names):
    """This rank receives signals in its n-th step."""
    if rank == of_rank:
        at_step(number, lambda: [os.kill(os.getpid(), signal.Signals[name]) for name in names])


def signals_while_loading(rank, name):
    setup.load_examples = lambda *args, **more: os.kill(os.getpid(), signal.Signals[name])


def dies_at_step(rank, of_rank, number):
    if rank == of_rank:
        at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def dies_at_the_end(rank):
    runtime_run.end_ranks = lambda: os.kill(os.getpid(), signal.SIGKILL)


def forgetful_disk(rank, step):
    """From checkpoint-`step` on, a bit of rng.safetensors flips after the file was written."""
    real, spoilt = runtime_run.remove_old_checkpoints, set()

    def remove(config, output, best):
        newest = training_state.checkpoints_in(output)[-1]
        if (output / f"checkpoint-{step}").is_dir() and newest not in spoilt:
            flip(newest / "rng.safetensors")
            spoilt.add(newest)
        real(config, output, best)

    runtime_run.remove_old_checkpoints = remove


def weights_at_the_end(rank, folder):
    """This rank's adapter, as bytes, into a file."""
    real = runtime_run.total_flos

    def total_flos(model, tokens):
        values = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        Path(f"{folder}/{rank}.weights").write_bytes(values.numpy().tobytes())
        return real(model, tokens)

    runtime_run.total_flos = total_flos


def full_disk_at_step(rank, number, size):
    """From the n-th step on no file can grow beyond `size` bytes."""
    at_step(number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def no_room_at_step(rank, number):
    """From the n-th step on the disk reports that it is nearly full."""
    usage = shutil.disk_usage("/")
    at_step(number, lambda: setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000)))


def poison(rank, of_rank, value, *steps):
    """In these steps the loss of this rank is multiplied by `value` (one micro-batch a step)."""
    real, calls = SFTObjective.loss_sum, []

    def loss_sum(*args):
        calls.append(1)
        loss, *rest = real(*args)
        return loss * (float(value) if rank == of_rank and len(calls) in steps else 1.0), *rest

    SFTObjective.loss_sum = loss_sum


def gradient_overflows(rank, number):
    """In the n-th step one gradient is infinite, though the loss is finite."""
    real, calls = Gradients.all_reduce, []

    def summed(gradients):
        real(gradients)
        calls.append(1)
        if len(calls) == number:
            gradients.weights[0].grad.view(-1)[0] = math.inf

    Gradients.all_reduce = summed


# ---- what a run leaves behind --------------------------------------------------------------------


@pytest.fixture(scope="module")
def fork_server():
    fork_server = ForkServer()
    yield fork_server
    fork_server.close()


@pytest.fixture(scope="module")
def uninterrupted(fork_server, tmp_path_factory):
    """uninterrupted(world): the folder of an uninterrupted run, and its number of moments."""
    made, here = {}, tmp_path_factory.mktemp("whole")

    def of(world):
        if world not in made:
            made[world] = uninterrupted_run(fork_server, here / str(world), world)
        return made[world]

    return of


def uninterrupted_run(fork_server, output, world, **settings) -> tuple[Path, int]:
    codes, screen = fork_server.run(output, world, [["kill_at_moment", [0], 0]], **settings)
    assert codes == [0] * world, screen
    return output, max(map(int, re.findall(r"moments (\d+)", screen)))


def without_times(value):
    """The log without values that depend on the clock."""
    if isinstance(value, dict):
        return {
            key: without_times(item)
            for key, item in value.items()
            if not any(word in key for word in TIMES)
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same_end(folder, other):
    """Both folders hold the same files, bit for bit except for times, and no unfinished ones."""
    files = {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == files
    assert {"adapter_model.safetensors", "checkpoint-8/optimizer.safetensors"} <= set(
        map(str, files)
    )
    for file in files:
        mine, theirs = folder / file, other / file
        if file.name in (
            "trainer_state.json",
            "all_results.json",
            "train_results.json",
            "eval_results.json",
        ):
            assert without_times(json.loads(mine.read_text())) == without_times(
                json.loads(theirs.read_text())
            ), file
        elif file.name == "trainer_log.jsonl":
            assert without_times(read_jsonl(mine)) == without_times(read_jsonl(theirs))
        elif file.suffix == ".safetensors" or file.name in (
            "adapter_config.json",
            "samples.jsonl",
            "tokenizer.json",
        ):
            assert mine.read_bytes() == theirs.read_bytes(), file


# ---- killed --------------------------------------------------------------------------------------


def kill_until(fork_server, here, uninterrupted, kills, seed, worlds=(1, 2)) -> list:
    """Kill and resume runs until there were this many kills; compare the runs that finish."""
    draw = random.Random(seed)
    killed = []
    names = iter(range(999))
    while len(killed) < kills:
        world = draw.choice(worlds)
        reference, moments = uninterrupted(world)
        output, codes = here / f"run{next(names)}", [None]
        while codes != [0] * world and len(killed) < kills + 5:
            victims = draw.choice([[0], [world - 1], list(range(world))])
            if draw.random() < 0.7:
                moment = draw.randrange(1, moments)
                codes, screen = fork_server.run(
                    output, world, [["kill_at_moment", victims, moment]]
                )
            else:
                moment = f"{draw.uniform(0.1, 3):.2f} s"
                codes, screen = fork_server.run(
                    output, world, [["kill_at_moment", [0], 0]], [float(moment[:-2]), victims]
                )
            if -9 in codes:
                killed.append((world, victims, moment, codes))
            assert all(code in (0, 1, -9, -15) for code in codes), (killed, codes, screen)
            assert "Traceback" not in screen, screen
        if set(codes) != {0}:
            codes, screen = fork_server.run(output, world)
            assert codes == [0] * world, screen
        assert_same_end(output, reference)
    return killed


@pytest.mark.parametrize("world, kills", [(1, 8), (2, 5)] if RUN_SLOW else [(1, 4), (2, 3)])
def test_killed_at_random_moments(world, kills, fork_server, uninterrupted, tmp_path):
    kill_until(fork_server, tmp_path, uninterrupted, kills, seed=world, worlds=[world])


def test_killed_while_writing_the_result_without_checkpoints(fork_server, uninterrupted, tmp_path):
    """Half of the final files exist; auto starts again, without overwrite_output_dir."""
    own = dict(
        save_strategy="no",
        load_best_model_at_end=None,
        save_total_limit=None,
        eval_strategy="no",
        val_size=None,
        overwrite_cache=True,  # else a later run has fewer moments
    )
    other, moments = uninterrupted_run(fork_server, tmp_path / "whole", 1, **own)
    for back in (2, 9):
        assert fork_server.run(
            tmp_path / "run", 1, [["kill_at_moment", [0], moments - back]], **own
        )[0] == [-9]
    codes, screen = fork_server.run(tmp_path / "run", **own)
    assert codes == [0], screen
    assert (tmp_path / "run/adapter_model.safetensors").read_bytes() == (
        other / "adapter_model.safetensors"
    ).read_bytes()
    codes, screen = fork_server.run(tmp_path / "run", **own)
    # a finished run is not lost either
    assert codes == [1]
    assert "of an earlier run" in screen


ROLLOUTS = dict(
    stage="grpo",
    dataset=ROOT / "data/tiny_sums.jsonl",
    reward=f"{ROOT / 'data/rewards.py'}:arithmetic",
    num_generations=6,
    num_iterations=4,               # rollouts before steps 1 and 5
    max_new_tokens=12,
    temperature=1.5,
    lora_dropout=None,
    neftune_noise_alpha=None,
    load_best_model_at_end=None,
    eval_strategy="no",
    val_size=None,
)


def test_killed_in_the_middle_of_a_rollout(fork_server, tmp_path):
    """Killed in steps 3, 6 and 7: it goes on within a rollout, before one, and within one again."""
    codes, screen = fork_server.run(tmp_path / "whole", **ROLLOUTS)
    assert codes == [0], screen
    for step, resumed in ((3, None), (4, 2), (3, 4)):       # step: of this process
        codes, screen = fork_server.run(
            tmp_path / "run", 1, [["dies_at_step", 0, step]], **ROLLOUTS)
        assert codes == [-9], screen
        assert resumed is None or f", step {resumed} of 8" in screen
        if resumed == 2:                        # as if killed while it wrote the second rollout
            samples = tmp_path / "run/samples.jsonl"
            samples.write_bytes(samples.read_bytes()[:-9])
    codes, screen = fork_server.run(tmp_path / "run", **ROLLOUTS)
    assert codes == [0] and ", step 6 of 8" in screen, screen
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert any(row.get("grad_norm") for row in log)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def torchrun(output, folder, patch, *options, **settings) -> subprocess.CompletedProcess:
    """train.py on two ranks under torchrun, each patched first."""
    (folder / "worker.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.test_resume import *\n"
        "rank, round = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        f"for name, *values in {patch!r}.get(round, []):\n    globals()[name](rank, *values)\n"
        "run_script(train.main)\n"
    )
    given = {**BASE, "output_dir": output, **settings}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            free_port(),
            *options,
            str(folder / "worker.py"),
            *(f"{k}={v}" for k, v in given.items() if v is not None),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_torchrun_restarts_ranks_that_die(uninterrupted, tmp_path):
    """Rank 1 dies in step 4, then both within the next checkpoint: torchrun restarts them.

    Without resume_from_checkpoint: a run that torchrun restarted always resumes.
    """
    other, _ = uninterrupted(2)
    done = torchrun(
        tmp_path / "run",
        tmp_path,
        {0: [["dies_at_step", 1, 4]], 1: [["kill_at_moment", [0], 40]]},
        "--max-restarts",
        "3",
        resume_from_checkpoint=None,
        overwrite_output_dir=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall("resumed from .*checkpoint-[24], step [24] of 8", done.stdout)) == 2, (
        done.stdout
    )
    assert_same_end(tmp_path / "run", other)


@slow
def test_torchrun_does_not_restart_a_stopped_run(tmp_path):
    """torchrun takes exit code 75 for a failure; restarted, the ranks end at once."""
    done = torchrun(
        tmp_path / "run",
        tmp_path,
        {0: [["signals_at_step", 1, 3, "SIGTERM"]]},
        "--max-restarts",
        "1",
    )
    assert done.returncode == 1
    assert "stopped by another rank before torchrun started it again: nothing to do" in done.stderr
    assert training_state.checkpoints_in(tmp_path / "run")[-1].name == "checkpoint-3"
    assert done.stdout.count("resumed from") == 0


# ---- stopped by a signal -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world, rank, name", [(1, 0, "SIGTERM"), (1, 0, "SIGINT"), (2, 1, "SIGTERM")]
)
def test_stopped_by_a_signal(world, rank, name, fork_server, uninterrupted, tmp_path):
    other, _ = uninterrupted(world)
    codes, screen = fork_server.run(tmp_path / "run", world, [["signals_at_step", rank, 3, name]])
    assert codes == [resume.STOPPED] * world, screen
    assert (
        f"stopped by {'another rank' if rank else name} after step 3 of 8, which is saved" in screen
    )
    assert rank or f"{name}: stopping after this step" in screen
    assert (tmp_path / "run/checkpoint-3/trainer_state.json").is_file()
    codes, screen = fork_server.run(tmp_path / "run", world)
    assert codes == [0] * world and "resumed from" in screen, screen
    assert_same_end(tmp_path / "run", other)


def test_a_time_limit_stops_a_run_repeatedly(fork_server, uninterrupted, tmp_path):
    """The limit is reached when the first step begins: each run takes one
    step, until all are done."""
    other, _ = uninterrupted(1)
    for step in range(1, 9):  # the last run is stopped as well, although all steps are done
        codes, screen = fork_server.run(
            tmp_path / "run", time_limit=1e-4, resume_from_checkpoint="auto"
        )
        assert codes == [resume.STOPPED]
        assert f"stopped by time_limit (0.0001 minutes) after step {step} of 8" in screen
    assert fork_server.run(tmp_path / "run")[0] == [0]
    assert_same_end(tmp_path / "run", other)


def test_a_second_interrupt_ends_at_once(fork_server, tmp_path):
    codes, screen = fork_server.run(
        tmp_path / "run", 1, [["signals_at_step", 0, 3, "SIGTERM", "SIGINT", "SIGINT"]]
    )
    assert codes == [130]
    assert "SIGINT: stopping after this step; press Ctrl-C again to exit at once" in screen
    assert [path.name for path in training_state.checkpoints_in(tmp_path / "run")] == [
        "checkpoint-2"
    ]


@pytest.mark.parametrize("name, code", [("SIGTERM", -15), ("SIGINT", 130)])
def test_a_signal_before_the_first_step_just_ends_the_run(name, code, fork_server, tmp_path):
    codes, screen = fork_server.run(tmp_path / "run", 1, [["signals_while_loading", name]])
    assert codes == [code] and not (tmp_path / "run").exists() and "Traceback" not in screen


# ---- truncated, flipped, emptied and deleted files -----------------------------------------------


def truncate(path):
    os.truncate(path, max(0, path.stat().st_size - 7))


def flip(path, bit=None):
    data = bytearray(path.read_bytes())
    bit = len(data) * 4 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def configured(output, **settings) -> Config:
    given = {**BASE, "output_dir": output, **settings}
    return load_config(
        [f"{key}={value}" for key, value in given.items() if value is not None], "train"
    )


@pytest.mark.parametrize("harm", [truncate, flip, empty, Path.unlink])
def test_a_damaged_checkpoint_is_skipped(
    harm, uninterrupted, tmp_path, capsys
):
    files = sorted(path.name for path in (uninterrupted(1)[0] / "checkpoint-8").iterdir())
    assert {"checksums.json", "trainer_state.json", "train_config.json", "tokenizer.json"} <= set(
        files
    )
    for file in files:
        run = shutil.copytree(uninterrupted(1)[0], tmp_path / file)
        harm(run / "checkpoint-8" / file)
        assert (
            resume.find_resume(configured(run))
            == training_state.checkpoints_in(run, resumable=False)[-2]
        )
        stderr = capsys.readouterr().err
        assert re.search(rf"checkpoint-8 is damaged and cannot be used: .*{file}", stderr)
        assert "resuming from the previous one" in stderr
        with pytest.raises(
            (ValueError, FileNotFoundError), match=rf"checkpoint-8 is (damaged|no complete).*{file}"
        ):
            resume.find_resume(configured(run, resume_from_checkpoint=run / "checkpoint-8"))


def test_every_flipped_bit_of_the_checksums_is_found(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted(1)[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    (folder / "tokenizer.json").unlink()  # the largest file: without it this takes a second
    (folder / "checksums.json").unlink()
    training_state.write_checksums(folder)
    assert training_state.damage(folder) == ""
    before = (folder / "checksums.json").read_bytes()
    for bit in range(8 * len(before)):
        flip(folder / "checksums.json", bit)
        assert training_state.damage(folder), (bit, before[bit // 8 :][:9])
        (folder / "checksums.json").write_bytes(before)


def test_a_run_with_a_damaged_checkpoint_equals_an_uninterrupted_run(
    fork_server, uninterrupted, tmp_path
):
    """Damaged checkpoints are kept under other names, which save_total_limit does not count."""
    other, _ = uninterrupted(1)
    output = shutil.copytree(other, tmp_path / "run")
    for time_ in (1, 2):
        flip(output / "checkpoint-8/optimizer.safetensors")
        codes, screen = fork_server.run(output)
        assert codes == [0] and "resumed from" in screen, screen
        assert "checkpoint-8 is kept as checkpoint-8.damaged" in screen
    kept = sorted(output.glob("*.damaged"))
    assert [path.name for path in kept] == ["checkpoint-8.2.damaged", "checkpoint-8.damaged"]
    for path in kept:
        assert training_state.damage(path).startswith(
            "optimizer.safetensors is not as it was written"
        )
        shutil.rmtree(path)
    assert_same_end(output, other)


def test_all_checkpoints_damaged(fork_server, uninterrupted, tmp_path):
    """auto starts from the beginning, true does not; damaged checkpoints are kept."""
    other, _ = uninterrupted(1)
    fork_server.run(tmp_path / "run", 1, [["signals_at_step", 0, 5, "SIGTERM"]])
    damaged = training_state.checkpoints_in(tmp_path / "run")
    assert len(damaged) > 1
    for folder in damaged:
        truncate(folder / "adapter_model.safetensors")
    codes, screen = fork_server.run(tmp_path / "run", resume_from_checkpoint="true")
    assert codes == [1] and "holds no complete checkpoint-N" in screen
    assert screen.count("is damaged and cannot be used") == len(damaged)
    codes, screen = fork_server.run(tmp_path / "run")
    assert codes == [0]
    assert "no intact checkpoint is left" in screen
    assert "starting from the beginning" in screen
    for folder in damaged:
        shutil.rmtree(f"{folder}.damaged")
    assert_same_end(tmp_path / "run", other)


def test_checkpoints_without_checksums_of_an_older_release(fork_server, uninterrupted, tmp_path):
    other, _ = uninterrupted(1)
    output = tmp_path / "run"
    fork_server.run(output, 1, [["signals_at_step", 0, 5, "SIGTERM"]])
    for folder in training_state.checkpoints_in(output):
        (folder / "checksums.json").unlink()
        state = json.loads((folder / "trainer_state.json").read_text())
        state["resume"] = {
            key: value
            for key, value in state["resume"].items()
            if key not in ("rows_per_step", "skipped", "rows")
        }
        (folder / "trainer_state.json").write_text(json.dumps(state))
        save_file(
            {"cpu": load_file(folder / "rng.safetensors")["cpu.0"]}, folder / "rng.safetensors"
        )
    codes, screen = fork_server.run(output)
    assert codes == [0] and "resumed from" in screen and "damaged" not in screen, screen
    assert (output / "adapter_model.safetensors").read_bytes() == (
        other / "adapter_model.safetensors"
    ).read_bytes()


def test_a_best_checkpoint_that_is_damaged_is_not_loaded(fork_server, uninterrupted, tmp_path):
    other, _ = uninterrupted(1)
    output = shutil.copytree(other, tmp_path / "run")
    best = json.loads((output / "checkpoint-8/trainer_state.json").read_text())["resume"]["best"][0]
    assert best != 8, "the case is no longer one"
    flip(output / f"checkpoint-{best}/adapter_model.safetensors")
    codes, screen = fork_server.run(output)
    assert codes == [0]
    assert re.search(
        rf"checkpoint-{best}, with the lowest eval_loss .* cannot be used: adapter_model", screen
    )
    assert (output / "adapter_model.safetensors").read_bytes() == (
        output / "checkpoint-8/adapter_model.safetensors"
    ).read_bytes()


def test_the_last_good_checkpoint_is_never_removed(fork_server, tmp_path):
    """save_total_limit: 1, and a disk that does not keep what is written."""
    codes, screen = fork_server.run(
        tmp_path / "run",
        1,
        [["forgetful_disk", 4]],
        save_total_limit=1,
        load_best_model_at_end=None,
    )
    assert codes == [0]
    assert (
        "checkpoint-4 is damaged although it has just been written; older checkpoints are kept"
        in screen
    )
    assert [p.name for p in training_state.checkpoints_in(tmp_path / "run")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert resume.newest_intact(tmp_path / "run", "true").name == "checkpoint-2"


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch, words",
    [
        (["full_disk_at_step", 3, 30000], "error: .*(File too large|could not be written)"),
        (["no_room_at_step", 3], "has room for 1000 bytes, and checkpoint-4 takes [0-9.]+ KiB"),
    ],
)
def test_a_full_disk_leaves_the_last_good_checkpoint(
    patch, words, fork_server, uninterrupted, tmp_path
):
    other, _ = uninterrupted(1)
    codes, screen = fork_server.run(tmp_path / "run", 1, [patch])
    assert codes == [1] and re.search(words, screen) and "Traceback" not in screen, screen
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert training_state.damage(tmp_path / "run/checkpoint-2") == ""
    assert fork_server.run(tmp_path / "run")[0] == [0]
    assert_same_end(tmp_path / "run", other)


# ---- changed settings and data -------------------------------------------------------------------


def test_keys_by_their_class_of_on_resume(uninterrupted):
    folder = uninterrupted(1)[0] / "checkpoint-8"
    then = json.loads((folder / "train_config.json").read_text())
    for key in KEYS:
        now = {**then, key: "another"}
        kind = resume.on_resume(key)
        if kind == FIXED:
            with pytest.raises(
                ValueError, match=f"^{key}: .* -> another cannot change when a run is resumed"
            ):
                resume.changed_settings(folder, now, force=True)
        elif kind == DATA:
            with pytest.raises(
                ValueError, match=f"^{key}: .* -> another: this changes the data or the base model"
            ):
                resume.changed_settings(folder, now)
            assert list(resume.changed_settings(folder, now, force=True)) == [key]
        else:
            assert list(resume.changed_settings(folder, now)) == ([key] if kind == FREE else [])
    assert resume.changed_settings(folder, {**then, "versions": "another"}) == {}


def test_a_changed_data_file_is_noticed(fork_server, tmp_path):
    data = Path(shutil.copy(BASE["dataset"], tmp_path / "rows.jsonl"))
    fork_server.run(tmp_path / "run", 1, [["signals_at_step", 0, 3, "SIGTERM"]], dataset=data)
    data.write_text(data.read_text().replace("I do not know that.", "I do know that!"))
    codes, screen = fork_server.run(tmp_path / "run", dataset=data)
    assert codes == [1]
    assert "the training rows differ from those of" in screen
    assert "force_resume: true" in screen
    assert fork_server.run(tmp_path / "run", dataset=data, force_resume=True)[0] == [0]


# ---- not finite ----------------------------------------------------------------------------------


def test_an_infinite_gradient_with_a_finite_loss_is_skipped(fork_server, tmp_path):
    codes, screen = fork_server.run(tmp_path / "run", 1, [["gradient_overflows", 3]])
    assert codes == [0]
    assert re.search(
        r"3 skipped: loss \d\.\d+, gradient norm (nan|inf); nothing is trained on it", screen
    )
    losses = [
        line["loss"] for line in read_jsonl(tmp_path / "run/trainer_log.jsonl") if "loss" in line
    ]
    assert [step for step, loss in enumerate(losses, 1) if math.isnan(loss)] == [3]


def test_all_ranks_skip_a_step_with_nan_on_one_rank(fork_server, tmp_path):
    """A loss of nan in steps 3 and 4 of rank 1: both ranks skip and end with the same weights."""
    codes, screen = fork_server.run(
        tmp_path / "run",
        2,
        [["poison", 1, "nan", 3, 4], ["weights_at_the_end", str(tmp_path)]],
        load_best_model_at_end=None,
    )
    assert codes == [0, 0] and screen.count("skipped: loss nan") == 2, screen
    assert (tmp_path / "0.weights").read_bytes() == (tmp_path / "1.weights").read_bytes()
    codes, screen = fork_server.run(tmp_path / "bad", 2, [["poison", 1, "nan", 3, 4, 5]])
    assert (
        codes[0] == 1
        and screen.count("step 5: loss nan") == 1
        and "for the 3rd time in a row" in screen
    ), (codes, screen)


# ---- early stopping, saving and evaluating at other times ----------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        dict(
            learning_rate=0.1,
            lr_scheduler_type="constant",
            early_stopping_steps=2,
            eval_steps=1,
            save_steps=1,
        ),
        dict(save_strategy="epoch", eval_strategy="epoch", max_samples=12, save_total_limit=None),
        dict(save_steps=3, eval_strategy="no", load_best_model_at_end=None, save_total_limit=1),
    ],
    ids=["stops early", "epochs", "no evaluation"],
)
def test_all_save_strategies_can_be_resumed(own, fork_server, tmp_path):
    """Killed, stopped in the middle, and killed again before the last file."""
    other, moments = uninterrupted_run(fork_server, tmp_path / "whole", 1, **own)
    fork_server.run(tmp_path / "run", 1, [["kill_at_moment", [0], moments // 2]], **own)
    fork_server.run(tmp_path / "run", 1, [["signals_at_step", 0, 1, "SIGTERM"]], **own)
    if "early_stopping_steps" in own:
        steps = json.loads((other / "trainer_state.json").read_text())["global_step"]
        assert steps < 8
        codes, screen = fork_server.run(tmp_path / "run", 1, [["dies_at_the_end"]], **own)
        assert codes == [-9] and "stopped early" in screen
    codes, screen = fork_server.run(tmp_path / "run", **own)
    assert codes == [0], screen
    for file in ("trainer_state.json", "all_results.json"):
        assert without_times(json.loads((tmp_path / "run" / file).read_text())) == without_times(
            json.loads((other / file).read_text())
        )
    assert without_times(read_jsonl(tmp_path / "run/trainer_log.jsonl")) == without_times(
        read_jsonl(other / "trainer_log.jsonl")
    )
    assert (tmp_path / "run/adapter_model.safetensors").read_bytes() == (
        other / "adapter_model.safetensors"
    ).read_bytes()


# ---- two runs in one folder ----------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(fork_server, uninterrupted, tmp_path):
    """While the first one lives; its lock ends with the process, even when that is killed."""
    output = tmp_path / "run"
    output.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from runtime.resume import lock; "
            "lock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()",
            str(output),
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        codes, screen = fork_server.run(output, overwrite_output_dir=True)
        assert (
            codes == [1] and f"another run is using {output} (process {holder.pid} on" in screen
        ), screen
    finally:
        holder.kill()
        holder.wait()
    assert fork_server.run(output)[0] == [0]
    assert_same_end(output, uninterrupted(1)[0])


# ---- kernels ------------------------------------------------------------------------------------

CHOSEN = {"flash_attn": "auto", "pin_kernels.matmul": None}     # by the clock
FIRST = ["fastest_here", "sdpa-math", "onednn"]
LATER = ["fastest_here", "plain", "torch"]


def adapter_of(output) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


@pytest.mark.skipif("onednn" not in pick.pick_matmul("cpu", torch.float32).rates,
                    reason="torch is the only library of matrix products here")
def test_a_run_keeps_the_kernels_of_its_first_start(fork_server, tmp_path):
    """Killed before its first checkpoint and started again where timing favors other kernels: equal
    to an uninterrupted run bit for bit, as is a run with these kernels pinned; a new run differs.
    """
    assert fork_server.run(tmp_path / "whole", 1, [FIRST], **CHOSEN)[0] == [0]
    assert fork_server.run(tmp_path / "other", 1, [LATER], **CHOSEN)[0] == [0]
    assert adapter_of(tmp_path / "other") != adapter_of(tmp_path / "whole")

    codes, _ = fork_server.run(tmp_path / "run", 1, [FIRST, ["dies_at_step", 0, 2]], **CHOSEN)
    assert codes != [0] and not training_state.checkpoints_in(tmp_path / "run")
    codes, screen = fork_server.run(tmp_path / "run", 1, [LATER], **CHOSEN)
    assert codes == [0] and adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole")
    assert "attention: sdpa-math, with which the run began (measured now, the choice" in screen
    assert "matmul: onednn, with which the run began" in screen
    assert "attention: plain" not in screen and "matmul: torch" not in screen

    pins = {"pin_kernels.attention": "sdpa-math", "pin_kernels.matmul": "onednn"}
    codes, screen = fork_server.run(tmp_path / "pinned", 1, [LATER], **(CHOSEN | pins))
    assert codes == [0] and adapter_of(tmp_path / "pinned") == adapter_of(tmp_path / "whole")
    assert "matmul: onednn, as pinned" in screen


def test_other_settings_choose_their_own_kernels(fork_server, tmp_path):
    codes, _ = fork_server.run(tmp_path, 1, [FIRST, ["dies_at_step", 0, 2]], **CHOSEN)
    assert codes != [0]
    _, screen = fork_server.run(tmp_path, 1, [LATER], **CHOSEN, learning_rate=1e-3)
    assert "with which the run began" not in screen


def test_full_determinism_leaves_nothing_to_timing(fork_server, tmp_path):
    for name, favored in (("a", FIRST), ("b", LATER)):
        codes, screen = fork_server.run(tmp_path / name, 1, [favored], **CHOSEN,
                                        full_determinism=True)
        assert codes == [0], screen
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "b")


def test_the_number_of_threads_is_kept_as_the_kernels_are(monkeypatch):
    """That of the first start, or pinned; what this machine cannot do is said."""
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)

    def kept(begun=None, pins=None, **more):
        kernels = Kernels(threads=4, threads_tried=(4, 3, 2), lines=["threads: 4"])
        keep_kernels(kernels, Config(pin_kernels=pins or {}, **more), begun or {})
        return kernels.threads, kernels.lines

    assert kept()[0] == 4
    assert kept({"threads": 2})[0] == 2
    assert kept({"threads": 0})[0] == 0         # of a release before them
    assert kept(pins={"threads": "3"})[0] == 3
    assert kept(full_determinism=True)[0] == 0
    assert used == [4, 2, 3]
    threads, lines = kept({"threads": 16})
    assert threads == 4 and "threads: 4; 16, with which the run began, does not work" in lines[-1]
    with pytest.raises(ValueError, match="pin_kernels.threads: unknown or unsuitable kernel '9'"):
        kept(pins={"threads": "9"})


@pytest.mark.parametrize("pin, words", [
    ("attention=sdpa-mat", "unknown or unsuitable kernel 'sdpa-mat' (did you mean 'sdpa-math'?)"),
    ("matmul=cutlass", "pin_kernels.matmul: unknown or unsuitable kernel 'cutlass'"),
    ("atention=plain", "unknown part 'atention' (did you mean 'attention'?)"),
])
def test_a_pinned_kernel_that_does_not_exist(pin, words, fork_server, tmp_path):
    part, _, name = pin.partition("=")
    codes, screen = fork_server.run(tmp_path, flash_attn="auto", **{f"pin_kernels.{part}": name})
    assert codes == [1] and words in screen, screen


# ---- what the user keeps in output_dir ----------------------------------------------------------


def holds(folder) -> dict:
    """{path: content} of all files in a folder, without the lock."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != resume.LOCK}


def test_overwriting_removes_only_what_runs_have_written(fork_server, uninterrupted, tmp_path):
    """Folders with names that a run uses or used, a file in a checkpoint, another model, and a
    checkpoint of another program."""
    output = shutil.copytree(uninterrupted(1)[0], tmp_path / "run")
    kept = {}
    for place in ("final/thesis.txt", "checkpoint-best/model.safetensors", "checkpoint-4.partial/a",
                  "checkpoint-8/notes.txt", "checkpoint-3/photos/one.jpg",
                  "models/base/config.json", "checkpoint-12.ab.partial/b", "checkpoint-8.old/c",
                  "data.jsonl"):
        (output / place).parent.mkdir(parents=True, exist_ok=True)
        (output / place).write_text(f"mine: {place}")
        kept[place] = f"mine: {place}".encode()
    (output / "checkpoint-10").mkdir()
    weights = (output / "checkpoint-8/adapter_model.safetensors").read_bytes()
    (output / "checkpoint-10/adapter_model.safetensors").write_bytes(weights)
    codes, screen = fork_server.run(output, overwrite_output_dir=True, max_steps=10,
                                    resume_from_checkpoint=None)
    assert codes == [0], screen
    found = holds(output)
    for place, content in kept.items():
        moved = place.replace("checkpoint-8/", "checkpoint-8.kept/")
        moved = moved.replace("checkpoint-3/", "checkpoint-3.damaged/")
        assert found[moved] == content, (moved, list(found))
    assert found["checkpoint-10.kept/adapter_model.safetensors"] == weights
    assert found["checkpoint-10/adapter_model.safetensors"] != weights
    assert [path.name for path in (output / "checkpoint-8.kept").iterdir()] == ["notes.txt"]
    assert "checkpoint-8 is kept as checkpoint-8.kept: it holds notes.txt" in screen


def test_only_a_folder_in_which_a_run_has_worked_is_overwritten(tmp_path):
    """Not a base model or a project whose README.md a run would replace."""
    base = shutil.copytree(ROOT / "models/tiny", tmp_path / "base")
    before = holds(base)
    with pytest.raises(ValueError, match="holds config.json, and no run of this program"):
        resume.find_resume(configured(base, overwrite_output_dir=True))
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds README.md, and no run of this program"):
        resume.find_resume(configured(project, overwrite_output_dir=True))
    assert holds(base) == before and holds(project) == {"README.md": b"mine"}
    (project / "README.md").rename(project / "notes.md")
    assert resume.find_resume(configured(project, overwrite_output_dir=True)) is None


@pytest.mark.parametrize("own, words", [
    (dict(dataset="run/checkpoint-8/rows.jsonl"), "rows.jsonl lies in output_dir, whose checkp"),
    (dict(dataset="run/trainer_log.jsonl"), "trainer_log.jsonl lies in output_dir and has a name"),
    (dict(dataset_dir="run/checkpoint-8"), "checkpoint-8 lies in output_dir"),
    (dict(model_name_or_path="run/checkpoint-8"), "checkpoint-8 lies in output_dir"),
    (dict(adapter_name_or_path="run"), "run is output_dir, whose weights a new run replaces"),
])
def test_what_a_run_reads_is_not_replaced(own, words, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(uninterrupted(1)[0], "run")
    Path("run/checkpoint-8/rows.jsonl").write_text("{}")
    before = holds(Path("run"))
    settings = configured("run", overwrite_output_dir=True, resume_from_checkpoint=None, **own)
    with pytest.raises(ValueError, match=words):
        resume.find_resume(settings)
    assert holds(Path("run")) == before


def test_rotation_leaves_checkpoints_of_others_alone(tmp_path):
    for number in (1, 2, 3, 4):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text("weights")
        if number > 1:
            training_state.write_checksums(folder)
    (tmp_path / "checkpoint-2/notes.txt").write_text("mine")
    resume.remove_old_checkpoints(configured(tmp_path, save_total_limit=1), tmp_path, None)
    assert holds(tmp_path).keys() == {
        "checkpoint-1/adapter_model.safetensors", "checkpoint-2.kept/notes.txt",
        "checkpoint-4/adapter_model.safetensors", "checkpoint-4/checksums.json"}


def main(kills, seed):
    """The long run: print its kills, one per line."""
    import tempfile

    fork_server = ForkServer()
    with tempfile.TemporaryDirectory() as here:
        references = {
            world: uninterrupted_run(fork_server, Path(here) / f"whole{world}", world)
            for world in (1, 2)
        }
        for place, kill in enumerate(
            kill_until(fork_server, Path(here), references.get, int(kills), int(seed)), 1
        ):
            print(place, *kill)
    fork_server.close()


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 1 else serve_forks()
