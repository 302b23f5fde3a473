"""What a verdict holds, and how it reads in words and as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pandas as pd

from looptransfer.text import escaped, markdown_table, plain, text_table
from looptransfer.transfer.advice import FurtherRuns
from looptransfer.transfer.optimum import Basin, Interval, Optimum
from looptransfer.transfer.results import ALL_RUNS, axis_label

SCHEMA_VERSION = 2
NATS, LOSS, METRIC = "nats", "of the loss", "of the metric"  # units; the last one of what is maximized, and negated
Answer = Literal["FLAT", "DRIFTS", "INCONCLUSIVE"]
EXIT_STATUS: dict[Answer, int] = {"FLAT": 0, "DRIFTS": 1, "INCONCLUSIVE": 3}
Cause = Literal[
    "flat", "drifts", "one N", "low edge", "high edge", "diverged", "plateau", "flat bottom", "one seed",
    "too few seeds", "too few LRs", "no shared seeds", "shape", "tolerance", "regret", "no power",
]  # fmt: skip


@dataclass(frozen=True)
class RuleVerdict:
    """What the runs of one rule say.

    Attributes:
        cause: the reason in a word, for programs; `reason` in a sentence, for people.
        advice: the runs that would settle an INCONCLUSIVE, in words; `further_runs` the same for programs.
        optima: one per loop count (or value of the axis).
        shifts: of the whole curve against that of the first N, in octaves; None where they cannot be laid over another.
        drift: of the optimum, in octaves per doubling of N, over every N whose optimum is known.
        drift_by_reach: the drift by a narrower and a wider fit, where those have a minimum.
        displacement: the N whose optimum lies furthest from that of the first, and how far, in octaves.
        regret: of the transferred LR at the largest N, in the unit of the loss.
        height: of the curve at the largest N: what leaving the best LR by 2.5 octaves costs there.
        horizons: the optima at earlier shares of the training, where the table has curves over steps.
    """

    rule: str
    answer: Answer
    cause: Cause
    reason: str
    advice: str
    optima: tuple[Optimum, ...]
    further_runs: FurtherRuns | None = None
    shifts: tuple[Interval | None, ...] = ()
    drift: Interval | None = None
    drift_by_reach: tuple[float, ...] = ()
    displacement: tuple[int, Interval] | None = None
    regret: Interval | None = None
    drift_by_seed: pd.Series | None = None
    regret_by_seed: pd.Series | None = None
    height: float | None = None
    horizons: Mapping[float, tuple[Optimum, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A control minus the rule asked for, paired by seed. An interval above 0: the control is worse."""

    control: str
    drift: Interval | None  # octaves per doubling of N, over the loop counts that both have
    regret: Interval | None  # in the unit of the loss, at the largest loop count, where both have the same


