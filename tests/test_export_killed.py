"""Exports that end in the middle: nothing half-written has the final name, a second run succeeds.

Each format is killed by SIGKILL in a forked process, and meets a full disk.
"""
import errno
import multiprocessing
import os
import signal
import sys

import pytest
import torch

import merge
from checkpoint.files import find_checkpoint
from exporting.export import Export
from exporting.gguf_export import GGUFExport
from exporting.gptq_export import GPTQExport
from tests.tiny_models import adapter_with, base_with, write_grouped

SIZES = dict(hidden_size=128, intermediate_size=128, head_dim=16, torch_dtype="float16")
FORMATS = ("none", "gguf", "gguf-lora", "peft", "fp8", "w4a16", "bnb-nf4", "base", "gptq")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base, the same in GPTQ's format, and an adapter."""
    folder = tmp_path_factory.mktemp("bases")
    dense = base_with(folder / "dense", torch.float16, **SIZES)
    write_grouped(dense, folder / "gptq")
    adapter_with(folder / "adapter", dense)
    return folder


def export(bases, out, kind):
    """Write the export of this kind."""
    if kind == "gptq":
        rows = torch.arange(3, 35).view(2, 16)
        merge.merge_checkpoint(bases / "dense", [], out, dtype=torch.float16,
                               export=GPTQExport(bases / "dense", rows, 4, "cpu"))
        return
    base = bases / ("gptq" if kind == "base" else "dense")
    merge.main([f"model_name_or_path={base}", f"adapter_name_or_path={bases / 'adapter'}",
                f"export_dir={out}", *([f"export_format={kind}"] if kind != "none" else [])])


def after(count, act):
    """A function that calls `act` from its count-th call on."""
    calls = []

    def called():
        calls.append(None)
        if len(calls) >= count:
            act()
    return called


def break_writing(monkeypatch, act):
    """Let `act` happen in the middle of the weights of whatever is written."""
    hit = after(4, act)
    for kind in (Export, GGUFExport):
        plain = kind.write

        def write(self, folder, read, shard_bytes, progress, plain=plain):
            def counted(nbytes):
                hit()
                progress(nbytes)
            plain(self, folder, read, shard_bytes, counted)

        monkeypatch.setattr(kind, "write", write)

    def saved(*arguments):
        arguments[1].joinpath("adapter_model.safetensors").write_bytes(b"half")
        act()

    monkeypatch.setattr("runtime.adapter_export.save_adapter", saved)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_killed_export_leaves_nothing_under_its_name(kind, bases, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        break_writing(patched, die)
        child = multiprocessing.get_context("fork").Process(
            target=export, args=(bases, out, kind))
        child.start()
        child.join(60)
    assert child.exitcode == -signal.SIGKILL and not out.exists()
    left, = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    export(bases, out, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert find_checkpoint(str(out)) == out


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_leaves_nothing(kind, bases, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        break_writing(patched, full_disk)
        with pytest.raises(OSError, match="No space left"):
            export(bases, tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []
    export(bases, tmp_path / "out", kind)
    assert any((tmp_path / "out").iterdir())
