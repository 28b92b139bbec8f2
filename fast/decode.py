"""Speed up decoding, one token after another, on a loaded model. Its answers stay the same.

    lines = prepare(model)              once, after adapters are merged; lines for the start page
    cache, step, line = pick_step(model)
    tokens = generate(model, prompt_ids, cache, stop_ids, step=step)

A token reads every weight once and computes little, so decoding can be as fast as memory is read,
if nothing else takes time:

    fused matrices      q, k and v read the same input, and so do gate and up: each group becomes
                        one matrix, one matmul. The decoder has such blocks for checkpoints that
                        store them (Switches.fused_qkv, fused_gate_up); the rows are the same
    oneDNN on a CPU     torch's own matmul uses one core in float32, and in 16 bits it reorders the
                        weights for every token
    captured steps      on a GPU a CUDA graph launches the hundreds of kernels of a step at once. A
                        captured step runs no Python: it reads and writes the same memory each
                        time. So the cache's buffers stay where they are, those of states
                        (layers.StateMixer) too, and the position to write to is a tensor on the
                        device

Training uses none of this. The slow twins are the modules of model.py and generate.next_scores.

Requires: model.py (Attention, MLP), fast/matmul.py (onednn), fast/lean_step.py, generate.py (the
loop).
Next: fast/batch_decode.py, chat.py.
Sources: oneDNN's documentation of inner product and of memory formats; CUDA graphs in torch's notes
on CUDA semantics.
"""
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import SDPA, Filled
from errors import bytes_in_words, first_line
from fast.lean_step import compiled_steps, hidden_of_token
from fast.matmul import CLEARLY, onednn, shortest
from generate import next_scores
from model import Attention, CausalLM, KVCache, MLP, NormalizedHead
from rope import LENGTH_DEPENDENT

WORTH = 2**18           # numbers in a matrix from which oneDNN gains more than a call costs
SMALLEST_CACHE = 256    # slots; a step is captured for this many and for each power of two above


@torch.no_grad()
def prepare(model: CausalLM, available: int | None = None, rows: int = 1) -> list[str]:
    """Fuse matrices and choose the fastest matmul, in place, for inference only.

    Returns lines for the start page. rows: sequences decoded at once. available: bytes of memory
    that may be used, None for any number. Fusing and reordering copy weights that could otherwise
    stay mapped from their file; without room for the copies, the model is not changed.
    """
    weight = model.lm_head.weight
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    on_cpu = weight.device.type == "cpu"
    if on_cpu and available is not None and available < 1.2 * size:
        return [f"weights   mapped from the file: {bytes_in_words(size)}, and "
                f"{bytes_in_words(available)} are free"]
    if isinstance(model.lm_head, NormalizedHead):
        model.lm_head = linear_of(model.lm_head.effective_weight())     # once, not for each token

    lines = []
    fused = fuse_matrices(model)
    if fused:
        lines.append(f"weights   {fused} fused matrices (q, k, v; gate, up)")
    if on_cpu:
        matmul, line = pick_decode_matmul(weight.dtype, rows)
        if matmul != "torch":
            use_onednn(model, packed=matmul == "onednn packed", rows=rows)
        lines.append(line)
    return lines


# ---- fused matrices -----------------------------------------------------------------------------


def fuse_matrices(model: CausalLM) -> int:
    """Fuse q, k, v of each block, and gate and up of each MLP; return the number of fused layers.

    A group in which a layer has an adapter is left alone.
    """
    count = 0
    for module in list(model.modules()):
        if isinstance(module, Attention) and not module.config.fused_qkv:
            if fuse_layers(module, ("q_proj", "k_proj", "v_proj"), "qkv_proj"):
                module.config = replace(module.config, fused_qkv="blocks")
                count += 1
        elif isinstance(module, MLP) and len(module.readers()) == 2:
            if fuse_layers(module, ("gate_proj", "up_proj"), "gate_up_proj"):
                module.fused = True
                count += 1
    return count


