"""Causal attention: one call, `attend`, over several kernels that must all give the same numbers.

`plain` is the readable slow twin and the definition of what is right; the others are torch's SDPA backends, one by one, and
flash-attn. `pick_kernel` tries each on this machine against the twin and names the fastest correct one.

    python attention.py                              the table of kernels for this machine
    python attention.py --head_dim 64 --heads 14 --kv_heads 2

Read first: nothing. Read next: model.py, which calls `attend` once per layer.

Sources: Vaswani et al. 2017 (arXiv:1706.03762); grouped heads, arXiv:2305.13245; FlashAttention-2, arXiv:2307.08691;
sliding window, arXiv:2310.06825. Letters for shapes as in model.py: B batch, T query length, S key length, H query heads,
K key/value heads, Dh head_dim.
"""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
KERNELS = ("flash-attn", "torch-varlen", *SDPA, "plain")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Layout:
    """How the samples of a micro-batch lie end to end in one row; made once per micro-batch, used by every layer.

    Kernels that know boundaries read `cu_seqlens` (int32, n + 1 offsets) and `max_len`. For the others, segments of similar
    length are padded on the right and run as one batch: under causal attention a pad on the right is seen by nobody, so no
    mask is needed and the flash backends stay usable. `groups` are (segments, padded length) of those batches, `gather` the
    row index of every slot of the batches laid end to end, `scatter` the slot of every token of the row.
    """

    def __init__(self, lengths, device="cpu"):
        """lengths: tokens of each segment, in order, each >= 1."""
        self.lengths = tuple(int(n) for n in lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"segment lengths must be 1 or more tokens, found {list(self.lengths)}")
        self.total, self.max_len = sum(self.lengths), max(self.lengths)
        starts = torch.tensor((0, *self.lengths)).cumsum(0)
        self.cu_seqlens = starts.to(torch.int32)

        self.groups, members = group_by_length(self.lengths)
        slots = []
        self.scatter = torch.empty(self.total, dtype=torch.long)
        filled = 0
        for (_, padded), indices in zip(self.groups, members):
            for i in indices:
                # a pad repeats the segment's last token: a finite value, whose gradient is exactly zero
                slots.append(starts[i] + torch.arange(padded).clamp(max=self.lengths[i] - 1))
                self.scatter[starts[i]: starts[i + 1]] = torch.arange(filled, filled + self.lengths[i])
                filled += padded
        self.gather = torch.cat(slots)
        self.to(device)

    def to(self, device):
        """Move the index tensors in place; returns self."""
        self.cu_seqlens = self.cu_seqlens.to(device, non_blocking=True)
        self.gather = self.gather.to(device, non_blocking=True)
        self.scatter = self.scatter.to(device, non_blocking=True)
        return self


def group_by_length(lengths, waste=0.25, floor=32):
    """Segments that may share a padded batch: each is padded by at most `waste` of its own length, or to `floor` tokens.

    Returns ([(segments, padded length)], [indices of the segments]), longest group first.
    """
    groups, members = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):   # stable: equal lengths keep their order
        if groups and groups[-1][1] <= max(floor, lengths[i] * (1 + waste)):
            groups[-1] = (groups[-1][0] + 1, groups[-1][1])
            members[-1].append(i)
        else:
            groups.append((1, lengths[i]))
            members.append([i])
    return groups, members


