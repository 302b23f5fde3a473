import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from looptransfer.pytest_plugin import LRTransfer
from looptransfer.transfer.baseline import Baseline

ROOT = Path(__file__).parent.parent
TESTS = """
def test_flat(lr_transfer):
    lr_transfer.assert_flat(lr_transfer.load("results.csv"))

def test_optimum(lr_transfer):
    lr_transfer.assert_optimum(lr_transfer.load("results.csv"))
"""


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest as a user runs it, in a folder of the user's; the plugin is named where it is not installed."""
    plugin = [] if entry_points(group="pytest11", name="looptransfer") else ["-p", "looptransfer.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", *plugin, "-p", "no:randomly", "-q", f"--rootdir={folder}", *arguments]
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)


def write_table(path: Path, drift: float = 0.0, at: float = -6.3, seeds: Sequence[int] = range(4)) -> None:
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for n in (1, 2, 4, 8):
            for x in np.arange(-10.0, -2.9):
                loss = 2 + 0.06 * (x - at - drift * np.log2(n)) ** 2 + rng.normal(0, 0.002)
                rows.append({"rule": "factored", "loops": n, "lr": 2.0**x, "seed": seed, "loss": loss})
    pd.DataFrame(rows).to_csv(path, index=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "test_user.py").write_text(TESTS)
    write_table(tmp_path / "results.csv")
    return tmp_path


def test_importing_the_plugin_loads_neither_torch_nor_pandas() -> None:
    code = "import sys, looptransfer.pytest_plugin; sys.exit(bool({'torch', 'pandas', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_the_plugin_is_declared_as_an_entry_point() -> None:
    assert '[project.entry-points.pytest11]\nlooptransfer = "looptransfer.pytest_plugin"' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_baseline_is_asked_for_then_written_then_held(project: Path) -> None:
    first = run_pytest(project)
    assert first.returncode == 1
    assert "1 failed, 1 passed" in first.stdout
    assert "there is no baseline" in first.stdout
    assert "--looptransfer-update" in first.stdout
    assert run_pytest(project, "--looptransfer-update").returncode == 0
    assert set(Baseline.read(project / "lr-optima.json").of_rule("factored")) == {1, 2, 4, 8}
    assert run_pytest(project).returncode == 0


def test_a_failure_shows_the_table_the_reason_and_the_fix(project: Path) -> None:
    run_pytest(project, "--looptransfer-update")
    write_table(project / "results.csv", drift=0.5, at=-5.3)
    told = run_pytest(project)
    assert "2 failed" in told.stdout
    assert "the LR optimum is not flat over N\nDo not carry one LR to a larger N: the best one " in told.stdout
    assert "\nfactored: DRIFTS. The optimum moves up by 0.50 octave" in told.stdout
    assert "stored LR  shift, octaves" in told.stdout
    assert "MOVED" in told.stdout
    assert re.search(r"N = 1: the optimum moved by \+(1.0|0.9)\d octave", told.stdout)
    assert "pytest --looptransfer-update" in told.stdout
    assert "pytest_plugin.py:" not in told.stdout  # the user's table, not our traceback


def test_an_inconclusive_sweep_fails_with_the_runs_that_would_settle_it(project: Path) -> None:
    write_table(project / "results.csv", seeds=[0])
    told = run_pytest(project, "-k", "flat")
    assert "there is one seed, so nothing tells noise from a shift" in told.stdout
    assert "96 runs: N = 1, 2, 4, 8; LR 0.000976562, " in told.stdout


def test_a_session_that_does_not_use_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(
        "import sys\ndef test_nothing():\n    assert not {'torch', 'pandas'} & set(sys.modules)\n"
    )
    assert run_pytest(tmp_path).returncode == 0


def test_a_verdict_may_stand_for_its_table(tmp_path: Path) -> None:
    write_table(tmp_path / "results.csv")
    verdict = LRTransfer(tmp_path, tmp_path, update=True).assert_flat(
        LRTransfer(tmp_path, tmp_path, False).load("results.csv")
    )
    assert LRTransfer(tmp_path, tmp_path, update=True).assert_optimum(verdict) is None
    told = LRTransfer(tmp_path, tmp_path, update=False).assert_optimum(verdict)
    assert told is not None
    assert told.answer == "HOLDS"


TRAINS = """
from tests.experiments import tiny_experiment

def test_trains(lr_transfer):
    results = lr_transfer.sweep(tiny_experiment(), [1], lrs=[0.01], seeds=1, workers=1)
    assert len(results) == 1
"""


@pytest.mark.slow
def test_runs_are_kept_for_the_same_commit_and_never_for_changed_code(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(TRAINS)
    (tmp_path / ".gitignore").write_text("__pycache__/\n.pytest_cache/\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    assert run_pytest(tmp_path).returncode == 0
    kept = list(tmp_path.glob(".pytest_cache/d/looptransfer-*/*.db"))
    assert len(kept) == 1
    before = kept[0].read_bytes()
    (tmp_path / "model.py").write_text("changed = True\n")
    assert run_pytest(tmp_path).returncode == 0
    assert kept[0].read_bytes() == before


def test_coordinates_that_grow_otherwise_fail_with_their_reading(tmp_path: Path) -> None:
    (tmp_path / "test_stream.py").write_text(
        "from tests.experiments import tiny_experiment\n"
        "SIZE = dict(loops=[1, 2, 4, 8], steps=1, seeds=4)\n"
        "def test_scaled(lr_transfer):\n"
        "    lr_transfer.assert_coordinates(tiny_experiment(), rules=['factored'], **SIZE)\n"
        "def test_plain(lr_transfer):\n"
        "    lr_transfer.assert_coordinates(tiny_experiment(), rules=['as made'], **SIZE)\n"
    )
    done = run_pytest(tmp_path)
    assert "1 failed, 1 passed" in done.stdout
    assert "the multiplier of block is not applied" in done.stdout
