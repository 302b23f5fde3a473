import json
import math
import re
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.errors import InputError
from looptransfer.transfer.causes import ROWS
from looptransfer.transfer.check import check
from looptransfer.transfer.further import FurtherRuns
from looptransfer.transfer.optimum import Interval, curve, curve_height
from looptransfer.transfer.results import tidy
from looptransfer.transfer.verdict import Cause, Verdict

OCTAVES = np.arange(-3.0, 3.1, 0.75)
# Losses of github.com/avifenesh/recipe-lab; LRs ascend along a row. One seed each.
GRID_LRS = [0.0003, 0.0006, 0.0012, 0.0024, 0.0048]
GRID_LOSSES = {
    (12, 1): [5.3998, 5.0222, 4.7608, 4.5825, 4.7723],
    (6, 2): [5.4109, 5.0836, 4.7681, 4.6151, 4.6328],
    (3, 4): [5.4397, 5.0623, 4.7972, 4.6826, 4.7744],
}
PROOF_LRS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
PROOF_LOSSES = {
    (1, 1): [0.0325, 0.0321, 0.0246, 0.0177, 0.0077, 0.0015, 0.0001],
    (1, 2): [0.0322, 0.0319, 0.0243, 0.0177, 0.0083, 0.0019, 0.0002],
    (1, 4): [0.0321, 0.0319, 0.0241, 0.0177, 0.0085, 0.0020, 0.0003],
    (1, 8): [0.0321, 0.0319, 0.0241, 0.0177, 0.0086, 0.0021, 0.0003],
}

reproducible = settings(derandomize=True, deadline=None, max_examples=25)


def runs_of(
    drift: float = 0.0,
    rule: str = "factored",
    loops: Sequence[int] = (1, 2, 4, 8),
    seeds: int = 4,
    centre: float = -6.1,
    curvature: float = 0.1,
    noise: float = 0.0005,
    wander: float = 0.05,
    draw: int = 0,
    grid: np.ndarray | None = None,
) -> pd.DataFrame:
    """Bowls in log2(LR) whose optimum moves by `drift` per doubling; each seed's wanders by itself at every N."""
    rng = np.random.default_rng(draw)
    x = -6.0 + (OCTAVES if grid is None else grid)
    parts = []
    for n in loops:
        for seed in range(seeds):
            vertex = centre + drift * math.log2(n) + rng.normal(0, wander)
            loss = 2.0 + rng.normal(0, 0.1) + curvature * (x - vertex) ** 2 + rng.normal(0, noise, len(x))
            parts.append(pd.DataFrame({"rule": rule, "loops": n, "lr": 2.0**x, "seed": seed, "loss": loss}))
    return pd.concat(parts, ignore_index=True)


def public(losses: dict[tuple[int, int], list[float]], lrs: list[float], seed: int) -> pd.DataFrame:
    rows = [
        ("factored", layers, loops, lr, seed, loss)
        for (layers, loops), row in losses.items()
        for lr, loss in zip(lrs, row, strict=True)
    ]
    return pd.DataFrame(rows, columns=["rule", "layers", "loops", "lr", "seed", "loss"])


def drift_of(verdict: Verdict, rule: str = "factored") -> Interval:
    interval = verdict.rules[rule].drift
    assert interval is not None
    return interval


def limits(interval: Interval | None) -> list[float]:
    assert interval is not None
    return [interval.estimate, interval.low, interval.high]


# -- flat and drifts


@reproducible
@given(drift=st.one_of(st.just(0.0), st.floats(0.5, 0.8), st.floats(-0.8, -0.5)), draw=st.integers(0, 1000))
def test_an_optimum_that_stays_is_flat_and_one_that_moves_drifts(drift: float, draw: int) -> None:
    verdict = check(runs_of(drift, loops=(1, 2, 4), draw=draw))
    assert (verdict.answer, verdict.exit_status) == (("DRIFTS", 1) if drift else ("FLAT", 0))
    assert drift_of(verdict).estimate == pytest.approx(drift, abs=0.15)
    assert not drift or ("up" if drift > 0 else "down") in verdict.judged.reason


def test_a_noiseless_drift_is_measured_exactly_also_over_unevenly_spaced_loop_counts() -> None:
    verdict = check(runs_of(0.5, loops=(1, 3, 16), noise=0.0, wander=0.0, grid=np.arange(-6.0, 6.1, 0.75)))
    assert limits(drift_of(verdict)) == pytest.approx([0.5] * 3, abs=1e-6)


def test_a_drift_within_a_wider_tolerance_is_flat() -> None:
    runs = runs_of(0.3, noise=0.0, wander=0.0)
    assert check(runs, tolerance=0.5, regret_tolerance=0.3).answer == "FLAT"
    assert check(runs).answer == "DRIFTS"


# -- every cause


def hidden_by_divergence() -> pd.DataFrame:
    runs = runs_of(centre=-5.2)
    return runs.assign(loss=runs["loss"].mask((runs["loops"] == 8) & (runs["lr"] > 2**-5.3), math.inf))


