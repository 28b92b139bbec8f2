"""Shard weights over the ranks (FSDP), for models that do not fit one device.

    torchrun --nproc-per-node 4 train.py --config my.yaml fsdp=full_shard

Each of N ranks holds one N-th of the rows of every weight. torch's fully_shard gathers the weights
of a block before its forward and its backward pass and frees them afterwards; embedding, last norm
and head stay gathered for a whole pass.

    LoRA                the base is sharded; adapters are small, every rank has them whole, and
                        parallel.py sums their gradients
    full fine-tuning    gradients and optimizer state are sharded like the weights: fully_shard
                        reduces a gradient when a block's backward pass ends, and each rank
                        keeps its rows
    offload             the shards lie in the CPU's memory, where the optimizer works, too

All ranks gather together, so all run equally many passes: a rank with fewer micro-batches first
runs filler batches without labels. Checkpoints are read by rows and saved one full tensor at a
time.

Requires: parallel.py.
Next: scale/shard_gradients.py.
Papers: FSDP arXiv:2304.11277, ZeRO arXiv:1910.02054.
"""
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from checkpoint.load import assign
from checkpoint.shards import is_sharded, local_tensor
from errors import bytes_in_words
from model import MoE
from parallel import Ranks, reduce_scatter

CPU_SINCE = (2, 6)              # the first torch whose fully_shard works without a GPU


# ---- the sharded model --------------------------------------------------------------------------


def shard_model(model, words: list[str], ranks: Ranks, device: torch.device):
    """Give every rank its rows of the weights of a model on the meta device, uninitialized.

    Weights that are not on the meta device, adapters and modules trained whole, stay whole. words:
    those of the key fsdp. Raises ValueError where torch cannot do it.
    """
    check_torch(ranks, device)
    fully_shard, options = fsdp_options(words, ranks, device)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for module in model.modules():
        if isinstance(module, MoE) and any(p.is_meta and p.requires_grad
                                           for p in module.experts.parameters()):
            module.visited = set()      # ranks need gradients of the same weights; tokens choose
    whole_weights = [(module, name, p) for module in model.modules()
                     for name, p in module.named_parameters(recurse=False) if not p.is_meta]
    model.runs_together = True          # see evals/loss.py
    with removed(whole_weights):
        for unit in (*model.model.layers, model):
            for name, p in list(unit.named_parameters()):
                if p.is_meta:           # materialized one block at a time
                    assign(unit, name, torch.empty_like(p, device=device), p.requires_grad)
            if unit is model:
                options["reshard_after_forward"] = False    # the loss needs the head afterwards
                if tied:
                    head = getattr(model.lm_head, "base_layer", model.lm_head)
                    head.weight = model.model.embed_tokens.weight
            check_one_dtype(unit)
            fully_shard(unit, **options)


def fsdp_options(words: list[str], ranks: Ranks, device: torch.device) -> tuple:
    """(fully_shard, its keyword arguments)."""
    try:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    except ImportError:                                                 # its older place
        from torch.distributed._composable.fsdp import CPUOffloadPolicy, fully_shard
    options = {
        "mesh": init_device_mesh(device.type, (ranks.world,)),
        "reshard_after_forward": "full_shard" in words,
    }
    if "offload" in words:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    return fully_shard, options


def check_one_dtype(unit: nn.Module):
    """Raises ValueError for a block whose weights have several dtypes."""
    dtypes = {str(p.dtype) for p in unit.parameters() if not is_sharded(p)}
    if len(dtypes) > 1:
        raise ValueError(f"fsdp: the weights are of several dtypes, {' and '.join(sorted(dtypes))},"
                         " and those of a block are gathered together: set bf16: true (or fp16: "
                         "true)")


def check_torch(ranks: Ranks, device: torch.device):
    """Raises ValueError where fully_shard does not work.

    On the CPU it came late, and averaged wrongly at first (pytorch issue 162338).
    """
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    mean = torch.zeros(1, device=device)
    if device.type != "cpu" or version >= CPU_SINCE:
        ones = torch.ones(ranks.world, device=device)
        reduce_scatter(mean, ones, op=dist.ReduceOp.AVG)
    if mean != 1:
        raise ValueError(f"fsdp on {device.type} does not work with torch {torch.__version__}: "
                         "without GPUs, take 2.13 or newer, or leave it out")


@contextmanager
def removed(parameters: list[tuple]):
    """Take parameters [(module, name, parameter)] out of their modules within the block."""
    for module, name, _ in parameters:
        delattr(module, name)
    yield
    for module, name, p in parameters:
        setattr(module, name, p)


def print_shards(model, ranks: Ranks):
    """Print what each rank holds of the weights, and what it would hold without sharding."""
    if ranks.world == 1:
        print("note: fsdp changes nothing with one rank; torchrun starts several")
        return
    held = sum(local_tensor(p).untyped_storage().nbytes() for p in model.parameters())
    on_gpu = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    held_by_rank, on_gpus = torch.stack(ranks.gather(torch.tensor([held, on_gpu]))).T.tolist()
    total = sum(p.nbytes for p in model.parameters())
    line = f"weights held by each rank: {', '.join(map(bytes_in_words, held_by_rank))} of " \
           f"{bytes_in_words(total)}"
    if on_gpu:
        line += f"; allocated on its GPU: {', '.join(map(bytes_in_words, on_gpus))}"
    print(line)
