import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.transfer.optimum import Optimum, bottom_curvature, curve, find_optimum, pooled_vertex, t_interval
from looptransfer.transfer.results import tidy

GRID = np.arange(-9.0, -2.9, 0.75)
NINETY = 0.9


def bowls(
    x: np.ndarray, vertices: Sequence[float], curvature: float = 0.2, offsets: Sequence[float] | None = None
) -> pd.DataFrame:
    offsets = [2.0] * len(vertices) if offsets is None else offsets
    columns = {str(s): offsets[s] + curvature * (x - v) ** 2 for s, v in enumerate(vertices)}
    return pd.DataFrame(columns, index=pd.Index(x, name="x"))


def found(optimum: Optimum) -> float:
    assert optimum.censored is None
    assert optimum.log2_lr is not None
    return optimum.log2_lr.estimate


reproducible = settings(derandomize=True, deadline=None, max_examples=60)


@reproducible
@given(
    start=st.floats(-16, -4),
    spacing=st.floats(0.2, 1.5),
    points=st.integers(4, 12),
    place=st.floats(0.0, 1.0),
    curvature=st.floats(0.01, 3.0),
    offsets=st.lists(st.floats(-3, 3), min_size=2, max_size=5),
)
def test_an_exact_quadratic_gives_back_its_vertex_whatever_the_offsets_of_its_seeds(
    start: float, spacing: float, points: int, place: float, curvature: float, offsets: list[float]
) -> None:
    x = start + spacing * np.arange(points)
    vertex = x[1] + (x[-2] - x[1]) * (0.02 + 0.96 * place)
    optimum = find_optimum(2, bowls(x, [vertex] * len(offsets), curvature, offsets), NINETY)
    assert found(optimum) == pytest.approx(vertex, abs=1e-6)
    assert optimum.log2_lr is not None
    assert optimum.log2_lr.high - optimum.log2_lr.low < 1e-6
    assert optimum.seeds == len(offsets)
    assert optimum.n == 2
    assert optimum.loss(vertex).to_numpy() == pytest.approx(np.array(offsets), abs=1e-6)


@reproducible
@given(
    vertices=st.lists(st.floats(-6.5, -5.5), min_size=2, max_size=5), octaves=st.integers(-10, 10), seed=st.integers(0)
)
def test_multiplying_every_lr_by_a_power_of_two_shifts_the_optimum_by_as_many_octaves(
    vertices: list[float], octaves: int, seed: int
) -> None:
    table = bowls(GRID, vertices)
    table += np.random.default_rng(seed).normal(0, 0.003, table.shape)
    before = find_optimum(4, table, NINETY)
    after = find_optimum(4, table.set_axis(table.index + octaves), NINETY)
    assert found(after) == pytest.approx(found(before) + octaves, abs=1e-9)
    assert before.by_seed is not None
    assert after.by_seed is not None
    assert after.by_seed.to_numpy() == pytest.approx(before.by_seed.to_numpy() + octaves, abs=1e-9)


@reproducible
@given(offsets=st.lists(st.floats(-2, 2), min_size=4, max_size=4), seed=st.integers(0, 2**32))
def test_a_constant_per_seed_changes_neither_estimate_nor_interval(offsets: list[float], seed: int) -> None:
    table = bowls(GRID, [-6.3, -6.1, -6.0, -5.8])
    table += np.random.default_rng(seed).normal(0, 0.003, table.shape)
    plain, moved = (find_optimum(1, t, NINETY).log2_lr for t in (table, table + np.array(offsets)))
    assert plain is not None
    assert moved is not None
    assert (moved.estimate, moved.low, moved.high) == pytest.approx((plain.estimate, plain.low, plain.high), abs=1e-8)


@reproducible
@given(vertices=st.lists(st.floats(-6.6, -5.4), min_size=2, max_size=6), seed=st.integers(0, 2**32))
def test_the_optima_of_the_seeds_average_to_the_vertex_of_their_mean_loss(vertices: list[float], seed: int) -> None:
    table = bowls(GRID, vertices)
    table += np.random.default_rng(seed).normal(0, 0.003, table.shape)
    optimum = find_optimum(1, table, NINETY)
    mean = table.mean(axis=1)
    of_mean = find_optimum(1, pd.DataFrame({"0": mean, "1": mean}), NINETY)
    assert found(optimum) == pytest.approx(found(of_mean), abs=1e-6)
    assert optimum.by_seed is not None
    assert float(optimum.by_seed.mean()) == pytest.approx(found(optimum), abs=1e-6)
    assert list(optimum.by_seed.index) == list(table.columns)


