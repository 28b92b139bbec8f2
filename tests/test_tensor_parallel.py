"""scale/mesh.py and tensor_parallel.py: processes that share a model equal one process.

fork_ranks.py starts 2 and 4 of them on the CPU (gloo). Each runs WORKER: train.main on several
argument lists, one after the other.
"""
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from checkpoint.read_config import model_config
from checkpoint.shards import Cut, cut_parameter, full_bytes
from parallel import Ranks
from scale.mesh import Axis, check_world, lay_out, places_of
from scale.tensor_parallel import part_config
from settings.config import Config
from settings.load_config import load_config
from tests.common import ROOT, usual
from tests.ranks import COMMON, DENSE, MIXTURE, SMALL, forked, outcomes, small_world, tiny_model

WORKER = '''
import json, os, sys
sys.path.insert(0, ROOT)
from tests.common import leave_with_parent
leave_with_parent()
import torch, train
from errors import run_script
from runtime import build, run as runtime_run
joined = []
start_ranks, end_ranks = train.start_ranks, runtime_run.end_ranks
train.start_ranks = lambda *args: joined[0]
runtime_run.end_ranks = lambda: None
build_model = train.build_model

def watched(*args):
    model = build_model(*args)
    held.append(sum(p.nbytes for p in model.parameters() if not (p.requires_grad or p.is_meta)))
    sent.append(0)
    return model

def counted(tensor, *args):
    sent[-1] += tensor.nbytes
    return isend(tensor, *args)

train.build_model = watched
isend, torch.distributed.isend = torch.distributed.isend, counted

def main(argv):
    global held, sent
    held, sent = [], []
    joined.append(start_ranks(train.torch.device("cpu"), 60))
    for arguments in json.load(open(argv[0])):
        train.main(arguments)
    for name, numbers in (("held", held), ("sent", sent)):
        json.dump(numbers, open(f"{argv[0]}.{name}{os.environ['RANK']}", "w"))
    end_ranks()

run_script(main)
'''
MODELS = {
    "dense": DENSE, "mixture": MIXTURE,                         # norms of q and k; 24 small experts
    "llama": {"model_type": "llama", **SMALL, "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", **SMALL, "tie_word_embeddings": True, "sliding_window": 32,
               "query_pre_attn_scalar": 8, "attn_logit_softcapping": 20.0,
               "final_logit_softcapping": 10.0},
    "phi3": {"model_type": "phi3", **SMALL, "tie_word_embeddings": False},
    "internlm2": {"model_type": "internlm2", **SMALL, "bias": True, "tie_word_embeddings": False},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2,
                "tie_word_embeddings": False, "router_aux_loss_coef": 0.02},
    "qwen2_moe": {"model_type": "qwen2_moe", **SMALL, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32,
                  "router_aux_loss_coef": 0.01, "tie_word_embeddings": False},
    "stacked": {"model_type": "llama4_text", **SMALL, "num_local_experts": 4,
                "num_experts_per_tok": 1, "intermediate_size_mlp": 40,
                "interleave_moe_layer_step": 1, "tie_word_embeddings": False},
    "gpt_oss": {"model_type": "gpt_oss", **SMALL, "num_local_experts": 4, "sliding_window": 20,
                "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
}
EXPERTS = dict(lora_target="all,experts", join_micro_batches=False)
BALANCED = dict(EXPERTS, moe_aux_loss_coef=0.1)
SAVES = dict(save_strategy="steps", save_steps=2)
FULL = dict(finetuning_type="full", learning_rate=5e-4)
CASES = {   # settings of runs that agree with one process
    "llama": dict(SAVES, lora_dropout=0.2),
    "qwen3": dict(model_name_or_path="dense", additional_target="q_norm,norm", learning_rate=1e-3,
                  disable_gradient_checkpointing=False, packing=True, neftune_noise_alpha=5),
    "gemma2": dict(model_name_or_path="gemma2", use_rslora=True, loraplus_lr_ratio=4),
    "phi3": dict(model_name_or_path="phi3"),
    "internlm2": dict(model_name_or_path="internlm2"),
    "mixtral": dict(BALANCED, model_name_or_path="mixtral", lora_target="all,experts,gate"),
    "qwen3_moe": dict(BALANCED, model_name_or_path="mixture", cutoff_len=24),
    "qwen2_moe": dict(BALANCED, model_name_or_path="qwen2_moe"),
    "stacked": dict(BALANCED, model_name_or_path="stacked"),
    "gpt_oss": dict(EXPERTS, model_name_or_path="gpt_oss"),
    "evaluation": dict(
        eval_dataset="eval.jsonl", eval_strategy="steps", save_strategy="steps", eval_steps=2,
        save_steps=2, per_device_eval_batch_size=3, load_best_model_at_end=True,
        compute_accuracy=True),
    "head": dict(lora_target="q_proj,o_proj,lm_head", additional_target="embed_tokens",
                 learning_rate=1e-3),
    "pairs": dict(stage="dpo", dataset="pairs.jsonl"),
    "judged": dict(stage="kto", dataset="judged.jsonl"),
    "rewards": dict(stage="rm", dataset="pairs.jsonl"),
    "full": FULL | SAVES | dict(model_name_or_path="dense"),
    "full, pairs": dict(FULL, stage="dpo", dataset="pairs.jsonl"),
    "full, experts": BALANCED | FULL | dict(model_name_or_path="mixtral"),
}
CASES = usual(CASES, "llama", "qwen3", "mixtral", "evaluation", "head", "pairs", "full")
# cases of 2 x 2 processes
FOUR = usual(["gemma2", "qwen3_moe", "evaluation", "pairs", "full"], "evaluation", "full")
RESUMED = ("llama", "full")         # from step 2 of 4, of a run with another layout


