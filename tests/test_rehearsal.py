"""Whole runs on a CPU that poses as a GPU: no wrong device, no copy and no wait that is not meant.

Requires: rehearsal.py.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import chat
import eval as evaluation
import merge
import train
from attention import TORCH, to_device
from checkpoint.load import load_model
from fast import attention_picker, decode, grouped_experts
from fast.batch_decode import answer_all, answer_each
from generate import generate, next_scores
from model import KVCache
from runtime import kernels, throughput
from runtime.device import pick_device
from runtime.memory_advice import available_bytes
from runtime.run import Run
from tests.common import ROOT, SHARED
from tests.rehearsal import Fault, rehearse
from tests.tiny_models import tiny, write_tiny

CONFIG = ["--config", "configs/tiny_lora_sft.yaml", "max_samples=6", "max_steps=3",
          "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "cutoff_len=64",
          "logging_steps=1", "save_strategy=no", "plot_loss=false", "disable_tqdm=true",
          "torch_compile=false", "ask=[]", "pin_kernels.attention=sdpa-flash",
          "pin_kernels.matmul=torch", "join_micro_batches=false"]
INPUTS = ("fast/offload_inputs.py", "copy")             # of blocks, to main memory and back
ONE_WAIT = ("parallel.py", "sync")      # the loss, the norm and the metrics of a step, at once


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.chdir(ROOT)
    for device in ("cuda", "cpu"):                      # nothing is measured here
        monkeypatch.setitem(throughput.MATRIX, device, 64)
    monkeypatch.setattr(attention_picker, "try_kernels", only_flash)
    monkeypatch.setattr(torch, "compile", as_written)
    picks = [pick for pick in kernels.PICKS if pick is not kernels.pick_matrix_product]
    monkeypatch.setattr(kernels, "PICKS", picks)


def as_written(function, dynamic=None):
    """torch.compile without a compiler."""
    return function


def only_flash(names, problem):
    """Verdicts of attention_picker.try_kernels, which would ask child processes."""
    return [attention_picker.Verdict(name, ms=1.0) if name == "sdpa-flash" else
            attention_picker.Verdict(name, reason="not rehearsed") for name in names]


@contextmanager
def strict_loop(record, *meant):
    """In train.py's loop nothing but Ranks.sync may wait, and evaluations, once a batch.

    meant: further places. Saving may wait anywhere.
    """
    begin, end, save, evaluate = Run.begin_step, Run.end_loop, Run.save_checkpoint, train.evaluate
    strict = record.strict(may_wait={ONE_WAIT, *meant})

    def begin_step(run, step):
        if step.number == 1:
            record.events.clear()
            strict.__enter__()
        begin(run, step)

    def end_loop(run):
        strict.__exit__(None, None, None)
        record.loop = list(record.events)
        end(run)

    def save_checkpoint(*args, **kwargs):
        with record.strict(may_wait=None):
            save(*args, **kwargs)

    def evaluate_in_loop(*args, **kwargs):
        with record.strict(may_wait={("evals/loss.py", "score_batch")}):
            return evaluate(*args, **kwargs)

    with patch.multiple(Run, begin_step=begin_step, end_loop=end_loop,
                        save_checkpoint=save_checkpoint), \
            patch.object(train, "evaluate", evaluate_in_loop):
        yield


def trained(output, *settings) -> list[dict]:
    """The logged steps of a run of train.py."""
    train.main([*CONFIG, f"output_dir={output}", *settings])
    return logged(output)


def logged(output) -> list[dict]:
    """The logged steps of a run."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def rehearsed(output, *settings, free_bytes: int = 79 * 10**9, meant=None):
    """(the logged steps of a rehearsed run, its Record)."""
    with rehearse(free_bytes) as record, strict_loop(record, *[meant] * bool(meant)):
        return trained(output, *settings), record


# ---- training -----------------------------------------------------------------------------------

SMALL = dict(hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=1600,
             initializer_range=0.1, max_position_embeddings=256)
