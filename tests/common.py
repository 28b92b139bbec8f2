"""What the tests share: the folders of recorded fixtures, and small helpers. It imports no torch.

Next: tiny_models.py, and any test_*.py; each tests the module of the same name.
"""
import json
import os
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("POCKET_SHARED", ROOT.parent / "shared"))
GOLDEN = SHARED / "golden"
CURVES = GOLDEN / "curves"
SDPA_ON_CPU = ("sdpa-flash", "sdpa-math")       # the kernels of SDPA that need no GPU
LLAMA3_8B = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)

# RUN_SLOW=1: also what takes long, whole runs and further cases of what other tests show
RUN_SLOW = bool(os.environ.get("RUN_SLOW"))
slow = pytest.mark.skipif(not RUN_SLOW, reason="takes long: RUN_SLOW=1 python -m pytest runs it")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(),
                                  reason=f"the recorded fixtures are not here ({SHARED})")


def usual(cases, *names):
    """The cases of these names, which are always tested; with RUN_SLOW=1 all of them.

    cases: a dict {name: case}, or a list of names or of tuples that begin with a name.
    """
    if RUN_SLOW:
        return cases
    if isinstance(cases, dict):
        return {name: cases[name] for name in names}
    named = {case if isinstance(case, str) else case[0]: case for case in cases}
    return [named[name] for name in names]


def some(cases) -> list:
    """Every third case; with RUN_SLOW=1 all of them."""
    return list(cases) if RUN_SLOW else list(cases)[::3]


def read_jsonl(path):
    """All rows of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def load_argv(*argv, script="config"):
    """The Config of a command line; script "config" requires no key."""
    from settings.load_config import load_config
    return load_config(list(argv), script)


def refusal(*argv, script="config"):
    """The message of the error that this command line raises."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_argv(*argv, script=script)
    return str(caught.value)


def message_of(function, *arguments):
    """The message of the ValueError that a call ends with."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    return str(caught.value)


def losses_in(printed):
    """{model: (loss, share of tokens)} of the table that merge.py prints, and its title."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("losses"))
    rows = [line.split() for line in lines[first + 2:first + 6] if line.startswith(" " * 10)]
    table = {name: (float(loss), float(same.rstrip("%")) / 100) for name, loss, same in rows}
    return table, lines[first]


def run_recorded(case, output, monkeypatch, *overrides):
    """Run train.py on a recorded case's own config.yaml; returns trainer_state.json."""
    import train
    monkeypatch.chdir(CURVES / case)
    argv = ["config.yaml", f"output_dir={output}", "plot_loss=false", "disable_tqdm=true"]
    if case == "sft_packing":
        argv.append("neat_packing=false")       # see docs/differences.md
    train.main([*argv, *overrides])
    return json.loads((output / "trainer_state.json").read_text())


def leave_with_parent():
    """End this rank when the launcher that started it is gone, for whatever reason."""
    def watch(parent):
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(9)

    threading.Thread(target=watch, args=[os.getppid()], daemon=True).start()
