"""scale/pipeline_parallel.py: processes that share out a model's layers equal one process.

fork_ranks.py starts 3 and 4 of them on the CPU (gloo), each with the worker of
tests/test_tensor_parallel.py: train.main on several argument lists, one after the other.
"""
import json
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file

import train
from checkpoint.read_config import model_config
from lora import LoRAConfig
from runtime import stages
from runtime.memory import Workload, memory_plan, model_without_storage, plan_lines
from runtime.stages import flops_of_parts, model_of_stage, share_layers
from scale.stage_messages import masks_of
from settings.config import Config
from settings.load_config import load_config
from tests.common import ROOT, usual
from tests.ranks import COMMON, SMALL, forked, outcomes, small_world, tiny_model
from tests.test_tensor_parallel import WORKER, assert_alike, history

FOUR_LAYERS = {**SMALL, "num_hidden_layers": 4}
MODELS = {
    "llama": {"model_type": "llama", **FOUR_LAYERS, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", **FOUR_LAYERS, "tie_word_embeddings": True},
    "granite": {"model_type": "granite", **FOUR_LAYERS, "tie_word_embeddings": True,
                "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
                "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gemma2": {"model_type": "gemma2", **FOUR_LAYERS, "tie_word_embeddings": True,
               "sliding_window": 32, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 20.0,
               "final_logit_softcapping": 10.0},
    "mixtral": {"model_type": "mixtral", **FOUR_LAYERS, "num_local_experts": 4,
                "num_experts_per_tok": 2, "tie_word_embeddings": False,
                "router_aux_loss_coef": 0.02},
    "qwen2_moe": {"model_type": "qwen2_moe", **FOUR_LAYERS, "num_experts": 4,
                  "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 32, "router_aux_loss_coef": 0.01,
                  "mlp_only_layers": [3], "tie_word_embeddings": False},
}
EXPERTS = dict(lora_target="all,experts,gate", moe_aux_loss_coef=0.1)
SAVES = dict(save_strategy="steps", save_steps=2)
FULL = dict(finetuning_type="full", learning_rate=5e-4)
CASES = {   # settings of runs that agree with one process
    "llama": dict(SAVES, lora_dropout=0.2, neftune_noise_alpha=5),
    "qwen3": dict(model_name_or_path="qwen3", additional_target="q_norm,norm", learning_rate=1e-3,
                  disable_gradient_checkpointing=False, packing=True, lora_dropout=0.1),
    "granite": dict(model_name_or_path="granite"),      # logits scaled behind the last norm
    "gemma2": dict(model_name_or_path="gemma2", use_rslora=True, loraplus_lr_ratio=4),
    "mixtral": dict(EXPERTS, model_name_or_path="mixtral"),
    "qwen2_moe": dict(EXPERTS, model_name_or_path="qwen2_moe"),
    "late adapters": dict(lora_target=r".*layers\.[23]\..*"),
    "evaluation": dict(eval_dataset="eval.jsonl", eval_strategy="steps", save_strategy="steps",
                       eval_steps=2, save_steps=2, per_device_eval_batch_size=3,
                       load_best_model_at_end=True),
    "pairs": dict(stage="dpo", dataset="pairs.jsonl", lora_dropout=0.1),
    "full": FULL | SAVES | dict(model_name_or_path="qwen3"),
    "full, pairs": dict(FULL, stage="dpo", dataset="pairs.jsonl"),
    "full, experts": FULL | dict(model_name_or_path="mixtral", moe_aux_loss_coef=0.1),
}
CASES = usual(CASES, "llama", "qwen3", "mixtral", "late adapters", "evaluation", "pairs", "full",
              "full, experts")
LAYOUTS = {     # name: (processes, settings, cases)
    "3": (3, dict(pipeline_parallel_size=3),
          ("llama", "qwen3", "granite", "qwen2_moe", "late adapters", "full")),
    "2 x 2 ranks": (4, dict(pipeline_parallel_size=2),
                    ("gemma2", "mixtral", "evaluation", "pairs", "full, pairs",
                     "full, experts")),
    "2 x 2 tensor": (4, dict(pipeline_parallel_size=2, tensor_parallel_size=2),
                     ("llama", "mixtral", "full")),
}
LAYOUTS = {layout: (world, settings, [name for name in names if name in CASES])
           for layout, (world, settings, names) in LAYOUTS.items()}
RESUMED = ("llama", "full")         # from step 2 of 4


def arguments(here, name, output, ranks=1, **more) -> list:
    """Arguments of train.py for a case: the same rows in each step with any number of ranks."""
    settings = COMMON | dict(model_name_or_path="llama", join_micro_batches=False) | CASES[name]
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=4 // ranks,
                     max_samples=20, max_steps=4 if "save_steps" in settings else 2)
    for key in ("model_name_or_path", "dataset", "eval_dataset"):
        if key in settings:
            settings[key] = f"{here}/{settings[key]}"
    settings |= dict(output_dir=f"{here}/{output}", **more)
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of all runs: `1 llama` by one process, `3 llama` by three stages, …"""
    here = tmp_path_factory.mktemp("stages")
    small_world(here)
    for name, fields in MODELS.items():
        tiny_model(here / name, fields)
    (here / "worker.py").write_text(WORKER.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    for name in CASES:
        train.main(arguments(here, name, f"1 {name}"))
    for world, onto, saved in ((3, "3", "1"), (4, "2 x 2 tensor", "3")):
        todo = []
        for layout, (processes, settings, names) in LAYOUTS.items():
            if processes == world:
                ranks = 2 if "ranks" in layout else 1
                todo += [arguments(here, name, f"{layout} {name}", ranks, **settings)
                         for name in names]
        todo += [arguments(here, name, f"{onto} {name} resumed", **LAYOUTS[onto][1],
                           resume_from_checkpoint=f"{here}/{saved} {name}/checkpoint-2")
                 for name in RESUMED]
        (here / f"runs{world}").write_text(json.dumps(todo))
        (code, screen, _), = outcomes(forked(world, here / "worker.py", here / f"runs{world}"))
        assert code == 0, screen[-6000:]
        (here / f"screen{world}").write_text(screen)
    for name in RESUMED:
        train.main(arguments(here, name, f"1 {name} resumed",
                             resume_from_checkpoint=f"{here}/3 {name}/checkpoint-2"))
    return here


@pytest.mark.parametrize("layout, name", [(layout, name) for layout, (*_, names) in LAYOUTS.items()
                                          for name in names])
def test_stages_equal_one_process(here, layout, name):
    """Losses, gradient norms, weights, optimizer state, random generators (dropout, NEFTune)."""
    assert_alike(here / f"1 {name}", here / f"{layout} {name}")
    if "ranks" in layout:               # each draws its own
        return
    for one in (here / f"1 {name}").glob("*/rng.safetensors"):
        other = here / f"{layout} {name}" / one.parent.name / one.name
        states = [load_file(file)["cpu.0"] for file in (one, other)]
        assert torch.equal(*states)


@pytest.mark.parametrize("layout", ["1", "3", "2 x 2 tensor"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_with_another_layout(here, name, layout):
    """From one process onto three stages; from these onto one, and onto tensor parallelism."""
    resumed = here / f"{layout} {name} resumed"
    a, b = history(resumed), history(here / f"1 {name}")
    for mine, theirs in zip(a[-3:], b[-3:]):
        for key in ("step", "loss", "grad_norm"):
            assert mine.get(key) == pytest.approx(theirs.get(key), abs=1e-5)
    file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
    ours, wanted = load_file(resumed / file), load_file(here / f"1 {name}" / file)
    assert all((ours[n] - wanted[n]).abs().max() <= 1e-5 for n in wanted)


# ---- what each process holds and sends ----------------------------------------------------------


def held_and_sent(here, name) -> list:
    """[bytes of frozen weights, bytes of messages] of each process, in a run on three stages."""
    number = LAYOUTS["3"][-1].index(name)
    return [[json.loads((here / f"runs3.{what}{rank}").read_text())[number]
             for what in ("held", "sent")] for rank in range(3)]


def test_each_process_holds_its_layers_alone(here):
    """Frozen weights of the llama on three stages: layers 0, 1-2 and 3, which has the head."""
    tensors = load_file(here / "llama/model.safetensors")
    parts = [("embed_tokens", "layers.0"), ("layers.1", "layers.2"),
             ("layers.3", "lm_head", "model.norm")]
    wanted = [sum(t.nbytes for n, t in tensors.items() if any(part in n for part in own))
              for own in parts]
    assert [held for held, _ in held_and_sent(here, "llama")] == wanted


def test_a_stage_below_the_first_adapter_gets_no_gradient(here):
    """Layers 2 and 3 have adapters: each stage sends one row of activations or gradients."""
    sent = [sent for _, sent in held_and_sent(here, "late adapters")]
    assert sent[0] == sent[1] == sent[2] > 0
    first, middle, last = (sent for _, sent in held_and_sent(here, "qwen3"))
    assert middle == first + last and first == last


def test_the_start_page_says_which_process_holds_which_layers(here):
    screen = (here / "screen3").read_text()
    assert "mesh: 3 processes = 1 data x 3 pipeline" in screen
    assert "  process 0   rows of rank 0 of 1; embedding, layer 0\n" in screen
    assert "  process 1   rows of rank 0 of 1; layers 1-2\n" in screen
    assert "  process 2   rows of rank 0 of 1; layer 3, norm and head\n" in screen
    assert "kept for the backward pass, of 3 micro-batches in flight" in screen
    screen = (here / "screen4").read_text()
    assert "mesh: 4 processes = 1 data x 2 pipeline x 2 tensor" in screen
    assert ("  process 3   rows of rank 0 of 1; layer 3, norm and head, query heads 2-3, key/value "
            "heads 1, MLP columns 24-47, token ids 800-1599\n") in screen
    assert "mesh: 4 processes = 2 data x 2 pipeline\n" in screen


# ---- which layers go where, and what that takes -------------------------------------------------


def empty_model(name, lora=None, **more):
    """A model of MODELS without storage."""
    config = Config(finetuning_type="lora" if lora else "full")
    return model_without_storage(config, Workload(
        model_config({**MODELS[name], **more}), lora, [], torch.float32, "plain", "cpu"))


@pytest.mark.parametrize("layers, count", [(7, 3), (6, 6), (9, 2), (5, 1)])
def test_the_slowest_stage_is_as_fast_as_it_can_be(monkeypatch, layers, count):
    """Beside all ways to share the layers out."""
    generator = torch.Generator().manual_seed(layers)
    *blocks, head = torch.rand(layers + 1, generator=generator).tolist()
    monkeypatch.setattr(stages, "flops_of_parts", lambda model, lengths: [*blocks, head])
    found = share_layers(empty_model("llama", num_hidden_layers=layers), [1], count)
    assert [layer for part in found for layer in part] == list(range(layers))

    def slowest(ends):
        parts = [sum(blocks[a:b]) for a, b in zip((0, *ends), (*ends, layers))]
        return max(*parts[:-1], parts[-1] + head) if parts[:-1] else parts[-1] + head

    best = min(slowest(ends) for ends in combinations(range(1, layers), count - 1))
    assert slowest([part.stop for part in found[:-1]]) == pytest.approx(best)


def test_frozen_and_trained_layers_weigh_what_they_compute():
    """By hand, for a row of 10 tokens: 7,680 numbers a layer, a head of 1,600 x 32."""
    pairs = 4 * 4 * 8 * 55                              # 4 heads of 8, 55 pairs of tokens
    full = flops_of_parts(empty_model("llama"), [10])
    assert full == [6 * 7680 * 10 + 3 * pairs] * 4 + [6 * 1600 * 32 * 10]
    lora = LoRAConfig(r=2, lora_alpha=4, target_modules=["layers.2.self_attn.q_proj"])
    frozen = flops_of_parts(empty_model("llama", lora), [10])
    assert frozen[:2] == [2 * 7680 * 10 + pairs] * 2    # forward alone
    assert frozen[2] == 4 * 7680 * 10 + 6 * 2 * (32 + 32) * 10 + 3 * pairs
    assert frozen[4] == 4 * 1600 * 32 * 10


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match="5 is more than this model's 4 layers.* at most 4"):
        share_layers(empty_model("llama"), [1], 5)


def test_the_plan_of_a_stage_counts_its_layers_and_what_is_in_flight():
    """Weights of the stages add up to the whole; the first keeps as many rows as there are stages.
    """
    shared = [range(0, 2), range(2, 3), range(3, 4)]
    config = Config(finetuning_type="full", disable_gradient_checkpointing=True)
    plans = []
    for stage, kept in enumerate((3, 2, 1)):
        model = model_of_stage(empty_model("llama"), shared, stage)
        plans.append(memory_plan(config, Workload(
            model.config, None, [[20]], torch.float32, "plain", "cpu", model=model,
            in_flight=kept)))
    whole = sum(p.nbytes for p in empty_model("llama").parameters())
    assert sum(plan.trained for plan in plans) == whole
    assert plans[2].working > plans[1].working          # the loss
    first, second = (plan.activations / plan.workload.in_flight for plan in plans[:2])
    assert 1.8 < first / second < 2.1                   # two layers, and one
    assert "of 3 micro-batches in flight" in "\n".join(plan_lines(plans[0], None))


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    (dict(expert_parallel_size=2), "deals out layers and expert_parallel_size their experts"),
    (dict(fsdp="full_shard"), "shares out whole layers, fsdp .* shards every weight"),
    (dict(zero_stage=1, finetuning_type="full"), "leave zero_stage and offload_optimizer out"),
    (dict(offload_optimizer="cpu"), "leave zero_stage and offload_optimizer out"),
    (dict(use_dora=True), "plain LoRA, also with use_rslora"),
    (dict(quantization_bit=4), "takes a base in 16 or 32 bits"),
    (dict(finetuning_type="oft"), "is for finetuning_type: lora and full"),
    (dict(optim="adamw_8bit"), "use optim: adamw_torch"),
    (dict(stage="kto"), "stages sft, pt and dpo. Take tensor_parallel_size for kto"),
    (dict(use_asft_loss=True), "compares with the probabilities of a second model"),
    (dict(compute_accuracy=True), "which only the last stage of a pipeline has"),
    (dict(offload_activations=True), "a pipeline has several in flight"),
    (dict(ask="Who are you?"), "ask the adapter in chat.py"),
    (dict(finetuning_type="full", train_from_scratch=True), "draws all weights in one place"),
])
def test_what_does_not_go_with_stages_is_said(settings, message, tmp_path):
    settings = dict(model_name_or_path="m", dataset="d", output_dir=tmp_path / "o",
                    pipeline_parallel_size=2) | settings
    with pytest.raises(ValueError, match=message):
        load_config([f"{key}={value}" for key, value in settings.items()], "train")


def test_megatrons_spelling_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\n"
                    "pipeline_model_parallel_size: 2\n")
    assert load_config([str(path)], "train").pipeline_parallel_size == 2


def test_dropout_beside_experts_is_refused():
    """The masks of an expert have as many rows as it has tokens, which other stages do not know."""
    lora = LoRAConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "experts"])
    block = empty_model("mixtral", lora).model.layers[0]
    with pytest.raises(ValueError, match="lora_dropout beside experts .* Set lora_dropout: 0"):
        masks_of(block)
