"""methods/preference.py: formulas by hand, recorded runs of LLaMA-Factory, and identities.

The recorded runs with their versions and settings: tests/recorded/preference.json.
"""
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from losses import metric_means
from methods.preference import (hinge_losses, ipo_losses, kto_losses, orpo_losses, pair_losses,
                                sigmoid_losses, simpo_losses)
from runtime import memory, setup, throughput
from settings.config import Config
from tests.common import needs_shared, read_jsonl
from tests.preference_runs import RECORDED, run_pairs, weights_in


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- formulas ------------------------------------------------------------------------------------


def test_sigmoid_hinge_and_ipo_by_hand():
    margins = tensor(0.0, 1.0, -2.0)
    p = [1 / (1 + math.exp(-m)) for m in (0.0, 1.0, -2.0)]
    assert sigmoid_losses(margins).tolist() == pytest.approx([-math.log(x) for x in p])
    assert sigmoid_losses(margins, 0.25).tolist() == pytest.approx(
        [-0.75 * math.log(x) - 0.25 * math.log(1 - x) for x in p]
    )
    assert hinge_losses(margins).tolist() == [1.0, 0.0, 3.0]
    # beta 0.5: the difference of log ratios should be 1 / (2 * 0.5) = 1, and is 0, 2 and -4
    assert ipo_losses(margins, 0.5).tolist() == [1.0, 1.0, 25.0]


def test_orpo_and_simpo_from_probabilities():
    good, bad = tensor(0.6, 0.2), tensor(0.5, 0.4)              # mean probability of a token
    odds = [0.6 / 0.4 / (0.5 / 0.5), 0.2 / 0.8 / (0.4 / 0.6)]
    wanted = [-math.log(p) + 0.3 * math.log(1 + 1 / ratio) for p, ratio in zip((0.6, 0.2), odds)]
    assert orpo_losses(good.log(), bad.log(), 0.3).tolist() == pytest.approx(wanted)
    margins = [2 * math.log(0.6 / 0.5) - 0.7, 2 * math.log(0.2 / 0.4) - 0.7]
    assert simpo_losses(good.log(), bad.log(), 2.0, 0.7).tolist() == pytest.approx(
        [math.log(1 + math.exp(-m)) for m in margins]
    )


def test_kto_by_hand():
    """The loss falls as a good answer's log ratio rises above kl, and as a bad one's falls below
    it."""
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))
    losses = kto_losses(tensor(3.0, 3.0), tensor(1.0, 1.0), torch.tensor([True, False]), 0.5, 0.8,
                        1.5)
    assert losses.tolist() == pytest.approx(
        [0.8 * (1 - sigmoid(0.5 * 2)), 1.5 * (1 - sigmoid(-0.5 * 2))]
    )


@pytest.mark.parametrize("kind, wanted",
                         [("sigmoid", math.log(1 + math.exp(-0.2))), ("hinge", 0.8), ("ipo", 9.0)])
def test_paper_losses_use_the_equations_of_the_papers(kind, wanted):
    """Log ratios 3 and 1, beta 0.1.

    Without paper_losses all three equal sigmoid, as in the recorded runs.
    """
    given = tensor(-5.0), tensor(-9.0), tensor(-8.0), tensor(-10.0)
    losses, good, bad = pair_losses(Config(pref_loss=kind, paper_losses=True), *given)
    assert (float(losses), float(good), float(bad)) == pytest.approx((wanted, 0.3, 0.1))
    assert (float(pair_losses(Config(pref_loss=kind), *given)[0])
            == pytest.approx(math.log(1 + math.exp(-0.2))))


def test_gradients_raise_the_chosen_answer():
    for kind in ("sigmoid", "hinge", "ipo", "orpo", "simpo"):
        chosen, rejected = tensor(-0.9).requires_grad_(), tensor(-0.8).requires_grad_()
        pair_losses(Config(pref_loss=kind, paper_losses=True), chosen, rejected, tensor(-1.0),
                    tensor(-1.0))[0].sum().backward()
        assert chosen.grad < 0 < rejected.grad, kind


def test_logged_metrics():
    seen = {"rewards/chosen": (6.0, 3.0), "rewards/rejected": (1.0, 2.0), "kl": (4.0, 8.0),
            "logps/chosen": (0.0, 0.0)}
    assert metric_means(seen) == {"rewards/chosen": 2.0, "rewards/rejected": 0.5,
                                  "rewards/margins": 1.5, "kl": 4.0}
    # no rejected answer: no margin, no 0
    assert metric_means({"rewards/chosen": (6.0, 3.0)}) == {"rewards/chosen": 2.0}


