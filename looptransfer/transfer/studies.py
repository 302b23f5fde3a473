"""Optuna studies as tables: somebody else's by their trials, a ledger of ours by the runs that were asked of it.

Only read. What a ledger holds is written by `trials.ledger` alone, in the form that is read here.
"""

import contextlib
import importlib.util
import json
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from looptransfer.errors import InputError
from looptransfer.files import PATIENCE, open_file
from looptransfer.text import without_password
from looptransfer.transfer.provenance import fingerprint

SWEEP = "sweep"  # the study of a ledger, where none is named
IDENTITY, REQUEST = "identity", "request "  # attributes of a study of ours; more than one request may stand there
READS = "looptransfer_reads"  # option of a connection that writes nothing
JOURNAL = "journal://"  # begins the URL of a file of Optuna's journal
Key = tuple[str, int, float, int]  # rule, loops, lr, seed
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class StudyTrial:
    """A trial of a study; `state` is Optuna's word, such as COMPLETE."""

    id: int
    number: int
    state: str
    value: float | None
    attributes: Mapping[str, Any]


def trials_of(study: Any, after: int = -1, ids: Collection[int] = ()) -> list[StudyTrial]:
    """The trials with an id above `after`, and those of `ids`, in the order of their numbers.

    Read past Optuna's own objects, which take a millisecond each.
    """
    engine = getattr(getattr(study._storage, "_backend", None), "engine", None)
    if engine is None:  # a journal, which lies in memory
        return [
            StudyTrial(trial._trial_id, trial.number, trial.state.name, trial.value, trial.user_attrs)
            for trial in study.get_trials(deepcopy=False)
            if trial._trial_id > after or trial._trial_id in ids
        ]
    from optuna.storages._rdb.models import TrialModel, TrialUserAttributeModel, TrialValueModel  # noqa: PLC0415
    from sqlalchemy import or_, select  # noqa: PLC0415

    def rows(connection: Any, model: Any, *columns: Any) -> Any:
        query = select(model.trial_id, *columns).where(TrialModel.study_id == study._study_id)
        if model is not TrialModel:
            query = query.join(TrialModel, TrialModel.trial_id == model.trial_id)
        if after >= 0:
            query = query.where(or_(model.trial_id > after, model.trial_id.in_(ids)))
        return connection.execute(query).all()

    with engine.connect().execution_options(**{READS: True}) as connection:
        trials = rows(connection, TrialModel, TrialModel.number, TrialModel.state)
        values = rows(connection, TrialValueModel, TrialValueModel.value, TrialValueModel.value_type)
        attributes = rows(
            connection, TrialUserAttributeModel, TrialUserAttributeModel.key, TrialUserAttributeModel.value_json
        )
    value_of = {trial: TrialValueModel.stored_repr_to_value(value, kind) for trial, value, kind in values}
    attributes_of: dict[int, dict[str, Any]] = {}
    for trial, key, text in attributes:
        attributes_of.setdefault(trial, {})[key] = json.loads(text)
    return sorted(
        (
            StudyTrial(trial, number, state.name, value_of.get(trial), attributes_of.get(trial, {}))
            for trial, number, state in trials
        ),
        key=lambda trial: trial.number,
    )


# -- what a ledger holds


