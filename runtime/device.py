"""Causal attention: one call, `attend`, over several kernels that must all give the same numbers.

`plain` is the readable slow twin and the definition of what is right; the others are torch's SDPA backends, one by one,
torch's varlen and the flash-attn package. `pick_kernel` tries each on this machine and names the fastest correct one.

    python attention.py                                                 the table of kernels for this machine
    python attention.py --head_dim 64 --num_heads 14 --num_kv_heads 2   the same for the shapes of another model

Read first: nothing. Read next: model.py, which calls `attend` once per layer; docs/rocm_dcu.md for AMD and Hygon cards.

Sources: Vaswani et al. 2017 (arXiv:1706.03762); grouped heads, arXiv:2305.13245; FlashAttention-2, arXiv:2307.08691;
sliding window, arXiv:2310.06825; ALiBi, arXiv:2108.12409; capped scores, arXiv:2408.00118 (sec. 2). Letters for shapes
as in model.py: B batch, T query length, S key length, H query heads, K key/value heads, Dh head_dim.
"""
import argparse
import difflib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path


@contextmanager
def guard_amdsmi():
    """`with guard_amdsmi(): import torch` keeps torch.cuda.device_count() working on ROCm and DCU machines.

    torch for ROCm before 2026 asks the package amdsmi for the number of cards when pynvml is installed (DeepSpeed
    brings it), and ends in "NameError: name 'amdsmi' is not defined" where amdsmi is not (pytorch issue 133259). Hiding
    pynvml while torch is imported makes it ask the runtime instead; where torch came first, a flag of torch does so.
    """
    hide = not {"torch", "pynvml"} & set(sys.modules) and not importlib.util.find_spec("amdsmi") and is_rocm_build()
    if hide:
        sys.modules["pynvml"] = None   # `import pynvml` now raises ModuleNotFoundError, for which torch is prepared
    try:
        yield
    finally:
        if hide:
            del sys.modules["pynvml"]
    torch = sys.modules["torch"]
    if torch.version.hip and not hasattr(torch.cuda, "amdsmi") and not hasattr(torch.cuda, "_HAS_AMDSMI"):
        torch.cuda._HAS_PYNVML = False


def is_rocm_build():
    """Whether the installed torch is made for ROCm: read from its version.py, as torch must not be imported yet."""
    version = Path(importlib.util.find_spec("torch").origin).with_name("version.py").read_text(encoding="utf-8")
    return re.search(r"^hip\b[^=\n]*=\s*['\"]", version, re.MULTILINE) is not None


with guard_amdsmi():   # hence before every other import of torch
    import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def release(version):
    """(2, 10) of "2.10.1+das"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
SWITCHED = {"sdpa-flash": "flash", "sdpa-cudnn": "cudnn", "sdpa-efficient": "mem_efficient", "sdpa-math": "math"}
KERNELS = ("flash-attn", "torch-varlen", *SDPA, "plain")   # the earlier one wins when two are about equally fast
TORCH = release(torch.__version__)
PLAIN_QUERIES = 1024   # of one sequence, whose scores the plain twin holds at once


# ---- the micro-batch as one row --------------------------------------------------------------------------------------

class Layout:
    """How the samples of a micro-batch lie end to end in one row; made once per micro-batch, used by every layer.

    Kernels that know boundaries read `cu_seqlens` (int32, n + 1 offsets) and `max_len`. For the others, segments of
    similar length are padded on the right and run as one batch: under causal attention a pad on the right is seen by
    nobody, so no mask is needed and flash stays usable. `groups` are (segments, padded length) of those batches,
    `gather` the row index of every slot of the batches laid end to end, `scatter` the slot of every token of the row.
    """

    def __init__(self, lengths, device="cpu"):
        """lengths: tokens of each segment, in order, each >= 1."""
        self.lengths, self.chunks = tuple(int(n) for n in lengths), {}
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"segments must hold 1 token or more, found lengths {list(self.lengths)}")
        self.total, self.max_len = sum(self.lengths), max(self.lengths)
        starts = torch.tensor((0, *self.lengths)).cumsum(0)
        members = group_by_length(self.lengths)
        self.groups = [(len(group), self.lengths[group[0]]) for group in members]
        slots, first, scatter = [], 0, torch.empty(self.total, dtype=torch.long)
        for group, (n, padded) in zip(members, self.groups):
            length = (starts[1:] - starts[:-1])[group][:, None]                              # (n, 1)
            within = torch.arange(padded).expand(n, padded)
            # a pad repeats the segment's last token: a finite value, and no gradient flows back through it
            rows = starts[group][:, None] + torch.minimum(within, length - 1)                # (n, padded)
            real = within < length
            scatter[rows[real]] = first + torch.arange(n * padded).view(n, padded)[real]
            slots.append(rows.flatten())
            first += n * padded
        self.cu_seqlens, self.gather, self.scatter = starts.to(torch.int32), torch.cat(slots), scatter
        self.to(device)

    def to(self, device):
        """Move the index tensors, in place; returns self."""
        for name in ("cu_seqlens", "gather", "scatter"):
            setattr(self, name, moved(getattr(self, name), device))
        for layout in self.chunks.values():
            layout.to(device)
        return self

    def chunked(self, chunk):
        """The layout whose segments are these, cut at every multiple of `chunk` tokens; made once and kept."""
        if chunk >= self.max_len:
            return self
        if chunk not in self.chunks:
            lengths = [min(chunk, n - start) for n in self.lengths for start in range(0, n, chunk)]
            self.chunks[chunk] = Layout(lengths, self.gather.device)
        return self.chunks[chunk]


def moved(tensor, device):
    """The tensor on the device. From memory of the host that may not be swapped out, a GPU fetches it while both go on."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def group_by_length(lengths, waste=0.25, floor=32):
    """Segments that may share a padded batch: each padded by at most `waste` of its length, or up to `floor` tokens.

    Returns lists of segment indices, the longest segment of each list first.
    """
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):   # stable: equal lengths keep their order
        if groups and lengths[groups[-1][0]] <= max(floor, lengths[i] * (1 + waste)):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# ---- the kernels -----------------------------------------------------------------------------------------------------

