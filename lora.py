"""LoRA: a frozen matrix W learns through W x + scale * B(A x), where A is (r, in) and B is (out, r).

    attach_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), seed=42)

The file knows nothing of the decoder: it works on any nn.Module that is made of nn.Linear (and of stacks of matrices,
one per expert), and leaves the names of all weights as they were. Where a checkpoint calls its modules otherwise,
`called` turns our names into its own: users, errors and PEFT's format on disk speak of those.

Read before: model.py. Read after: checkpoint/load.py (how adapters are read and written), merge.py.
Papers: LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353, PiSSA arXiv:2404.02948, with the
randomised SVD of arXiv:0909.4061 (algorithm 4.4).
"""
import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from errors import did_you_mean
from methods.fp8 import dequantise
from methods.lora_variants import principal_parts
from methods.quant import Quantised, multiply


@dataclass
class LoRAConfig:
    """What is adapted and how; the fields of PEFT's adapter_config.json that we act on."""
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False                                  # rows get a length that is learnt apart
    target_modules: list | str = "all-linear"               # what find_targets reads
    modules_to_save: list = field(default_factory=list)     # trained whole, in float32
    rank_pattern: dict = field(default_factory=dict)        # {name part: another r}
    alpha_pattern: dict = field(default_factory=dict)       # {name part: another alpha}
    init_lora_weights: bool | str = True                    # pissa or pissa_niter_N: principal parts of the weights

    @property
    def pissa(self) -> bool:
        return str(self.init_lora_weights).startswith("pissa")

    def of_module(self, name: str) -> tuple[int, float]:
        """Rank and scale of one module: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732, theorem 3.2)."""
        r, alpha = _pattern(self.rank_pattern, name, self.r), _pattern(self.alpha_pattern, name, self.lora_alpha)
        return r, alpha / (math.sqrt(r) if self.use_rslora else r)


def _pattern(patterns, name, default):
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


class LoRALinear(nn.Linear):
    """An nn.Linear with an adapter beside it. `weight` and `bias` are the frozen ones, shared with what it replaces.

    This is the slow twin of fast/fused_block.py, which most calls take in its place. `weight` may be a quant.Quantised, in 4 or
    8 bits a number. fp8: see methods/fp8.py, which may round `weight`.
    """

    fp8 = None

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float, device=None, dora: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.replaced = base.weight, base.bias, [base]       # a list: not a submodule
        self.scale, self.enabled = scale, True
        device = device or base.weight.device
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device, dtype=torch.float32)
        self.lora_magnitude_vector, self.fixed, self.start = None, None, None
        if dora:
            lengths = torch.empty(base.out_features, device=device, dtype=torch.float32)
            self.lora_magnitude_vector = nn.Parameter(lengths)

    def forward(self, x):
        if self.enabled and self.lora_magnitude_vector is not None:
            return self.with_magnitude(x)
        y, (A, B) = self.product(x, self.bias), self.matrices()                  # (…, out)
        return y if A is None else y + self.change(self.dropout(x) if self.enabled else x, A, B)

    def product(self, x, bias=None):
        """W x + bias, (…, out), with the frozen W."""
        if isinstance(self.weight, Quantised):
            return multiply(x, self.weight, bias)
        return F.linear(x, self.dense(x.dtype), bias)

    def matrices(self):
        """(A, B) of what is added to W x: the adapter's; where it is off, what PiSSA took out of W, or (None, None)."""
        return (self.lora_A.weight, self.lora_B.weight) if self.enabled else self.start or (None, None)

    def change(self, x, A, B):
        """scale * B(A x). A and B stay float32 for the optimizer and take the activations' dtype for the product."""
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * self.scale

    @torch.no_grad()
    def take_out(self):
        """PiSSA: take scale * B A, as A and B are now, out of the weight, so that the layer is what it was. They are
        kept as `start`: with the adapter off, the layer stays what it was."""
        if isinstance(self.weight, Quantised):
            raise ValueError("PiSSA takes parts out of 16-bit weights, and this base has fewer bits: take an adapter "
                             "that pissa_convert has written, or a 16-bit base")
        self.start = self.lora_A.weight.clone(), self.lora_B.weight.clone()
        if not self.weight.is_meta:
            self.weight = nn.Parameter(merged_weight(self.weight, *self.start, -self.scale), requires_grad=False)
            self.replaced[0].weight = self.weight           # else the old one stayed in memory

    def with_magnitude(self, x):
        """DoRA (arXiv:2402.09353, eq. 5): gain * (W x + scale * B(A x)) + bias, multiplied in float32, where a gain
        near 1 keeps its digits. What the adapter adds sees the dropped x, and gain - 1 is a part of that (PEFT)."""
        gain, dropped, y = self.gain(), self.dropout(x), self.product(x)         # (out,), (…, in), (…, out)
        if dropped is x:
            y = (gain * (y + self.change(x, *self.matrices()))).to(x.dtype)
        else:
            y = (y + (gain - 1) * self.product(dropped) + gain * self.change(dropped, *self.matrices())).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def gain(self):
        """m / the length of each row of W + scale * B A, (out,) float32. The length counts as a constant: gradients
        flow to m alone (sec. 4.3)."""
        if self.fixed is not None:
            return self.fixed
        return self.lora_magnitude_vector / self.lengths()

    @torch.no_grad()
    def lengths(self):
        """The length of each row of W + scale * B A, (out,) float32."""
        with torch.autocast(self.lora_A.weight.device.type, enabled=False):
            rows = torch.addmm(self.dense(torch.float32), self.lora_B.weight.float(), self.lora_A.weight.float(),
                               alpha=self.scale)
            return row_lengths(rows)

    def dense(self, dtype=None):
        """The frozen weight as an ordinary matrix (out, in), whatever it is stored as. dtype None: its own."""
        if self.fp8 is not None:
            return dequantise(self.weight, self.unit, dtype or torch.bfloat16)
        if isinstance(self.weight, Quantised):
            return self.weight.dense(dtype)
        return self.weight.to(dtype or self.weight.dtype)

    def effective_weight(self):
        """The matrix (out, in) with the adapter in it; gradients flow to A, B and m."""
        weight, (A, B) = self.dense(), self.matrices()
        if A is None:
            return weight
        weight = weight + (B @ A * self.scale).to(weight.dtype)
        if self.lora_magnitude_vector is None or not self.enabled:
            return weight
        return (self.gain()[:, None] * weight).to(weight.dtype)


