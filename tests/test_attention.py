"""attention.py: every kernel equals plain loops, and no token attends to another sequence."""
import itertools
import math
import sys
import types

import pytest
import torch

import attention as A
from fast import attention_picker
from tests.common import SDPA_ON_CPU
from tests.fake_flash_attn import fake_flash_attn, fake_varlen


def attention_by_loops(q, k, v, window=None, lengths=None, chunk=None, softcap=None, slopes=None,
                       sinks=None):
    """Attention as loops over heads and queries, in float64; differentiable."""
    (B, H, T, Dh), (K, S) = q.shape, k.shape[1:3]
    place = [(sample, at) for sample, n in enumerate(lengths or [S]) for at in range(n)]

    def sees(query, key):
        (sample, at), (other, there) = place[query], place[key]
        return (sample == other and there <= at and not (window and at - there >= window)
                and not (chunk and at // chunk != there // chunk))

    out = []
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        query = S - T + t
        seen = [key for key in range(S) if sees(query, key)]
        scores = k[b, h // (H // K), seen].double() @ q[b, h, t].double() / math.sqrt(Dh)
        if softcap:
            scores = softcap * (1 - 2 / (1 + torch.exp(2 * scores / softcap)))
        if slopes is not None:
            scores = scores + torch.tensor([float(slopes[h]) * (key - query) for key in seen],
                                           dtype=torch.float64)
        weights = torch.exp(scores - scores.max())
        total = weights.sum()
        if sinks is not None:
            total = total + torch.exp(sinks[h].double() - scores.max())
        out.append(weights @ v[b, h // (H // K), seen].double() / total)
    return torch.stack(out).view(B, H, T, Dh)


def random_qkv(B, H, K, T, S, Dh=8, seed=0, dtype=torch.float32):
    """q (B, H, T, Dh), k and v (B, K, S, Dh)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, n, Dh, generator=generator).to(dtype)
            for heads, n in ((H, T), (K, S), (K, S))]


def with_gradients(qkv, attention=A.attend, **options):
    """[output, gradients of q, k, v]."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attention(*leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(found, expected, atol=1e-5):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), atol=atol, rtol=0)


# ---- attend --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernel", ("plain", *SDPA_ON_CPU))
@pytest.mark.parametrize("window", (None, 1, 3, 100))
@pytest.mark.parametrize("T, S", ((6, 6), (1, 6), (3, 7), (1, 1)))
def test_kernels_equal_the_definition(kernel, window, T, S):
    q, k, v = random_qkv(2, 4, 2, T, S)
    assert_close([A.attend(q, k, v, kernel=kernel, window=window)],
                 [attention_by_loops(q, k, v, window)])


@pytest.mark.parametrize("kernel", ("plain", *SDPA_ON_CPU))
@pytest.mark.parametrize("window", (None, 2))
def test_packed_row_equals_the_definition(kernel, window):
    lengths = (1, 4, 2, 4, 1)
    q, k, v = random_qkv(1, 4, 2, 12, 12)
    out = A.attend(q, k, v, kernel=kernel, layout=A.PackedLayout(lengths), window=window)
    assert_close([out], [attention_by_loops(q, k, v, window, lengths)])


@pytest.mark.parametrize("kernel", SDPA_ON_CPU)
@pytest.mark.parametrize("lengths", ((1, 7, 62, 128, 129, 1), (5,), (3, 3, 3), (40, 1, 1, 33, 50)))
@pytest.mark.parametrize("window", (None, 1, 45))
def test_gradients_of_a_packed_row_equal_the_plain_kernel(kernel, lengths, window):
    qkv = random_qkv(1, 4, 2, sum(lengths), sum(lengths))
    qkv[2] = qkv[2].transpose(1, 2).contiguous().transpose(1, 2)   # a model's v is a view
    options = {"layout": A.PackedLayout(lengths), "window": window}
    assert_close(with_gradients(qkv, kernel=kernel, **options),
                 with_gradients(qkv, kernel="plain", **options))


@pytest.mark.parametrize("kernel", ("plain", *SDPA_ON_CPU))
def test_sequences_of_a_packed_row_do_not_attend_to_each_other(kernel):
    layout = A.PackedLayout((5, 1, 8))
    q, k, v = random_qkv(1, 4, 2, 14, 14)
    before = A.attend(q, k, v, kernel=kernel, layout=layout)
    q[:, :, :5], k[:, :, :5], v[:, :, :5] = 100, float("inf"), float("nan")
    after = A.attend(q, k, v, kernel=kernel, layout=layout)
    assert torch.equal(before[:, :, 5:], after[:, :, 5:])
    alone = [A.attend(*(x[:, :, 6:] for x in (q, k, v)), kernel=kernel)]
    assert_close([after[:, :, 6:]], alone)


def test_scale_is_applied():
    q, k, v = random_qkv(1, 2, 2, 5, 5)
    expected = attention_by_loops(q * 0.3 * math.sqrt(8), k, v)
    for kernel in ("plain", *SDPA_ON_CPU):
        assert_close([A.attend(q, k, v, kernel=kernel, scale=0.3)], [expected])


def test_float16_scores_beyond_65504_stay_finite():
    """Qwen2 in float16: q·k overflows when it is scaled after the product."""
    q, k, v = (x.half() * 400 for x in random_qkv(1, 2, 2, 6, 6))
    assert not torch.isfinite((q @ k.transpose(-1, -2)).sum())   # scaling too late overflows
    out = A.attend(q, k, v / 400, kernel="plain")
    assert torch.isfinite(out).all()
    assert_close([out], [attention_by_loops(q, k, v / 400)], atol=1e-2)


def test_autocast_changes_nothing(monkeypatch):
    """Under autocast q and k may be float32 and v 16-bit; the plain kernel's scores must stay
    float32."""
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    q, k, v = random_qkv(1, 4, 2, 12, 12, dtype=torch.bfloat16)
    layout = A.PackedLayout((7, 5))
    for kernel in ("plain", "flash-attn", *SDPA_ON_CPU):
        expected = A.attend(q, k, v, kernel=kernel, layout=layout)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(A.attend(q.float(), k.float(), v, kernel=kernel, layout=layout),
                               expected)


def test_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="unknown attention kernel 'flash'.*sdpa-flash"):
        A.attend(*random_qkv(1, 1, 1, 2, 2), kernel="flash")


def test_global_switches_of_sdpa_are_neither_used_nor_changed():
    """On ROCm machines with several cards transformers turns flash attention
    off for the process."""
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        q, k, v = random_qkv(1, 2, 2, 6, 6)
        assert_close([A.attend(q, k, v, kernel="sdpa-flash")], [attention_by_loops(q, k, v)])
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_arguments_that_sdpa_flash_gets(monkeypatch):
    """Flash attention takes no mask, and SDPA's is_causal aligns top left: it is for T == S; one
    query needs neither."""
    asked = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        asked.append((attn_mask is not None, options["is_causal"],
                      options.get("enable_gqa", False)))
        assert torch.backends.cuda.flash_sdp_enabled()
        for other in (torch.backends.cuda.math_sdp_enabled,
                      torch.backends.cuda.mem_efficient_sdp_enabled):
            assert other() == (attn_mask is not None)  # else it would replace flash unnoticed
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        return real(q, k, v, attn_mask, **options)

    monkeypatch.setattr(A.F, "scaled_dot_product_attention", spy)
    for T, S, window in ((6, 6, None), (1, 6, None), (1, 6, 3), (3, 6, None), (6, 6, 3)):
        A.attend(*(x.transpose(1, 2).contiguous().transpose(1, 2)
                   for x in random_qkv(1, 4, 2, T, S)), kernel="sdpa-flash", window=window)
    masks, causal, grouped = zip(*asked)
    assert masks == (False, False, False, True, True)
    assert causal == (True, False, False, False, False)
    assert not any(grouped)                            # on the CPU heads are repeated


@pytest.mark.parametrize("version, hip, expected",
                         (((2, 4), None, False), ((2, 5), None, True), ((2, 4), "6.1", False),
                          ((2, 5), "6.2", False), ((2, 6), "6.2", True)))
def test_kernels_that_take_grouped_heads(monkeypatch, version, hip, expected):
    monkeypatch.setattr(A, "TORCH", version)
    monkeypatch.setattr(attention_picker, "TORCH", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert A.takes_grouped_heads("sdpa-flash", masked=False) is expected
    assert not A.takes_grouped_heads("sdpa-flash", masked=True)
    for kernel, since in (("sdpa-efficient", (2, 14)), ("sdpa-cudnn", (2, 11))):
        for masked in (False, True):
            assert not A.takes_grouped_heads(kernel, masked)
            if hip is None:
                monkeypatch.setattr(A, "TORCH", since)
                assert A.takes_grouped_heads(kernel, masked)
                monkeypatch.setattr(A, "TORCH", version)


def test_cudnn_gets_no_single_key_and_its_masks_need_no_other_backend(monkeypatch):
    """It refuses sequences of one token (torch 2.11, 2.14), which every micro-batch may hold."""
    asked = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        asked.append((k.shape[2], attn_mask is not None, cudnn))
        assert torch.backends.cuda.math_sdp_enabled() != cudnn
        torch.backends.cuda.enable_math_sdp(True)       # a CPU has no cuDNN
        return real(q, k, v, attn_mask, **options)

    monkeypatch.setattr(A.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(A, "TORCH", (2, 14))
    layout = A.PackedLayout((40, 1, 1))
    qkv = random_qkv(1, 4, 2, 42, 42)
    monkeypatch.setattr(A, "group_by_length", lambda lengths: [[0], [1, 2]])
    layout = A.PackedLayout((40, 1, 1))
    assert_close(with_gradients(qkv, kernel="sdpa-cudnn", layout=layout),
                 with_gradients(qkv, kernel="plain", layout=layout))
    qkv = random_qkv(1, 4, 2, 1, 1)
    assert_close([A.attend(*qkv, kernel="sdpa-cudnn")], [attention_by_loops(*qkv)])
    qkv = random_qkv(1, 4, 2, 3, 9)
    assert_close([A.attend(*qkv, kernel="sdpa-cudnn")], [attention_by_loops(*qkv)])
    assert asked == [(40, False, True), (1, False, False), (1, False, False), (9, True, True)]


def test_groups_of_a_packed_row_are_no_slices(monkeypatch):
    """Backward of a slice writes zeros for all slots, once for each group; so does that of x[0]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    lengths, names = (1, 70, 62, 300, 129, 1), []
    qkv = random_qkv(1, 4, 2, sum(lengths), sum(lengths))
    layout = A.PackedLayout(lengths)
    assert len(layout.groups) > 3
    leaves = [x.requires_grad_() for x in qkv]
    out = A.attend(*leaves, kernel="sdpa-flash", layout=layout)
    with Names():
        torch.autograd.grad(out.sum(), leaves)
    assert not {"slice_backward", "select_backward"} & set(names) and len(names) > 10


@pytest.mark.parametrize("kernel", SDPA_ON_CPU)
def test_alibi_is_passed_to_sdpa_as_a_mask_without_fallback(monkeypatch, kernel):
    """For a batch, for one query, and for the groups of a packed row."""
    asked = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        asked.append(tuple(attn_mask.shape))
        assert attn_mask.dtype == q.dtype and not options["is_causal"]
        assert torch.backends.cuda.flash_sdp_enabled() == (kernel == "sdpa-flash")
        assert torch.backends.cuda.math_sdp_enabled() == (kernel == "sdpa-math")
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        return real(q, k, v, attn_mask, **options)

    monkeypatch.setattr(A.F, "scaled_dot_product_attention", spy)
    for T, S, layout in ((6, 6, None), (1, 6, None), (3, 6, None),
                         (110, 110, A.PackedLayout((40, 30, 39, 1)))):
        A.attend(*random_qkv(1, 4, 2, T, S), kernel=kernel, slopes=SLOPES, layout=layout)
    assert asked == [(1, 4, 6, 6), (1, 4, 1, 6), (1, 4, 3, 6), (1, 4, 40, 40), (1, 4, 30, 30)]


# ---- chunks, softcap, ALiBi: with every kernel that supports them --------------------------------

SLOPES = torch.tensor([0.7, 0.25, 0.06, 0.004])
SINKS = torch.tensor([-1.5, 0.0, 0.8, 3.0])
RULES = {
    "chunk": {"chunk": 4}, "chunk of one": {"chunk": 1}, "long chunk": {"chunk": 99},
    "softcap": {"softcap": 0.8}, "alibi": {"slopes": SLOPES},
    "chunk + window": {"chunk": 5, "window": 2}, "softcap + window": {"softcap": 2, "window": 3},
    "alibi + window": {"slopes": SLOPES, "window": 3},
    "alibi + chunk": {"slopes": SLOPES, "chunk": 4},
    "all": {"softcap": 0.8, "slopes": SLOPES, "chunk": 5, "window": 3},
    "sinks": {"sinks": SINKS}, "sinks + window": {"sinks": SINKS, "window": 3},
    "sinks + chunk": {"sinks": SINKS, "chunk": 4},
}
ABLE = [(kernel, name)
        for kernel in ("plain", "flash-attn", "torch-varlen", *SDPA_ON_CPU)
        for name in RULES
        if not A.missing_feature(
            kernel, *(rule in RULES[name] for rule in ("softcap", "slopes", "sinks")))]


@pytest.fixture
def imitated_packages(monkeypatch):
    """flash-attn and torch's varlen attention, imitated."""
    monkeypatch.setattr(A, "TORCH", (2, 12))
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake_varlen())


def test_number_of_kernels_with_each_rule():
    # plain; flash-attn without sinks; varlen; two of SDPA
    assert len(ABLE) == len(RULES) + (len(RULES) - 3) + 4 + 2 * (7 + 3)


@pytest.mark.parametrize("kernel", ("plain", *SDPA_ON_CPU))
@pytest.mark.parametrize("T, S, lengths", ((6, 6, None), (1, 6, None), (3, 7, None),
                                           (9, 9, (1, 5, 3))))
def test_gradients_of_sinks_equal_the_definition(kernel, T, S, lengths):
    qkv = random_qkv(1, 4, 2, T, S)
    grads = []
    for attention, options in (
            (A.attend, {"kernel": kernel, "layout": lengths and A.PackedLayout(lengths)}),
            (attention_by_loops, {"lengths": lengths})):
        sinks = SINKS.clone().requires_grad_()
        out = attention(*qkv, sinks=sinks, window=4, **options)
        grads += torch.autograd.grad((out * torch.arange(8)).sum(), sinks)
    assert_close(grads[:1], grads[1:])


def test_kernels_without_sinks_say_so():
    with pytest.raises(ValueError, match="'flash-attn' has no attention sinks; take one of 'sdpa"):
        A.attend(*random_qkv(1, 4, 2, 3, 3), kernel="flash-attn", sinks=SINKS)


@pytest.mark.parametrize("kernel, name", ABLE)
@pytest.mark.parametrize("T, S", ((6, 6), (1, 6), (1, 9), (3, 7), (6, 11)))
def test_window_chunk_softcap_and_alibi_equal_the_definition(imitated_packages, kernel, name, T, S):
    qkv = random_qkv(2, 4, 2, T, S)
    assert_close(with_gradients(qkv, kernel=kernel, **RULES[name]),
                 with_gradients(qkv, attention_by_loops, **RULES[name]))


@pytest.mark.parametrize("kernel, name", ABLE)
@pytest.mark.parametrize("lengths", ((1, 9, 4, 2), (13,), (5, 5)))
def test_window_chunk_softcap_and_alibi_in_a_packed_row(imitated_packages, kernel, name, lengths):
    rules, total = RULES[name], sum(lengths)
    qkv = random_qkv(1, 4, 2, total, total)
    found = with_gradients(qkv, kernel=kernel, layout=A.PackedLayout(lengths), **rules)
    assert_close(found, with_gradients(qkv, attention_by_loops, lengths=lengths, **rules))
    parts = zip(*(x.split(lengths, dim=2) for x in qkv))
    # each sequence in a row of its own
    alone = [A.attend(*part, kernel=kernel, **rules) for part in parts]
    assert_close(found[:1], [torch.cat(alone, dim=2)])


@pytest.mark.parametrize("kernel, name", ABLE)
def test_cached_equals_uncached(imitated_packages, kernel, name):
    """A prompt, one token, a second prompt, one token: equal to a single pass."""
    q, k, v = random_qkv(2, 4, 2, 17, 17)
    steps, start = [], 0
    for end in (6, 7, 16, 17):
        steps.append(A.attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], kernel=kernel,
                              **RULES[name]))
        start = end
    assert_close([torch.cat(steps, dim=2)], [A.attend(q, k, v, kernel=kernel, **RULES[name])])


def test_softcap_equals_gemma2_of_transformers():
    gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    q, k, v = (3 * x for x in random_qkv(2, 4, 2, 9, 9))
    module = types.SimpleNamespace(num_key_value_groups=2, head_dim=8, training=False)
    mask = torch.full((9, 9), -1e30).triu(1)[None, None]
    expected, _ = gemma2.eager_attention_forward(module, q, k, v, mask, scaling=0.3, softcap=5.0)
    assert_close([A.attend(q, k, v, scale=0.3, softcap=5.0)], [expected.transpose(1, 2)])


@pytest.mark.parametrize("kernel", ("plain", *SDPA_ON_CPU))
def test_alibi_equals_bloom_of_transformers(kernel):
    """There the bias is slope * key position; the softmax cancels the difference."""
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    q, k, v = random_qkv(1, 4, 4, 9, 9)
    bias = bloom.build_alibi_tensor(torch.ones(1, 9), 4, torch.float32).view(4, 1, 9)
    mask = bias + torch.full((9, 9), float("-inf")).triu(1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[None])
    assert_close([A.attend(q, k, v, kernel=kernel, slopes=bias[:, 0, 1])], [expected])


@pytest.mark.parametrize("rules", ({"chunk": 3}, {"softcap": 0.8}, {"slopes": SLOPES}))
def test_each_rule_changes_the_result(rules):
    """By far more than the tolerance of the tests above."""
    qkv = random_qkv(1, 4, 2, 9, 9)
    assert (A.attend(*qkv, **rules) - A.attend(*qkv)).abs().max() > 0.05


def test_decoding_reads_only_the_keys_of_its_chunk():
    q, k, v = random_qkv(1, 4, 2, 2, 11)
    k[:, :, :8], v[:, :, :8] = float("nan"), float("nan")  # chunks of 4: positions 8, 9, 10 remain
    for T in (1, 2):
        assert A.attend(q[:, :, -T:], k, v, chunk=4).isfinite().all()


def test_autocast_keeps_window_chunk_softcap_and_alibi():
    q, k, v = random_qkv(1, 4, 2, 12, 12, dtype=torch.bfloat16)
    for kernel, rules in (("plain", RULES["all"]),
                          *((kernel, RULES["alibi + chunk"]) for kernel in SDPA_ON_CPU)):
        expected = A.attend(q, k, v, kernel=kernel, layout=A.PackedLayout((7, 5)), **rules)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(
                A.attend(q, k, v, kernel=kernel, layout=A.PackedLayout((7, 5)), **rules), expected
            )


@pytest.mark.parametrize("kernel", ("torch-varlen", *A.SDPA))
def test_a_feature_that_a_kernel_lacks_is_an_error(kernel):
    with pytest.raises(ValueError, match=f"'{kernel}' has no softcap; take one of 'flash-attn'"):
        A.attend(*random_qkv(1, 4, 2, 6, 6), kernel=kernel, softcap=30.0)
    if kernel == "torch-varlen":
        with pytest.raises(ValueError, match="has no ALiBi"):
            A.attend(*random_qkv(1, 4, 2, 6, 6), kernel=kernel, slopes=SLOPES)


@pytest.mark.parametrize("window", (None, 3, 6))
@pytest.mark.parametrize("T, S", ((24, 24), (22, 22), (9, 30)))
def test_the_plain_kernel_in_blocks_of_queries(monkeypatch, window, T, S):
    """Long sequences: the same numbers, without all scores in memory at once."""
    qkv = random_qkv(1, 4, 2, T, S, Dh=2)
    options = {"window": window, "softcap": 2.0, "slopes": SLOPES}
    whole = with_gradients(qkv, **options)
    monkeypatch.setattr(A, "PLAIN_QUERIES", 4)
    scores, real = [], A.causal_mask
    monkeypatch.setattr(A, "causal_mask", lambda *args: scores.append(real(*args)) or scores[-1])
    assert_close(with_gradients(qkv, **options), whole, atol=1e-6)
    assert max(len(block) for block in scores) == 4 and sum(len(block) for block in scores) == T
    # no key without a query
    assert all(block[:, 0].any() and block[:, -1].any() for block in scores)


# ---- PackedLayout --------------------------------------------------------------------------------

def test_layout_gather_and_scatter_are_inverse():
    lengths = (3, 40, 1, 41, 128, 3, 120)
    layout = A.PackedLayout(lengths)
    row = torch.arange(layout.total)
    assert torch.equal(row[layout.gather][layout.scatter], row)
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, 3, 43, 44, 85, 213, 216, 336]
    assert layout.max_len == 128
    assert sum(n * padded for n, padded in layout.groups) == len(layout.gather)


def test_padding_is_bounded_and_equal_lengths_share_a_batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 2000, (300,), generator=generator).tolist()
    groups = A.group_by_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(300))
    for group in groups:
        padded = lengths[group[0]]
        assert all(n <= padded <= max(32, 1.25 * n) for n in (lengths[i] for i in group))
    assert len(groups) < 25
    assert A.group_by_length([70] * 9) == [list(range(9))]


