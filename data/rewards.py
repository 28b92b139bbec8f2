"""Reward functions for stages ppo and grpo: examples to use, and to start from.

    reward: data/rewards.py:arithmetic,data/rewards.py:short_answer
    reward_weights: 1,0.1

A function is called with the last question, the answer of the model, and the row of the dataset,
and returns a number; more is better.
"""
import re


def arithmetic(prompt: str, answer: str, row: dict) -> float:
    """1 if the last number of the answer is the last number of the row's own answer."""
    right = numbers_in(own_answer(row))
    if not right:
        raise ValueError("the row's own answer has no number to compare with")
    return float(numbers_in(answer)[-1:] == right[-1:])


def exact_match(prompt: str, answer: str, row: dict) -> float:
    """1 if the answer is the row's own one, blanks at its ends apart."""
    return float(answer.strip() == own_answer(row).strip())


def boxed(prompt: str, answer: str, row: dict) -> float:
    """1 if the answer has exactly one \\boxed{…}, as mathematical data sets want it."""
    return float(len(re.findall(r"\\boxed\{[^{}]*\}", answer)) == 1)


def short_answer(prompt: str, answer: str, row: dict) -> float:
    """1 for an answer of at most 40 characters, less for a longer one, never below 0."""
    return max(0.0, 1 - max(0, len(answer) - 40) / 200)


def numbers_in(text: str) -> list[float]:
    """The numbers of a text, in order; commas between thousands are left out."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))]


def own_answer(row: dict) -> str:
    """The answer in a row of the chat or the alpaca layout. Raises ValueError where none is."""
    answer = row.get("output")
    for turns, speaker, content in (("messages", "role", "content"),
                                    ("conversations", "from", "value")):
        if turns in row:
            last = row[turns][-1]
            answer = None if last.get(speaker) in ("user", "human") else last.get(content)
    if not answer:
        raise ValueError("the row has no answer of its own, 'output' or a last turn; for another "
                         "column change own_answer")
    return answer