def unshared(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.assign(seed=runs["seed"] + 100 * runs["loops"])


def moving_edges(sign: int) -> pd.DataFrame:
    """The grid moves with N, and the optimum lies beyond it everywhere."""
    parts = [
        runs_of(loops=(n,), centre=-6.0 + 10 * sign, grid=OCTAVES + 0.6 * sign * step, draw=n)
        for step, n in enumerate((1, 2, 4, 8))
    ]
    return pd.concat(parts)


TABLES: dict[str, tuple[pd.DataFrame, dict[str, float], str]] = {
    "one N": (runs_of(loops=(4,)), {}, "one N"),
    "one seed, though the optimum moves": (runs_of(0.6, seeds=1, loops=(1, 2, 4)), {}, "one seed"),
    "low edge": (runs_of(centre=-10.0), {}, "low edge"),
    "high edge": (runs_of(0.2, centre=-2.5), {}, "high edge"),
    "high edges that move up": (moving_edges(1), {}, "high edge"),
    "low edges that move down": (moving_edges(-1), {}, "low edge"),
    "two known optima of three": (
        pd.concat([runs_of(0.6, loops=(1, 2)), runs_of(loops=(4,), centre=-1.0)]),
        {},
        "high edge",
    ),
    "divergence": (hidden_by_divergence(), {}, "diverged"),
    "no curvature": (runs_of(curvature=0.0), {}, "plateau"),
    "an interval across the tolerance": (runs_of(0.1, loops=(1, 2), seeds=2, wander=0.1, draw=3), {}, "too few seeds"),
    "seeds that differ": (unshared(runs_of(loops=(1, 2))), {}, "no shared seeds"),
    "an LR that is off in a steep basin": (runs_of(curvature=2.0), {"transferred_lr": 2.0**-5.5}, "regret"),
    "an LR beyond those run": (runs_of(), {"transferred_lr": 2.0}, "regret"),
    "a tolerance as high as the curve": (runs_of(), {"regret_tolerance": 4.0}, "tolerance"),
    "a public grid of one seed": (public(GRID_LOSSES, GRID_LRS, 7), {}, "one seed"),
    "a public grid whose best LR is its highest": (public(PROOF_LOSSES, PROOF_LRS, 42), {}, "high edge"),
}


@pytest.mark.parametrize(("runs", "options", "cause"), TABLES.values(), ids=TABLES)
def test_what_cannot_be_judged_is_inconclusive_with_its_cause_and_what_to_run(
    runs: pd.DataFrame, options: dict[str, float], cause: str
) -> None:
    verdict = check(runs, **options)  # type: ignore[arg-type]
    assert (verdict.answer, verdict.judged.cause, verdict.exit_status) == ("INCONCLUSIVE", cause, 3)
    assert verdict.judged.reason
    assert verdict.judged.advice
    assert (verdict.judged.further_runs is None) == (cause in ("regret", "tolerance"))
    assert len(verdict.rows_to_run()) == len(verdict.judged.further_runs or ())


def test_every_cause_has_its_row_and_every_row_its_cause() -> None:
    assert {situation.partition(":")[0] for situation in ROWS} == set(get_args(Cause))


def test_only_the_n_that_is_censored_is_run_again() -> None:
    judged = check(pd.concat([runs_of(loops=(1, 2, 4)), runs_of(loops=(8,), centre=-2.0, draw=1)])).judged
    assert judged.cause == "high edge"
    assert judged.further_runs == FurtherRuns({8: (0.210224, 0.353553)}, ("0", "1", "2", "3"))
    assert judged.drift is not None  # of the loop counts that are not censored, for information


def test_three_known_optima_drift_whatever_is_censored_beside_them() -> None:
    judged = check(pd.concat([runs_of(0.6, loops=(1, 2, 4)), runs_of(loops=(8,), centre=-1.0, draw=3)])).judged
    assert (judged.answer, judged.cause, judged.fitted) == ("DRIFTS", "drifts", [1, 2, 4])


def test_the_number_of_seeds_advised_settles_it_if_mean_and_scatter_stay() -> None:
    runs = runs_of(0.1, loops=(1, 2), seeds=3, wander=0.15, draw=1)
    before = check(runs).rules["factored"]
    assert before.answer == "INCONCLUSIVE"
    assert before.further_runs is not None
    advised = 3 + len(before.further_runs.seeds)
    assert advised > 3
    assert before.drift_by_seed is not None
    scatter, room = before.drift_by_seed.std(ddof=1), 0.2 - abs(before.drift_by_seed.mean())
    rng = np.random.default_rng(0)

    def settled(seeds: int) -> float:
        """The share of new sweeps of the same mean and scatter whose interval ends before the tolerance."""
        draws = rng.normal(0.2 - room, scatter, (20_000, seeds))
        half = scipy.stats.t.ppf(0.95, seeds - 1) * draws.std(axis=1, ddof=1) / math.sqrt(seeds)
        return float((draws.mean(axis=1) + half < 0.2).mean())

    assert settled(advised) > 0.75
    assert settled(max(3, advised // 2)) < 0.75


def test_a_transferred_lr_that_diverges_at_the_largest_n_has_infinite_regret_and_is_not_flat() -> None:
    runs = runs_of()
    runs.loc[(runs["loops"] == 8) & (runs["lr"] > 2**-4), "loss"] = math.inf
    verdict = check(runs, transferred_lr=2**-3.5)
    assert (verdict.judged.cause, limits(verdict.judged.regret)) == ("regret", [math.inf] * 3)
    stored = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert stored["rules"]["factored"]["regret"]["estimate"] == "inf"


@pytest.mark.parametrize("drift", [0.0, 0.2, 0.6])
def test_a_flat_floor_gives_neither_answer_and_names_the_lrs_that_serve_at_every_n(drift: float) -> None:
    runs = runs_of(loops=(1, 2, 4))
    u = np.log2(runs["lr"]) + 6.0 - drift * (np.log2(runs["loops"]) - 1)
    noise = np.random.default_rng(0).normal(0, 0.001, len(runs))
    runs["loss"] = 2.0 + 0.1 * np.clip(np.abs(u) - 1.0, 0, None) ** 2 + noise
    verdict = check(runs)
    assert (verdict.answer, verdict.judged.cause) == ("INCONCLUSIVE", "flat bottom")
    assert {optimum.censored for optimum in verdict.judged.optima} == {"flat bottom"}
    assert verdict.judged.with_basin == [1, 2, 4]
    basin = verdict.judged.shared_basin
    assert basin is not None
    assert f"{2**basin.low:.3g} to {2**basin.high:.3g}" in verdict.judged.advice
    further = verdict.judged.further_runs
    assert further is not None
    assert not set(further.lrs) & set(runs["lr"])


@pytest.mark.parametrize("drift", [0.0, -0.6])
def test_a_wall_of_unstable_runs_near_an_optimum_gives_neither_answer_until_it_is_marked(drift: float) -> None:
    runs = runs_of(drift, loops=(1, 2, 4), grid=np.arange(-4.5, 3.1, 0.5))
    wall = runs["lr"] > 2.0**-5.2
    judged = check(runs.assign(loss=runs["loss"].mask(wall, 30.0))).judged
    assert (judged.answer, judged.cause) == ("INCONCLUSIVE", "shape")
    assert "mark runs that went unstable as diverged" in judged.advice
    marked = check(runs.assign(loss=runs["loss"].mask(wall, math.inf)))
    assert marked.answer == ("FLAT" if drift == 0 else "DRIFTS")


def test_a_regret_that_may_reach_the_tolerance_asks_for_the_seeds_at_the_largest_n_that_settle_it() -> None:
    """Draws whose advice is few seeds; with those, most regrets are told."""
    settled = []
    for draw in range(30):
        runs = runs_of(wander=0.1, seeds=3, draw=draw)
        judged = check(runs, transferred_lr=2**-5.85).judged
        if judged.cause != "regret":
            continue
        assert judged.further_runs is not None
        assert judged.further_runs.counts == (8,)
        seeds = 3 + len(judged.further_runs.seeds)
        assert judged.advice == f"run about {seeds} seeds in all at N = 8 (there are 3)"
        more = runs_of(wander=0.1, loops=(8,), seeds=seeds, draw=100 + draw)
        more = more[more["seed"].astype(str).isin(judged.further_runs.seeds)]
        settled.append(check(pd.concat([runs, more]), transferred_lr=2**-5.85).judged.cause != "regret")
    assert len(settled) >= 4
    assert sum(settled) / len(settled) >= 0.6


def test_a_transferred_lr_on_the_rim_of_the_basin_is_no_matter_of_more_seeds() -> None:
    judged = check(runs_of(draw=1), transferred_lr=2 ** (-6.1 + 0.2**0.5)).judged
    assert judged.cause == "regret"
    assert judged.further_runs is None


# -- invariances


@reproducible
@given(octaves=st.integers(-8, 8), draw=st.integers(0, 1000))
def test_scaling_every_lr_changes_nothing(octaves: int, draw: int) -> None:
    runs = runs_of(0.1, draw=draw)
    before, after = check(runs), check(runs.assign(lr=runs["lr"] * 2.0**octaves))
    assert limits(after.rules["factored"].drift) == pytest.approx(limits(before.rules["factored"].drift), abs=1e-8)
    assert limits(after.rules["factored"].regret) == pytest.approx(limits(before.rules["factored"].regret), abs=1e-8)
    assert after.answer == before.answer


@reproducible
@given(draw=st.integers(0, 1000), size=st.floats(0, 2))
def test_a_constant_per_seed_and_loop_count_changes_nothing(draw: int, size: float) -> None:
    runs = runs_of(0.1, draw=draw)
    offsets = np.random.default_rng(draw).uniform(-size, size, (9, 4))
    moved = runs.assign(loss=runs["loss"] + offsets[runs["loops"], runs["seed"]])
    before, after = check(runs), check(moved)
    assert limits(after.rules["factored"].drift) == pytest.approx(limits(before.rules["factored"].drift), abs=1e-8)
    assert limits(after.rules["factored"].regret) == pytest.approx(limits(before.rules["factored"].regret), abs=1e-8)


@reproducible
@given(draw=st.integers(0, 1000))
def test_the_order_of_the_rows_does_not_matter(draw: int) -> None:
    runs = pd.concat([runs_of(0.1, draw=draw), runs_of(0.5, "sqrt", loops=(1, 2, 4), draw=draw + 1)], ignore_index=True)
    shuffled = runs.iloc[np.random.default_rng(draw).permutation(len(runs))]
    before, after = check(runs), check(shuffled)
    for rule in ("factored", "sqrt"):
        assert limits(after.rules[rule].drift) == pytest.approx(limits(before.rules[rule].drift), abs=1e-9)
        assert after.rules[rule].answer == before.rules[rule].answer
    assert limits(after.differences[0].drift) == pytest.approx(limits(before.differences[0].drift), abs=1e-9)


@reproducible
@given(octaves=st.floats(-0.7, 0.7), draw=st.integers(0, 1000))
def test_the_regret_of_an_exact_bowl_is_its_curvature_times_the_squared_distance(octaves: float, draw: int) -> None:
    runs = runs_of(noise=0.0, wander=0.0, curvature=0.4, draw=draw)
    judged = check(runs, transferred_lr=2.0 ** (-6.1 + octaves)).rules["factored"]
    assert limits(judged.regret) == pytest.approx([0.4 * octaves**2] * 3, abs=1e-8)


# -- the transferred LR


def test_the_transferred_lr_is_by_default_the_optimum_of_the_smallest_n() -> None:
    runs = runs_of(0.15, loops=(2, 4, 16))
    default = check(runs)
    smallest = default.rules["factored"].optima[0]
    assert smallest.n == 2
    assert smallest.log2_lr is not None
    given_ = check(runs, transferred_lr=2.0**smallest.log2_lr.estimate)
    assert limits(given_.rules["factored"].regret) == pytest.approx(limits(default.rules["factored"].regret), abs=1e-12)
    other = check(runs, transferred_lr=2.0 ** (smallest.log2_lr.estimate - 0.5))
    assert limits(other.rules["factored"].regret) != pytest.approx(limits(default.rules["factored"].regret), abs=1e-3)


def test_the_transferred_lr_does_not_depend_on_the_order_of_the_loop_counts() -> None:
    runs = runs_of(0.15, loops=(2, 4, 16))
    assert check(runs.iloc[::-1]).rules["factored"].optima[0].n == 2


# -- rules and their differences


@pytest.mark.parametrize(
    ("drift", "rule", "told"), [(0.6, "factored", True), (-0.6, "factored", False), (0.6, "completep", False)]
)
def test_a_best_lr_that_rises_over_layers_is_answered_with_completep(drift: float, rule: str, told: bool) -> None:
    verdict = check(runs_of(drift, rule).rename(columns={"loops": "layers"}), axis="layers")
    assert verdict.answer == "DRIFTS"
    assert any("stays under completep" in note for note in verdict.notes) == told
    both = pd.concat([runs_of(drift, rule), runs_of(rule="completep", draw=1)]).rename(columns={"loops": "layers"})
    others = [check(runs_of(drift, rule)), *([check(both, rule, axis="layers")] if rule != "completep" else [])]
    for verdict in others:
        assert not any("stays under completep" in note for note in verdict.notes)


def shared_shift(shift: float, draw: int = 0) -> pd.DataFrame:
    """Two rules that drift by 0.0 and 0.3, to whose drift every seed adds the same random amount."""
    rng = np.random.default_rng(draw)
    parts = []
    for seed, common in enumerate(rng.normal(0, shift, 5)):
        for rule, drift in (("factored", 0.0), ("sqrt", 0.3)):
            part = runs_of(drift + common, rule, loops=(1, 2, 4), seeds=1, wander=0.01, draw=int(rng.integers(2**32)))
            parts.append(part.assign(seed=seed))
    return pd.concat(parts)


def test_pairing_takes_out_a_random_shift_that_the_seeds_share() -> None:
    verdict = check(shared_shift(0.2))
    difference, judged, control = verdict.differences[0], drift_of(verdict), drift_of(verdict, "sqrt")
    assert difference.drift is not None
    assert difference.drift.estimate == pytest.approx(0.3, abs=0.05)
    assert difference.drift.estimate == pytest.approx(control.estimate - judged.estimate, abs=1e-9)
    width = difference.drift.high - difference.drift.low
    assert width < 0.3 * min(judged.high - judged.low, control.high - control.low)


def test_the_difference_in_regret_is_the_controls_minus_that_of_the_rule_judged() -> None:
    verdict = check(pd.concat([runs_of(0.0, loops=(1, 2, 4)), runs_of(0.5, "sqrt", loops=(1, 2, 4), draw=1)]))
    judged, control = (limits(verdict.rules[rule].regret)[0] for rule in ("factored", "sqrt"))
    estimate, low, _ = limits(verdict.differences[0].regret)
    assert estimate == pytest.approx(control - judged, abs=1e-9)
    assert control == pytest.approx(0.1 * 1.0**2, abs=0.03)
    assert low > 0


def test_the_difference_is_taken_over_the_loop_counts_that_both_rules_have() -> None:
    runs = [runs_of(noise=0.0, wander=0.0), runs_of(0.4, "sqrt", loops=(2, 4), noise=0.0, wander=0.0)]
    difference = check(pd.concat(runs)).differences[0]
    assert limits(difference.drift) == pytest.approx([0.4] * 3, abs=1e-9)
    assert difference.regret is None


def test_a_censored_control_leaves_the_answer_for_the_rule_asked_for() -> None:
    verdict = check(pd.concat([runs_of(), runs_of(0.0, "unscaled", centre=-1.0)]))
    assert [judged.answer for judged in verdict.rules.values()] == ["FLAT", "INCONCLUSIVE"]
    assert (verdict.differences[0].drift, verdict.differences[0].regret) == (None, None)


def test_a_rule_that_is_flat_where_all_its_controls_are_as_flat_has_no_power() -> None:
    runs = [runs_of(), runs_of(rule="sqrt", draw=1)]
    verdict = check(pd.concat(runs))
    assert (verdict.judged.cause, verdict.rules["sqrt"].answer) == ("no power", "FLAT")
    assert verdict.judged.further_runs is not None
    assert verdict.judged.further_runs.counts == (32,)
    assert check(pd.concat([*runs, runs_of(0.5, "unscaled", loops=(1, 2, 4), draw=2)])).answer == "FLAT"


def test_the_rule_judged_is_factored_where_there_are_several_and_else_the_only_one() -> None:
    both = pd.concat([runs_of(rule="sqrt"), runs_of(draw=1)])
    assert [check(both).rule, check(runs_of(rule="sqrt")).rule, check(both, rule="sqrt").rule] == [
        "factored",
        "sqrt",
        "sqrt",
    ]
    for runs, rule in ((runs_of(), "sqrt"), (pd.concat([runs_of(rule="sqrt"), runs_of(rule="unscaled")]), None)):
        with pytest.raises(InputError, match="is not in the table, which has"):
            check(runs, rule=rule)


# -- numbers out of range, and what is written


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["tolerance", "regret_tolerance", "transferred_lr", "confidence"])
def test_a_number_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{name} is {value!r}; it must"):
        check(runs_of(), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"confidence is 90; it must lie between 0 and 1"):
        check(runs_of(), confidence=90)


def test_a_higher_confidence_widens_the_intervals_around_the_same_estimate() -> None:
    low, high = (drift_of(check(runs_of(), confidence=confidence)) for confidence in (0.8, 0.99))
    assert low.estimate == pytest.approx(high.estimate, abs=1e-12)
    assert high.low < low.low < low.high < high.high


@pytest.mark.parametrize("runs", [runs_of(), runs_of(0.6, loops=(1, 2, 4)), runs_of(seeds=1), runs_of(centre=-1.0)])
def test_the_dictionary_is_strict_json_with_a_schema_version_and_no_times(runs: pd.DataFrame) -> None:
    both = pd.concat([runs, runs_of(rule="sqrt", draw=1)])
    texts = [json.dumps(check(both.assign(seconds=seconds)).to_dict(), allow_nan=False) for seconds in (4.5, 99.0)]
    assert texts[0] == texts[1]
    loaded = json.loads(texts[0])
    assert (loaded["schema_version"], list(loaded["rules"])) == (4, ["factored", "sqrt"])
    assert "second" not in texts[0]


def test_the_dictionary_holds_the_numbers_of_the_verdict() -> None:
    verdict = check(runs_of(), transferred_lr=0.015, tolerance=0.3, regret_tolerance=0.1, confidence=0.8)
    stored = verdict.to_dict()
    judged = stored["rules"]["factored"]
    assert (stored["transferred_lr"], stored["tolerance_octaves_per_doubling"]) == (0.015, 0.3)
    assert (stored["regret_tolerance"], stored["confidence"]) == (0.1, 0.8)
    assert list(judged["drift_octaves_per_doubling"].values()) == limits(drift_of(verdict))
    assert [(entry["loops"], entry["seeds"]) for entry in judged["optima"]] == [(n, 4) for n in (1, 2, 4, 8)]


@pytest.mark.parametrize(("column", "values"), [("layers", [8, 4, 2, 1]), ("fingerprint", ["a", "a", "a", "b"])])
def test_what_differs_between_the_rows_beside_n_is_noted(column: str, values: list[object]) -> None:
    runs = runs_of()
    assert check(runs.assign(**{column: values[0]})).notes == ()
    by_n = dict(zip((1, 2, 4, 8), values, strict=True))
    (note,) = check(runs.assign(**{column: runs["loops"].map(by_n)})).notes
    assert column in note


def test_models_of_other_sizes_are_experiments_of_their_own_and_different_ones_of_a_size_are_noted() -> None:
    runs = runs_of().rename(columns={"loops": "layers"})
    assert check(runs.assign(fingerprint=runs["layers"].map("L{}".format)), axis="layers").notes == ()
    mixed = runs.assign(fingerprint=(runs["lr"] > runs["lr"].median()).map(str))
    assert "2 different experiments" in check(mixed, axis="layers").notes[0]


def test_over_layers_the_label_is_l() -> None:
    text = str(check(runs_of(0.59, wander=0.0).rename(columns={"loops": "layers"}), axis="layers"))
    assert "The optimum moves up by 0.59 octave per doubling of L." in text
    assert "at L = 1" in text


def test_the_text_names_answer_reason_and_every_loop_count() -> None:
    lines = str(check(runs_of(0.59, loops=(1, 2, 4), noise=0.0, wander=0.0))).splitlines()
    start = lines.index("factored: DRIFTS. The optimum moves up by 0.59 octave per doubling of N.")
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == ["N", "1", "2", "4"]


def test_the_text_begins_with_the_lr_to_use_what_is_as_good_what_it_loses_and_how_sure_that_is() -> None:
    verdict = check(runs_of(loops=(1, 2, 4)), transferred_lr=0.015)
    use, as_good, loses, sure = verdict.headline
    basin = verdict.judged.shared_basin
    assert basin is not None
    assert use == "Use LR 0.015 at every N from 1 to 4."
    ends = f"from {2**basin.low:.3g} to {2**basin.high:.3g}"
    assert as_good == f"Any LR {ends} is as good: within 0.02 nats of the best at every N."
    assert loses.startswith("LR 0.015 loses 0.0")
    assert sure == "Verdict: FLAT under factored, by 90% intervals over 4 seeds."
    assert str(verdict).splitlines()[:4] == verdict.headline


def test_the_first_sentences_name_no_lr_where_none_is_known_and_say_what_is_not() -> None:
    one_seed = check(runs_of(seeds=1)).headline
    assert one_seed[0] == "It is not settled that one LR serves every N from 1 to 8."
    assert one_seed[1].startswith("At N = 1, 2, 4, 8 there is one seed")
    assert one_seed[2:] == ["Verdict: INCONCLUSIVE under factored, from one seed."]
    moves = check(runs_of(0.59, loops=(1, 2, 4), noise=0.0, wander=0.0)).headline
    assert moves[0].startswith("Do not carry one LR to a larger N: the best one goes from 0.0")
    runs = runs_of(loops=(1, 2, 4))
    cut = check(runs[(runs["loops"] != 4) | (runs["lr"] < 0.01)])
    assert "; at N = 4 that is not known." in cut.headline[2]
    assert cut.headline[3].endswith(" loses at N = 4 is not known.")


def test_the_optima_are_drawn_in_characters_over_the_lrs_that_were_run() -> None:
    lines = str(check(runs_of(0.59, loops=(1, 2, 4), noise=0.0, wander=0.0))).splitlines()
    drawing = [line for line in lines if line.startswith("  N = ")]
    places = [line.index("*") for line in drawing]
    assert [line.split()[2] for line in drawing] == ["1", "2", "4"]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=1)
    assert places[0] < places[1]
    assert not [line for line in str(check(runs_of(seeds=1))).splitlines() if line.startswith("  N = ")]


def test_the_verdict_keeps_the_runs_as_tidied_and_the_table_as_it_was() -> None:
    runs = runs_of()
    before = runs.copy(deep=True)
    verdict = check(runs)
    pd.testing.assert_frame_equal(runs, before)
    pd.testing.assert_frame_equal(verdict.runs, tidy(runs))


def test_the_markdown_holds_the_answer_the_tables_and_the_command() -> None:
    runs = pd.concat([runs_of(seeds=1), runs_of(0.5, "sqrt", loops=(1, 2, 4), draw=1)])
    runs.attrs |= {"source": "results.csv", "grows": "table"}
    verdict = check(runs)
    text = verdict.to_markdown()
    assert text.startswith("It is not settled that one LR serves every N")
    assert "\n### factored: INCONCLUSIVE\n" in text
    assert sum(line.startswith("|---") for line in text.splitlines()) == 3  # two rules and their difference
    assert f"    {verdict.command(verdict.judged)}  # EXPERIMENT" in text


@reproducible
@given(rule=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda text: text.strip()))
def test_no_name_breaks_a_table_or_enters_the_page_as_html(rule: str) -> None:
    text = check(runs_of(rule=rule, loops=(1, 2), seeds=2)).to_markdown()
    assert "<" not in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in tables}) == 1


