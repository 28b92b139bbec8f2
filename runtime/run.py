"""What stands around the loop: where a run continues, what it logs, saves and leaves behind.

    run = Run(config, device, ranks)            # the checkpoint to resume from, before anything
    run.start(...)                              # restore it, lock output_dir, open the log
    for step in plan.steps(after=run.state.step):
        ...                                     # the loop of train.py computes
        run.accept(step, loss, grad_norm, precision); run.log_step(...); run.save_checkpoint(...)
    run.finish(...)                             # best or last weights, results, pictures

Run is no trainer: it calls the model neither forward nor backward. RunState is what a checkpoint
keeps of a run beside weights and optimizer.

Requires: runtime/resume.py, runtime/report.py, runtime/steps.py, checkpoint/training_state.py.
Next: train.py.
"""
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint.adapters import (folded_under, reload_adapter, save_adapter, save_converted,
                                 save_pissa_start)
from checkpoint.files import into_folder, new_folder, write_json
from checkpoint.load import load_model, save_model
from checkpoint.peft_targets import notes_on_peft, why_peft_differs
from checkpoint.shards import full_bytes, is_sharded, local_tensor
from checkpoint.training_state import (checkpoints_in, load_training_state, optimizer_names,
                                       read_trainer_state, rng_state, save_training_state,
                                       write_checksums)
from checkpoint.value_head import read_value_head, save_value_head
from errors import first_line
from losses import metric_means
from parallel import Ranks, check_same_start, end_ranks
from runtime.export_card import license_of
from runtime.kernels import device_name
from runtime.precision import check_dtype, use_deterministic_kernels
from runtime.report import (RunLog, format_paragraph, model_card, plot_losses, print_pairs,
                            sketch, trainer_state, versions)
from runtime.resume import (STOPPED, StopSignals, changed_settings, check_rows, find_resume,
                            on_resume, record_stop, prepare_output, remove_old_checkpoints,
                            check_disk_space, usable_best)
from runtime.rope_scaling import scaled_fields
from runtime.sample_answers import answers_to, print_before_after
from runtime.setup import Base, Setup
from runtime.steps import Step, StepPlan, accumulation_for
from runtime.throughput import (Pace, StepProfile, flops_of_batch, matmul_parameters,
                                peak_memory, speed_results, total_flos)
from runtime.trackers import open_trackers, wanted_trackers
from settings.config import IGNORED, as_dict
from settings.load_config import chat_command, ignored_keys, non_default
from text.tokenizer import read_json
from text.written_formats import written_template

MAX_SKIPPED = 3             # consecutive steps without a finite loss and gradient that end the run


@dataclass
class RunState:
    """What a checkpoint keeps of a run, in trainer_state.json under the key "resume"."""
    rows_per_step: int
    rows: str                       # checksum of the training rows
    kernel: str = "plain"
    matmul: str = "torch"
    threads: int = 0                # of a CPU
    compiled: bool = False
    max_tokens_per_pass: int = 0
    mlp_tile: int = 0
    step: int = 0
    epoch: float = 0.0
    loss_total: float = 0.0
    tokens_seen: int = 0
    skipped: int = 0                # steps that were not finite
    # since the last logged line: [sum of losses, steps], {name: [weighted sum, sum of weights]}
    window: list = field(default_factory=lambda: [0.0, 0])
    window_metrics: dict = field(default_factory=dict)
    lowest_eval_loss: float | None = None
    evals_without_gain: int = 0     # evaluations since the lowest eval_loss
    eval_losses: list = field(default_factory=list)     # of all evaluations after a step
    answers: list = field(default_factory=list)         # to config.ask before the first step
    best: list | None = None        # [step, eval_loss] of a checkpoint
    loss_scale: list | None = None  # of float16
    objective: dict = field(default_factory=dict)       # see losses.Objective.state

    def to_json(self) -> dict:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {LEGACY_NAMES.get(name, name): value for name, value in values.items()
                if value is not None or name != "loss_scale"}

    def update(self, saved: dict):
        """Take over what a checkpoint has saved; an older release has saved less."""
        for one in fields(self):
            name = LEGACY_NAMES.get(one.name, one.name)
            if name in saved:
                setattr(self, one.name, saved[name])


