"""Further runs: the smallest sets of them that would settle a verdict, from the tables of losses by N."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from looptransfer.transfer.optimum import Array

POWER = 0.8  # how likely the advised runs settle it, if mean and scatter stay as they are
MOST = 64  # seeds beyond which more of them are no advice

Tables = Mapping[int, pd.DataFrame]  # by N: losses as `curve` makes them


@dataclass(frozen=True)
class FurtherRuns:
    """Runs with every seed at the LRs (absolute) of every N, or value of the axis."""

    lrs_by_count: Mapping[int, tuple[float, ...]]
    seeds: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The N."""
        return tuple(self.lrs_by_count)

    @property
    def lrs(self) -> tuple[float, ...]:
        """The LRs of some N or other."""
        return tuple(sorted(set().union(*self.lrs_by_count.values())))

    @property
    def grids(self) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """The N that have the same LRs, and those LRs."""
        alike: dict[tuple[float, ...], tuple[int, ...]] = {}
        for n, lrs in self.lrs_by_count.items():
            alike[lrs] = (*alike.get(lrs, ()), n)
        return [(counts, lrs) for lrs, counts in alike.items()]

    def __len__(self) -> int:
        return sum(map(len, self.lrs_by_count.values())) * len(self.seeds)

    def text(self, label: str) -> str:
        """The combinations, in one line."""
        grids = (f"{label} = {listed(counts)}; LR {listed(f'{lr:.6g}' for lr in lrs)}; " for counts, lrs in self.grids)
        return f"{len(self)} runs: {''.join(grids)}seed {listed(self.seeds)}"

    def to_dict(self, axis: str) -> list[dict[str, Any]]:
        """Plain JSON values: a grid for the N that have the same LRs."""
        return [{axis: list(counts), "lr": list(lrs), "seed": list(self.seeds)} for counts, lrs in self.grids]

    def rows(self, axis: str) -> pd.DataFrame:
        """A row per run, with columns `axis`, lr and seed."""
        runs = [(n, lr, seed) for n, lrs in self.lrs_by_count.items() for lr, seed in product(lrs, self.seeds)]
        return pd.DataFrame(runs, columns=[axis, "lr", "seed"])

    def command(self, rule: str, table: str, ledger: bool = False) -> str:
        """The command that makes them over loop counts, and adds them to a table or a ledger of `sweep`.

        One call for the N that have the same LRs. EXPERIMENT is the user's.
        """
        calls = []
        for number, (counts, lrs) in enumerate(self.grids, 1):
            new = "more.csv" if number == 1 else f"more-{number}.csv"
            options = {
                "--loops": ",".join(map(str, counts)),
                "--lrs": ",".join(f"{lr:.6g}" for lr in lrs),
                "--seeds": _ranges(self.seeds),
                "--rules": rule,
                **({"--ledger": table, "-o": new} if ledger else {"--append": table}),
            }
            calls.append(
                "looptransfer sweep EXPERIMENT " + shlex.join(part for option in options.items() for part in option)
            )
        return " && ".join(calls)


def listed(values: Any) -> str:
    """Values separated by commas."""
    return ", ".join(map(str, values))


def seeds_needed(scatter: float, room: float, confidence: float) -> int | None:
    """The number of seeds that leave an interval less than `room` to one side of its estimate, four times out of five.

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


def all_seeds(tables: Tables) -> tuple[str, ...]:
    """The seeds of some N or other."""
    return tuple(sorted({str(seed) for table in tables.values() for seed in table.columns}))


def of_counts(tables: Tables, counts: Sequence[int]) -> Tables:
    """The tables of some N."""
    return {n: tables[n] for n in counts}


def runs_at(tables: Tables, log2_lrs: Sequence[float]) -> FurtherRuns:
    """The same LRs at every N of some tables with every seed that one of them has."""
    return FurtherRuns(dict.fromkeys(tables, _absolute(log2_lrs)), all_seeds(tables))


def more_seeds(tables: Tables, total: int) -> FurtherRuns:
    """The LRs of every N with new seeds, up to `total` in all."""
    seeds = all_seeds(tables)
    first = max((int(seed) for seed in seeds if seed.isdecimal()), default=-1) + 1
    fresh = tuple(map(str, range(first, first + max(0, total - len(seeds)))))
    return FurtherRuns(_own_lrs(tables), fresh)


def missing_seeds(tables: Tables) -> FurtherRuns:
    """The seeds that some N has and another lacks, at those that lack them."""
    seeds = all_seeds(tables)
    lacking = [n for n, table in tables.items() if set(map(str, table.columns)) < set(seeds)]
    return FurtherRuns(_own_lrs(of_counts(tables, lacking)), seeds)


def larger_n(tables: Tables, factor: int) -> FurtherRuns:
    """The LRs and seeds of the largest N at an N `factor` times as large."""
    largest = max(tables)
    return FurtherRuns({largest * factor: _absolute(tables[largest].index)}, all_seeds(of_counts(tables, [largest])))


def closer_lrs(tables: Tables) -> FurtherRuns:
    """LRs half-way between those around the best."""
    lrs: set[float] = set()
    for table in tables.values():
        x = table.index.to_numpy(dtype=float)
        near = x[np.abs(x - best_lr(table)) <= 1.51 * _step(x)]
        lrs |= {round(float(middle), 9) for middle in (near[1:] + near[:-1]) / 2}
    return runs_at(tables, sorted(lrs))


def best_lr(table: pd.DataFrame) -> float:
    """The log2(LR) of the lowest mean loss."""
    return float(table.index[int(np.argmin(table.to_numpy(dtype=float).mean(axis=1)))])


def span(tables: Tables) -> tuple[float, float, float]:
    """The lowest and the highest log2(LR) of some tables, and the widest of their grids' steps."""
    lrs = _all_lrs(tables)
    return lrs[0], lrs[-1], max(_step(table.index.to_numpy(dtype=float)) for table in tables.values())


def _step(x: Array) -> float:
    return float(np.median(np.diff(x))) if len(x) > 1 else 1.0


def _all_lrs(tables: Tables) -> list[float]:
    return sorted({float(x) for table in tables.values() for x in table.index})


def _own_lrs(tables: Tables) -> dict[int, tuple[float, ...]]:
    """The LRs of each N: new seeds at an LR that another N alone has would have no old ones beside them."""
    return {n: _absolute(table.index) for n, table in tables.items()}


def _absolute(log2_lrs: Sequence[float] | pd.Index) -> tuple[float, ...]:
    return tuple(float(f"{2.0 ** float(x):.6g}") for x in log2_lrs)


def _ranges(seeds: Sequence[str]) -> str:
    """0,1,2,3 as 0-3."""
    if all(seed.isdecimal() for seed in seeds):
        numbers = sorted(map(int, seeds))
        if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
            return f"{numbers[0]}-{numbers[-1]}"
        return ",".join(map(str, numbers))
    return ",".join(seeds)
