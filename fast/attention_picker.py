"""Try every attention kernel on this machine and name the fastest correct one.

    python -m fast.attention_picker                                     the kernels of this machine
    python -m fast.attention_picker --head_dim 64 --num_heads 14 --num_kv_heads 2

Requires: attention.py.
Next: docs/rocm_dcu.md.
"""
import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

# first: a missing package ends in a sentence
from errors import did_you_mean, first_line

import torch

from attention import (KERNELS, PackedLayout, SDPA, TORCH, attend, missing_feature, plain_attention,
                       takes_mask, version_numbers)

WANTED = {          # the key flash_attn of LLaMA-Factory -> the kernels it allows
    "auto": KERNELS,
    "sdpa": ("torch-varlen", *SDPA),
    "fa2": ("flash-attn",),
    "disabled": ("plain",),
}
HALF_ONLY = ("flash-attn", "torch-varlen", "sdpa-flash", "sdpa-cudnn")          # on a GPU
GPU_ONLY = ("flash-attn", "torch-varlen", "sdpa-cudnn", "sdpa-efficient")

# Lengths of the sequences of a packed row
CHECKED = (1, 7, 62, 128, 129, 520, 1)      # around the tile sizes of kernels, 64 and 128
TIMED = (1024, 512, 257, 130, 62, 62, 1)    # 2048 tokens
TIMED_ON_CPU = (128, 62, 33, 1)
START_SECONDS = 180     # a child imports torch, perhaps from a slow disk, and opens the card


@dataclass(frozen=True)
class Problem:
    """The inputs that a model gives to a kernel. Plain values: a child process gets it as JSON."""
    device: str
    dtype: str
    head_dim: int
    num_heads: int
    num_kv_heads: int
    training: bool = True           # with gradients; else prompts and single tokens
    window: int | None = None       # tokens; this and chunk may hold for some layers only
    chunk: int | None = None        # tokens
    softcap: float | None = None
    alibi: bool = False             # `attend` gets slopes
    sinks: bool = False             # `attend` gets sinks
    scale: float | None = None      # None: head_dim ** -0.5

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def options(self, heads: int, device) -> dict:
        """Keyword arguments of `attend` and `plain_attention`."""
        slopes = None
        if self.alibi:              # between 1 and 2 ** -8, as in models with ALiBi
            slopes = 2.0 ** -torch.linspace(0.5, 8, heads, device=device)
        sinks = torch.linspace(-1, 2, heads, device=device) if self.sinks else None
        scale = self.head_dim ** -0.5 if self.scale is None else self.scale
        return {"scale": scale, "window": self.window, "softcap": self.softcap, "slopes": slopes,
                "sinks": sinks}


@dataclass
class Verdict:
    """The result of trying one kernel: its time, or the reason to refuse it."""
    kernel: str
    ms: float | None = None         # one layer: forward, and backward when training
    reason: str | None = None
    harmless: bool = True           # False: it ran and failed; try no other kernel in this process
    tried_here: str | None = None   # why it was tried in the run's own process, on a GPU


@dataclass
class KernelChoice:
    """The result of pick_kernel."""
    kernel: str                                                 # for `attend`
    lines: list[str]                                            # for the start page
    timings: dict[str, float] = field(default_factory=dict)     # ms of each correct kernel
    refused: dict[str, str] = field(default_factory=dict)       # reason for each other kernel


# ---- the choice ----------------------------------------------------------------------------------

