"""Two cards or more: do they compute what one does, and how much faster?

    python bench/gpu_cards.py ranks
    python bench/gpu_cards.py fsdp --device cpu --tiny      two processes on a CPU, through gloo

    ranks       train.py on N cards = on one with the same rows in each step: losses and adapter
    fsdp        the same with the base sharded over the cards
    nccl        the bytes a second of an all-reduce, and that its sum is right (RCCL on ROCm)
    scaling     tokens a second of Llama-3-8B's steps on N cards, each with its own rows, over one's

N is the largest power of two of the cards, at most 8 (--cards: fewer). The processes get the
variables that torchrun sets, so that they can be ended together when one fails.

Requires: gpu_speed.py, gpu_proofs.py.
Next: gpu.py; parallel.py, scale/fsdp.py.
Source: bus bandwidth 2 (N - 1) / N x bytes / seconds, as NVIDIA's nccl-tests count it.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime.device import pick_device
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from bench.common import BENCH, RESULT, ROOT, NotHere, run_part
from bench.gpu_proofs import (RECIPE, logged, require, rows_of_recipe, run_train,
                              temporary_folder)
from parallel import start_ranks
from runtime.throughput import synchronize

LARGEST_DIFFERENCE = 1e-4       # of losses, and relative of the adapter's matrices


def world_of(asked) -> int:
    """How many cards to use; two processes on a CPU. Raises NotHere for a single card."""
    if asked.device == "cpu":
        return 2
    cards = min(asked.cards or 8, torch.cuda.device_count(), 8)
    if cards < 2:
        raise NotHere(f"{torch.cuda.device_count()} card here; this part needs two")
    return 1 << (cards.bit_length() - 1)


def launch(world: int, command: list) -> str:
    """Run a command as `world` ranks; what the first one printed.

    Raises RuntimeError with the last lines of the first rank that fails; the others are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1)}
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        ranks = []
        for rank, file in enumerate(files):
            env = os.environ | {name: str(value) for name, value in shared.items()}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen([str(part) for part in command], cwd=ROOT, env=env,
                                          stdout=file, stderr=subprocess.STDOUT))
        try:
            codes = wait_for_all(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read())
    for rank, code in enumerate(codes):
        if code:
            raise RuntimeError(f"rank {rank} of {world} ended with {code}: "
                               + " | ".join(texts[rank].strip().splitlines()[-3:])[-300:])
    return texts[0]


def wait_for_all(ranks: list) -> list:
    """The exit codes when all have ended or one has failed; None for those that still run."""
    while True:
        codes = [process.poll() for process in ranks]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.1)


# ---- the same result -----------------------------------------------------------------------------


def compare(asked, *more) -> dict:
    """A part: the small recipe on one card, and on all with `more` settings; 16 rows a step."""
    world, rows = world_of(asked), rows_of_recipe(asked)
    shared = ("ask=[]", f"max_steps={6 if asked.tiny else 20}", "logging_steps=1")
    with temporary_folder() as folder:
        alone, _ = run_train(folder / "one", asked, *shared,
                             f"per_device_train_batch_size={rows}", config=RECIPE)
        command = [sys.executable, "train.py", "--config", RECIPE, *shared, "plot_loss=false",
                   f"output_dir={folder / 'many'}", f"per_device_train_batch_size={rows // world}",
                   f"use_cpu={asked.device == 'cpu'}", *more]
        printed = launch(world, command)
        together = logged(folder / "many")["losses"]
        one, many = (load_file(folder / name / "adapter_model.safetensors")
                     for name in ("one", "many"))
    require(not more or "weights held by each rank" in printed, "the weights were not sharded")
    loss = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    weights = max(float((one[name] - many[name]).norm() / (one[name].norm() + 1e-12))
                  for name in one)
    words = f"losses within {loss:.1g}, adapters within {weights:.1g}"
    require(max(loss, weights) < LARGEST_DIFFERENCE, f"{world} ranks and one differ: {words}")
    return {"says": f"{world} ranks = one over {len(alone)} steps: {words}", "losses": together}


def ranks(asked) -> dict:
    return compare(asked)


def fsdp(asked) -> dict:
    return compare(asked, "fsdp=full_shard")


# ---- speed ---------------------------------------------------------------------------------------


def result_of(text: str) -> dict:
    """The figures in the last line RESULT of a part."""
    lines = [line for line in text.splitlines() if line.startswith(RESULT)]
    found = json.loads(lines[-1].removeprefix(RESULT))
    require(found.pop("status") == "done", found["says"])
    return found


def part_command(file: str, part: str, asked) -> list:
    command = [sys.executable, BENCH / file, part, "--device", asked.device]
    command += ["--tiny"] if asked.tiny else []
    command += ["--kernel", asked.kernel] if asked.kernel else []
    return [*command, "--seconds", asked.seconds]


def nccl(asked) -> dict:
    """A part: all-reduces of the size of LoRA's gradients and of a large buffer."""
    world = world_of(asked)
    return result_of(launch(world, part_command("gpu_cards.py", "nccl-rank", asked)))


def nccl_rank(asked) -> dict:
    """One rank of `nccl`."""
    device = pick_device(asked.device == "cpu")
    ranks = start_ranks(device, 120)
    found = {}
    for mebibytes in ((1,) if asked.tiny else (64, 512)):
        buffer = torch.ones(mebibytes * 2**18, device=device)
        dist.all_reduce(buffer)
        require(bool((buffer == ranks.world).all()), f"{mebibytes} MiB: the sum is wrong")
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(10):
            dist.all_reduce(buffer)
        synchronize(device)
        seconds = (time.perf_counter() - begun) / 10
        share = 2 * (ranks.world - 1) / ranks.world
        found[f"{mebibytes} MiB"] = share * 4 * buffer.numel() / seconds / 1e9
    dist.barrier()              # no rank ends while another still reads
    words = ", ".join(f"{size} at {rate:.3g} GB/s" for size, rate in found.items())
    return {"says": f"{ranks.world} ranks, bus bandwidth of all-reduce: {words}; sums right",
            "gb_per_second": found, "world": ranks.world}


def scaling(asked) -> dict:
    """A part: train-8b on one card and on all of them."""
    world = world_of(asked)
    one, many = (result_of(launch(count, part_command("gpu_speed.py", "train-8b", asked)))
                 for count in (1, world))
    ratio = world * many["tokens_per_second"] / one["tokens_per_second"]
    return many | {"tokens_per_second": world * many["tokens_per_second"], "world": world,
                   "one_card_tokens_per_second": one["tokens_per_second"], "ratio": ratio,
                   "says": f"{world} cards: {ratio:.2f} x one ({ratio / world:.0%} of linear), "
                           f"{one['says']} on each"}


PARTS = {"ranks": ranks, "fsdp": fsdp, "nccl": nccl, "nccl-rank": nccl_rank, "scaling": scaling}

if __name__ == "__main__":
    run_part(PARTS)
