"""The cheap mode of the gate: a few short trainings that confirm, at every commit, that stored optima still hold."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from looptransfer.errors import InputError
from looptransfer.rules import Rule, check_rule
from looptransfer.transfer.baseline import PATH, Baseline
from looptransfer.transfer.bracket import stored_lrs
from looptransfer.transfer.comparison import Comparison
from looptransfer.transfer.results import COLUMNS, tidy
from looptransfer.trials.function import as_trainable
from looptransfer.trials.run import Run
from looptransfer.trials.search import Grid
from looptransfer.trials.sweep import open_ledger
from looptransfer.trials.workers import run_search


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
    """Train at half, once and twice the stored LR optimum of some N, and say whether the optimum is still bracketed.

    Args:
        train: what is trained, as `tune` takes it.
        baseline: stored optima, or their file.
        loops: which of the stored N; default the smallest and the largest.
        seeds: how many, two at least; the first ones of the baseline, so that they are paired with it.
        rule: the scaling rule.
        ledger: where finished runs are kept; default nowhere, since runs of other code would say nothing of this one.
        workers, devices, limit: as `tune` takes them.
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
    if seeds < 2:
        raise InputError(f"seeds is {seeds}; give two or more, since one cannot tell noise from a shift")
    stored = stored_in.fitted(rule)
    wanted = _wanted(list(stored), loops, stored_in.path)
    chosen = _seeds({seed for at in wanted for seed in stored[at].loss_by_seed or ()}, seeds)
    runs = [Run(rule, at, lr, seed) for at in wanted for lr in stored_lrs(stored[at]) for seed in chosen]
    with TemporaryDirectory(prefix="looptransfer-") as folder:
        study, _ = open_ledger(experiment, runs, ledger or Path(folder, "gate.db"), workers, devices)
        run_search(experiment, Grid(runs), study, workers, devices, limit, called="gate")
    table = tidy(pd.DataFrame([study.finished[run] for run in runs], columns=COLUMNS))
    table.attrs["experiment"] = experiment.identity()
    return stored_in.bracket(table, rule, loss_tolerance, confidence, wanted)


def _wanted(there: Sequence[int], loops: Sequence[int] | None, path: str) -> list[int]:
    if loops is None:
        return sorted({there[0], there[-1]})
    missing = [at for at in loops if at not in there]
    if missing or not loops:
        raise InputError(f"{path} has no optimum of N = {missing or loops}; choose from {', '.join(map(str, there))}")
    return sorted(set(loops))


def _seeds(names: Iterable[str], count: int) -> list[int]:
    """The first seeds of the baseline, and new ones behind them where it has too few."""
    stored = sorted(int(name) for name in names if name.isdecimal())
    new = range(max(stored, default=-1) + 1, max(stored, default=-1) + 1 + count)
    return [*stored, *new][:count]
