import json
import os
import re
import shlex
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

from looptransfer.command import options
from looptransfer.command.cli import main
from looptransfer.transfer.results import COLUMNS
from looptransfer.trials import sweep as trials
from tests import bad_tables, experiments
from tests.bad_tables import TEXT


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    path.write_text(TEXT)
    return path


def test_the_exit_status_says_flat_drifts_or_inconclusive(csv: Path) -> None:
    moved = bad_tables.sweep().assign(lr=lambda table: table["lr"] * 2.0 ** (0.6 * np.log2(table["loops"])))
    moved.to_csv(csv.parent / "moved.csv", index=False)
    bad_tables.sweep(seeds=1).to_csv(csv.parent / "one.csv", index=False)
    names = ("results.csv", "moved.csv", "one.csv")
    assert [main(["check", str(csv.parent / name)]) for name in names] == [0, 1, 3]


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


def test_check_loads_no_torch(csv: Path) -> None:
    code = "import sys, looptransfer.command.cli as c; s = c.main(sys.argv[1:]); sys.exit(s or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "check", csv], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("check {csv} --html /no/such/folder/page.html", "cannot write /no/such/folder/page.html"),
        ("demo --out /proc/demo", "cannot write into /proc/demo"),
        ("demo --seed -1", "--seed is -1"),
        ("demo --text /no/such/text", "cannot read the text at /no/such/text"),
    ],
)
def test_bad_input_ends_with_2_and_names_the_fault(
    csv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    monkeypatch.chdir(csv.parent)
    assert main(arguments.format(csv=csv).split()) == 2
    assert message in capsys.readouterr().err


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
    assert said.startswith(f"best LR at N = 2: {best['lr']:.4g} [")
    assert f"next: looptransfer sweep {NAME}.py:longer --loops 1,2,4,8,16 --around best.json -o results.csv" in said
    assert best["log2_lr"][0] <= best["log2_lr"][1]
    assert (best["seeds"], best["experiment"]["steps"]) == ([0, 1], 30)

    grid = "--loops 1,2 --around best.json --octaves=-2.25,-1.5,-0.75,0,0.75,1.5 --rules factored,unscaled --workers 2"
    assert run("sweep", f"{grid} --seeds 2 -o results.csv", ":longer") == 0
    said, first = capsys.readouterr(), Path("results.csv").read_text()
    assert "warning" not in said.err
    assert f"runs written to results.csv: 48\nnext: looptransfer check results.csv --lr {best['lr']:.6g}" in said.out
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
    assert options.seeds_of(text) == seeds


def test_an_lr_that_was_tuned_on_another_experiment_is_used_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = experiments.tiny_experiment(steps=7).identity()
    record = {"schema_version": 2, "lr": 0.03, "loops": 1, "experiment": {**identity, "\x1b[31m\n::error::x": 1}}
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
    assert re.search(r"next: looptransfer sweep .* --around 0\.\d+ -o results.csv --rules sqrt --ledger own.db", said)
    assert not list(folder.glob("*.json"))


def test_the_rule_that_was_tuned_and_swept_is_the_one_that_the_next_command_judges(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("tune", "--loops 1 --seeds 0,3 --workers 1 --rule completep -o best.json") == 0
    grid = "--loops 1,2 --around best.json --octaves=0 --seeds 1 --workers 1"
    capsys.readouterr()
    assert run("sweep", f"{grid} --rules completep,factored -o both.csv") == 0
    said = capsys.readouterr()
    assert "warning" not in said.err
    assert "next: looptransfer check both.csv --rule completep --lr 0." in said.out
    assert run("sweep", f"{grid} -o factored.csv") == 0
    said = capsys.readouterr()
    warning = "warning: best.json was tuned under the rule completep, which is none of --rules factored"
    assert warning in said.err
    assert "next: looptransfer check factored.csv --lr 0." in said.out


SWEEP = "sweep --loops 1 --lrs 0.01 --workers 1 -o new.csv"
TUNE = "tune --loops 1 --workers 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{TUNE} --seeds 1", "seeds is 1; give 2 or more"),
        (f"{TUNE} --seeds x", "--seeds is 'x'; write how many"),
        (f"{TUNE} --rule cube", "rule is 'cube'; choose one of"),
        (f"{TUNE} --loops 0", "loops is 0; it must be a whole number"),
        (f"{TUNE} --workers 0", "workers is 0; it must be a whole number from 1 up"),
        (f"{TUNE} --ledger /proc/no/ledger.db", "cannot write the ledger /proc/no/ledger.db"),
        (f"{TUNE} -o there.csv", "there.csv exists already; choose another file"),
        (f"{TUNE} -o no/such/best.json", "no/such/best.json: No such file or directory; choose a file in a folder"),
        (f"{TUNE} -o {options.LEDGER}", "looptransfer.db is the ledger; choose another file"),
        (f"{SWEEP} --loops 1,x", "--loops is '1,x'; write whole numbers separated by commas, such as 1,2,4"),
        (f"{SWEEP} --loops 1,", "--loops is '1,'"),
        (f"{SWEEP} --loops 1.5", "--loops is '1.5'"),
        (f"{SWEEP} --loops 0,1", "loops is [0, 1]"),
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
        (f"{SWEEP} -o {options.LEDGER}", "looptransfer.db is the ledger"),
        ("sweep --loops 1 --around 0 -o new.csv", "around is 0.0; the LR must be a finite number above 0"),
        ("sweep --loops 1 --around inf -o new.csv", "around is inf"),
        ("sweep --loops 1 --around none.json -o new.csv", "none.json: No such file"),
        ("sweep --loops 1 --around there.csv -o new.csv", "there.csv is not JSON"),
        ("sweep --loops 1 --around verdict.json -o new.csv", "verdict.json holds no tuned LR"),
        ("sweep --loops 1 --around other.json -o new.csv", "other.json has schema_version 1, not 2"),
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
    Path("other.json").write_text('{"schema_version": 1, "lr": 0.1, "loops": 1, "experiment": {}}')
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
    assert not Path(options.LEDGER).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "nonsense",
        "check runs.csv --markdown --json",
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


TOY = """
import json, math, random, sys
lr, loops, seed, rule, folder = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
noise = random.Random(seed).gauss(0, 0.02)
loss = 2 + 0.05 * (math.log2(lr) + 8 + (rule == "unscaled") * math.log2(loops) + noise) ** 2 + 0.01 * math.log2(loops)
if seed == 9:
    sys.exit("seed 9 is broken")
with open(f"{folder}/log.csv", "w") as log:
    log.write(f"step,loss\\n1,5\\n2,{loss}\\n")
"""
CMD = f"{sys.executable} toy.py {{lr}} {{loops}} {{seed}} {{rule}} {{dir}}"
BY_COMMAND = ["--cmd", CMD, "--metric", "{dir}/log.csv:loss"]


@pytest.fixture
def toy(folder: Path) -> Path:
    (folder / "toy.py").write_text(TOY)
    return folder


@pytest.mark.slow
def test_a_command_goes_from_tune_to_a_verdict(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *BY_COMMAND, *shlex.split("--loops 2 --seeds 2 --workers 2 -o best.json --retries 1")]) == 0
    said = capsys.readouterr()
    assert "report equal losses: seeds pair the runs" in said.err
    best = json.loads(Path("best.json").read_text())
    assert np.log2(best["lr"]) == pytest.approx(-8, abs=0.2)
    assert best["experiment"]["command"] == CMD
    follow = shlex.split(said.out.partition("next: looptransfer ")[2])
    expected = [*BY_COMMAND, *shlex.split("--retries 1 --loops 1,2,4,8,16 --around best.json -o results.csv")]
    assert follow == ["sweep", *expected]
    grid = "--loops 1,4 --around best.json --octaves=-4,-2,0,2 --seeds 2 --rules factored,unscaled --workers 2"
    assert main(["sweep", *BY_COMMAND, *f"{grid} -o results.csv".split()]) == 0
    assert "warning" not in capsys.readouterr().err
    assert list(table().columns) == COLUMNS
    assert main(["check", "results.csv"]) == 0
    optima = ["check", "results.csv", "--baseline", "o.json", "--update-baseline"]
    assert main(optima) == 0
    assert main(["gate", *BY_COMMAND, *shlex.split("--baseline o.json --seeds 2 --workers 2")]) in (0, 3)


