"""Weights cut into parts, one for each rank (FSDP): for models that do not fit one card.

    torchrun --nproc-per-node 4 train.py --config my.yaml fsdp=full_shard

Of N ranks each holds one N-th of the rows of every weight. torch's fully_shard gathers the weights of a block when its
turn comes, in the forward and again in the backward pass, and forgets them afterwards; embedding, last norm and head
stay gathered for a whole pass.

    LoRA                the base is cut; adapters are small, every rank has them whole, and parallel.py sums their
                        gradients
    full fine-tuning    gradients and the optimizer's state are cut as the weights are: fully_shard adds up a gradient
                        over the ranks as soon as a block's backward pass has ended, and each keeps its rows
    offload             the parts lie in the CPU's memory, where the optimizer works, too

Gathering is done by all ranks together, so all take the same number of passes: those that have fewer micro-batches
first run one without labels. A checkpoint is read by rows, saving puts one tensor together at a time.

Read before: parallel.py. Read after: train.py.
Papers: FSDP arXiv:2304.11277, ZeRO arXiv:1910.02054.
"""
import math
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from checkpoint.files import open_tensors, read_rows, stored_as
from checkpoint.load import NO_ROWS, assign, check_shape, load_model, weight_files, whole
from checkpoint.show import bytes_in_words
from checkpoint.training_state import state_of
from data import IGNORE
from model import MoE
from parallel import Ranks

CPU_SINCE = (2, 6)              # the first torch whose fully_shard works without a GPU


def empty_model(folder, dtype: torch.dtype | None = None):
    """The decoder of a checkpoint on the meta device, with the dtypes that load_model would give it."""
    model = load_model(folder, skip_weights=True)
    for name, (file, stored) in weight_files(model, folder).items():
        shape, held = stored_as(file, stored)
        check_shape(shape, model.get_parameter(name).shape, file, stored)
        assign(model, name, torch.empty(shape, dtype=dtype or held, device="meta"))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def cut(model, words: list, ranks: Ranks, device: torch.device):
    """Give every rank its rows of the weights of a model on the meta device, without values, in place.

    What is there already, adapters and modules trained whole, stays whole. words: those of the key fsdp. Raises
    ValueError where torch cannot do it.
    """
    check_torch(ranks, device)
    try:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    except ImportError:                                                 # its older place
        from torch.distributed._composable.fsdp import CPUOffloadPolicy, fully_shard
    options = {"mesh": init_device_mesh(device.type, (ranks.world,)), "reshard_after_forward": "full_shard" in words}
    if "offload" in words:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    for module in model.modules():
        if isinstance(module, MoE) and any(p.is_meta and p.requires_grad for p in module.experts.parameters()):
            module.visited = set()          # ranks must have gradients of the same weights; tokens choose experts
    with set_aside([(module, name, p) for module in model.modules()
                    for name, p in module.named_parameters(recurse=False) if not p.is_meta]):
        for unit in (*model.model.layers, model):
            for name, p in list(unit.named_parameters()):
                if p.is_meta:               # whole for a moment, one block at a time
                    assign(unit, name, torch.empty_like(p, device=device), p.requires_grad)
            if unit is model:
                options["reshard_after_forward"] = False        # the loss needs the head after the forward pass
                if tied:
                    head = getattr(model.lm_head, "base_layer", model.lm_head)
                    head.weight = model.model.embed_tokens.weight
            if len(dtypes := {str(p.dtype) for p in unit.parameters() if not is_cut(p)}) > 1:
                raise ValueError(f"fsdp: the weights are of several dtypes, {' and '.join(sorted(dtypes))},"
                                 " and those of a block are gathered together: set bf16: true (or fp16: true)")
            fully_shard(unit, **options)


def check_torch(ranks: Ranks, device: torch.device):
    """Raises ValueError where fully_shard does not work: on the CPU it came late, and averaged wrongly at first
    (pytorch issue 162338)."""
    mean, old = torch.zeros(1, device=device), tuple(map(int, torch.__version__.split(".")[:2])) < CPU_SINCE
    if device.type != "cpu" or not old:
        dist.reduce_scatter_tensor(mean, torch.ones(ranks.world, device=device), op=dist.ReduceOp.AVG)
    if mean != 1:
        raise ValueError(f"fsdp on {device.type} does not work with torch {torch.__version__}: without GPUs, take 2.13 "
                         "or newer, or leave it out")


@contextmanager
def set_aside(found: list):
    """Within the block the modules lack these parameters: [(module, name, parameter)]."""
    for module, name, _ in found:
        delattr(module, name)
    yield
    for module, name, p in found:
        setattr(module, name, p)


def is_cut(p) -> bool:
    """Does this rank hold a part of the parameter?"""
    return hasattr(p, "to_local")


def mine(p) -> torch.Tensor:
    """What this rank holds of a parameter, or of its gradient: the same memory."""
    return p.detach().to_local() if is_cut(p) else p.detach()