def fuse_layers(module: nn.Module, names: tuple[str, ...], fused: str) -> bool:
    """Fuse linear layers that read the same input into one.

    False if one of them is not an nn.Linear; then nothing is changed.
    """
    layers = [getattr(module, name) for name in names]
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    setattr(module, fused, linear_of(weight, bias))
    for name in names:
        delattr(module, name)
    return True


def linear_of(weight, bias=None) -> nn.Linear:
    """A linear layer with these tensors, for inference."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer.eval()


# ---- matmuls on a CPU ---------------------------------------------------------------------------


class OneDNNLinear(nn.Module):
    """An nn.Linear computed by oneDNN, without gradients.

    packed: copy the weight into the layout that oneDNN prefers for this number of rows.
    """

    def __init__(self, layer: nn.Linear, packed: bool, rows: int = 1):
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        self.weight = pack_weight(layer.weight, rows) if packed else layer.weight

    def forward(self, x):
        return onednn(x, self.weight, self.bias)


def use_onednn(model: CausalLM, packed: bool, rows: int):
    """Replace every large linear layer by a OneDNNLinear."""
    large = [(name, module) for name, module in model.named_modules()
             if type(module) is nn.Linear and module.weight.numel() >= WORTH]
    for name, layer in large:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, OneDNNLinear(layer, packed, rows))


def pack_weight(W, rows: int = 1):
    """A copy of W (out, in) in oneDNN's own layout for matmuls with this number of rows.

    Only onednn can read it.
    """
    return torch.ops.mkldnn._reorder_linear_weight.default(W.detach(), rows)


def unpacked(W, rows: int = 1):
    """W itself, for matmuls that read torch's layout."""
    return W


# name -> (matmul, how it wants its weight)
DECODE_MATMULS = {
    "torch": (F.linear, unpacked),
    "onednn": (onednn, unpacked),
    "onednn packed": (onednn, pack_weight),
}


