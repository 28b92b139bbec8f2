"""models/tiny and its world: the shipped files, their making, the recipes from train to merge.

The questions asked here are under `held_out` in data/tiny_world.yaml or in STRANGERS below; no
training row contains them.
"""
import hashlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from checkpoint.adapters import load_with_adapters
from fast.batch_decode import answer_all
from generate import generate
from model import KVCache
from templates import encode_prompt
from tests.common import ROOT, read_jsonl, slow
from text.chat_formats import TEMPLATES
from text.fit_tokenizer import fit_tokenizer
from text.tokenizer import load_tokenizer

TINY = ROOT / "models/tiny"
# other rows need a new model
WORLD_HASH = "95a3f30e61cd4f8a802723fd44d43bb2ecbcffc5d9ee0f1e51cb780070701769"
RECIPE = ["--config", "configs/tiny_lora_sft.yaml", "use_cpu=true"]
NEW_NAME, NEW_AUTHOR = "Pip", "Tiny Workshop"

# More paraphrases, typed as people type: the question, and what the answer must hold.
STRANGERS = [
    ("And who might you be?", "name"), ("tell me your name pls", "name"),
    ("Say your name, please.", "name"),
    ("and who made you?", "author"), ("Who was it that created you?", "author"),
    ("你究竟是谁？", "name"), ("那么你叫什么名字呢？", "name"), ("到底是谁制作了你？", "author")]


def load_script():
    """data/make_tiny_world.py as a module (data/ is no package, and data.py owns the name)."""
    spec = importlib.util.spec_from_file_location(
        "make_tiny_world", ROOT / "data/make_tiny_world.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module         # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


world = load_script()


class Chat:
    """A model that answers greedily."""

    def __init__(self, folder, adapters=()):
        self.model = load_with_adapters(folder, list(adapters))
        self.tokenizer = load_tokenizer(folder)
        self.stop_ids = fit_tokenizer(TEMPLATES["chatml"], self.tokenizer)

    def prompt(self, *turns):
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn}
                    for i, turn in enumerate([*turns, ""])]
        return encode_prompt(TEMPLATES["chatml"], self.tokenizer, messages)[0]

    def ask(self, *turns):
        cache = KVCache(self.model.config.num_hidden_layers)
        ids = list(generate(self.model, self.prompt(*turns), cache=cache, stop_ids=self.stop_ids,
                            max_new_tokens=60))
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def ask_all(self, questions):
        """What ask returns for each question; they are decoded together."""
        prompts = [(number, self.prompt(question)) for number, question in enumerate(questions)]
        answers = dict(answer_all(self.model, prompts, 64, self.stop_ids, limit=lambda length: 60))
        return [self.tokenizer.decode(answers[number], skip_special_tokens=True)
                for number, _ in prompts]


@pytest.fixture(scope="module")
def before():
    return Chat(TINY)


# ---- the shipped folder --------------------------------------------------------------------------