class LoRAStacked(nn.Module):
    """Adapters beside a stack of matrices `weight` (E, in, out), one per expert; called with the expert's number.

    As PEFT 0.18 keeps them for a parameter of three dimensions: A is (E*r, in), expert by expert; B is (out, r*E),
    the experts lying next to each other for each of the r ranks.
    """

    def __init__(self, base: nn.Module, r: int, scale: float, dropout: float, device=None):
        super().__init__()
        experts, self.in_features, self.out_features = base.weight.shape
        self.weight, self.replaced, self.scale, self.enabled = base.weight, [base], scale, True
        device = device or base.weight.device
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Linear(self.in_features, experts * r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r * experts, self.out_features, bias=False, device=device, dtype=torch.float32)

    def forward(self, x, expert: int):
        y = x @ self.weight[expert]                                              # (n, out)
        if not self.enabled:
            return y
        A, B = expert_matrices(self.lora_A.weight, self.lora_B.weight, len(self.weight), expert)
        return y + F.linear(F.linear(self.dropout(x), A.to(x.dtype)), B.to(x.dtype)) * self.scale


def expert_matrices(A, B, experts: int, expert: int):
    """One expert's A (r, in) and B (out, r) out of the stacked ones (see LoRAStacked)."""
    return A.view(experts, -1, A.shape[1])[expert], B.view(B.shape[0], -1, experts)[..., expert]


def row_lengths(rows):
    """(out,) for (out, in). A row of zeros, which vocabularies are filled up with, gets one that can be divided by."""
    return torch.linalg.norm(rows, dim=1).clamp(min=torch.finfo(torch.float32).tiny)


def merged_weight(W, A, B, scale: float, magnitude=None):
    """W + scale * B A, (out, in), summed in float32 and returned in W's dtype (arXiv:2106.09685, sec. 4.1).

    magnitude (out,): the length that DoRA gives each row of the sum.
    """
    rows = (B.float() @ A.float()).mul_(scale).add_(W)
    if magnitude is not None:
        rows = (magnitude.float() / row_lengths(rows))[:, None] * rows
    return rows.to(W.dtype)


def merged_stack(W, A, B, scale: float):
    """The same for a stack of matrices (E, in, out), expert by expert; a stack keeps each of them transposed."""
    return torch.stack([merged_weight(matrix.T, *expert_matrices(A, B, len(W), expert), scale).T
                        for expert, matrix in enumerate(W)])


# `all` means what it means to LLaMA-Factory 0.9.5, where routers and routed experts (transformers 5) are no linear
# layers: they are adapted when they are named, `lora_target: all,experts`.
ALL_BUT = re.compile(r"lm_head|.*\.(mlp\.gate|experts\..*)")


def same(name):
    return name