def pick_decode_matmul(dtype, rows: int = 1, shape=(4096, 1024)) -> tuple[str, str]:
    """(name of the fastest correct matmul for this number of rows, a line for the start page).

    Correct: no further from float64 than four times torch's own error. Speed is given in bytes of
    weights read per second.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    exact = x.double() @ W.double().T
    allowed = 4 * (F.linear(x, W) - exact).abs().max()

    seconds = {}
    refused = []
    for name, (matmul, prepare_weight) in DECODE_MATMULS.items():
        try:
            weight = prepare_weight(W, rows)
            is_correct = (matmul(x, weight) - exact).abs().max() <= allowed
        except (RuntimeError, AttributeError, NotImplementedError):
            refused.append(f"{name} (not in this torch)")
            continue
        if not is_correct:
            refused.append(f"{name} (wrong)")
            continue
        seconds[name] = shortest(lambda: matmul(x, weight), times=40)

    picked = min(seconds, key=seconds.get)
    if seconds[picked] * CLEARLY >= seconds["torch"]:
        picked = "torch"
    if picked == "onednn packed" and "onednn" in seconds:
        if seconds["onednn"] < seconds[picked] * CLEARLY:
            picked = "onednn"           # about as fast, and needs no copy of the weights
    rates = {name: f"{W.nbytes / time / 1e9:.0f} GB/s" for name, time in seconds.items()}
    others = [f"{name} ({rate})" for name, rate in rates.items() if name != picked] + refused
    return picked, f"matmul    {picked} ({rates[picked]} of weights; others: {', '.join(others)})"


# ---- captured steps on a GPU --------------------------------------------------------------------


def pick_step(model: CausalLM, record: Callable | None = None,
              compiled: bool | None = None) -> tuple[KVCache, Callable, str]:
    """Choose how `generate` decodes with this model: (cache, step, a line for the start page).

    record: captures a step, see record_cuda; None: record_cuda on a GPU, no capture elsewhere. A
    captured step is tried first, and compared with its twin. compiled: with the elementwise steps
    compiled (fast/lean_step.py); None: on a GPU, where torch's compiler works.
    """
    num_layers = model.config.num_hidden_layers
    on_gpu = model.lm_head.weight.device.type == "cuda"
    if record is None and not on_gpu:
        why = "on a CPU launching a kernel takes no time"
    else:
        why = uncapturable(model)
    if why:
        return KVCache(num_layers), next_scores, f"steps     kernel by kernel ({why})"

    line = "steps     captured as a graph: one command a token"
    if compiled is None:
        compiled = on_gpu
    if compiled:
        cache, step, fault = try_step(model, record or record_cuda, compiled=True)
        if not fault:
            return cache, step, f"{line}; norms, rotation and gate * up compiled"
        line += f"; not compiled ({fault})"
    cache, step, why = try_step(model, record or record_cuda, compiled=False)
    if not why:
        return cache, step, line
    return KVCache(num_layers), next_scores, f"steps     kernel by kernel ({why})"


def try_step(model: CausalLM, record: Callable,
             compiled: bool) -> tuple["StaticCache", "CapturedStep", str]:
    """(cache, step, why they cannot be used or "")."""
    cache = StaticCache(model.config.num_hidden_layers)
    step = CapturedStep(record, compiled)
    try:
        return cache, step, differs(model, cache, step)
    except (RuntimeError, ImportError, TypeError, AttributeError, OSError) as error:
        # of a driver, a kernel or a compiler
        return cache, step, first_line(error)


def uncapturable(model: CausalLM) -> str:
    """Why a step of this model cannot be captured, or "".

    Python must know a number to compute it, and a captured step runs no Python.
    """
    config = model.config
    if config.rope["rope_type"] in LENGTH_DEPENDENT:
        return "its rotation depends on the length of the sequence"
    if any(config.windows) or any(config.chunks):
        return "sliding windows or chunks"
    if config.alibi:
        return "ALiBi"
    if config.parallel_mlp:
        return "attention and MLP read one norm"
    if any(config.sparse):
        return "the router decides which experts run"
    return ""


@torch.no_grad()
def differs(model: CausalLM, cache: "StaticCache", step: "CapturedStep") -> str:
    """How far the scores of a first step are from its twin's, in words; "" if they agree."""
    device = model.lm_head.weight.device
    prompt = torch.arange(3, device=device)[None]
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    plain_cache = KVCache(len(cache.buffers))
    for ids in (prompt, token):
        want = next_scores(model, ids, plain_cache)
        got = step(model, ids, cache)
    cache.crop(0)
    error = float((got - want).abs().max())
    if error <= 0.05 * float(want.abs().max()):         # NaN does not agree
        return ""
    return f"a captured step is off by {error:.2g}"


class StaticCache(KVCache):
    """A KVCache of one sequence whose buffers a captured step can use.

    The step writes at `position`, a tensor (1,) int64 on the device.
    """

    def __init__(self, num_layers: int):
        super().__init__(num_layers)
        self.position = None
        self.generation = 0             # counts the moves of buffers
        self.state_buffers = {}         # {layer: where its state lies}; kept by crop

    def update(self, layer: int, k, v):
        """As KVCache.update, but within a captured step all slots are returned.

        `filled` says which of them count.
        """
        if self.filled is None:
            return super().update(layer, k, v)
        slots = self.filled.mask.shape[-1]
        for buffer, new in zip(self.buffers[layer], (k, v)):
            buffer.index_copy_(2, self.position, new)
        return tuple(buffer[:, :, :slots] for buffer in self.buffers[layer])

    def keep_state(self, layer: int, state: tuple):
        """As KVCache.keep_state, in the same memory each time."""
        if layer not in self.state_buffers:
            self.state_buffers[layer] = tuple(x.clone() for x in state)
        else:
            for buffer, new in zip(self.state_buffers[layer], state):
                buffer.copy_(new)
        self.states[layer] = self.state_buffers[layer]

    @contextmanager
    def states_restored(self):
        """States are afterwards as before: a recording runs the step, and a step changes them."""
        before = [(buffer, buffer.clone()) for state in self.states.values() for buffer in state]
        yield
        for buffer, old in before:
            buffer.copy_(old)

    def advance(self, tokens: int):
        """As KVCache.advance; a captured step runs no Python, and is counted where it is called."""
        if self.filled is None:
            super().advance(tokens)

    def grown(self, buffers, like, room: int):
        self.generation += 1
        return super().grown(buffers, like, room)

    def make_room(self, slots: int):
        """Enlarge buffers with fewer slots. They move; steps captured before must not run again."""
        for layer, held in enumerate(self.buffers):
            if held and held[0].shape[2] < slots:       # None: of a layer with a state
                self.buffers[layer] = self.grown(held, held[0], slots)


