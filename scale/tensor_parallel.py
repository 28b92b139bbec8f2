"""Tensor parallelism: the matrices of every block are cut over the processes of an axis.

    torchrun --nproc-per-node 2 train.py --config my.yaml tensor_parallel_size=2

    columns cut     q, k, v, gate, up: each process has whole heads, and columns of the MLP
    rows cut        o, down: each process has the inputs that its heads and columns make
    the block       x -> norm -> enter -> columns, attention or activation, rows -> leave -> + x

enter and leave are hooks on the norms of finished blocks, so model.py and fast/ know nothing of
this: one all-reduce forward and one backward, twice a block, for all layers and adapters together.

    adapters        columns cut: A whole, B cut; rows cut: A cut, B whole. A is drawn whole and then
                    cut, so a run starts where one process starts
    experts         cut like an MLP; their router is computed on all processes
    what is whole   has partial gradients between enter and leave (scale/cut_gradients.py)

The twin is one process.

Requires: scale/mesh.py, scale/collectives.py, checkpoint/shards.py, model.py, lora.py.
Next: scale/cut_vocabulary.py, scale/cut_gradients.py.
Papers: Megatron-LM arXiv:1909.08053 (sec. 3).
"""
from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from checkpoint.shards import Cut, cut_parameter
from families import ModelConfig
from layers import MoE, StackedLinear
from model import Attention
from scale.collectives import enter, leave
from scale.cut_vocabulary import cut_vocabulary
from scale.mesh import Axis

COLUMNS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
ROWS = ("o_proj", "down_proj")


def part_config(config: ModelConfig, parts: int, vocabulary: bool) -> ModelConfig:
    """The sizes that one of `parts` processes computes with.

    vocabulary: whether embedding and head are cut. Raises ValueError for what cannot be cut evenly.
    """
    if config.qk_norm == "width":
        raise ValueError(
            f"tensor_parallel_size: {parts}: {config.model_type} normalizes q and k over all heads "
            "together, which are not cut. Take fsdp: full_shard, which shards every model")
    if config.alibi:
        raise ValueError(
            f"tensor_parallel_size: {parts}: {config.model_type} has a bias for each head (ALiBi), "
            "which is not cut. Take fsdp: full_shard, which shards every model")
    if config.kv_lora_rank:
        raise ValueError(
            f"tensor_parallel_size: {parts}: {config.model_type} makes keys and values from one "
            "latent vector, which is not cut. Take fsdp: full_shard, which shards every model")
    if config.has_states:
        raise ValueError(
            f"tensor_parallel_size: {parts}: {config.model_type} has layers that read earlier "
            "tokens through a state, which are not split. Take fsdp: full_shard, which shards "
            "every model")
    if config.parallel_mlp:
        raise ValueError(
            f"tensor_parallel_size: {parts}: attention and MLP of {config.model_type} read one "
            "norm, where their gradients are not summed apart. Take fsdp: full_shard, which shards "
            "every model")
    names = ["num_attention_heads", "num_key_value_heads"]
    names += ["intermediate_size"] if False in config.sparse else []
    names += ["moe_intermediate_size"] if any(config.sparse) else []
    names += ["shared_expert_intermediate_size"] if any(config.sparse) else []
    names += ["vocab_size"] if vocabulary else []
    sizes = {}
    for name in names:
        size = getattr(config, name)
        if size % parts:
            fitting = [n for n in range(1, parts)
                       if not any(getattr(config, other) % n for other in names)]
            raise ValueError(
                f"tensor_parallel_size: {parts} does not divide {name}: {size} of this model. "
                f"Take {' or '.join(map(str, fitting))}, and the other processes for data "
                "parallelism; or fsdp: full_shard, which shards every model")
        sizes[name] = size // parts
    return replace(config, **sizes)


# ---- cutting ------------------------------------------------------------------------------------

