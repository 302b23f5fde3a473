import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from looptransfer import cli
from looptransfer.arguments import seeds_of
from looptransfer.cli import main
from looptransfer.transfer.results import COLUMNS
from looptransfer.trials import sweep as trials
from tests import experiments


def sweep_table(drift: float, seeds: int = 4) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {
            "rule": "factored",
            "loops": n,
            "lr": 2.0**x,
            "seed": s,
            "loss": 2 + 0.05 * (x + 6.5 - drift * np.log2(n)) ** 2 + shift,
        }
        for s in range(seeds)
        for shift in [rng.normal(0, 0.01)]
        for n in (1, 2, 4, 8)
        for x in np.arange(-10, -2.5, 0.5)
    ]
    return pd.DataFrame(rows).assign(loss=lambda t: t["loss"] + rng.normal(0, 0.001, len(t)))


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    sweep_table(0.0).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(("drift", "seeds", "status"), [(0.0, 4, 0), (0.6, 4, 1), (0.0, 1, 3)])
def test_exit_status_says_flat_drifts_or_inconclusive(tmp_path: Path, drift: float, seeds: int, status: int) -> None:
    path = tmp_path / "results.csv"
    sweep_table(drift, seeds).to_csv(path, index=False)
    assert main(["check", str(path)]) == status


def test_check_prints_json_with_a_schema_version(csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(csv), "--json"])
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["schema_version"] == 2
    assert np.log2(verdict["transferred_lr"]) == pytest.approx(-6.5, abs=0.05)


