"""fast/attention_picker.py: wrong kernels are refused, and the fastest correct one is chosen.

GPUs, ROCm, Hygon DCU, and good and bad versions of flash-attn are imitated by fakes.
"""
import json
import re
import sys
import time
import types
import warnings
from dataclasses import asdict

import pytest
import torch

import attention as A
from fast import attention_picker
from tests.common import SDPA_ON_CPU
from tests.fake_flash_attn import fake_flash_attn


# ---- checking a kernel ---------------------------------------------------------------------------

class WrongGradient(torch.autograd.Function):
    """The identity with gradients that are 5 % too large."""
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.05


def lose_last_keys(q, k, v, out):
    """A tiling bug: the last token is wrong where the length is no multiple of 64."""
    return torch.cat([out[:-1], out[-1:] * 0]) if len(q) % 64 else out


def lose_own_key(q, k, v, out):
    """The last query of a long sequence does not attend to itself."""
    if len(q) != len(k) or len(q) < 100:
        return out
    last = A.plain_attention(*(x.transpose(0, 1)[None] for x in (q[-1:], k[:-1], v[:-1])),
                             q.shape[-1] ** -0.5)
    return torch.cat([out[:-1], last[0].transpose(0, 1)])


FAULTS = {
    "all values a little off": (lambda q, k, v, out: out * 1.02, "wrong output"),
    "not a number": (lambda q, k, v, out: out / 0 * 0, "wrong output"),
    "lengths not a multiple of 64": (lose_last_keys,
                                     "wrong output .a sequence of (1|7|62|129|520).: off by"),
    "one key of 129 lost": (lose_own_key, "wrong output .a sequence of 1"),
    "gradients": (lambda q, k, v, out: WrongGradient.apply(out), "wrong gradient"),
    "sequences of one token": (lambda q, k, v, out: out + 0.1 * (len(q) == 1),
                               "wrong output .a sequence of 1.:"),
    "boundary ignored": (lambda q, k, v, out: out + 0.05 * (len(q) == 129),
                         "wrong output .a sequence of 129"),
}


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_refused(monkeypatch, fault, dtype):
    spoil, reason = FAULTS[fault]
    monkeypatch.setattr(attention_picker, "CHECKED", (1, 7, 62, 128, 129, 1))
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(spoil))
    verdict = attention_picker.try_here("flash-attn",
                                        attention_picker.Problem("cpu", dtype, 32, 4, 2))
    assert verdict.ms is None and not verdict.harmless
    assert re.search(reason, verdict.reason), verdict.reason


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("training", (True, False))
def test_correct_kernels_pass(monkeypatch, dtype, training):
    monkeypatch.setattr(attention_picker, "CHECKED", (1, 7, 62, 128, 129, 1))
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    for kernel in ("flash-attn", "sdpa-math", "plain",
                   *(("sdpa-flash",) if dtype == "float32" else ())):
        verdict = attention_picker.try_here(
            kernel, attention_picker.Problem("cpu", dtype, 32, 4, 2, training=training)
        )
        assert verdict.reason is None and verdict.ms > 0 and verdict.harmless


def test_a_kernel_that_scales_too_late_is_refused_in_float16(monkeypatch):
    """As eager attention of transformers: correct until Qwen2's q·k exceeds 65504."""
    def late(q, k, v, out):                                  # (T, H, Dh), (T, K, Dh)
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~A.causal_mask(len(q), len(k), None, "cpu"), float("-inf"))
        return torch.einsum("hts,shd->thd", scores.softmax(-1), v)
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(late))
    assert attention_picker.find_fault(
        "flash-attn", attention_picker.Problem("cpu", "bfloat16", 64, 4, 2)
    ) is None
    reason = attention_picker.find_fault("flash-attn",
                                         attention_picker.Problem("cpu", "float16", 64, 4, 2))
    assert reason == "overflows in float16 where q·k passes 65504"


