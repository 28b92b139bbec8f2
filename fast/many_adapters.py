"""Several adapters beside one base: each row of a batch is computed with the adapter it asks for.

    adapters = RowAdapters(device)
    put_beside(model, {"pip": layers_of_pip, "poet": layers_of_poet}, adapters)
    adapters.assign(["poet", None, "pip"], [12, 9, 30])     # whose the tokens of the next pass are

The base's product is computed once for all rows; then the rows of each adapter get scale * B(A x)
of theirs added. A row without an adapter is the base's, bit for bit. The slow twin is a model with
that one adapter.

Requires: lora.py (LoRALinear), fast/batch_decode.py.
Next: eval.py.
Papers: Punica arXiv:2310.18547, S-LoRA arXiv:2311.03285.
"""
import torch
from torch import nn

from attention import to_device
from lora import LoRALinear


class RowAdapters:
    """Which tokens of the next pass belong to which adapter."""

    def __init__(self, device):
        self.device = device
        self.places = {}        # name -> indices of its tokens, (n,) int64

    def assign(self, names: list[str | None], counts: list[int]):
        """names: the adapter of each row of the next pass; counts: the tokens it has there."""
        found = {}
        start = 0
        for name, count in zip(names, counts):
            if name is not None:
                found.setdefault(name, []).extend(range(start, start + count))
            start += count
        self.places = {name: to_device(torch.tensor(places), self.device)
                       for name, places in found.items()}


class LinearOfRows(nn.Module):
    """A linear layer, and adapters of which each row of the batch uses its own or none.

    layers: {name of an adapter: its LoRALinear}; their own base layers are not used.
    """

    def __init__(self, base_layer: nn.Module, layers: dict[str, LoRALinear], rows: RowAdapters):
        super().__init__()
        self.base_layer = base_layer
        self.pairs = nn.ModuleList(nn.ModuleList([layer.lora_A, layer.lora_B])
                                   for layer in layers.values())
        self.scales = [layer.scale for layer in layers.values()]
        self.index = {name: number for number, name in enumerate(layers)}
        self.rows = rows

    @property
    def weight(self):
        """The frozen weight, as base_layer stores it."""
        return self.base_layer.weight

    def forward(self, x):
        """(B, T, in) or (N, in) -> the same with out."""
        y = self.base_layer(x)
        inputs = x.flatten(0, -2)                                           # (N, in)
        outputs = y.flatten(0, -2)                                          # (N, out)
        for name, places in self.rows.places.items():
            if name in self.index:
                lora_A, lora_B = self.pairs[self.index[name]]
                low_rank = lora_B(lora_A(inputs[places])) * self.scales[self.index[name]]
                outputs = outputs.index_add(0, places, low_rank.to(outputs.dtype))
        return outputs.view_as(y)


def why_not_beside(layers: dict[str, nn.Module], trained_whole: list[str]) -> str:
    """Why an adapter cannot share a pass with other rows, or "".

    layers: its adapted layers by full name. trained_whole: weights it has instead of the base's.
    """
    if trained_whole:
        return f"it has trained {trained_whole[0]} whole"
    for name, layer in layers.items():
        if type(layer) is not LoRALinear:
            return f"its layers are no plain LoRA ({type(layer).__name__})"
        if "experts." in name or name == "lm_head":
            return f"it adapts {name}, whose rows are not the batch's tokens"
    return ""


def put_beside(model: nn.Module, adapters: dict[str, dict[str, LoRALinear]], rows: RowAdapters):
    """Replace each layer that some adapter changes by a LinearOfRows, in place.

    adapters: {name: {full name of a layer: its LoRALinear}}.
    """
    dtype = next(model.parameters()).dtype
    for layer in sorted({layer for layers in adapters.values() for layer in layers}):
        own = {name: layers[layer] for name, layers in adapters.items() if layer in layers}
        parent, _, child = layer.rpartition(".")
        module = LinearOfRows(model.get_submodule(layer), own, rows)
        module.pairs.to(dtype)
        setattr(model.get_submodule(parent), child, module.eval())
