"""Runs the command on many experiment files, each in a process of its own that is forked from a warm one.

A fork costs milliseconds where a start with torch costs seconds. In the forked process the command's own processes are
forked as well, all else is as on a command line: `main()` with this process's words, standard output and error.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 60.0  # seconds after which a command counts as hanging


@dataclass(frozen=True)
class Trial:
    """A command line in a folder of its own, with the files that it needs."""

    words: list[str]
    files: dict[str, str]  # contents in latin-1, so that any bytes can stand in them


@dataclass(frozen=True)
class Outcome:
    status: int  # negative for a signal, -1000 where it hung
    out: str
    err: str
    seconds: float


HUNG = -1000


def run_all(trials: list[Trial], folder: Path) -> list[Outcome]:
    """The outcome of every trial, in order."""
    (folder / "trials.json").write_text(json.dumps([asdict(trial) for trial in trials]))
    command = [sys.executable, "-m", "tests.forked", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
    return [Outcome(**outcome) for outcome in json.loads((folder / "outcomes.json").read_text())]


def _run(trial: Trial, place: Path) -> Outcome:
    place.mkdir()
    for name, text in trial.files.items():
        (place / name).write_bytes(text.encode("latin-1"))
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(place)
        for number, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.argv = ["looptransfer", *trial.words]
        status = 99
        try:
            status = _main()
        finally:
            os._exit(status)
    status = _wait(child, started + LIMIT)
    out, err = ((place / name).read_text(errors="replace") for name in ("out.txt", "err.txt"))
    return Outcome(status, out, err, time.monotonic() - started)


def _main() -> int:
    from looptransfer.command.cli import main  # noqa: PLC0415

    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked  # type: ignore[assignment]
    try:
        status = main()
    except SystemExit as usage:  # of argparse
        status = int(str(usage.code))
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _wait(child: int, end: float) -> int:
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return HUNG


if __name__ == "__main__":
    import optuna  # noqa: F401
    import torch
    import torch._dynamo

    import looptransfer.command.inspection
    import looptransfer.coordcheck.run
    import looptransfer.trials.gate
    import looptransfer.trials.sweep  # noqa: F401

    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    trials = [Trial(**trial) for trial in json.loads((home / "trials.json").read_text())]
    outcomes = [asdict(_run(trial, home / str(number))) for number, trial in enumerate(trials)]
    (home / "outcomes.json").write_text(json.dumps(outcomes))
