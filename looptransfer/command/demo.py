"""The whole story on the reference experiment: tune at N = 2, carry the LR to N = 16, judge, report.

Beside the verdict stands the coordinate check, which trains a few steps only and says why the optimum stays.
"""

import io
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from looptransfer.coordcheck.result import CoordCheck
from looptransfer.coordcheck.run import coord_check
from looptransfer.errors import InputError
from looptransfer.files import write_file
from looptransfer.reference.experiment import ReferenceSize, reference_experiment
from looptransfer.report.figures import plot_curves, plot_optima
from looptransfer.report.page import write_html
from looptransfer.rules import Rule
from looptransfer.transfer.check import check
from looptransfer.transfer.optimum import t_interval_of_runs
from looptransfer.transfer.provenance import page_origin
from looptransfer.transfer.verdict import Verdict
from looptransfer.trials.experiment import Experiment
from looptransfer.trials.hooks import one_thread
from looptransfer.trials.progress import one_story
from looptransfer.trials.sweep import TunedLR, sweep, tune

PROXY = 2
TUNING_SEEDS = 4  # at most
TUNING_RUNS = 8  # as a rule
COORDINATE_LOOPS, COORDINATE_SEEDS = (1, 2, 4, 8, 16), 4


@dataclass(frozen=True)
class DemoSize:
    """The extent of the demo. The rule that is judged has the most seeds, since FLAT needs them (reports/verdict/).

    Attributes:
        octaves: LRs of the judged rule, from the tuned one. On fewer than six a flat bottom is not told from noise.
        control_octaves: LRs of the controls at the largest N, lower, where their optima go; at N = 1, where all rules
            are one, they have those of the judged rule.
    """

    size: ReferenceSize
    loops: tuple[int, ...]
    octaves: tuple[float, ...]
    seeds: int
    controls: tuple[Rule, ...]
    control_octaves: tuple[float, ...]
    control_seeds: int


FULL = DemoSize(
    ReferenceSize(held_out=8_192),
    loops=(1, 4, 16),
    octaves=(-2.25, -1.5, -0.75, 0.0, 0.75, 1.5),
    seeds=4,
    controls=("sqrt", "unscaled"),
    control_octaves=(-3.0, -2.25, -1.5, 0.0),
    control_seeds=3,
)
QUICK = DemoSize(  # the control says what the tuned LR gives without the rule, and no more
    ReferenceSize(layers=1, steps=100, held_out=8_192),
    loops=(1, 4, 16),
    octaves=(-2.0, -1.0, 0.0, 1.0),
    seeds=4,
    controls=("unscaled",),
    control_octaves=(0.0,),
    control_seeds=4,
)


