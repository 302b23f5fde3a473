"""The cheap mode of the gate: whether a stored optimum still lies between half and twice its LR. Our extension.

Three LRs, half, once and twice the stored optimum, with paired seeds. The parabola through the three mean losses has
its vertex within t octaves of the middle exactly where its slope points inwards at both −t and +t, and a slope is
linear in the losses: a t-interval over seeds holds for it, where the vertex itself is a ratio with heavy tails.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from looptransfer.transfer.baseline import Baseline, StoredOptimum, fingerprint_of
from looptransfer.transfer.comparison import Comparison, Finding, Holding, change, differing, more_seeds
from looptransfer.transfer.optimum import Array, Interval, curve, t_interval
from looptransfer.transfer.verdict import decimals

OCTAVES = (-1.0, 0.0, 1.0)
MOVED = 0.5  # octaves from the stored optimum beyond which a neighbour's loss is the lower one
BY_DESIGN = {"seeds", "lrs"}  # parts of the fingerprint in which three LRs differ from a sweep


def stored_lrs(stored: StoredOptimum) -> tuple[float, ...]:
    """Half, once and twice the stored optimum, absolute."""
    assert stored.log2_lr is not None
    return tuple(float(f"{2.0 ** (stored.log2_lr.estimate + octaves):.6g}") for octaves in OCTAVES)


def bracket(
    runs: pd.DataFrame,
    baseline: Baseline,
    rule: str,
    loss_tolerance: float | None,
    confidence: float,
    loops: Sequence[int] | None = None,
) -> Comparison:
    """Judge runs at `stored_lrs` of some N, a tidy table of one rule.

    Every N of `loops`, or every N in the table where none are given, has a finding; one that was not run whole is
    INCONCLUSIVE. The tolerance of the loss is by default the baseline's.

    MOVED: a neighbour is better than the stored optimum beyond noise, or a run at the stored optimum diverges; the
    optimum then lies more than half an octave away. WORSE: the interval of the change of the loss there lies above
    `loss_tolerance`. HOLDS: the slopes at half and at twice the LR both point inwards beyond noise, so that the optimum
    lies between them; a diverged neighbour bounds it as well. Otherwise INCONCLUSIVE.
    """
    stored = baseline.of_rule(rule)
    loss_tolerance = baseline.loss_tolerance if loss_tolerance is None else loss_tolerance
    tables = {int(str(at)): curve(group) for at, group in runs.groupby(baseline.axis)}
    findings = tuple(
        bracket_one(stored[at], tables.get(at, pd.DataFrame()), loss_tolerance, confidence)
        for at in (tables if loops is None else loops)
    )
    then = {name: value for name, value in baseline.fingerprint.items() if name not in BY_DESIGN}
    now = {name: value for name, value in fingerprint_of(runs, baseline.axis).items() if name not in BY_DESIGN}
    return Comparison(
        baseline.path,
        rule,
        baseline.axis,
        baseline.unit,
        "Half, once and twice the stored LR",
        MOVED,
        loss_tolerance,
        confidence,
        findings,
        differing(then, now),
    )


def bracket_one(stored: StoredOptimum, table: pd.DataFrame, loss_tolerance: float, confidence: float) -> Finding:
    """As `bracket`, for one N; `table` holds the losses at the three LRs, seeds across."""
    assert stored.log2_lr is not None
    assert stored.loss_by_seed is not None
    lr, seeds = 2.0**stored.log2_lr.estimate, table.shape[1]
    if len(table) != len(OCTAVES) or not np.allclose(table.index, np.log2(stored_lrs(stored)), atol=1e-3):
        return Finding(stored.at, "INCONCLUSIVE", "half, once and twice the stored LR were not run by every seed", lr)
    lower, middle, higher = table.to_numpy(dtype=float)
    if not np.isfinite(middle).all():
        lost = int((~np.isfinite(middle)).sum())
        return Finding(stored.at, "MOVED", f"{lost} of {seeds} runs at the stored LR diverge", lr, seeds=seeds)
    loss, gaps = change(table.iloc[1], stored.loss_by_seed, confidence)
    down, up = lower - middle, higher - middle  # what half and twice the LR cost

    def finding(answer: Holding, reason: str = "") -> Finding:
        return Finding(stored.at, answer, reason, lr, _vertex(down, up, confidence), loss, seeds, gaps is not None)

    for cost, word in ((down, "half"), (up, "twice")):
        better = _interval(cost, confidence)
        if better.high < 0:
            return finding(
                "MOVED", f"{word} the stored LR is better by {-better.estimate:.{decimals(loss_tolerance)}f}"
            )
    if loss.low > loss_tolerance:
        return finding("WORSE", f"the loss at the stored LR is worse by {loss.estimate:.{decimals(loss_tolerance)}f}")
    slopes = {"half": _inwards(down, up), "twice": _inwards(up, down)}
    unsure = {word: slope for word, slope in slopes.items() if not _interval(slope, confidence).low > 0}
    if not unsure:
        return finding("HOLDS")
    word, slope = next(iter(unsure.items()))
    advice = more_seeds(pd.Series(slope), _interval(slope, confidence), 0.0, confidence)
    return finding("INCONCLUSIVE", f"the loss may still fall towards {word} the stored LR; {advice}")


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


def _interval(values: Array, confidence: float) -> Interval:
    """Over seeds; a cost without bound where some diverged."""
    return t_interval(values, confidence) if np.isfinite(values).all() else Interval(math.inf, math.inf, math.inf)


def known(optima: Mapping[int, StoredOptimum]) -> list[int]:
    """The N whose optimum is stored."""
    return [at for at, one in optima.items() if one.log2_lr is not None]
