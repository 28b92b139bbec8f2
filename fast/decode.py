"""Make a loaded model fast at one token after another; its answers stay the same.

    lines = prepare(model)              once, after adapters are merged; lines for the start page
    cache, step, line = pick_step(model)
    tokens = generate(model, prompt_ids, cache, stop_ids, step=step)

One token reads every weight once and computes little, so the speed is that of reading memory, if
nothing else takes time:

    joined matrices     q, k, v read the same input, gate and up too: joined, they are one matmul
                        each. The decoder has such blocks anyway (Switches.fused_qkv,
                        fused_gate_up); the rows are the same
    quick matmuls       on a CPU oneDNN's, in 16 bits on weights in its own layout; torch's takes
                        one core in float32, and changes the layout for each token in 16 bits
    captured steps      on a GPU the hundreds of kernels of a step are started by one command, a
                        CUDA graph. A captured step runs no Python: it reads and writes the same
                        memory each time. So the cache's buffers stay where they are, and the
                        position to write to is a number on the device

Training uses none of it: the modules of model.py and generate.next_scores are the plain twins.

Requires: model.py (Attention, MLP), fast/matmul.py (onednn), generate.py (the loop).
Next: fast/batch_decode.py, chat.py.
Sources: oneDNN's documentation of inner product and of memory formats; CUDA graphs in torch's notes
on CUDA semantics.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import Filled
from checkpoint.show import bytes_in_words
from fast.matmul import CLEARLY, onednn, shortest
from generate import next_scores
from model import Attention, CausalLM, KVCache, MLP, NormalizedHead
from rope import LENGTH_DEPENDENT

# numbers of a matrix from which on a quick matmul gains more than its call costs
WORTH = 2**18
# tokens: a step is captured for caches of so many, and for each power of two above
SMALLEST = 256


@torch.no_grad()
def prepare(model: CausalLM, available: int | None = None, rows: int = 1) -> list[str]:
    """Join matrices and take the quickest matmul, in place, for inference only. Returns lines that
    say what was done.

    rows: how many are to be decoded at once. available: bytes of memory that may be taken, None for
    any amount. Joining and laying out anew make copies, which weights mapped from a file do not
    need; where there is no room for that, they stay as they are."""
    weight = model.lm_head.weight
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if available is not None and available < 1.2 * size and weight.device.type == "cpu":
        return [
            f"weights   mapped from the file: {bytes_in_words(size)}, and "
            f"{bytes_in_words(available)} are free"
        ]
    if isinstance(model.lm_head, NormalizedHead):  # once, not for each token
        model.lm_head = linear_of(model.lm_head.effective_weight())
    joined = join_matrices(model)
    lines = [f"weights   {joined} joined (q, k, v; gate, up)"] if joined else []
    if weight.device.type == "cpu":
        matmul, line = pick_decode_matmul(weight.dtype, rows)
        if matmul != "torch":
            for name, layer in [
                (name, m)
                for name, m in model.named_modules()
                if type(m) is nn.Linear and m.weight.numel() >= WORTH
            ]:
                parent, _, leaf = name.rpartition(".")
                setattr(
                    model.get_submodule(parent),
                    leaf,
                    QuickLinear(layer, matmul == "onednn packed", rows),
                )
        lines.append(line)
    return lines


# ---- joined matrices ----------------------------------------------------------------------------


def join_matrices(model: CausalLM) -> int:
    """Turn q, k, v of each block into one linear layer, and gate and up of each MLP. Returns how
    many were made.

    Layers with an adapter beside them stay apart.
    """
    joined = 0
    for module in list(model.modules()):
        if isinstance(module, Attention) and not module.config.fused_qkv:
            if join(module, ("q_proj", "k_proj", "v_proj"), "qkv_proj"):
                module.config = replace(module.config, fused_qkv="blocks")
                joined += 1
        elif (
            isinstance(module, MLP)
            and not module.fused
            and join(module, ("gate_proj", "up_proj"), "gate_up_proj")
        ):
            module.fused = True
            joined += 1
    return joined


def join(module: nn.Module, names, joined: str) -> bool:
    """Put one linear layer in the place of several of the same input; False where one of them is
    none.
    """
    layers = [getattr(module, name) for name in names]
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    setattr(module, joined, linear_of(torch.cat([layer.weight for layer in layers]), bias))
    for name in names:
        delattr(module, name)
    return True


def linear_of(weight, bias=None) -> nn.Linear:
    """A linear layer of these tensors, for inference."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer.eval()


