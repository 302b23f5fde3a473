"""The benchmark scripts that write reports run from end to end."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from looptransfer.reference.experiment import ReferenceSize
from tests.experiments import tiny_experiment

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_papers_diagnostics_are_measured_drawn_and_reported(tmp_path: Path) -> None:
    paper = load("paper")
    size = ReferenceSize(width=8, heads=2, layers=1, sequence=8, batch=2, steps=4)
    tiny = paper.Scale(8, 2, (8, 16), 8, 2, 1, 1e-3, size, 0.01, (3,), (1,), 1, 2, length=8)
    paper.measure(tiny, tmp_path)
    paper.report(tiny, tmp_path)
    text = (tmp_path / "README.md").read_text()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {name[0] for name in pictures} == set("123456")
    assert all(f"]({name})" in text for name in pictures)
    assert text.count("**Where they differ:**") == 7

    record = json.loads((tmp_path / "run.json").read_text())
    del record["seconds"]["figure 4b"]  # as if the run had been interrupted there
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "layers.csv").unlink()
    (tmp_path / "short.csv").write_text("kept")
    paper.measure(tiny, tmp_path)
    assert (tmp_path / "layers.csv").exists()
    assert (tmp_path / "short.csv").read_text() == "kept"


def test_a_gpu_is_asked_for_in_words_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = load("paper")
    if paper.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["paper.py", "--scale", "gpu"])
    with pytest.raises(SystemExit, match="2"):
        paper.main()
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_growth_is_measured_once_and_reported(tmp_path: Path) -> None:
    growth = load("growth")
    size = ReferenceSize(width=8, heads=2, layers=1, sequence=8, batch=2, steps=20)
    tiny = growth.Scale(size, seeds=(0, 1), lrs=(0.01, 0.02), tuning_seeds=(5,), evaluations=2)
    growth.measure(tiny, tmp_path)
    curves = (tmp_path / "curves.csv").read_text()
    assert [growth.loops_at(growth.GROWN, share) for share in (0, 0.15, 0.4, 0.9)] == [1, 2, 4, 8]
    growth.measure(tiny, tmp_path)
    assert (tmp_path / "curves.csv").read_text() == curves
    growth.report(tiny, tmp_path, 1.0)
    assert "growth.png" in (tmp_path / "README.md").read_text()


def test_ways_to_choose_an_lr_are_measured_on_the_same_losses() -> None:
    search = load("search")
    surface = search.Surface("bowl", "smooth", lambda log2: 3 + 0.1 * (log2 + 8) ** 2, search.white(0.002, 1, 0.1))
    draw = search.Draw(surface, 1, 1.0)
    log2, loss = draw.best()
    assert (log2, loss) == (pytest.approx(-7, abs=0.01), pytest.approx(3, abs=1e-4))
    choices = {way: choose(draw) for way, choose in search.WAYS.items() if not way.startswith("Optuna")}
    assert all(draw.mean(choice.log2) - loss < 0.05 for choice in choices.values())
    assert choices["`tune`"].trainings < choices["grid, 8 LRs × 3 seeds"].trainings == 24
    assert len(list(search.held_out())) > 30


def test_the_public_audit_judges_its_grids_and_its_report_is_current(tmp_path: Path) -> None:
    audit = load("audit")
    home = BENCHMARKS.parent / audit.HOME
    grids = audit.read(home)
    assert {grid.source["grid"] for grid in grids} == {path.stem for path in (home / "data").glob("*.csv")}
    assert audit.table(audit.rows(grids)) in (home / "README.md").read_text()
    audit.forest(grids).savefig(tmp_path / "forest.png")


def test_the_limits_of_a_grid_are_the_drifts_that_the_lrs_beside_the_best_leave() -> None:
    audit = load("audit")

    def bowl(best: int) -> audit.pd.DataFrame:
        return audit.pd.DataFrame({"0": [abs(x - best) for x in range(5)]}, index=[-4.0, -3.0, -2.0, -1.0, 0.0])

    assert audit.limits({1: bowl(2)}) is None
    assert audit.limits({1: bowl(2), 2: bowl(2)}) == (-2.0, 2.0)
    assert audit.limits({1: bowl(3), 4: bowl(1)}) == (-2.0, 0.0)
    assert audit.limits({1: bowl(2), 2: bowl(4)}) == (0.0, float("inf"))


def test_the_cost_of_the_monitor_is_measured_beside_a_step() -> None:
    share = load("monitor").shares(loops=2, width=16, layers=1, sequence=8, device="cpu")
    assert 0 < share["without"] < share["with"]


def test_a_finished_sweep_goes_on_with_further_seeds_alone(tmp_path: Path) -> None:
    cells = load("cells")
    cell = cells.Cell("sweep", tiny_experiment, (1, 2), ("factored",), (-1.0, 0.0), seeds=2, extensions=0)
    cell.run(tmp_path, workers=1)
    shutil.rmtree(tmp_path / "sweep")  # the ledger
    before = pd.read_csv(cell.table(tmp_path))
    assert cell.finished(tmp_path)
    further = replace(cell, seeds=3)
    assert not further.finished(tmp_path)
    assert cells.run_cells([further], tmp_path, minutes=1, workers=1) == [further]
    after = pd.read_csv(cell.table(tmp_path))
    assert after[after["seed"] < 2].reset_index(drop=True).equals(before)  # as they were, seconds included
    assert len(after) == 12
    assert not after.duplicated(["rule", "loops", "lr", "seed"]).any()


def test_cells_of_the_transfer_study_are_made_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = load("transfer")
    made = transfer.experiment
    monkeypatch.setattr(transfer, "OCTAVES", (-1.0, 0.0))
    monkeypatch.setattr(transfer, "FEWEST_DEPTHS", 2)
    monkeypatch.setattr(transfer, "MOVED_DEPTHS", (2, 4))
    monkeypatch.setattr(transfer, "MOVED_STEPS", (1, 2))
    monkeypatch.setattr(transfer, "experiment", lambda start, layers, _, *arm: made(start, layers, 4, *arm))
    arms = (transfer.PAPER, transfer.COMPLETEP, transfer.Arm(held=True), transfer.Arm(lam=0.5))
    monkeypatch.setattr(transfer, "MORE_SEEDS", 2)
    study = transfer.OverLayers(transfer.SMALL, 250, arms, (2, 4), seeds=2, candidates=arms[:2])
    monkeypatch.setattr(transfer, "STUDIES", (study,))
    cells = [replace(cell, extensions=0) for cell in study.cells()]
    assert len(cells) == 7  # the exponents are one at the base depth
    for cell in cells:
        cell.run(tmp_path, workers=1)
    for start in transfer.STARTS:
        transfer.movements(start).to_csv(tmp_path / f"movements-{transfer.name_of_start(start)}.csv", index=False)
    text = transfer.report(tmp_path, cells)
    assert "| ε: 1/2, LR: 1/2 (the paper) | 2 | INCONCLUSIVE |" in text
    assert "| ε: 1, LR: 0 (completep) | 2 | INCONCLUSIVE |" in text
    assert "| ε: 1/2, LR: 1/2, of the branches alone | 2 | INCONCLUSIVE |" in text
    assert "| ε: 1/2, LR: 1/2, λ = 1/2 | 2 | INCONCLUSIVE |" in text
    assert "| 1 | branches | 2 | " in text
    assert "![loss over LR at every L](curves-N1-250.png)" in text
    assert (tmp_path / "curves-N1-250.png").exists()
    assert (tmp_path / "drifts.png").exists()


def test_a_model_of_prefix_sums_sees_two_digits_further_back_at_each_loop() -> None:
    prefix_sums = load("prefix_sums")
    torch = prefix_sums.torch
    size = prefix_sums.Size(length=12)
    digits, sums = next(prefix_sums.Task(size).batches(0))
    assert [int(digits[0, :place].sum()) % 3 for place in range(1, 13)] == sums[0].tolist()
    for loops in (1, 2, 4):
        torch.manual_seed(0)
        model = prefix_sums.Task(size).make_model(loops)
        plan = prefix_sums.lt.parametrize(model, digits)
        assert [(branch.visits, branch.multiplier) for branch in plan.branches] == [(loops, 1 / loops)]
        others = digits.clone()
        others[:, 0] = (others[:, 0] + 1) % 3
        moved = (model(digits) != model(others)).any(dim=-1).any(dim=0)
        assert moved.tolist() == [place <= 2 * loops for place in range(12)]


def test_the_prefix_sums_study_goes_on_where_it_stopped_and_is_reported(tmp_path: Path) -> None:
    prefix_sums = load("prefix_sums")
    size = prefix_sums.Size(length=6, width=8, batch=4, steps=4, held_out=8)
    study = prefix_sums.Study(size, tmp_path, 2, (-1.0, 0.0), (1, 2), ("factored", "unscaled"))
    (tmp_path / "tuned.json").write_text('{"lr": 0.1, "loss": 1, "regret": 0.01, "runs": 8}')
    assert not study.measure(minutes=0)
    assert study.measure(minutes=5)
    costs = len(study.read("cost.csv"))
    assert study.measure(minutes=0)
    assert len(study.read("cost.csv")) == costs == 12
    assert "are the sweep's to 0 nats" in prefix_sums.report(study)
    assert (tmp_path / "prefix_sums.png").exists()


def test_the_report_on_prefix_sums_is_current() -> None:
    prefix_sums = load("prefix_sums")
    study = prefix_sums.Study(prefix_sums.Size(), prefix_sums.REPORT)
    text, lr = (prefix_sums.REPORT / "README.md").read_text(), study.tuned()["lr"]
    every, carried, best = (prefix_sums.judge(study, *terms) for terms in ((1, lr), (2, lr), (2,)))
    assert prefix_sums.table(prefix_sums.rows_by_rule(carried, best)) in text
    assert prefix_sums.table(prefix_sums.rows_by_loops(study, every)) in text
    assert prefix_sums.short_of(every, carried, best) in text
    assert prefix_sums.with_its_own(study) in text
