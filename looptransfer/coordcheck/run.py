"""The coordinate check: a few short trainings over N, watched at every step."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import pandas as pd
import torch
from torch import Tensor, nn

from looptransfer.coordcheck.exponents import COLUMNS
from looptransfer.coordcheck.observe import OUTPUT, Observation, Tap, find_taps, observe
from looptransfer.coordcheck.statistics import CHANGE_STATISTICS, STEP_STATISTICS, VISIT_STATISTICS, Change, Step, Visit
from looptransfer.coordcheck.verdict import ON_STREAM, OUTSIDE, Branch, Context, CoordCheck, judge
from looptransfer.errors import InputError, UserCodeError
from looptransfer.optim import param_groups
from looptransfer.rewrite.names import named_parameters
from looptransfer.rewrite.parametrize import apply_plan, parametrize
from looptransfer.rewrite.plan import ScalingPlan, check_one_parameterization
from looptransfer.rules import Rule, check_rule
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.hooks import Batch, batch_stream, fresh_model, loss_of, seeded, token_loss
from looptransfer.trials.pairing import Start, check_finite, check_pairs, weights_of
from looptransfer.trials.training import exchanged, own_plan, varies
from looptransfer.user_code import calls_back, place, user_code

LOOPS = (1, 2, 4, 8, 16, 32, 64)
AS_MADE = "as made"
SAME = "a coordinate check needs a forward that does the same every time: fix the loop count for it"

Batches = Callable[[int], Iterable[Batch]] | Sequence[Batch]
MakeOptimizer = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class _Size:
    """Where a training stands on the axes."""

    loops: int
    width: int | None = None
    layers: int | None = None

    def is_but_for_loops(self, other: "_Size") -> bool:
        return (self.width, self.layers) == (other.width, other.layers)


@dataclass(frozen=True)
class _Setting:
    """What all trainings of one check share."""

    make_model: Callable[..., nn.Module]
    batches: Batches
    loss: Callable[[Any, Any], Tensor]
    make_optimizer: MakeOptimizer | None
    lr: float
    on_stream: Literal["scale", "leave"]
    steps: int
    lam: float
    base_layers: int
    statistics: Mapping[str, Callable[[Visit], Any]]
    width: int | None
    options: Mapping[str, Any]  # of `parametrize`

    def model(self, size: _Size) -> nn.Module:
        """A fresh model."""
        more = {name: n for name, n in (("width", size.width), ("layers", size.layers)) if n is not None}
        return fresh_model(self.make_model, size.loops, **more)

    def start(self, size: _Size, seed: int) -> Start:
        """The probe batch and one batch per step, and the loss of the model as made."""
        with seeded(seed):
            data = list(batch_stream(self.batches, seed, self.steps + 1))
            model = self.model(size)
            weights, loss = weights_of(model), loss_of(self.loss, model, data[0], self.make_model)[1]
        check_finite(loss, f"N = {size.loops}, seed {seed}", self.loss, self.make_model)
        return Start(data, weights, loss)

    def optimizer(self, model: nn.Module) -> Any:
        """An optimizer, or (optimizer, scheduler)."""
        if self.make_optimizer is not None:
            with user_code("make_optimizer(model) fails", self.make_optimizer):
                return self.make_optimizer(model)
        if own_plan(model) is None:
            return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)
        return torch.optim.AdamW(param_groups(model, torch.optim.AdamW, lr=self.lr, on_stream=self.on_stream))


def coord_check(
    make_model: Callable[..., nn.Module] | Experiment,
    batches: Batches | None = None,
    loops: Sequence[int] = LOOPS,
    rules: Sequence[str] | None = None,
    steps: int = 10,
    seeds: int | Sequence[int] = 3,
    *,
    loss: Callable[[Any, Any], Tensor] = token_loss,
    lr: float = 1e-3,
    make_optimizer: MakeOptimizer | None = None,
    lam: float = 1.0,
    base_layers: int = 1,
    widths: Sequence[int] = (),
    layers: Sequence[int] = (),
    statistics: Mapping[str, Callable[[Visit], Any]] | None = None,
    tolerance: float = 0.15,
    level: float = 0.05,
) -> CoordCheck:
    """Train a few steps at every loop count, watch what reaches the stream, and judge how it grows with N.

    The first rule is the one that is judged; the others are controls. A plain model is rewritten afresh for every rule.
    A model that `make_model` has rewritten already, and one that scales its branches by itself, is taken "as made" and
    judged by the rule of its plan, or by "factored" where it has none. Weights and data of one seed are the same at
    every N (paired seeds), and the LR is the same everywhere.

    Args:
        make_model: loop count -> fresh model; or an `Experiment`, which brings batches, loss, λ and base layers along.
            With `widths` or `layers` it is called with `width=` and `layers=` too.
        batches: seed -> batches (inputs, targets), `steps` + 1 of them; or a list of them for all seeds. The first is
            the fixed probe batch and is not trained on.
        loops: loop counts N, two at least.
        rules: "factored", "sqrt", "unscaled", "as made"; default "factored", or "as made" for a rewritten model.
        steps: optimizer steps, 1 at least.
        seeds: how many, or which; two at least.
        loss: (model output, targets) -> scalar.
        lr: base LR of the default optimizer, AdamW on `param_groups`, without decay.
        make_optimizer: model -> optimizer, or (optimizer, scheduler), where yours is to be checked.
        lam: λ.
        base_layers: L_ref.
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
    width, options = None, {}
    on_stream: Literal["scale", "leave"] = "scale"
    if isinstance(make_model, Experiment):
        experiment = make_model
        make_model, loss, lam = experiment.make_model, experiment.loss, experiment.lam
        base_layers, width, on_stream = experiment.base_layers, experiment.width, experiment.on_stream
        batches = experiment.batches if batches is None else batches
        options = {"branches": experiment.branches, "layers": experiment.layers}
        if experiment.loops is not None:
            raise InputError(f"the experiment has a random loop count (loops=…){place(experiment.loops)}; {SAME}")
    if batches is None:
        raise InputError("batches is missing; give seed -> batches (inputs, targets), or an Experiment, which has them")
    loops = _counts("loops", loops, least=2)
    setting = _Setting(
        make_model,
        batches,
        loss,
        make_optimizer,
        lr,
        on_stream,
        steps,
        lam,
        base_layers,
        {**VISIT_STATISTICS, **(statistics or {})},
        width,
        options,
    )
    _check_numbers(steps, lr, tolerance, level)
    chosen = _seeds(seeds)
    sizes = [_Size(n, *_first(widths, layers)) for n in loops]
    sizes += [_Size(loops[1], w, _first(widths, layers)[1]) for w in _counts("widths", widths)[1:]]
    sizes += [_Size(loops[1], _first(widths, layers)[0], n) for n in _counts("layers", layers)[1:]]
    chosen_rules = _rules(setting, sizes[0], chosen[0], rules)
    starts = {seed: setting.start(sizes[0], seed) for seed in chosen}
    pair = {seed: starts[seed] for seed in chosen[:2]}
    check_pairs(make_model, batches, pair, setting.start(sizes[0], chosen[0]))
    runs = _Runs(setting)
    for size, seed, rule in itertools.product(sizes, chosen, chosen_rules):
        with seeded(seed), calls_back(f"a training at N = {size.loops} fails", make_model):
            runs.add(size, seed, rule, starts[seed].batches)
    return runs.judged(chosen_rules, tolerance, level)


