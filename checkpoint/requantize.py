"""Quantize a merged matrix into the format of its checkpoint: export_format: base.

    GPTQ, AWQ, compressed-tensors   per group: the stored scale and zero, or new ones from the
                                    group's minimum and maximum, whichever has the smaller error;
                                    columns stay in their groups (g_idx)
    bitsandbytes                    its own rounding, with the stored block sizes

Values are rounded to nearest: an adapter changes all columns of a matrix, and GPTQ would need the
calibration data again.

Requires: checkpoint/grouped_files.py, checkpoint/packed.py, checkpoint/write_gptq.py.
Next: exporting/base_format_export.py.
"""
# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch
import torch.nn.functional as F

from checkpoint.grouped_files import AWQ_ORDER, GroupedParts
from checkpoint.packed import Packed
from checkpoint.write_bnb import state_bytes
from checkpoint.write_gptq import pack_words


def requantize(stored: GroupedParts | Packed, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """{part: tensor as in the file} of the parts that change. matrix: (out, in) float32."""
    if isinstance(stored, Packed):
        return bnb_again(stored, matrix)
    weight = stored.read("cpu")
    codes, zeros, scales = nearest_grid(weight, matrix, lowest_zero(stored))
    pack = {"gptq": gptq_words, "awq": awq_words, "compressed-tensors": row_words}
    parts = pack[stored.settings.method](stored, codes, zeros, scales)
    return {part: tensor for part, tensor in parts.items() if part in stored.parts}


def bnb_again(stored: Packed, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a matrix in the format of bitsandbytes."""
    form = stored.quant_format
    weight = form.quantize(matrix.to(form.dtype))
    parts = {part: getattr(weight, part) for part in form.tensors(stored.shape)
             if part in stored.parts}
    if "state" in stored.parts:
        offset = float(weight.nested_offset) if form.nested else 0.0
        parts["state"] = state_bytes(stored.shape, form.dtype, offset, form)
    return parts


def state_length(stored: Packed) -> int:
    """Bytes of the state that bnb_again writes."""
    return len(state_bytes(stored.shape, stored.quant_format.dtype, 0.0, stored.quant_format))


# ---- scales and zeros of groups -----------------------------------------------------------------


def lowest_zero(stored: GroupedParts) -> int:
    """The smallest zero point that the file can store: `gptq` stores the zero minus one."""
    return 1 if stored.settings.zeros_minus_one else 0


def nearest_grid(weight, matrix: torch.Tensor, lowest: int) -> tuple:
    """(codes (out, in), zeros (out, groups) uint8, scales) nearest to a matrix.

    weight: the GroupedWeight that is stored.
    """
    width = weight.quant_format.width
    columns = columns_of(weight)
    scales, zeros = weight.scales.float(), weight.zeros.float()
    middle = 2 ** (width - 1)
    symmetric = bool((zeros == middle).all())               # kernels may require it
    new_scales, new_zeros = fitted_grid(matrix, columns, scales.shape[1], width,
                                        middle if symmetric else None, lowest)
    new_scales = new_scales.to(weight.scales.dtype).float()
    errors = [squared_errors(matrix, columns, grid_scales, grid_zeros, width)
              for grid_scales, grid_zeros in ((scales, zeros), (new_scales, new_zeros))]
    stays = (errors[0] <= errors[1]) & (zeros >= lowest)                        # (out, groups)
    scales = torch.where(stays, scales, new_scales)
    zeros = torch.where(stays, zeros, new_zeros)
    codes = codes_on_grid(matrix, columns, scales, zeros, width)
    return codes.to(torch.uint8), zeros.to(torch.uint8), scales.to(weight.scales.dtype)


def columns_of(weight) -> torch.Tensor:
    """The group of each column, (in,) int64."""
    if weight.quant_format.with_columns:
        return weight.columns.long()
    return torch.arange(weight.shape[1]) // weight.quant_format.group_size


def fitted_grid(matrix: torch.Tensor, columns: torch.Tensor, groups: int, width: int,
                middle: int | None, lowest: int) -> tuple:
    """(scales, zeros) (out, groups) float32 that cover each group's minimum and maximum.

    middle: the zero of a symmetric grid, or None.
    """
    steps = 2**width - 1
    index = columns[None].expand(len(matrix), -1)
    bounds = matrix.new_zeros(len(matrix), groups)          # 0 is always on the grid
    low = bounds.scatter_reduce(1, index, matrix, "amin")
    high = bounds.scatter_reduce(1, index, matrix, "amax")
    if middle is not None:
        scales = 2 * torch.maximum(-low, high) / steps
        return usable_scales(scales), torch.full_like(scales, middle)
    scales = usable_scales((high - low) / steps)
    return scales, (-low / scales).round().clamp(lowest, steps)


def usable_scales(scales: torch.Tensor) -> torch.Tensor:
    """The scales, with 1 for a group of zeros."""
    return torch.where(scales < torch.finfo(torch.float16).smallest_normal,
                       torch.ones_like(scales), scales)


def codes_on_grid(matrix: torch.Tensor, columns: torch.Tensor, scales: torch.Tensor,
                  zeros: torch.Tensor, width: int) -> torch.Tensor:
    """The nearest codes, (out, in) float32."""
    steps = (matrix / scales[:, columns]).round() + zeros[:, columns]
    return steps.clamp(0, 2**width - 1)


def squared_errors(matrix: torch.Tensor, columns: torch.Tensor, scales: torch.Tensor,
                   zeros: torch.Tensor, width: int) -> torch.Tensor:
    """The sum of squared rounding errors of each group, (out, groups)."""
    codes = codes_on_grid(matrix, columns, scales, zeros, width)
    values = (codes - zeros[:, columns]) * scales[:, columns]
    index = columns[None].expand(len(matrix), -1)
    return torch.zeros_like(scales).scatter_add(1, index, (values - matrix).square())


# ---- layouts ------------------------------------------------------------------------------------


def gptq_words(stored: GroupedParts, codes, zeros, scales) -> dict[str, torch.Tensor]:
    """By GPTQ: codes down the columns."""
    width = stored.quant_format.width
    if stored.settings.zeros_minus_one:
        zeros = (zeros.int() - 1).clamp(0).to(torch.uint8)
    return {"codes": pack_words(codes, width).T, "scales": scales.T,
            "zeros": pack_words(zeros.T, width)}


def awq_words(stored: GroupedParts, codes, zeros, scales) -> dict[str, torch.Tensor]:
    """By AWQ: along the outputs, eight codes of a word in the order AWQ_ORDER."""
    def ordered(numbers):
        rows = numbers.T.reshape(numbers.shape[1], -1, len(AWQ_ORDER))
        return pack_words(rows[..., list(AWQ_ORDER)].flatten(1), stored.quant_format.width)

    return {"codes": ordered(codes), "zeros": ordered(zeros), "scales": scales.T}


def row_words(stored: GroupedParts, codes, zeros, scales) -> dict[str, torch.Tensor]:
    """By compressed-tensors: codes along the rows, zeros down the outputs."""
    width = stored.quant_format.width
    whole = -zeros.shape[0] % (32 // width)
    return {"codes": pack_words(codes, width), "scales": scales,
            "zeros": pack_words(F.pad(zeros.T, (0, whole)), width).T}
