"""A sweep of 24 runs of the demo's size against the loop that a user would write, with torch's default threads.

python benchmarks/sweep_speed.py

Both make the same runs in this order: sweep, loop, sweep, loop. Printed is the ratio of the best times. On idle cores.
"""

import os
import platform
import tempfile
import time
from itertools import product
from pathlib import Path

import torch

import looptransfer as lt
from looptransfer.trials.hooks import held_out_loss, seeded
from looptransfer.trials.run import Trial
from looptransfer.trials.training import Training

LOOPS, LRS, SEEDS = (1, 2), (2.0**-9, 2.0**-8, 2.0**-7, 2.0**-6), (0, 1, 2)


def loop(experiment: lt.Experiment) -> float:
    """Seconds of the runs one after the other."""
    started = time.perf_counter()
    for loops, lr, seed in product(LOOPS, LRS, SEEDS):
        with seeded(seed):
            trial = Trial("factored", loops, lr, seed, device="cpu", directory=Path("none"))
            training = Training(experiment, trial)
            for _ in range(experiment.steps):
                training.loss()
                training.update()
            held_out_loss(experiment, training.model, "cpu")
    return time.perf_counter() - started


def sweep(experiment: lt.Experiment) -> float:
    """Seconds of a sweep, its checks of the start and its worker processes' own start included."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        lt.sweep(experiment, LOOPS, lrs=LRS, seeds=SEEDS, ledger=Path(folder, "ledger.db"), devices="cpu")
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    experiment = lt.reference_experiment()
    pairs = [(sweep(experiment), loop(experiment)) for _ in range(2)]
    swept, looped = (min(times) for times in zip(*pairs, strict=True))
    print(
        f"24 runs: sweep {swept:.0f} s, loop {looped:.0f} s with {torch.get_num_threads()} threads: "
        f"{looped / swept:.2f} × faster; {os.cpu_count()} cores, torch {torch.__version__}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