def test_top_left_alignment_is_refused_for_generation(monkeypatch):
    """flash_attn before 2.1: correct in training, wrong for a prompt after a cached one."""
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(causal_from_top_left=True))
    training, chat = (attention_picker.Problem("cpu", "float32", 32, 4, 2, training)
                      for training in (True, False))
    assert attention_picker.find_fault("flash-attn", training) is None
    assert "wrong output (7 queries, 129 keys)" in attention_picker.find_fault("flash-attn", chat)


@pytest.mark.parametrize("training", (True, False))
def test_a_kernel_that_ignores_sinks_is_refused(monkeypatch, training):
    problem = attention_picker.Problem("cpu", "bfloat16", 32, 4, 2, training, window=20, sinks=True)
    assert attention_picker.find_fault("sdpa-math", problem) is None
    choice = attention_picker.pick_kernel("fa2", device="cpu", dtype=torch.float32, head_dim=16,
                                          num_heads=4, num_kv_heads=2, sinks=True,
                                          training=training)
    assert choice.refused["flash-attn"] == "has no attention sinks"
    monkeypatch.setattr(attention_picker, "attend", lambda *qkv, sinks, **options:
                        A.attend(*qkv, **options))
    assert "wrong output" in attention_picker.find_fault("sdpa-math", problem)


RULED = {"window": {"window": 4096}, "softcap": {"softcap": 50.0}, "slopes": {"alibi": True}}


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("rule", RULED)
def test_a_kernel_that_ignores_an_argument_is_refused(monkeypatch, rule, training):
    """Although a window of 4096 and a cap of 50 change nothing in short
    sequences of small scores."""
    problem = attention_picker.Problem("cpu", "bfloat16", 32, 4, 2, training, **RULED[rule])
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    assert attention_picker.find_fault("flash-attn", problem) is None
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(ignored=(rule,)))
    fault = attention_picker.find_fault("flash-attn", problem)
    assert fault.startswith("wrong output") and ("window 42" in fault) == (rule == "window")


def test_a_kernel_that_is_correct_only_with_a_window_is_refused(monkeypatch):
    """Some layers of Gemma 2 have no window."""
    module = fake_flash_attn()
    real = module.flash_attn_varlen_func
    module.flash_attn_varlen_func = lambda *args, **options: real(
        *args, **options | {"window_size": (41, 0)}
    )
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    fault = attention_picker.find_fault(
        "flash-attn", attention_picker.Problem("cpu", "float32", 32, 4, 2, window=42)
    )
    assert fault.startswith("wrong output (a sequence of") and "window" not in fault


def test_the_check_uses_the_scale_of_the_model(monkeypatch):
    scales, real = [], A.flash_attn_2
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn())
    monkeypatch.setattr(A, "flash_attn_2", lambda *args: scales.append(args[3]) or real(*args))
    for scale in (None, 0.3):
        assert attention_picker.try_here(
            "flash-attn", attention_picker.Problem("cpu", "float32", 16, 4, 2, scale=scale)
        ).ms > 0
    assert set(scales) == {0.25, 0.3}


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("training", (True, False))
def test_sdpa_passes_with_alibi_and_with_a_window(dtype, training):
    for rules in ({"alibi": True}, {"window": 64, "chunk": 256}, {"alibi": True, "window": 64}):
        for kernel in ("sdpa-math", *(("sdpa-flash",) if dtype == "float32" else ())):
            verdict = attention_picker.try_here(
                kernel, attention_picker.Problem("cpu", dtype, 32, 4, 2, training, **rules)
            )
            assert verdict.reason is None and verdict.ms > 0, (kernel, rules, verdict.reason)


def test_exceptions_become_reasons(monkeypatch):
    problem = attention_picker.Problem("cpu", "float32", 32, 4, 2)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    verdict = attention_picker.try_here("flash-attn", problem)
    assert verdict.harmless and verdict.reason.startswith("ModuleNotFoundError")

    def broken(*args, **options):
        raise RuntimeError("HIP error: invalid device function\nmore lines")
    module = fake_flash_attn()
    module.flash_attn_func = module.flash_attn_varlen_func = broken
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    reason = "HIP error: invalid device function"
    assert attention_picker.try_here("flash-attn", problem) == attention_picker.Verdict(
        "flash-attn", None, reason, harmless=False
    )


