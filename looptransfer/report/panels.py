"""Panels: pictures of one pair of axes, drawn side by side in a figure, or each alone for a page that stacks them."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Panel = Callable[[Axes], None]
ALONE = (3.9, 3.2)  # inches: legible on a phone, where the page shows it 360 pixels wide
ROW = 48  # characters of a legend's row
SMALL: dict[str, Any] = {"frameon": False, "fontsize": "small", "handlelength": 1.4, "columnspacing": 1.2}


class WordedFigure(Figure):
    """A figure whose points have words, which a page shows where one points at them.

    Attributes:
        words: by the gid of a line of markers, one text per marker in their order.
    """

    def __init__(self, size: tuple[float, float]) -> None:
        super().__init__(figsize=size, layout="constrained")
        self.words: dict[str, list[str]] = {}


def together(panels: Sequence[Panel], columns: int, size: tuple[float, float]) -> WordedFigure:
    """All panels in one figure, row by row; the size is in inches."""
    figure = WordedFigure(size)
    rows = -(-len(panels) // columns)
    for panel, axis in zip(panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
        panel(axis)
    return figure


def alone(panel: Panel) -> WordedFigure:
    """A panel as a figure of its own, the names of its lines above it."""
    figure = WordedFigure(ALONE)
    axis = figure.subplots()
    panel(axis)
    handles, names = axis.get_legend_handles_labels()
    if axis.images:
        figure.colorbar(axis.images[0], ax=axis, shrink=0.85)
    if names:
        in_a_row = max(1, ROW // (max(map(len, names)) + 4))
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), in_a_row), **SMALL)
    return figure


def mark(axis: Axes, x: Sequence[float], y: Sequence[float], words: Sequence[str], **style: Any) -> None:
    """Markers with their words, in a figure of panels; nothing where there are none."""
    figure = axis.figure
    gid = None
    if isinstance(figure, WordedFigure) and words:
        gid = f"points-{len(figure.words)}"
        figure.words[gid] = list(words)
    axis.plot(x, y, linestyle="none", gid=gid, **style)
