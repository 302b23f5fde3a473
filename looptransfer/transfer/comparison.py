"""Stored optima against those of a later table: HOLDS, MOVED, WORSE or INCONCLUSIVE for each N. Our extension."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from looptransfer.text import escaped, markdown_table, plain, short, text_table
from looptransfer.transfer.causes import CENSORED
from looptransfer.transfer.further import seeds_needed
from looptransfer.transfer.optimum import Interval, Optimum, t_interval
from looptransfer.transfer.results import axis_label
from looptransfer.transfer.stored import KEY, StoredOptimum, loss_at_optimum, renamed
from looptransfer.transfer.verdict import decimals, interval_dict

SCHEMA_VERSION = 1
TOLERANCE = 0.5  # octaves: half of what costs about 0.06 nats at the reference model
Holding = Literal["HOLDS", "MOVED", "WORSE", "INCONCLUSIVE"]
EXIT_STATUS: dict[Holding, int] = {"HOLDS": 0, "MOVED": 1, "WORSE": 1, "INCONCLUSIVE": 3}


@dataclass(frozen=True)
class ComparedOptimum:
    """The state of one stored optimum.

    Attributes:
        n: the loop count N, or the value of another axis.
        stored_lr: the stored optimum, absolute.
        shift: of the optimum, the later minus the stored one, in octaves.
        loss: at the optimum, the later minus the stored one.
        seeds: how many; `paired` where the same seeds were compared one by one.
    """

    n: int
    answer: Holding
    reason: str
    stored_lr: float
    shift: Interval | None = None
    loss: Interval | None = None
    seeds: int = 0
    paired: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        fields = asdict(self) | {"shift": interval_dict(self.shift), "loss": interval_dict(self.loss)}
        return renamed(fields, "n", KEY)


@dataclass(frozen=True)
class Comparison:
    """Stored optima against a later table. `print(comparison)` says it in words.

    Attributes:
        method: what was compared, in words.
        differing: the origins of both, where they differ: name -> (stored, later).
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
    findings: tuple[ComparedOptimum, ...]
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
                axis_label(self.axis): str(finding.n),
                "answer": finding.answer,
                "stored LR": f"{finding.stored_lr:.3g}",
                "shift, octaves": str(finding.shift or ""),
                f"loss, {self.unit}": finding.loss.text(decimals(self.loss_tolerance)) if finding.loss else "",
                "seeds": f"{finding.seeds} {'paired' if finding.paired else 'unpaired'}" if finding.seeds else "",
            }
            for finding in self.findings
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the schema has a version."""
        fields = {name: value for name, value in vars(self).items() if name not in ("path", "tolerance")}
        return fields | {
            "schema_version": SCHEMA_VERSION,
            "answer": self.answer,
            "baseline": self.path,
            "tolerance_octaves": self.tolerance,
            "findings": [finding.to_dict() for finding in self.findings],
            "differing": {key: {"then": old, "now": new} for key, (old, new) in self.differing.items()},
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

    def _sentences(self) -> Iterable[str]:
        if not self.findings:
            yield "no optimum of the baseline could be compared"
        for finding in self.findings:
            if finding.reason:
                yield f"{axis_label(self.axis)} = {finding.n}: {finding.reason}"
        yield from self.notes
        for key, (old, new) in self.differing.items():
            if key == "code":  # another commit is why one compares; `to_dict` names both
                continue
            yield f"made differently: {key} was {_setting(old)}, is {_setting(new)}"

    def _terms(self) -> str:
        return (
            f"{self.method}; tolerances {self.tolerance:g} octave and {self.loss_tolerance:.3g} {self.unit}; "
            f"intervals {self.confidence:.0%}"
        )


def change(later: pd.Series, stored: Mapping[str, float], confidence: float) -> tuple[Interval, pd.Series | None]:
    """The mean later minus the stored one with its interval, and the gaps by seed where seeds are paired.

    Pairing is right for runs that have nothing but a seed's name in common as well, and then only costs freedom.
    """
    later, before = later.rename(index=str), pd.Series(stored, dtype=float)
    shared = later.index.intersection(before.index)
    if len(shared) >= 2 and len(shared) == min(len(later), len(before)):
        gaps = later[shared] - before[shared]
        return t_interval(gaps, confidence), gaps
    return _welch(later.to_numpy(dtype=float), before.to_numpy(), confidence), None


def _welch(minuend: np.ndarray[Any, Any], subtrahend: np.ndarray[Any, Any], confidence: float) -> Interval:
    """Welch's interval for a difference of means, of at least two values each."""
    samples = (minuend, subtrahend)
    parts = [float(values.var(ddof=1)) / len(values) for values in samples]
    gap, variance = float(minuend.mean() - subtrahend.mean()), sum(parts)
    if variance == 0:
        return Interval(gap, gap, gap)
    freedom = variance**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, samples, strict=True))
    half = float(stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(variance)
    return Interval(gap, gap - half, gap + half)


def compare_optimum(
    stored: StoredOptimum, optimum: Optimum | None, tolerance: float, loss_tolerance: float, confidence: float
) -> ComparedOptimum:
    """The finding on one N, as `Baseline.compare` describes; `optimum` is None where it was not run."""
    assert stored.log2_lr_by_seed is not None
    assert stored.loss_by_seed is not None
    if optimum is None:
        return ComparedOptimum(stored.n, "INCONCLUSIVE", "it was not run", stored.lr)
    if optimum.by_seed is None:
        assert optimum.censored is not None
        return ComparedOptimum(stored.n, "INCONCLUSIVE", CENSORED[optimum.censored], stored.lr, seeds=optimum.seeds)
    shift, gaps = change(optimum.by_seed, stored.log2_lr_by_seed, confidence)
    loss, loss_gaps = change(loss_at_optimum(optimum), stored.loss_by_seed, confidence)
    seeds = optimum.seeds if gaps is None else len(gaps)
    holds = ComparedOptimum(stored.n, "HOLDS", "", stored.lr, shift, loss, seeds, gaps is not None)
    if shift.outside(tolerance):
        return replace(holds, answer="MOVED", reason=f"the optimum moved by {shift.estimate:+.2f} octave")
    if loss.low > loss_tolerance:
        worse = f"{loss.estimate:.{decimals(loss_tolerance)}f}"
        return replace(holds, answer="WORSE", reason=f"the loss at the optimum is worse by {worse}")
    if not shift.inside(tolerance):
        advice = more_seeds(gaps, shift, tolerance, confidence)
        reason = f"the interval of the shift reaches across the tolerance; {advice}"
        return replace(holds, answer="INCONCLUSIVE", reason=reason)
    if loss.high >= loss_tolerance:
        advice = more_seeds(loss_gaps, loss, loss_tolerance, confidence)
        return replace(holds, answer="INCONCLUSIVE", reason=f"the loss may be worse by the tolerance; {advice}")
    return holds


def not_told_by_loss(finding: ComparedOptimum) -> ComparedOptimum:
    """The finding where the tolerance of the loss would pass any LR."""
    reason = "the tolerance of the loss is as large as the whole curve is high; give a smaller one, with --regret"
    return replace(finding, answer="INCONCLUSIVE", reason=reason) if finding.answer == "HOLDS" else finding


def more_seeds(gaps: pd.Series | None, interval: Interval, tolerance: float, confidence: float) -> str:
    """Words that say what to run so that an interval no longer reaches across its tolerance."""
    if gaps is None:
        return "run the seeds of the baseline, so that they are paired"
    room = abs(abs(interval.estimate) - tolerance)
    seeds = seeds_needed(float(gaps.std(ddof=1)), room, confidence)
    if seeds is None:
        return "it lies so near the tolerance that more seeds hardly settle it"
    return f"run about {max(seeds, len(gaps) + 1)} seeds in all, here and for the baseline"


def _setting(value: Any) -> str:
    return "unknown" if value is None else short(value)[1:-1] if len(str(value)) > 60 else str(value)
