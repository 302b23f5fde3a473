import os
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from optuna.trial import TrialState
from torch import nn

from looptransfer.errors import FailedRunError, InputError
from looptransfer.transfer.check import check
from looptransfer.transfer.results import COLUMNS
from looptransfer.trials import ledger as ledger_module
from looptransfer.trials import workers as workers_module
from looptransfer.trials.devices import available_cores, slots
from looptransfer.trials.ledger import Ledger
from looptransfer.trials.run import Run
from looptransfer.trials.search import Grid, ProxySearch, Search
from looptransfer.trials.sweep import sweep
from looptransfer.trials.workers import run_search
from tests.experiments import PAUSE, LoopedMLP, tiny_experiment

ROOT = Path(__file__).parents[2]
RUNS = tuple(Run("factored", loops, 2.0**-4, seed) for loops in (1, 2) for seed in (0, 1))
SWEEP: dict[str, Any] = {"loops": [1, 2], "around": 2.0**-4, "octaves": [-4.5, -3.0, -1.5, 0.0, 1.5], "seeds": 2}
SWEEP_RUNS = 20

# The settings stand outside the guard: spawned workers import the script, too.
SWEEPER = f"""
import sys
from looptransfer.trials import ledger
from looptransfer.trials.sweep import sweep
from tests.experiments import tiny_experiment

ledger.HEARTBEAT, ledger.GRACE = 1, 4
if __name__ == "__main__":
    sweep(tiny_experiment(), ledger=sys.argv[1], workers=2, **{SWEEP!r}).to_pickle(sys.argv[2])
"""

on_linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


def grid(experiment: Any, ledger: Path, runs: tuple[Run, ...] = RUNS, workers: int = 1) -> pd.DataFrame:
    return searched(experiment, Grid(runs), ledger, workers)


def searched(experiment: Any, search: Search, place: str | Path, workers: int = 1, **options: Any) -> pd.DataFrame:
    ledger = Ledger(place)
    ledger.admit(experiment.identity(), {})
    run_search(experiment, search, ledger, slots(workers=workers), **options)
    return pd.DataFrame(list(ledger.finished.values()), columns=[*COLUMNS, "last_loss"])


def complete(ledger: Path, name: str = "sweep") -> dict[int, tuple[Run, float | None]]:
    """Trial number -> run and loss of the finished runs, read by Optuna alone."""
    stored = optuna.load_study(study_name=name, storage=f"sqlite:///{ledger}")
    trials = stored.get_trials(states=(TrialState.COMPLETE,))
    return {trial.number: (Run(**trial.user_attrs["run"]), trial.value) for trial in trials}


# -- in one process


def test_every_run_is_made_once_and_comes_back_with_the_columns_of_the_results(tmp_path: Path) -> None:
    done = grid(tiny_experiment(), tmp_path / "ledger.db")
    assert list(done.columns) == [*COLUMNS, "last_loss"]
    assert sorted(Run(*row) for row in done[["rule", "loops", "lr", "seed"]].itertuples(index=False)) == sorted(RUNS)
    assert np.isfinite(done["loss"]).all()
    assert (done["seconds"] > 0).all()


