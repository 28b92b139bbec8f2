"""The value head of a reward model, in a file beside its adapter or its weights.

Requires: checkpoint/files.py.
Next: methods/reward_model.py.
"""
from pathlib import Path

import torch

from checkpoint.files import open_tensors, save_tensors

VALUE_HEAD = "value_head.safetensors"


def save_value_head(folder, weights: dict[str, torch.Tensor]):
    """Write the head's weights, {TRL's name: parameter}, into a folder."""
    save_tensors(Path(folder) / VALUE_HEAD, weights)


@torch.no_grad()
def read_value_head(folder, weights: dict[str, torch.Tensor]) -> bool:
    """Copy the weights of a folder's head into `weights`; False if the folder has none.

    Raises ValueError for the head of another model.
    """
    path = Path(folder) / VALUE_HEAD
    if not path.is_file():
        return False
    with open_tensors(path) as tensors:
        for name, p in weights.items():
            if name not in tensors.keys() or tensors.get_tensor(name).shape != p.shape:
                raise ValueError(f"{path} has no {name} of shape {list(p.shape)}: it is the value "
                                 "head of another model")
            p.copy_(tensors.get_tensor(name))
    return True
