import base64
import dataclasses
import re
from pathlib import Path

import pandas as pd
import pytest

import looptransfer as lt
from looptransfer.coordcheck.significance import judge_frame
from tests.experiments import tiny_experiment
from tests.report.test_figures import sweep


@pytest.fixture(scope="module")
def check() -> lt.CoordCheck:
    return lt.coord_check(tiny_experiment(), loops=[1, 2, 4], rules=["factored", "unscaled"], steps=1)


def page_of(result: lt.Verdict | lt.CoordCheck, folder: Path, **options: object) -> str:
    lt.write_html(result, folder / "page.html", **options)  # type: ignore[arg-type]
    page = (folder / "page.html").read_text()
    pictures = re.findall('data:image/svg[+]xml;base64,([^"]+)', page)
    assert all(b"<svg" in base64.b64decode(picture) for picture in pictures)
    assert "http" not in page  # nothing is loaded from elsewhere
    return page


def test_the_page_of_a_verdict_holds_every_rule_and_names_stay_text(tmp_path: Path) -> None:
    verdict = lt.check(pd.concat([sweep(), sweep("<script>alert(1)</script>", -0.5)]))
    page = page_of(verdict, tmp_path, summary=["a & b"], provenance={"seeds": "<3>"})
    assert "<h1>Does the best LR transfer over the loop count?</h1>" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert page.count("<h3>") == len(verdict.rules)
    assert "<script" not in page
    assert all(text in page for text in ("&lt;script&gt;", "a &amp; b", "seeds: &lt;3&gt;"))
    assert page == page_of(verdict, tmp_path, summary=["a & b"], provenance={"seeds": "<3>"})


def test_the_page_of_a_coordinate_check_shows_every_finding(check: lt.CoordCheck, tmp_path: Path) -> None:
    page = page_of(check, tmp_path, provenance={"seeds": 3})
    assert "<h1>Does the model keep its scale over the loop count?</h1>" in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert page.count("<tr>") == len(check.judged) + 1
    assert "unscaled</strong>, a control" in page
    bad = dataclasses.replace(check.judged[-1], module="<script>", reading="<b>")
    page = page_of(dataclasses.replace(check, findings=(bad,)), tmp_path, title="a <i> b")
    assert not [tag for tag in ("<script>", "<i>", "<b>") if tag in page]


def test_a_check_in_which_nothing_was_finite_still_has_a_page(check: lt.CoordCheck, tmp_path: Path) -> None:
    broken = judge_frame(check.frame.assign(value=float("nan")), check.rules, check.context)
    assert broken.exit_status == 1
    assert "is not finite at loops = 1, 2, 4" in page_of(broken, tmp_path)