@dataclass
class _Runs:
    """The trainings of one check, and what they showed."""

    setting: _Setting
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    matrices: dict[tuple[str, _Size, int], list[Any]] = field(default_factory=dict)
    plans: dict[tuple[str, _Size], ScalingPlan | None] = field(default_factory=dict)
    names: dict[_Size, frozenset[str]] = field(default_factory=dict)  # of the parameters
    taps: dict[tuple[str, _Size], list[Tap]] = field(default_factory=dict)
    adam: bool = True
    width_scaled: bool = False

    def add(self, size: _Size, seed: int, rule: str, data: Sequence[Batch]) -> None:
        """Train once; the random states are seeded, so that all rules and sizes start with the same weights."""
        setting = self.setting
        model = setting.model(size)
        plan = self._rewrite(model, data[0][0], rule, size)
        if (rule, size) not in self.taps:
            self.taps[rule, size] = find_taps(model, data[0][0], plan)
        taps = self.taps[rule, size]
        made = setting.optimizer(model)
        self.adam = isinstance(made[0] if isinstance(made, tuple) else made, (torch.optim.Adam, torch.optim.AdamW))
        self.width_scaled = any(hasattr(parameter, "infshape") for parameter in model.parameters())
        layers = plan.layers if plan else len({tap.layer for tap in taps})
        where = (rule, size.loops, size.width or setting.width, layers, seed)
        if plan is None or plan.realisation == "multiplier":  # a folded one is in the weights
            self.rows += [(*where, 0, tap.module, 0, "multiplier", tap.multiplier) for tap in taps]
        for step, observation, more in train_watched(model, made, taps, data, setting.loss, plan, setting.statistics):
            self.rows += [(*where, step, *value) for value in [*observation.values, *more]]
            if observation.cosines is not None and step in {0, setting.steps}:
                self.matrices.setdefault((rule, size, step), []).append(observation.cosines.double().cpu())

    def _rewrite(self, model: nn.Module, inputs: Any, rule: str, size: _Size) -> ScalingPlan | None:
        """Put `rule` into the model. The branches of a size are found once; other rules and seeds get the same plan."""
        setting = self.setting
        known = next((p for (_, at), p in self.plans.items() if at == size and p is not None), None)
        plan = own_plan(model)
        if rule != AS_MADE and plan is not None:
            plan = exchanged(model, plan, cast(Rule, rule))
        elif rule != AS_MADE and known is not None:
            plan = known.under(cast(Rule, rule))
            apply_plan(model, plan)
        elif rule != AS_MADE:
            plan = parametrize(model, inputs, cast(Rule, rule), setting.lam, setting.base_layers, **setting.options)
        if plan is not None and (plan.random_loops or varies(plan)):
            raise UserCodeError(
                f"the model of make_model({size.loops}) loops another number of times from one forward to the next"
                f"{place(setting.make_model)}; {SAME}"
            )
        self.plans[rule, size] = plan
        self.names[size] = frozenset(named_parameters(model))
        peers = {
            at.loops: p for (name, at), p in self.plans.items() if p and name == rule and at.is_but_for_loops(size)
        }
        names = {at.loops: names for at, names in self.names.items() if at.is_but_for_loops(size)}
        if peers:
            with calls_back("", setting.make_model):
                check_one_parameterization(peers, names)
        return plan

    def judged(self, rules: Sequence[str], tolerance: float, level: float) -> CoordCheck:
        """The frame and its verdict."""
        frame = pd.DataFrame(self.rows, columns=COLUMNS)
        (_, largest), taps = max(self.taps.items(), key=lambda item: item[0][1].loops)
        means = {
            (rule, size.loops, step): torch.stack(found).mean(0).numpy()
            for (rule, size, step), found in self.matrices.items()
            if size == replace(largest, loops=size.loops)
        }
        plan = self.plans[rules[0], largest]
        base_layers = plan.base_layers if plan else self.setting.base_layers
        branches = tuple(Branch(tap.module, tap.layer, tap.visits) for tap in taps)
        return judge(
            frame, rules, Context(branches, base_layers, self.adam, self.width_scaled), tolerance, level, means
        )


