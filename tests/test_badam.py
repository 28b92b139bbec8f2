"""methods/badam.py: which block is trained when; AdamW beside a float32 copy."""
import pytest
import torch

from methods.badam import BlockOptimizer, blocks_of
from runtime.kernels import new_optimizer
from settings.config import Config
from tests.tiny_models import tiny

TRAINED = {"badam_switch_interval": 2, "learning_rate": 0.1}


def made(steps_done=0, dtype=torch.float32, layers=3, **settings):
    model = tiny(num_hidden_layers=layers).to(dtype).requires_grad_(True)
    config = Config(use_badam=True, **(TRAINED | settings))
    return model, BlockOptimizer(dict(model.named_parameters()), config, steps_done)


def active(model):
    """Numbers of the layers that are trained."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith("model.layers.") for name in names)
    numbers = {int(name.split(".")[2]) for name in names}
    assert len(names) == sum(name.startswith(f"model.layers.{n}.")
                             for name, _ in model.named_parameters() for n in numbers)
    return numbers


def turns_of(steps, **settings):
    model, optimizer = made(**settings)
    found = []
    for _ in range(steps):
        found.append(*active(model))
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    return found


@pytest.mark.parametrize("settings, want", [
    ({}, [0, 1, 1, 2, 2, 0, 0, 1]),
    ({"badam_switch_mode": "descending"}, [2, 1, 1, 0, 0, 2, 2, 1]),
    ({"badam_switch_mode": "descending", "badam_start_block": 0}, [0, 2, 2, 1, 1, 0, 0, 2]),
    ({"badam_switch_mode": "fixed", "badam_start_block": 1}, [1] * 8),
    ({"badam_switch_interval": -1}, [0] * 8),
    ({"badam_switch_interval": 4}, [0, 0, 0, 1, 1, 1, 1, 2]),
])
def test_turns(settings, want):
    """The first is a step shorter, as in the package badam 1.4."""
    assert turns_of(8, **settings) == want
    for done, number in enumerate(want):            # and a resumed run goes on there
        assert active(made(steps_done=done, **settings)[0]) == {number}


def test_random_turns_visit_every_block_in_each_round():
    found = turns_of(12, badam_switch_mode="random", badam_switch_interval=1, layers=4)
    rounds = [found[0:3], found[3:7], found[7:11]]      # interval 1 skips a turn before step 1
    assert all(sorted(one) == [0, 1, 2, 3] for one in rounds[1:]) and rounds[1] != rounds[2]
    assert found == turns_of(12, badam_switch_mode="random", badam_switch_interval=1, layers=4)


def test_16_bit_weights_have_a_float32_copy_of_the_active_block():
    """Many small steps that bfloat16 alone would round away."""
    model, optimizer = made(dtype=torch.bfloat16, learning_rate=1e-4, badam_switch_interval=100)
    weight = model.model.layers[0].mlp.up_proj.weight
    start = weight.detach().clone()
    for _ in range(90):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    moved = float((start - weight.detach()).float().mean())
    assert moved == pytest.approx(90 * 1e-4, rel=0.05)
    assert optimizer.state[weight]["master"].dtype == torch.float32
    assert {name for name, p in model.named_parameters() if p in optimizer.state} == {
        name for name, _ in model.named_parameters() if name.startswith("model.layers.0.")}


def test_the_plan_counts_the_state_of_one_block():
    model = tiny(num_hidden_layers=4).requires_grad_(True)
    layers = sum(p.numel() for p in model.model.layers[0].parameters())
    inside = {name: p for name, p in model.named_parameters() if ".layers." in name}
    optimizer = new_optimizer(inside, Config(use_badam=True), model.config, torch.device("cpu"))
    assert optimizer.state_bytes() == pytest.approx(8 * layers, rel=0.01)


def test_a_start_block_that_the_model_lacks():
    with pytest.raises(ValueError, match="badam_start_block: 3 is none of the blocks 0 to 2"):
        made(badam_start_block=3)
    assert blocks_of({"model.layers.0.a": 0, "model.norm.weight": 0, "model.layers.10.b": 0}) == [
        "model.layers.0.", "model.layers.10."]
