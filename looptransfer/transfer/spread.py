"""The optima drawn in characters, for a terminal without a browser: a line per N over a scale of octaves, in ASCII."""

import math
from collections.abc import Sequence

from looptransfer.transfer.optimum import Optimum

COLUMNS = 56  # of the scale
LABEL = 9  # columns that the label of a tick takes


def spread(optima: Sequence[Optimum], lrs: Sequence[float], transferred: float | None, label: str) -> list[str]:
    """A line per N: `-` where the loss is within the tolerance, `=` the interval of the best LR, `*` the best LR.

    `|` is the transferred LR. Nothing where fewer than two optima are known.

    Args:
        optima: one per N.
        lrs: log2 of the LRs that were run; they are the scale.
        transferred: log2 of the transferred LR.
        label: of the axis, such as N.
    """
    if sum(optimum.log2_lr is not None for optimum in optima) < 2:
        return []
    ends = [*lrs, *([] if transferred is None else [transferred])]
    low, octaves = min(ends), max(max(ends) - min(ends), 1e-9)
    names = [f"{label} = {optimum.n}" for optimum in optima]
    width = max(map(len, names))
    lines = [_line(optimum, transferred, low, COLUMNS / octaves) for optimum in optima]
    scale = [f"{name:{width}}  {line}".rstrip() for name, line in zip(names, lines, strict=True)]
    return [*scale, f"{'LR':{width}}  {_ticks(low, octaves)}"]


def _line(optimum: Optimum, transferred: float | None, low: float, per_octave: float) -> str:
    cells = [" "] * (COLUMNS + 1)

    def fill(first: float, last: float, sign: str) -> None:
        start, end = (min(COLUMNS, max(0, round((x - low) * per_octave))) for x in (first, last))
        cells[start : end + 1] = sign * (end + 1 - start)

    if optimum.basin is not None:
        fill(optimum.basin.low, optimum.basin.high, "-")
    if optimum.log2_lr is not None:
        fill(optimum.log2_lr.low, optimum.log2_lr.high, "=")
    if transferred is not None:
        fill(transferred, transferred, "|")
    if optimum.log2_lr is not None:
        fill(optimum.log2_lr.estimate, optimum.log2_lr.estimate, "*")
    return "".join(cells) + ("" if optimum.censored is None else f"  none: {optimum.censored}")


def _ticks(low: float, octaves: float) -> str:
    """LRs whole octaves apart, as many as there is room for, each beginning at its place."""
    per_octave = COLUMNS / octaves
    step = max(1, math.ceil(LABEL / per_octave))
    line = ""
    for x in range(math.ceil(low), math.floor(low + octaves) + 1, step):
        line = line.ljust(round((x - low) * per_octave)) + f"{2.0**x:.2g}"
    return line
