"""Learn from answers that are compared (stage dpo) or judged (kto): losses, objectives, batches.

    pair        a prompt with two answers; people chose one and rejected the other
    judged      a prompt with one answer, and whether it is desired

The formulas are pure functions of log-probabilities: log pi(y|x), the sum over the tokens of an
answer, is one number per answer, for the model and for a reference model that is not trained. The
reference is the model itself with its adapters switched off, or a second model. Below the formulas
stand the objectives, which the loop calls (losses.Objective), and how rows become batches.

Requires: losses.py, data.py (Batch), lora.py (set_adapters).
Next: methods/reward_model.py, runtime/build.py (STAGES).
Papers: DPO arXiv:2305.18290, hinge arXiv:2309.06657, IPO arXiv:2310.12036, ORPO arXiv:2403.07691,
SimPO arXiv:2405.14734, KTO arXiv:2402.01306.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.profiler import record_function

from data import IGNORE, Batch, EncodedRows, Example, collate, settings_of, truncated_lengths
from losses import Objective, answer_logps, weighted_sum
from parallel import Ranks
from templates import encode_pieces, render_turns
from text.conversations import JUDGED, PAIRS, RawRow

MEAN_LOGPS = ("ipo", "orpo", "simpo")       # pref_loss on means over tokens, not on sums
PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
                "logps/chosen", "logps/rejected")
JUDGED_METRICS = ("rewards/chosen", "logps/chosen", "rewards/rejected", "logps/rejected", "kl")


# ---- formulas: tensors (n,), one number per row -> losses (n,) ----------------------------------


def sigmoid_losses(margins, smoothing: float = 0.0):
    """-log sigmoid(margin) (arXiv:2305.18290, eq. 7).

    margin = beta * (log ratio of chosen - log ratio of rejected); a log ratio is log pi(y|x) - log
    pi_ref(y|x). smoothing: the share of pairs assumed to be labeled the wrong way round.
    """
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def hinge_losses(margins):
    """max(0, 1 - margin) (arXiv:2309.06657, the hinge loss on the normalized likelihood)."""
    return torch.relu(1 - margins)


def ipo_losses(margins, beta: float):
    """(margin / beta - 1 / (2 beta))^2 (arXiv:2310.12036, eq. 17, whose tau is beta)."""
    return (margins / beta - 1 / (2 * beta)) ** 2


def orpo_losses(chosen, rejected, beta: float):
    """-log pi(chosen) - beta * log sigmoid(log odds ratio), odds = p / (1 - p).

    chosen, rejected: mean log-probabilities of a token (arXiv:2403.07691, eq. 6 and 7; beta is its
    lambda).
    """
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen - beta * F.logsigmoid(log_odds)


def simpo_losses(chosen, rejected, beta: float, gamma: float):
    """-log sigmoid(beta * (chosen - rejected) - gamma), of means (arXiv:2405.14734, eq. 6)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto_losses(log_ratios, kl, desired, beta: float, chosen_weight: float,
               rejected_weight: float):
    """weight * (1 - sigmoid(+-beta * (log ratio - kl))), + for desired answers, - for the others.

    kl: the reference point z0, see JudgedObjective. desired: (n,) bool (arXiv:2402.01306, eq. 8).
    """
    sign = torch.where(desired, 1.0, -1.0)
    weight = torch.where(desired, chosen_weight, rejected_weight)
    return weight * (1 - torch.sigmoid(sign * beta * (log_ratios - kl)))


