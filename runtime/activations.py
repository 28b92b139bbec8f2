"""Bytes of the activations of a training step: formulas for every kind of block and kernel.

With D, I, H, K, Dh, T as in model.py, c bytes per number in a matrix product, and trained weights
in all linear layers, a block keeps for each token

    inputs        2 x c D               of norm and q, k, v, and of norm and gate, up, which
                                        fast/fused_block.py computes again
    q, k, v       c (H + 2 K) Dh        with H for K where the kernel has no grouped heads
    attention     c H Dh + 4 H          its output, the input of o_proj, and a float32 per head
                  + (4 + c) H T         the plain kernel alone: all scores, float32 and rounded
    MLP           2 c I                 gate and up
    LoRA          c r for each layer    A x
    experts       k MLPs + k c D        in place of the MLP; their outputs before they are weighted

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
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from attention import PLAIN_QUERIES, TORCH, group_by_length, takes_grouped_heads
from checkpoint.load import quantized_weights
from families import ModelConfig
from lora import AdaptedLinear, LoRALinear, LoRAStacked
from losses import chunk_rows
from model import Attention, Block, CausalLM, LayerNorm, MoE

HEAD_CHUNKS = 1.5       # float32 copies of a chunk's logits that the loss holds at once
SOFTCAP_CHUNKS = 4      # the same where the logits are capped


@dataclass
class MicroBatch:
    """The lengths of a micro-batch's sequences, and how it is computed."""
    lengths: list[int]              # tokens of each sequence
    compute: int                    # bytes per number in a matrix product
    stream: int                     # bytes per number between the blocks
    kernel: str                     # a name from attention.py
    device: torch.device
    fast: bool                      # fast/fused_block.py: keeps inputs, recomputes outputs
    tile: int = 0                   # tokens of a tile of the MLP; 0: all at once

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)


# ---- activations of the model -------------------------------------------------------------------


def activation_bytes(model: CausalLM, batch: MicroBatch, recompute: list[str]) -> tuple[int, int]:
    """(bytes kept from the forward for the backward pass, bytes of working memory).

    Working memory is the larger of the loss and of the block that the backward pass is in.
    """
    first = first_block_with_gradient(model)
    levels = recompute[first:]
    copies = rounded_weight_bytes(model, batch)         # of a block
    kept = []                                           # by each block
    recomputed = []                                     # while the backward pass is in the block
    for layer, level in enumerate(levels, first):
        block = model.model.layers[layer]
        everything = block_bytes(block, layer, model.config, batch, "none")
        if level == "block":
            kept.append(batch.tokens * model.config.hidden_size * batch.stream)
            recomputed.append(everything + copies)
        else:
            kept.append(block_bytes(block, layer, model.config, batch, level))
            recomputed.append(everything - kept[-1])

    # in the backward pass, the blocks after the current one have freed what they kept
    at_work = block_gradient_bytes(model, batch, first)
    peak = max(map(sum, zip(accumulate(kept), recomputed, at_work)), default=0)
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
    return 2 * int(model_config.head_dim * model_config.partial_rotary_factor) * batch.stream


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


def backward_bytes(model_config: ModelConfig, batch: MicroBatch, sparse: bool) -> int:
    """Bytes of the gradients within a block: of its MLP or experts, and of all attention scores."""
    width = model_config.intermediate_size
    if sparse:
        width = model_config.moe_intermediate_size * model_config.num_experts_per_tok
    # fast: gate, up, their activation and product, and the gradients of these
    fast = batch.fast and not sparse
    mlp = batch.tokens * width * batch.compute * (5 if fast else 1)
    scores = score_gradient_bytes(model_config, batch)
    return max(mlp, scores) if fast else mlp + scores


def score_gradient_bytes(model_config: ModelConfig, batch: MicroBatch) -> int:
    """Bytes of the gradients of all scores of a block of queries, in the plain kernel."""
    if batch.kernel != "plain":
        return 0
    largest = max(queries * keys for queries, keys in query_blocks(batch.lengths))
    return 2 * 4 * model_config.num_attention_heads * largest


