"""The built-in training loop: a run in, a held-out loss out. Stopped in between, it goes on from its checkpoint."""

import io
import math
import random
import sys
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import pstdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from looptransfer.errors import InputError, UserCodeError
from looptransfer.files import write_file
from looptransfer.optim import param_groups
from looptransfer.rewrite.caveats import VARIES
from looptransfer.rewrite.fold import remove
from looptransfer.rewrite.parametrize import apply_plan, parametrize
from looptransfer.rewrite.plan import ScalingPlan, planned
from looptransfer.rules import Rule
from looptransfer.trials.batches import digest
from looptransfer.trials.hooks import (
    autocast,
    batch_stream,
    fresh_model,
    held_out_loss,
    loss_of,
    on_device,
    one_thread,
    seeded,
)
from looptransfer.trials.run import Outcome, Trial
from looptransfer.user_code import calls_back, place, user_code

if TYPE_CHECKING:
    from looptransfer.trials.experiment import Experiment

HOPELESS = 20  # steps whose mean loss may not lie above the loss at initialisation
CLEARLY = 4.0  # standard deviations of those losses, while the LR rises: a slow start is no divergence
CHECKPOINT = "checkpoint.pt"
CHECKPOINT_EVERY = 60.0  # seconds


class Training:
    """A run as it goes: its model, rewritten, its batches and its optimizers. Random states are seeded by the caller.

    Raises:
        InputError: the experiment's functions fail or give what cannot be trained; or as `rewrite`.
    """

    def __init__(self, experiment: "Experiment", trial: Trial) -> None:
        self.experiment, self.trial, self.step = experiment, trial, 0
        self.model = fresh_model(experiment.make_model, trial.loops)
        with user_code(f"the model cannot be moved to {trial.device}", experiment.make_model):
            self.model.to(trial.device)
        self.stream = batch_stream(experiment.batches, trial.seed, experiment.steps)
        self.batch = on_device(next(self.stream), trial.device, experiment.batches)
        self.plan = rewrite(experiment, self.model, self.batch[0], trial.loops, trial.rule)
        self.optimizers = optimizers_of(experiment, self.model, trial.lr)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.base_lrs = [(group, float(group["lr"])) for group in groups]

    def loss(self) -> float:
        """The training loss on the batch of this step."""
        with autocast(self.experiment.autocast, self.trial.device):
            self.value, number = loss_of(self.experiment.loss, self.model, self.batch, self.experiment.make_model)
        return number

    def update(self) -> None:
        """An optimizer step on that loss, and the next batch."""
        experiment = self.experiment
        share = self._share(self.step)
        for group, lr in self.base_lrs:
            group["lr"] = lr * share
        with user_code("the training step fails", experiment.optimizer, experiment.loss, experiment.make_model):
            self.model.zero_grad()
            self.value.backward()
            if experiment.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), experiment.clip)
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        self.next_batch()

    @property
    def lr_rises(self) -> bool:
        """The LR of this step is above that of the last one."""
        return self.step > 0 and self._share(self.step) > self._share(self.step - 1)

    def _share(self, step: int) -> float:
        experiment = self.experiment
        with user_code(f"schedule({step}, {experiment.steps}) fails", experiment.schedule):
            return experiment.lr_share(step)

    def next_batch(self) -> None:
        """Draw the batch of the next step; the last one stays."""
        batch = next(self.stream, None)
        if batch is not None:
            self.batch = on_device(batch, self.trial.device, self.experiment.batches)

    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on, as tensors, numbers and text."""
        kind, keys, *rest = np.random.get_state()
        return {
            "step": self.step,
            "batch": digest([self.batch]),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "python": random.getstate(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where a state was taken.

        Raises:
            InputError: the batches up to there are others.
        """
        for _ in range(state["step"]):
            self.next_batch()
        if digest([self.batch]) != state["batch"]:
            raise InputError("batches gives other batches now")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.base_lrs = [(group, lr) for group, (_, lr) in zip(groups, self.base_lrs, strict=True)]
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        random.setstate(state["python"])


def train(experiment: "Experiment", trial: Trial) -> Outcome:
    """Train once. The run ends early when the loss is no number, or for 20 steps no better than at initialisation,
    clearly worse while the LR still rises.

    The early end is what keeps hopeless LRs cheap; the result says diverged and stays in the table as data. Once a
    minute a checkpoint is written into the run's directory. Where there is one, training goes on from it, on a CPU
    to the very same result; one that does not fit is told and left aside.

    Raises:
        InputError: as `Training`.
    """
    path = trial.directory / CHECKPOINT
    checkpoint = _read_checkpoint(path)
    try:
        outcome = _train(experiment, trial, path, checkpoint)
    except _OtherRunError as error:
        print(f"looptransfer: training from the start: {path} does not fit: {error}", file=sys.stderr)
        outcome = _train(experiment, trial, path, None)
    path.unlink(missing_ok=True)
    return outcome


