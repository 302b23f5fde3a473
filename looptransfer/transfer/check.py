"""Judge a table of runs: every rule in it, the one asked for against its controls, and what else to know."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from looptransfer.checks import check_number
from looptransfer.errors import InputError, explained_in
from looptransfer.text import short
from looptransfer.transfer import drift
from looptransfer.transfer.causes import advised
from looptransfer.transfer.judge import judge_tables, situation_of
from looptransfer.transfer.notes import HALFWAY, notes
from looptransfer.transfer.optimum import Optimum, curve_height, curves, paired_interval
from looptransfer.transfer.results import at_horizon, tidy
from looptransfer.transfer.verdict import LOSS, METRIC, NATS, Difference, RuleVerdict, Terms, Verdict

REGRET_NATS = 0.02
REGRET_SHARE = 0.05  # of the curve's height, where the loss is not in nats: about what 0.02 nats are of the usual basin
LARGE_OF_HEIGHT = 0.25  # a bowl is that high 1.25 octaves from its vertex, beyond which no fit is trusted
LARGE_OF_LOSS = 0.1
HORIZONS = (HALFWAY, 0.75)  # shares of the training at which the optimum is shown beside that at its end


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
    remarks = (*notes(runs, verdicts, rule, terms, maximize), results.attrs.get("left_out"))
    proxy = verdicts[rule].log2_lr
    if transferred_lr is None and proxy is not None:
        terms = replace(terms, transferred_lr=2.0**proxy)
    return Verdict(
        **vars(terms),
        rule=rule,
        rules=verdicts,
        differences=differences,
        notes=tuple(filter(None, remarks)),
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
    regret = paired_interval(control.regret_by_seed, judged.regret_by_seed, terms.confidence) if same_target else None
    return Difference(control.rule, paired_interval(slopes, judged_slopes, terms.confidence), regret)
