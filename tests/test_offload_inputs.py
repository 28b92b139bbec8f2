"""fast/offload_inputs.py: block inputs in main memory change no bit, and leave the device."""
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from attention import to_device
from fast import offload_inputs as module
from fast.fused_block import fuse_blocks
from fast.offload_inputs import HostStore, Offloaded, offload_inputs
from fast.tiled_mlp import tile_mlps
from tests.common import needs_shared, some
from tests.fake_cuda import Event, Stream
from tests.rehearsal import host, rehearse
from tests.test_fused_block import loss_and_gradients, trainable_family
from tests.test_tiled_mlp import ADAPTERS, LENGTHS, adapted
from tests.tiny_models import RECORDED_MODELS

BLOCKS = ["block"] * 4


def results(model, fast=True, tile=0, count=None):
    """Of loss_and_gradients, with the inputs of `count` blocks in main memory."""
    fuse_blocks(model, F.linear if fast else None, ["block"] * len(model.model.layers))
    if tile:
        tile_mlps(model, tile)
    if count is not None:
        offload_inputs(model, count)
    torch.manual_seed(4)
    return loss_and_gradients(model, LENGTHS)


def assert_same(found, want):
    assert torch.equal(found[0], want[0]) and found[1] == want[1]
    assert found[2].keys() == want[2].keys() and want[2]
    for key, grad in want[2].items():
        assert torch.equal(found[2][key], grad), key


@pytest.mark.parametrize("tile", (0, 5), ids=("whole", "tiled"))
@pytest.mark.parametrize("fast", (True, False), ids=("fused", "plain"))
@pytest.mark.parametrize("case", some(ADAPTERS))
def test_offloaded_inputs_change_no_bit(case, fast, tile, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)              # bytes: several pieces, and a rest
    model = adapted(case)
    want = results(model, fast, tile)
    for count in (4, 2):
        assert_same(results(model, fast, tile, count), want)


@needs_shared
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("name", some(RECORDED_MODELS))
def test_offloaded_inputs_change_no_bit_in_any_family(name, trained):
    """Mixtures, too, whose routers' scores are outputs of a block."""
    model = trainable_family(name, trained)
    assert_same(results(model, count=9), results(model))


class Watched(HostStore):
    """A store that counts the inputs which are alive on the device."""

    def __init__(self):
        super().__init__()
        self.alive = weakref.WeakSet()
        self.most = self.puts = self.fetches = 0

    def seen(self, kept):
        self.alive.add(kept)
        self.most = max(self.most, sum(each.x is not None for each in self.alive))
        return kept

    def put(self, x):
        self.puts += 1
        return self.seen(super().put(x))

    def fetch(self, kept):
        self.fetches += 1
        super().fetch(kept)
        self.seen(kept)


def watched(monkeypatch):
    stores = []
    monkeypatch.setattr(module, "HostStore", lambda: stores.append(Watched()) or stores[-1])
    return stores


def test_inputs_leave_the_device_and_come_back_one_ahead(monkeypatch):
    stores = watched(monkeypatch)
    model = adapted("lora")
    results(model, count=4)
    store, = stores
    assert (store.puts, store.fetches, store.most) == (4, 2, 2)     # the newest two never left
    pieces = len(store.free)
    assert pieces == 4                      # all given back
    for _ in range(2):
        loss_and_gradients(model, LENGTHS)
    assert len(store.free) == pieces        # and used again


def test_a_graph_without_a_backward_pass_gives_its_memory_back(monkeypatch):
    stores = watched(monkeypatch)
    model = adapted("lora")
    results(model, count=4)
    hidden = model(torch.arange(20)[None])
    assert len(stores[0].free) == 0
    del hidden
    gc.collect()
    assert len(stores[0].free) == 4
    with torch.no_grad():
        model(torch.arange(20)[None])
    assert stores[0].puts == 8              # nothing is kept without gradients
    assert_same(loss_and_gradients(model, LENGTHS), results(model))


