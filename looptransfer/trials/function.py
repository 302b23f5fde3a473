"""A training function or loop of the user's own, of which nothing is seen but the losses that it reports."""

import contextlib
import inspect
import json
import math
import numbers
import shutil
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from looptransfer.errors import InputError, PairingWarning, UserCodeError
from looptransfer.files import write_file
from looptransfer.rules import RULES, Rule
from looptransfer.transfer.provenance import fingerprint
from looptransfer.trials.bound import code_of, module_of, values_of
from looptransfer.trials.identity import BOUND
from looptransfer.trials.run import Outcome, Trainable, Trial
from looptransfer.user_code import directory_kept, place, qualified, refuse_unguarded, user_code

FEW = 3  # losses by which the starts of two trainings are compared
PAIRED = 10  # times by which two seeds differ more than two equal runs, where the seed says what a run is
NO_LOSS = "{} reported no loss"
CHECKED = "pairing.json"  # which trainings were looked at, in the folder of the runs
Report = tuple[int | None, float]  # a step, where it is known, and a loss in nats

_changed: dict[str, dict[str, Any]] = {}  # hash of a function -> first values, by name, of what its trainings change


class Reporting(ABC):
    """A training that is known by its reports alone. Its last loss is its outcome; one that is no number ends it."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that tell results of this training from those of others."""

    @abstractmethod
    def reports(self, trial: Trial) -> Iterator[Report]:
        """Train, and give losses as they come. Closing the iterator ends the training.

        Raises:
            InputError: the training fails, or reports what is no loss.
        """

    def train(self, trial: Trial) -> Outcome:
        """Make the run.

        Raises:
            InputError: as `reports`, or there was no report.
        """
        started = time.perf_counter()
        trial.directory.mkdir(parents=True, exist_ok=True)
        report, last = None, math.nan
        with contextlib.closing(self.reports(trial)) as reports:  # type: ignore[type-var]
            for report in reports:
                if not math.isfinite(report[1]):
                    break
                last = report[1]
        if report is None:
            raise UserCodeError(NO_LOSS.format(self))
        with contextlib.suppress(OSError):
            trial.directory.rmdir()  # where nothing was left in it
        (step, loss), seconds = report, time.perf_counter() - started
        if not math.isfinite(loss):
            return Outcome(None, None, step, math.inf, True, seconds, last)
        return Outcome(None, None, step, loss, False, seconds, last)

    def probe(self, trial: Trial) -> dict[str, Any]:
        """Nothing: the start of a training that is not ours cannot be seen."""
        return {}

    def check(self, first: Trial, loops: Sequence[int], seeds: Sequence[int], rules: Sequence[Rule]) -> dict[int, Any]:
        """Compare the first losses of a few trainings: two equal runs, another seed, another N, another rule.

        What was found is printed, and kept in the folder of the runs, so that it is found out once.

        Rules that differ over L alone may report the same, which is told: at the base depth, not seen here, they do.

        Raises:
            InputError: the training fails, or the seed, N or the rule changes nothing.

        Warns:
            PairingWarning: two equal runs differ by as much as two seeds do.
        """
        refuse_unguarded()
        kept = first.directory / CHECKED
        key = fingerprint({**self.identity(), "loops": sorted(loops), "rules": sorted(rules)})
        checked = _read(kept)
        if key not in checked:
            with _scratch(first.directory) as folder:
                paired, checked[key] = _compared(self, replace(first, directory=folder), loops, seeds, rules)
            write_file(kept, json.dumps(checked, indent=2))
            if paired:
                print(f"looptransfer: {checked[key]}", file=sys.stderr)
            else:
                warnings.warn(checked[key], PairingWarning, stacklevel=5)
        return {}


