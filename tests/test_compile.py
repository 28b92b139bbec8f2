"""fast/compile.py: compiled functions are tried before use, in every family."""
import pytest
import torch

from checkpoint.read_config import model_config
from fast.compile import (compile_error, compile_loss, compile_steps, compile_tokens, loss_in_one,
                          pick_compile)
from fast.fused_block import fuse_blocks
from losses import answer_logps, cross_entropy_sum, losses_and_grad
from methods.fp8 import pick_fp8, quantize_fp8, with_compiled_rounding
from methods.quant import unpack_at_once
from layers import ACTIVATIONS
from model import CausalLM, init_weights
from tests.tiny_models import SMALL_FAMILIES, SMALL_LLAMA


def test_compiled_steps_are_tried_before_use(monkeypatch):
    """Without a real compiler, which takes half a minute on a CPU.

    Its front end alone, a wrong one and a broken one take its place.
    """
    assert pick_compile(None, "cpu", torch.float32)[0] is False
    assert pick_compile(False, "cuda", torch.float32)[0] is False
    compiler = torch.compile
    seen = []

    def front_part(function, dynamic):
        seen.append(function.__qualname__)
        return compiler(function, dynamic=dynamic, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", front_part)
    for act in ACTIVATIONS:
        seen.clear()
        assert pick_compile(True, "cpu", torch.float32, act)[0] is True
    assert sorted(seen) == ["gated", "loss_in_one", "norm_rows", "rotate"]

    def wrong(function, dynamic):
        if function.__name__ != spoiled:
            return function
        if function is loss_in_one:
            return lambda *args: (function(*args)[0], 1.01 * function(*args)[1])
        return lambda *args: 1.01 * function(*args)

    monkeypatch.setattr(torch, "compile", wrong)
    for spoiled in ("gated", "loss_in_one", "norm_rows", "rotate"):
        taken, line = pick_compile(True, "cpu", torch.float32)
        assert taken is False and "(compiled steps are wrong by" in line, spoiled

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: 1 / 0)
    taken, line = pick_compile(True, "cpu", torch.float32)
    assert taken is False and "fails here: division by zero)" in line


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "glm4", "olmo"])
def test_compiled_steps_in_every_family(name, monkeypatch):
    seen = []

    def recording(function, dynamic):
        def called(*args, **kwargs):
            seen.append(function)
            return function(*args, **kwargs)
        return called

    monkeypatch.setattr(torch, "compile", recording)
    model = CausalLM(model_config(dict(SMALL_LLAMA, **SMALL_FAMILIES[name])))
    init_weights(model, torch.Generator().manual_seed(0))
    want = model(torch.arange(9)[None])
    compile_steps(model)
    assert torch.equal(model(torch.arange(9)[None]), want)
    assert len(set(seen)) >= 2


class RecordingCompiler:
    """A backend of torch.compile that runs graphs as they are and keeps the sizes of their inputs.

    A size is a number where it is a constant of the graph, and "s" where it is symbolic.
    """

    def __init__(self, monkeypatch):
        self.graphs = []
        self.torch_compile = torch.compile
        monkeypatch.setattr(torch, "compile", self.compile)

    def compile(self, function, dynamic):
        return self.torch_compile(function, dynamic=dynamic, backend=self.backend, fullgraph=True)

    def backend(self, graph, inputs):
        shapes = []
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(value, torch.Tensor):
                shapes.append(tuple(n if isinstance(n, int) else "s" for n in value.shape))
        self.graphs.append(sorted(shapes, key=str))
        return graph.forward


def test_only_the_tokens_are_symbolic_and_every_length_uses_the_same_graph(monkeypatch):
    """The sizes in the kernel are what lets it store 16 bytes at once (bench/NOTES.md)."""
    torch._dynamo.reset()
    compiler = RecordingCompiler(monkeypatch)
    config = model_config(dict(SMALL_LLAMA, **SMALL_FAMILIES["qwen3"]))
    model, twin = CausalLM(config), CausalLM(config)
    for each in (model, twin):
        init_weights(each, torch.Generator().manual_seed(0))
    compile_steps(model)
    for length in (9, 20, 33, 7, 40, 41, 12, 13, 14, 15, 16):
        ids = torch.arange(length)[None]
        out, want = model(ids), twin(ids)
        torch.testing.assert_close(out, want)
        out.square().sum().backward()
        want.square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    D, Dh, F = config.hidden_size, config.head_dim, config.intermediate_size
    table = (1, 1, "s", Dh)
    expected = {(("s", D), (D,)), (("s", Dh), (Dh,)), (("s", F), ("s", F))}
    for heads in (config.num_attention_heads, config.num_key_value_heads):
        expected.add((table, table, (1, heads, "s", Dh)))
    assert {tuple(graph) for graph in compiler.graphs} == {tuple(sorted(e, key=str))
                                                           for e in expected}
    assert len(compiler.graphs) <= 2 * len(expected)        # nothing for each of the 11 lengths