# ---- recorded runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_recorded_run(name, pairs_world, tmp_path, monkeypatch):
    """Losses, rewards, log-probabilities, gradient norms and final weights, to 1e-4 or better."""
    case = RECORDED["cases"][name]
    full = case["settings"].get("finetuning_type") == "full"
    more = {"adapter_name_or_path": None} if full else {}
    ours = run_pairs(pairs_world, name, tmp_path / "out", monkeypatch, **more,
                     **({} if case["weights"] else {"max_steps": 3}))
    for a, b in zip(ours, case["log"]) if case["weights"] else zip(ours[:2], case["log"]):
        for key, value in b.items():
            if name == "dpo_ref" and key == "rewards/accuracies":
                continue  # model and reference are equal at first: rounding decides the sign
            name_here = "eval_kl" if key == "kl" and "eval_loss" in b else key
            bound = dict(abs=1e-5, rel=1e-5) if key in ("loss", "eval_loss") else dict(
                abs=1e-4, rel=5e-5 if key == "kl" else 1e-5
            )
            assert a[name_here] == pytest.approx(value, **bound), (key, b["step"])
    found = weights_in(tmp_path / "out")
    assert case["weights"].keys() == (found.keys() if case["weights"] else set())
    for key, (norm, *first) in case["weights"].items():
        # rounding decides rare tokens' steps of Adam
        bound = 1e-4 if key == "model.embed_tokens.weight" else 1e-5
        assert found[key].flatten()[:1].tolist() == pytest.approx(first, abs=bound), key
        assert float(found[key].norm()) == pytest.approx(norm, abs=1e-4), key
    log = read_jsonl(tmp_path / "out/trainer_log.jsonl")
    if "rewards/accuracies" in case["log"][0] and name != "dpo_ref":
        assert log[0]["accuracy"] == pytest.approx(case["log"][0]["rewards/accuracies"])


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo_ftx", "kto_eval", "rm", "kto_full"])
def test_a_resumed_run_equals_an_uninterrupted_run(name, pairs_world, tmp_path, monkeypatch):
    """Bit for bit, from the middle of an epoch and between two logged steps; with dropout before
    the value head."""
    more = dict(save_strategy="steps", save_steps=2, logging_steps=3, num_train_epochs=2,
                val_size=0, eval_strategy="no")
    more |= {"adapter_name_or_path": None} if name == "kto_full" else {}
    more |= {"model_name_or_path": "tiny_llama3", "lora_dropout": 0.1} if name == "rm" else {}
    whole = run_pairs(pairs_world, name, tmp_path / "a", monkeypatch, **more)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for late in (tmp_path / "b").glob("checkpoint-*"):
        if int(late.name.split("-")[1]) > 2:
            shutil.rmtree(late)
    assert run_pairs(pairs_world, name, tmp_path / "b", monkeypatch, **more,
                     resume_from_checkpoint="true") == whole
    ours, theirs = weights_in(tmp_path / "a"), weights_in(tmp_path / "b")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["dpo_sigmoid", "kto_eval"])
def test_merged_micro_batches_are_the_same_step(name, pairs_world, tmp_path, monkeypatch):
    """KTO's KL estimate stays that of its own micro-batch.

    13 pairs: the last step of an epoch is shorter.
    """
    a = run_pairs(pairs_world, name, tmp_path / "a", monkeypatch, join_micro_batches=False)
    monkeypatch.setitem(setup.ENOUGH_TOKENS, "cpu", 4096)
    b = run_pairs(pairs_world, name, tmp_path / "b", monkeypatch)
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("name", ["dpo_sigmoid", "kto"])
def test_recomputation_gives_the_same_step(name, pairs_world, tmp_path, monkeypatch):
    """Blocks are recomputed in the backward pass, when the adapters are on again."""
    a, b = (run_pairs(pairs_world, name, tmp_path / str(keeps), monkeypatch, max_steps=3,
                      disable_gradient_checkpointing=keeps)
            for keeps in (True, False))
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-5)


def test_token_budget_weights_all_pairs_equally(pairs_world, tmp_path, monkeypatch):
    """One step over all pairs: the same however they are split, by tokens or as one micro-batch."""
    one = dict(max_steps=1, num_train_epochs=1, warmup_ratio=0)
    a = run_pairs(pairs_world, "dpo_sigmoid", tmp_path / "a", monkeypatch, **one,
                  per_device_train_batch_size=13)
    b = run_pairs(pairs_world, "dpo_sigmoid", tmp_path / "b", monkeypatch, **one, token_budget=700,
                  gradient_accumulation_steps=20)
    assert a[0] == pytest.approx(b[0], abs=1e-4)


@pytest.mark.parametrize("more", [
    {"create_new_adapter": True}, {"adapter_name_or_path": None, "lora_dropout": 0.5},
    {"adapter_name_or_path": None, "finetuning_type": "full"},
    {"adapter_name_or_path": None, "additional_target": "norm"}
])
def test_an_untrained_model_equals_its_reference(more, pairs_world, tmp_path, monkeypatch):
    """B of a fresh adapter is 0 and a copy equals its original: rewards are 0 and the loss is log
    2, with any dropout. The first step of the warm-up changes nothing, so the second is checked as
    well."""
    log = run_pairs(pairs_world, "dpo_sigmoid", tmp_path / "out", monkeypatch, max_steps=3, **more)
    for row in log[:2]:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/margins"] == 0
    assert log[2]["rewards/margins"] != 0


