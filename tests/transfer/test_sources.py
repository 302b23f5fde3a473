import json
import math
import sqlite3
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


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent\.csv: No such file or directory; give CSV, JSON lines"):
        read_results(tmp_path / "absent.csv")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_results(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a CSV table"):
        read_results(csv_file(tmp_path, ""))


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\xff\xfe\x80", b'loops,lr,loss\n1,"0.01,2.0\n'])
def test_a_file_that_is_no_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a CSV table"):
        read_results(path)


def test_a_row_with_more_cells_than_the_header_among_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a CSV table.*line 3"):
        read_results(csv_file(tmp_path, "loops,lr,loss\n1,0.01,2.0\n2,0.01,2.0,9\n"))


def test_spaces_around_cells_do_not_matter(tmp_path: Path) -> None:
    runs = read_results(csv_file(tmp_path, "loops, lr, loss\n1, 0.01, 2.0\n"))
    assert runs[["loops", "lr", "loss"]].to_numpy().tolist() == [[1.0, 0.01, 2.0]]


def test_a_row_longer_than_the_header_is_refused_and_shifts_no_column(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a CSV table"):
        read_results(csv_file(tmp_path, "loops,lr,loss\n1,2,0.01,2\n1,4,0.01,3\n"))


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^row 4: loss is 'fast'"):
        read_results(csv_file(tmp_path, "loops,lr,loss\n1,0.01,2\n\n2,0.01,fast\n"))


def test_a_file_named_like_an_archive_is_read_as_the_text_it_is(tmp_path: Path) -> None:
    path = tmp_path / "results.csv.zip"
    path.write_text("loops,lr,loss\n1,0.01,2\n")
    assert len(read_results(path)) == 1


def test_another_separator_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="separated by ;"):
        read_results(csv_file(tmp_path, "loops;lr;loss\n1;0.01;2\n"))


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


def test_a_mapped_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no column config\.eta; there are .*config\.lr"):
        read_results(json_lines(tmp_path, *RUNS), {"lr": "config.eta"})


def test_a_line_that_is_no_json_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs\.jsonl, line 2 is not JSON"):
        read_results(json_lines(tmp_path, RUNS[0], "{oops"))
    with pytest.raises(InputError, match=r"line 3 holds no JSON object"):
        read_results(json_lines(tmp_path, RUNS[0], "", "[1, 2]"))


def test_a_fault_in_json_lines_is_named_by_its_line(tmp_path: Path) -> None:
    path = json_lines(tmp_path, {"loops": 1, "lr": 1, "loss": 1}, "", {"loops": 1, "lr": "big", "loss": 1})
    with pytest.raises(InputError, match=r"^row 3: lr is 'big'"):
        read_results(path)


def test_text_that_is_not_utf_8_is_no_json_lines(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_results(tmp_path / "runs.jsonl")


def test_parquet_reads_as_the_csv_does(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    table().to_parquet(tmp_path / "runs.parquet")
    runs = read_results(tmp_path / "runs.parquet")
    pd.testing.assert_frame_equal(runs[["loops", "lr", "seed", "loss"]], tidy(table())[["loops", "lr", "seed", "loss"]])
    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InputError, match=r"broken\.parquet is not a Parquet table"):
        read_results(tmp_path / "broken.parquet")


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


def test_a_url_without_a_file_is_refused_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_results(f"sqlite:///{tmp_path / 'absent.db'}#sweep")
    assert not (tmp_path / "absent.db").exists()


def test_a_database_that_is_no_study_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "songs.db"
    with sqlite3.connect(path) as database:
        database.execute("create table songs (title text)")
    with pytest.raises(InputError, match=r"songs\.db"):
        read_results(path)


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
