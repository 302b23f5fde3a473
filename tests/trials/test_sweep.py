import math
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from optuna.trial import TrialState

from looptransfer.errors import InputError
from looptransfer.transfer.optimum import Interval, Optimum
from looptransfer.transfer.results import COLUMNS, tidy
from looptransfer.trials.sweep import OCTAVES, TunedLR, sweep, trial_plan, tune
from looptransfer.trials.trial import Run
from tests.experiments import tiny_experiment

SHORT: dict[str, Any] = {"steps": 6}
LR = 2.0**-4


def swept(folder: Path, loops: Any = (1, 2), **changes: Any) -> pd.DataFrame:
    arguments: dict[str, Any] = {"around": LR, "seeds": 2, "octaves": (-1.0, 0.0, 1.0), "workers": 1}
    arguments |= {"ledger": folder / "ledger.db"} | changes
    return sweep(tiny_experiment(**SHORT), loops, **arguments)


def made(folder: Path) -> list[Run]:
    stored = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'ledger.db'}")
    return sorted(Run(**t.user_attrs["run"]) for t in stored.get_trials(states=(TrialState.COMPLETE,)))


def runs_of(frame: pd.DataFrame) -> list[Run]:
    return [Run(*row) for row in frame[["rule", "loops", "lr", "seed"]].itertuples(index=False, name=None)]


# -- sweep


def test_a_sweep_has_one_row_per_rule_loop_count_lr_and_seed_in_order(tmp_path: Path) -> None:
    results = swept(tmp_path, rules=("factored", "sqrt"), octaves=(-1.0, 1.0))
    expected = [
        Run(rule, loops, LR * 2.0**octave, seed)  # type: ignore[arg-type]
        for rule in ("factored", "sqrt")
        for loops in (1, 2)
        for octave in (-1, 1)
        for seed in (0, 1)
    ]
    assert list(results.columns) == COLUMNS
    assert runs_of(results) == expected
    assert set(results["layers"]) == {1}
    assert set(results["width"]) == {8}
    assert len(tidy(results)) == len(expected)


def test_runs_at_one_loop_are_made_once_for_all_rules_and_stand_under_each(tmp_path: Path) -> None:
    results = swept(tmp_path, rules=("factored", "sqrt", "unscaled"), octaves=(0.0,))
    assert [run.rule for run in made(tmp_path) if run.loops == 1] == ["factored"] * 2
    assert len([run for run in made(tmp_path) if run.loops == 2]) == 3 * 2
    by_rule = {rule: rows.set_index(["loops", "lr", "seed"])["loss"] for rule, rows in results.groupby("rule")}
    for control in ("sqrt", "unscaled"):
        assert (by_rule[control].loc[1] == by_rule["factored"].loc[1]).all()
        assert (by_rule[control].loc[2] != by_rule["factored"].loc[2]).all()


