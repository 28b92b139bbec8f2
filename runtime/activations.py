"""Bytes of the activations of a training step: formulas for every kind of block and kernel.

With D, I, H, K, Dh, T as in model.py, c bytes per number in a matrix product, and trained weights
in all linear layers, a block keeps for each token

    inputs        2 x c D               of norm and q, k, v, and of norm and gate, up, which
                                        fast/fused_block.py computes again
    q, k, v       c (H + 2 K) Dh        with H for K where the kernel has no grouped heads
    attention     c H Dh + 4 H          its output, the input of o_proj, and a float32 per head
                  + (4 + c) H T         the plain kernel alone: all scores, float32 and rounded
                  + 4 H T               SDPA's MATH backend: the softmax of all scores
                  + c T                 SDPA where a window is shorter than the row: a mask
    MLP           2 c I                 gate and up
    LoRA          c r for each layer    A x
    experts       k MLPs + k c D        in place of the MLP; their outputs before they are weighted
    state mixers  4 x 7 (dk + C) nv     of layers.py, instead of attention: what reads and writes
                  + 4 dk dv nv / C      the state, pairs within chunks of C tokens, a state for each
                                        chunk (Mamba-2: 4 x 4)

and where fast/fused_block.py does not apply (adapters with dropout, weights trained in 16 bits),
also

    norms         2 x 4 D               each keeps its input in float32 (full fine-tuning: and the
                                        factor of its weight)
    MLP           2 c I                 act(gate), and its product with up, the input of down
    dropout                             each layer's own input, and the mask

What a block keeps depends on its level of activation checkpointing (arXiv:1604.06174): with "mlp"
neither gate nor up, with "block" its input alone. Full fine-tuning in 16 bits has float32 weights
and a float32 residual stream; each matrix, and the input of each, is kept once more, rounded.

Requires: model.py, lora.py, losses.py.
Next: runtime/long_rows.py (inputs in main memory, tiles), runtime/memory.py, which plans with them.

Papers: activations arXiv:2205.05198 (sec. 4).
"""
import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from attention import (PLAIN_QUERIES, SINK_FEATURES, TORCH, group_by_length, sdpa,
                       takes_grouped_heads)
from checkpoint.load import quantized_weights
from families import ModelConfig
from lora import AdaptedLinear, LoRALinear, LoRAStacked
from layers import CHUNK, ShortConvolution, StateMixer, StateSpace
from losses import chunk_rows
from model import Attention, Block, CausalLM, LayerNorm, MoE

HEAD_CHUNKS = 1.5       # float32 copies of a chunk's logits that the loss holds at once
SOFTCAP_CHUNKS = 4      # the same where the logits are capped
VARLEN = ("flash-attn", "torch-varlen")     # kernels that take sequences of any lengths