def can_adapt(module) -> bool:
    """A linear layer, or a stack of matrices."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (isinstance(weight, nn.Parameter) and weight.dim() == 3)


def find_targets(model: nn.Module, target_modules, called=same) -> list[str]:
    """Full names of the linear layers that `target_modules` means, in the model's order.

    "all" / "all-linear": every linear layer but the head, routers and routed experts; a shared expert is in it, and so
    is its gate. A list: last name parts (`q_proj`: wherever it stands, in experts too), path endings
    (`self_attn.q_proj`), blocks (`experts`: all within), all, or a regular expression for the full name, known by marks
    that no name has, as * and |. Another str: a regular expression. called: turns our names into those that are meant.
    Raises ValueError for an entry that matches nothing, with the nearest name.
    """
    linears = {called(name): name for name, module in model.named_modules()
               if can_adapt(module) and not name.endswith((".lora_A", ".lora_B"))}
    if isinstance(target_modules, str) and target_modules not in ("all", "all-linear"):
        return _matching(target_modules, linears)
    wanted = set()
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        if target in ("all", "all-linear"):
            wanted.update(ours for ours in linears.values() if not ALL_BUT.fullmatch(ours))
            continue
        inside = re.compile(rf"(.*\.)?{re.escape(target)}(\..*)?")
        matches = [ours for name, ours in linears.items() if inside.fullmatch(name)]
        if not matches and re.search(r"[^\w.-]", target):
            matches = _matching(target, linears)
        if not matches:
            parts = sorted({name.rsplit(".", 1)[-1] for name in linears})
            hint = did_you_mean(target, parts)
            whole = any(called(name).endswith(target) for name, module in model.named_modules()
                        if isinstance(module, nn.Embedding))
            raise ValueError(f"lora_target: {target!r} matches no linear layer of this model{hint}; "
                             f"it has {', '.join(parts)}"
                             + (f". An embedding is trained whole: additional_target: {target}" if whole else ""))
        wanted.update(matches)
    return [name for name in linears.values() if name in wanted]


def _matching(pattern, linears):
    try:
        found = [ours for name, ours in linears.items() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(f"lora_target: {pattern!r} is no regular expression ({error})") from None
    if not found:
        raise ValueError(f"lora_target: the pattern {pattern!r} matches no linear layer; names look like "
                         f"{next(iter(linears))!r}")
    return found


def attach_lora(model: nn.Module, config: LoRAConfig, seed: int | None = None, called=same,
                targets: list[str] | None = None, device=None) -> nn.Module:
    """Freeze the model, then give it adapters and unfreeze what `config` says is trained. Works in place.

    A starts as kaiming-uniform(a=sqrt 5), B as zeros, so the model is unchanged at first. Every A draws from a
    generator of its own, seeded with `seed` and the module's place in the model, so it does not depend on which others
    are adapted. With PiSSA both start as principal parts of the weight, which it loses. A target that modules_to_save
    trains whole gets no adapter, as in PEFT. called: see find_targets; targets: what it would return, where that is
    known better. device: of what is trained, where it is not that of the weights.
    """
    assert not lora_layers(model), "merge the adapters of this model before attaching others"
    model.requires_grad_(False)
    whole = {full for name in config.modules_to_save for full in _modules_named(model, name, called)}
    modules = [name for name, module in model.named_modules() if not isinstance(module, Quantised)]
    place = {name: index for index, name in enumerate(modules)}             # the same over a 16-bit and a 4-bit base
    for name in find_targets(model, config.target_modules, called) if targets is None else targets:
        if name in whole:
            continue
        r, scale = config.of_module(called(name))
        base = model.get_submodule(name)
        if isinstance(base, nn.Linear):
            module = LoRALinear(base, r, scale, config.lora_dropout, device, config.use_dora)
        elif config.use_dora or config.pissa:
            raise ValueError(f"{'use_dora' if config.use_dora else 'pissa_init'}: {called(name)} is a stack of "
                             "experts, for which that is not done, here nor in PEFT; leave it out of lora_target")
        else:
            module = LoRAStacked(base, r, scale, config.lora_dropout, device)
        A = module.lora_A.weight
        if not A.is_meta:
            generator = torch.Generator().manual_seed((seed or 0) * 1_000_003 + place[name])
            bound = 1 / math.sqrt(module.in_features)
            with torch.no_grad():
                A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
                module.lora_B.weight.zero_()
                if config.pissa:
                    niter = int(str(config.init_lora_weights).partition("_niter_")[2] or -1)
                    parts = principal_parts(module.dense(torch.float32), r, scale, niter, generator)
                    for matrix, part in zip((A, module.lora_B.weight), parts):
                        matrix.copy_(part)
                    module.take_out()
        if config.use_dora and not base.weight.is_meta:
            module.lora_magnitude_vector.data.copy_(module.lengths())
        _replace(model, name, module)
    for name in whole:
        _train_whole(model.get_submodule(name), device)
    return model


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _modules_named(model, name, called):
    """Modules with weights whose name ends in `name` (as in PEFT: `norm` means every norm) or that lie in one."""
    roots = [full for full, _ in model.named_modules() if called(full).endswith(name)]
    weighty = [full for full, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
               or isinstance(getattr(module, "weight", None), Quantised)]
    found = [full for full in weighty if any(full == root or full.startswith(root + ".") for root in roots)]
    if not found:
        _check_names("additional_target", [name], {called(full).rsplit(".", 1)[-1] for full in weighty})
    return found


def _train_whole(module, device=None):
    """Give the module float32 trainable weights of its own (a tied head is untied) and keep its callers' dtype."""
    dtype = module.weight.dtype
    if isinstance(module.weight, Quantised):
        raise ValueError(f"additional_target: a layer in {module.weight.form.kind} cannot be trained whole; adapt it "
                         "(lora_target), or take a 16-bit base")
    for name, weight in list(module.named_parameters(recurse=False)):
        empty = weight.is_meta and device is not None           # to be filled by the caller
        setattr(module, name, nn.Parameter(torch.empty_like(weight, dtype=torch.float32, device=device) if empty else
                                           weight.detach().to(torch.float32, copy=True)))
    if dtype != torch.float32:
        module.register_forward_pre_hook(lambda m, args: tuple(
            a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args))
        module.register_forward_hook(lambda m, args, out: out.to(dtype))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAStacked]:
    """The adapted layers by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (LoRALinear, LoRAStacked))}


def set_adapters(model: nn.Module, enabled: bool):
    """Switch all adapters on or off: off gives the base model with the very same weights (modules_to_save apart)."""
    for module in lora_layers(model).values():
        module.enabled = enabled


def plain(layer, weight):
    """The layer that an adapter stood beside, with this matrix; one in 4 or 8 bits becomes an ordinary layer."""
    if isinstance(layer.weight, Quantised):
        bias = layer.bias
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.bias = bias
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def merge_adapters(model: nn.Module, quantised: bool = True):
    """Fold every adapter into its weight and put the plain layers back, in place.

    A matrix in 4 or 8 bits becomes an ordinary one by that. quantised: False leaves adapters beside such matrices.
    """
    for name, module in lora_layers(model).items():
        if not quantised and isinstance(module.weight, Quantised):
            continue
        frozen = module.dense() if isinstance(module.weight, Quantised) else module.weight.data
        matrices = frozen, module.lora_A.weight.data, module.lora_B.weight.data, module.scale
        if isinstance(module, LoRALinear):
            weight = merged_weight(*matrices, module.lora_magnitude_vector)
        else:
            weight = merged_stack(*matrices)
        _replace(model, name, plain(module.replaced[0], weight))


def unfreeze(model: nn.Module, layers: int, modules: list, extra: list, called=same) -> nn.Module:
    """Freeze the model but for some of its layers, in place: finetuning_type: freeze.

    layers: so many of the last ones; below 0: of the first. modules: what learns in them, by the first part of names
    within a layer, or all. extra: what else learns: every weight in whose name one of these occurs, so that `norm` is
    the norms of all layers, too, as it is to LLaMA-Factory 0.9.5. called: see find_targets. Raises ValueError for a
    name that is not there.
    """
    inside = re.compile(r".*?\.(\d+)\.([^.]+)(\..*)?")              # (layer's number, first part in it)
    names = {name: called(name) for name, _ in model.named_parameters()}
    found = {name: match for name, full in names.items() if (match := inside.fullmatch(full))}
    outside = {full.split(".")[-2] for name, full in names.items() if name not in found}
    count = 1 + max(int(match[1]) for match in found.values())
    chosen = range(max(0, count - layers), count) if layers > 0 else range(min(-layers, count))
    _check_names("freeze_trainable_modules", set(modules) - {"all"}, {match[2] for match in found.values()})
    _check_names("freeze_extra_modules", extra, outside)
    for name, p in model.named_parameters():
        match = found.get(name)
        p.requires_grad_(any(part in names[name] for part in extra) or match is not None and int(match[1]) in chosen
                         and ("all" in modules or match[2] in modules))
    return model


def _check_names(key, wanted, there):
    for name in wanted:
        if name not in there:
            raise ValueError(f"{key}: {name!r} is no module of this model"
                             f"{did_you_mean(name, there)}; it has {', '.join(sorted(there))}")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
