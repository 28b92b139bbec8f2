"""Causal attention: one call, `attend`, over several kernels that must all give the same numbers.

`plain` is the readable slow twin and the definition of what is right; the others are torch's SDPA backends, one by one,
torch's varlen and the flash-attn package. `pick_kernel` tries each on this machine and names the fastest correct one.

    python -m fast.attention_picker                                                 the table of kernels for this machine
    python -m fast.attention_picker --head_dim 64 --num_heads 14 --num_kv_heads 2   the same for the shapes of another model

Read first: nothing. Read next: model.py, which calls `attend` once per layer; docs/rocm_dcu.md for AMD and Hygon cards.

Sources: Vaswani et al. 2017 (arXiv:1706.03762); grouped heads, arXiv:2305.13245; FlashAttention-2, arXiv:2307.08691;
sliding window, arXiv:2310.06825; ALiBi, arXiv:2108.12409; capped scores, arXiv:2408.00118 (sec. 2). Letters for shapes
as in model.py: B batch, T query length, S key length, H query heads, K key/value heads, Dh head_dim.
"""
import re
from contextlib import contextmanager
from dataclasses import dataclass

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

class PackedLayout:
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
            setattr(self, name, to_device(getattr(self, name), device))
        for layout in self.chunks.values():
            layout.to(device)
        return self

    def chunked(self, chunk):
        """The layout whose segments are these, cut at every multiple of `chunk` tokens; made once and kept."""
        if chunk >= self.max_len:
            return self
        if chunk not in self.chunks:
            lengths = [min(chunk, n - start) for n in self.lengths for start in range(0, n, chunk)]
            self.chunks[chunk] = PackedLayout(lengths, self.gather.device)
        return self.chunks[chunk]


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on the device; from pinned memory a GPU copies it without making the host wait."""
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
