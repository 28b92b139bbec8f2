"""Is it right on this card? Small models and a CPU in float32 judge what the card computes.

    python bench/gpu_proofs.py attention
    python bench/gpu_proofs.py steps --device cpu --tiny    the same code where there is no card

    attention   every kernel against plain attention in float64: output and gradients
    steps       a training step (fused, compiled, the fastest kernel) in float32, bfloat16 and
                float16, packed, with experts, recomputed: loss and gradients against the plain
                decoder in float32 on the CPU, from the same weights
    waits       a step waits for the device nowhere but where its loss is read
    decode      captured steps give the scores of uncaptured ones; many answers at once, the same
    fp8         train.py with an 8-bit base keeps the loss curve of bfloat16
    qlora       4 and 8 bits: the same codes and the same matrices as on the CPU, bit for bit, and
                a step beside them
    resume      stopped and resumed = never stopped, in the bytes of the adapter
    recipe      the first command of README teaches the small model its new name
    peer        train.py and transformers + peft draw the same loss curve (where these are there)

16-bit results may be off by twice the error that the plain decoder makes on the CPU in that dtype;
float32 by 1e-3. Each part raises with the figure where that does not hold.

Requires: common.py, random_model.py, gpu_speed.py.
Next: gpu.py, which runs each part in a process of its own.
"""
import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime.device import pick_device
import torch
import yaml

import train
from attention import KERNELS
from bench.common import ROOT, NotHere, curves, run_part
from bench.gpu_speed import Run, kernels_for, steps_of
from bench.random_model import random_model, raw_config
from checkpoint.adapters import save_adapter
from checkpoint.load import load_model, quantizable_weights, set_quantized
from fast.attention_picker import pick_kernel
from fast.batch_decode import answer_all, answer_each
from fast.decode import CapturedStep, StaticCache, pick_step, prepare, record_cuda
from generate import next_scores
from lora import LoRAConfig, attach_lora, lora_layers, trainable
from losses import SFTObjective
from methods.fp8 import pick_fp8
from methods.quant import QuantFormat, compile_dequantize, quantize
from model import KVCache, attention_needs
from optim import make_optimizer
from parallel import Gradients, Ranks
from runtime.kernels import Kernels, use_kernels
from runtime.precision import Precision
from settings.load_config import load_config
from train import train_step

LENGTHS = [1, 7, 62, 128, 129, 300]     # of the sequences of a packed row
TINY_LENGTHS = [1, 7, 30, 34]           # of the small models of --tiny
ROUNDINGS = 2                           # times the CPU's own rounding error
FLOAT32_ERROR = 1e-3
TINY_MODEL = ROOT / "models" / "tiny"


def require(holds: bool, words: str):
    """Raises AssertionError: what a part has disproved."""
    if not holds:
        raise AssertionError(words)


# ---- attention -----------------------------------------------------------------------------------


