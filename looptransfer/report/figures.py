"""Figures of a verdict: loss against LR with N as an ordered colour scale, and what became of the optimum."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from looptransfer.text import printable
from looptransfer.transfer.optimum import Optimum
from looptransfer.transfer.verdict import LOSS, METRIC, NATS, RuleVerdict, Verdict

ORDERED = LinearSegmentedColormap.from_list(
    "ordered", colormaps["viridis_r"](np.linspace(0.12, 1, 256))
)  # dark: large N
# Okabe and Ito's colours differ for every common kind of colour vision; the markers differ in print.
MOST_IN_LEGEND = 16
LONGEST = 24  # characters of a name
RULE_STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v")]


def plot_curves(verdict: Verdict) -> Figure:
    """Held-out loss against LR, one panel per rule, one colour per N; seeds' range shaded, optima starred.

    Crosses at the top are LRs at which runs diverged, the dashed line is the transferred LR.
    """
    rules = list(verdict.rules.values())
    counts = sorted({optimum.n for judged in rules for optimum in judged.optima})
    figure = Figure(figsize=(1.2 + 3.4 * len(rules), 3.6), layout="constrained")
    axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    colours = dict(zip(counts, ordered_colours(len(counts)), strict=True))
    finite = verdict.runs.loc[~verdict.runs["diverged"], "loss"]
    low = float(finite.min())
    high = min(float(finite.max()), low + 4 * max(0.02, float(finite.median()) - low))
    for axis, judged in zip(axes, rules, strict=True):
        of_rule = verdict.runs[verdict.runs["rule"] == judged.rule]
        for optimum in judged.optima:
            _curve(axis, of_rule[of_rule[verdict.axis] == optimum.n], optimum, colours[optimum.n], high)
        if verdict.transferred_lr is not None:
            axis.axvline(verdict.transferred_lr, color="0.35", linestyle="--", linewidth=1, zorder=0)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"$2^{{{math.log2(lr):.0f}}}$"))
        axis.set(title=f"{_plain(judged.rule)}: {judged.answer}", xlabel="LR")
        axis.set_ylim(low - 0.05 * (high - low), high * 1.005)
        axis.grid(alpha=0.25)
    units = {METRIC: "metric, negated", NATS: "held-out loss (nats)", LOSS: "held-out loss"}
    axes[0].set_ylabel(units.get(verdict.unit, f"held-out loss, {_plain(verdict.unit)}"))
    handles = [
        axes[0].plot([], [], color=colours[n], marker="o", markersize=4, label=f"{_plain(verdict.axis_label)} = {n}")[0]
        for n in some_of(counts)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def ordered_colours(count: int) -> list[Any]:
    """As many colours, from light to dark."""
    return [ORDERED(place) for place in np.linspace(0, 1, count)] if count > 1 else [ORDERED(0.5)]


def some_of(counts: Sequence[Any]) -> list[Any]:
    """At most as many values as a legend has room for, the first and the last among them."""
    places = np.linspace(0, len(counts) - 1, min(len(counts), MOST_IN_LEGEND)).round().astype(int)
    return [counts[place] for place in places]


def plot_optima(verdict: Verdict) -> Figure:
    """Left, the LR optimum against N with its interval per rule; right, the regret of the transferred LR at large N."""
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for position, judged in enumerate(verdict.rules.values()):
        colour, marker = RULE_STYLES[position % len(RULE_STYLES)]
        _optima(left, judged, colour, marker)
        regret = judged.regret
        if regret is not None and math.isfinite(regret.estimate):
            ends = (regret.estimate - regret.low, regret.high - regret.estimate)
            error = [[max(0.0, end)] for end in ends]  # an estimate of 0 may be below its low end by its last bit
            right.errorbar(position, regret.estimate, yerr=error, color=colour, marker=marker, capsize=4)
        else:
            style: dict[str, Any] = {"ha": "center", "va": "bottom", "color": "0.35"}
            right.text(position, 0.02, "not\nknown", transform=right.get_xaxis_transform(), **style)
    _tolerance_band(left, verdict)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    left.xaxis.set_minor_locator(NullLocator())
    left.set(
        xlabel="loop count N" if verdict.axis == "loops" else _plain(verdict.axis),
        ylabel="optimum, log2(LR)",
        title="Where the best LR lies",
    )
    left.grid(alpha=0.25)
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize="small")
    else:
        left.text(0.5, 0.5, "no optimum is known", ha="center", va="center", color="0.35", transform=left.transAxes)
    right.axhline(verdict.regret_tolerance, color="0.35", linestyle="--", linewidth=1, label="tolerance")
    names = [_plain(rule) for rule in verdict.rules]
    right.set_xticks(range(len(names)), names)
    unit = f"{_plain(verdict.unit)}, at the largest {_plain(verdict.axis_label)}"
    right.set(xlim=(-0.6, len(names) - 0.4), ylabel=unit, title="Regret of the transferred LR")
    right.grid(alpha=0.25, axis="y")
    right.legend(frameon=False, fontsize="small")
    return figure


def _curve(axis: Axes, runs: pd.DataFrame, optimum: Optimum, colour: object, top: float) -> None:
    by_lr = runs.groupby("lr")["loss"]
    stable = by_lr.max() < math.inf
    lrs = stable.index[stable].to_numpy()
    mean = by_lr.mean()[lrs]
    axis.plot(lrs, mean, color=colour, marker="o", markersize=3, linewidth=1.3)
    axis.fill_between(lrs, by_lr.min()[lrs], by_lr.max()[lrs], color=colour, alpha=0.18, linewidth=0)
    lost = stable.index[~stable]
    axis.plot(lost, [top] * len(lost), color=colour, marker="x", linestyle="none")
    if optimum.log2_lr is not None:
        x = optimum.log2_lr.estimate
        loss = float(optimum.loss(x).mean())
        axis.plot(
            2**x, loss, color=colour, marker="*", markersize=13, markeredgecolor="black", markeredgewidth=0.7, zorder=5
        )


def _optima(axis: Axes, judged: RuleVerdict, colour: str, marker: str) -> None:
    fitted = {optimum.n: optimum.log2_lr for optimum in judged.optima if optimum.log2_lr is not None}
    if fitted:
        estimates = [log2_lr.estimate for log2_lr in fitted.values()]
        lows, highs = zip(*((log2_lr.low, log2_lr.high) for log2_lr in fitted.values()), strict=True)
        label = f"{_plain(judged.rule)}: {judged.answer}"
        axis.plot(list(fitted), estimates, color=colour, marker=marker, label=label)
        axis.fill_between(list(fitted), lows, highs, color=colour, alpha=0.18, linewidth=0)


def _tolerance_band(axis: Axes, verdict: Verdict) -> None:
    """The places to which the optimum of the rule asked for could move and still be flat."""
    fitted = {optimum.n: optimum.log2_lr.estimate for optimum in verdict.judged.optima if optimum.log2_lr is not None}
    if len(fitted) >= 2:
        counts = np.array(list(fitted))
        spread = verdict.tolerance * np.log2(counts / counts[0])
        style: dict[str, Any] = {"color": "0.35", "linestyle": ":", "linewidth": 1}
        first = fitted[int(counts[0])]
        axis.plot(counts, first + spread, label=f"±{verdict.tolerance:g} octave per doubling", **style)
        axis.plot(counts, first - spread, **style)


def _plain(text: str) -> str:
    """A user's name, short enough for a figure, which is no formula whatever signs it holds."""
    shown = printable(text)
    return (shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…").replace("$", r"\$")
