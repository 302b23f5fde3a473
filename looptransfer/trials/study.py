"""The ledger of trials, an Optuna study in SQLite, and the worker processes that fill it.

There is no planner process and no queue: every worker asks the search what is wanted, leaves out what is finished or
running, and takes the next. A worker that dies leaves a trial without heartbeat, whose run is then open again.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
from optuna.exceptions import ExperimentalWarning, TrialPruned, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from looptransfer.errors import InputError
from looptransfer.rules import RULES
from looptransfer.text import without_password, without_secrets
from looptransfer.transfer.results import COLUMNS
from looptransfer.transfer.sources import finished_trials
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.search import Search
from looptransfer.trials.trial import Run, train

HEARTBEAT, GRACE = 5, 30  # seconds between signs of life, and without one until a run is open again
RESTARTS = 3  # workers that may be killed from outside before a sweep gives up
PLAIN_EVERY = 30.0  # seconds between progress lines where there is no terminal


def run_search(
    experiment: Experiment, search: Search, ledger: str | Path, name: str, workers: int | None = None
) -> pd.DataFrame:
    """Make every run that `search` wants and the ledger lacks; return all finished runs of the study `name`.

    Interrupted by anything, kill -9 included, it goes on where it was when called again: a finished run is never
    repeated. One-thread worker processes fill the machine; `workers=1` trains in this process.

    Raises:
        InputError: the ledger cannot be opened or belongs to another experiment, or the experiment cannot be pickled.
        RuntimeError: a run failed, with its traceback, or workers were killed again and again.
    """
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise InputError(f"workers is {workers}; it must be 1 or more")
    url = _url(ledger)
    study = _open(url, name, experiment.identity())
    with _Progress(name) as progress:
        if workers == 1:
            threads = torch.get_num_threads()
            try:
                _work(url, name, experiment, search, progress)
            finally:
                torch.set_num_threads(threads)
        elif _open_runs(study, search)[1]:
            experiment.check_portable()
            _supervise(url, study, experiment, search, workers, progress)
        progress.show(study, search)
    return finished_runs(study)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def finished_runs(study: optuna.Study) -> pd.DataFrame:
    """One row per finished run, with the columns of results.csv and `last_loss`."""
    return finished_trials(study).reindex(columns=[*COLUMNS, "last_loss"]).reset_index(drop=True)


# -- the ledger


def _url(ledger: str | Path) -> str:
    if "://" in str(ledger):
        return str(ledger)
    path = Path(ledger).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write the ledger {path}: {error.strerror}; choose a folder you may write to"
        ) from None
    return f"sqlite:///{path}"


def _storage(url: str) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    connect = {"timeout": 120} if url.startswith("sqlite") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.storages.RDBStorage(
            url, engine_kwargs={"connect_args": connect}, heartbeat_interval=HEARTBEAT, grace_period=GRACE
        )


def _open(url: str, name: str, identity: dict[str, Any]) -> optuna.Study:
    """Open or make a study and see that it is of this experiment."""
    try:
        storage = _storage(url)
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    except Exception as error:
        why = without_secrets(str(error), url).partition("\n")[0]
        raise InputError(
            f"cannot open the ledger {without_password(url)}: {why}; give a SQLite file of looptransfer's own"
        ) from error
    text = json.dumps(identity, sort_keys=True)
    if "identity" not in study.user_attrs:
        study.set_user_attr("identity", text)
    stored = json.loads(study.user_attrs["identity"])
    if stored != json.loads(text):
        differing = sorted(k for k in stored.keys() | identity.keys() if stored.get(k) != json.loads(text).get(k))
        what = ", ".join(f"{key}: {stored.get(key)!r} there, {identity.get(key)!r} here" for key in differing)
        raise InputError(
            f"the ledger {without_password(url)} holds another experiment ({what}); choose another ledger or remove "
            "this one"
        )
    return study


# -- choosing and making runs


class _RunError(RuntimeError):
    """A run raised; its traceback stands in the ledger."""


class _Claimed(optuna.samplers.BaseSampler):
    """Hands Optuna the coordinates of the run that this worker has claimed, so that dashboards can plot them."""

    def __init__(self) -> None:
        self.run: Run | None = None

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return getattr(self.run, param_name)


def _open_runs(study: optuna.Study, search: Search) -> tuple[list[Run], list[Run], list[Run]]:
    """Runs that nobody makes, all that are not finished, and all that are wanted."""
    done: set[Run] = set()
    taken: set[Run] = set()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)):
        run = _run_of(trial)
        if run is not None:
            (done if trial.state == TrialState.COMPLETE else taken).add(run)
    wanted = list(dict.fromkeys(search.wanted(finished_runs(study))))
    unfinished = [run for run in wanted if run not in done]
    return [run for run in unfinished if run not in taken], unfinished, wanted


def _run_of(trial: FrozenTrial) -> Run | None:
    claim = trial.user_attrs.get("run")
    return Run(**claim) if claim else None


def _claim(study: optuna.Study, trial: optuna.Trial, search: Search) -> Run:
    """Take an open run for `trial`: write the claim, then look for rivals, and withdraw if there is one.

    Both of two rivals write before they look, so at least one sees the other: they may both withdraw, never both stay.
    """
    while True:
        todo, _, _ = _open_runs(study, search)
        if not todo:
            raise TrialPruned("every run is finished or being made")
        trial.set_user_attr("run", asdict(todo[0]))
        states = (TrialState.RUNNING, TrialState.COMPLETE)
        others = (other for other in study.get_trials(deepcopy=False, states=states) if other.number != trial.number)
        if not any(_run_of(other) == todo[0] for other in others):
            return todo[0]
        trial.set_user_attr("run", None)
        time.sleep(random.uniform(0, 0.2))


def _work(url: str, name: str, experiment: Experiment, search: Search, progress: "_Progress | None" = None) -> None:
    """Make runs until none is open or running. This is the whole of a worker."""
    torch.set_num_threads(1)
    sampler = _Claimed()
    storage = _storage(url)
    study = optuna.load_study(storage=storage, study_name=name, sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        storage.record_heartbeat(
            trial._trial_id
        )  # before the claim, or a death right after it would hold the run forever
        sampler.run = run = _claim(study, trial, search)
        trial.suggest_categorical("rule", list(RULES))
        trial.suggest_int("loops", run.loops, run.loops)
        trial.suggest_float("lr", run.lr, run.lr)
        trial.suggest_int("seed", run.seed, run.seed)
        try:
            outcome = asdict(train(experiment, run))
        except Exception as error:
            trial.set_user_attr("error", traceback.format_exc())
            raise _RunError(traceback.format_exc()) from error
        trial.set_user_attr("outcome", outcome)
        return float(outcome["loss"])

    while True:
        todo, unfinished, _ = _open_runs(study, search)
        if progress is not None:
            progress.show(study, search)
        if not unfinished:
            return
        if todo:
            # A process that slept through its grace period finds its run given to another.
            with contextlib.suppress(UpdateFinishedTrialError):
                study.optimize(objective, n_trials=1)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                optuna.storages.fail_stale_trials(study)
            time.sleep(0.5)


def _worker(url: str, name: str, experiment: Experiment, search: Search) -> None:
    """Entry point of a worker process: it ends with its parent."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=_end_with, args=(sentinel,), daemon=True).start()
    try:
        _work(url, name, experiment, search)
    except KeyboardInterrupt:
        sys.exit(130)
    except _RunError:
        sys.exit(1)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _supervise(
    url: str, study: optuna.Study, experiment: Experiment, search: Search, workers: int, progress: "_Progress"
) -> None:
    context = multiprocessing.get_context("spawn")
    known_failures = len(_errors(study))

    def start() -> BaseProcess:
        process = context.Process(target=_worker, args=(url, study.study_name, experiment, search))
        process.start()
        return process

    pool = [start() for _ in range(workers)]
    restarts = 0
    try:
        while True:
            progress.show(study, search)
            for process in [process for process in pool if process.exitcode]:
                errors = _errors(study)
                if len(errors) > known_failures:
                    raise RuntimeError(f"a run failed; finished runs are kept in the ledger.\n{errors[-1]}")
                if restarts == RESTARTS:
                    raise RuntimeError(
                        f"worker processes were killed {restarts + 1} times (exit {process.exitcode}), out of memory "
                        "perhaps; finished runs are kept in the ledger: run again with fewer workers"
                    )
                restarts += 1
                pool[pool.index(process)] = start()
            alive = [process.sentinel for process in pool if process.is_alive()]
            if not alive and not any(process.exitcode for process in pool):
                return
            multiprocessing.connection.wait(alive, timeout=1.0)
    finally:
        for process in pool:
            process.terminate()
            process.join()