def _compared(
    training: Reporting, first: Trial, loops: Sequence[int], seeds: Sequence[int], rules: Sequence[Rule]
) -> tuple[bool, str]:
    """True where seeds pair the runs, as far as was seen; and how well, in a sentence."""
    starts = _Starts(training)
    moment = f"N = {first.loops}, LR {first.lr:.4g}, seed {first.seed}"
    if not all(map(math.isfinite, starts.of(first))):
        return True, f"a run diverges at once ({moment}): whether seeds pair the runs was not seen"
    several = min((n for n in loops if n > 1), default=1)
    others = {
        "seed": [replace(first, seed=seed) for seed in seeds if seed != first.seed],
        "loop count": [replace(first, loops=n) for n in sorted(loops) if n != first.loops],
    }
    compared = {name: starts.differing(name, first, trials) for name, trials in others.items()}
    comparable = [rule for rule in rules if RULES[rule].visits != RULES[first.rule].visits]  # they differ from N = 2 up
    for rule in comparable if several > 1 else ():
        starts.differing("rule", replace(first, loops=several), [replace(first, loops=several, rule=rule)])
    paired, told = _noise_of(starts, first, compared["seed"], moment)
    others_over_layers = [replace(first, rule=rule) for rule in rules if rule not in {first.rule, *comparable}]
    alike = [trial.rule for trial in others_over_layers if starts.alike(first, trial)]
    if alike:
        told += f"; {first.rule} and {alike[0]} report the same losses, which is right at the base depth alone"
    return paired, told


def _noise_of(starts: "_Starts", first: Trial, other_seed: Trial | None, moment: str) -> tuple[bool, str]:
    """True where seeds pair the runs, as far as was seen; and how well, in a sentence."""
    same = starts.distance(first, replace(first, directory=first.directory / "again"))
    apart = 0.0 if other_seed is None else starts.distance(first, other_seed)
    if same == 0:
        return True, f"two equal runs ({moment}) report equal losses: seeds pair the runs"
    told = f"two equal runs ({moment}) report losses that differ by up to {same:.2g} nats"
    if same < apart / PAIRED:
        return True, f"{told}, runs of two seeds by {apart:.2g}: seeds pair the runs but for noise"
    return False, (
        f"{told}, and runs of two seeds by {apart:.2g}: seeds do not pair the runs, so that intervals will be wide; "
        "draw initialisation and data by the seed"
    )


class _Starts:
    """The first losses of trainings, each made once."""

    def __init__(self, training: Reporting) -> None:
        self.training = training
        self.losses: dict[tuple[Trial, int | None], list[float]] = {}

    def of(self, trial: Trial, most: int | None = FEW) -> list[float]:
        key = (trial, most)
        if key not in self.losses:
            trial.directory.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=trial.directory))
            with contextlib.closing(self.training.reports(replace(trial, directory=folder))) as reports:  # type: ignore[type-var]
                self.losses[key] = [loss for _, loss in islice(reports, most)]
            if not self.losses[key]:
                raise UserCodeError(NO_LOSS.format(self.training))
        return self.losses[key]

    def differing(self, name: str, first: Trial, others: Iterable[Trial]) -> Trial | None:
        """The first of the others that can be compared, None where all fail: a run that does leaves the others alone.

        Raises:
            InputError: it reports the same to the end.
        """
        for other in others:
            with contextlib.suppress(UserCodeError):
                self.must_differ(name, first, other)
                return other
        return None

    def must_differ(self, name: str, first: Trial, other: Trial) -> None:
        """Refuse two trainings that report the same to the end."""
        if self.alike(first, other):
            values = [getattr(trial, {"loop count": "loops"}.get(name, name)) for trial in (first, other)]
            raise InputError(
                f"{self.training} reports the same losses for {name} {values[0]} as for {values[1]}, so the {name} "
                "does not reach the training; see that it is used"
            )

    def alike(self, first: Trial, other: Trial) -> bool:
        """Two trainings report the same to the end."""
        lengths = [FEW] if len(self.of(first)) < FEW else [FEW, None]
        return all(_listed(self.of(first, most)) == _listed(self.of(other, most)) for most in lengths)

    def distance(self, first: Trial, other: Trial) -> float:
        """The largest difference of two losses of one place."""
        pairs = zip(self.of(first), self.of(other), strict=False)
        return max((abs(a - b) for a, b in pairs if math.isfinite(a) or math.isfinite(b)), default=0.0)


