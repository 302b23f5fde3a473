"""The rows of a table that count, those that are left out, and those of runs that diverged or did not finish."""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from looptransfer.errors import InputError
from looptransfer.text import short

STATES = ("state", "status")  # the last word of the name of a column that says what became of a run
# What trackers write there of a run that finished, or call a column of true and false; --where tells of other words.
FINISHED = ("finished", "complete", "completed", "success", "succeeded", "done", "ok", "status_success")
FAILED = ("failed", "crashed", "killed", "preempted")  # what they call a column that is true where it did not
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def is_missing(cell: Any) -> bool:
    """A cell is empty, null or absent; nan is a number."""
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, str) and not cell.strip())


def words_of(name: object) -> list[str]:
    """The words of a column's name in lower case: val and loss of summary/valLoss or val_loss, after what is above."""
    return [word.casefold() for word in WORDS.findall(re.split(r"[./]", str(name))[-1])]


def find(name: str, names: Iterable[object], option: str) -> str | None:
    """The one of the names that a name stands for: itself, or the only one that ends with it, as params.lr with lr.

    Case counts only where names differ by nothing else.

    Args:
        name: what is looked for.
        names: what there is.
        option: the words that settle which of several is meant, with {} for its name.

    Raises:
        InputError: several end with it.
    """
    others = list(map(str, names))
    ends = [name] if name in others else []
    for fold in (str, str.casefold):
        tails = (fold(f".{name}"), fold(f"/{name}"))
        ends = ends or [other for other in others if fold(f"/{other}").endswith(tails)]
    if len(ends) > 1:
        ways = " or ".join(option.format(shlex.quote(other)) for other in ends[:4])
        raise InputError(f"{name} is not clear: {len(ends)} columns or metrics end with it; write {ways}")
    return ends[0] if ends else None


def choose(
    frame: pd.DataFrame, where: Sequence[str], diverged: Sequence[str], names: Mapping[str, str]
) -> pd.DataFrame:
    """The rows that meet every condition of `where`, with true in a column `diverged` where one of `diverged` is met.

    A condition is COLUMN=VALUE, COLUMN=VALUE,VALUE or COLUMN!=VALUE; values are compared as numbers where they are
    numbers. What is left out is counted in `attrs`. A state that a condition of `where` is about is dropped, since it
    has been seen to.

    Args:
        frame: what was read, with the needed columns named as here.
        names: what columns are called in the source, such as {"loss": "summary.val_loss"}; conditions may use both.

    Raises:
        InputError: a condition that is none, a column that is not there, or no row is left.
    """
    out = frame.copy()
    seen_to: list[str] = []
    for text in where:
        column, met = _met(out, text, "--where", names)
        if not met.any():
            raise InputError(f"--where {text} leaves no row; {column} is {_counts(out[column])}")
        if not met.all():
            note(out, f"{int((~met).sum())} of {len(out)} rows are left out by --where {text}{_unfinite(out[~met])}")
        out, seen_to = out[met], [*seen_to, *([column] if is_state(out[column]) else [])]
    marks = []
    for text in diverged:
        column, met = _met(out, text, "--diverged", names)
        if not met.any():
            note(out, f"--diverged {text} is true of no row; {column} is {_counts(out[column])}")
        marks.append(met)
    if marks:
        before = out["diverged"] if "diverged" in out else pd.Series(False, out.index, dtype=object)
        out = out.assign(diverged=before.mask(pd.concat(marks, axis=1).any(axis=1), True))
    if out.attrs.get("study") and not seen_to:
        flagged = _texts(out["diverged"]).str.lower() == "true" if marks else pd.Series(False, out.index)
        counts = _finished(out["state"]) | flagged
        if not counts.all():
            note(
                out,
                f"{int((~counts).sum())} trials that failed, were pruned or still run are left out; a run that "
                "diverged should end with the value inf, or be counted by --diverged state=FAIL",
            )
        out = out[counts]
    return out.drop(columns=seen_to)


def _counts(column: pd.Series) -> str:
    """The most frequent values of a column, with their counts."""
    counts = _texts(column).value_counts()[:8].items()
    return ", ".join(f"{short(value)} ({count})" for value, count in counts) or "empty"


def _unfinite(rows: pd.DataFrame) -> str:
    """The words on rows that are left out although what stands there as their loss may be that of a divergence."""
    losses = _texts(rows["loss"]).map(_value) if "loss" in rows else pd.Series(dtype=object)
    count = int(losses.isin(["nan", math.inf, -math.inf]).sum())
    return f" ({count} of them with a loss of nan or inf: runs that diverged are kept by --diverged)" if count else ""


