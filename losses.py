"""Training losses: a sum over a known count, never an average of averages.

The supervised tokens of a whole optimizer step are counted first (num_items, over all micro-batches
and ranks); each micro-batch then adds its loss *sum* / num_items. The gradient therefore does not
depend on how the step was split into micro-batches.

The head is applied to supervised positions only, chunk by chunk, and its gradient is formed in the
same pass as the loss, so a (tokens x vocabulary) tensor never exists. Each of these functions has a
plain twin beside it that materializes all logits and leaves the rest to autograd.

Requires: model.py, lora.py.
Next: optim.py, train.py (train_step), methods/preference.py, methods/sft_losses.py.
Papers: the head's loss in chunks arXiv:2410.10989, softcapping arXiv:2408.00118 (sec. 2), balance
of experts arXiv:2101.03961.
"""
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from attention import to_device
from data import IGNORE
from lora import set_adapters

CHUNK_BYTES = 64 * 2**20        # float32 logits held at once ...
MAX_CHUNKS = 16                 # ... or more, since every chunk reads the whole head
CHUNK_MULTIPLE = 128            # positions: oneDNN (fast/matmul.py) multiplies blocks of 128 rows


# ---- cross-entropy ------------------------------------------------------------------------------


def cross_entropy_plain(hidden, weight, targets, softcap=None):
    """The plain twin of cross_entropy_sum: all logits at once."""
    logits = capped(F.linear(hidden, weight.to(hidden.dtype)).float(), softcap)         # (N, V)
    return F.cross_entropy(logits, targets.to(hidden.device), ignore_index=IGNORE, reduction="sum")


def capped(logits, softcap):
    """softcap * tanh(logits / softcap); the logits themselves if softcap is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def losses_and_grad(scores, y, softcap, dtype, needs_grad: bool = True):
    """-log p(y) of each row, (c, 1) float32, and its gradient for the scores, (c, V) in `dtype`.

    scores: (c, V), of the head, before the softcap; they may be overwritten. Without needs_grad the
    gradient is None.
    """
    logits, tanh = logits_of(scores, softcap)
    del scores                                  # make room: in 16 bits they are other memory
    losses, e, s = losses_and_exps(logits, y)
    if not needs_grad:
        return losses, None
    return losses, logits_grad(e, s, tanh, y).to(dtype)


@record_function("loss")
def cross_entropy_sum(hidden, weight, targets, softcap=None, matmul=F.linear,
                      chunk_loss=losses_and_grad, frozen_head=None):
    """Sum of the token losses in nats, a float32 scalar.

    hidden: (N, D), the final hidden states.
    weight: (V, D), of the head.
    targets: (N,), the next token's id or IGNORE; on the CPU, so that finding the supervised
        positions does not wait for a GPU.
    softcap: c makes the logits c * tanh(logits / c), in float32.
    matmul: (x (n, in), W (out, in)) -> (n, out), see fast/matmul.py.
    chunk_loss: losses_and_grad, or the same sooner, see fast/compile.py.
    frozen_head: losses_in_chunks for a head that is not trained, or the same sooner, see
        fast/head_in_tiles.py.
    """
    if not is_trained(weight):
        return token_losses(hidden, weight, targets, softcap, matmul, chunk_loss, frozen_head).sum()
    return _CrossEntropySum.apply(hidden, weight, targets, softcap, matmul, chunk_loss)


def is_trained(weight) -> bool:
    """Whether the head needs a gradient; in an evaluation it does not."""
    return weight.requires_grad and torch.is_grad_enabled()


class _CrossEntropySum(torch.autograd.Function):
    """With a head that is trained: its gradient is formed in the same pass, too."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, matmul, chunk_loss):
        rows, y = supervised(targets, hidden.device)                                    # (n,)
        h, W = hidden[rows], weight.to(hidden.dtype)                                    # (n, D)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in chunks(len(rows), len(W)):
            losses, d_logits = chunk_loss(matmul(h[chunk], W), y[chunk], softcap, h.dtype)  # (c, V)
            total += losses.sum()
            if dh is not None:
                dh[chunk] = matmul(d_logits, W.T)
            dW += (d_logits.T @ h[chunk]).float()
            del d_logits                                # make room for the next chunk's
        ctx.save_for_backward(rows, dh, dW)
        ctx.shape = hidden.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, dh, dW = ctx.saved_tensors
        d_hidden = None
        if dh is not None:
            d_hidden = dh.new_zeros(ctx.shape)
            # in float32: grad is 1 / num_items, whose rounding would rescale every gradient
            d_hidden[rows] = (dh.float() * grad).to(dh.dtype)
        return d_hidden, dW * grad, None, None, None, None


