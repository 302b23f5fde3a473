"""The ledger: an Optuna study that holds every finished run once, and who is making which. Its only writer.

A run is claimed by creating a trial for it. The storage numbers trials in the order in which they become visible, so
of several that claim one run the first has it, and the others, who all see it, withdraw. Who makes a run counts up in
its trial; where the count stands still for `GRACE` seconds that somebody watched, the run is open again.
"""

import contextlib
import json
import random
import secrets
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import IntegrityError, InterfaceError, InternalError, OperationalError, ProgrammingError

from looptransfer.errors import InputError, LedgerError, explained_in
from looptransfer.rules import RULES
from looptransfer.text import without_password, without_secrets
from looptransfer.transfer.provenance import fingerprint
from looptransfer.transfer.studies import (
    IDENTITY,
    JOURNAL,
    READS,
    REQUEST,
    SWEEP,
    StudyTrial,
    database,
    journal_file,
    requests_of,
    row_of,
    sqlite_file,
    trials_of,
)
from looptransfer.trials.identity import check_identity, check_probe
from looptransfer.trials.run import Outcome, Run

HEARTBEAT, GRACE = 5.0, 30.0  # seconds between signs of life, and without one until a run is open again
LOOK = 2.0  # seconds that one look at a count that stands still is worth, at most: the observer may have slept
PATIENCE = 300.0  # seconds for which a storage that does not answer is asked again
OPENING = 10.0  # the same for a server that never answered yet: its address may be wrong
BUSY = 20.0  # seconds that SQLite waits for a lock before it says so
TARGET = "target"  # attribute of the study: how the experiment is named on a command line
FOLDER = "folder"  # attribute of the study: the folder of its runs, within `runs_directory`. A new ledger has a new one
PROBE = "probe "  # begins the attributes that hold how a training starts
SHARED_DISKS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "fuse.sshfs", "afs")

Result = TypeVar("Result")


@dataclass
class Making:
    """A run that somebody makes: its trial, how far its maker has counted, and for how long nobody saw it count on."""

    run: Run
    trial: int
    count: int
    first_seen: float
    silence: float = 0.0
    is_slow: bool = False  # which was told


@dataclass(frozen=True)
class Claim:
    """A run that is this process's to make."""

    run: Run
    trial: int
    number: int