def test_seeds_of_equal_curvature_keep_their_own_vertices() -> None:
    vertices = [-6.3, -6.1, -5.7]
    optimum = find_optimum(1, bowls(GRID, vertices), NINETY)
    assert optimum.by_seed is not None
    assert optimum.by_seed.to_numpy() == pytest.approx(np.array(vertices), abs=1e-9)
    assert optimum.log2_lr == t_interval(optimum.by_seed, NINETY)


@reproducible
@given(vertex=st.floats(-6.6, -5.4), skew=st.floats(-0.04, 0.04), grid=st.floats(0.0, 0.75))
def test_an_exact_cubic_gives_back_its_minimum_wherever_the_grid_lies(vertex: float, skew: float, grid: float) -> None:
    x = GRID + grid
    losses = 2.0 + 0.2 * (x - vertex) ** 2 + skew * (x - vertex) ** 3
    table = pd.DataFrame({"0": losses, "1": losses + 1.0}, index=x)
    assert found(find_optimum(1, table, NINETY)) == pytest.approx(vertex, abs=1e-6)


def test_lrs_beyond_two_and_a_half_octaves_do_not_enter_the_fit() -> None:
    table = bowls(GRID, [-6.1, -5.9])
    bent = table.copy()
    bent[np.abs(GRID + 6.0) > 2.5] += np.array([0.7, 0.9])
    assert not bent.equals(table)
    assert found(find_optimum(1, bent, NINETY)) == pytest.approx(found(find_optimum(1, table, NINETY)), abs=1e-6)


def test_one_grid_step_moves_the_vertex_by_no_jump() -> None:
    """The weights fall to zero smoothly, so an LR that comes into reach moves nothing at once."""
    rng = np.random.default_rng(3)
    bent = rng.normal(0, 0.02, (len(GRID), 3))
    vertices = []
    for shift in np.arange(0.0, 0.75, 0.01):
        table = bowls(GRID, [-6.0 + shift] * 3) + bent
        vertices.append(found(find_optimum(1, table, NINETY)) - shift)
    assert np.abs(np.diff(vertices)).max() < 0.02


def test_a_wall_of_unstable_runs_with_a_finite_loss_is_no_part_of_the_basin_and_is_told() -> None:
    table = bowls(GRID, [-5.9, -5.7])
    walled = table.copy()
    walled[GRID > -5.0] = 40.0  # from 1.3 octaves above the vertex
    plain, cut = find_optimum(1, table, NINETY), find_optimum(1, walled, NINETY)
    assert found(cut) == pytest.approx(found(plain), abs=1e-6)
    assert (plain.walled, cut.walled) == (False, True)
    far = table.copy()
    far[GRID > -4.0] = 40.0
    assert not find_optimum(1, far, NINETY).walled


def test_a_fit_of_another_reach_finds_the_vertex_of_a_polynomial_all_the_same() -> None:
    table = bowls(GRID, [-6.2, -6.0])
    for reach in (1.75, 2.5, 3.5):
        assert pooled_vertex(table, 3, reach) == pytest.approx(-6.1, abs=1e-6)
    assert pooled_vertex(bowls(GRID, [-1.0, -1.0]), 3, 2.5) is None


@pytest.mark.parametrize(("curvature", "width"), [(0.2, 2 * math.sqrt(0.1)), (0.05, 2 * math.sqrt(0.4))])
def test_the_basin_reaches_as_far_as_the_loss_stays_within_the_tolerance(curvature: float, width: float) -> None:
    fine = np.arange(-9.0, -2.9, 0.25)
    basin = find_optimum(1, bowls(fine, [-6.0, -6.0], curvature), NINETY, basin_tolerance=0.02).basin
    assert basin is not None
    assert basin.octaves == pytest.approx(width, abs=0.06)
    assert (basin.low + basin.high) / 2 == pytest.approx(-6.0, abs=0.01)
    assert not basin.low_open
    assert not basin.high_open


def test_a_basin_that_reaches_the_last_stable_lr_is_open_there() -> None:
    table = bowls(GRID, [-6.0, -6.0], 0.001)
    table[GRID > -4.0] = math.inf
    basin = find_optimum(1, table, NINETY).basin
    assert basin is not None
    assert (basin.low_open, basin.high_open) == (True, True)


def test_the_stability_edge_is_the_largest_lr_below_which_no_seed_diverged() -> None:
    table = bowls(GRID, [-6.1, -5.9])
    assert (find_optimum(1, table, NINETY).stable_up_to, find_optimum(1, table, NINETY).diverges) == (-3.0, False)
    table.loc[-3.75, "1"] = math.inf
    edge = find_optimum(1, table, NINETY)
    assert (edge.stable_up_to, edge.diverges) == (-4.5, True)
    table.iloc[0, 0] = math.inf
    assert find_optimum(1, table, NINETY).stable_up_to is None