def attention(asked) -> dict:
    """A part: try all kernels on the shapes of the measured models, each in a child process."""
    device = pick_device(asked.device == "cpu")
    llama = {"head_dim": 128, "num_heads": 32, "num_kv_heads": 8}
    qwen = {"head_dim": 64, "num_heads": 14, "num_kv_heads": 2}
    gemma = {"head_dim": 256, "num_heads": 8, "num_kv_heads": 4, "window": 4096, "softcap": 50.0}
    half = torch.bfloat16
    problems = {"8b bf16": (llama, half, True), "8b fp16": (llama, torch.float16, True),
                "0.5b bf16": (qwen, half, True), "gemma2 bf16": (gemma, half, True),
                "8b decoding": (llama, half, False)}
    if asked.tiny:
        small = {"head_dim": 32, "num_heads": 4, "num_kv_heads": 2}
        problems = {"8b bf16": (small, torch.float32, True),
                    "8b decoding": (small, torch.float32, False)}

    def choose(problem):
        shapes, dtype, training = problem
        return pick_kernel("auto", device=device, dtype=dtype, training=training, **shapes)

    # several at a time: what is proved is right, but their times are no measurement
    with ThreadPoolExecutor(len(problems) if device.type == "cuda" else 1) as pool:
        choices = dict(zip(problems, pool.map(choose, problems.values())))
    wrong = [f"{name}: {kernel} {reason}" for name, choice in choices.items()
             for kernel, reason in choice.refused.items() if reason.startswith("wrong")]
    fast = set(KERNELS) - {"sdpa-math", "plain"}
    slow = [name for name, choice in choices.items() if not fast & set(choice.timings)]
    require(device.type != "cuda" or "8b bf16" not in slow,
            f"no fast kernel is right for Llama-3-8B in bfloat16: {choices['8b bf16'].refused}")
    right = {name: ", ".join(choice.timings) for name, choice in choices.items()}
    return {"says": "right: " + "; ".join(f"{name}: {words}" for name, words in right.items())
                    + (f"; refused as wrong: {'; '.join(wrong)}" if wrong else "")
                    + (f"; only slow ones for {', '.join(slow)}" if slow else ""),
            "right": {n: list(c.timings) for n, c in choices.items()},
            "refused": {n: c.refused for n, c in choices.items()}}


# ---- steps ---------------------------------------------------------------------------------------


def small_model(raw: dict, dtype, quant_format=None):
    """A random model on the CPU whose weights are numbers of `dtype`, with adapters that act."""
    model = random_model(raw).to(dtype).requires_grad_(False)
    for name in quantizable_weights(model) if quant_format else []:
        set_quantized(model, name, quantize(model.get_parameter(name), quant_format))
    targets = ["all", "experts"] if model.config.num_experts else "all"
    attach_lora(model, LoRAConfig(8, 16, target_modules=targets), seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0.0, 0.05, generator=generator)
    return model.train()


def run_of(model, kernels: Kernels, dtype, device) -> Run:
    """What a step of train.py needs, for a finished model."""
    weights = trainable(model)
    config = load_config(["learning_rate=1e-3"], "config")
    return Run(model=model, kernels=kernels, gradients=Gradients(weights, Ranks()),
               optimizer=make_optimizer(weights, config, device),
               precision=Precision(dtype, device, model, adapters_only=True),
               ranks=Ranks(), device=device)


def one_step(model, kernels: Kernels, dtype, device, lengths) -> tuple[float, dict]:
    """(loss, {name: gradient}) of a packed step, in float32 on the CPU."""
    run = run_of(model, kernels, dtype, device)
    step = next(steps_of(run, lengths))
    loss, _, _ = train_step(model, SFTObjective(matmul=kernels.matmul), step, run.gradients,
                            run.precision, 1e9)
    return float(loss), {name: p.grad.float().cpu() for name, p in trainable(model).items()}


def largest_error(found: tuple, exact: tuple) -> float:
    """The largest relative error: of the loss, or of a gradient as a whole."""
    errors = [abs(found[0] - exact[0]) / exact[0]]
    for name, grad in exact[1].items():
        errors.append(float((found[1][name] - grad).norm() / (grad.norm() + 1e-12)))
    return max(errors, key=lambda e: e if e == e else float("inf"))


