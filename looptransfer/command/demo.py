"""The whole story on the reference experiment: tune at N = 2, carry the LR to N = 16, judge, report."""

import io
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from looptransfer.errors import InputError
from looptransfer.files import write_file
from looptransfer.reference.experiment import ReferenceSize, reference_experiment
from looptransfer.report.figures import plot_curves, plot_optima
from looptransfer.report.page import write_html
from looptransfer.rules import Rule
from looptransfer.transfer.check import check
from looptransfer.transfer.verdict import Verdict
from looptransfer.trials.progress import one_story
from looptransfer.trials.sweep import OCTAVES, TunedLR, sweep, tune

PROXY = 2
TUNING_SEEDS = 4  # at most
TUNING_RUNS = 8  # as a rule


@dataclass(frozen=True)
class DemoSize:
    """The extent of the demo. The rule that is judged has the most seeds, since FLAT needs them (reports/verdict/)."""

    size: ReferenceSize
    loops: tuple[int, ...]
    seeds: int
    controls: tuple[Rule, ...]
    control_loops: tuple[int, ...]
    control_seeds: int
    octaves: tuple[float, ...]


FULL = DemoSize(ReferenceSize(), (1, 2, 4, 8, 16), 6, ("sqrt", "unscaled"), (1, 4, 16), 3, OCTAVES)
QUICK = DemoSize(
    ReferenceSize(layers=1, steps=100), (1, 4, 16), 3, ("unscaled",), (1, 4, 16), 3, (-2.25, -1.5, -0.75, 0.0, 0.75)
)


def run_demo(out: Path, quick: bool = False, seed: int = 0, text: str | None = None) -> list[str]:
    """Run the demo into the folder `out` and return the answer in five lines.

    Written are report.html, its two figures as PNG, results.csv, verdict.json and ledger.db.

    Interrupted, it goes on where it was when run again with the same options.

    Raises:
        InputError: the folder cannot be written, the text cannot be used, or the ledger there is of another experiment.
        FailedRunError: a run failed; an InputError and a RuntimeError.
    """
    started = time.monotonic()
    scale = QUICK if quick else FULL
    _check_writable(out)
    experiment = reference_experiment(scale.size, text)
    seeds, ledger = range(seed, seed + scale.seeds), out / "ledger.db"
    tuning, control = seeds[:TUNING_SEEDS], seeds[: scale.control_seeds]
    with one_story("demo", _weight(scale)):
        best = tune(experiment, PROXY, tuning, ledger, devices="cpu")
        swept = partial(sweep, experiment, around=best, octaves=scale.octaves, ledger=ledger, devices="cpu")
        judged = swept(scale.loops, seeds=seeds)
        controls = swept(scale.control_loops, rules=scale.controls, seeds=control)
    results = pd.concat([judged, controls], ignore_index=True)
    verdict = check(results, transferred_lr=best.lr)
    lines = _answer(best, results, verdict, out)
    identity = experiment.identity()
    tuned = {"loops": best.loops, "lr": best.lr, "regret": best.optimum.regret, "seeds": list(tuning)}
    record = {**verdict.to_dict(), "tuned": tuned, "experiment": identity}
    trained = results.drop_duplicates(["loops", "lr", "seed", "seconds"])["seconds"].sum()  # shared runs count once
    provenance = {
        "command": shlex.join(["looptransfer", *sys.argv[1:]]),
        "wall time of this run": f"{time.monotonic() - started:.0f} s",
        "training time of the sweep": f"{trained:.0f} core-s",
        "seeds": f"{seeds[0]} to {seeds[-1]}; of the controls to {control[-1]}, of the tuning to {tuning[-1]}",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **identity,
    }
    write_file(out / "results.csv", results.to_csv(index=False))
    write_file(out / "verdict.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_html(verdict, out / "report.html", summary=lines[:-1], provenance=provenance)
    for name, figure in {"curves": plot_curves(verdict), "optima": plot_optima(verdict)}.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        write_file(out / f"{name}.png", picture.getvalue())
    return lines


def _weight(scale: DemoSize) -> int:
    """The sum of the loop counts of all runs, those of the tuning as they usually are; N = 1 is made for one rule."""
    controls = len(scale.controls) * scale.control_seeds * sum(loops for loops in scale.control_loops if loops > 1)
    return PROXY * TUNING_RUNS + len(scale.octaves) * (scale.seeds * sum(scale.loops) + controls)


def _answer(best: TunedLR, results: pd.DataFrame, verdict: Verdict, out: Path) -> list[str]:
    """The five lines at the end."""
    largest = int(results["loops"].max())
    answers = ", ".join(f"{rule} {judged.answer}" for rule, judged in verdict.rules.items())
    regrets = ", ".join(f"{rule} {judged.regret or 'not known'}" for rule, judged in verdict.rules.items())
    proxy = float(best.results["seconds"].sum())
    judged = results[(results["rule"] == verdict.rule) & ~results["diverged"]]
    at_target = float(judged.loc[judged["loops"] == largest, "seconds"].mean())
    at_proxy = float(best.results.loc[~best.results["diverged"], "seconds"].mean())
    target = proxy * at_target / at_proxy
    return [
        f"Tuned LR: {best}",
        f"Verdict over N: {answers}",
        f"Regret of that LR at N = {largest}, nats: {regrets}",
        f"Cost of tuning: {proxy:.0f} core-s at N = {best.loops}; the same runs at N = {largest} would take about "
        f"{target:.0f} core-s, {target / proxy:.1f}× as much",
        f"Report: {out / 'report.html'}",
    ]


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {out}: {error.strerror}; choose another folder with --out") from None
    write_file(out / "report.html", None)
