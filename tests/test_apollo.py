"""methods/apollo.py: its scales and limits by hand; whole runs are compared in test_train.py."""
import math

import pytest
import torch

from methods.apollo import GROWTH, limit_growth, scales
from runtime.kernels import new_optimizer
from settings.config import Config
from tests.tiny_models import TINY, tiny


def made(**settings):
    model = tiny().requires_grad_(True)
    config = Config(use_apollo=True, learning_rate=0.01, **{"apollo_rank": 4, **settings})
    return model, new_optimizer(dict(model.named_parameters()), config, model.config,
                                torch.device("cpu"))


def test_all_is_every_matrix_but_embedding_and_head():
    model, optimizer = made()
    rules = {id(p): group["update"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        projected = p.dim() == 2 and "embed" not in name and "lm_head" not in name
        assert rules[id(p)] == ("apollo" if projected else "adamw_then_decay"), name
    with pytest.raises(ValueError, match="apollo_target: q_prj is in the name of no trained"):
        made(apollo_target=["q_prj"])


def test_moments_have_the_rank_and_the_longer_side():
    model, optimizer = made()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    down = model.model.layers[0].mlp.down_proj.weight               # (32, 48)
    state = optimizer.state[down]
    assert state["low_avg"].shape == (4, 48) and state["projection"].shape == (32, 4)
    assert optimizer.state_bytes() == sum(
        t.nbytes for fields in optimizer.state.values() for name, t in fields.items()
        if name != "seed") + sum(8 for fields in optimizer.state.values() if "seed" in fields)
    assert TINY["intermediate_size"] == 48


def test_a_rank_above_the_shorter_side_takes_all_its_directions():
    model, optimizer = made(apollo_proj="svd", apollo_rank=999)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[model.model.layers[0].mlp.down_proj.weight]     # (32, 48)
    assert state["low_avg"].shape == (32, 48) and state["projection"].shape == (32, 32)


def test_each_matrix_and_each_interval_has_another_projection():
    model, optimizer = made(apollo_update_interval=2)
    matrices = [model.model.layers[i].mlp.up_proj.weight for i in (0, 1)]
    seen = []
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append([optimizer.state[p]["projection"].clone() for p in matrices])
    assert not torch.equal(seen[0][0], seen[0][1])
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[1][0], seen[2][0])
    assert seen[0][0].std() == pytest.approx(1 / math.sqrt(4), rel=0.2)


def test_scales_of_rows_columns_and_of_the_whole():
    low, direction = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    assert torch.allclose(scales(direction, low, "channel", True), torch.tensor([[1.0], [0.5]]))
    columns = torch.tensor([[26 ** 0.5 / 3, 0.0]])
    assert torch.allclose(scales(direction, low, "channel", False), columns)
    assert scales(direction, low, "tensor", True) == pytest.approx((26 / 29) ** 0.5)


def test_an_update_grows_by_one_percent_at_most():
    update = torch.tensor([3.0, 4.0])
    kept, norm = limit_growth(update, torch.tensor(0.0), first=True)
    assert torch.equal(kept, update) and norm == 5
    held, norm = limit_growth(update, torch.tensor(2.0), first=False)
    assert norm == pytest.approx(2 * GROWTH) and held.norm() == pytest.approx(2 * GROWTH)
    free, norm = limit_growth(update, torch.tensor(10.0), first=False)
    assert torch.equal(free, update) and norm == 5
