import json
import math
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from looptransfer.errors import FailedRunError, InputError
from looptransfer.transfer.check import check
from looptransfer.transfer.results import COLUMNS, tidy
from looptransfer.transfer.sources import read_results
from looptransfer.trials.ledger import Ledger
from looptransfer.trials.run import Run
from looptransfer.trials.search import ProxyOptimum
from looptransfer.trials.sweep import OCTAVES, TunedLR, join, read_tuned, sweep, tune
from tests.experiments import CHANGES, tiny_experiment

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


def test_a_control_that_is_swept_later_takes_what_it_shares_from_the_ledger(tmp_path: Path) -> None:
    swept(tmp_path, [1, 2])
    before = made(tmp_path)
    controls = swept(tmp_path, [1, 2], rules=("sqrt", "unscaled"), seeds=1)
    assert set(made(tmp_path)) - set(before) == {run for run in runs_of(controls) if run.loops == 2}


def test_runs_of_rules_whose_multipliers_agree_and_whose_lrs_do_not_are_made_apart(tmp_path: Path) -> None:
    experiment = tiny_experiment(**SHORT, base_layers=2)  # at L = 1 and N = 2 both have ε = 1, and LRs × √2 and × 1
    options: dict[str, Any] = {"around": LR, "seeds": 1, "octaves": (0.0,), "workers": 1}
    results = sweep(experiment, [2], rules=("sqrt", "completep"), ledger=tmp_path / "ledger.db", **options)
    assert made(tmp_path) == sorted(runs_of(results))
    assert results["loss"].nunique() == 2


def test_completep_shares_the_runs_of_factored_at_the_base_depth(tmp_path: Path) -> None:
    results = swept(tmp_path, rules=("factored", "completep"), octaves=(0.0,))
    assert {run.rule for run in made(tmp_path)} == {"factored"}
    losses = results.pivot(index=["loops", "seed"], columns="rule", values="loss")
    assert losses["completep"].equals(losses["factored"].rename("completep"))


def test_the_ledger_the_table_and_the_frame_give_one_answer(tmp_path: Path) -> None:
    options: dict[str, Any] = {"octaves": (-3.0, -1.5, 0.0, 1.5, 3.0), "lrs": None}
    frame = pd.concat(
        [
            swept(tmp_path, [1, 2, 4], seeds=3, **options),
            swept(tmp_path, [1, 4], rules=("sqrt", "unscaled"), seeds=2, **options),
        ]
    )
    tune(tiny_experiment(**SHORT), 1, seeds=2, ledger=tmp_path / "ledger.db", workers=1)  # is no part of the sweep
    frame.to_csv(tmp_path / "results.csv", index=False)
    sources = (frame, read_results(tmp_path / "ledger.db"), read_results(tmp_path / "results.csv"))
    answers = [check(source).to_dict() for source in sources]
    for answer in answers:
        for rule in answer["rules"].values():
            del rule["command"]  # which names the file that it would add to
    assert set(answers[0]["rules"]) == {"factored", "sqrt", "unscaled"}
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]


def test_a_ledger_whose_sweep_is_not_finished_says_how_many_runs_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FailedRunError) as told:
        sweep(
            tiny_experiment(2, **SHORT),
            [1, 2],
            LR,
            ("factored", "sqrt"),
            3,
            (-1.0, 0.0, 1.0),
            tmp_path / "ledger.db",
            workers=1,
        )
    assert told.value.finished is not None
    runs = read_results(tmp_path / "ledger.db")
    assert runs.attrs["left_out"] == "12 of 36 runs that were asked for are not finished"
    pd.testing.assert_frame_equal(
        tidy(told.value.finished)[["rule", "loops", "lr", "seed", "loss"]],
        runs[["rule", "loops", "lr", "seed", "loss"]],
        check_dtype=False,
    )


@pytest.mark.parametrize("name", CHANGES)
def test_a_ledger_is_refused_after_a_change_that_no_setting_says(tmp_path: Path, name: str) -> None:
    swept(tmp_path, [2], seeds=1, octaves=(0.0,))
    before = made(tmp_path)
    for loops, seeds in (([2], 1), ([4], [7])):
        with pytest.raises(InputError, match="holds another experiment"):
            sweep(
                tiny_experiment(**SHORT, **CHANGES[name]),
                loops,
                LR,
                seeds=seeds,
                octaves=(0.0,),
                ledger=tmp_path / "ledger.db",
                workers=1,
            )
    with pytest.raises(InputError, match="holds another experiment"):
        tune(tiny_experiment(**SHORT, **CHANGES[name]), 1, seeds=2, ledger=tmp_path / "ledger.db", workers=1)
    assert made(tmp_path) == before


