"""Data parallelism by hand: gradients of all ranks are summed once per optimizer step.

    torchrun --nproc-per-node 2 train.py --config configs/tiny_lora_sft.yaml

A step with N ranks:

    1. each rank counts the supervised tokens of its micro-batches; the counts are summed over the
       ranks (Ranks.total)
    2. forward and backward: each loss is divided by that sum, gradients add up in flat buffers
       (Gradients)
    3. the buffers are all-reduced, each as soon as the last backward pass has filled it
    4. all ranks take the same optimizer step with the same numbers, so the weights stay equal
       without being sent

Nothing is sent for frozen weights. With one process all of this does nothing, and the loop reads
the same.

Requires: losses.py (why sums over a known count).
Next: train.py (the loop), scale/zero.py, scale/fsdp.py.
Papers: data-parallel training in buckets, arXiv:2006.15704.
"""
import math
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.profiler import record_function

START_LIMIT = 60                # seconds until the first all-reduce must have ended
BUCKET_BYTES = 32 * 2**20       # of gradients sent at once: large is fast, small overlaps earlier

CAUSES = """  - hosts that cannot reach each other: a firewall, or the wrong network card
    (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)
  - another --nnodes, --rdzv-endpoint or code version on one of the hosts
  - fewer cards visible than --nproc-per-node (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES)
  - cards that cannot talk directly: try NCCL_P2P_DISABLE=1 (on ROCm, too); NCCL_DEBUG=INFO
    shows more"""


@dataclass(frozen=True)
class Ranks:
    """Whose rows this process trains on: those of data-parallel rank `rank` among `world`.

    local_rank: number of this process within its host. A rank is one process, unless scale/mesh.py
    has laid out further axes: then `partners` processes train on the rows of a rank together, each
    with its part of the model. This one is number `partner` among them; `group` holds the processes
    of that number, one of each rank (None: all processes), and axes {name: scale.mesh.Axis}.
    Of the partners `scorers` have the loss, this one among them if `scores`: in a pipeline the last
    stage has it.
    """
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    partners: int = 1
    partner: int = 0
    group: object = None
    axes: dict = field(default_factory=dict)
    scores: bool = True
    scorers: int = 1

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == self.partner == 0

    @property
    def process(self) -> int:
        """The number of this process among all."""
        return self.rank * self.partners + self.partner

    @property
    def processes(self) -> int:
        """All processes of the run."""
        return self.world * self.partners

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks: the same floats everywhere, so all decide alike.

        Partners hand in the same numbers, so the sum over all processes counts each of them
        `partners` times.
        """
        if self.processes == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return (sums / self.partners).tolist()

    def total_scores(self, *numbers: float) -> list[float]:
        """Losses and metrics summed over the ranks: of the partners, those that have them count."""
        return self.total(*self.shares(numbers))

    def shares(self, numbers: Iterable[float]) -> list[float]:
        """What this process hands to `total` of losses and metrics."""
        return [n * self.partners / self.scorers if self.scores else 0.0 for n in numbers]

    @record_function("waiting")
    def sync(self, loss: torch.Tensor, grad_norm: torch.Tensor, metrics: dict,
             stop: bool) -> tuple[float, float, dict, float]:
        """(loss, gradient norm, metrics, ranks that want to stop) as numbers, over all ranks.

        Loss and metrics ({name: tensor (2,)}) are summed; the norm is the same everywhere. This is
        the one place of a step where the host waits for the device.
        """
        scalars = [loss[None], grad_norm.to(loss.device)[None], *metrics.values()]
        loss, grad_norm, *values = torch.cat(scalars).tolist()
        loss, *values = self.shares([loss, *values])
        loss, stops, *values = self.total(loss, stop, *values)
        pairs = zip(values[::2], values[1::2])
        return loss, grad_norm, {name: list(pair) for name, pair in zip(metrics, pairs)}, stops

    def from_main(self, make: Callable):
        """What make() returns on rank 0, on every rank: for decisions that must agree."""
        box = [make() if self.main else None]
        if self.processes > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def gather(self, tensor: torch.Tensor, everyone: bool = False) -> list[torch.Tensor]:
        """The tensors of all ranks, in order; they have one shape. everyone: of all processes."""
        if self.processes == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.processes)]
        dist.all_gather(found, tensor)
        return found if everyone else found[::self.partners]

    def gather_objects(self, value) -> list:
        """The values of all ranks, in order; any that pickle can write."""
        if self.processes == 1:
            return [value]
        found = [None] * self.processes
        dist.all_gather_object(found, value)
        return found[::self.partners]

    def broadcast(self, tensors: Iterable[torch.Tensor]):
        """Give rank 0's values of these tensors to all processes, in place."""
        for tensor in tensors if self.processes > 1 else ():
            dist.broadcast(tensor.data, 0)

    @contextmanager
    def one_per_host_first(self):
        """Run the block in the first process of each host, then in the others.

        These then find what the first one has downloaded or written.
        """
        if self.processes > 1 and self.local_rank > 0:
            dist.barrier()
        yield
        if self.processes > 1 and self.local_rank == 0:
            dist.barrier()


