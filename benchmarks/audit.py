"""Published LR grids over loops, width or layers, each judged by `check` as it stands.

    python -m benchmarks.audit [--out reports/audit]

Reads the grids in reports/audit/data, what sources.csv says of each, and not_had.csv; writes README.md and forest.png.
Nothing is trained, and every option of `check` is at its default.
"""

import argparse
import math
import platform
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import looptransfer as lt
from benchmarks.verdict_simulations import table
from looptransfer.transfer.optimum import REACH, Interval, pooled_vertex
from looptransfer.transfer.verdict import RuleVerdict, Verdict

HOME = Path("reports/audit")
METRICS = ("loss", "bpb")  # names of the column that is the loss
EDGES = ("low edge", "high edge", "diverged")
SHOWN = 2.7  # octaves per doubling to either side in the figure
COLUMNS = (2.95, 4.6)  # places of the columns beside it
STYLES = {
    "inside": ("limits inside the tolerance", "#0072B2", "o"),
    "outside": ("limits outside it", "#D55E00", "s"),
    "across": ("limits on both sides", "#595959", "D"),
}


@dataclass(frozen=True)
class Grid:
    """A published grid and its verdict.

    Attributes:
        source: its row of sources.csv.
        fitted: the drift of the vertices of the fits, in octaves per doubling; None where fewer than two N have one.
        limits: the lowest and the highest drift with the optimum of each N between the LRs beside its best one, which
            is all that a grid without noise could say; infinite where the best LR is the last one. None with one N.
    """

    source: Mapping[str, str]
    verdict: Verdict
    judged: RuleVerdict
    fitted: float | None
    limits: tuple[float, float] | None

    @property
    def size(self) -> str:
        """LRs × seeds × sizes, the LRs as a range where the sizes differ."""
        tables = self.judged.tables.values()
        counts = [sorted({table.shape[axis] for table in tables}) for axis in (0, 1)]
        lrs, seeds = ("–".join(map(str, sorted({few[0], few[-1]}))) for few in counts)
        return f"{lrs} × {seeds} × {len(tables)}"

    @property
    def edges(self) -> list[int]:
        """The N whose best LR is the last one that was run, or the last stable one."""
        return [optimum.n for optimum in self.judged.optima if optimum.censored in EDGES]

    @property
    def told(self) -> str:
        """Whether the grid's limits lie inside the tolerance, outside, or on both sides of it."""
        if self.limits is None:
            return "one size"
        ends, tolerance = Interval(math.nan, *self.limits), self.verdict.tolerance
        return "inside" if ends.inside(tolerance) else "outside" if ends.outside(tolerance) else "across"


def read(home: Path) -> list[Grid]:
    """Every grid of sources.csv, judged."""
    sources = pd.read_csv(home / "sources.csv", dtype=str, keep_default_na=False).to_dict("records")
    return [judge(home, {str(name): str(value) for name, value in source.items()}) for source in sources]


def judge(home: Path, source: Mapping[str, str]) -> Grid:
    """A grid by `check`, under the rule that its row names; another rule in the table is its control."""
    path = home / "data" / f"{source['grid']}.csv"
    metric = next(name for name in METRICS if name in path.read_text().partition("\n")[0].split(","))
    runs = lt.read_results(path, columns={"loss": metric}, axis=source["axis"])
    verdict = lt.check(runs, rule=source["rule"] or None, axis=source["axis"])
    judged = verdict.judged
    return Grid(source, verdict, judged, fitted_drift(judged), limits(judged.tables))


def fitted_drift(judged: RuleVerdict) -> float | None:
    """The slope of the fitted vertices over log2(N), where the best LR of two N or more lies inside their grids."""
    vertices = {
        optimum.n: pooled_vertex(judged.tables[optimum.n], 3, REACH)
        for optimum in judged.optima
        if optimum.censored not in (*EDGES, "too few LRs")
    }
    found = {n: vertex for n, vertex in vertices.items() if vertex is not None}
    return float(np.polyfit(np.log2(list(found)), list(found.values()), 1)[0]) if len(found) > 1 else None


def limits(tables: Mapping[int, pd.DataFrame]) -> tuple[float, float] | None:
    """The lowest and the highest slope over log2(N) of points that lie between the LRs beside the best of each N."""
    if len(tables) < 2:
        return None
    doublings = np.log2(list(tables))
    weights = doublings - doublings.mean()
    weights = weights / float(weights @ weights)
    low = high = 0.0
    for weight, losses in zip(weights, tables.values(), strict=True):
        x = [-math.inf, *losses.index, math.inf]
        best = 1 + int(np.argmin(losses.mean(axis=1)))
        ends = sorted((weight * x[best - 1], weight * x[best + 1])) if weight else (0.0, 0.0)
        low, high = low + ends[0], high + ends[1]
    return float(low), float(high)


