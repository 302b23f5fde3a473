"""The pages as a browser shows them: skipped where there is no Chromium."""

import html
import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import looptransfer as lt
from looptransfer.report import page as report
from tests.experiments import tiny_experiment
from tests.report.test_figures import sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)")

# A frame of the width of a screen; what is measured in it becomes the text of the outer page.
WRAPPER = """<!doctype html><iframe src="page.html" width="{width}" height="900"></iframe><script>
const errors = [];
document.querySelector("iframe").onload = ({{ target }}) => {{
  const page = target.contentDocument, use = page.querySelector(".points use"), told = page.querySelector("output");
  target.contentWindow.onerror = (message) => errors.push(message);
  const before = told.textContent, place = use.getBoundingClientRect();
  const point = {{ clientX: place.x + place.width / 2, clientY: place.y + place.height / 2, bubbles: true }};
  use.dispatchEvent(new target.contentWindow.MouseEvent("click", point));
  const body = page.documentElement;
  const measured = {{ errors, before, told: told.textContent, title: use.textContent,
    width: body.clientWidth, content: body.scrollWidth }};
  document.body.textContent = JSON.stringify(measured);
}};
</script>"""


def opened(file: Path, *more: str) -> tuple[Any, str]:
    """The JSON that a page leaves as its text, and what the console says."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    command = [str(CHROMIUM), *flags, *more, f"--user-data-dir={file.parent / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", file.as_uri()]
    home = {**os.environ, "HOME": str(file.parent)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100, env=home)
    body = re.search(r"<body>([\[{].*[\]}])</body>", done.stdout, re.DOTALL)
    assert body, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(body[1])), "".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def shown(folder: Path, width: int) -> tuple[dict[str, Any], str]:
    """What is measured in page.html on a screen of a width, and what the console says."""
    (folder / "wrapper.html").write_text(WRAPPER.format(width=width))
    return opened(folder / "wrapper.html")


# What axe-core finds, with the scheme that the page has taken.
AXE = """<script src="axe.js"></script><script>axe.run().then(({ violations, passes }) => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const told = violations.map(({ id, nodes }) => [id, ...nodes.slice(0, 3).map(({ html }) => html)]);
  document.body.textContent = JSON.stringify({ dark, passes: passes.map(({ id }) => id), violations: told });
});</script></body>"""


def audited(page: Path, width: int, dark: bool) -> Any:
    """What axe-core finds on a page."""
    package = Path(str(getattr(find_spec("axe_playwright_python"), "origin", "")))  # for its copy of axe
    shutil.copy(package.with_name("axe.min.js"), page.parent / "axe.js")
    page.write_text(page.read_text().replace("</body>", AXE))
    told, _ = opened(page, f"--window-size={width},900", *(["--force-dark-mode"] if dark else []))
    return told


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_screen_and_a_tap_reads_a_run(tmp_path: Path, width: int) -> None:
    verdict = lt.check(pd.concat([sweep(), sweep("unscaled", -0.5)]), transferred_lr=0.015)
    lt.write_html(verdict, tmp_path / "page.html", provenance={"lrs": ", ".join(["0.0123456789"] * 40)})
    measured, console = shown(tmp_path, width)
    assert (measured["errors"], console) == ([], "")
    assert measured["content"] == measured["width"]
    assert measured["before"].startswith("Point at a mark")
    assert measured["told"] == measured["title"]
    assert re.fullmatch(r"factored, N = 1, LR 0\.\d+, seed \d: [\d.]+", measured["told"])


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_axe_finds_nothing_wrong_with_either_page(tmp_path: Path, width: int, dark: bool) -> None:
    coordinates = lt.coord_check(tiny_experiment(), loops=[1, 2, 4], steps=1, seeds=2)
    lt.write_html(coordinates, tmp_path / "coordinates.html")
    verdict = lt.check(pd.concat([sweep(), sweep("unscaled", -0.5)]), transferred_lr=0.015)
    lt.write_html(verdict, tmp_path / "page.html", coordinates=tmp_path / "coordinates.html")
    for page in ("page.html", "coordinates.html"):
        told = audited(tmp_path / page, width, dark)
        assert told["violations"] == []
        assert told["dark"] == dark
        assert {"color-contrast", "html-has-lang"} <= set(told["passes"])


def luminance(colour: str) -> float:
    """Relative luminance as WCAG has it, of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_stands_out_of_the_page_in_both_schemes() -> None:
    style = (Path(report.__file__).parent / "style.css").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", rule)) for rule in re.findall(r":root \{[^}]*\}", style)]
    assert len(schemes) == 2
    for scheme in schemes:
        for text, ground in [("ink", "page"), ("soft", "page"), ("link", "page"), ("ink", "wash"), ("link", "wash")]:
            lighter, darker = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)
