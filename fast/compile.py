"""The cheap steps of a block, compiled: norms, the rotation, act(gate) * up, and 4-bit unpacking.

Requires: model.py.
Next: fast/fused_block.py.
"""
import torch
from torch import nn

from families import model_config
from methods.quant import Quantised, quantised_weights, unpack_at_once
from model import CausalLM, init_weights


def compile_steps(model: nn.Module):
    """Norms, the rotation of q and k, and act(gate) * up as one kernel each, in place of one for every operation in
    them: each then reads its input once. In place; the functions as they are written stay what is right."""
    compiled = {}
    for module in model.modules():
        for name in ("compute", "turn"):
            if function := getattr(type(module), name, None):
                if function not in compiled:
                    compiled[function] = torch.compile(function, dynamic=True)
                setattr(module, name, compiled[function])


def pick_compile(asked: bool | None, device, dtype, hidden_act: str = "silu") -> tuple[bool, str]:
    """(whether to compile_steps, a line for the start page). asked None: on GPUs, where torch has a compiler for it.

    What the compiler makes is first tried on a small block, forward and backward, against what is written.
    """
    device = torch.device(device)
    if not asked and (asked is False or device.type != "cuda"):
        return False, "steps between products: as written" + ("" if asked is False else
                                                              f" (on {device.type} compiling takes longer than it saves)")
    try:
        error = compile_error(device, dtype, hidden_act)
    except Exception as refusal:        # what a broken compiler raises is of many kinds, and none must end a training
        text = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
        return False, f"steps between products: as written; torch.compile does not work here ({text[:120]})"
    if not error < COMPILED_ERROR[dtype]:
        return False, f"steps between products: as written; those that torch.compile makes are off by {error:.2g}"
    return True, "steps between products: compiled (norms, rotation, gate * up)"


COMPILED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}       # relative, of any gradient


def compile_error(device, dtype, hidden_act: str) -> float:
    """How far a compiled block is from one that is not: the largest relative error of its output and gradients."""
    config = model_config(dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                               num_attention_heads=4, num_key_value_heads=2, vocab_size=64, max_position_embeddings=64,
                               rms_norm_eps=1e-5, hidden_act=hidden_act))
    results = []
    for compiled in (False, True):
        model = CausalLM(config)
        init_weights(model, torch.Generator().manual_seed(0))
        model.to(device, dtype)
        model.product = "torch"
        if compiled:
            compile_steps(model)
        out = model(torch.arange(40, device=device)[None])
        out.float().square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    return max(float((a - b).float().norm() / (a.float().norm() + 1e-12)) for a, b in zip(*results))


@torch.no_grad()
def compile_unpacking(model: nn.Module) -> str:
    """Let torch's compiler make one kernel of what makes 4-bit weights dense. Returns a line for the start page, or "".

    It is tried first, and must give the same bits; otherwise all stays as it is.
    """
    weights = [weight for weight in quantised_weights(model).values() if weight.form.kind != "int8"]
    if not weights:
        return ""
    tried = min(weights, key=Quantised.numel)
    tried.compiled = None
    exact = tried.dense()
    try:
        quick = torch.compile(unpack_at_once, dynamic=True)

        def unpack(codes, scales, pairs, dtype):
            return quick(codes, scales, pairs.view(torch.float32).view(256, 2), dtype)

        tried.compiled = unpack
        same, said = torch.equal(tried.dense(), exact), "gives other numbers"
    except Exception as refusal:        # what a broken compiler raises is of many kinds, and none must end a training
        text = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
        same, said = False, f"does not work here ({text[:120]})"
    for weight in weights:
        weight.compiled = unpack if same else None
    return "4-bit weights: made dense by one compiled kernel" if same else \
        f"4-bit weights: made dense in several steps; torch.compile {said}"