def test_two_graphs_at_once(monkeypatch):
    """As with several sums of one step, read in any order."""
    model = adapted("lora")
    grads = []
    for count in (0, 4):
        results(model, count=count)
        model.zero_grad()
        first, second = (model(torch.arange(n)[None]).square().sum() for n in (9, 20))
        first.backward()
        second.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_frozen_lower_blocks_keep_nothing(monkeypatch):
    stores = watched(monkeypatch)
    model = adapted("upper layers")         # adapters in blocks 2 and 3
    results(model, count=4)
    assert stores[0].puts == 2


# ---- beside a GPU -------------------------------------------------------------------------------


def on_gpu():
    """The model of adapted("lora") on the device that the CPU poses as."""
    model = adapted("lora")
    model.kernel = "sdpa-flash"
    return model.to("cuda")


def a_step(model, strict):
    """(loss, gradients by name, on the CPU) of a step in which nothing waits."""
    ids = to_device(torch.arange(23)[None], "cuda")
    with strict:
        loss = model(ids).square().mean()
        loss.backward()
    return float(host(loss)), {name: host(p.grad) for name, p in model.named_parameters()
                               if p.grad is not None}


@pytest.mark.parametrize("tile", (0, 5), ids=("whole", "tiled"))
def test_copies_do_not_wait_and_go_through_page_locked_memory(tile, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 4000)
    with rehearse() as record:
        steps = []
        for count in (0, 4):
            model = on_gpu()
            fuse_blocks(model, F.linear, BLOCKS)
            if tile:
                tile_mlps(model, tile)
            offload_inputs(model, count)
            record.events.clear()
            steps.append(a_step(model, record.strict()))
    assert steps[0][0] == steps[1][0]
    assert all(torch.equal(steps[1][1][name], grad) for name, grad in steps[0][1].items())
    pieces = -(-23 * model.config.hidden_size * 4 // 4000)
    ours = [event.what for event in record.planned if event.place[0] == "fast/offload_inputs.py"]
    assert ours == ["a copy from the GPU"] * 4 * pieces + ["a copy to the GPU"] * 2 * pieces


class LoggedStream(Stream):
    """A stream that writes down what it is told."""

    log = []

    def wait_stream(self, other):
        self.log.append((self, "waits for stream", other))

    def wait_event(self, event):
        self.log.append((self, "waits for event", event))

    def record_event(self, event=None):
        event = Event()
        self.log.append((self, "records", event))
        return event


def test_streams_wait_for_each_other(monkeypatch):
    """Copies wait for what is computed; memory is given back when the copy has been waited for."""
    LoggedStream.log = log = []
    computing = LoggedStream()
    with rehearse():
        monkeypatch.setattr(torch.cuda, "Stream", LoggedStream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: computing)
        take, copy = Offloaded.take, HostStore.copy
        monkeypatch.setattr(Offloaded, "take", lambda kept: log.append(("take",)) or take(kept))
        monkeypatch.setattr(HostStore, "copy", lambda *a, **k: log.append("copy") or copy(*a, **k))
        model = on_gpu()
        fuse_blocks(model, F.linear, BLOCKS)
        offload_inputs(model, 4)
        a_step(model, nullcontext())
    copies = [i for i, entry in enumerate(log) if entry == "copy"]
    assert len(copies) == 6
    copying = log[copies[0] + 1][0]
    assert copying is not computing
    for i in copies:                        # each copy: first the waiting, then the event
        assert log[i + 1] == (copying, "waits for stream", computing)
        assert log[i + 2][:2] == (copying, "records")
    taken = [i for i, entry in enumerate(log) if entry == ("take",)]
    recorded = {entry[2] for entry in log if entry[1:2] == ("records",)}
    assert len(taken) == 6                  # two given back in the forward pass, four read
    for i in taken:
        assert log[i + 1][:2] == (computing, "waits for event") and log[i + 1][2] in recorded
