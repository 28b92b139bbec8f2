"""fast/compile.py: compiled functions are tried before use, in every family."""
import pytest
import torch

from families import model_config
from fast.compile import compile_steps, pick_compile
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
    assert sorted(seen) == ["gated", "rms_norm", "rotate"]

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
