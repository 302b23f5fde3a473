"""Checks before any training that a seed decides what it promises, and N the loop count.

All that is concluded from a sweep rests on runs that differ in what they are said to differ in, and in nothing else.
So the start of a training, two steps, is made at every N, and at the smallest N once more with the same seed and once
with another, and compared.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from looptransfer.audit import optimizer_problems
from looptransfer.errors import InputError, PairingWarning, ScalingWarning
from looptransfer.optim import OnStream, family_of, strange_groups, tensors_of
from looptransfer.rewrite.names import named_parameters
from looptransfer.rewrite.plan import ScalingPlan, check_one_parameterization
from looptransfer.rules import Family
from looptransfer.trials.batches import digest, same_batch
from looptransfer.trials.hooks import Batch, fresh_model, held_out_batches, held_out_loss, seeded
from looptransfer.trials.run import Trial
from looptransfer.trials.training import Training, threads_of
from looptransfer.user_code import calls_back, place, refuse_unguarded, user_code

if TYPE_CHECKING:
    from looptransfer.trials.experiment import Experiment

LR = 2.0**-8  # of the two steps, at the top of a schedule that has hardly begun to rise
HOW = ("params", "foreach", "fused", "capturable", "differentiable")  # of a group: no settings of what is computed
SAME = 1e-5  # relative, of sums of weights and of losses


@dataclass(frozen=True)
class Start:
    """A training's first batches, and the sum of absolute values of every trained tensor and the loss before it.

    Where a whole experiment is started, also its plan, the shapes of its parameters, the loss after a step, and hashes
    of the optimizers' settings, of the schedule and of the held-out batches; and what is wrong with optimizers of the
    experiment's own.
    """

    batches: Sequence[Batch]
    weights: tuple[float, ...]
    loss: float
    plan: ScalingPlan | None = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)  # of the parameters, by name
    next_loss: float = math.nan
    settings: str = ""
    schedule: str = ""
    held_out: str = ""
    problems: Sequence[str] = ()

    def probe(self) -> dict[str, Any]:
        """JSON values that differ where another experiment is started: text to the bit, numbers but for rounding."""
        return {
            "the first batches": digest(self.batches),
            "the held-out batches": self.held_out,
            "the parameters": digest([sorted((name, *shape) for name, shape in self.shapes.items())]),
            "the initial weights": sum(self.weights),
            "the loss at initialisation": self.loss,
            "the loss after a step": self.next_loss,
            "the optimizer's settings": self.settings,
            "the schedule": self.schedule,
        }

    def has_weights_of(self, other: "Start") -> bool:
        """The same initialisation, but for rounding."""
        pairs = itertools.zip_longest(self.weights, other.weights, fillvalue=math.nan)
        return all(math.isclose(a, b, rel_tol=SAME) for a, b in pairs)

    def has_loss_of(self, other: "Start") -> bool:
        """The same loss, but for rounding."""
        return math.isclose(self.loss, other.loss, rel_tol=SAME)

    def has_batches_of(self, other: "Start") -> bool:
        """The same data, bit for bit."""
        return all(same_batch(a, b) for a, b in zip(self.batches, other.batches, strict=True))


def weights_of(model: nn.Module) -> tuple[float, ...]:
    """The sum of absolute values of every trained tensor."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    return tuple(float(parameter.abs().sum(dtype=torch.float64)) for parameter in trained)


def check_start(experiment: "Experiment", first: Trial, loops: Iterable[int], seeds: Sequence[int]) -> dict[int, Start]:
    """Start a training at every N with the first seed, see that seeds pair the runs and that N is the loop count.

    The starts have the rule and the device of `first`.

    Raises:
        InputError: as `check_pairs`; the experiment's functions fail, or give too few batches, another held-out set at
            each call, the same weights at each call, no finite loss, or a model whose loops do not follow N.

    Warns:
        PairingWarning: as `check_pairs`.
    """
    refuse_unguarded()
    counts = sorted(set(loops))
    smallest, seed = counts[0], seeds[0]
    first = replace(first, loops=smallest, seed=seed, lr=LR)
    schedule = _schedule(experiment)
    _check_fresh(experiment, smallest, seed)
    starts = {n: start(experiment, replace(first, loops=n)) for n in counts}
    held_out = digest(_steady_held_out(experiment))
    repeated = start(experiment, first, to_the_end=True)
    others = {other: start(experiment, replace(first, seed=other, lr=2 * LR)) for other in seeds[1:2]}
    if experiment.optimizer is not None:
        _check_optimizer(experiment.optimizer, starts, others.values())
    check_pairs(experiment.make_model, experiment.batches, {seed: starts[smallest], **others}, repeated)
    for n in counts[1:]:
        _check_same(experiment.batches, seed, starts[smallest], starts[n], f"at N = {n} than at N = {smallest}")
    with calls_back("", experiment.make_model):
        plans = {n: begun.plan for n, begun in starts.items() if begun.plan is not None}
        check_one_parameterization(plans, {n: frozenset(begun.shapes) for n, begun in starts.items()})
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # for the workers that share the device
    return {n: replace(begun, held_out=held_out, schedule=schedule) for n, begun in starts.items()}


