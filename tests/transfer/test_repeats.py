"""The first stage of the gate, as pure functions of what is stored."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.transfer.optimum import Interval
from looptransfer.transfer.repeats import is_noise, is_same, is_small, largest_gap, runs_to_repeat
from looptransfer.transfer.stored import Losses, StoredOptimum

reproducible = settings(derandomize=True, deadline=None, max_examples=100)
GRID = [2.0**log2 for log2 in range(-9, -2)]


def stored(losses: Losses, log2_lr: float = -6.0) -> StoredOptimum:
    interval = Interval(log2_lr, log2_lr - 0.1, log2_lr + 0.1)
    return StoredOptimum(4, None, interval, {"0": log2_lr, "1": log2_lr}, Interval(1, 1, 1), {"0": 1, "1": 1}, losses)


def table(seeds: str = "012", diverged: tuple[tuple[float, str], ...] = ()) -> Losses:
    return {repr(lr): {seed: None if (lr, seed) in diverged else 1.0 + lr for seed in seeds} for lr in GRID}


@reproducible
@given(st.floats(-8.4, -3.6))
def test_the_runs_nearest_to_half_and_once_the_optimum_are_made_again(log2_lr: float) -> None:
    repeats = runs_to_repeat(stored(table(), log2_lr))
    assert [repeat.seed for repeat in repeats] == [0, 0]
    assert [repeat.loss for repeat in repeats] == [1.0 + repeat.lr for repeat in repeats]
    half, once = (math.log2(repeat.lr) for repeat in repeats)
    assert abs(once - log2_lr) <= 0.5
    assert abs(half - (log2_lr - 1)) <= 0.5


def test_a_seed_that_diverged_there_gives_way_to_the_next() -> None:
    assert {repeat.seed for repeat in runs_to_repeat(stored(table("102", ((2.0**-6, "0"),))))} == {1}
    assert {repeat.seed for repeat in runs_to_repeat(stored(table("102", ((2.0**-3, "0"),))))} == {0}


@pytest.mark.parametrize(
    "losses", [{}, table("ab"), {repr(2.0**-6): {"0": 1.0}}, table("0", tuple((lr, "0") for lr in GRID))]
)
def test_without_two_runs_of_a_numbered_seed_nothing_is_made_again(losses: Losses) -> None:
    assert runs_to_repeat(stored(losses)) == []


def test_seeds_are_in_the_order_of_their_numbers() -> None:
    losses = {repr(lr): {"10": 1.0, "9": 2.0} for lr in GRID}
    assert {repeat.seed for repeat in runs_to_repeat(stored(losses))} == {9}


def test_a_control_differs_by_one_ulp_of_a_float32() -> None:
    for repeat in runs_to_repeat(stored(table())):
        assert np.float32(repeat.control_lr) == np.nextafter(np.float32(repeat.lr), np.float32(1))


def test_a_gap_is_the_largest_and_a_diverged_run_is_no_small_one() -> None:
    repeats = runs_to_repeat(stored(table()))
    losses = [repeat.loss for repeat in repeats]
    assert largest_gap(repeats, losses) == 0
    assert is_same(0.0, repeats)
    assert is_same(largest_gap(repeats, [losses[0] * (1 + 2.0**-22), losses[1]]), repeats)
    assert not is_same(largest_gap(repeats, [losses[0], losses[1] + 1e-5]), repeats)
    assert not is_small(largest_gap(repeats, [losses[0], math.inf]), 0.02)
    assert not is_small(largest_gap(repeats, [losses[0], math.nan]), 0.02)
    assert not is_noise(1e-4, math.nan)


def test_what_a_control_explains_ends_well_below_the_tolerance_of_the_loss() -> None:
    assert is_small(0.001, 0.02)
    assert not is_small(0.005, 0.02)
    assert is_noise(1e-4, -5e-5)
    assert not is_noise(1e-4, 1e-6)
