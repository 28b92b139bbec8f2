"""Where the memory of training goes: what one rank will need, counted before any weight is loaded.

    plan = memory_plan(config, shape, lora, rows, dtype, kernel, device)
    print("\\n".join(plan_lines(plan, available_bytes(device))))          the latter is in room.py

Weights, gradients and the optimizer's state are counted exactly, on a model without storage (the meta device).
Activations, what the forward pass keeps for the backward pass, are a formula. For each token and block, with D, F, H,
K, Dh, T as in model.py, c bytes of a number in a product, and something to learn in all linear layers, these are

    norms         2 x 4 D               each keeps its input in float32 (full: and what its weight is multiplied with)
    their outputs 2 x c D               the inputs of q, k, v and of gate, up
    q, k, v       c (H + 2 K) Dh        with H for K where the kernel has no grouped heads
    attention     c H Dh + 4 H          its output, the input of o_proj, and a float32 number for each head
                  + (4 + c) H T         the plain kernel alone: all scores, in float32 and rounded
    MLP           4 c F                 gate, act(gate), up, and their product, the input of down
    LoRA          c r for each layer    A x; with dropout also that layer's own input, and the mask
    experts       k MLPs + k c D        in place of the MLP; their outputs before they are weighted

Without recomputation all blocks keep that at once. With it (gradient checkpointing, arXiv:1604.06174) all blocks keep
their input, D numbers for each token, and one block at a time keeps the rest. Full fine-tuning in 16 bits has float32
weights and a float32 stream between blocks; each matrix, and for each of them its input, is kept once more, rounded.

Read before: model.py, losses.py. Read after: room.py (does it fit, and what would), train.py.
Papers: activations arXiv:2205.05198 (sec. 4), mixed precision arXiv:1710.03740, sharding arXiv:1910.02054.
"""
from dataclasses import dataclass, field

import torch
from torch import nn

from attention import PLAIN_QUERIES, TORCH, group_by_length, takes_grouped_heads
from lora import LoRAConfig, LoRALinear, LoRAStacked, attach_lora, trainable
from losses import CHUNK_BYTES
from model import CausalLM, LayerNorm, MoE, bytes_in_words

HEAD_CHUNKS = 3         # of CHUNK_BYTES live at once in the loss: scores, probabilities, both rounded; with softcap 5
SPARE = 0.9             # the part of the memory that a plan may fill: scratch of kernels and fragments take the rest


@dataclass
class Plan:
    """Bytes that one rank needs. `asked` holds the arguments of memory_plan, and the empty model."""
    weights: int            # frozen ones
    trained: int            # in float32
    gradients: int
    optimizer: int
    activations: int        # of the largest micro-batch, kept for the backward pass
    working: int            # what is largest: the loss, or the block that the backward pass is in
    asked: dict = field(repr=False, default_factory=dict)

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.gradients + self.optimizer + self.activations + self.working


@dataclass
class Work:
    """A micro-batch, and how it is computed."""
    lengths: list           # tokens of each sequence
    compute: int            # bytes of a number in a product
    stream: int             # bytes of a number between the blocks
    kernel: str
    device: torch.device


# ---- the plan ---------------------------------------------------------------------------------------------------


