"""Training and decoding under torch's FakeTensorMode on the paper GPU, in a process of its own.

    LD_PRELOAD=…/libpaper_cudart.so LD_LIBRARY_PATH=… python -m tests.paper_steps FOLDER

A CUDA build of torch, preloaded with ../shared/paper_gpu, believes in a card whose kernels do
nothing. Real operators check devices, dtypes and strides there, and the autograd engine runs its
threads; a value that the host needs raises DataDependentOutputException or
DynamicOutputShapeException, with the line that needs it.

Requires: test_rehearsal.py (the runs).
"""
import json
import sys
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

import attention
import losses
import train
from attention import TORCH
from checkpoint.load import load_model
from fast import attention_picker, decode, grouped_experts
from fast.batch_decode import RowCache
from data import IGNORE
from generate import next_scores
from parallel import Ranks
from methods import fp8
from runtime import build, run
from runtime.offload import EmbeddingOutside
from runtime.run import Run
from scale import fsdp
from tests import test_rehearsal as rehearsal
from tests.common import ROOT

KERNELS = ("sdpa-flash", "sdpa-efficient", *(("torch-varlen",) if TORCH >= (2, 12) else ()))
# runs that start no other operators on the device than the rest, and one that waits for its router
ALIKE = {"compiled steps", "DFT", "EAFT", "label smoothing", "orpo", "little memory", "Muon",
         "Adam-mini", "experts", "experts of nf4 in one product"}
if TORCH < (2, 8):                      # no grouped product
    ALIKE.add("experts in one product")
SHARDED = {
    "sharded lora": ["fsdp=full_shard"],
    "sharded full": ["fsdp=full_shard", "finetuning_type=full"],
}
MODE = FakeTensorMode(allow_non_fake_inputs=True)


class End(Exception):
    """The loop is over."""


def faked(model: nn.Module) -> nn.Module:
    """Put a fake tensor in the place of every parameter and buffer on the device."""
    fakes = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_cuda and not isinstance(p, FakeTensor):
                if id(p) not in fakes:
                    fake = MODE.from_tensor(p.detach())
                    fakes[id(p)] = nn.Parameter(fake, requires_grad=p.requires_grad)
                module._parameters[name] = fakes[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_cuda and not isinstance(buffer, FakeTensor):
                module._buffers[name] = MODE.from_tensor(buffer)
    return model


def send_fakes(stack: ExitStack):
    """What is sent to the device arrives as a fake tensor."""
    send = attention.to_device

    def to_device(tensor, device):
        return MODE.from_tensor(send(tensor, device))

    for module in list(sys.modules.values()):
        if getattr(module, "to_device", None) is send:
            stack.enter_context(patch.object(module, "to_device", to_device))


def with_real_rows(model: nn.Module) -> nn.Module:
    """An embedding in main memory is looked up there, and its rows are pinned."""
    embedding = model.model.embed_tokens
    if isinstance(embedding, EmbeddingOutside):
        with unset_fake_temporarily():
            rows = torch.zeros(embedding.weight.shape, dtype=embedding.weight.dtype)
        embedding.weight = nn.Parameter(rows, requires_grad=False)
    return model


def train_on_paper(kernel: str, folder: Path, settings: list[str]):
    """Run train.py's loop: three steps, three waits."""
    waits = []

    def load_fakes(folder, dtype=None, device="cpu", **options):
        with unset_fake_temporarily():
            return faked(load(folder, dtype, "cpu", **options).to(device))

    def build_model(*args):
        with MODE:                              # adapters are made of fake tensors
            model = model_of(*args)
        return with_real_rows(model)

    def checked_step(model, objective, step, gradients, *args):
        out = step_of(model, objective, step, gradients, *args)
        check_gradients(gradients.parameters)
        return out

    def build_objective(*args):
        objective = objective_of(*args)
        if objective.reference is not None:
            faked(objective.reference)
        if hasattr(objective, "head"):
            faked(objective.head)
        return objective

    def sync(ranks, loss, grad_norm, metrics, stop):
        assert loss.is_cuda and loss.dtype == torch.float32 and grad_norm.is_cuda
        waits.append(metrics)
        return 1.0, 1.0, {name: [1.0, 1.0] for name in metrics}, 0.0

    def end_loop(self):
        raise End

    def only_one(names, problem):
        return [attention_picker.Verdict(name, ms=1.0) if name == kernel else
                attention_picker.Verdict(name, reason="not rehearsed") for name in names]

    load, model_of, objective_of = build.load_model, train.build_model, train.build_objective
    step_of = train.train_step
    with ExitStack() as stack:
        send_fakes(stack)
        for owner, name, value in (
                (build, "load_model", load_fakes), (fp8, "fp8_error", lambda *args: 0.0),
                (grouped_experts, "grouped_error", lambda *args: 0.0),
                (train, "build_model", build_model), (train, "build_objective", build_objective),
                (train, "train_step", checked_step),
                (train, "check_first_batch", lambda *args: None),
                (run, "save_pissa_start", lambda *args: None), (Ranks, "sync", sync),
                (Run, "end_loop", end_loop), (attention_picker, "try_kernels", only_one)):
            stack.enter_context(patch.object(owner, name, value))
        try:
            train.main([*rehearsal.CONFIG, f"output_dir={folder}",
                        f"pin_kernels.attention={kernel}", *settings])
        except End:
            assert len(waits) == 3


def train_sharded(kernel: str, folder: Path, settings: list[str]):
    """train_on_paper as the first of two ranks, whose messages go nowhere (torch's fake group)."""
    step_of = train.train_step
    mesh_of = fsdp.init_device_mesh

    def start_ranks(device, timeout):
        if not dist.is_initialized():
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        return Ranks(rank=0, world=2)

    def device_mesh(*args):
        with unset_fake_temporarily():
            return mesh_of(*args)

    def supervised(targets, device):
        with unset_fake_temporarily():
            rows = int((targets != IGNORE).sum())
        return [torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2)]

    def step_in_mode(*args):
        with MODE:                              # what fully_shard gathers is fake, too
            return step_of(*args)

    with ExitStack() as stack:
        for owner, name, value in (
                (train, "start_ranks", start_ranks), (train, "train_step", step_in_mode),
                (fsdp, "check_torch", lambda *args: None),
                (fsdp, "init_device_mesh", device_mesh),
                (fsdp, "fill", lambda *args, **kwargs: None),
                (fsdp, "print_shards", lambda *args: None),
                (run, "check_same_start", lambda *args: None),
                (losses, "supervised", supervised),
                (Ranks, "total", lambda ranks, *numbers: list(numbers)),
                (Ranks, "gather", lambda ranks, tensor: [tensor] * ranks.world)):
            stack.enter_context(patch.object(owner, name, value))
        train_on_paper(kernel, folder, settings)


