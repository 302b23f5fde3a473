"""Where a table of runs comes from: CSV, JSON lines, Parquet, an Optuna study, our ledger, a tracker's export."""

import json
import sqlite3
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from looptransfer.errors import InputError
from looptransfer.transfer.results import fingerprint, tidy

SWEEP = "sweep"  # the study of a ledger that holds its sweep
FORMATS = "CSV, JSON lines (.jsonl), Parquet, or an Optuna study such as sqlite:///file.db#study"
SQLITE = b"SQLite format 3\0"


def read_results(source: str | Path, columns: Mapping[str, str] | None = None, axis: str = "loops") -> pd.DataFrame:
    """Read a table of runs and check it as `tidy` does; a row in an error is the line of the file, or the trial.

    Args:
        source: a .csv, .jsonl or .parquet file, a ledger, or the URL of an Optuna study with #NAME behind it. Objects
            within the lines of a .jsonl file give columns with dots, such as config.lr.
        columns: what a needed column is called there, such as {"lr": "config.lr", "loss": "summary.val_loss"}.
        axis: the column that plays the part of N.

    Raises:
        InputError: the source cannot be read, a column is not there, or `tidy` refuses what it holds.
    """
    frame = _renamed(_read(str(source)), columns or {})
    table = tidy(frame, axis)
    table.attrs |= {**frame.attrs, "source": str(source)}
    return table


def _read(source: str) -> pd.DataFrame:
    file, _, name = source.partition("#")
    if "://" in source:
        return _study(file, name, source)
    path = Path(source) if Path(source).exists() else Path(file)
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}; give {FORMATS}") from None
    if head == SQLITE:
        return _study(f"sqlite:///{path.resolve()}", name, source)
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet,
    }  # fmt: skip
    return readers.get(path.suffix.lower(), _csv)(path)


def _renamed(frame: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    missing = [name for name in columns.values() if name not in frame.columns]
    if missing:
        there = ", ".join(str(name)[:60] for name in frame.columns[:60])
        raise InputError(f"there is no column {missing[0]}; there are {there}")
    hidden = [name for name in columns if name in frame.columns and columns[name] != name]
    renamed = frame.drop(columns=[name for name in hidden if name not in columns.values()])
    return renamed.rename(columns={there: name for name, there in columns.items()})


def _csv(path: Path) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            frame = pd.read_csv(
                path,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
                skip_blank_lines=False,
                index_col=False,
                compression=None,
            )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give {FORMATS}") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table: {str(error).strip()[:300]}; give {FORMATS}") from None
    frame.columns = [str(name).strip() for name in frame.columns]
    if len(frame.columns) == 1 and any(mark in frame.columns[0] for mark in ";\t"):
        raise InputError(f"{path} is separated by {';' if ';' in frame.columns[0] else 'tabs'}; save it with commas")
    frame.index += 2  # the line in the file
    return frame[(frame != "").any(axis=1)]


def _json_lines(path: Path) -> pd.DataFrame:
    rows: dict[int, dict[str, Any]] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number} holds no JSON object; write one object per run and line")
                rows[number] = row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}; give {FORMATS}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}, line {number} is not JSON: {error}; write one object per run and line") from None
    frame = pd.json_normalize(list(rows.values()))
    frame.index = pd.Index(list(rows))
    return frame


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError:
        raise InputError("reading Parquet needs pyarrow; run: pip install 'looptransfer[parquet]'") from None
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{path} is not a Parquet table: {str(error)[:300]}; give {FORMATS}") from None


def _study(url: str, name: str, source: str) -> pd.DataFrame:
    """A row per finished trial: its attributes, its parameters and its value as the loss."""
    import optuna  # noqa: PLC0415

    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        raise InputError(f"cannot read {source}: there is no such file; give {FORMATS}")  # SQLite would make it
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = optuna.storages.RDBStorage(url)
        names = optuna.get_all_study_names(storage)
    except (Exception, sqlite3.Error) as error:
        raise InputError(f"{source} is no Optuna storage: {str(error)[:300]}; give {FORMATS}") from None
    wanted = name or (SWEEP if SWEEP in names else names[0] if len(names) == 1 else "")
    if wanted not in names:
        there = ", ".join(map(repr, names)) or "none"
        raise InputError(f"{source} has the studies {there}; name one by #NAME behind it")
    study = optuna.load_study(study_name=wanted, storage=storage)
    frame = finished_trials(study)
    left = len(study.get_trials(deepcopy=False)) - len(frame)
    if left:
        frame.attrs["left_out"] = (
            f"{left} trials that failed, were pruned or still run are left out; a run that diverged should end with "
            "the value inf"
        )
    return frame


def finished_trials(study: Any) -> pd.DataFrame:
    """A row per finished trial of an Optuna study: its coordinates, what came of it, and its value as the loss.

    In a study of ours also the fingerprint of the experiment, whose identity is in the frame's attrs.
    """
    identity = study.user_attrs.get("identity")
    known = {} if identity is None else {"fingerprint": fingerprint(json.loads(identity))}
    rows = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "COMPLETE":
            ours = {**trial.user_attrs.get("run", {}), **trial.user_attrs.get("outcome", {})}
            rows[trial.number] = {**(ours or {**trial.user_attrs, **trial.params}), "loss": trial.value, **known}
    frame = pd.DataFrame(list(rows.values()), index=pd.Index(list(rows)))
    if identity is not None:
        frame.attrs["experiment"] = json.loads(identity)
    return frame
