import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import looptransfer as lt
from looptransfer.errors import FailedRunError, InputError
from looptransfer.trials.devices import slots
from looptransfer.trials.function import CHECKED, Function, as_trainable
from looptransfer.trials.run import Outcome, Run, Trainable, Trial
from looptransfer.trials.search import Grid
from looptransfer.trials.workers import run_search
from tests import trainings
from tests.experiments import tiny_experiment
from tests.trainings import new_ledger

LR = 2.0**-8


def trial(directory: Path, **changes: Any) -> Trial:
    values: dict[str, Any] = {"rule": "factored", "loops": 2, "lr": LR, "seed": 0} | changes
    return Trial(**values, device="cpu", directory=directory / "run")


def trained(function: Callable[[Trial], Any], directory: Path, **changes: Any) -> Outcome:
    return Function(function).train(trial(directory, **changes))


def checked(function: Callable[[Trial], Any], directory: Path, rules: Any = ("factored",)) -> str:
    """What the check found, after it has left none of its folders."""
    first = trial(directory, loops=1)
    assert Function(function).check(first, [1, 2], [0, 1], rules) == {}
    assert [path.name for path in first.directory.iterdir()] == [CHECKED]
    (told,) = json.loads((first.directory / CHECKED).read_text()).values()
    return str(told)


def test_the_loss_that_is_returned_is_the_outcome(tmp_path: Path) -> None:
    outcome = trained(trainings.returning, tmp_path)
    assert (outcome.loss, outcome.diverged, outcome.steps) == (trainings.loss_of(trial(tmp_path)), False, None)
    assert not (tmp_path / "run").exists()


def test_the_last_loss_that_is_yielded_is_the_outcome(tmp_path: Path) -> None:
    outcome = trained(trainings.yielding, tmp_path)
    assert (outcome.loss, outcome.steps) == (trainings.loss_of(trial(tmp_path)) + 0.25, 4)


def test_a_generator_may_return_its_loss_in_the_end(tmp_path: Path) -> None:
    def train(run: Trial) -> Any:
        yield 1, 3.0
        return 2.0

    assert trained(train, tmp_path).loss == 2.0


@pytest.mark.parametrize("loss", [2, np.float32(2), np.array(2.0), np.array([2.0]), torch.tensor(2.0)])
def test_numbers_of_all_kinds_are_losses(tmp_path: Path, loss: Any) -> None:
    assert trained(lambda run: loss, tmp_path).loss == 2.0


def test_a_loss_that_is_no_finite_number_ends_the_run_as_diverged(tmp_path: Path) -> None:
    outcome = trained(trainings.diverging, tmp_path)
    assert (outcome.loss, outcome.diverged, outcome.steps, outcome.last_loss) == (math.inf, True, 2, 3.0)
    assert trained(lambda run: -math.inf, tmp_path).diverged


def test_a_generator_that_is_ended_early_can_clean_up(tmp_path: Path) -> None:
    closed = []

    def train(run: Trial) -> Any:
        try:
            yield 1, math.nan
        finally:
            closed.append(run.loops)

    trained(train, tmp_path)
    assert closed == [2]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, r"returns None \(.*it must be a number, the loss in nats"),
        ("2.0", r"returns '2.0' \("),
        (True, "returns True"),
        (torch.zeros(2), "returns what cannot be read"),
        (iter([2.0]), r"yields 2.0 \(.*yield \(step, loss\)"),
        (iter([(1, "bad")]), "yields 'bad'"),
        (iter([("one", 2.0)]), "yields the step 'one'"),
        (iter([]), "reported no loss"),
    ],
)
def test_what_is_no_loss_is_refused_with_the_functions_line(tmp_path: Path, result: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        trained(lambda run: result, tmp_path)
    assert "test_function.py, line" in str(caught.value)


def test_an_error_of_the_function_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"failing_high\(run\) fails: ArithmeticError: too high.*trainings\.py, line"):
        trained(trainings.failing_high, tmp_path, lr=1.0)


def test_a_directory_stays_where_the_function_left_something_in_it(tmp_path: Path) -> None:
    def train(run: Trial) -> float:
        (run.directory / "model.txt").write_text("weights")
        return 2.0

    trained(train, tmp_path)
    assert (tmp_path / "run" / "model.txt").read_text() == "weights"


def test_the_identity_names_the_function_and_its_version() -> None:
    identity = Function(trainings.returning).identity()
    assert identity["name"] == "tests.trainings.returning"
    assert json.loads(json.dumps(identity)) == identity
    assert Function(trainings.returning, "2").identity() != identity != Function(trainings.yielding).identity()


