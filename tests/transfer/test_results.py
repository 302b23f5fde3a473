import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.errors import InputError
from looptransfer.transfer.provenance import fingerprint
from looptransfer.transfer.results import at_horizon, tidy
from looptransfer.transfer.sources import read_results


def table(**changes: list[Any]) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {
        "rule": ["factored", "factored", "sqrt"],
        "loops": [1, 2, 2],
        "lr": [0.01, 0.01, 0.01],
        "seed": [3, 3, 3],
        "loss": [2.0, 1.5, 1.25],
    }
    return pd.DataFrame(columns | changes)


def csv_file(folder: Path, text: str) -> Path:
    path = folder / "results.csv"
    path.write_text(text, encoding="utf-8")
    return path


# -- refusals; those of whole files are in tests/bad_tables.py


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": [0.01, "big", 0.01]}, "row 1: lr is 'big', which is not a number$"),
        ({"lr": [0.01, math.inf, 0.01]}, "row 1: lr is inf; it must be a finite number above 0$"),
        ({"lr": [0.01, 0.0, 0.01]}, "row 1: lr is 0; it must be a finite number above 0$"),
        ({"lr": [0.01, 1e-40, 0.01]}, r"row 1: lr is 1e-40; it must be between 1e-30 and 1e\+30$"),
        ({"loops": [1, 2, 2.5]}, "row 2: loops is 2.5; it must be a whole number from 1 to 1000000$"),
        ({"loops": [1e300, 1, 2]}, r"loops is 1e\+300"),
        ({"loss": [math.inf, math.nan, math.inf]}, "none of the 3 rows has a finite loss; run lower LRs"),
        ({"diverged": [False, "perhaps", True]}, "row 1: diverged is 'perhaps'; it must be true or false$"),
        ({"rule": ["factored", "factored", "ｆactored"]}, "differ by case or blanks only; write them alike"),
        ({"loops": [1, 1, 2]}, "rows 0, 1 are the same run .*lr 0.01, seed 3.; drop the repeated rows$"),
        ({"State": ["finished", "crashed", "FINISHED"]}, "row 1: State is 'crashed': .* in 1 of 3 rows"),
        ({"run.status": ["finished", "", "FINISHED"]}, "row 1: run.status is '': a run without a result"),
    ],
)
def test_a_table_that_cannot_be_judged_is_refused_by_row_column_and_value(
    change: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tidy(table(**change))


def test_missing_and_doubled_columns_are_named_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"column loops, lr, loss is missing; .*no columns"):
        tidy(pd.DataFrame())
    with pytest.raises(InputError, match=r"column lr is missing; .*rule"):
        tidy(table().drop(columns="lr"))
    with pytest.raises(InputError, match="there are two columns 'lr'"):
        tidy(pd.concat([table(), table()[["lr"]]], axis=1))
    with pytest.raises(InputError, match="add a column seed that tells them apart"):
        tidy(table(loops=[1, 1, 2], rule=["factored"] * 3).drop(columns="seed"))


def test_a_row_is_called_by_its_label_or_by_its_line_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^row 90: lr"):
        tidy(table(lr=[0.01, 0.01, "big"]).set_index(pd.Index([70, 80, 90])))
    with pytest.raises(InputError, match=r"^row 4: loss is 'fast'"):
        read_results(csv_file(tmp_path, "loops,lr,loss\n1,0.01,2\n\n2,0.01,fast\n"))


@pytest.mark.parametrize("cell", ["", "-", "N/A", "fast"])
def test_a_loss_that_is_none_is_refused_with_the_ways_out(tmp_path: Path, cell: str) -> None:
    path = csv_file(tmp_path, f"loops,lr,loss\n2,0.01,2.0\n1,0.01,{cell}\n")
    with pytest.raises(InputError, match=rf"--where loss!={cell}, .* --diverged loss={cell} \(more"):
        read_results(path)
    assert len(read_results(path, where=[f"loss!={cell}"])) == 1
    assert read_results(path, diverged=[f"loss={cell}"])["loss"].tolist() == [2.0, math.inf]


