"""checkpoint/training_state.py: a resumed run equals an uninterrupted run, bit for bit."""
import json

import pytest
import torch
from torch import nn

from checkpoint.training_state import (checkpoints_in, load_training_state, read_trainer_state,
                                       rng_state, save_training_state)


# ---- resuming ----


class Toy:
    """AdamW in two groups over a noisy loss: every step draws from torch's generator."""

    def __init__(self, seed=0, size=6):
        torch.manual_seed(seed)
        self.named = {"layer.weight": nn.Parameter(torch.randn(size, 4)),
                      "layer.bias": nn.Parameter(torch.randn(size))}
        self.names = list(self.named)
        weight, bias = self.named.values()
        groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "lr": 0.02}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1)

    def train(self, steps):
        weight, bias = self.named.values()
        for _ in range(steps):
            self.optimizer.zero_grad()
            ((torch.randn(3, 4) @ weight.T + bias).square().mean() * torch.rand(())).backward()
            self.optimizer.step()
        return self

    def values(self):
        state = [value for p in self.named.values()
                 for _, value in sorted(self.optimizer.state[p].items())]
        return [*self.named.values(), *state, torch.get_rng_state()]


def generators():
    """The states of the random generators of a run with one rank, as save_training_state takes
    them."""
    return {f"{device}.0": state for device, state in rng_state().items()}


def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path):
    straight = Toy().train(9).values()
    first = Toy().train(4)
    state = {"step": 4, "log_history": [{"loss": 1.5}], "best": None}
    save_training_state(tmp_path, first.optimizer, first.names, state, generators())
    weights = {name: p.detach().clone() for name, p in first.named.items()}
    torch.rand(100)  # time passes, another process starts
    second = Toy(seed=99)
    with torch.no_grad():
        for name, p in second.named.items():
            p.copy_(weights[name])
    assert load_training_state(tmp_path, second.optimizer, second.names) == state
    assert all(torch.equal(a, b) for a, b in zip(second.train(5).values(), straight))
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["optimizer.safetensors", "rng.safetensors", "trainer_state.json"]  # no pickle


def test_a_second_save_may_replace_the_file_that_was_loaded(tmp_path):
    """Loaded tensors must not change when their file does."""
    toy = Toy().train(3)
    save_training_state(tmp_path, toy.optimizer, toy.names, {}, generators())
    again = Toy()
    load_training_state(tmp_path, again.optimizer, again.names)
    held = [v.clone() for v in again.values()[2:-1]]
    save_training_state(tmp_path, toy.train(2).optimizer, toy.names, {}, generators())
    assert all(torch.equal(a, b) for a, b in zip(again.values()[2:-1], held))


@pytest.mark.parametrize("rename, size, words", [
    ({"layer.weight": "other.weight"}, 6,
     "holds no optimizer state for other.weight, which this run trains: the"),
    ({}, 7, r"optimizer state of shape \[6.*\] for layer..*, which is \[7.*\] here"),
])
def test_state_of_another_run_is_refused(tmp_path, rename, size, words):
    toy = Toy().train(1)
    save_training_state(tmp_path, toy.optimizer, toy.names, {}, generators())
    other = Toy(size=size)
    with pytest.raises(ValueError, match=words):
        load_training_state(tmp_path, other.optimizer,
                            [rename.get(name, name) for name in other.names])


def test_state_of_a_run_that_trained_more_is_refused(tmp_path):
    toy = Toy().train(1)
    save_training_state(tmp_path, toy.optimizer, toy.names, {}, generators())
    fewer = torch.optim.AdamW([toy.named["layer.weight"]])
    with pytest.raises(ValueError,
                       match="holds optimizer state for layer.bias, which this run does not train"):
        load_training_state(tmp_path, fewer, ["layer.weight"])


@pytest.mark.parametrize("file", ["optimizer.safetensors", "rng.safetensors", "trainer_state.json"])
def test_incomplete_state_is_refused(tmp_path, file):
    toy = Toy().train(1)
    save_training_state(tmp_path, toy.optimizer, toy.names, {}, generators())
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError,
                       match=f"{file} is missing: the run cannot be resumed from here"):
        load_training_state(tmp_path, toy.optimizer, toy.names)


def test_truncated_state_is_refused(tmp_path):
    toy = Toy().train(1)
    save_training_state(tmp_path, toy.optimizer, toy.names, {}, generators())
    (tmp_path / "trainer_state.json").write_text('{"step": ')
    with pytest.raises(ValueError,
                       match="trainer_state.json is not valid JSON.*cannot be resumed from here"):
        load_training_state(tmp_path, toy.optimizer, toy.names)


@pytest.mark.parametrize("state, words", [
    ("[" * 100_000, "(is nested too deeply|is not valid JSON)"), ("[1]", "holds a list"),
    ({"resume": [1]}, r"resume: \[1\] is not an object"),
    ({"log_history": {"a": 1}}, "log_history is not a list of objects"),
    ({"log_history": [1]}, "log_history is not a list of objects"),
    ({"resume": {"step": "7"}}, 'resume: step: "7" is not a whole number'),
    ({"resume": {"step": -1}}, "resume: step: -1 is not a whole number"),
    ({"resume": {"step": 10**30}}, "resume: step: 10+ is not a whole number"),
    ({"resume": {"rows_per_step": 1.5}}, "rows_per_step: 1.5"),
    ({"resume": {"rows": 3}}, "rows: 3 is not text"),
    ({"resume": {"epoch": None}}, "epoch: null is not a number"),
    ({"resume": {"window": [1]}}, r"window: \[1\] is not a pair"),
    ({"resume": {"window": [1, "2"]}}, "window: .* is not a pair"),
    ({"resume": {"best": "3"}}, 'best: "3" is not a pair'),
    ({"resume": {"seen": {"loss": 1}}}, "seen: .* is not an object with pairs"),
    ({"resume": {"compiled": 1}}, "compiled: 1 is not true or false"),
    ({"resume": {"loss_scale": {}}}, "loss_scale: {} is not a list"),
])
def test_a_hostile_trainer_state_is_named(state, words, tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(state if isinstance(state, str) else json.dumps(state))
    with pytest.raises(ValueError,
                       match=f"trainer_state.json:? .*{words}.*cannot be resumed from here"):
        read_trainer_state(tmp_path)


def test_numbers_that_runs_do_write_are_read(tmp_path):
    state = {"resume": {"step": 3, "best": [3, float("nan")], "lowest": None, "loss_scale": None,
                        "epoch": 1,
                        "loss_total": float("inf"), "seen": {"a/b": [0.5, 2]}, "new": {}},
    "log_history": [{}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert json.dumps(read_trainer_state(tmp_path)) == json.dumps(state)


def test_complete_checkpoints_oldest_first(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-3", "checkpoint-x",
                 "checkpoint-5.partial", "other-1"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-3":  # stopped before its state was written
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert [p.name for p in checkpoints_in(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
    every = [p.name for p in checkpoints_in(tmp_path, resumable=False)]
    assert every == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert checkpoints_in(tmp_path / "absent") == []
