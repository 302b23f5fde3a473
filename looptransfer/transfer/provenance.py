"""The origin of a table of runs: the experiment, the code that is checked out, what the table says; and of a page."""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from looptransfer.checks import is_numeral
from looptransfer.text import without_password
from looptransfer.transfer.results import OF_A_RUN

GIT = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "--no-optional-locks"]  # runs no hook
GIT_SECONDS = 30.0


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Twelve characters that tell one experiment from another; `identity` holds JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def page_origin(*packages: str) -> dict[str, str]:
    """When, by which command of ours and with which versions a page is made."""
    command = shlex.join(["looptransfer", *map(without_password, sys.argv[1:])])
    versions = {name: version(name) for name in ("looptransfer", *packages)}
    return {"date": time.strftime("%Y-%m-%d %H:%M %z"), "command": command, **versions}


def fingerprint_of(runs: pd.DataFrame, axis: str) -> dict[str, Any]:
    """The origin of a table, as far as the table tells, and the code that is checked out in this folder.

    Columns of text but for our own say who and where, such as a tracker's User, Tags and State: they stay out.
    """
    origin: dict[str, Any] = {"looptransfer": version("looptransfer"), "code": code_version()}
    finite = runs[~runs["diverged"]]
    for name in [str(name) for name in runs.columns if name not in OF_A_RUN | {axis}]:
        values = sorted(finite[name].dropna().map(str).unique())
        if name == "fingerprint" and values:
            origin[name] = ", ".join(values)
        elif len(values) == 1 and is_numeral(values[0]):
            origin[name] = values[0]
    origin["seeds"] = ", ".join(sorted(runs["seed"].map(str).unique()))
    origin["lrs"] = ", ".join(f"{lr:.4g}" for lr in np.sort(runs["lr"].unique()))
    if "experiment" in runs.attrs:
        origin["experiment"] = {key: str(value) for key, value in runs.attrs["experiment"].items()}
    return origin


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The names whose values are not the same, with both; an experiment's settings where both sides know them."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if name == "experiment":
            inner = differing(before, after) if isinstance(before, dict) and isinstance(after, dict) else {}
            changes |= {f"experiment {key}": pair for key, pair in inner.items()}
        elif before != after:
            changes[name] = (before, after)
    return changes


def code_version(folder: str | Path = ".") -> str | None:
    """The git commit that is checked out, with "+changes" where files differ from it; None where there is none."""
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--ignore-submodules=dirty")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.decode().strip() + ("+changes" if changes.strip() else "")


def _git(folder: str | Path, *command: str) -> bytes:
    line = [*GIT, "-C", str(folder), *command]
    return subprocess.run(line, capture_output=True, check=True, timeout=GIT_SECONDS, stdin=subprocess.DEVNULL).stdout
