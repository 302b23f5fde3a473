"""A tidy, checked table of losses: one row per training run."""

import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from looptransfer.errors import InputError

COLUMNS = ["rule", "layers", "loops", "width", "lr", "seed", "steps", "loss", "diverged", "seconds"]
REQUIRED = ("loops", "lr", "loss")
KEY = ["rule", "loops", "lr", "seed"]


def read_results(path: str | Path) -> pd.DataFrame:
    """Read a CSV of results and check it as `tidy` does; a row number in an error is the line in the file.

    Raises:
        InputError: the file cannot be read as CSV, or `tidy` refuses what it holds.
    """
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
        raise InputError(f"cannot read {path}: {error.strerror}; give a CSV file of results") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table: {str(error).strip()}") from None
    frame.columns = [str(name).strip() for name in frame.columns]
    if len(frame.columns) == 1 and any(mark in frame.columns[0] for mark in ";\t"):
        raise InputError(f"{path} is separated by {';' if ';' in frame.columns[0] else 'tabs'}; save it with commas")
    frame.index += 2  # the line in the file
    return tidy(frame[(frame != "").any(axis=1)])


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Check a table of runs and return it with typed columns rule, loops, lr, seed, loss, and whatever else it had.

    A row is called by its index label in errors.

    Needed are loops (whole numbers from 1), lr (absolute, above 0) and loss (nats; a run that diverged has inf or nan,
    or true in a column `diverged`). Missing columns `rule` and `seed` become "factored" and 0. Losses of diverged runs
    come back as inf: they are data, since they bound the basin.

    Raises:
        InputError: a missing column, a cell that is no number or out of range, no finite loss, duplicate runs.
    """
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise InputError(
            f"column {', '.join(missing)} is missing; there are {', '.join(map(str, frame.columns)) or 'no columns'}. "
            "Needed are loops, lr and loss, optional are seed, rule and diverged"
        )
    out = frame.copy() if frame.index.is_unique else frame.reset_index(drop=True)
    out["rule"] = out["rule"].map(str).str.strip() if "rule" in out else "factored"
    if "seed" not in out:
        out["seed"] = "0"
    out["seed"] = out["seed"].map(str)
    diverged = _flags(out["diverged"]) if "diverged" in out else pd.Series(False, index=out.index)
    out["loss"] = out["loss"].mask(diverged, math.inf)  # its cell may be empty, as pandas writes nan
    for name in REQUIRED:
        out[name] = _numbers(out[name], name)
    _in_range(
        out, "loops", out["loops"].between(1, 10**6) & (out["loops"] % 1 == 0), "a whole number from 1 to 1000000"
    )
    _in_range(out, "lr", np.isfinite(out["lr"]) & (out["lr"] > 0), "a finite number above 0")
    out["loops"] = out["loops"].astype(int)
    out["loss"] = out["loss"].where(np.isfinite(out["loss"]), math.inf)
    out["diverged"] = ~np.isfinite(out["loss"])
    if out.empty:
        raise InputError("the table has no rows; give one row per training run")
    if out["diverged"].all():
        raise InputError(f"none of the {len(out)} rows has a finite loss; run lower LRs")
    _no_duplicates(out, "seed" in frame)
    return out.reset_index(drop=True)


def _numbers(column: pd.Series, name: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    text = column.map(lambda cell: str(cell).strip().lower())
    bad = numbers.isna() & ~text.isin(["nan"])
    if bad.any():
        row = bad.idxmax()
        raise InputError(f"row {row}: {name} is {column[row]!r}, which is not a number")
    return numbers.astype(float)


def _in_range(frame: pd.DataFrame, name: str, good: pd.Series, allowed: str) -> None:
    if not good.all():
        row = (~good).idxmax()
        raise InputError(f"row {row}: {name} is {frame[name][row]:g}; it must be {allowed}")


def _flags(column: pd.Series) -> pd.Series:
    flags = column.map(
        lambda cell: {"true": True, "1": True, "false": False, "0": False}.get(str(cell).strip().lower())
    )
    if flags.isna().any():
        row = flags.isna().idxmax()
        raise InputError(f"row {row}: diverged is {column[row]!r}; it must be true or false")
    return flags.astype(bool)


def _no_duplicates(frame: pd.DataFrame, has_seed: bool) -> None:
    twice = frame.duplicated(KEY, keep=False)
    if twice.any():
        row = frame[twice].iloc[0]
        rows = frame.index[(frame[KEY] == row[KEY]).all(axis=1)]
        cell = f"rule {row['rule']}, loops {row['loops']}, lr {row['lr']:g}"
        fix = "drop the repeated rows" if has_seed else "add a column seed that tells them apart"
        raise InputError(f"rows {', '.join(map(str, rows[:5]))} are the same run ({cell}, seed {row['seed']}); {fix}")
