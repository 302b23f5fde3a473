"""A command line as a training: started with a run's coordinates filled in, its loss read from what it writes."""

import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from looptransfer.checks import check_count, check_number
from looptransfer.errors import InputError, UserCodeError
from looptransfer.rules import Rule
from looptransfer.trials import guard
from looptransfer.trials.function import Report, Reporting
from looptransfer.trials.run import Trial

LOG = "output.log"  # standard output and error of a command, in its run's directory
STDOUT = "stdout:"
PLACEHOLDERS = ("loops", "lr", "seed", "rule", "dir", "device")
NEEDED = ("loops", "lr", "seed")
SHOWN = 40  # lines of a log that failed: torchrun's own end, and the error before it
LOOK_EVERY = 0.2  # seconds between looks at what a command has written, longer where a look takes long
LOOKING = 0.05  # share of the time that looks may take


@dataclass(frozen=True)
class Command(Reporting):
    """A training by a command of your own, in any language and on any devices.

    The words of `text` hold the placeholders {loops}, {lr}, {seed}, {rule}, {dir} and {device}; a brace is written
    twice. There is no shell: for pipes and variables write `bash -c '…'`. Its output is kept in {dir}/output.log. It
    ends when the process that started it does; started again for the same run, after a kill, a time limit or a failure,
    it finds what it left in {dir}.

    Attributes:
        text: the command line.
        metric: where the loss in nats is, the last one counts: FILE:KEY, where FILE holds {dir} and is JSON lines, or
            CSV by its name; or stdout:PATTERN, a regular expression whose group is the loss. A key or column `step`, or
            a group of this name, is the step.
        version: changes where results of the old script should not be mixed with those of the new one.
        time_limit: seconds that an attempt may take; None is without end.
        retries: further attempts after one that failed or took too long.
        env: variables of its environment; values may hold placeholders. They are part of the identity, in plain text.

    Raises:
        InputError: an unknown placeholder, one of {loops}, {lr} and {seed} is missing, a metric of another form, or
            numbers out of range.
    """

    text: str
    metric: str
    version: str = ""
    time_limit: float | None = None
    retries: int = 0
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _split(self.text):
            raise InputError("the command is empty; write one with {loops}, {lr}, {seed} and {dir} in it")
        file = [] if self.metric.startswith(STDOUT) else [("the metric", self.metric)]
        for what, text in [("the command", self.text), *file, *self._variables()]:
            unknown = sorted(_placeholders(what, text) - {*PLACEHOLDERS})
            if unknown:
                raise InputError(
                    f"{what} {text!r} holds {{{unknown[0]}}}, which is no placeholder; there are "
                    f"{', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}, and a brace itself is written twice"
                )
        missing = [name for name in NEEDED if not self.uses(name)]
        if missing:
            raise InputError(
                f"the command {self.text!r} lacks {{{missing[0]}}}, so that all runs would have the same {missing[0]}; "
                "write it where the value belongs"
            )
        self._check_metric()
        if self.time_limit is not None:
            check_number("the time limit, in seconds,", self.time_limit)
        check_count("retries", self.retries, 0)

    def _check_metric(self) -> None:
        if self.metric.startswith(STDOUT):
            try:
                groups = re.compile(self.metric.removeprefix(STDOUT))
            except re.error as error:
                raise InputError(f"the pattern of the metric {self.metric!r} is wrong: {error}") from None
            if groups.groups - ("step" in groups.groupindex) != 1:
                raise InputError(
                    f"the pattern of the metric {self.metric!r} must have one group, round the loss, such as "
                    r"'stdout:val_loss=(\S+)'"
                )
            return
        file, _, key = self.metric.rpartition(":")
        if not file or not key:
            raise InputError(
                f"the metric is {self.metric!r}; write FILE:KEY, such as '{{dir}}/log.jsonl:val_loss', or "
                r"'stdout:val_loss=(\S+)'"
            )
        if "dir" not in _placeholders("the metric", file):
            raise InputError(
                f"the file of the metric {self.metric!r} lacks {{dir}}, so that runs would read each other's losses; "
                "let the command write into {dir}"
            )

    def __str__(self) -> str:
        return f"the command {self.text!r}"

    def uses(self, name: str) -> bool:
        """True where a placeholder reaches the command."""
        return any(name in _placeholders(what, text) for what, text in [("", self.text), *self._variables()])

    def identity(self) -> dict[str, Any]:
        """The text of the command, its metric, its environment and its version."""
        options = {"version": self.version or None, "env": dict(self.env) or None}
        options = {key: value for key, value in options.items() if value is not None}
        return {"command": self.text, "metric": self.metric, **options, "looptransfer": version("looptransfer")}

    def check(self, first: Trial, loops: Sequence[int], seeds: Sequence[int], rules: Sequence[Rule]) -> dict[int, Any]:
        """As `Reporting.check`; a rule that cannot reach the command is refused before anything is started."""
        if len(set(rules)) > 1 and not self.uses("rule"):
            raise InputError(
                f"the command does not use {{rule}}, so that {', '.join(rules)} would train the same; add "
                "--rule {rule}, and give it to lt.parametrize in the script"
            )
        return super().check(first, loops, seeds, rules)

    def reports(self, trial: Trial) -> Iterator[Report]:
        """The losses that the command writes, as it writes them; another attempt follows one that fails."""
        for left in range(self.retries, -1, -1):
            try:
                yield from self._attempt(trial)
                return
            except UserCodeError:
                if not left:
                    raise

    def _attempt(self, trial: Trial) -> Iterator[Report]:
        words, env = self._words(trial)
        log = trial.directory / LOG
        read = self._reader(trial, log.stat().st_size if log.exists() else 0)
        trial.directory.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, *words],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # a Ctrl-C is for this process, which ends the command
            )
        deadline = math.inf if self.time_limit is None else time.monotonic() + self.time_limit
        reports: list[Report] = []
        try:
            pause = LOOK_EVERY
            while _runs(process, min(pause, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    limit = f"ran past its limit of {self.time_limit:g} s"
                    raise UserCodeError(f"{self} {limit}{_end_of(log)}")
                looked = time.monotonic()
                fresh, reports = _news(reports, read(False))
                yield from fresh
                pause = max(LOOK_EVERY, (time.monotonic() - looked) / LOOKING)
        finally:
            _end(process)
        fresh, reports = _news(reports, read(True))
        diverged = bool(reports) and not math.isfinite(reports[-1][1])
        if process.returncode and not diverged:
            raise UserCodeError(f"{self} {_ended(process.returncode)}{_end_of(log)}")
        if not reports:
            place = f"{self._filled(self.metric, trial)}{self._found(trial)}"
            raise UserCodeError(f"{self} ended without a loss at {place}{_end_of(log)}")
        yield from fresh

    def _words(self, trial: Trial) -> tuple[list[str], dict[str, str]]:
        """The words of the command, and its whole environment."""
        words = [self._filled(word, trial) for word in _split(self.text)]
        variables = {name: self._filled(value, trial) for name, value in self.env.items()}
        port = str(_free_port())  # or two of torchrun on one machine would meet at its default
        ports = {name: port for name in ("MASTER_PORT", "PET_MASTER_PORT") if name not in os.environ}
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **ports, **trial.environment, **variables}
        if shutil.which(words[0], path=env.get("PATH")) is None:
            raise UserCodeError(f"{self} cannot be started: there is no program {words[0]!r}; see the PATH")
        return words, env

    def _filled(self, text: str, trial: Trial) -> str:
        if text.startswith(STDOUT):
            return text
        return text.format(
            loops=trial.loops,
            lr=trial.lr,
            seed=trial.seed,
            rule=trial.rule,
            dir=str(trial.directory),
            device=trial.device.partition(":")[0],  # its environment leaves it no other
        )

    def _variables(self) -> list[tuple[str, str]]:
        return [(f"env {name}", value) for name, value in self.env.items()]

    def _reader(self, trial: Trial, start: int) -> "_Reader":
        if self.metric.startswith(STDOUT):
            pattern = re.compile(self.metric.removeprefix(STDOUT))
            return _Reader(trial.directory / LOG, start, lambda text, file: _from_output(text, pattern, file))
        name, _, key = self.metric.rpartition(":")
        read = _from_csv if name.lower().endswith(".csv") else _from_json_lines
        return _Reader(Path(self._filled(name, trial)), 0, lambda text, file: read(text, key, file))

    def _found(self, trial: Trial) -> str:
        """A remark on the place where the loss should be, of a metric in JSON lines."""
        name, _, key = self.metric.rpartition(":")
        if self.metric.startswith(STDOUT) or name.lower().endswith(".csv"):
            return ""
        try:
            text = Path(self._filled(name, trial)).read_bytes().decode("utf-8-sig", errors="replace")
        except OSError as error:
            return f" ({error.strerror})"
        keys = dict.fromkeys(key for row in _json_lines(text).values() for key in row)
        if not keys:
            return " (no line of it is a JSON object; write one object a line)"
        return f" (no line has a value for {key!r}; there are {', '.join(keys)[:200]})"


class _Reader:
    """The losses in a file that grows. It is read again when it has changed."""

    def __init__(self, path: Path, start: int, losses: "Losses") -> None:
        self.path, self.start, self.losses = path, start, losses
        self.seen: tuple[int, int] | None = None
        self.reports: list[Report] = []

    def __call__(self, whole: bool) -> list[Report]:
        """All losses up to now; the last line only where the file is whole, and not being written."""
        try:
            status = self.path.stat()
            if whole or (status.st_size, status.st_mtime_ns) != self.seen:
                self.seen = status.st_size, status.st_mtime_ns
                text = self.path.read_bytes()[self.start :].decode("utf-8-sig", errors="replace")
                lines = text if whole else text[: text.rfind("\n") + 1]
                self.reports = self.losses(lines, str(self.path))
        except OSError:  # it is not there yet
            self.reports = []
        return self.reports


Losses = Callable[[str, str], list[Report]]  # of a text, and the file that an error names


def _from_json_lines(text: str, key: str, file: str) -> list[Report]:
    """Lines without the key are not of the metric; lines that are no JSON are somebody else's."""
    rows = {number: row for number, row in _json_lines(text).items() if row.get(key) is not None}
    return [_report(row.get("step"), row[key], key, f"{file}, line {number}") for number, row in rows.items()]


def _json_lines(text: str) -> dict[int, dict[str, Any]]:
    """The objects of JSON lines, by the number of their line."""
    rows = {}
    for number, line in enumerate(text.splitlines(), start=1):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows[number] = row
    return rows


def _from_csv(text: str, key: str, file: str) -> list[Report]:
    rows = csv.DictReader(io.StringIO(text))
    if text and key not in (rows.fieldnames or ()):
        raise UserCodeError(f"{file} has no column {key!r}; there are {', '.join(rows.fieldnames or ())[:200]}")
    return [_report(row.get("step"), row[key], key, f"{file}, line {rows.line_num}") for row in rows if row[key]]


def _from_output(text: str, pattern: re.Pattern[str], file: str) -> list[Report]:
    name = next(number for number in range(1, pattern.groups + 1) if number != pattern.groupindex.get("step"))
    matches = [match for line in text.splitlines() for match in [pattern.search(line)] if match and match[name]]
    with_step = "step" in pattern.groupindex
    return [_report(match["step"] if with_step else None, match[name], "the loss", file) for match in matches]


def _report(step: Any, loss: Any, key: str, place: str) -> Report:
    """A loss, which may stand there as text, and a step where that is a whole number."""
    try:
        number = math.nan if isinstance(loss, bool) else float(loss)
    except (TypeError, ValueError):
        raise UserCodeError(f"{place}: {key} is {loss!r:.100}, which is no number") from None
    try:
        return int(float(step)), number
    except (TypeError, ValueError, OverflowError):
        return None, number


def _news(before: list[Report], reports: list[Report]) -> tuple[list[Report], list[Report]]:
    """The new ones among the reports, all of them where the file was written anew; and the reports."""
    grown = reports[: len(before)] == before
    return (reports[len(before) :] if grown else reports), reports


def _placeholders(what: str, text: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise InputError(f"{what} {text!r} cannot be filled in: {error}; write a brace itself twice") from None


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"the command {text!r} cannot be split into words: {error}") from None


def _runs(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """True where a process still runs after a while."""
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return True
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a command, if it still runs, and wait for it."""
    assert process.stdin is not None
    process.stdin.close()
    if _runs(process, guard.GRACE + 5):
        process.kill()
        process.wait()


def _ended(status: int) -> str:
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(status - 128).name}" + ", out of memory perhaps" * (status == 137)
    return f"ended with exit status {status}"


def _end_of(log: Path) -> str:
    """The last lines of a log, for an error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:]
    shown = "".join(f"\n  | {line[:200]}" for line in lines) or " is empty"
    return f"; the end of {log}{':' * bool(lines)}{shown}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
