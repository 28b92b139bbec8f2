"""Keep the optimizer state in main memory or in a file; the device holds a window of it in a step.

    offload_state(optimizer, names, device)                 in main memory, page-locked beside a GPU
    offload_state(optimizer, names, device, file)           in a memory-mapped safetensors file

AdamW has 8 bytes of state a weight, which a step reads and writes once. A step takes the parameters
in windows of WINDOW bytes of state: their state is sent to the device, they are updated there by
the optimizer's own rule, and the state is sent back. So the numbers are those without offloading.

On a CPU the state in main memory is only moved to one place. The file's pages are the system's
cache: what does not fit main memory is on the disk. The file holds the names of a checkpoint's
optimizer.safetensors; it is of no use after the run, which removes it.

Requires: optim.py (UpdateRule).
Next: scale/zero.py, runtime/build.py, runtime/memory.py.
Papers: ZeRO-Offload arXiv:2101.06840, ZeRO-Infinity arXiv:2104.07857.
"""
import errno
import json
import os
import shutil
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

import torch

from checkpoint.files import CODES
from errors import bytes_in_words
from optim import Optimizer, UpdateRule

WINDOW = 64 * 2**20         # bytes of state on the device at a time; a larger parameter comes alone


def offload_state(optimizer: Optimizer, names: list[str], device: torch.device,
                  file: Path | None = None):
    """Keep the state of an optimizer outside of the device, in place.

    names: of the parameters in the order of the optimizer's groups. file: where to; None: main
    memory.
    """
    host = HostState(optimizer, names, device, file)
    optimizer.rules = {name: UpdateRule(partial(host.init_state, rule), partial(host.update, rule),
                                        rule.state_bytes)
                       for name, rule in optimizer.rules.items()}
    optimizer.put = host.put
    optimizer.close = host.close


class HostState:
    """The state of all parameters in one buffer: see the top of this file.

    tensors: {(parameter, field): its part of the buffer}, made when the first one is needed.
    """

    def __init__(self, optimizer: Optimizer, names: list[str], device: torch.device,
                 file: Path | None):
        self.optimizer = optimizer
        self.rules = optimizer.rules
        self.names = names
        self.device = device
        self.file = file

    def init_state(self, rule: UpdateRule, p, group) -> dict:
        """UpdateRule.init_state."""
        return {field: self.tensors[p, field].copy_(value)
                for field, value in rule.init_state(p, group).items()}

    def update(self, rule: UpdateRule, params: list, states: list[dict], group: dict):
        """UpdateRule.update."""
        for window in windows(states):
            moved = [{field: send(tensor, self.device) for field, tensor in state.items()}
                     for state in states[window]]
            rule.update(params[window], moved, group)
            for state, updated in zip(states[window], moved):
                for field, tensor in updated.items():
                    if tensor is not state[field]:
                        state[field].copy_(tensor)

    def put(self, p, field: str, value: torch.Tensor):
        """Optimizer.put: set a tensor as it was saved."""
        self.optimizer.state[p][field] = self.tensors[p, field].copy_(value)

    def close(self):
        """Optimizer.close: remove the file."""
        if self.file:
            self.file.unlink(missing_ok=True)
            if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
                self.file.parent.rmdir()

    @cached_property
    def tensors(self) -> dict:
        shapes, keys = {}, {}
        params = [(p, group) for group in self.optimizer.param_groups for p in group["params"]]
        for name, (p, group) in zip(self.names, params, strict=True):
            for field, value in self.rules[group["update"]].init_state(p, group).items():
                shapes[f"{name}|{field}"] = value.shape, value.dtype
                keys[f"{name}|{field}"] = p, field
        spans = places(shapes)
        total = max((stop for _, stop in spans.values()), default=0)
        buffer = mapped(self.file, shapes, spans) if self.file else locked(total, self.device)
        return {keys[name]: buffer[slice(*span)].view(shapes[name][1]).view(shapes[name][0])
                for name, span in spans.items()}


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)


def windows(states: list[dict]) -> Iterator[slice]:
    """Neighbors whose state has at most WINDOW bytes, but at least one parameter."""
    start, size = 0, 0
    for i, state in enumerate(states):
        nbytes = sum(tensor.nbytes for tensor in state.values())
        if i > start and size + nbytes > WINDOW:
            yield slice(start, i)
            start, size = i, 0
        size += nbytes
    yield slice(start, len(states))


def places(shapes: dict) -> dict[str, tuple[int, int]]:
    """First and last (exclusive) byte of each tensor; the widest numbers come first, aligned."""
    spans, end = {}, 0
    for name in sorted(shapes, key=lambda name: -shapes[name][1].itemsize):
        shape, dtype = shapes[name]
        start, end = end, end + shape.numel() * dtype.itemsize
        spans[name] = start, end
    return spans


def locked(total: int, device: torch.device) -> torch.Tensor:
    """A buffer of main memory, page-locked where a GPU reads it, if the system allows that."""
    buffer = torch.empty(total, dtype=torch.uint8)
    if device.type == "cuda" and total:
        failed = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), total, 0))
        if failed:
            print(f"note: offload_optimizer: {bytes_in_words(total)} of main memory cannot be "
                  "page-locked; the optimizer state is sent more slowly")
    return buffer


def mapped(file: Path, shapes: dict, spans: dict) -> torch.Tensor:
    """A new safetensors file of tensors with these shapes, whose bytes are the buffer returned.

    Raises OSError if the disk has no room for it.
    """
    entries = {name: {"dtype": CODES[shapes[name][1]], "shape": list(shapes[name][0]),
                      "data_offsets": list(span)} for name, span in spans.items()}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)                         # numbers of 8 bytes start aligned
    header = len(text).to_bytes(8, "little") + text
    total = len(header) + max((stop for _, stop in spans.values()), default=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)                            # of an earlier start; maybe in use
    with open(file, "wb") as handle:
        try:                                                # a full disk must not show in a step
            os.posix_fallocate(handle.fileno(), 0, total)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            free = bytes_in_words(shutil.disk_usage(file.parent).free)
            raise OSError(
                f"offload_optimizer: nvme: the optimizer state takes {bytes_in_words(total)} of "
                f"output_dir, whose disk has {free} free; name another output_dir, or "
                "offload_optimizer: cpu") from None
        handle.write(header)
    return torch.from_file(str(file), shared=True, size=total, dtype=torch.uint8)[len(header):]
