"""Damaged tables, studies and baselines by class, each with the exit status of `check` and a phrase of its message."""

import bz2
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd

from looptransfer.command.cli import main

SECONDS = 60  # after which a source counts as one that hangs
REFUSED = (2,)


@dataclass(frozen=True)
class Bad:
    """`make` writes into an empty folder and returns the words after `looptransfer check`.

    Where damage may have hit what is not used, 0 is right too if all that is printed is as for the `whole` file.
    """

    kind: str
    name: str
    make: Callable[[Path], Sequence[str]]
    phrase: str
    status: tuple[int, ...] = REFUSED
    whole: bytes | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


class Hang(BaseException):
    """A source was not done with in time."""


def judge(words: Sequence[str]) -> tuple[int, str, str]:
    """The exit status of `check`, what it prints, and what it says of errors."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return main(["check", *words]), out.getvalue(), err.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(bad: Bad, folder: Path) -> str | None:
    """What is wrong with the answer to a bad source; None where it is as it should be."""
    words = bad.make(folder)
    try:
        status, out, err = judge(words)
    except Hang:
        return "hangs"
    if status not in bad.status:
        return f"ends with {status}: {(out + err)[-400:]}"
    if status == 0 and bad.whole is not None:
        (folder / "whole").write_bytes(bad.whole)
        return None if out == judge([str(folder / "whole")])[1] else f"judges what is damaged: {out}"
    if "Traceback" in err or (status == 2 and (out or err.count("\n") != 1)):
        return f"says more than a line: {err[-400:]}"
    return None if bad.phrase in err + out else f"does not say {bad.phrase!r}: {(err + out)[:400]}"


# -- a sweep that is FLAT, and ways to write it


def sweep(seeds: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        ("factored", n, 2.0**x, seed, 2 + 0.06 * (x + 9.1) ** 2 + rng.normal(0, 0.001))
        for n in (1, 2, 4)
        for seed in range(seeds)
        for x in range(-12, -5)
    ]
    return pd.DataFrame(rows, columns=["rule", "loops", "lr", "seed", "loss"])


TEXT = sweep().to_csv(index=False)
LINES = TEXT.splitlines()
RECORDS = [{"name": "a", "config": {"n": row["loops"], "lr": row["lr"]}, **row} for row in sweep().to_dict("records")]


def file(content: str | bytes, name: str = "runs.csv", *more: str) -> Callable[[Path], Sequence[str]]:
    """A file with that content, and the options behind it."""

    def make(folder: Path) -> Sequence[str]:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return [str(folder / name), *more]

    return make


def with_line(number: int, line: str, text: str = TEXT) -> str:
    """The table with one line in another's place; the header is line 1."""
    lines = text.splitlines()
    lines[number - 1] = line
    return "\n".join(lines) + "\n"


def with_cell(column: str, cell: str, number: int = 5) -> str:
    """The table with one cell in another's place."""
    cells = LINES[number - 1].split(",")
    cells[LINES[0].split(",").index(column)] = cell
    return with_line(number, ",".join(cells))


def quotes() -> Iterator[Bad]:
    rng = random.Random(0)
    for place in rng.sample(range(len(TEXT)), 60):
        text = TEXT[:place] + '"' + TEXT[place:]
        yield Bad("stray quotes", f"one at character {place}", file(text), "a quote is not closed, or stands inside")
    for first, second in [sorted(rng.sample(range(len(TEXT)), 2)) for _ in range(20)]:
        text = TEXT[:first] + '"' + TEXT[first:second] + '"' + TEXT[second:]
        phrase = "a quote is not closed, or stands inside" if "\n" in text[first:second] else ""
        yield Bad("stray quotes", f"two at characters {first} and {second}", file(text), phrase)
    for name, cell in (("a cell with a line end", '"fac\ntored"'), ("text behind a quote", '"a"b'), ("one sign", '"')):
        yield Bad("stray quotes", name, file(with_cell("rule", cell)), "is not closed, or stands inside")


def controls() -> Iterator[Bad]:
    rng = random.Random(1)
    for sign in ("\0", "\x1b", "\x07", "\x08", "\x0b", "\x0c", "\x1a", "\x1c", "\x7f", "\x85", "\x9b"):
        for place in rng.sample(range(len(TEXT)), 2):
            text = TEXT[:place] + sign + TEXT[place:]
            yield Bad("control characters", f"{sign!r} at character {place}", file(text), "holds the control character")


