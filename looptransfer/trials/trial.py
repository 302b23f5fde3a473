"""One training run: a rule, a loop count, an LR and a seed in, a held-out loss out."""

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from looptransfer.errors import InputError
from looptransfer.optim import param_groups
from looptransfer.rewrite.parametrize import apply_plan, parametrize, remove
from looptransfer.rewrite.plan import ScalingPlan, planned
from looptransfer.rewrite.planner import VARIES
from looptransfer.rules import Rule
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.hooks import batch_stream, fresh_model, held_out_loss, loss_of, seeded
from looptransfer.user_code import calls_back, place, user_code

HOPELESS = 20  # steps whose mean loss may not lie above the loss at initialisation


@dataclass(frozen=True, order=True)
class Run:
    """The coordinates of a training run. `lr` is the absolute base LR."""

    rule: Rule
    loops: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run came to. A diverged run has loss inf, the steps it lasted, and the last finite training loss."""

    layers: int
    width: int | None
    steps: int
    loss: float
    diverged: bool
    seconds: float
    last_loss: float


class Training:
    """A run as it goes: its model, rewritten, its batches and its optimizer. Random states are seeded by the caller.

    Raises:
        InputError: the experiment's functions fail or give what cannot be trained; or as `rewrite`.
    """

    def __init__(self, experiment: Experiment, run: Run) -> None:
        self.experiment = experiment
        self.model = fresh_model(experiment.make_model, run.loops)
        self.stream = batch_stream(experiment.batches, run.seed, experiment.steps)
        self.batch = next(self.stream)
        self.plan = rewrite(experiment, self.model, self.batch[0], run.loops, run.rule)
        decay = experiment.weight_decay
        groups = param_groups(
            self.model, torch.optim.AdamW, lr=run.lr, weight_decay=decay, on_stream=experiment.on_stream
        )
        self.optimizer = torch.optim.AdamW(groups, betas=experiment.betas)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_share(step, experiment))

    def loss(self) -> float:
        """The training loss on the batch of this step."""
        self.value, number = loss_of(self.experiment.loss, self.model, self.batch, self.experiment.make_model)
        return number

    def update(self) -> None:
        """An optimizer step on that loss, and the next batch."""
        with user_code("the training step fails", self.experiment.loss, self.experiment.make_model):
            self.optimizer.zero_grad()
            self.value.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.experiment.clip)
            self.optimizer.step()
        self.schedule.step()
        self.batch = next(self.stream, self.batch)


def train(experiment: Experiment, run: Run) -> Outcome:
    """Train once. The run ends early when the loss is no number, or for 20 steps no better than at initialisation.

    The early end is what keeps hopeless LRs cheap; the result says diverged and stays in the table as data.

    Raises:
        InputError: as `Training`.
    """
    started = time.perf_counter()
    recent: deque[float] = deque(maxlen=HOPELESS)
    first = last = math.nan
    with seeded(run.seed):
        training = Training(experiment, run)
        layers = training.plan.layers
        for step in range(experiment.steps):
            value = training.loss()
            recent.append(value)
            first = value if step == 0 else first
            lost = len(recent) == HOPELESS and sum(recent) / HOPELESS > first
            if not math.isfinite(value) or lost:
                return Outcome(layers, experiment.width, step, math.inf, True, time.perf_counter() - started, last)
            last = value
            training.update()
        loss_at_end = held_out_loss(experiment, training.model)
    diverged = not math.isfinite(loss_at_end)
    seconds = time.perf_counter() - started
    return Outcome(
        layers, experiment.width, experiment.steps, math.inf if diverged else loss_at_end, diverged, seconds, last
    )


def lr_share(step: int, experiment: Experiment) -> float:
    """The share of the LR at a step: linear up over the warm-up, then linear down to zero at the end."""
    rise = min(experiment.steps - 1, max(1, round(experiment.warmup * experiment.steps)))
    return min((step + 1) / rise, (experiment.steps - step) / (experiment.steps - rise))


def rewrite(experiment: Experiment, model: nn.Module, inputs: Any, loops: int, rule: Rule) -> ScalingPlan:
    """Put `rule` into a fresh model, as the experiment says; one that make_model rewrote keeps its plan.

    Raises:
        InputError: as `parametrize`; or the loop count varies from forward to forward and no mean is given, or the
            model was rewritten with another λ or base depth than the experiment's.
    """
    plan = own_plan(model)
    if plan is None:
        with user_code(f"loops({loops}) fails", experiment.loops):
            mean = None if experiment.loops is None else experiment.loops(loops)
        with calls_back(f"the rewriting of make_model({loops}) fails", experiment.make_model):
            plan = parametrize(
                model,
                inputs,
                rule,
                experiment.lam,
                experiment.base_layers,
                branches=experiment.branches,
                layers=experiment.layers,
                loops=mean,
            )
    elif (plan.lam, plan.base_layers) != (experiment.lam, experiment.base_layers):
        raise InputError(
            f"make_model({loops}) rewrote the model with lam={plan.lam:g}, base_layers={plan.base_layers}, and the "
            f"experiment says lam={experiment.lam:g}, base_layers={experiment.base_layers}"
            f"{place(experiment.make_model)}; give it the same"
        )
    else:
        plan = exchanged(model, plan, rule)
    if varies(plan) and not plan.random_loops:
        raise InputError(
            f"the model of make_model({loops}) loops another number of times from one forward to the next"
            f"{place(experiment.make_model)}, so N = {loops} would not say what is trained. Where it is drawn at "
            "random, give its mean: Experiment(…, loops=float) if that is N, else a function of N"
        )
    return plan


def own_plan(model: nn.Module) -> ScalingPlan | None:
    """The plan of a model that is rewritten already."""
    try:
        return planned(model)[1]
    except InputError:
        return None


def exchanged(model: nn.Module, plan: ScalingPlan, rule: Rule) -> ScalingPlan:
    """The plan of a rewritten model, after its multipliers were exchanged for those of `rule`."""
    if plan.rule == rule:
        return plan
    plan = plan.under(rule)
    remove(model)
    apply_plan(model, plan)
    return plan


def varies(plan: ScalingPlan) -> bool:
    """Other weights and random numbers gave other visits, as the plan's proof has seen."""
    return VARIES in plan.caveats
