"""The LR optimum of one loop count, from paired seeds: its place, its basin, and when it cannot be told.

x is log2 of the LR, so distances are octaves; losses are in the table's unit. Everything here is our extension: the
paper reads its optima off a plot.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.interpolate import PchipInterpolator
from scipy.special import stdtrit

Array = npt.NDArray[np.float64]
Censored = Literal["low edge", "high edge", "diverged", "plateau", "flat bottom", "one seed", "too few LRs"]

REACH = 2.5  # octaves from the vertex at which the weight of an LR in the fit has fallen to zero
WIDE = 3.5  # the same for fits that look at the shape of the whole basin
WALL = 2.5  # times the height of the basin's lower side, above which a loss is no part of the basin
NEAR_WALL = 1.5  # octaves from the vertex within which a wall bends the fit
TRUSTED = 1.25  # octaves from the vertex within which the fit stands for the loss


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided interval over seeds."""

    estimate: float
    low: float
    high: float

    def text(self, decimals: int) -> str:
        """The estimate, and the interval in brackets."""
        return f"{self.estimate:+.{decimals}f} [{self.low:+.{decimals}f}, {self.high:+.{decimals}f}]"

    def inside(self, tolerance: float) -> bool:
        """Every value of the interval is within the tolerance."""
        return -tolerance < self.low <= self.high < tolerance

    def outside(self, tolerance: float) -> bool:
        """No value of the interval is within the tolerance."""
        return self.low > tolerance or self.high < -tolerance

    def to_dict(self) -> dict[str, float | str]:
        """Plain JSON, which knows no infinity: a regret without bound is the text "inf"."""
        return {name: value if math.isfinite(value) else str(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        return self.text(3)


@dataclass(frozen=True)
class Basin:
    """The LRs whose mean loss lies within a tolerance of the lowest, as log2(LR).

    `low_open`, `high_open`: the basin reaches the last LR that was run and was stable, so it may be wider.
    """

    low: float
    high: float
    low_open: bool
    high_open: bool

    @property
    def octaves(self) -> float:
        """The width; a lower bound where an end is open."""
        return self.high - self.low


@dataclass(frozen=True)
class Optimum:
    """The log2(LR) at which the loss of one loop count is lowest.

    Attributes:
        n: the loop count N, or the value of another axis that is checked.
        seeds: how many there are.
        censored: why there is no usable optimum; all below but the stability edge is then None, and the basin too but
            for one with a flat bottom.
        stable_up_to: log2 of the largest LR at which, and below which, no seed diverged; None where the lowest did.
        diverges: whether some LR above it was run, and diverged.
        log2_lr: the vertex, with its t-interval over seeds.
        by_seed: one vertex per seed, linearised at the pooled vertex; their mean is the vertex.
        curves: per seed the coefficients, constant first, of the fitted polynomial in log2(LR) − vertex.
        basin: the LRs that are as good as the best, within the tolerance asked for.
        walled: an LR within 1.5 octaves of the vertex has so high a finite loss that it is no part of the basin.
    """

    n: int
    seeds: int
    censored: Censored | None
    stable_up_to: float | None = None
    diverges: bool = False
    log2_lr: Interval | None = None
    by_seed: pd.Series | None = None
    curves: pd.DataFrame | None = None
    basin: Basin | None = None
    walled: bool = False

    @property
    def degree(self) -> int:
        """Of the fitted polynomial: 3, or 2 where too few LRs are near; 0 without an optimum."""
        return 0 if self.curves is None else self.curves.shape[1] - 1

    def loss(self, log2_lr: float) -> pd.Series:
        """The fitted loss per seed; to be trusted within 1.25 octaves of the vertex."""
        assert self.curves is not None
        assert self.log2_lr is not None
        u = log2_lr - self.log2_lr.estimate
        return pd.Series(self.curves.to_numpy() @ u ** np.arange(self.degree + 1), self.curves.index)


def t_interval(values: pd.Series | Array, confidence: float) -> Interval:
    """Student's t-interval for the mean of at least two independent values.

    Over seeds this covers what it says with as few as two; a percentile bootstrap does not.
    """
    array = np.asarray(values, dtype=float)
    half = float(stdtrit(len(array) - 1, 0.5 + confidence / 2)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    mean = float(array.mean())
    return Interval(mean, mean - half, mean + half)


def t_interval_of_runs(values: pd.Series | Array, confidence: float) -> Interval:
    """As `t_interval`; without bound where a run diverged."""
    return t_interval(values, confidence) if np.isfinite(values).all() else Interval(math.inf, math.inf, math.inf)


def paired_interval(minuend: pd.Series | None, subtrahend: pd.Series | None, confidence: float) -> Interval | None:
    """The mean difference over the seeds that both have; None where those are fewer than two."""
    gaps = pd.Series(dtype=float) if minuend is None or subtrahend is None else (minuend - subtrahend).dropna()
    return None if len(gaps) < 2 else t_interval_of_runs(gaps, confidence)


def curve(runs: pd.DataFrame) -> pd.DataFrame:
    """Losses of one rule and loop count with log2(LR) down and seeds across; only LRs that every seed ran.

    One at which a seed diverged stays as a wall, whoever else ran it.
    """
    table = runs.assign(x=np.log2(runs["lr"])).pivot(index="x", columns="seed", values="loss").sort_index()
    walls = table.isin([np.inf]).any(axis=1)
    return table.where(table.notna() | ~walls.to_numpy()[:, None], np.inf).dropna()


def curves(runs: pd.DataFrame, axis: str) -> dict[int, pd.DataFrame]:
    """The `curve` of every N of one rule."""
    return {int(str(n)): curve(group) for n, group in runs.groupby(axis)}


def find_optimum(
    n: int,
    table: pd.DataFrame,
    confidence: float,
    basin_tolerance: float = 0.02,
    degree: Literal[2, 3] = 3,
) -> Optimum:
    """The vertex of a local cubic in log2(LR), with weights (1 − (distance/2.5)²)² about the vertex itself.

    The cubic term takes up the asymmetry that LR basins have; without it, and with a window that jumps from LR to LR,
    the vertex depends on how the grid happens to lie. With fewer than four LRs in reach a parabola is fitted.

    Weights and design are the same for every seed (paired seeds), so the mean of the seeds' fits is the fit of their
    mean. A seed's own vertex is a ratio with heavy tails; instead each seed takes one Newton step from the pooled
    vertex v with the pooled curvature c, v − f_s'(v)/(2c), divided by how far the moving weights let it. The mean of
    those is v exactly.

    Args:
        n: N, for the record.
        table: losses from `curve`; inf where a run diverged. An LR at which any seed diverged takes no part in the fit.
        confidence: of the two-sided interval, such as 0.9.
        basin_tolerance: loss above the lowest mean that still counts as the basin.
        degree: 2 fits a parabola in any case.
    """
    finite = np.isfinite(table.to_numpy(dtype=float)).all(axis=1)
    grid = table.index.to_numpy(dtype=float)
    edge = int(np.argmin(finite)) if not finite.all() else len(finite)
    diverges = not finite.all()
    stable_up_to = float(grid[edge - 1]) if edge else None

    def censored(reason: Censored) -> Optimum:
        return Optimum(n, table.shape[1], reason, stable_up_to, diverges)

    x, losses = grid[finite], table.to_numpy(dtype=float)[finite]
    hidden = _hidden(grid, x, losses)
    if hidden is not None:
        return censored(hidden)
    mean = losses.mean(axis=1)
    vertex = _descend(x, mean, degree, REACH)
    if vertex is None:
        return censored("plateau" if _near(x, float(x[int(np.argmin(mean))]), REACH) >= 3 else "too few LRs")
    root_weights = _root_weights(x, mean, vertex, REACH)
    walled = bool((root_weights[np.abs(x - vertex) < NEAR_WALL] <= 0).any())
    fitted = _fit(x, losses, vertex, degree, root_weights)
    slope, curvature = fitted[1], fitted[2]
    stiffness = _stiffness(x, mean, vertex, degree)
    if t_interval(curvature, confidence).low <= 0 or not stiffness > 0.25:
        return censored("plateau")
    by_seed = pd.Series(vertex - slope / (2 * curvature.mean() * stiffness), table.columns)
    curves = pd.DataFrame(fitted.T, table.columns)
    basin = _basin(x, mean, vertex, float(fitted[0].mean()), basin_tolerance)
    log2_lr = t_interval(by_seed, confidence)
    return Optimum(n, table.shape[1], None, stable_up_to, diverges, log2_lr, by_seed, curves, basin, walled)


def stable_mean(table: pd.DataFrame) -> tuple[Array, Array]:
    """The log2(LR)s at which no seed diverged, and their mean losses."""
    losses = table.to_numpy(dtype=float)
    finite = np.isfinite(losses).all(axis=1)
    return table.index.to_numpy(dtype=float)[finite], losses[finite].mean(axis=1)


def curve_height(table: pd.DataFrame) -> float | None:
    """The cost of leaving the best LR by 2.5 octaves, on the cheaper side, in the unit of the loss.

    It is to the loss what an octave is to the LR: a loss that is scaled or shifted has the height scaled. None where
    fewer than two LRs are stable, or nothing rises.
    """
    x, mean = stable_mean(table)
    if len(x) < 2:
        return None
    vertex = _descend(x, mean, 3, REACH)
    centre = float(x[int(np.argmin(mean))]) if vertex is None else vertex
    height = min(_sides(x, mean - mean.min(), centre, REACH), default=0.0)
    return height if height > 0 else None


def pooled_vertex(table: pd.DataFrame, degree: int, reach: float) -> float | None:
    """The vertex alone, in log2(LR), by a fit of another reach; None where that fit has none inside the stable LRs."""
    return _descend(*stable_mean(table), degree, reach)


def bottom_curvature(table: pd.DataFrame, vertex: float) -> float | None:
    """The curvature of the mean loss at the vertex as a share of that of the basin around it; None with fewer than five
    LRs in reach.

    That of a quartic over that of a cubic, both with the weights of a wide fit: about 1 for the bowls that LR basins
    are, 0 or less for a flat floor between walls, on which a polynomial's vertex is no optimum.
    """
    x, mean = stable_mean(table)
    root_weights = _root_weights(x, mean, vertex, WIDE)
    if (root_weights > 0).sum() < 5:
        return None
    at_the_bottom, around = (_fit(x, mean[:, None], vertex, degree, root_weights)[2, 0] for degree in (4, 3))
    return float(at_the_bottom / around) if around > 0 else None


def _hidden(grid: Array, x: Array, losses: Array) -> Censored | None:
    """The reason for which the optimum cannot be seen at all, before anything is fitted; None where it can."""
    if len(x) < 3:
        return "diverged" if len(grid) >= 3 else "too few LRs"
    mean = losses.mean(axis=1)
    if np.ptp(mean) == 0:
        return "plateau"
    best = float(x[int(np.argmin(mean))])
    if best == grid[0]:
        return "low edge"
    if best == grid[-1]:
        return "high edge"
    if best in (x[0], x[-1]):
        return "diverged"
    return "one seed" if losses.shape[1] < 2 else None


def _descend(x: Array, mean: Array, degree: int, reach: float) -> float | None:
    """The fixed point at which the local fit of the mean loss has its minimum; None where there is none inside x."""
    vertex, step = float(x[int(np.argmin(mean))]), math.inf
    for _ in range(60):
        step = _step(x, mean, vertex, degree, reach)
        vertex += max(-0.5, min(0.5, step))
        if not x[0] < vertex < x[-1]:  # also where the step is no number
            return None
        if abs(step) < 1e-8:
            return vertex
    return vertex if abs(step) < 1e-3 else None


def _step(x: Array, mean: Array, centre: float, degree: int, reach: float) -> float:
    """From a centre to the minimum of the fit about it; nan where it has none or fewer than three LRs are near."""
    root_weights = _root_weights(x, mean, centre, reach)
    if (root_weights > 0).sum() < 3:
        return math.nan
    _, b, c, *rest = _fit(x, mean[:, None], centre, degree, root_weights)[:, 0]
    root = c * c - 3 * b * (rest[0] if rest else 0.0)
    return float(-b / (c + math.sqrt(root))) if root >= 0 and c + math.sqrt(root) > 0 else math.nan


def _stiffness(x: Array, mean: Array, vertex: float, degree: int) -> float:
    """Octaves by which the step from a centre shrinks per octave that the centre nears the vertex; 1 for a polynomial.

    The weights move with the vertex, so that one seed's pull moves it by more or less than a fixed window says.
    """
    ahead, behind = (_step(x, mean, vertex + h, degree, REACH) for h in (0.02, -0.02))
    return (behind - ahead) / 0.04


def _near(x: Array, centre: float, reach: float) -> int:
    return int((np.abs(x - centre) < reach).sum())


def _root_weights(x: Array, mean: Array, centre: float, reach: float) -> Array:
    """Biweight in the distance from the centre and in the height above the lowest mean loss.

    The height is measured by the lower of the two sides at the end of the reach: a wall of unstable runs whose loss is
    finite stands many times higher than that, and has no part in where the basin is lowest.
    """
    height = mean - mean.min()
    highest = max(WALL * min(_sides(x, height, centre, reach), default=math.inf), 1e-12)
    near = np.maximum(1 - ((x - centre) / reach) ** 2, 0)
    return np.asarray(near * np.maximum(1 - (height / highest) ** 2, 0))


def _sides(x: Array, height: Array, centre: float, reach: float) -> list[float]:
    """The height of the curve at each end of the reach; where fewer octaves were run, by the square of the distance."""
    ends = [end for end in (max(centre - reach, x[0]), min(centre + reach, x[-1])) if abs(end - centre) > 0.5]
    return [float(np.interp(end, x, height)) * (reach / (end - centre)) ** 2 for end in ends]


def _fit(x: Array, losses: Array, centre: float, degree: int, root_weights: Array) -> Array:
    """Coefficients, constant first, of the weighted least-squares polynomial in x − centre, a column per seed."""
    used = root_weights > 0
    u, root_weights = x[used] - centre, root_weights[used][:, None]
    degree = min(degree, len(u) - 1)
    design = u[:, None] ** np.arange(degree + 1) * root_weights
    # The normal equations: within a few octaves they are well conditioned, and four times as fast as an orthogonal fit.
    right = losses[used] * root_weights
    try:
        return np.asarray(np.linalg.solve(design.T @ design, design.T @ right))
    except np.linalg.LinAlgError:  # LRs that nearly coincide
        return np.asarray(np.linalg.lstsq(design, right, rcond=None)[0])


def _basin(x: Array, mean: Array, vertex: float, lowest: float, tolerance: float) -> Basin:
    """The LRs between which the mean losses, joined by monotone pieces, stay below lowest + tolerance."""
    apart = np.abs(x - vertex) > 1e-6
    knots = np.append(x[apart], vertex)
    order = np.argsort(knots)
    loss = PchipInterpolator(knots[order], np.append(mean[apart], lowest)[order])
    ends = []
    for end in (x[0], x[-1]):
        places = np.linspace(vertex, end, 2001)
        above = loss(places) > lowest + tolerance
        ends.append((float(places[int(np.argmax(above))]) if above.any() else float(end), not above.any()))
    (low, low_open), (high, high_open) = ends
    return Basin(low, high, low_open, high_open)
