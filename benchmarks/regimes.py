"""What the drift over N, the direction in which the 1/√N arm moves, and the gain of loops depend on.

    python -m benchmarks.regimes [--minutes M] [--out reports/transfer/regimes]

The reference experiment with one layer, whose matrices start as large beside the embedding as at the paper's width,
0.02·√(768/width); every other row changes one thing of it. Each is trained at N = 1 and 8 under `factored` (1/N) and
`sqrt` (1/√N), or under `factored` alone where λ is what changes. Told are the drift of each, and what loops gain: the
loss at the best LR of N = 8 less that at the best LR of N = 1, paired by seed, by the grid.

A killed run goes on from its ledgers, and `--minutes` begins no further row after that time.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import looptransfer as lt
from benchmarks.cells import (
    CENTRE,
    SEEDS,
    Cell,
    draw_drifts,
    footer,
    gain_of_loops,
    options,
    publish,
    regret_of,
    run_cells,
)
from benchmarks.paper import enlarge_matrices, paper_gain
from benchmarks.verdict_simulations import table
from looptransfer.reference.experiment import ReferenceSize
from looptransfer.rewrite.plan import Role
from looptransfer.rules import Rule
from looptransfer.transfer.optimum import Interval, Optimum

REPORT = Path(__file__).parent.parent / "reports" / "transfer" / "regimes"
LOOPS = (1, 8)
OCTAVES = (-2.25, -1.5, -0.75, 0.0, 0.75)
TO_THE_EDGE = (*OCTAVES, *(1.5 + 0.75 * step for step in range(10)))  # up to LRs at which all rules diverge
HELD = 2 * CENTRE  # LR of embedding and head where they are held
BOTH: tuple[Rule, ...] = ("factored", "sqrt")
LARGER = paper_gain(ReferenceSize().width)


@dataclass(frozen=True)
class Model:
    """loop count -> the reference decoder, the matrices of its loop, and perhaps the others, larger at the start."""

    layers: int = 1
    loop_gain: float = LARGER
    embedding_gain: float = 1.0
    tied_head: bool = False

    def __call__(self, loops: int) -> nn.Module:
        size = ReferenceSize()
        model = lt.LoopedDecoder(
            width=size.width, heads=size.heads, layers=self.layers, loops=loops, tied_head=self.tied_head
        )
        enlarge_matrices(model.layers, self.loop_gain)
        enlarge_matrices(model.embedding, self.embedding_gain)
        return model


def held(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW whose LR of embedding and head is not that of the search."""
    ratio: dict[Role, float] = {"embedding": HELD / lr, "head": HELD / lr}
    groups = lt.param_groups(model, torch.optim.AdamW, lr=lr, weight_decay=0.1, lr_ratio=ratio)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


@dataclass(frozen=True)
class Regime:
    """One row: what differs from the first."""

    title: str
    model: Model = Model()
    steps: int = 250
    changes: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = BOTH
    seeds: int = SEEDS
    octaves: tuple[float, ...] = OCTAVES

    def experiment(self) -> lt.Experiment:
        """The reference experiment, changed."""
        size = ReferenceSize(layers=self.model.layers, steps=self.steps, held_out=8_192)
        changed: Callable[..., lt.Experiment] = partial(replace, lt.reference_experiment(size))
        return changed(name=self.title, make_model=self.model, **self.changes)

    def cell(self, name: str) -> Cell:
        """Its sweep."""
        return Cell(name, self.experiment, LOOPS, self.rules, self.octaves, 2 * CENTRE, self.seeds)


REGIMES = {
    "base": Regime("as described, 250 steps", rules=(*BOTH, "unscaled"), octaves=TO_THE_EDGE),
    "small": Regime("matrices of the loop start at 0.02", Model(loop_gain=1.0)),
    "no-clip": Regime("gradients not clipped", changes={"clip": None}, octaves=TO_THE_EDGE),
    "warm-up": Regime("warm-up over 10 % of the steps, not 50 %", changes={"warmup": 0.1}, seeds=2 * SEEDS),
    "held": Regime(f"LR of embedding and head held at {HELD:g}", changes={"optimizer": held}, seeds=2 * SEEDS),
    "lambda-2": Regime("λ = 2", changes={"lam": 2.0}, rules=("factored",)),
    "lambda-half": Regime("λ = 1/2", changes={"lam": 0.5}, rules=("factored",), seeds=2 * SEEDS),
    "lambda-4": Regime("λ = 4", changes={"lam": 4.0}, rules=("factored",)),
    "long": Regime("1000 steps", steps=1000),
    "embedding": Regime("the embedding starts as much larger too", Model(embedding_gain=LARGER), seeds=2 * SEEDS),
    "tied": Regime("tied head", Model(tied_head=True), seeds=2 * SEEDS),
    "two-layers": Regime("two layers", Model(layers=2)),
}


