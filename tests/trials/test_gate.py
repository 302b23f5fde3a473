from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from looptransfer.command.cli import main
from looptransfer.errors import InputError
from looptransfer.transfer.baseline import Baseline
from looptransfer.transfer.optimum import Interval
from looptransfer.transfer.results import tidy
from looptransfer.transfer.sources import read_results
from looptransfer.transfer.stored import StoredOptimum, losses_of
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.gate import GateSearch, gate
from looptransfer.trials.ledger import Ledger
from looptransfer.trials.run import Run
from looptransfer.trials.sweep import sweep
from tests.experiments import WIDTH, TinyTask, tiny_experiment


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
    assert set(runs.loc[runs["loops"] == 4, "seed"]) == {"0", "1", "2", "3"}
    assert sorted(runs.loc[runs["loops"] == 4, "lr"].unique()) == [2.0**-7, 2.0**-6, 2.0**-5]


def test_half_of_the_seeds_are_enough_where_they_tell(tmp_path: Path) -> None:
    ledger = tmp_path / "gate.db"
    told = gate(tiny_experiment(), STORED, seeds=4, ledger=ledger, workers=1)
    of_seeds = read_results(ledger).groupby("loops")["seed"].nunique()
    assert {finding.n: finding.seeds for finding in told.findings if finding.seeds} == of_seeds.to_dict()
    assert of_seeds.to_dict() == {1: 2, 4: 4}


def test_without_a_ledger_no_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gate(tiny_experiment(), STORED, loops=[1], seeds=2, workers=1)
    assert not list(tmp_path.iterdir())


def test_an_experiment_that_differs_from_the_stored_one_is_told() -> None:
    made_by = {"experiment": {**{k: str(v) for k, v in tiny_experiment().identity().items()}, "steps": "31"}}
    told = gate(tiny_experiment(), replace(STORED, fingerprint=made_by), loops=[1], seeds=2, workers=1)
    assert told.differing["experiment steps"] == ("31", "30")


# -- stored runs made again


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    """Optima at an LR of 2^-5 for N = 1, 2, 4, with the losses of runs of the tiny experiment."""
    ledger = tmp_path_factory.mktemp("swept") / "runs.db"
    runs = tidy(sweep(tiny_experiment(), [1, 2, 4], lrs=[2.0**-6, 2.0**-5], seeds=3, ledger=ledger, workers=2))
    optima = [replace(optimum(n, -5), losses=losses_of(table)) for n, table in runs.groupby("loops")]
    return replace(STORED, optima={"factored": tuple(optima)})


class Permuted(TinyTask):
    """The same function, whose hidden units stand in another order: other sums, the same code in all that matters."""

    def make_model(self, loops: int) -> nn.Module:
        model = super().make_model(loops)
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
        first, _, last = model.block
        with torch.no_grad():
            first.weight.copy_(first.weight[order])
            first.bias.copy_(first.bias[order])
            last.weight.copy_(last.weight[:, order])
        return model


def made_by(task: TinyTask, **changes: Any) -> Experiment:
    return replace(tiny_experiment(), make_model=task.make_model, **changes)


def test_unchanged_code_costs_two_runs_of_an_optimum(swept: Baseline, tmp_path: Path) -> None:
    told = gate(tiny_experiment(), swept, ledger=tmp_path / "gate.db", workers=1)
    assert told.answer == "HOLDS"
    assert len(read_results(tmp_path / "gate.db")) == 4
    assert "Stored runs made again;" in str(told)
    assert all("seed 0 gives the stored losses again" in finding.reason for finding in told.findings)


def test_code_that_sums_in_another_order_costs_three(swept: Baseline, tmp_path: Path) -> None:
    told = gate(made_by(Permuted()), swept, ledger=tmp_path / "gate.db", workers=1)
    assert told.answer == "HOLDS"
    assert "Stored runs made again;" in str(told)
    assert len(read_results(tmp_path / "gate.db")) <= 6


def shifted(stored: StoredOptimum, by: float) -> StoredOptimum:
    """An optimum whose runs have stored losses that are larger."""
    losses = {lr: {seed: loss and loss + by for seed, loss in by_seed.items()} for lr, by_seed in stored.losses.items()}
    return replace(stored, losses=losses)


