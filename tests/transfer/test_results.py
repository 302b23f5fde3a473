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


@pytest.mark.parametrize("name", ["loops", "lr", "loss"])
def test_a_missing_column_is_named_with_the_columns_there_are(name: str) -> None:
    with pytest.raises(InputError, match=rf"column {name} is missing; .*rule"):
        tidy(table().drop(columns=name))


def test_all_missing_columns_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"column loops, lr, loss is missing; .*no columns"):
        tidy(pd.DataFrame())


def test_a_cell_that_is_no_number_is_named_by_its_line_in_the_file_and_its_value(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss\n1,0.01,2.0\n2,0.01,fast\n4,0.01,1.0\n")
    with pytest.raises(InputError, match=r"^row 3: loss is 'fast', which is not a number"):
        read_results(path)


def test_a_cell_that_is_no_number_is_named_by_its_row_from_zero_in_a_frame() -> None:
    with pytest.raises(InputError, match=r"^row 1: lr is 'big', which is not a number$"):
        tidy(table(lr=[0.01, "big", 0.01]))


def test_the_row_in_an_error_is_called_by_its_label() -> None:
    frame = table(lr=[0.01, 0.01, "big"]).set_index(pd.Index([70, 80, 90]))
    with pytest.raises(InputError, match=r"^row 90: lr"):
        tidy(frame)


@pytest.mark.parametrize(("line", "column"), [("1,,2.0", "lr"), (",0.01,2.0", "loops")])
def test_an_empty_cell_is_refused_and_not_taken_for_a_diverged_run(tmp_path: Path, line: str, column: str) -> None:
    path = csv_file(tmp_path, f"loops,lr,loss\n2,0.01,2.0\n{line}\n")
    with pytest.raises(InputError, match=rf"^row 3: {column} is '', which is not a number$"):
        read_results(path)


@pytest.mark.parametrize("cell", ["", "-", "N/A", "fast"])
def test_a_loss_that_is_none_is_refused_with_the_ways_out(tmp_path: Path, cell: str) -> None:
    path = csv_file(tmp_path, f"loops,lr,loss\n2,0.01,2.0\n1,0.01,{cell}\n")
    with pytest.raises(InputError) as raised:
        read_results(path)
    assert str(raised.value).startswith(f"row 3: loss is {cell!r}, which is not a number: a run without a result")
    assert f"--where loss!={cell}, " in str(raised.value)
    assert str(raised.value).endswith(f"--diverged loss={cell}")
    assert len(read_results(path, where=[f"loss!={cell}"])) == 1
    assert read_results(path, diverged=[f"loss={cell}"])["loss"].tolist() == [2.0, math.inf]


@pytest.mark.parametrize("value", [0.0, -0.01, math.inf, math.nan])
def test_an_lr_that_is_not_finite_and_above_zero_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=rf"^row 1: lr is {value:g}; it must be a finite number above 0$"):
        tidy(table(lr=[0.01, value, 0.01]))


@pytest.mark.parametrize("value", [0, -1, 2.5, math.nan, math.inf])
def test_a_loop_count_that_is_no_whole_number_from_one_up_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=rf"^row 2: loops is {value:g}; it must be a whole number from 1 to 1000000$"):
        tidy(table(loops=[1, 2, value]))


def test_a_loop_count_written_as_a_float_becomes_an_integer(tmp_path: Path) -> None:
    runs = read_results(csv_file(tmp_path, "loops,lr,loss\n1.0,0.01,2.0\n2,0.01,2.0\n"))
    assert runs["loops"].tolist() == [1, 2]
    assert runs["loops"].dtype.kind == "i"


def test_a_table_without_a_finite_loss_is_refused() -> None:
    with pytest.raises(InputError, match=r"none of the 3 rows has a finite loss; run lower LRs"):
        tidy(table(loss=[math.inf, math.nan, math.inf]))


def test_a_table_without_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the table has no rows"):
        read_results(csv_file(tmp_path, "loops,lr,loss\n"))


