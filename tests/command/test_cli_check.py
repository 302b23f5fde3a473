"""The edges of `check`: where its table comes from, what it writes and shows, and that no gate passes unchecked."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from looptransfer.command.cli import main
from looptransfer.transfer.baseline import Baseline
from looptransfer.transfer.provenance import code_version
from looptransfer.transfer.sources import read_results
from tests.bad_tables import TEXT, study, sweep

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a table that is FLAT."""
    monkeypatch.chdir(tmp_path)
    Path("runs.csv").write_text(TEXT)
    return tmp_path


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "looptransfer", *arguments], check=False, capture_output=True, **options
    )


# -- sources


def test_pipes_and_standard_input_are_read_as_the_file_is(folder: Path, capsys: Capture) -> None:
    assert main(["check", "runs.csv", "--json"]) == 0
    whole = capsys.readouterr().out
    substituted = f"{sys.executable} -m looptransfer check <(cat runs.csv) --json"
    for done in (
        run("check", "-", "--json", input=TEXT.encode()),
        run("check", "/dev/stdin", "--json", input=TEXT.encode()),
        subprocess.run(["bash", "-c", substituted], check=False, capture_output=True),
    ):
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads(done.stdout) == json.loads(whole)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("csv", ".csv"),
        ("json lines", ".jsonl"),
        ("json lines", ".log"),
        ("json array", ".json"),
        ("parquet", ".parquet"),
    ],
)
def test_every_format_gives_every_row_and_every_digit(tmp_path: Path, name: str, suffix: str) -> None:
    lrs = ["0.00029999999999999997", "0.0010000000000000000208"]
    table = sweep().assign(seed=lambda t: 12345678901234567890 + t["seed"].astype(object), note=',"x"')
    table["lr"] = np.where(table["loops"] == 1, *map(float, lrs)) * table.groupby(["loops", "seed"]).cumcount().add(1)
    path = tmp_path / f"runs{suffix}"
    if name == "csv":
        table.to_csv(path, index=False)
    elif name == "parquet":
        pytest.importorskip("pyarrow")
        table.assign(seed=table["seed"].map(str)).to_parquet(path)
    elif name == "json array":
        path.write_text(json.dumps(table.to_dict("records"), indent=2))
    else:
        path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")))
    runs = read_results(path)
    assert len(runs) == len(table)
    assert runs["lr"].tolist() == table["lr"].tolist()
    assert runs["loss"].tolist() == table["loss"].tolist()
    assert runs["seed"].tolist() == [str(seed) for seed in table["seed"]]
    assert set(runs["note"]) == {',"x"'}


def test_harmless_ways_of_writing_a_table_change_nothing(tmp_path: Path) -> None:
    whole = read_results(csv(tmp_path, TEXT))
    lines = TEXT.splitlines()
    for text in (
        "\ufeff" + TEXT,
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r"),
        TEXT.rstrip("\n"),
        TEXT.replace(",", " , "),
        "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in lines),
        "\n".join(f"{line}," for line in lines),
        "\n".join(f"{number if number else ''},{line}" for number, line in enumerate(lines)),
        TEXT + ",,,,\n\n",
    ):
        pd.testing.assert_frame_equal(read_results(csv(tmp_path, text)), whole)


def csv(folder: Path, text: str) -> Path:
    (folder / "table.csv").write_bytes(text.encode())
    return folder / "table.csv"


def tracked() -> pd.DataFrame:
    """A sweep as a tracker has it: 63 runs, of which two crashed with a loss that is too high, and two still run."""
    runs = sweep().drop(columns="rule").assign(state="finished", user="ada@example.com", tags="['secret-project']")
    runs.loc[[3, 10], ["loss", "state"]] = [[9.0, "crashed"]] * 2
    runs.loc[[20, 30], "state"] = "running"
    runs["loss"] = runs["loss"].astype(object)
    runs.loc[[20, 30], "loss"] = ""
    return runs


