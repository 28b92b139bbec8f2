"""Learning from answers that are compared (stages dpo, rm) or judged (kto): the losses, and what a step asks the model.

    pair        a prompt with two answers; people chose one and rejected the other
    judged      a prompt with one answer, and whether it is a good one

The formulas are pure functions of log-probabilities: log pi(y|x), the sum over the tokens of an answer, is a number for
each answer, and so is that of a reference model, which does not learn. Below them stands what a step does: ask (without
gradients) what the reference says, then score a batch. Every row counts `row_weights`, see collate_answers.

Read before: losses.py (log-probabilities), data.py (Batch). Read next: train.py, which calls Objective.
Papers: DPO arXiv:2305.18290, hinge arXiv:2309.06657, IPO arXiv:2310.12036, ORPO arXiv:2403.07691, SimPO
arXiv:2405.14734, KTO arXiv:2402.01306, reward models arXiv:2203.02155. Of means over tokens, not sums: ipo, orpo, simpo.
"""
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.files import open_tensors, save_tensors
from config import has_reference
from data import (IGNORE, Batch, EncodedRows, Example, collate, settings_of,
                  truncated_lengths)
from families import read_config_json
from fast.matmul import PRODUCTS, torch_product
from lora import set_adapters
from losses import Objective, answer_logps, ask_nothing, together
from parallel import Ranks
from runtime.throughput import part
from templates import encode_pieces, render_turns
from text.conversations import JUDGED, PAIRS, RawRow

OF_MEANS = ("ipo", "orpo", "simpo")         # values of pref_loss that look at the mean log-probability of a token
SHOWN_OF_JUDGED = ("rewards/chosen", "logps/chosen", "rewards/rejected", "logps/rejected", "kl")
SHOWN_OF_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                  "logps/rejected")
VALUE_HEAD = "value_head.safetensors"
AS_SIGMOID = ("hinge", "ipo")               # what LLaMA-Factory 0.9.5 computes as sigmoid, see pair_losses


# ---- formulas: tensors (n,), a number for each row -> losses (n,) -------------------------------------------------


def sigmoid_losses(margins, smoothing: float = 0.0):
    """-log sigmoid(margin) (arXiv:2305.18290, eq. 7); margin = beta * (log ratio of chosen - log ratio of rejected), a
    log ratio being log pi(y|x) - log pi_ref(y|x). smoothing: the share of pairs taken to be the wrong way round."""
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def hinge_losses(margins):
    """max(0, 1 - margin) (arXiv:2309.06657, the hinge loss on the normalised likelihood)."""
    return torch.relu(1 - margins)


def ipo_losses(margins, beta: float):
    """(margin / beta - 1 / (2 beta))^2 (arXiv:2310.12036, eq. 17, whose tau is beta)."""
    return (margins / beta - 1 / (2 * beta)) ** 2


def orpo_losses(chosen, rejected, beta: float):
    """-log pi(chosen) - beta * log sigmoid(log of the odds ratio), of means over tokens (arXiv:2403.07691, eq. 6, 7; beta is
    its lambda). odds = p / (1 - p)."""
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen - beta * F.logsigmoid(log_odds)


