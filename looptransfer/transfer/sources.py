"""Sources of a table of runs: CSV, JSON, Parquet, an Optuna study, our ledger, a tracker's export.

A table is read as it is, once and from one open stream, or not at all; nothing that is read is written to. A new format
is a function that makes a frame, chosen in `_table`; a tracker's shape of a table is made one of runs in `exports`.
"""

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd

from looptransfer.errors import InputError, explained_in
from looptransfer.files import MOST_BYTES, open_file
from looptransfer.records import unique
from looptransfer.rules import RULES
from looptransfer.text import printable, short, without_password, without_secrets
from looptransfer.transfer.exports import named, of_metric, refuse_unnamed
from looptransfer.transfer.results import COLUMNS, ROUNDED_LR, tidy
from looptransfer.transfer.rows import choose, find, listing, note, words_of
from looptransfer.transfer.studies import SWEEP, read_study

FORMATS = "give CSV, JSON (an array, or .jsonl), Parquet, or an Optuna study such as sqlite:///file.db#study"
SQLITE = b"SQLite format 3\0"
JOURNAL = b'{"op_code":'  # how the file of Optuna's journal begins
CELL = re.compile(r' *(?:"([^"]*(?:""[^"]*)*)" *|([^",]*))(,|$)')
LOGGED = re.compile(r"/|^(metrics|summary)\.")  # in the names that trackers give to what is logged in training
LONG = ("run", "tag", "step", "value")  # the columns of a table with a row per value of any metric
IMPLIED = ("lr", "loss", "seed", "rule", "diverged")
LR_NAMES = (["lr"], ["learning", "rate"])
FEWEST_LRS = 3  # values of a column that may be the LRs of a search
PACKED = {b"PK\x03\x04": "an Excel file or a ZIP archive", b"\x1f\x8b": "packed by gzip"}
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@explained_in("table.md#how-a-table-is-read")
def read_results(
    source: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    axis: str = "loops",
    where: Sequence[str] = (),
    diverged: Sequence[str] = (),
    run_name: str = "",
) -> pd.DataFrame:
    """Read a table of runs and check it as `tidy` does; a row in an error is the line of the file, or the trial.

    A column that is not there by its name is the only one that ends with it, as params.lr or hparams/lr do with lr. A
    plot export and a long table (run, tag, step, value) give a row per run and step of the metric that is the loss.

    Args:
        source: a .csv, .json, .jsonl or .parquet file, a pipe, "-" for standard input, a ledger, or the URL of an
            Optuna study with #NAME behind it. JSON is an array of objects, or an object a line; objects within them
            give columns with dots, such as config.lr. Several files are one table.
        columns: what a needed column is called there, such as {"lr": "config.lr", "loss": "summary.val_loss"}.
        axis: the column that plays the part of N.
        where: conditions such as "State=finished" or "loss!=" that a row must meet; others are left out and counted.
        diverged: conditions such as "State=crashed"; runs that meet one diverged, whatever their loss.
        run_name: how runs are called, such as "n{loops}-lr{lr}-s{seed}", where their names alone have the columns. The
            names stand in the column run; where there is none, a file is a run and has its name.

    Raises:
        InputError: the source cannot be read, a column is not there or not clear, a run's name does not fit, or `tidy`
            refuses what it holds.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise InputError(f"no source is given; {FORMATS}")
    implied = [name for name in (axis, *IMPLIED) if f"{{{name}}}" not in run_name]
    read = [_one_source(str(place), columns or {}, implied, bool(run_name) or len(sources) > 1) for place in sources]
    frame = _together(sources, [frame for frame, _ in read])
    called = {name: column for _, names in read for name, column in names.items()}
    losses = dict.fromkeys(names.get("loss", "loss") for part, names in read if "loss" in part)
    if len(losses) > 1:
        raise InputError(f"the loss is {' in one file and '.join(losses)} in another; give files of one metric")
    if run_name:
        frame = named(frame, run_name)
    frame = choose(frame, where, diverged, called)
    if run_name:
        refuse_unnamed(frame, run_name)
    table = tidy(frame, axis)
    shown = ", ".join(printable(without_password(str(place))) for place in sources)
    table.attrs |= {**frame.attrs, "source": shown}
    if [shown] == list(map(str, sources)) and "#" not in shown and Path(shown).is_file():  # what a command could add to
        table.attrs["grows"] = _grows(table)
    metric = called.get("loss", "loss")
    if not any(part.endswith("loss") for part in re.split("[./]", metric.casefold())):
        table.attrs["unit"] = f"of {metric}"
    return table


def _one_source(
    source: str, columns: Mapping[str, str], implied: Iterable[str], by_name: bool
) -> tuple[pd.DataFrame, dict[str, str]]:
    """A table with the names of ours, and what they are called there."""
    shown = printable(without_password(source))
    with _blaming(shown):
        frame = _read(source, shown)
    file = Path(source.partition("#")[0]).stem
    shape = {name: called for name, called in columns.items() if name in LONG}
    frame = of_metric(_renamed(frame, shape)[0], columns.get("loss", "loss"), file)
    if by_name and "run" not in frame:
        frame = frame.assign(run=file)
    frame, names = _renamed(frame, {name: called for name, called in columns.items() if name not in LONG})
    frame, others = _implied(frame, [name for name in implied if name not in names])
    guessed = {name: column for name, column in (names | others).items() if column != columns.get(name)}
    if guessed:
        note(frame, ", ".join(f"{name} is {column}" for name, column in guessed.items()))
    return frame, shape | names | others


def _implied(frame: pd.DataFrame, implied: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table with names of ours for the only columns that end with them, and what those are called there."""
    losses = [column for column in frame.columns if "loss" in str(column).casefold() and column != "last_loss"]
    needed = [name for name in implied if name != "loss" or len(losses) == 1]
    columns_of = {name: find(name, frame.columns, f"--columns {name}={{}}") for name in needed}
    others = {name: column for name, column in columns_of.items() if column is not None and column != name}
    if "loss" in losses[1:] or losses[:1] == ["loss"] != losses:
        note(frame, f"judged is loss; there is {', '.join(str(name) for name in losses if name != 'loss')} as well")
    if "lr" in needed:
        _refuse_logged(frame, others.get("lr", "lr"))
    return frame.rename(columns={column: name for name, column in others.items()}), others


