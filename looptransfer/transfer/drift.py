"""The optimum over loop counts: drift, the drift by other fits, and the regret of a transferred LR.

Distances are octaves of LR, the drift is octaves per doubling of N, the regret in the unit of the loss. All of it is
our extension.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from looptransfer.transfer.optimum import (
    TRUSTED,
    WIDE,
    Array,
    Interval,
    Optimum,
    bottom_curvature,
    find_optimum,
    pooled_vertex,
    t_interval,
)

REACHES = (1.75, WIDE)  # octaves: the fits whose drift must agree with the usual one
FLAT_BOTTOM = 0.7  # share of the basin's curvature that is left at its bottom where that is flat (reports/verdict/)


def find_optima(tables: Mapping[int, pd.DataFrame], confidence: float, basin_tolerance: float) -> tuple[Optimum, ...]:
    """The optimum at every loop count, by polynomials of one degree: a cubic and a parabola differ in their bias.

    Where the basins are flat at the bottom, in the mean over N, the lowest point of a polynomial is none of theirs, and
    moves with the place of the LRs in the basin: the optima are then censored.
    """
    optima = tuple(find_optimum(n, table, confidence, basin_tolerance) for n, table in tables.items())
    if {2, 3} <= {optimum.degree for optimum in optima}:
        optima = tuple(find_optimum(n, table, confidence, basin_tolerance, 2) for n, table in tables.items())
    shares = [bottom_curvature(tables[o.n], o.log2_lr.estimate) for o in optima if o.log2_lr is not None]
    curved = [share for share in shares if share is not None]
    return tuple(map(_on_a_flat, optima)) if curved and np.mean(curved) < FLAT_BOTTOM else optima


def _on_a_flat(optimum: Optimum) -> Optimum:
    if optimum.censored is not None:
        return optimum
    return replace(optimum, censored="flat bottom", log2_lr=None, by_seed=None, curves=None)


def drift_by_seed(optima: Sequence[Optimum]) -> pd.Series | None:
    """Per seed the least-squares slope of the optimum in log2(N): octaves per doubling.

    None with fewer than two optima, or two seeds that they share.
    """
    by_n = {math.log2(optimum.n): optimum.by_seed for optimum in optima if optimum.by_seed is not None}
    frame = pd.DataFrame(by_n).dropna()
    if len(by_n) < 2 or len(frame) < 2:
        return None
    x = frame.columns.to_numpy(dtype=float)
    x = x - x.mean()
    return pd.Series(frame.to_numpy() @ x / float(x @ x), index=frame.index)


def drift_by_reach(optima: Sequence[Optimum], tables: Mapping[int, pd.DataFrame]) -> tuple[float, ...]:
    """The drift, in octaves per doubling, by narrower and wider fits than the usual one.

    A drift that depends on the reach is one of the basin's shape, not of its place. A reach at which some fit has no
    minimum is left out.
    """
    fitted = [optimum for optimum in optima if optimum.censored is None]
    drifts = []
    for reach in REACHES:
        vertices = [pooled_vertex(tables[optimum.n], optimum.degree, reach) for optimum in fitted]
        inside = [vertex for vertex in vertices if vertex is not None]
        if len(inside) == len(fitted) >= 2:
            drifts.append(float(np.polyfit(np.log2([optimum.n for optimum in fitted]), inside, 1)[0]))
    return tuple(drifts)


def regret_by_seed(target: Optimum, table: pd.DataFrame, log2_lr: float) -> pd.Series | None:
    """Loss at an LR minus loss at the optimum of the same N, per seed; the fit near by, the runs further away.

    inf where runs on both sides of the LR, or on one, diverged. None where the optimum is not known or the LR lies
    outside those that were run.
    """
    if target.log2_lr is None:
        return None
    best = target.loss(target.log2_lr.estimate)
    if abs(log2_lr - target.log2_lr.estimate) <= TRUSTED:
        return target.loss(log2_lr) - best
    if not table.index[0] <= log2_lr <= table.index[-1]:
        return None
    between = {seed: np.interp(log2_lr, table.index.to_numpy(), losses.to_numpy()) for seed, losses in table.items()}
    return pd.Series(between) - best


def regret_interval(target: Optimum, by_seed: pd.Series, log2_lr: float, confidence: float) -> Interval:
    """The regret with its interval.

    Near the optimum the regret is about the square of the distance to it, which no t-interval of the regrets fits (at
    the optimum they all are 0): the interval is that of the distance, carried through the pooled curve.
    """
    assert target.log2_lr is not None
    if not np.isfinite(by_seed).all():
        return Interval(math.inf, math.inf, math.inf)
    distance = log2_lr - target.log2_lr.estimate
    if abs(distance) > TRUSTED:
        return t_interval(by_seed, confidence)
    reached = log2_lr - np.linspace(target.log2_lr.low, target.log2_lr.high, 101, dtype=np.float64)
    regrets = _regret(target, reached)
    low = 0.0 if reached.min() <= 0 <= reached.max() else float(regrets.min())
    return Interval(float(by_seed.mean()), max(0.0, low), float(regrets.max()))


def room_for_regret(target: Optimum, log2_lr: float, tolerance: float) -> float:
    """Half of the widest interval of the optimum that keeps the regret of an LR below the tolerance, in octaves.

    0 where the regret reaches it already; 1.25 octaves, as far as the fit is trusted, where no interval does.
    """
    assert target.log2_lr is not None
    half = np.linspace(0, TRUSTED, 251, dtype=np.float64)
    distance = log2_lr - target.log2_lr.estimate
    reaches = np.maximum(_regret(target, distance - half), _regret(target, distance + half)) >= tolerance
    return float(half[int(np.argmax(reaches))]) if reaches.any() else TRUSTED


def _regret(target: Optimum, distance: Array) -> Array:
    """By the pooled curve, at distances from its vertex."""
    assert target.curves is not None
    shape = np.array(target.curves.mean(), dtype=np.float64)  # a copy: from pandas 3 on its own arrays are read-only
    shape[:2] = 0.0  # the regret at the vertex, and the slope there
    return np.asarray(np.polynomial.polynomial.polyval(distance, shape))