def pair_losses(config, chosen, rejected, ref_chosen=None, ref_rejected=None):
    """-> (losses, rewards of chosen, rewards of rejected), each (n,).

    All log-probabilities are sums, or means where config.pref_loss is one of MEAN_LOGPS.

    LLaMA-Factory 0.9.5 calls TRL 0.24 in such a way that hinge and ipo get sigmoid's loss, and so
    they do here, so that the same yaml trains the same model. paper_losses: true gives them their
    own.
    """
    kind, beta = config.pref_loss, config.pref_beta
    if kind == "orpo":
        losses = orpo_losses(chosen, rejected, beta)
        return losses, beta * chosen.detach(), beta * rejected.detach()
    if kind == "simpo":
        losses = simpo_losses(chosen, rejected, beta, config.simpo_gamma)
        return losses, beta * chosen.detach(), beta * rejected.detach()
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    margins = chosen_rewards - rejected_rewards
    if kind == "sigmoid" or not config.paper_losses:
        losses = sigmoid_losses(margins, config.dpo_label_smoothing)
    elif kind == "hinge":
        losses = hinge_losses(margins)
    else:
        losses = ipo_losses(margins, beta)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# ---- the reference model ------------------------------------------------------------------------


class PreferenceObjective(Objective):
    """What dpo and kto share: log-probabilities of answers, by the model and by a reference.

    reference: a second model, or None: the trained model with its adapters switched off.
    """

    def __init__(self, config, reference=None, ranks: Ranks = Ranks(), matmul=F.linear):
        super().__init__(matmul)
        self.config = config
        self.reference = reference
        self.ranks = ranks

    def logps(self, model, batch):
        """Log-probability of each answer of a batch, and its tokens: two (S,) float32 tensors."""
        hidden = model(batch.input_ids, batch.position_ids, batch.layout)               # (1, N, D)
        return answer_logps(hidden[0], model.head_weight(), batch.targets, batch.lengths,
                            model.config.final_softcap, self.matmul, self.chunk_loss)


# ---- stage dpo ----------------------------------------------------------------------------------


class PairObjective(PreferenceObjective):
    """Stage dpo, with any pref_loss."""

    def __init__(self, config, reference=None, ranks: Ranks = Ranks(), matmul=F.linear):
        super().__init__(config, reference, ranks, matmul)
        more = ("sft_loss", "odds_ratio_loss") if config.pref_loss == "orpo" else ()
        self.metric_names = PAIR_METRICS + more

    @torch.no_grad()
    @record_function("reference")
    def with_reference(self, model, batches: list[Batch]) -> list[Batch]:
        """The batches with ref_logps (2n,), where the loss has a reference."""
        if not self.config.has_reference:
            return batches
        with self.reference_model(model) as reference:
            return [replace(batch, ref_logps=self.logps(reference, batch)[0])
                    for batch in batches]

    def loss_sum(self, model, batch):
        sums, counts = self.logps(model, batch)                                         # (2n,)
        counts = counts.clamp(min=1)
        means = sums / counts
        n = len(batch.row_weights)
        logps = sums
        ref_logps = batch.ref_logps
        if self.config.pref_loss in MEAN_LOGPS:
            logps = means
            ref_logps = None if ref_logps is None else ref_logps / counts
        chosen, rejected = logps.split(n)
        references = () if ref_logps is None else ref_logps.split(n)
        losses, chosen_rewards, rejected_rewards = pair_losses(self.config, chosen, rejected,
                                                               *references)
        sft_losses = -means[:n]
        if self.config.pref_ftx:
            losses = losses + self.config.pref_ftx * sft_losses
        values = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        if self.config.pref_loss == "orpo":
            values["sft_loss"] = sft_losses
            values["odds_ratio_loss"] = (losses - sft_losses) / self.config.pref_beta
        metrics = {name: weighted_sum(value.detach(), batch.row_weights)
                   for name, value in values.items()}
        return (losses * batch.row_weights).sum(), 0.0, metrics


# ---- stage kto ----------------------------------------------------------------------------------