def encodings() -> Iterator[Bad]:
    for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        phrase = "UTF-16" if name in ("utf-16", "utf-32") else "control character"
        yield Bad("encodings", name, file(TEXT.encode(name)), phrase)
    for name in ("latin-1", "cp1252", "shift-jis", "koi8-r"):
        signs = {"latin-1": "é", "cp1252": "“", "shift-jis": "学", "koi8-r": "жук"}[name]
        text = TEXT.replace("factored", f"factored{signs}")
        yield Bad("encodings", name, file(text.encode(name)), "is not UTF-8 text (byte")
    yield Bad("encodings", "EBCDIC", file(TEXT.encode("cp500")), "is not")
    for name, content in {
        "lone surrogate": TEXT.encode().replace(b"factored", b"\xed\xa0\x80", 1),
        "overlong": TEXT.encode().replace(b"factored", b"\xc0\xaf", 1),
        "cut in a sign": TEXT.encode() + "ε".encode()[:1],
        "gzip": gzip.compress(TEXT.encode()),
        "bzip2": bz2.compress(TEXT.encode()),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "pickle": pickle.dumps({"loss": 1.0}),
        "numpy": b"\x93NUMPY\x01\0" + bytes(range(200)),
        "program": b"\x7fELF" + bytes(range(256)),
        "noise": random.Random(2).randbytes(5000),
        "zip": zipped(),
    }.items():
        yield Bad("encodings", name, file(content), "is not")
        yield Bad("encodings", f"{name} called JSON lines", file(content, "runs.jsonl"), "is not")


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", TEXT)
    return buffer.getvalue()


def headers() -> Iterator[Bad]:
    rows = "\n".join(LINES[1:]) + "\n"
    german = TEXT.replace(".", "#").replace(",", ";").replace("#", ",")
    for name, text, phrase in [
        ("empty", "", "is empty"),
        ("byte order mark alone", "\ufeff", "is empty"),
        ("blank lines", "\n \n\t\n", "is empty"),
        ("commas alone", ",,,\n,,\n", "is empty"),
        ("header alone", LINES[0] + "\n", "has no rows"),
        ("none", rows, "is missing"),
        ("loss twice", TEXT.replace("rule", "loss", 1), "two columns 'loss'"),
        ("loss twice but for blanks", TEXT.replace("rule", " loss ", 1), "two columns 'loss'"),
        ("a foreign column twice", TEXT.replace("rule,loops", "a,a", 1), "two columns 'a'"),
        ("misspelt", TEXT.replace("lr", "1r", 1), "column lr is missing"),
        ("once more in the middle", TEXT + TEXT, "row 65: loops is 'loops'"),
        ("another byte order mark in the middle", TEXT + "\ufeff" + TEXT, "row 65: loops is 'loops'"),
        ("semicolons", TEXT.replace(",", ";"), "separated by ;"),
        ("semicolons and decimal commas", german, "decimal commas"),
        ("tabs", TEXT.replace(",", "\t"), "separated by tabs"),
        ("bars", TEXT.replace(",", "|"), "is missing"),
        ("blanks", TEXT.replace(",", "  "), "is missing"),
        ("a comment above", "# made on Tuesday\n" + TEXT, "remove comment lines"),
        ("a comment in the middle", TEXT + "# seed 4 follows\n" + rows, "remove comment lines"),
        ("Excel's sep=", "sep=,\n" + TEXT, "cells"),
        ("a title above", "My sweep\n" + TEXT, "has 5 cells, the header 1"),
        ("a ruler below", with_line(2, "---,---,---,---,---"), "not a number"),
        ("the table of Markdown", "|" + TEXT.replace(",", "|").replace("\n", "|\n|"), "is missing"),
        ("of HTML", "<table><tr><td>loops</td></tr></table>\n", "is missing"),
        ("JSON over lines", json.dumps(RECORDS[0], indent=1), "is not JSON"),
        ("the wide form", "lr,1,2,4\n0.1,2.0,2.1,2.2\n", "is missing"),
    ]:
        yield Bad("headers", name, file(text), phrase)
    for options, phrase in [
        (["--columns", "lr=eta"], "there is no column eta"),
        (["--columns", "lr"], "write NAME=THERE"),
        (["--columns", "lr=lr", "lr=loss"], "names 'lr' twice"),
        (["--axis", "depth"], "column depth is missing"),
        (["--axis", "loss"], "axis is 'loss'"),
        (["--where", "loops"], "write COLUMN=VALUE"),
        (["--where", "depth=3"], "there is no column depth"),
        (["--where", "loops=9"], "leaves no row; loops is '1' (21)"),
        (["--diverged", "=3"], "write COLUMN=VALUE"),
        (["--rule", "sqrt"], "rule 'sqrt' is not in the table"),
        (["--regret", "0"], "regret_tolerance is 0.0"),
        (["--regret", "nan"], "regret_tolerance is nan"),
        (["--confidence", "1"], "confidence is 1.0"),
        (["--lr", "inf"], "transferred_lr is inf"),
    ]:
        yield Bad("options", " ".join(options), file(TEXT, "runs.csv", *options), phrase)


