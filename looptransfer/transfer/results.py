"""A tidy, checked table of losses: one row per training run, or per step of one."""

import math
import re
import shlex
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import pandas as pd

from looptransfer.errors import InputError
from looptransfer.text import short
from looptransfer.transfer.rows import (
    finished_state,
    is_missing,
    is_state,
    listing,
    quoted,
    refuse_unfinished,
    words_of,
)

COLUMNS = ["rule", "layers", "loops", "width", "lr", "seed", "steps", "loss", "diverged", "seconds", "fingerprint"]
OF_A_RUN = {"rule", "lr", "seed", "loss", "diverged", "step", "seconds", "last_loss"}
ALL_RUNS = "all runs"  # the rule of a table that knows none
MOST = 10**6  # the largest loop count, or value of another axis, that is believed
BELIEVED_LRS = (1e-30, 1e30)
LARGEST = 1e100  # loss, in size, that is believed
SAME_LR = 1e-6  # relative distance up to which two LRs are one
ROUNDED_LR = 5e-3  # the same for LRs that no seed ran both of: one LR, rounded to three digits by somebody
ENDS_TOGETHER = 0.95  # share of the longest run that a run must have lasted, unless it diverged
PROGRESS = re.compile(r"_?((global|training|last)_)?(step|epoch|iteration)", re.IGNORECASE)  # how far a run has come


def tidy(frame: pd.DataFrame, axis: str = "loops") -> pd.DataFrame:
    """Check a table of runs and return it with typed columns rule, `axis`, lr, seed, loss, and whatever else it had.

    A row is called by its index label in errors.

    Needed are loops, or the axis in its place (whole numbers from 1), lr (absolute, above 0) and loss (a run that
    diverged has inf or nan, or true in a column `diverged`; an empty cell is no result). Missing columns `rule` and
    `seed` become "all runs" and "0". With a column `step` there is a row per run and step, and all runs of one rule and
    N end together unless they diverged. Losses of diverged runs come back as inf: they are data, since they bound the
    basin. LRs that agree to 1e-6 are one, as are seeds 0 and 0.0.

    Raises:
        InputError: a missing column, a cell that is no number or out of range, no finite loss, duplicate runs, runs
            that end early or did not finish, rules that differ by case or blanks.
    """
    _no_column_missing(frame, axis)
    out = frame.copy() if frame.index.is_unique else frame.reset_index(drop=True)
    if out.empty:
        raise InputError("the table has no rows; give one row per training run")
    raw = out.copy()
    out["rule"] = _names(out["rule"], "rule") if "rule" in out else ALL_RUNS
    _no_rules_alike(out["rule"])
    out["seed"] = _names(out["seed"], "seed", _seed) if "seed" in out else "0"
    for name in (axis, "lr", *(["step"] if "step" in out else [])):
        out[name] = _numbers(out[name], name)
    out["loss"] = _losses(raw)
    _in_range(out, axis, out[axis].between(1, MOST) & (out[axis] % 1 == 0), f"a whole number from 1 to {MOST}")
    absolute = "a finite number above 0" + ", no logarithm of the LR" * bool((out["lr"] < 0).any())
    _in_range(out, "lr", np.isfinite(out["lr"]) & (out["lr"] > 0), absolute)
    _in_range(out, "lr", out["lr"].between(*BELIEVED_LRS), "between {:g} and {:g}".format(*BELIEVED_LRS))
    _no_summaries(out["seed"])
    out[axis] = out[axis].astype(int)
    out["diverged"] = ~np.isfinite(out["loss"])
    if out["diverged"].all():
        raise InputError(f"none of the {len(out)} rows has a finite loss; run lower LRs")
    if "step" in out:
        _in_range(out, "step", np.isfinite(out["step"]) & (out["step"] >= 0), "a number from 0 up")
    out["lr"] = _one_spelling(out, ["rule", axis, "seed", *(["step"] if "step" in out else [])])
    _no_duplicates(out, axis, raw)
    _all_end_together(out, axis, "step") if "step" in out else _all_came_as_far(out, axis)
    return out.reset_index(drop=True)