def test_a_run_that_did_not_finish_but_is_known_to_have_diverged_counts() -> None:
    frame = table(State=["finished", "crashed", "FINISHED"])
    assert len(tidy(frame.assign(loss=[2.0, math.inf, 1.0]))) == 3
    assert len(tidy(frame.assign(diverged=[False, True, False]))) == 3


def test_repeats_that_differ_in_something_else_are_told_as_that() -> None:
    grid = pd.DataFrame(
        [(n, lr, decay, f"run-{decay}-{lr}-{n}") for n in (1, 2) for lr in (0.1, 0.2) for decay in (0.0, 0.1)],
        columns=["loops", "lr", "weight_decay", "name"],
    ).assign(loss=2.0)
    with pytest.raises(InputError, match=r"they differ in weight_decay: keep one .* \(--where weight_decay=0.0\)$"):
        tidy(grid)
    with pytest.raises(InputError, match=r"they differ in loops: keep one value of it, or make it the axis"):
        tidy(table(rule=["factored"] * 3, width=[8, 8, 8], loops=[1, 2, 4]), "width")


# -- cells


@pytest.mark.parametrize("column", ["rule", "loops", "lr", "seed"])
def test_runs_that_differ_in_one_coordinate_are_not_repeated(column: str) -> None:
    base = {"rule": ["a", "a"], "loops": [1, 1], "lr": [0.1, 0.1], "seed": [0, 0], "loss": [1.0, 1.0]}
    other: dict[str, list[Any]] = {"rule": ["a", "b"], "loops": [1, 2], "lr": [0.1, 0.2], "seed": [0, 1]}
    assert len(tidy(pd.DataFrame(base | {column: other[column]}))) == 2


@pytest.mark.parametrize(
    "cells",
    [*(f"2.0,{flag}" for flag in ("true", "True", "TRUE", " true", "1")), ",True", "-inf,false"]
    + [f"{loss},0" for loss in ("inf", "Inf", "nan", "NaN")],
)
def test_a_run_that_diverged_has_infinite_loss_however_it_is_written(tmp_path: Path, cells: str) -> None:
    runs = read_results(csv_file(tmp_path, f"loops,lr,loss,diverged\n1.0,0.01,2.0,0\n2,0.01,{cells}\n"))
    assert runs["loss"].tolist() == [2.0, math.inf]
    assert runs["diverged"].tolist() == [False, True]
    assert runs["loops"].tolist() == [1, 2]


def test_a_table_that_knows_no_rule_is_called_after_none_and_a_missing_seed_is_one_seed() -> None:
    runs = tidy(table(loops=[1, 2, 4]).drop(columns=["rule", "seed"]))
    assert (set(runs["rule"]), set(runs["seed"])) == ({"all runs"}, {"0"})
    runs = tidy(table(width=[8, 8, 8]))
    assert runs["rule"].tolist() == ["factored", "factored", "sqrt"]
    assert (set(runs["seed"]), set(runs["width"])) == ({"3"}, {8})


def test_the_frame_handed_in_is_not_modified_and_tidying_twice_changes_nothing() -> None:
    frame = table(loss=[2.0, math.nan, 1.0], diverged=["false", "true", "0"]).set_index(pd.Index([5, 6, 7]))
    before = frame.copy(deep=True)
    runs = tidy(frame)
    pd.testing.assert_frame_equal(frame, before)
    pd.testing.assert_frame_equal(tidy(runs), runs)


# -- other axes, and curves over steps


def test_another_axis_takes_the_place_of_loops_and_its_rules() -> None:
    frame = table().rename(columns={"loops": "width"})
    assert tidy(frame, "width")["width"].tolist() == [1, 2, 2]
    with pytest.raises(InputError, match="column loops is missing"):
        tidy(frame)
    with pytest.raises(InputError, match=r"row 1: width is -2; it must be a whole number from 1"):
        tidy(frame.assign(width=[1, -2, 2]), "width")


def curves(**changes: list[Any]) -> pd.DataFrame:
    steps: dict[str, list[Any]] = {
        "loops": [1] * 6,
        "lr": [0.1] * 3 + [0.2] * 3,
        "step": [1, 5, 10] * 2,
        "loss": [3.0, 2.0, 1.0, 3.0, 2.5, 2.0],
    }
    return pd.DataFrame(steps | changes)


