"""BAdam by ratio: AdamW on a share of the entries of each weight, another share every 100 steps.

    optimizer = RatioOptimizer(parameters, config, steps_done)

Embedding and head are not trained. badam_mask_mode adjacent takes entries that lie side by side,
scatter takes them at random; weights of one shape have one mask. Gradients outside the mask are
zero before they are clipped. Nothing decays. The optimizer state is that of the masked entries;
those of weights in 16 bits have a float32 copy for as long as they are trained.

Requires: optim.py.
Next: runtime/kernels.py (new_optimizer).
Paper: BAdam arXiv:2404.02827. Masks, their order and the seeds that scatter draws are those of the
package badam 1.4, mode ratio, on a CPU.
"""
import re

import torch
from tqdm import tqdm

from optim import Optimizer, UpdateRule, adam_direction, parameter_groups

EVERY = 100             # steps with one mask: the package's default, which no key changes


class Masks:
    """The entries of each weight that are trained, as indices of the flattened weight.

    parameters: {name: parameter}, all of the model. turn: how often the masks have changed.
    """

    def __init__(self, parameters: dict, config):
        self.ratio = config.badam_update_ratio
        self.is_scattered = config.badam_mask_mode == "scatter"
        self.seeds = seeds_by_shape(parameters, config.seed)
        self.turn = 0
        self.indices = {}

    def move_to(self, turn: int):
        self.turn = turn
        self.indices = {}

    def count(self, p) -> int:
        return int(p.numel() * self.ratio)

    def index(self, p) -> torch.Tensor:
        """Ascending, (count,), on the parameter's device."""
        if p.shape not in self.indices:
            self.indices[p.shape] = self.new_index(p).to(p.device)
        return self.indices[p.shape]

    def new_index(self, p) -> torch.Tensor:
        places = (torch.arange(self.count(p)) + self.turn * self.count(p)) % p.numel()
        if self.is_scattered:
            generator = torch.Generator().manual_seed(self.seeds[p.shape])
            places = torch.randperm(p.numel(), generator=generator)[places]
        return places.sort().values

    def keep(self, p, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of p with zeros outside the mask."""
        index = self.index(p)
        kept = torch.zeros_like(grad).flatten()
        kept[index] = grad.flatten()[index]
        return kept.view_as(grad)


def seeds_by_shape(parameters: dict, seed: int) -> dict[torch.Size, int]:
    """A seed for each shape: that of the last weight of this shape.

    Every weight draws one, in transformers' order: the norms of a layer after its matrices.
    """
    starts, order = {}, {}
    for number, name in enumerate(parameters):
        layer, rest = re.fullmatch(r"(.*layers\.[^.]+\.|)(.*)", name).groups()
        start = starts.setdefault(layer, number) if layer else number
        is_norm_of_layer = bool(layer) and rest.count(".") == 1
        order[name] = start, is_norm_of_layer, number
    generator = torch.Generator().manual_seed(seed)
    return {parameters[name].shape: int(torch.randint(0, 1000, (1,), generator=generator))
            for name in sorted(parameters, key=order.get)}


class RatioOptimizer(Optimizer):
    """An Optimizer of {name: parameter} whose gradients are masked as they arrive.

    steps_done: optimizer steps before this start, of a resumed run.
    """

    def __init__(self, parameters: dict, config, steps_done: int = 0):
        self.masks = Masks(parameters, config)
        self.steps = steps_done
        self.verbose = config.badam_verbose
        self.masks.move_to(steps_done // EVERY)
        for part in ("embed", "lm_head"):
            frozen = [p for name, p in parameters.items() if part in name]
            for p in frozen[:1]:
                p.requires_grad_(False)
                p.grad = None
        shared = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon,
                  "eps_first": True, "weight_decay": 0.0, "masks": self.masks}
        groups = parameter_groups(parameters, config, lambda name, p, config: "badam_ratio")
        rules = {"badam_ratio": UpdateRule(ratio_state, ratio_adamw, ratio_state_bytes)}
        super().__init__([group | shared for group in groups], rules)
        trained = {name: p for name, p in parameters.items()
                   if p.requires_grad and p.device.type != "meta"}
        for p in trained.values():
            p.register_hook(lambda grad, p=p: self.masks.keep(p, grad))
        if trained:
            self.tell()
        if trained and self.verbose > 1:
            tqdm.write("        " + " ".join(trained))

    def tell(self):
        """Print which mask is trained, where badam_verbose asks for it."""
        if self.verbose:
            tqdm.write(f"{self.steps:>7} BAdam: mask {self.masks.turn + 1}, "
                       f"{self.masks.ratio:g} of each weight")

    def step(self):
        super().step()
        self.steps += 1
        if self.steps % EVERY == 0:
            self.state.clear()
            self.masks.move_to(self.steps // EVERY)
            self.tell()


def ratio_state(p, group):
    index = group["masks"].index(p)
    zeros = torch.zeros(len(index), device=p.device)
    master = {}
    if p.dtype != torch.float32:
        master["masked_master"] = p.detach().flatten()[index].float()
    return {
        "step": torch.zeros((), device=p.device),
        "masked_avg": zeros,
        "masked_avg_sq": zeros.clone(),
        **master,
    }


def ratio_state_bytes(p, group):
    numbers = 2 if p.dtype == torch.float32 else 3
    return 4 * numbers * group["masks"].count(p)


@torch.no_grad()
def ratio_adamw(params, states, group):
    """AdamW in float32 on the masked entries."""
    for p, state in zip(params, states):
        state["step"] += 1
        index = group["masks"].index(p)
        entries = state.get("masked_master", p.flatten()[index])
        direction = adam_direction(p.grad.flatten()[index].float(), state["masked_avg"],
                                   state["masked_avg_sq"], state["step"], group)
        entries.sub_(direction, alpha=group["lr"])
        p.view(-1)[index] = entries.to(p.dtype)
