import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest

from looptransfer.errors import InputError
from looptransfer.transfer.results import COLUMNS, tidy
from looptransfer.transfer.sources import read_results
from looptransfer.trials.sweep import sweep, tune
from tests.experiments import tiny_experiment
from tests.transfer.test_results import csv_file, table

RUNS = [
    {"config": {"lr": 0.01 * k, "n_loops": n}, "summary": {"val_loss": 2.0 + k}, "seed": 3, "tags": ["a"]}
    for n in (1, 2)
    for k in (1, 2, 3)
]
NAMES = {"lr": "config.lr", "loops": "config.n_loops", "loss": "summary.val_loss"}


def test_a_table_written_as_csv_reads_back_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    runs = tidy(table(lr=2.0 ** rng.normal(size=3), loss=[math.inf, *rng.normal(size=2)]))
    runs.to_csv(tmp_path / "out.csv", index=False)
    pd.testing.assert_frame_equal(read_results(tmp_path / "out.csv"), runs)


def test_spaces_around_cells_do_not_matter(tmp_path: Path) -> None:
    runs = read_results(csv_file(tmp_path, "loops, lr, loss\n1, 0.01, 2.0\n"))
    assert runs[["loops", "lr", "loss"]].to_numpy().tolist() == [[1.0, 0.01, 2.0]]


def test_a_file_named_like_an_archive_is_read_as_the_text_it_is(tmp_path: Path) -> None:
    path = tmp_path / "results.csv.zip"
    path.write_text("loops,lr,loss\n1,0.01,2\n")
    assert len(read_results(path)) == 1


# -- JSON lines, Parquet, names of other tools


def json_lines(folder: Path, *lines: object) -> Path:
    path = folder / "runs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_json_lines_with_objects_inside_give_columns_with_dots_that_are_mapped(tmp_path: Path) -> None:
    runs = read_results(json_lines(tmp_path, *RUNS), NAMES)
    assert runs["loops"].tolist() == [1, 1, 1, 2, 2, 2]
    assert runs["lr"].tolist() == pytest.approx([0.01, 0.02, 0.03] * 2)
    assert runs["loss"].tolist() == [3.0, 4.0, 5.0] * 2
    assert set(runs["seed"]) == {"3"}


def test_a_tracker_export_as_csv_is_mapped_likewise(tmp_path: Path) -> None:
    pd.json_normalize(RUNS).to_csv(tmp_path / "export.csv", index=False)
    mapped = read_results(tmp_path / "export.csv", NAMES)
    assert mapped["loss"].tolist() == read_results(json_lines(tmp_path, *RUNS), NAMES)["loss"].tolist()


