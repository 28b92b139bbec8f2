"""Causal attention: one function, `attend`, over several kernels that give the same numbers.

`plain_attention` is the slow, readable twin and defines what is correct. The other kernels are the
backends of torch's SDPA, torch's varlen attention, and the package flash-attn.
fast/attention_picker.py tries them all and names the fastest correct one:

    python -m fast.attention_picker

Shapes: B batch, T query length, S key length, H query heads, K key/value heads, Dh head_dim.

Requires: nothing.
Next: model.py, which calls `attend` once per layer.

Papers: attention, arXiv:1706.03762; grouped heads, arXiv:2305.13245; FlashAttention-2,
arXiv:2307.08691; sliding window, arXiv:2310.06825; ALiBi, arXiv:2108.12409; softcap,
arXiv:2408.00118 (sec. 2); attention sinks, arXiv:2309.17453 (sec. 3.3) and arXiv:2508.10925.
"""
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def version_numbers(version: str) -> tuple[int, ...]:
    """Major and minor version: "2.10.1+das" -> (2, 10)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


TORCH = version_numbers(torch.__version__)
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
SDPA_FLAGS = {      # the names in torch.backends.cuda.enable_*_sdp
    "sdpa-flash": "flash",
    "sdpa-cudnn": "cudnn",
    "sdpa-efficient": "mem_efficient",
    "sdpa-math": "math",
}
KERNELS = ("flash-attn", "torch-varlen", *SDPA, "plain")    # if about equally fast, the first wins
PLAIN_QUERIES = 1024        # queries per block of plain_attention: bounds the memory of the scores
SINK_FEATURES = 8           # features that sdpa_with_sinks adds to each head


# ---- the micro-batch as one row ------------------------------------------------------------------

class PackedLayout:
    """The boundaries of the sequences that lie end to end in one row.

    Made once per micro-batch and used by every layer. Kernels that know boundaries read:
        cu_seqlens  (n + 1,) int32, the offsets of the n sequences and the end of the last one
        max_len     tokens of the longest sequence

    For other kernels, sequences of similar length are padded on the right and run as one batch.
    They need no mask: under causal attention no token sees a pad on its right.
        groups      (sequences, padded length) of each batch
        gather      (slots,) the token in each slot of all batches, laid end to end
        scatter     (tokens,) the slot of each token
    """

    def __init__(self, lengths: Sequence[int], device="cpu"):
        """lengths: tokens of each sequence, in order, each >= 1."""
        self.lengths = tuple(int(n) for n in lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError("sequences must hold 1 token or more, found lengths "
                             f"{list(self.lengths)}")
        self.total = sum(self.lengths)
        self.max_len = max(self.lengths)

        starts = torch.tensor((0, *self.lengths)).cumsum(0)
        members = group_by_length(self.lengths)
        self.groups = [(len(group), self.lengths[group[0]]) for group in members]
        self.cu_seqlens = starts.to(torch.int32)
        self.gather, self.scatter = padded_slots(starts, members, self.groups)

        self.chunk_layouts: dict[int, PackedLayout] = {}
        self.to(device)

    def to(self, device) -> "PackedLayout":
        """Move the index tensors, in place. Returns self."""
        self.cu_seqlens = to_device(self.cu_seqlens, device)
        self.gather = to_device(self.gather, device)
        self.scatter = to_device(self.scatter, device)
        for layout in self.chunk_layouts.values():
            layout.to(device)
        return self

    def chunked(self, chunk: int) -> "PackedLayout":
        """The layout with each sequence split at every multiple of `chunk` tokens, cached."""
        if chunk >= self.max_len:
            return self
        if chunk not in self.chunk_layouts:
            lengths = []
            for n in self.lengths:
                lengths += [min(chunk, n - start) for start in range(0, n, chunk)]
            self.chunk_layouts[chunk] = PackedLayout(lengths, self.gather.device)
        return self.chunk_layouts[chunk]


def padded_slots(starts, members, groups) -> tuple[torch.Tensor, torch.Tensor]:
    """`gather` and `scatter` of a PackedLayout.

    starts: (n + 1,) offsets of the sequences. members: the sequences of each batch.
    """
    gather = []
    scatter = torch.empty(int(starts[-1]), dtype=torch.long)
    first_slot = 0
    for group, (n, padded) in zip(members, groups):
        lengths = starts.diff()[group][:, None]                                 # (n, 1)
        position = torch.arange(padded).expand(n, padded)
        # A pad repeats the last token of its sequence: the value is finite, and `scatter` drops it.
        tokens = starts[group][:, None] + torch.minimum(position, lengths - 1)  # (n, padded)
        slots = first_slot + torch.arange(n * padded).view(n, padded)

        real = position < lengths
        scatter[tokens[real]] = slots[real]
        gather.append(tokens.flatten())
        first_slot += n * padded
    return torch.cat(gather), scatter


def group_by_length(lengths: Sequence[int], waste=0.25, floor=32) -> list[list[int]]:
    """Sequences that share a padded batch, as lists of indices, the longest of each list first.

    No sequence is padded by more than `waste` of its length, except up to `floor` tokens.
    """
    groups = []
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])      # stable
    for i in longest_first:
        if groups and lengths[groups[-1][0]] <= max(floor, lengths[i] * (1 + waste)):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on the device; a copy to a GPU goes through pinned memory and does not block."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---- attend --------------------------------------------------------------------------------------

def attend(q, k, v, *, kernel: str = "plain", layout: PackedLayout | None = None,
           scale: float | None = None, window: int | None = None, chunk: int | None = None,
           softcap: float | None = None, slopes: torch.Tensor | None = None,
           sinks: torch.Tensor | None = None, filled: "Filled | None" = None) -> torch.Tensor:
    """Causal attention of q (B, H, T, Dh) over k, v (B, K, S, Dh) -> (B, H, T, Dh).

    H is a multiple of K. Query i stands at position S - T + i, so the last query sees every key:
    T == S in training, T == 1 in decoding, in between for a prompt after a cached one.

    kernel: one of KERNELS.
    layout: attention stays within each sequence of a packed row; B is 1, T == S == layout.total.
    scale: factor of q @ k.T; default Dh ** -0.5.
    window: a query sees itself and the `window` - 1 keys before it.
    chunk: a query sees only keys whose position // chunk equals its own.
    softcap: scores become softcap * tanh(scores / softcap).
    slopes: (H,) float32, for ALiBi: scores += slopes[h] * (key position - query position).
    sinks: (H,), one score per head: the softmax has exp(sink) in its denominator, too.
    filled: the filled slots of a cache of fixed size; T is 1, layout is None.

    Raises ValueError for an unknown kernel or one that lacks a requested feature, RuntimeError when
    torch refuses the named backend for these inputs.
    """
    T, S = q.shape[2], k.shape[2]
    assert T <= S and q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    if layout is not None:
        one_row = q.shape[0] == 1 and T == S == layout.total
        assert one_row, (q.shape, k.shape, layout.lengths)
    check_kernel(kernel, softcap, slopes, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    if filled is not None:
        if filled.ends is None:
            return one_query_per_row(q, k, v, kernel, scale, filled, window, chunk, softcap, slopes,
                                     sinks)
        return one_query(q, k, v, kernel, scale, softcap, filled, sinks)

    # A chunk becomes a sequence of the layout, or a call of its own. One sequence needs no layout.
    if chunk is not None and layout is not None:
        layout = layout.chunked(chunk)
        chunk = None
    if layout is not None and len(layout.lengths) == 1:
        layout = None
    if chunk is not None and chunk < S:
        return attend_in_chunks(q, k, v, chunk, kernel=kernel, scale=scale, window=window,
                                softcap=softcap, slopes=slopes, sinks=sinks)
    longest = S if layout is None else layout.max_len
    if window is not None and window >= longest:
        window = None

    q, k = q.to(v.dtype), k.to(v.dtype)     # under autocast the norms of q and k return float32
    return run_kernel(q, k, v, kernel, scale, layout, window, softcap, slopes, sinks)


def check_kernel(kernel: str, softcap, slopes, sinks):
    """Raise ValueError for an unknown kernel, or one that lacks softcap, ALiBi or sinks."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}; known: {', '.join(KERNELS)}")
    wanted = (softcap is not None, slopes is not None, sinks is not None)
    if missing := missing_feature(kernel, *wanted):
        others = [repr(name) for name in KERNELS if not missing_feature(name, *wanted)]
        raise ValueError(f"attention kernel {kernel!r} {missing}; take one of {', '.join(others)}")


