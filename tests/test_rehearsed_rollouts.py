"""Stages that sample answers, rows of several adapters and MXFP4, on a CPU that poses as a GPU.

Requires: test_rehearsal.py (whole runs of the other stages), rehearsal.py.
"""
from collections import Counter

import pytest
import torch

import train
from checkpoint.load import load_model
from generate import generate
from methods import rollouts
from model import KVCache
from tests.rehearsal import Fault, host, rehearse
from tests.test_batch_decode import random_prompts
from tests.test_block_files import BASES, in_blocks
from tests.test_many_adapters import ALONE, answers_together
from tests.test_rehearsal import ONE_WAIT, logged, planted, quick, strict_loop  # noqa: F401
from tests.tiny_models import tiny_qwen2

TRAINED = ["use_cpu=true", "max_samples=4", "max_steps=2", "save_strategy=no", "plot_loss=false",
           "disable_tqdm=true", "val_size=0", "eval_strategy=no"]
SAMPLED = ["max_samples=8", "max_steps=2", "per_device_train_batch_size=1", "val_size=0",
           "gradient_accumulation_steps=2", "max_new_tokens=3", "logging_steps=1",
           "eval_strategy=no", "eval_on_start=false", "save_strategy=no", "plot_loss=false",
           "disable_tqdm=true", "torch_compile=false", "pin_kernels.attention=sdpa-flash",
           "join_micro_batches=false"]
STAGES = {
    "grpo": ["configs/tiny_grpo.yaml", "num_generations=3", "temperature=2",
             "reward=WORLD/letters.py:letters"],
    "ppo": ["configs/tiny_ppo.yaml", "reward_model=WORLD/rm", "ppo_epochs=2", "ppo_buffer_size=1"],
    "distill": ["configs/tiny_distill.yaml", "teacher_adapters=WORLD/teacher"],
}
ONCE_A_TOKEN = ("fast/batch_decode.py", "add_tokens")
# of two rollouts, each of two micro-batches: what is kept of a forward pass, and the sampler's gap
KEPT, GAP = ("methods/rollouts.py", "keep"), ("methods/rollouts.py", "measure")
SCORED = ("methods/reward_model.py", "last_token_scores")
WAITS = {
    "grpo": {ONCE_A_TOKEN: 6, KEPT: 4, GAP: 4, ONE_WAIT: 2},
    # the reference and the values, too; two steps of each rollout
    "ppo": {ONCE_A_TOKEN: 6, KEPT: 12, GAP: 4, SCORED: 2, ONE_WAIT: 4},
    "distill": {ONCE_A_TOKEN: 6, KEPT: 4, GAP: 4, ONE_WAIT: 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A reward function, a reward model and a teacher."""
    here = tmp_path_factory.mktemp("rollouts")
    (here / "letters.py").write_text(
        "def letters(prompt, answer, row):\n    return float(sum(map(ord, answer)) % 97)\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(train.__file__.rpartition("/")[0])
        for config, folder in (("tiny_rm", "rm"), ("tiny_lora_sft", "teacher")):
            train.main([f"configs/{config}.yaml", *TRAINED, f"output_dir={here / folder}"]
                       + ["ask=[]"] * (folder == "teacher"))
    return here


def run(stage, world, output, *more):
    settings = [setting.replace("WORLD", str(world)) for setting in STAGES[stage]]
    train.main([*settings, *SAMPLED, *more, f"output_dir={output}"])
    return logged(output)


@pytest.mark.parametrize("stage", STAGES)
def test_a_rollout_waits_once_a_token_and_is_that_of_the_cpu(stage, world, tmp_path):
    with rehearse() as record, strict_loop(record, *WAITS[stage]):
        steps = run(stage, world, tmp_path / "gpu")
    places = Counter(event.place for event in record.loop if event.kind != "planned")
    assert places == WAITS[stage]
    for ours, theirs in zip(steps, run(stage, world, tmp_path / "cpu", "use_cpu=true"),
                            strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-7)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5) != 0


def test_a_planted_copy_in_a_rollout_is_caught(world, tmp_path):
    line = "    return to_device(torch.tensor(values, dtype=torch.float32), device)\n"
    fault = "    return torch.tensor(values, dtype=torch.float32, device=device)\n"
    with planted(rollouts, "flat", line, fault) as place:
        with rehearse() as record, strict_loop(record, *WAITS["grpo"]):
            with pytest.raises(Fault, match=f"^{place}: torch.tensor copies to the GPU"):
                run("grpo", world, tmp_path)


def test_rows_of_several_adapters_wait_once_a_step():
    prompts = random_prompts(7)
    want = answers_together(prompts, {name: make() for name, make in ALONE.items()}, tiny_qwen2())
    with rehearse() as record:
        alone = {name: make().to("cuda") for name, make in ALONE.items()}
        shared = tiny_qwen2().to("cuda")
        with record.strict([ONCE_A_TOKEN]):
            assert answers_together(prompts, alone, shared, "cuda") == want


def test_a_checkpoint_in_mxfp4_is_loaded_on_the_device(tmp_path):
    folder = in_blocks(tmp_path / "base", *BASES["mxfp4"])
    plain = load_model(folder, torch.float32)
    want = [*generate(plain, [1, 2, 3], KVCache(2), max_new_tokens=8)]
    with rehearse():
        model = load_model(folder, torch.float32, device="cuda")
        for name, p in model.named_parameters():
            assert torch.equal(host(p), plain.get_parameter(name)), name
        assert [*generate(model, [1, 2, 3], KVCache(2), max_new_tokens=8)] == want