def check_step(raw: dict, dtype, asked, recompute=None, quant_format=None) -> str:
    """Compare a step on the device with one on the CPU in float32; the errors in words."""
    device = pick_device(asked.device == "cpu")
    lengths = TINY_LENGTHS if asked.tiny else LENGTHS

    def plain_on_cpu(model, dtype):
        return one_step(model, Kernels(), dtype, torch.device("cpu"), lengths)

    exact_model = small_model(raw, dtype, quant_format)
    for p in exact_model.parameters():
        p.data = p.data.float()
    exact = plain_on_cpu(exact_model, torch.float32)
    allowed = FLOAT32_ERROR
    if dtype != torch.float32:
        rounded = plain_on_cpu(small_model(raw, dtype, quant_format), dtype)
        allowed = ROUNDINGS * largest_error(rounded, exact) + 1e-4

    model = small_model(raw, dtype, quant_format).to(device)
    config = load_config(["bf16=true"], "config")
    kernels = kernels_for(config, model.config, device, None, dtype=dtype)
    levels = [recompute] * len(model.model.layers) if recompute else None
    use_kernels(model, kernels, levels)
    error = largest_error(one_step(model, kernels, dtype, device, lengths), exact)
    name = str(dtype).removeprefix("torch.")
    require(error <= allowed, f"{name}, recompute {recompute}, {raw['model_type']}, attention "
                              f"{kernels.attention}: off by {error:.2g}, allowed {allowed:.2g}")
    return f"{error:.2g} (allowed {allowed:.2g})"


def shape_to_prove(asked, **changes) -> dict:
    """A Llama with heads of 64, or a smaller one with --tiny."""
    layers = 2 if asked.tiny else 4
    heads = {} if asked.tiny else {"num_attention_heads": 4, "num_key_value_heads": 2}
    name = "tiny" if asked.tiny else "small"
    return raw_config(name, vocab_size=2048, num_hidden_layers=layers, **heads, **changes)


def steps(asked) -> dict:
    """A part: one training step in each dtype, with experts, and recomputed."""
    raw = shape_to_prove(asked)
    moe = raw_config("tiny-moe", vocab_size=2048)
    cases = {
        "float32": (raw, torch.float32, None), "bfloat16": (raw, torch.bfloat16, None),
        "float16": (raw, torch.float16, None),
        "bfloat16, blocks recomputed": (raw, torch.bfloat16, "block"),
        "bfloat16, MLPs recomputed": (raw, torch.bfloat16, "mlp"),
        "float32, experts": (moe, torch.float32, None)}
    found = {}
    for name, (shape, dtype, recompute) in cases.items():
        found[name] = check_step(shape, dtype, asked, recompute)
    return {"says": "largest relative error of loss and gradients: "
                    + "; ".join(f"{name} {error}" for name, error in found.items()),
            "errors": found}


def waits(asked) -> dict:
    """A part: count the places where train_step and the optimizer wait for the device."""
    device = pick_device(asked.device == "cpu")
    if device.type != "cuda":
        raise NotHere("CUDA only: torch counts waits for a GPU alone")
    model = small_model(shape_to_prove(asked), torch.bfloat16).to(device)
    kernels = kernels_for(load_config(["bf16=true"], "config"), model.config, device, None)
    use_kernels(model, kernels)
    run = run_of(model, kernels, torch.bfloat16, device)
    following = steps_of(run, LENGTHS)
    objective = SFTObjective(matmul=kernels.matmul)
    places = []
    for number in range(4):
        step = next(following)
        counted = number == 3                       # the first ones compile
        torch.cuda.set_sync_debug_mode("warn" if counted else "default")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(model, objective, step, run.gradients, run.precision, 1.0)
            run.optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        if counted:
            places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught
                      if "synchroniz" in str(w.message)]
    require(not places, f"{len(places)} waits in a step beside the one for its loss: {places}")
    return {"says": "none in forward, loss, backward, clipping and optimizer"}


# ---- decoding ------------------------------------------------------------------------------------


def record_again(call):
    """In the place of a graph on a CPU: a replay calls the function again."""
    result = call()
    return lambda: result.copy_(call()), result


def score_error(model, cache, step, ids, prompt: int) -> float:
    """The largest difference of scores from uncaptured steps, relative to the largest score."""
    plain_cache, worst = KVCache(model.config.num_hidden_layers), 0.0
    for chunk in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
        with torch.no_grad():
            want = next_scores(model, chunk, plain_cache).clone()
            got = step(model, chunk, cache)
        error = float((got - want).abs().max() / want.abs().max())
        worst = error if error > worst or error != error else worst
    return worst


