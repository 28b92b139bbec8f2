"""losses.py: the chunked loss against its slow twin and torch in float64, and its memory."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from data import IGNORE
from losses import (MAX_CHUNKS, answer_logps, answer_logps_plain, chunk_rows,
                    cross_entropy_plain, cross_entropy_sum)

N, V, D = 60, 97, 24


def problem(dtype=torch.float32, ignored=0.4, seed=0):
    """hidden (N, D), weight (V, D), targets (N,) of which a share has no loss."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype)
                      for rows in (N, V))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets


def run(loss_of, hidden, weight, targets, factor=1.0):
    """(loss, gradient of hidden, gradient of weight) of loss * factor, as float64."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(hidden, weight, targets)
    (loss * factor).backward()
    assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype
    return loss.detach().double(), hidden.grad.double(), weight.grad.double()


def torch_in_float64(hidden, weight, targets):
    return F.cross_entropy(hidden.double() @ weight.double().T, targets, ignore_index=IGNORE,
                           reduction="sum")


def rows_per_piece(monkeypatch, rows, vocabulary=V):
    monkeypatch.setattr(losses, "CHUNK_BYTES", rows * 4 * vocabulary)
    monkeypatch.setattr(losses, "MAX_CHUNKS", 10 ** 9)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.97])
@pytest.mark.parametrize("rows", [1, 7, N, 10 * N])
def test_float32_equals_torch_in_float64(rows, ignored, monkeypatch):
    rows_per_piece(monkeypatch, rows)
    inputs = problem(ignored=ignored)
    assert 0 < (inputs[2] != IGNORE).sum() <= N
    wanted = run(torch_in_float64, *inputs, factor=0.3)
    for loss_of in (cross_entropy_sum, cross_entropy_plain):
        for got, want in zip(run(loss_of, *inputs, factor=0.3), wanted):
            assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())


def test_loss_by_hand():
    """Two tokens, three words, logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8."""
    hidden = torch.ones(3, 1)
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    loss = cross_entropy_sum(hidden, weight, torch.tensor([0, IGNORE, 2]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(8) + math.log(8 / 5), rel=1e-6)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
                         ids=["bf16", "fp16"])
def test_loss_in_sixteen_bits(dtype, bound, monkeypatch):
    """The error is explained by 16-bit logits, and no larger than the slow twin's."""
    rows_per_piece(monkeypatch, 7)
    inputs = problem(dtype)
    inputs = (inputs[0] * 0.3, *inputs[1:])
    wanted = run(torch_in_float64, *inputs)

    def errors(loss_of):
        return [((got - want).norm() / want.norm()).item()
                for got, want in zip(run(loss_of, *inputs), wanted)]

    ours, twin = errors(cross_entropy_sum), errors(cross_entropy_plain)
    assert max(ours) < bound
    assert all(error < 1.5 * other + bound / 10 for error, other in zip(ours, twin))


def test_division_by_the_token_count_is_exact_in_sixteen_bits():
    """1/359 is 0.2 % away from the nearest bfloat16; the gradient must not be."""
    inputs = problem(torch.bfloat16)
    whole, part = (run(cross_entropy_sum, *inputs, factor=factor)[1] for factor in (1.0, 1 / 359))
    ratio = (part * whole).sum() / whole.square().sum()  # least-squares fit of part = ratio * whole
    assert ratio * 359 == pytest.approx(1, abs=3e-4)


def test_trained_float32_head_over_bfloat16_states():
    hidden, weight, targets = problem(torch.bfloat16)
    weight = problem()[1]
    loss, d_hidden, d_weight = run(cross_entropy_sum, hidden, weight, targets)
    want = run(torch_in_float64, hidden, weight, targets)
    for got, true in zip((loss, d_hidden, d_weight), want):
        assert (got - true).norm() / true.norm() < 2e-2


@pytest.mark.parametrize("loss_of", [cross_entropy_sum, cross_entropy_plain])
def test_nothing_supervised_is_zero_with_zero_gradients(loss_of):
    hidden, weight, _ = problem()
    loss, d_hidden, d_weight = run(loss_of, hidden, weight, torch.full((N,), IGNORE))
    assert loss == 0 and torch.equal(d_hidden, torch.zeros(N, D).double())
    assert torch.equal(d_weight, torch.zeros(V, D).double())


def test_splitting_into_micro_batches_changes_nothing():
    """Sums over a known count: one pass over N tokens equals any number of
    passes over its parts."""
    hidden, weight, targets = problem()
    count = (targets != IGNORE).sum()
    whole, parts = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = cross_entropy_sum(hidden, whole, targets) / count
    loss.backward()
    sizes = [1, 30, 29]
    pieces = [cross_entropy_sum(h, parts, t) / count
              for h, t in zip(hidden.split(sizes), targets.split(sizes))]
    for piece in pieces:
        piece.backward()
    assert sum(pieces).item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(whole.grad, parts.grad, atol=1e-6)