def test_chunks_of_a_layout():
    layout = A.PackedLayout((3, 40, 8, 17))
    chunks = layout.chunked(8)
    assert chunks.lengths == (3, 8, 8, 8, 8, 8, 8, 8, 8, 1) and chunks.total == layout.total
    assert layout.chunked(8) is chunks
    assert layout.chunked(40) is layout
    assert layout.chunked(7) is not chunks
    assert layout.to("meta").chunked(8).cu_seqlens.is_meta  # cached chunks move along


def test_layout_refuses_empty_sequences():
    for lengths in ((), (3, 0)):
        with pytest.raises(ValueError, match="1 token or more"):
            A.PackedLayout(lengths)


# ---- flash-attn and torch's varlen, imitated -----------------------------------------------------


@pytest.mark.parametrize("kernel", ("flash-attn", "torch-varlen"))
@pytest.mark.parametrize("window", (None, 3))
def test_varlen_kernels_get_the_right_arguments(monkeypatch, kernel, window):
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake_varlen())
    monkeypatch.setattr(A, "TORCH", (2, 12))
    for T, S in ((6, 6), (3, 6), (1, 6)):
        q, k, v = random_qkv(2, 4, 2, T, S)
        assert_close([A.attend(q, k, v, kernel=kernel, window=window)],
                     [attention_by_loops(q, k, v, window)])
    qkv, layout = random_qkv(1, 4, 2, 12, 12), A.PackedLayout((1, 4, 6, 1))
    want = with_gradients(qkv, kernel="plain", layout=layout, window=window)
    assert_close(with_gradients(qkv, kernel=kernel, layout=layout, window=window), want)
    monkeypatch.setattr(A, "TORCH", (2, 11))            # k and v are repeated there
    older = fake_varlen(grouped_heads=False)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", older)
    assert_close(with_gradients(qkv, kernel=kernel, layout=layout, window=window), want)
