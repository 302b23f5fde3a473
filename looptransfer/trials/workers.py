"""The worker processes that make the runs of a search, on this machine; others may do so on others.

There is no planner and no queue: every worker asks the search what is wanted, leaves out what the ledger says is
finished or being made, and claims the next. A run that fails, or whose worker ends, is kept as failed with its cause;
the others are made, and at the end it is told.
"""

import contextlib
import itertools
import math
import multiprocessing
import multiprocessing.connection
import pickle
import random
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from looptransfer.checks import check_number
from looptransfer.errors import FailedRunError, InputError, explained_in
from looptransfer.trials.devices import Slot, environment, here
from looptransfer.trials.ledger import Claim, Ledger
from looptransfer.trials.progress import Progress, progress_of
from looptransfer.trials.run import Run, Trainable, Trial, pickled
from looptransfer.trials.search import Search
from looptransfer.user_code import UNGUARDED, WORKER, directory_kept, end_with_parent, user_code

HOPELESS = 2  # failed runs after which a loop count of which none is finished is given up
KILLS = 3  # times that the worker of one run may be killed from outside before the run counts as failed
FALSE_STARTS = 3  # workers that may be killed before they claimed a run
KILLED = (-9, -15)  # exit codes of a process that was killed from outside
SLOW, NEVER_SLOW = 10, 60.0  # times the median that a run takes before it is told, and seconds below which it is not
APART = 2.0  # times the least of the LRs that are told to give one loss
CHANCE = 12  # digits in which further losses agree; two of float32 are enough, and five such as 2.01
POLL = 0.5  # seconds between looks at what others make
LEAVE = 5.0  # seconds that workers have to end in when all is made


@dataclass(frozen=True)
class Job:
    """The work of worker processes.

    Attributes:
        url, name: of the study.
        search: which runs are to be made.
        since: the id of the trial after which failures count.
        directory: the folder that holds one for every run.
        limit: seconds after which a run counts as failed.
    """

    url: str
    name: str
    search: Search
    since: int
    directory: Path
    limit: float | None


@explained_in("cluster.md#runs-that-fail")
def run_search(
    trainable: Trainable,
    search: Search,
    ledger: Ledger,
    places: Sequence[Slot],
    limit: float | None = None,
    called: str = "sweep",
    alone: bool = False,
) -> None:
    """Make every run that `search` wants and the ledger lacks.

    Interrupted by anything, kill -9 included, it goes on where it was when called again: a finished run is never
    repeated. With one place the runs are made in this process, else in one of its own at each place. A run that fails
    is left out, and tried again by the next call.

    Args:
        trainable: what is trained.
        search: which runs.
        ledger: admitted for what is trained.
        places: of the workers, as `slots` gives them.
        limit: seconds after which a run counts as failed; needs processes.
        called: what the search is, for the progress.
        alone: where the training cannot be sent to another process, train in this one.

    Raises:
        InputError: a limit out of range, or the training cannot be sent to workers.
        LedgerError: the ledger did not answer for minutes.
        FailedRunError: runs failed, or worker processes could not be started.
    """
    check_limit(limit)
    job = Job(ledger.url, ledger.name, search, ledger.since, ledger.directory, limit)
    todo = _Todo(ledger, search)
    with progress_of(called) as progress:
        here_only = todo.ends() or (len(places) == 1 and limit is None)
        data = None if here_only else _sent(trainable, alone and limit is None)
        if data is None:
            _work(todo, job, trainable, here(places[0]), progress=progress)
        else:
            _supervise(job, todo, data, places, progress)
        todo.show(progress)
    todo.check_complete()


def check_limit(limit: float | None) -> None:
    """Refuse a time limit that is none."""
    if limit is not None:
        check_number("the time limit, in seconds,", limit)


def _sent(trainable: Trainable, alone: bool) -> bytes | None:
    """The training as worker processes are sent it; None where it cannot be and this process may train alone."""
    try:
        return pickled(trainable)
    except InputError as error:
        if not alone:
            raise
        print(f"looptransfer: training in this process alone: {error}", file=sys.stderr)
        return None


