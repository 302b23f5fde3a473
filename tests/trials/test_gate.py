from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from looptransfer.command.cli import main
from looptransfer.errors import InputError
from looptransfer.transfer.baseline import Baseline
from looptransfer.transfer.optimum import Interval
from looptransfer.transfer.sources import read_results
from looptransfer.transfer.stored import StoredOptimum
from looptransfer.trials.gate import gate
from tests.experiments import tiny_experiment


def optimum(at: int, log2_lr: float, seeds: str = "012") -> StoredOptimum:
    interval = Interval(log2_lr, log2_lr - 0.1, log2_lr + 0.1)
    losses = dict.fromkeys(seeds, 1.0)
    return StoredOptimum(at, None, interval, dict.fromkeys(seeds, log2_lr), Interval(1.0, 0.9, 1.1), losses)


STORED = Baseline("loops", "nats", 0.9, None, {}, {"factored": (optimum(1, -5), optimum(2, -5), optimum(4, -6))})


def test_it_trains_at_half_once_and_twice_the_lr_with_the_seeds_of_the_baseline(tmp_path: Path) -> None:
    ledger = tmp_path / "gate.db"
    told = gate(tiny_experiment(), STORED, seeds=4, ledger=ledger, workers=1)
    assert [finding.n for finding in told.findings] == [1, 4]
    runs = read_results(ledger)
    assert len(runs) == 24
    assert set(runs["seed"]) == {"0", "1", "2", "3"}
    assert sorted(runs.loc[runs["loops"] == 4, "lr"].unique()) == [2.0**-7, 2.0**-6, 2.0**-5]


def test_without_a_ledger_no_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gate(tiny_experiment(), STORED, loops=[1], seeds=2, workers=1)
    assert not list(tmp_path.iterdir())


def test_an_experiment_that_differs_from_the_stored_one_is_told() -> None:
    made_by = {"experiment": {**{k: str(v) for k, v in tiny_experiment().identity().items()}, "steps": "31"}}
    told = gate(tiny_experiment(), replace(STORED, fingerprint=made_by), loops=[1], seeds=2, workers=1)
    assert told.differing["experiment steps"] == ("31", "30")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loops": [3]}, r"lr-optima\.json has no optimum of N = \[3\]; choose from 1, 2, 4"),
        ({"loops": []}, r"has no optimum of N = \[\]"),
        ({"seeds": 1}, "seeds is 1; give two or more"),
        ({"rule": "sqrt"}, "has no optima of rule 'sqrt'"),
        ({"rule": "cubic"}, "cubic"),
        ({"baseline": replace(STORED, axis="width")}, "has optima over width"),
        ({"baseline": "nowhere.json"}, "there is no baseline"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gate(tiny_experiment(), **({"baseline": STORED, "workers": 1} | options))


def test_on_the_command_line_it_exits_with_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    STORED.write(tmp_path / "lr-optima.json")
    told = gate(tiny_experiment(), STORED, loops=[1], seeds=2, workers=1)
    command = ["gate", "tests.experiments:tiny_experiment", "--baseline", str(tmp_path / "lr-optima.json")]
    assert main([*command, "--loops", "1", "--seeds", "2", "--workers", "1"]) == told.exit_status
    assert "Half, once and twice the stored LR" in capsys.readouterr().out
    assert main([*command, "--loops", "9"]) == 2
    assert "choose from 1, 2, 4" in capsys.readouterr().err
