"""LoRA that starts or multiplies otherwise: PiSSA's principal parts.

Requires: lora.py.
Next: methods/quant.py.
"""
import torch


def principal_parts(W, r: int, scale: float, niter: int, generator) -> tuple:
    """A (r, in) and B (out, r) with scale * B A = the r largest singular parts of W (out, in), which both share alike
    (arXiv:2404.02948, eq. 2 and 3).

    niter: passes of the randomised SVD; below 0: the exact one. Raises ValueError where W has no r parts.
    """
    if r > min(W.shape):
        raise ValueError(f"pissa_init: a matrix of {W.shape[0]} x {W.shape[1]} has no {r} singular parts; "
                         "lower lora_rank")
    Q = None
    if niter >= 0:
        Q = torch.linalg.qr(W @ torch.randn(W.shape[1], r, generator=generator).to(W)).Q             # (out, r)
        for _ in range(niter):
            Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(W if Q is None else Q.T @ W, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    B = (U if Q is None else Q @ U)[:, :r] * root
    return root[:, None] * Vh[:r], B
