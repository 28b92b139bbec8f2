"""scale/fsdp.py: runs sharded over 2 and 3 ranks equal one process and recorded runs.

fork_ranks.py starts the ranks on the CPU (gloo). Each runs WORKER: train.main on several argument
lists, one after the other. `live` counts the bytes of the tensors that Python can reach after
loading.
"""
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from checkpoint.load import load_model
from checkpoint.shards import local_rows
from parallel import Ranks
from scale import fsdp
from tests.common import CURVES, ROOT, SHARED, needs_shared, usual
from tests.ranks import COMMON, forked, outcomes, small_world, tiny_model

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
pytestmark = pytest.mark.skipif(
    OLD, reason=f"fully_shard without GPUs needs torch 2.13; here: {torch.__version__}"
)
WORKER = '''
import gc, json, os, sys
sys.path.insert(0, ROOT)
from tests.common import leave_with_parent
leave_with_parent()
import torch, train
from errors import run_script
from runtime import build, run as runtime_run
joined, held, rank = [], {}, os.environ["RANK"]

def live():
    gc.collect()
    found = [t for t in gc.get_objects() if torch.is_tensor(t) and not t.is_meta]
    found = [t.to_local() if hasattr(t, "to_local") else t for t in found]
    storages = [t.untyped_storage() for t in found]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

def start(device, timeout):
    joined.extend([] if joined else [start_ranks(device, timeout)])
    return joined[0]

def count(model, ranks):
    if name in COUNTED:
        held[name] = live() - before
    print_shards(model, ranks)

start_ranks, end_ranks = train.start_ranks, runtime_run.end_ranks
train.start_ranks, runtime_run.end_ranks = start, lambda: None
print_shards = build.fsdp.print_shards
build.fsdp.print_shards = count

def main(argv):
    global name, before
    for name, arguments in json.load(open(argv[0])):
        before = live() if name in COUNTED else 0
        train.main(arguments)
    json.dump(held, open(argv[0] + ".held" + rank, "w"))
    end_ranks()

run_script(main)
'''
LLAMA = dict(model_type="llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, vocab_size=1600,
             max_position_embeddings=512, rms_norm_eps=1e-6, eos_token_id=2, pad_token_id=0,
             initializer_range=0.1, tie_word_embeddings=False)
FULL = dict(finetuning_type="full", learning_rate=5e-4)
EVALUATION = dict(eval_dataset="eval.jsonl", eval_strategy="steps", save_strategy="steps",
                  eval_steps=2, save_steps=2, per_device_eval_batch_size=3,
                  load_best_model_at_end=True, max_steps=4)
SAVES = dict(save_strategy="steps", save_steps=2, max_steps=4)
PAIRS = dict(model_name_or_path="llama", stage="dpo", dataset="pairs.jsonl", max_steps=3)
CASES = {  # settings of runs that agree with one process: 27 rows, 12 a step
    "lora": dict(model_name_or_path="llama", disable_gradient_checkpointing=False, **SAVES),
    "lora, whole modules": dict(lora_target="all,lm_head", additional_target="embed_tokens,norm",
                                learning_rate=2e-4, **SAVES),
    "dora": dict(use_dora=True, lora_target="q_proj,up_proj,lm_head", max_steps=3),
    "lora, experts": EVALUATION
                     | dict(model_name_or_path="mixture", cutoff_len=24, lora_target="all,experts"),
    "full": dict(model_name_or_path="llama", disable_gradient_checkpointing=False, **FULL, **SAVES),
    "lora, pairs": PAIRS,
    "full, pairs": PAIRS | FULL,
    "full, tied, best": FULL | EVALUATION,
    "full, experts": dict(model_name_or_path="mixture", cutoff_len=24, max_steps=3, **FULL),
}
CASES = usual(CASES, "lora", "lora, whole modules", "lora, experts", "full", "full, tied, best")
RECORDED = ("sft_llama3", "sft_qwen2_loraplus")  # by LLaMA-Factory; the latter's head is tied
WORDS = {2: "full_shard auto_wrap", 3: "full_shard,offload"}
WORLDS = {      # ranks: the cases they run
    2: ("lora", "lora, whole modules", "full", "lora, pairs", "lora, experts"),
    3: ("lora", "full", "dora", "full, pairs", "full, tied, best", "full, experts"),
}
WORLDS = {world: [name for name in names if name in CASES] for world, names in WORLDS.items()}
RESUMED = {2: ("lora, whole modules", "full"), 3: ("lora", "full")}     # from step 2 of two ranks
COUNTED = ("lora", "full")      # whose tensors are counted


