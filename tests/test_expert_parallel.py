"""scale/expert_parallel.py: processes that deal the experts out equal one process.

fork_ranks.py starts 2, 3 and 4 of them on the CPU (gloo), each with rows of its own: train.main on
several argument lists, one after the other.
"""
import json

import pytest
import torch
from safetensors.torch import load_file

import train
from checkpoint.read_config import model_config
from checkpoint.shards import full_shape, full_size
from layers import StackedLinear
from lora import LoRAStacked
from parallel import Ranks
from scale.expert_parallel import OneOwner, cut_stack, own_config
from scale.mesh import Axis
from settings.load_config import load_config
from tests.common import ROOT, usual
from tests.ranks import COMMON, MIXTURE, SMALL, forked, outcomes, small_world, tiny_model
from tests.test_tensor_parallel import MODELS as CUT
from tests.test_tensor_parallel import (BALANCED, EXPERTS, FULL, SAVES, WORKER, assert_alike,
                                        history, with_biases)

MODELS = {      # without the dropout of reward models, whose random numbers each rank draws alone
    "mixtral": dict(CUT["mixtral"], summary_dropout_prob=0.0),
    "qwen2_moe": CUT["qwen2_moe"],
    "stacked": CUT["stacked"],
    "twelve": dict(MIXTURE, num_experts=12),
    "gpt_oss": CUT["gpt_oss"],
}
HAS_GROUPED = hasattr(torch, "_grouped_mm")
# the grouped product, which start-up leaves to GPUs, in the cases that name it
GROUPING = '''
from fast import grouped_experts
run, picked = train.main, grouped_experts.pick_grouped

def run_grouped(arguments):
    grouped = GROUPED and "2 grouped" in str(arguments)
    grouped_experts.pick_grouped = (lambda *args: (True, "grouped here")) if grouped else picked
    run(arguments)

train.main = run_grouped
'''
CASES = {   # settings of runs that agree with one process
    "small experts": BALANCED | SAVES | dict(
        model_name_or_path="twelve", cutoff_len=12, eval_dataset="eval.jsonl",
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3,
        load_best_model_at_end=True),
    "stacked": BALANCED | SAVES | dict(model_name_or_path="stacked"),
    "biased stacks": dict(EXPERTS, model_name_or_path="gpt_oss"),
    "full": BALANCED | FULL | SAVES,
    "router": dict(BALANCED, lora_target="all,experts,gate", disable_gradient_checkpointing=False),
    "experts alone": dict(EXPERTS, model_name_or_path="qwen2_moe", lora_target="experts"),
    "grouped": dict(EXPERTS, model_name_or_path="qwen2_moe", lora_rank=8,
                    disable_gradient_checkpointing=False),
    "attention alone": dict(EXPERTS, lora_target="q_proj"),
    "dora": dict(EXPERTS, use_dora=True),
    "pairs": dict(EXPERTS, stage="dpo", dataset="pairs.jsonl"),
    "rewards": dict(EXPERTS, stage="rm", dataset="pairs.jsonl"),
    "full, pairs": EXPERTS | FULL | dict(stage="dpo", dataset="pairs.jsonl"),
}
CASES = usual(CASES, "small experts", "stacked", "biased stacks", "full", "router", "grouped",
              "pairs")
HALF = EXPERTS | FULL | dict(pure_bf16=True)        # whose sums are rounded in another order
JUDGED = dict(EXPERTS, stage="kto", dataset="judged.jsonl")     # with a divergence of all ranks
FURTHER = {"judged": JUDGED, "half": HALF}
WORLDS = {      # processes: (experts' axis, cases)
    2: (2, list(CASES)),
    3: (3, ["small experts"]),
    4: (2, ["small experts", "full"]),
}
RESUMED = ("stacked", "full")       # from step 2, of a run with another layout


