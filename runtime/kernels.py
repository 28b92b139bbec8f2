"""What computes a run: every file of fast/, and fp8, enters here by one line of PICKS.

    kernels = choose_kernels(config, model_config, device, dtype)   # tried and measured
    keep_kernels(kernels, config, begun)                            # pinned, or of the first start
    use_kernels(model, kernels, recompute)                          # set on a finished model

The defaults of Kernels are the twins at the root, so a file can be deleted with its line.

Requires: model.py, lora.py.
Next: runtime/setup.py, runtime/build.py; fast/attention_picker.py, fast/matmul.py,
fast/fused_block.py, fast/compile.py, fast/grouped_experts.py, methods/fp8.py.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint.load import quantized_weights
from errors import unknown_name
from families import ModelConfig
from lora import AdaptedLinear, lora_layers
from model import CausalLM, attention_needs
from optim import Optimizer, make_optimizer
from text.tokenizer import read_json


# parts of the key pin_kernels
PINNABLE = ("attention", "matmul", "threads")


@dataclass
class Kernels:
    """The code that computes a run, and lines for the start page, each with its reason."""
    attention: str = "plain"                # a name from attention.py
    correct: tuple = ("plain",)             # the names that give correct results here
    matmul_name: str = "torch"              # a key of matmuls
    matmuls: dict[str, Callable] = field(default_factory=lambda: {"torch": F.linear})
    threads: int = 0                        # of a CPU; 0: as many as torch starts
    threads_tried: tuple = (0,)
    frozen_head: Callable | None = None     # fast.head_in_tiles.losses_in_tiles
    fuse: Callable | None = None            # fast.fused_block.fuse_blocks
    compile: Callable | None = None         # fast.compile.compile_steps
    compile_tokens: Callable | None = None  # fast.compile.compile_tokens
    compile_loss: Callable | None = None    # fast.compile.compile_loss
    group_experts: Callable | None = None   # fast.grouped_experts.group_experts
    fp8: object = None                      # methods.fp8.Fp8: 8-bit products of frozen weights
    training: bool = True                   # False: evaluation, without compiled steps and fp8
    lines: list[str] = field(default_factory=list)

    @property
    def matmul(self) -> Callable:
        """The matrix product: (x (N, in), W (out, in), bias) -> (N, out)."""
        return self.matmuls[self.matmul_name]


# ---- one function a file ------------------------------------------------------------------------


def pick_attention(kernels: Kernels, config, model_config: ModelConfig, device, dtype):
    """The fastest correct attention kernel."""
    from fast.attention_picker import pick_kernel

    choice = pick_kernel(config.flash_attn, device=device, dtype=dtype,
                         training=kernels.training, **attention_needs(model_config))
    kernels.attention = choice.kernel
    kernels.correct = tuple(choice.timings) or (choice.kernel,)
    kernels.lines += choice.lines


def pick_matrix_product(kernels: Kernels, config, model_config: ModelConfig, device, dtype):
    """The fastest correct library for this model's matrix products on a CPU, and how it is used."""
    from fast.matmul import MATMULS, pick_matmul, product_of

    choice = pick_matmul(device, dtype, product_of(model_config))
    kernels.matmul_name = choice.picked
    kernels.matmuls = {name: MATMULS[name] for name in choice.rates} or kernels.matmuls
    kernels.threads, kernels.threads_tried = choice.threads, choice.threads_tried
    kernels.lines += choice.lines


def pick_frozen_head(kernels: Kernels, config, model_config: ModelConfig, device, dtype):
    """The cross-entropy of a head that is not trained in tiles of the vocabulary, on a CPU."""
    if torch.device(device).type != "cpu" or not (kernels.training and config.plain_cross_entropy):
        return
    from fast.head_in_tiles import losses_in_tiles

    kernels.frozen_head = losses_in_tiles
    kernels.lines.append("loss: in tiles of the vocabulary, if the head is not trained")


def pick_fused_blocks(kernels: Kernels, config, model_config: ModelConfig, device, dtype):
    """Blocks that keep less for the backward pass."""
    from fast.fused_block import fuse_blocks

    kernels.fuse = fuse_blocks


