"""Multiple choice by log-likelihood, on question files in the layout of MMLU, C-Eval and CMMLU.

    python eval.py my.yaml task=mmlu_test task_dir=evaluation   evaluation/mmlu/{test,dev}/*.csv
    python eval.py my.yaml task=ceval_validation lang=zh
    python eval.py my.yaml task=questions/exam.csv n_shot=0     one file, or a folder of files

A file is a subject: rows of question, A, B, C, D, answer, with or without a header that names the
columns. Few-shot examples precede a question as earlier turns of the conversation. The answer is
read from one forward pass: the likeliest of the tokens that begin A, B, C and D.

Requires: templates.py (encode_prompt), generate.py.
Next: eval.py.

Files and wording of the questions: MMLU arXiv:2009.03300, C-Eval arXiv:2305.08322, CMMLU
arXiv:2306.09212. Configuration keys: LLaMA-Factory's evaluator.
"""
import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from attention import PackedLayout
from checkpoint.files import write_json
from generate import check_finite, check_prompt, common_prefix, context_length
from runtime.report import print_pairs
from settings.config import Config
from templates import encode_prompt
from text.tokenizer import read_json

LETTERS = "ABCD"
COLUMNS = ("question", "a", "b", "c", "d", "answer")
SPLITS = {
    "test": ("test",),
    "validation": ("val", "validation"),
    "val": ("val", "validation"),
    "dev": ("dev",),
    "train": ("dev", "train"),
}
# language -> (text before the first question, text before each answer)
WORDS = {
    "en": ("The following are multiple choice questions (with answers) about {}.\n\n", "\nAnswer:"),
    "zh": ("以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案："),
}


@dataclass
class Question:
    """A question, its options {letter: text} and the letter of the right one."""
    text: str
    options: dict[str, str]
    answer: str


@dataclass
class Subject:
    """One file of questions. shots: questions of its dev file, shown with their answers."""
    name: str
    title: str                                          # its name in prompts
    category: str
    questions: list[Question] = field(default_factory=list)
    shots: list[Question] = field(default_factory=list)


# ---- files ------------------------------------------------------------------------------------


def find_subjects(task: str, task_dir: str) -> list[Subject]:
    """Read the subjects of `task`: a file, a folder of files, or NAME_SPLIT below task_dir.

    Raises FileNotFoundError for a task that does not exist, ValueError for unreadable files.
    """
    path = Path(task)
    split = None
    if not path.exists():
        name, _, split = task.rpartition("_")
        path = Path(task_dir) / name
        if split not in SPLITS or not path.is_dir():
            raise FileNotFoundError(
                f"task: {task} is neither a file nor a folder, nor a name such as mmlu_test: a "
                f"folder in task_dir ({task_dir}), then one of {', '.join(SPLITS)}")

    files, dev_files = question_files(path, split)
    mapping = read_json(path / "mapping.json") if path.is_dir() else {}
    subjects = []
    for file in files:
        name = subject_name(file)
        row = mapping.get(name, {})
        subject = Subject(name=name, title=row.get("name", name.replace("_", " ")),
                          category=row.get("category", ""), questions=read_questions(file))
        for other in dev_files:
            if subject_name(other) == name and other != file:
                subject.shots = read_questions(other)
                break
        subjects.append(subject)
    return subjects


def question_files(path: Path, split: str | None) -> tuple[list[Path], list[Path]]:
    """(files of questions, files of few-shot examples).

    Without a split: the files of the folder itself, else of its test split, else of val.
    """
    if path.is_file():
        nearby = [path.parent.parent / "dev", path.parent / "dev"]
        return [path], [file for folder in nearby for file in sorted(folder.glob("*.csv"))]

    names = SPLITS[split] if split else ("", *SPLITS["test"], *SPLITS["val"])
    for folder in (path, path / "data"):
        for name in names:
            if files := sorted((folder / name).glob("*.csv")):
                return files, sorted((folder / "dev").glob("*.csv"))
    of_split = f" of its {split} split" if split else ""
    raise FileNotFoundError(
        f"{path} holds no csv files{of_split}; expected are {path}/{split or 'test'}/SUBJECT.csv, "
        f"and for examples {path}/dev/SUBJECT.csv")


