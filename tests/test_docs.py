import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

import looptransfer as lt
from looptransfer.command.cli import main
from tests.transfer.test_exports import EXPORTS, runs_as_files

README = Path(__file__).parent.parent / "README.md"
TRACKERS = README.read_text().partition("### What a tracker exports")[2].partition("\n#")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) == 9


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_readme_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in example:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "example.py"
    script.write_text(example)
    runpy.run_path(str(script), run_name="__main__")


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