def simpo_losses(chosen, rejected, beta: float, gamma: float):
    """-log sigmoid(beta * (chosen - rejected) - gamma), of means over tokens (arXiv:2405.14734, eq. 6)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto_losses(log_ratios, kl, desired, beta: float, weight_good: float, weight_bad: float):
    """weight * (1 - sigmoid(beta * (log ratio - kl))) of good answers, of bad ones with the sign turned (arXiv:2402.01306,
    eq. 8). kl: the point of reference z0, see ask_judged. desired: (n,) bool."""
    sign = torch.where(desired, 1.0, -1.0)
    weight = torch.where(desired, weight_good, weight_bad)
    return weight * (1 - torch.sigmoid(sign * beta * (log_ratios - kl)))


def pair_losses(config, chosen, rejected, ref_chosen=None, ref_rejected=None):
    """-> (losses, rewards of chosen, rewards of rejected), each (n,). All log-probabilities are sums, or means where
    config.pref_loss is of OF_MEANS.

    LLaMA-Factory 0.9.5 calls TRL 0.24 in such a way that hinge and ipo get sigmoid's loss; so do they here, that the same
    yaml trains the same model. paper_losses: true gives them their own.
    """
    kind, beta = config.pref_loss, config.pref_beta
    if kind in ("orpo", "simpo"):
        losses = orpo_losses(chosen, rejected, beta) if kind == "orpo" else \
            simpo_losses(chosen, rejected, beta, config.simpo_gamma)
        return losses, beta * chosen.detach(), beta * rejected.detach()
    good, bad = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    if kind == "sigmoid" or not config.paper_losses:
        losses = sigmoid_losses(good - bad, config.dpo_label_smoothing)
    else:
        losses = hinge_losses(good - bad) if kind == "hinge" else ipo_losses(good - bad, beta)
    return losses, good.detach(), bad.detach()


# ---- what a step does ---------------------------------------------------------------------------------------------


def objective_of(config, reference, head) -> Objective:
    """The objective of stages rm, dpo and kto. reference: a model, or None: that which learns, its adapters off. head: a
    ValueHead, for rm."""
    if config.stage == "rm":
        return Objective(partial(score_values, head), shows=("accuracy",))
    if config.stage == "kto":
        return Objective(partial(score_judged, config), partial(ask_judged, config, reference), SHOWN_OF_JUDGED)
    shows = SHOWN_OF_PAIRS + (("sft_loss", "odds_ratio_loss") if config.pref_loss == "orpo" else ())
    return Objective(partial(score_pairs, config), partial(ask_pairs, reference) if has_reference(config) else ask_nothing,
                     shows)


def logps_of(model, batch):
    """Log-probability of each answer of a batch that is on the device, and its tokens: two (S,) float32."""
    hidden = model(batch.input_ids, batch.position_ids, batch.layout)                        # (1, N, D)
    with part("loss"):
        return answer_logps(hidden[0], model.head_weight(), batch.targets, batch.lengths, model.config.final_softcap,
                            PRODUCTS.get(getattr(model, "product", None), torch_product))


@contextmanager
def as_reference(model, reference):
    """The reference: the model given, or within the block the one that learns, its adapters off."""
    if reference is not None:
        yield reference
        if hasattr(reference, "reshard"):           # what the last forward pass has gathered (scale/fsdp.py)
            reference.reshard()
        return
    set_adapters(model, False)
    try:
        yield model
    finally:
        set_adapters(model, True)


@torch.no_grad()
def ask_pairs(reference, model, batches: list, ranks: Ranks) -> list:
    """For each batch of pairs the reference's log-probabilities (2n,)."""
    with as_reference(model, reference) as asked:
        return [logps_of(asked, batch)[0] for batch in batches]


def score_pairs(config, model, batch, told):
    """Stage dpo. told: see ask_pairs; None for an objective without a reference."""
    sums, counts = logps_of(model, batch)                                                    # (2n,)
    means, n = sums / counts.clamp(min=1), len(batch.row_weights)
    logps = means if config.pref_loss in OF_MEANS else sums
    if told is not None and config.pref_loss in OF_MEANS:
        told = told / counts.clamp(min=1)
    chosen, rejected = logps.split(n)
    losses, good, bad = pair_losses(config, chosen, rejected, *(() if told is None else told.split(n)))
    sft = -means[:n]
    if config.pref_ftx:
        losses = losses + config.pref_ftx * sft
    seen = {"rewards/chosen": good, "rewards/rejected": bad, "rewards/accuracies": (good > bad).float(),
            "rewards/margins": good - bad, "logps/chosen": chosen, "logps/rejected": rejected}
    if config.pref_loss == "orpo":
        seen |= {"sft_loss": sft, "odds_ratio_loss": (losses - sft) / config.pref_beta}
    return (losses * batch.row_weights).sum(), 0.0, {name: together(values.detach(), batch.row_weights)
                                                for name, values in seen.items()}


@torch.no_grad()
def ask_judged(config, reference, model, batches: list, ranks: Ranks) -> list:
    """For each batch of judged answers the reference's log-probabilities (n,), the KL divergence of model and reference
    (n,), and (2,) for the log.

    The divergence is estimated over a micro-batch, on the prompts with answers of other rows, as the mean of log pi - log
    pi_ref, the mean of all ranks, and at least 0 (arXiv:2402.01306, sec. 4.1).
    """
    changed = [logps_of(model, batch.kl_batch)[0] for batch in batches]
    with as_reference(model, reference) as asked:
        logps = [logps_of(asked, batch)[0] for batch in batches]
        changed = [mine - logps_of(asked, batch.kl_batch)[0] for mine, batch in zip(changed, batches)]
    real = [batch.n_items > 0 for batch in batches]              # the others keep ranks company, see scale/fsdp.py
    kl = [group.mean() for one, batch, counts in zip(changed, batches, real) if counts for group in one.split(batch.batch_sizes)]
    if ranks.world > 1:
        kl = mean_of_ranks(kl, config.gradient_accumulation_steps, ranks)
    kl, told = iter(kl), []
    for batch, reference_logps, counts in zip(batches, logps, real):
        each = [next(kl).clamp(min=0) for _ in batch.batch_sizes] if counts else [reference_logps.new_zeros(())]
        rows = torch.cat([value.expand(size) for value, size in zip(each, batch.batch_sizes)])
        told.append((reference_logps, rows, torch.stack((sum(each) / ranks.world, rows.new_ones(())))))
    return told