def test_a_second_call_makes_nothing_and_returns_the_same(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    first = grid(tiny_experiment(), ledger)
    started = complete(ledger)
    second = grid(tiny_experiment(), ledger)
    pd.testing.assert_frame_equal(second, first, check_exact=True)
    assert complete(ledger) == started


def test_a_larger_search_makes_only_what_is_missing(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    grid(tiny_experiment(), ledger, RUNS[:3])
    before = complete(ledger)
    grid(tiny_experiment(), ledger)
    after = complete(ledger)
    assert len(before) == 3
    assert before.items() <= after.items()
    assert sorted(run for run, _ in after.values()) == sorted(RUNS)


def test_a_diverged_run_is_finished_with_infinite_loss_and_not_repeated(tmp_path: Path) -> None:
    runs = (Run("factored", 1, 1e4, 0), Run("factored", 1, 2.0**-4, 0))
    done = grid(tiny_experiment(), tmp_path / "ledger.db", runs).set_index("lr")
    assert done.loc[1e4, "loss"] == np.inf
    assert done["diverged"].to_dict() == {1e4: True, 2.0**-4: False}
    assert done.loc[1e4, "steps"] < 30
    grid(tiny_experiment(), tmp_path / "ledger.db", runs)
    assert len(complete(tmp_path / "ledger.db")) == 2


def test_the_ledger_is_a_study_whose_trials_have_the_coordinates_as_parameters(tmp_path: Path) -> None:
    grid(tiny_experiment(), tmp_path / "ledger.db")
    stored = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'ledger.db'}")
    parameters = [Run(**trial.params) for trial in stored.get_trials(states=(TrialState.COMPLETE,))]
    assert sorted(parameters) == sorted(RUNS)


def test_training_in_this_process_leaves_its_number_of_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grid(tiny_experiment(), tmp_path / "ledger.db", RUNS[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_folder_of_the_ledger_is_made(tmp_path: Path) -> None:
    grid(tiny_experiment(), tmp_path / "a" / "b" / "ledger.db", RUNS[:1])
    assert (tmp_path / "a" / "b" / "ledger.db").stat().st_size > 0


def test_a_storage_url_is_taken_as_it_is(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'by-url.db'}"
    assert len(searched(tiny_experiment(), Grid(RUNS[:1]), url)) == 1
    assert len(complete(tmp_path / "by-url.db")) == 1


@pytest.mark.parametrize("workers", [0, -2])
def test_fewer_than_one_worker_are_refused(tmp_path: Path, workers: int) -> None:
    with pytest.raises(InputError, match=rf"workers is {workers}; it must be a whole number from 1 up"):
        grid(tiny_experiment(), tmp_path / "ledger.db", workers=workers)


def test_there_is_at_least_one_core_and_no_more_than_the_machine_has() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_an_experiment_that_cannot_be_sent_to_workers_is_refused_before_any_is_started(tmp_path: Path) -> None:
    def make_model(loops: int) -> nn.Module:
        return LoopedMLP(loops)

    experiment = tiny_experiment(make_model=make_model)
    with pytest.raises(InputError, match="define its functions at the top level of a module, or pass workers=1"):
        grid(experiment, tmp_path / "ledger.db", workers=2)
    assert len(grid(experiment, tmp_path / "ledger.db", RUNS[:1], workers=1)) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 12}, "steps: 30 there, 12 here"),
        ({"settings": {"sha": "b"}}, "sha: 'a' there, 'b' here"),
        ({"settings": {}}, "sha: 'a' there, None here"),
    ],
)
def test_a_ledger_of_another_experiment_is_refused_by_what_differs(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    ledger = tmp_path / "ledger.db"
    ours: dict[str, Any] = {"settings": {"sha": "a"}}
    grid(tiny_experiment(**ours), ledger, RUNS[:1])
    with pytest.raises(InputError) as raised:
        grid(tiny_experiment(**(ours | change)), ledger)
    assert f"holds another experiment ({said})" in str(raised.value)
    assert "choose another ledger" in str(raised.value)
    assert len(complete(ledger)) == 1


def test_a_ledger_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write the ledger .*choose a folder you may write to"):
        grid(tiny_experiment(), tmp_path)


def test_a_ledger_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write the ledger .*choose a folder you may write to"):
        grid(tiny_experiment(), tmp_path / "file" / "ledger.db")


def test_a_ledger_that_is_no_sqlite_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("loops,lr,loss\n" * 200)
    with pytest.raises(InputError, match=r"cannot open the ledger .*results\.csv"):
        grid(tiny_experiment(), path)
    assert path.read_text() == "loops,lr,loss\n" * 200


def test_a_run_claimed_by_a_process_that_died_is_made_after_the_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "GRACE", 1)
    ledger = tmp_path / "ledger.db"
    grid(tiny_experiment(), ledger, RUNS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = optuna.storages.RDBStorage(f"sqlite:///{ledger}", heartbeat_interval=1, grace_period=1)
        dead = optuna.load_study(study_name="sweep", storage=storage).ask()
    storage.record_heartbeat(dead._trial_id)
    dead.set_user_attr("run", vars(RUNS[1]))
    started = time.monotonic()
    grid(tiny_experiment(), ledger, RUNS[:3])
    assert sorted(run for run, _ in complete(ledger).values()) == sorted(RUNS[:3])
    assert dead.number not in complete(ledger)
    assert time.monotonic() - started > 0.5


# -- runs that fail


def test_a_run_that_fails_leaves_the_others_alone_and_is_tried_again_by_the_next_call(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    runs = tuple(Run("factored", 1, 2.0**-4, seed) for seed in range(4))
    for calls in (1, 2):
        with pytest.raises(FailedRunError) as told:
            grid(tiny_experiment(failing_seed=2), ledger, runs)
        assert re.match(
            r"1 of 4 runs are missing; the same call makes only what lacks. 1 failed; factored, N = 1, LR 0.0625, "
            r"seed 2: batches\(2\) fails: ArithmeticError: no second batch for seed 2 \(.*experiments.py, line \d+",
            str(told.value),
        )
        assert sorted(run.seed for run, _ in complete(ledger).values()) == [0, 1, 3]
        stored = optuna.load_study(study_name="sweep", storage=f"sqlite:///{ledger}")
        assert len(stored.get_trials(states=(TrialState.FAIL,))) == calls
    assert len(grid(tiny_experiment(), ledger, runs)) == 4


def test_a_loop_count_of_which_every_run_fails_is_given_up_and_the_others_are_made(tmp_path: Path) -> None:
    tried: list[int] = []

    def make_model(loops: int) -> nn.Module:
        tried.append(loops)
        if loops == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return LoopedMLP(loops)

    runs = tuple(Run("factored", loops, lr, seed) for loops in (1, 8) for lr in (0.01, 0.02) for seed in range(3))
    with pytest.raises(FailedRunError, match=r"6 of 12 runs are missing.* 2 failed and 4 more .* OutOfMemoryError"):
        grid(tiny_experiment(make_model=make_model, steps=2), tmp_path / "ledger.db", runs)
    assert tried.count(8) == 2
    assert {run.loops for run, _ in complete(tmp_path / "ledger.db").values()} == {1}
    assert len(complete(tmp_path / "ledger.db")) == 6


def test_a_tuning_of_which_a_run_fails_says_so_and_ends(tmp_path: Path) -> None:
    with pytest.raises(FailedRunError, match="seed 0: batches"):
        searched(tiny_experiment(failing_seed=0), ProxySearch(1, (0, 1)), tmp_path / "ledger.db")


# -- with worker processes


@pytest.mark.slow
def test_two_workers_make_the_same_table_as_one_with_every_run_made_once(tmp_path: Path) -> None:
    key = ["rule", "loops", "lr", "seed"]
    one, two = (
        grid(tiny_experiment(), tmp_path / f"{workers}.db", workers=workers).drop(columns="seconds").sort_values(key)
        for workers in (1, 2)
    )
    pd.testing.assert_frame_equal(two.reset_index(drop=True), one.reset_index(drop=True), check_exact=True)
    assert len(two) == len(RUNS)


@pytest.mark.slow
def test_a_run_that_fails_in_a_worker_leaves_the_others_alone_and_is_made_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger.db"
    runs = tuple(Run("factored", 1, 2.0**-4, seed) for seed in range(7))
    monkeypatch.setenv(PAUSE, "0.6")
    with pytest.raises(FailedRunError, match=r"1 of 7 runs are missing.* seed 2: batches\(2\) fails: Arithmetic"):
        grid(tiny_experiment(failing_seed=2), ledger, runs, workers=2)
    before = complete(ledger)
    assert before
    monkeypatch.setenv(PAUSE, "0")
    monkeypatch.setattr(ledger_module, "GRACE", 1)
    grid(tiny_experiment(), ledger, runs)
    after = complete(ledger)
    assert before.items() <= after.items()
    assert sorted(run for run, _ in after.values()) == sorted(runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        ("hangs", "it took longer than the limit of 12 s"),
        ("ends its process", "its worker process ended with exit status 7: the experiment, or a library that it uses"),
        ("is killed", r"its worker process was killed .* 3 times \(exit status -9\); try fewer workers"),
    ],
)
def test_a_run_that_takes_its_worker_with_it_is_told_by_its_cause_and_the_others_are_made(
    tmp_path: Path, failure: str, cause: str
) -> None:
    ledger, runs = tmp_path / "ledger.db", tuple(Run("factored", 1, 2.0**-4, seed) for seed in range(4))
    limit = 12 if failure == "hangs" else None
    with pytest.raises(FailedRunError, match=rf"1 of 4 runs are missing.* 1 failed; .* seed 1: {cause}"):
        searched(tiny_experiment(1, failure), Grid(runs), ledger, workers=2, limit=limit)
    assert sorted(run.seed for run, _ in complete(ledger).values()) == [0, 2, 3]
    assert len(grid(tiny_experiment(), ledger, runs)) == 4


def test_a_time_limit_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the time limit, in seconds, is -1; it must be a finite number above 0"):
        searched(tiny_experiment(), Grid(RUNS), tmp_path / "ledger.db", limit=-1)


def test_a_run_that_takes_many_times_the_median_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid(tiny_experiment(steps=2), tmp_path / "ledger.db", RUNS[:1])
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.claim(RUNS[1])
    capsys.readouterr()
    workers_module._tell_slow(ledger)
    assert not capsys.readouterr().err
    monkeypatch.setattr(workers_module, "NEVER_SLOW", 0.0)
    monkeypatch.setattr(workers_module, "SLOW", 0)
    for told in (1, 0):
        workers_module._tell_slow(ledger)
        assert capsys.readouterr().err.count("times what others of its N take") == told


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return sweep(tiny_experiment(), ledger=tmp_path_factory.mktemp("undisturbed") / "ledger.db", workers=1, **SWEEP)


class Sweeper:
    """A sweep in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ledger = folder, folder / "ledger.db"
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "sweeper.py").write_text(SWEEPER)

    def start(self, pause: float = 0.3) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"PYTHONPATH": str(ROOT), PAUSE: str(pause)}
        command = [sys.executable, "sweeper.py", str(self.ledger), str(self.folder / "results.pickle")]
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True)
        return self.process

    def finished(self) -> int:
        if not self.ledger.exists():
            return 0
        try:
            with sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True, timeout=30) as connection:
                return int(connection.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0])
        except sqlite3.OperationalError:  # the tables are not there yet
            return 0

    def wait_for(self, finished: int) -> None:
        wait_until(lambda: self.finished() >= finished, 90)

    def workers(self) -> list[int]:
        assert self.process is not None
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def kill_group(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def results(self) -> pd.DataFrame:
        return pickle.loads((self.folder / "results.pickle").read_bytes())


@pytest.fixture
def sweeper(tmp_path: Path) -> Iterator[Sweeper]:
    made = Sweeper(tmp_path)
    yield made
    made.kill_group()


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_as_undisturbed(results: pd.DataFrame, undisturbed: pd.DataFrame, ledger: Path) -> None:
    runs = [run for run, _ in complete(ledger).values()]
    assert len(runs) == len(set(runs)) == SWEEP_RUNS
    columns = [column for column in COLUMNS if column != "seconds"]
    pd.testing.assert_frame_equal(results[columns], undisturbed[columns], check_exact=True)
    assert check(results).to_dict() == check(undisturbed).to_dict()


@pytest.mark.slow
def test_a_sweep_killed_twice_by_sigkill_ends_as_an_undisturbed_one(
    sweeper: Sweeper, undisturbed: pd.DataFrame
) -> None:
    moments = np.random.default_rng(7)
    kept: dict[int, tuple[Run, float | None]] = {}
    for _ in range(2):
        sweeper.start()
        sweeper.wait_for(len(kept) + int(moments.integers(2, 6)))
        time.sleep(moments.uniform(0, 0.3))
        assert sweeper.process is not None
        assert sweeper.process.poll() is None  # it was killed at work
        sweeper.kill_group()
        after = complete(sweeper.ledger)
        assert kept.items() <= after.items()
        assert len(kept) < len(after) < SWEEP_RUNS
        kept = after
    assert sweeper.start(pause=0).wait(120) == 0
    assert kept.items() <= complete(sweeper.ledger).items()
    assert_as_undisturbed(sweeper.results(), undisturbed, sweeper.ledger)


@on_linux
@pytest.mark.slow
def test_a_sweep_survives_that_one_of_its_workers_is_killed(sweeper: Sweeper, undisturbed: pd.DataFrame) -> None:
    process = sweeper.start()
    sweeper.wait_for(4)
    workers = sweeper.workers()
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert sweeper.finished() < SWEEP_RUNS
    assert process.wait(120) == 0
    assert_as_undisturbed(sweeper.results(), undisturbed, sweeper.ledger)


@on_linux
@pytest.mark.slow
def test_workers_end_within_seconds_when_their_parent_is_killed(sweeper: Sweeper) -> None:
    process = sweeper.start()
    sweeper.wait_for(2)
    workers = sweeper.workers()
    assert [alive(worker) for worker in workers] == [True, True]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(alive(worker) for worker in workers), 5)
    finished = sweeper.finished()
    assert finished < SWEEP_RUNS
    time.sleep(1)
    assert sweeper.finished() == finished
