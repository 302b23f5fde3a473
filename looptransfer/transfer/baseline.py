"""Stored optima: lr-optima.json, what a later table of runs is compared with."""

import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from looptransfer.errors import InputError
from looptransfer.files import MOST_BYTES, open_file, write_file
from looptransfer.transfer.optimum import Interval, Optimum, t_interval
from looptransfer.transfer.results import LARGEST, MOST, OF_A_RUN
from looptransfer.transfer.rows import once, short
from looptransfer.transfer.verdict import Verdict

SCHEMA_VERSION = 1
PATH = "lr-optima.json"
OCTAVES = 1000.0  # log2 of an LR, in size, that is believed
REMAKE = "make it again with --update-baseline"
GIT = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "--no-optional-locks"]  # runs no hook
GIT_SECONDS = 30.0
T = TypeVar("T")


@dataclass(frozen=True)
class StoredOptimum:
    """The optimum of one N as it was; all but `at` is empty where it was censored.

    Attributes:
        log2_lr: of the optimum, with its interval over seeds.
        log2_lr_by_seed: one vertex per seed, whose mean is the estimate.
        loss: fitted, at the optimum, with its interval over seeds.
        loss_by_seed: the fitted loss of each seed at the optimum of all.
    """

    at: int
    censored: str | None
    log2_lr: Interval | None = None
    log2_lr_by_seed: Mapping[str, float] | None = None
    loss: Interval | None = None
    loss_by_seed: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Baseline:
    """The optima of every rule of a table, and what made them.

    `fingerprint` maps names to what made them: looptransfer, code, seeds, lrs, columns of numbers that are the same in
    every row such as layers, the column fingerprint, and experiment, the settings of ours where a ledger knew them.
    `loss_tolerance` is how much worse the loss may become, in its unit.
    """

    axis: str
    unit: str
    confidence: float
    transferred_lr: float | None
    fingerprint: Mapping[str, Any]
    optima: Mapping[str, tuple[StoredOptimum, ...]]
    path: str = PATH
    loss_tolerance: float = 0.02

    def of_rule(self, rule: str) -> dict[int, StoredOptimum]:
        """The optima of a rule by N.

        Raises:
            InputError: there are none.
        """
        if rule not in self.optima:
            there = ", ".join(self.optima)
            raise InputError(f"{self.path} has no optima of rule {rule!r}, only of {there}; choose one, or {REMAKE}")
        return {one.at: one for one in self.optima[rule]}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the schema has a version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "axis": self.axis,
            "unit": self.unit,
            "confidence": self.confidence,
            "transferred_lr": self.transferred_lr,
            "loss_tolerance": self.loss_tolerance,
            "fingerprint": dict(self.fingerprint),
            "rules": {rule: [asdict(one) for one in optima] for rule, optima in self.optima.items()},
        }

    def write(self, path: str | Path) -> None:
        """Write it as JSON; a reader never sees half a file.

        Raises:
            InputError: the place cannot be written.
        """
        write_file(path, json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def baseline_of(verdict: Verdict, path: str | Path = PATH) -> Baseline:
    """What is to be remembered of a verdict.

    Raises:
        InputError: no optimum of the rule that was judged is known.
    """
    if all(optimum.censored for optimum in verdict.judged.optima):
        why = verdict.judged.optima[0].censored
        raise InputError(f"no optimum of rule {verdict.rule!r} is known ({why}), so there is nothing to store")
    rules = {
        name: tuple(store_optimum(optimum, verdict.confidence) for optimum in one.optima)
        for name, one in verdict.rules.items()
    }
    made_by = fingerprint_of(verdict.runs, verdict.axis)
    return Baseline(
        verdict.axis,
        verdict.unit,
        verdict.confidence,
        verdict.transferred_lr,
        made_by,
        rules,
        str(path),
        verdict.regret_tolerance,
    )


def loss_at_optimum(optimum: Optimum) -> pd.Series:
    """The fitted loss per seed at the vertex of all seeds."""
    assert optimum.log2_lr is not None
    return optimum.loss(optimum.log2_lr.estimate)


def store_optimum(optimum: Optimum, confidence: float) -> StoredOptimum:
    """What is to be remembered of one optimum."""
    if optimum.log2_lr is None or optimum.by_seed is None:
        return StoredOptimum(optimum.at, optimum.censored)
    losses = loss_at_optimum(optimum)
    return StoredOptimum(
        optimum.at,
        None,
        optimum.log2_lr,
        {str(seed): float(value) for seed, value in optimum.by_seed.items()},
        t_interval(losses, confidence),
        {str(seed): float(value) for seed, value in losses.items()},
    )


def fingerprint_of(runs: pd.DataFrame, axis: str) -> dict[str, Any]:
    """What made a table of runs, as far as the table tells, and the code that is checked out in this folder.

    Columns of text but for our own say who and where, such as a tracker's User, Tags and State: they stay out.
    """
    made_by: dict[str, Any] = {"looptransfer": version("looptransfer"), "code": code_version()}
    finite = runs[~runs["diverged"]]
    for name in [str(name) for name in runs.columns if name not in OF_A_RUN | {axis}]:
        values = sorted(finite[name].dropna().map(str).unique())
        if name == "fingerprint" and values:
            made_by[name] = ", ".join(values)
        elif len(values) == 1 and _is_number(values[0]):
            made_by[name] = values[0]
    made_by["seeds"] = ", ".join(sorted(runs["seed"].map(str).unique()))
    made_by["lrs"] = ", ".join(f"{lr:.4g}" for lr in np.sort(runs["lr"].unique()))
    if "experiment" in runs.attrs:
        made_by["experiment"] = {key: str(value) for key, value in runs.attrs["experiment"].items()}
    return made_by


def code_version(folder: str | Path = ".") -> str | None:
    """The git commit that is checked out, with "+changes" where files differ from it; None where there is none."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--ignore-submodules=dirty")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.decode().strip() + ("+changes" if changes.strip() else "")


def _git(folder: str | Path, *command: str) -> bytes:
    done = subprocess.run(
        [*GIT, "-C", str(folder), *command],
        capture_output=True,
        check=True,
        timeout=GIT_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# -- read


def read_baseline(path: str | Path) -> Baseline:
    """Read what `Baseline.write` wrote.

    Raises:
        InputError: the file is absent, no JSON, of another schema version, or damaged.
    """
    try:
        with open_file(path) as stream:
            text = stream.read(MOST_BYTES).decode("utf-8-sig")
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=once)
    except FileNotFoundError:
        raise InputError(f"there is no baseline {path}; make it with --update-baseline") from None
    except OSError as error:
        raise InputError(f"cannot read the baseline {path}: {error.strerror}; give a file that you may read") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"the baseline {path} is not JSON: {error}; {REMAKE}") from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InputError(f"{path} is no baseline: it has no schema_version; give lr-optima.json, or {REMAKE}")
    if data["schema_version"] != SCHEMA_VERSION:
        raise InputError(f"{path} has schema_version {data['schema_version']!r:.60}, not {SCHEMA_VERSION}; {REMAKE}")
    try:
        return _baseline(data, str(path))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"the baseline {path} is damaged: {what[:300]}; {REMAKE}") from None


def _baseline(data: Mapping[str, Any], path: str) -> Baseline:
    lr = data["transferred_lr"]
    optima = {
        rule: tuple(_read_optimum(one) for one in _typed(some, list, f"rules {rule}"))
        for rule, some in _typed(data["rules"], dict, "rules").items()
    }
    for rule, some in optima.items():
        if len({one.at for one in some}) < len(some):
            raise ValueError(f"rules {rule} has two optima of one place")
    if not any(one.log2_lr for some in optima.values() for one in some):
        raise ValueError("it holds no optimum")
    return Baseline(
        _typed(data["axis"], str, "axis"),
        _typed(data["unit"], str, "unit"),
        _number(data["confidence"], "confidence", 0, 1),
        None if lr is None else _number(lr, "transferred_lr", 0),
        _typed(data["fingerprint"], dict, "fingerprint"),
        optima,
        path,
        _number(data.get("loss_tolerance", Baseline.loss_tolerance), "loss_tolerance", 0),
    )


def _read_optimum(data: Mapping[str, Any]) -> StoredOptimum:
    at = _typed(data["at"], int, "at")
    if not 1 <= at <= MOST:
        raise ValueError(f"at is {at}, not from 1 to {MOST}")
    if data["censored"] is not None:
        return StoredOptimum(at, _typed(data["censored"], str, "censored"))
    vertices = _by_seed(data["log2_lr_by_seed"], "log2_lr_by_seed", OCTAVES)
    losses = _by_seed(data["loss_by_seed"], "loss_by_seed", LARGEST)
    if vertices.keys() != losses.keys():
        raise ValueError(f"the seeds of {at} differ between log2_lr_by_seed and loss_by_seed")
    log2_lr, loss = _interval(data["log2_lr"], "log2_lr", vertices), _interval(data["loss"], "loss", losses)
    return StoredOptimum(at, None, log2_lr, vertices, loss, losses)


def _by_seed(data: Any, name: str, most: float) -> dict[str, float]:
    seeds = {seed: _number(value, name, -most, most) for seed, value in _typed(data, dict, name).items()}
    if len(seeds) < 2:
        raise ValueError(f"{name} has fewer than two seeds")
    return seeds


def _interval(data: Any, name: str, by_seed: Mapping[str, float]) -> Interval:
    estimate, low, high = (_number(data[key], name) for key in ("estimate", "low", "high"))
    if not low <= estimate <= high:
        raise ValueError(f"{name} is no interval")
    mean = math.fsum(by_seed.values()) / len(by_seed)
    if not math.isclose(estimate, mean, rel_tol=1e-6, abs_tol=1e-6 * max(map(abs, by_seed.values()))):
        raise ValueError(f"{name} is {estimate:.6g}, and its mean over seeds {mean:.6g}")
    return Interval(estimate, low, high)


def _number(value: Any, name: str, above: float = -math.inf, below: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} is {value!r:.60}, not a finite number")
    if not above < value < below:
        raise ValueError(f"{name} is {value:g}, not between {above:g} and {below:g}")
    return float(value)


def _typed(value: Any, kind: type[T], name: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is {short(value)}, not a {kind.__name__}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