def arguments(here, processes, name, output, **more) -> list:
    """Arguments of train.py for a case: the same rows in each step with 1, 2 or 4 processes."""
    ranks = max(1, processes // 2)
    settings = COMMON | dict(model_name_or_path="llama") | CASES[name]
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=4 // ranks,
                     max_samples=20, max_steps=4 if "save_steps" in settings else 2)
    for key in ("model_name_or_path", "dataset", "eval_dataset"):
        if key in settings:
            settings[key] = f"{here}/{settings[key]}"
    settings |= dict(output_dir=f"{here}/{output}", **more)
    if processes > 1:
        settings["tensor_parallel_size"] = 2
    return [f"{key}={value}" for key, value in settings.items()]


def with_biases(folder):
    """Give the biases of a checkpoint, which start as zeros, values."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("bias"):
            weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of all runs: `1 llama` by one process, `2 llama` by two that share a model, …"""
    here = tmp_path_factory.mktemp("cut")
    small_world(here)
    for name, fields in MODELS.items():
        if not (here / name).is_dir():
            tiny_model(here / name, fields)
        with_biases(here / name)
    (here / "worker.py").write_text(WORKER.replace("ROOT", repr(str(ROOT))), encoding="utf-8")
    for name in CASES:
        train.main(arguments(here, 1, name, f"1 {name}"))
    for processes in (2, 4):
        names = [name for name in CASES if processes == 2 or name in FOUR]
        todo = [arguments(here, processes, name, f"{processes} {name}") for name in names]
        if processes == 2:
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


