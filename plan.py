"""Where the memory of training goes: what one rank will need, counted before any weight is loaded.

    plan = memory_plan(config, shape, lora, rows, dtype, kernel, device)
    print("\\n".join(plan_lines(plan, available_bytes(device))))          the latter is in room.py

Weights, gradients and the optimizer's state are counted exactly, on a model without storage (the meta device).
Activations, what the forward pass keeps for the backward pass, are a formula. For each token and block, with D, F, H,
K, Dh, T as in model.py, c bytes of a number in a product, and something to learn in all linear layers, these are

    blocks' input 2 x c D               of norm and q, k, v, and of norm and gate, up, which linear.py does again
    q, k, v       c (H + 2 K) Dh        with H for K where the kernel has no grouped heads
    attention     c H Dh + 4 H          its output, the input of o_proj, and a float32 number for each head
                  + (4 + c) H T         the plain kernel alone: all scores, in float32 and rounded
    MLP           2 c F                 gate and up
    LoRA          c r for each layer    A x
    experts       k MLPs + k c D        in place of the MLP; their outputs before they are weighted

and where linear.py cannot help (adapters with dropout, weights that learn in 16 bits), also

    norms         2 x 4 D               each keeps its input in float32 (full: and what its weight is multiplied with)
    MLP           2 c F                 act(gate), and its product with up, the input of down
    dropout                             each layer's own input, and the mask

A block that keeps it all computes nothing again. One that recomputes "mlp" keeps neither gate nor up; "block" keeps its
input alone (gradient checkpointing, arXiv:1604.06174). `lightest` gives each block what fits. Full fine-tuning in 16 bits has float32
weights and a float32 stream between blocks; each matrix, and for each of them its input, is kept once more, rounded.

Read before: model.py, losses.py. Read after: room.py (does it fit, and what would), train.py.
Papers: activations arXiv:2205.05198 (sec. 4), mixed precision arXiv:1710.03740, sharding arXiv:1910.02054.
"""
import bisect
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import nn

from attention import PLAIN_QUERIES, TORCH, group_by_length, takes_grouped_heads
from lora import LoRAConfig, LoRALinear, LoRAStacked, attach_lora, trainable, unfreeze
from losses import chunk_rows
from model import CausalLM, LayerNorm, MoE, bytes_in_words
from optim import state_bytes
from quant import Form, can_be_quantised, embedding_may_stay_outside, empty_quantised, piece_of, quantised_weights

HEAD_CHUNKS = 1.5       # of a chunk's float32 logits live at once in the loss, rounded ones counted; with softcap 4
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
    fast: bool              # linear.py keeps the inputs of norms and of gate * up, not their outputs


# ---- the plan ---------------------------------------------------------------------------------------------------


