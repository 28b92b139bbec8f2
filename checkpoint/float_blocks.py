"""Block-scaled floating point matrices: MXFP4, and FP8 in blocks.

    mxfp4   32 consecutive inputs share a power-of-two scale. A value has 4 bits (E2M1): 0, 0.5, 1,
            1.5, 2, 3, 4 or 6, with a sign. A byte has two values, the first in its low half
    fp8     a block, mostly 128 x 128, shares a scale. A value is float8_e4m3; the last block of a
            row or column may be smaller

Rounding is to nearest, ties to the even code. Rounding a rounded matrix again does not change it
in MXFP4, nor in FP8 if the largest value of each block has the largest code.

Requires: nothing.
Next: checkpoint/block_files.py.
Formats: OCP Microscaling Formats (MX) v1.0; FP8 arXiv:2209.05433, in blocks arXiv:2412.19437
(sec. 3.3.2).
"""
# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch

GROUP = 32                          # values of MXFP4 that share a scale
BIAS = 127                          # of a stored exponent
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)         # by code; 8 to 15 are their negatives
# midpoints between neighboring values; a tie goes to the even code
HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max


# ---- MXFP4 --------------------------------------------------------------------------------------


def dequantize_mxfp4(codes, scales, dtype: torch.dtype):
    """codes (out, groups, 16) and scales (out, groups), uint8 -> the matrix (in, out)."""
    values = torch.tensor(E2M1 + tuple(-value for value in E2M1), device=codes.device)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1)                   # (out, groups, 16, 2)
    numbers = values[pairs.int()].flatten(-2)                               # (out, groups, 32)
    numbers = torch.ldexp(numbers, scales.int()[..., None] - BIAS)
    return numbers.flatten(1).T.to(dtype)


def quantize_mxfp4(matrix):
    """A matrix (in, out), float32 -> (codes, scales) with the shapes of dequantize_mxfp4.

    Each group uses one of two neighboring scales, the one with the smaller error: the lower scale
    clips values above 6, the higher one does not.
    """
    groups = matrix.T.reshape(matrix.shape[1], -1, GROUP)                   # (out, groups, 32)
    _, exponent = torch.frexp(groups.abs().amax(-1))                        # largest < 2**exponent
    low = (exponent - 3).clamp(-BIAS, BIAS)                                 # which makes it < 8
    found = []
    for shift in (0, 1):
        scales = (low + shift).clamp(max=BIAS)
        codes = nearest_e2m1(torch.ldexp(groups, -scales[..., None]))
        rounded = torch.ldexp(values_of_codes(codes), scales[..., None])
        found.append((codes, scales, (rounded - groups).square().sum(-1)))
    (low_codes, low_scales, low_error), (high_codes, high_scales, high_error) = found
    is_low = low_error <= high_error
    codes = torch.where(is_low[..., None], low_codes, high_codes)
    scales = torch.where(is_low, low_scales, high_scales)
    return codes[..., ::2] | codes[..., 1::2] << 4, (scales + BIAS).to(torch.uint8)


def nearest_e2m1(x):
    """The codes of the nearest values, uint8; ties go to the even code."""
    limits = torch.tensor(HALFWAY, device=x.device)
    odd = torch.arange(len(HALFWAY), device=x.device) % 2 == 1              # the next code is even
    limits = torch.where(odd, limits.nextafter(torch.zeros(())), limits)
    codes = torch.bucketize(x.abs().contiguous(), limits).to(torch.uint8)
    return codes | (x < 0).to(torch.uint8) << 3


def values_of_codes(codes):
    """The values of E2M1 codes."""
    magnitudes = torch.tensor(E2M1, device=codes.device)[(codes & 7).int()]
    return torch.where(codes > 7, -magnitudes, magnitudes)


# ---- FP8 in blocks ------------------------------------------------------------------------------


def dequantize_fp8_blocks(codes, scales, block: tuple[int, int], dtype: torch.dtype):
    """codes (out, in) and scales, one per block -> the matrix (out, in)."""
    return (codes.float() * of_each_number(scales, codes.shape, block)).to(dtype)


def quantize_fp8_blocks(matrix, block: tuple[int, int], scale_dtype: torch.dtype,
                        powers_of_two: bool = False):
    """A matrix (out, in), float32 -> (codes, scales).

    The largest value of a block gets the largest code. powers_of_two: round scales up to powers of
    two.
    """
    rows, columns = matrix.shape
    padded = matrix.new_zeros(-(-rows // block[0]) * block[0], -(-columns // block[1]) * block[1])
    padded[:rows, :columns] = matrix.abs()
    largest = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3))
    scales = largest / LARGEST_FP8
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))       # a block of zeros
    if powers_of_two:
        scales = torch.exp2(torch.log2(scales).ceil())
    scales = scales.to(scale_dtype)
    codes = matrix / of_each_number(scales, matrix.shape, block)
    return codes.clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8), scales


def of_each_number(scales, shape, block: tuple[int, int]):
    """The scale of each element of a matrix of this shape, float32."""
    rows = scales.float().repeat_interleave(block[0], 0)[:shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, :shape[1]]