def test_the_reference_of_pissa_is_the_base(pairs_world, tmp_path, monkeypatch):
    """Its weights without adapters are the base minus the principal components; LLaMA-Factory
    refuses the combination."""
    log = run_pairs(pairs_world, "dpo_sigmoid", tmp_path / "out", monkeypatch, max_steps=3,
                    adapter_name_or_path=None, pissa_init=True)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(log[0]["rewards/chosen"]) < 1e-3


def test_the_base_as_ref_model_equals_adapters_switched_off(pairs_world, tmp_path, monkeypatch):
    a = run_pairs(pairs_world, "dpo_sigmoid", tmp_path / "a", monkeypatch, max_steps=3)
    b = run_pairs(pairs_world, "dpo_sigmoid", tmp_path / "b", monkeypatch, max_steps=3,
                  ref_model="tiny_llama3")
    for one, other in zip(a[:3], b):
        assert one == pytest.approx(other, abs=1e-4)


def test_the_reference_pass_is_counted_in_flops(pairs_world):
    """2 for each token and weight that is not an adapter's, and attention; KTO adds forward passes
    of both models over the answers of other rows."""
    from checkpoint.load import load_model
    from lora import LoRAConfig, attach_lora
    from runtime.throughput import matmul_parameters
    model = load_model(pairs_world / "tiny_llama3")
    attach_lora(model, LoRAConfig())
    batch = SimpleNamespace(lengths=[10, 20], kl_batch=None)
    frozen, trained = matmul_parameters(model)
    alone, asked = (throughput.flops_of_batch(model.config, frozen, trained, weights, batch)
                    for weights in (0, frozen))
    pairs = 10 * 11 / 2 + 20 * 21 / 2
    assert asked - alone == 2 * frozen * 30 + 4 * 64 * 2 * pairs  # 2 layers of 4 heads of 16
    other = SimpleNamespace(lengths=[10, 20], kl_batch=SimpleNamespace(lengths=[10, 20]))
    more = throughput.flops_of_batch(model.config, frozen, trained, frozen, other) - asked
    assert more == 2 * (asked - alone) + 2 * trained * 30


def test_the_plan_counts_the_reference_model(pairs_world, tmp_path, monkeypatch):
    """Full fine-tuning has a frozen copy as its reference; adapters that are switched off need
    none."""
    weights = []
    for more in ({"adapter_name_or_path": None, "finetuning_type": "full"}, {}):
        plans, real = [], memory.memory_plan
        monkeypatch.setattr(setup, "memory_plan", lambda *args,
                            **more: plans.append(real(*args, **more)) or plans[-1])
        run_dry(pairs_world, tmp_path, monkeypatch, **more)
        monkeypatch.setattr(setup, "memory_plan", real)
        weights.append(plans[-1].weights)
    bytes_of_model = sum(t.numel() * t.itemsize
                         for t in load_file(pairs_world / "tiny_llama3/model.safetensors").values())
    assert weights == [bytes_of_model, bytes_of_model]


def run_dry(pairs_world, tmp_path, monkeypatch, **more):
    with pytest.raises(FileNotFoundError):
        run_pairs(pairs_world, "dpo_sigmoid", tmp_path / "dry", monkeypatch, dry_run=True, **more)


def test_bfloat16_follows_float32(pairs_world, tmp_path, monkeypatch):
    a, b = (run_pairs(pairs_world, "dpo_sigmoid", tmp_path / str(half), monkeypatch, bf16=half)
            for half in (False, True))
    assert all(abs(x["loss"] - y["loss"]) < 0.25 for x, y in zip(a, b) if "loss" in x)
    assert a[-1]["train_loss"] == pytest.approx(b[-1]["train_loss"], rel=0.1)


# ---- what a user may get wrong -------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("settings, words", [
    (
        dict(stage="sft"),
        "has preference pairs .ranking: true., which stage: sft cannot train on; "
        "stages rm and dpo can",
    ),
    (dict(dataset="kto"), "has good and bad answers|has no preference pairs"),
    (dict(stage="kto"), "stage: kto cannot train on"),
    (dict(packing=True), "packing are for stages sft and pt"),
    (dict(pref_loss="orpo", ref_model="tiny_llama3"), "use no reference model"),
    (dict(pref_loss="ipo", dpo_label_smoothing=0.1),
     "dpo_label_smoothing is for pref_loss: sigmoid"),
    (dict(ref_model="tiny_lama3"), "did you mean .*tiny_llama3"),
    (dict(pref_bco_weight=0.5), "pref_bco_weight: 0.5: not in this release"),
    (dict(ref_model_adapters="init_llama3"), "needs ref_model"),
])
def test_clear_errors(settings, words, pairs_world, tmp_path, monkeypatch):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run_pairs(pairs_world, "dpo_sigmoid", tmp_path / "out", monkeypatch, **settings)