# fields that say how a run computes, which a resumed run keeps
DECIDED = ("kernel", "matmul", "threads", "compiled", "max_tokens_per_pass", "mlp_tile")
# fields whose name in trainer_state.json is that of the first release
LEGACY_NAMES = {
    "matmul": "product",
    "max_tokens_per_pass": "at_once",
    "window_metrics": "seen",
    "lowest_eval_loss": "lowest",
    "evals_without_gain": "waited",
}


class Run:
    """One training run: its output folder, its state, its log. See the top of this file.

    resume: the checkpoint to continue from, or None. Raises ValueError for a dtype that the device
    lacks, and rather than overwrite another run.
    """

    def __init__(self, config, device: torch.device, ranks: Ranks):
        check_dtype(config, device)
        if config.full_determinism:
            use_deterministic_kernels()
        config.gradient_accumulation_steps = accumulation_for(config, ranks.world)
        self.config = config
        self.device = device
        self.device_name = device_name(device)          # before fewer threads are chosen
        self.ranks = ranks
        self.output = Path(config.output_dir)
        self.start_time = time.monotonic()
        if not ranks.main:                              # one rank prints and writes
            sys.stdout = open(os.devnull, "w")
        self.resume = ranks.from_main(lambda: find_resume(config))
        wanted_trackers(config)                         # a missing package ends the run now
        self.saved = {}
        if self.resume:
            self.saved = read_trainer_state(self.resume).get("resume", {})
        self.begun = ranks.from_main(self.first_start)
        self.skipped_in_a_row = 0
        self.stop_reason = ""
        self.final_eval = None                          # metrics of the final weights
        self.eval_losses = []                           # what reduce_lr_on_plateau looks at
        self.lowest_at = 0                              # step of the lowest eval_loss so far
        self.heartbeat = None                           # of several ranks, from start on

    def recorded(self, name: str, default):
        """How this run has computed since its first start, or `default` if it starts now.

        name: a field of RunState. A run that was killed before its first checkpoint and is started
        again with the same settings uses the same kernels.
        """
        if not self.resume:
            return self.begun["kernels"].get(name, default) if self.is_same_run() else default
        then = {one.name: one.default for one in fields(RunState)}
        return self.saved.get(LEGACY_NAMES.get(name, name), then[name])

    def first_start(self) -> dict:
        """The settings that an earlier start left in output_dir, or {}."""
        try:
            return read_json(self.output / "train_config.json")
        except (ValueError, OSError) as error:
            print(f"  note: the kernels of an earlier start are unknown ({first_line(error)})")
            return {}

    def is_same_run(self) -> bool:
        """Whether output_dir holds an earlier start of this very command on such a machine."""
        kernels = self.begun.get("kernels")
        if not isinstance(kernels, dict) or kernels.get("device") != self.device_name:
            return False
        compared = ["versions", *(key for key in self.settings if on_resume(key) != IGNORED)]
        now = json.loads(json.dumps(self.settings))
        return all(self.begun.get(key) == now[key] for key in compared)

    def stored_at(self, base: Base) -> list[Path]:
        """Folders whose train_config.json may name a chat template."""
        return [self.resume] if self.resume else base.adapters

    def print_start(self, base: Base, text):
        """The head of the start page; raises ValueError for settings that cannot be resumed."""
        config = self.config
        self.text = text
        self.settings = {**as_dict(config), "template": written_template(text.template),
                         "versions": versions()}
        self.template = text.template.name
        self.tokenizer = text.tokenizer
        print(format_paragraph("settings that differ from the defaults", non_default(config)))
        ignored = ignored_keys(config)
        if ignored:
            print(f"  accepted, no effect here: {', '.join(ignored)}")
        for note in config.notes:
            print(f"  note: {note}")
        if self.resume:
            changed = changed_settings(self.resume, self.settings, config.force_resume)
            if changed:
                print_pairs(f"settings changed since {self.resume}", changed)
        print(format_paragraph("environment", {
            **versions(), "device": self.device_name,
            "template": f"{text.template.name} ({text.origin})"}))
        for note in base.model_config.notes:
            print(f"  note: {note}")
        for note in text.notes:
            print(f"  note: template {text.template.name}: {note}")

    # ---- start

    def start(self, base: Base, plan: StepPlan, setup: Setup, model, objective, gradients,
              optimizer, precision):
        """Restore the checkpoint, lock and prepare output_dir, open the log."""
        self.base, self.plan, self.setup = base, plan, setup
        self.model, self.objective, self.gradients = model, objective, gradients
        self.optimizer, self.precision = optimizer, precision
        self.optimizer_names = optimizer_names(optimizer, gradients.parameters)
        weights = dict(model.named_parameters()) | objective.parameters()
        # also those that BAdam does not train at the moment
        self.weights = {name: weights[name] for name in gradients.parameters}
        self.state = RunState(
            rows_per_step=plan.rows_per_step,
            rows=plan.train_set.sign,
            kernel=setup.kernels.attention,
            matmul=setup.kernels.matmul_name,
            threads=setup.kernels.threads,
            compiled=bool(setup.kernels.compile),
            max_tokens_per_pass=setup.max_tokens_per_pass,
            mlp_tile=setup.memory.workload.mlp_tile,
        )
        self.settings["kernels"] = {
            "device": self.device_name,
            **{name: getattr(self.state, name) for name in DECIDED}}
        history = self.restore() if self.resume else []
        self.first_step = self.state.step
        self.eval_losses[:] = self.state.eval_losses
        self.state.eval_losses = self.eval_losses
        plan.count_flops = self.flops_counter()
        check_same_start(self.ranks, [p for p in self.weights.values() if not is_sharded(p)],
                         self.state.rows)
        if self.ranks.main:
            prepare_output(self.config, self.resume, self.weights)
            write_json(self.output / "train_config.json", self.settings)
            if setup.lora and setup.lora.pissa and not self.resume:
                save_pissa_start(model, self.output / "pissa_init", setup.lora,
                                 self.base.name)
        trackers = []
        if self.ranks.main:
            trackers = open_trackers(self.config, self.settings, self.first_step)
        self.log = RunLog(self.output, plan.total_steps, self.first_step, history,
                          disabled=bool(self.config.disable_tqdm), writes=self.ranks.main,
                          trackers=trackers)
        if self.ranks.processes > 1:
            from scale.heartbeat import Heartbeat       # only where there are others

            self.heartbeat = Heartbeat(self.ranks)
        self.loop_start = time.monotonic()
        self.pace = Pace()
        self.stop_signals = StopSignals(self.config.time_limit, self.start_time)
        profile_folder = self.output if self.config.profile and self.ranks.main else None
        self.profile = StepProfile(profile_folder, setup.device)
        if self.asks() and self.state.step == 0:
            self.state.answers = answers_to(model, self.config, self.text, precision)

    def asks(self) -> bool:
        """Whether this rank puts the questions of the config; no rank alone has sharded weights."""
        return bool(self.config.ask) and self.ranks.main and not self.setup.sharded

    def restore(self) -> list:
        """Optimizer, random generators and state of the checkpoint; returns its log_history.

        Raises ValueError if this run has other rows or other steps, or ended before.
        """
        saved = load_training_state(self.resume, self.optimizer, self.optimizer_names,
                                    self.ranks.rank, self.gradients.state_parts(),
                                    self.optimizer.put)
        if not saved.get("resume") or "log_history" not in saved:
            raise ValueError(f"{self.resume / 'trainer_state.json'} lacks the fields resume and "
                             "log_history: this is no checkpoint of a run of this program")
        check_rows(self.resume, saved["resume"], self.state.rows, self.config.force_resume)
        rows = self.state.rows
        decided = {name: getattr(self.state, name) for name in DECIDED}
        planned = self.state.rows_per_step
        self.state.update(saved["resume"])
        self.state.rows = rows
        for name, value in decided.items():             # setup has looked at what was recorded
            setattr(self.state, name, value)
        self.check_position(planned)
        self.precision.load_state(self.state.loss_scale)
        self.objective.load_state(self.state.objective)
        self.state.best = self.ranks.from_main(lambda: usable_best(self.output, self.state.best))
        print(f"resumed from {self.resume}, step {self.state.step} of {self.plan.total_steps}",
              flush=True)
        return saved["log_history"]

    def check_position(self, planned_rows: int):
        """Raises ValueError where the checkpoint's steps do not continue in this run."""
        saved_rows = self.state.rows_per_step
        if saved_rows != planned_rows:
            unit, key = "rows", "per_device_train_batch_size"
            if self.config.token_budget:
                unit, key = "tokens", "token_budget"
            raise ValueError(
                f"{self.resume} was written with {saved_rows} {unit} a step, and this run takes "
                f"{planned_rows}: with {self.ranks.world} ranks, change "
                f"gradient_accumulation_steps or {key} so that the product is the same")
        if self.state.step > self.plan.total_steps:
            raise ValueError(
                f"{self.resume} is at step {self.state.step}, and this run ends at step "
                f"{self.plan.total_steps}: raise max_steps or num_train_epochs, or resume from an "
                "earlier checkpoint")

    def flops_counter(self):
        """A function batch -> model FLOPs, of training and of asking the reference."""
        frozen, trained = matmul_parameters(self.model)
        reference = 0
        if self.objective.reference is not None:
            reference = sum(matmul_parameters(self.objective.reference))
        elif self.config.has_reference:
            reference = frozen
        return partial(flops_of_batch, self.base.model_config, frozen, trained, reference)

    def leave_ranks(self):
        """Leave the process group when all ranks do; then the others need no beats of this one."""
        end_ranks()
        if self.heartbeat:
            self.heartbeat.stop()

    def end_dry_run(self):
        end_ranks()
        print("\ndry_run: nothing was loaded, nothing written")

    # ---- a step

    def early_stop_due(self) -> bool:
        """Whether early_stopping_steps evaluations have passed without a lower eval_loss."""
        limit = self.config.early_stopping_steps
        waited = self.state.evals_without_gain
        if not limit or waited < limit:
            return False
        tqdm.write(f"{self.state.step:>7} stopped early: eval_loss has not improved for {waited} "
                   "evaluations")
        return True

    def begin_step(self, step: Step):
        """Start the clock of a step, and the profile where it is due."""
        self.profile.step(step.number - self.first_step, self.plan.total_steps - self.first_step)
        self.pace.begin()

    def stop_requested(self) -> bool:
        """Whether a signal or the time limit asks to stop after this step."""
        self.stop_reason = self.stop_signals.reason()
        return bool(self.stop_reason)

    def accept(self, step: Step, loss: float, grad_norm: float, precision) -> bool:
        """Whether the optimizer may take this step: loss and gradients are finite.

        Raises ValueError after MAX_SKIPPED steps in a row that are not.
        """
        overflowed = precision.overflowed(grad_norm)
        self.step_is_finite = math.isfinite(loss) and (math.isfinite(grad_norm) or overflowed)
        if self.step_is_finite:
            self.skipped_in_a_row = 0
            if overflowed:
                tqdm.write(f"{step.number:>7} gradients overflowed in float16; step skipped, loss "
                           f"scale now {precision.loss_scale.value:g}")
            return not overflowed
        self.skipped_in_a_row += 1
        where = ", on rank 0" if self.ranks.world > 1 else ""
        tqdm.write(f"{step.number:>7} skipped: loss {loss}, gradient norm {grad_norm}; nothing is "
                   f"trained on it. Rows of this step{where}: {step.rows}")
        if self.skipped_in_a_row == MAX_SKIPPED:
            lr = self.optimizer.param_groups[0]["lr"]
            raise ValueError(
                f"step {step.number}: loss {loss}, gradient norm {grad_norm}, for the "
                f"{MAX_SKIPPED}rd time in a row. Nothing was trained on these steps and the "
                f"checkpoints in {self.output} are intact. A lower learning_rate (now {lr:.2e}), "
                "or bf16 instead of fp16, usually helps")
        return False

    def log_step(self, step: Step, loss: float, grad_norm: float, lr: float, metrics: dict):
        """Count the step, and log a line where it is due."""
        state, number = self.state, step.number
        tokens, flops = step.tokens, step.flops
        if self.objective.step_tokens is not None:      # sampled answers: their FLOPs are unknown
            tokens, flops = self.objective.step_tokens, math.nan
        self.pace.end(tokens, flops)
        state.step = number
        state.epoch = step.epoch
        state.tokens_seen += int(tokens)
        if self.step_is_finite:
            state.loss_total += loss
            state.window = [state.window[0] + loss, state.window[1] + 1]
            for name, (total, weight) in metrics.items():
                before = state.window_metrics.get(name, (0.0, 0.0))
                state.window_metrics[name] = [total + before[0], weight + before[1]]
        else:
            state.skipped += 1
        speed = self.pace.tokens_per_second
        self.log.advance(loss, lr, speed)
        if self.log_due(number):
            total, steps = state.window
            mean = total / steps if steps else math.nan
            self.log.train(number, step.epoch, mean, lr, grad_norm, speed, state.tokens_seen,
                           metric_means(state.window_metrics), peak_memory(self.device))
            state.window = [0.0, 0]
            state.window_metrics = {}
            self.pace.new_window()

    def log_due(self, number: int) -> bool:
        """Whether a line is logged after this step."""
        if number == 1 and self.config.logging_first_step:
            return True
        if self.config.logging_strategy == "steps":
            return number % self.plan.in_steps(self.config.logging_steps) == 0
        return self.config.logging_strategy == "epoch" and self.plan.ends_epoch(number)

    # ---- evaluation and checkpoints

    def eval_due(self, step: Step, eval_set) -> bool:
        """Whether the model is evaluated after this step."""
        if not eval_set:
            return False
        delay = self.config.eval_delay
        if self.config.eval_strategy == "steps":
            every = self.plan.in_steps(self.config.eval_steps)
            return step.number % every == 0 and step.number >= delay * self.plan.unit
        at_end = self.plan.ends_epoch(step.number) and step.epoch >= delay
        return self.config.eval_strategy == "epoch" and at_end

    def eval_on_start(self, score: Callable):
        """Log the metrics of score() before the first step, where the config asks for it."""
        if self.config.eval_on_start and self.state.step == 0:
            self.log.eval(0, 0.0, score())

    def save_due(self, step: Step) -> bool:
        """Whether a checkpoint is saved after this step."""
        number = step.number
        if self.config.save_strategy == "best":
            return self.lowest_at == number
        if self.config.save_strategy == "steps":
            every = self.plan.in_steps(self.config.save_steps)
            return number % every == 0 or number == self.plan.total_steps
        return self.config.save_strategy == "epoch" and self.plan.ends_epoch(number)

    def log_eval(self, step: Step, metrics: dict):
        """Log an evaluation, and note whether it is the lowest eval_loss so far."""
        state = self.state
        self.log.eval(step.number, step.epoch, metrics)
        if self.config.eval_on_each_dataset:        # no loss of them all decides anything
            return
        eval_loss = metrics["eval_loss"]
        state.eval_losses.append(eval_loss)
        if state.lowest_eval_loss is None or eval_loss < state.lowest_eval_loss:
            state.lowest_eval_loss = eval_loss
            state.evals_without_gain = 0
            self.lowest_at = step.number
        else:
            state.evals_without_gain += 1
        if self.save_due(step) and (state.best is None or eval_loss < state.best[1]):
            state.best = [step.number, eval_loss]

    def save_checkpoint(self, step: Step, resumable: bool = False):
        """Write output_dir/checkpoint-N, whole or not at all, on all ranks.

        resumable: with optimizer state even where save_only_model leaves it out.
        """
        self.check_finite()
        with_state = resumable or not self.config.save_only_model
        rng = {}
        for device, state in rng_state().items():
            for rank, theirs in enumerate(self.ranks.gather(state)):
                rng[f"{device}.{rank}"] = theirs
        self.state.objective = self.objective.state()
        if not self.ranks.main:
            self.gradients.join_save(self.model, self.optimizer if with_state else None,
                                     self.optimizer_names)
            return
        name = f"checkpoint-{step.number}"
        needed = full_bytes(self.weights.values()) * (3 if with_state else 1)
        check_disk_space(self.output, needed, name)
        self.state.loss_scale = self.precision.state()
        with new_folder(self.output / name) as folder:
            self.save_weights(folder)
            if with_state:
                state = trainer_state(self.config, self.log, step.number, step.epoch,
                                      resume=self.state.to_json())
                save_training_state(folder, self.optimizer, self.optimizer_names, state, rng,
                                    self.gradients.full_tensor, self.gradients.state_fields)
            write_checksums(folder)
        remove_old_checkpoints(self.config, self.output, self.state.best)

    def save_weights(self, folder: Path, dtype: torch.dtype | None = None):
        """The adapter or the whole model, the objective's weights, the tokenizer, the settings.

        dtype: None writes each weight as it is held, which resuming needs.
        """
        if self.setup.lora:
            save_adapter(self.model, folder, self.setup.lora, self.base.name)
        else:
            save_model(self.model, folder, self.base.folder, dtype)
        if self.objective.parameters():
            save_value_head(folder, self.objective.parameters())
        self.tokenizer.save(folder)
        write_json(Path(folder) / "train_config.json", self.settings)

    def leave(self, step: Step):
        """End a run that was asked to stop, after its checkpoint. Raises SystemExit."""
        reason = self.stop_reason or "another rank"
        if self.ranks.main:
            record_stop(self.output, reason)
        self.log.close()
        self.optimizer.close()
        self.leave_ranks()
        print(f"\nstopped by {reason} after step {step.number} of {self.plan.total_steps}, which "
              "is saved. To continue: resume_from_checkpoint: true",
              file=sys.stderr if self.ranks.main else sys.stdout, flush=True)
        raise SystemExit(STOPPED)

    # ---- the end

    def end_loop(self):
        """Close the log, and load the best weights where load_best_model_at_end asks for it."""
        self.stop_signals.restore()
        self.optimizer.close()
        self.profile.finish()
        self.seconds = time.monotonic() - self.loop_start
        self.log.write(self.state.step, self.state.epoch)
        self.log.close()
        if self.config.load_best_model_at_end:
            best = self.ranks.from_main(lambda: usable_best(self.output, self.state.best))
            if best:
                self.load_best(best)
        state = self.state
        if state.skipped and state.skipped == state.step:
            raise ValueError(
                f"none of the {state.step} steps had a finite loss and gradient, so nothing was "
                f"trained and nothing is saved. Does {self.base.folder} hold NaN, or is the dtype "
                "too narrow (bf16 instead of fp16)?")
        self.check_finite()

    @torch.no_grad()
    def check_finite(self):
        """Raises ValueError, on all ranks, if weights hold NaN or infinity: they are not saved."""
        weights = self.weights
        if not self.setup.lora:
            weights = dict(self.model.named_parameters()) | self.weights
        bad = [name for name, p in weights.items() if not is_finite(p)]
        if not self.ranks.total(len(bad))[0]:
            return
        where = f", such as {bad[0]}" if bad else ", on another rank"
        good = [path.name for path in checkpoints_in(self.output, resumable=False)]
        kept = f"The last good checkpoint is {good[-1]}" if good else "There is no checkpoint yet"
        lr = self.optimizer.param_groups[0]["lr"]
        raise ValueError(
            f"after step {self.state.step} weights are not finite (NaN or infinity){where}: they "
            f"are not saved. {kept}. A lower learning_rate (now {lr:.2e}) usually helps")

    @torch.no_grad()
    def load_best(self, best: list):
        """Put the weights of the best checkpoint, [step, eval_loss], back on all ranks."""
        folder = self.output / f"checkpoint-{best[0]}"
        if self.gradients.sharded:
            self.ranks.total(0)                         # rank 0 has written it by now
            self.gradients.reload(self.model, folder)
        elif self.ranks.main:
            self.read_weights(folder)
        if self.ranks.main:
            read_value_head(folder, self.objective.parameters())
        if not self.gradients.sharded:
            self.ranks.broadcast(self.weights.values())
        print(f"load_best_model_at_end: step {best[0]} with eval_loss {best[1]:.4f}")

    def read_weights(self, folder: Path):
        """Copy the weights of one of this run's checkpoints into the model."""
        if self.setup.lora:
            reload_adapter(self.model, folder)
        else:
            saved = load_model(folder, torch.float32)
            for p, q in zip(self.model.parameters(), saved.parameters()):
                p.copy_(q)

    def finish(self, argv: list[str]):
        """Save the final weights and the results; eval.py takes over where do_predict asks."""
        results = {"train": self.train_results()}
        self.log.history.append(results["train"] | {"step": self.state.step})
        if self.final_eval:
            results["eval"] = {"epoch": self.state.epoch, **self.final_eval}
        if not self.gradients.sharded:
            self.leave_ranks()                          # the others have nothing left to do
        elif not self.ranks.main:
            self.gradients.join_save(self.model, None, [])
        if not self.ranks.main:
            self.leave_ranks()
            return
        self.save_final()
        self.leave_ranks()
        results["speed"] = speed_results(self.pace, self.setup.device, self.setup.dtype,
                                         self.ranks.processes, self.setup.kernels.matmul)
        state = trainer_state(self.config, self.log, self.state.step, self.state.epoch)
        write_json(self.output / "trainer_state.json", state)
        self.write_results(results)
        if self.asks():
            after = answers_to(self.model, self.config, self.text, self.precision)
            before = self.state.answers
            if len(before) != len(after):           # resumed with other questions
                before = ["(not asked at the start)"] * len(after)
            print_before_after(self.config.ask, before, after)
        print(f"\nsaved to {self.output}. Next: {chat_command(argv)}", flush=True)
        if self.config.do_predict:
            self.start_predictions(argv)

    def train_results(self) -> dict:
        """train_results.json, with LLaMA-Factory's names; seconds include evaluation and saving."""
        state = self.state
        if state.skipped:
            print(f"\n{state.skipped} steps were skipped because their loss or gradient was not "
                  "finite; train_loss is the mean of the others")
        steps = state.step - self.first_step
        seconds = max(self.seconds, 1e-9)
        rows = steps / self.plan.steps_per_epoch * len(self.plan.train_set)
        return {
            "epoch": state.epoch,
            "total_flos": total_flos(self.model, state.tokens_seen),
            "train_loss": state.loss_total / max(state.step - state.skipped, 1),
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(rows / seconds, 3),
            "train_steps_per_second": round(steps / seconds, 3),
        }

    def save_final(self):
        """The final weights, into output_dir."""
        # also where the run was killed just before it could do this
        remove_old_checkpoints(self.config, self.output, self.state.best)
        dtype = self.setup.dtype if self.config.finetuning_type == "freeze" else None
        with into_folder(self.output) as folder:
            self.save_weights(folder, dtype)
        if self.config.pissa_convert:
            converted = self.output / "pissa_converted"
            save_converted(self.model, converted, self.setup.lora, self.base.name)
            write_json(converted / "train_config.json", self.settings)
        if self.setup.lora and self.config.adapter_prefix == "served":
            from runtime.adapter_export import write_adapter        # only where it is asked for

            write_adapter(self.base.folder, self.output, self.output / "served", "served")

    def write_results(self, results: dict):
        """Print the results and write them: *_results.json, the model card, the loss curve."""
        for name, values in results.items():
            write_json(self.output / f"{name}_results.json", values)
            print_pairs(f"{name} results", values)
        everything = {**results["train"], **results.get("eval", {})}
        card = model_card(self.config, everything, self.template, self.notes_on_loading(),
                          license_of(self.base.folder))
        (self.output / "README.md").write_text(card, encoding="utf-8")
        if self.config.plot_loss:
            pictures = plot_losses(self.output, self.log.history)
            losses = [row["loss"] for row in self.log.history if "loss" in row]
            if not pictures and (curve := sketch(losses)):
                print(f"\nloss of the logged steps\n{curve}")
        # the last file: it says that the run has come to its end
        write_json(self.output / "all_results.json", everything)

    def notes_on_loading(self) -> list[str]:
        """What the README of an adapter says about loading it elsewhere; warnings are printed."""
        if not self.setup.lora:
            return []
        if differs := why_peft_differs(self.model, self.setup.lora):
            print(f"warning   {differs}")
        notes = notes_on_peft(self.model, self.setup.lora, converted=self.config.pissa_convert)
        if fields := scaled_fields(self.base.folder):
            notes.append("It was trained with `rope_scaling`: its base needs "
                         f"`{json.dumps(fields)}` in its config.json (merge.py writes that).")
        return notes

    def start_predictions(self, argv: list[str]):
        """Replace this process, so that its memory is free, by eval.py."""
        script = Path(__file__).parent.parent / "eval.py"
        command = [sys.executable, str(script), *map(str, argv)]
        if self.setup.lora and self.config.adapter_name_or_path:
            result = ",".join([*folded_under(self.output), str(self.output)])
            command.append(f"adapter_name_or_path={result}")
        for name in ("RANK", "WORLD_SIZE"):     # the other ranks have ended: none shares the rows
            os.environ.pop(name, None)
        os.execv(sys.executable, command)


def is_finite(weight: torch.Tensor) -> bool:
    """Whether all of this rank's numbers of a weight are finite."""
    local = local_tensor(weight)
    if local.is_meta:                                   # another process holds it
        return True
    return not local.is_floating_point() or bool(torch.isfinite(local).all())
