"""methods/optimizers.py: 8-bit AdamW, Muon and GaLore against their packages and by hand."""
import math

import pytest
import torch
from torch import nn

from checkpoint.training_state import NO_ROWS
from methods.optimizers import BLOCK, UPDATES, from_8bit, levels, orthogonal, to_8bit
from optim import Optimizer, make_optimizer
from settings.config import Config
from tests.tiny_models import further, tiny


def bytes_of(named, config):
    return make_optimizer(named, config, torch.device("cpu"), **further(config)).state_bytes()


# ---- 8-bit states ----


def steps_of(update, shape, count=10, peer=None, decades=2, **more):
    """(parameter, state) after some steps.

    The gradients' columns differ in size by `decades` decades. peer: another package's optimizer to
    use instead of ours.
    """
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator))
    group = {"params": [p], "lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8,
             "update": update}
    optimizer = peer([p]) if peer else Optimizer([group | more], UPDATES)
    for _ in range(count):
        p.grad = torch.randn(shape, generator=generator) * torch.logspace(-decades, 0, shape[-1])
        optimizer.step()
    return p.detach(), optimizer.state[p]


def test_levels_of_the_8_bit_code():
    """Values as bitsandbytes lists them; neighbors differ by at most a tenth of the largest, near 0
    far less."""
    signed, unsigned = levels(True), levels(False)
    for table, lowest in ((signed, -0.99296875), (unsigned, 0.0)):
        assert len(table.unique()) == 256
        assert table.max() == 1
        assert table.min() == pytest.approx(lowest)
        assert (table == 0).sum() == 1 and table.diff().max() < 0.03
    assert [float(x) for x in signed[127:130]] == pytest.approx([0, 5.5e-7, 3.25e-6], rel=1e-5)
    assert [float(x) for x in unsigned[:4]] == pytest.approx(
        [0, 3.25e-7, 7.75e-7, 2.125e-6], rel=1e-5
    )
    assert [float(x) for x in unsigned[-2:]] == pytest.approx([0.99648434, 1], rel=1e-6)


@pytest.mark.parametrize("signed", (True, False))
def test_8_bit_values_and_the_scale_of_each_block(signed):
    x = torch.randn(3, 5, 67, generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(-9, 3, 67)
    x = x if signed else x.abs()
    codes, scale = to_8bit(x, levels(signed))
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert len(scale) == math.ceil(x.numel() / BLOCK)
    back = from_8bit(codes, scale, levels(signed))
    scales = scale.repeat_interleave(BLOCK)[:x.numel()].view(x.shape)
    assert ((back - x).abs() <= 0.02 * scales).all()
    near = x.abs() > 1e-3 * scales
    assert ((back - x).abs() / x.abs())[near].mean() < 0.05 and (signed or (back > 0).all())
    assert not from_8bit(*to_8bit(torch.zeros(4), levels(signed)), levels(signed)).any()


def test_adamw_in_8_bits_follows_adamw():
    """The first step is equal; then the moments differ by 8-bit rounding."""
    exact, rough = (steps_of(update, (64, 80), 1) for update in ("adamw_plain", "adamw_8bit"))
    assert torch.allclose(exact[0], rough[0], atol=1e-6)
    (exact, state), (rough, bytes_) = (steps_of(update, (64, 80), 20)
                                       for update in ("adamw_plain", "adamw_8bit"))
    start = steps_of("adamw", (64, 80), 0)[0]
    assert (exact - rough).norm() < 0.1 * (exact - start).norm() and not torch.equal(exact, rough)
    assert sum(t.nbytes for t in bytes_.values()) < 0.27 * sum(t.nbytes for t in state.values())
    far = [steps_of(update, (64, 80), 20, decades=6)[0] for update in ("adamw_plain", "adamw_8bit")]
    assert (far[0] - far[1]).abs().max() < 0.3  # where squares are below the smallest code


def test_adamw_in_8_bits_equals_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    (ours, mine), (theirs, other) = (steps_of("adamw_8bit", (64, 80), peer=peer, decades=0)
                                     for peer in (None, lambda params: bnb.optim.AdamW8bit(
                                         params, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99),
                                         eps=1e-8,
                                     )))
    # where the second moment is 0 in bitsandbytes
    assert ((ours - theirs).abs() > 1e-3).float().mean() < 0.01
    for name, codes, scale in (("exp_avg", "state1", "absmax1"),
                               ("exp_avg_sq", "state2", "absmax2")):
        assert torch.allclose(mine[f"{name}_unit"], other[scale], rtol=1e-5)
        assert (mine[name] != other[codes]).float().mean() < 0.01  # numbers between two codes