@dataclass
class Filled:
    """How many of S key slots hold something, as numbers on the device: a step that is captured once and run often may
    not know them otherwise, and each of several rows has its own.

    mask: (B, 1, 1, S) bool, true for the first `count` slots of a row; the query stands at the last of them.
    ends: (2,) int32, 0 and the count, where there is one row.
    """
    mask: "torch.Tensor"
    ends: "torch.Tensor | None" = None

    def distance(self):
        """Key position minus query position, (B, 1, 1, S)."""
        return torch.arange(self.mask.shape[-1], device=self.mask.device) - (self.mask.sum(-1, keepdim=True) - 1)

    def seen(self, window, chunk):
        """Which slots the query of each row sees, (B, 1, 1, S) bool."""
        if window is None and chunk is None:
            return self.mask
        away = self.distance()
        near = away > -window if window is not None else away >= -((self.mask.sum(-1, keepdim=True) - 1) % chunk)
        return self.mask & near


def attend(q, k, v, *, kernel="plain", layout=None, scale=None, window=None, chunk=None, softcap=None, slopes=None,
           filled=None):
    """Causal attention of q (B, H, T, Dh) over k, v (B, K, S, Dh) -> (B, H, T, Dh). H is a multiple of K.

    Query i stands at position S - T + i, so the last query sees every key, whether T == S (training), T == 1 (decoding)
    or between (a prompt after a cached one). scale: default Dh ** -0.5. layout: B is 1, T == S == layout.total, and
    attention stays within each segment; positions count from its start.
    window w: a query sees itself and the w - 1 keys before it. chunk c: a query sees only keys at positions with the
    same position // c. softcap c: scores become c * tanh(scores / c). slopes (H,) float32, on q's device, for ALiBi:
    scores += slopes[h] * (key position - query position). filled: see Filled; T is 1, and layout is None.
    Raises ValueError for an unknown kernel, or one that lacks what is asked; RuntimeError when torch refuses the named
    backend for these inputs.
    """
    T, S = q.shape[2], k.shape[2]
    assert T <= S and q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    assert layout is None or (q.shape[0] == 1 and T == S == layout.total), (q.shape, k.shape, layout.lengths)
    if kernel not in KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}; known: {', '.join(KERNELS)}")
    if lack := lacking(kernel, softcap is not None, slopes is not None):
        raise ValueError(f"attention kernel {kernel!r} {lack}; 'plain' and 'flash-attn' have it")
    if filled is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if filled.ends is None:
            return query_of_each_row(q, k, v, kernel, scale, filled, window, chunk, softcap, slopes)
        return one_query(q, k, v, kernel, scale, softcap, filled)
    if chunk is not None and layout is not None:
        layout, chunk = layout.chunked(chunk), None
    if layout is not None and len(layout.lengths) == 1:
        layout = None
    if chunk is not None and chunk < S:
        options = {"kernel": kernel, "scale": scale, "window": window, "softcap": softcap, "slopes": slopes}
        return attend_in_chunks(q, k, v, chunk, options)
    if window is not None and window >= (S if layout is None else layout.max_len):
        window = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.to(v.dtype), k.to(v.dtype)   # under autocast the norms of q and k leave them in float32

    if kernel == "plain":
        return plain(q, k, v, scale, layout, window, softcap, slopes)
    if kernel == "flash-attn":
        return flash_attn_2(q, k, v, scale, layout, window, softcap, slopes)
    if kernel == "torch-varlen" and layout is not None:
        return torch_varlen(q, k, v, scale, layout, window)
    kernel = "sdpa-flash" if kernel == "torch-varlen" else kernel   # without boundaries SDPA reaches the same code
    if layout is not None:
        return sdpa_packed(q, k, v, kernel, scale, layout, window, slopes)
    return sdpa(q, k, v, kernel, scale, window, slopes)


def lacking(kernel, softcap, alibi):
    """What a kernel lacks of what is asked, as the end of a sentence, or None."""
    if softcap and kernel in ("torch-varlen", *SDPA):
        return "has no softcap"
    if alibi and kernel == "torch-varlen":
        return "has no ALiBi"
    return None


def attend_in_chunks(q, k, v, chunk, options):
    """Each chunk of positions is a call of its own, without a mask: its queries end where its keys end."""
    T, S = q.shape[2], k.shape[2]
    cached, outs = S - T, []                                         # keys before the first query
    for start in range(cached // chunk * chunk, S, chunk):
        queries = slice(max(start - cached, 0), start + chunk - cached)
        keys = slice(start, start + chunk)
        outs.append(attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], **options))
    return torch.cat(outs, dim=2)


