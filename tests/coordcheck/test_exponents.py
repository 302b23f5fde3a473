import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtr

from looptransfer.coordcheck.exponents import fit_exponents, holm

LOOPS = [1, 2, 4, 8]


@given(st.floats(-3, 3), st.floats(-20, 20), st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=2, unique=True))
def test_a_power_law_gives_its_exponent_back(exponent: float, constant: float, loops: list[int]) -> None:
    table = pd.DataFrame([[2**constant * n**exponent for n in loops]], columns=loops)
    assert fit_exponents(table)[0] == pytest.approx(exponent, abs=1e-9)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.floats(0.1, 10), st.floats(-2, 2))
def test_scale_changes_no_exponent_and_a_factor_of_n_adds_its_own(logs: list[float], scale: float, own: float) -> None:
    values = pd.DataFrame([[2**log for log in logs]], columns=LOOPS)
    tilted = values * [scale * n**own for n in LOOPS]
    assert fit_exponents(tilted)[0] == pytest.approx(fit_exponents(values)[0] + own, abs=1e-8)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    count = len(p_values)
    assert all(p <= q <= min(1, count * p) + 1e-12 for p, q in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert list(np.array(adjusted)[order]) == sorted(adjusted)


def test_one_false_alarm_among_many_looks_is_corrected_for() -> None:
    """Of noise at the edge of the tolerance, a single look would fail in 5 % of the cases, one of forty in most."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(300):
        values = rng.normal(0, 1, size=(40, 3))
        t = values.mean(1) / (values.std(1, ddof=1) / math.sqrt(3))
        alarms += min(holm(list(stdtr(2, -t)))) <= 0.05
    assert alarms <= 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)
