"""LoRA: W stays frozen; the layer computes W x + scale * B(A x), and A (r, in), B (out, r) learn.

    attach_lora(model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]), seed=42)

Works on any nn.Module made of linear layers, and of stacks of matrices, one per expert. The layer
beside which an adapter stands becomes its `base_layer` and is only ever called: it may hold its
weight in 4 or 8 bits. Variants of the layer or of its initial values are passed to attach_lora
(methods/lora_variants.py), and so is another adapter than LoRA (methods/oft.py).

Where a checkpoint uses other module names, `stored_name` maps our names to the checkpoint's; users,
error messages and PEFT's files use the checkpoint's.

Requires: model.py.
Next: losses.py, methods/lora_variants.py.
Papers: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732.
"""
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from errors import did_you_mean


@dataclass(kw_only=True)
class AdapterConfig:
    """Which modules are trained; a subclass adds how."""
    target_modules: list | str = "all-linear"               # get an adapter, see find_targets
    modules_to_save: list = field(default_factory=list)     # trained in full, in float32

    finetuning_type = ""            # as a config calls this kind of adapter
    pissa = False                   # whether the initial adapter was taken out of the base


@dataclass
class LoRAConfig(AdapterConfig):
    """What is adapted, and how: the supported fields of PEFT's adapter_config.json."""
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False                                  # train the norms of rows separately
    rank_pattern: dict = field(default_factory=dict)        # {pattern of names: another r}
    alpha_pattern: dict = field(default_factory=dict)       # {pattern of names: another alpha}
    init_lora_weights: bool | str = True                    # or "pissa", "pissa_niter_N"

    finetuning_type = "lora"

    def settings(self) -> dict:
        """{key of a config: value} of what an adapter that is trained further decides."""
        return {
            "lora_rank": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_target": self.target_modules,
            "additional_target": self.modules_to_save,
        }

    @property
    def size(self) -> str:
        """What determines the adapter's shapes, for messages."""
        return f"r is {self.r}"

    @property
    def variant(self) -> str:
        """The key of a config that makes this another adapter than LoRALinear's, or ""."""
        return "use_dora" if self.use_dora else "pissa_init" if self.pissa else ""

    @property
    def pissa(self) -> bool:
        return str(self.init_lora_weights).startswith("pissa")

    def of_module(self, name: str) -> tuple[int, float]:
        """Rank and scale of one module: alpha / r; for rsLoRA alpha / sqrt(r) (theorem 3.2)."""
        r, alpha = self.rank_and_alpha(name)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """Rank and alpha of one module."""
        return (_first_match(self.rank_pattern, name, self.r),
                _first_match(self.alpha_pattern, name, self.lora_alpha))


def _first_match(patterns: dict, name: str, default):
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


# ---- layers -------------------------------------------------------------------------------------


class AdaptedLinear(nn.Module):
    """A frozen linear layer, and weights beside it that are trained.

    A subclass offers forward, effective_weight and merged, and is made by `beside`.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True

    @property
    def weight(self):
        """The frozen weight, as base_layer stores it."""
        return self.base_layer.weight

    def fix(self):
        """Compute once, for inference, what depends on the trained weights alone."""

    def own_bytes(self, compute: int) -> int:
        """Bytes kept for the backward pass, whatever the number of tokens.

        compute: bytes per number in a matrix product.
        """
        return 0


class LoRALinear(AdaptedLinear):
    """A frozen linear layer with an adapter: y = W x + bias + scale * B(A dropout(x))."""

    removed = None      # (A, B) taken out of W by an initializer; added back while disabled

    def __init__(self, base_layer: nn.Module, r: int, scale: float, dropout: float = 0.0,
                 device=None):
        super().__init__(base_layer)
        options = {"bias": False, "dtype": torch.float32,
                   "device": device or base_layer.weight.device}
        self.lora_A = nn.Linear(base_layer.in_features, r, **options)
        self.lora_B = nn.Linear(r, base_layer.out_features, **options)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scale = scale

    @classmethod
    def beside(cls, *where):
        """See lora_beside."""
        return lora_beside(cls, *where)

    def forward(self, x):
        y = self.base_layer(x)                                                   # (…, out)
        A, B = self.adapter()
        if A is None:
            return y
        return y + self.low_rank(self.dropout(x) if self.enabled else x, A, B)

    def low_rank(self, x, A, B):
        """scale * B(A x). A and B are float32 for the optimizer and computed in x's dtype."""
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * self.scale

    # ---- for merging, and where this is the model's head

    def adapter(self):
        """A and B as they are applied: trained, or, while disabled, `removed` or (None, None)."""
        if self.enabled:
            return self.lora_A.weight, self.lora_B.weight
        return self.removed or (None, None)

    def effective_weight(self):
        """The matrix (out, in) with the adapter in it; gradients flow to A and B."""
        weight = dequantized_weight(self.base_layer)
        A, B = self.adapter()
        return weight if A is None else weight + (B @ A * self.scale).to(weight.dtype)

    @torch.no_grad()
    def merged(self):
        """The matrix with the adapter in it, summed in float32."""
        return merged_weight(dequantized_weight(self.base_layer), self.lora_A.weight,
                             self.lora_B.weight, self.scale)


