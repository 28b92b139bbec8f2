"""Frozen weights in 4 or 8 bits: bitsandbytes' layout and its numbers, bit for bit.

    python -m methods.quant         the formats on this machine: bits a weight, error, time

    nf4, fp4   blocks of 64 numbers, in row-major order: each is divided by the block's largest and
               rounded to the nearest of 16 values; two codes a byte, the first in the high half.
               Double quantization stores the blocks' scales in 8 bits, too: 4.127 bits a weight
               instead of 4.5
    int8       each row divided by its largest, times 127, rounded: the weights of LLM.int8;
               activations stay exact

A layer with such a matrix has a `QuantizedWeight` as its weight. It is no tensor: its
`dequantize(dtype)` makes the ordinary matrix for each matmul, forward and backward, and it is not
kept. So training beside 4-bit weights (QLoRA) needs the memory of 4 bits, and of one matrix.

Requires: errors.py.
Next: checkpoint/packed.py (reading such files), methods/grouped.py.
Papers: QLoRA arXiv:2305.14314 (sec. 3; NF4: appendix E), LLM.int8 arXiv:2208.07339 (sec. 2), the
8-bit map of scales arXiv:2110.02861 (sec. 2). Layout and rounding: bitsandbytes 0.50.
"""
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

# first: a missing package ends in a sentence
from errors import first_line

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
FP4 = tuple(sign * twelfths / 12 for sign in (1, -1)
            for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))     # by code
