import base64
import dataclasses
import io
import math
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
    pictures = re.findall('<svg role="img" aria-label="([^"]+)"', page)
    assert len(pictures) == len(set(pictures)) or isinstance(result, lt.CoordCheck)
    assert "http" not in page  # nothing is loaded from elsewhere
    return page


def test_the_page_of_a_verdict_holds_every_rule_and_names_stay_text(tmp_path: Path) -> None:
    verdict = lt.check(pd.concat([sweep(), sweep("<script>alert(1)</script>", -0.5)]))
    page = page_of(verdict, tmp_path, summary=["a & b"], provenance={"seeds": "<3>"})
    assert "<h1>Does the best LR transfer over the loop count?</h1>" in page
    assert page.count("<svg") == len(verdict.rules) + 2
    assert page.count("<h3>") == len(verdict.rules)
    assert page.count("<script") == 1  # the page's own
    assert "alert(1)</script>" not in page
    assert all(text in page for text in ("&lt;script&gt;", "a &amp; b", "seeds: &lt;3&gt;"))
    assert page == page_of(verdict, tmp_path, summary=["a & b"], provenance={"seeds": "<3>"})


def test_the_page_begins_with_the_answer_and_links_the_words_the_data_and_the_coordinate_check(tmp_path: Path) -> None:
    verdict = lt.check(pd.concat([sweep(), sweep("unscaled", -0.5)]), transferred_lr=0.015)
    page = page_of(verdict, tmp_path, coordinates="coordinates.html", provenance={"date": "today"})
    places = [page.index(text) for text in (*verdict.headline, "What the words mean", "<svg", "How this was made")]
    assert places == sorted(places)
    assert set(re.findall('<a href="#([^"]+)"', page)) <= set(re.findall('<dt id="([^"]+)"', page))
    assert '<a href="coordinates.html">' in page
    link = re.search('href="data:text/csv;base64,([^"]+)" download="runs.csv"', page)
    assert link
    runs = pd.read_csv(io.BytesIO(base64.b64decode(link[1])), dtype={"seed": str})
    pd.testing.assert_frame_equal(runs, verdict.runs[list(runs)])
    assert list(runs) == ["rule", "loops", "lr", "seed", "loss"]


def test_every_run_can_be_read_and_what_is_above_the_picture_is_counted(tmp_path: Path) -> None:
    runs = sweep()
    runs.loc[runs["lr"] < 2.0**-8.9, "loss"] = 40.0
    page = page_of(lt.check(runs), tmp_path)
    told = re.findall(r"<title>N = \d, LR [\d.]+, seed \d: ([\d.]+)</title>", page)
    assert len(told) == int((runs["loss"] < math.inf).sum())
    assert told.count("40") == 9
    assert "stand for 9 runs whose loss is above the picture, up to 40." in page
    assert "<title>N = 4, LR 0.125: 1 of 3 runs diverged</title>" in page


def test_the_heading_asks_about_the_axis_unless_one_has_a_title_of_one_s_own(tmp_path: Path) -> None:
    by_width = lt.check(sweep().rename(columns={"loops": "width"}), axis="width")
    assert "<h1>Does the best LR transfer over the width?</h1>" in page_of(by_width, tmp_path)
    assert "<h1>Ours</h1>" in page_of(by_width, tmp_path, title="Ours")


def test_with_one_seed_no_empty_axes_are_drawn_and_the_page_says_why(tmp_path: Path) -> None:
    page = page_of(lt.check(sweep(seeds=1)), tmp_path)
    assert page.count("<svg") == 1
    assert "No picture: no best LR is known at any N" in page
    assert "there is one seed, so nothing tells noise from a shift" in page


def test_the_cost_is_that_of_the_runs_that_were_made_and_says_what_a_small_n_saves(tmp_path: Path) -> None:
    runs = pd.concat([sweep(), sweep("sqrt", -0.3)])
    assert "<h2>Cost</h2>" not in page_of(lt.check(runs), tmp_path)
    page = page_of(lt.check(runs.assign(seconds=runs["loops"] * (1 + 0.1 * (runs["rule"] == "sqrt")))), tmp_path)
    row = re.search('<td class="number">4</td><td class="number">(\\d+)</td><td class="number">(\\d+)</td>', page)
    assert row
    assert (int(row[1]), int(row[2])) == (54, round(27 * 4 * 2.1))
    assert "A run at N = 4 takes 4 times as long as one at N = 1" in page


def test_the_page_of_a_coordinate_check_shows_every_finding(check: lt.CoordCheck, tmp_path: Path) -> None:
    page = page_of(check, tmp_path, provenance={"seeds": 3})
    assert "<h1>Does the model keep its scale over the loop count?</h1>" in page
    assert page.count("<svg") == 4 + 2 * 2 + 2 + 1
    assert page.count("data:text/csv") == 2
    assert page.count("<tr>") == len(check.judged) + 1
    assert "unscaled</strong>, a control" in page
    bad = dataclasses.replace(check.judged[-1], module="<script>", reading="<b>")
    page = page_of(dataclasses.replace(check, findings=(bad,)), tmp_path, title="a <i> b")
    assert not [tag for tag in ("<i>", "<b>") if tag in page]
    assert page.count("<script") == 1


def test_a_check_in_which_nothing_was_finite_still_has_a_page(check: lt.CoordCheck, tmp_path: Path) -> None:
    broken = judge_frame(check.frame.assign(value=float("nan")), check.rules, check.context)
    assert broken.exit_status == 1
    assert "is not finite at loops = 1, 2, 4" in page_of(broken, tmp_path)
