"""Studies of several sweeps: made one after another in pieces that resume, and shown as a table and two pictures."""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import looptransfer as lt
from looptransfer.report.figures import ORDERED
from looptransfer.rules import Rule
from looptransfer.transfer.optimum import Interval, t_interval
from looptransfer.transfer.verdict import RuleVerdict
from looptransfer.trials.run import Run

CENTRE = 0.014  # absolute; near the optimum of reports/sweep at N = 2
SEEDS = 3
MORE_SEEDS = 10  # where fewer had left it open
STEP = 0.75  # octaves between LRs
ANSWER_STYLES = {"FLAT": ("#0072B2", "o"), "DRIFTS": ("#D55E00", "s"), "INCONCLUSIVE": ("#7F7F7F", "D")}


@dataclass(frozen=True)
class Cell:
    """One sweep, `name`.csv of a report.

    The grid grows by two LRs, `extensions` times at most, where the lowest mean loss of some rule and N lies on its
    edge.
    """

    name: str
    make_experiment: Callable[[], lt.Experiment]
    loops: tuple[int, ...]
    rules: tuple[Rule, ...]
    octaves: tuple[float, ...]
    centre: float = CENTRE
    seeds: int = SEEDS
    extensions: int = 2

    def table(self, out: Path) -> Path:
        """Where its results are written, once it is finished."""
        return out / f"{self.name}.csv"

    def finished(self, out: Path) -> bool:
        """Whether the table holds every run; those of a grown grid may be more."""
        runs = self._stored(out)
        stored = set(zip(runs["rule"], runs["loops"], self._octaves(runs), runs["seed"], strict=True))
        return stored >= set(product(self.rules, self.loops, self.octaves, range(self.seeds)))

    def run(self, out: Path, workers: int) -> None:
        """Make the sweep, or what its table and its ledger do not hold of it."""
        ledger = out / self.name / "ledger.db"
        ledger.parent.mkdir(parents=True, exist_ok=True)
        trained, runs = self.make_experiment(), self._stored(out)
        octaves = sorted({*self.octaves, *self._octaves(runs)})
        for extension in range(self.extensions + 1):
            known = {Run(*row) for row in runs[["rule", "loops", "lr", "seed"]].itertuples(index=False)}
            further_runs = lt.sweep(
                trained, self.loops, self.centre, self.rules, seeds=self.seeds, octaves=octaves, ledger=ledger,
                workers=workers, known=known,
            )  # fmt: skip
            runs = pd.concat([frame for frame in (runs, further_runs) if len(frame)], ignore_index=True)
            further = beyond(runs, octaves)
            if extension == self.extensions or not further:
                break
            octaves = sorted({*octaves, *further})
        runs.to_csv(self.table(out), index=False)

    def _octaves(self, runs: pd.DataFrame) -> list[float]:
        """The LRs of runs as log2 distances from the centre."""
        return [round(math.log2(lr / self.centre), 3) for lr in runs["lr"]]

    def _stored(self, out: Path) -> pd.DataFrame:
        """The runs of the table, if there is one."""
        if not self.table(out).exists():
            return pd.DataFrame(columns=["rule", "loops", "lr", "seed"])
        return pd.read_csv(self.table(out), float_precision="round_trip")


def options(doc: str | None, report: Path) -> argparse.ArgumentParser:
    """The options of a study, whose report stands in a folder."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further sweep after that time")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=report)
    return parser


def publish(out: Path, text: str) -> None:
    """Write a report, and print it."""
    (out / "README.md").write_text(text)
    print(text)


def beyond(runs: pd.DataFrame, octaves: Sequence[float]) -> list[float]:
    """Two further LRs on each side on which the lowest mean loss of some rule and N lies at the edge of the grid."""
    means = runs.groupby(["rule", "loops", "lr"])["loss"].mean()
    best = {float(means[cell].idxmin()) for cell in means.index.droplevel("lr").unique()}
    low = [octaves[0] - 2 * STEP, octaves[0] - STEP] if runs["lr"].min() in best else []
    return low + ([octaves[-1] + STEP, octaves[-1] + 2 * STEP] if runs["lr"].max() in best else [])


def run_cells(cells: Sequence[Cell], out: Path, minutes: float, workers: int) -> list[Cell]:
    """Make what is not finished, beginning no further cell after so many minutes; the finished ones."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        if time.monotonic() - started > 60 * minutes:
            break
        if not cell.finished(out):
            print(cell.name, file=sys.stderr, flush=True)
            cell.run(out, workers)
    return [cell for cell in cells if cell.finished(out)]


