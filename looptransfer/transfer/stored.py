"""Optima as a baseline stores them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from looptransfer.checks import is_count
from looptransfer.records import record_of
from looptransfer.transfer.optimum import Interval, Optimum, t_interval
from looptransfer.transfer.results import LARGEST, MOST

OCTAVES = 1000.0  # log2 of an LR, in size, that is believed
KEY = "at"  # of N in the file


@dataclass(frozen=True)
class StoredOptimum:
    """The optimum of one N as it was; all but `n` is empty where it was censored.

    Attributes:
        log2_lr: of the optimum, with its interval over seeds.
        log2_lr_by_seed: one vertex per seed, whose mean is the estimate.
        loss: fitted, at the optimum, with its interval over seeds.
        loss_by_seed: the fitted loss of each seed at the optimum of all.
    """

    n: int
    censored: str | None
    log2_lr: Interval | None = None
    log2_lr_by_seed: Mapping[str, float] | None = None
    loss: Interval | None = None
    loss_by_seed: Mapping[str, float] | None = None

    @property
    def lr(self) -> float:
        """The optimum, absolute."""
        assert self.log2_lr is not None
        return float(2.0**self.log2_lr.estimate)

    @classmethod
    def of(cls, optimum: Optimum, confidence: float) -> "StoredOptimum":
        """The part of an optimum that is remembered."""
        if optimum.log2_lr is None or optimum.by_seed is None:
            return cls(optimum.n, optimum.censored)
        losses = loss_at_optimum(optimum)
        vertices = {str(seed): float(vertex) for seed, vertex in optimum.by_seed.items()}
        loss_by_seed = {str(seed): float(loss) for seed, loss in losses.items()}
        return cls(optimum.n, None, optimum.log2_lr, vertices, t_interval(losses, confidence), loss_by_seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads back."""
        fields = asdict(self)
        return {KEY: fields.pop("n"), **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StoredOptimum":
        """Read what `to_dict` gave; what cannot be so is a ValueError."""
        fields = dict(data)
        if KEY not in fields:
            raise ValueError(f"{KEY} is missing")
        stored = record_of(cls, {"n": fields.pop(KEY), **fields})
        if not is_count(stored.n) or stored.n > MOST:
            raise ValueError(f"{KEY} is {stored.n}, not from 1 to {MOST}")
        if stored.censored is not None:
            return cls(stored.n, stored.censored)
        _check_interval("log2_lr", stored.log2_lr, stored.log2_lr_by_seed, OCTAVES)
        _check_interval("loss", stored.loss, stored.loss_by_seed, LARGEST)
        if (stored.log2_lr_by_seed or {}).keys() != (stored.loss_by_seed or {}).keys():
            raise ValueError(f"the seeds of {stored.n} differ between log2_lr_by_seed and loss_by_seed")
        return stored


def loss_at_optimum(optimum: Optimum) -> pd.Series:
    """The fitted loss per seed at the vertex of all seeds."""
    assert optimum.log2_lr is not None
    return optimum.loss(optimum.log2_lr.estimate)


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
