"""evals/bleu_rouge.py: LLaMA-Factory's recorded scores, the packages, and slow definitions."""
import json
import random
import re
import sys
from functools import cache

import pytest

from evals import bleu_rouge as scores
from evals.bleu_rouge import (
    PLAIN_WORD,
    bleu4,
    common_subsequence,
    pick_words,
    read_predictions,
    rouge,
    score,
)
from tests.common import GOLDEN, needs_shared, read_jsonl

# marks that rouge-chinese and jieba treat specially, all kinds of blanks, words of both
# languages
PIECES = [
    *"abc  \n\n。？?！…..“”’%1 2.5&+-é的一是不了人我在有他这中大来上国",
    "你好",
    "中国",
    "......",
    "……",
    "\r\n",
    "\t",
    "？”",
    "\u3000",
    "hello",
    "the",
]


def random_pairs(count, seed=0):
    """(prediction, label); half of the pairs have words in common."""
    draw = random.Random(seed)
    for _ in range(count):
        predict, label = ("".join(draw.choices(PIECES, k=draw.randint(0, 40))) for _ in range(2))
        yield (
            predict,
            (
                predict[: draw.randint(0, len(predict))] + label[:5]
                if draw.random() < 0.5
                else label
            ),
        )


@needs_shared
def test_recorded_scores():
    jieba = pytest.importorskip("jieba")
    rows = read_jsonl(GOLDEN / "data/metrics.jsonl")
    assert len(rows) > 30
    for row in rows:
        assert score(row["predict"], row["label"], jieba.lcut) == row["scores"], row


@needs_shared
def test_recorded_scores_that_need_no_package():
    """BLEU is by characters; without Chinese, plain words are those of jieba."""
    rows = read_jsonl(GOLDEN / "data/metrics.jsonl")
    for row in rows:
        assert round(100 * bleu4(row["predict"], row["label"]), 4) == row["scores"]["bleu-4"], row
    plain = [
        row for row in rows if not re.search(r"[\u4e00-\u9fd5]", row["predict"] + row["label"])
    ]
    assert len(plain) > 5
    for row in plain:
        assert score(row["predict"], row["label"], PLAIN_WORD.findall) == row["scores"], row


def test_scores_of_random_texts_equal_the_packages():
    jieba, package = pytest.importorskip("jieba"), pytest.importorskip("rouge_chinese")
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = nltk.SmoothingFunction().method3
    for predict, label in random_pairs(800):
        made, wanted = (" ".join(jieba.lcut(text)) for text in (predict, label))
        theirs = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
        if made.split() and wanted.split():
            theirs = {
                name: round(100 * of["f"], 4)
                for name, of in package.Rouge().get_scores(made, wanted)[0].items()
            }
        bleu = nltk.sentence_bleu([list(label)], list(predict), smoothing_function=smoothing)
        theirs["bleu-4"] = round(100 * bleu, 4)
        assert score(predict, label, jieba.lcut) == theirs, (predict, label)


def test_plain_words_without_chinese_equal_jiebas():
    """Except for the few names of its dictionary that contain a mark, such as c#."""
    jieba = pytest.importorskip("jieba")
    draw = random.Random(1)
    for _ in range(800):
        text = "".join(draw.choices("abdXYZ  \n。？?…..“”’%12.5&é_жш", k=draw.randint(0, 40)))
        assert PLAIN_WORD.findall(text) == jieba.lcut(text), text


def test_plain_words_split_chinese_into_characters():
    assert PLAIN_WORD.findall("I like 苹果pie, 3.5% of it...") == [
        "I",
        " ",
        "like",
        " ",
        "苹",
        "果",
        "pie",
        ",",
        " ",
        "3.5%",
        " ",
        "of",
        " ",
        "it",
        "...",
    ]


def test_the_longest_common_subsequence_equals_its_definition():
    def slow(a, b):
        @cache
        def best(i, j):
            if i == len(a) or j == len(b):
                return 0
            return 1 + best(i + 1, j + 1) if a[i] == b[j] else max(best(i + 1, j), best(i, j + 1))

        return best(0, 0)

    draw = random.Random(2)
    for _ in range(300):
        a, b = ("".join(draw.choices("abcd", k=draw.randint(0, 12))) for _ in range(2))
        assert common_subsequence(list(a), list(b)) == slow(a, b), (a, b)


def test_bleu_by_hand():
    """Papineni's clipping and brevity penalty, and a smoothed count, worked out on paper."""
    assert bleu4("", "a") == bleu4("a", "") == bleu4("b", "a") == 0
    assert bleu4("abcd", "abcd") == 1
    assert bleu4("aaaa", "a") == pytest.approx(
        (1 / 4 * 1 / (2 * 3) * 1 / (4 * 2) * 1 / (8 * 1)) ** 0.25
    )
    assert bleu4("abcd", "abcdefgh") == pytest.approx(2.718281828 ** (1 - 8 / 4))
    found = rouge("the cat sat".split(), "the cat is here".split())
    assert found["rouge-1"] == pytest.approx(2 * 2 / (3 + 4), abs=1e-6)
    assert found["rouge-2"] == pytest.approx(2 * 1 / (2 + 3), abs=1e-6)
    assert found["rouge-l"] == pytest.approx(2 * 2 / (3 + 4), abs=1e-6)


def test_the_way_of_splitting_words_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)  # as if it were not installed
    words, called = pick_words()
    assert called.startswith("plain words, jieba is not installed") and words("你好you") == [
        "你",
        "好",
        "you",
    ]
    assert score("你好", "你好") == {
        "bleu-4": 59.4604,
        "rouge-1": 100.0,
        "rouge-2": 100.0,
        "rouge-l": 100.0,
    }


def test_a_file_of_predictions(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "p", "predict": "same", "label": "same"}, {"predict": "", "label": "x"}]
    (tmp_path / "generated_predictions.jsonl").write_text(
        "\n".join(map(json.dumps, rows)), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    scores.main(["generated_predictions.jsonl"])
    found = json.loads((tmp_path / "predictions_score.json").read_text())
    assert found == {"bleu-4": 50.0, "rouge-1": 50.0, "rouge-2": 0.0, "rouge-l": 50.0}
    assert "bleu-4: 50.0000" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text('{"predict": "a", "label": "b"}\n{"predict": 3}\n')
    with pytest.raises(ValueError, match="bad.jsonl line 2: not of the form"):
        read_predictions(tmp_path / "bad.jsonl")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="no predictions"):
        scores.main([str(tmp_path / "none.jsonl")])
