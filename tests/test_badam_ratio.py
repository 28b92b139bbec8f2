"""methods/badam_ratio.py: which entries are trained when; AdamW on them alone.

Recorded runs of LLaMA-Factory (test_train.py) hold the masks, the draws of scatter and the update.
"""
import pytest
import torch

from methods.badam_ratio import EVERY, RatioOptimizer
from runtime.kernels import new_optimizer
from settings.config import Config
from tests.common import load_argv
from tests.tiny_models import tiny

MODES = ["adjacent", "scatter"]


def made(steps_done=0, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = tiny().to(dtype).requires_grad_(True)
    settings = {"learning_rate": 0.1, "badam_update_ratio": 0.3} | settings
    config = Config(use_badam=True, badam_mode="ratio", **settings)
    return model, RatioOptimizer(dict(model.named_parameters()), config, steps_done)


def take_step(model, optimizer, generator):
    """A step on random gradients; returns {name: gradient}."""
    for p in model.parameters():
        p.grad = None
    loss = sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum()
               for p in model.parameters() if p.requires_grad)
    loss.backward()
    optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", MODES)
def test_only_the_masked_entries_change(mode):
    model, optimizer = made(badam_mask_mode=mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_step(model, optimizer, torch.Generator().manual_seed(1))
    for name, p in model.named_parameters():
        changed = (p != before[name]).flatten().nonzero().flatten()
        if "embed" in name or "lm_head" in name:
            assert not len(changed) and p.grad is None
            continue
        index = optimizer.masks.index(p)
        assert len(index) == int(0.3 * p.numel()) and torch.equal(changed, index)
        side_by_side = torch.equal(index, torch.arange(len(index)))
        assert side_by_side == (mode == "adjacent") or len(index) < 8


@pytest.mark.parametrize("mode", MODES)
def test_the_masks_of_all_turns_cover_a_weight(mode):
    model, optimizer = made(badam_mask_mode=mode, badam_update_ratio=0.25)
    p = model.model.layers[0].mlp.up_proj.weight
    found = []
    for turn in range(5):
        optimizer.masks.move_to(turn)
        found.append(optimizer.masks.index(p))
    assert torch.equal(torch.cat(found[:4]).sort().values, torch.arange(p.numel()))
    assert torch.equal(found[4], found[0])                      # and start again


@pytest.mark.parametrize("mode", MODES)
def test_a_share_of_all_is_adamw(mode):
    """A ratio of 1 is AdamW without decay, with epsilon beside the uncorrected second moment."""
    model, optimizer = made(badam_mask_mode=mode, badam_update_ratio=1.0, adam_epsilon=0.0)
    other = tiny()
    other.load_state_dict(model.state_dict())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    twins = {name: p for name, p in other.named_parameters() if name in names}
    judge = torch.optim.AdamW(twins.values(), lr=0.1, eps=0.0, weight_decay=0.0)
    for step in range(3):
        gradients = take_step(model, optimizer, torch.Generator().manual_seed(step))
        for name, p in twins.items():
            p.grad = gradients[name]
        judge.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, dict(other.named_parameters())[name])


@pytest.mark.parametrize("mode", MODES)
def test_masks_and_state_change_every_100_steps_and_resume(mode):
    model, optimizer = made(badam_mask_mode=mode, learning_rate=1e-3)
    generator = torch.Generator().manual_seed(1)
    p = model.model.layers[0].mlp.up_proj.weight
    first = optimizer.masks.index(p)
    for _ in range(EVERY):
        take_step(model, optimizer, generator)
        assert torch.equal(first, optimizer.masks.index(p)) != (optimizer.steps == EVERY)
    assert not optimizer.state                                  # of the old mask
    resumed = made(EVERY + 3, badam_mask_mode=mode)[1]
    assert torch.equal(optimizer.masks.index(p), resumed.masks.index(p))


def test_small_steps_on_weights_in_bfloat16_add_up():
    model, optimizer = made(dtype=torch.bfloat16, learning_rate=1e-5)
    p = model.model.layers[0].mlp.up_proj.weight
    p.data.fill_(1.0)
    for _ in range(50):
        for one in model.parameters():
            one.grad = torch.ones_like(one) if one.requires_grad else None
        optimizer.step()
    copy = optimizer.state[p]["masked_master"]
    assert copy.dtype == torch.float32
    assert copy.mean() == pytest.approx(1 - 50e-5, abs=1e-6)


def test_the_plan_counts_the_state_of_the_masked_entries():
    model, optimizer = made()
    config = Config(use_badam=True, badam_mode="ratio", badam_update_ratio=0.3)
    planned = new_optimizer(dict(tiny().to("meta").named_parameters()), config, model.config,
                            torch.device("cpu")).state_bytes()
    take_step(model, optimizer, torch.Generator())
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    frozen = sum(8 * int(0.3 * p.numel()) for p in model.parameters() if not p.requires_grad)
    assert planned - frozen == pytest.approx(held, rel=0.05)


def test_verbose_tells_of_each_mask(capsys):
    model, optimizer = made(badam_verbose=2)
    assert "0 BAdam: mask 1, 0.3 of each weight" in capsys.readouterr().out
    assert "mask" not in capsys.readouterr().out


def test_what_is_not_read_is_said():
    config = load_argv("use_badam=true", "finetuning_type=full", "badam_mode=ratio",
                       "weight_decay=0.1", "badam_switch_interval=3")
    assert config.max_grad_norm == 0
    assert [note.split(":")[0] for note in config.notes] == [
        "badam_mode", "badam_mode", "badam_switch_interval"]
