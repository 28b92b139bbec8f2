"""Block inputs kept in main memory while a GPU trains on long rows.

    offload_inputs(model, 30)       of the first 30 blocks, in place, after fuse_blocks

With activation checkpointing a block keeps its input alone, D numbers a token. Here that goes to
page-locked memory on a stream of its own, while the next blocks compute, and comes back while the
block after it is in its backward pass. The twin is the checkpointed block, which keeps its input
where it is.

The newest IN_FLIGHT inputs are on the device, and no others. Memory of the device is given back
only after the computing stream waited for the copy that reads or writes it.

On a CPU inputs are copied into other tensors, which saves nothing, but shows that it is right.

Requires: model.py, fast/fused_block.py (level "block").
Next: fast/tiled_mlp.py, runtime/memory.py (bytes on both sides).
Papers: recomputation, arXiv:1604.06174.
"""
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks

from model import Block, CausalLM, ForwardContext

IN_FLIGHT = 2           # inputs on the device: one is read, one is on its way
# bytes; page-locked memory comes in powers of two, so that a whole input could waste almost half
PIECE = 2**24


def offload_inputs(model: CausalLM, count: int):
    """Keep the inputs of the first `count` blocks, all checkpointed, in main memory."""
    store = HostStore()
    for block in model.model.layers[:count]:
        block.forward = partial(offloaded_forward, block, block.forward, store)


def offloaded_forward(block: Block, forward: Callable, store: "HostStore", x, ctx: ForwardContext):
    """A checkpointed block's forward; what it keeps, its input, is handed to the store."""
    gradient = x.requires_grad or any(p.requires_grad for p in block.parameters())
    if not (torch.is_grad_enabled() and gradient):
        return forward(x, ctx)

    def keep(tensor):
        return store.put(tensor) if tensor.numel() else tensor      # torch keeps an empty one, too

    def read(kept):
        return store.get(kept) if isinstance(kept, Offloaded) else kept

    with saved_tensors_hooks(keep, read):
        return forward(x, ctx)


class Offloaded:
    """An input in main memory, and on the device before it has left or after it came back."""

    def __init__(self, x, free: list):
        self.x = x.detach().contiguous()
        self.shape = x.shape
        self.dtype = x.dtype
        self.device = x.device
        self.free = free                # pieces go back there at the end
        self.pieces = []
        self.copied = None              # event: the copy that began last is done

    def take(self):
        """The tensor on the device, which is not held any longer."""
        x = self.x
        self.x = None
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        return x

    def __del__(self):
        if self.x is not None:
            self.take()
        self.free += self.pieces


class HostStore:
    """Inputs of blocks in main memory; they are read in the reverse order.

    A graph that is dropped without a backward pass gives its memory back.
    """

    def __init__(self):
        self.free = []                  # pieces of main memory, to be used again
        self.inputs = []                # weak references to Offloaded, not read yet, the last first
        self.stream = None

    def put(self, x) -> Offloaded:
        """Begin to copy an input to main memory."""
        self.inputs = [ref for ref in self.inputs if ref() is not None]
        for ref in self.inputs[IN_FLIGHT - 1:]:
            if ref().x is not None:
                ref().take()
        kept = Offloaded(x, self.free)
        kept.pieces = [self.piece(x.device) for _ in range(-(-x.nbytes // PIECE))]
        self.copy(kept, out=True)
        self.inputs.insert(0, weakref.ref(kept))
        return kept

    def get(self, kept: Offloaded):
        """An input on the device; the one that is read after it is fetched meanwhile."""
        if kept.x is None:
            self.fetch(kept)
        x = kept.take()
        self.inputs = [ref for ref in self.inputs if ref() not in (None, kept)]
        following = self.inputs[0]() if self.inputs else None
        if following is not None and following.x is None:
            self.fetch(following)
        return x

    def fetch(self, kept: Offloaded):
        """Begin to copy an input back to the device."""
        kept.x = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
        self.copy(kept, out=False)

    def piece(self, device: torch.device):
        """PIECE bytes of main memory, page-locked beside a GPU."""
        if self.free:
            return self.free.pop()
        return torch.empty(PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def copy(self, kept: Offloaded, out: bool):
        """Copy an input to its pieces (out) or back, on the stream of the copies."""
        parts = kept.x.view(-1).view(torch.uint8).split(PIECE)
        with self.beside_computing(kept.device):
            for part, piece in zip(parts, kept.pieces, strict=True):
                piece = piece[:len(part)]
                source, target = (part, piece) if out else (piece, part)
                target.copy_(source, non_blocking=True)
            if self.stream is not None:
                kept.copied = self.stream.record_event()

    def beside_computing(self, device: torch.device):
        """The stream of the copies, which begin after all that is computed until now."""
        if device.type != "cuda":
            return nullcontext()
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.stream)
