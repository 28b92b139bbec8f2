"""Learn from the probabilities of a teacher (stage distill), on the rows or on own answers.

One optimizer step:

    1. for a share of the rows, distill_lambda, the model that is trained answers the prompt
       itself; the other rows keep their answers              sample_groups, methods/rollouts.py
    2. teacher and student read prompt and answer; at each token of the answer their distributions
       of the next token are compared                         loss_sum, methods/distill_losses.py
    3. the sum over all tokens of the step, divided by their number, is the loss

Answers of its own show the student where its own mistakes lead, which the rows do not. As in
grpo, they are sampled from the very weights that train, and serve num_iterations steps.

Requires: methods/rollouts.py, methods/prompts.py (RowBatch), methods/distill_losses.py.
Next: runtime/build.py (teacher_objective), runtime/second_model.py (the teacher).
Paper: GKD arXiv:2306.13649 (algorithm 1; there a whole batch is sampled or not, here each row).
"""
from dataclasses import dataclass, field

import torch
from torch.profiler import record_function

from data import IGNORE, Batch, collate
from losses import Objective
from methods.distill_losses import Distance, Head, distill_sums
from methods.prompts import Prompt, RowBatch
from methods.rollouts import Group, RolloutObjective, answered, groups_of, known_sums


@dataclass
class AnsweredBatch(Batch):
    """Rows, some of them with an answer of the model in place of their own."""
    groups: list[Group] = field(default_factory=list)   # of the rows; one without answers: its own
    step_items: float = 0.0                             # labels of the whole step, on all ranks


class DistillObjective(RolloutObjective):
    """Stage distill. See the top of this file. teacher: a frozen model.

    text, decode: None where nothing is sampled (distill_lambda: 0).
    """

    metric_names = ("cross_entropy", "teacher_cross_entropy", "own_answers", "length", "ended",
                    "sampler_gap")

    def __init__(self, config, text, decode, teacher, ranks, dtype: torch.dtype,
                 matmul=torch.nn.functional.linear):
        super().__init__(config, text, decode, None, None, ranks, dtype, teacher, matmul)
        self.distance = Distance(config.distill_beta, config.distill_temperature)

    def __call__(self, model, batch, num_items: float):
        """The labels of sampled answers are counted when they are there, those of rows before."""
        items = getattr(batch, "step_items", num_items)
        return Objective.__call__(self, model, batch, items)

    # ---- own answers

    def with_reference(self, model, batches: list) -> list:
        """The batches, some rows with an answer of the model; an evaluation keeps the rows."""
        if not model.training or not self.config.distill_lambda:
            return batches
        return super().with_reference(model, batches)

    def sample_groups(self, model, prompts: list[Prompt], greedy: bool = False) -> dict:
        """{text of a prompt: its Group}, without an answer where the row keeps its own."""
        own = [prompt for prompt in prompts if self.answers_itself(prompt)]
        groups = {prompt.text: Group(prompt.text, prompt.input_ids, [], [], [])
                  for prompt in prompts}
        return groups | super().sample_groups(model, own, greedy)

    def answers_itself(self, prompt: Prompt) -> bool:
        """Whether the model answers in this rollout: drawn, the same on any number of ranks."""
        return self.seed_of(prompt.words, -1) < self.config.distill_lambda * 2**63

    def named(self, prompt: Prompt) -> str:
        return f"the prompt that ends {self.asked(prompt.input_ids)[-80:]!r}"

    def asked(self, prompt: list[int]) -> str:
        return self.text.tokenizer.decode(prompt)

    def score(self, model, groups: dict[str, Group]):
        """The teacher judges every token: there are no rewards."""

    def check_scored(self):
        """Nothing to check, see score."""

    def measure(self, model, batches: list):
        """Check the sampler's log-probabilities; they are not needed afterwards."""
        super().measure(model, [batch for batch in batches if self.own_answers(batch)])
        for group in self.groups.values():
            group.sampled_logps, group.old_logps = [], []

    def own_answers(self, batch: RowBatch) -> bool:
        return any(group.answers for group in groups_of(batch, self.groups))

    def batches_of(self, batches: list) -> list[AnsweredBatch]:
        found = [self.batch_of(batch) for batch in batches]
        step_items, = self.ranks.total(sum(batch.num_items for batch in found))
        for batch in found:
            batch.step_items = step_items
        return found

    def batch_of(self, batch: RowBatch) -> AnsweredBatch:
        """A batch for loss_sum."""
        groups = groups_of(batch, self.groups)
        examples = [answered(group.prompt_ids, group.answers[0]) if group.answers else row
                    for row, group in zip(batch.examples, groups)]
        made = AnsweredBatch(**vars(collate(examples)), groups=groups)
        return made.to(batch.input_ids.device)

    # ---- the loss

    def loss_sum(self, model, batch):
        teacher = self.teacher_head(model, batch)
        hidden = model(batch.input_ids, batch.position_ids, batch.layout)[0]            # (N, D)
        student = Head(hidden, model.head_weight(), model.config.final_softcap)
        total, entropies = distill_sums(student, teacher, batch.targets, self.distance,
                                        self.matmul)
        count = entropies.new_tensor(float((batch.targets != IGNORE).sum()))
        metrics = {
            "cross_entropy": torch.stack((entropies[0], count)),
            "teacher_cross_entropy": torch.stack((entropies[1], count)),
        }
        if isinstance(batch, AnsweredBatch):
            metrics |= self.answer_metrics(batch.groups, hidden.device)
        return total, 0.0, metrics

    @torch.no_grad()
    @record_function("teacher")
    def teacher_head(self, model, batch) -> Head:
        with self.reference_model(model) as teacher:
            hidden = teacher(batch.input_ids, batch.position_ids, batch.layout)[0]      # (N, D)
            return Head(hidden, teacher.head_weight().detach(), teacher.config.final_softcap)

    def answer_metrics(self, groups: list[Group], device) -> dict:
        """Of the answers that the model has given: their share, length, and how many have ended."""
        own = [group for group in groups if group.answers]
        values = {
            "own_answers": [bool(group.answers) for group in groups],
            "length": [len(group.answers[0]) for group in own],
            "ended": [group.ended[0] for group in own],
            "sampler_gap": [self.gap] if own else [],
        }
        return known_sums(values, device)

    def samples_of(self, group: Group) -> list[dict]:
        """The line of samples.jsonl for the answer of a group, if the model has given one."""
        return [{
            "rollout": self.rollout,
            "prompt": self.asked(group.prompt_ids),
            "answer": self.decoded(answer),
            "ended": ended,
        } for answer, ended in zip(group.answers, group.ended)]