# -- join


def test_who_joins_makes_what_was_asked_for_and_is_left(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    with pytest.raises(FailedRunError):
        sweep(tiny_experiment(2, **SHORT), [1, 2], LR, seeds=3, octaves=(0.0,), ledger=ledger, workers=1)
    assert len(made(tmp_path)) == 4
    assert join(tiny_experiment(**SHORT), ledger, "sweep", workers=1) == 6
    assert join(tiny_experiment(**SHORT), ledger, "sweep", workers=1) == 6
    assert len(made(tmp_path)) == 6


def test_who_joins_with_another_experiment_is_refused(tmp_path: Path) -> None:
    swept(tmp_path, [2], seeds=1, octaves=(0.0,))
    with pytest.raises(InputError, match="holds another experiment"):
        join(tiny_experiment(**SHORT, **CHANGES["another loss"]), tmp_path / "ledger.db", "sweep", workers=1)
    Ledger(tmp_path / "ledger.db", "empty")
    with pytest.raises(InputError, match="was not begun by tune or sweep"):
        join(tiny_experiment(**SHORT), tmp_path / "ledger.db", "empty", workers=1)


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
    tuned = TunedLR(ProxyOptimum(0.02, 2.0, 0.01, (-6.0, -5.0)), 1, pd.DataFrame())
    results = swept(tmp_path, [1], around=tuned, seeds=1, octaves=(-1.0, 0.0))
    assert results["lr"].tolist() == [0.01, 0.02]


def test_lrs_may_be_given_as_they_are(tmp_path: Path) -> None:
    results = swept(tmp_path, [1], around=None, lrs=[0.02, 0.01, 1], seeds=1)
    assert results["lr"].tolist() == [0.01, 0.02, 1.0]


def test_known_runs_are_neither_made_nor_returned_and_their_lr_is_taken_over(tmp_path: Path) -> None:
    known = [Run("factored", 1, 0.01, 0), Run("factored", 2, 0.01, 1)]
    results = swept(tmp_path, [1, 2], around=0.01 * (1 + 1e-8), octaves=(0.0, 1.0), known=known)
    missing = [(1, 0.01, 1), (2, 0.01, 0)]
    assert [(run.loops, run.lr, run.seed) for run in runs_of(results) if run.lr < 0.015] == missing
    assert made(tmp_path) == runs_of(results)
    assert len(results) == 6


def test_nothing_is_made_where_everything_is_known(tmp_path: Path) -> None:
    results = swept(tmp_path, [1], octaves=(0.0,), seeds=1, known=[Run("factored", 1, LR, 0)])
    assert results.empty
    assert list(results.columns) == COLUMNS


def test_a_run_that_a_known_one_shares_is_taken_from_the_ledger(tmp_path: Path) -> None:
    first = swept(tmp_path, [1], octaves=(0.0,))
    swept(tmp_path, [1], rules=("factored", "unscaled"), octaves=(0.0,), known=runs_of(first))
    assert made(tmp_path) == runs_of(first)


def test_a_diverged_run_stays_in_the_table(tmp_path: Path) -> None:
    experiment = tiny_experiment()
    results = sweep(experiment, [1], 1e4, seeds=1, octaves=(-18.0, 0.0), ledger=tmp_path / "ledger.db", workers=1)
    assert results["diverged"].tolist() == [False, True]
    assert results["loss"].tolist()[1] == math.inf


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loops": [0]}, r"loops is \[0\]; give whole numbers from 1 up, each once, such as"),
        ({"loops": [1, -2]}, r"loops is \[1, -2\];"),
        ({"loops": [1, 2.5]}, r"loops is \[1, 2.5\];"),
        ({"loops": []}, r"loops is \[\];"),
        ({"seeds": 0}, r"seeds is 0; give 1 or more, each once, such as 3 or"),
        ({"seeds": -1}, "seeds is -1;"),
        ({"seeds": []}, r"seeds is \[\];"),
        ({"seeds": [3, 4, 3]}, r"seeds is \[3, 4, 3\];.*each once"),
        ({"around": 0.0}, "around is 0.0; the LR must be a finite number above 0"),
        ({"around": -0.01}, "around is -0.01;"),
        ({"around": math.inf}, "around is inf;"),
        ({"around": math.nan}, "around is nan;"),
        ({"around": None}, "give either around"),
        ({"lrs": [0.1]}, "give either around"),
        ({"around": None, "lrs": []}, r"lrs is \[\]; give finite LRs above 0"),
        ({"around": None, "lrs": [0.1, 0.1]}, "lrs is .* each once"),
        ({"around": None, "lrs": [0.1, 0.0]}, "lrs is"),
        ({"around": None, "lrs": [0.1, math.inf]}, "lrs is"),
        ({"around": None, "lrs": [math.nan]}, "lrs is"),
        ({"octaves": [0.0, math.nan]}, "octaves is"),
        ({"octaves": [5000.0]}, "octaves is"),
        ({"workers": 0}, "workers is 0; it must be a whole number from 1 up"),
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


# -- tune


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loops": 0}, "loops is 0; it must be a whole number from 1 up"),
        ({"loops": -1}, "loops is -1;"),
        ({"seeds": 1}, "seeds is 1; give 2 or more"),
        ({"seeds": [4]}, r"seeds is \[4\]; give 2 or more"),
        ({"seeds": [4, 4]}, r"seeds is \[4, 4\];"),
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
    nearest = min(mean.index, key=lambda lr: abs(math.log2(lr / tuned.lr)))
    assert mean.loc[nearest, "mean"] <= mean["mean"].median()
    assert mean.index[0] < tuned.lr < mean.index[-1]
    assert tuned.loops == 1
    assert f"{tuned.lr:.4g}" in str(tuned)
    again = tune(tiny_experiment(), 1, seeds=2, ledger=tmp_path / "ledger.db", workers=1)
    assert again.lr == tuned.lr
    pd.testing.assert_frame_equal(again.results, tuned.results, check_exact=True)


def tuned_lr(regret: float = 0.01, **changes: Any) -> TunedLR:
    optimum = ProxyOptimum(2.0**-5, 4.0, regret, (-6.0, -4.0))
    results = pd.DataFrame({"seed": [3, 3, 1]})
    return TunedLR(**{"loops": 2, "optimum": optimum, "results": results, "rule": "sqrt"} | changes)


def test_a_tuned_lr_as_json_holds_what_was_found_and_how_and_is_read_back(tmp_path: Path) -> None:
    identity = tiny_experiment().identity()
    found = tuned_lr(experiment=identity).to_dict()
    assert (found["log2_lr"], found["loss"], found["regret"]) == ((-6.0, -4.0), 4.0, 0.01)
    assert (found["lr"], found["loops"], found["rule"], found["seeds"]) == (2.0**-5, 2, "sqrt", [1, 3])
    path = tmp_path / "best.json"
    path.write_text(json.dumps(found))
    assert read_tuned(path) == json.loads(path.read_text())
    assert read_tuned(path)["experiment"] == identity


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read .*best.json: No such file"),
        ("", "is not JSON"),
        ("lr,loops", "is not JSON"),
        ("[1]", "holds no tuned LR"),
        ('{"schema_version": 1, "transferred_lr": 0.1}', "holds no tuned LR"),
        ('{"schema_version": 1, "lr": 1, "loops": 1, "experiment": {}}', "has schema_version 1, not 2; tune again"),
        ('{"schema_version": 2, "lr": "1", "loops": 1, "experiment": {}}', "holds the LR '1' and is damaged"),
        ('{"schema_version": 2, "lr": -1, "loops": 1, "experiment": {}}', "holds the LR -1 and is damaged"),
        ('{"schema_version": 2, "lr": NaN, "loops": 1, "experiment": {}}', "holds the LR nan and is damaged"),
        ('{"schema_version": 2, "lr": 1, "loops": 1, "experiment": 3}', "is damaged"),
    ],
)
def test_a_file_that_holds_no_tuned_lr_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "best.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_tuned(path)


def test_a_tuned_lr_says_its_regret_and_where_more_was_asked_for() -> None:
    said = "best LR at N = 2: 0.03125 [0.01562, 0.0625]; it loses at most 0.25 % of the loss to the best, by 3 runs"
    assert str(tuned_lr()) == said
    more = "0.1 % was asked for: runs of equal LR differ too much, or every LR is as good"
    assert str(tuned_lr(asked=0.001)) == f"{said}; {more}"


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