def test_functions_experiments_and_commands_are_trainable() -> None:
    command = lt.Command("x {lr} {loops} {seed}", "{dir}/log.csv:loss")
    for made in (tiny_experiment(), Function(trainings.returning), command):
        assert isinstance(made, Trainable)
        assert as_trainable(made) is made
    assert isinstance(as_trainable(trainings.returning), Function)


@pytest.mark.parametrize("value", [3, "train.py", Path])
def test_what_is_no_training_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"cannot be trained; give an Experiment or a function"):
        as_trainable(value)


@pytest.mark.parametrize("function", [trainings.returning, trainings.yielding])
def test_equal_runs_that_report_equal_losses_pair_the_seeds(tmp_path: Path, function: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", lt.PairingWarning)
        told = checked(function, tmp_path, ("factored", "unscaled"))
    assert told == "two equal runs (N = 1, LR 0.003906, seed 0) report equal losses: seeds pair the runs"


def test_the_noise_of_equal_runs_is_held_against_that_of_two_seeds(tmp_path: Path) -> None:
    assert "seeds pair the runs but for noise" in checked(trainings.nearly_paired, tmp_path)


def test_seeds_that_do_not_pair_are_warned_of(tmp_path: Path) -> None:
    calls = itertools.count()
    with pytest.warns(lt.PairingWarning, match="seeds do not pair the runs, so that intervals will be wide"):
        checked(lambda run: trainings.loss_of(run) + next(calls), tmp_path)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (trainings.ignoring_loops, "for loop count 1 as for 2, so the loop count does not reach"),
        (trainings.ignoring_seed, "for seed 0 as for 1, so the seed does not reach the training"),
        (trainings.ignoring_rule, "for rule factored as for unscaled, so the rule does not reach the training"),
    ],
)
def test_coordinates_that_change_nothing_are_refused(tmp_path: Path, function: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        checked(function, tmp_path, ("factored", "unscaled"))


def test_rules_that_are_one_at_the_base_depth_are_not_held_apart(tmp_path: Path) -> None:
    told = checked(trainings.ignoring_rule, tmp_path, ("factored", "completep"))
    assert told.endswith("; factored and completep report the same losses, which is right at the base depth alone")
    with pytest.raises(InputError, match="for rule completep as for sqrt, so the rule does not reach the training"):
        Function(trainings.ignoring_rule).check(
            trial(tmp_path, rule="completep", loops=1), [1, 2], [0, 1], ["completep", "sqrt"]
        )


def test_a_start_that_diverges_shows_nothing(tmp_path: Path) -> None:
    assert "whether seeds pair the runs was not seen" in checked(lambda run: math.nan, tmp_path)


def test_a_function_of_a_script_is_named_as_a_worker_imports_it(tmp_path: Path) -> None:
    script = tmp_path / "my_training.py"
    script.write_text("import looptransfer as lt\ndef train(run): pass\nprint(lt.Function(train).identity()['name'])\n")
    done = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True)
    assert done.stdout == "my_training.train\n"


def test_starts_that_are_alike_are_told_apart_by_what_follows(tmp_path: Path) -> None:
    def train(run: Trial) -> Any:
        yield from ((step, 10.82) for step in range(4))
        yield 4, trainings.loss_of(run)

    checked(train, tmp_path, ("factored", "unscaled"))


def test_no_more_than_the_first_losses_are_asked_for(tmp_path: Path) -> None:
    def train(run: Trial) -> Any:
        for step in range(10**9):
            assert step < 3
            yield step, trainings.loss_of(run)

    checked(train, tmp_path)


def test_what_was_checked_is_not_checked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def train(run: Trial) -> float:
        calls.append(run.seed)
        return trainings.loss_of(run)

    checked(train, tmp_path)
    assert (len(calls), capsys.readouterr().err.count("seeds pair the runs")) == (4, 1)
    checked(train, tmp_path)
    assert (len(calls), capsys.readouterr().err) == (4, "")
    Function(train).check(trial(tmp_path, loops=1), [1, 4], [0, 1], ["factored"])
    assert len(calls) == 8


def test_a_function_goes_from_tune_to_a_verdict(tmp_path: Path) -> None:
    ledger = tmp_path / "l.db"
    best = lt.tune(trainings.yielding, loops=2, seeds=3, ledger=ledger, workers=1)
    assert math.log2(best.lr) == pytest.approx(-8.0, abs=0.2)
    rules: Any = ["factored", "unscaled"]
    results = lt.sweep(trainings.yielding, [1, 2, 4], best, rules, seeds=3, ledger=ledger, workers=1)
    assert results["layers"].isna().all()
    verdict = lt.check(results, transferred_lr=best.lr)
    assert {name: one.answer for name, one in verdict.rules.items()} == {"factored": "FLAT", "unscaled": "DRIFTS"}


