"""One training run: a rule, a loop count, an LR and a seed in, a held-out loss out."""

import math
import time
from collections import deque
from dataclasses import dataclass

import torch

from looptransfer.errors import InputError
from looptransfer.optim import param_groups
from looptransfer.rewrite.parametrize import parametrize
from looptransfer.rules import Rule
from looptransfer.trials.experiment import Experiment

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


def train(experiment: Experiment, run: Run) -> Outcome:
    """Train once. The run ends early when the loss is no number, or for 20 steps no better than at initialisation.

    The early end is what keeps hopeless LRs cheap; the result says diverged and stays in the table as data.
    """
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    model = experiment.make_model(run.loops)
    batches = experiment.batches(run.seed)
    batch = next(batches)
    plan = parametrize(model, batch[0], run.rule, experiment.lam, experiment.base_layers)
    groups = param_groups(model, torch.optim.AdamW, lr=run.lr, weight_decay=experiment.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=experiment.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, experiment))
    recent: deque[float] = deque(maxlen=HOPELESS)
    first = last = math.nan
    for step in range(experiment.steps):
        if step:
            batch = next(batches, batch)
        loss = experiment.loss(model(batch[0]), batch[1])
        value = float(loss.detach())
        recent.append(value)
        first = value if step == 0 else first
        lost = len(recent) == HOPELESS and sum(recent) / HOPELESS > first
        if not math.isfinite(value) or lost:
            return Outcome(plan.layers, experiment.width, step, math.inf, True, time.perf_counter() - started, last)
        last = value
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), experiment.clip)
        optimizer.step()
        schedule.step()
    loss_at_end = held_out_loss(experiment, model)
    diverged = not math.isfinite(loss_at_end)
    seconds = time.perf_counter() - started
    return Outcome(
        plan.layers, experiment.width, experiment.steps, math.inf if diverged else loss_at_end, diverged, seconds, last
    )


def lr_share(step: int, experiment: Experiment) -> float:
    """The share of the LR at a step: linear up over the warm-up, then linear down to zero at the end."""
    rise = min(experiment.steps - 1, max(1, round(experiment.warmup * experiment.steps)))
    return min((step + 1) / rise, (experiment.steps - step) / (experiment.steps - rise))


def held_out_loss(experiment: Experiment, model: torch.nn.Module) -> float:
    """Mean loss in nats over the held-out batches, each counted alike."""
    model.eval()
    with torch.no_grad():
        losses = [float(experiment.loss(model(inputs), targets)) for inputs, targets in experiment.held_out()]
    if not losses:
        raise InputError("the experiment's held_out() gave no batch; it must give one or more")
    return sum(losses) / len(losses)