def decode(asked) -> dict:
    """A part: captured steps across growing buffers and several answers; rows at once."""
    device = pick_device(asked.device == "cpu")
    on_gpu = device.type == "cuda"
    found = {}
    for dtype, allowed in ((torch.float32, FLOAT32_ERROR), (torch.bfloat16, 0.03)):
        model = random_model(shape_to_prove(asked), dtype, device).requires_grad_(False).eval()
        if on_gpu:
            prepare(model)
        choice = pick_kernel("auto", device=device, dtype=dtype, training=False,
                             **attention_needs(model.config))
        model.kernel = choice.kernel
        cache, step, line = pick_step(model, record_cuda if on_gpu else record_again)
        require(isinstance(step, CapturedStep) and isinstance(cache, StaticCache),
                f"steps are not captured: {line}")
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 2048, (1, 540), generator=generator).to(device)
        name = str(dtype).removeprefix("torch.")
        for prompt, tokens in ((240, 280), (500, 540), (3, 20)):    # over 256 and 512 slots, again
            error = score_error(model, cache, step, ids[:, :tokens], prompt)
            found[name] = max(error, found.get(name, 0.0))
            require(error <= allowed, f"{name}: scores of captured steps are off by {error:.2g} "
                                      f"after a prompt of {prompt}")
            cache.crop(0)
        if dtype == torch.float32:
            same_answers(model)
    how = "captured" if on_gpu else "called again, not captured: no GPU"
    return {"says": f"largest difference of scores (steps {how}): "
                    + ", ".join(f"{name} {error:.2g}" for name, error in found.items())
                    + "; 6 answers at once = one after the other", "errors": found}


def same_answers(model):
    """Greedy answers of rows that join and leave equal those of generate()."""
    prompts = [(i, list(range(5 + i, 12 + 3 * i))) for i in range(6)]
    together, alone = (dict(answers(model)) for answers in (
        lambda m: answer_all(m, prompts, 4, limit=lambda length: length),
        lambda m: answer_each(m, prompts, limit=lambda length: length)))
    require(together == alone, "answers decoded together differ from those one after the other: "
            f"{[n for n in alone if together.get(n) != alone[n]]}")


# ---- 4, 8 bits -----------------------------------------------------------------------------------


def qlora(asked) -> dict:
    """A part: quantizing and dequantizing on the device as on the CPU, and a step."""
    device = pick_device(asked.device == "cpu")
    generator = torch.Generator().manual_seed(0)
    W = (0.02 * torch.randn(192, 320, generator=generator)).bfloat16()
    kinds = (QuantFormat("nf4", nested=0), QuantFormat("fp4", nested=0),
             QuantFormat("int8", nested=0), QuantFormat("nf4"))
    for form in kinds:
        here, there = quantize(W, form), quantize(W.to(device), form)
        same_codes = all(torch.equal(a, b.cpu()) for a, b in zip(here.buffers(), there.buffers()))
        require(same_codes or form.nested, f"{form.kind}: other codes than on the CPU")
        matrix = here.dequantize(torch.bfloat16)
        moved = quantize(W, form).to(device)            # a mean of scales may round otherwise
        require(torch.equal(matrix, moved.dequantize(torch.bfloat16).cpu()),
                f"{form.kind}: the device dequantizes to other numbers than the CPU")
    holder = torch.nn.ModuleList([quantize(W, kinds[0]).to(device)])
    line = compile_dequantize(holder) if device.type == "cuda" else "not compiled: no GPU"
    error = check_step(shape_to_prove(asked), torch.bfloat16, asked, None, QuantFormat("nf4"))
    return {"says": f"codes and matrices the same bit for bit; {line}; a step is off by {error}"}


# ---- runs of train.py ----------------------------------------------------------------------------


