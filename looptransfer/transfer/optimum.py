"""The LR optimum of one loop count, from paired seeds, and when it cannot be told.

x is log2 of the LR, so distances are octaves; losses are in nats.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtrit

Array = npt.NDArray[np.float64]
Censored = Literal["low edge", "high edge", "diverged", "plateau", "one seed", "too few LRs"]

WINDOW = 1.5  # octaves that the fit reaches on either side of the LR nearest to the vertex


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided t-interval over seeds."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Optimum:
    """Where the loss of one loop count is lowest, in log2(LR).

    `censored` says why there is no usable optimum; `log2_lr` and the rest are then None. `by_seed` holds one optimum
    per seed, linearised at the pooled vertex, `curves` the coefficients (a, b, c) of a + b·x + c·x² per seed.
    """

    loops: int
    censored: Censored | None
    log2_lr: Interval | None = None
    by_seed: pd.Series | None = None
    curves: pd.DataFrame | None = None
    window: tuple[float, float] | None = None  # log2(LR)
    seeds: int = 0

    def loss(self, log2_lr: float) -> pd.Series:
        """The fitted loss per seed, in nats; meaningful inside `window`."""
        assert self.curves is not None
        return self.curves["a"] + self.curves["b"] * log2_lr + self.curves["c"] * log2_lr**2


def t_interval(values: pd.Series | Array, confidence: float) -> Interval:
    """Student's t-interval for the mean of at least two independent values.

    Over seeds this covers what it says with as few as two; a percentile bootstrap does not.
    """
    array = np.asarray(values, dtype=float)
    half = float(stdtrit(len(array) - 1, 0.5 + confidence / 2)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    mean = float(array.mean())
    return Interval(mean, mean - half, mean + half)


def curve(runs: pd.DataFrame) -> pd.DataFrame:
    """Losses of one rule and loop count with log2(LR) down and seeds across; only LRs that every seed ran."""
    table = runs.assign(x=np.log2(runs["lr"])).pivot(index="x", columns="seed", values="loss")
    return table.dropna().sort_index()


def find_optimum(loops: int, table: pd.DataFrame, confidence: float) -> Optimum:
    """The vertex of a quadratic in log2(LR), fitted within ±1.5 octaves of the LR nearest to it.

    The window and the design are the same for every seed (paired seeds), so the mean of the seeds' fits is the fit of
    their mean. A seed's own vertex is a ratio with heavy tails; instead each seed takes one Newton step from the pooled
    vertex v with the pooled curvature c, v − f_s'(v)/(2c). The mean of those is v exactly. (Our extension.)

    Args:
        loops: N, for the record.
        table: losses from `curve`; inf where a run diverged.
        confidence: of the two-sided interval, such as 0.9.
    """
    seeds = table.shape[1]

    def censored(why: Censored) -> Optimum:
        return Optimum(loops, why, seeds=seeds)

    stable = table[np.isfinite(table).all(axis=1)]
    if len(stable) < 3:
        return censored("diverged" if len(table) >= 3 else "too few LRs")
    if np.ptp(stable.mean(axis=1)) == 0:
        return censored("plateau")
    best = float(stable.mean(axis=1).idxmin())
    if best == table.index[0]:
        return censored("low edge")
    if best == table.index[-1]:
        return censored("high edge")
    if best == stable.index[-1] or best == stable.index[0]:
        return censored("diverged")
    if seeds < 2:
        return censored("one seed")
    centre = best
    for _ in range(8):  # until the window is centred on the LR nearest to the vertex
        near = stable[np.abs(stable.index - centre) <= WINDOW + 1e-9]
        if len(near) < 3:
            return censored("too few LRs")
        fitted = _fit(near)
        vertex = _vertex(fitted.mean())
        if vertex is None or not near.index[0] < vertex < near.index[-1]:
            return censored("plateau")
        nearest = float(stable.index[int(np.argmin(np.abs(stable.index - vertex)))])
        if nearest == centre:
            break
        centre = nearest
    if t_interval(fitted["c"], confidence).low <= 0:
        return censored("plateau")
    mean = fitted.mean()
    by_seed = vertex - (fitted["b"] + 2 * fitted["c"] * vertex) / (2 * float(mean["c"]))
    window = (float(near.index[0]), float(near.index[-1]))
    return Optimum(loops, None, t_interval(by_seed, confidence), by_seed, fitted, window, seeds)


def _fit(near: pd.DataFrame) -> pd.DataFrame:
    x = near.index.to_numpy(dtype=float)
    design = np.stack([np.ones_like(x), x, x * x], axis=1)
    solution = np.linalg.lstsq(design, near.to_numpy(dtype=float), rcond=None)[0]
    return pd.DataFrame(solution.T, index=near.columns, columns=["a", "b", "c"])


def _vertex(mean: pd.Series) -> float | None:
    return None if mean["c"] <= 0 else float(-mean["b"] / (2 * mean["c"]))