def pick_kernel(flash_attn: str = "auto", *, device, dtype: torch.dtype, **shapes) -> KernelChoice:
    """The fastest kernel that is correct on this device for these shapes.

    flash_attn: auto (all kernels), sdpa (torch's own), fa2 (flash-attn), disabled (plain).
    shapes: the other fields of Problem. With a window or a chunk the kernel is also right without.
    If no allowed kernel works, the others are tried, and a line says so.

    Takes seconds, once per process and problem. On a GPU the kernels run in child processes, so
    that one that crashes or hangs is refused and does not end the run. Raises ValueError for an
    unknown flash_attn, RuntimeError if no kernel is correct.
    """
    if flash_attn not in WANTED:
        hint = did_you_mean(str(flash_attn), WANTED)
        raise ValueError(f"flash_attn: {flash_attn!r} is not known{hint}; "
                         f"choose one of {', '.join(WANTED)}")
    problem = Problem(str(device), str(dtype).removeprefix("torch."), **shapes)
    if flash_attn == "disabled":
        return KernelChoice("plain", ["attention: plain (flash_attn: disabled)"])

    lines = architecture_override()
    allowed = WANTED[flash_attn]
    verdicts = try_kernels(allowed, problem)
    if all(verdict.reason for verdict in verdicts):
        refused = {verdict.kernel: verdict.reason for verdict in verdicts}
        reasons = ", ".join(refusals_in_words(refused))
        lines.append(f"attention: flash_attn: {flash_attn} is not available here: {reasons}. "
                     "Trying the other kernels.")
        verdicts += try_kernels(tuple(name for name in KERNELS if name not in allowed), problem)

    timings = {verdict.kernel: verdict.ms for verdict in verdicts if not verdict.reason}
    refused = {verdict.kernel: verdict.reason for verdict in verdicts if verdict.reason}
    if not timings:
        raise RuntimeError(f"no attention kernel gives correct results on {device}: {refused}")
    kernel = preferred_kernel(timings, problem)
    others = [f"{name} (ok, {ms:.3g} ms)" for name, ms in timings.items() if name != kernel]
    others += refusals_in_words(refused)
    lines += own_process_note(verdicts)
    lines += mask_note(kernel, problem)
    why = ""
    if timings[kernel] > min(timings.values()):
        why = ", near the fastest"          # see preferred_kernel
    lines.append(f"attention: {kernel} ({timings[kernel]:.3g} ms{why}). not used: "
                 f"{', '.join(others)}")
    return KernelChoice(kernel, lines, timings, refused)


def preferred_kernel(timings: dict[str, float], problem: Problem) -> str:
    """The first of KERNELS whose time is close to the fastest.

    Without the margin noise would choose, and a resumed run could get another kernel.
    """
    margin = 1.1 if problem.on_gpu else 2
    close = margin * min(timings.values())
    return next(name for name in KERNELS if name in timings and timings[name] <= close)


def refusals_in_words(refused: dict[str, str]) -> list[str]:
    """"name (reason)" of each refused kernel; "sdpa-*" if all SDPA backends have one reason."""
    reasons = {refused.get(name) for name in SDPA}
    if len(reasons) == 1 and None not in reasons:
        refused = {name: reason for name, reason in refused.items() if name not in SDPA}
        refused["sdpa-*"] = reasons.pop()
    return [f"{name} ({reason})" for name, reason in refused.items()]


def own_process_note(verdicts: Sequence[Verdict]) -> list[str]:
    """[a line] if kernels ran in the run's own process, as the card refused another, else []."""
    reasons = [verdict.tried_here for verdict in verdicts if verdict.tried_here]
    if not reasons:
        return []
    return [f"attention: the card admits no second process ({reasons[0]}): kernels are tried in "
            "this one, which a faulty kernel would end; flash_attn: sdpa tries torch's own only"]


def mask_note(kernel: str, problem: Problem) -> list[str]:
    """[a line] if another kernel than the chosen one runs where a mask is needed, else []."""
    masked = []
    if problem.window:
        masked.append(f"sequences longer than the window of {problem.window} tokens")
    if not problem.training:
        masked.append("prompts after a cached one")
    if not masked or not problem.on_gpu or problem.alibi or takes_mask(kernel):
        return []
    if kernel in ("flash-attn", "plain"):
        return []
    return [f"attention: {kernel} may take no mask: {' and '.join(masked)} then run on "
            "sdpa-efficient or sdpa-math"]


