"""Other losses of stage sft: DFT, EAFT and ASFT, which weigh the tokens of an answer, and label
smoothing.

    DFT     p(y) * -log p(y), with the factor p(y) held constant: tokens the model finds unlikely
            count little
    EAFT    (entropy of the 20 most likely tokens / 3)**eaft_alpha * -log p(y), the factor held
            constant: tokens the model is sure of count little
    ASFT    DFT + asft_alpha * KL(reference || model), the reference being the model before training
    smooth  (1 - f) * -log p(y) + f * the mean over the vocabulary of -log p, f being
            label_smoothing_factor

Requires: losses.py.
Next: runtime/build.py.
Papers: DFT arXiv:2508.05629 (eq. 9), EAFT arXiv:2601.02151, ASFT arXiv:2509.23753, label smoothing
arXiv:1512.00567 (sec. 7). Constants and means are those of LLaMA-Factory 0.9.5.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import IGNORE
from losses import (SFTObjective, capped, chunks, head_logits, supervised, token_losses,
                    weighted_sum)
from parallel import Ranks

TOP = 20            # tokens whose entropy EAFT takes, renormalized among themselves
ENTROPY_SCALE = 3.0


class DFTObjective(SFTObjective):
    """use_dft_loss. The plain cross-entropy is logged beside the loss."""

    metric_names = ("cross_entropy",)

    def loss_sum(self, model, batch):
        hidden, routing_loss = self.hidden_states(model, batch)                         # (N, D)
        loss, metrics = self.weighted_loss(model, hidden, batch)
        return loss, routing_loss, metrics

    def weighted_loss(self, model, hidden, batch):
        """(sum of factor * token loss, metrics)."""
        losses = token_losses(hidden, model.head_weight(), batch.targets,
                              model.config.final_softcap, self.matmul, self.chunk_loss)
        factors = self.factors(model, hidden, batch, losses.detach())
        metrics = {"cross_entropy": weighted_sum(losses.detach(), torch.ones_like(losses))}
        return (factors * losses).sum(), metrics

    def factors(self, model, hidden, batch, losses):
        """The factor of each token's loss, (n,), a constant: p(y)."""
        return torch.exp(-losses)


class EAFTObjective(DFTObjective):
    """use_eaft_loss."""

    def __init__(self, alpha: float, balance: float = 0.0, matmul=F.linear):
        super().__init__(balance, matmul)
        self.alpha = alpha

    @torch.no_grad()
    def factors(self, model, hidden, batch, losses):
        """The entropy of the most likely tokens, scaled; (n,). The logits are computed again."""
        rows, _ = supervised(batch.targets, hidden.device)
        W = model.head_weight().to(hidden.dtype)
        factors = torch.empty_like(losses)
        for chunk in chunks(len(rows), len(W)):
            logits, _ = head_logits(hidden[rows[chunk]], W, model.config.final_softcap, self.matmul)
            logps = logits.topk(min(TOP, len(W)), dim=-1).values.log_softmax(-1)        # (c, 20)
            entropy = -(logps.exp() * logps).sum(-1)
            factors[chunk] = (entropy / ENTROPY_SCALE) ** self.alpha
        return factors


class ASFTObjective(DFTObjective):
    """use_asft_loss. reference: a second model, or None: the model with its adapters disabled.

    LLaMA-Factory takes the mean over the labels of each micro-batch, and adds these means up
    without dividing by their number. paper_losses divides by the labels of the step instead, as
    every other loss does.
    """

    def __init__(self, config, reference=None, ranks: Ranks = Ranks(), balance: float = 0.0,
                 matmul=F.linear):
        super().__init__(balance, matmul)
        self.config = config
        self.reference = reference
        self.ranks = ranks

    def loss_sum(self, model, batch):
        with torch.no_grad(), self.reference_model(model) as reference:
            ref_hidden = reference(batch.input_ids, batch.position_ids, batch.layout)[0]
            ref_weight = reference.head_weight().detach()
        hidden, routing_loss = self.hidden_states(model, batch)                         # (N, D)
        loss, metrics = self.weighted_loss(model, hidden, batch)
        kl = kl_sum(hidden, model.head_weight(), ref_hidden, ref_weight, batch.targets,
                    model.config.final_softcap)
        loss = loss + self.config.asft_alpha * kl
        if self.config.paper_losses:
            return loss, routing_loss, metrics
        return 0.0, micro_batch_mean(loss, model, batch, self.ranks) + routing_loss, metrics


