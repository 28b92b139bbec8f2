"""fast/compile.py: compiled functions are tried before use, in every family."""
import pytest
import torch

from families import model_config
from fast.compile import compile_steps, compile_tokens, pick_compile
from methods.fp8 import pick_fp8, quantize_fp8, with_compiled_rounding
from methods.quant import unpack_at_once
from model import ACTIVATIONS, CausalLM, init_weights
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
    assert sorted(seen) == ["gated", "norm_rows", "rotate"]

    def wrong(function, dynamic):
        return lambda *args, **kwargs: 1.01 * function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", wrong)
    taken, line = pick_compile(True, "cpu", torch.float32)
    assert taken is False and "(compiled steps are wrong by" in line

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
