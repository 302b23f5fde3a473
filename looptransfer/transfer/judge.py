"""Whether the LR optimum stays flat as N grows: FLAT, DRIFTS or INCONCLUSIVE, and why."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from looptransfer.transfer import advice, drift
from looptransfer.transfer.advice import FurtherRuns
from looptransfer.transfer.optimum import Censored, Interval, Optimum, curve_height, t_interval
from looptransfer.transfer.results import axis_label
from looptransfer.transfer.verdict import Answer, Cause, RuleVerdict

SKEW = 0.02  # change of the basin's skew, in 1/octave per doubling, that is worth a word
CENSORED: dict[Censored, str] = {
    "low edge": "the lowest LR is the best: the optimum is censored; extend the grid to lower LRs",
    "high edge": "the highest LR is the best: the optimum is censored; extend the grid to higher LRs",
    "diverged": "divergence hides the optimum",
    "plateau": "the loss has no curvature that stands out of the noise",
    "flat bottom": "the basin is flat at its bottom, so that no LR in it stands out as the optimum",
    "one seed": "there is one seed, so nothing tells noise from a shift",
    "too few LRs": "fewer than three LRs near the optimum were run by every seed",
}


@dataclass(frozen=True)
class Terms:
    """What a table is judged by."""

    axis: str
    transferred_lr: float | None
    tolerance: float
    regret_tolerance: float
    confidence: float

    @property
    def label(self) -> str:
        """What the axis is called in words."""
        return axis_label(self.axis)


def judge_tables(rule: str, tables: Mapping[int, pd.DataFrame], terms: Terms) -> RuleVerdict:
    """The verdict on the tables of losses of one rule, one per N as `curve` makes them, without what only informs."""
    optima = drift.find_optima(tables, terms.confidence, terms.regret_tolerance)
    drifts = drift.drift_by_seed(optima)
    x = _transferred(optima, terms)
    target = optima[-1]
    regrets = None if x is None else drift.regret_by_seed(target, tables[target.at], x)
    regret = None
    if regrets is not None and x is not None:
        regret = drift.regret_interval(target, regrets, x, terms.confidence)
    facts = RuleVerdict(
        rule,
        "INCONCLUSIVE",
        "one N",
        "",
        "",
        optima,
        drift=None if drifts is None else t_interval(drifts, terms.confidence),
        drift_by_reach=drift.drift_by_reach(optima, tables),
        displacement=drift.worst_displacement(optima, terms.confidence),
        regret=regret,
        drift_by_seed=drifts,
        regret_by_seed=regrets,
        height=curve_height(tables[target.at]),
    )
    answer, cause, reason, (words, further) = _decide(facts, tables, terms)
    return replace(facts, answer=answer, cause=cause, reason=reason, advice=words, further_runs=further)


def _transferred(optima: tuple[Optimum, ...], terms: Terms) -> float | None:
    """log2 of the transferred LR."""
    if terms.transferred_lr is not None:
        return math.log2(terms.transferred_lr)
    return None if optima[0].log2_lr is None else optima[0].log2_lr.estimate


_What = tuple[str, FurtherRuns | None]


def _decide(facts: RuleVerdict, tables: Mapping[int, pd.DataFrame], terms: Terms) -> tuple[Answer, Cause, str, _What]:
    """Answer, cause, reason, and what to run; what cannot be judged is said first."""
    optima, label, tolerance = facts.optima, terms.label, terms.tolerance
    if len(optima) < 2:
        words = f"run the same LRs at one larger {label} or more"
        return "INCONCLUSIVE", "one N", f"Only {label} = {optima[0].at} was run.", (words, advice.larger_n(tables, 4))
    hidden = {o.at: o.censored for o in optima if o.censored is not None}
    known = [o.at for o in optima if o.censored is None]
    beyond = facts.drift is not None and outside(facts.drift, tolerance)
    agreed = all(_side(by_reach, tolerance) == _side(_mean(facts), tolerance) for by_reach in facts.drift_by_reach)
    agreed = agreed and not any(o.walled for o in optima)
    if beyond and agreed and facts.drift is not None and (not hidden or len(known) >= 3):
        way = "down" if facts.drift.estimate < 0 else "up"
        over = f" over {label} = {', '.join(map(str, known))}, the others being censored" if hidden else ""
        reason = f"The optimum moves {way} by {abs(facts.drift.estimate):.2f} octave per doubling of {label}{over}."
        return "DRIFTS", "drifts", reason, ("", None)
    if hidden:
        return "INCONCLUSIVE", *_censored(hidden, facts, tables, terms)
    if facts.drift is None:
        reason, words = f"Fewer than two seeds are shared by all {label}.", f"run the same seeds at every {label}"
        return "INCONCLUSIVE", "no shared seeds", reason, (words, advice.missing_seeds(tables))
    if not beyond and not inside(facts.drift, tolerance):
        reason = "The interval of the drift reaches across the tolerance."
        return "INCONCLUSIVE", "too few seeds", reason, _more_seeds(facts, tables, terms)
    if not agreed:
        return "INCONCLUSIVE", *_shape(facts, tables, terms)
    return _decide_regret(facts, tables, terms)


def _decide_regret(
    facts: RuleVerdict, tables: Mapping[int, pd.DataFrame], terms: Terms
) -> tuple[Answer, Cause, str, _What]:
    """The drift is inside its tolerance: whether the transferred LR loses anything."""
    if facts.regret is None:
        reason = f"The transferred LR lies outside the LRs run at the largest {terms.label}."
        return "INCONCLUSIVE", "regret", reason, ("run LRs around the transferred LR", None)
    if facts.height is not None and terms.regret_tolerance >= facts.height:
        reason = (
            f"The tolerance of the regret, {terms.regret_tolerance:.3g}, is as large as the whole curve is high, "
            f"{facts.height:.3g}: any LR would pass."
        )
        return "INCONCLUSIVE", "tolerance", reason, ("give a smaller tolerance, with --regret", None)
    if facts.regret.low > terms.regret_tolerance:
        reason = "The optimum stays, but the transferred LR costs more than the tolerance."
        return "INCONCLUSIVE", "regret", reason, ("tune the proxy again, nearer to its optimum", None)
    if facts.regret.high >= terms.regret_tolerance:
        reason = "The regret of the transferred LR may reach the tolerance."
        return "INCONCLUSIVE", "regret", reason, _more_seeds_of_target(facts, tables, terms)
    return "FLAT", "flat", "The optimum stays put and the transferred LR loses nothing that matters.", ("", None)


def _mean(facts: RuleVerdict) -> float:
    return math.nan if facts.drift is None else facts.drift.estimate


def outside(interval: Interval, tolerance: float) -> bool:
    """Whether no value in the interval is within the tolerance."""
    return interval.low > tolerance or interval.high < -tolerance


def inside(interval: Interval, tolerance: float) -> bool:
    """Whether every value in the interval is within the tolerance."""
    return -tolerance < interval.low <= interval.high < tolerance


def _side(value: float, tolerance: float) -> int:
    """1 above the tolerance, -1 below its negative, 0 inside."""
    return 0 if abs(value) <= tolerance else int(math.copysign(1, value))


def _censored(
    hidden: Mapping[int, Censored], facts: RuleVerdict, tables: Mapping[int, pd.DataFrame], terms: Terms
) -> tuple[Cause, str, _What]:
    """Why the optima of some N cannot be told, and what to run."""
    why = next(iter(hidden.values()))
    at = ", ".join(str(n) for n, reason in hidden.items() if reason == why)
    empty = ", ".join(str(n) for n, table in tables.items() if table.empty)
    if empty:
        words = f"run every LR with every seed at {terms.label} = {empty}, or write one LR alike for all of them"
        return "too few LRs", f"At {terms.label} = {empty} no LR was run by every seed.", (words, None)
    further = advice.uncensor(tables, hidden)
    lrs = ", ".join(f"{lr:.3g}" for lr in further.lrs)
    words = {
        "one seed": f"run the same LRs with seeds {', '.join(further.seeds)} at {terms.label} = {at}",
        "plateau": f"run LRs {lrs} as well, with seeds {', '.join(further.seeds)}",
        "flat bottom": f"run LRs {lrs} at {terms.label} = {at}{_shared_basin(facts, terms)}",
    }.get(why, f"run LRs {lrs} at {terms.label} = {at}")
    return why, f"At {terms.label} = {at} {CENSORED[why]}.", (words, further)


def _shared_basin(facts: RuleVerdict, terms: Terms) -> str:
    """The LRs that serve at every N although none is the best."""
    basins = [optimum.basin for optimum in facts.optima]
    low = max(-math.inf if basin is None else basin.low for basin in basins)
    high = min(-math.inf if basin is None else basin.high for basin in basins)
    if low >= high:
        return ""
    return (
        f"; any LR from {2**low:.3g} to {2**high:.3g} is within {terms.regret_tolerance:.3g} of the best at every "
        f"{terms.label}"
    )


def _shape(facts: RuleVerdict, tables: Mapping[int, pd.DataFrame], terms: Terms) -> tuple[Cause, str, _What]:
    walled = [o.at for o in facts.optima if o.walled]
    if walled:
        at = f"{terms.label} = {', '.join(map(str, walled))}"
        reason = (
            f"At {at} runs with a finite but far higher loss stand within 1.5 octaves of the optimum and bend the fit."
        )
        words = "mark runs that went unstable as diverged, or run LRs between those around the optima"
    else:
        others = ", ".join(f"{by_reach:+.2f}" for by_reach in facts.drift_by_reach)
        reason = (
            f"The drift depends on how much of the curve is fitted ({_mean(facts):+.2f}; by narrower and wider fits "
            f"{others}): the basin's shape changes with {terms.label}."
        )
        words = "run LRs between those around the optima"
    return "shape", reason, (words, advice.closer_lrs(tables, [o.at for o in facts.optima if o.censored is None]))


def _more_seeds(facts: RuleVerdict, tables: Mapping[int, pd.DataFrame], terms: Terms) -> _What:
    """How many seeds would bring the interval to one side of the tolerance, if mean and scatter stayed as they are."""
    assert facts.drift_by_seed is not None
    room = abs(abs(_mean(facts)) - terms.tolerance)
    seeds = advice.seeds_needed(float(facts.drift_by_seed.std(ddof=1)), room, terms.confidence)
    there = len(facts.drift_by_seed)
    if seeds is None:
        words = f"run a {terms.label} twice as large: more seeds alone would take over {advice.MOST}"
        return words, advice.larger_n(tables, 2)
    seeds = max(seeds, there + 1)
    return f"run about {seeds} seeds in all (there are {there})", advice.more_seeds(tables, seeds)


def _more_seeds_of_target(facts: RuleVerdict, tables: Mapping[int, pd.DataFrame], terms: Terms) -> _What:
    """How many seeds would narrow the optimum of the largest N until the LR is good all over its interval."""
    target, lr = facts.optima[-1], _transferred(facts.optima, terms)
    assert target.by_seed is not None
    assert lr is not None
    room = drift.room_for_regret(target, lr, terms.regret_tolerance)
    seeds = advice.seeds_needed(float(target.by_seed.std(ddof=1)), room, terms.confidence)
    if seeds is None:
        return f"tune the proxy again: over {advice.MOST} seeds would be needed to see the regret of this LR", None
    seeds = max(seeds, target.seeds + 1)
    words = f"run about {seeds} seeds in all at {terms.label} = {target.at} (there are {target.seeds})"
    return words, advice.more_seeds({target.at: tables[target.at]}, seeds)


def shape_changes(skew_trend: Interval) -> bool:
    """Whether the basin's skew changes with N by as much as could bend the drift."""
    return abs(skew_trend.estimate) > SKEW and skew_trend.low * skew_trend.high > 0