def mean_of_ranks(values: list, most: int, ranks: Ranks) -> list:
    """Scalars, at most so many, each the mean over the ranks that have one in its place."""
    mine = torch.full((most,), math.nan)
    if values:
        mine[:len(values)] = torch.stack(values).cpu()
    mean = torch.stack(ranks.gather(mine)).nanmean(0)
    return [mean[place].to(value.device) for place, value in enumerate(values)]


def score_judged(config, model, batch, told):
    """Stage kto. told: see ask_judged."""
    reference_logps, kl, kl_of_batch = told
    logps, counts = logps_of(model, batch)                                                   # (n,)
    log_ratios, desired = logps - reference_logps, batch.desired
    losses = kto_losses(log_ratios, kl, desired, config.pref_beta, config.kto_chosen_weight, config.kto_rejected_weight)
    real = (batch.row_weights > 0).float()
    if config.pref_ftx:             # LLaMA-Factory's weight: (rows / good ones) of a micro-batch, twice
        share = torch.cat([group.mean().clamp(min=1e-9).expand(len(group)) for group in desired.float().split(batch.batch_sizes)])
        losses = losses - config.pref_ftx * desired * logps / counts.clamp(min=1) / share.square()
    seen = {"kl": kl_of_batch}
    for name, which in (("chosen", desired), ("rejected", ~desired)):
        seen |= {f"rewards/{name}": together(config.pref_beta * log_ratios.detach(), which * real),
                 f"logps/{name}": together(logps.detach(), which * real)}
    return (losses * batch.row_weights).sum(), 0.0, seen


# ---- reward models ------------------------------------------------------------------------------------------------


class ValueHead(nn.Module):
    """A score for a text from the hidden state (…, D) of its last token, (…,). Stored in VALUE_HEAD, under TRL's names.

    dropout: of the hidden state in training; TRL's is 0.1 where config.json has no summary_dropout_prob.
    """

    def __init__(self, hidden_size: int, dropout: float, seed: int):
        super().__init__()
        self.summary, self.dropout = nn.Linear(hidden_size, 1, dtype=torch.float32), dropout
        bound, generator = 1 / math.sqrt(hidden_size), torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data.uniform_(-bound, bound, generator=generator)

    def forward(self, hidden, training: bool = False):
        hidden = F.dropout(hidden, self.dropout, training).float()
        # a sum of products, not F.linear, which autocast would compute in 16 bits
        return (hidden * self.summary.weight[0]).sum(-1) + self.summary.bias

    def weights(self) -> dict:
        """{name in the file: parameter}."""
        return {f"v_head.{name}": p for name, p in self.named_parameters()}

    @torch.no_grad()
    def read(self, folder) -> bool:
        """Take the weights of a folder; False if it has none."""
        path = Path(folder) / VALUE_HEAD
        if not path.is_file():
            return False
        with open_tensors(path) as tensors:
            for name, p in self.weights().items():
                if name not in tensors.keys() or tensors.get_tensor(name).shape != p.shape:
                    raise ValueError(f"{path} has no {name} of shape {list(p.shape)}: it is the value head of another model")
                p.copy_(tensors.get_tensor(name))
        return True

    def write(self, folder):
        save_tensors(Path(folder) / VALUE_HEAD, self.weights())


def value_head(config, shape, base, adapters, device, resume) -> ValueHead:
    """That of the checkpoint to resume, else of the last adapter or of the base, as in LLaMA-Factory, else a new one."""
    head = ValueHead(shape.hidden_size, read_config_json(base).get("summary_dropout_prob", 0.1), config.seed)
    folder = resume or (adapters[-1] if adapters else base)
    if not head.read(folder) and resume:
        raise FileNotFoundError(f"{resume} has no {VALUE_HEAD}, and cannot be resumed in stage: rm")
    return head.to(device)