def arguments(here, world, name, output, **more) -> list:
    """Arguments of train.py for a case: the same rows in each step with any number of ranks."""
    settings = COMMON | CASES[name]
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=6 // max(world, 1))
    for key in ("model_name_or_path", "dataset", "eval_dataset"):
        if key in settings:
            settings[key] = f"{here}/{settings[key]}"
    settings |= dict(output_dir=f"{here}/{output}", **more) | (
        {"fsdp": WORDS[world]} if world else {}
    )
    return [f"{key}={value}" for key, value in settings.items()]


def recorded(here, case) -> list:
    """Arguments for two ranks of a case that LLaMA-Factory recorded with one process."""
    folder, kind = CURVES / case, case.split("_")[1]
    return [f"{folder}/config.yaml", f"model_name_or_path={CURVES}/tiny_{kind}",
            f"dataset_dir={folder}/data", f"adapter_name_or_path={folder}/adapter_init",
            f"output_dir={here}/2 {case}", "per_device_train_batch_size=1", "fsdp=full_shard",
            "even_batches=false", "plot_loss=false", "disable_tqdm=true"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of all runs: `0 lora` by one process, `2 lora` by two ranks, `3 lora resumed` …"""
    here = tmp_path_factory.mktemp("sharded")
    small_world(here)
    tiny_model(here / "llama", LLAMA)
    worker = WORKER.replace("ROOT", repr(str(ROOT))).replace("COUNTED", repr(COUNTED))
    (here / "worker.py").write_text(worker, encoding="utf-8")
    for name in CASES:
        train.main(arguments(here, 0, name, f"0 {name}"))
    for world, names in WORLDS.items():
        todo = [(name, arguments(here, world, name, f"{world} {name}")) for name in names]
        for name in RESUMED[world]:
            todo.append((f"{name} resumed",
                         arguments(here, world, name, f"{world} {name} resumed",
                                   resume_from_checkpoint=f"{here}/2 {name}/checkpoint-2")))
        if world == 2 and SHARED.is_dir():
            todo += [(case, recorded(here, case)) for case in RECORDED]
        (here / f"runs{world}").write_text(json.dumps(todo))
        (code, screen, _), = outcomes(forked(world, here / "worker.py", here / f"runs{world}"))
        assert code == 0, screen[-4000:]
        (here / f"screen{world}").write_text(screen)
    return here


def history(folder) -> list[dict]:
    """The log of a run without times."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "eval_loss") if key in row}
            for row in rows]


def assert_alike(a, b, bound):
    """Two logs and two sets of weights agree within the bound; names, shapes and dtypes exactly."""
    one, other = history(a), history(b)
    assert [row.keys() for row in one] == [row.keys() for row in other] and len(one) > 2
    for x, y in zip(one, other):
        assert x["step"] == y["step"]
        assert all(abs(x[key] - y[key]) <= bound
                   for key in ("loss", "eval_loss") if key in x), (x, y)
        assert abs(x.get("grad_norm", 0) - y.get("grad_norm", 0)) <= bound * 1000
    for file in ("adapter_model.safetensors", "model.safetensors", "optimizer.safetensors"):
        assert (a / file).exists() == (b / file).exists()
        if (a / file).exists():
            one, other = load_file(a / file), load_file(b / file)
            assert {n: (t.shape, t.dtype) for n, t in one.items()} == {
                n: (t.shape, t.dtype) for n, t in other.items()
            }
            worst = max(one, key=lambda n: (one[n] - other[n]).abs().max() if one[n].numel() else 0)
            assert (one[worst] - other[worst]).abs().max() <= bound, (file, worst)


# ---- one process, recorded runs, resuming --------------------------------------------------------


@pytest.mark.parametrize("world, name",
                         [(world, name) for world, names in WORLDS.items() for name in names])