def check_pairs(make_model: object, batches: object, starts: Mapping[int, Start], repeated: Start) -> None:
    """Compare the starts of one or two seeds, and that of the first seed made again.

    Raises:
        InputError: the same seed gives other batches or weights, or two seeds give the same of both.

    Warns:
        PairingWarning: the batches are the same for both seeds, so that only the initialisation differs.
    """
    (seed, first), *others = starts.items()
    _check_same(batches, seed, first, repeated, "at its second call")
    if not repeated.has_weights_of(first):
        raise InputError(
            f"make_model gives other weights at each call with the same seed{place(make_model)}; draw them from the "
            "random states of torch, numpy or Python, which are seeded before the call"
        )
    if not repeated.has_loss_of(first):
        raise InputError(
            f"the same weights and batch give the losses {first.loss:.6g} and {repeated.loss:.6g}{place(make_model)}; "
            "what the forward and the loss draw must come from the random states of torch, numpy or Python, which are "
            "seeded"
        )
    for other, second in others:
        if not second.has_batches_of(first):
            return
        if second.has_weights_of(first) and second.has_loss_of(first):
            raise InputError(
                f"seeds {seed} and {other} give the same batches and the same weights{place(batches)}, so that seeds "
                "would repeat one run and show no noise; draw the batches by the seed"
            )
        warnings.warn(
            f"batches({seed}) and batches({other}) are the same{place(batches)}: seeds differ by their initialisation "
            "alone, and the intervals hold for this one order of the data",
            PairingWarning,
            stacklevel=7,
        )


def check_finite(loss: float, moment: str, *hooks: object) -> None:
    """Refuse a loss at initialisation that is no number: nothing could be trained.

    Args:
        loss: the number.
        moment: such as "N = 2, seed 0".
        hooks: the first of the user's functions among these is named.
    """
    if not math.isfinite(loss):
        raise InputError(
            f"the loss at initialisation is {loss} at {moment}{place(*hooks)}, so nothing can be trained; look "
            "for nan in the batches, and for a log or a root of 0"
        )


def start(experiment: "Experiment", trial: Trial, to_the_end: bool = False) -> Start:
    """Make two steps; to the end, also draw all batches and take the held-out loss.

    Raises:
        InputError: the experiment's functions fail, or give no finite loss.
    """
    moment = f"N = {trial.loops}, seed {trial.seed}"
    with threads_of(trial), seeded(trial.seed):
        training = Training(experiment, trial)
        settings = settings_of(training.optimizers)
        problems = _problems(experiment, training)
        batches, weights, loss = [training.batch], weights_of(training.model), training.loss()
        check_finite(loss, moment, experiment.loss, experiment.make_model)
        shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(training.model).items()}
        training.update()
        batches.append(training.batch)
        next_loss = training.loss()
        training.update()
        if to_the_end:
            for _ in training.stream:
                pass
            loss_at_end = held_out_loss(experiment, training.model, trial.device)
            check_finite(loss_at_end, f"{moment}, held out", experiment.held_out)
    return Start(batches, weights, loss, training.plan, shapes, next_loss, settings, problems=problems)


def probe(experiment: "Experiment", trial: Trial) -> dict[str, Any]:
    """A start's probe, made anew with the rule, the loop count, the seed and the device of a trial.

    Raises:
        InputError: as `start`.
    """
    begun = start(experiment, replace(trial, lr=LR))
    held_out = digest(held_out_batches(experiment.held_out))
    return replace(begun, held_out=held_out, schedule=_schedule(experiment)).probe()


