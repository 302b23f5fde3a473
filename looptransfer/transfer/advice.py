"""The smallest set of further runs that would settle a verdict."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from looptransfer.transfer.optimum import Censored

POWER = 0.8  # how likely the advised runs settle it, if mean and scatter stay as they are
SEEDS = 4  # in all, where there is one: at the noise of the reference model they settle most sweeps (reports/verdict/)
MOST = 64  # seeds beyond which more of them are no advice


@dataclass(frozen=True)
class FurtherRuns:
    """Runs at every combination of `at` (loop counts, or values of the axis), `lrs` (absolute) and `seeds`."""

    at: tuple[int, ...]
    lrs: tuple[float, ...]
    seeds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.at) * len(self.lrs) * len(self.seeds)

    def words(self, label: str) -> str:
        """The combinations, in one line."""
        at, lrs, seeds = (", ".join(map(str, each)) for each in (self.at, (f"{lr:.6g}" for lr in self.lrs), self.seeds))
        return f"{len(self)} runs: {label} = {at}; LR {lrs}; seed {seeds}"

    def rows(self, axis: str) -> pd.DataFrame:
        """A row per run, with columns `axis`, lr and seed."""
        return pd.DataFrame(product(self.at, self.lrs, self.seeds), columns=[axis, "lr", "seed"])

    def command(self, rule: str, table: str, ledger: bool = False) -> str:
        """What makes them, for an experiment of ours over loop counts, and adds them to a table or a ledger of ours.

        EXPERIMENT is the user's.
        """
        options = {
            "--loops": ",".join(map(str, self.at)),
            "--lrs": ",".join(f"{lr:.6g}" for lr in self.lrs),
            "--seeds": _ranges(self.seeds),
            "--rules": rule,
            **({"--ledger": table, "-o": "more.csv"} if ledger else {"--append": table}),
        }
        words = [word for name, value in options.items() for word in (name, value)]
        return "looptransfer sweep EXPERIMENT " + shlex.join(words)


def seeds_needed(scatter: float, room: float, confidence: float) -> int | None:
    """How many seeds leave an interval less than `room` to one side of its estimate, four times out of five.

    None where over 64 would be needed.

    Args:
        scatter: standard deviation over seeds.
        room: distance from the estimate to the tolerance, in the same unit.
        confidence: of the two-sided interval.
    """
    for seeds in range(2, MOST + 1):
        t = float(stdtrit(seeds - 1, 0.5 + confidence / 2)) + float(stdtrit(seeds - 1, POWER))
        if t * scatter / math.sqrt(seeds) < room:
            return seeds
    return None


def more_seeds(tables: Mapping[int, pd.DataFrame], total: int) -> FurtherRuns:
    """Every LR at every N with new seeds, up to `total` in all."""
    there = sorted({str(seed) for table in tables.values() for seed in table.columns})
    lrs = sorted({float(x) for table in tables.values() for x in table.index})
    return FurtherRuns(tuple(tables), _lrs(lrs), _new_seeds(there, total - len(there)))


def missing_seeds(tables: Mapping[int, pd.DataFrame]) -> FurtherRuns:
    """The seeds that some N has and another lacks, at those that lack them."""
    everywhere = sorted({str(seed) for table in tables.values() for seed in table.columns})
    lacking = [at for at, table in tables.items() if set(map(str, table.columns)) < set(everywhere)]
    lrs = sorted({float(x) for at in lacking for x in tables[at].index})
    return FurtherRuns(tuple(lacking), _lrs(lrs), tuple(everywhere))


def larger_n(tables: Mapping[int, pd.DataFrame], factor: int) -> FurtherRuns:
    """The LRs and seeds of the largest N at an N `factor` times as large."""
    largest = max(tables)
    return FurtherRuns((largest * factor,), _lrs(tables[largest].index), _seeds(tables[largest]))


def closer_lrs(tables: Mapping[int, pd.DataFrame], at: Sequence[int]) -> FurtherRuns:
    """LRs half-way between those around the best, at some N."""
    lrs: set[float] = set()
    for n in at:
        x, best = _best(tables[n])
        near = x[np.abs(x - best) <= 1.51 * _step(x)]
        lrs |= {round(float(middle), 9) for middle in (near[1:] + near[:-1]) / 2}
    return FurtherRuns(tuple(at), _lrs(sorted(lrs)), _seeds(*(tables[n] for n in at)))


def uncensor(tables: Mapping[int, pd.DataFrame], hidden: Mapping[int, Censored]) -> FurtherRuns:
    """The LRs that would bring a hidden optimum inside the grid, at the N where it hides for the first one's reason."""
    why = next(iter(hidden.values()))
    at = tuple(n for n, reason in hidden.items() if reason == why)
    step = max(_step(tables[n].index.to_numpy(dtype=float)) for n in at)
    low = min(float(tables[n].index[0]) for n in at if len(tables[n]))
    high = max(float(tables[n].index[-1]) for n in at if len(tables[n]))
    if why == "low edge":
        return FurtherRuns(at, _lrs([low - 2 * step, low - step]), _seeds(*(tables[n] for n in at)))
    if why == "high edge":
        return FurtherRuns(at, _lrs([high + step, high + 2 * step]), _seeds(*(tables[n] for n in at)))
    if why == "plateau":
        widen = [low - 2 * step, low - step, high + step, high + 2 * step]
        return (
            more_seeds(tables, 2 * _most_seeds(tables))
            if high - low >= 4
            else FurtherRuns(tuple(tables), _lrs(widen), _seeds(*tables.values()))
        )
    if why == "flat bottom":
        return closer_lrs(tables, at)
    if why == "diverged":
        lowest_stable = min(_best(tables[n])[1] for n in at)
        lrs = [lowest_stable - 2 * step, lowest_stable - step, lowest_stable + step / 2]
        return FurtherRuns(at, _lrs(lrs), _seeds(*(tables[n] for n in at)))
    if why == "one seed":
        return more_seeds(tables, SEEDS) if _most_seeds(tables) == 1 else missing_seeds(tables)
    best = [_best(tables[n])[1] for n in at]
    return FurtherRuns(at, _lrs([min(best) + half / 2 for half in range(-4, 5)]), _seeds(*(tables[n] for n in at)))


def _best(table: pd.DataFrame) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float64]], float]:
    x = table.index.to_numpy(dtype=float)
    return x, float(x[int(np.argmin(table.to_numpy(dtype=float).mean(axis=1)))])


def _step(x: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    return float(np.median(np.diff(x))) if len(x) > 1 else 1.0


def _lrs(log2_lrs: Sequence[float] | pd.Index) -> tuple[float, ...]:
    return tuple(float(f"{2.0 ** float(x):.6g}") for x in log2_lrs)


def _seeds(*tables: pd.DataFrame) -> tuple[str, ...]:
    return tuple(sorted({str(seed) for table in tables for seed in table.columns}))


def _most_seeds(tables: Mapping[int, pd.DataFrame]) -> int:
    return len(_seeds(*tables.values()))


def _new_seeds(there: Sequence[str], count: int) -> tuple[str, ...]:
    numbers = [int(seed) for seed in there if seed.isdecimal()]
    first = max(numbers, default=-1) + 1
    return tuple(str(seed) for seed in range(first, first + max(0, count)))


def _ranges(seeds: Sequence[str]) -> str:
    """0,1,2,3 as 0-3."""
    if all(seed.isdecimal() for seed in seeds):
        numbers = sorted(map(int, seeds))
        if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"{numbers[0]}-{numbers[-1]}"
        return ",".join(map(str, numbers))
    return ",".join(seeds)