EXPERTS = dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=256, mlp_only_layers=[], decoder_sparse_step=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(here):
    """Fill a folder with two small checkpoints, dense and experts, and judged answers."""
    for name, fields in (("dense", SMALL), ("experts", SMALL | EXPERTS)):
        write_tiny(here / name, tiny(**fields), **fields)
        for file in (ROOT / "models/tiny").glob("tokenizer*"):
            shutil.copy(file, here / name)
    rows = [{"messages": [{"role": "user", "content": f"What is {n}?"},
                          {"role": "assistant", "content": f"It is {n} + 0."}],
             "good": n % 2 == 0} for n in range(6)]
    (here / "judged.json").write_text(json.dumps(rows))
    columns = {"messages": "messages", "kto_tag": "good"}
    info = {"judged": {"file_name": "judged.json", "formatting": "messages", "columns": columns}}
    (here / "dataset_info.json").write_text(json.dumps(info))
    return here


OFFLOADED = ["disable_gradient_checkpointing=false", "offload_activations=true"]
RUNS = {
    "lora": [],
    "lora in bfloat16": ["bf16=true"],
    "lora in float16": ["fp16=true"],
    "dropout, dora and lora+": ["lora_dropout=0.1", "use_dora=true", "loraplus_lr_ratio=4"],
    "compiled steps": ["torch_compile=true"],
    "full": ["finetuning_type=full", "bf16=true"],
    "freeze": ["finetuning_type=freeze", "freeze_trainable_layers=1"],
    "noise on embeddings": ["neftune_noise_alpha=5"],
    "oft": ["finetuning_type=oft", "oft_block_size=16"],
    "nf4": ["quantization_bit=4", "bf16=true"],
    "int8": ["quantization_bit=8", "bf16=true"],
    "fp8": ["base_precision=fp8", "bf16=true"],
    "8-bit AdamW": ["optim=adamw_8bit"],
    "Muon": ["finetuning_type=full", "use_muon=true"],
    "GaLore": ["finetuning_type=full", "use_galore=true", "galore_target=all", "galore_rank=4"],
    "APOLLO": ["finetuning_type=full", "use_apollo=true", "apollo_target=all", "apollo_rank=4"],
    "BAdam": ["finetuning_type=full", "use_badam=true", "badam_switch_interval=2"],
    "Adam-mini": ["finetuning_type=full", "use_adam_mini=true"],
    "DFT": ["use_dft_loss=true"],
    "EAFT": ["use_eaft_loss=true"],
    "ASFT": ["use_asft_loss=true"],
    "label smoothing": ["label_smoothing_factor=0.1"],
    "PiSSA": ["pissa_init=true"],
    "little memory": ["disable_gradient_checkpointing=false"],
    "nf4 and little memory": ["quantization_bit=4", "disable_gradient_checkpointing=false"],
    "inputs in main memory": [*OFFLOADED, "lora_dropout=0.1"],
    "nf4, inputs in main memory, tiles": [*OFFLOADED, "quantization_bit=4", "bf16=true",
                                          "mlp_tile=16"],
    "full with tiles": [*OFFLOADED, "finetuning_type=full", "mlp_tile=16"],
    "dpo": ["stage=dpo", "dataset=tiny_pairs"],
    "dpo with a reference": ["stage=dpo", "dataset=tiny_pairs", "finetuning_type=full"],
    "orpo": ["stage=dpo", "dataset=tiny_pairs", "pref_loss=orpo"],
    "kto": ["stage=kto", "dataset=judged", "dataset_dir=WORLD"],
    "rm": ["stage=rm", "dataset=tiny_pairs"],
    "experts": ["model_name_or_path=WORLD/experts"],
    "experts in one product": ["model_name_or_path=WORLD/experts", "bf16=true"],
    "experts of nf4 in one product": ["model_name_or_path=WORLD/experts", "bf16=true",
                                      "quantization_bit=4"],
}


def settings_of(name: str, world) -> list[str]:
    settings = [f"model_name_or_path={world}/dense", *RUNS[name]]
    return [setting.replace("WORLD", str(world)) for setting in settings]