def test_a_training_function_in_a_file_is_tuned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "def train(run):\n    return 2 + (run.lr - 0.01) ** 2 + 1e-3 * run.seed + 1e-3 * run.loops\n"
    (folder / f"{NAME}.py").write_text(text)
    assert run("sweep", "--loops 1,2 --lrs 0.005,0.01,0.02 --seeds 2 --workers 1 -o results.csv", ":train") == 0
    assert len(table()) == 12


def test_a_command_that_fails_ends_with_2_and_the_end_of_its_log(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["sweep", *BY_COMMAND, *shlex.split("--loops 2 --lrs 0.01 --seeds 0,9 --workers 1 -o results.csv")]) == 2
    )
    told = capsys.readouterr().err
    assert "ended with exit status 1; the end of" in told
    assert "\n  | seed 9 is broken" in told
    assert Path(re.findall(r"the end of (\S+):", told)[0]).read_text() == "seed 9 is broken\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either EXPERIMENT, such as experiment.py, or --cmd with --metric"),
        (["x.py", *BY_COMMAND], "give either EXPERIMENT"),
        (["--cmd", CMD], "--cmd needs --metric, where the loss is, such as '{dir}/log.jsonl:val_loss'"),
        (["x.py", "--metric", "{dir}/a:b"], "--metric is for --cmd"),
        (["x.py", "--retries", "2"], "--retries is for --cmd"),
        ([*BY_COMMAND, "--env", "NAME"], "--env 'NAME'; write NAME=VALUE"),
        ([*BY_COMMAND, "--retries", "-1"], "retries is -1; it must be a whole number from 0 up"),
        ([*BY_COMMAND, "--devices", "all"], "devices is 'all', and torch sees no GPU"),
        (["--cmd", "x {lr}", "--metric", "{dir}/a:b"], "lacks {loops}"),
        (["--cmd", f"{CMD} {{width}}", "--metric", "{dir}/a:b"], "holds {width}, which is no placeholder"),
    ],
)
def test_a_training_that_is_not_given_rightly_ends_with_2(
    toy: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["tune", *words, "--loops", "2"]) == 2
    assert message in capsys.readouterr().err
    assert not Path(options.LEDGER).exists()


def test_a_sweep_over_rules_that_do_not_reach_the_command_ends_with_2(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cmd", CMD.replace("{rule}", "factored"), "--metric", "{dir}/log.csv:loss", "--loops", "1,2"]
    assert main(["sweep", *words, "--lrs", "0.1", "--rules", "factored,sqrt", "-o", "results.csv"]) == 2
    assert "does not use {rule}, so that factored, sqrt would train the same" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tune", "sweep", "gate"])
def test_the_help_shows_the_lines_that_rewrite_a_script(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    assert "import looptransfer as lt" in told
    assert "lt.parametrize(model, example_batch, args.rule)" in told
    assert "lt.param_groups(model, AdamW, lr=args.lr)" in told


@pytest.mark.parametrize("command", ["tune", "sweep"])
def test_help_loads_neither_torch_nor_pandas(command: str) -> None:
    code = f"import sys, looptransfer.command.cli as c\ntry: c.main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"looptransfer {command} experiment.py --loops" in done.stdout


def test_defaults_in_the_help_are_those_of_the_functions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert ",".join(f"{octave:g}" for octave in trials.OCTAVES) in capsys.readouterr().out
    assert trials.LEDGER == options.LEDGER
