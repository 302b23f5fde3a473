"""The ledger of trials, an Optuna study in SQLite, and the worker processes that fill it.

There is no planner process and no queue: every worker asks the search what is wanted, leaves out what is finished or
running, and takes the next. A worker that dies leaves a trial without heartbeat, whose run is then open again. A run
that fails is told at the end, when the others are made.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import pickle
import random
import secrets
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import optuna
import pandas as pd
from optuna.exceptions import ExperimentalWarning, TrialPruned, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from looptransfer.errors import FailedRunError, InputError
from looptransfer.rules import RULES
from looptransfer.text import without_password, without_secrets
from looptransfer.transfer.results import COLUMNS
from looptransfer.transfer.sources import finished_trials
from looptransfer.trials.devices import Slot, environment, here, slots
from looptransfer.trials.run import Run, Trainable, pickled
from looptransfer.trials.search import Search
from looptransfer.user_code import UNGUARDED, WORKER, end_with_parent, user_code

HEARTBEAT, GRACE = 5, 30  # seconds between signs of life, and without one until a run is open again
HOPELESS = 2  # failed runs after which a loop count of which none is finished is given up
RESTARTS = 3  # workers that may be killed from outside before a sweep gives up
KILLED = (-9, -15)  # exit codes of a process that was killed from outside
LEAVE = 5.0  # seconds that workers have to end in when all is made
PLAIN_EVERY = 30.0  # seconds between progress lines where there is no terminal


def run_search(
    experiment: Trainable,
    search: Search,
    ledger: str | Path,
    name: str,
    workers: int | None = None,
    devices: str | None = None,
) -> pd.DataFrame:
    """Make every run that `search` wants and the ledger lacks; return all finished runs of the study `name`.

    Interrupted by anything, kill -9 included, it goes on where it was when called again: a finished run is never
    repeated. Worker processes fill the machine, as `devices.slots` says; `workers=1` trains in this process, and so
    does the default where the experiment cannot be sent to another one. A run that fails is left out, and tried again
    by the next call.

    Raises:
        InputError: the ledger cannot be opened or belongs to another experiment; or the experiment cannot be sent to
            workers.
        FailedRunError: runs failed, or a worker process ended by itself or was killed again and again.
    """
    places = slots(devices, workers)
    url = _url(ledger)
    study = _open(url, name, experiment.identity())
    if DIRECTORY not in study.user_attrs:
        study.set_user_attr(DIRECTORY, str(runs_directory(ledger) / secrets.token_hex(4)))
    job = _Job(url, name, search, since=len(study.get_trials(deepcopy=False)))
    with _Progress(job) as progress:
        data = _sent(experiment, workers, places) if _survey(study, job).coming else None
        if data is None:
            _work(job, experiment, here(places[0]), progress=progress)
        else:
            _supervise(job, study, data, places, progress)
        progress.show(study)
    _check_complete(_survey(study, job))
    return finished_runs(study)


def _sent(experiment: Trainable, workers: int | None, places: Sequence[Slot]) -> bytes | None:
    """The experiment as worker processes are sent it; None where this process trains."""
    if len(places) == 1:
        return None
    try:
        return pickled(experiment)
    except InputError as error:
        if workers is not None:
            raise
        print(f"looptransfer: training in this process alone: {error}", file=sys.stderr)
        return None


def runs_directory(ledger: str | Path) -> Path:
    """The folder that holds the runs' own directories: beside the ledger, or here where the ledger is on a server."""
    home = Path("looptransfer") if "://" in str(ledger) else Path(ledger)
    return home.absolute().with_suffix(".runs")


def finished_runs(study: optuna.Study) -> pd.DataFrame:
    """One row per finished run, with the columns of results.csv and `last_loss`."""
    return finished_trials(study).reindex(columns=[*COLUMNS, "last_loss"]).reset_index(drop=True)


# -- the ledger

DIRECTORY = "directory"  # attribute of a study: where its runs have their directories. A new ledger has new ones


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
    """A run failed; its error stands in the ledger."""


@dataclass(frozen=True)
class _Job:
    """A search and its study. A failure among the trials before `since` is one of an earlier call."""

    url: str
    name: str
    search: Search
    since: int


@dataclass(frozen=True)
class _Survey:
    """The state of a job."""

    wanted: list[Run]
    done: list[Run]
    coming: list[Run]  # neither finished nor failed nor given up
    todo: list[Run]  # of those, what nobody makes
    failed: dict[Run, str]  # with the error


