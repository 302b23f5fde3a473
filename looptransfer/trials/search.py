"""The runs to make next: pure functions of the runs that are finished, so that a killed search resumes by itself."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from looptransfer.rules import Rule
from looptransfer.trials.curve import Curve, curve_of
from looptransfer.trials.run import Run

START = (-9, -7)  # log2(LR) of the first look: 0.002 and 0.008
LIMITS = (-24, 6)  # log2(LR) where an edge is no longer followed
STEP = 0.5  # octaves between the LRs of the close look
BACK = 0.5  # octaves to stay below a run that diverged
MARGIN = 0.25  # octaves to stay below the highest LR that did not, since the cliff of another seed is elsewhere
ROUND = 2  # runs that are chosen together
MOST = 24  # runs
REGRET = 0.005  # share of the loss
WALL = 0.5  # share of the lowest loss above it, at a higher LR, that counts as diverged


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
class ProxyOptimum:
    """The LR to use at one loop count, by the runs of its search.

    Attributes:
        lr: absolute.
        loss: there, in the mean.
        regret: the upper limit of what it loses to the best LR, in the unit of the loss.
        log2_lr: the interval of the optimum itself, in log2(LR).
    """

    lr: float
    loss: float
    regret: float
    log2_lr: tuple[float, float]


@dataclass(frozen=True)
class ProxySearch:
    """The optimum of one loop count: two LRs two octaves apart, edges followed, then two runs a round where they help
    most, until the LR that would be returned loses little enough to the best.

    Attributes:
        regret: how much that is, as a share of the loss; of its upper limit.
        precision: octaves; instead, half the width that the optimum's interval may have.
    """

    loops: int
    seeds: tuple[int, ...]
    rule: Rule = "factored"
    regret: float = REGRET
    precision: float | None = None
    confidence: float = 0.9

    def wanted(self, done: Losses) -> Sequence[Run]:
        runs = [self._run(log2, self.seeds[0]) for log2 in START]
        while len(runs) < MOST and all(run in done for run in runs):
            more = self._more({run: done[run] for run in runs})
            if not more:
                break
            runs += more
        return runs

    def optimum(self, done: Losses) -> ProxyOptimum | None:
        """The LR to return after these runs; None where all diverged."""
        stable = _stable(done)
        return self._optimum(stable, *_fit(done)) if stable else None

    def _optimum(self, stable: Losses, curve: Curve, place: int) -> ProxyOptimum:
        loss = min(stable.values()) + float(curve.mean[place])
        regret, interval = curve.regret(place, self.confidence), curve.interval(self.confidence)
        return ProxyOptimum(2.0 ** float(curve.grid[place]), loss, regret, interval)

    def _more(self, done: Losses) -> list[Run]:
        """The next runs, given those so far; none where they suffice."""
        stable, looks = _stable(done), sorted({math.log2(run.lr) for run in done})
        if not stable:
            return [self._run(looks[0] - 2, self.seeds[0])] if looks[0] > LIMITS[0] else []
        best = math.log2(min(stable, key=lambda run: stable[run]).lr)
        if best in (looks[0], looks[-1]) and LIMITS[0] < best < LIMITS[1]:
            further = best + 2 if best == looks[-1] else best - 2
            return [self._run(min(max(further, LIMITS[0]), LIMITS[1]), self.seeds[0])]
        curve, place = _fit(done)
        optimum = self._optimum(stable, curve, place)
        low, high = optimum.log2_lr
        enough = optimum.regret <= self.regret * abs(optimum.loss)
        if enough if self.precision is None else high - low <= 2 * self.precision:
            return []
        return self._helpful(done, curve, place)

    def _helpful(self, done: Losses, curve: Curve, place: int) -> list[Run]:
        """Two runs after which the curve near its optimum is known best, as far as the model goes."""
        edge = _lowest_diverged(done)
        near = np.arange(-2.5, 3, STEP) + round(float(curve.grid[place]) / STEP) * STEP
        used = sorted({run.seed for run in done}, key=self.seeds.index)
        runs = [
            run
            for log2 in near[(near >= LIMITS[0]) & (near <= LIMITS[1])]
            for seed in [*used, *self.seeds[len(used) :][:1]]
            if log2 < edge and (run := self._run(float(log2), seed)) not in done
        ]
        points = np.array([math.log2(run.lr) for run in runs]), np.array([run.seed for run in runs])
        return [runs[number] for number in curve.helpful(place, points, ROUND)]

    def _run(self, log2: float, seed: int) -> Run:
        return Run(self.rule, self.loops, 2.0**log2, seed)


def _stable(done: Losses) -> dict[Run, float]:
    """The runs to the left of the lowest LR at which one diverged."""
    edge = _lowest_diverged(done)
    return {run: loss for run, loss in done.items() if math.log2(run.lr) < edge}


def _lowest_diverged(done: Losses) -> float:
    """The lowest log2(LR) at which a run diverged, or ended as high above the best as one that did."""
    edge = min((run.lr for run, loss in done.items() if not math.isfinite(loss)), default=math.inf)
    below = {run: loss for run, loss in done.items() if run.lr < edge}
    if below:
        best = min(below, key=lambda run: below[run])
        wall = below[best] + WALL * abs(below[best])
        edge = min([edge, *(run.lr for run, loss in below.items() if run.lr > best.lr and loss > wall)])
    return math.log2(edge)


def _highest(done: Losses) -> float:
    """The highest log2(LR) that may be returned: one that was run, or where higher ones diverge, one below it."""
    *others, highest = sorted(math.log2(run.lr) for run in _stable(done))
    edge = _lowest_diverged(done)
    if edge == math.inf:
        return highest
    return min(max([highest - BACK, *(log2 - MARGIN for log2 in others)]), edge - BACK)


def _fit(done: Losses) -> tuple[Curve, int]:
    """The curve by the runs that did not diverge, one at least, and the place on its grid of the LR to return."""
    stable = _stable(done)
    looks = [math.log2(run.lr) for run in stable]
    top = min(max(looks) + 1, _lowest_diverged(done) - BACK)
    grid = np.arange(4 * (min(looks) - 1), 4 * top + 1) / 4
    curve = curve_of(looks, [run.seed for run in stable], list(stable.values()), grid)
    return curve, int(np.where(grid <= _highest(done), curve.mean, math.inf).argmin())