def test_parameters_with_8_bit_states():
    model = tiny(hidden_size=64, intermediate_size=128, vocab_size=100).requires_grad_(True)
    named = dict(model.named_parameters())
    groups = make_optimizer(named, Config(optim="paged_adamw_8bit"), torch.device("cpu"),
                            **further(Config(optim="paged_adamw_8bit"))).param_groups
    names = {id(p): name for name, p in named.items()}
    found = {names[id(p)]
             for group in groups if group["update"] == "adamw_8bit" for p in group["params"]}
    assert found == {name for name, p in named.items() if p.numel() >= 4096 and "embed" not in name}
    assert found


# ---- Muon and GaLore ----


def test_orthogonal_is_nearly_orthogonal():
    for shape in ((40, 90), (90, 40), (64, 64)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        U, S, Vh = torch.linalg.svd(orthogonal(G))
        assert 0.6 < S.min() and S.max() < 1.3
        # the same directions
        assert torch.linalg.svdvals(orthogonal(G) @ torch.linalg.pinv(G)).min() > 0
    assert not orthogonal(torch.zeros(3, 5)).any()


def test_muon_equals_torch():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours, theirs = (steps_of("muon", (40, 70), peer=peer)[0]
                    for peer in (None, lambda params: torch.optim.Muon(
                        params, lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True,
                        adjust_lr_fn="match_rms_adamw",
                    )))
    assert (ours - theirs).norm() < 0.02 * (ours - steps_of("muon", (40, 70), 0)[0]).norm()


@pytest.mark.parametrize("shape", ((40, 70), (70, 40)))
def test_galore_equals_its_package(shape):
    galore_torch = pytest.importorskip("galore_torch")

    def peer(params):
        return galore_torch.GaLoreAdamW(
            [{"params": params, "rank": 6, "update_proj_gap": 4, "scale": 0.5, "proj_type": "std"}],
            lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8,
        )

    ours, theirs = (
        steps_of("galore", shape, peer=peer, rank=6, gap=4, scale=0.5, eps_first=True)[0]
        for peer in (None, peer)
    )
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_galore_of_full_rank_with_one_fixed_basis_equals_adamw():
    """AdamW on the parameter in the basis of all singular vectors."""
    p, state = steps_of("galore", (9, 5), rank=20, gap=100, scale=1.0)
    basis = state["basis"]
    assert torch.allclose(basis.T @ basis, torch.eye(5), atol=1e-5)
    assert state["low_avg"].shape == (9, 5)
    generator = torch.Generator().manual_seed(0)
    turned = nn.Parameter(torch.randn(9, 5, generator=generator) @ basis)
    group = {"params": [turned], "lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizer = Optimizer([group | {"update": "adamw_plain"}])
    for _ in range(10):
        turned.grad = torch.randn(9, 5, generator=generator) * torch.logspace(-2, 0, 5) @ basis
        optimizer.step()
    assert torch.allclose(p, turned @ basis.T, atol=1e-5)


@pytest.mark.parametrize("settings",
                         [{}, {"optim": "adamw_8bit"}, {"use_muon": True}, {"use_galore": True},
                          {"use_galore": True, "galore_target": ["mlp"]}], ids=str)
def test_predicted_bytes_of_the_state(settings):
    named = dict(
        tiny(hidden_size=64, intermediate_size=128).requires_grad_(True).named_parameters()
    )
    optimizer = make_optimizer(named, Config(**settings), torch.device("cpu"),
                               **further(Config(**settings)))
    for p in named.values():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert held == bytes_of({name: p.to("meta") for name, p in named.items()}, Config(**settings))
    assert {group["update"] for group in optimizer.param_groups} <= {*UPDATES}
    plain = bytes_of(named, Config())
    assert held == plain if not settings else held < plain


def test_unknown_galore_targets_are_errors():
    config = Config(use_galore=True, galore_target=["mpl"])
    with pytest.raises(
        ValueError, match="galore_target: mpl is in the name of no trained matrix; such names are"
    ):
        make_optimizer(dict(tiny().named_parameters()), config, torch.device("cpu"),
                       **further(config))


@pytest.mark.parametrize("name", UPDATES)
def test_fields_without_the_parameters_rows_are_known_to_checkpoints(name):
    group = {"rank": 3, "head_numel": 12, "betas": (0.9, 0.99)}
    p = torch.zeros(100, 60)
    for field, tensor in UPDATES[name].init_state(p, group).items():
        assert (tensor.shape != p.shape) == (field in NO_ROWS), field


def test_adam_mini_has_one_second_moment_a_block():
    config = Config(use_adam_mini=True)
    model = tiny()
    optimizer = make_optimizer(dict(model.named_parameters()), config, torch.device("cpu"),
                               **further(config))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = optimizer.state_bytes()
    optimizer.step()
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    shapes = {name: len(state["block_avg_sq"]) for name, state in states.items()}
    heads = model.config.num_attention_heads
    rows = model.config.intermediate_size
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == heads
    assert shapes["model.layers.0.mlp.up_proj.weight"] == rows
    assert shapes["model.norm.weight"] == 1
    assert sum(t.nbytes for state in states.values() for t in state.values()) == before
