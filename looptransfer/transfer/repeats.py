"""The first stage of the gate: a few stored runs made again should give the losses that they gave. Our extension.

Code that is unchanged repeats them. Code that only sums in another order, and another machine, repeat them but for
float noise, which training amplifies; a control tells how much: the same run at an LR one float32 ulp higher.

At half the stored LR training is stable: there the loss comes out to the last digits, which code that computes anything
else does not give. At the stored LR itself, where many steps add up, noise may grow to what seeds differ by; there
it is explained up to the tolerance of the loss, by the mean over a few seeds where the first alone lies outside. What
changes at high LRs only, such as clipping, shows there.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from looptransfer.transfer.comparison import ComparedOptimum
from looptransfer.transfer.stored import StoredOptimum

ULP = 2.0**-23  # of a float32, relative
OCTAVES = (-1.0, 0.0)  # from the optimum: where a run is made again
SEEDS = 3  # at most, at the optimum
SAME = 8 * ULP  # relative difference of two losses that needs no explanation
NOISE = 8.0  # times what the controls differ that float noise explains
SHARE = 0.1  # of the tolerance of the loss that it explains at half the LR


@dataclass(frozen=True)
class Repeat:
    """A run that a baseline has the loss of; `lr` is absolute."""

    n: int
    lr: float
    seed: int
    loss: float

    @property
    def control_lr(self) -> float:
        """The LR of its control."""
        return self.lr * (1 + ULP)

    def gap(self, loss: float) -> float:
        """How far a loss lies above the stored one, in its unit; infinite where the run diverged."""
        return loss - self.loss if math.isfinite(loss) else math.inf


def runs_to_repeat(stored: StoredOptimum) -> list[Repeat]:
    """The run nearest to half the stored LR, then those nearest to the LR itself, a seed each.

    Of the first seeds that have both; none where no seed has.
    """
    losses = {float(lr): by_seed for lr, by_seed in stored.losses.items()}
    lrs = sorted({_nearest(losses, stored.lr * 2.0**octaves) for octaves in OCTAVES if losses})
    named = {seed for by_seed in losses.values() for seed in by_seed if seed.isdecimal()}
    repeats: list[list[Repeat]] = []
    for seed in sorted(named, key=int):
        finite = {lr: loss for lr in lrs if (loss := losses[lr].get(seed)) is not None}
        if len(finite) == len(OCTAVES):
            repeats.append([Repeat(stored.n, lr, int(seed), loss) for lr, loss in finite.items()])
    return [*(repeats[0][:1] if repeats else []), *(once for _, once in repeats[:SEEDS])]


def are_same(repeats: Sequence[Repeat], gaps: Sequence[float]) -> bool:
    """Gaps that only the last digits of a float32 make."""
    return all(abs(gap) <= SAME * abs(repeat.loss) for repeat, gap in zip(repeats, gaps, strict=True))


def are_small(gaps: Sequence[float], limit: float) -> bool:
    """Gaps whose mean float noise may explain."""
    return abs(math.fsum(gaps)) <= limit * len(gaps)


def are_noise(gaps: Sequence[float], controls: Sequence[float]) -> bool:
    """Gaps that float noise explains, by how much the controls differ from their runs, where none diverged."""
    return all(map(math.isfinite, controls)) and max(map(abs, gaps)) <= NOISE * max(map(abs, controls))


def confirmed(stored: StoredOptimum, repeats: Sequence[Repeat], gaps: Sequence[float]) -> ComparedOptimum:
    """HOLDS, since stored runs made again gave the losses that they gave, but for these gaps."""
    half, once = repeats[0], repeats[1:]
    mean = math.fsum(gaps[1:]) / len(once)
    seeds = ", ".join(str(repeat.seed) for repeat in once)
    subject = f"seed {seeds} gives" if len(once) == 1 else f"seeds {seeds} give"
    reason = (
        f"{subject} the stored losses again: LR {half.lr:.3g} {_words(gaps[0])}, LR {once[0].lr:.3g} {_words(mean)}"
        + (" in the mean" if len(once) > 1 else "")
    )
    return ComparedOptimum(stored.n, "HOLDS", reason, stored.lr, seeds=len(once), paired=True)


def _words(gap: float) -> str:
    return f"but for {abs(gap):.1g}" if gap else "exactly"


def _nearest(lrs: Iterable[float], centre: float) -> float:
    return min(lrs, key=lambda lr: abs(math.log2(lr / centre)))
