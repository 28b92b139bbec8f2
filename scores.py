"""How close an answer comes to the one it should be: BLEU-4 and ROUGE-1, 2 and L, as LLaMA-Factory's script has them.

    python scores.py generated_predictions.jsonl        the means, on the screen and in predictions_score.json

BLEU-4 compares characters: runs of one to four of them, clipped to how often the label has them. ROUGE compares
words: which words (1) and pairs of neighbours (2) the two have in common, and their longest common subsequence (L),
each as the balance (F1) of what share of the prediction and of the label that is. What a word is says jieba, which
knows Chinese ones; where it is not installed, every Chinese character is a word, and the result says so.

Read before: nothing. Read after: eval.py, which makes the predictions.
Sources: BLEU Papineni et al. 2002, smoothed as NIST's mteval-v13a.pl (nltk calls it method3); ROUGE Lin 2004, with the
habits of the package rouge-chinese, since published figures have them; the longest common subsequence in whole machine
words: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
"""
import json
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

NAMES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
# text without Chinese falls apart as jieba cuts it: words and numbers, runs of the marks that names may have, others;
# blanks are words, too, of which as_rouge_sees makes something
PLAIN_WORD = re.compile(r"[\u4e00-\u9fd5]|[a-zA-Z0-9]+(?:\.\d+)?%?|[+#&._%-]+|\r\n|[\s\S]")
# after these, and before what follows, rouge-chinese begins a new sentence
SENTENCE_ENDS = re.compile(r"([。！？?])([^”’])"), re.compile(r"(\.{6})([^”’])")


def pick_words() -> tuple[Callable, str]:
    """(a function from a text to its words, how it is called)."""
    try:
        import jieba
    except ImportError:
        return PLAIN_WORD.findall, "plain words, jieba is not installed (pip install jieba)"
    jieba.setLogLevel(logging.WARNING)                  # it tells where its dictionary is kept
    return jieba.lcut, "words of jieba"


def score(predict: str, label: str, words=None) -> dict[str, float]:
    """{name: 0 … 100} for one answer, rounded to 4 places. words: see pick_words."""
    words = words or pick_words()[0]
    found = {"bleu-4": bleu4(predict, label), **rouge(words(predict), words(label))}
    return {name: round(100 * found[name], 4) for name in NAMES}


def means(rows: list[dict]) -> dict[str, float]:
    """The mean of each score. Raises ValueError where there is nothing to average."""
    if not rows:
        raise ValueError("there are no predictions to score")
    return {name: sum(row[name] for row in rows) / len(rows) for name in NAMES}


# ---- BLEU -------------------------------------------------------------------------------------------------------


def runs(items, n: int) -> list[tuple]:
    """All n neighbours, from left to right."""
    return list(zip(*(items[i:] for i in range(n))))


def bleu4(predict: str, label: str) -> float:
    """Geometric mean of the shares of 1 to 4 neighbouring characters found in the label, times a penalty for brevity.

    Of the lengths that have none in common the first counts as half of one, the next as a quarter, and so on.
    """
    logs, missing = [], 0
    for n in (1, 2, 3, 4):
        made, wanted = Counter(runs(predict, n)), Counter(runs(label, n))
        common, total = (made & wanted).total(), max(1, made.total())
        if n == 1 and not common:
            return 0.0
        missing += not common
        logs.append(math.log(common / total if common else 1 / (2 ** missing * total)))
    brevity = 1.0 if len(predict) > len(label) else math.exp(1 - len(label) / len(predict))
    return brevity * math.exp(math.fsum(0.25 * value for value in logs))


# ---- ROUGE ------------------------------------------------------------------------------------------------------


def rouge(predict: list[str], label: list[str]) -> dict[str, float]:
    """ROUGE-1, 2 and L of two lists of words, as F1. Of words and pairs it counts which there are, not how often."""
    predict, label = as_rouge_sees(predict), as_rouge_sees(label)
    if not any(predict) or not any(label):
        return {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    found = {}
    for n in (1, 2):
        made, wanted = set(runs(predict, n)), set(runs(label, n))
        found[f"rouge-{n}"] = f1(len(made & wanted), len(made), len(wanted))
    return found | {"rouge-l": f1(common_subsequence(predict, label), len(predict), len(label))}


def as_rouge_sees(words: list[str]) -> list[str]:
    """The words without blanks, sentence by sentence, as rouge-chinese has them: an empty line counts as a word ""."""
    text = " ".join(words)
    for end in SENTENCE_ENDS:
        text = end.sub(r"\1\n\2", text)
    lines = [line for line in text.rstrip().split("\n") if line]
    return [word for line in lines for word in line.split() or [""]]


def f1(common: int, made: int, wanted: int) -> float:
    """2 p r / (p + r); rouge-chinese keeps the divisor off zero with 1e-8, which shows in the fifth digit of 100."""
    precision, recall = common / made if made else 0.0, common / wanted if wanted else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)


def common_subsequence(a: list, b: list) -> int:
    """Length of the longest sequence that both contain in order, not necessarily without gaps.

    Bit i of `row` is 0 where the best length grows at a[i]; an item of b updates all of them in one addition.
    """
    places, row = {}, (1 << len(a)) - 1
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = row
    for item in b:
        here = row & places.get(item, 0)
        row = (row + here | row - here) & full
    return len(a) - row.bit_count()


# ---- a file of predictions --------------------------------------------------------------------------------------


def read_predictions(path) -> list[dict]:
    """The rows {"predict": …, "label": …} of a JSON-lines file. Raises ValueError that names the line."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append({"predict": row["predict"] + "", "label": row["label"] + ""})
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path} line {number}: not of the form {{"predict": "…", "label": "…"}}: '
                                 f"{line.strip()[:100]}") from None
    return rows


def main(argv):
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError("usage: python scores.py generated_predictions.jsonl")
    words, called = pick_words()
    rows = [score(row["predict"], row["label"], words)
            for row in tqdm(read_predictions(argv[0]), unit="row", leave=False, disable=None)]
    mean = means(rows)
    for name, value in mean.items():
        print(f"{name}: {value:.4f}")
    Path("predictions_score.json").write_text(json.dumps(mean, indent=4) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows, {called}; written to predictions_score.json")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