def test_rules_that_differ_at_one_loop_are_each_run_there(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    experiment = tiny_experiment(**SHORT, base_layers=4)
    sweep(experiment, [1], LR, ("factored", "unscaled"), 1, (0.0,), ledger, workers=1)
    assert [run.rule for run in made(tmp_path)] == ["factored", "unscaled"]


def test_a_mapping_gives_every_rule_its_own_loop_counts(tmp_path: Path) -> None:
    results = swept(tmp_path, {"factored": [1, 2], "unscaled": [2]}, seeds=1, octaves=(0.0,))
    assert runs_of(results) == [Run("factored", 1, LR, 0), Run("factored", 2, LR, 0), Run("unscaled", 2, LR, 0)]


def test_seeds_and_octaves_are_taken_as_listed(tmp_path: Path) -> None:
    results = swept(tmp_path, [1], seeds=[11, 5], octaves=(0.0,))
    assert results["seed"].tolist() == [5, 11]
    assert results["lr"].tolist() == [LR, LR]


def test_a_wider_sweep_over_the_same_ledger_makes_only_what_is_missing(tmp_path: Path) -> None:
    first = swept(tmp_path, [1], seeds=1, octaves=(0.0, 1.0))
    second = swept(tmp_path, [1], seeds=2, octaves=(0.0, 1.0))
    assert len(made(tmp_path)) == 4
    pd.testing.assert_frame_equal(second[second["seed"] == 0].reset_index(drop=True), first, check_exact=True)


def test_a_narrower_sweep_over_the_same_ledger_leaves_out_the_rest(tmp_path: Path) -> None:
    swept(tmp_path, [1, 2], seeds=2, octaves=(0.0,))
    assert len(swept(tmp_path, [1], seeds=1, octaves=(0.0,))) == 1


def test_a_tuned_lr_is_the_centre_of_the_sweep(tmp_path: Path) -> None:
    tuned = TunedLR(0.02, 1, Optimum(1, "plateau"), pd.DataFrame())
    results = swept(tmp_path, [1], around=tuned, seeds=1, octaves=(-1.0, 0.0))
    assert results["lr"].tolist() == [0.01, 0.02]


def test_a_diverged_run_stays_in_the_table(tmp_path: Path) -> None:
    experiment = tiny_experiment()
    results = sweep(experiment, [1], 1e4, seeds=1, octaves=(-18.0, 0.0), ledger=tmp_path / "ledger.db", workers=1)
    assert results["diverged"].tolist() == [False, True]
    assert results["loss"].tolist()[1] == math.inf


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loops": [0]}, "loops is 0; loop counts are whole numbers from 1 up"),
        ({"loops": [1, -2]}, "loops is -2;"),
        ({"loops": [1, 2.5]}, "loops is 2.5;"),
        ({"loops": []}, r"loops is \[\];"),
        ({"seeds": 0}, "seeds is 0; give a count from 1 up"),
        ({"seeds": -1}, "seeds is -1;"),
        ({"seeds": []}, r"seeds is \[\];"),
        ({"seeds": [3, 4, 3]}, r"seeds is \[3, 4, 3\];.*all differ"),
        ({"around": 0.0}, "around is 0.0; the LR must be a finite number above 0"),
        ({"around": -0.01}, "around is -0.01;"),
        ({"around": math.inf}, "around is inf;"),
        ({"around": math.nan}, "around is nan;"),
        ({"workers": 0}, "workers is 0; it must be 1 or more"),
        ({"rules": ("factored", "cube")}, "cube"),
    ],
)
def test_a_sweep_refuses_bad_input_and_names_it(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        swept(tmp_path, **changes)


def test_the_default_octaves_reach_further_down_than_up_and_hold_the_centre() -> None:
    assert list(OCTAVES) == sorted(OCTAVES)
    assert 0.0 in OCTAVES
    assert min(OCTAVES) <= -2
    assert max(OCTAVES) >= 1


def test_trying_the_plan_leaves_the_random_state_and_counts_loops_and_layers() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    plan = trial_plan(tiny_experiment(), 4, "factored")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert plan.layers == 1
    assert [branch.multiplier for branch in plan.branches] == [0.25]


# -- tune


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loops": 0}, "loops is 0; loop counts are whole numbers from 1 up"),
        ({"loops": -1}, "loops is -1;"),
        ({"seeds": 1}, "seeds is 1; give two or more"),
        ({"seeds": [4]}, r"seeds is \[4\]; give two or more"),
        ({"seeds": [4, 4]}, r"seeds is \[4, 4\];.*all differ"),
        ({"seeds": 0}, "seeds is 0;"),
        ({"workers": 0}, "workers is 0;"),
        ({"rule": "cube"}, "cube"),
    ],
)
def test_tuning_refuses_bad_input_and_names_it(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"loops": 1, "seeds": 2, "ledger": tmp_path / "ledger.db", "workers": 1} | changes
    with pytest.raises(InputError, match=said):
        tune(tiny_experiment(**SHORT), **arguments)


@pytest.mark.slow
def test_tuning_finds_an_lr_no_worse_than_its_neighbours_and_says_so(tmp_path: Path) -> None:
    tuned = tune(tiny_experiment(), 1, seeds=2, ledger=tmp_path / "ledger.db", workers=1)
    mean = tuned.results.groupby("lr")["loss"].agg(["mean", "count"])
    complete = mean[mean["count"] == 2]["mean"]
    nearest = min(complete.index, key=lambda lr: abs(math.log2(lr / tuned.lr)))
    assert complete[nearest] <= complete.median()
    assert complete.index[0] < tuned.lr < complete.index[-1]
    assert tuned.loops == 1
    assert f"{tuned.lr:.4g}" in str(tuned)
    again = tune(tiny_experiment(), 1, seeds=2, ledger=tmp_path / "ledger.db", workers=1)
    assert again.lr == tuned.lr
    pd.testing.assert_frame_equal(again.results, tuned.results, check_exact=True)


def test_a_tuned_lr_says_its_interval_or_why_there_is_none() -> None:
    fitted = Optimum(2, None, Interval(-5.0, -6.0, -4.0))
    assert str(TunedLR(2**-5, 2, fitted, pd.DataFrame())) == "best LR at N = 2: 0.03125 [0.01562, 0.0625]"
    hidden = TunedLR(0.5, 2, Optimum(2, "high edge"), pd.DataFrame())
    assert str(hidden) == "best LR run at N = 2: 0.5 (no fitted optimum: high edge)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loops": [1, 1]}, "loops is"),
        ({"octaves": []}, "octaves is"),
        ({"octaves": [0.0, 0.0]}, "octaves is"),
        ({"rules": ()}, "rules is empty"),
    ],
)
def test_empty_or_repeated_arguments_of_a_sweep_are_refused(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sweep(tiny_experiment(), **{"loops": [1], "around": 0.01, "ledger": tmp_path / "ledger.db", **arguments})
