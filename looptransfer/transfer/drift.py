"""What becomes of the optimum from one loop count to the next: drift, displacement, curve shift, regret, shape.

Distances are octaves of LR, the drift is octaves per doubling of N, the regret in the unit of the loss. All of it is
our extension.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize_scalar

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
FURTHEST = 4.0  # octaves that a curve shift is looked for


def find_optima(tables: Mapping[int, pd.DataFrame], confidence: float, basin_tolerance: float) -> tuple[Optimum, ...]:
    """The optimum at every loop count, by polynomials of one degree: a cubic and a parabola differ in their bias.

    Where the basins are flat at the bottom, in the mean over N, the lowest point of a polynomial is none of theirs, and
    moves with the place of the LRs in the basin: the optima are then censored.
    """
    optima = tuple(find_optimum(at, table, confidence, basin_tolerance) for at, table in tables.items())
    if {2, 3} <= {optimum.degree for optimum in optima}:
        optima = tuple(find_optimum(at, table, confidence, basin_tolerance, 2) for at, table in tables.items())
    each = [bottom_curvature(tables[o.at], o.log2_lr.estimate) for o in optima if o.log2_lr is not None]
    known = [share for share in each if share is not None]
    return tuple(map(_on_a_flat, optima)) if known and np.mean(known) < FLAT_BOTTOM else optima


def _on_a_flat(optimum: Optimum) -> Optimum:
    if optimum.censored is not None:
        return optimum
    return replace(optimum, censored="flat bottom", log2_lr=None, by_seed=None, curves=None)


def slope_by_seed(at: Sequence[int], by_seed: Sequence[pd.Series]) -> pd.Series | None:
    """Per seed the least-squares slope of some quantity in log2(N); None with fewer than two N or shared seeds."""
    if len(at) < 2:
        return None
    frame = pd.DataFrame(dict(zip(map(math.log2, at), by_seed, strict=True))).dropna()
    if len(frame) < 2:
        return None
    x = frame.columns.to_numpy(dtype=float)
    x = x - x.mean()
    return pd.Series(frame.to_numpy() @ x / float(x @ x), index=frame.index)


def drift_by_seed(optima: Sequence[Optimum]) -> pd.Series | None:
    """Per seed the slope of the optimum in log2(N): octaves per doubling."""
    known = [(o.at, o.by_seed) for o in optima if o.by_seed is not None]
    return slope_by_seed([at for at, _ in known], [by_seed for _, by_seed in known])


def worst_displacement(optima: Sequence[Optimum], confidence: float) -> tuple[int, Interval] | None:
    """The loop count whose optimum lies furthest from that of the first, and how far, in octaves, paired by seed."""
    first = optima[0].by_seed
    moved = {}
    for optimum in optima[1:]:
        if first is not None and optimum.by_seed is not None:
            gaps = (optimum.by_seed - first).dropna()
            if len(gaps) >= 2:
                moved[optimum.at] = t_interval(gaps, confidence)
    return max(moved.items(), key=lambda one: abs(one[1].estimate)) if moved else None


def drift_by_reach(optima: Sequence[Optimum], tables: Mapping[int, pd.DataFrame]) -> tuple[float, ...]:
    """The drift, in octaves per doubling, by narrower and wider fits than the usual one.

    A drift that depends on the reach is one of the basin's shape, not of its place. A reach at which some fit has no
    minimum is left out.
    """
    known = [o for o in optima if o.censored is None]
    drifts = []
    for reach in REACHES:
        vertices = [pooled_vertex(tables[o.at], o.degree, reach) for o in known]
        there = [vertex for vertex in vertices if vertex is not None]
        if len(there) == len(known) >= 2:
            drifts.append(float(np.polyfit(np.log2([o.at for o in known]), there, 1)[0]))
    return tuple(drifts)


def skew_trend(optima: Sequence[Optimum], confidence: float) -> Interval | None:
    """How the skew of the basin, cubic over quadratic coefficient in 1/octave, changes per doubling of N."""
    known = [o for o in optima if o.degree == 3]
    skews = []
    for optimum in known:
        assert optimum.curves is not None
        c, d = optimum.curves[2], optimum.curves[3]
        skew = float(d.mean() / c.mean())
        skews.append(skew + (d - skew * c) / float(c.mean()))  # linearised, as the vertex is
    slopes = slope_by_seed([o.at for o in known], skews)
    return None if slopes is None else t_interval(slopes, confidence)


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
    shape = target.curves.mean().to_numpy()
    shape[:2] = 0.0  # the regret at the vertex, and the slope there
    return np.asarray(np.polynomial.polynomial.polyval(distance, shape))


def curve_shift(table: pd.DataFrame, reference: pd.DataFrame, confidence: float) -> Interval | None:
    """How far the whole curve lies from that of another N, in octaves: one shape, shifted along log2(LR) and in level.

    The shift that leaves the least weighted variance between the curves; LRs far above the lowest loss weigh little, so
    that a few unstable runs do not decide. Per seed one Newton step from the pooled shift, as for the vertex. None with
    fewer than two seeds or three LRs in common, or where the best shift is the largest that was tried, 4 octaves.
    """
    here, there = (one[np.isfinite(one).all(axis=1)] for one in (table, reference))
    seeds = here.columns.intersection(there.columns)
    if len(seeds) < 2 or len(here) < 3 or len(there) < 3:
        return None
    x, losses = here.index.to_numpy(dtype=float), here[seeds].to_numpy()
    excess = losses.mean(axis=1) - losses.mean(axis=1).min()
    usual = float(np.median(excess)) + 1e-12 * float(excess.max())
    if usual == 0:
        return None
    weight = (usual / (excess + usual)) ** 2
    shape = PchipInterpolator(there.index.to_numpy(dtype=float), there[seeds].to_numpy(), extrapolate=False)

    def misfit(shift: float) -> float:
        gap = losses.mean(axis=1) - shape(x - shift).mean(axis=1)
        inside = np.isfinite(gap)
        return _variance(gap[inside], weight[inside]) if inside.sum() >= 3 else 1e9  # finite, for the search

    tried: list[float] = np.arange(-FURTHEST, FURTHEST + 1e-9, 0.125).tolist()
    best = int(np.argmin([misfit(shift) for shift in tried]))
    if not 0 < best < len(tried) - 1:
        return None
    shift = float(minimize_scalar(misfit, bounds=(tried[best - 1], tried[best + 1]), method="bounded").x)
    by_seed = _shift_by_seed(shift, x, losses, weight, shape)
    return t_interval(by_seed, confidence) if by_seed is not None else None


def _shift_by_seed(shift: float, x: Array, losses: Array, weight: Array, shape: PchipInterpolator) -> Array | None:
    """One Newton step for each seed; None where the curves hardly overlap, or the reference has no slope."""
    slope = shape(x - shift, 1).mean(axis=1)
    inside = np.isfinite(slope)
    if inside.sum() < 3:
        return None
    slope, gap, weight = slope[inside], (losses - shape(x - shift))[inside], weight[inside]
    slope = slope - np.average(slope, weights=weight)
    stiffness = float(weight @ slope**2)
    return np.asarray(shift - (weight * slope) @ gap / stiffness) if stiffness > 0 else None


def _variance(values: Array, weight: Array) -> float:
    return float(np.average((values - np.average(values, weights=weight)) ** 2, weights=weight))