def numbers() -> Iterator[Bad]:
    no_number = (
        "fast", "0,5", "1.234,5", "1_000", "0x1F", "1e", ".", "+-3", "--", "1.2.3", "٣", "½", "１２", "NA", "None",
        "null", "#DIV/0!", "True", "2024-01-01", "1 000", "$3", "3%", "3 nats", "[1]", "{}", "'0.1'", "=1+1", "−1",
    )  # fmt: skip
    for cell in no_number:
        quoted = f'"{cell}"' if "," in cell else cell
        for column in ("lr", "loss"):
            yield Bad("numbers", f"{column} {cell}", file(with_cell(column, quoted)), "which is not a number")
    for column, cells in {
        "loops": ("", "0", "-1", "1.5", "nan", "inf", "1e7", "two", "1e400"),
        "lr": ("", "0", "-0.1", "nan", "inf", "-inf", "1e400", "0.0"),
        "loss": ("", "1e300", "-1e300"),
        "seed": ("", " "),
        "rule": ("", "Factored", "FACTORED ", "fac tored", "ｆactored"),
    }.items():
        for cell in cells:
            yield Bad("numbers", f"{column} {cell!r}", file(with_cell(column, cell)), "")
    for step in ("", "-1", "nan", "inf", "last"):
        text = "\n".join(f"{line},{'step' if number == 0 else step}" for number, line in enumerate(LINES))
        yield Bad("numbers", f"step {step!r}", file(text), "step is")
    for flag in ("", "perhaps", "2", "nan"):
        text = "\n".join(f"{line},{'diverged' if number == 0 else flag}" for number, line in enumerate(LINES))
        yield Bad("numbers", f"diverged {flag!r}", file(text), "it must be true or false")
    yield Bad("numbers", "no loss is finite", file("loops,lr,loss\n1,0.1,nan\n1,0.2,inf\n"), "has a finite loss")


def rows() -> Iterator[Bad]:
    rng = random.Random(3)
    for number in rng.sample(range(2, len(LINES)), 5):
        line = LINES[number - 1]
        yield Bad("rows", f"line {number} short of a cell", file(with_line(number, line.rsplit(",", 1)[0])), "cells")
        yield Bad("rows", f"line {number} with one too many", file(with_line(number, line + ",0")), "cells")
        cut = "\n".join(LINES[:number]) + "\n" + line[: rng.randrange(1, line.rindex(",") + 1)].rstrip(",")
        yield Bad("rows", f"cut off in line {number + 1}", file(cut), "cells")
        yield Bad("rows", f"line {number} twice", file(TEXT + line + "\n"), "are the same run")
        other = ",".join([*line.split(",")[:-1], "9.5"])
        yield Bad("rows", f"line {number} with two losses", file(TEXT + other + "\n"), "are the same run")
        spelled = line.split(",")
        spelled[2] = f"{float(spelled[2]) * (1 + 1e-7):.20f}"
        yield Bad("rows", f"line {number} with another last digit", file(TEXT + ",".join(spelled) + "\n"), "same run")
        seed = line.split(",")
        seed[3] += ".0"
        yield Bad("rows", f"line {number} with its seed as a float", file(TEXT + ",".join(seed) + "\n"), "same run")
    for name in ("weight_decay", "batch_size", "warmup"):
        grid = pd.concat([sweep().assign(**{name: value}) for value in (0.1, 0.2)])
        yield Bad("rows", f"repeats that differ in {name}", file(grid.to_csv(index=False)), f"they differ in {name}")
    early = pd.concat([sweep().assign(step=10), sweep().assign(step=20).iloc[:-1]]).to_csv(index=False)
    yield Bad("rows", "a run that ends early", file(early), "ends at step 10 of 20")