# -- other axes, metrics, curves over steps


def test_any_axis_may_play_the_part_of_n() -> None:
    runs = runs_of(0.6, loops=(1, 2, 4))
    by_width, by_loops = check(runs.rename(columns={"loops": "width"}), axis="width"), check(runs)
    assert limits(by_width.judged.drift) == limits(by_loops.judged.drift)
    assert by_width.judged.reason == by_loops.judged.reason.replace(" N.", " width.")
    assert "\n  width  seeds" in str(by_width)
    assert [entry["width"] for entry in by_width.to_dict()["rules"]["factored"]["optima"]] == [1, 2, 4]
    assert by_width.command(by_width.judged) is None
    for axis in ("lr", "loss", "seed", "rule", "step"):
        with pytest.raises(InputError, match=rf"axis is '{axis}'; it must be a column such as loops"):
            check(runs, axis=axis)


def test_a_metric_of_which_more_is_better_is_judged_as_its_negative_as_a_loss() -> None:
    runs = runs_of(0.1)
    runs.loc[runs["lr"] > 2.0**-3.5, "loss"] = math.nan
    loss, metric = check(runs), check(runs.assign(loss=-runs["loss"]), maximize=True)
    assert limits(loss.judged.drift) == pytest.approx(limits(metric.judged.drift), abs=1e-9)
    assert loss.judged.optima[0].diverges
    assert metric.judged.optima[0].diverges
    assert (loss.unit, metric.unit) == ("nats", "of the metric")