def test_rounding_and_unpacking_are_compiled_for_any_number_of_rows(monkeypatch):
    torch._dynamo.reset()
    compiler = RecordingCompiler(monkeypatch)
    fp8 = with_compiled_rounding(pick_fp8("cpu", torch.bfloat16)[0], compile_tokens)
    unpack = compile_tokens(unpack_at_once, tensors=2)
    pairs = torch.randn(256, 2)
    for n in (6, 50, 7, 31):
        x = torch.randn(n, 64)
        for found, right in zip(fp8.quantize(x, fp8.fp8_dtype), quantize_fp8(x, fp8.fp8_dtype)):
            assert torch.equal(found.float(), right.float())
        codes = torch.randint(256, (n, 32), dtype=torch.uint8)
        scales = torch.rand(n)
        args = (codes, scales, pairs, torch.bfloat16)
        assert torch.equal(unpack(*args), unpack_at_once(*args))
    assert compiler.graphs == [[("s", 64)], [("s", 32), ("s",), (256, 2)]]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_in_one_expression_equals_its_twin(softcap, dtype):
    scores = (8 * torch.randn(20, 333, generator=torch.Generator().manual_seed(1))).to(dtype)
    y = torch.arange(20) * 7
    found = loss_in_one(scores, y, softcap, dtype)
    want = losses_and_grad(scores.clone(), y, softcap, dtype)
    for x, right in zip(found, want):
        assert x.dtype == right.dtype and x.shape == right.shape
        torch.testing.assert_close(x, right, rtol=2e-6 if dtype == torch.float32 else 0.01,
                                   atol=1e-6)


def test_losses_with_the_compiled_passes_equal_those_without(monkeypatch):
    """Losses, and gradients of hidden states and head; one graph for chunks of any length."""
    torch._dynamo.reset()
    compiler = RecordingCompiler(monkeypatch)
    monkeypatch.setattr("losses.chunk_rows", lambda rows, vocab_size: 11)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(97, 16, generator=generator)
    chunk_loss = compile_loss()
    for length in (40, 61):
        targets = torch.randint(0, 97, (length,), generator=generator)
        targets[::5] = -100
        hidden = torch.randn(length, 16, generator=generator)
        for trained in ((hidden,), (hidden, weight)):
            results = []
            for options in ({}, {"chunk_loss": chunk_loss}):
                leaves = [x.detach().clone().requires_grad_(any(x is t for t in trained))
                          for x in (hidden, weight)]
                loss = cross_entropy_sum(*leaves, targets, **options)
                logps, _ = answer_logps(*leaves, targets, (length // 2, length - length // 2),
                                        **options)
                (loss + (logps * torch.tensor([1.0, 3.0])).sum()).backward()
                results.append([loss.detach(), logps.detach(),
                                *(x.grad for x in leaves if x.requires_grad)])
            for plain, fast in zip(*results):
                torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(hidden, weight, targets, chunk_loss=chunk_loss),
                           cross_entropy_sum(hidden, weight, targets))
    assert {tuple(graph) for graph in compiler.graphs} == {(("s", 97), ("s",))}
    assert len(compiler.graphs) == 1


def test_the_trial_forgives_what_a_compiler_rounds_otherwise(monkeypatch):
    """It computes a step in float32 and rounds once: far below the error that is refused."""
    def wide(function, dynamic):
        def call(*args):
            args = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                    for x in args]
            out = function(*args)
            if isinstance(out, tuple):
                return out
            return out.to(torch.bfloat16)
        return call

    monkeypatch.setattr(torch, "compile", wide)
    assert 1e-4 < compile_error("cpu", torch.bfloat16, "silu", fuse_blocks) < 0.015