def test_repeated_runs_are_named_by_row_and_coordinates(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,seed,loss\n1,0.01,5,2.0\n1,0.02,5,2.0\n1,0.010,5,1.9\n")
    with pytest.raises(InputError) as raised:
        read_results(path)
    assert str(raised.value).startswith("rows 2, 4 are the same run (loops 1, lr 0.01, seed 5)")
    assert str(raised.value).endswith("drop the repeated rows")


def test_repeated_runs_without_a_seed_column_ask_for_one() -> None:
    frame = table(loops=[1, 1, 2], rule=["factored"] * 3).drop(columns="seed")
    with pytest.raises(InputError, match=r"rows 0, 1 are the same run .*; add a column seed that tells them apart"):
        tidy(frame)


@pytest.mark.parametrize("column", ["rule", "loops", "lr", "seed"])
def test_runs_that_differ_in_one_coordinate_are_not_repeated(column: str) -> None:
    base = {"rule": ["a", "a"], "loops": [1, 1], "lr": [0.1, 0.1], "seed": [0, 0], "loss": [1.0, 1.0]}
    other: dict[str, list[Any]] = {"rule": ["a", "b"], "loops": [1, 2], "lr": [0.1, 0.2], "seed": [0, 1]}
    with pytest.raises(InputError):
        tidy(pd.DataFrame(base))
    assert len(tidy(pd.DataFrame(base | {column: other[column]}))) == 2


def test_a_diverged_flag_that_is_neither_true_nor_false_is_named(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss,diverged\n1,0.01,2.0,false\n2,0.01,2.0,perhaps\n")
    with pytest.raises(InputError, match=r"^row 3: diverged is 'perhaps'; it must be true or false$"):
        read_results(path)


@pytest.mark.parametrize("flag", ["true", "True", "TRUE", " true", "1"])
def test_a_run_flagged_as_diverged_has_infinite_loss_whatever_is_written(tmp_path: Path, flag: str) -> None:
    runs = read_results(csv_file(tmp_path, f"loops,lr,loss,diverged\n1,0.01,2.0,0\n2,0.01,2.0,{flag}\n"))
    assert runs["loss"].tolist() == [2.0, math.inf]
    assert runs["diverged"].tolist() == [False, True]


@pytest.mark.parametrize("written", ["inf", "Inf", "-inf", "nan", "NaN"])
def test_a_loss_that_is_not_finite_comes_back_as_infinity_and_diverged(tmp_path: Path, written: str) -> None:
    runs = read_results(csv_file(tmp_path, f"loops,lr,loss\n1,0.01,2.0\n1,0.02,{written}\n"))
    assert runs["loss"].tolist() == [2.0, math.inf]
    assert runs["diverged"].tolist() == [False, True]


def test_a_loss_that_is_not_finite_is_diverged_even_where_the_flag_says_false() -> None:
    runs = tidy(table(loss=[2.0, math.nan, 1.0], diverged=[False, False, True]))
    assert runs["loss"].tolist() == [2.0, math.inf, math.inf]
    assert runs["diverged"].tolist() == [False, True, True]


def test_a_table_that_knows_no_rule_is_called_after_none_and_a_missing_seed_is_one_seed(tmp_path: Path) -> None:
    runs = read_results(csv_file(tmp_path, "loops,lr,loss\n1,0.01,2.0\n2,0.01,1.0\n"))
    assert runs["rule"].tolist() == ["all runs", "all runs"]
    assert runs["seed"].tolist() == ["0", "0"]


def test_rule_and_seed_are_kept_where_given_and_other_columns_pass_through() -> None:
    runs = tidy(table(width=[8, 8, 8]))
    assert runs["rule"].tolist() == ["factored", "factored", "sqrt"]
    assert runs["seed"].tolist() == ["3", "3", "3"]
    assert runs["width"].tolist() == [8, 8, 8]


def test_the_frame_handed_in_is_not_modified() -> None:
    frame = table(loss=[2.0, math.nan, 1.0], diverged=["false", "true", "0"]).set_index(pd.Index([5, 6, 7]))
    before = frame.copy(deep=True)
    tidy(frame)
    pd.testing.assert_frame_equal(frame, before)


def test_tidying_a_tidy_table_changes_nothing() -> None:
    once = tidy(table(loss=[2.0, math.nan, 1.0]))
    pd.testing.assert_frame_equal(tidy(once), once)


def test_a_loop_count_beyond_reason_is_refused() -> None:
    with pytest.raises(InputError, match=r"loops is 1e\+300"):
        tidy(table(loops=[1e300, 1, 2]))


def test_a_diverged_run_may_have_an_empty_loss(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss,diverged\n1,0.01,2,False\n1,0.1,,True\n")
    assert read_results(path)["loss"].tolist() == [2.0, math.inf]


# -- other axes, and curves over steps


def test_another_axis_takes_the_place_of_loops_and_its_rules() -> None:
    frame = table().rename(columns={"loops": "width"})
    assert tidy(frame, "width")["width"].tolist() == [1, 2, 2]
    with pytest.raises(InputError, match="column loops is missing"):
        tidy(frame)
    with pytest.raises(InputError, match=r"row 1: width is -2; it must be a whole number from 1"):
        tidy(frame.assign(width=[1, -2, 2]), "width")


def test_runs_that_differ_in_loops_alone_ask_for_one_loop_count_where_width_is_the_axis() -> None:
    frame = table(rule=["factored"] * 3, width=[8, 8, 8], loops=[1, 2, 4])
    with pytest.raises(InputError, match=r"they differ in loops: keep one value of it, or make it the axis"):
        tidy(frame, "width")


def test_two_columns_of_one_name_are_refused() -> None:
    frame = pd.concat([table(), table()[["lr"]]], axis=1)
    with pytest.raises(InputError, match="there are two columns 'lr'"):
        tidy(frame)


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


def test_a_step_twice_in_one_run_is_a_repeated_row() -> None:
    with pytest.raises(InputError, match="rows 0, 1 are the same run"):
        tidy(curves(step=[1, 1, 10, 1, 5, 10]))


@pytest.mark.parametrize("step", [-1, math.nan, math.inf])
def test_a_step_that_is_no_number_from_zero_up_is_refused(step: float) -> None:
    with pytest.raises(InputError, match=rf"row 1: step is {step:g}; it must be a number from 0 up"):
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
    assert tidy(frame.assign(lr=[0.001, 0.001001] * 2, loops=[1, 1, 2, 2]))["lr"].nunique() == 2


@pytest.mark.parametrize(
    "names", [[0, 1, 2], [0.0, 1.0, 2.0], ["0", "1.0", "2.00"], ["0e0", " 1", 2], ["+0", "1", "2"]]
)
def test_a_seed_has_one_name_however_it_is_written(names: list[Any]) -> None:
    frame = table(rule=["a"] * 3, loops=[1] * 3, seed=names)
    assert tidy(frame)["seed"].tolist() == ["0", "1", "2"]


def test_seeds_of_twenty_digits_and_of_words_stay_as_they_are() -> None:
    names = ["12345678901234567890", "12345678901234567891", "fold-a"]
    assert tidy(table(rule=["a"] * 3, loops=[1] * 3, seed=names))["seed"].tolist() == names
    assert tidy(table(rule=["a"] * 3, loops=[1] * 3, seed=[int(names[0]), int(names[1]), 5]))["seed"].nunique() == 3


@pytest.mark.parametrize("other", ["Factored", "fac tored", "FACTORED", "ｆactored"])
def test_rules_that_differ_by_case_or_blanks_are_told(other: str) -> None:
    with pytest.raises(InputError, match=r"rules 'factored' and .* differ by case or blanks only; write them alike"):
        tidy(table(rule=["factored", "factored", other]))


def test_repeats_that_differ_in_something_else_are_told_as_that() -> None:
    grid = pd.DataFrame(
        [(n, lr, decay, f"run-{decay}-{lr}-{n}") for n in (1, 2) for lr in (0.1, 0.2) for decay in (0.0, 0.1)],
        columns=["loops", "lr", "weight_decay", "name"],
    ).assign(loss=2.0)
    with pytest.raises(InputError, match=r"they differ in weight_decay: keep one .* \(--where weight_decay=0.0\)$"):
        tidy(grid)


@pytest.mark.parametrize(("name", "word"), [("State", "crashed"), ("run.status", "FAILED"), ("state", "")])
def test_a_run_that_did_not_finish_is_neither_judged_nor_taken_for_diverged(name: str, word: str) -> None:
    frame = table(**{name: ["finished", word, "FINISHED"]})
    with pytest.raises(InputError, match=rf"^row 1: {name} is '{word}': a run without a result, as in 1 of 3 rows"):
        tidy(frame)
    assert len(tidy(frame.assign(loss=[2.0, math.inf, 1.0]))) == 3
    assert len(tidy(frame.assign(diverged=[False, True, False]))) == 3


def test_a_digit_that_pandas_would_lose_stays(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss\n1,0.00029999999999999997,1.2345678901234567890\n")
    runs = read_results(path)
    assert (runs["lr"][0], runs["loss"][0]) == (0.0003, 1.2345678901234567)
