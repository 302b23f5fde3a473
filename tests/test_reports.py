"""What reports/README.md claims is what the reports say, and two of its claims are made again at a small size."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import looptransfer as lt
from benchmarks import paper
from benchmarks.verdict_simulations import Cell, fit_noise, run_cell

REPORTS = Path(__file__).parent.parent / "reports"
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split("|")]
    for line in (REPORTS / "README.md").read_text().splitlines()
    if line.startswith("| ")
][1:]


@functools.cache
def evidence(report: Path) -> str:
    """The text of a report, and the verdict on its table, where it has one."""
    table, stored = report.parent / "results.csv", report.parent / "verdict.json"
    words = report.read_text()
    if table.exists():
        lr = json.loads(stored.read_text())["transferred_lr"] if stored.exists() else None
        words += str(lt.check(lt.read_results(table), transferred_lr=lr))
    return words.replace("−", "-")


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_numbers_of_a_claim_stand_in_its_report(row: list[str]) -> None:
    link = re.search(r"\]\((.+?)\)", row[5])
    assert link is not None
    words = evidence(REPORTS / link[1])
    numbers = re.findall(r"[+-]?\d+\.\d+", row[2] + row[3])
    assert [number for number in numbers if number not in words] == []


def test_every_report_stands_in_the_table() -> None:
    linked = {re.split(r"[/)]", row[5].partition("](")[2])[0] for row in ROWS}
    assert linked == {folder.name for folder in REPORTS.iterdir() if folder.is_dir()}


def test_the_stream_is_bounded_under_the_rule_and_grows_without() -> None:
    scale = replace(paper.SCALES["cpu"], counts=(8, 16, 32), short_seeds=3, steps=1)
    stream = paper.at_the_end(paper.looped(scale), "looped").query("step == 0")
    exponents = {rule: paper.exponent(rows, "stream_rms") for rule, rows in stream.groupby("rule")}
    for rule, theory in paper.POWER.items():
        assert exponents[rule].estimate == pytest.approx(1 - theory, abs=0.25), rule


def test_the_interval_of_the_drift_covers_it_as_often_as_it_says() -> None:
    counted = run_cell((Cell(drift=0.2), fit_noise(REPORTS / "sweep" / "results.csv"), 400, 0))
    assert 0.85 <= float(str(counted["coverage"])) <= 0.95  # two standard errors of 400 sweeps are 3 points
    assert float(str(counted["FLAT"])) <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5
