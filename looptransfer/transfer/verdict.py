"""Whether the LR optimum stays flat as N grows: FLAT, DRIFTS or INCONCLUSIVE, and why."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from looptransfer.errors import InputError
from looptransfer.transfer.optimum import Interval, Optimum, curve, find_optimum, t_interval
from looptransfer.transfer.results import tidy

SCHEMA_VERSION = 1
Answer = Literal["FLAT", "DRIFTS", "INCONCLUSIVE"]
EXIT_STATUS: dict[Answer, int] = {"FLAT": 0, "DRIFTS": 1, "INCONCLUSIVE": 3}


@dataclass(frozen=True)
class RuleVerdict:
    """What the runs of one rule say."""

    rule: str
    answer: Answer
    reason: str
    advice: str  # the runs that would settle an INCONCLUSIVE; empty otherwise
    optima: tuple[Optimum, ...]  # one per loop count
    drift: Interval | None  # octaves per doubling of N
    regret: Interval | None  # nats, of the transferred LR at the largest N
    drift_by_seed: pd.Series | None = None
    regret_by_seed: pd.Series | None = None


@dataclass(frozen=True)
class Difference:
    """A control minus the rule asked for, paired by seed. An interval above 0: the control is worse."""

    control: str
    drift: Interval | None  # octaves per doubling of N, over the loop counts that both have
    regret: Interval | None  # nats, at the largest loop count, where both have the same


@dataclass(frozen=True)
class Verdict:
    """The judgement of a table of results. `print(verdict)` says it in words."""

    rule: str
    transferred_lr: float | None
    tolerance: float
    regret_tolerance: float
    confidence: float
    rules: Mapping[str, RuleVerdict]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    runs: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False, compare=False)

    @property
    def answer(self) -> Answer:
        """The answer for the rule asked for."""
        return self.rules[self.rule].answer

    @property
    def exit_status(self) -> int:
        """0 flat, 1 drifts, 3 inconclusive."""
        return EXIT_STATUS[self.answer]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain JSON values, without wall times; the schema has a version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "rule": self.rule,
            "answer": self.answer,
            "transferred_lr": self.transferred_lr,
            "tolerance_octaves_per_doubling": self.tolerance,
            "regret_tolerance_nats": self.regret_tolerance,
            "confidence": self.confidence,
            "rules": {name: _rule_dict(one) for name, one in self.rules.items()},
            "differences": [
                {
                    "control": difference.control,
                    "drift_octaves_per_doubling": _interval_dict(difference.drift),
                    "regret_nats": _interval_dict(difference.regret),
                }
                for difference in self.differences
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        percent = f"{self.confidence:.0%}"
        lines = []
        for one in self.rules.values():
            lines.append(f"{one.rule}: {one.answer}. {one.reason}")
            lines += [f"  N = {o.loops:<4} {_optimum_text(o)}" for o in one.optima]
            if one.drift is not None:
                lines.append(f"  drift {one.drift} octaves per doubling of N (tolerance ±{self.tolerance:g})")
            if one.regret is not None:
                lines.append(
                    f"  regret {one.regret} nats at N = {one.optima[-1].loops} (tolerance {self.regret_tolerance:g})"
                )
            if one.advice:
                lines.append(f"  to settle it: {one.advice}")
        for difference in self.differences:
            lines.append(f"{difference.control} minus {self.rule}, paired by seed:")
            drift, regret = difference.drift or "unknown", difference.regret or "unknown"
            lines.append(f"  drift {drift} octaves per doubling, regret {regret} nats")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"Intervals: {percent}, Student's t over seeds.")
        return "\n".join(lines)


def check(
    results: pd.DataFrame,
    rule: str | None = None,
    transferred_lr: float | None = None,
    tolerance: float = 0.20,
    regret_tolerance: float = 0.02,
    confidence: float = 0.90,
) -> Verdict:
    """Judge a table of runs; nothing is trained. (Statistics: our extension; the paper reads its plot by eye.)

    FLAT: the interval of the drift lies inside ±tolerance (an equivalence test at (1 − confidence)/2) and the upper
    limit of the regret of the transferred LR at the largest N is below `regret_tolerance`. DRIFTS: the interval of the
    drift lies outside. Otherwise INCONCLUSIVE, with the runs that would settle it.

    Args:
        results: columns loops, lr, loss and, if there, rule, seed, diverged (see `tidy`).
        rule: the rule that is judged, the others being its controls; default "factored", or the only rule there.
        transferred_lr: absolute LR that is carried to large N; default the optimum at the smallest N.
        tolerance: in octaves per doubling of N.
        regret_tolerance: in nats.
        confidence: of the two-sided intervals.

    Raises:
        InputError: `tidy` refuses the table, the rule is not in it, or a number is out of range.
    """
    for name, value, top in (
        ("tolerance", tolerance, math.inf),
        ("regret_tolerance", regret_tolerance, math.inf),
        ("confidence", confidence, 1.0),
        ("transferred_lr", 1.0 if transferred_lr is None else transferred_lr, math.inf),
    ):
        if not 0 < value < top:
            raise InputError(f"{name} is {value!r}; it must lie between 0 and {top:g}")
    runs = tidy(results)
    present = list(dict.fromkeys(runs["rule"]))
    if rule is None:
        rule = "factored" if "factored" in present or len(present) > 1 else present[0]
    if rule not in present:
        raise InputError(f"rule {rule!r} is not in the table, which has {', '.join(present)}; choose one with --rule")
    terms = _Terms(transferred_lr, tolerance, regret_tolerance, confidence)
    verdicts = {
        name: _judge(name, runs[runs["rule"] == name], terms) for name in [rule, *(p for p in present if p != rule)]
    }
    differences = tuple(
        _difference(verdicts[rule], control, terms) for name, control in verdicts.items() if name != rule
    )
    proxy = verdicts[rule].optima[0].log2_lr
    carried = 2.0**proxy.estimate if transferred_lr is None and proxy is not None else transferred_lr
    return Verdict(rule, carried, tolerance, regret_tolerance, confidence, verdicts, differences, _notes(runs), runs)


@dataclass(frozen=True)
class _Terms:
    transferred_lr: float | None
    tolerance: float
    regret_tolerance: float
    confidence: float


def _judge(rule: str, runs: pd.DataFrame, terms: _Terms) -> RuleVerdict:
    tables = {int(str(loops)): curve(group) for loops, group in runs.groupby("loops")}
    optima = tuple(find_optimum(loops, table, terms.confidence) for loops, table in tables.items())
    known = [optimum for optimum in optima if optimum.censored is None]
    drifts = _drift_by_seed(known)
    drift = None if drifts is None else t_interval(drifts, terms.confidence)
    regrets = _regret_by_seed(optima[-1], tables[optima[-1].loops], optima[0], terms)
    regret = None if regrets is None else _bounded_interval(regrets, terms.confidence)
    answer, reason, advice = _decide(optima, drift, drifts, regret, tables, terms)
    return RuleVerdict(rule, answer, reason, advice, optima, drift, regret, drifts, regrets)


def _drift_by_seed(known: list[Optimum]) -> pd.Series | None:
    """Slope of each seed's optimum in log2(N): octaves per doubling."""
    if len(known) < 2:
        return None
    frame = pd.DataFrame({np.log2(o.loops): o.by_seed for o in known}).dropna()
    if len(frame) < 2:
        return None
    x = frame.columns.to_numpy(dtype=float) - float(np.mean(frame.columns.to_numpy(dtype=float)))
    return pd.Series(frame.to_numpy() @ x / float(x @ x), index=frame.index)