def test_a_row_for_every_step_is_one_run_whose_loss_is_that_of_the_share_of_the_training() -> None:
    runs = tidy(curves())
    assert at_horizon(runs)["loss"].tolist() == [1.0, 2.0]
    assert at_horizon(runs, share=0.5)["loss"].tolist() == [2.0, 2.5]
    assert at_horizon(runs, share=0.75)["step"].tolist() == [5, 5]


def test_a_table_without_steps_is_the_same_at_every_horizon() -> None:
    runs = tidy(table())
    pd.testing.assert_frame_equal(at_horizon(runs, share=0.5), runs)


def test_the_order_of_the_steps_does_not_matter() -> None:
    runs = tidy(curves().iloc[::-1])
    assert sorted(at_horizon(runs)["loss"]) == [1.0, 2.0]


def test_a_run_that_ends_early_with_a_finite_loss_is_refused_and_one_that_diverged_is_not() -> None:
    early = curves().drop(index=5)
    with pytest.raises(InputError, match=r"row 4: the run of loops 1, lr 0.2, seed 0 ends at step 5 of 10 with"):
        tidy(early)
    diverged = early.assign(loss=[3.0, 2.0, 1.0, 3.0, math.nan])
    assert at_horizon(tidy(diverged))["loss"].tolist() == [1.0, math.inf]