# -- what is to be made


class _Todo:
    """The runs of a search by what the ledger says of them."""

    def __init__(self, ledger: Ledger, search: Search) -> None:
        self.ledger, self.search = ledger, search
        self.answer: Sequence[Run] = ()  # of the search, when it was asked last
        self.asked_at = -1  # finished runs there were then
        self.wanted: dict[Run, None] = {}
        self.left: dict[Run, None] = {}  # neither finished nor failed
        self.settled = 0  # of the ledger's settled runs, those that are taken into account
        self.by_lr: dict[tuple[str, int, int], dict[float, float]] = {}  # rule, N, seed -> losses
        self.update()

    def update(self) -> None:
        """Take up what has changed in the ledger; costs what changed, and not what is finished."""
        self.ledger.refresh()
        finished, failed = self.ledger.finished, self.ledger.failed
        if len(finished) != self.asked_at:
            answer, self.asked_at = self.search.wanted(self.ledger.losses), len(finished)
            if answer is not self.answer:
                self.answer, self.wanted = answer, dict.fromkeys(answer)
                self.left = {run: None for run in self.wanted if run not in finished and run not in failed}
        for run in self.ledger.settled[self.settled :]:
            self.left.pop(run, None)
            if run in finished:
                losses = self.by_lr.setdefault((run.rule, run.loops, run.seed), {})
                losses[run.lr] = self.ledger.losses[run]
                _refuse_without_lr(run, losses)
        self.settled = len(self.ledger.settled)

    def coming(self) -> Collection[Run]:
        """Runs that are neither finished nor failed nor given up."""
        failures = Counter((run.rule, run.loops) for run in self.ledger.failed)
        hopeless = {group for group, times in failures.items() if times >= HOPELESS}
        if not hopeless:
            return self.left
        hopeless -= {(run.rule, run.loops) for run in self.ledger.finished}
        return [run for run in self.left if (run.rule, run.loops) not in hopeless]

    def ends(self) -> bool:
        """Nothing is still to come."""
        return not self.coming()

    def next_run(self) -> Run | None:
        """A run that nobody makes: one of the first few, so that workers who ask together seldom meet."""
        making = {making.run for making in self.ledger.making.values()}
        still_open = (run for run in self.coming() if run not in making)
        first = list(itertools.islice(still_open, 1 + 4 * len(making)))
        return random.choice(first) if first else None

    def show(self, progress: Progress) -> None:
        done = [run for run in self.wanted if run in self.ledger.finished]
        progress.show(done, self.coming(), f"{len(done)} of {len(self.wanted)} runs")

    def check_complete(self) -> None:
        """
        Raises:
            FailedRunError: runs are missing.
        """
        missing = [run for run in self.wanted if run not in self.ledger.finished]
        if not missing:
            return
        failed = [(run, error) for run, error in self.ledger.failed.items() if run in self.wanted]
        message = f"{len(missing)} of {len(self.wanted)} runs are missing; the same call makes only what lacks"
        if failed:
            (run, error), left_out = failed[0], len(missing) - len(failed)
            message += f". {len(failed)} failed" + f" and {left_out} more of their N were left out" * (left_out > 0)
            message += f"; {_name(run)}: {error}"
        raise FailedRunError(message)


def _refuse_without_lr(run: Run, losses: Mapping[float, float]) -> None:
    """Refuse a training that comes to one loss whatever the LR, once that is no chance of a loss of few digits.

    Raises:
        InputError: the LR does not reach it.
    """
    loss = losses[run.lr]
    digits = len(repr(abs(loss)).partition("e")[0].replace(".", "").strip("0"))
    alike = math.isfinite(loss) and set(losses.values()) == {loss} and max(losses) >= APART * min(losses)
    if alike and digits * (len(losses) - 1) >= CHANCE:
        raise InputError(
            f"the runs at the LRs {', '.join(f'{lr:.4g}' for lr in sorted(losses))} ({run.rule}, N = {run.loops}, seed "
            f"{run.seed}) all come to the loss {loss!r}, so the LR does not reach the training; see that it is used"
        )