def pick_compiled_steps(kernels: Kernels, config, model_config: ModelConfig, device, dtype):
    """Compiled elementwise steps, where torch's compiler works and is worth it."""
    if not kernels.training:
        return
    from fast.compile import compile_loss, compile_steps, compile_tokens, pick_compile

    works, line = pick_compile(config.torch_compile, device, dtype, model_config.hidden_act,
                               kernels.fuse)
    kernels.compile = compile_steps if works else None
    kernels.compile_tokens = compile_tokens if works else None
    kernels.compile_loss = compile_loss if works else None
    kernels.lines.append(line)


def pick_grouped_experts(kernels: Kernels, config, model_config: ModelConfig, device, dtype):
    """The experts of a layer in one product, where torch has it and it is right."""
    if not any(model_config.sparse):
        return
    from fast.grouped_experts import group_experts, pick_grouped

    works, line = pick_grouped(device, dtype, model_config.hidden_act)
    kernels.group_experts = group_experts if works else None
    kernels.lines.append(line)


def pick_fp8_base(kernels: Kernels, config, model_config: ModelConfig, device, dtype):
    """Frozen weights in 8 bits, multiplied in 8 bits; for the key fp8 only where that is faster."""
    if not config.base_precision or not kernels.training:
        return
    from methods.fp8 import pick_fp8

    if config.fp8 and torch.device(device).type == "cpu":
        kernels.lines.append("8-bit base: off, a CPU has no products in 8 bits "
                             "(base_precision: fp8 without fp8: true tries them, slowly)")
        return
    try:
        kernels.fp8, line = pick_fp8(device, dtype)
    except ValueError as refusal:
        if not config.fp8:
            raise
        line = f"8-bit base: off, computed in 16 bits. {refusal}"
    kernels.lines.append(line)


PICKS = (
    pick_attention,             # fast/attention_picker.py
    pick_matrix_product,        # fast/matmul.py
    pick_frozen_head,           # fast/head_in_tiles.py
    pick_fused_blocks,          # fast/fused_block.py
    pick_compiled_steps,        # fast/compile.py
    pick_grouped_experts,       # fast/grouped_experts.py
    pick_fp8_base,              # methods/fp8.py
)


# ---- all of them --------------------------------------------------------------------------------


def choose_kernels(config, model_config: ModelConfig, device, dtype: torch.dtype,
                 training: bool = True) -> Kernels:
    """The code that computes a run, or an evaluation; each part is tried on this machine."""
    kernels = Kernels(training=training)
    for pick in PICKS:
        pick(kernels, config, model_config, device, dtype)
    return kernels


def keep_kernels(kernels: Kernels, config, begun: dict):
    """Take the kernels that are pinned, else those with which a run began, where they work here.

    Two kernels differ in the last bit of their results, and so do other numbers of threads. begun:
    {"kernel": …, "matmul": …, "threads": …}; what is missing stays as chosen. Raises ValueError for
    a pinned kernel that does not work here.
    """
    pinned = config.pin_kernels
    if unknown := sorted(pinned.keys() - set(PINNABLE)):
        raise ValueError("pin_kernels: " + unknown_name("part", unknown[0], PINNABLE))
    if config.full_determinism:                 # nothing that timing decides
        pinned = {"attention": kernels.correct[0], "matmul": "torch", "threads": "0", **pinned}
    kernels.attention = same_kernel(
        "attention", kernels.attention, kernels.correct, pinned.get("attention"),
        begun.get("kernel", kernels.attention), kernels.lines)
    kernels.matmul_name = same_kernel(
        "matmul", kernels.matmul_name, tuple(kernels.matmuls), pinned.get("matmul"),
        begun.get("matmul", kernels.matmul_name), kernels.lines)
    kernels.threads = int(same_kernel(
        "threads", str(kernels.threads), tuple(map(str, (0, *kernels.threads_tried))),
        pinned.get("threads"), str(begun.get("threads", kernels.threads)), kernels.lines))
    if kernels.threads:
        torch.set_num_threads(kernels.threads)


def same_kernel(part: str, fastest: str, correct: tuple, pinned: str | None, begun: str,
                lines: list[str]) -> str:
    """The kernel of a part of the computation: pinned, else `begun`, if it is among `correct`.

    lines: of the start page; the one about this part then names the kernel in use.
    """
    if pinned and pinned not in correct:
        raise ValueError(f"pin_kernels.{part}: "
                         + unknown_name("or unsuitable kernel", pinned, correct))
    wanted = pinned or begun
    if wanted == fastest:
        return fastest
    old = [line for line in lines if line.startswith(f"{part}: {fastest}")]
    for line in old:
        lines.remove(line)
    if wanted not in correct:
        lines.append(f"{part}: {fastest}; {wanted}, with which the run began, does not work here, "
                     "and the last bits of the results will differ")
        return fastest
    why = "as pinned" if pinned else "with which the run began"
    lines.append(f"{part}: {wanted}, {why} (measured now, the choice would be {fastest})")
    return wanted


