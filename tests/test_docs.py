import re
import runpy
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest

import looptransfer as lt
from looptransfer.command.cli import main
from tests.test_examples import scalars
from tests.transfer.test_exports import EXPORTS, runs_as_files

README = Path(__file__).parent.parent / "README.md"
TRACKERS = README.read_text().partition("### What a tracker exports")[2].partition("\n#")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) == 10


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_readme_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "tensorboard"):
        if package in example:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "example.py"
    script.write_text(example)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_the_log_of_the_readme_leaves_the_curve_of_every_run_under_a_name_that_check_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(next(example for example in EXAMPLES if "SummaryWriter" in example))
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


def test_pictures_of_the_readme_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text())
    assert pictures
    assert all((README.parent / picture).exists() for picture in pictures)


def test_the_answer_that_the_readme_shows_is_that_of_the_stored_sweep() -> None:
    verdict = lt.check(lt.read_results(README.parent / "reports" / "sweep" / "results.csv"))
    answer = str(verdict).partition("\n\nfactored: FLAT.")[0]
    assert answer.count("*") == 6
    assert f"\n{answer}\n" in README.read_text()


def test_commands_for_what_a_tracker_exports_give_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^looptransfer (.*)$", TRACKERS, flags=re.MULTILINE)
    assert len(commands) == 6
    shutil.copytree(EXPORTS, tmp_path, dirs_exist_ok=True)
    files = [file.name for file in runs_as_files(tmp_path)]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = [part for word in shlex.split(command) for part in (files if word == "run-*.csv" else [word])]
        assert main(words) == 0, command