def test_a_mapping_replaces_a_column_that_has_the_name_already(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss,final\n1,0.01,7,2\n2,0.01,7,3\n")
    assert read_results(path, {"loss": "final"})["loss"].tolist() == [2.0, 3.0]


def test_a_mapping_swaps_two_columns(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss\n1,2,0.5\n2,3,0.5\n")
    assert read_results(path, {"lr": "loss", "loss": "lr"})["lr"].tolist() == [0.5, 0.5]


def test_parquet_reads_as_the_csv_does(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    table().to_parquet(tmp_path / "runs.parquet")
    runs = read_results(tmp_path / "runs.parquet")
    pd.testing.assert_frame_equal(runs[["loops", "lr", "seed", "loss"]], tidy(table())[["loops", "lr", "seed", "loss"]])


def test_a_line_of_a_megabyte_is_refused_in_a_message_of_a_line(tmp_path: Path) -> None:
    path = csv_file(tmp_path, f"loops,lr,loss\n1,{'9x' * 500_000},2\n")
    with pytest.raises(InputError, match=r"^row 2: lr is '9x9x") as raised:
        read_results(path)
    assert len(str(raised.value)) < 200
    wide = csv_file(tmp_path, f"loops,lr,loss,{'x' * 1_000_000}\n1,0.1,2,0\n2,0.1,2,0\n")
    assert len(read_results(wide)) == 2


# -- studies


def study_of(path: Path, name: str = "mine") -> str:
    """An Optuna study of somebody else's, with one trial that failed."""
    url = f"sqlite:///{path}"
    study = optuna.create_study(storage=url, study_name=name)

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-3, 1.0, log=True)
        trial.set_user_attr("seed", trial.number % 2)
        if trial.number == 3:
            raise ArithmeticError
        loops = trial.suggest_int("loops", 1, 2)
        return float("inf") if lr > 0.5 else (np.log2(lr) + 6) ** 2 + loops

    study.sampler = optuna.samplers.RandomSampler(seed=1)
    study.optimize(objective, n_trials=12, catch=ArithmeticError)
    return url


def test_a_study_gives_a_row_for_every_finished_trial_and_tells_of_the_others(tmp_path: Path) -> None:
    url = study_of(tmp_path / "study.db")
    runs = read_results(f"{url}#mine")
    assert len(runs) == 11
    assert set(runs["seed"]) == {"0", "1"}
    assert "1 trials that failed" in runs.attrs["left_out"]
    pd.testing.assert_frame_equal(runs, read_results(tmp_path / "study.db"))


def test_a_study_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    url = study_of(tmp_path / "study.db")
    optuna.create_study(storage=url, study_name="other")
    with pytest.raises(InputError, match=r"has the studies .*'mine'.*; name one by #NAME"):
        read_results(url)
    with pytest.raises(InputError, match=r"has the studies .*'other'"):
        read_results(f"{url}#third")


def test_a_ledger_gives_the_table_of_its_sweep_with_the_experiment_that_made_it(tmp_path: Path) -> None:
    ledger, experiment = tmp_path / "ledger.db", tiny_experiment(steps=6)
    grid: dict[str, Any] = {"around": 2.0**-4, "octaves": [-1, 0, 1], "seeds": 2, "ledger": ledger, "workers": 1}
    made = sweep(experiment, [1, 2], **grid)
    runs = read_results(ledger)
    order = ["loops", "lr", "seed"]
    pd.testing.assert_frame_equal(
        runs.sort_values(order)[["loops", "lr", "loss", "fingerprint"]].reset_index(drop=True),
        tidy(made).sort_values(order)[["loops", "lr", "loss", "fingerprint"]].reset_index(drop=True),
    )
    assert runs.attrs["experiment"] == json.loads(json.dumps(experiment.identity()))
    assert set(COLUMNS) <= set(runs.columns)
    assert runs["fingerprint"].nunique() == 1
    assert len(runs["fingerprint"][0]) == 12


def test_the_fingerprint_tells_experiments_apart(tmp_path: Path) -> None:
    grid: dict[str, Any] = {"around": 2.0**-4, "octaves": [0], "seeds": 1, "workers": 1}
    prints = [
        sweep(tiny_experiment(steps=steps), [1], ledger=tmp_path / f"{number}.db", **grid)["fingerprint"][0]
        for number, steps in enumerate((5, 6, 6))
    ]
    assert prints[0] != prints[1] == prints[2]


def test_a_ledger_with_a_tuning_alone_gives_its_runs(tmp_path: Path) -> None:
    tune(tiny_experiment(steps=6), 1, 2, tmp_path / "ledger.db", workers=1)
    assert set(read_results(tmp_path / "ledger.db")["loops"]) == {1}


SCHEDULED = "loops,{},{},loss\n1,0.001,0.01,2\n1,0.002,0.02,2\n"


@pytest.mark.parametrize("names", [("lr", "optimizer.lr"), ("train/lr", "learning_rate")])
def test_an_lr_beside_another_that_differs_is_not_clear(tmp_path: Path, names: tuple[str, str]) -> None:
    """Trackers log the LR of every step, and export the last: the end of a schedule."""
    path = csv_file(tmp_path, SCHEDULED.format(*names))
    with pytest.raises(InputError, match=r"lr is not clear: .* --columns lr=.* or --columns lr="):
        read_results(path)
    assert read_results(path, {"lr": names[1]})["lr"].tolist() == [0.01, 0.02]


@pytest.mark.parametrize("text", ["0.001,0.001", "0.001,0.0010000001"])
def test_an_lr_beside_the_same_one_is_clear(tmp_path: Path, text: str) -> None:
    path = csv_file(tmp_path, f"loops,lr,optimizer.lr,loss\n1,{text},2\n1,0.002,0.002,2\n")
    assert read_results(path)["lr"].tolist() == [0.001, 0.002]


def test_a_configured_lr_is_clear_beside_a_logged_one(tmp_path: Path) -> None:
    assert read_results(csv_file(tmp_path, SCHEDULED.format("lr", "train/lr")))["lr"].tolist() == [0.001, 0.002]


def test_a_column_that_is_almost_called_so_is_offered(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,val/loss\n1,0.001,2\n")
    with pytest.raises(InputError, match="there is no column val_loss, did you mean val/loss"):
        read_results(path, {"loss": "val_loss"})


def test_of_a_crashed_run_and_its_rerun_the_finished_one_is_offered(tmp_path: Path) -> None:
    text = "loops,lr,seed,loss,State\n1,0.01,0,2,crashed\n1,0.01,0,2,finished\n2,0.02,0,2,finished\n2,0.01,0,2,finished"
    with pytest.raises(InputError, match="--where State=finished"):
        read_results(csv_file(tmp_path, text), diverged=["State=crashed"])


def test_the_state_is_offered_also_where_another_column_tells_the_runs_apart(tmp_path: Path) -> None:
    text = "loops,lr,seed,loss,host,State\n1,0.01,0,2,a,crashed\n1,0.01,0,2,b,finished\n"
    others = "".join(f"2,0.0{lr},0,2,{host},finished\n" for lr in (1, 2, 3) for host in "a")
    with pytest.raises(InputError, match=r"--where State=finished\)"):
        read_results(csv_file(tmp_path, text + others), diverged=["State=crashed"])


def test_rows_that_where_leaves_out_are_told_where_they_diverged(tmp_path: Path) -> None:
    text = "loops,lr,loss,State\n1,0.01,2,finished\n1,0.02,3,finished\n1,0.04,NaN,crashed\n1,0.08,,crashed\n"
    told = read_results(csv_file(tmp_path, text), where=["State=finished"]).attrs["left_out"]
    assert told.startswith("2 of 4 rows are left out by --where State=finished (1 of them with a loss of nan or inf")


def test_a_learning_rate_is_offered_as_the_lr(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--columns lr=learning_rate"):
        read_results(csv_file(tmp_path, "loops,learning_rate,loss\n1,0.01,2\n"))


def test_a_name_is_found_whatever_its_case(tmp_path: Path) -> None:
    runs = read_results(csv_file(tmp_path, "loops,LR,config.Seed,loss,Diverged\n1,0.1,5,2,true\n2,0.2,6,3,false\n"))
    assert (runs["lr"].tolist(), runs["seed"].tolist()) == ([0.1, 0.2], ["5", "6"])
    assert runs["loss"].tolist() == [math.inf, 3.0]


def test_files_of_two_metrics_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("loops,lr,train/loss\n1,0.1,2\n")
    (tmp_path / "b.csv").write_text("loops,lr,val/loss\n2,0.1,2\n")
    with pytest.raises(InputError, match="the loss is train/loss in one file and val/loss in another"):
        read_results([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_another_loss_beside_the_judged_one_is_told(tmp_path: Path) -> None:
    runs = read_results(csv_file(tmp_path, "loops,lr,loss,val_loss\n1,0.1,2,3\n"))
    assert runs.attrs["left_out"] == "judged is loss; there is val_loss as well"


@pytest.mark.parametrize("name", ["peak_lr", "config.max_lr", "Learning Rate", "config.LR", "optimizer.initial_lr"])
def test_a_logged_lr_beside_a_configured_one_is_not_clear_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    rows = "".join(f"{n},{lr},{lr / 10 / n},2\n" for n in (1, 2) for lr in (0.1, 0.2, 0.4))
    with pytest.raises(InputError, match=f"lr is not clear: train/lr and {name} differ, .*lr={name}.?, the configured"):
        read_results(csv_file(tmp_path, f"loops,{name},train/lr,loss\n{rows}"))


@pytest.mark.parametrize("name", ["min_lr", "embedding_lr", "lr_warmup_steps", "lr_decay"])
def test_an_lr_in_proportion_or_one_that_is_no_search_is_no_rival(tmp_path: Path, name: str) -> None:
    cells = {"min_lr": "{0}", "embedding_lr": "0.3", "lr_warmup_steps": "{1}00", "lr_decay": "cosine"}[name]
    rows = "".join(f"{n},{lr},{cells.format(lr / 10, n)},2\n" for n in (1, 2) for lr in (0.1, 0.2, 0.4))
    assert len(read_results(csv_file(tmp_path, f"loops,lr,{name},loss\n{rows}"))) == 6


def test_a_row_that_is_commented_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3 begins with #: remove comment lines"):
        read_results(csv_file(tmp_path, "rule,loops,lr,loss\na,1,0.1,2\n#a,2,0.1,2\n"))


def test_a_mark_of_divergence_that_is_true_of_no_row_is_told(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss,State\n1,0.1,2,finished\n")
    told = read_results(path, diverged=["State=crashed"]).attrs["left_out"]
    assert told == "--diverged State=crashed is true of no row; State is 'finished' (1)"


@pytest.mark.parametrize(("magic", "kind"), [(b"PK\x03\x04rest", "an Excel file"), (b"\x1f\x8brest", "packed by gzip")])
def test_what_is_packed_is_called_so(tmp_path: Path, magic: bytes, kind: str) -> None:
    (tmp_path / "runs.csv").write_bytes(magic)
    with pytest.raises(InputError, match=f"is not a CSV table or JSON lines: it is {kind}"):
        read_results(tmp_path / "runs.csv")


def test_a_condition_that_is_offered_can_be_pasted(tmp_path: Path) -> None:
    path = csv_file(tmp_path, 'loops,lr,loss,State\n1,0.1,2,finished\n1,0.2,2,"x; $(touch pwned)"\n')
    with pytest.raises(InputError, match=r"--diverged 'State=x; \$\(touch pwned\)'"):
        read_results(path)
