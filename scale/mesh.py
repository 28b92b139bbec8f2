"""Lay out the processes: which of them share rows, and which share a model.

    ranks = lay_out(start_ranks(device, timeout), config, device)

With pipeline_parallel_size: 2 and tensor_parallel_size: 2, eight processes are

    process   0  1  2  3  4  5  6  7    as torchrun numbers them, host by host
    data      0  0  0  0  1  1  1  1    outermost: sends once a step, so it may cross hosts
    pipeline  0  0  1  1  0  0  1  1    sends one row of activations from stage to stage
    tensor    0  1  0  1  0  1  0  1    innermost: sends in every block, so it stays within a host

parallel.Ranks then means the data-parallel ranks, 0 and 1 here: batches are dealt over them, their
gradients are summed, and the four processes of a rank (partners) see the same rows and draw the
same random numbers. Where nothing is laid out, a rank is a process, and this file is not read.

The expert axis lies within data parallelism: each of its processes is a rank with rows of its own.
Those of the context axis share a rank's rows, each with tokens of its own (ranks_of_parts).

A further axis takes four steps:

    1. its row of AXES, which stands from the outermost to the innermost, and its key in
       settings/config.py, which `arrange` of runtime/build.py looks at, too; in OWN_ROWS, if its
       processes see different rows
    2. its file in scale/, which reads ranks.axes["its name"]: size, rank and group
    3. its line of runtime/build.py, where that file changes the finished model, and its gradients
    4. its words in `holdings`, for the start page

What the rest of the program relies on: partners hand Ranks.total the same numbers, but for losses
and metrics, which only some have (Ranks.scores); a process that writes files is Ranks.main; what
only some partners hold is marked by a Cut or a Held (checkpoint/shards.py), and saved whole.

Requires: parallel.py.
Next: scale/tensor_parallel.py, scale/pipeline_parallel.py, scale/context_parallel.py,
scale/expert_parallel.py.
Papers: the layout by what is sent how often, arXiv:2104.04473 (sec. 3).
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from families import ModelConfig
from parallel import LEFT, Ranks

# {axis: the key of its size}, from the outermost, which sends least often, to the innermost
AXES = {"expert": "expert_parallel_size", "pipeline": "pipeline_parallel_size",
        "context": "context_parallel_size", "tensor": "tensor_parallel_size"}
OWN_ROWS = ("expert",)          # axes whose processes are ranks of data parallelism
MOST_LINES = 16                 # processes that the start page lists


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh: this process is number `rank` of the `size` in `group`.

    copies: the group of the processes that hold the same part as this one.
    """
    rank: int
    size: int
    group: object
    copies: object = None


