"""BAdam: AdamW on one layer at a time, whose gradients and optimizer state alone exist.

    optimizer = BlockOptimizer(parameters, config, steps_done)

A block is a layer of the decoder; embedding, last norm and head are not trained. After every
badam_switch_interval steps the next block has its turn, in the order of badam_switch_mode, with an
AdamW that starts anew. Weights in 16 bits have a float32 copy for as long as their block is
trained.

Requires: optim.py.
Next: runtime/build.py (build_optimizer).
Paper: BAdam arXiv:2404.02827 (algorithm 1). The steps at which blocks change and the weight decay
are those of the package badam 1.4, mode layer.
"""
import re

import torch
from tqdm import tqdm

from optim import Optimizer, UpdateRule, adamw_plain, parameter_groups

BADAM_WEIGHT_DECAY = 0.01       # of all weights: the package badam reads no weight_decay


class BlockOptimizer(Optimizer):
    """An Optimizer of {name: parameter}; parameters outside the active block need no gradient.

    steps_done: optimizer steps before this start, of a resumed run. Raises ValueError for a
    badam_start_block that the model does not have.
    """

    def __init__(self, parameters: dict, config, steps_done: int = 0):
        self.blocks = blocks_of(parameters)
        self.config = config
        if not 0 <= self.number_of_start() < len(self.blocks):
            raise ValueError(f"badam_start_block: {config.badam_start_block} is none of the blocks "
                             f"0 to {len(self.blocks) - 1}")
        shared = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon,
                  "weight_decay": BADAM_WEIGHT_DECAY, "blocks": len(self.blocks)}
        groups = parameter_groups(parameters, config, lambda name, p, config: "badam")
        rules = {"badam": UpdateRule(block_state, block_adamw, block_state_bytes)}
        super().__init__([group | shared for group in groups], rules)
        self.steps = steps_done
        self.parameters = parameters
        self.activate(self.number())

    def number_of_start(self) -> int:
        if self.config.badam_start_block is not None:
            return self.config.badam_start_block
        return len(self.blocks) - 1 if self.config.badam_switch_mode == "descending" else 0

    def turns(self) -> int:
        """How often the block has changed; the first turn is a step shorter, as in the package."""
        every = self.config.badam_switch_interval
        return 0 if every == -1 else (self.steps + 1) // every

    def number(self) -> int:
        """The block whose turn it is."""
        start, turns, mode = self.number_of_start(), self.turns(), self.config.badam_switch_mode
        if mode == "random":                    # a new order in each round
            round_number, place = divmod(turns, len(self.blocks))
            generator = torch.Generator().manual_seed(self.config.seed + round_number)
            return torch.randperm(len(self.blocks), generator=generator).tolist()[place]
        step = {"ascending": 1, "descending": -1, "fixed": 0}[mode]
        return (start + step * turns) % len(self.blocks)

    def activate(self, number: int):
        """Let the parameters of this block have gradients, and no others."""
        for name, p in self.parameters.items():
            p.requires_grad_(name.startswith(self.blocks[number]))
            if not p.requires_grad:
                p.grad = None
        if self.config.badam_verbose and p.device.type != "meta":
            tqdm.write(f"{self.steps:>7} BAdam: trains {self.blocks[number]}*")
        if self.config.badam_verbose > 1 and p.device.type != "meta":
            trained = [name for name, p in self.parameters.items() if p.requires_grad]
            tqdm.write("        " + " ".join(trained))

    def step(self):
        super().step()
        before = self.turns()
        self.steps += 1
        if self.turns() != before:
            self.state.clear()
            self.activate(self.number())


def blocks_of(parameters: dict) -> list[str]:
    """The beginnings of the layers' names, as model.layers.0., in the order of the layers."""
    found = (re.match(r".*layers\.[^.]+\.", name) for name in parameters)
    return list(dict.fromkeys(match[0] for match in found if match))


def block_state(p, group):
    master = {} if p.dtype == torch.float32 else {"master": p.detach().float()}
    return {
        "step": torch.zeros((), device=p.device),
        "exp_avg": torch.zeros_like(p, dtype=torch.float32),
        "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32),
        **master,
    }


def block_state_bytes(p, group):
    """A block's share of all parameters: one block has a state at a time."""
    numbers = 2 if p.dtype == torch.float32 else 3
    return 4 * numbers * p.numel() // group["blocks"]


@torch.no_grad()
def block_adamw(params, states, group):
    """AdamW in float32."""
    masters = [state.get("master", p) for p, state in zip(params, states)]
    for p, master in zip(params, masters):
        if master is not p:
            master.grad = p.grad.float()
    adamw_plain(masters, states, group)
    for p, master in zip(params, masters):
        if master is not p:
            p.copy_(master)
            master.grad = None
