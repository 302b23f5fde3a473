import dataclasses

import numpy as np
import pytest

import looptransfer as lt
from looptransfer.report import plot_cosines, plot_exponents, plot_growth, plot_stream
from tests.experiments import tiny_experiment
from tests.report.test_figures import drawn, legend


@pytest.fixture(scope="module")
def check() -> lt.CoordCheck:
    return lt.coord_check(tiny_experiment(), loops=[1, 2, 4], rules=["factored", "unscaled"], steps=1)


def test_growth_is_drawn_against_n_with_a_line_of_means_per_rule(check: lt.CoordCheck) -> None:
    figure = plot_growth(check)
    assert legend(figure.axes[0]) == ["factored", "unscaled"]
    stream = check.frame[(check.frame["statistic"] == "stream_rms") & (check.frame["step"] == 0)]
    last = stream[stream["visit"] == stream["loops"]]
    for rule, marker in (("factored", "o"), ("unscaled", "s")):
        ((x, y),) = drawn(figure.axes[1], marker)
        assert x.tolist() == [1, 2, 4]
        assert y == pytest.approx(last[last["rule"] == rule].groupby("loops")["value"].mean().to_numpy())


def test_the_stream_is_drawn_visit_by_visit_with_a_line_per_n(check: lt.CoordCheck) -> None:
    figure = plot_stream(check)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["N = 1", "N = 2", "N = 4"]
    assert [len(x) for x, _ in drawn(figure.axes[1], "")][:2] == [2, 4]
    assert len(figure.axes) == 2 * len(check.rules)


def test_exponents_stand_on_the_range_that_is_promised(check: lt.CoordCheck) -> None:
    axis = plot_exponents(check).axes[0]
    judged = [finding for finding in check.judged if finding.axis != "level"]
    assert len(axis.get_yticklabels()) == len(judged)
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches[: len(judged)]]
    ranges = [(finding.low - finding.tolerance, finding.high + finding.tolerance) for finding in reversed(judged)]
    assert np.array(bars) == pytest.approx(np.array(ranges))


def test_cosines_are_those_of_the_largest_n_before_and_after(check: lt.CoordCheck) -> None:
    figure = plot_cosines(check)
    assert figure is not None
    for axis, step in zip(figure.axes, (0, 1), strict=False):
        assert np.asarray(axis.images[0].get_array()) == pytest.approx(check.cosines["factored", 4, step])
    assert plot_cosines(dataclasses.replace(check, cosines={})) is None