@pytest.mark.parametrize("texts, reason", (
    # the words torch uses; the leading 1 is the printed value of its `debug` flag
    (["Memory efficient kernel not used because: (Triggered internally at x.cpp:1)",
      "1Torch was not compiled with memory efficient attention. (Triggered internally at x.cpp:2)",
      "Flash attention kernel not used because: (Triggered internally at x.cpp:3)",
      "Flash attention has been runtime disabled. (Triggered internally at x.cpp:4)"],
     "torch built without it"),
    (["Flash attention kernel not used because: (Triggered internally at x.cpp:1)",
      "Attempting to use FlashAttention on unsupported GPU architecture gfx906 (Triggered "
      "internally at x.cpp:2)"],
     "Attempting to use FlashAttention on unsupported GPU architecture gfx906"),
    ([], "torch has no such kernel for this card and shape"),
))
def test_the_reason_is_taken_from_torchs_warnings(monkeypatch, texts, reason):
    def refuse(*args, **options):
        for text in texts:
            warnings.warn(text)
        raise RuntimeError("No available kernel. Aborting execution.")
    monkeypatch.setattr(A.F, "scaled_dot_product_attention", refuse)
    problem = attention_picker.Problem("cpu", "bfloat16", 32, 4, 2)
    assert attention_picker.try_here("sdpa-efficient", problem) == attention_picker.Verdict(
        "sdpa-efficient", None, reason
    )


# ---- child processes -----------------------------------------------------------------------------

def install(folder, monkeypatch, body):
    """A package flash_attn that child processes import."""
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn" / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_crash_excludes_one_kernel_only(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch,
            "import os\nprint('{\"garbage\": [', flush=True)\nprint('[]')\nos.abort()\n")
    problem = attention_picker.Problem("cpu", "float32", 8, 2, 1, training=False)
    plain, flash, math_ = attention_picker.try_in_children(
        ["plain", "flash-attn", "sdpa-math"], problem
    )
    assert plain.ms > 0 and math_.ms > 0
    assert flash.kernel == "flash-attn" and flash.ms is None and flash.reason == "crashed: Aborted"


def test_a_kernel_that_hangs_is_stopped_at_the_limit(monkeypatch, tmp_path):
    install(tmp_path, monkeypatch, "import time\ntime.sleep(1000)\n")
    assert attention_picker.try_in_children(
        ["flash-attn"], attention_picker.Problem("cpu", "float32", 8, 2, 1), limit=1
    ) == [attention_picker.Verdict("flash-attn", None, "no answer within 1 s")]


class Child:
    """Imitates subprocess.Popen: answers from a script of (return code, lines of stdout) and
    records the arguments."""
    script, orders = [], []

    def __init__(self, command, **options):
        assert command[:2] == [sys.executable, "-m"]
        assert command[2:4] == ["fast.attention_picker", "--probe"]
        Child.orders.append(json.loads(command[4])["kernels"])
        self.returncode, self.lines = Child.script.pop(0)

        error = "Traceback\nOSError: libgalaxyhip.so.5: cannot open shared object file\n"
        self.stdout = [line.encode() + b"\n" for line in self.lines]
        self.stderr = error.encode().splitlines(True)

    def wait(self, timeout):
        return self.returncode


def test_only_the_kernel_that_ran_is_blamed_for_a_crash(monkeypatch):
    ok = lambda kernel: json.dumps({"kernel": kernel, "ms": 1.5})
    Child.script = [(0, [ok("sdpa-flash")]),  # ended before sdpa-efficient: tried again
                    (0,
                     ["noise", ok("sdpa-efficient")[:-4], ok("sdpa-efficient"), ok("sdpa-flash")]),
                    (1, [])]
    Child.orders = []
    monkeypatch.setattr(attention_picker.subprocess, "Popen", Child)
    names = ["sdpa-flash", "sdpa-efficient", "plain"]
    verdicts = attention_picker.try_in_children(
        names, attention_picker.Problem("cuda:0", "float16", 64, 4, 2)
    )
    assert [(v.kernel, v.ms) for v in verdicts] == [
        ("sdpa-flash", 1.5), ("sdpa-efficient", 1.5), ("plain", None)
    ]
    assert (verdicts[-1].reason
            == "exit code 1: OSError: libgalaxyhip.so.5: cannot open shared object file")
    assert Child.orders == [names, names[1:], names[2:]]


