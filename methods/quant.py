"""Frozen weights in 4 or 8 bits: the layout of bitsandbytes and bit for bit its numbers, in plain torch on any device.

    python -m methods.quant                     the formats on this machine: bits a weight, error, time against a product

    nf4, fp4   blocks of 64 numbers, in row-major order: each divided by the block's largest, then the nearest of 16
               values; two codes a byte, the first in the high half. Double quantisation stores the blocks' largest
               in 8 bits, too: 4.127 bits a weight in place of 4.5
    int8       each row divided by its largest, times 127, rounded: the weights of LLM.int8; activations stay exact

A layer whose matrix is stored so has a `Quantised` for its weight. It is no tensor: `dense(dtype)` makes the ordinary
matrix anew for every product, forward and backward, and nobody keeps it. So training beside 4-bit weights (QLoRA) needs
the memory of 4 bits, and a matrix more.

Read before: fast/fused_block.py, whose products ask for dense matrices. Read after: lora.py, checkpoint/load.py (reading such files).
Papers: QLoRA arXiv:2305.14314 (sec. 3; NF4: appendix E), LLM.int8 arXiv:2208.07339 (sec. 2), the 8-bit map of scales
arXiv:2110.02861 (sec. 2). Layout and rounding: bitsandbytes 0.50.
"""
import json
import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4 = tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))   # by code
VALUES = {"nf4": NF4, "fp4": FP4}
KINDS = (*VALUES, "int8")
SMALLEST = 1e-38            # what a block's largest number counts at least
PIECE = 2**17               # numbers that are unpacked or packed at once: they stay in a core's cache
PIECE_ON_GPU = 2**23