def _survey(study: optuna.Study, job: _Job) -> _Survey:
    runs: dict[TrialState, set[Run]] = {TrialState.COMPLETE: set(), TrialState.RUNNING: set()}
    failed: dict[Run, str] = {}
    for trial in study.get_trials(deepcopy=False, states=(*runs, TrialState.FAIL)):
        run = _run_of(trial)
        if run is not None and trial.state in runs:
            runs[trial.state].add(run)
        elif run is not None and trial.number >= job.since and "error" in trial.user_attrs:
            failed[run] = trial.user_attrs["error"]
    finished = runs[TrialState.COMPLETE]
    groups = {(run.rule, run.loops) for run in finished}
    failures = Counter((run.rule, run.loops) for run in failed)
    given_up = {group for group, times in failures.items() if times >= HOPELESS and group not in groups}
    wanted = list(dict.fromkeys(job.search.wanted(finished_runs(study))))
    done = [run for run in wanted if run in finished]
    left = [run for run in wanted if run not in finished and run not in failed]
    coming = [run for run in left if (run.rule, run.loops) not in given_up]
    todo = [run for run in coming if run not in runs[TrialState.RUNNING]]
    return _Survey(wanted, done, coming, todo, failed)


def _check_complete(survey: _Survey) -> None:
    missing = len(survey.wanted) - len(survey.done)
    if not missing:
        return
    message = f"{missing} of {len(survey.wanted)} runs are missing; the same call makes only what lacks"
    for run, error in list(survey.failed.items())[:1]:
        left_out = missing - len(survey.failed)
        message += f". {len(survey.failed)} failed" + f" and {left_out} more of their N were left out" * (left_out > 0)
        message += f"; {_name(run)}: {error}"
    raise FailedRunError(message)


def _name(run: Run) -> str:
    return f"{run.rule}, N = {run.loops}, LR {run.lr:.6g}, seed {run.seed}"


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


def _run_of(trial: FrozenTrial) -> Run | None:
    claim = trial.user_attrs.get("run")
    return Run(**claim) if claim else None


def _claim(study: optuna.Study, trial: optuna.Trial, job: _Job) -> Run:
    """Take an open run for `trial`: write the claim, then look for rivals, and withdraw if there is one.

    Both of two rivals write before they look, so at least one sees the other: they may both withdraw, never both stay.
    """
    while True:
        todo = _survey(study, job).todo
        if not todo:
            raise TrialPruned("every run is finished or being made")
        trial.set_user_attr("run", asdict(todo[0]))
        states = (TrialState.RUNNING, TrialState.COMPLETE)
        others = (other for other in study.get_trials(deepcopy=False, states=states) if other.number != trial.number)
        if not any(_run_of(other) == todo[0] for other in others):
            return todo[0]
        trial.set_user_attr("run", None)
        time.sleep(random.uniform(0, 0.2))


