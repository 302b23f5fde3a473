"""Judge a table of runs: every rule in it, the one asked for against its controls, and what else to know."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from looptransfer.errors import InputError
from looptransfer.transfer import advice, drift
from looptransfer.transfer.judge import Terms, judge_tables, outside, shape_changes
from looptransfer.transfer.optimum import Interval, Optimum, curve, curve_height, t_interval
from looptransfer.transfer.results import at_horizon, tidy
from looptransfer.transfer.verdict import LOSS, METRIC, NATS, Difference, RuleVerdict, Verdict

REGRET_NATS = 0.02
REGRET_SHARE = 0.05  # of the curve's height, where the loss is not in nats: about what 0.02 nats are of the usual basin
LARGE_OF_HEIGHT = 0.25  # a bowl is that high 1.25 octaves from its vertex, beyond which no fit is trusted
LARGE_OF_LOSS = 0.1
MOST_NAMED = 8  # LRs in a note
HORIZONS = (0.5, 0.75)  # shares of the training at which the optimum is shown beside that at its end


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
    below `regret_tolerance`. DRIFTS: the interval of the drift lies outside, and so does the drift by the other fits;
    an optimum that is censored takes no part, and three known ones are then needed. Otherwise INCONCLUSIVE, with the
    runs that would settle it; so is a rule that is flat where every control is flat too.

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
    _check_terms(tolerance, regret_tolerance, confidence, transferred_lr)
    if maximize and results.attrs.get("maximize") is False:
        raise InputError("the study minimizes its value; leave out --maximize")
    maximize = maximize or bool(results.attrs.get("maximize"))
    steps = tidy(results, axis)
    if maximize:
        steps["loss"] = (-steps["loss"]).mask(steps["diverged"], math.inf)
    runs = at_horizon(steps, axis)
    present = list(dict.fromkeys(runs["rule"]))
    if rule is None:
        rule = "factored" if "factored" in present or len(present) > 1 else present[0]
    if rule not in present:
        raise InputError(f"rule {rule!r} is not in the table, which has {', '.join(present)}; choose one with --rule")
    tables = _tables(runs[runs["rule"] == rule], axis)
    height = _height(tables)
    unit = unit or (METRIC if maximize else results.attrs.get("unit")) or _unit(height, tables)
    regret_tolerance = regret_tolerance or _regret_tolerance(unit, height)
    terms = Terms(axis, transferred_lr, tolerance, regret_tolerance, confidence)
    order = [rule, *(name for name in present if name != rule)]
    verdicts = {name: _judge(name, steps[steps["rule"] == name], runs[runs["rule"] == name], terms) for name in order}
    differences = tuple(_difference(verdicts[rule], verdicts[name], terms) for name in order[1:])
    verdicts[rule] = _with_power(verdicts, rule, runs, terms)
    proxy = verdicts[rule].optima[0].log2_lr
    carried = 2.0**proxy.estimate if transferred_lr is None and proxy is not None else transferred_lr
    notes = (*_notes(runs, terms), *(note for one in verdicts.values() for note in _shape_notes(one, terms)))
    left_out = results.attrs.get("left_out")
    notes = (*notes, str(left_out)) if left_out else notes
    return Verdict(
        rule,
        axis,
        carried,
        tolerance,
        regret_tolerance,
        confidence,
        verdicts,
        differences,
        notes,
        unit=unit,
        source=str(results.attrs.get("source", "")),
        grows=results.attrs.get("grows"),
        rows=len(steps),
        runs=runs,
    )


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


def _regret_tolerance(unit: str, height: float | None) -> float:
    return REGRET_NATS if unit == NATS or height is None else REGRET_SHARE * height


def _check_terms(
    tolerance: float, regret_tolerance: float | None, confidence: float, transferred_lr: float | None
) -> None:
    for name, value, top in (
        ("tolerance", tolerance, math.inf),
        ("regret_tolerance", REGRET_NATS if regret_tolerance is None else regret_tolerance, math.inf),
        ("confidence", confidence, 1.0),
        ("transferred_lr", 1.0 if transferred_lr is None else transferred_lr, math.inf),
    ):
        if not 0 < value < top:
            raise InputError(f"{name} is {value!r}; it must lie between 0 and {top:g}")


def _judge(rule: str, steps: pd.DataFrame, runs: pd.DataFrame, terms: Terms) -> RuleVerdict:
    tables = _tables(runs, terms.axis)
    first = next(iter(tables.values()))
    shifts = tuple(drift.curve_shift(table, first, terms.confidence) for table in tables.values())
    return replace(judge_tables(rule, tables, terms), shifts=shifts, horizons=_horizons(steps, terms))


def _tables(runs: pd.DataFrame, axis: str) -> dict[int, pd.DataFrame]:
    return {int(str(at)): curve(group) for at, group in runs.groupby(axis)}


def _horizons(steps: pd.DataFrame, terms: Terms) -> dict[float, tuple[Optimum, ...]]:
    """The optima at earlier shares of the training and at its end; nothing where the table has no steps."""
    if "step" not in steps or steps["step"].nunique() < 2:
        return {}
    return {
        share: drift.find_optima(
            _tables(at_horizon(steps, terms.axis, share), terms.axis), terms.confidence, terms.regret_tolerance
        )
        for share in (*HORIZONS, 1.0)
    }


def _with_power(verdicts: Mapping[str, RuleVerdict], rule: str, runs: pd.DataFrame, terms: Terms) -> RuleVerdict:
    """A rule that is flat where every control is flat as well says nothing for the rule."""
    judged, controls = verdicts[rule], [one for name, one in verdicts.items() if name != rule]
    if judged.answer != "FLAT" or not controls or any(one.answer != "FLAT" for one in controls):
        return judged
    names = ", ".join(one.rule for one in controls)
    reason = (
        f"No power: the control ({names}) is as flat, so this sweep could not have seen a drift that the rule mends."
    )
    words = f"run a {terms.label} four times as large, where a control drifts"
    tables = _tables(runs[runs["rule"] == rule], terms.axis)
    further = advice.larger_n(tables, 4)
    return replace(judged, answer="INCONCLUSIVE", cause="no power", reason=reason, advice=words, further_runs=further)


def _difference(ours: RuleVerdict, control: RuleVerdict, terms: Terms) -> Difference:
    known = {o.at: o for o in ours.optima if o.censored is None}
    theirs = {o.at: o for o in control.optima if o.censored is None}
    shared = sorted(known.keys() & theirs.keys())
    mine = drift.drift_by_seed([known[n] for n in shared])
    other = drift.drift_by_seed([theirs[n] for n in shared])
    regret = None
    if ours.optima[-1].at == control.optima[-1].at:
        regret = _paired(control.regret_by_seed, ours.regret_by_seed, terms.confidence)
    return Difference(control.rule, _paired(other, mine, terms.confidence), regret)


def _paired(theirs: pd.Series | None, ours: pd.Series | None, confidence: float) -> Interval | None:
    if theirs is None or ours is None:
        return None
    gaps = (theirs - ours).dropna()
    if len(gaps) < 2:
        return None
    return t_interval(gaps, confidence) if np.isfinite(gaps).all() else Interval(math.inf, math.inf, math.inf)


def _notes(runs: pd.DataFrame, terms: Terms) -> list[str]:
    notes = []
    if "fingerprint" in runs and runs["fingerprint"].nunique() > 1:
        notes.append(f"the rows come from {runs['fingerprint'].nunique()} different experiments (column fingerprint)")
    for name in ("loops", "layers", "width", "steps"):
        if name != terms.axis and name in runs and runs.loc[~runs["diverged"], name].nunique() > 1:
            notes.append(f"{name} differs between the rows, so a drift in {terms.label} may be a drift in {name}")
    grid = runs.groupby(["rule", terms.axis])
    for (rule, at), group in grid:
        seeds, per_lr = group["seed"].nunique(), group.groupby("lr")["seed"].nunique()
        partial = [f"{lr:.6g}" for lr in per_lr.index[per_lr < seeds]]
        if partial:
            named = ", ".join(partial[:MOST_NAMED]) + (
                f" and {len(partial) - MOST_NAMED} more" if partial[MOST_NAMED:] else ""
            )
            notes.append(f"{rule}, {terms.label} = {at}: LR {named} is left out, not being run by all {seeds} seeds")
    return notes


def _shape_notes(one: RuleVerdict, terms: Terms) -> list[str]:
    notes = []
    trend = drift.skew_trend(one.optima, terms.confidence)
    if trend is not None and shape_changes(trend):
        notes.append(
            f"{one.rule}: the shape of the basin changes with {terms.label} (its skew by {trend.estimate:+.2f}/octave "
            f"per doubling), so the optimum may move a little more or less than the drift says"
        )
    for share, optima in one.horizons.items():
        for then, now in zip(optima, one.optima, strict=True):
            if share == HORIZONS[0] and then.by_seed is not None and now.by_seed is not None:
                moved = _paired(now.by_seed, then.by_seed, terms.confidence)
                if moved is not None and outside(moved, 0.0) and abs(moved.estimate) > terms.tolerance:
                    notes.append(
                        f"{one.rule}, {terms.label} = {now.at}: over the last half of the training the optimum still "
                        f"moved by {moved} octaves; train longer before it is transferred"
                    )
    return notes