def multiplies_in_8_bits() -> bool:
    one = torch.ones(())
    try:
        torch._scaled_mm(torch.ones(16, 16).to(torch.float8_e4m3fn),
                         torch.ones(16, 16).to(torch.float8_e4m3fn).T, scale_a=one, scale_b=one,
                         out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


# further waits, which are meant
MEANT = {
    "GaLore": ("methods/optimizers.py", "galore"),      # a singular value decomposition, seldom
    "experts": ("layers.py", "grouped"),
}


def test_the_plain_blocks_wait_no_more_than_the_fused_ones(world, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "PICKS", (kernels.pick_attention,))
    rehearsed(tmp_path, f"model_name_or_path={world}/dense", "join_micro_batches=true")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_waits_once_a_step_and_is_the_run_of_the_cpu(name, world, tmp_path):
    if name == "fp8" and not multiplies_in_8_bits():
        pytest.skip("this torch has no 8-bit matrix product on a CPU, which poses as the GPU")
    if "in one product" in name and not hasattr(torch, "_grouped_mm"):
        pytest.skip("this torch has no grouped product")
    settings = settings_of(name, world)
    free_bytes = 10**6 if "little memory" in name else 79 * 10**9
    meant = MEANT.get(name)
    steps, record = rehearsed(tmp_path / "gpu", *settings, free_bytes=free_bytes, meant=meant)
    places = Counter(event.place for event in record.loop if event.kind != "planned")
    assert places.pop(ONE_WAIT) == 3
    assert list(places) == [meant] * bool(meant)
    sent = {event.place for event in record.loop if event.kind == "planned"}
    offloaded = "memory" in name or "tiles" in name     # little memory: the plan decides so
    assert sent == {("attention.py", "to_device")} | ({INPUTS} if offloaded else set())
    plain = trained(tmp_path / "cpu", "use_cpu=true", *settings)
    # in 16 bits the gradients of heads that share a key are summed in another order
    bound = 1e-3 if any(setting[2:] == "16=true" for setting in settings) else 1e-6
    bound = {"fp8": 5e-3, "Muon": 1e-5}.get(name, bound)        # they amplify the last bits
    for ours, theirs in zip(steps, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=bound)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5 * bound)


# ---- decoding -----------------------------------------------------------------------------------

PROMPT = [1, 514, 296, 201, 74, 75, 2, 201, 1, 375, 493, 418, 201]
LONG = PROMPT * 19              # 247 tokens: soon the cache grows, and a second step is captured


def chat_model(device):
    """The tiny chat model, prepared as chat.py does."""
    model = load_model(ROOT / "models/tiny", device=device)
    decode.prepare(model)
    return model


def answer_of(model, cache, step) -> list[int]:
    return list(generate(model, LONG, cache, max_new_tokens=20, step=step))


@pytest.fixture(scope="module")
def plain_answer():
    model = load_model(ROOT / "models/tiny")
    return answer_of(model, KVCache(model.config.num_hidden_layers), next_scores)


def test_chat_waits_once_a_token(plain_answer):
    with rehearse() as record:
        model = chat_model("cuda")
        cache = KVCache(model.config.num_hidden_layers)
        with record.strict([("generate.py", "generate"), ("generate.py", "check_finite")]):
            record.events.clear()
            assert answer_of(model, cache, next_scores) == plain_answer
        assert waits_by_place(record) == {"generate": 21, "check_finite": 1}


def waits_by_place(record) -> dict:
    return Counter(event.place[1] for event in record.waits)


def test_a_captured_step_gives_the_same_answer(plain_answer):
    with rehearse() as record:
        model = chat_model("cuda")
        cache, step, line = decode.pick_step(model)
        assert line.startswith("steps     captured as a graph: one command a token")
        with record.strict([("generate.py", "generate"), ("generate.py", "check_finite")]):
            for _ in range(2):                  # the second answer replays what the first captured
                cache.crop(0)
                assert answer_of(model, cache, step) == plain_answer
        assert set(step.recorded) == {256, 512}