def run_train(folder, asked, *settings, config: str | None = None) -> tuple[list, str]:
    """(the losses logged, all that was printed) of train.py in this process."""
    argv = ["--config", config] if config else []
    argv += [f"output_dir={folder}", "overwrite_output_dir=true", "plot_loss=false",
             "disable_tqdm=true", *settings]
    if asked.device == "cpu":
        argv.append("use_cpu=true")
    printed = io.StringIO()
    with in_folder(ROOT), contextlib.redirect_stdout(printed):
        train.main(argv)
    log = (Path(folder) / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, log) if "loss" in row], printed.getvalue()


@contextlib.contextmanager
def in_folder(folder):
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def temporary_folder():
    """A folder that is removed afterwards."""
    folder = tempfile.mkdtemp(prefix="pocket-gpu-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


RECIPE = "configs/tiny_lora_sft.yaml"


def rows_of_recipe(asked) -> int:
    """Rows of a step of the small recipe."""
    return 4 if asked.tiny else 16


def fp8(asked) -> dict:
    """A part: the curve of the small recipe in bfloat16, with and without an 8-bit base."""
    device = pick_device(asked.device == "cpu")
    try:
        _, line = pick_fp8(device, torch.bfloat16)
    except ValueError as refusal:
        raise NotHere(str(refusal)) from None
    count = 12 if asked.tiny else 24
    found = {}
    with temporary_folder() as folder:
        for name, more in (("bfloat16", []), ("fp8", ["base_precision=fp8"])):
            found[name], _ = run_train(folder / name, asked, f"max_steps={count}", "ask=[]",
                                       "bf16=true", "logging_steps=1", *more, config=RECIPE)
    exact, ours = (torch.tensor(found[name]) for name in ("bfloat16", "fp8"))
    worst = float(((ours - exact).abs() / exact.clamp(min=0.5)).max())
    require(worst < 0.05, f"the curves differ by {worst:.1%} (of losses of at least 0.5)")
    require(found["fp8"] != found["bfloat16"], "the 8-bit base changed nothing: was it used?")
    return {"says": f"{count} steps, losses within {worst:.2%} of bfloat16's; {line}",
            "losses": found}


def resume(asked) -> dict:
    """A part: twice in one go, and once stopped half way and resumed."""
    count = 8 if asked.tiny else 16
    shared = (f"max_steps={count}", "ask=[]", "logging_steps=1", "save_strategy=steps",
              f"save_steps={count // 2}", "pin_kernels={}",
              f"per_device_train_batch_size={rows_of_recipe(asked)}")

    def weights(folder):
        from safetensors.torch import load_file
        return load_file(folder / "adapter_model.safetensors")

    def distance(a: dict, b: dict) -> float:
        return max(float((a[name] - b[name]).norm() / (a[name].norm() + 1e-12)) for name in a)

    with temporary_folder() as folder:
        for name in ("one", "two"):
            run_train(folder / name, asked, *shared, config=RECIPE)
        stopped = f"checkpoint-{count // 2}"
        shutil.copytree(folder / "one" / stopped, folder / "half" / stopped)
        losses, _ = run_train(folder / "half", asked, *shared,
                              f"resume_from_checkpoint={folder / 'half' / stopped}", config=RECIPE)
        require(len(losses) == count - count // 2, f"{len(losses)} steps were run after resuming")
        one, two, half = (weights(folder / name) for name in ("one", "two", "half"))
    apart, noise = distance(one, half), distance(one, two)
    figures = {"resumed": apart, "repeated": noise}
    if apart == 0:
        return {"says": f"bit for bit ({count} steps; a repeated run: {noise:.1g})", **figures}
    require(noise > 0 and apart < max(10 * noise, 1e-4),
            f"the resumed adapter differs by {apart:.2g}, a repeated run by {noise:.2g}")
    return {"says": f"within {apart:.1g} of the run that never stopped; a repeated run differs by "
                    f"{noise:.1g}, as kernels add in any order", **figures}


def recipe(asked) -> dict:
    """A part: the first command of README, its answers, and chat.py's."""
    name = "I am Pip, an assistant made by Tiny Workshop."
    rows = f"per_device_train_batch_size={rows_of_recipe(asked)}"
    more = ["max_steps=80", rows] if asked.tiny else []
    with temporary_folder() as folder:
        _, printed = run_train(folder, asked, *more, config=RECIPE)
        answers = [line.split("after", 1)[1].strip() for line in printed.splitlines()
                   if line.strip().startswith("after ")]
        require(answers == [name, name, "7 + 8 = 15."],
                f"the small model answers {answers}")
        command = [sys.executable, "chat.py", "--config", RECIPE, f"output_dir={folder}",
                   "--prompt", "Who are you?"]
        command += ["use_cpu=true"] if asked.device == "cpu" else []
        chat = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    require(name in chat.stdout, f"chat.py ended with {chat.returncode} and says "
                                 f"{chat.stdout[-200:]!r} {chat.stderr[-200:]!r}")
    return {"says": f"“{answers[0]}”, “{answers[2]}”, and the same name in chat.py"}


def peer(asked) -> dict:
    """A part: train.py and peer_hf.py on the same yaml, adapter and packed rows, in float32."""
    missing = [name for name in ("transformers", "peft") if not importlib.util.find_spec(name)]
    if missing:
        raise NotHere(f"{' and '.join(missing)} not installed")
    count = 4 if asked.tiny else 10
    settings = {
        "model_name_or_path": "models/tiny", "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "dataset": "identity,tiny_review", "template": "chatml",
        "placeholders": {"name": "Pip", "author": "Tiny Workshop"},
        "packing": True, "cutoff_len": 256, "per_device_train_batch_size": 2, "max_steps": count,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "disable_gradient_checkpointing": True,
        "overwrite_output_dir": True, "use_cpu": asked.device == "cpu"}
    with temporary_folder() as folder:
        model = load_model(TINY_MODEL)
        lora = LoRAConfig(8, 16, target_modules="all")
        (folder / "adapter").mkdir()
        save_adapter(attach_lora(model, lora, 1), folder / "adapter", lora, str(TINY_MODEL))
        settings["adapter_name_or_path"] = str(folder / "adapter")
        for name in ("ours", "peer"):
            here = settings | {"output_dir": str(folder / name)}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(here))
        run_train(folder / "ours", asked, config=str(folder / "ours.yaml"))
        child = subprocess.run(
            [sys.executable, "bench/peer_hf.py", str(folder / "peer.yaml"), "--attention", "sdpa"],
            cwd=ROOT, capture_output=True, text=True)
        require(child.returncode == 0, f"bench/peer_hf.py: {child.stderr[-300:]}")
        found = {name: logged(folder / name) for name in ("ours", "peer")}
    print(curves(found["ours"], found["peer"]))
    worst = max(abs(a - b) for a, b in zip(found["ours"]["losses"], found["peer"]["losses"]))
    require(worst < 2e-3, f"the losses differ by {worst:.2g}")
    return {"says": f"{count} packed steps, largest difference of the losses {worst:.1g}",
            "losses": {name: run["losses"] for name, run in found.items()}}


def logged(folder: Path) -> dict:
    """Losses and tokens of each step from trainer_log.jsonl."""
    log = (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, log) if "loss" in row]
    totals = [0, *(row["total_tokens"] for row in rows)]
    return {"losses": [row["loss"] for row in rows],
            "tokens": [now - before for before, now in zip(totals, totals[1:])]}


PARTS = {"attention": attention, "steps": steps, "waits": waits, "decode": decode, "fp8": fp8,
         "qlora": qlora, "resume": resume, "recipe": recipe, "peer": peer}

if __name__ == "__main__":
    run_part(PARTS)
