"""cli.py: which script each command of LLaMA-Factory starts, and with which arguments."""
import os
import subprocess
import sys

import pytest

import cli
from tests.common import ROOT

SETTINGS = ["my.yaml", "learning_rate=1e-4"]


@pytest.fixture
def started(monkeypatch):
    """The command that the script starts; without variables of a launcher."""
    for name in ("RANK", "FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    return commands


@pytest.mark.parametrize("command, script", [("chat", "chat.py"), ("export", "merge.py"),
                                             ("eval", "eval.py"), ("webui", "board.py")])
def test_commands_start_scripts(started, command, script):
    cli.main([command, *SETTINGS])
    assert started == [[sys.executable, str(ROOT / script), *SETTINGS]]


def test_webchat_opens_the_board_at_its_chat(started):
    cli.main(["webchat", "--model_name_or_path", "models/tiny"])
    assert started == [[sys.executable, str(ROOT / "board.py"), "--tab", "chat",
                        "--model_name_or_path", "models/tiny"]]


def test_train_starts_a_process_for_each_gpu(started, monkeypatch):
    script = [str(ROOT / "train.py"), *SETTINGS]
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    cli.main(["train", *SETTINGS])
    assert started.pop() == [sys.executable, *script]

    monkeypatch.setenv("NPROC_PER_NODE", "4")
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    cli.main(["train", *SETTINGS])
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1",
                "--nproc-per-node", "4", "--master-addr", "10.0.0.1", "--master-port", "29500"]
    assert started.pop() == [sys.executable, *launcher, *script]

    monkeypatch.setenv("RANK", "3")                     # torchrun has started this process
    cli.main(["train", *SETTINGS])
    assert started.pop() == [sys.executable, *script]


@pytest.mark.parametrize("arguments, words", [
    (["trian"], "no command (did you mean 'train'?); the commands are train, chat, api"),
])
def test_other_commands_are_sentences(arguments, words):
    run = subprocess.run([sys.executable, "cli.py", *arguments], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 1 and words in run.stderr and "Traceback" not in run.stderr


def test_environment_names_versions():
    run = subprocess.run([sys.executable, "cli.py", "env"], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 0 and "  torch: 2." in run.stdout and "  python: 3." in run.stdout