# ---- start and end ------------------------------------------------------------------------------

LEFT = []           # groups that this process has left, kept alive until it ends: see end_ranks


def start_ranks(device: torch.device, timeout: float) -> Ranks:
    """Join the processes that torchrun has started (RANK, WORLD_SIZE, LOCAL_RANK), if any.

    timeout: seconds that a rank waits for the others in training (ddp_timeout). A first all-reduce
    must end within START_LIMIT seconds, else the process ends and names the usual causes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ["LOCAL_RANK"]))
    watch = threading.Timer(START_LIMIT, give_up, [ranks])
    watch.daemon = True
    watch.start()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=min(timeout, 10**7))
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    # torchrun's store still holds the addresses of ranks that died: each attempt has its own prefix
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    for where in {"cpu", device.type}:
        one = torch.ones(1, device=where)
        dist.all_reduce(one)
        assert int(one) == world, (one, world)
    watch.cancel()
    return ranks


def give_up(ranks: Ranks):
    """End this process, which cannot reach the others, and print the usual causes."""
    if ranks.local_rank:                # the first rank of a host prints; torchrun ends the others
        time.sleep(10)
    print(f"error: rank {ranks.rank} of {ranks.world}, on {socket.gethostname()}, has not heard "
          f"from all others within {START_LIMIT} s. Usual causes:\n{CAUSES}",
          file=sys.stderr, flush=True)
    os._exit(1)


def end_ranks():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.barrier()
        # gloo's thread may still release the last tensors, for which it needs Python's lock. If the
        # group were freed here, this thread would hold the lock and wait for gloo's: a deadlock
        # (seen with torch 2.4)
        LEFT.append(dist.group.WORLD)
        dist.destroy_process_group()


@torch.no_grad()
def check_same_start(ranks: Ranks, weights: Iterable[torch.Tensor], rows: str):
    """Raises ValueError if ranks start from different weights or rows, as hosts may.

    weights: the ones that every process holds in full. rows: a checksum of the training rows.
    """
    if ranks.processes == 1:
        return
    total = float(sum(p.double().abs().sum() for p in weights))
    ours = torch.tensor([total, zlib.crc32(rows.encode())], dtype=torch.float64)
    found = [other.tolist() for other in ranks.gather(ours, everyone=True)]
    for what, values in zip(("trained weights", "training rows"), zip(*found)):
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks do not have the same {what}. Do all hosts have the same model, adapter "
                "and data files, and the same release of this program?")


# ---- gradients ----------------------------------------------------------------------------------


class Bucket:
    """Gradients of some parameters in one flat buffer. group: the processes that sum it."""

    def __init__(self, params: list, group=None):
        self.params = params
        self.group = group
        self.sizes = [p.numel() for p in params]
        self.flat = torch.zeros(sum(self.sizes), dtype=params[0].dtype, device=params[0].device)
        self.used = set()           # parameters with a gradient in this step, by index
        self.awaited = None         # those still missing from the last backward pass
        self.work = None            # the all-reduce in flight

    def zero(self):
        """Zero the sums, and make each parameter's gradient a view into the buffer."""
        self.flat.zero_()
        self.used = set()
        self.awaited = None
        self.work = None
        for p, grad in zip(self.params, self.flat.split(self.sizes)):
            p.grad = grad.view_as(p)

    def send(self):
        """Start to sum the buffer over the ranks."""
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def receive(self, users: list[float]):
        """Wait for the sum. A parameter that no rank used has no gradient, as in one process.

        users: for each parameter, the number of ranks that used it.
        """
        self.work.wait()                                # on a GPU its stream waits, not the host
        for p, ranks in zip(self.params, users):
            if ranks == 0:
                p.grad = None


