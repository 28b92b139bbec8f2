"""Tries every attention kernel on this machine and names the fastest correct one.

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
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch

from attention import (KERNELS, PackedLayout, SDPA, TORCH, attend, missing_feature, plain_attention,
                       version_numbers)
from errors import did_you_mean

WANTED = {   # LLaMA-Factory's key flash_attn -> the kernels that may serve it
    "auto": KERNELS,
    "sdpa": ("torch-varlen", *SDPA),
    "fa2": ("flash-attn",),
    "disabled": ("plain",),
}
HALF_ONLY = ("flash-attn", "torch-varlen", "sdpa-flash", "sdpa-cudnn")          # on a GPU
NO_MASK = ("torch-varlen", "sdpa-flash", "sdpa-cudnn")                          # on a GPU
GPU_ONLY = ("flash-attn", "torch-varlen", "sdpa-cudnn", "sdpa-efficient")
CHECKED = (1, 7, 62, 128, 129, 520, 1)     # segments round the tile sizes of kernels (64, 128), ends of length 1
TIMED = (1024, 512, 257, 130, 62, 62, 1)   # a packed row of 2048 tokens
TIMED_ON_CPU = (128, 62, 33, 1)


@dataclass(frozen=True)
class Problem:
    """What a model will ask of a kernel. Plain values only: it travels to a child process as JSON."""
    device: str
    dtype: str
    head_dim: int
    num_heads: int
    num_kv_heads: int
    training: bool = True          # gradients are needed; else a prompt, further prompts, single tokens
    window: int | None = None      # tokens; this and chunk may hold for some layers of the model only
    chunk: int | None = None       # tokens
    softcap: float | None = None
    alibi: bool = False            # whether `attend` will be given slopes
    scale: float | None = None     # None: head_dim ** -0.5

    @property
    def on_gpu(self):
        return self.device.startswith("cuda")

    def options(self, heads, device):
        """What `attend` and `plain` are asked alike. Slopes lie between 1 and 2 ** -8, as in models with ALiBi."""
        slopes = 2.0 ** -torch.linspace(0.5, 8, heads, device=device) if self.alibi else None
        scale = self.head_dim ** -0.5 if self.scale is None else self.scale
        return {"scale": scale, "window": self.window, "softcap": self.softcap, "slopes": slopes}


@dataclass
class Verdict:
    """One kernel tried: `ms` for one layer (forward, and backward when training), or the reason why it is refused."""
    kernel: str
    ms: float | None = None
    reason: str | None = None
    harmless: bool = True   # False: refused after something ran, so this process should try no further kernel


@dataclass
class Choice:
    """The kernel to give to `attend`; lines for the report, ms of each correct kernel, reason of each refused one."""
    kernel: str
    lines: list[str]
    timings: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def pick_kernel(flash_attn="auto", *, device, dtype, **asked):
    """The fastest kernel that is correct here for these shapes -> Choice. Takes seconds, once per process and shape.

    flash_attn: auto (all), sdpa (torch's own), fa2 (flash-attn), disabled (the plain twin). asked: the other fields of
    `Problem`; with a window or a chunk the kernel is also right without. When nothing that was asked for works, the
    others are tried and a line says so. On a GPU the kernels run in child processes, so that one that crashes or hangs
    costs a reason, not the run. Raises ValueError for another value of flash_attn, RuntimeError when not even the plain
    twin is correct.
    """
    if flash_attn not in WANTED:
        hint = did_you_mean(str(flash_attn), WANTED)
        raise ValueError(f"flash_attn: {flash_attn!r} is not known{hint}; choose one of {', '.join(WANTED)}")
    problem = Problem(str(device), str(dtype).removeprefix("torch."), **asked)
    if flash_attn == "disabled":
        return Choice("plain", ["attention: plain (flash_attn: disabled)"])
    lines = posing_card()
    verdicts = try_kernels(WANTED[flash_attn], problem)
    if all(verdict.reason for verdict in verdicts):
        reasons = ", ".join(in_words({verdict.kernel: verdict.reason for verdict in verdicts}))
        lines.append(f"attention: flash_attn: {flash_attn} cannot be had here: {reasons}. Trying the others instead.")
        verdicts += try_kernels(tuple(name for name in KERNELS if name not in WANTED[flash_attn]), problem)
    timings = {verdict.kernel: verdict.ms for verdict in verdicts if not verdict.reason}
    refused = {verdict.kernel: verdict.reason for verdict in verdicts if verdict.reason}
    if not timings:
        raise RuntimeError(f"no attention kernel gives correct results on {device}: {refused}")
    # Nearly equal timings count as equal, else noise would choose and a resumed run could get another kernel.
    near = (1.1 if problem.on_gpu else 2) * min(timings.values())
    kernel = next(name for name in KERNELS if name in timings and timings[name] <= near)
    others = [f"{name} (ok, {ms:.3g} ms)" for name, ms in timings.items() if name != kernel]
    lines += mask_note(kernel, problem)
    lines.append(f"attention: {kernel} ({timings[kernel]:.3g} ms). not used: {', '.join(others + in_words(refused))}")
    return Choice(kernel, lines, timings, refused)


def in_words(refused):
    """["name (reason)"] of refused kernels; torch's backends are one "sdpa-*" when all are refused for one reason."""
    reasons = {refused.get(name) for name in SDPA}
    if len(reasons) == 1 and None not in reasons:
        refused = {name: reason for name, reason in refused.items() if name not in SDPA} | {"sdpa-*": reasons.pop()}
    return [f"{name} ({reason})" for name, reason in refused.items()]


def mask_note(kernel, problem):
    """[a line] when another kernel than the chosen one may run where a mask is needed, else []."""
    cases = [f"sequences longer than the window of {problem.window} tokens"] if problem.window else []
    cases += [] if problem.training else ["prompts after a cached one"]
    if not cases or not problem.on_gpu or problem.alibi or kernel not in NO_MASK:
        return []
    return [f"attention: {kernel} may take no mask: {' and '.join(cases)} then run on sdpa-efficient or sdpa-math"]


@lru_cache(maxsize=None)
def try_kernels(kernels, problem):
    """A Verdict for each kernel, in order."""
    known = {name: Verdict(name, reason=reason) for name in kernels if (reason := known_refusal(name, problem))}
    rest = [name for name in kernels if name not in known]
    tried = try_in_children(rest, problem) if problem.on_gpu else [try_here(name, problem) for name in rest]
    verdicts = known | {verdict.kernel: verdict for verdict in tried}
    return tuple(verdicts[name] for name in kernels)


def known_refusal(kernel, problem):
    """Why a kernel need not be tried, or None; nothing is imported or run."""
    if missing := missing_feature(kernel, problem.softcap is not None, problem.alibi):
        return missing
    if kernel == "sdpa-flash" and problem.alibi and problem.on_gpu:
        return "takes no mask, and ALiBi needs one"
    if kernel in GPU_ONLY and not problem.on_gpu:
        return "needs a GPU"
    if kernel in HALF_ONLY and problem.on_gpu and problem.dtype == "float32":
        return "takes only float16 and bfloat16"
    if kernel == "flash-attn":
        version = version_of("flash-attn")
        if version is None:
            return "not installed"
        for needed, since, fault in ((True, "2.1", "aligns the causal mask top left"),
                                     (problem.window, "2.3", "has no window"), (problem.alibi, "2.4", "has no ALiBi"),
                                     (problem.softcap, "2.6", "has no softcap")):
            if needed and version_numbers(version) < version_numbers(since):
                return f"version {version} {fault}; {since} or newer is needed"
    if kernel == "torch-varlen" and TORCH < (2, 12):
        return f"not in torch {torch.__version__}; 2.12 or newer has it"
    if kernel == "sdpa-cudnn" and torch.version.hip:
        return "no cuDNN on ROCm"
    return None


def try_in_children(kernels, problem, limit=60):
    """Verdicts from fresh processes `python -m fast.attention_picker --probe JSON`, each given `limit` seconds.

    One child tries kernel after kernel and prints a JSON line for each. A kernel is blamed only when it was the first
    in its child: errors of a GPU surface late and can be the fault of the kernel before. So a child that dies, hangs or
    finds a fault later on is replaced by a fresh one, which begins with the kernel in question.
    """
    verdicts, left = [], list(kernels)
    while left:
        order = json.dumps({"kernels": left, "problem": asdict(problem)})
        child = subprocess.Popen([sys.executable, "-m", "fast.attention_picker", "--probe", order],
                                 cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = child.communicate(timeout=limit)
            last_words = (err.decode(errors="replace").strip().splitlines() or ["no message"])[-1][:160]
            ending = f"exit code {child.returncode}: {last_words}"
            if child.returncode < 0:
                ending = f"crashed: {signal.strsignal(-child.returncode)}"
        except subprocess.TimeoutExpired as late:
            child.kill()   # and no wait for its end: a process stuck in a GPU driver may never come to one
            out, ending = late.stdout or b"", f"no answer within {limit} s"
        heard = read_verdicts(out.decode(errors="replace"), left) or [Verdict(left[0], reason=ending)]
        verdicts += heard
        left = left[len(heard):]
    return verdicts


def read_verdicts(text, expected):
    """The verdicts that a child printed, as far as they are whole and in order; libraries may print between them."""
    heard = []
    for line in text.splitlines():
        try:
            verdict = Verdict(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if len(heard) < len(expected) and verdict.kernel == expected[len(heard)]:
            heard.append(verdict)
    return heard


def answer_probe(order):
    """The child's side: print a verdict a line, and end after the first kernel that may have done harm."""
    order = json.loads(order)
    for i, kernel in enumerate(order["kernels"]):
        verdict = try_here(kernel, Problem(**order["problem"]))
        if verdict.harmless or i == 0:
            print(json.dumps(asdict(verdict)), flush=True)
        if not verdict.harmless:
            return


def try_here(kernel, problem):
    """Check a kernel and time it, in this process -> Verdict. Whatever a foreign kernel throws becomes its reason."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            fault = find_fault(kernel, problem)
            if fault:
                return Verdict(kernel, reason=fault, harmless=False)
            return Verdict(kernel, ms=time_kernel(kernel, problem))
        except Exception as error:
            never_ran = isinstance(error, ImportError) or "No available kernel" in str(error)
            return Verdict(kernel, reason=explain(error, said), harmless=never_ran)


def explain(error, said):
    """One line about an exception. When torch has "No available kernel", the warnings before it hold the reason."""
    if "No available kernel" in str(error):
        told = [str(item.message).split(" (Triggered")[0].strip() for item in said]
        if any("not compiled with" in line for line in told):   # "1Torch was not …": the 1 is a slip of torch's
            return "torch built without it"
        told = [line for line in told if not re.search("not used because|runtime disabled", line)]
        return (told or ["torch has no such kernel for this card and shape"])[0][:160]
    line = (str(error).strip().splitlines() or ["no message"])[0][:160]
    return line if type(error) is RuntimeError else f"{type(error).__name__}: {line}"


def find_fault(kernel, problem):
    """None when a kernel is as exact as its dtype allows, else a sentence.

    The truth is the plain twin in float64. A kernel's error in each segment (root mean square) may be twice that of the
    plain twin with every step rounded to the problem's dtype, both on the CPU, where nothing is in doubt. To this comes
    one rounding step in one row (a segment's first query sees one key, its gradient cancels to zero, and the twin may
    hit that by luck) and 1e-6 (float32 summed in another order). Real faults are some tenfold larger.
    """
    dtype = getattr(torch, problem.dtype)
    for asked, (B, T, S, lengths) in product(variants(problem), cases(problem.training)):
        inputs = example(problem, B, T, S)
        truth = run(plain_attention, inputs, "cpu", torch.float64, lengths, asked)
        rounded = run(partial(plain_attention, wide_scores=False), inputs, "cpu", dtype, lengths, asked)
        found = run(partial(attend, kernel=kernel), inputs, problem.device, dtype, lengths, asked)
        for name, *results in zip(("output", "gradient of q", "gradient of k", "gradient of v"), truth, rounded, found):
            for right, near, x in zip(*(result.split(lengths or result.shape[2], dim=2) for result in results)):
                error, forgiven = ((y - right).square().mean().sqrt().item() for y in (x, near))
                allowed = 2 * forgiven + torch.finfo(dtype).eps * right.shape[2] ** -0.5 + 1e-6
                if not error <= allowed:   # so written, NaN is a fault too
                    where = f"a segment of {right.shape[2]}" if lengths else f"{T} queries, {S} keys"
                    where += f", window {asked.window}" if asked.window else ""
                    return f"wrong {name} ({where}): off by {error:.2g}, rounding explains {allowed:.2g}"
    if dtype is torch.float16:   # the q·k of Qwen2 passes 65504 before it is scaled, and fits afterwards
        q, k, *rest = example(problem, 1, 129, 129)
        found = run(partial(attend, kernel=kernel), [64 * q, 64 * k, *rest], problem.device, dtype, None, problem)
        if not all(x.isfinite().all() for x in found):
            return "overflows in float16 where q·k passes 65504"
    return None


def variants(problem):
    """The problems to check for one: without a window and, if some layers of the model have one, with a window.

    The window is made so short, and the cap so low, that in `cases` they matter. A chunk needs no check of a kernel's:
    `attend` turns it into segments and shorter calls, which no kernel can tell from others.
    """
    windows = [None] if problem.window is None else [None, min(problem.window, 42)]
    softcap = None if problem.softcap is None else min(problem.softcap, 2.0)
    return [replace(problem, window=window, softcap=softcap) for window in windows]


def cases(training):
    """(B, T, S, lengths of segments) to check: a packed row and a batch; for chat a prompt, a later one, one token."""
    if training:
        return [(1, sum(CHECKED), sum(CHECKED), CHECKED), (2, 129, 129, None)]
    return [(1, 129, 129, None), (1, 7, 129, None), (1, 1, 129, None)]


def example(problem, B, T, S):
    """q, k, v and the gradient of the output in the problem's dtype, with at most two key/value heads.

    Each key resembles the query of its own position: attention then looks at the near past, as in a real model, and a
    kernel that loses the last keys of a tile is far off instead of a little.
    """
    K = min(problem.num_kv_heads, 2)
    group = problem.num_heads // problem.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, heads, length, problem.head_dim, generator=generator)
                     for heads, length in ((K * group, T), (K, S), (K, S), (K * group, T)))
    k[:, :, S - T:] += 0.4 * q[:, ::group]
    return [x.to(getattr(torch, problem.dtype)) for x in (q, k, v, grad)]


def run(attention, inputs, device, dtype, lengths, problem):
    """[output], and when training the gradients of q, k and v, brought to float64 on the CPU."""
    q, k, v, grad = (x.to(device, dtype) for x in inputs)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)   # a view, as a model's v is
    leaves = [x.detach().requires_grad_(problem.training) for x in (q, k, v)]
    out = attention(*leaves, layout=lengths and PackedLayout(lengths, device), **problem.options(q.shape[1], device))
    # from a scalar: to compare the shapes of a tensor and its given gradient torch imports sympy, 0.4 s of every start
    results = [out, *torch.autograd.grad((out * grad).sum(), leaves)] if problem.training else [out]
    return [x.detach().to("cpu", torch.float64) for x in results]


def time_kernel(kernel, problem, warm=3, runs=7):
    """Milliseconds of one layer's attention: the least of several runs, since other work can only add to it.

    Each run has lengths of its own, as real micro-batches do: a kernel that plans anew for each shape pays for it here.
    """
    first, second, *rest = TIMED if problem.on_gpu else TIMED_ON_CPU
    S, H, K = first + second + sum(rest), problem.num_heads, problem.num_kv_heads
    options = {"device": problem.device, "dtype": getattr(torch, problem.dtype),
               "generator": torch.Generator(problem.device).manual_seed(0)}   # leaves the run's own stream alone
    q, k, v, grad = (torch.randn(1, heads, S, problem.head_dim, **options) for heads in (H, K, K, H))
    leaves = [x.requires_grad_(problem.training) for x in (q, k, v)]
    wait = partial(torch.cuda.synchronize, problem.device) if problem.on_gpu else lambda: None
    call, took = partial(attend, kernel=kernel, chunk=problem.chunk, **problem.options(H, problem.device)), []
    for i in range(warm + runs):
        layout = PackedLayout((first - i, second + i, *rest), problem.device)
        wait()
        start = time.perf_counter()
        if problem.training:
            torch.autograd.grad((call(*leaves, layout=layout) * grad).sum(), leaves)
        else:   # a prompt, then one token
            call(q[:, :, i:], k[:, :, i:], v[:, :, i:])
            call(q[:, :, :1], k[:, :, i:], v[:, :, i:])
        wait()
        took.append(time.perf_counter() - start)
    return 1000 * min(took[warm:])


SWITCHES = {   # environment variables that change which kernel runs, or on which card
    "CUDA_VISIBLE_DEVICES": "the cards this process may see",
    "HIP_VISIBLE_DEVICES": "the cards this process may see; the one to use on ROCm",
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1: sdpa-flash, sdpa-efficient on cards torch calls experimental",
    "TORCH_ROCM_FA_PREFER_CK": "1: CK kernels behind sdpa-flash, in torch builds that have them",
    "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE: flash-attn on ROCm by Triton instead of CK",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "on ROCm leave it unset: is_available() would fail as device_count() does",
    "HSA_OVERRIDE_GFX_VERSION": "the card poses as another one",
}


def posing_card():
    """[a warning] when the environment makes a ROCm card claim another architecture, else []."""
    gfx = os.environ.get("HSA_OVERRIDE_GFX_VERSION")
    if not (gfx and torch.version.hip):
        return []
    return [f"attention: HSA_OVERRIDE_GFX_VERSION={gfx} makes the card pose as another architecture: torch may start "
            "kernels that it cannot run. Unset it unless you know that you need it."]


def visible_cards():
    """(number of GPUs, [a warning] or []). The runtime is asked: torch.cuda.device_count() can be misled on ROCm."""
    cards = torch._C._cuda_getDeviceCount() if hasattr(torch._C, "_cuda_getDeviceCount") else 0
    counted = torch.cuda.device_count()
    if counted == cards:
        return cards, []
    return cards, [f"torch.cuda.device_count() says {counted}, the runtime says {cards}. Either pynvml is installed "
                   "without amdsmi (pip uninstall nvidia-ml-py pynvml), or amdsmi is installed and finds no card "
                   "(pip uninstall amdsmi)."]


def card_name(index):
    """Name, architecture and memory of a GPU: "NVIDIA H200 (sm_90, 140 GiB)", "K100_AI (gfx928, Hygon DCU, 64 GiB)"."""
    card = torch.cuda.get_device_properties(index)
    arch = f"sm_{card.major}{card.minor}"
    if torch.version.hip:
        arch = card.gcnArchName.split(":")[0]
        arch += ", Hygon DCU" if re.fullmatch("gfx(92.|93.|946)", arch) else ""
    return f"{card.name} ({arch}, {card.total_memory / 2**30:.0f} GiB)"


def version_of(package):
    """Version of an installed package, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine():
    """Lines: torch and flash-attn, each card, each environment variable in force that matters here, warnings."""
    builds = (("ROCm", torch.version.hip), ("CUDA", torch.version.cuda))
    runtime = next((f"{name} {version}" for name, version in builds if version), "CPU only")
    cards, warning = visible_cards()
    return [f"torch {torch.__version__} ({runtime}), Python {platform.python_version()}, "
            f"flash-attn {version_of('flash-attn') or 'not installed'}",
            *([f"cuda:{i}  {card_name(i)}" for i in range(cards)] or ["no GPU: the CPU is used"]),
            *(f"{name}={os.environ[name]}  ({effect})" for name, effect in SWITCHES.items() if name in os.environ),
            *warning, *posing_card()]


def main():
    """Print what this machine is and how each kernel fares on it, on the first card and on the last."""
    parser = argparse.ArgumentParser(description="The attention kernels of this machine.")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument("--num_kv_heads", type=int, default=2)
    parser.add_argument("--window", type=int, help="sliding window in tokens")
    parser.add_argument("--chunk", type=int, help="attention within chunks of so many tokens (Llama 4)")
    parser.add_argument("--softcap", type=float, help="scores become softcap * tanh(scores / softcap) (Gemma 2)")
    parser.add_argument("--alibi", action="store_true", help="ALiBi in the place of rotary positions (Baichuan 2 13B)")
    parser.add_argument("--scale", type=float, help="of the scores; default head_dim ** -0.5")
    parser.add_argument("--probe", metavar="JSON", help="for the picker: try the named kernels, print a JSON line each")
    options = vars(parser.parse_args())
    probe = options.pop("probe")
    if probe:
        return answer_probe(probe)
    print(*describe_machine(), sep="\n")
    print("\nms for one layer, forward and backward;", ", ".join(f"{name} {value}" for name, value in options.items()))
    cards = visible_cards()[0]
    for device in dict.fromkeys(["cuda:0", f"cuda:{cards - 1}"]) if cards else ["cpu"]:
        for dtype in ("bfloat16", "float16", "float32"):
            for verdict in try_kernels(KERNELS, Problem(device, dtype, **options)):
                outcome = f"refused: {verdict.reason}" if verdict.reason else f"{verdict.ms:.3g} ms"
                print(f"{device:7} {dtype:9} {verdict.kernel:15} {outcome}")


if __name__ == "__main__":
    main()