def run_demo(out: Path, quick: bool = False, seed: int = 0, text: str | None = None) -> list[str]:
    """Run the demo into the folder `out` and return the answer in a few lines.

    Written are report.html, its two figures as PNG, coordinates.html, results.csv, verdict.json and ledger.db.

    Interrupted, it goes on where it was when run again with the same options.

    Raises:
        InputError: the folder cannot be written, the text cannot be used, or the ledger there is of another experiment.
        FailedRunError: a run failed; an InputError and a RuntimeError.
    """
    started = time.monotonic()
    scale = QUICK if quick else FULL
    _check_writable(out)
    experiment = reference_experiment(scale.size, text)
    seeds = range(seed, seed + scale.seeds)
    best, results = _trained(experiment, scale, seeds, out / "ledger.db")
    verdict = check(results, transferred_lr=best.lr)
    with one_thread():
        coordinates = coord_check(experiment, COORDINATE_LOOPS, ["factored", *scale.controls], seeds=COORDINATE_SEEDS)
    lines = _answer(best, results, verdict, coordinates)
    if quick:
        lines.append("A quick look, which may leave the verdict open: looptransfer demo trains longer, with more LRs")
    controls, tuning = seeds[: scale.control_seeds], seeds[:TUNING_SEEDS]
    tuned = {"loops": best.loops, "lr": best.lr, "regret": best.optimum.regret, "seeds": list(tuning)}
    record = {**verdict.to_dict(), "tuned": tuned, "experiment": experiment.identity()}
    trained = results.drop_duplicates(["loops", "lr", "seed", "seconds"])["seconds"].sum()  # shared runs count once
    provenance = {
        **page_origin(),
        "wall time of this run": f"{time.monotonic() - started:.0f} s",
        "training time of the sweep": f"{trained:.0f} core-s",
        "seeds": f"{seeds[0]} to {seeds[-1]}; of the controls to {controls[-1]}, of the tuning to {tuning[-1]}",
        "python": platform.python_version(),
        **experiment.identity(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
    }
    write_file(out / "results.csv", results.to_csv(index=False))
    write_file(out / "verdict.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_html(verdict, out / "report.html", summary=lines, provenance=provenance, coordinates="coordinates.html")
    write_html(coordinates, out / "coordinates.html", provenance=provenance)
    for name, figure in {"curves": plot_curves(verdict), "optima": plot_optima(verdict)}.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        write_file(out / f"{name}.png", picture.getvalue())
    return [*verdict.headline, *lines, f"Report: {out / 'report.html'}"]


def _trained(experiment: Experiment, scale: DemoSize, seeds: range, ledger: Path) -> tuple[TunedLR, pd.DataFrame]:
    """Make all runs: the tuned LR, and the table of the sweeps around it."""
    with one_story("demo", _weight(scale)):
        best = tune(experiment, PROXY, seeds[:TUNING_SEEDS], ledger, devices="cpu")
        swept = partial(sweep, experiment, around=best, ledger=ledger, devices="cpu")
        judged = swept(scale.loops, octaves=scale.octaves, seeds=seeds)
        compared = partial(swept, seeds=seeds[: scale.control_seeds], rules=scale.controls)
        start = compared(scale.loops[:1], octaves=scale.octaves)
        target = compared(scale.loops[-1:], octaves=scale.control_octaves)
    return best, pd.concat([judged, start, target], ignore_index=True)


def _weight(scale: DemoSize) -> int:
    """The sum of the loop counts of all runs, those of the tuning as they usually are; N = 1 is made for one rule."""
    judged = len(scale.octaves) * scale.seeds * sum(scale.loops)
    controls = len(scale.control_octaves) * scale.control_seeds * len(scale.controls) * scale.loops[-1]
    return PROXY * TUNING_RUNS + judged + controls


def _answer(best: TunedLR, results: pd.DataFrame, verdict: Verdict, coordinates: CoordCheck) -> list[str]:
    """The answer, a line each: the LR, what becomes of it at large N beside the controls, and what it cost."""
    answers = ", ".join(f"{rule} {judged.answer}" for rule, judged in verdict.rules.items())
    told = [difference for difference in verdict.differences if difference.drift is not None]
    return [
        f"Tuned LR: {best}",
        f"At N = {results['loops'].max()} that LR: {', '.join(_at_target(best, results, verdict))}",
        f"Verdict over N: {answers}",
        *(f"{title}: {numbers}" for title, numbers in map(verdict.difference_text, told)),
        f"Coordinate check: {coordinates.rule} {coordinates.answer}",
        f"Cost of tuning: {best.results['seconds'].sum():.0f} core-s at N = {best.loops}",
    ]


def _at_target(best: TunedLR, results: pd.DataFrame, verdict: Verdict) -> Iterator[str]:
    """The loss of the tuned LR at the largest N under each rule; of a control its excess, paired by seed."""
    target = results[(results["loops"] == results["loops"].max()) & np.isclose(results["lr"], best.lr)]
    losses = target.pivot(index="seed", columns="rule", values="loss").dropna()
    judged = verdict.judged
    yield f"{verdict.rule} loss {losses[verdict.rule].mean():.3f} nats, regret {judged.regret or 'not known'}"
    for control in losses.columns.drop(verdict.rule):
        excess = t_interval_of_runs(losses[control] - losses[verdict.rule], verdict.confidence)
        yield f"{control} {excess} nats more"


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {out}: {error.strerror}; choose another folder with --out") from None
    write_file(out / "report.html", None)
