"""Learn from rewards with a value head, which says what to expect (stage ppo).

One rollout, and the ppo_epochs x ppo_buffer_size optimizer steps on it:

    1. the model answers each prompt once, a reward model scores the answers, and log-probabilities
       and values of their tokens are measured                                 methods/rollouts.py
    2. each token's reward is its share of the divergence from the reference, at the end the score;
       each token's advantage is how much better it went than the value head expected     prepare
    3. a step takes its part of the answers, in an order drawn for each epoch          batches_of
    4. the loss makes tokens with an advantage likelier, and the values better          loss_sum

Requires: methods/rollouts.py, methods/ppo_losses.py (the formulas).
Next: runtime/build.py (ppo_objective), docs/rewards.md.
Papers: PPO arXiv:1707.06347 (algorithm 1), for language models arXiv:1909.08593, arXiv:2009.01325.
"""
import math
from dataclasses import asdict
from itertools import chain, zip_longest

import torch

from attention import to_device
from data import IGNORE
from losses import weighted_sum
from methods.policy_losses import clipped_losses, clipped_share, token_weights
from methods.ppo_losses import (gae, merged_moments, next_kl_coef, token_rewards, value_losses,
                                whitened)
from methods.reward_model import ValueHead
from methods.rollouts import (AnswerBatch, Group, RolloutObjective, answer_batch, flat,
                              none_if_nan)

KL_COEF = 0.2           # at the start; this and the next two as in LLaMA-Factory
VALUE_CLIP = 0.2
VALUE_WEIGHT = 0.1      # of the value's loss beside the policy's
MOST_RATIO = 10.0       # a micro-batch whose mean ratio is larger is not trained on