def kernels_of_training(folder: Path, device: torch.device) -> dict:
    """The kernels with which the run that wrote `folder` began, on such a device; {} if unknown."""
    begun = read_json(folder / "train_config.json").get("kernels")
    is_same = isinstance(begun, dict) and begun.get("device") == device_name(device)
    return begun if is_same else {}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"{device} ({torch.get_num_threads()} threads)"
    return str(device)


def use_kernels(model: CausalLM, kernels: Kernels, recompute: Sequence[str] | None = None):
    """Compute a model, whose adapters are attached, with these kernels.

    recompute: a level of activation checkpointing for each block, see fast/fused_block.py.
    """
    model.kernel = kernels.attention
    if kernels.fuse:
        kernels.fuse(model, kernels.matmul, recompute)
    elif set(recompute or ()) - {"none"}:
        print("  note: no activation checkpointing, and more memory than planned: "
              "fast/fused_block.py, which sets it, is not among the PICKS of runtime/kernels.py")
    if kernels.group_experts:
        line = kernels.group_experts(model, recompute, fp8=bool(kernels.fp8))
        if line:
            print(line)
    if kernels.compile:
        kernels.compile(model)
        on_gpu = model.lm_head.weight.device.type == "cuda"     # on a CPU it is slower than without
        if on_gpu and quantized_weights(model):
            from methods.quant import compile_dequantize

            line = compile_dequantize(model, kernels.compile_tokens)
            if line:
                print(line)


def use_long_rows(model: CausalLM, kernels: Kernels, workload):
    """Inputs in main memory and MLPs in tiles, as runtime/memory.py plans; after use_kernels."""
    if workload.mlp_tile:
        from fast.tiled_mlp import tile_mlps            # only where memory needs it

        tile_mlps(model, workload.mlp_tile)
    if not workload.offloaded:
        return
    if not kernels.fuse:
        print(f"  note: the inputs of {workload.offloaded} blocks stay on the device: only "
              "checkpointed blocks hand them out, and fast/fused_block.py, which checkpoints them, "
              "is not among the PICKS of runtime/kernels.py")
        return
    from fast.offload_inputs import offload_inputs      # only where memory needs it

    offload_inputs(model, workload.offloaded)


def use_fp8(model: CausalLM, kernels: Kernels, room: int = 0):
    """Round the frozen weights beside adapters to 8 bits, where the config asks for it.

    room: bytes of a GPU that the memory plan leaves free.
    """
    if kernels.fp8:
        from methods.fp8 import hold_transposed, to_fp8, with_compiled_rounding

        fp8 = kernels.fp8
        if kernels.compile:
            fp8 = with_compiled_rounding(fp8, kernels.compile_tokens)
        adapted = lora_layers(model).values()
        to_fp8([layer for layer in adapted if isinstance(layer, AdaptedLinear)], fp8)
        line = hold_transposed(model, room)
        if line:
            print(line)


# ---- the optimizer ------------------------------------------------------------------------------


def new_optimizer(parameters: dict, config, model_config: ModelConfig, device: torch.device,
                  steps_done: int = 0) -> Optimizer:
    """The optimizer of {name: trained parameter}: AdamW, or what the config asks for.

    steps_done: optimizer steps before this start.
    """
    if config.use_badam and config.badam_mode == "ratio":
        from methods.badam_ratio import RatioOptimizer  # only where it is asked for

        return RatioOptimizer(parameters, config, steps_done)
    if config.use_badam:
        from methods.badam import BlockOptimizer        # only where it is asked for

        return BlockOptimizer(parameters, config, steps_done)
    return make_optimizer(parameters, config, device, **optimizer_rules(config, model_config))


def optimizer_rules(config, model_config: ModelConfig) -> dict:
    """Further arguments of optim.make_optimizer; {} for AdamW alone."""
    if config.use_apollo:
        from methods.apollo import apollo_arguments     # only where it is asked for

        return apollo_arguments(config)
    further = config.use_muon or config.use_galore or config.use_adam_mini
    if not (further or "8bit" in config.optim):
        return {}
    from methods.optimizers import further_arguments    # only where it is asked for

    return further_arguments(config, model_config)