@dataclass(frozen=True)
class Verdict:
    """The judgement of a table of results. `print(verdict)` says it in words.

    Attributes:
        unit: of the losses, and so of the regret.
        source: of the table, as it may be shown.
        grows: what `sweep` can add further runs to: its table, or its ledger; None where it wrote neither.
        rows: how many were read; `runs` has one for each run.
    """

    rule: str
    axis: str
    transferred_lr: float | None
    tolerance: float
    regret_tolerance: float
    confidence: float
    rules: Mapping[str, RuleVerdict]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    unit: str = NATS
    source: str = ""
    grows: Literal["table", "ledger"] | None = None
    rows: int = 0
    runs: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False, compare=False)

    @property
    def judged(self) -> RuleVerdict:
        """What the runs of the rule asked for say; the other rules are its controls."""
        return self.rules[self.rule]

    @property
    def answer(self) -> Answer:
        """The answer for the rule asked for."""
        return self.judged.answer

    @property
    def exit_status(self) -> int:
        """0 flat, 1 drifts, 3 inconclusive."""
        return EXIT_STATUS[self.answer]

    @property
    def axis_label(self) -> str:
        """What the axis is called in words: N for loop counts."""
        return axis_label(self.axis)

    @property
    def counts(self) -> str:
        """How many rows were read, and what they hold."""
        runs = "" if self.rows == len(self.runs) else f" of {len(self.runs)} runs"
        return f"{self.rows} rows{runs}, {int(self.runs['diverged'].sum())} of them diverged"

    def regret_text(self, interval: Interval | None) -> str:
        """A regret, with as many decimals as its tolerance asks for."""
        if interval is None:
            return "not known"
        return interval.text(decimals(self.regret_tolerance))

    def command(self, one: RuleVerdict) -> str | None:
        """What makes the further runs; None where there are none, or none that our sweeps could make."""
        if one.further_runs is None or self.axis != "loops" or self.grows is None:
            return None
        return one.further_runs.command(one.rule, self.source, self.grows == "ledger")

    def to_do(self, one: RuleVerdict) -> list[str]:
        """What would settle the answer, in words, and the command or the rows to run; nothing where it is settled."""
        if not one.advice or one.further_runs is None:
            return [one.advice] if one.advice else []
        how = " (--todo FILE writes them)" if one.rule == self.rule else ""
        return [one.advice, self.command(one) or one.further_runs.words(self.axis_label) + how]

    def rows_to_run(self) -> pd.DataFrame:
        """The further runs that would settle the answer for the rule asked for; no row where none would."""
        runs = self.judged.further_runs
        rows = pd.DataFrame(columns=[self.axis, "lr", "seed"]) if runs is None else runs.rows(self.axis)
        if self.rule != ALL_RUNS:
            rows.insert(0, "rule", self.rule)
        return rows

    def optima_rows(self, one: RuleVerdict) -> list[dict[str, str]]:
        """A table of the optima of one rule, as text: a row per N, the columns in their order."""
        return [self._row(one, position) for position in range(len(one.optima))]

    def _row(self, one: RuleVerdict, position: int) -> dict[str, str]:
        optimum = one.optima[position]
        row = {self.axis_label: str(optimum.at), "seeds": str(optimum.seeds)}
        if optimum.log2_lr is None:
            row |= {"best LR": f"none: {optimum.censored}", "log2(LR)": ""}
        else:
            row |= {"best LR": f"{2**optimum.log2_lr.estimate:.3g}", "log2(LR)": str(optimum.log2_lr)}
        row[f"within {self.regret_tolerance:.3g}"] = "" if optimum.basin is None else _basin_text(optimum.basin)
        row["stable up to"] = _edge_text(optimum)
        shift = one.shifts[position] if one.shifts else None
        row["curve shift"] = "" if shift is None or position == 0 else str(shift)
        for share, optima in one.horizons.items():
            log2_lr = optima[position].log2_lr
            row[f"at {share:.0%}"] = "" if log2_lr is None else f"{2**log2_lr.estimate:.3g}"
        return row

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain JSON values, without wall times; the schema has a version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "rule": self.rule,
            "axis": self.axis,
            "unit": self.unit,
            "answer": self.answer,
            "transferred_lr": self.transferred_lr,
            "tolerance_octaves_per_doubling": self.tolerance,
            "regret_tolerance": self.regret_tolerance,
            "confidence": self.confidence,
            "rules": {name: self._rule_dict(one) for name, one in self.rules.items()},
            "differences": [
                {
                    "control": difference.control,
                    "drift_octaves_per_doubling": interval_dict(difference.drift),
                    "regret": interval_dict(difference.regret),
                }
                for difference in self.differences
            ],
            "notes": list(self.notes),
        }

    def _rule_dict(self, one: RuleVerdict) -> dict[str, Any]:
        worst = one.displacement
        return {
            "answer": one.answer,
            "cause": one.cause,
            "reason": one.reason,
            "advice": one.advice,
            "further_runs": None if one.further_runs is None else _further_dict(self.axis, one.further_runs),
            "command": self.command(one),
            "drift_octaves_per_doubling": interval_dict(one.drift),
            "drift_by_reach_of_the_fit": list(one.drift_by_reach),
            "worst_displacement_octaves": worst and {self.axis: worst[0], **(interval_dict(worst[1]) or {})},
            "regret": interval_dict(one.regret),
            "curve_height": one.height,
            "optima": [self._optimum_dict(one, position) for position in range(len(one.optima))],
        }

    def _optimum_dict(self, one: RuleVerdict, position: int) -> dict[str, Any]:
        optimum = one.optima[position]
        edge = optimum.stable_up_to
        return {
            self.axis: optimum.at,
            "seeds": optimum.seeds,
            "censored": optimum.censored,
            "log2_lr": interval_dict(optimum.log2_lr),
            "basin_log2_lr": None if optimum.basin is None else asdict(optimum.basin),
            "stable_up_to_lr": None if edge is None else 2.0**edge,
            "larger_lrs_diverge": optimum.diverges,
            "curve_shift_octaves": interval_dict(one.shifts[position]) if one.shifts else None,
            "earlier_log2_lr": {
                f"{share:g}": interval_dict(optima[position].log2_lr) for share, optima in one.horizons.items()
            },
        }

    def __str__(self) -> str:
        lines = []
        for one in self.rules.values():
            lines.append(f"{one.rule}: {one.answer}. {one.reason}")
            lines += [f"  {line}" for line in text_table(self.optima_rows(one))]
            lines += [f"  {line}" for line in self.sentences(one)]
            advice, *runs = self.to_do(one) or [""]
            lines += [f"  to settle it: {advice}"] if advice else []
            lines += [f"    {line}" for line in runs]
        for difference in self.differences:
            lines.append(f"{difference.control} minus {self.rule}, paired by seed:")
            drift, regret = difference.drift or "unknown", self.regret_text(difference.regret)
            lines.append(f"  drift {drift} octaves per doubling, regret {regret} {self.unit}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"{self.counts}. Intervals: {self.confidence:.0%}, Student's t over seeds.")
        return "\n".join(map(plain, lines))

    def to_markdown(self) -> str:
        """The verdict as Markdown with every foreign word escaped, such as for the step summary of a CI run."""
        lines = []
        for one in self.rules.values():
            lines += [f"### {escaped(one.rule)}: {one.answer}", "", escaped(one.reason), ""]
            lines += [*markdown_table(self.optima_rows(one)), ""]
            lines += [f"- {escaped(sentence)}" for sentence in self.sentences(one)]
            advice, *runs = self.to_do(one) or [""]
            lines += ["", f"To settle it: {escaped(advice)}"] if advice else []  # no item: code below one is no code
            lines += ["", *(f"    {plain(line)}" for line in runs)] if runs else []
            lines.append("")
        if self.differences:
            rows = [
                {
                    "paired by seed": f"{difference.control} − {self.rule}",
                    "drift, octaves per doubling": str(difference.drift or "unknown"),
                    f"regret, {self.unit}": self.regret_text(difference.regret),
                }
                for difference in self.differences
            ]
            lines += [*markdown_table(rows), ""]
        lines += [f"> {escaped(note)}" for note in self.notes]
        return "\n".join([*lines, f"{self.counts}. Intervals: {self.confidence:.0%}, Student's t over seeds.", ""])

    def sentences(self, one: RuleVerdict) -> list[str]:
        """The figures across N of one rule, a line each."""
        lines = []
        if one.drift is not None:
            lines.append(f"drift {one.drift} octaves per doubling of {self.axis_label} (tolerance ±{self.tolerance:g})")
        if one.drift_by_reach:
            others = ", ".join(f"{drift:+.3f}" for drift in one.drift_by_reach)
            lines.append(f"drift by narrower and wider fits, where there are any: {others}")
        if one.displacement is not None:
            at, gap = one.displacement
            first = one.optima[0].at
            lines.append(f"furthest from {self.axis_label} = {first}: {gap} octaves at {self.axis_label} = {at}")
        if one.regret is not None:
            largest = f"{self.axis_label} = {one.optima[-1].at}"
            told = f"tolerance {self.regret_tolerance:.3g}"
            if one.height is not None:
                told += f", {100 * self.regret_tolerance / one.height:.2g} % of the curve's height"
            lines.append(f"regret {self.regret_text(one.regret)} {self.unit} at {largest} ({told})")
        return lines


def decimals(tolerance: float) -> int:
    """Those of a loss that is held against a tolerance."""
    return max(3, 1 + math.ceil(-math.log10(tolerance)))


def interval_dict(interval: Interval | None) -> dict[str, float | str] | None:
    """Plain JSON, which knows no infinity: a regret without bound is the text "inf"."""
    if interval is None:
        return None
    return {name: value if math.isfinite(value) else str(value) for name, value in asdict(interval).items()}


def _further_dict(axis: str, runs: FurtherRuns) -> dict[str, Any]:
    return {axis: list(runs.at), "lr": list(runs.lrs), "seed": list(runs.seeds)}


def _basin_text(basin: Basin) -> str:
    low, high = (f"{2**end:.3g}" for end in (basin.low, basin.high))
    return f"{'≤ ' if basin.low_open else ''}{low} to {'≥ ' if basin.high_open else ''}{high}"


def _edge_text(optimum: Optimum) -> str:
    if optimum.stable_up_to is None:
        return "none"
    return f"{2**optimum.stable_up_to:.3g}" if optimum.diverges else f"≥ {2**optimum.stable_up_to:.3g}"