@dataclass
class MicroBatch:
    """The lengths of a micro-batch's sequences, and how it is computed."""
    lengths: list[int]              # tokens of each sequence
    compute: int                    # bytes per number in a matrix product
    stream: int                     # bytes per number between the blocks
    kernel: str                     # a name from attention.py
    device: torch.device
    fast: bool                      # fast/fused_block.py: keeps inputs, recomputes outputs
    grouped: bool = False           # fast/grouped_experts.py: all experts in one product
    tile: int = 0                   # tokens of a tile of the MLP; 0: all at once
    parts: int = 1                  # processes that share the row (scale/context_parallel.py)
    head_in_tiles: bool = False     # fast/head_in_tiles.py, for a head that is not trained

    @property
    def tokens(self) -> int:
        """Tokens of a process: of all sequences, or of its part of the row."""
        return -(-sum(self.lengths) // self.parts)


# ---- activations of the model -------------------------------------------------------------------


def activation_bytes(model: CausalLM, batch: MicroBatch, recompute: list[str]) -> tuple[int, int]:
    """(bytes kept from the forward for the backward pass, bytes of working memory).

    Working memory is the larger of the loss and of the block that the backward pass is in.
    """
    first = first_block_with_gradient(model)
    levels = recompute[first:]
    copies = rounded_weight_bytes(model, batch)         # of a block
    kept = []                                           # by each block
    at_work = []                                        # beside it, in the block's backward pass
    gradients = block_gradient_bytes(model, batch, first)
    for layer, level in enumerate(levels, first):
        block = model.model.layers[layer]
        everything = block_bytes(block, layer, model.config, batch, "none")
        if level == "block":
            kept.append(batch.tokens * model.config.hidden_size * batch.stream)
            own = -copies
        else:
            own = block_bytes(block, layer, model.config, batch, level)
            kept.append(own)
        in_attention = attention_peak_bytes(block, layer, model.config, batch)
        at_work.append(max(everything + gradients[layer - first], in_attention) - own)

    # in the backward pass, the blocks after the current one have freed what they kept
    peak = max(map(sum, zip(accumulate(kept), at_work)), default=0)
    working = peak - sum(kept) + dequantized_bytes(model, batch)
    with_copies = sum(level != "block" for level in levels)
    kept_beside = batch.tokens * bytes_beside_blocks(model, batch)
    return (sum(kept) + with_copies * copies + kept_beside,
            max(loss_bytes(model, batch), working))


def first_block_with_gradient(model: CausalLM) -> int:
    """Number of the first block that gradients reach: blocks before it keep nothing."""
    layers = model.model.layers
    parts = (model.model.embed_tokens, *layers, model.model.norm)
    for number, module in enumerate(parts):
        if any(p.requires_grad for p in module.parameters()):
            return max(number - 1, 0)
    return len(layers)


def rounded_weight_bytes(model: CausalLM, batch: MicroBatch) -> int:
    """Bytes of the rounded copies of a block's trained matrices and biases, on average."""
    if batch.compute >= 4:
        return 0
    numbers = 0
    for block in model.model.layers:
        for name, p in block.named_parameters():
            if p.requires_grad and (p.dim() > 1 or name.endswith("bias")):
                numbers += p.numel()
    return numbers * batch.compute // len(model.model.layers)


def bytes_beside_blocks(model: CausalLM, batch: MicroBatch) -> int:
    """For each token: the rotary embedding, and the last norm with the gradient that enters it."""
    hidden = model.config.hidden_size
    norm = norm_bytes(model.model.norm, hidden, batch.stream) + hidden * batch.stream
    return rope_bytes(model.config, batch) + norm


def rope_bytes(model_config: ModelConfig, batch: MicroBatch) -> int:
    """For each token: cos and sin of the rotary embedding."""
    if model_config.alibi:
        return 0
    features = model_config.rotated_features
    tables = 1 if model_config.window_rope_theta is None else 2
    return 2 * tables * features * batch.stream


def block_gradient_bytes(model: CausalLM, batch: MicroBatch, first: int) -> list[int]:
    """For each block from `first` on: bytes of gradients during its backward pass."""
    dora = dora_bytes(model)
    sizes = [backward_bytes(model.config, batch, sparse) + dora
             for sparse in model.config.sparse[first:]]
    # the gradient of one expert is a stack of all experts, zero for the others
    stacked = [p.nbytes for p in model.parameters() if p.requires_grad and p.dim() == 3]
    if sizes and stacked:
        sizes[0] += max(stacked)
    return sizes


def dora_bytes(part: nn.Module) -> int:
    """The rows whose norm DoRA needs, and their squares, in float32, of its largest layer."""
    return max((8 * m.weight.numel() for m in part.modules() if uses_dora(m)), default=0)


def backward_bytes(model_config: ModelConfig, batch: MicroBatch, sparse: bool | None) -> int:
    """Bytes of the gradients within a block's MLP or experts, if it has them."""
    width = model_config.intermediate_size if sparse is False else 0
    if sparse:
        width = model_config.moe_intermediate_size * model_config.num_experts_per_tok
    # fast: gate, up, their activation and product, and the gradients of these
    return batch.tokens * width * batch.compute * (5 if batch.fast and not sparse else 1)


def attention_peak_bytes(block: Block, layer: int, model_config: ModelConfig,
                         batch: MicroBatch) -> int:
    """For all tokens: a block whose attention is computed, or is in its backward pass.

    What its MLP keeps is not there yet, or no more.
    """
    if block.mixer is None:
        return 0
    hidden = model_config.hidden_size
    norm = 0 if batch.fast else norm_bytes(block.input_layernorm, hidden, batch.stream)
    beside = batch.tokens * (norm + hidden * batch.stream)          # with a gradient of the stream
    beside += exchanged_bytes(model_config, batch)
    peaks = score_peaks(layer, model_config, batch)
    return attention_bytes(block.mixer, layer, model_config, batch) + beside + max(peaks)


def dequantized_bytes(model: CausalLM, batch: MicroBatch) -> int:
    """Bytes of the largest quantized matrix, or stack of experts, while it is dequantized for a
    matrix product."""
    sizes = [weight.dequantize_bytes(batch.device, batch.compute)
             for weight in quantized_weights(model.model).values()]
    if batch.grouped:
        from fast.grouped_experts import made_bytes     # only where it is used

        sizes.append(made_bytes(model, batch.device, batch.compute))
    return max(sizes, default=0)


def loss_bytes(model: CausalLM, batch: MicroBatch) -> int:
    """Bytes of the loss: a chunk's logits (losses.py) or a tile's (fast/head_in_tiles.py), and the
    gradient of a trained head."""
    head = model.lm_head
    weight = head.weight
    vocab_size = weight.shape[0]
    if not vocab_size:                      # of another stage of a pipeline
        return 0
    trained = any(p.requires_grad for p in head.parameters())
    if batch.head_in_tiles and not trained:
        from fast.head_in_tiles import tile_bytes       # only where it is used

        total = tile_bytes(batch.tokens, weight.shape, batch.compute, model.config.final_softcap)
    else:
        rows = min(chunk_rows(batch.tokens, vocab_size), batch.tokens)
        total = int(4 * vocab_size * rows * logit_copies(model.config, batch.compute))
    if hasattr(head, "effective_weight"):
        total += weight.numel() * batch.stream
    if batch.compute < weight.dtype.itemsize:
        total += weight.numel() * batch.compute
    if trained:
        total += 4 * weight.numel()
    return total


def logit_copies(model_config: ModelConfig, compute: int) -> float:
    """Float32 copies of a chunk's logits that the loss holds at once."""
    if model_config.final_softcap:
        return SOFTCAP_CHUNKS
    return HEAD_CHUNKS if compute < 4 else 1


# ---- activations of a block: bytes for all tokens, or for each token, of a micro-batch ----------


def block_bytes(block: Block, layer: int, model_config: ModelConfig, batch: MicroBatch,
                level: str) -> int:
    """For all tokens: norms, attention, and MLP or experts. level: "none" or "mlp"."""
    hidden = model_config.hidden_size
    sparse = isinstance(block.mlp, MoE)
    norms = sum(norm_bytes(norm, hidden, batch.compute)
                for norm in (block.after_attention_norm, block.after_mlp_norm))
    if not batch.fast:
        norms += norm_bytes(block.input_layernorm, hidden, batch.stream)
    if not batch.fast or sparse:
        norms += norm_bytes(block.mlp_norm, hidden, batch.stream)
    if block.mlp is None:
        mlp = 0
    elif sparse:
        mlp = moe_bytes(block.mlp, model_config, batch)
    elif level == "mlp":
        mlp = hidden * batch.stream + low_rank_numbers([block.mlp.down_proj]) * batch.compute
    else:
        mlp = input_bytes(hidden, input_layers(block.mlp), batch, from_stream=True)
        mlp += mlp_bytes(block.mlp, model_config.intermediate_size, model_config, batch)
    attention = attention_bytes(block.mixer, layer, model_config, batch)
    own = sum(module.own_bytes(batch.compute) for module in block.modules()
              if isinstance(module, AdaptedLinear))
    return batch.tokens * (norms + mlp) + attention + own


def norm_bytes(norm: nn.Module, width: int, size: int) -> int:
    """For each token: the input in float32, and the factor of a trained weight.

    size: bytes per number of the input.
    """
    if isinstance(norm, nn.Identity):
        return 0
    if isinstance(norm, LayerNorm):
        return 4 * width + 8
    total = 4 * width + 4
    if norm.weight.requires_grad:
        total += width * (4 if norm.wide else size)
    return total


def input_bytes(width: int, linears: list, batch: MicroBatch, from_stream: bool = False) -> int:
    """For each token: the input (`width` numbers) that linear layers share, and A x of each.

    On the fast path the input is always kept, else if a layer is trained. from_stream: the input
    has the dtype of the residual stream.
    """
    low_rank = low_rank_numbers(linears) * batch.compute
    if batch.fast:
        return width * batch.compute + low_rank
    trained = [m for m in linears if any(p.requires_grad for p in m.parameters())]
    dropped = [m for m in trained if isinstance(m, (LoRALinear, LoRAStacked))
               and isinstance(m.dropout, nn.Dropout)]
    copies = len(trained) - len(dropped)
    each_rounds = from_stream and batch.stream > batch.compute
    if not each_rounds:
        copies = min(copies, 1)
    mask = 1 if batch.device.type == "cuda" else batch.compute
    inputs = copies * batch.compute + len(dropped) * (batch.compute + mask)
    return width * inputs + low_rank


def low_rank_numbers(linears: list) -> int:
    """Numbers for each token of the adapters' A x and, with DoRA, of W x + scale * B(A x)."""
    total = 0
    for module in linears:
        if not isinstance(module, (LoRALinear, LoRAStacked)):
            continue
        experts = len(module.weight) if isinstance(module, LoRAStacked) else 1
        total += module.lora_A.out_features // experts
        if uses_dora(module):
            total += module.lora_B.out_features
    return total


def uses_dora(module: nn.Module) -> bool:
    """Whether this is a layer with DoRA."""
    return getattr(module, "lora_magnitude_vector", None) is not None


def mlp_bytes(mlp: nn.Module, width: int, model_config: ModelConfig, batch: MicroBatch) -> int:
    """For each token, apart from the MLP's input: gate, act(gate), up, and their product.

    On the fast path gate and up alone; without gate, up alone. width: I, of the MLP or of an
    expert.
    """
    ungated = model_config.ungated_mlp
    if batch.fast:
        kept = width if ungated else 2 * width
        return (kept + low_rank_numbers([mlp.down_proj])) * batch.compute
    kept = width if ungated else 3 * width
    return kept * batch.compute + input_bytes(width, [mlp.down_proj], batch)


def input_layers(module: nn.Module) -> list:
    """The linear layers that read the input of an attention or an MLP."""
    names = ("q_a_proj", "kv_a_proj_with_mqa", "qkv_proj", "q_proj", "k_proj", "v_proj",
             "gate_up_proj", "gate_proj", "up_proj")
    return [getattr(module, name) for name in names if hasattr(module, name)]


def moe_bytes(moe: MoE, model_config: ModelConfig, batch: MicroBatch) -> int:
    """For each token: its experts, the router, the shared expert, and the rows' permutation."""
    hidden = model_config.hidden_size
    expert = moe.experts if model_config.stacked_experts else moe.experts[0]
    # the factor of the router's scores
    weighted = hidden * (batch.stream if model_config.scale_input else batch.compute)
    routed = replace(batch, fast=batch.fast and not model_config.stacked_experts)
    width = model_config.moe_intermediate_size
    per_expert = input_bytes(hidden, input_layers(expert), routed, from_stream=True)
    per_expert += mlp_bytes(expert, width, model_config, routed)
    if model_config.swiglu_limit:       # gate and up as they were clamped, and a sigmoid
        per_expert += 3 * width * batch.compute
    per_expert += weighted + 4 * 8
    total = model_config.num_experts_per_tok * per_expert + 4 * model_config.num_experts

    readers = [moe.gate]
    shared_width = model_config.shared_expert_intermediate_size
    if shared_width:
        readers += input_layers(moe.shared_expert)
        total += mlp_bytes(moe.shared_expert, shared_width, model_config, batch)
    if model_config.shared_expert_gate:
        readers.append(moe.shared_expert_gate)
        total += hidden * batch.compute
    return total + input_bytes(hidden, readers, batch, from_stream=True)


def attention_bytes(attention: Attention, layer: int, model_config: ModelConfig,
                    batch: MicroBatch) -> int:
    """For all tokens: the inputs of the projections, norms of q and k, and the kernel's tensors."""
    if attention is None:
        return 0
    if isinstance(attention, StateMixer):
        return state_mixer_bytes(attention, model_config, batch)
    H = model_config.num_attention_heads
    K = model_config.num_key_value_heads
    Dh = model_config.head_dim
    per_token = input_bytes(model_config.hidden_size, attention.readers(), batch, from_stream=True)
    per_token += input_bytes(H * Dh, [attention.o_proj], batch)
    if hasattr(attention, "q_norm"):
        per_token += norm_bytes(attention.q_norm, H * Dh, batch.compute)
        per_token += norm_bytes(attention.k_norm, K * Dh, batch.compute)
    if model_config.kv_lora_rank:
        per_token += latent_bytes(attention, model_config, batch)
    if model_config.qk_norm == "unit":
        per_token += (H + K) * Dh * 4
    if model_config.clip_qkv:
        per_token += (H + 2 * K) * Dh * batch.compute
    return batch.tokens * per_token + kernel_bytes(attention, layer, model_config, batch)


def state_mixer_bytes(mixer: StateMixer, model_config: ModelConfig, batch: MicroBatch) -> int:
    """For all tokens: the linear layers of a mixer with a state, its convolution, gate and scan."""
    hidden, values = model_config.hidden_size, model_config.linear_value_width
    per_token = input_bytes(hidden, mixer.readers(), batch, from_stream=True)
    if isinstance(mixer, ShortConvolution):                 # in_proj's output, what is convolved, y
        per_token += 5 * hidden * batch.compute + input_bytes(hidden, [mixer.o_proj], batch)
        return batch.tokens * per_token
    per_token += input_bytes(values, [mixer.o_proj], batch)
    per_token += norm_bytes(mixer.norm, values, batch.compute)
    per_token += (4 + 4 + batch.compute) * values           # z, silu(z), and what it multiplies
    return batch.tokens * per_token + scan_bytes(mixer, model_config, batch)


def scan_bytes(mixer: StateMixer, model_config: ModelConfig, batch: MicroBatch) -> int:
    """For all tokens, padding included: the convolution and layers.chunked_scan.

    In float32 for each head: matrices of C x C pairs within each chunk of C tokens, vectors that
    read and write the state, and the state that each chunk begins with.
    """
    nv, values = model_config.linear_num_value_heads, model_config.linear_value_width
    dk = model_config.linear_key_head_dim
    width = 2 * model_config.linear_num_key_heads * dk + values
    # the delta rule also has its system of changes
    copies, of_values = (4, 1) if isinstance(mixer, StateSpace) else (7, 3)
    per_slot = (2 * batch.compute + 4) * width              # input, output, silu of the convolution
    per_slot += 4 * (copies * nv * dk + of_values * values)
    total = 0
    for group in group_by_length(batch.lengths):
        longest = batch.lengths[group[0]]
        chunk = min(CHUNK, longest)
        chunks = len(group) * -(-longest // chunk)
        total += chunks * (chunk * (per_slot + 4 * copies * nv * chunk) + 4 * dk * values)
    return total


def exchanged_bytes(model_config: ModelConfig, batch: MicroBatch) -> int:
    """q, k, v of own tokens that are sent, and those of own heads that come (context parallel)."""
    if batch.parts == 1:
        return 0
    own = heads_of_process(model_config, batch)
    heads = batch.parts * (own.num_attention_heads + 2 * own.num_key_value_heads)
    return 2 * batch.tokens * heads * model_config.head_dim * batch.compute


def heads_of_process(model_config: ModelConfig, batch: MicroBatch) -> ModelConfig:
    """The heads of which a kernel has all tokens, where processes share a row."""
    if batch.parts == 1:
        return model_config
    kv_heads = math.lcm(model_config.num_key_value_heads, batch.parts)
    return replace(model_config, num_key_value_heads=kv_heads // batch.parts,
                   num_attention_heads=model_config.num_attention_heads // batch.parts)


def latent_bytes(attention: nn.Module, model_config: ModelConfig, batch: MicroBatch) -> int:
    """For each token: the norms of the latent vectors, what reads them, and keys in two parts."""
    per_token = 0
    for name in ("q", "kv"):
        rank = getattr(model_config, f"{name}_lora_rank")
        if rank:
            per_token += norm_bytes(getattr(attention, f"{name}_a_layernorm"), rank, batch.compute)
            per_token += input_bytes(rank, [getattr(attention, f"{name}_b_proj")], batch)
    return per_token + model_config.num_attention_heads * model_config.head_dim * batch.compute


# ---- activations of an attention kernel ---------------------------------------------------------


class Scores(NamedTuple):
    """Bytes of the scores or masks of one call of a kernel: kept, and at two peaks beside them."""
    kept: int
    forward: int = 0
    backward: int = 0


def kernel_bytes(attention: Attention, layer: int, model_config: ModelConfig,
                 batch: MicroBatch) -> int:
    """For all tokens: q, k, v, and the output with a number per head, or all scores."""
    model_config = heads_of_process(model_config, batch)
    scores = sum(call.kept for call in score_bytes(layer, model_config, batch))
    if batch.kernel == "plain":
        return plain_input_bytes(layer, model_config, batch) + scores

    H = model_config.num_attention_heads
    K = model_config.num_key_value_heads
    Dh = model_config.head_dim
    on_gpu = batch.device.type == "cuda"
    groups = padded_groups(layer, model_config, batch)
    sinks = model_config.attn_sinks
    slots = sum(n * (T + sinks) for n, T, _ in groups)          # tokens, padding included
    Dh += SINK_FEATURES * sinks
    grouped_heads = batch.kernel == "flash-attn"
    if on_gpu and takes_grouped_heads(batch.kernel, any(masked for *_, masked in groups)):
        grouped_heads = True
    heads = H + 2 * (K if grouped_heads else H)                 # of q, k and v

    if batch.kernel == "sdpa-math":
        return math_size(batch) * slots * heads * Dh + scores
    # the output may be the very tensor that o_proj keeps as its input
    is_input = not sinks and (batch.kernel in VARLEN or len(groups) == groups[0][0] == 1
                              and (on_gpu or writes_token_by_token()))
    counted = is_input and input_bytes(1, [attention.o_proj], batch)
    output = 0 if counted else H * Dh * batch.compute
    return slots * (heads * Dh * batch.compute + output + 4 * H) + scores


@cache
def writes_token_by_token() -> bool:
    """Whether SDPA on a CPU stores its output (B, H, T, Dh) token by token: torch 2.4 does, 2.13
    does not. If so, the heads of a token are side by side without a copy."""
    q = torch.zeros(1, 2, 2, 8, device="cpu")
    return sdpa(q, q, q, "sdpa-flash", scale=1.0).transpose(1, 2).is_contiguous()


def padded_groups(layer: int, model_config: ModelConfig,
                  batch: MicroBatch) -> list[tuple[int, int, bool]]:
    """(sequences, padded length, whether with a mask) of each call of a kernel."""
    lengths = chunked_lengths(layer, model_config, batch)
    if batch.kernel in VARLEN:
        return [(1, length, False) for length in lengths]
    window = model_config.windows[layer]
    groups = [(len(group), lengths[group[0]]) for group in group_by_length(lengths)]
    return [(n, T, bool(model_config.alibi or window and window < T)) for n, T in groups]


def chunked_lengths(layer: int, model_config: ModelConfig, batch: MicroBatch) -> list[int]:
    """The lengths of the sequences, split where a layer attends within chunks."""
    chunk = model_config.chunks[layer] or max(batch.lengths)
    return [min(chunk, length - start) for length in batch.lengths
            for start in range(0, length, chunk)]


def score_peaks(layer: int, model_config: ModelConfig, batch: MicroBatch) -> tuple[int, int]:
    """Bytes at the peak of a kernel's forward and backward pass, beside all that it keeps.

    The calls of the backward pass come in reverse order: either way, the scores of later calls are
    not there.
    """
    model_config = heads_of_process(model_config, batch)
    calls = score_bytes(layer, model_config, batch)
    kept = list(accumulate(call.kept for call in calls))
    gathered, returned = packing_bytes(layer, model_config, batch)
    forward = max(k + call.forward for k, call in zip(kept, calls)) - kept[-1]
    backward = max(k + call.backward for k, call in zip(kept, calls)) - kept[-1]
    return gathered + max(forward, returned), backward


def packing_bytes(layer: int, model_config: ModelConfig, batch: MicroBatch) -> tuple[int, int]:
    """For all tokens: q, k, v in the order of SDPA's groups; outputs on their way back from it."""
    if batch.kernel == "plain" or batch.kernel in VARLEN:
        return 0, 0
    groups = padded_groups(layer, model_config, batch)
    if len(groups) == groups[0][0] == 1:
        return 0, 0
    H, K = model_config.num_attention_heads, model_config.num_key_value_heads
    per_head = sum(n * T for n, T, _ in groups) * model_config.head_dim * batch.compute
    return (H + 2 * K) * per_head, 2 * H * per_head


def score_bytes(layer: int, model_config: ModelConfig, batch: MicroBatch) -> list[Scores]:
    """The scores or masks of each call of a kernel, in the order of the forward pass."""
    if batch.kernel == "plain":
        return [plain_scores(queries * keys, model_config, batch)
                for queries, keys in plain_blocks(layer, model_config, batch)]
    calls = []
    for n, T, masked in padded_groups(layer, model_config, batch):
        if batch.kernel == "sdpa-math":
            calls.append(math_scores(n, T * T, masked, model_config, batch))
        elif masked and model_config.alibi:
            calls.append(alibi_mask(T * T, model_config, batch))
        else:
            calls.append(window_mask(T, batch) if masked else Scores(0))
    return calls


def math_size(batch: MicroBatch) -> int:
    """Bytes per number in SDPA's MATH backend: since torch 2.5 it computes in float32."""
    return 4 if TORCH >= (2, 5) else batch.compute


def math_scores(n: int, pairs: int, masked: bool, model_config: ModelConfig,
                batch: MicroBatch) -> Scores:
    """Of n sequences in SDPA's MATH backend, which keeps the softmax. pairs: of query and key.

    Beside it, forward: the scores, where they are -inf (torch >= 2.5), and the mask as numbers;
    backward: the gradients of softmax and scores.
    """
    size = math_size(batch)
    matrices = n * model_config.num_attention_heads * pairs
    mask = pairs * (size + (1 if masked else 0))
    if model_config.alibi:
        mask = model_config.num_attention_heads * pairs * batch.compute
    forward = matrices * (size + (1 if TORCH >= (2, 5) else 0)) + mask
    return Scores(matrices * size, forward, 2 * matrices * size)


def window_mask(T: int, batch: MicroBatch) -> Scores:
    """SDPA keeps a mask as numbers; beside it, it is there as bools, before torch 2.6 twice.

    The kernel of a GPU wants rows of 8 numbers, and copies the mask to padded ones.
    """
    padded = batch.compute if batch.device.type == "cuda" and T % 8 else 0
    bools = 1 if TORCH >= (2, 6) else 2
    return Scores(T * T * batch.compute, T * T * (bools + padded))


def alibi_mask(pairs: int, model_config: ModelConfig, batch: MicroBatch) -> Scores:
    """ALiBi in SDPA: a mask for each head; made in float32, beside it the distances or a bool."""
    H = model_config.num_attention_heads
    kept = H * pairs * batch.compute
    made = 4 * H * pairs
    rounded = kept if batch.compute < 4 else 0
    return Scores(kept, max(made + 4 * pairs, made + 2 * pairs + rounded) - kept)


# ---- the plain kernel ---------------------------------------------------------------------------


def plain_scores(pairs: int, model_config: ModelConfig, batch: MicroBatch) -> Scores:
    """Scores of a block of queries in the plain kernel: float32, and rounded; and the mask.

    At the peak of the backward pass two gradients in float32 are there, the rounded scores no more.
    """
    H = model_config.num_attention_heads
    rounded = batch.compute if batch.compute < 4 else 0
    score = 4 + rounded + (4 if model_config.attn_softcap else 0)
    return Scores(pairs * (H * score + 1), pairs * (H * (4 - rounded) + 1),
                  pairs * H * (2 * 4 - rounded))


def plain_input_bytes(layer: int, model_config: ModelConfig, batch: MicroBatch) -> int:
    """For all tokens of the plain kernel: q, k and v in float32, k and v for each block."""
    all_keys = sum(keys for _, keys in plain_blocks(layer, model_config, batch))
    inputs = 4 * sum(batch.lengths) + (4 + batch.compute) * all_keys
    return model_config.num_attention_heads * model_config.head_dim * inputs


def plain_blocks(layer: int, model_config: ModelConfig,
                 batch: MicroBatch) -> list[tuple[int, int]]:
    """(queries, keys) of each block of queries in the plain kernel.

    A block has its own score matrix, with the keys up to its last query, from the first that its
    first query sees.
    """
    window = model_config.windows[layer]
    blocks = []
    for length in chunked_lengths(layer, model_config, batch):
        for start in range(0, length, PLAIN_QUERIES):
            end = min(start + PLAIN_QUERIES, length)
            keys = min(end, end - start + window - 1) if window else end
            blocks.append((end - start, keys))
    return blocks