def axis_label(axis: str) -> str:
    """An axis in words: N for loop counts, L for layers."""
    return {"loops": "N", "layers": "L"}.get(axis, axis)


def at_horizon(runs: pd.DataFrame, axis: str = "loops", share: float = 1.0) -> pd.DataFrame:
    """The row of every run at a share of the training, from a tidy table; the table itself where it has no steps.

    The training of one rule and N is as long as its longest run. A run that diverged before stays so.
    """
    if "step" not in runs:
        return runs
    limit = share * runs.groupby(["rule", axis])["step"].transform("max")
    rows = runs[runs["step"] <= limit].sort_values("step", kind="stable")
    return rows.groupby(["rule", axis, "lr", "seed"], sort=False).tail(1).sort_index()


def _no_column_missing(frame: pd.DataFrame, axis: str) -> None:
    if axis in ("lr", "loss", "seed", "rule", "step", "diverged"):
        raise InputError(f"axis is {axis!r}; it must be a column such as loops, width or layers")
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise InputError(f"there are two columns {short(twice[0])}; rename or drop one of them")
    missing = [name for name in (axis, "lr", "loss") if name not in frame.columns]
    if missing:
        raise InputError(
            f"column {', '.join(missing)} is missing; there are {listing(frame)}. Needed are {axis}, lr and loss, "
            f"optional are seed, rule, diverged and step; other names are mapped: --columns {_mapping(frame, missing)}"
            + _by_name(frame, axis)
            * (missing != ["loss"])
        )


def _by_name(frame: pd.DataFrame, axis: str) -> str:
    """How names of runs could say what no column does."""
    example = f" such as {short(frame['run'].iloc[0])}" if "run" in frame and len(frame) else ""
    return (
        f". Where names of runs{example} say it: --run-name 'n{{{axis}}}-lr{{lr}}-s{{seed}}', and --columns run=NAME "
        "where they are in another column; else export the table of runs, with its configuration"
    )


def _mapping(frame: pd.DataFrame, missing: Sequence[str]) -> str:
    """What --columns could say of missing names, by the columns that have them within theirs."""
    parts = {name: (name, "learning_rate") if name == "lr" else (name,) for name in missing}
    columns = [column for column in map(str, frame.columns) if not any(w.startswith("log") for w in words_of(column))]
    alike = {
        name: [column for column in columns if any(part in column.casefold() for part in parts[name])]
        for name in missing
    }
    return " ".join(
        " or ".join(f"{name}={shlex.quote(short(column)[1:-1])}" for column in alike[name][:4] or ["NAME"])
        for name in missing
    )


# -- cells


def _each(column: pd.Series, function: Callable[[Any], Any]) -> list[Any]:
    """The results of a function for every cell; text that recurs is looked at once."""
    cells = list(column.astype(object))
    if all(type(cell) is str for cell in cells):  # others may be equal and yet no number, as True is to 1
        results = {cell: function(cell) for cell in set(cells)}
        return [results[cell] for cell in cells]
    return [function(cell) for cell in cells]


def _names(column: pd.Series, name: str, spelled: Callable[[str], str] = str) -> list[str]:
    names = _each(column, lambda cell: "" if is_missing(cell) or str(cell) == "nan" else spelled(str(cell).strip()))
    if "" in names:
        row = column.index[names.index("")]
        raise InputError(
            f"row {row}: {name} is empty; fill it in, leave such rows out with --where {name}!=, or drop the whole "
            "column"
        )
    return names


def _no_rules_alike(rules: pd.Series) -> None:
    first: dict[str, str] = {}
    for rule in rules.unique():
        same = first.setdefault("".join(unicodedata.normalize("NFKC", rule).casefold().split()), rule)
        if same != rule:
            raise InputError(
                f"the rules {short(same)} and {short(rule)} differ by case or blanks only; write them alike"
            )


