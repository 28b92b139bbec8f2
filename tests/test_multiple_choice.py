"""evals/multiple_choice.py: LLaMA-Factory's recorded answers; layouts of MMLU, C-Eval and CMMLU."""
import csv
import importlib
import json
import random
import shutil

import pytest

from evals.multiple_choice import accuracies, find_subjects, read_questions
from tests.common import GOLDEN, needs_shared

evaluation = importlib.import_module("eval")  # keeps the builtin of that name
CURVES = GOLDEN / "curves"
WORDS = (
    "name assistant model water fire sky green colour day week number school friend hello moon "
    "star apple"
).split()
SUBJECTS = {
    "abstract_algebra": ("abstract algebra", "STEM"),
    "world_history": ("world history", "Humanities"),
    "marketing": ("marketing", "Other"),
}
# the answers of LLaMA-Factory 0.9.5's evaluator to the questions of `mmlu` below: tiny_llama3 with
# sft_llama3's adapter, template llama3, without examples and with two (its shuffling of examples
# turned off)
RECORDED = {
    0: {"abstract_algebra": "DDDDBDCDD", "world_history": "DDDDCDDDD", "marketing": "BCDBCDCDD"},
    2: {"abstract_algebra": "DDDDDDCDD", "world_history": "DDDDDDDDD", "marketing": "DDDDDDDDD"},
}


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory):
    """A folder `evaluation` with invented questions in the layout of MMLU's files."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("mc") / "evaluation"
    for split, count in (("dev", 2), ("test", 9)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for name in SUBJECTS:
            with open(folder / "mmlu" / split / f"{name}_{split}.csv", "w", newline="") as file:
                for _ in range(count):
                    row = ['What is the %s of the %s, or "%s"?' % tuple(draw.sample(WORDS, 3))]
                    row += [" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(4)] + [
                        draw.choice("ABCD")
                    ]
                    csv.writer(file).writerow(row)
    names = {
        name: {"name": title, "category": category} for name, (title, category) in SUBJECTS.items()
    }
    (folder / "mmlu/mapping.json").write_text(json.dumps(names))
    return folder


def run_eval(folder, *pairs):
    evaluation.main(
        [
            f"model_name_or_path={CURVES}/tiny_llama3",
            f"adapter_name_or_path={CURVES}/sft_llama3/final",
            "template=llama3",
            "use_cpu=true",
            "disable_tqdm=true",
            f"save_dir={folder}",
            *pairs,
        ]
    )
    return json.loads((folder / "results.json").read_text())


@needs_shared
@pytest.mark.parametrize("shots", RECORDED)
@pytest.mark.parametrize("size", [1, 4])
def test_recorded_answers(mmlu, tmp_path, shots, size):
    found = run_eval(
        tmp_path / "out",
        "task=mmlu_test",
        f"task_dir={mmlu}",
        f"n_shot={shots}",
        f"per_device_eval_batch_size={size}",
    )
    assert {name: "".join(letters.values()) for name, letters in found.items()} == RECORDED[shots]
    percent = json.loads((tmp_path / "out/accuracy.json").read_text())
    assert list(percent) == ["adapter", "base"] and percent["adapter"]["Average"] == pytest.approx(
        100 * 6 / 27
    )
    assert list(percent["base"])[:3] == ["Humanities", "Other", "STEM"]
    assert "Average" in (tmp_path / "out/results.log").read_text()


@needs_shared
def test_few_shot_examples_are_dropped_where_the_context_is_short(mmlu, tmp_path, capsys):
    base = shutil.copytree(CURVES / "tiny_llama3", tmp_path / "short")
    (base / "config.json").chmod(0o644)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 170}))
    found = run_eval(
        tmp_path / "out",
        "task=mmlu_test",
        f"task_dir={mmlu}",
        "n_shot=2",
        f"model_name_or_path={base}",
        "compare=false",
    )
    assert "examples left out of" in capsys.readouterr().out and {
        len(letters) for letters in found.values()
    } == {9}


def test_layouts_of_the_files(tmp_path):
    """C-Eval's header with ids and explanations, CMMLU's with capitals, none; a file, a folder, a
    folder of folders."""
    texts = {
        "ceval/val/law_val.csv": "id,question,A,B,C,D,answer\n0,谁？,甲,乙,丙,丁,B\n",
        "ceval/dev/law_dev.csv": "id,question,A,B,C,D,answer,explanation\n"
                                 "0,问,一,二,三,四,C,因为\n",
        "cmmlu/data/test/food.csv": ',Question,A,B,C,D,Answer\n0,"a, b",1,2,3,4,d\n',
        "cmmlu/data/dev/food.csv": ",Question,A,B,C,D,Answer\n0,q,1,2,3,4,A\n",
        "plain/exam.csv": '"one\ntwo",w,x,y,z,A\n\nthree,w,x,y,z,C\n',
        "numbered/exam.csv": "7,q,w,x,y,z,A\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (law,) = find_subjects("ceval_validation", str(tmp_path))
    assert (law.name, law.title, law.questions[0].options["B"], law.questions[0].answer) == (
        "law",
        "law",
        "乙",
        "B",
    )
    assert [shot.answer for shot in law.shots] == ["C"]
    for task in ("cmmlu_test", str(tmp_path / "cmmlu"), str(tmp_path / "cmmlu/data/test/food.csv")):
        (food,) = find_subjects(task, str(tmp_path))
        assert (
            food.name == "food"
            and food.questions[0].text == "a, b"
            and food.questions[0].answer == "D"
        )
        assert [shot.text for shot in food.shots] == ["q"]
    (exam,) = find_subjects(str(tmp_path / "plain"), "")
    assert [question.text for question in exam.questions] == [
        "one\ntwo",
        "three",
    ] and not exam.shots
    assert find_subjects(str(tmp_path / "numbered/exam.csv"), "")[0].questions[0].text == "q"


def test_mistakes_are_named(tmp_path):
    (tmp_path / "ceval/test").mkdir(parents=True)
    (tmp_path / "ceval/test/law_test.csv").write_text("id,question,A,B,C,D\n0,q,1,2,3,4\n")
    for task, words in (
        ("nothing_test", "neither a file nor a folder"),
        ("ceval_tset", "one of test, validation"),
        ("ceval_validation", "holds no csv files of its validation split"),
        ("ceval_test", "published without answers: take ceval_validation"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            find_subjects(task, str(tmp_path))
    for text, words in (
        ("q,1,2,3,4,E\n", "line 1: 6 columns, answer 'E'"),
        ("", "is empty"),
        ("q,1,2,3,4,A\nq,1,2\n", "line 2: 3 columns"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_questions(tmp_path / "bad.csv")


@needs_shared
def test_results_are_not_overwritten(mmlu, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        run_eval(tmp_path, "task=mmlu_test", f"task_dir={mmlu}")


def test_averages(mmlu):
    """By category and over all questions, each question with the same weight."""
    subjects = find_subjects("mmlu_test", str(mmlu))
    subjects[0].category = subjects[1].category
    answers = {
        subject.name: [question.answer for question in subject.questions] for subject in subjects
    }
    answers[subjects[0].name] = ["x"] * 9
    subjects[1].questions = subjects[1].questions[:3]
    found = accuracies(subjects, answers)
    assert found[subjects[0].name] == 0 and found[subjects[1].name] == 100
    assert found[subjects[0].category] == 25 and found["Average"] == pytest.approx(100 * 12 / 21)
