"""What the tests of the stages share that sample answers in training: test_grpo, test_ppo,
test_distill."""
import json

import train
from tests.common import read_jsonl

# a reward function that raises on some prompts
NO_FRUIT = """\
def score(prompt, answer, row):
    assert 'apples' not in prompt, 'no fruit'
    return len(answer)
"""


def arguments(output, settings: dict) -> list[str]:
    """Arguments of train.py; a setting that is None is left out."""
    given = {**settings, "output_dir": output}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def logged_by(output, settings: dict) -> list[dict]:
    """Run train.py here -> its log_history."""
    train.main(arguments(output, settings))
    return history(output)


def history(output) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def steps(rows: list[dict]) -> list[dict]:
    """The logged steps, without evaluations and results."""
    return [row for row in rows if "grad_norm" in row]


def sampled(folder, ranks: int = 1) -> set[tuple]:
    """What the ranks of a run have sampled: {(rollout, row, answer)}."""
    names = ["samples.jsonl", *(f"{rank}.samples.jsonl" for rank in range(1, ranks))]
    return {(sample["rollout"], sample["where"], sample["answer"])
            for name in names for sample in read_jsonl(folder / name)}
