"""LLaMA-Factory's command line: `llamafactory-cli train my.yaml` is `python cli.py train my.yaml`.

    python cli.py train|chat|api|export|eval  my.yaml key=value ...
    python cli.py webui|webchat                 the web board, see docs/board.md
    python cli.py env                           versions and devices, for a bug report
    python cli.py version

It starts train.py, chat.py, serve.py, merge.py, eval.py or board.py with the same arguments. With
several GPUs, or with FORCE_TORCHRUN=1, train starts one process for each, as LLaMA-Factory does,
which NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR and MASTER_PORT extend to several hosts.

Requires: errors.py.
Next: train.py.
"""
import os
import sys
from pathlib import Path

from errors import did_you_mean, run_script

ROOT = Path(__file__).resolve().parent
SCRIPTS = {"train": "train.py", "chat": "chat.py", "api": "serve.py", "export": "merge.py",
           "eval": "eval.py", "webui": "board.py", "webchat": "board.py --tab chat"}
KNOWN = (*SCRIPTS, "env", "version")


def main(argv: list[str]):
    command = argv[0] if argv else "help"
    if command in ("help", "-h", "--help"):
        print(__doc__.split("\n\nRequires")[0])
    elif command in SCRIPTS:
        start(SCRIPTS[command], argv[1:])
    elif command == "version":
        print(first_change())
    elif command == "env":
        print_environment()
    else:
        raise ValueError(f"cli.py: {command!r} is no command{did_you_mean(command, KNOWN)}; the "
                         f"commands are {', '.join(KNOWN)}")


def start(script: str, arguments: list[str]):
    """Replace this process by the script. It may have arguments of its own."""
    script, *own = script.split()
    command = [sys.executable, str(ROOT / script), *own, *arguments]
    if script == "train.py" and "RANK" not in os.environ:       # else torchrun has started us
        count = processes()
        if count > 1 or os.environ.get("FORCE_TORCHRUN") == "1":
            command[1:1] = ["-m", "torch.distributed.run", *launcher_options(count)]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def processes() -> int:
    """Training processes on this host: one for each GPU that torch sees."""
    if "NPROC_PER_NODE" in os.environ:
        return int(os.environ["NPROC_PER_NODE"])
    import runtime.device       # noqa: F401  makes `import torch` safe on ROCm
    import torch

    return max(1, torch.cuda.device_count())


def launcher_options(count: int) -> list[str]:
    """Arguments of torchrun from LLaMA-Factory's environment variables."""
    get = os.environ.get
    return ["--nnodes", get("NNODES", "1"), "--node-rank", get("NODE_RANK", "0"),
            "--nproc-per-node", str(count), "--master-addr", get("MASTER_ADDR", "127.0.0.1"),
            "--master-port", get("MASTER_PORT", "29500")]


def first_change() -> str:
    """The newest entry of CHANGELOG.md."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    return "Pocket Factory: " + next(line[3:] for line in lines if line.startswith("## "))


def print_environment():
    """Print what a bug report needs."""
    from runtime.report import versions
    import torch

    print(first_change())
    for name, version in {**versions(), "platform": sys.platform,
                          "threads": torch.get_num_threads()}.items():
        print(f"  {name}: {version}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        print(f"  cuda:{index}: {torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of "
              f"{total / 2**30:.1f} GiB free")


if __name__ == "__main__":
    run_script(main)