class LoRAStacked(nn.Module):
    """Adapters beside a layers.StackedLinear of E experts; called with the expert's number.

    Laid out as in PEFT 0.18: A is (E*r, in), expert by expert; B is (out, r*E), where for each of
    the r ranks the experts are adjacent.
    """

    def __init__(self, base_layer: nn.Module, r: int, scale: float, dropout: float, device=None):
        super().__init__()
        experts = len(base_layer.weight)
        self.base_layer = base_layer
        self.scale = scale
        self.enabled = True
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        options = {"bias": False, "dtype": torch.float32,
                   "device": device or base_layer.weight.device}
        self.lora_A = nn.Linear(base_layer.in_features, experts * r, **options)
        self.lora_B = nn.Linear(r * experts, base_layer.out_features, **options)

    def forward(self, x, expert: int):
        y = self.base_layer(x, expert)                                           # (n, out)
        if not self.enabled:
            return y
        A, B = self.matrices_of(expert)
        low_rank = F.linear(self.dropout(x), A.to(x.dtype))                      # (n, r)
        return y + F.linear(low_rank, B.to(x.dtype)) * self.scale

    def matrices_of(self, expert: int):
        return expert_matrices(self.lora_A.weight, self.lora_B.weight, len(self.weight), expert)

    @property
    def weight(self):
        return self.base_layer.weight

    @torch.no_grad()
    def merged(self):
        """The stack with the adapters in it, in its own order of sizes."""
        merged = []
        for expert, matrix in enumerate(self.weight):
            A, B = self.matrices_of(expert)
            if self.base_layer.out_first:
                merged.append(merged_weight(matrix, A, B, self.scale))
            else:
                merged.append(merged_weight(matrix.T, A, B, self.scale).T)
        return torch.stack(merged)


def expert_matrices(A, B, experts: int, expert: int):
    """One expert's A (r, in) and B (out, r) from the stacked ones (see LoRAStacked)."""
    return (A.view(experts, -1, A.shape[1])[expert],
            B.view(B.shape[0], -1, experts)[..., expert])


def merged_weight(W, A, B, scale: float):
    """W + scale * B A, (out, in), summed in float32, in W's dtype (arXiv:2106.09685, sec. 4.1)."""
    return (B.float() @ A.float()).mul_(scale).add_(W).to(W.dtype)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer stores something other than its matrix, to be dequantized."""
    return hasattr(layer, "dequantized_weight")


def dequantized_weight(layer: nn.Module, dtype: torch.dtype | None = None):
    """The matrix (out, in) of a linear layer, however it is stored. dtype None: its own."""
    if is_quantized(layer):
        return layer.dequantized_weight(dtype)
    return layer.weight.to(dtype or layer.weight.dtype)


# ---- which layers are adapted -------------------------------------------------------------------

# `all` is what it is in LLaMA-Factory 0.9.5, where routers and routed experts (transformers 5) are
# no linear layers: they are adapted when they are named, `lora_target: all,experts`.
NOT_IN_ALL = re.compile(r"lm_head|.*\.(mlp\.gate|experts\..*)")


def same_name(name: str) -> str:
    """The names of a checkpoint whose modules are called as ours."""
    return name


def can_adapt(module: nn.Module) -> bool:
    """Whether this is a linear layer or a stack of matrices."""
    weight = getattr(module, "weight", None)
    is_stack = isinstance(weight, nn.Parameter) and weight.dim() == 3
    is_stack = is_stack and not isinstance(module, nn.Conv1d)
    return isinstance(module, nn.Linear) or is_stack


def find_targets(model: nn.Module, target_modules, stored_name: Callable = same_name) -> list[str]:
    """Full names of the layers that `target_modules` selects, in the model's order.

    "all" or "all-linear": every linear layer but the head, routers and routed experts; a shared
    expert and its gate are included. Another str: a regular expression for the full name. A list
    of: last name parts (`q_proj`, in experts too), path endings (`self_attn.q_proj`), blocks
    (`experts`: everything inside), all, or regular expressions, recognized by characters that no
    name has, as * and |. Raises ValueError with the nearest name for an entry that matches nothing.
    """
    layers = {stored_name(name): name for name, module in model.named_modules()
              if can_adapt(module)}
    if isinstance(target_modules, str):
        if target_modules not in ("all", "all-linear"):
            return _matching(target_modules, layers)
        target_modules = [target_modules]

    wanted = set()
    for target in target_modules:
        if target in ("all", "all-linear"):
            wanted.update(name for name in layers.values() if not NOT_IN_ALL.fullmatch(name))
            continue
        inside = re.compile(rf"(.*\.)?{re.escape(target)}(\..*)?")
        matches = [name for stored, name in layers.items() if inside.fullmatch(stored)
                   or target == "experts" and inside.fullmatch(name)]
        if not matches and re.search(r"[^\w.-]", target):
            matches = _matching(target, layers)
        if not matches:
            raise ValueError(_no_match(target, layers, model, stored_name))
        wanted.update(matches)
    return [name for name in layers.values() if name in wanted]


def _matching(pattern: str, layers: dict) -> list[str]:
    matches = match_patterns([pattern], list(layers), "lora_target")[0]
    found = [name for name, match in zip(layers.values(), matches) if match]
    if not found:
        raise ValueError(f"lora_target: the pattern {pattern!r} matches no linear layer; names "
                         f"look like {next(iter(layers))!r}")
    return found


MATCH_SECONDS = 10
MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
print(json.dumps([[re.fullmatch(p, n) is not None for n in names] for p in patterns]))
"""


