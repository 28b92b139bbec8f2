"""Learning rates that follow the evaluations: reduce_lr_on_plateau and greedy.

    factor = eval_schedule(config, eval_losses)         # eval_losses: a list that grows
    set_lr(optimizer, factor(step))                     # {rate of a group: its factor}

reduce_lr_on_plateau lowers the rate when the loss has stopped falling. greedy also raises it while
the loss falls, between min_lr and max_lr, and starts over when it has been refused at the floor
often enough. Both are computed from the losses of all evaluations, which a checkpoint keeps, so a
resumed run has the rates of an uninterrupted one.

Requires: optim.py.
Next: runtime/build.py (build_schedule).
Paper: GreedyLR arXiv:2512.14527 (algorithm 1; its settings and their defaults are those of
transformers 5.24). reduce_lr_on_plateau is torch's ReduceLROnPlateau.
"""
import math
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from optim import check_schedule_kwargs

PLATEAU = {
    "mode": "min", "factor": 0.1, "patience": 10, "threshold": 1e-4, "threshold_mode": "rel",
    "cooldown": 0, "min_lr": 0.0, "eps": 1e-8,
}
GREEDY = {
    "mode": "min", "factor": 0.95, "patience": 10, "threshold": 1e-6, "threshold_mode": "abs",
    "cooldown": 0, "warmup": 0, "min_lr": 1e-3, "max_lr": 1.0, "eps": 1e-8, "verbose": False,
    "smooth": False, "window_size": 50, "reset_start": 500,
}


class EvalSchedule:
    """What both have in common: the best loss so far, and one rate for each base rate.

    settings: the lr_scheduler_kwargs, over the defaults. rates: of the groups. step(loss) takes one
    evaluation.
    """

    def __init__(self, settings: dict, rates: list[float]):
        self.settings = settings
        self.rates = {rate: rate for rate in rates}
        self.sign = -1 if settings["mode"] == "max" else 1
        self.best = math.inf                    # of sign * loss
        self.bad = 0                            # evaluations since then
        self.cooldown = 0                       # evaluations that are not looked at

    def is_better(self, loss: float) -> bool:
        """Whether sign * loss is below the best by the threshold."""
        margin = self.settings["threshold"]
        if self.settings["threshold_mode"] == "rel" and self.best != math.inf:
            margin *= self.sign * self.best
        return loss < self.best - margin

    def factors(self) -> dict[float, float]:
        return {base: rate / base for base, rate in self.rates.items()}


class Plateau(EvalSchedule):
    """reduce_lr_on_plateau, as torch's ReduceLROnPlateau."""

    def step(self, loss: float):
        loss *= self.sign
        if self.is_better(loss):
            self.best = loss
            self.bad = 0
        else:
            self.bad += 1
        if self.cooldown:
            self.cooldown -= 1
            self.bad = 0
        if self.bad > self.settings["patience"]:
            self.lower()
            self.cooldown = self.settings["cooldown"]
            self.bad = 0

    def lower(self):
        for base, rate in self.rates.items():
            lower = max(rate * self.settings["factor"], self.settings["min_lr"])
            if rate - lower > self.settings["eps"]:
                self.rates[base] = lower


class Greedy(EvalSchedule):
    """greedy, as transformers' GreedyLR."""

    def __init__(self, settings: dict, rates: list[float]):
        super().__init__(settings, rates)
        self.start_over()

    def start_over(self):
        self.rates = {base: base for base in self.rates}
        self.best = math.inf
        self.bad = self.good = 0                # evaluations without, with, a gain; in a row
        self.cooldown = self.warmup = 0         # evaluations to pass over: lowered, raised
        self.until_reset = self.settings["reset_start"]
        self.window = deque()
        self.window_sum = 0.0

    def smoothed(self, loss: float) -> float:
        """The mean of the last window_size losses."""
        self.window.append(loss)
        self.window_sum += loss
        if len(self.window) > self.settings["window_size"]:
            self.window_sum -= self.window.popleft()
        return self.window_sum / len(self.window)

    def step(self, loss: float):
        if self.settings["smooth"]:
            loss = self.smoothed(loss)
        loss *= self.sign
        if self.cooldown or self.warmup:
            if self.cooldown:
                self.cooldown -= 1
            else:
                self.warmup -= 1
            self.bad = self.good = 0
            return
        if self.is_better(loss):
            self.best = loss
            self.good += 1
            self.bad = 0
        else:
            self.bad += 1
            self.good = 0
        if self.good > self.settings["patience"]:
            self.higher()
            self.good = 0
            self.warmup = self.settings["warmup"]
        elif self.bad > self.settings["patience"]:
            self.lower()
            self.bad = 0
            self.cooldown = self.settings["cooldown"]

    def higher(self):
        for base, rate in self.rates.items():
            higher = min(rate / self.settings["factor"], self.settings["max_lr"])
            if higher - rate > self.settings["eps"]:
                self.rates[base] = higher
        self.until_reset = self.settings["reset_start"]

    def lower(self):
        floor = self.settings["min_lr"]
        for base, rate in self.rates.items():
            lower = max(rate * self.settings["factor"], floor)
            if rate - lower > self.settings["eps"]:
                self.rates[base] = lower
        if all(rate <= floor for rate in self.rates.values()):
            self.until_reset -= 1
            if self.until_reset <= 0:
                self.start_over()


EVAL_SCHEDULES = {"reduce_lr_on_plateau": (Plateau, PLATEAU), "greedy": (Greedy, GREEDY)}


def eval_schedule(config, eval_losses: list) -> Callable[[int], dict]:
    """factors(step) -> {base rate of a group: factor}, from the evaluations before this step.

    Raises ValueError that names the key for an invalid argument.
    """
    kind = config.lr_scheduler_type
    schedule, defaults = EVAL_SCHEDULES[kind]
    kwargs = dict(config.lr_scheduler_kwargs or {})
    check_schedule_kwargs(kind, kwargs, list(defaults))
    settings = defaults | kwargs
    check_bounds(settings, config.learning_rate)
    rates = [config.learning_rate * ratio for ratio in (1, config.loraplus_lr_ratio or 1)]
    state = schedule(settings, rates)
    taken = None                                # evaluations so far; none are told of a resume

    def factors(step: int) -> dict[float, float]:
        nonlocal taken
        for number, loss in enumerate(eval_losses[taken or 0:], (taken or 0) + 1):
            before = state.rates.copy()
            state.step(loss)
            if settings.get("verbose") and taken is not None and state.rates != before:
                tqdm.write(f"evaluation {number}: the learning rate is now "
                           f"{state.rates[config.learning_rate]:.4e}")
        taken = len(eval_losses)
        return state.factors()

    return factors


def check_bounds(settings: dict, learning_rate: float):
    """Raises ValueError for settings that no rate can follow; prints what will never happen."""
    factor, low, high = (settings.get(name) for name in ("factor", "min_lr", "max_lr"))
    if not 0 < factor < 1:
        raise ValueError(f"lr_scheduler_kwargs: factor: {factor} must be above 0 and below 1")
    if settings.get("window_size", 1) < 1:
        raise ValueError("lr_scheduler_kwargs: window_size is a number of evaluations, 1 or more")
    if high is not None and high < low:
        raise ValueError(f"lr_scheduler_kwargs: max_lr: {high} is below min_lr: {low}")
    if learning_rate <= low:
        print(f"  note: learning_rate: {learning_rate} is not above min_lr: {low} (set it in "
              "lr_scheduler_kwargs): it will never be lowered below its start")