def plain(q, k, v, scale, layout=None, window=None, softcap=None, slopes=None, careful=True):
    """The slow twin, to which the others are held: sequence by sequence and, as scores take room, block by block."""
    if layout is not None:
        segments = zip(*(x.split(layout.lengths, dim=2) for x in (q, k, v)))
        outs = [plain(*segment, scale, None, window, softcap, slopes, careful) for segment in segments]
        return torch.cat(outs, dim=2)
    end, outs = k.shape[2] - q.shape[2], []
    for block in q.split(PLAIN_QUERIES, dim=2):
        end += block.shape[2]                                        # no query of the block sees a later key
        keys = within_reach(k[:, :, :end], v[:, :, :end], block.shape[2], window)
        outs.append(written_out(block, *keys, scale, window, softcap, slopes, careful))
    return torch.cat(outs, dim=2)


def written_out(q, k, v, scale, window, softcap, slopes, careful):
    """The definition: every score of every query with every key.

    Scores are float32 and q is scaled before the product: in float16 the q·k of Qwen2 passes 65504, and inf becomes
    NaN in the softmax. careful=False rounds every step to q's dtype: the measure of what is forgiven other kernels.
    """
    T, S = q.shape[2], k.shape[2]
    k, v = repeat_heads(k, v, q.shape[1])
    wide = torch.promote_types(q.dtype, torch.float32) if careful else q.dtype
    with torch.autocast(q.device.type, enabled=False):   # it would take the product back to 16 bits
        scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)                         # (B, H, T, S)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores + alibi(slopes, T, S).to(wide)
        scores = scores.masked_fill(~visible(T, S, window, q.device), float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v


def distance(T, S, device):
    """Key position minus query position: int (T, S), 0 for a query's own key, negative for those before it."""
    return torch.arange(S, device=device) - torch.arange(S - T, S, device=device)[:, None]


def visible(T, S, window, device):
    """Which keys each query may see: bool (T, S)."""
    away = distance(T, S, device)
    return away <= 0 if window is None else (away <= 0) & (away > -window)


def alibi(slopes, T, S):
    """What ALiBi adds to the scores: (H, T, S), each head's slope times the distance (arXiv:2108.12409, sec. 3)."""
    return slopes[:, None, None] * distance(T, S, slopes.device)


def within_reach(k, v, T, window):
    """k and v (B, K, S, Dh) without the first keys, which lie before the window of each of the T last positions."""
    reach = k.shape[2] if window is None else T + window - 1
    return k[:, :, -reach:], v[:, :, -reach:]


def repeat_heads(k, v, H):
    """k, v (B, K, S, Dh) -> (B, H, S, Dh): each key/value head serves H // K neighbouring query heads."""
    return (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))


def sdpa(q, k, v, kernel, scale, window=None, slopes=None):
    """torch's scaled_dot_product_attention, held to one backend."""
    k, v = within_reach(k, v, q.shape[2], window)
    T, S = q.shape[2], k.shape[2]
    if T == 1 and slopes is None:
        return one_query(q, k, v, kernel, scale)
    # is_causal aligns the first query with the first key, so it is right only when T == S; one query needs no mask.
    masked = T > 1 and (T < S or window is not None)
    mask = visible(T, S, window, q.device) if masked or slopes is not None else None
    backends = [SDPA[kernel]]
    if slopes is not None:   # the mask carries numbers, and a backend that takes none is refused by the picker
        mask = alibi(slopes, T, S).masked_fill_(~mask, float("-inf")).to(q.dtype)[None]      # (1, H, T, S)
    elif masked and kernel != "sdpa-math":   # flash takes no mask on a GPU; `mask_note` tells the user
        backends += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if q.is_cuda and takes_grouped_heads(kernel, mask is not None):
            grouped = {"enable_gqa": True}
        else:
            k, v = repeat_heads(k, v, q.shape[1])
    # contiguous: some ROCm builds give wrong numbers when v is a transposed view and q, k are not (ROCm/pytorch#3230)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    with sdpa_kernel(backends):   # for this call alone; torch.backends.cuda.enable_*_sdp would be for the whole process
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and mask is None, scale=scale, **grouped)


def one_query(q, k, v, kernel, scale, softcap=None, filled=None):
    """Decoding: q (B, H, 1, Dh) sees all of k and v (B, K, S, Dh), or as much of them as is filled.

    The H / K query heads that share a key/value head may as well stand in a row, as no mask tells queries apart:
    nothing is repeated, and a cache is read where it lies.
    """
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])                                 # (B, K, H / K, Dh)
    if filled is not None and kernel in ("flash-attn", "torch-varlen"):
        return up_to(q, k, v, kernel, scale, softcap, filled)
    mask = None if filled is None else filled.mask
    if kernel == "plain":
        return one_query_plain(q, k, v, scale, softcap, mask)
    k, v = (x if x.stride(2) == x.shape[3] else x.contiguous() for x in (k, v))              # see sdpa
    # flash takes no mask on a GPU, see sdpa
    with held_to(kernel, *(("sdpa-efficient", "sdpa-math") if mask is not None else ())):
        return F.scaled_dot_product_attention(rows, k, v, mask, is_causal=False, scale=scale).reshape(q.shape)


