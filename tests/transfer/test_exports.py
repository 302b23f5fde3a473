"""Tables as trackers export them; where those in `exports` come from is said there."""

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from looptransfer.errors import InputError
from looptransfer.transfer.check import check
from looptransfer.transfer.results import at_horizon
from looptransfer.transfer.sources import read_results
from tests.transfer.test_results import csv_file
from tests.transfer.test_sources import study_of

EXPORTS = Path(__file__).parent / "exports"
CALLED = "n{loops}-lr{lr}-s{seed}"
CRASHED = "n1-lr0.001752-s1"
OPTIONS: dict[str, dict[str, Any]] = {
    "wandb_runs": {"columns": {"loss": "val_loss"}, "where": ["State=finished"]},
    "mlflow": {"columns": {"loss": "val_loss"}, "where": ["status=FINISHED"], "diverged": ["loss="]},
    "tb_hparams": {"columns": {"loss": "val_loss"}},
    "wandb_plot": {"columns": {"loss": "val_loss"}, "run_name": CALLED, "where": [f"run!={CRASHED}"]},
    "tb_long": {"columns": {"loss": "loss/val"}, "run_name": CALLED, "where": [f"run!={CRASHED}"]},
}


def read(name: str, **changes: Any) -> pd.DataFrame:
    return read_results(EXPORTS / f"{name}.csv", **(OPTIONS[name] | changes))


def losses(runs: pd.DataFrame) -> dict[tuple[int, float, str], float]:
    """The last losses to five digits."""
    last = at_horizon(runs)
    return {
        (n, lr, seed): round(loss, 5)
        for n, lr, seed, loss in zip(last["loops"], last["lr"], last["seed"], last["loss"], strict=True)
    }


def runs_as_files(folder: Path) -> list[Path]:
    """The runs of the long table as TensorBoard gives them one by one."""
    table = pd.read_csv(EXPORTS / "tb_long.csv")
    for run, rows in table[(table["tag"] == "loss/val") & (table["run"] != CRASHED)].groupby("run"):
        export = pd.DataFrame({"Wall time": 1.0, "Step": rows["step"], "Value": rows["value"]})
        export.to_csv(folder / f"run-{run}-tag-loss_val.csv", index=False, na_rep="nan")
    return sorted(folder.glob("run-*.csv"))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_export_gives_the_same_runs_and_a_verdict_in_nats(name: str) -> None:
    runs = read(name)
    assert len(losses(runs)) == 83
    assert losses(runs) == losses(read("wandb_runs"))
    assert losses(runs)[16, 0.03965, "3"] == math.inf
    assert losses(runs)[1, 0.001752, "0"] == 2.54203
    verdict = check(runs)
    assert (verdict.answer, verdict.unit) == ("FLAT", "nats")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_crashed_is_never_taken_for_one_that_finished(name: str) -> None:
    if name == "tb_hparams":  # has no states, nor that run
        assert (1, 0.001752, "1") not in losses(read(name))
        return
    with pytest.raises(InputError, match=r"row \d+.* (State is 'crashed'|status is 'FAILED'|loss is ''|ends at step)"):
        read(name, where=[], diverged=[])
    crashed = {"wandb_runs": "State=crashed", "mlflow": "status=FAILED"}.get(name, f"run={CRASHED}")
    assert losses(read(name, where=[], diverged=[crashed, "loss="]))[1, 0.001752, "1"] == math.inf