def score_values(head, model, batch, told):
    """Stage rm: -log sigmoid(score of chosen - score of rejected) (arXiv:2203.02155, eq. 1; Bradley and Terry 1952)."""
    hidden = model(batch.input_ids, batch.position_ids, batch.layout)[0]                     # (N, D)
    ends = batch.layout.cu_seqlens[1:].long() - 1                                            # last token of each answer
    # one call each: the gradients of the bias, which no comparison sees, then cancel without rounding
    chosen, rejected = (head(hidden[rows], model.training) for rows in ends.split(len(batch.row_weights)))        # (n,)
    losses, real = -F.logsigmoid(chosen - rejected), (batch.row_weights > 0).float()
    return (losses * batch.row_weights).sum(), 0.0, {"accuracy": together((chosen > rejected).float(), real)}


def encode_answers(batch, config, tokenizer, template, encoded: EncodedRows, check_only: bool = False):
    """Stages rm, dpo, kto: of each row an example of two stretches, the prompt with one answer and with another: the chosen
    and the rejected one; or (kto) its own and, to estimate a KL divergence (arXiv:2402.01306, sec. 4.1), that of the row
    before, the first row taking the last one's. Thoughts of earlier answers are left out. batch: [(row, conversation), …].
    """
    settings, rendered, own = settings_of(config), [], []

    def render(conversation, answer):
        messages, system, tools, *_ = conversation
        turns = render_turns(template, tokenizer, [*messages[:-1], answer], system, tools, settings, only_last=True)
        return [piece for turn in turns[:-1] for pieces in turn for piece in pieces] + turns[-1][0], turns[-1][1]

    for row, conversation in batch:
        try:
            answers = [conversation.messages[-1]] + ([conversation.rejected] if config.stage in PAIRS else [])
            rendered.append([render(conversation, answer) for answer in answers])
            own.append((row, conversation))
        except ValueError as error:                 # a tool call or a tool description that cannot be read
            encoded.reject(row, error)
    if check_only or encoded.bad and not config.skip_bad_rows:
        return
    if config.stage in JUDGED:
        for number, (row, conversation) in enumerate(own):
            rendered[number].append(render(conversation, own[number - 1][1].messages[-1]))
    ids = iter(encode_pieces(tokenizer, [pieces for both in rendered for one in both for pieces in one]))
    closing_eos = [tokenizer.eos_id] if template.efficient_eos else []
    for row, conversation in own:
        add_answers(encoded, row, conversation.desired, [(next(ids), next(ids) + closing_eos) for _ in range(2)], config)


def add_answers(encoded: EncodedRows, row: RawRow, desired: bool | None, both: list, config):
    """One row's example. both: two (prompt_ids, answer_ids). A pair has the prompt of the chosen answer, and is cut by the
    longer of the two answers, as in LLaMA-Factory; in kto each is cut by its own."""
    pairs, kept = config.stage in PAIRS, []
    for prompt, answer in both:
        prompt, longest = (both[0][0], max(len(other) for _, other in both)) if pairs else (prompt, len(answer))
        of_prompt, of_answer = truncated_lengths(len(prompt), longest, config.cutoff_len)
        prompt, answer = prompt[:of_prompt], answer[:of_answer]
        kept.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    counted = slice(None if pairs else 1)           # the other answer of kto teaches nothing
    full = sum(len(prompt) + len(answer) for prompt, answer in both[counted])
    supervised = encoded.count(row, *laid(kept[counted]), full)
    encoded.has_targets |= any(len(labels) > 1 and labels[-1] != IGNORE for _, labels in kept[counted])
    encoded.add(*laid(kept), supervised > 0, [len(ids) for ids, _ in kept], desired)


def laid(stretches: list) -> tuple[list, list]:
    """(ids, labels) of several stretches, end to end."""
    return sum((ids for ids, _ in stretches), []), sum((labels for _, labels in stretches), [])


def collate_answers(groups: list[list[Example]], alike: bool = False) -> Batch:
    """The rows of some micro-batches: of pairs first all chosen answers, then all rejected ones; judged answers in one
    Batch, and in its `kl_batch` those to estimate the KL divergence with.

    A row counts one over the rows of its micro-batch, and n_items is the number of these: the mean over micro-batches of
    their means, as in LLaMA-Factory. alike: every row counts 1, and n_items is the number of rows.
    """
    examples = [example for group in groups for example in group]
    first, second = ([example.sequence(which) for example in examples] for which in (0, 1))
    sizes = tuple(map(len, groups))
    row_weights = torch.tensor([1.0 if alike else 1 / size for size in sizes for _ in range(size)])
    more = dict(batch_sizes=sizes, row_weights=row_weights, n_items=len(examples) if alike else len(groups))
    if examples[0].desired is None:
        return replace(collate(first + second), **more)
    return replace(collate(first), desired=torch.tensor([example.desired for example in examples]), kl_batch=collate(second),
                   **more)
