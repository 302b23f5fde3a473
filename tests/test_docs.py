import re
import runpy
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest

import looptransfer as lt
from looptransfer.command.cli import main
from looptransfer.command.options import parser
from looptransfer.transfer.causes import ROWS
from tests.test_examples import scalars
from tests.transfer.test_exports import EXPORTS, runs_as_files

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TRACKERS = (ROOT / "docs" / "table.md").read_text().partition("## What a tracker exports")[2].partition("\n#")[0]


def fenced(page: Path, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for written_in, text in blocks if written_in == language]


EXAMPLES = [
    pytest.param(example, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, example in enumerate(fenced(page, "python"), start=1)
]
COMMANDS = [
    pytest.param(command.replace("\\\n", ""), id=f"{page.stem}-{number}")
    for page in PAGES
    for number, command in enumerate(
        re.findall(r"^looptransfer ((?:.*\\\n)*.*)$", "".join(fenced(page, "")), flags=re.MULTILINE), start=1
    )
]


def test_the_pages_have_examples_and_commands() -> None:
    assert len(EXAMPLES) == 16
    assert len(COMMANDS) == 26


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_pages_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "tensorboard"):
        if package in example:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "example.py"
    script.write_text(example)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_the_log_of_a_page_leaves_the_curve_of_every_run_under_a_name_that_check_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(
        next(text for text in fenced(ROOT / "docs" / "experiment.md", "python") if "SummaryWriter" in text)
    )
    runpy.run_path("example.py", run_name="__main__")
    rows = [
        {"run": folder.name, "tag": tag, "step": step, "value": value}
        for folder in (tmp_path / "runs").iterdir()
        for tag, curve in scalars(folder).items()
        for step, value in curve
    ]
    pd.DataFrame(rows).to_csv("curves.csv", index=False)
    results = lt.read_results("curves.csv", {"loss": "loss/train"}, run_name="{rule}-n{loops}-lr{lr}-s{seed}")
    assert sorted({*zip(results["loops"], results["lr"], results["seed"], strict=True)}) == [
        (loops, lr, seed) for loops in (1, 2) for lr in (0.005, 0.01) for seed in ("0", "1")
    ]
    assert results.groupby(["loops", "lr", "seed"])["step"].max().eq(4).all()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_are_understood(command: str) -> None:
    words = shlex.split(re.split(r" >> | +# ", command)[0])
    assert parser().parse_args(words).command == words[0]


def test_what_a_link_of_a_page_leads_to_exists() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == [], page.name


def test_the_reference_has_every_public_name_once() -> None:
    named = re.findall(r"^::: looptransfer\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(lt.__all__)


def test_every_cause_of_a_verdict_is_explained() -> None:
    words = (ROOT / "docs" / "symptoms.md").read_text().partition("## The verdict is INCONCLUSIVE")[2]
    causes = {situation.partition(":")[0] for situation, row in ROWS.items() if row.answer == "INCONCLUSIVE"}
    explained = re.findall(r"^\| ([^|]+) \|", words.partition("\n## ")[0], flags=re.MULTILINE)
    assert causes == {cause for cell in explained[1:] for cause in cell.split(", ")}


def test_the_answer_that_the_pages_show_is_that_of_the_stored_sweep() -> None:
    verdict = lt.check(lt.read_results(ROOT / "reports" / "sweep" / "results.csv"))
    answer = str(verdict).partition("\n\nfactored: FLAT.")[0]
    assert answer.count("*") == 6
    assert f"\n{answer}\n" in (ROOT / "docs" / "five-minutes.md").read_text()


def test_numbers_beside_the_papers_claims_stand_in_the_reports() -> None:
    table = (ROOT / "docs" / "theory.md").read_text().partition("| the paper | we measured | report |")[2]
    rows = re.findall(r"^\|.*\| (.*) \| (.*) \|$", table.partition("\n\n")[0], flags=re.MULTILINE)
    assert len(rows) == 10
    for measured, links in rows:
        reports = "".join((ROOT / "docs" / link).read_text() for link in re.findall(r"\]\((.*?)\)", links))
        assert [number for number in re.findall(r"[+-]?\d+\.\d+", measured) if number not in reports] == [], measured


def test_commands_for_what_a_tracker_exports_give_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^looptransfer (.*)$", TRACKERS, flags=re.MULTILINE)
    assert len(commands) == 6
    shutil.copytree(EXPORTS, tmp_path, dirs_exist_ok=True)
    files = [file.name for file in runs_as_files(tmp_path)]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = [part for word in shlex.split(command) for part in (files if word == "run-*.csv" else [word])]
        assert main(words) == 0, command
