"""Rollouts: answers that the model samples while it is trained, and what is known of them.

    1. the model that is trained answers each prompt, in stage grpo num_generations times
                                                                                sample_groups
    2. reward functions and a reward model score the answers                    score
    3. the training forward pass computes the log-probabilities of the sampled tokens; they must
       be the ones they were sampled with, or the run ends                      measure

The loop of train.py sees none of this: its batches are prompts, and with_reference returns the
batches of answers. With num_iterations (ppo_epochs) the same answers serve several steps.

Requires: losses.py (Objective), methods/prompts.py, fast/batch_decode.py.
Next: methods/grpo.py and methods/ppo.py (what a stage does with them), methods/rewards.py.
"""
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.profiler import record_function

from attention import to_device
from data import IGNORE, Batch, Example, collate
from generate import Sampling
from losses import Objective, token_losses
from methods.prompts import Prompt, check_room
from templates import encode_prompt

ROWS_AT_ONCE = 256          # answers that are decoded together
MAX_UNSCORED = 3            # rollouts in a row without a reward that end the run
SAMPLES = "samples.jsonl"   # in output_dir: every answer with its reward, a line each
# the most that sampler and trainer may differ in the mean log-probability of a token
GAP_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}


@dataclass
class Group:
    """The sampled answers to one prompt. Lists have an entry for each answer."""
    text: str                   # of its Prompt: the row as JSON
    prompt_ids: list[int]
    answers: list[list[int]]    # token ids, with the id that ends an answer
    ended: list[bool]           # False: cut off by max_new_tokens
    sampled_logps: list[list[float]]
    rewards: list[float] = field(default_factory=list)          # NaN: it could not be scored
    parts: list[list[float]] = field(default_factory=list)      # of each reward function
    old_logps: list[list[float]] = field(default_factory=list)  # by the trainer, when sampled
    ref_logps: list[list[float]] = field(default_factory=list)
    old_values: list[list[float]] = field(default_factory=list)     # stage ppo, and:
    advantages: list[list[float]] = field(default_factory=list)
    returns: list[list[float]] = field(default_factory=list)


@dataclass
class AnswerBatch(Batch):
    """Answers behind their prompts. (N,): for each token of an answer; (S,): for each answer."""
    counts: list[int] = field(default_factory=list)             # tokens of each answer
    advantages: torch.Tensor | None = None                      # (N,)
    old_logps: torch.Tensor | None = None                       # (N,)
    answer_ref_logps: torch.Tensor | None = None                # (N,)
    weights: torch.Tensor | None = None                         # (N,) shares of the step's loss
    old_values: torch.Tensor | None = None                      # (N,) stage ppo, and:
    returns: torch.Tensor | None = None                         # (N,)
    groups: list[Group] = field(default_factory=list)


def answers_per_prompt(config) -> int:
    """Answers that are sampled for each prompt: one, but in stage grpo."""
    return config.num_generations if config.stage == "grpo" else 1


def rollout_sampling(config) -> Sampling:
    """How answers are sampled.

    In stage grpo from the whole distribution, unless the config says otherwise; in stage ppo as in
    LLaMA-Factory, whose defaults the config has.
    """
    if config.stage == "ppo":
        return Sampling(do_sample=True, temperature=config.temperature, top_p=config.top_p,
                        top_k=config.top_k)
    return Sampling(
        do_sample=True,
        temperature=config.temperature if "temperature" in config.given else 1.0,
        top_p=config.top_p if "top_p" in config.given else 1.0,
        top_k=config.top_k if "top_k" in config.given else 0,
    )


