"""The tensors of a GGUF file, each made of rows of the decoder's own.

    blk.N.attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down       matrices of block N
    blk.N.ffn_gate_exps, ...                the same of all experts, one after the other
    token_embd, output_norm, output         embedding, last norm, head (none: the embedding)

Where a graph rotates neighboring features 2i and 2i + 1 of a head, and the checkpoint's decoder i
and i + R/2, the rows of q and k change places: scores are sums over features, in any order.

Requires: checkpoint/gguf_graphs.py, checkpoint/write_gguf.py.
Next: exporting/gguf_export.py.
Names: gguf 0.19.
"""
import re
from dataclasses import dataclass

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

from checkpoint.gguf_graphs import Graph, query_factor
from checkpoint.write_gguf import BLOCK_NUMBERS, NUMBER_TYPES
from families import ModelConfig

NAMES = {               # of our modules in the file
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "after_attention_norm": "post_attention_norm", "after_mlp_norm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
IN_FLOAT32 = ("ffn_gate_inp", "ffn_gate_inp_shexp")     # routers
IN_8_BITS = ("token_embd", "output")                    # not fewer


@dataclass
class GraphTensor:
    """One tensor of the file, made of one or several of the decoder's parameters."""
    shape: tuple
    number_type: str
    sources: list[str]                  # names of parameters, whose rows follow one another
    rows: torch.Tensor | None = None    # which rows of the source, in this order; None: all
    offset: float = 0.0                 # added to the numbers
    factor: float = 1.0                 # of the numbers
    normalized: bool = False            # rows are divided by their length


def graph_tensors(graph: Graph, config: ModelConfig, shapes: dict[str, tuple],
                  number_type: str) -> dict[str, GraphTensor]:
    """{name in the file: GraphTensor} of a decoder with these parameters, {name: shape}."""
    found = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight" and graph.tied:
            continue
        for path, rows in parts_of(name, graph, config):
            stored, expert = name_in_file(path)
            kind = stored_type(stored, shape, number_type)
            if expert:
                found[stored].sources.append(name)
                continue
            whole = shape if rows is None else (len(rows), *shape[1:])
            if expert == 0:
                whole = (config.num_experts, *whole)
            norm = stored.endswith("norm.weight") and config.norm == "rms+1"
            # what a norm of the queries would undo is multiplied into that norm
            scaled = ".q_norm." if config.qk_norm else ".q_proj."
            factor = query_factor(graph, config) if scaled in path else 1.0
            found[stored] = GraphTensor(
                shape=whole[1:] if path.endswith("shared_expert_gate.weight") else whole,
                number_type=kind, sources=[name], rows=rows, offset=factor if norm else 0.0,
                factor=factor,
                normalized=name == "lm_head.weight" and config.normalized_head)
    if "output.weight" not in found and graph.tied is False:
        embedding = found["token_embd.weight"]
        found["output.weight"] = GraphTensor(
            shape=embedding.shape, number_type=embedding.number_type, sources=embedding.sources)
    return found


def name_in_file(name: str) -> tuple[str, int | None]:
    """(name in the file, number of the expert or None) of a parameter."""
    stem, _, leaf = name.rpartition(".")
    block = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
    prefix, stem = (f"blk.{block[1]}.", block[2]) if block else ("", stem)
    expert = re.match(r"mlp\.experts\.(\d+)\.(.*)", stem)
    if expert:
        stem = f"mlp.experts.{expert[2]}"
    return f"{prefix}{NAMES[stem]}.{leaf}", int(expert[1]) if expert else None


def stored_type(stored: str, shape: tuple, number_type: str) -> str:
    """How a tensor is stored: vectors and routers in float32, odd sizes in 16 bits."""
    layer = re.sub(r"^blk\.\d+\.", "", stored).removesuffix(".weight")
    if len(shape) == 1 or layer in IN_FLOAT32:
        return "f32"
    if NUMBER_TYPES[number_type].numbers > 1 and shape[-1] % BLOCK_NUMBERS:
        return "f16"
    return "q8_0" if number_type == "q4_0" and layer in IN_8_BITS else number_type


def parts_of(name: str, graph: Graph, config: ModelConfig) -> list[tuple]:
    """[(name of a parameter as if none were fused, its rows in this one or None)]."""
    width = config.intermediate_size
    if ".gate_up_proj." in name and not graph.fused_gate_up:
        rows = torch.arange(2 * width)
        return [(name.replace("gate_up_proj", part), rows[i * width:(i + 1) * width])
                for i, part in enumerate(("gate_proj", "up_proj"))]
    layer = re.search(r"\.(q|k|v|qkv)_proj\.", name)
    if not layer:
        return [(name, None)]
    heads = heads_of(layer[1], config)
    reorder = graph.rotary_pairs != config.rotary_pairs
    found = []
    for part, rows in heads.items():                                    # (heads, Dh)
        if reorder and part != "v":
            rows = rows[:, order_of_pairs(graph, config)]
        unchanged = layer[1] == part and (not reorder or part == "v")
        found.append((name.replace(f"{layer[1]}_proj", f"{part}_proj"),
                      None if unchanged else rows.flatten()))
    return found


def heads_of(layer: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    """{q, k or v: its rows in the matrix of this layer, (heads, Dh)}."""
    H, K, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if layer != "qkv":
        return {layer: torch.arange((H if layer == "q" else K) * Dh).view(-1, Dh)}
    rows = torch.arange((H + 2 * K) * Dh)
    if config.fused_qkv == "groups":
        groups = rows.view(K, H // K + 2, Dh)
        return {"q": groups[:, :-2].reshape(H, Dh), "k": groups[:, -2], "v": groups[:, -1]}
    q, k, v = rows.view(-1, Dh).split((H, K, K))
    return {"q": q, "k": k, "v": v}


def order_of_pairs(graph: Graph, config: ModelConfig) -> torch.Tensor:
    """The features of a head in the order that the graph rotates, (Dh,)."""
    features = torch.arange(config.head_dim)
    rotated = features[:int(config.head_dim * config.partial_rotary_factor)]
    if graph.rotary_pairs == "neighbors":
        rotated = rotated.view(2, -1).T.flatten()       # i and i + R/2 become 2i and 2i + 1
    else:
        rotated = rotated.view(-1, 2).T.flatten()
    return torch.cat([rotated, features[len(rotated):]])
