"""The coordinate check: a few short trainings over N, watched at every step."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from looptransfer.checks import check_count, check_number, counts_of, seeds_of
from looptransfer.coordcheck.exponents import COLUMNS
from looptransfer.coordcheck.observe import Observation, TracedBranch, find_branches, observe
from looptransfer.coordcheck.result import ON_STREAM, OUTPUT, OUTSIDE, Context, CoordCheck
from looptransfer.coordcheck.significance import judge_frame
from looptransfer.coordcheck.statistics import CHANGE_STATISTICS, STEP_STATISTICS, VISIT_STATISTICS, Change, Step, Visit
from looptransfer.errors import InputError, UserCodeError, explained_in
from looptransfer.optim import param_groups
from looptransfer.rewrite.names import named_parameters
from looptransfer.rewrite.parametrize import apply_plan
from looptransfer.rewrite.plan import ScalingPlan, check_one_parameterization
from looptransfer.rules import Rule, check_rule
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.hooks import Batch, batch_stream, fresh_model, loss_of, seeded
from looptransfer.trials.pairing import Start, check_finite, check_pairs, weights_of
from looptransfer.trials.training import exchanged, own_plan, parametrized, varies
from looptransfer.user_code import calls_back, place, user_code

LOOPS = (1, 2, 4, 8, 16, 32, 64)
AS_MADE = "as made"
SAME = "a coordinate check needs a forward that does the same every time: fix the loop count for it"

MakeOptimizer = Callable[[nn.Module], Any]
Statistics = Mapping[str, Callable[[Visit], Any]]
Value = tuple[str, int, str, float]  # module, visit, statistic, value


@explained_in("coordinates.md#a-coordinate-check-over-loops")
def coord_check(
    experiment: Experiment,
    loops: Sequence[int] = LOOPS,
    rules: Sequence[str] | None = None,
    steps: int = 10,
    seeds: int | Sequence[int] = 3,
    *,
    lr: float = 1e-3,
    make_optimizer: MakeOptimizer | None = None,
    widths: Sequence[int] = (),
    layers: Sequence[int] = (),
    statistics: Statistics | None = None,
    tolerance: float = 0.15,
    level: float = 0.05,
) -> CoordCheck:
    """Train a few steps at every loop count, watch what reaches the stream, and judge how it grows with N.

    The first rule is the one that is judged; the others are controls. A plain model is rewritten afresh for every rule.
    A model that `make_model` has rewritten already, and one that scales its branches by itself, is taken "as made" and
    judged by the rule of its plan, or by "factored" where it has none. Weights and data of one seed are the same at
    every N (paired seeds), and the LR is the same everywhere.

    Args:
        experiment: its model, batches, loss, λ and base layers; `steps` + 1 batches of every seed. The first of them is
            the fixed probe batch and is not trained on. With `widths` or `layers` its `make_model` is called with
            `width=` and `layers=` too.
        loops: loop counts N, two at least.
        rules: "factored", "completep", "sqrt", "unscaled", "as made"; default "factored", or "as made" for a rewritten
            model.
        steps: optimizer steps, 1 at least.
        seeds: how many, or which; two at least.
        lr: base LR of the default optimizer, AdamW on `param_groups`, without decay.
        make_optimizer: model -> optimizer, or (optimizer, scheduler), where yours is to be checked.
        widths: widths to be run as well, at the second loop count.
        layers: numbers of unique layers L to be run as well, at the second loop count.
        statistics: further functions of a `Visit`, by name. They stand in the frame and are not judged.
        tolerance: how far an exponent of N may lie from what the rule promises; two thirds of it for what a branch
            adds at its first visit, twice as much over L.
        level: chance of one false alarm or more in the whole check (Holm over all statistics).

    Raises:
        InputError: numbers out of range, too few batches, seeds that do not pair the trainings (`check_pairs`), a
            random loop count, a model without residual branches, and what `parametrize` refuses.
    """
    if experiment.loops is not None:
        raise InputError(f"the experiment has a random loop count (loops=…){place(experiment.loops)}; {SAME}")
    sizes = _sizes(
        *(sorted(counts_of(*given)) for given in (("loops", loops, 2), ("widths", widths), ("layers", layers)))
    )
    check_count("steps", steps)
    check_number("lr", lr)
    check_number("tolerance", tolerance)
    check_number("level", level, 0, 0.5)
    seeds = seeds_of(seeds)
    setting = _Setting(experiment, make_optimizer, lr, steps, {**VISIT_STATISTICS, **(statistics or {})})
    rules = _rules(setting, sizes[0], seeds[0], rules)
    starts = {seed: setting.start(sizes[0], seed) for seed in seeds}
    pair = {seed: starts[seed] for seed in seeds[:2]}
    check_pairs(experiment.make_model, experiment.batches, pair, setting.start(sizes[0], seeds[0]))
    runs = _Runs(setting)
    for size, seed, rule in itertools.product(sizes, seeds, rules):
        with seeded(seed), calls_back(f"a training at N = {size.loops} fails", experiment.make_model):
            runs.add(size, seed, rule, starts[seed].batches)
    return runs.judged(rules, tolerance, level)


@dataclass(frozen=True)
class _Size:
    """The place of a training on the axes."""

    loops: int
    width: int | None = None
    layers: int | None = None


def _sizes(loops: list[int], widths: list[int], layers: list[int]) -> list[_Size]:
    """Every loop count; then the other widths and numbers of layers, at the second loop count."""
    first = _Size(loops[1], min(widths, default=None), min(layers, default=None))
    sizes = [replace(first, loops=n) for n in loops]
    return [*sizes, *(replace(first, width=n) for n in widths[1:]), *(replace(first, layers=n) for n in layers[1:])]


def _rules(setting: "_Setting", size: _Size, seed: int, rules: Sequence[str] | None) -> list[str]:
    if rules is None:
        with seeded(seed):
            return ["factored" if own_plan(setting.model(size)) is None else AS_MADE]
    if isinstance(rules, str) or not rules or len(set(rules)) < len(rules):
        raise InputError(f"rules is {rules!r}; give a list such as ['factored', 'unscaled'], each once")
    for rule in set(rules) - {AS_MADE}:
        check_rule(rule)
    return list(rules)


@dataclass(frozen=True)
class _Setting:
    """Shared by all trainings of one check."""

    experiment: Experiment
    make_optimizer: MakeOptimizer | None
    lr: float
    steps: int
    statistics: Statistics

    def model(self, size: _Size) -> nn.Module:
        """A fresh model."""
        sizes = {name: n for name, n in (("width", size.width), ("layers", size.layers)) if n is not None}
        return fresh_model(self.experiment.make_model, size.loops, **sizes)

    def start(self, size: _Size, seed: int) -> Start:
        """The probe batch and one batch per step, and the loss of the model as made."""
        make_model, loss = self.experiment.make_model, self.experiment.loss
        with seeded(seed):
            data = list(batch_stream(self.experiment.batches, seed, self.steps + 1))
            model = self.model(size)
            weights, value = weights_of(model), loss_of(loss, model, data[0], make_model)[1]
        check_finite(value, f"N = {size.loops}, seed {seed}", loss, make_model)
        return Start(data, weights, value)

    def optimizer(self, model: nn.Module) -> Any:
        """An optimizer, or (optimizer, scheduler)."""
        if self.make_optimizer is not None:
            with user_code("make_optimizer(model) fails", self.make_optimizer):
                return self.make_optimizer(model)
        if own_plan(model) is None:
            return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)
        groups = param_groups(model, torch.optim.AdamW, lr=self.lr, on_stream=self.experiment.on_stream)
        return torch.optim.AdamW(groups)


@dataclass
class _Runs:
    """The trainings of one check, and what they showed."""

    setting: _Setting
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    matrices: dict[tuple[str, _Size, int], list[Any]] = field(default_factory=dict)
    plans: dict[tuple[str, _Size], ScalingPlan | None] = field(default_factory=dict)
    names: dict[_Size, frozenset[str]] = field(default_factory=dict)  # of the parameters
    branches: dict[tuple[str, _Size], list[TracedBranch]] = field(default_factory=dict)
    adam: bool = True
    width_scaled: bool = False

    def add(self, size: _Size, seed: int, rule: str, data: Sequence[Batch]) -> None:
        """Train once; the random states are seeded, so that all rules and sizes start with the same weights."""
        setting, key = self.setting, (rule, size)
        model = setting.model(size)
        plan = self._rewrite(model, data[0][0], rule, size)
        if key not in self.branches:
            self.branches[key] = find_branches(model, data[0][0], plan)
        branches = self.branches[key]
        optimizer = setting.optimizer(model)
        stepped = optimizer[0] if isinstance(optimizer, tuple) else optimizer
        self.adam = isinstance(stepped, (torch.optim.Adam, torch.optim.AdamW))
        marked = any(hasattr(parameter, "infshape") for parameter in model.parameters())
        self.width_scaled = marked or bool(plan and plan.base_shapes)
        layers = plan.layers if plan else len({branch.layer for branch in branches})
        place = (rule, size.loops, size.width or setting.experiment.width, layers, seed)
        self.rows += [(*place, 0, branch.module, 0, "multiplier", branch.multiplier) for branch in branches]
        training = _train_watched(model, optimizer, branches, data, setting.experiment.loss, plan, setting.statistics)
        for step, observation, values in training:
            self.rows += [(*place, step, *value) for value in [*observation.values, *values]]
            if observation.cosines is not None and step in {0, setting.steps}:
                self.matrices.setdefault((*key, step), []).append(observation.cosines.double().cpu())

    def _rewrite(self, model: nn.Module, inputs: Any, rule: str, size: _Size) -> ScalingPlan | None:
        """Put `rule` into the model. The branches of a size are found once; other rules and seeds get the same plan."""
        experiment = self.setting.experiment
        traced = next((p for (_, other), p in self.plans.items() if other == size and p is not None), None)
        plan = own_plan(model)
        if rule != AS_MADE and plan is not None:
            plan = exchanged(model, plan, cast(Rule, rule))
        elif rule != AS_MADE and traced is not None:
            plan = traced.under(cast(Rule, rule))
            apply_plan(model, plan)
        elif rule != AS_MADE:
            plan = parametrized(experiment, model, inputs, cast(Rule, rule))
        if plan is not None and (plan.random_loops or varies(plan)):
            raise UserCodeError(
                f"the model of make_model({size.loops}) loops another number of times from one forward to the next"
                f"{place(experiment.make_model)}; {SAME}"
            )
        self.plans[rule, size] = plan
        self.names[size] = frozenset(named_parameters(model))
        if rule != AS_MADE:  # what is checked as made may be untied, as a control
            self._check_peers(rule, size)
        return plan

    def _check_peers(self, rule: str, size: _Size) -> None:
        """Refuse models that are not one parameterization over N."""
        peers = {other for other in self.names if replace(other, loops=size.loops) == size}
        plans = {peer.loops: plan for peer in peers if (plan := self.plans.get((rule, peer)))}
        with calls_back("", self.setting.experiment.make_model):
            check_one_parameterization(plans, {peer.loops: self.names[peer] for peer in peers})

    def judged(self, rules: Sequence[str], tolerance: float, level: float) -> CoordCheck:
        """The frame and its verdict."""
        frame = pd.DataFrame(self.rows, columns=COLUMNS)
        (_, largest), branches = max(self.branches.items(), key=lambda item: item[0][1].loops)
        means = {
            (rule, size.loops, step): torch.stack(matrices).mean(0).numpy()
            for (rule, size, step), matrices in self.matrices.items()
            if size == replace(largest, loops=size.loops)
        }
        plan = self.plans[rules[0], largest]
        base_layers = plan.base_layers if plan else self.setting.experiment.base_layers
        plan_as_made = self.plans.get((AS_MADE, largest))
        rule_as_made = plan_as_made.rule if plan_as_made else "factored"
        context = Context(tuple(branches), base_layers, self.adam, self.width_scaled, rule_as_made)
        return judge_frame(frame, rules, context, tolerance, level, means)


# -- one training


def _train_watched(
    model: nn.Module,
    optimizer: Any,
    branches: list[TracedBranch],
    data: Sequence[Batch],
    loss: Callable[[Any, Any], Tensor],
    plan: ScalingPlan | None,
    statistics: Statistics,
) -> Iterator[tuple[int, Observation, list[Value]]]:
    """Train on `data[1:]` and yield what the probe `data[0]` showed: step, observation, and changes and steps as rows.

    Step 0 is initialisation. A loss that is no number ends the training. The plan tells parameters on the stream from
    others.
    """
    stepped = optimizer if isinstance(optimizer, tuple) else (optimizer,)
    parts = _parts(model, plan, branches)
    probe = data[0][0]
    seen = initial = observe(model, probe, branches, statistics)
    yield 0, seen, []
    for step, batch in enumerate(data[1:], start=1):
        value, number = loss_of(loss, model, batch, None)
        if not math.isfinite(number):
            yield step, Observation(), [(OUTPUT, 0, "output_rms", math.nan)]
            return
        with user_code("the training step fails", loss):
            stepped[0].zero_grad()
            value.backward()
        before = {id(p): p.detach().clone() for part in parts.values() for p in part}
        with user_code("the training step fails", loss):
            for stepping in filter(None, stepped):  # the scheduler after the optimizer
                stepping.step()
        steps = {name: _step(part, before) for name, part in parts.items()}
        del before
        previous, seen = seen, observe(model, probe, branches, statistics)
        yield step, seen, [*_changes(branches, seen, previous, initial), *_step_values(steps)]


def _parts(
    model: nn.Module, plan: ScalingPlan | None, branches: Sequence[TracedBranch]
) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by branch; of no branch: on the stream, or outside."""
    trained = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    parts = {branch.module: [trained[name] for name in branch.parameters if name in trained] for branch in branches}
    taken = {id(p) for part in parts.values() for p in part}
    on_stream = plan.on_stream if plan else {}
    parts[ON_STREAM] = [p for name, p in trained.items() if name in on_stream and id(p) not in taken]
    taken |= {id(p) for p in parts[ON_STREAM]}
    parts[OUTSIDE] = [p for p in trained.values() if id(p) not in taken]
    return {name: part for name, part in parts.items() if part}


def _step(part: Sequence[nn.Parameter], before: Mapping[int, Tensor]) -> Step:
    moved = [(p.grad, p.detach() - before[id(p)]) for p in part if p.grad is not None]
    return Step([gradient for gradient, _ in moved], [update for _, update in moved])


def _step_values(steps: Mapping[str, Step]) -> Iterator[Value]:
    for module, step in steps.items():
        for name, function in STEP_STATISTICS.items():
            yield module, 0, name, float(function(step))


def _changes(
    branches: Sequence[TracedBranch], current: Observation, before: Observation, initial: Observation
) -> Iterator[Value]:
    last_visit = {branch.module: branch.visits for branch in branches}
    for module, state in current.states.items():
        change = Change(state, before.states[module], initial.states[module])
        for name, function in CHANGE_STATISTICS.items():
            yield module, last_visit.get(module, 0), name, float(function(change))