class RolloutObjective(Objective):
    """What the stages share that learn from answers of the model itself: see the top of this file.

    A stage defines batches_of (what a step learns from them) and loss_sum, and prepare and measured
    where it needs more of a rollout.

    text: of text/load_text.py. decode: fast.batch_decode.decode_rows. rewards: score(row, answer)
    -> a number of each reward, NaN where one failed; see methods/rewards.py. reward_model: scores
    (model, sequences), see methods/reward_model.py; None for none. dtype: of matrix products.
    """

    def __init__(self, config, text, decode, rewards, reward_model, ranks, dtype: torch.dtype,
                 reference=None, matmul=torch.nn.functional.linear):
        super().__init__(matmul)
        self.config = config
        self.text = text
        self.decode = decode
        self.rewards = rewards
        self.reward_model = reward_model
        self.ranks = ranks
        self.gap_limit = GAP_LIMITS[dtype]
        self.reference = reference
        self.sampling = rollout_sampling(config)
        self.rollout = 0                        # rollouts so far
        self.uses_left = 0                      # steps for which the last one still serves
        self.groups: dict[str, Group] = {}      # of the last one, by the text of the prompt
        self.gap = 0.0                          # the largest of the last one
        self.unscored = 0                       # rollouts in a row without any reward
        self.writes_samples = False

    def __call__(self, model, batch, num_items: float):
        """The weights of the tokens are shares of the whole step: nothing is left to divide."""
        return super().__call__(model, batch, 1.0)

    # ---- prompts -> batches of answers

    @torch.no_grad()
    def with_reference(self, model, batches: list) -> list:
        """The answers that this step learns from, in batches; new ones are sampled where due.

        In an evaluation: for each batch of prompts the likeliest answers.
        """
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        if not model.training:
            groups = self.sample_groups(model, prompts, greedy=True)
            self.score(model, groups)
            found = [answer_batch(groups_of(batch, groups), batch.input_ids.device)
                     for batch in batches]
            for batch in found:                 # a mean counts what has a reward, see eval_loss
                batch.num_items = sum(not math.isnan(group.rewards[0]) for group in batch.groups)
            return found
        known = all(prompt.text in self.groups for prompt in prompts)
        if not self.uses_left or not known:
            self.roll_out(model, batches, prompts)
        self.uses_left -= 1
        found = self.batches_of(batches)
        self.step_tokens, = self.ranks.total(sum(len(batch.targets) for batch in found))
        return found

    def batches_of(self, batches: list) -> list[AnswerBatch]:
        """The batches of answers, with what loss_sum needs."""
        raise NotImplementedError

    @record_function("rollout")
    def roll_out(self, model, batches: list, prompts: list[Prompt]):
        """Sample and score a group of answers for each prompt, with the weights as they are."""
        self.rollout += 1
        self.groups = self.sample_groups(model, prompts)
        self.score(model, self.groups)
        self.check_scored()
        self.measure(model, batches)
        self.uses_left = self.config.steps_per_rollout
        self.write_samples()
        self.prepare(batches)

    def prepare(self, batches: list):
        """Compute what all steps of a rollout need."""

    def sample_groups(self, model, prompts: list[Prompt], greedy: bool = False) -> dict:
        """{text of a prompt: its Group}, by the very model that is trained, adapters and all."""
        sampling = Sampling() if greedy else self.sampling
        size = 1 if greedy else answers_per_prompt(self.config)
        seeds = {}                              # of the answers to each prompt
        asked = []
        prompts = {prompt.text: prompt for prompt in prompts}       # each once
        for prompt in prompts.values():
            check_room(model, prompt, self.named(prompt))
            seeds[prompt.text] = [self.seed_of(prompt.words, index) for index in range(size)]
            asked += [(seed, prompt.input_ids) for seed in seeds[prompt.text]]
        was_training = model.training
        model.eval()
        rows = self.decode(model, asked, min(len(asked), ROWS_AT_ONCE), self.text.stop_ids,
                           sampling, limit=lambda length: self.config.max_new_tokens,
                           with_logps=True)
        found = {row.number: row for row in rows}
        model.train(was_training)
        groups = {}
        for text, numbers in seeds.items():
            ours = [found[number] for number in numbers]
            groups[text] = Group(
                text=text,
                prompt_ids=prompts[text].input_ids,
                answers=[row.answer for row in ours],
                ended=[row.answer[-1] in self.text.stop_ids for row in ours],
                sampled_logps=[row.logps for row in ours],
            )
        return groups

    def named(self, prompt: Prompt) -> str:
        """How an error names a prompt."""
        return f"{prompt.row['where']}: its prompt"

    def seed_of(self, words: str, index: int) -> int:
        """The seed of an answer to a prompt, given its words.

        It is the same on any number of ranks, after resuming, and wherever the dataset lies.
        """
        words = f"{self.config.seed} {self.rollout} {index} {words}"
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1

    def score(self, model, groups: dict[str, Group]):
        """Give each answer its rewards, and print what has failed."""
        for group in groups.values():
            row = json.loads(group.text)
            group.parts = [self.rewards.score(row, self.decoded(answer))
                           for answer in group.answers]
        if self.reward_model and groups:
            self.add_scores(model, groups)
        failed = 0
        for group in groups.values():
            group.rewards = [self.rewards.total(parts) for parts in group.parts]
            failed += sum(map(math.isnan, group.rewards))
        self.rewards.report(failed)

    def add_scores(self, model, groups: dict[str, Group]):
        """Append the reward model's score of each answer to its parts; NaN where there is none."""
        parts = [parts for group in groups.values() for parts in group.parts]
        behind = after_stop(self.text)
        sequences = [group.prompt_ids + answer + (behind if ended else [])
                     for group in groups.values()
                     for answer, ended in zip(group.answers, group.ended)]
        scores, problem = self.reward_model.scores(model, sequences)
        if problem:
            self.rewards.problems.append(f"reward_model: {problem}")
        for answer_parts, score in zip(parts, scores):
            answer_parts.append(score)

    def check_scored(self):
        """Raise ValueError, on all ranks, after MAX_UNSCORED rollouts in a row without a reward."""
        rewards = [reward for group in self.groups.values() for reward in group.rewards]
        scored, = self.ranks.total(sum(not math.isnan(reward) for reward in rewards))
        self.unscored = 0 if scored else self.unscored + 1
        if self.unscored >= MAX_UNSCORED:
            raise ValueError(
                f"{MAX_UNSCORED} rollouts in a row without a reward: "
                f"{self.rewards.last_problem or 'the reason is on another rank'}")

    def decoded(self, answer: list[int]) -> str:
        return self.text.tokenizer.decode(answer, skip_special_tokens=True).strip()

    # ---- log-probabilities by the trainer

    def final_hidden(self, model, batch):
        """The final hidden states of a batch, (N, D)."""
        return model(batch.input_ids, batch.position_ids, batch.layout)[0]

    def token_logps(self, model, hidden, batch):
        """log p of each token of the answers, (N,), at the temperature of sampling."""
        heat = self.sampling.temperature
        softcap = model.config.final_softcap
        if heat != 1:                           # (c / T) tanh(x / T / (c / T)) = c tanh(x / c) / T
            hidden = hidden / heat
            softcap = softcap and softcap / heat
        return -token_losses(hidden, model.head_weight(), batch.targets, softcap, self.matmul,
                             self.chunk_loss)

    def measure(self, model, batches: list):
        """The log-probabilities of all answers by the trainer; and by the reference, if asked for.

        Raises ValueError if the sampler's are others: it would not sample the model that is
        trained.
        """
        gaps = [0.0]
        for batch in batches:
            answers = answer_batch(groups_of(batch, self.groups), batch.input_ids.device)
            hidden = self.final_hidden(model, answers)
            logps = self.token_logps(model, hidden, answers)
            self.keep(answers, "old_logps", logps)
            self.measured(answers, hidden)
            sampled = flat(answers.groups, "sampled_logps", logps.device)
            gaps += (logps - sampled).abs().tolist()
            if self.config.has_reference:
                with self.reference_model(model) as reference:
                    hidden = self.final_hidden(reference, answers)
                    self.keep(answers, "ref_logps", self.token_logps(reference, hidden, answers))
        largest = self.ranks.gather(torch.tensor([max(gaps)], dtype=torch.float64))
        self.gap = max(map(float, largest))
        total, count = self.ranks.total(math.fsum(gaps), len(gaps))
        if not total / count <= self.gap_limit:
            raise ValueError(
                f"rollout {self.rollout}: the log-probabilities of the sampled tokens are not "
                f"those of the trained model: they differ by {total / count:.2g} in the mean and "
                f"{self.gap:.2g} at most. It would learn from another model's answers")

    def measured(self, answers: AnswerBatch, hidden):
        """Keep what else a stage needs of this forward pass; hidden: (N, D)."""

    @staticmethod
    def keep(batch: AnswerBatch, name: str, logps):
        """Store (N,) values in the groups of a batch, answer by answer."""
        values = iter(logps.tolist())           # one wait for the device
        counts = iter(batch.counts)
        for group in batch.groups:
            setattr(group, name, [list(islice(values, next(counts))) for _ in group.answers])

    # ---- what is logged

    def eval_loss(self, batch: AnswerBatch):
        """What loss_sum returns in an evaluation: minus the rewards of the likeliest answers."""
        rewards = [group.rewards[0] for group in batch.groups]
        return -torch.tensor(rewards).nansum(), 0.0, self.reward_metrics(batch)

    def reward_metrics(self, batch: AnswerBatch) -> dict:
        """Means over the answers; reward_std is a mean over the groups."""
        device = batch.input_ids.device
        rewards = np.array([group.rewards for group in batch.groups])                   # (P, G)
        values = {
            "reward": rewards,
            "unscored": np.isnan(rewards),
            "length": np.array(batch.counts),
            "ended": np.array([group.ended for group in batch.groups]),
        }
        parts = np.array([group.parts for group in batch.groups])                       # (P, G, R)
        for number, name in enumerate(self.rewards.names):
            values[f"reward/{name}"] = parts[:, :, number]
        if rewards.shape[1] > 1:
            values["reward_std"] = [np.std(group[~np.isnan(group)], ddof=1) for group in rewards
                                    if (~np.isnan(group)).sum() > 1]
        return known_sums(values, device)

    # ---- what is kept

    def state(self) -> dict:
        """The number of rollouts, and the answers that still serve, of all ranks."""
        ours = {}
        if self.uses_left:
            ours = {text: asdict(group) for text, group in self.groups.items()}
        groups = {}
        for theirs in self.ranks.gather_objects(ours):
            groups |= theirs
        return {
            "rollout": self.rollout,
            "uses_left": self.uses_left,
            "gap": self.gap,
            "unscored": self.unscored,
            "groups": groups,
        }

    def load_state(self, saved: dict):
        if not saved:
            return
        self.rollout = saved["rollout"]
        self.uses_left = saved["uses_left"]
        self.gap = saved["gap"]
        self.unscored = saved["unscored"]
        self.groups = {text: Group(**group) for text, group in saved["groups"].items()}

    def write_samples(self):
        """Append this rollout's answers to samples.jsonl; a resumed run drops what came later."""
        name = SAMPLES if self.ranks.main else f"{self.ranks.rank}.{SAMPLES}"
        path = Path(self.config.output_dir) / name
        if not self.writes_samples:             # the first rollout of this process
            self.writes_samples = True
            keep_earlier(path, self.rollout)
        with open(path, "a", encoding="utf-8") as file:
            for group in self.groups.values():
                for sample in self.samples_of(group):
                    file.write(json.dumps(sample) + "\n")

    def samples_of(self, group: Group) -> list[dict]:
        """A line of samples.jsonl for each answer of a group."""
        row = json.loads(group.text)
        return [{
            "rollout": self.rollout,
            "where": row["where"],
            "prompt": row["prompt"],
            "answer": self.decoded(answer),
            "reward": none_if_nan(reward),
            "rewards": dict(zip(self.rewards.names, map(none_if_nan, parts))),
            "ended": ended,
        } for answer, ended, reward, parts in zip(group.answers, group.ended, group.rewards,
                                                  group.parts)]


