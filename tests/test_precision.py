"""runtime/precision.py: loss scaling, and float16 overflow in the first batch."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from losses import SFTObjective
from methods.quant import QuantFormat
from runtime.precision import LossScale, Precision, check_first_batch
from tests.common import CURVES, needs_shared


# ---- what a user may get wrong ----


def first_step(batch):
    return SimpleNamespace(batches=[batch.to("cpu")])


def precision_of(model):
    return Precision(torch.float16, torch.device("cpu"), model, adapters_only=True)


@needs_shared
def test_float16_overflow_is_named(tmp_path, monkeypatch):
    """A layer whose output exceeds float16's range: module, value and remedy are in the message."""
    from checkpoint.load import load_model
    from data import Example, collate
    import numpy as np
    model = load_model(CURVES / "tiny_llama3", torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data *= 3e4
    ids = np.arange(8, dtype=np.int32)
    batch = collate([Example(ids, ids, [8])])
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj overflows in torch.float16(.|\n)*bf16: true"
    ):
        check_first_batch(model, SFTObjective(), first_step(batch), precision_of(model))


# ---- a base in 4 or 8 bits -----------------------------------------------------------------------


@needs_shared
def test_float16_overflow_of_a_quantized_layer_is_named(tmp_path):
    import numpy as np
    from checkpoint.load import load_model
    from data import Example, collate
    model = load_model(CURVES / "tiny_llama3", torch.float16,
                       quant_format=QuantFormat("nf4", nested=0))
    model.model.layers[1].mlp.up_proj.weight.absmax *= 3e4
    batch = collate([Example(np.arange(8, dtype=np.int32), np.arange(8, dtype=np.int32), [8])])
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj overflows in torch.float16(.|\n)*bf16: true"
    ):
        check_first_batch(model, SFTObjective(), first_step(batch), precision_of(model))


# ---- NEFTune and loss scaling ----


def test_loss_scale_backs_off_and_recovers():
    scale, p = LossScale(2.0 ** 10), nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1024.0, 2048.0, -512.0])
    scale.unscale([p, nn.Parameter(torch.ones(1))])                        # one has no gradient
    scale.unscale([nn.Parameter(torch.ones(1))])            # a stage of a pipeline may have none
    assert torch.equal(p.grad, torch.tensor([1.0, 2.0, -0.5])) and scale.update(True)
    assert not scale.update(False) and scale.value == 2.0 ** 9
    assert all(scale.update(True) for _ in range(1999)) and scale.value == 2.0 ** 9
    assert scale.update(True) and scale.value == 2.0 ** 10
