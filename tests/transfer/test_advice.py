import math
import shlex

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.command.cli import _parser
from looptransfer.transfer.advice import (
    FurtherRuns,
    closer_lrs,
    larger_n,
    missing_seeds,
    more_seeds,
    seeds_needed,
    uncensor,
)

GRID = np.arange(-9.0, -2.9, 1.0)


def table(vertex: float = -6.0, seeds: str = "012") -> pd.DataFrame:
    return pd.DataFrame(dict.fromkeys(seeds, 2.0 + 0.1 * (GRID - vertex) ** 2), pd.Index(GRID, name="x"))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(scatter=st.floats(0.01, 0.5), room=st.floats(0.02, 0.3))
def test_the_seeds_advised_leave_room_four_times_out_of_five_and_one_fewer_does_not(
    scatter: float, room: float
) -> None:
    def short(seeds: int) -> bool:
        t = scipy.stats.t.ppf(0.95, seeds - 1) + scipy.stats.t.ppf(0.8, seeds - 1)
        return bool(t * scatter / math.sqrt(seeds) < room)

    seeds = seeds_needed(scatter, room, 0.9)
    if seeds is None:
        assert not short(64)
    else:
        assert short(seeds)
        assert seeds == 2 or not short(seeds - 1)


def test_new_seeds_follow_those_there_are_at_every_n_and_lr() -> None:
    runs = more_seeds({1: table(), 4: table()}, 5)
    assert (runs.at, runs.seeds) == ((1, 4), ("3", "4"))
    assert np.log2(runs.lrs) == pytest.approx(GRID, abs=1e-4)
    assert len(runs) == 2 * 2 * len(GRID)


def test_seeds_that_some_n_lack_are_advised_there() -> None:
    runs = missing_seeds({1: table(), 2: table(seeds="0"), 4: table(seeds="12")})
    assert (runs.at, runs.seeds) == ((2, 4), ("0", "1", "2"))


def test_a_larger_n_takes_over_lrs_and_seeds() -> None:
    assert larger_n({1: table(), 4: table()}, 4).at == (16,)


def test_closer_lrs_lie_between_those_around_the_best() -> None:
    lrs = np.log2(closer_lrs({1: table(), 2: table(-5.0)}, [1, 2]).lrs)
    assert lrs == pytest.approx([-6.5, -5.5, -4.5], abs=1e-4)


@pytest.mark.parametrize(("why", "lrs"), [("low edge", [-11, -10]), ("high edge", [-2, -1])])
def test_a_censored_optimum_is_looked_for_beyond_its_edge_at_the_n_that_is_censored(why: str, lrs: list[float]) -> None:
    runs = uncensor({1: table(), 2: table(), 4: table()}, {2: why, 4: why})  # type: ignore[dict-item]
    assert (runs.at, runs.seeds) == ((2, 4), ("0", "1", "2"))
    assert np.log2(runs.lrs) == pytest.approx(lrs, abs=1e-4)


def test_divergence_is_left_for_lower_lrs() -> None:
    cut = table(-4.0)
    cut[GRID > -6.0] = math.inf
    assert max(uncensor({1: cut}, {1: "diverged"}).lrs) < 2.0**-5.0


def test_an_n_with_one_seed_beside_others_with_more_asks_for_theirs() -> None:
    runs = uncensor({1: table(), 2: table(seeds="0")}, {2: "one seed"})
    assert (runs.at, runs.seeds) == ((2,), ("0", "1", "2"))


def test_one_seed_asks_for_more_and_a_plateau_for_seeds_where_the_lrs_reach_far() -> None:
    assert uncensor({1: table(seeds="0")}, {1: "one seed"}).seeds == ("1", "2", "3")
    assert uncensor({1: table()}, {1: "plateau"}).seeds == ("3", "4", "5")
    near = table().iloc[2:5]
    assert len(uncensor({1: near}, {1: "plateau"}).lrs) == 4


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    at=st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    lrs=st.lists(st.floats(1e-6, 10), min_size=1, max_size=5, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True),
    table_name=st.sampled_from(["results.csv", "my results.csv", "it's; rm.csv", "$HOME.csv"]),
)
def test_the_command_is_one_that_our_command_line_understands(
    at: list[int], lrs: list[float], seeds: list[int], table_name: str
) -> None:
    runs = FurtherRuns(tuple(at), tuple(lrs), tuple(map(str, seeds)))
    words = shlex.split(runs.command("factored", table_name))
    assert words[:2] == ["looptransfer", "sweep"]
    arguments = _parser().parse_args(words[1:])
    assert [int(n) for n in arguments.loops.split(",")] == at
    assert [float(lr) for lr in arguments.lrs.split(",")] == pytest.approx(lrs, rel=1e-5)
    assert str(arguments.append) == table_name