# ---- matmuls on a CPU ---------------------------------------------------------------------------


class QuickLinear(nn.Module):
    """An nn.Linear of oneDNN's, without gradients.

    packed: the weights are copied into the layout it likes best for so many rows.
    """

    def __init__(self, layer: nn.Linear, packed: bool, rows: int = 1):
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            layer.in_features,
            layer.out_features,
            layer.bias,
        )
        self.weight = pack_weight(layer.weight, rows) if packed else layer.weight

    def forward(self, x):
        return onednn(x, self.weight, self.bias)


def pack_weight(W, rows: int = 1):
    """A copy of W (out, in) in oneDNN's own order for matmuls with so many rows.

    Only onednn can read it.
    """
    return torch.ops.mkldnn._reorder_linear_weight.default(W.detach(), rows)


DECODE_MATMULS = {
    "torch": (F.linear, lambda W, rows=1: W),
    "onednn": (onednn, lambda W, rows=1: W),
    "onednn packed": (onednn, pack_weight),
}


def pick_decode_matmul(dtype, rows: int = 1, shape=(4096, 1024)) -> tuple[str, str]:
    """(a name of DECODE_MATMULS, a line about it): the quickest here for a number of rows, among
    those that are right.

    Right is what differs from float64 by no more than four times what torch's own matmul does.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    exact, took, said = x.double() @ W.double().T, {}, []
    allowed = 4 * (F.linear(x, W) - exact).abs().max()
    for name, (matmul, laid_out) in DECODE_MATMULS.items():
        try:
            weight = laid_out(W, rows)
            if not (matmul(x, weight) - exact).abs().max() <= allowed:
                said.append(f"{name} (wrong)")
                continue
        except (RuntimeError, AttributeError, NotImplementedError):
            said.append(f"{name} (not in this torch)")
            continue
        took[name] = shortest(lambda: matmul(x, weight), times=40)
    quickest = min(took, key=took.get)
    taken = quickest if took[quickest] * CLEARLY < took["torch"] else "torch"
    if taken == "onednn packed" and "onednn" in took and took["onednn"] < took[taken] * CLEARLY:
        # as quick, and no copy of the weights
        taken = "onednn"
    rates = {name: f"{W.nbytes / seconds / 1e9:.0f} GB/s" for name, seconds in took.items()}
    others = [f"{name} ({rate})" for name, rate in rates.items() if name != taken] + said
    return taken, f"matmul    {taken} ({rates[taken]} of weights; others: {', '.join(others)})"


# ---- captured steps on a GPU --------------------------------------------------------------------


def pick_step(model: CausalLM, record=None):
    """(cache, step, line): what `generate` is to use with this model, and a line that says which
    and why.

    record: how a step is captured, see record_cuda; None: so on a GPU, and not at all elsewhere. A
    first step is tried and compared with its twin."""
    layers, device = model.config.num_hidden_layers, model.lm_head.weight.device
    why = (
        "on a CPU starting a kernel takes no time"
        if record is None and device.type != "cuda"
        else uncapturable(model)
    )
    if not why:
        cache, step = StillCache(layers), CapturedStep(record or record_cuda)
        try:
            why = differs(model, cache, step)
        # of a driver, a kernel, another version
        except (RuntimeError, ImportError, TypeError) as error:
            why = str(error).strip().partition("\n")[0][:120]
        if not why:
            return cache, step, "steps     captured as a graph: one command a token"
    return KVCache(layers), next_scores, f"steps     kernel by kernel ({why})"


def uncapturable(model: CausalLM) -> str:
    """Why a step of this model cannot be captured:

    what it computes depends on numbers that Python has to know. Or "".
    """
    config = model.config
    reasons = {
        "its rotation goes by the length of the sequence": config.rope["rope_type"]
        in LENGTH_DEPENDENT,
        "sliding windows or chunks": any(config.windows) or any(config.chunks),
        "ALiBi": config.alibi,
        "which experts run is known after their router only": any(config.sparse),
    }
    return next((reason for reason, true in reasons.items() if true), "")


@torch.no_grad()
def differs(model: CausalLM, cache, step) -> str:
    """How the scores of a first step differ from its twin's, in words; "" if they are the same up
    to rounding.
    """
    device, plain = model.lm_head.weight.device, KVCache(len(cache.buffers))
    for ids in (
        torch.arange(3, device=device)[None],
        torch.ones(1, 1, dtype=torch.int64, device=device),
    ):
        want, got = next_scores(model, ids, plain), step(model, ids, cache)
    cache.crop(0)
    far, allowed = float((got - want).abs().max()), 0.05 * float(want.abs().max())
    # written so, NaN is a difference
    return "" if far <= allowed else f"a captured step is off by {far:.2g}"


class StillCache(KVCache):
    """A KVCache for one sequence that a captured step can use:

    it writes at `place`, (1,) int64 on the device.
    """

    def __init__(self, num_layers: int):
        super().__init__(num_layers)
        self.place = None

    def update(self, layer: int, k, v):
        """As KVCache.update; within a captured step all slots come back, and `filled` tells how
        many of them count.
        """
        if self.filled is None:
            return super().update(layer, k, v)
        slots = self.filled.mask.shape[-1]
        for buffer, new in zip(self.buffers[layer], (k, v)):
            buffer.index_copy_(2, self.place, new)
        return tuple(buffer[:, :, :slots] for buffer in self.buffers[layer])

    def make_room(self, slots: int):
        """Let each buffer hold so many tokens at least.

        Steps that were captured before must not run after it moved.
        """
        for layer, held in enumerate(self.buffers):
            if held[0].shape[2] < slots:
                self.buffers[layer] = self.grown(held, held[0], slots)


class CapturedStep:
    """next_scores, but single tokens are read by a recorded step; one is recorded for each power of
    two of slots, so that attention reads at most twice what is filled. record(call) -> (replay,
    what call returned).
    """

    def __init__(self, record):
        self.record, self.recorded, self.where, self.ids = record, {}, None, None

    def __call__(self, model: CausalLM, ids, cache: StillCache):
        if ids.shape[1] > 1 or not cache.length:
            # a prompt: large matmuls, few kernels
            return next_scores(model, ids, cache)
        if self.ids is None:
            self.ids, cache.place = (
                ids.clone(),
                torch.zeros(1, dtype=torch.int64, device=ids.device),
            )
        slots = max(SMALLEST, 1 << cache.length.bit_length())
        cache.make_room(slots)
        if (where := cache.buffers[0][0].data_ptr()) != self.where:
            self.recorded, self.where = {}, where
        self.ids.copy_(ids)
        cache.place.fill_(cache.length)
        if slots not in self.recorded:
            self.recorded[slots] = self.record(lambda: one_step(model, self.ids, cache, slots))
        replay, scores = self.recorded[slots]
        replay()
        cache.length += 1
        return scores


def one_step(model: CausalLM, ids, cache: StillCache, slots: int):
    """Scores (V,) after the token ids (1, 1) at cache.place, with nothing that Python would have to
    know.
    """
    place = cache.place
    cache.filled = Filled(
        (torch.arange(slots, device=place.device) <= place)[None, None, None],
        F.pad(place + 1, (1, 0)).to(torch.int32),
    )
    try:
        return model.logits(model(ids, place[None], cache=cache)[0, -1]).float()
    finally:
        cache.filled = None


def record_cuda(call):
    """Capture a function as a CUDA or HIP graph -> (replay, what it returned:

    filled anew by each replay).
    """
    # libraries set themselves up in first calls
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
