"""Predict the memory that one rank needs for training, before any weight is loaded.

    plan = memory_plan(config, Workload(model_config, lora, rows, dtype, kernel, device))
    print("\\n".join(plan_lines(plan, available_bytes(device))))

Weights, gradients and optimizer state are counted exactly, on a model without storage (the meta
device). Activations, which the forward pass keeps for the backward pass, follow a formula. With D,
F, H, K, Dh, T as in model.py, c bytes per number in a matrix product, and trained weights in all
linear layers, a block keeps for each token

    inputs        2 x c D               of norm and q, k, v, and of norm and gate, up, which
                                        fast/fused_block.py computes again
    q, k, v       c (H + 2 K) Dh        with H for K where the kernel has no grouped heads
    attention     c H Dh + 4 H          its output, the input of o_proj, and a float32 per head
                  + (4 + c) H T         the plain kernel alone: all scores, float32 and rounded
    MLP           2 c F                 gate and up
    LoRA          c r for each layer    A x
    experts       k MLPs + k c D        in place of the MLP; their outputs before they are weighted

and where fast/fused_block.py does not apply (adapters with dropout, weights trained in 16 bits),
also

    norms         2 x 4 D               each keeps its input in float32 (full fine-tuning: and the
                                        factor of its weight)
    MLP           2 c F                 act(gate), and its product with up, the input of down
    dropout                             each layer's own input, and the mask

What a block keeps depends on its level of activation checkpointing (arXiv:1604.06174): with "mlp"
neither gate nor up, with "block" its input alone. `lightest` chooses the levels that fit. Full
fine-tuning in 16 bits has float32 weights and a float32 residual stream; each matrix, and the
input of each, is kept once more, rounded.

Requires: model.py, lora.py, losses.py, optim.py.
Next: runtime/memory_advice.py (does it fit, and which settings would), train.py.

Papers: activations arXiv:2205.05198 (sec. 4), mixed precision arXiv:1710.03740, sharding
arXiv:1910.02054.
"""
import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import nn

from attention import PLAIN_QUERIES, TORCH, group_by_length, takes_grouped_heads
from checkpoint.adapters import variant_of
from checkpoint.load import empty_quantized, quantizable_weights, quantized_weights
from config import Config
from errors import bytes_in_words
from families import ModelConfig
from lora import AdaptedLinear, AdapterConfig, LoRALinear, LoRAStacked, attach_lora, trainable
from losses import chunk_rows
from model import Attention, Block, CausalLM, LayerNorm, MoE
from runtime.kernels import new_optimizer
from runtime.offload import embedding_may_stay_outside

HEAD_CHUNKS = 1.5       # float32 copies of a chunk's logits that the loss holds at once
SOFTCAP_CHUNKS = 4      # the same where the logits are capped
USABLE = 0.9            # share of the memory that a plan may fill; the rest is for scratch space


@dataclass(frozen=True)
class Workload:
    """A training step whose memory is to be planned."""
    model_config: ModelConfig
    lora: AdapterConfig | None      # None: full fine-tuning or freeze
    rows: list[list[int]]           # of the largest micro-batch: the lengths of a row's sequences
    dtype: torch.dtype              # of matrix products and, with LoRA, of frozen weights
    kernel: str                     # a name from attention.py
    device: torch.device | str
    world: int = 1                  # ranks
    sharded: bool = False           # weights are split over the ranks
    fast: bool = False              # fast/fused_block.py is used
    recompute: list[str] | None = None      # a level of fused_block.RECOMPUTE for each block
    fp8: bool = False               # frozen weights are held in 8 bits (methods/fp8.py)
    quant_formats: dict | None = None       # of weights in 4 or 8 bits, by name
    other_bytes: int = 0            # of another model, which is not trained
    model: CausalLM | None = None   # the model to be trained, without storage


@dataclass
class Plan:
    """Bytes that one rank needs."""
    weights: int                    # frozen
    trained: int
    gradients: int
    optimizer: int                  # its state
    activations: int                # of the largest micro-batch, kept for the backward pass
    working: int                    # the larger of the loss and the block in the backward pass
    workload: Workload = field(repr=False)

    @property
    def total(self) -> int:
        """Bytes of everything together."""
        lasting = self.weights + self.trained + self.gradients + self.optimizer
        return lasting + self.activations + self.working

    def fits(self, free_bytes: int) -> bool:
        """Whether this many bytes are enough, with some to spare."""
        return self.room(free_bytes) >= 0

    def room(self, free_bytes: int) -> int:
        """Bytes that a plan may still fill beside this one."""
        return int(USABLE * free_bytes) - self.total


@dataclass
class MicroBatch:
    """The lengths of a micro-batch's sequences, and how it is computed."""
    lengths: list[int]              # tokens of each sequence
    compute: int                    # bytes per number in a matrix product
    stream: int                     # bytes per number between the blocks
    kernel: str                     # a name from attention.py
    device: torch.device
    fast: bool                      # fast/fused_block.py: keeps inputs, recomputes outputs

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)