class JudgedObjective(PreferenceObjective):
    """Stage kto."""

    metric_names = JUDGED_METRICS

    @torch.no_grad()
    @record_function("reference")
    def with_reference(self, model, batches: list[Batch]) -> list[Batch]:
        """The batches with ref_logps (n,), kl (n,) and kl_metric (2,), for the log.

        kl, the divergence of model and reference, is estimated for each micro-batch on prompts with
        answers of other rows: the mean of log pi - log pi_ref, in training the mean over all ranks,
        and at least 0 (arXiv:2402.01306, sec. 4.1).
        """
        ours = [self.logps(model, batch.kl_batch)[0] for batch in batches]
        with self.reference_model(model) as reference:
            ref_logps = [self.logps(reference, batch)[0] for batch in batches]
            log_ratios = []
            for logps, batch in zip(ours, batches):
                log_ratios.append(logps - self.logps(reference, batch.kl_batch)[0])
        estimates = []                              # one per micro-batch
        for ratios, batch in zip(log_ratios, batches):
            if not batch.filler:
                estimates += [group.mean() for group in ratios.split(batch.batch_sizes)]
        ranks = self.ranks if model.training else Ranks()
        if ranks.world > 1:
            estimates = mean_over_ranks(estimates, self.config.gradient_accumulation_steps, ranks,
                                        ref_logps[0].device)
        estimates = iter(estimates)
        found = []
        for batch, logps in zip(batches, ref_logps):
            kls = [logps.new_zeros(())]
            if not batch.filler:
                kls = [next(estimates).clamp(min=0) for _ in batch.batch_sizes]
            rows = [kl.expand(size) for kl, size in zip(kls, batch.batch_sizes)]
            kl = torch.cat(rows)                                                        # (n,)
            metric = torch.stack((sum(kls) / ranks.world, kl.new_ones(())))
            found.append(replace(batch, ref_logps=logps, kl=kl, kl_metric=metric))
        return found

    def loss_sum(self, model, batch):
        config, desired = self.config, batch.desired
        logps, counts = self.logps(model, batch)                                        # (n,)
        log_ratios = logps - batch.ref_logps
        losses = kto_losses(log_ratios, batch.kl, desired, config.pref_beta,
                            config.kto_chosen_weight, config.kto_rejected_weight)
        if config.pref_ftx:     # LLaMA-Factory's weight: (rows / desired ones) of a group, twice
            shares = []
            for group in desired.float().split(batch.batch_sizes):
                shares.append(group.mean().clamp(min=1e-9).expand(len(group)))
            sft = config.pref_ftx * desired * logps / counts.clamp(min=1)
            losses = losses - sft / torch.cat(shares).square()
        metrics = {"kl": batch.kl_metric}
        counted = (batch.row_weights > 0).float()
        rewards = config.pref_beta * log_ratios.detach()
        for name, which in (("chosen", desired), ("rejected", ~desired)):
            metrics[f"rewards/{name}"] = weighted_sum(rewards, which * counted)
            metrics[f"logps/{name}"] = weighted_sum(logps.detach(), which * counted)
        return (losses * batch.row_weights).sum(), 0.0, metrics


def mean_over_ranks(values: list, most: int, ranks: Ranks, device) -> list:
    """At most `most` scalars, each the mean over the ranks that have one at its index."""
    ours = torch.full((most,), math.nan, device=device)
    if values:
        ours[:len(values)] = torch.stack(values)
    mean = torch.stack(ranks.gather(ours)).nanmean(0)
    return [mean[i] for i in range(len(values))]


# ---- rows -> ids and labels -> batches ----------------------------------------------------------


