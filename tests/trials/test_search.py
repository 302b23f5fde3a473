import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.trials.run import Run
from looptransfer.trials.search import BACK, LIMITS, Grid, ProxySearch, Search

SEEDS = (0, 1, 2)
NOTHING: dict[Run, float] = {}
Loss = Callable[[Run], float]

reproducible = settings(derandomize=True, deadline=None, max_examples=20)


def finished(runs: Iterable[Run], loss: Loss) -> dict[Run, float]:
    return {run: loss(run) for run in runs}


def make_all(search: Search, loss: Loss, made: list[Run] | None = None, order: int | None = None) -> list[Run]:
    """Make what is wanted until nothing is left, one run at a time, or a batch in a random order."""
    made = list(made or [])
    rng = None if order is None else np.random.default_rng(order)
    for _ in range(500):
        left = [run for run in search.wanted(finished(made, loss)) if run not in made]
        if not left:
            return made
        made.append(left[0] if rng is None else left[int(rng.integers(len(left)))])
    raise AssertionError("the search does not end")


def bowl(optimum: float, curvature: float = 0.05, wander: float = 0.02, cliff: float = 2.6) -> Loss:
    """Losses that saturate far below the optimum and diverge `cliff` octaves above it, each seed a little off."""

    def loss(run: Run) -> float:
        distance = math.log2(run.lr) - optimum - wander * (run.seed - 1)
        if distance > cliff:
            return math.inf
        return 2.0 + 0.1 * run.seed + (curvature * distance**2 if distance > -4 else curvature * (8 * -distance - 16))

    return loss


@reproducible
@given(optimum=st.floats(-16, -1))
def test_the_lr_loses_no_more_than_was_asked_wherever_the_optimum_lies(optimum: float) -> None:
    search, loss = ProxySearch(2, SEEDS), bowl(optimum)
    made = make_all(search, loss)
    best = search.optimum(finished(made, loss))
    assert best is not None
    assert 0.05 * (math.log2(best.lr) - optimum) ** 2 <= 0.005 * best.loss
    assert best.regret <= 0.005 * best.loss
    assert len(made) <= 16


@reproducible
@given(optimum=st.floats(-16, -1))
def test_the_optimum_itself_is_known_to_the_precision_that_was_asked(optimum: float) -> None:
    search, loss = ProxySearch(2, SEEDS, precision=0.25), bowl(optimum)
    best = search.optimum(finished(make_all(search, loss), loss))
    assert best is not None
    low, high = best.log2_lr
    assert high - low <= 0.5
    assert math.log2(best.lr) == pytest.approx(optimum, abs=0.3)


@reproducible
@given(optimum=st.floats(-16, -1), order=st.integers(0, 2**32))
def test_the_order_in_which_runs_finish_does_not_matter(optimum: float, order: int) -> None:
    search, loss = ProxySearch(2, SEEDS), bowl(optimum)
    assert set(make_all(search, loss, order=order)) == set(make_all(search, loss))


@settings(derandomize=True, deadline=None, max_examples=10)
@given(optimum=st.floats(-16, -1), order=st.integers(0, 2**32), share=st.floats(0, 1))
def test_a_search_resumed_from_any_prefix_makes_the_same_runs(optimum: float, order: int, share: float) -> None:
    loss = bowl(optimum)
    whole = make_all(ProxySearch(2, SEEDS), loss, order=order)
    resumed = make_all(ProxySearch(2, SEEDS), loss, whole[: int(share * len(whole))], order=order + 1)
    assert set(resumed) == set(whole)
    assert len(resumed) == len(whole)  # none was made twice


@pytest.mark.parametrize("cut", range(0, 42, 3))
def test_what_is_finished_is_wanted_still_so_that_nothing_is_forgotten(cut: int) -> None:
    search, loss = ProxySearch(2, SEEDS), bowl(-9.3)
    whole = make_all(search, loss)
    done = finished(whole[:cut], loss)
    wanted = search.wanted(done)
    assert set(whole[:cut]) <= set(wanted)
    shuffled = np.random.default_rng(cut).permutation(len(whole[:cut]))
    assert search.wanted(finished((whole[place] for place in shuffled), loss)) == wanted


def test_the_first_look_is_coarse_and_takes_one_seed() -> None:
    assert ProxySearch(4, (7, 8), "sqrt").wanted(NOTHING) == [Run("sqrt", 4, 2.0**x, 7) for x in (-9, -7)]


