"""chat.py --input: the rows of a file, answered as chat answers them; killed, shared, resumed."""
import json
import os
import re
import subprocess
import sys
import types

import pytest

import chat
import eval
from evals import predictions, vllm_answers
from generate import Sampling
from runtime.run import Run
from tests.common import ROOT, load_argv, read_jsonl, refusal

TINY = f"model_name_or_path={ROOT / 'models/tiny'}"
QUESTIONS = ["Who are you?", "What colour is the sky?", "What is 7 + 8?", "你叫什么名字？",
             "What is 3 + 4?", "Say something.", "Who made you?"]


@pytest.fixture
def rows(tmp_path):
    """A file of prompts: some as text, some as messages."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": question, "label": "!"} if number % 2 else
             {"messages": [{"role": "user", "content": question}]}
             for number, question in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answer(rows, output, *more):
    chat.main([TINY, "use_cpu=true", f"input={rows}", f"output={output}", "max_new_tokens=12",
               "disable_tqdm=true", *more])
    return read_jsonl(output)


def test_the_answers_are_those_of_chat(rows, tmp_path, capsys):
    found = answer(rows, tmp_path / "answers.jsonl", "do_sample=false")
    assert [row["label"] for row in found] == ["", "!"] * 3 + [""]
    assert re.search(r"\d+ tokens in .* tokens/s", capsys.readouterr().out)
    for question, row in zip(QUESTIONS[:3], found):
        chat.main([TINY, "use_cpu=true", "do_sample=false", "max_new_tokens=12",
                   f"prompt={question}"])
        assert capsys.readouterr().out == row["predict"] + "\n"
        assert question in row["prompt"]


def test_a_killed_run_and_several_processes_write_the_same_file(
        rows, tmp_path, monkeypatch, capsys):
    """Killed after three answers; then two processes share the rest of the rows."""
    sampled = ["do_sample=true", "temperature=1.5", "top_p=1", "per_device_eval_batch_size=2"]
    want = answer(rows, tmp_path / "whole.jsonl", *sampled)
    assert len({row["predict"] for row in want}) > 4
    honest = predictions.answer_all

    def dying(*args, **kwargs):
        for number, row in enumerate(honest(*args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield row

    output = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "answer_all", dying)
        with pytest.raises(KeyboardInterrupt):
            answer(rows, output, *sampled)
    assert len(read_jsonl(tmp_path / "answers.jsonl.partial")) == 4     # the key, three answers
    with open(tmp_path / "answers.jsonl.partial", "a") as file:
        file.write('{"row": 6, "tok')
    command = [sys.executable, str(ROOT / "chat.py"), TINY, "use_cpu=true", f"input={rows}",
               f"output={output}", "max_new_tokens=12", *sampled]
    other = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={
        **os.environ, "OMP_NUM_THREADS": "1", "RANK": "1", "WORLD_SIZE": "2"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = answer(rows, output, *sampled)
    assert other.wait(timeout=300) == 0
    assert "3 of 7 answers are kept" in capsys.readouterr().out
    assert found == want and not list(tmp_path.glob("*.partial*"))


def test_the_evaluation_after_a_training_of_several_ranks_waits_for_none(tmp_path, monkeypatch):
    """The other ranks have ended when eval.py takes the place of the first."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    monkeypatch.setattr(os, "execv", lambda *command: shares.append(predictions.process_share()))
    run = types.SimpleNamespace(setup=types.SimpleNamespace(lora=None), output=tmp_path)
    Run.start_predictions(run, ["my.yaml"])
    assert shares == [(0, 1)]


@pytest.mark.parametrize("line, words", [
    ("[1]", "line 2: a row is"), ("{", "line 2"), ('{"prompt": "a", "messages": []}', "a row is"),
    ('{"messages": []}', "not empty"), ('{"messages": [{"role": "assistant", "content": ""}]}',
                                        "turn 1"),
    ('{"prompt": "a", "promt": 1}', "'promt' is not read"),
    (json.dumps({"prompt": "long " * 3000}), "row 2: the prompt has"),
])
def test_a_row_that_cannot_be_answered_is_named_before_any_is(rows, tmp_path, line, words):
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[0], line, lines[1]]))
    with pytest.raises(ValueError, match=words):
        answer(rows, tmp_path / "answers.jsonl")
    assert not list(tmp_path.glob("answers*"))


def test_input_and_output_belong_together(tmp_path):
    assert "output_dir" in refusal("model_name_or_path=m", "dataset=d", "output=saves/a",
                                   script="train")
    assert "go together" in refusal("model_name_or_path=m", "input=a", script="chat")
    assert "the one or the other" in refusal("model_name_or_path=m", "input=a", "output=b",
                                             "prompt=c", script="chat")


# ---- vLLM ----------------------------------------------------------------------------------------


def test_without_vllm_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vllm is not installed.*answers by itself"):
        eval.main([TINY, f"output_dir={tmp_path}", "eval_dataset=identity", "do_predict=true",
                   "infer_backend=vllm"])
    assert "eval.py" in refusal("model_name_or_path=m", "infer_backend=vllm", script="serve")


def test_what_vllm_is_asked(monkeypatch):
    """A package of that name that records its calls, with the names of vLLM's API."""
    asked = {}

    class LLM:
        def __init__(self, **options):
            asked["options"] = options

        def generate(self, prompts, params, lora_request=None):
            asked["prompts"], asked["params"] = prompts, params
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=(7, 8))])
                    for _ in prompts]

    module = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **values: values)
    monkeypatch.setitem(sys.modules, "vllm", module)
    side = predictions.Side("base", ROOT / "models/tiny", [])
    config = load_argv("max_new_tokens=5", "seed=3")
    sampling = Sampling(do_sample=True, temperature=0.5, top_k=0)
    rows = list(vllm_answers.answers_of_vllm(side)(config, None, [(4, [1, 2]), (9, [3])], {7},
                                                   sampling))
    assert rows == [(4, [7, 8]), (9, [7, 8])]
    assert asked["options"]["max_model_len"] == 7 and not asked["options"]["enable_lora"]
    assert asked["prompts"] == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    first, second = asked["params"]
    assert (first["temperature"], first["top_k"], first["stop_token_ids"]) == (0.5, -1, [7])
    assert first["seed"] != second["seed"] and first["max_tokens"] == 5
