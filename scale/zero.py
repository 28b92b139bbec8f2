"""Shard optimizer state and gradients over the ranks (ZeRO stages 1 and 2); weights stay whole.

    torchrun --nproc-per-node 4 train.py --config my.yaml finetuning_type=full zero_stage=2

Weights lie in flat buffers, their gradients in buffers of the same form. Each is cut into N equal
parts, and rank r updates the weights of part r, whose moments it alone holds:

    backward        gradients add up in the buffers, or are copied there (stage 2)
    reduce-scatter  rank r receives the sum of part r, instead of all sums
    step            rank r changes the weights of part r
    all-gather      all ranks receive all parts of the weights

Stage 1 has one reduce-scatter a step, stage 2 one in each backward pass; of gradients a rank then
holds its part and two buffers. A part may end within a matrix, so the update must treat each number
by itself, as AdamW does. Checkpoints are those of one process.

Requires: parallel.py.
Next: scale/fsdp.py (stage 3), scale/offload_state.py, runtime/build.py.
Paper: ZeRO arXiv:1910.02054 (sec. 5).
"""
import math
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function

from checkpoint.files import read_rows
from checkpoint.training_state import gather_state
from optim import Optimizer
from parallel import Gradients, Ranks, all_gather, clip_shards, reduce_scatter


