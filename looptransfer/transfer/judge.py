"""From the tables of one rule to a situation: measure, then decide. The table in `causes` says what follows."""

import math
from collections.abc import Mapping

import pandas as pd

from looptransfer.transfer import drift
from looptransfer.transfer.causes import advised
from looptransfer.transfer.optimum import Interval, Optimum, curve_height, t_interval
from looptransfer.transfer.verdict import Measured, RuleVerdict, Terms

FEWEST_FITTED = 3  # known optima that a drift needs where others are censored


def judge_tables(
    rule: str,
    tables: Mapping[int, pd.DataFrame],
    terms: Terms,
    horizons: Mapping[float, tuple[Optimum, ...]] | None = None,
) -> RuleVerdict:
    """The verdict on the tables of losses of one rule, one per N as `curve` makes them."""
    measured = measure(rule, tables, terms, horizons or {})
    return advised(measured, situation_of(measured, terms), terms)


def measure(
    rule: str,
    tables: Mapping[int, pd.DataFrame],
    terms: Terms,
    horizons: Mapping[float, tuple[Optimum, ...]],
) -> Measured:
    """Optima, drift and regret; the transferred LR is that of the terms, or the optimum of the smallest N."""
    optima = drift.find_optima(tables, terms.confidence, terms.regret_tolerance)
    drifts, (proxy, *_, target) = drift.drift_by_seed(optima), (optima[0], *optima)
    log2_lr = proxy.log2_lr.estimate if proxy.log2_lr is not None else None
    log2_lr = log2_lr if terms.transferred_lr is None else math.log2(terms.transferred_lr)
    regrets = {} if log2_lr is None else {o.n: drift.regret_by_seed(o, tables[o.n], log2_lr) for o in optima}
    intervals = {o.n: _regret(o, regrets.get(o.n), log2_lr, terms) for o in optima}
    return Measured(
        rule,
        tables,
        optima,
        log2_lr,
        drift=None if drifts is None else t_interval(drifts, terms.confidence),
        drift_by_reach=drift.drift_by_reach(optima, tables),
        drift_by_seed=drifts,
        regret=intervals[target.n],
        loses_at=tuple(n for n, regret in intervals.items() if regret and regret.low > terms.regret_tolerance),
        regret_by_seed=regrets.get(target.n),
        height=curve_height(tables[target.n]),
        horizons=horizons,
    )


def _regret(optimum: Optimum, by_seed: pd.Series | None, log2_lr: float | None, terms: Terms) -> Interval | None:
    if log2_lr is None or by_seed is None:
        return None
    return drift.regret_interval(optimum, by_seed, log2_lr, terms.confidence)


def situation_of(measured: Measured, terms: Terms) -> str:
    """The row of `causes.ROWS` that applies; what cannot be judged goes first, but for a drift beside hidden optima."""
    if len(measured.optima) < 2:
        return "one N"
    moves = measured.drift is not None and measured.drift.outside(terms.tolerance)
    hidden = [optimum.censored for optimum in measured.optima if optimum.censored is not None]
    agrees = _fits_agree(measured, terms.tolerance)
    if moves and agrees and (not hidden or len(measured.fitted) >= FEWEST_FITTED):
        return "drifts: some censored" if hidden else "drifts"
    if hidden:
        return "too few LRs: none shared" if any(table.empty for table in measured.tables.values()) else hidden[0]
    if measured.drift is None:
        return "no shared seeds"
    if not moves and not measured.drift.inside(terms.tolerance):
        return "too few seeds"
    if not agrees:
        return "shape: a wall" if any(optimum.walled for optimum in measured.optima) else "shape"
    return _by_regret(measured, terms.regret_tolerance)


def _by_regret(measured: Measured, tolerance: float) -> str:
    """The situation by what the transferred LR loses; the drift is inside its tolerance."""
    if measured.regret is None:
        return "regret: not run"
    if measured.height is not None and tolerance >= measured.height:
        return "tolerance"
    if measured.regret.low > tolerance:
        return "regret: too large"
    if measured.loses_at:
        return "regret: elsewhere"
    if measured.regret.high >= tolerance:
        return "regret"
    return "no power" if measured.flat_controls else "flat"


def _fits_agree(measured: Measured, tolerance: float) -> bool:
    """All fits put the drift on one side of the tolerance, and no wall of unstable runs bends one of them."""
    estimate = math.nan if measured.drift is None else measured.drift.estimate
    sides = {_side(by_reach, tolerance) for by_reach in (estimate, *measured.drift_by_reach)}
    return len(sides) == 1 and not any(optimum.walled for optimum in measured.optima)


def _side(drift: float, tolerance: float) -> int:
    """1 above the tolerance, -1 below its negative, 0 inside."""
    return 0 if abs(drift) <= tolerance else 1 if drift > 0 else -1
