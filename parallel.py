"""Several processes, one training: every rank computes micro-batches of its own, and gradients are summed once a step.

    torchrun --nproc-per-node 2 train.py --config configs/tiny_lora_sft.yaml

With N ranks, a step goes like this:

    1. each rank counts the supervised tokens of its micro-batches; the counts are summed over the ranks (Ranks.total)
    2. forward and backward: each loss is divided by that sum, and gradients add up in flat buffers (Gradients)
    3. the buffers are summed over the ranks (all-reduce), each as soon as the last backward pass has filled it
    4. all ranks take the same optimizer step with the same numbers, so the weights stay equal without being sent

Nothing is sent for frozen weights. With one process all of this does nothing, and the loop reads the same.

Read before: train.py (the loop). Read after: losses.py (why sums over a known count).
Papers: data-parallel training in buckets, arXiv:2006.15704.
"""
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

START_LIMIT = 60                # seconds for the first word between all ranks
BUCKET_BYTES = 32 * 2**20       # of gradients sent at once: large enough to be fast, small enough to be sent early

CAUSES = """  - hosts that cannot reach each other: a firewall, or the wrong network card (GLOO_SOCKET_IFNAME,
    NCCL_SOCKET_IFNAME)
  - another --nnodes, --rdzv-endpoint or code version on one of the hosts
  - fewer cards visible than --nproc-per-node (CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES)
  - cards that cannot talk directly: try NCCL_P2P_DISABLE=1 (on ROCm, too), NCCL_DEBUG=INFO shows more"""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is. `local_rank` counts those of this host."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Is this the rank that prints and writes?"""
        return self.rank == 0

    def total(self, *numbers) -> list[float]:
        """Each number summed over the ranks; the very same floats on all of them, so all decide alike."""
        if self.world == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def read(self, loss, grad_norm, stops: bool, seen: dict) -> tuple[float, float, float, dict]:
        """The loss, the wishes to stop, and what else is logged ({name: tensor}), summed over the ranks, and the norm, which
        all have: tensors on the device become numbers here, together, for this is the one place of a step where the host
        waits for it."""
        loss, grad_norm, *values = torch.cat((loss[None], grad_norm.to(loss.device)[None], *seen.values())).tolist()
        loss, stops, *values = self.total(loss, stops, *values)
        return loss, grad_norm, stops, {name: values[2 * i:2 * i + 2] for i, name in enumerate(seen)}

    def from_main(self, make):
        """What make() returns on rank 0, on every rank: for what must be decided once."""
        box = [make() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def gather(self, tensor) -> list[torch.Tensor]:
        """This rank's tensor (on the CPU, of one shape everywhere) and those of the others, in the order of ranks."""
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        if self.world == 1:
            return [tensor]
        dist.all_gather(found, tensor)
        return found

    def share(self, tensors):
        """Give rank 0's values of these tensors to all, in place."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor.data, 0)

    @contextmanager
    def one_per_host_first(self):
        """The block runs on the first rank of each host, then on the others, which find what it has downloaded."""
        if self.world > 1 and self.local_rank > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.local_rank == 0:
            dist.barrier()


LEFT = []           # groups that this process was part of: kept until it ends, see end_ranks


def start_ranks(device: torch.device, timeout: float) -> Ranks:
    """Join the other processes that torchrun has started (RANK, WORLD_SIZE, LOCAL_RANK); alone, do nothing.

    timeout: seconds that a rank waits for the others in training (ddp_timeout). A first all-reduce must end within
    START_LIMIT seconds; if it does not, the process ends and names the usual causes.
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
    # torchrun's store still holds the addresses of ranks that have died and were started again: each attempt has its own
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    for where in {"cpu", device.type}:
        word = torch.ones(1, device=where)
        dist.all_reduce(word)
        assert int(word) == world, (word, world)
    watch.cancel()
    return ranks


def give_up(ranks: Ranks):
    """End this process, which waits for others in vain, with a word on why that may be."""
    if ranks.local_rank:                # the first rank of a host tells it; torchrun ends the others meanwhile
        time.sleep(10)
    print(f"error: rank {ranks.rank} of {ranks.world}, on {socket.gethostname()}, has not heard from all others within "
          f"{START_LIMIT} s. Usual causes:\n{CAUSES}", file=sys.stderr, flush=True)
    os._exit(1)


def end_ranks():
    """Leave the others, if there are any."""
    if dist.is_initialized():
        dist.barrier()
        # gloo's thread may still be letting go of the last tensors, for which it needs Python's lock. Were the group freed
        # here, this thread would hold the lock and wait for that one to end: both for ever (seen with torch 2.4)
        LEFT.append(dist.group.WORLD)
        dist.destroy_process_group()


class Bucket:
    """Gradients of some parameters in one flat buffer."""

    def __init__(self, params: list):
        self.params, self.sizes = params, [p.numel() for p in params]
        self.flat = torch.zeros(sum(self.sizes), dtype=params[0].dtype, device=params[0].device)
        self.used, self.awaited, self.work = set(), None, None

    def clear(self):
        """Zero the sums and make every parameter's gradient a part of the buffer."""
        self.flat.zero_()
        self.used, self.awaited, self.work = set(), None, None
        for p, part in zip(self.params, self.flat.split(self.sizes)):
            p.grad = part.view_as(p)

    def send(self):
        """Begin to sum the buffer over the ranks."""
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self, ranks_with: list):
        """Wait for the sum. A parameter that no rank has used has no gradient, as in a single process.

        ranks_with: for each parameter, how many ranks have used it.
        """
        self.work.wait()                                # on a GPU its stream waits, not the host
        for p, ranks in zip(self.params, ranks_with):
            if ranks == 0:
                p.grad = None