class PPOObjective(RolloutObjective):
    """Stage ppo. See the top of this file.

    head: the value head, which is trained with the model; its dropout stays off.
    """

    def __init__(self, config, *args, head: ValueHead, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.head = head
        self.order: list[str] = []              # texts of the rollout's prompts, of all ranks
        self.kl_coef = config.kl_beta if "kl_beta" in config.given else KL_COEF
        self.kl = None                          # of the last rollout: the mean over its answers
        self.moments = (0.0, 1.0, 0.0)          # mean, variance and number of all scores so far
        self.metric_names = ("reward", *(f"reward/{name}" for name in self.rewards.names),
                             "unscored", "length", "ended", "entropy", "ref_kl", "kl_coef",
                             "policy_loss", "value_loss", "clip_share", "value_clip_share",
                             "not_trained", "sampler_gap")

    def parameters(self) -> dict:
        return self.head.weights()

    def values(self, hidden, batch):
        """What the head expects before each token of the answers, (N,)."""
        rows = (batch.targets != IGNORE).nonzero()[:, 0]
        return self.head(hidden[to_device(rows, hidden.device)])

    def measured(self, answers: AnswerBatch, hidden):
        self.keep(answers, "old_values", self.values(hidden, answers))

    # ---- a rollout -> advantages

    def prepare(self, batches: list):
        """Advantages and returns of all answers of the rollout; all ranks compute them alike."""
        self.share_rollout(batches)
        groups = [self.groups[text] for text in self.order]
        for group in groups:                    # of an answer without a score
            group.advantages = group.returns = [[0.0] * len(group.answers[0])]
        scored = [group for group in groups if not math.isnan(group.rewards[0])]
        if not scored:                          # check_scored ends the run if it goes on like this
            return
        if self.kl is not None:                 # of the rollout before
            self.kl_coef = next_kl_coef(self.kl_coef, self.kl, self.config.ppo_target,
                                        len(groups))
        self.kl = math.fsum(map(divergence, scored)) / len(scored)

        counts = [len(group.answers[0]) for group in scored]
        old, ref, values = (flat(scored, name, "cpu")
                            for name in ("old_logps", "ref_logps", "old_values"))
        rewards = token_rewards(self.final_scores(scored), old, ref, counts, self.kl_coef)
        if self.config.ppo_whiten_rewards:
            rewards = whitened(rewards, shift_mean=False)
        advantages = gae(rewards, values, counts)
        for name, found in (("returns", advantages + values), ("advantages", whitened(advantages))):
            for group, part in zip(scored, found.split(counts)):
                setattr(group, name, [part.tolist()])

    def share_rollout(self, batches: list):
        """Give every rank the answers of all; order: as one rank would meet the prompts."""
        texts = [[prompt.text for prompt in batch.prompts] for batch in batches]
        ours = {text: asdict(group) for text, group in self.groups.items()}
        found = self.ranks.gather_objects((texts, ours))
        for _, theirs in found:
            for text, group in theirs.items():
                self.groups.setdefault(text, Group(**group))
        in_turn = zip_longest(*(texts for texts, _ in found), fillvalue=[])
        self.order = list(chain.from_iterable(chain.from_iterable(in_turn)))

    def final_scores(self, groups: list[Group]):
        """The scores, (S,); with ppo_score_norm compared with all scores so far."""
        scores = torch.tensor([group.rewards[0] for group in groups])
        if not self.config.ppo_score_norm:
            return scores
        self.moments = merged_moments(*self.moments, scores)
        mean, variance, count = self.moments
        spread = math.sqrt(variance * count / max(count - 1, 1))
        return (scores - mean) / (spread + torch.finfo(torch.float32).eps)

    # ---- a step's part of the rollout

    def batches_of(self, batches: list) -> list[AnswerBatch]:
        """This rank's micro-batches of the step: the epoch's order, cut into ppo_buffer_size."""
        config = self.config
        number = config.ppo_epochs * config.ppo_buffer_size - 1 - self.uses_left
        epoch, part = divmod(number, config.ppo_buffer_size)
        draw = torch.Generator().manual_seed(self.seed_of("order", epoch))
        order = [self.order[i] for i in torch.randperm(len(self.order), generator=draw)]
        size = config.per_device_train_batch_size
        micro_batches = [order[start:start + size] for start in range(0, len(order), size)]
        in_step = config.gradient_accumulation_steps * self.ranks.world
        parts = math.ceil(len(micro_batches) / in_step)     # a last rollout may have fewer
        first = part % parts * in_step
        chosen = micro_batches[first:first + in_step]
        device = self.head.summary.weight.device
        return [self.batch_of([self.groups[text] for text in texts], len(chosen), device)
                for texts in chosen[self.ranks.rank::self.ranks.world]]

    def batch_of(self, groups: list[Group], micro_batches: int, device) -> AnswerBatch:
        """A batch for loss_sum; an answer without a score has no part in it."""
        batch = answer_batch(groups, device)
        scored = [float(not math.isnan(group.rewards[0])) for group in groups]
        weights = token_weights(                # means over micro-batches, as in LLaMA-Factory
            "bnpo", torch.tensor(batch.counts), torch.tensor(scored), answers=0, tokens=0,
            micro_batches=micro_batches, max_new_tokens=0)
        batch.weights = to_device(weights, device)
        for name in ("advantages", "old_logps", "old_values", "returns"):
            setattr(batch, name, flat(groups, name, device))
        return batch

    # ---- the loss

    def loss_sum(self, model, batch):
        if batch.weights is None:               # an evaluation
            return self.eval_loss(batch)
        hidden = self.final_hidden(model, batch)
        logps = self.token_logps(model, hidden, batch)
        ratios = (logps - batch.old_logps).exp()
        epsilon = self.config.epsilon
        policy = clipped_losses(ratios, batch.advantages, epsilon, epsilon)
        value, value_clipped = value_losses(self.values(hidden, batch), batch.old_values,
                                            batch.returns, VALUE_CLIP)
        trained = (ratios.mean() <= MOST_RATIO).float()
        loss = trained * ((policy + VALUE_WEIGHT * value) * batch.weights).sum()

        shares = batch.weights
        one = shares.new_ones(1)
        clipped = clipped_share(ratios, batch.advantages, epsilon, epsilon)
        metrics = self.reward_metrics(batch) | {
            "policy_loss": weighted_sum(policy.detach(), shares),
            "value_loss": weighted_sum(value.detach(), shares),
            "clip_share": weighted_sum(clipped, shares),
            "value_clip_share": weighted_sum(value_clipped.float(), shares),
            "entropy": weighted_sum(-batch.old_logps, torch.ones_like(shares)),
            "ref_kl": weighted_sum((self.kl or 0.0) * one, one),
            "kl_coef": weighted_sum(self.kl_coef * one, one),
            "not_trained": weighted_sum(1 - trained, one),
            "sampler_gap": weighted_sum(self.gap * one, one),
        }
        return loss, 0.0, metrics

    # ---- what is kept

    def state(self) -> dict:
        return super().state() | {
            "order": self.order if self.uses_left else [],
            "kl_coef": self.kl_coef,
            "kl": self.kl,
            "moments": self.moments,
        }

    def load_state(self, saved: dict):
        super().load_state(saved)
        if saved:
            self.order = saved["order"]
            self.kl_coef = saved["kl_coef"]
            self.kl = saved["kl"]
            self.moments = tuple(saved["moments"])

    def samples_of(self, group: Group) -> list[dict]:
        sample, = super().samples_of(group)
        return [{**sample, "kl": divergence(group),
                 "value": none_if_nan(group.old_values[0][0])}]


def divergence(group: Group) -> float:
    """log(pi / pi_ref) of an answer: the sum over its tokens."""
    return math.fsum(group.old_logps[0]) - math.fsum(group.ref_logps[0])