# ---- parts --------------------------------------------------------------------------------------


def after_stop(text) -> list[int]:
    """What the template writes behind the id that ends an answer, as chatml its line break.

    A reward model is trained to score a text at its last token, which this is (stage rm).
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    _, answer = encode_prompt(text.template, text.tokenizer, turns)
    stops = [place for place, token in enumerate(answer) if token in text.stop_ids]
    return answer[stops[-1] + 1:] if stops else []


def groups_of(batch, groups: dict[str, Group]) -> list[Group]:
    """The groups of a batch of prompts, in its order."""
    return [groups[prompt.text] for prompt in batch.prompts]


def answered(prompt: list[int], answer: list[int]) -> Example:
    """A prompt with an answer, which alone carries labels."""
    ids = np.array(prompt + answer, np.int32)
    labels = np.array([IGNORE] * len(prompt) + answer, np.int32)
    return Example(ids, labels, [len(ids)])


def answer_batch(groups: list[Group], device) -> AnswerBatch:
    """All answers of these groups, each behind its prompt; they alone carry targets."""
    examples = []
    for group in groups:
        examples += [answered(group.prompt_ids, answer) for answer in group.answers]
    fields = vars(collate(examples)) | {"num_items": len(groups), "batch_sizes": (len(groups),)}
    batch = AnswerBatch(**fields, groups=groups)
    batch.counts = [len(answer) for group in groups for answer in group.answers]
    return batch.to(device)


def flat(groups: list[Group], name: str, device) -> torch.Tensor:
    """The values of all tokens of these groups, end to end, (N,) float32."""
    values = [value for group in groups for answer in getattr(group, name) for value in answer]
    return to_device(torch.tensor(values, dtype=torch.float32), device)


def known_sums(values: dict, device) -> dict[str, torch.Tensor]:
    """{name: (2,)}: the sum of its values that are not NaN, and their number."""
    sums = []
    for some in values.values():
        known = np.asarray(some, np.float64)
        known = known[~np.isnan(known)]
        sums.append((known.sum(), known.size))
    return dict(zip(values, to_device(torch.tensor(sums, dtype=torch.float32), device)))


def keep_earlier(path: Path, rollout: int):
    """Drop the lines of this rollout and later ones, and one that a killed run left unfinished."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    earlier = [line for line in lines
               if line.endswith("\n") and json.loads(line)["rollout"] < rollout]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(earlier), encoding="utf-8")
    os.replace(partial, path)                   # at any moment the file is complete


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