class _OtherRunError(Exception):
    """A checkpoint is not of this training."""


def _train(experiment: "Experiment", trial: Trial, path: Path, checkpoint: dict[str, Any] | None) -> Outcome:
    started = saved = time.perf_counter()
    recent: deque[float] = deque(maxlen=HOPELESS)
    first = last = math.nan
    with threads_of(trial), seeded(trial.seed):
        training = Training(experiment, trial)
        if checkpoint is not None:
            try:
                training.restore(checkpoint)
                recent.extend(checkpoint["recent"])
                first, last = checkpoint["first"], checkpoint["last"]
                started -= checkpoint["seconds"]
            except Exception as error:
                raise _OtherRunError(" ".join(str(error).split())[:200]) from error

        def outcome(loss: float, steps: int) -> Outcome:
            seconds, lost = time.perf_counter() - started, not math.isfinite(loss)
            return Outcome(
                training.plan.layers, experiment.width, steps, math.inf if lost else loss, lost, seconds, last
            )

        for step in range(training.step, experiment.steps):
            value = training.loss()
            recent.append(value)
            first = value if step == 0 else first
            if experiment.log is not None:
                with user_code(f"log(run, {step}, {value:g}) fails", experiment.log):
                    experiment.log(trial, step, value)
            if not math.isfinite(value) or _is_hopeless(recent, first, training):
                return outcome(math.inf, step)
            last = value
            training.update()
            if time.perf_counter() - saved >= CHECKPOINT_EVERY:
                seconds = time.perf_counter() - started
                progress = {"recent": list(recent), "first": first, "last": last, "seconds": seconds}
                _write_checkpoint(path, training.state() | progress)
                saved = time.perf_counter()
        return outcome(held_out_loss(experiment, training.model, trial.device), experiment.steps)


def _is_hopeless(recent: Collection[float], first: float, training: Training) -> bool:
    """The recent losses lie above the first one; clearly above while the LR still rises, as training just began."""
    if len(recent) < HOPELESS:
        return False
    excess = math.fsum(recent) / HOPELESS - first
    return excess > 0 and (excess > CLEARLY * pstdev(recent) or not training.lr_rises)


def _write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    data = io.BytesIO()
    torch.save(state, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data.getvalue())


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint, if there is one that can be read; never unpickled."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        print(f"looptransfer: {path} cannot be read ({type(error).__name__}), so it is left aside", file=sys.stderr)
        return None
    return state if isinstance(state, dict) else None


def threads_of(trial: Trial) -> AbstractContextManager[None]:
    """One thread on a CPU, where a small model is slower with more and sums come out the same; else torch's own."""
    return one_thread() if trial.device == "cpu" else nullcontext()


def optimizers_of(experiment: "Experiment", model: nn.Module, lr: float) -> Sequence[torch.optim.Optimizer]:
    """The experiment's own optimizers, or AdamW.

    Raises:
        InputError: the function fails, or gives something else.
    """
    if experiment.optimizer is None:
        decay, stream = experiment.weight_decay, experiment.on_stream
        groups = param_groups(model, torch.optim.AdamW, lr=lr, weight_decay=decay, on_stream=stream)
        return [torch.optim.AdamW(groups, betas=experiment.betas)]
    with user_code(f"optimizer(model, {lr:g}) fails", experiment.optimizer):
        given = experiment.optimizer(model, lr)
    optimizers: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    if not optimizers or not all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in optimizers):
        raise UserCodeError(
            f"optimizer(model, {lr:g}) gives {str(given)[:100]}{place(experiment.optimizer)}; it must return a "
            "torch.optim.Optimizer, or a list of them"
        )
    return optimizers


def rewrite(experiment: "Experiment", model: nn.Module, inputs: Any, loops: int, rule: Rule) -> ScalingPlan:
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
            plan = parametrized(experiment, model, inputs, rule, mean)
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


def parametrized(
    experiment: "Experiment", model: nn.Module, inputs: Any, rule: Rule, loops: float | None = None
) -> ScalingPlan:
    """The plan of a fresh model, after it was rewritten as the experiment says; raises as `parametrize`."""
    lam, base_layers = experiment.lam, experiment.base_layers
    branches, layers = experiment.branches, experiment.layers
    return parametrize(model, inputs, rule, lam, base_layers, branches=branches, layers=layers, loops=loops)


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