EXPORTS: dict[str, tuple[dict[str, str], dict[str, str], list[str]]] = {
    "W&B": (
        {"loops": "n_loops", "loss": "val_loss", "state": "State", "user": "User"},
        {},
        ["--columns", "loops=n_loops", "loss=val_loss", "--where", "State=finished"],
    ),
    "MLflow": (
        {**{name: f"params.{name}" for name in ("loops", "lr", "seed")}, "loss": "metrics.val_loss", "state": "status"},
        {"finished": "FINISHED", "crashed": "FAILED", "running": "RUNNING"},
        [
            *("--columns", "loops=params.loops", "lr=params.lr", "seed=params.seed", "loss=metrics.val_loss"),
            *("--where", "status=FINISHED"),
        ],
    ),
    "TensorBoard": (
        {"loss": "loss/val_loss", "state": "Status", "user": "trial_id"},
        {"finished": "STATUS_SUCCESS", "crashed": "STATUS_FAILURE", "running": "STATUS_RUNNING"},
        ["--columns", "loss=loss/val_loss", "--where", "Status=STATUS_SUCCESS"],
    ),
}


@pytest.mark.parametrize("tracker", EXPORTS)
def test_the_runs_table_of_a_tracker_needs_one_command(folder: Path, capsys: Capture, tracker: str) -> None:
    names, states, options = EXPORTS[tracker]
    export = tracked().replace({"state": states}).rename(columns=names)
    export.to_csv("export.csv", index=False)
    columns = options[: options.index("--where")]
    assert main(["check", "export.csv", *columns]) == 2
    error = capsys.readouterr().err
    assert "a run without a result, as in 4 of 63 rows" in error
    assert f"--where {names['state']}=" in error
    assert main(["check", "export.csv", *options]) in (0, 3)
    assert "4 of 63 rows are left out" in capsys.readouterr().out
    lost = f"{names['state']}={states.get('crashed', 'crashed')}"
    assert main(["check", "export.csv", *columns, "--diverged", lost, "--where", "loss!="]) in (0, 3)
    assert "61 rows, 2 of them diverged" in capsys.readouterr().out


def test_who_and_where_stay_out_of_the_page_and_of_the_baseline(folder: Path) -> None:
    runs = sweep().assign(
        State="finished", User="ada@example.com", Tags="['secret-project']", Hostname="ws-7", layers=3
    )
    runs.to_csv("export.csv", index=False)
    assert main(["check", "export.csv", "--baseline", "b.json", "--update-baseline", "--html", "page.html"]) == 0
    written = Path("b.json").read_text() + Path("page.html").read_text()
    assert not [word for word in ("ada", "secret-project", "ws-7", "finished") if word in written]
    assert Baseline.read("b.json").fingerprint["layers"] == "3"


def test_values_are_compared_as_numbers_where_they_are_numbers(folder: Path, capsys: Capture) -> None:
    grid = pd.concat([sweep().assign(weight_decay=decay) for decay in ("0.10", "0.2")])
    grid.to_csv("grid.csv", index=False)
    assert main(["check", "grid.csv", "--where", "weight_decay=0.1", "loops=1,2,4"]) == 0
    assert "63 of 126 rows are left out by --where weight_decay=0.1" in capsys.readouterr().out
    assert main(["check", "grid.csv", "--where", "weight_decay!=0.1"]) == 0


# -- studies


def test_the_direction_of_a_study_is_read(folder: Path, capsys: Capture) -> None:
    more_is_better = sweep().assign(loss=lambda table: -table["loss"])
    path = study(folder, trials=more_is_better, direction="maximize")
    assert main(["check", str(path)]) == 0
    assert "of the metric" in capsys.readouterr().out
    assert main(["check", str(path), "--maximize"]) == 0