def history(folder) -> list[dict]:
    """The log of a run without times."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = ("step", "loss", "grad_norm", "eval_loss", "eval_accuracy", "train_loss", "total_flos")
    return [{key: row[key] for key in kept if key in row} for row in rows]


def assert_alike(one, other, bound=1e-5):
    """Two runs have the same log, and files of the same names with the same tensors."""
    assert [row.keys() for row in history(one)] == [row.keys() for row in history(other)]
    for a, b in zip(history(one), history(other)):
        assert a == pytest.approx(b, rel=bound, abs=bound)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
             for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors") and "rng" not in name:
            a, b = load_file(one / name), load_file(other / name)
            assert {n: (t.shape, t.dtype) for n, t in a.items()} == {
                n: (t.shape, t.dtype) for n, t in b.items()}, name
            worst = {n: float((a[n].double() - b[n].double()).abs().max()) for n in a
                     if a[n].numel()}
            assert max(worst.values()) <= bound, (name, max(worst, key=worst.get))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_that_share_a_model_equal_one(here, name):
    """Losses, gradient norms, weights, optimizer state, random generators (dropout, NEFTune)."""
    assert_alike(here / f"1 {name}", here / f"2 {name}")
    for one in (here / f"1 {name}").glob("*/rng.safetensors"):
        generators = [load_file(here / f"{n} {name}" / one.parent.name / one.name) for n in (1, 2)]
        assert torch.equal(*(states.pop("cpu.0") for states in generators))
        assert generators == [{}, {}]


@pytest.mark.parametrize("name", FOUR)
def test_two_ranks_of_two_processes_equal_one(here, name):
    assert_alike(here / f"1 {name}", here / f"4 {name}")


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_with_another_layout(here, name):
    """From one process onto two, and from two onto one."""
    for processes in (1, 2):
        resumed = here / f"{processes} {name} resumed"
        a, b = history(resumed), history(here / f"1 {name}")
        for mine, theirs in zip(a[-3:], b[-3:]):
            for key in ("step", "loss", "grad_norm"):
                assert mine.get(key) == pytest.approx(theirs.get(key), abs=1e-5)
        file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
        ours, wanted = load_file(resumed / file), load_file(here / f"1 {name}" / file)
        assert all((ours[n] - wanted[n]).abs().max() <= 1e-5 for n in wanted)


# ---- the mesh, and what each process holds ------------------------------------------------------


def test_each_process_holds_its_part(here):
    """Frozen weights of the llama: all but the norms, 5 x 32 numbers, are halved."""
    norms = 5 * 32 * 4
    whole = (here / "llama/model.safetensors").stat().st_size
    header = int.from_bytes((here / "llama/model.safetensors").read_bytes()[:8], "little") + 8
    for rank in (0, 1):
        held = json.loads((here / f"runs2.held{rank}").read_text())
        assert held[list(CASES).index("llama")] == (whole - header - norms) // 2 + norms


def test_the_start_page_says_which_process_holds_what(here):
    screen = (here / "screen4").read_text()
    assert "mesh: 4 processes = 2 data x 2 tensor" in screen
    assert ("  process 3   rows of rank 1 of 2; query heads 2-3, key/value heads 1, MLP columns "
            "24-47, token ids 800-1599\n") in screen
    whole = "embedding and head are whole on every process: "
    assert f"{whole}compute_accuracy reads the scores of all tokens" in screen
    assert f"{whole}they are trained" in (here / "screen2").read_text()


@pytest.mark.parametrize("rank, wanted", [(0, (0, 1)), (1, (1, 2)), (2, (2, 3))])
def test_sections_are_cut_each_by_itself(rank, wanted):
    """q, k and v below each other: a third of each."""
    start, end = wanted
    whole = torch.arange(12)[:, None]
    cut = Cut(0, (6, 3, 3), Axis(rank, 3, None))
    rows = [*range(2 * start, 2 * end), 6 + start, 9 + start]
    assert cut.part(whole).flatten().tolist() == rows
    assert cut.shape(cut.part(whole)) == (12, 1)


def test_the_disk_must_have_room_for_the_whole():
    layer = torch.nn.Linear(6, 12, bias=False)
    cut_parameter(layer, "weight", Cut(0, (8, 4), Axis(1, 2, None)))
    assert layer.weight.shape == (layer.out_features, layer.in_features) == (6, 6)
    assert full_bytes([layer.weight]) == 12 * 6 * 4


def test_the_last_axis_is_the_innermost():
    """Processes 0 to 5 of a rank, on two axes."""
    axes = {"pipeline": Axis(0, 2, None), "tensor": Axis(0, 3, None)}
    assert [places_of(partner, axes) for partner in range(6)] == [
        {"pipeline": (stage, 2), "tensor": (part, 3)} for stage in (0, 1) for part in (0, 1, 2)]


@pytest.mark.parametrize("world, size, message", [
    (1, 2, "takes 2 processes or a multiple of them, and this is one: torchrun --standalone "
           "--nproc-per-node 2 train.py"),
    (6, 4, "tensor_parallel_size: 4 does not divide the 6 processes that torchrun started. Start a "
           "multiple of 4; 6 processes can be cut into 1 or 2 or 3 or 6"),
])
def test_a_mesh_that_does_not_fit_the_processes(world, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_world(world, size, {"tensor": size})


def test_one_process_without_the_key_is_no_mesh():
    config = Config()
    assert lay_out(Ranks(), config, torch.device("cpu")) == Ranks()


@pytest.mark.parametrize("fields, parts, message", [
    ({}, 3, "3 does not divide num_attention_heads: 4 of this model. Take 1 or 2, and"),
    ({}, 4, "4 does not divide num_key_value_heads: 2 of this model. Take 1 or 2, and"),
    ({"intermediate_size": 49}, 2, "2 does not divide intermediate_size: 49 of this model. Take 1"),
    ({"model_type": "olmo2"}, 2, "olmo2 normalizes q and k over all heads together"),
])
def test_sizes_that_cannot_be_cut(fields, parts, message):
    with pytest.raises(ValueError, match=message):
        part_config(model_config({"model_type": "llama", **SMALL, **fields}), parts, True)


@pytest.mark.parametrize("settings, message", [
    (dict(fsdp="full_shard"), "cuts matrices, fsdp .* shards them"),
    (dict(use_dora=True), "plain LoRA, also with use_rslora"),
    (dict(quantization_bit=4), "takes a base in 16 or 32 bits"),
    (dict(finetuning_type="oft"), "is for finetuning_type: lora and full"),
    (dict(optim="adamw_8bit"), "use optim: adamw_torch"),
    (dict(ask="Who are you?"), "ask the adapter in chat.py"),
])
def test_what_does_not_go_together_is_said(settings, message, tmp_path):
    settings = dict(model_name_or_path="m", dataset="d", output_dir=tmp_path / "o",
                    tensor_parallel_size=2) | settings
    with pytest.raises(ValueError, match=message):
        load_config([f"{key}={value}" for key, value in settings.items()], "train")


def test_megatrons_spelling_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\n"
                    "tensor_model_parallel_size: 2\npipeline_model_parallel_size: 1\n")
    assert load_config([str(path)], "train").tensor_parallel_size == 2


def test_a_model_is_refused_before_a_weight_is_read(here, monkeypatch):
    ranks = Ranks(axes={"tensor": Axis(0, 3, None)})
    monkeypatch.setattr(train, "arrange", lambda *args: ranks)
    monkeypatch.setattr(train, "build_model", None)
    with pytest.raises(ValueError, match="3 does not divide num_attention_heads: 4"):
        train.main(arguments(here, 1, "llama", "refused"))
    assert not (here / "refused/train_config.json").exists()