def test_head_tied_to_the_embedding_collects_both_gradients():
    _, weight, targets = problem()
    ids, results = torch.arange(N) % V, []
    for loss_of in (cross_entropy_sum, cross_entropy_plain):
        tied = weight.clone().requires_grad_()
        loss_of(F.embedding(ids, tied).tanh(), tied, targets).backward()
        results.append(tied.grad)
    assert torch.allclose(*results, atol=1e-5)
    frozen = weight.clone().requires_grad_()
    cross_entropy_sum(F.embedding(ids, weight).tanh(), frozen, targets).backward()
    # the embedding's part is not small
    assert not torch.allclose(frozen.grad, results[0], atol=1e-2)


@pytest.mark.parametrize("train", ["hidden", "weight"])
def test_only_hidden_states_or_only_the_head_need_a_gradient(train):
    hidden, weight, targets = problem()
    want = run(torch_in_float64, hidden, weight, targets)[1 if train == "hidden" else 2]
    leaf = hidden if train == "hidden" else weight
    leaf.requires_grad_()
    cross_entropy_sum(hidden, weight, targets).backward()
    assert (leaf.grad - want).abs().max() < 1e-4


# ---- capped logits (Gemma 2), a head that is computed (Baichuan 2) ----

CAP = 4.0  # logits have a spread of 5: the cap acts


def capped_in_float64(hidden, weight, targets):
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(CAP * torch.tanh(logits / CAP), targets, ignore_index=IGNORE,
                           reduction="sum")


@pytest.mark.parametrize("rows", [1, 7, N, 10 * N])
@pytest.mark.parametrize("loss_of", [cross_entropy_sum, cross_entropy_plain])
def test_softcap_equals_torch_in_float64(rows, loss_of, monkeypatch):
    rows_per_piece(monkeypatch, rows)
    inputs = problem()
    wanted, uncapped = (run(f, *inputs, factor=0.3) for f in (capped_in_float64, torch_in_float64))
    for got, want, other in zip(run(partial(loss_of, softcap=CAP), *inputs, factor=0.3), wanted,
                                uncapped):
        assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())
        assert (other - want).norm() > 0.1 * want.norm()


def test_softcap_by_hand():
    """One token, two words with logits 0 and ln 3: loss and gradient worked out with math alone."""
    logit, cap = math.log(3), 0.7
    bent = cap * math.tanh(logit / cap)
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [logit]])
    loss = cross_entropy_sum(hidden, weight, torch.tensor([0]), softcap=cap)
    loss.backward()
    p = math.exp(bent) / (1 + math.exp(bent))                               # of the wrong word
    assert loss.item() == pytest.approx(math.log(1 + math.exp(bent)), rel=1e-6)
    assert hidden.grad.item() == pytest.approx(
        p * (1 - math.tanh(logit / cap) ** 2) * logit, rel=1e-5
    )


def test_softcap_in_sixteen_bits(monkeypatch):
    """The cap acts on float32 logits: the error is explained by bfloat16 logits, and no larger than
    the slow twin's."""
    rows_per_piece(monkeypatch, 7)
    inputs = problem(torch.bfloat16)
    wanted = run(capped_in_float64, *inputs)

    def errors(loss_of):
        found = run(partial(loss_of, softcap=CAP), *inputs)
        return [((got - want).norm() / want.norm()).item() for got, want in zip(found, wanted)]

    ours, twin = errors(cross_entropy_sum), errors(cross_entropy_plain)
    assert max(ours) < 2e-2
    assert all(error < 1.5 * other + 2e-3 for error, other in zip(ours, twin))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
                         ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, CAP])
def test_gradient_flows_through_a_computed_head(dtype, bound, softcap, monkeypatch):
    """A head whose rows are normalized in each pass: the gradient reaches the stored rows."""
    rows_per_piece(monkeypatch, 7)
    hidden, weight, targets = problem(dtype)

    def stored(loss_of):
        return lambda hidden, raw, targets: loss_of(
            hidden, F.normalize(raw.float()).to(raw.dtype), targets
        )

    def reference(hidden, raw, targets):
        return (capped_in_float64 if softcap else torch_in_float64)(
            hidden, F.normalize(raw.double()), targets
        )

    wanted = run(reference, hidden, weight, targets)
    for loss_of in (cross_entropy_sum, cross_entropy_plain):
        for got, want in zip(
            run(stored(partial(loss_of, softcap=softcap)), hidden, weight, targets), wanted
        ):
            assert (got - want).norm() < bound * want.norm()


# ---- memory ----


class Watch(TorchDispatchMode):
    """Records which operations ran, and the number of elements of their largest result."""

    def __init__(self):
        super().__init__()
        self.numel, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return out


def largest(loss_of, hidden, weight, targets):
    with Watch() as seen:
        run(loss_of, hidden, weight, targets)
    return seen.numel


