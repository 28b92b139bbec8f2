"""Embedding and head cut by token id, and the loss that never gathers the logits.

Each of N processes holds V/N rows of both matrices. An id of another process gives zeros to the sum
of the embeddings; the loss of a position needs, of all processes, the largest score, the sum of the
exponentials, and the target's score. So a step sends three numbers a label instead of V.

Requires: scale/collectives.py, losses.py (whose losses_and_grad is the twin).
Next: scale/tensor_parallel.py.
Papers: Megatron-LM arXiv:1909.08053 (sec. 3).
"""
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from checkpoint.shards import Cut, cut_parameter
from losses import logits_of
from scale.collectives import enter, leave, sum_over
from scale.mesh import Axis


def why_whole(config, model, parts: int) -> str:
    """Why every process needs the whole embedding and head; "" where they are cut.

    model: the whole one, with its adapters; it may be without storage.
    """
    reads_all = [name for name in ("use_eaft_loss", "use_asft_loss", "label_smoothing_factor",
                                   "compute_accuracy") if getattr(config, name)]
    if reads_all:
        return f"{' and '.join(reads_all)} reads the scores of all tokens"
    if config.stage == "rm":
        return "stage: rm scores texts, not tokens"
    if model.config.vocab_size % parts:
        return f"{model.config.vocab_size} rows are not a multiple of {parts}"
    if model.config.normalized_head:
        return "the head's rows are normalized"
    tables = (model.model.embed_tokens, model.lm_head)
    trained = [p for table in tables for p in table.parameters() if p.requires_grad]
    if config.finetuning_type != "full":
        return "they are trained" if trained else ""
    token_by_token = config.stage in ("dpo", "kto") or config.use_dft_loss
    return "this loss trains the head token by token" if token_by_token else ""


def cut_vocabulary(model, axis: Axis):
    """Cut embedding and head by token id."""
    embedding = model.model.embed_tokens
    cut = Cut(0, (model.config.vocab_size,), axis)
    (start, end), = cut.ranges()
    for module in (embedding, model.lm_head):
        cut_parameter(module, "weight", cut)
    pad = embedding.padding_idx
    embedding.padding_idx = pad - start if pad is not None and start <= pad < end else None
    embedding.forward = partial(embed_own, embedding, start, axis)
    model.model.norm.register_forward_hook(lambda module, args, out: enter(out, axis))


def embed_own(embedding, start: int, axis: Axis, ids):
    """nn.Embedding.forward: (B, T) -> (B, T, D). Ids of other processes give zeros to the sum."""
    local = ids - start
    own = (local >= 0) & (local < len(embedding.weight))
    x = F.embedding(torch.where(own, local, 0), embedding.weight, embedding.padding_idx)
    return leave(x * own[..., None], axis)


def vocabulary_loss(axis: Axis, scores, y, softcap, dtype, needs_grad: bool = True):
    """losses.losses_and_grad where this process has the scores (c, V / size) of its token ids.

    Sent for each position: its largest score, then its sum of exponentials and the target's score.
    """
    logits, tanh = logits_of(scores, softcap)
    local = y - axis.rank * logits.shape[1]                                     # (c,)
    own = (local >= 0) & (local < logits.shape[1])
    index = torch.where(own, local, 0)[:, None]
    at_y = logits.gather(1, index) * own[:, None]                               # (c, 1)
    top = sum_over(axis, logits.amax(-1, keepdim=True), dist.ReduceOp.MAX)
    e = logits.sub_(top).exp_()
    s, at_y = sum_over(axis, torch.cat((e.sum(-1, keepdim=True), at_y), 1)).split(1, dim=1)
    losses = s.log() + top - at_y
    if not needs_grad:
        return losses, None
    p = e.div_(s)
    p.scatter_add_(1, index, -own[:, None].to(p.dtype))
    if tanh is not None:
        p *= 1 - tanh.square()
    return losses, p.to(dtype)
