"""Optima as a baseline stores them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from looptransfer.checks import is_numeral
from looptransfer.transfer.optimum import Interval, Optimum, t_interval
from looptransfer.transfer.results import LARGEST, MOST

OCTAVES = 1000.0  # log2 of an LR, in size, that is believed
KEY = "at"  # of N in the file
Losses = Mapping[str, Mapping[str, float | None]]  # by LR, as text, and seed; None where a run diverged


@dataclass(frozen=True)
class StoredOptimum:
    """The optimum of one N as it was; all but `n` is empty where it was censored.

    Attributes:
        log2_lr: of the optimum, with its interval over seeds.
        log2_lr_by_seed: one vertex per seed, whose mean is the estimate.
        loss: fitted, at the optimum, with its interval over seeds.
        loss_by_seed: the fitted loss of each seed at the optimum of all.
        losses: of the runs themselves, by LR and seed.
    """

    n: int
    censored: str | None
    log2_lr: Interval | None = None
    log2_lr_by_seed: Mapping[str, float] | None = None
    loss: Interval | None = None
    loss_by_seed: Mapping[str, float] | None = None
    losses: Losses = field(default_factory=dict)

    @property
    def lr(self) -> float:
        """The optimum, absolute."""
        assert self.log2_lr is not None
        return float(2.0**self.log2_lr.estimate)

    @classmethod
    def of(cls, optimum: Optimum, confidence: float, losses: Losses | None = None) -> "StoredOptimum":
        """The part of an optimum that is remembered, with the losses of its runs."""
        if optimum.log2_lr is None or optimum.by_seed is None:
            return cls(optimum.n, optimum.censored)
        fitted = loss_at_optimum(optimum)
        vertices = {str(seed): float(vertex) for seed, vertex in optimum.by_seed.items()}
        loss_by_seed = {str(seed): float(loss) for seed, loss in fitted.items()}
        return cls(
            optimum.n, None, optimum.log2_lr, vertices, t_interval(fitted, confidence), loss_by_seed, losses or {}
        )

    def check(self) -> None:
        """Refuse by a ValueError what no optimum can be."""
        if not 1 <= self.n <= MOST:
            raise ValueError(f"{KEY} is {self.n}, not from 1 to {MOST}")
        if self.censored is None:
            _check_interval("log2_lr", self.log2_lr, self.log2_lr_by_seed, OCTAVES)
            _check_interval("loss", self.loss, self.loss_by_seed, LARGEST)
            if (self.log2_lr_by_seed or {}).keys() != (self.loss_by_seed or {}).keys():
                raise ValueError(f"the seeds of {self.n} differ between log2_lr_by_seed and loss_by_seed")
        _check_losses(self.losses)


def renamed(fields: Mapping[str, Any], name: str, other: str) -> dict[str, Any]:
    """The same fields, one of them by another name, first."""
    return {other: fields[name], **{key: value for key, value in fields.items() if key != name}}


def losses_of(runs: pd.DataFrame) -> Losses:
    """The losses of a tidy table of one rule and N, by LR and seed."""
    losses: dict[str, dict[str, float | None]] = {}
    for lr, seed, loss in runs.sort_values("lr")[["lr", "seed", "loss"]].itertuples(index=False):
        losses.setdefault(repr(float(lr)), {})[str(seed)] = float(loss) if math.isfinite(loss) else None
    return losses


def loss_at_optimum(optimum: Optimum) -> pd.Series:
    """The fitted loss per seed at the vertex of all seeds."""
    assert optimum.log2_lr is not None
    return optimum.loss(optimum.log2_lr.estimate)


def _check_losses(losses: Losses) -> None:
    for lr, by_seed in losses.items():
        if not is_numeral(lr, 0):
            raise ValueError(f"losses has the LR {lr!r:.60}, not a finite number above 0")
        largest = max((abs(loss) for loss in by_seed.values() if loss is not None), default=0.0)
        if largest >= LARGEST:
            raise ValueError(f"losses {lr} holds {largest:g}, not between {-LARGEST:g} and {LARGEST:g}")


def _check_interval(name: str, interval: Interval | None, by_seed: Mapping[str, float] | None, most: float) -> None:
    if interval is None or by_seed is None:
        raise ValueError(f"{name if interval is None else f'{name}_by_seed'} is missing")
    if len(by_seed) < 2:
        raise ValueError(f"{name}_by_seed has fewer than two seeds")
    largest = max(map(abs, by_seed.values()))
    if largest >= most:
        raise ValueError(f"{name}_by_seed holds {largest:g}, not between {-most:g} and {most:g}")
    if not interval.low <= interval.estimate <= interval.high:
        raise ValueError(f"{name} is no interval")
    mean = math.fsum(by_seed.values()) / len(by_seed)
    if not math.isclose(interval.estimate, mean, rel_tol=1e-6, abs_tol=1e-6 * largest):
        raise ValueError(f"{name} is {interval.estimate:.6g}, and its mean over seeds {mean:.6g}")