def test_a_child_stops_after_a_kernel_that_may_have_done_harm(monkeypatch, capsys):
    tried = []

    def try_here(kernel, problem):
        tried.append(kernel)
        return attention_picker.Verdict(kernel, reason="wrong output",
                                        harmless=kernel not in ("sdpa-flash", "plain"))
    monkeypatch.setattr(attention_picker, "try_here", try_here)
    order = {"problem": {"device": "cpu", "dtype": "float16", "head_dim": 8, "num_heads": 2,
                         "num_kv_heads": 1}}
    attention_picker.answer_probe(
        json.dumps({"kernels": ["sdpa-math", "sdpa-flash", "plain"], **order})
    )
    attention_picker.answer_probe(json.dumps({"kernels": ["sdpa-flash", "plain"], **order}))
    assert tried == ["sdpa-math", "sdpa-flash", "sdpa-flash"]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed.pop(0) == printed.pop(1) == {"ready": True}
    assert [verdict["kernel"] for verdict in printed] == ["sdpa-math", "sdpa-flash"]


def test_each_kernel_has_the_limit_for_itself(monkeypatch, tmp_path):
    """Together they take longer than it; what the imports take is not counted."""
    install(tmp_path, monkeypatch, "import time\ntime.sleep(1.5)\nraise ImportError('late')\n")
    started = time.monotonic()
    names = ["flash-attn"] * 3
    problem = attention_picker.Problem("cpu", "float32", 8, 2, 1)
    verdicts = attention_picker.try_in_children(names, problem, limit=4)
    assert [verdict.reason for verdict in verdicts] == ["ImportError: late"] * 3
    assert time.monotonic() - started > 4.5


def test_a_child_uses_the_card_of_its_rank(monkeypatch, capsys):
    """Triton's kernels run on the current device, which is the first until another is set."""
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch, "zeros", lambda n, device: done.append(device))
    monkeypatch.setattr(attention_picker, "try_here", lambda kernel, problem:
                        done.append(kernel) or attention_picker.Verdict(kernel, ms=1.0))
    problem = attention_picker.Problem("cuda:3", "bfloat16", 64, 4, 2)
    probe = json.dumps({"kernels": ["plain"], "problem": asdict(problem)})
    attention_picker.answer_probe(probe)
    assert done == ["cuda:3", "cuda:3", "plain"]
    capsys.readouterr()

    def busy(device):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    attention_picker.answer_probe(probe)
    refusal = capsys.readouterr().out
    assert attention_picker.no_card(refusal).endswith("is/are busy or unavailable")


def test_a_card_in_exclusive_mode_has_its_kernels_tried_here(monkeypatch):
    busy = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
    Child.script, Child.orders = [(0, [json.dumps({"no_card": busy})])], []
    monkeypatch.setattr(attention_picker.subprocess, "Popen", Child)
    monkeypatch.setattr(attention_picker, "try_here", lambda name, problem:
                        attention_picker.Verdict(name, ms=1.0 if name == "plain" else 0.1))
    monkeypatch.setattr(attention_picker, "version_of", lambda package: None)
    choice = attention_picker.pick_kernel("sdpa", device="cuda:0", dtype=torch.float16, **SHAPE)
    assert choice.timings[choice.kernel] == 0.1 and len(Child.orders) == 1
    assert choice.lines[-2].startswith(f"attention: the card admits no second process ({busy})")


# ---- pick_kernel ---------------------------------------------------------------------------------

