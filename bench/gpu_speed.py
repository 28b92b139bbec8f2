"""Training and decoding at real shapes with random weights, on one card: tokens per second.

    python bench/gpu_speed.py train-8b                      Llama-3-8B, LoRA, bfloat16
    python bench/gpu_speed.py decode-64
    python bench/gpu_speed.py train-8b --device cpu --tiny  the same code on a tiny model

Weights are drawn on the device, so nothing is downloaded or written. A training step is train.py's
own: train_step, one wait for its loss and gradient norm, the optimizer; the rows of the next step
are sent while the device computes. Rows are random ids and every token is supervised: the head,
applied to supervised tokens only, then works for all of them. LoRA has rank 16 on all linear
layers, its weights and AdamW are float32. Nothing is recomputed in the backward pass.

TFLOP/s are model FLOPs (runtime/throughput.py: 4 for each frozen weight and token, attention within
the mask); the share is of the rate of large bfloat16 matmuls, measured right after the steps.

Requires: common.py, random_model.py.
Next: gpu.py, which runs each part in a process of its own; gpu_peer.py.
Sources: the shapes' config.json; NeMo AutoModel's setting of 2 rows of 4096 tokens.
"""
import itertools
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime.device import pick_device
import numpy as np
import torch
import torch.nn.functional as F

from bench.common import NotHere, report_figures, run_part, versions_of
from bench.random_model import random_model, raw_config
from checkpoint.load import assign, quantizable_weights, set_quantized
from checkpoint.read_config import model_config
from data import Example, collate_rows
from fast.attention_picker import card_name, pick_kernel
from fast.batch_decode import answer_all
from fast.decode import pick_step, prepare
from generate import generate
from lora import LoRAConfig, attach_lora, trainable
from losses import SFTObjective
from methods.quant import QuantFormat, quantize
from model import CausalLM, attention_needs
from optim import make_optimizer
from parallel import Gradients, Ranks, start_ranks
from runtime.kernels import PICKS, Kernels, pick_attention, use_fp8, use_kernels
from runtime.precision import Precision
from runtime.steps import Step
from runtime.throughput import matmul_parameters, matrix_rate, synchronize, training_flops
from settings.load_config import load_config
from train import train_step

WARM_UP = 3             # steps before the measured ones: compiling, choosing algorithms
LEAST_STEPS = 3
ROW = 4096
# tokens of a row of alpaca_en_demo as Llama 3 reads it: every 16th part of the rows, in order
SHORT = (25, 36, 42, 49, 56, 67, 89, 111, 135, 159, 191, 226, 273, 311, 353, 398, 587)
TINY = {"llama-3-8b": "tiny", "qwen2.5-7b": "tiny", "qwen2.5-0.5b": "tiny",
        "qwen3-30b-a3b": "tiny-moe"}
PROMPT = 128            # tokens
MOE_LAYERS = 12         # of 48: the ratio to the peer does not depend on their number