def test_trials_that_were_pruned_are_left_out_and_told_or_count_as_diverged(folder: Path, capsys: Capture) -> None:
    trials = sweep().assign(state=lambda table: np.where(table["lr"] > 2**-6.5, "PRUNED", "COMPLETE"))
    path = study(folder, trials=trials)
    assert main(["check", str(path)]) == 0
    assert "9 trials that failed, were pruned or still run are left out" in capsys.readouterr().out
    assert main(["check", str(path), "--diverged", "state=PRUNED"]) == 0
    assert "63 rows, 9 of them diverged" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_database_is_only_read(folder: Path, mode: str) -> None:
    import sqlite3  # noqa: PLC0415

    path = study(folder)
    database = sqlite3.connect(path)
    database.execute(f"pragma journal_mode={mode}")
    database.close()
    songs = folder / "songs.db"
    database = sqlite3.connect(songs)
    database.execute("create table songs (title text)")
    database.close()
    os.utime(path, (1, 1))
    os.utime(songs, (1, 1))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime) for path in folder.iterdir()}
    assert main(["check", str(path)]) == 0
    assert main(["check", f"sqlite:///{path}#sweep"]) == 0
    assert main(["check", str(songs)]) == 2
    assert {path.name: (path.read_bytes(), path.stat().st_mtime) for path in folder.iterdir()} == before


KILLED = '''
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.executescript("""
    pragma cache_size = 1;
    begin immediate;
    update trial_user_attributes set value_json = value_json || ' ';
    create table more as select a.value_json from trial_user_attributes a, trial_user_attributes limit 20000;
""")
os.kill(os.getpid(), 9)
'''


def test_a_database_whose_writer_was_killed_is_left_for_the_writer_to_mend(folder: Path, capsys: Capture) -> None:
    path = study(folder)
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    journal = folder / "study.db-journal"
    before = path.read_bytes(), journal.read_bytes()
    assert main(["check", str(path)]) == 2
    assert "was left in the middle of a write" in capsys.readouterr().err
    assert (path.read_bytes(), journal.read_bytes()) == before


# -- what is written


