"""A tidy, checked table of losses: one row per training run, or per step of one."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from looptransfer.errors import InputError

COLUMNS = ["rule", "layers", "loops", "width", "lr", "seed", "steps", "loss", "diverged", "seconds", "fingerprint"]
MOST = 10**6  # the largest loop count, or value of another axis, that is believed
SHOWN = 60  # characters of a cell in an error
ENDS_TOGETHER = 0.95  # share of the longest run that a run must have lasted, unless it diverged


def tidy(frame: pd.DataFrame, axis: str = "loops") -> pd.DataFrame:
    """Check a table of runs and return it with typed columns rule, `axis`, lr, seed, loss, and whatever else it had.

    A row is called by its index label in errors.

    Needed are loops, or the axis in its place (whole numbers from 1), lr (absolute, above 0) and loss (nats; a run that
    diverged has inf or nan, or true in a column `diverged`). Missing columns `rule` and `seed` become "factored" and
    "0". With a column `step` there is a row per run and step, and all runs of one rule and N end together unless they
    diverged. Losses of diverged runs come back as inf: they are data, since they bound the basin.

    Raises:
        InputError: a missing column, a cell that is no number or out of range, no finite loss, duplicate runs, runs
            that end early.
    """
    _no_column_missing(frame, axis)
    out = frame.copy() if frame.index.is_unique else frame.reset_index(drop=True)
    out["rule"] = out["rule"].map(str).str.strip() if "rule" in out else "factored"
    out["seed"] = out["seed"].map(str).str.strip() if "seed" in out else "0"
    diverged = _flags(out["diverged"]) if "diverged" in out else pd.Series(False, index=out.index)
    out["loss"] = out["loss"].mask(diverged, math.inf)  # its cell may be empty, as pandas writes nan
    for name in (axis, "lr", "loss", *(["step"] if "step" in out else [])):
        out[name] = _numbers(out[name], name)
    _in_range(out, axis, out[axis].between(1, MOST) & (out[axis] % 1 == 0), f"a whole number from 1 to {MOST}")
    _in_range(out, "lr", np.isfinite(out["lr"]) & (out["lr"] > 0), "a finite number above 0")
    out[axis] = out[axis].astype(int)
    out["loss"] = out["loss"].where(np.isfinite(out["loss"]), math.inf)
    out["diverged"] = ~np.isfinite(out["loss"])
    if out.empty:
        raise InputError("the table has no rows; give one row per training run")
    if out["diverged"].all():
        raise InputError(f"none of the {len(out)} rows has a finite loss; run lower LRs")
    _no_duplicates(out, axis, "seed" in frame)
    if "step" in out:
        _in_range(out, "step", np.isfinite(out["step"]) & (out["step"] >= 0), "a number from 0 up")
        _all_end_together(out, axis)
    return out.reset_index(drop=True)


def axis_label(axis: str) -> str:
    """What an axis is called in words: N for loop counts."""
    return "N" if axis == "loops" else axis


def at_horizon(runs: pd.DataFrame, axis: str = "loops", share: float = 1.0) -> pd.DataFrame:
    """The row of every run at a share of the training, from a tidy table; the table itself where it has no steps.

    The training of one rule and N is as long as its longest run. A run that diverged before stays so.
    """
    if "step" not in runs:
        return runs
    limit = share * runs.groupby(["rule", axis])["step"].transform("max")
    rows = runs[runs["step"] <= limit].sort_values("step", kind="stable")
    return rows.groupby(["rule", axis, "lr", "seed"], sort=False).tail(1).sort_index()


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Twelve characters that tell one experiment from another; `identity` holds JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _no_column_missing(frame: pd.DataFrame, axis: str) -> None:
    if axis in ("lr", "loss", "seed", "rule", "step", "diverged"):
        raise InputError(f"axis is {axis!r}; it must be a column such as loops, width or layers")
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise InputError(f"there are two columns {_short(twice[0])}; rename or drop one of them")
    missing = [name for name in (axis, "lr", "loss") if name not in frame.columns]
    if missing:
        there = ", ".join(map(_short, frame.columns[:40])) or "no columns"
        raise InputError(
            f"column {', '.join(missing)} is missing; there are {there}. Needed are {axis}, lr and loss, optional are "
            "seed, rule, diverged and step; other names are mapped with --columns lr=NAME …"
        )


def _numbers(column: pd.Series, name: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    text = column[numbers.isna()].map(lambda cell: str(cell).strip().lower())
    bad = text[text != "nan"]
    if len(bad):
        row = bad.index[0]
        raise InputError(f"row {row}: {name} is {_short(column[row])}, which is not a number")
    return numbers.astype(float)


def _in_range(frame: pd.DataFrame, name: str, good: pd.Series, allowed: str) -> None:
    if not good.all():
        row = (~good).idxmax()
        raise InputError(f"row {row}: {name} is {frame[name][row]:g}; it must be {allowed}")


def _flags(column: pd.Series) -> pd.Series:
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    flags = column.map(lambda cell: words.get(str(cell).strip().lower()))
    if flags.isna().any():
        row = flags.isna().idxmax()
        raise InputError(f"row {row}: diverged is {_short(column[row])}; it must be true or false")
    return flags.astype(bool)


def _no_duplicates(frame: pd.DataFrame, axis: str, has_seed: bool) -> None:
    key = ["rule", axis, "lr", "seed", *(["step"] if "step" in frame else [])]
    twice = frame[frame.duplicated(key, keep=False)]
    if twice.empty:
        return
    row = twice.iloc[0]
    same = twice[(twice[key] == row[key]).all(axis=1)]
    cell = f"rule {_short(row['rule'])[1:-1]}, {axis} {row[axis]}, lr {row['lr']:g}"
    telling = [name for name in ("loops", "layers", "width") if name in frame and same[name].nunique() > 1]
    if telling:
        fix = f"they differ in {telling[0]}: keep one value of it, or make it the axis"
    else:
        fix = "drop the repeated rows" if has_seed else "add a column seed that tells them apart"
    rows = ", ".join(map(str, same.index[:5]))
    raise InputError(f"rows {rows} are the same run ({cell}, seed {_short(row['seed'])[1:-1]}); {fix}")


def _all_end_together(frame: pd.DataFrame, axis: str) -> None:
    last = frame.loc[frame.groupby(["rule", axis, "lr", "seed"])["step"].idxmax()]
    longest = last.groupby(["rule", axis])["step"].transform("max")
    early = last[(last["step"] < ENDS_TOGETHER * longest) & ~last["diverged"]]
    if len(early):
        run = early.iloc[0]
        raise InputError(
            f"row {early.index[0]}: the run of {axis} {run[axis]}, lr {run['lr']:g}, seed {run['seed']} ends at step "
            f"{run['step']:g} of {longest[early.index[0]]:g} with a finite loss; give its last loss as nan if it "
            "diverged, else drop its rows"
        )


def _short(cell: object) -> str:
    text = str(cell)
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")