def unfinished() -> Iterator[Bad]:
    for column in ("State", "state", "Status", "run.status"):
        for word in ("crashed", "running", "KILLED", "FAILED", "preempted", ""):
            states = ["finished"] * (len(LINES) - 2) + [word]
            text = "\n".join(f"{line},{cell}" for line, cell in zip(LINES, [column, *states], strict=True))
            yield Bad("unfinished runs", f"{column} {word}", file(text), f"--where {column}=finished")
    for cell in ("", "-", "N/A", "None", "null"):
        yield Bad("unfinished runs", f"loss {cell!r}", file(with_cell("loss", cell)), f"--diverged loss={cell}")
    for name, row in {
        "null": {**RECORDS[3], "loss": None},
        "absent": {key: value for key, value in RECORDS[3].items() if key != "loss"},
        "empty": {**RECORDS[3], "loss": ""},
    }.items():
        lines = "\n".join(json.dumps(one) for one in [*RECORDS[:3], row, *RECORDS[4:]])
        yield Bad("unfinished runs", f"{name} in JSON lines", file(lines, "runs.jsonl"), "a run without a result")


def json_lines() -> Iterator[Bad]:
    good = [json.dumps(row) for row in RECORDS]
    for name, line, phrase in [
        ("broken", "{oops", "line 4 is not JSON"),
        ("cut off", good[3][:-9], "line 4 is not JSON"),
        ("a list", "[1, 2]", "line 4 holds no JSON object"),
        ("a number", "3", "line 4 holds no JSON object"),
        ("two on a line", good[3] + good[4], "line 4 is not JSON"),
        ("a comma behind", good[3] + ",", "line 4 is not JSON"),
        ("single quotes", good[3].replace('"', "'"), "line 4 is not JSON"),
        ("a comment", "// more", "line 4 is not JSON"),
        ("a name twice", '{"loss": 1, ' + good[3][1:], "'loss' stands there twice"),
        ("a name twice by its dots", '{"config.lr": 1, ' + good[3][1:], "'config.lr' stands there twice"),
        ("depth", "[" * 100_000, "line 4"),
        ("objects within objects", '{"a":' * 5000 + "1" + "}" * 5000, ""),
        ("a control character", good[3].replace("factored", "fact\x1bored"), "control character"),
        ("true for a loss", json.dumps({**RECORDS[3], "loss": True}), "not a number"),
        ("a list for a loss", json.dumps({**RECORDS[3], "loss": [1.0]}), "not a number"),
        ("an object for an LR", json.dumps({**RECORDS[3], "lr": {"value": 1}}), "not a number"),
        ("a number without end", '{"loss": ' + "9" * 5000 + "}", "line 4"),
        ("a huge number", json.dumps({**RECORDS[3], "lr": 10**400}), "not a number"),
        ("a word for an LR", json.dumps({**RECORDS[3], "lr": "high"}), "which is not a number"),
    ]:
        text = "\n".join([*good[:3], line, *good[4:]])
        yield Bad("JSON lines", name, file(text, "runs.jsonl"), phrase)
        yield Bad("JSON lines", f"{name}, by its content", file(text, "runs.txt"), phrase)
    yield Bad("JSON lines", "empty", file("", "runs.jsonl"), "is missing")
    yield Bad("JSON lines", "UTF-16", file("\n".join(good).encode("utf-16"), "runs.jsonl"), "UTF-16")
    yield Bad("JSON lines", "a list of objects", file(json.dumps(RECORDS), "runs.jsonl"), "holds no JSON object")
    array = json.dumps(RECORDS)
    for name, text, phrase in [
        ("cut off", array[:-9], "begins as a JSON array and is not JSON"),
        ("a number in it", json.dumps([*RECORDS, 3]), f"item {len(RECORDS) + 1} of the array is no JSON object"),
        ("a name twice", array.replace("{", '{"lr": 1, ', 1), "'lr' stands there twice"),
        ("depth", "[" * 100_000, "is not JSON"),
        ("empty", "[]", "is missing"),
        ("more behind", array + array, "is not JSON"),
    ]:
        yield Bad("JSON arrays", name, file(text, "runs.json"), phrase)


