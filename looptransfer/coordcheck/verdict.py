"""What a coordinate check came to: exponents with intervals, held against what the rule promises, in plain words.

One look is not many: a statistic fails when its exponent lies outside the promised range by more than the tolerance,
with a p-value that Holm's method corrects for all statistics of the rule, so that the chance of one false alarm or more
in a whole check is at most `level`. It passes when its 90 % t-interval over seeds lies inside (two one-sided tests at
5 %); that needs no correction, since the check passes only where all statistics do.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import stdtr

from looptransfer.coordcheck.exponents import Array, exponent_table, fit_exponents, holm, on_axis
from looptransfer.coordcheck.promises import EXPONENTS, Axis, Moment, Promise, Which, promises
from looptransfer.coordcheck.readings import reading
from looptransfer.errors import InputError
from looptransfer.transfer.optimum import Interval, t_interval

SCHEMA_VERSION = 1
CONFIDENCE = 0.90  # of the intervals shown
LEVEL_TOLERANCE = 0.1  # octaves, of a step's size against the other parameters'
LOST_TO_EPS = 0.1  # share of Adam's step
EXACT = 2 / 3  # what a multiplier alone decides scatters less, and gets less of the tolerance
UNPAIRED = 2  # models of different L share no weights: their exponents scatter, and get twice the tolerance
PER_VISIT = {"branch_rms", "added_rms", "stream_rms", "attention_logit_rms"}
OUTPUT, OUTSIDE, ON_STREAM = "output", "outside", "on stream"

Answer = Literal["passes", "fails", "inconclusive"]


@dataclass(frozen=True)
class Branch:
    """A residual branch as the check found it in the model with most loops."""

    module: str
    layer: str
    visits: int


@dataclass(frozen=True)
class Context:
    """What the verdict must know beside the frame. Branches stand in the order in which they are added."""

    branches: tuple[Branch, ...]
    base_layers: int = 1
    adam: bool = True
    width_scaled: bool = False  # μP sets LRs by width, so steps of different parameters differ

    @property
    def looped(self) -> list[str]:
        """The branches that are visited more than once."""
        return [branch.module for branch in self.branches if branch.visits > 1]

    def modules(self, where: str, present: Sequence[str]) -> list[str]:
        """Which of the frame's modules a promise speaks of."""
        names = [branch.module for branch in self.branches]
        chosen = {
            "looped": self.looped,
            "once": [name for name in names if name not in self.looped],
            "final": names[-1:],
            "branches": names,
            "attention": [name for name in present if name not in {OUTPUT, OUTSIDE, ON_STREAM}],
        }
        return [name for name in chosen.get(where, [where]) if name in set(present)]

    def members(self, where: str, present: Sequence[str]) -> list[tuple[str, list[str]]]:
        """The same with what each stands for: itself, or all of its kind taken together."""
        if not where.startswith("all "):
            return [(name, [name]) for name in self.modules(where, present)]
        together = self.modules(where.removeprefix("all "), present)
        return [(where, together)] if together else []


@dataclass(frozen=True)
class Finding:
    """One statistic of one module: what was measured, what was promised, and what that says.

    `exponent` is that of the axis, or the value itself where `axis` is "level"; None where it is not finite.
    `p` is the corrected p-value of lying outside the promised range by more than the tolerance.
    """

    rule: str
    axis: str
    statistic: str
    module: str
    moment: str
    which: str
    exponent: Interval | None
    low: float
    high: float
    tolerance: float
    answer: Answer
    p: float
    reading: str

    @property
    def promised(self) -> str:
        """The range in short."""
        if math.isinf(self.low):
            return f"≤ {self.high:g}"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} … {self.high:g}"