def test_many_prompts_wait_once_a_step():
    prompts = [(i, PROMPT[:5 + i]) for i in range(5)]
    limit = dict(limit=lambda length: 4 + length % 3)
    want = list(answer_each(load_model(ROOT / "models/tiny"), prompts, **limit))
    with rehearse() as record:
        model = load_model(ROOT / "models/tiny", device="cuda")
        with record.strict([("fast/batch_decode.py", "add_tokens")]):
            record.events.clear()
            found = list(answer_all(model, prompts, 3, **limit))
        assert sorted(found) == want
        assert waits_by_place(record) == {"add_tokens": 10}     # steps


def test_evaluation_and_a_resumed_run(world, tmp_path):
    """An evaluation waits once a batch. A checkpoint holds what the next start needs."""
    more = [f"model_name_or_path={world}/dense", "lora_dropout=0.1", "optim=adamw_8bit",
            "eval_dataset=identity", "eval_strategy=steps", "eval_steps=2",
            "per_device_eval_batch_size=2", "save_strategy=steps", "save_steps=2"]
    with rehearse() as record, strict_loop(record):
        whole = trained(tmp_path / "whole", *more)
    evaluations = [event for event in record.loop if event.place[1] == "score_batch"]
    assert len(evaluations) == 3
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    with rehearse():
        rest = trained(tmp_path / "resumed", *more, "resume_from_checkpoint=true")
    for name in ("loss", "grad_norm"):
        assert rest[-1][name] == whole[-1][name]


# ---- the other programs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the tiny chat model."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        train.main([*CONFIG, "use_cpu=true", f"output_dir={folder}"])
    return folder


@pytest.mark.parametrize("sampling", ["do_sample=false", "do_sample=true"])
def test_chat_with_an_adapter(sampling, adapter, capsys):
    argv = ["model_name_or_path=models/tiny", f"adapter_name_or_path={adapter}",
            "template=chatml", "prompt=Who are you?", "max_new_tokens=12", sampling]
    chat.main([*argv, "use_cpu=true"])
    plain = capsys.readouterr()
    with rehearse():
        chat.main(argv)
    printed = capsys.readouterr()
    assert printed.out == plain.out and plain.out.strip()
    assert "steps     captured as a graph" in printed.err


def test_eval_with_an_adapter(adapter, tmp_path):
    argv = ["model_name_or_path=models/tiny", f"adapter_name_or_path={adapter}",
            "template=chatml", "eval_dataset=identity", "max_samples=4", "do_eval=true",
            "do_predict=true", "max_new_tokens=12", "per_device_eval_batch_size=3",
            "do_sample=false"]
    evaluation.main([*argv, "use_cpu=true", f"output_dir={tmp_path / 'cpu'}"])
    with rehearse():
        evaluation.main([*argv, f"output_dir={tmp_path / 'gpu'}"])
    answers = [(tmp_path / side / "generated_predictions.jsonl").read_text()
               for side in ("gpu", "cpu")]
    assert answers[0] == answers[1]
    losses = [json.loads((tmp_path / side / "eval_results.json").read_text())["eval_loss"]
              for side in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", [[], ["use_dora=true"],
                                  ["finetuning_type=oft", "oft_block_size=16"]], ids=str)
def test_merge_on_the_device(kind, world, tmp_path):
    trained(tmp_path / "adapter", "use_cpu=true", f"model_name_or_path={world}/dense", *kind)
    merged = []
    for device in ("auto", "cpu"):
        with rehearse():
            merge.main([f"model_name_or_path={world}/dense", "template=chatml",
                        f"adapter_name_or_path={tmp_path / 'adapter'}",
                        f"export_dir={tmp_path / device}", f"export_device={device}"])
        merged.append(load_file(tmp_path / device / "model.safetensors"))
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


# ---- planted faults -----------------------------------------------------------------------------


@contextmanager
def planted(module, name: str, line: str, fault: str):
    """Replace a line of a function of ours; yields file:line of the replaced line."""
    source = Path(module.__file__).read_text()
    assert source.count(line) == 1, line
    number = source[:source.index(line)].count("\n") + 1
    functions = {}
    code = compile(source.replace(line, fault), module.__file__, "exec")
    exec(code, vars(module) | {"__name__": "planted"}, functions)
    function = FunctionType(functions[name].__code__, vars(module), name,
                            functions[name].__defaults__)
    with patch.object(module, name, function):
        yield f"{Path(module.__file__).relative_to(ROOT)}:{number}"


