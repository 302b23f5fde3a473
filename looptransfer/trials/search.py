"""The runs to make next: pure functions of the runs that are finished, so that a killed search resumes by itself."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pandas as pd

from looptransfer.rules import Rule
from looptransfer.transfer.optimum import Optimum, curve, find_optimum
from looptransfer.trials.run import Run

COARSE = range(-12, -2, 2)  # log2(LR) of the first look: two octaves apart, from 0.00024 to 0.063
STEP = 0.5  # octaves between LRs of the close look
REACH = 4  # steps on either side of the best
EXTENSIONS = 4  # how often the close look may be widened past an edge
LIMITS = (-24, 6)  # log2(LR) where the coarse look stops following an edge


Losses = Mapping[Run, float]


class Search(Protocol):
    """Names the runs that are wanted, given the losses of those that are finished. It ends when they all are."""

    def wanted(self, done: Losses) -> Sequence[Run]: ...


class Grid:
    """A fixed list of runs, the longest first so that workers end together."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: (-run.loops, run.seed, run.rule, run.lr))

    def wanted(self, done: Losses) -> Sequence[Run]:
        return self.runs


@dataclass(frozen=True)
class Several:
    """Searches one after the other, each going on while the one before it ends."""

    searches: Sequence[Search]

    def wanted(self, done: Losses) -> Sequence[Run]:
        return [run for search in self.searches for run in search.wanted(done)]


@dataclass(frozen=True)
class ProxySearch:
    """The optimum of one loop count: a coarse look with one seed, then a close look with all of them."""

    loops: int
    seeds: tuple[int, ...]
    rule: Rule = "factored"
    confidence: float = 0.9

    def wanted(self, done: Losses) -> Sequence[Run]:
        coarse = [self._run(log2, self.seeds[0]) for log2 in self._coarse(done)]
        if not _all_done(coarse, done):
            return coarse
        best = self._best(coarse, done)
        return coarse + [self._run(log2, seed) for log2 in self._close(best, done) for seed in self.seeds]

    def optimum(self, done: Losses, confidence: float) -> Optimum:
        """The fitted optimum of the runs of this N and rule."""
        return find_optimum(self.loops, self._table(done), confidence)

    def _table(self, done: Losses) -> pd.DataFrame:
        rows = [
            (run.lr, run.seed, loss) for run, loss in done.items() if (run.rule, run.loops) == (self.rule, self.loops)
        ]
        return curve(pd.DataFrame(rows, columns=["lr", "seed", "loss"])) if rows else pd.DataFrame()

    def _run(self, log2: float, seed: int) -> Run:
        return Run(self.rule, self.loops, 2.0**log2, seed)

    def _coarse(self, done: Losses) -> list[int]:
        """The coarse LRs, followed outwards while the best is an edge."""
        looks = list(COARSE)
        while _all_done([self._run(log2, self.seeds[0]) for log2 in looks], done):
            best = round(math.log2(self._best([self._run(log2, self.seeds[0]) for log2 in looks], done).lr))
            if best == looks[0] and best > LIMITS[0]:
                looks.insert(0, best - 2)
            elif best == looks[-1] and best < LIMITS[1]:
                looks.append(best + 2)
            else:
                break
        return looks

    def _best(self, runs: Iterable[Run], done: Losses) -> Run:
        return min(runs, key=lambda run: done[run])

    def _close(self, best: Run, done: Losses) -> list[float]:
        """LRs half an octave apart around the best, widened while the optimum lies on an edge of them.

        Each widening is decided by the LRs that were looked at before it and by no others, so that it stands whatever
        the runs that it brings will show.
        """
        low, high = -REACH, REACH
        for _ in range(EXTENSIONS):
            looks = [math.log2(best.lr) + STEP * k for k in range(low, high + 1)]
            runs = {self._run(log2, seed) for log2 in looks for seed in self.seeds}
            if not _all_done(runs, done):
                break
            why = self.optimum({run: done[run] for run in runs}, self.confidence).censored
            if why == "low edge":
                low -= 2
            elif why == "high edge":
                high += 2
            else:
                break
        return [math.log2(best.lr) + STEP * k for k in range(low, high + 1)]


def _all_done(runs: Iterable[Run], done: Losses) -> bool:
    return all(run in done for run in runs)
