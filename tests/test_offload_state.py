"""scale/offload_state.py: an optimizer whose state is elsewhere makes the same weights."""
import errno
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train
from methods.apollo import apollo_arguments
from methods.optimizers import further_arguments
from optim import make_optimizer
from runtime.memory import Workload, memory_plan, plan_lines
from scale import offload_state as offloading
from scale.offload_state import offload_state, places, windows
from settings.config import Config
from tests.common import load_argv, refusal
from tests.ranks import COMMON, small_world
from tests.tiny_models import small_config

CPU = torch.device("cpu")
PINNED = {"pin_kernels.matmul": "torch"}        # and not the fastest, which differs in the last bit
OPTIMIZERS = {
    "adamw": {},
    "adamw in 8 bits": dict(optim="adamw_8bit"),
    "adam_mini": dict(use_adam_mini=True),
    "muon": dict(use_muon=True),
    "galore": dict(use_galore=True, galore_rank=4, galore_update_interval=2),
    "apollo": dict(use_apollo=True, apollo_rank=4, apollo_update_interval=2),
}
SHAPES = {"model.embed_tokens.weight": (70, 16), "layers.0.self_attn.q_proj.weight": (16, 128),
          "layers.0.mlp.up_proj.weight": (300, 16), "layers.0.input_layernorm.weight": (16,),
          "layers.0.mlp.down_proj.weight": (16, 300)}


# ---- each optimizer ------------------------------------------------------------------------------