def dequantized_bytes(model: CausalLM, batch: MicroBatch) -> int:
    """Bytes of the largest quantized matrix while it is dequantized for a matrix product."""
    return max((weight.dequantize_bytes(batch.device, batch.compute)
                for weight in quantized_weights(model.model).values()), default=0)


def loss_bytes(model: CausalLM, batch: MicroBatch) -> int:
    """Bytes of the loss (losses.py): a chunk's logits, and the gradient of a trained head."""
    head = model.lm_head
    weight = head.weight
    vocab_size = weight.shape[0]
    rows = min(chunk_rows(batch.tokens, vocab_size), batch.tokens)
    if model.config.final_softcap:
        chunks = SOFTCAP_CHUNKS
    else:
        chunks = HEAD_CHUNKS if batch.compute < 4 else 1
    total = int(4 * vocab_size * rows * chunks)
    if hasattr(head, "effective_weight"):
        total += weight.numel() * batch.stream
    if batch.compute < weight.dtype.itemsize:
        total += weight.numel() * batch.compute
    if any(p.requires_grad for p in head.parameters()):
        total += 4 * weight.numel()
    return total


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
        norms += norm_bytes(block.post_attention_layernorm, hidden, batch.stream)
    if sparse:
        mlp = moe_bytes(block.mlp, model_config, batch)
    elif level == "mlp":
        mlp = hidden * batch.stream + low_rank_numbers([block.mlp.down_proj]) * batch.compute
    else:
        mlp = input_bytes(hidden, input_layers(block.mlp), batch, from_stream=True)
        mlp += mlp_bytes(block.mlp, model_config.intermediate_size, batch)
    attention = attention_bytes(block.self_attn, layer, model_config, batch)
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


def mlp_bytes(mlp: nn.Module, width: int, batch: MicroBatch) -> int:
    """For each token, apart from the MLP's input: gate, act(gate), up, and their product.

    On the fast path gate and up alone. width: I, of the MLP or of an expert.
    """
    if batch.fast:
        return (2 * width + low_rank_numbers([mlp.down_proj])) * batch.compute
    return 3 * width * batch.compute + input_bytes(width, [mlp.down_proj], batch)


def input_layers(module: nn.Module) -> list:
    """The linear layers that read the input of an attention or an MLP."""
    names = ("qkv_proj", "q_proj", "k_proj", "v_proj", "gate_up_proj", "gate_proj", "up_proj")
    return [getattr(module, name) for name in names if hasattr(module, name)]


def moe_bytes(moe: MoE, model_config: ModelConfig, batch: MicroBatch) -> int:
    """For each token: its experts, the router, the shared expert, and the rows' permutation."""
    hidden = model_config.hidden_size
    expert = moe.experts if model_config.stacked_experts else moe.experts[0]
    # the factor of the router's scores
    weighted = hidden * (batch.stream if model_config.scale_input else batch.compute)
    per_expert = input_bytes(hidden, input_layers(expert), batch, from_stream=True)
    per_expert += mlp_bytes(expert, model_config.moe_intermediate_size, batch)
    per_expert += weighted + 4 * 8
    total = model_config.num_experts_per_tok * per_expert + 4 * model_config.num_experts

    readers = [moe.gate]
    shared_width = model_config.shared_expert_intermediate_size
    if shared_width:
        readers += input_layers(moe.shared_expert)
        total += mlp_bytes(moe.shared_expert, shared_width, batch)
    if model_config.shared_expert_gate:
        readers.append(moe.shared_expert_gate)
        total += hidden * batch.compute
    return total + input_bytes(hidden, readers, batch, from_stream=True)