def lay_out(ranks: Ranks, config, device: torch.device) -> Ranks:
    """The ranks of data parallelism, with the axes that the config asks for.

    ranks: as torchrun started them, a rank for each process. Raises ValueError where the number of
    processes is not a multiple of the axes' product.
    """
    sizes = {name: getattr(config, key) for name, key in AXES.items() if getattr(config, key) > 1}
    if not sizes:
        return ranks
    members = math.prod(sizes.values())
    check_world(ranks.world, members, sizes)
    shape = (ranks.world // members, *sizes.values())
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", *sizes))
    data = mesh.get_group("data")
    axes = {name: Axis(mesh.get_local_rank(name), size, mesh.get_group(name), data)
            for name, size in sizes.items()}
    LEFT.extend([data, *(axis.group for axis in axes.values())])    # see parallel.end_ranks
    partners = math.prod(size for name, size in sizes.items() if name not in OWN_ROWS)
    stages = axes.get("pipeline", Axis(0, 1, None))
    return replace(ranks, rank=ranks.rank // partners, world=ranks.world // partners,
                   partners=partners, partner=ranks.rank % partners,
                   group=None if partners == 1 else data, axes=axes,
                   scores=stages.rank == stages.size - 1, scorers=partners // stages.size)


def check_world(world: int, members: int, sizes: dict[str, int]):
    """Raises ValueError unless `members`, the product of the sizes, divides the processes."""
    if world % members == 0:
        return
    keys = " x ".join(f"{AXES[name]}: {size}" for name, size in sizes.items())
    if world == 1:
        raise ValueError(f"{keys} takes {members} processes or a multiple of them, and this is "
                         f"one: torchrun --standalone --nproc-per-node {members} train.py …")
    fitting = [n for n in range(1, world + 1) if world % n == 0]
    raise ValueError(f"{keys} does not divide the {world} processes that torchrun started. Start a "
                     f"multiple of {members}; {world} processes can be cut into "
                     f"{' or '.join(map(str, fitting))}")


def ranks_of_parts(ranks: Ranks) -> Ranks:
    """The ranks for gradients: each process of the context axis is one, with tokens of its own."""
    parts = ranks.axes["context"]
    others = {name: axis for name, axis in ranks.axes.items() if name != "context"}
    found = replace(ranks, rank=ranks.rank * parts.size + parts.rank,
                    world=ranks.world * parts.size, partners=ranks.partners // parts.size,
                    partner=0, group=None, axes=others)
    if not others:
        return found
    dim = 1 + list(ranks.axes).index("context")
    mesh = torch.arange(ranks.processes).view(-1, *(axis.size for axis in ranks.axes.values()))
    alike = mesh.movedim((0, dim), (-2, -1)).reshape(-1, found.world)
    group, _ = dist.new_subgroups_by_enumeration(alike.tolist())
    LEFT.append(group)                                  # see parallel.end_ranks
    column = (alike == ranks.process).any(1).nonzero().item()
    return replace(found, group=group, partner=column)


# ---- what each process holds --------------------------------------------------------------------


def mesh_lines(ranks: Ranks, config: ModelConfig, vocabulary: bool,
               stages: list[range]) -> list[str]:
    """The mesh as a page of text: which process trains on which rows, with which part of the model.

    config: of the whole model. vocabulary: whether embedding and head are cut, too. stages: the
    layers of each stage of a pipeline.
    """
    sizes = {name: axis.size for name, axis in ranks.axes.items()}
    data = ranks.processes // math.prod(sizes.values())
    shape = " x ".join([f"{data} data", *(f"{size} {name}" for name, size in sizes.items())])
    page = [f"mesh: {ranks.processes} processes = {shape}"]
    for process in range(min(ranks.processes, MOST_LINES)):
        page.append(f"  process {process:<3} rows of rank {process // ranks.partners} of "
                    f"{ranks.world}; "
                    + holdings(places_of(process, ranks.axes), config, vocabulary, stages))
    if ranks.processes > MOST_LINES:
        page.append(f"  and so on, {ranks.processes - MOST_LINES} more")
    return page


def places_of(process: int, axes: dict[str, Axis]) -> dict[str, tuple[int, int]]:
    """{axis: (number, size)} of a process; the last axis is the innermost."""
    places = {}
    for name, axis in reversed(axes.items()):
        process, number = divmod(process, axis.size)
        places[name] = number, axis.size
    return places


def holdings(places: dict, config: ModelConfig, vocabulary: bool, stages: list[range]) -> str:
    """What a process has of each row and holds of the model, in words. places: of places_of."""
    words = []
    if "context" in places:
        part, parts = places["context"]
        words.append(f"part {part + 1} of {parts} of each row")
    if places.keys() == {"context"}:
        words.append("the whole model")
    if "expert" in places:
        words.append(f"experts {numbers(*places['expert'], config.num_experts)} of each layer, and "
                     "all else")
    if "pipeline" in places:
        words += layers_in_words(places["pipeline"][0], stages)
    if "tensor" in places:
        place = places["tensor"]
        words += [f"query heads {numbers(*place, config.num_attention_heads)}",
                  f"key/value heads {numbers(*place, config.num_key_value_heads)}",
                  f"MLP columns {numbers(*place, config.intermediate_size)}",
                  f"token ids {numbers(*place, config.vocab_size)}" if vocabulary
                  else "all token ids"]
    return ", ".join(words)


def numbers(part: int, parts: int, whole: int) -> str:
    """The numbers below `whole` that a part has, as 4-7, or 4."""
    start, end = part * whole // parts, (part + 1) * whole // parts
    return f"{start}-{end - 1}" if end > start + 1 else f"{start}"


def layers_in_words(stage: int, stages: list[range]) -> list[str]:
    """What a stage of a pipeline holds."""
    layers = stages[stage]
    words = [f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"]
    if stage == 0:
        words.insert(0, "embedding")
    if stage == len(stages) - 1:
        words.append("norm and head")
    return words
