"""Learn from rewards by comparing the answers to one prompt (stage grpo).

One optimizer step, from prompt to update:

    1. the model answers each prompt num_generations times, rewards score the answers, and the
       log-probabilities of their tokens are measured                           methods/rollouts.py
    2. an answer's advantage is its reward compared with its group              batch_of
    3. the loss makes tokens of better answers likelier, and the loop takes the step    loss_sum

Requires: methods/rollouts.py, methods/policy_losses.py (the formulas).
Next: runtime/build.py (policy_objective).
Papers: GRPO arXiv:2402.03300 (algorithm 1); see methods/policy_losses.py for the others.
"""
import torch

from attention import to_device
from losses import weighted_sum
from methods.policy_losses import (clipped_share, group_advantages, kl_estimates, policy_losses,
                                   token_weights)
from methods.rollouts import (AnswerBatch, Group, RolloutObjective, answer_batch, flat,
                              groups_of)


class GRPOObjective(RolloutObjective):
    """Stage grpo, with any policy_loss. See the top of this file."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.metric_names = ("reward", "reward_std",
                             *(f"reward/{name}" for name in self.rewards.names),
                             "unscored", "length", "ended", "entropy", "clip_share", "ref_kl",
                             "sampler_gap")

    def batches_of(self, batches: list) -> list[AnswerBatch]:
        found = [self.batch_of(batch, self.groups) for batch in batches]
        self.share_weights(found)
        return found

    def batch_of(self, prompts, groups: dict[str, Group]) -> AnswerBatch:
        """A batch for loss_sum."""
        device = prompts.input_ids.device
        batch = answer_batch(groups_of(prompts, groups), device)
        rewards = torch.tensor([group.rewards for group in batch.groups])               # (P, G)
        advantages = group_advantages(rewards, self.config.scale_rewards).flatten()     # (S,)
        advantages = advantages.repeat_interleave(torch.tensor(batch.counts))           # (N,)
        batch.advantages = to_device(advantages, device)
        batch.old_logps = flat(batch.groups, "old_logps", device)
        if self.config.kl_beta:
            batch.answer_ref_logps = flat(batch.groups, "ref_logps", device)
        return batch

    def share_weights(self, batches: list[AnswerBatch]):
        """Count the step's answers and tokens over all ranks, and divide its loss among them."""
        trained = []
        for batch in batches:
            ended = [end for group in batch.groups for end in group.ended]
            kept = [end or not self.config.mask_truncated for end in ended]
            trained.append(torch.tensor(kept, dtype=torch.float32))
        counts = [torch.tensor(batch.counts) for batch in batches]
        answers, tokens, micro_batches = self.ranks.total(
            sum(map(len, counts)),
            sum(float((n * kept).sum()) for n, kept in zip(counts, trained)),
            len(batches),
        )
        for batch, n, kept in zip(batches, counts, trained):
            weights = token_weights(
                self.config.policy_loss, n, kept, answers=answers, tokens=tokens,
                micro_batches=micro_batches, max_new_tokens=self.config.max_new_tokens)
            batch.weights = to_device(weights, batch.input_ids.device)

    # ---- the loss

    def loss_sum(self, model, batch):
        if batch.weights is None:               # an evaluation
            return self.eval_loss(batch)
        config = self.config
        logps = self.token_logps(model, self.final_hidden(model, batch), batch)
        losses, ratios = policy_losses(config.policy_loss, logps, batch.old_logps,
                                       batch.advantages, batch.counts, config.epsilon, self.high)
        kl = torch.zeros_like(logps)
        if config.kl_beta:
            kl = kl_estimates(logps, batch.answer_ref_logps)
            losses = losses + config.kl_beta * kl
        ones = torch.ones_like(batch.weights)
        clipped = clipped_share(ratios, batch.advantages, config.epsilon, self.high)
        metrics = self.reward_metrics(batch) | {
            "clip_share": weighted_sum(clipped, ones),
            "ref_kl": weighted_sum(kl.detach(), ones),
            "entropy": weighted_sum(-batch.old_logps, ones),
            "sampler_gap": weighted_sum(self.gap * ones[:1], ones[:1]),
        }
        return (losses * batch.weights).sum(), 0.0, metrics

    def samples_of(self, group: Group) -> list[dict]:
        rewards = torch.tensor([group.rewards])
        advantages = group_advantages(rewards, self.config.scale_rewards)[0].tolist()
        return [{**sample, "advantage": advantage}
                for sample, advantage in zip(super().samples_of(group), advantages)]
