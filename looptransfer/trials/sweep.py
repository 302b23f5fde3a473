"""The two things a user asks for: the best LR of a proxy, and a sweep around it over N."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch

from looptransfer.errors import InputError
from looptransfer.rewrite.apply import parametrize
from looptransfer.rewrite.plan import ScalingPlan
from looptransfer.rules import Rule, check_rule
from looptransfer.transfer.optimum import Optimum
from looptransfer.transfer.results import COLUMNS
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.search import Grid, ProxySearch, runs_of
from looptransfer.trials.study import run_search
from looptransfer.trials.trial import Run

LEDGER = "looptransfer.db"
OCTAVES = (-3.0, -2.25, -1.5, -0.75, 0.0, 0.75, 1.5)


@dataclass(frozen=True)
class TunedLR:
    """The best base LR of a proxy model, absolute, with the t-interval over seeds that `optimum` holds.

    Where no optimum could be fitted, `lr` is the best one that was run and `optimum.censored` says why.
    """

    lr: float
    loops: int
    optimum: Optimum
    results: pd.DataFrame = field(repr=False, compare=False)

    def __str__(self) -> str:
        interval = self.optimum.log2_lr
        if interval is None:
            return f"best LR run at N = {self.loops}: {self.lr:.4g} (no fitted optimum: {self.optimum.censored})"
        return f"best LR at N = {self.loops}: {self.lr:.4g} [{2**interval.low:.4g}, {2**interval.high:.4g}]"


def tune(
    experiment: Experiment,
    loops: int,
    seeds: int | Sequence[int] = 4,
    ledger: str | Path = LEDGER,
    workers: int | None = None,
    rule: Rule = "factored",
) -> TunedLR:
    """Find the LR optimum of the proxy with `loops` loops: a coarse look, then half-octave steps with every seed.

    Args:
        experiment: what is trained.
        loops: N of the proxy; small is cheap, and under "factored" as good as large.
        seeds: how many, or which; paired across LRs. Two at least.
        ledger: SQLite file (or Optuna storage URL) of finished runs; calling again goes on where it was.
        workers: processes of one thread; default one per core, 1 trains in this process.
        rule: the scaling rule.

    Raises:
        InputError: as `run_search`, or numbers out of range.
        RuntimeError: a run failed.
    """
    chosen = _seeds(seeds)
    if len(chosen) < 2:
        raise InputError(f"seeds is {seeds!r}; give two or more, since one cannot tell noise from an optimum")
    check_rule(rule)
    trial_plan(experiment, _loop_counts([loops])[0], rule)
    search = ProxySearch(loops, chosen, rule)
    results = run_search(experiment, search, ledger, f"tune N={loops} {rule}", workers)
    wanted = set(search.wanted(results))
    results = results[[run in wanted for run in runs_of(results)]]
    optimum = search.optimum(results, search.confidence)
    if optimum.log2_lr is not None:
        return TunedLR(2.0**optimum.log2_lr.estimate, loops, optimum, results)
    mean = results.groupby("lr")["loss"].mean()
    if not math.isfinite(mean.min()):
        raise InputError(f"every run at N = {loops} diverged; the experiment does not train at any LR tried")
    return TunedLR(float(str(mean.idxmin())), loops, optimum, results)


def sweep(
    experiment: Experiment,
    loops: Sequence[int] | Mapping[Rule, Sequence[int]],
    around: TunedLR | float,
    rules: Sequence[Rule] = ("factored",),
    seeds: int | Sequence[int] = 4,
    octaves: Sequence[float] = OCTAVES,
    ledger: str | Path = LEDGER,
    workers: int | None = None,
) -> pd.DataFrame:
    """Train at every loop count, LR and seed, and return the table that `check` judges.

    Runs that two rules share, as all do at N = 1 when L is the base depth, are made once and stand in the table under
    each of the rules.

    Args:
        experiment: what is trained.
        loops: the loop counts of every rule, or a mapping from each rule to its own.
        around: centre of the LRs: a tuned LR, or an absolute one.
        rules: the rule of interest and its controls; a mapping of `loops` decides by itself.
        seeds: how many, or which; paired across LRs, loop counts and rules.
        octaves: the LRs as log2 distances from the centre.
        ledger: SQLite file (or Optuna storage URL) of finished runs; calling again goes on where it was.
        workers: processes of one thread; default one per core, 1 trains in this process.

    Returns:
        One row per run, with columns rule, layers, loops, width, lr, seed, steps, loss (nats), diverged, seconds.

    Raises:
        InputError: as `run_search`, or numbers out of range.
        RuntimeError: a run failed.
    """
    plan_of_loops = {rule: _loop_counts(counts) for rule, counts in _by_rule(loops, rules).items()}
    centre = around.lr if isinstance(around, TunedLR) else around
    if not (math.isfinite(centre) and centre > 0):
        raise InputError(f"around is {around!r}; the LR must be a finite number above 0")
    if not plan_of_loops:
        raise InputError("rules is empty; name one rule or more")
    if not octaves or len(set(octaves)) < len(octaves) or not all(map(math.isfinite, octaves)):
        raise InputError(f"octaves is {octaves!r}; give log2 distances from the centre, each once, such as -1, 0, 1")
    reported = [
        Run(rule, count, centre * 2.0**octave, seed)
        for rule, counts in plan_of_loops.items()
        for count in counts
        for octave in octaves
        for seed in _seeds(seeds)
    ]
    pairs = dict.fromkeys((run.rule, run.loops) for run in reported)
    multipliers = {(rule, count): _multipliers(experiment, count, rule) for rule, count in pairs}
    first_rule: dict[tuple[int, object], Rule] = {}
    for (rule, count), value in multipliers.items():
        first_rule.setdefault((count, value), rule)
    made = {run: replace(run, rule=first_rule[run.loops, multipliers[run.rule, run.loops]]) for run in reported}
    done = run_search(experiment, Grid(tuple(dict.fromkeys(made.values()))), ledger, "sweep", workers)
    by_run = dict(zip(runs_of(done), done.to_dict("records"), strict=True))
    rows = [{**by_run[made[run]], "rule": run.rule} for run in sorted(reported)]
    return pd.DataFrame(rows, columns=COLUMNS)


def trial_plan(experiment: Experiment, loops: int, rule: Rule) -> ScalingPlan:
    """What a run's rewrite does, tried once before workers start: an error shows here, not in a worker."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = experiment.make_model(loops)
        inputs, _ = next(experiment.batches(0))
        return parametrize(model, inputs, rule, experiment.lam, experiment.base_layers)


def _multipliers(experiment: Experiment, loops: int, rule: Rule) -> object:
    """Everything by which a rule changes a run: multipliers, and the optimizer's factors."""
    plan = trial_plan(experiment, loops, rule)
    factor = 1.0 if rule == "unscaled" else plan.depth_multiplier
    return factor, tuple((branch.module, branch.multiplier) for branch in plan.branches)


def _by_rule(
    loops: Sequence[int] | Mapping[Rule, Sequence[int]], rules: Sequence[Rule]
) -> Mapping[Rule, Sequence[int]]:
    mapping: Mapping[Rule, Sequence[int]] = loops if isinstance(loops, Mapping) else dict.fromkeys(rules, loops)
    for rule in mapping:
        check_rule(rule)
    return mapping


def _loop_counts(loops: Sequence[int]) -> list[int]:
    wrong = [count for count in loops if not isinstance(count, int) or count < 1]
    if wrong or not loops or len(set(loops)) < len(loops):
        raise InputError(
            f"loops is {wrong[0] if wrong else loops!r}; loop counts are whole numbers from 1 up, each once"
        )
    return list(loops)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds is {seeds!r}; give a count from 1 up, or seeds that all differ")
    return chosen