def _errors(study: optuna.Study) -> list[str]:
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return [trial.user_attrs["error"] for trial in failed if "error" in trial.user_attrs]


# -- progress


class _Progress:
    """A bar with an ETA on a terminal, a plain line now and then elsewhere. Runs are weighed by their loop count."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(desc=name, unit="loop", disable=not self.terminal, bar_format=BAR)
        self.started = self.printed = time.monotonic()
        self.at_start: int | None = None
        self.ended = False

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def show(self, study: optuna.Study, search: Search) -> None:
        _, unfinished, wanted = _open_runs(study, search)
        total, left = _weight(wanted), _weight(unfinished)
        made = total - left
        if self.at_start is None:
            self.at_start = self.bar.initial = made
        if self.terminal:
            self.bar.total, self.bar.n = total, made
            self.bar.set_postfix_str(f"{len(wanted) - len(unfinished)} of {len(wanted)} runs")
        elif not self.ended and (time.monotonic() - self.printed >= PLAIN_EVERY or (not left and made > self.at_start)):
            self.printed, self.ended = time.monotonic(), not left
            spent = self.printed - self.started
            rate = (made - self.at_start) / spent if spent else 0.0
            eta = f", about {left / rate:.0f} s left" if rate and left else ""
            done = f"{len(wanted) - len(unfinished)} of {len(wanted)} runs"
            print(f"{self.name}: {done}, {spent:.0f} s{eta}", file=sys.stderr, flush=True)


BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"


def _weight(runs: Iterable[Run]) -> int:
    return sum(run.loops for run in runs)
