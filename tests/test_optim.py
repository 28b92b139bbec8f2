"""optim.py against LLaMA-Factory's recorded schedules, published runs, and transformers' decay."""
import json
import math
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

from attention import PackedLayout
from checkpoint.read_config import model_config
from lora import LoRAConfig, attach_lora, trainable
from methods.eval_schedules import EVAL_SCHEDULES
from methods.optimizers import UPDATES
from model import CausalLM
from optim import (SCHEDULES, Optimizer, add_neftune, lr_schedule, make_optimizer, parameter_groups,
                   set_lr, warmup_steps)
from settings.config import Config
from tests import twins
from tests.common import GOLDEN, ROOT, needs_shared, read_jsonl
from tests.tiny_models import further, tiny

RECORDED = PUBLISHED = []
if GOLDEN.is_dir():
    RECORDED = read_jsonl(GOLDEN / "curves" / "lr_schedules.jsonl")
    PUBLISHED = json.loads((GOLDEN / "published" / "llama_factory_logs.json").read_text())["runs"]


# ---- schedules ----


@needs_shared
@pytest.mark.parametrize("line", RECORDED,
                         ids=lambda line: f"{line['lr_scheduler_type']}-{line['total_steps']}")
def test_recorded_schedule(line):
    config = Config(**{key: line[key]
                       for key in ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate",
                                   "warmup_ratio", "warmup_steps")})
    assert warmup_steps(config, line["total_steps"]) == line["resolved_warmup"]
    factor = lr_schedule(config, line["total_steps"])
    rates = [config.learning_rate * factor(step) for step in range(line["total_steps"])]
    assert rates == pytest.approx(line["lr"], rel=1e-12, abs=0)


@needs_shared
def test_recorded_wsd_splits_are_the_defaults():
    """LLaMA-Factory filled num_stable_steps and num_decay_steps in; our defaults are the same."""
    lines = [line for line in RECORDED if line["lr_scheduler_type"] == "warmup_stable_decay"]
    assert len(lines) == 4
    for line in lines:
        config = Config(lr_scheduler_type="warmup_stable_decay",
                        learning_rate=line["learning_rate"], warmup_ratio=line["warmup_ratio"],
                        warmup_steps=line["warmup_steps"])
        factor = lr_schedule(config, line["total_steps"])
        rates = [1e-3 * factor(step) for step in range(line["total_steps"])]
        assert rates == pytest.approx(line["lr"], rel=1e-12, abs=0)


@needs_shared
@pytest.mark.parametrize("run", PUBLISHED, ids=[run["name"] for run in PUBLISHED])
def test_learning_rates_of_a_published_run(run):
    """Cosine runs of 51, 300 and 222 steps on real machines; one logs the rate of the next step."""
    config = Config(lr_scheduler_type="cosine", learning_rate=run["learning_rate"],
                    warmup_ratio=run["warmup_ratio"])
    factor = lr_schedule(config, run["total_steps"])
    ahead = run["learning_rate_logged"].startswith("after")
    steps = [run["logging_steps"] * (i + 1) for i in range(len(run["log"]))]               # 1-based
    rates = [run["learning_rate"] * factor(step if ahead else step - 1) for step in steps]
    assert rates == pytest.approx([line["learning_rate"] for line in run["log"]], rel=1e-9, abs=0)