def parquet() -> Iterator[Bad]:
    buffer = io.BytesIO()
    sweep().to_parquet(buffer, index=False)
    data, rng = buffer.getvalue(), random.Random(4)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    for cut in [0, 3, 4, 8, len(data) - 1, *rng.sample(range(len(data)), 10)]:
        yield Bad("Parquet", f"cut off at byte {cut}", file(data[:cut], "runs.parquet"), "is not a Parquet table")
    for name, content in {
        "text": TEXT.encode(),
        "noise": rng.randbytes(3000),
        "signs alone": b"PAR1PAR1",
        "length without end": b"PAR1" + b"\xff" * 40 + b"PAR1",
    }.items():
        yield Bad("Parquet", name, file(content, "runs.parquet"), "is not a Parquet table")
    for place in rng.sample(range(len(data) - footer, len(data)), 20):
        spoilt = bytearray(data)
        spoilt[place] ^= 0xFF
        make = file(bytes(spoilt), "runs.parquet")
        yield Bad("Parquet", f"byte {place} of the footer spoilt", make, "", (0, 2), data)
    for name, change in {
        "no row": lambda table: table.iloc[:0],
        "no loss": lambda table: table.drop(columns="loss"),
        "a loss that is null": lambda table: table.assign(loss=table["loss"].mask(table.index == 3)),
        "dates for LRs": lambda table: table.assign(lr=pd.Timestamp("2024-01-01")),
        "lists for losses": lambda table: table.assign(loss=[[1.0]] * len(table)),
        "truth for losses": lambda table: table.assign(loss=True),
        "bytes for LRs": lambda table: table.assign(lr=b"0.1"),
    }.items():
        spoilt_table = io.BytesIO()
        change(sweep()).to_parquet(spoilt_table, index=False)
        yield Bad("Parquet", name, file(spoilt_table.getvalue(), "runs.parquet"), "")


# -- studies and ledgers