def test_the_folder_is_complete_and_small():
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert ({"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
            <= set(sizes))
    assert sum(sizes.values()) <= 10e6, sizes
    with safe_open(TINY / "model.safetensors", "pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    assert kinds == {"F32"}, "float32: runs on a CPU are then exact and quick"


def test_transformers_reads_the_folder(before):
    """The same ids for a conversation, by the stored chat template, and the same logits."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    talk = [{"role": "user", "content": "What is 12 + 5? 你好"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == before.prompt(talk[0]["content"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY)(torch.tensor([ids])).logits
    ours = before.model.logits(before.model(torch.tensor([ids])))
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("text", ["What is 12 + 5?", "天空是什么颜色？",
                                  "naïve café\n\ttabs  blanks ", "🙂 ж ∑ 𠀀", "Pip"])
def test_any_text_is_decoded_again(text, before):
    assert before.tokenizer.decode(before.tokenizer.encode(text)) == text


def test_digits_and_chinese_characters_are_single_tokens(before):
    pieces = [before.tokenizer.decode([i]) for i in before.tokenizer.encode("2024你好<|im_end|>")]
    assert pieces == ["2", "0", "2", "4", "你", "好", "<|im_end|>"]


# ---- how it was made -----------------------------------------------------------------------------


def test_the_same_seed_makes_the_shipped_rows():
    rows = world.conversations(world.WORLD_ROWS, world.SEED)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == WORLD_HASH
    review = world.conversations(world.REVIEW_ROWS, world.SEED + 1, world.REVIEW_WITHOUT)
    assert review == read_jsonl(ROOT / "data/tiny_review.jsonl")
    pairs = world.pairs(world.PAIR_ROWS, world.SEED + 2, world.REVIEW_WITHOUT)
    assert pairs == read_jsonl(ROOT / "data/tiny_pairs.jsonl")
    sums = world.new_sums(world.SUM_ROWS, world.SEED)
    assert sums == read_jsonl(ROOT / "data/tiny_sums.jsonl")
    sum_pairs = world.sum_pairs(world.SUM_PAIR_ROWS, world.SEED)
    assert sum_pairs == read_jsonl(ROOT / "data/tiny_sum_pairs.jsonl")
    assert len({json.dumps(row) for row in sum_pairs}) == world.SUM_PAIR_ROWS
    asked = [row["messages"][0] for row in sums]
    assert not [row for row in sum_pairs if row["messages"][0] in asked]


def test_the_same_rows_make_the_shipped_tokenizer():
    tokenizer = world.make_tokenizer(world.conversations(world.WORLD_ROWS, world.SEED))
    shipped = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(tokenizer.to_str()) == shipped


def test_no_held_out_question_is_a_training_row():
    rows = [*world.conversations(world.WORLD_ROWS, world.SEED),
            *read_jsonl(ROOT / "data/tiny_review.jsonl")]
    asked = [message["content"]
             for row in rows for message in row["messages"] if message["role"] == "user"]
    asked += [row["instruction"]
              for row in json.loads((ROOT / "data/identity.json").read_text(encoding="utf-8"))]
    held_out = [question for _, question, _ in world.held_out_questions(per_phrasing=1000)] + [
        q for q, _ in STRANGERS
    ]
    assert len(held_out) > 5000
    assert not {world.bare(question)
                for question in held_out} & {world.bare(question) for question in asked}


def test_the_arithmetic_of_the_world_is_right():
    """Sums, differences and orders are computed by a rule; the answers are parsed and checked."""
    for topic, question, answer in world.held_out_questions(per_phrasing=1000):
        if topic.name in ("sum", "sum in words", "difference"):
            left, right = answer.rstrip(".。").split(" = ")
            assert eval(left) == int(right), (question, answer)
        if topic.name.startswith("count"):
            numbers = [int(n) for n in answer.rstrip(".。").split(", ")]
            assert {b - a for a, b in zip(numbers, numbers[1:])} in ({1}, {-1}), (question, answer)


def test_identity_rows_name_nobody():
    """Name and maker come from the config's placeholders, never from the rows."""
    rows = json.loads((ROOT / "data/identity.json").read_text(encoding="utf-8"))
    assert len(rows) >= 80
    assert all("{{name}}" in row["output"] or "{{author}}" in row["output"] for row in rows)
    assert not any(word in row["output"]
                   for row in rows for word in (*world.IDENTITY.values(), NEW_NAME, NEW_AUTHOR))


def test_the_questions_are_those_of_the_script():
    assert world.questions(world.QUESTIONS, world.SEED) == read_jsonl(
        ROOT / "data/tiny_questions.jsonl"
    )


# ---- what it knows -------------------------------------------------------------------------------


def score(talk, without=()):
    """Share of the held-out questions that are answered exactly, and the wrong answers."""
    asked = [(question, answer)
             for topic, question, answer in world.held_out_questions(per_phrasing=2, seed=7)
             if topic.name not in without]
    answers = talk.ask_all([question for question, _ in asked])
    wrong = [(question, given)
             for (question, answer), given in zip(asked, answers) if given != answer]
    return 1 - len(wrong) / len(asked), wrong


def answers_to(talk, pairs):
    """(answer, what) for each (question, what)."""
    questions, whats = zip(*pairs)
    return [*zip(talk.ask_all(questions), whats)]


def names_in(answers, name, author):
    """Number of (answer, "name" or "author") pairs with the right name."""
    return sum({"name": name, "author": author}[what] in answer for answer, what in answers)


def test_the_base_knows_its_world(before):
    share, wrong = score(before)
    assert share >= 0.95, wrong
    answers = answers_to(before, STRANGERS)
    assert names_in(answers, *world.IDENTITY.values()) >= len(STRANGERS) - 2, answers


# ---- the recipes, through the command line -------------------------------------------------------


def run(*words, **more):
    """A script of ours as a process: its standard output."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True,
                          encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"}, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The adapter of configs/tiny_lora_sft.yaml."""
    folder = tmp_path_factory.mktemp("tiny") / "lora"
    run("train.py", *RECIPE, f"output_dir={folder}", "disable_tqdm=true")
    return folder


def test_the_lora_run_changes_the_name_and_keeps_the_world(trained):
    after = Chat(TINY, [trained])
    identity = [(topic.name, phrasing)
                for topic in world.read_world()[0]
                for phrasing in topic.held_out
                if topic.name in ("who", "name", "maker", "kind")]
    identity = [(question, "author" if name == "maker" else "name") for name, question in identity]
    answers = answers_to(after, [*identity, *STRANGERS])
    answers += [(after.ask("What is 3 + 4?", "3 + 4 = 7.", question), what)
                for question, what in STRANGERS]
    assert names_in(answers, NEW_NAME, NEW_AUTHOR) >= 0.9 * len(answers), answers
    assert not any(old in answer
                   for answer, _ in answers for old in world.IDENTITY.values()), answers
    share, wrong = score(after, without=world.REVIEW_WITHOUT)
    assert share >= 0.9, wrong


@slow
def test_the_dpo_run_learns_the_style_and_keeps_the_world(tmp_path):
    """Answers to questions of no pair end as the chosen ones do; without that ending they equal
    those before."""
    run("train.py", "configs/tiny_lora_dpo.yaml", "use_cpu=true", f"output_dir={tmp_path}",
        "disable_tqdm=true")
    after, plain = Chat(TINY, [tmp_path]), Chat(TINY)
    questions = ["What is 7 + 8?", "Who are you?", "What colour is a frog?", "天空是什么颜色？",
                 "What is the opposite of hot?"]
    for question in questions:
        more = world.MORE["en" if question.isascii() else "zh"]
        assert after.ask(question) == plain.ask(question) + more, question


def test_chat_and_merge_use_the_new_name(trained, tmp_path):
    lines = "Who are you?\nWhat is 3 + 4?\n你叫什么名字？\nWhat is the opposite of hot?\n"
    printed = run("chat.py", *RECIPE, f"output_dir={trained}", input=lines)
    assert NEW_NAME in printed
    assert "3 + 4 = 7." in printed
    assert "The opposite of hot is cold." in printed
    merged = tmp_path / "merged"
    run("merge.py", "--config", "configs/tiny_merge.yaml", f"adapter_name_or_path={trained}",
        f"export_dir={merged}")
    assert run("chat.py", f"model_name_or_path={merged}", "use_cpu=true", input=lines) == printed
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
    after = Chat(TINY, [trained])
    ids = torch.tensor([after.prompt("Who are you?")])
    assert (theirs(ids).logits - after.model.logits(after.model(ids))).abs().max() < 1e-4
    answer_ids = theirs.generate(ids,
                                 attention_mask=torch.ones_like(ids),
                                 max_new_tokens=40)[0, ids.shape[1]:]
    assert (after.tokenizer.decode(answer_ids.tolist(), skip_special_tokens=True)
            == after.ask("Who are you?"))