def missing_feature(kernel: str, softcap: bool, alibi: bool, sinks: bool) -> str | None:
    """The requested feature that a kernel lacks, as the end of a sentence, or None."""
    if softcap and kernel in ("torch-varlen", *SDPA):
        return "has no softcap"
    if alibi and kernel == "torch-varlen":
        return "has no ALiBi"
    if sinks and kernel in ("torch-varlen", "flash-attn"):
        return "has no attention sinks"
    return None


def attend_in_chunks(q, k, v, chunk: int, **options) -> torch.Tensor:
    """One call of `attend` per chunk of positions, without a mask."""
    T, S = q.shape[2], k.shape[2]
    cached = S - T                          # keys before the first query
    outs = []
    for start in range(cached // chunk * chunk, S, chunk):
        queries = slice(max(start - cached, 0), start + chunk - cached)
        keys = slice(start, start + chunk)
        outs.append(attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], **options))
    return torch.cat(outs, dim=2)


def run_kernel(q, k, v, kernel, scale, layout, window, softcap, slopes, sinks) -> torch.Tensor:
    """Call the function of a kernel."""
    if kernel == "plain":
        return plain_attention(q, k, v, scale, layout, window, softcap, slopes, sinks)
    if kernel == "flash-attn":
        return flash_attn_2(q, k, v, scale, layout, window, softcap, slopes)
    if kernel == "torch-varlen":
        if layout is not None:
            return torch_varlen(q, k, v, scale, layout, window)
        kernel = "sdpa-flash"               # without boundaries it is the same code
    if layout is not None:
        return sdpa_packed(q, k, v, kernel, scale, layout, window, slopes, sinks)
    return sdpa(q, k, v, kernel, scale, window, slopes, sinks)