class FlatBucket:
    """Weights of some parameters in a flat buffer of N parts, and their gradients in another.

    pieces: what lies in this rank's part of each parameter, maybe nothing, in the same memory. They
    have as many dimensions as the whole, by which optim.py chooses the weight decay. `used`,
    `awaited`: as in parallel.Bucket. part: this rank's part of the summed gradients.
    """

    def __init__(self, params: list, ranks: Ranks, stage: int):
        self.params = params
        self.stage = stage
        self.ranks = ranks
        self.sizes = [p.numel() for p in params]
        self.length = -(-sum(self.sizes) // ranks.world)        # numbers of a part
        self.weights = params[0].data.new_zeros(self.length * ranks.world)
        for p, view in zip(params, self.views(self.weights)):
            view.copy_(p.data)
            p.data = view
        self.pieces = [nn.Parameter(piece) for piece in self.pieces_of(self.my_part(self.weights))]
        self.flat = torch.zeros_like(self.weights) if stage == 1 else None
        self.part = self.my_part(self.flat) if stage == 1 else self.weights.new_zeros(self.length)
        self.work = None

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A flat buffer as tensors of the parameters' shapes; the padding at its end is left."""
        whole = flat[:sum(self.sizes)].split(self.sizes)
        return [view.view_as(p) for view, p in zip(whole, self.params)]

    def my_part(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(self.ranks.world, self.length)[self.ranks.rank]

    def span(self, index: int, rank: int) -> tuple[int, int]:
        """First and last (exclusive) number of a parameter that lie in a rank's part."""
        start = self.length * rank - sum(self.sizes[:index])    # where the part begins
        return tuple(min(max(end, 0), self.sizes[index]) for end in (start, start + self.length))

    def pieces_of(self, part: torch.Tensor) -> list[torch.Tensor]:
        """This rank's part of a flat buffer, cut at the borders of parameters."""
        spans = [self.span(index, self.ranks.rank) for index in range(len(self.params))]
        sizes = [stop - start for start, stop in spans]
        pieces = part[:sum(sizes)].split(sizes)
        return [piece.view(-1, *[1] * (p.dim() - 1)) for piece, p in zip(pieces, self.params)]

    def zero(self):
        """Zero the sums; in stage 1 gradients are views into the buffer."""
        self.used = set()
        self.awaited = None
        self.part.zero_()
        if self.stage == 1:
            self.flat.zero_()
            for p, grad in zip(self.params, self.views(self.flat)):
                p.grad = grad

    def buffer(self) -> torch.Tensor:
        if self.flat is None:
            self.flat = torch.zeros_like(self.weights)
        return self.flat

    def send(self):
        """Start to sum the buffer, of which each rank receives its part."""
        flat = self.buffer()
        self.work = reduce_scatter(self.my_part(flat), flat, async_op=True)

    def collect(self):
        """Wait for this rank's part; in stage 2 add it to those of earlier passes."""
        if self.work:
            self.work.wait()                    # on a GPU its stream waits, not the host
            self.work = None
            if self.stage == 2:
                self.part += self.my_part(self.flat)
                self.flat = None

    def receive(self, users: list[float]):
        """Give each piece its gradient, but none if no rank used the parameter."""
        self.collect()
        for piece, grad, ranks in zip(self.pieces, self.pieces_of(self.part), users):
            piece.grad = grad if ranks else None


class ZeroGradients(Gradients):
    """The interface of parallel.Gradients; `parameters` are this rank's pieces, by name."""

    def __init__(self, weights: dict, ranks: Ranks, stage: int):
        self.stage = stage
        self.make_bucket = partial(FlatBucket, ranks=ranks, stage=stage)
        super().__init__(weights, ranks)
        places = {p: (bucket, index) for bucket in self.buckets
                  for index, p in enumerate(bucket.params)}
        self.places = {name: places[p] for name, p in weights.items()}
        self.parameters = {name: bucket.pieces[i] for name, (bucket, i) in self.places.items()}

    @record_function("backward")
    def backward(self, loss: torch.Tensor, batch=None, last: bool = False):
        """Add the gradients of a batch; in stage 2 they are summed over the ranks at once."""
        if self.stage == 1:
            return super().backward(loss, batch, last)
        self.sent = 0
        super().backward(loss, batch, last=True)
        while self.sent < len(self.buckets):
            self.send_next()
        self.buckets[-1].collect()

    def arrive(self, bucket: FlatBucket, index: int, parameter: nn.Parameter):
        if self.stage == 2:         # copy the gradient of this backward pass, and free it
            bucket.views(bucket.buffer())[index].copy_(parameter.grad)
            parameter.grad = None
        super().arrive(bucket, index, parameter)

    def send_next(self):
        super().send_next()
        if self.stage == 2 and self.sent > 1:   # two buffers exist at most
            self.buckets[self.sent - 2].collect()

    @record_function("optimizer")
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to max_norm (0: never); returns their norm, on the device."""
        return clip_shards(self.parameters.values(), max_norm, self.ranks)

    @record_function("communication")
    def gather_weights(self):
        """Give all ranks the weights that each has changed."""
        for bucket in self.buckets:
            all_gather(bucket.weights, bucket.my_part(bucket.weights))

    def full_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The pieces of all ranks, of a tensor of the optimizer state, as one tensor."""
        bucket, index = self.places[name]
        full = tensor.new_empty(bucket.sizes[index])
        for rank in range(self.ranks.world):
            piece = full[slice(*bucket.span(index, rank))]
            if rank == self.ranks.rank:
                piece.copy_(tensor.flatten())
            if len(piece):
                dist.broadcast(piece, rank)
        return full.view_as(bucket.params[index])

    def state_parts(self) -> dict:
        """{name: (shape, how to read this rank's piece)}, see load_training_state."""
        return {name: (bucket.params[index].shape,
                       partial(read_numbers, span=bucket.span(index, self.ranks.rank)))
                for name, (bucket, index) in self.places.items()}

    def join_save(self, model, optimizer, names: list[str]):
        """What the other ranks do while rank 0 saves: send their pieces."""
        for _ in gather_state(optimizer, names, self.full_tensor) if optimizer else ():
            pass


def read_numbers(tensors, key: str, span: tuple[int, int]) -> torch.Tensor:
    """The numbers of a tensor in an open file from span[0] to span[1]; reads only their rows."""
    width = math.prod(tensors.get_slice(key).get_shape()[1:])       # numbers of a row
    first = span[0] // width
    rows = read_rows(tensors, key, slice(first, -(-span[1] // width)))
    return rows.flatten()[span[0] - first * width:span[1] - first * width]


class ZeroOptimizer(Optimizer):
    """An optimizer of pieces, whose step ends when all ranks have all weights."""

    def __init__(self, optimizer: Optimizer, gradients: ZeroGradients):
        super().__init__(optimizer.param_groups, optimizer.rules)
        self.gradients = gradients

    def step(self):
        super().step()
        self.gradients.gather_weights()