def micro_batch_mean(loss, model, batch, ranks: Ranks):
    """A loss divided by the labels of its micro-batch, whose gradients are averaged over ranks."""
    return loss / (label_count(batch) * (ranks.world if model.training else 1))


def label_count(batch) -> int:
    """Labels of a micro-batch; 1 where there are none, so that a sum can be divided by it."""
    return max(int((batch.targets != IGNORE).sum()), 1)


class SmoothedObjective(SFTObjective):
    """label_smoothing_factor: the labels' distribution is 1 - factor at y, plus factor / V at each.

    The mean over each micro-batch's labels is taken, and the sum of these means over micro-batches
    and ranks: two ranks train as one rank with twice the gradient_accumulation_steps.
    paper_losses divides by the labels of the step. The plain cross-entropy is logged, too.
    """

    metric_names = ("cross_entropy",)

    def __init__(self, config, balance: float = 0.0, matmul=F.linear):
        super().__init__(balance, matmul)
        self.config = config

    def loss_sum(self, model, batch):
        hidden, routing_loss = self.hidden_states(model, batch)                         # (N, D)
        weight, softcap = model.head_weight(), model.config.final_softcap
        rows, y = supervised(batch.targets, hidden.device)
        nll = uniform = hidden.new_zeros((), dtype=torch.float32)
        for chunk in chunks(len(rows), len(weight)):
            sums = checkpoint(smoothed_chunk, hidden[rows[chunk]], weight, y[chunk], softcap,
                              use_reentrant=False)
            nll, uniform = nll + sums[0], uniform + sums[1]
        factor = self.config.label_smoothing_factor
        loss = (1 - factor) * nll + factor * uniform
        metrics = {"cross_entropy": torch.stack((nll.detach(), nll.new_tensor(len(rows))))}
        if self.config.paper_losses:
            return loss, routing_loss, metrics
        return 0.0, loss / label_count(batch) + routing_loss, metrics


def smoothed_chunk(h, weight, y, softcap):
    """(2,): the sums over some positions of -log p(y), and of the mean of -log p over all tokens.

    h: (c, D), weight: (V, D), y: (c,). The logits are computed again in the backward pass.
    """
    logits = capped(F.linear(h, weight.to(h.dtype)).float(), softcap)                   # (c, V)
    total = logits.logsumexp(-1)
    at_y = logits.gather(1, y[:, None])[:, 0]
    return torch.stack(((total - at_y).sum(), (total - logits.mean(-1)).sum()))


def kl_sum(hidden, weight, ref_hidden, ref_weight, targets, softcap=None):
    """Sum over the supervised positions of KL(reference || model), in nats; float32 scalar.

    hidden, ref_hidden: (N, D); weight, ref_weight: (V, D), of the heads. The logits of a chunk are
    computed again in the backward pass, so that few exist at a time.
    """
    rows, _ = supervised(targets, hidden.device)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk in chunks(len(rows), len(weight)):
        here = rows[chunk]
        total = total + checkpoint(kl_of_chunk, hidden[here], weight, ref_hidden[here], ref_weight,
                                   softcap, use_reentrant=False)
    return total


def kl_of_chunk(h, weight, ref_h, ref_weight, softcap):
    """kl_sum of a few positions, with all their logits."""
    logps = capped(F.linear(h, weight.to(h.dtype)).float(), softcap).log_softmax(-1)    # (c, V)
    ref_p = capped(F.linear(ref_h, ref_weight.to(ref_h.dtype)).float(), softcap).softmax(-1)
    return F.kl_div(logps, ref_p, reduction="sum")