VALUES = {"nf4": NF4, "fp4": FP4}
KINDS = (*VALUES, "int8")
SMALLEST = 1e-38            # least value of a block's largest number, to divide by
PIECE = 2**17               # numbers packed or unpacked at once: they stay in a core's cache
PIECE_ON_GPU = 2**23


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix is stored."""
    kind: str                           # one of KINDS
    blocksize: int = 64                 # numbers that share a scale
    nested: int = 256                   # scales that share one; 0: scales are float32 numbers
    dtype: torch.dtype | None = None    # of the original matrix; None: of the one to be quantized
    offsets: int = 0                    # of matrices in one weight, each with its own nested_offset

    def tensors(self, shape) -> dict[str, tuple[tuple, torch.dtype]]:
        """{name: (shape, dtype)} of the tensors that store a matrix of this shape (out, in)."""
        if self.kind == "int8":
            return {"codes": (tuple(shape), torch.int8), "absmax": (shape[:1], torch.float32)}
        count = math.prod(shape)
        blocks = -(-count // self.blocksize)
        found = {
            "codes": ((-(-count // 2),), torch.uint8),
            "quant_map": ((16,), torch.float32),
        }
        if not self.nested:
            return found | {"absmax": ((blocks,), torch.float32)}
        return found | {
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // self.nested),), torch.float32),
            "nested_quant_map": ((256,), torch.float32),
            "nested_offset": ((self.offsets,) if self.offsets else (), torch.float32),
        }

    def of_joined(self, shape, count: int) -> "QuantFormat | None":
        """The format of `count` matrices of a shape below each other; None: a block has two."""
        if self.kind == "int8":
            return self
        block = self.blocksize * max(1, self.nested)
        if math.prod(shape) % block:
            return None
        return replace(self, offsets=count) if self.nested else self

    def bits(self) -> float:
        """Bits per weight of a large matrix; for int8 without its scales, one per row."""
        if self.kind == "int8":
            return 8.0
        bits_of_scale = 8 + 32 / self.nested if self.nested else 32
        return 4 + bits_of_scale / self.blocksize

    def quantize(self, matrix) -> "QuantizedWeight":
        """A matrix (out, in) in this format."""
        return quantize(matrix, self)

    def empty(self, shape) -> "QuantizedWeight":
        """A matrix of this shape on the meta device, without storage."""
        tensors = {name: torch.empty(size, dtype=dtype, device="meta")
                   for name, (size, dtype) in self.tensors(shape).items()}
        return QuantizedWeight(self, shape, **tensors)


class FrozenWeight(nn.Module):
    """A frozen matrix (out, in) that is stored as the tensors of its format, its buffers.

    As a layer's `weight` it has a tensor's shape, dtype, device, numel() and nbytes.
    """

    requires_grad = False

    def __init__(self, quant_format, shape, **tensors):
        super().__init__()
        self.quant_format = quant_format
        self.shape = torch.Size(shape)
        for name, (size, dtype) in quant_format.tensors(shape).items():
            tensor = tensors[name]
            assert tensor.shape == size and tensor.dtype == dtype, (name, tensor.shape, size)
            self.register_buffer(name, tensor)

    dtype = property(lambda self: self.quant_format.dtype)
    device = property(lambda self: self.codes.device)
    is_meta = property(lambda self: self.codes.is_meta)
    nbytes = property(lambda self: sum(buffer.nbytes for buffer in self.buffers()))

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return len(self.shape)

    def joins(self, weights: list) -> bool:
        """Whether these weights, self the first of them, can be read at once."""
        alike = {(type(each), each.quant_format, each.shape) for each in weights}
        return len(alike) == 1 and self.quant_format.of_joined(self.shape, len(weights)) is not None

    def joined(self, weights: list) -> "FrozenWeight":
        """One weight (E * out, in) of E weights that join; their tensors become views of its own.
        """
        quant_format = self.quant_format.of_joined(self.shape, len(weights))
        shape = (len(weights) * self.shape[0], *self.shape[1:])
        tensors = {}
        for name, (size, _) in quant_format.tensors(shape).items():
            parts = [each._buffers[name] for each in weights]
            if size == parts[0].shape:                          # a map of values
                tensors[name] = parts[0]
                continue
            tensors[name] = torch.stack(parts)
            for each, part in zip(weights, tensors[name]):
                each._buffers[name] = part
            tensors[name] = tensors[name].view(size)
        made = type(self)(quant_format, shape, **tensors)
        made.first = (self,)
        return made

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.quant_format.kind}"

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():      # .to(dtype) does not concern codes, scales
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def as_linear(self, bias=None) -> nn.Linear:
        """The linear layer with this weight."""
        return QuantLinear(self, bias)


class QuantizedWeight(FrozenWeight):
    """A frozen matrix (out, in) in bitsandbytes' 4 or 8 bits. compiled: see compile_dequantize.

    first: (the first of the joined weights), whose compiled kernel is used.
    """

    compiled = None
    first = ()

    def __init__(self, quant_format: QuantFormat, shape, **tensors):
        super().__init__(quant_format, shape, **tensors)
        if quant_format.kind != "int8":
            self.register_buffer("pairs", pairs_of(self.quant_map), persistent=False)

    def scales(self):
        """The largest number of each block, (blocks,) float32."""
        if not self.quant_format.nested:
            return self.absmax
        outer = self.nested_absmax.repeat_interleave(self.quant_format.nested)[:len(self.absmax)]
        inner = self.nested_quant_map.index_select(0, self.absmax.int())
        offset = self.nested_offset
        if self.quant_format.offsets:
            offset = offset.repeat_interleave(len(inner) // self.quant_format.offsets)
        return inner * outer + offset

    def dequantize(self, dtype: torch.dtype | None = None):
        """The matrix (out, in), computed at each call.

        From 4 bits it is rounded to the dtype it had before quantization, as bitsandbytes does,
        then to `dtype` (None: that one).
        """
        out_dtype = dtype or self.dtype
        if self.quant_format.kind == "int8":
            return unpack_rows(self.codes, self.absmax, out_dtype)
        whole_blocks = self.numel() % self.quant_format.blocksize == 0
        compiled = self.first[0].compiled if self.first else self.compiled
        if compiled and whole_blocks:       # the compiler would omit the first of two roundings
            matrix = compiled(self.codes, self.scales(), self.pairs, self.dtype)
            return matrix.view(self.shape).to(out_dtype)
        unpack = unpack_in_pieces if whole_blocks else unpack_any
        matrix = unpack(self.codes, self.scales(), self.pairs, self.numel(),
                        self.quant_format.blocksize, self.dtype, out_dtype)
        return matrix.view(self.shape)

    def dequantize_bytes(self, device, itemsize: int) -> int:
        """Memory that `dequantize` takes: the matrix, and the piece that is unpacked at once."""
        piece = min(self.numel(), piece_size(device, 2))
        return itemsize * self.numel() + 6 * piece


# ---- 4 bits -------------------------------------------------------------------------------------


def values_of(kind: str, device=None):
    """The 16 values of a 4-bit format by their codes, float32."""
    return torch.tensor(VALUES[kind], dtype=torch.float32, device=device) + 0.0     # -0 becomes +0


def map_of_scales(device=None):
    """The 256 values of an 8-bit scale, ascending (arXiv:2110.02861, sec. 2).

    For each of 7 powers of ten, the middles of 2**i equal parts of 0.1 to 1, of both signs; 0 and
    1. One bit of the eight is the sign.
    """
    positive = []
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        positive += (10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)).tolist()
    negative = [-value for value in positive]
    return torch.tensor(sorted([0.0, 1.0, *positive, *negative]), device=device)


def nearest(x, values):
    """Index of the nearest of `values` (ascending), uint8; ties go to the lower index."""
    middles = (values[:-1] + values[1:]) / 2
    if len(middles) > 15:
        return torch.bucketize(x, middles).to(torch.uint8)
    index = torch.zeros_like(x)
    above = torch.empty_like(x)
    for middle in middles.tolist():         # for so few, counting is several times faster
        index += torch.gt(x, middle, out=above)
    return index.to(torch.uint8)


def quantize_blocks(flat, blocksize: int, values):
    """(indices of the nearest values, largest numbers of the blocks) of float32 numbers.

    A number is multiplied by 1 / largest, but in an incomplete last block divided by it: so
    bitsandbytes rounds.
    """
    blocks, rest = divmod(len(flat), blocksize)
    complete = flat[:blocks * blocksize].view(blocks, blocksize)
    largest = complete.abs().amax(1) if blocks else flat[:0]
    inverse = 1 / largest.clamp(min=SMALLEST)
    scaled = (complete * inverse[:, None]).clamp_(-1, 1).view(-1)
    if rest:
        last = flat[blocks * blocksize:]
        largest = torch.cat([largest, last.abs().max()[None]])
        scaled_last = (last / largest[-1].clamp(min=SMALLEST)).clamp_(-1, 1)
        scaled = torch.cat([scaled, scaled_last])
    return nearest(scaled, values), largest


def quantize_scales(scales, group: int) -> dict:
    """Scales in 8 bits, as QuantFormat.tensors names the parts.

    Their mean is subtracted, each group divided by its largest, and rounded to the nearest of 256
    values. As in bitsandbytes, numbers are first rounded to 65,535 equal steps from -1 to 1;
    1 / largest may be infinite, and where all scales are equal the code is 0.
    """
    offset = scales.mean()
    values = map_of_scales(scales.device)
    grouped = F.pad(scales - offset, (0, -len(scales) % group)).view(-1, group)
    largest = grouped.abs().amax(1)
    scaled = (grouped * (1 / largest)[:, None]).clamp_(-1, 1).view(-1)[:len(scales)]
    steps = ((scaled + 1) * (65_535 / 2)).round_() / (65_535 / 2) - 1
    return {
        "absmax": nearest(steps.nan_to_num(nan=-1.0), values),
        "nested_absmax": largest,
        "nested_quant_map": values,
        "nested_offset": offset,
    }


@torch.no_grad()
def quantize(matrix, quant_format: QuantFormat) -> QuantizedWeight:
    """Quantize a matrix (out, in), on its device; in pieces, so that it has no float32 copy."""
    quant_format = replace(quant_format, dtype=quant_format.dtype or matrix.dtype)
    kind, blocksize = quant_format.kind, quant_format.blocksize
    if kind == "int8":
        return quantize_rows(matrix, quant_format)
    device = matrix.device
    values, code_of = values_of(kind, device).sort(stable=True)     # fp4 has a second zero
    zero = VALUES[kind].index(0.0)
    codes, largest = [], []
    for piece in matrix.reshape(-1).split(piece_size(device, blocksize)):
        indices, scales = quantize_blocks(piece.float(), blocksize, values)
        nibbles = code_of.to(torch.uint8).index_select(0, indices.int())
        nibbles = F.pad(nibbles, (0, len(piece) % 2), value=zero)
        codes.append(nibbles[0::2] << 4 | nibbles[1::2])
        largest.append(scales)
    absmax = torch.cat(largest)
    scales = {"absmax": absmax}
    if quant_format.nested:
        scales = quantize_scales(absmax, quant_format.nested)
    return QuantizedWeight(quant_format, matrix.shape, codes=torch.cat(codes),
                           quant_map=values_of(kind, device), **scales)


def piece_size(device, blocksize: int) -> int:
    """Numbers to work on at once: complete blocks."""
    piece = PIECE if torch.device(device).type == "cpu" else PIECE_ON_GPU
    return max(1, piece // (2 * blocksize)) * 2 * blocksize


def pairs_of(quant_map):
    """(256,) int64: for each byte the bits of its two float32 numbers."""
    if quant_map.is_meta:                       # torch takes milliseconds for a stack of nothing
        return torch.empty(256, dtype=torch.int64, device="meta")
    byte = torch.arange(256, device=quant_map.device)
    pairs = torch.stack((quant_map[byte >> 4], quant_map[byte & 15]), dim=1)
    return pairs.view(torch.int64).view(-1)


def unpack_any(codes, scales, pairs, count: int, blocksize: int, dtype, out_dtype):
    """`count` numbers: value times scale in float32, rounded to `dtype`, then to `out_dtype`.

    The plain twin of the next two, and the only one for incomplete blocks.
    """
    values = pairs.view(torch.float32).view(256, 2)[codes.long()].view(-1)[:count]
    return (values * scales.repeat_interleave(blocksize)[:count]).to(dtype).to(out_dtype)


def unpack_in_pieces(codes, scales, pairs, count: int, blocksize: int, dtype, out_dtype):
    """The same for complete blocks: one look-up per byte, in pieces that stay in the cache."""
    out = torch.empty(count, dtype=out_dtype, device=codes.device)
    piece = piece_size(codes.device, blocksize)
    for start in range(0, count, piece):
        end = min(start + piece, count)
        both = pairs.index_select(0, codes[start // 2:end // 2].int())
        values = both.view(torch.float32).view(-1, blocksize)
        values.mul_(scales[start // blocksize:end // blocksize, None])
        out[start:end].view(-1, blocksize).copy_(values if dtype == out_dtype else values.to(dtype))
    return out


def unpack_at_once(codes, scales, pairs, dtype):
    """The same as one expression, for a compiler: codes a row for each scale, pairs (256, 2)."""
    return (pairs[codes.int()].flatten(1) * scales[:, None]).to(dtype)


@torch.no_grad()
def compile_dequantize(model: nn.Module, compiler: Callable) -> str:
    """Dequantize the 4-bit weights of a model by one compiled kernel. Returns a line to print.

    compiler: fast.compile.compile_tokens. The kernel is tried first, and must give the same bits;
    otherwise nothing changes. "" if the model has no such weights.
    """
    weights = [module for module in model.modules()
               if isinstance(module, QuantizedWeight) and module.quant_format.kind != "int8"]
    if not weights:
        return ""
    tried = min(weights, key=QuantizedWeight.numel)
    tried.compiled = None
    exact = tried.dequantize()
    try:
        compiled = compiler(unpack_at_once, tensors=2)

        def unpack(codes, scales, pairs, dtype):
            rows = codes.view(len(scales), -1)
            return compiled(rows, scales, pairs.view(torch.float32).view(256, 2), dtype)

        tried.compiled = unpack
        same_bits = torch.equal(tried.dequantize(), exact)
        reason = "gives other numbers"
    except Exception as refusal:        # of many kinds, and none must end a training
        same_bits = False
        reason = f"does not work here ({first_line(refusal)})"
    for weight in weights:
        weight.compiled = unpack if same_bits else None
    if same_bits:
        return "4-bit weights: dequantized by one compiled kernel"
    return f"4-bit weights: dequantized in several steps; torch.compile {reason}"


# ---- 8 bits -------------------------------------------------------------------------------------


def quantize_rows(matrix, quant_format: QuantFormat) -> QuantizedWeight:
    """Rows times 127 / their largest number, rounded; rounded to float16 first, as bitsandbytes."""
    device = matrix.device
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=device)
    largest = torch.empty(len(matrix), device=device)
    step = rows_per_piece(matrix)
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        half = matrix[rows].half().float()
        largest[rows] = half.abs().amax(1)
        codes[rows] = half.mul_(127 / largest[rows, None].clamp(min=SMALLEST)).round_()
    return QuantizedWeight(quant_format, matrix.shape, codes=codes, absmax=largest)


def unpack_rows(codes, largest, dtype):
    """Codes times the largest number of their row, times 1 / 127, in this order; then rounded."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = rows_per_piece(codes)
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        out[rows] = codes[rows].float().mul_(largest[rows, None]).mul_(1 / 127)
    return out