def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    with pytest.raises(FailedRunError, match=r"2 of 4 runs are missing.*too high for me"):
        lt.sweep(trainings.failing_high, [1], lrs=[LR, 2.0**-6], seeds=2, ledger=tmp_path / "l.db", workers=1)


def test_a_run_that_is_made_again_finds_its_directory(tmp_path: Path) -> None:
    def resuming(run: Trial) -> float:
        half = run.directory / "half.txt"
        if not half.exists():
            half.write_text(str(trainings.loss_of(run)))
            raise ArithmeticError("in the middle")
        return float(half.read_text())

    def searched() -> Any:
        ledger, run = new_ledger(tmp_path / "l.db"), Run("factored", 2, LR, 0)
        run_search(Function(resuming), Grid([run]), ledger, slots(workers=1))
        return ledger.losses[run]

    with pytest.raises(FailedRunError, match="in the middle"):
        searched()
    assert searched() == trainings.loss_of(trial(tmp_path))


def test_a_new_ledger_takes_nothing_from_the_directories_of_an_old_one(tmp_path: Path) -> None:
    ledger, seen = tmp_path / "l.db", []

    def train(run: Trial) -> float:
        seen.append(run.directory)
        (run.directory / "checkpoint").write_text("old")
        return 2.0

    for _ in range(2):
        run_search(Function(train), Grid([Run("factored", 2, LR, 0)]), new_ledger(ledger), slots(workers=1))
        ledger.unlink()
    assert seen[0] != seen[1]
    assert seen[0].parts[:-2] == seen[1].parts[:-2] == (tmp_path / "l.runs").parts


def failing(*seeds: int) -> Any:
    def train(run: Trial) -> float:
        if run.seed in seeds:
            raise ArithmeticError("boom")
        return trainings.loss_of(run)

    return train


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_a_second_seed_that_fails_at_the_start_leaves_the_others_alone(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    with pytest.raises(FailedRunError, match="boom") as caught:
        lt.sweep(failing(*seeds), [1, 2], lrs=[LR], seeds=3, ledger=tmp_path / "l.db", workers=1)
    assert caught.value.finished is not None
    assert set(caught.value.finished["seed"]) == {0, 1, 2} - set(seeds)


def test_a_first_seed_that_fails_at_the_start_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="boom"):
        checked(failing(0), tmp_path)


def test_a_generator_without_a_loss_is_not_told_that_the_seed_does_not_reach_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reported no loss"):
        checked(lambda run: iter([]), tmp_path)


def test_a_whole_number_beyond_all_floats_has_diverged(tmp_path: Path) -> None:
    assert trained(lambda run: 10**400, tmp_path).diverged


def test_a_folder_of_runs_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*run, beside the ledger: Not a directory; choose a ledger"):
        Function(trainings.returning).check(trial(tmp_path / "file"), [1], [0], ["factored"])


@pytest.mark.parametrize("there", ["out", "directory"])
@pytest.mark.parametrize("yields", [False, True])
def test_a_training_that_changes_the_working_directory_leaves_it_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, yields: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = set()

    def move(run: Trial) -> float:
        seen.add(Path.cwd())
        Path("out").mkdir(exist_ok=True)
        os.chdir(run.directory if there == "directory" else "out")
        return trainings.loss_of(run)

    def moving(run: Trial) -> Any:
        yield 0, move(run)
        yield 1, trainings.loss_of(run) + Path.cwd().samefile(tmp_path)

    results = lt.sweep(moving if yields else move, [1, 2], lrs=[LR], seeds=2, ledger="l.db", workers=1)
    assert (seen, Path.cwd(), len(lt.read_results("l.db"))) == ({tmp_path}, tmp_path, len(results))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.db", "l.runs", "out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_training_that_ignores_the_lr_is_told_by_its_first_runs(tmp_path: Path) -> None:
    calls = []

    def train(run: Trial) -> float:
        calls.append(run.lr)
        return math.sqrt(2 + run.seed + run.loops)

    with pytest.raises(
        InputError, match=r"the runs at the LRs 0.001953, 0.007812 .*the LR does not reach the training"
    ):
        lt.tune(train, 1, seeds=2, ledger=tmp_path / "l.db", workers=1)
    assert len(calls) == 5  # of which three are starts


def test_a_loss_of_few_digits_may_be_the_same_at_two_lrs(tmp_path: Path) -> None:
    def rounded(run: Trial) -> float:
        return round(2.31 + 0.01 * run.seed + 0.1 * run.loops, 2)

    lrs = [2.0**-9, 2.0**-8, 2.0**-7]
    assert len(lt.sweep(rounded, [1, 2], lrs=lrs, seeds=2, ledger=tmp_path / "r.db", workers=1)) == 12
