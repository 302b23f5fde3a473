"""A training run: where it lies, where it is made, what it comes to, and what can make it. No torch."""

import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from looptransfer.errors import InputError
from looptransfer.rules import Rule
from looptransfer.user_code import user_code


@dataclass(frozen=True, order=True)
class Run:
    """The coordinates of a training run. `lr` is the absolute base LR."""

    rule: Rule
    loops: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Trial(Run):
    """A run as it is made: what a training function is called with.

    Attributes:
        rule: the scaling rule, "factored", "completep", "sqrt" or "unscaled".
        loops: loop count N.
        lr: base LR, absolute.
        seed: of the initialisation and the data order.
        device: what to train on, such as "cpu" or "cuda"; a worker process sees its own GPUs alone.
        directory: a folder of this run alone. It outlives a process that is killed: what lies in it when training
            begins was left by an earlier attempt at the same run, and a checkpoint there is to be gone on from.
        environment: what a process that this run starts should find in its environment: its GPUs and its threads.
    """

    device: str
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. A diverged run has loss inf, the steps it lasted, and the last finite training loss.

    Layers and steps are None where the training does not say them.
    """

    layers: int | None
    width: int | None
    steps: int | None
    loss: float
    diverged: bool
    seconds: float
    last_loss: float


@runtime_checkable
class Trainable(Protocol):
    """A training that can be tuned and swept: an `Experiment`, a `Function` or a `Command`."""

    def identity(self) -> dict[str, Any]:
        """JSON values that tell results of this training from those of others."""

    def check(
        self, first: Trial, loops: Sequence[int], seeds: Sequence[int], rules: Sequence[Rule]
    ) -> Mapping[int, Any]:
        """See before any training that N, seed and rule do what they should; starts by N, where they can be seen.

        Args:
            first: a run of the smallest N; the starts that are compared differ from it in N, seed or rule.
            loops, seeds, rules: all that will be trained.

        Raises:
            InputError: they do not, or the training fails at once.
        """

    def probe(self, trial: Trial) -> Mapping[str, Any]:
        """JSON values by which the start of a run is known again: text to the bit, numbers but for rounding.

        Empty where nothing of it can be seen.

        Raises:
            InputError: the training fails at once.
        """

    def train(self, trial: Trial) -> Outcome:
        """Make the run.

        Raises:
            InputError: it fails. A run that diverges is an outcome.
        """


def pickled(trainable: Trainable) -> bytes:
    """A trainable as worker processes are sent it.

    Raises:
        InputError: it cannot be pickled, or stands in a notebook or `python -c`, which no other process can import.
    """
    fix = "; define its functions at the top level of a module, or pass workers=1"
    with user_code("the experiment cannot be sent to worker processes", fix=fix):
        data = pickle.dumps(trainable)
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    importable = getattr(main, "__spec__", None) is not None or (file is not None and Path(file).is_file())
    if b"__main__" in data and not importable:
        raise InputError(
            "the experiment cannot be sent to worker processes: it is defined in a notebook, in python -c or on "
            f"standard input, which they cannot import{fix}"
        )
    return data