# ---- the plain twin ------------------------------------------------------------------------------

def plain_attention(q, k, v, scale, layout=None, window=None, softcap=None, slopes=None,
                    sinks=None, wide_scores=True) -> torch.Tensor:
    """The slow twin: sequence by sequence, and PLAIN_QUERIES queries at a time."""
    rules = (window, softcap, slopes, sinks, wide_scores)
    if layout is not None:
        sequences = zip(*(x.split(layout.lengths, dim=2) for x in (q, k, v)))
        outs = [plain_attention(*sequence, scale, None, *rules) for sequence in sequences]
        return torch.cat(outs, dim=2)

    end = k.shape[2] - q.shape[2]
    outs = []
    for block in q.split(PLAIN_QUERIES, dim=2):
        T = block.shape[2]
        end += T                            # no query of the block sees a later key
        keys, values = keys_in_window(k[:, :, :end], v[:, :, :end], T, window)
        outs.append(plain_block(block, keys, values, scale, *rules))
    return torch.cat(outs, dim=2)


def plain_block(q, k, v, scale, window, softcap, slopes, sinks, wide_scores) -> torch.Tensor:
    """The definition of attention: the score of every query with every key.

    Scores are float32, and q is scaled before the matmul: in float16 the q @ k.T of Qwen2 exceeds
    65504, and inf becomes NaN in the softmax. wide_scores=False rounds each step to the dtype of q;
    fast/attention_picker.py measures by it what rounding explains.
    """
    T, S = q.shape[2], k.shape[2]
    k, v = repeat_heads(k, v, q.shape[1])
    dtype = torch.promote_types(q.dtype, torch.float32) if wide_scores else q.dtype
    with torch.autocast(q.device.type, enabled=False):          # it would compute in 16 bits
        scores = (q.to(dtype) * scale) @ k.to(dtype).transpose(-1, -2)          # (B, H, T, S)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores + alibi_bias(slopes, T, S).to(dtype)
        mask = causal_mask(T, S, window, q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            sinks = sinks[:, None, None]                            # (H, 1, 1)
        return softmax_with_sinks(scores, sinks).to(v.dtype) @ v


def softmax_with_sinks(scores, sinks) -> torch.Tensor:
    """Softmax of scores (…, S) with a sink in each row, whose probability is dropped.

    sinks: broadcasts to (…, 1). None: the ordinary softmax.
    """
    if sinks is None:
        return scores.softmax(-1)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((sinks, scores), dim=-1).softmax(-1)[..., 1:]


def causal_mask(T: int, S: int, window: int | None, device) -> torch.Tensor:
    """True where a query sees a key, (T, S) bool.

    Positions are compared, not subtracted: differences would take 8 bytes for each pair.
    """
    keys = torch.arange(S, device=device)
    queries = torch.arange(S - T, S, device=device)[:, None]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    return visible


def alibi_bias(slopes, T: int, S: int) -> torch.Tensor:
    """The ALiBi term of the scores, (H, T, S): slope times distance (arXiv:2108.12409, sec. 3)."""
    keys = torch.arange(S, device=slopes.device, dtype=slopes.dtype)    # exact below 2**24
    queries = torch.arange(S - T, S, device=slopes.device, dtype=slopes.dtype)[:, None]
    return slopes[:, None, None] * (keys - queries)


def keys_in_window(k, v, T: int, window: int | None):
    """k, v (B, K, S, Dh) without the first keys, which none of the last T positions sees."""
    if window is None or T + window > k.shape[2]:
        return k, v
    count = T + window - 1
    return k[:, :, -count:], v[:, :, -count:]


def repeat_heads(k, v, H: int):
    """k, v (B, K, S, Dh) -> (B, H, S, Dh): each key/value head serves H // K query heads."""
    repeats = H // k.shape[1]
    return k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)


