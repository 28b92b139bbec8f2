"""errors.py: a message for a user's mistake, a traceback for a bug."""

import errno
import os
import subprocess
import sys

import pytest

import errors
from errors import bytes_in_words
from tests.common import ROOT, usual


def test_did_you_mean_names_the_most_similar_one():
    assert errors.did_you_mean("lora_alfa", ["lora_rank", "lora_alpha"]) == (
        " (did you mean 'lora_alpha'?)"
    )
    assert errors.did_you_mean("qqqqqq", ["lora_rank", "lora_alpha"]) == ""
    assert errors.nearest_name("lma", iter(["llama", "qwen"])) == "llama"
    assert errors.nearest_name("lmxx", ["llama"]) is None
    assert errors.nearest_name("lmxx", ["llama"], similarity=0.4) == "llama"


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("x.yaml: wrong"), 1, "error: x.yaml: wrong\n"),
        (FileNotFoundError("no m"), 1, "error: no m\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            1,
            "error: out: Permission denied\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "from", None, "to"),
            1,
            "error: to: Permission denied\n",
        ),
        (
            UnicodeEncodeError("ascii", "ü.json", 0, 1, ""),
            1,
            "error: 'ü.json' cannot be written in the encoding ascii: set PYTHONUTF8=1\n",
        ),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_run_script_prints_one_line_for_a_users_mistake(capsys, monkeypatch, error, code, text):
    monkeypatch.delenv("POCKET_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        errors.run_script(raising(error))
    assert stopped.value.code == code and capsys.readouterr().err == text


def test_run_script_has_a_message_for_a_full_disk(capsys):
    with pytest.raises(SystemExit):
        errors.run_script(
            raising(OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"))
        )
    message = capsys.readouterr().err
    assert (
        message.startswith("error: out/model.safetensors: no space left on the disk")
        and "output_dir" in message
    )


def test_a_file_that_is_too_large_has_a_message():
    message = errors.error_message(OSError(errno.EFBIG, "File too large"))
    assert message.startswith("a file is larger than its disk") and "FAT32: 4 GB" in message


def test_run_script_shows_the_traceback_of_a_bug_and_on_request(monkeypatch):
    with pytest.raises(KeyError):
        errors.run_script(raising(KeyError("bug")))
    monkeypatch.setenv("POCKET_TRACEBACK", "1")
    with pytest.raises(ValueError):
        errors.run_script(raising(ValueError("wrong")))


# ---- packages that are missing ------------------------------------------------------------------

BLOCK = """
import os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == os.environ["BLOCKED"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
RUNS = {
    "train.py": ["configs/tiny_lora_sft.yaml", "dry_run=true", "output_dir=OUT"],
    "chat.py": ["model_name_or_path=models/tiny", "prompt=hi"],
    "merge.py": ["model_name_or_path=models/tiny", "export_dir=OUT"],
    "eval.py": ["configs/tiny_lora_eval.yaml", "output_dir=OUT"],
    "runtime.preview": ["configs/tiny_lora_sft.yaml"],
    "checkpoint.show": ["models/tiny"],
    "text.tokenizer": ["models/tiny", "hi"],
    "fast.attention_picker": [],
    "fast.matmul": [],
    "methods.fp8": [],
    "methods.quant": [],
    "runtime.throughput": [],
}
MISSING = [("torch", script) for script in RUNS if script != "text.tokenizer"]
MISSING += [(package, script) for package in ("tqdm", "tokenizers")
            for script in usual(["train.py", "chat.py", "merge.py", "eval.py", "runtime.preview"],
                                "train.py")]
MISSING += [("yaml", "train.py"), ("yaml", "eval.py"), ("tokenizers", "text.tokenizer")]


@pytest.mark.parametrize("package, script", MISSING)
def test_a_missing_package_is_a_sentence_with_the_command(package, script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    argv = [argument.replace("OUT", str(tmp_path / "out")) for argument in RUNS[script]]
    command = [script] if script.endswith(".py") else ["-m", script]
    done = subprocess.run(
        [sys.executable, *command, *argv], cwd=ROOT, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "BLOCKED": package, "PYTHONPATH": str(tmp_path)})
    name = {"yaml": "PyYAML"}.get(package, package)
    assert done.returncode == 1
    assert f"error: the package {name} is not installed for {sys.executable}. " in done.stderr
    assert "-m pip install -r requirements.txt" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("count, words", [
    (0, "0 bytes"), (999, "999 bytes"), (123_456, "120.6 KiB"), (2e6, "1.907 MiB"),
    (7e10, "65.19 GiB"),
])
def test_sizes_have_a_unit_that_shows_them(count, words):
    assert bytes_in_words(count) == words


def test_a_word_that_would_fill_the_screen_is_shortened(capsys):
    with pytest.raises(SystemExit):
        errors.run_script(raising(ValueError(f"config.json: the name {'x' * 5000} is unknown")))
    message = capsys.readouterr().err
    assert message == f"error: config.json: the name {'x' * 500}… is unknown\n"
