"""One table: every situation with its answer, its sentence, and the runs that would settle it.

A situation is a cause, with a note behind a colon where a cause has several sentences. A new cause is a name in
`verdict.Cause`, a line in `judge.situation_of`, and a row here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import pandas as pd

from looptransfer.transfer import drift, further
from looptransfer.transfer.further import FurtherRuns, Tables, listed, of_counts, runs_at
from looptransfer.transfer.optimum import Censored
from looptransfer.transfer.verdict import Answer, Cause, Measured, RuleVerdict, Terms

SEEDS = 4  # in all, where there is one: at the noise of the reference model they settle most sweeps (reports/verdict/)
FEWEST_OCTAVES = 4  # a plateau over fewer of them is first looked at with a wider grid
CENSORED: Mapping[Censored, str] = {
    "low edge": "the lowest LR is the best: the optimum is censored; extend the grid to lower LRs",
    "high edge": "the highest LR is the best: the optimum is censored; extend the grid to higher LRs",
    "diverged": "divergence hides the optimum",
    "plateau": "the loss has no curvature that stands out of the noise",
    "flat bottom": "the basin is flat at its bottom, so that no LR in it stands out as the optimum",
    "one seed": "there is one seed, so nothing tells noise from a shift",
    "too few LRs": "fewer than three LRs near the optimum were run by every seed",
}


@dataclass(frozen=True)
class Case:
    """A table that is judged: what was measured, the terms, and the N that the situation is about."""

    measured: Measured
    terms: Terms
    counts: list[int]

    @property
    def tables(self) -> Tables:
        """The losses at those N."""
        return of_counts(self.measured.tables, self.counts)

    @property
    def seeds(self) -> int:
        """The number of seeds that are compared: those of all N, or of the largest where that is what it is about."""
        return len(self._by_seed)

    @property
    def seeds_in_all(self) -> int | None:
        """The number that would settle the drift or, of the largest N, the regret; None where that is over 64.

        They bring the interval to one side of the tolerance, or narrow that of the optimum until the LR is good all
        over it, if mean and scatter stay as they are.
        """
        measured, target = self.measured, self.measured.optima[-1]
        assert measured.drift is not None
        assert measured.log2_lr is not None
        room = abs(abs(measured.drift.estimate) - self.terms.tolerance)
        if self.counts == [target.n]:
            room = drift.room_for_regret(target, measured.log2_lr, self.terms.regret_tolerance)
        seeds = further.seeds_needed(float(self._by_seed.std(ddof=1)), room, self.terms.confidence)
        return None if seeds is None else max(seeds, self.seeds + 1)

    @property
    def _by_seed(self) -> pd.Series:
        target = self.measured.optima[-1]
        by_seed = target.by_seed if self.counts == [target.n] else self.measured.drift_by_seed
        return pd.Series(dtype=float) if by_seed is None else by_seed


@dataclass(frozen=True)
class Row:
    """A row of the table; its sentences have the fields of `_facts`."""

    reason: str
    advice: str = ""
    runs: Callable[[Case], FurtherRuns | None] = lambda case: None
    answer: Answer = "INCONCLUSIVE"


def advised(measured: Measured, situation: str, terms: Terms) -> RuleVerdict:
    """The verdict for a situation."""
    case = Case(measured, terms, _counts(measured, situation))
    if situation + OVER in ROWS and case.seeds_in_all is None:
        situation += OVER
    row = ROWS[situation]
    runs = row.runs(case)
    facts = _facts(case, runs)
    return RuleVerdict(
        **{field.name: getattr(measured, field.name) for field in fields(Measured)},
        answer=row.answer,
        cause=cast(Cause, situation.partition(":")[0]),
        reason=row.reason.format(**facts),
        advice=row.advice.format(**facts),
        further_runs=runs,
    )


def _counts(measured: Measured, situation: str) -> list[int]:
    """The N that a situation is about."""
    if situation == "too few LRs: none shared":
        return [n for n, table in measured.tables.items() if table.empty]
    if situation == "shape: a wall":
        return [optimum.n for optimum in measured.optima if optimum.walled]
    if situation == "regret: elsewhere":
        return list(measured.loses_at)
    if situation.startswith("regret"):
        return [measured.optima[-1].n]
    return [optimum.n for optimum in measured.optima if optimum.censored == situation] or measured.fitted


def _facts(case: Case, runs: FurtherRuns | None) -> dict[str, Any]:
    """The fields of the sentences."""
    measured, terms = case.measured, case.terms
    estimate = math.nan if measured.drift is None else measured.drift.estimate
    return {
        "N": terms.axis_label,
        "counts": listed(case.counts),
        "drift": estimate,
        "octaves": abs(estimate),
        "direction": "down" if estimate < 0 else "up",
        "by_reach": listed(f"{by_reach:+.2f}" for by_reach in measured.drift_by_reach),
        "tolerance": terms.regret_tolerance,
        "height": measured.height,
        "controls": listed(measured.flat_controls),
        "basin": _shared_basin(measured, terms),
        "lrs": "" if runs is None else listed(f"{lr:.3g}" for lr in runs.lrs),
        "new_seeds": "" if runs is None else listed(runs.seeds),
        "case": case,
        "most": further.MOST,
    }


def _shared_basin(measured: Measured, terms: Terms) -> str:
    """The LRs that serve at every N although none is the best."""
    basin = measured.shared_basin
    if basin is None or len(measured.with_basin) < len(measured.optima):
        return ""
    within = f"within {terms.regret_tolerance:.3g} of the best at every {terms.axis_label}"
    return f"; any LR from {2**basin.low:.3g} to {2**basin.high:.3g} is {within}"


# -- runs


def _below_divergence(case: Case) -> FurtherRuns:
    best, step = min(map(further.best_lr, case.tables.values())), further.span(case.tables)[2]
    return runs_at(case.tables, [best - 2 * step, best - step, best + step / 2])


def _off_the_plateau(case: Case) -> FurtherRuns:
    low, high, step = further.span(case.tables)
    tables = case.measured.tables
    if high - low >= FEWEST_OCTAVES:
        return further.more_seeds(tables, 2 * len(further.all_seeds(tables)))
    return runs_at(tables, [low - 2 * step, low - step, high + step, high + 2 * step])


def _beyond_edge(case: Case, steps: tuple[int, int]) -> FurtherRuns:
    low, high, step = further.span(case.tables)
    return runs_at(case.tables, [(high if steps[0] > 0 else low) + number * step for number in steps])


def _beside_one_seed(case: Case) -> FurtherRuns:
    tables = case.measured.tables
    alone = len(further.all_seeds(tables)) == 1
    return further.more_seeds(tables, SEEDS) if alone else further.missing_seeds(tables)


def _around_best_lr(case: Case) -> FurtherRuns:
    best = min(map(further.best_lr, case.tables.values()))
    return runs_at(case.tables, [best + half / 2 for half in range(-4, 5)])


def _censored(cause: Censored, advice: str, runs: Callable[[Case], FurtherRuns]) -> Row:
    return Row(f"At {{N}} = {{counts}} {CENSORED[cause]}.", advice, runs)


def _closer_lrs(case: Case) -> FurtherRuns:
    return further.closer_lrs(of_counts(case.measured.tables, case.measured.fitted))


OVER = ": over 64 seeds"
RUN_LRS = "run LRs {lrs} at {N} = {counts}"
MOVES = "The optimum moves {direction} by {octaves:.2f} octave per doubling of {N}"
IN_ALL = "run about {case.seeds_in_all} seeds in all"
ACROSS = "The interval of the drift reaches across the tolerance."
REGRET = "The regret of the transferred LR may reach the tolerance."
CLOSER = "run LRs between those around the optima"
ROWS: Mapping[str, Row] = {
    "flat": Row("The optimum stays put and the transferred LR loses nothing that matters.", answer="FLAT"),
    "drifts": Row(f"{MOVES}.", answer="DRIFTS"),
    "drifts: some censored": Row(
        f"{MOVES} over {{N}} = {{counts}}, the others being censored.", answer="DRIFTS"
    ),
    "one N": Row(
        "Only {N} = {case.measured.optima[0].n} was run.", "run the same LRs at one larger {N} or more",
        lambda case: further.larger_n(case.measured.tables, 4),
    ),
    "low edge": _censored("low edge", RUN_LRS, lambda case: _beyond_edge(case, (-2, -1))),
    "high edge": _censored("high edge", RUN_LRS, lambda case: _beyond_edge(case, (1, 2))),
    "diverged": _censored("diverged", RUN_LRS, _below_divergence),
    "plateau": _censored("plateau", "run LRs {lrs} as well, with seeds {new_seeds}", _off_the_plateau),
    "flat bottom": _censored("flat bottom", f"{RUN_LRS}{{basin}}", lambda case: further.closer_lrs(case.tables)),
    "one seed": _censored("one seed", "run the same LRs with seeds {new_seeds} at {N} = {counts}", _beside_one_seed),
    "too few LRs": _censored("too few LRs", RUN_LRS, _around_best_lr),
    "too few LRs: none shared": Row(
        "At {N} = {counts} no LR was run by every seed.",
        "run every LR with every seed at {N} = {counts}, or write one LR alike for all of them",
    ),
    "no shared seeds": Row(
        "Fewer than two seeds are shared by all {N}.", "run the same seeds at every {N}",
        lambda case: further.missing_seeds(case.measured.tables),
    ),
    "too few seeds": Row(
        ACROSS, f"{IN_ALL} (there are {{case.seeds}})",
        lambda case: further.more_seeds(case.measured.tables, case.seeds_in_all or 0),
    ),
    f"too few seeds{OVER}": Row(
        ACROSS, "run twice the largest {N}: more seeds alone would take over {most}",
        lambda case: further.larger_n(case.measured.tables, 2),
    ),
    "shape": Row(
        "The drift depends on how much of the curve is fitted ({drift:+.2f}; by narrower and wider fits {by_reach}): "
        "the basin's shape changes with {N}.", CLOSER, _closer_lrs,
    ),
    "shape: a wall": Row(
        "At {N} = {counts} runs with a finite but far higher loss stand within 1.5 octaves of the optimum and bend the "
        "fit.", f"mark runs that went unstable as diverged, or {CLOSER}", _closer_lrs,
    ),
    "tolerance": Row(
        "The tolerance of the regret, {tolerance:.3g}, is as large as the whole curve is high, {height:.3g}: any LR "
        "would pass.", "give a smaller tolerance, with --regret",
    ),
    "regret: not run": Row(
        "The transferred LR lies outside the LRs run at the largest {N}.", "run LRs around the transferred LR"
    ),
    "regret: too large": Row(
        "The optimum stays, but the transferred LR costs more than the tolerance.",
        "tune the proxy again, nearer to its optimum",
    ),
    "regret: elsewhere": Row(
        "The optimum has no trend, but at {N} = {counts} the transferred LR costs more than the tolerance.",
        "look for what differs at {N} = {counts}, and run the {N} beside it",
    ),
    "regret": Row(
        REGRET, f"{IN_ALL} at {{N}} = {{counts}} (there are {{case.seeds}})",
        lambda case: further.more_seeds(case.tables, case.seeds_in_all or 0),
    ),
    f"regret{OVER}": Row(
        REGRET, "tune the proxy again: over {most} seeds would be needed to see the regret of this LR"
    ),
    "no power": Row(
        "No power: the control ({controls}) is as flat, so this sweep could not have seen a drift that the rule mends.",
        "run four times the largest {N}, where a control drifts",
        lambda case: further.larger_n(case.measured.tables, 4),
    ),
}  # fmt: skip
