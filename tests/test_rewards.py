"""methods/rewards.py: reward functions that work, raise, hang, die or are not there."""
import math

import pytest

from methods.rewards import Rewards, load_function, missing_function
from tests.common import ROOT, refusal

ROW = {"where": "rows.jsonl row 7", "prompt": "What is 3 + 4?",
       "row": {"messages": [{"role": "user", "content": "What is 3 + 4?"},
                            {"role": "assistant", "content": "3 + 4 = 7."}]}}
FUNCTIONS = '''
import os, time
print("imported")
def score(prompt, answer, row):
    print("called")
    return len(prompt) + 10 * len(answer) + 100 * len(row["messages"])
def by_answer(prompt, answer, row):
    if answer == "raise":
        return {}["missing"]
    if answer == "hang":
        time.sleep(60)
    if answer == "spin":
        while True:
            pass
    if answer == "die":
        os._exit(3)
    return {"nan": float("nan"), "word": "high", "true": True, "none": None}.get(answer, 0.5)
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scores.py"
    path.write_text(FUNCTIONS)
    return path


def test_functions_get_prompt_answer_and_row(file):
    rewards = Rewards([f"{file}:score", f"{file}:by_answer"], [1.0, 2.0], timeout=5)
    assert rewards.names == ["score", "by_answer"]
    parts = rewards.score(ROW, "abc")
    assert parts == [14 + 30 + 200, 0.5]
    assert rewards.total(parts) == 245
    assert rewards.score(ROW, "true")[1] == 1
    rewards.stop()


@pytest.mark.parametrize("answer, words", [
    ("raise", "it raised KeyError: 'missing' in line 9 of"),
    ("nan", "it returned nan, not a finite number"),
    ("word", "it returned 'high', not a number"),
    ("none", "it returned None, not a number"),
    ("hang", "it took more than 0.5 s (reward_timeout)"),
    ("spin", "it took more than 0.5 s (reward_timeout)"),
    ("die", "it ended its process (exit code 3)"),
])
def test_a_reward_that_fails_is_a_sentence_with_the_row_and_the_next_one_works(
        file, answer, words, capsys):
    rewards = Rewards([f"{file}:by_answer"], None, timeout=0.5)
    assert math.isnan(rewards.score(ROW, answer)[0])
    rewards.report(unscored=1)
    said = capsys.readouterr().err
    assert words in said and "rows.jsonl row 7" in said and repr(answer) in said
    assert rewards.score(ROW, "fine") == [0.5]
    rewards.stop()


@pytest.mark.parametrize("name, words", [
    ("scores.py:scor", "has no function scor (did you mean score?)"),
    ("scores.py", "is not FILE:FUNCTION"),
    ("scorse.py:score", "there is no file"),
    ("broken.py:score", "cannot be imported: SyntaxError"),
])
def test_a_function_that_is_not_there(file, name, words, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "broken.py").write_text("def score(:\n")
    with pytest.raises((ValueError, FileNotFoundError), match="^reward: ") as caught:
        Rewards([name], None, timeout=5)
    assert words in str(caught.value)


@pytest.mark.parametrize("text, function, found", [
    ("def score(): pass", "score", True),
    ("from other import score", "score", True),
    ("import other as score", "score", True),
    ("score = make()", "score", True),
    ("if fast:\n    def score(): pass", "score", True),
    ("from other import *", "anything", True),
    ("def scores(): pass", "score", False),
    ("def score(:", "score", False),
])
def test_a_function_is_looked_for_without_running_its_file(text, function, found, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text + "\nraise SystemExit\n")
    assert (missing_function(f"{file}:{function}") == "") == found


@pytest.mark.parametrize("settings, words", [
    ((), "stage: grpo needs reward"),
    (("reward=data/rewards.py:exact_match", "reward_weights=1,2"), "2 numbers for 1 rewards"),
    (("reward=data/rewads.py:exact_match",), "there is no file 'data/rewads.py'"),
    (("reward=data/rewards.py:exact_mach",), "data/rewards.py has no function exact_mach (did "
                                             "you mean exact_match?)"),
    (("reward=data/rewards.py:exact_match", "lora_dropout=0.1"), "lora_dropout"),
    (("reward=data/rewards.py:exact_match", "temperature=0"), "temperature above 0"),
])
def test_contradictions_are_said_at_the_start(settings, words):
    assert words in refusal("model_name_or_path=models/tiny", "dataset=tiny_sums",
                            "output_dir=saves/x", "stage=grpo", *settings, script="train")


def test_the_examples():
    row = ROW["row"]
    alpaca = {"instruction": "Add.", "output": "So it is 1,234.5"}
    arithmetic, exact_match, boxed, short_answer = (
        load_function(f"{ROOT / 'data/rewards.py'}:{name}")
        for name in ("arithmetic", "exact_match", "boxed", "short_answer"))
    assert [arithmetic("", answer, row) for answer in ("7", "3 + 4 = 7.", "-7", "", "8, not 7!")
            ] == [1, 1, 0, 0, 1]
    assert arithmetic("", "1234.50", alpaca) == 1
    assert [exact_match("", answer, row) for answer in (" 3 + 4 = 7.\n", "7")] == [1, 0]
    for without in ({"instruction": "Add."}, {"output": ""}, {"output": None},
                    {"messages": [{"role": "user", "content": "3 + 4 = 7."}]},
                    {"conversations": [{"from": "human", "value": "7"}]}):
        for function in (arithmetic, exact_match):
            with pytest.raises(ValueError, match="no answer of its own"):
                function("", "7", without)
    with pytest.raises(ValueError, match="no number"):
        arithmetic("", "7", {"output": "seven"})
    assert [boxed("", answer, row) for answer in (r"\boxed{7}", "7", r"\boxed{7} \boxed{8}")
            ] == [1, 0, 0]
    assert [short_answer("", "x" * length, row) for length in (0, 40, 140, 900)] == [1, 1, 0.5, 0]
