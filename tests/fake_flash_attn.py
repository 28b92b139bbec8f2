"""Imitations of flash-attn and of torch's varlen attention, computed by the plain kernel.

Requires: attention.py.
"""
import types

import torch

import attention as A


def fake_flash_attn(spoil=lambda q, k, v, out: out, causal_from_top_left=False, ignored=()):
    """A module `flash_attn` with the package's calling convention.

    spoil(q, k, v, out): the falsified output of one sequence.
    ignored: which of the arguments window, softcap and slopes have no effect.
    """
    def one(q, k, v, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
        assert causal and q.dtype == k.dtype == v.dtype                     # (T, H, Dh), (S, K, Dh)
        assert alibi_slopes is None or (
            alibi_slopes.dtype is torch.float32 and alibi_slopes.shape == q.shape[1:2]
        )
        rules = {"window": window_size[0] + 1 or None, "softcap": softcap or None,
                 "slopes": alibi_slopes}
        rules = {name: None if name in ignored else value for name, value in rules.items()}
        if causal_from_top_left:
            k, v = k[:len(q)], v[:len(q)]
        out = A.plain_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), softmax_scale,
                                **rules)
        return spoil(q, k, v, out[0].transpose(0, 1))

    def flash_attn_func(q, k, v, **options):
        return torch.stack([one(*row, **options) for row in zip(q, k, v)])

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                               **options):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k and sum(lengths) == len(q)
        return torch.cat([one(*row, **options)
                          for row in zip(q.split(lengths), k.split(lengths), v.split(lengths))])

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def fake_varlen(grouped_heads=True):
    """A module with `varlen_attn` as torch 2.12 defines it; without grouped heads, as 2.11 does."""
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size,
                    **more):
        assert more.keys() == ({"enable_gqa"} if grouped_heads else set())
        assert more.get("enable_gqa", False) == (query.shape[1] != key.shape[1])
        assert window_size[1] == 0
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return fake_flash_attn().flash_attn_varlen_func(
            query, key, value, *ends, softmax_scale=scale, causal=True, window_size=window_size
        )
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlen_attn
    return module