# ---- torch's scaled_dot_product_attention --------------------------------------------------------

def sdpa(q, k, v, kernel, scale, window=None, slopes=None, sinks=None) -> torch.Tensor:
    """torch's SDPA with one backend."""
    k, v = keys_in_window(k, v, q.shape[2], window)
    T, S = q.shape[2], k.shape[2]
    if S == 1 and kernel == "sdpa-cudnn":
        kernel = "sdpa-math"                # cuDNN refuses a single key
    if T == 1 and slopes is None:
        return one_query(q, k, v, kernel, scale, sinks=sinks)

    mask, backends = sdpa_mask(q, S, kernel, window, slopes)
    if sinks is not None:
        return sdpa_with_sinks(q, k, v, kernel, scale, mask, backends, sinks)
    return run_sdpa(q, k, v, kernel, scale, mask, backends)


def run_sdpa(q, k, v, kernel, scale, mask, backends) -> torch.Tensor:
    """torch's SDPA, with a mask or causal."""
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if q.is_cuda and takes_grouped_heads(kernel, mask is not None):
            grouped = {"enable_gqa": True}
        else:
            k, v = repeat_heads(k, v, q.shape[1])

    # Contiguous: some ROCm builds give wrong numbers when only v is a transposed view
    # (ROCm/pytorch#3230).
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    is_causal = q.shape[2] > 1 and mask is None
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale,
                                              **grouped)


def sdpa_mask(q, S: int, kernel, window, slopes):
    """(mask or None, the backends that may run).

    is_causal aligns the first query with the first key, so it is correct only for T == S without a
    window; one query needs no mask. ALiBi is a mask of numbers: the picker refuses a backend that
    takes none.
    """
    T = q.shape[2]
    if slopes is not None:
        bias = alibi_bias(slopes, T, S)
        hidden = ~causal_mask(T, S, window, q.device)
        mask = bias.masked_fill_(hidden, float("-inf")).to(q.dtype)[None]       # (1, H, T, S)
        return mask, [SDPA[kernel]]
    if T == 1 or (T == S and window is None):
        return None, [SDPA[kernel]]
    mask = causal_mask(T, S, window, q.device)
    return mask, [SDPA[name] for name in with_mask(kernel)]


def sdpa_with_sinks(q, k, v, kernel, scale, mask, backends, sinks) -> torch.Tensor:
    """Sinks by SDPA, which does not support them: an extra first key has the sink as its score.

    Its value is 0. The score comes from extra features, SINK_FEATURES of them because kernels need
    multiples of 8: the first is sinks[h] / scale in every query, 1 in the extra key and 0 in all
    other keys. Without a mask an extra query makes as many queries as keys, as is_causal requires.
    """
    Dh = q.shape[3]
    feature = F.pad((sinks / scale).to(q.dtype)[:, None], (0, SINK_FEATURES - 1))       # (H, 8)
    q = torch.cat((q, feature[:, None].expand(*q.shape[:3], -1)), dim=-1)
    sink_key = F.pad(torch.ones_like(k[:, :, :1, :1]), (Dh, SINK_FEATURES - 1))
    k = torch.cat((sink_key, F.pad(k, (0, SINK_FEATURES))), dim=2)
    v = F.pad(v, (0, SINK_FEATURES, 1, 0))
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True)
        return run_sdpa(q, k, v, kernel, scale, mask, backends)[..., :Dh]
    q = F.pad(q, (0, 0, 1, 0))
    return run_sdpa(q, k, v, kernel, scale, None, backends)[:, :, 1:, :Dh]


def takes_mask(kernel: str) -> bool:
    """Whether a kernel on a GPU takes a mask. cuDNN's was tried in torch 2.11 and 2.14."""
    since = {"sdpa-cudnn": (2, 11), "sdpa-efficient": (2, 0), "sdpa-math": (2, 0)}
    return kernel in since and TORCH >= since[kernel]


