"""The result of a check: what was measured of each rule, the answers, and the same in words, Markdown and JSON."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pandas as pd

from looptransfer.text import escaped, markdown_table, plain, text_table
from looptransfer.transfer.further import FurtherRuns, listed
from looptransfer.transfer.optimum import Basin, Interval, Optimum
from looptransfer.transfer.results import ALL_RUNS, axis_label
from looptransfer.transfer.spread import spread

SCHEMA_VERSION = 4
NATS, LOSS, METRIC = "nats", "of the loss", "of the metric"  # units; the last one of what is maximized, and negated
Answer = Literal["FLAT", "DRIFTS", "INCONCLUSIVE"]
EXIT_STATUS: dict[Answer, int] = {"FLAT": 0, "DRIFTS": 1, "INCONCLUSIVE": 3}
Cause = Literal[
    "flat", "drifts", "one N", "low edge", "high edge", "diverged", "plateau", "flat bottom", "one seed",
    "too few seeds", "too few LRs", "no shared seeds", "shape", "tolerance", "regret", "no power",
]  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """The terms by which a table is judged.

    `transferred_lr` is absolute and `tolerance` in octaves per doubling of N; `regret_tolerance` is in the unit of the
    loss.
    """

    axis: str
    transferred_lr: float | None
    tolerance: float
    regret_tolerance: float
    confidence: float

    @property
    def axis_label(self) -> str:
        """The axis in words: N for loop counts."""
        return axis_label(self.axis)


@dataclass(frozen=True)
class Measured:
    """Measurements on the runs of one rule, before anything is decided.

    Attributes:
        tables: the losses by N, as `curve` makes them.
        optima: one per loop count (or value of the axis).
        log2_lr: of the transferred LR; None where the proxy's optimum is censored.
        drift: of the optimum, in octaves per doubling of N, over every N whose optimum is known.
        drift_by_reach: the drift by a narrower and a wider fit, where those have a minimum.
        regret: of the transferred LR at the largest N, in the unit of the loss.
        loses_at: the N at which the transferred LR loses more than the tolerance, by the interval of the regret there.
        height: of the curve at the largest N: what leaving the best LR by 2.5 octaves costs there.
        horizons: the optima at earlier shares of the training, where the table has curves over steps.
        flat_controls: the names of all its controls, where each is flat.
    """

    rule: str
    tables: Mapping[int, pd.DataFrame] = field(repr=False, compare=False)
    optima: tuple[Optimum, ...]
    log2_lr: float | None = None
    drift: Interval | None = None
    drift_by_reach: tuple[float, ...] = ()
    drift_by_seed: pd.Series | None = None
    regret: Interval | None = None
    regret_by_seed: pd.Series | None = None
    loses_at: tuple[int, ...] = ()
    height: float | None = None
    horizons: Mapping[float, tuple[Optimum, ...]] = field(default_factory=dict)
    flat_controls: tuple[str, ...] = ()

    @property
    def fitted(self) -> list[int]:
        """The N whose optimum is known."""
        return [optimum.n for optimum in self.optima if optimum.censored is None]

    @property
    def with_basin(self) -> list[int]:
        """The N whose basin is known."""
        return [optimum.n for optimum in self.optima if optimum.basin is not None]

    @property
    def shared_basin(self) -> Basin | None:
        """The LRs that lie in every basin that is known; None where there is no such LR."""
        basins = [optimum.basin for optimum in self.optima if optimum.basin is not None]
        if not basins:
            return None
        lowest, highest = max(basins, key=lambda basin: basin.low), min(basins, key=lambda basin: basin.high)
        shared = Basin(lowest.low, highest.high, lowest.low_open, highest.high_open)
        return shared if shared.low < shared.high else None


@dataclass(frozen=True)
class RuleVerdict(Measured):
    """The judgement of the runs of one rule.

    Attributes:
        cause: the reason in a word, for programs; `reason` in a sentence, for people.
        advice: the runs that would settle an INCONCLUSIVE, in words; `further_runs` the same for programs.
    """

    answer: Answer = "INCONCLUSIVE"
    cause: Cause = "one N"
    reason: str = ""
    advice: str = ""
    further_runs: FurtherRuns | None = None


@dataclass(frozen=True)
class Difference:
    """A control minus the rule asked for, paired by seed. An interval above 0: the control is worse."""

    control: str
    drift: Interval | None  # octaves per doubling of N, over the loop counts that both have
    regret: Interval | None  # in the unit of the loss, at the largest loop count, where both have the same


@dataclass(frozen=True)
class Verdict(Terms):
    """The judgement of a table of results. `print(verdict)` says it in words.

    Attributes:
        unit: of the losses, and so of the regret.
        source: of the table, as it may be shown.
        grows: what `sweep` can add further runs to: its table, or its ledger; None where it wrote neither.
        rows: how many were read; `runs` has one for each run.
    """

    rule: str
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
        """The verdict on the rule asked for; the other rules are its controls."""
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
    def counts(self) -> str:
        """The number of rows that were read, and what they hold."""
        runs = "" if self.rows == len(self.runs) else f" of {len(self.runs)} runs"
        return f"{self.rows} rows{runs}, {int(self.runs['diverged'].sum())} of them diverged"

    @property
    def headline(self) -> list[str]:
        """The answer as a person would give it, line by line: which LR, what is as good, what it loses, how sure."""
        reason = [self.judged.reason] if self.answer == "INCONCLUSIVE" else []
        return [self._which_lr(), *reason, *self._as_good(), *self._loses(), self._how_sure()]

    def _which_lr(self) -> str:
        judged, label = self.judged, self.axis_label
        first, last = judged.optima[0].n, judged.optima[-1].n
        over = f"{label} = {first} and more" if first == last else f"every {label} from {first} to {last}"
        lr = "one LR" if self.transferred_lr is None else f"LR {self.transferred_lr:.3g}"
        if self.answer == "FLAT":
            return f"Use {lr} at {over}."
        if self.answer == "DRIFTS":
            known = [optimum for optimum in judged.optima if optimum.log2_lr is not None]
            ends = (f"{2**o.log2_lr.estimate:.3g} at {label} = {o.n}" for o in (known[0], known[-1]) if o.log2_lr)
            return f"Do not carry one LR to a larger {label}: the best one goes from {' to '.join(ends)}."
        if judged.loses_at:
            return f"Do not carry {lr} to {label} = {listed(judged.loses_at)}."
        return f"It is not settled that {lr} serves {over}."

    def _as_good(self) -> Iterator[str]:
        """The LRs that serve at every N, as far as basins are known."""
        judged, label = self.judged, self.axis_label
        unknown = [optimum.n for optimum in judged.optima if optimum.basin is None]
        where = f"every {label}"
        if unknown or len(judged.optima) == 1:
            where = f"{label} = {listed(judged.with_basin)}"
        within = f"within {self.regret_tolerance:.3g} {self.unit} of the best at {where}"
        hidden = f"; at {label} = {listed(unknown)} that is not known" if unknown else ""
        basin = judged.shared_basin
        if basin is not None:
            lies_in = self.transferred_lr is not None and basin.low <= math.log2(self.transferred_lr) <= basin.high
            low = f"{'at most ' if basin.low_open else ''}{2**basin.low:.3g}"
            high = f"{'at least ' if basin.high_open else ''}{2**basin.high:.3g}"
            lrs = f"Only LR {low}" if low == high else f"Any LR from {low} to {high}"
            yield f"{lrs} is {'as good: ' if lies_in and not unknown else ''}{within}{hidden}."
        elif judged.with_basin:
            yield f"No LR is {within}{hidden}."

    def _loses(self) -> Iterator[str]:
        """The loss that the transferred LR costs at the largest N."""
        if self.transferred_lr is None:
            return
        lr, largest = f"LR {self.transferred_lr:.3g}", f"at {self.axis_label} = {self.judged.optima[-1].n}"
        regret, places = self.judged.regret, decimals(self.regret_tolerance)
        if regret is None:
            yield f"What {lr} loses {largest} is not known."
        elif math.isinf(regret.estimate):
            yield f"Runs with {lr} diverge {largest}."
        else:
            lost, most = max(0.0, regret.estimate), max(0.0, regret.high)
            yield f"{lr} loses {lost:.{places}f} {self.unit} {largest}, {most:.{places}f} at most."

    def _how_sure(self) -> str:
        seeds = max(optimum.seeds for optimum in self.judged.optima)
        rule = "" if self.rule == ALL_RUNS else f" under {self.rule}"
        by = "from one seed" if seeds == 1 else f"by {self.confidence:.0%} intervals over {seeds} seeds"
        return f"Verdict: {self.answer}{rule}, {by}."

    @property
    def _spread(self) -> list[str]:
        """The optima of the rule asked for, in characters, under a legend."""
        judged, lr = self.judged, self.transferred_lr
        lrs = [float(x) for table in judged.tables.values() for x in table.index]
        lines = spread(judged.optima, lrs, None if lr is None else math.log2(lr), self.axis_label)
        carried = "" if lr is None else f", | LR {lr:.3g}"
        legend = f"  * best LR, = its interval, - within {self.regret_tolerance:.3g} {self.unit} of the best{carried}"
        return [legend, *(f"  {line}" for line in lines), ""] if lines else []

    def regret_text(self, interval: Interval | None) -> str:
        """A regret, with as many decimals as its tolerance asks for."""
        return "not known" if interval is None else interval.text(decimals(self.regret_tolerance))

    def command(self, judged: RuleVerdict) -> str | None:
        """The command that makes the further runs; None where there are none, or none that `sweep` could make."""
        if judged.further_runs is None or self.axis != "loops" or self.grows is None:
            return None
        return judged.further_runs.command(judged.rule, self.source, self.grows == "ledger")

    def to_do(self, judged: RuleVerdict) -> list[str]:
        """The advice, and the command or the rows to run; nothing where the answer is settled."""
        if not judged.advice or judged.further_runs is None:
            return [judged.advice] if judged.advice else []
        if command := self.command(judged):
            return [judged.advice, f"{command}  # EXPERIMENT: your file.py:NAME"]
        option = " (check --todo FILE writes them)" if judged.rule == self.rule else ""
        return [judged.advice, judged.further_runs.text(self.axis_label) + option]

    def rows_to_run(self) -> pd.DataFrame:
        """The further runs that would settle the answer for the rule asked for; no row where none would."""
        runs = self.judged.further_runs
        rows = pd.DataFrame(columns=[self.axis, "lr", "seed"]) if runs is None else runs.rows(self.axis)
        if self.rule != ALL_RUNS:
            rows.insert(0, "rule", self.rule)
        return rows

    def optima_rows(self, judged: RuleVerdict) -> list[dict[str, str]]:
        """A table of the optima of one rule, as text: a row per N, the columns in their order."""
        rows = []
        for position, optimum in enumerate(judged.optima):
            fitted = optimum.log2_lr
            row = {self.axis_label: str(optimum.n), "seeds": str(optimum.seeds)}
            row["best LR"] = f"none: {optimum.censored}" if fitted is None else f"{2**fitted.estimate:.3g}"
            row["log2(LR)"] = str(fitted or "")
            row[f"within {self.regret_tolerance:.3g}"] = "" if optimum.basin is None else _basin_text(optimum.basin)
            row["stable up to"] = _edge_text(optimum)
            for share, optima in judged.horizons.items():
                log2_lr = optima[position].log2_lr
                row[f"at {share:.0%}"] = "" if log2_lr is None else f"{2**log2_lr.estimate:.3g}"
            rows.append(row)
        return rows

    def sentences(self, judged: RuleVerdict) -> list[str]:
        """The figures across N of one rule, a line each."""
        label, lines = self.axis_label, []
        if judged.drift is not None:
            lines.append(f"drift {judged.drift} octaves per doubling of {label} (tolerance ±{self.tolerance:g})")
        if judged.drift_by_reach:
            drifts = ", ".join(f"{drift:+.3f}" for drift in judged.drift_by_reach)
            lines.append(f"drift by narrower and wider fits, where there are any: {drifts}")
        if judged.regret is not None:
            limit = f"tolerance {self.regret_tolerance:.3g}"
            if judged.height is not None:
                limit += f", {100 * self.regret_tolerance / judged.height:.2g} % of the curve's height"
            largest = f"{label} = {judged.optima[-1].n}"
            lines.append(f"regret {self.regret_text(judged.regret)} {self.unit} at {largest} ({limit})")
        return lines

    def __str__(self) -> str:
        lines = [*self.headline, "", *self._spread]
        for judged in self.rules.values():
            lines.append(f"{judged.rule}: {judged.answer}. {judged.reason}")
            lines += [f"  {line}" for line in [*text_table(self.optima_rows(judged)), *self.sentences(judged)]]
            advice, *runs = self.to_do(judged) or [""]
            lines += [f"  to settle it: {advice}"] if advice else []
            lines += [f"    {line}" for line in runs]
        for difference in self.differences:
            title, numbers = self.difference_text(difference)
            lines += [f"{title}:", f"  {numbers}"]
        return "\n".join(map(plain, [*lines, *(f"note: {note}" for note in self.notes), self._foot]))

    def difference_text(self, difference: Difference) -> tuple[str, str]:
        """What is compared, and its numbers."""
        drift, regret = difference.drift or "unknown", self.regret_text(difference.regret)
        numbers = f"drift {drift} octaves per doubling, regret {regret} {self.unit}"
        return f"{difference.control} minus {self.rule}, paired by seed", numbers

    def to_markdown(self) -> str:
        """The verdict as Markdown with every foreign word escaped, such as for the step summary of a CI run."""
        lines = [escaped(" ".join(self.headline)), ""]
        lines += [line for judged in self.rules.values() for line in self._markdown_of(judged)]
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
        notes = [line for note in self.notes for line in (f"> {escaped(note)}", "")]
        return "\n".join([*lines, *notes, self._foot, ""])

    def _markdown_of(self, judged: RuleVerdict) -> Iterator[str]:
        yield from (f"### {escaped(judged.rule)}: {judged.answer}", "", escaped(judged.reason), "")
        yield from (*markdown_table(self.optima_rows(judged)), "")
        yield from (f"- {escaped(sentence)}" for sentence in self.sentences(judged))
        advice, *runs = self.to_do(judged) or [""]
        yield from ("", f"To settle it: {escaped(advice)}") if advice else ()  # no item: code below one is no code
        yield from ("", *(f"    {plain(line)}" for line in runs)) if runs else ()
        yield ""

    @property
    def _foot(self) -> str:
        return f"{self.counts}. Intervals: {self.confidence:.0%}, Student's t over seeds."

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
            "rules": {name: self._rule_dict(judged) for name, judged in self.rules.items()},
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

    def _rule_dict(self, judged: RuleVerdict) -> dict[str, Any]:
        runs = judged.further_runs
        return {
            "answer": judged.answer,
            "cause": judged.cause,
            "reason": judged.reason,
            "advice": judged.advice,
            "further_runs": None if runs is None else runs.to_dict(self.axis),
            "command": self.command(judged),
            "drift_octaves_per_doubling": interval_dict(judged.drift),
            "drift_by_reach_of_the_fit": list(judged.drift_by_reach),
            "regret": interval_dict(judged.regret),
            "curve_height": judged.height,
            "optima": [self._optimum_dict(judged, position) for position in range(len(judged.optima))],
        }

    def _optimum_dict(self, judged: RuleVerdict, position: int) -> dict[str, Any]:
        optimum, horizons = judged.optima[position], judged.horizons.items()
        return {
            self.axis: optimum.n,
            "seeds": optimum.seeds,
            "censored": optimum.censored,
            "log2_lr": interval_dict(optimum.log2_lr),
            "basin_log2_lr": None if optimum.basin is None else asdict(optimum.basin),
            "stable_up_to_lr": None if optimum.stable_up_to is None else 2.0**optimum.stable_up_to,
            "larger_lrs_diverge": optimum.diverges,
            "earlier_log2_lr": {f"{share:g}": interval_dict(optima[position].log2_lr) for share, optima in horizons},
        }


def decimals(tolerance: float) -> int:
    """The decimals of a loss that is held against a tolerance."""
    return max(3, 1 + math.ceil(-math.log10(tolerance)))


def interval_dict(interval: Interval | None) -> dict[str, float | str] | None:
    """Plain JSON of an interval that may be unknown."""
    return None if interval is None else interval.to_dict()


def _basin_text(basin: Basin) -> str:
    low, high = (f"{2**end:.3g}" for end in (basin.low, basin.high))
    return f"{'≤ ' if basin.low_open else ''}{low} to {'≥ ' if basin.high_open else ''}{high}"


def _edge_text(optimum: Optimum) -> str:
    if optimum.stable_up_to is None:
        return "none"
    return f"{'' if optimum.diverges else '≥ '}{2**optimum.stable_up_to:.3g}"
