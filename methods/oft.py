"""OFT: W stays frozen; the layer computes W (R^T x), where R is a rotation that is trained.

    python train.py --config my.yaml finetuning_type=oft oft_block_size=32

LoRA adds a matrix of low rank to W; OFT turns the inputs of W, so that the angles between its
rows, and their norms, stay as they are. R is block-diagonal: each block turns oft_block_size
neighboring inputs among themselves. A block is stored as the numbers above the diagonal of a
skew-symmetric matrix Q, which starts as zeros, and Cayley's formula makes a rotation of it.

W R^T would be a large product in each step. The input is rotated instead (OFTv2): for each token
in * oft_block_size products, and the base is only called, so that it may hold its weight in 4 or
8 bits (QOFT). Names, shapes and formulas are those of PEFT 0.18 to 0.21.

Requires: lora.py.
Next: runtime/build.py.
Papers: OFT arXiv:2306.07280, OFTv2 and QOFT arXiv:2506.19847.
"""
import re
from dataclasses import dataclass

import torch
from torch import nn

from lora import AdaptedLinear, AdapterConfig, dequantized_weight


@dataclass
class OFTConfig(AdapterConfig):
    """What is rotated, and how: the supported fields of PEFT's adapter_config.json.

    One of r and oft_block_size is 0 and follows from the other: r * oft_block_size = inputs.
    """
    r: int = 0                          # number of blocks
    oft_block_size: int = 32            # inputs of a block
    module_dropout: float = 0.0         # kept in the file; PEFT's linear layers never apply it
    block_share: bool = False           # one rotation for all blocks
    use_cayley_neumann: bool = True     # Cayley's formula as a short series, not exactly

    finetuning_type = "oft"
    variant = "finetuning_type: oft"

    def settings(self) -> dict:
        """{key of a config: value} of what an adapter that is trained further decides."""
        return {
            "oft_rank": self.r,
            "oft_block_size": self.oft_block_size,
            "module_dropout": self.module_dropout,
            "oft_target": self.target_modules,
            "additional_target": self.modules_to_save,
        }

    @property
    def size(self) -> str:
        """What determines the adapter's shapes, for messages."""
        return f"r is {self.r} and oft_block_size {self.oft_block_size}"

    def blocks_of(self, inputs: int) -> tuple[int, int]:
        """(number of blocks, inputs of a block) of a layer: divisors of `inputs`."""
        if self.r:
            blocks = nearest_divisor(inputs, self.r)
            return blocks, inputs // blocks
        size = nearest_divisor(inputs, self.oft_block_size)
        return inputs // size, size


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`; of two equally near ones the lower."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


def oft_config(config, targets, modules_to_save: list[str]) -> OFTConfig:
    """The OFTConfig for the keys of a config. targets: see lora.find_targets."""
    return OFTConfig(
        r=config.oft_rank,
        oft_block_size=config.oft_block_size,
        module_dropout=config.module_dropout,
        target_modules=targets,
        modules_to_save=modules_to_save,
    )


def peft_fields_of_oft(config: OFTConfig) -> dict:
    """The fields of adapter_config.json that are OFT's own."""
    return {
        "peft_version": "0.18.0",       # the first one with this series
        "r": config.r,
        "oft_block_size": config.oft_block_size,
        "module_dropout": config.module_dropout,
        "block_share": config.block_share,
        "use_cayley_neumann": config.use_cayley_neumann,
        "num_cayley_neumann_terms": 5,
        "coft": False,
        "eps": 6e-5,
        "init_weights": True,
    }


# ---- rotations ----------------------------------------------------------------------------------


def skew_symmetric(numbers, size: int):
    """Q (blocks, size, size) from the numbers above its diagonal (blocks, size (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)
    upper = numbers.new_zeros(len(numbers), size, size)
    upper[:, rows, columns] = numbers
    return upper - upper.mT


def cayley(Q):
    """The rotations (I - Q)(I + Q)^-1 (arXiv:2306.07280, sec. 3.3)."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(identity + Q, identity - Q, left=False)


def cayley_neumann(Q):
    """Nearly the rotations (I + Q)(I - Q)^-1, without an inverse (arXiv:2506.19847, sec. 4.2).

    (I - Q)^-1 = I + Q + Q^2 + ..., cut off so that R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4. This is a
    rotation for small Q only: R R^T = I + O(Q^4). The sign of Q is the opposite of `cayley`'s, as
    in PEFT.
    """
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    Q2 = Q @ Q
    Q3 = Q2 @ Q
    return identity + 2 * (Q + Q2 + Q3) + Q3 @ Q


def rotations(numbers, block_size: int, series: bool = True):
    """R (blocks, block_size, block_size) in float32, from what is stored of Q."""
    with torch.autocast(numbers.device.type, enabled=False):
        Q = skew_symmetric(numbers.float(), block_size)
        return cayley_neumann(Q) if series else cayley(Q)


def rotate_blocks(x, R):
    """Multiply each block of the rows of x (…, in) by its R.

    R: (blocks, size, size), or (1, size, size) for all blocks; computed in x's dtype.
    """
    size = R.shape[-1]
    blocks = x.unflatten(-1, (-1, size))                                # (…, blocks, size)
    return torch.einsum("...bi,bij->...bj", blocks, R.to(x.dtype)).flatten(-2)


def rotated_weight(W, R):
    """W R^T in W's dtype, computed in float32: its product with x is W (R^T x)."""
    return rotate_blocks(W.float(), R.float().mT).to(W.dtype)


# ---- the layer ----------------------------------------------------------------------------------


class OFTRotation(nn.Module):
    """The trained rotation of a layer's inputs; its weight is what is stored of Q, by blocks."""

    def __init__(self, rows: int, block_size: int, series: bool, device=None):
        super().__init__()
        numbers = block_size * (block_size - 1) // 2
        self.weight = nn.Parameter(torch.zeros(rows, numbers, device=device))
        self.block_size = block_size
        self.series = series

    def matrices(self):
        """R (blocks, block_size, block_size) in float32."""
        return self.matrices_from(self.weight)

    def matrices_from(self, numbers):
        """The same from other numbers than its own."""
        return rotations(numbers, self.block_size, self.series)


class OFTLinear(AdaptedLinear):
    """A frozen linear layer whose input is rotated: y = W (R^T x) + bias."""

    fixed = None        # R, where it no longer changes

    def __init__(self, base_layer: nn.Module, blocks: int, block_size: int,
                 block_share: bool = False, series: bool = True, device=None):
        super().__init__(base_layer)
        rows = 1 if block_share else blocks
        self.oft_R = OFTRotation(rows, block_size, series, device or base_layer.weight.device)

    @classmethod
    def beside(cls, base: nn.Module, config: OFTConfig, name: str, generator=None, device=None):
        """The new rotation, which turns nothing yet, of a layer.

        name: as the checkpoint calls it. Raises ValueError for an expert or a router, which are no
        linear layers in transformers 5, and for a number of inputs that no block divides.
        """
        if re.search(r"\.(gate|router)$|\.experts\.", name):
            raise ValueError(f"{config.variant}: {name} is a router or an expert, which PEFT does "
                             "not rotate; leave it out of oft_target")
        blocks, block_size = config.blocks_of(base.in_features)
        if block_size == 1:
            raise ValueError(
                f"{config.variant}: {name} has {base.in_features} inputs, and the nearest that "
                f"divides them is {blocks} blocks of one input, which cannot be rotated; set "
                "another oft_block_size")
        return cls(base, blocks, block_size, config.block_share, config.use_cayley_neumann, device)

    def forward(self, x):
        return self.base_layer(rotate_blocks(x, self.rotation()) if self.enabled else x)

    def own_bytes(self, compute: int) -> int:
        """Bytes kept for the backward pass: Q, its powers, R, and where the numbers of Q go."""
        size = self.oft_R.block_size
        numbers = self.oft_R.weight.shape
        return numbers[0] * size ** 2 * (12 + compute) + 16 * numbers[1]

    def rotation(self):
        """R (blocks, block_size, block_size) in float32; gradients flow to the numbers of Q."""
        return self.oft_R.matrices() if self.fixed is None else self.fixed

    def fix(self):
        """Compute R once, for inference."""
        self.fixed = self.oft_R.matrices().detach()

    # ---- for merging, and where this is the model's head

    def effective_weight(self):
        """The matrix (out, in) with the rotation in it; gradients flow to the numbers of Q."""
        weight = dequantized_weight(self.base_layer)
        return rotated_weight(weight, self.rotation()) if self.enabled else weight

    @torch.no_grad()
    def merged(self):
        """The matrix with the rotation in it, computed in float32."""
        return rotated_weight(dequantized_weight(self.base_layer), self.rotation())