@dataclass(frozen=True)
class Case:
    """What is trained: a shape, the lengths of the rows of a pass, and how the base is stored."""
    shape: str
    rows: tuple
    base: str = "bf16"              # or fp8, nf4
    layers: int | None = None       # None: all of the shape
    experts: bool = False           # adapters on experts, too

    def raw_config(self, asked) -> dict:
        """config.json of the shape; a tiny one with --tiny."""
        if asked.tiny:
            return raw_config(TINY[self.shape], "bfloat16", vocab_size=2048)
        changes = {"num_hidden_layers": self.layers} if self.layers else {}
        return raw_config(self.shape, "bfloat16", **changes)

    def lengths(self, asked) -> list[int]:
        return [max(4, n // 64) for n in self.rows] if asked.tiny else list(self.rows)


CASES = {
    "train-8b": Case("llama-3-8b", (ROW,) * 2),
    "train-8b-fp8": Case("llama-3-8b", (ROW,) * 2, base="fp8"),
    "train-8b-4bit": Case("llama-3-8b", (ROW,) * 2, base="nf4"),
    "train-7b": Case("qwen2.5-7b", (ROW,) * 2),
    "train-0.5b": Case("qwen2.5-0.5b", (ROW,) * 4),
    "train-8b-short": Case("llama-3-8b", SHORT * 4),
    "train-moe": Case("qwen3-30b-a3b", (ROW,) * 2, layers=MOE_LAYERS, experts=True),
}


# ---- what a case trains --------------------------------------------------------------------------


def examples_of(lengths: list[int], vocab_size: int, seed: int) -> list[Example]:
    """Rows of random ids; each token but the first is predicted and carries loss."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(3, vocab_size, n, dtype=np.int32) for n in lengths]
    return [Example(row, row, [len(row)]) for row in rows]


def base_model(raw: dict, device, base: str = "bf16"):
    """The frozen random base in bfloat16; nf4: its linear layers in 4 bits, double quantized."""
    if base != "nf4":
        return random_model(raw, torch.bfloat16, device).requires_grad_(False)
    with torch.device("meta"):
        model = CausalLM(model_config(raw))
    generator = torch.Generator(device).manual_seed(1)
    quantized = set(quantizable_weights(model))
    for name, p in list(model.named_parameters()):          # one by one: 16 bits need not fit
        weight = torch.ones(p.shape, dtype=torch.bfloat16, device=device)
        if p.dim() > 1:
            weight.normal_(0.0, 0.02, generator=generator)
        if name in quantized:
            set_quantized(model, name, quantize(weight, QuantFormat("nf4")))
        else:
            assign(model, name, weight)
    return model


def kernels_for(config, model_config, device, kernel: str | None,
                dtype=torch.bfloat16) -> Kernels:
    """What train.py would compute with; kernel: of attention, where it is known already."""
    kernels = Kernels()
    for pick in PICKS:
        if kernel and pick is pick_attention:
            kernels.attention = kernel
        else:
            pick(kernels, config, model_config, device, dtype)
    return kernels


@dataclass
class Run:
    """A model with adapters and what a step of train.py needs; made by `start`."""
    model: torch.nn.Module
    kernels: Kernels
    gradients: Gradients
    optimizer: object
    precision: Precision
    ranks: Ranks
    device: torch.device

    def step(self, step: Step, following, over: bool = False) -> tuple[float, bool, Step]:
        """(the loss of a step, whether a rank says that time is over, the next step).

        The next one is made while the device computes.
        """
        objective = SFTObjective(matmul=self.kernels.matmul)
        loss, norm, metrics = train_step(self.model, objective, step, self.gradients,
                                         self.precision, 1.0)
        step = next(following)
        loss, norm, _, stops = self.ranks.sync(loss, norm, metrics, over)
        if not abs(loss) < 100 or norm != norm:
            raise ValueError(f"the loss is {loss} and the gradient norm {norm}")
        self.optimizer.step()
        return loss, stops > 0, step


def start(case: Case, asked, recompute: str = "none") -> Run:
    """Build a case's model, adapters, kernels and optimizer. recompute: of every block."""
    device = pick_device(asked.device == "cpu")
    ranks = start_ranks(device, 600)
    fp8 = ["base_precision=fp8"] if case.base == "fp8" else []
    config = load_config(["bf16=true", "learning_rate=1e-4", *fp8], "config")
    model = base_model(case.raw_config(asked), device, case.base)
    targets = ["all", "experts"] if case.experts else "all"
    attach_lora(model, LoRAConfig(16, 32, target_modules=targets), seed=1, device=device)
    try:
        kernels = kernels_for(config, model.config, device, asked.kernel)
    except ValueError as refusal:
        if case.base != "fp8":
            raise
        raise NotHere(str(refusal)) from None
    use_kernels(model.train(), kernels, [recompute] * len(model.model.layers))
    use_fp8(model, kernels)
    weights = trainable(model)
    return Run(model=model, kernels=kernels, gradients=Gradients(weights, ranks),
               optimizer=make_optimizer(weights, config, device),
               precision=Precision(torch.bfloat16, device, model, adapters_only=True),
               ranks=ranks, device=device)


def steps_of(run: Run, lengths: list[int]):
    """Yield steps of one pass each, without end; the ids differ in every step and on every rank."""
    for number in itertools.count(1):
        rows = examples_of(lengths, run.model.config.vocab_size,
                           number * run.ranks.world + run.ranks.rank)
        batch = collate_rows([rows])
        yield Step(number=number, epoch=0.0, rows=[], batches=[batch.to(run.device)],
                   device=run.device, num_items=batch.num_items * run.ranks.world,
                   tokens=sum(lengths) * run.ranks.world, flops=0.0)


# ---- measuring -----------------------------------------------------------------------------------


def timed(one_step, device, seconds: float) -> dict:
    """Call one_step(over) -> (loss, stop) WARM_UP times, then for `seconds`; figures of the latter.

    over: the seconds have passed. stop: so they have on some rank, and all must end with this step.
    """
    losses = []
    begun = time.perf_counter()
    for _ in range(WARM_UP):
        losses.append(one_step(False)[0])
        if len(losses) == 1:
            synchronize(device)
            first = time.perf_counter() - begun
    synchronize(device)
    start_time = time.perf_counter()
    took, last, stop = [], start_time, False
    while not stop:
        loss, stop = one_step(last - start_time >= seconds and len(took) >= LEAST_STEPS)
        losses.append(loss)
        now = time.perf_counter()
        took.append(now - last)
        last = now
    synchronize(device)
    return {"steps": len(took), "seconds_measured": time.perf_counter() - start_time,
            "median_step_seconds": statistics.median(took), "first_step_seconds": first,
            "first_loss": losses[0], "last_loss": losses[-1]}


def speed_figures(found: dict, flops: float, lengths: list[int], device,
                  matmul=F.linear) -> dict:
    """Tokens and model TFLOP/s, the card's own rate now, and the peak of its memory.

    found: of `timed`. flops: of a step. Both of one card. matmul: the products of the step.
    """
    synchronize(device)
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    per_second = found["steps"] / found["seconds_measured"]
    seconds = 1 if device.type == "cuda" else 0.1
    rate = matrix_rate(device, torch.bfloat16, matmul, seconds)
    return found | {
        "tokens_per_second": per_second * sum(lengths), "tflops": per_second * flops / 1e12,
        "matrix_tflops": rate / 1e12, "share_of_matrix_rate": per_second * flops / rate,
        "tokens_a_pass": sum(lengths), "longest_row": max(lengths)}


def train(asked, case: Case) -> dict:
    """A part: train a case for some seconds."""
    run = start(case, asked)
    lengths = case.lengths(asked)
    flops = training_flops(run.model.config, *matmul_parameters(run.model), lengths)
    steps = steps_of(run, lengths)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ahead = [next(steps)]

    def one_step(over: bool) -> tuple[float, bool]:
        loss, stop, ahead[0] = run.step(ahead[0], steps, over)
        return loss, stop

    found = speed_figures(timed(one_step, run.device, asked.seconds), flops, lengths, run.device,
                          run.kernels.matmul)
    layers = run.model.config.num_hidden_layers
    return found | {
        "says": f"{describe(lengths)} a pass, {layers} layers, base {case.base}, attention "
                f"{run.kernels.attention}",
        "kernel": run.kernels.attention, "lines": run.kernels.lines,
        "trained": sum(p.numel() for p in run.gradients.weights)}


def describe(lengths: list[int]) -> str:
    """2 x 4096 tokens, or the number of rows of several lengths."""
    if len(set(lengths)) == 1:
        return f"{len(lengths)} x {lengths[0]} tokens"
    return f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all"


# ---- decoding ------------------------------------------------------------------------------------


def model_to_decode(asked, rows: int):
    """(a random Llama-3-8B with fused matrices and its attention kernel, lines on the choices)."""
    device = pick_device(asked.device == "cpu")
    model = base_model(CASES["train-8b"].raw_config(asked), device).eval()
    lines = prepare(model, rows=rows)
    choice = pick_kernel("auto", device=device, dtype=torch.bfloat16, training=False,
                         **attention_needs(model.config))
    model.kernel = choice.kernel
    return model, [*lines, *choice.lines]


def prompts_of(model, count: int, tokens: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return generator.integers(3, model.config.vocab_size, (count, tokens)).tolist()


def decode_one(asked) -> dict:
    """A part: greedy decoding of one sequence; the median time of a token after the first."""
    model, lines = model_to_decode(asked, rows=1)
    cache, step, line = pick_step(model)
    prompt, = prompts_of(model, 1, 8 if asked.tiny else PROMPT)
    new = 8 if asked.tiny else 256
    for _ in range(2):                              # in the first, graphs are captured
        cache.crop(0)
        times = [time.perf_counter()]
        for _ in generate(model, prompt, cache, max_new_tokens=new, step=step):
            times.append(time.perf_counter())
    took = [after - before for before, after in zip(times[1:], times[2:])]
    return {"says": f"{new} tokens after a prompt of {len(prompt)}; {' '.join(line.split())}",
            "tokens_per_second": 1 / statistics.median(took),
            "mean_tokens_per_second": len(took) / sum(took), "prompt_seconds": times[1] - times[0],
            "lines": [*lines, line]} | memory_in_use(model)


def memory_in_use(model) -> dict:
    if model.lm_head.weight.device.type != "cuda":
        return {}
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def decode_many(asked) -> dict:
    """A part: 64 answers at once, as eval.py makes them; prompts are not counted."""
    rows = 4 if asked.tiny else 64
    model, lines = model_to_decode(asked, rows)
    prompts = list(enumerate(prompts_of(model, rows, 8 if asked.tiny else PROMPT)))
    short, long = (3, 9) if asked.tiny else (32, 160)
    device = model.lm_head.weight.device

    def seconds_for(new: int) -> float:
        synchronize(device)
        begun = time.perf_counter()
        answers = list(answer_all(model, prompts, rows, limit=lambda length: new))
        assert [len(tokens) for _, tokens in answers] == [new] * rows
        return time.perf_counter() - begun

    seconds_for(short)                              # the first call chooses algorithms
    took = seconds_for(long) - seconds_for(short)
    return {"says": f"{rows} answers at once, tokens {short} to {long}",
            "tokens_per_second": rows * (long - short) / took, "lines": lines} \
        | memory_in_use(model)


# ---- the card ------------------------------------------------------------------------------------


def card(asked) -> dict:
    """A part: what this machine is, and the rate of its large bfloat16 matmuls."""
    device = pick_device(asked.device == "cpu")
    if asked.device == "cuda" and device.type != "cuda":
        raise RuntimeError(f"torch {torch.__version__} finds no CUDA or ROCm card; try --device "
                           "cpu --tiny, or python -m fast.attention_picker")
    packages = ("torch", "triton", "flash_attn", "transformers", "peft")
    found = {"name": "", "torch": torch.__version__, "cuda": torch.version.cuda,
             "hip": torch.version.hip, "driver": driver_version(),
             "versions": versions_of(sys.executable, *packages)}
    if device.type == "cuda":
        found |= {"name": torch.cuda.get_device_name(), "described": card_name(0),
                  "cards": torch.cuda.device_count(),
                  "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
    report_figures("partial", **found)              # known even if the card cannot multiply
    seconds = 2 if device.type == "cuda" else 0.1
    found["matrix_tflops"] = matrix_rate(device, torch.bfloat16, seconds=seconds) / 1e12
    return found | {"says": f"{found.get('described', 'CPU')}, torch {torch.__version__}, driver "
                            f"{found['driver']}; bfloat16 matmuls of large matrices run at "
                            f"{found['matrix_tflops']:.4g} TFLOP/s"}


def driver_version() -> str:
    """Of the kernel module for NVIDIA or AMD cards, else of nvidia-smi."""
    for path, pattern in (("/proc/driver/nvidia/version", r"Module.*?\s(\d+\.[\d.]+)"),
                          ("/sys/module/amdgpu/version", r"(\S+)"),
                          ("/sys/module/hydcu/version", r"(\S+)")):
        text = Path(path).read_text() if Path(path).is_file() else ""
        if found := re.search(pattern, text):
            return found[1]
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(question, capture_output=True, text=True, timeout=20)
        return (asked.stdout.splitlines() or ["unknown"])[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


PARTS = {
    "card": card,
    "decode-1": decode_one,
    "decode-64": decode_many,
    **{name: partial(train, case=case) for name, case in CASES.items()},
}

if __name__ == "__main__":
    run_part(PARTS)
