"""Figures of a verdict: loss against LR with N as an ordered colour scale, and what became of the optimum."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from looptransfer.report.panels import Panel, mark, together
from looptransfer.text import printable
from looptransfer.transfer.optimum import Optimum
from looptransfer.transfer.verdict import LOSS, METRIC, NATS, RuleVerdict, Verdict

ORDERED = LinearSegmentedColormap.from_list(
    "ordered", colormaps["viridis_r"](np.linspace(0.28, 1, 256))
)  # dark: large N; the lightest stands out of white still
# Okabe and Ito's colours differ for every common kind of colour vision; the markers differ in print.
MOST_IN_LEGEND = 16
GREY = "0.35"
LONGEST = 24  # characters of a name
RULE_STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v")]


def plot_curves(verdict: Verdict) -> Figure:
    """Held-out loss against LR, one panel per rule, one colour per N; seeds' range shaded, optima starred.

    Crosses at the top are LRs at which runs diverged, triangles there runs above the picture, the dashed line is the
    transferred LR.
    """
    panels = curve_panels(verdict)
    figure = together(panels, len(panels), (1.2 + 3.4 * len(panels), 3.6))
    for axis in figure.axes[1:]:
        axis.set_ylabel("")
        axis.tick_params(labelleft=False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def curve_panels(verdict: Verdict) -> list[Panel]:
    """The panels of `plot_curves`, which have the same limits."""
    return [partial(_draw_curves, verdict=verdict, judged=judged) for judged in verdict.rules.values()]


def runs_above(verdict: Verdict) -> pd.DataFrame:
    """The runs whose loss is finite and above the limit of the curves."""
    return verdict.runs[~verdict.runs["diverged"] & (verdict.runs["loss"] > _loss_limits(verdict)[1])]


def _draw_curves(axis: Axes, verdict: Verdict, judged: RuleVerdict) -> None:
    counts = sorted({optimum.n for judged in verdict.rules.values() for optimum in judged.optima})
    colours = ordered_colours(counts)
    (low, high), of_rule = _loss_limits(verdict), verdict.runs[verdict.runs["rule"] == judged.rule]
    for optimum in judged.optima:
        name = f"{f'{judged.rule}, ' if len(verdict.rules) > 1 else ''}{verdict.axis_label} = {optimum.n}"
        _curve(axis, of_rule[of_rule[verdict.axis] == optimum.n], optimum, colours[optimum.n], high, name)
    for n in some_of(counts):
        label = f"{_plain(verdict.axis_label)} = {n}"
        axis.plot([], [], color=colours[n], marker="o", markersize=4, label=label)
    if verdict.transferred_lr is not None:
        axis.axvline(verdict.transferred_lr, color=GREY, linestyle="--", linewidth=1, zorder=0)
    _lr_scale(axis, verdict)
    units = {METRIC: "metric, negated", NATS: "held-out loss (nats)", LOSS: "held-out loss"}
    axis.set(title=f"{_plain(judged.rule)}: {judged.answer}", xlabel="LR")
    axis.set_ylabel(units.get(verdict.unit, f"held-out loss, {_plain(verdict.unit)}"))
    axis.set_ylim(low - 0.05 * (high - low), high + 0.03 * (high - low))
    axis.grid(alpha=0.25)


def _lr_scale(axis: Axes, verdict: Verdict) -> None:
    """An LR axis in octaves, as wide as all LRs of the table."""
    lrs = [*verdict.runs["lr"], *([] if verdict.transferred_lr is None else [verdict.transferred_lr])]
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(lrs) / 2**0.3, max(lrs) * 2**0.3)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"{lr:.2g}"))
    axis.tick_params(axis="x", labelsize="small")


def _loss_limits(verdict: Verdict) -> tuple[float, float]:
    """The lowest and the highest loss that are shown: the optima, and around them what tells the curves apart."""
    finite = verdict.runs.loc[~verdict.runs["diverged"], "loss"]
    low, middle = float(finite.min()), float(finite.median())
    high = min(float(finite.max()), low + 4 * max(0.02, middle - low))
    optima = [optimum for judged in verdict.rules.values() for optimum in judged.optima]
    high = max(high, *(_loss_at(optimum) for optimum in optima if optimum.log2_lr is not None), low)
    return low, high if high > low else low + 1


def ordered_colours(counts: Sequence[int]) -> dict[int, Any]:
    """A colour for every loop count, from light to dark."""
    places = np.linspace(0, 1, len(counts)) if len(counts) > 1 else [0.5]
    return dict(zip(counts, map(ORDERED, places), strict=True))


def some_of(counts: Sequence[Any]) -> list[Any]:
    """At most as many values as a legend has room for, the first and the last among them."""
    places = np.linspace(0, len(counts) - 1, min(len(counts), MOST_IN_LEGEND)).round().astype(int)
    return [counts[place] for place in places]


def plot_optima(verdict: Verdict) -> Figure:
    """Left, the LR optimum against N with its interval per rule; right, the regret of the transferred LR at large N."""
    figure = together([partial(draw_optima, verdict=verdict), partial(draw_regret, verdict=verdict)], 2, (9.4, 3.6))
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize="small")
    return figure


def draw_optima(axis: Axes, verdict: Verdict) -> None:
    """The LR optimum against N with its interval, a line per rule, and how far that of the rule asked for may move."""
    for judged, (colour, marker) in zip(verdict.rules.values(), cycle(RULE_STYLES), strict=False):
        _optima(axis, judged, verdict.axis_label, colour, marker)
    _tolerance_band(axis, verdict)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=2))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda log2_lr, _: f"{np.exp2(log2_lr):.2g}"))
    axis.set(xlabel="loop count N" if verdict.axis == "loops" else _plain(verdict.axis), ylabel="best LR")
    axis.set(title="Where the best LR lies")
    axis.grid(alpha=0.25)
    if not axis.lines:
        axis.text(0.5, 0.5, "no optimum is known", ha="center", va="center", color=GREY, transform=axis.transAxes)


def draw_regret(axis: Axes, verdict: Verdict) -> None:
    """The regret of the transferred LR at the largest N, with its interval, for each rule."""
    styled = zip(verdict.rules.values(), cycle(RULE_STYLES), strict=False)
    for position, (judged, (colour, marker)) in enumerate(styled):
        regret = judged.regret
        if regret is not None and math.isfinite(regret.estimate):
            ends = (regret.estimate - regret.low, regret.high - regret.estimate)
            error = [[max(0.0, end)] for end in ends]  # an estimate of 0 may be below its low end by its last bit
            axis.errorbar(position, regret.estimate, yerr=error, color=colour, marker=marker, capsize=4)
        else:
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY}
            axis.text(position, 0.5, "not\nknown", transform=axis.get_xaxis_transform(), **style)
    axis.axhline(verdict.regret_tolerance, color=GREY, linestyle="--", linewidth=1, label="tolerance")
    names = [_plain(rule) for rule in verdict.rules]
    axis.set_xticks(range(len(names)), names)
    unit = f"{_plain(verdict.unit)}, at the largest {_plain(verdict.axis_label)}"
    axis.set(xlim=(-0.6, len(names) - 0.4), ylabel=unit, title="Regret of the transferred LR")
    axis.grid(alpha=0.25, axis="y")


def _curve(axis: Axes, runs: pd.DataFrame, optimum: Optimum, colour: object, top: float, name: str) -> None:
    by_lr = runs.groupby("lr")["loss"]
    stable = by_lr.max() < math.inf
    lrs = stable.index[stable].to_numpy()
    mean = by_lr.mean()[lrs]
    axis.plot(lrs, mean, color=colour, marker="o", markersize=3, linewidth=1.3)
    axis.fill_between(lrs, by_lr.min()[lrs], by_lr.max()[lrs], color=colour, alpha=0.18, linewidth=0)
    _runs(axis, runs[runs["loss"] <= top], name, color=colour, marker="o", markersize=2.5, markeredgewidth=0, alpha=0.6)
    above = runs[(runs["loss"] > top) & ~runs["diverged"]]
    _runs(axis, above.assign(height=top), name, color=colour, marker="^", markersize=4, markeredgewidth=0)
    lost, ran = runs[runs["diverged"]].groupby("lr")["seed"].nunique(), by_lr.size()
    words = [f"{name}, LR {lr:.4g}: {seeds} of {ran[lr]} runs diverged" for lr, seeds in lost.items()]
    mark(axis, list(lost.index), [top] * len(lost), words, color=colour, marker="x")
    if optimum.log2_lr is not None:
        lr = 2**optimum.log2_lr.estimate
        style = {"marker": "*", "markersize": 13, "markeredgecolor": "black", "markeredgewidth": 0.7, "zorder": 5}
        mark(axis, [lr], [_loss_at(optimum)], [f"{name}: the best LR is {lr:.4g}"], color=colour, **style)


def _runs(axis: Axes, runs: pd.DataFrame, name: str, **style: Any) -> None:
    """A mark per run, at its loss, or at `height` where the table has that."""
    height = runs["height"] if "height" in runs else runs["loss"]
    cells = zip(runs["lr"], runs["seed"], runs["loss"], strict=True)
    words = [f"{name}, LR {lr:.4g}, seed {seed}: {loss:.5g}" for lr, seed, loss in cells]
    mark(axis, runs["lr"].to_list(), height.to_list(), words, **style)


def _loss_at(optimum: Optimum) -> float:
    """The fitted mean loss at the optimum."""
    assert optimum.log2_lr is not None
    return float(optimum.loss(optimum.log2_lr.estimate).mean())


def _optima(axis: Axes, judged: RuleVerdict, axis_label: str, colour: str, marker: str) -> None:
    fitted = {optimum.n: optimum.log2_lr for optimum in judged.optima if optimum.log2_lr is not None}
    if fitted:
        estimates = [log2_lr.estimate for log2_lr in fitted.values()]
        lows, highs = zip(*((log2_lr.low, log2_lr.high) for log2_lr in fitted.values()), strict=True)
        label = f"{_plain(judged.rule)}: {judged.answer}"
        axis.plot(list(fitted), estimates, color=colour, marker=marker, label=label)
        axis.fill_between(list(fitted), lows, highs, color=colour, alpha=0.18, linewidth=0)
        ends = ["{:.3g} [{:.3g}, {:.3g}]".format(*np.exp2([x.estimate, x.low, x.high])) for x in fitted.values()]
        words = [f"{judged.rule}, {axis_label} = {n}: best LR {text}" for n, text in zip(fitted, ends, strict=True)]
        mark(axis, list(fitted), estimates, words, color=colour, marker=marker, markersize=6)


def _tolerance_band(axis: Axes, verdict: Verdict) -> None:
    """The places to which the optimum of the rule asked for could move and still be flat."""
    fitted = {optimum.n: optimum.log2_lr.estimate for optimum in verdict.judged.optima if optimum.log2_lr is not None}
    if len(fitted) >= 2:
        counts = np.array(list(fitted))
        spread = verdict.tolerance * np.log2(counts / counts[0])
        style: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 1}
        first = fitted[int(counts[0])]
        axis.plot(counts, first + spread, label=f"±{verdict.tolerance:g} octave per doubling", **style)
        axis.plot(counts, first - spread, **style)


def _plain(text: str) -> str:
    """A user's name, short enough for a figure, which is no formula whatever signs it holds."""
    shown = printable(text)
    return (shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…").replace("$", r"\$")