class Gradients:
    """The gradients of the trained weights, summed over the ranks once per optimizer step:

        gradients.clear()
        for each micro-batch of the step:
            if it is the last one: gradients.send_early()
            loss.backward()
        gradients.sum()

    send_early only saves time: it lets a buffer be sent while the backward pass fills the next. Ranks may have
    different numbers of micro-batches, even none.
    """

    def __init__(self, weights: list, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES):
        self.weights, self.ranks, self.buckets, self.sent = weights, ranks, [], 0
        group = []                                      # from the last layer to the first, as the backward pass goes
        for p in reversed(weights if ranks.world > 1 else []):
            if group and (sum(q.nbytes for q in group) + p.nbytes > bucket_bytes or p.dtype != group[0].dtype):
                self.buckets.append(Bucket(group))
                group = []
            group.append(p)
        self.buckets += [Bucket(group)] if group else []
        for bucket in self.buckets:
            for place, p in enumerate(bucket.params):
                p.register_post_accumulate_grad_hook(partial(self.arrive, bucket, place))

    def clear(self):
        """Forget the gradients of the step before."""
        self.sent = 0
        for p in self.weights:
            p.grad = None
        for bucket in self.buckets:
            bucket.clear()

    def forget_use(self):
        """The passes so far have kept other ranks company: what they have used does not count as used."""
        for bucket in self.buckets:
            bucket.used.clear()

    def send_early(self):
        """From here on, send each buffer when the gradients of all its parameters have arrived."""
        for bucket in self.buckets:
            bucket.awaited = set(range(len(bucket.params)))

    def arrive(self, bucket: Bucket, place: int, parameter):
        """The backward pass has added a gradient. Buffers are sent in their order: it must be the same on all ranks."""
        bucket.used.add(place)
        if bucket.awaited is not None:
            bucket.awaited.discard(place)
            while self.sent < len(self.buckets) and self.buckets[self.sent].awaited == set():
                self.buckets[self.sent].send()
                self.sent += 1

    def sum(self):
        """Send what has not been sent, and wait for all: afterwards `.grad` is the same on all ranks."""
        for bucket in self.buckets[self.sent:]:
            bucket.send()
        # told from CPU to CPU: the device need not have come to the end of the backward pass
        used = iter(self.ranks.total(*(place in bucket.used for bucket in self.buckets
                                       for place in range(len(bucket.params)))))
        for bucket in self.buckets:
            bucket.receive([next(used) for _ in bucket.params])

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients down to the norm `limit`; returns the norm they had, a scalar on their device."""
        return torch.nn.utils.clip_grad_norm_(self.weights, limit)
