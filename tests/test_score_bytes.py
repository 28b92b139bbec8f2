"""runtime/activations.py: scores and masks of attention, against what torch's allocator hands out.

Not a sum over tensors: torch's profiler reports every allocation, also within an operation.
"""
import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from attention import PackedLayout, alibi_bias, causal_mask
from checkpoint.read_config import model_config
from fast.fused_block import fuse_blocks
from lora import attach_lora, trainable
from losses import cross_entropy_sum
from model import CausalLM
from runtime.kernels import Kernels, use_long_rows
from runtime.memory import Workload, memory_plan
from settings.config import Config
from tests.common import some
from tests.test_memory import ALL, BF16, F32
from tests.tiny_models import SMALL_LLAMA

SCRATCH = 3 * 2**19     # bytes of SDPA's own flash kernel on a CPU, whatever the length; one thread


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()                 # collections need not look through what other tests left
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def allocated(call):
    """(what the call returns, bytes that are still allocated after it, bytes at its peak)."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
        gc.collect()                        # what torch 2.4's first checkpoint leaves in circles
    now = peak = 0
    events = [event for event in record.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, now, peak


def measured(work: Workload):
    """Bytes of a step of the workload: (kept after the forward pass, at the peak)."""
    torch.manual_seed(0)
    model = CausalLM(work.model_config)
    for p in model.parameters():
        torch.nn.init.normal_(p.data, 0, 0.02)
    attach_lora(model.to(work.dtype), work.lora)
    model.kernel = work.kernel
    fuse_blocks(model, F.linear if work.fast else None, work.recompute)
    use_long_rows(model.train(), Kernels(fuse=fuse_blocks), work)
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)        # as in the second micro-batch
    lengths = [n for row in work.rows for n in row]
    layout = PackedLayout(lengths)
    ids = torch.randint(work.model_config.vocab_size, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]

    def forward():
        return cross_entropy_sum(model(ids, positions, layout)[0], model.head_weight(), ids[0])

    loss, kept, in_forward = allocated(forward)
    _, _, in_backward = allocated(loss.backward)
    return kept, max(in_forward, kept + in_backward)


def check(sizes, kernel, rows, dtype, level="block", tile=0, fast=True):
    workload = Workload(sizes, ALL, [[n] for n in rows], dtype, kernel, "cpu", fast=fast,
                        recompute=[level] * sizes.num_hidden_layers, mlp_tile=tile)
    plan = memory_plan(Config(), workload)
    kept, peak = measured(plan.workload)
    scratch = SCRATCH if kernel == "sdpa-flash" else 0
    assert plan.activations == pytest.approx(kept, rel=0.1)
    assert plan.activations + plan.working == pytest.approx(peak, rel=0.1, abs=scratch)


def wide(heads, kv_heads, **changes):
    return model_config({**SMALL_LLAMA, "num_hidden_layers": 2, "num_attention_heads": heads,
                         "num_key_value_heads": kv_heads, "head_dim": 16, "vocab_size": 130,
                         "max_position_embeddings": 4096, **changes})


WAYS = (("none", 0, True), ("block", 0, True), ("block", 64, True), ("block", 0, False))


@pytest.mark.parametrize("level, tile, fast", some(WAYS))
@pytest.mark.parametrize("heads, kv_heads, window, rows", [
    (8, 2, 50, (900,)), (4, 4, 500, (700,)), (2, 1, 50, (900, 820)), (4, 4, 900, (800, 200))])
def test_masks_of_windows(heads, kv_heads, window, rows, level, tile, fast):
    """A bool for each pair beside the mask as numbers; none where the window is longer."""
    sizes = wide(heads, kv_heads, model_type="mistral", sliding_window=window)
    check(sizes, "sdpa-flash", rows, BF16 if fast else F32, level, tile, fast)


@pytest.mark.parametrize("level, tile, fast", some(WAYS))
@pytest.mark.parametrize("kernel, heads, kv_heads, window, rows", [
    ("sdpa-math", 8, 2, None, (400,)), ("sdpa-math", 2, 1, None, (800,)),
    ("sdpa-math", 4, 4, None, (450, 150, 420)), ("sdpa-math", 4, 2, 50, (450,)),
    ("plain", 2, 1, None, (800,)), ("plain", 4, 2, 50, (450,))])
def test_scores_in_the_backward_pass(kernel, heads, kv_heads, window, rows, level, tile, fast):
    """MATH holds softmax, its gradient and that of the scores at once; 0.4 of it was planned."""
    sizes = wide(heads, kv_heads)
    if window:
        sizes = wide(heads, kv_heads, model_type="mistral", sliding_window=window)
    check(sizes, kernel, rows, F32 if fast else BF16, level, tile, fast)


@pytest.mark.parametrize("kernel", ("sdpa-flash", "sdpa-math"))
@pytest.mark.parametrize("rows", ((500,), (900, 880)))
def test_masks_of_alibi(rows, kernel):
    """One for each head, shared by the sequences of a call."""
    for dtype in (F32, BF16):
        check(replace(wide(8, 8), alibi=True), kernel, rows, dtype)


def test_a_mask_takes_two_bytes_for_each_pair():
    """Differences of positions took 8 beside it; the values are those of the definition."""
    mask, kept, peak = allocated(lambda: causal_mask(700, 1000, 64, "cpu"))
    assert kept == 700 * 1000 and peak < 2.1 * kept
    distance = torch.arange(1000) - torch.arange(300, 1000)[:, None]
    assert mask.equal((distance <= 0) & (distance > -64))
    assert causal_mask(7, 9, None, "cpu").equal(torch.ones(7, 9, dtype=torch.bool).tril(2))
    slopes = torch.tensor([0.5, 0.3, 2**-8])
    assert alibi_bias(slopes, 700, 1000).equal(slopes[:, None, None] * distance)