def study(folder: Path, trials: pd.DataFrame | None = None, ours: bool = False, **options: Any) -> Path:
    """An Optuna study with the sweep; one of ours has its coordinates and its identity in attributes."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / "study.db"
    made = optuna.create_study(storage=f"sqlite:///{path}", study_name="sweep", **options)
    if ours:
        made.set_user_attr("identity", json.dumps({"name": "tiny", "steps": 6}))
    rows_of = (sweep() if trials is None else trials).to_dict("records")
    made.add_trials([frozen(row, ours, len(made.directions)) for row in rows_of])
    return path


def frozen(row: dict[str, Any], ours: bool, objectives: int) -> optuna.trial.FrozenTrial:
    loss, state = row.pop("loss"), row.pop("state", "COMPLETE")
    attributes = {"run": row, "outcome": {"loss": loss, "diverged": False}} if ours else row
    values = None if state in ("FAIL", "RUNNING", "WAITING") else [float(loss)] * objectives
    return optuna.trial.create_trial(values=values, state=optuna.trial.TrialState[state], user_attrs=attributes)


STUDIES: dict[bool, bytes] = {}


def study_bytes(ours: bool) -> bytes:
    """The file of a study, made once."""
    if ours not in STUDIES:
        with tempfile.TemporaryDirectory() as folder:
            STUDIES[ours] = study(Path(folder), ours=ours).read_bytes()
    return STUDIES[ours]


def with_sql(command: str, ours: bool) -> Callable[[Path], Sequence[str]]:
    """A study on which a command of SQL was run."""

    def make(folder: Path) -> Sequence[str]:
        path = folder / "study.db"
        path.write_bytes(study_bytes(ours))
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(command)
        return [str(path)]

    return make


def with_study(*more: str, **options: Any) -> Callable[[Path], Sequence[str]]:
    return lambda folder: [str(study(folder, **options)), *more]


def url(text: str, *more: str) -> Callable[[Path], Sequence[str]]:
    return lambda folder: [text.format(folder=folder), *more]


def databases() -> Iterator[Bad]:
    for ours in (False, True):
        whose, data, rng = ("ledger" if ours else "study"), study_bytes(ours), random.Random(5)
        for cut in (100, 4096, 8192, 20000, len(data) // 2, len(data) - 4096, len(data) - 1):
            yield Bad("databases", f"{whose} cut off at byte {cut}", file(data[:cut], "study.db"), "")
        for page in rng.sample(range(1, len(data) // 4096), 12):
            spoilt = data[: page * 4096] + b"\0" * 4096 + data[(page + 1) * 4096 :]
            yield Bad("databases", f"{whose} with page {page} of zeros", file(spoilt, "study.db"), "", (0, 2), data)
        for page in rng.sample(range(1, len(data) // 4096), 12):
            spoilt = data[: page * 4096] + rng.randbytes(4096) + data[(page + 1) * 4096 :]
            yield Bad("databases", f"{whose} with page {page} of noise", file(spoilt, "study.db"), "", (0, 2), data)
        for command, phrase in [
            ("delete from trials where number = 7", "trials are missing"),
            ("delete from trial_values where trial_id = 7", "a run without a result"),
            ("update trial_values set value = null where trial_id = 7", "is not an Optuna storage"),
            ("update trial_values set value_type = 'ODD' where trial_id = 7", "is not an Optuna storage"),
            ("update trial_user_attributes set value_json = '{' where trial_id = 7", "is not an Optuna storage"),
            ("delete from trial_user_attributes where trial_id = 7", ""),
            ("update trials set state = 'ODD' where number = 7", "is not an Optuna storage"),
            ("delete from studies", "has the studies none"),
            ("delete from study_directions", ""),
            ("delete from trials", "no rows"),
            ("update trials set state = 'FAIL'", "no rows"),
            ("drop table trials", "is not an Optuna storage"),
            ("drop table version_info", "is not an Optuna storage"),
            ("update alembic_version set version_num = 'v99.0.a'", "is not an Optuna storage"),
        ]:
            yield Bad("databases", f"{whose}: {command}", with_sql(command, ours), phrase)
    command = "update trial_user_attributes set value_json = '7' where trial_id = 7"
    yield Bad("databases", f"ledger: {command}", with_sql(command, True), "")
    for value in ("'{'", "'7'", "'[]'"):
        command = f"update study_user_attributes set value_json = {value}"
        yield Bad("databases", f"ledger: identity {value}", with_sql(command, True), "")
    songs = "drop table if exists trials; create table songs (title text)"
    yield Bad("databases", "somebody's songs", with_sql(songs, False), "is not an Optuna storage")
    yield Bad("databases", "two objectives", with_study(directions=["minimize", "maximize"]), "has 2 objectives")
    yield Bad("databases", "maximized against its direction", with_study("--maximize"), "minimizes its value")
    pruned = sweep().assign(state="PRUNED")
    yield Bad("databases", "all pruned", with_study(trials=pruned), "no rows")
    yield Bad("databases", "a whole study", with_study(), "FLAT", (0,))
    for name, text, phrase in [
        ("absent", "sqlite:///{folder}/none.db", "there is no such file"),
        ("in memory", "sqlite://", "there is no such file"),
        ("a folder", "sqlite:///{folder}", "there is no such file"),
        ("no dialect", "odd://user:hidden-word@host/db", "is not an Optuna storage"),
        ("no driver", "postgresql+odd://user:hidden-word@host/db", "is not an Optuna storage"),
        ("no port", "postgresql://user:hidden-word@host:port/db", "no URL of a database"),
        ("a password with its signs", "postgresql://user:hidden@word/?x@host/db", "write signs such as @ and /"),
        ("a page of the web", "https://example.invalid/runs.csv", "is not an Optuna storage"),
        ("a bucket", "s3://bucket/runs.csv", "is not an Optuna storage"),
    ]:
        yield Bad("databases", f"URL: {name}", url(text), phrase)


# -- baselines


def baseline(change: Callable[[dict[str, Any]], object] | str | bytes, *more: str) -> Callable[[Path], Sequence[str]]:
    """The sweep beside its baseline, which was changed or written over."""

    def make(folder: Path) -> Sequence[str]:
        words = [*file(TEXT)(folder), "--baseline", str(folder / "optima.json")]
        assert judge([*words, "--update-baseline"])[0] == 0
        path = folder / "optima.json"
        if callable(change):
            data = json.loads(path.read_text())
            change(data)
            path.write_text(json.dumps(data))
        else:
            path.write_bytes(change.encode() if isinstance(change, str) else change)
        return [*words, *more]

    return make


def put(value: object, *place: Any) -> Callable[[dict[str, Any]], object]:
    """A change of a baseline at a place, such as rules, factored, 0, at."""

    def change(data: Any) -> None:
        for key in place[:-1]:
            data = data[key]
        data[place[-1]] = value

    return change


def baselines() -> Iterator[Bad]:
    first = ("rules", "factored", 0)
    for name, value, place, phrase in [
        ("axis", "width", ("axis",), "made with axis"),
        ("axis of a number", 3, ("axis",), "axis is '3'"),
        ("unit", "of the metric", ("unit",), "made with unit"),
        ("confidence", 90, ("confidence",), "confidence is 90"),
        ("confidence in words", "much", ("confidence",), "confidence is 'much'"),
        ("LR below 0", -1.0, ("transferred_lr",), "transferred_lr is -1"),
        ("LR of truth", True, ("transferred_lr",), "transferred_lr is 'True'"),
        ("schema", 99, ("schema_version",), "has schema_version 99"),
        ("schema of lists", [1] * 1000, ("schema_version",), "has schema_version"),
        ("fingerprint", [], ("fingerprint",), "fingerprint is"),
        ("rules", {}, ("rules",), "it holds no optimum"),
        ("rules of a list", [], ("rules",), "rules is"),
        ("other rules", {"sqrt": []}, ("rules",), "holds no optimum"),
        ("rule of a word", "none", ("rules", "factored"), "not a list"),
        ("optimum of a number", 5, first, "is damaged"),
        ("at 0", 0, (*first, "at"), "at is 0"),
        ("at -4", -4, (*first, "at"), "at is -4"),
        ("at 1.5", 1.5, (*first, "at"), "at is '1.5'"),
        ("at a huge number", 10**400, (*first, "at"), "at is"),
        ("at another's place", 2, (*first, "at"), "two optima of one place"),
        ("censored by a number", 7, (*first, "censored"), "censored is '7'"),
        ("vertex moved by hand", -3.0, (*first, "log2_lr", "estimate"), "log2_lr"),
        ("vertex beyond reason", 1e6, (*first, "log2_lr_by_seed", "0"), "log2_lr_by_seed "),
        ("vertex a huge number", 10**400, (*first, "log2_lr_by_seed", "0"), "log2_lr_by_seed "),
        ("vertex a word", "-9", (*first, "log2_lr_by_seed", "0"), "log2_lr_by_seed "),
        ("loss moved by hand", 9.0, (*first, "loss_by_seed", "0"), "mean over seeds"),
        ("loss null", None, (*first, "loss_by_seed", "0"), "loss_by_seed 0 is 'None'"),
        ("loss beyond reason", 1e300, (*first, "loss_by_seed", "0"), "loss_by_seed holds"),
        ("one seed", {"0": 1.0}, (*first, "log2_lr_by_seed"), "fewer than two seeds"),
        ("other seeds", {"7": 2.0, "8": 2.0}, (*first, "loss_by_seed"), "mean over seeds"),
        ("interval turned round", {"estimate": -9, "low": 0, "high": -10}, (*first, "log2_lr"), "no interval"),
        ("tolerance", -1, ("loss_tolerance",), "loss_tolerance is -1"),
    ]:
        yield Bad("baselines", name, baseline(put(value, *place)), phrase)
    for key in ("axis", "unit", "confidence", "transferred_lr", "fingerprint", "rules", "schema_version"):
        yield Bad("baselines", f"without {key}", baseline(lambda data, key=key: data.pop(key)), "")
    for name, text, phrase in [
        ("empty", "", "is not JSON"),
        ("cut off", '{"schema_version": 1, "rules', "is not JSON"),
        ("a list", "[]", "no schema_version"),
        ("NaN", '{"schema_version": 1, "transferred_lr": NaN}', "no JSON number"),
        ("a key twice", '{"schema_version": 1, "schema_version": 1}', "stands there twice"),
        ("depth", "[" * 100_000, "is not JSON"),
        ("marks of a merge", "<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> theirs\n", "is not JSON"),
        ("UTF-16", '{"schema_version": 1}'.encode("utf-16"), "is not JSON"),
        ("noise", random.Random(6).randbytes(500), "is not JSON"),
        ("the table", TEXT, "is not JSON"),
    ]:
        yield Bad("baselines", name, baseline(text), phrase)
    for text, phrase in [
        ("/dev/null", "Is a device"),
        ("/dev/zero", "Is a device"),
        ("{folder}", "Is a directory"),
        ("{folder}/none.json", "there is no baseline"),
    ]:
        yield Bad(
            "baselines", text, lambda at, text=text: [*file(TEXT)(at), "--baseline", text.format(folder=at)], phrase
        )
    for options, phrase in [(["--moved", "0"], "tolerance is 0.0"), (["--moved", "inf"], "tolerance is inf")]:
        yield Bad("baselines", " ".join(options), baseline(lambda data: None, *options), phrase)


# -- pipes, devices, folders, links


def through_pipe(content: bytes) -> Callable[[Path], Sequence[str]]:
    """A named pipe into which another thread writes."""

    def make(folder: Path) -> Sequence[str]:
        pipe = folder / "pipe"
        os.mkfifo(pipe)

        def write() -> None:
            with contextlib.suppress(BrokenPipeError), pipe.open("wb") as stream:
                stream.write(content)

        threading.Thread(target=write, daemon=True).start()
        return [str(pipe)]

    return make


def link(target: str) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        (folder / "link.csv").symlink_to(target.format(folder=folder))
        return [str(folder / "link.csv")]

    return make


def sock(folder: Path) -> Sequence[str]:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(folder / "sock"))
    return [str(folder / "sock")]


def standard_input(content: bytes) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        sys.stdin = io.TextIOWrapper(io.BytesIO(content))
        return ["-"]

    return make


def places() -> Iterator[Bad]:
    for name, content, phrase, status in [
        ("whole", TEXT.encode(), "FLAT", (0,)),
        ("empty", b"", "is empty", REFUSED),
        ("noise", random.Random(7).randbytes(200_000), "is not", REFUSED),
        ("cut off", TEXT.encode()[:1005], "cells", REFUSED),
        ("a database", study_bytes(False), "must be opened where it lies", REFUSED),
        ("cut-off Parquet", b"PAR1" + bytes(100), "is not a Parquet table", REFUSED),
        ("broken JSON", b'{"loops": 1', "is not JSON", REFUSED),
    ]:
        yield Bad("pipes", name, through_pipe(content), phrase, status)
        yield Bad("standard input", name, standard_input(content), phrase, status)
    for device in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/full", "/dev/tty"):
        if os.path.exists(device):
            yield Bad("devices", device, url(device), "cannot read")
    yield Bad("places", "a folder", lambda folder: [str(folder)], "Is a directory")
    yield Bad("places", "nothing", url("{folder}/none.csv"), "No such file or directory")
    yield Bad("places", "no name", url(""), "cannot read")
    yield Bad("places", "a name without end", url("{folder}/" + "x" * 5000), "File name too long")
    yield Bad("places", "a name below a file", lambda at: [file(TEXT)(at)[0] + "/runs.csv"], "Not a directory")
    yield Bad("places", "a name with a command", url("{folder}/\n::error::x\x1b[31m"), "No such file")
    yield Bad("places", "a socket", sock, "cannot read")
    yield Bad("places", "a link to nothing", link("{folder}/none"), "No such file")
    yield Bad("places", "a link to itself", link("{folder}/link.csv"), "cannot read")
    yield Bad("places", "a link to a folder", link("{folder}"), "Is a directory")
    yield Bad("places", "a link to a device", link("/dev/zero"), "Is a device")


CLASSES = (
    quotes, controls, encodings, headers, numbers, rows, unfinished, json_lines, parquet, databases, baselines, places
)  # fmt: skip


def all_bad() -> list[Bad]:
    return [bad for of_class in CLASSES for bad in of_class()]
