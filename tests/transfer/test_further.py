import math
import shlex

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.command.options import parser
from looptransfer.transfer.further import FurtherRuns, closer_lrs, larger_n, missing_seeds, more_seeds, seeds_needed
from looptransfer.transfer.judge import judge_tables
from looptransfer.transfer.verdict import Terms

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
    assert (runs.counts, runs.seeds) == ((1, 4), ("3", "4"))
    assert np.log2(runs.lrs) == pytest.approx(GRID, abs=1e-4)
    assert len(runs) == 2 * 2 * len(GRID)


def test_new_seeds_are_advised_at_the_lrs_that_each_n_has() -> None:
    tables = {512: table(seeds="0").iloc[:4], 768: table(seeds="0").iloc[1:], 1024: table(seeds="0").iloc[1:]}
    runs = more_seeds(tables, 3)
    assert len(runs) == len(runs.rows("width")) == 2 * sum(map(len, tables.values()))
    low, high = ([f"{2.0**x:.6g}" for x in GRID[some]] for some in (slice(4), slice(1, None)))
    assert runs.text("width") == (
        f"32 runs: width = 512; LR {', '.join(low)}; width = 768, 1024; LR {', '.join(high)}; seed 1, 2"
    )
    assert [grid["width"] for grid in runs.to_dict("width")] == [[512], [768, 1024]]
    first, second = runs.command("factored", "runs.csv").split(" && ")
    assert f"--lrs {','.join(low)}" in first
    assert f"--lrs {','.join(high)}" in second
    files = [call.rpartition(" ")[2] for call in runs.command("factored", "runs.db", ledger=True).split(" && ")]
    assert files == ["more.csv", "more-2.csv"]  # sweep writes no table over another


def test_seeds_that_some_n_lack_are_advised_there() -> None:
    runs = missing_seeds({1: table(), 2: table(seeds="0"), 4: table(seeds="12")})
    assert (runs.counts, runs.seeds) == ((2, 4), ("0", "1", "2"))


def test_a_larger_n_takes_over_lrs_and_seeds() -> None:
    assert larger_n({1: table(), 4: table()}, 4).counts == (16,)


def test_closer_lrs_lie_between_those_around_the_best() -> None:
    lrs = np.log2(closer_lrs({1: table(), 2: table(-5.0)}).lrs)
    assert lrs == pytest.approx([-6.5, -5.5, -4.5], abs=1e-4)


def further_runs(tables: dict[int, pd.DataFrame]) -> FurtherRuns:
    verdict = judge_tables("factored", tables, Terms("loops", None, 0.2, 0.02, 0.9))
    assert verdict.further_runs is not None
    return verdict.further_runs


@pytest.mark.parametrize(("vertex", "lrs"), [(-12.0, [-11, -10]), (0.0, [-2, -1])])
def test_a_censored_optimum_is_looked_for_beyond_its_edge_at_the_n_that_is_censored(
    vertex: float, lrs: list[float]
) -> None:
    runs = further_runs({1: table(), 2: table(vertex), 4: table(vertex)})
    assert (runs.counts, runs.seeds) == ((2, 4), ("0", "1", "2"))
    assert np.log2(runs.lrs) == pytest.approx(lrs, abs=1e-4)


def test_divergence_is_left_for_lower_lrs() -> None:
    hidden = table(-4.0)
    hidden[GRID > -6.0] = math.inf
    assert max(further_runs({1: hidden, 2: hidden}).lrs) < 2.0**-5.0


def test_one_seed_asks_for_more_or_for_those_of_the_other_n() -> None:
    assert further_runs({1: table(seeds="0"), 2: table(seeds="0")}).seeds == ("1", "2", "3")
    runs = further_runs({1: table(), 2: table(seeds="0")})
    assert (runs.counts, runs.seeds) == ((2,), ("0", "1", "2"))


def test_a_plateau_asks_for_seeds_where_the_lrs_reach_far_and_else_for_lrs() -> None:
    flat = table() * 0 + 2.0
    assert further_runs({1: flat, 2: flat}).seeds == ("3", "4", "5")
    assert len(further_runs({1: flat.iloc[2:5], 2: flat.iloc[2:5]}).lrs) == 4


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    counts=st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    lrs=st.lists(st.floats(1e-6, 10), min_size=1, max_size=5, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True),
    table_name=st.sampled_from(["results.csv", "my results.csv", "it's; rm.csv", "$HOME.csv"]),
)
def test_the_command_is_one_that_our_command_line_understands(
    counts: list[int], lrs: list[float], seeds: list[int], table_name: str
) -> None:
    runs = FurtherRuns(dict.fromkeys(counts, tuple(lrs)), tuple(map(str, seeds)))
    command = shlex.split(runs.command("factored", table_name))
    assert command[:2] == ["looptransfer", "sweep"]
    arguments = parser().parse_args(command[1:])
    assert [int(n) for n in arguments.loops.split(",")] == counts
    assert [float(lr) for lr in arguments.lrs.split(",")] == pytest.approx(lrs, rel=1e-5)
    assert str(arguments.append) == table_name