# ---- chunks of logits ---------------------------------------------------------------------------


def chunk_rows(supervised_rows: int, vocab_size: int) -> int:
    """Positions whose logits are held at once."""
    rows = max(1, CHUNK_BYTES // (4 * vocab_size), -(-supervised_rows // MAX_CHUNKS))
    # a multiple, so that no matmul ends in a small block
    return rows // CHUNK_MULTIPLE * CHUNK_MULTIPLE or rows


def chunks(supervised_rows: int, vocab_size: int) -> list[slice]:
    """The positions, split into chunks of chunk_rows."""
    step = chunk_rows(supervised_rows, vocab_size)
    return [slice(start, start + step) for start in range(0, supervised_rows, step)]


def supervised(targets, device):
    """The positions that carry loss, (n,), and their targets, (n,), on the device."""
    rows = (targets != IGNORE).nonzero().squeeze(1)
    return to_device(rows, device), to_device(targets[rows], device)


def head_logits(h, W, softcap, matmul):
    """Logits of some positions, (c, V) float32, and tanh(logits / softcap) or None."""
    return logits_of(matmul(h, W), softcap)


def logits_of(scores, softcap):
    """Scores in float32, and bent by the softcap; beside them tanh(scores / softcap) or None."""
    logits = scores.float()                                                             # (c, V)
    if softcap is None:
        return logits, None
    tanh = torch.tanh(logits / softcap)
    return softcap * tanh, tanh


def losses_and_exps(logits, y):
    """-log p(y) for each row of logits (c, V) float32, as (c, 1); and e, s with p = e / s.

    e overwrites the logits.
    """
    at_y = logits.gather(1, y[:, None])                                                 # (c, 1)
    top = logits.amax(-1, keepdim=True)
    e = logits.sub_(top).exp_()
    s = e.sum(-1, keepdim=True)
    return s.log() + top - at_y, e, s


def logits_grad(e, s, tanh, y):
    """Gradient of -log p(y) for the logits before the softcap, (c, V) float32; overwrites e."""
    p = e.div_(s)
    p.scatter_add_(1, y[:, None], p.new_full((len(p), 1), -1.0))
    if tanh is not None:
        p *= 1 - tanh.square()
    return p


# ---- token losses, and log-probabilities of sequences -------------------------------------------


def answer_logps_plain(hidden, weight, targets, lengths, softcap=None):
    """The plain twin of answer_logps: all logits at once."""
    logits = capped(F.linear(hidden, weight.to(hidden.dtype)).float(), softcap)         # (N, V)
    counted = (targets != IGNORE).to(hidden.device)
    ids = targets.to(hidden.device).clamp(min=0)
    token_logps = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0] * counted        # (N,)
    sums = [sequence.sum() for sequence in token_logps.split(lengths)]
    counts = [sequence.sum() for sequence in counted.split(lengths)]
    return torch.stack(sums), torch.stack(counts).float()


@record_function("loss")
def answer_logps(hidden, weight, targets, lengths, softcap=None, matmul=F.linear,
                 chunk_loss=losses_and_grad):
    """For each sequence the log-probability of its targets in nats, and their number: (S,) float32.

    lengths: tokens of the S sequences that lie end to end in the row; the rest as in
    cross_entropy_sum.
    """
    losses = token_losses(hidden, weight, targets, softcap, matmul, chunk_loss)             # (n,)
    counts = [int((sequence != IGNORE).sum()) for sequence in targets.split(lengths)]
    # sums of slices: index_add would add in another order each time on a GPU
    logps = torch.stack([-sequence.sum() for sequence in losses.split(counts)])
    return logps, to_device(torch.tensor(counts, dtype=torch.float32), hidden.device)


def token_losses(hidden, weight, targets, softcap=None, matmul=F.linear,
                 chunk_loss=losses_and_grad, frozen_head=None):
    """-log p of each supervised target in nats, (n,) float32; arguments as in cross_entropy_sum."""
    rows, y = supervised(targets, hidden.device)
    if is_trained(weight):
        return _TokenLosses.apply(hidden, weight, rows, y, softcap, matmul, chunk_loss)
    frozen_head = frozen_head or partial(losses_in_chunks, chunk_loss=chunk_loss)
    return _FrozenHead.apply(hidden, weight.detach(), rows, y, softcap, matmul, frozen_head)