@dataclass(frozen=True)
class CoordCheck:
    """The result. `frame` is tidy; `cosines` holds the matrix of increments, mean over seeds, by (rule, N, step)."""

    rule: str
    rules: tuple[str, ...]
    findings: tuple[Finding, ...]
    frame: pd.DataFrame = field(repr=False, compare=False)
    cosines: dict[tuple[str, int, int], Array] = field(repr=False, compare=False)
    context: Context
    tolerance: float
    level: float

    @property
    def judged(self) -> list[Finding]:
        """The findings of the rule that was asked for."""
        return [one for one in self.findings if one.rule == self.rule]

    @property
    def failures(self) -> list[Finding]:
        """What does not keep its promise."""
        return [one for one in self.judged if one.answer == "fails"]

    @property
    def answer(self) -> str:
        """PASSES, FAILS or INCONCLUSIVE."""
        if self.failures:
            return "FAILS"
        return "PASSES" if all(one.answer == "passes" for one in self.judged) else "INCONCLUSIVE"

    @property
    def passed(self) -> bool:
        """Every statistic keeps its promise."""
        return self.answer == "PASSES"

    @property
    def exit_status(self) -> int:
        """0 passes, 1 fails, 3 inconclusive."""
        return {"PASSES": 0, "FAILS": 1, "INCONCLUSIVE": 3}[self.answer]

    @property
    def reasons(self) -> list[str]:
        """The readings that matter, the plainest first: one of every statistic of a module."""
        chosen = self.failures or [one for one in self.judged if one.answer == "inconclusive"]
        first: dict[tuple[str, str], str] = {}
        for one in sorted(chosen, key=_plainness):
            first.setdefault((one.statistic, one.module), one.reading)
        return list(dict.fromkeys(first.values()))

    def exponent(
        self,
        statistic: str,
        module: str | None = None,
        *,
        axis: Axis = "loops",
        moment: Moment = "init",
        which: Which = "last",
        rule: str | None = None,
    ) -> Interval:
        """The growth exponent of any statistic in the frame along an axis, with its 90 % t-interval over seeds.

        Args:
            statistic: a name in the frame; what changes has no value at initialisation, take moment "one" or "end".
            module: a module in the frame; default the last branch.
            axis: "loops", "layers" or "width".
            moment: "init", "one" (after one step) or "end".
            which: the "first" or "last" visit, or "all" as their root mean square.
            rule: default the one judged.

        Raises:
            InputError: the frame has no finite positive values for it at two places of the axis or more.
        """
        rows = on_axis(self.frame[self.frame["rule"] == (rule or self.rule)], axis)
        mine = rows[(rows["statistic"] == statistic) & (rows["module"] == (module or self.context.branches[-1].module))]
        table = exponent_table(mine, Promise(axis, statistic, "final", moment, which, 0, 0), rows)
        if table is None or table.shape[1] < 2 or not ((table > 0) & np.isfinite(table)).all(axis=None):
            raise InputError(
                f"there is no finite {statistic} above 0 at two or more values of {axis} for module {module!r} at "
                f"moment {moment!r}; the frame has {', '.join(sorted(rows['statistic'].unique()))}"
            )
        return t_interval(fit_exponents(table), CONFIDENCE)

    def __str__(self) -> str:
        head = f"coordinate check, {self.rule}: {self.answer} ({len(self.judged)} statistics, level {self.level:g})"
        shown = [*self.failures, *(one for one in self.judged if one.answer == "inconclusive")] or self.judged
        rows = [("statistic", "module", "when", "exponent", "promised", "answer")]
        rows += [_row(one) for one in sorted(shown, key=_plainness)]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        table = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[5]]) for row in rows]
        return "\n".join([head, *(f"- {reason}" for reason in self.reasons), *table])

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values; the frame is not in it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "rule": self.rule,
            "answer": self.answer,
            "reasons": self.reasons,
            "tolerance": self.tolerance,
            "level": self.level,
            "confidence": CONFIDENCE,
            "findings": [_as_json(one) for one in self.findings],
        }