def rows_of(p) -> slice:
    """Which rows of the whole parameter mine(p) is."""
    if not is_cut(p):
        return slice(None)
    share = -(-p.shape[0] // p.device_mesh.size())
    start = min(share * p.device_mesh.get_local_rank(), p.shape[0])
    return slice(start, start + len(mine(p)))


@torch.no_grad()
def fill(model, folder, trained: bool = True):
    """Read this rank's rows of every weight from a checkpoint folder; trained: also of those that learn."""
    files = weight_files(load_model(folder, skip_weights=True), folder)
    files.setdefault("lm_head.weight", files["model.embed_tokens.weight"])      # a head that is tied no more
    for name, p in model.named_parameters():
        name = name.replace(".base_layer.", ".")                # of a layer beside an adapter
        if name in files and (trained or not p.requires_grad):
            file, stored = files[name]
            with open_tensors(file) as tensors:
                mine(p).copy_(read_rows(tensors, stored, rows_of(p)))


class CutGradients:
    """parallel.Gradients where the trained weights are cut. `parts`, {name: this rank's rows as a plain parameter}, is
    what the optimizer works on; fully_shard has summed the gradients when the backward pass ends."""

    def __init__(self, model, weights: dict, ranks: Ranks):
        self.weights, self.ranks = weights, ranks
        self.mixtures = {name: m for name, m in model.named_modules()
                         if isinstance(m, MoE) and not m.config.stacked_experts}
        self.parts = {name: nn.Parameter(mine(p)) for name, p in weights.items()}

    def clear(self):
        """Forget the gradients of the step before."""
        for p in (*self.weights.values(), *self.parts.values()):
            p.grad = None
        self.forget_use()

    def forget_use(self):
        """The experts used so far do not count: see parallel.Gradients."""
        for mixture in self.mixtures.values():
            mixture.visited.clear()

    def send_early(self):
        """Every micro-batch sends its gradients: keeping them until the last would take the memory of the whole."""

    def sum(self):
        """Give each part its gradient: fully_shard takes the mean over the ranks, and we need the sum."""
        for name, p in self.weights.items():
            self.parts[name].data = mine(p)         # the first forward pass may have moved it
            self.parts[name].grad = mine(p.grad).mul_(self.ranks.world)
        for name, mixture in self.mixtures.items():     # an expert that no rank has used has no gradient
            used = self.ranks.total(*(number in mixture.visited for number in range(len(mixture.experts))))
            for part, p in mixture.experts.named_parameters():
                if used[int(part.partition(".")[0])] == 0:
                    self.parts[f"{name}.experts.{part}"].grad = None

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients down to the norm `limit`; returns the norm they had, a scalar on their device."""
        square = torch.nn.utils.clip_grad_norm_(self.parts.values(), math.inf).double() ** 2
        if self.ranks.world > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        for part in self.parts.values():
            if part.grad is not None:
                part.grad *= (limit / (norm + 1e-6)).clamp(max=1)
        return norm.float()

    def whole(self, name: str, tensor):
        """All rows of a tensor of the optimizer's state of that parameter; every rank must ask for it."""
        p = self.weights[name]
        return type(p).from_local(tensor, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                                  stride=p.stride()).full_tensor()


def take_part(model, optimizer, names: list, gradients: CutGradients):
    """What the other ranks do while rank 0 saves (optimizer None: weights alone): the same requests, in its order."""
    for p in model.parameters():
        whole(p)
    for name, fields in state_of(optimizer, names) if optimizer else ():
        for key, tensor in fields.items():
            if key not in NO_ROWS:
                gradients.whole(name, tensor)


def idle_batches(count: int, example, ranks: Ranks) -> list:
    """What a rank with `count` micro-batches must run besides, to keep company with that which has the most: `example`,
    a batch, without labels."""
    most = max(int(other) for other in ranks.gather(torch.tensor([count])))
    row_weights = None if example.row_weights is None else torch.zeros_like(example.row_weights)
    return [replace(example, targets=torch.full_like(example.targets, IGNORE), n_items=0, row_weights=row_weights)] * (most - count)


def print_shards(model, ranks: Ranks):
    """What each rank really holds of the weights, and what it would without sharding."""
    if ranks.world == 1:
        return print("note: fsdp changes nothing with one rank; torchrun starts several")
    held = sum(mine(p).untyped_storage().nbytes() for p in model.parameters())
    on_card = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    everyone = torch.stack(ranks.gather(torch.tensor([held, on_card]))).T.tolist()
    total = sum(p.nbytes for p in model.parameters())
    print(f"weights held by each rank: {', '.join(map(bytes_in_words, everyone[0]))} of {bytes_in_words(total)}"
          + (f"; allocated on its GPU: {', '.join(map(bytes_in_words, everyone[1]))}" if on_card else ""))