SHAPE = {"head_dim": 16, "num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(autouse=True)
def clear_cache():
    """Forget what earlier tests measured."""
    attention_picker.try_kernels.cache_clear()


def imitate_gpu(monkeypatch, measured, hip=None, installed=None, version=(2, 13)):
    """A machine with a GPU, on which child processes report `measured`: kernel -> ms or reason."""
    def children(kernels, problem):
        assert problem.on_gpu
        pairs = [(name, measured[name]) for name in kernels]
        return [attention_picker.Verdict(name, ms=x) if isinstance(x, float)
                else attention_picker.Verdict(name, reason=x)
                for name, x in pairs]
    monkeypatch.setattr(attention_picker, "try_in_children", children)
    monkeypatch.setattr(
        attention_picker, "try_here",
        lambda *args: pytest.fail("a GPU kernel was tried in the run's own process"),
    )
    monkeypatch.setattr(attention_picker, "version_of", lambda package: installed)
    monkeypatch.setattr(A, "TORCH", version)
    monkeypatch.setattr(attention_picker, "TORCH", version)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_on_the_cpu_a_correct_kernel_is_picked_without_drawing_random_numbers():
    before = torch.random.get_rng_state()
    choice = attention_picker.pick_kernel("auto", device="cpu", dtype=torch.float32, **SHAPE)
    assert torch.equal(before, torch.random.get_rng_state())
    assert choice.kernel in choice.timings and choice.timings.keys() >= {"sdpa-math", "plain"}
    assert choice.refused["flash-attn"] == choice.refused["sdpa-efficient"] == "needs a GPU"
    assert choice.lines[-1].startswith(f"attention: {choice.kernel} (")
    assert "flash-attn (needs a GPU)" in choice.lines[-1]
    assert (attention_picker.pick_kernel("sdpa", device="cpu", dtype=torch.float32, **SHAPE).kernel
            in SDPA_ON_CPU)


def test_a_k100_with_the_das_wheels(monkeypatch):
    """torch 2.4.1+das, flash-attn 2.6.1+das whose varlen is wrong on gfx928,
    no efficient kernel."""
    fault = "wrong output (a sequence of 62): off by 0.8, rounding explains 0.004"
    measured = {"flash-attn": fault, "sdpa-flash": 0.41, "sdpa-efficient": "torch built without it",
                "sdpa-math": 3.9, "plain": 4.8}
    imitate_gpu(monkeypatch, measured, hip="5.7", installed="2.6.1+das.opt2.dtk2504",
                version=(2, 4))
    choice = attention_picker.pick_kernel("auto", device="cuda:0", dtype=torch.bfloat16, **SHAPE)
    assert choice.kernel == "sdpa-flash"
    line = choice.lines[-1]
    assert line.startswith("attention: sdpa-flash (0.41 ms). not used: ")
    for part in (f"flash-attn ({fault})", "sdpa-efficient (torch built without it)",
                 "plain (ok, 4.8 ms)", "sdpa-cudnn (no cuDNN on ROCm)",
                 f"torch-varlen (not in torch {torch.__version__}"):
        assert part in line


def test_fa2_without_flash_attn(monkeypatch):
    imitate_gpu(monkeypatch,
                {"torch-varlen": 0.5, "sdpa-flash": 0.4, "sdpa-cudnn": 0.3, "sdpa-efficient": 1.0,
                 "sdpa-math": 5.0, "plain": 6.0})
    choice = attention_picker.pick_kernel("fa2", device="cuda", dtype=torch.bfloat16, **SHAPE)
    assert choice.kernel == "sdpa-cudnn"
    assert ("fa2 is not available here: flash-attn (not installed). Trying the other kernels."
            in choice.lines[0])


def test_kernels_allowed_by_each_value_of_flash_attn(monkeypatch):
    imitate_gpu(monkeypatch,
                {"flash-attn": 0.1, "sdpa-flash": 0.4, "sdpa-cudnn": 0.39, "sdpa-efficient": 1.0,
                 "sdpa-math": 5.0, "plain": 6.0, "torch-varlen": 0.5}, installed="2.7.4")
    pick = lambda value: attention_picker.pick_kernel(
        value, device="cuda", dtype=torch.bfloat16, **SHAPE
    ).kernel
    assert (pick("auto"), pick("fa2"), pick("disabled")) == ("flash-attn", "flash-attn", "plain")
    assert pick("sdpa") == "sdpa-flash"  # within a tenth of sdpa-cudnn, and preferred
    with pytest.raises(ValueError,
                       match=r"flash_attn: 'sdpaa' is not known \(did you mean 'sdpa'\?\)"):
        pick("sdpaa")


def test_without_a_working_kernel_there_is_an_error(monkeypatch):
    imitate_gpu(monkeypatch, dict.fromkeys(A.KERNELS, "crashed: Segmentation fault"))
    with pytest.raises(RuntimeError, match="no attention kernel.*Segmentation fault"):
        attention_picker.pick_kernel("sdpa", device="cuda", dtype=torch.bfloat16, **SHAPE)


@pytest.mark.parametrize("version, refused", (("2.0.4", True), ("1.0.9", True), ("2.10", False),
                                              ("2.6.1+das.opt2.dtk2504", False)))
def test_old_flash_attn_is_refused(monkeypatch, version, refused):
    monkeypatch.setattr(attention_picker, "version_of", lambda package: version)
    reason = attention_picker.known_refusal(
        "flash-attn", attention_picker.Problem("cuda:0", "bfloat16", 128, 8, 2)
    )
    assert bool(reason) is refused and (not refused or "top left" in reason)
    assert attention_picker.known_refusal(
        "flash-attn", attention_picker.Problem("cuda:0", "float32", 128, 8, 2)
    ) == "takes only float16 and bfloat16"


@pytest.mark.parametrize("version, rules, missing", (
    ("2.5.9", {"softcap": 50.0}, "has no softcap; 2.6 or newer"),
    ("2.6.1+das.opt2", {"softcap": 50.0}, None),
    ("2.3.6", {"alibi": True}, "has no ALiBi; 2.4 or newer"), ("2.4.0", {"alibi": True}, None),
    ("2.2.1", {"window": 9}, "has no window; 2.3 or newer"), ("2.2.1", {"chunk": 9}, None)
))
def test_features_by_version_of_flash_attn(monkeypatch, version, rules, missing):
    monkeypatch.setattr(attention_picker, "version_of", lambda package: version)
    reason = attention_picker.known_refusal(
        "flash-attn", attention_picker.Problem("cuda:0", "bfloat16", 128, 8, 2, **rules)
    )
    assert reason == (missing and f"version {version} {missing} is needed")


def test_softcap_on_the_cpu_uses_the_plain_kernel():
    rules = {"window": 4096, "softcap": 50.0, "scale": 256 ** -0.5}
    choice = attention_picker.pick_kernel("auto", device="cpu", dtype=torch.float32, **SHAPE,
                                          **rules)
    assert choice.kernel == "plain" and "sdpa-* (has no softcap)" in choice.lines[-1]
    assert all(choice.refused[name] == "has no softcap" for name in ("torch-varlen", *A.SDPA))
    choice = attention_picker.pick_kernel("sdpa", device="cpu", dtype=torch.float32, **SHAPE,
                                          **rules)
    assert choice.kernel == "plain"
    assert "is not available here" in choice.lines[0]
    assert "has no softcap" in choice.lines[0]


def test_alibi_and_chunks_on_the_cpu_may_use_sdpa():
    choice = attention_picker.pick_kernel("auto", device="cpu", dtype=torch.float32, **SHAPE,
                                          alibi=True)
    assert choice.timings.keys() == {"sdpa-flash", "sdpa-math", "plain"}
    assert choice.refused["torch-varlen"] == "has no ALiBi"
    choice = attention_picker.pick_kernel("sdpa", device="cpu", dtype=torch.float32, **SHAPE,
                                          chunk=64)
    assert choice.timings.keys() == {"sdpa-flash", "sdpa-math"}


def test_on_a_gpu_alibi_excludes_sdpa_flash(monkeypatch):
    imitate_gpu(monkeypatch,
                {"flash-attn": 0.1, "sdpa-cudnn": 0.3, "sdpa-efficient": 0.4, "sdpa-math": 5.0,
                 "plain": 6.0}, installed="2.7.4")
    choice = attention_picker.pick_kernel("auto", device="cuda", dtype=torch.bfloat16, **SHAPE,
                                          alibi=True)
    assert choice.kernel == "flash-attn"
    assert choice.refused == {"torch-varlen": "has no ALiBi",
                              "sdpa-flash": "takes no mask, and ALiBi needs one"}
    monkeypatch.setattr(attention_picker, "version_of", lambda package: None)
    attention_picker.try_kernels.cache_clear()
    choice = attention_picker.pick_kernel("auto", device="cuda", dtype=torch.bfloat16, **SHAPE,
                                          alibi=True, window=64)
    # it takes the mask: no fallback
    assert choice.kernel == "sdpa-cudnn" and len(choice.lines) == 1


@pytest.mark.parametrize("rules, cases", (
    ({}, None), ({"window": 4096}, "sequences longer than the window of 4096 tokens"),
    ({"training": False}, "prompts after a cached one"),
    ({"window": 8, "training": False},
     "sequences longer than the window of 8 tokens and prompts after a cached one")
))
def test_the_fallback_for_masks_is_announced(monkeypatch, rules, cases):
    imitate_gpu(monkeypatch, dict.fromkeys(A.KERNELS, 6.0) | {"sdpa-flash": 0.1})
    lines = attention_picker.pick_kernel("sdpa", device="cuda", dtype=torch.bfloat16, **SHAPE,
                                         **rules).lines
    assert lines[-1].startswith("attention: sdpa-flash (0.1 ms)")
    note = (
        f"attention: sdpa-flash may take no mask: {cases} then run on sdpa-efficient or sdpa-math"
    )
    assert lines[:-1] == ([note] if cases else [])
    imitate_gpu(monkeypatch, {"flash-attn": 0.1}, installed="2.7.4")        # supports all of it
    assert len(attention_picker.pick_kernel("fa2", device="cuda", dtype=torch.bfloat16, **SHAPE,
                                            **rules).lines) == 1


# ---- cards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", (0, 8))
def test_the_number_of_cards_comes_from_the_runtime(monkeypatch, counted):
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 8, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counted)
    cards, warning = attention_picker.visible_cards()
    assert cards == 8
    assert not warning if counted == 8 else "pynvml" in warning[0] and "amdsmi" in warning[0]