def _refuse_logged(frame: pd.DataFrame, called: str) -> None:
    """Refuse an LR beside a configured one that differs: it may be what was logged last, at the end of a schedule.

    One of another name, such as peak_lr, may be in proportion to it, unless the LR in question was logged.
    """
    columns = [name for name in map(str, frame.columns) if _is_lr(words_of(name)) and not LOGGED.search(name)]
    numbers = {name: pd.to_numeric(frame[name].map(str), errors="coerce") for name in {*columns, called} & {*frame}}
    for other in columns if called in numbers else []:
        alike, ratio = words_of(other) in LR_NAMES, numbers[other] / numbers[called]
        if not alike and numbers[other].nunique() < FEWEST_LRS:
            continue
        usual = 1.0 if alike or LOGGED.search(called) else ratio.median()
        if ((ratio / usual - 1).abs() > ROUNDED_LR).any():
            ways = " or ".join(f"--columns {shlex.quote(f'lr={name}')}" for name in (called, other))
            raise InputError(
                f"lr is not clear: {called} and {other} differ, as where one is the configured LR and one what a "
                f"schedule left of it; write {ways}, the configured one"
            )


def _is_lr(words: list[str]) -> bool:
    return "lr" in words or {"learning", "rate"} <= {*words}


def _together(sources: Sequence[str | Path], frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of several files as one, in which a row is called by its line and its file."""
    if len(frames) == 1:
        return frames[0]
    for source, frame in zip(sources, frames, strict=True):
        if set(frame.attrs) - {"left_out"}:
            raise InputError(f"{source} is a study, which is judged alone; of files there may be several")
        frame.index = pd.Index([f"{line} of {Path(source).name}" for line in frame.index])
    names = list(dict.fromkeys(name for frame in frames for name in frame.columns))
    whole = [frame.assign(**{name: None for name in names if name not in frame}) for frame in frames]  # nan is a loss
    table = pd.concat(whole).astype(object)
    table.attrs = {}
    for text in dict.fromkeys(frame.attrs["left_out"] for frame in frames if frame.attrs):
        note(table, text)
    return table


def _grows(table: pd.DataFrame) -> str | None:
    """The place that `sweep` can add runs to: "table" or "ledger" where it wrote one, else None."""
    if not set(table["rule"]) <= set(RULES) or not table["seed"].str.isdecimal().all():
        return None
    if "study" in table.attrs:
        return "ledger" if table.attrs["study"] == SWEEP and "experiment" in table.attrs else None
    return "table" if list(table.columns) == COLUMNS else None


@contextlib.contextmanager
def _blaming(shown: str, kind: str = "a table of runs", url: str = "") -> Iterator[None]:
    """Whatever a parser or a driver raises is one error that names the source, and no secret."""
    try:
        yield
    except InputError:
        raise
    except Exception as raised:
        error: BaseException = raised
        while error.__cause__ is not None:  # what the driver said, below what libraries made of it
            error = error.__cause__
        text = (str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__])[0]
        text = without_secrets(text, url)
        if isinstance(error, OSError):
            raise InputError(f"cannot read {shown}: {text[:300]}; {FORMATS}") from None
        raise InputError(f"{shown} is not {kind}: {text[:300]}; {FORMATS}") from None


def _read(source: str, shown: str) -> pd.DataFrame:
    place, _, name = source.partition("#")
    if "://" in source:
        return _study(place, name, shown)
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("standard input is closed or a terminal; send a table: … | looptransfer check -")
        return _table(sys.stdin.buffer.read(MOST_BYTES + 1), "", "standard input")
    path, name = (Path(source), "") if Path(source).exists() else (Path(place), name)
    with open_file(path) as stream:
        head = stream.read(len(SQLITE))
        if head == SQLITE and path.is_file():
            return _study(str(path.resolve()), name, shown)
        if head.startswith(JOURNAL) and path.is_file():
            return _study(f"journal://{path.resolve()}", name, shown)
        return _table(head + stream.read(MOST_BYTES + 1), path.suffix.lower(), shown)


def _study(place: str, name: str, shown: str) -> pd.DataFrame:
    with _blaming(shown, "an Optuna storage", place):
        rows, about = read_study(place, name, shown)
    frame = _frame(dict(enumerate(rows)))
    frame.attrs |= about
    return frame


def _table(data: bytes, suffix: str, shown: str) -> pd.DataFrame:
    """The table in the bytes of a file; what they are decides, where they tell."""
    if len(data) > MOST_BYTES:
        raise InputError(f"{shown} has more than {MOST_BYTES >> 20} MiB, which no table of runs has; {FORMATS}")
    if data.startswith(SQLITE):
        raise InputError(f"{shown} sends a database, which must be opened where it lies; give its path")
    packed = next((kind for magic, kind in PACKED.items() if data.startswith(magic)), None)
    if packed:
        raise InputError(
            f"{shown} is not a CSV table or JSON lines: it is {packed}; unpack it, or save it as CSV; {FORMATS}"
        )
    if data.startswith(b"PAR1") or suffix == ".parquet":
        return _parquet(data, shown)
    text = _text(data, shown)
    if suffix in (".jsonl", ".ndjson") or text.lstrip().startswith("{"):
        return _json_lines(text, shown)
    return _json_array(text, shown) if text.lstrip().startswith("[") else _csv(text, shown)


def _text(data: bytes, shown: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        coding = "UTF-16" if wide else f"byte {data[error.start]:#04x} on line {line}"
        raise InputError(
            f"{shown} is not a CSV table or JSON lines: it is not UTF-8 text ({coding}); save it as UTF-8, or {FORMATS}"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    control = CONTROL.search(text)
    if control:
        line = text.count("\n", 0, control.start()) + 1
        raise InputError(f"{shown}, line {line} holds the control character {control[0]!r}; save it without")
    return text


def _csv(text: str, shown: str) -> pd.DataFrame:
    """A line is a row with as many cells as the header; commas alone are no row."""
    header: list[str] = []
    rows: dict[int, list[str]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip(" \t,"):
            continue
        try:
            cells = cells_of(line)
        except ValueError as error:
            raise InputError(
                f"{shown} is not a CSV table: on line {number} {error}; a cell with commas or quotes is written "
                '"so, with ""quotes"" doubled", and has no line ends'
            ) from None
        if not header:
            header = cells
            _check_header(header, text, shown)
        elif cells[0].startswith("#") and not header[0].startswith("#"):
            raise InputError(f"{shown}, line {number} begins with #: remove comment lines")
        elif len(cells) != len(header):
            fix = "remove comment lines" if header[0].startswith("#") else "put cells with commas in quotes"
            raise InputError(
                f"{shown} is not a CSV table: line {number} has {len(cells)} cells, the header {len(header)}; {fix}"
            )
        elif any(cells):
            rows[number] = cells
    if not header:
        raise InputError(f"{shown} is not a CSV table: it is empty; {FORMATS}")
    frame = pd.DataFrame(list(rows.values()), index=pd.Index(list(rows)), columns=header, dtype=object)
    return frame.loc[:, [name != "" for name in header]]


def cells_of(line: str) -> list[str]:
    """The cells of a line of CSV without the blanks around them; quotes that are astray are a ValueError."""
    if '"' not in line:
        return [cell.strip() for cell in line.split(",")]
    cells, place, more = [], 0, True
    while more:
        match = CELL.match(line, place)
        if match is None:
            raise ValueError("a quote is not closed, or stands inside a cell")
        quoted, bare, comma = match.groups()
        cells.append(bare.strip() if quoted is None else quoted.replace('""', '"').strip())
        place, more = match.end(), bool(comma)
    return cells


def _check_header(header: list[str], text: str, shown: str) -> None:
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        mark = ";" if ";" in header[0] else "tabs"
        decimals = (
            " and has decimal commas; save it with points in numbers and"
            if re.search(r"\d,\d", text)
            else "; save it with"
        )
        raise InputError(f"{shown} is separated by {mark}{decimals} commas between cells")
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{shown}: there are two columns {short(twice)}; rename or drop one of them")


def _json_lines(text: str, shown: str) -> pd.DataFrame:
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=unique)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{shown}, line {number} is not JSON: {error}; write one object per run and line"
                ) from None
            if not isinstance(row, dict):
                raise InputError(f"{shown}, line {number} holds no JSON object; write one object per run and line")
            rows[number] = row
    return _frame(rows)


def _json_array(text: str, shown: str) -> pd.DataFrame:
    """The objects of an array; a row is called by its place, from 1."""
    try:
        rows = dict(enumerate(json.loads(text, object_pairs_hook=unique), start=1))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown} begins as a JSON array and is not JSON: {error}; write one object per run") from None
    odd = next((number for number, row in rows.items() if not isinstance(row, dict)), None)
    if odd is not None:
        raise InputError(f"{shown}, item {odd} of the array is no JSON object; write one object per run")
    return _frame(rows)


def _frame(rows: Mapping[int, Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as they are, None where one lacks a name; objects within give names with dots."""
    flat = {number: unique(list(_flat(row))) for number, row in rows.items()}
    names = list(dict.fromkeys(name for row in flat.values() for name in row))
    cells = [[row.get(name) for name in names] for row in flat.values()]
    return pd.DataFrame(cells, index=pd.Index(list(flat)), columns=names, dtype=object)


def _flat(row: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _parquet(data: bytes, shown: str) -> pd.DataFrame:
    try:
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415
    except ImportError:
        raise InputError("reading Parquet needs pyarrow; run: pip install pyarrow") from None
    with _blaming(shown, "a Parquet table"):
        table = ParquetFile(io.BytesIO(data)).read()
        unique([(name, None) for name in table.column_names])
        return _frame(dict(enumerate(table.to_pylist())))


def _renamed(frame: pd.DataFrame, columns: Mapping[str, str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table with columns named as asked, and the columns that they were."""
    columns_of = {name: find(called, frame.columns, f"--columns {name}={{}}") for name, called in columns.items()}
    names = {name: column for name, column in columns_of.items() if column is not None}
    missing = [called for name, called in columns.items() if name not in names]
    if missing:
        alike = {re.sub(r"\W", "_", str(column)).casefold(): str(column) for column in frame.columns}
        close = get_close_matches(re.sub(r"\W", "_", missing[0]).casefold(), alike, 1)
        guess = f", did you mean {alike[close[0]]}?" if close else ""
        raise InputError(f"there is no column {missing[0]}{guess}; there are {listing(frame)}")
    others = frame.drop(columns=list({*names, *names.values()} & set(frame.columns)))
    return others.assign(**{name: frame[column] for name, column in names.items()}), names