def _name(run: Run) -> str:
    return f"{run.rule}, N = {run.loops}, LR {run.lr:.6g}, seed {run.seed}"


def _work(
    todo: _Todo,
    job: Job,
    trainable: Trainable,
    place: Slot,
    sender: Connection | None = None,
    progress: Progress | None = None,
) -> None:
    """Make runs until none is open or being made. This is the whole of a worker."""
    ledger = todo.ledger
    while not todo.ends():
        if progress is not None:
            todo.show(progress)
        run = todo.next_run()
        claim = None if run is None else ledger.claim(run)
        if claim is not None:
            if sender is not None:
                sender.send(claim)
            _make(ledger, claim, trainable, place.trial(claim.run, job.directory / _folder(claim.run)))
            if sender is not None:
                sender.send(None)
        elif run is None:
            time.sleep(POLL)
        todo.update()


def _folder(run: Run) -> str:
    return f"{run.rule}-n{run.loops}-lr{run.lr!r}-seed{run.seed}"


def _make(ledger: Ledger, claim: Claim, trainable: Trainable, trial: Trial) -> None:
    with ledger.counting(claim):
        try:
            with directory_kept():
                outcome = trainable.train(trial)
        except InputError as error:
            ledger.fail(claim, str(error))
            return
    ledger.finish(claim, outcome)


# -- worker processes


def _worker(job: Job, data: bytes, place: Slot, sender: Connection) -> None:
    """Entry point of a worker process. It ends with its parent; its last word is "done", or the error that ended it."""
    end_with_parent()
    try:
        fix = "; define its functions in a module that can be imported, or pass workers=1"
        with user_code("a worker process cannot load the experiment", fix=fix):
            trainable = pickle.loads(data)
            if not isinstance(trainable, Trainable):
                raise TypeError(f"it comes back as a {type(trainable).__name__}")
        ledger = Ledger(job.url, job.name, create=False, since=job.since)
        _work(_Todo(ledger, job.search), job, trainable, place, sender)
        sender.send("done")
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        sender.send(error)
    except Exception:
        sender.send(RuntimeError(traceback.format_exc()))


class _Process:
    """A worker process, and the last that was heard of it: the claim that it makes, or its last word."""

    def __init__(self, job: Job, data: bytes, place: Slot) -> None:
        self.place = place
        context = multiprocessing.get_context("spawn")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_worker, args=(job, data, place, sender), name=WORKER)
        with environment(place.environment()):
            self.process.start()
        sender.close()
        self.heard: Claim | Exception | Literal["done"] | None = None
        self.since = time.monotonic()
        self.claims = 0

    def listen(self) -> bool:
        """Take up what it says; whether it lives, or has said its last word.

        Raises:
            InputError: the script is not guarded, or what the worker raised.
            RuntimeError: ours failed in it.
        """
        alive = self.process.is_alive()  # before the pipe is read, or a last word could be missed
        with contextlib.suppress(EOFError, OSError):
            while self.receiver.poll():
                self.heard = self.receiver.recv()
                self.since = time.monotonic()
                self.claims += isinstance(self.heard, Claim)
        if isinstance(self.heard, Exception):
            raise self.heard
        if self.process.exitcode == 130:
            raise KeyboardInterrupt
        if self.process.exitcode == UNGUARDED and not alive:
            raise InputError(
                "the script starts trainings when it is imported, as worker processes do; put what it does under "
                '`if __name__ == "__main__":`, or pass workers=1'
            )
        return alive or self.heard == "done"

    def over(self, limit: float | None) -> bool:
        """The run that it makes takes longer than it may."""
        return limit is not None and isinstance(self.heard, Claim) and time.monotonic() - self.since > limit


