import dataclasses
from pathlib import Path

import pytest

import looptransfer as lt
from looptransfer.coordcheck.significance import judge_frame
from looptransfer.report import plot_cosines, plot_exponents, plot_growth, plot_stream
from tests.experiments import tiny_experiment


@pytest.fixture(scope="module")
def check() -> lt.CoordCheck:
    return lt.coord_check(tiny_experiment(), loops=[1, 2, 4], rules=["factored", "unscaled"], steps=1)


def test_the_page_stands_alone_and_shows_every_finding(check: lt.CoordCheck, tmp_path: Path) -> None:
    lt.write_html(check, tmp_path / "page.html", provenance={"seeds": 3})
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<tr>") == len(check.judged) + 1
    assert "unscaled</strong>, a control" in page


def test_names_are_escaped(check: lt.CoordCheck, tmp_path: Path) -> None:
    bad = dataclasses.replace(check.judged[-1], module="<script>", reading="<b>")
    lt.write_html(dataclasses.replace(check, findings=(bad,)), tmp_path / "page.html", title="a <i> b")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "<b>" not in page


def test_figures_have_a_line_per_n_and_per_rule(check: lt.CoordCheck) -> None:
    stream, growth = plot_stream(check), plot_growth(check)
    assert [text.get_text() for text in stream.legends[0].get_texts()] == ["N = 1", "N = 2", "N = 4"]
    assert [text.get_text() for text in growth.axes[0].get_legend().get_texts()] == ["factored", "unscaled"]
    judged = [finding for finding in check.judged if finding.axis != "level"]
    assert len(plot_exponents(check).axes[0].get_yticklabels()) == len(judged)
    assert plot_cosines(check) is not None


def test_a_check_in_which_nothing_loops_has_no_cosines(check: lt.CoordCheck) -> None:
    assert plot_cosines(dataclasses.replace(check, cosines={})) is None


def test_a_check_in_which_nothing_was_finite_still_has_a_page(check: lt.CoordCheck, tmp_path: Path) -> None:
    frame = check.frame.assign(value=float("nan"))
    broken = judge_frame(frame, check.rules, check.context)
    assert broken.exit_status == 1
    lt.write_html(broken, tmp_path / "page.html")
    assert "is not finite at loops = 1, 2, 4" in (tmp_path / "page.html").read_text()