def with_mask(kernel: str) -> list[str]:
    """The backends that may run for a mask; the picker's mask_note says where others are needed."""
    if takes_mask(kernel) and kernel != "sdpa-efficient":
        return [kernel]
    return [kernel, "sdpa-efficient", "sdpa-math"]


def takes_grouped_heads(kernel: str, masked: bool) -> bool:
    """Whether torch's kernel on a GPU takes K < H; repeating k and v is right, but costs memory.

    torch 2.4 has no `enable_gqa`, and flash on ROCm refuses it before 2.6. Where a backend refuses
    it, it leads to MATH. cuDNN's and efficient's were tried in these releases of torch for CUDA.
    """
    if torch.version.hip:
        since = {"sdpa-flash": (2, 6), "torch-varlen": (2, 12)}
    else:
        since = {"sdpa-flash": (2, 5), "torch-varlen": (2, 12), "sdpa-cudnn": (2, 11),
                 "sdpa-efficient": (2, 14)}
    if masked and not takes_mask(kernel):
        return False
    return kernel in since and TORCH >= since[kernel]


def sdpa_packed(q, k, v, kernel, scale, layout, window, slopes, sinks) -> torch.Tensor:
    """SDPA of a packed row: each group of the layout is one right-padded batch."""
    slots = [n * padded for n, padded in layout.groups]
    outs = []
    # views whose backward is no tensor of zeros for all slots, as that of x[0] or of a slice is
    rows = (x.squeeze(0).index_select(1, layout.gather) for x in (q, k, v))
    groups = zip(*(x.split(slots, dim=1) for x in rows))
    for (n, padded), group in zip(layout.groups, groups):               # (H or K, slots, Dh)
        batch = (x.unflatten(1, (n, padded)).transpose(0, 1) for x in group)
        group_window = window if window is not None and window < padded else None
        out = sdpa(*batch, kernel, scale, group_window, slopes, sinks)  # (n, H, padded, Dh)
        outs.append(out.transpose(0, 1).flatten(1, 2))                  # (H, n * padded, Dh)
    return torch.cat(outs, dim=1).index_select(1, layout.scatter)[None]


# ---- kernels that know boundaries ----------------------------------------------------------------

def flash_attn_2(q, k, v, scale, layout, window, softcap, slopes) -> torch.Tensor:
    """The package flash-attn. Arguments that older versions lack are passed only when needed."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    options = {"softmax_scale": scale, "causal": True}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if softcap is not None:
        options["softcap"] = softcap
    if slopes is not None:
        options["alibi_slopes"] = slopes

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                    # (B, T or S, H or K, Dh)
    if layout is None:
        return flash_attn_func(q, k, v, **options).transpose(1, 2)
    bounds = (layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len)
    q, k, v = (x.squeeze(0) for x in (q, k, v))
    return flash_attn_varlen_func(q, k, v, *bounds, **options)[None].transpose(1, 2)


def torch_varlen(q, k, v, scale, layout, window) -> torch.Tensor:
    """torch's own flash kernel with boundaries; in torch 2.11 without grouped heads."""
    from torch.nn.attention.varlen import varlen_attn
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))         # (T, H or K, Dh)
    grouped = {}
    if takes_grouped_heads("torch-varlen", masked=False):
        grouped = {"enable_gqa": q.shape[1] != k.shape[1]}
    else:
        k, v = repeat_heads(k, v, q.shape[1])
    bounds = (layout.cu_seqlens, layout.cu_seqlens, layout.max_len, layout.max_len)
    window_size = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, *bounds, scale=scale, window_size=window_size, **grouped)
    return out.transpose(0, 1)[None]


# ---- decoding: one query -------------------------------------------------------------------------

@dataclass
class Filled:
    """The number of filled slots in a cache of S slots, as tensors on the device.

    A step captured as a CUDA graph cannot read it otherwise, and each row of a batch has its own.
    """
    mask: torch.Tensor                      # (B, 1, 1, S) bool, the filled slots; the query is last
    ends: torch.Tensor | None = None        # (2,) int32, 0 and the count; None for several rows
    query_ends: torch.Tensor | None = None  # (2,) int32, 0 and H / K, see one_query_varlen
    bias: torch.Tensor | None = None        # the mask as numbers to add, for SDPA; may be None

    def query_position(self) -> torch.Tensor:
        """(B, 1, 1, 1)."""
        return self.mask.sum(-1, keepdim=True) - 1

    def distance(self) -> torch.Tensor:
        """Key position minus query position, (B, 1, 1, S)."""
        return torch.arange(self.mask.shape[-1], device=self.mask.device) - self.query_position()

    def visible(self, window: int | None, chunk: int | None) -> torch.Tensor:
        """True for the slots that the query of each row sees, (B, 1, 1, S) bool."""
        if window is not None:
            return self.mask & (self.distance() > -window)
        if chunk is not None:
            return self.mask & (self.distance() >= -(self.query_position() % chunk))
        return self.mask


