"""Share the layers of a model out to the stages of a pipeline, and plan for one stage.

    stages = share_layers(model, lengths, 4)        # [range(0, 9), range(9, 18), …]
    model_of_stage(model, stages, 0)                # what the first stage holds, for memory plans

The slowest stage sets the pace, so the layers are shared out by their FLOPs, counted as in
runtime/throughput.py: 2 forward for each weight and token, 2 for the gradient of the input, and 2
for that of a trained weight; below the first trained weight a layer has a forward pass alone. The
head belongs to the last stage, and weighs as much as several layers of a small model.

Requires: runtime/throughput.py, runtime/activations.py.
Next: runtime/setup.py, scale/pipeline_parallel.py.
Papers: arXiv:2104.04473 (sec. 2.2).
"""
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

from model import CausalLM
from runtime.activations import first_block_with_gradient
from runtime.throughput import attention_pairs, matmul_parameters


def share_layers(model: CausalLM, lengths: Sequence[int], stages: int) -> list[range]:
    """The layers of each stage, so that the slowest stage is as fast as it can be.

    Of several such ways, the one with fewer layers in the first stages, which have more
    micro-batches in flight. model: with its adapters, without storage. lengths: tokens of a
    micro-batch's sequences. Raises ValueError for more stages than layers.
    """
    layers = len(model.model.layers)
    if stages > layers:
        raise ValueError(f"pipeline_parallel_size: {stages} is more than this model's {layers} "
                         f"layers, of which each process holds at least one. Take at most {layers}")
    *blocks, head = flops_of_parts(model, lengths)
    until = [0.0, *accumulate(blocks)]

    # slowest[n][end]: the least FLOPs of the slowest of n stages that hold the layers before `end`
    slowest = [[0.0] + [float("inf")] * layers]
    starts = []
    for stage in range(stages):
        extra = head if stage == stages - 1 else 0.0
        row, begin = [float("inf")] * (layers + 1), [0] * (layers + 1)
        for end in range(stage + 1, layers + 1):
            row[end], begin[end] = min((max(slowest[-1][start], until[end] - until[start] + extra),
                                        start) for start in range(stage, end))
        slowest.append(row)
        starts.append(begin)

    found = []
    end = layers
    for begin in reversed(starts):
        found.insert(0, range(begin[end], end))
        end = begin[end]
    return found


def flops_of_parts(model: CausalLM, lengths: Sequence[int]) -> list[float]:
    """FLOPs of a micro-batch in a training step: of each layer, and of the head."""
    config = model.config
    first = first_block_with_gradient(model)
    flops = []
    for layer in range(len(model.model.layers)):
        frozen, trained = matmul_parameters(model, f"model.layers.{layer}.")
        pairs = 0
        if config.attends(layer):
            pairs = sum(attention_pairs(n, config.windows[layer] or 0, config.chunks[layer] or 0)
                        for n in lengths)
        attention = 4 * config.num_attention_heads * config.head_dim * pairs
        if layer < first:
            flops.append(2 * frozen * sum(lengths) + attention)
        else:
            flops.append((4 * frozen + 6 * trained) * sum(lengths) + 3 * attention)
    frozen, trained = matmul_parameters(model, "lm_head.")
    return [*flops, (4 * frozen + 6 * trained) * sum(lengths)]


def model_of_stage(model: CausalLM, stages: list[range], stage: int) -> CausalLM:
    """What a stage holds of a model without storage, changed in place, for memory plans.

    A later stage's embedding has no rows; it asks for a gradient where one is sent back.
    """
    layers = stages[stage]
    before = [*model.model.embed_tokens.parameters(),
              *model.model.layers[:layers.start].parameters()]
    sends_back = any(p.requires_grad for p in before)
    is_last = stage == len(stages) - 1
    slices = {name: getattr(model.config, name)[layers.start:layers.stop]
              for name in ("mixers", "windows", "chunks", "use_rope", "sparse")}
    model.config = replace(model.config, num_hidden_layers=len(layers), **slices)
    model.model.layers = model.model.layers[layers.start:layers.stop]
    embedding = model.model.embed_tokens.weight
    if not is_last:
        model.model.norm = nn.Identity()
        model.lm_head = without_rows(embedding, trained=False)
    if stage > 0:
        model.model.embed_tokens = without_rows(embedding, trained=sends_back)
    return model


def without_rows(weight: torch.Tensor, trained: bool) -> nn.Module:
    """An embedding or head of which this stage holds nothing."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty_like(weight[:0], device="meta"), trained)
    return module


def in_flight(stages: int, stage: int, micro_batches: int) -> int:
    """The most micro-batches between their forward and their backward pass: see 1F1B in
    scale/stage_gradients.py.
    """
    return min(stages - stage, micro_batches)
