"""Figures of a coordinate check."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from looptransfer.coordcheck.exponents import on_axis
from looptransfer.coordcheck.result import CoordCheck, Finding
from looptransfer.report.figures import RULE_STYLES, ordered_colours, some_of
from looptransfer.report.panels import Panel, together

# What a figure shows: statistic, which visit, step (0, 1 or the last), title.
AGAINST_N = [
    ("branch_rms", "first", 0, "Added by {} at its first visit"),
    ("stream_rms", "last", 0, "Stream at initialisation"),
    ("change_since_step", "last", 1, "Change of the stream in one step"),
    ("change_since_init", "last", -1, "Change of the stream in all steps"),
]
LEAST_OCTAVES = 3
ANSWER_STYLES = {"passes": ("#0072B2", "o"), "fails": ("#D55E00", "X"), "inconclusive": ("#777777", "D")}


def plot_stream(check: CoordCheck) -> Figure:
    """Stream RMS after every visit of the last looped branch, one colour per N; bands reach over all seeds.

    A row for every rule; left at initialisation, right after the last step.
    """
    figure = together(stream_panels(check), 2, (9.4, 0.9 + 2.3 * len(check.rules)))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def stream_panels(check: CoordCheck) -> list[Panel]:
    """The panels of `plot_stream`, row by row."""
    stream, counts = _stream(check), sorted(check.frame["loops"].unique())
    steps = (0, stream["step"].max())
    draw = partial(_draw_stream, stream=stream, counts=counts)
    return [partial(draw, rule=rule, step=step) for rule in check.rules for step in steps]


def _stream(check: CoordCheck) -> pd.DataFrame:
    """The stream after each visit of the last looped branch, of all rules."""
    module = (check.context.looped or [check.context.branches[-1].module])[-1]
    rows = pd.concat([_rows(check, rule) for rule in check.rules])
    return rows[(rows["statistic"] == "stream_rms") & (rows["module"] == module)]


def _draw_stream(axis: Axes, stream: pd.DataFrame, counts: Sequence[int], rule: str, step: int) -> None:
    colours = ordered_colours(counts)
    shown = stream[stream["step"] == step]
    for count in counts:
        rows = shown[(shown["rule"] == rule) & (shown["loops"] == count)]
        _band(axis, rows.groupby("visit")["value"], colours[count], "o" if count == 1 else "")
    _log_axes(axis, shown["value"])
    axis.set_title(f"{rule}, {'at initialisation' if step == 0 else f'after {step} steps'}", fontsize="medium")
    axis.set(xlabel="visit n", ylabel="stream RMS")
    for count in some_of(counts):
        axis.plot([], [], color=colours[count], linewidth=2.5, label=f"N = {count}")


def plot_growth(check: CoordCheck) -> Figure:
    """Four statistics against N, a line per rule: mean over seeds, the band reaches over all of them."""
    figure = together(growth_panels(check), 2, (9.4, 6.4))
    figure.axes[0].legend(frameon=False, fontsize="small")
    return figure


def growth_panels(check: CoordCheck) -> list[Panel]:
    """The panels of `plot_growth`."""
    branch = _worst_branch(check)
    return [partial(_draw_growth, check=check, branch=branch, shown=shown) for shown in AGAINST_N]


def _draw_growth(axis: Axes, check: CoordCheck, branch: str, shown: tuple[str, str, int, str]) -> None:
    statistic, which, step, title = shown
    module = branch if statistic == "branch_rms" else check.context.branches[-1].module
    for rule, (colour, marker) in zip(check.rules, cycle(RULE_STYLES), strict=False):
        rows = _rows(check, rule)
        rows = rows[(rows["statistic"] == statistic) & (rows["module"] == module)]
        rows = rows[rows["step"] == (rows["step"].max() if step < 0 else step)]
        visit = rows.groupby(["loops", "seed"])["visit"].transform("min" if which == "first" else "max")
        _band(axis, rows[rows["visit"] == visit].groupby("loops")["value"], colour, marker, rule)
    _log_axes(axis)
    axis.set(title=title.format(branch), xlabel="loop count N", ylabel="RMS")


def plot_exponents(check: CoordCheck) -> Figure:
    """Every judged exponent with its interval, on the range that is promised and its tolerance."""
    shown = [finding for finding in check.judged if finding.exponent is not None and finding.axis != "level"]
    figure = Figure(figsize=(9.4, 1.3 + 0.2 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for place, finding in enumerate(reversed(shown)):
        assert finding.exponent is not None
        (colour, marker), exponent = ANSWER_STYLES[finding.answer], finding.exponent
        low, high = finding.low - finding.tolerance, finding.high + finding.tolerance
        axis.barh(place, high - low, left=low, height=0.86, color="#009E73", alpha=0.22, linewidth=0)
        error = [[exponent.estimate - exponent.low], [exponent.high - exponent.estimate]]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5, "capsize": 2}
        axis.errorbar(exponent.estimate, place, xerr=error, **style)
    axis.set_yticks(range(len(shown)), [_label(finding) for finding in reversed(shown)], fontsize="x-small")
    ends = [-1.0, 0.0, *(finding.exponent.estimate for finding in shown if finding.exponent)]
    ends += [edge for finding in shown for edge in (finding.low - finding.tolerance, finding.high + finding.tolerance)]
    axis.set_xlim(min(ends) - 0.15, max(ends) + 0.15)
    axis.set_ylim(-0.8, len(shown) - 0.2)
    axis.set(xlabel="exponent of N (of layers or width where it says so)")
    axis.grid(alpha=0.25, axis="x")
    names = {answer for answer in ANSWER_STYLES if any(finding.answer == answer for finding in shown)}
    handles: list[Any] = [
        axis.plot([], [], color=colour, marker=marker, linestyle="none", label=answer)[0]
        for answer, (colour, marker) in ANSWER_STYLES.items()
        if answer in names
    ]
    handles.append(axis.barh([0], [0], color="#009E73", alpha=0.22, label="promised, ± tolerance"))
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize="small")
    return figure


def plot_cosines(check: CoordCheck) -> Figure | None:
    """Cosines between the increments of the loops at the largest N, before and after; None where nothing loops."""
    panels = cosine_panels(check)
    if not panels:
        return None
    figure = together(panels, len(panels), (1.4 + 3.6 * len(panels), 3.6))
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label="cosine", shrink=0.85)
    return figure


def cosine_panels(check: CoordCheck) -> list[Panel]:
    """The panels of `plot_cosines`; none where nothing loops."""
    keys = [(loops, step) for rule, loops, step in check.cosines if rule == check.rule]
    largest = max(keys, default=(0, 0))[0]
    steps = sorted(step for loops, step in keys if loops == largest)
    return [partial(_draw_cosines, check=check, loops=largest, step=step) for step in steps]


def _draw_cosines(axis: Axes, check: CoordCheck, loops: int, step: int) -> None:
    matrix = check.cosines[check.rule, loops, step]
    extent = (0.5, len(matrix) + 0.5, len(matrix) + 0.5, 0.5)
    axis.imshow(matrix, cmap=colormaps["PuOr_r"], vmin=-1, vmax=1, extent=extent, interpolation="nearest")
    axis.set_title("at initialisation" if step == 0 else f"after {step} steps")
    axis.set(xlabel="increment of loop n", ylabel="increment of loop m")


def drawn(check: CoordCheck) -> pd.DataFrame:
    """The rows of the frame that growth and stream are drawn from."""
    modules = [_worst_branch(check), check.context.branches[-1].module, *check.context.looped[-1:]]
    rows = check.frame[check.frame["module"].isin(modules)]
    rows = rows[rows["statistic"].isin([statistic for statistic, *_ in AGAINST_N])]
    return rows[rows["step"].isin([0, 1, rows["step"].max()])]


def _rows(check: CoordCheck, rule: str) -> pd.DataFrame:
    rows = on_axis(check.frame[check.frame["rule"] == rule], "loops")
    return rows[np.isfinite(rows["value"]) & (rows["value"] > 0)]


def _worst_branch(check: CoordCheck) -> str:
    """The looped branch whose multiplier is furthest from what is promised."""
    distances = [
        (abs(finding.exponent.estimate - finding.low), finding.module)
        for finding in check.judged
        if finding.statistic == "branch_rms" and finding.which == "first" and finding.exponent
    ]
    return max(distances)[1] if distances else check.context.branches[0].module


def _band(axis: Axes, groups: Any, colour: Any, marker: str, label: str = "") -> None:
    mean, low, high = groups.mean(), groups.min(), groups.max()
    axis.plot(mean.index, mean, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
    axis.fill_between(mean.index, low, high, color=colour, alpha=0.2, linewidth=0)


def _log_axes(axis: Axes, values: pd.Series | None = None) -> None:
    """Octaves both ways, as high as all `values` where they are given."""
    if not np.isfinite(axis.dataLim.minposx):
        axis.set(xlim=(0.5, 2), ylim=(0.5, 2))
        axis.text(1, 1, "nothing finite to show", ha="center")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    if values is not None and len(values):
        axis.set_ylim(values.min() / 1.1, values.max() * 1.1)
    low, high = axis.get_ylim()
    spare = max(0.0, (LEAST_OCTAVES - math.log2(high / low)) / 2)  # what is flat shall look flat
    axis.set_ylim(low / 2**spare, high * 2**spare)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{math.log2(value):.0f}}}$"))
    for along in (axis.xaxis, axis.yaxis):
        along.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)


def _label(finding: Finding) -> str:
    over = "" if finding.axis == "loops" else f", over {finding.axis}"
    visits = {"all": ", all visits"}.get(finding.which, f", {finding.which} visit")
    visits = visits if finding.statistic == "branch_rms" else ""
    return f"{finding.module}: {finding.statistic}{visits}, {finding.moment}{over}"