class _Pool:
    """Worker processes, started anew when they end before all is made."""

    def __init__(self, job: Job, ledger: Ledger, data: bytes, places: Sequence[Slot]) -> None:
        self.job, self.ledger, self.data = job, ledger, data
        self.kills: Counter[Run] = Counter()
        self.false_starts = 0
        self.killed_for_memory = _memory_kills()
        self.workers = [_Process(job, data, place) for place in places]

    def look(self) -> bool:
        """See to those that ended or take too long; whether any is at work."""
        for number, worker in enumerate(self.workers):
            error = None
            if worker.over(self.job.limit):
                worker.process.kill()
                worker.process.join()
                error = f"it took longer than the limit of {self.job.limit:g} s"
            if not worker.listen():
                self._lost(worker, error)
                self.workers[number] = _Process(self.job, self.data, worker.place)
        return not all(worker.heard == "done" for worker in self.workers)

    def _lost(self, worker: _Process, error: str | None) -> None:
        code = worker.process.exitcode
        kills, self.killed_for_memory = self.killed_for_memory, _memory_kills()
        cause = "was killed for want of memory" if self.killed_for_memory > kills else "was killed from outside"
        crash = f"ended with exit status {code}: the experiment, or a library that it uses, ends its process or crashes"
        if not isinstance(worker.heard, Claim):
            self.false_starts += not worker.claims
            if code not in KILLED or self.false_starts > FALSE_STARTS:
                moment = "between two runs" if worker.claims else "while it started"
                how = f"{cause} (exit status {code})" if code in KILLED else crash
                raise FailedRunError(f"a worker process {how}, {moment}; with workers=1 the place may show")
            return
        claim = worker.heard
        self.kills[claim.run] += 1
        if error is None and code not in KILLED:
            error = f"its worker process {crash}; with workers=1 the place may show"
        elif error is None and self.kills[claim.run] >= KILLS:
            error = f"its worker process {cause} {KILLS} times (exit status {code}); try fewer workers"
        self.ledger.refresh()
        self.ledger.release(claim.number, error)

    def wait(self) -> None:
        """Wait a moment, or until a process ends."""
        alive = [worker.process.sentinel for worker in self.workers if worker.process.is_alive()]
        multiprocessing.connection.wait(alive, timeout=1.0)

    def end(self, patience: float) -> None:
        for worker in self.workers:
            worker.process.join(patience)
            worker.process.kill()
            worker.process.join()


def _supervise(job: Job, todo: _Todo, data: bytes, places: Sequence[Slot], progress: Progress) -> None:
    pool = _Pool(job, todo.ledger, data, places)
    patience = 0.0
    try:
        while not todo.ends() and pool.look():
            todo.show(progress)
            _tell_slow(todo.ledger)
            pool.wait()
            todo.update()
        patience = LEAVE
    finally:
        pool.end(patience)


def _tell_slow(ledger: Ledger) -> None:
    """Say once of a run that it takes many times what others took, for their loop counts."""
    if not ledger.making or not ledger.finished:
        return
    fresh = list(itertools.islice(reversed(ledger.finished.items()), 100))
    median = statistics.median(row["seconds"] / run.loops for run, row in fresh)
    for making in ledger.making.values():
        seconds = time.monotonic() - making.first_seen
        if not making.is_slow and seconds > max(NEVER_SLOW, SLOW * median * making.run.loops):
            making.is_slow = True
            print(
                f"looptransfer: a run has taken {seconds:.0f} s, {SLOW} times what others of its N take, or more "
                f"({_name(making.run)}); a time limit would end it",
                file=sys.stderr,
                flush=True,
            )


def _memory_kills() -> int:
    """The number of processes that the kernel has killed for want of memory, where it tells."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/sys/fs/cgroup/memory.events").read_text().splitlines():
            name, count = line.split()
            if name == "oom_kill":
                return int(count)
    return 0