@lru_cache(maxsize=None)
def try_kernels(kernels: tuple[str, ...], problem: Problem) -> tuple[Verdict, ...]:
    """A Verdict for each kernel, in order."""
    verdicts = {}
    for name in kernels:
        if reason := known_refusal(name, problem):
            verdicts[name] = Verdict(name, reason=reason)
    rest = [name for name in kernels if name not in verdicts]
    if problem.on_gpu:
        tried = try_in_children(rest, problem)
    else:
        tried = [try_here(name, problem) for name in rest]
    verdicts |= {verdict.kernel: verdict for verdict in tried}
    return tuple(verdicts[name] for name in kernels)


def known_refusal(kernel: str, problem: Problem) -> str | None:
    """The reason why a kernel need not be tried, or None. Imports and runs nothing."""
    if missing := missing_feature(kernel, problem.softcap is not None, problem.alibi,
                                  problem.sinks):
        return missing
    if kernel == "sdpa-flash" and problem.alibi and problem.on_gpu:
        return "takes no mask, and ALiBi needs one"
    if kernel in GPU_ONLY and not problem.on_gpu:
        return "needs a GPU"
    if kernel in HALF_ONLY and problem.on_gpu and problem.dtype == "float32":
        return "takes only float16 and bfloat16"
    if kernel == "flash-attn":
        return old_flash_attn(problem)
    if kernel == "torch-varlen" and TORCH < (2, 11):
        return f"not in torch {torch.__version__}; 2.11 or newer has it"
    if kernel == "sdpa-cudnn" and torch.version.hip:
        return "no cuDNN on ROCm"
    return None


def old_flash_attn(problem: Problem) -> str | None:
    """The reason why the installed version of flash-attn cannot be used, or None."""
    version = version_of("flash-attn")
    if version is None:
        return "not installed"
    for needed, since, fault in ((True, "2.1", "aligns the causal mask top left"),
                                 (problem.window, "2.3", "has no window"),
                                 (problem.alibi, "2.4", "has no ALiBi"),
                                 (problem.softcap, "2.6", "has no softcap")):
        if needed and version_numbers(version) < version_numbers(since):
            return f"version {version} {fault}; {since} or newer is needed"
    return None


# ---- child processes -----------------------------------------------------------------------------

def try_in_children(kernels: Sequence[str], problem: Problem, limit: float = 60) -> list[Verdict]:
    """Verdicts from processes `python -m fast.attention_picker --probe JSON`.

    A child tries kernel after kernel and prints a JSON line for each. Errors of a GPU surface late
    and can come from an earlier kernel, so only the first kernel of a child is blamed. A child that
    dies, fails or takes `limit` seconds for a kernel is replaced by a new one, which starts with
    the kernel in question. A card that admits one process only (exclusive compute mode) refuses
    every child: the kernels are then tried in this process.
    """
    verdicts = []
    left = list(kernels)
    while left:
        text, ending = run_child(left, problem, limit)
        if refusal := no_card(text):
            tried = [try_here(name, problem) for name in left]
            return verdicts + [replace(verdict, tried_here=refusal) for verdict in tried]
        found = read_verdicts(text, left) or [Verdict(left[0], reason=ending)]
        verdicts += found
        left = left[len(found):]
    return verdicts


