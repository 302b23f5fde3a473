"""Figures as SVG inside a page: text stays text, nothing is loaded, and points say their words."""

import io
import re
from html import escape

import matplotlib
from matplotlib.figure import Figure

from looptransfer.report.panels import WordedFigure
from looptransfer.text import printable

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
MARKER = re.compile(r'<use xlink:href="(#\w+)" x="([-\d.]+)" y="([-\d.]+)" style="([^"]*)"/>')


def inline_svg(figure: Figure, name: str, result: str) -> str:
    """The figure as an <svg> element, the same at every run.

    Args:
        figure: a `WordedFigure` has its words as the titles of its points.
        name: of the figure, unlike that of any other in the page: ids are made from it.
        result: what the figure says, for those who do not see it.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata=NO_METADATA, transparent=True)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    words = figure.words if isinstance(figure, WordedFigure) else {}
    text = re.sub(r'<g id="([^"]+)">((?:(?!<g id=).)*)', lambda group: _group(group, words), text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"<style.*?</style>|font-family: [^;\"]*; ", "", text, flags=re.DOTALL)  # the page has its own
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    head = f'<svg role="img" aria-label="{escape(printable(result))}" viewBox="0 0 {size[1]} {size[2]}">'
    return head + text[text.index(">") + 1 :]


def _group(group: "re.Match[str]", words: dict[str, list[str]]) -> str:
    """A group without its id, which other figures of the page have as well; its markers with their words."""
    if group[1] not in words:
        return f"<g>{group[2]}"
    markers = MARKER.findall(group[2])
    assert len(markers) == len(words[group[1]])
    titles = (f"<title>{escape(printable(text))}</title>" for text in words[group[1]])
    uses = (
        f'<use href="{href}" x="{float(x):.1f}" y="{float(y):.1f}">{title}</use>'
        for (href, x, y, _), title in zip(markers, titles, strict=True)
    )
    start, end = group[2].index("<use"), group[2].rindex("/>") + 2
    return f'<g class="points" style="{markers[0][3]}">{group[2][:start]}{"".join(uses)}{group[2][end:]}'
