import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

import looptransfer as lt
from looptransfer.report import plot_curves, plot_optima
from looptransfer.report.figures import MOST_IN_LEGEND


def sweep(
    rule: str = "factored", drift: float = 0.0, counts: tuple[int, ...] = (1, 2, 4), seeds: int = 3
) -> pd.DataFrame:
    """Bowls about 2^−6.1 whose optimum moves by `drift`; the highest LR diverges for seed 0 at N = 4."""
    rows = [
        (rule, n, 2.0**x, seed, 2.0 + 0.1 * (x + 6.1 - drift * math.log2(n) + 0.01 * seed) ** 2)
        for n in counts
        for seed in range(seeds)
        for x in np.arange(-9.0, -2.9, 0.75)
    ]
    frame = pd.DataFrame(rows, columns=["rule", "loops", "lr", "seed", "loss"])
    lost = (frame["loops"] == 4) & (frame["lr"] > 2.0**-3.1) & (frame["seed"] == 0)
    return frame.assign(loss=frame["loss"].mask(lost, math.inf))


@pytest.fixture(scope="module")
def verdict() -> lt.Verdict:
    return lt.check(pd.concat([sweep(), sweep("unscaled", -0.5)]), transferred_lr=0.015)


def drawn(axis: Axes, marker: str = "None", style: str = "-") -> list[tuple[np.ndarray, np.ndarray]]:
    """The data of the lines of a kind."""
    lines = [line for line in axis.lines if (str(line.get_marker()), line.get_linestyle()) == (marker, style)]
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in lines]


def legend(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_a_panel_per_rule_has_mean_losses_stars_at_the_optima_and_crosses_where_runs_diverged(
    verdict: lt.Verdict,
) -> None:
    figure = plot_curves(verdict)
    assert [axis.get_title() for axis in figure.axes] == ["factored: FLAT", "unscaled: DRIFTS"]
    for axis, judged in zip(figure.axes, verdict.rules.values(), strict=True):
        stars = [float(x[0]) for x, _ in drawn(axis, "*", "None")]
        assert stars == pytest.approx([2.0**optimum.log2_lr.estimate for optimum in judged.optima if optimum.log2_lr])
        crosses = [x.tolist() for x, _ in drawn(axis, "x", "None")]
        assert crosses == [[], [], [2.0**-3]]
        assert [x[0] for x, _ in drawn(axis, style="--")] == [0.015]
        runs = verdict.runs[(verdict.runs["rule"] == judged.rule) & (verdict.runs["loops"] == 1)]
        lrs, means = next((x, y) for x, y in drawn(axis, "o") if len(x))
        assert means == pytest.approx([runs.loc[runs["lr"] == lr, "loss"].mean() for lr in lrs])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["N = 1", "N = 2", "N = 4"]


def test_optima_are_drawn_over_n_with_the_tolerance_and_the_regret_with_its_interval(verdict: lt.Verdict) -> None:
    left, right = plot_optima(verdict).axes
    for (x, y), judged in zip([*drawn(left, "o"), *drawn(left, "s")], verdict.rules.values(), strict=True):
        assert x.tolist() == [1, 2, 4]
        assert y == pytest.approx([optimum.log2_lr.estimate for optimum in judged.optima if optimum.log2_lr])
    upper, lower = (y for _, y in drawn(left, style=":"))
    assert upper - lower == pytest.approx([0, 0.4, 0.8])
    assert legend(left) == ["factored: FLAT", "unscaled: DRIFTS", "±0.2 octave per doubling"]
    regrets = [judged.regret.estimate for judged in verdict.rules.values() if judged.regret]
    assert [float(y[0]) for marker in "os" for _, y in drawn(right, marker)] == pytest.approx(regrets)
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["factored", "unscaled"]


def test_optima_and_regrets_that_are_not_known_are_said_not_to_be() -> None:
    left, right = plot_optima(lt.check(sweep(seeds=1))).axes
    assert [text.get_text() for text in left.texts] == ["no optimum is known"]
    assert [text.get_text() for text in right.texts] == ["not\nknown"]


def test_a_legend_of_many_n_names_some_of_them_and_names_are_no_formulas() -> None:
    verdict = lt.check(sweep(rule=r"$\foo$", counts=tuple(range(1, 40))))
    figure = plot_curves(verdict)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert (len(names), names[0], names[-1]) == (MOST_IN_LEGEND, "N = 1", "N = 39")
    assert figure.axes[0].get_title().startswith(r"\$\foo\$: ")
    plot_optima(dataclasses.replace(verdict, axis="loops")).canvas.draw()