def _work(
    job: _Job,
    experiment: Trainable,
    place: Slot,
    tell: Callable[[Run], None] | None = None,
    progress: "_Progress | None" = None,
) -> None:
    """Make runs until none is open or running. This is the whole of a worker."""
    sampler = _Claimed()
    storage = _storage(job.url)
    study = optuna.load_study(storage=storage, study_name=job.name, sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        storage.record_heartbeat(
            trial._trial_id
        )  # before the claim, or a death right after it would hold the run forever
        sampler.run = run = _claim(study, trial, job)
        trial.suggest_categorical("rule", list(RULES))
        trial.suggest_int("loops", run.loops, run.loops)
        trial.suggest_float("lr", run.lr, run.lr)
        trial.suggest_int("seed", run.seed, run.seed)
        if tell is not None:
            tell(run)
        directory = Path(study.user_attrs[DIRECTORY], f"{run.rule}-n{run.loops}-lr{run.lr!r}-seed{run.seed}")
        try:
            outcome = asdict(experiment.train(place.trial(run, directory)))
        except InputError as error:
            trial.set_user_attr("error", str(error))
            raise _RunError from error
        trial.set_user_attr("outcome", outcome)
        return float(outcome["loss"])

    while True:
        survey = _survey(study, job)
        if progress is not None:
            progress.show(study)
        if not survey.coming:
            return
        if survey.todo:
            # A process that slept through its grace period finds its run given to another.
            with contextlib.suppress(UpdateFinishedTrialError):
                study.optimize(objective, n_trials=1, catch=(_RunError,))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                optuna.storages.fail_stale_trials(study)
            time.sleep(0.5)


# -- worker processes


def _worker(job: _Job, data: bytes, place: Slot, sender: Connection) -> None:
    """Entry point of a worker process. It ends with its parent; its last word is "done", or the error that ended it."""
    end_with_parent()
    try:
        fix = "; define its functions in a module that can be imported, or pass workers=1"
        with user_code("a worker process cannot load the experiment", fix=fix):
            experiment = pickle.loads(data)
            if not isinstance(experiment, Trainable):
                raise TypeError(f"it comes back as a {type(experiment).__name__}")
        _work(job, experiment, place, sender.send)
        sender.send("done")
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        sender.send(error)
    except Exception:
        sender.send(RuntimeError(traceback.format_exc()))


class _Process:
    """A worker process, and the last that was heard of it: the run that it makes, or its last word."""

    def __init__(self, job: _Job, data: bytes, place: Slot) -> None:
        context = multiprocessing.get_context("spawn")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_worker, args=(job, data, place, sender), name=WORKER)
        with environment(place.environment()):  # libraries read the number of threads when they are loaded
            self.process.start()
        sender.close()
        self.last_word: Run | Exception | Literal["done"] | None = None

    def is_lost(self) -> bool:
        """It was killed from outside.

        Raises:
            InputError: the user's code ended it.
            RuntimeError: ours did.
        """
        alive = self.process.is_alive()  # before the pipe is read, or a last word could be missed
        with contextlib.suppress(EOFError, OSError):
            while self.receiver.poll():
                self.last_word = self.receiver.recv()
        if isinstance(self.last_word, Exception):
            raise self.last_word
        code = self.process.exitcode
        if alive or self.last_word == "done":
            return False
        if code in KILLED:
            return True
        if code == 130:
            raise KeyboardInterrupt
        if code == UNGUARDED:
            raise InputError(
                "the script starts trainings when it is imported, as worker processes do; put what it does under "
                '`if __name__ == "__main__":`, or pass workers=1'
            )
        moment = f"while it trained {_name(self.last_word)}" if isinstance(self.last_word, Run) else "while it started"
        raise FailedRunError(
            f"a worker process ended with exit status {code} {moment}: the experiment, or a library that it uses, ends "
            "its process or crashes; with workers=1 the place may show"
        )


def _supervise(job: _Job, study: optuna.Study, data: bytes, places: Sequence[Slot], progress: "_Progress") -> None:
    pool = [_Process(job, data, place) for place in places]
    restarts, patience = 0, 0.0
    try:
        while _survey(study, job).coming:
            progress.show(study)
            for number, worker in enumerate(pool):
                if not worker.is_lost():
                    continue
                if restarts == RESTARTS:
                    raise FailedRunError(
                        f"worker processes were killed {restarts + 1} times (exit {worker.process.exitcode}), out of "
                        "memory perhaps; the same call makes only what lacks: run it again with fewer workers"
                    )
                restarts += 1
                pool[number] = _Process(job, data, places[number])
            if all(worker.last_word == "done" for worker in pool):
                break
            alive = [worker.process.sentinel for worker in pool if worker.process.is_alive()]
            multiprocessing.connection.wait(alive, timeout=1.0)
        patience = LEAVE
    finally:
        for worker in pool:
            worker.process.join(patience)
            worker.process.kill()
            worker.process.join()


# -- progress


class _Progress:
    """A bar with an ETA on a terminal, a plain line now and then elsewhere. Runs are weighed by their loop count."""

    def __init__(self, job: _Job) -> None:
        self.job, self.name = job, job.name
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(desc=job.name, unit="loop", disable=not self.terminal, bar_format=BAR)
        self.started = self.printed = time.monotonic()
        self.at_start: int | None = None
        self.ended = False

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def show(self, study: optuna.Study) -> None:
        survey = _survey(study, self.job)
        made, left = _weight(survey.done), _weight(survey.coming)
        finished = f"{len(survey.done)} of {len(survey.wanted)} runs"
        if self.at_start is None:
            self.at_start = self.bar.initial = made
        if self.terminal:
            self.bar.total, self.bar.n = made + left, made
            self.bar.set_postfix_str(finished)
        elif not self.ended and (time.monotonic() - self.printed >= PLAIN_EVERY or (not left and made > self.at_start)):
            self.printed, self.ended = time.monotonic(), not left
            spent = self.printed - self.started
            rate = (made - self.at_start) / spent if spent else 0.0
            eta = f", about {left / rate:.0f} s left" if rate and left else ""
            print(f"{self.name}: {finished}, {spent:.0f} s{eta}", file=sys.stderr, flush=True)


BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"


def _weight(runs: Iterable[Run]) -> int:
    return sum(run.loops for run in runs)
