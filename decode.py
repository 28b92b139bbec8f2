"""Make a loaded model fast at one token after another; what it answers stays the same.

    lines = prepare(model)              once, after the adapter is folded in; the lines are for the start page

Reading one token takes every weight once and computes little, so that the speed is that of reading memory. Two changes,
both undone by nothing and seen by no caller:

    joined matrices     q, k, v read the same input, gate and up too: as one matrix each they are one product, not five.
                        The decoder has such blocks anyway (Switches.fused_qkv, fused_gate_up); the rows are the same
    quick products      on a CPU oneDNN's product, in 16 bits on weights laid out as it likes them; torch's own takes
                        one core in float32, and lays the weights out anew for each token in 16 bits

Training does none of it, so the modules as model.py has them are the readable twin; a test holds the two together.

Read before: model.py (Attention, MLP), linear.py (onednn_product), generate.py (the loop). Read after: chat.py.
Sources: oneDNN's documentation of inner product and of memory formats.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from linear import CLEARLY, onednn_product, shortest
from model import MLP, Attention, CausalLM, bytes_in_words


@torch.no_grad()
def prepare(model: CausalLM, available: int | None = None) -> list[str]:
    """Join matrices and take the quickest product, in place, for inference only. Returns lines that say what was done.

    available: bytes of memory that may be taken, None for any amount. Joining and laying out anew make copies, which
    weights mapped from a file do not need; where there is no room for that, they stay as they are.
    """
    weight = model.lm_head.weight
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if available is not None and available < 1.2 * size and weight.device.type == "cpu":
        return [f"weights   as they lie in the file: {bytes_in_words(size)}, and {bytes_in_words(available)} are free"]
    joined = join_matrices(model)
    lines = [f"weights   {joined} joined (q, k, v; gate, up)"] if joined else []
    if weight.device.type == "cpu":
        product, line = pick_product(weight.dtype)
        if product != "torch":
            for name, layer in [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, QuickLinear(layer, product == "onednn packed"))
        lines.append(line)
    return lines


# ---- joined matrices --------------------------------------------------------------------------------------------


def join_matrices(model: CausalLM) -> int:
    """Turn q, k, v of each block into one linear layer, and gate and up of each MLP. Returns how many were made.

    Layers with an adapter beside them stay apart.
    """
    joined = 0
    for module in list(model.modules()):
        if isinstance(module, Attention) and not module.config.fused_qkv:
            if join(module, ("q_proj", "k_proj", "v_proj"), "qkv_proj"):
                module.config = replace(module.config, fused_qkv="blocks")
                joined += 1
        elif isinstance(module, MLP) and not module.fused and join(module, ("gate_proj", "up_proj"), "gate_up_proj"):
            module.fused = True
            joined += 1
    return joined


def join(module: nn.Module, names, joined: str) -> bool:
    """Put one linear layer in the place of several of the same input; False where one of them is none."""
    layers = [getattr(module, name) for name in names]
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    with torch.device("meta"):
        one = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), layers[0].bias is not None)
    for part in ("weight", "bias") if layers[0].bias is not None else ("weight",):
        setattr(one, part, nn.Parameter(torch.cat([getattr(layer, part) for layer in layers]), requires_grad=False))
    for name in names:
        delattr(module, name)
    setattr(module, joined, one.eval())
    return True


# ---- products on a CPU ------------------------------------------------------------------------------------------


class QuickLinear(nn.Module):
    """An nn.Linear of oneDNN's, without gradients. packed: the weights are copied into the layout it likes best."""

    def __init__(self, layer: nn.Linear, packed: bool):
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.weight = pack(layer.weight) if packed else layer.weight

    def forward(self, x):
        return onednn_product(x, self.weight, self.bias)


def pack(W):
    """A copy of W (out, in) in oneDNN's own order for products with one row. Only onednn_product can read it."""
    return torch.ops.mkldnn._reorder_linear_weight.default(W.detach(), 1)


PRODUCTS = {"torch": (F.linear, lambda W: W), "onednn": (onednn_product, lambda W: W),
            "onednn packed": (onednn_product, pack)}


def pick_product(dtype, shape=(4096, 1024)) -> tuple[str, str]:
    """(a name of PRODUCTS, a line about it): the quickest on this machine for one row, among those that are right.

    Right is what differs from float64 by no more than four times what torch's own product does.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(1, shape[1], generator=generator).to(dtype)
    exact, took, said = x.double() @ W.double().T, {}, []
    allowed = 4 * (F.linear(x, W) - exact).abs().max()
    for name, (product, laid_out) in PRODUCTS.items():
        try:
            weight = laid_out(W)
            if not (product(x, weight) - exact).abs().max() <= allowed:
                said.append(f"{name} (wrong)")
                continue
        except (RuntimeError, AttributeError, NotImplementedError):
            said.append(f"{name} (not in this torch)")
            continue
        took[name] = shortest(lambda: product(x, weight), times=40)
    quickest = min(took, key=took.get)
    taken = quickest if took[quickest] * CLEARLY < took["torch"] else "torch"
    if taken == "onednn packed" and "onednn" in took and took["onednn"] < took[taken] * CLEARLY:
        taken = "onednn"                                                # as quick, and no copy of the weights
    rates = {name: f"{W.nbytes / seconds / 1e9:.0f} GB/s" for name, seconds in took.items()}
    others = [f"{name} ({rate})" for name, rate in rates.items() if name != taken] + said
    return taken, f"product   {taken} ({rates[taken]} of weights; others: {', '.join(others)})"
