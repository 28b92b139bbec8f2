"""Choose the dtype of a run; autocast for 16-bit matrix products, loss scaling for float16.

    precision = Precision(dtype, device, model, adapters_only=True)
    with precision.autocast():
        loss, _ = objective(model, batch, num_items)
    precision.scale(loss).backward()
    precision.unscale(parameters)

In float32 and bfloat16 scale and unscale do nothing.

Requires: model.py, losses.py.
Next: train.py.
Papers: mixed precision and loss scaling, arXiv:1710.03740.
"""
import math
import os
from contextlib import nullcontext

import torch
from torch import nn

from checkpoint.files import DTYPES, stored_as
from checkpoint.names import find_tensors
from checkpoint.read_config import read_config_json
from lora import AdaptedLinear
from model import MIXERS
from settings.config import ADAPTERS


def check_dtype(config, device: torch.device):
    """Raises ValueError for a 16-bit dtype that the device cannot compute in."""
    if config.fp16 and device.type == "cpu":
        print("note: float16 is slow on a CPU, and this run computes on one; bf16: true or "
              "neither is faster")
    if config.bf16 and device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"bf16: {torch.cuda.get_device_name(device)} has no bfloat16; set "
                             "fp16: true instead")


def use_deterministic_kernels():
    """Let torch use deterministic kernels only, as full_determinism of transformers does.

    An operation that has none raises RuntimeError, which names it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")   # read with the first product
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def half_dtype(config) -> torch.dtype | None:
    """The 16-bit dtype that the config asks for, or None."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else None


def requested_format(config):
    """The QuantFormat that quantization_bit and its companions ask for, or None."""
    return quant_format_of_bits(config, config.quantization_bit)


def quant_format_of_bits(config, bits: int | None):
    """The QuantFormat of 4 or 8 bits with the config's quantization_type; None for None."""
    if not bits:
        return None
    from methods.quant import QuantFormat               # only where it is asked for

    if bits == 8:
        return QuantFormat("int8", nested=0)
    nested = 256 if config.double_quantization else 0
    return QuantFormat(config.quantization_type, nested=nested)


def compute_dtype(config, base, quant_formats: dict) -> torch.dtype:
    """The dtype of matrix products, known before any weight is loaded.

    It is the one that the config requests, else that of the stored weights, else (if there are no
    weights) that of config.json. base: see runtime/setup.py.
    """
    if half_dtype(config):
        return half_dtype(config)
    if config.finetuning_type not in ADAPTERS:
        return torch.float32
    mixers = base.model_config.mixers
    first = next((n for n, kind in enumerate(mixers) if kind != "none"), 0)
    our_name = f"model.layers.{first}.{MIXERS[mixers[first]][0]}.o_proj.weight"
    stored_name = base.model_config.stored_name(our_name)
    try:
        _, dtype = stored_as(*find_tensors(base.folder, base.model_config)[stored_name])
        if dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    except (FileNotFoundError, KeyError):
        pass
    if our_name in quant_formats and quant_formats[our_name].dtype:
        return quant_formats[our_name].dtype
    fields = read_config_json(base.folder)
    fields |= fields.get("text_config", {})
    name = fields.get("dtype") or fields.get("torch_dtype")
    return DTYPES.get(name, torch.float32)


class Precision:
    """Autocast and loss scaling of a run.

    adapters_only: adapters stay float32 and are cast where they are applied, so autocast is needed
    only if the frozen weights have another dtype.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, model: nn.Module,
                 adapters_only: bool):
        weights = [model.model.embed_tokens.weight] if adapters_only else model.parameters()
        param_dtypes = {p.dtype for p in weights}
        self.dtype = dtype
        self.device = device
        self.mixed = param_dtypes != {dtype}
        self.loss_scale = LossScale() if dtype == torch.float16 else None

    def autocast(self):
        """A context for the forward pass."""
        if not self.mixed:
            return nullcontext()
        # no cache: it would hold 16-bit copies of all matrices through the forward pass
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss * self.loss_scale.value if self.loss_scale else loss

    def unscale(self, parameters):
        """Divide the gradients by the loss scale, in place."""
        if self.loss_scale:
            self.loss_scale.unscale(parameters)

    def overflowed(self, grad_norm: float) -> bool:
        """Adapt the loss scale to a step; True if its gradients overflowed in float16."""
        if not self.loss_scale:
            return False
        return not self.loss_scale.update(math.isfinite(grad_norm))

    def state(self) -> list | None:
        """The state for a checkpoint; None without loss scaling."""
        return [self.loss_scale.value, self.loss_scale.good_steps] if self.loss_scale else None

    def load_state(self, state: list | None):
        if self.loss_scale and state:
            self.loss_scale.value, self.loss_scale.good_steps = state


class LossScale:
    """Loss scaling for float16, whose gradients underflow unscaled (arXiv:1710.03740, sec. 3.2).

    A step whose gradients overflowed is skipped and halves the value; 2,000 good steps in a row
    double it.
    """

    def __init__(self, value: float = 2.0 ** 16):
        self.value = value
        self.good_steps = 0

    def unscale(self, parameters):
        """Divide the gradients by the scale, in place."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:                           # a stage of a pipeline may train nothing
            torch._foreach_div_(grads, self.value)

    def update(self, finite: bool) -> bool:
        """Adapt the scale after a step. finite: whether the gradients were; returned."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps % 2000 == 0:
            self.value *= 2
        return finite


# ---- overflow -----------------------------------------------------------------------------------

REMEDY = "Train with bf16: true, which has the range of float32, or without fp16"


@torch.no_grad()
def check_first_batch(model, objective, step, precision: Precision):
    """Raises ValueError that names the first layer whose output is not finite in 16 bits.

    float16 ends at 65,504. Without this check an overflow would show as a loss of nan thousands of
    samples later. Takes one forward pass; in float32 it does nothing.
    """
    if precision.dtype == torch.float32 or step is None or not step.batches:
        return
    largest = {}                                        # layer -> largest |output|

    def watch(name):
        def hook(module, args, out):
            check_layer(name, args, out, largest, model.kernel)
            largest[name] = float(out.abs().max())
        return hook

    hooks = []
    for name, module in model.named_modules():
        is_part = name.endswith((".lora_A", ".lora_B", ".base_layer"))
        if isinstance(module, (nn.Linear, AdaptedLinear)) and not is_part:
            hooks.append(module.register_forward_hook(watch(name)))
    model.eval()                # dropout would draw random numbers, and a resumed run differ
    try:
        with precision.autocast():
            batch, = objective.with_reference(model, step.batches[:1])
            loss, _ = objective(model, batch, 1.0)
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    if not loss.isfinite():
        raise ValueError(f"first batch: the head's logits overflow, the loss is {loss}. {REMEDY}")


def check_layer(name: str, args, out: torch.Tensor, largest: dict, kernel: str):
    """Raises ValueError if the input or output of a layer is not finite."""
    inputs = [a for a in args if torch.is_tensor(a)]
    if any(a.is_floating_point() and not a.isfinite().all() for a in inputs):
        block = name.rpartition(".")[0]
        before = ", ".join(f"{other.rpartition('.')[2]} {value:.3g}"
                           for other, value in largest.items() if other.startswith(block))
        raise ValueError(
            f"first batch: the input of {name} is not finite, with attention kernel {kernel} in "
            f"{inputs[0].dtype} (largest outputs before it: {before}). {REMEDY}")
    if not out.isfinite().all():
        peak = max(float(a.abs().max()) for a in inputs)
        raise ValueError(f"first batch: {name} overflows in {out.dtype} (its input reaches "
                         f"{peak:.3g}). {REMEDY}")
