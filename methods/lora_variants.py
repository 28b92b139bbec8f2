"""Variants of LoRA: DoRA, another layer, and PiSSA, another start.

    attach_lora(model, config, seed=42, **variant_arguments(config))

DoRA trains the norm of each row of W separately from its direction. PiSSA starts A and B as the
principal components of W, and trains the rest of W no more.

Requires: lora.py.
Next: methods/quant.py.
Papers: DoRA arXiv:2402.09353, PiSSA arXiv:2404.02948, randomized SVD arXiv:0909.4061 (alg. 4.4).
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRAConfig, LoRALinear, dequantized_weight, is_quantized, merged_weight


def variant_arguments(config: LoRAConfig) -> dict:
    """The arguments `layer` and `init` of attach_lora for this configuration."""
    init = []
    if config.pissa:
        niter = int(str(config.init_lora_weights).partition("_niter_")[2] or -1)
        init.append(partial(init_pissa, niter=niter))
    if config.use_dora:
        init.append(init_magnitude)
    return {"layer": DoRALinear if config.use_dora else LoRALinear, "init": init}


# ---- DoRA ---------------------------------------------------------------------------------------


class DoRALinear(LoRALinear):
    """LoRALinear whose rows have a trained norm m: y = m / |W + s B A| * (W + s B A) x + bias."""

    fixed_gain = None       # the gain, where the weights no longer change

    def __init__(self, base_layer: nn.Module, r: int, scale: float, dropout: float = 0.0,
                 device=None):
        super().__init__(base_layer, r, scale, dropout, device)
        norms = torch.empty(base_layer.out_features, device=self.lora_A.weight.device,
                            dtype=torch.float32)
        self.lora_magnitude_vector = nn.Parameter(norms)

    def forward(self, x):
        """arXiv:2402.09353, eq. 5, multiplied in float32, where a gain near 1 keeps its digits.

        The adapter sees the dropped x, and gain - 1 is part of the adapter, as in PEFT.
        """
        if not self.enabled:
            return super().forward(x)
        gain = self.gain()                                                       # (out,)
        dropped = self.dropout(x)
        y = matmul_without_bias(self.base_layer, x)                              # (…, out)
        change = self.low_rank(dropped, *self.adapter())
        if dropped is x:
            y = (gain * (y + change)).to(x.dtype)
        else:
            y_dropped = matmul_without_bias(self.base_layer, dropped)
            y = (y + (gain - 1) * y_dropped + gain * change).to(x.dtype)
        bias = self.base_layer.bias
        return y if bias is None else y + bias

    def gain(self):
        """m / norm of each row of W + s B A, (out,) float32.

        The norm counts as a constant: gradients flow to m alone (sec. 4.3).
        """
        if self.fixed_gain is not None:
            return self.fixed_gain
        return self.lora_magnitude_vector / self.norms()

    def fix(self):
        """Compute the gain once, for inference."""
        self.fixed_gain = self.gain().detach()

    @torch.no_grad()
    def norms(self):
        """The norm of each row of W + s B A, (out,) float32."""
        with torch.autocast(self.lora_A.weight.device.type, enabled=False):
            W = dequantized_weight(self.base_layer, torch.float32)
            A = self.lora_A.weight.float()
            B = self.lora_B.weight.float()
            return row_norms(torch.addmm(W, B, A, alpha=self.scale))

    @torch.no_grad()
    def set_magnitude(self, W):
        """Let m be the norms of the rows of W (out, in), for an adapter with B = 0."""
        self.lora_magnitude_vector.copy_(row_norms(W.float()))

    def effective_weight(self):
        """The matrix (out, in) with the adapter in it; gradients flow to A, B and m."""
        weight = super().effective_weight()
        if not self.enabled:
            return weight
        return (self.gain()[:, None] * weight).to(weight.dtype)

    @torch.no_grad()
    def merged(self):
        """The matrix with the adapter in it, summed in float32."""
        return merged_dora_weight(dequantized_weight(self.base_layer), self.lora_A.weight,
                                  self.lora_B.weight, self.scale, self.lora_magnitude_vector)


def matmul_without_bias(layer: nn.Module, x):
    """W x of a linear layer."""
    return layer.matmul(x) if is_quantized(layer) else F.linear(x, layer.weight)


def row_norms(rows):
    """(out,) for (out, in). Rows of zeros, as in padded vocabularies, get the smallest norm."""
    return torch.linalg.norm(rows, dim=1).clamp(min=torch.finfo(torch.float32).tiny)


def merged_dora_weight(W, A, B, scale: float, magnitude):
    """merged_weight with the norm `magnitude` (out,) for each row; in W's dtype."""
    rows = merged_weight(W.float(), A, B, scale)
    return ((magnitude.float() / row_norms(rows))[:, None] * rows).to(W.dtype)


@torch.no_grad()
def init_magnitude(layer: DoRALinear, generator=None):
    """Let m be the norms of the rows, so that the layer is unchanged."""
    if not layer.weight.is_meta:
        layer.lora_magnitude_vector.copy_(layer.norms())


# ---- PiSSA --------------------------------------------------------------------------------------


@torch.no_grad()
def init_pissa(layer: LoRALinear, generator: torch.Generator, niter: int):
    """Start A and B as the principal components of W, and remove them from W."""
    W = dequantized_weight(layer.base_layer, torch.float32)
    r = layer.lora_A.out_features
    A, B = principal_components(W, r, layer.scale, niter, generator)
    layer.lora_A.weight.copy_(A)
    layer.lora_B.weight.copy_(B)
    remove_adapter(layer)


@torch.no_grad()
def remove_adapter(layer: LoRALinear):
    """Subtract scale * B A from W, so that W and adapter together are what W was.

    A and B are kept as `removed`: with the adapter disabled the layer still is what it was.
    """
    base = layer.base_layer
    if is_quantized(base):
        raise ValueError("PiSSA takes parts out of 16-bit weights, and this base has fewer bits: "
                         "take an adapter that pissa_convert has written, or a 16-bit base")
    layer.removed = layer.lora_A.weight.clone(), layer.lora_B.weight.clone()
    if not base.weight.is_meta:
        rest = merged_weight(base.weight, *layer.removed, -layer.scale)
        base.weight = nn.Parameter(rest, requires_grad=False)


def principal_components(W, r: int, scale: float, niter: int, generator: torch.Generator):
    """A (r, in) and B (out, r) with scale * B A = the r largest singular components of W (out, in).

    Both get the square root of the singular values (arXiv:2404.02948, eq. 2 and 3). niter: passes
    of the randomized SVD; negative: the exact SVD. Raises ValueError where W has no r components.
    """
    if r > min(W.shape):
        raise ValueError(f"pissa_init: a matrix of {W.shape[0]} x {W.shape[1]} has no {r} singular "
                         "components; lower lora_rank")
    if niter < 0:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        start = torch.randn(W.shape[1], r, generator=generator).to(W)
        Q = torch.linalg.qr(W @ start).Q                                         # (out, r)
        for _ in range(niter):
            Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
        U = Q @ U
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
