"""From the tidy frame to exponents, and from many p-values to one level: plain arithmetic."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from looptransfer.coordcheck.promises import Promise

Array = npt.NDArray[np.float64]
COLUMNS = ["rule", "loops", "width", "layers", "seed", "step", "module", "visit", "statistic", "value"]


def on_axis(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The rows along which only `axis` varies: over N as first made, over L and width at the second loop count."""
    counts = sorted(rows["loops"].unique())
    most = rows[rows["loops"] == counts[-1]]
    kept = rows if axis == "loops" else rows[rows["loops"] == counts[min(1, len(counts) - 1)]]
    for other in {"width", "layers"} - {axis}:
        values = most[other].dropna().unique()
        kept = kept[kept[other] == values[0]] if len(values) else kept
    return kept


def exponent_table(rows: pd.DataFrame, promise: Promise, along: pd.DataFrame) -> pd.DataFrame | None:
    """Seeds down, the axis across. A run that stopped early is not finite from there on."""
    step = _step(rows, promise.moment, int(along["step"].max()))
    rows = rows[rows["step"] == step]
    keys = ["seed", promise.axis]
    grid = along.groupby(keys).size().unstack()
    if promise.where == "on stream" and promise.axis == "loops":
        grid = grid.drop(columns=1, errors="ignore")  # nothing acts on the stream again and again at N = 1
    if rows.empty:
        return None if step == 0 else grid * math.nan
    if promise.which != "all":
        visits = rows.groupby([*keys, "module"])["visit"]
        rows = rows[rows["visit"] == visits.transform("min" if promise.which == "first" else "max")]
    values = rows.assign(value=rows["value"] ** 2).groupby(keys)["value"].mean() ** 0.5
    return values.unstack().reindex(index=grid.index, columns=grid.columns)


def _step(rows: pd.DataFrame, moment: str, last: int) -> int:
    """Initialisation is the first step at which there is something: branches may start at zero."""
    if moment != "init":
        return 1 if moment == "one" else last
    smallest = rows.groupby("step")["value"].min()
    positive = smallest.index[smallest > 0]
    return int(positive[0]) if len(positive) else 0


def fit_exponents(table: pd.DataFrame) -> Array:
    """The slope of log2(value) in log2(axis) by least squares, one per row (seed)."""
    x = np.log2(table.columns.to_numpy(dtype=float))
    x = x - x.mean()
    slopes: Array = np.log2(table.to_numpy(dtype=float)) @ x / (x @ x)
    return slopes


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: reject where the result is at most the level, and the family-wise error is kept."""
    count = len(p_values)
    order = sorted(range(count), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * count, 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (count - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted
