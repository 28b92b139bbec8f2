"""Bytes of a training step whose block inputs are in main memory, or whose MLPs run in tiles.

Where fast/offload_inputs.py or fast/tiled_mlp.py is needed the plan must be close. So the peak is
sought within a block, beside the inputs on the device: where its attention is computed again, and
in the backward passes of its MLP, of its attention, and of its first norm.

    again       attention's tensors, q, k, v before rotation, o_proj's output and its adapter's;
                before that, the scores and masks that its kernel makes
    MLP         attention's tensors, the MLP's own ones, its output's gradient; in tiles its own
                ones for a tile alone, but its input, its input's gradient, and sums of the trained
                weights' gradients
    attention   attention's tensors, the gradients of q, k, v, and the stream's
    norm        its input and five intermediate results in float32, and two gradients

Requires: runtime/activations.py.
Next: runtime/memory.py.
"""
from itertools import accumulate

from torch import nn

from families import ModelConfig
from lora import AdaptedLinear
from model import Block, CausalLM, MoE
from runtime.activations import (MicroBatch, attention_bytes, backward_bytes, block_bytes,
                                 bytes_beside_blocks, dequantized_bytes, dora_bytes,
                                 first_block_with_gradient, input_bytes, input_layers, loss_bytes,
                                 low_rank_numbers, mlp_bytes, norm_bytes, rope_bytes,
                                 rounded_weight_bytes, score_peaks, uses_dora)


def long_row_bytes(model: CausalLM, batch: MicroBatch, recompute: list[str],
                   offloaded: int) -> tuple[int, int, int]:
    """(bytes kept on the device, of working memory, page-locked in main memory).

    offloaded: the inputs of so many first blocks are in main memory.
    """
    from fast.offload_inputs import IN_FLIGHT, PIECE

    first = first_block_with_gradient(model)
    stream = batch.tokens * model.config.hidden_size * batch.stream
    away = max(0, offloaded - first)                    # inputs in main memory
    in_flight = min(IN_FLIGHT, away) * stream
    dequantized = dequantized_bytes(model, batch)
    kept = []
    peaks = []
    for layer, level in enumerate(recompute[first:], first):
        block = model.model.layers[layer]
        own = stream
        if level != "block":
            own = block_bytes(block, layer, model.config, batch, "mlp" if batch.tile else level)
        peak = peak_in_block(block, layer, model.config, batch, dequantized) + stream - own
        kept.append(0 if layer < offloaded else own)
        peaks.append(peak)

    copies = rounded_weight_bytes(model, batch)
    beside = batch.tokens * bytes_beside_blocks(model, batch)
    total = sum(kept) + in_flight + beside
    total += copies * sum(level != "block" for level in recompute[first:])
    at_blocks = max(map(sum, zip(accumulate(kept), peaks)), default=0) + in_flight + copies
    at_blocks += batch.tokens * rope_bytes(model.config, batch)
    working = max(at_blocks - total, loss_bytes(model, batch) + 2 * stream)
    return total, working, away * -(-stream // PIECE) * PIECE


# ---- within a block -----------------------------------------------------------------------------


def peak_in_block(block: Block, layer: int, model_config: ModelConfig, batch: MicroBatch,
                  dequantized: int) -> int:
    """Bytes at the peak of a block that is computed again and in its backward pass, beside x.

    dequantized: bytes of a matrix in few bits while it is used.
    """
    hidden = batch.tokens * model_config.hidden_size
    attention = attention_bytes(block.mixer, layer, model_config, batch)
    after = norm_bytes(block.after_attention_norm, model_config.hidden_size, batch.compute)
    norms = after
    if not batch.fast:
        norms += norm_bytes(block.input_layernorm, model_config.hidden_size, batch.stream)
    # x is among them, or it is freed as soon as they are there
    attention += batch.tokens * norms - hidden * batch.stream
    after_gradients = hidden * (20 + batch.stream) if after else 0      # as in norm_gradient_bytes
    of_mlp = attention + mlp_peak_bytes(block, model_config, batch) + dequantized
    if block.mixer is None:
        return max(of_mlp, norm_gradient_bytes(block, model_config, batch))
    return max(
        attention + again_bytes(block, model_config, batch) + dequantized
        + dora_bytes(block.mixer),
        of_mlp,
        attention + 2 * hidden * batch.stream + dora_bytes(block),      # where it takes the norm
        attention + attention_gradient_bytes(layer, model_config, batch),
        # with x, and a gradient of the stream
        attention + 2 * hidden * batch.stream + score_peaks(layer, model_config, batch)[0],
        attention + after_gradients,
        norm_gradient_bytes(block, model_config, batch),
    )


def again_bytes(block: Block, model_config: ModelConfig, batch: MicroBatch) -> int:
    """While o_proj is computed again: q, k, v before rotation, its output and its adapter's."""
    if batch.fast:
        return 0
    H, K = model_config.num_attention_heads, model_config.num_key_value_heads
    hidden = model_config.hidden_size
    o_proj = block.mixer.o_proj
    outputs = 3 if isinstance(o_proj, AdaptedLinear) else 1
    if with_dropout(o_proj):                            # and inputs before it
        outputs += 4 if uses_dora(o_proj) else 2
    per_token = ((H + 2 * K) * model_config.head_dim + outputs * hidden) * batch.compute
    per_token += hidden * batch.stream                              # the output's gradient
    if batch.stream < 4:
        per_token += hidden * batch.stream                          # x, which is still there
    return batch.tokens * per_token


def with_dropout(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "dropout", None), nn.Dropout)


