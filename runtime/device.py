"""The device of a run. torch is imported here first, with a guard against a fault of ROCm builds.

Requires: nothing.
Next: attention.py.
"""
import importlib.util
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def guard_amdsmi():
    """`with guard_amdsmi(): import torch` makes torch.cuda.device_count() work on ROCm and DCU.

    If pynvml is installed (DeepSpeed brings it), torch for ROCm before 2026 asks the package amdsmi
    for the number of cards. Without amdsmi this ends in "NameError: name 'amdsmi' is not defined"
    (pytorch issue 133259). While pynvml is hidden during the import, torch asks the runtime
    instead. If torch was imported before, a flag of torch has the same effect.
    """
    already_imported = {"torch", "pynvml"} & set(sys.modules)
    has_amdsmi = importlib.util.find_spec("amdsmi")
    hide = not already_imported and not has_amdsmi and is_rocm_build()
    if hide:
        sys.modules["pynvml"] = None        # `import pynvml` raises the error that torch catches
    try:
        yield
    finally:
        if hide:
            del sys.modules["pynvml"]
    torch = sys.modules["torch"]
    has_smi = hasattr(torch.cuda, "amdsmi") or hasattr(torch.cuda, "_HAS_AMDSMI")
    if torch.version.hip and not has_smi:
        torch.cuda._HAS_PYNVML = False


def is_rocm_build() -> bool:
    """Whether the installed torch is built for ROCm: see its version.py, without importing it."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    version = (folder / "version.py").read_text(encoding="utf-8")
    return re.search(r"^hip\b[^=\n]*=\s*['\"]", version, re.MULTILINE) is not None


with guard_amdsmi():        # so this file must be imported before any other that imports torch
    import torch


def pick_device(use_cpu: bool = False) -> torch.device:
    """cuda (NVIDIA, AMD, Hygon) if available, else Apple's mps, else cpu; with torchrun, by rank.

    Raises ValueError if CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES names a card and torch finds
    none, rather than train for days on the CPU.
    """
    if use_cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    requested = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("HIP_VISIBLE_DEVICES")
    if requested not in (None, "", "-1"):
        raise ValueError(
            f"…_VISIBLE_DEVICES={requested} requests a GPU, but torch {torch.__version__} finds "
            "none: check the driver and that torch is a CUDA or ROCm build, or set use_cpu: true")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
