"""The device of a run; torch is imported here first, guarded against a fault of ROCm builds.

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
    """`with guard_amdsmi(): import torch` keeps torch.cuda.device_count() working on ROCm and DCU
    machines.

    torch for ROCm before 2026 asks the package amdsmi for the number of cards when pynvml is
    installed (DeepSpeed brings it), and ends in "NameError: name 'amdsmi' is not defined" where
    amdsmi is not (pytorch issue 133259). Hiding pynvml while torch is imported makes it ask the
    runtime instead; where torch came first, a flag of torch does so."""
    hide = (
        not {"torch", "pynvml"} & set(sys.modules)
        and not importlib.util.find_spec("amdsmi")
        and is_rocm_build()
    )
    if hide:
        # `import pynvml` now raises ModuleNotFoundError, for which torch is prepared
        sys.modules["pynvml"] = None
    try:
        yield
    finally:
        if hide:
            del sys.modules["pynvml"]
    torch = sys.modules["torch"]
    if (
        torch.version.hip
        and not hasattr(torch.cuda, "amdsmi")
        and not hasattr(torch.cuda, "_HAS_AMDSMI")
    ):
        torch.cuda._HAS_PYNVML = False


def is_rocm_build():
    """Whether the installed torch is made for ROCm: read from its version.py, as torch must not be
    imported yet.
    """
    version = (
        Path(importlib.util.find_spec("torch").origin)
        .with_name("version.py")
        .read_text(encoding="utf-8")
    )
    return re.search(r"^hip\b[^=\n]*=\s*['\"]", version, re.MULTILINE) is not None


with guard_amdsmi():  # hence before every other import of torch
    import torch


def pick_device(use_cpu=False):
    """cuda (NVIDIA, AMD, Hygon) if there is one, else Apple's mps, else the CPU. Under torchrun,
    LOCAL_RANK's card.

    Raises ValueError when CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES names a card and torch sees
    none: a run that goes on for days on the CPU is not what was meant."""
    if use_cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    asked = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("HIP_VISIBLE_DEVICES")
    if asked not in (None, "", "-1"):
        raise ValueError(
            f"a GPU was asked for (…_VISIBLE_DEVICES={asked}), but torch {torch.__version__} sees "
            "none: "
            "check the driver and that torch is a CUDA or ROCm build, or set use_cpu: true"
        )
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