@pytest.mark.parametrize(
    ("step", "message"), [(-1, "row 1: step is -1"), (math.nan, "step is nan"), (1, "the same run")]
)
def test_a_step_that_is_no_number_from_zero_up_or_there_twice_is_refused(step: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tidy(curves(step=[1, step, 10, 1, 5, 10]))


def test_the_fingerprint_depends_on_values_and_not_on_their_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


# -- one thing written in several ways


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_lrs_that_agree_to_a_millionth_are_one_whatever_wrote_them(typed: list[float], random: Any) -> None:
    typed = [typed[0] * (1 + 0.01 * place) ** 3 for place in range(len(typed))]
    writers = [
        float,
        lambda lr: float(np.nextafter(lr, 1)),
        lambda lr: float(np.float32(lr)),
        lambda lr: f"{lr:.20f}",
        lambda lr: lr * (1 + 4e-7),
    ]
    rows = [(1, random.choice(writers)(lr), seed, 2.0) for seed in range(4) for lr in typed]
    frame = pd.DataFrame(rows, columns=["loops", "lr", "seed", "loss"], dtype=object)
    runs = tidy(frame)
    assert runs["lr"].nunique() == len(typed)
    assert runs.groupby("lr")["seed"].nunique().eq(4).all()
    pd.testing.assert_frame_equal(tidy(runs), runs)
    again = tidy(frame.iloc[::-1])
    assert set(again["lr"]) == set(runs["lr"])


def test_an_lr_that_somebody_rounded_is_that_lr_unless_a_seed_ran_both() -> None:
    lrs = [0.0003, 0.0003001, 0.001, 0.0010004]
    frame = pd.DataFrame({"loops": 1, "lr": lrs, "seed": [0, 1, 0, 1], "loss": 2.0})
    assert tidy(frame)["lr"].tolist() == [0.0003, 0.0003, 0.001, 0.001]
    assert tidy(frame.assign(seed=0))["lr"].tolist() == lrs
    assert tidy(frame.assign(lr=[0.001, 0.00101] * 2, loops=[1, 1, 2, 2]))["lr"].nunique() == 2


@pytest.mark.parametrize(
    "names", [[0, 1, 2], [0.0, 1.0, 2.0], ["0", "1.0", "2.00"], ["0e0", " 1", 2], ["+0", "1", "2"]]
)
def test_a_seed_has_one_name_however_it_is_written(names: list[Any]) -> None:
    frame = table(rule=["a"] * 3, loops=[1] * 3, seed=names)
    assert tidy(frame)["seed"].tolist() == ["0", "1", "2"]


def test_seeds_of_twenty_digits_and_of_words_stay_as_they_are() -> None:
    for names in (["12345678901234567890", "12345678901234567891", "5"], ["fold-a", "fold-b", "x"]):
        assert tidy(table(rule=["a"] * 3, loops=[1] * 3, seed=names))["seed"].tolist() == names
    large = [12345678901234567890, 12345678901234567891, 5]
    assert tidy(table(rule=["a"] * 3, loops=[1] * 3, seed=large))["seed"].nunique() == 3


def test_a_digit_that_pandas_would_lose_stays(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss\n1,0.00029999999999999997,1.2345678901234567890\n")
    runs = read_results(path)
    assert (runs["lr"][0], runs["loss"][0]) == (0.0003, 1.2345678901234567)


# -- runs that did not come to their end


@pytest.mark.parametrize(
    ("name", "cells", "left"),
    [
        ("sys/state", ["finished", "killed", "finished"], "sys/state=finished"),
        ("runStatus", ["Finished", "crashed", "finished"], "runStatus=Finished"),
        ("job_status", ["COMPLETED", "TIMEOUT", "COMPLETED"], "job_status=COMPLETED"),
        ("done", [True, False, True], "done=True"),
        ("sys/failed", ["false", "true", "false"], "sys/failed=false"),
        ("has_crashed", [False, True, False], "has_crashed=False"),
    ],
)
def test_a_run_that_did_not_finish_is_refused_whatever_its_tracker_calls_that(
    name: str, cells: list[Any], left: str
) -> None:
    with pytest.raises(InputError, match=rf"row 1: {name} is .*, as in 1 of 3 rows. .* --where {left}, or"):
        tidy(table(**{name: cells}))


@pytest.mark.parametrize(
    ("name", "cells"),
    [("random_state", [0, 1, 2]), ("init_state", ["a", "b", "c"]), ("finished", ["monday", "tuesday", "friday"])],
)
def test_a_column_that_tells_no_end_is_no_state(name: str, cells: list[Any]) -> None:
    assert len(tidy(table(**{name: cells}))) == 3


@pytest.mark.parametrize("name", ["_step", "summary._step", "epoch", "global_step", "training_iteration"])
def test_a_run_that_came_less_far_than_the_others_of_its_n_is_refused(name: str) -> None:
    runs = pd.DataFrame({"loops": 1, "lr": [0.1, 0.2, 0.3], "loss": 2.0, name: [1000, 400, 990]})
    with pytest.raises(InputError, match=f"row 1: the run of loops 1, lr 0.2, seed 0 ends at {name} 400 of 1000 with"):
        tidy(runs)
    assert len(tidy(runs.assign(loss=[2.0, math.inf, 2.0]))) == 3  # it diverged
    assert len(tidy(runs.assign(loops=[1, 2, 3]))) == 3  # each as far as its N goes
    assert len(tidy(runs.assign(**{name: ["x", "y", "z"]}))) == 3


def test_a_row_that_sums_up_seeds_is_no_run() -> None:
    with pytest.raises(InputError, match=r"row 2: seed is 'mean' beside numbers; .* --where seed!=mean, or"):
        tidy(table(rule=["a"] * 3, loops=[1] * 3, seed=["0", "1", "mean"]))


def test_an_lr_below_zero_is_said_to_be_no_logarithm() -> None:
    with pytest.raises(InputError, match="row 1: lr is -3; it must be a finite number above 0, no logarithm"):
        tidy(table(lr=[0.1, -3.0, 0.2]))


def test_thousands_are_told_from_decimal_commas() -> None:
    with pytest.raises(InputError, match=r"loss is '1,024', .*; write thousands without commas"):
        tidy(table(loss=["1,024", "2.0", "3.0"]))


@pytest.mark.parametrize(("name", "role"), [("epoch", "step"), ("random_seed", "seed")])
def test_repeats_that_differ_in_a_step_or_a_seed_are_told_as_that(name: str, role: str) -> None:
    runs = pd.DataFrame(
        [(n, lr, k) for n in (1, 2) for lr in (0.1, 0.2) for k in (0, 1)], columns=["loops", "lr", name]
    )
    with pytest.raises(
        InputError, match=f"they differ in {name}: where that is the {role}, say --columns {role}={name}$"
    ):
        tidy(runs.assign(loss=2.0))