def _listed(losses: Sequence[float]) -> list[str]:
    return [repr(loss) for loss in losses]  # nan is nan here


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`. It stays where an error may name a log that lies in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="start-", dir=folder))
    except OSError as error:
        raise InputError(
            f"cannot write {folder}, beside the ledger: {error.strerror}; choose a ledger in a folder you may write to"
        ) from None
    yield scratch
    shutil.rmtree(scratch, ignore_errors=True)


def _read(path: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    return {}


@dataclass(frozen=True)
class Function(Reporting):
    """A training function: train(run) returns the loss in nats, or yields (step, loss) as it goes.

    `run` is a `Trial`: run.loops, run.lr, run.seed, run.rule, run.device, run.directory. The last loss counts; one that
    is no finite number says that the run diverged, and ends it. `tune` and `sweep` make one of any function that they
    are given.

    Attributes:
        function: at the top level of a module, since worker processes import it.
        version: changes where results of the old function should not be mixed with those of the new one. Without one,
            the function's own source decides, and the plain values that it was made with or reads from its module,
            as they were before its first training; what it calls is not looked at.

    Raises:
        InputError: it is no function.
    """

    function: Callable[[Trial], Any]
    version: str = ""
    declared: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)  # the identity

    def __post_init__(self) -> None:
        if not callable(self.function) or inspect.isclass(self.function):
            raise InputError(
                f"{self.function!r} cannot be trained; give an Experiment or a function train(run) -> loss"
            )
        values = {} if self.version else values_of(self.function) | _changed.get(self._code(), {})
        values = {name: value for name, value in values.items() if value is not None}
        self.declared.update({**self._named(), **({BOUND: values} if values else {})})
        self.declared["looptransfer"] = version("looptransfer")

    def __str__(self) -> str:
        return f"{qualified(self.function)}(run){place(self.function)}"

    def identity(self) -> dict[str, Any]:
        """The function's name, its version or else hashes of its source and its values, and the version of our own."""
        return dict(self.declared)

    def _named(self) -> dict[str, str]:
        name = {"name": f"{module_of(self.function)}.{qualified(self.function)}"}
        return name | ({"version": self.version} if self.version else code_of(self.function))

    def _note_changes(self) -> None:
        """Remember the first value of what a training changes, as a counter or a cache: it tells no functions apart."""
        if self.version:
            return
        first, now = self.declared.get(BOUND, {}), values_of(self.function)
        changed = {name: first.get(name) for name in first.keys() | now.keys() if first.get(name) != now.get(name)}
        if changed:
            _changed.setdefault(self._code(), {}).update(changed)

    def _code(self) -> str:
        return fingerprint(self._named())

    def reports(self, trial: Trial) -> Iterator[Report]:
        """The losses that the function yields, or returns."""
        try:
            with directory_kept():
                yield from self._reports(trial)
        finally:
            self._note_changes()

    def _reports(self, trial: Trial) -> Iterator[Report]:
        call = f"{qualified(self.function)}(run)"
        with user_code(f"{call} fails", self.function):
            result = self.function(trial)
        if not isinstance(result, Iterator):
            yield None, self._number(result, f"{call} returns")
            return
        try:
            while (report := self._next(result, call)) is not None:
                yield report
        finally:
            with user_code(f"{call} fails at its end", self.function):
                getattr(result, "close", lambda: None)()

    def _next(self, result: Iterator[Any], call: str) -> Report | None:
        """The report that a generator yields next, or returns in the end."""
        with user_code(f"{call} fails", self.function):
            try:
                report = next(result)
            except StopIteration as end:
                report = end
        if isinstance(report, StopIteration):
            return None if report.value is None else (None, self._number(report.value, f"{call} returns"))
        if not isinstance(report, tuple) or len(report) != 2:
            raise UserCodeError(f"{call} yields {_shown(report)}{place(self.function)}; yield (step, loss)")
        return int(self._number(report[0], f"{call} yields the step")), self._number(report[1], f"{call} yields")

    def _number(self, value: Any, what: str) -> float:
        """A number, or a tensor or an array of one."""
        if hasattr(value, "item") and not isinstance(value, numbers.Number):
            with user_code(f"{what} what cannot be read", self.function):
                value = value.item()
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise UserCodeError(f"{what} {_shown(value)}{place(self.function)}; it must be a number, the loss in nats")
        try:
            return float(value)
        except OverflowError:  # a whole number beyond all floats
            return math.inf


def _shown(value: object) -> str:
    return " ".join(repr(value).split())[:100]


def as_trainable(train: Any) -> Trainable:
    """The training that `tune`, `sweep` and `gate` are given: one that is trainable as it is, or a function.

    Raises:
        InputError: it is neither.
    """
    return train if is_trainable(train) else Function(train)


def is_trainable(value: Any) -> TypeGuard[Trainable]:
    """It can be trained as it stands; a class of such things cannot."""
    return isinstance(value, Trainable) and not inspect.isclass(value)
