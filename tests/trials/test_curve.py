import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.trials.curve import curve_of

GRID = np.arange(-12, -3.9, 0.25)


def parabola(x: np.ndarray) -> np.ndarray:
    return np.asarray(2.5 + 0.05 * (x + 8) ** 2)


def test_enough_runs_without_noise_tell_the_curve() -> None:
    x = np.arange(-11, -4.5, 1.0)
    curve = curve_of(x, np.zeros(len(x), int), parabola(x), GRID)
    middle = np.abs(GRID + 8) <= 2
    drawn_in = 0.25 * np.log1p((parabola(GRID) - 2.5) / 0.25)
    assert np.allclose(curve.mean[middle], drawn_in[middle], atol=0.01)
    low, high = curve.interval(0.9)
    assert low <= -8 <= high
    assert high - low <= 1


@settings(derandomize=True, deadline=None, max_examples=30)
@given(scale=st.floats(0.01, 100.0), shift=st.integers(-6, 6), level=st.floats(-0.2, 0.2))
def test_the_answer_moves_with_the_lrs_and_scales_with_the_loss(scale: float, shift: int, level: float) -> None:
    """A seed's own level means nothing either."""
    rng = np.random.default_rng(0)
    x, seeds = np.tile([-10.0, -8.0, -6.0, -7.0], 2), np.repeat([0, 1], 4)
    losses = parabola(x) + rng.normal(0, 0.01, 8)
    first = curve_of(x, seeds, losses, GRID)
    second = curve_of(x + shift, seeds, scale * losses, GRID + shift)
    assert np.allclose(second.mean, scale * first.mean, rtol=1e-6, atol=1e-9 * scale)
    assert second.regret(16, 0.9) == pytest.approx(scale * first.regret(16, 0.9), rel=1e-6, abs=1e-9 * scale)


def test_regret_is_small_at_the_optimum_and_large_away_from_it() -> None:
    x = np.array([-10.0, -9.0, -8.0, -7.0, -6.0])
    curve = curve_of(x, np.zeros(5, int), parabola(x), GRID)
    at = {log2: curve.regret(int(np.abs(GRID - log2).argmin()), 0.9) for log2 in (-10, -8, -6)}
    assert at[-8] < 0.01
    assert min(at[-10], at[-6]) > 0.1


def test_further_runs_are_asked_for_where_the_lowest_point_may_be() -> None:
    x = np.array([-11.0, -9.0, -7.0, -5.0])
    curve = curve_of(x, np.zeros(4, int), parabola(x), GRID)
    log2_lrs = np.arange(-11, -4.5, 0.5)
    chosen = curve.helpful(16, (log2_lrs, np.zeros(len(log2_lrs), int)), 2)
    assert len(set(chosen)) == 2
    assert all(abs(log2_lrs[number] + 8) <= 2 for number in chosen), log2_lrs[chosen]
