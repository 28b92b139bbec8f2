"""fast/decode.py: fused matrices and fast matmuls give the answers of the modules of model.py."""
from functools import partial

import pytest
import torch
from torch import nn

from fast import decode
from fast.decode import (DECODE_MATMULS, CapturedStep, OneDNNLinear, StaticCache, fuse_matrices,
                         pick_decode_matmul, pick_step, prepare)
from fast.lean_step import compiled_steps, hidden_of_token
from generate import Sampling, common_prefix, generate, generate_uncached, next_scores
from lora import LoRAConfig, attach_lora, lora_layers
from model import CausalLM, KVCache, init_weights
from tests.common import some
from tests.test_families import CASES, load, made  # noqa: F401  a fixture
from tests.tiny_models import SMALL_FAMILIES, perturb, small_config, tiny_qwen2

PROMPT = [3, 14, 15, 9, 26, 5]


def scores(model, ids):
    return model.logits(model(ids)).float()


@pytest.fixture(params=DECODE_MATMULS)
def forced(request, monkeypatch):
    """Each matmul in turn, whatever would be picked here; skipped where torch or CPU lacks it."""
    matmul, laid_out = DECODE_MATMULS[request.param]
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    try:
        matmul(torch.ones(1, 8, dtype=dtype), laid_out(torch.ones(4, 8, dtype=dtype)))
    except (RuntimeError, AttributeError, NotImplementedError):
        pytest.skip(f"this torch has no {request.param} in {dtype} for this CPU")
    choice = (request.param, "matmul    forced")
    monkeypatch.setattr(decode, "pick_decode_matmul", lambda dtype, rows: choice)
    monkeypatch.setattr(decode, "WORTH", 0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_prepared_model_equals_the_plain_one(forced, dtype, tied):
    plain = tiny_qwen2(dtype, tie_word_embeddings=tied)
    fast = tiny_qwen2(dtype, tie_word_embeddings=tied)
    lines = prepare(fast)
    assert "4 fused matrices" in lines[0] and lines[-1] == "matmul    forced"
    assert (type(fast.lm_head) is OneDNNLinear) == (forced != "torch")
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(2))
    for length in (20, 1):
        want, got = scores(plain, ids[:, :length]), scores(fast, ids[:, :length])
        assert want.abs().max() > 1
        assert (got - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:
        answers = [list(generate(m, PROMPT, KVCache(2), max_new_tokens=40)) for m in (plain, fast)]
        assert answers[0] == answers[1] == list(generate_uncached(fast, PROMPT, max_new_tokens=40))


@pytest.mark.parametrize("name", some(CASES))
def test_the_prepared_model_equals_transformers_in_every_family(made, name, forced):  # noqa: F811
    model, ids, want = load(made, name)
    prepare(model)
    assert (scores(model, ids) - want).abs().max() < 2e-4


def test_a_block_with_an_adapter_is_not_changed():
    model = tiny_qwen2()
    perturb(attach_lora(model, LoRAConfig(r=2, target_modules=["k_proj", "down_proj"]))).eval()
    want = scores(model, torch.tensor([PROMPT]))
    assert fuse_matrices(model) == 2                             # gate and up of both blocks
    assert len(lora_layers(model)) == 4
    assert (scores(model, torch.tensor([PROMPT])) - want).abs().max() < 1e-5


def test_without_memory_for_copies_nothing_is_changed():
    model = tiny_qwen2()
    lines = prepare(model, available=1000)
    assert "mapped from the file" in lines[0]
    assert all(type(m) is not OneDNNLinear for m in model.modules())
    assert hasattr(model.model.layers[0].self_attn, "q_proj")


def test_joined_matrices_hold_the_rows_of_their_parts():
    model, whole = tiny_qwen2(), tiny_qwen2()
    fuse_matrices(whole)
    a, b = model.model.layers[1], whole.model.layers[1]
    assert torch.equal(b.self_attn.qkv_proj.weight[32:48], a.self_attn.k_proj.weight)
    assert torch.equal(b.self_attn.qkv_proj.bias[48:], a.self_attn.v_proj.bias)
    assert torch.equal(b.mlp.gate_up_proj.weight[48:], a.mlp.up_proj.weight)
    assert b.mlp.gate_up_proj.bias is None


def test_a_wrong_or_missing_matmul_is_not_picked(monkeypatch):
    def absent(x, W, bias=None):
        raise NotImplementedError

    def wrong(x, W, bias=None):
        return x[:, :1] * W[:, 0]

    def as_it_is(W, rows=1):
        return W

    monkeypatch.setitem(DECODE_MATMULS, "onednn", (wrong, as_it_is))
    monkeypatch.setitem(DECODE_MATMULS, "onednn packed", (absent, as_it_is))
    taken, line = pick_decode_matmul(torch.float32, shape=(64, 32))
    assert taken == "torch"
    assert "onednn (wrong)" in line
    assert "onednn packed (not in this torch)" in line


def test_the_fastest_matmul_is_picked_if_clearly_faster(monkeypatch):
    seconds = dict(zip(DECODE_MATMULS, (10.0, 9.5, 9.4)))
    same = (nn.functional.linear, lambda W, rows=1: W)
    monkeypatch.setattr(decode, "DECODE_MATMULS", dict.fromkeys(DECODE_MATMULS, same))
    for changes, want in (({}, "torch"), ({"onednn packed": 5.0}, "onednn packed"),
                          ({"onednn packed": 5.0, "onednn": 5.2}, "onednn"),
                          ({"onednn": 5.0}, "onednn")):
        took = iter((seconds | changes).values())
        monkeypatch.setattr(decode, "shortest", lambda call, times: next(took))
        assert pick_decode_matmul(torch.float32, shape=(64, 32))[0] == want


# ---- captured steps: all but the capture itself runs here ----------------------------------------


class FakeGraph:
    """Imitates a CUDA graph: a replay runs the recorded call again and overwrites what the first
    run returned. Numbers of Python are made useless meanwhile, since a graph would not see them
    change."""

    def __init__(self):
        self.captured = self.replayed = 0

    def record(self, call):
        self.captured += 1
        result = call()

        def replay():
            self.replayed += 1
            result.copy_(call())
        return replay, result


def capturable(model):
    return not decode.uncapturable(model)


@pytest.mark.parametrize("name", some(CASES))
def test_static_growing_and_no_cache_agree(made, name):  # noqa: F811
    """In every family: the same tokens three ways, or a reason why its steps are not captured."""
    model, ids, _ = load(made, name)
    model.requires_grad_(False).eval()
    prompt, graph = ids[0, :7].tolist(), FakeGraph()
    cache, step, line = pick_step(model, graph.record)
    if not capturable(model):
        assert type(cache) is KVCache
        assert step is next_scores
        assert graph.captured == 0
        assert "kernel by kernel (" in line
        return
    assert line == "steps     captured as a graph: one command a token"
    assert type(cache) is StaticCache
    want = list(generate(model, prompt, KVCache(len(cache.buffers)), max_new_tokens=20))
    assert list(generate(model, prompt, cache, max_new_tokens=20, step=step)) == want
    assert list(generate_uncached(model, prompt, max_new_tokens=20)) == want
    assert (graph.captured, graph.replayed) == (1, 1 + 19)  # the graphs of the trial, used again


@pytest.mark.parametrize("kernel", ["plain", "sdpa-math", "sdpa-flash"])
def test_a_captured_step_reads_filled_slots_only(kernel):
    """Unfilled slots hold garbage; the scores equal those of a cache without them, at every bucket
    size."""
    model, graph = tiny_qwen2(max_position_embeddings=2048), FakeGraph()
    model.kernel = kernel
    cache, step, plain = StaticCache(2), CapturedStep(graph.record), KVCache(2)
    ids = torch.randint(0, 50, (1, 600), generator=torch.Generator().manual_seed(3))
    for length in (250, 505):  # below and above 256 and 512 slots
        for chunk in (ids[:, cache.length:length], *ids[:, length:length + 12].split(1, dim=1)):
            with torch.no_grad():
                want, got = next_scores(model, chunk, plain), step(model, chunk, cache)
            assert (got - want).abs().max() < 1e-4, cache.length
            assert cache.length == plain.length
            for pair in cache.buffers:
                for buffer in pair:
                    buffer[:, :, cache.length:] = 1e4
    # 256, 512, 1024; graphs of smaller buffers are freed
    assert graph.captured == 3 and list(step.recorded) == [1024]


def test_a_graph_is_not_replayed_on_buffers_that_moved_and_came_back(monkeypatch):
    """After two growths the allocator may give the first address again, with other strides."""
    model, graph = tiny_qwen2(max_position_embeddings=2048), FakeGraph()
    cache, step, plain = StaticCache(2), CapturedStep(graph.record), KVCache(2)
    storage = torch.zeros(2, 10**5)
    grown = StaticCache.grown

    def at_the_same_address(self, buffers, like, room):
        pair = grown(self, buffers, like, room)
        new = [one[:each.numel()].view(each.shape) for one, each in zip(storage, pair)]
        for one, each in zip(new, pair):
            one.copy_(each)
        return new

    model.model.layers = model.model.layers[:1]
    cache.buffers, plain.buffers = [None], [None]
    monkeypatch.setattr(StaticCache, "grown", at_the_same_address)
    ids = torch.randint(0, 50, (1, 300), generator=torch.Generator().manual_seed(3))
    addresses = set()
    for chunk in (ids[:, :4], ids[:, 4:5], ids[:, 5:290], ids[:, 290:291], ids[:, 291:292]):
        with torch.no_grad():
            want, got = next_scores(model, chunk, plain), step(model, chunk, cache)
        assert (got - want).abs().max() < 1e-4
        addresses.add(cache.buffers[0][0].data_ptr())
    assert len(addresses) == 1 and cache.generation > 1 and graph.captured == 2
    assert list(step.recorded) == [512]
    other = tiny_qwen2(max_position_embeddings=2048)        # a graph reads one model's weights
    other.model.layers = other.model.layers[:1]
    torch.nn.init.ones_(other.model.norm.weight.data).mul_(3)
    with torch.no_grad():
        want = next_scores(other, ids[:, 292:293], plain)
        assert (step(other, ids[:, 292:293], cache) - want).abs().max() < 1e-4


def test_turns_on_a_static_cache():
    """A conversation whose prefix is kept, then shortened: equal to a fresh cache each time,
    sampled and with a penalty."""
    model, graph = tiny_qwen2(), FakeGraph()
    cache, step, _ = pick_step(model, graph.record)
    sampling, held = Sampling(do_sample=True, temperature=1.5, repetition_penalty=1.3), []
    for prompt in (PROMPT, PROMPT + [1, 2, 3], PROMPT[:4] + [8, 8], [7]):
        cache.crop(common_prefix(held, prompt))
        answers = [list(generate(model, prompt, c, (), sampling, max_new_tokens=12, step=s,
                                 generator=torch.Generator().manual_seed(9)))
                   for c, s in ((cache, step), (KVCache(2), next_scores))]
        assert answers[0] == answers[1]
        held = prompt + answers[0]


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_a_token_in_few_kernels_equals_the_plain_model(name, monkeypatch):
    """As it is written bit by bit; compiled, by the compiler's front end, within rounding."""
    model = CausalLM(small_config(name))
    init_weights(model, torch.Generator().manual_seed(0))
    before = [set(vars(module)) for module in model.modules()]
    front_part = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: front_part(f, dynamic=dynamic))
    ids = torch.arange(1, 10)[None]
    caches = [KVCache(model.config.num_hidden_layers) for _ in range(3)]
    with torch.no_grad():
        for cache in caches:
            next_scores(model, ids, cache)
        for token in (3, 5):
            at = torch.tensor([[caches[0].length]])
            one = torch.tensor([[token]])
            want = model(one, at, cache=caches[0])
            assert torch.equal(hidden_of_token(model, one, at, caches[1]), want)
            with compiled_steps(model) as add_norm:
                got = hidden_of_token(model, one, at, caches[2], add_norm)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert [set(vars(module)) for module in model.modules()] == before


