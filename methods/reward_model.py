"""Reward models (stage rm): a value head that scores a text, trained on pairs of answers.

The head is a linear map of the last token's hidden state to one number. It is saved beside the
adapter as value_head.safetensors, under TRL's names.

Requires: losses.py, methods/preference.py (the batches).
Next: runtime/build.py (STAGES).
Papers: reward models arXiv:2203.02155 (eq. 1); Bradley and Terry 1952.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.files import open_tensors, save_tensors
from families import read_config_json
from losses import Objective, weighted_sum

VALUE_HEAD = "value_head.safetensors"


class ValueHead(nn.Module):
    """Score a text by the hidden state (..., D) of its last token -> (...,).

    dropout: of the hidden state in training; TRL's is 0.1 where config.json has no
    summary_dropout_prob.
    """

    def __init__(self, hidden_size: int, dropout: float, seed: int):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.dropout = dropout
        bound = 1 / math.sqrt(hidden_size)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data.uniform_(-bound, bound, generator=generator)

    def forward(self, hidden, training: bool = False):
        hidden = F.dropout(hidden, self.dropout, training).float()
        # a sum of products, not F.linear, which autocast would compute in 16 bits
        return (hidden * self.summary.weight[0]).sum(-1) + self.summary.bias

    def weights(self) -> dict[str, nn.Parameter]:
        """{name in the file: parameter}."""
        return {f"v_head.{name}": p for name, p in self.named_parameters()}

    @torch.no_grad()
    def read(self, folder) -> bool:
        """Load the weights of a folder; False if it has none."""
        path = Path(folder) / VALUE_HEAD
        if not path.is_file():
            return False
        with open_tensors(path) as tensors:
            for name, p in self.weights().items():
                if name not in tensors.keys() or tensors.get_tensor(name).shape != p.shape:
                    raise ValueError(f"{path} has no {name} of shape {list(p.shape)}: it is the "
                                     "value head of another model")
                p.copy_(tensors.get_tensor(name))
        return True

    def write(self, folder):
        save_tensors(Path(folder) / VALUE_HEAD, self.weights())


def load_value_head(config, base, device, resume) -> ValueHead:
    """The head of the checkpoint to resume, else of the last adapter or the base, else a new one.

    base: see runtime/setup.py.
    """
    dropout = read_config_json(base.folder).get("summary_dropout_prob", 0.1)
    head = ValueHead(base.model_config.hidden_size, dropout, config.seed)
    folder = resume or (base.adapters[-1] if base.adapters else base.folder)
    if not head.read(folder) and resume:
        raise FileNotFoundError(f"{resume} has no {VALUE_HEAD}, and cannot be resumed in stage: rm")
    return head.to(device)


class RewardObjective(Objective):
    """-log sigmoid(score of chosen - score of rejected)."""

    metric_names = ("accuracy",)

    def __init__(self, head: ValueHead):
        super().__init__()
        self.head = head

    def parameters(self) -> dict:
        return self.head.weights()

    def save(self, folder):
        self.head.write(folder)

    def load(self, folder):
        self.head.read(folder)

    def loss_sum(self, model, batch):
        hidden = model(batch.input_ids, batch.position_ids, batch.layout)[0]            # (N, D)
        last = batch.layout.cu_seqlens[1:].long() - 1               # last token of each answer
        # one call each: the gradients of the bias, which no comparison sees, then cancel exactly
        chosen, rejected = (self.head(hidden[rows], model.training)
                            for rows in last.split(len(batch.row_weights)))             # (n,)
        losses = -F.logsigmoid(chosen - rejected)
        counted = (batch.row_weights > 0).float()
        metrics = {"accuracy": weighted_sum((chosen > rejected).float(), counted)}
        return (losses * batch.row_weights).sum(), 0.0, metrics