def test_check_writes_a_page_that_loads_nothing_and_escapes_names(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    sweep_table(0.0).assign(rule="<script>alert(1)</script>").to_csv(path, index=False)
    main(["check", str(path), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_check_reads_other_names_other_axes_and_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sweep_table(0.0)
    export = runs.rename(columns={"loops": "config.width", "lr": "config.lr"}).assign(accuracy=-runs["loss"])
    export.drop(columns="loss").to_csv(tmp_path / "export.csv", index=False)
    names = ["width=config.width", "lr=config.lr", "loss=accuracy"]
    assert main(["check", f"{tmp_path}/export.csv", "--columns", *names, "--axis", "width", "--maximize"]) == 0
    assert "octaves per doubling of width" in capsys.readouterr().out


def test_check_prints_markdown_for_the_summary_of_a_ci_run(csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(csv), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("### factored: FLAT")
    with pytest.raises(SystemExit):
        main(["check", str(csv), "--markdown", "--json"])


def test_a_reader_that_stops_reading_sees_no_traceback(csv: Path) -> None:
    command = f"{sys.executable} -m looptransfer check {csv} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert (done.stdout.strip() in ("0", "141"), done.stderr) == (True, "")


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_an_answer_that_cannot_be_printed_is_no_success(csv: Path, redirect: str) -> None:
    if redirect == ">/dev/full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    command = f"{sys.executable} -m looptransfer check {csv} {redirect}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("looptransfer: cannot print the answer: ")) == (2, True)


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    sweep_table(0.0).assign(rule=r"$\foo$").to_csv(tmp_path / "results.csv", index=False)
    assert main(["check", f"{tmp_path}/results.csv", "--html", f"{tmp_path}/page.html"]) == 0


def test_check_loads_no_torch(csv: Path) -> None:
    code = (
        f"import sys, looptransfer.cli as c; s = c.main(['check', {str(csv)!r}]); sys.exit(s or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.csv"], "cannot read no-such.csv"),
        (["{csv}", "--rule", "sqrt"], "rule 'sqrt' is not in the table"),
        (["{csv}", "--confidence", "1.5"], "confidence is 1.5"),
        (["{csv}", "--html", "{csv}"], "would overwrite the table"),
        (["{csv}", "--lr", "0"], "transferred_lr is 0.0"),
        (["{csv}", "--html", "/no/such/folder/page.html"], "cannot write /no/such/folder/page.html"),
        (["{csv}", "--columns", "lr"], "--columns 'lr'; write NAME=THERE, such as lr=config.lr"),
        (["{csv}", "--columns", "lr=eta"], "there is no column eta; there are rule, loops, lr, seed, loss"),
        (["{csv}", "--axis", "width"], "column width is missing"),
        (["sqlite:////no/such.db#study"], "cannot read sqlite:////no/such.db#study: there is no such file"),
    ],
)
def test_bad_input_to_check_ends_with_2_and_names_the_fault(
    csv: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["check", *(a.format(csv=csv) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "/proc/demo"], "cannot write into /proc/demo"),
        (["--seed", "-1"], "--seed is -1"),
        (["--text", "/no/such/text"], "cannot read the text at /no/such/text"),
    ],
)
def test_bad_input_to_demo_ends_with_2_and_names_the_fault(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bad_usage_ends_with_2() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2


@pytest.mark.parametrize("error", [KeyError("bug"), SystemExit(0), GeneratorExit(), BaseException()])
def test_anything_unexpected_ends_with_70(csv: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(table: pd.DataFrame) -> None:
        raise error

    monkeypatch.setattr("looptransfer.transfer.check.tidy", fail)
    assert main(["check", str(csv)]) == 70


# -- the user's code


ENDS = {"top level": "import os; os._exit(0)", "factory": "def experiment():\n    import os; os._exit(0)"}


@pytest.mark.slow
@pytest.mark.parametrize("text", ENDS.values(), ids=ENDS)
def test_a_process_that_the_users_code_ends_is_no_answer(tmp_path: Path, text: str) -> None:
    (tmp_path / "ending.py").write_text(text)
    words = ["sweep", "ending.py", "--loops", "1", "--lrs", "0.1", "-o", "results.csv"]
    command = [sys.executable, "-m", "looptransfer", *words]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("looptransfer: there is no answer: your code, or a library that it uses, ended its")


@pytest.mark.slow
def test_an_interrupt_ends_the_command_and_what_it_started(tmp_path: Path) -> None:
    text = "import os\nopen('started', 'w').write(str(os.getpid()))\nwhile True:\n    pass\n"
    (tmp_path / "endless.py").write_text(text)
    command = [sys.executable, "-m", "looptransfer", "coordcheck", "endless.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (130, INTERRUPTED)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "started").read_text()), 0)


INTERRUPTED = "looptransfer: interrupted; finished runs are kept, the same command goes on from there"


# -- tune and sweep

NAME = "trained_by_the_command_line"
QUICK = "--loops 1,2 --lrs 0.01,0.02 --seeds 2 --workers 1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with an experiment in a file: six steps by that name, thirty by the name `longer`."""
    text = Path(experiments.__file__).read_text()
    text += "\nexperiment = tiny_experiment(steps=6)\nlonger = tiny_experiment()\nnumber = 5\n"
    (tmp_path / f"{NAME}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop(NAME, None)


def run(command: str, arguments: str = "", name: str = "") -> int:
    return main([command, f"{NAME}.py{name}", *arguments.split()])


def table(path: str = "results.csv") -> pd.DataFrame:
    return pd.read_csv(path)


def losses(frame: pd.DataFrame) -> dict[tuple[Any, ...], float]:
    return frame.set_index(["rule", "loops", "lr", "seed"])["loss"].to_dict()


@pytest.mark.slow
def test_tune_then_sweep_then_more_seeds_then_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "--loops 2 --seeds 2 --workers 2 -o best.json", ":longer") == 0
    best, said = json.loads(Path("best.json").read_text()), capsys.readouterr().out
    assert said.startswith(f"best LR {'at' if best['log2_lr'] else 'run at'} N = 2: {best['lr']:.4g} ")
    assert f"next: looptransfer sweep {NAME}.py:longer --loops 1,2,4,8,16 --around best.json -o results.csv" in said
    assert (best["log2_lr"] is None) == (best["censored"] is not None)
    assert (best["seeds"], best["experiment"]["steps"]) == ([0, 1], 30)

    grid = "--loops 1,2 --around best.json --octaves=-2.25,-1.5,-0.75,0,0.75,1.5 --rules factored,unscaled --workers 2"
    assert run("sweep", f"{grid} --seeds 2 -o results.csv", ":longer") == 0
    said, first = capsys.readouterr(), Path("results.csv").read_text()
    assert "warning" not in said.err
    assert "runs written to results.csv: 48\nnext: looptransfer check results.csv" in said.out
    assert list(table().columns) == COLUMNS

    assert run("sweep", f"{grid} --seeds 1-3 --append results.csv", ":longer") == 0
    assert "runs written to results.csv: 48" in capsys.readouterr().out
    assert Path("results.csv").read_text().startswith(first)
    assert table().groupby(["rule", "loops", "lr"])["seed"].agg(sorted).map(lambda seeds: seeds == [0, 1, 2, 3]).all()

    assert main(["check", "results.csv"]) in (0, 1, 3)
    assert sorted(path.name for path in folder.glob("*.*")) == sorted(
        [f"{NAME}.py", "best.json", "looptransfer.db", "results.csv"]
    )


def test_a_sweep_of_which_a_run_fails_writes_the_table_of_the_others_and_who_joins_or_appends_makes_what_lacks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(f"{NAME}.py").read_text()
    Path(f"{NAME}.py").write_text(
        text + "import os\nexperiment = tiny_experiment(os.environ.get('BROKEN') and 2, steps=6)\n"
    )
    grid = "--loops 1,2 --lrs 0.01,0.02 --seeds 3 --workers 1 --ledger runs.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROKEN", "1")
        assert run("sweep", f"{grid} -o results.csv") == 2
    said = capsys.readouterr().err
    assert "4 of 12 runs are missing" in said
    assert "The 8 others are in results.csv; --append results.csv adds what lacks" in said
    assert len(table()) == 8
    assert main(["check", "runs.db"]) == 3
    assert "4 of 12 runs that were asked for are not finished" in capsys.readouterr().out
    sys.modules.pop(NAME)
    assert main(["work", "--storage", "runs.db", "sweep", "--workers", "1"]) == 0
    assert capsys.readouterr().out == "sweep: 12 runs are finished, and none is left to make\n"
    assert run("sweep", f"{grid} --append results.csv") == 0
    assert len(table()) == 12


def test_who_joins_a_study_that_is_not_there_is_told_and_makes_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", "--loops 1 --lrs 0.01 --seeds 2 --workers 1 --ledger runs.db -o results.csv") == 0
    assert main(["work", "--storage", "runs.db", "widths"]) == 2
    assert "runs.db has no study 'widths'; it has 'sweep'" in capsys.readouterr().err
    assert main(["work", "--storage", "none.db", "sweep"]) == 2
    assert "there is no ledger" in capsys.readouterr().err
    assert not Path("none.db").exists()


def test_a_sweep_shows_mean_losses_and_marks_the_lowest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sweep", "--loops 1,2 --lrs 0.01,0.02,1e9 --seeds 2 --workers 1 -o results.csv") == 0
    said = capsys.readouterr().out.splitlines()
    mean = table().groupby(["loops", "lr"])["loss"].mean()
    assert said[0] == "rule factored: mean loss in nats, seeds: 2, * marks the lowest of each N"
    assert said[1].split() == ["LR", "N", "=", "1", "N", "=", "2"]
    cells = {float(line.split()[0]): line.split()[1:] for line in said[2:5]}
    for place, count in enumerate([1, 2]):
        assert [float(row[place].strip("*")) for row in cells.values()] == pytest.approx(list(mean[count]), abs=1e-4)
        assert [lr for lr, row in cells.items() if row[place].endswith("*")] == [mean[count].idxmin()]


def test_appending_keeps_what_is_there_and_makes_only_what_lacks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", f"{QUICK} -o results.csv") == 0
    text = Path("results.csv").read_text()
    edited = text.replace("0.01,", "0.010000001,").rstrip("\n").replace("\n", "\r\n")
    Path("results.csv").write_bytes(edited.encode("utf-8-sig"))
    changes = "--loops 1,2 --lrs 0.01,0.02 --seeds 1,2 --workers 1"
    assert run("sweep", f"{changes} --append results.csv --ledger other.db") == 0
    assert "runs written to results.csv: 4\n" in capsys.readouterr().out
    assert Path("results.csv").read_text().startswith(edited.replace("\r\n", "\n") + "\n")
    assert sorted(set(table()["lr"])) == [0.010000001, 0.02]
    assert len(losses(table())) == len(table()) == 12
    assert run("sweep", f"{changes} --append results.csv --ledger other.db") == 0
    assert "runs written to results.csv: 0\n" in capsys.readouterr().out
    assert len(table()) == 12


def test_runs_that_another_sweep_added_in_the_meantime_stay_and_are_not_doubled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("sweep", f"{QUICK} -o results.csv") == 0
    before = Path("results.csv").read_text()
    assert run("sweep", f"{QUICK} --append results.csv --seeds 3") == 0
    both = Path("results.csv").read_text()
    Path("results.csv").write_text(before)

    made = trials.sweep

    def slow_sweep(*arguments: Any, **named: Any) -> pd.DataFrame:
        frame = made(*arguments, **named)
        Path("results.csv").write_text(both)
        return frame

    monkeypatch.setattr(trials, "sweep", slow_sweep)
    assert run("sweep", "--loops 1,2 --lrs 0.01,0.02 --seeds 4 --workers 1 --append results.csv") == 0
    assert Path("results.csv").read_text().startswith(both)
    assert len(losses(table())) == len(table()) == 16


def test_a_sweep_of_which_every_run_diverges_is_no_success_and_its_table_is_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", "--loops 1,2 --lrs 1e8,1e9 --seeds 2 --workers 1 -o results.csv") == 2
    said = capsys.readouterr()
    assert (said.out, "all 8 runs, now in results.csv, diverged" in said.err) == ("", True)
    assert len(table()) == 8


def test_a_file_that_changes_the_working_directory_changes_nothing_of_where_results_go(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "elsewhere").mkdir()
    path = folder / f"{NAME}.py"
    path.write_text(f"import os\nos.chdir('elsewhere')\n{path.read_text()}")
    assert run("sweep", f"{QUICK} -o results.csv") == 0
    assert not list((folder / "elsewhere").iterdir())
    assert {path.name for path in folder.glob("*.*")} == {f"{NAME}.py", "looptransfer.db", "results.csv"}


def test_what_the_users_code_prints_is_no_part_of_the_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / f"{NAME}.py"
    path.write_text(f"print('HOLDS')\n{path.read_text()}")
    assert run("coordcheck", "--loops 1,2 --steps 1 --seeds 2 --json") in (0, 1, 3)
    said = capsys.readouterr()
    assert json.loads(said.out)["schema_version"] == 1
    assert "HOLDS\n" in said.err


def test_the_centre_may_be_a_number_and_octaves_are_distances_from_it(folder: Path) -> None:
    assert run("sweep", "--loops 1 --around 0.02 --octaves=-1,0 --seeds 5-5 --workers 1 -o results.csv") == 0
    assert table()[["lr", "seed"]].to_numpy().tolist() == [[0.01, 5], [0.02, 5]]


@pytest.mark.parametrize(
    ("text", "seeds"), [("4", 4), ("0-3", [0, 1, 2, 3]), ("0,2,5", [0, 2, 5]), ("7-7", [7]), ("0-1,9", [0, 1, 9])]
)
def test_seeds_are_a_count_a_range_or_a_list(text: str, seeds: Any) -> None:
    assert seeds_of(text) == seeds


def test_an_lr_that_was_tuned_on_another_experiment_is_used_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = experiments.tiny_experiment(steps=7).identity()
    record = {"schema_version": 1, "lr": 0.03, "loops": 1, "experiment": {**identity, "\x1b[31m\n::error::x": 1}}
    Path("best.json").write_text(json.dumps(record))
    assert run("sweep", "--loops 1 --around best.json --octaves=0 --seeds 1 --workers 1 -o results.csv") == 0
    said = capsys.readouterr().err
    assert "warning: best.json was tuned on another experiment (" in said
    assert "steps: 7 there, 6 here" in said
    assert not {"\x1b", "::"} & set(re.findall(r"\x1b|::", said))
    assert table()["lr"].tolist() == [0.03]


def test_tune_without_a_file_gives_the_lr_to_the_next_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "--loops 1 --seeds 0,3 --workers 1 --rule sqrt --ledger own.db") == 0
    said = capsys.readouterr().out
    assert re.search(r"next: looptransfer sweep .* --around 0\.\d+ -o results.csv --ledger own.db", said)
    assert not list(folder.glob("*.json"))


SWEEP = "sweep --loops 1 --lrs 0.01 --workers 1 -o new.csv"
TUNE = "tune --loops 1 --workers 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{TUNE} --seeds 1", "seeds is 1; give two or more"),
        (f"{TUNE} --seeds x", "--seeds is 'x'; write how many"),
        (f"{TUNE} --rule cube", "rule is 'cube'; choose one of"),
        (f"{TUNE} --loops 0", "loops is 0; loop counts are"),
        (f"{TUNE} --workers 0", "workers is 0; it must be 1 or more"),
        (f"{TUNE} --ledger /proc/no/ledger.db", "cannot write the ledger /proc/no/ledger.db"),
        (f"{TUNE} -o there.csv", "there.csv exists already; choose another file"),
        (f"{TUNE} -o no/such/best.json", "no/such/best.json: No such file or directory; choose a file in a folder"),
        (f"{TUNE} -o {cli.LEDGER}", "looptransfer.db is the ledger; choose another file"),
        (f"{SWEEP} --loops 1,x", "--loops is '1,x'; write whole numbers separated by commas, such as 1,2,4"),
        (f"{SWEEP} --loops 1,", "--loops is '1,'"),
        (f"{SWEEP} --loops 1.5", "--loops is '1.5'"),
        (f"{SWEEP} --loops 0,1", "loops is 0"),
        (f"{SWEEP} --loops 1,1", "loops is [1, 1]"),
        (f"{SWEEP} --seeds 0-", "--seeds is '0-'"),
        (f"{SWEEP} --seeds 3-0", "--seeds is '3-0'"),
        (f"{SWEEP} --seeds -1", "--seeds is '-1'"),
        (f"{SWEEP} --seeds 0,,2", "--seeds is '0,,2'"),
        (f"{SWEEP} --seeds 0", "seeds is 0"),
        (f"{SWEEP} --seeds 2,2", "seeds is [2, 2]"),
        (f"{SWEEP} --seeds 20240101", "--seeds is '20240101'; write how many, up to 1000, or which ones"),
        (f"{SWEEP} --seeds 0-999999999", "--seeds is '0-999999999'"),
        (f"{SWEEP} --rules factored,cube", "rule is 'cube'"),
        (f"{SWEEP} --lrs 0.1,abc", "--lrs is '0.1,abc'; write numbers separated by commas, such as 0.001,0.002"),
        (f"{SWEEP} --lrs 0.1,0", "lrs is [0.1, 0.0]"),
        (f"{SWEEP} --lrs 0.1,0.1", "lrs is [0.1, 0.1]"),
        (f"{SWEEP} --lrs nan", "lrs is [nan]"),
        (f"{SWEEP} --octaves=0", "--octaves are distances from --around; with --lrs"),
        (f"{SWEEP} --workers -3", "workers is -3"),
        (f"{SWEEP} -o there.csv", "there.csv exists already; choose another file"),
        (f"{SWEEP} -o .", ". exists already"),
        (f"{SWEEP} -o /proc/new.csv", "cannot write /proc/new.csv: "),
        (f"{SWEEP} -o {cli.LEDGER}", "looptransfer.db is the ledger"),
        ("sweep --loops 1 --around 0 -o new.csv", "around is 0.0; the LR must be a finite number above 0"),
        ("sweep --loops 1 --around inf -o new.csv", "around is inf"),
        ("sweep --loops 1 --around none.json -o new.csv", "none.json: No such file"),
        ("sweep --loops 1 --around there.csv -o new.csv", "there.csv is not JSON"),
        ("sweep --loops 1 --around verdict.json -o new.csv", "verdict.json holds no tuned LR"),
        ("sweep --loops 1 --around other.json -o new.csv", "other.json has schema_version 2, not 1"),
        ("sweep --loops 1 --around 0.1 --octaves=1,x -o new.csv", "--octaves is '1,x'"),
        ("sweep --loops 1 --around 0.1 --octaves=1,1 -o new.csv", "octaves is [1.0, 1.0]"),
        ("sweep --loops 1 --lrs 0.1 --append none.csv", "cannot read none.csv: No such file"),
        ("sweep --loops 1 --lrs 0.1 --append .", "cannot read .: Is a directory"),
        (
            "sweep --loops 1 --lrs 0.1 --append there.csv",
            "there.csv has other columns, 'loops,lr,loss'; --append needs",
        ),
        ("sweep --loops 1 --lrs 0.1 --append empty.csv", "empty.csv has other columns, ''"),
        ("sweep --loops 1 --lrs 0.1 --append binary.csv", "cannot read binary.csv: it is no CSV"),
        ("sweep --loops 1 --lrs 0.1 --append short.csv", "short.csv, line 2 is no run"),
        ("sweep --loops 1 --lrs 0.1 --append word.csv", "word.csv, line 3 is no run"),
    ],
)
def test_bad_input_to_tune_and_sweep_ends_with_2_and_names_the_fault(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    header = ",".join(COLUMNS)
    Path("there.csv").write_text("loops,lr,loss\n1,0.1,2\n")
    Path("verdict.json").write_text('{"schema_version": 1, "transferred_lr": 0.1}')
    Path("other.json").write_text('{"schema_version": 2, "lr": 0.1, "loops": 1, "experiment": {}}')
    Path("empty.csv").touch()
    Path("binary.csv").write_bytes(b"\xff\x00\xfe")
    Path("short.csv").write_text(f"{header}\nfactored,1,1\n")
    Path("word.csv").write_text(f"{header}\n\nfactored,1,one,,0.1,0,6,2.0,False,1.0\n")
    command, *rest = arguments.split()
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    assert run(command, " ".join(rest)) == 2
    assert message in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("command", ["tune --loops 1", "sweep --loops 1 --lrs 0.1 -o new.csv"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("none.py", "there is no file none.py"),
        (f"{NAME}.py:none", "has no attribute 'none'; give a name that is in it"),
        (f"{NAME}.py:number", "is of type int"),
        (f"{NAME}.py:LoopedMLP", "missing 1 required positional argument"),
        ("raises_at_once.py", "ValueError: broken ("),
        ("no_such_module_here:x", "ModuleNotFoundError"),
    ],
)
def test_an_experiment_that_cannot_be_had_ends_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, target: str, message: str
) -> None:
    Path("raises_at_once.py").write_text("raise ValueError('broken')\n")
    name, *rest = command.split()
    assert main([name, target, *rest]) == 2
    assert message in capsys.readouterr().err
    assert not Path(cli.LEDGER).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "tune x.py",
        "tune x.py --loops two",
        "tune x.py --loops 2 --workers many",
        "sweep x.py --loops 1 --lrs 0.1",
        "sweep x.py --loops 1 -o new.csv",
        "sweep x.py --lrs 0.1 -o new.csv",
        "sweep x.py --loops 1 --lrs 0.1 --around 0.1 -o new.csv",
        "sweep x.py --loops 1 --lrs 0.1 -o new.csv --append old.csv",
    ],
)
def test_options_that_lack_or_exclude_each_other_end_with_2(arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["tune", "sweep"])
def test_help_loads_neither_torch_nor_pandas(command: str) -> None:
    code = f"import sys, looptransfer.cli as c\ntry: c.main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"looptransfer {command} experiment.py --loops" in done.stdout


def test_defaults_in_the_help_are_those_of_the_functions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert ",".join(f"{octave:g}" for octave in trials.OCTAVES) in capsys.readouterr().out
    assert trials.LEDGER == cli.LEDGER
