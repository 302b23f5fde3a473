"""How often the cheap mode of the gate is right: simulated optima, stored once and looked at again.

    python benchmarks/gate_simulations.py [--times 1000] [--out reports/gate]

Each time a sweep of 7 LRs is simulated with the noise of the reference model, its optima at N = 1 and 16 are stored,
the one at N = 16 moves, and half, once and twice the stored LR are run at both with fresh noise. That is the hard
case: runs of unchanged code with the same seeds repeat their noise as well. The gate looks at half of its seeds first,
and at all of them where these do not tell.
"""

import argparse
import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.verdict_simulations import SEED, Cell, Noise, fit_noise, mean_loss, simulate, table
from looptransfer.transfer.bracket import OCTAVES, bracket_optimum, first_seeds, stored_lrs
from looptransfer.transfer.optimum import find_optimum
from looptransfer.transfer.stored import StoredOptimum

CONFIDENCE, LOSS_TOLERANCE, STORED_SEEDS = 0.90, 0.02, 4
CODES = {"MOVED": 1, "WORSE": 1, "INCONCLUSIVE": 3, "HOLDS": 0}
Rounds = tuple[int, ...]  # how many seeds are looked at, in turn


def look(
    noise: Noise, scale: float, rounds: Rounds, moved: float, shape: str, rng: np.random.Generator
) -> tuple[int, float] | None:
    """The gate's exit status, and the seeds that an optimum took; None where the sweep gave no optimum to store."""
    cell = Cell(seeds=STORED_SEEDS, noise=scale, loops=(1, 16), shape=shape)
    tables, vertices = simulate(cell, noise, rng)
    optima = [find_optimum(at, losses, CONFIDENCE) for at, losses in tables.items()]
    if any(optimum.log2_lr is None for optimum in optima):
        return None
    stored = [StoredOptimum.of(optimum, CONFIDENCE) for optimum in optima]
    again = Cell(seeds=rounds[-1], lrs=3, noise=scale, loops=(1, 16), shape=shape)
    centres = np.array([optimum.log2_lr.estimate for optimum in stored if optimum.log2_lr is not None])
    u = centres[:, None] + np.array(OCTAVES) - (vertices + np.array([0.0, moved]))[:, None]
    losses = 2.0 + mean_loss(again, u, np.log2(again.loops)) + noise.draw(rng, again, u)
    looks = [in_rounds(optimum, losses[:, i].T, rounds) for i, optimum in enumerate(stored)]
    codes = {code for code, _ in looks}
    return (1 if 1 in codes else max(codes)), float(np.mean([seeds for _, seeds in looks]))


def in_rounds(stored: StoredOptimum, losses: np.ndarray, rounds: Rounds) -> tuple[int, int]:
    """The exit status for one optimum, with the seeds that it took; `losses` has a row per LR."""
    for seeds in rounds:
        names = [f"new {seed}" for seed in range(seeds)]
        bracket = pd.DataFrame(losses[:, :seeds], np.log2(stored_lrs(stored)), names)
        finding = bracket_optimum(stored, bracket, LOSS_TOLERANCE, CONFIDENCE)
        if finding.answer != "INCONCLUSIVE":
            break
    return CODES[finding.answer], seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000, help="per row (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path("reports/gate"))
    arguments = parser.parse_args()
    noise, rows = fit_noise(), []
    kinds = itertools.product(
        ("asymmetric", "cliff"), (0.5, 1.0), ((2,), (4,), (6,), (first_seeds(6), 6)), (0.0, -0.5, -1.0, -2.0)
    )
    for number, (shape, scale, rounds, moved) in enumerate(kinds):
        rng = np.random.default_rng([SEED, number])
        looks = [look(noise, scale, rounds, moved, shape, rng) for _ in range(arguments.times)]
        seen = [told for told in looks if told is not None]
        codes = Counter(code for code, _ in seen)
        share = {name: codes[code] / max(1, codes.total()) for name, code in (("holds", 0), ("moved", 1), ("?", 3))}
        kind = {"shape": shape, "noise": scale, "seeds": ", then ".join(map(str, rounds)), "moved by": moved}
        taken = round(float(np.mean([seeds for _, seeds in seen])), 1) if seen else 0.0
        rows.append(kind | share | {"seeds taken": taken, "of": codes.total()})
    frame = pd.DataFrame(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = [
        "# How often the cheap mode is right",
        "",
        *(__doc__ or "").strip().splitlines()[4:],
        "",
        "Noise in units of that of reports/sweep; octaves that the optimum at N = 16 moved; shares of the times in",
        "which the sweep gave an optimum to store (`of`). `moved` at 0 is the false-alarm rate.",
        "",
        table(frame),
    ]
    (arguments.out / "cheap_mode.md").write_text("\n".join(text) + "\n")
    print(frame.to_string())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
