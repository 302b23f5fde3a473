"""Whether stored optima still hold: HOLDS, MOVED, WORSE or INCONCLUSIVE for each N. Our extension."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from looptransfer.errors import InputError
from looptransfer.text import escaped, markdown_table, plain, text_table
from looptransfer.transfer.advice import seeds_needed
from looptransfer.transfer.baseline import REMAKE, Baseline, StoredOptimum, fingerprint_of, loss_at_optimum
from looptransfer.transfer.judge import CENSORED, inside, outside
from looptransfer.transfer.optimum import Interval, Optimum, t_interval
from looptransfer.transfer.results import axis_label
from looptransfer.transfer.verdict import LOSS, NATS, Verdict, decimals, interval_dict

SCHEMA_VERSION = 1
TOLERANCE = 0.5  # octaves: half of what costs about 0.06 nats at the reference model
Holding = Literal["HOLDS", "MOVED", "WORSE", "INCONCLUSIVE"]
EXIT_STATUS: dict[Holding, int] = {"HOLDS": 0, "MOVED": 1, "WORSE": 1, "INCONCLUSIVE": 3}


@dataclass(frozen=True)
class Finding:
    """What became of one stored optimum.

    Attributes:
        at: the loop count N, or the value of another axis.
        stored_lr: where it was, absolute.
        shift: of the optimum, now minus then, in octaves.
        loss: at the optimum, now minus then.
        seeds: how many; `paired` where the same seeds were compared one by one.
    """

    at: int
    answer: Holding
    reason: str
    stored_lr: float
    shift: Interval | None = None
    loss: Interval | None = None
    seeds: int = 0
    paired: bool = False


@dataclass(frozen=True)
class Comparison:
    """Stored optima against what is seen now. `print(comparison)` says it in words.

    Attributes:
        method: what was compared, in words.
        differing: what made then and now, where that differs: name -> (then, now).
        notes: what else to know.
    """

    path: str
    rule: str
    axis: str
    unit: str
    method: str
    tolerance: float
    loss_tolerance: float
    confidence: float
    findings: tuple[Finding, ...]
    differing: Mapping[str, tuple[Any, Any]]
    notes: tuple[str, ...] = ()

    @property
    def answer(self) -> Holding:
        """The worst of the findings; what is certain goes before what is not. Without any nothing holds."""
        answers = [finding.answer for finding in self.findings] or ["INCONCLUSIVE"]
        order: tuple[Holding, ...] = ("MOVED", "WORSE", "INCONCLUSIVE")
        return next((answer for answer in order if answer in answers), "HOLDS")

    @property
    def exit_status(self) -> int:
        """0 holds, 1 moved or worse, 3 inconclusive."""
        return EXIT_STATUS[self.answer]

    def rows(self) -> list[dict[str, str]]:
        """A row per stored optimum, as text."""
        return [
            {
                axis_label(self.axis): str(finding.at),
                "answer": finding.answer,
                "stored LR": f"{finding.stored_lr:.3g}",
                "shift, octaves": str(finding.shift or ""),
                f"loss, {self.unit}": finding.loss.text(self._decimals) if finding.loss else "",
                "seeds": f"{finding.seeds} {'paired' if finding.paired else 'unpaired'}" if finding.seeds else "",
            }
            for finding in self.findings
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the schema has a version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "answer": self.answer,
            "baseline": self.path,
            "rule": self.rule,
            "axis": self.axis,
            "method": self.method,
            "tolerance_octaves": self.tolerance,
            "loss_tolerance": self.loss_tolerance,
            "unit": self.unit,
            "confidence": self.confidence,
            "findings": [
                {
                    **asdict(finding),
                    "shift": interval_dict(finding.shift),
                    "loss": interval_dict(finding.loss),
                }
                for finding in self.findings
            ],
            "differing": {key: {"then": then, "now": now} for key, (then, now) in self.differing.items()},
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """The comparison as Markdown, every foreign word escaped."""
        lines = [f"### {escaped(self.rule)} against {escaped(self.path)}: {self.answer}", ""]
        lines += [*markdown_table(self.rows()), "", *(f"- {escaped(line)}" for line in self._sentences())]
        return "\n".join([*lines, "", escaped(self._terms()), ""])

    def __str__(self) -> str:
        lines = [f"{self.rule} against {self.path}: {self.answer}"]
        lines += [f"  {line}" for line in [*text_table(self.rows()), *self._sentences(), self._terms()]]
        return "\n".join(map(plain, lines))

    @property
    def _decimals(self) -> int:
        return decimals(self.loss_tolerance)

    def _sentences(self) -> Iterable[str]:
        if not self.findings:
            yield "no optimum of the baseline could be compared"
        for finding in self.findings:
            if finding.reason:
                yield f"{axis_label(self.axis)} = {finding.at}: {finding.reason}"
        yield from self.notes
        for key, (then, now) in self.differing.items():
            yield f"made differently: {key} was {_short(then)}, is {_short(now)}"

    def _terms(self) -> str:
        return (
            f"{self.method}; tolerances {self.tolerance:g} octave and {self.loss_tolerance:.3g} {self.unit}; "
            f"intervals {self.confidence:.0%}"
        )


def compare(verdict: Verdict, baseline: Baseline, tolerance: float = TOLERANCE) -> Comparison:
    """Compare the optima of the rule that was judged with stored ones.

    MOVED: the interval of the shift lies outside ±tolerance. WORSE: that of the change of the loss at the optimum lies
    above the verdict's regret tolerance. HOLDS: both lie inside. Otherwise INCONCLUSIVE, as is an optimum that can no
    longer be told, a baseline with nothing to compare, and a tolerance of the loss as large as the curve is high. Seeds
    are compared one by one where one side has all of the other's, else by Welch's interval.

    Args:
        verdict: of the runs now.
        baseline: the optima then.
        tolerance: octaves that an optimum may move.

    Raises:
        InputError: a baseline of another axis, metric or rule, or a tolerance that is not above 0.
    """
    if not 0 < tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance!r}; it must be a finite number of octaves above 0")
    for name, then, here in (("axis", baseline.axis, verdict.axis), ("unit", baseline.unit, verdict.unit)):
        if then != here and {then, here} != {NATS, LOSS}:  # a curve's height may tell these two differently
            raise InputError(f"{baseline.path} was made with {name} {then!r}, not {here!r}; give the same, or {REMAKE}")
    stored = baseline.of_rule(verdict.rule)
    now = {optimum.at: optimum for optimum in verdict.judged.optima}
    terms = (tolerance, verdict.regret_tolerance, verdict.confidence)
    findings = tuple(compare_one(one, now.get(at), *terms) for at, one in stored.items() if one.log2_lr is not None)
    if verdict.judged.height is not None and verdict.regret_tolerance >= verdict.judged.height:
        findings = tuple(map(_not_told_by_loss, findings))
    made_by = fingerprint_of(verdict.runs, verdict.axis)
    return Comparison(
        baseline.path,
        verdict.rule,
        verdict.axis,
        verdict.unit,
        "Optima of full fits",
        *terms,
        findings,
        differing(baseline.fingerprint, made_by),
        tuple(_notes(stored, now, verdict.axis_label)),
    )


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The names whose values are not the same, with both; an experiment's settings where both sides know them."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*then, *(name for name in now if name not in then)]:
        before, after = then.get(name), now.get(name)
        if name == "experiment":
            inner = differing(before, after) if isinstance(before, dict) and isinstance(after, dict) else {}
            found |= {f"experiment {key}": pair for key, pair in inner.items()}
        elif before != after:
            found[name] = (before, after)
    return found


def change(now: pd.Series, then: Mapping[str, float], confidence: float) -> tuple[Interval, pd.Series | None]:
    """The mean now minus then with its interval, and the gaps by seed where seeds are paired.

    Pairing is right for runs that have nothing but a seed's name in common as well, and then only costs freedom.
    """
    now = now.rename(index=str)
    before = pd.Series(then, dtype=float)
    shared = now.index.intersection(before.index)
    if len(shared) >= 2 and len(shared) == min(len(now), len(before)):
        gaps = now[shared] - before[shared]
        return t_interval(gaps, confidence), gaps
    return _welch(now.to_numpy(dtype=float), before.to_numpy(), confidence), None


def _welch(now: np.ndarray[Any, Any], then: np.ndarray[Any, Any], confidence: float) -> Interval:
    """Welch's interval for a difference of means, of at least two values each."""
    parts = [float(values.var(ddof=1)) / len(values) for values in (now, then)]
    gap, variance = float(now.mean() - then.mean()), sum(parts)
    if variance == 0:
        return Interval(gap, gap, gap)
    freedom = variance**2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (now, then), strict=True))
    half = float(stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(variance)
    return Interval(gap, gap - half, gap + half)


def compare_one(
    stored: StoredOptimum, optimum: Optimum | None, tolerance: float, loss_tolerance: float, confidence: float
) -> Finding:
    """As `compare`, for one N; `optimum` is None where it was not run."""
    assert stored.log2_lr is not None
    assert stored.log2_lr_by_seed is not None
    assert stored.loss_by_seed is not None
    lr = 2.0**stored.log2_lr.estimate
    if optimum is None:
        return Finding(stored.at, "INCONCLUSIVE", "it was not run", lr)
    if optimum.by_seed is None:
        assert optimum.censored is not None
        return Finding(stored.at, "INCONCLUSIVE", CENSORED[optimum.censored], lr, seeds=optimum.seeds)
    shift, gaps = change(optimum.by_seed, stored.log2_lr_by_seed, confidence)
    loss, loss_gaps = change(loss_at_optimum(optimum), stored.loss_by_seed, confidence)

    def finding(answer: Holding, reason: str = "") -> Finding:
        seeds = optimum.seeds if gaps is None else len(gaps)
        return Finding(stored.at, answer, reason, lr, shift, loss, seeds, gaps is not None)

    if outside(shift, tolerance):
        return finding("MOVED", f"the optimum moved by {shift.estimate:+.2f} octave")
    if loss.low > loss_tolerance:
        return finding("WORSE", f"the loss at the optimum is worse by {loss.estimate:.{decimals(loss_tolerance)}f}")
    if not inside(shift, tolerance):
        advice = more_seeds(gaps, shift, tolerance, confidence)
        return finding("INCONCLUSIVE", f"the interval of the shift reaches across the tolerance; {advice}")
    if loss.high >= loss_tolerance:
        advice = more_seeds(loss_gaps, loss, loss_tolerance, confidence)
        return finding("INCONCLUSIVE", f"the loss may be worse by the tolerance; {advice}")
    return finding("HOLDS")


def _not_told_by_loss(finding: Finding) -> Finding:
    reason = "the tolerance of the loss is as large as the whole curve is high; give a smaller one, with --regret"
    return replace(finding, answer="INCONCLUSIVE", reason=reason) if finding.answer == "HOLDS" else finding


def more_seeds(gaps: pd.Series | None, interval: Interval, tolerance: float, confidence: float) -> str:
    """What to run so that an interval no longer reaches across its tolerance, in words."""
    if gaps is None:
        return "run the seeds of the baseline, so that they are paired"
    room = abs(abs(interval.estimate) - tolerance)
    seeds = seeds_needed(float(gaps.std(ddof=1)), room, confidence)
    if seeds is None:
        return "it lies so near the tolerance that more seeds hardly settle it"
    return f"run about {max(seeds, len(gaps) + 1)} seeds in all, here and for the baseline"


def _notes(stored: Mapping[int, StoredOptimum], now: Mapping[int, Optimum], label: str) -> Iterable[str]:
    for at, one in stored.items():
        if one.censored is not None:
            yield f"{label} = {at} was censored in the baseline ({one.censored}), so it is not compared"
    for at in now.keys() - stored.keys():
        yield f"{label} = {at} is not in the baseline"


def _short(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