def forest(grids: Sequence[Grid]) -> Figure:
    """A line per grid: its limits, its fitted drift, and what `check` says why."""
    figure = Figure(figsize=(9.6, 0.27 * len(grids) + 2.0), layout="constrained")
    panel = figure.subplots()
    places, tolerance = _places(grids), grids[0].verdict.tolerance
    panel.axvspan(-tolerance, tolerance, color="0.90", zorder=0)
    panel.axvline(0, color="0.4", linewidth=0.8, zorder=1)
    panel.set(xlim=(-SHOWN - 0.15, SHOWN + 0.15), ylim=(max(places) + 0.8, min(places) - 1.6))
    for grid, y in zip(grids, places, strict=True):
        _draw(panel, grid, y)
    for axis in dict.fromkeys(grid.source["axis"] for grid in grids):
        first = next(y for grid, y in zip(grids, places, strict=True) if grid.source["axis"] == axis)
        panel.text(-SHOWN * 0.99, first - 0.95, f"over {axis}", va="center", fontsize=8, weight="bold")
    for x, title in zip(COLUMNS, ("LRs × seeds × sizes", "what check says"), strict=True):
        panel.text(x, min(places) - 0.95, title, va="center", fontsize=7.5, weight="bold")
    label = f"drift of the best LR, octaves per doubling of the size (grey: tolerance of ±{tolerance:g})"
    panel.set_xlabel(label, fontsize=8.5)
    panel.set_yticks(places, [grid.source["label"] for grid in grids], fontsize=7.5)
    panel.tick_params(axis="x", labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    for name, colour, marker in STYLES.values():
        panel.plot([], [], color=colour, marker=marker, markerfacecolor="white", linewidth=1.4, label=name)
    title = (
        "line: limits of the grid, an arrow where the best LR is its last; mark: fitted drift; black bar: its interval"
    )
    figure.legend(
        loc="outside lower center", ncols=3, frameon=False, fontsize="small", title=title, title_fontsize="small"
    )
    return figure


def _places(grids: Sequence[Grid]) -> list[float]:
    """The line of each grid, with a gap before each axis."""
    axes = list(dict.fromkeys(grid.source["axis"] for grid in grids))
    return [number + 1.4 * axes.index(grid.source["axis"]) for number, grid in enumerate(grids)]


def _draw(panel: Axes, grid: Grid, y: float) -> None:
    """The line of a grid, and the columns beside it."""
    for x, cell in zip(COLUMNS, (grid.size, f"{grid.judged.answer}: {grid.judged.cause}"), strict=True):
        panel.text(x, y, cell, va="center", fontsize=7.5)
    if grid.limits is None:
        panel.text(0.3, y, "one size: no drift to see", va="center", fontsize=7.5, style="italic")
        return
    _, colour, marker = STYLES[grid.told]
    low, high = (max(-SHOWN, min(SHOWN, end)) for end in grid.limits)
    panel.plot([low, high], [y, y], color=colour, linewidth=1.4, zorder=2)
    for shown, end, arrow in ((low, grid.limits[0], "<"), (high, grid.limits[1], ">")):
        cap, size = ("|", 7.0) if shown == end else (arrow, 6.0)
        panel.plot(shown, y, marker=cap, color=colour, markersize=size, zorder=3)
    drift = grid.judged.drift
    if drift is not None:
        panel.plot([drift.low, drift.high], [y, y], color="black", linewidth=3.5, zorder=3)
    if grid.fitted is not None:
        panel.plot(grid.fitted, y, marker=marker, color=colour, markersize=6, markerfacecolor="white", zorder=4)


def rows(grids: Sequence[Grid]) -> pd.DataFrame:
    """The cells of the table, as text."""
    columns = [
        "grid", "source", "axis", "LRs × seeds × sizes", "fitted drift", "interval", "limits of the grid",
        "best LR is the last at", "verdict", "regret", "what would tell", "what else changes",
    ]  # fmt: skip
    return pd.DataFrame(map(_row, grids), columns=columns)


def _row(grid: Grid) -> list[str]:
    source, judged = grid.source, grid.judged
    name = f"[{source['label']}](data/{source['grid']}.csv)" + (f", rule {source['rule']}" if source["rule"] else "")
    commit = f" at {source['commit'][:7]}" if source["commit"] else ""
    origin = f"[{source['source'].removeprefix('https://github.com/')}]({source['source']}), {source['place']}{commit}"
    runs = judged.further_runs
    return [
        name,
        origin,
        source["axis"],
        grid.size,
        "" if grid.fitted is None else _octaves(grid.fitted),
        "none" if judged.drift is None else f"{judged.drift}",
        "" if grid.limits is None else " to ".join(map(_octaves, grid.limits)),
        ", ".join(map(str, grid.edges)),
        f"{judged.answer}: {judged.cause}",
        grid.verdict.regret_text(judged.regret),
        judged.advice + ("" if runs is None else f" ({len(runs)} runs)"),
        source["changes_too"],
    ]


def _octaves(drift: float) -> str:
    """Two decimals with a sign; that of nothing is a plus, whatever rounding made of it."""
    return f"{round(drift, 2) + 0.0:+.2f}".replace("inf", "∞")


def report(grids: Sequence[Grid], not_had: pd.DataFrame, seconds: float) -> str:
    """The README: what was found, the figure, the table, what could not be had, how it was made."""
    several, terms = [grid for grid in grids if grid.limits is not None], grids[0].verdict
    seeds = Counter(max(optimum.seeds for optimum in grid.judged.optima) for grid in grids)
    answers = Counter(grid.judged.answer for grid in grids)
    causes = Counter(grid.judged.cause for grid in grids)
    told = Counter(grid.told for grid in several)
    runs = sum(int(table.size) for grid in grids for table in grid.judged.tables.values())
    where = len({grid.source["source"].split("/issues")[0].split("/pull")[0] for grid in grids})
    one, several_seeds = seeds[1], len(grids) - seeds[1]
    text = [
        "# The public audit",
        "`python -m benchmarks.audit` judges every LR grid over loops, width or layers that could be had as numbers "
        "from public repositories, their pull requests, issues and logs, by `check` with its defaults: a drift of at "
        f"most {terms.tolerance:g} octave per doubling is flat, intervals are of {terms.confidence:.0%}. Nothing was "
        "trained, and nothing chosen by what comes out.",
        f"- {len(grids)} grids of {where} repositories, {runs} runs. "
        f"Verdicts: {_counted(answers)}. Why: {_counted(causes)}.",
        f"- {one} grids have one seed, {several_seeds} have more. One seed was what there was: these sweeps were made "
        "to choose an LR, for which one seed may do. They cannot tell a shift of the best LR from noise, so `check` "
        "gives no interval; that is no finding against the rule that was tried.",
        "- What a grid could say if its losses had no noise, without a fit: the best LR lies between those beside the "
        f"lowest loss, which leaves a range of drifts, its limits. Of the {len(several)} grids with more than one size "
        f"they lie inside the tolerance in {told['inside']}, outside in {told['outside']}, and on both sides in "
        f"{told['across']}. There only a fit between the LRs can tell, and how far to trust it only more seeds. In "
        f"{sum(bool(grid.edges) for grid in several)} the best LR of some size is the last one that was run or stable.",
        "- The fitted drift is the slope of the vertices of the local cubics that `check` fits; of one seed it has no "
        "interval.",
        "![The fitted drift and the limits of every grid](forest.png)",
        "## The grids",
        "Drift, interval and limits are in octaves per doubling of the axis, the regret in the unit of the loss. A "
        "grid in which width and layers grow together stands under one of them, by whose column its sizes can be told "
        "apart. Where the LR is a multiple of a rule, a drift is one from that rule.",
        table(rows(grids)),
        "## What could not be had",
        table(not_had),
        "## How this was made",
        "The numbers are those of the sources, rounded to five or six digits where they had more; they were read from "
        "stored copies of the repositories and threads in November 2026, where the end of a long comment could be "
        "missing. A run that ended early or was still running is left out; one whose loss is nan diverged. Of Step "
        "Law's batch sizes 64, 256 and 1024 were taken. Each CSV goes into `looptransfer check FILE --axis AXIS` as it "
        "is, with `--rule` where it has rules and `--columns loss=bpb` where that is its column.",
        f"{datetime.now(UTC):%Y-%m-%d}, {seconds:.1f} s; Python {platform.python_version()}, numpy {version('numpy')}, "
        f"scipy {version('scipy')}, pandas {version('pandas')}, looptransfer {version('looptransfer')}, "
        f"{platform.machine()}.",
    ]
    return "\n\n".join(_wrapped(paragraph) for paragraph in text) + "\n"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _wrapped(paragraph: str) -> str:
    """A paragraph in lines of 120 characters; a table, a heading or a picture as it is."""
    if paragraph[0] in "|#!":
        return paragraph
    return textwrap.fill(
        paragraph, 120, subsequent_indent="  " * paragraph.startswith("- "), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HOME)
    arguments = parser.parse_args()
    started = time.perf_counter()
    grids = read(HOME)
    arguments.out.mkdir(parents=True, exist_ok=True)
    forest(grids).savefig(arguments.out / "forest.png", dpi=150, bbox_inches="tight")
    not_had = pd.read_csv(HOME / "not_had.csv", dtype=str, keep_default_na=False)
    text = report(grids, not_had, time.perf_counter() - started)
    (arguments.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
