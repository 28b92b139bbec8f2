"""Multiple choice by log-likelihood: which letter is the likeliest? For files as MMLU, C-Eval and CMMLU have them.

    python eval.py my.yaml task=mmlu_test task_dir=evaluation       evaluation/mmlu/test/*.csv, examples from dev/*.csv
    python eval.py my.yaml task=ceval_validation lang=zh
    python eval.py my.yaml task=questions/exam.csv n_shot=0            one file, or a folder of them

A file is a subject: lines of question, A, B, C, D, answer, with a header that names the columns or without. Examples
come before a question as earlier turns of the conversation, and the answer is read off one pass: of the tokens that
begin A, B, C and D, the likeliest.

Read before: templates.py (encode_prompt). Read after: eval.py, which asks.
Sources: MMLU arXiv:2009.03300, C-Eval arXiv:2305.08322, CMMLU arXiv:2306.09212, their files and the wording of their
questions; the keys are those of LLaMA-Factory's evaluator.
"""
import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from attention import Layout
from generate import check_finite, check_prompt, common_prefix, context_length
from templates import encode_prompt
from tokenizer import read_json

LETTERS = "ABCD"
SPLITS = {"test": ("test",), "validation": ("val", "validation"), "val": ("val", "validation"), "dev": ("dev",),
          "train": ("dev", "train")}
WORDS = {           # of a language: what stands before the first question, and before the answer
    "en": ("The following are multiple choice questions (with answers) about {}.\n\n", "\nAnswer:"),
    "zh": ("以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案：")}


@dataclass
class Question:
    text: str
    options: dict                                       # letter -> text
    answer: str                                         # a letter


@dataclass
class Subject:
    """One file of questions. shots: the questions of its dev file, which are shown with their answers."""
    name: str
    title: str                                          # in words, as the model is told
    category: str
    questions: list = field(default_factory=list)
    shots: list = field(default_factory=list)


# ---- files ------------------------------------------------------------------------------------------------------


def find_subjects(task: str, task_dir: str) -> list[Subject]:
    """What `task` names: a file, a folder of files, or NAME_SPLIT below task_dir.

    Raises FileNotFoundError, and ValueError for files that cannot be read.
    """
    path, split = Path(task), None
    if not path.exists():
        name, _, split = task.rpartition("_")
        path = Path(task_dir) / name
        if split not in SPLITS or not path.is_dir():
            raise FileNotFoundError(f"task: {task} is neither a file nor a folder, nor, as mmlu_test is, a folder in "
                                    f"task_dir ({task_dir}) and one of {', '.join(SPLITS)}")
    files, dev = files_of(path, split)
    names = read_json(path / "mapping.json") if path.is_dir() else {}
    subjects = []
    for file in files:
        name = subject_of(file)
        about = names.get(name, {})
        examples = next((other for other in dev if subject_of(other) == name and other != file), None)
        subjects.append(Subject(name, about.get("name", name.replace("_", " ")), about.get("category", ""),
                                read_questions(file), read_questions(examples) if examples else []))
    return subjects


def files_of(path: Path, split: str | None) -> tuple[list[Path], list[Path]]:
    """(files of questions, files of examples). split None: those of the folder itself, else test, else val."""
    if path.is_file():
        beside = [path.parent.parent / "dev", path.parent / "dev"]
        return [path], [file for folder in beside for file in sorted(folder.glob("*.csv"))]
    folders = [folder for folder in (path, path / "data") if any(folder.glob("*/*.csv")) or any(folder.glob("*.csv"))]
    for folder in folders:
        names = SPLITS[split] if split else ("", *SPLITS["test"], *SPLITS["val"])
        for place in [folder / name for name in names]:
            if files := sorted(place.glob("*.csv")):
                return files, sorted((folder / "dev").glob("*.csv"))
    raise FileNotFoundError(f"{path} holds no csv files{f' of its {split} split' if split else ''}; expected are "
                            f"{path}/{split or 'test'}/SUBJECT.csv, and for examples {path}/dev/SUBJECT.csv")


def subject_of(file: Path) -> str:
    return re.sub(r"_(test|val|dev)$", "", file.stem)