def test_the_runs_of_tensorboard_are_one_table_of_many_files(tmp_path: Path) -> None:
    files = runs_as_files(tmp_path)
    names: dict[str, Any] = {"columns": {"loss": "Value", "step": "Step"}, "run_name": f"run-{CALLED}-tag-loss_val"}
    assert losses(read_results(files, **names)) == losses(read("tb_long"))
    with pytest.raises(InputError, match=r"2 of run-n1-\S+csv, 3 of run-\S+ are .*, say --columns step=Step \(more"):
        read_results(files, {"loss": "Value"}, run_name=names["run_name"])
    with pytest.raises(InputError, match=r"loops, lr is missing; .* such as 'run-n1-\S+' say it: --run-name"):
        read_results(files, {"loss": "Value"})
    shutil.copy(files[0], tmp_path / "run-again.csv")
    with pytest.raises(
        InputError, match=r"row 2 of run-again.csv: the run 'run-again' .* with --where 'run!=run-again' \(more"
    ):
        read_results([*files, tmp_path / "run-again.csv"], **names)


def test_a_column_that_one_file_of_several_lacks_is_empty_there_and_not_nan(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("loops,lr,metrics.loss\n1,0.1,2\n")
    (tmp_path / "b.csv").write_text("loops,lr,val_loss\n2,0.1,2\n")
    with pytest.raises(InputError, match=r"row 2 of b.csv: loss is ''"):
        read_results([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_studies_are_judged_alone_and_nothing_not_at_all(tmp_path: Path) -> None:
    study = study_of(tmp_path / "study.db")
    with pytest.raises(InputError, match=r"#mine is a study, which is judged alone"):
        read_results([csv_file(tmp_path, "loops,lr,loss\n1,0.1,2\n"), f"{study}#mine"])
    with pytest.raises(InputError, match=r"^no source is given; give CSV"):
        read_results([])


# -- columns


def test_a_column_is_found_by_the_end_of_its_name_and_that_is_told(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "hparam/loops,optimizer.lr,params.seed,metrics.eval/loss\n1,0.1,7,2\n2,0.1,7,3\n")
    runs = read_results(path)
    assert runs["loss"].tolist() == [2.0, 3.0]
    assert set(runs["seed"]) == {"7"}
    told = "loops is hparam/loops, lr is optimizer.lr, loss is metrics.eval/loss, seed is params.seed"
    assert runs.attrs["left_out"] == told
    assert read_results(path, {"loss": "eval/loss"}).attrs["left_out"].startswith("loss is metrics.eval/loss, loops is")
    assert len(read_results(path, {"loss": "eval/loss"}, where=["metrics.eval/loss=3", "seed=7"])) == 1


def test_a_column_of_the_very_name_is_taken_before_others(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,loss,train/loss,metrics.lr\n1,0.1,2,9,0\n2,0.1,3,9,0\n")
    assert read_results(path)["loss"].tolist() == [2.0, 3.0]


def test_of_several_columns_none_is_taken_and_the_words_that_choose_are_told(tmp_path: Path) -> None:
    text = "loops,params.lr,metrics.lr,train/loss,eval/loss,params.wd,tags.wd\n1,0.1,0,2,3,0,0\n2,0.1,0,2,4,0,1\n"
    path = csv_file(tmp_path, text)
    with pytest.raises(InputError, match=r"write --columns lr=params.lr or --columns lr=metrics.lr \(more"):
        read_results(path)
    names = {"lr": "params.lr", "loss": "eval/loss"}
    with pytest.raises(InputError, match=r"mapped: --columns loss=train/loss or loss=eval/loss \(more"):
        read_results(path, {"lr": "params.lr"})
    with pytest.raises(InputError, match=r"write --where params.wd=0 or --where tags.wd=0 \(more"):
        read_results(path, names, where=["wd=0"])
    assert read_results(path, names)["loss"].tolist() == [3.0, 4.0]


def test_the_loss_is_not_guessed_where_another_column_could_be_it(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "loops,lr,train/loss,val_loss\n1,0.1,2,3\n")
    with pytest.raises(InputError, match=r"mapped: --columns loss=train/loss or loss=val_loss \(more"):
        read_results(path)


def test_what_is_missing_is_told_with_the_columns_that_may_be_meant(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "n_loops,lr,train_loss,val_loss\n1,0.1,2,3\n")
    with pytest.raises(InputError, match=r"mapped: --columns loops=n_loops loss=train_loss or loss=val_loss\. "):
        read_results(path)


# -- plots and long tables


def test_a_metric_that_is_not_named_is_never_guessed() -> None:
    with pytest.raises(InputError, match=r"is called loss; write --columns loss=val_loss \(more"):
        read("wandb_plot", columns={})
    for columns in ({}, {"loss": "value"}):
        with pytest.raises(InputError, match=r"write --columns loss=loss/train or loss=loss/val \(more"):
            read("tb_long", columns=columns)


def test_a_plot_without_names_that_tell_is_refused_with_the_fix() -> None:
    with pytest.raises(
        InputError, match=r"loops, lr is missing; .* 'n1-lr0.001752-s0' say it: --run-name .*table of runs"
    ):
        read("wandb_plot", run_name="")


def test_means_of_several_runs_are_no_runs(tmp_path: Path) -> None:
    header = "Step,lr: 0.1 - val_loss,lr: 0.1 - val_loss__MIN,lr: 0.1 - val_loss__MAX"
    with pytest.raises(InputError, match=r"^the points of 'lr: 0.1 - val_loss' are means of several runs or steps"):
        read_results(csv_file(tmp_path, f"{header}\n10,2.0,1.9,2.1\n"), {"loss": "val_loss"}, run_name="lr: {lr}")


def test_a_run_that_has_no_point_of_the_metric_is_a_run_without_a_result(tmp_path: Path) -> None:
    plot = csv_file(tmp_path, "Step,1/0.1 - loss,2/0.1 - loss,2/0.2 - loss\n5,2,3,\n9,1,2,\n")
    with pytest.raises(InputError, match=r"^row 2 \(2/0.2\): loss is ''"):
        read_results(plot, run_name="{loops}/{lr}")
    assert len(read_results(plot, run_name="{loops}/{lr}", where=["loss!="])) == 4
    long = csv_file(tmp_path, "run,tag,step,value\n1/0.1,loss,5,2\n2/0.1,loss,5,2\n2/0.2,accuracy,5,1\n")
    with pytest.raises(InputError, match=r"^row 4: loss is ''"):
        read_results(long, run_name="{loops}/{lr}")


# -- names of runs


def names_file(folder: Path, *names: str) -> Path:
    rows = [f"{name},{place % 2 + 1},{2 + place}" for place, name in enumerate(names)]
    return csv_file(folder, "\n".join(["tags.runName,loops,loss", *rows]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lr", r"^--run-name is 'lr'; write what runs are called, such as 'n\{loops\}-lr\{lr\}-s\{seed\}' \(more"),
        ("{lr}{lr}", "^--run-name is"),
        ("{1}", "^--run-name is"),
        ("{seed}-{lr}", r"fits the run 'a-1e-3' in two ways: seed a, lr 1e-3 or seed a-1e, lr 3; fix more"),
        ("x{lr}", r"fits none of the 2 runs, such as 'a-1e-3'; write \{loops\}"),
        ("b-{lr}", r"^row 2: the run 'a-1e-3' is not called as .* with --where 'run!=a-1e-3' \(more"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(tmp_path: Path, pattern: str, message: str) -> None:
    path = names_file(tmp_path, "a-1e-3", "b-1e-2")
    with pytest.raises(InputError, match=message):
        read_results(path, {"run": "tags.runName"}, run_name=pattern)


def test_what_a_name_says_stands_before_columns_and_runs_of_other_names_are_left_out_on_demand(tmp_path: Path) -> None:
    path = names_file(tmp_path, "may-n4-lr1e-3", "june-n8-lr1e-3", "baseline")
    runs = read_results(path, {"run": "runName"}, where=["run!=baseline"], run_name="{month}-n{loops}-lr{lr}")
    assert runs["loops"].tolist() == [4, 8]
    assert runs["lr"].tolist() == [1e-3] * 2
    assert runs["month"].tolist() == ["may", "june"]
