"""evals/loss.py: the loop against a plain computation, and its three callers against each other."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoint.read_config import model_config
from data import IGNORE
from evals.compare import mean_loss
from evals.loss import evaluate, evaluate_examples
from losses import SFTObjective
from model import CausalLM, init_weights
from runtime.precision import Precision
from text.token_cache import Example

CONFIG = SimpleNamespace(stage="sft", per_device_eval_batch_size=2, disable_tqdm=True,
                         moe_aux_loss_coef=0.0, compute_accuracy=False)
OBJECTIVE = SFTObjective()


def precision_of(model):
    return Precision(torch.float32, torch.device("cpu"), model, adapters_only=False)


@pytest.fixture
def model():
    fields = dict(model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
                  max_position_embeddings=64)
    model = CausalLM(model_config(fields)).requires_grad_(False)
    init_weights(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def examples():
    """Five examples; the second has no label, the last batch is smaller than the others."""
    draw = np.random.default_rng(0)
    examples = []
    for size, labelled in ((9, 4), (5, 0), (12, 7), (3, 2), (8, 8)):
        ids = draw.integers(0, 50, size).astype(np.int32)
        labels = ids.copy()
        labels[:size - labelled] = IGNORE
        examples.append(Example(ids, labels, [size]))
    return examples


def plain_losses(model, example):
    """Losses of the tokens that have a label and a token before them, one after the other."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    hidden = model(ids[None], torch.arange(len(ids))[None])
    logits = model.logits(hidden)[0].float()
    labels = torch.from_numpy(example.labels.astype(np.int64))
    return [float(F.cross_entropy(logits[i - 1], labels[i]))
            for i in range(1, len(ids)) if labels[i] != IGNORE]


def test_means_over_batches_tokens_and_examples(model, examples):
    metrics, losses = evaluate_examples(CONFIG, model, examples, "cpu")
    plain = [plain_losses(model.eval(), example) for example in examples]
    for found, wanted in zip(losses, plain):
        if wanted:
            assert found == pytest.approx(np.mean(wanted), abs=1e-5)
        else:
            assert math.isnan(found)
    batches = [plain[0] + plain[1], plain[2] + plain[3], plain[4]]
    tokens = sum(plain, [])
    assert metrics["eval_loss"] == pytest.approx(np.mean([np.mean(b) for b in batches]), abs=1e-5)
    assert metrics["eval_token_loss"] == pytest.approx(np.mean(tokens), abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(np.mean(tokens)), rel=1e-5)
    # the last example has a label that no token predicts, which mean_loss counts as training does
    labels = len(tokens) + 1
    assert mean_loss(model, examples, "cpu") == pytest.approx(sum(tokens) / labels, abs=1e-5)


def test_evaluation_during_training_gives_the_same(model, examples):
    """One pass over each batch equals one over each example. The model's mode is kept."""
    wanted, _ = evaluate_examples(CONFIG, model, examples, "cpu")
    model.train()
    found = evaluate(model, examples, OBJECTIVE, CONFIG, precision_of(model))
    assert model.training
    for name in ("eval_loss", "eval_token_loss", "eval_perplexity"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6)


def test_batches_without_a_label_are_left_out_with_a_note(model, examples, capsys):
    few = [examples[1], examples[1], examples[0]]
    metrics, losses = evaluate_examples(CONFIG, model, few, "cpu")
    assert "1 batches without a supervised token were left out" in capsys.readouterr().out
    assert metrics["eval_loss"] == pytest.approx(losses[2])
    with pytest.raises(ValueError, match="carry no loss at all"):
        evaluate(model, [examples[1]], OBJECTIVE, CONFIG, precision_of(model))
