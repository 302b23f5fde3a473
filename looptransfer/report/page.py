"""One self-contained HTML page of a verdict."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from looptransfer.report.figures import plot_curves, plot_optima
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
    """
    environment = Environment(
        loader=PackageLoader("looptransfer.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("page.html").render(
        verdict=verdict,
        title=title,
        summary=summary,
        provenance=provenance or {},
        curves=_svg(plot_curves(verdict)),
        optima=_svg(plot_optima(verdict)),
    )
    Path(path).write_text(page, encoding="utf-8")


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "looptransfer"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()