def settings_of(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """A hash of the kinds of optimizers and of the settings of their groups, but for those of how they are computed."""
    groups = [
        (type(optimizer).__name__, sorted((name, _rounded(value)) for name, value in group.items() if name not in HOW))
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return digest([repr(groups)])


def _rounded(value: Any) -> str:
    """A setting as text: plain values, floats but for rounding, else the type."""
    if isinstance(value, (list, tuple)):
        return repr([_rounded(item) for item in value])
    if isinstance(value, float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return f"{float(value):.6g}"
    return repr(value) if isinstance(value, (bool, int, str, type(None))) else type(value).__name__


def _schedule(experiment: "Experiment") -> str:
    """A hash of a schedule's shares of the LR, if the experiment has one of its own.

    Raises:
        InputError: it fails, or gives negative shares, what is no number, or nothing but 0.
    """
    if experiment.schedule is None:
        return ""
    shares = []
    for step in range(experiment.steps):
        with user_code(f"schedule({step}, {experiment.steps}) fails", experiment.schedule):
            shares.append(experiment.lr_share(step))
        if not (math.isfinite(shares[-1]) and shares[-1] >= 0):
            raise InputError(
                f"schedule({step}, {experiment.steps}) gives {shares[-1]:g}{place(experiment.schedule)}; it must give "
                "the share of the LR at that step, from 0 up"
            )
    if not any(shares):
        raise InputError(
            f"schedule(step, {experiment.steps}) gives 0 at every step{place(experiment.schedule)}, so that nothing is "
            "trained; it must give the share of the LR at each step, such as 1.0"
        )
    return digest([f"{share:.6g}" for share in shares])


def _problems(experiment: "Experiment", training: Training) -> list[str]:
    """The faults of optimizers of the experiment's own, as `verify` tells; groups made by hand may be right."""
    if experiment.optimizer is None:
        return []
    made = [(live, strange_groups(live.param_groups, f"the {type(live).__name__}")) for live in training.optimizers]
    by_hand = [live for live, strange in made if strange]
    right = by_hand and _have_planned_lrs(training.model, by_hand, experiment.on_stream)
    excused = {sentence for _, strange in made for sentence in strange} if right else set()
    return [problem for problem in optimizer_problems(training.model, training.optimizers) if problem not in excused]


def _have_planned_lrs(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], on_stream: OnStream) -> bool:
    """The LRs of optimizers without factors are in the ratio of the planned ones, or the plan has none."""
    bases: dict[Family, list[float]] = {}
    plain = True
    for optimizer in optimizers:
        family: Family = "adamw"  # of an unknown kind, such as Lion: without a factor of AdamW there is nothing to tell
        with suppress(InputError):
            family = family_of(type(optimizer))
        factors = {id(tensor.parameter): tensor.lr for tensor in tensors_of(model, family, on_stream)}
        for group in optimizer.param_groups:
            own = [factors[id(parameter)] for parameter in group["params"] if id(parameter) in factors]
            bases.setdefault(family, []).extend(float(group["lr"]) / factor for factor in own)
            plain = plain and all(math.isclose(factor, 1, rel_tol=SAME) for factor in own)
    return plain or all(math.isclose(lr, lrs[0], rel_tol=SAME) for lrs in bases.values() for lr in lrs)


def _check_optimizer(optimizer: object, starts: Mapping[int, Start], others: Iterable[Start]) -> None:
    """Warn of what is wrong with optimizers of the experiment's own; `others` were started at twice the LR."""
    problems = [f"{problem} (at N = {n})" for n, begun in starts.items() for problem in begun.problems][:1]
    if any(other.settings == starts[min(starts)].settings for other in others):
        problems.append(f"it has the same settings for the LR {LR:g} as for {2 * LR:g}, so the LR does not reach it")
    for problem in problems:
        sentence = f"optimizer(model, lr) does not do what the plan says{place(optimizer)}: {problem}"
        warnings.warn(sentence, ScalingWarning, stacklevel=7)


def _check_fresh(experiment: "Experiment", loops: int, seed: int) -> None:
    with seeded(seed):
        models = [fresh_model(experiment.make_model, loops) for _ in range(2)]
    first, second = ({id(p) for p in model.parameters() if p.requires_grad} for model in models)
    if first & second:
        raise InputError(
            f"make_model({loops}) gives the same weights at each call, so that a run would go on where another "
            f"ended{place(experiment.make_model)}; build a fresh model in it"
        )


def _steady_held_out(experiment: "Experiment") -> Iterator[Batch]:
    """The held-out batches, which two calls must give alike; only one of each is held at a time."""
    both = itertools.zip_longest(*(held_out_batches(experiment.held_out) for _ in range(2)))
    for number, (first, second) in enumerate(both):
        if not same_batch(first, second):
            raise InputError(
                f"held_out() gives another batch {number} at its second call{place(experiment.held_out)}; losses are "
                "compared between runs, so it must be the same at every call: draw it with a seed of its own"
            )
        yield first


def _check_same(batches: object, seed: int, first: Start, second: Start, moment: str) -> None:
    for number, pair in enumerate(zip(first.batches, second.batches, strict=True)):
        if not same_batch(*pair):
            raise InputError(
                f"batches({seed}) gives another batch {number} {moment}{place(batches)}; runs of one seed must see the "
                "same data: draw it from a generator of its own, such as torch.Generator().manual_seed(seed)"
            )