@pytest.mark.parametrize("hip, arch, name", (
    ("5.7", "gfx928:sramecc+:xnack-", "K100_AI (gfx928, Hygon DCU, 64 GiB)"),
    ("5.7", "gfx936", "K100_AI (gfx936, Hygon DCU, 64 GiB)"),
    ("6.2", "gfx942:sramecc+:xnack-", "K100_AI (gfx942, 64 GiB)"),
    (None, None, "K100_AI (sm_90, 64 GiB)"),
))
def test_card_names(monkeypatch, hip, arch, name):
    card = types.SimpleNamespace(name="K100_AI", major=9, minor=0, total_memory=64 * 2**30,
                                 gcnArchName=arch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert attention_picker.card_name(0) == name


def test_an_overridden_gfx_version_is_announced(monkeypatch):
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "9.0.6")
    assert attention_picker.architecture_override() == []  # no effect in a CPU or CUDA build
    imitate_gpu(monkeypatch, dict.fromkeys(A.KERNELS, 1.0), hip="6.2", installed="2.7.4")
    lines = attention_picker.pick_kernel("auto", device="cuda:0", dtype=torch.bfloat16,
                                         **SHAPE).lines
    assert "HSA_OVERRIDE_GFX_VERSION=9.0.6" in lines[0]
    assert lines[1].startswith("attention: flash-attn")


def test_the_command_prints_a_table_of_this_machine(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")
    monkeypatch.setattr(attention_picker, "CHECKED", (1, 7, 65))
    monkeypatch.setattr(
        sys, "argv", ["attention.py", "--head_dim", "16", "--num_heads", "2", "--num_kv_heads", "1"]
    )
    attention_picker.main()
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1" in out
    if not attention_picker.visible_cards()[0]:
        assert "no GPU" in out
    for dtype in ("bfloat16", "float16", "float32"):
        for kernel in A.KERNELS:
            assert any(dtype in line and kernel in line for line in out.splitlines())