KINDS = [      # (lr_scheduler_type, lr_scheduler_kwargs, its name in transformers.optimization)
    ("cosine", {"num_cycles": 1.5}, "get_cosine_schedule_with_warmup"),
    ("cosine_with_min_lr", {"min_lr": 1e-5}, "get_cosine_with_min_lr_schedule_with_warmup"),
    *[("cosine_warmup_with_min_lr", kwargs, "get_cosine_with_min_lr_schedule_with_warmup_lr_rate")
      for kwargs in ({"min_lr": 1e-5}, {"min_lr_rate": 0.2, "warmup_lr_rate": 0.3},
                     {"min_lr_rate": 0.0, "num_cycles": 1.5})],
    ("polynomial", {"power": 2.0, "lr_end": 1e-6}, "get_polynomial_decay_schedule_with_warmup"),
    ("inverse_sqrt", {"timescale": 7}, "get_inverse_sqrt_schedule"),
    *[("warmup_stable_decay", kwargs, "get_wsd_schedule") for kwargs in (
        {"num_stable_steps": 4, "num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.1},
        {"num_stable_steps": 4, "num_decay_steps": 10, "decay_type": "1-sqrt"},
        {"num_stable_steps": 2, "num_decay_steps": 9, "min_lr_ratio": 0.2, "num_cycles": 1.5})],
]


@pytest.mark.parametrize("kind, kwargs, theirs", KINDS,
                         ids=[f"{kind[0]}-{i}" for i, kind in enumerate(KINDS)])
def test_arguments_of_a_schedule_equal_transformers(kind, kwargs, theirs):
    optimization = pytest.importorskip("transformers.optimization")
    total, warm, rate = 18, 4, 1e-3
    config = Config(lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, learning_rate=rate,
                    warmup_steps=warm)
    factor = lr_schedule(config, total)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    if theirs not in ("get_inverse_sqrt_schedule", "get_wsd_schedule"):
        kwargs = {**kwargs, "num_training_steps": total}
    judge = getattr(optimization, theirs)(optimizer, num_warmup_steps=warm, **kwargs).lr_lambdas[0]
    assert [factor(step) for step in range(total)] == pytest.approx(
        [judge(step) for step in range(total)], rel=1e-12
    )


def test_every_schedule_of_the_config_is_here():
    offered = next(f for f in fields(Config) if f.name == "lr_scheduler_type").metadata["choices"]
    assert set(offered) == SCHEDULES.keys() | EVAL_SCHEDULES.keys()


def test_every_schedule_of_transformers_is_here():
    names = pytest.importorskip("transformers.trainer_utils").SchedulerType
    assert {name.value for name in names} <= SCHEDULES.keys() | EVAL_SCHEDULES.keys()


@pytest.mark.parametrize("ratio, steps, total, want", [
    (None, 0, 100, 0), (0.1, 0, 12, 2), (0.1, 0, 222, 23), (None, 7, 100, 7), (None, 0.03, 100, 3),
    (None, 0.03, 101, 4),
])
def test_warmup_is_a_fraction_rounded_up_or_a_count(ratio, steps, total, want):
    assert warmup_steps(Config(warmup_ratio=ratio, warmup_steps=steps), total) == want


@pytest.mark.parametrize("kind, kwargs, words", [
    ("cosine_with_min_lr", {},
     "cosine_with_min_lr needs lr_scheduler_kwargs with either min_lr .* or min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, "either min_lr"),
    ("cosine", {"num_cycle": 2},
     r"lr_scheduler_type cosine has no 'num_cycle' \(did you mean 'num_cycles'\?\)"),
    ("linear", {"min_lr": 1e-6}, "linear has no 'min_lr'; it knows none"),
    ("warmup_stable_decay", {"decay_type": "sqrt"},
     "decay_type 'sqrt' is none of cosine, linear, 1-sqrt"),
    ("cosine", {"num_cycles": "many"}, "num_cycles: 'many' is not a number"),
    ("polynomial", {"power": None}, "power: None is not a number"),
])
def test_invalid_arguments_of_a_schedule(kind, kwargs, words):
    with pytest.raises(ValueError, match=words):
        lr_schedule(Config(lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs), 10)


# ---- the optimizer and its groups ----


def named_groups(named, config):
    """[(learning rate, decay, names)] of the groups."""
    names = {id(p): name for name, p in named.items()}
    groups = parameter_groups(named, config)
    assert all(group["lr"] == group["base_lr"] for group in groups)
    # each exactly once
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(named)
    return [(group["lr"], group["weight_decay"], {names[id(p)] for p in group["params"]})
            for group in groups]


def test_decay_of_full_training_equals_transformers():
    trainer = pytest.importorskip("transformers.trainer")
    model = tiny(model_type="qwen3", attention_bias=True).requires_grad_(True)
    decayed = set(trainer.Trainer.get_decay_parameter_names(None, model))
    named = dict(model.named_parameters())
    spared = named.keys() - decayed
    kinds = {name.rsplit(".", 2)[-2] for name in spared}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "norm", "q_norm", "k_norm",
                     "input_layernorm", "post_attention_layernorm"}
    groups = named_groups(named, Config(learning_rate=1e-3, weight_decay=0.1))
    assert groups == [(1e-3, 0.1, decayed), (1e-3, 0.0, spared)]


def test_lora_is_one_decayed_group():
    named = trainable(attach_lora(tiny(), LoRAConfig()))
    assert (named_groups(named, Config(learning_rate=1e-3, weight_decay=0.1))
            == [(1e-3, 0.1, set(named))])


def test_lora_plus_groups():
    """As LLaMA-Factory: A and full matrices at the base rate, B and norms at ratio times it, all
    with decay."""
    named = trainable(attach_lora(tiny(), LoRAConfig(modules_to_save=["lm_head", "model.norm"])))
    groups = named_groups(named,
                          Config(learning_rate=1e-3, weight_decay=0.1, loraplus_lr_ratio=16.0))
    slow = {name for name in named if "lora_A" in name} | {"lm_head.weight"}
    fast = {name for name in named if "lora_B" in name} | {"model.norm.weight"}
    assert [(pytest.approx(lr), decay, names) for lr, decay, names in groups] == [
        (1e-3, 0.1, slow), (16e-3, 0.1, fast)
    ]
    assert groups[0][0] == 1e-3                                            # the logged rate


def test_lora_plus_without_ratio_is_off():
    named = trainable(attach_lora(tiny(), LoRAConfig()))
    assert len(parameter_groups(named, Config(loraplus_lr_ratio=None))) == 1


def test_first_step_is_adamw_by_hand():
    """arXiv:1711.05101, algorithm 2, at t = 1: the corrected moments are the gradient and its
    square."""
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    config = Config(learning_rate=0.1, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.95,
                    adam_epsilon=1e-3)
    optimizer = make_optimizer({"x.weight": w, "x.bias": b}, config, torch.device("cpu"),
                               **further(config))
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-3
               for group in optimizer.param_groups)
    assert set_lr(optimizer, 0.5) == 0.05
    start = (w.detach().clone(), b.detach().clone())
    w.grad = torch.randn(4, 3)
    b.grad = torch.randn(4)
    optimizer.step()
    for p, before, decay in ((w, start[0], 0.2), (b, start[1], 0.0)):
        assert torch.allclose(p,
                              before * (1 - 0.05 * decay) - 0.05 * p.grad / (p.grad.abs() + 1e-3),
                              atol=1e-6)


