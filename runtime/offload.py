"""Keep a frozen embedding in main memory while a GPU trains.

Requires: checkpoint/load.py.
Next: runtime/memory.py (when it is done), runtime/build.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import to_device
from checkpoint.load import quantized_weights


class EmbeddingOutside(nn.Embedding):
    """A frozen embedding that stays in main memory, whatever device computes: few rows are read.

    Ids with `on_cpu`, themselves before they were sent to the device (data.Batch.to), are not
    copied back: that would wait for all work queued on the device.
    """

    def __init__(self, embedding: nn.Embedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.weight = nn.Parameter(embedding.weight.detach().cpu(), requires_grad=False)

    def _apply(self, fn, recurse=True):
        return self

    def forward(self, ids):
        on_cpu = ids.on_cpu if hasattr(ids, "on_cpu") else ids.cpu()
        return to_device(F.embedding(on_cpu, self.weight), ids.device)


def embedding_may_stay_outside(model: nn.Module, device, recompute: list[str]) -> bool:
    """Whether training keeps the embedding out of a GPU's memory.

    Beside quantized blocks it is a large part of the rest, and where every block recomputes all it
    can, memory is short. Sending its rows costs time. A tied embedding is the head, too, and a
    trained one has an optimizer state.
    """
    embedding = model.model.embed_tokens.weight
    is_short = torch.device(device).type == "cuda" and set(recompute) == {"block"}
    is_frozen = not embedding.requires_grad and embedding is not model.lm_head.weight
    return bool(is_short and is_frozen and quantized_weights(model))