def _regret_by_seed(target: Optimum, table: pd.DataFrame, proxy: Optimum, terms: _Terms) -> pd.Series | None:
    """Loss at the transferred LR minus loss at the optimum of the same N, per seed, in nats."""
    if target.censored is not None or target.log2_lr is None or target.window is None:
        return None
    if terms.transferred_lr is not None:
        x = math.log2(terms.transferred_lr)
    elif proxy.log2_lr is not None:
        x = proxy.log2_lr.estimate
    else:
        return None
    best = target.loss(target.log2_lr.estimate)
    if target.window[0] <= x <= target.window[1]:
        return target.loss(x) - best
    if table.index[0] <= x <= table.index[-1]:  # the fit is local: further away, the runs themselves
        between = {seed: np.interp(x, table.index.to_numpy(), losses.to_numpy()) for seed, losses in table.items()}
        return pd.Series(between) - best
    return None


def _bounded_interval(values: pd.Series, confidence: float) -> Interval:
    if np.isfinite(values).all():
        return t_interval(values, confidence)
    return Interval(math.inf, math.inf, math.inf)  # the transferred LR diverges


def _decide(
    optima: tuple[Optimum, ...],
    drift: Interval | None,
    drifts: pd.Series | None,
    regret: Interval | None,
    tables: Mapping[int, pd.DataFrame],
    terms: _Terms,
) -> tuple[Answer, str, str]:
    """Answer, reason and advice; what cannot be judged is said first."""
    if len(optima) < 2:
        return "INCONCLUSIVE", f"Only N = {optima[0].loops} was run.", "run the same LRs at one larger N or more"
    hidden = next((o for o in optima if o.censored is not None), None)
    if hidden is not None:
        return "INCONCLUSIVE", *_censored(hidden, tables[hidden.loops])
    if drift is None or drifts is None:
        return "INCONCLUSIVE", "Fewer than two seeds are shared by all N.", "run the same seeds at every N"
    tolerance = terms.tolerance
    if drift.low > tolerance or drift.high < -tolerance:
        way = "down" if drift.estimate < 0 else "up"
        return "DRIFTS", f"The optimum moves {way} by {abs(drift.estimate):.2f} octave per doubling of N.", ""
    if not -tolerance < drift.low <= drift.high < tolerance:
        return (
            "INCONCLUSIVE",
            "The interval of the drift reaches across the tolerance.",
            _more_seeds(drifts, tolerance, terms.confidence),
        )
    if regret is None:
        return (
            "INCONCLUSIVE",
            "The transferred LR lies outside the LRs run at the largest N.",
            "run LRs around the transferred LR",
        )
    if regret.low > terms.regret_tolerance:
        return (
            "INCONCLUSIVE",
            "The optimum stays, but the transferred LR costs more than the tolerance.",
            "tune the proxy again, nearer to its optimum",
        )
    if regret.high >= terms.regret_tolerance:
        return (
            "INCONCLUSIVE",
            "The regret of the transferred LR may reach the tolerance.",
            "run more seeds at the largest N",
        )
    return "FLAT", "The optimum stays put and the transferred LR loses nothing that matters.", ""