@pytest.mark.parametrize("update", ("adamw", "adamw_plain"))
def test_adamw_equals_torch(update):
    """Ten steps of two groups; a parameter without a gradient is unchanged and has no state."""
    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(size, generator=generator))
                for size in ((4, 3), (7,), (2, 2))]

    def groups(params):
        return [{"params": params[:1], "lr": 0.1, "weight_decay": 0.2},
                {"params": params[1:], "lr": 0.02, "weight_decay": 0.0}]

    ours, theirs = parameters(), parameters()
    mine = Optimizer([group | {"betas": (0.8, 0.95), "eps": 1e-3, "update": update}
                      for group in groups(ours)], UPDATES)
    other = torch.optim.AdamW(groups(theirs), betas=(0.8, 0.95), eps=1e-3)
    for step in range(10):
        for p, q in zip(ours[:2], theirs[:2]):
            p.grad = torch.sin(7.0 * step + torch.arange(p.numel())).view_as(p)
            q.grad = p.grad.clone()
        mine.step()
        other.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(ours, theirs))
    assert torch.equal(ours[2], parameters()[2]) and not mine.state[ours[2]]
    for p, q in zip(ours[:2], theirs[:2]):
        assert mine.state[p].keys() == other.state[q].keys() and float(mine.state[p]["step"]) == 10
        assert all(torch.allclose(mine.state[p][name], other.state[q][name], atol=1e-6)
                   for name in mine.state[p])