def _seed(text: str) -> str:
    """A seed by its name: 0 also where it is written as 0.0."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    return (
        str(int(number))
        if "_" not in text and number.is_finite() and number.adjusted() < 40 and number == int(number)
        else text
    )


def _numbers(column: pd.Series, name: str) -> pd.Series:
    """The cells of a column as floats, every digit of them."""
    numbers = _each(column, _number)
    if None in numbers:
        row = column.index[numbers.index(None)]
        cell = "" if is_missing(column[row]) else column[row]
        hint = _hint(str(cell)) if cell != "" else f"; leave rows of no run out with --where {name}!="
        raise InputError(f"row {row}: {name} is {short(cell)}, which is not a number{hint}")
    return pd.Series(numbers, column.index, dtype=float)


def _number(cell: Any) -> float | None:
    """A cell as a float; None where it is no number."""
    if isinstance(cell, bool | np.bool_ | bytes) or is_missing(cell):
        return None
    if isinstance(cell, str) and ("_" in cell or not cell.isascii()):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def _hint(text: str) -> str:
    if re.fullmatch(r"\s*[+-]?\d{1,3}(,\d{3})+\s*", text):
        return "; write thousands without commas, and decimals with a point"
    return "; write decimals with a point" if re.fullmatch(r"\s*[+-]?\d+,\d+([eE][+-]?\d+)?\s*", text) else ""


def _losses(raw: pd.DataFrame) -> pd.Series:
    """The losses as numbers, inf where a run diverged."""
    diverged = _flags(raw["diverged"]) if "diverged" in raw else pd.Series(False, raw.index)
    cells = raw["loss"].astype(object).mask(diverged, math.inf)
    numbers = _each(cells, _number)
    no_result = pd.Series([number is None for number in numbers], raw.index)
    commas = [row for row, cell in cells[no_result].items() if _hint(str(cell))]
    if commas:
        _numbers(cells[commas], "loss")
    loss = pd.Series(numbers, raw.index, dtype=float)
    refuse_unfinished(raw, loss, no_result)
    loss = loss.where(np.isfinite(loss), math.inf)
    believed = np.isinf(loss) | (loss.abs() < LARGEST)
    _in_range(pd.DataFrame({"loss": loss}), "loss", believed, f"within ±{LARGEST:g}, or inf where the run diverged")
    return loss


def _in_range(frame: pd.DataFrame, name: str, good: pd.Series, allowed: str) -> None:
    if not good.all():
        row = (~good).idxmax()
        raise InputError(f"row {row}: {name} is {frame[name][row]:g}; it must be {allowed}")


def _flags(column: pd.Series) -> pd.Series:
    spellings = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    flags = column.map(lambda cell: spellings.get(str(cell).strip().lower()))
    if flags.isna().any():
        row = flags.isna().idxmax()
        raise InputError(f"row {row}: diverged is {short(column[row])}; it must be true or false")
    return flags.astype(bool)


# -- rows


def _one_spelling(frame: pd.DataFrame, run: list[str]) -> pd.Series:
    """The LRs, each written in one way: last digits differ between a formula, a log and what somebody typed."""
    lrs = frame["lr"]
    for agreement in (SAME_LR, ROUNDED_LR):
        groups = lrs.map(_groups(np.sort(lrs.unique()), agreement))
        ran = frame[run].assign(group=groups, lr=lrs).drop_duplicates()
        both = ran.loc[ran.duplicated([*run, "group"]), "group"] if agreement == ROUNDED_LR else []
        shortest = lrs.groupby(groups).transform(lambda group: min(group.unique(), key=lambda lr: (len(repr(lr)), lr)))
        lrs = lrs.where(groups.isin(both), shortest)
    return lrs


def _groups(lrs: np.ndarray[Any, Any], agreement: float) -> dict[float, int]:
    """The number of the group of each LR; those of one group agree with its lowest."""
    numbers: dict[float, int] = {}
    lowest, number = 0.0, 0
    for lr in lrs:
        if lr > lowest * (1 + agreement):
            lowest, number = lr, number + 1
        numbers[float(lr)] = number
    return numbers


def _no_duplicates(frame: pd.DataFrame, axis: str, raw: pd.DataFrame) -> None:
    key = ["rule", axis, "lr", "seed", *(["step"] if "step" in frame else [])]
    twice = frame[frame.duplicated(key, keep=False)]
    if twice.empty:
        return
    row = twice.iloc[0]
    same = twice[(twice[key] == row[key]).all(axis=1)]
    telling = [name for name in frame.columns if name not in {*key, *OF_A_RUN} and _tells(raw, same.index, name)]
    steps = [name for name in telling if PROGRESS.fullmatch(str(name)) or "step" in str(name).casefold()]
    seeds = [name for name in telling if "seed" in words_of(name)]
    states = [name for name in telling if is_state(raw[name])]  # of a crashed run and its rerun, the one that finished
    if steps and "step" not in frame:
        fix = f"they differ in {steps[0]}: where that is the step, say --columns {quoted(f'step={steps[0]}')}"
    elif seeds and "seed" not in raw:
        fix = f"they differ in {seeds[0]}: where that is the seed, say --columns {quoted(f'seed={seeds[0]}')}"
    elif telling:
        column = (states or telling)[0]
        cells = raw.loc[same.index, column]
        value = (finished_state(cells) if states else None) or cells.iloc[0]
        fix = (
            f"they differ in {' and '.join(map(str, telling[:3]))}: keep one value of it, or make it the axis "
            f"(--where {quoted(f'{column}={value}')})"
        )
    else:
        fix = "drop the repeated rows" if "seed" in raw else "add a column seed that tells them apart"
    cell = f"{axis} {row[axis]}, lr {row['lr']:g}" + (f", seed {short(row['seed'])[1:-1]}" if "seed" in raw else "")
    rule = f"rule {short(row['rule'])[1:-1]}, " if "rule" in raw else ""
    rows = ", ".join(map(str, same.index[:5]))
    raise InputError(f"rows {rows} are the same run ({rule}{cell}); {fix}")


def _tells(raw: pd.DataFrame, same: pd.Index, name: str) -> bool:
    """A column could tell repeated rows apart: it differs there, and is no name of every single row."""
    texts = raw[name].map(str)
    return texts[same].nunique() > 1 and (name in COLUMNS or texts.nunique() <= len(texts) / 2)


def _no_summaries(seeds: pd.Series) -> None:
    """Refuse seeds that are words beside numbers, such as mean: what sums up other rows is no run."""
    names = [seed for seed in seeds.unique() if _number(seed) is None]
    if names and len(names) < seeds.nunique():
        name = short(names[0])
        raise InputError(
            f"row {seeds.index[list(seeds).index(names[0])]}: seed is {name} beside numbers; leave a row that sums up "
            f"other rows out with --where {quoted(f'seed!={names[0]}')}, or name all seeds by numbers"
        )


def _all_came_as_far(frame: pd.DataFrame, axis: str) -> None:
    """Refuse runs that ended early by a column of a table of last values, such as _step or epoch."""
    for name in frame.columns:
        if PROGRESS.fullmatch(re.split("[./]", str(name))[-1]):
            numbers = pd.Series(_each(frame[name], _number), frame.index, dtype=float)
            if numbers.notna().all():
                _all_end_together(frame.assign(**{name: numbers}), axis, str(name))


def _all_end_together(frame: pd.DataFrame, axis: str, steps: str) -> None:
    last = frame.loc[frame.groupby(["rule", axis, "lr", "seed"])[steps].idxmax()]
    longest = last.groupby(["rule", axis])[steps].transform("max")
    early = last[(last[steps] < ENDS_TOGETHER * longest) & ~last["diverged"]]
    if len(early):
        run = early.iloc[0]
        fix = "give its last loss as nan if it diverged, else drop its rows"
        if "run" in run:
            equal, other = (shlex.quote(f"run{sign}{run['run']}") for sign in ("=", "!="))
            fix = f"count it as diverged with --diverged {equal}, or leave it out with --where {other}"
        raise InputError(
            f"row {early.index[0]}: the run of {axis} {run[axis]}, lr {run['lr']:g}, seed {run['seed']} ends at "
            f"{steps} {run[steps]:g} of {longest[early.index[0]]:g} with a finite loss; {fix}"
        )