def _censored(optimum: Optimum, table: pd.DataFrame) -> tuple[str, str]:
    """Why the optimum of one N cannot be told, and what to run."""
    low, high = (2 ** float(table.index[i]) if len(table) else math.nan for i in (0, -1))
    at = f"at N = {optimum.loops}"
    reason, advice = {
        "low edge": (
            f"the lowest LR, {low:.3g}, is the best: the optimum is censored",
            f"run LRs below {low:.3g} ({low / 2:.3g}, {low / 4:.3g}) {at}",
        ),
        "high edge": (
            f"the highest LR, {high:.3g}, is the best: the optimum is censored",
            f"run LRs above {high:.3g} ({high * 2:.3g}, {high * 4:.3g}) {at}",
        ),
        "diverged": ("divergence hides the optimum", f"run lower and closer LRs {at}"),
        "plateau": (
            "the loss has no curvature that stands out of the noise",
            f"run more seeds and a wider span of LRs {at}",
        ),
        "one seed": (
            "there is one seed, so nothing tells noise from a shift",
            "run the same LRs with three more seeds or more",
        ),
        "too few LRs": (
            "fewer than three LRs near the optimum were run by every seed",
            f"run the same five LRs or more for every seed {at}",
        ),
    }[str(optimum.censored)]
    return f"At N = {optimum.loops} {reason}.", advice


def _more_seeds(drifts: pd.Series, tolerance: float, confidence: float) -> str:
    """How many seeds would bring the interval to one side of the tolerance, if mean and scatter stayed as they are."""
    room = abs(abs(float(drifts.mean())) - tolerance)
    scatter = float(drifts.std(ddof=1))
    for seeds in range(len(drifts) + 1, 65):
        if float(stdtrit(seeds - 1, 0.5 + confidence / 2)) * scatter / math.sqrt(seeds) < room:
            return f"run about {seeds} seeds in all (there are {len(drifts)})"
    return "run a wider span of LRs and N: more seeds alone would take over 64"


def _difference(ours: RuleVerdict, control: RuleVerdict, terms: _Terms) -> Difference:
    known = {o.loops: o for o in ours.optima if o.censored is None}
    theirs = {o.loops: o for o in control.optima if o.censored is None}
    shared = sorted(known.keys() & theirs.keys())
    mine = _drift_by_seed([known[n] for n in shared])
    other = _drift_by_seed([theirs[n] for n in shared])
    drift = _paired(other, mine, terms.confidence)
    regret = None
    if ours.optima[-1].loops == control.optima[-1].loops:
        regret = _paired(control.regret_by_seed, ours.regret_by_seed, terms.confidence)
    return Difference(control.rule, drift, regret)


def _paired(theirs: pd.Series | None, ours: pd.Series | None, confidence: float) -> Interval | None:
    if theirs is None or ours is None:
        return None
    gaps = (theirs - ours).dropna()
    if len(gaps) < 2:
        return None
    return _bounded_interval(gaps, confidence)


def _notes(runs: pd.DataFrame) -> tuple[str, ...]:
    notes = []
    for name in ("layers", "width", "steps"):
        if name in runs and runs.loc[~runs["diverged"], name].nunique() > 1:
            notes.append(f"{name} differs between the rows, so a drift in N may be a drift in {name}")
    return tuple(notes)


def _optimum_text(optimum: Optimum) -> str:
    if optimum.log2_lr is None:
        return f"no optimum: {optimum.censored}"
    log2 = optimum.log2_lr
    return f"optimum {2**log2.estimate:.3g} [{2**log2.low:.3g}, {2**log2.high:.3g}], log2(LR) {log2}"


def _rule_dict(one: RuleVerdict) -> dict[str, Any]:
    return {
        "answer": one.answer,
        "reason": one.reason,
        "advice": one.advice,
        "drift_octaves_per_doubling": _interval_dict(one.drift),
        "regret_nats": _interval_dict(one.regret),
        "optima": [
            {
                "loops": o.loops,
                "seeds": o.seeds,
                "censored": o.censored,
                "log2_lr": _interval_dict(o.log2_lr),
            }
            for o in one.optima
        ],
    }


def _interval_dict(interval: Interval | None) -> dict[str, float | str] | None:
    """Plain JSON, which knows no infinity: a regret without bound is the text "inf"."""
    if interval is None:
        return None
    return {name: value if math.isfinite(value) else str(value) for name, value in asdict(interval).items()}