def one_query_plain(q, k, v, scale, softcap=None, mask=None, bias=0.0):
    """The definition of one_query. mask: (B or 1, 1, 1, S) bool; bias: added to the scores, (B, K, H / K, S)."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])                                 # (B, K, H / K, Dh)
    scores = (rows.float() * scale) @ k.float().transpose(-1, -2)                            # (B, K, H / K, S)
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + bias
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).view(q.shape)


def query_of_each_row(q, k, v, kernel, scale, filled, window, chunk, softcap, slopes):
    """Decoding several rows: q (B, H, 1, Dh) sees what each row has filled of k and v (B, K, S, Dh)."""
    mask = filled.seen(window, chunk)
    if kernel != "plain" and softcap is None and slopes is None:
        kernel = kernel if kernel in SDPA else "sdpa-efficient"     # the others take no mask
        return one_query(q, k, v, kernel, scale, filled=Filled(mask))
    bias = 0.0 if slopes is None else slopes.view(1, k.shape[1], -1, 1) * filled.distance()
    return one_query_plain(q, k, v, scale, softcap, mask, bias)


def up_to(q, k, v, kernel, scale, softcap, filled):
    """one_query by a kernel that reads from the device where the keys end, and reads no further."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                                      # (1 or S, H or K, Dh)
    ends = (torch.arange(2, dtype=torch.int32, device=q.device), filled.ends, 1, len(k))
    if kernel == "flash-attn":
        from flash_attn import flash_attn_varlen_func
        options = {"softcap": softcap} if softcap is not None else {}
        out = flash_attn_varlen_func(q, k, v, *ends, softmax_scale=scale, causal=False, **options)
    else:
        from torch.nn.attention.varlen import varlen_attn
        out = varlen_attn(q, k, v, *ends, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(0, 1)[None]


@contextmanager
def held_to(*kernels):
    """sdpa_kernel without its 30 microseconds: a single query on a small model does not take as long itself."""
    wanted = [SWITCHED[kernel] for kernel in kernels]
    before = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SWITCHED.values()}
    try:
        for name in before:
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in wanted)
        yield
    finally:
        for name, enabled in before.items():
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)


def takes_grouped_heads(kernel, masked):
    """Whether a backend on a GPU takes K < H as it is; repeating k and v is always right, but costs memory.

    torch 2.4 has no `enable_gqa`, ROCm's flash refused it until 2.6; it leads other backends, and masks, to MATH.
    """
    return kernel == "sdpa-flash" and not masked and TORCH >= ((2, 6) if torch.version.hip else (2, 5))


def sdpa_packed(q, k, v, kernel, scale, layout, window, slopes):
    """SDPA knows no boundaries: run the layout's groups of similar segments, each as one right-padded batch."""
    q, k, v = (x[0].index_select(1, layout.gather) for x in (q, k, v))                       # (H or K, slots, Dh)
    outs, first = [], 0
    for n, padded in layout.groups:
        slots = slice(first, first + n * padded)
        batch = (x[:, slots].unflatten(1, (n, padded)).transpose(0, 1) for x in (q, k, v))   # (n, H or K, padded, Dh)
        out = sdpa(*batch, kernel, scale, window if window is not None and window < padded else None, slopes)
        outs.append(out.transpose(0, 1).flatten(1, 2))                                       # (H, n * padded, Dh)
        first += n * padded
    return torch.cat(outs, dim=1).index_select(1, layout.scatter)[None]


