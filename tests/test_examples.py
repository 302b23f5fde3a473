import runpy
import shutil
from pathlib import Path

import pytest

from tests.test_pytest_plugin import ROOT, run_pytest

CI = ROOT / "examples" / "ci"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """What a user copies out of examples/ci."""
    for path in CI.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_test_of_every_commit_passes_as_it_is(copied: Path) -> None:
    told = run_pytest(copied, "-k", "bracketed")
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.slow
def test_the_test_of_every_commit_fails_where_the_multiplier_is_lost(copied: Path) -> None:
    with (copied / "experiment.py").open("a", encoding="utf-8") as file:
        file.write(LOST)
    told = run_pytest(copied, "-k", "bracketed")
    assert told.returncode == 1, told.stdout + told.stderr
    assert "MOVED" in told.stdout or "WORSE" in told.stdout
    assert "stored LR" in told.stdout


@pytest.mark.slow
def test_the_tests_of_every_night_pass_as_they_are(copied: Path) -> None:
    told = run_pytest(copied)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "2 passed" in told.stdout


LOST = """

from looptransfer.trials import trial

kept = trial.parametrize
trial.parametrize = lambda model, inputs, rule, *others, **named: kept(model, inputs, "unscaled", *others, **named)
"""


def test_the_workflow_runs_what_is_there() -> None:
    workflow = (CI / "lr-transfer.yml").read_text(encoding="utf-8")
    assert "pytest test_lr_transfer.py -k bracketed" in workflow
    assert "looptransfer check results.csv --tolerance 0.4 --baseline lr-optima.json --markdown" in workflow
    assert "def test_the_stored_optima_are_still_bracketed" in (CI / "test_lr_transfer.py").read_text(encoding="utf-8")


@pytest.mark.slow
def test_muon_and_adamw_learn_with_groups_that_pass_the_audit(capsys: pytest.CaptureFixture[str]) -> None:
    train = runpy.run_path(str(ROOT / "examples" / "muon" / "train.py"))["train"]
    losses = train(steps=40, loops=3)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    table = capsys.readouterr().out
    assert "blocks.0.attention.qkv.weight  branch matrix  muon" in table
    assert "loop_norm.weight               on stream      adamw      0.3333" in table