def steps(settings: dict, offload: bool, file=None, again: bool = False) -> dict:
    """Weights after five steps. again: a new optimizer goes on with the state after the second."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape, generator=generator))
               for name, shape in SHAPES.items()}
    config = Config(finetuning_type="full", learning_rate=1e-2, weight_decay=0.1, **settings)

    def new():
        more = further_arguments(config, small_config("llama"))
        if config.use_apollo:
            more = apollo_arguments(config)
        optimizer = make_optimizer(weights, config, CPU, **more)
        names = {p: name for name, p in weights.items()}
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        if offload:
            offload_state(optimizer, order, CPU, file)
        return optimizer

    optimizer = new()
    for step in range(5):
        if again and step == 2:
            before, optimizer = optimizer, new()
            for p, fields in before.state.items():
                for field, value in fields.items():
                    optimizer.put(p, field, value.clone())
        for p in weights.values():
            p.grad = torch.randn(p.shape, generator=generator)
        if step == 0:                       # as an expert that no token has been routed to
            weights["layers.0.mlp.up_proj.weight"].grad = None
        optimizer.step()
    return weights


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("place", ("memory", "file"))
def test_the_weights_are_those_without_offloading(name, place, tmp_path, monkeypatch):
    """Bit for bit, with state that is sent to the device and back, and one that is saved."""
    monkeypatch.setattr(offloading, "send", lambda tensor, device: tensor.clone())
    monkeypatch.setattr(offloading, "WINDOW", 3000)
    want = steps(OPTIMIZERS[name], offload=False)
    for again in (False, True):
        file = tmp_path / f"{again}/state.safetensors" if place == "file" else None
        found = steps(OPTIMIZERS[name], offload=True, file=file, again=again)
        assert all(torch.equal(found[key], want[key]) for key in want)


def test_the_file_is_the_state(tmp_path):
    """safetensors reads it while the run goes on; a new start does not touch the old file."""
    file = tmp_path / "optimizer_state/rank-0.safetensors"
    weights = {"a.weight": nn.Parameter(torch.ones(3, 2)), "b": nn.Parameter(torch.ones(0, 1))}
    optimizer = make_optimizer(weights, Config(), CPU)
    offload_state(optimizer, list(weights), CPU, file)
    for p in weights.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    on_disk = load_file(file)
    assert on_disk.keys() == {f"{name}|{field}" for name in weights
                              for field in ("step", "exp_avg", "exp_avg_sq")}
    assert on_disk["a.weight|exp_avg"].tolist() == [[pytest.approx(0.1)] * 2] * 3
    assert on_disk["b|step"] == 1
    other = make_optimizer(weights, Config(), CPU)
    offload_state(other, list(weights), CPU, file)
    other.step()
    assert optimizer.state[weights["a.weight"]]["step"] == 1
    optimizer.step()
    assert load_file(file)["a.weight|step"] == 1
    other.close()
    optimizer.close()
    assert not list(tmp_path.iterdir())


def test_windows_hold_neighbors_and_bytes_are_aligned(monkeypatch):
    monkeypatch.setattr(offloading, "WINDOW", 20)
    states = [{"a": torch.zeros(n)} for n in (2, 2, 9, 1, 4)]
    assert [(w.start, w.stop) for w in windows(states)] == [(0, 2), (2, 3), (3, 5)]
    spans = places({"a": (torch.Size([3]), torch.uint8), "b": (torch.Size([]), torch.float32),
                    "c": (torch.Size([3]), torch.bfloat16)})
    assert spans == {"b": (0, 4), "c": (4, 10), "a": (10, 13)}


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(offloading.os, "posix_fallocate", full)
    optimizer = make_optimizer({"a": nn.Parameter(torch.ones(3, 2))}, Config(), CPU)
    offload_state(optimizer, ["a"], CPU, tmp_path / "state/rank-0.safetensors")
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    with pytest.raises(OSError, match="the optimizer state takes .* free; name another output_dir"):
        optimizer.step()


# ---- whole runs ----------------------------------------------------------------------------------


def run(here, name, **more):
    """train.py on a tiny model, in here/name."""
    settings = COMMON | dict(finetuning_type="full", max_steps=4, save_strategy="steps",
                             save_steps=2, output_dir=f"{here}/{name}") | PINNED
    for key in ("model_name_or_path", "dataset"):
        settings[key] = f"{here}/{settings[key]}"
    train.main([f"{key}={value}" for key, value in (settings | more).items()])


def bytes_of(here, name) -> list[bytes]:
    return [(here / name / file).read_bytes() for file in (
        "model.safetensors", "checkpoint-2/optimizer.safetensors",
        "checkpoint-4/optimizer.safetensors")]


def test_runs_with_offloaded_state_are_the_same(tmp_path, capfd):
    """Bit for bit; also where the state goes elsewhere in the middle, and nothing is left."""
    small_world(tmp_path)
    left_by_a_kill = tmp_path / "plain/optimizer_state/rank-0.safetensors"
    left_by_a_kill.parent.mkdir(parents=True)
    left_by_a_kill.touch()
    run(tmp_path, "plain")
    assert not left_by_a_kill.parent.exists()
    for place in ("cpu", "nvme"):
        run(tmp_path, place, offload_optimizer=place)
        assert bytes_of(tmp_path, place) == bytes_of(tmp_path, "plain")
        run(tmp_path, f"{place} resumed", offload_optimizer=place,
            resume_from_checkpoint=f"{tmp_path}/plain/checkpoint-2")
        found = [(tmp_path / folder / "model.safetensors").read_bytes()
                 for folder in (f"{place} resumed", "plain")]
        assert found[0] == found[1]
        assert not (tmp_path / place / "optimizer_state").exists()
    printed = capfd.readouterr().out
    assert "in main memory, which is the same here" in printed
    assert "in a file in output_dir, not in the total" in printed


# ---- the memory plan -----------------------------------------------------------------------------


def test_the_plan_counts_state_where_it_is():
    def plan(device, world=1, **settings):
        config = Config(finetuning_type="full", **settings)
        return memory_plan(config, Workload(
            small_config("llama"), None, [[20]], torch.float32, "plain", device, world=world,
            host_bytes=10**9))

    plain = plan("cpu")
    on_disk, in_memory = (plan("cpu", offload_optimizer=place) for place in ("nvme", "cpu"))
    assert in_memory.total == plain.total and on_disk.total == plain.total - plain.optimizer
    assert on_disk.state_outside == in_memory.state_outside == plain.optimizer
    on_gpu = plan("cuda", offload_optimizer="cpu")
    assert on_gpu.in_host_memory == plain.optimizer == on_gpu.optimizer     # one window is enough
    assert "page-locked, not in the total" in "\n".join(plan_lines(on_gpu, None))
    sharded = plan("cuda", world=4, zero_stage=1, offload_optimizer="nvme")
    assert sharded.state_outside == -(-plain.optimizer // 4) and sharded.in_host_memory == 0
    assert not plan("cuda", offload_optimizer="cpu").fits(10**4)


def test_badam_is_refused():
    assert "leave offload_optimizer out" in refusal(
        "model_name_or_path=m", "dataset=d", "output_dir=o", "finetuning_type=full",
        "use_badam=true", "offload_optimizer=cpu", script="train")


def test_the_settings_of_a_deepspeed_file(tmp_path):
    for stage, device, wanted in ((2, "cpu", (2, [], "cpu")), (1, "nvme", (1, [], "nvme")),
                                  (3, "nvme", (0, ["full_shard", "offload"], "nvme"))):
        section = {"stage": stage, "offload_optimizer": {"device": device, "nvme_path": "x"}}
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}))
        config = load_argv("model_name_or_path=m", "dataset=d", "output_dir=o",
                           "finetuning_type=full", f"deepspeed={tmp_path}/ds.json", script="train")
        assert (config.zero_stage, config.fsdp, config.offload_optimizer) == wanted
        assert f"offload_optimizer: {device}" in config.notes[0] or device == "cpu"
