"""fast/tiled_mlp.py: tiled MLPs equal whole ones in outputs and gradients."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fast import tiled_mlp
from fast.fused_block import fuse_blocks
from fast.tiled_mlp import tile_mlps
from lora import LoRAConfig, attach_lora
from checkpoint.adapters import variant_of
from methods.oft import OFTConfig
from model import CausalLM, init_weights
from tests.test_fused_block import loss_and_gradients, trainable_family
from tests.common import needs_shared, some, usual
from tests.tiny_models import RECORDED_MODELS, small_config

LENGTHS = [7, 12, 4]
ADAPTERS = {
    "full": None,
    "lora": LoRAConfig(r=4),
    "norms trained": LoRAConfig(r=4, modules_to_save=["post_attention_layernorm"]),
    "DoRA": LoRAConfig(r=4, use_dora=True),
    "dropout": LoRAConfig(r=4, lora_dropout=0.3),
    "DoRA with dropout": LoRAConfig(r=4, lora_dropout=0.3, use_dora=True),
    "OFT": OFTConfig(oft_block_size=16),
    "upper layers": LoRAConfig(r=4, target_modules=r".*layers\.[23]\..*_proj"),
}


def adapted(case, name="llama", dtype=torch.float32):
    """A small model with adapters that change its output, or trained in full."""
    model = CausalLM(small_config(name))
    init_weights(model, torch.Generator().manual_seed(0))
    model.to(dtype)
    lora = ADAPTERS[case]
    if lora is None:
        return model.requires_grad_(True)
    attach_lora(model, lora, seed=0, stored_name=model.config.stored_name, **variant_of(lora))
    generator = torch.Generator().manual_seed(2)
    for layer_name, p in model.named_parameters():
        if "lora_B" in layer_name or "oft_R" in layer_name:
            p.data.normal_(0, 0.05, generator=generator)
    return model.train()


def assert_equal(found, want, close=2e-5):
    """(hidden states, loss, gradients) of two models."""
    scale = max(1.0, float(want[0].abs().max()))
    assert (found[0] - want[0]).abs().max() <= close * scale
    assert abs(found[1] - want[1]) < close * abs(want[1])
    assert found[2].keys() == want[2].keys() and want[2]
    for key, grad in want[2].items():
        scale = max(1.0, float(grad.abs().max()))
        assert (found[2][key] - grad).abs().max() <= close * scale, key


class Patterned(nn.Module):
    """A dropout whose mask follows from the values: the same for a token in a tile and in a row."""

    def forward(self, x):
        return x * ((x.detach() * 1e3).sin() > -0.5)


@pytest.mark.parametrize("level", ("none", "mlp", "block"))
@pytest.mark.parametrize("fast", (True, False), ids=("fused", "plain"))
@pytest.mark.parametrize("case", usual(ADAPTERS, "full", "lora", "DoRA with dropout", "OFT"))
def test_tiles_equal_the_whole(case, fast, level):
    model = adapted(case)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), nn.Dropout):
            module.dropout = Patterned()
    levels = [level] * model.config.num_hidden_layers
    want = loss_and_gradients(model, LENGTHS)
    for tile in (5, 22, 23):                # 23 tokens: several tiles, a rest of one token, whole
        fuse_blocks(model, F.linear if fast else None, levels)
        tile_mlps(model, tile)
        assert_equal(loss_and_gradients(model, LENGTHS), want)


@needs_shared
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("name", some(RECORDED_MODELS))
def test_tiles_equal_the_whole_in_every_family(name, trained):
    model = trainable_family(name, trained)
    want = loss_and_gradients(model, [7, 12])
    for level in ("none", "block"):
        fuse_blocks(model, F.linear, [level] * model.config.num_hidden_layers)
        tile_mlps(model, 4)
        assert_equal(loss_and_gradients(model, [7, 12]), want)


@pytest.mark.parametrize("level", ("none", "block"))
@pytest.mark.parametrize("case", ("dropout", "DoRA with dropout"))
def test_the_backward_pass_draws_the_masks_of_the_forward_pass(case, level):
    """The twin draws its masks tile by tile, too, and leaves the rest to autograd."""
    results = []
    for tiled in (False, True):
        model = adapted(case)
        fuse_blocks(model, None, [level if tiled else "none"] * 4)
        if tiled:
            tile_mlps(model, 5)
        else:
            for block in model.model.layers:
                block.add_mlp = by_hand(block.add_mlp, 5)
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, LENGTHS))
        results[-1] += (torch.rand(1),)
    assert_equal(results[1][:3], results[0][:3], close=1e-6)
    assert torch.equal(results[0][3], results[1][3])        # as many numbers were drawn


def by_hand(add_mlp, tile):
    return lambda x, ctx: torch.cat([add_mlp(t, ctx) for t in x.split(tile, dim=1)], dim=1)


@pytest.mark.parametrize("case", ("full", "lora"))
def test_under_autocast(case):
    results = []
    for tile in (100, 5):
        model = adapted(case)
        fuse_blocks(model, None, ["block"] * 4)
        tile_mlps(model, tile)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            results.append(loss_and_gradients(model, LENGTHS))
    assert_equal(*results, close=0.02)


def test_weights_in_16_bits_are_summed_in_float32():
    """As exact as the whole: the sum of many tiles is rounded once."""
    model = adapted("full", dtype=torch.bfloat16)
    exact = adapted("full", dtype=torch.bfloat16).float()
    want = loss_and_gradients(exact, [96])[2]
    errors = []
    for tile in (96, 2):
        fuse_blocks(model, None)
        tile_mlps(model, tile)
        found = loss_and_gradients(model, [96])[2]
        errors.append(max(float((found[key].float() - grad).norm() / grad.norm())
                          for key, grad in want.items() if ".mlp." in key))
    assert errors[1] < 1.2 * errors[0]


def test_a_recomputed_block_computes_its_mlp_once_more_and_not_twice(monkeypatch):
    model = adapted("lora")
    fuse_blocks(model, F.linear, ["block"] * 4)
    tile_mlps(model, 8)                                         # 3 tiles
    calls = []
    in_tiles, gradients = tiled_mlp.in_tiles, tiled_mlp.tile_gradients
    monkeypatch.setattr(tiled_mlp, "in_tiles", lambda *a: calls.append("fwd") or in_tiles(*a))
    monkeypatch.setattr(tiled_mlp, "tile_gradients",
                        lambda *a: calls.append("bwd") or gradients(*a))
    loss_and_gradients(model, LENGTHS)
    assert calls == ["fwd"] * 4 + ["bwd"] * 12


def test_without_gradients_and_for_several_rows():
    model = adapted("lora").eval()
    ids = torch.arange(24).view(3, 8)
    with torch.no_grad():
        want = model(ids)
        tile_mlps(model, 5)
        assert torch.allclose(model(ids), want, atol=1e-6)
    hidden = model(ids)
    assert hidden.requires_grad and torch.allclose(hidden, want, atol=1e-6)
