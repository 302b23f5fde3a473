"""The gate: a few short trainings that confirm, at every commit, that stored optima still hold."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from looptransfer.checks import check_count
from looptransfer.errors import InputError, explained_in
from looptransfer.rules import Rule, check_rule
from looptransfer.transfer.baseline import PATH, Baseline
from looptransfer.transfer.bracket import bracket_optimum, first_seeds, stored_lrs
from looptransfer.transfer.comparison import ComparedOptimum, Comparison
from looptransfer.transfer.repeats import SHARE, Repeat, are_noise, are_same, are_small, confirmed, runs_to_repeat
from looptransfer.transfer.results import COLUMNS, tidy
from looptransfer.transfer.stored import StoredOptimum
from looptransfer.trials.devices import slots
from looptransfer.trials.function import as_trainable
from looptransfer.trials.ledger import Ledger
from looptransfer.trials.run import Run
from looptransfer.trials.search import Losses
from looptransfer.trials.sweep import open_ledger, request_for
from looptransfer.trials.workers import run_search


@dataclass(frozen=True)
class GateSearch:
    """Stored runs made again; where a loss differs, a control; where float noise does not explain it, the bracket.

    The bracket takes half of its seeds first, and the others where these do not tell.

    Attributes:
        seeds: of the bracket.
        loss_tolerance: in the unit of the loss.
        confidence: of the two-sided intervals.
    """

    optima: Sequence[StoredOptimum]
    rule: Rule
    seeds: Sequence[int]
    loss_tolerance: float
    confidence: float

    def wanted(self, done: Losses) -> Sequence[Run]:
        """The runs of all optima, those of the largest N first."""
        return [
            run for stored in sorted(self.optima, key=lambda stored: -stored.n) for run in self._of(stored, done)[0]
        ]

    def bracket(self, stored: StoredOptimum, done: Losses) -> list[Run]:
        """Half, once and twice the stored LR, with as many seeds as are needed."""
        lrs = stored_lrs(stored)
        for seeds in (self.seeds[: first_seeds(len(self.seeds))], self.seeds):
            runs = {str(seed): [Run(self.rule, stored.n, lr, seed) for lr in lrs] for seed in seeds}
            if not done.keys() >= {run for of_seed in runs.values() for run in of_seed}:
                break
            losses = {seed: [done[run] for run in of_seed] for seed, of_seed in runs.items()}
            table = pd.DataFrame(losses, index=[math.log2(lr) for lr in lrs])
            if bracket_optimum(stored, table, self.loss_tolerance, self.confidence).answer != "INCONCLUSIVE":
                break
        return [run for of_seed in runs.values() for run in of_seed]

    def confirmed(self, done: Losses) -> dict[int, ComparedOptimum]:
        """The findings, by N, on the optima whose stored runs gave their losses again."""
        findings = {}
        for stored in self.optima:
            if repeats := self._of(stored, done)[1]:
                findings[stored.n] = confirmed(stored, repeats, self._gaps(repeats, done))
        return findings

    def _of(self, stored: StoredOptimum, done: Losses) -> tuple[list[Run], Sequence[Repeat]]:
        """The runs of an optimum, and the stored ones that confirm it; these are none until they do."""
        repeats = runs_to_repeat(stored)
        if not repeats:
            return self.bracket(stored, done), []
        half, once = repeats[:1], repeats[1:]
        runs, explained = self._look(half, SHARE * self.loss_tolerance, done)
        for count in range(1, len(once) + 1):
            further, explained_once = self._look(once[:count], self.loss_tolerance, done)
            runs = list(dict.fromkeys([*runs, *further]))
            if explained is None or explained_once is None:
                return runs, []
            if explained and explained_once:
                return runs, [*half, *once[:count]]
            if not explained:
                break
        return [*runs, *self.bracket(stored, done)], []

    def _look(self, repeats: Sequence[Repeat], limit: float, done: Losses) -> tuple[list[Run], bool | None]:
        """The runs that say whether float noise explains the gaps of stored ones, and, once all are done, whether."""
        runs = [self._run(repeat) for repeat in repeats]
        if not done.keys() >= set(runs):
            return runs, None
        gaps = self._gaps(repeats, done)
        if are_same(repeats, gaps):
            return runs, True
        if not are_small(gaps, limit):
            return runs, False
        controls = [replace(run, lr=repeat.control_lr) for run, repeat in zip(runs, repeats, strict=True)]
        if not done.keys() >= set(controls):
            return [*runs, *controls], None
        differences = [done[control] - done[run] for control, run in zip(controls, runs, strict=True)]
        return [*runs, *controls], are_noise(gaps, differences)

    def _run(self, repeat: Repeat) -> Run:
        return Run(self.rule, repeat.n, repeat.lr, repeat.seed)

    def _gaps(self, repeats: Sequence[Repeat], done: Losses) -> list[float]:
        return [repeat.gap(done[self._run(repeat)]) for repeat in repeats]


@explained_in("ci.md")
def gate(
    train: Any,
    baseline: str | Path | Baseline = PATH,
    loops: Sequence[int] | None = None,
    seeds: int = 6,
    rule: Rule = "factored",
    ledger: str | Path | None = None,
    workers: int | None = None,
    loss_tolerance: float | None = None,
    confidence: float = 0.90,
    devices: str | None = None,
    limit: float | None = None,
) -> Comparison:
    """Train a few times around the stored LR optimum of some N, and say whether it holds.

    First a few of the stored runs are made again, one seed at about half and once the stored LR: where their losses are
    the same, or differ by no more than float noise explains, the optimum holds. Elsewhere half, once and twice the
    stored LR are trained with half of `seeds` seeds, then with the others where these do not tell, and the optimum
    should still lie between.

    Args:
        train: what is trained, as `tune` takes it.
        baseline: stored optima, or their file.
        loops: which of the stored N; default the smallest and the largest.
        seeds: how many for the bracket at most, two at least; the baseline's first, so that they are paired with it.
        rule: the scaling rule.
        ledger: where finished runs are kept; default nowhere, since runs of other code would say nothing of this one.
        workers: as `tune` takes it.
        devices: as `tune` takes it.
        limit: as `tune` takes it.
        loss_tolerance: by how much the loss at the stored LR may become worse; default as the baseline has it.
        confidence: of the two-sided intervals.

    Raises:
        InputError: as `Baseline.read`, `Trainable.check` and `run_search`; an N that is not stored, or one seed.
        FailedRunError: a run failed; an InputError and a RuntimeError.
    """
    check_rule(rule)
    experiment = as_trainable(train)
    stored_in = baseline if isinstance(baseline, Baseline) else Baseline.read(baseline)
    if stored_in.axis != "loops":
        raise InputError(f"{stored_in.path} has optima over {stored_in.axis}; training needs those over loops")
    check_count("seeds", seeds, 2)  # one cannot tell noise from a shift
    stored = stored_in.fitted(rule)
    counts = _counts(list(stored), loops, stored_in.path)
    chosen = _seeds({seed for n in counts for seed in stored[n].loss_by_seed or ()}, seeds)
    tolerance = stored_in.loss_tolerance if loss_tolerance is None else loss_tolerance
    search = GateSearch([stored[n] for n in counts], rule, chosen, tolerance, confidence)
    with TemporaryDirectory(prefix="looptransfer-") as folder:
        first = list(search.wanted({}))
        at_most = [Run(rule, n, lr, seed) for n in counts for lr in stored_lrs(stored[n]) for seed in chosen]
        places = slots(devices, workers)
        study, _ = open_ledger(experiment, [*first, *at_most], ledger or Path(folder, "gate.db"), places[0])
        _ask(study, first)
        run_search(experiment, search, study, places, limit, "gate", alone=workers is None)
        holding = search.confirmed(study.losses)
        bracket = [run for n in counts if n not in holding for run in search.bracket(stored[n], study.losses)]
        _ask(study, bracket)
    table = tidy(pd.DataFrame([study.finished[run] for run in bracket or first], columns=COLUMNS))
    table.attrs["experiment"] = experiment.identity()
    return stored_in.bracket(table, rule, tolerance, confidence, counts, holding)


def _ask(study: Ledger, runs: Sequence[Run]) -> None:
    """Keep which runs the ledger is read for: all but the controls, whose LRs are no LRs of their own."""
    for (rule, loops), group in groupby(sorted(runs), key=lambda run: (run.rule, run.loops)):
        of_optimum = list(group)
        lrs, seeds = {run.lr for run in of_optimum}, {run.seed for run in of_optimum}
        study.ask(request_for([(rule, loops, rule)], lrs, seeds))


def _counts(stored: Sequence[int], loops: Sequence[int] | None, path: str) -> list[int]:
    """The loop counts to look at, of those that are stored."""
    if loops is None:
        return sorted({stored[0], stored[-1]})
    missing = [n for n in loops if n not in stored]
    if missing or not loops:
        raise InputError(f"{path} has no optimum of N = {missing or loops}; choose from {', '.join(map(str, stored))}")
    return sorted(set(loops))


def _seeds(names: Iterable[str], count: int) -> list[int]:
    """The first seeds of the baseline, and new ones behind them where it has too few."""
    stored = sorted(int(name) for name in names if name.isdecimal())
    new = range(max(stored, default=-1) + 1, max(stored, default=-1) + 1 + count)
    return [*stored, *new][:count]
