"""From a frame to findings: exponents held against what the rule promises, with one level for many looks.

A statistic fails when its exponent lies outside the promised range by more than the tolerance, with a p-value that
Holm's method corrects for all statistics of the rule, so that the chance of one false alarm or more in a whole check is
at most `level`. It passes when its 90 % t-interval over seeds lies inside (two one-sided tests at 5 %); that needs no
correction, since the check passes only where all statistics do.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtr

from looptransfer.coordcheck.exponents import Array, exponent_table, fit_exponents, holm, on_axis
from looptransfer.coordcheck.promises import Promise, promises
from looptransfer.coordcheck.readings import reading
from looptransfer.coordcheck.recommend import CONFIDENCE
from looptransfer.coordcheck.result import OUTSIDE, Answer, Context, CoordCheck, Finding
from looptransfer.rules import RULES, depth_factors
from looptransfer.transfer.optimum import t_interval

LEVEL_TOLERANCE = 0.1  # octaves, of a step's size against the other parameters'
LOST_TO_EPS = 0.1  # share of Adam's step
EXACT = 2 / 3  # what a multiplier alone decides scatters less, and gets less of the tolerance
UNPAIRED = 2  # models of different L share no weights: their exponents scatter, and get twice the tolerance
SURE = 1e-12  # standard error below which an estimate has no noise
LEVELS = {"lost_to_eps", "step_ratio"}  # statistics that are judged as they are, and not by an exponent


def judge_frame(
    frame: pd.DataFrame,
    rules: Sequence[str],
    context: Context,
    tolerance: float = 0.15,
    level: float = 0.05,
    cosines: dict[tuple[str, int, int], Array] | None = None,
) -> CoordCheck:
    """Hold a frame of `coord_check` against what its rules promise; the first rule is the one that counts."""
    findings: list[Finding] = []
    for rule in rules:
        rows = frame[frame["rule"] == rule]
        measured = [*_exponents(rows, rule, context, tolerance), *_levels(rows, rule, context)]
        adjusted = holm([value.p_value for value in measured])
        findings += [_finding(value, p, level, context) for value, p in zip(measured, adjusted, strict=True)]
    return CoordCheck(rules[0], tuple(rules), tuple(findings), frame, cosines or {}, context, tolerance, level)


@dataclass(frozen=True)
class _Measured:
    """A finding before it is corrected for the others."""

    rule: str
    promise: Promise
    module: str
    values: Array | None  # an exponent per seed; None where something was not finite
    tolerance: float
    trouble: str = ""

    @property
    def low(self) -> float:
        """The lowest exponent that is tolerated."""
        return self.promise.low - self.tolerance

    @property
    def high(self) -> float:
        """The highest exponent that is tolerated."""
        return self.promise.high + self.tolerance

    @property
    def p_value(self) -> float:
        """One-sided, against an exponent at the edge of the promised range and its tolerance."""
        if self.values is None:
            return 0.0
        mean, error = float(self.values.mean()), float(self.values.std(ddof=1)) / math.sqrt(len(self.values))
        excess = max(mean - self.high, self.low - mean)  # outside; negative inside
        if error < SURE:
            return 0.0 if excess > 1e-9 else 1.0
        return float(stdtr(len(self.values) - 1, -excess / error))


# -- exponents


def _exponents(rows: pd.DataFrame, rule: str, context: Context, tolerance: float) -> Iterator[_Measured]:
    for promise in promises(context.held_to(rule), context.adam, context.width_scaled):
        along = on_axis(rows, promise.axis)
        width = tolerance * _share(promise)
        if along[promise.axis].nunique() < 2:
            continue
        chosen = along[along["statistic"] == promise.statistic]
        for module, members in context.members(promise.where, list(chosen["module"].unique())):
            table = exponent_table(chosen[chosen["module"].isin(members)], promise, along)
            if table is None:
                continue
            bad = table.columns[~np.isfinite(table).all()]
            if len(bad):
                trouble = f"is not finite at {promise.axis} = {', '.join(map(str, bad))}"
                yield _Measured(rule, promise, module, None, width, trouble)
            elif (table > 0).all(axis=None):
                yield _Measured(rule, promise, module, fit_exponents(table), width)


def _share(promise: Promise) -> float:
    if promise.axis != "loops":
        return UNPAIRED
    return EXACT if promise.statistic == "branch_rms" and promise.which == "first" else 1.0


# -- levels: what holds at every N


def _levels(rows: pd.DataFrame, rule: str, context: Context) -> Iterator[_Measured]:
    """Steps of the branches against those outside, and what eps takes of them, after Adam's first step."""
    if not context.adam:
        return
    along = on_axis(rows, "loops")
    first = along[along["step"] == 1]
    for module, lost in _by_module(first, "lost_to_eps").items():
        promise = Promise("loops", "lost_to_eps", "branches", "one", "all", -math.inf, 0.0)
        yield _Measured(rule, promise, module, lost, LOST_TO_EPS)
    sizes = _by_module(first, "update_rms", log=True)
    if OUTSIDE not in sizes or context.width_scaled:
        return
    factors = depth_factors(context.held_to(rule), "adamw", int(along["layers"].iloc[0]), context.base_layers)
    octaves = math.log2(factors.lr)
    promise = Promise("loops", "step_ratio", "branches", "one", "all", octaves, octaves)
    for branch in context.branches:
        if branch.module in sizes:
            yield _Measured(rule, promise, branch.module, sizes[branch.module] - sizes[OUTSIDE], LEVEL_TOLERANCE)


def _by_module(rows: pd.DataFrame, statistic: str, log: bool = False) -> dict[str, Array]:
    """A statistic per seed, averaged over N; as log2 where asked for. What is not finite or positive is left out."""
    by_module = {}
    for module, group in rows[rows["statistic"] == statistic].groupby("module"):
        table = group.pivot(index="seed", columns="loops", values="value")
        table = np.log2(table.where(table > 0)) if log else table
        if np.isfinite(table).all(axis=None):
            by_module[str(module)] = table.mean(axis=1).to_numpy(dtype=float)
    return by_module


def _finding(measured: _Measured, p: float, level: float, context: Context) -> Finding:
    promise, module = measured.promise, measured.module
    interval = None if measured.values is None else t_interval(measured.values, CONFIDENCE)
    answer: Answer = "inconclusive"
    if interval is None or p <= level:
        answer = "fails"
    elif measured.low <= interval.low and interval.high <= measured.high:
        answer = "passes"
    text = f"{module}: {promise.statistic} {measured.trouble}"
    if interval is not None:
        text = reading(promise, module, interval.estimate, RULES[context.held_to(measured.rule)].visits, answer)
    axis = "level" if promise.statistic in LEVELS else promise.axis
    return Finding(
        measured.rule, axis, promise.statistic, module, promise.moment, promise.which, interval, promise.low,
        promise.high, measured.tolerance, answer, p, text,
    )  # fmt: skip