def test_a_ledger_of_the_gate_is_read_without_the_controls(swept: Baseline, tmp_path: Path) -> None:
    ledger = tmp_path / "gate.db"
    slightly_other = replace(swept, optima={"factored": (shifted(swept.optima["factored"][0], 1e-5),)})
    gate(tiny_experiment(), slightly_other, loops=[1], ledger=ledger, workers=1, seeds=2)
    told = read_results(ledger)
    assert set(told["lr"]) <= {2.0**-6, 2.0**-5, 2.0**-4}
    assert len(told) < len(Ledger(ledger).finished)


def test_code_that_trains_otherwise_is_looked_at_by_the_bracket(swept: Baseline, tmp_path: Path) -> None:
    told = gate(made_by(TinyTask(), lam=3.0), swept, ledger=tmp_path / "gate.db", workers=1, seeds=3)
    assert "Half, once and twice the stored LR;" in str(told)
    assert all(finding.seeds == 3 for finding in told.findings)


def test_only_the_n_that_differs_is_looked_at_by_the_bracket(swept: Baseline, tmp_path: Path) -> None:
    optima = {at.n: at for at in swept.optima["factored"]}
    changed = replace(swept, optima={"factored": (optima[1], shifted(optima[4], 0.5))})
    told = gate(tiny_experiment(), changed, ledger=tmp_path / "gate.db", workers=1, seeds=2)
    assert [finding.seeds for finding in told.findings] == [1, 2]
    assert "Stored runs made again, else half, once and twice the stored LR;" in str(told)


def holds_at_first(half: float, once: float, effect: float, seed: int) -> bool:
    """Whether the first stage confirms an optimum by invented runs.

    Float noise moves their losses by `half` at half the LR and by `once` at the LR; the code itself moves the latter by
    `effect`.
    """
    random = np.random.default_rng(seed)
    losses = {repr(lr): dict.fromkeys("0123", 2.0) for lr in (2.0**-7, 2.0**-6)}
    search = GateSearch([replace(optimum(4, -6, "0123"), losses=losses)], "factored", [0, 1, 2, 3], 0.02, 0.9)
    done: dict[Run, float] = {}
    while missing := [run for run in search.wanted(done) if run not in done]:
        if max(run.lr for run in missing) > 2.0**-5.5:
            return False
        for run in missing:
            mean, noise = (2.0 + effect, once) if run.lr > 2.0**-6.5 else (2.0, half)
            done[run] = mean + random.normal(0, noise)
    assert len(done) <= 8
    assert search.confirmed(done)
    return True


def test_where_half_the_lr_agrees_noise_at_the_lr_is_no_alarm() -> None:
    """0.015 nats is what one ulp makes of the reference at N = 16 (reports/gate/refactors.md)."""
    assert sum(holds_at_first(1e-6, 0.015, 0.0, seed) for seed in range(200)) >= 185


def test_what_changes_at_high_lrs_alone_is_looked_at_by_the_bracket() -> None:
    assert not any(holds_at_first(1e-6, 1e-6, 0.005, seed) for seed in range(20))
    assert sum(holds_at_first(1e-6, 0.015, 0.06, seed) for seed in range(200)) <= 8


def test_noise_at_half_the_lr_explains_little() -> None:
    assert sum(holds_at_first(0.01, 0.015, 0.0, seed) for seed in range(200)) <= 40


def test_a_killed_gate_goes_on_with_the_runs_that_are_left(swept: Baseline) -> None:
    search = GateSearch([swept.fitted("factored")[4]], "factored", [0, 1], 0.02, 0.9)
    first = list(search.wanted({}))
    assert len(first) == 2
    assert list(search.wanted({first[0]: 1.0})) == first
    done = {run: loss + 0.5 for run, loss in zip(first, [1.0, 1.0], strict=True)}
    assert set(search.wanted(done)) == {*first, *search.bracket(search.optima[0], done)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loops": [3]}, r"lr-optima\.json has no optimum of N = \[3\]; choose from 1, 2, 4"),
        ({"loops": []}, r"has no optimum of N = \[\]"),
        ({"seeds": 1}, "seeds is 1; it must be a whole number from 2 up"),
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