def mlp_peak_bytes(block: Block, model_config: ModelConfig, batch: MicroBatch) -> int:
    """In the backward pass of the MLP, beside what attention keeps."""
    hidden, width = model_config.hidden_size, model_config.intermediate_size
    stream = batch.tokens * hidden * batch.stream
    if block.mlp is None:
        return stream
    if isinstance(block.mlp, MoE):
        sparse = block_bytes(block, 0, model_config, batch, "none")
        sparse -= attention_bytes(block.mixer, 0, model_config, batch)
        routed = 2 * model_config.num_experts_per_tok * hidden * batch.compute
        return (sparse + stream + backward_bytes(model_config, batch, True)
                + batch.tokens * routed)
    per_token = input_bytes(hidden, input_layers(block.mlp), batch, from_stream=True)
    per_token += mlp_bytes(block.mlp, width, model_config, batch)
    gradients = 5 if batch.fast else 2                  # fast: gate, up, … are computed again
    if with_dropout(block.mlp.down_proj) and uses_dora(block.mlp.down_proj):
        gradients += 2                                  # inputs before dropout, their W x
    per_token += gradients * width * batch.compute
    per_token += norm_bytes(block.after_mlp_norm, hidden, batch.compute)
    if not batch.fast:
        per_token += norm_bytes(block.mlp_norm, hidden, batch.stream)
    if not batch.tile:
        return batch.tokens * per_token + stream                    # the output's gradient
    per_token += 3 * hidden * batch.stream                          # x, output and gradient of both
    return batch.tile * per_token + 3 * stream + summed_gradient_bytes(block)


def summed_gradient_bytes(block: Block) -> int:
    """Gradients of an MLP's trained weights: sums over the tiles, those of a tile, and one more."""
    sizes = [p.numel() * max(4, p.itemsize) for part in mlp_half(block) for p in part.parameters()
             if p.requires_grad]
    return 2 * sum(sizes) + max(sizes, default=0)


def mlp_half(block: Block) -> tuple:
    return block.mlp_norm, block.mlp, block.after_mlp_norm


def attention_gradient_bytes(layer: int, model_config: ModelConfig, batch: MicroBatch) -> int:
    """In the backward pass of attention: the gradients of q, k, v and of the residual stream.

    The output's gradient has taken the place of o_proj's input, which on a GPU is the output.
    """
    H, K = model_config.num_attention_heads, model_config.num_key_value_heads
    on_gpu = batch.device.type == "cuda"
    heads = (H + 2 * (K if on_gpu else H)) * batch.compute
    if on_gpu:
        heads += H * (batch.compute + 4)            # the kernels sum dq in float32
    per_token = heads * model_config.head_dim + model_config.hidden_size * batch.stream
    return batch.tokens * per_token + score_peaks(layer, model_config, batch)[1]


def norm_gradient_bytes(block: Block, model_config: ModelConfig, batch: MicroBatch) -> int:
    """In the backward pass of the first norm, as torch computes it in single steps."""
    if not hasattr(block.mlp_norm if block.mixer is None else block.input_layernorm, "weight"):
        return 0
    hidden = model_config.hidden_size
    in_float32 = 5 if batch.stream == 4 else 6      # the input is kept, rounded to float32
    per_token = 4 * in_float32 * hidden + hidden * (batch.compute + batch.stream)
    if batch.fast and block.mixer is not None:
        layers = input_layers(block.mixer)
        per_token += 2 * hidden * batch.compute + 2 * low_rank_numbers(layers) * batch.compute
        per_token += 2 * model_config.num_key_value_heads * model_config.head_dim * batch.compute
    elif batch.stream < 4:
        per_token -= hidden * batch.stream          # x is freed
    return batch.tokens * per_token