def judge(
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
        findings += _corrected([*_exponents(rows, rule, context, tolerance), *_levels(rows, rule, context)], level)
    return CoordCheck(rules[0], tuple(rules), tuple(findings), frame, cosines or {}, context, tolerance, level)


# -- exponents


@dataclass(frozen=True)
class _Measured:
    """A finding before it is corrected for the others."""

    rule: str
    promise: Promise
    module: str
    values: Array | None  # an exponent per seed; None where something was not finite
    tolerance: float
    trouble: str = ""


def _exponents(rows: pd.DataFrame, rule: str, context: Context, tolerance: float) -> Iterator[_Measured]:
    for promise in promises(rule, context.adam, context.width_scaled):
        along = on_axis(rows, promise.axis)
        width = tolerance * _share(promise)
        if along[promise.axis].nunique() < 2:
            continue
        here = along[along["statistic"] == promise.statistic]
        for module, members in context.members(promise.where, list(here["module"].unique())):
            mine = here[here["module"].isin(members)]
            table = exponent_table(mine, promise, along)
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
    first = along[(along["step"] == 1)]
    for module, lost in _by_module(first, "lost_to_eps").items():
        promise = Promise("loops", "lost_to_eps", "branches", "one", "all", -math.inf, 0.0)
        yield _Measured(rule, promise, module, lost, LOST_TO_EPS)
    sizes = _by_module(first, "update_rms", log=True)
    if OUTSIDE not in sizes or context.width_scaled:
        return
    shrink = 0.0 if rule == "unscaled" else 0.5 * -math.log2(int(along["layers"].iloc[0]) / context.base_layers) + 0.0
    promise = Promise("loops", "step_ratio", "branches", "one", "all", shrink, shrink)
    for branch in context.branches:
        if branch.module in sizes:
            yield _Measured(rule, promise, branch.module, sizes[branch.module] - sizes[OUTSIDE], LEVEL_TOLERANCE)


def _by_module(rows: pd.DataFrame, statistic: str, log: bool = False) -> dict[str, Array]:
    """A statistic per seed, averaged over N; as log2 where asked for. What is not finite or positive is left out."""
    found = {}
    for module, mine in rows[rows["statistic"] == statistic].groupby("module"):
        table = mine.pivot(index="seed", columns="loops", values="value")
        table = np.log2(table.where(table > 0)) if log else table
        if np.isfinite(table).all(axis=None):
            found[str(module)] = table.mean(axis=1).to_numpy(dtype=float)
    return found


# -- many looks


def _corrected(measured: Sequence[_Measured], level: float) -> list[Finding]:
    adjusted = holm([_p_value(one) for one in measured])
    return [_finding(one, p, level) for one, p in zip(measured, adjusted, strict=True)]


def _p_value(one: _Measured) -> float:
    """One-sided, against an exponent at the edge of the promised range and its tolerance."""
    if one.values is None:
        return 0.0
    outside = _outside(one)
    mean, deviation = float(one.values.mean()), float(one.values.std(ddof=1))
    excess = outside if outside else _inside(one, mean)
    error = deviation / math.sqrt(len(one.values))
    if error < 1e-12:
        return 0.0 if excess > 1e-9 else 1.0
    return float(stdtr(len(one.values) - 1, -excess / error))


def _outside(one: _Measured) -> float:
    """How far the mean lies outside the promised range and its tolerance; 0 inside."""
    assert one.values is not None
    mean = float(one.values.mean())
    return max(0.0, mean - one.promise.high - one.tolerance, one.promise.low - one.tolerance - mean)


def _inside(one: _Measured, mean: float) -> float:
    return -min(one.promise.high + one.tolerance - mean, mean - one.promise.low + one.tolerance)


def _finding(one: _Measured, p: float, level: float) -> Finding:
    promise = one.promise
    interval = None if one.values is None else t_interval(one.values, CONFIDENCE)
    low, high = promise.low - one.tolerance, promise.high + one.tolerance
    answer: Answer = "inconclusive"
    if interval is None or p <= level:
        answer = "fails"
    elif low <= interval.low and interval.high <= high:
        answer = "passes"
    alpha = EXPONENTS.get(one.rule, 1.0)
    words = f"{one.module}: {promise.statistic} {one.trouble}" if interval is None else ""
    if interval is not None:
        words = reading(promise, one.module, interval.estimate, alpha, answer)
    axis = "level" if promise.statistic in {"lost_to_eps", "step_ratio"} else promise.axis
    return Finding(
        one.rule, axis, promise.statistic, one.module, promise.moment, promise.which, interval, promise.low,
        promise.high, one.tolerance, answer, p, words,
    )  # fmt: skip


def _plainness(one: Finding) -> tuple[int, int]:
    """Causes before consequences: what a branch adds, what a step does, and then the stream."""
    order = ["branch_rms", "step_ratio", "lost_to_eps", "update_rms", "added_rms", "stream_rms"]
    return one.answer != "fails", order.index(one.statistic) if one.statistic in order else len(order)


def _row(one: Finding) -> tuple[str, str, str, str, str, str]:
    visit = f"{one.which} visit{'s' if one.which == 'all' else ''}, " if one.statistic in PER_VISIT else ""
    when = f"{visit}{one.moment}" + ("" if one.axis in {"loops", "level"} else f", over {one.axis}")
    exponent = "not finite" if one.exponent is None else str(one.exponent)
    return one.statistic, one.module, when, exponent, one.promised, one.answer


def _as_json(one: Finding) -> dict[str, Any]:
    values = {key: value for key, value in vars(one).items() if key != "exponent"}
    values["low"] = None if math.isinf(one.low) else one.low
    if one.exponent is not None:
        values["exponent"] = vars(one.exponent)
    return values
