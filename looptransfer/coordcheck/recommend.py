"""The exponent p in ε ∝ N^−p that a model needs, from how the outputs of its branches add up over the visits."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from looptransfer.coordcheck.exponents import exponent_table, fit_exponents
from looptransfer.coordcheck.promises import Promise
from looptransfer.errors import InputError
from looptransfer.transfer.optimum import Interval, t_interval

CONFIDENCE = 0.90  # of the intervals shown
FULL = 0.9  # an exponent from here up is full alignment: 1/N
LEAST_DOUBLINGS = 2


@dataclass(frozen=True)
class Recommendation:
    """p at initialisation and at the last step of the check, of the branch that needs most, and the evidence.

    `exponent` is what to use: 1, the paper's, where alignment is full at either moment or the measurement cannot rule
    that out; else the larger of the two upper limits, rounded up to a twentieth. `evidence` has a row per branch and
    moment: growth exponent of ‖Σ r_n‖ in N with its 90 % t-interval, and the mean cosine between the increments.
    """

    exponent: float
    at_init: Interval
    after_training: Interval
    steps: int
    supports_paper: bool
    evidence: pd.DataFrame = field(repr=False, compare=False)

    def __str__(self) -> str:
        measured = f"p = {self.at_init} at initialisation, {self.after_training} after {self.steps} steps"
        if self.supports_paper:
            return f"ε ∝ N^−1, the paper's rule: visits add up coherently ({measured})"
        return (
            f"ε ∝ N^−{self.exponent:g} would do: the measurement does not support 1/N. The visits of no branch add up "
            f"in full ({measured}), so 1/N makes the branches fade as N grows"
        )


def recommended(rows: pd.DataFrame, looped: Sequence[str]) -> Recommendation:
    """The exponent from the rows of one rule over N, as `CoordCheck.recommend` describes; raises as that does."""
    counts = sorted(rows["loops"].unique())
    if not looped:
        raise InputError("no branch is visited more than once, so no exponent in N is needed; check a looped model")
    if counts[-1] / counts[0] < 2**LEAST_DOUBLINGS:
        raise InputError(
            f"the loop counts {', '.join(map(str, counts))} span less than {LEAST_DOUBLINGS} doublings, which tells no "
            "exponent; check at 1, 2, 4, 8 or more"
        )
    evidence = pd.DataFrame([_growth(rows, module, moment) for moment in ("init", "end") for module in looped])
    largest = {moment: group.loc[group["p"].idxmax()] for moment, group in evidence.groupby("moment")}
    at_init, after = (Interval(*largest[moment][["p", "low", "high"]].astype(float)) for moment in ("init", "end"))
    supports = max(at_init.high, after.high) >= FULL
    exponent = 1.0 if supports else -(-max(at_init.high, after.high) // 0.05) * 0.05
    return Recommendation(round(exponent, 2), at_init, after, int(rows["step"].max()), supports, evidence)


def _growth(rows: pd.DataFrame, module: str, moment: str) -> dict[str, object]:
    """Growth exponent of ‖Σ r_n‖ of one branch: that of what it adds, less that of its multiplier."""
    branch = rows[rows["module"] == module]
    multiplier = Promise("loops", "branch_rms", "looped", "init", "first", 0, 0)
    added = Promise("loops", "added_rms", "looped", "init" if moment == "init" else "end", "last", 0, 0)
    tables = [
        exponent_table(branch[branch["statistic"] == promise.statistic], promise, rows)
        for promise in (added, multiplier)
    ]
    if any(table is None or not ((table > 0) & (table < float("inf"))).all(axis=None) for table in tables):
        raise InputError(f"what {module} adds is zero or not finite in some run; lower the LR, or check fewer steps")
    total, single = (fit_exponents(table) for table in tables if table is not None)
    interval = t_interval(total - single, CONFIDENCE)
    step = 0 if moment == "init" else rows["step"].max()
    most = rows[(rows["statistic"] == "alignment") & (rows["loops"] == rows["loops"].max()) & (rows["step"] == step)]
    return {
        "moment": moment,
        "module": module,
        "p": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "alignment": float(most["value"].mean()),
    }
