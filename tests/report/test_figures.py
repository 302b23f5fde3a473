import numpy as np
import pandas as pd
import pytest

from looptransfer.report.figures import plot_optima
from looptransfer.transfer.check import check


@pytest.mark.parametrize("seeds", [1, 3])
def test_optima_that_are_not_known_are_said_not_to_be(seeds: int) -> None:
    x = np.arange(-9.0, -2.9, 0.75)
    rows = [
        (n, 2.0**at, seed, 2.0 + 0.1 * (at + 6.1 + 0.01 * seed) ** 2)
        for n in (1, 2)
        for seed in range(seeds)
        for at in x
    ]
    figure = plot_optima(check(pd.DataFrame(rows, columns=["loops", "lr", "seed", "loss"])))
    left = figure.axes[0]
    written = [text.get_text() for text in left.texts]
    assert (written == ["no optimum is known"]) == (seeds == 1)
    assert (left.get_legend() is None) == (seeds == 1)