# -- one training


def train_watched(
    model: nn.Module,
    made: Any,
    taps: list[Tap],
    data: Sequence[Batch],
    loss: Callable[[Any, Any], Tensor] = token_loss,
    plan: ScalingPlan | None = None,
    statistics: Mapping[str, Callable[[Visit], Any]] = VISIT_STATISTICS,
) -> Iterator[tuple[int, Observation, list[tuple[str, int, str, float]]]]:
    """Train on `data[1:]` and yield what the probe `data[0]` showed: step, observation, and changes and steps as rows.

    Step 0 is initialisation. A loss that is no number ends the training.

    Args:
        model: any; its residual branches are `taps`.
        made: an optimizer, or (optimizer, scheduler).
        taps: from `find_taps`.
        data: batches (inputs, targets).
        loss: (model output, targets) -> scalar.
        plan: tells parameters on the stream from others.
        statistics: of every visit.
    """
    optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
    parts = _parts(model, plan, taps)
    probe = data[0][0]
    seen = initial = observe(model, probe, taps, statistics)
    yield 0, seen, []
    for step, (inputs, targets) in enumerate(data[1:], start=1):
        value, number = loss_of(loss, model, (inputs, targets), None)
        if not math.isfinite(number):
            yield step, Observation(), [(OUTPUT, 0, "output_rms", math.nan)]
            return
        with user_code("the training step fails", loss):
            optimizer.zero_grad()
            value.backward()
        before = {id(p): p.detach().clone() for part in parts.values() for p in part}
        with user_code("the training step fails", loss):
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        steps = {name: _step(part, before) for name, part in parts.items()}
        del before
        previous, seen = seen, observe(model, probe, taps, statistics)
        yield step, seen, [*_changes(taps, seen, previous, initial), *_step_values(steps)]