def read_questions(path: Path) -> list[Question]:
    """The rows of a file. Raises ValueError that names the line, also where answers are missing."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [(reader.line_num, row) for reader in [csv.reader(file)] for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a csv file in UTF-8 ({error})") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    head = [name.strip().lower() for name in rows[0][1]]
    if "question" in head:
        rows = rows[1:]
    else:                                               # MMLU has no header; some files number their lines
        head = ["", "question", "a", "b", "c", "d", "answer"][-len(head):] if len(head) in (6, 7) else head
    if missing := [name for name in ("question", "a", "b", "c", "d", "answer") if name not in head]:
        hint = "; the test split of C-Eval is published without answers: take ceval_validation" * ("answer" in missing)
        raise ValueError(f"{path}: no column {missing[0]}; a line is question, A, B, C, D, answer{hint}")
    questions = []
    for number, row in rows:
        cells = dict(zip(head, row))
        answer = cells.get("answer", "").strip().upper()
        if len(row) < len(head) or answer not in LETTERS or not answer:
            raise ValueError(f"{path} line {number}: {len(row)} columns, answer {answer!r}; expected are {len(head)}, "
                             f"and an answer out of {', '.join(LETTERS)}")
        questions.append(Question(cells["question"], {letter: cells[letter.lower()] for letter in LETTERS}, answer))
    return questions


# ---- asking -----------------------------------------------------------------------------------------------------


def conversation(subject: Subject, question: Question, shots: list, lang: str, answer: str) -> list[dict]:
    """The examples and the question as turns; `answer` stands for the last reply."""
    opening, asks = WORDS[lang]
    messages = []
    for one, reply in [*((shot, shot.answer) for shot in shots), (question, answer)]:
        lines = [one.text, *(f"{letter}. {text}" for letter, text in one.options.items())]
        messages += [{"role": "user", "content": "\n".join(lines) + asks}, {"role": "assistant", "content": reply}]
    messages[0]["content"] = opening.format(subject.title) + messages[0]["content"]
    return messages


def prompt_of(subject, question, n_shot: int, lang, template, tokenizer, settings, context: int):
    """(ids up to where the letters part, {letter: its next id}, how many examples there was room for)."""
    for count in range(min(n_shot, len(subject.shots)), -1, -1):
        shots = subject.shots[:count]
        encoded = {letter: encode_prompt(template, tokenizer, conversation(subject, question, shots, lang, letter),
                                         settings=settings) for letter in LETTERS}
        prompt, first = encoded["A"]
        same = min(common_prefix(first, encoded[letter][1]) for letter in LETTERS[1:])
        if len(prompt) + same < context:
            break
    ids = {letter: answer[same] for letter, (_, answer) in encoded.items()}
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"this tokenizer writes {', '.join(LETTERS)} with the same first token; their likelihoods "
                         "cannot be told apart")
    return prompt + first[:same], ids, count


@torch.no_grad()
def answers_of(model, subject: Subject, config, template, tokenizer, settings) -> tuple[list[str], int]:
    """(the likeliest letter for each question, questions for which examples were left out to fit the context)."""
    device, context = model.lm_head.weight.device, context_length(model.config)
    shots, said, size = min(config.n_shot, len(subject.shots)), [], config.per_device_eval_batch_size
    asked = [prompt_of(subject, question, config.n_shot, config.lang, template, tokenizer, settings, context)
             for question in subject.questions]
    for start in tqdm(range(0, len(asked), size), desc=subject.name, leave=False,
                      disable=bool(config.disable_tqdm) or None):
        part = asked[start:start + size]
        lengths = [len(ids) for ids, _, _ in part]
        for ids, _, _ in part:
            check_prompt(model, ids, 1)
        rows, positions = (torch.tensor([[i for row in rows for i in row]], device=device)
                           for rows in ([ids for ids, _, _ in part], map(range, lengths)))               # (1, N)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        scores = model.logits(model(rows, positions, Layout(lengths, device))[0, ends]).float()         # (n, V)
        check_finite(scores, model)
        for mine, (_, ids, _) in zip(scores, part):
            said.append(max(LETTERS, key=lambda letter: float(mine[ids[letter]])))
    return said, sum(count < shots for _, _, count in asked)


def accuracies(subjects: list[Subject], said: dict) -> dict[str, float]:
    """{name: percent right}: of each category, if the subjects have one, of each subject, last of all questions."""
    right = {subject.name: [a == question.answer for a, question in zip(said[subject.name], subject.questions)]
             for subject in subjects}
    groups = {}
    for subject in subjects:
        for name in dict.fromkeys((subject.category, subject.name)):
            groups.setdefault(name, []).extend(right[subject.name])
    order = sorted(filter(None, {subject.category for subject in subjects})) + [subject.name for subject in subjects]
    found = {name: 100 * sum(groups[name]) / len(groups[name]) for name in order}
    everything = [one for answers in right.values() for one in answers]
    return found | {"Average": 100 * sum(everything) / len(everything)}
