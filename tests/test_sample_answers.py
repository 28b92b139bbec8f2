"""runtime/sample_answers.py: the same questions before and after training."""
import json
import shutil

import pytest

import chat
import train
from tests.common import CURVES, ROOT, needs_shared, refusal, run_recorded

RECIPE = ["--config", str(ROOT / "configs/tiny_lora_sft.yaml"), "disable_tqdm=true"]


def test_the_first_recipe_shows_its_result(tmp_path, capsys, monkeypatch):
    """Before is the base's answer and after the adapter's, as chat.py gives them."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    train.main([*RECIPE, f"output_dir={out}", "max_steps=3", "logging_steps=1"])
    printed = capsys.readouterr().out
    before, after = (line.split(maxsplit=1)[1] for line in
                     printed.partition("Who are you?\n")[2].splitlines()[:2])
    assert before == "I am Pebble, an assistant made by Pocket Factory."
    greedy = ["do_sample=false", "prompt=Who are you?", "use_cpu=true", "max_new_tokens=64"]
    for answer, more in ((before, ["model_name_or_path=models/tiny"]),
                         (after, [*RECIPE, f"output_dir={out}"])):
        chat.main([*more, *greedy])
        assert " ".join(capsys.readouterr().out.split()) == answer


@needs_shared
def test_questions_change_neither_training_nor_a_resumed_run(tmp_path, monkeypatch, capsys):
    settings = ["max_steps=4", "save_strategy=steps", "save_steps=2", "lora_dropout=0.2",
                "create_new_adapter=true",
                "pin_kernels.attention=plain", "pin_kernels.matmul=torch"]  # not by the clock
    plain = run_recorded("sft_llama3", tmp_path / "plain", monkeypatch, *settings)
    capsys.readouterr()
    asked = run_recorded("sft_llama3", tmp_path / "a", monkeypatch, *settings, "ask=hello")
    shown = capsys.readouterr().out.partition("\nhello\n")[2].splitlines()[:2]
    losses = [[row["loss"] for row in state["log_history"] if "loss" in row]
              for state in (plain, asked)]
    assert losses[0] == losses[1]
    shutil.rmtree(tmp_path / "a/checkpoint-4")
    run_recorded("sft_llama3", tmp_path / "a", monkeypatch, *settings, "ask=hello",
                 "resume_from_checkpoint=true")
    assert capsys.readouterr().out.partition("\nhello\n")[2].splitlines()[:2] == shown
    saved = json.loads((tmp_path / "a/checkpoint-2/trainer_state.json").read_text())
    assert len(saved["resume"]["answers"]) == 1 and len(shown) == 2


@pytest.mark.parametrize("more", [["stage=pt"], ["stage=rm"], ["fsdp=full_shard"]])
def test_where_no_question_can_be_put(more):
    argv = [f"model_name_or_path={CURVES}/tiny_llama3", "dataset=x", "output_dir=o", "ask=a"]
    assert "ask puts questions to a chat model" in refusal(*argv, *more, script="train")