def one_query(q, k, v, kernel, scale, softcap=None, filled: Filled | None = None,
              sinks=None) -> torch.Tensor:
    """q (B, H, 1, Dh) sees all of k, v (B, K, S, Dh), or their filled slots.

    Without a mask the H / K query heads that share a key/value head can be the rows of one matrix:
    no key is repeated, and a cache is read in place. With sinks it runs one_query_plain, because
    an extra key would copy the cache for every token.
    """
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])            # (B, K, H / K, Dh)
    if filled is not None and kernel in ("flash-attn", "torch-varlen"):
        return one_query_varlen(q, k, v, kernel, scale, softcap, filled)
    mask = None if filled is None else filled.mask
    if kernel == "plain" or sinks is not None:
        return one_query_plain(q, k, v, scale, softcap, mask, sinks=sinks)
    if filled is not None and filled.bias is not None:
        mask = filled.bias                  # else SDPA makes these numbers in every layer

    k, v = (x if x.stride(2) == x.shape[3] else x.contiguous() for x in (k, v))     # see sdpa
    with only_backends([kernel] if mask is None else with_mask(kernel)):
        out = F.scaled_dot_product_attention(rows, k, v, mask, is_causal=False, scale=scale)
    return out.reshape(q.shape)


def one_query_plain(q, k, v, scale, softcap=None, mask=None, bias=0.0, sinks=None) -> torch.Tensor:
    """The definition of one_query. mask: (B or 1, 1, 1, S) bool. bias: added to the scores."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])            # (B, K, H / K, Dh)
    scores = (rows.float() * scale) @ k.float().transpose(-1, -2)       # (B, K, H / K, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sinks = sinks.view(k.shape[1], -1, 1)                           # (K, H / K, 1)
    return (softmax_with_sinks(scores, sinks).to(v.dtype) @ v).view(q.shape)


def one_query_per_row(q, k, v, kernel, scale, filled: Filled, window, chunk, softcap,
                      slopes, sinks) -> torch.Tensor:
    """q (B, H, 1, Dh) sees the filled slots of its own row of k, v (B, K, S, Dh)."""
    mask = filled.visible(window, chunk)
    if kernel != "plain" and softcap is None and slopes is None and sinks is None:
        kernel = kernel if kernel in SDPA else "sdpa-efficient"         # the others take no mask
        return one_query(q, k, v, kernel, scale, filled=Filled(mask))
    bias = 0.0
    if slopes is not None:
        bias = slopes.view(1, k.shape[1], -1, 1) * filled.distance()
    return one_query_plain(q, k, v, scale, softcap, mask, bias, sinks)


def one_query_varlen(q, k, v, kernel, scale, softcap, filled: Filled) -> torch.Tensor:
    """one_query by a kernel that reads the end of the keys from the device.

    The H / K heads that share a key/value head are H / K queries, so that none is repeated.
    """
    rows = q.reshape(k.shape[1], -1, q.shape[3])                        # (K, H / K, Dh)
    q, k, v = (x.transpose(0, 1) for x in (rows, k[0], v[0]))           # (H / K or S, K, Dh)
    bounds = (filled.query_ends, filled.ends, len(q), len(k))
    if kernel == "flash-attn":
        from flash_attn import flash_attn_varlen_func
        options = {"softcap": softcap} if softcap is not None else {}
        out = flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scale, causal=False, **options)
    else:
        from torch.nn.attention.varlen import varlen_attn
        out = varlen_attn(q, k, v, *bounds, scale=scale)
    return out.transpose(0, 1).reshape(1, -1, 1, out.shape[2])


@contextmanager
def only_backends(kernels: Sequence[str]) -> Iterator[None]:
    """sdpa_kernel without its 30 microseconds, longer than one query of a small model takes."""
    wanted = [SDPA_FLAGS[kernel] for kernel in kernels]
    before = {}
    for name in SDPA_FLAGS.values():
        before[name] = getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
    try:
        for name in before:
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in wanted)
        yield
    finally:
        for name, enabled in before.items():
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)