def flash_attn_2(q, k, v, scale, layout, window, softcap, slopes):
    """The flash_attn package has all of it; arguments that came with later versions are given only where needed."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    options = {"softmax_scale": scale, "causal": True}
    options |= {"window_size": (window - 1, 0)} if window is not None else {}
    options |= {"softcap": softcap} if softcap is not None else {}
    options |= {"alibi_slopes": slopes} if slopes is not None else {}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                         # (B, T or S, H or K, Dh)
    if layout is None:
        return flash_attn_func(q, k, v, **options).transpose(1, 2)
    ends = (layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len)
    return flash_attn_varlen_func(q[0], k[0], v[0], *ends, **options)[None].transpose(1, 2)


def torch_varlen(q, k, v, scale, layout, window):
    """torch's own flash kernel with boundaries, in the form it has since torch 2.12."""
    from torch.nn.attention.varlen import varlen_attn
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                                      # (T, H or K, Dh)
    ends = (layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len)
    out = varlen_attn(q, k, v, *ends, scale=scale, window_size=(-1 if window is None else window - 1, 0),
                      enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(0, 1)[None]


# ---- the picker ------------------------------------------------------------------------------------------------------

WANTED = {   # LLaMA-Factory's key flash_attn -> the kernels that may serve it
    "auto": KERNELS,
    "sdpa": ("torch-varlen", *SDPA),
    "fa2": ("flash-attn",),
    "disabled": ("plain",),
}
HALF_ONLY = ("flash-attn", "torch-varlen", "sdpa-flash", "sdpa-cudnn")          # on a GPU
NO_MASK = ("torch-varlen", "sdpa-flash", "sdpa-cudnn")                          # on a GPU
GPU_ONLY = ("flash-attn", "torch-varlen", "sdpa-cudnn", "sdpa-efficient")
CHECKED = (1, 7, 62, 128, 129, 520, 1)     # segments round the tile sizes of kernels (64, 128), ends of length 1
TIMED = (1024, 512, 257, 130, 62, 62, 1)   # a packed row of 2048 tokens
TIMED_ON_CPU = (128, 62, 33, 1)


@dataclass(frozen=True)
class Problem:
    """What a model will ask of a kernel. Plain values only: it travels to a child process as JSON."""
    device: str
    dtype: str
    head_dim: int
    num_heads: int
    num_kv_heads: int
    training: bool = True          # gradients are needed; else a prompt, further prompts, single tokens
    window: int | None = None      # tokens; this and chunk may hold for some layers of the model only
    chunk: int | None = None       # tokens
    softcap: float | None = None
    alibi: bool = False            # whether `attend` will be given slopes
    scale: float | None = None     # None: head_dim ** -0.5

    @property
    def on_gpu(self):
        return self.device.startswith("cuda")

    def options(self, heads, device):
        """What `attend` and `plain` are asked alike. Slopes lie between 1 and 2 ** -8, as in models with ALiBi."""
        slopes = 2.0 ** -torch.linspace(0.5, 8, heads, device=device) if self.alibi else None
        scale = self.head_dim ** -0.5 if self.scale is None else self.scale
        return {"scale": scale, "window": self.window, "softcap": self.softcap, "slopes": slopes}


@dataclass
class Verdict:
    """One kernel tried: `ms` for one layer (forward, and backward when training), or the reason why it is refused."""
    kernel: str
    ms: float | None = None
    reason: str | None = None
    harmless: bool = True   # False: refused after something ran, so this process should try no further kernel


@dataclass
class Choice:
    """The kernel to give to `attend`; lines for the report, ms of each correct kernel, reason of each refused one."""
    kernel: str
    lines: list[str]
    timings: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def pick_kernel(flash_attn="auto", *, device, dtype, **asked):
    """The fastest kernel that is correct here for these shapes -> Choice. Takes seconds, once per process and shape.

    flash_attn: auto (all), sdpa (torch's own), fa2 (flash-attn), disabled (the plain twin). asked: the other fields of
    `Problem`; with a window or a chunk the kernel is also right without. When nothing that was asked for works, the
    others are tried and a line says so. On a GPU the kernels run in child processes, so that one that crashes or hangs
    costs a reason, not the run. Raises ValueError for another value of flash_attn, RuntimeError when not even the plain
    twin is correct.
    """
    if flash_attn not in WANTED:
        near = difflib.get_close_matches(str(flash_attn), WANTED, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"flash_attn: {flash_attn!r} is not known{hint}; choose one of {', '.join(WANTED)}")
    problem = Problem(str(device), str(dtype).removeprefix("torch."), **asked)
    if flash_attn == "disabled":
        return Choice("plain", ["attention: plain (flash_attn: disabled)"])
    lines = posing_card()
    verdicts = try_kernels(WANTED[flash_attn], problem)
    if all(verdict.reason for verdict in verdicts):
        reasons = ", ".join(in_words({verdict.kernel: verdict.reason for verdict in verdicts}))
        lines.append(f"attention: flash_attn: {flash_attn} cannot be had here: {reasons}. Trying the others instead.")
        verdicts += try_kernels(tuple(name for name in KERNELS if name not in WANTED[flash_attn]), problem)
    timings = {verdict.kernel: verdict.ms for verdict in verdicts if not verdict.reason}
    refused = {verdict.kernel: verdict.reason for verdict in verdicts if verdict.reason}
    if not timings:
        raise RuntimeError(f"no attention kernel gives correct results on {device}: {refused}")
    # Nearly equal timings count as equal, else noise would choose and a resumed run could get another kernel.
    near = (1.1 if problem.on_gpu else 2) * min(timings.values())
    kernel = next(name for name in KERNELS if name in timings and timings[name] <= near)
    others = [f"{name} (ok, {ms:.3g} ms)" for name, ms in timings.items() if name != kernel]
    lines += mask_note(kernel, problem)
    lines.append(f"attention: {kernel} ({timings[kernel]:.3g} ms). not used: {', '.join(others + in_words(refused))}")
    return Choice(kernel, lines, timings, refused)


def in_words(refused):
    """["name (reason)"] of refused kernels; torch's backends are one "sdpa-*" when all are refused for one reason."""
    reasons = {refused.get(name) for name in SDPA}
    if len(reasons) == 1 and None not in reasons:
        refused = {name: reason for name, reason in refused.items() if name not in SDPA} | {"sdpa-*": reasons.pop()}
    return [f"{name} ({reason})" for name, reason in refused.items()]


def mask_note(kernel, problem):
    """[a line] when another kernel than the chosen one may run where a mask is needed, else []."""
    cases = [f"sequences longer than the window of {problem.window} tokens"] if problem.window else []
    cases += [] if problem.training else ["prompts after a cached one"]
    if not cases or not problem.on_gpu or problem.alibi or kernel not in NO_MASK:
        return []
    return [f"attention: {kernel} may take no mask: {' and '.join(cases)} then run on sdpa-efficient or sdpa-math"]


@lru_cache(maxsize=None)
def try_kernels(kernels, problem):
    """A Verdict for each kernel, in order."""
    known = {name: Verdict(name, reason=reason) for name in kernels if (reason := known_refusal(name, problem))}
    rest = [name for name in kernels if name not in known]
    tried = try_in_children(rest, problem) if problem.on_gpu else [try_here(name, problem) for name in rest]
    verdicts = known | {verdict.kernel: verdict for verdict in tried}
    return tuple(verdicts[name] for name in kernels)


def known_refusal(kernel, problem):
    """Why a kernel need not be tried, or None; nothing is imported or run."""
    if lack := lacking(kernel, problem.softcap is not None, problem.alibi):
        return lack
    if kernel == "sdpa-flash" and problem.alibi and problem.on_gpu:
        return "takes no mask, and ALiBi needs one"
    if kernel in GPU_ONLY and not problem.on_gpu:
        return "needs a GPU"
    if kernel in HALF_ONLY and problem.on_gpu and problem.dtype == "float32":
        return "takes only float16 and bfloat16"
    if kernel == "flash-attn":
        version = version_of("flash-attn")
        if version is None:
            return "not installed"
        for needed, since, fault in ((True, "2.1", "aligns the causal mask top left"),
                                     (problem.window, "2.3", "has no window"), (problem.alibi, "2.4", "has no ALiBi"),
                                     (problem.softcap, "2.6", "has no softcap")):
            if needed and release(version) < release(since):
                return f"version {version} {fault}; {since} or newer is needed"
    if kernel == "torch-varlen" and TORCH < (2, 12):
        return f"not in torch {torch.__version__}; 2.12 or newer has it"
    if kernel == "sdpa-cudnn" and torch.version.hip:
        return "no cuDNN on ROCm"
    return None


def try_in_children(kernels, problem, limit=60):
    """Verdicts from fresh processes `python attention.py --probe JSON`, each given `limit` seconds.

    One child tries kernel after kernel and prints a JSON line for each. A kernel is blamed only when it was the first
    in its child: errors of a GPU surface late and can be the fault of the kernel before. So a child that dies, hangs or
    finds a fault later on is replaced by a fresh one, which begins with the kernel in question.
    """
    verdicts, left = [], list(kernels)
    while left:
        order = json.dumps({"kernels": left, "problem": asdict(problem)})
        child = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--probe", order],
                                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = child.communicate(timeout=limit)
            last_words = (err.decode(errors="replace").strip().splitlines() or ["no message"])[-1][:160]
            ending = f"exit code {child.returncode}: {last_words}"
            if child.returncode < 0:
                ending = f"crashed: {signal.strsignal(-child.returncode)}"
        except subprocess.TimeoutExpired as late:
            child.kill()   # and no wait for its end: a process stuck in a GPU driver may never come to one
            out, ending = late.stdout or b"", f"no answer within {limit} s"
        heard = read_verdicts(out.decode(errors="replace"), left) or [Verdict(left[0], reason=ending)]
        verdicts += heard
        left = left[len(heard):]
    return verdicts


def read_verdicts(text, expected):
    """The verdicts that a child printed, as far as they are whole and in order; libraries may print between them."""
    heard = []
    for line in text.splitlines():
        try:
            verdict = Verdict(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if len(heard) < len(expected) and verdict.kernel == expected[len(heard)]:
            heard.append(verdict)
    return heard


def answer_probe(order):
    """The child's side: print a verdict a line, and end after the first kernel that may have done harm."""
    order = json.loads(order)
    for i, kernel in enumerate(order["kernels"]):
        verdict = try_here(kernel, Problem(**order["problem"]))
        if verdict.harmless or i == 0:
            print(json.dumps(asdict(verdict)), flush=True)
        if not verdict.harmless:
            return


def try_here(kernel, problem):
    """Check a kernel and time it, in this process -> Verdict. Whatever a foreign kernel throws becomes its reason."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            fault = find_fault(kernel, problem)
            if fault:
                return Verdict(kernel, reason=fault, harmless=False)
            return Verdict(kernel, ms=time_kernel(kernel, problem))
        except Exception as error:
            never_ran = isinstance(error, ImportError) or "No available kernel" in str(error)
            return Verdict(kernel, reason=explain(error, said), harmless=never_ran)


def explain(error, said):
    """One line about an exception. When torch has "No available kernel", the warnings before it hold the reason."""
    if "No available kernel" in str(error):
        told = [str(item.message).split(" (Triggered")[0].strip() for item in said]
        if any("not compiled with" in line for line in told):   # "1Torch was not …": the 1 is a slip of torch's
            return "torch built without it"
        told = [line for line in told if not re.search("not used because|runtime disabled", line)]
        return (told or ["torch has no such kernel for this card and shape"])[0][:160]
    line = (str(error).strip().splitlines() or ["no message"])[0][:160]
    return line if type(error) is RuntimeError else f"{type(error).__name__}: {line}"


def find_fault(kernel, problem):
    """None when a kernel is as exact as its dtype allows, else a sentence.

    The truth is the plain twin in float64. A kernel's error in each segment (root mean square) may be twice that of the
    plain twin with every step rounded to the problem's dtype, both on the CPU, where nothing is in doubt. To this comes
    one rounding step in one row (a segment's first query sees one key, its gradient cancels to zero, and the twin may
    hit that by luck) and 1e-6 (float32 summed in another order). Real faults are some tenfold larger.
    """
    dtype = getattr(torch, problem.dtype)
    for asked, (B, T, S, lengths) in product(variants(problem), cases(problem.training)):
        inputs = example(problem, B, T, S)
        truth = run(plain, inputs, "cpu", torch.float64, lengths, asked)
        rounded = run(partial(plain, careful=False), inputs, "cpu", dtype, lengths, asked)
        found = run(partial(attend, kernel=kernel), inputs, problem.device, dtype, lengths, asked)
        for name, *results in zip(("output", "gradient of q", "gradient of k", "gradient of v"), truth, rounded, found):
            for right, near, x in zip(*(result.split(lengths or result.shape[2], dim=2) for result in results)):
                error, forgiven = ((y - right).square().mean().sqrt().item() for y in (x, near))
                allowed = 2 * forgiven + torch.finfo(dtype).eps * right.shape[2] ** -0.5 + 1e-6
                if not error <= allowed:   # so written, NaN is a fault too
                    where = f"a segment of {right.shape[2]}" if lengths else f"{T} queries, {S} keys"
                    where += f", window {asked.window}" if asked.window else ""
                    return f"wrong {name} ({where}): off by {error:.2g}, rounding explains {allowed:.2g}"
    if dtype is torch.float16:   # the q·k of Qwen2 passes 65504 before it is scaled, and fits afterwards
        q, k, *rest = example(problem, 1, 129, 129)
        found = run(partial(attend, kernel=kernel), [64 * q, 64 * k, *rest], problem.device, dtype, None, problem)
        if not all(x.isfinite().all() for x in found):
            return "overflows in float16 where q·k passes 65504"
    return None


def variants(problem):
    """The problems to check for one: without a window and, if some layers of the model have one, with a window.

    The window is made so short, and the cap so low, that in `cases` they matter. A chunk needs no check of a kernel's:
    `attend` turns it into segments and shorter calls, which no kernel can tell from others.
    """
    windows = [None] if problem.window is None else [None, min(problem.window, 42)]
    softcap = None if problem.softcap is None else min(problem.softcap, 2.0)
    return [replace(problem, window=window, softcap=softcap) for window in windows]


def cases(training):
    """(B, T, S, lengths of segments) to check: a packed row and a batch; for chat a prompt, a later one, one token."""
    if training:
        return [(1, sum(CHECKED), sum(CHECKED), CHECKED), (2, 129, 129, None)]
    return [(1, 129, 129, None), (1, 7, 129, None), (1, 1, 129, None)]


def example(problem, B, T, S):
    """q, k, v and the gradient of the output in the problem's dtype, with at most two key/value heads.

    Each key resembles the query of its own position: attention then looks at the near past, as in a real model, and a
    kernel that loses the last keys of a tile is far off instead of a little.
    """
    K = min(problem.num_kv_heads, 2)
    group = problem.num_heads // problem.num_kv_heads
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, heads, length, problem.head_dim, generator=generator)
                     for heads, length in ((K * group, T), (K, S), (K, S), (K * group, T)))
    k[:, :, S - T:] += 0.4 * q[:, ::group]
    return [x.to(getattr(torch, problem.dtype)) for x in (q, k, v, grad)]


def run(attention, inputs, device, dtype, lengths, problem):
    """[output], and when training the gradients of q, k and v, brought to float64 on the CPU."""
    q, k, v, grad = (x.to(device, dtype) for x in inputs)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)   # a view, as a model's v is
    leaves = [x.detach().requires_grad_(problem.training) for x in (q, k, v)]
    out = attention(*leaves, layout=lengths and Layout(lengths, device), **problem.options(q.shape[1], device))
    # from a scalar: to compare the shapes of a tensor and its given gradient torch imports sympy, 0.4 s of every start
    results = [out, *torch.autograd.grad((out * grad).sum(), leaves)] if problem.training else [out]
    return [x.detach().to("cpu", torch.float64) for x in results]


def time_kernel(kernel, problem, warm=3, runs=7):
    """Milliseconds of one layer's attention: the least of several runs, since other work can only add to it.

    Each run has lengths of its own, as real micro-batches do: a kernel that plans anew for each shape pays for it here.
    """
    first, second, *rest = TIMED if problem.on_gpu else TIMED_ON_CPU
    S, H, K = first + second + sum(rest), problem.num_heads, problem.num_kv_heads
    options = {"device": problem.device, "dtype": getattr(torch, problem.dtype),
               "generator": torch.Generator(problem.device).manual_seed(0)}   # leaves the run's own stream alone
    q, k, v, grad = (torch.randn(1, heads, S, problem.head_dim, **options) for heads in (H, K, K, H))
    leaves = [x.requires_grad_(problem.training) for x in (q, k, v)]
    wait = partial(torch.cuda.synchronize, problem.device) if problem.on_gpu else lambda: None
    call, took = partial(attend, kernel=kernel, chunk=problem.chunk, **problem.options(H, problem.device)), []
    for i in range(warm + runs):
        layout = Layout((first - i, second + i, *rest), problem.device)
        wait()
        start = time.perf_counter()
        if problem.training:
            torch.autograd.grad((call(*leaves, layout=layout) * grad).sum(), leaves)
        else:   # a prompt, then one token
            call(q[:, :, i:], k[:, :, i:], v[:, :, i:])
            call(q[:, :, :1], k[:, :, i:], v[:, :, i:])
        wait()
        took.append(time.perf_counter() - start)
    return 1000 * min(took[warm:])


# ---- this machine ----------------------------------------------------------------------------------------------------

SWITCHES = {   # environment variables that change which kernel runs, or on which card
    "CUDA_VISIBLE_DEVICES": "the cards this process may see",
    "HIP_VISIBLE_DEVICES": "the cards this process may see; the one to use on ROCm",
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1: sdpa-flash, sdpa-efficient on cards torch calls experimental",
    "TORCH_ROCM_FA_PREFER_CK": "1: CK kernels behind sdpa-flash, in torch builds that have them",
    "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE: flash-attn on ROCm by Triton instead of CK",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "on ROCm leave it unset: is_available() would fail as device_count() does",
    "HSA_OVERRIDE_GFX_VERSION": "the card poses as another one",
}


def posing_card():
    """[a warning] when the environment makes a ROCm card claim another architecture, else []."""
    gfx = os.environ.get("HSA_OVERRIDE_GFX_VERSION")
    if not (gfx and torch.version.hip):
        return []
    return [f"attention: HSA_OVERRIDE_GFX_VERSION={gfx} makes the card pose as another architecture: torch may start "
            "kernels that it cannot run. Unset it unless you know that you need it."]


def visible_cards():
    """(number of GPUs, [a warning] or []). The runtime is asked: torch.cuda.device_count() can be misled on ROCm."""
    cards = torch._C._cuda_getDeviceCount() if hasattr(torch._C, "_cuda_getDeviceCount") else 0
    counted = torch.cuda.device_count()
    if counted == cards:
        return cards, []
    return cards, [f"torch.cuda.device_count() says {counted}, the runtime says {cards}. Either pynvml is installed "
                   "without amdsmi (pip uninstall nvidia-ml-py pynvml), or amdsmi is installed and finds no card "
                   "(pip uninstall amdsmi)."]


def pick_device(use_cpu=False):
    """cuda (NVIDIA, AMD, Hygon) if there is one, else Apple's mps, else the CPU. Under torchrun, LOCAL_RANK's card.

    Raises ValueError when CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES names a card and torch sees none: a run that goes
    on for days on the CPU is not what was meant.
    """
    if use_cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    asked = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("HIP_VISIBLE_DEVICES")
    if asked not in (None, "", "-1"):
        raise ValueError(f"a GPU was asked for (…_VISIBLE_DEVICES={asked}), but torch {torch.__version__} sees none: "
                         "check the driver and that torch is a CUDA or ROCm build, or set use_cpu: true")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def card_name(index):
    """Name, architecture and memory of a GPU: "NVIDIA H200 (sm_90, 140 GiB)", "K100_AI (gfx928, Hygon DCU, 64 GiB)"."""
    card = torch.cuda.get_device_properties(index)
    arch = f"sm_{card.major}{card.minor}"
    if torch.version.hip:
        arch = card.gcnArchName.split(":")[0]
        arch += ", Hygon DCU" if re.fullmatch("gfx(92.|93.|946)", arch) else ""
    return f"{card.name} ({arch}, {card.total_memory / 2**30:.0f} GiB)"


def version_of(package):
    """Version of an installed package, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine():
    """Lines: torch and flash-attn, each card, each environment variable in force that matters here, warnings."""
    builds = (("ROCm", torch.version.hip), ("CUDA", torch.version.cuda))
    runtime = next((f"{name} {version}" for name, version in builds if version), "CPU only")
    cards, warning = visible_cards()
    return [f"torch {torch.__version__} ({runtime}), Python {platform.python_version()}, "
            f"flash-attn {version_of('flash-attn') or 'not installed'}",
            *([f"cuda:{i}  {card_name(i)}" for i in range(cards)] or ["no GPU: the CPU is used"]),
            *(f"{name}={os.environ[name]}  ({effect})" for name, effect in SWITCHES.items() if name in os.environ),
            *warning, *posing_card()]


def main():
    """Print what this machine is and how each kernel fares on it, on the first card and on the last."""
    parser = argparse.ArgumentParser(description="The attention kernels of this machine.")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--num_heads", type=int, default=8)
    parser.add_argument("--num_kv_heads", type=int, default=2)
    parser.add_argument("--window", type=int, help="sliding window in tokens")
    parser.add_argument("--chunk", type=int, help="attention within chunks of so many tokens (Llama 4)")
    parser.add_argument("--softcap", type=float, help="scores become softcap * tanh(scores / softcap) (Gemma 2)")
    parser.add_argument("--alibi", action="store_true", help="ALiBi in the place of rotary positions (Baichuan 2 13B)")
    parser.add_argument("--scale", type=float, help="of the scores; default head_dim ** -0.5")
    parser.add_argument("--probe", metavar="JSON", help="for the picker: try the named kernels, print a JSON line each")
    options = vars(parser.parse_args())
    probe = options.pop("probe")
    if probe:
        return answer_probe(probe)
    print(*describe_machine(), sep="\n")
    print("\nms for one layer, forward and backward;", ", ".join(f"{name} {value}" for name, value in options.items()))
    cards = visible_cards()[0]
    for device in dict.fromkeys(["cuda:0", f"cuda:{cards - 1}"]) if cards else ["cpu"]:
        for dtype in ("bfloat16", "float16", "float32"):
            for verdict in try_kernels(KERNELS, Problem(device, dtype, **options)):
                outcome = f"refused: {verdict.reason}" if verdict.reason else f"{verdict.ms:.3g} ms"
                print(f"{device:7} {dtype:9} {verdict.kernel:15} {outcome}")


if __name__ == "__main__":
    main()