def rows_per_piece(matrix) -> int:
    return max(1, piece_size(matrix.device, 1) // max(1, matrix.shape[1]))


# ---- layers -------------------------------------------------------------------------------------


class _QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_needs_grad, _, bias_needs_grad = ctx.needs_input_grad
        dx = dy @ ctx.weight.dequantize(dy.dtype) if x_needs_grad else None
        d_bias = dy.flatten(0, -2).sum(0) if bias_needs_grad else None
        return dx, None, d_bias


def quantized_matmul(x, weight: FrozenWeight, bias=None):
    """x (..., in) times the matrix (out, in) transposed -> (..., out).

    F.linear would keep the matrix for the backward pass; here it is dequantized again.
    """
    return _QuantizedMatmul.apply(x, weight, bias)


class QuantLinear(nn.Linear):
    """A frozen linear layer whose weight is a FrozenWeight."""

    def __init__(self, weight: FrozenWeight, bias=None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias

    def forward(self, x):
        return quantized_matmul(x, self.weight, self.bias)

    def matmul(self, x):
        """W x, without the bias."""
        return quantized_matmul(x, self.weight)

    def dequantized_weight(self, dtype: torch.dtype | None = None):
        """The matrix (out, in). dtype None: the one it was quantized from."""
        return self.weight.dequantize(dtype)

    def effective_weight(self):
        """The same, where this is a model's head."""
        return self.weight.dequantize()

    @property
    def format_name(self) -> str:
        return self.weight.quant_format.kind


# ---- python -m methods.quant --------------------------------------------------------------------


def main():
    """Print what the formats cost on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4096, 4096, generator=generator).bfloat16().to(device)
    x = torch.randn(2048, 4096, generator=generator).bfloat16().to(device)

    def milliseconds(call):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times)

    print(f"{device}: a matmul of 2048 tokens with a 4096 x 4096 matrix in bfloat16 takes "
          f"{milliseconds(lambda: x @ W.T):.2f} ms")
    for quant_format in (QuantFormat("nf4"), QuantFormat("nf4", nested=0), QuantFormat("fp4"),
                         QuantFormat("int8", nested=0)):
        packed = quantize(W, replace(quant_format, dtype=W.dtype))
        took = milliseconds(lambda: packed.dequantize(torch.bfloat16))
        error = (packed.dequantize(torch.float32) - W).norm() / W.norm()
        name = quant_format.kind + (" double" if quant_format.nested else "")
        print(f"{name:12}{8 * packed.nbytes / W.numel():6.3f} bits a weight, off by {error:.2%}, "
              f"dequantized in {took:.2f} ms")


if __name__ == "__main__":
    main()