def encode_answers(batch, config, tokenizer, template, encoded: EncodedRows,
                   check_only: bool = False):
    """Stages rm, dpo, kto: an example of two sequences per row, the prompt with either answer.

    They are the chosen and the rejected answer; or (kto) the row's own answer and, to estimate a
    KL divergence (arXiv:2402.01306, sec. 4.1), that of the row before; the first row takes the last
    one's. Thoughts of earlier answers are left out. batch: [(row, conversation), ...].
    """
    settings = settings_of(config)
    rendered, kept = [], []

    def render(conversation, answer):
        messages = [*conversation.messages[:-1], answer]
        *earlier, (source, target) = render_turns(
            template, tokenizer, messages, conversation.system, conversation.tools, settings,
            only_last=True)
        prompt = [piece for turn in earlier for pieces in turn for piece in pieces]
        return prompt + source, target

    for row, conversation in batch:
        answers = [conversation.messages[-1]]
        if config.stage in PAIRS:
            answers.append(conversation.rejected)
        try:
            rendered.append([render(conversation, answer) for answer in answers])
            kept.append((row, conversation))
        except ValueError as error:         # a tool call or tool description that cannot be read
            encoded.reject(row, error)
    if check_only or encoded.bad and not config.skip_bad_rows:
        return
    if config.stage in JUDGED:
        for number, (row, conversation) in enumerate(kept):
            _, before = kept[number - 1]
            rendered[number].append(render(conversation, before.messages[-1]))
    pieces = [pieces for both in rendered for one in both for pieces in one]
    ids = iter(encode_pieces(tokenizer, pieces))
    closing_eos = [tokenizer.eos_id] if template.efficient_eos else []
    for row, conversation in kept:
        both = [(next(ids), next(ids) + closing_eos) for _ in range(2)]
        add_answers(encoded, row, conversation.desired, both, config)


def add_answers(encoded: EncodedRows, row: RawRow, desired: bool | None, both: list, config):
    """Add one row's example. both: two (prompt_ids, answer_ids).

    A pair has the prompt of the chosen answer, truncated for the longer of the two answers, as in
    LLaMA-Factory; in kto each is truncated on its own.
    """
    is_pair = config.stage in PAIRS
    longest = max(len(answer) for _, answer in both)
    sequences = []
    for prompt, answer in both:
        if is_pair:
            prompt = both[0][0]
        target = longest if is_pair else len(answer)
        keep_prompt, keep_answer = truncated_lengths(len(prompt), target, config.cutoff_len)
        prompt = prompt[:keep_prompt]
        answer = answer[:keep_answer]
        sequences.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    trained = sequences if is_pair else sequences[:1]       # kto's other answer is not trained on
    full_length = sum(len(prompt) + len(answer) for prompt, answer in both[:len(trained)])
    supervised = encoded.count(row, *end_to_end(trained), full_length)
    encoded.has_targets |= any(len(labels) > 1 and labels[-1] != IGNORE for _, labels in trained)
    encoded.add(*end_to_end(sequences), supervised > 0, [len(ids) for ids, _ in sequences],
                desired)


def end_to_end(sequences: list) -> tuple[list, list]:
    """(ids, labels) of several sequences, one after the other."""
    return (sum((ids for ids, _ in sequences), []),
            sum((labels for _, labels in sequences), []))


def collate_answers(groups: list[list[Example]], alike: bool = False) -> Batch:
    """The rows of some micro-batches.

    Of pairs, first all chosen answers, then all rejected ones; of judged answers one Batch, and in
    its `kl_batch` the prompts with answers of other rows, for the KL divergence.

    A row's weight is one over the rows of its micro-batch, and num_items is their number: the
    mean over micro-batches of their means, as in LLaMA-Factory. alike: every row's weight is 1, and
    num_items is the number of rows.
    """
    examples = [example for group in groups for example in group]
    first = [example.sequence(0) for example in examples]
    second = [example.sequence(1) for example in examples]
    sizes = tuple(map(len, groups))
    weights = [1.0 if alike else 1 / size for size in sizes for _ in range(size)]
    fields = {
        "batch_sizes": sizes,
        "row_weights": torch.tensor(weights),
        "num_items": len(examples) if alike else len(groups),
    }
    if examples[0].desired is None:
        return replace(collate(first + second), **fields)
    desired = torch.tensor([example.desired for example in examples])
    return replace(collate(first), desired=desired, kl_batch=collate(second), **fields)
