"""One self-contained HTML page of a verdict."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from looptransfer.files import write_file
from looptransfer.report.figures import plot_curves, plot_optima
from looptransfer.text import printable
from looptransfer.transfer.verdict import Verdict


def write_html(
    verdict: Verdict,
    path: str | Path,
    *,
    title: str = "Does the best LR transfer over the loop count?",
    summary: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the page: answer, tables, figures, and how it was made. Nothing in it is loaded from elsewhere.

    Args:
        verdict: from `check`.
        path: the file to write.
        title: the page's heading.
        summary: sentences under the answer.
        provenance: what made the results: command, versions, seeds, wall time.

    Raises:
        InputError: the file cannot be written.
    """
    page = render(
        "page.html",
        verdict=verdict,
        title=title,
        summary=summary,
        provenance=provenance or {},
        curves=svg(plot_curves(verdict)),
        optima=svg(plot_optima(verdict)),
    )
    write_file(path, page)


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("looptransfer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
    )
    return environment.get_template(template).render(**values)


def svg(figure: Figure) -> str:
    """A figure as base64 of an SVG that is the same at every run."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "looptransfer"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()