def test_noise_is_met_with_further_runs() -> None:
    shallow = bowl(-8.2, curvature=0.01, cliff=9.0)

    def noisy(run: Run) -> float:
        noise = np.random.default_rng([run.seed, round(4 * math.log2(run.lr)) + 99]).normal(0, 0.05)
        return shallow(run) + float(noise)

    made = make_all(ProxySearch(2, SEEDS), noisy)
    assert len(made) > len(make_all(ProxySearch(2, SEEDS), shallow))


@pytest.mark.parametrize(("slope", "limit"), [(0.1, LIMITS[0]), (-0.1, LIMITS[1])])
def test_an_edge_is_followed_outwards_to_the_limit(slope: float, limit: int) -> None:
    def loss(run: Run) -> float:
        return 5.0 + slope * math.log2(run.lr)

    reached = [math.log2(run.lr) for run in make_all(ProxySearch(2, SEEDS), loss)]
    outermost = min(reached) if slope > 0 else max(reached)
    assert 0 <= (outermost - limit) * math.copysign(1, slope) <= 6


@reproducible
@given(optimum=st.floats(-12, -4), cliff=st.floats(0.05, 1.5))
def test_a_cliff_is_kept_away_from(optimum: float, cliff: float) -> None:
    search, loss = ProxySearch(2, SEEDS), bowl(optimum, cliff=cliff)
    done = finished(make_all(search, loss), loss)
    best = search.optimum(done)
    assert best is not None
    diverged = min(math.log2(run.lr) for run in done if not math.isfinite(done[run]))
    assert math.log2(best.lr) <= diverged - BACK
    assert 0.05 * (math.log2(best.lr) - optimum) ** 2 <= 0.02 * best.loss


def test_a_wall_of_finite_losses_is_a_cliff() -> None:
    def walled(run: Run) -> float:
        return bowl(-8.0)(run) + (5.0 if math.log2(run.lr) > -7.4 else 0.0)

    best = ProxySearch(2, SEEDS).optimum(finished(make_all(ProxySearch(2, SEEDS), walled), walled))
    assert best is not None
    assert -9 <= math.log2(best.lr) <= -7.5


@settings(derandomize=True, deadline=None, max_examples=20)
@given(optimum=st.floats(-9, -7), noise=st.integers(0, 2**32), order=st.integers(0, 2**32))
def test_a_widening_stands_so_that_no_finished_run_is_left_out(optimum: float, noise: int, order: int) -> None:
    """In a basin so shallow that noise puts the lowest loss on an edge, the first new runs may bring it back."""

    def loss(run: Run) -> float:
        scatter = np.random.default_rng([noise, run.seed, round(2 * math.log2(run.lr)) + 99]).normal(0, 0.006)
        return float(2 + 0.0015 * (math.log2(run.lr) - optimum) ** 2 + scatter)

    search = ProxySearch(2, (0, 1))
    made = make_all(search, loss, order=order)
    assert set(made) == set(search.wanted(finished(made, loss)))
    assert set(made) == set(make_all(search, loss))


def test_a_search_in_which_everything_diverges_ends() -> None:
    search = ProxySearch(2, SEEDS)
    made = make_all(search, lambda run: math.inf)
    assert len(made) < 30
    assert search.optimum(finished(made, lambda run: math.inf)) is None


def test_runs_of_other_loop_counts_and_rules_do_not_enter_the_search() -> None:
    search, loss = ProxySearch(2, SEEDS), bowl(-9.3)
    made = make_all(search, loss)
    others = [Run(rule, loops, run.lr, run.seed) for rule, loops in (("sqrt", 2), ("factored", 8)) for run in made]
    assert search.wanted(finished(others, lambda run: math.log2(run.lr)) | finished(made, loss)) == made


def test_a_grid_wants_its_longest_runs_first() -> None:
    runs = [
        Run(rule, n, lr, seed)
        for n in (1, 8, 2)
        for rule in ("sqrt", "factored")
        for lr in (2.0, 1.0)
        for seed in (1, 0)
    ]
    wanted = Grid(tuple(runs)).wanted(NOTHING)
    assert [run.loops for run in wanted] == [8] * 8 + [2] * 8 + [1] * 8
    assert sorted(wanted) == sorted(runs)


def test_a_grid_wants_the_same_whatever_is_finished_and_however_it_was_listed() -> None:
    runs = [Run("factored", n, 2.0**-k, seed) for n in (1, 4) for k in (3, 5) for seed in (0, 1)]
    wanted = Grid(tuple(runs)).wanted(NOTHING)
    assert Grid(tuple(reversed(runs))).wanted(finished(runs[:3], lambda run: 1.0)) == wanted