class _FrozenHead(torch.autograd.Function):
    """Token losses, and in the same pass their gradients for the hidden states."""

    @staticmethod
    def forward(ctx, hidden, weight, rows, y, softcap, matmul, frozen_head):
        h, W = hidden[rows], weight.to(hidden.dtype)                            # (n, D), (V, D)
        losses, dh = frozen_head(h, W, y, softcap, matmul, ctx.needs_input_grad[0])
        ctx.save_for_backward(rows, dh)
        ctx.shape = hidden.shape
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):                                                    # (n,) float32
        rows, dh = ctx.saved_tensors
        d_hidden = dh.new_zeros(ctx.shape)
        # in float32: grad is 1 / num_items, whose rounding would rescale every gradient
        d_hidden[rows] = (dh.float() * grad[:, None]).to(dh.dtype)
        return d_hidden, None, None, None, None, None, None


def losses_in_chunks(h, W, y, softcap, matmul, needs_grad: bool, chunk_loss=losses_and_grad):
    """-log p(y) of each row of h, (n,) float32, and its gradient for h (n, D), or None.

    h: (n, D). W: (V, D), of the head, in the dtype of h. y: (n,).
    """
    losses = torch.empty(len(h), dtype=torch.float32, device=h.device)
    dh = torch.empty_like(h) if needs_grad else None
    for chunk in chunks(len(h), len(W)):
        chunk_losses, d_logits = chunk_loss(matmul(h[chunk], W), y[chunk], softcap, h.dtype,
                                            needs_grad)                         # (c, 1), (c, V)
        losses[chunk] = chunk_losses[:, 0]
        if needs_grad:
            dh[chunk] = matmul(d_logits, W.T)
        del d_logits                                    # make room for the next chunk's
    return losses, dh


class _TokenLosses(torch.autograd.Function):
    """With a head that is trained: its gradient is a sum weighted by `grad`, which only backward
    knows, where the logits are computed again."""

    @staticmethod
    def forward(ctx, hidden, weight, rows, y, softcap, matmul, chunk_loss):
        h = hidden[rows]                                                        # (n, D)
        losses, _ = losses_in_chunks(h, weight.to(h.dtype), y, softcap, matmul, False, chunk_loss)
        ctx.save_for_backward(rows, h, weight, y)
        ctx.shape, ctx.softcap, ctx.matmul = hidden.shape, softcap, matmul
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):                                                    # (n,) float32
        rows, *saved = ctx.saved_tensors
        dh, dW = token_losses_grad(grad, *saved, ctx.softcap, ctx.matmul)
        d_hidden = dh.new_zeros(ctx.shape)
        d_hidden[rows] = dh
        return d_hidden, dW, None, None, None, None, None


def token_losses_grad(grad, h, weight, y, softcap, matmul):
    """Gradients of (grad * token losses).sum() for h (n, D) and the head's weight (V, D).

    The logits are computed again.
    """
    W = weight.to(h.dtype)
    dh = torch.empty_like(h)
    dW = torch.zeros_like(weight, dtype=torch.float32)
    for chunk in chunks(len(h), len(W)):
        logits, tanh = head_logits(h[chunk], W, softcap, matmul)
        _, e, s = losses_and_exps(logits, y[chunk])
        p = logits_grad(e, s, tanh, y[chunk])
        dh[chunk] = (matmul(p.to(h.dtype), W.T).float() * grad[chunk, None]).to(h.dtype)
        dW += ((p * grad[chunk, None]).to(h.dtype).T @ h[chunk]).float()
        del logits, tanh, e, p
    return dh, dW.to(weight.dtype)


# ---- experts ------------------------------------------------------------------------------------


def balance_loss(routers, num_experts_per_tok: int):
    """E * sum over experts of (share of tokens routed to it) * (mean probability of it).

    It is num_experts_per_tok when all experts serve equally (arXiv:2101.03961, eq. 4 to 6; the form
    that LLaMA-Factory's models use for moe_aux_loss_coef). routers: the router logits (N, E) of
    each layer with experts; the shares are counted over all of them together.
    """
    return balance_of_sums(*routing_sums(routers, num_experts_per_tok), num_experts_per_tok)


def routing_sums(routers, num_experts_per_tok: int):
    """For each expert (tokens routed to it, sum of its probabilities), both (E,) float32."""
    logits = torch.cat(routers)                                                 # (layers * N, E)
    probability = logits.softmax(-1)
    chosen = probability.topk(num_experts_per_tok).indices.flatten()
    counts = chosen.new_zeros(logits.shape[1])      # not bincount, which waits for the device
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    return counts.float(), probability.float().sum(0)


