"""Figures of a coordinate check."""

import math
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

# What a figure shows: statistic, which visit, step (0, 1 or the last), title.
AGAINST_N = [
    ("branch_rms", "first", 0, "Added by {} at its first visit"),
    ("stream_rms", "last", 0, "Stream at initialisation"),
    ("change_since_step", "last", 1, "Change of the stream in finding step"),
    ("change_since_init", "last", -1, "Change of the stream in all steps"),
]
LEAST_OCTAVES = 3
ANSWER_STYLES = {"passes": ("#0072B2", "o"), "fails": ("#D55E00", "X"), "inconclusive": ("#777777", "D")}


def plot_stream(check: CoordCheck) -> Figure:
    """Stream RMS after every visit of the last looped branch, finding colour per N; bands reach over all seeds.

    A row for every rule; left at initialisation, right after the last step.
    """
    counts = sorted(check.frame["loops"].unique())
    colours = dict(zip(counts, ordered_colours(len(counts)), strict=True))
    figure = Figure(figsize=(9.4, 0.9 + 2.3 * len(check.rules)), layout="constrained")
    axes = figure.subplots(len(check.rules), 2, sharex=True, sharey="col", squeeze=False)
    module = (check.context.looped or [check.context.branches[-1].module])[-1]
    for row, rule in enumerate(check.rules):
        rows = _rows(check, rule)
        rows = rows[(rows["statistic"] == "stream_rms") & (rows["module"] == module)]
        for axis, step in zip(axes[row], (0, rows["step"].max()), strict=True):
            for count in counts:
                chosen = rows[(rows["loops"] == count) & (rows["step"] == step)]
                _band(axis, chosen.groupby("visit")["value"], colours[count], "o" if count == 1 else "")
            _log_axes(axis)
            axis.set_title(f"{rule}, {'at initialisation' if step == 0 else f'after {step} steps'}", fontsize="medium")
        axes[row, 0].set_ylabel("stream RMS")
    for axis in axes[-1]:
        axis.set_xlabel("visit n")
    handles = [axes[0, 0].plot([], [], color=colours[n], linewidth=2.5, label=f"N = {n}")[0] for n in some_of(counts)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def plot_growth(check: CoordCheck) -> Figure:
    """Four statistics against N, a line per rule: mean over seeds, the band reaches over all of them."""
    figure = Figure(figsize=(9.4, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).flat
    branch = _worst_branch(check)
    for axis, (statistic, which, step, title) in zip(axes, AGAINST_N, strict=True):
        module = branch if statistic == "branch_rms" else check.context.branches[-1].module
        for place, rule in enumerate(check.rules):
            colour, marker = RULE_STYLES[place % len(RULE_STYLES)]
            rows = _rows(check, rule)
            rows = rows[(rows["statistic"] == statistic) & (rows["module"] == module)]
            rows = rows[rows["step"] == (rows["step"].max() if step < 0 else step)]
            visit = rows.groupby(["loops", "seed"])["visit"].transform("min" if which == "first" else "max")
            _band(axis, rows[rows["visit"] == visit].groupby("loops")["value"], colour, marker, rule)
        _log_axes(axis)
        axis.set(title=title.format(branch), ylabel="RMS")
    for axis in figure.axes[2:]:
        axis.set_xlabel("loop count N")
    figure.axes[0].legend(frameon=False, fontsize="small")
    return figure


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
    keys = [(loops, step) for rule, loops, step in check.cosines if rule == check.rule]
    largest = max(keys, default=(0, 0))[0]
    steps = sorted(step for loops, step in keys if loops == largest)
    if not steps:
        return None
    figure = Figure(figsize=(1.4 + 3.6 * len(steps), 3.6), layout="constrained")
    axes = figure.subplots(1, len(steps), squeeze=False)[0]
    for axis, step in zip(axes, steps, strict=True):
        matrix = check.cosines[check.rule, largest, step]
        extent = (0.5, len(matrix) + 0.5, len(matrix) + 0.5, 0.5)
        image = axis.imshow(matrix, cmap=colormaps["PuOr_r"], vmin=-1, vmax=1, extent=extent, interpolation="nearest")
        axis.set(title="at initialisation" if step == 0 else f"after {step} steps", xlabel="increment of loop n")
    axes[0].set_ylabel("increment of loop m")
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.85)
    return figure


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


def _log_axes(axis: Axes) -> None:
    if not np.isfinite(axis.dataLim.minposx):
        axis.set(xlim=(0.5, 2), ylim=(0.5, 2))
        axis.text(1, 1, "nothing finite to show", ha="center")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
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
