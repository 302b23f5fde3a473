"""The first stage of the gate: a few stored runs made again should give the losses that they gave. Our extension.

Code that is unchanged repeats them. Code that only sums in another order, and another machine, repeat them but for
float noise, which training amplifies; a control tells how much: the same run at an LR one float32 ulp higher. What
moves the optimum or makes the loss worse also moves the loss at the stored LR, at half of it, or both.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from looptransfer.transfer.comparison import ComparedOptimum
from looptransfer.transfer.stored import StoredOptimum

ULP = 2.0**-23  # of a float32, relative
OCTAVES = (-1.0, 0.0)  # from the optimum: where a run is made again
SAME = 8 * ULP  # relative difference of two losses that needs no explanation
NOISE = 8.0  # times what the control differs that float noise explains: chosen, to be measured by gate_refactors.py
SHARE = 0.1  # of the tolerance of the loss that it explains at most: chosen as well


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


def runs_to_repeat(stored: StoredOptimum) -> list[Repeat]:
    """The runs nearest to half and to once the stored LR, of the first seed that has both; none where none has."""
    losses = {float(lr): by_seed for lr, by_seed in stored.losses.items()}
    lrs = sorted({_nearest(losses, stored.lr * 2.0**octaves) for octaves in OCTAVES if losses})
    named = {seed for by_seed in losses.values() for seed in by_seed if seed.isdecimal()}
    for seed in sorted(named, key=int):
        finite = {lr: loss for lr in lrs if (loss := losses[lr].get(seed)) is not None}
        if len(finite) == len(OCTAVES):
            return [Repeat(stored.n, lr, int(seed), loss) for lr, loss in finite.items()]
    return []


def largest_gap(repeats: Sequence[Repeat], losses: Sequence[float]) -> float:
    """How far at most a loss lies from the stored one, in its unit; infinite where a run diverged."""
    gaps = [abs(loss - repeat.loss) for repeat, loss in zip(repeats, losses, strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf


def is_same(gap: float, repeats: Sequence[Repeat]) -> bool:
    """A gap that only the last digits of a float32 make."""
    return gap <= SAME * max(abs(repeat.loss) for repeat in repeats)


def is_small(gap: float, loss_tolerance: float) -> bool:
    """A gap that may be float noise."""
    return gap <= SHARE * loss_tolerance


def is_noise(gap: float, control: float) -> bool:
    """A gap that float noise explains, by how much the control differs from its run."""
    return gap <= NOISE * abs(control)


def confirmed(stored: StoredOptimum, repeats: Sequence[Repeat], gap: float) -> ComparedOptimum:
    """HOLDS, since stored runs made again gave the losses that they gave."""
    lrs = " and ".join(f"{repeat.lr:.3g}" for repeat in repeats)
    reason = f"seed {repeats[0].seed} gives the stored losses again, at LR {lrs}"
    return ComparedOptimum(
        stored.n, "HOLDS", f"{reason}, but for {gap:.1g}" if gap else reason, stored.lr, seeds=1, paired=True
    )


def _nearest(lrs: Iterable[float], centre: float) -> float:
    return min(lrs, key=lambda lr: abs(math.log2(lr / centre)))