def cut_model(model, axis: Axis, vocabulary: bool):
    """Give this process its part of a model whose adapters are attached, in place.

    Weights on the meta device stay there (see checkpoint.shards.materialize). vocabulary: cut
    embedding and head, too, by token id. Raises ValueError as part_config does.
    """
    part_config(model.config, axis.size, vocabulary)
    for name, module in list(model.named_modules()):
        kind = name.rpartition(".")[2]
        if kind in COLUMNS + ROWS:
            cut_layer(module, kind, sections_of(model.config, module, kind), axis)
        elif isinstance(module, Attention):
            heads, kv_heads = module.config.num_attention_heads, module.config.num_key_value_heads
            module.config = replace(module.config, num_attention_heads=heads // axis.size,
                                    num_key_value_heads=kv_heads // axis.size)
            if module.sinks is not None:
                cut_parameter(module, "sinks", Cut(0, (heads,), axis))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if vocabulary:
        cut_vocabulary(model, axis)
    if tied:
        head = getattr(model.lm_head, "base_layer", model.lm_head)
        head.weight = model.model.embed_tokens.weight
    set_collectives(model, axis)


def sections_of(config, layer, kind: str) -> tuple[int, ...]:
    """The sizes of what lies side by side along the dimension that is cut."""
    weight = layer.weight
    stacked = weight.dim() == 3                                     # (E, in, out)
    if kind in ROWS:
        return (weight.shape[1],)
    out = weight.shape[2] if stacked else weight.shape[0]
    if kind == "gate_up_proj" and not (stacked and config.interleaved_gate_up):
        return (out // 2, out // 2)
    if kind == "qkv_proj" and config.fused_qkv == "blocks":
        kv = config.num_key_value_heads * config.head_dim
        return (out - 2 * kv, kv, kv)
    return (out,)


def cut_layer(layer, kind: str, sections: tuple, axis: Axis):
    """Cut a linear layer or a stack of them, and the adapter beside it."""
    base = getattr(layer, "base_layer", layer)
    stacked = isinstance(base, StackedLinear)
    columns = kind in COLUMNS
    cut_parameter(base, "weight", Cut((2 if stacked else 0) if columns else 1, sections, axis))
    if getattr(base, "bias", None) is not None:
        if columns:
            cut_parameter(base, "bias", Cut(1 if stacked else 0, sections, axis))
        elif base.bias.requires_grad:
            raise ValueError(f"tensor_parallel_size: {kind} has a bias that would be trained, "
                             "which is added on one process only. Take finetuning_type: lora, or "
                             "fsdp: full_shard")
        elif axis.rank > 0:             # it is added once
            base.bias = None
    if base is layer:
        return
    if columns:
        cut_parameter(layer.lora_B, "weight", Cut(0, sections, axis))
    else:
        cut_parameter(layer.lora_A, "weight", Cut(1, sections, axis))
        if isinstance(layer.dropout, nn.Dropout):
            layer.dropout = PartOfDropout(layer.dropout.p, sections[0], axis)


class PartOfDropout(nn.Module):
    """Dropout of some columns, by a mask drawn for all: the random numbers of one process."""

    def __init__(self, p: float, width: int, axis: Axis):
        super().__init__()
        self.p = p
        self.width = width                                  # of all columns
        part = width // axis.size
        self.own = slice(axis.rank * part, (axis.rank + 1) * part)

    def forward(self, x):
        if not self.training:
            return x
        mask = F.dropout(x.new_ones(*x.shape[:-1], self.width), self.p)
        return x * mask[..., self.own]


def set_collectives(model, axis: Axis):
    """Hooks where activations enter and leave the layers that are cut."""
    def after_norm(module, args, out):
        return enter(out, axis)

    def before_norm(module, args):
        return (leave(args[0], axis),)

    def share_balance(module, args, out):
        """The balance loss is the same on all processes: each takes its share of the gradient."""
        routers = args[1].routers
        if routers and routers[-1].requires_grad:
            routers[-1] = routers[-1].view_as(routers[-1])
            routers[-1].register_hook(lambda grad: grad / axis.size)

    for block in model.model.layers:
        block.input_layernorm.register_forward_hook(after_norm)
        block.after_attention_norm.register_forward_pre_hook(before_norm)
        block.post_attention_layernorm.register_forward_hook(after_norm)
        block.after_mlp_norm.register_forward_pre_hook(before_norm)
        if isinstance(block.mlp, MoE):
            block.mlp.register_forward_hook(share_balance)
