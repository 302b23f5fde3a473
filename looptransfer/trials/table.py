"""The table that a sweep writes: read again, grown by another sweep, and shown."""

import io
from pathlib import Path
from typing import Any

import pandas as pd

from looptransfer.errors import InputError
from looptransfer.transfer.results import COLUMNS
from looptransfer.transfer.sources import cells_of


def read_table(path: Path) -> tuple[str, list[tuple[Any, ...]]]:
    """The text of a table that `sweep` wrote, and its runs as rule, loops, lr, seed."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        header, *rows = (cells_of(line) if line.strip() else [] for line in text.splitlines() or [""])
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no CSV"
        raise InputError(f"cannot read {path}: {why}; give a table that sweep wrote, or a new file with -o") from None
    if header != COLUMNS:
        raise InputError(
            f"{path} has other columns, {','.join(header)[:200]!r}; --append needs a table that sweep wrote, with "
            f"{','.join(COLUMNS)}: give one, or a new file with -o"
        )
    runs = []
    for line, row in enumerate(rows, start=2):
        if not row:
            continue
        try:
            cells = dict(zip(COLUMNS, row, strict=True))
            runs.append((cells["rule"], int(cells["loops"]), float(cells["lr"]), int(cells["seed"])))
        except ValueError as error:
            raise InputError(f"{path}, line {line} is no run: {error}; correct it, or drop the line") from None
    return text if text.endswith("\n") else text + "\n", runs


def grown(path: Path, results: pd.DataFrame) -> str:
    """The table at `path` with the runs that it lacks; read again, since another sweep may have added to it."""
    text, kept_runs = read_table(path)
    runs = results[["rule", "loops", "lr", "seed"]].itertuples(index=False, name=None)
    return text + str(results[[run not in kept_runs for run in runs]].to_csv(index=False, header=False))


def loss_table(text: str) -> str:
    """Mean loss over seeds in nats, LRs down and N across, a block for each rule; * is the lowest of its N."""
    frame = pd.read_csv(io.StringIO(text))
    frame["loss"] = pd.to_numeric(frame["loss"], errors="coerce").fillna(float("inf"))
    lines = []
    for rule, rows in frame.groupby("rule"):
        mean = rows.groupby(["lr", "loops"])["loss"].mean().unstack()
        lowest = mean.min()
        lines.append(f"rule {rule}: mean loss in nats, seeds: {rows['seed'].nunique()}, * marks the lowest of each N")
        lines.append("".join(f"{head:>11}" for head in ["LR", *(f"N = {count}" for count in mean.columns)]))
        for lr, losses in mean.iterrows():
            cells = (
                f"{loss:.4f}" + ("*" if loss == lowest[count] < float("inf") else " ") for count, loss in losses.items()
            )
            lines.append(f"{lr:>11.4g}" + "".join(f"{cell.replace('nan', '-'):>11}" for cell in cells))
    return "\n".join(lines)