def balance_of_sums(counts, probabilities, num_experts_per_tok: int):
    """balance_loss of what routing_sums returns, or of its sum over several stages."""
    rows = counts.sum() / num_experts_per_tok                                   # layers * N
    return len(counts) * (counts / rows * (probabilities / rows)).sum()


# ---- objectives ---------------------------------------------------------------------------------


class Objective:
    """How a stage scores a batch; the loop calls it like a function.

        batches = objective.with_reference(model, batches)      # once a step, without gradients
        loss, metrics = objective(model, batch, num_items)      # for each batch

    A stage is a subclass that defines loss_sum and, where it compares with a reference model,
    with_reference (methods/preference.py). metric_names: what loss_sum logs beside the loss.
    """

    metric_names: tuple[str, ...] = ()
    reference = None                    # a second model that is not trained
    step_tokens: float | None = None    # of the last step on all ranks, where rows do not tell
    chunk_loss = staticmethod(losses_and_grad)

    def __init__(self, matmul=F.linear):
        self.matmul = matmul

    def __call__(self, model, batch, num_items: float):
        """(this batch's part of the step's loss, its metrics). num_items: of the whole step."""
        with record_function("forward"):
            loss_sum, routing_loss, metrics = self.loss_sum(model, batch)
            return loss_sum / num_items + routing_loss, metrics

    def loss_sum(self, model, batch):
        """(sum of the losses, a loss to be added undivided, {name: weighted_sum(...)})."""
        raise NotImplementedError

    def with_reference(self, model, batches: list) -> list:
        """The batches, with what loss_sum needs from a reference model."""
        return batches

    @contextmanager
    def reference_model(self, model):
        """The reference: the second model, or within the block the model without adapters."""
        if self.reference is not None:
            yield self.reference
            if hasattr(self.reference, "reshard"):      # free what the last pass gathered
                self.reference.reshard()
            return
        set_adapters(model, False)
        try:
            yield model
        finally:
            set_adapters(model, True)

    def parameters(self) -> dict:
        """{name: parameter} that is trained beside the model's."""
        return {}

    def state(self) -> dict:
        """What a checkpoint keeps of the objective, JSON-able; all ranks call it together."""
        return {}

    def load_state(self, saved: dict):
        """Take over what state() has returned."""


class SFTObjective(Objective):
    """Stages sft and pt: cross-entropy of the supervised tokens.

    balance: coefficient of the experts' balance loss; that is added undivided, as LLaMA-Factory
    does. frozen_head: see cross_entropy_sum.
    """

    def __init__(self, balance: float = 0.0, matmul=F.linear, frozen_head=None):
        super().__init__(matmul)
        self.balance = balance
        self.frozen_head = frozen_head

    def loss_sum(self, model, batch):
        hidden, routing_loss = self.hidden_states(model, batch)
        loss = cross_entropy_sum(hidden, model.head_weight(), batch.targets,
                                 model.config.final_softcap, self.matmul, self.chunk_loss,
                                 self.frozen_head)
        return loss, routing_loss, {}

    def hidden_states(self, model, batch):
        """(final hidden states (N, D), the experts' balance loss or 0.0)."""
        routers = [] if self.balance and not batch.filler else None
        hidden = model(batch.input_ids, batch.position_ids, batch.layout, routers=routers)[0]
        if routers is None:
            return hidden, 0.0
        return hidden, self.balance * self.balance_of(model, routers)

    def balance_of(self, model, routers: list):
        """The balance loss of all layers; 0.0 where none has experts."""
        return balance_loss(routers, model.config.num_experts_per_tok) if routers else 0.0


# ---- metrics ------------------------------------------------------------------------------------


class MetricSums:
    """Weighted sums of logged values, {name: (2,) tensor: the sum, and the sum of weights}.

    All ranks hold the same names from the start, whether or not they have a batch.
    """

    def __init__(self, names=(), device=None):
        self.sums = {name: torch.zeros(2, device=device) for name in names}

    def __iadd__(self, metrics: dict):
        for name, pair in metrics.items():
            self.sums[name] = self.sums[name] + pair
        return self


def weighted_sum(values, weights):
    """(2,): the sum of values * weights, and the sum of the weights."""
    return torch.stack(((values * weights).sum(), weights.sum()))


def metric_means(sums: dict) -> dict:
    """{name: value} for the log, from {name: (weighted sum, sum of weights)}.

    kl is a sum over micro-batches, and in stage kto the margin is the difference of two
    means, as in LLaMA-Factory. A name without weight is left out.
    """
    means = {}
    for name, (total, weight) in sums.items():
        if weight:
            means[name] = total if name == "kl" else total / weight
    if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means
