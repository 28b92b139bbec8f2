"""Stage distill: teacher = student stands still, one step is what torch computes, and it resumes.

Formulas: tests/test_distill_losses.py.
"""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import eval as evaluation
from checkpoint.load import load_model
from data import IGNORE, label_turns, settings_of
from templates import encode_pieces, render_turns
from tests.common import ROOT, load_argv, read_jsonl, refusal
from tests.ranks import DENSE, forked, outcomes, tiny_model
from tests.rollout_runs import arguments, history, logged_by, steps
from text.load_text import load_text

TINY = ROOT / "models/tiny"
SMALL = dict(
    stage="distill",
    teacher_model=TINY,
    dataset=ROOT / "data/tiny_review.jsonl",
    template="chatml",
    cutoff_len=400,
    max_samples=30,
    max_new_tokens=10,
    per_device_train_batch_size=2,
    max_steps=6,
    learning_rate=3e-3,
    lora_rank=4,
    logging_steps=1,
    save_strategy="no",
    use_cpu=True,
    disable_tqdm=True,
    flash_attn="disabled",
    disable_gradient_checkpointing=True,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A random model with the tokenizer of models/tiny."""
    folder = tmp_path_factory.mktemp("student") / "dense"
    tiny_model(folder, DENSE)
    return folder


def settings(output, **more):
    return arguments(output, SMALL | more)


def run(output, **more):
    return logged_by(output, SMALL | more)


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_a_student_that_is_its_teacher_stands_still(beta, tmp_path):
    """Exactly, on rows and on its own answers: the loss and all gradients are 0."""
    logged = run(tmp_path / "out", model_name_or_path=TINY, distill_beta=beta, val_size=4,
                 eval_strategy="epoch")
    assert {(row["loss"], row["grad_norm"]) for row in steps(logged)} == {(0, 0)}
    evaluated, = [row for row in logged if "eval_loss" in row]
    assert evaluated["eval_loss"] == 0
    assert evaluated["eval_cross_entropy"] == evaluated["eval_teacher_cross_entropy"] > 0
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert not any(weights[name].any() for name in weights if "lora_B" in name)


@pytest.mark.parametrize("beta, temperature", [(0, 1.0), (0.5, 1.0), (1, 0.7)])
def test_a_step_on_rows_is_what_torch_computes_from_both_models(beta, temperature, student,
                                                                tmp_path):
    """The first loss, over all tokens of two micro-batches, from logits of the whole rows."""
    more = dict(model_name_or_path=student, distill_lambda=0, distill_beta=beta, max_steps=1,
                distill_temperature=temperature, disable_shuffling=True,
                gradient_accumulation_steps=2)
    logged, = steps(run(tmp_path / "out", **more))
    sft = {**more, "stage": "sft", "teacher_model": None, "distill_lambda": None,
           "distill_beta": None, "distill_temperature": None}
    plain, = steps(run(tmp_path / "sft", **sft))
    assert logged["cross_entropy"] == pytest.approx(plain["loss"], rel=1e-5)

    config = load_argv(*settings(tmp_path / "rows", **more), script="train")
    models = [load_model(folder, torch.float32) for folder in (student, TINY)]
    text = load_text(config, student, [], models[0].config)
    sums, count = 0.0, 0
    for row in read_jsonl(SMALL["dataset"])[:4]:
        ids, labels = encoded(row, text, config)
        targets = labels[1:]
        here = targets != IGNORE
        p, t = ((model.logits(model(ids[None], torch.arange(len(ids))[None])[0, :-1]).float()[here]
                 / temperature).log_softmax(-1) for model in models)
        m = torch.log(beta * t.exp() + (1 - beta) * p.exp())
        kl = [F.kl_div(other, one, log_target=True, reduction="sum")
              for one, other in ((t, p), (p, t), (t, m), (p, m))]
        sums += {0: kl[0], 1: kl[1]}.get(beta, beta * kl[2] + (1 - beta) * kl[3]).item()
        count += int(here.sum())
    assert logged["loss"] == pytest.approx(sums / count, rel=1e-5)


def encoded(row, text, config):
    """Ids and labels of a row as in stage sft."""
    messages, system = row["messages"], None
    if len(messages) % 2:
        system, *messages = messages
        system = system["content"]
    turns = render_turns(text.template, text.tokenizer, messages, system, None,
                         settings_of(config))
    pairs = [tuple(encode_pieces(text.tokenizer, list(turn))) for turn in turns]
    return map(torch.tensor, label_turns(pairs, config.cutoff_len))


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_step_does_not_depend_on_its_micro_batches(share, student, tmp_path):
    """Nor on how many answers of one row are long: the tokens of the whole step are counted."""
    more = dict(model_name_or_path=student, distill_lambda=share, max_steps=3)
    whole = steps(run(tmp_path / "whole", per_device_train_batch_size=4, **more))
    split = steps(run(tmp_path / "split", per_device_train_batch_size=1,
                      gradient_accumulation_steps=4, **more))
    for ours, theirs in zip(whole, split, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        if share:
            assert theirs["own_answers"] == ours["own_answers"]


def test_two_ranks_equal_one(student, tmp_path):
    more = dict(model_name_or_path=student, num_iterations=2, max_steps=4)
    one = run(tmp_path / "one", gradient_accumulation_steps=2, **more)
    script = [ROOT / "train.py", *settings(tmp_path / "two", **more)]
    (code, text, _), = outcomes(forked(2, *script))
    assert code == 0, text
    for ours, theirs in zip(steps(one), steps(history(tmp_path / "two")), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert theirs["own_answers"] == ours["own_answers"]
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("start", [2, 3])
def test_resumed_within_a_rollout_equals_never_stopped(start, student, tmp_path):
    """Bit for bit, with three steps a rollout: after two of them, and after all."""
    more = dict(model_name_or_path=student, num_iterations=3, save_strategy="steps", save_steps=1)
    whole = run(tmp_path / "whole", **more)
    assert any(0 < row["own_answers"] < 1 for row in steps(whole))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    for name in ("samples.jsonl", "train_config.json", "trainer_log.jsonl"):
        shutil.copy(tmp_path / "whole" / name, resumed)
    shutil.copytree(tmp_path / f"whole/checkpoint-{start}", resumed / f"checkpoint-{start}")
    again = run(resumed, resume_from_checkpoint=resumed / f"checkpoint-{start}", **more)
    assert steps(again) == steps(whole)
    both = (tmp_path / "whole", resumed)
    ours, theirs = ((here / "samples.jsonl").read_text() for here in both)
    assert ours == theirs
    ours, theirs = (load_file(here / "adapter_model.safetensors") for here in both)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- own answers ---------------------------------------------------------------------------------


def test_own_answers_are_those_of_the_trained_model(student, tmp_path):
    logged = steps(run(tmp_path / "out", model_name_or_path=student, distill_lambda=1,
                       learning_rate=1e-2))
    assert all(row["sampler_gap"] < 1e-4 and row["own_answers"] == 1 for row in logged)
    assert all(0 < row["length"] <= 10 and 0 <= row["ended"] <= 1 for row in logged)
    samples = read_jsonl(tmp_path / "out/samples.jsonl")
    assert len(samples) == 6 * 2 and {sample["rollout"] for sample in samples} == set(range(1, 7))
    assert all(sample["prompt"].endswith("<|im_start|>assistant\n") for sample in samples)


def test_a_share_of_the_rows_gets_own_answers(student, tmp_path):
    logged = steps(run(tmp_path / "out", model_name_or_path=student, distill_lambda=0.25,
                       per_device_train_batch_size=10))
    own = sum(row["own_answers"] for row in logged) / len(logged)
    assert 0.1 < own < 0.4
    assert len(read_jsonl(tmp_path / "out/samples.jsonl")) == round(own * 60)


def test_a_prompt_that_fills_the_context_is_named(tmp_path):
    tiny_model(tmp_path / "short", {**DENSE, "max_position_embeddings": 40})
    with pytest.raises(ValueError, match="the prompt that ends .* the model reads at most 40"):
        run(tmp_path / "out", model_name_or_path=tmp_path / "short", distill_lambda=1)


# ---- teachers ------------------------------------------------------------------------------------


def test_the_base_with_another_adapter_is_a_teacher(tmp_path, capsys):
    """An adapter that learns from itself, merged into the base, has nothing to learn."""
    sft = dict(stage="sft", teacher_model=None, model_name_or_path=TINY, learning_rate=1e-2)
    run(tmp_path / "adapter", **sft)
    more = dict(model_name_or_path=TINY, teacher_model=None, max_steps=1,
                teacher_adapters=tmp_path / "adapter")
    same, = steps(run(tmp_path / "same", adapter_name_or_path=tmp_path / "adapter", **more))
    assert same["loss"] < 1e-6 and same["grad_norm"] < 1e-3
    other, = steps(run(tmp_path / "other", **more))
    assert other["loss"] > 1e-3


def test_a_4_bit_student_learns_from_a_4_bit_teacher(tmp_path, capsys):
    """The memory plan counts the teacher; beside it, its adapter stays as it is."""
    sft = dict(stage="sft", teacher_model=None, model_name_or_path=TINY)
    run(tmp_path / "adapter", **sft)
    capsys.readouterr()
    weights = []
    for bits in (None, 4):
        logged = steps(run(tmp_path / f"out{bits}", model_name_or_path=TINY, quantization_bit=4,
                           teacher_adapters=tmp_path / "adapter", teacher_quantization_bit=bits,
                           max_steps=2))
        assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in logged)
        found, = [line for line in capsys.readouterr().out.splitlines() if "frozen weights" in line]
        weights.append(float(found.split()[2]))
    assert weights[1] < 0.7 * weights[0]


def test_full_fine_tuning_has_a_teacher(student, tmp_path):
    logged = steps(run(tmp_path / "out", model_name_or_path=student, finetuning_type="full",
                       lora_rank=None, learning_rate=1e-2, distill_lambda=0, max_steps=8,
                       distill_beta=0))
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3


def test_eval_measures_the_rows(student, tmp_path, capsys):
    more = dict(model_name_or_path=student, max_steps=1, distill_lambda=1)
    run(tmp_path / "out", **more)
    capsys.readouterr()
    evaluation.main(settings(tmp_path / "out", **more, do_eval=True, compare=False))
    assert "that of the rows' own answers" in capsys.readouterr().out


# ---- what cannot be compared ---------------------------------------------------------------------


def test_a_teacher_with_another_tokenizer_is_refused(student, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(TINY, teacher)
    path = teacher / "tokenizer.json"
    known = json.loads(path.read_text())
    vocabulary = known["model"]["vocab"]
    (a, x), (b, y) = list(vocabulary.items())[300:302]
    vocabulary[a], vocabulary[b] = y, x
    path.write_text(json.dumps(known))
    with pytest.raises(ValueError, match="2 ids stand for other tokens, such as .* there and"):
        run(tmp_path / "out", model_name_or_path=student, teacher_model=teacher)
    path.unlink()
    with pytest.raises(ValueError, match="its tokenizer cannot be compared .*copy the tokenizer's"):
        run(tmp_path / "out", model_name_or_path=student, teacher_model=teacher)


def test_a_teacher_with_too_few_rows_is_refused_and_a_padded_one_is_not(student, tmp_path):
    tiny_model(tmp_path / "few", {**DENSE, "vocab_size": 600})
    with pytest.raises(ValueError, match="few knows ids 0 to 599, and the data hold token id"):
        run(tmp_path / "out", model_name_or_path=student, teacher_model=tmp_path / "few")
    tiny_model(tmp_path / "padded", {**DENSE, "vocab_size": 1664})
    logged, = steps(run(tmp_path / "out", model_name_or_path=student, max_steps=1,
                        teacher_model=tmp_path / "padded"))
    assert logged["loss"] > 0


@pytest.mark.parametrize("given, said", [
    ("teacher_model=", "stage: distill needs teacher_model"),
    ("teacher_quantization_bit=5", "teacher_quantization_bit is 4 or 8"),
    ("teacher_quantization_bit=4 distill_lambda=0 fsdp=full_shard", "are not sharded"),
    ("packing=true", "packing is for stages sft and pt"),
    ("train_on_prompt=true", "learns from the replies"),
    ("lora_dropout=0.1", "samples from the very model that it trains"),
    ("lora_dropout=0.1", "or distill_lambda: 0, to sample nothing"),
    ("temperature=0", "learns from sampled replies"),
    ("num_iterations=2 distill_lambda=0", "num_iterations is for stages that sample"),
    ("distill_beta=1.5", "distill_beta"),
    ("moe_aux_loss_coef=0.1", "moe_aux_loss_coef is for stages sft and pt"),
])
def test_settings_that_contradict_each_other(given, said):
    base = ["model_name_or_path=m", "teacher_model=t", "dataset=d", "output_dir=o",
            "stage=distill"]
    assert said in refusal(*base, *given.split(), script="train")


def test_without_own_answers_dropout_and_shards_are_allowed():
    load_argv("model_name_or_path=m", "teacher_model=t", "dataset=d", "output_dir=o",
              "stage=distill", "distill_lambda=0", "lora_dropout=0.1", "fsdp=full_shard",
              script="train")
