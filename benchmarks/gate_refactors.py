"""What the gate costs on code that is unchanged in all that matters, and how often it raises a wrong alarm.

    python -m benchmarks.gate_refactors [--commits 100] [--steps 100] [--out reports/gate] [--workers N]

A commit puts the hidden units of every MLP into another order: the same function, the same training, other sums. Every
other one is gated as on another machine: its processes use PyTorch's kernels without AVX. Each is gated against the
optima that the untouched code stored. Told are trainings and CPU seconds beside those of the full check, which is the
sweep that made the baseline. What is finished is kept in the folder, and the same command goes on from there.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import looptransfer as lt
from benchmarks.verdict_simulations import table
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.trials.ledger import Ledger

LOOPS, SEEDS = (2, 16), 4
LRS = [2.0**log2 for log2 in np.arange(-9.5, -4.9, 0.75)]
OTHER_MACHINE = {"ATEN_CPU_CAPABILITY": "default"}


@dataclass(frozen=True)
class Refactored:
    """`make_model` of an experiment, with the hidden units of its MLPs in another order."""

    experiment: lt.Experiment
    commit: int

    def __call__(self, loops: int) -> nn.Module:
        model = self.experiment.make_model(loops)
        generator = torch.Generator().manual_seed(self.commit)
        for block in model.layers:
            up, down = block.mlp.up, block.mlp.down
            order = torch.randperm(down.in_features, generator=generator)
            with torch.no_grad():
                up.weight.copy_(up.weight.unflatten(0, (2, -1))[:, order].flatten(0, 1))
                down.weight.copy_(down.weight[:, order])
        return model


def looped(steps: int) -> lt.Experiment:
    return lt.reference_experiment(ReferenceSize(steps=steps, held_out=8_192))


def gated(job: tuple[int, int, str]) -> dict[str, Any]:
    """The gate's answer to a commit, with what it cost."""
    commit, steps, baseline = job
    torch.set_num_threads(1)
    experiment = looped(steps)
    commit_of = replace(experiment, make_model=Refactored(experiment, commit))
    with TemporaryDirectory() as folder:
        ledger, started = Path(folder, "gate.db"), time.process_time()
        told = lt.gate(commit_of, baseline, LOOPS, ledger=ledger, workers=1)
        seconds, trainings = time.process_time() - started, len(Ledger(ledger).finished)
    return {
        "commit": commit,
        "machine": "another" if os.environ.get("ATEN_CPU_CAPABILITY") else "the same",
        "answer": told.answer,
        "trainings": trainings,
        "seconds": round(seconds, 1),
    }


def answers(jobs: list[tuple[int, int, str]], workers: int) -> Iterator[dict[str, Any]]:
    """Even commits on this machine, odd ones as on another."""
    context = multiprocessing.get_context("spawn")
    for machine, parity in (({}, 0), (OTHER_MACHINE, 1)):
        os.environ |= machine
        try:
            with context.Pool(workers) as pool:
                yield from pool.imap_unordered(gated, [job for job in jobs if job[0] % 2 == parity])
        finally:
            for name in machine:
                del os.environ[name]


def report(told: list[dict[str, Any]], full: dict[str, float], steps: int) -> str:
    rows = [_row(machine, group, full) for machine, group in pd.DataFrame(told).groupby("machine", sort=False)]
    size = ReferenceSize()
    lines = [
        "# What unchanged code costs",
        "",
        *(__doc__ or "").strip().splitlines()[4:],
        "",
        table(pd.DataFrame(rows)),
        "",
        f"The full check: {full['trainings']:.0f} trainings, {full['seconds']:.0f} CPU seconds. The reference model,",
        f"L = {size.layers}, width {size.width}, {steps} steps, N = {' and '.join(map(str, LOOPS))}; {len(LRS)}",
        f"LRs 0.75 octave apart, {SEEDS} seeds. Made by",
        f"`python -m benchmarks.gate_refactors --commits {len(told)} --steps {steps}`.",
        f"Python {platform.python_version()}, torch {version('torch')}, looptransfer {version('looptransfer')},",
        f"{platform.machine()}, {os.cpu_count()} cores. Every answer is in refactors.json.",
    ]
    return "\n".join(lines) + "\n"


def _row(machine: object, group: pd.DataFrame, full: dict[str, float]) -> dict[str, object]:
    counts, median = group["answer"].value_counts(), group[["trainings", "seconds"]].median()
    return {
        "gated on": f"{machine} machine",
        "commits": len(group),
        "answers": ", ".join(f"{count} {answer}" for answer, count in counts.items()),
        "wrong alarms": int(group["answer"].isin(("MOVED", "WORSE")).sum()),
        "trainings, median": f"{median['trainings']:g}",
        "most": int(group["trainings"].max()),
        "CPU s, median": f"{median['seconds']:.0f}",
        "of the full check": f"1/{full['trainings'] / median['trainings']:.1f} of its trainings, "
        f"1/{full['seconds'] / median['seconds']:.1f} of its time",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("reports/gate"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    baseline, path = arguments.out / f"lr-optima-{arguments.steps}-steps.json", arguments.out / "refactors.json"
    if not baseline.exists():
        full = stored(arguments.steps, baseline, arguments.workers)
        path.write_text(json.dumps({"full": full, "answers": []}))
    record = json.loads(path.read_text())
    done = {answer["commit"] for answer in record["answers"]}
    jobs = [(commit, arguments.steps, str(baseline)) for commit in range(arguments.commits) if commit not in done]
    for answer in answers(jobs, arguments.workers):
        record["answers"] = sorted([*record["answers"], answer], key=lambda row: row["commit"])
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(answer, flush=True)
    text = report(record["answers"], record["full"], arguments.steps)
    (arguments.out / "refactors.md").write_text(text)
    print(text)


def stored(steps: int, baseline: Path, workers: int) -> dict[str, float]:
    """Store the optima of the untouched code, and return what their sweep cost."""
    with TemporaryDirectory() as folder:
        ledger = Path(folder, "full.db")
        runs = lt.sweep(looped(steps), LOOPS, lrs=LRS, seeds=SEEDS, ledger=ledger, workers=workers)
    lt.Baseline.of(lt.check(runs), baseline).write()
    return {"trainings": len(runs), "seconds": float(runs["seconds"].sum())}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
