"""Whole runs on a CPU that poses as a GPU: no wrong device, no copy and no wait that is not meant.

Requires: rehearsal.py.
"""
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from unittest.mock import patch

import pytest

import train
from checkpoint.load import load_model
from fast import attention_picker, decode
from fast.batch_decode import answer_all, answer_each
from generate import generate, next_scores
from model import KVCache
from runtime import throughput
from runtime.run import Run
from tests.common import ROOT
from tests.rehearsal import Fault, rehearse

CONFIG = ["--config", "configs/tiny_lora_sft.yaml", "max_samples=6", "max_steps=3",
          "per_device_train_batch_size=2", "gradient_accumulation_steps=2", "cutoff_len=64",
          "logging_steps=1", "save_strategy=no", "plot_loss=false", "disable_tqdm=true",
          "torch_compile=false", "flash_attn=sdpa", "ask=[]"]
ONE_WAIT = [("parallel.py", "sync")]       # the loss, the norm and the metrics of a step, at once


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(throughput.MATRIX, "cuda", 64)


def only_flash(kernels, problem):
    """Verdicts of attention_picker.try_kernels, which would ask child processes."""
    return [attention_picker.Verdict(name, ms=1.0) if name == "sdpa-flash" else
            attention_picker.Verdict(name, reason="not rehearsed") for name in kernels]


@contextmanager
def strict_loop(record):
    """In train.py's loop nothing but Ranks.sync may wait."""
    begin, end = Run.begin_step, Run.end_loop
    strict = record.strict(may_wait=ONE_WAIT)

    def begin_step(run, step):
        if step.number == 1:
            record.events.clear()
            strict.__enter__()
        begin(run, step)

    def end_loop(run):
        strict.__exit__(None, None, None)
        record.loop = list(record.events)
        end(run)

    with patch.object(Run, "begin_step", begin_step), patch.object(Run, "end_loop", end_loop):
        yield


def trained(output, *settings) -> list[dict]:
    """The logged steps of a run of train.py."""
    train.main([*CONFIG, f"output_dir={output}", *settings])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def rehearsed(output, *settings):
    """(the logged steps of a rehearsed run, its Record)."""
    with rehearse() as record, strict_loop(record), \
            patch.object(attention_picker, "try_kernels", only_flash):
        return trained(output, *settings), record


RUNS = {
    "lora": [],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_waits_once_a_step_and_is_the_run_of_the_cpu(name, tmp_path):
    steps, record = rehearsed(tmp_path / "gpu", *RUNS[name])
    waits = [event for event in record.loop if event.kind != "planned"]
    assert [event.place for event in waits] == ONE_WAIT * 3
    assert {event.place for event in record.loop} - set(ONE_WAIT) <= {("attention.py", "to_device")}
    plain = trained(tmp_path / "cpu", "use_cpu=true", *RUNS[name])
    for ours, theirs in zip(steps, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


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
        assert line == "steps     captured as a graph: one command a token"
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
        with record.strict([("fast/batch_decode.py", "answer_all"),
                            ("generate.py", "check_finite")]):
            record.events.clear()
            found = list(answer_all(model, prompts, 3, **limit))
        assert sorted(found) == want
        assert waits_by_place(record) == {"answer_all": 10, "check_finite": 3}  # 10 steps


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


def test_a_planted_item_in_the_loop_is_caught(tmp_path):
    with planted(train, "train_step", "total += loss.detach()",
                 "total += loss.detach().item()") as place:
        with pytest.raises(Fault, match=f"^{place}: _local_scalar_dense waits for the device"):
            rehearsed(tmp_path)


def test_a_planted_tensor_of_the_cpu_in_decoding_is_caught():
    with rehearse(), planted(
            decode, "one_step", "torch.arange(slots, device=position.device)",
            "torch.arange(slots)") as place:
        model = chat_model("cuda")
        with pytest.raises(Fault, match=f"^{place}: .e: a tensor .256. of the CPU"):
            decode.pick_step(model)


@pytest.mark.parametrize("fault, message", [
    ("position = cache.position + torch.zeros(1, device=cache.position.device).long()",
     "zeros: memory is allocated in a captured graph"),
    ("position = cache.position; cache.position.item()", "_local_scalar_dense in a captured graph"),
    ("position = cache.position; torch.zeros(3).pin_memory()", "pin_memory in a captured graph"),
    ("position = cache.position + torch.tensor(0)", "add: a tensor .. of the CPU"),
])
def test_a_planted_fault_in_a_captured_step_is_caught(fault, message):
    with rehearse(), planted(decode, "one_step", "position = cache.position", fault) as place:
        model = chat_model("cuda")
        with pytest.raises(Fault, match=f"^{place}: {message}"):
            decode.pick_step(model)