def test_sharded_runs_equal_one_process(here, name, world):
    """Also where ranks have fewer micro-batches or evaluation batches than others, and use other
    experts."""
    assert_alike(here / f"0 {name}", here / f"{world} {name}", 1e-4)
    names = [sorted(p.name for p in (here / f"{ranks} {name}").rglob("*") if p.is_file())
             for ranks in (0, world)]
    assert names[0] == names[1]
    if "checkpoint-2" in os.listdir(here / f"0 {name}"):
        one, other = (load_file(here / f"{ranks} {name}/checkpoint-2/optimizer.safetensors")
                      for ranks in (0, world))
        assert {n: (t.shape, t.dtype) for n, t in one.items()} == {
            n: (t.shape, t.dtype) for n, t in other.items()
        }
        assert all(torch.allclose(one[n], other[n], rtol=0, atol=1e-4) for n in one)


@needs_shared
@pytest.mark.parametrize("case", RECORDED)
def test_recorded_runs(here, case):
    """Loss to 1e-4 at each step, the final adapter to 1e-4, against LLaMA-Factory."""
    ours = [row for row in history(here / f"2 {case}") if "loss" in row]
    want = [row for row in history(CURVES / case) if "loss" in row]
    assert len(ours) == len(want) > 5
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(ours, want))
    one, other = (load_file(p / "adapter_model.safetensors")
                  for p in (here / f"2 {case}", CURVES / case / "final"))
    assert one.keys() == other.keys() and all((one[n] - other[n]).abs().max() < 1e-4 for n in one)


@pytest.mark.parametrize("world, bound, name", [
    (world, 0 if world == 2 else 1e-5, name) for world, names in RESUMED.items() for name in names])
def test_a_resumed_run_equals_an_uninterrupted_run(here, world, bound, name):
    """Bit for bit with the same number of ranks; to 1e-5 with three instead of two."""
    assert_alike(here / f"2 {name}", here / f"{world} {name} resumed", bound)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTED)
def test_each_rank_holds_its_shard(here, name):
    """All tensors that are alive after loading, not only parameters: base / N, adapters, and little
    else."""
    whole = sum(p.nbytes for p in load_model(here / "llama").parameters())
    file = here / "0 lora/adapter_model.safetensors"
    adapters = sum(t.nbytes for t in load_file(file).values()) if name == "lora" else 0
    for world in (2, 3):
        for rank in range(world):
            size = json.loads((here / f"runs{world}.held{rank}").read_text())[name]
            assert whole / world <= size - adapters < 1.1 * whole / world, (
                world, rank, size, whole
            )
    assert "weights held by each rank: " in (here / "screen2").read_text()


@pytest.mark.parametrize("length, world", [(7, 2), (7, 3), (2, 3), (1, 4), (8, 4)])
def test_shards_equal_torch_chunk(length, world):
    """As fully_shard splits: equal parts on the first ranks, less or nothing on the last."""
    whole, seen = torch.arange(length), []
    parts = list(whole.chunk(world)) + [whole[:0]] * world
    for rank in range(world):
        class Cut:
            shape = (length,)
            device_mesh = SimpleNamespace(size=lambda: world, get_local_rank=lambda: rank)
            detach, to_local = lambda self: self, lambda self: parts[rank]
        assert torch.equal(whole[local_rows(Cut())], parts[rank])
        seen += parts[rank].tolist()
    assert seen == list(range(length))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["hybrid_shard", "full_shard shard_grad_op", "offload", "full_shard backward_pre"]
)
def test_other_values_of_fsdp_are_refused(words, tmp_path):
    with pytest.raises(ValueError, match="fsdp is full_shard, or shard_grad_op"):
        train.main([f"fsdp={words}", f"output_dir={tmp_path}/x", "model_name_or_path=m",
                    "dataset=d"])


def test_fsdp_may_be_a_list(tmp_path):
    from settings.load_config import load_config
    path = tmp_path / "a.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset: d\noutput_dir: o\nfsdp: [full_shard, auto_wrap]\n"
        "fsdp_config: {transformer_layer_cls_to_wrap: LlamaDecoderLayer}\n"
    )
    config = load_config([str(path)], "train")
    assert config.fsdp == ["full_shard", "auto_wrap"] and config.no_effect == ["fsdp_config"]


def test_with_one_rank_a_note_says_that_nothing_is_sharded(capsys):
    fsdp.print_shards(None, Ranks())
    assert "fsdp changes nothing with one rank" in capsys.readouterr().out


def test_an_old_torch_is_refused_without_gpus(monkeypatch):
    monkeypatch.setattr(fsdp.torch, "__version__", "2.4.1")
    with pytest.raises(ValueError, match="without GPUs, take 2.13 or newer"):
        fsdp.check_torch(Ranks(0, 2), torch.device("cpu"))