@pytest.mark.parametrize("name, line, fault, message", [
    ("train_step", "total += loss.detach()", "total += loss.item()", "_local_scalar_dense"),
    ("train_step", "metrics += batch_metrics", "metrics += batch_metrics; loss.cpu()",
     "a copy from the GPU"),
    ("train_step", "gradients.all_reduce()", "gradients.all_reduce(); bool(total > 0)",
     "_local_scalar_dense"),
    ("main", "plan.prefetch()  ", "print(f'{loss:.3f}'); plan.prefetch()", ".__format__()"),
    ("main", "optimizer.step()", "optimizer.step(); torch.cuda.synchronize()",
     "torch.cuda.synchronize"),
    ("main", "run.begin_step(step)", "run.begin_step(step); torch.tensor([1], device=device)",
     "torch.tensor copies to the GPU"),
])
def test_a_planted_wait_in_the_loop_is_caught(name, line, fault, message, tmp_path):
    with planted(train, name, line, fault) as place:
        with pytest.raises(Fault, match=f"^{place}: {re.escape(message)} waits for the device"):
            rehearsed(tmp_path)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize("fault, message", [
    ("ends.tolist()", "[.]tolist[(][)] waits for the device"),
    ("x[x[:, 0] > 0]", "indexing by a mask waits for the device"),
])
def test_a_planted_fault_in_grouped_experts_is_caught(fault, message, world, tmp_path):
    line = "    rows = x[order // chosen.shape[1]]\n"
    fault = f"    x.shape and {fault}; rows = x[order // chosen.shape[1]]\n"
    with planted(grouped_experts, "mix_together", line, fault) as place:
        with pytest.raises(Fault, match=f"^{place}: {message}"):
            rehearsed(tmp_path, f"model_name_or_path={world}/experts", "bf16=true")


def test_a_planted_tensor_of_the_cpu_in_decoding_is_caught():
    with rehearse(), planted(
            decode, "filled_slots", "torch.arange(slots, device=position.device)",
            "torch.arange(slots)") as place:
        model = chat_model("cuda")
        with pytest.raises(Fault, match=f"^{place}: .e: a tensor .256. of the CPU"):
            decode.pick_step(model)


@pytest.mark.parametrize("fault, message", [
    ("position = cache.position + torch.zeros(1, device=cache.position.device).long()",
     "zeros: memory is allocated in a captured graph"),
    ("position = cache.position; torch.zeros_like(position)",
     "zeros_like: memory is allocated in a captured graph"),
    ("position = cache.position; cache.make_room(cache.buffers[0][0].shape[2] + 1)",
     "new_zeros: memory is allocated in a captured graph"),
    ("position = cache.position; cache.position.item()", "_local_scalar_dense in a captured graph"),
    ("position = cache.position; torch.zeros(3).pin_memory()", "pin_memory in a captured graph"),
    ("position = cache.position + torch.tensor(0)", "add: a tensor .. of the CPU"),
])
def test_a_planted_fault_in_a_captured_step_is_caught(fault, message):
    with rehearse(), planted(decode, "one_step", "position = cache.position", fault) as place:
        model = chat_model("cuda")
        if "make_room" in fault:                        # in what it calls
            place = "model.py:[0-9]+"
        with pytest.raises(Fault, match=f"^{place}: {message}"):
            decode.pick_step(model)


# ---- the double of torch.cuda -------------------------------------------------------------------


def test_the_device_is_that_of_the_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with rehearse() as record:
        assert pick_device() == torch.device("cuda", 3)
        assert ("set_device", (torch.device("cuda", 3),)) in record.cuda_calls
        assert available_bytes(torch.device("cuda", 3)) == 79 * 10**9
        assert ("mem_get_info", (torch.device("cuda", 3),)) in record.cuda_calls