def over_steps(moves: float) -> pd.DataFrame:
    """Curves over 100 steps whose optimum lies `moves` octaves lower at half of them; at the end it is at −6.1."""
    ends = runs_of(noise=0.0, wander=0.02)
    x = np.log2(ends["lr"])
    early = ends.assign(loss=3.0 + 0.1 * (x + 6.1 + moves) ** 2)
    middle = ends.assign(loss=2.5 + 0.1 * (x + 6.1 + moves / 2) ** 2)
    return pd.concat([part.assign(step=step) for part, step in ((early, 50), (middle, 75), (ends, 100))])


def test_curves_over_steps_are_judged_at_their_end_and_show_where_the_optimum_was() -> None:
    verdict = check(over_steps(0.0))
    assert limits(verdict.judged.drift) == limits(check(over_steps(0.0).query("step == 100")).judged.drift)
    assert set(verdict.judged.horizons) == {0.5, 0.75, 1.0}
    assert verdict.notes == ()
    assert "at 50%" in str(verdict)


def test_an_optimum_that_still_moves_over_the_last_half_is_noted() -> None:
    verdict = check(over_steps(0.5))
    assert len(verdict.notes) == 4
    halfway = verdict.judged.horizons[0.5][0].log2_lr
    assert halfway is not None
    assert halfway.estimate == pytest.approx(-6.6, abs=0.05)