def test_compiled_steps_are_captured_or_the_reason_is_said(monkeypatch):
    model, graph = tiny_qwen2(), FakeGraph()
    front_part = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: front_part(f, dynamic=dynamic))
    cache, step, line = pick_step(model, graph.record, compiled=True)
    assert line.endswith("one command a token; norms, rotation and gate * up compiled")
    want = list(generate(model, PROMPT, KVCache(2), max_new_tokens=20))
    assert list(generate(model, PROMPT, cache, max_new_tokens=20, step=step)) == want

    def broken(f, dynamic):
        raise RuntimeError("no Triton here\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    cache, step, line = pick_step(model, graph.record, compiled=True)
    assert line.endswith("one command a token; not compiled (no Triton here)")
    assert list(generate(model, PROMPT, cache, max_new_tokens=20, step=step)) == want


def test_a_failed_or_wrong_capture_is_not_used():
    def refuses(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    def stale(call):
        result = call()
        return lambda: result.zero_(), result

    model = tiny_qwen2()
    for record, words in ((refuses, "not permitted when stream is capturing)"),
                          (stale, "a captured step is off by")):
        cache, step, line = pick_step(model, record)
        assert type(cache) is KVCache and step is next_scores and words in line and "\n" not in line
    assert "on a CPU" in pick_step(model)[2]


def test_a_step_reads_nothing_from_the_device():
    """A read within a step cannot be captured: no number, no copy from the host."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.name().split(".")[0] not in (
                "aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh",
                "aten::masked_select", "aten::equal",
            ), func
            return func(*args, **(kwargs or {}))

    def record(call):
        with Refuse():
            result = call()
        return lambda: result.copy_(call()), result

    assert "captured" in pick_step(tiny_qwen2(), record)[2]


def test_a_graph_is_recorded_after_two_warm_up_runs(monkeypatch):
    """record_cuda with the calls of torch.cuda recorded instead of run."""
    from contextlib import contextmanager
    events = []

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    class Graph:
        def replay(self):
            events.append("replay")

    @contextmanager
    def within(what):
        events.append(f"begin {type(what).__name__}")
        yield
        events.append(f"end {type(what).__name__}")

    for name, stand_in in (("Stream", Stream), ("CUDAGraph", Graph), ("current_stream", Stream),
                           ("stream", within), ("graph", within)):
        monkeypatch.setattr(torch.cuda, name, stand_in, raising=False)
    replay, result = decode.record_cuda(lambda: events.append("call") or 5)
    replay()
    assert result == 5
    assert events == ["wait", "begin Stream", "call", "call", "end Stream", "wait", "begin Graph",
                      "call", "end Graph", "replay"]


@pytest.mark.parametrize("kernel, module, name", [
    ("flash-attn", "flash_attn", "flash_attn_varlen_func"),
    ("torch-varlen", "torch.nn.attention.varlen", "varlen_attn")
])
def test_varlen_kernels_get_the_end_of_the_keys(kernel, module, name, monkeypatch):
    """An imitation of the kernel, by its own signature, gives the result of the mask."""
    import sys
    import types

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, scale=None, causal=False,
               enable_gqa=True, **more):
        # heads that share a key/value head come as queries: nothing is repeated
        assert cu_q.tolist() == [0, len(q)] and len(q) > 1 and q.shape[1] == k.shape[1]
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (len(q), len(k))
        assert not causal
        n = int(cu_k[1])
        k, v = (x[:n].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        weights = (torch.einsum("thd,shd->hts", q, k) * (softmax_scale or scale)).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, v)

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: varlen}))
    model, graph = tiny_qwen2(), FakeGraph()
    want = list(generate(model, PROMPT, KVCache(2), max_new_tokens=30))
    cache, step, _ = pick_step(model, graph.record)
    with torch.no_grad():
        next_scores(model, torch.tensor([PROMPT]), cache)  # the prompt by an available kernel
        model.kernel = kernel
        first = want[0]
        got = [first]
        for _ in range(29):
            got.append(int(step(model, torch.tensor([[got[-1]]]), cache).argmax()))
    assert got == want
