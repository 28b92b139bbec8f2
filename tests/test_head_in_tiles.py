"""fast/head_in_tiles.py against torch in float64 and the chunks of losses.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import train
from data import IGNORE
from fast import head_in_tiles
from fast.head_in_tiles import losses_in_tiles, tile_width
from fast.matmul import MATMULS
from losses import capped, cross_entropy_sum, losses_in_chunks, token_losses
from tests.common import ROOT

N, V, D = 60, 97, 24


def problem(dtype=torch.float32, seed=0, scale=1.0):
    """h (N, D), W (V, D), y (N,)."""
    generator = torch.Generator().manual_seed(seed)
    h, W = (torch.randn(rows, D, generator=generator).to(dtype) for rows in (N, V))
    return h * scale, W, torch.randint(V, (N,), generator=generator)


def torch_in_float64(h, W, y, softcap=None):
    """(losses of the tokens, gradient of their sum for h)."""
    h = h.double().requires_grad_()
    losses = F.cross_entropy(capped(h @ W.double().T, softcap), y, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), h)[0]


@pytest.fixture(params=[(97, 1000), (8, 1000), (32, 7), (1, 60)], ids=str)
def sizes(request, monkeypatch):
    """Tiles of a few token ids, and a few rows at once."""
    width, rows = request.param
    monkeypatch.setattr(head_in_tiles, "TILE_NUMBERS", 1)
    monkeypatch.setattr(head_in_tiles, "LEAST_WIDTH", width)
    monkeypatch.setattr(head_in_tiles, "MOST_ROWS", rows)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("matmul", MATMULS.values(), ids=MATMULS)
def test_float32_equals_torch_in_float64(softcap, matmul, sizes):
    h, W, y = problem()
    wanted, wanted_dh = torch_in_float64(h, W, y, softcap)
    losses, dh = losses_in_tiles(h, W, y, softcap, matmul)
    for got, want in ((losses, wanted), (dh, wanted_dh)):
        assert (got - want).abs().max() < 1e-6 * want.abs().max()
    same, none = losses_in_tiles(h, W, y, softcap, matmul, needs_grad=False)
    assert none is None and torch.equal(same, losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_near_as_chunks(dtype, sizes):
    h, W, y = problem(dtype, scale=0.3)
    wanted = torch_in_float64(h, W, y)

    def errors(head):
        return [float((got.double() - want).norm() / want.norm())
                for got, want in zip(head(h, W, y, None, F.linear, True), wanted)]

    for ours, chunks in zip(errors(losses_in_tiles), errors(losses_in_chunks)):
        assert ours <= 1.5 * chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_well_predicted_tokens_keep_their_digits(dtype, sizes):
    """Where p(y) is nearly 1, its logarithm and p - 1 are differences of nearly equal numbers."""
    h, W, y = problem(dtype)
    h = (h + 20 * W[y] / W[y].float().square().sum(1, keepdim=True)).to(dtype)
    wanted = torch_in_float64(h, W, y)
    assert wanted[0].min() < 1e-5

    def errors(head):
        losses, dh = head(h, W, y, None, F.linear, True)
        return (float(((losses - wanted[0]).abs() / wanted[0]).max()),
                float(((dh - wanted[1]).norm(dim=1) / wanted[1].norm(dim=1)).max()))

    ours, chunks = errors(losses_in_tiles), errors(losses_in_chunks)
    if dtype == torch.float32:
        assert max(ours) < 2e-5 and min(chunks) > 1e-3
    else:
        assert ours[0] < chunks[0] and ours[1] < 1.2 * chunks[1]


def test_losses_and_gradients_with_their_weights(sizes):
    """As the objectives ask for them: rows without a label, and a factor for each token."""
    h, W, y = problem()
    targets = y.masked_fill(torch.arange(N) % 3 == 0, IGNORE)
    factors = torch.linspace(-1, 2, N)[: int((targets != IGNORE).sum())]
    found = []
    for frozen_head in (None, losses_in_tiles):
        hidden = h.clone().requires_grad_()
        options = {"softcap": 5.0, "frozen_head": frozen_head}
        loss = (cross_entropy_sum(hidden, W, targets, **options) / 7
                + (factors * token_losses(hidden, W, targets, **options)).sum())
        loss.backward()
        found.append((loss.detach(), hidden.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=5e-6)


def test_a_trained_head_is_computed_in_chunks():
    h, W, y = problem()

    def unused(*args):
        raise AssertionError("not for a head that is trained")

    hidden, weight = h.clone().requires_grad_(), W.clone().requires_grad_()
    cross_entropy_sum(hidden, weight, y, frozen_head=unused).backward()
    assert hidden.grad.any() and weight.grad.any()
    with torch.no_grad(), pytest.raises(AssertionError):
        cross_entropy_sum(hidden, weight, y, frozen_head=unused)


def test_extreme_scores(sizes):
    h, W, y = problem(scale=1e4)
    wanted, wanted_dh = torch_in_float64(h, W, y)
    losses, dh = losses_in_tiles(h, W, y)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=0.1)
    torch.testing.assert_close(dh.double(), wanted_dh, rtol=1e-3, atol=0.02)
    best = (h @ W.T).argmax(1)
    losses, dh = losses_in_tiles(h, W, best)
    assert losses.median() == 0 and dh.isfinite().all()
    h[3] = torch.nan
    losses, dh = losses_in_tiles(h, W, y)
    assert losses[3].isnan() and dh[3].isnan().all()
    assert not losses[[*range(3), *range(4, N)]].isnan().any()


def test_a_tile_of_infinities():
    """Scores that overflow float16 downwards: they count as 0, as in chunks."""
    h, W = torch.full((1, 8), 50.0).half(), torch.full((200, 8), -300.0).half()
    W[100:] = 0
    y = torch.tensor([150])
    for losses, dh in (losses_in_tiles(h, W, y), losses_in_chunks(h, W, y, None, F.linear, True)):
        assert float(losses) == pytest.approx(math.log(100), rel=1e-5) and dh.isfinite().all()


def test_wide_sums_fit_float16():
    h, W, y = torch.zeros(1, 8).half(), torch.full((150_000, 8), 0.6).half(), torch.tensor([3])
    losses, dh = losses_in_tiles(h, W, y)
    assert float(losses) == pytest.approx(math.log(150_000), rel=1e-5) and dh.abs().max() < 1e-2


def test_no_rows():
    h, W, y = problem()
    losses, dh = losses_in_tiles(h[:0], W, y[:0])
    assert losses.shape == (0,) and dh.shape == (0, D)


def test_a_tile_fits_the_cache():
    for rows in (1, 30, 100, 512, 1000, 1024):
        assert tile_width(rows) % 512 == 0
        assert rows * tile_width(rows) <= max(head_in_tiles.TILE_NUMBERS, 512 * rows)


@pytest.mark.parametrize("changes, tiles", [
    ([], True), (["additional_target=lm_head"], False)], ids=["frozen", "trained"])
def test_a_run_on_a_cpu_uses_them_for_a_frozen_head(changes, tiles, monkeypatch, tmp_path):
    """The losses are those of chunks."""
    monkeypatch.chdir(ROOT)
    used = []

    def watched(*args, **options):
        used.append(args[0].shape)
        return losses_in_tiles(*args, **options)

    losses = []
    for name, head in (("tiles", watched), ("chunks", losses_in_chunks)):
        monkeypatch.setattr(head_in_tiles, "losses_in_tiles", head)
        out = tmp_path / name
        train.main(["configs/tiny_lora_sft.yaml", f"output_dir={out}", "max_steps=2", "ask=[]",
                    "max_samples=8", "plot_loss=false", "use_cpu=true", "logging_steps=1",
                    *changes])
        losses.append([line.split('"loss": ')[1].split(",")[0] for line in
                       (out / "trainer_log.jsonl").read_text().splitlines() if '"loss"' in line])
    assert bool(used) == tiles
    assert [float(x) for x in losses[0]] == pytest.approx([float(x) for x in losses[1]], rel=1e-4)