# ---- Muon and GaLore ----


def test_the_optimizer_does_not_import_the_compiler():
    code = ("import sys, torch; from settings.config import Config\n"
            "from optim import make_optimizer\n"
            "w = torch.nn.Parameter(torch.ones(3)); w.grad = torch.ones(3)\n"
            "make_optimizer({'x.weight': w}, Config(), w.device).step()\n"
            "sys.exit(bool(w[0] == 1) or 'torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_rates_of_all_groups_follow_the_schedule():
    named = trainable(attach_lora(tiny(), LoRAConfig()))
    optimizer = make_optimizer(named, Config(learning_rate=1e-3, loraplus_lr_ratio=4.0),
                               torch.device("cpu"))
    for factor in (0.5, 0.25, 1.0):                                        # never compounds
        assert set_lr(optimizer, factor) == pytest.approx(1e-3 * factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [1e-3 * factor, 4e-3 * factor]
        )


# ---- NEFTune and loss scaling ----


def embedding_model(embedding):
    """A model whose forward pass is the embedding alone, called as the decoder is."""
    class EmbeddingModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.embed_tokens = embedding

        def forward(self, input_ids, position_ids=None, layout=None):
            return self.model.embed_tokens(input_ids)

    return EmbeddingModel()


def test_neftune_noise_per_sequence():
    """Uniform in ±alpha / sqrt(L * D) for a sequence of L tokens: smaller in longer sequences."""
    D, alpha, lengths = 64, 5.0, [4, 300, 40]
    embedding = nn.Embedding(10, D)
    nn.init.constant_(embedding.weight, 3.0)
    model = embedding_model(embedding)
    add_neftune(model, alpha)
    ids = torch.zeros(1, sum(lengths), dtype=torch.long)
    torch.manual_seed(0)
    layout = PackedLayout(lengths, "cpu")
    noise = (model(ids, None, layout) - 3.0).detach()[0]
    for part, L in zip(noise.split(lengths), lengths):
        bound = alpha / math.sqrt(L * D)
        assert 0.97 * bound < part.abs().max() <= bound * 1.00001
        assert part.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(part.mean()) < bound * 0.12
    first, second = (model(ids, layout=layout) for _ in range(2))
    assert not torch.equal(first, second)                                  # new noise each time
    with torch.no_grad():
        # none in evaluation and generation
        assert torch.equal(model(ids, None, layout), embedding.weight[ids])


def test_neftune_keeps_dtype_and_gradient():
    embedding = nn.Embedding(10, 8, dtype=torch.bfloat16)
    model = embedding_model(embedding)
    add_neftune(model, 5.0)
    out = model(torch.tensor([[1, 2, 3]]), None, PackedLayout([3], "cpu"))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert torch.equal(embedding.weight.grad.sum(1),
                       torch.tensor([0, 8, 8, 8] + [0] * 6, dtype=torch.bfloat16))


# ---- vendors' names elsewhere ----


def test_lora_plus_finds_b_under_the_vendors_names():
    fields = {**twins.QWEN1, "num_hidden_layers": 1}
    model = CausalLM(model_config(fields))
    attach_lora(model, LoRAConfig(r=2, target_modules=["c_attn", "w2"]),
                stored_name=model.config.stored_name)
    config = Config(learning_rate=1e-3, loraplus_lr_ratio=16.0)
    groups = parameter_groups(trainable(model), config)
    rates = {id(p): group.get("lr", 1e-3) for group in groups for p in group["params"]}
    assert {name.split(".lora_")[1][0]: rates[id(p)] for name, p in trainable(model).items()} == {
        "A": 1e-3, "B": 16e-3
    }
