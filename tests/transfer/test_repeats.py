"""The first stage of the gate, as pure functions of what is stored."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.transfer.optimum import Interval
from looptransfer.transfer.repeats import are_noise, are_same, are_small, confirmed, runs_to_repeat
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
    repeats = runs_to_repeat(stored(table("0123"), log2_lr))
    assert [repeat.seed for repeat in repeats] == [0, 0, 1, 2]
    assert [repeat.loss for repeat in repeats] == [1.0 + repeat.lr for repeat in repeats]
    half, once = (math.log2(repeat.lr) for repeat in repeats[:2])
    assert {repeat.lr for repeat in repeats[1:]} == {repeats[1].lr}
    assert abs(once - log2_lr) <= 0.5
    assert abs(half - (log2_lr - 1)) <= 0.5


def test_a_seed_that_diverged_there_gives_way_to_the_next() -> None:
    assert [repeat.seed for repeat in runs_to_repeat(stored(table("102", ((2.0**-6, "0"),))))] == [1, 1, 2]
    assert [repeat.seed for repeat in runs_to_repeat(stored(table("102", ((2.0**-3, "0"),))))] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "losses", [{}, table("ab"), {repr(2.0**-6): {"0": 1.0}}, table("0", tuple((lr, "0") for lr in GRID))]
)
def test_without_two_runs_of_a_numbered_seed_nothing_is_made_again(losses: Losses) -> None:
    assert runs_to_repeat(stored(losses)) == []


def test_seeds_are_in_the_order_of_their_numbers() -> None:
    losses = {repr(lr): {"10": 1.0, "9": 2.0} for lr in GRID}
    assert [repeat.seed for repeat in runs_to_repeat(stored(losses))] == [9, 9, 10]


def test_a_control_differs_by_one_ulp_of_a_float32() -> None:
    for repeat in runs_to_repeat(stored(table())):
        assert np.float32(repeat.control_lr) == np.nextafter(np.float32(repeat.lr), np.float32(1))


def test_the_last_digits_need_no_explanation_and_a_diverged_run_has_none() -> None:
    half, once, *_ = runs_to_repeat(stored(table()))
    assert are_same([half, once], [half.gap(half.loss), once.gap(once.loss * (1 + 2.0**-22))])
    assert not are_same([half, once], [0.0, once.gap(once.loss + 1e-5)])
    for diverged in (math.inf, math.nan):
        assert not are_small([0.0, half.gap(diverged)], 0.02)
        assert not are_noise([1e-4, 1e-4], [1e-4, diverged])
        assert not are_noise([1e-4, 1e-4], [diverged, 1e-4])


def test_gaps_are_small_by_their_mean_and_noise_by_the_largest() -> None:
    assert are_small([0.03, -0.01], 0.02)
    assert not are_small([0.03, 0.02], 0.02)
    assert are_noise([0.03, -0.01], [-0.004, 1e-6])
    assert not are_noise([0.03, -0.01], [-0.003, 1e-6])


def test_what_holds_says_by_how_much_each_loss_differs() -> None:
    optimum = stored(table())
    half, once, other, _ = runs_to_repeat(optimum)
    told = confirmed(optimum, [half, once], [0.0, -0.012])
    assert (told.answer, told.seeds, told.paired) == ("HOLDS", 1, True)
    assert told.reason == "seed 0 gives the stored losses again: LR 0.00781 exactly, LR 0.0156 but for 0.01"
    told = confirmed(optimum, [half, once, other], [2e-6, 0.03, -0.01])
    assert told.seeds == 2
    assert told.reason == (
        "seeds 0, 1 give the stored losses again: LR 0.00781 but for 2e-06, LR 0.0156 but for 0.01 in the mean"
    )