def attention_bytes(attention: Attention, layer: int, model_config: ModelConfig,
                    batch: MicroBatch) -> int:
    """For all tokens: the inputs of the projections, norms of q and k, and the kernel's tensors."""
    H = model_config.num_attention_heads
    K = model_config.num_key_value_heads
    Dh = model_config.head_dim
    per_token = input_bytes(model_config.hidden_size, input_layers(attention), batch,
                            from_stream=True)
    per_token += input_bytes(H * Dh, [attention.o_proj], batch)
    if hasattr(attention, "q_norm"):
        per_token += norm_bytes(attention.q_norm, H * Dh, batch.compute)
        per_token += norm_bytes(attention.k_norm, K * Dh, batch.compute)
    if model_config.qk_norm == "unit":
        per_token += (H + K) * Dh * 4
    if model_config.clip_qkv:
        per_token += (H + 2 * K) * Dh * batch.compute
    return batch.tokens * per_token + kernel_bytes(attention, layer, model_config, batch)


# ---- activations of an attention kernel ---------------------------------------------------------


def kernel_bytes(attention: Attention, layer: int, model_config: ModelConfig,
                 batch: MicroBatch) -> int:
    """For all tokens: q, k, v, and the output with a number per head, or all scores."""
    window = model_config.windows[layer]
    chunk = model_config.chunks[layer] or max(batch.lengths)
    lengths = [min(chunk, length - start) for length in batch.lengths
               for start in range(0, length, chunk)]
    if batch.kernel == "plain":
        return plain_kernel_bytes(lengths, window, model_config, batch)

    H = model_config.num_attention_heads
    K = model_config.num_key_value_heads
    Dh = model_config.head_dim
    on_gpu = batch.device.type == "cuda"
    varlen = batch.kernel in ("flash-attn", "torch-varlen")     # they take sequences of any lengths
    if varlen:
        groups = [(1, length) for length in lengths]
        masked = []
    else:                                                       # others take padded batches
        groups = [(len(group), lengths[group[0]]) for group in group_by_length(lengths)]
        masked = [(n, T) for n, T in groups if model_config.alibi or window and window < T]
    slots = sum(n * T for n, T in groups)                       # tokens, padding included
    grouped_heads = batch.kernel == "flash-attn"
    if on_gpu and takes_grouped_heads(batch.kernel, bool(masked)):
        grouped_heads = True
    heads = H + 2 * (K if grouped_heads else H)                 # of q, k and v

    if batch.kernel == "sdpa-math":
        size = 4 if TORCH >= (2, 5) else batch.compute          # since 2.5 it computes in float32
        return size * (slots * heads * Dh + sum(n * H * T * T for n, T in groups))
    if model_config.alibi:
        mask = sum(n * H * T * T for n, T in masked)
    else:
        mask = sum(T * T for _, T in masked)
    # the output may be the very tensor that o_proj keeps as its input
    is_input = varlen or on_gpu and len(lengths) == 1
    counted = is_input and input_bytes(1, [attention.o_proj], batch)
    output = 0 if counted else H * Dh * batch.compute
    return slots * (heads * Dh * batch.compute + output + 4 * H) + mask * batch.compute


def plain_kernel_bytes(lengths: list[int], window: int | None, model_config: ModelConfig,
                       batch: MicroBatch) -> int:
    """For all tokens of the plain kernel: q, k and v in float32, all scores, and their mask."""
    H = model_config.num_attention_heads
    rounded = batch.compute if batch.compute < 4 else 0
    score = 4 + rounded + (4 if model_config.attn_softcap else 0)
    pairs = 0
    all_keys = 0
    for queries, keys in query_blocks(lengths):
        if window:
            keys = min(keys, queries + window - 1)
        pairs += queries * keys
        all_keys += keys
    inputs = 4 * sum(lengths) + (4 + batch.compute) * all_keys
    return H * model_config.head_dim * inputs + pairs * (H * score + 1)


def query_blocks(lengths: list[int]) -> list[tuple[int, int]]:
    """(queries, keys) of each block of queries in the plain kernel.

    A block has its own score matrix, with the keys up to its last query.
    """
    blocks = []
    for length in lengths:
        for start in range(0, length, PLAIN_QUERIES):
            end = min(start + PLAIN_QUERIES, length)
            blocks.append((end - start, end))
    return blocks
