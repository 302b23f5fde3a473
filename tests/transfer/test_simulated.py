"""One table of every kind, by fixed seeds, and what is said of each: a change of any answer shows here."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from looptransfer.transfer.baseline import Baseline
from looptransfer.transfer.check import check

GRID = -6.0 + np.arange(-4, 4.01, 0.75)
# kind: cause, exit status, and that of the comparison with the same table of other noise; None without an optimum
EXPECTED: dict[str, tuple[str, int, int | None]] = {
    "no drift": ("flat", 0, 0),
    "drift": ("drifts", 1, 0),
    "a drift at the tolerance": ("too few seeds", 3, 0),
    "controls": ("flat", 0, 0),
    "no power": ("no power", 3, 0),
    "low edge": ("low edge", 3, None),
    "high edge": ("high edge", 3, None),
    "censored beside a drift": ("drifts", 1, 0),
    "cliff": ("flat", 0, 0),
    "divergence": ("diverged", 3, None),
    "one seed": ("one seed", 3, None),
    "two seeds": ("flat", 0, 3),
    "other seeds at every N": ("no shared seeds", 3, 0),
    "one N": ("one N", 3, 0),
    "few LRs": ("too few LRs", 3, None),
    "flat bottom": ("flat bottom", 3, None),
    "plateau": ("plateau", 3, None),
    "a wall": ("shape", 3, 0),
    "shape": ("flat", 0, 0),
    "noise": ("too few seeds", 3, 3),
    "a metric": ("flat", 0, 0),
    "a small loss": ("flat", 0, 0),
    "width": ("flat", 0, 0),
    "an LR that is off": ("regret", 3, 0),
    "an LR that was not run": ("regret", 3, 0),
    "a tolerance above the curve": ("tolerance", 3, 3),
}


def basin(kind: str, u: np.ndarray, doublings: float) -> np.ndarray:
    """The loss above its lowest, u octaves from the optimum."""
    if kind == "flat bottom":
        return 0.1 * np.maximum(np.abs(u) - 1.0, 0) ** 2
    bump = 0.5 * doublings * np.exp(-((u + 2.25) ** 2) / 0.1) if kind == "shape" else 0.0
    return 0.00005 * u**2 if kind == "plateau" else 0.1 * u**2 + 0.008 * u**3 + bump


def simulated(kind: str, noise_seed: int = 0) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table of a kind, and the terms by which it is judged."""
    rng = np.random.default_rng([noise_seed, *kind.encode()])
    grid = -6.0 + np.array([-3.0, 0.0, 3.0]) if kind == "few LRs" else GRID
    loops = {"one N": [4], "censored beside a drift": [1, 2, 4, 8, 16, 32]}.get(kind, [1, 2, 4, 8])
    seeds = {"one seed": 1, "two seeds": 2}.get(kind, 4)
    drift = {"drift": -0.5, "censored beside a drift": -0.9, "a drift at the tolerance": 0.2}
    drifts = {"factored": drift.get(kind, 0.02)}
    drifts |= {"controls": {"unscaled": -0.5, "sqrt": -0.25}, "no power": {"unscaled": 0.03}}.get(kind, {})
    centre = {"low edge": -11.0, "high edge": -1.0}.get(kind, -6.2)
    wander, noise = (0.6, 0.02) if kind == "noise" else (0.05, 0.001)
    parts = []
    for (rule, slope), n in ((pair, n) for pair in drifts.items() for n in loops):
        for seed in range(seeds):
            vertex = centre + slope * math.log2(n) + rng.normal(0, wander)
            loss = 2.0 + 0.1 * seed + basin(kind, grid - vertex, math.log2(n)) + rng.normal(0, noise, len(grid))
            loss = np.where(grid > centre + {"cliff": 2.0, "divergence": 0.2}.get(kind, 99.0), np.inf, loss)
            loss = np.where(grid > centre + (0.8 if kind == "a wall" else 99.0), loss + 4.0, loss)
            name = seed + 100 * n * (kind == "other seeds at every N")
            parts.append(pd.DataFrame({"rule": rule, "loops": n, "lr": 2.0**grid, "seed": name, "loss": loss}))
    frame = pd.concat(parts, ignore_index=True)
    if kind == "a metric":
        return frame.assign(loss=-frame["loss"]), {"maximize": True}
    if kind == "a small loss":
        return frame.assign(loss=0.01 * (frame["loss"] - 1.6)), {}
    if kind == "width":
        return frame.rename(columns={"loops": "width"}), {"axis": "width"}
    terms = {"an LR that is off": {"transferred_lr": 2.0**-5.2}, "an LR that was not run": {"transferred_lr": 1.0}}
    return frame, terms.get(kind, {"regret_tolerance": 3.0} if kind == "a tolerance above the curve" else {})


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_table_of_every_kind_is_judged_and_compared_as_ever(kind: str) -> None:
    table, terms = simulated(kind)
    verdict = check(table, **terms)
    compared = None
    if any(optimum.censored is None for optimum in verdict.judged.optima):
        compared = Baseline.of(verdict).compare(check(simulated(kind, 1)[0], **terms)).exit_status
    assert (verdict.judged.cause, verdict.exit_status, compared) == EXPECTED[kind]