def test_a_run_that_diverged_late_is_whole_at_half_the_training_and_diverged_at_its_end() -> None:
    runs = over_steps(0.0)
    runs.loc[(runs["lr"] > 2.0**-4) & (runs["step"] > 50), "loss"] = math.nan
    judged = check(runs).judged
    assert (judged.optima[0].diverges, judged.horizons[0.5][0].diverges) == (True, False)


# -- units of the loss


def scaled(runs: pd.DataFrame, by: float, shift: float = 0.0) -> pd.DataFrame:
    return runs.assign(loss=by * runs["loss"] + shift)


def test_the_curves_height_is_what_leaving_the_best_lr_by_two_and_a_half_octaves_costs() -> None:
    exact = curve(tidy(runs_of(loops=(1,), centre=-6.0, noise=0.0, wander=0.0)))
    assert curve_height(exact) == pytest.approx(0.1 * 2.5**2, rel=0.05)
    assert curve_height(exact[np.abs(exact.index + 6.0) < 1.6]) == pytest.approx(0.1 * 2.5**2, rel=0.05)
    lopsided = exact.assign(**{"0": np.where(exact.index > -6.0, 30.0, exact["0"])})
    assert curve_height(lopsided[["0"]]) == pytest.approx(0.1 * 2.5**2, rel=0.05)  # a wall is no height
    assert curve_height(exact.iloc[:1]) is None
    assert curve_height(exact * 0) is None