def subject_name(file: Path) -> str:
    """File name without the suffix of its split."""
    return re.sub(r"_(test|val|dev)$", "", file.stem)


def read_questions(path: Path) -> list[Question]:
    """Questions of a csv file. Raises ValueError with the line number, also for missing answers."""
    rows = read_csv(path)
    columns = [name.strip().lower() for name in rows[0][1]]
    if "question" in columns:
        rows = rows[1:]
    elif len(columns) in (6, 7):                        # MMLU has no header; some files number rows
        columns = ["", *COLUMNS][-len(columns):]
    check_question_columns(path, columns)

    questions = []
    for number, row in rows:
        cells = dict(zip(columns, row))
        answer = cells.get("answer", "").strip().upper()
        if len(row) < len(columns) or answer not in LETTERS or not answer:
            raise ValueError(
                f"{path} line {number}: {len(row)} columns, answer {answer!r}; expected are "
                f"{len(columns)} columns, and one of {', '.join(LETTERS)}")
        options = {letter: cells[letter.lower()] for letter in LETTERS}
        questions.append(Question(cells["question"], options, answer))
    return questions


def read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank. Raises ValueError if there is none."""
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if any(row):
                    rows.append((reader.line_num, row))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a csv file in UTF-8 ({error})") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def check_question_columns(path: Path, columns: list[str]):
    """Raise ValueError for the first column that a question needs and the file lacks."""
    missing = [name for name in COLUMNS if name not in columns]
    if not missing:
        return
    hint = ""
    if "answer" in missing:
        hint = "; the test split of C-Eval is published without answers: take ceval_validation"
    raise ValueError(
        f"{path}: no column {missing[0]}; a line is question, A, B, C, D, answer{hint}")


# ---- asking -----------------------------------------------------------------------------------


def conversation(subject: Subject, question: Question, shots: list[Question], lang: str,
                 answer: str) -> list[dict]:
    """Few-shot examples and the question as turns; `answer` is the last reply."""
    opening, before_answer = WORDS[lang]
    turns = [(shot, shot.answer) for shot in shots]
    turns.append((question, answer))

    messages = []
    for turn, reply in turns:
        lines = [turn.text]
        lines += [f"{letter}. {text}" for letter, text in turn.options.items()]
        messages.append({"role": "user", "content": "\n".join(lines) + before_answer})
        messages.append({"role": "assistant", "content": reply})
    messages[0]["content"] = opening.format(subject.title) + messages[0]["content"]
    return messages


def prompt_of(subject: Subject, question: Question, n_shot: int, lang: str, template, tokenizer,
              settings, context: int) -> tuple[list[int], dict[str, int], int]:
    """(ids up to where the four answers differ, {letter: next id}, number of examples that fit)."""
    for count in range(min(n_shot, len(subject.shots)), -1, -1):
        shots = subject.shots[:count]
        encoded = {}
        for letter in LETTERS:
            messages = conversation(subject, question, shots, lang, letter)
            encoded[letter] = encode_prompt(template, tokenizer, messages, settings=settings)
        prompt, first = encoded["A"]
        same = min(common_prefix(first, reply) for _, reply in encoded.values())
        if len(prompt) + same < context:
            break

    next_ids = {letter: reply[same] for letter, (_, reply) in encoded.items()}
    if len(set(next_ids.values())) < len(next_ids):
        raise ValueError(f"this tokenizer writes {', '.join(LETTERS)} with the same first token; "
                         "their likelihoods cannot be compared")
    return prompt + first[:same], next_ids, count


@torch.no_grad()
def answers_of(model, subject: Subject, config, template, tokenizer,
               settings) -> tuple[list[str], int]:
    """(likeliest letter of each question, questions with examples left out to fit the context)."""
    context = context_length(model.config)
    prompts = []
    for question in subject.questions:
        prompts.append(prompt_of(subject, question, config.n_shot, config.lang, template,
                                 tokenizer, settings, context))

    answers = []
    size = config.per_device_eval_batch_size
    for start in tqdm(range(0, len(prompts), size), desc=subject.name, leave=False,
                      disable=bool(config.disable_tqdm) or None):
        batch = prompts[start:start + size]
        logits = last_logits(model, [ids for ids, _, _ in batch])
        for row, (_, next_ids, _) in zip(logits, batch):
            answers.append(max(LETTERS, key=lambda letter: float(row[next_ids[letter]])))

    shots = min(config.n_shot, len(subject.shots))
    return answers, sum(count < shots for _, _, count in prompts)


def last_logits(model, prompts: list[list[int]]) -> torch.Tensor:
    """Logits after the last token of each prompt, (number of prompts, V) float32."""
    device = model.lm_head.weight.device
    for ids in prompts:
        check_prompt(model, ids, 1)
    lengths = [len(ids) for ids in prompts]
    ids = torch.tensor([[i for prompt in prompts for i in prompt]], device=device)      # (1, N)
    positions = torch.tensor([[i for n in lengths for i in range(n)]], device=device)   # (1, N)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    hidden = model(ids, positions, PackedLayout(lengths, device))       # (1, N, D)
    logits = model.logits(hidden[0, ends]).float()
    check_finite(logits, model)
    return logits


def answer_subjects(model, subjects: list[Subject], config: Config, template, tokenizer,
                    settings) -> dict[str, list[str]]:
    """{name of a subject: the letters the model chose}."""
    answers = {}
    for subject in tqdm(subjects, desc="subjects", leave=False,
                        disable=bool(config.disable_tqdm) or None):
        letters, shortened = answers_of(model, subject, config, template, tokenizer, settings)
        answers[subject.name] = letters
        if shortened:
            tqdm.write(f"  {subject.name}: examples left out of {shortened} questions, to fit the "
                       "model's context")
    return answers


def accuracies(subjects: list[Subject], answers: dict[str, list[str]]) -> dict[str, float]:
    """{name: percent right}: of each category, each subject, and of all questions ("Average").

    answers: {name of a subject: the letters chosen}.
    """
    groups = {}
    everything = []
    for subject in subjects:
        pairs = zip(answers[subject.name], subject.questions)
        right = [letter == question.answer for letter, question in pairs]
        everything += right
        for name in dict.fromkeys((subject.category, subject.name)):
            groups.setdefault(name, []).extend(right)

    categories = sorted({subject.category for subject in subjects if subject.category})
    names = categories + [subject.name for subject in subjects]
    percents = {name: 100 * sum(groups[name]) / len(groups[name]) for name in names}
    percents["Average"] = 100 * sum(everything) / len(everything)
    return percents


# ---- printing and files -----------------------------------------------------------------------


def print_task(config: Config, subjects: list[Subject], template_name: str):
    """Print the number of questions, few-shot examples, and the template."""
    questions = sum(len(subject.questions) for subject in subjects)
    fewer = [subject.name for subject in subjects if len(subject.shots) < config.n_shot]
    examples = f"{config.n_shot} each"
    if fewer:
        examples += f"; fewer in {len(fewer)} subjects, such as {fewer[0]}"
    print_pairs("questions", {
        "task": f"{config.task}: {questions:,} in {len(subjects)} subjects",
        "examples": examples,
        "template": template_name,
    })


def write_choices(folder: Path, answers: dict[str, list[str]], percents: dict, text: str):
    """Write results.json and results.log in LLaMA-Factory's format, and accuracy.json."""
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {name: {str(i): letter for i, letter in enumerate(letters)}
                for name, letters in answers.items()}
    write_json(folder / "results.json", numbered)
    write_json(folder / "accuracy.json", percents)
    (folder / "results.log").write_text(text + "\n", encoding="utf-8")
    print(f"\nwritten to {folder}: results.json, accuracy.json, results.log")
