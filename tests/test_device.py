"""runtime/device.py: the device of a run, and torch for ROCm without amdsmi.

The guard is tested on the code of torch 2.4 that raises the NameError.
"""
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import device
from tests.common import ROOT, usual

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.pick_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert device.pick_device(use_cpu=True).type == "cpu"
    with pytest.raises(ValueError, match="requests a GPU.*use_cpu: true"):
        device.pick_device()


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "max 100000\n"}, None),
    ({"cpu.max": "20000 100000\n"}, 1), ({"cpu.max": "a b c"}, None), ({}, None),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
])
def test_cores_of_a_container(files, cores, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert device.cores_of_container(tmp_path) == cores
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")        # so that it is put back afterwards
        monkeypatch.delenv(name)
    device.share_cores(tmp_path)
    assert os.environ.get("OMP_NUM_THREADS") == (cores and str(cores))
    assert os.environ["GOMP_SPINCOUNT"] == device.SPINS


def test_what_the_user_set_is_kept(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("100000 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    device.share_cores(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "7" and "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("script", usual(["train", "chat", "merge", "eval"], "train"))
def test_it_is_set_before_torch_is_imported(script):
    """libgomp reads it once, when torch loads it."""
    code = (f"import sys, {script}\n"
            "import builtins, os\n"
            "assert os.environ['GOMP_SPINCOUNT'] == '2000'\n")
    watch = ("import builtins, os\n"
             "real = builtins.__import__\n"
             "def watched(name, *rest):\n"
             "    assert name != 'torch' or 'GOMP_SPINCOUNT' in os.environ, 'too late'\n"
             "    return real(name, *rest)\n"
             "builtins.__import__ = watched\n")
    env = {name: value for name, value in os.environ.items()
           if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", watch + code], cwd=ROOT, env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr


# ---- pages ---------------------------------------------------------------------------------------


def page_faults(enabled: str) -> int:
    """Page faults of filling a tensor of 64 MiB in a process of its own."""
    code = ("import runtime.device, resource, torch\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "before = faults(); torch.zeros(2**24); print(faults() - before)\n")
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          env=env | ({"THP_MEM_ALLOC_ENABLE": enabled} if enabled else {}))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif("[never]" in (HUGE_PAGES.read_text() if HUGE_PAGES.is_file() else "[never]"),
                    reason="this system has no pages of 2 MiB")
def test_large_tensors_have_large_pages_unless_the_user_says_otherwise():
    small = 2**26 // mmap.PAGESIZE
    assert page_faults("") < small / 8
    if "[always]" not in HUGE_PAGES.read_text():
        assert page_faults("0") >= small


# ---- memory of a GPU -----------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """A CUDA build of torch that finds a card; the events are its calls."""
    events = []
    for name in device.ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.1")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: events.append(
        ("set_device", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))))
    monkeypatch.setattr(torch, "empty", lambda n, device: events.append("empty"))
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", events.append)
    yield events
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)         # before monkeypatch restores it


def test_segments_grow_unless_the_user_has_chosen(card, monkeypatch):
    """The setting must be there before the first use of the card, which is set_device."""
    device.pick_device()
    assert card == [("set_device", "expandable_segments:True"), "empty"]
    for name in device.ALLOCATOR_SETTINGS:
        card.clear()
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        monkeypatch.setenv(name, "max_split_size_mb:128")
        device.pick_device()
        assert len(card) == 1 and "expandable" not in str(card)
        monkeypatch.delenv(name)


def test_segments_do_not_grow_on_rocm_or_where_the_driver_refuses(card, monkeypatch):
    def refused(n, device):
        raise RuntimeError("CUDA driver error: operation not supported")
    monkeypatch.setattr(torch, "empty", refused)
    device.pick_device()
    assert card[1:] == ["expandable_segments:False"]
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    card.clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    device.pick_device()
    assert card == [("set_device", None)]


# ---- ROCm, DCU, amdsmi ---------------------------------------------------------------------------

FAKE_TORCH = {  # the part of torch 2.4 for ROCm that fails
    "__init__.py": "from . import version, cuda\n",
    "version.py": "from typing import Optional\n"
                  "__version__ = '2.4.1'\ncuda: Optional[str] = None\nhip: Optional[str] = '5.7'\n",
    "cuda.py": "_HAS_PYNVML = False\n"
               "try:\n"
               "    import pynvml\n"
               "    _HAS_PYNVML = True\n"
               "except ModuleNotFoundError:\n"
               "    pass\n"
               "def device_count():\n"
               "    if not _HAS_PYNVML:\n"
               "        return 8\n"
               "    return amdsmi.amdsmi_init()\n",
}


@pytest.fixture
def rocm_torch(tmp_path, monkeypatch):
    """`import torch` gives a ROCm torch with pynvml and without amdsmi; the real torch returns
    afterwards."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "pynvml.py").write_text("")
    for name, text in FAKE_TORCH.items():
        (tmp_path / "torch" / name).write_text(text)
    real = {name: module
            for name, module in sys.modules.items() if name.split(".")[0] in ("torch", "pynvml")}
    for name in real:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "pynvml")]:
        del sys.modules[name]
    sys.modules.update(real)


def test_amdsmi_name_error_happens_without_the_guard(rocm_torch):
    import torch as rocm
    with pytest.raises(NameError, match="amdsmi"):
        rocm.cuda.device_count()


def test_guard_before_torch(rocm_torch):
    assert device.is_rocm_build()
    with device.guard_amdsmi():
        import torch as rocm
    assert rocm.cuda.device_count() == 8
    import pynvml                                            # hidden only while torch was imported
    assert pynvml is not None


def test_guard_after_torch(rocm_torch):
    import torch as rocm
    with device.guard_amdsmi():
        pass
    assert rocm.cuda.device_count() == 8


def test_guard_does_not_change_other_builds(monkeypatch):
    assert device.is_rocm_build() is bool(torch.version.hip)
    monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", True)
    with device.guard_amdsmi():
        pass
    assert torch.cuda._HAS_PYNVML                            # a CUDA or CPU build
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "_HAS_AMDSMI", False, raising=False)
    with device.guard_amdsmi():
        pass
    assert torch.cuda._HAS_PYNVML                            # a torch that distinguishes the two


@pytest.mark.skipif(hasattr(torch.cuda, "_HAS_AMDSMI"),
                    reason="this torch has the fix of its own (torch 2.4 is meant)")
def test_guard_on_the_code_of_torch_2_4(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "5.7")
    monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", True)
    with pytest.raises(NameError, match="amdsmi"):
        torch.cuda._raw_device_count_amdsmi()
    with device.guard_amdsmi():
        pass
    assert torch.cuda._raw_device_count_amdsmi() == -1       # torch then asks the runtime