@reproducible
@given(power=st.integers(-12, 12), shift=st.floats(-5, 5), draw=st.integers(0, 1000))
def test_a_metric_of_another_unit_is_judged_alike_however_it_is_scaled_and_shifted(
    power: int, shift: float, draw: int
) -> None:
    runs = runs_of(0.1, draw=draw)
    before, after = check(runs, unit="points"), check(scaled(runs, 2.0**power, shift), unit="points")
    assert after.regret_tolerance == pytest.approx(before.regret_tolerance * 2.0**power, rel=1e-6)
    assert limits(after.judged.drift) == pytest.approx(limits(before.judged.drift), abs=1e-6)
    assert (after.answer, after.judged.cause) == (before.answer, before.judged.cause)


def test_a_curve_lower_than_the_tolerance_in_nats_is_not_in_nats() -> None:
    nats, small = check(runs_of()), check(scaled(runs_of(), 1e-3))
    assert (nats.unit, nats.regret_tolerance) == ("nats", 0.02)
    assert small.unit == "of the loss"
    assert small.judged.height is not None
    assert small.regret_tolerance == pytest.approx(0.05 * small.judged.height)
    assert (nats.answer, small.answer) == ("FLAT", "FLAT")
    assert "nats" not in str(small) + small.to_markdown() + json.dumps(small.to_dict())
    assert re.search(r"regret \+0\.0000\d* .* \(tolerance [23]\.\d+e-05, 5 % of the curve's height\)", str(small))