def arguments(here, processes, name, output, **more) -> list:
    """Arguments of train.py for a case: the same rows in each step with any number of processes."""
    settings = COMMON | dict(model_name_or_path="mixtral") | (CASES | FURTHER)[name]
    rows = 12 if "save_steps" in settings else 4
    settings |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=rows // processes,
                     max_samples=rows + 2,      # so each second step has 2 rows: some ranks none
                     max_steps=4 if "save_steps" in settings else 2)
    for key in ("model_name_or_path", "dataset", "eval_dataset"):
        if key in settings:
            settings[key] = f"{here}/{settings[key]}"
    settings |= dict(output_dir=f"{here}/{output}", **more)
    if processes > 1:
        settings.setdefault("expert_parallel_size", WORLDS[processes][0])
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of all runs: `1 mixtral` by one process, `2 mixtral` by two, …"""
    here = tmp_path_factory.mktemp("experts")
    small_world(here)
    for name, fields in MODELS.items():
        tiny_model(here / name, fields)
        with_biases(here / name)
    worker = WORKER.replace("joined = []", GROUPING + "joined = []")
    worker = worker.replace("ROOT", repr(str(ROOT))).replace("GROUPED", str(HAS_GROUPED))
    (here / "worker.py").write_text(worker, encoding="utf-8")
    for name in (*CASES, "half"):
        train.main(arguments(here, 1, name, f"1 {name}"))
    for processes, (_, names) in WORLDS.items():
        todo = [arguments(here, processes, name, f"{processes} {name}") for name in names]
        if processes == 2:
            todo += [arguments(here, 2, "half", "2 half"), arguments(here, 2, "judged", "2 judged"),
                     arguments(here, 2, "judged", "1 judged", expert_parallel_size=1)]
            todo += [arguments(here, 2, name, f"2 {name} resumed",
                               resume_from_checkpoint=f"{here}/1 {name}/checkpoint-2")
                     for name in RESUMED]
        (here / f"runs{processes}").write_text(json.dumps(todo))
        (code, screen, _), = outcomes(forked(processes, here / "worker.py",
                                               here / f"runs{processes}"))
        assert code == 0, screen[-4000:]
        (here / f"screen{processes}").write_text(screen)
    for name in RESUMED:
        train.main(arguments(here, 1, name, f"1 {name} resumed",
                             resume_from_checkpoint=f"{here}/2 {name}/checkpoint-2"))
    return here


@pytest.mark.parametrize("processes, name", [
    (processes, name) for processes, (_, names) in WORLDS.items() for name in names])
def test_processes_that_deal_the_experts_out_equal_one(here, processes, name):
    """Losses, gradient norms, evaluations, weights and optimizer state, on disk as of one."""
    assert_alike(here / f"1 {name}", here / f"{processes} {name}")


@pytest.mark.skipif(not HAS_GROUPED, reason="this torch has no grouped product")
def test_own_experts_are_grouped_where_the_product_is_picked(here):
    screen = (here / "screen2").read_text()
    assert screen.count("\ngrouped here\n") == 1 and "experts one by one in" not in screen


def test_stage_kto_equals_data_parallelism(here):
    """Its divergence is a mean over the ranks, so one process computes another."""
    assert_alike(here / "1 judged", here / "2 judged")


def test_weights_in_16_bits_stay_so(here):
    """pure_bf16, with full fine-tuning: losses are those of one process but for rounding."""
    losses = [[row.get("loss", 0) for row in history(here / f"{n} half")] for n in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and any(losses[0])
    saved = load_file(here / "2 half/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}


def test_an_expert_without_tokens_stays_as_it_is(here):
    """Its gradient is none, not zero: AdamW has no state for it, with any number of processes."""
    for processes in (1, *WORLDS):
        saved = load_file(here / f"{processes} small experts/checkpoint-2/optimizer.safetensors")
        assert any(name.endswith("|unused") for name in saved)
        assert any(".experts." in name and name.endswith("|exp_avg") for name in saved)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_with_another_layout(here, name):
    """From one process onto two, and from two onto one."""
    for processes in (1, 2):
        resumed = here / f"{processes} {name} resumed"
        for mine, theirs in zip(history(resumed)[-3:], history(here / f"1 {name}")[-3:]):
            for key in ("step", "loss", "grad_norm", "eval_loss"):
                assert mine.get(key) == pytest.approx(theirs.get(key), abs=1e-5)
        file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
        ours, wanted = load_file(resumed / file), load_file(here / f"1 {name}" / file)
        assert all((ours[n] - wanted[n]).abs().max() <= 1e-5 for n in wanted)


# ---- what each process holds --------------------------------------------------------------------


def test_each_process_holds_its_experts_and_all_else(here):
    """Bytes of frozen weights."""
    weights = load_file(here / "twelve/model.safetensors")
    experts = sum(w.nbytes for name, w in weights.items() if ".experts." in name)
    others = sum(w.nbytes for name, w in weights.items()) - experts
    for processes, (parts, _) in WORLDS.items():
        for rank in range(processes):
            held = json.loads((here / f"runs{processes}.held{rank}").read_text())
            assert held[0] == others + experts // parts


def test_the_start_page_says_which_process_holds_what(here):
    screen = (here / "screen4").read_text()
    assert "mesh: 4 processes = 2 data x 2 expert" in screen
    assert "  process 0   rows of rank 0 of 4; experts 0-5 of each layer, and all else\n" in screen
    assert "  process 3   rows of rank 3 of 4; experts 6-11 of each layer, and all else\n" in screen


@pytest.mark.parametrize("rank", (0, 1))
def test_a_stack_is_cut_by_experts_and_its_adapter_too(rank):
    """Each expert's matrices are those it has in the whole stack."""
    layer = LoRAStacked(StackedLinear(6, 4, 10), r=3, scale=1.0, dropout=0.0)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    whole = [(layer.weight[number].clone(), *layer.matrices_of(number)) for number in range(6)]
    cut_stack(layer, Axis(rank, 2, None))
    for number in range(3):
        own = (layer.weight[number], *layer.matrices_of(number))
        assert all(map(torch.equal, own, whole[3 * rank + number]))
    assert full_shape(layer.weight) == (6, 4, 10) and full_size(layer.lora_B.weight) == 10 * 18


