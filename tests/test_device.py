"""runtime/device.py: the GPU, or the CPU where the config or the machine says so."""
import pytest
import torch

from runtime import device


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.pick_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert device.pick_device(use_cpu=True).type == "cpu"
    with pytest.raises(ValueError, match="a GPU was asked for.*use_cpu: true"):
        device.pick_device()
