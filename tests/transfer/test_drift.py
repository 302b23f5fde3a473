import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.transfer.drift import (
    drift_by_reach,
    drift_by_seed,
    find_optima,
    regret_by_seed,
    regret_interval,
    room_for_regret,
)
from looptransfer.transfer.optimum import find_optimum

GRID = np.arange(-9.0, -2.9, 0.75)
reproducible = settings(derandomize=True, deadline=None, max_examples=40)


def bowl(vertex: float, seeds: int = 3, skew: float = 0.0, noise: float = 0.0, draw: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(draw)
    u = GRID - vertex
    losses = {str(s): 2.0 + s + 0.1 * u**2 + skew * u**3 + rng.normal(0, noise, len(GRID)) for s in range(seeds)}
    return pd.DataFrame(losses, pd.Index(GRID, name="x"))


def test_a_cubic_and_a_parabola_are_not_mixed_over_n() -> None:
    full, short = bowl(-6.0), bowl(-6.0)
    short.iloc[[0, 1, 2, 6, 7, 8]] = math.inf
    alone = [find_optimum(n, table, 0.9).degree for n, table in ((1, full), (2, short))]
    assert alone == [3, 2]
    assert [optimum.degree for optimum in find_optima({1: full, 2: short}, 0.9, 0.02)] == [2, 2]


def test_basins_that_are_flat_at_the_bottom_have_no_optimum_but_keep_their_width() -> None:
    def floor(vertex: float) -> pd.DataFrame:
        table = bowl(vertex)
        losses = 0.1 * np.clip(np.abs(GRID - vertex) - 0.9, 0, None) ** 2
        return pd.DataFrame({seed: table.loc[:, seed].min() + losses for seed in table}, table.index)

    optima = find_optima({1: floor(-6.0), 4: floor(-5.8)}, 0.9, 0.02)
    assert [optimum.censored for optimum in optima] == ["flat bottom", "flat bottom"]
    assert [optimum.log2_lr for optimum in optima] == [None, None]
    assert all(optimum.basin is not None and optimum.basin.octaves > 1.8 for optimum in optima)
    assert {optimum.censored for optimum in find_optima({1: bowl(-6.0), 4: bowl(-5.8)}, 0.9, 0.02)} == {None}


def test_fits_of_every_reach_agree_on_polynomials_and_disagree_where_the_shape_changes_with_n() -> None:
    same = {n: bowl(-6.0 + 0.1 * math.log2(n)) for n in (1, 2, 4)}
    assert drift_by_reach(find_optima(same, 0.9, 0.02), same) == pytest.approx([0.1, 0.1], abs=1e-6)
    bent = {n: bowl(-6.0) + 0.1 * math.log2(n) * np.exp(-((GRID + 8.25) ** 2) / 0.1)[:, None] for n in (1, 2, 4)}
    narrow, wide = drift_by_reach(find_optima(bent, 0.9, 0.02), bent)
    assert abs(narrow) < 1e-3
    assert abs(wide) > 0.01


@reproducible
@given(octaves=st.floats(-1.2, 1.2))
def test_the_regret_of_an_exact_bowl_is_that_of_the_curve_near_by(octaves: float) -> None:
    table = bowl(-6.0)
    optimum = find_optimum(8, table, 0.9)
    regret = regret_by_seed(optimum, table, -6.0 + octaves)
    assert regret is not None
    assert regret.to_numpy() == pytest.approx(np.full(3, 0.1 * octaves**2), abs=1e-8)


def test_further_away_the_regret_is_that_of_the_runs_and_beyond_them_unknown() -> None:
    table = bowl(-6.0)
    optimum = find_optimum(8, table, 0.9)
    far = regret_by_seed(optimum, table, -3.0)
    assert far is not None
    assert far.to_numpy() == pytest.approx(np.full(3, 0.9), abs=1e-8)
    assert regret_by_seed(optimum, table, -2.9) is None


def test_arrays_of_pandas_may_be_read_only() -> None:
    table = bowl(-6.0, seeds=4, noise=0.01, draw=1)
    with pd.option_context("mode.copy_on_write", True):  # as pandas 3 always has it
        optimum = find_optimum(8, table, 0.9)
        regret = regret_by_seed(optimum, table, -5.0)
        assert regret is not None
        assert regret_interval(optimum, regret, -5.0, 0.9).estimate == pytest.approx(0.1, abs=0.03)


def test_the_interval_of_the_regret_starts_at_zero_where_the_optimum_may_be_the_lr_itself() -> None:
    table = bowl(-6.0, seeds=4, noise=0.01, draw=1)
    optimum = find_optimum(8, table, 0.9)
    assert optimum.log2_lr is not None
    for octaves, low in ((0.0, True), (1.0, False)):
        x = optimum.log2_lr.estimate + octaves
        regret = regret_by_seed(optimum, table, x)
        assert regret is not None
        interval = regret_interval(optimum, regret, x, 0.9)
        assert (interval.low == 0.0) is low
        assert interval.low <= interval.estimate <= interval.high


def test_the_interval_of_the_regret_covers_the_true_one_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    covered = []
    for draw in range(300):
        vertex = -6.0 + rng.uniform(-0.3, 0.3)
        table = bowl(vertex, noise=0.01, draw=draw) + 0.0
        optimum = find_optimum(8, table, 0.9)
        regret = regret_by_seed(optimum, table, -5.4)
        assert regret is not None
        interval = regret_interval(optimum, regret, -5.4, 0.9)
        covered.append(interval.low <= 0.1 * (-5.4 - vertex) ** 2 <= interval.high)
    assert np.mean(covered) == pytest.approx(0.9, abs=0.07)  # four standard errors


@reproducible
@given(slope=st.floats(-0.6, 0.6), loops=st.lists(st.integers(1, 16), min_size=2, max_size=4, unique=True))
def test_the_drift_is_the_slope_over_any_loop_counts(slope: float, loops: list[int]) -> None:
    drifts = drift_by_seed(find_optima({n: bowl(-6.0 + slope * (math.log2(n) - 2)) for n in loops}, 0.9, 0.02))
    assert drifts is not None
    assert drifts.to_numpy() == pytest.approx(np.full(3, slope), abs=1e-6)


def test_a_drift_needs_two_loop_counts_and_two_seeds_that_they_share() -> None:
    table = bowl(-6.0)
    assert drift_by_seed(find_optima({1: table}, 0.9, 0.02)) is None
    assert drift_by_seed(find_optima({1: table, 2: table.rename(columns={"1": "7", "2": "8"})}, 0.9, 0.02)) is None


def test_the_drift_is_taken_over_the_loop_counts_whose_optimum_is_known() -> None:
    tables = {1: bowl(-6.0), 2: bowl(-2.0), 4: bowl(-5.6)}
    drifts = drift_by_seed(find_optima(tables, 0.9, 0.02))
    assert drifts is not None
    assert drifts.to_numpy() == pytest.approx(np.full(3, 0.2), abs=1e-6)


@reproducible
@given(distance=st.floats(-0.4, 0.4), curvature=st.floats(0.05, 0.3))
def test_the_room_for_regret_ends_where_an_exact_parabola_reaches_the_tolerance(
    distance: float, curvature: float
) -> None:
    """By hand: curvature · (|distance| + room)² = 0.05."""
    losses = 2.0 + curvature * (GRID + 6.0) ** 2
    target = find_optimum(1, pd.DataFrame({"0": losses, "1": losses}, pd.Index(GRID, name="x")), 0.9)
    expected = math.sqrt(0.05 / curvature) - abs(distance)
    assert room_for_regret(target, -6.0 + distance, 0.05) == pytest.approx(max(expected, 0.0), abs=0.006)