def test_pinned_copies_are_planned_and_others_wait():
    with rehearse() as record:
        x = torch.arange(4)
        sent = to_device(x, "cuda")
        back = torch.empty(4, dtype=torch.int64, pin_memory=True)
        back.copy_(sent, non_blocking=True)
        assert [event.kind for event in record.events] == ["planned", "planned"]
        for blocking in (lambda: x.to("cuda"), lambda: x.to("cuda", non_blocking=True),
                         lambda: x.cuda(), lambda: sent.cpu(), lambda: sent[sent > 1],
                         lambda: sent.nonzero(), lambda: float(sent[0]), lambda: sent.numpy(),
                         lambda: torch.as_tensor([1], device="cuda"), lambda: sent[x],
                         lambda: torch.empty(4).copy_(sent), lambda: sent.copy_(x)):
            with record.strict(), pytest.raises(Fault, match="waits for the device"):
                blocking()
        for mixed in (lambda: sent + x, lambda: x[sent], lambda: torch.cat([sent, x]),
                      lambda: sent.float().normal_(generator=torch.Generator())):
            with pytest.raises(Fault, match="of the CPU|on the device"):
                mixed()
        assert (sent + torch.tensor(1)).tolist() == [1, 2, 3, 4]       # a scalar of the CPU


# ---- a CUDA build of torch on a paper GPU --------------------------------------------------------

PAPER = SHARED / "paper_gpu"
needs_paper_gpu = pytest.mark.skipif(
    not (torch.version.cuda and shutil.which("gcc") and PAPER.is_dir()),
    reason="needs a CUDA build of torch, gcc and ../shared/paper_gpu")


@pytest.fixture(scope="session")
def paper_gpu(tmp_path_factory):
    """The environment of a process that believes in a card."""
    here = tmp_path_factory.mktemp("paper")
    site = Path(sysconfig.get_paths()["purelib"])
    header = next(path for path in sorted(site.glob("**/cuda_runtime_api.h"))
                  if (path.parent / "crt/host_defines.h").is_file())
    gcc = ["gcc", "-shared", "-fPIC", "-w", f"-I{header.parent}"]
    more = ROOT / "tests/paper_gpu/more.c"
    subprocess.run([*gcc, "-o", here / "libpaper_cudart.so", PAPER / "cudart.c", more], check=True)
    subprocess.run([*gcc, "-Wl,-soname,libcuda.so.1", "-o", here / "libcuda.so.1",
                    PAPER / "cuda.c"], check=True)
    return {**os.environ, "LD_PRELOAD": str(here / "libpaper_cudart.so"),
            "LD_LIBRARY_PATH": str(here), "OMP_NUM_THREADS": "1",
            # its driver has no virtual addresses, which segments that grow need
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}


@needs_paper_gpu
def test_steps_of_fake_tensors_on_a_paper_gpu(paper_gpu, tmp_path):
    """Real operators of CUDA find no wrong device, no wait, and a gradient for every weight."""
    run = subprocess.run([sys.executable, "-m", "tests.paper_steps", str(tmp_path)], cwd=ROOT,
                         env=paper_gpu, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    failures = json.loads(run.stdout.splitlines()[-1])
    assert len(failures) > 15 and not any(failures.values()), failures


@needs_paper_gpu
@pytest.mark.skipif(TORCH < (2, 11), reason="reads the kernels of newer versions of Inductor")
def test_compiled_steps_become_machine_code_for_three_cards(paper_gpu, tmp_path):
    """What torch's compiler generates for norms, rotation, gate * up, the loss, fp8 and 4-bit."""
    pytest.importorskip("triton")
    caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    caches = {name: str(tmp_path / name) for name in caches}
    run = subprocess.run([sys.executable, "-m", "tests.triton_targets", str(tmp_path)], cwd=ROOT,
                         env=paper_gpu | caches, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 8 and all(found.values())
    sizes = [size for step in found.values() for kernel in step.values()
             for size in kernel.values()]
    assert len(sizes) >= 30 and all(isinstance(size, int) for size in sizes), found
