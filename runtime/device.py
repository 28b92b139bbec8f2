"""The device of a run, and what must be set before torch is imported, which happens here first.

Threads of a CPU that share cores with other work, large pages of memory, and a guard against a
fault of ROCm builds.

Requires: nothing.
Next: attention.py.
"""
import importlib.util
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

SPINS = "2000"      # how often a waiting thread of OpenMP looks before it sleeps: microseconds


def share_cores(cgroup: Path = Path("/sys/fs/cgroup")):
    """Set how many threads OpenMP starts and how they wait, unless the user has set it.

    At the end of each product threads wait for one another. They spin for a millisecond, by
    default, and take the core from the very thread that they wait for where another program needs
    a core, too: training was many times slower (bench/NOTES.md). And a container that may use 2 of
    64 cores gets 64 threads.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    cores = cores_of_container(cgroup)
    if cores and cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def use_large_pages():
    """Ask torch for pages of 2 MiB in large CPU tensors, unless the user has decided.

    A new tensor of 64 MiB, such as a chunk of logits, is else 16,384 pages that the kernel clears
    one by one when they are first touched. Without effect where the system has no such pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def cores_of_container(cgroup: Path) -> int | None:
    """Whole cores that the control group of this process may use; None without a limit."""
    try:
        if (cgroup / "cpu.max").is_file():                              # cgroup v2
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = [(cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()
                             for name in ("quota", "period")]
        return max(1, -(-int(quota) // int(period))) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):                    # "max", or another system
        return None


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


share_cores()
use_large_pages()
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
        growing = use_growing_segments()
        torch.cuda.set_device(device)
        if growing:
            try_growing_segments(device)
        return device
    requested = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("HIP_VISIBLE_DEVICES")
    if requested not in (None, "", "-1"):
        raise ValueError(
            f"…_VISIBLE_DEVICES={requested} requests a GPU, but torch {torch.__version__} finds "
            "none: check the driver and that torch is a CUDA or ROCm build, or set use_cpu: true")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# ---- memory of a GPU ----------------------------------------------------------------------------

# where a user gives torch settings for the memory of a GPU; newer releases read the last name too
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_growing_segments() -> bool:
    """Ask torch for segments that grow, before it is used on a GPU; whether that was done.

    Micro-batches differ in length. In segments of fixed size each length leaves holes that the next
    one does not fit, and a plan that fills the card runs out of memory. Not on ROCm or Windows,
    where torch has no such segments, and not where the user has chosen settings.
    """
    chosen = any(os.environ.get(name) for name in ALLOCATOR_SETTINGS)
    if chosen or torch.version.cuda is None or sys.platform != "linux":
        return False
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return True


def try_growing_segments(device: torch.device):
    """Allocate once; where the driver refuses (some virtual cards), return to fixed segments."""
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        del os.environ["PYTORCH_CUDA_ALLOC_CONF"]
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


# what libraries say when the memory of a GPU is full; torch raises OutOfMemoryError for its own
FULL = ("can't allocate memory", "CUDA error: out of memory", "CUDA driver error: out of memory",
        "HIP error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "HIPBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether this is an error of torch, a library or the system about too little memory."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in FULL)
