"""scale/context_parallel.py: processes that share rows equal one process.

fork_ranks.py starts 2, 3 and 4 of them on the CPU (gloo). Each runs the WORKER of
tests/test_tensor_parallel.py: train.main on several argument lists, one after the other.
"""
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from checkpoint.read_config import model_config
from data import IGNORE, Example, collate
from lora import LoRAConfig, attach_lora
from model import CausalLM
from parallel import Ranks
from runtime.memory import Workload, memory_plan
from scale.context_parallel import check_shares, part_sizes
from scale.cut_losses import own_targets
from scale.mesh import Axis
from settings.config import Config
from settings.load_config import load_config
from tests.common import ROOT, usual
from tests.ranks import COMMON, MIXTURE, SMALL, forked, outcomes, small_world, tiny_model
from tests.test_tensor_parallel import (BALANCED, EXPERTS, FULL, MODELS, SAVES, WORKER,
                                        assert_alike, history)

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)      # see tests/test_fsdp.py
TINY_MODELS = {name: MODELS[name] for name in ("llama", "gemma2", "mixtral", "gpt_oss")} | {
    "gemma3": {**MODELS["gemma2"], "model_type": "gemma3_text", "rope_local_base_freq": 100.0,
               "attn_logit_softcapping": None,
               "layer_types": ["sliding_attention", "full_attention"]},
    "six": {**MIXTURE, "num_attention_heads": 6},
    "alibi": {"model_type": "baichuan", **SMALL, "num_key_value_heads": 4, "model_max_length": 512},
    "dynamic": {**MODELS["llama"], "max_position_embeddings": 32,
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}
TINY_MODELS["alibi"].pop("max_position_embeddings")
TINY_MODELS["latent"] = {
    "model_type": "deepseek_v3", **SMALL, "num_key_value_heads": 4, "kv_lora_rank": 12,
    "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "tie_word_embeddings": False}
TINY_MODELS["latent"].pop("head_dim")
CASES = {   # settings of runs that agree with one process
    "llama": dict(SAVES, lora_dropout=0.2, neftune_noise_alpha=5),
    "qwen3": dict(model_name_or_path="dense", additional_target="q_norm,norm", learning_rate=1e-3,
                  disable_gradient_checkpointing=False, packing=True, flash_attn="sdpa"),
    "gemma2": dict(model_name_or_path="gemma2"),                # capped scores
    "gemma3": dict(model_name_or_path="gemma3"),                # windows with rope of their own
    "alibi": dict(model_name_or_path="alibi"),
    "dynamic": dict(model_name_or_path="dynamic"),              # frequencies of the longest row
    "mixtral": dict(BALANCED, model_name_or_path="mixtral", lora_target="all,experts,gate"),
    "latent": dict(BALANCED, model_name_or_path="latent"),      # keys and values of one vector
    "gpt_oss": dict(EXPERTS, model_name_or_path="gpt_oss"),     # a sink for each head
    "four bits": dict(quantization_bit=4, use_dora=True, lora_dropout=0.1),
    "dft": dict(use_dft_loss=True, lora_target="q_proj,o_proj,lm_head",
                additional_target="embed_tokens"),
    "evaluation": dict(
        eval_dataset="eval.jsonl", eval_strategy="steps", save_strategy="steps", eval_steps=2,
        save_steps=2, per_device_eval_batch_size=3, load_best_model_at_end=True),
    "pairs": dict(stage="dpo", dataset="pairs.jsonl"),
    "judged": dict(stage="kto", dataset="judged.jsonl"),
    "rewards": dict(stage="rm", dataset="pairs.jsonl"),
    "full": FULL | SAVES | dict(model_name_or_path="dense"),
    "six": dict(BALANCED, model_name_or_path="six"),
    "two tokens": dict(EXPERTS, model_name_or_path="six", stage="pt", dataset="short.txt",
                       packing=False),
}
CASES = usual(CASES, "llama", "gemma3", "mixtral", "latent", "evaluation", "pairs", "full", "six",
              "two tokens")
LAYOUTS = {     # of 3 and 4 processes: (case, settings of the mesh); what is left is data parallel
    "3 six": ("six", dict(context_parallel_size=3)),            # key/value heads: 2, three times
    "3 two tokens": ("two tokens", dict(context_parallel_size=3)),
    "4 llama": ("llama", dict(context_parallel_size=4)),        # key/value heads: 2, twice
    "4 mixtral": ("mixtral", dict(context_parallel_size=2)),
    "4 pairs": ("pairs", dict(context_parallel_size=2)),
    "4 cut": ("llama", dict(context_parallel_size=2, tensor_parallel_size=2)),
    "4 cut, full": ("full", dict(context_parallel_size=2, tensor_parallel_size=2)),
    "4 sharded": ("llama", dict(context_parallel_size=4, fsdp="full_shard")),
    "4 sharded, full": ("full", dict(context_parallel_size=2, fsdp="full_shard")),
    "4 state": ("full", dict(context_parallel_size=2, zero_stage=2)),
}
LAYOUTS = usual(LAYOUTS, "3 six", "3 two tokens", "4 mixtral", "4 cut", "4 sharded, full")
RESUMED = ("llama", "full")         # from step 2 of 4, of a run with another layout


def arguments(here, name, output, processes=1, **more) -> list:
    """Arguments of train.py for a case: the same rows in each step on every layout."""
    settings = COMMON | dict(model_name_or_path="llama") | CASES[name]
    sharers = more.get("context_parallel_size", 1) * more.get("tensor_parallel_size", 1)
    settings |= dict(per_device_train_batch_size=2,
                     gradient_accumulation_steps=4 * sharers // processes, max_samples=20,
                     max_steps=4 if "save_steps" in settings else 2)
    for key in ("model_name_or_path", "dataset", "eval_dataset"):
        if key in settings:
            settings[key] = f"{here}/{settings[key]}"
    settings |= dict(output_dir=f"{here}/{output}", **more)
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of all runs: `1 llama` by one process, `2 llama` by two that share rows, …"""
    here = tmp_path_factory.mktemp("rows")
    small_world(here)
    for name, fields in TINY_MODELS.items():
        tiny_model(here / name, fields)
    (here / "worker.py").write_text(WORKER.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    (here / "short.txt").write_text("a\n")
    for name in CASES:
        train.main(arguments(here, name, f"1 {name}"))
    todo = {2: [arguments(here, name, f"2 {name}", 2, context_parallel_size=2)
                for name in CASES if name != "two tokens"]}
    todo[2] += [arguments(here, name, f"2 {name} resumed", 2, context_parallel_size=2,
                          resume_from_checkpoint=f"{here}/1 {name}/checkpoint-2")
                for name in RESUMED]
    for output, (name, settings) in LAYOUTS.items():
        if not ("fsdp" in settings and OLD):
            processes = int(output[0])
            todo.setdefault(processes, []).append(
                arguments(here, name, output, processes, **settings))
    for processes, runs in todo.items():
        (here / f"runs{processes}").write_text(json.dumps(runs))
        (code, screen, _), = outcomes(forked(processes, here / "worker.py",
                                               here / f"runs{processes}"))
        assert code == 0, screen[-4000:]
        (here / f"screen{processes}").write_text(screen)
    for name in RESUMED:
        train.main(arguments(here, name, f"1 {name} resumed",
                             resume_from_checkpoint=f"{here}/2 {name}/checkpoint-2"))
    return here


@pytest.mark.parametrize("name", [name for name in CASES if name != "two tokens"])
def test_two_processes_that_share_rows_equal_one(here, name):
    """Losses, gradient norms, weights, optimizer state, random generators (dropout, NEFTune)."""
    assert_alike(here / f"1 {name}", here / f"2 {name}")
    for one in (here / f"1 {name}").glob("*/rng.safetensors"):
        generators = [load_file(here / f"{n} {name}" / one.parent.name / one.name) for n in (1, 2)]
        assert torch.equal(*(states.pop("cpu.0") for states in generators))


@pytest.mark.parametrize("output", LAYOUTS)
def test_other_layouts_equal_one_process(here, output):
    """Parts of heads that are repeated, and what is cut, sharded or dealt to ranks beside rows."""
    name, settings = LAYOUTS[output]
    if "fsdp" in settings and OLD:
        pytest.skip("fully_shard without GPUs needs torch 2.13")
    assert_alike(here / f"1 {name}", here / output)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_with_another_layout(here, name):
    """From one process onto two, and from two onto one."""
    for processes in (1, 2):
        resumed = here / f"{processes} {name} resumed"
        for mine, theirs in zip(history(resumed)[-3:], history(here / f"1 {name}")[-3:]):
            for key in ("step", "loss", "grad_norm"):
                assert mine.get(key) == pytest.approx(theirs.get(key), abs=1e-5)
        file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
        ours, wanted = load_file(resumed / file), load_file(here / f"1 {name}" / file)
        assert all((ours[n] - wanted[n]).abs().max() <= 1e-5 for n in wanted)


# ---- parts, heads, and what is refused ----------------------------------------------------------


def test_parts_are_equal_but_for_one_token():
    assert part_sizes(10, 4) == [2, 3, 2, 3]
    assert part_sizes(2, 3) == [0, 1, 1]


def test_a_part_predicts_the_first_token_of_the_next():
    """Two sequences of 4 and 3 tokens over three processes: the targets of all, none twice."""
    rows = [Example(np.arange(start, end, dtype=np.int32), np.arange(start, end), [end - start])
            for start, end in ((10, 14), (20, 23))]
    batch = collate(rows)
    parts = [own_targets(batch, Axis(rank, 3, None)) for rank in range(3)]
    assert [part.targets.tolist() for part in parts] == [
        [11, 12], [13, IGNORE], [21, 22, IGNORE]]
    assert [part.lengths for part in parts] == [[2, 0], [2, 0], [0, 3]]


def test_the_start_page_says_who_has_which_part(here):
    page = (here / "screen4").read_text()
    assert "mesh: 4 processes = 2 data x 2 context" in page
    assert "  process 3   rows of rank 1 of 2; part 2 of 2 of each row, the whole model\n" in page
    assert "mesh: 4 processes = 1 data x 2 context x 2 tensor" in page
    assert ("  process 2   rows of rank 0 of 1; part 2 of 2 of each row, query heads 0-1, "
            "key/value heads 0, MLP columns 0-23") in page
    assert re.search(r"largest micro-batch: [\d,]+ tokens \(rows: \d+\), of which a process has \d",
                     page)


@pytest.mark.parametrize("heads, parts, message", [
    (4, 3, "3 does not divide the 4 query heads that a process has (num_attention_heads). Take 1 "
           "or 2, and the other processes for data parallelism or fsdp: full_shard"),
    (6, 4, "Take 1 or 2 or 3, and"),
])
def test_heads_that_cannot_be_dealt(heads, parts, message):
    config = model_config({"model_type": "llama", **SMALL, "num_attention_heads": heads})
    with pytest.raises(ValueError, match=re.escape(message)):
        check_shares(None, config, parts)


def test_dropout_in_experts_is_refused():
    """Each expert has rows of all processes: a mask of one process cannot be drawn."""
    with torch.device("meta"):
        model = CausalLM(model_config(MIXTURE))
    dropout = LoRAConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj"])
    attach_lora(model, dropout)
    check_shares(model, model.config, 2)
    with torch.device("meta"):
        model = CausalLM(model_config(MIXTURE))
    attach_lora(model, replace(dropout, target_modules=["experts"]))
    with pytest.raises(ValueError, match="lora_dropout in experts would draw other masks"):
        check_shares(model, model.config, 2)


@pytest.mark.parametrize("settings, message", [
    (dict(stage="grpo", reward="data/rewards.py:arithmetic"), "samples replies, one token after"),
    (dict(stage="distill", teacher_model="t", distill_lambda=0), "compares whole rows"),
    (dict(label_smoothing_factor=0.1), "set paper_losses: true, which divides by"),
    (dict(compute_accuracy=True, do_eval=True, val_size=2), "measure the adapter with eval.py"),
])
def test_what_does_not_go_together_is_said(settings, message):
    settings = dict(model_name_or_path="m", dataset="d", output_dir="o",
                    context_parallel_size=2) | settings
    with pytest.raises(ValueError, match=message):
        load_config([f"{key}={value}" for key, value in settings.items()], "train")


def test_a_model_is_refused_before_a_weight_is_read(here, monkeypatch):
    ranks = Ranks(axes={"context": Axis(0, 3, None)})
    monkeypatch.setattr(train, "arrange", lambda *args: ranks)
    monkeypatch.setattr(train, "build_model", None)
    with pytest.raises(ValueError, match="3 does not divide the 4 query heads"):
        train.main(arguments(here, "llama", "refused"))
    assert not (here / "refused/train_config.json").exists()


@pytest.mark.parametrize("kernel", ["plain", "sdpa-math", "flash-attn"])
def test_the_plan_gives_each_process_its_tokens(kernel):
    """Half the activations with two processes, apart from buffers of the exchange; k and v of two
    heads on four processes are repeated."""
    config = model_config({"model_type": "llama", **SMALL})
    lora = LoRAConfig(r=4, lora_alpha=8)
    plans = {}
    for parts in (1, 2, 4):
        plans[parts] = memory_plan(Config(), Workload(config, lora, [[4096]], torch.float32,
                                                      kernel, "cpu", parts=parts))
    whole = plans[1]
    assert plans[2].activations == pytest.approx(whole.activations / 2, rel=1e-3)
    assert whole.activations / 4 <= plans[4].activations < whole.activations / 3
    assert plans[2].weights == whole.weights and plans[2].optimizer == whole.optimizer
