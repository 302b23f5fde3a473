"""Training functions of a few microseconds, at module level so that worker processes can import them."""

import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from looptransfer.trials.devices import THREADS, VISIBLE
from looptransfer.trials.ledger import Ledger
from looptransfer.trials.run import Trial

SEEN = "LOOPTRANSFER_TEST_SEEN"  # environment: a folder in which `placed` writes what it was given
DRIFT = {"factored": 0.0, "sqrt": 0.5, "unscaled": 1.0}


def new_ledger(place: str | Path) -> Ledger:
    ledger = Ledger(place)
    ledger.admit({"name": "a function"}, {})
    return ledger


def loss_of(trial: Trial) -> float:
    """A basin in log2(LR), whose optimum moves by the rule and scatters by the seed."""
    noise = random.Random(trial.seed)
    optimum = -8.0 - DRIFT[trial.rule] * math.log2(trial.loops) + noise.gauss(0, 0.05)
    return 2.0 + 0.01 * math.log2(trial.loops) + 0.05 * (math.log2(trial.lr) - optimum) ** 2


def returning(trial: Trial) -> float:
    return loss_of(trial)


def yielding(trial: Trial) -> Iterator[tuple[int, float]]:
    for step in range(1, 5):
        yield step, loss_of(trial) + 1 / step


def diverging(trial: Trial) -> Iterator[tuple[int, float]]:
    yield 1, 3.0
    yield 2, math.nan
    raise AssertionError("it is not asked for more")


def ignoring_loops(trial: Trial) -> float:
    return loss_of(Trial(trial.rule, 1, trial.lr, trial.seed, device="cpu", directory=trial.directory))


def ignoring_seed(trial: Trial) -> float:
    return loss_of(Trial(trial.rule, trial.loops, trial.lr, 0, device="cpu", directory=trial.directory))


def ignoring_rule(trial: Trial) -> float:
    return loss_of(Trial("factored", trial.loops, trial.lr, trial.seed, device="cpu", directory=trial.directory))


def nearly_paired(trial: Trial) -> float:
    return loss_of(trial) + random.SystemRandom().uniform(0, 1e-6)


def failing_high(trial: Trial) -> float:
    if trial.lr > 2.0**-7:
        raise ArithmeticError("too high for me")
    return loss_of(trial)


def placed(trial: Trial) -> float:
    """Writes down the process, its device and its environment."""
    seen = {name: os.environ.get(name) for name in (VISIBLE, *THREADS)}
    record = {"pid": os.getpid(), "device": trial.device, "directory": str(trial.directory), **seen}
    Path(os.environ[SEEN], f"{trial.loops}-{trial.lr}-{trial.seed}.json").write_text(json.dumps(record))
    time.sleep(0.3)  # for the other workers to get a run
    return loss_of(trial)