class CapturedStep:
    """next_scores, with single tokens read by a captured step.

    A step is captured for each power of two of slots, so attention reads at most twice the slots
    that are filled. record(call) -> (replay, what call returned).
    """

    def __init__(self, record: Callable, compiled: bool = False):
        self.record = record
        self.compiled = compiled        # see fast/lean_step.py
        self.recorded = {}              # slots -> (replay, scores)
        self.recorded_for = None        # (model, cache, its generation) that they read and write
        self.ids = None                 # (1, 1), read by them

    def __call__(self, model: CausalLM, ids, cache: StaticCache):
        if ids.shape[1] > 1 or not cache.length:
            return next_scores(model, ids, cache)       # a prompt: large matmuls, few kernels
        if self.ids is None:
            self.ids = ids.clone()
            cache.position = torch.zeros(1, dtype=torch.int64, device=ids.device)
        slots = max(SMALLEST_CACHE, 1 << cache.length.bit_length())
        cache.make_room(slots)
        # not the address: memory that was freed may come back with another shape
        if self.recorded_for != (model, cache, cache.generation):
            self.recorded = {}
            self.recorded_for = (model, cache, cache.generation)

        self.ids.copy_(ids)
        cache.position.fill_(cache.length)
        if slots not in self.recorded:
            with cache.states_restored():
                self.recorded[slots] = self.record(
                    lambda: one_step(model, self.ids, cache, slots, self.compiled))
        replay, scores = self.recorded[slots]
        replay()
        cache.length += 1
        return scores


def one_step(model: CausalLM, ids, cache: StaticCache, slots: int, compiled: bool = False):
    """Scores (V,) after the token ids (1, 1) at cache.position; needs no number from the device."""
    position = cache.position
    dtypes = [held[0].dtype for held in cache.buffers if held]
    cache.filled = filled_slots(model, position, slots, dtypes[0] if dtypes else torch.float32)
    try:
        with compiled_steps(model) if compiled else nullcontext() as add_norm:
            hidden = hidden_of_token(model, ids, position[None], cache, add_norm)
        return model.logits(hidden[0, -1]).float()
    finally:
        cache.filled = None


def filled_slots(model: CausalLM, position, slots: int, dtype: torch.dtype) -> Filled:
    """The slots up to `position`, in the forms that attention kernels read, once for all layers."""
    config = model.config
    mask = torch.arange(slots, device=position.device) <= position
    mask = mask[None, None, None]                                               # (1, 1, 1, S)
    group = config.num_attention_heads // config.num_key_value_heads
    bias = None
    if model.kernel in SDPA:
        bias = mask.to(dtype).log()                             # 0, or -inf for an empty slot
    return Filled(
        mask=mask,
        ends=F.pad(position + 1, (1, 0)).to(torch.int32),       # (2,), from 0
        query_ends=group * torch.arange(2, dtype=torch.int32, device=position.device),
        bias=bias,
    )


def record_cuda(call: Callable) -> tuple[Callable, torch.Tensor]:
    """Capture a function as a CUDA or HIP graph: (replay, its result).

    Each replay overwrites the result.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):              # libraries initialize themselves in their first calls
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