@pytest.mark.parametrize("count", [2, 3, 4, 7, 20])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_the_interval_is_that_of_students_t(count: int, confidence: float) -> None:
    values = np.random.default_rng(count).normal(-5, 2, count)
    interval = t_interval(values, confidence)
    low, high = scipy.stats.t.interval(confidence, count - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((values.mean(), low, high), rel=1e-9)
    assert t_interval(pd.Series(values), confidence) == interval


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_the_interval_covers_the_mean_as_often_as_it_says(seeds: int) -> None:
    draws = np.random.default_rng(seeds).normal(1.5, 0.7, (4000, seeds))
    intervals = [t_interval(draw, NINETY) for draw in draws]
    covered = np.mean([interval.low <= 1.5 <= interval.high for interval in intervals])
    assert covered == pytest.approx(NINETY, abs=0.03)


def test_the_interval_of_the_optimum_covers_the_true_one_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered = []
    for _ in range(400):
        vertex = rng.uniform(-6.4, -5.6)
        table = bowls(GRID, list(vertex + rng.normal(0, 0.1, 3)), offsets=list(rng.normal(2, 0.5, 3)))
        table += rng.normal(0, 0.003, table.shape)
        interval = find_optimum(1, table, NINETY).log2_lr
        assert interval is not None
        covered.append(interval.low <= vertex <= interval.high)
    assert np.mean(covered) == pytest.approx(NINETY, abs=0.06)  # four standard errors


@pytest.mark.parametrize(("vertex", "why"), [(-10.0, "low edge"), (-1.0, "high edge")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_an_optimum_beyond_the_lrs_that_were_run_is_censored(vertex: float, why: str, seeds: int) -> None:
    optimum = find_optimum(8, bowls(GRID, [vertex] * seeds), NINETY)
    assert optimum.censored == why
    assert (optimum.n, optimum.seeds) == (8, seeds)
    assert (optimum.log2_lr, optimum.by_seed, optimum.curves, optimum.basin) == (None, None, None, None)


def test_a_best_lr_whose_upper_neighbour_diverged_is_censored() -> None:
    table = bowls(GRID, [-5.3, -5.2])
    table.loc[table.index > -5.0] = math.inf
    assert find_optimum(1, table, NINETY).censored == "diverged"


def test_a_best_lr_whose_lower_neighbour_diverged_is_censored() -> None:
    table = bowls(GRID, [-5.3, -5.2])
    table.loc[table.index < -5.6] = math.inf
    assert find_optimum(1, table, NINETY).censored == "diverged"


def test_an_lr_at_which_a_single_seed_diverged_bounds_the_basin() -> None:
    table = bowls(GRID, [-5.3, -5.2, -5.1])
    assert find_optimum(1, table, NINETY).censored is None
    table.loc[-4.5, "1"] = math.inf
    table.loc[-3.75, "0"] = math.inf
    table.loc[-3.0, "2"] = math.inf
    assert find_optimum(1, table, NINETY).censored == "diverged"


def test_too_few_lrs_that_train_among_enough_that_were_run_is_divergence() -> None:
    table = bowls(GRID, [-5.3, -5.2])
    table.iloc[2:] = math.inf
    assert find_optimum(1, table, NINETY).censored == "diverged"


def test_diverged_runs_away_from_the_basin_leave_the_optimum_as_it_is() -> None:
    table = bowls(GRID, [-7.1, -6.9])
    cut = table.copy()
    cut.loc[cut.index > -5.0] = math.inf
    assert found(find_optimum(1, cut, NINETY)) == pytest.approx(found(find_optimum(1, table, NINETY)), abs=1e-12)


def test_diverged_rows_of_a_table_turn_a_high_edge_into_a_bounded_basin() -> None:
    lrs = [2.0**-k for k in (9, 8, 7, 6, 5)]
    rows = [(1, lr, seed, 3.0 - k - 0.1 * seed) for seed in (0, 1) for k, lr in enumerate(lrs)]
    runs = pd.DataFrame(rows, columns=["loops", "lr", "seed", "loss"])
    diverged = pd.DataFrame([(1, 2.0**-4, seed, math.nan) for seed in (0, 1)], columns=runs.columns)
    assert find_optimum(1, curve(tidy(runs)), NINETY).censored == "high edge"
    assert find_optimum(1, curve(tidy(pd.concat([runs, diverged]))), NINETY).censored == "diverged"


def test_a_loss_without_curvature_that_stands_out_of_the_noise_is_a_plateau() -> None:
    rng = np.random.default_rng(5)
    reasons = []
    for _ in range(200):
        reasons.append(find_optimum(1, bowls(GRID, [-6.0] * 3, 0.0) + rng.normal(0, 0.05, (len(GRID), 3)), NINETY))
    inner = [optimum.censored for optimum in reasons if optimum.censored not in ("low edge", "high edge")]
    assert len(inner) > 100
    assert set(inner) <= {"plateau", None}
    assert inner.count("plateau") / len(inner) > 0.6


def test_a_flat_floor_below_which_one_seed_dips_by_chance_is_a_plateau() -> None:
    table = pd.DataFrame(2.0, index=pd.Index(GRID), columns=["0", "1", "2"])
    table.loc[-6.0, "0"] -= 0.01
    assert find_optimum(1, table, NINETY).censored == "plateau"


def test_a_mean_that_curves_downwards_around_its_lowest_point_is_a_plateau() -> None:
    x = np.arange(-8.0, -3.9, 0.5)
    losses = np.array([2.0, 1.3, 1.5, 1.6, 1.15, 1.6, 1.5, 1.3, 2.0])
    assert np.polyfit(x[1:8], losses[1:8], 2)[0] < 0
    assert find_optimum(1, pd.DataFrame({"0": losses, "1": losses}, index=x), NINETY).censored == "plateau"


def test_one_seed_is_censored_where_the_optimum_is_inside() -> None:
    assert find_optimum(1, bowls(GRID, [-6.0]), NINETY).censored == "one seed"


def test_fewer_than_three_lrs_are_too_few() -> None:
    assert find_optimum(1, bowls(GRID[:2], [-8.7, -8.6]), NINETY).censored == "too few LRs"


def test_fewer_than_three_lrs_within_reach_are_too_few() -> None:
    assert find_optimum(1, bowls(np.arange(-12.0, 1.0, 3.0), [-6.1, -5.9]), NINETY).censored == "too few LRs"


def test_the_curve_keeps_only_lrs_that_every_seed_ran_and_keeps_the_diverged() -> None:
    rows = [(0.5, "a", 1.0), (0.25, "a", 2.0), (1.0, "a", math.inf), (0.5, "b", 3.0), (1.0, "b", 4.0), (2.0, "b", 1.0)]
    table = curve(pd.DataFrame(rows, columns=["lr", "seed", "loss"]))
    assert table.index.tolist() == [-1.0, 0.0]
    assert table.to_dict("list") == {"a": [1.0, math.inf], "b": [3.0, 4.0]}


def test_losses_that_are_all_alike_are_a_plateau_and_no_edge() -> None:
    flat = pd.DataFrame(2.0, index=[-8.0, -7.0, -6.0, -5.0], columns=["0", "1"])
    assert find_optimum(1, flat, 0.9).censored == "plateau"


@reproducible
@given(vertex=st.floats(-6.5, -5.5), curvature=st.floats(0.01, 3.0), skew=st.floats(-0.03, 0.03))
def test_a_cubic_is_as_curved_at_its_bottom_as_around_it(vertex: float, curvature: float, skew: float) -> None:
    u = GRID - vertex
    losses = 2.0 + curvature * (u**2 + skew * u**3)
    assert bottom_curvature(pd.DataFrame({"0": losses}, index=GRID), vertex) == pytest.approx(1.0, abs=1e-6)


@reproducible
@given(vertex=st.floats(-6.4, -5.6), width=st.floats(1.5, 2.5))
def test_a_flat_floor_has_little_of_the_curvature_of_its_basin(vertex: float, width: float) -> None:
    """By hand: 0.1 (|u| − width / 2)² outside the floor."""
    grid = np.arange(-10.0, -1.9, 0.5)
    losses = 2.0 + 0.1 * np.clip(np.abs(grid - vertex) - width / 2, 0, None) ** 2
    share = bottom_curvature(pd.DataFrame({"0": losses}, index=grid), vertex)
    assert share is not None
    assert share < 0.6


def test_the_curvature_at_the_bottom_needs_five_lrs() -> None:
    table = bowls(np.arange(-8.0, -4.9, 1.0), [-6.5, -6.5])
    assert bottom_curvature(table, -6.5) is None
    assert bottom_curvature(bowls(np.arange(-8.0, -3.9, 1.0), [-6.5, -6.5]), -6.5) == pytest.approx(1.0)


def test_an_lr_at_which_a_seed_diverged_is_a_wall_whoever_else_ran_it() -> None:
    x = np.log2([0.01, 0.02, 0.04, 0.08])
    rows = [(log2, seed, 2.0 + (log2 + 4) ** 2) for log2 in x for seed in "012"]
    runs = pd.DataFrame(rows, columns=["x", "seed", "loss"]).assign(lr=lambda frame: 2.0 ** frame["x"])
    runs.loc[runs["x"] == x[-1], "loss"] = math.inf
    some = curve(runs[~((runs["x"] == x[-1]) & (runs["seed"] == "2"))].drop(columns="x"))
    pd.testing.assert_frame_equal(some, curve(runs.drop(columns="x")))
    none = curve(runs[~((runs["x"] == x[0]) & (runs["seed"] == "2"))].drop(columns="x"))
    assert none.index.tolist() == pytest.approx(x[1:].tolist())