class Gradients:
    """Gradients of the trained weights, summed over the ranks once per optimizer step.

        gradients.zero()
        for each batch of the step:
            gradients.backward(loss, batch, last=...)
        gradients.all_reduce()
        norm = gradients.clip(max_grad_norm)

    parameters: {name: parameter}. During the last backward pass each buffer is sent while the next
    one is filled (`overlap`). Ranks may have different numbers of batches, even none. The same
    interface: scale/shard_gradients.py for sharded weights, scale/zero.py for sharded optimizer
    state.
    """

    sharded = False
    make_bucket = Bucket

    def __init__(self, parameters: dict, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES,
                 overlap: bool = True):
        self.parameters = parameters
        self.weights = list(parameters.values())
        self.device = self.weights[0].device if self.weights else torch.device("cpu")
        self.ranks = ranks
        self.overlap = overlap
        self.buckets = []
        self.sent = 0                                   # buckets whose all-reduce has started
        for group in self.grouped(bucket_bytes) if ranks.world > 1 else ():
            bucket = self.make_bucket(group)
            self.buckets.append(bucket)
            for i, p in enumerate(group):
                p.register_post_accumulate_grad_hook(partial(self.arrive, bucket, i))

    def grouped(self, bucket_bytes: int) -> list[list]:
        """The weights of each bucket."""
        return split_by_bytes(self.weights, bucket_bytes)

    def zero(self):
        """Forget the gradients of the previous step."""
        self.sent = 0
        for p in self.weights:
            p.grad = None
        for bucket in self.buckets:
            bucket.zero()

    @record_function("backward")
    def backward(self, loss: torch.Tensor, batch=None, last: bool = False):
        """Add the gradients of a batch. last: whether it is the step's last one on this rank."""
        if last and self.overlap:
            for bucket in self.buckets:
                bucket.awaited = set(range(len(bucket.params)))
        loss.backward()
        if batch is not None and batch.filler:          # parameters used by a filler do not count
            for bucket in self.buckets:
                bucket.used.clear()

    def arrive(self, bucket: Bucket, index: int, parameter: torch.Tensor):
        """A gradient has been added. Buckets are sent in order, which all ranks must share."""
        bucket.used.add(index)
        if bucket.awaited is not None:
            bucket.awaited.discard(index)
            while self.sent < len(self.buckets) and self.buckets[self.sent].awaited == set():
                self.send_next()

    def send_next(self):
        """Start to sum the next bucket."""
        self.buckets[self.sent].send()
        self.sent += 1

    @record_function("communication")
    def all_reduce(self):
        """Sum over the ranks: afterwards `.grad` is the same on all of them."""
        while self.sent < len(self.buckets):
            self.send_next()
        if not self.buckets:                            # one rank
            return
        # from CPU to CPU: the device need not have finished the backward pass
        used = torch.tensor([float(index in bucket.used) for bucket in self.buckets
                             for index in range(len(bucket.params))], dtype=torch.float64)
        dist.all_reduce(used, group=self.ranks.group)
        users = iter(used.tolist())
        for bucket in self.buckets:
            bucket.receive([next(users) for _ in bucket.params])

    @record_function("optimizer")
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients down to max_norm (0: never); returns their norm, on the device."""
        return torch.nn.utils.clip_grad_norm_(self.weights, max_norm or math.inf)

    def full_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """All rows of a tensor of the optimizer state: here every rank has them."""
        return tensor

    def state_fields(self, name: str, fields: dict) -> dict:
        """The optimizer state of a weight, {field: tensor}: here every rank has it."""
        return fields

    def state_parts(self) -> dict:
        """The inverse of full_tensor, for load_training_state of checkpoint/training_state.py."""
        return {}

    def join_save(self, model, optimizer, names: list[str]):
        """What the other ranks do while rank 0 saves: here nothing."""


def reduce_scatter(part: torch.Tensor, whole: torch.Tensor, **more):
    """torch's reduce_scatter_tensor, which torch 2.13 has renamed."""
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return call(part, whole, **more)


def all_gather(whole: torch.Tensor, part: torch.Tensor):
    """torch's all_gather_into_tensor, which torch 2.13 has renamed."""
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(whole, part)


def clip_shards(shards: Iterable[torch.Tensor], max_norm: float, ranks: Ranks) -> torch.Tensor:
    """Clip gradients of which each rank holds a shard; returns the norm over all ranks.

    shards: parameters. max_norm: 0 never clips.
    """
    shards = list(shards)
    square = torch.nn.utils.clip_grad_norm_(shards, math.inf).double() ** 2
    if ranks.world > 1:
        dist.all_reduce(square)
    norm = square.sqrt()
    for p in shards:
        if p.grad is not None:
            p.grad *= ((max_norm or math.inf) / (norm + 1e-6)).clamp(max=1)
    return norm.float()


def split_by_bytes(weights: list, bucket_bytes: int) -> list[list]:
    """Groups of one dtype and at most bucket_bytes, from the last weight to the first.

    The backward pass fills them in this order.
    """
    groups = []
    size = 0
    for p in reversed(weights):
        if not groups or size + p.nbytes > bucket_bytes or p.dtype != groups[-1][0].dtype:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += p.nbytes
    return groups