def memory_plan(config, shape, lora: LoRAConfig | None, rows: list, dtype, kernel: str, device, world: int = 1,
                sharded: bool = False, fast: bool = False, recompute: list | None = None, fp8: bool = False,
                forms: dict[str, Form] | None = None, model=None, beside: int = 0) -> Plan:
    """What one rank needs for a step; nothing is loaded.

    shape: the ModelConfig. lora: None for full fine-tuning. rows: of the largest micro-batch, for each row the lengths
    of its sequences (see largest_rows). dtype: of products and, with LoRA, of frozen weights. kernel: a name from
    attention.py. sharded: weights are split over `world` ranks, in full fine-tuning with their gradients and optimizer
    state; embedding, head and two blocks, that at work and the next, are whole. fast: a product of linear.py is used.
    fp8: see fp8.py. forms: of the weights in 4 or 8 bits, by name (quant.py). recompute: for each block a name of
    model.RECOMPUTE; None: that of disable_gradient_checkpointing. model: that of an earlier plan with the same shape,
    lora and dtype. beside: bytes of another model, that does not learn.
    """
    if model is None:
        with torch.device("meta"):
            model = CausalLM(shape)
        if lora:
            attach_lora(empty_quantised(model.to(dtype), forms or {}), lora, called=shape.stored_name)
        elif config.finetuning_type == "freeze":
            unfreeze(model, config.freeze_trainable_layers, config.freeze_trainable_modules,
                     config.freeze_extra_modules or [], shape.stored_name)
        for p in () if lora else model.parameters():
            p.data = p.data.to(torch.float32 if p.requires_grad and not config.pure_bf16 else dtype)
    sizes = [p.nbytes for p in trainable(model).values()]
    trained = sum(sizes)
    frozen = sum(p.nbytes for p in (*model.parameters(), *quantised_weights(model).values())) - trained
    if fp8:
        frozen -= sum(m.weight.numel() * (m.weight.itemsize - 1) for m in model.modules() if isinstance(m, LoRALinear))
    gradients = trained
    states = state_bytes(trainable(model), config)
    if sharded:
        blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
        gathered = frozen + trained - sum(blocks) + 2 * max(blocks)
        frozen = frozen // world + gathered
        if not lora:                                                    # adapters stay whole on every rank
            trained, gradients, states = (n // world for n in (trained, gradients, states))
    stream = dtype.itemsize if lora else model.model.embed_tokens.weight.itemsize
    work = Work([n for row in rows for n in row], dtype.itemsize, stream, kernel, torch.device(device),
                fast and can_be_fast(lora, dtype))
    recompute = recompute or ["nothing" if config.disable_gradient_checkpointing else "block"] * shape.num_hidden_layers
    if embedding_may_stay_outside(model, device, recompute):
        frozen -= model.model.embed_tokens.weight.nbytes
    asked = dict(shape=shape, lora=lora, rows=rows, dtype=dtype, kernel=kernel, device=device, world=world,
                 sharded=sharded, fast=fast, recompute=recompute, fp8=fp8, forms=forms, model=model, beside=beside)
    frozen += beside // world if sharded else beside
    return Plan(frozen, trained, gradients, states, *activations(model, work, recompute), asked)


def all_in(form: Form, shape) -> dict[str, Form]:
    """memory_plan's `forms` where quantisation on load makes them."""
    with torch.device("meta"):
        return dict.fromkeys(can_be_quantised(CausalLM(shape)), form)


def can_be_fast(lora: LoRAConfig | None, dtype) -> bool:
    """Does linear.py take its fast path in the blocks? Not under autocast, with dropout on adapters, or with DoRA."""
    return not (lora.lora_dropout or lora.use_dora) if lora else dtype == torch.float32


def lightest(plan: Plan, available: int | None, config) -> Plan:
    """Of the plans that fit, that which computes least again in the backward pass; the smallest where none fits.

    Down the ladder a block after the other keeps less (see model.RECOMPUTE), so that the memory there is gets used.
    disable_gradient_checkpointing, where the config has it, leaves no choice.
    """
    shape = plan.asked["shape"]
    count = shape.num_hidden_layers
    if "disable_gradient_checkpointing" in config.given or available is None:
        return plan
    halves = plan.asked["fast"] and can_be_fast(plan.asked["lora"], plan.asked["dtype"]) and not any(shape.sparse)
    steps = ("nothing", "mlp", "block") if halves else ("nothing", "block")
    ladder = [["nothing"] * count] + [[less] * n + [more] * (count - n) for more, less in zip(steps, steps[1:])
                                      for n in range(1, count + 1)]
    plans = [None] * len(ladder)

    def fits(i):
        plans[i] = memory_plan(config, **plan.asked | {"recompute": ladder[i]})
        return plans[i].total <= SPARE * available

    first = bisect.bisect_left(range(len(ladder) - 1), True, key=fits)
    return plans[first] or memory_plan(config, **plan.asked | {"recompute": ladder[first]})


def largest_rows(examples, batches) -> list:
    """Of some micro-batches (lists of row numbers) that with the most tokens: for each row, its sequences' lengths."""
    sizes = examples.sizes.tolist()
    largest = max(batches, key=lambda batch: sum(sizes[i] for i in batch))
    return [list(example.lengths[:1] if example.desired is not None else example.lengths)      # the other is only read
            for example in (examples[i] for i in largest)]


def plan_lines(plan: Plan, available: int | None) -> list[str]:
    """The plan as a table for the start page."""
    rows = plan.asked["rows"]
    notes = {"weights": "frozen", "trained": "weights that learn, float32", "gradients": "float32",
             "optimizer": "what it remembers of gradients", "activations": "kept for the backward pass",
             "working": "the loss, or one block in the backward pass"}
    free = "" if available is None else f"of {bytes_in_words(available)} that are free: " + (
        "fits" if plan.total <= SPARE * available else "tight" if plan.total <= available else "does not fit")
    return [f"memory of a rank at the largest micro-batch, {sum(map(sum, rows)):,} tokens (rows: {len(rows)})",
            *(f"  {name:12}{bytes_in_words(size):>11}  {note}" for name, note in notes.items()
              if (size := getattr(plan, name))),
            f"  {'together':12}{bytes_in_words(plan.total):>11}  {free}".rstrip()]


def in_words(recompute: list) -> str:
    """What the blocks compute again in the backward pass, for the start page."""
    names = {"mlp": "gate and up", "block": "all of it (gradient checkpointing)"}
    parts = [f"{what} in {recompute.count(level)} of {len(recompute)} blocks" for level, what in names.items()
             if level in recompute]
    return ", ".join(parts) or "nothing: the blocks keep what the backward pass needs"


def activations(model, work: Work, recompute: list) -> tuple[int, int]:
    """Bytes that are kept from the forward for the backward pass, and bytes for the loss or the block at work."""
    shape, tokens, layers, D = model.config, sum(work.lengths), model.model.layers, model.config.hidden_size
    parts = (model.model.embed_tokens, *layers, model.model.norm)
    learning = [any(p.requires_grad for p in part.parameters()) for part in parts]
    reached = max(learning.index(True) - 1, 0) if True in learning else len(layers)          # gradients end there
    entered = [block_bytes(block, layer, shape, work, "nothing") for layer, block in enumerate(layers)][reached:] or [0]
    kept = [tokens * D * work.stream if level == "block" else block_bytes(layers[layer], layer, shape, work, level)
            for layer, level in enumerate(recompute)][reached:] or [0]
    copies = sum(p.numel() for block in layers for name, p in block.named_parameters() if work.compute < 4
                 and p.requires_grad and (p.dim() > 1 or name.endswith("bias"))) * work.compute // len(layers)
    rope = 0 if shape.alibi else 2 * int(shape.head_dim * shape.rotary_part) * work.stream
    last = norm_bytes(model.model.norm, D, work.stream) + D * work.stream        # and what the loss sends back to it
    at_work = [backward_bytes(shape, work, sparse) for sparse in shape.sparse][reached:] or [0]
    # the rows whose lengths DoRA wants, and what they are the sum of, in float32
    rows = max((8 * m.weight.numel() for m in model.modules() if has_lengths(m)), default=0)
    at_work = [size + rows for size in at_work]
    # the gradient of one expert comes as a stack of zeros but for its own
    at_work[0] += max((p.nbytes for p in model.parameters() if p.requires_grad and p.dim() == 3), default=0)
    # a block that recomputes has all of it once more while the backward pass is in it; those after it are through
    again = [whole + copies if level == "block" else whole - part
             for whole, part, level in zip(entered, kept, recompute[reached:])]
    most = max(map(sum, zip(accumulate(kept), again, at_work))) - sum(kept)
    plain = sum(level != "block" for level in recompute[reached:])
    working = max(loss_bytes(model, work), most + dense_bytes(model, work))
    return sum(kept) + plain * copies + tokens * (rope + last), working


def dense_bytes(model, work: Work) -> int:
    """Bytes of the largest matrix in 4 or 8 bits while it is dense for a product, and of the piece that is unpacked."""
    return max((work.compute * weight.numel() + 6 * min(weight.numel(), piece_of(work.device, 2))
                for weight in quantised_weights(model.model).values()), default=0)


def backward_bytes(shape, work: Work, sparse: bool) -> int:
    """Bytes of the gradients within a block, for all tokens: of its MLP or experts, and of all scores."""
    width = shape.moe_intermediate_size * shape.num_experts_per_tok if sparse else shape.intermediate_size
    again = work.fast and not sparse            # gate * up, what it is made of, and the gradients of all that
    mlp = sum(work.lengths) * width * work.compute * (5 if again else 1)
    scores = 0
    if work.kernel == "plain":
        scores = 2 * 4 * shape.num_attention_heads * max(T * S for T, S in query_blocks(work.lengths))
    return max(mlp, scores) if again else mlp + scores


def loss_bytes(model, work: Work) -> int:
    """Bytes for the loss alone (losses.py): scores of a chunk of tokens, and the gradient of a head that learns."""
    weight = model.lm_head.weight
    rows = min(chunk_rows(sum(work.lengths), weight.shape[0]), sum(work.lengths))
    live = 4 if model.config.final_softcap else HEAD_CHUNKS if work.compute < 4 else 1
    chunk = int(4 * weight.shape[0] * rows * live)
    made = weight.numel() * work.stream if hasattr(model.lm_head, "effective_weight") else 0
    rounded = weight.numel() * work.compute if work.compute < weight.dtype.itemsize else 0
    learnt = 4 * weight.numel() if any(p.requires_grad for p in model.lm_head.parameters()) else 0
    return chunk + made + rounded + learnt


# ---- what a block keeps: bytes for all tokens of a micro-batch ---------------------------------------------------


def block_bytes(block, layer: int, shape, work: Work, level: str) -> int:
    """For all tokens: norms, attention, MLP or experts. level: "nothing" or "mlp" of model.RECOMPUTE."""
    D, sparse = shape.hidden_size, isinstance(block.mlp, MoE)
    before = [norm for norm, again in ((block.input_layernorm, work.fast),
                                       (block.post_attention_layernorm, work.fast and not sparse)) if not again]
    before = sum(norm_bytes(norm, D, work.stream) for norm in before)
    after = sum(norm_bytes(norm, D, work.compute) for norm in (block.after_attention_norm, block.after_mlp_norm))
    if sparse:
        mlp = moe_bytes(block.mlp, shape, work)
    elif level == "mlp":
        mlp = D * work.stream + narrow([block.mlp.down_proj]) * work.compute
    else:
        mlp = input_bytes(D, first_layers(block.mlp), work, True) + mlp_bytes(block.mlp, shape.intermediate_size, work)
    return sum(work.lengths) * (before + after + mlp) + attention_bytes(block.self_attn, layer, shape, work)


def norm_bytes(norm, width: int, size: int) -> int:
    """For each token: the input in float32, and what a weight that learns is multiplied with (`size`: of the input)."""
    if isinstance(norm, (nn.Identity, LayerNorm)):
        return 4 * width + 8 if isinstance(norm, LayerNorm) else 0
    return 4 * width + 4 + (width * (4 if norm.wide else size) if norm.weight.requires_grad else 0)


def input_bytes(width: int, linears: list, work: Work, from_stream: bool = False) -> int:
    """For each token: the input (`width` numbers) that these layers share, as far as they learn, or, fast, always."""
    if work.fast:
        return (width + narrow(linears)) * work.compute
    learning = [m for m in linears if any(p.requires_grad for p in m.parameters())]
    adapted = [m for m in learning if isinstance(m, (LoRALinear, LoRAStacked))]
    dropped = [m for m in adapted if isinstance(m.dropout, nn.Dropout)]
    copies = len(learning) - len(dropped)
    if not (from_stream and work.stream > work.compute):         # else each rounds its own copy
        copies = min(copies, 1)
    mask = 1 if work.device.type == "cuda" else work.compute
    return width * (copies * work.compute + len(dropped) * (work.compute + mask)) + narrow(linears) * work.compute


def narrow(linears: list) -> int:
    """Numbers of A x, for each token, over the adapters of these layers, and, with DoRA, of W x + scale * B(A x)."""
    return sum(m.lora_A.out_features // (len(m.weight) if isinstance(m, LoRAStacked) else 1)
               + (m.out_features if has_lengths(m) else 0) for m in linears if isinstance(m, (LoRALinear, LoRAStacked)))


def has_lengths(module) -> bool:
    """Is it a layer with DoRA?"""
    return getattr(module, "lora_magnitude_vector", None) is not None


def mlp_bytes(mlp, F: int, work: Work) -> int:
    """For each token: gate, act(gate) and up, and their product, or, fast, gate and up; the input is counted apart."""
    if work.fast:
        return (2 * F + narrow([mlp.down_proj])) * work.compute
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