def rows_of(verdict: lt.Verdict) -> pd.DataFrame:
    """A row per rule: what a reader wants to compare."""
    differences = {difference.control: difference.drift for difference in verdict.differences}
    axis, rows = verdict.axis, []
    means = verdict.runs.groupby(["rule", axis, "lr"])["loss"].mean()
    for name, judged in verdict.rules.items():
        best = means[name].groupby(level=0).min()
        rows.append(
            {
                "rule": name,
                "seeds": str(min(optimum.seeds for optimum in judged.optima)),
                "verdict": judged.answer,
                "drift": judged.drift.text(2) if judged.drift else f"none: {judged.cause}",
                "minus the first": "" if not differences.get(name) else differences[name].text(2),
                "regret": regret_of(verdict, name),
                "best mean loss": ", ".join(f"{loss:.3f}" for loss in best),
                "at LR 2^": ", ".join(f"{math.log2(means[name][size].idxmin()):.2f}" for size in best.index),
            }
        )
    return pd.DataFrame(rows)


def regret_of(verdict: lt.Verdict, rule: str) -> str:
    """The regret of a rule with its interval, or that a run at that LR diverges."""
    regret = verdict.rules[rule].regret
    if regret is None:
        return ""
    return "diverges" if math.isinf(regret.estimate) else regret.text(3)


def gain_of_loops(judged: RuleVerdict) -> Interval:
    """The loss at the best LR of the smallest N less that at the best of the largest, paired by seed, by the grid."""
    tables = list(judged.tables.values())
    first, last = (table.loc[table.mean(axis=1).idxmin()] for table in (tables[0], tables[-1]))
    return t_interval((first - last).dropna(), 0.9)


def footer(tables: Iterable[pd.DataFrame]) -> list[str]:
    """What the runs took, and on what."""
    runs = pd.concat(tables)
    return [
        f"{len(runs)} rows, {int(runs['diverged'].sum())} of them diverged; the runs took "
        f"{runs['seconds'].sum():.0f} s in all, as long as each lasted, on a machine that others used.",
        f"Python {platform.python_version()}, torch {version('torch')}, looptransfer {version('looptransfer')}, "
        f"{platform.machine()}, {os.cpu_count()} cores.",
    ]


def draw_drifts(verdicts: Mapping[str, lt.Verdict]) -> Figure:
    """The drift of every rule with its interval, a panel per study."""
    heights = [len(verdict.rules) for verdict in verdicts.values()]
    figure = Figure(figsize=(7.2, 0.7 * len(heights) + 0.36 * sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, verdict) in zip(panels, verdicts.items(), strict=True):
        panel.axvspan(-verdict.tolerance, verdict.tolerance, color="0.9", linewidth=0)
        for row, judged in enumerate(verdict.rules.values()):
            if judged.drift:
                drift, (colour, marker) = judged.drift, ANSWER_STYLES[judged.answer]
                panel.plot([drift.low, drift.high], [row, row], color=colour, linewidth=2)
                panel.plot([drift.estimate], [row], color=colour, marker=marker)
            else:
                panel.text(0, row, judged.cause, ha="center", va="center", fontsize="small", color="0.35")
        panel.set_yticks(range(len(verdict.rules)), list(verdict.rules))
        panel.set_ylim(len(verdict.rules) - 0.5, -0.5)
        panel.set_title(title, loc="left", fontsize="medium")
        panel.axvline(0, color="0.6", linewidth=0.8)
    panels[-1].set_xlabel("drift of the best base LR, octaves per doubling\n(grey: within the tolerance)")
    for answer, (colour, marker) in ANSWER_STYLES.items():
        panels[0].plot([], [], color=colour, marker=marker, label=answer)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure


def draw_losses(axis: Axes, judged: RuleVerdict, style: str = "-") -> None:
    """Mean loss against LR at each N, the range of the seeds shaded, optima starred, LRs that diverge crossed."""
    for place, (optimum, losses) in enumerate(zip(judged.optima, judged.tables.values(), strict=True)):
        colour = ORDERED(place / max(1, len(judged.optima) - 1))
        stable = losses[losses.max(axis=1).map(math.isfinite)]
        lrs = [2.0 ** float(x) for x in stable.index]
        axis.plot(lrs, stable.mean(axis=1), style, color=colour, marker=".", label=f"N = {optimum.n}")
        axis.fill_between(lrs, stable.min(axis=1), stable.max(axis=1), color=colour, alpha=0.18, linewidth=0)
        diverged = [2.0 ** float(x) for x in losses.index.difference(stable.index)]
        if diverged:  # an empty line that is not clipped would confuse the layout
            height, top = [0.97 - 0.035 * place] * len(diverged), axis.get_xaxis_transform()
            axis.plot(diverged, height, "x", color=colour, transform=top, clip_on=False)
        if optimum.log2_lr is not None:
            best = optimum.log2_lr.estimate
            axis.plot([2**best], [optimum.loss(best).mean()], "*", color=colour, markersize=14, markeredgecolor="white")
    axis.set_xscale("log", base=2)
