"""The loss over log2(LR) as a Gaussian process: what a few runs tell of the LR to use. Our extension.

The loss of a run is a parabola, a smooth deviation from it, the level and the slope of its seed, and noise. The height
of the parabola, the length of the deviation and the noise are averaged over a grid, each as likely as it makes the
runs. Losses far above the lowest are drawn in as a logarithm does: a wall says that the optimum is elsewhere, not how
far. All is measured in shares of the lowest loss that was run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWN_IN = 0.1  # above the lowest loss
DEVIATION = 0.5  # of the height of the parabola
SEED_LEVEL, SEED_SLOPE = 2.0, 0.5  # standard deviations of a seed, per octave for the slope, in those of a run
DRAWS = 400
NONE = -1  # the seed of the mean over all


class Setting(NamedTuple):
    """The unknown sizes of a curve."""

    height: float  # of the parabola, four octaves from the best
    noise: float  # standard deviation of a run
    length: float  # octaves over which the deviation changes


SETTINGS = [Setting(*sizes) for sizes in product((0.01, 0.03, 0.1, 0.3), (0.001, 0.003, 0.01, 0.03), (2.0, 4.0))]
Points = tuple[Array, Array]  # log2(LR)s, and the seed of each


@dataclass(frozen=True)
class Curve:
    """What is believed of the mean loss.

    Attributes:
        grid: log2(LR)s.
        mean: the loss there, above the lowest loss that was run, in the unit of the loss.
        draws: curves as likely as the runs make them, a row each.
    """

    grid: Array
    mean: Array
    draws: Array
    centre: float
    runs: Points  # their LRs from the centre
    likeliest: Setting

    def regret(self, place: int, level: float) -> float:
        """The upper limit of what the LR at a place of the grid loses to the best of the grid."""
        return float(np.quantile(self.draws[:, place] - self.draws.min(axis=1), level))

    def interval(self, level: float) -> tuple[float, float]:
        """The interval of the optimum."""
        lowest = self.grid[self.draws.argmin(axis=1)]
        return float(np.quantile(lowest, (1 - level) / 2)), float(np.quantile(lowest, (1 + level) / 2))

    def helpful(self, place: int, candidates: Points, count: int) -> list[int]:
        """The candidate runs that shrink most what is not known of the differences between the curve at a place and
        where its lowest point may be.
        """
        log2_lrs = np.concatenate([self.grid, candidates[0]]) - self.centre
        points = log2_lrs, np.concatenate([np.full(len(self.grid), NONE), candidates[1]])
        noise = np.r_[np.zeros(len(self.grid)), np.full(len(candidates[0]), self.likeliest.noise**2)]
        covariance = _given(self.likeliest, self.runs, points)[1] + np.diag(noise)
        odds = np.bincount(self.draws.argmin(axis=1), minlength=len(self.grid)) / len(self.draws)
        chosen: list[int] = []
        for _ in range(min(count, len(candidates[0]))):
            variance = np.diag(covariance)[len(self.grid) :]
            seen = covariance[: len(self.grid), len(self.grid) :]
            gain = odds @ (seen - seen[place]) ** 2 / np.maximum(variance, 1e-15)
            gain[chosen] = -1
            chosen.append(int(gain.argmax()))
            column = covariance[:, len(self.grid) + chosen[-1]]
            covariance = covariance - np.outer(column, column) / max(column[len(self.grid) + chosen[-1]], 1e-15)
        return chosen


def curve_of(log2_lrs: Sequence[float], seeds: Sequence[int], losses: Sequence[float], grid: Array) -> Curve:
    """The curve by the finite losses of runs, at least one."""
    x, seed, loss = np.asarray(log2_lrs, float), np.asarray(seeds), np.asarray(losses, float)
    unit = abs(float(loss.min())) or 1.0
    heights = DRAWN_IN * np.log1p((loss - loss.min()) / unit / DRAWN_IN)
    centre = float(x[loss.argmin()])
    runs, points = (x - centre, seed), (grid - centre, np.full(len(grid), NONE))
    likelihoods = np.array([_likelihood(setting, runs, heights) for setting in SETTINGS])
    weights = np.exp(likelihoods - likelihoods.max())
    weights /= weights.sum()
    rng = np.random.default_rng(0)
    shares = np.floor(weights * DRAWS + rng.random(len(weights))).astype(int)
    mean, draws = np.zeros(len(grid)), []
    for setting, weight, share in zip(SETTINGS, weights, shares, strict=True):
        if weight > 1e-3:
            across, covariance = _given(setting, runs, points)
            curve = heights @ across
            mean += weight * curve
            draws.append(rng.multivariate_normal(curve, covariance, share, check_valid="ignore", method="eigh"))
    mean *= unit / weights[weights > 1e-3].sum()
    likeliest = SETTINGS[int(weights.argmax())]
    return Curve(grid, mean, unit * np.concatenate(draws), centre, runs, likeliest)


def _likelihood(setting: Setting, runs: Points, heights: Array) -> float:
    root = np.linalg.cholesky(_covariance(setting, runs, runs) + setting.noise**2 * np.eye(len(heights)))
    white = np.linalg.solve(root, heights)
    return -0.5 * float(white @ white) - float(np.log(np.diag(root)).sum())


def _given(setting: Setting, runs: Points, points: Points) -> tuple[Array, Array]:
    """The weights of the runs in the means at some points, and the covariance of the points given the runs."""
    across = _covariance(setting, runs, points)
    covariance = _covariance(setting, runs, runs) + setting.noise**2 * np.eye(len(runs[0]))
    weights = np.asarray(np.linalg.solve(covariance, across))
    return weights, _covariance(setting, points, points) - across.T @ weights


def _covariance(setting: Setting, first: Points, second: Points) -> Array:
    (a, seed_a), (b, seed_b) = (first[0][:, None], first[1][:, None]), (second[0][None], second[1][None])
    product_ = a * b
    parabola = 1 + setting.height**2 * (product_ / 16 + (product_ / 16) ** 2)
    deviation = (DEVIATION * setting.height) ** 2 * np.exp(-0.5 * ((a - b) / setting.length) ** 2)
    of_seed = setting.noise**2 * (SEED_LEVEL**2 + SEED_SLOPE**2 * product_)
    return np.asarray(parabola + deviation + np.where((seed_a == seed_b) & (seed_a != NONE), of_seed, 0))