def note(frame: pd.DataFrame, text: str) -> None:
    """Keep a remark for the answer, in `attrs`."""
    frame.attrs["left_out"] = "; ".join(filter(None, [frame.attrs.get("left_out"), text]))


def _met(frame: pd.DataFrame, text: str, option: str, names: Mapping[str, str]) -> tuple[str, pd.Series]:
    """The column that a condition is about, and which rows meet it."""
    parts = re.fullmatch(r"(.+?)(!?)=(.*)", text, flags=re.DOTALL)
    if parts is None:
        raise InputError(f"{option} {text!r}; write COLUMN=VALUE or COLUMN!=VALUE, such as State=finished")
    called = parts[1].strip()
    known = [name for name, source in names.items() if called not in frame.columns and find(called, [source], "")]
    column = known[0] if known else find(called, frame.columns, f"{option} {{}}{parts[2]}={parts[3]}") or called
    if column not in frame.columns:
        raise InputError(f"{option} {text}: there is no column {called}; there are {listing(frame)}")
    values = {_value(part) for part in (parts[3], *parts[3].split(","))}
    met = _texts(frame[column]).map(lambda cell: _value(cell) in values)
    return column, ~met if parts[2] else met


def _value(text: str) -> str | float:
    try:
        number = float(text)
    except ValueError:
        return text.strip()
    return "nan" if math.isnan(number) else number


def _texts(column: pd.Series) -> pd.Series:
    return column.map(lambda cell: "" if is_missing(cell) else str(cell).strip()).astype(object)


def listing(frame: pd.DataFrame) -> str:
    """The names of columns, for an error."""
    return ", ".join(short(name)[1:-1] for name in frame.columns[:40]) or "no columns"


def is_state(column: pd.Series) -> bool:
    """A column that says what became of a run: a word of a state, or true and false under such a word.

    Where state is but the last word of its name, as in sys/run_state, some run must be said to have finished.
    """
    last = words_of(column.name)[-1:]
    if last and last[0] in STATES:
        return str(column.name).rpartition(".")[2].strip().casefold() in STATES or bool(_finished(column).any())
    is_flag = bool(last) and last[0] in (*FINISHED, *FAILED)
    return is_flag and set(_texts(column).str.casefold()) <= {"true", "false"}


def finished_state(column: pd.Series) -> str | None:
    """The first word of a column of states that says that a run finished."""
    return next(iter(_texts(column)[~_stopped(column)]), None)


def _stopped(column: pd.Series) -> pd.Series:
    """The runs that a column of states does not say to have finished."""
    last = words_of(column.name)[-1]
    if last in STATES:
        return ~_finished(column)
    return _texts(column).str.casefold() == ("false" if last in FINISHED else "true")


def _finished(column: pd.Series) -> pd.Series:
    return _texts(column).str.casefold().isin(FINISHED)


def refuse_unfinished(frame: pd.DataFrame, loss: pd.Series, no_result: pd.Series) -> None:
    """Refuse rows of runs that did not finish: neither a result, nor known to have diverged.

    Args:
        frame: the table as it was given.
        loss: as numbers; inf where a run is known to have diverged.
        no_result: the loss is missing.

    Raises:
        InputError: with the ways out.
    """
    states = [name for name in frame.columns if is_state(frame[name])]
    stopped = pd.Series(False, frame.index)
    for name in states:
        stopped |= _stopped(frame[name])
    unfinished = no_result | (stopped & (loss.abs() < float("inf")))
    if not unfinished.any():
        return
    row = unfinished.idxmax()
    if stopped[row]:
        name = next(name for name in states if _stopped(frame[name])[row])
        texts = _texts(frame[name])
        over = finished_state(frame[name]) or "VALUE"
        why, keep, mark = f"{name} is {short(texts[row])}", f"{name}={over}", f"{name}={texts[row]}"
    else:
        cell = "" if is_missing(frame["loss"][row]) else str(frame["loss"][row]).strip()
        why, keep, mark = f"loss is {short(cell)}, which is not a number", f"loss!={cell}", f"loss={cell}"
    raise InputError(
        f"row {row}: {why}: a run without a result, as in {int(unfinished.sum())} of {len(frame)} rows. Leave such "
        f"rows out with --where {quoted(keep)}, or count them as diverged with --diverged {quoted(mark)}"
    )


def quoted(condition: str) -> str:
    """A condition as a shell takes it; a long one is cut."""
    cut = short(condition)[1:-1]
    return cut if re.fullmatch(r"[\w.!=/-]*", cut) else shlex.quote(cut)
