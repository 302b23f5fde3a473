"""The cheap mode of the gate: a stored optimum should still lie between half and twice its LR. Our extension.

Three LRs, half, once and twice the stored optimum, with paired seeds. The parabola through the three mean losses has
its vertex within t octaves of the middle exactly where its slope points inwards at both −t and +t, and a slope is
linear in the losses: a t-interval over seeds holds for it, where the vertex itself is a ratio with heavy tails.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from looptransfer.transfer.comparison import ComparedOptimum, change, more_seeds
from looptransfer.transfer.optimum import Array, Interval, t_interval, t_interval_of_runs
from looptransfer.transfer.stored import StoredOptimum
from looptransfer.transfer.verdict import decimals

OCTAVES = (-1.0, 0.0, 1.0)


def stored_lrs(stored: StoredOptimum) -> tuple[float, ...]:
    """Half, once and twice the stored optimum, absolute."""
    assert stored.log2_lr is not None
    return tuple(float(f"{2.0 ** (stored.log2_lr.estimate + octaves):.6g}") for octaves in OCTAVES)


def first_seeds(count: int) -> int:
    """How many of `count` seeds are looked at first: half, two at least."""
    return max(2, count // 2)


def bracket_optimum(
    stored: StoredOptimum, table: pd.DataFrame, loss_tolerance: float, confidence: float
) -> ComparedOptimum:
    """The finding on one N, as `Baseline.bracket` describes; `table` holds the losses at three LRs, seeds across."""
    assert stored.loss_by_seed is not None
    seeds = table.shape[1]
    inconclusive = ComparedOptimum(stored.n, "INCONCLUSIVE", "", stored.lr)
    if len(table) != len(OCTAVES) or not np.allclose(table.index, np.log2(stored_lrs(stored)), atol=1e-3):
        return replace(inconclusive, reason="half, once and twice the stored LR were not run by every seed")
    lower, middle, higher = table.to_numpy(dtype=float)
    if not np.isfinite(middle).all():
        reason = f"{int((~np.isfinite(middle)).sum())} of {seeds} runs at the stored LR diverge"
        return replace(inconclusive, answer="MOVED", reason=reason, seeds=seeds)
    loss, gaps = change(table.iloc[1], stored.loss_by_seed, confidence)
    down, up = lower - middle, higher - middle  # what half and twice the LR cost
    holds = ComparedOptimum(
        stored.n, "HOLDS", "", stored.lr, _vertex(down, up, confidence), loss, seeds, gaps is not None
    )
    for cost, side in ((down, "half"), (up, "twice")):
        gain = t_interval_of_runs(cost, confidence)
        if gain.high < 0:
            reason = f"{side} the stored LR is better by {-gain.estimate:.{decimals(loss_tolerance)}f}"
            return replace(holds, answer="MOVED", reason=reason)
    if loss.low > loss_tolerance:
        worse = f"{loss.estimate:.{decimals(loss_tolerance)}f}"
        return replace(holds, answer="WORSE", reason=f"the loss at the stored LR is worse by {worse}")
    for side, slope in (("half", _inwards(down, up)), ("twice", _inwards(up, down))):
        interval = t_interval_of_runs(slope, confidence)
        if not interval.low > 0:
            advice = more_seeds(pd.Series(slope), interval, 0.0, confidence)
            reason = f"the loss may still fall towards {side} the stored LR; {advice}"
            return replace(holds, answer="INCONCLUSIVE", reason=reason)
    return holds


def _inwards(near: Array, far: Array) -> Array:
    """Per seed the outward slope, in loss per octave, of the parabola at one neighbour, from what both neighbours cost.

    Where the other neighbour diverged there is no parabola: the optimum is then asked to be within half an octave.
    """
    return np.asarray(1.5 * near + 0.5 * far if np.isfinite(far).all() else near)


def _vertex(down: Array, up: Array, confidence: float) -> Interval | None:
    """The vertex in octaves from the middle, linearised by seed; None where a neighbour diverged or nothing curves."""
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        return None
    slope, curvature = (up - down) / 2, (up + down) / 2
    if curvature.mean() <= 0:
        return None
    vertex = -slope.mean() / (2 * curvature.mean())
    return t_interval(vertex - (slope + 2 * curvature * vertex) / (2 * curvature.mean()), confidence)