def attend(q, k, v, *, kernel="plain", layout=None, scale=None, window=None):
    """Causal attention of q (B, H, T, Dh) over k, v (B, K, S, Dh) -> (B, H, T, Dh). H is a multiple of K.

    Query i stands at position S - T + i, so the last query sees every key, whether T == S (training), T == 1 (decoding) or
    between (a prompt after a cached one). window w: a query sees itself and the w - 1 keys before it. scale: default
    Dh ** -0.5. layout: B is 1, T == S == layout.total, and attention stays within each segment.
    Raises ValueError for an unknown kernel; RuntimeError when torch refuses the named backend for these inputs.
    """
    T, S = q.shape[2], k.shape[2]
    assert T <= S and q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    assert layout is None or (q.shape[0] == 1 and T == S == layout.total), (q.shape, k.shape, layout.lengths)
    if layout is not None and len(layout.lengths) == 1:
        layout = None
    if window is not None and window >= (layout.max_len if layout else S):
        window = None
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    if kernel == "plain":
        return plain(q, k, v, scale, layout, window)
    if kernel == "flash-attn":
        return flash_attn(q, k, v, scale, layout, window)
    if kernel == "torch-varlen":
        return torch_varlen(q, k, v, scale, layout, window)
    if kernel in SDPA:
        return sdpa(q, k, v, kernel, scale, window) if layout is None else sdpa_packed(q, k, v, kernel, scale, layout, window)
    raise ValueError(f"unknown attention kernel {kernel!r}; known: {', '.join(KERNELS)}")


def plain(q, k, v, scale, layout=None, window=None):
    """The slow twin: every score written out. Others are held to this one."""
    if layout is not None:
        pieces = (x.split(layout.lengths, dim=2) for x in (q, k, v))
        return torch.cat([plain(*piece, scale, window=window) for piece in zip(*pieces)], dim=2)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))   # (B, H, S, Dh)
    # Products in float32 and q scaled before them: in float16 q·k of Qwen2 passes 65504, inf becomes NaN in the softmax.
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)                    # (B, H, T, S)
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], window, q.device), float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def visible(T, S, window, device):
    """Which keys each query may see: bool (T, S)."""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def sdpa(q, k, v, kernel, scale, window=None):
    """torch's scaled_dot_product_attention held to one backend."""
    T, S = q.shape[2], k.shape[2]
    if window is not None and S > T + window - 1:   # keys that no query reaches
        k, v = (x[:, :, S - (T + window - 1):] for x in (k, v))
        S, window = T + window - 1, None if T == 1 else window
    # SDPA's is_causal counts from the top left, so it is ours only when T == S; one query needs no mask at all.
    # Flash takes no mask: for those calls (a prompt after a cache, a short window) MATH stands in.
    mask = visible(T, S, window, q.device) if T > 1 and (T < S or window is not None) else None
    backends = [SDPA[kernel]] if mask is None else [SDPA[kernel], SDPBackend.MATH]
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if takes_grouped_heads(kernel, mask):
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    # contiguous: some ROCm builds give wrong numbers when v is a transposed view and q, k are not (ROCm/pytorch#3230)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    with sdpa_kernel(backends):   # around the call: the switches of torch.backends.cuda belong to the whole process
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, scale=scale, **grouped)


def takes_grouped_heads(kernel, mask):
    """Whether this backend takes K < H as it is; elsewhere k and v are repeated, which is always right.

    Only flash does so everywhere: torch 2.4 has no `enable_gqa`, ROCm's flash learned it in torch 2.6, and with a mask or
    another backend asking for it sends the call to MATH.
    """
    return kernel == "sdpa-flash" and mask is None and TORCH >= ((2, 6) if torch.version.hip else (2, 5))


def sdpa_packed(q, k, v, kernel, scale, layout, window):
    """SDPA knows no boundaries: run the layout's groups of similar segments, each as one right-padded batch."""
    q, k, v = (x[0].index_select(1, layout.gather) for x in (q, k, v))              # (H or K, slots, Dh)
    outs, start = [], 0
    for segments, padded in layout.groups:
        batch = (x[:, start: start + segments * padded].unflatten(1, (segments, padded)).transpose(0, 1) for x in (q, k, v))
        out = sdpa(*batch, kernel, scale, window if window is not None and window < padded else None)
        outs.append(out.transpose(0, 1).flatten(1, 2))                              # (H, segments * padded, Dh)
        start += segments * padded
    return torch.cat(outs, dim=1).index_select(1, layout.scatter)[None]
