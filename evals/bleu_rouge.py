"""BLEU-4 and ROUGE-1, 2 and L of generated answers, as LLaMA-Factory's script computes them.

    python -m evals.bleu_rouge FILE.jsonl     prints means, writes predictions_score.json

BLEU-4 compares characters: n-grams of one to four characters, with counts clipped to those of the
label. ROUGE compares words: shared words (ROUGE-1), shared pairs of neighbors (ROUGE-2) and the
longest common subsequence (ROUGE-L), each as F1 of precision and recall. Words are split by jieba,
which segments Chinese; where it is not installed, every Chinese character counts as a word, and the
result states so.

Requires: nothing.
Next: eval.py.

BLEU: Papineni et al. 2002, smoothed as in NIST's mteval-v13a.pl (method3 in nltk).
ROUGE: Lin 2004, with the conventions of the package rouge-chinese, which published figures use.
Longest common subsequence in whole machine words: Hyyrö 2004, "Bit-parallel LCS-length computation
revisited".
"""
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from errors import run_script

NAMES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")

# Text without Chinese, split as jieba splits it: words and numbers, runs of the marks that names
# may contain, other single characters. Blanks are words, too; normalize_words handles them.
PLAIN_WORD = re.compile(
    r"[\u4e00-\u9fd5]|[a-zA-Z0-9]+(?:\.\d+)?%?|[+#&._%-]+|\r\n|[\s\S]")

# rouge-chinese begins a new sentence between the two groups.
SENTENCE_ENDS = (
    re.compile(r"([。！？?])([^”’])"),
    re.compile(r"(\.{6})([^”’])"),
)


def pick_words() -> tuple[Callable[[str], list[str]], str]:
    """Choose the word splitter: (function from a text to its words, its description)."""
    try:
        import jieba
    except ImportError:
        return PLAIN_WORD.findall, "plain words, jieba is not installed (pip install jieba)"
    jieba.setLogLevel(logging.WARNING)              # else it prints the path of its dictionary
    return jieba.lcut, "words of jieba"


def score(predict: str, label: str, words: Callable | None = None) -> dict[str, float]:
    """Scores of one answer, {name: 0 … 100}, rounded to 4 decimals. `words`: see pick_words."""
    words = words or pick_words()[0]
    scores = {"bleu-4": bleu4(predict, label), **rouge(words(predict), words(label))}
    return {name: round(100 * scores[name], 4) for name in NAMES}


def means(rows: list[dict]) -> dict[str, float]:
    """Mean of each score over rows. Raises ValueError for an empty list."""
    if not rows:
        raise ValueError("there are no predictions to score")
    return {name: sum(row[name] for row in rows) / len(rows) for name in NAMES}


# ---- BLEU -------------------------------------------------------------------------------------


def ngrams(items: Sequence, n: int) -> list[tuple]:
    """All runs of n neighboring items, from left to right."""
    return list(zip(*(items[i:] for i in range(n))))


def bleu4(predict: str, label: str) -> float:
    """Geometric mean of the clipped precisions of 1- to 4-grams, times the brevity penalty.

    The n-grams are of characters. Smoothing: the first n without a match counts as 1/2 match, the
    next as 1/4, and so on.
    """
    log_precisions = []
    missing = 0
    for n in (1, 2, 3, 4):
        predicted = Counter(ngrams(predict, n))
        expected = Counter(ngrams(label, n))
        common = (predicted & expected).total()
        total = max(1, predicted.total())
        if n == 1 and not common:
            return 0.0
        if common:
            log_precisions.append(math.log(common / total))
        else:
            missing += 1
            log_precisions.append(math.log(1 / (2 ** missing * total)))

    brevity = 1.0
    if len(predict) <= len(label):
        brevity = math.exp(1 - len(label) / len(predict))
    return brevity * math.exp(math.fsum(0.25 * value for value in log_precisions))


# ---- ROUGE ------------------------------------------------------------------------------------


def rouge(predict: list[str], label: list[str]) -> dict[str, float]:
    """ROUGE-1, 2 and L of two lists of words, as F1. Repeated words and pairs count once."""
    predict = normalize_words(predict)
    label = normalize_words(label)
    if not any(predict) or not any(label):
        return {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}

    scores = {}
    for n in (1, 2):
        predicted = set(ngrams(predict, n))
        expected = set(ngrams(label, n))
        scores[f"rouge-{n}"] = f1(len(predicted & expected), len(predicted), len(expected))
    scores["rouge-l"] = f1(common_subsequence(predict, label), len(predict), len(label))
    return scores


def normalize_words(words: list[str]) -> list[str]:
    """Words without blanks, sentence by sentence, as rouge-chinese sees them.

    A sentence that consists of blanks counts as one empty word.
    """
    text = " ".join(words)
    for end in SENTENCE_ENDS:
        text = end.sub(r"\1\n\2", text)
    sentences = [line for line in text.rstrip().split("\n") if line]
    return [word for line in sentences for word in line.split() or [""]]


def f1(common: int, predicted: int, expected: int) -> float:
    """2 p r / (p + r). rouge-chinese adds 1e-8 to the divisor, which shows in the fifth decimal."""
    precision = common / predicted if predicted else 0.0
    recall = common / expected if expected else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)


def common_subsequence(a: list, b: list) -> int:
    """Length of the longest common subsequence: items of both in the same order, gaps allowed.

    Bit i of `row` is 0 where the best length grows at a[i]; an item of b updates all bits with one
    addition.
    """
    positions = {}
    for i, item in enumerate(a):
        positions[item] = positions.get(item, 0) | 1 << i

    all_bits = (1 << len(a)) - 1
    row = all_bits
    for item in b:
        matches = row & positions.get(item, 0)
        row = (row + matches | row - matches) & all_bits
    return len(a) - row.bit_count()


# ---- a file of predictions --------------------------------------------------------------------


def read_predictions(path) -> list[dict]:
    """Rows {"predict", "label"} of a JSON-lines file. Raises ValueError that names the line."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append({"predict": row["predict"] + "", "label": row["label"] + ""})
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path} line {number}: not of the form {{"predict": "…", '
                                 f'"label": "…"}}: {line.strip()[:100]}') from None
    return rows


def main(argv):
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError("usage: python -m evals.bleu_rouge generated_predictions.jsonl")
    words, description = pick_words()
    rows = []
    for row in tqdm(read_predictions(argv[0]), unit="row", leave=False, disable=None):
        rows.append(score(row["predict"], row["label"], words))
    mean = means(rows)
    for name, value in mean.items():
        print(f"{name}: {value:.4f}")

    output = Path("predictions_score.json")
    output.write_text(json.dumps(mean, indent=4) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows, {description}; written to {output}")


if __name__ == "__main__":
    run_script(main)