class Ledger:
    """A study, what is finished, failed and being made in it, and the ways to change that.

    Every call answers, or raises after minutes of trying again.

    Attributes:
        finished: the row of every finished run.
        losses: its loss.
        failed: errors of runs that failed in trials with an id above `since`, such as those since it was opened.
        settled: finished and failed runs in the order in which they became so.
        making: trial number -> what is being made.

    Args:
        place: a SQLite file, a URL such as postgresql://user@host/database#study, or journal:///path/to/file.
        name: of the study; default what stands behind # in the URL, or "sweep".
        create: make a study that is not there.
        since: the id of the trial after which failures count; default the last one there is.

    Raises:
        InputError: the storage cannot be opened, or the study is not a ledger.
        LedgerError: the storage does not answer.
    """

    def __init__(self, place: str | Path, name: str = "", create: bool = True, since: int | None = None) -> None:
        url, _, named = str(place).partition("#") if "://" in str(place) else (str(place), "", "")
        self.url, self.name = url, name or named or SWEEP
        self.shown = without_password(url)
        self.finished: dict[Run, dict[str, Any]] = {}
        self.losses: dict[Run, float] = {}
        self.failed: dict[Run, str] = {}
        self.making: dict[int, Making] = {}
        self.settled: list[Run] = []
        self._read, self._looked = -1, time.monotonic()
        self.study = self._opened(create)
        self.identity: dict[str, Any] | None = None
        self.since = sys.maxsize if since is None else since
        self._reread()
        self.since = self._read if since is None else since

    # -- opening

    def _opened(self, create: bool) -> optuna.Study:
        journal = journal_file(self.url)
        file = sqlite_file(self.url) if journal is None else None
        if not create and not Path(journal or file or ".").exists():
            raise InputError(f"there is no ledger {self.shown}; tune and sweep begin one")
        if file is not None:
            _check_file(file)
            _warn_of_shared(file, self.shown)
        if journal is not None:
            _check_file(Path(journal))
        server = journal is None and file is None
        patience = min(PATIENCE, OPENING) if server else PATIENCE
        try:
            study = self._try(lambda: self._study(file, create), patience, (IntegrityError, ProgrammingError))
        except InputError:
            raise
        except Exception as error:
            why = without_secrets(str(error), self.url).partition("\n")[0]
            raise InputError(
                f"cannot open the ledger {self.shown}: {why}; give a SQLite file of looptransfer's own"
            ) from error
        if study.directions != [StudyDirection.MINIMIZE]:
            raise InputError(
                f"the study {self.name} of {self.shown} has {len(study.directions)} objectives, or is maximized: it is "
                "no ledger; choose another name or file"
            )
        return study

    def _study(self, file: Path | None, create: bool) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage: Any
        if file is not None:
            options = {"creator": _connector(file), "poolclass": sqlalchemy.pool.QueuePool}
            storage = database("sqlite://", engine_kwargs=options)
            sqlalchemy.event.listen(storage.engine, "begin", _begin)
        elif (journal := journal_file(self.url)) is not None:
            storage = JournalStorage(JournalFileBackend(journal))
        else:
            storage = database(self.url, engine_kwargs={"pool_pre_ping": True})
        names = optuna.get_all_study_names(storage)
        if not create and self.name not in names:
            raise InputError(f"{self.shown} has no study {self.name!r}; it has {', '.join(map(repr, names)) or 'none'}")
        return optuna.create_study(storage=storage, study_name=self.name, load_if_exists=True)

    def _try(
        self, call: Callable[[], Result], patience: float | None = None, also: tuple[type[Exception], ...] = ()
    ) -> Result:
        """The result of a call, made again while the storage does not answer.

        Args:
            call: what reads or writes; made twice it must do no harm.
            patience: seconds.
            also: further errors that pass, such as those of processes that set up one database together.
        """
        patience = PATIENCE if patience is None else patience
        end, pause = time.monotonic() + patience, 0.05
        tell_at: float | None = time.monotonic() + 2.0  # a lock that passes at once is no news
        while True:
            try:
                return call()
            except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError, ValueError) as error:
                cause = _cause(error)
                torn = journal_file(self.url) is not None and isinstance(cause, ValueError)  # a line being written
                if isinstance(cause, InputError) or not (torn or isinstance(cause, (*PASSING, *also))):
                    raise
                why = without_secrets(str(getattr(cause, "orig", cause)), self.url).strip().partition("\n")[0]
                left = end - time.monotonic()
                if left <= 0:
                    raise LedgerError(
                        f"the ledger {self.shown} does not answer: {why}; finished runs are kept, and the same call "
                        "goes on from there once it does"
                    ) from error
                wait = min(pause * random.uniform(0.5, 1.5), max(left, 0.01))
                if tell_at is not None and time.monotonic() + wait > tell_at:
                    tell_at = None
                    print(
                        f"looptransfer: the ledger {self.shown} does not answer: {why}; trying for {left:.0f} s more",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(wait)
                pause = min(2 * pause, 5.0)

    # -- whose it is

    @explained_in("cluster.md#what-a-ledger-belongs-to")
    def admit(
        self,
        identity: Mapping[str, Any],
        probes: Mapping[Run, Mapping[str, Any]],
        probe: Callable[[Run], Mapping[str, Any]] | None = None,
        target: str | None = None,
    ) -> None:
        """See that the study is of this training, measured by how it starts; a new study becomes it.

        Args:
            identity: what the training says of itself, JSON values.
            probes: how runs were seen to start, as `Trainable.probe` has it; their LR is no matter.
            probe: starts a run, for when the ledger knows none of those.
            target: what is trained as it is called on a command line, for workers that join.

        Raises:
            InputError: it is of another.
        """
        declared = json.loads(json.dumps(identity))
        self._reread()  # another process may have begun it meanwhile
        if self.identity is None:
            self._begin(declared)
        assert self.identity is not None
        remarks = check_identity(self.shown, self.identity, declared)
        stored = {key: value for key, value in self.attributes.items() if key.startswith(PROBE)}
        measured = {_probe_key(run): dict(values) for run, values in probes.items()}
        if probe is not None and stored and not stored.keys() & measured.keys():
            key = min(stored)
            measured[key] = dict(probe(Run(**json.loads(key.removeprefix(PROBE)), lr=1.0)))
        for key, values in measured.items():
            if key in stored:
                moment = f"N = {json.loads(key.removeprefix(PROBE))['loops']}"
                remarks += check_probe(self.shown, moment, stored[key], json.loads(json.dumps(values)))
        for key in measured.keys() - stored.keys():
            self._set(key, measured[key])
        if target is not None and self.attributes.get(TARGET) != target:
            self._set(TARGET, target)
        if remarks:
            print(
                f"looptransfer: the ledger {self.shown} was begun elsewhere ({'; '.join(remarks)}): as far as "
                "is seen trainings start the same but for rounding, so its runs are used",
                file=sys.stderr,
            )

    def _begin(self, identity: Mapping[str, Any]) -> None:
        if self._read >= 0:
            raise InputError(
                f"the study {self.name} of {self.shown} has trials that looptransfer did not make; choose another "
                "name or file"
            )
        self._set(FOLDER, secrets.token_hex(4))
        self._set(IDENTITY, json.dumps(identity, sort_keys=True))
        self._reread()

    def _reread(self) -> None:
        self.attributes = self._try(lambda: dict(self.study.user_attrs))
        if self.identity is None:
            self.identity = json.loads(self.attributes[IDENTITY]) if IDENTITY in self.attributes else None
            self._read = -1
        self.refresh()

    def ask(self, request: Mapping[str, Any]) -> None:
        """Keep what was asked for, by which a reader knows the runs of a sweep and a joining worker what to make."""
        text = json.loads(json.dumps(request))
        if text not in requests_of(self.attributes):
            self._set(f"{REQUEST}{len(requests_of(self.attributes)):04d} {fingerprint(text)}", text)

    @property
    def directory(self) -> Path:
        """The folder that holds a directory for every run."""
        return runs_directory(self.url) / str(self.attributes[FOLDER])

    @property
    def requests(self) -> list[dict[str, Any]]:
        """All that was asked for."""
        return requests_of(self.attributes)

    def _set(self, key: str, value: Any) -> None:
        self._try(lambda: self.study.set_user_attr(key, value))
        self.attributes[key] = value

    # -- runs

    def refresh(self) -> None:
        """Take up what has changed; a run whose maker stands still is open again."""
        ids = [making.trial for making in self.making.values()]
        trials = self._try(lambda: trials_of(self.study, self._read, ids))
        looked = time.monotonic()
        passed, self._looked = min(looked - self._looked, LOOK), looked
        for trial in trials:
            self._take(trial, passed, looked)
        for number in [number for number, making in self.making.items() if making.silence > GRACE]:
            self.release(number)

    def _take(self, trial: StudyTrial, passed: float, looked: float) -> None:
        self._read = max(self._read, trial.id)
        before = self.making.pop(trial.number, None)
        place = trial.attributes.get("run")
        if self.identity is None or place is None:
            return
        run = Run(**place)
        if trial.state == "RUNNING":
            making = before or Making(run, trial.id, -1, looked)
            count = int(trial.attributes.get("count", 0))
            making.silence = making.silence + passed if count == making.count else 0.0
            making.count = count
            self.making[trial.number] = making
        elif trial.state == "COMPLETE" and run not in self.finished:
            self.finished[run] = row_of(trial, self.identity)
            self.losses[run] = float(self.finished[run]["loss"])
            self.settled.append(run)
            self.failed.pop(run, None)
        elif trial.state == "FAIL" and "error" in trial.attributes and trial.id > self.since:
            self.failed[run] = str(trial.attributes["error"])
            self.settled.append(run)

    def claim(self, run: Run) -> Claim | None:
        """Take an open run to make; None where somebody else has it."""
        template = create_trial(state=TrialState.RUNNING, user_attrs={"run": asdict(run)})
        trial = self._try(lambda: self.study._storage.create_new_trial(self.study._study_id, template))
        self.refresh()
        number = next((number for number, making in self.making.items() if making.trial == trial), None)
        if number is None:  # somebody saw it stand still: this process slept
            return None
        if run in self.finished or any(other < number and making.run == run for other, making in self.making.items()):
            self.making.pop(number, None)
            self._end(trial, TrialState.PRUNED)
            return None
        return Claim(run, trial, number)

    def finish(self, claim: Claim, outcome: Outcome) -> None:
        """Keep what a run came to; where this process slept while it made it, only if nobody else has the run."""
        self._note(claim.trial, "outcome", asdict(outcome))
        if self._end(claim.trial, TrialState.COMPLETE, outcome.loss):
            return
        self.refresh()  # it was given up, or it was finished and the storage's answer was lost
        again = None if claim.run in self.finished else self.claim(claim.run)
        if again is not None:
            self._note(again.trial, "outcome", asdict(outcome))
            self._end(again.trial, TrialState.COMPLETE, outcome.loss)

    def fail(self, claim: Claim, error: str) -> None:
        """Keep why a run could not be made."""
        self._note(claim.trial, "error", error)
        self._end(claim.trial, TrialState.FAIL)

    def release(self, number: int, error: str | None = None) -> None:
        """End a run that somebody else was making; it is open again unless there is an error to keep."""
        making = self.making.get(number)
        if making is None:
            return
        if error is not None:
            self._note(making.trial, "error", error)
        if not self._end(making.trial, TrialState.FAIL):
            return  # it ended meanwhile, as the next look will tell
        del self.making[number]
        if error is not None:
            self.failed[making.run] = error
            self.settled.append(making.run)

    def _note(self, trial: int, key: str, value: Any) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self._try(lambda: self.study._storage.set_trial_user_attr(trial, key, value))

    def _end(self, trial: int, state: TrialState, loss: float | None = None) -> bool:
        """End a trial, if it has not ended."""
        values = None if loss is None else [loss]
        try:
            self._try(lambda: self.study._storage.set_trial_state_values(trial, state, values))
        except UpdateFinishedTrialError:
            return False
        return True

    @contextlib.contextmanager
    def counting(self, claim: Claim) -> Iterator[None]:
        """Show meanwhile what this process makes, by the trial's parameters, and that it lives, by a count in it."""
        over = threading.Event()

        def count() -> None:
            storage, number = self.study._storage, 0
            with contextlib.suppress(Exception):  # only dashboards miss them
                for name, distribution in _distributions(claim.run).items():
                    value = distribution.to_internal_repr(getattr(claim.run, name))
                    storage.set_trial_param(claim.trial, name, value, distribution)
            while not over.wait(HEARTBEAT):
                number += 1
                with contextlib.suppress(Exception):  # the storage may be away; the next one tells as much
                    storage.set_trial_user_attr(claim.trial, "count", number)
            with contextlib.suppress(Exception):
                storage.remove_session()

        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def absolute(place: str | Path) -> str:
    """A ledger's file or URL, which names the same one from every working directory."""
    url, mark, study = str(place).partition("#") if "://" in str(place) else (str(place), "", "")
    if (journal := journal_file(url)) is not None:
        url = JOURNAL + str(Path(journal).absolute())
    elif (file := sqlite_file(url)) is not None and file.name:
        path = str(file.absolute())
        url = sqlalchemy.make_url(url).set(database=path).render_as_string(False) if "://" in url else path
    return url + mark + study


def runs_directory(place: str | Path) -> Path:
    """The folder that holds the runs' own directories: beside the ledger, or here where the ledger is on a server."""
    file = journal_file(place) or sqlite_file(place) or "looptransfer"
    return Path(file).absolute().with_suffix(".runs")


PASSING = (OperationalError, InterfaceError, InternalError, sqlite3.OperationalError, OSError)


def _cause(error: BaseException) -> BaseException:
    """The driver's own error, below the one that Optuna raised."""
    return error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error


def _probe_key(run: Run) -> str:
    return PROBE + json.dumps({"rule": run.rule, "loops": run.loops, "seed": run.seed})


def _distributions(run: Run) -> dict[str, BaseDistribution]:
    """The coordinates as parameters, for dashboards to plot."""
    return {
        "rule": CategoricalDistribution(list(RULES)),
        "loops": IntDistribution(run.loops, run.loops),
        "lr": FloatDistribution(run.lr, run.lr),
        "seed": IntDistribution(run.seed, run.seed),
    }


def _connector(file: Path) -> Callable[[], sqlite3.Connection]:
    path = str(file.absolute())
    return lambda: sqlite3.connect(path, timeout=BUSY, check_same_thread=False, isolation_level=None)


def _begin(connection: sqlalchemy.Connection) -> None:
    """Begin a transaction of SQLite so that what it writes rests on what it reads, as in other databases."""
    reads = connection.get_execution_options().get(READS)
    connection.exec_driver_sql("begin" if reads else "begin immediate")


def _check_file(file: Path) -> None:
    """See that a file can be written, and make its folder."""
    path = file.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write the ledger {path}: {error.strerror}; choose a folder you may write to"
        ) from None


def _warn_of_shared(file: Path, shown: str) -> None:
    """Warn of SQLite on a shared disk, where its locks may not hold."""
    path = file.absolute()
    kind = _disk(path)
    if kind.startswith(SHARED_DISKS):
        warnings.warn(
            f"the ledger {shown} lies on a shared disk ({kind}), where SQLite's locks may not hold; give "
            f"--ledger journal://{path}, or PostgreSQL",
            UserWarning,
            stacklevel=7,
        )


def _disk(path: Path) -> str:
    """The kind of file system that a file lies on, where Linux tells."""
    kind, longest = "", 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
            _, folder, name = line.split(" ")[:3]
            if len(folder) > longest and (path.is_relative_to(folder) or folder == "/"):
                kind, longest = name, len(folder)
    return kind
