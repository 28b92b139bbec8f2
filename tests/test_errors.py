"""errors.py: a message for a user's mistake, a traceback for a bug."""

import errno

import pytest

import errors


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


def test_run_script_shows_the_traceback_of_a_bug_and_on_request(monkeypatch):
    with pytest.raises(KeyError):
        errors.run_script(raising(KeyError("bug")))
    monkeypatch.setenv("POCKET_TRACEBACK", "1")
    with pytest.raises(ValueError):
        errors.run_script(raising(ValueError("wrong")))