def requests_of(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The requests made of a ledger, by the attributes of its study; each says its `kind`, "sweep" or "tune"."""
    return [value for key, value in attributes.items() if key.startswith(REQUEST)]


def asked(request: Mapping[str, Any]) -> Iterator[tuple[Key, Key]]:
    """The runs that a sweep asked for, each with the run that it is stored as: of another rule where both share it."""
    left_out = {tuple(run) for run in request["without"]}
    for (rule, loops, stored), lr, seed in product(request["cells"], request["lrs"], request["seeds"]):
        if (rule, loops, lr, seed) not in left_out:
            yield (rule, loops, lr, seed), (stored, loops, lr, seed)


def expanded(requests: Iterable[Mapping[str, Any]], finished: Mapping[Key, Mapping[str, Any]]) -> tuple[Rows, int]:
    """A row for every finished run that was asked for, under the rule it was asked for; and how many are missing."""
    pairs = dict(pair for request in requests for pair in asked(request))
    rows = [{**finished[stored], "rule": run[0]} for run, stored in pairs.items() if stored in finished]
    return rows, len(pairs) - len(rows)


def row_of(trial: StudyTrial, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """The row of a trial: its run, its value as the loss, and in a ledger the fingerprint of the experiment."""
    run = {**(trial.attributes.get("run") or {}), **trial.attributes.get("outcome", {})}
    origin = {} if identity is None else {"fingerprint": fingerprint(identity)}
    return {**(run or trial.attributes), "loss": trial.value, **origin}


# -- reading a study


def read_study(place: str, name: str, shown: str) -> tuple[Rows, dict[str, Any]]:
    """A row per trial, or per run that was asked of a ledger, with its state; and what is known of the study.

    Args:
        place: the URL of a storage.
        name: of the study; may be left out where there is one, or a ledger.
        shown: the place, for an error.
    """
    import optuna  # noqa: PLC0415

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _opened(place, shown) as storage:
        names = optuna.get_all_study_names(storage)
        name = name or (SWEEP if SWEEP in names else names[0] if len(names) == 1 else "")
        if name not in names:
            listed = ", ".join(map(repr, names)) or "none"
            raise InputError(f"{shown} has the studies {listed}; name one by #NAME behind it")
        return _rows(optuna.load_study(study_name=name, storage=storage), shown)


def _rows(study: Any, shown: str) -> tuple[Rows, dict[str, Any]]:
    if len(study.directions) > 1:
        raise InputError(f"{shown} has {len(study.directions)} objectives; give a study of one")
    attributes = study.user_attrs
    identity = json.loads(attributes[IDENTITY]) if IDENTITY in attributes else None
    trials = _their_trials(study) if identity is None else trials_of(study)
    if not trials:
        raise InputError(f"the study {study.study_name} of {shown} has no rows: it has no trial; run it first")
    if [trial.number for trial in trials] != list(range(len(trials))):
        raise InputError(f"{shown} is damaged: trials are missing; restore it from a copy")
    rows, missing = [{**row_of(trial, identity), "state": trial.state} for trial in trials], 0
    sweeps = [request for request in requests_of(attributes) if request["kind"] == "sweep"]
    if sweeps:
        finished = {_key(row): row for row in rows if row["state"] == "COMPLETE"}
        rows, missing = expanded(sweeps, finished)
        if not rows:
            raise InputError(f"the study {study.study_name} of {shown} has no rows: no run is finished yet")
    about: dict[str, Any] = {"study": study.study_name, "maximize": study.direction.name == "MAXIMIZE"}
    if identity is not None:
        about["experiment"] = identity
    if missing:
        about["left_out"] = f"{missing} of {missing + len(rows)} runs that were asked for are not finished"
    return rows, about


def _key(row: Mapping[str, Any]) -> Key:
    return row["rule"], row["loops"], row["lr"], row["seed"]


def _their_trials(study: Any) -> list[StudyTrial]:
    return [
        StudyTrial(t._trial_id, t.number, t.state.name, t.value, {**t.user_attrs, **t.params})
        for t in study.get_trials(deepcopy=False)
    ]


def journal_file(place: str | Path) -> str | None:
    """The file of a URL such as journal:///path/to/runs.log, or None."""
    return str(place)[len(JOURNAL) :] if str(place).startswith(JOURNAL) else None


def sqlite_file(place: str | Path) -> Path | None:
    """The file of a plain path or of a SQLite URL, or None of another.

    Raises:
        InputError: a URL that is none.
    """
    if "://" not in str(place):
        return Path(place)
    from sqlalchemy import make_url  # noqa: PLC0415

    password = re.search(r"://[^:/@?]*:(.*)@", str(place))  # as `without_password` has it
    try:
        address = make_url(str(place))
        if password is not None and unquote(password[1]) != address.password:
            raise ValueError
    except Exception:
        raise InputError(
            f"{without_password(str(place))} is no URL of a database; write signs such as @ and / in a password as %40 "
            "and %2F"
        ) from None
    return Path(address.database or "") if address.get_backend_name() == "sqlite" else None


def database(url: str, **options: Any) -> Any:
    """Optuna's storage in a database. It reads braces in a URL as a place to fill in."""
    import optuna  # noqa: PLC0415

    if importlib.util.find_spec("psycopg2") is None:  # which SQLAlchemy takes where no driver is named
        url = re.sub(r"^postgresql:", "postgresql+psycopg:", url)
    return optuna.storages.RDBStorage(url.replace("{", "{{").replace("}", "}}"), **options)


@contextlib.contextmanager
def _opened(place: str, shown: str) -> Iterator[Any]:
    """A storage that is not written to."""
    journal = journal_file(place)
    if journal is not None:
        from optuna.storages.journal import JournalFileBackend, JournalStorage  # noqa: PLC0415

        if not Path(journal).is_file():
            raise InputError(f"cannot read {shown}: there is no such file")  # Optuna would make it
        yield JournalStorage(JournalFileBackend(journal))
        return
    file = sqlite_file(place)
    url, options = place, dict[str, Any]()
    if file is not None:
        url, options = "sqlite://", {"creator": _reader(file, shown)}
    elif place.startswith("postgresql"):
        options = {"execution_options": {"postgresql_readonly": True}}
    storage = database(url, engine_kwargs=options, skip_table_creation=True)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _reader(file: Path, shown: str) -> Callable[[], sqlite3.Connection]:
    """A function that opens a SQLite file for reading; the file has been looked over."""
    if not file.is_file():
        raise InputError(f"cannot read {shown}: there is no such file")  # SQLite would make it

    with open_file(file) as stream:
        by_log = stream.read(19)[18:] == b"\x02"
    # One that keeps a log and has none is open nowhere; told so, SQLite leaves no new log behind.
    how = "mode=ro&immutable=1" if by_log and not Path(f"{file}-wal").exists() else "mode=ro"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(f"{file.resolve().as_uri()}?{how}", uri=True, timeout=PATIENCE, check_same_thread=False)

    try:
        with contextlib.closing(connect()) as opened:
            verdict = str(opened.execute("pragma integrity_check(1)").fetchone()[0])
    except sqlite3.OperationalError as error:
        if "readonly" not in str(error):
            raise
        raise InputError(
            f"{shown} was left in the middle of a write by a process that was killed; what writes it, such as "
            "sweep, puts that right when it is run again"
        ) from None
    if verdict != "ok":
        raise InputError(f"{shown} is damaged: {verdict.splitlines()[0]}; restore it from a copy")
    return connect
