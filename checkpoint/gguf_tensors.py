"""The tensors of a GGUF file, each made of rows of the decoder's own.

    blk.N.attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down       matrices of block N
    blk.N.ffn_gate_exps, ...                the same of all experts, one after the other
    token_embd, output_norm, output         embedding, last norm, head (none: the embedding)
    blk.N.attn_k_b, attn_v_b                of latent attention: (heads, latent, features of a key
                                            that are not rotated), (heads, v_head_dim, latent)

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
import torch.nn.functional as F

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
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.k_b_proj": "attn_k_b", "self_attn.v_b_proj": "attn_v_b",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.selection": "exp_probs_b",
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
    transposed: bool = False            # of matrices (heads, out, in): stored as (heads, in, out)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a source as numbers of the file."""
        if self.normalized:
            rows = F.normalize(rows)
        if self.factor != 1 or self.offset:
            rows = rows * self.factor + self.offset
        if self.transposed:
            heads, size_in, size_out = self.shape
            rows = rows.view(heads, size_out, size_in).transpose(1, 2)
        return rows

    def to_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """The rows of the source from the numbers of the file, but for their lengths."""
        numbers = numbers.view(self.shape)
        if self.transposed:
            numbers = numbers.transpose(1, 2)
        if numbers.dim() == 3 and len(self.sources) == 1:       # heads of latent attention
            numbers = numbers.flatten(0, 1)
        return (numbers - self.offset) / self.factor


def graph_tensors(graph: Graph, config: ModelConfig, shapes: dict[str, tuple],
                  number_type: str) -> dict[str, GraphTensor]:
    """{name in the file: GraphTensor} of a decoder with these parameters, {name: shape}."""
    found = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight" and graph.tied:
            continue
        for path, rows in parts_of(name, graph, config):
            stored, expert = name_in_file(path, graph)
            whole = shape_in_file(path, shape, rows, config)
            kind = stored_type(stored, whole, number_type)
            if expert:
                found[stored].sources.append(name)
                continue
            if expert == 0:
                whole = (config.num_experts, *whole)
            norm = stored.endswith("norm.weight") and config.norm == "rms+1"
            # what a norm of the queries would undo is multiplied into that norm
            scaled = ".q_norm." if config.qk_norm else ".q_proj."
            factor = query_factor(graph, config) if scaled in path else 1.0
            found[stored] = GraphTensor(
                shape=whole, number_type=kind, sources=[name], rows=rows,
                offset=factor if norm else 0.0, factor=factor, transposed=".k_b_proj." in path,
                normalized=name == "lm_head.weight" and config.normalized_head)
    if "output.weight" not in found and graph.tied is False:
        embedding = found["token_embd.weight"]
        found["output.weight"] = GraphTensor(
            shape=embedding.shape, number_type=embedding.number_type, sources=embedding.sources)
    return found


def shape_in_file(path: str, shape: tuple, rows: torch.Tensor | None,
                  config: ModelConfig) -> tuple:
    """The shape of these rows of a parameter in the file; of an expert, of its own part."""
    if path.endswith("shared_expert_gate.weight"):
        return shape[1:]
    if rows is None:
        return shape
    if ".k_b_proj." in path:                            # see GraphTensor.transposed
        heads = config.num_attention_heads
        return heads, shape[1], len(rows) // heads
    if ".v_b_proj." in path:
        return config.num_attention_heads, config.v_head_dim, shape[1]
    return len(rows), *shape[1:]


def name_in_file(name: str, graph: Graph) -> tuple[str, int | None]:
    """(name in the file, number of the expert or None) of a parameter."""
    name = name.replace("mlp.selection_bias", "mlp.selection.bias")
    if graph.post_norm:
        name = name.replace("post_attention_layernorm", "after_attention_norm")
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
    if ".kv_b_proj." in name:
        rows = torch.arange(config.num_attention_heads * (
            config.head_dim - config.rotary_dim + config.v_head_dim))
        k, v = rows.view(config.num_attention_heads, -1).split(
            (config.head_dim - config.rotary_dim, config.v_head_dim), 1)
        return [(name.replace("kv_b_proj", f"{part}_b_proj"), rows.flatten())
                for part, rows in (("k", k), ("v", v))]
    layer = re.search(r"\.(q|k|v|qkv)_proj\.", name)
    if not layer or config.kv_lora_rank:
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
    rotated = features[:config.rotated_features]
    if graph.rotary_pairs == "neighbors":
        rotated = rotated.view(2, -1).T.flatten()       # i and i + R/2 become 2i and 2i + 1
    else:
        rotated = rotated.view(-1, 2).T.flatten()
    return torch.cat([rotated, features[len(rotated):]])