@pytest.mark.parametrize("best", [1e-9, 7e-4, 7e-3, 0.03, 0.15])
def test_an_lr_with_three_times_the_best_loss_is_never_said_to_lose_nothing(best: float) -> None:
    runs = runs_of(noise=0.0, wander=0.01).assign(loss=lambda t: best * (1 + 0.5 * (np.log2(t["lr"]) + 6.1) ** 2))
    runs["loss"] *= 1 + np.random.default_rng(0).normal(0, 1e-3, len(runs))
    assert check(runs).unit == "of the loss"
    assert check(runs, transferred_lr=2.0**-4.1).answer == "INCONCLUSIVE"
    if best < 0.005:  # the whole curve is lower than 0.02, whoever asks for it
        assert check(runs, transferred_lr=2.0**-4.1, regret_tolerance=0.02).answer == "INCONCLUSIVE"
        assert check(runs, transferred_lr=2.0**-4.1, unit="nats").answer == "INCONCLUSIVE"
    assert check(runs).answer == "FLAT"
    blind = check(runs, regret_tolerance=4 * best).judged
    assert (blind.answer, blind.cause) == ("INCONCLUSIVE", "tolerance")


def test_a_unit_that_is_given_is_kept_and_nats_keep_their_tolerance() -> None:
    assert check(runs_of(), unit="bits").unit == "bits"
    assert check(scaled(runs_of(), 0.05), unit="nats").regret_tolerance == 0.02
    named = runs_of()
    named.attrs["unit"] = "of best_mse"
    assert check(named).unit == "of best_mse"
    assert check(named, unit="nats").regret_tolerance == 0.02


def test_a_study_that_is_maximized_is_and_one_that_is_minimized_is_not_turned_round() -> None:
    runs = scaled(runs_of(), -1)
    runs.attrs["maximize"] = True
    assert check(runs).answer == check(runs, maximize=True).answer == "FLAT"
    runs.attrs["maximize"] = False
    with pytest.raises(InputError, match="minimizes its value; leave out --maximize"):
        check(runs, maximize=True)


# -- tables in which hardly anything is shared


def test_lrs_that_no_two_seeds_share_are_said_to_be_so() -> None:
    runs = runs_of(loops=(1, 4), seeds=2)
    apart = runs.assign(lr=runs["lr"] * (1 + 1e-2 * runs["seed"]))
    judged = check(apart).judged
    assert (judged.answer, judged.cause, judged.further_runs) == ("INCONCLUSIVE", "too few LRs", None)
    assert judged.reason == "At N = 1, 4 no LR was run by every seed."
    assert "write one LR alike" in judged.advice
    some = check(apart.assign(lr=apart["lr"].where(apart["loops"] == 4, runs["lr"]))).judged
    assert some.reason == "At N = 4 no LR was run by every seed."


