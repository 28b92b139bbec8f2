"""Try torch's own tensor-parallel and pipelining engines on what this program needs of them.

    torchrun --standalone --nproc-per-node 2 bench/torch_engines.py
    (python bench/torch_engines.py alone has no second process)

Two CPU processes. Each question is answered in a line: does a frozen weight stay frozen when it is
cut, does an adapter beside it give the gradients of one process, and may micro-batches have
different lengths. docs/many_gpus.md keeps the answers, by the torch they are of.

Requires: nothing of this program.
Next: scale/tensor_parallel.py, scale/stage_messages.py, which do it by hand.
Sources: torch.distributed.tensor.parallel, torch.distributed.pipelining.
"""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import (ColwiseParallel, RowwiseParallel,
                                               parallelize_module)

try:
    from torch.distributed.tensor.debug import CommDebugMode
except ImportError:                                 # torch 2.4
    from torch.distributed._tensor.debug import CommDebugMode

WIDTH = 8
LENGTHS = (5, 7)            # tokens of two micro-batches


class Adapted(nn.Module):
    """A frozen linear layer and an adapter of rank 2."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__()
        self.base_layer = nn.Linear(size_in, size_out, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(size_in, 2, bias=False)
        self.lora_B = nn.Linear(2, size_out, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def two_layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"up": Adapted(WIDTH, 2 * WIDTH), "down": Adapted(2 * WIDTH, WIDTH)})


def loss_of(model, x):
    return (model["down"](model["up"](x)) ** 2).sum()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def frozen_weights_stay_frozen(rank: int) -> str:
    """Weights cut by parallelize_module, of which the base's must not ask for a gradient."""
    model = parallelize_module(two_layers(), init_device_mesh("cpu", (2,)), {
        "up.base_layer": ColwiseParallel(), "down.base_layer": RowwiseParallel()})
    asking = [name for name, p in model.named_parameters()
              if "base_layer" in name and p.requires_grad]
    return f"no: {', '.join(asking)} ask for gradients" if asking else "yes"


def adapters_have_gradients_of_one_process(rank: int) -> str:
    """up: A whole, B cut; down: A cut, B whole.

    By hand a pass has a sum forward and one backward, of base and adapters together; the gradients
    of what is whole are summed once a step.
    """
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    single = two_layers()
    loss_of(single, x).backward()
    model = parallelize_module(two_layers(), init_device_mesh("cpu", (2,)), {
        "up.base_layer": ColwiseParallel(), "up.lora_B": ColwiseParallel(),
        "down.base_layer": RowwiseParallel(), "down.lora_A": RowwiseParallel()})
    with CommDebugMode() as counted:
        loss_of(model, x).backward()
    worst = max(float((whole(p.grad) - q.grad).abs().max() / q.grad.abs().max())
                for p, q in zip(model.parameters(), single.parameters())
                if q.grad is not None)
    if worst >= 1e-5:
        return f"no: one differs by {worst:.2g} of its largest number"
    return f"yes, with {counted.get_total_counts()} collectives a pass; by hand 2"


def micro_batches_may_differ_in_length(rank: int) -> str:
    """1F1B over two stages, with micro-batches of LENGTHS tokens. torch 2.13 aborts a process."""
    layers = two_layers()
    layer = layers["up"] if rank == 0 else layers["down"]
    batches = [(torch.randn(1, n, WIDTH),) for n in LENGTHS]
    shape_of = torch.randn(1, LENGTHS[0], WIDTH if rank == 0 else 2 * WIDTH)
    stage = PipelineStage(layer, rank, 2, torch.device("cpu"), input_args=(shape_of,))
    schedule = Schedule1F1B(stage, len(LENGTHS), loss_fn=lambda out, target: (out ** 2).sum())
    if rank == 0:
        schedule._step_microbatches(arg_mbs=batches)
    else:
        losses = []
        schedule._step_microbatches(target_mbs=[torch.zeros(())] * 2, losses=losses)
    dist.barrier()
    return "yes"


QUESTIONS = (frozen_weights_stay_frozen, adapters_have_gradients_of_one_process,
             micro_batches_may_differ_in_length)


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank = dist.get_rank()
    if rank == 0:
        print(f"torch {torch.__version__}")
    for question in QUESTIONS:      # the last one may leave the processes out of step
        try:
            answer = question(rank)
        except Exception as error:
            answer = f"no: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        print(f"process {rank}: {question.__name__}: {answer}", flush=True)
    os._exit(0)                     # gloo's threads may still wait for a message


if __name__ == "__main__":
    sys.exit(main())