def memory_plan(config, shape, lora: LoRAConfig | None, rows: list, dtype, kernel: str, device, world: int = 1,
                sharded: bool = False, model=None) -> Plan:
    """What one rank needs for a step; nothing is loaded.

    shape: the ModelConfig. lora: None for full fine-tuning. rows: of the largest micro-batch, for each row the lengths
    of its sequences (see largest_rows). dtype: of products and, with LoRA, of frozen weights. kernel: a name from
    attention.py. sharded: weights are split over `world` ranks, in full fine-tuning with their gradients and optimizer
    state; embedding, head and two blocks, that at work and the next, are whole. model: that of an earlier plan
    with the same shape, lora and dtype.
    """
    if model is None:
        with torch.device("meta"):
            model = CausalLM(shape)
        if lora:
            attach_lora(model.to(dtype), lora, called=shape.stored_name)
    sizes = [p.nbytes for p in trainable(model).values()]
    trained = sum(sizes)
    frozen = sum(p.nbytes for p in model.parameters()) - trained
    gradients = trained + (4 * len(sizes) if world > 1 else 0)          # parallel.Bucket adds a mark for each
    states = 2 * trained + 4 * len(sizes)                               # AdamW: two means, and a counter of steps
    if sharded:
        blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
        gathered = frozen + trained - sum(blocks) + 2 * max(blocks)
        frozen = frozen // world + gathered
        if not lora:                                                    # adapters stay whole on every rank
            trained, gradients, states = (n // world for n in (trained, gradients, states))
    work = Work([n for row in rows for n in row], dtype.itemsize, dtype.itemsize if lora else 4, kernel,
                torch.device(device))
    asked = dict(shape=shape, lora=lora, rows=rows, dtype=dtype, kernel=kernel, device=device, world=world,
                 sharded=sharded, model=model)
    return Plan(frozen, trained, gradients, states, *activations(model, work, config), asked)


def largest_rows(examples, batches) -> list:
    """Of some micro-batches (lists of row numbers) that with the most tokens: for each row, its sequences' lengths."""
    largest = max(batches, key=lambda batch: sum(len(examples[i].input_ids) for i in batch))
    return [list(examples[i].lengths) for i in largest]


def plan_lines(plan: Plan, available: int | None) -> list[str]:
    """The plan as a table for the start page."""
    rows = plan.asked["rows"]
    notes = {"weights": "frozen", "trained": "weights that learn, float32", "gradients": "float32",
             "optimizer": "AdamW, two float32 means", "activations": "kept for the backward pass",
             "working": "the loss, or one block in the backward pass"}
    free = "" if available is None else f"of {bytes_in_words(available)} that are free: " + (
        "fits" if plan.total <= SPARE * available else "tight" if plan.total <= available else "does not fit")
    return [f"memory of a rank at the largest micro-batch, {sum(map(sum, rows)):,} tokens (rows: {len(rows)})",
            *(f"  {name:12}{bytes_in_words(size):>11}  {note}" for name, note in notes.items()
              if (size := getattr(plan, name))),
            f"  {'together':12}{bytes_in_words(plan.total):>11}  {free}".rstrip()]


def activations(model, work: Work, config) -> tuple[int, int]:
    """Bytes that are kept from the forward for the backward pass, and bytes for the loss or the block at work."""
    shape, tokens, layers, D = model.config, sum(work.lengths), model.model.layers, model.config.hidden_size
    parts = (model.model.embed_tokens, *layers, model.model.norm)
    learning = [any(p.requires_grad for p in part.parameters()) for part in parts]
    reached = max(learning.index(True) - 1, 0) if True in learning else len(layers)          # gradients end there
    blocks = [block_bytes(block, layer, shape, work) for layer, block in enumerate(layers)][reached:] or [0]
    copies = sum(p.numel() for block in layers for name, p in block.named_parameters() if work.compute < 4
                 and p.requires_grad and (p.dim() > 1 or name.endswith("bias"))) * work.compute
    rope = 0 if shape.alibi else 2 * int(shape.head_dim * shape.rotary_part) * work.stream
    last = norm_bytes(model.model.norm, D, work.stream) + D * work.stream        # and what the loss sends back to it
    width = shape.moe_intermediate_size * shape.num_experts_per_tok or shape.intermediate_size
    backward = tokens * width * work.compute                                     # gradients within a block
    if work.kernel == "plain":
        backward += 2 * 4 * shape.num_attention_heads * max(T * S for T, S in query_blocks(work.lengths))
    loss = loss_bytes(model, work)
    if config.disable_gradient_checkpointing:
        return sum(blocks) + copies + tokens * (rope + last), max(loss, backward)
    at_work = max(loss, max(blocks) + copies // len(layers) + backward)
    return tokens * (len(blocks) * D * work.stream + rope + last), at_work


def loss_bytes(model, work: Work) -> int:
    """Bytes for the loss alone (losses.py): scores of a chunk of tokens, and the gradient of a head that learns."""
    weight = model.lm_head.weight
    chunk = min(CHUNK_BYTES, 4 * len(weight) * sum(work.lengths)) * (HEAD_CHUNKS + 2 * bool(model.config.final_softcap))
    made = weight.numel() * work.stream if hasattr(model.lm_head, "effective_weight") else 0
    rounded = weight.numel() * work.compute if work.compute < weight.itemsize else 0
    learnt = 4 * weight.numel() if any(p.requires_grad for p in model.lm_head.parameters()) else 0
    return chunk + made + rounded + learnt


# ---- what a block keeps: bytes for all tokens of a micro-batch ---------------------------------------------------


def block_bytes(block, layer: int, shape, work: Work) -> int:
    """For all tokens: norms, attention, MLP or experts."""
    D = shape.hidden_size
    before = sum(norm_bytes(norm, D, work.stream) for norm in (block.input_layernorm, block.post_attention_layernorm))
    after = sum(norm_bytes(norm, D, work.compute) for norm in (block.after_attention_norm, block.after_mlp_norm))
    mlp = moe_bytes(block.mlp, shape, work) if isinstance(block.mlp, MoE) else \
        input_bytes(D, first_layers(block.mlp), work, True) + mlp_bytes(block.mlp, shape.intermediate_size, work)
    return sum(work.lengths) * (before + after + mlp) + attention_bytes(block.self_attn, layer, shape, work)


def norm_bytes(norm, width: int, size: int) -> int:
    """For each token: the input in float32, and what a weight that learns is multiplied with (`size`: of the input)."""
    if isinstance(norm, (nn.Identity, LayerNorm)):
        return 4 * width + 8 if isinstance(norm, LayerNorm) else 0
    return 4 * width + 4 + (width * (4 if norm.wide else size) if norm.weight.requires_grad else 0)


def input_bytes(width: int, linears: list, work: Work, from_stream: bool = False) -> int:
    """For each token: the input (`width` numbers) that these layers share, as far as they learn."""
    learning = [m for m in linears if any(p.requires_grad for p in m.parameters())]
    adapted = [m for m in learning if isinstance(m, (LoRALinear, LoRAStacked))]
    dropped = [m for m in adapted if isinstance(m.dropout, nn.Dropout)]
    copies = len(learning) - len(dropped)
    if not (from_stream and work.stream > work.compute):         # else each rounds its own copy
        copies = min(copies, 1)
    mask = 1 if work.device.type == "cuda" else work.compute
    low = sum(m.lora_A.out_features // (len(m.weight) if isinstance(m, LoRAStacked) else 1) for m in adapted)
    return width * (copies * work.compute + len(dropped) * (work.compute + mask)) + low * work.compute


def mlp_bytes(mlp, F: int, work: Work) -> int:
    """For each token: gate, act(gate) and up, and their product; the input is counted apart."""
    return 3 * F * work.compute + input_bytes(F, [mlp.down_proj], work)


def first_layers(part) -> list:
    """The linear layers that read what comes into an attention or an MLP."""
    names = ("qkv_proj", "q_proj", "k_proj", "v_proj", "gate_up_proj", "gate_proj", "up_proj")
    return [getattr(part, name) for name in names if hasattr(part, name)]


def moe_bytes(moe, shape, work: Work) -> int:
    """For each token: the k experts, the router, the shared expert, and where each row comes from and goes."""
    D, k, E = shape.hidden_size, shape.num_experts_per_tok, shape.num_experts
    expert = moe.experts if shape.stacked_experts else moe.experts[0]
    weighted = D * (work.stream if shape.scale_input else work.compute)          # what the scores are multiplied with
    total = k * (input_bytes(D, first_layers(expert), work, from_stream=True)
                 + mlp_bytes(expert, shape.moe_intermediate_size, work) + weighted + 4 * 8) + 4 * E
    readers = [moe.gate]
    if width := shape.shared_expert_intermediate_size:
        readers += first_layers(moe.shared_expert)
        total += mlp_bytes(moe.shared_expert, width, work)
    if shape.shared_expert_gate:
        readers.append(moe.shared_expert_gate)
        total += D * work.compute
    return total + input_bytes(D, readers, work, from_stream=True)


def attention_bytes(attention, layer: int, shape, work: Work) -> int:
    """For all tokens: the inputs of the projections, what is done to q, k and v, and what the kernel keeps."""
    H, K, Dh, c = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim, work.compute
    each = input_bytes(shape.hidden_size, first_layers(attention), work, True)
    each += input_bytes(H * Dh, [attention.o_proj], work)
    if hasattr(attention, "q_norm"):
        each += norm_bytes(attention.q_norm, H * Dh, c) + norm_bytes(attention.k_norm, K * Dh, c)
    each += ((H + K) * Dh * 4 if shape.qk_norm == "unit" else 0) + ((H + 2 * K) * Dh * c if shape.clip_qkv else 0)
    return sum(work.lengths) * each + kernel_bytes(attention, layer, shape, work)


def query_blocks(lengths: list) -> list[tuple[int, int]]:
    """How the plain kernel cuts sequences: (queries, keys up to the last of them). Each block makes its own scores."""
    return [(min(PLAIN_QUERIES, n - start), min(n, start + PLAIN_QUERIES)) for n in lengths
            for start in range(0, n, PLAIN_QUERIES)]


def kernel_bytes(attention, layer: int, shape, work: Work) -> int:
    """For all tokens: q, k, v, and either the output with a number for each head, or all scores (see attention.py)."""
    H, K, Dh, c = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim, work.compute
    chunk, window = shape.chunks[layer] or max(work.lengths), shape.windows[layer]
    lengths = [min(chunk, n - start) for n in work.lengths for start in range(0, n, chunk)]
    if work.kernel == "plain":
        blocks = [(T, min(S, T + window - 1) if window else S) for T, S in query_blocks(lengths)]
        pairs, keys = sum(T * S for T, S in blocks), sum(S for _, S in blocks)
        score = 4 + (c if c < 4 else 0) + (4 if shape.attn_softcap else 0)
        return H * Dh * (4 * sum(lengths) + (4 + c) * keys) + pairs * (H * score + 1)
    knows_ends = work.kernel in ("flash-attn", "torch-varlen")   # others get sequences as padded batches
    groups = [] if knows_ends else [(len(group), lengths[group[0]]) for group in group_by_length(lengths)]
    slots = sum(lengths) if knows_ends else sum(n * T for n, T in groups)
    masked = [(n, T) for n, T in groups if window and window < T or shape.alibi]
    on_card = work.device.type == "cuda"
    heads = H + 2 * (K if knows_ends or on_card and takes_grouped_heads(work.kernel, bool(masked)) else H)
    if work.kernel == "sdpa-math":                               # since torch 2.5 it computes in float32
        return (4 if TORCH >= (2, 5) else c) * (slots * heads * Dh + sum(n * H * T * T for n, T in groups))
    mask = sum(n * H * T * T if shape.alibi else T * T for n, T in masked) * c
    same = (knows_ends or on_card and len(lengths) == 1) and input_bytes(1, [attention.o_proj], work)
    return slots * (heads * Dh * c + (0 if same else H * Dh * c) + 4 * H) + mask    # same: as the input of o_proj