def test_a_tensor_of_tokens_times_vocabulary_never_exists(monkeypatch):
    n, v, d, rows = 512, 1000, 16, 8
    rows_per_piece(monkeypatch, rows, v)
    hidden, weight, targets = torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,))
    # the twin's tensor is measured
    assert largest(cross_entropy_plain, hidden, weight, targets) >= n * v
    for loss_of in (cross_entropy_sum, partial(cross_entropy_sum, softcap=CAP)):
        assert largest(loss_of, hidden, weight, targets) <= max(rows * v, n * d, v * d) < n * v / 10


def test_evaluation_makes_no_gradients():
    """A trainable head does not cause its gradient to be formed when none is needed."""
    hidden, weight, targets = problem()
    weight.requires_grad_()
    seen = {}
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), Watch() as seen[mode]:
            loss = cross_entropy_sum(hidden, weight, targets)
        assert loss.requires_grad == (mode is torch.enable_grad)
        assert loss.item() == pytest.approx(cross_entropy_plain(hidden, weight, targets).item(),
                                            rel=1e-5)
    probabilities = "aten.div_.Tensor"  # only the gradient needs them
    assert probabilities in seen[torch.enable_grad].names
    assert probabilities not in seen[torch.no_grad].names


def test_the_head_is_read_only_a_few_times():
    assert chunk_rows(100, 128_256) == 128                       # nearly 64 MiB of float32
    assert chunk_rows(32_768, 128_256) == 32_768 / MAX_CHUNKS
    assert chunk_rows(0, 10 ** 9) == 1


# ---- log-probabilities of sequences --------------------------------------------------------------

LENGTHS = [13, 1, 20, 26]
SHARES = torch.tensor([0.5, -2.0, -1.0, 0.25])  # weight of each sequence's log-probability


def weighted_sum(logps_of, hidden, weight, targets):
    """A scalar that depends on every sequence with a different weight, for `run`."""
    return (logps_of(hidden, weight, targets, LENGTHS)[0] * SHARES).sum()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 7, 10 * N])
def test_answer_logps_equal_their_slow_twin(rows, softcap, monkeypatch):
    """Forward, and backward to hidden states and to a trained head; torch in float64 gives the
    same."""
    rows_per_piece(monkeypatch, rows)
    inputs = problem()
    inputs[2][13] = IGNORE                                      # the second sequence has no label
    fast, plain = (partial(f, softcap=softcap) for f in (answer_logps, answer_logps_plain))
    exact = run(partial(weighted_sum, plain), inputs[0].double(), inputs[1].double(), inputs[2])
    for found in (run(partial(weighted_sum, fast), *inputs),
                  run(partial(weighted_sum, plain), *inputs)):
        for got, want in zip(found, exact):
            assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())
    logps, counts = fast(*inputs, LENGTHS)
    assert counts.tolist() == [int((part != IGNORE).sum()) for part in inputs[2].split(LENGTHS)]
    assert counts[1] == 0
    assert logps[1] == 0 and logps.dtype == counts.dtype == torch.float32
    assert -logps.sum().item() == pytest.approx(
        cross_entropy_sum(*inputs, softcap).item(), rel=1e-5
    )


def test_answer_logps_with_a_frozen_head():
    """Here the gradient is formed in the forward pass; it is the same."""
    hidden, weight, targets = problem()
    wanted = run(partial(weighted_sum, answer_logps), hidden, weight, targets)[1]
    hidden.requires_grad_()
    weighted_sum(answer_logps, hidden, weight, targets).backward()
    assert weight.grad is None and (hidden.grad - wanted).abs().max() < 1e-6


def test_answer_logps_in_sixteen_bits():
    inputs = problem(torch.bfloat16)
    for got, want in zip(run(partial(weighted_sum, answer_logps), *inputs),
                         run(partial(weighted_sum, answer_logps_plain),
                             *[t.float() if t.is_floating_point() else t for t in inputs])):
        assert (got - want).norm() < 0.02 * want.norm()


def test_answer_logps_of_nothing_have_zero_gradients():
    """As on a rank that runs filler batches (scale/fsdp.py)."""
    hidden, weight, _ = problem()
    loss, d_hidden, d_weight = run(partial(weighted_sum, answer_logps), hidden, weight,
                                   torch.full((N,), IGNORE))
    assert loss == 0 and not d_hidden.any() and not d_weight.any()


def test_answer_logps_never_make_tokens_times_vocabulary(monkeypatch):
    n, v, d, rows = 512, 1000, 16, 8
    rows_per_piece(monkeypatch, rows, v)
    hidden, weight, targets = torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,))
    sums = [lambda *inputs, f=f: f(*inputs, [n])[0].sum()
            for f in (answer_logps, answer_logps_plain)]
    assert largest(sums[0], hidden, weight, targets) <= max(rows * v, n * d, v * d) < n * v / 10
    assert largest(sums[1], hidden, weight, targets) >= n * v