def _parts(model: nn.Module, plan: ScalingPlan | None, taps: Sequence[Tap]) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by branch; of no branch: on the stream, or outside."""
    live = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    parts = {tap.module: [live[name] for name in tap.parameters if name in live] for tap in taps}
    taken = {id(p) for part in parts.values() for p in part}
    on_stream = plan.on_stream if plan else {}
    parts[ON_STREAM] = [p for name, p in live.items() if name in on_stream and id(p) not in taken]
    taken |= {id(p) for p in parts[ON_STREAM]}
    parts[OUTSIDE] = [p for p in live.values() if id(p) not in taken]
    return {name: part for name, part in parts.items() if part}


def _step(part: Sequence[nn.Parameter], before: Mapping[int, Tensor]) -> Step:
    pairs = [(p, p.grad) for p in part]
    moved = [(gradient, p.detach() - before[id(p)]) for p, gradient in pairs if gradient is not None]
    return Step([gradient for gradient, _ in moved], [update for _, update in moved])


def _step_values(steps: Mapping[str, Step]) -> Iterator[tuple[str, int, str, float]]:
    for module, step in steps.items():
        for name, function in STEP_STATISTICS.items():
            yield module, 0, name, float(function(step))


def _changes(
    taps: Sequence[Tap], now: Observation, before: Observation, initial: Observation
) -> Iterator[tuple[str, int, str, float]]:
    last_visit = {tap.module: tap.visits for tap in taps}
    for module, state in now.states.items():
        change = Change(state, before.states[module], initial.states[module])
        for name, function in CHANGE_STATISTICS.items():
            yield module, last_visit.get(module, 0), name, float(function(change))


# -- what was given


def _rules(setting: _Setting, size: _Size, seed: int, rules: Sequence[str] | None) -> list[str]:
    if rules is None:
        with seeded(seed):
            return ["factored" if own_plan(setting.model(size)) is None else AS_MADE]
    if isinstance(rules, str) or not rules or len(set(rules)) < len(rules):
        raise InputError(f"rules is {rules!r}; give a list such as ['factored', 'unscaled'], each once")
    for rule in rules:
        if rule != AS_MADE:
            check_rule(rule)
    return list(rules)


def _counts(name: str, counts: Sequence[int], least: int = 0) -> list[int]:
    given = list(counts) if isinstance(counts, Iterable) and not isinstance(counts, str) else [counts]
    wrong = [n for n in given if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    if wrong or len(given) < least or len(set(given)) < len(given):
        few = f", {least} of them at least, since one tells no exponent" if least else ""
        raise InputError(f"{name} is {counts!r}; give whole numbers from 1 up, each once{few}, such as 1, 2, 4, 8")
    return sorted(given)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else list(seeds)  # type: ignore[arg-type]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen) or any(not isinstance(s, int) or s < 0 for s in chosen):
        raise InputError(f"seeds is {seeds!r}; give two or more, such as 3 or [0, 1, 2]: one seed has no interval")
    return chosen


def _first(widths: Sequence[int], layers: Sequence[int]) -> tuple[int | None, int | None]:
    return min(widths, default=None), min(layers, default=None)


def _check_numbers(steps: int, lr: float, tolerance: float, level: float) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps is {steps!r}; it must be a whole number from 1 up")
    for name, value in (("lr", lr), ("tolerance", tolerance)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value!r}; it must be a finite number above 0")
    if not 0 < level < 0.5:
        raise InputError(f"level is {level!r}; it must lie between 0 and 0.5, such as 0.05")