@dataclass(frozen=True)
class Form:
    """How a matrix is stored. blocksize: numbers that share a scale; nested: scales that share one, 0: scales are
    float32 numbers; dtype: of the matrix it stands for, None: of that which is quantised."""
    kind: str
    blocksize: int = 64
    nested: int = 256
    dtype: torch.dtype | None = None

    def tensors(self, shape) -> dict[str, tuple[tuple, torch.dtype]]:
        """{name: (shape, dtype)} of the tensors that store a matrix of this shape (out, in)."""
        if self.kind == "int8":
            return {"codes": (tuple(shape), torch.int8), "absmax": (shape[:1], torch.float32)}
        count, wide = math.prod(shape), torch.float32
        blocks = -(-count // self.blocksize)
        found = {"codes": ((-(-count // 2),), torch.uint8), "quant_map": ((16,), wide)}
        if not self.nested:
            return found | {"absmax": ((blocks,), wide)}
        return found | {"absmax": ((blocks,), torch.uint8), "nested_absmax": ((-(-blocks // self.nested),), wide),
                        "nested_quant_map": ((256,), wide), "nested_offset": ((), wide)}

    def bits(self) -> float:
        """Bits a weight of a large matrix; of int8, whose scales are one a row, without them."""
        if self.kind == "int8":
            return 8.0
        return 4 + (8 + 32 / self.nested if self.nested else 32) / self.blocksize


class Quantised(nn.Module):
    """A frozen matrix (out, in) in 4 or 8 bits: `form`, `shape`, and as buffers the tensors of Form.tensors.

    Where a layer's `weight` is one of these, these stand for the tensor's own: shape, dtype, device, numel(), nbytes.
    compiled: see compile_unpacking.
    """

    requires_grad, compiled = False, None

    def __init__(self, form: Form, shape, **tensors):
        super().__init__()
        self.form, self.shape = form, torch.Size(shape)
        for name, (size, dtype) in form.tensors(shape).items():
            assert tensors[name].shape == size and tensors[name].dtype == dtype, (name, tensors[name].shape, size)
            self.register_buffer(name, tensors[name])
        if form.kind != "int8":
            self.register_buffer("pairs", pairs_of(self.quant_map), persistent=False)

    dtype = property(lambda self: self.form.dtype)
    device = property(lambda self: self.codes.device)
    is_meta = property(lambda self: self.codes.is_meta)
    nbytes = property(lambda self: sum(buffer.nbytes for buffer in self.buffers()))

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return len(self.shape)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.form.kind}"

    def _apply(self, fn, recurse=True):
        for name, buffer in self._buffers.items():          # .to(dtype) is for what is stored as it is; scales stay
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def scales(self):
        """The largest number of each block, (blocks,) float32."""
        if not self.form.nested:
            return self.absmax
        of_scales = self.nested_absmax.repeat_interleave(self.form.nested)[:len(self.absmax)]
        return self.nested_quant_map.index_select(0, self.absmax.int()) * of_scales + self.nested_offset

    def dense(self, dtype: torch.dtype | None = None):
        """The matrix (out, in), made anew. From 4 bits it is rounded to the dtype it had before it was quantised, as
        bitsandbytes does it, then to `dtype` (None: that one)."""
        wanted = dtype or self.dtype
        if self.form.kind == "int8":
            return rows_in_pieces(self.codes, self.absmax, wanted)
        blocked = self.numel() % self.form.blocksize == 0
        if self.compiled and blocked:       # the compiler would leave out the first of two roundings
            return self.compiled(self.codes, self.scales(), self.pairs, self.dtype).view(self.shape).to(wanted)
        unpack = unpack_in_pieces if blocked else unpack_any
        return unpack(self.codes, self.scales(), self.pairs, self.numel(), self.form.blocksize, self.dtype, wanted) \
            .view(self.shape)


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


def values_of(kind: str, device=None):
    """The 16 values of a 4-bit format by their codes, float32."""
    return torch.tensor(VALUES[kind], dtype=torch.float32, device=device) + 0.0          # fp4's second zero, too, is +0


def map_of_scales(device=None):
    """The 256 values that 8-bit scales stand for, ascending: for each of 7 powers of ten, the middles of 2**i equal
    parts of 0.1 to 1, of both signs; 0 and 1 (arXiv:2110.02861, sec. 2; one bit of the eight is the sign)."""
    positive = []
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        positive += (10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)).tolist()
    return torch.tensor(sorted([0.0, 1.0, *positive, *(-value for value in positive)]), device=device)


def nearest(x, values):
    """Places of the nearest of `values` (ascending), of two equally near ones the lower; uint8."""
    middles = (values[:-1] + values[1:]) / 2
    if len(middles) > 15:
        return torch.bucketize(x, middles).to(torch.uint8)
    places, above = torch.zeros_like(x), torch.empty_like(x)
    for middle in middles.tolist():             # for so few, counting is several times faster than searching
        places += torch.gt(x, middle, out=above)
    return places.to(torch.uint8)


def by_block(flat, blocksize: int, values):
    """(places of the nearest values, largest numbers of the blocks) for numbers in float32.

    A number is multiplied with 1 / largest, but in an incomplete last block divided by it: so bitsandbytes rounds.
    """
    blocks, rest = divmod(len(flat), blocksize)
    whole = flat[:blocks * blocksize].view(blocks, blocksize)
    largest = whole.abs().amax(1) if blocks else flat[:0]
    scaled = (whole * (1 / largest.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1).view(-1)
    if rest:
        last = flat[blocks * blocksize:]
        largest = torch.cat([largest, last.abs().max()[None]])
        scaled = torch.cat([scaled, (last / largest[-1].clamp(min=SMALLEST)).clamp_(-1, 1)])
    return nearest(scaled, values), largest


def in_8_bits(scales, group: int) -> dict:
    """Scales as Form.tensors names their parts: their mean off, each group divided by its largest, the nearest of 256.

    As bitsandbytes does it, numbers are first rounded to 65,535 equal steps from -1 to 1; 1 / largest may be infinite,
    and where all scales are equal the code is 0.
    """
    offset, values = scales.mean(), map_of_scales(scales.device)
    grouped = F.pad(scales - offset, (0, -len(scales) % group)).view(-1, group)
    largest = grouped.abs().amax(1)
    scaled = (grouped * (1 / largest)[:, None]).clamp_(-1, 1).view(-1)[:len(scales)]
    steps = ((scaled + 1) * (65_535 / 2)).round_() / (65_535 / 2) - 1
    return {"absmax": nearest(steps.nan_to_num(nan=-1.0), values), "nested_absmax": largest,
            "nested_quant_map": values, "nested_offset": offset}


@torch.no_grad()
def quantise(matrix, form: Form) -> Quantised:
    """Store a matrix (out, in) in this form, on its device; piece by piece, so that no float32 copy of it exists."""
    form = replace(form, dtype=form.dtype or matrix.dtype)
    if form.kind == "int8":
        return quantise_rows(matrix, form)
    values, code_of = values_of(form.kind, matrix.device).sort(stable=True)         # fp4 has a second zero
    zero = VALUES[form.kind].index(0.0)
    flat, codes, largest, piece = matrix.reshape(-1), [], [], piece_of(matrix.device, form.blocksize)
    for part in flat.split(piece):
        places, scales = by_block(part.float(), form.blocksize, values)
        fours = F.pad(code_of.to(torch.uint8).index_select(0, places.int()), (0, len(part) % 2), value=zero)
        codes.append(fours[0::2] << 4 | fours[1::2])
        largest.append(scales)
    absmax = torch.cat(largest)
    return Quantised(form, matrix.shape, codes=torch.cat(codes), quant_map=values_of(form.kind, matrix.device),
                     **(in_8_bits(absmax, form.nested) if form.nested else {"absmax": absmax}))


def piece_of(device, blocksize: int) -> int:
    """How many numbers are worked on at once: whole blocks."""
    piece = PIECE if torch.device(device).type == "cpu" else PIECE_ON_GPU
    return max(1, piece // (2 * blocksize)) * 2 * blocksize


def pairs_of(quant_map):
    """(256,) int64: for each byte the bits of the two float32 numbers that it stands for."""
    byte = torch.arange(256, device=quant_map.device)
    return torch.stack((quant_map[byte >> 4], quant_map[byte & 15]), dim=1).view(torch.int64).view(-1)


def unpack_any(codes, scales, pairs, count: int, blocksize: int, dtype, wanted):
    """`count` numbers: value times scale in float32, rounded to `dtype`, then to `wanted`. The readable twin of the
    next two, and the one that knows incomplete blocks."""
    values = pairs.view(torch.float32).view(256, 2)[codes.long()].view(-1)[:count]
    return (values * scales.repeat_interleave(blocksize)[:count]).to(dtype).to(wanted)


def unpack_in_pieces(codes, scales, pairs, count: int, blocksize: int, dtype, wanted):
    """The same for whole blocks. One look-up brings both numbers of a byte; pieces stay in the cache between steps."""
    out, piece = torch.empty(count, dtype=wanted, device=codes.device), piece_of(codes.device, blocksize)
    for start in range(0, count, piece):
        end = min(start + piece, count)
        values = pairs.index_select(0, codes[start // 2:end // 2].int()).view(torch.float32).view(-1, blocksize)
        values.mul_(scales[start // blocksize:end // blocksize, None])
        out[start:end].view(-1, blocksize).copy_(values if dtype == wanted else values.to(dtype))
    return out


def unpack_at_once(codes, scales, pairs, dtype):
    """The same as one expression, of which torch's compiler makes one kernel that reads codes and writes numbers.
    pairs: (256, 2) float32 here."""
    return (pairs[codes.int()].view(len(scales), -1) * scales[:, None]).to(dtype)


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


def quantise_rows(matrix, form: Form) -> Quantised:
    """Rows times 127 / their largest number, rounded; the matrix is rounded to float16 first (as bitsandbytes does)."""
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    largest, rows = torch.empty(len(matrix), device=matrix.device), rows_at_once(matrix)
    for start in range(0, len(matrix), rows):
        part = slice(start, start + rows)
        half = matrix[part].half().float()
        largest[part] = half.abs().amax(1)
        codes[part] = half.mul_(127 / largest[part, None].clamp(min=SMALLEST)).round_()
    return Quantised(form, matrix.shape, codes=codes, absmax=largest)


def rows_in_pieces(codes, largest, dtype):
    """Codes times the largest number of their row, times 1 / 127, in float32 and in this order; then rounded."""
    out, rows = torch.empty(codes.shape, dtype=dtype, device=codes.device), rows_at_once(codes)
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        out[part] = codes[part].float().mul_(largest[part, None]).mul_(1 / 127)
    return out


def rows_at_once(matrix) -> int:
    return max(1, piece_of(matrix.device, 1) // max(1, matrix.shape[1]))


# ---- layers ---------------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        wanted, _, of_bias = ctx.needs_input_grad
        return (dy @ ctx.weight.dense(dy.dtype) if wanted else None, None,
                dy.flatten(0, -2).sum(0) if of_bias else None)


def multiply(x, weight: Quantised, bias=None):
    """x (…, in) times the matrix (out, in) transposed -> (…, out). F.linear would keep the dense matrix for the
    backward pass; here it is made again."""
    return _Product.apply(x, weight, bias)


class QuantLinear(nn.Linear):
    """A frozen linear layer whose weight is a Quantised."""

    def __init__(self, weight: Quantised, bias=None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias

    def forward(self, x):
        return multiply(x, self.weight, self.bias)

    def matmul(self, x):
        """W x, without the bias."""
        return multiply(x, self.weight)

    def dequantized_weight(self, dtype: torch.dtype | None = None):
        """The matrix (out, in), made anew. dtype None: the one it was quantized from."""
        return self.weight.dense(dtype)

    def effective_weight(self):
        """The same, where this is a model's head."""
        return self.weight.dense()

    @property
    def format_name(self) -> str:
        return self.weight.form.kind


def can_be_quantised(model: nn.Module) -> list[str]:
    """Names of the weights that quantisation on load means: of all linear layers but the head and routers, which are
    small and decide much. Stacks of matrices, embeddings and norms are none."""
    return [f"{name}.weight" for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head" and not name.endswith(".mlp.gate")]


def set_quantised(model: nn.Module, name: str, weight: Quantised):
    """Put the weight in the place of the model's parameter of that name, that of an nn.Linear."""
    path = name.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, QuantLinear(weight, model.get_submodule(path).bias))


def empty_quantised(model: nn.Module, forms: dict[str, Form]) -> nn.Module:
    """Let these weights of a model on the meta device be quantised ones, without storage, too. In place."""
    for name, form in forms.items():
        shape = model.get_parameter(name).shape
        tensors = {part: torch.empty(size, dtype=dtype, device="meta") for part, (size, dtype)
                   in form.tensors(shape).items()}
        set_quantised(model, name, Quantised(form, shape, **tensors))
    return model


def form_asked(config) -> Form | None:
    """The form that quantization_bit and its like ask for, or None."""
    if config.quantization_bit == 8:
        return Form("int8", nested=0)
    return Form(config.quantization_type, nested=256 * config.double_quantization) if config.quantization_bit else None


def count(model: nn.Module) -> int:
    """Parameters of a model; of quantised matrices the numbers they stand for."""
    return sum(p.numel() for p in (*model.parameters(), *quantised_weights(model).values()))


def quantised_weights(model: nn.Module) -> dict[str, Quantised]:
    """{name as of a parameter: Quantised}, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantised)}


class EmbeddingOutside(nn.Embedding):
    """A frozen embedding that stays in the machine's memory, whatever device computes: few of its rows are read.

    Ids that have `on_cpu`, themselves before they were sent to the device (Batch.to), are not asked back from it:
    that would wait for all work it has still to do.
    """

    def __init__(self, embedding: nn.Embedding):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.weight = nn.Parameter(embedding.weight.detach().cpu(), requires_grad=False)

    def _apply(self, fn, recurse=True):
        return self

    def forward(self, ids):
        rows = F.embedding(ids.on_cpu if hasattr(ids, "on_cpu") else ids.cpu(), self.weight)
        return rows.pin_memory().to(ids.device, non_blocking=True) if ids.is_cuda else rows.to(ids.device)


def embedding_may_stay_outside(model: nn.Module, device, recompute: list) -> bool:
    """Whether training keeps the embedding out of a GPU's memory: beside quantised blocks it is a large part of the
    rest, and where every block recomputes all it can, memory is what is short. Sending its rows costs time. A tied one is
    the head, too, and one that learns has an optimizer."""
    embedding = model.model.embed_tokens.weight
    return bool(torch.device(device).type == "cuda" and set(recompute) == {"block"} and quantised_weights(model)
                and not embedding.requires_grad and embedding is not model.lm_head.weight)


def in_words(forms) -> str:
    """What is quantised, for the start page. forms: a Form for each matrix that is."""
    counts = {}
    for form in forms:
        words = f"{form.kind}, {form.bits():.4g} bits a weight"
        counts[words] = counts.get(words, 0) + 1
    return "; ".join(f"{count} matrices in {words}" for words, count in counts.items())


# ---- reading bitsandbytes' files ------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def form_of_state(packed, where: str) -> tuple[Form, tuple, float]:
    """(form, shape, nested offset) of a 4-bit weight from its quant_state, JSON as bytes. Raises ValueError."""
    try:
        state = json.loads(bytes(packed.tolist()))
        dtype, kind = DTYPES[state["dtype"]], state["quant_type"]
        form = Form(kind, int(state["blocksize"]), int(state.get("nested_blocksize", 0)), dtype)
        shape, offset = tuple(map(int, state["shape"])), float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: this is not the state of a 4-bit weight as bitsandbytes writes it "
                         f"({type(error).__name__}: {error}); fetch the file again") from None
    if kind not in VALUES or form.blocksize < 2 or form.blocksize % 2 or len(shape) != 2:
        raise ValueError(f"{where}: quant_type {kind!r}, blocksize {form.blocksize}, shape {list(shape)} are not read "
                         f"here; known are {', '.join(VALUES)}, even block sizes and matrices")
    return form, shape, offset


def quantised_from(form: Form, shape, parts: dict, offset: float, where: str) -> Quantised:
    """A Quantised from tensors as files have them, {name of Form.tensors: tensor}. Raises ValueError otherwise."""
    if form.kind != "int8":
        parts["codes"] = parts["codes"].view(torch.uint8)       # bnb_4bit_quant_storage may call them something else
        if form.nested:
            parts["nested_offset"] = torch.tensor(offset, device=parts["codes"].device)
    tensors = {}
    for name, (size, dtype) in form.tensors(shape).items():
        tensor = parts[name]
        if tensor.numel() != math.prod(size) or tensor.dtype != dtype:
            raise ValueError(f"{where}: {name} has {tensor.numel():,} numbers of {tensor.dtype}; {list(shape)} "
                             f"in {form.kind} with blocks of {form.blocksize} has {math.prod(size):,} of {dtype}")
        tensors[name] = tensor.reshape(size)
    return Quantised(form, shape, **tensors)


# ---- the compiler ---------------------------------------------------------------------------------------------------


def main():
    """What the formats cost on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4096, 4096, generator=generator).bfloat16().to(device)
    x = torch.randn(2048, 4096, generator=generator).bfloat16().to(device)

    def seconds(call):
        took = []
        for _ in range(5):
            start = time.perf_counter()
            call(), device == "cuda" and torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        return min(took)

    product = seconds(lambda: x @ W.T)
    print(f"{device}: a product of 2048 tokens with a 4096 x 4096 matrix in bfloat16 takes {product * 1e3:.2f} ms")
    for form in (Form("nf4"), Form("nf4", nested=0), Form("fp4"), Form("int8", nested=0)):
        packed = quantise(W, replace(form, dtype=W.dtype))
        took, error = seconds(lambda: packed.dense(torch.bfloat16)), (packed.dense(torch.float32) - W).norm() / W.norm()
        name = form.kind + (" double" if form.nested else "")
        print(f"{name:12}{8 * packed.nbytes / W.numel():6.3f} bits a weight, off by {error:.2%}, dense again in "
              f"{took * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
