"""GPTQ: round a matrix to few bits, column by column, and let later columns make up for each error.

    W      (out, in)    the matrix of a linear layer, y = W x
    H      (in, in)     the sum of x xᵀ over the layer's inputs on some text
    error  tr((W - Q) H (W - Q)ᵀ)       the sum of |W x - Q x|² over these inputs

Rounding each number to the nearest one of the grid minimizes |W - Q|², which is another sum: inputs
are correlated, and an error in one column can be made up for in others. GPTQ goes through the
columns from left to right. Column j is rounded to the nearest; the best change of all columns after
it, which are not rounded yet, is known in closed form (eq. 2 of the paper, of the Optimal Brain
Surgeon). With U, the upper Cholesky factor of the inverse, H⁻¹ = Uᵀ U, it is

    e = (w_j - q_j) / U_jj                                      (out,)
    w_k = w_k - e U_jk      for all k > j

since row j of U is what is needed of the inverse of H without the columns before j. These changes
are made as matmuls, of several columns at once: in a group (128 columns, which share a scale for
each row) from its left half to its right half, and so on within each half (round_columns); and from
a group to all later ones. A group's scales are set when its turn comes, from the columns as they
have become.

With act-order (desc_act) the columns with the largest inputs are quantized first, while most other
columns can still compensate for their errors. A group is then 128 columns that follow each other in
this order, not in the matrix.

The grid is symmetric: code c of 2^bits stands for scale * (c - 2^(bits - 1)), and the scale is
chosen so that the largest number of a row's group fits.

Requires: methods/grouped.py (what codes, zeros and scales mean).
Next: exporting/gptq_export.py (inputs of the layers, block by block), checkpoint/write_gptq.py.
Papers: GPTQ arXiv:2210.17323, algorithm 1; Optimal Brain Compression arXiv:2208.11580.
"""
from typing import NamedTuple

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

DAMPING = 0.1           # share of the mean of H's diagonal that is added to the diagonal
SCALE_DTYPE = torch.float16
SMALLEST_SCALE = 2.0**-24       # of float16


class Rounded(NamedTuple):
    """A quantized matrix (out, in)."""
    codes: torch.Tensor         # (out, in) uint8
    scales: torch.Tensor        # (out, groups) SCALE_DTYPE
    zero: int                   # the code of 0
    columns: torch.Tensor       # (in,) int32: the group of each column

    def dequantize(self) -> torch.Tensor:
        """The matrix, float32: the values that a reader of the file gets."""
        values = self.codes.float() - self.zero
        return (values * self.scales.float()[:, self.columns]).to(SCALE_DTYPE).float()


# ---- the grid -----------------------------------------------------------------------------------


def scales_of_group(columns: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale of each row of a group (out, n), rounded to what a file holds; (out,) float32.

    The range from -largest to largest has 2^bits - 1 steps.
    """
    largest = columns.abs().amax(1)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    scales = 2 * largest / (2**bits - 1)
    return scales.clamp(min=SMALLEST_SCALE).to(SCALE_DTYPE).float()


def nearest_codes(values: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes of values, float32; scales broadcast."""
    zero = 2 ** (bits - 1)
    return ((values / scales).round() + zero).clamp(0, 2**bits - 1)


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> Rounded:
    """The plain way, for comparison: each number becomes the nearest of its group's grid."""
    codes = []
    scales = []
    for columns in weight.float().split(group_size, 1):
        scales.append(scales_of_group(columns, bits))
        codes.append(nearest_codes(columns, scales[-1][:, None], bits))
    return rounded_of(codes, scales, bits, group_size)


def rounded_of(codes: list, scales: list, bits: int, group_size: int) -> Rounded:
    """The matrix of some groups of columns."""
    joined = torch.cat(codes, 1).to(torch.uint8)
    columns = torch.arange(joined.shape[1], device=joined.device, dtype=torch.int32)
    return Rounded(
        codes=joined,
        scales=torch.stack(scales, 1).to(SCALE_DTYPE),
        zero=2 ** (bits - 1),
        columns=columns // group_size,
    )


def act_order(hessian: torch.Tensor) -> torch.Tensor:
    """The columns in the order of their inputs' mean square, largest first: (in,) int64."""
    return hessian.diagonal().argsort(descending=True, stable=True)


# ---- GPTQ ---------------------------------------------------------------------------------------


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """U, upper triangular, with Uᵀ U = the inverse of the damped H; (in, in).

    A column whose input was always 0 gets a 1 on the diagonal: it is rounded to the nearest, and
    changes no other. Raises ValueError for an H that is not finite.
    """
    if not hessian.isfinite().all():
        raise ValueError("the inputs of a layer hold NaN or infinity on this text; are the weights "
                         "damaged?")
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    unused = diagonal == 0
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    while True:
        # each step in place, for the memory; .mT, the same matrix, lies in LAPACK's order
        matrix = hessian.clone().mT
        matrix.diagonal().add_(damping * mean)
        matrix.diagonal()[unused] = 1
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not failed:
            torch.cholesky_inverse(matrix, out=matrix)
            torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
        if not failed:
            return matrix
        damping *= 10           # float32 was too coarse: nearer to rounding to the nearest


def gptq(weight: torch.Tensor, factor: torch.Tensor, bits: int, group_size: int,
         order: torch.Tensor | None = None) -> Rounded:
    """Algorithm 1 of the paper; weight (out, in), factor: inverse_factor of the inputs' H.

    order (in,): the columns in the order of quantization, as in H; None: from left to right.
    """
    rest = weight.float().clone()               # what is not rounded yet, as changed so far
    if order is not None:
        rest = rest[:, order]
    codes = []
    scales = []
    for start in range(0, rest.shape[1], group_size):
        group = slice(start, start + group_size)
        later = slice(start + group_size, None)
        columns = rest[:, group]
        scales.append(scales_of_group(columns, bits))
        group_codes, errors = round_group(columns, factor[group, group], scales[-1], bits)
        codes.append(group_codes)
        rest[:, later].addmm_(errors, factor[group, later], alpha=-1)
    rounded = rounded_of(codes, scales, bits, group_size)
    if order is None:
        return rounded
    back = order.argsort()
    return rounded._replace(codes=rounded.codes[:, back], columns=rounded.columns[back])


def round_group(columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor,
                bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, errors) of the columns (out, n) of a group."""
    columns = columns.T.contiguous()            # the numbers of a column side by side
    codes = torch.empty_like(columns)
    errors = torch.empty_like(columns)
    round_columns(columns, factor, scales, bits, codes, errors)
    return codes.T, errors.T


def round_columns(columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, bits: int,
                  codes: torch.Tensor, errors: torch.Tensor):
    """Fill codes and errors (n, out) of columns (n, out): the left half, then the right half.

    The left half's errors change the right half in one matmul, so a column changes a few times in
    place of n times.
    """
    size = len(columns)
    if size == 1:
        codes[0] = nearest_codes(columns[0], scales, bits)
        difference = columns[0] - (codes[0] - 2 ** (bits - 1)) * scales
        errors[0] = difference / factor[0, 0]
        return
    left, right = slice(None, size // 2), slice(size // 2, None)
    round_columns(columns[left], factor[left, left], scales, bits, codes[left], errors[left])
    columns[right].addmm_(factor[left, right].T, errors[left], alpha=-1)
    round_columns(columns[right], factor[right, right], scales, bits, codes[right], errors[right])


def output_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(D H Dᵀ) of D = W - Q: the sum of squared errors of the layer's outputs."""
    return float(((difference @ hessian) * difference).sum())