def match_patterns(patterns: list[str], names: list[str], where: str) -> list[list[bool]]:
    """For each regular expression, which of the names it matches in full.

    A pattern that could try ever more ways of matching runs in a process that is ended after
    MATCH_SECONDS. Raises ValueError, which begins with `where`.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{where}: {pattern[:60]!r} is no regular expression "
                             f"({error})") from None
    if all(len(re.findall(r"[*+?{|]", pattern)) < 2 for pattern in patterns):
        return [[re.fullmatch(p, name) is not None for name in names] for p in patterns]
    try:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", MATCHER], capture_output=True,
                              input=json.dumps([patterns, names]), text=True,
                              timeout=MATCH_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{where}: {', '.join(patterns)[:60]!r} takes more than {MATCH_SECONDS} seconds for "
            f"{len(names)} names. A repetition inside a repetition, as in (a+)+, does that; "
            "write it without, or list the names") from None
    if done.returncode:
        raise ValueError(f"{where}: {', '.join(patterns)[:60]!r} could not be matched "
                         f"({done.stderr.strip()[-80:]})")
    return json.loads(done.stdout)


def _no_match(target: str, layers: dict, model: nn.Module, stored_name: Callable) -> str:
    parts = sorted({stored.rsplit(".", 1)[-1] for stored in layers})
    message = (f"lora_target: {target!r} matches no linear layer of this model"
               f"{did_you_mean(target, parts)}; it has {', '.join(parts)}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and stored_name(name).endswith(target):
            message += f". An embedding is trained in full: additional_target: {target}"
    return message


# ---- attaching ----------------------------------------------------------------------------------


def attach_lora(model: nn.Module, config: AdapterConfig, seed: int | None = None,
                stored_name: Callable = same_name, targets: list[str] | None = None, device=None,
                layer: type[AdaptedLinear] = LoRALinear,
                init: Sequence[Callable] = ()) -> nn.Module:
    """Freeze the model, add adapters, and unfreeze what `config` trains. In place.

    A starts as kaiming-uniform(a=sqrt 5) and B as zeros, so the model is unchanged at first. Each A
    has a generator of its own, seeded with `seed` and the module's index in the model, so that it
    does not depend on what else is adapted. A target that modules_to_save trains in full gets no
    adapter, as in PEFT. targets: names instead of find_targets's. device: of trained weights,
    if not the device of the frozen ones. layer, init: see methods/lora_variants.py and oft.py; each
    function of `init` is called with the new layer and its generator.
    """
    assert not lora_layers(model), "merge the adapters of this model before attaching others"
    plain = layer is LoRALinear and not init
    assert plain != bool(config.variant), "layer and init: see checkpoint.adapters.variant_of"
    model.requires_grad_(False)

    full = {name for wanted in config.modules_to_save
            for name in _modules_named(model, wanted, stored_name)}
    # a quantized weight is a module, too, and must not shift the indices
    modules = [name for name, _ in model.named_modules() if not name.endswith(".weight")]
    index = {name: number for number, name in enumerate(modules)}
    if targets is None:
        targets = find_targets(model, config.target_modules, stored_name)

    for name in targets:
        if name in full:
            continue
        base = model.get_submodule(name)
        generator = torch.Generator().manual_seed((seed or 0) * 1_000_003 + index[name])
        if isinstance(base, nn.Linear):
            adapted = layer.beside(base, config, stored_name(name), generator, device)
        elif plain:
            adapted = lora_beside(LoRAStacked, base, config, stored_name(name), generator, device)
        else:
            raise ValueError(f"{config.variant}: {stored_name(name)} is a stack of experts, which "
                             "neither we nor PEFT support; leave it out of lora_target")
        if init and not adapted.lora_A.weight.is_meta:
            for initializer in init:
                initializer(adapted, generator)
        _replace(model, name, adapted)

    for name in full:
        _train_in_full(model.get_submodule(name), device)
    return model


def lora_beside(layer: type, base: nn.Module, config: LoRAConfig, name: str,
                generator: torch.Generator, device=None) -> LoRALinear | LoRAStacked:
    """A new `layer` with the rank and scale of the module that the checkpoint calls `name`."""
    r, scale = config.of_module(name)
    adapted = layer(base, r, scale, config.lora_dropout, device)
    if not adapted.lora_A.weight.is_meta:
        init_adapter(adapted, generator)
    return adapted


@torch.no_grad()
def init_adapter(layer: LoRALinear | LoRAStacked, generator: torch.Generator):
    """A uniform within 1 / sqrt(in), drawn on the CPU; B zeros."""
    A = layer.lora_A.weight
    bound = 1 / math.sqrt(layer.lora_A.in_features)
    A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
    layer.lora_B.weight.zero_()


def _replace(model: nn.Module, name: str, module: nn.Module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _modules_named(model: nn.Module, wanted: str, stored_name: Callable) -> list[str]:
    """Modules with weights whose name ends in `wanted`, as in PEFT, and those inside them."""
    roots = [name for name, _ in model.named_modules() if stored_name(name).endswith(wanted)]
    with_weights = [name for name, module in model.named_modules()
               if isinstance(module, nn.Linear) or list(module.parameters(recurse=False))]
    found = [name for name in with_weights
             if any(name == root or name.startswith(root + ".") for root in roots)]
    if not found:
        known = {stored_name(name).rsplit(".", 1)[-1] for name in with_weights}
        check_names("additional_target", [wanted], known)
    return found


def _train_in_full(module: nn.Module, device=None):
    """Give a module trainable float32 weights of its own; its inputs and outputs keep their dtype.

    A tied head is untied.
    """
    if is_quantized(module):
        raise ValueError(f"additional_target: a layer in {module.format_name} cannot be trained in "
                         "full; adapt it (lora_target), or take a 16-bit base")
    dtype = module.weight.dtype
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.is_meta and device is not None:               # to be filled by the caller
            trained = torch.empty_like(weight, dtype=torch.float32, device=device)
        else:
            trained = weight.detach().to(torch.float32, copy=True)
        setattr(module, name, nn.Parameter(trained))

    def to_float32(_, args):
        return tuple(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    if dtype != torch.float32:
        module.register_forward_pre_hook(to_float32)
        module.register_forward_hook(lambda _, args, out: out.to(dtype))


# ---- using and merging --------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> dict[str, AdaptedLinear | LoRAStacked]:
    """The adapted layers by full name."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (AdaptedLinear, LoRAStacked))}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_adapters(model: nn.Module, enabled: bool):
    """Switch all adapters on or off; off is the base model (modules_to_save stay trained)."""
    for layer in lora_layers(model).values():
        layer.enabled = enabled


def merge_adapters(model: nn.Module, quantized: bool = True):
    """Fold every adapter into its weight and restore the base layers, in place.

    Merging dequantizes a matrix in 4 or 8 bits; quantized=False leaves such layers as they are.
    """
    for name, layer in lora_layers(model).items():
        if quantized or not is_quantized(layer.base_layer):
            _replace(model, name, _with_weight(layer.base_layer, layer.merged()))


def _with_weight(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    """The layer with this frozen matrix; an nn.Linear instead of a quantized layer."""
    if is_quantized(layer):
        bias = layer.bias
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.bias = bias
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def check_names(key: str, wanted, known):
    """Raises ValueError, with the nearest name, for a name that is no module."""
    for name in wanted:
        if name not in known:
            raise ValueError(f"{key}: {name!r} is no module of this model"
                             f"{did_you_mean(name, known)}; it has {', '.join(sorted(known))}")