def rows_of_regime(regime: Regime, verdict: lt.Verdict) -> list[dict[str, str]]:
    """A row per rule."""
    return [
        {
            "regime": regime.title if rule == "factored" else "",
            "rule": rule,
            "seeds": str(regime.seeds),
            "verdict": judged.answer,
            "drift": judged.drift.text(2) if judged.drift else f"none: {judged.cause}",
            "regret": regret_of(verdict, rule),
            "loss at the best LR of N = 1, 8": ", ".join(
                f"{losses.mean(axis=1).min():.3f}" for losses in judged.tables.values()
            ),
            "loops gain": gain_of_loops(judged).text(3),
            "octaves within 0.02 nats at N = 1, 8": ", ".join(basin_of(optimum) for optimum in judged.optima),
        }
        for rule, judged in verdict.rules.items()
    ]


def edges_of(regime: Regime, verdict: lt.Verdict) -> list[dict[str, str]]:
    """The LRs between which training becomes unstable, a row per rule, where the grid goes so far."""
    rows = []
    for rule, judged in verdict.rules.items():
        stable = {n: losses.max(axis=1).map(math.isfinite) for n, losses in judged.tables.items()}
        if all(lrs.all() for lrs in stable.values()):
            continue
        edges = {n: edge_of(lrs, judged.tables[n].mean(axis=1).idxmin()) for n, lrs in stable.items()}
        rows.append({"regime": regime.title, "rule": rule, **{f"N = {n}": edge for n, edge in edges.items()}})
    return rows


def edge_of(stable: pd.Series, best: float) -> str:
    """The highest LR below which no seed diverges and the next one, and how far above the best they lie."""
    if stable.all():
        return f"> {2 ** stable.index[-1]:.3g}"
    first = stable.index[~stable][0]
    last = stable.index[stable.index < first][-1]
    return f"{2**last:.3g} to {2**first:.3g}, {last - best:.2f} to {first - best:.2f} octaves above the best"


def basin_of(optimum: Optimum) -> str:
    """The width of a basin, which may be larger where it reaches the last LR."""
    if optimum.basin is None:
        return f"none: {optimum.censored}"
    return f"{'≥ ' if optimum.basin.low_open or optimum.basin.high_open else ''}{optimum.basin.octaves:.2f}"


def first_line(verdicts: dict[str, lt.Verdict]) -> str:
    """Where the optimum moves and which way, and where loops pay, as far as the intervals tell."""
    lines = []
    for rule in BOTH:
        judged = {title: verdict.rules[rule] for title, verdict in verdicts.items() if rule in verdict.rules}
        drifts = {title: j.drift for title, j in judged.items() if j.drift}
        gained = {title: gain_of_loops(j) for title, j in judged.items()}
        lines.append(
            f"- `{rule}`: as N grows the best LR rises in: {named(drifts, 1)}; it falls in: {named(drifts, -1)}; "
            f"in {len(judged) - len(drifts)} of {len(judged)} regimes a drift cannot be fitted. Loops pay in: "
            f"{named(gained, 1)}; they cost in: {named(gained, -1)}."
        )
    return "\n".join(lines)


def named(intervals: Mapping[str, Interval], sign: int) -> str:
    """The regimes whose interval lies on one side of 0."""
    beyond = [title for title, i in intervals.items() if min(sign * i.low, sign * i.high) > 0]
    return "; ".join(beyond) or "none"


def report(out: Path, finished: list[Cell]) -> str:
    """The README of the rows that are finished."""
    runs = {cell.name: pd.read_csv(cell.table(out)) for cell in finished}
    verdicts = {name: lt.check(frame, "factored") for name, frame in runs.items()}
    titled = {REGIMES[name].title: verdict for name, verdict in verdicts.items()}
    draw_drifts(titled).savefig(out / "drifts.png", dpi=150)
    rows = [row for name, verdict in verdicts.items() for row in rows_of_regime(REGIMES[name], verdict)]
    edges = [row for name, verdict in verdicts.items() for row in edges_of(REGIMES[name], verdict)]
    size = ReferenceSize()
    lines = [
        "# What the drift over N depends on",
        "",
        first_line(titled),
        "",
        *(__doc__ or "").splitlines()[4:],
        "",
        f"Width {size.width}, {size.batch} × {size.sequence} bytes a step, paired seeds, LRs 0.75 octave apart "
        f"around {2 * CENTRE}, the grid two or four LRs longer where the best was its last. Drift in octaves of the "
        "best base LR per doubling of N, regret and gain in nats (a gain above 0: loops pay), 90 % intervals over "
        "seeds.",
        "",
        "![drifts](drifts.png)",
        "",
        table(pd.DataFrame(rows)),
        "",
        "## Where training becomes unstable",
        "",
        "The highest LR up to which no seed diverges, and the next one, at which some seed does.",
        "",
        table(pd.DataFrame(edges)),
        "",
        *footer(runs.values()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = options(__doc__, REPORT).parse_args()
    cells = [regime.cell(name) for name, regime in REGIMES.items()]
    finished = run_cells(cells, arguments.out, arguments.minutes, arguments.workers)
    publish(arguments.out, report(arguments.out, finished))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
