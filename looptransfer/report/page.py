"""One self-contained HTML page of a result."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from looptransfer.coordcheck.result import CoordCheck
from looptransfer.files import write_file
from looptransfer.report import plot_cosines, plot_curves, plot_exponents, plot_growth, plot_optima, plot_stream
from looptransfer.text import printable
from looptransfer.transfer.verdict import Verdict

FIGURES: Mapping[str, Mapping[str, Callable[[Any], Figure | None]]] = {
    "verdict.html": {"curves": plot_curves, "optima": plot_optima},
    "coordinates.html": {
        "growth": plot_growth,
        "stream": plot_stream,
        "exponents": plot_exponents,
        "cosines": plot_cosines,
    },
}


def write_html(
    result: Verdict | CoordCheck,
    path: str | Path,
    *,
    title: str = "",
    summary: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the page of a verdict or a coordinate check. Nothing in it is loaded from elsewhere.

    It holds the answer, tables, figures, and how it was made.

    Args:
        result: from `check` or `coord_check`.
        path: the file to write.
        title: the page's heading; default the question that the result answers.
        summary: sentences under the answer.
        provenance: what made the results: command, versions, seeds, wall time.

    Raises:
        InputError: the file cannot be written.
    """
    template = "verdict.html" if isinstance(result, Verdict) else "coordinates.html"
    figures = {name: plot(result) for name, plot in FIGURES[template].items()}
    page = _render(
        template,
        result=result,
        title=title,
        summary=summary,
        provenance=provenance or {},
        **{name: "" if figure is None else _svg(figure) for name, figure in figures.items()},
    )
    write_file(path, page)


def _render(template: str, **values: Any) -> str:
    """Fill a template of this folder; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("looptransfer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
    )
    return environment.get_template(template).render(**values)


def _svg(figure: Figure) -> str:
    """A figure as base64 of an SVG that is the same at every run."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "looptransfer"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()