# ---- the plan -----------------------------------------------------------------------------------


def memory_plan(config: Config, workload: Workload) -> Plan:
    """Plan the memory of a training step; nothing is loaded.

    What the workload leaves open is decided here: `model` is created on the meta device, and
    `recompute` follows disable_gradient_checkpointing. The plan's workload holds both.
    """
    workload = completed(config, workload)
    model = workload.model
    frozen, trained = weight_bytes(model, workload.fp8)
    gradients, optimizer = optimizer_bytes(model, config)
    others = workload.other_bytes
    if workload.sharded:
        frozen = frozen // workload.world + gathered_bytes(model, frozen + trained)
        others //= workload.world
        if not workload.lora:                       # adapters are whole on every rank
            trained //= workload.world
            gradients //= workload.world
            optimizer //= workload.world
    if embedding_may_stay_outside(model, workload.device, workload.recompute):
        frozen -= model.model.embed_tokens.weight.nbytes

    kept, working = activation_bytes(model, largest_batch(workload), workload.recompute)
    return Plan(
        weights=frozen + others,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        working=working,
        workload=workload,
    )


def optimizer_bytes(model: CausalLM, config: Config) -> tuple[int, int]:
    """(bytes of gradients, bytes of optimizer state)."""
    parameters = trainable(model)
    optimizer = new_optimizer(parameters, config, model.config, torch.device("cpu"))
    gradients = sum(p.nbytes for p in trainable(model).values())
    for p in parameters.values():           # BAdam leaves gradients to one block alone
        p.requires_grad_(True)
    return gradients, optimizer.state_bytes()


def completed(config: Config, workload: Workload) -> Workload:
    """The workload with its model and with a level of recomputation for each block."""
    model = workload.model or model_without_storage(config, workload)
    recompute = workload.recompute
    if not recompute:
        level = "none" if config.disable_gradient_checkpointing else "block"
        recompute = [level] * workload.model_config.num_hidden_layers
    return replace(workload, model=model, recompute=recompute)


def largest_batch(workload: Workload) -> MicroBatch:
    """The workload's largest micro-batch."""
    embedding = workload.model.model.embed_tokens.weight
    return MicroBatch(
        lengths=[length for row in workload.rows for length in row],
        compute=workload.dtype.itemsize,
        stream=workload.dtype.itemsize if workload.lora else embedding.itemsize,
        kernel=workload.kernel,
        device=torch.device(workload.device),
        fast=workload.fast and can_be_fast(workload.lora, workload.dtype),
    )


def model_without_storage(config: Config, workload: Workload) -> CausalLM:
    """The model to be trained, on the meta device, with the dtypes that its weights will have."""
    model_config = workload.model_config
    with torch.device("meta"):
        model = CausalLM(model_config)
    if workload.lora:
        base = empty_quantized(model.to(workload.dtype), workload.quant_formats or {})
        attach_lora(base, workload.lora, stored_name=model_config.stored_name,
                    **variant_of(workload.lora))
        return model
    if config.finetuning_type == "freeze":
        from methods.freeze import unfreeze_as_configured       # only where it is asked for

        unfreeze_as_configured(model, config)
    for p in model.parameters():
        in_float32 = p.requires_grad and not config.pure_bf16
        p.data = p.data.to(torch.float32 if in_float32 else workload.dtype)
    return model


def weight_bytes(model: CausalLM, fp8: bool) -> tuple[int, int]:
    """(bytes of frozen weights, bytes of trained weights)."""
    trained = sum(p.nbytes for p in trainable(model).values())
    total = sum(p.nbytes for p in model.parameters())
    total += sum(weight.nbytes for weight in quantized_weights(model).values())
    if fp8:                                         # one byte per number
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                total -= module.weight.numel() * (module.weight.itemsize - 1)
    return total - trained, trained


def gathered_bytes(model: CausalLM, total: int) -> int:
    """Bytes of sharded weights held whole: all but the blocks, and two blocks. total: all weights.

    The two are the block at work and the next one, which is being gathered.
    """
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
    return total - sum(blocks) + 2 * max(blocks)


def all_in(quant_format, model_config: ModelConfig) -> dict:
    """A workload's quant_formats for a model that is quantized while it is loaded."""
    with torch.device("meta"):
        return dict.fromkeys(quantizable_weights(CausalLM(model_config)), quant_format)


def can_be_fast(lora: AdapterConfig | None, dtype: torch.dtype) -> bool:
    """Whether fast/fused_block.py applies: not under autocast, with dropout, DoRA or OFT."""
    if lora:
        return lora.variant in ("", "pissa_init") and not lora.lora_dropout
    return dtype == torch.float32


