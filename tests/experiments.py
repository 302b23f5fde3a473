"""A training run of some twenty milliseconds, at module level so that worker processes can be sent it."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looptransfer.trials.experiment import Experiment

FEATURES, WIDTH, BATCH = 4, 8, 32
PAUSE = "LOOPTRANSFER_TEST_PAUSE"  # environment: seconds by which each run is slowed


class LoopedMLP(nn.Module):
    """One tied residual block of width 8, visited `loops` times."""

    def __init__(self, loops: int) -> None:
        super().__init__()
        self.loops = loops
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.embed(inputs)
        for _ in range(self.loops):
            stream = stream + self.block(self.norm(stream))
        return self.head(stream)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


@dataclass(frozen=True)
class TinyTask:
    """Regression on a fixed teacher. The fifth batch of `failing_seed` fails as `failure` says; the second raises."""

    failing_seed: int | None = None
    failure: str = "raises"

    def make_model(self, loops: int) -> nn.Module:
        return LoopedMLP(loops)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(seed)
        yield samples(rng, BATCH)
        if seed == self.failing_seed and self.failure == "raises":
            raise ArithmeticError(f"no second batch for seed {seed}")
        for number in itertools.count(1):
            if seed == self.failing_seed and number == 4:
                FAILURES[self.failure]()
            yield samples(rng, BATCH)

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        time.sleep(float(os.environ.get(PAUSE, "0")))
        rng = np.random.default_rng(10_000)
        return [samples(rng, 128) for _ in range(2)]


FAILURES: dict[str, Callable[[], object]] = {
    "hangs": lambda: time.sleep(3600),
    "ends its process": lambda: os._exit(7),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def samples(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    inputs = rng.normal(size=(count, FEATURES)).astype(np.float32)
    targets = np.sin(2 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3] - inputs[:, 3:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def tiny_experiment(failing_seed: int | None = None, failure: str = "raises", **overrides: Any) -> Experiment:
    task = TinyTask(failing_seed, failure)
    arguments: dict[str, Any] = {
        "name": "tiny",
        "make_model": task.make_model,
        "batches": task.batches,
        "held_out": task.held_out,
        "loss": squared_error,
        "steps": 30,
        "width": WIDTH,
    }
    return Experiment(**(arguments | overrides))


# -- seven changes of a project that its settings do not say


class ReluMLP(LoopedMLP):
    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class WideMLP(LoopedMLP):
    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        self.block = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))


class SmallInitMLP(LoopedMLP):
    def __init__(self, loops: int) -> None:
        super().__init__(loops)
        with torch.no_grad():
            self.head.weight.mul_(0.9)


def other_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return TinyTask().batches(seed + 100)


def larger_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(seed)
    while True:
        yield samples(rng, 2 * BATCH)


def other_held_out() -> list[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(10_001)
    return [samples(rng, 128) for _ in range(2)]


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.l1_loss(outputs, targets)


CHANGES: dict[str, dict[str, Any]] = {
    "another activation": {"make_model": ReluMLP},
    "a wider block": {"make_model": WideMLP},
    "a smaller initialisation": {"make_model": SmallInitMLP},
    "other data": {"batches": other_batches},
    "larger batches": {"batches": larger_batches},
    "another held-out set": {"held_out": other_held_out},
    "another loss": {"loss": absolute_error},
}