def test_no_password_is_shown_anywhere(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    study(folder)
    source = f"sqlite:///{folder}/study.db?password=hidden-word#sweep"
    arguments = ["check", source, "--html", "page.html"]
    monkeypatch.setattr(sys, "argv", ["looptransfer", *arguments])
    for form in ([], ["--markdown"], ["--json"]):
        assert main([*arguments, *form]) == 0
    assert main(["check", source.replace("study.db", "none.db")]) == 2
    assert main(["check", source.replace("#sweep", "#none")]) == 2
    assert main(["check", "odd://user:hidden-word@host/db"]) == 2
    said = capsys.readouterr()
    assert "hidden-word" not in said.out + said.err + Path("page.html").read_text()
    assert "odd://user:***@host/db" in said.err


NASTY = "x\n::error title=a::b\x1b[31m\u202e##[error]c @team"


def test_names_from_a_table_steer_neither_terminal_nor_log_nor_markdown(folder: Path, capsys: Capture) -> None:
    rows = sweep(seeds=1).assign(rule=NASTY).rename(columns={"loops": NASTY}).to_dict("records")
    Path("runs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["check", "runs.jsonl", "--axis", NASTY]
    for arguments in (words, [*words, "--markdown"], [*words, "--rule", NASTY + "y"], ["check", NASTY]):
        main(arguments)
        said = capsys.readouterr()
        text = said.out + said.err
        assert all(line.isprintable() for line in text.split("\n"))
        assert "::" not in text
        assert "##[" not in text
        if "--markdown" in arguments:
            assert "@team" not in "".join(line for line in text.split("\n") if not line.startswith("    "))
    assert main([*words, "--html", "page.html"]) == 3
    assert not set("\x1b\u202e") & set(Path("page.html").read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "runs.csv", "--html", "hard.csv"],
        ["check", "runs.csv", "--todo", "soft.csv"],
        ["check", "sqlite:///study.db#sweep", "--html", "study.db"],
        ["check", "study.db", "--baseline", "study.db", "--update-baseline"],
        ["check", "runs.csv", "--baseline", "b.json", "--html", "b.json"],
        ["check", "runs.csv", "--baseline", "b.json", "--update-baseline", "--todo", "b.json"],
        ["check", "runs.csv", "--html", "new", "--todo", "./new"],
    ],
)
def test_nothing_is_written_over_what_is_read_or_twice(folder: Path, capsys: Capture, arguments: list[str]) -> None:
    study(folder)
    os.link("runs.csv", "hard.csv")
    os.symlink("runs.csv", "soft.csv")
    assert main(["check", "runs.csv", "--baseline", "b.json", "--update-baseline"]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(arguments) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_coordinate_check_writes_not_over_its_experiment(folder: Path, capsys: Capture) -> None:
    Path("experiment.py").write_text("experiment = None\n")
    for words in (["--html", "./experiment.py"], ["-o", "experiment.py"], ["--html", "new", "-o", "new"]):
        assert main(["coordcheck", "experiment.py:experiment", *words]) == 2
        assert "would overwrite" in capsys.readouterr().err
    assert Path("experiment.py").read_text() == "experiment = None\n"
    assert not Path("new").exists()


def test_a_device_takes_a_page_and_a_baseline_and_stays_a_device(folder: Path) -> None:
    words = ["check", "runs.csv", "--html", os.devnull]
    assert main(words) == 0
    assert main(["check", "runs.csv", "--baseline", os.devnull, "--update-baseline"]) == 0
    assert main(["check", "runs.csv", "--baseline", os.devnull]) == 2
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_nothing_is_written_where_the_baseline_cannot_be_read(folder: Path) -> None:
    assert main(["check", "runs.csv", "--html", "page.html", "--todo", "todo.csv", "--baseline", "none.json"]) == 2
    assert [path.name for path in folder.iterdir()] == ["runs.csv"]


def test_runs_that_settle_a_table_of_others_are_rows_and_those_of_a_sweep_a_command(
    folder: Path, capsys: Capture
) -> None:
    one_seed = sweep(seeds=1).drop(columns="rule")
    one_seed.to_csv("others.csv", index=False)
    assert main(["check", "others.csv", "--todo", "todo.csv"]) == 3
    said = capsys.readouterr().out
    assert "looptransfer sweep" not in said
    assert "63 runs: N = 1, 2, 4; LR 0.000244141, " in said
    rows = pd.read_csv("todo.csv")
    assert rows.columns.tolist() == ["loops", "lr", "seed"]
    assert set(rows["seed"]) == {1, 2, 3}
    assert len(rows) == len(rows.drop_duplicates()) == 63
    more = pd.concat([one_seed, rows.assign(loss=2 + 0.06 * (np.log2(rows["lr"]) + 9.1) ** 2)])
    more.to_csv("more.csv", index=False)
    assert main(["check", "more.csv", "--todo", "todo.csv"]) == 0
    assert len(pd.read_csv("todo.csv")) == 0

    ours = sweep(seeds=1).assign(layers=1, width=8, steps=9, diverged=False, seconds=1.0, fingerprint="0123456789ab")
    names = ["rule", "layers", "loops", "width", "lr", "seed", "steps", "loss", "diverged", "seconds", "fingerprint"]
    ours[names].to_csv("ours.csv", index=False)
    capsys.readouterr()
    assert main(["check", "ours.csv"]) == 3
    assert "--seeds 1-3 --rules factored --append ours.csv" in capsys.readouterr().out
    path = study(folder, trials=sweep(seeds=1), ours=True)
    assert main(["check", str(path)]) == 3
    assert f"--rules factored --ledger {path} -o more.csv" in capsys.readouterr().out


def test_a_table_without_rules_is_not_said_to_be_factored(folder: Path, capsys: Capture) -> None:
    sweep().drop(columns="rule").to_csv("runs.csv", index=False)
    assert main(["check", "runs.csv", "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "\n### all runs: FLAT" in said
    assert "factored" not in said
    assert "63 rows, 0 of them diverged" in said


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize("arguments", [["check", "--help"], ["check", "runs.csv"], ["check", "ε.csv"], ["--help"]])
def test_what_the_stream_cannot_hold_is_replaced(folder: Path, encoding: str, arguments: Sequence[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = run(*arguments, env=environment)
    assert done.returncode == (2 if "ε.csv" in arguments else 0)
    assert b"Traceback" not in done.stderr
    assert done.stdout or done.stderr
    done.stdout.decode(encoding)
    done.stderr.decode(encoding)


def test_a_c_locale_is_no_reason_to_fail(folder: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert run("check", "runs.csv", env=environment).returncode == 0
    assert run("check", b"\xff.csv".decode(errors="surrogateescape"), env=environment).returncode == 2


@pytest.mark.slow
def test_hundreds_of_values_of_n_are_drawn(folder: Path) -> None:
    counts = range(1, 261)
    rows = [(n, lr, seed, (np.log2(lr) + 5) ** 2) for n in counts for lr in (0.02, 0.03, 0.05) for seed in (0, 1)]
    pd.DataFrame(rows, columns=["loops", "lr", "seed", "loss"]).to_csv("many.csv", index=False)
    assert main(["check", "many.csv", "--html", "page.html"]) in (0, 3)
    assert Path("page.html").stat().st_size > 10_000


# -- the repository is left alone


def test_git_runs_no_hook_of_the_repository_and_writes_nothing(folder: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    git("init", "-q")
    git("add", "runs.csv")
    git("commit", "-qm", "runs")
    trap = folder / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {folder}/sprung\n")
    trap.chmod(0o755)
    for hook in ("post-index-change", "fsmonitor-watchman", "post-checkout", "pre-commit"):
        (folder / ".git" / "hooks" / hook).write_bytes(trap.read_bytes())
        (folder / ".git" / "hooks" / hook).chmod(0o755)
    git("config", "core.fsmonitor", str(trap))
    os.utime("runs.csv", (1, 1))  # so that a status would write the index anew
    index = (folder / ".git" / "index").read_bytes()
    version = code_version(folder)
    assert version is not None
    assert version.endswith("+changes")
    assert not (folder / "sprung").exists()
    assert (folder / ".git" / "index").read_bytes() == index


# -- two sweeps into one table

APPEND = """
import sys
import pandas as pd
from looptransfer.transfer.results import COLUMNS
import looptransfer.trials.sweep as trials
from looptransfer.command.cli import main

def quick(experiment, loops, rules, seeds, known, **rest):  # the rows of a sweep without its training
    there = {(run.loops, run.seed) for run in known}
    new = [(n, seed) for n in loops for seed in seeds if (n, seed) not in there]
    rows = [("factored", 1, n, 8, 0.1, seed, 6, 2.0, False, 1.0, "f") for n, seed in new]
    return pd.DataFrame(rows, columns=COLUMNS)

trials.sweep = quick
_, first, path = sys.argv
for seed in range(int(first), int(first) + 10):
    words = f"sweep tests.experiments:tiny_experiment --loops 1,2 --lrs 0.1 --seeds {seed}-{seed} --append {path}"
    assert main(words.split()) == 0
"""


@pytest.mark.slow
def test_sweeps_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("rule,layers,loops,width,lr,seed,steps,loss,diverged,seconds,fingerprint\n")
    processes = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(first), str(path)], stdout=subprocess.DEVNULL)
        for first in (0, 10, 20)
    ]
    assert [process.wait(300) for process in processes] == [0] * 3
    runs = pd.read_csv(path)
    assert len(runs) == len(runs.drop_duplicates(["loops", "seed"])) == 60
    assert list(tmp_path.iterdir()) == [path]


# -- gates that would pass without having checked


def censored(path: Path) -> None:
    """A baseline of honest making whose optima of the rule are all censored: those of a control are known."""
    runs = sweep()
    cut = runs[runs["lr"] < 2.0**-9.5]
    both = pd.concat([cut, runs.assign(rule="sqrt")])
    both.to_csv("both.csv", index=False)
    assert main(["check", "both.csv", "--rule", "sqrt", "--baseline", str(path), "--update-baseline"]) in (0, 3)


def write(text: str) -> Callable[[Path], None]:
    return lambda path: Path("runs.csv").write_text(text) and None


def small_loss(path: Path) -> None:
    """A loss near 1e-3, as its baseline, that has become three times as high."""
    small = sweep().assign(loss=lambda table: 1e-3 * (table["loss"] - 1.9))
    small.to_csv("runs.csv", index=False)
    assert main(["check", "runs.csv", "--baseline", str(path), "--update-baseline"]) == 0
    small.assign(loss=3 * small["loss"]).to_csv("runs.csv", index=False)


def without_largest(path: Path) -> None:
    runs = sweep()
    runs[runs["loops"] < 4].to_csv("runs.csv", index=False)


def worse(path: Path) -> None:
    """Runs that are worse, but had crashed; as rows of a tracker they would pull the mean."""
    sweep().assign(State="crashed").to_csv("runs.csv", index=False)


def noisy(path: Path) -> None:
    """A baseline whose seeds scatter so much that nothing could move out of it."""
    data = json.loads(path.read_text())
    for stored in data["rules"]["factored"]:
        for name in ("log2_lr", "loss"):
            stored[f"{name}_by_seed"] = {str(7 + up): stored[name]["estimate"] + 6 * up - 3 for up in (0, 1)}
    path.write_text(json.dumps(data))


def emptied(path: Path) -> None:
    data = json.loads(path.read_text())
    data["rules"]["factored"] = []
    data["rules"]["sqrt"] = json.loads(path.read_text())["rules"]["factored"]
    path.write_text(json.dumps(data))


UNCHECKED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "nothing left to compare": (censored, []),
    "a rule without optima": (emptied, []),
    "an empty table": (write(""), []),
    "a table of its header": (write(TEXT.splitlines()[0] + "\n"), []),
    "the largest N was not run": (without_largest, []),
    "a quote that swallows the rows behind it": (write(TEXT.replace("factored,4", '"factored,4', 1) + '"\n'), []),
    "runs that crashed": (worse, []),
    "losses that are missing": (write("\n".join(line.rpartition(",")[0] + "," for line in TEXT.splitlines())), []),
    "a tolerance of the regret above the whole curve": (lambda path: None, ["--regret", "5"]),
    "a tolerance of the shift without end": (lambda path: None, ["--moved", "inf"]),
    "another axis": (lambda path: None, ["--axis", "seed1"]),
    "another direction": (lambda path: None, ["--maximize"]),
    "a baseline of noise": (noisy, []),
    "a baseline that is gone": (lambda path: path.unlink(), []),
    "a baseline cut off": (lambda path: path.write_text(path.read_text()[:300]) and None, []),
    "one seed": (write(sweep(seeds=1).to_csv(index=False)), []),
}


@pytest.mark.parametrize("case", UNCHECKED)
def test_no_gate_passes_without_having_checked(folder: Path, case: str) -> None:
    path = folder / "lr-optima.json"
    assert main(["check", "runs.csv", "--baseline", str(path), "--update-baseline"]) == 0
    assert main(["check", "runs.csv", "--baseline", str(path)]) == 0
    change, options = UNCHECKED[case]
    change(path)
    assert main(["check", "runs.csv", "--baseline", str(path), *options]) in (2, 3)


def test_a_small_loss_that_trebled_is_worse_although_it_is_far_below_what_matters_in_nats(folder: Path) -> None:
    path = folder / "lr-optima.json"
    small_loss(path)
    assert main(["check", "runs.csv", "--baseline", str(path)]) == 1
    assert Baseline.read(path).loss_tolerance < 1e-3