@reproducible
@given(st.integers(0, 10_000))
def test_no_table_however_odd_is_an_error_of_ours(draw: int) -> None:
    rng = np.random.default_rng(draw)
    lrs = rng.choice([0.01 * (1 + 3e-6 * np.arange(5)), np.exp(rng.uniform(-60, 60, 5)), 2.0 ** np.arange(-9.0, -4.0)])
    losses = [lambda u: 2.0, lambda u: 1e90 * rng.random(), lambda u: rng.normal(), lambda u: 1e-30 * u * u]
    loss = losses[draw % len(losses)]
    rows = [
        (n, lr, seed, math.inf if rng.random() < 0.1 else loss(math.log2(lr) + 6))
        for n in (1, 3, 10**6)
        for seed in range(1 + draw % 3)
        for lr in lrs[: 1 + draw % 5]
        if rng.random() < 0.9
    ]
    try:
        verdict = check(pd.DataFrame(rows, columns=["loops", "lr", "seed", "loss"]))
    except InputError:
        return
    assert json.dumps(verdict.to_dict(), allow_nan=False)
    assert str(verdict)
    assert verdict.to_markdown()
    assert verdict.rows_to_run() is not None


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(InputError, match=r"results is 'results\.csv', no table of runs; read one with"):
        check("results.csv")  # type: ignore[arg-type]


# -- what a table may hide


def test_an_optimum_that_is_off_at_one_n_alone_is_not_flat() -> None:
    runs = runs_of()
    off = runs.assign(lr=runs["lr"].mask(runs["loops"] == 4, runs["lr"] * 2))
    verdict = check(off)
    judged = verdict.judged
    assert (judged.answer, judged.cause, judged.loses_at) == ("INCONCLUSIVE", "regret", (4,))
    assert judged.reason.startswith("The optimum has no trend, but at N = 4 the transferred LR costs more")
    assert re.fullmatch(r"Do not carry LR \S+ to N = 4\.", verdict.headline[0])
    assert check(runs).judged.loses_at == ()


@pytest.mark.parametrize("last", [[997, 1000, 998, 999], [1000, 1000, 1000, 980]])
def test_last_steps_that_differ_are_no_curves(last: list[int]) -> None:
    runs = runs_of()
    verdict = check(runs.assign(step=runs["loops"].map(dict(zip((1, 2, 4, 8), last, strict=True)))))
    assert verdict.answer == "FLAT"
    assert verdict.judged.horizons == {}
    assert verdict.to_dict()["rules"]["factored"]["optima"][0]["earlier_log2_lr"] == {}


def test_an_n_without_rows_at_half_the_training_has_no_horizons() -> None:
    runs = runs_of()
    steps = pd.concat([runs.assign(step=step) for step in (100, 200)], ignore_index=True)
    verdict = check(steps[(steps["loops"] > 1) | (steps["step"] == 200)])
    assert verdict.answer == "FLAT"
    assert str(verdict)
    assert not any("still moved" in note for note in verdict.notes)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (lambda runs: runs["loops"] * 16, "batch differs between the rows, so a drift in N may be a drift in batch"),
        (lambda runs: runs["loops"].map(lambda n: f"text-{n > 2}"), "batch differs between the rows"),
        (lambda runs: 32 + 96 * (runs["lr"] > 2.0**-6), "batch differs between the LRs of N = 1"),
        (lambda runs: runs["seed"] * 10, None),
        (lambda runs: runs["loss"] * 2, None),
        (lambda runs: runs["lr"] > 2.0**-6, None),
    ],
)
def test_a_setting_that_differs_is_told(column: Callable[[pd.DataFrame], pd.Series], told: str | None) -> None:
    runs = runs_of()
    notes = check(runs.assign(batch=column(runs))).notes
    assert any(note.startswith(told) for note in notes) if told else notes == ()


def test_seeds_and_n_with_the_very_same_losses_are_told() -> None:
    runs = runs_of()
    seeds = check(runs.assign(loss=runs.groupby(["loops", "lr"])["loss"].transform("first"))).notes
    assert seeds[0].startswith("seed 0 and 1, 1 and 2, 2 and 3 have the same losses to the last digit")
    counts = check(runs.assign(loss=runs.groupby(["seed", "lr"])["loss"].transform("first"))).notes
    assert counts == ("N 1 and 2, 2 and 4, 4 and 8 have the same losses to the last digit: N may not have reached the "
                      "training",)  # fmt: skip
    assert check(runs).notes == ()


def test_a_metric_that_seems_turned_round_is_told() -> None:
    runs = runs_of()
    assert check(runs).notes == check(runs.assign(loss=-runs["loss"]), maximize=True).notes == ()
    (told,) = check(runs, maximize=True).notes
    assert told == "at every N the worst LR lies between better ones; leave out --maximize where less is better"
    (told,) = check(runs.assign(loss=-runs["loss"])).notes
    assert told.endswith("say --maximize where more is better")


def test_lrs_that_seem_to_be_logarithms_are_told() -> None:
    runs = runs_of(grid=np.arange(-3.0, 4.0))
    notes = check(runs.assign(lr=-np.log2(runs["lr"]))).notes
    assert "the LRs are 3, 4, … 9, evenly spaced: are they logarithms of the LR?" in notes
    assert check(runs).notes == ()