def lightest(plan: Plan, free_bytes: int | None, config: Config) -> Plan:
    """The plan that fits with the least recomputation; where none fits, the smallest plan.

    disable_gradient_checkpointing in the config, true or false, leaves no choice.
    """
    if free_bytes is None or "disable_gradient_checkpointing" in config.given:
        return plan
    ladder = recompute_ladder(plan)
    plans = {}

    def fits(rung: int) -> bool:
        plans[rung] = memory_plan(config, replace(plan.workload, recompute=ladder[rung]))
        return plans[rung].fits(free_bytes)

    last = len(ladder) - 1
    first = bisect.bisect_left(range(last), True, key=fits)
    if first == last:                               # taken whether or not it fits
        fits(last)
    return plans[first]


def recompute_ladder(plan: Plan) -> list[list[str]]:
    """Levels of all blocks, from no recomputation to full; each rung changes one more block."""
    model_config = plan.workload.model_config
    blocks = model_config.num_hidden_layers
    levels = ["none", "block"]
    if largest_batch(plan.workload).fast and not any(model_config.sparse):
        levels = ["none", "mlp", "block"]

    ladder = [["none"] * blocks]
    for less, more in zip(levels, levels[1:]):
        ladder += [[more] * n + [less] * (blocks - n) for n in range(1, blocks + 1)]
    return ladder


def largest_rows(examples, batches: Iterable[list[int]]) -> list[list[int]]:
    """The micro-batch with the most tokens: for each of its rows, the lengths of its sequences.

    batches: lists of row numbers. Of a KTO row only the first sequence is trained on.
    """
    sizes = examples.sizes.tolist()
    largest = max(batches, key=lambda batch: sum(sizes[i] for i in batch))
    rows = []
    for i in largest:
        example = examples[i]
        judged = example.desired is not None
        rows.append(list(example.lengths[:1] if judged else example.lengths))
    return rows


# ---- the start page -----------------------------------------------------------------------------


def plan_lines(plan: Plan, free_bytes: int | None) -> list[str]:
    """The plan as a table for the start page."""
    rows = plan.workload.rows
    lines = [f"memory of a rank, largest micro-batch: {sum(map(sum, rows)):,} tokens "
             f"(rows: {len(rows)})"]
    for label, size, note in (
        ("frozen weights", plan.weights, ""),
        ("trained weights", plan.trained, ""),
        ("gradients", plan.gradients, ""),
        ("optimizer state", plan.optimizer, ""),
        ("activations", plan.activations, "kept for the backward pass"),
        ("working memory", plan.working, "the loss, or one block in the backward pass"),
    ):
        if size:
            lines.append(f"  {label:15} {bytes_in_words(size):>11}  {note}".rstrip())
    total = f"  {'total':15} {bytes_in_words(plan.total):>11}"
    if free_bytes is None:
        return [*lines, total]
    if plan.fits(free_bytes):
        verdict = "fits"
    else:
        verdict = "tight" if plan.total <= free_bytes else "does not fit"
    return [*lines, f"{total}; {bytes_in_words(free_bytes)} free: {verdict}"]


def checkpointing_in_words(recompute: list[str]) -> str:
    """Activation checkpointing of the blocks, for the start page."""
    names = {"mlp": "MLP in", "block": "everything in"}
    parts = [f"{what} {recompute.count(level)} of {len(recompute)} blocks"
             for level, what in names.items() if level in recompute]
    return ", ".join(parts) or "off"


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
    model_config = model.config
    hidden = model_config.hidden_size
    rope = 0
    if not model_config.alibi:
        rotated = int(model_config.head_dim * model_config.partial_rotary_factor)
        rope = 2 * rotated * batch.stream
    norm = norm_bytes(model.model.norm, hidden, batch.stream) + hidden * batch.stream
    return rope + norm


def block_gradient_bytes(model: CausalLM, batch: MicroBatch, first: int) -> list[int]:
    """For each block from `first` on: bytes of gradients during its backward pass."""
    # DoRA: the rows whose norm it needs, and their squares, in float32
    dora = max((8 * m.weight.numel() for m in model.modules() if uses_dora(m)), default=0)
    sizes = [backward_bytes(model.config, batch, sparse) + dora
             for sparse in model.config.sparse[first:]]
    # the gradient of one expert is a stack of all experts, zero for the others
    stacked = [p.nbytes for p in model.parameters() if p.requires_grad and p.dim() == 3]
    if sizes and stacked:
        sizes[0] += max(stacked)
    return sizes


def backward_bytes(model_config: ModelConfig, batch: MicroBatch, sparse: bool) -> int:
    """Bytes of the gradients within a block: of its MLP or experts, and of all attention scores."""
    width = model_config.intermediate_size
    if sparse:
        width = model_config.moe_intermediate_size * model_config.num_experts_per_tok
    # fast: gate, up, their activation and product, and the gradients of these
    fast = batch.fast and not sparse
    mlp = batch.tokens * width * batch.compute * (5 if fast else 1)
    scores = 0
    if batch.kernel == "plain":
        largest = max(queries * keys for queries, keys in query_blocks(batch.lengths))
        scores = 2 * 4 * model_config.num_attention_heads * largest
    return max(mlp, scores) if fast else mlp + scores


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