def check_gradients(parameters: dict):
    """Every trained weight has a gradient on the device, in its own dtype."""
    trained = {name: p for name, p in parameters.items() if p.requires_grad}    # BAdam: a block
    for name, p in trained.items():
        assert p.grad is not None and p.grad.is_cuda and p.grad.dtype == p.dtype, name


@torch.no_grad()
def decode_on_paper(kernel: str):
    """A prompt and a token by one step of chat, and by one of many prompts."""
    model = faked(load_model(ROOT / "models/tiny", torch.bfloat16).to("cuda"))
    model.kernel = kernel
    with MODE:
        decode.prepare(model)
        cache = decode.StaticCache(model.config.num_hidden_layers)
        next_scores(model, torch.zeros(1, 3, dtype=torch.int64, device="cuda"), cache)
        cache.position = torch.zeros(1, dtype=torch.int64, device="cuda")
        cache.make_room(decode.SMALLEST_CACHE)
        token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        scores = decode.one_step(model, token, cache, decode.SMALLEST_CACHE)
    assert scores.is_cuda and scores.dtype == torch.float32
    rows = RowCache(model.config.num_hidden_layers, 3, torch.device("cuda"))
    with ExitStack() as stack:
        send_fakes(stack)
        rows.read_prompts(model, [[1, 2, 3], [4, 5]])
        assert rows.read_tokens(model, [6, 7]).is_cuda


def trials(folder: Path) -> dict:
    """{name: a function that rehearses it}"""
    world = rehearsal.make_world(folder)
    found = {f"decode with {kernel}": partial(decode_on_paper, kernel) for kernel in KERNELS}
    for name in rehearsal.RUNS:
        settings = rehearsal.settings_of(name, world)
        kernel = "sdpa-flash" if {"bf16=true", "fp16=true"} & set(settings) else "plain"
        if name not in ALIKE:
            found[name] = partial(train_on_paper, kernel, folder / "runs" / name, settings)
    # older versions of FakeTensorMode know no messages between ranks
    for name, more in SHARDED.items() if TORCH >= (2, 11) else ():
        settings = [f"model_name_or_path={world}/dense", "bf16=true", *more]
        found[name] = partial(train_sharded, "sdpa-flash", folder / "runs" / name, settings)
    return found


def where_it_failed(error: Exception) -> str:
    """The error, and the lines of this program that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames
            if frame.filename.startswith(str(ROOT))]
    return f"{type(error).__name__}: {error} ({', '.join(ours[-4:])})"


def main(folder: Path, *names: str):
    """Rehearse everything, or what is named; print {name: what went wrong, or ""} as JSON."""
    failures = {}
    for name, rehearse in trials(folder).items():
        if names and name not in names:
            continue
        failures[name] = ""
        try:
            rehearse()
        except Exception as error:
            failures[name] = where_it_failed(error)
    print(json.dumps(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
