"""Judge a table of runs: every rule in it, the one asked for against its controls, and what else to know."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd

from looptransfer.checks import check_number
from looptransfer.errors import InputError, explained_in
from looptransfer.text import short
from looptransfer.transfer import drift
from looptransfer.transfer.causes import advised
from looptransfer.transfer.judge import judge_tables, situation_of
from looptransfer.transfer.optimum import Interval, Optimum, curve_height, curves, t_interval_of_runs
from looptransfer.transfer.results import OF_A_RUN, at_horizon, axis_label, tidy
from looptransfer.transfer.rows import is_state
from looptransfer.transfer.verdict import LOSS, METRIC, NATS, Difference, RuleVerdict, Terms, Verdict

REGRET_NATS = 0.02
REGRET_SHARE = 0.05  # of the curve's height, where the loss is not in nats: about what 0.02 nats are of the usual basin
LARGE_OF_HEIGHT = 0.25  # a bowl is that high 1.25 octaves from its vertex, beyond which no fit is trusted
LARGE_OF_LOSS = 0.1
MOST_NAMED = 8  # LRs in a note; values of a setting
FEWEST = 3  # losses that are equal by no chance; LRs that have a shape
HORIZONS = (0.5, 0.75)  # shares of the training at which the optimum is shown beside that at its end


@explained_in("verdict.md")
def check(
    results: pd.DataFrame,
    rule: str | None = None,
    transferred_lr: float | None = None,
    tolerance: float = 0.20,
    regret_tolerance: float | None = None,
    confidence: float = 0.90,
    axis: str = "loops",
    maximize: bool = False,
    unit: str | None = None,
) -> Verdict:
    """Judge a table of runs; nothing is trained. (Statistics: our extension; the paper reads its plot by eye.)

    FLAT: the interval of the drift lies inside ±tolerance (an equivalence test at (1 − confidence)/2), so does the
    drift by a narrower and a wider fit, and the upper limit of the regret of the transferred LR at the largest N is
    below `regret_tolerance`, as is its lower limit at every other N. DRIFTS: the interval of the drift lies outside,
    and so does the drift by the other fits; an optimum that is censored takes no part, and three known ones are then
    needed. Otherwise INCONCLUSIVE, with the runs that would settle it; so is a rule that is flat where every control is
    flat too.

    Args:
        results: columns loops (or `axis`), lr, loss and, if there, rule, seed, diverged, step (see `tidy`).
        rule: the rule that is judged, the others being its controls; default "factored", or the only rule there.
        transferred_lr: absolute LR that is carried to large N; default the optimum at the smallest N.
        tolerance: in octaves per doubling of N.
        regret_tolerance: in the unit of the loss; also the depth of the basins. Default 0.02 where that is nats, else
            5 % of the curve's height at the largest N, which is what leaving the best LR by 2.5 octaves costs. One that
            is as large as the curve is high tells nothing: INCONCLUSIVE.
        confidence: of the two-sided intervals.
        axis: the column that plays the part of N: loops, width, layers or another of positive whole numbers.
        maximize: the loss is a metric of which more is better; it is negated. A study's direction is known.
        unit: of the loss. Default "nats", unless it is maximized, was read from a column of another name than loss, or
            0.02 would be more than a quarter of its curve's height or a tenth of the lowest loss.

    Raises:
        InputError: `tidy` refuses the table, the rule is not in it, or a number is out of range.
    """
    if not isinstance(results, pd.DataFrame):
        raise InputError(f"results is {short(results)}, no table of runs; read one with looptransfer.read_results")
    _check_terms(tolerance, regret_tolerance, transferred_lr, confidence)
    maximize = _is_maximized(results, maximize)
    steps = _turned_round(tidy(results, axis)) if maximize else tidy(results, axis)
    runs = at_horizon(steps, axis)
    present = list(dict.fromkeys(runs["rule"]))
    rule = _rule(rule, present)
    order = [rule, *(name for name in present if name != rule)]
    tables = {name: curves(runs[runs["rule"] == name], axis) for name in order}
    height = _height(tables[rule])
    unit = unit or (METRIC if maximize else results.attrs.get("unit")) or _unit(height, tables[rule])
    regret_tolerance = regret_tolerance or (REGRET_NATS if unit == NATS or height is None else REGRET_SHARE * height)
    terms = Terms(axis, transferred_lr, tolerance, regret_tolerance, confidence)
    horizons = {name: _horizons(steps[steps["rule"] == name], terms) for name in order}
    verdicts = {name: judge_tables(name, tables[name], terms, horizons[name]) for name in order}
    differences = tuple(_difference(verdicts[rule], verdicts[name], terms) for name in order[1:])
    verdicts[rule] = _with_power(verdicts, rule, terms)
    notes = (
        *_notes(runs, terms),
        *_directions(verdicts[rule], runs, maximize, terms.axis_label),
        *_late_moves(verdicts.values(), terms),
        results.attrs.get("left_out"),
    )
    proxy = verdicts[rule].log2_lr
    if transferred_lr is None and proxy is not None:
        terms = replace(terms, transferred_lr=2.0**proxy)
    return Verdict(
        **vars(terms),
        rule=rule,
        rules=verdicts,
        differences=differences,
        notes=tuple(filter(None, notes)),
        unit=unit,
        source=str(results.attrs.get("source", "")),
        grows=results.attrs.get("grows"),
        rows=len(steps),
        runs=runs,
    )


def _check_terms(
    tolerance: float | None, regret_tolerance: float | None, transferred_lr: float | None, confidence: float
) -> None:
    values = {"tolerance": tolerance, "regret_tolerance": regret_tolerance, "transferred_lr": transferred_lr}
    for name, value in values.items():
        if value is not None:
            check_number(name, value)
    check_number("confidence", confidence, 0, 1)


def _is_maximized(results: pd.DataFrame, maximize: bool) -> bool:
    """More is better: the user says so, or the study does."""
    if maximize and results.attrs.get("maximize") is False:
        raise InputError("the study minimizes its value; leave out --maximize")
    return maximize or bool(results.attrs.get("maximize"))


def _turned_round(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(loss=(-table["loss"]).mask(table["diverged"], math.inf))


def _rule(rule: str | None, present: list[str]) -> str:
    """The rule to judge: the one asked for, "factored", or the only one."""
    if rule is None:
        rule = "factored" if "factored" in present or len(present) > 1 else present[0]
    if rule not in present:
        raise InputError(f"rule {rule!r} is not in the table, which has {', '.join(present)}; choose one with --rule")
    return rule


def _height(tables: Mapping[int, pd.DataFrame]) -> float | None:
    """The height of the curve at the largest N where it is known."""
    heights = [curve_height(table) for _, table in sorted(tables.items(), reverse=True)]
    return next((height for height in heights if height is not None), None)


def _unit(height: float | None, tables: Mapping[int, pd.DataFrame]) -> str:
    """Nats, unless the tolerance in nats would be large against the curve or against the loss itself.

    No loss of a language model has so flat a basin, or is so low: it is an MSE, an error rate, or the like.
    """
    lowest = min((float(table.mean(axis=1).min()) for table in tables.values() if len(table)), default=math.inf)
    flat = height is not None and LARGE_OF_HEIGHT * height < REGRET_NATS
    return LOSS if flat or 0 < lowest < REGRET_NATS / LARGE_OF_LOSS else NATS


def _horizons(steps: pd.DataFrame, terms: Terms) -> dict[float, tuple[Optimum, ...]]:
    """The optima at earlier shares of the training and at its end, where every N has rows there."""
    if "step" not in steps or steps["step"].nunique() < 2:
        return {}
    tables = {share: curves(at_horizon(steps, terms.axis, share), terms.axis) for share in (*HORIZONS, 1.0)}
    whole = {share: table for share, table in tables.items() if table.keys() == tables[1.0].keys()}
    if len(whole) == 1:
        return {}
    return {share: drift.find_optima(table, terms.confidence, terms.regret_tolerance) for share, table in whole.items()}


def _with_power(verdicts: Mapping[str, RuleVerdict], rule: str, terms: Terms) -> RuleVerdict:
    """A rule that is flat where every control is flat as well says nothing for the rule."""
    controls = [verdict for name, verdict in verdicts.items() if name != rule]
    if any(control.answer != "FLAT" for control in controls):
        return verdicts[rule]
    measured = replace(verdicts[rule], flat_controls=tuple(control.rule for control in controls))
    return advised(measured, situation_of(measured, terms), terms)


def _difference(judged: RuleVerdict, control: RuleVerdict, terms: Terms) -> Difference:
    shared = set(judged.fitted) & set(control.fitted)
    slopes, judged_slopes = (
        drift.drift_by_seed([optimum for optimum in verdict.optima if optimum.n in shared])
        for verdict in (control, judged)
    )
    same_target = judged.optima[-1].n == control.optima[-1].n
    regret = _paired(control.regret_by_seed, judged.regret_by_seed, terms.confidence) if same_target else None
    return Difference(control.rule, _paired(slopes, judged_slopes, terms.confidence), regret)


def _paired(minuend: pd.Series | None, subtrahend: pd.Series | None, confidence: float) -> Interval | None:
    """The mean difference over the seeds that both have; None where those are fewer than two."""
    gaps = pd.Series(dtype=float) if minuend is None or subtrahend is None else (minuend - subtrahend).dropna()
    return None if len(gaps) < 2 else t_interval_of_runs(gaps, confidence)


def _notes(runs: pd.DataFrame, terms: Terms) -> Iterator[str]:
    """Notes on what in the table may stand behind a drift, or is left out of the fits."""
    label = terms.axis_label
    if "fingerprint" in runs and runs["fingerprint"].nunique() > 1:
        yield f"the rows come from {runs['fingerprint'].nunique()} different experiments (column fingerprint)"
    yield from _confounds(runs[~runs["diverged"]], terms)
    yield from _copies(runs, terms)
    for (rule, n), group in runs.groupby(["rule", terms.axis]):
        seeds, per_lr = group["seed"].nunique(), group.groupby("lr")["seed"].nunique()
        partial = [f"{lr:.6g}" for lr in per_lr.index[per_lr < seeds]]
        if partial:
            more = f" and {len(partial) - MOST_NAMED} more" if partial[MOST_NAMED:] else ""
            named = ", ".join(partial[:MOST_NAMED]) + more
            yield f"{rule}, {label} = {n}: LR {named} is left out, without a result of all {seeds} seeds"


def _confounds(runs: pd.DataFrame, terms: Terms) -> Iterator[str]:
    """A note for every setting, a column of few values, that differs between the N or the LRs of a rule."""
    label = terms.axis_label
    known = {"loops", "layers", "width", "steps"}
    for name in runs.columns.difference([*OF_A_RUN, terms.axis, "fingerprint", "run"], sort=False):
        texts = runs[name].map(str)
        numbers = pd.to_numeric(texts, errors="coerce").notna().all()
        few = texts.nunique() <= max(MOST_NAMED, runs[terms.axis].nunique()) and texts.nunique() < len(runs) / 3
        if texts.nunique() < 2 or not (few or name in known) or is_state(runs[name]):
            continue
        cells = [runs["rule"], runs[terms.axis]]
        mixed = texts.groupby([*cells, runs["seed"]]).nunique() > 1
        if not (texts.groupby(cells).nunique() > 1).any():
            if (texts.groupby(runs["rule"]).nunique() > 1).any() or name in known:
                yield f"{name} differs between the rows, so a drift in {label} may be a drift in {name}"
        elif mixed.any() and (numbers or name in known):
            n = mixed.index[mixed][0][1]
            yield f"{name} differs between the LRs of {label} = {n}, so that their losses may not be comparable"


def _copies(runs: pd.DataFrame, terms: Terms) -> Iterator[str]:
    """A note on seeds, and on N, that have the very same losses: neither the seed nor N has reached the training."""
    label = terms.axis_label
    for column, across, reason in (
        ("seed", ["rule", terms.axis, "lr"], "they are one seed, and intervals over them are too narrow"),
        (terms.axis, ["rule", "lr", "seed"], f"{label} may not have reached the training"),
    ):
        losses = runs[~runs["diverged"]].pivot_table(index=across, columns=column, values="loss")
        pairs = {pair: losses[list(pair)].dropna() for pair in pairwise(losses.columns)}
        copies = [f"{first} and {second}" for (first, second), both in pairs.items()
                  if len(both) >= FEWEST and both[first].equals(both[second].rename(first))]  # fmt: skip
        if copies:
            yield f"{axis_label(column)} {', '.join(copies)} have the same losses to the last digit: {reason}"


def _directions(judged: RuleVerdict, runs: pd.DataFrame, maximize: bool, label: str) -> Iterator[str]:
    """Notes on a metric that seems to be turned round, and on LRs that seem to be logarithms or numbers of a grid."""
    means = [table.mean(axis=1) for table in judged.tables.values() if len(table) >= FEWEST]
    ends = [(mean.index[0], mean.index[-1]) for mean in means]
    if means and all(m.idxmin() in end and m.idxmax() not in end for m, end in zip(means, ends, strict=True)):
        fix = "leave out --maximize where less is better" if maximize else "say --maximize where more is better"
        yield f"at every {label} the worst LR lies between better ones; {fix}"
    lrs = np.sort(runs["lr"].unique())
    steps = np.diff(lrs)
    if len(lrs) > FEWEST and lrs[0] >= 1 and np.allclose(steps, steps[0], rtol=1e-6):
        yield f"the LRs are {lrs[0]:g}, {lrs[1]:g}, … {lrs[-1]:g}, evenly spaced: are they logarithms of the LR?"


def _late_moves(verdicts: Iterable[RuleVerdict], terms: Terms) -> Iterator[str]:
    """A note for every N whose optimum still moved by more than the tolerance over the last half of the training."""
    for verdict in verdicts:
        for halfway, end in zip(verdict.horizons.get(HORIZONS[0], ()), verdict.optima, strict=False):
            moved = _paired(end.by_seed, halfway.by_seed, terms.confidence)
            if moved is not None and moved.outside(0.0) and abs(moved.estimate) > terms.tolerance:
                yield (
                    f"{verdict.rule}, {terms.axis_label} = {end.n}: over the last half of the training the optimum "
                    f"still moved by {moved} octaves; train longer before it is transferred"
                )