def run_child(kernels: list[str], problem: Problem, limit: float) -> tuple[str, str]:
    """(what a child printed, how it ended). limit: seconds for each kernel, after the imports."""
    probe = json.dumps({"kernels": kernels, "problem": asdict(problem)})
    child = subprocess.Popen(
        [sys.executable, "-m", "fast.attention_picker", "--probe", probe],
        cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed, errors = lines_as_they_come(child.stdout), lines_as_they_come(child.stderr)
    text = ""
    seconds = START_SECONDS
    end = time.monotonic() + seconds
    while True:
        try:
            line = printed.get(timeout=max(0, end - time.monotonic()))
        except Empty:
            child.kill()    # no wait: a process stuck in a GPU driver may never end
            return text, f"no answer within {seconds} s"
        if line is None:
            return text, how_it_ended(child, errors, limit)
        text += line
        if line.startswith("{"):                    # that it is ready, or a verdict
            seconds = limit
            end = time.monotonic() + seconds


def lines_as_they_come(stream) -> SimpleQueue:
    """The lines of a pipe as they come, then None, read by a thread: get can time out."""
    lines = SimpleQueue()

    def read():
        for line in stream:
            lines.put(line.decode(errors="replace"))
        lines.put(None)

    Thread(target=read, daemon=True).start()
    return lines


def how_it_ended(child, errors: SimpleQueue, limit: float) -> str:
    """Why a child that prints nothing more has not given all verdicts, in words."""
    try:
        code = child.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        child.kill()
        return f"did not end within {limit} s"
    if code < 0:
        return f"crashed: {signal.strsignal(-code)}"
    lines = [line.strip() for line in iter(errors.get, None)]
    last_line = ([line for line in lines if line] or ["no message"])[-1]
    return f"exit code {code}: {last_line[:160]}"


def no_card(text: str) -> str | None:
    """The reason why a child could not use the card, from its output; None if it could."""
    for line in text.splitlines():
        if line.startswith('{"no_card": '):
            return json.loads(line)["no_card"]
    return None


def read_verdicts(text: str, expected: list[str]) -> list[Verdict]:
    """The complete verdicts in the output of a child, in order. Other lines are skipped."""
    found = []
    for line in text.splitlines():
        try:
            verdict = Verdict(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if len(found) < len(expected) and verdict.kernel == expected[len(found)]:
            found.append(verdict)
    return found


def answer_probe(probe: str):
    """In the child: print that it is ready, then a verdict per line.

    It ends after the first kernel that is not harmless.
    """
    probe = json.loads(probe)
    problem = Problem(**probe["problem"])
    if problem.on_gpu:
        try:            # Triton starts kernels on the current device, at first cuda:0
            torch.cuda.set_device(problem.device)
            torch.zeros(1, device=problem.device)
        except RuntimeError as error:
            print(json.dumps({"no_card": first_line(error)}), flush=True)
            return
    print(json.dumps({"ready": True}), flush=True)
    for i, kernel in enumerate(probe["kernels"]):
        verdict = try_here(kernel, problem)
        if verdict.harmless or i == 0:
            print(json.dumps(asdict(verdict)), flush=True)
        if not verdict.harmless:
            return


# ---- one kernel: is it correct, how fast is it ---------------------------------------------------

def try_here(kernel: str, problem: Problem) -> Verdict:
    """Check and time a kernel in this process. Any exception it raises becomes its reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fault = find_fault(kernel, problem)
            if fault:
                return Verdict(kernel, reason=fault, harmless=False)
            return Verdict(kernel, ms=time_kernel(kernel, problem))
        except Exception as error:
            never_ran = isinstance(error, ImportError) or "No available kernel" in str(error)
            return Verdict(kernel, reason=error_reason(error, caught), harmless=never_ran)


def error_reason(error: Exception, caught) -> str:
    """One line about an exception. For "No available kernel" the reason is in torch's warnings."""
    if "No available kernel" in str(error):
        texts = [str(item.message).split(" (Triggered")[0].strip() for item in caught]
        if any("not compiled with" in text for text in texts):
            return "torch built without it"
        texts = [text for text in texts
                 if not re.search("not used because|runtime disabled", text)]
        return (texts or ["torch has no such kernel for this card and shape"])[0][:160]
    line = (str(error).strip().splitlines() or ["no message"])[0][:160]
    return line if type(error) is RuntimeError else f"{type(error).__name__}: {line}"


def find_fault(kernel: str, problem: Problem) -> str | None:
    """None if a kernel is as exact as its dtype allows, else a sentence.

    The reference is plain_attention in float64 on the CPU. In each sequence the root mean square
    error of output and gradients may be at most the sum of
      * twice the error of plain_attention with each step rounded to the dtype of the problem,
      * one rounding step in one row: the gradient of a first query is zero, as it sees one key, and
        plain_attention may hit zero exactly,
      * 1e-6, as float32 may be summed in another order.
    Real faults are about ten times larger.
    """
    dtype = getattr(torch, problem.dtype)
    tested = partial(attend, kernel=kernel)
    rounding = partial(plain_attention, wide_scores=False)
    for variant, (B, T, S, lengths) in product(variants(problem), check_cases(problem.training)):
        inputs = example_inputs(problem, B, T, S)
        exact = run_attention(plain_attention, inputs, "cpu", torch.float64, lengths, variant)
        rounded = run_attention(rounding, inputs, "cpu", dtype, lengths, variant)
        found = run_attention(tested, inputs, problem.device, dtype, lengths, variant)
        where = "a sequence of {length}" if lengths else f"{T} queries, {S} keys"
        if variant.window:
            where += f", window {variant.window}"
        if fault := wrong_result(exact, rounded, found, lengths, dtype, where):
            return fault
    if dtype is torch.float16 and overflows(tested, problem):
        return "overflows in float16 where q·k passes 65504"
    return None


def wrong_result(exact, rounded, found, lengths, dtype, where: str) -> str | None:
    """The first result and sequence where `found` is further from `exact` than is allowed.

    where: the place in words; {length} stands for the length of the sequence.
    """
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, *results in zip(names, exact, rounded, found):
        sequences = zip(*(x.split(lengths or x.shape[2], dim=2) for x in results))
        for right, near, x in sequences:
            length = right.shape[2]
            error = root_mean_square(x - right)
            explained = root_mean_square(near - right)
            allowed = 2 * explained + torch.finfo(dtype).eps * length ** -0.5 + 1e-6
            if not error <= allowed:            # written so that NaN is a fault
                place = where.format(length=length)
                return (f"wrong {name} ({place}): off by {error:.2g}, "
                        f"rounding explains {allowed:.2g}")
    return None


def root_mean_square(x) -> float:
    """The root of the mean square of a tensor."""
    return x.square().mean().sqrt().item()


def overflows(attention: Callable, problem: Problem) -> bool:
    """Whether float16 results are not finite when q·k exceeds 65504 before scaling (Qwen2)."""
    q, k, v, grad = example_inputs(problem, 1, 129, 129)
    inputs = [64 * q, 64 * k, v, grad]
    results = run_attention(attention, inputs, problem.device, torch.float16, None, problem)
    return not all(x.isfinite().all() for x in results)


def variants(problem: Problem) -> list[Problem]:
    """The problems to check: without a window and, if some layers have one, with it.

    The window is shortened and the softcap lowered so that they matter in check_cases. A chunk
    needs no check: `attend` turns it into sequences and shorter calls.
    """
    windows = [None] if problem.window is None else [None, min(problem.window, 42)]
    softcap = None if problem.softcap is None else min(problem.softcap, 2.0)
    return [replace(problem, window=window, softcap=softcap) for window in windows]


def check_cases(training: bool) -> list[tuple]:
    """(B, T, S, lengths of a packed row or None) of each check.

    Training: a packed row and a batch. Else: a prompt, a later prompt, one token.
    """
    if training:
        return [(1, sum(CHECKED), sum(CHECKED), CHECKED), (2, 129, 129, None)]
    return [(1, 129, 129, None), (1, 7, 129, None), (1, 1, 129, None)]


def example_inputs(problem: Problem, B: int, T: int, S: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, with at most two key/value heads.

    Each key resembles the query of its own position, so that attention looks at the near past, as
    in a real model, and a kernel that loses the last keys of a tile has a large error.
    """
    K = min(problem.num_kv_heads, 2)
    group = problem.num_heads // problem.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    sizes = ((K * group, T), (K, S), (K, S), (K * group, T))
    q, k, v, grad = (torch.randn(B, heads, length, problem.head_dim, generator=generator)
                     for heads, length in sizes)
    k[:, :, S - T:] += 0.4 * q[:, ::group]
    return [x.to(getattr(torch, problem.dtype)) for x in (q, k, v, grad)]


def run_attention(attention: Callable, inputs, device, dtype, lengths, problem) -> list:
    """[output], when training with the gradients of q, k and v, in float64 on the CPU."""
    q, k, v, grad = (x.to(device, dtype) for x in inputs)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)      # a view, as in a model
    leaves = [x.detach().requires_grad_(problem.training) for x in (q, k, v)]
    layout = PackedLayout(lengths, device) if lengths else None
    out = attention(*leaves, layout=layout, **problem.options(q.shape[1], device))
    results = [out]
    if problem.training:
        # Of a scalar: with a given gradient torch would import sympy, 0.4 s of every start.
        results += torch.autograd.grad((out * grad).sum(), leaves)
    return [x.detach().to("cpu", torch.float64) for x in results]


def time_kernel(kernel: str, problem: Problem, warm: int = 3, runs: int = 7) -> float:
    """Milliseconds of one layer's attention: the least of several runs.

    The lengths differ in each run, as in real micro-batches: planning for a new shape counts.
    """
    first, second, *rest = TIMED if problem.on_gpu else TIMED_ON_CPU
    S = first + second + sum(rest)
    q, k, v, grad = timing_inputs(problem, S)
    leaves = (q, k, v)
    call = partial(attend, kernel=kernel, chunk=problem.chunk,
                   **problem.options(problem.num_heads, problem.device))

    seconds = []
    for i in range(warm + runs):
        layout = PackedLayout((first - i, second + i, *rest), problem.device)
        wait_for_gpu(problem)
        start = time.perf_counter()
        if problem.training:
            torch.autograd.grad((call(*leaves, layout=layout) * grad).sum(), leaves)
        else:               # a prompt, then one token
            call(q[:, :, i:], k[:, :, i:], v[:, :, i:])
            call(q[:, :, :1], k[:, :, i:], v[:, :, i:])
        wait_for_gpu(problem)
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds[warm:])


def timing_inputs(problem: Problem, S: int) -> list[torch.Tensor]:
    """Random q, k, v and gradient of the output. The global generator is not used."""
    generator = torch.Generator(problem.device).manual_seed(0)
    dtype = getattr(torch, problem.dtype)
    inputs = []
    H, K = problem.num_heads, problem.num_kv_heads
    for heads in (H, K, K, H):
        inputs.append(torch.randn(1, heads, S, problem.head_dim, device=problem.device,
                                  dtype=dtype, generator=generator))
    for leaf in inputs[:3]:
        leaf.requires_grad_(problem.training)
    return inputs


def wait_for_gpu(problem: Problem):
    """Wait until the GPU of the problem is idle; nothing on a CPU."""
    if problem.on_gpu:
        torch.cuda.synchronize(problem.device)


# ---- this machine --------------------------------------------------------------------------------

SWITCHES = {    # environment variables that change which kernel runs, or on which card
    "CUDA_VISIBLE_DEVICES": "the cards this process may see",
    "HIP_VISIBLE_DEVICES": "the cards this process may see; the one to use on ROCm",
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL":
        "1: sdpa-flash, sdpa-efficient on cards torch calls experimental",
    "TORCH_ROCM_FA_PREFER_CK": "1: CK kernels behind sdpa-flash, in torch builds that have them",
    "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE: flash-attn on ROCm by Triton instead of CK",
    "PYTORCH_NVML_BASED_CUDA_CHECK":
        "on ROCm leave it unset: is_available() would fail as device_count() does",
    "HSA_OVERRIDE_GFX_VERSION": "the card reports another architecture",
}


def architecture_override() -> list[str]:
    """[a warning] if the environment makes a ROCm card report another architecture, else []."""
    gfx = os.environ.get("HSA_OVERRIDE_GFX_VERSION")
    if not (gfx and torch.version.hip):
        return []
    return [f"attention: HSA_OVERRIDE_GFX_VERSION={gfx} makes the card report another "
            "architecture: torch may start kernels that it cannot run. Unset it unless you know "
            "that you need it."]


def visible_cards() -> tuple[int, list[str]]:
    """(number of GPUs, [a warning] or []), asked of the runtime.

    On ROCm torch.cuda.device_count() can be wrong.
    """
    cards = 0
    if hasattr(torch._C, "_cuda_getDeviceCount"):
        cards = torch._C._cuda_getDeviceCount()
    counted = torch.cuda.device_count()
    if counted == cards:
        return cards, []
    return cards, [f"torch.cuda.device_count() says {counted}, the runtime says {cards}. Either "
                   "pynvml is installed without amdsmi (pip uninstall nvidia-ml-py pynvml), or "
                   "amdsmi is installed and finds no card (pip uninstall amdsmi)."]


def card_name(index: int) -> str:
    """Name, architecture and memory of a GPU: "NVIDIA H200 (sm_90, 140 GiB)"."""
    card = torch.cuda.get_device_properties(index)
    arch = f"sm_{card.major}{card.minor}"
    if torch.version.hip:
        arch = card.gcnArchName.split(":")[0]
        if re.fullmatch("gfx(92.|93.|946)", arch):
            arch += ", Hygon DCU"
    return f"{card.name} ({arch}, {card.total_memory / 2**30:.0f} GiB)"


def version_of(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine() -> list[str]:
    """Lines: versions, each card, each relevant environment variable that is set, warnings."""
    runtime = "CPU only"
    if torch.version.cuda:
        runtime = f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        runtime = f"ROCm {torch.version.hip}"
    lines = [f"torch {torch.__version__} ({runtime}), Python {platform.python_version()}, "
             f"flash-attn {version_of('flash-attn') or 'not installed'}"]

    cards, warning = visible_cards()
    lines += [f"cuda:{i}  {card_name(i)}" for i in range(cards)] or ["no GPU: the CPU is used"]
    for name, effect in SWITCHES.items():
        if name in os.environ:
            lines.append(f"{name}={os.environ[name]}  ({effect})")
    return lines + warning + architecture_override()


def parse_options() -> dict:
    """The command line: fields of Problem, and `probe`."""
    parser = argparse.ArgumentParser(description="The attention kernels of this machine.")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument("--num_kv_heads", type=int, default=2)
    parser.add_argument("--window", type=int, help="sliding window in tokens")
    parser.add_argument("--chunk", type=int, help="attention within chunks of tokens (Llama 4)")
    parser.add_argument("--softcap", type=float,
                        help="scores become softcap * tanh(scores / softcap) (Gemma 2)")
    parser.add_argument("--alibi", action="store_true",
                        help="ALiBi instead of rotary positions (Baichuan 2 13B)")
    parser.add_argument("--sinks", action="store_true", help="attention sinks (GPT-OSS)")
    parser.add_argument("--scale", type=float, help="of the scores; default head_dim ** -0.5")
    parser.add_argument("--probe", metavar="JSON",
                        help="for the picker: try the named kernels, print a JSON line each")
    return vars(parser.parse_args())


def main():
    """Print this machine and the result of each kernel, on the first card and on the last."""
    options = parse_options()
    probe = options.pop("probe")
    if probe:
        return answer_probe(probe)

    print(*describe_machine(), sep="\n")
    shapes = ", ".join(f"{name} {value}" for name, value in options.items())
    print(f"\nms for one layer, forward and backward; {shapes}")
    cards = visible_cards()[0]
    devices = dict.fromkeys(["cuda:0", f"cuda:{cards - 1}"]) if cards else ["cpu"]
    for device, dtype in product(devices, ("bfloat16", "float16", "float32")):
        for verdict in try_kernels(KERNELS, Problem(device, dtype, **options)):
            outcome = f"refused: {verdict.reason}" if verdict.reason else f"{verdict.ms:.3g} ms"
            print(f"{device:7} {dtype:9} {verdict.kernel:15} {outcome}")


if __name__ == "__main__":
    main()