def test_an_expert_of_another_process_is_empty_under_its_name():
    part = torch.empty(0, 5)
    cut = OneOwner(0, (7,), Axis(1, 2, None), owner=0)
    assert cut.part(torch.ones(7, 5)).shape == part.shape and cut.shape(part) == (7, 5)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("fields, parts, message", [
    (MODELS["mixtral"], 3, "3 does not divide num_experts: 4 of this model. Take 1 or 2 or 4; the"),
    (MODELS["twelve"], 24, "24 does not divide num_experts: 12 of this model. Take 1 or 2 or 3 or"),
    ({"model_type": "llama", **SMALL}, 2, "llama has no experts here. Leave it out"),
])
def test_experts_that_cannot_be_dealt_out(fields, parts, message):
    with pytest.raises(ValueError, match=message):
        own_config(model_config(fields), parts)


@pytest.mark.parametrize("settings, message", [
    (dict(fsdp="full_shard"), "goes with data parallelism alone"),
    (dict(tensor_parallel_size=2), "goes with data parallelism alone"),
    (dict(zero_stage=1, finetuning_type="full"), "goes with data parallelism alone"),
    (dict(pissa_init=True), "LoRA without it, also with use_dora"),
    (dict(quantization_bit=4), "takes a base in 16 or 32 bits"),
    (dict(finetuning_type="oft"), "is for finetuning_type: lora and full"),
    (dict(optim="adamw_8bit"), "use optim: adamw_torch"),
    (dict(ask="Who are you?"), "ask the adapter in chat.py"),
    (dict(stage="distill", teacher_model="t", teacher_quantization_bit=4, distill_lambda=0),
     "weights in 4 bits are not dealt out"),
])
def test_what_does_not_go_together_is_said(settings, message, tmp_path):
    settings = dict(model_name_or_path="m", dataset="d", output_dir=tmp_path / "o",
                    expert_parallel_size=2) | settings
    with pytest.raises(ValueError, match=message):
        load_config([f"{key}={value}" for key, value in settings.items()], "train")


def test_megatrons_spelling_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\n"
                    "expert_model_parallel_size: 2\n")
    assert load_config([str(path)], "train").expert_parallel_size == 2


def test_a_model_is_refused_before_a_weight_is_read(here, monkeypatch):
    ranks = Ranks(axes={"expert": Axis(0, 3, None)})
    monkeypatch.setattr(train, "arrange", lambda *args: ranks)
    monkeypatch.setattr(train, "build_model", None)
    with pytest.raises(ValueError, match="3 does not divide num_experts: 4 of this model"):
        train.main(arguments(here, 1, "router", "refused"))
    assert not (here / "refused/train_config.json").exists()
